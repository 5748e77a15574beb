"""The main paths, forked and executed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system import jobs
from upipe import Pipe, Processor, Settings

pytestmark = pytest.mark.system


@pytest.mark.parametrize("method", ["fork", "exec"])
async def test_chain(method: str) -> None:
    pipe = Pipe("chain", settings=Settings(start_method=method))
    pipe.chain(
        Processor("read", jobs.count_up(500)),
        Processor("double", jobs.double, workers=2),
        Processor("same", jobs.identity),
    )
    await pipe.start()
    assert sorted([value async for value in pipe.results()]) == list(range(0, 1000, 2))
    report = await pipe.wait_for_completion(60)
    assert report.balanced and report.state == "completed"


@pytest.mark.parametrize("method", ["fork", "exec"])
async def test_call(method: str) -> None:
    pipe = Pipe("call", settings=Settings(start_method=method))
    pipe.add(Processor("double", jobs.double))
    async with pipe:
        assert [await pipe.call(number, timeout=60) for number in range(20)] == list(range(0, 40, 2))


def title(_: object) -> str:
    return Path("/proc/self/comm").read_text().strip()


async def test_workers_have_their_names_in_ps_and_top() -> None:
    pipe = Pipe("named")
    pipe.add(Processor("a-rather-long-name", title, workers=1))
    async with pipe:
        assert await pipe.call(0, timeout=60) == "a-rather-long#0"
