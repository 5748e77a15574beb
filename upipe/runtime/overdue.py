"""Whether a fork server that owes an answer is to be killed. Pure: what was asked, answered and seen in, a word out.

A stopped one (SIGSTOP) keeps its socket, and so does one that hangs: only that it does not answer tells, and it is
asked only for workers. So nobody looks as long as nothing is asked, and an idle pipe has no timer for it. A worker that
ends, which the server would have to report, is missed by other means (Hearing._missed).

Its death takes all its workers along. So one that is slow (a machine without memory, an interpreter that starts) has
much longer than one that was stopped; a debugger that holds it (t) is somebody's wish. A look that comes late proves
nothing: who looks was stopped as well, or was busy, and the time begins anew.
"""

from __future__ import annotations

STOPPED = 5.0
"""Seconds that a stopped server may owe an answer until it is killed. As long as a stopped keeper has (halts.GRACE)."""
HANGS = 30.0
"""Seconds that any other may: hundreds of times what a fork takes."""
EVERY = 1.0
"""Seconds between two looks at one that is slow."""
LATE = 1.0
"""Seconds by which a look may be late and still counts."""


class Overdue:
    """Of one fork server after the other."""

    def __init__(self) -> None:
        self.due: float | None = None
        """When to look; None: it owes nothing."""
        self._since = 0.0
        """It owes since then, and has not answered anything."""

    def asked(self, now: float) -> None:
        """It is to fork a worker.

        Args:
            now: seconds of a monotonic clock, always the same one.
        """
        if self.due is None:
            self._begin(now)

    def answered(self, more: bool, now: float) -> None:
        """It has answered, or is another one; `more`: it still owes."""
        self.due = None
        if more:
            self._begin(now)

    def look(self, state: str | None, now: float) -> str:
        """Why it is to be killed; "" when it is not, then `due` says when to look again.

        Args:
            state: its letter in /proc (segment.process_state); None when it is gone.
        """
        if self.due is None:
            return ""
        if now > self.due + LATE or state == "t":
            self._begin(now)
            return ""
        owes = now - self._since
        self.due = now + EVERY
        if state == "T":
            return f"it was stopped (SIGSTOP) and answered nothing for {owes:.0f} s"
        return f"it answered nothing for {owes:.0f} s" if owes >= HANGS else ""

    def _begin(self, now: float) -> None:
        self._since, self.due = now, now + STOPPED
