"""Which queues of a node feed which, for the gate (gate.py), from what the node does for the pipe (NodePlan). Pure.

Read here are the sink copies, and the homes that a worker here has among its inputs. Their readers, the workers of the
target processor, put into every home here that comes from that processor, closed ones too: what they put there before
may still lie there. So the answers of all processors count, and the results of those that have no other output.

What is not counted, since nobody will ever read it, and waiting for it would stop the pipe: a home for the pipe itself
that has no mirror (the client is gone; results drop the oldest then), and a home that discards.
A home whose reader is nowhere yet (its worker is being placed) is counted, and neither read nor left: what leads to it
is told when somebody reads it. The source copies before it fill up meanwhile, so nothing is lost with this node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upipe.cluster.gate import Passage
from upipe.cluster.layout import MirrorPlan, NodePlan, QueueHere
from upipe.graph.plan import ANY, PIPE, RESULTS


@dataclass(frozen=True)
class Passages:
    """What a gate is made of, and what is looked at for it."""

    all: tuple[Passage, ...]
    """Each before those that it feeds. Empty: no sink copy is here, so there is nobody to tell."""
    sinks: tuple[str, ...]
    """Queues whose sink copies are read here."""
    read: tuple[str, ...]
    """Homes that are read here, and fed by a sink copy over however many others."""
    fed: tuple[str, ...]
    """Homes whose heads count."""


NONE = Passages((), (), (), ())


def passages(plan: NodePlan) -> Passages:
    """The passages of a node."""
    sinks = [queue for queue in plan.queues if queue.role == "sink"]
    if not sinks:
        return NONE
    homes = [queue for queue in plan.queues if queue.role == "home" and _counts(queue, plan.mirrors, plan.node)]
    by_name = {queue.plan.name: queue for queue in (*sinks, *homes)}
    leaves = {mirror.queue for mirror in plan.mirrors if mirror.source == plan.node}
    inputs = {name for worker in plan.workers for name in worker.inputs}
    ends = {worker.processor for worker in plan.workers for output in worker.outputs if output.target == PIPE}
    feeds: dict[str, tuple[str, ...]] = {}
    for name, queue in by_name.items():
        reader = queue.plan.target
        is_read = queue.role == "sink" or (name in inputs and name not in leaves)
        feeds[name] = tuple(one.plan.name for one in homes if _writes(reader, one, ends)) if is_read else ()
    reached = _reached(feeds, [queue.plan.name for queue in sinks])
    rank = {name: number for number, name in enumerate(plan.order)}
    order = sorted(reached, key=lambda name: (rank.get(by_name[name].plan.target, len(rank)), name))
    return Passages(
        tuple(Passage(name, feeds[name], name in leaves) for name in order),
        tuple(queue.plan.name for queue in sinks),
        tuple(name for name in order if name in inputs and by_name[name].role == "home" and name not in leaves),
        tuple(name for name in order if by_name[name].role == "home"),
    )


def _counts(queue: QueueHere, mirrors: Iterable[MirrorPlan], node: str) -> bool:
    read = queue.plan.target != PIPE or any(one.queue == queue.plan.name and one.source == node for one in mirrors)
    return read and not queue.discard


def _writes(reader: str, home: QueueHere, ends: set[str]) -> bool:
    """Whether workers of processor `reader` put into this home, or did."""
    if reader == PIPE or home.plan.source != ANY:
        return reader == home.plan.source != PIPE
    return reader in ends or not home.plan.name.startswith(RESULTS)


def _reached(feeds: dict[str, tuple[str, ...]], first: list[str]) -> set[str]:
    found: set[str] = set()
    left = list(first)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += feeds[name]
    return found
