"""Sessions and segment files: who owns what in shared memory, and what is left after kill -9.

    <root>/                      /dev/shm/upipe-<uid>, directory 0700, shared by all processes of the user
      <pid>-<start>/             one session per process that creates queues or sleeps on one
        lock                     flock'ed by the process (and by children forked from it): dies with them
        <queue>                  segment files, 0600, sized with posix_fallocate
        bell.<n>                 doorbells (FIFOs) of this process
        ...                      what the runtime spools (code, dead letters, checkpoints)

The process removes its session at exit. After kill -9 the directory stays until the next process of this user sweeps:
a session is swept only when its process is proven dead and its lock can be had. Live mappings of a swept segment stay
valid.
Rejected: multiprocessing.shared_memory, whose resource tracker unlinks segments that others still use.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import itertools
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from upipe.errors import OutOfSharedMemory, QueueNotFound, SegmentRefused

_counter = itertools.count(1)
_session: Session | None = None
_session_mutex = threading.Lock()


def root() -> Path:
    """Directory of all sessions of this user: $UPIPE_SHM, or /dev/shm/upipe-<uid>. Created with mode 0700.

    Raises:
        SegmentRefused: it exists but belongs to somebody else or is open to others.
    """
    path = Path(os.path.abspath(os.environ.get("UPIPE_SHM") or f"/dev/shm/upipe-{os.getuid()}"))
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise OutOfSharedMemory(f"cannot create {path}: {error.strerror}; is /dev/shm mounted and writable?") from error
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise SegmentRefused(
            f"{path} must be a directory of yours with mode 0700, found owner {info.st_uid} mode "
            f"{stat.S_IMODE(info.st_mode):04o}; remove it, or set UPIPE_SHM to another directory"
        )
    return path


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks after boot: with the pid its name for ever. None when there is no process.

    Raises:
        OSError: it cannot be told (no descriptor left); never take that for a death.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])


def process_state(pid: int) -> str | None:
    """State letter of a process (R, S, D, T, t, Z, X), None when there is none. Raises OSError as start_time."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()[0]


class Session:
    """One directory of this process, locked as long as it lives."""

    def __init__(self, parent: Path, name: str) -> None:
        self.pid = os.getpid()
        self.path = parent / name
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        try:
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a sweeper tests it this instant; it leaves a live process alone
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def forget_lock(self) -> None:
        """In a forked child that shall not keep the parent's session alive: let go of the inherited lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def unique(self, label: str) -> Path:
        """A path in this session that nothing uses yet."""
        return self.path / f"{label}.{next(_counter)}"

    def remove(self) -> None:
        """Remove the directory and all in it; only in the process that made it."""
        global _session
        if os.getpid() == self.pid:
            shutil.rmtree(self.path, ignore_errors=True)
            self.forget_lock()
            if _session is self:
                _session = None  # who needs one after this makes a new one


def process_session() -> Session:
    """The session of this process, made at first use; sweeps dead sessions then."""
    global _session
    with _session_mutex:
        if _session is None or _session.pid != os.getpid():
            here = root()
            sweep()
            pid = os.getpid()
            _session = Session(here, f"{pid}-{start_time(pid)}")
            at_exit(_session.remove, -100)
        return _session


def at_exit(call: Callable[[], object], priority: int) -> None:
    """Call at the end of this process, and not in children forked from it. Lower priorities run later.

    With multiprocessing loaded it has the last word: its exit function joins children that may still need the queues,
    and runs the finalizers of priority below 0 after that; its children, which leave by os._exit, run only these.
    """
    if "multiprocessing.util" in sys.modules:
        from multiprocessing.util import Finalize

        Finalize(None, call, exitpriority=priority)
    else:
        atexit.register(_in_process, os.getpid(), call)


def _in_process(pid: int, call: Callable[[], object]) -> None:
    if os.getpid() == pid:
        call()


def forked_session() -> None:
    """Call first in a forked worker: the parent's session is not ours, and its lock shall die with the parent."""
    global _session
    if _session is not None and _session.pid != os.getpid():
        _session.forget_lock()
        _session = None


def _after_fork() -> None:
    global _session_mutex
    _session_mutex = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def session_path(pid: int, start: int) -> Path:
    """Where the session of a process is."""
    return root() / f"{pid}-{start}"


def _is_dead(entry: Path) -> bool:
    pid, _, start = entry.name.partition("-")
    if not pid.isdigit() or not start.isdigit():
        return False
    try:
        return start_time(int(pid)) != int(start) or process_state(int(pid)) in ("Z", "X", None)
    except OSError:
        return False  # not proven


