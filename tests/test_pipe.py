"""Pipes: shapes, emit, call, results, how they end, and what a user's bad day gets."""

# ruff: noqa: ASYNC110, ASYNC251 - the state of other processes has no event to wait for

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import DEADLINE, QUICK, chain, collect, feed
from upipe import CallTimeout, Pipe, PipeFailed, Processor, ProcessorError, RestartPolicy, Settings
from upipe import pipe as pipe_module
from upipe.errors import ClusterError, IllegalTransition, PipeError
from upipe.graph.plan import host_problems

pytestmark = [pytest.mark.system, pytest.mark.slow]


def same(value: Any) -> Any:
    return value


def add(value: int, *, config: int) -> int:
    return value + config


def numbers(limit: int, name: str = "numbers") -> Processor:
    def source() -> Any:
        yield from range(limit)

    return Processor(name, source)


def test_processors_are_found_from_the_roots_and_names_shown() -> None:
    pipe = Pipe("p")
    a, b, c = (Processor(name, same) for name in "abc")
    assert pipe.add(a) is a and a.add(b) is b and (b >> c) is c
    assert pipe.processors == [a, b, c] and pipe.state == "declared" and "declared" in repr(pipe)


async def test_a_diamond_gets_everything_on_both_ways() -> None:
    pipe = chain(numbers(300), Processor("l", add, config=1000), Processor("j", same))
    first, _, join = pipe.processors
    first.add(Processor("r", add, config=5000)).add(join)
    found, report = await collect(pipe)
    assert sorted(found) == [1000 + n for n in range(300)] + [5000 + n for n in range(300)]
    assert {(one.source, one.target): one.finished for one in report.edges if one.target} == {
        ("numbers", "l"): 300, ("numbers", "r"): 300, ("l", "j"): 300, ("r", "j"): 300,
    }


async def test_several_roots_and_several_ends() -> None:
    pipe = chain(numbers(50, "a"), Processor("x", add, config=100))
    middle = pipe.processors[1]
    pipe.chain(numbers(50, "b"), Processor("y", add, config=200))
    pipe.connect(numbers(50, "c"), middle)
    found, _ = await collect(pipe)
    assert sorted(found) == sorted([100 + n for n in range(50)] * 2 + [200 + n for n in range(50)])


async def test_what_the_pipe_emits_reaches_every_root_that_takes_input() -> None:
    pipe = chain(Processor("a", add, config=1))
    pipe.add(Processor("b", add, config=1000))
    found, _ = await feed(pipe, range(20))
    assert sorted(found) == [n + 1 for n in range(20)] + [n + 1000 for n in range(20)]


# ------------------------------------------------------------------ call


async def test_200_calls_in_flight_each_get_their_own_answer() -> None:
    async def later(value: int) -> int:
        await asyncio.sleep(0.0005 * (value % 3))
        return value * 3

    pipe = chain(
        Processor("a", add, config=1, workers=2),
        Processor("b", later, workers=3),
        Processor("c", add, config=5, workers=2),
    )
    async with asyncio.timeout(DEADLINE), pipe:
        assert await asyncio.gather(*(pipe.call(n) for n in range(200))) == [(n + 1) * 3 + 5 for n in range(200)]
    assert pipe.report().balanced


async def test_a_call_through_generators_gets_the_first_result_and_through_a_filter_none() -> None:
    def repeat(value: int) -> Any:
        yield value
        yield value + 1

    def even(value: int) -> Any:
        return value if value % 2 == 0 else None

    pipe = chain(Processor("even", even), Processor("repeat", repeat), Processor("end", add, config=100))
    async with asyncio.timeout(DEADLINE), pipe:
        assert await asyncio.gather(*(pipe.call(n) for n in range(20))) == [
            n + 100 if n % 2 == 0 else None for n in range(20)
        ]


async def test_a_call_is_answered_by_the_branch_that_keeps_it_and_by_the_value_that_is_kept() -> None:
    def odd(value: int) -> Any:
        return ["odd", value] if value % 2 else None

    def even(value: int) -> Any:
        return None if value % 2 else ["even", value]

    def up_to(value: int) -> Any:
        yield from range(value + 1)

    def only_three(value: int) -> Any:
        return value if value == 3 else None

    fork = chain(Processor("in", same), Processor("odd", odd))
    fork.processors[0].add(Processor("even", even))
    several = chain(Processor("up", up_to, workers=2), Processor("three", only_three, workers=2))
    async with asyncio.timeout(DEADLINE), fork, several:
        answers = await asyncio.gather(*(fork.call(n) for n in range(50)))
        assert answers == [["odd" if n % 2 else "even", n] for n in range(50)]
        assert await asyncio.gather(*(several.call(n) for n in range(8))) == [None] * 3 + [3] * 5


