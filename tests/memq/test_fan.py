"""One value into several queues: in all of them or in none, whatever one of them is up to."""

from __future__ import annotations

import threading
import time
from multiprocessing import get_context

import numpy as np
import pytest

from tests.memq.helpers import asleep, kill, until
from upipe.errors import EncodeError, FrameTooLarge, QueueClosed
from upipe.memq import _ring
from upipe.memq.queue import MemQ

fan_send = _ring.fan_send
SMALL, LARGE = 7, b"x" * 500


def taken(q: MemQ) -> list[object]:
    """Everything that waits there."""
    return [q.get_nowait() for _ in range(q.qsize())]


@pytest.mark.parametrize("value", [SMALL, LARGE])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_each_queue_gets_each_value_once_and_in_order(queue, count, value):
    rings = tuple(queue(4096) for _ in range(count))
    for number in range(4):
        assert fan_send(rings, [number, value] if value is LARGE else number)
    for one in rings:
        assert [got[0] if value is LARGE else got for got in taken(one)] == list(range(4))
        assert one.stats().balanced


def test_one_emit_reaches_at_most_64_queues(queue):
    rings = tuple(queue(4096) for _ in range(65))
    with pytest.raises(ValueError, match="at most 64 queues, not 65"):
        fan_send(rings, 1)
    assert all(one.empty() for one in rings)


@pytest.mark.parametrize("value", [SMALL, LARGE])
@pytest.mark.parametrize("full", [0, 1, 2])
def test_while_one_is_full_none_gets_it(queue, full, value):
    rings = tuple(queue(4096) for _ in range(3))
    assert rings[full].put_many(range(64)) == 64
    assert not fan_send(rings, value)
    assert [one.qsize() for one in rings] == [64 if number == full else 0 for number in range(3)]
    assert taken(rings[full]) == list(range(64))
    assert fan_send(rings, value)
    assert all(taken(one) == [value] and one.stats().balanced for one in rings)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_while_one_is_closed_none_gets_it_and_none_is_left_in_use(queue, closed):
    rings = tuple(queue(4096) for _ in range(3))
    assert fan_send(rings, 1)
    rings[closed].close()
    with pytest.raises(QueueClosed):
        fan_send(rings, 2)
    for number, one in enumerate(rings):
        if number != closed:
            assert taken(one) == [1]
            one.close()  # at once: no operation is counted as under way
            assert one.stats().handles == 0


@pytest.mark.parametrize("policy", ["drop_oldest", "latest"])
def test_one_that_drops_gets_it_all_the_same_and_holds_up_nobody(queue, policy):
    drops, blocks = queue(4096, policy=policy), queue(1 << 16)
    for number in range(200):
        assert fan_send((drops, blocks), number)
    left = taken(drops)
    assert left == list(range(200 - len(left), 200)) and 1 <= len(left) <= 64
    assert taken(blocks) == list(range(200))
    stats = drops.stats()
    assert stats.dropped == 200 - len(left) and stats.balanced and blocks.stats().dropped == 0


def test_a_newcomer_that_a_policy_refuses_is_in_the_others(queue):
    drops, blocks = queue(4096, policy="drop_oldest"), queue(1 << 16)
    for number in range(64):
        drops.put(number)
    holder = MemQ.attach(drops.name)
    held = [holder.take()]
    for number in range(3):  # tail is pinned: only the newest can go
        assert fan_send((drops, blocks), 100 + number)
    assert held == [0] and taken(blocks) == [100, 101, 102]
    holder.finish()
    holder.close()
    stats = drops.stats()
    assert taken(drops)[-1] == 102 and stats.refused == 3 and stats.balanced


def test_a_value_that_cannot_be_sent_leaves_nothing_anywhere(queue):
    rings = queue(4096), queue(1 << 16), queue(4096)
    with pytest.raises(EncodeError):
        fan_send(rings, -1, 9)
    with pytest.raises(FrameTooLarge):
        fan_send(rings, b"x" * 5000)
    assert all(one.empty() for one in rings)
    assert fan_send(rings, 3) and all(taken(one) == [3] for one in rings)


def test_who_sleeps_on_any_of_them_is_woken(queue):
    rings = tuple(queue(4096) for _ in range(4))
    readers = [MemQ.attach(one.name) for one in rings]
    got: list[object] = []
    for round_ in range(3):
        threads = [threading.Thread(target=lambda one=one: got.append(one.get(timeout=20))) for one in readers]
        for thread in threads:
            thread.start()
        for one in rings:
            asleep(one)
        assert fan_send(rings, round_)
        for thread in threads:
            thread.join(20)
        assert got == [round_] * 4
        got.clear()
    for one in readers:
        one.close()


@pytest.mark.chaos
@pytest.mark.parametrize("value", ["small", "large"])
def test_a_producer_that_is_killed_anywhere_leaves_whole_prefixes(queue, value):
    """Between two of the queues as well: they differ by the one frame whose emit did not return."""
    for turn in range(12):
        rings = tuple(queue(1 << 20) for _ in range(4))
        readers = [MemQ.attach(one.name) for one in rings]

        def stream(rings=rings) -> None:
            number = 0
            array = np.zeros(64, np.uint64)
            while True:
                array[0] = number
                if fan_send(rings, array if value == "large" else number):
                    number += 1

        child = get_context("fork").Process(target=stream, daemon=True)
        child.start()
        until(lambda readers=readers: readers[-1].qsize() > 10, "the stream to begin")
        time.sleep(0.0003 * turn)  # any moment will do
        kill(child)
        counts = []
        for one in readers:
            one.recover_dead()
            got = [int(got[0]) if value == "large" else got for got in taken(one)]
            assert got == list(range(len(got)))
            counts.append(len(got))
            assert one.stats().balanced and one.empty()
        assert max(counts) - min(counts) <= 1, counts
        for one in readers:
            one.close()
        for one in rings:
            assert fan_send((one,), 1)  # no lock is left behind
