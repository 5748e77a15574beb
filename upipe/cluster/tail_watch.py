"""Being told when consumers finish frames of a queue: often enough while many do, and without a look while none do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from upipe.memq.queue import MemQ

STEP = 16
"""While frames are finished one after the other, this process is woken when another 1/STEP of the ring is, or after
GLANCE: who finishes them must not ring for each."""
GLANCE = 0.001
"""Seconds."""


class TailWatch:
    """Calls back in the running event loop when the tail of a queue moved, and once at the start.

    Args:
        ring: a handle that nothing else waits for room on; close the watch before it.
        moved: called with Ring.settled(): (tail, dropped, dead).
    """

    def __init__(self, ring: MemQ, moved: Callable[[tuple[int, int, int]], None]) -> None:
        self._ring = ring
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._seen = -1
        self._glance: asyncio.TimerHandle | None = None
        self._bell = ring.bell(1)
        self._loop.add_reader(self._bell.fd, self._rung)
        self._again = self._loop.call_soon(self._look)

    def close(self) -> None:
        """Watch no more. Idempotent."""
        for timer in (self._glance, self._again):
            if timer is not None:
                timer.cancel()
        if self._bell.fd >= 0:
            self._loop.remove_reader(self._bell.fd)

    def _rung(self) -> None:
        self._bell.drain()
        self._look()

    def _late(self) -> None:
        self._glance = None
        self._look()

    def _look(self) -> None:
        """Tell what is new; then sleep until a step more is finished, or anything when nothing was lately."""
        settled = self._ring.settled()
        step = 0
        if settled[0] != self._seen:
            self._seen = settled[0]
            self._moved(settled)
            if self._ring.is_closed:
                return
            step = self._ring.capacity // STEP
            if self._glance is None:
                self._glance = self._loop.call_later(GLANCE, self._late)
        self._ring.arm_tail(self._seen + step if step else 0)
        if self._ring.settled()[0] >= self._seen + max(step, 1):  # it moved before the bell was armed
            self._again = self._loop.call_soon(self._look)
