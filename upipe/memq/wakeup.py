"""What a sleeper waits on: doorbells, pidfds of peers, and futures of an event loop.

A Bell is a FIFO in this process's session. The ring decides who is rung; here it is only made, watched and removed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from typing import TYPE_CHECKING

from upipe.memq import segment

if TYPE_CHECKING:
    from upipe.memq._ring import Ring

_ids = itertools.count(1)
_pidfds: dict[tuple[int, int], int] = {}
"""pidfd of each peer process seen, by (pid, start). Owner: this process; closed when the peer died. Bounded by the
participants of the queues this process sleeps on."""


class Bell:
    """One doorbell of this process: `fd` becomes readable when somebody rings `id`.

    Owner: the handle it was made for, which closes it. After kill -9 the FIFO goes with the session.
    """

    def __init__(self) -> None:
        session = segment.process_session()
        self.id = next(_ids)
        self.path = session.path / f"bell.{self.id}"
        os.mkfifo(self.path, 0o600)
        self.fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.sleepers = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.futures: deque[asyncio.Future[None]] = deque()

    def close(self) -> None:
        """Remove it. Idempotent."""
        if self.fd < 0:
            return
        if self.loop is not None and not self.loop.is_closed():
            self.loop.remove_reader(self.fd)
        os.close(self.fd)
        self.fd = -1
        self.path.unlink(missing_ok=True)
        self._release()

    def drain(self) -> None:
        """Forget the rings so far."""
        try:
            while len(os.read(self.fd, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass  # nothing was pending

    def ring_self(self) -> None:
        """Make it readable."""
        try:
            os.write(self.fd, b"\1")
        except BlockingIOError:
            pass  # it is readable already, with thousands of rings pending

    def left(self) -> None:
        """A waiter left, and took the ring's waiting bit or a wake with it: the others on this bell look again."""
        if self.sleepers or self.futures:
            self.ring_self()

    def future(self) -> asyncio.Future[None]:
        """A future of the running loop that ends at the next ring. Arm the ring after making it, then try, then await."""
        loop = asyncio.get_running_loop()
        if self.loop is not loop:
            self.loop = loop
            loop.add_reader(self.fd, self._rung)
        future: asyncio.Future[None] = loop.create_future()
        self.futures.append(future)
        return future

    def _rung(self) -> None:
        try:
            while os.read(self.fd, 4096):
                pass
        except BlockingIOError:
            pass  # drained
        self._release()

    def _release(self) -> None:
        while self.futures:
            future = self.futures.popleft()
            if not future.done():
                future.set_result(None)


class PeerWatch:
    """pidfds of the other participants of a queue, so that a sleeper is woken by the death of one."""

    def fds(self, peers: list[tuple[int, int]]) -> list[int] | None:
        """Descriptors that become readable when a peer ends; None when one has ended already."""
        found = []
        for pid, start in peers:
            fd = _pidfds.get((pid, start))
            if fd is None:
                try:
                    fd = os.pidfd_open(pid)
                except ProcessLookupError:
                    return None
                if segment.start_time(pid) != start:  # the pid went to somebody else: that peer is dead
                    os.close(fd)
                    return None
                _pidfds[(pid, start)] = fd
            found.append(fd)
        for key in [key for key in _pidfds if segment.start_time(key[0]) != key[1]]:
            if _pidfds[key] not in found:
                os.close(_pidfds.pop(key))
        return found


def _after_fork() -> None:
    for fd in _pidfds.values():
        os.close(fd)
    _pidfds.clear()


os.register_at_fork(after_in_child=_after_fork)




class AsyncWait:
    """The asyncio twin of the blocking wait: `while not try(): await w.sleep()`, then `w.done(success)`.

    Order as in the ring: first sleep() only arms (the caller then tries again), the second one sleeps.
    """

    def __init__(self, rings: tuple[Ring, ...], producer: int, need: int = 0) -> None:
        self.rings = rings
        self.producer = producer
        self.need = need
        self.futures: list[asyncio.Future[None]] = []

    async def sleep(self, timeout: float | None) -> bool:
        """False when the timeout (seconds, None = none) passed."""
        if not self.futures:
            for ring in self.rings:
                self.futures.append(ring.bell(self.producer).future())
                ring.arm(self.producer, self.need)
            return True
        try:
            done, _ = await asyncio.wait(self.futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            self.leave(passing_on=True)
            raise
        self.leave()
        return bool(done)

    def leave(self, passing_on: bool = False) -> None:
        """Disarm. passing_on: a wake that reached us goes to another sleeper, since we take nothing."""
        for future in self.futures:
            future.cancel()
        if self.futures:
            self.futures = []
            for ring in self.rings:
                if not ring.disarm(self.producer) and passing_on:
                    ring.pass_on(self.producer)
                ring.bell(self.producer).left()
