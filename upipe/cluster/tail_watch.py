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
        failed: called when the queue cannot be watched any more; the watch is over then.
        glance: seconds until it looks again while the tail moves.
        step: as STEP; 0: nobody rings while the tail moves, and every `glance` is soon enough.
    """

    def __init__(
        self,
        ring: MemQ,
        moved: Callable[[tuple[int, int, int]], None],
        failed: Callable[[Exception], None],
        glance: float = GLANCE,
        step: int = STEP,
    ) -> None:
        self._ring = ring
        self._moved = moved
        self._failed = failed
        self._pause = glance
        self._step = ring.capacity // step if step else 0
        self._loop = asyncio.get_running_loop()
        self._seen = -1
        self._glance: asyncio.TimerHandle | None = None
        self._bell = ring.bell(1)
        self._loop.add_reader(self._bell.fd, self._rung)
        self._again: asyncio.Handle = self._loop.call_soon(self._look)

    def close(self) -> None:
        """Watch no more. Idempotent."""
        for timer in (self._glance, self._again):
            if timer is not None:
                timer.cancel()
        if self._bell.fd >= 0:
            self._loop.remove_reader(self._bell.fd)

    def _rung(self) -> None:
        self._bell.drain()
        if self._step or self._glance is None:
            self._look()

    def _late(self) -> None:
        self._glance = None
        self._look()

    def _look(self) -> None:
        try:
            self._look_once()
        except Exception as error:
            self.close()
            self._failed(error)

    def _look_once(self) -> None:
        """Tell what is new; then sleep until a step more is finished, or anything when nothing was lately."""
        settled = self._ring.settled()
        moved = settled[0] != self._seen
        if moved:
            self._seen = settled[0]
            self._moved(settled)
            if self._ring.is_closed:
                return
            if self._glance is None:
                self._glance = self._loop.call_later(self._pause, self._late)
            if not self._step:
                return
        step = self._step if moved else 0
        self._ring.arm_tail(self._seen + step if step else 0)
        if self._ring.settled()[0] >= self._seen + max(step, 1):  # it moved before the bell was armed
            self._again = self._loop.call_soon(self._look)
