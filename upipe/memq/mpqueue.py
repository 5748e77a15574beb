"""Queue, JoinableQueue, SimpleQueue: multiprocessing's queues on a MemQ, for code that was written for those.

What goes where: a value is encoded by its caller (plain scalars, text, bytes and arrays natively, all else by
multiprocessing's own pickler) and goes into the ring at once. When the ring is full of bytes, it waits in this process
and a feeder thread, started then, moves it on in order, as the feeder of multiprocessing.Queue does from the first put.

Differences that remain: an unserialisable object is reported by put() itself (through the same hook,
`_on_queue_feeder_error`); `maxsize` counts what is in the ring and what waits in the own process, not what waits in
others; a queue may be pickled at any time, not only while a child is spawned.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize, debug, info, is_exiting, register_after_fork
from pathlib import Path
from types import GenericAlias
from typing import Any, TypeVar

import numpy as np

from upipe.errors import EndOfStream, OutOfSharedMemory, QueueClosed, QueueNotFound
from upipe.frame import DType
from upipe.memq import segment
from upipe.memq._ring import Tally
from upipe.memq.queue import Empty, Full, MemQ

RING_BYTES = 4 << 20
"""Ring of a queue, in bytes, taken from shared memory when the queue is made; less when there is less. Measured on two
busy cores, for 256 KiB, 1, 4 and 16 MiB: ints 0.3, 1, 1.5 and 1 M/s (a small ring is full too often, then each value
goes through the feeder thread), arrays of 1 MiB 0.8, 0.8, 10 and 11 GB/s (in files while they exceed half the ring)."""
_SMALLEST = 1 << 16
_NATIVE = frozenset({type(None), bool, int, float, str, bytes})
_FOREVER = float("inf")

_T = TypeVar("_T")

VALUE, PICKLED, SPILLED, SPILLED_PICKLE = 0, 1, 2, 3
"""What a frame is, in the `key` field of its header: the value itself; bytes of multiprocessing's pickler; the name of
a spill file that holds bytes, or such a pickle."""

_spills = itertools.count(1)


def _ring(maxsize: int = 0) -> MemQ:
    """A ring without end of stream, as large as shared memory allows: any will do, since more waits outside."""
    wanted = RING_BYTES
    while True:
        try:
            ring = MemQ(wanted, max_frames=maxsize)
            ring.never_end()
            return ring
        except OutOfSharedMemory:
            if wanted <= _SMALLEST:
                raise
            wanted //= 4


def _encode(obj: object) -> tuple[int, Any]:
    """(what it is, what to put)."""
    kind = type(obj)
    if kind in _NATIVE:
        return VALUE, obj
    if kind is np.ndarray and _is_plain(obj):
        return VALUE, obj
    return PICKLED, bytes(ForkingPickler.dumps(obj))


def _is_plain(array: Any) -> bool:
    return bool(array.flags.c_contiguous and array.dtype.char in "?bhilqBHILQefdFD" and array.dtype.isnative)


class _Channel:
    """The ring of one queue in this process: puts and gets of any size."""

    def __init__(self, ring: MemQ) -> None:
        self.ring = ring
        self._large = ring.capacity // 2

    def send(self, kind: int, value: Any, timeout: float) -> bool:
        """Put one encoded value. False when there was no room in time."""
        size = len(value) if isinstance(value, (bytes, str)) else getattr(value, "nbytes", 0)
        if isinstance(value, str) and size > self._large // 4:
            size = len(value.encode())
        if size > self._large:
            try:
                return self._spill(kind, value, timeout)
            except OutOfSharedMemory:
                if size > self.ring.capacity - 64:
                    raise  # else it may still go through the ring itself
        return self.ring.send(value, -1, timeout, 0, kind)

    def _spill(self, kind: int, value: Any, timeout: float) -> bool:
        """A value larger than half the ring goes into a file beside the ring, and its name into the ring.

        Owner: the session of the queue (of this process when that has ended), so it lives as long as the queue would.
        The consumer unlinks it once it has read it; when the consumer dies in between, or nobody ever reads it, it goes
        with that session. When the name does not get in, we unlink it.
        """
        if kind == VALUE and not isinstance(value, bytes):
            kind, value = PICKLED, pickle.dumps(value, 5)
        folder = segment.find(self.ring.name).parent
        if not folder.is_dir():
            folder = segment.process_session().path
        path = folder / f"q.spill.{os.getpid()}-{next(_spills)}"
        handle = segment.create_file(path, len(value))
        try:
            view = memoryview(value)
            while view.nbytes:
                view = view[os.write(handle, view[: 1 << 30]) :]
            spilled = SPILLED_PICKLE if kind == PICKLED else SPILLED
            if self.ring.send(f"{folder.name}/{path.name}", int(DType.STR), timeout, 0, spilled):
                return True
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        path.unlink(missing_ok=True)
        return False

    def get(self, timeout: float) -> Any:
        """The next value, decoded.

        Raises:
            Empty: none in time. What unpickling raises: the value is gone then, and the next get goes on behind it.
        """
        value, kind = self.ring.get_keyed(timeout)
        if kind >= SPILLED:
            value = _read_spill(value, kind == SPILLED_PICKLE)
            if kind == SPILLED:
                return value
        return ForkingPickler.loads(value) if kind in (PICKLED, SPILLED_PICKLE) else value


def _read_spill(name: str, mapped: bool) -> Any:
    path = segment.find(name)
    handle = segment.open_file(name)
    try:
        size = os.fstat(handle).st_size
        if mapped:
            return mmap.mmap(handle, size, access=mmap.ACCESS_READ)
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)
        path.unlink(missing_ok=True)


def _seconds(block: bool, timeout: float | None) -> float:
    if not block:
        return 0.0
    return _FOREVER if timeout is None else max(0.0, timeout)


class _Overflow:
    """Values that found the ring full, and the thread that moves them on. Of one process: a forked child has none."""

    def __init__(self, channel: _Channel, on_error: Any) -> None:
        self.channel = channel
        self.on_error = on_error
        self.values: deque[tuple[int, Any, Any]] = deque()
        self.changed = threading.Condition(threading.Lock())
        self.thread: threading.Thread | None = None
        self.closing = False

    def feed(self) -> None:
        """The feeder thread: ends when the queue is closed and all is moved on."""
        debug("starting thread to feed data to the ring")
        while True:
            with self.changed:
                while not self.values:
                    if self.closing:
                        self.channel.ring.close()
                        return
                    self.changed.wait()
                kind, value, obj = self.values[0]  # stays there until it is in: who puts meanwhile must wait behind it
            try:
                self.channel.send(kind, value, _FOREVER)
            except Exception as error:
                if is_exiting() and isinstance(error, QueueClosed):
                    info("error in queue thread: %s", error)
                    return
                self.on_error(error, obj)
            with self.changed:
                self.values.popleft()
                self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()


class Queue:
    """multiprocessing.Queue on a MemQ.

    Args:
        maxsize: most values in it at a time, 0 or less = no limit.
        ctx: taken for compatibility, and not used: the queue works with every start method.

    Owner: the process that makes it. It must keep it until its children have got theirs, as with multiprocessing.
    """

    def __init__(self, maxsize: int = 0, *, ctx: object = None) -> None:
        self._maxsize = max(0, maxsize)
        self._attach(_ring(self._maxsize))

    def _attach(self, ring: MemQ) -> None:
        self._ring = ring
        self._reset()
        register_after_fork(self, Queue._after_fork)

    def _reset(self) -> None:
        self._channel = _Channel(self._ring)
        self._overflow = _Overflow(self._channel, self._on_queue_feeder_error)
        self._used = False  # put() was called here
        self._closed = False
        self._joincancelled = False
        self._jointhread: Any = None
        self._close: Any = None

    def _after_fork(self) -> None:
        closed = self._closed
        self._reset()
        self._closed = closed

    def __getstate__(self) -> tuple[Any, ...]:
        return (self._ring.name, self._maxsize)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        name, self._maxsize = state
        self._attach(MemQ.attach(name))

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put a value. With maxsize, wait for a place up to timeout seconds (None: for ever).

        Raises:
            Full, ValueError (closed).
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        try:
            kind, value = _encode(obj)
        except Exception as error:
            self._on_queue_feeder_error(error, obj)  # as if the feeder had met it: the value is dropped
            return
        self._put(kind, value, obj, _seconds(block, timeout))

    def _put(self, kind: int, value: Any, obj: Any, timeout: float) -> None:
        self._used = True
        overflow = self._overflow
        if not overflow.values and self._try(kind, value, 0.0):  # nothing of ours waits, so the order is kept
            return
        deadline = time.monotonic() + timeout
        while not self._place(overflow, kind, value, obj):
            left = deadline - time.monotonic()
            if timeout <= 0 or left <= 0:
                raise Full
            self._wait(overflow, left)

    def _wait(self, overflow: _Overflow, seconds: float) -> None:
        """Until there may be a place. What waits here goes first: then it is the feeder who tells."""
        with overflow.changed:
            if overflow.values:
                overflow.changed.wait(min(seconds, threading.TIMEOUT_MAX))
                return
        self._ring.wait_frames(self._maxsize, seconds)

    def _place(self, overflow: _Overflow, kind: int, value: Any, obj: Any) -> bool:
        """One attempt behind what waits already. False when maxsize values are there; the ring itself refuses to hold
        more, so that other producers are counted."""
        with overflow.changed:
            if not overflow.values and self._try(kind, value, 0.0):
                return True
            if self._maxsize and self._ring.in_flight() + len(overflow.values) >= self._maxsize:
                return False
            if type(value) is np.ndarray:
                value = value.copy()  # the caller may change it after put()
            overflow.values.append((kind, value, obj))
            overflow.changed.notify_all()
            if overflow.thread is None:
                self._start_thread(overflow)
            return True

    def _try(self, kind: int, value: Any, timeout: float) -> bool:
        try:
            return self._channel.send(kind, value, timeout)
        except QueueClosed:
            raise ValueError(f"Queue {self!r} is closed") from None

    def _start_thread(self, overflow: _Overflow) -> None:
        overflow.thread = threading.Thread(target=overflow.feed, name="QueueFeederThread", daemon=True)
        overflow.thread.start()
        if not self._joincancelled:  # at exit, wait until all is in the ring: what put() took is not lost
            self._jointhread = Finalize(overflow.thread, _join_thread, [weakref.ref(overflow.thread)], exitpriority=-5)
        self._close = Finalize(self, _Overflow.close, [overflow], exitpriority=10)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the next value, waiting up to timeout seconds (None: for ever).

        Raises:
            Empty, ValueError (closed), and what unpickling raises: the value is gone then.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        try:
            return self._channel.get(_seconds(block, timeout))
        except QueueClosed:
            raise ValueError(f"Queue {self!r} is closed") from None
        except EndOfStream:  # only in a queue that another process's bug made end
            raise Empty from None

    def _asked(self, question: Callable[[MemQ], _T]) -> _T:
        """Its answer about the ring; of a closed queue, over a handle made for it, as long as the owner lives."""
        if not self._closed:
            return question(self._ring)
        try:
            with MemQ.attach(self._ring.name) as ring:
                return question(ring)
        except QueueNotFound:
            raise OSError("handle is closed") from None

    def qsize(self) -> int:
        """Values in the ring and in this process's overflow. (As with multiprocessing, also of a closed queue.)

        Raises:
            OSError: closed, and its owner ended.
        """
        return self._asked(MemQ.in_flight) + len(self._overflow.values)

    def empty(self) -> bool:
        """Whether a get would find nothing now.

        Raises:
            OSError: closed, after a put() of this process (as with multiprocessing, who put nothing may still ask);
                or closed, and its owner ended.
        """
        if self._closed and self._used:
            raise OSError("handle is closed")
        return self._asked(MemQ.empty)

    def full(self) -> bool:
        """Whether put_nowait() would raise Full, were the queue not closed. Raises as qsize()."""
        return bool(self._maxsize) and self.qsize() >= self._maxsize

    def get_nowait(self) -> Any:
        """get(False)."""
        return self.get(False)

    def put_nowait(self, obj: Any) -> None:
        """put(obj, False)."""
        self.put(obj, False)

    def close(self) -> None:
        """No more of this process: what it has put still goes into the ring. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._overflow.thread is None:
            self._ring.close()
        else:
            self._overflow.close()  # the feeder leaves the ring when all is in

    def join_thread(self) -> None:
        """After close(): wait until all that this process put is in the ring."""
        debug("Queue.join_thread()")
        assert self._closed, f"Queue {self!r} not closed"
        if self._jointhread:
            self._jointhread()

    def cancel_join_thread(self) -> None:
        """At exit, do not wait for what is not in the ring yet: it may be lost."""
        debug("Queue.cancel_join_thread()")
        self._joincancelled = True
        if self._jointhread is not None:
            self._jointhread.cancel()

    @staticmethod
    def _on_queue_feeder_error(e: Exception, obj: Any) -> None:
        """Hook of multiprocessing.Queue: obj could not be put. May be overridden."""
        traceback.print_exception(e)

    __class_getitem__: Any = classmethod(GenericAlias)


