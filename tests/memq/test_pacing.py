"""Large frames: in warm memory, and near a consumer that keeps up. Nothing of it may cost room, order or frames."""

from __future__ import annotations

import numpy as np
import pytest

from upipe.memq.queue import Full

MIB = 1 << 20
FRAME = np.arange(MIB, dtype=np.uint64)  # 8 MiB


def test_a_ring_nobody_reads_takes_as_much_as_it_holds(queue):
    q = queue(64 * MIB)
    for number in range(7):
        q.put(FRAME + number)
    with pytest.raises(Full):
        q.put_nowait(FRAME)
    assert q.stats().full_waits == 0, "nobody keeps up, and somebody waited for it"
    assert [int(q.get()[0]) for _ in range(7)] == list(range(7))


def test_a_put_waits_for_a_consumer_that_kept_up_and_not_for_ever(queue):
    q = queue(64 * MIB)
    for _ in range(100):  # until the machine was undisturbed for as long as it takes to measure
        for _ in range(8):
            q.put(FRAME)
            q.get()
        before = q.stats().full_waits
        for number in range(7):
            q.put(FRAME + number)
        waits = q.stats().full_waits - before
        with pytest.raises(Full):
            q.put_nowait(FRAME)
        assert [int(q.get()[0]) for _ in range(7)] == list(range(7))
        if waits:
            break
    assert 1 <= waits <= 4, "once, since it did not keep up then"


def test_a_stream_that_is_read_at_once_stays_in_a_small_part_of_the_ring(queue):
    q = queue(64 * MIB)
    frame = np.zeros(MIB, np.uint8)
    places = set()
    for number in range(200):
        frame[0] = number
        q.put(frame)
        assert q.get()[0] == number
        places.add(q.header()[0] % q.capacity // MIB)
    stats = q.stats()
    assert 4 <= len(places) <= 9, "6 MiB, a frame more at either end, and no small part of one"
    assert (stats.depth, stats.in_flight, stats.max_depth <= 2 * MIB) == (0, 0, True)
    assert stats.head > 10 * q.capacity, "positions go on, whatever memory they stand for"


def test_held_frames_leave_all_the_other_room(queue):
    q = queue(64 * MIB)
    frame = np.zeros(2 * MIB, np.uint8)
    for _ in range(9):
        q.put(frame)
        q.get()
    q.put(frame)
    q.take()  # pins the tail; the next claim jumps below it
    count = 1
    while True:
        try:
            q.put_nowait(frame)
        except Full:
            break
        count += 1
    assert count == 31  # as in a ring that never jumped: (64 MiB) // (2 MiB + 64)
    assert q.room < 3 * MIB
    q.finish()
    for _ in range(30):
        q.get()
    assert q.room == q.capacity
