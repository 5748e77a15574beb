"""Asking a node: each request is a line of the route table, has a deadline, and fails as a typed exception.

The token goes out only after the peer is proven: over TLS the handshake checks the cluster's CA and the node's name
before there is anything to write to; a Unix socket must lie in a directory that is this user's alone. There is no
third way: plain TCP is refused, on loopback too, where any user of the host may listen. Redirects, proxies and
cookies are off.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec
from aiohttp import hdrs

from upipe.cluster import tls
from upipe.cluster.listen import private
from upipe.cluster.opening import open_upgraded
from upipe.cluster.routes import Bytes, Route
from upipe.cluster.token import Secret
from upipe.cluster.wire import NODE_ID, Problem
from upipe.errors import (
    ClusterError,
    NodeAnswerInvalid,
    NodeRefused,
    NodeTimeout,
    NodeUnproven,
    NodeUnreachable,
)

Q = TypeVar("Q")
A = TypeVar("A")

ATTEMPTS = 3
"""Tries of a request that may be sent again, within its one deadline."""
BACKOFF = 0.1
"""Seconds before the second try, at most; doubles. The wait is a random share: nodes do not go in step."""
_NO_HOST = frozenset("@/\\?#[]\r\n\t ")  # addresses come from the network: none may become another URL or header
KEEPALIVE = 10.0
"""Seconds that an idle connection is kept: less than the server's head_seconds, so that it is ours to close."""
CONNECTIONS = 8
"""To one node, of one client, at a time."""


@dataclass(frozen=True)
class Target:
    """A node to dial: by address, or the one of this host by its Unix socket."""

    host: str = ""
    port: int = 0
    node: str = ""
    """Id that it must prove; "": any node of the cluster (a seed)."""
    unix: Path | None = None

    def __post_init__(self) -> None:
        if set(self.host) & _NO_HOST or not re.fullmatch(f"({NODE_ID})?", self.node) or not 0 <= self.port < 65536:
            raise ValueError(f"no address of a node: host {self.host!r}, port {self.port}, node {self.node!r}")

    def __str__(self) -> str:
        if self.unix is not None:
            return f"node at {self.unix}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"node {self.node} at {host}:{self.port}" if self.node else f"{host}:{self.port}"

    @property
    def base(self) -> str:
        """Beginning of its URLs."""
        if self.unix is not None:
            return "http://localhost"
        return f"https://[{self.host}]:{self.port}" if ":" in self.host else f"https://{self.host}:{self.port}"


