"""A part: its keeper ends, is lost or does not answer between an order and what follows from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.agent_support import SPEC, FakeFerry, Room, until
from upipe.cluster import part as parts
from upipe.cluster import wire
from upipe.cluster.dealings import NodeReport
from upipe.cluster.keeping import Job, KeeperNews
from upipe.cluster.layout import NodePlan
from upipe.cluster.part import Part
from upipe.errors import KeeperFailed, NodeRefused
from upipe.runtime.spool import DeadLetter

ME, OTHER = "0" * 16, "1" * 16


class Keeper:
    """Says what the test says."""

    def __init__(self, news: Any, lost: Any) -> None:
        self.news, self.lost = news, lost
        self.told: list[tuple[tuple[int, int], NodePlan | None]] = []
        self.found: bool | Exception = False
        self.reading: asyncio.Event | None = None
        self.closed = self.killed = False

    async def start(self, job: Job) -> None:
        pass

    async def find(self) -> bool:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def follow(self, fence: tuple[int, int], plan: NodePlan | None) -> None:
        self.told.append((fence, plan))

    async def letters(self) -> list[DeadLetter]:
        if self.reading is not None:
            await self.reading.wait()
        return []

    def output(self) -> Path:
        return Path("output")

    def close(self) -> None:
        self.closed = True

    def kill(self) -> None:
        self.killed = True


class Means(Room):
    node = ME

    def __init__(self) -> None:
        self.keepers: list[Keeper] = []
        self.reports: list[tuple[str, NodeReport]] = []
        self.refuse: NodeRefused | None = None
        self.follows = ""
        self.found: bool | Exception = False
        self._number = 0

    def number(self) -> int:
        self._number += 1
        return self._number

    def keeper(self, pipe: str, news: Any, lost: Any) -> Keeper:
        self.keepers.append(Keeper(news, lost))
        self.keepers[-1].found = self.found
        return self.keepers[-1]

    def ferry(self, pipe: str, changed: Any) -> FakeFerry:
        return FakeFerry(ME, pipe)

    async def prepare(self, pipe: str, orders: wire.Orders) -> Job:
        return Job(pipe, SPEC, {}, {})

    def report(self, coordinator: str, pipe: str, report: NodeReport) -> Awaitable[None]:
        return self._report(coordinator, report)

    async def _report(self, coordinator: str, report: NodeReport) -> None:
        self.reports.append((coordinator, report))
        if self.refuse is not None and coordinator != self.follows:
            raise self.refuse

    async def keep_letters(self, pipe: str, letters: list[DeadLetter]) -> None:
        pass

    def orphaned(self, pipe: str) -> bool:
        return False

    def successor(self, pipe: str, epoch: int) -> str:
        return self.follows

    @property
    def last(self) -> NodeReport | None:
        return self.reports[-1][1] if self.reports else None


@pytest.fixture
async def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Part]:
    monkeypatch.setattr(parts, "AGAIN", 0.02)
    made = Part("p", tmp_path / "p", Means(), lambda one: None)
    yield made
    await made.close()


def means(part: Part) -> Any:
    return part._means


def plan(*fence: int) -> NodePlan:
    return NodePlan("p", ME, *fence, ("a", "b"), (), (), ())


def orders(*fence: int, stop: bool = False) -> wire.Orders:
    return wire.Orders(fence, None if stop else plan(*fence), SPEC, coordinator=OTHER)


async def follow(part: Part, *fence: int) -> Keeper:
    """It follows a plan."""
    part.order(orders(*fence))
    await until(lambda: means(part).keepers and means(part).keepers[-1].told)
    keeper: Keeper = means(part).keepers[-1]
    keeper.news(KeeperNews(fence=fence))
    await until(lambda: means(part).last and means(part).last.fence == fence)
    return keeper


async def test_a_second_stop_while_the_keeper_obeys_the_first_is_obeyed_too(part: Part) -> None:
    keeper = await follow(part, 1, 1)
    part.order(orders(1, 2, stop=True))
    await until(lambda: keeper.told[-1] == ((1, 2), None))
    part.order(orders(1, 3, stop=True))
    await until(lambda: keeper.told[-1] == ((1, 3), None))
    keeper.news(KeeperNews(fence=(1, 2), present=False))  # its last word
    await until(lambda: not means(part).last.present)
    assert means(part).last.fence == (1, 3)
    assert keeper.closed


async def test_a_keeper_that_ends_while_its_dead_letters_are_read_is_done_with(part: Part) -> None:
    keeper = await follow(part, 1, 1)
    keeper.reading = asyncio.Event()
    part.order(orders(1, 2, stop=True))
    part.order(orders(1, 3, stop=True))
    await asyncio.sleep(0.05)
    keeper.news(KeeperNews(fence=(1, 2), present=False))
    keeper.reading.set()
    await until(lambda: not means(part).last.present and means(part).last.fence == (1, 3))
    assert not part.failed


async def test_a_plan_after_a_stop_that_was_obeyed_finds_its_keeper_lost(part: Part) -> None:
    keeper = await follow(part, 1, 1)
    part.order(orders(1, 2, stop=True))
    await until(lambda: keeper.told[-1] == ((1, 2), None))
    part.order(orders(2, 3))
    keeper.news(KeeperNews(fence=(1, 2), present=False))
    await until(lambda: means(part).last.lost)
    part.order(orders(2, 4, stop=True))
    await until(lambda: not means(part).last.lost and means(part).last.fence == (2, 4))


async def test_a_keeper_lost_while_orders_are_written_is_told_as_lost_and_no_other_one_begun(
    part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = await follow(part, 1, 1)
    written, writing = parts.replace_file, asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(path: Path, data: bytes) -> None:
        asyncio.run_coroutine_threadsafe(lose(), loop).result(60)
        written(path, data)

    async def lose() -> None:
        keeper.lost("kill -9")
        writing.set()

    monkeypatch.setattr(parts, "replace_file", slow)
    part.order(orders(1, 2))
    await writing.wait()
    await until(lambda: means(part).last.lost)
    await asyncio.sleep(0.05)
    assert len(means(part).keepers) == 1


async def test_after_a_restart_nothing_is_said_before_the_keeper_is_found(part: Part) -> None:
    means(part).found = KeeperFailed("lives, and does not answer")
    part.recover(orders(1, 1))
    await asyncio.sleep(0.03)
    assert means(part).last is None
    means(part).keepers[-1].found = True
    await until(lambda: means(part).keepers[-1].told)
    assert not means(part).keepers[-1].killed


async def test_a_keeper_that_does_not_answer_after_a_restart_is_killed_and_told_as_lost(part: Part) -> None:
    means(part).found = KeeperFailed("lives, and does not answer")
    part.recover(orders(1, 1))
    await until(lambda: means(part).last is not None and means(part).last.lost)
    assert means(part).keepers[-1].killed
    assert not part.failed


async def test_what_fails_inside_fails_the_pipe_with_a_sentence(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(pipe: str, orders: wire.Orders) -> Job:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(means(part), "prepare", broken)
    part.order(orders(1, 1))
    await until(lambda: means(part).last is not None and "oops" in means(part).last.failed)


async def test_reports_that_an_old_coordinator_refuses_go_to_its_successor(part: Part) -> None:
    await follow(part, 1, 1)
    successor = "2" * 16
    means(part).refuse, means(part).follows = NodeRefused(OTHER, 409, "not_coordinator", "no"), successor
    means(part).keepers[-1].news(KeeperNews(fence=(1, 1), up=True))
    await until(lambda: means(part).reports[-1][0] == successor)


async def test_a_full_disk_is_said_once_and_orders_wait_for_room(
    part: Part, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = asyncio.Event()
    write, tries = parts.replace_file, []

    def full(path: Path, data: bytes) -> None:
        tries.append(path)
        if len(tries) > 5:
            part._loop.call_soon_threadsafe(tried.set)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, "replace_file", full)
    part.order(orders(1, 1))
    await tried.wait()
    said = [one.getMessage() for one in caplog.records if "No space left" in one.getMessage()]
    assert len(said) == 1 and str(tries[0]) in said[0] and "make room on that disk" in said[0]
    assert not means(part).keepers and not part.failed, "nothing is done for orders that are not on disk"
    monkeypatch.setattr(parts, "replace_file", write)
    await until(lambda: means(part).keepers and means(part).keepers[0].told)
