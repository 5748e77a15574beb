"""Processors: every kind of code, both ends of a worker, and how values, order and frames are kept."""

# ruff: noqa: ASYNC110, UP028 - the state of other processes has no event to wait for

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import DEADLINE, chain, collect, feed
from upipe import DType, Pipe, PipeFailed, Processor, processor, register_type
from upipe.errors import NotInWorker

pytestmark = [pytest.mark.system, pytest.mark.slow]


def count(limit: int = 100) -> Any:
    for number in range(limit):
        yield number


def numbers(limit: int) -> Processor:
    def source() -> Any:
        yield from range(limit)

    return Processor("numbers", source)


def double(value: Any) -> Any:
    return value * 2


# ------------------------------------------------------------------ kinds of code


async def test_the_seed_example_runs_as_it_is_written() -> None:
    limit = 20000

    async def processor_a() -> None:
        me = Processor("a")
        await me.connect()
        val = 1
        while True:
            if await me.emit(val, DType.U32):
                if val == limit:
                    break
                val += 1

    async def processor_b() -> None:
        proc = Processor("b")
        await proc.connect()
        while True:
            try:
                counter = await proc.get_sync()
                if counter == limit:
                    break
            except TimeoutError:
                break
        await proc.emit(counter)

    a = Processor("a", func=processor_a)
    b = Processor("b", func=processor_b)
    found, report = await collect(chain(a, b))
    assert found == [limit]
    assert report.edges[0].finished == limit


@pytest.mark.parametrize(
    "kind", ["sync", "async", "generator", "async generator", "lambda of a coroutine", "callable object"]
)
async def test_a_mapped_function_may_be(kind: str) -> None:
    async def coroutine(value: int) -> int:
        await asyncio.sleep(0)
        return value * 2

    def generator(value: int) -> Any:
        yield value * 2
        yield from ()

    async def async_generator(value: int) -> Any:
        yield value * 2

    class Doubler:
        async def __call__(self, value: int) -> int:
            return value * 2

    func: Any = {
        "sync": double, "async": coroutine, "generator": generator, "async generator": async_generator,
        "lambda of a coroutine": lambda value: coroutine(value), "callable object": Doubler(),
    }[kind]
    found, _ = await collect(chain(numbers(50), Processor("f", func)))
    assert found == [2 * number for number in range(50)]


async def test_none_filters_and_a_generator_multiplies() -> None:
    def odd(value: int) -> Any:
        return value if value % 2 else None

    def repeat(value: int) -> Any:
        for _ in range(value):
            yield value

    found, _ = await collect(chain(numbers(6), Processor("odd", odd), Processor("repeat", repeat)))
    assert found == [1, 3, 3, 3, 5, 5, 5, 5, 5]


async def test_a_source_may_be_an_async_generator() -> None:
    async def source() -> Any:
        for number in range(5):
            await asyncio.sleep(0)
            yield number

    assert (await collect(chain(Processor("s", source), Processor("d", double))))[0] == [0, 2, 4, 6, 8]


async def test_a_class_is_set_up_keeps_state_and_is_torn_down_in_its_worker() -> None:
    class Total:
        def __init__(self, config: int) -> None:
            self.total = config

        def setup(self) -> None:
            self.total += 1000

        def process(self, value: int) -> None:
            self.total += value

        def teardown(self) -> None:
            Processor("total").blocking.connect().emit_sync(self.total)

    found, _ = await collect(chain(numbers(100), Processor("total", Total, config=7)))
    assert found == [1000 + 7 + sum(range(100))]


async def test_a_class_may_be_async() -> None:
    class Total:
        async def setup(self) -> None:
            self.total = await asyncio.sleep(0, 1)

        async def process(self, value: int) -> Any:
            self.total += await asyncio.sleep(0, value)
            yield self.total

        async def teardown(self) -> None:
            await (await Processor("total").connect()).emit(-1)

    found, _ = await collect(chain(numbers(4), Processor("total", Total)))
    assert found == [1, 2, 4, 7, -1]


async def test_a_class_with_async_setup_may_have_a_plain_generator_for_process() -> None:
    class Twice:
        async def setup(self) -> None:
            self.times = 2

        def process(self, value: int) -> Any:
            for _ in range(self.times):
                yield value

    assert (await collect(chain(numbers(2), Processor("twice", Twice))))[0] == [0, 0, 1, 1]


