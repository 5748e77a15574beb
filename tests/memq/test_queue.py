"""MemQ and its Ring: one process, several threads and tasks, forks, and what goes wrong in the middle."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.memq.helpers import (
    FORK,
    Held,
    Thread,
    asleep,
    descriptors,
    end,
    few_descriptors,
    kill,
    python,
    until,
    waiting,
)
from upipe.errors import (
    EncodeError,
    EndOfStream,
    FrameCorrupt,
    FrameError,
    FrameTooLarge,
    PickleRefused,
    QueueClosed,
    QueueError,
    QueueNotFound,
    QueueStuck,
)
from upipe.frame import DType, encode
from upipe.memq import _ring
from upipe.memq.queue import Empty, Full, MemQ
from upipe.memq.segment import start_time

VALUES = [
    None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 10**30, 0.0, -1.5, float("inf"), "", "8 bytes!", "groß",
    "\U0001f600", "x" * 5000, b"", b"12345678", b"123456789", b"\0" * 4000, [1, "a", None], {"k": [1.5]}, (1, 2),
    {3, 4}, 2.5, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_each_kind_of_value_comes_back_equal_and_of_its_type(queue, value):
    q = queue()
    q.put(value)
    q.put_many([value, value])
    got = [q.get(), *q.get_many()]
    assert got == [value] * 3
    assert {type(g) for g in got} == {type(value)}


@pytest.mark.parametrize("code", "?bhilqBHILQefdFD")
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 4), (2, 0, 3), (1, 2, 3, 4)], ids=str)
def test_arrays_come_back_equal_writable_and_natively(queue, code, shape, monkeypatch):
    q = queue()
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(code)
    if len(shape) <= 3:  # these never ask the reference codec, which is ten times slower
        monkeypatch.setattr(_ring._frame, "encode", None)
        monkeypatch.setattr(_ring._frame, "decode", None)
    q.put(array)
    got = q.get()
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert np.array_equal(got, array)
    assert got.flags.writeable


@pytest.mark.parametrize("code", "?bhilqBHILQefd")
def test_arrays_of_scalars_travel_as_scalars_both_ways(queue, code):
    q = queue()
    values = np.array([0, 1, 1, 0, 1]).astype(code)
    assert q.put_many(values) == 5
    got = q.get_many(array=True)
    assert got.dtype.str == values.dtype.str
    assert np.array_equal(got, values)
    q.put_many(values)
    assert q.get_many() == values.tolist()


# ---------------------------------------------------------------- room


@pytest.mark.parametrize("policy", ["block", "drop_oldest", "latest"])
def test_a_frame_of_exactly_the_ring_fits_and_one_byte_more_never(queue, policy):
    q = queue(4096, policy=policy)
    for _ in range(3):  # three times round
        q.put(b"x" * (4096 - 64), block=False)
        assert q.full()
        assert q.get() == b"x" * (4096 - 64)
    with pytest.raises(FrameTooLarge, match=r"4,160 bytes .* 4,096"):
        q.put(b"x" * (4096 - 63))
    q.put(1)
    assert q.get() == 1


def test_frames_wrap_around_the_end_of_the_ring(queue):
    q = queue(4096)
    sent = []
    for n in range(500):
        value = bytes([n % 256]) * (n * 37 % 1500)
        q.put(value, block=False)
        sent.append(value)
        if n % 2:
            assert [q.get(), q.get()] == sent[-2:]


def test_put_many_and_get_many_go_round_a_small_ring(queue, child):
    q = queue(4096, producers=1)
    p = child(lambda: (q.put_many(np.arange(20_000)), q.put_many(list(range(20_000))), q.close()))
    got = []
    while True:
        try:
            got.extend(q.get_many(300, array=len(got) % 3 == 0))
        except EndOfStream:
            break
    end(p)
    assert got == [*range(20_000), *range(20_000)]


def test_full_and_empty_raise_at_once_or_after_the_timeout(queue):
    q = queue(4096)
    assert q.empty()
    with pytest.raises(Empty):
        q.get_nowait()
    start = time.monotonic()
    with pytest.raises(Empty):
        q.get(timeout=0.05)
    assert time.monotonic() - start >= 0.05
    assert q.put_many(range(100), timeout=0) == 64
    assert q.full()
    assert q.qsize() == 64
    with pytest.raises(Full):
        q.put_nowait(1)
    start = time.monotonic()
    with pytest.raises(Full):
        q.put(1, timeout=0.05)
    assert time.monotonic() - start >= 0.05
    assert q.get_many(1000) == list(range(64))


def test_max_frames_counts_values_whatever_their_size(queue):
    q = queue(1 << 16, max_frames=3)
    q.put(b"x" * 1000)
    assert q.put_many([1, 2, 3], timeout=0) == 2
    assert q.full()
    assert q.put_many(np.arange(5), timeout=0) == 0
    q.get()
    assert q.put_many(np.arange(5), timeout=0) == 1
    with pytest.raises(Full), q.reserve(1, timeout=0):
        pass


def test_one_get_makes_room_for_a_producer_that_sleeps_for_one_frame(queue):
    # A sleeping producer first waits for an eighth of the ring; that must not outlast a moment.
    q = queue(1 << 20)
    while q.send(b"x" * 64):
        pass
    putter = Thread(q.put, b"last")
    asleep(q, producers=True)
    q.get()
    putter.result()


def test_threads_that_need_different_room_are_each_woken_for_theirs(queue):
    q = queue(4096)
    q.put_many(range(64))
    large = Thread(q.put, b"x" * 2000)
    asleep(q, producers=True)
    small = Thread(q.put, 1)
    until(lambda: q.counters()["full_waits"] >= 2)
    q.get()
    small.result()
    for _ in range(64):
        q.get()
    large.result()
    assert q.get() == b"x" * 2000


def test_drop_oldest_keeps_the_newest_and_counts_every_drop(queue):
    q = queue(4096, policy="drop_oldest")
    for n in range(100):
        q.put(n)
    assert q.put_many(np.arange(100, 200)) == 100
    assert q.put_many(range(200, 300)) == 100
    assert q.get_many(1000) == list(range(236, 300))
    stats = q.stats()
    assert (stats.emitted, stats.dropped, stats.finished) == (300, 236, 64)
    assert stats.balanced


@pytest.mark.parametrize("how", ["put", "list", "array", "reserve"])
def test_latest_keeps_one(queue, how):
    q = queue(4096, policy="latest")
    if how == "put":
        for n in range(50):
            q.put(n)
    elif how == "reserve":
        for n in range(50):
            with q.reserve((), "i8") as a:
                a[...] = n
    else:
        assert q.put_many(range(50) if how == "list" else np.arange(50)) == 50
    assert q.qsize() == 1
    assert q.get() == 49
    assert q.stats().dropped == 49
    assert q.stats().balanced


def test_a_held_frame_makes_a_drop_policy_refuse_the_newcomer_and_count_it(queue):
    q = queue(4096, policy="drop_oldest")
    q.put(b"x" * 4000)
    q.take()
    for n in range(5):
        q.put(n)
    assert q.stats().refused > 0
    assert q.stats().balanced
    q.finish()
    q.put("after")
    assert q.get_many()[-1] == "after"


# ---------------------------------------------------------------- what goes wrong in the middle


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return (_explode, ())


def _explode():
    raise RuntimeError("boom")


def _interrupted():
    raise KeyboardInterrupt


class Interrupted:
    def __reduce__(self):
        return (_interrupted, ())


def in_flight(q):
    return q.stats().in_flight


@pytest.mark.parametrize("get", ["get", "get_many", "borrow"])
def test_a_value_that_cannot_be_unpickled_is_finished_once_and_the_next_get_works(queue, get):
    q = queue()
    q.put(Bomb())
    q.put(2)
    with pytest.raises(FrameError, match="boom"):
        q.borrow().__enter__() if get == "borrow" else getattr(q, get)()
    assert q.get() == 2
    assert in_flight(q) == 0


def test_take_holds_a_value_that_cannot_be_unpickled_until_it_is_buried(queue):
    q = queue()
    q.put(Bomb())
    q.put(2)
    with pytest.raises(FrameError):
        q.take()
    assert q.holding == 0
    q.finish(dead=True)
    assert q.get() == 2
    assert q.stats().dead == 1


def test_an_interrupt_while_decoding_gives_the_frame_back(queue):
    q = queue()
    q.put(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        q.get()
    assert q.qsize() == 1
    assert q.stats().redelivered == 1


def test_get_many_delivers_the_values_before_a_bad_one_and_raises_at_the_next_get(queue):
    q = queue()
    for value in (1, "two", b"x" * 1000, Bomb(), 5):
        q.put(value)
    assert q.get_many() == [1, "two", b"x" * 1000]
    with pytest.raises(FrameError, match="boom"):
        q.get_many()
    assert q.get_many() == [5]
    assert in_flight(q) == 0


def test_get_many_stops_before_a_corrupt_frame_of_a_batch_and_loses_none(queue, memory):
    q = queue()
    q.put_many(range(10))
    m = memory(q)
    m.flip(4 * 64, 460)
    m.flip(5 * 64, 3)
    for array in (False, True):
        q2 = q
        got = q2.get_many(array=array)
        if not array:
            assert got == [0, 1, 2, 3]
            with pytest.raises(FrameCorrupt):
                q2.get()
            with pytest.raises(FrameCorrupt):
                q2.get_many()
        else:
            assert got.tolist() == [6, 7, 8, 9]
    stats = q.stats()
    assert (stats.finished, stats.dead, stats.corrupt, stats.in_flight) == (8, 2, 2, 0)


def test_get_many_of_arrays_ends_where_the_type_changes_and_loses_nothing(queue):
    q = queue()
    q.put_many([1, 2, 3.5, "s", 4])
    q.put(np.arange(3))
    q.put(True)
    assert q.get_many(array=True).tolist() == [1, 2]
    assert q.get_many(array=True).tolist() == [3.5]
    assert q.get_many(array=True) == ["s"]
    assert q.get_many(array=True).tolist() == [4]
    assert q.get_many(array=True)[0].tolist() == [0, 1, 2]
    assert q.get_many(array=True).tolist() == [True]
    with pytest.raises(Empty):
        q.get_many(timeout=0, array=True)


def test_get_many_takes_large_frames_too_and_no_more_than_asked(queue):
    q = queue()
    for n in range(6):
        q.put(bytes([n]) * 500)
        q.put(n)
    assert len(q.get_many(5)) == 5
    assert len(q.get_many()) == 7
    with pytest.raises(ValueError, match="at least 1"):
        q.get_many(0)


def test_an_element_that_cannot_be_encoded_leaves_those_before_it_in_the_queue(queue):
    q = queue()
    with pytest.raises(EncodeError):
        q.put_many([1, 2, "no number", 4], dtype=int(DType.U8))
    assert q.get_many() == [1, 2]
    assert q.put_many([b"x" * 100, 1, b"y" * 100, 2]) == 4
    assert q.get_many() == [b"x" * 100, 1, b"y" * 100, 2]


def test_a_put_that_fails_makes_no_producer_and_no_frame(queue):
    q = queue()
    with pytest.raises(EncodeError):
        q.put("x", dtype=int(DType.U8))
    with pytest.raises(FrameTooLarge):
        q.put(b"x" * (1 << 17))
    stats = q.stats()
    assert (stats.claimed, stats.head) == (0, 0)


def test_pickle_is_refused_on_both_sides_and_the_frame_is_finished(queue, monkeypatch):
    q = queue(allow_pickle=False)
    with pytest.raises(PickleRefused):
        q.put({1, 2})
    monkeypatch.setattr(_ring._frame, "encode", lambda value, dtype, allow_pickle: encode(value, dtype))  # a liar
    q.put({1, 2})
    q.put(3)
    with pytest.raises(PickleRefused):
        q.get()
    assert q.get() == 3
    assert in_flight(q) == 0


def test_an_aborted_reservation_frees_its_room_without_any_consumer(queue):
    q = queue(4096, producers=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), q.reserve(4000) as a:
            a[:] = 1 / 0
    q.put(b"x" * 4000, timeout=0)
    assert q.get() == b"x" * 4000
    assert q.emitted(0) == 1
    q.use_producer(0)
    stats = q.stats()
    assert (stats.aborted, stats.emitted, stats.finished) == (3, 1, 1)


def test_padding_that_a_consumer_passes_wakes_a_producer_that_waits_for_its_room(queue, child):
    q = queue(4096)
    q.put(0)
    inside, leave = FORK.Event(), FORK.Event()

    def claims():
        with q.reserve(3000):
            inside.set()
            leave.wait()

    p = child(claims)
    assert inside.wait(20)
    putter = Thread(q.put, b"x" * 3000)
    asleep(q, producers=True)
    kill(p)  # its claim becomes padding, which the sleeping producer itself passes
    assert q.get() == 0
    putter.result()
    assert q.get() == b"x" * 3000


# ---------------------------------------------------------------- take, finish, give back


def test_a_frame_that_is_taken_stays_until_it_is_finished(queue):
    q = queue(4096)
    q.put_many([1, 2, 3])
    assert q.take() == 1
    assert q.holding == 0
    assert q.take() == 2  # finishes 1
    assert q.stats().finished == 1
    q.give_back()
    assert q.holding is None
    assert (q.take(), q.header()[1]) == (2, 2)
    q.finish()
    q.finish()
    assert q.take() == 3
    q.close()
    other = MemQ.attach(q.name)
    assert other.take() == 3
    assert other.header()[1] == 2
    other.finish()
    other.close()


def test_get_leaves_alone_what_take_holds(queue):
    q = queue()
    for value in (b"x" * 100, b"y" * 100, 3):
        q.put(value)
    q.take()
    assert q.get() == b"y" * 100
    with q.borrow() as value:
        assert value == 3
    assert q.holding == 0
    assert q.qsize() == 0
    assert in_flight(q) == 3  # those behind it are done, but their room is not free yet
    q.finish()
    assert in_flight(q) == 0


def test_finish_says_when_the_frame_is_not_held_any_more(queue):
    q = queue()
    q.put(1)
    q.take()
    q.end(q.holding)
    with pytest.raises(QueueError, match="not held"):
        q.finish()
    q.finish()  # nothing is held now
    for position in (0, 64, 1 << 40, 7):
        with pytest.raises(QueueError, match="not held"):
            q.end(position)


def test_a_position_that_the_ring_used_again_is_not_ended_by_its_old_name(queue):
    q = queue(4096)
    q.put(b"x" * 4000)
    q.take()
    old = q.detach_held()
    q.end(old)
    q.put(b"y" * 4000)
    q.take()
    with pytest.raises(QueueError):
        q.end(old)
    assert q.holding == 4096
    q.finish()


# ---------------------------------------------------------------- zero copy


def test_reserve_and_borrow_share_the_bytes_of_the_ring(queue):
    q = queue()
    with q.reserve((4, 5), "f4") as a:
        a[:] = 7
        view = a[1:]
    assert not a.flags.writeable
    del view
    with q.borrow() as b:
        assert b.shape == (4, 5)
        assert (b == 7).all()
        with pytest.raises(ValueError, match="read-only"):
            b[0] = 1
    q.put(b"bytes" * 10)
    with q.borrow() as m:
        assert isinstance(m, memoryview)
        assert m.readonly
        assert m == b"bytes" * 10
    q.put("text")
    with q.borrow() as text:
        assert text == "text"


def test_borrow_gives_large_bytes_as_a_view_too(queue):
    q = queue(8 << 20)
    q.put(b"z" * (5 << 20))
    with q.borrow() as m:
        assert isinstance(m, memoryview)
        assert m.nbytes == 5 << 20


def test_a_block_that_raises_gives_the_borrowed_frame_back(queue):
    q = queue()
    q.put(np.arange(10))
    with pytest.raises(ZeroDivisionError), q.borrow() as a:
        a / (1 // 0)
    assert q.qsize() == 1
    assert q.get().sum() == 45


def test_views_outlive_the_handle_and_its_memory_goes_with_them(queue):
    q = MemQ(1 << 16)
    q.put(np.arange(100))
    with q.borrow() as a:
        q.close()  # takes effect at the end of the loan
        assert a.sum() == 4950
        with pytest.raises(QueueClosed):
            q.get()
    path = Path(f"/proc/{os.getpid()}/maps")
    name = q.name
    q.unlink()
    del q
    gc.collect()
    assert a[0] == 0
    assert name in path.read_text()
    del a
    gc.collect()
    assert name not in path.read_text()


def test_a_reservation_open_at_close_is_committed_at_its_end(queue):
    q = queue()
    other = MemQ.attach(q.name)
    with q.reserve(10, "u1") as a:
        q.close()
        a[:] = 5
    assert other.get().sum() == 50
    with pytest.raises(EndOfStream):
        other.get()
    other.close()


def test_a_generator_that_is_dropped_inside_its_block_gives_back_and_aborts(queue):
    q = queue()
    q.put(1)

    def work():
        with q.borrow() as value, q.reserve(10):
            yield value

    g = work()
    assert next(g) == 1
    del g
    gc.collect()
    assert q.qsize() == 1
    loan = q.borrow()
    loan.__enter__()
    with pytest.raises(ValueError, match="once"):
        loan.__enter__()
    del loan
    gc.collect()
    assert q.qsize() == 1
    assert q.get() == 1


# ---------------------------------------------------------------- the end of the stream


def test_the_stream_ends_when_every_producer_closed_and_every_frame_is_finished(queue):
    q = queue(producers=2)
    a, b = MemQ.attach(q.name), MemQ.attach(q.name)
    a.put(1)
    b.put(2)
    a.close()
    assert q.take() == 1
    b.close()
    assert q.take() == 2
    with pytest.raises(Empty):
        MemQ.attach(q.name).get_nowait()  # 2 is held, and may come back
    q.finish()
    with pytest.raises(EndOfStream):
        q.get()
    assert q.ended
    assert list(q) == []


def test_all_sleepers_learn_the_end(queue):
    q = queue(producers=1)
    producer = MemQ.attach(q.name)
    producer.put(0)
    handles = [MemQ.attach(q.name) for _ in range(3)]
    holder = MemQ.attach(q.name)
    assert holder.take() == 0
    threads = [Thread(lambda h=h: list(h)) for h in handles for _ in range(3)]
    asleep(q, 3)
    producer.close()
    holder.finish()
    assert [t.result() for t in threads] == [[]] * 9
    for h in (*handles, holder):
        h.close()


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
    assert ready.wait(20)
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
    async with asyncio.timeout(20):
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
        async with asyncio.timeout(20):
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
    async with asyncio.timeout(20):
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
    async with asyncio.timeout(20):
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
    async with asyncio.timeout(20):
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
        async with asyncio.timeout(20):
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
        return await asyncio.wait_for(task, 20)

    for _ in range(3):
        assert asyncio.run(one()) == 1
    loops = [Thread(lambda: asyncio.run(asyncio.wait_for(q.aget(), 20))) for _ in range(4)]
    for n in range(4):
        other.put(n)
    assert sorted(t.result() for t in loops) == [0, 1, 2, 3]
    other.close()


def test_uvloop_watches_bells_and_peers_as_well(queue, child):
    uvloop = pytest.importorskip("uvloop")
    q = queue()
    holds = FORK.Event()

    def dies():
        q.take()
        holds.set()
        signal.pause()

    q.put("held")
    p = child(dies)
    assert holds.wait(20)

    async def main():
        task = asyncio.create_task(q.aget())
        await waiting(q, 1)
        os.kill(p.pid, signal.SIGKILL)
        return await asyncio.wait_for(task, 20)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == "held"


async def test_async_for_ends_with_the_stream(queue, child):
    q = queue(producers=1)
    p = child(lambda: (q.put_many(range(1000)), q.close()))
    assert [value async for value in q] == list(range(1000))
    await asyncio.to_thread(end, p)


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
            back.put(q.get(timeout=20))
            back.put(q.stats().participants)
        finally:
            os._exit(0)
    assert back.get(timeout=20) == "child's"
    assert back.get(timeout=20) == 2
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
    holds = FORK.Event()

    def dies():
        q.take()
        holds.set()
        signal.pause()

    q.put("precious")
    p = child(dies)
    assert holds.wait(20)
    if wait == "aget":

        async def main():
            task = asyncio.create_task(q.aget())
            await waiting(q, 1)
            os.kill(p.pid, signal.SIGKILL)
            return await asyncio.wait_for(task, 20)

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
    assert put.wait(20)
    reader = Thread(lambda: list(q))
    until(lambda: q.stats().finished == 1)
    asleep(q)
    kill(p)
    assert reader.result() == [1]


def test_recovery_refuses_a_process_that_lives(queue, child):
    q = queue()
    holds = FORK.Event()

    def lives():
        q.take()
        holds.set()
        signal.pause()

    q.put(1)
    p = child(lives)
    assert holds.wait(20)
    start = start_time(p.pid)
    with pytest.raises(QueueError, match="not proven dead"):
        q.recover(p.pid, start)
    kill(p)
    assert q.recover(p.pid, start) == []
    assert q.get_nowait() == 1


def test_recovery_leaves_another_process_of_the_same_number_alone(queue, child):
    """The dead one's number is in use again, by a process that takes part in the same queue."""
    q = queue()
    holds = FORK.Event()

    def lives():
        q.take()
        holds.set()
        signal.pause()

    q.put(1)
    p = child(lives)
    assert holds.wait(20)
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
        assert holds.wait(20)
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
        for shape, dtype in [((1, 2, 3, 4), "u1"), (1 << 21, "u1"), (-1, "u1"), (3, "O"), (3, ">i4"), (3, "U5")]:
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
