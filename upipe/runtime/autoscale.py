"""Autoscale: how many workers a processor should have, from what its input looks like.

Pure: one observation in, one step out. Three things keep it from flapping. The thresholds lie apart: a worker is added
above `up_depth` or `up_age`, and removed only after the input was nearly empty (a tenth of the depth, half of the age)
for `down_idle` seconds without a break. After a step up, the new worker gets a cool-down to show its effect before
the next one. After any step, the idle time starts from zero, so that workers leave one at a time.
"""

from __future__ import annotations

from upipe.settings import AutoscalePolicy

COOL_DOWN_INTERVALS = 2
"""Intervals of the policy between two steps up: fewer reacts faster and overshoots while workers still start."""
IDLE_DEPTH = 0.1
"""Share of `up_depth` below which the input is nearly empty."""
IDLE_AGE = 0.5
"""Share of `up_age` below which the input is nearly empty."""


class Controller:
    """Decides for one processor.

    Args:
        policy: thresholds and times.
        minimum: workers never go below this by its decision (at least 1).
        maximum: nor above this (at least `minimum`); ValueError otherwise.
    """

    __slots__ = ("_idle_since", "_maximum", "_minimum", "_next_up", "_policy")

    def __init__(self, policy: AutoscalePolicy, minimum: int, maximum: int) -> None:
        self.limit(minimum, maximum)
        self._policy = policy
        self._next_up = float("-inf")
        self._idle_since: float | None = None

    def limit(self, minimum: int, maximum: int) -> None:
        """Other bounds from now on: on a cluster the workers of a node come and go. ValueError as for the class."""
        if not 1 <= minimum <= maximum:
            raise ValueError(f"autoscale needs 1 <= minimum <= maximum, not {minimum} and {maximum}")
        self._minimum = minimum
        self._maximum = maximum

    def decide(self, now: float, workers: int, used_share: float, oldest_age: float, waiting: int) -> int:
        """Take one observation, about every `policy.interval` seconds, and return the step: +1, 0 or -1.

        Args:
            now: seconds of a monotonic clock, always the same one.
            workers: workers that are meant to run: also those still spawning or waiting for their restart, not those
                draining.
            used_share: bytes of the input rings in use, 0..1, frames being worked on included; the fullest one counts
                when there are several.
            oldest_age: age in seconds of the oldest frame that no worker has taken; ignored when `waiting` is 0.
            waiting: frames that no worker has taken.
        """
        if self._busy(used_share, oldest_age, waiting):
            self._idle_since = None
            return self._up(now, workers)
        if not self._idle(workers, used_share, oldest_age, waiting):
            self._idle_since = None
            return 0
        return self._down(now, workers)

    def _busy(self, used_share: float, oldest_age: float, waiting: int) -> bool:
        # A ring full of frames that are all being worked on needs room, not workers: hence `waiting`.
        return waiting > 0 and (used_share > self._policy.up_depth or oldest_age > self._policy.up_age)

    def _idle(self, workers: int, used_share: float, oldest_age: float, waiting: int) -> bool:
        # Nothing waits: idle whatever the depth, since one large frame in work may be a fifth of the ring.
        # Otherwise at most one frame per worker: small frames by the thousand use no visible share of a ring.
        if waiting == 0:
            return True
        shallow = used_share <= IDLE_DEPTH * self._policy.up_depth and waiting <= workers
        return shallow and oldest_age <= IDLE_AGE * self._policy.up_age

    def _up(self, now: float, workers: int) -> int:
        if workers >= self._maximum or now < self._next_up:
            return 0
        self._next_up = now + COOL_DOWN_INTERVALS * self._policy.interval
        return 1

    def _down(self, now: float, workers: int) -> int:
        if self._idle_since is None:
            self._idle_since = now
        if workers <= self._minimum or now - self._idle_since < self._policy.down_idle:
            return 0
        self._idle_since = now
        return -1
