"""Who holds the token, and says nonsense over a mirror's connection, to a real agent with a real mirror."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from tests.cluster.agent_support import SECRET, until
from tests.cluster.nodes import Nodes, nodes_of
from tests.cluster.test_nodes import chain, functions, lines
from upipe.cluster import routes, tls, wire
from upipe.cluster.client import Client, Target
from upipe.cluster.link import Link
from upipe.cluster.records import (
    DATA,
    HELLO,
    MOST_BODY,
    MOST_DATA,
    SOURCE,
    Hello,
    Record,
    Refusal,
    Resume,
    data_header,
    encode,
    mirror_key,
)
from upipe.errors import ClusterError, NodeRefused
from upipe.memq._ring import fingerprint
from upipe.settings import MIB

T = TypeVar("T")
pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.timeout(240)]


class Ear:
    """An end of a mirror that only listens."""

    def __init__(self, name: str) -> None:
        self.key = mirror_key(name)
        self.said: list[Record] = []

    def connected(self, link: Link) -> None: ...
    def disconnected(self, link: Link) -> None: ...

    def heard(self, link: Link, record: Record) -> None:
        self.said.append(record)

    def turn(self, link: Link) -> bool:
        return False

    def incoming(self, link: Link, position: int, length: int) -> int:
        return length

    def landing(self, most: int) -> memoryview:
        return memoryview(b"")

    def landed(self, count: int) -> None: ...


@asynccontextmanager
async def intruder(nodes: Nodes, identity: tls.Identity, name: str) -> AsyncIterator[tuple[Link, Ear]]:
    """A connection for mirrors to node 1, in the name of another process."""
    host, _, port = nodes.address(1).rpartition(":")
    async with Client(Target(host, int(port), nodes.id(1)), SECRET, tls.issue(SECRET, identity)) as client:
        link, ear = Link(), Ear(name)
        await client.upgrade(routes.MIRROR, link, mirror=nodes.id(0))
        link.add(ear)
        try:
            yield link, ear
        finally:
            link.close()


async def answered(
    nodes: Nodes, identity: tls.Identity, name: str, kind: type[T], hello: Hello, *more: bytes
) -> T:
    """What node 1 says to that hello and what follows it. The true node dials as well, and who dialled last is heard:
    so it is said again until there is an answer."""
    async with asyncio.timeout(60):
        while True:
            async with intruder(nodes, identity, name) as (link, ear):
                link.say(hello)
                with suppress(TimeoutError):
                    if more:
                        await until(lambda: any(isinstance(one, Hello) for one in ear.said), 2)
                    for data in more:
                        link.write(data)
                    await until(lambda: any(isinstance(one, kind) for one in ear.said), 2)
                    [said] = [one for one in ear.said if isinstance(one, kind)]
                    return said


def header(kind: int, length: int, key: int, position: int = 0) -> bytes:
    made = bytearray(data_header(key, position, length))
    made[0] = kind
    return bytes(made)


async def test_nonsense_over_a_mirrors_connection_changes_no_ring(tmp_path: Path) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    async with nodes_of(2, tmp_path) as nodes:
        await nodes.submit(0, chain("n1"), functions(out, 500, gate))
        await until(lambda: len(lines(out)) >= 100)
        found = [one for one in (await nodes.call(1, routes.MIRRORS)).mirrors if one.role == "sink"]
        mirror = next(one for one in found if "numbers" in one.mirror)
        name, key, me = mirror.mirror, mirror_key(mirror.mirror), tls.Identity("node", nodes.id(0))

        async def stands() -> tuple[int, int]:
            one: wire.MirrorInfo = await nodes.call(1, routes.MIRROR, mirror=name)
            return one.head, one.epoch

        before = await stands()
        with pytest.raises(NodeRefused) as refused:
            async with intruder(nodes, tls.Identity("client", "c" * 16), name):
                pass
        assert (refused.value.status, refused.value.code) == (403, "other_node")

        hello = Hello(key, 0, SOURCE, mirror.epoch, MIB, 0, 0, 0, fingerprint()[1], name)
        for nonsense in (
            b"\xff" * 64,  # malformed
            header(99, 0, key),  # of no kind
            header(DATA, MOST_DATA + 1, key),  # too large
            header(HELLO, MOST_BODY + 1, key),
            encode(hello)[:24] + b"\xff" * (len(encode(hello)) - 24),
        ):
            async with intruder(nodes, me, name) as (link, _):
                link.write(nonsense)
                assert await asyncio.wait_for(link.closed, 60)
        async with intruder(nodes, me, name) as (link, _):
            link.write(encode(hello)[:30])  # cut off in the middle

        old = Hello(key, 0, SOURCE, 0, MIB, 0, 0, 0, fingerprint()[1], name)  # of an epoch that is over
        refusal = await answered(nodes, me, name, Refusal, old)
        assert refusal.code == "stale-epoch" and "replaced" in refusal.text and refusal.epoch == 0
        other = Hello(key, 0, SOURCE, mirror.epoch, 4096, 0, 0, 0, fingerprint()[1], name)  # another ring
        refusal = await answered(nodes, me, name, Refusal, other)
        assert refusal.code == "version" and "differ" in refusal.text
        replayed = data_header(key, 0, 128) + bytes(128)  # it has that
        future = data_header(key, before[0] + (1 << 16), 128) + bytes(128)
        resume = await answered(nodes, me, name, Resume, hello, replayed, future)
        assert resume.position >= before[0]
        assert await stands() == before

        gate.touch()
        info = await nodes.ended(0, "chain-1")
        assert info.told.state == "completed", info.told
        assert sorted(lines(out)) == [2 * number for number in range(500)]


async def test_what_another_cluster_says_is_not_heard(tmp_path: Path) -> None:
    async with nodes_of(1, tmp_path) as nodes:
        host, _, port = nodes.address(0).rpartition(":")
        other = type(SECRET)(bytes(32))
        credentials = tls.issue(other, tls.Identity("node", nodes.id(0)))
        async with Client(Target(host, int(port), nodes.id(0)), other, credentials) as client:
            with pytest.raises(ClusterError, match="token"):
                await client.upgrade(routes.MIRROR, Link(), mirror=nodes.id(0))
