"""What a node offers to a pipe: from what it tells of itself, and from the records of the other pipes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from upipe.cluster.messages import NodeInfo
from upipe.cluster.options import HOST_LABEL
from upipe.cluster.placement import Seat
from upipe.cluster.planning import plans
from upipe.cluster.record import ENDED, Record
from upipe.cluster.room import SLACK, Node
from upipe.graph.spec import PipeSpec


def node_of(info: NodeInfo, taken: dict[str, float], queues: int) -> Node:
    """A node as placement sees it.

    Args:
        taken: by other pipes.
        queues: bytes of shared memory that the pipe's own queues have there.
    """
    has = info.resources
    resources = {**has.custom, "cpu": has.cpu, "memory": float(has.memory), "gpu": float(len(has.gpus))}
    host = info.labels.get(HOST_LABEL, "")
    return Node(
        info.node_id, host, resources, taken, info.free_shared_memory + queues, info.labels, info.draining
    )


def taken(records: Iterable[Record], node: str) -> dict[str, float]:
    """What the workers of these pipes take of a node; those that move count where they are and where they go."""
    found: dict[str, float] = {}
    for record in records:
        if record.state in ENDED:
            continue
        for one in record.spec.processors:
            rows = [placement.seats.get(one.name, ()) for placement in (record.layout.placement, record.wanted)]
            seats = {index for row in rows for index, seat in enumerate(row) if seat == node}
            count = sum(1 for index in seats if (one.name, index) not in record.ended)
            for name, amount in one.needs.items() if count else ():
                found[name] = found.get(name, 0.0) + count * amount
    return found


def promised(info: NodeInfo, records: Iterable[Record], but: str) -> dict[str, float]:
    """What other pipes than `but` take of a node: by their records where they lie here, and by what the node tells. The
    larger counts: a record knows first, and the node knows of pipes whose records lie elsewhere."""
    known = {record.id: record for record in records}
    ended = {pipe for pipe, record in known.items() if record.state in ENDED}
    found: dict[str, float] = {}
    for pipe in sorted({*known, *info.promised} - ended - {but}):
        mine = taken([known[pipe]], info.node_id) if pipe in known else {}
        told = info.promised.get(pipe, {})
        for name in {*mine, *told}:
            found[name] = found.get(name, 0.0) + max(mine.get(name, 0.0), told.get(name, 0.0))
    return found


def needs(spec: PipeSpec, seats: Iterable[Seat]) -> dict[str, float]:
    """What these workers of a pipe may use."""
    known = {one.name: one for one in spec.processors}
    found: dict[str, float] = {}
    for processor, _ in seats:
        for name, amount in known[processor].needs.items():
            found[name] = found.get(name, 0.0) + amount
    return found


def beyond(
    has: Mapping[str, float], others: Mapping[str, float], spec: PipeSpec, seats: Iterable[Seat],
    agreed: Collection[Seat],
) -> tuple[tuple[Seat, ...], str]:  # fmt: skip
    """The workers that a node has no room for, and why; ((), "") when it has it for all. The node itself decides: what
    coordinators know of each other is never of this moment.

    Args:
        has: the resources of the node.
        others: what it promised to other pipes.
        seats: that it is to run, in the order in which they get room.
        agreed: of them, those that run here already: they stay.
    """
    wanted = list(seats)
    left = {name: amount - others.get(name, 0.0) for name, amount in has.items()}
    for name, amount in needs(spec, [seat for seat in wanted if seat in agreed]).items():
        left[name] = left.get(name, 0.0) - amount
    refused, why = [], ""
    for seat in wanted:
        if seat in agreed:
            continue
        more = needs(spec, [seat])
        short = [name for name, amount in more.items() if amount > left.get(name, 0.0) + SLACK]
        if short:
            refused.append(seat)
            free = max(0.0, left.get(short[0], 0.0))
            why = why or (
                f"worker {seat[0]}#{seat[1]} needs {more[short[0]]:g} of {short[0]}, and {free:g} of "
                f"{has.get(short[0], 0.0):g} is left"
            )
            continue
        for name, amount in more.items():
            left[name] -= amount
    return tuple(refused), why


def queue_bytes(record: Record, node: str) -> int:
    """Bytes of the rings of a pipe on a node."""
    plan = plans(record).get(node)
    return sum(queue.plan.capacity for queue in plan.queues) if plan is not None else 0
