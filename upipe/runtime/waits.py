"""Waiting on several queues at once in plain code; the twin of memq.wakeup.AsyncWait.

    wait = BlockingWait(rings, CONSUMER, timeout)
    try:
        while wait.sleep():          # first: only arms; then: sleeps; once after the deadline; then False
            if try(): return
    finally:
        wait.leave()

Arm, try again, sleep: a frame that comes between the try and the sleep rings the bell that is armed by then. Who leaves
tells every queue, which passes a wake on that was given here and not used: it may have come from another queue than the
frame did.
"""

from __future__ import annotations

import select
import time

from upipe.memq._ring import Doorbell, Ring

CONSUMER, PRODUCER = 0, 1
_NEED = 64
"""Least room a producer sleeps for, in ring bytes."""


class BlockingWait:
    """One wait of one thread, for frames (CONSUMER) or room (PRODUCER), up to `timeout` seconds (None: for ever)."""

    def __init__(self, rings: tuple[Ring, ...], end: int, timeout: float | None) -> None:
        self.rings = rings
        self.end = end
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._bells: list[Doorbell] = []
        """Where this wait is counted as a sleeper, in the order of `rings`."""
        self._fresh = False
        """Armed since the last try."""
        self._late = False
        self._poll: select.poll | None = None

    def sleep(self) -> bool:
        """True: try again. False: the time is over. After the deadline one more try is granted."""
        if self._late:
            return False
        if not self._fresh:
            self._arm()
            return True
        self._fresh = False
        if self._poll is None:
            self._poll = select.poll()
            for bell in self._bells:
                self._poll.register(bell.fd, select.POLLIN)
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic()) * 1000 + 1
        self._late = not self._poll.poll(left)
        for bell in self._bells:
            bell.drain()
        return True

    def _arm(self) -> None:
        for number, ring in enumerate(self.rings):
            bell = ring.bell(self.end)  # raises when the handle was closed meanwhile
            if number == len(self._bells):
                bell.sleepers += 1
                self._bells.append(bell)
            if self.end == PRODUCER:
                ring.arm(self.end, _NEED, True)
            else:
                ring.arm(self.end)
        self._fresh = True

    def leave(self) -> None:
        """Done waiting, with or without success. Idempotent; never raises, whatever was closed meanwhile."""
        bells, self._bells, self._fresh = self._bells, [], False
        for ring, bell in zip(self.rings, bells, strict=False):  # fewer bells: not all of them could be made
            bell.sleepers -= 1
            ring.left(self.end)
