"""What a sleeper waits on: doorbells, pidfds of peers, and futures of an event loop.

A Bell is a FIFO in this process's session. The ring decides who is rung; here it is only made, watched and removed.

Several threads and tasks may wait on one bell. A ring wakes one of them (threads may all look); who leaves tells the
ring (`Ring.left`), which makes the next one look when there may be more. So no wake is lost, and 64 tasks that wait for
one frame do not all run for it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import select
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from upipe.memq import segment
from upipe.memq._ring import Doorbell, Lull, Watch, lull

if TYPE_CHECKING:
    from upipe.memq._ring import Ring

_ids = itertools.count(1)
_bells: weakref.WeakSet[Bell] = weakref.WeakSet()
_watches: weakref.WeakSet[PeerWatch] = weakref.WeakSet()

LAZY = 0.002
"""Seconds that a producer's first sleep waits for an eighth of the ring, before it waits for any room."""


class Bell(Doorbell):
    """One doorbell of this process: `fd` becomes readable when somebody rings `id`.

    Owner: the handle it was made for, which closes it. After kill -9 the FIFO goes with the session.
    """

    def __init__(self) -> None:
        session = segment.process_session()
        number = next(_ids)
        self.path = session.path / f"bell.{number}"
        os.mkfifo(self.path, 0o600)
        try:
            self._made(os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW), number)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        self._loops: dict[asyncio.AbstractEventLoop, _LoopSide] = {}
        self.futures: deque[asyncio.Future[None]] = deque()
        """Of `future()`: all end at the next ring."""
        _bells.add(self)

    def close(self) -> None:
        """Remove it; who waits looks again. Idempotent."""
        sides, self._loops = self._loops, {}
        fd = self._unmade()
        if fd < 0:
            return
        self.path.unlink(missing_ok=True)
        owners = [side for side in sides.values() if side.detach(fd)]
        if owners:  # the loop of another thread still watches it, and must let go before the number is used again
            owners[-1].close_later(fd)
        else:
            os.close(fd)

    def closing(self) -> None:
        """The handle was closed: all that wait here look."""
        super().closing()
        for side in list(self._loops.values()):
            side.release_all()

    def left(self) -> None:
        """A waiter left by disarm(), and took the waiting bit or a wake with it: the others look again."""
        if self.sleepers or self.tasks or self.futures:
            self.ring_self()

    def future(self) -> asyncio.Future[None]:
        """A future of the running loop that ends at the next ring, whoever else is woken by it. Arm the ring after
        making it, then try, then await. Who uses it counts itself in `sleepers`."""
        side = self._side()
        future: asyncio.Future[None] = side.loop.create_future()
        self.futures.append(future)
        return future

    def join(self, waiter: AsyncWait) -> None:
        """A wait of the running loop registers here. Arm the ring after it, then try, then await."""
        self._side().waiters.append(waiter)
        self.tasks += 1

    def _side(self) -> _LoopSide:
        loop = asyncio.get_running_loop()
        side = self._loops.get(loop)
        if side is None:
            for other in [other for other in self._loops if other.is_closed()]:
                self.tasks -= len(self._loops.pop(other).waiters)
            side = self._loops[loop] = _LoopSide(loop, self)
        side.watch()
        return side

    def quit(self, waiter: AsyncWait) -> None:
        """A wait is over, and was not woken by this bell."""
        for side in self._loops.values():
            if waiter in side.waiters:
                side.waiters.remove(waiter)
                self.tasks -= 1
                return

    def forked(self) -> None:
        """In a forked child: the FIFO is the parent's; let go of it, so that nobody believes the parent hears it."""
        fd = self._unmade()
        if fd >= 0:
            os.close(fd)