def _join_thread(reference: weakref.ref[threading.Thread]) -> None:
    debug("joining queue thread")
    thread = reference()
    if thread is not None:
        thread.join()


class JoinableQueue(Queue):
    """multiprocessing.JoinableQueue on a MemQ."""

    def __init__(self, maxsize: int = 0, *, ctx: object = None) -> None:
        super().__init__(maxsize, ctx=ctx)
        # The count of unfinished tasks: a file of one page in the session of the queue, which removes it.
        path = segment.process_session().unique("q.tasks")
        handle = segment.create_file(path, mmap.PAGESIZE)
        try:
            self._tasks = Tally(handle)
        finally:
            os.close(handle)
        self._tasks_name = f"{path.parent.name}/{path.name}"
        self._unlink_tasks = weakref.finalize(self, _unlink, path, os.getpid())
        self._unlink_tasks.atexit = False

    def __getstate__(self) -> tuple[Any, ...]:
        return (*super().__getstate__(), self._tasks_name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state[:-1])
        self._tasks_name = state[-1]
        handle = segment.open_file(self._tasks_name)
        try:
            self._tasks = Tally(handle)
        finally:
            os.close(handle)

    def _put(self, kind: int, value: Any, obj: Any, timeout: float) -> None:
        self._tasks.add()  # before it can be taken and done
        try:
            super()._put(kind, value, obj, timeout)
        except BaseException:
            self._tasks.take()
            raise

    def task_done(self) -> None:
        """One value that was got is dealt with.

        Raises:
            ValueError: more often than values were put.
        """
        if not self._tasks.take():
            raise ValueError("task_done() called too many times")

    def join(self) -> None:
        """Wait until every value that was put is dealt with."""
        self._tasks.wait()


