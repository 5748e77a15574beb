"""The supervisor of a pipe, as a pure state machine: events and `now` in, commands out. The shell is local.py.

    Spawned  Refused  Ready  Done  Raised  Exited  Paused  Load     what happened
    GaveUp  DrainPipe  StopPipe  Tick                         what was asked for, and the time that passed
                 |
             handle(event, now)
                 |
    StartWorker  KillWorker  DrainWorker  Recover             what to do
    DeclareEnds  CloseEnds  DiscardInputs  CloseInput  PipeUp  PipeEnded

Rules: a worker that exits cleanly (or was done) has its ends of stream closed; one that dies is recovered first, then
run again under the next epoch. A mapped worker ends well only when it said so: `os._exit(0)` in user code would
otherwise end the stream and drop what still waits. A processor whose workers have all ended reads no more: its inputs
discard. The pipe is completed when every processor has ended, failed as soon as one cannot go on.
"""

from __future__ import annotations

from upipe.graph.plan import Plan
from upipe.graph.spec import PipeSpec
from upipe.lifecycle import PIPE, PIPE_ENDED, WORKER, Machine
from upipe.runtime.autoscale import Controller
from upipe.runtime.events import (
    CloseEnds,
    CloseInput,
    Command,
    DeclareEnds,
    DiscardInputs,
    Done,
    DrainPipe,
    DrainWorker,
    Event,
    Exited,
    GaveUp,
    KillWorker,
    Load,
    Paused,
    PipeEnded,
    PipeUp,
    Raised,
    Ready,
    Rearrangement,
    Recover,
    Refused,
    Spawned,
    StartWorker,
    StopPipe,
    Tick,
)
from upipe.runtime.restarts import Restarts
from upipe.runtime.slots import Crew, Slot

LATE = 1.0
"""Seconds by which our own timers may be late before a stopped worker gets its time again: the machine slept, or
everything here was stopped."""
UNCONNECTED = 3
"""Deaths of a script's processes, none of which ever connected, after which its pipe fails: it cannot run here."""


