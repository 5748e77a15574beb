"""The worker process: what it is told, what it says, and in which order it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE, chain, collect, feed
from upipe import Pipe, PipeFailed, Processor
from upipe.errors import NotInWorker
from upipe.runtime.worker import connected, current

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_this_process_is_no_worker() -> None:
    assert connected() is None
    with pytest.raises(NotInWorker, match=r"Processor\('x'\).connect\(\) works only inside a worker"):
        current("x")


async def test_a_worker_that_connects_as_another_processor_is_told_its_name() -> None:
    def work() -> None:
        with pytest.raises(NotInWorker, match=r"this worker is 'right#0', but .*'wrong'.*; use Processor\('right'\)"):
            Processor("wrong").blocking.connect()
        me = Processor("right").blocking
        assert me.connect().connect() is me
        me.emit(1)

    assert (await collect(chain(Processor("right", work))))[0] == [1]


async def test_code_that_does_not_load_fails_the_pipe_with_its_traceback(tmp_path: Path) -> None:
    class Opens:
        def __reduce__(self) -> Any:
            return (exec, ("raise ImportError('no module of mine')",))

    with pytest.raises(PipeFailed, match="cannot load its code: ImportError: no module of mine"):
        await collect(chain(Processor("a", lambda value: value, config=Opens())))


@pytest.mark.chaos
@pytest.mark.parametrize("moment", ["inputs", "outputs", "said", "closed"])
async def test_death_between_any_two_steps_of_the_end_loses_nothing(moment: str) -> None:
    """Code returned -> held frame finished -> ends closed -> Done said -> exit."""

    def die_before(worker: Any, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def dies(*args: Any) -> Any:
            if worker.assignment.epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(owner, name, dies)

    def work() -> None:
        me = Processor("work").blocking.connect()
        worker: Any = connected()
        if moment == "inputs":
            die_before(worker, worker.inputs, "close")
        elif moment == "outputs":
            die_before(worker, worker.outputs, "close")
        elif moment == "said":
            die_before(worker, worker, "say")
        else:
            real = worker.say
            worker.say = lambda message: (real(message), worker.assignment.epoch == 1 and os.kill(os.getpid(), 9))
        for value in me:
            me.emit_sync(value)

    def source() -> Any:
        yield from range(20)

    end = Processor("e", lambda value: value)
    found, report = await collect(chain(Processor("source", source), Processor("work", work), end))
    assert found == list(range(20))
    assert (report.edges[0].finished, report.edges[1].finished) == (20, 20)


async def test_a_thread_of_a_driver_that_still_runs_does_not_keep_the_worker() -> None:
    def work() -> None:
        me = Processor("work").blocking.connect()
        threading.Thread(target=signal.pause, daemon=True).start()
        me.emit(1)

    assert (await collect(chain(Processor("work", work))))[0] == [1]


async def test_a_thread_pool_may_emit_what_the_driver_gets() -> None:
    def work() -> None:
        from concurrent.futures import ThreadPoolExecutor

        me = Processor("work").blocking.connect()
        with ThreadPoolExecutor(4) as pool:
            for value in me:
                pool.submit(me.emit_sync, value * 2)

    found, _ = await feed(chain(Processor("work", work)), range(500))
    assert sorted(found) == [2 * number for number in range(500)]


async def test_what_a_worker_prints_last_is_not_lost(capfd: Any) -> None:
    def work(value: int) -> None:
        print("worker says", value)

    pipe: Pipe = chain(Processor("work", work))
    async with asyncio.timeout(DEADLINE), pipe:
        await pipe.emit(42)
    assert "worker says 42" in capfd.readouterr().out
