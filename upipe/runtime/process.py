"""The fork server: a small warm process from which all workers of a pipe are forked, and which knows when they end.

    caller (supervisor) ──socketpair── fork server ──fork── worker, worker, ...

Who owns what, and what is left after kill -9:
  - the fork server is the parent of every worker and reaps it; each worker leads a process group, which goes with it;
  - the caller dies: its pidfd (or the end of the socket; a child that the caller forked may hold that open) tells the
    server, which kills all groups, and everything that was orphaned to it as their subreaper, and exits;
  - the server dies: the kernel kills the workers (PR_SET_PDEATHSIG; the server has one thread, so its death is the
    process's death), the caller reads the end of the socket, kills what is left of the server's session (the workers'
    own children) while the dead server still holds the number, and starts another;
  - both die: the kernel kills the workers, and the guard, a child of the server that only waits for its death, kills
    what is left of the session.

"fork" starts the server as a fork of the caller: milliseconds, everything imported already, possible only while the
caller has one Python thread. "exec" starts a clean interpreter. This is the caller's end; the server is server.py.
Rejected: multiprocessing's fork server (one per program, imports __main__, no pidfds, no stop notices).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import deque

from upipe.runtime import messages
from upipe.runtime.messages import Refused, Spawn, Spawned
from upipe.runtime.osproc import kill_session, reap, wait_dead
from upipe.runtime.server import serve

MOST_ASKED = 64
"""Requests to the server without an answer; more wait in the caller. Their packets fit the socket's buffer, so no send
blocks."""
CLOSE_PATIENCE = 2.0
"""Seconds the server has to end itself and its workers before it is killed."""
_FORK_HOSTILE = ("torch", "tensorflow", "jax", "grpc", "ray")
"""Modules whose native threads or device contexts do not survive a fork of the caller."""
_CODE = "import sys; sys.path[:0] = {path!r}; from upipe.runtime.server import serve; serve({fd}, {parent})"


class ForkServer:
    """The caller's end of a fork server. Nothing here blocks, but for close().

    Args:
        method: "fork", "exec" or "auto" (fork while this process has a single Python thread and no fork-hostile
        module).

    Raises:
        OSError: no process or no descriptor can be had.
    """

    def __init__(self, method: str = "auto") -> None:
        if method == "auto":
            hostile = any(name in sys.modules for name in _FORK_HOSTILE)
            method = "exec" if hostile or threading.active_count() > 1 else "fork"
        self.method = method
        self._asked = 0
        self._waiting: deque[tuple[Spawn, socket.socket]] = deque()
        self.sock, theirs = messages.pair()
        try:
            self.sock.setblocking(False)
            self.pid = _fork_server(theirs, self.sock) if method == "fork" else _exec_server(theirs)
        except BaseException:
            self.sock.close()
            raise
        finally:
            theirs.close()
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self.sock.close()
            os.kill(self.pid, signal.SIGKILL)
            reap(self.pid)
            raise

    @property
    def owes(self) -> bool:
        """Whether a request has no answer yet."""
        return bool(self._asked or self._waiting)

    def spawn(self, request: Spawn, sock: socket.socket) -> None:
        """Ask for a worker. sock is its end of the control socket, and closed here. More than MOST_ASKED wait their
        turn."""
        self._waiting.append((request, sock))
        self._ask()

    def _ask(self) -> None:
        while self._waiting and self._asked < MOST_ASKED:
            request, sock = self._waiting.popleft()
            with sock:
                try:
                    socket.send_fds(self.sock, [messages.encode(request)], [sock.fileno()])
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the server died: read() is about to say so
            self._asked += 1

    def read(self) -> list[tuple[messages.FromServer, int | None]]:
        """Messages that are here, each with the pidfd that came along. EOFError: the server is gone."""
        found: list[tuple[messages.FromServer, int | None]] = []
        while len(found) < MOST_ASKED:  # the rest in the loop's next turn
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, messages.PACKET, 1)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                if found:
                    break
                raise EOFError("the fork server is gone")
            message = messages.decode_from_server(data)
            self._asked -= isinstance(message, Spawned | Refused)
            found.append((message, fds[0] if fds else None))
        self._ask()
        return found

    def close(self) -> None:
        """End it and all its workers now, within CLOSE_PATIENCE seconds. Idempotent."""
        if self.sock.fileno() < 0:
            return
        self.sock.close()  # it reads the end, kills its workers and exits
        for _, sock in self._waiting:
            sock.close()
        self._waiting.clear()
        if not wait_dead(self.pidfd, CLOSE_PATIENCE):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)  # it hangs, or was stopped
            wait_dead(self.pidfd, CLOSE_PATIENCE)
        try:
            info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if info is not None and (info.si_code, info.si_status) != (os.CLD_EXITED, 0):
                kill_session(self.pid)  # its number stays taken as long as we do not reap it
        except ChildProcessError:
            pass  # a SIGCHLD handler of the program reaped it
        os.close(self.pidfd)
        reap(self.pid)


def _exec_server(theirs: socket.socket) -> int:
    code = _CODE.format(path=[path for path in sys.path if path], fd=theirs.fileno(), parent=os.getpid())
    process = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
    )
    process.returncode = 0  # close() reaps it; Popen shall not
    return process.pid


def _fork_server(theirs: socket.socket, ours: socket.socket) -> int:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # or every worker prints it again
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads; numpy's are quiet at a fork
            pid = os.fork()
    finally:
        if os.getpid() == parent:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if pid:
        return pid
    code = 1
    try:
        ours.close()
        os.setsid()
        serve(theirs.detach(), parent)
        code = 0
    except BaseException as error:
        os.write(2, f"uPipe's fork server failed: {error!r}\n".encode())
    finally:
        os._exit(code)
