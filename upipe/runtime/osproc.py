"""Processes, as the kernel sees them: pidfds, sessions, groups, parents. Nothing here knows of pipes."""

from __future__ import annotations

import ctypes
import os
import select
import signal

from upipe.memq import segment

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def reap(pid: int) -> None:
    """Wait for a child that is about to end."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass  # a SIGCHLD handler of the program reaped it


def wait_dead(pidfd: int, seconds: float) -> bool:
    """Whether the process ends within that time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def kill_session(session: int) -> None:
    """Kill every process of a session but its leader and this process, until there is none. The number must be held."""
    for _ in range(100):  # a fork may outrun one look, never a hundred
        found = False
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            found |= pid not in (session, os.getpid()) and _kill_in_session(pid, session)
        if not found:
            return


def _kill_in_session(pid: int, session: int) -> bool:
    try:
        if os.getsid(pid) != session or segment.process_state(pid) in ("Z", "X", None):
            return False
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if os.getsid(pid) == session:  # the pidfd names the process that was looked at
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            wait_dead(pidfd, 1.0)
        return True
    except ProcessLookupError:
        return True
    finally:
        os.close(pidfd)


def kill_group(pid: int) -> None:
    """Kill a process group; its number must be held by a member that is not reaped."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in it


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before the kernel knew


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (subreaper)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
