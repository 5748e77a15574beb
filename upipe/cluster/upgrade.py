"""From HTTP to a Link: GET with `Upgrade: upipe-mirror/1`, answered by 101, and both ends speak records from then on.

Who dials sends nothing after its request until the 101 came, so nothing can arrive before the protocol was changed.
"""

from __future__ import annotations

import asyncio
import ssl as tls
from collections.abc import Mapping
from typing import cast

from aiohttp import web

from upipe.cluster.link import Joined, Link
from upipe.cluster.records import UPGRADE
from upipe.errors import UpipeError

MOST_HEAD = 16384
"""Bytes of the answer's head at most."""
DIAL_TIMEOUT = 5.0
"""Seconds for connection, TLS and 101 together."""


class UpgradeRefused(UpipeError, ConnectionError):
    """The peer answered, and did not switch to the mirror protocol.

    Attributes:
        status: its HTTP status, 0 when it sent no HTTP.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


async def accept(request: web.Request, joined: Joined) -> web.StreamResponse:
    """The body of the route's handler: take the connection over; returns when it has ended.

    Args:
        joined: gets the Link at once, and adds the mirrors that it carries.
    """
    wanted = request.headers.get("Upgrade", "")
    if wanted != UPGRADE or "upgrade" not in request.headers.get("Connection", "").lower():
        raise web.HTTPUpgradeRequired(
            text=f"this address speaks {UPGRADE}, not {wanted or 'plain HTTP'}; run one version",
            headers={"Upgrade": UPGRADE},
        )
    transport = request.transport
    if transport is None or transport.is_closing():
        raise web.HTTPBadRequest(text="the connection is closing")
    link = Link(request.protocol)
    transport.set_protocol(link)  # before the 101: nothing arrives in between
    transport.write(f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {UPGRADE}\r\n\r\n".encode())
    link.connection_made(transport)
    joined(link)
    await asyncio.shield(link.closed)
    return web.Response(status=400)  # nobody gets it: the connection is gone


async def dial(
    host: str,
    port: int,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    ssl: tls.SSLContext | None = None,
    server_hostname: str | None = None,
    timeout: float = DIAL_TIMEOUT,
) -> Link:
    """Connect, ask for the upgrade, and return the Link.

    Args:
        path: of the route, such as /v1/mirrors/links.
        headers: what authenticates the request.
        ssl, server_hostname: for TLS.

    Raises:
        UpgradeRefused, OSError, TimeoutError.
    """
    async with asyncio.timeout(timeout):
        loop = asyncio.get_running_loop()
        transport, asking = await loop.create_connection(
            _Asking, host, port, ssl=ssl, server_hostname=server_hostname if ssl else None
        )
        try:
            lines = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", "Connection: Upgrade", f"Upgrade: {UPGRADE}"]
            lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
            if any(set("\r\n\0") & set(line) for line in lines):
                raise ValueError("a header or the path holds a line break")
            transport.write("\r\n".join([*lines, "", ""]).encode())
            return await asking.answer
        except BaseException:
            transport.abort()
            raise


class _Asking(asyncio.BufferedProtocol):
    """Reads the head of the answer, byte by byte at most, so that none of the first record is read with it."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._head = memoryview(bytearray(MOST_HEAD))
        self._filled = 0
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._head[self._filled : self._filled + 1]

    def buffer_updated(self, count: int) -> None:
        self._filled += count
        head = bytes(self._head[: self._filled])
        if not head.endswith(b"\r\n\r\n"):
            if self._filled == MOST_HEAD:
                self._refuse(f"its answer begins with more than {MOST_HEAD} bytes", 0)
            return
        status = _status(head)
        if status != 101 or f"upgrade: {UPGRADE}".encode() not in head.lower():
            line = head.partition(b"\r\n")[0].decode("latin-1")
            self._refuse(f"it answers {line!r} instead of 101", status)
            return
        transport = cast(asyncio.Transport, self._transport)  # uvloop's is no subclass of it
        link = Link()
        transport.set_protocol(link)
        link.connection_made(transport)
        if not self.answer.done():
            self.answer.set_result(link)

    def connection_lost(self, error: Exception | None) -> None:
        self._refuse("it closed the connection without an answer", 0)

    def _refuse(self, why: str, status: int) -> None:
        if not self.answer.done():
            self.answer.set_exception(UpgradeRefused(f"the peer does not speak {UPGRADE}: {why}", status))


def _status(head: bytes) -> int:
    parts = head.split(b" ", 2)
    return int(parts[1]) if len(parts) > 1 and parts[0].startswith(b"HTTP/1.") and parts[1].isdigit() else 0
