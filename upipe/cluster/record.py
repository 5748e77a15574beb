"""The record of a pipe: all that another agent needs to go on with it, and how many must have it. Pure.

It is replicated to the members it names, and counts once a quorum of them has it. An epoch belongs to one coordinator:
who wants to take over asks a quorum to promise the next one, and who promised refuses all that is lower. Any two
quorums have a member in common, so there is one coordinator per epoch, and it knows of everything that ever counted.

Quorum: more than half of the members; of an even number exactly half is enough when the decider is among them (the
agent that the pipe was submitted to). So of two nodes the decider goes on alone and the other one does not: it cannot
tell a dead decider from a cut cable, and two that both go on would run everything twice. A cluster of one needs nobody.
When the members change, the record counts once it has a quorum of the old and one of the new.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from upipe.cluster.lanes import Layout
from upipe.cluster.placement import Placement, Seat
from upipe.graph.spec import PipeSpec

MOST_MEMBERS = 7
"""Agents that keep the record of a pipe. More survive more deaths at a time, and each change waits for more of them."""
RUNNING, DRAINING = "running", "draining"
ENDED = ("completed", "failed", "stopped")


class Books(msgspec.Struct, frozen=True):
    """Frames of a queue, or of several."""

    emitted: int = 0
    finished: int = 0
    dead: int = 0
    dropped: int = 0

    def __add__(self, other: Books) -> Books:
        return Books(
            self.emitted + other.emitted,
            self.finished + other.finished,
            self.dead + other.dead,
            self.dropped + other.dropped,
        )


class Record(msgspec.Struct, frozen=True):
    """A pipe on a cluster."""

    id: str
    """Of this run of the pipe, unique in the cluster."""
    spec: PipeSpec
    epoch: int
    revision: int
    """Rises with each change, through all epochs."""
    coordinator: str
    members: tuple[str, ...]
    """Agents that keep this record, in order."""
    decider: str
    layout: Layout
    before: tuple[str, ...] = ()
    """The members of the record before, when they were others."""
    wanted: Placement = Placement()
    """Where its workers shall run. Those that run elsewhere now leave, and begin there."""
    ended: tuple[Seat, ...] = ()
    """Workers whose code has returned: they are not run again."""
    ends: tuple[str, ...] = ()
    """Streams whose holds are closed."""
    evicted: dict[str, int] = {}
    """Nodes that were lost and may still run something, with the revision since when; they get nothing before they said
    that they have obeyed a stop of that revision or a later one."""
    state: str = RUNNING
    """running, draining, completed, failed or stopped."""
    reasons: tuple[str, ...] = ()
    books: dict[str, Books] = {}
    """By stream, of queues that are gone."""

    @property
    def fence(self) -> tuple[int, int]:
        """(epoch, revision): of two records the higher one is right."""
        return (self.epoch, self.revision)

    def counts(self, having: Iterable[str]) -> bool:
        """Whether it is enough that these agents have it (or promised)."""
        have = set(having)
        sets = [self.members, self.before] if self.before else [self.members]
        return all(quorum(members, have, self.decider) for members in sets)


def quorum(members: tuple[str, ...], have: set[str], decider: str) -> bool:
    """See above. The decider breaks ties only where it is a member; without it the lowest id does."""
    count, breaker = len(have & set(members)), decider if decider in members else min(members)
    return 2 * count > len(members) or (2 * count == len(members) and breaker in have)
