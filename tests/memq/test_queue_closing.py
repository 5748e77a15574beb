"""MemQ: closing, and names."""

from __future__ import annotations

import asyncio
import gc

import numpy as np
import pytest

from tests.memq.helpers import (
    Held,
    Thread,
    asleep,
    descriptors,
    python,
    waiting,
)
from upipe.errors import (
    EndOfStream,
    QueueClosed,
    QueueNotFound,
    QueueStuck,
)
from upipe.memq import _ring
from upipe.memq.queue import Empty, MemQ

# ---------------------------------------------------------------- closing


def test_everything_on_a_closed_handle_says_closed_and_close_is_idempotent(queue):
    q = queue()
    q.put(1)
    q.close()
    q.close()
    calls = [
        lambda: q.put(1), lambda: q.put_nowait(1), q.get, q.get_nowait, q.take, q.receive, lambda: q.put_many([1]),
        q.get_many, lambda: q.send(1), q.qsize, q.empty, q.full, lambda: q.arm(0), lambda: q.bell(0),
        lambda: q.reserve(3).__enter__(), lambda: q.borrow().__enter__(), lambda: q.end(0),
        lambda: asyncio.run(q.aget()), lambda: asyncio.run(q.aput(1)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(QueueClosed):
            call()
    q.finish()
    q.give_back()
    assert q.stats().claimed == 1  # the counters can still be read


def test_a_handle_that_was_never_opened_says_so_instead_of_crashing():
    q = MemQ.__new__(MemQ)
    for call in (q.get, q.stats, q.qsize, q.peers, q.recover_dead, q.wake_all, q.in_flight, lambda: q.ended):
        with pytest.raises(QueueClosed):
            call()
    q.close()


@pytest.mark.parametrize("what", ["get", "put"])
def test_close_wakes_the_threads_that_wait_on_the_handle(queue, what):
    q = queue(4096)
    if what == "put":
        q.put_many(range(64))
    threads = [Thread(getattr(q, what), *(() if what == "get" else (1,))) for _ in range(5)]
    asleep(q, producers=what == "put")
    q.close()
    for t in threads:
        with pytest.raises(QueueClosed):
            t.result()


def test_close_wakes_the_tasks_that_wait_on_the_handle(queue):
    q = queue()

    async def main():
        waiters = [asyncio.create_task(q.aget()) for _ in range(5)]
        await waiting(q, 5)
        q.close()
        return await asyncio.gather(*waiters, return_exceptions=True)

    assert [type(r) for r in asyncio.run(main())] == [QueueClosed] * 5


def test_a_handle_that_is_collected_leaves_the_queue_and_gives_back_what_it_held(queue):
    q = queue(producers=1)
    q.use_producer(0)
    q.put(1)
    gc.collect()
    before = descriptors()
    other = MemQ.attach(q.name)
    assert other.take() == 1
    with pytest.raises(Empty):
        other.get(timeout=0.001)
    assert q.stats().participants == 1  # a process counts once
    del other
    gc.collect()
    assert q.get() == 1
    assert q.header()[1] == 2
    assert descriptors() == before


def test_cycles_of_handles_and_views_are_collected(queue):
    q = queue()

    class Node:
        pass

    node = Node()
    node.handle = MemQ.attach(q.name)
    node.self = node
    node.handle.put(1)
    del node
    gc.collect()
    assert q.get() == 1
    with pytest.raises(EndOfStream):
        q.get(timeout=5)


# ---------------------------------------------------------------- names


def test_labels_are_checked_and_can_be_used_again(queue):
    for label in ("", ".", "..", "a/b", "/abs", "lock", "bell.1", "q.7", "x" * 201, "nul\0"):
        with pytest.raises(ValueError, match="label"):
            MemQ(4096, name=label)
    q = MemQ(4096, name="named")
    with pytest.raises(FileExistsError):
        MemQ(4096, name="named")
    twin = MemQ.attach("named")
    twin.put(1)
    assert q.get() == 1
    twin.close()
    twin.unlink()
    q.unlink()  # again: idempotent
    q2 = MemQ(4096, name="named")
    del q  # its finalizer must leave the newer queue of that label alone
    gc.collect()
    MemQ.attach("named").close()
    q2.close()
    q2.unlink()
    with pytest.raises(QueueNotFound):
        MemQ.attach("named")


def test_the_with_block_closes_and_unlinks_for_its_creator():
    with MemQ(4096) as q:
        name = q.name
        q.put(1)
        with MemQ.attach(name) as twin:
            assert twin.get() == 1
        MemQ.attach(name).close()
    with pytest.raises(QueueNotFound):
        MemQ.attach(name)


def test_bad_arguments_are_refused_with_their_names():
    for knobs, text in [
        ({"policy": "newest"}, "policy"), ({"max_frames": -1}, "max_frames"), ({"producers": -1}, "producers"),
        ({"size": 0}, "ring"), ({"size": 1 << 40}, "ring"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            MemQ(**knobs)
    with MemQ(4096) as q:
        for shape, dtype in [
            ((1,) * 9, "u1"), ((1, 1 << 31), "u1"), (1 << 63, "u1"), (-1, "u1"), (3, "O"), (3, ">i4"), (3, "U5"),
        ]:
            with pytest.raises(ValueError, match="reserve"):
                q.reserve(shape, dtype)


def test_the_module_is_small_enough_to_import_in_a_worker():
    code = "import sys, upipe.memq; print([m for m in ('multiprocessing', 'asyncio') if m in sys.modules])"
    assert "multiprocessing" not in python(code).stdout


def test_interrupted_ends_waits_as_if_their_time_were_over(queue):
    q = queue()
    t = Thread(q.receive, 1e18)
    asleep(q)
    q.interrupted = True
    q.bell(0).ring_self()
    assert t.result() == (False, None)


@pytest.mark.parametrize("policy", ["drop_oldest", "latest"])
@pytest.mark.parametrize(
    "make", [lambda n: n, lambda n: f"{n:0100d}", lambda n: np.full(100, n)], ids=["int", "str", "array"]
)
def test_while_a_held_frame_pins_the_ring_the_newest_value_takes_the_place_of_the_newest_waiting(queue, policy, make):
    q = queue(4096, policy=policy)
    q.put(make(0))
    assert np.array_equal(q.take(), make(0))
    for number in range(1, 200):
        q.put(make(number))
    q.finish()
    left = []
    while not q.empty():
        left.append(q.get())
    assert np.array_equal(left[-1], make(199))
    assert policy == "drop_oldest" or len(left) == 1
    stats = q.stats()
    assert stats.balanced
    assert stats.emitted == 200
    assert stats.finished == 1 + len(left)


def test_a_shorter_frame_in_the_place_of_a_longer_one_is_delivered_whole(queue):
    q = queue(4096, policy="latest")
    q.put(b"a" * 2000)
    q.take()
    q.put(b"b" * 1500)
    q.put(b"c" * 30)
    q.put(7)
    q.finish()
    assert q.get() == 7
    assert q.empty()
    assert q.stats().balanced
    q.put(b"d" * 4000)
    assert q.get() == b"d" * 4000


WAITS = {
    "close": lambda q: q.close(),
    "declare": lambda q: q.declare_producer(7),
    "use": lambda q: q.use_producer(7),
    "close a producer": lambda q: q.close_producer(7),
    "never end": lambda q: q.never_end(),
    "first put": lambda q: q.put(1),
}


@pytest.mark.parametrize("what", WAITS)
def test_who_waits_for_a_lock_lets_the_other_threads_run(queue, what):
    """The holder is another thread of this very process: a wait with the GIL held would never end in time."""
    q = queue()
    other = MemQ.attach(q.name)
    other.empty()
    other.bell(0)  # joined
    with Held(q, "registry_lock") as held:
        t = Thread(WAITS[what], other)
        held.until_somebody_waits()
        assert t.is_alive()
    t.result()
    assert q.stats().handles == (what != "close")
    other.close()


@pytest.mark.slow
def test_a_close_that_cannot_have_the_lock_says_so_and_can_be_repeated(queue):
    q = queue()
    q.put(1)
    other = MemQ.attach(q.name)
    assert other.take() == 1
    with Held(q, "consumer_lock"):
        t = Thread(other.close)
        with pytest.raises(QueueStuck, match="stopped participant"):
            t.result()
    assert other.is_closed
    assert q.empty()
    other.close()
    assert q.get_nowait() == 1
    assert q.stats().handles == 1


def test_a_process_with_two_handles_is_one_participant(queue):
    q = queue()
    other = MemQ.attach(q.name)
    q.empty(), other.put(1), q.put(2)
    assert (q.stats().participants, q.stats().handles) == (1, 2)
    other.close()
    assert (q.stats().participants, q.stats().handles) == (1, 1)


@pytest.mark.parametrize("policy", ["drop_oldest", "latest"])
def test_an_emit_that_finds_no_room_in_one_queue_drops_nothing_in_another(queue, policy):
    lossy, blocks = queue(4096, policy=policy), queue(4096)
    assert lossy.put_many(range(64)) == 64
    assert blocks.put_many(range(64)) == 64
    waiting_before = lossy.qsize()
    assert not _ring.fan_send((lossy, blocks), "new")
    assert lossy.qsize() == waiting_before
    assert blocks.get() == 0
    assert _ring.fan_send((lossy, blocks), "new")
    assert lossy.get_many()[-1] == blocks.get_many()[-1] == "new"
    assert lossy.stats().balanced
    assert blocks.stats().balanced
