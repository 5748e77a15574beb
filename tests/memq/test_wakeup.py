"""Bells, watches of peers, and waiting in event loops."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal

import pytest

from tests.memq.helpers import Thread, asleep, descriptors, end, few_descriptors, holder, kill, until, waiting
from upipe.memq import segment
from upipe.memq.queue import Empty, MemQ
from upipe.memq.wakeup import AsyncWait, Bell, PeerWatch


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_a_bell_is_a_private_fifo_that_goes_when_it_is_closed():
    segment.process_session()  # whose lock keeps a descriptor
    before = descriptors()
    bell = Bell()
    assert bell.path.stat().st_mode & 0o777 == 0o600
    assert not os.get_inheritable(bell.fd)
    assert not readable(bell.fd)
    bell.ring_self()
    assert readable(bell.fd)
    bell.drain()
    assert not readable(bell.fd)
    bell.close()
    bell.close()
    bell.ring_self()
    bell.drain()
    assert not bell.path.exists()
    assert descriptors() == before


def test_ringing_a_bell_that_nobody_drains_never_blocks():
    bell = Bell()
    for _ in range(70_000):  # more than a FIFO holds
        bell.ring_self()
    bell.drain()
    assert not readable(bell.fd)
    bell.close()


def test_without_descriptors_no_bell_and_no_file_is_left():
    segment.process_session()
    before = sorted(os.listdir(segment.process_session().path))
    with few_descriptors(0), pytest.raises(OSError, match="Too many open files"):
        Bell()
    assert sorted(os.listdir(segment.process_session().path)) == before


def test_a_watch_becomes_readable_when_a_peer_ends_and_lets_go_of_who_left(child):
    before = descriptors()
    watch = PeerWatch()
    processes = [child(signal.pause) for _ in range(3)]
    peers = [(p.pid, segment.start_time(p.pid)) for p in processes]
    assert watch.refresh(peers, 1) is False
    assert watch.joined == 1
    assert not readable(watch.fd)
    kill(processes[0])
    assert readable(watch.fd)
    assert watch.refresh(peers[1:], 2) is False
    assert not readable(watch.fd)
    assert watch.refresh(peers, 3) is True  # gone, and reaped
    assert watch.refresh([(peers[1][0], 12345)], 4) is True  # the pid went to somebody else
    watch.close()
    watch.close()
    for p in processes[1:]:
        kill(p)
    assert descriptors() <= before + 2 * 3  # what the three process objects hold


def test_a_watch_lets_go_of_who_left_although_a_forked_child_has_a_copy(child):
    """A stopped child, or one that C code forked: a closed descriptor stays in the set as long as there is a copy of
    it, and a dead peer would keep who watches busy."""
    watch = PeerWatch()
    process = child(signal.pause)
    watch.refresh([(process.pid, segment.start_time(process.pid))], 1)
    copies = [os.dup(fd) for fd in watch._pidfds.values()]
    kill(process)
    assert readable(watch.fd)
    assert watch.refresh([], 2) is False
    assert not readable(watch.fd)
    watch.close()
    for fd in copies:
        os.close(fd)


def test_a_child_may_be_forked_while_another_thread_refreshes_a_watch(child):
    watch = PeerWatch()
    with watch._mutex:
        end(child(int))
    watch.close()


def test_a_dead_peer_that_nobody_reaped_is_seen(queue):
    q = queue()
    q.put("held")
    held, let_die = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            q.take()
            os.write(held[1], b"x")
            os.read(let_die[0], 1)
        finally:
            os._exit(0)  # whatever happens: a child that raised would go on with the suite
    os.read(held[0], 1)
    getter = Thread(q.get)
    asleep(q)
    os.write(let_die[1], b"x")
    assert getter.result() == "held"  # while it is a zombie
    os.waitpid(pid, 0)
    for fd in (*held, *let_die):
        os.close(fd)


def test_more_than_64_peers_are_watched(queue):
    q = queue()
    q.put("held")
    pids = []
    ready = os.pipe()
    for _ in range(70):
        pid = os.fork()
        if pid == 0:
            q.take(block=False) if not pids else q.bell(0)
            os.write(ready[1], b"x")
            signal.pause()
            os._exit(0)
        pids.append(pid)
        os.read(ready[0], 1)
    try:
        getter = Thread(q.get)
        asleep(q)
        os.kill(pids[-1], signal.SIGKILL)
        os.kill(pids[0], signal.SIGKILL)
        assert getter.result() == "held"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for fd in ready:
            os.close(fd)


def test_a_supervised_queue_watches_nobody(queue, child):
    q = queue(supervised=True)
    q.never_end()
    end(child(lambda: q.put(1)))
    assert q.get() == 1
    with pytest.raises(Empty):
        q.get(timeout=0.1)
    assert q.watch_fd() == -1


async def test_the_first_sleep_only_arms_and_the_second_sleeps(queue):
    q = queue()
    other = MemQ.attach(q.name)
    wait = AsyncWait((q,), 0)
    assert await wait.sleep(None) is True
    assert await wait.sleep(0.01) is False
    other.put(1)
    assert await wait.sleep(5) is True
    wait.leave()
    wait.leave()
    assert q.bell(0).tasks == 0
    assert q.get() == 1
    other.close()


async def test_one_wait_over_several_queues_is_woken_by_any_and_owes_the_others_nothing(queue):
    a, b = queue(), queue()
    send = MemQ.attach(b.name)

    async def either():
        wait = AsyncWait((a, b), 0)
        try:
            while await wait.sleep(None):
                for q in (a, b):
                    try:
                        return q.get_nowait()
                    except Empty:
                        continue
        finally:
            wait.leave()

    for n in range(20):
        tasks = [asyncio.create_task(either()) for _ in range(3)]
        await asyncio.sleep(0)
        send.put(n)
        a.put(-n)
        send.put(n)
        async with asyncio.timeout(60):
            assert sorted(await asyncio.gather(*tasks)) == sorted([n, -n, n])
    assert a.bell(0).tasks == b.bell(0).tasks == 0
    send.close()


async def test_futures_of_a_bell_end_at_the_next_ring_beside_waits(queue):
    q = queue()
    bell = q.bell(0)
    futures = [bell.future() for _ in range(3)]
    task = asyncio.create_task(q.aget())
    await asyncio.sleep(0)
    other = MemQ.attach(q.name)
    other.put(1)
    async with asyncio.timeout(60):
        await asyncio.gather(*futures)
        assert await task == 1
    futures = [bell.future()]
    bell.left()
    async with asyncio.timeout(60):
        await futures[0]
    other.close()


async def test_closing_the_handle_ends_its_futures_and_watches(queue):
    before = descriptors()
    q = queue()
    future = q.bell(0).future()
    task = asyncio.create_task(q.aget())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    q.close()
    await asyncio.gather(future, task, return_exceptions=True)
    q.unlink()
    gc.collect()
    assert descriptors() <= before + 1  # the session's lock, when this test was the first to need it


async def test_a_handle_closed_by_another_thread_lets_the_loop_go_first(queue):
    q = queue()
    task = asyncio.create_task(q.aget())
    await asyncio.sleep(0)
    fd = q.bell(0).fd
    await asyncio.to_thread(q.close)
    await asyncio.gather(task, return_exceptions=True)
    assert task.done()
    await asyncio.sleep(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_peers_death_wakes_a_task_while_its_loop_runs(queue, child):
    q = queue()
    q.put(1)
    p = holder(q, child)

    async def main():
        tasks = [asyncio.create_task(q.aget()) for _ in range(4)]
        await waiting(q, 4)
        kill(p)
        done, pending = await asyncio.wait(tasks, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        for t in pending:
            t.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return [t.result() for t in done]

    assert asyncio.run(main()) == [1]
    until(lambda: q.stats().participants <= 1)
