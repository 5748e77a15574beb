"""A pipe on a node: real keepers, real workers, plans fed by hand as a coordinator would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.keeper_support import HERE, Held, chain, drained, one
from upipe.graph.plan import REPLIES, RESULTS

MakeHeld = Callable[..., Held]
COUNT = 200


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[MakeHeld]:
    made: list[Held] = []

    def make(*args: Any, **codes: Any) -> Held:
        made.append(Held(tmp_path, *args, **codes))
        return made[-1]

    yield make
    for each in made:
        await each.end()


def numbers():  # type: ignore[no-untyped-def]
    yield from range(COUNT)


def double(value: int) -> int:
    return 2 * value


async def test_a_pipe_on_one_node_from_its_start_to_its_end(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b", workers=2), one("c")), a=numbers, b=double, c=double)
    await here.start()
    news = await here.follow()
    results = here.queue(here.named(RESULTS))
    results.set_policy(0)
    assert news.present and set(news.labels) == {lane.name for lane in here.layout.lanes}
    await here.up()
    await here.until(lambda news: ("a", 0) in news.ended, "a ended")
    ends = ["e0-a-b"]
    await here.follow(ends=frozenset(ends))
    await here.until(lambda news: {("b", 0), ("b", 1)} <= set(news.ended), "b ended")
    ends += ["e1-b-c"]
    await here.follow(ends=frozenset(ends), discards=frozenset({"a", "b"}))
    await here.until(lambda news: ("c", 0) in news.ended, "c ended")
    await here.follow(ends=frozenset([*ends, RESULTS, REPLIES]))
    assert sorted(await drained(results)) == [4 * number for number in range(COUNT)]
    assert here.news.left == () and here.news.failed == "" and here.news.crews["b"].cpu_seconds > 0
    await here.stop()
    assert here.lost == [] and here.keeper.last_word() == here.news
    assert not await here.agent().find()
    assert HERE in here.layout.nodes()
