"""MemQ among threads and tasks of one process."""

from __future__ import annotations

import asyncio
import ctypes
import operator
import os
import signal
import time
from functools import partial

import numpy as np
import pytest

from tests.memq.helpers import (
    FORK,
    Thread,
    asleep,
    end,
    holder,
    until,
    waiting,
)
from upipe.memq._ring import Ring
from upipe.memq.queue import Empty, Full, MemQ

# ---------------------------------------------------------------- threads


def test_threads_share_a_handle_at_both_ends_and_every_value_arrives_once(queue):
    q = queue(1 << 14)
    values = [bytes([n % 256]) * (n * 997 % 6000) + n.to_bytes(4, "little") for n in range(2000)]
    got = [[] for _ in range(4)]

    def consume(into):
        while (value := q.get()) is not None:
            into.append(value)

    consumers = [Thread(consume, into) for into in got]
    producers = [Thread(lambda k=k: [q.put(v) for v in values[k::4]]) for k in range(4)]
    for p in producers:
        p.result()
    for _ in consumers:
        q.put(None)
    for c in consumers:
        c.result()
    assert sorted(v for into in got for v in into) == sorted(values)
    for into in got:  # per producer in order: one consumer sees each producer's values rising
        numbers = [int.from_bytes(v[-4:], "little") for v in into]
        for k in range(4):
            own = [n for n in numbers if n % 4 == k]
            assert own == sorted(own)


def test_large_frames_read_by_many_threads_are_checked_against_their_own_header(queue):
    q = queue(1 << 22)
    frames = [np.full(100_000, n, dtype="u1") for n in range(60)]
    threads = [Thread(lambda: [q.get() for _ in range(15)]) for _ in range(4)]
    for frame in frames:
        q.put(frame)
    got = [a for t in threads for a in t.result()]
    assert sorted(int(a[0]) for a in got) == list(range(60))
    assert all((a == a[0]).all() for a in got)
    assert q.stats().corrupt == 0


def test_a_waiter_that_times_out_leaves_the_others_armed(queue):
    q = queue()
    patient = [Thread(q.get) for _ in range(3)]
    asleep(q)
    for _ in range(5):
        with pytest.raises(Empty):
            q.get(timeout=0.002)
    other = MemQ.attach(q.name)
    for n in range(3):
        other.put(n)
    assert sorted(t.result() for t in patient) == [0, 1, 2]
    other.close()


def test_a_frame_behind_an_unfinished_write_wakes_a_second_sleeper(queue):
    # Both wakes may go to the first sleeper: who takes a frame and sees another passes the wake on.
    q = queue()
    first, second, writer = (MemQ.attach(q.name) for _ in range(3))
    got = [Thread(first.get), Thread(second.get)]
    asleep(q, 2)
    with writer.reserve(10):
        q.put("behind")
        until(lambda: q.counters()["empty_waits"] >= 3)  # who was woken found nothing, and sleeps again
        asleep(q, 2)
    results = [t.result() for t in got]
    assert "behind" in [r if isinstance(r, str) else "" for r in results]
    for h in (first, second, writer):
        h.close()


def test_ctrl_c_in_a_waiting_get_loses_no_wake(child):
    q = MemQ(1 << 16)
    ready = FORK.Event()

    def waits():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ready.set()
        try:
            q.get()
        except KeyboardInterrupt:
            os._exit(7)
        os._exit(1)

    p = child(waits)
    assert ready.wait(60)
    asleep(q)
    patient = Thread(q.get)
    asleep(q, 2)
    os.kill(p.pid, signal.SIGINT)
    end(p, 7)
    q.put("kept")
    assert patient.result() == "kept"
    q.close()
    q.unlink()


def test_a_signal_handler_that_raises_in_the_main_thread_leaves_the_handle_usable(queue):
    q = queue()

    def raises(*_):
        raise TimeoutError("alarm")

    old = signal.signal(signal.SIGALRM, raises)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError, match="alarm"):
            q.get()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    q.put(1)
    assert q.get() == 1


@pytest.mark.parametrize("what", ["get", "put"])
@pytest.mark.parametrize("supervised", [False, True])
def test_a_signal_that_comes_between_the_last_look_and_the_sleep_is_not_slept_through(queue, what, supervised):
    """It has set a flag of Python by then, and interrupts no system call. Nothing of Python's own runs between the two
    calls below, so the flag is set when the second begins."""
    q = queue(4096, supervised=supervised)
    q.never_end()
    while what == "put" and q.send(b"x" * 64):
        pass

    class Interrupted(Exception):
        pass

    def raises(*_):
        raise Interrupted

    def wait(seconds):
        return partial(Ring.get, q, True, seconds) if what == "get" else partial(Ring.put, q, 1, True, seconds)

    for _ in range(20):  # it has a doorbell then, whose making runs Python, and naps
        with pytest.raises((Empty, Full)):
            wait(0.001)()
    flag = partial(ctypes.pythonapi.PyErr_SetInterruptEx, int(signal.SIGUSR1))
    old = signal.signal(signal.SIGUSR1, raises)
    try:
        with pytest.raises(Interrupted):
            list(map(operator.call, (flag, wait(5.0))))
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert q.bell(what == "put").sleepers == 0


