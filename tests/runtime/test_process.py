"""The fork server alone: it forks on request, reports what happens to its children, and ends with its caller."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support import crowded
from upipe.runtime import messages
from upipe.runtime.messages import Exited, Paused, Raised, Spawn, Spawned
from upipe.runtime.osproc import kill_session, wait_dead
from upipe.runtime.process import MOST_ASKED, ForkServer

SLEEP = ("sleep", "1000")


@pytest.fixture(params=["fork", "exec"])
def server(request: pytest.FixtureRequest) -> Iterator[ForkServer]:
    gc.collect()  # what other tests left goes now, and not between the two looks
    before = os.listdir("/proc/self/fd")
    one = ForkServer(request.param)
    yield one
    one.close()
    one.close()
    assert not os.path.exists(f"/proc/{one.pid}")
    assert os.listdir("/proc/self/fd") == before


class Hearing:
    """Reads a server until a message comes."""

    def __init__(self, server: ForkServer) -> None:
        self.server = server
        self.pending: list[messages.FromServer] = []
        self.pidfds: list[int] = []

    def next(self, seconds: float = 60.0) -> messages.FromServer:
        while not self.pending:
            assert select.select([self.server.sock], [], [], seconds)[0], "the server says nothing"
            for message, pidfd in self.server.read():
                self.pending.append(message)
                if pidfd is not None:
                    self.pidfds.append(pidfd)
        return self.pending.pop(0)

    def close(self) -> None:
        for fd in self.pidfds:
            os.close(fd)


@pytest.fixture
def heard(server: ForkServer) -> Iterator[Hearing]:
    one = Hearing(server)
    yield one
    one.close()


def spawn(server: ForkServer, *command: str, name: str = "a#0") -> None:
    ours, theirs = messages.pair()
    ours.close()
    server.spawn(Spawn(name, command or SLEEP), theirs)


def test_spawn_and_exit(server: ForkServer, heard: Hearing) -> None:
    spawn(server, "sh", "-c", "exit 3")
    spawned, exited = heard.next(), heard.next()
    assert isinstance(spawned, Spawned) and isinstance(exited, Exited)
    assert (exited.pid, exited.status, exited.worker) == (spawned.pid, 3, "a#0")
    assert wait_dead(heard.pidfds[0], 0)


def test_signals_are_reported(server: ForkServer, heard: Hearing) -> None:
    spawn(server)
    spawned = heard.next()
    assert isinstance(spawned, Spawned)
    for number, paused in ((signal.SIGSTOP, True), (signal.SIGCONT, False)):
        signal.pidfd_send_signal(heard.pidfds[0], number)
        assert heard.next() == Paused("a#0", spawned.pid, paused)
    signal.pidfd_send_signal(heard.pidfds[0], signal.SIGKILL)
    exited = heard.next()
    assert isinstance(exited, Exited) and exited.status == -signal.SIGKILL


def test_what_cannot_be_executed_is_a_load_failure(server: ForkServer, heard: Hearing) -> None:
    ours, theirs = messages.pair()
    with ours:
        server.spawn(Spawn("a#0", ("/no/such/program",)), theirs)
        told = messages.decode_from_worker(ours.recv(messages.PACKET))
    assert isinstance(told, Raised) and told.fatal and "/no/such/program" in told.message
    assert isinstance(heard.next(), Spawned)
    exited = heard.next()
    assert isinstance(exited, Exited) and exited.status == 127


def test_many_requests_at_once_do_not_block(server: ForkServer, heard: Hearing) -> None:
    count = MOST_ASKED + 16
    began = time.monotonic()
    for number in range(count):
        spawn(server, "true", name=f"a#{number}")
    assert time.monotonic() - began < 2 * crowded()
    ended = set()
    while len(ended) < count:
        message = heard.next()
        if isinstance(message, Exited):
            ended.add(message.worker)


def test_its_own_death_is_the_end_of_the_socket_and_of_everything_below(server: ForkServer, heard: Hearing) -> None:
    spawn(server, "sh", "-c", "sleep 1000 & sleep 1000 & wait")
    assert isinstance(heard.next(), Spawned)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        heard.next()
    assert wait_dead(heard.pidfds[0], 60)
    server.close()
    assert not in_session(server.pid)


def test_close_ends_a_server_that_was_stopped(server: ForkServer, heard: Hearing) -> None:
    spawn(server)
    assert isinstance(heard.next(), Spawned)
    os.kill(server.pid, signal.SIGSTOP)
    server.close()
    assert wait_dead(heard.pidfds[0], 60)
    assert not in_session(server.pid)


def test_the_guard_is_replaced(server: ForkServer, heard: Hearing) -> None:
    spawn(server)
    spawned = heard.next()
    assert isinstance(spawned, Spawned)
    known = [server.pid, spawned.pid]
    known.append(another(server, known))
    os.kill(known[-1], signal.SIGKILL)
    another(server, known)


def another(server: ForkServer, known: list[int]) -> int:
    """A process of its session that is not known yet."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for pid in in_session(server.pid):
            if pid not in known:
                return pid
    raise AssertionError("no other process")


def in_session(session: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.getsid(int(name)) == session:
                with open(f"/proc/{name}/stat") as file:
                    if file.read().rpartition(")")[2].split()[0] not in "ZX":
                        found.append(int(name))
        except OSError:
            continue
    return found


def test_kill_session() -> None:
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 1000 & sleep 1000 & echo up; wait"], start_new_session=True, stdout=subprocess.PIPE
    )
    assert leader.stdout is not None
    with leader.stdout as out:
        assert out.readline() == b"up\n"
    kill_session(leader.pid)
    assert leader.wait(60) is not None
    assert not in_session(leader.pid)


def test_no_process_to_be_had() -> None:
    """Under RLIMIT_NPROC (not for root, so as another user) the fork is refused, and said so; the server goes on, and
    has its guard as soon as there is a process for it. The limit counts all processes of a user: of one who has no
    others."""
    code = """
import os, resource, select, sys, time
from upipe.runtime import messages
from upipe.runtime.messages import Refused, Spawn, Spawned
from upipe.runtime.process import ForkServer
os.setgroups([]); os.setgid(65534); os.setuid(int(sys.argv[2]))
os.environ["UPIPE_SHM"] = sys.argv[1]
resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
server = ForkServer("fork")
for number in range(8):
    ours, theirs = messages.pair()
    server.spawn(Spawn("a#0", ("sleep", "1000")), theirs)
found = []
while len(found) < 8:
    select.select([server.sock], [], [])
    found += [message for message, _ in server.read()]
print(sum(isinstance(one, Refused) for one in found))
time.sleep(0.2)  # it misses its guard, if the worker was the first
workers = {one.pid for one in found if isinstance(one, Spawned)}
for pid in workers:
    os.kill(pid, 9)
while {int(one) for one in open(f"/proc/{server.pid}/task/{server.pid}/children").read().split()} <= workers:
    time.sleep(0.05)
server.close()
"""
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    done = subprocess.run(
        [sys.executable, "-c", code, f"/dev/shm/upipe-test-nobody-{os.getpid()}", str(1_000_000 + os.getpid())],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if "Permission" in done.stderr or "ModuleNotFound" in done.stderr:
        pytest.skip("another user cannot import from here")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 7
