"""What is measured (Work), and what came out (Outcome). Plain data that crosses processes as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

MIB = 2**20
Pins = Literal["free", "one", "two"]


@dataclass(frozen=True)
class Work:
    """One piece of work, the same for every peer."""

    case: str
    """Row group of the table, such as "small"."""
    kind: str
    """What to do: a method `run_<kind>` of the transport, see peers/base.py."""
    n: int = 1000
    """Values, frames or round trips to measure."""
    warm: int = 0
    """As many before them, not measured."""
    size: int = 8
    """Payload bytes of one frame."""
    shape: tuple[int, ...] = ()
    """Shape of a frame as an array of bytes; () for scalars."""
    ring: int = 4 * MIB
    """Bytes of the ring or buffer between the ends: the same for every peer that has such a knob."""
    pins: Pins = "free"
    """free: where the kernel likes; one: both ends on CPU 0; two: on CPU 0 and CPU 1."""
    pause: float = 0.0
    """Seconds both ends sleep between two round trips."""
    producers: int = 1
    consumers: int = 1
    batch: int = 1024
    """Values per call of an interface that moves many."""
    in_place: bool = False
    """Frames are read where they lie; otherwise the consumer ends up with a copy of its own."""
    touch: bool = False
    """The consumer reads the ends of a frame only; otherwise every byte."""
    hosts: bool = False
    """The producer is on one host, the consumer on another (hosts.py)."""
    count: int = 1
    """How many queues, workers or stages there are, for the cases about growth."""
    beside: tuple[str, ...] = ()
    """A program that measures the physical limit of these round trips, and its arguments. It takes turns with them."""
    turn: int = 0
    """Round trips between two of its runs."""

    @property
    def slots(self) -> int:
        """Frames that the ring holds."""
        return max(1, self.ring // max(self.size, 64))

    @property
    def frames(self) -> bool:
        """Arrays travel, not small values."""
        return self.kind in ("frames", "payload", "across_frames")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**{**data, "shape": tuple(data["shape"]), "beside": tuple(data["beside"])})


@dataclass
class Outcome:
    """What one measurement of one peer gave."""

    value: float = 0.0
    """In the unit of the case: a rate, or a time."""
    expected: int = 0
    """Frames that were sent."""
    arrived: int = 0
    """Frames that came, each counted once."""
    bad: int = 0
    """Frames whose content was wrong, that came twice, or out of order."""
    cpu: float = 0.0
    """CPU seconds of all its processes, start-up excluded."""
    extra: dict[str, float] = field(default_factory=dict)
    """Other numbers of the same measurement: p99, p99.9, ..."""
    error: str = ""
    """Why there is no value; a first word "absent" means: not installed here."""
    beside: float = 0.0
    """The physical limit, measured in turns with it (`Work.beside`), in the unit of the case. 0: not measured so."""
    round: int = 0
    """Of the run; what was measured in the same one was measured within few minutes."""

    @property
    def lost(self) -> int:
        return self.expected - self.arrived

    @property
    def clean(self) -> bool:
        """Everything arrived, once and intact."""
        return not self.error and self.lost == 0 and self.bad == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        known = {one.name for one in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


class Unsupported(Exception):
    """A peer has nothing of that kind; the row is left out and named below the table."""
