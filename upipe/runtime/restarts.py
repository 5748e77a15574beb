"""Restarts: when the workers of one processor that died are replaced, and when to give up.

Pure: deaths come in with their time, waits come out.
"""

from __future__ import annotations

from collections import deque

from upipe.settings import RestartPolicy

_MOST_DOUBLINGS = 64
"""Exponents beyond this change nothing (`backoff_max` holds) and would overflow a float."""


class Restarts:
    """The deaths of one processor's workers inside the window.

    Args:
        policy: limit (0: none), window and back-off, in seconds.
    """

    __slots__ = ("_deaths", "_policy")

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._deaths: deque[float] = deque()
        # Invariant: ascending, and none is older than the window, seen from the last one.

    @property
    def count(self) -> int:
        """Deaths inside the window that ends at the latest death."""
        return len(self._deaths)

    def died(self, now: float) -> float | None:
        """Note a death.

        Args:
            now: seconds of a monotonic clock, always the same one.

        Returns:
            Seconds to wait before the restart (0.0 for the first death inside the window), or None to give up: this
            was one death more than `limit` inside the window.
        """
        self._prune(now)
        self._deaths.append(now)
        if 0 < self._policy.limit < self.count:
            return None
        return self._delay()

    def _prune(self, now: float) -> None:
        while self._deaths and now - self._deaths[0] >= self._policy.window:
            self._deaths.popleft()

    def _delay(self) -> float:
        if self.count == 1:
            return 0.0
        doublings = min(self.count - 2, _MOST_DOUBLINGS)
        return min(self._policy.backoff_max, self._policy.backoff * 2.0**doublings)
