"""Helpers of the queue tests: queues that clean up after themselves, children that end, and no sleeping to synchronise.

Where a test must know that another thread or process sleeps on a queue, it reads the queue's own waiting bits
(`asleep`), and for tasks its counter of sleeps (`waiting`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from upipe.memq import segment
from upipe.memq.layout import CONTROL
from upipe.memq.queue import MemQ

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0
"""Seconds after which a wait of a test has failed."""
_OFFSET = {field.name: field.offset for field in CONTROL}


def end(process, code: int = 0) -> None:
    """Join a child and check how it ended."""
    process.join(DEADLINE)
    assert process.exitcode == code


def kill(process) -> None:
    """kill -9, and reap."""
    os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE)
    assert process.exitcode == -signal.SIGKILL


def until(condition, what: str = "the condition"):
    """Spin until it is true (a look at the state of another thread or process; nothing is timed by it)."""
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true in {DEADLINE} s"
        os.sched_yield()
    return found


class Memory:
    """The segment of a queue as bytes, written behind the ring's back."""

    def __init__(self, q: MemQ) -> None:
        import mmap

        path = segment.find(q.name)
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        self.ring = len(self.map) - q.capacity

    def word(self, name: str, index: int = 0) -> int:
        at = _OFFSET[name] + 8 * index
        return int.from_bytes(self.map[at : at + 8], "little")

    def flip(self, position: int, bit: int) -> None:
        """Flip one bit of the frame at a position."""
        at = (position + bit // 8) % (len(self.map) - self.ring)
        self.map[self.ring + at] ^= 1 << bit % 8

    def close(self) -> None:
        self.map.close()


class Held:
    """A lock of the queue, held by this thread inside the block."""

    def __init__(self, q: MemQ, name: str) -> None:
        import ctypes

        self.memory = Memory(q)
        self.libc = ctypes.CDLL(None)
        self.buffer = ctypes.c_char.from_buffer(self.memory.map, _OFFSET[name])
        self.mutex = ctypes.byref(self.buffer)
        self.name = name

    def __enter__(self) -> Held:
        assert self.libc.pthread_mutex_lock(self.mutex) == 0
        return self

    def until_somebody_waits(self) -> None:
        """FUTEX_WAITERS is set in the lock's first word."""
        until(lambda: self.memory.word(self.name) & 0x8000_0000, f"somebody waits for {self.name}")

    def __exit__(self, *_: object) -> None:
        assert self.libc.pthread_mutex_unlock(self.mutex) == 0
        del self.mutex, self.buffer
        self.memory.close()


def holder(q: MemQ, child):
    """A process, made by the fixture `child`, that has taken the next frame and holds it."""
    holds = FORK.Event()

    def takes():
        q.take()
        holds.set()
        signal.pause()

    process = child(takes)
    assert holds.wait(60)
    return process


def in_flight(q: MemQ) -> int:
    """Frames in it that are not finished."""
    return q.stats().in_flight


def asleep(q: MemQ, count: int = 1, producers: bool = False):
    """Wait until that many handles sleep (their waiting bits are set, and they looked once more)."""
    m = Memory(q)
    name = "producers_waiting" if producers else "consumers_waiting"
    try:
        until(lambda: sum(m.word(name, i).bit_count() for i in range(8)) >= count, f"{count} asleep")
    finally:
        m.close()


async def waiting(q: MemQ, count: int, counter: str = "empty_waits") -> None:
    """Let other tasks run until that many waits were counted."""
    deadline = time.monotonic() + DEADLINE
    while q.counters()[counter] < count:
        assert time.monotonic() < deadline, f"{counter} did not reach {count}"
        await asyncio.sleep(0)


class Thread(threading.Thread):
    """A thread whose result or exception is returned by result()."""

    def __init__(self, function, *args) -> None:
        super().__init__(daemon=True)
        self.function, self.args = function, args
        self.value = self.error = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.function(*self.args)
        except BaseException as error:
            self.error = error

    def result(self):
        self.join(DEADLINE)
        assert not self.is_alive(), "the thread did not end"
        if self.error is not None:
            raise self.error
        return self.value


def python(code: str, root: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Run a script in a fresh interpreter, with its own directory of sessions."""
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    if root is not None:
        env["UPIPE_SHM"] = str(root)
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False, **kwargs
    )


def descriptors() -> int:
    """Open ones of this process, without those of what other tests left to the garbage collector."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def few_descriptors(spare: int):
    """No more than `spare` descriptors can be opened inside."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        while True:
            try:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for _ in range(spare):
            os.close(fillers.pop())
        yield
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
