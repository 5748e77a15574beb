"""A pipe on one node: the workers and queues of the keeper, which follow the plans of the coordinator. The shell around
NodeSupervisor is runtime/hearing.py and runtime/doing.py.

What it owns lies in `Holdings` (fork server, workers, spool) and in NodeQueues. A plan is followed in one go, in the
order of layout.rewire; only what has to wait for a worker comes later: the next life of one that is being killed, and
the removal of a queue that one is about to attach.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import msgspec

from upipe.cluster.keeper_output import Output
from upipe.cluster.keeper_queues import NodeQueues, epochs, renewed
from upipe.cluster.keeper_supervisor import NodeSupervisor, worker_name
from upipe.cluster.keeper_written import Written
from upipe.cluster.keeping import SPOOL, Job, KeeperNews, WorkerState
from upipe.cluster.layout import NodePlan, Step, rewire
from upipe.cluster.record import Crew
from upipe.errors import QueueError
from upipe.graph.plan import WorkerPlan
from upipe.lifecycle import PIPE_ENDED
from upipe.runtime import entry, messages, provision
from upipe.runtime import events as ev
from upipe.runtime.doing import Doing
from upipe.runtime.graves import Graves
from upipe.runtime.holdings import Holdings
from upipe.runtime.slots import Slot

RETRY = 0.25
"""Seconds until a worker that does not listen (stopped, or deep in native code) is told its queues again."""


class NodeRunner(Doing):
    """One pipe on this node.

    Args:
        job: what runs.
        output: takes what the workers print.
        on_change: called when news() may have changed.
        on_end: called once everything has ended, after stop().
    """

    supervisor: NodeSupervisor

    def __init__(
        self, job: Job, output: Output, on_change: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        supervisor = NodeSupervisor(job.spec)
        super().__init__(job.spec, supervisor.plan, supervisor)
        self.job = job
        self.output = output
        self.node: NodePlan | None = None
        self.fence = (0, 0)
        self.present = True
        self.stopping = False
        self.held = Holdings(asyncio.get_running_loop(), 1, [])
        assert self.held.spool.name == SPOOL
        self.held.queues = self.queues
        self.written = Written(self.queues)
        self.rings = NodeQueues(job.spec, self.queues, self._needed, self.written.dropped)
        self.graves = Graves(job.spec, self.rings.label, self.held.spool, self.queues)
        self._on_change = on_change
        self._on_end = on_end
        self._open: dict[str, set[tuple[str, int]]] = {}
        """Ends, (queue, producer id), that a worker may have open: those of its plan, and of earlier plans until it is
        known to have closed them."""
        self._read: dict[str, set[str]] = {}
        """Queues that a worker may hold frames of, likewise."""
        self._assigned: dict[str, set[str]] = {}
        """Names in the session that the assignment of a worker has."""
        self._stale: set[str] = set()
        """Workers that are to be told their queues once they are ready, or listen."""
        self._targets: dict[str, str] = {}
        """Processor that reads each queue there is or was, by its name in the session."""
        self._letters: dict[str, int] = {}
        """By processor."""
        self._buried = False
        """Letters were written since they were counted."""

    def begin(self) -> None:
        """Before the first plan. Raises OSError: no process or descriptor can be had."""
        os.makedirs(self.held.spool / "dead", mode=0o700)
        self.supervisor.start(time.monotonic())
        self._start_server(self.spec.settings.start_method)  # before the queues, so that it does not map them
        self._scale_later()

    def _start_server(self, method: str) -> None:
        with self.output.as_own():
            super()._start_server(method)

    # ------------------------------------------------------------------ following

    def follow(self, fence: tuple[int, int], plan: NodePlan | None) -> bool:
        """Do what a plan says; None: end everything. False: its fence is lower than that of the plan that is followed.

        What cannot be done fails the pipe: see news().failed.
        """
        if fence < self.fence or (self.stopping and plan is not None):
            return False
        if plan is None:
            self.fence = fence
            self.stop()
        elif fence > self.fence and self.state not in PIPE_ENDED:
            try:
                self._rearrange(plan)
            except Exception as error:
                self._broke(error)
            if self.state not in PIPE_ENDED:
                self.fence = fence
        self._on_change()
        return True

    def _rearrange(self, plan: NodePlan) -> None:
        old, self.node, self.plan = self.node, plan, plan.plan
        if plan.draining and not (old and old.draining):
            self._handle(ev.DrainPipe())
        steps = rewire(old, plan)
        fresh = renewed(old, plan)
        for name in fresh:
            self.rings.drop(name)
            self._make(plan, name)
        for step in steps:
            self._step(plan, step)
        changed = {step.name for step in steps if step.what in ("start", "rewire")}
        for worker in plan.workers:
            if worker_name(worker) not in changed and set(fresh) & set(worker.inputs):
                self._handle(ev.Changed(worker))
        stay = [name for name in (old.leaving if old else ()) if name not in plan.leaving]
        for worker in plan.workers:
            if worker_name(worker) in stay:  # it was to go elsewhere, and is to stay now: it begins again
                self._handle(ev.Joined(worker))
        if any(step.what == "start" for step in steps) or stay:
            self.held.later("up", self.spec.settings.start_deadline, self._callback(self._check_up))

    def _step(self, plan: NodePlan, step: Step) -> None:
        what, name = step.what, step.name
        if what == "make":
            self._make(plan, name)
        elif what == "promote":
            self.rings.promote(name)
        elif what == "discard":
            self.rings.discard(name)
        elif what == "end":
            self.rings.end(name)
        elif what == "drop":
            self.rings.drop(name)
        elif what == "start":
            self._handle(ev.Joined(_worker(plan, name)))
        elif what == "rewire":
            self._handle(ev.Changed(_worker(plan, name)))
        elif what == "leave":
            self._handle(ev.Leaving(name))
        elif what == "kill":
            self._handle(ev.Removed(name))
        else:
            assert what in ("mirror", "unmirror"), step  # the agent's

    def _make(self, plan: NodePlan, name: str) -> None:
        here = next(queue for queue in plan.queues if queue.plan.name == name)
        self.graves.sources[name] = here.plan.source
        self.rings.make(here, epochs(plan).get(name, 0))
        self._targets[self.rings.label(name)] = here.plan.target

    def _check_up(self) -> None:
        if not self.supervisor.up and self.state not in PIPE_ENDED:
            slots = self.supervisor.present()
            waiting = [slot.name for slot in slots if slot.alive and not slot.was_ready and slot.spec.kind != "entry"]
            limit = self.spec.settings.start_deadline
            self._handle(
                ev.GaveUp(f"workers {', '.join(waiting)} were not ready within {limit:g} s (settings.start_deadline)")
            )

    # ------------------------------------------------------------------ workers

    def _handle(self, event: ev.Event) -> None:
        super()._handle(event)
        if isinstance(event, ev.Ready) and event.worker in self._stale:
            self._rewire(event.worker)
        if isinstance(event, ev.Ready | ev.Exited | ev.Refused) and self.rings.dropping:
            self.rings.drop_unneeded()
        self._on_change()

    def _needed(self, label: str) -> bool:
        slots = self.supervisor.slots.values()
        return any(slot.alive and not slot.was_ready and label in self._assigned.get(slot.name, ()) for slot in slots)

    def _request(self, worker: str) -> messages.Spawn:
        one = self.supervisor.slots[worker].spec
        if one.kind != "entry":
            return super()._request(worker)
        path = os.pathsep.join([*self.job.sys_path, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = entry.command(one.interpreter, self.job.scripts[one.name])
        return messages.Spawn(worker, command, {"PYTHONPATH": path} if path else {})

    def _tell_assignment(self, command: ev.StartWorker) -> None:
        slot = self.supervisor.slots[command.worker]
        told = provision.assignment(
            self.spec, slot.spec, slot.plan, self.graves.sources, self.rings.label, self.held.spool
        )
        code = self.job.code.get(slot.spec.name, "")
        told = msgspec.structs.replace(
            told, code=code, epoch=command.epoch, rewires=True, modules=self.job.sys_path, emitted=self._note(slot)
        )
        used = {told.replies, *told.inputs, *(name for output in told.outputs for name in output.queues)}
        self._assigned[command.worker] = used
        self._read.setdefault(command.worker, set()).update(slot.plan.inputs)
        self._stale.discard(command.worker)
        self._say(command.worker, told)

    def _note(self, slot: Slot) -> dict[str, int]:
        """What a source that resumes writes, and how far it came elsewhere."""
        if not slot.spec.resume:
            return {}
        self.written.note(slot.plan)
        return self.written.before(slot.plan)

    def _rewire(self, worker: str) -> None:
        """Tell a worker its queues: now, when it is ready, or as soon as it listens."""
        slot = self.supervisor.slots[worker]
        self._note(slot)
        if not slot.alive:
            self._settle_ends(worker)
            return
        self._read.setdefault(worker, set()).update(slot.plan.inputs)
        self._stale.add(worker)
        if not slot.was_ready:
            return
        inputs = slot.plan.inputs
        message = messages.Rewire(
            tuple(self.rings.label(name) for name in inputs),
            tuple(self.graves.sources[name] for name in inputs),
            provision.outputs(slot.plan, self.rings.label),
        )
        try:
            self._say(worker, message)
            self._stale.discard(worker)
        except BlockingIOError:
            self.held.later(f"rewire {worker}", RETRY, self._callback(self._rewire_again), worker)

    def _rewire_again(self, worker: str) -> None:
        if worker in self._stale and worker in self.supervisor.slots:
            self._rewire(worker)

    # ------------------------------------------------------------------ doing

    def _do_more(self, command: ev.Command) -> None:
        if isinstance(command, ev.RewireWorker):
            self._rewire(command.worker)
        elif isinstance(command, ev.PipeEnded):
            if not self.held.pidfds:
                self._close()
            else:  # when every exit was heard, so that what they held is given back, or at the deadline
                self.held.later("end", self.spec.settings.stop_deadline, self._callback(self._close))

    def _worker_plan(self, worker: str) -> WorkerPlan:
        """With all inputs that it may hold frames of."""
        plan = super()._worker_plan(worker)
        inputs = dict.fromkeys((*plan.inputs, *sorted(self._read.get(worker, ()))))
        return msgspec.structs.replace(plan, inputs=tuple(name for name in inputs if name in self.queues))

    def _ends(self, worker: str) -> list[tuple[str, int]]:
        """All that it may have open."""
        known = {*super()._ends(worker), *self._open.get(worker, ())}
        return sorted((name, number) for name, number in known if name in self.queues)

    def _declare_ends(self, worker: str) -> None:
        known = self._open.setdefault(worker, set())
        for name, number in super()._ends(worker):
            if (name, number) not in known:
                known.add((name, number))
                self.queues[name].declare_producer(number)

    def _close_ends(self, worker: str) -> None:
        super()._close_ends(worker)
        self._open.pop(worker, None)
        self._read.pop(worker, None)
        self._assigned.pop(worker, None)

    def _recover(self, command: ev.Recover) -> None:
        super()._recover(command)
        self._settle_ends(command.worker)

    def _settle_ends(self, worker: str) -> None:
        """No process runs: what is not in its plan any more is closed, and nothing of it is held."""
        plan = set(super()._ends(worker))
        for name, number in self._open.get(worker, set()) - plan:
            if name in self.queues:
                self.queues[name].close_producer(number)
        self._open[worker] = self._open.get(worker, set()) & plan
        self._read.pop(worker, None)

    def forget_agent(self, pid: int, start: int) -> bool:
        """An agent let go: if it died, give back its places in the queues. False: it has some, and is not dead."""
        done = True
        for ring in () if not self.present else (*self.queues.values(), *self.rings.dropping):
            try:
                ring.recover(pid, start)
            except QueueError:
                done = False  # it lives, or is about to die
        return done

    # ------------------------------------------------------------------ ending

    def stop(self) -> None:
        """End everything: on_end() is called then. Idempotent."""
        if self.stopping:
            return
        self.stopping = True
        if self.state in PIPE_ENDED:
            if not self.held.pidfds:
                self._close()
            return
        self._handle(ev.StopPipe())

    def _close(self) -> None:
        """The workers have ended, or shall now. What they left is kept until stop(): the agent may read it."""
        self.held.end_processes()
        self._on_change()
        if self.stopping and self.present:
            self._count_letters()
            self.rings.release()
            self.held.release()
            self.present = False
            self._on_end()

    # ------------------------------------------------------------------ telling

    def news(self) -> KeeperNews:
        """All there is to say."""
        supervisor = self.supervisor
        session = self.held.spool.parent.name
        return KeeperNews(
            fence=self.fence,
            present=self.present,
            session=session,
            labels={name: f"{session}/{label}" for name, label in self.rings.labels.items()} if self.present else {},
            ended=supervisor.ended(),
            left=supervisor.left(),
            failed="\n".join(self.reasons),
            up=supervisor.up,
            crews=self._crews(),
            workers=tuple(
                WorkerState(slot.name, slot.pid if slot.alive else 0, slot.machine.state, slot.epoch)
                for slot in supervisor.present()
            ),
        )

    def _crews(self) -> dict[str, Crew]:
        self._count_letters()
        return {
            name: Crew(
                sum(slot.alive for slot in crew.slots), crew.deaths, crew.cpu_seconds, self._letters.get(name, 0)
            )
            for name, crew in self.supervisor.crews.items()
            if crew.slots
        }

    def _count_letter(self, size: int) -> None:
        self._buried = True
        super()._count_letter(size)
        self._on_change()

    def _count_letters(self) -> None:
        """By their files: one that is written again after a death counts once."""
        if not self._buried or not self.present:
            return
        self._buried = False
        self._letters = {}
        for file in os.listdir(self.held.spool / "dead"):
            target = self._targets.get(file.rpartition(".")[0])
            if target is not None:  # else it is being written
                self._letters[target] = self._letters.get(target, 0) + 1


def _worker(plan: NodePlan, name: str) -> WorkerPlan:
    return next(worker for worker in plan.workers if worker_name(worker) == name)
