"""The gate: when a host may tell that it is done with a frame. Pure: samples in, allowed positions out.

A sink copy is finished at its tail once workers of this host finished the frames; but what came of them may still lie
on this host only, and go with it. So a tail is told only when everything that came of it has left the host. What came
of a frame was emitted before the frame was finished, so it lies before the heads that are read *after* the tail was:

    tail of the sink copy = P          read first
    heads of the queues that its readers feed = H1, H2 ...
    P is allowed when each of them is settled up to its H

An output whose sink copy is on another node is settled up to what that node has received. A queue that is read here is
settled
up to a tail of its own for which the same holds, and so on down the pipe: `order` names queues before those that they
feed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from upipe.errors import DeclarationError

MOST_MARKS = 32
"""Marks per queue that wait. More give finer steps to the source when the way out is long; the last is replaced beyond
it."""


@dataclass(frozen=True)
class Passage:
    """One queue of the pipe on this host."""

    name: str
    feeds: tuple[str, ...] = ()
    """Queues that the readers of this one put into. Empty: nothing comes of its frames, or nobody here reads it."""
    leaves: bool = False
    """A source copy: its frames are read on another node."""


@dataclass(frozen=True)
class Tail:
    """Where a queue is finished, with the books up to there (Ring.settled)."""

    position: int
    dropped: int = 0
    dead: int = 0


@dataclass(frozen=True)
class Mark:
    """A tail, and what must be settled before it is."""

    tail: Tail
    heads: dict[str, int]


@dataclass
class _Queue:
    passage: Passage
    settled: int = 0
    """Everything before it, and all that came of it, is finished or has left."""
    marks: deque[Mark] = field(default_factory=deque)
    """Oldest first; positions and heads only grow."""
    allowed: Tail = Tail(0)


class Gate:
    """Decides for one pipe on one host.

    Args:
        passages: every queue, each before those that it feeds.

    Raises:
        DeclarationError: names twice, unknown, or in another order.
    """

    def __init__(self, passages: tuple[Passage, ...]) -> None:
        self._queues: dict[str, _Queue] = {}
        self.rewire(passages)

    def rewire(self, passages: tuple[Passage, ...]) -> None:
        """The queues are these from now on. What waits for a queue that is gone waits no more; the others keep their
        marks."""
        _check(passages)
        known = self._queues
        self._queues = {}
        for one in passages:
            queue = known.get(one.name, _Queue(one))
            if queue.passage.leaves and not one.leaves:  # what left went to a node that does not read it any more
                queue.settled = queue.allowed.position
            queue.passage = one
            self._queues[one.name] = queue

    def forget(self, names: Iterable[str]) -> None:
        """What was seen of these queues is over: another copy of them comes, with books of its own."""
        for name in names:
            if name in self._queues:
                self._queues[name] = _Queue(self._queues[name].passage)

    def observe(self, tails: dict[str, Tail], heads: dict[str, int], received: dict[str, int]) -> dict[str, Tail]:
        """Look once. Returns the tails that may be told from now on, for queues where that is news and which do not
        leave.

        Args:
            tails: of the queues that are read here. All of them are read before the first of `heads`.
            heads: of every queue that another one feeds.
            received: of the queues that leave: what the next node has. Missing: nothing is known, so nothing is
                settled.
        """
        news: dict[str, Tail] = {}
        for queue in reversed(self._queues.values()):
            name = queue.passage.name
            if queue.passage.leaves:
                queue.settled = received.get(name, 0)
                continue
            if name in tails:
                self._mark(queue, tails[name], heads)
            while queue.marks and self._is_settled(queue.marks[0]):
                queue.allowed = news[name] = queue.marks.popleft().tail
                queue.settled = queue.allowed.position
        return news

    @property
    def waits(self) -> bool:
        """Whether a tail waits for something to leave: then look again when a sink received more or a queue here was
        finished."""
        return any(queue.marks for queue in self._queues.values())

    def _mark(self, queue: _Queue, tail: Tail, heads: dict[str, int]) -> None:
        newest = queue.marks[-1].tail if queue.marks else queue.allowed
        if tail.position <= newest.position:
            return
        if len(queue.marks) >= MOST_MARKS:
            queue.marks.pop()  # the new one says all that it said
        queue.marks.append(Mark(tail, {name: heads[name] for name in queue.passage.feeds}))

    def _is_settled(self, mark: Mark) -> bool:
        return all(name not in self._queues or self._queues[name].settled >= head for name, head in mark.heads.items())


def _check(passages: tuple[Passage, ...]) -> None:
    problems = []
    after = [one.name for one in passages]
    problems += [f"queue {name!r} is named twice" for name in sorted({name for name in after if after.count(name) > 1})]
    for number, one in enumerate(passages):
        for name in one.feeds:
            if name not in after:
                problems.append(f"queue {one.name!r} feeds {name!r}, which is not named; name every queue here")
            elif after.index(name) <= number:
                problems.append(f"queue {one.name!r} feeds {name!r}, named before it; name queues down the pipe")
        if one.leaves and one.feeds:
            problems.append(f"queue {one.name!r} is read on another node, so nothing here feeds from it")
    if problems:
        raise DeclarationError(problems, "gate")