async def test_an_exception_comes_back_to_its_caller_with_the_remote_traceback() -> None:
    def fails(value: int) -> int:
        if value == 3:
            raise ValueError(f"no {value} here")
        return value

    pipe = chain(Processor("a", same), Processor("fails", fails, on_error="dead_letter"))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        found = await asyncio.gather(*(pipe.call(n) for n in range(5)), return_exceptions=True)
        await pipe.wait_for_completion()
    error = found.pop(3)
    assert found == [0, 1, 2, 4] and isinstance(error, ProcessorError)
    assert (error.processor, error.worker, error.kind, error.message) == ("fails", "fails#0", "ValueError", "no 3 here")
    assert 'raise ValueError(f"no {value} here")' in str(error) and "upipe/runtime" not in error.remote_traceback


@pytest.mark.parametrize("deaths", [1, 99])
@pytest.mark.chaos
async def test_a_call_outlives_a_worker_that_dies_and_learns_when_all_do(deaths: int) -> None:
    def dies(value: int) -> int:
        frame = Processor("dies").blocking.connect().frame
        if value == 13 and frame.deliveries <= deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    pipe = chain(Processor("dies", dies, workers=2, max_deliveries=3))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        found = await asyncio.gather(*(pipe.call(n) for n in range(30)), return_exceptions=True)
        await pipe.wait_for_completion()
    thirteenth = found.pop(13)
    assert found == [n for n in range(30) if n != 13]
    if deaths == 1:
        assert thirteenth == 13 and pipe.dead_letters() == []
    else:
        assert isinstance(thirteenth, ProcessorError) and thirteenth.kind == "WorkerDied"
        assert [(one.error_kind, one.value, one.deliveries) for one in pipe.dead_letters()] == [("WorkerDied", 13, 3)]


async def test_a_call_has_a_deadline_and_its_late_answer_harms_nobody(tmp_path: Path) -> None:
    over = tmp_path / "over"

    async def slow(value: float) -> float:
        while value and not over.exists():
            await asyncio.sleep(0.005)
        return value

    pipe = chain(Processor("slow", slow))
    async with asyncio.timeout(DEADLINE), pipe:
        with pytest.raises(CallTimeout, match=r"call 1 of pipe 'test': no answer came within 0.05 s"):
            await pipe.call(1.0, timeout=0.05)
        over.touch()
        assert await pipe.call(0.0) == 0.0


async def test_calls_that_wait_at_stop_raise_and_so_do_emits_without_room(tmp_path: Path) -> None:
    def stuck(value: Any) -> None:
        (tmp_path / "stuck").touch()
        signal.pause()

    pipe = chain(Processor("stuck", stuck), edge_bytes=64 * 1024)
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        calling = asyncio.create_task(pipe.call(1))

        async def fill() -> None:
            while True:
                await pipe.emit(b"x" * 9000)

        filling = asyncio.create_task(fill())
        while not (tmp_path / "stuck").exists() or await pipe.emit(b"x" * 60000, timeout=0.0) is not False:
            await asyncio.sleep(0.005)
        await pipe.stop()
        with pytest.raises(PipeError, match="stopped before it answered"):
            await calling
        with pytest.raises(IllegalTransition, match="takes nothing: it is stopped"):
            await filling
        with pytest.raises(IllegalTransition, match="it is stopped"):
            await pipe.call(2)


async def test_tasks_of_one_worker_answer_their_own_calls() -> None:
    async def concurrent() -> None:
        me = await Processor("c").connect()

        async def handle(value: float) -> None:
            await asyncio.sleep(value)
            await me.emit(value)

        async with asyncio.TaskGroup() as tasks:
            async for value in me:
                tasks.create_task(handle(value))

    async def waiting_for() -> None:
        me = await Processor("w").connect()
        while True:
            await me.emit(await asyncio.wait_for(me.get_sync(), 30))

    pipe = chain(Processor("c", concurrent), Processor("w", waiting_for))
    delays = [0.1, 0.0, 0.05, 0.02, 0.0, 0.07]
    async with asyncio.timeout(DEADLINE), pipe:
        assert await asyncio.gather(*(pipe.call(delay) for delay in delays)) == delays


