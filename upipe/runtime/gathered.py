"""Several queues read as one: what the nodes of a pipe send to the process that submitted it (results, replies).

It looks like the one queue that a pipe on one host has: aget(), last_execution, last_flags, set_policy(). Queues come
and go under whoever waits, since the pipe's workers move.

The queues are sink copies, which no drop policy reaches. So who keeps them drops what nobody reads: while the policy is
DROP_OLDEST a task sleeps until frames come, and then makes room (Ring.shed), which is counted as any drop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from upipe.errors import EndOfStream
from upipe.memq.queue import MemQ
from upipe.memq.wakeup import AsyncWait
from upipe.runtime.waits import CONSUMER

SPARE = 2
"""While nobody reads, this part of a queue is kept free for what comes: a frame larger than that can wait for a
reader. The rest holds the newest."""
_NOTHING = object()


class Gathered:
    """All queues of one stream to the pipe. For the tasks of one event loop; begins without a queue."""

    def __init__(self) -> None:
        self._rings: dict[str, MemQ] = {}
        """Those that have not ended, by name."""
        self._ended: set[str] = set()
        self._over = False
        self._changes = 0
        """Rises when other queues are read: who waits begins anew."""
        self._turn = 0
        self._last: MemQ | None = None
        self._last_name = ""
        self._waits: set[AsyncWait] = set()
        self._shedding: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ the queues

    def rewire(self, rings: Mapping[str, MemQ]) -> None:
        """Read these from now on, by name. One that is not among them is left: it is finished, or nothing is in it."""
        self._ended &= set(rings)
        self._rings = {name: ring for name, ring in rings.items() if name not in self._ended}
        self._changed()

    def finish(self) -> None:
        """No other queue comes: what is there is read, then the stream has ended."""
        self._over = True
        self._changed()

    def _changed(self) -> None:
        self._changes += 1
        for waiting in self._waits:
            waiting.look()

    # ------------------------------------------------------------------ reading

    @property
    def last_execution(self) -> int:
        """Execution id of the frame that was read last."""
        return self._last.last_execution if self._last is not None else 0

    @property
    def last_flags(self) -> int:
        """Flags of the frame that was read last."""
        return self._last.last_flags if self._last is not None else 0

    @property
    def name(self) -> str:
        """Of the queue from which was read last, "" before the first frame."""
        return self._last_name

    async def aget(self) -> Any:
        """The next value, fair over the queues. Cancelled, it has taken nothing.

        Raises:
            EndOfStream: every queue has ended. FrameError: this frame cannot be read; the next one may.
        """
        while True:
            value = self._try()
            if value is not _NOTHING:
                return value
            waiting = self._wait()
            known = self._changes
            try:
                while known == self._changes and await waiting.sleep(None):
                    value = self._try()
                    if value is not _NOTHING:
                        return value
            finally:
                self._leave(waiting)

    def _try(self) -> Any:
        for _ in range(len(self._rings)):
            self._turn = (self._turn + 1) % len(self._rings)
            name = list(self._rings)[self._turn]
            ring = self._last = self._rings[name]
            self._last_name = name
            try:
                value = ring.get_or(_NOTHING)
            except EndOfStream:
                del self._rings[name]
                self._ended.add(name)
                self._changed()
                continue
            if value is not _NOTHING:
                return value
        if not self._rings and (self._over or self._ended):
            raise EndOfStream("every node has sent all that it had")
        return _NOTHING

    def _wait(self) -> AsyncWait:
        waiting = AsyncWait(tuple(self._rings.values()), CONSUMER)
        self._waits.add(waiting)
        return waiting

    def _leave(self, waiting: AsyncWait) -> None:
        self._waits.discard(waiting)
        waiting.leave()

    # ------------------------------------------------------------------ while nobody reads

    def set_policy(self, policy: int) -> None:
        """0: lossless, the pipe waits for its reader. 1: the newest are kept."""
        if policy and self._shedding is None:
            self._shedding = asyncio.get_running_loop().create_task(self._shed(), name="upipe unread results")
        elif not policy and self._shedding is not None:
            self.close()

    def close(self) -> None:
        """Drop nothing any more. Idempotent."""
        task, self._shedding = self._shedding, None
        if task is not None:
            task.cancel()

    async def _shed(self) -> None:
        while not self._over:
            waiting, known = self._wait(), self._changes
            try:
                while known == self._changes and await waiting.sleep(None):
                    for ring in self._rings.values():
                        if ring.room < ring.capacity // SPARE:
                            ring.shed(ring.capacity // SPARE)
            finally:
                self._leave(waiting)


__all__ = ["Gathered"]
