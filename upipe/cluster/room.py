"""The nodes while a pipe is being placed on them: what is taken, who sits where, and why a worker does not fit.

A node that refused a worker of some processor refuses all that follow: a room only fills. Placing relies on that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property

import msgspec

from upipe.cluster.sizes import Sizes
from upipe.graph.plan import SLOTS
from upipe.graph.spec import PipeSpec, ProcessorSpec

MOST_ON_NODE = SLOTS - 32
"""Workers of a pipe on one node: all hold the queue of replies, and mirrors, tools and the keeper need slots too."""
SLACK = 1e-9
"""Sums of fractions of cores may be so far off."""


class Node(msgspec.Struct, frozen=True):
    """A host as placement sees it."""

    id: str
    host: str = ""
    """Its host name; pins may use it."""
    resources: dict[str, float] = {}
    """What it has in all: cpu (cores), memory (bytes), gpu, others."""
    taken: dict[str, float] = {}
    """What other pipes took of it."""
    shm: int = 0
    """Bytes of shared memory that the queues of this pipe may take: what is free, and what they have already."""
    labels: dict[str, str] = {}
    draining: bool = False
    """It gets nothing new, and what it has shall move."""
    unfit: str = ""
    """Why this pipe cannot run there; "" when nothing is known against it."""

    @property
    def named(self) -> str:
        """For messages: the id, and the host in brackets."""
        return f"{self.id} ({self.host})" if self.host else self.id


class Room:
    """Nodes that fill with the workers of one pipe."""

    def __init__(self, spec: PipeSpec, nodes: Iterable[Node], sizes: Sizes, empty: bool = False) -> None:
        self.nodes = {node.id: node for node in nodes}
        self.sizes = sizes
        self.empty = empty
        """What other pipes took does not count."""
        self.specs = {one.name: one for one in spec.processors}
        self.seats: dict[str, dict[str, int]] = {name: {} for name in self.specs}
        """Workers by processor and node."""
        self.free = {there: self._free(node) for there, node in self.nodes.items()}
        """What is left of each node's resources. Never below 0 (but for rounding)."""
        self.shm = {there: node.shm for there, node in self.nodes.items()}
        """Bytes left for queues. Never below 0."""
        self.tenants: dict[str, int] = defaultdict(int)
        """Workers by node."""
        self._fits: dict[str, int] = {}

    def _free(self, node: Node) -> dict[str, float]:
        taken = {} if self.empty else node.taken
        return {name: amount - taken.get(name, 0.0) for name, amount in node.resources.items()}

    @cached_property
    def followers(self) -> dict[str, list[ProcessorSpec]]:
        """For each processor those that must be near it."""
        found: dict[str, list[ProcessorSpec]] = {name: [] for name in self.specs}
        for one in self.specs.values():
            for name in one.place.near:
                found[name].append(one)
        return found

    @cached_property
    def apart(self) -> dict[str, set[str]]:
        """For each processor those it must share no node with, whichever of the two said so."""
        found: dict[str, set[str]] = {name: set(one.place.apart) for name, one in self.specs.items()}
        for name, one in self.specs.items():
            for other in one.place.apart:
                found[other].add(name)
        return found

    # ------------------------------------------------------------------ asking

    def never(self, one: ProcessorSpec, node: Node) -> str:
        """Why `node` takes no worker of `one`, however empty it is; "" when it does."""
        place = one.place
        if place.hosts and not {node.id, node.host} & set(place.hosts):
            return f"is not among its hosts {', '.join(place.hosts)}"
        for label in place.labels:
            key, told, value = label.partition("=")
            if key not in node.labels or (told and node.labels[key] != value):
                has = f"{key}={node.labels[key]}" if key in node.labels else f"no {key}"
                return f"lacks the label {label} (it has {has})"
        for name, amount in one.needs.items():
            if amount > node.resources.get(name, 0.0) + SLACK:
                return f"has {_show(name, node.resources.get(name, 0.0))} in all, {_show(name, amount)} is needed"
        if node.unfit:
            return f"cannot run this pipe: {node.unfit}"
        return "is draining" if node.draining else ""

    def fits(self, one: ProcessorSpec) -> int:
        """On how many nodes `one` can run at all."""
        if one.name not in self._fits:
            self._fits[one.name] = sum(1 for node in self.nodes.values() if not self.never(one, node))
        return self._fits[one.name]

    def refuses(self, one: ProcessorSpec, node: Node) -> str:
        """Why `node` takes no (further) worker of `one` now; "" when it does."""
        why = self.never(one, node)
        if why:
            return why
        for name in one.place.near:
            if node.id not in self.seats[name]:
                return f"has no worker of {name!r}, which it must be near"
        for name in sorted(self.apart[one.name]):
            if node.id in self.seats[name]:
                return f"has a worker of {name!r}, which it must be apart from"
        if self.tenants[node.id] >= MOST_ON_NODE:
            return f"has {self.tenants[node.id]} workers of this pipe, and one node runs {MOST_ON_NODE}"
        free = self.free[node.id]
        for name, amount in one.needs.items():
            if amount > free.get(name, 0.0) + SLACK:
                has, left = _show(name, node.resources.get(name, 0.0)), _show(name, max(0.0, free.get(name, 0.0)))
                return f"has {left} left of {has}, {_show(name, amount)} is needed"
        return self._short_of_memory(one, node)

    def _short_of_memory(self, one: ProcessorSpec, node: Node) -> str:
        for there, more in self.sizes.added(one.name, node.id, self.seats, self.tenants).items():
            if more > self.shm[there]:
                where = "has" if there == node.id else f"is joined to {self.nodes[there].named}, which has"
                return f"{where} {self.shm[there]:,} bytes of shared memory left for queues, {more:,} are needed"
        return ""

    # ------------------------------------------------------------------ filling

    def sit(self, one: ProcessorSpec, there: str) -> None:
        """Take the room of one worker; refuses() said "" before."""
        for other, more in self.sizes.added(one.name, there, self.seats, self.tenants).items():
            self.shm[other] -= more
        self.seats[one.name][there] = self.seats[one.name].get(there, 0) + 1
        self.tenants[there] += 1
        for name, amount in one.needs.items():
            self.free[there][name] = self.free[there].get(name, 0.0) - amount

    # ------------------------------------------------------------------ weighing

    def chat(self, name: str, there: str) -> int:
        """Edges of processor `name` whose other end has a worker on the node."""
        ends = [edge.source for edge in self.sizes.incoming[name]] + [edge.target for edge in self.sizes.outgoing[name]]
        return sum(1 for end in ends if there in self.seats[end])

    def waste(self, one: ProcessorSpec, there: str) -> int:
        """Kinds of scarce things on the node that the processor has no use for."""
        return sum(1 for name in self.nodes[there].resources if name not in ("cpu", "memory") and name not in one.needs)

    def load(self, there: str) -> float:
        """Share of the node's processor time that is taken, 0 to 1."""
        has = self.nodes[there].resources.get("cpu", 0.0)
        return 1.0 - self.free[there].get("cpu", 0.0) / has if has else 1.0


def _show(name: str, amount: float) -> str:
    return f"{int(amount):,} bytes of memory" if name == "memory" else f"{name} {round(amount, 3):g}"
