"""One link per peer: who dials, pauses, replacing, dropping, forgetting; mirrors stand in as small fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.cluster.linking import dial, server
from tests.cluster.test_mirror import until
from upipe.cluster import lines as module
from upipe.cluster.lines import Lines
from upipe.cluster.link import Link
from upipe.cluster.pulse import BackoffPolicy
from upipe.cluster.records import Hello, Record, mirror_key
from upipe.errors import NodeUnreachable

PEER = "peer"
pytestmark = pytest.mark.timeout(120)


class Fake:
    """A mirror that says hello on every link and keeps what happens to it."""

    def __init__(self, name: str = "m") -> None:
        self.name, self.key = name, mirror_key(name)
        self.links: list[Link] = []
        self.was: list[str] = []

    def connected(self, link: Link) -> None:
        self.links.append(link)
        self.was.append("connected")
        link.say(Hello(self.key, 0, 1, 1, 64, 0, 0, 0, 1, self.name))

    def disconnected(self, link: Link) -> None:
        self.links.remove(link)
        self.was.append("disconnected")

    def heard(self, link: Link, record: Record) -> None:
        self.was.append("heard")

    def turn(self, link: Link) -> bool:
        return False


class Peer:
    """Another node, which accepts unless it is told to refuse."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.error: Exception | None = None
        self.dials = 0
        self.mirror = Fake()

    def joined(self, link: Link) -> None:
        self.links.append(link)
        link.add(self.mirror)  # type: ignore[arg-type]

    async def dial(self, peer: str, link: Link) -> None:
        assert peer == PEER
        self.dials += 1
        if self.error is not None:
            raise self.error
        await dial(self.port, link)


@pytest.fixture
async def peer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Peer]:
    quick = BackoffPolicy(first=0.001, most=0.01)
    monkeypatch.setattr(module, "Backoff", lambda chance: module_backoff(chance, quick))
    monkeypatch.setattr(module, "IDLE", 0.01)
    made = Peer()
    async with server(made.joined) as made.port:
        yield made


module_backoff = module.Backoff


@pytest.fixture
async def lines(peer: Peer) -> AsyncIterator[Lines]:
    said: list[str] = []
    made = Lines("me", peer.dial, said.append)
    made.said = said  # type: ignore[attr-defined]
    yield made
    made.close()
    made.close()


def carry(lines: Lines, mirror: Any, dials: bool = True) -> None:
    lines.carry(mirror, PEER, dials)


async def test_the_first_mirror_dials_and_the_others_share_its_link(peer: Peer, lines: Lines) -> None:
    first, second = Fake("m"), Fake("n")
    carry(lines, first)
    carry(lines, second)
    await until(lambda: "heard" in first.was and second.links)
    assert peer.dials == 1
    assert first.links == second.links


async def test_who_does_not_dial_waits_to_be_dialled_and_a_newer_link_replaces_the_older(
    peer: Peer, lines: Lines
) -> None:
    mirror = Fake()
    carry(lines, mirror, dials=False)
    old, new = Link(), Link()
    await dial(peer.port, old)
    lines.accepted(PEER, old)
    assert mirror.links == [old]
    await dial(peer.port, new)
    lines.accepted(PEER, new)
    assert await old.over() == "replaced by a newer connection"
    assert mirror.links == [new]
    assert peer.dials == 0


async def test_a_link_that_came_first_carries_mirrors_that_come_later(peer: Peer, lines: Lines) -> None:
    link = Link()
    await dial(peer.port, link)
    lines.accepted(PEER, link)
    mirror = Fake()
    carry(lines, mirror, dials=True)
    await until(lambda: "heard" in mirror.was)
    assert peer.dials == 0


async def test_a_broken_link_is_dialled_again_while_mirrors_need_it(peer: Peer, lines: Lines) -> None:
    mirror = Fake()
    carry(lines, mirror)
    for number in range(1, 4):
        await until(lambda number=number: mirror.was.count("heard") == number)
        peer.links[-1].close()
        await until(lambda number=number: mirror.was.count("disconnected") == number)
    await until(lambda: mirror.links)
    lines.drop(mirror)  # type: ignore[arg-type]
    lines.drop(mirror)  # type: ignore[arg-type]
    dials = peer.dials
    await peer.links[-1].over()  # the last one gone, the link goes after a while
    assert lines._lines == {}
    assert peer.dials == dials


@pytest.mark.parametrize("error", [NodeUnreachable("nobody"), ConnectionResetError("cut"), RuntimeError("a bug")])
async def test_a_peer_that_cannot_be_reached_is_told_once_and_dialled_again(
    peer: Peer, lines: Any, error: Exception
) -> None:
    peer.error = error
    mirror = Fake()
    carry(lines, mirror)
    await until(lambda: peer.dials > 5)
    assert len(lines.said) == 1 and str(error) in lines.said[0]
    peer.error = None
    await until(lambda: mirror.links)
    assert lines.said[1:] == ["node peer is connected again"]


async def test_a_peer_that_accepts_and_says_nothing_is_not_dialled_ever_faster(peer: Peer, lines: Lines) -> None:
    peer.mirror.connected = lambda link: link.close()  # type: ignore[method-assign]
    peer.mirror.disconnected = lambda link: None  # type: ignore[method-assign]
    carry(lines, Fake())
    line = lines._lines[PEER]
    await until(lambda: peer.dials > 8)
    assert line._backoff._failures >= 4


async def test_a_dead_peer_is_cut_now_and_dialled_while_mirrors_need_it(peer: Peer, lines: Lines) -> None:
    mirror, dropped = Fake("m"), Fake("n")
    carry(lines, mirror)
    await until(lambda: mirror.links)
    link = mirror.links[0]
    lines.forget(PEER)
    lines.forget("nobody")
    assert await link.over() == "node peer is dead"
    await until(lambda: mirror.links and mirror.links[0] is not link)
    lines.drop(mirror)  # type: ignore[arg-type]
    lines.drop(dropped)  # type: ignore[arg-type]
    dials = peer.dials
    lines.forget(PEER)
    await until(lambda: not lines._lines)
    assert peer.dials == dials


async def test_a_dial_that_hangs_ends(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIAL_SECONDS", 0.01)
    tries: list[Link] = []

    async def hang(_: str, link: Link) -> None:
        tries.append(link)
        if len(tries) < 3:
            await asyncio.Event().wait()
        await dial(peer.port, link)

    lines, mirror = Lines("me", hang), Fake()
    carry(lines, mirror)
    await until(lambda: mirror.links == tries[2:])
    lines.close()


async def test_closing_drops_all_and_takes_no_more(peer: Peer) -> None:
    lines, mirror = Lines("me", peer.dial), Fake()
    carry(lines, mirror)
    await until(lambda: mirror.links)
    link = mirror.links[0]
    lines.close()
    assert mirror.links == []
    await link.over()
    late = Link()
    await dial(peer.port, late)
    lines.accepted(PEER, late)
    assert await late.over() == "this node stops"


async def test_a_dial_under_way_ends_with_the_lines() -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def hang(_: str, link: Link) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.set()
            raise

    lines = Lines("me", hang)
    carry(lines, Fake())
    await started.wait()
    lines.close()
    await stopped.wait()


