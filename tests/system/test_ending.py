"""However a pipe ends, or does not begin: nothing hangs, nothing is left (the fixture looks)."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import crowded
from tests.system import jobs
from tests.system.support import LONGEST, Script, auntil, kill, worker_pids
from upipe import Pipe, PipeFailed, Processor, Settings
from upipe.runtime import hearing
from upipe.runtime.local import LocalRunner

pytestmark = [pytest.mark.system, pytest.mark.slow]
FORK = Settings(start_method="fork", edge_bytes=1 << 16)


def runner_of(pipe: Pipe) -> LocalRunner:
    runner = pipe._runner
    assert isinstance(runner, LocalRunner)
    return runner


async def test_stop_while_queues_are_full() -> None:
    pipe = Pipe("full", settings=FORK)
    pipe.chain(Processor("work", jobs.identity, workers=2), Processor("stuck", jobs.stuck))
    await pipe.start()

    async def emit() -> None:
        while True:
            assert await pipe.emit(b"x" * 1000)

    emitting = asyncio.create_task(emit())
    await auntil(lambda: all(edge.depth > edge.capacity // 2 for edge in pipe.stats().edges[:2]))
    began = time.monotonic()
    report = await pipe.stop()
    assert time.monotonic() - began < 2 * crowded()
    assert report.state == "stopped" and report.balanced
    with pytest.raises(Exception, match=r"stopped|closed|takes nothing"):
        await asyncio.wait_for(emitting, LONGEST)


async def test_stop_ends_calls_and_results() -> None:
    pipe = Pipe("stop", settings=FORK)
    pipe.add(Processor("stuck", jobs.stuck))
    await pipe.start()
    call = asyncio.create_task(pipe.call(1))
    results = asyncio.create_task(anext(pipe.results(), "end"))  # type: ignore[arg-type]
    await auntil(lambda: any(edge.emitted for edge in pipe.stats().edges))
    await pipe.stop()
    with pytest.raises(Exception, match="stopped"):
        await asyncio.wait_for(call, LONGEST)
    assert await asyncio.wait_for(results, LONGEST) == "end"
    assert (await pipe.stop()).state == "stopped"  # again


@pytest.mark.parametrize("method", ["fork", "exec"])
async def test_terminate_drains_mapped_roots(method: str) -> None:
    pipe = Pipe("drain", settings=Settings(start_method=method))
    pipe.chain(Processor("work", jobs.identity, workers=2), Processor("sink", jobs.sink))
    await pipe.start()
    for number in range(300):
        assert await pipe.emit(number)
    report = await pipe.terminate(LONGEST)
    assert report.state == "completed" and report.balanced
    assert [(edge.emitted, edge.finished, edge.in_flight) for edge in report.edges] == [(300, 300, 0), (300, 300, 0)]


@pytest.mark.parametrize("root", ["source", "driver"])
async def test_terminate_ends_sources_and_drivers(root: str) -> None:
    pipe = Pipe("drain", settings=FORK)
    code = jobs.endless if root == "source" else jobs.driver_emitting
    pipe.chain(Processor(root, code), Processor("same", jobs.identity), Processor("sink", jobs.sink))
    await pipe.start()
    await auntil(lambda: pipe.stats().edges[1].finished > 100)
    report = await pipe.terminate(LONGEST)
    assert report.state == "completed" and report.balanced
    assert all(edge.in_flight == 0 for edge in report.edges)


async def test_terminate_that_takes_too_long_stops() -> None:
    pipe = Pipe("drain", settings=FORK)
    pipe.add(Processor("stuck", jobs.stuck))
    await pipe.start()
    await pipe.emit(1)
    report = await pipe.terminate(0.2)
    assert report.state == "stopped" and report.balanced


async def test_a_forgotten_pipe_ends_with_a_warning() -> None:
    pipe = Pipe("forgotten", settings=FORK)
    pipe.add(Processor("same", jobs.identity))
    await pipe.start()
    assert await pipe.call(1, timeout=60) == 1
    gc.collect()  # what other tests left
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del pipe
        await asyncio.sleep(0)
        gc.collect()
    assert ["forgotten" in str(one.message) for one in caught if one.category is ResourceWarning] == [True]


@pytest.mark.parametrize("autoscale", [None, 2])
def test_a_loop_that_ends_before_its_pipe(autoscale: int | None) -> None:
    pipe = Pipe("loop", settings=FORK)
    pipe.chain(Processor("endless", jobs.endless), Processor("sink", jobs.sink, autoscale=autoscale))
    asyncio.run(_start(pipe))
    asyncio.run(_stop(pipe))
    assert pipe.state == "stopped" and pipe.report().balanced


async def _start(pipe: Pipe) -> None:
    await pipe.start()


async def _stop(pipe: Pipe) -> None:
    await pipe.stop()


def test_a_pipe_that_is_forgotten_after_its_loop() -> None:
    pipe = Pipe("loop", settings=FORK)
    pipe.add(Processor("same", jobs.identity))
    asyncio.run(_start(pipe))
    kept = [pipe]
    del pipe
    with pytest.warns(ResourceWarning, match="forgotten"):
        _forget(kept)


def _forget(kept: list[Pipe]) -> None:
    kept.clear()
    gc.collect()


async def test_two_pipes_at_once() -> None:
    pipes = []
    for number in range(2):
        pipe = Pipe(f"two-{number}", settings=FORK)
        pipe.chain(Processor("read", jobs.count_up(200 * (number + 1))), Processor("double", jobs.double))
        pipes.append(pipe)
    await asyncio.gather(*[pipe.start() for pipe in pipes])
    await asyncio.gather(*[_read(pipe, 200 * (number + 1)) for number, pipe in enumerate(pipes)])
    await pipes[0].stop()
    assert (await pipes[1].wait_for_completion(LONGEST)).state == "completed"


async def _read(pipe: Pipe, count: int) -> None:
    assert [value async for value in pipe.results()] == list(range(0, 2 * count, 2))


@pytest.mark.parametrize("method", ["auto", "fork"])
def test_a_pipe_in_a_thread(method: str) -> None:
    found: list[object] = []

    def body() -> None:
        pipe = Pipe("thread", settings=Settings(start_method=method))
        pipe.chain(Processor("read", jobs.count_up(100)), Processor("sink", jobs.sink))
        found.append(pipe.run(LONGEST))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(LONGEST)
    assert str(found[0]).startswith("pipe thread: completed")


async def test_the_same_declaration_again() -> None:
    read, double = Processor("read", jobs.count_up(20)), Processor("double", jobs.double)
    read.add(double)
    for _ in range(3):
        pipe = Pipe("again", settings=FORK)
        pipe.add(read)
        await pipe.start()
        await _read(pipe, 20)
        await pipe.wait_for_completion(LONGEST)


async def test_uvloop_as_the_callers_loop(script: Callable[..., Script]) -> None:
    one = script("""
