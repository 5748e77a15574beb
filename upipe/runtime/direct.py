"""Short cuts before the methods of a connected processor: one queue for each edge out, one in, nothing special so far.

The native ports do what the methods do, less the questions that `Way.direct` answers: three calls and a dozen look-ups
a frame, which were half of its time. As soon as a call, a drain or an end comes along, they hand over to the methods.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from upipe.memq._ring import Emitter, Getter
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
    found: dict[str, Any] = {}
    plain = worker.outputs.plain
    if plain:
        found["emit"] = Emitter(plain, worker.way, partial(emit, me), later, YIELD_EVERY).emit
        found["emit_sync"] = Emitter(plain, worker.way, partial(emit_sync, me), later, YIELD_EVERY).emit_sync
    if len(worker.inputs.rings) == 1:
        ring = worker.inputs.last = worker.inputs.rings[0]
        slow = partial(get_sync, me)
        getter = Getter(ring, worker.way, slow, later, YIELD_EVERY, worker.took, worker.unreadable)
        found["get_sync"] = getter.get_sync
    return found
