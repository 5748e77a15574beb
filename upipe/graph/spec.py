"""The declared pipe as data: what the user drew, resolved against the settings, ready to travel.

Structs are frozen and plain, so a spec is hashable, comparable and encodes with msgspec. Nothing here judges: fields
that users choose by name (`kind`, `policy`, `on_error`) are plain strings, so that a spec with a mistake can exist long
enough for `validate.problems` to list it with all the others.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from upipe.settings import DEFAULT_CPU, Place, RestartPolicy, Settings

Kind = Literal["driver", "map", "source", "class", "entry"]
"""How a worker runs its code.

driver: a function without parameters that calls get and emit itself; map: called once per value; source: a generator
without parameters, each value it yields is emitted; class: one instance per worker, its process(value) is called;
entry: a script.
"""

KINDS: tuple[str, ...] = ("driver", "map", "source", "class", "entry")
POLICIES: tuple[str, ...] = ("block", "drop_oldest", "latest")
"""What a full edge does: the producer waits, the oldest waiting frame goes, all but the newest go."""
ON_ERROR: tuple[str, ...] = ("retry", "dead_letter", "fail")
"""What an exception in user code does: deliver again, set the frame aside at once, end the pipe."""

HOW: tuple[str, ...] = ("pack", "spread")
"""How the workers of a processor lie on a cluster; see settings.Place."""


class ProcessorSpec(msgspec.Struct, frozen=True):
    """One processor."""

    name: str
    """Unique in the pipe."""
    kind: str = "map"
    """One of KINDS."""
    code: str = ""
    """SHA-256 (64 hex digits) of the shipped code; "" when there is none."""
    entry: str = ""
    """Path of the script; "" unless kind is "entry"."""
    interpreter: str = ""
    """Python that runs the script; "" is the one that runs the pipe."""
    workers: int = 1
    """Worker processes at the start."""
    autoscale: int | None = None
    """Most workers under load; None keeps `workers`."""
    on_error: str = "retry"
    """One of ON_ERROR."""
    max_deliveries: int = 5
    """Deliveries of one frame before it goes to the dead letters."""
    restart: RestartPolicy = RestartPolicy()
    """When a worker that died is replaced."""
    resume: bool = False
    """A source that is restarted goes on where its last checkpoint stood."""
    checkpoint_every: int = 100
    """Frames between two checkpoints: fewer repeats less after a death and costs more while all is well."""
    allow_pickle: bool = True
    """False refuses pickled values here."""
    frame_timeout: float | None = None
    """Seconds one frame may take before its worker is killed; None is no limit."""
    takes_config: bool = False
    """The code is called with the keyword ``config``."""
    resources: tuple[tuple[str, float], ...] = ()
    """What one worker takes of its node: cpu (cores), memory (bytes), gpu, or what nodes offer by other names."""
    place: Place = Place()
    """Which nodes of a cluster it may run on."""

    @property
    def most_workers(self) -> int:
        """Workers it can ever have at a time: `autoscale`, or `workers` without it."""
        return self.workers if self.autoscale is None else self.autoscale

    @property
    def needs(self) -> dict[str, float]:
        """`resources` with the default for the processor time."""
        return {"cpu": DEFAULT_CPU, **dict(self.resources)}


class EdgeSpec(msgspec.Struct, frozen=True):
    """One edge."""

    source: str
    """Name of the processor that emits."""
    target: str
    """Name of the processor that receives."""
    size: int | None = None
    """Ring bytes (of each partition, when keyed); None is `Settings.edge_bytes`."""
    policy: str = "block"
    """One of POLICIES."""
    keyed: bool = False
    """Partitioned by a key: one ring per worker of the target, in order per key."""


class PipeSpec(msgspec.Struct, frozen=True):
    """The whole pipe. The order of processors and edges is the order of declaration, and plans follow it."""

    name: str
    processors: tuple[ProcessorSpec, ...] = ()
    edges: tuple[EdgeSpec, ...] = ()
    settings: Settings = Settings()

    def edge_bytes(self, edge: EdgeSpec) -> int:
        """Ring bytes of `edge`: its own size, or the default of the settings."""
        return self.settings.edge_bytes if edge.size is None else edge.size

    def roots(self) -> tuple[ProcessorSpec, ...]:
        """Processors that no edge leads to."""
        fed = {edge.target for edge in self.edges}
        return tuple(one for one in self.processors if one.name not in fed)

    def ends(self) -> tuple[ProcessorSpec, ...]:
        """Processors that no edge leaves; what they emit goes to the pipe."""
        feeding = {edge.source for edge in self.edges}
        return tuple(one for one in self.processors if one.name not in feeding)
