"""Pipe: a declared graph of processors, and the running thing it becomes."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, Self

import msgspec

from upipe.errors import ClusterError, DeclarationError, IllegalTransition, PipeFailed
from upipe.frame import dumps, registered_types
from upipe.graph.inspect import inspect_func
from upipe.graph.plan import host_problems, plan
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.graph.validate import problems
from upipe.processor import EdgePolicy, Key, Processor
from upipe.runtime.ends import Ends, EndsRunner
from upipe.runtime.local import LocalRunner
from upipe.runtime.report import Report
from upipe.runtime.spool import DeadLetter
from upipe.runtime.worker import Bundle
from upipe.settings import Certificates, Settings

Check = Callable[[PipeSpec], list[str]]


LOCAL = "local"
CLUSTER_VARIABLE = "UPIPE_CLUSTER"
"""Environment variable that says where pipes run whose start() does not: "auto", HOST:PORT, or "local"."""


class Runner(EndsRunner, Protocol):
    """What runs a pipe: this host, or a cluster (which implements it; this module knows nothing of it)."""

    @property
    def reasons(self) -> tuple[str, ...]: ...
    async def start(self) -> None: ...
    async def drain(self, timeout: float) -> bool: ...
    async def stop(self) -> None: ...
    def report(self) -> Report: ...
    def dead_letters(self) -> list[DeadLetter]: ...


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
        self._runner: Runner | None = None
        self._ends: Ends | None = None

    # ------------------------------------------------------------------ declaring

    def add(self, processor: Processor) -> Processor:
        """Add a root and return it: `pipe.add(a).add(b)` is a -> b. What its edges lead to belongs to the pipe too."""
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
        self,
        source: Processor,
        target: Processor,
        *,
        size: int | None = None,
        policy: EdgePolicy = "block",
        key: Key | None = None,
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
        self._prepare(host_problems, True)

    def _prepare(self, check: Check, pickle: bool) -> tuple[PipeSpec, dict[str, bytes]]:
        """The spec and the pickled Bundle of each processor.

        Args:
            check: what keeps a pipe without `problems` from running there.
            pickle: what settings.allow_pickle=None means there.
        """
        wrong: list[str] = []
        codes: dict[str, bytes] = {}
        specs = [self._spec(one, codes, wrong) for one in self.processors]
        edges = tuple(
            EdgeSpec(one.name, edge.target.name, edge.size, edge.policy, edge.key is not None)
            for one in self.processors
            for edge in one.edges
        )
        allowed = pickle if self.settings.allow_pickle is None else self.settings.allow_pickle
        settings = msgspec.structs.replace(self.settings, allow_pickle=allowed)
        spec = PipeSpec(self.name, tuple(specs), edges, settings)
        wrong += problems(spec)
        wrong += [] if wrong else check(spec)
        if wrong:
            raise DeclarationError(wrong, f"pipe {self.name!r}")
        return spec, codes

    def _spec(self, one: Processor, codes: dict[str, bytes], wrong: list[str]) -> ProcessorSpec:
        kind, takes_config, code = "map", False, ""
        if one.entry is not None:
            kind = "entry"
            if not os.path.isfile(one.entry):
                wrong.append(
                    f"processor {one.name!r}: its entry script {one.entry!r} does not exist; give the path of a file"
                )
        elif one.func is not None:
            try:
                kind, takes_config = inspect_func(one.name, one.func)
            except DeclarationError as error:
                wrong += error.problems
        keys = {edge.target.name: edge.key for edge in one.edges if edge.key is not None}
        try:
            codes[one.name] = dumps(Bundle(one.func, one.config, keys, registered_types()))
            code = hashlib.sha256(codes[one.name]).hexdigest() if one.func is not None else ""
        except Exception as error:  # anything a user's object may raise while it is pickled
            wrong.append(
                f"processor {one.name!r}: its code cannot be shipped to a worker ({type(error).__name__}: {error}); "
                "make it a function of a module, or create what cannot be pickled (locks, files, sockets) inside it or "
                "in setup()"
            )
            code = "0" * 64
        settings = self.settings
        return ProcessorSpec(
            name=one.name,
            kind=kind,
            code=code,
            entry=one.entry or "",
            interpreter=one.interpreter or "",
            workers=one.workers,
            autoscale=one.autoscale,
            on_error=one.on_error,
            max_deliveries=settings.max_deliveries if one.max_deliveries is None else one.max_deliveries,
            restart=one.restart or settings.restart,
            resume=one.resume,
            checkpoint_every=one.checkpoint_every,
            allow_pickle=one.allow_pickle is not False,
            frame_timeout=one.frame_timeout,
            takes_config=takes_config,
            resources=tuple(sorted(one.resources.items(), key=repr)),
            place=one.place,
        )

    def _not_started(self, what: str) -> None:
        if self._runner is not None:
            raise IllegalTransition(f"pipe {self.name!r} has been started; {what} before start()")

    # ------------------------------------------------------------------ running

    @property
    def state(self) -> str:
        """declared, starting, running, draining, completed, failed or stopped."""
        return self._runner.state if self._runner is not None else "declared"

    async def start(self, cluster: str | None = None, *, certificates: Certificates | None = None) -> Self:
        """Start every worker; returns when all of them are ready.

        Args:
            cluster: where. "local": on this host. "HOST:PORT": on the cluster of the agent there; "auto": of the agent
                at $UPIPE_CLUSTER, else on this host, else of one that answers in the local network (see
                cluster/reach.py). None: what $UPIPE_CLUSTER says, so that a program runs on a cluster unchanged; on
                this host where it says nothing.
                This process stays a part of the pipe: what it emits comes from here, results and replies come here,
                and the pipe ends with it.
            certificates: your own, for the cluster; None: those that $UPIPE_CA, $UPIPE_CERTIFICATE and $UPIPE_KEY name,
                else one is derived from the token.

        Raises:
            DeclarationError: nothing was started; on a cluster also when no node has room, with the reason for each.
            OutOfSharedMemory: nothing is left. PipeFailed: a worker cannot run. ClusterError: no agent, no token.
        """
        self._not_started("start it only once; declare another pipe to run it again")
        runner: Runner
        where = cluster or os.environ.get(CLUSTER_VARIABLE) or LOCAL
        if where == LOCAL:
            spec, codes = self._prepare(host_problems, True)
            runner = LocalRunner(spec, plan(spec), codes)
        else:
            module = _cluster_runner()
            spec, codes = self._prepare(module.cluster_problems, False)
            runner = module.ClusterRunner(spec, codes, self.processors, where, certificates)
        self._runner = runner
        try:
            await runner.start()
        except (ClusterError, DeclarationError):
            self._runner = None  # nothing was started: it may be tried again, there or elsewhere
            raise
        self._ends = Ends(self.name, runner)
        return self

    @property
    def _running(self) -> tuple[Runner, Ends]:
        if self._runner is None or self._ends is None:
            what = "is only declared" if self._runner is None else f"is {self.state}"
            raise IllegalTransition(f"pipe {self.name!r} {what}; `await pipe.start()` first")
        return self._runner, self._ends

    async def wait_for_completion(self, timeout: float | None = None) -> Report:
        """Close the pipe's own input, and wait until every processor has ended.

        Raises:
            PipeFailed: with the reasons and remote tracebacks. TimeoutError: after `timeout` seconds; the pipe goes on.
        """
        runner, ends = self._running
        assert runner.ended is not None
        ends.close_input()
        ends.awaiting(True)
        try:
            done, _ = await asyncio.wait([runner.ended], timeout=timeout)
        finally:
            ends.awaiting(False)
        if not done:
            raise TimeoutError(f"pipe {self.name!r} is still {self.state} after {timeout:g} s; it goes on")
        await ends.answered()
        if self.state == "failed":
            raise PipeFailed(self.name, runner.reasons)
        return runner.report()

    async def terminate(self, timeout: float | None = None) -> Report:
        """Drain: sources end, what is in the pipe is processed, then everything ends; stopped after `timeout` seconds
        (default: settings.drain_deadline)."""
        runner, ends = self._running
        ends.refuse_input()
        ends.awaiting(True)
        try:
            await runner.drain(self.settings.drain_deadline if timeout is None else timeout)
        finally:
            ends.awaiting(False)
        return runner.report()

    async def stop(self) -> Report:
        """End every worker now; frames that were on their way are lost. Leaves no process, segment or descriptor."""
        if self._runner is None:
            raise IllegalTransition(f"pipe {self.name!r} is only declared; there is nothing to stop")
        if self._ends is not None:
            self._ends.refuse_input()
        await self._runner.stop()
        return self._runner.report()

    def run(self, timeout: float | None = None) -> Report:
        """Start, wait for completion and return the report, without asyncio: for scripts and notebooks.

        Raises:
            As start() and wait_for_completion(); the pipe is stopped when anything but its end ends the wait.
        """
        if asyncio._get_running_loop() is None:
            return asyncio.run(self._run(timeout))  # not uvloop, which a fork server cannot be forked from
        with ThreadPoolExecutor(1, "upipe-run") as other:
            loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []
            running = other.submit(asyncio.run, self._run(timeout, loops))
            try:
                with _interruptible():
                    return running.result()
            except KeyboardInterrupt:
                for loop, task in loops:
                    loop.call_soon_threadsafe(task.cancel)  # leaving the block waits until the pipe has stopped
                raise

    async def _run(
        self, timeout: float | None, loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] | None = None
    ) -> Report:
        task = asyncio.current_task()
        if loops is not None and task is not None:
            loops.append((asyncio.get_running_loop(), task))
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

    async def emit(self, value: Any, dtype: int | None = None, timeout: float | None = None) -> bool:
        """Put a value into every root that takes input. Waits for room; False: there was none in `timeout` seconds."""
        return await self._running[1].emit(value, dtype, 0, timeout)

    async def call(self, value: Any, timeout: float | None = None, dtype: int | None = None) -> Any:
        """Emit a value and return what the last processor emits for this very input; many calls may be in flight.

        The first result answers; None when a processor filtered the value out: a mapped function or class that returned
        None, or a generator that yielded nothing. Code that drives itself (a function without parameters, a script) is
        never taken to have filtered a value out, even when it asks for the next one: a task that it made may still emit
        for this one. Let it emit something for each value of a call (None, for example), or give the call a `timeout`.

        Raises:
            ProcessorError: a processor raised (after its retries), with the remote traceback. CallTimeout. PipeFailed.
        """
        return await self._running[1].call(value, timeout, dtype)

    def results(self) -> AsyncIterator[Any]:
        """What the end processors emit, until the stream ends.

        Before the first read the newest are kept and what is dropped is counted; from then on it is lossless, and the
        pipe waits for its reader, who may leave and come back. While the pipe's end is awaited (wait_for_completion,
        terminate) and nobody iterates, the newest are kept again, or the pipe could not end.
        """
        return self._running[1].results()

    def stats(self) -> Report:
        """A snapshot while it runs (or the report after the end)."""
        return self._running[0].report()

    def report(self) -> Report:
        """The report: now, or at the end."""
        return self._running[0].report()

    def dead_letters(self) -> list[DeadLetter]:
        """Frames that could not be processed, with the error and the traceback. They lie where it happened: on a
        cluster these are the ones that have been fetched from the nodes, all of them at the end."""
        return self._running[0].dead_letters()

    def __repr__(self) -> str:
        return f"<Pipe {self.name!r} {self.state}>"


def _cluster_runner() -> Any:
    """The module that runs pipes on a cluster, which nothing here imports: a worker has no use for it."""
    try:
        return importlib.import_module("upipe.cluster.runner")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("upipe"):
            raise
        raise ClusterError(
            f"start(cluster=...) needs {error.name}, which is not installed: pip install 'upipe[cluster]'"
        ) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """asyncio.run keeps the first Ctrl-C for its loop, which waits for us: here it raises KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