def _unlink(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        path.unlink(missing_ok=True)


class SimpleQueue:
    """multiprocessing.SimpleQueue on a MemQ: put() waits while the ring is full."""

    def __init__(self, *, ctx: object = None) -> None:
        self._attach(_ring())

    def _attach(self, ring: MemQ) -> None:
        self._ring = ring
        self._channel = _Channel(ring)

    def __getstate__(self) -> str:
        return self._ring.name

    def __setstate__(self, state: str) -> None:
        self._attach(MemQ.attach(state))

    def put(self, obj: Any) -> None:
        """Put a value, waiting for room. What the pickler raises is raised here."""
        kind, value = _encode(obj)
        try:
            self._channel.send(kind, value, _FOREVER)
        except QueueClosed:
            raise OSError("handle is closed") from None

    def get(self) -> Any:
        """Wait for the next value."""
        try:
            return self._channel.get(_FOREVER)
        except QueueClosed:
            raise OSError("handle is closed") from None

    def empty(self) -> bool:
        """Whether get() would wait."""
        try:
            return self._ring.empty()
        except QueueClosed:
            raise OSError("handle is closed") from None

    def close(self) -> None:
        """Leave the queue. Idempotent."""
        self._ring.close()

    __class_getitem__: Any = classmethod(GenericAlias)


__all__ = ["Empty", "Full", "JoinableQueue", "Queue", "SimpleQueue"]
