"""Stateful processors: a class with process(), and optionally setup, teardown, checkpoint and restore.

With checkpoint() and restore() a frame is finished only when a checkpoint that contains it is on file. After a death
the supervisor finishes the frames that the newest checkpoint covers and gives back the others: the state and the
frames delivered again fit together exactly, whatever instruction the death fell on. What is emitted for frames that are
delivered again is emitted again (at least once).
"""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

from upipe.errors import EndOfStream
from upipe.runtime.mapped import is_async, map_async, map_sync, run_async
from upipe.runtime.messages import Raised
from upipe.runtime.spool import Checkpoint, checkpoint_path, load_checkpoint, save_checkpoint
from upipe.runtime.worker import Worker
from upipe.runtime.worker_state import describe

LOOK_EVERY = 16
"""Frames between two looks at the room in the queues."""
SHARE = 4
"""A checkpoint is made early when a quarter of a ring may wait for it."""


class Stateful:
    """One instance of the user's class in its worker."""

    def __init__(self, worker: Worker, instance: Any) -> None:
        self.worker = worker
        self.instance = instance
        self.saving = hasattr(instance, "checkpoint") and hasattr(instance, "restore")
        if self.saving and (is_async(instance.checkpoint) or is_async(instance.restore)):
            raise TypeError(
                f"checkpoint and restore of class {type(instance).__qualname__} must be plain methods, not async"
            )
        self.path = checkpoint_path(
            Path(worker.assignment.spool), worker.assignment.processor, worker.assignment.index
        )
        self.covered: list[tuple[Any, int]] = []
        """Frames in the state and in no checkpoint yet, as (ring, position); all of them are held."""
        self._first: dict[Any, int] = {}
        """Per ring, the oldest position of those. Its room ends there, however much other workers finished behind."""

    def run(self) -> None:
        """setup or restore, the stream, teardown."""
        if any(is_async(getattr(self.instance, name, None)) for name in ("setup", "process", "teardown")):
            run_async(self._run_async())
            return
        self._call("setup")
        self._restore()
        try:
            map_sync(self.worker, self.instance.process, self._cover)
        except EndOfStream:
            self._save()
        finally:
            try:
                self._call("teardown")
            except Exception as error:
                self._unfinished(error)
                raise

    async def _run_async(self) -> None:
        await self._acall("setup")
        self._restore()
        try:
            await map_async(self.worker, self.instance.process, self._cover)
        except EndOfStream:
            self._save()
        finally:
            try:
                await self._acall("teardown")
            except Exception as error:
                self._unfinished(error)
                raise

    def _unfinished(self, error: Exception) -> None:
        """teardown raised: what it was to bring home is in this instance alone; another life would end well without."""
        told = describe(error)
        self.worker.say(Raised("run", told.kind, told.message, told.traceback, fatal=True))

    def _call(self, name: str) -> None:
        method = getattr(self.instance, name, None)
        if method is not None:
            method()

    async def _acall(self, name: str) -> None:
        method = getattr(self.instance, name, None)
        if method is not None:
            result = method()
            if inspect.isawaitable(result):
                await result

    def _restore(self) -> None:
        if not self.saving:
            return
        self.worker.inputs.covering = True
        self.worker.inputs.before_sleep = self._save
        saved = load_checkpoint(self.path)
        if saved is not None:
            self.instance.restore(pickle.loads(saved.state))  # our own file, 0600

    def _cover(self) -> None:
        """The frame in hand is in the state now."""
        ring = self.worker.inputs.held
        if not self.saving or ring is None:
            return
        position = ring.detach_held()
        if position is not None:
            self.covered.append((ring, position))
            self._first[ring] = min(position, self._first.get(ring, position))
            if self._due(ring, position):
                self._save()

    def _due(self, ring: Any, position: int) -> bool:
        """Enough frames; or what is held takes so much room of an input that its producers may soon wait for us. Every
        input counts, not only the one that still has frames for us. (Starved of all, Inputs saves before it sleeps.)"""
        held = len(self.covered)
        if held >= self.worker.assignment.checkpoint_every or position - self._first[ring] > ring.capacity // SHARE:
            return True
        return held % LOOK_EVERY == 0 and any(_crowded(one) for one in self._first)

    def _save(self) -> None:
        """Write the state with the frames it contains, then finish those."""
        if not self.covered:
            return
        covered: dict[str, list[int]] = {}
        for ring, position in self.covered:
            covered.setdefault(ring.label.rpartition("/")[2], []).append(position)
        save_checkpoint(self.path, Checkpoint(pickle.dumps(self.instance.checkpoint()), covered))
        for ring, position in self.covered:
            ring.end(position)
        self.covered = []
        self._first = {}


def _crowded(ring: Any) -> bool:
    """Whether what is taken and not free again takes much room. Frames that still wait for a worker do not count: a
    backlog is no reason to write checkpoints more often."""
    counters = ring.counters()
    return bool(counters["next"] - counters["tail"] > ring.capacity // SHARE)
