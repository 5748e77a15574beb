"""The fork server: a small warm process from which all workers of a pipe are forked, and which knows when they end.

    caller (supervisor) ──socketpair── fork server ──fork── worker, worker, ...

Who owns what, and what is left after kill -9:
  - the fork server is the parent of every worker and reaps it; each worker leads a process group, which goes with it;
  - the caller dies: the server reads the end of the socket, kills all groups, exits;
  - the server dies: the kernel kills the workers (PR_SET_PDEATHSIG; the server has one thread, so its death is the
    process's death), the caller reads the end of the socket and starts another;
  - both die: the same two mechanisms, independent of each other.

"fork" starts the server as a fork of the caller: milliseconds, everything imported already, possible only while the caller has one
Python thread. "exec" starts a clean interpreter. Rejected: multiprocessing's fork server (one per program, imports
__main__, no pidfds, no stop notices).
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import gc
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from typing import NoReturn

from upipe.memq import segment
from upipe.runtime import messages
from upipe.runtime.messages import Exited, Paused, Spawn, Spawned

_PR_SET_PDEATHSIG = 1
_FORK_HOSTILE = ("torch", "tensorflow", "jax", "grpc", "ray")
"""Modules whose native threads or device contexts do not survive a fork of the caller."""
_CODE = "import sys; sys.path[:0] = {path!r}; from upipe.runtime.process import serve; serve({fd})"


class ForkServer:
    """The caller's end of a fork server.

    Args:
        method: "fork", "exec" or "auto" (fork while this process has a single Python thread and no fork-hostile module).
    """

    def __init__(self, method: str = "auto") -> None:
        if method == "auto":
            hostile = any(name in sys.modules for name in _FORK_HOSTILE)
            method = "exec" if hostile or threading.active_count() > 1 else "fork"
        self.method = method
        self.sock, theirs = messages.pair()
        self.pid = _fork_server(theirs, self.sock) if method == "fork" else _exec_server(theirs)
        theirs.close()
        self.sock.setblocking(False)
        self.pidfd = os.pidfd_open(self.pid)

    def spawn(self, request: Spawn, sock: socket.socket) -> None:
        """Ask for a worker; sock is its end of the control socket."""
        socket.send_fds(self.sock, [messages.encode(request)], [sock.fileno()])

    def read(self) -> list[tuple[messages.FromServer, int | None]]:
        """Messages that are here, each with the pidfd that came along. EOFError: the server is gone."""
        found: list[tuple[messages.FromServer, int | None]] = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, messages.PACKET, 1)
            except BlockingIOError:
                return found
            except ConnectionResetError:
                data = b""
            if not data:
                if found:
                    return found
                raise EOFError("the fork server is gone")
            found.append((messages.decode_from_server(data), fds[0] if fds else None))

    def close(self) -> None:
        """End it and all its workers now. Idempotent."""
        if self.sock.fileno() < 0:
            return
        self.sock.close()  # it reads the end, kills its workers and exits
        if not select.select([self.pidfd], [], [], 2.0)[0]:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # a SIGCHLD handler of the program reaped it


def _exec_server(theirs: socket.socket) -> int:
    code = _CODE.format(path=[path for path in sys.path if path], fd=theirs.fileno())
    process = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
    )
    process.returncode = 0  # close() reaps it; Popen shall not
    return process.pid


def _fork_server(theirs: socket.socket, ours: socket.socket) -> int:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # or every worker prints it again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads; numpy's are quiet at a fork
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ours.close()
        os.setsid()
        serve(theirs.detach())
        code = 0
    except BaseException as error:  # noqa: BLE001 - nothing above may run in the child
        os.write(2, f"uPipe's fork server failed: {error!r}\n".encode())
    finally:
        os._exit(code)


def serve(fd: int) -> None:
    """The server's life: fork on request, report deaths, end with the caller."""
    _become_quiet(fd)
    sock = socket.socket(fileno=fd)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    workers: dict[int, str] = {}
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    while True:
        ready = {number for number, _ in poll.poll()}
        if wake_read in ready:
            os.read(wake_read, 4096)
            _report(sock, workers)
        if fd in ready and not _serve_request(sock, workers):
            break
    for pid in workers:
        _kill_group(pid)
    for pid in workers:
        os.waitpid(pid, 0)  # SIGKILL was sent: it comes
    os._exit(0)


def _become_quiet(keep: int) -> None:
    """Leave everything of the caller behind: its loop, signals, files, session."""
    gc.freeze()  # its objects are never collected here: a collected socket would close a descriptor that is ours by now
    asyncio.events._set_running_loop(None)
    asyncio.set_event_loop(None)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    segment.forked_session()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number > 2 and number not in (keep, null):
            try:  # replaced, not closed: libuv closes its signal pipe by number at every later fork, whoever has it then
                os.dup2(null, number, inheritable=False)
            except OSError:
                pass  # the descriptor of the listing itself
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115


def _serve_request(sock: socket.socket, workers: dict[int, str]) -> bool:
    try:
        data, fds, _, _ = socket.recv_fds(sock, messages.PACKET, 1)
    except ConnectionResetError:
        return False
    if not data:
        return False
    request = messages.decode_to_server(data)
    pid = os.fork()
    if pid == 0:
        _run_worker(request, fds[0], sock)
    try:
        os.setpgid(pid, pid)
    except (PermissionError, ProcessLookupError):
        pass  # it did so itself, and executed its command or ended already
    os.close(fds[0])
    workers[pid] = request.worker
    start = segment.start_time(pid) or 0
    pidfd = os.pidfd_open(pid)  # it is our child and not reaped: the pid is its own
    _send(sock, Spawned(request.worker, pid, start), [pidfd])
    os.close(pidfd)
    return True


def _send(sock: socket.socket, message: messages.FromServer, fds: list[int]) -> None:
    try:
        sock.sendmsg([messages.encode(message)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
    except (BrokenPipeError, ConnectionResetError):
        pass  # the caller died: the next poll reads the end


def _report(sock: socket.socket, workers: dict[int, str]) -> None:
    """Reap and report every change of a child."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        name = workers.get(pid)
        if name is None:
            continue  # an orphan that came to us
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            _send(sock, Paused(name, pid, os.WIFSTOPPED(status)), [])
            continue
        del workers[pid]
        _kill_group(pid)
        cpu = usage.ru_utime + usage.ru_stime
        _send(sock, Exited(name, pid, os.waitstatus_to_exitcode(status), cpu), [])


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in it


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it ended before the kernel knew


def _run_worker(request: Spawn, fd: int, server: socket.socket) -> NoReturn:
    """In the forked worker: until it exits."""
    parent = os.getppid()
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        server.close()
        if request.command:
            os.set_inheritable(fd, True)
            environment = {**os.environ, **request.environment, "UPIPE_WORKER_FD": str(fd)}
            try:
                os.execvpe(request.command[0], list(request.command), environment)
            except OSError as error:
                print(f"uPipe cannot execute {request.command[0]}: {error.strerror}", file=sys.stderr)
                code = 127
        else:
            random.seed()
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed()
            from upipe.runtime.worker import run

            code = run(socket.socket(fileno=fd))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException as error:  # noqa: BLE001 - report, and never run the server's code twice
        import traceback

        traceback.print_exception(error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass  # the reader of our output is gone
        segment.end_worker_session()
        os._exit(code)