async def test_config_reaches_drivers_functions_and_sources() -> None:
    def source(*, config: int) -> Any:
        yield config

    def add(value: int, *, config: int) -> int:
        return value + config

    async def last() -> None:
        me = await Processor("last").connect()
        async for value in me:
            await me.emit([value, me.config])

    last_one = Processor("last", last, config={"k": 3})
    pipe = chain(Processor("s", source, config=1), Processor("add", add, config=20), last_one)
    assert (await collect(pipe))[0] == [[21, {"k": 3}]]


async def test_the_decorator_makes_a_processor_that_stays_callable() -> None:
    @processor
    def plus(value: int) -> int:
        return value + 1

    @processor(name="times", workers=2, config=3)
    def multiply(value: int, config: int = 1) -> int:
        return value * config

    assert plus.name == "plus" and plus(1) == 2 and multiply.name == "times" and multiply.workers == 2
    found, _ = await collect(chain(numbers(20), plus, multiply))
    assert sorted(found) == [3 * (number + 1) for number in range(20)]


@processor
def decorated_in_a_module(value: int) -> int:
    return value + 1


@processor
class DecoratedClass:
    def process(self, value: int) -> int:
        return value + 1


@pytest.mark.parametrize("method", ["fork", "exec"])
async def test_a_decorated_function_of_a_module_ships(method: str) -> None:
    pipe = chain(numbers(3), decorated_in_a_module, DecoratedClass, start_method=method)
    decorated_in_a_module.edges.clear()
    decorated_in_a_module.add(DecoratedClass)
    assert (await collect(pipe))[0] == [2, 3, 4]
    decorated_in_a_module.edges.clear()
    DecoratedClass.edges.clear()


async def test_workers_share_the_input_and_know_their_index() -> None:
    async def work() -> None:
        me = await Processor("w").connect()
        async for value in me:
            await me.emit([me.index, me.epoch, value])
            await asyncio.sleep(0.001)

    found, report = await collect(chain(numbers(200), Processor("w", work, workers=3)))
    assert sorted(value for _, _, value in found) == list(range(200))
    assert {(index, epoch) for index, epoch, _ in found} == {(0, 1), (1, 1), (2, 1)}
    assert report.edges[0].finished == 200


# ------------------------------------------------------------------ a worker's ends


def test_outside_a_worker_connect_says_what_to_do() -> None:
    with pytest.raises(NotInWorker, match=r"add it to a Pipe"):
        Processor("a").blocking.connect()
    with pytest.raises(NotInWorker, match=r"await me\.connect"):
        Processor("a").ack()


async def test_a_plain_driver_blocks_instead_of_awaiting() -> None:
    def work() -> None:
        with Processor("w").blocking as me:
            for value in me:
                me.emit_sync(value + 1)

    def end() -> None:
        me = Processor("end").blocking.connect()
        while True:
            me.emit(me.get_sync())  # EndOfStream that escapes ends the worker cleanly

    found, report = await collect(chain(numbers(100), Processor("w", work), Processor("end", end)))
    assert found == list(range(1, 101))
    assert all(one.restarts == 0 for one in report.processors)


async def test_an_async_driver_ends_cleanly_when_end_of_stream_escapes() -> None:
    async def work() -> None:
        async with Processor("w") as me:
            while True:
                await me.emit(await me.get_sync())

    found, report = await collect(chain(numbers(10), Processor("w", work)))
    assert found == list(range(10)) and report.processors[1].restarts == 0


@pytest.mark.parametrize("blocking", [False, True])
async def test_get_is_none_and_get_sync_times_out_while_nothing_is_there(blocking: bool) -> None:
    async def awaited() -> None:
        me = await Processor("w").connect()
        begun = time.monotonic()
        assert await me.get() is None
        with pytest.raises(TimeoutError, match=r"0\.05"):
            await me.get_sync(timeout=0.05)
        await me.emit(time.monotonic() - begun)

    def plain() -> None:
        me = Processor("w").blocking.connect()
        begun = time.monotonic()
        assert me.get() is None
        with pytest.raises(TimeoutError, match=r"0\.05"):
            me.get_sync(timeout=0.05)
        me.emit(time.monotonic() - begun)

    pipe = chain(Processor("w", plain if blocking else awaited))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        waited = await anext(pipe.results())
        await pipe.wait_for_completion()
    assert 0.05 <= waited < 5


