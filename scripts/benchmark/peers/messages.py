"""What libraries of message sockets have in common: objects with send(bytes), recv() and close()."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol

from benchmark.peers.base import Array, Receiver, Sender
from benchmark.tally import as_array

WORD = struct.Struct("<Q")


class MessageSocket(Protocol):
    """Of such a library."""

    def send(self, data: bytes, /) -> Any: ...
    def recv(self) -> bytes: ...
    def close(self) -> Any: ...


class MessageSender(Sender):
    """One message for each value or frame."""

    def __init__(self, socket: MessageSocket) -> None:
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


class MessageReceiver(Receiver):
    """The other end."""

    def __init__(self, socket: MessageSocket) -> None:
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
