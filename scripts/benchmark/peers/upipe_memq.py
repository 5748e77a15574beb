"""uPipe's queue alone: put/get, put_many/get_many, reserve/borrow, and awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmark import roles
from benchmark.model import Work
from benchmark.peers.base import Array, Receiver, Sender, Transport, forever
from benchmark.tally import Source, Tally
from upipe import MemQ


class MemqSender(Sender):
    def __init__(self, queue: MemQ) -> None:
        self.queue = queue
        self.put = queue.put  # type: ignore[method-assign]
        self.put_frame = queue.put  # type: ignore[method-assign]

    def close(self) -> None:
        self.queue.close()


class MemqReceiver(Receiver):
    def __init__(self, queue: MemQ) -> None:
        self.queue = queue
        self.get = queue.get  # type: ignore[method-assign]

    def frames(self) -> Iterator[Array]:
        return forever(self.queue.get)


class Memq(Transport):
    """put and get. Option check_crc."""

    def open(self, work: Work, channels: int) -> None:
        self.queues = [MemQ(work.ring, check_crc=self.options.get("check_crc", True)) for _ in range(channels)]

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
            queue.unlink()

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return MemqSender(self.queues[channel])

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        return MemqReceiver(self.queues[channel])


class MemqMany(Memq):
    """put_many and get_many, over arrays of scalars (default) or lists (option lists=True)."""

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return ManySender(self.queues[channel], work.batch, bool(self.options.get("lists")))

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        return ManyReceiver(self.queues[channel], work.batch, bool(self.options.get("lists")))


class ManySender(MemqSender):
    def __init__(self, queue: MemQ, batch: int, lists: bool) -> None:
        super().__init__(queue)
        self.batch, self.lists = batch, lists

    def put_all(self, values: range) -> None:
        put_many, batch = self.queue.put_many, self.batch
        for first in range(0, len(values), batch):
            some = values[first : first + batch]
            put_many(list(some) if self.lists else np.arange(some.start, some.stop, dtype=np.uint64))


class ManyReceiver(MemqReceiver):
    def __init__(self, queue: MemQ, batch: int, lists: bool) -> None:
        super().__init__(queue)
        self.batch, self.lists = batch, lists

    def batches(self) -> Iterator[Any]:
        get_many, batch, array = self.queue.get_many, self.batch, not self.lists
        while True:
            yield get_many(batch, array=array)


class MemqViews(Memq):
    """reserve and borrow."""

    def views(self, work: Work) -> bool:
        return True

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return ReserveSender(self.queues[channel])

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        return BorrowReceiver(self.queues[channel])


class ReserveSender(MemqSender):
    def put_frames(self, source: Source, n: int) -> None:
        reserve, shape = self.queue.reserve, source.array.shape
        for number in range(n):
            frame = source.stamp(number)
            with reserve(shape, "u1") as place:
                place[:] = frame


class BorrowReceiver(MemqReceiver):
    def frames(self) -> Iterator[Array]:
        borrow = self.queue.borrow
        while True:
            with borrow() as frame:
                yield frame


class MemqAwaited(Memq):
    """aput and aget in asyncio's own loop."""

    def produce(self, work: Work, gate: roles.Gate, channel: int = 0) -> dict[str, float]:
        async def all_of_them() -> None:
            aput = self.queues[channel].aput
            with gate:
                for value in range(work.n + work.warm):
                    await aput(value)

        asyncio.run(all_of_them())
        return {}

    def consume(self, work: Work, gate: roles.Gate, channel: int = 0) -> dict[str, float]:
        tally = Tally(work.n, work.warm)

        async def all_of_them() -> None:
            aget = self.queues[channel].aget
            with gate:
                await tally.awaited(aget)

        asyncio.run(all_of_them())
        return {"rate": tally.rate, "arrived": tally.arrived, "bad": tally.bad}

    def ping(self, work: Work, gate: roles.Gate) -> dict[str, Any]:
        there, back = self.queues

        async def trips() -> dict[str, Any]:
            with gate:
                return await roles.aping(there.aput, back.aget, work)

        return asyncio.run(trips())

    def echo(self, work: Work, gate: roles.Gate) -> dict[str, Any]:
        there, back = self.queues

        async def trips() -> None:
            with gate:
                for _ in range(work.n + work.warm):
                    await back.aput(await there.aget())

        asyncio.run(trips())
        return {}
