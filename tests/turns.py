"""Turns of test processes that run side by side (scripts/_side_by_side.py): a test that measures has the machine alone.

    with turn(alone=False):     together with others that are not alone
    with turn(alone=True):      with no other test; new ones wait, those that run end first

Two files that are flock'ed, the door before the room: who waits to be alone holds the door, so that others, one after
the other, cannot keep it out for ever. Locks die with their process, but for children that it forked; so they are also
given up at the end of each test. A lone pytest takes no turns.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

PLACE = os.environ.get("UPIPE_TEST_TURNS")
"""A directory that the test processes share."""
PATIENCE = 1900.0
"""Seconds: as long as the longest test may take (--long)."""
_MODE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_door, _room = (os.open(f"{PLACE}/{name}", _MODE, 0o600) if PLACE else -1 for name in ("door", "room"))


@contextmanager
def turn(alone: bool) -> Iterator[None]:
    """Wait for a turn, and have it."""
    if not PLACE:
        yield
        return
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    _take(_door, how)
    try:
        _take(_room, how)
    finally:
        fcntl.flock(_door, fcntl.LOCK_UN)
    try:
        yield
    finally:
        fcntl.flock(_room, fcntl.LOCK_UN)


def _take(lock: int, how: int) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise RuntimeError(f"no turn within {PATIENCE:g} s: another test has not ended ({PLACE})") from None
        time.sleep(0.02)
