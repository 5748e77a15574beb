"""QueueStats: each counter counts what its name says, and the snapshot is frozen."""

from __future__ import annotations

import time

import msgspec
import pytest

from tests.memq.helpers import Memory
from upipe.errors import FrameCorrupt
from upipe.memq.layout import PRODUCERS
from upipe.memq.queue import MemQ
from upipe.memq.stats import QueueStats


def test_a_new_queue_has_counted_nothing(queue):
    q = queue(8192, max_frames=5)
    s = q.stats()
    assert (s.capacity, s.max_frames, s.policy, s.stream, s.participants) == (8192, 5, 0, 0, 0)
    counts = (
        "head tail next depth claimed bytes refused passed finished dropped dead aborted redelivered corrupt taken "
        "max_depth full_waits empty_waits oldest_ns"
    )
    for name in counts.split():
        assert getattr(s, name) == 0, name
    assert s.balanced
    assert s.oldest_age() == 0.0


def test_each_counter_counts_its_event(queue):
    q = queue(4096)
    before = time.time_ns()
    q.put(1)
    q.put(b"x" * 100)
    s = q.stats()
    assert (s.claimed, s.bytes, s.emitted, s.in_flight, s.depth, s.stream) == (2, 108, 2, 2, 64 + 192, 1)
    assert before <= s.oldest_ns <= time.time_ns()
    assert 0 <= s.oldest_age() < 60
    q.get()
    q.take()
    assert q.stats().taken == 2
    assert q.stats().max_depth == 256
    q.give_back()
    assert (q.stats().redelivered, q.stats().in_flight) == (1, 1)
    q.take()
    q.finish(dead=True)
    s = q.stats()
    assert (s.finished, s.dead, s.passed, s.in_flight, s.depth, s.oldest_ns) == (1, 1, 2, 0, 0, 0)
    with pytest.raises(ZeroDivisionError), q.reserve(10):
        raise ZeroDivisionError
    assert q.empty()
    s = q.stats()
    assert (s.aborted, s.emitted, s.claimed, s.passed) == (1, 2, 3, 3)
    m = Memory(q)
    q.put(5)
    m.flip(q.stats().tail, 500)
    with pytest.raises(FrameCorrupt):
        q.get()
    m.close()
    s = q.stats()
    assert (s.corrupt, s.dead) == (1, 2)
    assert s.balanced


def test_drops_are_counted_where_they_happen_and_balance(queue):
    q = queue(4096, policy="drop_oldest")
    for n in range(70):
        q.put(n)
    s = q.stats()
    assert (s.dropped, s.refused, s.lost_to_policy, s.policy) == (6, 0, 6, 1)
    q.set_policy(3)  # discard: nobody will read
    q.put(1)
    s = q.stats()
    assert (s.dropped, s.refused, s.in_flight, s.emitted) == (70, 1, 0, 71)
    assert s.balanced


def test_a_snapshot_is_frozen_and_another_handle_reads_the_same(queue):
    q = queue()
    q.put(1)
    s = q.stats()
    with pytest.raises(AttributeError):
        s.claimed = 5
    twin = MemQ.attach(q.name)
    assert twin.stats() == s
    twin.close()
    q.get()
    assert s.in_flight == 1
    assert msgspec.convert(msgspec.to_builtins(s), QueueStats) == s


def test_every_field_is_documented():
    import inspect

    source = inspect.getsource(QueueStats).splitlines()
    for name in QueueStats.__struct_fields__:
        at = next(i for i, line in enumerate(source) if line.strip().startswith(f"{name}:"))
        assert source[at + 1].strip().startswith('"""'), name


def test_where_a_queue_stands_and_who_may_still_put():
    with MemQ(4096, supervised=True) as q:
        q.never_end()
        hold = PRODUCERS - 1
        assert q.standing(hold) == (True, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        assert not q.standing(0)[0]
        q.declare_producer(3)
        assert not q.standing(hold)[0]
        q.use_producer(3)
        q.put_many([1, 2, 3])
        assert not q.standing(hold)[0]
        q.get()
        q.take()
        q.finish(dead=True)
        q.close_producer(3)
        assert q.standing(hold) == (True, 128, 192, 3, 1, 1, 0, 0, 0, 24)


def test_when_a_frame_was_written_is_known_until_it_is_over():
    with MemQ(4096) as q:
        before = time.time_ns()
        q.put(1)
        assert before - 10**7 <= q.written(0) <= time.time_ns()
        assert q.written(64) == q.written(1) == q.written(1 << 40) == 0
        q.get()
        assert q.written(0) == 0
