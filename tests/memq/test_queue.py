"""MemQ: each kind of value in and out, and room. The rest: test_queue_*.py."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.memq.helpers import (
    Thread,
    asleep,
    end,
    until,
)
from upipe.errors import (
    EndOfStream,
    FrameTooLarge,
)
from upipe.memq import _ring
from upipe.memq.queue import Empty, Full

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
