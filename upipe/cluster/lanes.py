"""Lanes: the queues of a pipe that lies on several nodes, and how they follow its workers. Pure.

    edge a -> b, a on nodes 1 2, b on nodes 2 3:

        lane   home -> reader        home: where a's workers write; the queue that counts (its positions, its end)
        r1      1 -> 2                reader: where b's workers read; another node than home has a copy (the sink copy),
        r2      1 -> 3                and a mirror keeps it equal
        r3      2 -> 2                "" is nowhere: frames wait at home
        r4      2 -> 3

What happens to them, always with nothing lost and nothing read twice by the living:

    no worker of b is left on 3     reader 3 becomes another node of b: what b has not finished is mirrored there (r2,
                                    r4); where there is a lane with the same ends it is closed, and only drains
    node 3 is lost                  the same: home frees nothing before 3 has finished it
    node 1 is lost                  its sink copy is all there is: home becomes the reader (r1 -> 2 -> 2), closed
    both ends are lost              the lane is gone; upstream nodes send again what 1 had not finished
    closed and empty                it is removed, unless its reader would be left without a queue of the edge
    nobody writes (a is seated      a reader without any queue gets one of its own, closed and empty: a worker that has
    nowhere just now)               no input sees the end of its stream, and would never be run again

End of stream: every home queue has a producer more than its workers, the HOLD. It is closed for all lanes of an edge
at once, when every worker before it has ended and every lane is empty. Until then no reader sees the end, whoever
moves. That costs a round of reports at the very end; in return the end needs no order between nodes.
Rejected: the end of each lane for itself. A reader that saw it would be gone when a lost sibling's frames come to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from upipe.cluster.placement import Placement
from upipe.graph.plan import ANY, PIPE, REPLIES, RESULTS
from upipe.graph.spec import PipeSpec

_SHORT = 12


class Stream(msgspec.Struct, frozen=True):
    """What flows from one processor to another (or from or to the pipe), over however many lanes."""

    name: str
    """in0-a, e0-a-b, results or replies; the queues of one host have these names."""
    source: str
    """Processor; PIPE, or ANY for results and replies."""
    target: str
    """Processor, or PIPE."""
    keyed: bool = False


class Lane(msgspec.Struct, frozen=True):
    """One queue of a stream."""

    name: str
    """Unique in the pipe, also over time."""
    stream: str
    home: str
    reader: str
    partition: int = -1
    """Index of the worker that alone reads it (keyed edges); -1: all on the reader's node."""
    open: bool = True
    """Producers write into it. False: it drains."""
    pair: int = 0
    """Number of this pair of copies, for the epoch of its mirror: higher whenever it gets another reader, since that
    one begins with a fresh copy."""
    mended: int = 0
    """Fresh pairs in a row that it got because its mirror broke at the same place (mending.py)."""
    broken_at: int = 0
    """Position up to which the copy had come then."""


class Layout(msgspec.Struct, frozen=True):
    """A pipe on its nodes: all that keepers need is derived from it and the spec."""

    client: str
    """Node of the process that submitted it; "" when it does not stay."""
    placement: Placement
    lanes: tuple[Lane, ...] = ()
    made: int = 0
    """Lanes and pairs made so far: the next one's number."""

    def of(self, stream: str) -> tuple[Lane, ...]:
        """The lanes of a stream."""
        return tuple(lane for lane in self.lanes if lane.stream == stream)

    def nodes(self) -> tuple[str, ...]:
        """All nodes with a worker or a queue, the client too."""
        ends = {node for lane in self.lanes for node in (lane.home, lane.reader) if node}
        return tuple(sorted({*ends, *self.placement.nodes()}))


def streams(spec: PipeSpec) -> tuple[Stream, ...]:
    """In the order of a plan's queues."""
    fed = [(number, one) for number, one in enumerate(spec.roots()) if one.kind != "source"]
    found = [Stream(f"in{number}-{one.name[:_SHORT]}", PIPE, one.name) for number, one in fed]
    for number, edge in enumerate(spec.edges):
        name = f"e{number}-{edge.source[:_SHORT]}-{edge.target[:_SHORT]}"
        found.append(Stream(name, edge.source, edge.target, edge.keyed))
    return (*found, Stream(RESULTS, ANY, PIPE), Stream(REPLIES, ANY, PIPE))


def lay_out(spec: PipeSpec, placement: Placement, client: str) -> Layout:
    """The lanes of a pipe that starts."""
    return relay(spec, Layout(client, placement), placement)


