"""From HTTP to a link: Client.upgrade() at one end, Call.switch() at the other, and mirrors flow over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.cluster.engines import ENGINES, use
from tests.cluster.linking import server
from tests.cluster.secure_support import NODE, Running, running
from tests.cluster.test_mirror import Pair, balanced, emit, everything, mixed, same, until
from upipe.cluster import routes, tls
from upipe.cluster.inlet import GATHERED, TlsRecords
from upipe.cluster.lines import Lines
from upipe.cluster.link import Link
from upipe.cluster.opening import Opening, feed
from upipe.cluster.records import HEADER_BYTES, Hello, Ping, Pong, data_header, encode, mirror_key
from upipe.cluster.server import Call

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def event_loop_policy(request: Any) -> asyncio.AbstractEventLoopPolicy:
    return asyncio.DefaultEventLoopPolicy() if request.param == "asyncio" else uvloop.EventLoopPolicy()


@contextlib.asynccontextmanager
async def linking(folder: Path, joined: Callable[[Link], None]) -> AsyncIterator[Running]:
    """A node whose handler gives each connection to a link."""

    async def mirror(call: Call) -> None:
        link = Link()
        call.switch(link)
        joined(link)
        await link.over()

    async with running(folder, mirror=mirror) as node:
        yield node


async def dial(node: Running) -> Link:
    link = Link()
    async with node.client() as client:
        await client.upgrade(routes.MIRROR, link, mirror="links")
    return link


@pytest.mark.parametrize("accepts", ["sink", "source"])
async def test_a_mirror_flows_over_an_upgraded_connection_whoever_dialled(tmp_path: Path, accepts: str) -> None:
    pair, values = Pair(1 << 18), mixed(1500)
    copy = pair.fresh_copy()
    ends = {"sink": pair.mirror_sink(), "source": pair.mirror_source()}
    far = ends.pop(accepts)
    async with linking(tmp_path, lambda link: link.add(far)) as node:
        link = await dial(node)
        link.add(*ends.values())
        _, found = await asyncio.gather(emit(pair, values), everything(copy))
        await pair.done.wait()
        assert same(found, values)
        assert balanced(pair)
        link.close()
    pair.close()


@pytest.mark.parametrize("engine", ENGINES)
async def test_frames_of_more_than_a_chunk_and_small_ones_between_them_arrive_over_tls(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(engine, monkeypatch)
    pair, values = Pair(8 << 20), [value for n in range(6) for value in (bytes((n,)) * (n * 600_000 + 1), n, "x" * n)]
    copy = pair.fresh_copy()
    async with linking(tmp_path, lambda link: link.add(pair.mirror_sink())) as node:
        link = await dial(node)
        link.add(pair.mirror_source())
        _, found = await asyncio.gather(emit(pair, values), everything(copy))
        await pair.done.wait()
        assert same(found, values)
        assert balanced(pair)
        link.close()
    pair.close()


@pytest.mark.parametrize("engine", ENGINES)
async def test_the_end_is_heard_when_it_comes_right_behind_a_record(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(engine, monkeypatch)
    accepted: list[Link] = []
    async with linking(tmp_path, accepted.append) as node:
        link = await dial(node)
        heard = accepted[0].heard
        link.say(Ping(1))
        assert link._transport is not None
        link._transport.close()
        assert await asyncio.wait_for(accepted[0].over(), 60) == "the other end closed it"
        assert accepted[0].heard == heard + len(encode(Ping(1)))


async def test_what_came_with_the_101_is_heard_before_what_tls_holds_behind_it() -> None:
    behind, heard = [encode(Ping(2))], []

    class Held(TlsRecords):
        def __init__(self) -> None:
            pass

        def take(self, buffer: memoryview) -> int:
            data = behind.pop() if behind else b""
            buffer[: len(data)] = data
            return len(data)

    class Wire(asyncio.Transport):
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return Held.__new__(Held) if name == "ssl_object" else default

        def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
            pass

        def is_closing(self) -> bool:
            return False

        def write(self, data: Any) -> None:
            heard.append(bytes(data))

    link = Link()
    link.connection_made(Wire())
    link.get_buffer(-1)
    link._asked = HEADER_BYTES  # the room is as large as what comes
    head = encode(Ping(1))
    link._scratch[:HEADER_BYTES] = head
    link.buffer_updated(HEADER_BYTES)
    assert heard == [encode(Pong(1))]
    await asyncio.sleep(0)
    link.get_buffer(-1)
    link._asked = HEADER_BYTES
    link._scratch[:HEADER_BYTES] = head
    link.buffer_updated(HEADER_BYTES)
    assert heard == [encode(Pong(1)), encode(Pong(1)), encode(Pong(2))]
    link.connection_lost(None)


async def test_both_ends_learn_of_the_end_once_and_the_node_forgets_the_connection(tmp_path: Path) -> None:
    accepted: list[Link] = []
    async with linking(tmp_path, accepted.append) as node:
        for closes_here in (True, False):
            link = await dial(node)
            far = accepted.pop()
            assert len(node.server.gate.inside) == 1
            lost: list[str] = []
            for one in (link, far):
                one.closed.add_done_callback(lambda done, told=lost: told.append(done.result()))
            (link if closes_here else far).close("enough")
            await asyncio.gather(link.over(), far.over())
            await asyncio.sleep(0)
            assert lost.count("enough") == 1 and len(lost) == 2
            await until(lambda: not node.server.gate.inside)


async def test_a_stopping_node_ends_its_links_and_their_mirrors_hear_it(tmp_path: Path) -> None:
    pair, accepted = Pair(), []
    pair.fresh_copy()
    far = pair.mirror_source()
    async with linking(tmp_path, lambda link: (accepted.append(link), link.add(far))[0]) as node:
        link = await dial(node)
        link.add(pair.mirror_sink())
        await until(lambda: far.machine.link is not None)
        await node.server.stop(0.01)
        await asyncio.gather(link.over(), accepted[0].over())
        assert far.machine.link is None
        assert far.state == "cut"
    pair.close()


async def test_what_came_with_the_101_is_heard() -> None:
    link, said = Link(), Ping(7)
    answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: upipe-mirror/1\r\n\r\n"
    hello = Hello(mirror_key("m"), 0, 1, 1, 64, 0, 0, 0, 1, "m")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer + encode(hello) + encode(said))
        assert (await reader.readexactly(24))[0] == encode(said)[0] + 1  # a Pong
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    _, opening = await loop.create_connection(lambda: Opening(b"GET\r\n\r\n", link, "it"), "127.0.0.1", port)
    await opening.done
    assert await link.over() == "the other end closed it"
    assert link.heard == len(encode(hello) + encode(said))
    server.close()


async def test_who_stops_waiting_for_a_link_does_it_no_harm() -> None:
    link = Link()
    waiting = asyncio.create_task(link.over())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert not link.closed.done()
    link.connection_lost(None)
    link.connection_lost(OSError("again"))
    assert link.closed.result() == "the other end closed it"


async def test_lines_of_two_processes_meet_over_the_guard_which_proves_who_dialled(tmp_path: Path) -> None:
    pair, values = Pair(1 << 18), mixed(800)
    copy = pair.fresh_copy()
    here, there = "0" * 16, NODE
    accepting = Lines(there, lambda peer, link: asyncio.sleep(0))

    async def mirror(call: Call) -> None:
        assert call.peer.identity is not None
        link = Link()
        call.switch(link)
        accepting.accepted(call.peer.identity.id, link)
        await link.over()

    async with running(tmp_path, mirror=mirror) as node:

        async def dial_node(peer: str, link: Link) -> None:
            async with node.client(identity=tls.Identity("node", here), node=peer) as client:
                await client.upgrade(routes.MIRROR, link, mirror="links")

        dialling = Lines(here, dial_node)
        accepting.carry(pair.mirror_sink(), here, dials=False)
        dialling.carry(pair.mirror_source(), there, dials=True)
        _, found = await asyncio.gather(emit(pair, values), everything(copy))
        await pair.done.wait()
        assert same(found, values)
        dialling.close()
        accepting.close()
    pair.close()


async def test_greetings_are_remembered_up_to_a_bound_and_the_oldest_of_nobody_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("upipe.cluster.link.MOST_HELLOS", 3)
    link, heard = Link(), []

    class End:
        def __init__(self, name: str) -> None:
            self.key = mirror_key(name)

        def connected(self, link: Link) -> None:
            pass

        disconnected = connected

        def heard(self, link: Link, record: Any) -> None:
            heard.append(record.id)

    def greeted(*names: str) -> None:
        for name in names:
            feed(link, encode(Hello(mirror_key(name), 0, 1, 1, 64, 0, 0, 0, 1, name)))

    greeted("a", "b", "c", "a", "d")
    for name in "abcd":
        link.add(End(name))  # type: ignore[arg-type]
    assert heard == ["a", "c", "d"]
    greeted("e")
    assert link._why.startswith("the other end names more than 3 mirrors")
    link.connection_lost(None)


class Landing:
    """An endpoint that takes whatever comes."""

    key = mirror_key("m")

    def __init__(self) -> None:
        self.room = memoryview(bytearray(1 << 20))
        self.came = 0

    def connected(self, link: Link) -> None:
        pass

    disconnected = connected

    def incoming(self, link: Link, position: int, length: int) -> int:
        return 0

    def landing(self, most: int) -> memoryview:
        return self.room[:most]

    def landed(self, count: int) -> None:
        self.came += count


@pytest.mark.parametrize("then", ["it is silent", "nobody wants the rest"])
async def test_what_the_kernel_gathers_of_a_record_is_heard_though_the_rest_does_not_come(
    monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    monkeypatch.setattr("upipe.cluster.inlet.SWIFT", 30.0)  # the machine may be slow, the sender is not
    silent = then == "it is silent"
    monkeypatch.setattr("upipe.cluster.pulse.QUIET", 0.1 if silent else 60.0)
    end, links = Landing(), list[Link]()
    async with server(links.append) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await until(lambda: links)
        link = links[0]
        link.add(end)  # type: ignore[arg-type]
        whole, some, more = bytes(1 << 20), bytes(200_000), bytes(50_000)
        writer.write(data_header(end.key, 0, len(whole)) + whole)
        await until(lambda: end.came == len(whole))
        writer.write(data_header(end.key, 1 << 20, len(whole)) + some)
        await until(lambda: end.came == len(whole + some))
        connection = link._transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == GATHERED
        if silent:
            writer.write(more)
            await until(lambda: end.came == len(whole + some + more))
        else:
            link.remove(end)  # type: ignore[arg-type]
            writer.write(whole[len(some) :] + encode(Ping(5)))
            async with asyncio.timeout(60):
                assert await reader.readexactly(HEADER_BYTES) == encode(Pong(5))
        writer.close()
        await link.over()
