"""The worker process: takes its assignment, runs the processor's code over its queues, reports, ends.

Order at the end, so that a crash between any two steps loses nothing: code returns -> held frame finished -> own ends of
stream closed -> Done said -> exit 0. A worker that dies before the exit is run again.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from upipe.errors import EndOfStream, FrameCorrupt, FrameError, NotInWorker
from upipe.frame import register_type
from upipe.graph.plan import OutputPlan
from upipe.memq.queue import MemQ
from upipe.runtime import messages
from upipe.runtime.channels import Inputs, Output, Outputs
from upipe.runtime.messages import Assignment, Buried, Done, Drain, Raised, Ready
from upipe.runtime.spool import DeadLetter, bury
from upipe.runtime.worker_state import key_function, verdict

ERROR_FLAGS = 2 | 4  # REPLY, ERROR
_current: Worker | None = None


class Bundle:
    """What ships to a worker: the function and what belongs to it. Pickled whole into one file of the spool."""

    def __init__(self, func: Any, config: Any, keys: dict[str, Any], types: tuple[Any, ...]) -> None:
        self.func = func
        self.config = config
        self.keys = keys
        """Partition key per target of a keyed edge."""
        self.types = types
        """Registered custom types: (name, class, encode, decode)."""


class Worker:
    """One worker process of a processor."""

    def __init__(self, control: socket.socket, assignment: Assignment, bundle: Bundle) -> None:
        self.control = control
        self.assignment = assignment
        self.bundle = bundle
        self.execution = 0
        """Execution id of the frame in hand: what is emitted answers the same call."""
        self._emitted_for_call = False
        self._unreadable = False
        """The frame in hand cannot be decoded: trying again is of no use."""
        self.inputs = Inputs(tuple(self._attach(name) for name in assignment.inputs), assignment.sources)
        edges = tuple(self._output(plan) for plan in assignment.outputs)
        self.replies = self._producer(assignment.replies, assignment.reply_producer)
        self.outputs = Outputs(edges, self.replies)
        self._mutex = threading.Lock()
        threading.Thread(target=self._listen, name="upipe-control", daemon=True).start()

    def _attach(self, name: str) -> MemQ:
        return MemQ.attach(f"{self.assignment.session}/{name}")

    def _producer(self, name: str, number: int) -> MemQ:
        ring = self._attach(name)
        ring.use_producer(number, self.assignment.epoch)
        return ring

    def _output(self, plan: OutputPlan) -> Output:
        key = self.bundle.keys.get(plan.target)
        rings = tuple(self._producer(name, plan.producer) for name in plan.queues)
        return Output(plan, rings, None if key is None else key_function(key))

    # ------------------------------------------------------------------ control

    def say(self, message: messages.FromWorker) -> None:
        """Tell the supervisor. When it is gone the fork server ends us; nothing to do here."""
        try:
            with self._mutex:
                self.control.send(messages.encode(message))
        except (BrokenPipeError, ConnectionResetError):
            pass  # said above

    def _listen(self) -> None:
        while True:
            try:
                data = self.control.recv(messages.PACKET)
            except OSError:
                data = b""
            if not data:
                os._exit(1)  # the supervisor is gone
            if isinstance(messages.decode_to_worker(data), Drain):
                self.inputs.interrupt()
                self.outputs.interrupt()

    # ------------------------------------------------------------------ frames

    def took(self) -> None:
        """A frame was received: what is emitted from now on belongs to it."""
        ring = self.inputs.held
        self.execution = ring.last_execution if ring is not None else 0
        self._emitted_for_call = False

    def try_emit(self, value: Any, dtype: int = -1, to: str | None = None) -> bool:
        """Emit without waiting, under the execution in hand."""
        done = self.outputs.try_send(value, dtype, self.execution, to)
        self._emitted_for_call = self._emitted_for_call or done
        return done

    def emit(self, value: Any) -> None:
        """Emit a mapped result, waiting for room as long as it takes."""
        self.outputs.send(value, -1, self.execution)
        self._emitted_for_call = True

    async def aemit(self, value: Any) -> None:
        """emit() for asyncio."""
        await self.outputs.asend(value, -1, self.execution)
        self._emitted_for_call = True

    def answered(self) -> None:
        """A mapped frame is through: a call that nothing was emitted for is answered with None, or it would wait."""
        if self.execution and not self._emitted_for_call:
            self.replies.send(None, -1, 1e18, self.execution)

    def failed(self, error: BaseException) -> None:
        """Processing the held frame raised: give it back, bury it, or fail the pipe."""
        ring = self.inputs.held
        told = "".join(traceback.format_exception(error))
        kind = type(error).__qualname__
        if ring is None:
            raise error
        what = self.assignment
        position, deliveries = ring.holding, ring.header()[1]
        decided = verdict(what.on_error, deliveries, what.max_deliveries, self._unreadable)
        self.say(Raised("frame", kind, str(error), told, decided == "fail"))
        if decided != "bury":
            self.inputs.held = None
            ring.give_back()
            if decided == "fail":
                raise SystemExit(1)
            return
        queue = ring.label.rpartition("/")[2]
        letter = DeadLetter(
            what.processor, what.worker, self.inputs.sources[ring], queue, position, deliveries, kind, str(error), told,
            ring.raw(position),
        )
        self.say(Buried(bury(Path(what.spool), letter)))
        if self.execution:
            record = {"processor": what.processor, "worker": what.worker, "kind": kind, "message": str(error), "traceback": told}
            self.replies.send(record, 19, 1e18, self.execution, 0, ERROR_FLAGS)
        self.inputs.finish(dead=True)

    def receive(self, timeout: float | None = None) -> Any:
        """Next readable value; frames that cannot be read go to the dead letters."""
        while True:
            try:
                value = self.inputs.receive(timeout)
            except FrameError as error:
                self.unreadable(error)
                continue
            self.took()
            return value

    async def areceive(self, timeout: float | None = None) -> Any:
        """receive() for asyncio."""
        while True:
            try:
                value = await self.inputs.areceive(timeout)
            except FrameError as error:
                self.unreadable(error)
                continue
            self.took()
            return value

    def try_receive(self) -> tuple[bool, Any]:
        """(True, value), or (False, None)."""
        while True:
            try:
                found = self.inputs.try_receive()
            except FrameError as error:
                self.unreadable(error)
                continue
            if found[0]:
                self.took()
            return found

    def unreadable(self, error: FrameError) -> None:
        """The held frame is corrupt or of a type that cannot be decoded here."""
        self.execution = 0 if isinstance(error, FrameCorrupt) or self.inputs.held is None else self.inputs.held.last_execution
        self._unreadable = True
        try:
            self.failed(error)
        finally:
            self._unreadable = False

    # ------------------------------------------------------------------ ending

    def close(self) -> None:
        """The code returned: finish, close our ends, say so."""
        self.inputs.close()
        self.outputs.close(self.assignment.reply_producer)
        self.say(Done())


def current(name: str) -> Worker:
    """The worker this process is. In an entry script the first call connects it.

    Raises:
        NotInWorker: this process is no worker, or the worker of another processor.
    """
    global _current
    if _current is None and "UPIPE_WORKER_FD" in os.environ:
        fd = int(os.environ.pop("UPIPE_WORKER_FD"))
        os.set_inheritable(fd, False)
        _current = _start(socket.socket(fileno=fd))
        assert _current is not None
        import atexit

        atexit.register(_end_of_script, _current)
        _current.say(Ready())
    if _current is None:
        raise NotInWorker(
            f"Processor({name!r}).connect() works only inside a worker of a running pipe; here, declare "
            f"Processor({name!r}, func) , add it to a Pipe and start that"
        )
    if _current.assignment.processor != name:
        raise NotInWorker(
            f"this worker is {_current.assignment.worker!r}, but Processor({name!r}).connect() asks for {name!r}; "
            f"use Processor({_current.assignment.processor!r})"
        )
    return _current


def _end_of_script(worker: Worker) -> None:
    """An entry script that ends by itself: its held frame counts as done unless an exception ended it."""
    if getattr(sys, "last_value", None) is None:
        worker.close()


def _start(control: socket.socket) -> Worker:
    assignment = messages.decode_to_worker(control.recv(messages.PACKET))
    assert isinstance(assignment, Assignment)
    os.environ["UPIPE_SHM"] = assignment.root
    bundle = Bundle(None, None, {}, ())
    if assignment.code:
        for path in assignment.sys_path:
            if path not in sys.path:
                sys.path.append(path)
        bundle = pickle.loads(Path(assignment.code).read_bytes())  # written by our own supervisor, 0600
        for name, cls, encode, decode in bundle.types:
            register_type(cls, name=name, encode=encode, decode=decode)
    return Worker(control, assignment, bundle)


def run(control: socket.socket) -> int:
    """The life of a forked worker; returns its exit status."""
    global _current
    try:
        worker = _current = _start(control)
        body = _body(worker)
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        message = Raised("load", type(error).__qualname__, str(error), told, fatal=True)
        control.send(messages.encode(message))
        return 1
    worker.say(Ready())
    try:
        body()
    except EndOfStream:
        pass  # the clean end of a worker
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        print(f"worker {worker.assignment.worker} ended by an exception:\n{told}", file=sys.stderr, end="")
        worker.say(Raised("run", type(error).__qualname__, str(error), told))
        return 1
    worker.close()
    return 0


def _body(worker: Worker) -> Any:
    """The loop for the kind of code."""
    func, what = worker.bundle.func, worker.assignment
    extra = {"config": worker.bundle.config} if what.takes_config else {}
    if what.kind == "class":
        from upipe.runtime.stateful import Stateful

        return Stateful(worker, func(**extra)).run
    if what.kind == "driver":
        return lambda: _finish_call(func(**extra))
    if what.kind == "source":
        return lambda: _source(worker, func(**extra))
    return lambda: _map(worker, func, extra)


def run_async(main: Any) -> Any:
    """Run a coroutine on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def _finish_call(result: Any) -> None:
    if inspect.iscoroutine(result):
        run_async(result)


