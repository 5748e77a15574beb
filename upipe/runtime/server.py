"""The fork server's own process, and the first steps of the workers it forks. Who dies when: see process.py.

One thread, which sleeps in poll until the caller asks, a child changes or the caller ends.
"""

from __future__ import annotations

import array
import asyncio
import gc
import os
import random
import select
import signal
import socket
import sys
from typing import NoReturn

from upipe.memq import segment
from upipe.runtime import messages
from upipe.runtime.messages import Exited, Paused, Raised, Refused, Spawn, Spawned
from upipe.runtime.osproc import adopt_orphans, die_with_parent, kill_group, kill_session, reap, wait_dead

GUARD_AGAIN = 1000
"""Milliseconds after which a guard is tried again that no process was to be had for. (Dying of it would take the
workers along, which run.)"""
_own: list[int] = []
"""Descriptors of the server that a worker shall not keep, beside the socket."""


def serve(fd: int, parent: int) -> None:
    """The server's life: fork on request, report deaths, end with the caller, which is process `parent`."""
    _become_quiet(fd)
    try:
        caller = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() != parent:
        os._exit(1)  # it ended before, and that pid is somebody else's
    adopt_orphans()
    guard = 0
    sock = socket.socket(fileno=fd)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    _own.extend((caller, wake_read, wake_write))
    workers: dict[int, str] = {}
    poll = select.poll()
    for one in (fd, wake_read, caller):
        poll.register(one, select.POLLIN)
    pause = 0
    while True:
        ready = {number for number, _ in poll.poll(None if guard else pause)}
        if not ready:  # the first workers run
            guard = _fork_guard(caller, fd)
            pause = 0 if guard else GUARD_AGAIN
        if wake_read in ready:
            os.read(wake_read, 4096)
            if guard in _report(sock, workers):
                guard = 0
        if caller in ready or (fd in ready and not _serve_request(sock, workers)):
            break
    for pid in workers:
        kill_group(pid)
    _end_children(workers, guard)
    os._exit(0)


def _fork_guard(caller: int, sock: int) -> int:
    """A process that does nothing but wait for the server's death, to kill what is left of the session then. 0 when no
    process is to be had."""
    server = os.getpid()
    pidfd = os.pidfd_open(server)
    try:
        guard = os.fork()
    except OSError:
        os.close(pidfd)
        return 0
    if guard == 0:
        os.close(caller)
        os.close(sock)
        while not wait_dead(pidfd, 1e6):
            pass
        kill_session(server)  # this process is of that session, so the number is not given to another
        os._exit(0)
    os.close(pidfd)
    return guard


def _end_children(workers: dict[int, str], guard: int) -> None:
    """Kill and reap every child, and the orphans that become ours by that, until there is none. The guard goes last."""
    while True:
        for pid in _children(workers):
            if pid != guard:
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is its own
        if not any(pid != guard for pid in _children(workers)):
            break
        ended, _ = os.waitpid(-1, 0)
        workers.pop(ended, None)
        guard = 0 if ended == guard else guard
    if guard:
        os.kill(guard, signal.SIGKILL)
        reap(guard)


def _children(workers: dict[int, str]) -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return list(workers)  # a kernel without CONFIG_PROC_CHILDREN: orphans that left their group stay


def _become_quiet(keep: int) -> None:
    """Leave everything of the caller behind: its loop, signals, files, session."""
    gc.freeze()  # its objects are never collected here: a collected socket would close a descriptor that is ours by now
    asyncio.events._set_running_loop(None)
    asyncio.set_event_loop(None)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's; the caller decides what they mean for the pipe
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    segment.forked_session()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd > 2 and fd not in (keep, null):
            # Replaced, not closed: libuv remembers the numbers of its signal pipe and closes them at every later fork,
            # whoever has them then (uvloop in the caller).
            os.dup2(null, fd, inheritable=False)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
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
    me = os.getpid()  # a worker that asked for its parent after our death would take the adopter for it, and stay
    try:
        pid = os.fork()
    except OSError as error:  # too many processes
        os.close(fds[0])
        _send(sock, Refused(request.worker, f"fork: {error.strerror}"), [])
        return True
    if pid == 0:
        _run_worker(request, fds[0], sock, me)
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
        sock.sendmsg(
            [messages.encode(message)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        )
    except (BrokenPipeError, ConnectionResetError):
        pass  # the caller died: the next poll reads the end


def _report(sock: socket.socket, workers: dict[int, str]) -> list[int]:
    """Reap and report every change of a child. Returns the pids of others that ended."""
    others: list[int] = []
    changes = os.WEXITED | os.WSTOPPED | os.WCONTINUED
    while True:
        try:
            seen = os.waitid(os.P_ALL, 0, changes | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return others
        if seen is None:
            return others
        name = workers.get(seen.si_pid)
        ended = seen.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
        if ended and name is not None:
            kill_group(seen.si_pid)  # before it is reaped, so that the number cannot be anybody else's
        pid, status, usage = os.wait4(seen.si_pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if pid == 0:
            continue  # continued again meanwhile
        if name is None:
            if ended:
                others.append(pid)  # an orphan that came to us
            continue
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            _send(sock, Paused(name, pid, os.WIFSTOPPED(status)), [])
            continue
        if not ended:
            kill_group(pid)  # it ended between the two looks
        del workers[pid]
        cpu = usage.ru_utime + usage.ru_stime
        _send(sock, Exited(name, pid, os.waitstatus_to_exitcode(status), cpu), [])


def _run_worker(request: Spawn, fd: int, server: socket.socket, parent: int) -> NoReturn:
    """In the forked worker: until it exits."""
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for own in (server.detach(), *_own):
            os.close(own)
        if request.command:
            os.set_inheritable(fd, True)
            environment = {**os.environ, **request.environment, "UPIPE_WORKER_FD": str(fd)}
            try:
                os.execvpe(request.command[0], list(request.command), environment)
            except OSError as error:
                text = f"cannot execute {request.command[0]}: {error.strerror}"
                os.write(fd, messages.encode(Raised("load", type(error).__qualname__, text, "", fatal=True)))
                code = 127
        else:
            random.seed()
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed()
            from upipe.runtime.worker import run

            control = socket.socket(fileno=fd)
            if _has_orders(control):
                code = run(control)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException as error:
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


def _has_orders(control: socket.socket) -> bool:
    """Wait for the assignment; False: the caller gave up before it told us what to do."""
    try:
        return bool(control.recv(1, socket.MSG_PEEK))
    except ConnectionResetError:
        return False
