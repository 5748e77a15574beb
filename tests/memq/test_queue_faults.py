"""MemQ when something goes wrong in the middle of a call."""

from __future__ import annotations

import numpy as np
import pytest

from tests.memq.helpers import FORK, Thread, asleep, in_flight, kill
from upipe.errors import (
    EncodeError,
    FrameCorrupt,
    FrameError,
    FrameTooLarge,
    PickleRefused,
)
from upipe.frame import DType, encode
from upipe.memq import _ring
from upipe.memq.queue import Empty

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


def test_an_array_whose_packed_dims_have_stray_bits_is_refused_though_nothing_checks_its_crc(queue, memory):
    q = queue(check_crc=False)
    q.put(np.arange(6).reshape(2, 3))  # two dims of 31 bits: the two highest of the 64 belong to none
    q.put(7)
    memory(q).flip(0, 8 * 56 + 62)
    with pytest.raises(FrameError, match="packed dims"):
        q.get()
    assert q.get() == 7
    assert in_flight(q) == 0


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
    assert inside.wait(60)
    putter = Thread(q.put, b"x" * 3000)
    asleep(q, producers=True)
    kill(p)  # its claim becomes padding, which the sleeping producer itself passes
    assert q.get() == 0
    putter.result()
    assert q.get() == b"x" * 3000
