"""The pipe's own ends: what it emits into its roots, its calls, and the results that it reads."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from upipe.errors import CallTimeout, EndOfStream, IllegalTransition
from upipe.graph.plan import PIPE, OutputPlan, Plan
from upipe.memq.queue import MemQ
from upipe.runtime.answers import Source
from upipe.runtime.channels import Ended, Output, Outputs

_BLOCK, _DROP_OLDEST = 0, 1


class EndsRunner(Protocol):
    """What these ends ask of whatever runs the pipe."""

    @property
    def plan(self) -> Plan:
        """On a cluster another one whenever queues come and go; then what `watch` was given is called."""

    queues: dict[str, MemQ]
    calls: dict[int, asyncio.Future[Any]]
    ended: asyncio.Future[None] | None

    @property
    def state(self) -> str: ...
    @property
    def results(self) -> Source: ...
    def watch(self, changed: Callable[[], None]) -> None: ...
    def close_input(self) -> None: ...
    async def answer_calls(self) -> None: ...


class Ends:
    """Of one running pipe.

    Args:
        name: of the pipe, for messages.
        runner: started.
    """

    def __init__(self, name: str, runner: EndsRunner) -> None:
        self.name = name
        self.runner = runner
        self._outputs = Outputs(self._edges(), None)
        self._closed = False
        self._emitting = 0
        """Emits under way: the input closes behind the last of them."""
        self._executions = 0
        self._answering: asyncio.Task[None] | None = None
        self._readers = 0
        self._read = False
        self._awaited = 0
        assert runner.ended is not None
        at_end = weakref.WeakMethod(self._at_end)  # a pipe that is forgotten shall end
        runner.ended.add_done_callback(lambda _: (method := at_end()) and method())
        rewired = weakref.WeakMethod(self._rewired)
        runner.watch(lambda: (method := rewired()) and method())

    def _edges(self) -> tuple[Output, ...]:
        """One for each root that takes input. It has one queue here; on a cluster one for each node with workers of the
        root, none of which is this host's own, so that the room decides."""
        by_root: dict[str, list[str]] = {}
        for one in self.runner.plan.queues:
            if one.source == PIPE:
                by_root.setdefault(one.target, []).append(one.name)
        return tuple(
            Output(OutputPlan(root, tuple(names), 0), tuple(self.runner.queues[name] for name in names), None)
            for root, names in by_root.items()
        )

    def _rewired(self) -> None:
        self._outputs.switch(self._edges())
        if self.runner.state == "draining" and not self._closed:  # somebody else told the pipe to drain
            self.refuse_input()

    # ------------------------------------------------------------------ emitting

    async def emit(self, value: Any, dtype: int | None, execution: int, timeout: float | None) -> bool:
        """False when there was no room in time."""
        if self._closed or self._outputs.draining:
            raise self._refusal()
        if not self._outputs.edges:
            raise IllegalTransition(
                f"pipe {self.name!r} has no processor that takes input: all its roots are generators"
            )
        self._emitting += 1
        try:
            return await self._outputs.asend(value, -1 if dtype is None else dtype, execution, timeout)
        except Ended:
            raise self._refusal() from None
        finally:
            self._emitting -= 1
            self._close_behind_last()

    def _refusal(self) -> IllegalTransition:
        running = self.runner.state in ("starting", "running")
        why = "its input is closed" if running else f"it is {self.runner.state}"
        return IllegalTransition(
            f"pipe {self.name!r} takes nothing: {why}; emit between start() and wait_for_completion()"
        )

    def close_input(self) -> None:
        """No more emits; those under way get in. Idempotent."""
        self._closed = True
        self._close_behind_last()

    def _close_behind_last(self) -> None:
        if self._closed and not self._emitting and not self._outputs.draining:
            self.runner.close_input()

    def refuse_input(self) -> None:
        """No more emits, those under way neither."""
        self._closed = True
        if self._emitting:
            self._outputs.interrupt()
        self._outputs.draining = True

    def _at_end(self) -> None:
        self._closed = self._outputs.draining = True
        if self._answering is not None and self.runner.state != "completed":
            self._answering.cancel()  # its calls have been told; nothing more comes

    # ------------------------------------------------------------------ calls

    async def call(self, value: Any, timeout: float | None, dtype: int | None) -> Any:
        """See Pipe.call."""
        self._executions += 1
        execution = self._executions
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        deadline = None if timeout is None else time.monotonic() + timeout
        self.runner.calls[execution] = future
        try:
            if self._answering is None or self._answering.done():
                self._answering = asyncio.create_task(self.runner.answer_calls())
            sent = await self.emit(value, dtype, execution, timeout)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if sent:
                await asyncio.wait([future], timeout=left)
            if not future.done():
                what = "no answer came" if sent else "no room came"
                raise CallTimeout(
                    f"call {execution} of pipe {self.name!r}: {what} within {timeout:g} s; the frame goes on"
                )
            return future.result()
        finally:
            self.runner.calls.pop(execution, None)
            if future.done() and not future.cancelled():
                future.exception()  # told by another way when the emit itself was refused

    async def answered(self) -> None:
        """Once the pipe ended: until every answer that came has been handed over."""
        if self._answering is not None:
            await asyncio.wait([self._answering])

    # ------------------------------------------------------------------ results

    async def results(self) -> AsyncIterator[Any]:
        """See Pipe.results."""
        ring = self.runner.results  # kept readable after the end
        self._readers, self._read = self._readers + 1, True
        self._keep()
        try:
            while True:
                try:
                    value = await ring.aget()
                except EndOfStream:
                    return
                yield value
        finally:
            self._readers -= 1
            self._keep()

    def awaiting(self, begins: bool) -> None:
        """The caller waits for the end (or stops to): results that nobody reads must not hold it up any more."""
        self._awaited += 1 if begins else -1
        self._keep()

    def _keep(self) -> None:
        lossless = self._readers or (self._read and not self._awaited)
        self.runner.results.set_policy(_BLOCK if lossless else _DROP_OLDEST)
