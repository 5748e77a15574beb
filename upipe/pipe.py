"""Pipe: a declared graph of processors, and the running thing it becomes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol, Self

from upipe.errors import CallTimeout, DeclarationError, EndOfStream, IllegalTransition, PipeFailed
from upipe.frame import dumps, registered_types
from upipe.graph.inspect import inspect_func
from upipe.graph.plan import PIPE, OutputPlan, Plan, host_problems, plan
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.graph.validate import problems
from upipe.memq.queue import MemQ
from upipe.processor import EdgePolicy, Key, Processor
from upipe.runtime.channels import Output, Outputs
from upipe.runtime.local import LocalRunner
from upipe.runtime.report import Report
from upipe.runtime.spool import DeadLetter
from upipe.runtime.worker import Bundle, run_async
from upipe.settings import Settings


class Runner(Protocol):
    """What runs a pipe: this host, or a cluster (which implements it; this module knows nothing of it)."""

    plan: Plan
    queues: dict[str, MemQ]
    calls: dict[int, asyncio.Future[Any]]
    ended: asyncio.Future[None] | None

    async def start(self) -> None: ...
    def close_input(self) -> None: ...
    async def drain(self, timeout: float) -> bool: ...
    async def stop(self) -> None: ...
    async def answer_calls(self) -> None: ...
    def report(self) -> Report: ...
    def dead_letters(self) -> list[DeadLetter]: ...
    @property
    def results(self) -> MemQ: ...


class Pipe:
    """A graph of processors, started once.

        pipe = Pipe("plus-one")
        pipe.add(a).add(b)                   # a -> b
        await pipe.start()
        await pipe.wait_for_completion()

    Args:
        name: of the pipe; as a processor's.
        settings: its knobs.
    """

    def __init__(self, name: str, *, settings: Settings | None = None) -> None:
        self.name = name
        self.settings = settings or Settings()
        self._roots: list[Processor] = []
        self._runner: LocalRunner | None = None
        self._outputs: Outputs | None = None
        self._executions = 0
        self._answering: asyncio.Task[None] | None = None
        self._input_closed = False

    # ------------------------------------------------------------------ declaring

    def add(self, processor: Processor) -> Processor:
        """Add a root and return it: `pipe.add(a).add(b)` is a -> b. Processors behind it belong to the pipe by their edges."""
        if not isinstance(processor, Processor):
            raise TypeError(f"pipe {self.name!r} takes a Processor, not {processor!r}; wrap it: Processor(name, func)")
        self._not_started("add to it")
        if not any(one is processor for one in self._roots):
            self._roots.append(processor)
        return processor

    def chain(self, *processors: Processor) -> Processor:
        """add(first) and an edge from each to the next; returns the last."""
        last = self.add(processors[0])
        for one in processors[1:]:
            last = last.add(one)
        return last

    def connect(
        self, source: Processor, target: Processor, *, size: int | None = None, policy: EdgePolicy = "block", key: Key | None = None
    ) -> Processor:
        """Declare an edge (see Processor.add), adding `source` to the pipe; returns `target`."""
        self._not_started("connect in it")
        if source not in self.processors:
            self.add(source)
        return source.add(target, size=size, policy=policy, key=key)

    @property
    def processors(self) -> list[Processor]:
        """Everything that can be reached from the roots, in order of declaration."""
        found: list[Processor] = []
        todo = list(reversed(self._roots))
        while todo:
            one = todo.pop()
            if not any(one is seen for seen in found):
                found.append(one)
                todo += [edge.target for edge in reversed(one.edges)]
        return found

    def validate(self) -> None:
        """Check the whole declaration.

        Raises:
            DeclarationError: with every problem at once.
        """
        self._prepare()

    def _prepare(self) -> tuple[PipeSpec, dict[str, bytes]]:
        wrong: list[str] = []
        codes: dict[str, bytes] = {}
        specs = [self._spec(one, codes, wrong) for one in self.processors]
        edges = tuple(
            EdgeSpec(one.name, edge.target.name, edge.size, edge.policy, edge.key is not None)
            for one in self.processors
            for edge in one.edges
        )
        spec = PipeSpec(self.name, tuple(specs), edges, self.settings)
        wrong += problems(spec)
        wrong += [] if wrong else host_problems(spec)
        if wrong:
            raise DeclarationError(wrong, f"pipe {self.name!r}")
        return spec, codes

    def _spec(self, one: Processor, codes: dict[str, bytes], wrong: list[str]) -> ProcessorSpec:
        kind, takes_config, code = "map", False, ""
        if one.entry is not None:
            kind = "entry"
            if not os.path.isfile(one.entry):
                wrong.append(f"processor {one.name!r}: its entry script {one.entry!r} does not exist; give the path of a file")
        elif one.func is not None:
            try:
                kind, takes_config = inspect_func(one.name, one.func)
            except DeclarationError as error:
                wrong += error.problems
        keys = {edge.target.name: edge.key for edge in one.edges if edge.key is not None}
        try:
            codes[one.name] = dumps(Bundle(one.func, one.config, keys, registered_types()))
            import hashlib

            code = hashlib.sha256(codes[one.name]).hexdigest() if one.func is not None else ""
        except Exception as error:  # anything a user's object may raise while it is pickled
            wrong.append(
                f"processor {one.name!r}: its code cannot be shipped to a worker ({type(error).__name__}: {error}); make it a "
                "function of a module, or create what cannot be pickled (locks, files, sockets) inside it or in setup()"
            )
            code = "0" * 64
        settings = self.settings
        return ProcessorSpec(
            one.name, kind, code, one.entry or "", one.interpreter or "", one.workers, one.autoscale, one.on_error,
            settings.max_deliveries if one.max_deliveries is None else one.max_deliveries, one.restart or settings.restart,
            one.resume, one.checkpoint_every, settings.allow_pickle if one.allow_pickle is None else one.allow_pickle,
            one.frame_timeout, takes_config,
        )

    def _not_started(self, what: str) -> None:
        if self._runner is not None:
            raise IllegalTransition(f"pipe {self.name!r} has been started; {what} before start()")

    # ------------------------------------------------------------------ running

    @property
    def state(self) -> str:
        """declared, starting, running, draining, completed, failed or stopped."""
        return self._runner.supervisor.state if self._runner is not None else "declared"

    async def start(self) -> Self:
        """Start every worker on this host; returns when all of them are ready.

        Raises:
            DeclarationError: nothing was started. OutOfSharedMemory: nothing is left. PipeFailed: a worker cannot run.
        """
        self._not_started("start it only once; declare another pipe to run it again")
        spec, codes = self._prepare()
        runner = LocalRunner(spec, plan(spec), codes)
        self._runner = runner
        await runner.start()
        edges = [
            Output(OutputPlan(queue.target, (queue.name,), 0), (runner.queues[queue.name],), None)
            for queue in runner.plan.queues
            if queue.source == PIPE
        ]
        self._outputs = Outputs(tuple(edges), None)
        return self

    @property
    def _running(self) -> LocalRunner:
        if self._runner is None:
            raise IllegalTransition(f"pipe {self.name!r} is only declared; `await pipe.start()` first")
        return self._runner

    async def wait_for_completion(self, timeout: float | None = None) -> Report:
        """Close the pipe's own input, and wait until every processor has ended.

        Raises:
            PipeFailed: with the reasons and remote tracebacks. TimeoutError: after `timeout` seconds; the pipe goes on.
        """
        runner = self._running
        assert runner.ended is not None
        self._close_input()
        done, _ = await asyncio.wait([runner.ended], timeout=timeout)
        if not done:
            raise TimeoutError(f"pipe {self.name!r} is still {self.state} after {timeout:g} s; it goes on")
        if self._answering is not None:
            await self._answering
        if self.state == "failed":
            raise PipeFailed(self.name, tuple(runner.supervisor.reasons))
        return runner.report()

    async def terminate(self, timeout: float | None = None) -> Report:
        """Drain: sources end, what is in the pipe is processed, then everything ends; stopped after `timeout` seconds
        (default: settings.drain_deadline)."""
        runner = self._running
        self._input_closed = True
        await runner.drain(self.settings.drain_deadline if timeout is None else timeout)
        return runner.report()

    async def stop(self) -> Report:
        """End every worker now; frames that were on their way are lost. Leaves no process, segment or descriptor."""
        runner = self._running
        self._input_closed = True
        await runner.stop()
        return runner.report()

    def run(self, timeout: float | None = None) -> Report:
        """Start, wait for completion and return the report, without asyncio: for scripts and notebooks.

        Raises:
            As start() and wait_for_completion(); the pipe is stopped when anything but its end ends the wait.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return run_async(self._run(timeout))  # type: ignore[no-any-return]
        found: list[Report] = []
        failed: list[BaseException] = []

        def other_thread() -> None:
            try:
                found.append(run_async(self._run(timeout)))
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                failed.append(error)

        thread = threading.Thread(target=other_thread, name="upipe-run")
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    async def _run(self, timeout: float | None) -> Report:
        try:
            await self.start()
            return await self.wait_for_completion(timeout)
        finally:
            if self.state in ("starting", "running", "draining"):
                await self.stop()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            await self.wait_for_completion()
        elif self._runner is not None:
            await self.stop()

    # ------------------------------------------------------------------ its own ends

    def _close_input(self) -> None:
        if not self._input_closed:
            self._input_closed = True
            self._running.close_input()

    def _open_outputs(self) -> Outputs:
        if self._outputs is None or self._input_closed or self.state in ("completed", "failed", "stopped"):
            closed = "its input is closed" if self._input_closed else f"it is {self.state}"
            raise IllegalTransition(f"pipe {self.name!r} takes nothing: {closed}; emit between start() and wait_for_completion()")
        if not self._outputs.edges:
            raise IllegalTransition(f"pipe {self.name!r} has no processor that takes input: all its roots are generators")
        return self._outputs

    async def emit(self, value: Any, dtype: int | None = None, timeout: float | None = None) -> bool:
        """Put a value into every root that takes input. Waits for room; False when there was none in `timeout` seconds."""
        return await self._open_outputs().asend(value, -1 if dtype is None else dtype, 0, timeout)

    async def call(self, value: Any, timeout: float | None = None, dtype: int | None = None) -> Any:
        """Emit a value and return what the last processor emits for this very input; many calls may be in flight.

        The first result answers; None when a processor filtered the value out.

        Raises:
            ProcessorError: a processor raised (after its retries), with the remote traceback. CallTimeout. PipeFailed.
        """
        outputs, runner = self._open_outputs(), self._running
        self._executions += 1
        execution = self._executions
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        runner.calls[execution] = future
        if self._answering is None:
            self._answering = asyncio.create_task(runner.answer_calls())
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            sent = await outputs.asend(value, -1 if dtype is None else dtype, execution, timeout)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if sent:
                await asyncio.wait([future], timeout=left)
            if not future.done():
                what = "no answer came" if sent else "no room came"
                raise CallTimeout(f"call {execution} of pipe {self.name!r}: {what} within {timeout:g} s; the frame goes on")
            return future.result()
        finally:
            runner.calls.pop(execution, None)

    async def results(self) -> AsyncIterator[Any]:
        """What the end processors emit, until the stream ends. Lossless from the first read on; before, the newest are kept."""
        ring = self._running.results
        ring.set_policy(0)
        try:
            while True:
                try:
                    value = await ring.aget()
                except EndOfStream:
                    return
                yield value
        finally:
            ring.set_policy(1)

    def stats(self) -> Report:
        """A snapshot while it runs (or the report after the end)."""
        return self._running.report()

    def report(self) -> Report:
        """The report: now, or at the end."""
        return self._running.report()

    def dead_letters(self) -> list[DeadLetter]:
        """Frames that could not be processed, with the error and the traceback."""
        return self._running.dead_letters()

    def __repr__(self) -> str:
        return f"<Pipe {self.name!r} {self.state}>"
