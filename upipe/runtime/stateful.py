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
from typing import TYPE_CHECKING, Any

from upipe.errors import EndOfStream
from upipe.runtime.spool import Checkpoint, checkpoint_path, load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from upipe.runtime.worker import Worker


class Stateful:
    """One instance of the user's class in its worker."""

    def __init__(self, worker: Worker, instance: Any) -> None:
        self.worker = worker
        self.instance = instance
        self.saving = hasattr(instance, "checkpoint") and hasattr(instance, "restore")
        self.path = checkpoint_path(
            Path(worker.assignment.spool), worker.assignment.processor, worker.assignment.index
        )
        self.covered: list[tuple[Any, int]] = []
        """Frames in the state and in no checkpoint yet, as (ring, position); all of them are held."""

    def run(self) -> None:
        """setup or restore, the stream, teardown."""
        asynchronous = any(inspect.iscoroutinefunction(getattr(self.instance, name, None)) for name in ("setup", "process", "teardown"))
        if asynchronous or inspect.isasyncgenfunction(self.instance.process):
            from upipe.runtime.worker import run_async

            run_async(self._run_async())
            return
        self._call("setup")
        self._restore()
        try:
            self._loop()
        finally:
            self._call("teardown")

    def _loop(self) -> None:
        from upipe.runtime.worker import emit_result

        worker = self.worker
        while True:
            try:
                value = self._receive()
                result = self.instance.process(value)
                emit_result(worker, result)
                worker.answered()
            except EndOfStream:
                return
            except Exception as error:
                worker.failed(error)
                continue
            self._cover()

    async def _run_async(self) -> None:
        from upipe.runtime.worker import _emit_async

        await self._acall("setup")
        self._restore()
        worker = self.worker
        try:
            while True:
                try:
                    value = await self._areceive()
                    await _emit_async(worker, self.instance.process(value))
                    worker.answered()
                except EndOfStream:
                    return
                except Exception as error:
                    worker.failed(error)
                    continue
                self._cover()
        finally:
            await self._acall("teardown")

    def _receive(self) -> Any:
        """Next value; before sleeping, what is done is saved, so that an idle worker holds nothing back."""
        if self.covered:
            found = self.worker.try_receive()
            if found[0]:
                return found[1]
            self._save()
        return self.worker.receive()

    async def _areceive(self) -> Any:
        if self.covered:
            found = self.worker.try_receive()
            if found[0]:
                return found[1]
            self._save()
        return await self.worker.areceive()

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
        saved = load_checkpoint(self.path)
        if saved is not None:
            self.instance.restore(pickle.loads(saved.state))  # our own file, 0600

    def _cover(self) -> None:
        """The frame in hand is in the state now."""
        if not self.saving:
            return
        inputs = self.worker.inputs
        ring, inputs.held = inputs.held, None
        if ring is None:
            return
        position = ring.detach_held()
        if position is not None:
            self.covered.append((ring, position))
        held = sum(1 for _ in self.covered)
        crowded = ring.counters()["head"] - ring.counters()["tail"] > ring.capacity // 4 if held % 16 == 0 else False
        if held >= self.worker.assignment.checkpoint_every or crowded:
            self._save()

    def _save(self) -> None:
        """Write the state with the frames it contains, then finish those."""
        if not self.saving or not self.covered:
            return
        covered: dict[str, list[int]] = {}
        for ring, position in self.covered:
            covered.setdefault(ring.label.rpartition("/")[2], []).append(position)
        save_checkpoint(self.path, Checkpoint(pickle.dumps(self.instance.checkpoint()), covered))
        for ring, position in self.covered:
            ring.end(position)
        self.covered = []