@pytest.mark.parametrize("blocking", [False, True])
async def test_emit_is_false_and_emit_sync_times_out_without_room(blocking: bool, tmp_path: Path) -> None:
    told = tmp_path / "told"

    async def awaited() -> None:
        me = await Processor("p").connect()
        while await me.emit(b"x" * 9000):
            pass
        with pytest.raises(TimeoutError, match=r"no room within 0\.02 s"):
            await me.emit_sync(b"x" * 9000, timeout=0.02)
        told.write_text("full")

    def plain() -> None:
        me = Processor("p").blocking.connect()
        while me.emit(b"x" * 9000):
            pass
        with pytest.raises(TimeoutError, match=r"no room within 0\.02 s"):
            me.emit_sync(b"x" * 9000, timeout=0.02)
        told.write_text("full")

    async def never() -> None:
        me = await Processor("c").connect()
        while not told.exists():  # the stream must stay full: this one looks at a file, not at its queue
            await asyncio.sleep(0.005)
        async for value in me:
            await me.emit(len(value))

    pipe = Pipe("full", settings=chain(numbers(1), emit_wait=0.02).settings)
    pipe.connect(Processor("p", plain if blocking else awaited), Processor("c", never), size=64 * 1024)
    found, _ = await collect(pipe)
    assert found == [9000] * len(found) and 5 <= len(found) <= 7


async def test_emit_sync_waits_for_room_and_loses_nothing() -> None:
    def produce() -> None:
        me = Processor("p").blocking.connect()
        for number in range(300):
            assert me.emit_sync(bytes([number % 256]) * 5000)

    async def aproduce() -> None:
        me = await Processor("q").connect()
        for number in range(300):
            assert await me.emit_sync(bytes([number % 256]) * 5000)

    pipe = Pipe("narrow", settings=chain(numbers(1)).settings)
    end = Processor("end", lambda value: value[0])
    pipe.connect(Processor("p", produce), end, size=64 * 1024)
    pipe.connect(Processor("q", aproduce), end, size=64 * 1024)
    found, _ = await collect(pipe)
    assert sorted(found) == sorted([number % 256 for number in range(300)] * 2)


async def test_the_frame_in_hand_tells_source_position_and_deliveries() -> None:
    async def look() -> None:
        me = await Processor("look").connect()
        assert me.frame is None and me.source == ""
        async for _ in me:
            frame = me.frame
            assert frame is not None
            await me.emit([me.source, frame.deliveries, frame.dtype, int(frame.position)])
            me.ack()
            assert me.frame is None and me.source == ""

    def one() -> Any:
        yield 1

    def two() -> Any:
        yield "two"

    look_at = Processor("look", look)
    pipe = chain(Processor("one", one), look_at)
    pipe.chain(Processor("two", two), look_at)
    found, _ = await collect(pipe)
    assert sorted(found) == [["one", 1, DType.I64, 0], ["two", 1, DType.STR, 0]]


async def test_emitted_counts_what_is_in_the_first_edge() -> None:
    async def source() -> None:
        me = await Processor("s").connect()
        for _ in range(5):
            await me.emit(me.emitted)

    assert (await collect(chain(Processor("s", source), Processor("d", double))))[0] == [0, 2, 4, 6, 8]


async def test_emit_to_names_one_edge_and_a_wrong_name_lists_them() -> None:
    async def route() -> None:
        me = await Processor("route").connect()
        with pytest.raises(ValueError, match="no edge leads to 'nowhere'; edges lead to: 'even', 'odd'"):
            await me.emit(0, to="nowhere")
        async for value in me:
            await me.emit(value, to="odd" if value % 2 else "even")

    pipe = chain(numbers(10), Processor("route", route), Processor("even", lambda value: ["even", value]))
    pipe.processors[1].add(Processor("odd", lambda value: ["odd", value]))
    found, _ = await collect(pipe)
    assert sorted(found) == sorted(["odd" if number % 2 else "even", number] for number in range(10))