YOUNG = 60.0
"""Seconds for which a session without a lock is left alone: its process may be about to make it."""


def sweep() -> list[str]:
    """Remove what dead sessions left. Returns their names."""
    return [entry.name for entry in root().iterdir() if _is_dead(entry) and _sweep(entry)]


def _sweep(entry: Path, patience: float | None = None) -> bool:
    """Remove one dead session unless somebody still uses it. True when it is gone.

    Args:
        patience: seconds for which it is left alone while it has no lock; default YOUNG.
    """
    try:
        lock = os.open(entry / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        try:
            if time.time() - entry.lstat().st_mtime < (YOUNG if patience is None else patience):
                return False  # seen from another pid namespace, a process that starts looks dead
        except FileNotFoundError:
            return False  # somebody else swept it
        shutil.rmtree(entry, ignore_errors=True)
        return True
    except OSError:
        return False  # no session of ours: a file or a link of that name, or no descriptor left
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry, ignore_errors=True)
        return True
    except BlockingIOError:
        return False  # children of the dead process still use it; they hold its lock
    finally:
        os.close(lock)


RESERVED = ("lock", "bell.", "q.")


def check_label(label: str) -> None:
    """Refuse what cannot be the name of a queue file.

    Raises:
        ValueError
    """
    if not label or "/" in label or "\0" in label or label in (".", "..") or len(os.fsencode(label)) > 200:
        raise ValueError(f"{label!r} is no label: up to 200 bytes, without '/'")
    if label.startswith(RESERVED):
        raise ValueError(f"{label!r} is no label: names that begin with {', '.join(RESERVED)} are uPipe's own")


def create_file(path: Path, size: int) -> int:
    """Create a segment file of `size` bytes, all of it backed by memory. Returns a descriptor.

    Raises:
        OutOfSharedMemory: with the needed and the available bytes; nothing is left.
        FileExistsError: the name is taken.
    """
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        free = os.fstatvfs(handle)
        available = free.f_bavail * free.f_frsize
        try:
            if size > available:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(handle, 0, size)  # a bare ftruncate would die of SIGBUS at the first touch
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            raise OutOfSharedMemory(
                f"{path.parent.parent} has {available:,} bytes of shared memory available, the queue needs {size:,}; "
                "free some, make the queue smaller, or enlarge it (containers: --shm-size)"
            ) from error
    except BaseException:
        os.close(handle)
        os.unlink(path)
        raise
    return handle


def find(name: str) -> Path:
    """Path of a queue: "<session>/<queue>" as MemQ.name says, or a bare label that is unique among live sessions.

    Raises:
        QueueNotFound: there is none, or several of that label.
    """
    here = root()
    parts = name.split("/")
    if len(parts) > 2 or any(part in ("", ".", "..") for part in parts):
        raise QueueNotFound(f"{name!r} is no queue name; use MemQ.name of the queue, like '4711-123456/q.1'")
    if len(parts) == 2:
        return here / name
    found = [entry / name for entry in here.iterdir() if (entry / name).exists() and not _is_dead(entry)]
    if len(found) != 1:
        raise QueueNotFound(f"{len(found)} queues are called {name!r} under {here}; pass the full MemQ.name")
    return found[0]


def open_file(name: str) -> int:
    """Open a segment file by queue name, checking owner and mode.

    Raises:
        QueueNotFound, SegmentRefused.
    """
    path = find(name)
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise QueueNotFound(f"no queue {name!r} under {root()}: it was unlinked, or its owner ended") from None
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise SegmentRefused(f"{path} cannot be opened: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SegmentRefused(f"{path} is a symbolic link; a queue never is") from None
        raise
    info = os.fstat(handle)
    if info.st_uid != os.getuid() or info.st_mode & 0o077 or not stat.S_ISREG(info.st_mode):
        os.close(handle)
        raise SegmentRefused(
            f"{path} must be a file of yours with mode 0600, found owner {info.st_uid} mode "
            f"{stat.S_IMODE(info.st_mode):04o}"
        )
    return handle


def remove_dead(pid: int, start: int) -> None:
    """Remove the session of one process that is known to be dead (a supervisor, after a worker's death), also when it
    died just as it made or removed it: then it has no lock."""
    path = session_path(pid, start)
    if path.exists() and _is_dead(path):
        _sweep(path, patience=0.0)


def end_worker_session() -> None:
    """At the end of a worker, which leaves by os._exit: remove its session, if it made one."""
    if _session is not None and _session.pid == os.getpid():
        _session.remove()
