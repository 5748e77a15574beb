"""How many workers there are, what an idle pipe costs, and how fast one starts."""

from __future__ import annotations

import asyncio
import os
import statistics
import time

import pytest

from tests.support import crowded
from tests.system import jobs
from tests.system.support import LONGEST, auntil, descendants, kill, stat, until, worker_pids
from upipe import AutoscalePolicy, Pipe, Processor, RestartPolicy, Settings
from upipe.runtime.local import LocalRunner

pytestmark = [pytest.mark.system, pytest.mark.slow]
QUICK = AutoscalePolicy(up_depth=0.3, up_age=0.05, down_idle=0.2, interval=0.03)


def runner_of(pipe: Pipe) -> LocalRunner:
    runner = pipe._runner
    assert isinstance(runner, LocalRunner)
    return runner


@pytest.mark.parametrize("kills", [False, True])
async def test_autoscale_follows_the_load_both_ways(kills: bool) -> None:
    settings = Settings(
        start_method="fork", autoscale=QUICK, restart=RestartPolicy(limit=0, backoff=0.0), max_deliveries=50
    )
    pipe = Pipe("scale", settings=settings)
    pipe.chain(Processor("slow", jobs.slow, workers=1, autoscale=3), Processor("same", jobs.identity))
    await pipe.start()
    runner = runner_of(pipe)
    reading = asyncio.create_task(_collect(pipe))
    for round_ in range(2):
        for number in range(60):
            assert await pipe.emit(100 * round_ + number, timeout=LONGEST)
        await auntil(lambda: len(worker_pids(runner, "slow")) == 3, what="it scales up")
        if kills:
            kill(runner, "slow#1")
        await auntil(
            lambda: len(worker_pids(runner, "slow")) == 1 and not pipe.stats().edges[0].in_flight, what="it scales down"
        )
    report = await pipe.wait_for_completion(LONGEST)
    assert set(await reading) == {*range(60), *range(100, 160)}
    assert report.balanced and report.dead_letters == 0
    assert report.processors[0].restarts == 2 * kills


async def _collect(pipe: Pipe) -> list[int]:
    return [value async for value in pipe.results()]


def _cpu(pids: list[int]) -> float:
    return sum(told[3] for pid in pids if (told := stat(pid)))


async def test_an_idle_pipe_uses_no_cpu() -> None:
    seconds = 10.0
    others = set(descendants(os.getpid()))  # what earlier tests' libraries keep, such as a resource tracker
    pipe = Pipe("idle", settings=Settings(start_method="fork"))
    pipe.chain(
        Processor("one", jobs.identity, workers=3),
        Processor("two", jobs.identity, workers=3),
        Processor("three", jobs.sink, workers=2),
    )
    await pipe.start()
    assert await pipe.call(1, timeout=LONGEST) is None
    processes = [os.getpid(), *set(descendants(os.getpid())) - others]
    assert len(processes) == 11  # the caller, the fork server, its guard, eight workers
    began, before = time.monotonic(), _cpu(processes)
    await asyncio.sleep(seconds)
    share = (_cpu(processes) - before) / (time.monotonic() - began)
    print(f"\nidle: {100 * share:.2f} % of one core")
    assert share < 0.01
    await pipe.stop()


@pytest.mark.parametrize("method", ["fork", "exec"])
async def test_start_up(method: str) -> None:
    times = []
    for _ in range(7):
        pipe = Pipe("start", settings=Settings(start_method=method))
        pipe.chain(Processor("read", jobs.count_up(1)), Processor("same", jobs.identity))
        began = time.perf_counter()
        await pipe.start()
        up = time.perf_counter()
        async for _ in pipe.results():
            break
        times.append(((up - began) * 1e3, (time.perf_counter() - began) * 1e3))
        await pipe.wait_for_completion(LONGEST)
    started, first = (statistics.median(one) for one in zip(*times, strict=True))
    print(f"\n{method}: start() {started:.0f} ms, first frame after {first:.0f} ms (median of {len(times)})")
    best = min(first for _, first in times)  # what disturbs makes it longer
    assert best < (150 if method == "fork" else 500) * crowded()


async def test_workers_go_on_while_the_caller_does_not_listen() -> None:
    """Its loop is blocked; what workers have to say fills their sockets, and the frames flow all the same."""
    pipe = Pipe("deaf", settings=Settings(start_method="fork", max_deliveries=3))
    pipe.chain(Processor("complaining", jobs.complaining, workers=2))
    await pipe.start()
    for number in range(200):
        assert await pipe.emit(number)
    queue = next(queue for name, queue in runner_of(pipe).queues.items() if name.startswith("in"))
    until(lambda: queue.stats().dead == 200)  # blocks the loop
    report = await pipe.wait_for_completion(LONGEST)
    assert report.dead_letters == 200 and report.balanced
    assert len(pipe.dead_letters()) == 200


async def test_workers_between_checkpoints_do_not_hold_up_an_input_while_the_other_is_never_empty() -> None:
    """Each of them may hold the one frame that pins the short queue, and get frames of the other queue only. (Which one
    it is depends on the timing; tests/runtime/test_stateful.py has the case for certain.)"""
    pipe = Pipe("held", settings=Settings(start_method="fork"))
    tally = Processor("tally", jobs.Tally, workers=2, checkpoint_every=1_000_000_000)
    pipe.connect(Processor("pages", jobs.pages), tally, size=64 * 1024)
    pipe.connect(Processor("numbers", jobs.endless), tally, size=256 * 1024)
    await pipe.start()
    pages = next(number for number, edge in enumerate(pipe.stats().edges) if edge.source == "pages")
    await auntil(lambda: pipe.stats().edges[pages].finished >= 270, LONGEST, "the short queue goes on")
    await pipe.terminate(LONGEST)
    report = pipe.report()
    assert report.balanced and report.state == "completed"
    assert report.edges[pages].finished == report.edges[pages].emitted