def _source(worker: Worker, values: Any) -> None:
    """A generator without parameters: each value is emitted. resume: skip what earlier lives got into the queues."""
    skip = 0
    if worker.assignment.resume:
        skip = min(ring.emitted(edge.producer) for edge in worker.outputs.edges for ring in edge.rings)
    if hasattr(values, "__aiter__"):
        run_async(_async_source(worker, values, skip))
        return
    for number, value in enumerate(values):
        if number >= skip:
            worker.emit(value)


async def _async_source(worker: Worker, values: Any, skip: int) -> None:
    number = 0
    async for value in values:
        if number >= skip:
            await worker.aemit(value)
        number += 1


def _map(worker: Worker, func: Any, extra: dict[str, Any]) -> None:
    if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
        run_async(map_async(worker, lambda value: func(value, **extra)))
        return
    map_sync(worker, lambda value: func(value, **extra) if extra else func(value))


def map_sync(worker: Worker, func: Any) -> None:
    """Call func on each value and emit what it returns or yields, until the stream ends."""
    while True:
        value = worker.receive()
        try:
            result = func(value)
            if inspect.iscoroutine(result) or hasattr(result, "__anext__"):
                run_async(_emit_async(worker, result))
            else:
                emit_result(worker, result)
            worker.answered()
        except EndOfStream:
            raise
        except Exception as error:
            worker.failed(error)


def emit_result(worker: Worker, result: Any) -> None:
    """Emit a plain result: nothing for None, each value of a generator, else the value."""
    if inspect.isgenerator(result):
        for one in result:
            worker.emit(one)
    elif result is not None:
        worker.emit(result)


async def map_async(worker: Worker, func: Any) -> None:
    """map_sync() for coroutine functions and async generators: one value at a time, so that it can be finished."""
    while True:
        value = await worker.areceive()
        try:
            await _emit_async(worker, func(value))
            worker.answered()
        except EndOfStream:
            raise
        except Exception as error:
            worker.failed(error)


async def _emit_async(worker: Worker, result: Any) -> None:
    if hasattr(result, "__anext__"):
        async for one in result:
            await worker.aemit(one)
        return
    found = await result if inspect.isawaitable(result) else result
    if found is not None:
        await worker.aemit(found)


__all__ = ["Bundle", "Worker", "current", "run"]
