"""The client: typed failures with a sentence, deadlines, few retries, and no token for who is not proven."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster.engines import ENGINES, use
from tests.cluster.secure_support import CLIENT, NODE, OTHER, SECRET, STATUS, Echo, Running, running
from upipe.cluster import messages, routes, tls, token, wire
from upipe.cluster.client import Client, Target, told
from upipe.cluster.server import Call, refuse
from upipe.errors import NodeAnswerInvalid, NodeRefused, NodeTimeout, NodeUnproven, NodeUnreachable

NOW = datetime.now(UTC)
PROVEN = tls.Identity("node", NODE)
ONCE = dataclasses.replace(routes.DRAIN_NODE, again=False)


class Recorder(asyncio.Protocol):
    """Keeps whatever is sent to it, and answers with a fixed text."""

    def __init__(self, heard: bytearray, answer: bytes) -> None:
        self.heard, self.answer = heard, answer

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard += data
        if self.answer:
            self.transport.write(self.answer)
            self.transport.close()


@asynccontextmanager
async def imposter(context: ssl.SSLContext | None, answer: bytes = b"") -> AsyncIterator[tuple[int, bytearray]]:
    heard = bytearray()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Recorder(heard, answer), "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1], heard
    finally:
        server.close()
        await server.wait_closed()


def dialling(port: int) -> Client:
    return Client(Target("127.0.0.1", port, NODE), SECRET, tls.issue(SECRET, CLIENT))


def node_of(secret: Any = SECRET, identity: tls.Identity = PROVEN, now: datetime = NOW) -> ssl.SSLContext:
    return tls.server_context(tls.issue(secret, identity, ["127.0.0.1", "localhost"], now))


IMPOSTERS: dict[str, tuple[Callable[[], ssl.SSLContext | None], str]] = {
    "plain": (lambda: None, "does not speak TLS"),
    "another cluster": (lambda: node_of(OTHER), "same token file"),
    "another node of the cluster": (lambda: node_of(identity=tls.Identity("node", "ff" * 8)), "another node"),
    "a client of the cluster": (lambda: node_of(identity=CLIENT), "another node|same token file"),
    "expired": (lambda: node_of(now=NOW - timedelta(days=9)), "expired.*date -u"),
    "not yet valid": (lambda: node_of(now=NOW + timedelta(days=1)), "not valid yet.*date -u"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("upgrade", [False, True], ids=["request", "upgrade"])
@pytest.mark.parametrize(("context", "said"), IMPOSTERS.values(), ids=IMPOSTERS.keys())
async def test_who_is_not_proven_hears_no_token(
    context: Callable[[], ssl.SSLContext | None], said: str, upgrade: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(engine, monkeypatch)
    async with imposter(context(), b"HTTP/1.1 200 OK\r\n\r\n") as (port, heard), dialling(port) as client:
        with pytest.raises(NodeUnproven, match=said):
            await (client.upgrade(routes.MIRROR, Echo(), mirror="m") if upgrade else client.call(routes.NODE))
    assert b"HTTP" not in heard and b"Bearer" not in heard
    assert SECRET.bearer.encode() not in heard


async def test_plain_tcp_is_never_dialled_on_loopback_either() -> None:
    with pytest.raises(ValueError, match="TLS"):
        Client(Target("127.0.0.1", 7420), SECRET)


@pytest.mark.parametrize("host", ["me@evil", "a/b", "a\r\nX: 1", "a?b", "a#b", "a b", "[::1]", "a\\b"])
def test_what_is_no_host_is_never_dialled(host: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        Target(host, 7420)
    with pytest.raises(ValueError, match="no address"):
        Target("localhost", 7420, host)


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_client_shows_its_new_certificate(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(engine, monkeypatch)
    async with running(tmp_path) as node:
        old = tls.issue(SECRET, CLIENT, now=NOW - timedelta(days=9))
        async with Client(Target("127.0.0.1", node.port, NODE), SECRET, old) as client:
            client.renew(tls.issue(SECRET, CLIENT))
            node.server.renew(tls.issue(SECRET, PROVEN))
            assert (await client.call(routes.NODE)).info.node_id == NODE


@pytest.mark.parametrize("then", [NOW - timedelta(days=9), NOW + timedelta(days=1)], ids=["old", "the clock was ahead"])
async def test_who_only_dials_renews_its_certificate_itself(tmp_path: Path, then: datetime) -> None:
    mine = tls.issue(SECRET, CLIENT, now=then)
    async with running(tmp_path) as node, Client(Target("127.0.0.1", node.port, NODE), SECRET, mine) as client:
        assert (await client.call(routes.NODE)).info.node_id == NODE


async def test_a_socket_in_a_directory_of_others_is_not_asked(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    heard = bytearray()
    server = await asyncio.get_running_loop().create_unix_server(lambda: Recorder(heard, b""), str(tmp_path / "node"))
    async with Client(Target(unix=tmp_path / "node"), SECRET) as client:
        with pytest.raises(NodeUnproven, match="chmod 700"):
            await client.call(routes.NODE)
    assert not heard
    server.close()


async def test_a_seed_may_be_any_node_of_the_cluster(tmp_path: Path) -> None:
    async with running(tmp_path) as node, node.client(node="") as client:
        assert (await client.call(routes.NODE)).info.node_id == NODE


async def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    async with (
        imposter(node_of(), b"HTTP/1.1 307 X\r\nLocation: https://evil.example/\r\nContent-Length: 0\r\n\r\n") as (
            port,
            _,
        ),
        dialling(port) as client,
    ):
        with pytest.raises(NodeRefused) as raised:
            await client.call(routes.NODE)
    assert (raised.value.status, raised.value.code) == (307, "unknown")


@pytest.mark.parametrize("answer", [b"[]", b"{", b'{"node": "short"}'])
async def test_an_answer_that_is_none_is_told_so(answer: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer)
    async with imposter(node_of(), head + answer) as (port, _), dialling(port) as client:
        with pytest.raises(NodeAnswerInvalid, match="what is no answer"):
            await client.call(routes.NODE)


async def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(routes.NODE), "most_answer", 1000)
    async with imposter(node_of(), b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000) as (port, _), dialling(port) as client:
        with pytest.raises(NodeAnswerInvalid, match="more than 1,000 bytes"):
            await client.call(routes.NODE)


async def test_silence_ends_at_the_deadline() -> None:
    async with imposter(node_of()) as (port, _), dialling(port) as client:
        with pytest.raises(NodeTimeout, match=f"node {NODE} at 127.0.0.1:{port} did not answer for 0.05 s"):
            await client.call(routes.NODE, seconds=0.05)
        with pytest.raises(NodeTimeout):
            await client.upgrade(routes.MIRROR, Echo(), seconds=0.05, mirror="m")


class Waits:
    """Stands for sleep."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.waited.append(seconds)


