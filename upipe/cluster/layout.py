"""What one node does for a pipe (NodePlan), and in which order a running one changes (rewire). Pure.

A plan is the whole truth for its node and revision: a keeper that has it needs no other to go on, one that missed some
takes the newest and finds the way itself. Plans of different nodes need no order between them: data has positions, and
no stream ends while its HOLD is open (lanes.py).
"""

from __future__ import annotations

from collections import defaultdict

import msgspec

from upipe.cluster.lanes import Lane, Layout, Stream, streams
from upipe.cluster.sizes import Sizes
from upipe.errors import DeclarationError
from upipe.graph.plan import ANY, PIPE, REPLIES, RESULTS, OutputPlan, Plan, QueuePlan, WorkerPlan, topological_order
from upipe.graph.spec import PipeSpec
from upipe.memq.layout import PRODUCERS

HOLD = PRODUCERS - 1
"""Producer id that keeps the stream of a home queue open (MemQ.never_end); the keeper closes it when told so."""


class QueueHere(msgspec.Struct, frozen=True):
    """A queue, or a copy of one, on a node."""

    plan: QueuePlan
    role: str
    """"home": this is the queue. "sink": the copy that a mirror keeps, its only writer."""
    ends: bool = False
    """The HOLD of a home is closed: nothing more comes when its workers have closed."""
    discard: bool = False
    """Nobody reads it any more: a home drops (and counts) what comes."""
    open: bool = True
    """Producers here write into it. False: it drains. (The queues of workers' outputs are in their plans; the client
    has no worker, and closes its end of those that are not open.)"""


class MirrorPlan(msgspec.Struct, frozen=True):
    """A queue that is kept equal on two nodes."""

    id: str
    """Of this pair of copies: another sink node makes another mirror."""
    queue: str
    source: str
    """Node of the home."""
    sink: str
    """Node of the copy."""
    dialer: str
    """Which of the two opens the connection: a client always does, since nobody reaches it; else the lower id."""
    epoch: int = 1
    """Of this pair of copies, from 1: a higher one has a fresh sink copy."""


class NodePlan(msgspec.Struct, frozen=True):
    """A pipe on one node."""

    pipe: str
    node: str
    epoch: int
    """Of the coordinator that says so; a keeper refuses a lower (epoch, revision)."""
    revision: int
    order: tuple[str, ...]
    """As Plan.order."""
    queues: tuple[QueueHere, ...]
    workers: tuple[WorkerPlan, ...]
    """Global indices: those below the processor's `workers` start at once, the others are room for autoscaling."""
    mirrors: tuple[MirrorPlan, ...]
    leaving: tuple[str, ...] = ()
    """Workers (processor#index) that shall finish what they hold and end, to go on elsewhere."""
    draining: bool = False
    """The pipe takes no more in: what drives itself ends, the client closes its input."""

    @property
    def fence(self) -> tuple[int, int]:
        """(epoch, revision): the higher one is right."""
        return (self.epoch, self.revision)

    @property
    def plan(self) -> Plan:
        """For the supervisor of this node."""
        return Plan(self.pipe, self.order, tuple(queue.plan for queue in self.queues), self.workers)


def cluster_problems(spec: PipeSpec) -> list[str]:
    """What keeps a pipe without `problems` from running on any cluster."""
    counts = {"results": sum(one.most_workers for one in spec.ends())}
    counts["all"] = sum(one.most_workers for one in spec.processors)
    counts.update((one.name, one.most_workers) for one in spec.processors)
    worst = max(counts.values())
    if worst <= HOLD:
        return []
    text = f"up to {worst} workers write into one queue, and a queue tells {HOLD} apart; lower workers= or autoscale="
    return [f"pipe {spec.name!r}: {text}"]


