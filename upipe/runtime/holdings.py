"""What the operating system holds for one pipe in the caller's process, and how it is let go of.

    fork server (a process, its socket, its pidfd)     one control socket and one pidfd per worker
    spool directory, queues (segment files)            timers and readers in the caller's event loop

Owner: this object, which refers to nothing of the runner, so that a pipe that is forgotten is collected and `abandon`
ends it. After kill -9 of the caller the fork server ends the workers, and the next start sweeps the session.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import signal
import socket
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from upipe.graph.plan import PIPE, QueuePlan
from upipe.memq import segment
from upipe.memq.queue import MemQ
from upipe.runtime.process import ForkServer

DISCARD = 3
"""Policy of a queue that nobody reads any more: what is put there is dropped and counted."""


class Holdings:
    """Everything that must be let go of.

    Args:
        loop: the loop that watches it; `release` runs in its thread, or when it runs no more.
        number: of the pipe in this process: names its spool.
        own: queues with the pipe itself at one end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int, own: list[QueuePlan]) -> None:
        self.loop = loop
        self.thread = threading.get_ident()
        self.process = os.getpid()
        self.spool = segment.process_session().path / f"p{number}"
        self.queues: dict[str, MemQ] = {}
        self.server: ForkServer | None = None
        self.sockets: dict[str, socket.socket] = {}
        self.pidfds: dict[str, int] = {}
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.own = own
        self.released = False
        self._watched: set[int] = set()

    def watch(self, fd: int, callback: Callable[..., object], *args: object) -> None:
        """Call back whenever fd is readable."""
        self._watched.add(fd)
        self.loop.add_reader(fd, callback, *args)

    def unwatch(self, fd: int) -> None:
        """Before fd is closed."""
        if fd in self._watched:
            self._watched.discard(fd)
            if not self.loop.is_closed():
                self.loop.remove_reader(fd)

    def keep_socket(self, worker: str, sock: socket.socket) -> None:
        """The control socket of a worker's new life."""
        self.drop_socket(worker)
        self.sockets[worker] = sock

    def drop_socket(self, worker: str) -> None:
        """Close it, if it is there."""
        sock = self.sockets.pop(worker, None)
        if sock is not None:
            self.unwatch(sock.fileno())
            sock.close()

    def keep_pidfd(self, worker: str, fd: int) -> None:
        """The pidfd of a worker's new life."""
        self.drop_pidfd(worker)
        self.pidfds[worker] = fd

    def drop_pidfd(self, worker: str) -> None:
        """Close it, if it is there."""
        fd = self.pidfds.pop(worker, None)
        if fd is not None:
            os.close(fd)

    def later(self, name: str, seconds: float, callback: Callable[..., object], *args: object) -> None:
        """Call once, instead of what that name was to call before."""
        self.cancel(name)
        self.timers[name] = self.loop.call_later(max(0.0, seconds), callback, *args)

    def cancel(self, name: str) -> None:
        """Do not call."""
        timer = self.timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def end_processes(self) -> None:
        """End the fork server, all workers and their children; returns when they are gone. Idempotent."""
        for name in list(self.timers):
            self.cancel(name)
        for worker in list(self.sockets):
            self.drop_socket(worker)
        for worker in list(self.pidfds):
            self.drop_pidfd(worker)
        if self.server is not None:
            self.unwatch(self.server.sock.fileno())
            self.server.close()

    def release(self) -> None:
        """Let go of everything. Queues stay mapped and readable up to their ends; their names go. Idempotent."""
        if self.released or os.getpid() != self.process:
            return
        self.released = True
        try:
            self.end_processes()
            for plan in self.own:
                if plan.name in self.queues:
                    self._quiet(plan)
        finally:
            for queue in self.queues.values():
                queue.unlink()
            shutil.rmtree(self.spool, ignore_errors=True)
            segment.sweep()  # the sessions of its workers

    def _quiet(self, plan: QueuePlan) -> None:
        """Nobody is behind this queue of the pipe's own any more: emits are dropped, reads come to the end; no
        doorbells."""
        queue = self.queues[plan.name]
        if queue.is_closed:
            return  # the program ends, and all its handles were closed before
        queue.recover_dead()
        if plan.source == PIPE:
            queue.set_policy(DISCARD)
        for number in plan.producers:
            queue.close_producer(number)
        for end in (0, 1):
            queue.bell(end).close()  # wakes who waits


def abandon(holdings: Holdings, name: str) -> None:
    """The runner was collected, or the program ends: the finalizer of a runner that did not end its pipe."""
    if holdings.released or os.getpid() != holdings.process:
        return  # a child that the caller forked owns nothing of this
    if not holdings.loop.is_running() or threading.get_ident() == holdings.thread:
        holdings.release()
    else:
        try:
            holdings.loop.call_soon_threadsafe(holdings.release)
        except RuntimeError:  # closed this instant
            holdings.release()
    if not _exiting:
        warnings.warn(
            f"pipe {name!r} was forgotten while it ran and is stopped; await pipe.stop()", ResourceWarning, stacklevel=2
        )


_exiting: list[bool] = []
_registered: list[bool] = []


def warn_no_more_at_exit() -> None:
    """Call after the first finalizer was made: what runs at exit is registered in that order and runs in the reverse
    one."""
    if not _registered:
        _registered.append(True)
        atexit.register(_exiting.append, True)


def weakly(method: Callable[..., None], broke: Callable[[Any, Exception], None]) -> Callable[..., None]:
    """A callback for the event loop that does not keep the object of `method` alive, and tells it what it raised."""
    reference = weakref.WeakMethod(method)

    def call(*args: object) -> None:
        found = reference()
        if found is None:
            return
        try:
            found(*args)
        except Exception as error:
            broke(found.__self__, error)  # type: ignore[attr-defined]

    return call


def signal_quietly(pidfd: int, number: int) -> None:
    """Signal a process that may have ended."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass  # it ended
