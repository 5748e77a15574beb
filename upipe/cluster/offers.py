"""What a node offers to a pipe: from what it tells of itself, and from the records of the other pipes. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from upipe.cluster.messages import NodeInfo
from upipe.cluster.options import HOST_LABEL
from upipe.cluster.planning import plans
from upipe.cluster.record import ENDED, Record
from upipe.cluster.room import Node


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


def queue_bytes(record: Record, node: str) -> int:
    """Bytes of the rings of a pipe on a node."""
    plan = plans(record).get(node)
    return sum(queue.plan.capacity for queue in plan.queues) if plan is not None else 0