async def test_two_tasks_may_wait_for_input_and_an_idle_worker_uses_no_cpu() -> None:
    async def work() -> None:
        me = await Processor("w").connect()

        async def one() -> None:
            async for value in me:
                await me.emit(value)

        before = time.process_time()
        tasks = [asyncio.create_task(one()) for _ in range(2)]
        await asyncio.sleep(0.4)  # idle: what is measured
        used = time.process_time() - before
        await me.emit(used)
        await asyncio.gather(*tasks)

    pipe = chain(Processor("w", work))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        results = pipe.results()
        used = await anext(results)
        for number in range(100):
            await pipe.emit(number)
        completing = asyncio.create_task(pipe.wait_for_completion())
        found = [value async for value in results]
        await completing
    assert sorted(found) == list(range(100))
    assert used < 0.1


async def test_gets_and_emits_may_become_tasks_whether_they_are_done_or_not() -> None:
    async def work() -> None:
        me = await Processor("w").connect()
        while True:
            value = await asyncio.create_task(me.get_sync())
            assert await asyncio.create_task(me.emit(value)) is True

    assert (await collect(chain(numbers(100), Processor("w", work))))[0] == list(range(100))


async def test_fan_in_is_fair_over_the_inputs(tmp_path: Path) -> None:
    filled = tmp_path / "many", tmp_path / "few"

    def many() -> Any:
        yield from ["many"] * 2000
        filled[0].touch()

    def few() -> Any:
        yield from ["few"] * 50
        filled[1].touch()

    async def slow() -> None:
        me = await Processor("in").connect()
        while not all(one.exists() for one in filled):
            await asyncio.sleep(0.005)
        async for value in me:
            await me.emit(value)

    into = Processor("in", slow)
    pipe = chain(Processor("many", many), into)
    pipe.chain(Processor("few", few), into)
    found, _ = await collect(pipe)
    assert found.count("many") == 2000 and found.count("few") == 50
    assert max(place for place, value in enumerate(found) if value == "few") < 150  # one of each in turn


# ------------------------------------------------------------------ order, keys, crashes


async def test_one_worker_gets_each_producers_values_in_order() -> None:
    def produce() -> None:
        me = Processor("p").blocking.connect()
        for number in range(500):
            me.emit_sync([me.index, number])

    found, _ = await collect(chain(Processor("p", produce, workers=3), Processor("c", lambda value: value)))
    for index in range(3):
        assert [number for worker, number in found if worker == index] == list(range(500))


def _die_sometimes(value: list[Any]) -> list[Any]:
    marker = Path(value[2]) / f"{value[0]}.{value[1]}"
    if value[1] % 40 == 7 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [value[0], value[1], os.getpid()]


@pytest.mark.chaos
async def test_a_keyed_edge_keeps_the_order_per_key_also_when_its_workers_die(tmp_path: Path) -> None:
    directory = str(tmp_path)

    def source() -> Any:
        for number in range(100):
            for key in ("a", "b", "c", "d", "e"):
                yield [key, number, directory]

    pipe = Pipe("keyed", settings=chain(numbers(1)).settings)
    pipe.connect(Processor("s", source), Processor("w", _die_sometimes, workers=3), key=0)
    found, report = await collect(pipe)
    by_key = defaultdict(list)
    for key, number, _ in found:
        by_key[key].append(number)
    for seen in by_key.values():
        assert list(dict.fromkeys(seen)) == list(range(100))  # in order; a value of a dead worker may be there twice
        assert seen == sorted(seen)
    assert len(by_key) == 5 and report.processors[1].restarts >= 10


class Summing:
    """Adds up, counts its frames, and is killed now and then at a random instruction by a thread of its own."""

    def setup(self) -> None:
        import random
        import threading

        self.total = self.frames = 0
        delay = random.uniform(0.01, 0.12)
        self.me = Processor("sum").blocking.connect()
        if self.me.epoch < 8:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def process(self, value: int) -> None:
        self.total += value
        self.frames += 1
        time.sleep(0.0001)

    def checkpoint(self) -> Any:
        return self.total, self.frames

    def restore(self, state: Any) -> None:
        self.total, self.frames = state

    def teardown(self) -> None:
        self.me.emit_sync([self.me.index, self.frames, self.total])


@pytest.mark.chaos
@pytest.mark.parametrize("workers", [1, 3])
async def test_checkpointed_state_counts_every_frame_exactly_once_whenever_its_worker_is_killed(workers: int) -> None:
    limit = 4000
    summing = Processor("sum", Summing, workers=workers, checkpoint_every=37, max_deliveries=1000)
    pipe = Pipe("sum", settings=chain(numbers(1)).settings)
    pipe.connect(numbers(limit), summing, key=(lambda value: value) if workers > 1 else None)
    found, report = await collect(pipe)
    last = {index: (frames, total) for index, frames, total in found}  # one that is killed at its very end tells twice
    frames, totals = zip(*last.values(), strict=True)
    assert (len(last), sum(frames), sum(totals)) == (workers, limit, sum(range(limit)))
    assert report.processors[1].restarts >= 3