@pytest.mark.parametrize(("route", "body", "tries"), [(routes.NODE, None, 3), (ONCE, wire.Stopping(), 1)])
async def test_only_what_may_be_sent_twice_is_tried_again(route: Any, body: Any, tries: int) -> None:
    async with imposter(node_of()) as (port, _):
        pass  # it was there, and is gone
    waits = Waits()
    async with Client(Target("127.0.0.1", port), SECRET, tls.issue(SECRET, CLIENT), waits) as client:
        with pytest.raises(NodeUnreachable, match="nothing listens there"):
            await client.call(route, body)
    assert len(waits.waited) == tries - 1
    assert all(0 <= one <= 0.1 * 2**number for number, one in enumerate(waits.waited))


async def test_a_connection_that_breaks_is_tried_again(tmp_path: Path) -> None:
    calls = 0

    async def flaky(call: Call) -> wire.NodeStatus:
        nonlocal calls
        calls += 1
        if calls < 3:
            transport = call._request.transport
            assert transport is not None
            transport.abort()
        return STATUS

    async with running(tmp_path, node=flaky) as node, node.client(sleep=Waits()) as client:
        assert (await client.call(routes.NODE)).info.node_id == NODE
    assert calls == 3


async def test_a_refusal_arrives_as_it_was_said(tmp_path: Path) -> None:
    async def stale(call: Call) -> None:
        raise refuse(409, "stale_epoch", "The pipe 'p' is at epoch 3; yours is 2.")

    async with running(tmp_path, stop=stale) as node, node.client() as client:
        with pytest.raises(NodeRefused) as raised:
            await client.call(routes.STOP, wire.Stopping(), pipe="p")
    error = raised.value
    assert (error.status, error.code, error.sentence) == (409, "stale_epoch", "The pipe 'p' is at epoch 3; yours is 2.")
    assert f"node {NODE} at 127.0.0.1" in error.where