# ------------------------------------------------------------------ results


async def test_until_someone_reads_the_newest_results_are_kept_and_the_drops_are_counted() -> None:
    pipe = chain(
        numbers(300), Processor("big", lambda n: np.full(1000, n, np.int64)), sink_bytes=64 * 1024, edge_bytes=64 * 1024
    )
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        report = await pipe.wait_for_completion()
        found = [int(one[0]) async for one in pipe.results()]
    sink = report.edges[-1]
    assert found == list(range(300 - len(found), 300)) and 1 < len(found) < 20
    assert sink.dropped == 300 - len(found) and report.balanced


async def test_once_read_results_are_lossless_for_a_reader_who_leaves_and_comes_back() -> None:
    pipe = chain(
        numbers(300), Processor("big", lambda n: np.full(1000, n, np.int64)), sink_bytes=64 * 1024, edge_bytes=64 * 1024
    )
    found = []
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        for _ in range(4):
            async for one in pipe.results():
                found.append(int(one[0]))
                if len(found) % 50 == 0:
                    break
            await asyncio.sleep(0.05)  # away while the pipe goes on
        rest = [int(one[0]) async for one in pipe.results()]
        report = await pipe.wait_for_completion()
    found += rest
    assert found == list(range(found[0], 300))  # what was dropped before the first read is counted
    assert report.edges[-1].dropped == found[0]


async def test_a_reader_who_leaves_for_good_does_not_hold_up_the_end() -> None:
    pipe = chain(
        numbers(300), Processor("big", lambda n: np.full(1000, n, np.int64)), sink_bytes=64 * 1024, edge_bytes=64 * 1024
    )
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        async for _ in pipe.results():
            break
        report = await pipe.wait_for_completion(timeout=60)
    assert report.state == "completed" and report.balanced and report.edges[-1].dropped > 200


# ------------------------------------------------------------------ lifecycle


async def test_the_states_of_a_pipe_and_what_they_refuse() -> None:
    pipe = chain(Processor("a", same))
    with pytest.raises(IllegalTransition, match=r"only declared; `await pipe.start\(\)` first"):
        await pipe.emit(1)
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        assert pipe.state == "running"
        with pytest.raises(IllegalTransition, match="start it only once"):
            await pipe.start()
        with pytest.raises(IllegalTransition, match="add to it"):
            pipe.add(Processor("b", same))
        assert pipe.stats().state == "running"
        await pipe.wait_for_completion()
        assert pipe.state == "completed"
        with pytest.raises(IllegalTransition, match="takes nothing: it is completed"):
            await pipe.emit(1)
        assert (await pipe.stop()).state == "completed"
        assert (await pipe.wait_for_completion()).state == "completed"


async def test_wait_for_completion_times_out_and_the_pipe_goes_on(tmp_path: Path) -> None:
    go = tmp_path / "go"

    async def until() -> None:
        me = await Processor("u").connect()
        while not go.exists():
            await asyncio.sleep(0.005)
        await me.emit("went on")

    pipe = chain(Processor("u", until))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        with pytest.raises(TimeoutError, match=r"still running after 0.05 s; it goes on"):
            await pipe.wait_for_completion(timeout=0.05)
        go.touch()
        await pipe.wait_for_completion()
        assert [one async for one in pipe.results()] == ["went on"]


async def test_terminate_drains_and_loses_nothing_that_was_emitted() -> None:
    def forever() -> Any:
        number = 0
        while True:
            yield number
            number += 1

    pipe = chain(Processor("f", forever), Processor("m", same), Processor("n", same))
    found = []
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        async for one in pipe.results():
            found.append(one)
            if one == 500:
                terminating = asyncio.create_task(pipe.terminate())
        report = await terminating
    assert report.state == "completed" and report.balanced
    assert found == list(range(report.edges[0].emitted)) and len(found) > 500


async def test_terminate_lets_a_root_finish_the_frame_in_its_hand() -> None:
    async def root() -> None:
        me = await Processor("root").connect()
        async for value in me:
            await me.emit([value, "begun"])
            await asyncio.sleep(0.2)  # the drain comes here
            await me.emit([value, "done"])

    pipe = chain(Processor("root", root), Processor("e", same))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        await pipe.emit(1)
        results = pipe.results()
        found = [await anext(results)]
        terminating = asyncio.create_task(pipe.terminate())
        found += [one async for one in results]
        await terminating
    assert found == [[1, "begun"], [1, "done"]]


