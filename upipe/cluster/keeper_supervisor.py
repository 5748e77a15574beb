"""The supervisor of the workers of one pipe on one node of a cluster. Pure.

What differs from the one of a whole pipe: its workers come, change and go with the plans of the coordinator, and it
never completes. Whether a processor has ended is known where all nodes report (planning.py), so it says which of its
workers ended and which left:

    ended    the code returned, and it will not run again here or elsewhere. Once no other worker of the processor runs
             here, those that autoscaling never started too: nobody will start them
    left     it finished what it held and ended because the plan says so; it begins again on another node
"""

from __future__ import annotations

from upipe.graph.plan import Plan, WorkerPlan, topological_order
from upipe.graph.spec import PipeSpec
from upipe.lifecycle import PIPE_ENDED
from upipe.runtime.events import (
    Changed,
    CloseEnds,
    Command,
    DeclareEnds,
    DrainWorker,
    Event,
    Exited,
    Joined,
    KillWorker,
    Leaving,
    Load,
    Ready,
    Rearrangement,
    Recover,
    Refused,
    RewireWorker,
    Spawned,
)
from upipe.runtime.slots import Crew, Slot
from upipe.runtime.supervisor import Supervisor

Seat = tuple[str, int]


def worker_name(plan: WorkerPlan) -> str:
    """processor#index."""
    return f"{plan.processor}#{plan.index}"


