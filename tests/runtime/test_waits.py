"""Waiting on several queues: no wake is lost, none is kept by who leaves, and bells are shared fairly."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from upipe import MemQ
from upipe.errors import QueueClosed
from upipe.memq.wakeup import AsyncWait
from upipe.runtime.waits import CONSUMER, PRODUCER, BlockingWait

Pair = tuple[MemQ, MemQ]


@pytest.fixture
def queues() -> Any:
    made = (MemQ(64 * 1024), MemQ(64 * 1024))
    yield made
    for one in made:
        one.close()
        one.unlink()


def attached(queues: Pair) -> Pair:
    return MemQ.attach(queues[0].name), MemQ.attach(queues[1].name)


def bits(ring: MemQ, end: int) -> bool:
    """Whether this handle is counted as a sleeper; it is not any more afterwards."""
    return bool(ring.disarm(end))


def test_the_first_sleep_only_arms_so_that_the_caller_tries_again(queues: Pair) -> None:
    wait = BlockingWait(queues, CONSUMER, None)
    assert wait.sleep()
    queues[1].put(5)  # comes between the try and the sleep
    begun = time.monotonic()
    assert wait.sleep() and time.monotonic() - begun < 15
    wait.leave()


def test_after_the_deadline_one_more_try_is_granted_and_nothing_stays_armed(queues: Pair) -> None:
    wait = BlockingWait(queues, CONSUMER, 0.01)
    assert [wait.sleep(), wait.sleep(), wait.sleep()] == [True, True, False]
    wait.leave()
    wait.leave()
    assert not bits(queues[0], CONSUMER) and not bits(queues[1], CONSUMER)


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_wake_of_a_queue_it_did_not_take_from_is_passed_on(queues: Pair, awaited: bool) -> None:
    first, second = attached(queues), attached(queues)
    wait: Any = AsyncWait(first, CONSUMER) if awaited else BlockingWait(first, CONSUMER, None)
    assert await wait.sleep(None) if awaited else wait.sleep()
    queues[0].put("a")
    queues[1].put("b")  # both wakes go to the only sleeper
    other = BlockingWait(second, CONSUMER, None)
    assert other.sleep()  # armed behind it, and would find "b" only at the next put
    assert first[0].get_nowait() == "a"
    wait.leave()
    begun = time.monotonic()
    assert other.sleep() and time.monotonic() - begun < 15  # woken by who left
    assert second[1].get_nowait() == "b"
    other.leave()
    for ring in (*first, *second):
        ring.close()


def test_threads_of_one_handle_all_get_what_comes(queues: Pair) -> None:
    got: list[Any] = []

    def take() -> None:
        while True:
            wait = BlockingWait(queues[:1], CONSUMER, 20.0)
            while True:
                found, value = queues[0].receive(0.0)
                if found or not wait.sleep():
                    break
            wait.leave()
            got.append(value)
            if value is None:
                return

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(200):
        queues[0].put(number + 1)
    for _ in threads:
        queues[0].put(None)
    for thread in threads:
        thread.join(60)
    assert sorted(value for value in got if value) == list(range(1, 201)) and got.count(None) == 3


def test_a_producer_sleeps_until_there_is_room() -> None:
    queue = MemQ(4096)
    while queue.send(b"x" * 500):
        pass
    reader = MemQ.attach(queue.name)
    wait = BlockingWait((queue,), PRODUCER, 20.0)
    assert wait.sleep() and not queue.send(b"x" * 500)
    taking = threading.Thread(target=lambda: [reader.get() for _ in range(4)])
    taking.start()
    assert wait.sleep() and queue.send(b"x" * 500)
    wait.leave()
    taking.join(60)
    queue.close()
    queue.unlink()


@pytest.mark.parametrize("awaited", [False, True])
async def test_leaving_never_raises_whatever_was_closed_meanwhile(queues: Pair, awaited: bool) -> None:
    own = attached(queues)
    wait: Any = AsyncWait(own, CONSUMER) if awaited else BlockingWait(own, CONSUMER, None)
    assert await wait.sleep(None) if awaited else wait.sleep()
    own[0].close()
    wait.leave()
    wait.leave()
    assert own[1].bell(CONSUMER).sleepers == own[1].bell(CONSUMER).tasks == 0
    own[1].close()


def test_a_wait_that_could_not_be_armed_everywhere_leaves_no_trace(queues: Pair) -> None:
    own = attached(queues)
    own[1].close()
    wait = BlockingWait(own, CONSUMER, None)
    with pytest.raises(QueueClosed):
        wait.sleep()
    wait.leave()
    assert own[0].bell(CONSUMER).sleepers == 0
    own[0].close()
