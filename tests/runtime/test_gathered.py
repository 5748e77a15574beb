"""Several queues read as one, that come and go under whoever waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from upipe import MemQ
from upipe.errors import EndOfStream
from upipe.runtime.gathered import Gathered

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def queues() -> Iterator[list[MemQ]]:
    made = [MemQ(4096) for _ in range(3)]
    for one in made:
        one.use_producer(0, 1)
    yield made
    for one in made:
        one.close()
        one.unlink()


def named(*queues: MemQ) -> dict[str, MemQ]:
    return {queue.name: queue for queue in queues}


async def test_it_reads_all_of_them_in_turn_and_ends_with_the_last(queues: list[MemQ]) -> None:
    both = Gathered()
    both.rewire(named(*queues[:2]))
    for number, queue in enumerate(queues[:2]):
        for value in range(3):
            queue.send(10 * number + value, execution=number + 1)
    found = []
    for _ in range(6):
        found.append(await both.aget())
        assert both.last_execution == found[-1] // 10 + 1
    assert sorted(found) == [0, 1, 2, 10, 11, 12] and {found[0] // 10, found[1] // 10} == {0, 1}  # in turn
    queues[0].close_producer(0)
    waits = asyncio.create_task(both.aget())
    await asyncio.sleep(0)
    queues[1].send(5)
    assert await waits == 5
    queues[1].close_producer(0)
    with pytest.raises(EndOfStream):
        await both.aget()


async def test_who_waits_reads_a_queue_that_comes(queues: list[MemQ]) -> None:
    one = Gathered()
    waits = [asyncio.create_task(one.aget()) for _ in range(2)]  # there is none yet
    await asyncio.sleep(0)
    one.rewire(named(queues[0]))
    queues[0].send("first")
    done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    assert done.pop().result() == "first"
    one.rewire(named(queues[1]))  # the other one was empty, and is left
    queues[1].send("second")
    await asyncio.wait(waits)
    assert sorted(task.result() for task in waits) == ["first", "second"]


async def test_at_the_end_what_is_there_is_read_and_who_waits_is_told(queues: list[MemQ]) -> None:
    one = Gathered()
    one.rewire(named(queues[0]))
    queues[0].send(1)
    assert await one.aget() == 1
    waits = asyncio.create_task(one.aget())
    await asyncio.sleep(0)
    queues[0].send(2)
    queues[0].close_producer(0)
    one.finish()
    assert await waits == 2
    with pytest.raises(EndOfStream):
        await one.aget()
    empty = Gathered()
    empty.finish()
    with pytest.raises(EndOfStream):
        await empty.aget()


async def test_a_cancelled_reader_has_taken_nothing(queues: list[MemQ]) -> None:
    one = Gathered()
    one.rewire(named(queues[0]))
    waits = asyncio.create_task(one.aget())
    await asyncio.sleep(0)
    waits.cancel()
    await asyncio.wait([waits])
    queues[0].send(1)
    assert await one.aget() == 1


async def test_while_nobody_reads_the_newest_are_kept_and_the_rest_is_counted(queues: list[MemQ]) -> None:
    queue = queues[0]
    one = Gathered()
    one.rewire(named(queue))
    one.set_policy(1)
    for value in range(1000):
        await queue.aput(value, timeout=60.0)
        await asyncio.sleep(0)
    one.set_policy(0)
    stats = queue.stats()
    left = [await one.aget() for _ in range(stats.in_flight)]
    assert left == list(range(1000 - len(left), 1000)) and len(left) >= 10
    assert stats.dropped == 1000 - len(left)
    for value in range(100):  # from now on nothing is dropped
        if not queue.send(value):
            break
    await asyncio.sleep(0)
    assert queue.stats().dropped == stats.dropped and not queue.send(0)
    one.close()
