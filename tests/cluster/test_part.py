"""A part follows orders in order, tells what it knows, and survives failures of what it needs."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cluster.agent_support import SPEC, FakeEngines, Room, until
from upipe.cluster import part as module
from upipe.cluster import promises, wire
from upipe.cluster.dealings import NodeReport
from upipe.cluster.keeping import Job
from upipe.cluster.lanes import lay_out
from upipe.cluster.layout import node_plan
from upipe.cluster.part import Part
from upipe.cluster.part_means import Unfit
from upipe.cluster.placement import Placement
from upipe.errors import ClusterError, MessageInvalid, NodeRefused, NodeUnreachable

LAYOUT = lay_out(SPEC, Placement({"a": ("n1",), "b": ("n2",)}), "")


def orders(revision: int, stop: bool = False) -> wire.Orders:
    fence = (1, revision)
    return wire.Orders(fence, None if stop else node_plan(SPEC, LAYOUT, "n1", fence), SPEC, coordinator="n2")


class Means(Room):
    """Everything a part needs, and what it told."""

    node = "n1"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.engines = FakeEngines()
        self.told: list[NodeReport] = []
        self.errors: list[Exception] = []
        """Raised one after the other by what is asked."""
        self.unheard: Exception | None = None
        self._numbers = itertools.count(1 << 32)

    def number(self) -> int:
        return next(self._numbers)

    def keeper(self, pipe: str, news: Any, lost: Any) -> Any:
        return self.engines.keeper(self.directory / pipe, news, lost)

    def ferry(self, pipe: str, changed: Any) -> Any:
        return self.engines.ferry("n1", pipe, None, changed)

    async def prepare(self, pipe: str, orders: wire.Orders) -> Job:
        if self.errors:
            raise self.errors.pop(0)
        return Job(pipe, SPEC, {}, {})

    async def report(self, coordinator: str, pipe: str, report: NodeReport) -> None:
        assert coordinator == "n2"
        if self.unheard is not None:
            raise self.unheard
        self.told.append(report)

    async def keep_letters(self, pipe, letters):
        self.kept = letters

    def orphaned(self, pipe: str) -> bool:
        return True


@pytest.fixture
async def made(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AGAIN", 0.01)
    means, gone = Means(tmp_path), []
    part = Part("p", tmp_path / "orders", means, gone.append)
    yield part, means, gone
    await part.close()


async def test_orders_are_followed_and_reported_and_older_ones_refused(made):
    part, means, gone = made
    assert part.report() is None
    assert part.order(orders(3))
    await until(lambda: means.told)
    told = means.told[-1]
    assert (told.fence, told.present, told.up) == ((1, 3), True, True) and told.queues
    assert means.engines.ferries["p"].calls[:2] == ["release", "follow"]
    assert not part.order(orders(2))
    assert part.order(orders(4))
    await until(lambda: means.told[-1].fence == (1, 4))
    assert len(means.engines.crew.started) == 1
    assert part.order(orders(5, stop=True))
    await until(lambda: gone)
    assert (means.told[-1].fence, means.told[-1].present) == ((1, 5), False)
    assert [one.number for one in means.told] == sorted({one.number for one in means.told})


async def test_of_many_orders_only_the_newest_has_to_be_followed(made):
    part, means, _ = made
    for revision in range(1, 50):
        part.order(orders(revision))
    await until(lambda: means.told and means.told[-1].fence == (1, 49))
    assert len(means.engines.crew.started) == 1


async def test_what_cannot_be_fetched_yet_is_tried_again_and_what_cannot_run_is_told(made):
    part, means, _ = made
    means.errors = [NodeUnreachable("not now"), NodeUnreachable("not now")]
    part.order(orders(1))
    await until(lambda: means.told and means.told[-1].present)
    assert means.told[-1].fence == (1, 1) and not means.told[-1].failed and not means.told[-1].waits
    part.order(orders(2, stop=True))
    await until(lambda: not means.told[-1].present)
    means.errors = [Unfit("node n1 lacks the package x")]
    part.order(orders(3))
    await until(lambda: means.told[-1].unfit == "node n1 lacks the package x")
    assert not means.told[-1].present and not means.told[-1].failed
    part.order(orders(4, stop=True))
    await until(lambda: means.told[-1].fence == (1, 4))
    assert not means.told[-1].unfit


async def test_workers_that_there_is_no_room_for_are_refused_and_what_ran_before_goes_on(made, monkeypatch):
    monkeypatch.setattr(promises, "ROOM", 0.1)
    monkeypatch.setattr(promises, "LOOK", 0.01)
    part, means, _ = made
    means.full = (("a", 0),)
    part.order(orders(1))
    await until(lambda: means.told)
    told = means.told[-1]
    assert (told.fence, told.refused, told.others, told.up) == ((1, 1), (("a", 0),), {"cpu": 4.0}, False)
    (followed,) = means.engines.crew.alive.values()
    assert followed[1].workers == () and followed[1].queues and part.promised == {}
    means.full = ()
    part.order(orders(2))
    await until(lambda: means.told[-1].fence == (1, 2))
    assert means.told[-1].refused == () and means.told[-1].up and part.promised == {"cpu": 0.1}
    means.full = (("a", 0),)
    part.order(orders(3))  # it runs here already
    await until(lambda: means.told[-1].fence == (1, 3))
    assert means.told[-1].refused == () and part.promised == {"cpu": 0.1}
    changes = means.changes
    means.engines.keepers["p"].end(("a", 0))
    await until(lambda: means.told[-1].ended)
    assert part.promised == {} and means.changes > changes
    part.order(orders(4, stop=True))
    await until(lambda: not means.told[-1].present)
    assert part.promises.agreed == frozenset()


async def test_room_that_comes_within_some_seconds_is_taken_and_newer_orders_do_not_wait_for_it(made, monkeypatch):
    monkeypatch.setattr(promises, "LOOK", 0.01)
    monkeypatch.setattr(promises, "ROOM", 1000.0)  # longer than any wait below
    part, means, _ = made
    means.full = (("a", 0),)
    part.order(orders(1))
    await asyncio.sleep(0.1)
    assert not means.told
    part.order(orders(2, stop=True))
    await until(lambda: means.told and means.told[-1].fence == (1, 2))
    part.order(orders(3))
    await asyncio.sleep(0.1)
    means.full = ()
    await until(lambda: means.told[-1].fence == (1, 3))
    assert means.told[-1].refused == ()


async def test_what_was_refused_before_a_restart_is_still_refused_after_it(made, tmp_path, monkeypatch):
    monkeypatch.setattr(promises, "ROOM", 0.0)
    part, means, _ = made
    means.full = (("a", 0),)
    part.order(orders(1))
    await until(lambda: means.told)
    await part.close()
    again = Means(tmp_path)
    again.engines = FakeEngines(means.engines.crew)
    second = Part("p", tmp_path / "orders", again, lambda _: None)
    noted = msgspec.msgpack.decode((tmp_path / "orders").read_bytes())
    second.recover(msgspec.structs.replace(orders(1), refused=tuple((name, at) for name, at in noted["refused"])))
    await until(lambda: again.told and again.told[-1].fence == (1, 1))
    assert again.told[-1].refused == (("a", 0),) and second.promised == {}
    await second.close()


async def test_what_cannot_be_fetched_for_long_makes_the_node_unfit_with_a_sentence(made, monkeypatch):
    monkeypatch.setattr(module, "READY", 0.1)
    part, means, _ = made
    means.errors = [NodeUnreachable("the content ab is nowhere")] * 10_000
    part.order(orders(1))
    await until(lambda: means.told and means.told[-1].unfit)
    assert means.told[-1].unfit == (
        "node n1 could not get what the pipe's code needs within 0.1 s: the content ab is nowhere"
    )
    assert not means.told[-1].present and means.told[-1].fence == (0, 0)
    left = len(means.errors)
    await asyncio.sleep(0.1)
    assert len(means.errors) == left, "it is not asked for any more"
    means.errors = []
    part.order(orders(2))  # but may be by newer orders
    await until(lambda: means.told[-1].present and means.told[-1].fence == (1, 2))


async def test_what_a_node_waits_for_is_told_at_once_and_not_again_for_other_numbers(made, caplog):
    part, means, _ = made
    means.errors = [ClusterError(f"the disk has {number} bytes free") for number in range(8, 12)]
    means.errors += [ClusterError("something else")] * 2
    part.order(orders(1))
    await until(lambda: means.told and means.told[-1].present)
    said = [one.getMessage() for one in caplog.records if "tried again" in one.getMessage()]
    assert said == ["pipe p: the disk has 8 bytes free; it is tried again", "pipe p: something else; it is tried again"]
    waits = [one.waits for one in means.told]
    assert waits[0] == "node n1 waits: the disk has 8 bytes free" and not waits[-1]
    assert not any(one.present for one in means.told if one.waits) and means.told[0].fence == (0, 0)
    part.order(orders(2, stop=True))
    await until(lambda: not means.told[-1].present)
    means.errors = [ClusterError("again")] * 3
    part.order(orders(3))  # what waits here does not hide the stop that was obeyed before
    await until(lambda: means.told[-1].waits)
    assert means.told[-1].fence == (1, 2)


class Clock:
    """An event loop whose clock stands still until it is set."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.now = loop, loop.time()

    def time(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)


