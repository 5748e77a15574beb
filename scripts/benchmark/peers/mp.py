"""multiprocessing: Queue, SimpleQueue and Pipe (bytes), from the standard library."""

from __future__ import annotations

import multiprocessing
import struct
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

from benchmark.model import Outcome, Work
from benchmark.peers.base import Array, Receiver, Sender, Transport, forever
from benchmark.tally import as_array

CONTEXT = multiprocessing.get_context("fork")
WORD = struct.Struct("<Q")
LARGEST = 32767  # of a semaphore here


class QueueSender(Sender):
    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.put = queue.put  # type: ignore[method-assign]

    def put_frame(self, frame: Array) -> None:
        self.queue.put(frame.copy() if self.feeds else frame)

    def flush(self) -> None:
        if self.feeds:
            self.queue.close()
            self.queue.join_thread()

    @property
    def feeds(self) -> bool:
        """A thread pickles it later, so the array must stay as it is."""
        return hasattr(self.queue, "join_thread")


class QueueReceiver(Receiver):
    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.get = queue.get  # type: ignore[method-assign]

    def frames(self) -> Iterator[Array]:
        return forever(self.queue.get)


class Queue(Transport):
    def open(self, work: Work, channels: int) -> None:
        self.queues = [self.make(work) for _ in range(channels)]

    def make(self, work: Work) -> Any:
        return CONTEXT.Queue(min(LARGEST, work.slots))

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return QueueSender(self.queues[channel])

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        return QueueReceiver(self.queues[channel])


class SimpleQueue(Queue):
    def make(self, work: Work) -> Any:
        return CONTEXT.SimpleQueue()


class PipeSender(Sender):
    def __init__(self, end: Any) -> None:
        self.end = end

    def put(self, value: int) -> None:
        self.end.send_bytes(WORD.pack(value))

    def put_all(self, values: range) -> None:
        send = self.end.send_bytes
        for value in map(WORD.pack, values):
            send(value)

    def put_frame(self, frame: Array) -> None:
        self.end.send_bytes(frame.data.cast("B"))


class PipeReceiver(Receiver):
    def __init__(self, end: Any) -> None:
        self.end = end

    def get(self) -> int:
        value: int = WORD.unpack(self.end.recv_bytes())[0]
        return value

    def values(self) -> Iterator[int]:
        return chain.from_iterable(map(WORD.unpack, iter(self.end.recv_bytes, None)))

    def frames(self) -> Iterator[Array]:
        receive = self.end.recv_bytes
        while True:
            yield as_array(receive())


class Pipe(Transport):
    """send_bytes and recv_bytes; option duplex: over a socket pair instead of a pipe."""

    def open(self, work: Work, channels: int) -> None:
        self.ends = [CONTEXT.Pipe(duplex=bool(self.options.get("duplex"))) for _ in range(channels)]

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return PipeSender(self.ends[channel][1])

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        return PipeReceiver(self.ends[channel][0])


def _first(queue: Any, out: Any) -> None:
    queue.get()
    out.put(time.perf_counter())


def _one(queue: Any) -> None:
    queue.put(42)


class Start(Transport):
    """Two processes and a queue between them; option method: how they start."""

    def run_start(self, work: Work) -> Outcome:
        before = time.perf_counter()
        context = multiprocessing.get_context(self.options["method"])
        queue, out = context.Queue(), context.Queue()
        started = [context.Process(target=_one, args=(queue,)), context.Process(target=_first, args=(queue, out))]
        for one in started:
            one.start()
        at = out.get()
        for one in started:
            one.join()
        return Outcome((at - before) * 1000, 1, 1)
