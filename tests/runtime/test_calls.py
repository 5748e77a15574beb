"""Whose call a frame is: the context of the task that asked for it, and what that task made meanwhile."""

from __future__ import annotations

import asyncio
import contextvars

from upipe.runtime.calls import CURRENT, Call


def test_a_call_begins_with_one_frame_that_nobody_answered() -> None:
    call = Call()
    assert (call.execution, call.announced, call.children, call.answered, call.yielding) == (0, 1, 0, False, False)


async def test_each_task_has_the_call_of_the_frame_it_asked_for() -> None:
    async def works_for(execution: int, turn: asyncio.Event, after: asyncio.Event) -> int:
        call = Call()
        call.execution = execution
        CURRENT.set(call)
        after.set()
        await turn.wait()  # the other task has set its own by now
        found = CURRENT.get()
        assert found is call
        return found.execution

    first, second = asyncio.Event(), asyncio.Event()
    assert await asyncio.gather(works_for(1, second, first), works_for(2, first, second)) == [1, 2]
    assert CURRENT.get() is None


async def test_a_task_made_for_a_frame_keeps_its_call_when_the_maker_goes_on_to_the_next() -> None:
    """Why a driver that asks for its next frame cannot be taken to have filtered out the one before."""
    go = asyncio.Event()

    async def emits_later() -> Call | None:
        await go.wait()
        return CURRENT.get()

    async def driver() -> tuple[Call, Call | None]:
        one, two = Call(), Call()
        CURRENT.set(one)
        task = asyncio.create_task(emits_later())
        CURRENT.set(two)
        go.set()
        return one, await task

    one, found = await contextvars.copy_context().run(asyncio.create_task, driver())
    assert found is one
