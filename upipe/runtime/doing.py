"""What the supervisor says, done: processes, queues, timers. With Hearing (what happens becomes an event) the whole
shell around a supervisor; who runs a pipe adds how it begins, what it owns and how it ends (local.py).

Nothing here waits for longer than a system call, but for the locks of a worker that was stopped inside one.
"""

from __future__ import annotations

import signal
import time
from collections import deque

from upipe.errors import QueueStuck
from upipe.graph.plan import Plan, WorkerPlan
from upipe.graph.spec import PipeSpec
from upipe.lifecycle import PIPE_ENDED
from upipe.memq import segment
from upipe.memq.queue import MemQ
from upipe.runtime import answers, messages, provision
from upipe.runtime import events as ev
from upipe.runtime.graves import Graves
from upipe.runtime.hearing import Hearing
from upipe.runtime.holdings import signal_quietly
from upipe.runtime.load import loads
from upipe.runtime.osproc import wait_dead
from upipe.runtime.supervisor import Supervisor


class Doing(Hearing):
    """Does what the supervisor of one pipe says.

    Args:
        spec: of the pipe.
        plan: what runs here; a later one may replace it.
        supervisor: of that plan.
    """

    graves: Graves
    """Made with the queues."""

    def __init__(self, spec: PipeSpec, plan: Plan, supervisor: Supervisor) -> None:
        super().__init__()
        self.spec = spec
        self.plan = plan
        self.supervisor = supervisor
        self.queues: dict[str, MemQ] = {}
        self.calls: answers.Calls = {}
        """Of this process; their frames may be buried here."""
        self._events: deque[ev.Event] = deque()
        self._handling = False

    # ------------------------------------------------------------------ for who runs a pipe

    def _tell_assignment(self, command: ev.StartWorker) -> None:
        raise NotImplementedError

    def _do_more(self, command: ev.Command) -> None:
        """A command about the pipe as a whole."""
        raise NotImplementedError

    # ------------------------------------------------------------------ deciding

    def _handle(self, event: ev.Event) -> None:
        """Let the supervisor follow an event, and do what it says. What happens meanwhile comes after, in order."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                for command in self.supervisor.handle(self._events.popleft(), time.monotonic()):
                    self._do(command)
        finally:
            self._handling = False
        due = self.supervisor.deadline()
        if due is None:
            self.held.cancel("tick")
        else:
            self.held.later("tick", due - time.monotonic(), self._callback(self._tick))

    def _tick(self) -> None:
        self._handle(ev.Tick())

    def _broke(self, error: Exception) -> None:
        """A callback raised: fail the pipe, whatever else goes wrong on the way."""
        self._events.clear()
        try:
            self._handle(ev.GaveUp(provision.told(error, self.plan)))
        except Exception as second:
            self.held.loop.call_exception_handler(
                {"message": f"uPipe: ending pipe {self.spec.name!r} failed", "exception": second}
            )
            self._close()
        if self.state in PIPE_ENDED and not self.held.pidfds:
            self._close()

    # ------------------------------------------------------------------ doing

    def _do(self, command: ev.Command) -> None:
        if isinstance(command, ev.StartWorker):
            self._fork(command)
            self._tell_assignment(command)
        elif isinstance(command, ev.KillWorker):
            if command.worker in self.held.pidfds:
                signal_quietly(self.held.pidfds[command.worker], signal.SIGKILL)
        elif isinstance(command, ev.DrainWorker):
            self._say(command.worker, messages.Drain())
        elif isinstance(command, ev.Recover):
            self._recover(command)
        elif isinstance(command, ev.DeclareEnds):
            self._declare_ends(command.worker)
        elif isinstance(command, ev.CloseEnds):
            self._close_ends(command.worker)
        else:
            self._do_more(command)

    def _worker_plan(self, worker: str) -> WorkerPlan:
        return self.supervisor.slots[worker].plan

    def _ends(self, worker: str) -> list[tuple[str, int]]:
        """(queue, producer id) of all its ends."""
        plan = self._worker_plan(worker)
        found = [(name, output.producer) for output in plan.outputs for name in output.queues]
        return [*found, (plan.replies, plan.reply_producer)]

    def _declare_ends(self, worker: str) -> None:
        for name, number in self._ends(worker):
            self.queues[name].declare_producer(number)

    def _close_ends(self, worker: str) -> None:
        for name, number in self._ends(worker):
            self.queues[name].close_producer(number)

    def _recover(self, command: ev.Recover) -> None:
        plan = self._worker_plan(command.worker)
        ends = [name for name, _ in self._ends(command.worker)]
        try:
            dead = self.graves.recover(plan, ends, command.pid, command.start)
        except QueueStuck:  # somebody was stopped inside a lock: its death gives the lock free
            self._kill_stopped()
            dead = self.graves.recover(plan, ends, command.pid, command.start)
        segment.remove_dead(command.pid, command.start)
        for execution, error in dead:
            answers.fail_call(self.calls, execution, error)
        self._count_letter(0)

    def _kill_stopped(self) -> None:
        for slot in self.supervisor.slots.values():
            if slot.name in self.held.pidfds and segment.process_state(slot.pid) in ("T", "t"):
                signal_quietly(self.held.pidfds[slot.name], signal.SIGKILL)
                wait_dead(self.held.pidfds[slot.name], 2.0)

    def _count_letter(self, size: int) -> None:
        self.graves.bytes += size
        most = self.spec.settings.dead_letter_bytes
        if self.graves.bytes > most:
            self._handle(
                ev.GaveUp(
                    f"the dead letters take {self.graves.bytes:,} bytes, more than dead_letter_bytes={most:,} allows; "
                    "read pipe.dead_letters() and mend the processor"
                )
            )

    # ------------------------------------------------------------------ autoscale

    def _scale_later(self) -> None:
        if any(one.autoscale for one in self.spec.processors):
            self.held.later("scale", self.spec.settings.autoscale.interval, self._callback(self._measure))

    def _measure(self) -> None:
        for event in loads(self.spec, self.plan, self.queues):
            if self.state in ("running", "draining"):
                self._handle(event)
        if self.state not in PIPE_ENDED:
            self._scale_later()
