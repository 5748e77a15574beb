"""A pipe on one host, in the caller's process and event loop: how it begins, what it has, how it ends. The shell around
its supervisor is hearing.py and doing.py. Nothing here waits in the loop for longer than a system call, but for the
end.

What it owns lies in `Holdings`: let go of at the end of the pipe, at the exit of the program or when the pipe is
forgotten.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import time
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from upipe.errors import PipeError, PipeFailed
from upipe.graph.plan import PIPE, REPLIES, RESULTS, Plan
from upipe.graph.spec import PipeSpec
from upipe.memq.queue import MemQ
from upipe.runtime import answers, provision, snapshot, spool
from upipe.runtime import events as ev
from upipe.runtime.doing import Doing
from upipe.runtime.graves import Graves
from upipe.runtime.holdings import DISCARD, Holdings, abandon, warn_no_more_at_exit
from upipe.runtime.messages import Assignment
from upipe.runtime.report import Report
from upipe.runtime.spool import DeadLetter
from upipe.runtime.supervisor import Supervisor

_numbers = itertools.count(1)


class LocalRunner(Doing):
    """One pipe on this host.

    Args:
        spec: the declared pipe, validated by `plan`.
        layout: its plan.
        codes: pickled Bundle per processor name (absent for scripts without configuration).
    """

    def __init__(self, spec: PipeSpec, layout: Plan, codes: dict[str, bytes]) -> None:
        super().__init__(spec, layout, Supervisor(spec, layout))
        self.codes = codes
        self.number = next(_numbers)
        self.up: asyncio.Future[None] | None = None
        self.ended: asyncio.Future[None] | None = None
        self.began = time.monotonic()
        self._assignments: dict[str, Assignment] = {}
        self._letters: list[DeadLetter] = []
        self._final: Report | None = None

    # ------------------------------------------------------------------ starting

    async def start(self) -> None:
        """Make the queues, start the workers, return when all of them are ready. When it raises, nothing is left.

        Raises:
            OutOfSharedMemory: before anything runs. PipeFailed: a worker cannot start.
        """
        self.loop = asyncio.get_running_loop()
        self.up, self.ended = self.loop.create_future(), self.loop.create_future()
        self.began = time.monotonic()
        commands = self.supervisor.start(self.began)
        try:
            self._hold()
            self._launch(commands)
            await self._wait_until_up()
        except BaseException as error:
            self._give_up_start(error)
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise PipeFailed(self.spec.name, self.reasons) from error
            raise

    def _hold(self) -> None:
        self.held = Holdings(self.loop, self.number, [queue for queue in self.plan.queues if PIPE in queue.edge])
        self.queues = self.held.queues
        self._finalizer = weakref.finalize(self, abandon, self.held, self.spec.name)
        warn_no_more_at_exit()
        self.graves = Graves(self.spec, partial(provision.label, self.number), self.held.spool, self.queues)
        self.graves.sources.update((queue.name, queue.source) for queue in self.plan.queues)

    def _launch(self, commands: list[ev.Command]) -> None:
        os.makedirs(self.held.spool / "dead", mode=0o700)
        self._start_server(self.spec.settings.start_method)  # before the queues, so that it does not map them
        starting = [command for command in commands if isinstance(command, ev.StartWorker)]
        for starter in starting:  # the server forks while the queues are made
            self._fork(starter)
        for queue in self.plan.queues:
            self.queues[queue.name] = provision.make_queue(
                queue, self.number, provision.pickle_allowed(self.spec, queue)
            )
        for queue in self.held.own:
            self.queues[queue.name].bell(queue.source == PIPE)  # now, when a lack of descriptors is an error of start()
        files = {name: provision.write_code(self.held.spool, data) for name, data in self.codes.items()}
        self._assignments = provision.assignments(self.spec, self.plan, self.number, self.held.spool, files)
        for command in commands:
            if isinstance(command, ev.DeclareEnds):
                self._do(command)
        for starter in starting:
            self._tell_assignment(starter)
        self._scale_later()

    async def _wait_until_up(self) -> None:
        assert self.up is not None and self.ended is not None
        limit = self.spec.settings.start_deadline
        await asyncio.wait([self.up, self.ended], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not self.up.done() and not self.ended.done():
            slots = self.supervisor.slots.values()
            waiting = [slot.name for slot in slots if not slot.was_ready and slot.spec.kind != "entry"]
            self._handle(
                ev.GaveUp(f"workers {', '.join(waiting)} were not ready within {limit:g} s (settings.start_deadline)")
            )
            await self.ended
        if self.state == "failed":
            await self.ended
            raise PipeFailed(self.spec.name, self.reasons)

    def _give_up_start(self, error: BaseException) -> None:
        event = ev.GaveUp(provision.told(error, self.plan)) if isinstance(error, Exception) else ev.StopPipe()
        self.supervisor.handle(event, time.monotonic())
        if hasattr(self, "graves"):
            self._close()

    def _tell_assignment(self, command: ev.StartWorker) -> None:
        self._say(command.worker, msgspec.structs.replace(self._assignments[command.worker], epoch=command.epoch))

    # ------------------------------------------------------------------ doing

    def _do_more(self, command: ev.Command) -> None:
        if isinstance(command, ev.DiscardInputs):
            for queue in self.plan.queues:
                if queue.target == command.processor:
                    self.queues[queue.name].set_policy(DISCARD)
        elif isinstance(command, ev.CloseInput):
            self.close_input()
        elif isinstance(command, ev.PipeUp):
            if self.up is not None and not self.up.done():
                self.up.set_result(None)
        elif isinstance(command, ev.PipeEnded):
            self._pipe_ended(command)

    def close_input(self) -> None:
        """Close the pipe's own end into its roots. Idempotent."""
        for queue in self.plan.queues:
            if queue.source == PIPE and queue.name in self.queues:
                self.queues[queue.name].close_producer(0)

    # ------------------------------------------------------------------ ending

    def _pipe_ended(self, command: ev.PipeEnded) -> None:
        if command.state == "completed" or not self.held.pidfds:
            self._close()
        else:  # when every exit was heard, so that the books are right, or at the deadline
            self.held.later("end", self.spec.settings.stop_deadline, self._callback(self._close))

    def _close(self) -> None:
        """End what still runs, take the last snapshot, let go of everything. Idempotent."""
        if self._final is not None:
            return
        self._finalizer.detach()
        try:
            self.held.end_processes()
            self._final = self._snapshot()
            if (self.held.spool / "dead").exists():
                self._letters = spool.letters(self.held.spool)
        finally:
            self.held.release()
            if self.state == "failed":
                answers.fail_all(self.calls, PipeFailed(self.spec.name, self.reasons))
            elif self.state == "stopped":
                answers.fail_all(self.calls, PipeError(f"pipe {self.spec.name!r} was stopped before it answered"))
            if self.ended is not None and not self.ended.done() and not self.loop.is_closed():
                self.ended.set_result(None)

    async def stop(self) -> None:
        """End every worker now. Also from another loop, once the pipe's own has ended."""
        if self.ended is None:
            return
        if self.loop.is_closed():
            self.supervisor.handle(ev.StopPipe(), time.monotonic())
            self._close()
            return
        self._handle(ev.StopPipe())
        await self.ended

    async def drain(self, timeout: float) -> bool:
        """Take no more in, finish the rest; False (and stopped) when that took longer than timeout seconds."""
        assert self.ended is not None
        self._handle(ev.DrainPipe())
        done, _ = await asyncio.wait([self.ended], timeout=timeout)
        if not done:
            await self.stop()
        return bool(done)

    # ------------------------------------------------------------------ telling

    def answer_calls(self) -> Coroutine[Any, Any, None]:
        """Hand replies to the calls that wait for them, until the pipe ends."""
        roots = sum(queue.source == PIPE for queue in self.plan.queues)
        return answers.answer(self.spec.name, self.queues[REPLIES], self.calls, roots)

    def watch(self, changed: Callable[[], None]) -> None:
        """The queues of the pipe's own input are the same all the time."""

    @property
    def results(self) -> MemQ:
        """Queue of what the ends emit."""
        return self.queues[RESULTS]

    def report(self) -> Report:
        """Now, or as it was at the end."""
        return self._final if self._final is not None else self._snapshot()

    def dead_letters(self) -> list[DeadLetter]:
        """Frames that could not be processed so far."""
        return list(self._letters) if self._final is not None or self.ended is None else spool.letters(self.held.spool)

    def _snapshot(self) -> Report:
        return snapshot.report(self.plan, self.supervisor, self.queues, time.monotonic() - self.began)
