"""The processes of a measurement: fork them, let them start together, collect what they found."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import resource
import subprocess
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from statistics import median
from typing import Any, Protocol, Self

from benchmark import hosts
from benchmark.model import Outcome, Work

CONTEXT = multiprocessing.get_context("fork")


class Failed(Exception):
    """A role raised; the text is its last line."""


class Gate:
    """`with gate:` around what is measured: all roles enter together, and none leaves before all are done."""

    def __init__(self, barrier: Any) -> None:
        self.barrier = barrier
        self.cpu = 0.0

    def __enter__(self) -> Self:
        gc.collect()
        gc.disable()
        self.barrier.wait(30)
        self.cpu = _cpu()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.cpu = _cpu() - self.cpu
        if kind is None:
            self.barrier.wait(300)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Opens(Protocol):
    def open(self, work: Work, channels: int) -> None: ...
    def close(self) -> None: ...


class Opened:
    """`with`: the transport is open."""

    def __init__(self, transport: _Opens, work: Work, channels: int) -> None:
        self.transport, self.work, self.channels = transport, work, channels

    def __enter__(self) -> None:
        self._stack = ExitStack()
        with self._stack as stack:
            if self.work.hosts:
                stack.enter_context(hosts.pair())
            self.transport.open(self.work, self.channels)
            stack.callback(self.transport.close)
            self._stack = stack.pop_all()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


Role = Callable[..., dict[str, Any]]


def pin(work: Work, index: int) -> None:
    """Put role number `index` on its CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    if work.pins == "one":
        os.sched_setaffinity(0, {cpus[0]})
    elif work.pins == "two":
        os.sched_setaffinity(0, {cpus[index % len(cpus)]})


def unpin() -> None:
    """Any CPU that init may use."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _main(role: Role, work: Work, barrier: Any, results: Connection, index: int, argument: int | None) -> None:
    try:
        if work.hosts:
            hosts.enter(index)
        pin(work, index)
        gate = Gate(barrier)
        found = role(work, gate) if argument is None else role(work, gate, argument)
        results.send({"cpu": gate.cpu, **found})
    except BaseException as error:
        barrier.abort()
        results.send(Failed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def together(work: Work, todo: Sequence[Role], arguments: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Run each role in a process of its own; what they return, in order, with the CPU seconds inside the gate."""
    barrier = CONTEXT.Barrier(len(todo))
    started = []
    for index, role in enumerate(todo):
        mine, its = CONTEXT.Pipe(duplex=False)
        argument = None if arguments is None else arguments[index]
        process = CONTEXT.Process(target=_main, args=(role, work, barrier, its, index, argument), daemon=True)
        process.start()
        its.close()
        started.append((process, mine))
    try:
        return _collect([mine for _, mine in started])
    finally:
        for process, _ in started:
            process.join(1.0)
            if process.is_alive():
                process.kill()


def _collect(pipes: list[Connection]) -> list[dict[str, Any]]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        for pipe in wait([one for number, one in enumerate(pipes) if number not in found]):
            assert isinstance(pipe, Connection)
            try:
                answer = pipe.recv()
            except EOFError:
                answer = Failed("a process ended without a result")
            found[pipes.index(pipe)] = answer
            if isinstance(answer, Failed) and "BrokenBarrier" not in str(answer):
                raise answer
    for answer in found.values():
        if isinstance(answer, Failed):
            raise answer
    return [found[number] for number in range(len(pipes))]


# ---------------------------------------------------------------------- round trips


class Turns:
    """Round trips in turns with the program that measures their limit: a host with neighbours goes from fast to slow
    within a second, and what it does to a sleeper it does to both then."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._values: list[float] = []

    def before(self, number: int) -> None:
        """Called before each trip. The other end sleeps while the program runs."""
        if not self._work.turn or number % self._work.turn:
            return
        cpus = os.sched_getaffinity(0)
        unpin()  # the program inherits it, and chooses its CPUs itself
        try:
            done = subprocess.run(self._work.beside, check=True, timeout=20, capture_output=True, text=True)
        finally:
            os.sched_setaffinity(0, cpus)
        self._values.append(float(done.stdout.split()[0]))

    def kept(self, times: list[int]) -> list[int]:
        """Without the first tenth of each turn, which the program leaves out, too: these warm up."""
        turn, warm = self._work.turn, self._work.warm
        return [one for at, one in enumerate(times, warm) if at % turn >= turn // 10] if turn else times

    def result(self, times: list[int], bad: int) -> dict[str, Any]:
        beside = median(self._values) if self._values else 0.0
        times = times[self._work.warm :]
        return {"times": self.kept(times), "arrived": len(times), "bad": bad, "beside": beside}


def ping(put: Callable[[int], Any], get: Callable[[], int], work: Work) -> dict[str, Any]:
    """Times of n round trips, in ns."""
    times, bad, clock, pause, turns = [], 0, time.perf_counter_ns, work.pause, Turns(work)
    for number in range(work.warm + work.n):
        turns.before(number)
        if pause:
            time.sleep(pause)
        before = clock()
        put(number)
        value = get()
        times.append(clock() - before)
        bad += value != number
    return turns.result(times, bad)


async def aping(put: Callable[[int], Awaitable[Any]], get: Callable[[], Awaitable[int]], work: Work) -> dict[str, Any]:
    """ping, awaited."""
    times, bad, clock, pause, turns = [], 0, time.perf_counter_ns, work.pause, Turns(work)
    for number in range(work.warm + work.n):
        turns.before(number)
        if pause:
            await asyncio.sleep(pause)
        before = clock()
        await put(number)
        value = await get()
        times.append(clock() - before)
        bad += value != number
    return turns.result(times, bad)


def echo(get: Callable[[], int], put: Callable[[int], Any], work: Work) -> None:
    for _ in range(work.warm + work.n):
        put(get())


def percentiles(found: dict[str, Any], work: Work) -> Outcome:
    """Round trips in microseconds: the median, with p99 and p99.9 beside it."""
    times = sorted(found["times"])
    at = {
        name: times[min(len(times) - 1, int(len(times) * share))] / 1000
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    }
    total = work.n + work.warm
    arrived, cpu = found["arrived"] + work.warm, found.get("cpu", 0.0)
    return Outcome(at["p50"], total, arrived, found["bad"], cpu, at, beside=found["beside"])