async def test_a_path_that_cannot_be_is_refused_here(tmp_path: Path) -> None:
    async with Client(Target("127.0.0.1", 1), SECRET, tls.issue(SECRET, CLIENT)) as client:
        for pipe in ("../etc", "a/b", "", "x" * 65, "a?b", "%41"):
            with pytest.raises(ValueError, match="no path"):
                await client.call(routes.PIPE, pipe=pipe)


async def test_our_certificate_refused_by_the_node_is_told_as_a_clock_or_secret(tmp_path: Path) -> None:
    old = tls.issue(SECRET, tls.Identity("node", "bb" * 8), now=NOW - timedelta(days=9))
    async with running(tmp_path) as node:
        async with Client(Target("127.0.0.1", node.port, NODE), SECRET, old) as client:
            with pytest.raises(NodeUnproven, match=r"finds our certificate expired.*date -u"):
                await client.call(routes.NODE)
        async with asyncio.timeout(60):
            while not node.audit() or "certificate has expired" not in node.audit()[-1]["code"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def test_what_the_network_says_is_told_in_a_sentence() -> None:
    refused = aiohttp.ClientConnectorError(None, ConnectionRefusedError(111, "x"))  # type: ignore[arg-type]
    assert "is `upipe-node` running" in str(told("n", refused))
    assert isinstance(told("n", ssl.SSLError(1, "x")), NodeUnproven)
    assert "Network is unreachable" in str(told("n", OSError(101, "Network is unreachable")))
    assert isinstance(told("n", aiohttp.ServerDisconnectedError()), NodeUnreachable)


# ----------------------------------------------------------------------------------------- where the token is not


async def _use(node: Running) -> None:
    async with node.client() as client:
        await client.call(routes.NODE)
        await client.call(routes.STOP, wire.Stopping(), pipe="p")
        with pytest.raises(NodeRefused):
            await client.call(routes.LEAVE, messages.Leave(NODE, 1))


async def test_the_token_is_in_no_log_and_in_no_exception(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)

    async def broken(call: Call) -> None:
        raise RuntimeError(f"{call}")

    async with running(tmp_path, pipes=broken) as node:
        await _use(node)
        async with node.client() as client:
            with pytest.raises(NodeRefused) as raised:
                await client.call(routes.PIPES)
            shown = f"{raised.value!r} {client!r} {vars(client)} {node.server.policy!r}"
    for text in (shown, caplog.text, *(one.read_text() for one in (tmp_path / "audit").iterdir())):
        assert SECRET.bearer not in text and SECRET.text().split(".")[1] not in text


LOOKER = """
import os
from pathlib import Path
from upipe.cluster import tls, token
secret = token.load()
tls.server_context(tls.issue(secret, tls.Identity("node", "aa" * 8)))
seen = b"".join(Path("/proc/self", name).read_bytes() for name in ("cmdline", "environ")) + repr(os.environ).encode()
assert secret.bearer.encode() not in seen and secret.text().split(".")[1].encode() not in seen
assert token.VARIABLE in os.environ and token.VARIABLE not in token.without_token(os.environ)
print("clean")
"""


@pytest.mark.slow
def test_the_token_is_in_no_process_list_and_no_environment(tmp_path: Path) -> None:
    token.create(tmp_path / "t")
    environment = {**os.environ, token.VARIABLE: str(tmp_path / "t"), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", LOOKER], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "clean\n", done.stderr
