"""What the supervisor knows of each worker slot and of each processor's crew. Plain data; supervisor.py changes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from upipe.graph.plan import WorkerPlan
from upipe.graph.spec import ProcessorSpec
from upipe.lifecycle import WORKER_ENDED, Machine
from upipe.runtime.autoscale import Controller
from upipe.runtime.restarts import Restarts


@dataclass
class Slot:
    """One worker slot over all its lives."""

    plan: WorkerPlan
    spec: ProcessorSpec
    machine: Machine
    epoch: int = 0
    pid: int = 0
    start: int = 0
    was_ready: bool = False
    """Ready in this life."""
    done: bool = False
    """Said Done in this life."""
    spawn_at: float | None = None
    """When it is run again. Set exactly while the machine is lost; what the dead life held was given back before."""
    kill_at: float | None = None
    """When it is killed for being stopped. Set only while it runs paused."""
    error: str = ""
    """What ended its last life, with the traceback when there is one."""

    @property
    def name(self) -> str:
        """processor#index."""
        return f"{self.plan.processor}#{self.plan.index}"

    @property
    def alive(self) -> bool:
        """Whether a process runs (or is about to) for it."""
        return self.machine.state in ("spawning", "running", "draining")

    @property
    def ended(self) -> bool:
        """Whether it will never run again."""
        return self.machine.state in WORKER_ENDED


@dataclass
class Crew:
    """The workers of one processor."""

    spec: ProcessorSpec
    restarts: Restarts
    scaler: Controller | None
    slots: list[Slot] = field(default_factory=list)
    """Started so far, by index; more are added by scaling up."""
    deaths: int = 0
    connected: bool = False
    """Some life of one of them was ready."""
    unconnected: int = 0
    """Deaths of an entry script, by its own doing, while none was ever ready."""
    cpu_seconds: float = 0.0
    discarded: bool = False

    @property
    def ended(self) -> bool:
        """Whether all its workers have."""
        return all(slot.ended for slot in self.slots)
