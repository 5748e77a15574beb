"""The doors of a node: bound sockets, and an accept loop that counts a connection before it costs a TLS handshake.

asyncio's own server has no limit, and would let strangers hold every descriptor of a node. Here a connection is
*unproven* until a request of it passed the guard, and of these there may be few: each must finish its handshake and
each of its heads within seconds (slow loris), and the oldest goes when there are too many.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from upipe.cluster import tls
from upipe.errors import NodeCannotServe
from upipe.settings import KIB

BACKLOG = 256
REST = 0.1
"""Seconds without accepting when no descriptor is left."""
UNIX_PATH = 107
"""Most bytes of the path of a Unix socket."""


@dataclass(frozen=True)
class Limits:
    """What strangers can make a node spend."""

    connections: int = 1024
    """Connections at a time; beyond it new ones are closed at once."""
    unproven: int = 64
    """Of them, such as have not shown the token yet."""
    handshake_seconds: float = 5.0
    """For a TLS handshake."""
    head_seconds: float = 15.0
    """For the head of the first request, and then from one answer to the head of the next request."""
    linger_seconds: float = 1.0
    """Reading what is left of a refused body, so that the refusal arrives."""
    line: int = 2 * KIB
    """Bytes of the request line."""
    field: int = 4 * KIB
    """Bytes of one header."""
    fields: int = 48
    """Headers."""


DEFAULT_LIMITS = Limits()


@dataclass
class Gate:
    """Counts connections; pure.

    Invariant: the unproven are a subset of those inside, in the order in which they came.
    """

    limits: Limits
    inside: set[socket.socket] = field(default_factory=set)
    unproven: dict[socket.socket, None] = field(default_factory=dict)

    def admit(self, key: socket.socket) -> socket.socket | None:
        """Count one in; who has to go for it: nobody, the oldest of too many unproven ones, or itself.

        The oldest, not the newest: who means well is unproven for milliseconds, so that sixty-four idle strangers would
        lock everyone out, while it takes thousands of connections a second to be in the way of the newest.
        """
        if len(self.inside) >= self.limits.connections:
            return key
        oldest = next(iter(self.unproven)) if len(self.unproven) >= self.limits.unproven else None
        if oldest is not None:
            self.leave(oldest)
        self.inside.add(key)
        self.unproven[key] = None
        return oldest

    def prove(self, key: socket.socket) -> None:
        """A request of it passed the guard."""
        self.unproven.pop(key, None)

    def leave(self, key: socket.socket) -> None:
        """It is closed; again does nothing."""
        self.inside.discard(key)
        self.unproven.pop(key, None)


class Door:
    """Accepts on one socket until it is closed.

    Args:
        listener: bound and listening.
        gate: shared by all doors of a node.
        protocol: makes the protocol of one connection, for its key in the gate; that protocol calls gate.leave(key).
        context: for TLS; None is plain.
        told: called with an event and its facts, for the audit log.
        tell: called with a sentence when a node cannot be let in for its certificate.
    """

    def __init__(
        self,
        listener: socket.socket,
        gate: Gate,
        protocol: Callable[[socket.socket], asyncio.Protocol],
        context: ssl.SSLContext | None,
        told: Callable[..., None],
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.listener = listener
        self._gate = gate
        self._protocol = protocol
        self.context = context
        self._told = told
        self._tell = tell
        self._shaking: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._look()

    # A reader and no task that awaits sock_accept: who is cancelled between the accept and its next step loses the
    # connection, which is then neither served nor closed; and what raises once ends such a task for good.

    def _look(self) -> None:
        self._again = None
        self._loop.add_reader(self.listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, address = self.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # it was gone before we took it
            return
        except OSError:  # out of descriptors: the kernel does not tell when there are some again
            self._loop.remove_reader(self.listener.fileno())
            self._again = self._loop.call_later(REST, self._look)
            return
        try:
            self._admit(connection, address)
        except BaseException:
            self._gate.leave(connection)
            connection.close()
            raise

    def _admit(self, connection: socket.socket, address: object) -> None:
        connection.setblocking(False)
        peer = _peer(connection, address)
        if self.listener.family == socket.AF_UNIX and uid_of(connection) not in (os.geteuid(), 0):
            self._told("refused", peer=peer, code="other_user")
            connection.close()
            return
        turned_away = self._gate.admit(connection)
        if turned_away is not None:
            self._told("turned_away", peer=_peer_of(turned_away))
            with suppress(OSError):  # it is closed already
                turned_away.shutdown(socket.SHUT_RDWR)  # not close: its transport does that when it sees the end
        if turned_away is connection:
            connection.close()
            return
        task = self._loop.create_task(self._open(connection, peer))
        self._shaking.add(task)
        task.add_done_callback(lambda task: self._opened(task, connection))

    async def _open(self, connection: socket.socket, peer: str) -> None:
        seconds = self._gate.limits.handshake_seconds if self.context else None
        greeting = tls.Greeting()
        tls.greeting.set(greeting)  # in this task's context, which the connection inherits
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._protocol(connection), connection, ssl=self.context, ssl_handshake_timeout=seconds
            )
        except (OSError, ssl.SSLError) as error:  # TimeoutError is an OSError
            why = greeting.failure or error
            reason = getattr(why, "verify_message", "") or getattr(why, "reason", "") or type(why).__name__
            self._told("handshake", peer=peer, code=str(reason))
            if greeting.failure is not None:
                self._tell(f"{peer} is not let in: {tls.explain(greeting.failure)}")
            raise

    def _opened(self, task: asyncio.Task[None], connection: socket.socket) -> None:
        """Also of one that was cancelled before its first step."""
        self._shaking.discard(task)
        if task.cancelled() or (error := task.exception()) is not None:
            self._gate.leave(connection)
            connection.close()
            if not task.cancelled() and not isinstance(error, OSError):  # SSLError is an OSError
                self._loop.call_exception_handler({"message": "uPipe: opening a connection failed", "exception": error})

    async def close(self) -> None:
        """Accept no more, and end the handshakes that go on; again does nothing."""
        if self.listener.fileno() >= 0:
            self._loop.remove_reader(self.listener.fileno())
            self.listener.close()
        if self._again is not None:
            self._again.cancel()
        tasks = list(self._shaking)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # their callbacks were called before ours: what they held is closed


def _peer(connection: socket.socket, address: object) -> str:
    if connection.family == socket.AF_UNIX:
        return f"unix:{uid_of(connection)}"
    return str(address[0]) if isinstance(address, tuple) else ""


def _peer_of(connection: socket.socket) -> str:
    try:
        return _peer(connection, connection.getpeername())
    except OSError:
        return "gone"


def uid_of(connection: socket.socket) -> int:
    """The user at the other end of a Unix socket, as the kernel knows it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


