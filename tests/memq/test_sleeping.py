"""Sleeping: naps of threads on a futex, and tasks that sleep in the stead of a loop that has nothing to do."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from queue import Empty

import pytest

from tests.memq.helpers import DEADLINE, FORK, Thread, kill, until
from upipe.errors import QueueClosed
from upipe.memq import segment
from upipe.memq._ring import Ring
from upipe.memq.wakeup import LULL, lull


def asleep(pid: int) -> bool:
    return segment.process_state(pid) == "S"


def test_a_thread_that_naps_is_woken_by_a_frame_and_by_close(queue):
    q = queue(4096)
    getting = Thread(q.get)
    until(lambda: q.stats().empty_waits, "the nap")
    q.put(5)
    assert getting.result() == 5
    getting = Thread(q.get)
    until(lambda: q.stats().empty_waits > 1, "the second nap")
    q.close()
    with pytest.raises(QueueClosed):
        getting.result()


def test_several_threads_that_nap_in_one_slot_all_get_their_frames(queue):
    q = queue(4096)
    threads = [Thread(q.get) for _ in range(8)]
    until(lambda: q.stats().empty_waits >= 8, "naps")
    for number in range(8):
        q.put(number)
    assert sorted(t.result() for t in threads) == list(range(8))


def test_a_thread_and_a_task_on_one_handle_both_get_their_frame(queue):
    q = queue(4096)

    async def both() -> list[int]:
        thread = asyncio.get_running_loop().run_in_executor(None, q.get)
        task = asyncio.create_task(q.aget())
        await asyncio.to_thread(until, lambda: q.stats().empty_waits >= 2)
        q.put(1)
        q.put(2)
        return sorted(await asyncio.gather(thread, task))

    assert asyncio.run(asyncio.wait_for(both(), DEADLINE)) == [1, 2]


def test_a_timeout_ends_a_nap(queue):
    q = queue(4096)
    began = time.monotonic()
    with pytest.raises(Empty):
        q.get(timeout=0.01)
    assert 0.01 <= time.monotonic() - began < DEADLINE


def test_one_that_is_killed_in_its_nap_takes_no_wake_with_it(queue, child):
    """A dead napper leaves its bit and its futex set: the frame still finds the one that lives."""
    q = queue(4096)
    done = FORK.SimpleQueue()
    dead = child(q.get)
    until(lambda: q.stats().empty_waits >= 1 and asleep(dead.pid), "the first")
    child(lambda: done.put(q.get(timeout=DEADLINE)))
    until(lambda: q.stats().empty_waits >= 2, "the second")
    kill(dead)
    q.put(7)
    assert done.get() == 7


def test_a_signal_handler_runs_during_a_nap(queue, child):
    q = queue(4096)
    told = FORK.SimpleQueue()

    def naps():
        signal.signal(signal.SIGUSR1, lambda *_: told.put("signal"))
        told.put("ready")
        told.put(q.get(timeout=DEADLINE))

    process = child(naps)
    assert told.get() == "ready"
    until(lambda: q.stats().empty_waits >= 1 and asleep(process.pid), "the nap")
    os.kill(process.pid, signal.SIGUSR1)
    assert told.get() == "signal"
    q.put(1)
    assert told.get() == 1


# ---------------------------------------------------------------------------- lulls


async def test_a_loop_with_something_to_do_has_no_lull():
    assert lull(None) is not None
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: None)
    assert lull(None) is None
    await asyncio.sleep(0)
    timer = loop.call_later(0.2, lambda: None)
    seconds, fd = lull(None)
    assert 0 < seconds <= 0.2 and fd >= 0
    assert lull(0.1)[0] == 0.1 and lull(0) is None
    timer.cancel()
    loop.set_debug(True)
    assert lull(None) is None
    loop.set_debug(False)


def test_another_kind_of_loop_has_no_lull():
    uvloop = pytest.importorskip("uvloop")

    async def ask() -> object:
        return lull(None)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ask()) is None


@pytest.fixture
def lulls(monkeypatch):
    """How often get_or slept in a lull."""
    count = []
    original = lull

    def counted(timeout):
        found = original(timeout)
        count.append(found is not None)
        return found

    monkeypatch.setattr("upipe.memq.queue.lull", counted)
    return count


async def test_in_a_lull_a_frame_comes_without_a_turn_of_the_loop(queue, child, lulls):
    q = queue(4096)
    go = FORK.Event()
    child(lambda: (go.wait(), until(lambda: q.stats().empty_waits), q.put(3)))
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1

    go.set()
    asyncio.get_running_loop().call_later(LULL, turn)  # no reason to give up before
    assert await q.aget(DEADLINE) == 3
    assert lulls == [True] and turns == 0


async def test_timers_other_threads_and_other_descriptors_end_a_lull(queue):
    """Else nothing but a frame, which never comes, would end the wait before LULL."""
    q = queue(4096)
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await q.aget()
    assert time.monotonic() - began < LULL

    here, there = os.pipe()
    called = asyncio.Event()

    def readable() -> None:
        os.read(here, 1)
        called.set()

    loop.add_reader(here, readable)
    for act in (lambda: os.write(there, b"x"), lambda: loop.call_soon_threadsafe(called.set)):
        called.clear()
        began = time.monotonic()
        before = q.stats().empty_waits
        thread = threading.Thread(target=lambda: (until(lambda: q.stats().empty_waits > before), act()))  # noqa: B023
        waiting = asyncio.create_task(q.aget())
        thread.start()
        await called.wait()
        assert time.monotonic() - began < LULL
        waiting.cancel()
        await asyncio.wait([waiting])
        thread.join()
    loop.remove_reader(here)
    os.close(here)
    os.close(there)
    assert q.empty()


def test_the_ring_itself_gives_up_when_the_descriptor_is_readable(queue):
    q = queue(4096)
    here, there = os.pipe()
    os.write(there, b"x")
    assert Ring.get_or(q, "nothing", DEADLINE, here) == "nothing"
    assert Ring.receive(q, DEADLINE, here) == (False, None)
    q.put(1)
    assert Ring.get_or(q, "nothing", DEADLINE, here) == 1
    os.close(here)
    os.close(there)
