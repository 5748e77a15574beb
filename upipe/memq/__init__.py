"""The memory queue: frames in shared memory, for any number of producer and consumer processes.

MemQ                                the ring itself
Queue, JoinableQueue, SimpleQueue   multiprocessing's queues on it (loaded when asked for)
QueueStats                          a frozen snapshot of a queue's counters
"""

from __future__ import annotations

import errno
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from upipe.errors import UnsupportedPlatform

_MACHINES = ("x86_64", "aarch64")


def _check_platform() -> None:
    """Refuse machines that the ring cannot run on, in words, before anything fails in a stranger way."""
    here = f"this is {platform.system()} {platform.release()} on {platform.machine()}, {sys.byteorder} endian, "
    here += f"Python of {(sys.maxsize + 1).bit_length()} bits"
    if not sys.platform.startswith("linux"):
        raise UnsupportedPlatform(f"uPipe runs on Linux only (futexes, pidfds, /dev/shm); {here}")
    if sys.maxsize < 2**32 or sys.byteorder != "little" or platform.machine() not in _MACHINES:
        raise UnsupportedPlatform(f"uPipe runs on 64-bit little-endian {' and '.join(_MACHINES)}; {here}")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", errno.ENOSYS) in (errno.EPERM, errno.ENOSYS):  # not when descriptors are short
            raise UnsupportedPlatform(
                f"uPipe needs pidfd_open (Linux 5.3, and a sandbox that allows it): {error}; {here}"
            ) from error
    try:
        import upipe.memq._ring  # noqa: F401
    except ImportError as error:
        raise UnsupportedPlatform(
            f"uPipe's native extension upipe.memq._ring cannot be loaded ({error}); install uPipe from a wheel, or "
            f"build it in the source tree with `pip install -e .`; {here}"
        ) from error


_check_platform()

from upipe.memq.queue import Empty, Full, MemQ  # noqa: E402  (after the check)
from upipe.memq.stats import QueueStats  # noqa: E402

if TYPE_CHECKING:
    from upipe.memq.mpqueue import JoinableQueue, Queue, SimpleQueue


def __getattr__(name: str) -> Any:
    if name in ("JoinableQueue", "Queue", "SimpleQueue"):  # they load multiprocessing, which most workers do not need
        from upipe.memq import mpqueue

        return getattr(mpqueue, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Empty", "Full", "JoinableQueue", "MemQ", "Queue", "QueueStats", "SimpleQueue"]
