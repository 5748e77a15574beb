"""A node's HTTP server: the guard (guard.py) before the route table (routes.py), around handlers given by name.

aiohttp's low-level server parses; its Application, router and middlewares are not used, since they answer before a
middleware is asked (100-continue, 404, 405) and a route could be added beside the table. So there is one way in,
`_answer`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from upipe import __version__
from upipe.cluster import openapi, tls
from upipe.cluster.audit import Audit
from upipe.cluster.guard import Allowed, Peer, Policy, Refusal, decide, may_listen
from upipe.cluster.listen import DEFAULT_LIMITS, Door, Gate, Limits, bind_tcp, bind_unix, uid_of
from upipe.cluster.routes import Bytes, Route
from upipe.cluster.wire import Problem
from upipe.errors import NodeCannotServe, NodeRefused, UpipeError

log = logging.getLogger("upipe.cluster")
_HEADERS = {
    "Server": "upipe",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
MOST_SAID = 256
"""Sentences on peers that are told; more are in the audit log only."""
_OUT = msgspec.json.Encoder()

Handler = Callable[["Call"], Awaitable[Any]]
"""Gets a Call; returns the struct that the table names, or, where it says Bytes, bytes or an async iterator of them.
Raises `refuse(...)` to say no."""


def refuse(status: int, code: str, sentence: str) -> NodeRefused:
    """What a handler raises to say no: arrives at the client as the same exception."""
    return NodeRefused("this node", status, code, sentence)


@dataclass
class Call:
    """One request that passed the guard, as a handler sees it."""

    route: Route[Any, Any]
    parameters: dict[str, str]
    peer: Peer
    upgrade: bool
    """The peer asks for the route's other protocol: call `switch`."""
    body: Any
    """The decoded struct; None without one."""
    _request: web.BaseRequest
    switched: bool = False

    @property
    def gone(self) -> bool:
        """Whether the peer has closed the connection: nobody reads an answer any more."""
        transport = self._request.transport
        return transport is None or transport.is_closing()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body of a Bytes route as it comes.

        Raises:
            NodeRefused: larger than the route takes, too slow, or broken.
        """
        size, content = 0, self._request.content
        while True:
            try:
                async with asyncio.timeout(self.route.seconds):
                    piece = await content.readany()
            except TimeoutError:
                raise refuse(408, "too_slow", f"Nothing of the body came for {self.route.seconds:g} s.") from None
            except (web.RequestPayloadError, ValueError):
                raise refuse(400, "broken_body", "The body ended early, or its chunks are malformed.") from None
            if not piece:
                return
            size += len(piece)
            if size > self.route.most:
                raise refuse(413, "too_large", f"At most {self.route.most:,} bytes are taken there.")
            yield piece

    def switch(self, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
        """Answer 101 and give the connection to another protocol (a BufferedProtocol may be one), TLS or not.

        The handler returns when that has ended; the connection is closed then.
        """
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the peer is gone")
        self.switched = True
        # First the protocol, then 101: a peer that waits for 101, as it must, never speaks to the HTTP parser again.
        # Then the protocol begins: what it says at once comes behind the 101.
        transport.set_protocol(protocol)
        lines = ("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", f"Upgrade: {self.route.upgrade}", "", "")
        transport.write("\r\n".join(lines).encode())
        protocol.connection_made(transport)
        return transport


class _Connection(web.RequestHandler):
    """aiohttp's protocol of one connection, which tells the gate of its end and words errors as we do."""

    __slots__ = ("_gate", "_told", "key")

    def __init__(
        self, gate: Gate, key: socket.socket, told: Callable[..., None], manager: web.Server, **limits: Any
    ) -> None:
        super().__init__(manager, loop=asyncio.get_running_loop(), **limits)
        self._gate = gate
        self._told = told
        self.key = key

    def connection_lost(self, exc: BaseException | None) -> None:
        self._gate.leave(self.key)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp finds wrong by itself: malformed or oversized heads. They are told nothing else."""
        if status >= 500:
            log.error("a request failed", exc_info=exc)
            return _problem(Refusal(500, "internal", "This node failed; its log says why."))
        self._told("refused", peer=str((self.peername or ("unix",))[0]), status=400, code="malformed")
        return _problem(Refusal(400, "malformed", "That is no HTTP request, or its head is too large."))


class Server:
    """Serves the routes of `policy` until `stop`.

    Args:
        policy: whom it lets in, and the table.
        handlers: one for each route but openapi, by name.
        audit: where refusals and changes are written.
        limits: what strangers can make it spend.
        tell: told a sentence for the user, once, when a node cannot be let in for its certificate.

    Raises:
        ValueError: a route has no handler, or a handler no route.
    """

    def __init__(
        self, policy: Policy, handlers: Mapping[str, Handler], audit: Audit, limits: Limits = DEFAULT_LIMITS,
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> None:  # fmt: skip
        document = _OUT.encode(openapi.document(__version__, policy.routes))

        async def describe(call: Call) -> bytes:
            return document

        self.policy = policy
        self.handlers = {"openapi": describe, **handlers}
        names = {route.name for route in policy.routes}
        if unequal := names ^ {name for name in self.handlers if name in names or name != "openapi"}:
            raise ValueError(f"routes without handler, or handlers without route: {', '.join(sorted(unequal))}")
        self.gate = Gate(limits)
        self._audit = audit
        self._tell = tell
        self._said: set[str] = set()
        self._decoders = {
            route.name: msgspec.json.Decoder(route.request) for route in policy.routes if _has_struct(route)
        }
        self._web = web.Server(self._answer)
        self._derived = True
        self._doors: list[Door] = []
        self._unix: Path | None = None

    # ------------------------------------------------------------------------------------------- doors

    def listen_tcp(self, host: str, port: int, credentials: tls.Credentials | None) -> list[tuple[str, int]]:
        """Listen on every address that `host` means.

        Args:
            credentials: for TLS; None is plain, and allowed on loopback only.

        Returns:
            The addresses, with the port that was taken where 0 was asked for.

        Raises:
            NodeCannotServe: it would be open to others without token and TLS, the port is in use, ...
        """
        if fault := may_listen(host, port, bool(self.policy.bearer), credentials is not None):
            raise NodeCannotServe(fault)
        context = None
        if credentials is not None:
            context, self._derived = tls.server_context(credentials), credentials.derived
        listeners = bind_tcp(host, port)
        self._doors += [
            Door(one, self.gate, self._connection, context, self._audit.write, self._once) for one in listeners
        ]
        return [one.getsockname()[:2] for one in listeners]

    def listen_unix(self, path: Path) -> None:
        """Listen for processes of this user on this host; the token is asked for all the same.

        Raises:
            NodeCannotServe: its directory is open to others, or another node listens there.
        """
        if fault := may_listen("localhost", 0, bool(self.policy.bearer), False):
            raise NodeCannotServe(fault)
        self._doors.append(Door(bind_unix(path), self.gate, self._connection, None, self._audit.write))
        self._unix = path

    def renew(self, credentials: tls.Credentials) -> None:
        """Show another certificate from the next handshake on."""
        for context in {door.context for door in self._doors if door.context is not None}:
            tls.renew(context, credentials)

    async def stop(self, seconds: float = 5.0) -> None:
        """Accept no more, let requests finish for so long, then close every connection; again does nothing."""
        doors, self._doors = self._doors, []
        for door in doors:
            await door.close()
        self._web.pre_shutdown()
        await self._web.shutdown(seconds)
        if self._unix is not None:
            self._unix.unlink(missing_ok=True)
            self._unix = None

    def _connection(self, key: socket.socket) -> _Connection:
        limits = self.gate.limits
        return _Connection(
            self.gate, key, self._audit.write, self._web, access_log=None, auto_decompress=False,
            max_line_size=limits.line, max_field_size=limits.field, max_headers=limits.fields,
            keepalive_timeout=limits.head_seconds, lingering_time=limits.linger_seconds,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------- the one way in

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        headers: dict[str, str] = {}
        for name, value in request.headers.items():
            key = name.lower()
            headers[key] = f"{headers[key]}, {value}" if key in headers else value
        peer = self._peer(request)
        verdict = decide(request.method, request.raw_path, headers, peer, self.policy)
        if isinstance(verdict, Refusal):
            self._told("refused", request, peer, verdict.status, verdict.code)
            return _problem(verdict)
        assert isinstance(request.protocol, _Connection)
        self.gate.prove(request.protocol.key)
        route = verdict.match.route
        response = await self._handled(request, peer, verdict)
        if (route.changes and not route.quiet) or verdict.upgrade:
            self._told("upgraded" if verdict.upgrade else "changed", request, peer, response.status)
        return response

    async def _handled(self, request: web.BaseRequest, peer: Peer, verdict: Allowed) -> web.StreamResponse:
        route = verdict.match.route
        call = Call(route, verdict.match.parameters, peer, verdict.upgrade, None, request)
        try:
            if "Expect" in request.headers:
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0
            if route.name in self._decoders:
                call.body = await self._decoded(call)
            result = await self._run(call)
            if call.switched:
                return web.Response(status=101)  # goes nowhere: the connection was given away, and is closed
            return await self._worded(request, route, result)
        except NodeRefused as error:
            return _problem(Refusal(error.status, error.code, error.sentence))
        except UpipeError as error:  # also what another node did not answer us: an OSError, but not of this connection
            return _problem(Refusal(409, type(error).__name__, str(error)))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("handler %s failed", route.name)
            return _problem(Refusal(500, "internal", "This node failed; its log says why."))

    async def _run(self, call: Call) -> Any:
        protocol, transport = call._request.protocol, call._request.transport
        try:
            return await self.handlers[call.route.name](call)
        finally:
            if call.switched and transport is not None:
                transport.close()
                protocol.connection_lost(None)  # its own protocol hears of the end from the transport, this one from us

    async def _decoded(self, call: Call) -> Any:
        data = bytearray()
        try:
            async with asyncio.timeout(call.route.seconds):
                async for piece in call.pieces():
                    data += piece
            return self._decoders[call.route.name].decode(data)
        except TimeoutError:
            raise refuse(408, "too_slow", f"The body did not come within {call.route.seconds:g} s.") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise refuse(400, "bad_body", f"The body does not fit: {error}.") from None

    async def _worded(self, request: web.BaseRequest, route: Route[Any, Any], result: Any) -> web.StreamResponse:
        if isinstance(result, AsyncIterator):
            return await self._streamed(request, route, result)
        if route.answer is not Bytes and type(result) is not route.answer:
            raise TypeError(f"handler {route.name} returned {type(result).__name__}")
        data = bytes(result or b"") if route.answer is Bytes else _OUT.encode(result)
        return web.Response(body=data, status=route.status, headers={**_HEADERS, "Content-Type": route.media})

    async def _streamed(
        self, request: web.BaseRequest, route: Route[Any, Any], pieces: AsyncIterator[bytes]
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=route.status, headers={**_HEADERS, "Content-Type": route.media})
        await response.prepare(request)
        async for piece in pieces:
            async with asyncio.timeout(route.seconds):
                await response.write(piece)
        return response

    # ------------------------------------------------------------------------------------------- facts

    def _peer(self, request: web.BaseRequest) -> Peer:
        transport = request.transport
        if transport is None:
            return Peer("gone")
        assert isinstance(request.protocol, _Connection)
        raw = request.protocol.key  # the transport's own "socket" cannot be asked for credentials under uvloop
        if raw.family == socket.AF_UNIX:
            return Peer(f"unix:{uid_of(raw)}")
        tls_object = transport.get_extra_info("ssl_object")
        identity = tls.identity_of(tls_object.getpeercert(), self._derived) if tls_object else None
        names = [transport.get_extra_info(one) or ("gone",) for one in ("peername", "sockname")]
        return Peer(str(names[0][0]), str(names[1][0]), tls_object is not None, identity)

    def _once(self, sentence: str) -> None:
        if sentence not in self._said and len(self._said) < MOST_SAID:
            self._said.add(sentence)
            self._tell(sentence)

    def _told(self, event: str, request: web.BaseRequest, peer: Peer, status: int, code: str = "") -> None:
        who = peer.identity.uri if peer.identity else ""
        path = request.raw_path.partition("?")[0]
        self._audit.write(
            event, peer=peer.address, identity=who, method=request.method, path=path, status=status, code=code
        )


def _has_struct(route: Route[Any, Any]) -> bool:
    return route.request is not Bytes and route.request is not type(None)


def _problem(refusal: Refusal) -> web.Response:
    """A refusal closes the connection: what may still come of its body is nothing anybody should read."""
    body = _OUT.encode(Problem(refusal.code, refusal.sentence))
    headers = {**_HEADERS, "Content-Type": "application/json", **dict(refusal.headers)}
    response = web.Response(body=body, status=refusal.status, headers=headers)
    response.force_close()
    return response
