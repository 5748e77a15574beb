"""Short cuts: the same as the methods they stand before, until something special comes along."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from upipe.errors import FrameError
from upipe.runtime.direct import YIELD_EVERY, short_cuts


class FakeRing:
    """Sends and receives what the test says."""

    def __init__(self) -> None:
        self.room, self.coming, self.last_execution = True, [], 0
        self.sent: list[tuple[Any, int]] = []

    def send(self, value: Any, dtype: int) -> bool:
        self.sent.append((value, dtype))
        return self.room

    def receive(self) -> Any:
        found = self.coming.pop(0) if self.coming else (False, None)
        if isinstance(found, Exception):
            raise found
        return found


class Bench:
    """The short cuts of a fake worker, and what they handed over."""

    def __init__(self) -> None:
        self.ring = FakeRing()
        self.slow: list[Any] = []
        self.took = 0
        self.unreadable: list[Exception] = []
        inputs = SimpleNamespace(rings=[self.ring], last=None)
        self.worker: Any = SimpleNamespace(
            direct=True, outputs=SimpleNamespace(only=self.ring), inputs=inputs, took=self._took,
            unreadable=self.unreadable.append,
        )
        cuts = short_cuts("me", self.worker, *(self._slow(name) for name in ("emit", "emit_sync", "get_sync")))
        self.emit, self.emit_sync, self.get_sync = cuts["emit"], cuts["emit_sync"], cuts["get_sync"]

    def _took(self) -> None:
        self.took += 1

    def _slow(self, name: str) -> Any:
        async def done(*args: Any, **options: Any) -> str:
            return "slow"

        def slow(*args: Any, **options: Any) -> Any:
            self.slow.append((name, args, options))
            return done()

        return slow


async def test_what_is_ready_needs_nothing_but_the_queue() -> None:
    bench = Bench()
    bench.ring.coming = [(True, 5)]
    assert await bench.emit(1) is True and await bench.emit_sync(2, 9) is True and await bench.get_sync() == 5
    assert bench.ring.sent == [(1, -1), (2, 9)] and bench.slow == []


async def test_without_room_without_a_frame_and_with_options_the_method_decides() -> None:
    bench = Bench()
    bench.ring.room = False
    assert await bench.emit(1) == "slow"
    assert await bench.emit_sync(1, 9, timeout=3) == "slow"
    assert await bench.get_sync(7) == "slow"
    bench.ring.coming = [None]  # the end
    assert await bench.get_sync() == "slow"
    assert bench.slow == [
        ("emit", ("me", 1, None), {}), ("emit_sync", ("me", 1, 9), {"timeout": 3}), ("get_sync", ("me", 7), {}),
        ("get_sync", ("me", None), {}),
    ]


async def test_when_something_special_came_along_they_hand_over_for_good() -> None:
    bench = Bench()
    bench.worker.direct = False
    bench.ring.coming = [(True, 5)]
    assert [await bench.emit(1), await bench.get_sync()] == ["slow", "slow"] and bench.ring.sent == []


async def test_a_frame_of_a_call_is_noted_and_one_that_cannot_be_read_is_told() -> None:
    bench = Bench()
    error = FrameError("bad")
    bench.ring.coming = [(True, 1), error]
    bench.ring.last_execution = 4
    assert await bench.get_sync() == 1 and bench.took == 1
    assert await bench.get_sync() == "slow" and bench.unreadable == [error]


@pytest.mark.parametrize("end", ["emit", "get_sync"])
async def test_other_tasks_get_a_turn_now_and_then(end: str) -> None:
    bench = Bench()
    bench.ring.coming = [(True, 1)] * 3 * YIELD_EVERY
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(3 * YIELD_EVERY):
        await (bench.emit(1) if end == "emit" else bench.get_sync())
    task.cancel()
    assert turns >= 2