async def test_trouble_that_ended_long_ago_makes_no_node_unfit(made):
    part, means, _ = made
    part._loop = clock = Clock(part._loop)
    means.errors = [NodeUnreachable("cut")]
    part.order(orders(1))
    await until(lambda: means.told and means.told[-1].present)
    part.order(orders(2, stop=True))
    await until(lambda: not means.told[-1].present)
    clock.now += module.READY + 1  # since the first failure
    means.errors = [NodeUnreachable("cut")]
    part.order(orders(3))
    await until(lambda: means.told[-1].unfit or means.told[-1].fence == (1, 3))
    assert not means.told[-1].unfit and means.told[-1].present


async def test_a_keeper_that_does_not_start_after_some_tries_makes_the_node_unfit(made):
    part, means, _ = made
    means.engines.crew.stillborn = ["no memory"] * module.TRIES
    part.order(orders(1))
    await until(lambda: means.told and means.told[-1].unfit)
    assert means.told[-1].unfit == "node n1 cannot start a keeper for the pipe (3 tries): no memory"
    assert not means.told[-1].present and not means.told[-1].failed and part.promised == {}
    assert means.engines.ferries["p"].calls[-1] == "close" and not means.engines.crew.started
    part.order(orders(2, stop=True))
    await until(lambda: means.told[-1].fence == (1, 2))
    assert not means.told[-1].unfit
    means.engines.crew.stillborn = ["no memory"] * (module.TRIES - 1)
    for revision in (3, 5):  # tries of another time do not count
        part.order(orders(revision))
        await until(lambda revision=revision: means.told[-1].fence == (1, revision))
        assert means.told[-1].present
        part.order(orders(revision + 1, stop=True))
        await until(lambda: not means.told[-1].present)
        means.engines.crew.stillborn = ["no memory"]


