"""Stream sockets without a library: a unix socket pair, or TCP over loopback; frames have their length before them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np

from benchmark import hosts
from benchmark.model import Work
from benchmark.peers.base import Array, Receiver, Sender, Transport

WORD = struct.Struct("<Q")
CHUNK = 65536


class Sockets(Transport):
    """Option tcp."""

    def open(self, work: Work, channels: int) -> None:
        self.pairs = [self._tcp(work) if self.options.get("tcp") else socket.socketpair() for _ in range(channels)]

    def _tcp(self, work: Work) -> tuple[socket.socket, socket.socket]:
        there = hosts.inside(1) if work.hosts else nullcontext()
        with there:
            listener = socket.create_server((hosts.ADDRESSES[1] if work.hosts else "127.0.0.1", 0))
        here = hosts.inside(0) if work.hosts else nullcontext()
        with listener, here:
            one = socket.create_connection(listener.getsockname())
            other = listener.accept()[0]
        for end in (one, other):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return one, other

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return SocketSender(self.pairs[channel][0])

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        return SocketReceiver(self.pairs[channel][1], work.size)


class SocketSender(Sender):
    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def put(self, value: int) -> None:
        self.end.sendall(WORD.pack(value))

    def put_all(self, values: range) -> None:
        send = self.end.sendall
        for value in map(WORD.pack, values):
            send(value)

    def put_frame(self, frame: Array) -> None:
        self.end.sendall(WORD.pack(frame.nbytes))
        self.end.sendall(frame)


class SocketReceiver(Receiver):
    def __init__(self, end: socket.socket, size: int) -> None:
        self.end = end
        self.buffer = np.empty(max(size, 8), np.uint8)

    def get(self) -> int:
        value: int = WORD.unpack(self.end.recv(8, socket.MSG_WAITALL))[0]
        return value

    def values(self) -> Iterator[int]:
        """As a reader of a byte stream does: what has come, cut into words."""
        left = b""
        while True:
            data = left + self.end.recv(CHUNK)
            whole = len(data) // 8 * 8
            left = data[whole:]
            for (value,) in WORD.iter_unpack(data[:whole]):
                yield value

    def frames(self) -> Iterator[Array]:
        into = memoryview(self.buffer)
        while True:
            size = self.get()
            got = 0
            while got < size:
                got += self.end.recv_into(into[got:size])
            yield self.buffer[:size]
