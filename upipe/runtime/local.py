"""The shell around the supervisor on one host: queues, the fork server, sockets, timers. Runs in the caller's event loop.

Owner of everything it makes; `_release` lets go of all of it, at the end of the pipe, at the exit of the program or when
the pipe is forgotten. After kill -9 of the caller the fork server ends the workers, and the next start sweeps the session.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import shutil
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upipe.errors import EndOfStream, PipeError, PipeFailed, ProcessorError
from upipe.frame import DataFrame
from upipe.graph.plan import PIPE, REPLIES, RESULTS, Plan, QueuePlan, WorkerPlan
from upipe.graph.spec import PipeSpec
from upipe.lifecycle import PIPE_ENDED
from upipe.memq import segment
from upipe.memq.queue import MemQ
from upipe.runtime import messages, spool
from upipe.runtime import supervisor as sv
from upipe.runtime.messages import Assignment, Spawn
from upipe.runtime.process import ForkServer
from upipe.runtime.report import EdgeReport, ProcessorReport, Report, edge_report
from upipe.runtime.spool import Checkpoint, DeadLetter

_numbers = itertools.count(1)
DISCARD = 3


class LocalRunner:
    """One pipe on this host.

    Args:
        spec: the declared pipe, validated by `plan`.
        layout: its plan.
        codes: pickled Bundle per processor name (absent for scripts without configuration).
    """

    def __init__(self, spec: PipeSpec, layout: Plan, codes: dict[str, bytes]) -> None:
        self.spec = spec
        self.plan = layout
        self.codes = codes
        self.supervisor = sv.Supervisor(spec, layout)
        self.number = next(_numbers)
        self.queues: dict[str, MemQ] = {}
        self.calls: dict[int, asyncio.Future[Any]] = {}
        self.began = 0.0
        self.up: asyncio.Future[None] | None = None
        self.ended: asyncio.Future[None] | None = None
        self.letters: list[DeadLetter] = []
        self._letter_bytes = 0
        self._sockets: dict[str, socket.socket] = {}
        self._pidfds: dict[str, int] = {}
        self._assignments: dict[str, Assignment] = {}
        self._server: ForkServer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._scaling: asyncio.TimerHandle | None = None
        self._final: Report | None = None
        self._workers = {f"{one.processor}#{one.index}": one for one in layout.workers}
        self._release: Callable[[], object] = lambda: None

    # ------------------------------------------------------------------ starting

    async def start(self) -> None:
        """Make the queues, start the workers, return when all of them are ready.

        Raises:
            OutOfSharedMemory: before anything runs. PipeFailed: a worker cannot start.
        """
        self.loop = asyncio.get_running_loop()
        self.up, self.ended = self.loop.create_future(), self.loop.create_future()
        self.began = time.monotonic()
        session = segment.process_session()
        self.spool = session.path / f"p{self.number}"
        self._server = ForkServer(self.spec.settings.start_method)  # before the queues, so that it does not map them
        self._release = weakref.finalize(self, _release, self._server, self.spool, self.queues)
        try:
            os.makedirs(self.spool / "dead", mode=0o700)
            self._watch_server()
            commands = self.supervisor.start(time.monotonic())
            for command in commands:  # fork while the queues are made
                if isinstance(command, sv.StartWorker):
                    self._fork(command)
            self._make_queues()
            files = {name: self._write_code(data) for name, data in self.codes.items()}
            for worker in self._workers.values():
                self._assignments[f"{worker.processor}#{worker.index}"] = self._assign(worker, files)
            for command in commands:
                if isinstance(command, sv.DeclareEnds):
                    self._do(command)
            for command in commands:
                if isinstance(command, sv.StartWorker):
                    self._tell_assignment(command)
            self._scale_later()
        except BaseException:
            self._finish(self.supervisor.handle(sv.StopPipe(), time.monotonic()))
            self._close()
            raise
        done, _ = await asyncio.wait(
            [self.up, self.ended], timeout=self.spec.settings.start_deadline, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            waiting = [slot.name for slot in self.supervisor.slots.values() if not slot.was_ready]
            await self.fail(f"workers {', '.join(waiting)} were not ready within {self.spec.settings.start_deadline:g} s")
        if self.supervisor.state == "failed":
            raise PipeFailed(self.spec.name, tuple(self.supervisor.reasons))

    def _make_queues(self) -> None:
        for queue in self.plan.queues:
            self.queues[queue.name] = MemQ(
                queue.capacity, policy=queue.policy, name=f"p{self.number}.{queue.name}", supervised=True,
                allow_pickle=self.spec.settings.allow_pickle,
            )
            if queue.source == PIPE:
                self.queues[queue.name].use_producer(0, 1)

    def _write_code(self, data: bytes) -> str:
        import hashlib

        path = self.spool / f"code.{hashlib.sha256(data).hexdigest()}"
        if not path.exists():
            path.write_bytes(data)
        return str(path)

    def _assign(self, worker: WorkerPlan, files: dict[str, str]) -> Assignment:
        one = next(spec for spec in self.spec.processors if spec.name == worker.processor)
        sources = {queue.name: queue.source for queue in self.plan.queues}
        outputs = tuple(_renamed(output, self.number) for output in worker.outputs)
        return Assignment(
            self.spec.name, worker.processor, worker.index, 0, one.workers, one.kind, str(segment.root()),
            self.spool.parent.name, str(self.spool), files.get(one.name, ""),
            tuple(f"p{self.number}.{name}" for name in worker.inputs), tuple(sources[name] for name in worker.inputs),
            outputs, f"p{self.number}.{worker.replies}", worker.reply_producer, one.on_error, one.max_deliveries,
            one.resume, one.checkpoint_every, one.takes_config, self.spec.settings.emit_wait, tuple(sys.path), os.getcwd(),
        )

    def _fork(self, command: sv.StartWorker) -> None:
        ours, theirs = messages.pair()
        worker = self._workers[command.worker]
        one = next(spec for spec in self.spec.processors if spec.name == worker.processor)
        line = (one.interpreter or sys.executable, one.entry) if one.kind == "entry" else ()
        assert self._server is not None
        self._server.spawn(Spawn(command.worker, line, {}), theirs)
        theirs.close()
        ours.setblocking(False)
        self._forget_socket(command.worker)
        self._sockets[command.worker] = ours
        self.loop.add_reader(ours.fileno(), self._hear, command.worker, ours)

    def _tell_assignment(self, command: sv.StartWorker) -> None:
        import msgspec

        assignment = msgspec.structs.replace(self._assignments[command.worker], epoch=command.epoch)
        self._say(command.worker, assignment)

    def _say(self, worker: str, message: messages.ToWorker) -> None:
        try:
            self._sockets[worker].send(messages.encode(message))
        except (BrokenPipeError, ConnectionResetError, KeyError):
            pass  # it died; its exit is being reported

    # ------------------------------------------------------------------ hearing

    def _watch_server(self) -> None:
        assert self._server is not None
        self.loop.add_reader(self._server.sock.fileno(), self._hear_server)

    def _hear_server(self) -> None:
        assert self._server is not None
        try:
            heard = self._server.read()
        except EOFError:
            self._replace_server()
            return
        for message, pidfd in heard:
            if isinstance(message, messages.Spawned):
                assert pidfd is not None
                self._forget_pidfd(message.worker)
                self._pidfds[message.worker] = pidfd
                self._handle(sv.Spawned(message.worker, message.pid, message.start))
            elif isinstance(message, messages.Paused):
                self._handle(sv.Paused(message.worker, message.paused))
            else:
                self._drain_socket(message.worker)  # what it said before it ended comes first
                self._forget_socket(message.worker)
                self._forget_pidfd(message.worker)
                self._handle(sv.Exited(message.worker, message.pid, message.status, message.cpu_seconds))

    def _replace_server(self) -> None:
        """The fork server died, and by PR_SET_PDEATHSIG its workers with it: prove that, start another, restart them."""
        assert self._server is not None
        self.loop.remove_reader(self._server.sock.fileno())
        self._server.close()
        lost = [slot for slot in self.supervisor.slots.values() if slot.alive]
        for slot in lost:
            fd = self._pidfds.get(slot.name)
            if fd is not None:
                signal_quietly(fd, signal.SIGKILL)
                select.select([fd], [], [], 2.0)
        if self.supervisor.state in PIPE_ENDED:
            self._close()
            return
        self._server = ForkServer("exec")
        self._release = weakref.finalize(self, _release, self._server, self.spool, self.queues)
        self._watch_server()
        for slot in lost:
            self._drain_socket(slot.name)
            self._handle(sv.Exited(slot.name, slot.pid, -signal.SIGKILL, 0.0))

    def _hear(self, worker: str, sock: socket.socket) -> None:
        while sock.fileno() >= 0:
            try:
                data = sock.recv(messages.PACKET)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                if sock.fileno() >= 0:
                    self.loop.remove_reader(sock.fileno())
                return
            message = messages.decode_from_worker(data)
            if isinstance(message, messages.Ready):
                self._handle(sv.Ready(worker))
            elif isinstance(message, messages.Done):
                self._handle(sv.Done(worker))
            elif isinstance(message, messages.Raised):
                said = message
                self._handle(sv.Raised(worker, said.phase, said.kind, said.message, said.traceback, said.fatal))
            else:
                self._count_letter(message.size)

    def _drain_socket(self, worker: str) -> None:
        sock = self._sockets.get(worker)
        if sock is not None:
            self._hear(worker, sock)

    def _count_letter(self, size: int) -> None:
        self._letter_bytes += size
        if self._letter_bytes > self.spec.settings.dead_letter_bytes:
            self._handle(sv.GaveUp(
                f"the dead letters take {self._letter_bytes:,} bytes, more than dead_letter_bytes="
                f"{self.spec.settings.dead_letter_bytes:,} allows; read pipe.dead_letters() and mend the processor"
            ))

    # ------------------------------------------------------------------ deciding and doing

    def _handle(self, event: sv.Event) -> None:
        self._finish(self.supervisor.handle(event, time.monotonic()))

    def _finish(self, commands: list[sv.Command]) -> None:
        for command in commands:
            self._do(command)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.supervisor.deadline()
        if due is not None:
            self._timer = self.loop.call_later(max(0.0, due - time.monotonic()), self._handle, sv.Tick())

    def _do(self, command: sv.Command) -> None:
        if isinstance(command, sv.StartWorker):
            self._fork(command)
            self._tell_assignment(command)
        elif isinstance(command, sv.KillWorker):
            fd = self._pidfds.get(command.worker)
            if fd is not None:
                signal_quietly(fd, signal.SIGKILL)
        elif isinstance(command, sv.DrainWorker):
            self._say(command.worker, messages.Drain())
        elif isinstance(command, sv.Recover):
            self._recover(command)
        elif isinstance(command, sv.DeclareEnds):
            for name, number in self._ends(command.worker):
                self.queues[name].declare_producer(number)
        elif isinstance(command, sv.CloseEnds):
            for name, number in self._ends(command.worker):
                self.queues[name].close_producer(number)
        elif isinstance(command, sv.DiscardInputs):
            for queue in self.plan.queues:
                if queue.target == command.processor:
                    self.queues[queue.name].set_policy(DISCARD)
        elif isinstance(command, sv.CloseInput):
            self.close_input()
        elif isinstance(command, sv.PipeUp):
            if self.up is not None and not self.up.done():
                self.up.set_result(None)
        else:
            self._pipe_ended(command)

    def _ends(self, worker: str) -> list[tuple[str, int]]:
        plan = self._workers[worker]
        found = [(name, output.producer) for output in plan.outputs for name in output.queues]
        return [*found, (plan.replies, plan.reply_producer)]

    def close_input(self) -> None:
        """Close the pipe's own end into its roots. Idempotent."""
        for queue in self.plan.queues:
            if queue.source == PIPE and queue.name in self.queues:
                self.queues[queue.name].close_producer(0)

    def _recover(self, command: sv.Recover) -> None:
        plan = self._workers[command.worker]
        one = next(spec for spec in self.spec.processors if spec.name == plan.processor)
        saved = spool.load_checkpoint(spool.checkpoint_path(self.spool, plan.processor, plan.index))
        covered = (saved or Checkpoint(b"", {})).covered
        for name in plan.inputs:
            ring = self.queues[name]
            label = f"p{self.number}.{name}"
            for position in ring.recover(command.pid, one.max_deliveries, covered.get(label, ())):
                self._bury(ring, name, position, plan)
        for name, _ in self._ends(command.worker):
            self.queues[name].recover(command.pid)
        segment.remove_dead(command.pid, command.start)

    def _bury(self, ring: MemQ, name: str, position: int, plan: WorkerPlan) -> None:
        """A frame whose holders died too often: it goes to the dead letters, its caller is told."""
        worker = f"{plan.processor}#{plan.index}"
        raw = ring.raw(position)
        frame = DataFrame.unpack(raw, lazy=True)
        source = next(queue.source for queue in self.plan.queues if queue.name == name)
        text = f"its worker died while processing it, {frame.deliveries} times"
        letter = DeadLetter(
            plan.processor, worker, source, f"p{self.number}.{name}", position, frame.deliveries, "WorkerDied", text, "", raw
        )
        self._count_letter(spool.bury(self.spool, letter))
        ring.end(position, True)
        future = self.calls.pop(frame.execution, None)
        if future is not None and not future.done():
            future.set_exception(ProcessorError(plan.processor, worker, "WorkerDied", text))

    # ------------------------------------------------------------------ ending

    def _pipe_ended(self, command: sv.PipeEnded) -> None:
        if command.state == "completed":
            self._close()
        else:
            self.loop.call_later(self.spec.settings.stop_deadline, self._close)
            self._close_when_dead()

    def _close_when_dead(self) -> None:
        """After a failure or stop: when every worker was reaped (their exits are accounted for), or at the deadline."""
        if not self._pidfds:
            self._close()
        elif self._final is None:
            fd = next(iter(self._pidfds.values()))
            copy = os.dup(fd)  # the entry is closed when the exit is heard

            def died() -> None:
                self.loop.remove_reader(copy)
                os.close(copy)
                self.loop.call_soon(self._close_when_dead) if not self._pidfds else self.loop.call_later(0.01, self._close_when_dead)

            self.loop.add_reader(copy, died)

    def _close(self) -> None:
        """Snapshot, then let go of everything. Idempotent."""
        if self._final is not None:
            return
        self._final = self._snapshot()
        if (self.spool / "dead").exists():
            self.letters = spool.letters(self.spool)
        for timer in (self._timer, self._scaling):
            if timer is not None:
                timer.cancel()
        if self._server is not None and self._server.sock.fileno() >= 0:
            self.loop.remove_reader(self._server.sock.fileno())
        for worker in list(self._sockets):
            self._forget_socket(worker)
        for worker in list(self._pidfds):
            self._forget_pidfd(worker)
        for queue in self.plan.queues:
            if queue.name in self.queues:
                for number in queue.producers:
                    self.queues[queue.name].close_producer(number)
        self._release()
        reason = PipeFailed(self.spec.name, tuple(self.supervisor.reasons)) if self.supervisor.state == "failed" else None
        for future in self.calls.values():
            if not future.done() and self.supervisor.state != "completed":
                future.set_exception(reason or PipeError(f"pipe {self.spec.name!r} was stopped before it answered"))
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)

    async def stop(self) -> None:
        """End every worker now."""
        self._handle(sv.StopPipe())
        if self.ended is not None:
            await self.ended

    async def drain(self, timeout: float) -> bool:
        """Take no more in, finish the rest; False (and stopped) when that took longer than timeout seconds."""
        assert self.ended is not None
        self._handle(sv.DrainPipe())
        done, _ = await asyncio.wait([self.ended], timeout=timeout)
        if not done:
            await self.stop()
        return bool(done)

    async def fail(self, reason: str) -> None:
        """Give up."""
        self._handle(sv.GaveUp(reason))
        assert self.ended is not None
        await self.ended

    def _forget_socket(self, worker: str) -> None:
        sock = self._sockets.pop(worker, None)
        if sock is not None:
            self.loop.remove_reader(sock.fileno())
            sock.close()

    def _forget_pidfd(self, worker: str) -> None:
        fd = self._pidfds.pop(worker, None)
        if fd is not None:
            os.close(fd)

    # ------------------------------------------------------------------ autoscale

    def _scale_later(self) -> None:
        if any(one.autoscale for one in self.spec.processors):
            self._scaling = self.loop.call_later(self.spec.settings.autoscale.interval, self._measure)

    def _measure(self) -> None:
        for one in self.spec.processors:
            if one.autoscale and self.supervisor.state in ("running", "draining"):
                stats = [self.queues[queue.name].stats() for queue in self.plan.queues if queue.target == one.name]
                share = max((found.depth / found.capacity for found in stats), default=0.0)
                waiting = sum(self.queues[queue.name].qsize() for queue in self.plan.queues if queue.target == one.name)
                age = max((found.oldest_age() for found in stats), default=0.0) if waiting else 0.0
                self._handle(sv.Load(one.name, share, age, waiting))
        if self.supervisor.state not in PIPE_ENDED:
            self._scale_later()

    # ------------------------------------------------------------------ answering

    async def answer_calls(self) -> None:
        """Hand replies to the calls that wait for them, until the pipe ends."""
        replies = self.queues[REPLIES]
        while True:
            try:
                value = await replies.aget()
            except EndOfStream:
                break
            future = self.calls.pop(replies.last_execution, None)
            if future is None or future.done():
                continue  # a later result of the same call, or its caller gave up
            if replies.last_flags & 4:
                future.set_exception(
                    ProcessorError(value["processor"], value["worker"], value["kind"], value["message"], value["traceback"])
                )
            else:
                future.set_result(value)
        for future in self.calls.values():
            if not future.done():
                future.set_exception(PipeError(f"pipe {self.spec.name!r} ended without an answer to this call"))

    @property
    def results(self) -> MemQ:
        """Queue of what the ends emit."""
        return self.queues[RESULTS]

    # ------------------------------------------------------------------ reporting

    def report(self) -> Report:
        """Now, or as it was at the end."""
        return self._final if self._final is not None else self._snapshot()

    def dead_letters(self) -> list[DeadLetter]:
        """Frames that could not be processed so far."""
        return list(self.letters) if self._final is not None else spool.letters(self.spool)

    def _snapshot(self) -> Report:
        seconds = time.monotonic() - self.began
        edges: dict[tuple[str, str], list[QueuePlan]] = {}
        for queue in self.plan.queues:
            if queue.name != REPLIES and queue.name in self.queues:
                edges.setdefault(queue.edge, []).append(queue)
        told = {
            edge: edge_report(*edge, [self.queues[queue.name].stats() for queue in queues], seconds)
            for edge, queues in edges.items()
        }
        shown = [one for edge, one in told.items() if one.emitted or edge[0] not in (PIPE, "*")]
        processors = tuple(self._processor(one.name, told) for one in self.spec.processors)
        letters = sum(one.dead for one in told.values())
        return Report(
            pipe=self.spec.name, state=self.supervisor.state, seconds=seconds, processors=processors, edges=tuple(shown),
            dead_letters=letters,
        )

    def _processor(self, name: str, edges: dict[tuple[str, str], EdgeReport]) -> ProcessorReport:
        crew = self.supervisor.crews[name]
        inputs = [edge for (_, target), edge in edges.items() if target == name]
        out: dict[str, int] = {}
        size = 0
        for worker in self.plan.workers:
            if worker.processor == name:
                for output in worker.outputs:
                    sent = sum(self.queues[queue].emitted(output.producer) for queue in output.queues if queue in self.queues)
                    out[output.target] = out.get(output.target, 0) + sent
        for target, frames in out.items():
            edge = edges.get((name, target)) or edges.get(("*", target))
            if edge is not None and edge.emitted:
                size += edge.bytes * frames // edge.emitted
        running = sum(1 for slot in crew.slots if slot.alive)
        return ProcessorReport(
            name=name, workers=running or crew.spec.workers, frames_in=sum(edge.finished + edge.dead for edge in inputs),
            frames_out=max(out.values(), default=0), bytes_in=sum(edge.bytes for edge in inputs), bytes_out=size,
            restarts=crew.deaths, redeliveries=sum(edge.redelivered for edge in inputs),
            dead_letters=sum(edge.dead for edge in inputs), cpu_seconds=crew.cpu_seconds,
        )


def _renamed(output: Any, number: int) -> Any:
    import msgspec

    return msgspec.structs.replace(output, queues=tuple(f"p{number}.{name}" for name in output.queues))


def signal_quietly(pidfd: int, number: int) -> None:
    """Signal a process that may have ended."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass  # it ended


def _release(server: ForkServer, spool_path: Path, queues: dict[str, MemQ]) -> None:
    """Let go of what the operating system holds for a pipe. Mapped queues stay readable; their names go."""
    server.close()
    for queue in queues.values():
        queue.unlink()
    shutil.rmtree(spool_path, ignore_errors=True)
    segment.sweep()  # the sessions of its workers


