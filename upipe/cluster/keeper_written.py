"""How far each source came, over queues that it does not write any more: resume=True goes on behind that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from upipe.graph.plan import WorkerPlan
from upipe.memq.queue import MemQ

Writer = tuple[str, int]


class Written:
    """Counts for the workers of a node, within the life of its keeper.

    Args:
        queues: of the node, by name.
    """

    def __init__(self, queues: Mapping[str, MemQ]) -> None:
        self._queues = queues
        self._outputs: defaultdict[Writer, dict[str, tuple[str, int]]] = defaultdict(dict)
        """Queues that a worker wrote or writes and that are there: (target, producer id)."""
        self._past: defaultdict[Writer, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        """Frames in queues that are gone, by target."""

    def note(self, worker: WorkerPlan) -> None:
        """It writes into the queues of its plan from now on."""
        known = self._outputs[worker.processor, worker.index]
        for output in worker.outputs:
            known.update((name, (output.target, output.producer)) for name in output.queues)

    def dropped(self, name: str, ring: MemQ) -> None:
        """A queue is about to go."""
        for writer, outputs in self._outputs.items():
            if name in outputs:
                target, producer = outputs.pop(name)
                self._past[writer][target] += ring.emitted(producer)

    def before(self, worker: WorkerPlan) -> dict[str, int]:
        """Frames that it emitted to each target, but for those in the queues of its plan."""
        writer = (worker.processor, worker.index)
        found = defaultdict(int, self._past.get(writer, {}))
        mine = {name for output in worker.outputs for name in output.queues}
        for name, (target, producer) in self._outputs.get(writer, {}).items():
            if name not in mine:
                found[target] += self._queues[name].emitted(producer)
        return dict(found)