async def test_stop_ends_a_pipe_that_would_never_end_and_its_readers() -> None:
    def forever() -> Any:
        while True:
            yield 1

    pipe = chain(Processor("f", forever), Processor("m", same))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()

        async def read() -> int:
            return sum([one async for one in pipe.results()])

        reading = asyncio.create_task(read())
        while pipe.stats().edges[0].finished < 100:
            await asyncio.sleep(0.005)
        report = await pipe.stop()
        assert report.state == "stopped" and await reading > 0


async def test_a_driver_that_returns_early_does_not_wedge_its_producer() -> None:
    def three() -> None:
        me = Processor("three").blocking.connect()
        for value in me:
            me.emit_sync(value)
            if value == 2:
                return

    pipe = chain(numbers(5000), Processor("three", three), edge_bytes=64 * 1024)
    found, report = await collect(pipe)
    assert found == [0, 1, 2]
    edge = report.edges[0]
    assert (edge.emitted, edge.finished, edge.dropped, edge.in_flight) == (5000, 3, 4997, 0)


@pytest.mark.parametrize("policy", ["drop_oldest", "latest"])
async def test_a_dropping_edge_never_waits_and_counts_what_it_drops(policy: Any) -> None:
    async def slow() -> None:
        me = await Processor("slow").connect()
        async for value in me:
            await me.emit(int(value[0]))
            await asyncio.sleep(0.002)

    def source() -> Any:
        for number in range(400):
            yield np.full(1000, number, np.int64)
            time.sleep(0.0001)

    pipe = Pipe("drops", settings=chain(numbers(1)).settings)
    pipe.connect(Processor("s", source), Processor("slow", slow), size=64 * 1024, policy=policy)
    found, report = await collect(pipe)
    edge = report.edges[0]
    assert found == sorted(found) and edge.emitted == 400
    assert edge.finished == len(found) < 400 and edge.dropped == 400 - len(found) and edge.balanced


async def test_async_with_starts_and_completes_or_stops() -> None:
    pipe = chain(numbers(10), Processor("m", same))
    async with asyncio.timeout(DEADLINE):
        async with pipe:
            assert pipe.state == "running"
        assert pipe.state == "completed"
        other = chain(Processor("m", same))
        with pytest.raises(KeyError):
            async with other:
                raise KeyError("mine")
        assert other.state == "stopped"


def test_run_gives_the_report_and_raises_what_fails() -> None:
    report = chain(numbers(10), Processor("m", same)).run(timeout=DEADLINE)
    assert report.state == "completed" and report.edges[0].finished == 10

    def broken(value: int) -> None:
        raise ValueError("broken")

    with pytest.raises(PipeFailed, match="broken"):
        chain(numbers(10), Processor("m", broken, on_error="fail")).run(timeout=DEADLINE)
    stuck = chain(numbers(1), Processor("m", lambda value: signal.pause()))
    with pytest.raises(TimeoutError):
        stuck.run(timeout=0.2)
    assert stuck.state == "stopped"


async def test_run_inside_a_running_loop() -> None:
    assert chain(numbers(10), Processor("m", same)).run(timeout=DEADLINE).edges[0].finished == 10


# ------------------------------------------------------------------ restarts, limits


@pytest.mark.chaos
async def test_a_worker_that_always_dies_fails_the_pipe_at_its_limit_with_the_reason() -> None:
    def dies() -> None:
        Processor("dies").blocking.connect()
        raise RuntimeError("every time")

    pipe = chain(Processor("dies", dies, restart=RestartPolicy(limit=3, backoff=0.001)))
    with pytest.raises(PipeFailed, match=r"died 4 times within 60 s, more than restart.limit=3") as raised:
        await collect(pipe)
    assert "RuntimeError: every time" in str(raised.value) and pipe.state == "failed"


@pytest.mark.chaos
async def test_frame_timeout_kills_only_a_worker_whose_frame_takes_longer(tmp_path: Path) -> None:
    def work(value: int) -> int:
        if value == 5 and not (tmp_path / "late").exists():
            (tmp_path / "late").touch()
            while True:
                sum(range(1000))
        return value

    def slow_reader(value: int) -> int:
        time.sleep(0.01)
        return value

    pipe = Pipe("late", settings=Settings(restart=QUICK, start_method="fork"))
    late = Processor("late", work, frame_timeout=2.0)  # a busy machine takes some time
    pipe.chain(numbers(20), late)
    pipe.connect(late, Processor("reader", slow_reader), size=64 * 1024)
    found, report = await collect(pipe)
    assert found == list(range(20)) and [one.restarts for one in report.processors] == [0, 1, 0]


