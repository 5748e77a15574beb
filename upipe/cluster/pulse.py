"""When a link is asked for a sign of life, given up, and dialled again. Pure: `now` in, decisions out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

QUIET = 1.5
"""Seconds without a byte from the other end after which it is asked (Ping). Shorter notices a cut earlier, and wakes
idle hosts."""
PATIENCE = 3.0
"""Seconds after the question in which nothing came before the link is given up: QUIET + PATIENCE is below 5."""

LATE = 0.5
"""Seconds of delay of a look from which on it proves nothing: this process was stopped itself, and what came is not
read yet."""


class Beat(Enum):
    """What to do about a silent link."""

    WAIT = "wait"
    ASK = "ask"
    CUT = "cut"


class Pulse:
    """Whether the other end of one link lives: a link that is cut silently (no RST, no FIN) is known to be so within 5
    s."""

    def __init__(self, now: float) -> None:
        self._heard = now
        self._asked: float | None = None

    def heard(self, now: float) -> None:
        """Bytes came."""
        self._heard = now
        self._asked = None

    def beat(self, now: float) -> Beat:
        """What to do now; look again at `due`."""
        if self._asked is not None:
            if now - self._asked < PATIENCE:
                return Beat.WAIT
            if now - self._asked < PATIENCE + LATE:
                return Beat.CUT
        elif now - self._heard < QUIET:
            return Beat.WAIT
        self._asked = now
        return Beat.ASK

    @property
    def due(self) -> float:
        """When beat() may say something else than WAIT."""
        return self._heard + QUIET if self._asked is None else self._asked + PATIENCE


@dataclass(frozen=True)
class BackoffPolicy:
    """How often a peer that does not answer is dialled."""

    first: float = 0.05
    """Seconds before the first repetition; doubles each time."""
    most: float = 2.0
    """Longest pause in seconds: also how long after its return a peer may be found."""
    jitter: float = 0.3
    """Share of a pause (0..1) that chance takes away, so that all nodes do not dial one that returns at the same
    time."""


class Backoff:
    """Pauses between attempts to dial one peer.

    Args:
        chance: gives a number in [0, 1), like random.random.
    """

    def __init__(self, chance: Callable[[], float], policy: BackoffPolicy | None = None) -> None:
        self._chance = chance
        self._policy = policy or BackoffPolicy()
        self._failures = 0

    def failed(self) -> float:
        """An attempt failed, or its link broke. Seconds to wait before the next."""
        policy = self._policy
        pause: float = min(policy.most, policy.first * 2 ** min(self._failures, 30))
        self._failures += 1
        return pause * (1 - policy.jitter * self._chance())

    def succeeded(self) -> None:
        """The other end answered: the next failure is the first."""
        self._failures = 0