def node_plan(
    spec: PipeSpec,
    layout: Layout,
    node: str,
    fence: tuple[int, int],
    *,
    leaving: tuple[str, ...] = (),
    ends: frozenset[str] = frozenset(),
    discards: frozenset[str] = frozenset(),
    draining: bool = False,
) -> NodePlan:
    """What `node` does.

    Args:
        fence: epoch and revision.
        leaving: workers (on any node) that shall move.
        ends: names of streams whose holds are closed.
        discards: processors that have ended, and read no more.
        draining: see NodePlan.

    Raises:
        DeclarationError: see cluster_problems.
    """
    wrong = cluster_problems(spec)
    if wrong:
        raise DeclarationError(wrong, f"pipe {spec.name!r}")
    parts = _Parts(spec, bool(layout.client))
    here = [lane for lane in layout.lanes if node in (lane.home, lane.reader)]
    queues = tuple(
        QueueHere(
            parts.queue(lane),
            "home" if lane.home == node else "sink",
            lane.stream in ends,
            parts.streams[lane.stream].target in discards,
            lane.open,
        )
        for lane in here
    )
    mirrors = tuple(_mirror(lane, layout.client) for lane in here if lane.reader not in ("", lane.home))
    workers = tuple(
        parts.worker(name, index, node, here)
        for name, row in layout.placement.seats.items()
        for index, seat in enumerate(row)
        if seat == node
    )
    names = {f"{one.processor}#{one.index}" for one in workers}
    going = tuple(one for one in leaving if one in names)
    return NodePlan(spec.name, node, *fence, topological_order(spec), queues, workers, mirrors, going, draining)


def _mirror(lane: Lane, client: str) -> MirrorPlan:
    dialer = client if client in (lane.home, lane.reader) else min(lane.home, lane.reader)
    return MirrorPlan(f"{lane.name}@{lane.reader}", lane.name, lane.home, lane.reader, dialer, lane.pair + 1)


class _Parts:
    """Of a spec: everything by name."""

    def __init__(self, spec: PipeSpec, client: bool) -> None:
        self.spec = spec
        self.results = "block" if client else "drop_oldest"
        """What nobody reads is dropped by the client, who alone knows (runtime/gathered.py): a home that drops would do
        so behind a reader's back."""
        self.sizes = Sizes(spec)
        self.streams = {one.name: one for one in streams(spec)}
        self.edges = {(edge.source, edge.target): edge for edge in spec.edges}
        self.numbers: dict[tuple[str, int], int] = {}
        self.ends: dict[tuple[str, int], int] = {}
        """Producer ids: of every worker in the replies, of those of end processors in the results."""
        last = {one.name for one in spec.ends()}
        for one in spec.processors:
            for index in range(one.most_workers):
                self.numbers[one.name, index] = len(self.numbers)
                if one.name in last:
                    self.ends[one.name, index] = len(self.ends)

    def queue(self, lane: Lane) -> QueuePlan:
        stream = self.streams[lane.stream]
        capacity, policy, producers = self._ring(stream)
        return QueuePlan(lane.name, stream.source, stream.target, lane.partition, capacity, policy, producers)

    def _ring(self, stream: Stream) -> tuple[int, str, tuple[int, ...]]:
        if stream.source == PIPE:
            return self.sizes.inputs[stream.target], "block", (0,)
        if stream.name == RESULTS:
            return self.sizes.to_pipe, self.results, tuple(self.ends.values())
        if stream.source == ANY:
            return self.sizes.to_pipe, "block", tuple(self.numbers.values())
        edge = self.edges[stream.source, stream.target]
        workers = next(one.most_workers for one in self.spec.processors if one.name == stream.source)
        return self.spec.edge_bytes(edge), edge.policy, tuple(range(workers))

    def worker(self, name: str, index: int, node: str, here: list[Lane]) -> WorkerPlan:
        inputs = tuple(
            lane.name
            for lane in here
            if lane.reader == node and self.streams[lane.stream].target == name and lane.partition in (-1, index)
        )
        writes: dict[str, list[Lane]] = defaultdict(list)
        for lane in here:
            if lane.home == node and lane.open:
                writes[lane.stream].append(lane)
        outputs = [
            _output(stream, writes[stream.name], node, index)
            for stream in self.streams.values()
            if stream.source == name
        ]
        if not outputs:
            outputs = [_output(self.streams[RESULTS], writes[RESULTS], node, self.ends[name, index])]
        replies = writes[REPLIES][0].name
        return WorkerPlan(name, index, inputs, tuple(outputs), replies, self.numbers[name, index])


