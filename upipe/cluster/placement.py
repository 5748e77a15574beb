"""Placement: which worker runs on which node. Pure and deterministic.

    place(spec, nodes, current) -> Placement | Unplaceable

What runs stays where it is while that is allowed; what is new goes to the best node that takes it, processors with the
fewest possible nodes first. When a processor finds no room it is put before the others and all is tried again: so a
running worker moves only where another one needs its place, and what fails even as the first one on empty nodes can
never fit. That is a search of bounded length, not a proof: it may miss a packing that only a complete search finds.

Rejected: a score summed over all pairs of worker and node. A choice changes the score of the node it fell on and no
other, so one heap per processor gives the same answer, a hundred times faster with 100 nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import msgspec

from upipe.cluster.room import Node, Room
from upipe.cluster.sizes import Sizes
from upipe.graph.plan import topological_order
from upipe.graph.spec import PipeSpec, ProcessorSpec

TRIES = 12
"""Orders of processors that are tried. More finds room in fuller clusters, and takes longer to say no."""
Seat = tuple[str, int]
"""Processor and worker index."""
Seats = dict[str, list[str]]
"""Node id per worker index, by processor; "" is nowhere."""


class Placement(msgspec.Struct, frozen=True):
    """Where each worker runs."""

    seats: dict[str, tuple[str, ...]] = {}
    """Node id per worker index, by processor; "" is nowhere: a worker that waits for room, or room for autoscaling
    that there is not."""

    def nodes(self, processor: str | None = None) -> tuple[str, ...]:
        """The nodes that have workers (of one processor), in order of their ids."""
        rows = self.seats.values() if processor is None else [self.seats.get(processor, ())]
        return tuple(sorted({node for row in rows for node in row if node}))

    def indices(self, processor: str, node: str) -> tuple[int, ...]:
        """The workers of a processor on a node."""
        return tuple(index for index, seat in enumerate(self.seats.get(processor, ())) if seat == node)

    def without(self, gone: Iterable[str]) -> Placement:
        """The same with the workers of these nodes nowhere."""
        lost = set(gone)
        return Placement({name: tuple("" if one in lost else one for one in row) for name, row in self.seats.items()})

    def moved(self, other: Placement) -> list[Seat]:
        """(processor, index) of the workers that run somewhere in both, and not in the same place."""
        rows = [(name, zip(row, other.seats.get(name, ()), strict=False)) for name, row in self.seats.items()]
        return [(name, index) for name, row in rows for index, (a, b) in enumerate(row) if a and b and a != b]

    def missing(self, spec: PipeSpec, done: Iterable[Seat] = ()) -> list[Seat]:
        """The workers that the pipe asks for and that run nowhere, but for those that are `done`."""
        rows = [(one, self.seats.get(one.name, ())) for one in spec.processors]
        lost = [(one.name, i) for one, row in rows for i in range(one.workers) if not (i < len(row) and row[i])]
        return [seat for seat in lost if seat not in set(done)]


class Unplaceable(msgspec.Struct, frozen=True):
    """A worker finds no node."""

    processor: str
    index: int
    reasons: dict[str, str]
    """Why not, for each node id."""
    never: bool
    """It would not fit either if other pipes left these nodes and all its own workers were placed afresh."""
    partial: Placement
    """What can run meanwhile: all that fits, with what runs where it is."""

    def told(self) -> str:
        """For the user: what, why on each node, and what to do."""
        each = "".join(f"\n  node {node} {why}" for node, why in self.reasons.items()) or "\n  there is no node"
        what = "can never run here" if self.never else "has no room now"
        remedy = "ask for less, change its place, or add a node" if self.never else "it starts when there is room"
        return f"worker {self.processor}#{self.index} {what}:{each}\n{remedy}"


def place(
    spec: PipeSpec, nodes: Iterable[Node], current: Placement | None = None, done: Iterable[Seat] = ()
) -> Placement | Unplaceable:
    """Find a node for every worker of `spec`, which is valid.

    Room for the workers that autoscaling may add (indices from `workers` on) is taken last, where there is any.

    Args:
        nodes: with what other pipes took; what this pipe has there counts as free.
        current: where its workers run now.
        done: workers that have ended: they stay where they are, or are nowhere.
    """
    done = frozenset(done)
    known = [_with_tenants(spec, node, current, done) for node in sorted(nodes, key=lambda node: node.id)]
    sizes = Sizes(spec)
    search = _Search(spec, known, sizes, frozenset(done))
    found = search.run(current or Placement(), False)
    if isinstance(found, Placement):
        return found
    never = not isinstance(search.run(Placement(), True), Placement)
    return msgspec.structs.replace(found, never=never)


def _with_tenants(spec: PipeSpec, node: Node, current: Placement | None, done: frozenset[Seat]) -> Node:
    """What others are said to take never leaves less than runs there now: a node promises nothing twice, so what is
    told of it is of another moment, and no reason to move a worker that runs."""
    held: dict[str, float] = {}
    for one in spec.processors if current is not None and node.taken else ():
        assert current is not None
        count = sum(1 for index in current.indices(one.name, node.id) if (one.name, index) not in done)
        for name, amount in one.needs.items():
            held[name] = held.get(name, 0.0) + count * amount
    most = {name: max(0.0, has - held.get(name, 0.0)) for name, has in node.resources.items()}
    taken = {name: min(amount, most.get(name, amount)) for name, amount in node.taken.items()}
    return node if taken == node.taken else msgspec.structs.replace(node, taken=taken)


class _Search(msgspec.Struct, frozen=True):
    spec: PipeSpec
    nodes: list[Node]
    sizes: Sizes
    done: frozenset[Seat]

    def run(self, current: Placement, empty: bool) -> Placement | Unplaceable:
        """Try with ever more processors before the others; then the same with everything spread."""
        told: Unplaceable | None = None
        for spread in (False, True):
            first: list[str] = []
            for _ in range(TRIES):
                room = Room(self.spec, self.nodes, self.sizes, empty)
                found = _Attempt(self.spec, room, current, self.done, spread).run(first)
                if isinstance(found, Placement):
                    return found
                told = told or found
                if found.processor in first[:1]:
                    break  # as the very first it found no room either
                first.insert(0, found.processor)
        assert told is not None
        return told


class _Attempt:
    """One pass over all processors."""

    def __init__(
        self, spec: PipeSpec, room: Room, current: Placement, done: frozenset[Seat], spread: bool
    ) -> None:
        self.spec = spec
        self.done = done
        self.room = room
        self.current = current
        self.spread = spread
        self.seats: Seats = {one.name: [""] * one.most_workers for one in spec.processors}
        self.failed: Unplaceable | None = None

    def run(self, first: list[str]) -> Placement | Unplaceable:
        order = self._order(first)
        ahead = {name for lead in first for name in self._leaders(lead)}
        front = [one for one in order if one.name in ahead]
        for one in front:
            self._keep(one)
            self._fill(one, range(one.workers))
        rest = [one for one in order if one.name not in ahead]
        for one in rest:
            self._keep(one)
        for one in rest:
            self._fill(one, range(one.workers))
        for one in order:
            self._fill(one, range(one.workers, one.most_workers))
        found = Placement({name: tuple(row) for name, row in self.seats.items()})
        return found if self.failed is None else msgspec.structs.replace(self.failed, partial=found)

    # ------------------------------------------------------------------ order

    def _order(self, first: list[str]) -> list[ProcessorSpec]:
        """`first`, then those with the fewest possible nodes; each after those it must be near."""
        room, specs = self.room, self.room.specs
        fits = {name: room.fits(one) for name, one in specs.items()}
        natural = {name: number for number, name in enumerate(topological_order(self.spec))}
        ranked = sorted(specs, key=lambda name: (fits[name], -len(specs[name].place.near), natural[name]))
        found = dict.fromkeys(name for lead in [*dict.fromkeys(first), *ranked] for name in self._leaders(lead))
        return [specs[name] for name in found]

    def _leaders(self, name: str) -> list[str]:
        """Those `name` must be near, and theirs, before it; then itself."""
        found: list[str] = []
        for other in self.room.specs[name].place.near:
            found += self._leaders(other)
        return [*found, name]

    # ------------------------------------------------------------------ what runs stays

    def _keep(self, one: ProcessorSpec) -> None:
        share, extra = self._fair_share(one)
        for index, there in enumerate(self.current.seats.get(one.name, ())[: one.most_workers]):
            node, here = self.room.nodes.get(there), self.room.seats[one.name].get(there, 0)
            if node is None or self.seats[one.name][index] or here > share or (here == share and not extra):
                continue
            if not self.room.refuses(one, node):
                extra -= here == share
                self.room.sit(one, there)
                self.seats[one.name][index] = there

    def _fair_share(self, one: ProcessorSpec) -> tuple[int, int]:
        """Workers on a node when they are spread evenly, and how many nodes have one more. What is above that is placed
        anew: so a node that came gets its share."""
        if not self._spreads(one):
            return one.most_workers, 0
        fits = self.room.fits(one)
        return divmod(one.workers, fits) if fits else (0, 0)

    def _spreads(self, one: ProcessorSpec) -> bool:
        return self.spread or one.place.how == "spread"

    # ------------------------------------------------------------------ what is new

    def _fill(self, one: ProcessorSpec, indices: range) -> None:
        row = self.seats[one.name]
        wanted = [index for index in indices if not row[index] and (one.name, index) not in self.done]
        if not wanted:
            return
        chosen = self._choose(one, len(wanted))
        if len(chosen) < len(wanted) and indices.start == 0 and self.failed is None:
            nodes = self.room.nodes.values()
            reasons = {node.named: self.room.refuses(one, node) for node in nodes}
            self.failed = Unplaceable(one.name, wanted[len(chosen)], reasons, False, Placement())
        self._hand_out(one, wanted, chosen)

    def _choose(self, one: ProcessorSpec, count: int) -> list[str]:
        """The best node, `count` times over; shorter when the room ends."""
        heap = [(self._rank(one, there), there) for there in self.room.nodes]
        heapq.heapify(heap)
        chosen: list[str] = []
        while heap and len(chosen) < count:
            _, there = heapq.heappop(heap)
            if not self.room.refuses(one, self.room.nodes[there]):
                self.room.sit(one, there)
                chosen.append(there)
                heapq.heappush(heap, (self._rank(one, there), there))
        return chosen

    def _hand_out(self, one: ProcessorSpec, wanted: list[int], chosen: list[str]) -> None:
        """Who ran on one of the chosen nodes goes back there."""
        row, before = self.seats[one.name], self.current.seats.get(one.name, ())
        left = list(chosen)
        for index in wanted:
            if index < len(before) and before[index] in left:
                row[index] = before[index]
                left.remove(before[index])
        for index, there in zip([index for index in wanted if not row[index]], left, strict=False):
            row[index] = there

    def _rank(self, one: ProcessorSpec, there: str) -> tuple[float, ...]:
        """The smaller the better; of equals the one with the lower id."""
        room = self.room
        fails = sum(1 for other in room.followers[one.name] if room.never(other, room.nodes[there]))
        chat, waste, load = -room.chat(one.name, there), room.waste(one, there), room.load(there)
        if self._spreads(one):
            return (room.seats[one.name].get(there, 0), fails, chat, waste, load)
        used = room.tenants[there] > 0
        return (fails, chat, waste, not used, -load if used else load)
