"""A real server of the whole route table, with handlers that answer something, and raw connections to it."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.cluster.connections import all_closed, connections
from upipe.cluster import dealings, messages, routes, tls, wire
from upipe.cluster.audit import Audit
from upipe.cluster.client import Client, Target
from upipe.cluster.guard import Policy
from upipe.cluster.listen import Limits
from upipe.cluster.routes import Bytes, Route
from upipe.cluster.server import Call, Handler, Server, refuse
from upipe.cluster.token import Secret
from upipe.graph.spec import PipeSpec

QUICK = Limits(linger_seconds=0.02)
SECRET = Secret(bytes(range(32)))
OTHER = Secret(bytes(range(1, 33)))
NODE = "00000000000000aa"
CLIENT = tls.Identity("client", "00000000000000cc")
PARAMETERS = {"sha256": "ab" * 32, "pipe": "words", "mirror": "words-a-b", "job": "j1", "node": NODE}

INFO = messages.NodeInfo(NODE, "test", ("127.0.0.1",), 7420, 1, version="0.1.0")
STATUS = wire.NodeStatus(INFO, time.time())
PIPE = wire.PipeInfo("words", "words", 1, NODE, dealings.TellClient("running"))
SPEC = PipeSpec("words")
GOSSIP = messages.Gossip(INFO, 0)
MIRROR = wire.MirrorInfo("words-a-b", "source", 1, NODE, 30, 20, 10)
JOB = wire.JobInfo("j1", "script", "running", NODE)
ANSWERS: dict[type, Any] = {
    wire.NodeStatus: STATUS, wire.Members: wire.Members("test", ()), messages.Gossip: GOSSIP, wire.Done: wire.Done(),
    messages.Accepted: messages.Accepted(GOSSIP), wire.Pipes: wire.Pipes((PIPE,)), wire.PipeInfo: PIPE,
    wire.News: wire.News(1, dealings.TellClient("running")), wire.MirrorInfo: MIRROR,
    wire.Mirrors: wire.Mirrors((MIRROR,)), wire.Jobs: wire.Jobs((JOB,)), wire.JobInfo: JOB, Bytes: b"bytes",
}  # fmt: skip
BODIES: dict[type, Any] = {
    wire.Stopping: wire.Stopping(), messages.Join: messages.Join(INFO), messages.Gossip: GOSSIP,
    messages.Relay: messages.Relay(NODE, GOSSIP), messages.Leave: messages.Leave(NODE, 1),
    wire.PipeRequest: wire.PipeRequest("words", SPEC), wire.Orders: wire.Orders((1, 1)),
    wire.Deal: wire.Deal(dealings.Accepted(NODE, (1, 1))), wire.Told: wire.Told(dealings.NodeReport(NODE, 1)),
    wire.Attendance: wire.Attendance("00000000000000cc"), wire.JobRequest: wire.JobRequest("j", ("x.py",), "ab" * 32),
}  # fmt: skip


class Echo(asyncio.Protocol):
    """Sends back what it gets, in capitals; first it says hello."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


async def put_code(call: Call) -> wire.Stored:
    seen, size = hashlib.sha256(), 0
    async for piece in call.pieces():
        seen.update(piece)
        size += len(piece)
    if seen.hexdigest() != call.parameters["sha256"]:
        raise refuse(400, "other_content", "The content's hash is another one.")
    return wire.Stored(seen.hexdigest(), size)


async def mirror(call: Call) -> Any:
    if not call.upgrade:
        return MIRROR
    echo = Echo()
    call.switch(echo).write(b"hello")
    await echo.lost.wait()
    return None


def answering(route: Route[Any, Any]) -> Handler:
    async def handler(call: Call) -> Any:
        return ANSWERS[route.answer]

    return handler


def handlers(**other: Handler) -> dict[str, Handler]:
    made = {
        route.name: answering(route)
        for route in routes.ROUTES
        if route is not routes.OPENAPI and route.answer in ANSWERS
    }
    return {**made, "put_code": put_code, "mirror": mirror, **other}


@dataclass
class Running:
    server: Server
    port: int
    unix: Path
    log: Path

    def client(
        self, secret: Secret = SECRET, identity: tls.Identity = CLIENT, node: str = NODE, **options: Any
    ) -> Client:
        return Client(Target("127.0.0.1", self.port, node), secret, tls.issue(secret, identity), **options)

    def audit(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in self.log.read_bytes().splitlines()]

    async def raw(self, data: bytes, tls_: bool = False) -> bytes:
        """Everything that comes back on a fresh connection until the server closes it."""
        context = tls.client_context(tls.issue(SECRET, CLIENT)) if tls_ else None
        reader, writer = await self.open(context)
        writer.write(data)
        try:
            return await reader.read()
        finally:
            await closed(writer)

    async def open(self, context: ssl.SSLContext | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name = tls.DOMAIN if context else None
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name)


@asynccontextmanager
async def running(
    folder: Path, limits: Limits = QUICK, plain: bool = False, credentials: tls.Credentials | None = None,
    **other: Handler,
) -> AsyncIterator[Running]:  # fmt: skip
    """Serve on loopback and on a Unix socket; `plain` without TLS, for requests written by hand."""
    log, before = folder / "audit" / "log", connections()
    identity = tls.Identity("node", NODE)
    credentials = None if plain else credentials or tls.issue(SECRET, identity, ["127.0.0.1", "localhost"])
    with Audit(log, SECRET.bearer) as audit:
        server = Server(Policy(SECRET.bearer, NODE), handlers(**other), audit, limits)
        try:
            [(_, port)] = server.listen_tcp("127.0.0.1", 0, credentials)
            server.listen_unix(folder / "run" / "node")
            yield Running(server, port, folder / "run" / "node", log)
        finally:
            await server.stop(1.0)
            await all_closed(before)


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close it, whatever became of the other end."""
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def request(
    method: str, path: str, *headers: str, token: str | None = SECRET.bearer, body: bytes = b"", host: str = "localhost"
) -> bytes:
    """A request by hand."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def status_of(answer: bytes) -> int:
    return int(answer.split(maxsplit=2)[1])


def problem_of(answer: bytes) -> wire.Problem:
    return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2], type=wire.Problem)
