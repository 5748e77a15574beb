"""Opening a connection that leaves HTTP after one exchange: `Upgrade`, by hand, since aiohttp keeps what it opened.

Small because we speak to ourselves: one request, one head of bounded size, 101 or a refusal.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import cast

import msgspec

from upipe.cluster.wire import Problem
from upipe.errors import NodeAnswerInvalid, NodeRefused, NodeUnreachable

HEAD = 16 * 1024
"""Most bytes of an answer until the connection is upgraded, or of a refusal."""


class Opening(asyncio.Protocol):
    """Reads until the node agreed, then gives the connection, with what came behind the head, to its heir."""

    def __init__(self, request: bytes, heir: asyncio.BaseProtocol, where: str) -> None:
        self._request = request
        self._heir = heir
        self._where = where
        self._data = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but says so nowhere
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if end and head.startswith(b"HTTP/1.1 101 "):
            self._inherit(rest)
        elif len(self._data) > HEAD:
            self._fail(NodeAnswerInvalid(f"{self._where} answered an upgrade with more than {HEAD:,} bytes"))

    def _inherit(self, rest: bytes) -> None:
        # All within this callback: not a byte can come between the old protocol and the new one.
        self._transport.set_protocol(self._heir)
        self._heir.connection_made(self._transport)
        if rest:
            feed(self._heir, rest)
        if not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        head, _, body = self._data.partition(b"\r\n\r\n")
        words = head.split(maxsplit=2)
        if exc is not None:
            self._fail(exc)
        elif len(words) > 1 and words[0] == b"HTTP/1.1" and words[1].isdigit():
            try:
                problem = msgspec.json.decode(body, type=Problem)
            except msgspec.MsgspecError:
                problem = Problem("unknown", "It gave no reason that this version understands.")
            self._fail(NodeRefused(self._where, int(words[1]), problem.code, problem.sentence))
        else:
            self._fail(NodeUnreachable(f"{self._where} ended the connection instead of answering: it may have stopped"))

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
        self._transport.close()


def feed(protocol: asyncio.BaseProtocol, data: bytes) -> None:
    """Give bytes to a protocol as its transport would."""
    if isinstance(protocol, asyncio.Protocol):
        protocol.data_received(data)
        return
    assert isinstance(protocol, asyncio.BufferedProtocol)
    rest = memoryview(data)
    while rest:
        room = memoryview(protocol.get_buffer(len(rest)))
        taken = min(len(room), len(rest))
        room[:taken] = rest[:taken]
        protocol.buffer_updated(taken)
        rest = rest[taken:]


async def open_upgraded(
    where: Path | tuple[str, int],
    context: ssl.SSLContext | None,
    name: str,
    request: bytes,
    heir: asyncio.BaseProtocol,
    told: str,
) -> asyncio.Transport:
    """Connect, prove the node (TLS, `name`), send the request, and hand over.

    Args:
        where: a Unix socket, or host and port.
        context: for TLS.
        name: that its certificate must carry.
        request: the head.
        heir: protocol of the connection from then on.
        told: the node, for people.

    Raises:
        NodeRefused, NodeAnswerInvalid, NodeUnreachable, OSError, ssl.SSLError.
    """
    loop = asyncio.get_running_loop()

    def opening() -> Opening:
        return Opening(request, heir, told)

    if isinstance(where, Path):
        transport, protocol = await loop.create_unix_connection(opening, str(where))
    else:
        assert context is not None  # the request carries the token
        transport, protocol = await loop.create_connection(opening, *where, ssl=context, server_hostname=name)
    try:
        await protocol.done
    except BaseException:
        transport.close()
        raise
    return transport
