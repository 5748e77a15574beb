"""pyzmq: PUSH and PULL over ipc or tcp; PUB and SUB for fan-out, which drops at the high-water mark, counted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import zmq

from benchmark import hosts
from benchmark.model import Work
from benchmark.peers.base import Array, Receiver, Sender, Transport
from benchmark.peers.messages import MessageReceiver, MessageSender
from benchmark.ports import free_ports
from benchmark.tally import PATIENCE, as_array, silence

silence(zmq.Again)


class ZmqSender(MessageSender):
    def __init__(self, socket: zmq.Socket[bytes], copy: bool) -> None:
        super().__init__(socket)
        self.zmq, self.copy = socket, copy

    def put_frame(self, frame: Array) -> None:
        if self.copy:
            self.zmq.send(frame)
        else:
            self.zmq.send(frame.copy(), copy=False)  # zmq reads it later: the array must stay as it is


class ZmqReceiver(MessageReceiver):
    def __init__(self, socket: zmq.Socket[bytes], copy: bool) -> None:
        super().__init__(socket)
        self.zmq, self.copy = socket, copy

    def frames(self) -> Iterator[Array]:
        receive = self.zmq.recv
        while True:
            yield as_array(receive() if self.copy else receive(copy=False).buffer)


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
        socket.setsockopt(zmq.LINGER, 0)
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
