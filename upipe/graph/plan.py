"""The plan: which queues and workers a pipe is made of on one host.

    pipe --in0-a--> a#0 --e0-a-b--> b#0 b#1 --results--> pipe
                    a#0 b#0 b#1 -----------------replies--> pipe

Pure and deterministic: the same spec gives the same plan, name for name, so that two processes that plan on their own
agree. Everything is counted for the most workers a processor may have (autoscale included): a queue's producers are
fixed when it is made, and those that never start are closed by the supervisor.
"""

from __future__ import annotations

from collections import defaultdict, deque

import msgspec

from upipe.errors import DeclarationError
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.graph.validate import cycles, problems
from upipe.settings import MIB

PIPE = ""
"""The pipe itself, as the source or target of a queue."""
ANY = "*"
"""Several processors, as the source of a queue: all ends (results) or all processors (replies)."""
RESULTS = "results"
"""Name of the queue that takes what end processors emit."""
REPLIES = "replies"
"""Name of the queue that takes the answers to pipe.call()."""
DRIVER_INPUT_BYTES = MIB
"""Ring from the pipe to a root that drives itself or is a script: most never read it, so it stays small."""
SLOTS = 512
"""Processes that can hold one queue open (memq.layout.SLOTS; a test compares them)."""
_SHORT = 12


class QueuePlan(msgspec.Struct, frozen=True):
    """One queue."""

    name: str
    """Unique in the plan, at most 40 characters of [A-Za-z0-9_-]."""
    source: str
    """Processor that emits; PIPE or ANY."""
    target: str
    """Processor that receives; PIPE."""
    partition: int
    """Index of the target's worker that alone reads it (keyed edges); -1 when all of them do."""
    capacity: int
    """Ring bytes asked for."""
    policy: str
    """What happens when it is full; `results` is lossless from when somebody reads it."""
    producers: tuple[int, ...]
    """Logical producer ids: the stream ends when each of them has closed."""

    @property
    def edge(self) -> tuple[str, str]:
        """(source, target)."""
        return (self.source, self.target)


class OutputPlan(msgspec.Struct, frozen=True):
    """One output of a worker."""

    target: str
    """Processor at the other end, or PIPE."""
    queues: tuple[str, ...]
    """One queue, or one per partition in the order of the target's workers."""
    producer: int
    """The worker's producer id, the same in each of these queues."""
    keyed: bool = False
    """Whether the key of a frame chooses the queue."""
    local: int = 0
    """Of several queues without keys (a cluster): the first so many are read on this host and are taken first."""

    @property
    def choice(self) -> str:
        """How a frame's queue is chosen: "only" one, by its "key", or "free": a local one that has room, else the one
        with the most room."""
        return "key" if self.keyed else "only" if len(self.queues) == 1 else "free"


class WorkerPlan(msgspec.Struct, frozen=True):
    """One worker slot."""

    processor: str
    index: int
    """0 .. most_workers - 1; the first `workers` of them start with the pipe."""
    inputs: tuple[str, ...]
    """Queues to read, in the order the edges were declared."""
    outputs: tuple[OutputPlan, ...]
    """Every emit goes to each of these; in the order the edges were declared."""
    replies: str
    """Queue for the answers to calls."""
    reply_producer: int
    """Producer id in that queue."""


Edges = dict[tuple[str, str], tuple[QueuePlan, ...]]
"""(source, target) -> the queues of that edge: one, or one per worker of the target when it is keyed."""


class Plan(msgspec.Struct, frozen=True):
    """A pipe on one host."""

    pipe: str
    order: tuple[str, ...]
    """Processors, each after all that feed it: the order to drain in; start in the reverse."""
    queues: tuple[QueuePlan, ...]
    """Inputs from the pipe, then edges as declared, then results and replies."""
    workers: tuple[WorkerPlan, ...]
    """By processor as declared, then by index."""

    @property
    def capacity(self) -> int:
        """Ring bytes of all queues together, before any rounding."""
        return sum(queue.capacity for queue in self.queues)


def plan(spec: PipeSpec) -> Plan:
    """Lay `spec` out on one host; DeclarationError lists everything in the way, also what only one host cannot hold."""
    wrong = problems(spec)
    wrong += [] if wrong else host_problems(spec)
    if wrong:
        raise DeclarationError(wrong, f"pipe {spec.name!r}")
    inputs = {root.name: _input(number, root, spec) for number, root in _fed_roots(spec)}
    edges = _edges(spec)
    queues = [*inputs.values(), *(queue for ring in edges.values() for queue in ring)]
    queues += _to_pipe(spec, max((queue.capacity for queue in queues), default=0))
    return Plan(spec.name, topological_order(spec), tuple(queues), _workers(spec, inputs, edges))


