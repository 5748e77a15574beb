"""What the supervisor of a pipe is told (events), and what it answers (commands). Plain data; supervisor.py decides."""

from __future__ import annotations

from dataclasses import dataclass

from upipe.graph.plan import WorkerPlan

# ------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class Spawned:
    """The process of a worker runs. start: ticks after boot."""

    worker: str
    pid: int
    start: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Its code is loaded and its queues are attached."""

    worker: str


@dataclass(frozen=True, slots=True)
class Done:
    """Its code returned and everything is closed."""

    worker: str


@dataclass(frozen=True, slots=True)
class Raised:
    """User code raised; see messages.Raised."""

    worker: str
    phase: str
    kind: str
    message: str
    traceback: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class Exited:
    """The process ended and was reaped. status: exit code, or minus the signal. pid 0: it died before it was heard
    of."""

    worker: str
    pid: int
    status: int
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The process could not be made."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Paused:
    """The process was stopped (SIGSTOP) or continued."""

    worker: str
    paused: bool


@dataclass(frozen=True, slots=True)
class Load:
    """Input of an autoscaled processor: share of the ring in use (0..1), age of the oldest frame (s), frames
    waiting; whether the stream is at its end."""

    processor: str
    used_share: float
    oldest_age: float
    waiting: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The shell cannot go on (shared memory for dead letters is used up, no fork server can be had)."""

    reason: str


@dataclass(frozen=True, slots=True)
class DrainPipe:
    """terminate(): take no more in, finish the rest."""


@dataclass(frozen=True, slots=True)
class StopPipe:
    """stop(): end now."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; see deadline()."""


@dataclass(frozen=True, slots=True)
class Joined:
    """On a cluster: this node has that worker from now on."""

    plan: WorkerPlan


@dataclass(frozen=True, slots=True)
class Changed:
    """On a cluster: a worker of this node uses other queues from now on; they are there."""

    plan: WorkerPlan


@dataclass(frozen=True, slots=True)
class Leaving:
    """On a cluster: a worker shall finish what it holds and end, to go on elsewhere."""

    worker: str


@dataclass(frozen=True, slots=True)
class Removed:
    """On a cluster: a worker is not this node's any more; it ends now."""

    worker: str


Rearrangement = Joined | Changed | Leaving | Removed
Event = (
    Spawned
    | Ready
    | Done
    | Raised
    | Exited
    | Refused
    | Paused
    | Load
    | GaveUp
    | DrainPipe
    | StopPipe
    | Tick
    | Rearrangement
)

# ------------------------------------------------------------------ commands


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Fork it, in this life number."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class KillWorker:
    """SIGKILL."""

    worker: str


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """Ask it to finish and end."""

    worker: str


@dataclass(frozen=True, slots=True)
class RewireWorker:
    """Tell it the queues of its plan; of one that does not run, close the ends that are not in its plan any more."""

    worker: str


@dataclass(frozen=True, slots=True)
class Recover:
    """Give back what the dead process held, on all its queues. pid 0: what any dead process held there."""

    worker: str
    pid: int
    start: int


@dataclass(frozen=True, slots=True)
class DeclareEnds:
    """Its streams shall not end before it closed them."""

    worker: str


@dataclass(frozen=True, slots=True)
class CloseEnds:
    """Close its ends of stream (it may have done so itself)."""

    worker: str


@dataclass(frozen=True, slots=True)
class DiscardInputs:
    """Nobody reads this processor's inputs any more."""

    processor: str


@dataclass(frozen=True, slots=True)
class CloseInput:
    """Close the pipe's own end into its roots."""


@dataclass(frozen=True, slots=True)
class PipeUp:
    """Every worker reported ready."""


@dataclass(frozen=True, slots=True)
class PipeEnded:
    """completed, failed or stopped; with the reasons of a failure."""

    state: str
    reasons: tuple[str, ...] = ()


Command = (
    StartWorker
    | KillWorker
    | DrainWorker
    | RewireWorker
    | Recover
    | DeclareEnds
    | CloseEnds
    | DiscardInputs
    | CloseInput
    | PipeUp
    | PipeEnded
)
