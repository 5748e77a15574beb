"""zenoh: publish and subscribe between two peers over tcp on loopback, with or without shared memory; it blocks."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Any

import zenoh

from benchmark import hosts
from benchmark.model import Work
from benchmark.peers.base import Array, Receiver, Sender, Transport
from benchmark.ports import free_ports
from benchmark.tally import as_array

WORD = struct.Struct("<Q")


class Zenoh(Transport):
    """Option shm. The receiver of channel c listens, the sender connects."""

    def open(self, work: Work, channels: int) -> None:
        self.ports = free_ports(channels)
        self.address = hosts.ADDRESSES[1] if work.hosts else "127.0.0.1"

    def _session(self, channel: int, listen: bool) -> Any:
        zenoh.try_init_log_from_env()
        config = zenoh.Config()
        place = f'["tcp/{self.address}:{self.ports[channel]}"]'
        config.insert_json5("mode", '"peer"')
        config.insert_json5("scouting/multicast/enabled", "false")
        config.insert_json5("listen/endpoints", place if listen else "[]")
        config.insert_json5("connect/endpoints", "[]" if listen else place)
        config.insert_json5("transport/shared_memory/enabled", "true" if self.options.get("shm") else "false")
        return zenoh.open(config)

    def sender(self, work: Work, channel: int = 0) -> Sender:
        for attempt in range(40):
            try:
                session = self._session(channel, listen=False)
                break
            except zenoh.ZError:
                if attempt == 39:
                    raise
                time.sleep(0.1)  # the other end does not listen yet
        publisher = session.declare_publisher(
            f"bench/{channel}", congestion_control=zenoh.CongestionControl.BLOCK, reliability=zenoh.Reliability.RELIABLE
        )
        deadline = time.monotonic() + 10
        while not publisher.matching_status.matching and time.monotonic() < deadline:
            time.sleep(0.01)
        shared = zenoh.shm.ShmProvider.default_backend(max(work.ring, 2 * work.size)) if self._shares(work) else None
        return ZenohSender(session, publisher, shared)

    def _shares(self, work: Work) -> bool:
        return bool(self.options.get("shm")) and work.frames

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        session = self._session(channel, listen=True)
        subscriber = session.declare_subscriber(
            f"bench/{channel}", zenoh.handlers.FifoChannel(max(2, min(65536, work.slots)))
        )
        return ZenohReceiver(session, subscriber)


class ZenohSender(Sender):
    def __init__(self, session: Any, publisher: Any, shared: Any) -> None:
        self.session, self.publisher, self.shared = session, publisher, shared

    def put(self, value: int) -> None:
        self.publisher.put(WORD.pack(value))

    def put_all(self, values: range) -> None:
        put = self.publisher.put
        for value in map(WORD.pack, values):
            put(value)

    def put_frame(self, frame: Array) -> None:
        if self.shared is None:
            self.publisher.put(frame.tobytes())
            return
        place = self.shared.alloc(frame.nbytes, policy=zenoh.shm.BlockOn(zenoh.shm.GarbageCollect()))
        place[:] = frame.tobytes()
        self.publisher.put(place)

    def close(self) -> None:
        self.session.close()


class ZenohReceiver(Receiver):
    def __init__(self, session: Any, subscriber: Any) -> None:
        self.session, self.subscriber = session, subscriber

    def get(self) -> int:
        value: int = WORD.unpack(self.subscriber.recv().payload.to_bytes())[0]
        return value

    def values(self) -> Iterator[int]:
        receive, unpack = self.subscriber.recv, WORD.unpack
        while True:
            yield unpack(receive().payload.to_bytes())[0]

    def frames(self) -> Iterator[Array]:
        receive = self.subscriber.recv  # without a timeout: a lost frame ends in the hard one
        while True:
            yield as_array(receive().payload.to_bytes())

    def close(self) -> None:
        self.session.close()
