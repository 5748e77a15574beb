"""The tree of processes below this one: adopt, count, end."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Daemons that a peer leaves become our children, so that `end_descendants` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            yield from map(int, task.read_text().split())
        except OSError:
            continue


def descendants(pid: int) -> list[int]:
    """Every process below pid, parents first."""
    found = []
    todo = list(_children(pid))
    while todo:
        one = todo.pop(0)
        found.append(one)
        todo += _children(one)
    return found


def end_descendants(seconds: float = 2.0) -> int:
    """Kill every process this one has started, directly or not, and reap it. Returns how many there were."""
    ended = 0
    deadline = time.monotonic() + seconds
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                ended += 1
            except ProcessLookupError:
                continue
        _reap()
        time.sleep(0.01)
    return ended


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def tree_seconds(pid: int, without: int = 0) -> float:
    """CPU seconds so far of that process and its descendants (the living ones), less one of them.

    Who looks leaves itself out: looking at a hundred processes costs more than they use.
    """
    return sum(_seconds(one) for one in [pid, *descendants(pid)] if one != without)


def _seconds(pid: int) -> float:
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[0])
        except (OSError, IndexError, ValueError):
            continue
    return total / 1e9
