"""The pipe's own ends on real queues, with a runner that is no pipe: emits, calls, results, and what refuses them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from upipe import CallTimeout, MemQ
from upipe.errors import IllegalTransition
from upipe.graph.plan import PIPE, Plan, QueuePlan
from upipe.runtime.ends import Ends


class Runner:
    """What Ends asks of whatever runs the pipe. Replies are put into `calls` by the test."""

    def __init__(self) -> None:
        inputs = QueuePlan("in", PIPE, "a", -1, 4096, "block", (0,))
        self.plan = Plan("p", ("a",), (inputs,), ())
        self.queues = {"in": MemQ(4096), "results": MemQ(4096)}
        self.queues["in"].use_producer(0, 1)
        self.calls: dict[int, asyncio.Future[Any]] = {}
        self.ended: asyncio.Future[None] | None = asyncio.get_running_loop().create_future()
        self.state = "running"
        self.input_closed = 0

    @property
    def results(self) -> MemQ:
        return self.queues["results"]

    def watch(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    def close_input(self) -> None:
        self.input_closed += 1

    async def answer_calls(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        assert self.ended is not None
        if not self.ended.done():
            self.ended.set_result(None)
        for queue in self.queues.values():
            queue.close()
            queue.unlink()


@pytest.fixture
async def runner() -> Any:
    made = Runner()
    yield made
    made.close()
    await asyncio.sleep(0)  # the callback of its end


def fill(ends: Ends, runner: Runner) -> Iterator[int]:
    """Put until there is no room."""
    number = 0
    while runner.queues["in"].send(number):
        yield number
        number += 1


async def test_emit_waits_for_room_and_says_when_there_was_none(runner: Runner) -> None:
    ends = Ends("p", runner)
    assert await ends.emit(1, None, 0, None)
    reader = MemQ.attach(runner.queues["in"].name)
    assert reader.get() == 1
    count = len(list(fill(ends, runner)))
    assert not await ends.emit(2, None, 0, 0.01)
    waits = asyncio.create_task(ends.emit(3, None, 0, None))
    await asyncio.sleep(0)
    assert [reader.get() for _ in range(count)] == list(range(count))
    assert await waits and reader.get() == 3
    reader.close()


async def test_the_input_closes_behind_the_last_emit_that_is_under_way(runner: Runner) -> None:
    ends = Ends("p", runner)
    count = len(list(fill(ends, runner)))
    waits = asyncio.create_task(ends.emit(7, None, 0, None))
    await asyncio.sleep(0)
    ends.close_input()
    assert runner.input_closed == 0
    with pytest.raises(IllegalTransition, match="its input is closed"):
        await ends.emit(8, None, 0, None)
    reader = MemQ.attach(runner.queues["in"].name)
    taken = [reader.get() for _ in range(count)]
    assert await waits and reader.get() == 7 and taken == list(range(count))
    assert runner.input_closed == 1
    reader.close()


async def test_refused_input_ends_the_emits_under_way(runner: Runner) -> None:
    ends = Ends("p", runner)
    list(fill(ends, runner))
    waits = asyncio.create_task(ends.emit(7, None, 0, None))
    await asyncio.sleep(0)
    runner.state = "draining"
    ends.refuse_input()
    with pytest.raises(IllegalTransition, match="it is draining"):
        await waits
    with pytest.raises(IllegalTransition, match="it is draining"):
        await ends.emit(8, None, 0, None)


async def test_a_call_carries_its_number_and_gets_what_is_set_for_it(runner: Runner) -> None:
    ends = Ends("p", runner)
    calls = [asyncio.create_task(ends.call(value, None, None)) for value in "ab"]
    reader = MemQ.attach(runner.queues["in"].name)
    for value, execution in (("a", 1), ("b", 2)):
        assert await reader.aget() == value and reader.last_execution == execution
    runner.calls[2].set_result("B")
    runner.calls[1].set_exception(ValueError("A"))
    assert await calls[1] == "B"
    with pytest.raises(ValueError, match="A"):
        await calls[0]
    assert runner.calls == {}
    reader.close()


async def test_a_call_without_an_answer_or_without_room_times_out_and_is_forgotten(runner: Runner) -> None:
    ends = Ends("p", runner)
    with pytest.raises(CallTimeout, match=r"no answer came within 0\.01 s"):
        await ends.call("a", 0.01, None)
    list(fill(ends, runner))
    with pytest.raises(CallTimeout, match=r"no room came within 0\.01 s"):
        await ends.call("a", 0.01, None)
    assert runner.calls == {}


async def test_results_are_lossless_while_they_are_read_and_kept_short_while_nobody_waits_for_them(
    runner: Runner,
) -> None:
    ends = Ends("p", runner)
    producer = MemQ.attach(runner.results.name)
    producer.put("one")
    policy = lambda: runner.results.counters()["policy"]  # noqa: E731
    reading = ends.results()
    assert await anext(reading) == "one" and policy() == 0
    await reading.aclose()
    assert policy() == 0  # its reader may come back
    ends.awaiting(True)
    assert policy() == 1  # the end is awaited, and nobody reads: it must not wait for ever
    again = ends.results()
    producer.put("two")
    assert await anext(again) == "two" and policy() == 0
    producer.close()
    assert [one async for one in again] == []
    ends.awaiting(False)


async def test_after_the_end_nothing_is_taken(runner: Runner) -> None:
    ends = Ends("p", runner)
    runner.state = "completed"
    assert runner.ended is not None
    runner.ended.set_result(None)
    await asyncio.sleep(0)
    with pytest.raises(IllegalTransition, match="it is completed"):
        await ends.emit(1, None, 0, None)