@pytest.mark.chaos
async def test_a_resumed_source_neither_loses_nor_repeats_however_it_is_killed() -> None:
    def source() -> Any:
        import random
        import threading

        me = Processor("s").blocking.connect()
        if me.epoch < 6:
            threading.Timer(random.uniform(0.001, 0.03), os.kill, (os.getpid(), signal.SIGKILL)).start()
        for number in range(20000):
            if number == 19000 and me.epoch < 6:
                signal.pause()  # every life but the last is killed
            yield number

    found, report = await collect(chain(Processor("s", source, resume=True), Processor("c", lambda value: value)))
    assert found == list(range(20000))
    assert report.processors[0].restarts == 5


@pytest.mark.chaos
async def test_a_resumed_source_goes_on_over_a_keyed_edge() -> None:
    def source() -> Any:
        me = Processor("s").blocking.connect()
        for number in range(3000):
            if me.epoch == 1 and number == 1000:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number

    pipe = Pipe("keyed", settings=chain(numbers(1)).settings)
    end = Processor("c", lambda value: value, workers=2)
    pipe.connect(Processor("s", source, resume=True), end, key=lambda value: value)
    found, _ = await collect(pipe)
    assert sorted(found) == list(range(3000))


# ------------------------------------------------------------------ values


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def encode(self) -> bytes:
        return self.x.to_bytes(8, "little")

    @classmethod
    def decode(cls, data: memoryview) -> Point:
        return cls(int.from_bytes(data, "little"))


@pytest.mark.parametrize("method", ["fork", "exec"])
async def test_a_registered_type_travels_without_pickle(method: str) -> None:
    register_type(Point, name="tests.Point")

    def move(point: Point) -> Point:
        return Point(point.x + 1)

    pipe = chain(Processor("m", move), Processor("n", move), start_method=method, allow_pickle=False)
    found, _ = await feed(pipe, [Point(1), Point(40)])
    assert [type(one) for one in found] == [Point, Point] and [one.x for one in found] == [3, 42]


async def test_a_1080p_stream_and_a_16_mib_frame_pass_edges_of_the_default_size() -> None:
    def source() -> Any:
        for number in range(12):
            yield np.full((1080, 1920, 3), number, np.uint8)
        yield np.arange(2 * 1024 * 1024, dtype=np.uint64)

    def look(value: Any) -> Any:
        return [str(value.dtype), list(value.shape), int(value[0].max()), int(value[-1].max())]

    same = Processor("same", lambda value: value)
    found, _ = await collect(chain(Processor("s", source), same, Processor("look", look)))
    assert found[:12] == [["uint8", [1080, 1920, 3], number, number] for number in range(12)]
    assert found[12] == ["uint64", [2097152], 0, 2097151]


# ------------------------------------------------------------------ scripts


def script(directory: Path, text: str) -> str:
    path = directory / "script.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


