"""Short cuts: the same as the methods they stand before, until something special comes along."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.memq.helpers import Memory
from upipe import DType, MemQ
from upipe.errors import EncodeError, FrameCorrupt, QueueClosed
from upipe.memq._ring import Way
from upipe.runtime.direct import YIELD_EVERY, short_cuts


class Bench:
    """The short cuts over real queues of a fake worker, and what they handed over: emits go to `ring`, which is read,
    and to `others`."""

    def __init__(self, *others: MemQ) -> None:
        self.ring = MemQ(4096)
        self.others = others
        self.slow: list[Any] = []
        self.took = 0
        self.unreadable: list[Exception] = []
        self.inputs = SimpleNamespace(rings=[self.ring], last=None)
        self.worker: Any = SimpleNamespace(
            way=Way(), outputs=SimpleNamespace(plain=(self.ring, *others)), inputs=self.inputs, took=self._took,
            unreadable=self._unreadable,
        )
        cuts = short_cuts("me", self.worker, *(self._slow(name) for name in ("emit", "emit_sync", "get_sync")))
        self.emit, self.emit_sync, self.get_sync = cuts["emit"], cuts["emit_sync"], cuts["get_sync"]

    def _took(self) -> None:
        self.took += 1

    def _unreadable(self, error: Exception) -> None:
        self.unreadable.append(error)
        self.ring.finish(dead=True)

    def _slow(self, name: str) -> Any:
        async def done(*args: Any, **options: Any) -> str:
            return "slow"

        def slow(*args: Any, **options: Any) -> Any:
            self.slow.append((name, args, options))
            return done()

        return slow


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    with made.ring:
        yield made


@pytest.fixture
def several() -> Iterator[Bench]:
    """With three queues out: one that blocks, one that drops, one that blocks."""
    with MemQ(1 << 16, policy="latest") as drops, MemQ(1 << 16) as last:
        made = Bench(drops, last)
        with made.ring:
            yield made


async def test_what_is_ready_needs_nothing_but_the_queue(bench: Bench) -> None:
    assert await bench.emit(1) is True and await bench.emit_sync(2, DType.U8) is True
    assert await bench.emit(value=True) is True and await bench.emit(None) is True
    assert bench.inputs.last is bench.ring
    assert [await bench.get_sync() for _ in range(4)] == [1, 2, True, None] and bench.slow == []
    assert bench.ring.holding is not None and bench.ring.stats().finished == 3  # the last is in hand


async def test_a_value_that_does_not_fit_raises_at_the_call_and_is_not_sent(bench: Bench) -> None:
    with pytest.raises(EncodeError):
        bench.emit(-1, DType.U32)
    assert bench.ring.empty() and bench.slow == []


async def test_without_room_without_a_frame_and_with_options_the_method_decides(bench: Bench) -> None:
    for _ in range(64):
        bench.ring.put_nowait(0)
    assert await bench.emit(1) == "slow"
    assert await bench.emit_sync(1, DType.U8, timeout=3) == "slow"
    assert await bench.emit(1, to="b") == "slow"
    for _ in range(64):
        assert await bench.get_sync() == 0
    assert await bench.get_sync(7) == "slow"
    assert await bench.emit_sync(1, to="b") == "slow" and bench.ring.empty()
    bench.ring.close_producer(0)
    bench.ring.finish()
    assert await bench.get_sync() == "slow"  # the end
    assert bench.slow == [
        ("emit", ("me", 1, None), {"to": None}), ("emit_sync", ("me", 1, DType.U8), {"timeout": 3, "to": None}),
        ("emit", ("me", 1, None), {"to": "b"}), ("get_sync", ("me", 7), {}),
        ("emit_sync", ("me", 1, None), {"timeout": None, "to": "b"}), ("get_sync", ("me", None), {}),
    ]


async def test_when_something_special_came_along_they_hand_over(bench: Bench) -> None:
    bench.worker.way.direct = False
    bench.ring.put(5)
    assert [await bench.emit(1), await bench.get_sync()] == ["slow", "slow"] and bench.ring.qsize() == 1


async def test_a_frame_of_a_call_is_noted_and_one_that_cannot_be_read_is_told(bench: Bench) -> None:
    bench.ring.send(1, execution=4)
    bench.ring.send(2)
    assert await bench.get_sync() == 1 and bench.took == 1
    memory = Memory(bench.ring)
    memory.flip(64, 8 * 57)  # the frame behind
    memory.close()
    assert await bench.get_sync() == "slow" and [type(one) for one in bench.unreadable] == [FrameCorrupt]
    assert bench.took == 1 and bench.ring.stats().dead == 1


@pytest.mark.parametrize("end", ["emit", "get_sync"])
async def test_other_tasks_get_a_turn_now_and_then(bench: Bench, end: str) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(3 * YIELD_EVERY):
        if end == "emit":
            await bench.emit(1)
            bench.ring.get_nowait()
        else:
            bench.ring.put_nowait(1)
            await bench.get_sync()
    task.cancel()
    assert turns >= 2


def everything(*queues: MemQ) -> list[list[Any]]:
    return [[one.get_nowait() for _ in range(one.qsize())] for one in queues]


async def test_what_goes_to_several_queues_is_in_each_of_them_once(several: Bench) -> None:
    drops, last = several.others
    assert await several.emit(1) is True and await several.emit_sync(2, DType.U8) is True
    assert await several.emit("a string of more than a granule" * 9) is True
    with pytest.raises(EncodeError):
        several.emit(-1, DType.U32)
    assert [await several.get_sync() for _ in range(2)] == [1, 2] and several.slow == []
    assert everything(last) == [[1, 2, "a string of more than a granule" * 9]]
    assert everything(drops)[0][-1] == "a string of more than a granule" * 9


async def test_while_one_of_several_is_full_none_gets_it_and_the_method_decides(several: Bench) -> None:
    for number in range(64):
        assert await several.emit(number) is True
    drops, last = several.others
    before = drops.stats()
    assert await several.emit(64) == "slow" and await several.emit_sync(64, DType.U8, timeout=3) == "slow"
    assert await several.emit(64, to="b") == "slow"
    assert last.qsize() == 64 and drops.stats() == before, "nothing was put, and nothing dropped"
    assert await several.get_sync() == 0 and await several.get_sync() == 1  # the first is finished: there is room
    assert await several.emit(64) is True
    assert everything(last) == [list(range(65))] and len(several.slow) == 3
    assert [await several.get_sync() for _ in range(63)] == list(range(2, 65))


async def test_one_of_several_that_is_closed_raises_and_the_others_get_nothing(several: Bench) -> None:
    drops, last = several.others
    drops.close()
    with pytest.raises(QueueClosed):
        several.emit(1)
    assert several.ring.empty() and last.empty()


async def test_when_something_special_came_along_several_queues_get_nothing_directly(several: Bench) -> None:
    several.worker.way.direct = False
    assert await several.emit(1) == "slow" and await several.emit_sync(1) == "slow"
    assert all(one.empty() for one in (several.ring, *several.others))


def test_without_plain_queues_there_is_no_short_cut_out() -> None:
    worker: Any = SimpleNamespace(way=Way(), outputs=SimpleNamespace(plain=()), inputs=SimpleNamespace(rings=[]))
    assert short_cuts("me", worker, None, None, None) == {}