class _LoopSide:
    """The waits of one event loop on one bell."""

    def __init__(self, loop: asyncio.AbstractEventLoop, bell: Bell) -> None:
        self.loop = loop
        self.bell = bell
        self.waiters: deque[AsyncWait] = deque()
        self.watching = False

    def watch(self) -> None:
        if not self.watching:
            self.loop.add_reader(self.bell.fd, self._rung)
            self.watching = True

    def _rung(self) -> None:
        bell = self.bell
        mine = [future for future in bell.futures if future.get_loop() is self.loop]
        if not self.waiters and not mine:  # a thread or another loop is meant: leave the ring to them
            self.loop.remove_reader(bell.fd)
            self.watching = False
            if not bell.sleepers and not bell.tasks:
                bell.drain()
            return
        bell.drain()
        self._end(mine)
        self.wake_one()

    def _end(self, futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            self.bell.futures.remove(future)
            if not future.done():
                future.set_result(None)

    def wake_one(self) -> None:
        if self.waiters:
            waiter = self.waiters.popleft()
            self.bell.tasks -= 1
            waiter.woken(self.bell)

    def release_all(self) -> None:
        if self.loop.is_closed():
            return
        if _running_loop() is self.loop:
            self._wake_all()
        else:
            self.loop.call_soon_threadsafe(self.release_all)

    def detach(self, fd: int) -> bool:
        """Stop watching fd. True when that has to happen in another thread."""
        if not self.loop.is_closed() and _running_loop() is not self.loop and self.loop.is_running():
            return self.watching
        if self.watching and not self.loop.is_closed():
            self.loop.remove_reader(fd)
        self.watching = False
        if not self.loop.is_closed():
            self._wake_all()
        return False

    def _wake_all(self) -> None:
        self._end([future for future in self.bell.futures if future.get_loop() is self.loop])
        while self.waiters:
            self.wake_one()

    def close_later(self, fd: int) -> None:
        def close() -> None:
            self.detach(fd)
            os.close(fd)

        self.loop.call_soon_threadsafe(close)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class PeerWatch(Watch):
    """pidfds of the other participants of a queue, in one epoll descriptor: readable when one of them ends.

    Owner: the handle it was made for, which closes it with all its pidfds; they do not survive an exec.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.fd = self._epoll.fileno()
        self._pidfds: dict[tuple[int, int], int] = {}
        self._mutex = threading.Lock()
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        _watches.add(self)

    def refresh(self, peers: list[tuple[int, int]], joined: int) -> bool:
        """Watch exactly these (pid, start time). True when one of them has ended."""
        with self._mutex:
            wanted = set(peers)
            for key in [key for key in self._pidfds if key not in wanted]:
                gone = self._pidfds.pop(key)
                self._epoll.unregister(gone)  # a close takes it out only when no child that was just forked has a copy
                os.close(gone)
            for pid, start in wanted - self._pidfds.keys():
                try:
                    fd = os.pidfd_open(pid)
                except OSError as error:
                    # ENOENT, EINVAL: the number lives on as a thread or a process group
                    if error.errno not in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
                        raise
                    return True
                if segment.start_time(pid) != start:  # the pid went to somebody else: that peer is dead
                    os.close(fd)
                    return True
                try:
                    self._epoll.register(fd, select.EPOLLIN)
                except OSError:
                    os.close(fd)
                    raise
                self._pidfds[(pid, start)] = fd
            self.joined = joined
            return bool(self._epoll.poll(0, 1))

    def attend(self, ring: Ring) -> None:
        """Let the running loop recover peers that end while its tasks wait."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops.add(loop)
            loop.add_reader(self.fd, _peer_ended, weakref.ref(ring), weakref.ref(self))

    def close(self) -> None:
        """Close all descriptors. Idempotent."""
        if self._epoll.closed:
            return
        for loop in list(self._loops):
            if loop.is_closed():
                continue
            if loop is _running_loop() or not loop.is_running():
                loop.remove_reader(self.fd)
            else:
                loop.call_soon_threadsafe(self._close_in, loop)
                return
        self._close()

    def _close_in(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self.fd)
        self._loops.discard(loop)
        self.close()

    def _close(self) -> None:
        with self._mutex:
            self._epoll.close()
            for fd in self._pidfds.values():
                os.close(fd)
            self._pidfds.clear()

    def forked(self) -> None:
        """In a forked child: close the copies. Another thread of the parent may have been in refresh()."""
        self._mutex = threading.Lock()
        self._close()

    def __del__(self) -> None:
        if hasattr(self, "_mutex") and not self._epoll.closed:  # else a signal handler raised in __init__
            self._close()


def _peer_ended(ring: weakref.ref[Ring], watch: weakref.ref[PeerWatch]) -> None:
    handle = ring()
    if handle is not None and not handle.is_closed:
        handle.look()
    else:
        gone = watch()
        if gone is not None:
            gone.close()


def _after_fork() -> None:
    for bell in _bells:
        bell.forked()
    for watch in _watches:
        watch.forked()


os.register_at_fork(after_in_child=_after_fork)


_lulls: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Lull] = weakref.WeakKeyDictionary()