class NodeSupervisor(Supervisor):
    """Decides for the workers of one node. start() starts nothing: workers join.

    Args:
        spec: validated.
    """

    def __init__(self, spec: PipeSpec) -> None:
        super().__init__(spec, Plan(spec.name, topological_order(spec), (), ()))
        self._leaving: set[str] = set()
        """Shall go on elsewhere. Those whose code had returned before are not among them."""
        self._idle: set[str] = set()
        """Ended by autoscaling; may be started again."""
        self._killed: set[str] = set()
        """Not of this node any more; their exit is not heard yet."""
        self._rejoining: dict[str, WorkerPlan] = {}
        """Joined again before that exit, or before that of leaving."""
        self._dry: set[str] = set()
        """Processors with room for autoscaling only, whose streams ended before anything started."""
        self._seen: set[str] = set()
        """Were ready in some life."""

    # ------------------------------------------------------------------ what it tells

    @property
    def up(self) -> bool:
        """Every worker that is to run at once has been ready, or has ended. Scripts need not report themselves."""
        return all(name in self._seen or self._over(name) for name in map(worker_name, self._wanted()))

    def ended(self) -> tuple[Seat, ...]:
        """See above."""
        found: list[Seat] = []
        for processor in self.crews:
            mine = [(name, index) for name, index in self._plans if name == processor]
            returned = [seat for seat in mine if self._returned(seat)]
            running = any(not self._over(f"{name}#{index}") for name, index in mine)
            if not running and (returned or processor in self._dry):
                returned = [seat for seat in mine if f"{seat[0]}#{seat[1]}" not in self._leaving]
            found += returned
        return tuple(sorted(found))

    def left(self) -> tuple[Seat, ...]:
        """See above."""
        gone = [seat for seat in self._plans if f"{seat[0]}#{seat[1]}" in self._leaving]
        return tuple(sorted(seat for seat in gone if self._over(f"{seat[0]}#{seat[1]}")))

    def present(self) -> list[Slot]:
        """The slots of this node's workers, and of those that are being ended."""
        names = {f"{name}#{index}" for name, index in self._plans} | self._killed
        return [slot for name, slot in sorted(self.slots.items()) if name in names]

    def _wanted(self) -> list[WorkerPlan]:
        specs = {name: crew.spec for name, crew in self.crews.items()}
        return [
            plan
            for (name, index), plan in self._plans.items()
            if index < specs[name].workers and specs[name].kind != "entry"
        ]

    def _over(self, worker: str) -> bool:
        """Does not run now, and is not about to."""
        slot = self.slots.get(worker)
        return worker not in self._rejoining and (slot is None or slot.ended)

    def _returned(self, seat: Seat) -> bool:
        name = f"{seat[0]}#{seat[1]}"
        slot = self.slots.get(name)
        idle = name in self._leaving or name in self._idle or name in self._rejoining
        return slot is not None and slot.machine.state == "exited" and not idle

    # ------------------------------------------------------------------ rearranging

    def handle(self, event: Event, now: float) -> list[Command]:
        """Follow one event, as Supervisor.handle."""
        if isinstance(event, Ready):
            self._seen.add(event.worker)
        if isinstance(event, Spawned | Exited | Refused) and event.worker in self._killed:
            return self._ending(event)
        commands = super().handle(event, now)
        if isinstance(event, Exited | Refused) and event.worker in self._rejoining:
            commands += self._rejoin(event.worker)
        return commands

    def _rearrange(self, event: Rearrangement) -> list[Command]:
        if isinstance(event, Joined):
            return self._join(event.plan)
        if isinstance(event, Changed):
            return self._change(event.plan)
        commands = self._leave(event.worker) if isinstance(event, Leaving) else self._remove(event.worker)
        self._limit(event.worker.rpartition("#")[0])
        return commands

    def _join(self, plan: WorkerPlan) -> list[Command]:
        name, crew = worker_name(plan), self.crews[plan.processor]
        self._plans[plan.processor, plan.index] = plan
        self._limit(plan.processor)
        self._seen.discard(name)
        self._leaving.discard(name)
        slot = self.slots.get(name)
        if name in self._killed or (slot is not None and not slot.ended):
            self._rejoining[name] = plan
            return []
        if plan.index >= crew.spec.workers:
            self._idle.add(name)  # for autoscaling
            return self._up()
        commands = self._add(plan.processor, plan.index)
        if self.pipe.state != "draining" or plan.processor not in self._roots or crew.spec.kind in ("map", "class"):
            return commands
        slot = self.slots[name]  # its pipe takes nothing more in
        slot.machine.fire("drain")
        slot.machine.fire("exit")
        return [CloseEnds(name)]

    def _change(self, plan: WorkerPlan) -> list[Command]:
        name = worker_name(plan)
        self._plans[plan.processor, plan.index] = plan
        if name in self._rejoining:
            self._rejoining[name] = plan
        slot = self.slots.get(name)
        if slot is None or name in self._killed:
            return []
        slot.plan = plan
        return [] if slot.ended else [DeclareEnds(name), RewireWorker(name)]

    def _leave(self, name: str) -> list[Command]:
        slot = self.slots.get(name)
        if slot is not None and slot.machine.state == "exited" and name not in self._idle:
            return []  # it has ended, here and everywhere
        if slot is not None and slot.alive and slot.done:
            return []  # it is about to
        self._leaving.add(name)
        self._rejoining.pop(name, None)
        if slot is None or slot.ended or name in self._killed:
            return []
        if slot.alive:
            slot.machine.fire("drain")
            return [DrainWorker(name)]
        slot.spawn_at = None
        slot.machine.fire("drain")
        return [CloseEnds(name), *self._up()]

    def _remove(self, name: str) -> list[Command]:
        processor, _, index = name.rpartition("#")
        self._plans.pop((processor, int(index)), None)
        for names in (self._leaving, self._idle, self._seen):
            names.discard(name)
        self._rejoining.pop(name, None)
        slot = self.slots.get(name)
        if slot is None or slot.ended:
            return []
        alive = slot.alive
        slot.spawn_at = slot.kill_at = None
        slot.machine.fire("stop")
        if not alive:
            return [CloseEnds(name), *self._up()]
        self._killed.add(name)
        return [KillWorker(name)]

    def _ending(self, event: Spawned | Exited | Refused) -> list[Command]:
        """Of a worker that is not this node's any more."""
        slot, name = self.slots[event.worker], event.worker
        if isinstance(event, Spawned):
            slot.pid, slot.start = event.pid, event.start
            return [KillWorker(name)]
        recover: list[Command] = []
        if isinstance(event, Exited):
            self.crews[slot.plan.processor].cpu_seconds += event.cpu_seconds
            if event.pid and slot.pid and event.pid != slot.pid:
                return []  # an earlier life
            recover = [Recover(name, event.pid, slot.start)]
        self._killed.discard(name)
        return [*recover, CloseEnds(name), *self._rejoin(name), *self._up()]

    def _rejoin(self, name: str) -> list[Command]:
        """Its former life may be over."""
        if not self.slots[name].ended or name in self._killed or self.pipe.state in PIPE_ENDED:
            return []
        again = self._rejoining.pop(name, None)
        return [] if again is None else self._join(again)

    # ------------------------------------------------------------------ as Supervisor, but for a part of the pipe

    def _indices(self, processor: str) -> list[int]:
        """Not those that have ended or leave, and not those whose former life still ends."""
        found = []
        for name, index in self._plans:
            worker = f"{name}#{index}"
            free = worker in self._idle or not self._returned((name, index))
            if name == processor and free and worker not in self._leaving and worker not in self._killed:
                found.append(index)
        return sorted(found)

    def _add(self, processor: str, index: int) -> list[Command]:
        self._idle.discard(f"{processor}#{index}")
        return super()._add(processor, index)

    def _crew_ended(self, crew: Crew) -> list[Command]:
        return self._up()  # the coordinator says when a processor has, and when the pipe is completed

    def _scale(self, event: Load, now: float) -> list[Command]:
        mine = [(name, index) for name, index in self._plans if name == event.processor]
        if mine and all(f"{name}#{index}" in self._idle for name, index in mine):
            return self._first(event)
        commands = super()._scale(event, now)
        self._idle.update(one.worker for one in commands if isinstance(one, DrainWorker))
        return commands

    def _first(self, event: Load) -> list[Command]:
        """Nothing is to run here but by load, and nothing does: one frame is load enough, as nobody else reads it."""
        if event.ended:
            self._dry.add(event.processor)
        free = self._indices(event.processor)
        return self._add(event.processor, free[0]) if event.waiting and free and not event.ended else []

    def _limit(self, processor: str) -> None:
        """Autoscaling works between the workers that this node is to run at once and all it has."""
        crew, here = self.crews[processor], self._indices(processor)
        if crew.scaler is not None and here:
            least = max(1, sum(index < crew.spec.workers for index in here))
            crew.scaler.limit(least, max(least, len(here)))