def host_problems(spec: PipeSpec) -> list[str]:
    """What keeps a pipe without `problems` from running on one host."""
    total = sum(one.most_workers for one in spec.processors)
    most = SLOTS - 1  # every worker and the pipe itself hold the queue of replies
    if total <= most:
        return []
    text = f"up to {total} workers in all (autoscale included), and one host runs {most}; lower workers= or autoscale="
    return [f"pipe {spec.name!r}: {text}"]


def topological_order(spec: PipeSpec) -> tuple[str, ...]:
    """Processors, each after all that feed it, by declaration where that leaves a choice.

    Raises:
        DeclarationError: a cycle, as a path.
    """
    after: dict[str, list[str]] = {one.name: [] for one in spec.processors}
    missing = dict.fromkeys(after, 0)
    for edge in spec.edges:
        after[edge.source].append(edge.target)
        missing[edge.target] += 1
    ready = deque(name for name, count in missing.items() if count == 0)
    order: list[str] = []
    while ready:
        order.append(ready.popleft())
        for name in after[order[-1]]:
            missing[name] -= 1
            if missing[name] == 0:
                ready.append(name)
    if len(order) < len(after):
        raise DeclarationError([f"cycle {' -> '.join(path)}" for path in cycles(spec)], f"pipe {spec.name!r}")
    return tuple(order)


# ------------------------------------------------------------------------------------------------------------ queues


def _fed_roots(spec: PipeSpec) -> list[tuple[int, ProcessorSpec]]:
    return [(number, one) for number, one in enumerate(spec.roots()) if one.kind != "source"]


def _input(number: int, root: ProcessorSpec, spec: PipeSpec) -> QueuePlan:
    capacity = spec.settings.edge_bytes if root.kind in ("map", "class") else DRIVER_INPUT_BYTES
    return QueuePlan(f"in{number}-{root.name[:_SHORT]}", PIPE, root.name, -1, capacity, "block", (0,))


def _edges(spec: PipeSpec) -> Edges:
    by_name = {one.name: one for one in spec.processors}
    found: Edges = {}
    for number, edge in enumerate(spec.edges):
        name = f"e{number}-{edge.source[:_SHORT]}-{edge.target[:_SHORT]}"
        found[edge.source, edge.target] = _partitions(name, edge, spec, by_name)
    return found


def _partitions(name: str, edge: EdgeSpec, spec: PipeSpec, by_name: dict[str, ProcessorSpec]) -> tuple[QueuePlan, ...]:
    producers = tuple(range(by_name[edge.source].most_workers))
    capacity = spec.edge_bytes(edge)

    def one(name: str, partition: int) -> QueuePlan:
        return QueuePlan(name, edge.source, edge.target, partition, capacity, edge.policy, producers)

    if not edge.keyed:
        return (one(name, -1),)
    return tuple(one(f"{name}-p{index}", index) for index in range(by_name[edge.target].workers))


def _to_pipe(spec: PipeSpec, largest: int) -> tuple[QueuePlan, QueuePlan]:
    """Results and replies: as large as the largest edge, so that whatever came in can go out."""
    capacity = max(spec.settings.sink_bytes, largest)
    ends = tuple(range(sum(one.most_workers for one in spec.ends())))
    everyone = tuple(range(sum(one.most_workers for one in spec.processors)))
    return (
        QueuePlan(RESULTS, ANY, PIPE, -1, capacity, "drop_oldest", ends),
        QueuePlan(REPLIES, ANY, PIPE, -1, capacity, "block", everyone),
    )


# ----------------------------------------------------------------------------------------------------------- workers


def _workers(spec: PipeSpec, inputs: dict[str, QueuePlan], edges: Edges) -> tuple[WorkerPlan, ...]:
    incoming: dict[str, list[EdgeSpec]] = defaultdict(list)
    outgoing: dict[str, list[EdgeSpec]] = defaultdict(list)
    for edge in spec.edges:
        incoming[edge.target].append(edge)
        outgoing[edge.source].append(edge)
    workers: list[WorkerPlan] = []
    ended = 0  # workers of end processors so far: the next free producer id of the results
    for one in spec.processors:
        for index in range(one.most_workers):
            reads = [inputs[one.name].name] if one.name in inputs else []
            reads += [_read(edge, edges, index) for edge in incoming[one.name]]
            outputs = tuple(_output(edge, edges, index) for edge in outgoing[one.name])
            if not outputs:
                outputs = (OutputPlan(PIPE, (RESULTS,), ended),)
                ended += 1
            workers.append(WorkerPlan(one.name, index, tuple(reads), outputs, REPLIES, len(workers)))
    return tuple(workers)


def _read(edge: EdgeSpec, edges: Edges, index: int) -> str:
    """The queue of `edge` that worker `index` of the target reads."""
    return edges[edge.source, edge.target][index if edge.keyed else 0].name


def _output(edge: EdgeSpec, edges: Edges, producer: int) -> OutputPlan:
    names = tuple(queue.name for queue in edges[edge.source, edge.target])
    return OutputPlan(edge.target, names, producer, edge.keyed)
