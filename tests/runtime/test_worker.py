"""The worker process: what it is told, what it says, and in which order it ends."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE, chain, collect, feed
from upipe import DType, EndOfStream, MemQ, Pipe, PipeFailed, Processor
from upipe.errors import NotInWorker
from upipe.graph.plan import OutputPlan
from upipe.runtime import messages
from upipe.runtime.messages import Rewire
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


# ------------------------------------------------------------------ queues that change


def _rewired(theirs: Any, first: str, second: str, third: str, late: str, replies: str) -> None:
    """A forked child as a worker: adds one to what it gets."""
    from upipe.runtime.messages import Assignment
    from upipe.runtime.worker import Bundle, Worker

    session, label = first.split("/")
    root = os.environ["UPIPE_SHM"]
    names = [name.split("/")[1] for name in (third, replies)]
    outputs = (OutputPlan("next", (names[0],), 0),)
    what = Assignment(
        "p", "work", 0, 1, 1, "map", root, session, "", "", (label,), ("a",), outputs, names[1], 0, "retry", 5,
        False, 100, False, 0.1, (), "/", rewires=True,
    )  # fmt: skip
    worker = Worker(theirs, what, Bundle(None, None, {}, ()))
    try:
        while True:
            worker.emit((worker.receive(), worker.inputs.sources[worker.inputs.last]))
    except EndOfStream:
        worker.close()
    os._exit(0)


def test_a_running_worker_takes_its_new_queues_and_leaves_the_old() -> None:
    queues = [MemQ(1 << 16, producers=1) for _ in range(5)]
    first, second, third, late, _ = queues
    ours, theirs = messages.pair()
    child = multiprocessing.get_context("fork").Process(
        target=_rewired, args=(theirs, *(one.name for one in queues)), daemon=True
    )
    child.start()
    theirs.close()
    for one in (first, second):
        one.use_producer(0, 1)
    first.put(1)
    assert third.get(timeout=60) == (1, "a")
    names = [one.name.split("/")[1] for one in queues]
    told = Rewire((names[0], names[1]), ("a", "b"), (OutputPlan("next", (names[3],), 0),))
    ours.send(messages.encode(told))
    second.put(2)  # it sleeps, on the first queue alone
    assert late.get(timeout=60) == (2, "b")
    with pytest.raises(EndOfStream):
        third.get(timeout=60)  # it has closed its end there
    ours.send(messages.encode(Rewire((names[1],), ("b",), told.outputs)))
    ours.send(messages.encode(Rewire((names[1], "gone"), ("b", "c"), told.outputs)))  # not there: nothing changes
    for number in range(100):
        second.put(number)
        assert late.get(timeout=60) == (number, "b")
    second.close_producer(0)
    with pytest.raises(EndOfStream):
        late.get(timeout=60)
    assert messages.decode_from_worker(ours.recv(messages.PACKET)) == messages.Done()
    child.join(60)
    assert child.exitcode == 0 and second.stats().finished == 101
    ours.close()
    for one in queues:
        one.close()
        one.unlink()


def _fanned(theirs: Any, names: tuple[str, ...], total: int) -> None:
    """A forked child as a driver that emits 0, 1, 2, ... to each of its targets, through the short cuts."""
    from upipe.runtime import worker as module
    from upipe.runtime.messages import Assignment
    from upipe.runtime.worker import Bundle, Worker

    session = names[0].split("/")[0]
    labels = [name.split("/")[1] for name in names]
    outputs = tuple(OutputPlan(f"to-{number}", (label,), 0) for number, label in enumerate(labels[:-1]))
    what = Assignment(
        "p", "work", 0, 1, 1, "driver", os.environ["UPIPE_SHM"], session, "", "", (), (), outputs, labels[-1], 0,
        "retry", 5, False, 100, False, 0.1, (), "/", rewires=True,
    )  # fmt: skip
    worker = module._current = Worker(theirs, what, Bundle(None, None, {}, ()))

    async def emits() -> None:
        async with Processor("work") as me:
            assert "emit" in me.__dict__, "no short cut"
            for number in range(total):
                while not await me.emit(number, DType.U32):
                    pass

    asyncio.run(emits())
    worker.close()
    os._exit(0)


def test_targets_that_change_in_a_stream_get_each_value_once_whichever_way_it_goes() -> None:
    """Of three targets the second one gets another queue, and another again with a fourth target."""
    total = 6000
    queues = [MemQ(4096, producers=1) for _ in range(7)]
    labels = [one.name.split("/")[1] for one in queues]
    first, second, third, later, latest, fourth, _ = queues
    ours, theirs = messages.pair()
    child = multiprocessing.get_context("fork").Process(
        target=_fanned, args=(theirs, tuple(one.name for one in (*queues[:3], queues[-1])), total), daemon=True
    )
    child.start()
    theirs.close()
    plain = [OutputPlan(f"to-{number}", (label,), 0) for number, label in enumerate(labels)]
    changes = {
        1000: Rewire((), (), (plain[0], OutputPlan("to-1", (labels[3],), 0), plain[2])),
        3000: Rewire((), (), (plain[0], OutputPlan("to-1", (labels[4],), 0), plain[2], plain[5])),
    }
    swapped, got, more = iter((second, later, latest)), list[int](), list[int]()
    now = wanted = next(swapped)
    for number in range(total):
        if number in changes:
            ours.send(messages.encode(changes[number]))
            wanted = {1000: later, 3000: latest}[number]
        if now is not wanted:
            time.sleep(0.002)  # it waits for room, and its thread of orders has its turn
        assert first.get(timeout=20) == third.get(timeout=20) == number
        while len(got) <= number:
            try:
                got.append(now.get(timeout=20))
            except EndOfStream:
                now = next(swapped)
        while not fourth.empty():
            more.append(fourth.get())
    assert got == list(range(total)) and now is latest
    child.join(20)
    while not fourth.empty():
        more.append(fourth.get())
    assert child.exitcode == 0 and more == list(range(total - len(more), total)) and 0 < len(more) <= 3000
    for one in queues:
        assert one.stats().balanced
        one.close()
        one.unlink()
    ours.close()