async def test_a_lost_keeper_is_told_until_a_stop_is_obeyed(made):
    part, means, _ = made
    part.order(orders(1))
    await until(lambda: means.told)
    means.engines.keepers["p"].kill()
    await until(lambda: means.told[-1].lost)
    assert not means.told[-1].present
    part.order(orders(2))
    await asyncio.sleep(0.05)
    assert means.told[-1].lost and len(means.engines.crew.started) == 1, "a plan does not bring back what is lost"
    part.order(orders(3, stop=True))
    await until(lambda: means.told[-1].fence == (1, 3) and not means.told[-1].lost)
    part.order(orders(4))
    await until(lambda: means.told[-1].fence == (1, 4) and means.told[-1].present)
    assert len(means.engines.crew.started) == 2


@pytest.mark.parametrize("failure", [OSError("out of descriptors"), ZeroDivisionError("a bug")])
async def test_reports_go_on_after_one_that_failed_inside(made, monkeypatch, failure):
    part, means, _ = made
    part.order(orders(1))
    await until(lambda: means.told)
    failures, states = [failure], means.engines.ferries["p"].states

    def failing():
        if failures:
            raise failures.pop()
        return states()

    monkeypatch.setattr(means.engines.ferries["p"], "states", failing)
    part.order(orders(2))
    await until(lambda: means.told[-1].fence == (1, 2))
    assert not failures