import uvloop
from upipe import Pipe, Processor, Settings
def double(value):
    return 2 * value
async def main():
    for method in ("auto", "exec"):
        pipe = Pipe("uv", settings=Settings(start_method=method))
        pipe.add(Processor("double", double, workers=2))
        async with pipe:
            print([await pipe.call(number, timeout=60) for number in range(3)])
uvloop.run(main())
""")
    assert one.end() == (0, "[0, 2, 4]\n" * 2)
    assert one.leftovers() == []


async def test_what_a_callback_raises_fails_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe("broken", settings=FORK)
    pipe.add(Processor("stuck", jobs.stuck))
    await pipe.start()
    monkeypatch.setattr(hearing.messages, "decode_from_worker", lambda data: 1 / 0)
    runner = runner_of(pipe)
    kill(runner, "stuck#0")  # it is restarted, and what it says then cannot be read
    with pytest.raises(PipeFailed, match=r"a bug of it[\s\S]*ZeroDivisionError"):
        await pipe.wait_for_completion(LONGEST)


async def test_code_that_cannot_load_fails_the_start() -> None:
    pipe = Pipe("load", settings=FORK)
    pipe.chain(Processor("broken", Broken), Processor("sink", jobs.sink))
    began = time.monotonic()
    with pytest.raises(PipeFailed, match=r"'broken'.*cannot load its code.*no good at all"):
        await pipe.start()
    assert time.monotonic() - began < 5 * crowded()


class Broken:
    def __init__(self) -> None:
        raise ValueError("no good at all")

    def process(self, value: object) -> None: ...


class Never:
    def __init__(self) -> None:
        time.sleep(1000)

    def process(self, value: object) -> None: ...


async def test_start_has_a_deadline() -> None:
    pipe = Pipe("never", settings=Settings(start_method="fork", start_deadline=0.3))
    pipe.chain(Processor("never", Never), Processor("sink", jobs.sink))
    with pytest.raises(PipeFailed, match=r"never#0(, sink#0)? were not ready within 0.3 s"):
        await pipe.start()


async def test_start_that_is_cancelled_leaves_nothing() -> None:
    pipe = Pipe("cancelled", settings=FORK)
    pipe.add(Processor("never", Never))
    starting = asyncio.create_task(pipe.start())
    await auntil(lambda: pipe._runner is not None and worker_pids(runner_of(pipe)))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert pipe.state == "stopped"


async def test_an_interpreter_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "entry.py"
    path.write_text("print(1)\n")
    pipe = Pipe("entry", settings=FORK)
    pipe.add(Processor("script", entry=str(path), interpreter="/no/such/python"))
    with pytest.raises(PipeFailed, match="/no/such/python"):
        await _run(pipe)


async def test_a_script_that_never_connects_fails_soon_and_tells_its_last_words(tmp_path: Path) -> None:
    path = tmp_path / "entry.py"
    path.write_text("import sys\nprint('no --model was given', file=sys.stderr)\nsys.exit(2)\n")
    pipe = Pipe("entry", settings=FORK)
    pipe.add(Processor("script", entry=str(path)))
    began = time.monotonic()
    with pytest.raises(PipeFailed, match=r"(?s)entry\.py ended 3 times and never once .*no --model was given") as told:
        await _run(pipe)
    assert "exit status 2" in str(told.value) and time.monotonic() - began < 15 * crowded()


async def _run(pipe: Pipe) -> None:
    await pipe.start()
    await pipe.wait_for_completion(LONGEST)


NO_MEMORY = """
import asyncio, os, subprocess, sys
from upipe import OutOfSharedMemory, Pipe, Processor, Settings
def same(value):
    return value
