"""The queues of one pipe on one node, in the keeper's session: homes, and copies that mirrors keep (lanes.py).

Owner: the keeper. After kill -9 of it the next process of the user sweeps the session; who is attached (workers, the
agent) keeps the memory until it lets go.
"""

from __future__ import annotations

from collections.abc import Callable

from upipe.cluster import copies
from upipe.cluster.keeping import SPOOL
from upipe.cluster.layout import NodePlan, QueueHere
from upipe.graph.spec import PipeSpec
from upipe.memq.queue import MemQ
from upipe.runtime import provision


class NodeQueues:
    """Makes, changes and drops them.

    Args:
        spec: of the pipe.
        queues: filled and emptied here, by name.
        needed: whether a worker is about to attach a queue of this name in the session.
        dropped: told before a queue goes.
    """

    def __init__(
        self,
        spec: PipeSpec,
        queues: dict[str, MemQ],
        needed: Callable[[str], bool],
        dropped: Callable[[str, MemQ], None],
    ) -> None:
        self.spec = spec
        self.queues = queues
        self.labels: dict[str, str] = {}
        """Names in the session."""
        self.dropping: list[MemQ] = []
        """Not in the plan any more, and still needed."""
        self._needed = needed
        self._dropped = dropped

    def label(self, name: str) -> str:
        """Name in the session of a queue."""
        return self.labels[name]

    def make(self, here: QueueHere, epoch: int) -> None:
        """A home with its HOLD, or a copy for the mirror of that epoch. Made before: nothing to do.

        Raises:
            OutOfSharedMemory.
        """
        plan = here.plan
        if plan.name in self.queues:
            return
        label = f"{SPOOL}.{plan.name}" + (f".{epoch}" if here.role == "sink" else "")
        allowed = provision.pickle_allowed(self.spec, plan)
        policy = plan.policy
        made = MemQ(plan.capacity, policy=policy, name=label, supervised=True, allow_pickle=allowed)  # type: ignore[arg-type]
        copies.begin(made, here.role)
        self.queues[plan.name], self.labels[plan.name] = made, label

    def promote(self, name: str) -> None:
        """The copy is the home from now on."""
        copies.promote(self.queues[name])

    def discard(self, name: str) -> None:
        """Nobody reads it any more: what comes is dropped and counted."""
        copies.discard(self.queues[name])

    def end(self, name: str) -> None:
        """Nothing comes any more once its workers have closed."""
        copies.end(self.queues[name])

    def drop(self, name: str) -> None:
        """Remove it, as soon as nobody is about to attach it. Dropped before: nothing to do."""
        ring = self.queues.pop(name, None)
        if ring is not None:
            self._dropped(name, ring)
            del self.labels[name]
            self.dropping.append(ring)
        self.drop_unneeded()

    def drop_unneeded(self) -> None:
        """After something changed at the workers."""
        kept = []
        for ring in self.dropping:
            if self._needed(ring.label.rpartition("/")[2]):
                kept.append(ring)
                continue
            ring.recover_dead()
            ring.close()
            ring.unlink()
        self.dropping = kept

    def release(self) -> None:
        """All of those that wait: nobody will attach them."""
        for ring in self.dropping:
            ring.unlink()
        self.dropping = []


def epochs(plan: NodePlan | None) -> dict[str, int]:
    """The epoch of the mirror of each copy on this node."""
    if plan is None:
        return {}
    copies = {queue.plan.name for queue in plan.queues if queue.role == "sink"}
    return {one.queue: one.epoch for one in plan.mirrors if one.sink == plan.node and one.queue in copies}


def renewed(old: NodePlan | None, new: NodePlan) -> list[str]:
    """Copies that stay by name, and begin anew: their reader went and came back between these two plans."""
    before = epochs(old)
    return [name for name, epoch in epochs(new).items() if before.get(name, epoch) != epoch]
