"""Short cuts before the methods of a connected processor: one queue out, one in, and nothing special so far.

They do what they stand before, less the questions that `worker.direct` answers: three calls and a dozen look-ups a
frame, which was half of its time. As soon as a call, a drain or an end comes along, they hand over to the methods for
good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from upipe.errors import FrameError
from upipe.memq._ring import READY_TRUE, Ready
from upipe.runtime.worker import Worker

YIELD_EVERY = 1024
"""Emits or gets in a row that never waited, after which one gives the event loop a turn."""
SHORT_CUTS = ("emit", "emit_sync", "get_sync")
"""Attributes that `short_cuts` may set."""


async def later(value: Any) -> Any:
    """Ready, after the other tasks had their turn."""
    await asyncio.sleep(0)
    return value


def short_cuts(me: Any, worker: Worker, emit: Any, emit_sync: Any, get_sync: Any) -> dict[str, Any]:
    """What to put before the three methods (given as functions of the processor `me`), by name."""
    found = {}
    only = worker.outputs.only
    if only is not None:
        found = {"emit": _emitter(me, worker, only.send, emit), "emit_sync": _emitter(me, worker, only.send, emit_sync)}
    if len(worker.inputs.rings) == 1:
        found["get_sync"] = _getter(me, worker, get_sync)
    return found


def _emitter(me: Any, worker: Worker, send: Callable[..., bool], slow: Callable[..., Any]) -> Callable[..., Any]:
    turns = YIELD_EVERY

    def emit(value: Any, dtype: int | None = None, **options: Any) -> Any:
        nonlocal turns
        if options or not worker.direct or not send(value, -1 if dtype is None else dtype):
            return slow(me, value, dtype, **options)
        turns -= 1
        if turns:
            return READY_TRUE
        turns = YIELD_EVERY
        return later(True)

    return emit


def _getter(me: Any, worker: Worker, slow: Callable[..., Any]) -> Callable[..., Any]:
    inputs, (ring,) = worker.inputs, worker.inputs.rings
    receive, turns = ring.receive, YIELD_EVERY

    def get_sync(timeout: float | None = None) -> Any:
        nonlocal turns
        if not worker.direct or not inputs.rings:
            return slow(me, timeout)
        inputs.last = ring
        try:
            found = receive()
        except FrameError as error:
            worker.unreadable(error)
            return slow(me, timeout)
        if not found or not found[0]:
            return slow(me, timeout)
        if ring.last_execution:
            worker.took()
        turns -= 1
        if turns:
            return Ready(found[1])
        turns = YIELD_EVERY
        return later(found[1])

    return get_sync