class Client:
    """Speaks to one node over a small pool of connections. Close it, or use it as `async with`.

    Args:
        target: the node.
        secret: for the bearer token.
        credentials: what this process shows in TLS, and whom it trusts; not needed for a Unix socket.
        sleep: waits between tries; for tests.
    """

    def __init__(
        self,
        target: Target,
        secret: Secret,
        credentials: tls.Credentials | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if target.unix is None and credentials is None:
            raise ValueError("a node over TCP is dialled with TLS: credentials are needed")
        self.target = target
        self._secret = secret
        self._credentials = credentials
        self._sleep = sleep
        self._context = tls.client_context(credentials) if credentials and target.unix is None else None
        self._name = credentials.expected(target.host, target.node) if credentials and self._context else "localhost"
        self._session: aiohttp.ClientSession | None = None

    # ------------------------------------------------------------------------------------------- requests

    async def call(
        self, route: Route[Q, A], body: Q | None = None, *, seconds: float | None = None, attempts: int = ATTEMPTS,
        **parameters: str,
    ) -> A:  # fmt: skip
        """Ask, and wait for the answer.

        Args:
            route: of the table.
            body: its struct, where the route has one.
            seconds: deadline over all tries; default the route's.
            attempts: tries; only routes that say `again` are tried again.
            parameters: of the path.

        Raises:
            NodeUnreachable: nobody answers.
            NodeUnproven: it is not proven to be that node; nothing secret was sent.
            NodeTimeout: no answer in time.
            NodeRefused: it said no.
            NodeAnswerInvalid: what it said is not understood.
        """
        data = b"" if body is None else msgspec.json.encode(body)
        answer = await self._tried(route, data, seconds, attempts, parameters)
        try:
            return msgspec.json.decode(answer, type=route.answer)
        except msgspec.MsgspecError as error:
            raise NodeAnswerInvalid(f"{self.target} answered {route.name} with what is no answer: {error}") from None

    async def upload(
        self, route: Route[Bytes, A], data: bytes, *, seconds: float | None = None, **parameters: str
    ) -> A:
        """Send bytes; as `call`."""
        answer = await self._tried(route, data, seconds, ATTEMPTS, parameters)
        return msgspec.json.decode(answer, type=route.answer)

    async def fetch(self, route: Route[None, Bytes], *, seconds: float | None = None, **parameters: str) -> bytes:
        """Get bytes, all at once (b"" of HEAD); as `call`."""
        return await self._tried(route, b"", seconds, ATTEMPTS, parameters)

    async def stream(self, route: Route[None, Bytes], **parameters: str) -> AsyncIterator[bytes]:
        """Get bytes as they come; the route's `seconds` is the longest silence. As `call`, but tried once."""
        async with self._sent(route, b"", route.seconds, parameters) as answer:
            pieces = answer.content.iter_any().__aiter__()
            while True:
                async with asyncio.timeout(route.seconds):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                yield piece

    async def upgrade(
        self, route: Route[None, Any], protocol: asyncio.BaseProtocol, *, seconds: float = 10.0, **parameters: str
    ) -> asyncio.Transport:
        """Open a connection of its own, and give it to `protocol` (a BufferedProtocol may be one) once the node agrees.

        Raises:
            As `call`.
        """
        headers = {**self._headers(route), "Connection": "Upgrade", "Upgrade": route.upgrade}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"GET {route.fill(parameters)} HTTP/1.1\r\n{head}\r\n".encode()
        async with self._told(seconds):
            self._check_unix()
            self._freshen()
            where = self.target.unix or (self.target.host, self.target.port)
            return await open_upgraded(where, self._context, self._name, request, protocol, str(self.target))

    def renew(self, credentials: tls.Credentials) -> None:
        """Show another certificate from the next connection on."""
        if self._context is not None:
            tls.renew(self._context, credentials)
            self._credentials = credentials

    def _freshen(self) -> None:
        """A process that only dials makes its new certificate here, when it is time; a node's agent calls renew()."""
        one = self._credentials
        if one is not None and one.identity.kind == "client" and one.due(datetime.now(UTC)):
            self.renew(tls.issue(self._secret, one.identity))

    async def close(self) -> None:
        """Close its connections; again does nothing."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------------- how

    async def _tried(
        self, route: Route[Any, Any], data: bytes, seconds: float | None, attempts: int, parameters: dict[str, str]
    ) -> bytes:
        seconds = route.seconds if seconds is None else seconds
        tries = attempts if route.again else 1
        async with self._told(seconds):
            for number in range(1, tries + 1):
                try:
                    async with self._sent(route, data, None, parameters) as answer:
                        return await self._bounded(answer, route.most_answer)
                except NodeUnreachable:
                    if number == tries:
                        raise
                await self._sleep(random.random() * BACKOFF * 2 ** (number - 1))
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _sent(
        self, route: Route[Any, Any], data: bytes, seconds: float | None, parameters: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = self._headers(route)
        if route.request is not type(None):
            headers[hdrs.CONTENT_TYPE] = "application/octet-stream" if route.request is Bytes else "application/json"
        async with self._told(seconds):
            self._check_unix()
            self._freshen()
            answer = await self._pool().request(
                route.method, self.target.base + route.fill(parameters), headers=headers, data=data or None,
                allow_redirects=False, server_hostname=self._name if self._context else None,
            )  # fmt: skip
        async with answer:
            if not 200 <= answer.status < 300:
                async with self._told(seconds):
                    raise refusal(str(self.target), answer.status, await self._bounded(answer, 64 * 1024))
            async with self._told(None):
                yield answer

    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self.target.unix is not None:
                connector = aiohttp.UnixConnector(str(self.target.unix), limit=CONNECTIONS, keepalive_timeout=KEEPALIVE)
            else:
                assert self._context is not None
                connector = aiohttp.TCPConnector(ssl=self._context, limit=CONNECTIONS, keepalive_timeout=KEEPALIVE)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False,
                timeout=aiohttp.ClientTimeout(), skip_auto_headers=("User-Agent",),
            )  # fmt: skip
        return self._session

    def _headers(self, route: Route[Any, Any]) -> dict[str, str]:
        port = "" if self._name.endswith(tls.DOMAIN) or not self.target.port else f":{self.target.port}"
        return {
            "Host": f"[{self._name}]{port}" if ":" in self._name else self._name + port,
            "Authorization": f"Bearer {self._secret.bearer}",
            "Accept": route.media.partition(";")[0],
            "Accept-Encoding": "identity",
        }

    def _check_unix(self) -> None:
        if self.target.unix is not None and (fault := private(self.target.unix.parent)):
            raise NodeUnproven(f"{self.target} was not asked: {fault}")

    async def _bounded(self, answer: aiohttp.ClientResponse, most: int) -> bytes:
        data = bytearray()
        async for piece in answer.content.iter_any():
            data += piece
            if len(data) > most:
                raise NodeAnswerInvalid(f"{self.target} answered with more than {most:,} bytes")
        return bytes(data)

    @asynccontextmanager
    async def _told(self, seconds: float | None) -> AsyncIterator[None]:
        """A deadline, and every failure as an exception of ours."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except ClusterError:
            raise
        except TimeoutError:
            waited = f" for {seconds:g} s" if seconds is not None else ""
            raise NodeTimeout(f"{self.target} did not answer{waited}: is it overloaded, or the network cut?") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
            raise told(str(self.target), error) from error


def told(where: str, error: BaseException) -> ClusterError:
    """The exception of ours for one of the network's. Pure."""
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    if inner is error and not isinstance(error, ssl.SSLError):
        inner = _alert(error) or error
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)) or isinstance(inner, ssl.SSLError):
        said = (
            "does not take us for one of its cluster"
            if "ALERT" in str(inner)
            else "is not proven to be of this cluster"
        )
        return NodeUnproven(f"{where} {said}: {tls.explain(inner)}")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return NodeUnreachable(f"{where} cannot be found: its name does not resolve ({inner})")
    if isinstance(error, aiohttp.ClientPayloadError):
        return NodeUnreachable(f"{where} ended its answer early: it may have stopped")
    if isinstance(inner, ConnectionRefusedError):
        return NodeUnreachable(f"{where} does not answer: nothing listens there; is `upipe-node` running?")
    if isinstance(inner, FileNotFoundError):
        return NodeUnreachable(f"{where} does not answer: there is no such socket; is `upipe-node` running?")
    return NodeUnreachable(
        f"{where} cannot be reached ({_reason(inner)}): is it up, and does a firewall let its port in?"
    )


def _alert(error: BaseException) -> ssl.SSLError | None:
    """What the peer said after our side of the handshake was over, as aiohttp passes it on: below its own exception."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, ssl.SSLError):
        below = below.__cause__ or below.__context__
    return below


def _reason(error: BaseException) -> str:
    """In the system's words: asyncio's own repeat the address."""
    if isinstance(error, aiohttp.ServerDisconnectedError) or (isinstance(error, OSError) and error.errno is None):
        return "it ended the connection"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def refusal(where: str, status: int, body: bytes) -> NodeRefused:
    """What a node's refusal says; of one that is not worded as ours, its status only."""
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except msgspec.MsgspecError:
        problem = Problem("unknown", "It gave no reason that this version understands.")
    return NodeRefused(where, status, problem.code, problem.sentence)
