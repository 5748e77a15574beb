"""The submitting process is told at once what is new, and counts as gone only when it is."""

from __future__ import annotations

import asyncio

from upipe.cluster import desk as module
from upipe.cluster.dealings import TellClient
from upipe.cluster.desk import Desk
from upipe.cluster.wire import Orders


async def test_news_come_at_once_and_numbers_differ_between_coordinators():
    desk = Desk("c", lambda: None)
    assert await desk.wait(5, 10.0, lambda: False), "what is heard is not what there is"
    waiting = asyncio.create_task(desk.wait(desk.number, 100.0, lambda: False))
    await asyncio.sleep(0)
    desk.put(1, told=TellClient("running"))
    assert await asyncio.wait_for(waiting, 60.0)
    first = desk.number
    desk.put(2, orders=Orders((2, 1)))
    assert desk.number >> 32 == 2 and first >> 32 == 1
    assert desk.told == TellClient("running") and desk.orders == Orders((2, 1))
    assert await desk.wait(desk.number, 0.01, lambda: False), "patience ends"
    desk.close()


async def test_it_is_gone_when_nobody_polls(monkeypatch):
    monkeypatch.setattr(module, "SILENT", 0.02)
    gone = asyncio.Event()
    desk = Desk("c", gone.set)
    desk.expect()
    await asyncio.wait_for(gone.wait(), 60.0)


async def test_a_broken_connection_leaves_some_seconds_and_another_one_saves_it(monkeypatch):
    monkeypatch.setattr(module, "SLICE", 0.01)
    monkeypatch.setattr(module, "BROKEN", 0.05)
    gone: list[int] = []
    desk = Desk("c", lambda: gone.append(1))
    assert not await desk.wait(desk.number, 5.0, lambda: True)
    assert await desk.wait(desk.number, 0.1, lambda: False)
    assert not gone, "it came again in time"
    assert not await desk.wait(desk.number, 5.0, lambda: True)
    await asyncio.sleep(0.1)
    assert gone == [1]


async def test_nobody_is_expected_without_a_submitting_process(monkeypatch):
    monkeypatch.setattr(module, "SILENT", 0.0)
    gone: list[int] = []
    desk = Desk("", lambda: gone.append(1))
    desk.expect()
    other = Desk("c", lambda: gone.append(1))
    other.expect()
    other.close()
    other.close()
    await asyncio.sleep(0.02)
    assert not gone
