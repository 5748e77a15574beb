"""A real server: every route is closed without the token and answers with it, and what strangers send is bounded."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.cluster.secure_support import (
    ANSWERS,
    BODIES,
    NODE,
    PARAMETERS,
    SECRET,
    Echo,
    handlers,
    problem_of,
    request,
    running,
    status_of,
)
from upipe.cluster import routes, tls
from upipe.cluster.audit import Audit
from upipe.cluster.client import Client, Target
from upipe.cluster.guard import Policy
from upipe.cluster.listen import Limits
from upipe.cluster.routes import Bytes
from upipe.cluster.server import Call, Server
from upipe.errors import NodeRefused

METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS", "TRACE")
PATHS = sorted({route.path.format_map(PARAMETERS) for route in routes.ROUTES} | {"/", "/v1/nothing", "/../etc/passwd"})
CREDENTIALS = {
    "none": (),
    "wrong": (f"Authorization: Bearer {'A' * len(SECRET.bearer)}",),
    "truncated": (f"Authorization: Bearer {SECRET.bearer[:-1]}",),
    "longer": (f"Authorization: Bearer {SECRET.bearer}x",),
    "empty": ("Authorization: Bearer ",),
    "wrong scheme": (f"Authorization: Basic {SECRET.bearer}",),
    "no scheme": (f"Authorization: {SECRET.bearer}",),
    "twice": (f"Authorization: Bearer {SECRET.bearer}", "Authorization: Bearer x"),
    "not ascii": ("Authorization: Bearer \udcff\udcfe",),
    "elsewhere": (f"Cookie: token={SECRET.bearer}", f"X-Token: {SECRET.bearer}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("shown", CREDENTIALS.values(), ids=CREDENTIALS.keys())
async def test_every_path_and_method_without_the_token_is_the_same_401(tmp_path: Path, shown: tuple[str, ...]) -> None:
    seen: set[bytes] = set()
    async with running(tmp_path, plain=True) as node:
        for path in PATHS:
            for method in METHODS:
                answer = await node.raw(request(method, path, *shown, token=None))
                assert status_of(answer) == 401, (method, path)
                if method != "HEAD":
                    assert problem_of(answer).code == "unauthorized"
                    seen.add(answer.partition(b"Date:")[0] + answer.partition(b"\r\n\r\n")[2])
        assert len(seen) == 1  # nothing can be told from it
        assert {one["code"] for one in node.audit()} == {"unauthorized"}


FOREIGN = {
    "another host": ("evil.example", ()),
    "another host and port": ("evil.example:7420", ()),
    "an address that is not ours": ("10.9.8.7", ()),
    "a host that looks like ours": ("localhost.evil.example", ()),
    "user information": ("localhost@evil.example", ()),
    "no host": ("", ()),
    "another origin": ("localhost", ("Origin: https://evil.example",)),
    "the null origin": ("localhost", ("Origin: null",)),
    "another port's origin": ("localhost:7420", ("Origin: http://localhost:80",)),
    "another scheme's origin": ("localhost", ("Origin: https://localhost",)),
    "a cross-site fetch": ("localhost", ("Sec-Fetch-Site: cross-site",)),
    "a same-site fetch": ("localhost", ("Sec-Fetch-Site: same-site",)),
}
WEBSOCKET = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
MIRROR = ("Connection: Upgrade", "Upgrade: upipe-mirror/1")


@pytest.mark.slow
@pytest.mark.parametrize(("host", "headers"), FOREIGN.values(), ids=FOREIGN.keys())
async def test_a_foreign_page_is_403_on_every_verb_and_upgrade_even_with_the_token(
    tmp_path: Path, host: str, headers: tuple[str, ...]
) -> None:
    async with running(tmp_path, plain=True) as node:
        for method in METHODS:
            for path in ("/v1/node", "/v1/pipes", "/v1/nothing"):
                answer = await node.raw(request(method, path, *headers, host=host))
                assert status_of(answer) == 403, (method, path)
        for upgrade in (WEBSOCKET, MIRROR):
            answer = await node.raw(request("GET", "/v1/mirrors/m", *headers, *upgrade, host=host))
            assert status_of(answer) == 403
            assert b"Access-Control" not in answer
        assert all(one["code"].startswith("foreign_") for one in node.audit())


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9999", "127.0.0.1:1", "[::1]:1", f"{NODE}.{tls.DOMAIN}", "LOCALHOST"]
)
async def test_our_own_names_pages_and_typed_addresses_are_let_in(tmp_path: Path, host: str) -> None:
    headers = (f"Origin: http://{host}", "Sec-Fetch-Site: same-origin", "Connection: close")
    async with running(tmp_path, plain=True) as node:
        assert status_of(await node.raw(request("GET", "/v1/node", *headers, host=host))) == 200
        answer = await node.raw(request("GET", "/v1/node", "Sec-Fetch-Site: none", "Connection: close", host=host))
        assert status_of(answer) == 200


async def test_every_route_answers_its_own_type_over_tls_to_a_node(tmp_path: Path) -> None:
    async with running(tmp_path) as node, node.client(identity=tls.Identity("node", "0" * 16)) as client:
        for route in routes.ROUTES:
            parameters = {name: PARAMETERS[name] for name in route.names}
            if route is routes.PUT_CODE:
                digest = hashlib.sha256(b"code").hexdigest()
                assert (await client.upload(routes.PUT_CODE, b"code", sha256=digest)).size == 4
            elif route.answer is Bytes:
                data = await client.fetch(route, **parameters)
                assert data == b"" if route.method == "HEAD" else data
            else:
                assert await client.call(route, BODIES.get(route.request), **parameters) == ANSWERS[route.answer]
        changes = [one["path"] for one in node.audit() if one["event"] == "changed"]
    assert len(changes) == sum(route.changes and not route.quiet for route in routes.ROUTES)


async def test_content_of_another_hash_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as node, node.client() as client:
        with pytest.raises(NodeRefused) as raised:
            await client.upload(routes.PUT_CODE, b"code", sha256="ab" * 32)
        assert (raised.value.status, raised.value.code) == (400, "other_content")


@pytest.mark.parametrize("route", [one for one in routes.ROUTES if one.node_only], ids=lambda one: one.name)
async def test_routes_between_nodes_are_closed_to_clients_and_browsers(tmp_path: Path, route: Any) -> None:
    parameters = {name: PARAMETERS[name] for name in route.names}
    async with running(tmp_path) as node, node.client() as client:
        with pytest.raises(NodeRefused) as raised:
            await client.call(route, BODIES[route.request], **parameters)
        assert (raised.value.status, raised.value.code) == (403, "node_needed")
        async with Client(Target(unix=node.unix), SECRET) as local:
            with pytest.raises(NodeRefused) as raised:
                await local.call(route, BODIES[route.request], **parameters)
        assert raised.value.code == "certificate_needed"


def heads(count: int, size: int) -> tuple[str, ...]:
    return tuple(f"X-{number}: {'x' * size}" for number in range(count))


BOMB = gzip.compress(bytes(1 << 20))
JSON = "Content-Type: application/json"
BAD = {
    "two hosts": (request("GET", "/v1/node", "Host: evil.example"), 400, "malformed"),
    "huge header": (request("GET", "/v1/node", *heads(1, 5000)), 400, "malformed"),
    "many headers": (request("GET", "/v1/node", *heads(60, 10)), 400, "malformed"),
    "long path": (request("GET", "/v1/" + "x" * 3000), 400, "malformed"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "malformed"),
    "huge body announced": (request("POST", "/v1/pipes", JSON, "Content-Length: 99999999999"), 413, "too_large"),
    "absurd length": (request("POST", "/v1/pipes", JSON, f"Content-Length: {10**30}"), 400, ""),
    "negative length": (request("POST", "/v1/pipes", JSON, "Content-Length: -1"), 400, ""),
    "two framings": (
        request("POST", "/v1/pipes", JSON, "Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        400, "",
    ),
    "bad chunks": (request("POST", "/v1/pipes", JSON, "Transfer-Encoding: chunked", body=b"zz\r\n"), 400, ""),
    "gzip bomb": (
        request("POST", "/v1/pipes", JSON, "Content-Encoding: gzip", f"Content-Length: {len(BOMB)}", body=BOMB),
        415, "compressed",
    ),
    "a form": (
        request("POST", "/v1/pipes", "Content-Type: text/plain", "Content-Length: 2", body=b"{}"), 415, "wrong_type"
    ),
    "no JSON": (request("POST", "/v1/pipes", JSON, "Content-Length: 2", body=b"{]"), 400, "bad_body"),
    "not UTF-8": (request("POST", "/v1/pipes", JSON, "Content-Length: 12", body=b'{"name":"\xff"}'), 400, "bad_body"),
    "deep JSON": (request("POST", "/v1/pipes", JSON, "Content-Length: 50000", body=b"[" * 50000), 400, "bad_body"),
    "deep in a field": (
        request("POST", "/v1/pipes", JSON, "Content-Length: 50008", body=b'{"spec":' + b"[" * 50000), 400, "bad_body"
    ),
    "a field of another type": (
        request("POST", "/v1/pipes", JSON, "Content-Length: 10", body=b'{"name":1}'), 400, "bad_body"
    ),
    "a body where none is": (request("GET", "/v1/node", "Content-Length: 2", body=b"{}"), 400, "unwanted_body"),
    "no such path": (request("GET", "/v1/nothing"), 404, "no_such_path"),
    "escaped path": (request("GET", "/v1/%6eode"), 404, "no_such_path"),
    "no such method": (request("DELETE", "/v1/node"), 405, "no_such_method"),
    "another upgrade": (request("GET", "/v1/mirrors/m", *WEBSOCKET), 400, "no_such_upgrade"),
    "half an upgrade": (request("GET", "/v1/mirrors/m", "Upgrade: upipe-mirror/1"), 400, "half_an_upgrade"),
    "upgrade without certificate": (request("GET", "/v1/mirrors/m", *MIRROR), 403, "certificate_needed"),
    "other expectation": (request("POST", "/v1/pipes", JSON, "Expect: tea", "Content-Length: 2"), 417, "expectation"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "status", "code"), BAD.values(), ids=BAD.keys())
async def test_bad_requests_get_a_status_a_code_and_a_sentence(
    tmp_path: Path, data: bytes, status: int, code: str
) -> None:
    async with running(tmp_path, plain=True) as node:
        answer = await node.raw(data)
        assert status_of(answer) == status, answer
        problem = problem_of(answer)
        assert problem.code == code or not code
        assert problem.sentence.endswith(".")
        answer = await node.raw(request("GET", "/v1/node", "Connection: close"))
        assert status_of(answer) == 200


async def test_a_body_that_grows_beyond_its_bound_is_cut_off(tmp_path: Path) -> None:
    async with running(tmp_path, plain=True) as node:
        most = routes.STOP.most
        chunk = b"%x\r\n%s\r\n" % (most, b" " * most)
        head = request("POST", "/v1/pipes/p/stop", JSON, "Transfer-Encoding: chunked")
        answer = await node.raw(head + chunk + b"1\r\n \r\n")
        assert (status_of(answer), problem_of(answer).code) == (413, "too_large")


async def test_100_continue_comes_only_after_the_guard(tmp_path: Path) -> None:
    expect = ("Expect: 100-continue", JSON, "Content-Length: 2", "Connection: close")
    async with running(tmp_path, plain=True) as node:
        answer = await node.raw(request("POST", "/v1/pipes/p/stop", *expect, token="no"))
        assert status_of(answer) == 401
        answer = await node.raw(request("POST", "/v1/pipes/p/stop", *expect, body=b"{}"))
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


@pytest.mark.parametrize("data", [b"", b"GET /v1/node HTT", b"GET /v1/node HTTP/1.1\r\nHost: localhost\r\nX: "])
async def test_a_slow_head_is_cut_off(tmp_path: Path, data: bytes) -> None:
    async with running(tmp_path, Limits(head_seconds=0.05), plain=True) as node:
        assert await node.raw(data) == b""


async def test_a_slow_handshake_is_cut_off(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(handshake_seconds=0.05)) as node:
        assert await node.raw(b"\x16") == b""
        assert [one["event"] for one in node.audit()] == ["handshake"]
        assert not node.server.gate.inside


async def test_a_slow_body_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(routes.STOP), "seconds", 0.05)
    async with running(tmp_path, plain=True) as node:
        answer = await node.raw(request("POST", "/v1/pipes/p/stop", JSON, "Content-Length: 2", body=b"{"))
        assert (status_of(answer), problem_of(answer).code) == (408, "too_slow")


# ------------------------------------------------------------------------------------------------- handlers


def test_a_route_without_handler_or_a_handler_without_route_fails_at_start(tmp_path: Path) -> None:
    some = handlers()
    del some["stop"]
    with Audit(tmp_path / "log") as audit:
        with pytest.raises(ValueError, match="stop"):
            Server(Policy("t"), some, audit)
        with pytest.raises(ValueError, match="extra"):
            Server(Policy("t"), handlers(extra=some["node"]), audit)


async def test_a_handler_that_fails_tells_the_peer_nothing_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(call: Call) -> None:
        raise RuntimeError("the inner life of a node")

    async with running(tmp_path, plain=True, node=broken) as node:
        answer = await node.raw(request("GET", "/v1/node"))
    assert (status_of(answer), problem_of(answer).code) == (500, "internal")
    assert b"inner life" not in answer
    assert "inner life" in caplog.text


async def test_an_answer_is_streamed_as_it_comes(tmp_path: Path) -> None:
    more = asyncio.Event()

    async def logs(call: Call) -> Any:
        async def lines() -> Any:
            yield b"one\n"
            await more.wait()
            yield b"two\n"

        return lines()

    async with running(tmp_path, logs=logs) as node, node.client() as client:
        stream = client.stream(routes.LOGS, job="j1")
        assert await anext(stream) == b"one\n"
        more.set()
        assert [piece async for piece in stream] == [b"two\n"]


def ending(server: Server) -> asyncio.Event:
    """Set when the server has dealt with its next request, to the end."""
    ended, answer = asyncio.Event(), server._web.request_handler

    async def watched(request: Any) -> Any:
        try:
            return await answer(request)
        finally:
            ended.set()

    server._web.request_handler = watched
    return ended


class Hearing(asyncio.BufferedProtocol):
    """A mirror's end, as it receives into memory of its own."""

    def __init__(self) -> None:
        self.memory = bytearray(8)
        self.heard = bytearray()
        self.news = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.memory

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += self.memory[:nbytes]
        self.news.set()

    async def until(self, text: bytes) -> None:
        while bytes(self.heard) != text:
            self.news.clear()
            await self.news.wait()


