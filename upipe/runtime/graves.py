"""After a worker's death: its frames go back to their queues, and those it died of too often to the dead letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from upipe.errors import ProcessorError, QueueError, QueueStuck
from upipe.frame import DataFrame
from upipe.graph.plan import WorkerPlan
from upipe.graph.spec import PipeSpec
from upipe.memq.queue import MemQ
from upipe.runtime import spool
from upipe.runtime.spool import Checkpoint, DeadLetter

WORKER_DIED = "WorkerDied"
"""error_kind of a dead letter whose worker died each time."""


class Graves:
    """Recovers the queues of one pipe."""

    def __init__(
        self, spec: PipeSpec, labelled: Callable[[str], str], directory: Path, queues: dict[str, MemQ]
    ) -> None:
        self.labelled = labelled
        """Name in the session of a queue."""
        self.directory = directory
        self.queues = queues
        self.sources: dict[str, str] = {}
        """Processor that emits into each queue; "" is the pipe."""
        self.bytes = 0
        """Of all dead letters, those of workers too."""
        self._most = {one.name: one.max_deliveries for one in spec.processors}

    def recover(self, worker: WorkerPlan, ends: list[str], pid: int, start: int) -> list[tuple[int, ProcessorError]]:
        """Give back what a dead worker held; without its pid or start time (0: not known, so that it cannot be told
        from another process of that number) what any dead process holds on its queues. Idempotent.

        Returns the calls whose frames were buried, as (execution, error).

        Raises:
            QueueStuck: a live process holds a lock of a queue.
        """
        saved = spool.load_checkpoint(spool.checkpoint_path(self.directory, worker.processor, worker.index))
        covered = (saved or Checkpoint(b"", {})).covered
        positions = {name: covered.get(self.labelled(name), ()) for name in worker.inputs}
        most, lost = self._most[worker.processor], []
        for name in worker.inputs:
            for position in self._recover(self.queues[name], pid, start, most, positions[name]):
                lost.append(self._bury(self.queues[name], name, position, worker))
        for name in ends:
            self._recover(self.queues[name], pid, start)
        return lost

    def _recover(self, ring: MemQ, pid: int, start: int, most: int = 0, covered: Sequence[int] = ()) -> list[int]:
        if pid and start:
            return list(ring.recover(pid, start, most, covered))
        found: list[int] = []
        for peer in ring.peers():
            try:
                found += ring.recover(*peer, most, covered)
            except QueueStuck:
                raise
            except QueueError:
                continue  # it lives
        return found

    def _bury(self, ring: MemQ, name: str, position: int, worker: WorkerPlan) -> tuple[int, ProcessorError]:
        raw = ring.raw(position)
        frame = DataFrame.unpack(raw, lazy=True)
        source = self.sources[name]
        text = f"its worker died while processing it, {frame.deliveries} times"
        who = f"{worker.processor}#{worker.index}"
        letter = DeadLetter(
            worker.processor,
            who,
            source,
            self.labelled(name),
            position,
            frame.deliveries,
            WORKER_DIED,
            text,
            "",
            raw,
        )
        self.bytes += spool.bury(self.directory, letter)
        ring.end(position, True)
        return frame.execution, ProcessorError(worker.processor, who, WORKER_DIED, text)
