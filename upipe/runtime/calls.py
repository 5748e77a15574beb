"""Which pipe.call() a task of a worker works for."""

from __future__ import annotations

from contextvars import ContextVar


class Call:
    """The pipe.call() that the frame in hand belongs to. Lives in the context of the task that asked for the frame, so
    that what another task of this worker emits meanwhile answers its own call and not this one.

    The caller counts the frames on their way for its call, to know when all were filtered out. One frame in, one out
    changes nothing; more are announced before they are emitted, so that the count never falls to 0 too early.
    """

    __slots__ = ("announced", "answered", "children", "execution", "yielding")

    def __init__(self) -> None:
        self.execution = 0
        """Execution id, 0 = the frame is of no call."""
        self.answered = False
        """A result of it went to the caller."""
        self.children = 0
        """Frames emitted for it to other processors."""
        self.announced = 1
        """Frames the caller counts for it: at first the one in hand."""
        self.yielding = False
        """The frame in hand may give more than one, so it counts until it is through."""


CURRENT: ContextVar[Call | None] = ContextVar("upipe_call", default=None)
"""Of the running task; tasks that it makes inherit it."""
