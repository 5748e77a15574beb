"""What the owner of a pipe's queues does to one of them as its plan says: the same in a keeper (keeper_queues.py) and
in the submitting process (own_queues.py). Each can be repeated without harm."""

from __future__ import annotations

from upipe.cluster.layout import HOLD
from upipe.memq.queue import MemQ
from upipe.runtime.holdings import DISCARD

MIRROR = 0
"""Producer id of the mirror in a sink copy, its only writer."""


def begin(queue: MemQ, role: str) -> None:
    """A fresh queue becomes a home with its HOLD, or the copy that a mirror writes."""
    if role == "home":
        queue.never_end()
    else:
        queue.declare_producer(MIRROR)


def promote(queue: MemQ) -> None:
    """The copy is the home from now on. The HOLD comes before the mirror's end, or the stream would be over."""
    queue.never_end()
    queue.close_producer(MIRROR)


def discard(queue: MemQ) -> None:
    """Nobody reads it any more: what comes is dropped and counted."""
    queue.set_policy(DISCARD)


def end(queue: MemQ) -> None:
    """Nothing comes any more once its workers have closed."""
    queue.close_producer(HOLD)
