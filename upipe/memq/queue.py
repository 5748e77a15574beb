"""MemQ: a queue of frames in shared memory, for any number of producer and consumer processes."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from queue import Empty, Full
from typing import Any, Literal, Self

from upipe.errors import EndOfStream, QueueNotFound
from upipe.memq import _ring, segment
from upipe.memq.stats import QueueStats
from upipe.memq.wakeup import AsyncWait
from upipe.settings import DEFAULT_QUEUE_BYTES

Policy = Literal["block", "drop_oldest", "latest"]
POLICIES: dict[str, int] = {"block": 0, "drop_oldest": 1, "latest": 2}
_NO_PICKLE, _NO_CRC, _SUPERVISED = 1, 2, 4
_NOTHING = object()


class MemQ(_ring.Awaiting):
    """A ring of data frames in shared memory; a faster multiprocessing.Queue.

        q = MemQ(4 * 2**20)           # bytes of ring
        q.put({"a": 1}); q.get()      # many processes, both ends
        MemQ.attach(q.name)           # by name, or pass q to a multiprocessing child
        q.close(); q.unlink()         # this handle and its end of stream; the memory

    Args:
        size: bytes of ring, headers (64 per frame) included; rounded up to a power of two from 4096. Default 4 MiB.
        policy: what a put does when there is no room: "block" waits; "drop_oldest" drops frames that nobody took yet;
            "latest" keeps only the newest. What is dropped is counted (stats().dropped).
        max_frames: most frames in the ring at a time, 0 = only bytes count.
        producers: ends of stream to wait for; 0 = those that put something.
        allow_pickle: False refuses values that need pickle, on both sides.
        check_crc: False skips the CRC32 of payload and header.
        name: a label for attach(); unique in this process.
        start: position at which the stream begins, a multiple of 64: not 0 in the copy of a queue of another node.

    Owner: the process that creates it. Its session, with the segment, goes at its exit; after kill -9 at a sweep.
    A process that dies holding a frame or a claim is found by pidfd, and its frames are delivered again.

    Raises:
        OutOfSharedMemory, SegmentRefused, ValueError.
    """

    def __init__(
        self,
        size: int = DEFAULT_QUEUE_BYTES,
        *,
        policy: Policy = "block",
        max_frames: int = 0,
        producers: int = 0,
        allow_pickle: bool = True,
        check_crc: bool = True,
        name: str | None = None,
        supervised: bool = False,
        start: int = 0,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)}, not {policy!r}")
        if max_frames < 0 or producers < 0:
            raise ValueError(f"max_frames and producers are 0 or more, not {max_frames} and {producers}")
        if start < 0 or start % 64:
            raise ValueError(f"start is a multiple of 64, not {start}")
        if name is not None:
            segment.check_label(name)
        capacity, total = _ring.segment_bytes(size)
        session = segment.process_session()
        path = session.path / name if name else session.unique("q")
        options = (0 if allow_pickle else _NO_PICKLE) | (0 if check_crc else _NO_CRC)
        options |= _SUPERVISED if supervised else 0
        handle = segment.create_file(path, total)
        inode = os.fstat(handle).st_ino
        try:
            label = f"{session.path.name}/{path.name}"
            root = str(session.path.parent)
            self._create(handle, capacity, POLICIES[policy], max_frames, options, root, label, start)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        for number in range(producers):
            self.declare_producer(number)
        self._creator = os.getpid()
        self._finalizer = weakref.finalize(self, _unlink_own, str(path), os.getpid(), inode)
        self._finalizer.atexit = False  # the session goes at exit, after multiprocessing has joined the children

    @classmethod
    def attach(cls, name: str) -> Self:
        """Attach to a queue of this user by its name (or its unique label).

        Raises:
            QueueNotFound, SegmentInvalid (foreign, other version, truncated), SegmentRefused (owner, mode).
        """
        queue = cls.__new__(cls)
        queue._creator = 0
        path = segment.find(name)
        handle = segment.open_file(f"{path.parent.name}/{path.name}")
        try:
            queue._attach(handle, str(path.parent.parent), f"{path.parent.name}/{path.name}")
        finally:
            os.close(handle)
        return queue

    @property
    def name(self) -> str:
        """Name for attach(): "<session>/<queue>"."""
        return self.label

    @property
    def size(self) -> int:
        """Bytes of ring."""
        return self.capacity

    def unlink(self) -> None:
        """Remove the name; the memory goes when the last handle goes. Idempotent."""
        if self._creator == os.getpid():
            self._finalizer()
            return
        try:
            os.unlink(segment.find(self.label))
        except (FileNotFoundError, QueueNotFound):
            pass  # somebody unlinked it before, or its owner ended

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (type(self).attach, (self.label,))

    # ------------------------------------------------------------ asyncio

    # aput and aget come here for what cannot be had at once, nor in a lull of the loop.

    async def _aput(self, value: object, timeout: float | None, dtype: int, key: int) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = AsyncWait((self,), 1)
        try:
            while await waiting.sleep(_left(deadline)):
                if self.send(value, dtype, 0.0, self.execution_id, key):
                    return
        finally:
            waiting.leave()
        raise Full

    async def _aget(self, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = AsyncWait((self,), 0)
        try:
            while await waiting.sleep(_left(deadline)):
                value = self.get_or(_NOTHING)
                if value is not _NOTHING:
                    return value
        finally:
            waiting.leave()
        raise Empty

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                yield self.get()
            except EndOfStream:
                return

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            try:
                yield await self.aget()
            except EndOfStream:
                return

    # ------------------------------------------------------------ watching

    def stats(self) -> QueueStats:
        """A frozen snapshot of the counters; any attached process can read it at any time."""
        return QueueStats(**self.counters())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        if self._creator == os.getpid():
            self.unlink()

    def __repr__(self) -> str:
        return f"<MemQ {self.label} {self.capacity} bytes>"


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _unlink_own(path: str, pid: int, inode: int) -> None:
    if os.getpid() != pid:
        return  # a forked child: the name is its parent's
    try:
        if os.lstat(path).st_ino == inode:  # else a newer queue has the label
            os.unlink(path)
    except FileNotFoundError:
        pass  # unlinked by hand, or gone with the session


__all__ = ["Empty", "Full", "MemQ", "Policy"]
