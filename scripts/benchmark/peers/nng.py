"""pynng: PUSH and PULL over ipc."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pynng

from benchmark.model import Work
from benchmark.peers.base import Array, Receiver, Sender, Transport
from benchmark.tally import PATIENCE, as_array, silence

WORD = struct.Struct("<Q")
LARGEST = 8192  # messages in a buffer of nng
silence(pynng.exceptions.Timeout)


class Nng(Transport):
    def open(self, work: Work, channels: int) -> None:
        folder = tempfile.mkdtemp(prefix="bench-nng-")
        self.addresses = [f"ipc://{os.path.join(folder, str(one))}" for one in range(channels)]

    def _marks(self, work: Work) -> int:
        return max(1, min(LARGEST, work.slots // 2))

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return NngSender(pynng.Push0(listen=self.addresses[channel], send_buffer_size=self._marks(work)))

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        socket = pynng.Pull0(recv_buffer_size=self._marks(work), recv_max_size=0, recv_timeout=int(PATIENCE * 5000))
        socket.dial(self.addresses[channel], block=False)
        return NngReceiver(socket)


class NngSender(Sender):
    def __init__(self, socket: Any) -> None:
        self.socket = socket

    def put(self, value: int) -> None:
        self.socket.send(WORD.pack(value))

    def put_all(self, values: range) -> None:
        send = self.socket.send
        for value in map(WORD.pack, values):
            send(value)

    def put_frame(self, frame: Array) -> None:
        self.socket.send(frame.tobytes())

    def close(self) -> None:
        self.socket.close()


class NngReceiver(Receiver):
    def __init__(self, socket: Any) -> None:
        self.socket = socket

    def get(self) -> int:
        value: int = WORD.unpack(self.socket.recv())[0]
        return value

    def values(self) -> Iterator[int]:
        return chain.from_iterable(map(WORD.unpack, iter(self.socket.recv, None)))

    def frames(self) -> Iterator[Array]:
        receive = self.socket.recv
        while True:
            yield as_array(receive())

    def close(self) -> None:
        self.socket.close()
