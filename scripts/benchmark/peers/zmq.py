"""pyzmq: PUSH and PULL over ipc or tcp; PUB and SUB for fan-out, which drops at the high-water mark, counted."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from itertools import chain

import zmq

from benchmark import hosts
from benchmark.model import Work
from benchmark.peers.base import Array, Receiver, Sender, Transport
from benchmark.ports import free_ports
from benchmark.tally import PATIENCE, as_array, silence

silence(zmq.Again)

WORD = struct.Struct("<Q")


class ZmqSender(Sender):
    def __init__(self, socket: zmq.Socket[bytes], copy: bool) -> None:
        self.socket, self.copy = socket, copy

    def put(self, value: int) -> None:
        self.socket.send(WORD.pack(value))

    def put_all(self, values: range) -> None:
        send = self.socket.send
        for value in map(WORD.pack, values):
            send(value)

    def put_frame(self, frame: Array) -> None:
        if self.copy:
            self.socket.send(frame)
        else:
            self.socket.send(frame.copy(), copy=False)  # zmq reads it later: the array must stay as it is

    def close(self) -> None:
        self.socket.close(linger=0)


class ZmqReceiver(Receiver):
    def __init__(self, socket: zmq.Socket[bytes], copy: bool) -> None:
        self.socket, self.copy = socket, copy

    def get(self) -> int:
        value: int = WORD.unpack(self.socket.recv())[0]
        return value

    def values(self) -> Iterator[int]:
        return chain.from_iterable(map(WORD.unpack, iter(self.socket.recv, None)))

    def frames(self) -> Iterator[Array]:
        receive = self.socket.recv
        while True:
            yield as_array(receive() if self.copy else receive(copy=False).buffer)

    def close(self) -> None:
        self.socket.close(linger=0)


class Zmq(Transport):
    """Options: tcp, copy, publish."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.copy = bool(options.get("copy", True))
        if options.get("publish"):
            self.fan = "native"  # type: ignore[misc]

    def open(self, work: Work, channels: int) -> None:
        folder = tempfile.mkdtemp(prefix="bench-zmq-")
        ports = free_ports(channels)
        host = hosts.ADDRESSES[0] if work.hosts else "127.0.0.1"
        self.addresses = [
            f"tcp://{host}:{ports[one]}" if self.options.get("tcp") else f"ipc://{os.path.join(folder, str(one))}"
            for one in range(channels)
        ]

    def _socket(self, kind: int, work: Work) -> zmq.Socket[bytes]:
        socket = zmq.Context.instance().socket(kind)
        half = max(1, work.slots // 2)  # a mark at each end: together the ring of the others
        socket.set_hwm(half)
        return socket

    def sender(self, work: Work, channel: int = 0) -> Sender:
        socket = self._socket(zmq.PUB if self.fan == "native" else zmq.PUSH, work)
        socket.bind(self.addresses[channel])
        return ZmqSender(socket, self.copy)

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        native = self.fan == "native"
        socket = self._socket(zmq.SUB if native else zmq.PULL, work)
        if native:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
        socket.connect(self.addresses[channel])
        return ZmqReceiver(socket, self.copy)