def _output(stream: Stream, lanes: list[Lane], node: str, producer: int) -> OutputPlan:
    if stream.keyed:
        names = tuple(lane.name for lane in sorted(lanes, key=lambda one: one.partition))
        return OutputPlan(stream.target, names, producer, True)
    local = [lane.name for lane in lanes if lane.reader == node]
    far = [lane.name for lane in lanes if lane.reader != node]
    return OutputPlan(stream.target, (*local, *far), producer, False, len(local))


# ------------------------------------------------------------------ changing

What = str
STEPS: tuple[What, ...] = (
    "promote",  # a sink copy becomes the home: its mirror ends first, by whoever keeps it
    "make",  # a queue; a home gets its HOLD
    "mirror",  # a mirror begins, or another epoch of it with a fresh copy
    "rewire",  # a worker that stays gets the queues it shall use
    "discard",  # nobody reads it any more
    "start",  # a worker
    "leave",  # a worker finishes what it holds and ends
    "kill",  # a worker that is not in the plan any more
    "unmirror",  # a mirror ends
    "end",  # the HOLD of a home is closed
    "drop",  # a queue that nobody uses any more
)
"""Kinds of steps in their order: what is used is there before who uses it, and goes after who used it; "rewire" comes
before "end", since a stream that ends must have been left by all who will not write into it any more."""


class Step(msgspec.Struct, frozen=True):
    """One thing to do on a node."""

    what: What
    name: str
    """Of the queue or mirror, or processor#index."""


def rewire(old: NodePlan | None, new: NodePlan | None) -> tuple[Step, ...]:
    """The steps from one plan of a node to another, in order. None: the pipe is not on the node.

    Each can be repeated without harm, so that a keeper that died in the middle begins anew.
    """
    found: list[Step] = []
    _queue_steps(found, _queues(old), _queues(new))
    before, after = _mirrors(old), _mirrors(new)
    found += [Step("mirror", name) for name, mirror in after.items() if mirror != before.get(name)]
    found += [Step("unmirror", name) for name in before if name not in after]
    _worker_steps(found, old, new)
    rank = {what: number for number, what in enumerate(STEPS)}
    return tuple(sorted(found, key=lambda step: rank[step.what]))


def _queue_steps(found: list[Step], before: dict[str, QueueHere], after: dict[str, QueueHere]) -> None:
    for name, queue in after.items():
        was = before.get(name)
        if was is None:
            found.append(Step("make", name))
        elif (was.role, queue.role) == ("sink", "home"):
            found.append(Step("promote", name))
        home = queue.role == "home"
        if home and queue.ends and (was is None or not was.ends or was.role == "sink"):
            found.append(Step("end", name))
        if home and queue.discard and (was is None or not was.discard or was.role == "sink"):
            found.append(Step("discard", name))
    found += [Step("drop", name) for name in before if name not in after]


def _worker_steps(found: list[Step], old: NodePlan | None, new: NodePlan | None) -> None:
    before, after = _workers(old), _workers(new)
    gone = old.leaving if old else ()
    for name, worker in after.items():
        if name not in before:
            found.append(Step("start", name))
        elif worker != before[name]:
            found.append(Step("rewire", name))
    if new is not None:
        found += [Step("leave", name) for name in new.leaving if name not in gone]
    found += [Step("kill", name) for name in before if name not in after]


def _queues(plan: NodePlan | None) -> dict[str, QueueHere]:
    return {queue.plan.name: queue for queue in plan.queues} if plan else {}


def _mirrors(plan: NodePlan | None) -> dict[str, MirrorPlan]:
    return {mirror.id: mirror for mirror in plan.mirrors} if plan else {}


def _workers(plan: NodePlan | None) -> dict[str, WorkerPlan]:
    return {f"{one.processor}#{one.index}": one for one in plan.workers} if plan else {}