async def test_a_plan_that_is_too_large_for_its_keeper_fails_the_pipe(made, monkeypatch):
    part, means, _ = made
    part.order(orders(1))
    await until(lambda: means.told)

    def follow(fence, plan):
        raise MessageInvalid("the plan has 20,000,000 bytes")

    monkeypatch.setattr(means.engines.keepers["p"], "follow", follow)
    part.order(orders(2))
    await until(lambda: means.told[-1].failed == "node n1: the plan has 20,000,000 bytes")


async def test_mirrors_that_cannot_be_set_up_fail_the_pipe_and_do_not_break_the_connection_to_the_keeper(
    made, monkeypatch
):
    part, means, _ = made
    part.order(orders(1))
    await until(lambda: means.told)

    def follow(plan, labels):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(means.engines.ferries["p"], "follow", follow)
    part.order(orders(2))
    await until(lambda: "oops" in means.told[-1].failed)


async def test_a_report_that_was_not_heard_is_said_again(made):
    part, means, _ = made
    means.unheard = NodeUnreachable("cut")
    part.order(orders(1))
    await until(lambda: part.followed == (1, 1))
    await asyncio.sleep(0.05)
    means.unheard = None
    await until(lambda: means.told)


async def test_a_pipe_that_its_coordinator_has_forgotten_ends_here(made, monkeypatch):
    part, means, gone = made
    monkeypatch.setattr(module, "FORGOTTEN", 0.05)
    part.order(orders(1))
    await until(lambda: means.told)
    means.unheard = NodeRefused("n2", 404, "no_such_pipe", "What?")
    part.order(orders(2))
    await until(lambda: gone)
    assert not means.engines.crew.alive


async def test_after_a_restart_the_keeper_is_found_and_nothing_begins_anew(made, tmp_path):
    part, means, _ = made
    part.order(orders(1))
    await until(lambda: means.told)
    await part.close()
    again = Means(tmp_path)
    again.engines = FakeEngines(means.engines.crew)
    second = Part("p", tmp_path / "orders", again, lambda _: None)
    second.recover(orders(1))
    await until(lambda: again.told and again.told[-1].fence == (1, 1))
    assert again.engines.ferries["p"].calls[:2] == ["release", "follow"]
    assert len(means.engines.crew.started) == 1
    await second.close()


async def test_after_a_reboot_it_is_told_that_all_is_lost(tmp_path):
    means = Means(tmp_path)
    part = Part("p", tmp_path / "orders", means, lambda _: None)
    part.recover(orders(1))
    await until(lambda: means.told and means.told[-1].lost)
    await part.close()


async def test_a_keeper_that_fails_in_its_first_plan_is_told_at_once(made):
    part, means, _ = made
    means.engines.crew.fails = "no shared memory"
    part.order(orders(1))
    await until(lambda: means.told)
    assert (means.told[-1].failed, means.told[-1].present, means.told[-1].fence) == ("no shared memory", True, (0, 0))
