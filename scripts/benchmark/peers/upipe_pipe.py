"""uPipe's pipes: the seed's own calls, awaited inside processors; call() for round trips."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark import processes, roles
from benchmark.model import Outcome, Work
from benchmark.peers.base import Transport
from benchmark.tally import Tally
from upipe import DType, MemQ, Pipe, Processor


async def produce(*, config: dict[str, Any]) -> None:
    """The seed's producer."""
    me = Processor("produce")
    await me.connect()
    began = time.process_time()
    for value in range(config["total"]):
        while not await me.emit(value, DType.U32):
            pass
    _tell(config, "produce", {"cpu": time.process_time() - began})


async def consume(*, config: dict[str, Any]) -> None:
    """The seed's consumer, which also counts."""
    me = Processor(config["name"])
    await me.connect()
    began = time.process_time()
    tally = Tally(config["n"], config["warm"])
    await tally.awaited(me.get_sync)
    cpu_seconds = time.process_time() - began
    result = {"rate": tally.rate, "arrived": tally.arrived, "bad": tally.bad, "cpu": cpu_seconds}
    _tell(config, config["name"], result)


async def first_value(*, config: dict[str, Any]) -> None:
    """Says when the first value came."""
    me = Processor("first")
    await me.connect()
    value = await me.get_sync()
    _tell(config, "first", {"at": time.perf_counter(), "value": value})


def one_value() -> Any:
    yield 42


def forward(value: int) -> int:
    return value


def _tell(config: dict[str, Any], name: str, what: dict[str, Any]) -> None:
    path = Path(config["folder"], name)
    path.with_suffix(".new").write_text(json.dumps(what))
    os.replace(path.with_suffix(".new"), path)


def _told(folder: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, name).read_text())
    return found


class Pipes(Transport):
    """A pipe per measurement, in the loop of the measuring process."""

    def run_stream(self, work: Work) -> Outcome:
        return asyncio.run(self._stream(work))

    def run_fanout(self, work: Work) -> Outcome:
        return asyncio.run(self._stream(work))

    async def _stream(self, work: Work) -> Outcome:
        folder, total = tempfile.mkdtemp(), work.n + work.warm
        config = {"folder": folder, "n": work.n, "warm": work.warm, "total": total}
        pipe = Pipe("bench")
        source = pipe.add(Processor("produce", produce, config=config))
        names = [f"consume{number}" for number in range(work.consumers)]
        for name in names:
            source.add(Processor(name, consume, config={**config, "name": name}), size=work.ring)
        await pipe.start()
        await pipe.wait_for_completion()
        found = [_told(folder, name) for name in names]
        cpu_seconds = sum(one["cpu"] for one in [*found, _told(folder, "produce")])
        sent = total * work.consumers
        rate, arrived, bad = (
            min(one["rate"] for one in found),
            sum(one["arrived"] for one in found),
            sum(one["bad"] for one in found),
        )
        return Outcome(rate, sent, arrived, bad, cpu_seconds / sent * 1e6)

    def run_rtt(self, work: Work) -> Outcome:
        return asyncio.run(self._trips(work, 1))

    def run_chain(self, work: Work) -> Outcome:
        return asyncio.run(self._trips(work, work.count))

    async def _trips(self, work: Work, stages: int) -> Outcome:
        pipe = Pipe("bench")
        roles.pin(work, 1)
        pipe.chain(*(Processor(f"stage{number}", forward) for number in range(stages)))
        await pipe.start()
        roles.unpin()
        roles.pin(work, 0)
        times, bad = [], 0
        for number in range(work.n + work.warm):
            if work.pause:
                await asyncio.sleep(work.pause)
            before = time.perf_counter_ns()
            bad += await pipe.call(number) != number
            times.append(time.perf_counter_ns() - before)
        await pipe.stop()
        return roles.percentiles({"times": times[work.warm :], "bad": bad}, work)

    def run_start(self, work: Work) -> Outcome:
        return asyncio.run(self._start())

    async def _start(self) -> Outcome:
        folder = tempfile.mkdtemp()
        before = time.perf_counter()
        pipe = Pipe("bench")
        pipe.chain(Processor("one", one_value), Processor("first", first_value, config={"folder": folder}))
        await pipe.start()
        await pipe.wait_for_completion()
        found = _told(folder, "first")
        return Outcome((found["at"] - before) * 1000, 1, 1, found["value"] != 42)

    def run_idle(self, work: Work) -> Outcome:
        return asyncio.run(self._idle(work))

    async def _idle(self, work: Work) -> Outcome:
        """`count` workers that wait for input, and four times as many queues that somebody awaits."""
        pipe = Pipe("bench")
        pipe.add(Processor("wait", forward, workers=work.count))
        await pipe.start()
        queues = [MemQ(65536) for _ in range(4 * work.count)]
        waiting = [asyncio.ensure_future(queue.aget()) for queue in queues]
        await asyncio.sleep(1.0)
        alive = len(processes.descendants(os.getpid()))
        assert alive >= work.count, f"only {alive} processes wait"
        before = processes.tree_seconds(os.getpid(), os.getpid())
        mine = time.process_time()  # after that look and before the next: this process waits, too
        await asyncio.sleep(work.pause)
        mine = time.process_time() - mine
        used = processes.tree_seconds(os.getpid(), os.getpid()) - before + mine
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await pipe.stop()
        for queue in queues:
            queue.close()
            queue.unlink()
        return Outcome(used / work.pause * 100, extra={"waiting": work.count, "queues": 4 * work.count})