@pytest.mark.chaos
async def test_frame_timeout_leaves_waits_alone_and_buries_what_always_takes_too_long() -> None:
    async def driver() -> None:
        me = await Processor("d").connect()
        async for value in me:
            if value == 1:
                time.sleep(60)
            await me.emit(value)

    pipe = chain(Processor("d", driver, frame_timeout=1.0, max_deliveries=2))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        await pipe.emit(0)
        results = pipe.results()
        assert await anext(results) == 0
        await asyncio.sleep(1.2)  # an idle worker is not late
        assert pipe.stats().processors[0].restarts == 0
        await pipe.emit(1)
        await pipe.emit(2)
        assert await anext(results) == 2
        report = await pipe.wait_for_completion()
    assert [(one.value, one.error_kind, one.deliveries) for one in pipe.dead_letters()] == [(1, "WorkerDied", 2)]
    assert report.processors[0].restarts == 2


@pytest.mark.chaos
async def test_scaling_down_and_terminate_lose_no_frame_in_the_hand_of_a_mapped_worker() -> None:
    from upipe import AutoscalePolicy

    async def slow(value: int) -> int:
        await asyncio.sleep(0.01)
        return value

    pipe = chain(
        Processor("slow", slow, workers=1, autoscale=3),
        autoscale=AutoscalePolicy(up_age=0.02, up_depth=0.9, down_idle=0.05, interval=0.02),
    )
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        results = pipe.results()
        for burst in range(3):
            for number in range(60):
                await pipe.emit(burst * 100 + number)
            await asyncio.sleep(0.6)  # up, and down again
        completing = asyncio.create_task(pipe.wait_for_completion())
        found = [one async for one in results]
        report = await completing
    assert sorted(found) == [burst * 100 + number for burst in range(3) for number in range(60)]
    assert report.balanced


@pytest.mark.parametrize("notebook", [False, True])
def test_an_interrupted_run_stops_the_pipe_and_leaves_no_process(tmp_path: Path, notebook: bool) -> None:
    text = """
import asyncio, os, signal
from upipe import Pipe, Processor

def forever():
    open("started." + str(os.getpid()), "w").close()
    while True:
        yield 1

pipe = Pipe("p")
pipe.chain(Processor("f", forever), Processor("m", lambda value: value))

async def cell():
    pipe.run()

try:
    CALL
except KeyboardInterrupt:
    print("interrupted", pipe.state)
""".replace("CALL", "asyncio.run(cell())" if notebook else "pipe.run()")
    (tmp_path / "program.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "program.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as program:
        begun = time.monotonic()
        while not (started := list(tmp_path.glob("started.*"))):
            assert program.poll() is None and time.monotonic() - begun < DEADLINE
            time.sleep(0.005)
        program.send_signal(signal.SIGINT)
        told, _ = program.communicate(timeout=DEADLINE)
    assert told == "interrupted stopped\n"
    assert not Path(f"/proc/{started[0].suffix[1:]}").exists()


def test_what_a_cluster_needs_to_know_is_in_the_spec_and_says_nothing_here() -> None:
    from upipe import Place

    one = Processor("a", lambda value: value, resources={"memory": 2**30, "gpu": 1}, place=Place(hosts=("elsewhere",)))
    pipe = Pipe("p")
    pipe.add(one)
    spec = pipe._prepare(host_problems, True)[0].processors[0]
    assert spec.needs == {"cpu": 0.1, "memory": 2**30, "gpu": 1} and spec.place.hosts == ("elsewhere",)
    assert hash(spec) == hash(spec)
    assert pipe.run(20).state == "completed"


async def test_without_the_libraries_of_a_cluster_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="aiohttp")

    monkeypatch.setattr(pipe_module.importlib, "import_module", missing)
    pipe = Pipe("p")
    pipe.add(Processor("a", len))
    with pytest.raises(ClusterError, match=r"needs aiohttp, which is not installed: pip install 'upipe\[cluster\]'"):
        await pipe.start(cluster="auto")
    assert pipe.state == "declared"