@pytest.mark.parametrize("protocol", [Hearing])
async def test_a_connection_is_upgraded_over_tls_and_ends_without_a_trace(
    tmp_path: Path, protocol: type[Hearing]
) -> None:
    async with running(tmp_path) as node, node.client() as client:
        ours = protocol()
        left = ending(node.server)
        transport = await client.upgrade(routes.MIRROR, ours, mirror="m")
        await ours.until(b"hello")
        transport.write(b"and a mirror's bytes")
        await ours.until(b"helloAND A MIRROR'S BYTES")
        assert len(node.server.gate.inside) == 1
        transport.abort()
        await left.wait()
        assert not node.server.gate.inside
        assert node.audit()[-1]["event"] == "upgraded"


async def test_an_upgrade_that_is_refused_says_why(tmp_path: Path) -> None:
    async with running(tmp_path) as node, node.client() as client:
        client._secret = type(SECRET)(bytes(32))
        with pytest.raises(NodeRefused) as raised:
            await client.upgrade(routes.MIRROR, Echo(), mirror="m")
        assert raised.value.code == "unauthorized"


async def test_stopping_twice_does_no_harm_and_ends_upgraded_connections(tmp_path: Path) -> None:
    async with running(tmp_path) as node, node.client() as client:
        echo = Echo()
        await client.upgrade(routes.MIRROR, echo, mirror="m")
        await node.server.stop(0.05)
        await node.server.stop()
        await echo.lost.wait()


def test_all_of_it_runs_on_uvloop_too(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as node, node.client() as client:
            assert (await client.call(routes.NODE)).info.node_id == NODE
            async with Client(Target(unix=node.unix), SECRET) as local:
                assert (await local.call(routes.NODE)).info.node_id == NODE
            ours = Hearing()
            transport = await client.upgrade(routes.MIRROR, ours, mirror="m")
            transport.write(b"bytes")
            await ours.until(b"helloBYTES")
            transport.close()

    uvloop.run(use())