async def main():
    before = os.listdir("/proc/self/fd")
    for size in (1 << 20, 1 << 22, 1 << 24):
        pipe = Pipe("p", settings=Settings(edge_bytes=size, sink_bytes=size, start_method=sys.argv[1]))
        pipe.chain(*[Processor(f"p{number}", same) for number in range(8)])
        try:
            await pipe.start()
            print("started")
        except OutOfSharedMemory as error:
            assert "available" in str(error), error
        del pipe
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1, os.listdir("/proc/self/fd")  # the session's lock
    session, = os.listdir(os.environ["UPIPE_SHM"])
    print(os.listdir(os.environ["UPIPE_SHM"] + "/" + session))
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        print("no children")
    pipe = Pipe("p", settings=Settings(edge_bytes=1 << 16, sink_bytes=1 << 16, start_method=sys.argv[1]))
    pipe.add(Processor("same", same))
    async with pipe:
        print(await pipe.call(7, timeout=60))
asyncio.run(main())
"""


@pytest.mark.parametrize("method", ["fork", "exec"])
def test_start_without_memory_leaves_nothing(tmp_path: Path, method: str) -> None:
    import os
    import subprocess
    import sys

    from tests.system.support import ROOT

    program = tmp_path / "no_memory.py"
    program.write_text(NO_MEMORY)
    mount = tmp_path / "shm"
    mount.mkdir()
    line = f"mount -t tmpfs -o size=4m,mode=700 none {mount} && exec {sys.executable} {program} {method}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", line],
        env={**os.environ, "UPIPE_SHM": str(mount), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert (done.returncode, done.stdout) == (0, "['lock']\nno children\n7\n"), done.stderr


NO_DESCRIPTORS = """
import asyncio, os, resource, sys, time
from upipe import Pipe, PipeFailed, Processor, Settings
from upipe.errors import QueueError
def same(value):
    return value
async def main():
    for limit in [*range(len(os.listdir("/proc/self/fd")), 40), 45, 50, 55, 59]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
        pipe = Pipe("p", settings=Settings(start_method=sys.argv[1], start_deadline=60.0))
        pipe.chain(*[Processor(f"p{number}", same, workers=3) for number in range(3)])
        began = time.monotonic()
        try:
            await pipe.start()
            if limit > 57:
                assert await pipe.call(1, timeout=60) == 1
            await pipe.stop()
        except (PipeFailed, QueueError) as error:
            assert "descriptor" in str(error) or "Too many open files" in str(error), error
        except OSError as error:
            assert error.errno == 24, error
        assert time.monotonic() - began < 50, limit
        del pipe
    print("done")
asyncio.run(main())
"""


def test_start_without_descriptors(script: Callable[..., Script]) -> None:
    one = script(NO_DESCRIPTORS, args=("fork",))
    assert one.end() == (0, "done\n")
    assert one.leftovers() == []
    assert one.others() == []
