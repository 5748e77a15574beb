"""Workers, fork servers and whole processors die at any moment: nothing is lost, nothing wedges, the books balance."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import crowded
from tests.system import jobs
from tests.system.support import LONG, LONGEST, auntil, kill, worker_pids
from upipe import Pipe, Processor, RestartPolicy, Settings
from upipe.runtime import overdue
from upipe.runtime.local import LocalRunner

pytestmark = [pytest.mark.system, pytest.mark.chaos, pytest.mark.slow]
ALWAYS = RestartPolicy(limit=0, backoff=0.0, backoff_max=0.0)
KILLS = 1000 if LONG else 64


def settings(method: str = "fork", **knobs: object) -> Settings:
    return Settings(start_method=method, restart=ALWAYS, max_deliveries=100, **knobs)  # type: ignore[arg-type]


def chaos_pipe(count: int, gate: Path | None = None, **knobs: object) -> Pipe:
    pipe = Pipe("chaos", settings=settings(edge_bytes=1 << 20, sink_bytes=1 << 20, **knobs))  # type: ignore[arg-type]
    read = Processor("read", jobs.reader(count, gate), resume=True)
    pipe.chain(read, Processor("check", jobs.check, workers=3), Processor("number", jobs.to_number, workers=2))
    return pipe


def runner_of(pipe: Pipe) -> LocalRunner:
    runner = pipe._runner
    assert runner is not None
    return runner


async def killer(pipe: Pipe, kills: int, rng: random.Random, pause: float) -> int:
    """Kill random workers of random processors until so many died or the pipe ends; returns how many died.

    Deaths are counted as the supervisor saw them: a signal to a process that is dead already is none.
    """
    runner = runner_of(pipe)

    def deaths() -> int:
        return sum(crew.deaths for crew in runner.supervisor.crews.values())

    while pipe.state in ("running", "starting") and deaths() < kills:
        names = list(worker_pids(runner))
        if names:
            kill(runner, rng.choice(names))
        await asyncio.sleep(rng.expovariate(1 / pause))
    return deaths()


async def collect(pipe: Pipe) -> Counter[int]:
    """The ledger, outside of uPipe: what came out, and how often."""
    return Counter([value async for value in pipe.results()])


@pytest.mark.timeout(900 if LONG else 240)
async def test_random_kills_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random(7)
    count, gate = KILLS * 250, tmp_path / "gate"
    pipe = chaos_pipe(count, gate)
    await pipe.start()
    ledger = asyncio.create_task(collect(pipe))
    kills = await killer(pipe, KILLS, rng, 0.03)
    gate.touch()
    found = await asyncio.wait_for(ledger, 800 if LONG else 200)
    report = await pipe.wait_for_completion(LONGEST)
    print(f"\n{kills} kills, {sum(found.values()) - len(found)} duplicates of {count}\n{report}")
    assert kills >= min(60, KILLS)
    assert set(found) == set(range(count)), f"lost: {sorted(set(range(count)) - set(found))[:10]}"
    assert sum(found.values()) - count <= 2 * kills  # only what a killed worker held, at each of two stages
    assert report.balanced and report.dead_letters == 0
    assert {one.name for one in report.processors if one.restarts} == {"read", "check", "number"}


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01])
async def test_kills_at_start_up(delay: float) -> None:
    pipe = chaos_pipe(300)
    starting = asyncio.create_task(pipe.start())
    await asyncio.sleep(0)
    for _ in range(6):
        runner = runner_of(pipe)
        for name in list(worker_pids(runner)):
            kill(runner, name)
        await asyncio.sleep(delay)
    await asyncio.wait_for(starting, LONGEST)
    found = await asyncio.wait_for(collect(pipe), LONGEST)
    assert set(found) == set(range(300))
    assert (await pipe.wait_for_completion(LONGEST)).balanced


async def test_kills_at_the_end() -> None:
    """While the stream ends: workers that have just finished, or closed, or said so."""
    rng = random.Random(3)
    for number in range(12):
        pipe = chaos_pipe(40)
        await pipe.start()
        ledger = asyncio.create_task(collect(pipe))
        runner, kills = runner_of(pipe), 0
        while pipe.state == "running":
            report = pipe.stats()
            if report.edges[0].finished >= 30 + number % 10 and kills < 4:
                names = list(worker_pids(runner))
                if names:
                    kills += kill(runner, rng.choice(names))
            await asyncio.sleep(0.001)
        found = await asyncio.wait_for(ledger, LONGEST)
        assert set(found) == set(range(40))
        assert (await pipe.wait_for_completion(LONGEST)).balanced


async def test_kills_during_drain() -> None:
    rng = random.Random(5)
    pipe = Pipe("drain", settings=settings(edge_bytes=1 << 20))
    pipe.chain(Processor("work", jobs.check_slowly, workers=3), Processor("number", jobs.to_number, workers=2))
    await pipe.start()
    sent = 0
    ledger = asyncio.create_task(collect(pipe))
    while sent < 400:
        assert await pipe.emit(jobs.sized(sent), timeout=LONGEST)
        sent += 1
    draining = asyncio.create_task(pipe.terminate(LONGEST))
    await asyncio.sleep(0)
    runner = runner_of(pipe)
    kills = 0
    while pipe.state == "draining":
        names = list(worker_pids(runner))
        if names and kills < 30:
            kills += kill(runner, rng.choice(names))
        await asyncio.sleep(0.002)
    report = await draining
    found = await asyncio.wait_for(ledger, LONGEST)
    assert report.state == "completed" and report.balanced, str(report)
    assert set(found) == set(range(sent))
    assert all(edge.in_flight == 0 for edge in report.edges if edge.target)
    assert kills


@pytest.mark.parametrize("method", ["fork", "exec"])
async def test_the_fork_server_is_killed(method: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    pipe = Pipe("server", settings=settings(method, edge_bytes=1 << 19))  # small: the reader is not done at once
    pipe.chain(
        Processor("read", jobs.reader(300, gate), resume=True),
        Processor("check", jobs.check_slowly, workers=2),
        Processor("number", jobs.to_number),
    )
    await pipe.start()
    ledger = asyncio.create_task(collect(pipe))
    runner = runner_of(pipe)
    for _ in range(3):
        server = runner.held.server
        assert server is not None
        workers = worker_pids(runner)
        assert workers
        os.kill(server.pid, signal.SIGKILL)
        await auntil(lambda server=server: runner.held.server is not server)
        await auntil(lambda workers=workers: worker_pids(runner).get("number#0") not in (None, workers["number#0"]))
    gate.touch()
    found = await asyncio.wait_for(ledger, LONGEST)
    report = await pipe.wait_for_completion(LONGEST)
    assert set(found) == set(range(300))
    assert report.balanced
    assert all(one.restarts >= 1 for one in report.processors)


async def test_the_fork_server_is_stopped_when_a_worker_dies() -> None:
    pipe = Pipe("stopped-server", settings=settings())
    pipe.chain(Processor("same", jobs.identity))
    await pipe.start()
    runner = runner_of(pipe)
    server = runner.held.server
    assert server is not None
    os.kill(server.pid, signal.SIGSTOP)
    kill(runner, "same#0")
    assert await pipe.call(1, timeout=LONGEST) == 1
    assert runner.held.server is not server
    await pipe.wait_for_completion(LONGEST)


async def test_a_stopped_fork_server_that_is_asked_for_a_worker_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(overdue, "STOPPED", 0.3)
    monkeypatch.setattr(overdue, "LATE", 30.0)  # on a busy machine a look may be late
    slowly = RestartPolicy(limit=100, backoff=0.3)
    pipe = Pipe("stopped-server", settings=Settings(start_method="fork", restart=slowly))
    pipe.chain(Processor("same", jobs.identity, workers=2))
    await pipe.start()
    runner = runner_of(pipe)
    server, slot = runner.held.server, runner.supervisor.slots["same#0"]
    assert server is not None and "fork server" not in runner.held.timers  # nobody looks at one that owes nothing
    for state in ("running", "lost"):  # the second life after a death begins after a while
        kill(runner, "same#0")
        await auntil(lambda state=state: slot.epoch > 1 and slot.machine.state == state)  # type: ignore[misc]
    os.kill(server.pid, signal.SIGSTOP)  # it has told of the death
    await auntil(lambda: runner.held.server is not server)
    assert "it was stopped (SIGSTOP) and answered nothing for" in caplog.text
    assert sorted(await asyncio.gather(*(pipe.call(number, timeout=20) for number in range(8)))) == list(range(8))
    await auntil(lambda: "fork server" not in runner.held.timers)
    assert (await pipe.wait_for_completion(10)).balanced


async def test_a_poison_frame_goes_to_the_dead_letters() -> None:
    pipe = Pipe("poison", settings=Settings(start_method="fork", restart=ALWAYS, max_deliveries=3))
    pipe.chain(Processor("numbers", jobs.count_up(50)), Processor("poisoned", jobs.poisoned, workers=2))
    await pipe.start()
    found = await asyncio.wait_for(collect(pipe), LONGEST)
    report = await pipe.wait_for_completion(LONGEST)
    assert set(found) == set(range(50)) - {13}
    (letter,) = pipe.dead_letters()
    assert (letter.error_kind, letter.deliveries, letter.value, letter.processor) == ("WorkerDied", 3, 13, "poisoned")
    assert report.balanced and report.dead_letters == 1
    assert [one.restarts for one in report.processors if one.name == "poisoned"] == [3]


async def test_a_call_whose_worker_dies_of_it_learns_that() -> None:
    from upipe import ProcessorError

    pipe = Pipe("poison", settings=Settings(start_method="fork", restart=ALWAYS, max_deliveries=2))
    pipe.add(Processor("poisoned", jobs.poisoned))
    async with pipe:
        with pytest.raises(ProcessorError, match="WorkerDied"):
            await pipe.call(13, timeout=LONGEST)
        assert await pipe.call(14, timeout=LONGEST) == 14


async def test_too_many_deaths_fail_the_pipe() -> None:
    from upipe import PipeFailed

    pipe = Pipe(
        "dies", settings=Settings(start_method="fork", restart=RestartPolicy(limit=3, backoff=0.01), max_deliveries=100)
    )
    pipe.add(Processor("poisoned", jobs.poisoned))
    await pipe.start()
    call = asyncio.create_task(pipe.call(13))
    await auntil(lambda: runner_of(pipe).calls)
    with pytest.raises(PipeFailed, match=r"restart.limit=3.*signal 9"):
        await pipe.wait_for_completion(LONGEST)
    with pytest.raises(PipeFailed):
        await call


# ------------------------------------------------------------------ stopped workers


async def test_a_stopped_worker_is_replaced_within_the_grace() -> None:
    pipe = Pipe("stopped", settings=settings(stopped_grace=0.3))
    pipe.add(Processor("same", jobs.identity))
    await pipe.start()
    runner = runner_of(pipe)
    first = worker_pids(runner)["same#0"]
    kill(runner, "same#0", signal.SIGSTOP)
    began = time.monotonic()
    assert await pipe.call(5, timeout=LONGEST) == 5
    took = time.monotonic() - began
    assert worker_pids(runner)["same#0"] != first
    assert 0.25 < took < 2.0 * crowded(), took
    await pipe.wait_for_completion(LONGEST)


async def test_a_worker_that_continues_in_time_is_left_alone() -> None:
    pipe = Pipe("continued", settings=settings(stopped_grace=LONGEST))
    pipe.add(Processor("same", jobs.identity))
    await pipe.start()
    runner = runner_of(pipe)
    first = worker_pids(runner)["same#0"]
    kill(runner, "same#0", signal.SIGSTOP)
    await auntil(lambda: runner.supervisor.deadline() is not None)  # it was noticed
    kill(runner, "same#0", signal.SIGCONT)
    await auntil(lambda: runner.supervisor.deadline() is None)
    assert await pipe.call(5, timeout=LONGEST) == 5
    assert worker_pids(runner)["same#0"] == first
    assert (await pipe.wait_for_completion(LONGEST)).processors[0].restarts == 0


async def test_what_workers_started_ends_with_them(tmp_path: Path) -> None:
    from tests.system.support import descendants

    def sleeps(of: int) -> int:
        found = 0
        for pid in descendants(of):
            with suppress(OSError):  # it ended this instant
                found += Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
        return found

    pipe = Pipe("children", settings=settings())
    pipe.chain(Processor("child", jobs.with_child), Processor("daemon", jobs.with_daemon))
    await pipe.start()
    await pipe.call(1, timeout=LONGEST)
    runner = runner_of(pipe)
    server = runner.held.server
    assert server is not None
    await auntil(lambda: len(descendants(server.pid)) == 6 and sleeps(server.pid) == 3)  # a guard, two workers
    first = set(descendants(server.pid))
    kill(runner, "child#0")
    await auntil(lambda: worker_pids(runner).get("child#0", 0) not in (0, *first))
    await auntil(lambda: len(first & set(descendants(server.pid))) == 4)  # without the worker and its own child
    assert sleeps(server.pid) == 2
    await pipe.stop()  # the fixture sees that nothing is left
