"""Whether a process that was stopped (SIGSTOP) is to be killed. Pure: looks at its state in, a decision out.

A stopped process keeps its connections and its locks, and nothing but its state in /proc tells. Only state T counts: a
debugger that holds it (t) is somebody's wish, and a frozen control group or a suspended machine shows no T. Where more
than the one process was stopped (job control, a script that stops all), who looks was stopped as well: looks that come
late prove nothing, and the time begins anew.

As for workers (supervisor.py, Settings.stopped_grace), with more patience: a keeper takes all its queues with it.
"""

from __future__ import annotations

EVERY = 1.0
"""Seconds between two looks. A look costs some microseconds."""
GRACE = 5.0
"""Seconds that a keeper may be stopped until it is killed and its work begun elsewhere. As long as one that lives may
take to answer (keepers.REACH)."""
LATE = 1.0
"""Seconds by which a look may be late and still counts."""


class Halt:
    """Of one process."""

    def __init__(self) -> None:
        self._since: float | None = None
        """Stopped since then, by looks none of which was late."""
        self._due: float | None = None
        """When the next look was to come."""

    def look(self, state: str | None, now: float) -> bool:
        """Whether it is to be killed.

        Args:
            state: its letter in /proc (segment.process_state); None when it is gone.
            now: seconds of a monotonic clock.
        """
        late = self._due is not None and now > self._due + LATE
        self._due = now + EVERY
        if state != "T":
            self._since = None
        elif self._since is None or late:
            self._since = now
        return self._since is not None and now - self._since >= GRACE
