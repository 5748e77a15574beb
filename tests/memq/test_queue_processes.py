"""MemQ among processes: forks, deaths, recovery."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal

import numpy as np
import pytest

from tests.memq.helpers import FORK, Thread, asleep, end, few_descriptors, holder, in_flight, kill, until, waiting
from upipe.errors import (
    EndOfStream,
    QueueError,
)
from upipe.memq.queue import Empty, MemQ
from upipe.memq.segment import start_time

# ---------------------------------------------------------------- processes


def test_a_handle_that_crosses_a_fork_works_in_both_processes(queue):
    q = queue()
    back = queue()
    q.put("parent's")
    assert q.take() == "parent's"
    pid = os.fork()
    if pid == 0:
        try:
            assert q.holding is None
            q.finish()  # not the child's to finish
            q.give_back()
            assert q.detach_held() is None
            q.put("child's")
            back.put(q.get(timeout=60))
            back.put(q.stats().participants)
        finally:
            os._exit(0)
    assert back.get(timeout=60) == "child's"
    assert back.get(timeout=60) == 2
    os.waitpid(pid, 0)
    assert q.holding == 0
    q.finish()
    assert in_flight(q) == 0


def test_a_fork_inside_a_reservation_leaves_it_to_the_parent(queue):
    q = queue()
    q.put(np.arange(3))
    with q.reserve(10, "u1") as a, q.borrow() as b:
        pid = os.fork()
        if pid == 0:
            break_out = True
        else:
            os.waitpid(pid, 0)
            break_out = False
            assert in_flight(q) == 2
        a[:] = 1
        assert b[2] == 2
    if break_out:
        os._exit(0)
    assert q.get().sum() == 10
    assert in_flight(q) == 0


def test_a_forked_child_keeps_no_bell_of_the_parent_open(queue):
    q = queue()
    with pytest.raises(Empty):
        q.get(timeout=0.001)
    fd = q.bell(0).fd
    pid = os.fork()
    if pid == 0:
        try:
            os.fstat(fd)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_queue_travels_to_multiprocessing_children_by_name(queue, method):
    import multiprocessing

    q = queue()
    context = multiprocessing.get_context(method)
    p = context.Process(target=MemQ.put, args=(q, {"from": method}))
    p.start()
    assert q.get(timeout=30) == {"from": method}
    end(p)
    p.close()
    twin = pickle.loads(pickle.dumps(q))
    twin.put(1)
    assert q.get() == 1
    twin.close()


@pytest.mark.parametrize("wait", ["get", "poll", "aget"])
def test_what_a_killed_process_held_comes_again_with_its_count_raised(queue, child, wait):
    q = queue()
    q.put("precious")
    p = holder(q, child)
    if wait == "aget":

        async def main():
            task = asyncio.create_task(q.aget())
            await waiting(q, 1)
            os.kill(p.pid, signal.SIGKILL)
            return await asyncio.wait_for(task, 60)

        assert asyncio.run(main()) == "precious"
    elif wait == "get":
        getter = Thread(q.get)
        asleep(q)
        kill(p)
        assert getter.result() == "precious"
    else:
        kill(p)

        def polled():
            try:
                return q.get_nowait()
            except Empty:
                return None

        assert until(polled) == "precious"
    assert q.header()[1] == 2


def test_the_stream_ends_for_who_sleeps_when_the_last_producer_is_killed(queue, child):
    q = queue()
    put = FORK.Event()

    def dies():
        q.put(1)
        put.set()
        signal.pause()

    p = child(dies)
    assert put.wait(60)
    reader = Thread(lambda: list(q))
    until(lambda: q.stats().finished == 1)
    asleep(q)
    kill(p)
    assert reader.result() == [1]


def test_recovery_refuses_a_process_that_lives(queue, child):
    q = queue()
    q.put(1)
    p = holder(q, child)
    start = start_time(p.pid)
    with pytest.raises(QueueError, match="not proven dead"):
        q.recover(p.pid, start)
    kill(p)
    assert q.recover(p.pid, start) == []
    assert q.get_nowait() == 1


def test_recovery_leaves_another_process_of_the_same_number_alone(queue, child):
    """The dead one's number is in use again, by a process that takes part in the same queue."""
    q = queue()
    q.put(1)
    p = holder(q, child)
    start = start_time(p.pid)
    assert q.recover(p.pid, start - 1) == []
    assert (p.pid, start) in q.peers()
    assert q.qsize() == 0
    kill(p)
    assert q.recover(p.pid, start + 1) == []
    assert (p.pid, start) in q.peers()
    assert q.recover(p.pid, start) == []
    assert q.get_nowait() == 1


def test_recovery_buries_poison_finishes_what_a_checkpoint_covers_and_returns_the_rest(queue, child):
    q = queue()
    q.put_many(range(3))
    for _ in range(2):
        holds = FORK.Event()

        def dies(holds=holds):
            q.take()
            q.detach_held()
            if not q.header()[1] > 1:
                q.take()
                q.detach_held()
            holds.set()
            signal.pause()

        p = child(dies)
        assert holds.wait(60)
        start = start_time(p.pid)
        kill(p)
        dead = q.recover(p.pid, start, max_deliveries=2, covered=[64])
    assert dead == [0]
    assert len(q.raw(0)) == 64
    q.end(0, dead=True)
    assert q.get() == 2
    stats = q.stats()
    assert (stats.dead, stats.finished, stats.redelivered, stats.in_flight) == (1, 2, 1, 0)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_that_ends_normally_closes_its_end_of_the_stream(queue, method):
    import multiprocessing

    q = queue(producers=1)
    p = multiprocessing.get_context(method).Process(target=MemQ.put, args=(q, 1))
    p.start()
    end(p)
    p.close()
    assert q.get_nowait() == 1
    with pytest.raises(EndOfStream):
        q.get_nowait()  # at once: nothing has to find out that the child is gone
    assert q.stats().participants <= 1


def test_without_descriptors_a_wait_fails_clearly_and_nothing_is_lost(queue):
    q = queue(4096)
    q.put_many(range(64))
    with few_descriptors(0), pytest.raises(QueueError, match=r"no file descriptor .* have 256 open .*raise the limit"):
        q.put("one too many")
    assert q.get_many() == list(range(64))
    with few_descriptors(0):
        with pytest.raises(QueueError, match="no file descriptor"):
            q.get()
        q.put(1)
        assert q.get() == 1
    fresh = MemQ.attach(q.name)
    with few_descriptors(0), pytest.raises(QueueError, match="no file descriptor"):
        fresh.put(2)  # cannot even join
    fresh.put(3)
    assert q.get(timeout=5) == 3
    fresh.close()


@pytest.mark.slow
def test_512_handles_may_join_and_the_next_is_told(queue):
    from upipe.errors import TooManyParticipants

    q = queue()
    handles = [MemQ.attach(q.name) for _ in range(512)]
    for h in handles:
        h.put(0)
        h.get()
    late = MemQ.attach(q.name)
    with pytest.raises(TooManyParticipants, match="512"):
        late.get_nowait()
    handles[100].close()
    late.put("in")
    assert late.get() == "in"
    for h in (*handles, late):
        h.close()
