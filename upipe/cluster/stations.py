"""The queues of a plan on one node as the ferry has them: handle, mirror, watch, faults, and what is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from upipe.cluster.dealings import QueueState
from upipe.cluster.layout import HOLD, MirrorPlan, QueueHere
from upipe.cluster.mirror import Mirror, MirrorSink, MirrorSource
from upipe.cluster.mirror_end import AGAIN
from upipe.cluster.record import Books
from upipe.cluster.tail_watch import TailWatch
from upipe.memq.queue import MemQ

CALM = 0.02
"""Seconds between two calls of on_change while much changes; after as long a quiet it is called at once."""
BROKEN = 10.0
"""Seconds of one fault after the other, without getting any further in between, until a queue is told as broken: its
mirror gets a fresh pair of copies then, or the pipe fails (mending.py). Longer outlives longer troubles of a node that
pass by themselves, and leaves the pipe standing still for as long."""


@dataclass
class Station:
    """One queue of the plan on this node."""

    here: QueueHere
    label: str
    plan: MirrorPlan | None
    """Its mirror, as the plan says."""
    ring: MemQ
    """Handle of the mirror, which closes it, or of the station."""
    mirror: Mirror | None = None
    watch: TailWatch | None = None
    gated: bool = False
    """Its watch is for the gate."""

    def close(self) -> None:
        """Leave the queue as it is. Idempotent."""
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        if self.mirror is not None:
            self.mirror.close()
        self.ring.close()


@dataclass
class Fault:
    """Of a queue, one after the other."""

    text: str
    epoch: int
    position: int
    """The furthest that its copy had come."""
    first: float
    last: float

    def goes_on(self, epoch: int, position: int, now: float) -> bool:
        """Whether one that comes now is the same trouble: of the same pair, soon after, no further on."""
        return epoch == self.epoch and position <= self.position and now - self.last <= 3 * AGAIN

    def broken(self, now: float) -> bool:
        """Whether it lasts for too long now to wait for its end."""
        return now - self.first >= BROKEN and now - self.last <= 3 * AGAIN


class Calm:
    """Calls back at once, and then at most every CALM seconds."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._more = self._closed = False

    def say(self) -> None:
        """There is news."""
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_soon(self._now)
        else:
            self._more = True

    def _now(self) -> None:
        self._more = False
        self._timer = self._loop.call_later(CALM, self._later)
        self._call()

    def _later(self) -> None:
        self._timer = None
        if self._more:
            self._now()

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()


def come(station: Station | None) -> int:
    """How far the copy of a queue has come, as far as this end knows."""
    mirror = station.mirror if station is not None else None
    if mirror is None:
        return 0
    return mirror.received if isinstance(mirror, MirrorSource) else mirror.machine.head


def told(station: Station) -> int:
    """Position up to which it was told that all is finished, where this end tells that; else as come()."""
    return station.mirror.machine.known if isinstance(station.mirror, MirrorSink) else come(station)


def state(station: Station) -> QueueState:
    """How a queue stands, for the coordinator; faults apart."""
    mirror = station.mirror
    if station.ring.is_closed:
        return QueueState()
    closed, tail, head, emitted, finished, dead, dropped, aborted, redelivered, size = station.ring.standing(HOLD)
    books = Books(emitted, finished, dead, dropped, aborted, redelivered, size)
    if station.here.role == "sink":
        knows = isinstance(mirror, MirrorSink) and mirror.machine.known >= tail
        return QueueState(settled=knows, books=books)
    if station.plan is None:
        return QueueState(tail == head, closed, True, books)
    received = isinstance(mirror, MirrorSource) and mirror.received >= head
    return QueueState(tail == head, closed, received, books)
