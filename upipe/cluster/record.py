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
from typing import Self

import msgspec

from upipe.cluster.lanes import Layout
from upipe.cluster.placement import Placement, Seat
from upipe.graph.spec import PipeSpec
from upipe.lifecycle import PIPE_ENDED

MOST_MEMBERS = 7
"""Agents that keep the record of a pipe. More survive more deaths at a time, and each change waits for more of them."""
RUNNING, DRAINING = "running", "draining"
ENDED = PIPE_ENDED


class _Sums(msgspec.Struct, frozen=True):
    """Counts that add up field by field."""

    def __add__(self, other: Self) -> Self:
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return type(self)(*(mine + theirs for mine, theirs in pairs))


class Books(_Sums, frozen=True):
    """Frames of a queue, or of several."""

    emitted: int = 0
    finished: int = 0
    dead: int = 0
    dropped: int = 0
    aborted: int = 0
    """Padding that writers who died left; not among the emitted."""
    redelivered: int = 0
    bytes: int = 0
    """Payload bytes emitted."""


class Crew(_Sums, frozen=True):
    """The workers of a processor on a node, or on several, over all their lives."""

    workers: int = 0
    """That run now."""
    restarts: int = 0
    cpu_seconds: float = 0.0
    """Of those that ended."""
    letters: int = 0
    """Dead letters that lie there."""


class Shipment(msgspec.Struct, frozen=True):
    """What the nodes of a pipe need beside its spec: contents by SHA-256, held by the node it was submitted to."""

    code: dict[str, str] = {}
    """Pickled Bundle by processor."""
    scripts: dict[str, str] = {}
    """Entry script by processor."""
    modules: tuple[str, ...] = ()
    """Zip archives of the submitter's own modules, put before sys.path in this order."""
    packages: dict[str, str] = {}
    """Installed packages that the code imports, with their versions there; a node that lacks one says so."""
    python: str = ""
    """Python of the submitter, such as "3.11": pickled functions run on the same one only."""

    @property
    def contents(self) -> tuple[str, ...]:
        """All hashes, each once."""
        return tuple(sorted({*self.code.values(), *self.scripts.values(), *self.modules}))


NO_SHIPMENT = Shipment()


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
    unfit: dict[str, str] = {}
    """Nodes that cannot run it, as they said, with the reason: they get nothing any more."""
    state: str = RUNNING
    """running, draining, completed, failed or stopped."""
    reasons: tuple[str, ...] = ()
    books: dict[str, Books] = {}
    """By stream, of queues that are gone; of all of them once the pipe ended."""
    crews: dict[str, Crew] = {}
    """By processor, of nodes that are gone; of all of them once the pipe ended."""
    shipment: Shipment = NO_SHIPMENT
    job: str = ""
    """NODE/JOB, the submitted script that began it; "": no script did."""

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
