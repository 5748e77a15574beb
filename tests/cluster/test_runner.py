"""Pipes on a cluster, from their own process: real agents on loopback (in this process), real keepers and workers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import agent_support as support
from tests.cluster.agent_support import Node
from upipe import DeclarationError, Pipe, PipeFailed, Place, Processor, ProcessorError, Settings
from upipe.cluster import token
from upipe.cluster.agent import RealEngines
from upipe.errors import NoAgent, TokenError

DEADLINE = 100.0
pytestmark = pytest.mark.timeout(240)


@asynccontextmanager
async def cluster(folder: Path, *names: str) -> AsyncIterator[list[Node]]:
    engines: Any = RealEngines()
    async with support.running(folder, *names, engines=engines) as nodes:
        try:
            yield nodes
        finally:  # keepers outlive agents, so these wait until there is none
            parts = [node.agent.parts for node in nodes]
            await support.until(lambda: not any(part.present for one in parts for part in one.all.values()))


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(token.VARIABLE, str(support.token_file(tmp_path)))


def at(name: str) -> Place:
    return Place(labels=(name,))


def double(value: int) -> int:
    return 2 * value


def plus_one(value: int) -> int:
    return value + 1


async def test_what_is_emitted_comes_back_through_two_nodes(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "left", "right") as nodes:
        pipe = Pipe("there")
        pipe.chain(Processor("a", double, place=at("left")), Processor("b", plus_one, place=at("right"), workers=2))
        await pipe.start(cluster=nodes[0].seed)
        assert pipe.state == "running"

        async def emit() -> None:
            for value in range(500):
                assert await pipe.emit(value)
            await pipe.wait_for_completion()

        emitting = asyncio.create_task(emit())
        found = sorted([one async for one in pipe.results()])
        await emitting
        report = pipe.report()
        assert found == [2 * value + 1 for value in range(500)]
        assert pipe.state == "completed" and report.balanced, str(report)
        assert {edge.source: edge.emitted for edge in report.edges} == {"": 500, "a": 500, "*": 500}, str(report)


@asynccontextmanager
async def started(pipe: Pipe, node: Node) -> AsyncIterator[Pipe]:
    """It runs on the cluster of the node, and is stopped at the end."""
    await pipe.start(cluster=node.seed)
    try:
        yield pipe
    finally:
        await pipe.stop()


async def test_calls_are_answered_and_errors_come_with_their_traceback(tmp_path: Path) -> None:
    def half(value: int) -> float:
        return 1 / value

    pipe = Pipe("calls")
    first = Processor("a", half, place=at("left"), on_error="dead_letter")
    pipe.chain(first, Processor("b", double, place=at("right")))
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "left", "right") as nodes, started(pipe, nodes[1]):
        assert await asyncio.gather(*(pipe.call(value) for value in (1, 2, 4))) == [2.0, 1.0, 0.5]
        said = rf"'a' \(worker a#0 on node {nodes[0].id}\) raised ZeroDivisionError(.|\n)*in half"
        with pytest.raises(ProcessorError, match=said):
            await pipe.call(0)
        report = await pipe.wait_for_completion()
        assert report.balanced and report.dead_letters == 1
        [letter] = pipe.dead_letters()
        assert (letter.processor, letter.error_kind, letter.value) == ("a", "ZeroDivisionError", 0)


async def test_dead_letters_of_the_last_moment_come_too(tmp_path: Path) -> None:
    def fails(value: int) -> None:
        raise ValueError(value)

    pipe = Pipe("letters")
    last = Processor("b", fails, place=at("right"), on_error="dead_letter")
    pipe.chain(Processor("a", double, place=at("left")), last)
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "left", "right") as nodes, started(pipe, nodes[0]):
        for value in range(20):
            assert await pipe.emit(value)
        report = await pipe.wait_for_completion()
        assert report.balanced and report.dead_letters == 20, str(report)
        letters = pipe.dead_letters()
        assert sorted(letter.value for letter in letters) == [2 * value for value in range(20)]
        assert {(letter.error_kind, letter.source) for letter in letters} == {("ValueError", "a")}


async def test_a_module_beside_the_script_travels_with_its_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "ours_module.py").write_text("import ours_other\ndef work(value): return [ours_other.__file__, value]\n")
    (place / "ours_other.py").write_text("")
    monkeypatch.syspath_prepend(str(place))
    import ours_module  # type: ignore[import-not-found]

    pipe = Pipe("module")
    pipe.add(Processor("a", ours_module.work))
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "one") as [node], started(pipe, node):
        path, value = await pipe.call(2)
        assert value == 2 and path.startswith(str(tmp_path / "one" / "modules")) and path.endswith("ours_other.py")
    for name in ("ours_module", "ours_other"):
        sys.modules.pop(name, None)


async def test_what_a_node_lacks_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upipe.cluster import shipping

    monkeypatch.setattr(shipping, "_distributions", lambda name: {"no-such-dist": "1.0"})

    def work(value: Any) -> Any:
        import msgspec

        return msgspec.to_builtins(value)

    pipe = Pipe("lacks")
    pipe.add(Processor("a", work))
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "one") as [node]:
        with pytest.raises(PipeFailed, match=f"node {node.id} lacks the package no-such-dist.*pip install"):
            await pipe.start(cluster=node.seed)
        assert pipe.state == "failed"


async def test_no_room_is_said_at_once_with_a_reason_for_each_node(tmp_path: Path) -> None:
    pipe = Pipe("large")
    pipe.add(Processor("a", double, resources={"gpu": 3}))
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "left", "right") as nodes:
        with pytest.raises(DeclarationError) as caught:
            await pipe.start(cluster=nodes[0].seed)
        assert all(node.id in str(caught.value) for node in nodes) and pipe.state == "declared"


async def test_results_that_nobody_reads_hold_nothing_up_and_the_newest_are_kept(tmp_path: Path) -> None:
    pipe = Pipe("unread", settings=Settings(sink_bytes=1 << 16, edge_bytes=1 << 16))
    pipe.add(Processor("a", double))
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "one") as [node], started(pipe, node):
        for value in range(5000):
            assert await pipe.emit(value)
        report = await pipe.wait_for_completion()
        kept = [one async for one in pipe.results()]
        assert kept == [2 * value for value in range(5000 - len(kept), 5000)] and 100 < len(kept) < 1000
        [sink] = [edge for edge in report.edges if edge.source == "*"]
        assert report.balanced and sink.emitted == 5000 and sink.dropped + sink.in_flight == 5000, str(report)
        assert sink.dropped >= 5000 - 1000


async def test_results_that_are_read_are_all_there_however_slow_the_reader(tmp_path: Path) -> None:
    pipe = Pipe("read", settings=Settings(sink_bytes=1 << 16, edge_bytes=1 << 16))
    pipe.add(Processor("a", double))
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "one") as [node], started(pipe, node):
        found: list[int] = []

        async def read() -> None:
            async for one in pipe.results():
                found.append(one)
                if len(found) % 500 == 0:
                    await asyncio.sleep(0.05)

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)
        for value in range(5000):
            assert await pipe.emit(value)
        await pipe.wait_for_completion()
        await reading
        assert found == [2 * value for value in range(5000)]


async def test_pickled_values_need_to_be_allowed(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "one") as [node]:
        refuses = Pipe("refuses")
        refuses.add(Processor("a", lambda value: {1, 2}, on_error="dead_letter"))
        async with started(refuses, node):
            with pytest.raises(Exception, match="pickle is refused here"):
                await refuses.emit({1, 2})
            with pytest.raises(ProcessorError, match="PickleRefused"):
                await refuses.call(1)
        takes = Pipe("takes", settings=Settings(allow_pickle=True))
        takes.add(Processor("a", lambda value: {*value, 3}))
        async with started(takes, node):
            assert await takes.call({1, 2}) == {1, 2, 3}


async def test_terminate_drains_and_stop_ends_now(tmp_path: Path) -> None:
    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "one") as [node]:
        drains, stops = Pipe("drains"), Pipe("stops")
        for pipe in (drains, stops):
            pipe.chain(Processor("a", endless), Processor("b", double))
            await pipe.start(cluster=node.seed)
            assert await anext(pipe.results()) == 0
        report = await drains.terminate()
        assert drains.state == "completed" and report.balanced, str(report)
        await stops.stop()
        assert stops.state == "stopped"
        await support.until(lambda: not node.agent.parts.all)


async def test_without_an_agent_or_a_token_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipe("nobody")
    pipe.add(Processor("a", double))
    with pytest.raises(NoAgent, match=r"no agent of this cluster .*127\.0\.0\.1:1.*nothing listens there"):
        await pipe.start(cluster="127.0.0.1:1")
    monkeypatch.setenv(token.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(TokenError, match=r"no cluster token at .*upipe token create"):
        await pipe.start(cluster="auto")
    assert pipe.state == "declared"


async def test_another_member_coordinates_when_the_first_one_dies(tmp_path: Path) -> None:
    pipe = Pipe("orphan")
    pipe.add(Processor("a", double, place=at("third")))
    names = ("first", "second", "third")
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, *names) as nodes, started(pipe, nodes[0]):
        assert await pipe.call(1) == 2
        await nodes[0].kill()
        assert await pipe.call(2) == 4  # data needs no coordinator
        report = await pipe.wait_for_completion()
        assert pipe.state == "completed" and report.balanced, str(report)