def _lull_of() -> tuple[asyncio.AbstractEventLoop, Lull]:
    """The running loop, and the Lull that goes with it.

    Raises:
        AttributeError: it is no loop of asyncio's, or its selector has no descriptor of its own.
    """
    loop: Any = asyncio.get_running_loop()
    found = _lulls.get(loop)
    if found is None:
        found = _lulls[loop] = Lull(loop._selector.fileno())
    return loop, found


class AsyncWait:
    """The asyncio twin of the blocking wait, over several queues:

        waiting = AsyncWait(rings, producer)
        try:
            while await waiting.sleep(timeout):
                if try_it(): return
        finally:
            waiting.leave()

    The first sleep() only arms, so that the caller tries again before it sleeps.
    """

    def __init__(self, rings: tuple[Ring, ...], producer: int, need: int = 0) -> None:
        self.rings = rings
        self.producer = producer
        self.need = need
        self._bells: list[Bell | None] = [None] * len(rings)  # where it is registered, or was rung
        self._armed = [False] * len(rings)
        self._future: asyncio.Future[bool] | None = None
        self._lazy = producer == 1

    async def sleep(self, timeout: float | None) -> bool:
        """True: try again. False: the timeout (seconds, None = none) passed."""
        try:
            if self._arm():
                return True
            return await self._await(timeout)
        except BaseException:
            self.leave()
            raise

    def _arm(self) -> bool:
        fresh = False
        for i, ring in enumerate(self.rings):
            if self._armed[i]:
                continue
            bell = self._bells[i] = ring.bell(self.producer)
            fd = ring.watch_fd()
            if fd >= 0:
                ring.attend()
            bell.join(self)
            self._armed[i] = fresh = True
            ring.arm(self.producer, self.need or 64 if self._lazy else self.need, not self._lazy)
        return fresh

    async def _await(self, timeout: float | None) -> bool:
        loop = asyncio.get_running_loop()
        self._future = loop.create_future()
        lazy = self._lazy and (timeout is None or timeout > LAZY)
        timer = None
        if lazy or timeout is not None:
            timer = loop.call_later(LAZY if lazy else max(0.0, timeout or 0.0), self._wake, False)
        try:
            woken = await self._future
        finally:
            self._future = None
            if timer is not None:
                timer.cancel()
        if not woken and lazy:  # not even an eighth of the ring came free: from now on, any room will do
            self._lazy = False
            for ring in self.rings:
                ring.arm(self.producer, self.need, True)
            return True
        return woken

    def woken(self, bell: Bell) -> None:
        """The bell took us from its list, and rang."""
        for i, known in enumerate(self._bells):
            if known is bell:
                self._armed[i] = False
        self._wake(True)

    def look(self) -> None:
        """From the loop's own thread: sleep() returns True now, for a reason that no queue knows of."""
        self._wake(True)

    def _wake(self, rung: bool) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(rung)

    def leave(self) -> None:
        """Done waiting, with or without success. Idempotent."""
        for i, ring in enumerate(self.rings):
            bell = self._bells[i]
            if bell is None:
                continue
            self._bells[i] = None
            if self._armed[i]:
                self._armed[i] = False
                bell.quit(self)
            ring.left(self.producer)


__all__ = ["AsyncWait", "Bell", "PeerWatch", "lull"]
