"""Finding an agent: which are tried, in which order, and what is said when none answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.cluster import agent_support as support
from tests.cluster.secure_support import OTHER
from upipe.cluster import node_id, reach, token
from upipe.cluster.address import Address
from upipe.cluster.client import Client
from upipe.cluster.member_events import Hint
from upipe.errors import NoAgent, OptionInvalid, TokenError
from upipe.pipe import CLUSTER_VARIABLE

pytestmark = pytest.mark.timeout(120)
NOWHERE = Hint((Address("127.0.0.1", 2),), "zeroconf", "ff" * 8)


Hear = Callable[[Hint], None]


async def nobody(hear: Hear) -> None:
    pass


@asynccontextmanager
async def silent() -> AsyncIterator[tuple[Hint, list[bytes], asyncio.Event]]:
    """Who is advertised as one of ours, takes connections and never answers; what was said to it, and that it was."""
    heard: list[bytes] = []
    spoken = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            heard.append(data)
            spoken.set()
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        hint = Hint((Address("127.0.0.1", port),), "zeroconf", "ee" * 8, fingerprint=support.SECRET.fingerprint)
        yield hint, heard, spoken


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without agents, with the token of the tests."""
    monkeypatch.setenv(token.VARIABLE, str(support.token_file(tmp_path)))
    monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)
    monkeypatch.setattr(reach, "default_data_dir", lambda: tmp_path / "nothing")
    monkeypatch.setattr(reach, "DEFAULT_PORT", 1)


async def test_the_one_that_is_named_or_stands_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with support.running(tmp_path, "one", "two") as [one, two]:
        found = await reach.reach(one.seed)
        assert found.node == one.id and found.credentials.identity.kind == "client"
        assert set(found.addresses) == {one.id, two.id} and str(found.addresses[two.id][0]) == two.seed
        monkeypatch.setenv(CLUSTER_VARIABLE, two.seed)
        assert (await reach.reach("auto", browse=nobody)).node == two.id
        assert (await reach.reach(one.seed)).node == one.id  # what is named goes before
        with pytest.raises(NoAgent, match="is of the cluster 'upipe', and 'other' was asked for"):
            await reach.reach(one.seed, cluster="other")


async def test_the_agent_of_this_host_is_found_by_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with support.running(tmp_path, "one") as [one]:
        monkeypatch.setattr(reach, "default_data_dir", lambda: tmp_path / "one")
        found = await reach.reach("auto", browse=nobody)
        assert found.node == one.id and found.target.unix == tmp_path / "one" / "node.sock"
        assert str(found.addresses[one.id][0]) == one.seed  # mirrors need TCP


async def test_of_those_that_are_advertised_our_clusters_are_asked_first(tmp_path: Path) -> None:
    asked: list[str] = []

    async def browse(hear: Hear) -> None:
        asked.append("browsed")
        hear(NOWHERE)
        hear(Hint((Address("127.0.0.1", one.port),), "zeroconf", one.id, fingerprint=support.SECRET.fingerprint))

    async with support.running(tmp_path, "one") as [one]:
        found = await reach.reach("auto", browse=browse)
        assert found.node == one.id and asked == ["browsed"]


async def test_nobody_is_one_sentence_that_names_what_was_tried() -> None:
    async def browse(hear: Hear) -> None:
        hear(NOWHERE)

    with pytest.raises(NoAgent) as caught:
        await reach.reach("auto", browse=browse)
    text = str(caught.value)
    assert "the agent of this host" in text and "127.0.0.1:1" in text and "127.0.0.1:2" in text
    assert text.endswith("Start one with `upipe-node`, or name one: HOST:PORT") and "\n" not in text
    with pytest.raises(NoAgent, match="multicast DNS: nobody answered within 3 s"):
        await reach.reach("auto", browse=nobody)


async def test_liars_cost_a_bounded_time_and_are_told_no_secret(tmp_path: Path) -> None:
    async def browse(hear: Hear) -> None:
        for hint in (liar, NOWHERE, foreign):
            hear(hint)
        await spoken.wait()  # the honest one answers last
        hear(Hint((Address("127.0.0.1", one.port),), "zeroconf", one.id))
        await asyncio.Event().wait()

    async with (
        asyncio.timeout(60),
        support.running(tmp_path, "one") as [one],
        support.running(tmp_path, "two", secret=OTHER) as [two],
        silent() as (liar, heard, spoken),
    ):
        foreign = Hint((Address("127.0.0.1", two.port),), "zeroconf", two.id, fingerprint=support.SECRET.fingerprint)
        assert (await reach.reach("auto", browse=browse)).node == one.id
        said = b"".join(heard)
        assert said[0] == 0x16 and support.SECRET.bearer.encode() not in said  # the first step of TLS, and nothing else


async def test_those_who_never_answer_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def browse(hear: Hear) -> None:
        for number in range(1, 200):
            hear(Hint((Address(f"127.0.0.{number}", liar.addresses[0].port), *liar.addresses), "zeroconf", "ee" * 8))

    monkeypatch.setattr(reach, "ASK", 1.0)
    monkeypatch.setattr(reach, "SEARCH", 2.0)  # enough to hear from one of them
    async with silent() as (liar, heard, _):
        began = time.monotonic()
        with pytest.raises(NoAgent, match=r"and \d+ more. Start one") as caught:
            await reach.reach("auto", browse=browse)
        assert time.monotonic() - began < 60 and len(str(caught.value)) < 2500 and heard


async def test_another_cluster_is_told_so(tmp_path: Path) -> None:
    async with support.running(tmp_path, "one", secret=OTHER) as [one]:
        with pytest.raises(NoAgent, match=r"same token file \(`upipe token show-fingerprint` on each\)"):
            await reach.reach(one.seed)


async def test_without_a_token_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(token.VARIABLE, str(tmp_path / "none"))
    monkeypatch.setattr(Client, "call", None)
    with pytest.raises(TokenError, match="no cluster token at"):
        await reach.reach("auto", browse=nobody)


async def test_no_address_is_said_so() -> None:
    with pytest.raises(OptionInvalid, match="is no address"):
        await reach.reach("::not an address::")


@pytest.mark.slow
async def test_browsing_ends_in_time_where_nobody_is() -> None:
    found: list[Hint] = []
    async with asyncio.timeout(reach.BROWSE + 60):
        await reach.browsed(found.append)
    assert all(len(hint.node_id) == 16 for hint in found)
    assert node_id.default_data_dir().is_absolute()