def test_a_signal_without_exception_does_not_end_a_wait(queue):
    q = queue()
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        start = time.monotonic()
        with pytest.raises(Empty):
            q.get(timeout=0.1)
        assert time.monotonic() - start >= 0.1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_an_idle_wait_uses_no_cpu(queue):
    q = queue()
    threads = [Thread(q.get) for _ in range(4)]
    asleep(q)
    before = time.process_time()
    with pytest.raises(Empty):
        q.get(timeout=0.3)
    assert time.process_time() - before < 0.1
    q.put_many(range(4))
    for t in threads:
        t.result()


# ---------------------------------------------------------------- asyncio


@pytest.mark.parametrize("batch", [True, False])
async def test_64_tasks_on_one_handle_each_get_one_value_in_the_order_they_came(queue, batch):
    q = queue()
    other = MemQ.attach(q.name)
    tasks = [asyncio.create_task(q.aget()) for _ in range(64)]
    await waiting(q, 64)
    if batch:
        other.put_many(range(64))
    else:
        for n in range(64):
            other.put(n)
    async with asyncio.timeout(60):
        assert await asyncio.gather(*tasks) == list(range(64))
    other.close()


async def test_a_frame_for_64_waiting_tasks_wakes_one_of_them_and_then_all_is_quiet(queue):
    q = queue()
    other = MemQ.attach(q.name)
    tasks = [asyncio.create_task(q.aget()) for _ in range(64)]
    await waiting(q, 64)
    other.put("one")
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert [t.result() for t in done] == ["one"]
    before = time.process_time()
    await asyncio.sleep(0.2)
    assert time.process_time() - before < 0.1
    assert q.counters()["empty_waits"] < 64 + 8
    for t in pending:
        t.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    other.put("two")
    assert await q.aget() == "two"
    other.close()


async def test_a_cancelled_task_that_was_rung_passes_the_wake_on(queue):
    q = queue()
    other = MemQ.attach(q.name)
    for n in range(50):
        first = asyncio.create_task(q.aget())
        second = asyncio.create_task(q.aget())
        await waiting(q, 2 * n + 2)
        await asyncio.sleep(0)
        other.put(n)
        first.cancel()
        async with asyncio.timeout(60):
            assert await second == n
        with pytest.raises(asyncio.CancelledError):
            await first
    other.close()


async def test_a_cancelled_task_passes_the_wake_on_to_another_process(queue, child):
    q = queue()
    back = queue()
    p = child(lambda: back.put(q.get()))
    asleep(q)
    task = asyncio.create_task(q.aget())
    asleep_twice = asyncio.to_thread(asleep, q, 2)
    await asleep_twice
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    q.put("for the other")
    async with asyncio.timeout(60):
        assert await back.aget() == "for the other"
    end(p)


async def test_aget_times_out_and_aput_waits_for_room(queue):
    q = queue(4096)
    with pytest.raises(Empty):
        await q.aget(timeout=0.01)
    for n in range(64):
        await q.aput(n)
    with pytest.raises(Full):
        await q.aput(1, timeout=0.01)
    putters = [asyncio.create_task(q.aput(n)) for n in range(64, 96)]
    async with asyncio.timeout(60):
        got = [await q.aget() for _ in range(96)]
        await asyncio.gather(*putters)
    assert sorted(got) == list(range(96))


async def test_one_get_makes_room_for_a_task_that_waits_for_one_frame(queue):
    q = queue(1 << 20)
    while q.send(b"x" * 64):
        pass
    task = asyncio.create_task(q.aput(1))
    await waiting(q, 1, "full_waits")
    q.get()
    async with asyncio.timeout(60):
        await task


async def test_threads_and_tasks_wait_on_one_handle_together(queue):
    q = queue()
    other = MemQ.attach(q.name)
    for _ in range(20):
        threads = [Thread(q.get) for _ in range(3)]
        tasks = [asyncio.create_task(q.aget()) for _ in range(3)]
        await asyncio.sleep(0)
        for n in range(6):
            other.put(n)
        async with asyncio.timeout(60):
            got = list(await asyncio.gather(*tasks))
        got += [await asyncio.to_thread(t.result) for t in threads]
        assert sorted(got) == list(range(6))
    other.close()


def test_a_handle_works_in_one_event_loop_after_another_and_in_two_at_once(queue):
    q = queue()
    other = MemQ.attach(q.name)

    async def one():
        task = asyncio.create_task(q.aget())
        await asyncio.sleep(0)
        other.put(1)
        return await asyncio.wait_for(task, 60)

    for _ in range(3):
        assert asyncio.run(one()) == 1
    loops = [Thread(lambda: asyncio.run(asyncio.wait_for(q.aget(), 60))) for _ in range(4)]
    for n in range(4):
        other.put(n)
    assert sorted(t.result() for t in loops) == [0, 1, 2, 3]
    other.close()


def test_uvloop_watches_bells_and_peers_as_well(queue, child):
    uvloop = pytest.importorskip("uvloop")
    q = queue()
    q.put("held")
    p = holder(q, child)

    async def main():
        task = asyncio.create_task(q.aget())
        await waiting(q, 1)
        os.kill(p.pid, signal.SIGKILL)
        return await asyncio.wait_for(task, 60)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == "held"


async def test_async_for_ends_with_the_stream(queue, child):
    q = queue(producers=1)
    p = child(lambda: (q.put_many(range(1000)), q.close()))
    assert [value async for value in q] == list(range(1000))
    await asyncio.to_thread(end, p)
