"""The worker process: takes its assignment, runs the processor's code over its queues, reports, ends.

Order at the end, so that a crash between any two steps loses nothing: code returns -> held frame finished -> own ends
of stream closed -> Done said -> exit 0. A worker that dies before the exit is run again.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from upipe.errors import EndOfStream, FrameCorrupt, FrameError, NotInWorker, QueueError
from upipe.frame import ERROR, REPLY, DType, register_type
from upipe.graph.plan import OutputPlan
from upipe.memq._ring import Ring, Way
from upipe.memq.queue import MemQ
from upipe.runtime import messages
from upipe.runtime.calls import CURRENT, Call
from upipe.runtime.channels import FOREVER, Inputs, Output, Outputs
from upipe.runtime.messages import Assignment, Buried, Done, Drain, Raised, Ready, Rewire
from upipe.runtime.spool import DeadLetter, bury
from upipe.runtime.waits import CONSUMER, PRODUCER
from upipe.runtime.worker_state import Told, describe, key_function, verdict

SELF_DRIVEN = ("driver", "source", "entry")
"""Kinds of code that decide themselves when to emit: draining ends their emits too, not only their input."""
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
        self.limit = assignment.frame_timeout or 0.0
        """Seconds a frame may take, 0 = no limit."""
        self.way = Way(not self.limit and assignment.kind != "class")
        """Direct: no call, drain, limit or checkpoints, so that frames need only their queue. Only ever closed."""
        self._calls = False
        """A frame of a call was seen."""
        self._rings: dict[str, MemQ] = {}
        """Queues it uses, by name; the control thread's own from when that runs."""
        self.inputs = Inputs(tuple(self._attach(name) for name in assignment.inputs), assignment.sources)
        edges = tuple(self._output(plan) for plan in assignment.outputs)
        self.replies = self._producer(assignment.replies, assignment.reply_producer)
        self.outputs = Outputs(edges, self.replies, self.inputs)
        self._mutex = threading.Lock()
        self._untold = 0
        """Bytes of dead letters that the supervisor does not know of yet."""
        self._make_bells()
        threading.Thread(target=self._listen, name="upipe-control", daemon=True).start()

    def _attach(self, name: str) -> MemQ:
        ring = self._rings[name] = MemQ.attach(f"{self.assignment.session}/{name}")
        return ring

    def _producer(self, name: str, number: int) -> MemQ:
        if name not in self._rings:
            self._attach(name).use_producer(number, self.assignment.epoch)
        return self._rings[name]

    def _output(self, plan: OutputPlan) -> Output:
        key = self.bundle.keys.get(plan.target)
        rings = tuple(self._producer(name, plan.producer) for name in plan.queues)
        return Output(plan, rings, None if key is None else key_function(key))

    def _make_bells(self) -> None:
        """Before the control thread, which rings them: two threads must not make the same one."""
        for ring in self.inputs.rings:
            ring.bell(CONSUMER)
        for ring in self.outputs.rings() if self.assignment.kind in SELF_DRIVEN or self.assignment.rewires else ():
            ring.bell(PRODUCER)

    # ------------------------------------------------------------------ control

    def say(self, message: messages.FromWorker) -> None:
        """Tell the supervisor. When it is gone the fork server ends us; nothing to do here.

        Frames flow while it does not listen: one more exception of a frame is left out then, and the bytes of dead
        letters are told with the next ones.
        """
        with self._mutex:
            if isinstance(message, Buried):
                message = Buried(message.size + self._untold)
                self._untold = 0 if self._send(message, socket.MSG_DONTWAIT) else message.size
            elif isinstance(message, Raised) and not message.fatal:
                self._send(message, socket.MSG_DONTWAIT)
            else:
                if self._untold:
                    self._send(Buried(self._untold))
                    self._untold = 0
                self._send(message)

    def _send(self, message: messages.FromWorker, flags: int = 0) -> bool:
        """False: there was no room, and flags said not to wait for it."""
        try:
            self.control.send(messages.encode(message), flags)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is gone; see say()
        return True

    def _listen(self) -> None:
        while True:
            try:
                data = self.control.recv(messages.PACKET)
            except OSError:
                data = b""
            if not data:
                os._exit(1)  # the supervisor is gone
            told = messages.decode_to_worker(data)
            self.way.direct = False
            if isinstance(told, Rewire):
                self._rewire(told)
            elif isinstance(told, Drain):
                self.inputs.interrupt()
                if self.assignment.kind in SELF_DRIVEN:
                    self.outputs.interrupt()

    def _rewire(self, told: Rewire) -> None:
        """In the control thread: attach to what is new, make its bells, hand it over.

        Outputs first: what comes of a frame from a new input may go to the new outputs.
        """
        try:
            edges = tuple(self._output(plan) for plan in told.outputs)
            inputs: dict[Ring, str] = {}
            for name, source in zip(told.inputs, told.sources, strict=True):
                inputs[self._rings[name] if name in self._rings else self._attach(name)] = source
        except QueueError:
            return  # a queue that is gone again: a newer message is on its way
        for edge in edges:
            for ring in edge.rings:
                ring.bell(PRODUCER)
        for ring in inputs:
            ring.bell(CONSUMER)
        self.outputs.rewire(edges)
        self.inputs.rewire(inputs)
        used = {*told.inputs, *(name for plan in told.outputs for name in plan.queues), self.assignment.replies}
        self._rings = {name: ring for name, ring in self._rings.items() if name in used}

    # ------------------------------------------------------------------ emitting

    def _in_call(self) -> Call | None:
        call = CURRENT.get() if self._calls else None
        return call if call is not None and call.execution else None

    def try_emit(self, value: Any, dtype: int = -1, to: str | None = None) -> bool:
        """Emit without waiting."""
        call = self._in_call()
        if call is None:
            return self.outputs.try_send(value, dtype, 0, to)
        more = self._announce(call, to)
        return self.outputs.try_send(value, dtype, call.execution, to) and self._sent(call, more)

    def emit(self, value: Any, dtype: int = -1, timeout: float | None = None, to: str | None = None) -> bool:
        """Emit, waiting for room up to `timeout` seconds (None: for ever). False when there was none."""
        only = self.outputs.only
        if self.way.direct and only is not None and to is None and only.send(value, dtype):
            return True
        if self.try_emit(value, dtype, to):
            return True
        pause, call = self._pause(), self._in_call()
        try:
            if call is None:
                return self.outputs.send(value, dtype, 0, timeout, to)
            more = self._announce(call, to)
            return self.outputs.send(value, dtype, call.execution, timeout, to) and self._sent(call, more)
        finally:
            self._limit(pause)

    async def aemit(self, value: Any, dtype: int = -1, timeout: float | None = None, to: str | None = None) -> bool:
        """emit() for asyncio."""
        if self.try_emit(value, dtype, to):
            return True
        pause, call = self._pause(), self._in_call()
        try:
            if call is None:
                return await self.outputs.asend(value, dtype, 0, timeout, to)
            more = self._announce(call, to)
            return await self.outputs.asend(value, dtype, call.execution, timeout, to) and self._sent(call, more)
        finally:
            self._limit(pause)

    def _announce(self, call: Call, to: str | None) -> int:
        more = self.outputs.children(to)
        self._count(call, max(call.announced, call.children + more + call.yielding))
        return more

    def _count(self, call: Call, announced: int) -> None:
        if announced != call.announced:
            self.replies.send(announced - call.announced, DType.I64, FOREVER, call.execution, 0, REPLY)
            call.announced = announced

    def _sent(self, call: Call, more: int) -> bool:
        call.children += more
        call.answered = call.answered or not more
        return True

    def yields(self) -> None:
        """The frame in hand gives a stream of values."""
        call = self._in_call()
        if call is not None:
            call.yielding = True

    def through(self, again: bool = False) -> None:
        """A mapped frame is through (or is given `again`): a call that it was filtered out of must not wait for it."""
        call = self._in_call()
        if call is not None and not call.answered:
            self._count(call, call.children + again)

    # ------------------------------------------------------------------ receiving

    def took(self, call: Call | None = None) -> None:
        """A frame was received: what is emitted in this context (or in that of `call`) from now on belongs to it."""
        ring = self.inputs.last
        execution = ring.last_execution if ring is not None else 0
        if execution or self._calls:
            self.way.direct, self._calls = False, True
            if call is None:
                call = Call()
                CURRENT.set(call)
            call.execution = execution
        if self.limit:
            self._limit(self.limit)

    def receive(self, timeout: float | None = None) -> Any:
        """Next readable value; frames that cannot be read go to the dead letters."""
        if self.limit:
            self._pause()
        inputs = self.inputs
        while True:
            try:
                value = inputs.receive(timeout)
            except FrameError as error:
                self.unreadable(error)
                continue
            if not self.way.direct or inputs.last.last_execution:
                self.took()
            return value

    def areceive(self, timeout: float | None = None) -> Coroutine[Any, Any, Any]:
        """receive() for asyncio. The caller's own context gets the call, whatever task awaits the coroutine."""
        call = Call()
        CURRENT.set(call)
        return self._areceive(timeout, call)

    async def _areceive(self, timeout: float | None, call: Call) -> Any:
        self._pause()
        while True:
            try:
                value = await self.inputs.areceive(timeout)
            except FrameError as error:
                self.unreadable(error)
                continue
            self.took(call)
            return value

    def try_receive(self) -> tuple[bool, Any]:
        """(True, value), or (False, None)."""
        if self.limit:
            self._pause()
        inputs = self.inputs
        while True:
            try:
                found = inputs.try_receive()
            except FrameError as error:
                self.unreadable(error)
                continue
            if found[0] and (not self.way.direct or inputs.last.last_execution):
                self.took()
            return found

    def ack(self) -> None:
        """Finish the frame in hand now; with checkpoints they do it."""
        if not self.inputs.covering:
            self._pause()
            self.inputs.finish()

    # ------------------------------------------------------------------ the time a frame may take

    def _limit(self, seconds: float) -> None:
        """SIGALRM after so much time, whose default action is death: the kernel does it, however stuck the code is."""
        if self.limit and seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _pause(self) -> float:
        """Time spent waiting is not the frame's. Returns the seconds that were left."""
        return signal.setitimer(signal.ITIMER_REAL, 0.0)[0] if self.limit else 0.0

    # ------------------------------------------------------------------ failing

    def failed(self, error: BaseException, unreadable: bool = False) -> None:
        """Processing the frame in hand raised: give it back, bury it, or fail the pipe. Without a frame: raise it."""
        self._pause()
        ring = self.inputs.held
        position = ring.holding if ring is not None else None
        if ring is None or position is None:
            raise error
        deliveries = ring.header()[1]
        what, told = self.assignment, describe(error)
        decided = verdict(what.on_error, deliveries, what.max_deliveries, unreadable)
        self.say(Raised("frame", told.kind, told.message, told.traceback, decided == "fail"))
        if decided == "bury":
            self._bury(ring, position, deliveries, told, 0 if isinstance(error, FrameCorrupt) else ring.last_execution)
            return
        self.through(again=True)
        ring.give_back()
        if decided == "fail":
            raise SystemExit(1)

    def _bury(self, ring: Any, position: int, deliveries: int, told: Told, execution: int) -> None:
        what, queue = self.assignment, ring.label.rpartition("/")[2]
        letter = DeadLetter(
            processor=what.processor,
            worker=what.worker,
            source=self.inputs.sources[ring],
            queue=queue,
            position=position,
            deliveries=deliveries,
            error_kind=told.kind,
            error=told.message,
            traceback=told.traceback,
            raw=ring.raw(position),
        )
        self.say(Buried(bury(Path(what.spool), letter)))
        if execution:
            record = {"processor": what.processor, "worker": what.worker, **told._asdict()}
            self.replies.send(record, DType.JSON, FOREVER, execution, 0, REPLY | ERROR)
        ring.finish(dead=True)

    def unreadable(self, error: FrameError) -> None:
        """The frame in hand is corrupt or of a type that cannot be decoded here."""
        self.failed(error, unreadable=True)

    # ------------------------------------------------------------------ ending

    def ended(self, error: BaseException | None) -> int:
        """The code returned or raised: finish, close and report, or leave all to the next life. Gives the status."""
        if isinstance(error, SystemExit) and error.code not in (None, 0):
            return error.code if isinstance(error.code, int) else 1
        if error is None or isinstance(error, (EndOfStream, SystemExit)):
            self.close()
            return 0
        told = describe(error)
        print(f"worker {self.assignment.worker} ended by an exception:\n{told.traceback}", file=sys.stderr, end="")
        if self.inputs.held is not None:
            self.failed(error)
        else:
            self.say(Raised("run", told.kind, told.message, told.traceback))
        return 1

    def close(self) -> None:
        """The code returned: finish, close our ends, say so."""
        self._pause()
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
        _current = assigned(socket.socket(fileno=fd))
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


def connected() -> Worker | None:
    """The worker this process is, if it has connected."""
    return _current


def assigned(control: socket.socket) -> Worker:
    """Wait for the assignment, load the code, attach to the queues."""
    assignment = messages.decode_to_worker(control.recv(messages.PACKET))
    assert isinstance(assignment, Assignment)
    os.environ["UPIPE_SHM"] = assignment.root
    index = f"#{assignment.index}"  # ps and top tell workers apart; the kernel keeps 15 bytes
    Path("/proc/self/comm").write_text(assignment.processor[: 15 - len(index)] + index)
    bundle = Bundle(None, None, {}, ())
    sys.path[:0] = [path for path in assignment.modules if path not in sys.path]
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
    from upipe.runtime.mapped import body

    try:
        worker = _current = assigned(control)
        code = body(worker)
    except BaseException as error:
        told = describe(error)
        control.send(messages.encode(Raised("load", told.kind, told.message, told.traceback, fatal=True)))
        return 1
    worker.say(Ready())
    try:
        code()
    except BaseException as error:
        return worker.ended(error)
    return worker.ended(None)


__all__ = ["Bundle", "Worker", "current", "run"]