def relay(spec: PipeSpec, old: Layout, placement: Placement, gone: Iterable[str] = ()) -> Layout:
    """The lanes after workers moved to `placement` and the nodes `gone` were lost.

    A worker that moves from a living node has ended there, and what it finished is told to the homes.
    """
    lost = frozenset(gone)
    client = "" if old.client in lost else old.client
    made = old.made
    lanes: list[Lane] = []
    for stream in streams(spec):
        left = [after for lane in old.of(stream.name) if (after := _survivor(lane, lost)) is not None]
        writers, readers = _ends(spec, stream, placement, client)
        now = [_retarget(lane, readers, left) for lane in left]
        now = list(_closed(now, writers))
        for home, partition, reader in _wanted(stream, writers, readers, now):
            now.append(Lane(f"{stream.name}-r{made}", stream.name, home, reader, partition, pair=made))
            made += 1
        for partition, reader in _bare(stream, readers, now):
            now.append(Lane(f"{stream.name}-r{made}", stream.name, reader, reader, partition, open=False, pair=made))
            made += 1
        readers_before = {lane.name: lane.reader for lane in old.of(stream.name)}
        for lane in now:
            if lane.reader != readers_before.get(lane.name, lane.reader):
                lane, made = msgspec.structs.replace(lane, pair=made, mended=0, broken_at=0), made + 1
            lanes.append(lane)
    return Layout(client, placement, tuple(lanes), made)


def prune(layout: Layout, empty: Iterable[str]) -> Layout:
    """Without the closed lanes among `empty` (names) whose readers keep another queue of the stream."""
    done = set(empty)
    kept = {(one.stream, one.reader, one.partition) for one in layout.lanes if one.open}
    left = tuple(
        lane
        for lane in layout.lanes
        if lane.open or lane.name not in done or (lane.stream, lane.reader, lane.partition) not in kept
    )
    return msgspec.structs.replace(layout, lanes=left)


# ------------------------------------------------------------------ ends


Nodes = tuple[str, ...]


def _ends(spec: PipeSpec, stream: Stream, placement: Placement, client: str) -> tuple[Nodes, dict[int, Nodes]]:
    """The nodes that write a stream, and those that read it by partition (-1: not partitioned)."""
    here: Nodes = (client,) if client else ()
    writers: Nodes
    if stream.source == PIPE:
        writers = here
    elif stream.name == RESULTS:
        writers = tuple(sorted({node for one in spec.ends() for node in placement.nodes(one.name)}))
    else:
        writers = placement.nodes() if stream.name == REPLIES else placement.nodes(stream.source)
    if stream.target == PIPE:
        return writers, {-1: here}
    if not stream.keyed:
        return writers, {-1: placement.nodes(stream.target)}
    row = placement.seats.get(stream.target, ())
    workers = next(one.workers for one in spec.processors if one.name == stream.target)
    seats = [*row, *[""] * workers]
    return writers, {number: (seats[number],) if seats[number] else () for number in range(workers)}


# ------------------------------------------------------------------ old lanes


def _survivor(lane: Lane, lost: frozenset[str]) -> Lane | None:
    if lane.home not in lost:
        return msgspec.structs.replace(lane, reader="") if lane.reader in lost else lane
    if lane.reader in ("", lane.home) or lane.reader in lost:
        return None
    return msgspec.structs.replace(lane, home=lane.reader, open=False)


def _retarget(lane: Lane, readers: dict[int, Nodes], siblings: list[Lane]) -> Lane:
    """Read it where there is somebody to: at home, else where the fewest lanes from here go."""
    able = readers.get(lane.partition, ())
    if lane.reader in able:
        return lane
    if not able:  # nobody reads: frames wait where they are, and a copy elsewhere is not wanted
        return msgspec.structs.replace(lane, reader="")
    busy = Counter(one.reader for one in siblings)
    reader = min(able, key=lambda node: (node != lane.home, busy[node], node))
    return msgspec.structs.replace(lane, reader=reader)


def _closed(lanes: list[Lane], writers: Nodes) -> Iterator[Lane]:
    """Only one open lane between the same ends, and none from where nobody writes."""
    seen: set[tuple[str, str, int]] = set()
    for lane in lanes:
        ends = (lane.home, lane.reader, lane.partition)
        if lane.open and (ends in seen or lane.home not in writers):
            yield msgspec.structs.replace(lane, open=False)
            continue
        seen.update([ends] if lane.open else [])
        yield lane


# ------------------------------------------------------------------ new lanes


def _wanted(
    stream: Stream, writers: Nodes, readers: dict[int, Nodes], lanes: list[Lane]
) -> Iterator[tuple[str, int, str]]:
    """(home, partition, reader) of the lanes that are missing."""
    there = {(one.home, one.partition, one.reader) for one in lanes if one.open}
    for home in writers:
        for partition, able in readers.items():
            for reader in able or ("",):
                if (home, partition, reader) not in there:
                    yield home, partition, reader


def _bare(stream: Stream, readers: dict[int, Nodes], lanes: list[Lane]) -> Iterator[tuple[int, str]]:
    """(partition, reader) of the workers that would have no queue of the stream at all. Not of the pipe, which needs
    none, nor for what only the pipe writes: without its process nothing comes any more."""
    has = {(one.partition, one.reader) for one in lanes}
    for partition, able in readers.items():
        for reader in able if PIPE not in (stream.source, stream.target) else ():
            if (partition, reader) not in has:
                yield partition, reader