# ---------------------------------------------------------------------------------------------------- binding


def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Listen on every address that `host` means; port 0 takes a free one, the same for all.

    Raises:
        NodeCannotServe: the port is in use (names by whom, as far as this user may know), or the host is not of here.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise NodeCannotServe(f"{host!r} cannot be resolved ({error.strerror}): name an address of this host") from None
    made: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            made.append(_bind_one(family, (address[0], port, *address[2:])))
            port = made[-1].getsockname()[1]
    except BaseException:
        for one in made:
            one.close()
        raise
    return made


def _bind_one(family: int, address: tuple[str | int, ...]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.setblocking(False)
        one.bind(address)
        one.listen(BACKLOG)
    except OSError as error:
        one.close()
        raise NodeCannotServe(_why_not(str(address[0]), int(address[1]), error)) from None
    return one


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by {listener_of(port)}: stop that, or choose another with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this host: choose one that `ip address` shows, or 0.0.0.0 for all"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} on {host} may not be used by this user: choose one above 1023 with --port"
    return f"{host}:{port} cannot be listened on: {error.strerror}"


def listener_of(port: int) -> str:
    """Who listens on a port: its pid and command, when it is ours to see."""
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                words = psutil.Process(one.pid).cmdline()[:3]
                return f"process {one.pid} ({' '.join(map(os.path.basename, words))})"
    except (psutil.Error, OSError):
        pass
    return f"a process that this user may not see (as root: `ss -ltnp sport = :{port}`)"


def bind_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket, 0600 in a directory 0700; one that a dead process left is replaced.

    Raises:
        NodeCannotServe: the directory is not ours alone, a living process listens there, or the path is too long.
    """
    if len(os.fsencode(path)) > UNIX_PATH:
        raise NodeCannotServe(
            f"the path of the socket, {path}, is longer than {UNIX_PATH} bytes: use a shorter --data-dir"
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if fault := private(path.parent):
        raise NodeCannotServe(fault)
    if path.exists() and not _alive(path):
        path.unlink()
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.setblocking(False)
    try:
        one.bind(str(path))  # its directory is closed to others, so nobody comes in before chmod
        path.chmod(0o600)
        one.listen(BACKLOG)
    except OSError as error:
        one.close()
        if error.errno == errno.EADDRINUSE:
            raise NodeCannotServe(f"another node listens at {path}: stop it, or use another --data-dir") from None
        raise NodeCannotServe(f"{path} cannot be listened on: {error.strerror}") from None
    return one


def private(directory: Path) -> str:
    """Why a directory is not this user's alone; "" when it is. What lies in one that is, only this user put there."""
    try:
        status = directory.lstat()
    except OSError as error:
        return f"{directory} cannot be used: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is no directory"
    if status.st_uid != os.geteuid():
        return f"{directory} belongs to user {status.st_uid}: use another --data-dir"
    if status.st_mode & 0o077:
        return f"{directory} is open to others (mode {stat.S_IMODE(status.st_mode):04o}): `chmod 700` it"
    return ""


def _alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True