async def test_an_entry_script_is_main_with_its_own_directory_and_config(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("FACTOR = 10\n")
    path = script(
        tmp_path,
        """
        import sys
        from upipe import Processor
        import beside
        if __name__ == "__main__":
            me = Processor("script").blocking.connect()
            for value in me:
                me.emit_sync([value * beside.FACTOR + me.config, sys.argv[0].endswith("script.py"), me.epoch])
        """,
    )
    found, report = await collect(chain(numbers(20), Processor("script", entry=path, config=5)))
    assert found == [[10 * number + 5, True, 1] for number in range(20)]
    assert report.processors[1].restarts == 0


async def test_an_entry_script_runs_in_the_interpreter_it_is_given(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        import asyncio, sys
        from upipe import Processor
        async def main():
            async with Processor("script") as me:
                await me.emit(sys.executable)
        asyncio.run(main())
        """,
    )
    link = tmp_path / "python"
    link.write_text(f'#!/bin/sh\nPYTHONPATH={":".join(p for p in sys.path if p)} exec {sys.executable} "$@"\n')
    link.chmod(0o755)
    found, _ = await collect(chain(Processor("script", entry=path, interpreter=str(link))))
    assert found == [sys.executable]


async def test_a_script_that_raises_is_reported_and_the_frame_in_hand_is_given_again(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        from upipe import Processor
        me = Processor("script").blocking.connect()
        for value in me:
            if value == 5 and me.frame.deliveries == 1:
                raise RuntimeError("five")
            me.emit_sync([value, me.frame.deliveries])
        """,
    )
    found, report = await collect(chain(numbers(8), Processor("script", entry=path)))
    assert found == [[number, 2 if number == 5 else 1] for number in range(8)]
    assert report.processors[1].restarts == 1


@pytest.mark.parametrize("ending", ["sys.exit(3)", "raise SystemExit('broken')", "os._exit(3)"])
async def test_a_script_that_exits_with_a_status_did_not_finish_its_frame(tmp_path: Path, ending: str) -> None:
    path = script(
        tmp_path,
        f"""
        import os, sys
        from upipe import Processor
        me = Processor("script").blocking.connect()
        for value in me:
            if value == 2 and me.epoch == 1:
                {ending}
            me.emit_sync(value)
        """,
    )
    found, report = await collect(chain(numbers(4), Processor("script", entry=path)))
    assert found == [0, 1, 2, 3] and report.processors[1].restarts == 1


@pytest.mark.parametrize("ending", ["break", "sys.exit()"])
async def test_a_script_that_ends_early_finished_its_frame_and_the_rest_is_dropped(tmp_path: Path, ending: str) -> None:
    path = script(
        tmp_path,
        f"""
        import sys
        from upipe import Processor
        me = Processor("script").blocking.connect()
        for value in me:
            me.emit_sync(value)
            if value == 2:
                {ending}
        """,
    )
    found, report = await collect(chain(numbers(10), Processor("script", entry=path)))
    assert found == [0, 1, 2]
    assert (report.edges[0].finished, report.edges[0].dropped) == (3, 7)


async def test_a_script_that_never_connects_ends_its_part_of_the_pipe(tmp_path: Path) -> None:
    found, report = await collect(chain(numbers(10), Processor("script", entry=script(tmp_path, "print('hello')"))))
    assert found == [] and report.edges[0].dropped == 10


async def test_a_script_that_fails_before_it_connects_fails_the_pipe_with_its_traceback(tmp_path: Path) -> None:
    from upipe import RestartPolicy

    pipe = chain(
        numbers(3),
        Processor("script", entry=script(tmp_path, "import nothing_of_this_name")),
        restart=RestartPolicy(limit=1),
    )
    with pytest.raises(PipeFailed, match="nothing_of_this_name") as raised:
        await collect(pipe)
    assert "processor 'script'" in str(raised.value) and "script.py" in str(raised.value)


async def test_an_interpreter_without_upipe_fails_the_pipe_at_once_and_says_how_to_mend_it(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {sys.executable} -I -S "$@"\n')
    other.chmod(0o755)
    pipe = chain(numbers(3), Processor("script", entry=script(tmp_path, "pass"), interpreter=str(other)))
    with pytest.raises(PipeFailed, match="cannot import uPipe") as raised:
        await collect(pipe)
    assert f"{other} -m pip install upipe" in str(raised.value)


# ------------------------------------------------------------------ what a program of its own shows


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=DEADLINE, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("notebook", [False, True])
def test_run_works_in_a_script_and_inside_a_running_loop_with_types_of_main(tmp_path: Path, notebook: bool) -> None:
    text = """
        import asyncio
        from upipe import Pipe, Processor, register_type

        @register_type(name="box")
        class Box:
            def __init__(self, value): self.value = value
            def encode(self): return bytes([self.value])
            @classmethod
            def decode(cls, data): return cls(data[0])

        def source():
            yield from (Box(number) for number in range(10))

        def check(box):
            assert type(box) is Box, type(box)
            return None

        pipe = Pipe("p")
        pipe.chain(Processor("s", source), Processor("check", check))
        """
    ending = """
        async def cell():
            print(pipe.run(timeout=100).edges[0].finished)
        asyncio.run(cell())
        """ if notebook else "        print(pipe.run(timeout=100).edges[0].finished)\n"
    assert program(tmp_path, textwrap.dedent(text) + textwrap.dedent(ending)).strip() == "10"
