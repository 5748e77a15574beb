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

DEADLINE = 60.0
pytestmark = pytest.mark.timeout(120)


@asynccontextmanager
async def cluster(folder: Path, *names: str) -> AsyncIterator[list[Node]]:
    engines: Any = RealEngines()
    async with support.running(folder, *names, engines=engines) as nodes:
        yield nodes


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(token.VARIABLE, str(support.token_file(tmp_path)))
    yield


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
