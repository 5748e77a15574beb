"""The sockets of one pipe in the caller's loop: what the fork server and the workers say, and what they are told.

Half of the shell around a supervisor; doing.py is the other half. This one turns messages into events, and neither
waits nor decides.
"""

from __future__ import annotations

import errno
import logging
import select
import signal
import socket
import time
from collections.abc import Callable

from upipe.errors import PipeError
from upipe.graph.spec import PipeSpec
from upipe.lifecycle import PIPE_ENDED
from upipe.memq import segment
from upipe.runtime import events as ev
from upipe.runtime import messages, provision
from upipe.runtime.holdings import Holdings, signal_quietly, weakly
from upipe.runtime.osproc import wait_dead
from upipe.runtime.overdue import Overdue
from upipe.runtime.process import ForkServer
from upipe.runtime.restarts import Restarts
from upipe.runtime.supervisor import Supervisor
from upipe.settings import RestartPolicy

HEARD_AT_ONCE = 64
"""Messages of one worker in one turn of the loop: one that talks all the time must not keep the others from being
heard."""
SERVER_PATIENCE = 1.0
"""Seconds the fork server may take to report a death that its worker's socket told before. Then it hangs or was
stopped."""
log = logging.getLogger("upipe.runtime")


class Hearing:
    """Hears for one pipe. What it finds goes to `_handle`; what it raises there goes to `_broke`."""

    spec: PipeSpec
    supervisor: Supervisor
    held: Holdings

    def __init__(self) -> None:
        self._servers = Restarts(RestartPolicy())
        """Deaths of fork servers."""
        self._overdue = Overdue()

    def _handle(self, event: ev.Event) -> None:
        raise NotImplementedError

    def _count_letter(self, size: int) -> None:
        raise NotImplementedError

    def _broke(self, error: Exception) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    @property
    def state(self) -> str:
        """State of the pipe."""
        return self.supervisor.state

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the pipe failed; empty when it did not."""
        return tuple(self.supervisor.reasons)

    def _callback(self, method: Callable[..., None]) -> Callable[..., None]:
        return weakly(method, lambda hearing, error: hearing._broke(error))

    def _start_server(self, method: str) -> None:
        self.held.server = ForkServer(method)
        self.held.watch(self.held.server.sock.fileno(), self._callback(self._hear_server))

    def _fork(self, command: ev.StartWorker) -> None:
        assert self.held.server is not None
        ours, theirs = messages.pair()
        ours.setblocking(False)
        self.held.keep_socket(command.worker, ours)
        self.held.watch(ours.fileno(), self._callback(self._hear), command.worker, ours)
        self.held.server.spawn(self._request(command.worker), theirs)
        self._overdue.asked(time.monotonic())
        self._look_when_due()

    def _request(self, worker: str) -> messages.Spawn:
        return provision.request(worker, self.supervisor.slots[worker].spec)

    def _say(self, worker: str, message: messages.ToWorker) -> None:
        """A worker is told two things in its life, which always fit the buffer of its socket: this does not block."""
        try:
            self.held.sockets[worker].send(messages.encode(message))
        except (BrokenPipeError, ConnectionResetError, KeyError):
            pass  # it died; its exit is being reported

    def _hear_server(self) -> None:
        assert self.held.server is not None
        try:
            heard = self.held.server.read()
        except EOFError:
            self._replace_server()
            return
        self._overdue.answered(self.held.server.owes, time.monotonic())
        self._look_when_due()
        for message, pidfd in heard:
            if isinstance(message, messages.Spawned):
                if pidfd is None:
                    raise OSError(errno.EMFILE, "the descriptor of a new worker was lost")
                self.held.keep_pidfd(message.worker, pidfd)
                self._handle(ev.Spawned(message.worker, message.pid, message.start))
            elif isinstance(message, messages.Refused):
                self._handle(ev.Refused(message.worker, message.reason))
            elif isinstance(message, messages.Paused):
                self._handle(ev.Paused(message.worker, message.paused))
            else:
                self._exited(message.worker, message.pid, message.status, message.cpu_seconds)

    def _exited(self, worker: str, pid: int, status: int, cpu_seconds: float) -> None:
        sock = self.held.sockets.get(worker)
        if sock is not None:
            self._hear(worker, sock, most=1 << 30)  # what it said before it ended comes first
        self.held.drop_socket(worker)
        self.held.drop_pidfd(worker)
        self._handle(ev.Exited(worker, pid, status, cpu_seconds))
        if self.state in PIPE_ENDED and not self.held.pidfds:
            self._close()

    def _replace_server(self) -> None:
        """The fork server died, and by PR_SET_PDEATHSIG its workers with it: prove that, start another, restart
        them."""
        held = self.held
        assert held.server is not None
        held.unwatch(held.server.sock.fileno())
        held.server.close()
        self._overdue.answered(False, time.monotonic())
        self._look_when_due()
        known = {*held.pidfds, *held.sockets}  # those that end already are among them
        lost = [slot for slot in self.supervisor.slots.values() if slot.alive or slot.name in known]
        lost.sort(key=lambda slot: not slot.pid)  # those whose pid is not known give back what is left
        for slot in lost:
            if slot.name in held.pidfds:
                signal_quietly(held.pidfds[slot.name], signal.SIGKILL)
                wait_dead(held.pidfds[slot.name], 2.0)
            elif slot.name in held.sockets:  # forked perhaps, and not reported: the end of its socket is its end
                poll = select.poll()
                poll.register(held.sockets[slot.name], 0)  # POLLHUP comes in any case
                poll.poll(2000)
        if self.state not in PIPE_ENDED:
            if self._servers.died(time.monotonic()) is None:
                raise PipeError(f"the fork server died {self._servers.count} times within a minute")
            self._start_server(self.spec.settings.start_method)
        for slot in lost:
            self._exited(slot.name, slot.pid, -signal.SIGKILL, 0.0)
        if self.state in PIPE_ENDED:
            self._close()

    def _hear(self, worker: str, sock: socket.socket, most: int = HEARD_AT_ONCE) -> None:
        for _ in range(most):
            try:
                data = sock.recv(messages.PACKET)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                self.held.unwatch(sock.fileno())
                if worker in self.held.pidfds:  # its death is about to be reported, unless the server hangs
                    self.held.later(f"exit of {worker}", SERVER_PATIENCE, self._callback(self._missed), worker)
                return
            message = messages.decode_from_worker(data)
            if isinstance(message, messages.Ready):
                self._handle(ev.Ready(worker))
            elif isinstance(message, messages.Done):
                self._handle(ev.Done(worker))
            elif isinstance(message, messages.Raised):
                told = message
                self._handle(ev.Raised(worker, told.phase, told.kind, told.message, told.traceback, told.fatal))
            else:
                self._count_letter(message.size)
            if sock.fileno() < 0:
                return  # handling it ended the pipe

    def _look_when_due(self) -> None:
        """At the fork server. Without a request that it owes an answer to there is no timer."""
        due, known = self._overdue.due, "fork server" in self.held.timers
        if due is None:
            self.held.cancel("fork server")
        elif not known:
            self.held.later("fork server", due - time.monotonic(), self._callback(self._look_at_server))

    def _look_at_server(self) -> None:
        self.held.cancel("fork server")
        server, now = self.held.server, time.monotonic()
        if server is None or self._overdue.due is None:
            return
        try:
            state = segment.process_state(server.pid)
        except OSError:  # no descriptor to be had just now
            state = "?"
        if now >= self._overdue.due and (why := self._overdue.look(state, now)):
            log.error("pipe %s: the fork server is killed and replaced: %s", self.spec.name, why)
            signal_quietly(server.pidfd, signal.SIGKILL)  # its socket tells
            return
        self._look_when_due()

    def _missed(self, worker: str) -> None:
        """A worker ended long ago and the server did not say so: it is stopped, or hangs. Kill it, to be replaced."""
        pidfd = self.held.pidfds.get(worker)
        if pidfd is not None and wait_dead(pidfd, 0.0) and self.held.server is not None:
            signal_quietly(self.held.server.pidfd, signal.SIGKILL)
