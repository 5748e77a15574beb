"""Answers to pipe.call(): from the queue of replies to the futures that wait. Refers to no runner, so that a forgotten
one ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from upipe.errors import EndOfStream, FrameError, PipeError, ProcessorError
from upipe.frame import ERROR, REPLY

Calls = dict[int, asyncio.Future[Any]]


class Source(Protocol):
    """Where the pipe reads what comes to it: a MemQ, or on a cluster several of them (Gathered)."""

    @property
    def last_execution(self) -> int: ...
    @property
    def last_flags(self) -> int: ...
    @property
    def name(self) -> str:
        """Of the queue that was read last."""
    async def aget(self) -> Any: ...
    def set_policy(self, policy: int) -> None: ...


async def answer(
    pipe: str, replies: Source, calls: Calls, roots: int = 1, node: Callable[[str], str] = lambda queue: ""
) -> None:
    """Hand every reply to the call it belongs to, until the pipe ends; then every call that is left learns that.

    Args:
        roots: frames that one call begins with. Replies with the flag REPLY alone raise or lower the number that is on
        its
            way; at 0 all of them were filtered out, and the answer is None.
        node: where a queue of replies comes from.
    """
    left: dict[int, int] = {}
    try:
        while True:
            try:
                value = await replies.aget()
            except EndOfStream:
                break
            except FrameError as error:  # this reply cannot be read here: the next one may
                fail_call(calls, replies.last_execution, error)
                continue
            if replies.last_flags & ERROR:
                raised = ProcessorError(
                    value["processor"], value["worker"], value["kind"], value["message"], value["traceback"],
                    node(replies.name),
                )  # fmt: skip
                fail_call(calls, replies.last_execution, raised)
                continue
            if replies.last_flags & REPLY:
                execution = replies.last_execution
                left[execution] = left.get(execution, roots) + value
                if left[execution] > 0 and execution in calls:
                    continue
                value = None
            left.pop(replies.last_execution, None)
            future = calls.pop(replies.last_execution, None)
            if future is not None and not future.done():  # else a later result of the same call, or its caller gave up
                future.set_result(value)
        fail_all(calls, PipeError(f"pipe {pipe!r} ended without an answer to this call"))
    except Exception as error:  # no descriptor, a queue that is stuck: nobody may wait for what nobody reads
        fail_all(calls, PipeError(f"pipe {pipe!r} cannot read the answers: {error}"))


def fail_call(calls: Calls, execution: int, error: Exception) -> None:
    """One call, if it still waits."""
    future = calls.pop(execution, None)
    if future is not None and not future.done():
        future.set_exception(error)


def fail_all(calls: Calls, error: Exception) -> None:
    """Every call that still waits."""
    for future in calls.values():
        if not future.done() and not future.get_loop().is_closed():
            future.set_exception(error)
