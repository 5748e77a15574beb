"""What the scheduler of a pipe is told (events), what it answers (commands), and what agents say to each other about it
(messages). Plain data; scheduler.py decides."""

from __future__ import annotations

import msgspec

from upipe.cluster.layout import NodePlan
from upipe.cluster.record import Books, Crew, Record
from upipe.cluster.room import Node


class QueueState(msgspec.Struct, frozen=True):
    """A queue on a node, as its keeper sees it."""

    empty: bool = False
    """A home: everything in it is finished."""
    left: bool = False
    """A home: every worker here has closed its end, or never had one."""
    settled: bool = False
    """A home: its copy has received everything (true without a copy). A sink: its home knows what is finished here."""
    books: Books = Books()
    broken: str = ""
    """Why it cannot be used or mirrored, whatever its ferry tried; "" while it can, or is tried (mending.py)."""
    epoch: int = 0
    """What is broken: its mirror of this epoch; 0 is the queue itself, which has no mirror."""
    broken_at: int = 0
    """Position up to which its copy had come."""


class NodeReport(msgspec.Struct, frozen=True):
    """Everything a keeper has to say about a pipe, at a moment. The newest counts; it may be lost or come twice."""

    node: str
    number: int
    """Rises with each report of a node."""
    fence: tuple[int, int] = (0, 0)
    """Of the plan it follows, or of the stop that it obeyed."""
    present: bool = True
    """It has workers or queues of the pipe; False: nothing is left there."""
    lost: bool = False
    """The agent lives, and the keeper died with all it had (a reboot, kill -9). Said until a stop is obeyed."""
    ended: tuple[tuple[str, int], ...] = ()
    """Workers whose code returned and that will not run again; once no other of a processor runs here, those that
    autoscaling never started too."""
    left: tuple[tuple[str, int], ...] = ()
    """Workers that left because the plan it follows says so."""
    queues: dict[str, QueueState] = {}
    input_closed: bool = False
    """The client: the pipe's own input is closed."""
    failed: str = ""
    """The pipe cannot go on, with the reason."""
    up: bool = False
    """Every worker that the plan starts at once has been ready."""
    crews: dict[str, Crew] = {}
    """By processor; of the life of the keeper."""
    refused: tuple[tuple[str, int], ...] = ()
    """Workers of the plan it follows that never began there: it has no room for them."""
    others: dict[str, float] = {}
    """With `refused`: what it has promised to other pipes."""
    unfit: str = ""
    """Nothing of the pipe runs there, and nothing can, with the reason: it is to run elsewhere."""
    waits: str = ""
    """Why it does not follow the newest orders yet: it tries again."""


# ------------------------------------------------------------------ messages between agents


class Replicate(msgspec.Struct, frozen=True, tag=True):
    """Coordinator to member: keep this record."""

    record: Record


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Member to coordinator: kept, on disk."""

    node: str
    fence: tuple[int, int]


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Candidate to member: promise me this epoch."""

    epoch: int
    candidate: str
    record: Record
    """The newest the candidate has: one who never heard of the pipe begins with it."""


class Granted(msgspec.Struct, frozen=True, tag=True):
    """Member to candidate: promised, on disk; and the record it has."""

    node: str
    epoch: int
    record: Record


class Refused(msgspec.Struct, frozen=True, tag=True):
    """To whoever comes with a lower epoch: the one that was promised, and the newest record."""

    node: str
    promised: int
    record: Record


Message = Replicate | Accepted | Ask | Granted | Refused

# ------------------------------------------------------------------ events


class Heard(msgspec.Struct, frozen=True):
    """A message of another agent."""

    message: Message


class NodeUp(msgspec.Struct, frozen=True):
    """An agent is alive, with what it offers now; also when that changed, or it drains (Node.draining)."""

    node: Node


class NodeDown(msgspec.Struct, frozen=True):
    """An agent is dead, or has left."""

    node: str


class Reported(msgspec.Struct, frozen=True):
    """A keeper said so; only the coordinator is told."""

    report: NodeReport


class StopPipe(msgspec.Struct, frozen=True):
    """stop(): end now."""


class DrainPipe(msgspec.Struct, frozen=True):
    """terminate(): take no more in, finish the rest."""


class Tick(msgspec.Struct, frozen=True):
    """Time passed; see deadline()."""


Event = Heard | NodeUp | NodeDown | Reported | StopPipe | DrainPipe | Tick

# ------------------------------------------------------------------ commands


class Save(msgspec.Struct, frozen=True):
    """Put on disk, before any command that follows: the record, and the epoch that was promised."""

    record: Record
    promised: int
    promised_to: str


class Send(msgspec.Struct, frozen=True):
    """Say it to another agent. It may be lost."""

    node: str
    message: Message


class Arrange(msgspec.Struct, frozen=True):
    """Tell the keeper of a node (over its agent) what to do; plan None: end everything of the pipe there. It may be
    lost, and is said again until a report has its fence. A keeper refuses a lower fence."""

    node: str
    fence: tuple[int, int]
    plan: NodePlan | None


class TellClient(msgspec.Struct, frozen=True):
    """What the submitting process shall know: state, reasons, what waits for room; books and crews, which are the
    pipe's own at its end."""

    state: str
    reasons: tuple[str, ...] = ()
    waiting: str = ""
    books: dict[str, Books] = {}
    """By stream."""
    crews: dict[str, Crew] = {}
    up: bool = False
    """Every worker is ready, or was."""


Command = Save | Send | Arrange | TellClient
