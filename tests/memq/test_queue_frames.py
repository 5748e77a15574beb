"""MemQ: frames that are taken, finished and given back, views without a copy, and the end of the stream."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from tests.memq.helpers import Thread, asleep, in_flight
from upipe.errors import (
    EndOfStream,
    FrameTooLarge,
    QueueClosed,
    QueueError,
)
from upipe.memq.queue import Empty, MemQ

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


def lies_in(q, view):
    """Whether the bytes of an array or a memoryview are in the memory of the queue."""
    at = np.frombuffer(view, "u1").ctypes.data if isinstance(view, memoryview) else view.ctypes.data
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if q.name in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(first <= at < last for first, last in spans)


def test_borrow_gives_large_bytes_as_a_view_too(queue):
    q = queue(8 << 20)
    q.put(b"z" * (5 << 20))
    with q.borrow() as m:
        assert isinstance(m, memoryview)
        assert m.nbytes == 5 << 20
        assert m.readonly and lies_in(q, m)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(1 << 22, dtype="u1"), np.ones((1 << 21, 2), "i1"), np.arange(120.0).reshape(2, 3, 4, 5),
        np.ones((1, 2) * 4, "c16"), np.ones((1,) * 9), np.ones((200,) + (1,) * 7), np.arange(9, dtype=">i4"),
        np.zeros(5, [("at", "M8[us]"), ("what", "u2", (3,))]), np.array(["a", "bc"]), np.full(3, 7, "m8[ns]"),
    ],
    ids=lambda value: f"{value.dtype}-{value.shape}",
)  # fmt: skip
def test_an_array_of_any_shape_and_type_is_borrowed_where_it_lies(queue, value):
    q = queue(8 << 20)
    q.put(value)
    with q.borrow() as a:
        assert a.dtype == value.dtype and a.shape == value.shape and (a == value).all()
        assert not a.flags.writeable and lies_in(q, a)
    assert not lies_in(q, value)
    assert q.empty()


@pytest.mark.parametrize(
    "shape", [(8, 9, 16, 3), 3 << 20, (1 << 21, 2), np.int64(5), [np.uint8(2), 3], (), (0, 7), (2,) * 8]
)
def test_any_shape_up_to_eight_dimensions_is_reserved(queue, shape):
    q = queue(8 << 20)
    with q.reserve(shape, "u1") as a:
        assert a.shape == np.empty(shape, "u1").shape and a.flags.writeable
        a[...] = 3
    value = q.get()
    assert value.shape == a.shape and (value == 3).all()


def test_what_is_no_shape_is_a_type_error_and_what_no_ring_holds_is_too_large(queue):
    q = queue()
    for shape in [2.5, (2.5,), "3", None]:
        with pytest.raises(TypeError):
            q.reserve(shape)
    for shape in [1 << 62, (1 << 30, 1 << 30), ((1 << 31) - 1,) * 2, ((1 << 21) - 1,) * 3]:
        with pytest.raises(FrameTooLarge), q.reserve(shape, "c16"):
            pass
    assert q.empty()


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
