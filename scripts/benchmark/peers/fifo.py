"""faster-fifo: put/get, put_many/get_many; pickling as it comes (multiprocessing's), or with pickle's own functions."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator
from typing import Any

import faster_fifo
import faster_fifo_reduction  # noqa: F401

from benchmark.model import Work
from benchmark.peers.base import Array, Receiver, Sender, Transport, forever
from benchmark.peers.mp import QueueReceiver, QueueSender

FOREVER = 1e6


class FifoSender(QueueSender):
    def __init__(self, queue: Any, batch: int) -> None:
        super().__init__(queue)
        self.batch = batch
        self.put = functools.partial(queue.put, timeout=FOREVER)  # type: ignore[method-assign]

    def put_all(self, values: range) -> None:
        if not self.batch:
            return super().put_all(values)
        put_many, batch = self.queue.put_many, self.batch
        for first in range(0, len(values), batch):
            put_many(list(values[first : first + batch]), timeout=FOREVER)
        return None

    def put_frame(self, frame: Array) -> None:
        self.queue.put(frame, timeout=FOREVER)


class FifoReceiver(QueueReceiver):
    def __init__(self, queue: Any, batch: int) -> None:
        super().__init__(queue)
        self.batch = batch
        self.get = functools.partial(queue.get, timeout=FOREVER)  # type: ignore[method-assign]

    def batches(self) -> Iterator[Any] | None:
        if not self.batch:
            return None
        return iter(functools.partial(self.queue.get_many, timeout=FOREVER, max_messages_to_get=self.batch), None)

    def frames(self) -> Iterator[Array]:
        return forever(self.get)


class Fifo(Transport):
    """Options: many, pickle."""

    def open(self, work: Work, channels: int) -> None:
        loads: dict[str, Any] = {}
        if self.options.get("pickle"):
            loads = {"loads": pickle.loads, "dumps": functools.partial(pickle.dumps, protocol=5)}
        size = max(work.ring, 2 * work.size)
        self.queues = [faster_fifo.Queue(max_size_bytes=size, **loads) for _ in range(channels)]

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return FifoSender(self.queues[channel], work.batch if self.options.get("many") else 0)

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        return FifoReceiver(self.queues[channel], work.batch if self.options.get("many") else 0)