class Supervisor:
    """Decides for one pipe.

    Args:
        spec: validated.
        plan: of that spec.
    """

    def __init__(self, spec: PipeSpec, plan: Plan) -> None:
        self.spec = spec
        self.plan = plan
        self.pipe = Machine(PIPE, "declared", f"pipe {spec.name!r}")
        self.crews: dict[str, Crew] = {}
        self.slots: dict[str, Slot] = {}
        self.reasons: list[str] = []
        self._plans = {(worker.processor, worker.index): worker for worker in plan.workers}
        self._roots = {one.name for one in spec.roots()}
        for one in spec.processors:
            scaler = Controller(spec.settings.autoscale, one.workers, one.most_workers) if one.autoscale else None
            self.crews[one.name] = Crew(one, Restarts(one.restart), scaler)

    @property
    def state(self) -> str:
        """State of the pipe."""
        return self.pipe.state

    def start(self, now: float) -> list[Command]:
        """Start every worker, consumers first, so that nobody emits into the void."""
        self.pipe.fire("start")
        commands: list[Command] = []
        for name in reversed(self.plan.order):
            for index in self._indices(name):
                if index < self.crews[name].spec.workers:
                    commands += self._add(name, index)
        return commands

    def handle(self, event: Event, now: float) -> list[Command]:
        """Follow one event. Events for workers that are not known, or of an ended pipe, change nothing."""
        if isinstance(event, StopPipe):
            return self._end("stop", "stopped")
        if self.pipe.state in PIPE_ENDED:
            return self._late(event)
        if isinstance(event, DrainPipe):
            return self._drain()
        if isinstance(event, Tick):
            return self._tick(now)
        if isinstance(event, Load):
            return self._scale(event, now)
        if isinstance(event, GaveUp):
            return self._fail(event.reason)
        if isinstance(event, Rearrangement):
            return self._rearrange(event)
        slot = self.slots.get(event.worker)
        if slot is None:
            return []
        if isinstance(event, Spawned):
            slot.pid, slot.start = event.pid, event.start
            return []
        if isinstance(event, Ready):
            return self._ready(slot)
        if isinstance(event, Done):
            slot.done = True
            return []
        if isinstance(event, Raised):
            return self._raised(slot, event)
        if isinstance(event, Paused):
            slot.kill_at = now + self.spec.settings.stopped_grace if event.paused and slot.alive else None
            return []
        if isinstance(event, Refused):
            slot.error = f"its process could not be started: {event.reason}"
            told = self._exited(slot, Exited(slot.name, 0, 1, 0.0), now)
            return [
                command for command in told if not isinstance(command, Recover)
            ]  # there was nothing that held a frame
        return self._exited(slot, event, now)

    def deadline(self) -> float | None:
        """When to call handle(Tick()) at the latest; None: not before the next event."""
        times = [slot.spawn_at for slot in self.slots.values() if slot.spawn_at is not None]
        times += [slot.kill_at for slot in self.slots.values() if slot.kill_at is not None]
        return min(times, default=None)

    def validate(self) -> None:
        """Assert the invariants that stand beside the fields (for tests)."""
        for crew in self.crews.values():
            assert [slot.plan.index for slot in crew.slots] == sorted({slot.plan.index for slot in crew.slots}), crew
            assert all(self.slots[slot.name] is slot for slot in crew.slots), crew
            assert crew.discarded <= crew.ended, crew
        for slot in self.slots.values():
            assert slot.epoch >= 1, slot
            assert (slot.spawn_at is not None) == (slot.machine.state == "lost"), slot
            assert slot.kill_at is None or slot.alive, slot
        assert bool(self.reasons) == (self.pipe.state == "failed"), self.reasons
        if self.pipe.state in PIPE_ENDED:
            assert all(crew.ended for crew in self.crews.values()), self.pipe
            assert self.deadline() is None

    # -------------------------------------------------------------- workers

    def _rearrange(self, event: Rearrangement) -> list[Command]:
        """On one host the plan stands (on a cluster: NodeSupervisor)."""
        return []

    def _indices(self, processor: str) -> list[int]:
        """The workers of a processor that may run."""
        return sorted(index for name, index in self._plans if name == processor)

    def _add(self, processor: str, index: int) -> list[Command]:
        crew = self.crews[processor]
        plan = self._plans[processor, index]
        old = self.slots.get(f"{processor}#{index}")
        slot = Slot(
            plan, crew.spec, Machine(WORKER, "spawning", f"worker {processor}#{index}"), old.epoch if old else 0
        )
        slot.epoch += 1
        if old is not None:
            crew.slots.remove(old)
        crew.slots.append(slot)
        crew.slots.sort(key=lambda one: one.plan.index)
        self.slots[slot.name] = slot
        return [DeclareEnds(slot.name), StartWorker(slot.name, slot.epoch)]

    def _ready(self, slot: Slot) -> list[Command]:
        slot.was_ready = self.crews[slot.plan.processor].connected = True
        if slot.machine.can("ready"):
            slot.machine.fire("ready")
        return self._up()

    def _up(self) -> list[Command]:
        waiting = [
            one for one in self.slots.values() if one.machine.state in ("spawning", "lost") and one.spec.kind != "entry"
        ]
        if self.pipe.state != "starting" or waiting:
            return []
        self.pipe.fire("up")
        return [PipeUp()]

    def _raised(self, slot: Slot, event: Raised) -> list[Command]:
        slot.error = (
            f"{event.kind}: {event.message}\n--- remote traceback of {slot.name} ---\n{event.traceback.rstrip()}"
        )
        if not event.fatal:
            return []
        what = "cannot load its code" if event.phase == "load" else "raised"
        return self._fail(f"processor {slot.plan.processor!r} (worker {slot.name}) {what}: {slot.error}")

    def _exited(self, slot: Slot, event: Exited, now: float) -> list[Command]:
        crew = self.crews[slot.plan.processor]
        crew.cpu_seconds += event.cpu_seconds
        if not slot.alive or (event.pid and event.pid != slot.pid):
            return []  # an earlier life
        slot.kill_at = None
        if slot.done or (event.status == 0 and crew.spec.kind not in ("map", "class")):
            slot.machine.fire("exit")
            return [Recover(slot.name, event.pid, slot.start), CloseEnds(slot.name), *self._crew_ended(crew)]
        draining = slot.machine.state == "draining"
        slot.machine.fire("die")
        crew.deaths += 1
        recover = Recover(slot.name, event.pid, slot.start)
        if draining or (
            self.pipe.state == "draining"
            and slot.plan.processor in self._roots
            and crew.spec.kind in ("source", "driver")
        ):
            slot.machine.fire("drain")
            return [recover, CloseEnds(slot.name), *self._crew_ended(crew)]
        delay = crew.restarts.died(now)
        reason = self._hopeless(crew, slot, event.status, delay)
        if delay is None or reason:
            slot.machine.fire("fail")
            return [recover, *self._fail(reason)]
        slot.spawn_at = now + delay
        slot.pid = slot.start = 0
        return [recover, *self._tick(now)]

    def _hopeless(self, crew: Crew, slot: Slot, status: int, delay: float | None) -> str:
        """Why a dead worker is not run again; "" when it is."""
        name, last = slot.plan.processor, f"exit status {status}" if status >= 0 else f"signal {-status}"
        told = f" (last: {slot.name}, {last}){': ' + slot.error if slot.error else ''}"
        if delay is None:
            return (
                f"processor {name!r}: its workers died {crew.restarts.count} times within "
                f"{crew.spec.restart.window:g} s, more than restart.limit={crew.spec.restart.limit} allows{told}"
            )
        if crew.spec.kind == "entry" and not crew.connected and status != -9:  # SIGKILL: somebody else's doing
            crew.unconnected += 1
        if crew.unconnected < UNCONNECTED or crew.connected:
            return ""
        return (
            f"processor {name!r}: its script {crew.spec.entry} ended {crew.unconnected} times and never once got to "
            f"Processor({name!r}).connect(){told}"
        )

    def _tick(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for slot in self.slots.values():
            if slot.spawn_at is not None and slot.spawn_at <= now:
                slot.spawn_at = None
                slot.machine.fire("spawn")
                slot.epoch += 1
                slot.done = slot.was_ready = False
                commands.append(StartWorker(slot.name, slot.epoch))
            if slot.kill_at is not None and slot.kill_at + LATE < now:
                slot.kill_at = now + self.spec.settings.stopped_grace  # we were stopped ourselves, with all others
            elif slot.kill_at is not None and slot.kill_at <= now:
                slot.kill_at = None
                slot.error = f"{slot.name} was stopped (SIGSTOP) and was killed to be replaced"
                commands.append(KillWorker(slot.name))
        return commands

    def _crew_ended(self, crew: Crew) -> list[Command]:
        commands: list[Command] = []
        if crew.ended and not crew.discarded:
            crew.discarded = True
            commands.append(DiscardInputs(crew.spec.name))
        if all(one.ended for one in self.crews.values()):
            if self.pipe.state == "starting":
                self.pipe.fire("up")
            self.pipe.fire("complete")
            commands.append(PipeEnded("completed"))
        else:
            commands += self._up()
        return commands

    # -------------------------------------------------------------- the pipe

    def _drain(self) -> list[Command]:
        self.pipe.fire("drain")
        commands: list[Command] = [CloseInput()]
        for slot in self.slots.values():
            if slot.plan.processor not in self._roots or slot.spec.kind in ("map", "class"):
                continue
            if slot.alive:
                slot.machine.fire("drain")
                commands.append(DrainWorker(slot.name))
            elif slot.machine.state == "lost":
                slot.spawn_at = None
                slot.machine.fire("drain")
                commands += [CloseEnds(slot.name), *self._crew_ended(self.crews[slot.plan.processor])]
        return commands

    def _fail(self, reason: str) -> list[Command]:
        self.reasons.append(reason)
        return self._end("fail", "failed")

    def _end(self, event: str, state: str) -> list[Command]:
        already = self.pipe.state in PIPE_ENDED
        self.pipe.fire(event)
        if already:
            return []
        commands: list[Command] = []
        for slot in self.slots.values():
            if slot.alive:
                commands.append(KillWorker(slot.name))
            slot.spawn_at = slot.kill_at = None
            slot.machine.fire("stop")
        return [*commands, PipeEnded(state, tuple(self.reasons))]

    def _late(self, event: Event) -> list[Command]:
        """After the end only the account goes on."""
        slot = self.slots.get(event.worker) if isinstance(event, Spawned | Exited) else None
        if slot is None:
            return []
        if isinstance(event, Spawned):
            slot.pid, slot.start = event.pid, event.start
            return [KillWorker(event.worker)]
        if isinstance(event, Exited):
            self.crews[slot.plan.processor].cpu_seconds += event.cpu_seconds
            return [Recover(event.worker, event.pid, slot.start)]
        return []

    def _scale(self, event: Load, now: float) -> list[Command]:
        crew = self.crews[event.processor]
        active = [slot for slot in crew.slots if not slot.ended and slot.machine.state != "draining"]
        if crew.scaler is None or self.pipe.state not in ("running", "draining") or not active:
            return []
        if any(slot.done for slot in crew.slots if slot.alive):
            return []  # its stream has ended
        step = crew.scaler.decide(now, len(active), event.used_share, event.oldest_age, event.waiting)
        if step > 0:
            taken = {slot.plan.index for slot in crew.slots if not slot.ended}
            free = [index for index in self._indices(event.processor) if index not in taken]
            return self._add(event.processor, free[0]) if free else []
        if step < 0:
            running = [slot for slot in active if slot.machine.state == "running"]
            if running:
                running[-1].machine.fire("drain")
                return [DrainWorker(running[-1].name)]
        return []
