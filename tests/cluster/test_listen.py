"""Where a node listens, and where it refuses to; how many strangers it lets in."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.secure_support import NODE, SECRET, closed, handlers, request, running, status_of
from upipe.cluster import listen, routes, tls
from upipe.cluster.audit import Audit
from upipe.cluster.client import Client, Target
from upipe.cluster.guard import Policy
from upipe.cluster.listen import Door, Gate, Limits, bind_tcp
from upipe.cluster.server import Server
from upipe.errors import NodeCannotServe


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(["admit", "prove", "leave"]), st.integers(0, 5))))
@settings(max_examples=200, deadline=None)
def test_the_gate_never_holds_more_than_its_limits(steps: list[tuple[str, int]]) -> None:
    gate = Gate(Limits(connections=3, unproven=2))
    keys: Any = [object() for _ in range(6)]
    for step, number in steps:
        if step != "admit" or keys[number] not in gate.inside:
            getattr(gate, step)(keys[number])
        assert len(gate.inside) <= 3 and len(gate.unproven) <= 2 and gate.unproven.keys() <= gate.inside


def test_the_gate_turns_away_the_oldest_stranger_and_nobody_who_is_proven() -> None:
    gate = Gate(Limits(connections=3, unproven=2))
    a, b, c, d, e = keys = [socket.socket() for _ in range(5)]
    assert [gate.admit(a), gate.admit(b), gate.admit(c)] == [None, None, a]
    gate.prove(b)
    assert [gate.admit(d), gate.admit(e)] == [None, e]  # full: the newcomer goes
    gate.prove(a)  # it went already
    assert gate.inside == {b, c, d} and set(gate.unproven) == {c, d}
    for key in keys:
        key.close()


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "TLS"])
async def test_idle_strangers_lock_nobody_out(tmp_path: Path, plain: bool) -> None:
    async with running(tmp_path, Limits(unproven=3), plain=plain) as node:
        strangers = [await node.open() for _ in range(5)]
        for reader, _ in strangers[:2]:
            assert await reader.read() == b""  # the oldest had to go
        if plain:
            assert status_of(await node.raw(request("GET", "/v1/node", "Connection: close"))) == 200
        else:
            async with node.client() as client:
                assert (await client.call(routes.NODE)).info.node_id == NODE
        for _, writer in strangers:
            await closed(writer)
        assert "turned_away" in {one["event"] for one in node.audit()}


async def test_a_full_house_takes_nobody_and_keeps_who_is_in(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(connections=1), plain=True) as node:
        reader, writer = await node.open()
        writer.write(request("GET", "/v1/node"))
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        assert await node.raw(b"") == b""
        writer.write(request("GET", "/v1/node", "Connection: close"))
        assert (await reader.read()).count(b"HTTP/1.1 200") == 1  # the first one's head was read above
        await closed(writer)


class Accepts:
    """A listening socket; `then` is called in the tick in which it accepted, and what it accepted is kept."""

    def __init__(self, listener: socket.socket, then: Any) -> None:
        self._listener, self._then = listener, then
        self.accepted: list[socket.socket] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = self._listener.accept()
        self.accepted.append(connection)
        self._then()
        return connection, address


async def test_what_was_accepted_in_the_tick_in_which_the_door_closes_is_closed_too() -> None:
    gate, told = Gate(Limits()), []
    closing: list[asyncio.Task[None]] = []
    listener: Any = Accepts(bind_tcp("127.0.0.1", 0)[0], lambda: closing.append(asyncio.create_task(door.close())))
    door = Door(listener, gate, lambda key: asyncio.Protocol(), None, lambda *event, **facts: told.append(event))
    with socket.create_connection(listener.getsockname()) as stranger:
        async with asyncio.timeout(60):
            while not closing:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await closing[0]
        assert [one.fileno() for one in listener.accepted] == [-1] and not gate.inside and not gate.unproven
        stranger.settimeout(60)
        assert stranger.recv(1) == b""
    await door.close()  # again does nothing
    assert listener.fileno() == -1


async def test_a_door_goes_on_after_a_failure_inside_and_leaves_nothing_of_it() -> None:
    failures = iter([RuntimeError("the audit log is full")])

    def told(event: str, **facts: Any) -> None:
        for failure in failures:
            raise failure

    loop, said = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda loop, context: said.append(context["exception"]))
    listener = bind_tcp("127.0.0.1", 0)[0]
    full = Gate(Limits(connections=0))
    door = Door(listener, full, lambda key: asyncio.Protocol(), None, told)
    try:
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert await asyncio.wait_for(reader.read(), 60) == b""
            await closed(writer)
    finally:
        await door.close()
    assert [str(one) for one in said] == ["the audit log is full"] and not full.inside


async def test_the_socket_is_ours_alone_and_asks_for_the_token_too(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        assert stat.S_IMODE(node.unix.stat().st_mode) == 0o600
        assert stat.S_IMODE(node.unix.parent.stat().st_mode) == 0o700
        async with Client(Target(unix=node.unix), SECRET) as client:
            assert (await client.call(routes.NODE)).info.node_id == NODE
        reader, writer = await asyncio.open_unix_connection(str(node.unix))
        writer.write(request("GET", "/v1/node", token=None))
        assert status_of(await reader.read()) == 401
        await closed(writer)
    assert not node.unix.exists()


async def test_another_user_is_turned_away_at_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as node:
        monkeypatch.setattr(listen, "uid_of", lambda connection: os.geteuid() + 12345)
        reader, writer = await asyncio.open_unix_connection(str(node.unix))
        assert await reader.read() == b""
        await closed(writer)
        assert node.audit()[-1]["code"] == "other_user"


async def test_a_socket_that_a_dead_node_left_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "run" / "node"))
    async with running(tmp_path):
        with pytest.raises(NodeCannotServe, match="another node listens"):
            async with running(tmp_path):
                pass


async def test_a_directory_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(NodeCannotServe, match="chmod 700"):
        async with running(tmp_path):
            pass


# ------------------------------------------------------------------------------------------------- listening


def server(folder: Path, bearer: str = SECRET.bearer) -> Server:
    return Server(Policy(bearer, NODE), handlers(), Audit(folder / "log"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
@pytest.mark.parametrize(("bearer", "said"), [("", "needs a cluster token"), (SECRET.bearer, "needs TLS")])
async def test_open_to_others_without_token_or_tls_refuses_to_start(
    tmp_path: Path, host: str, bearer: str, said: str
) -> None:
    with pytest.raises(NodeCannotServe, match=said):
        server(tmp_path, bearer).listen_tcp(host, 0, None)


async def test_loopback_without_token_refuses_to_start(tmp_path: Path) -> None:
    with pytest.raises(NodeCannotServe, match="on loopback too"):
        server(tmp_path, "").listen_tcp("127.0.0.1", 0, None)
    with pytest.raises(NodeCannotServe, match="on loopback too"):
        server(tmp_path, "").listen_unix(tmp_path / "s")


async def test_a_port_in_use_names_who_uses_it(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        with pytest.raises(
            NodeCannotServe, match=rf"port {node.port} on 127.0.0.1 is in use by process {os.getpid()} .*--port"
        ):
            server(tmp_path).listen_tcp("127.0.0.1", node.port, None)


async def test_an_address_that_is_not_of_here_is_named(tmp_path: Path) -> None:
    credentials = tls.issue(SECRET, tls.Identity("node", NODE))
    with pytest.raises(NodeCannotServe, match=r"192\.0\.2\.1 is no address of this host"):
        server(tmp_path).listen_tcp("192.0.2.1", 0, credentials)
