"""Classes with checkpoints: when state is written, what it covers, and what a death leaves."""

# ruff: noqa: ASYNC110 - the state of other processes has no event to wait for

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import DEADLINE, chain, collect
from upipe import EndOfStream, MemQ, Pipe, PipeFailed, Processor, ProcessorError
from upipe.runtime.channels import Inputs
from upipe.runtime.spool import load_checkpoint
from upipe.runtime.stateful import LOOK_EVERY, Stateful

pytestmark = [pytest.mark.system, pytest.mark.slow]


class Counting:
    """Emits its count; writes down each call."""

    def __init__(self, config: Any = None) -> None:
        self.log = Path(config["log"]) if config else None
        self.die_at = config.get("die_at", -1) if config else -1
        self.count = 0

    def tell(self, what: str) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(what + "\n")

    def setup(self) -> None:
        self.me = Processor("c").blocking.connect()
        self.tell("setup")

    def process(self, value: int) -> int:
        if value == self.die_at and self.me.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        return self.count

    def checkpoint(self) -> int:
        self.tell(f"checkpoint {self.count}")
        return self.count

    def restore(self, state: int) -> None:
        self.count = state
        self.tell(f"restore {state}")

    def teardown(self) -> None:
        self.tell("teardown")


def source(limit: int) -> Processor:
    def numbers() -> Any:
        yield from range(limit)

    return Processor("s", numbers)


async def test_state_is_written_every_so_many_frames_and_at_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found, _ = await collect(chain(source(25), Processor("c", Counting, config={"log": str(log)}, checkpoint_every=10)))
    told = log.read_text().split("\n")[:-1]
    assert found == list(range(1, 26)) and told[0] == "setup" and told[-2:] == ["checkpoint 25", "teardown"]
    counts = [int(one.split()[1]) for one in told[1:-1]]
    assert counts == sorted(counts)
    assert all(after - before <= 10 for before, after in zip([0, *counts], counts, strict=False))


@pytest.mark.chaos
async def test_after_a_death_setup_comes_before_restore_and_the_state_fits_the_frames(tmp_path: Path) -> None:
    log = tmp_path / "log"
    config = {"log": str(log), "die_at": 57}
    found, report = await collect(chain(source(100), Processor("c", Counting, config=config, checkpoint_every=10)))
    told = log.read_text().split("\n")[:-1]
    second = told[told.index("setup", 1) :]
    assert second[1].startswith("restore ") and int(second[1].split()[1]) <= 57
    assert max(found) == found[-1] == 100 and report.edges[0].finished == 100 and report.processors[1].restarts == 1


async def test_an_idle_worker_has_saved_what_it_did_and_holds_nothing() -> None:
    pipe = chain(Processor("c", Counting, checkpoint_every=1000))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        assert [await pipe.call(number) for number in range(5)] == [1, 2, 3, 4, 5]
        while pipe.stats().edges[0].finished < 5:
            await asyncio.sleep(0.005)
        (path,) = pipe._runner.held.spool.glob("checkpoint.*")  # type: ignore[union-attr]
        saved = load_checkpoint(path)
        assert saved is not None and sum(len(one) for one in saved.covered.values()) >= 1
        await pipe.wait_for_completion()


async def test_large_frames_do_not_wait_for_a_checkpoint_that_needs_more_of_them() -> None:
    pipe = Pipe("large", settings=chain(source(1)).settings)

    def big() -> Any:
        for _ in range(60):
            yield b"x" * 20_000

    pipe.connect(Processor("s", big), Processor("c", Counting, checkpoint_every=1000), size=64 * 1024)
    assert (await collect(pipe))[0] == list(range(1, 61))


class Ends:
    """Two inputs of a worker that is no process: what is taken from them, and what their rings hold."""

    def __init__(self, spool: Path, every: int) -> None:
        self.queues = MemQ(16 * 1024), MemQ(1 << 20)
        handles = tuple(MemQ.attach(queue.name) for queue in self.queues)
        self.assignment = SimpleNamespace(spool=str(spool), processor="c", index=0, checkpoint_every=every)
        self.inputs = Inputs(handles, ("s", "t"))

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
            queue.unlink()
        self.inputs.close()


@pytest.fixture
def ends(tmp_path: Path) -> Any:
    made = Ends(tmp_path, 1_000_000)
    yield made
    made.close()


def taken(ends: Ends, code: Stateful) -> int:
    """Take and cover a frame; how many are in no checkpoint then."""
    assert ends.inputs.try_receive()[0]
    code._cover()
    return len(code.covered)


def test_a_frame_held_for_the_next_checkpoint_does_not_keep_an_input_full_that_gives_no_more(ends: Ends) -> None:
    """Another worker finished all that came behind it; this one gets frames of its other input only."""
    code = Stateful(ends, Counting())  # type: ignore[arg-type]
    code._restore()
    pinned, flows = ends.queues
    other = MemQ.attach(pinned.name)
    while pinned.send(b"x" * 500):
        pass
    assert taken(ends, code) == 1
    while other.receive(0.0)[0]:
        other.finish()
    other.close()
    assert not pinned.send(b"x" * 500)
    for number in range(LOOK_EVERY):
        flows.put(number)
        taken(ends, code)
    assert pinned.send(b"x" * 500)
    assert len(code.covered) == 1


def test_a_backlog_is_no_reason_for_more_checkpoints(ends: Ends) -> None:
    code = Stateful(ends, Counting())  # type: ignore[arg-type]
    code._restore()
    while ends.queues[1].send(7):
        pass
    assert [taken(ends, code) for _ in range(3 * LOOK_EVERY)] == list(range(1, 3 * LOOK_EVERY + 1))


def test_large_frames_are_looked_at_sooner(ends: Ends) -> None:
    code = Stateful(ends, Counting())  # type: ignore[arg-type]
    code._restore()
    for _ in range(5):
        ends.queues[0].put(b"x" * 3000)
    assert [taken(ends, code) for _ in range(5)] == [1, 2, 0, 1, 2]


def test_starved_it_saves_before_it_sleeps_and_sees_the_end(ends: Ends) -> None:
    code = Stateful(ends, Counting())  # type: ignore[arg-type]
    code._restore()
    for queue in ends.queues:
        queue.put(1)
        queue.close()  # the end of its stream
    assert (taken(ends, code), taken(ends, code)) == (1, 2)
    assert ends.inputs.try_receive() == (False, None) and code.covered == []
    with pytest.raises(EndOfStream):
        ends.inputs.try_receive()


async def test_a_frame_that_raises_is_in_no_checkpoint_and_goes_its_own_way() -> None:
    class Fails(Counting):
        def process(self, value: int) -> int:
            if value == 3:
                raise ValueError("three")
            return super().process(value)

    pipe = chain(Processor("c", Fails, max_deliveries=2))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        found = await asyncio.gather(*(pipe.call(number) for number in range(6)), return_exceptions=True)
        report = await pipe.wait_for_completion()
    assert isinstance(found.pop(3), ProcessorError) and found == [1, 2, 3, 4, 5]
    assert [(one.value, one.deliveries) for one in pipe.dead_letters()] == [(3, 2)]
    assert (report.edges[0].finished, report.edges[0].dead) == (5, 1)


async def test_a_class_without_checkpoint_starts_afresh_after_a_death() -> None:
    class Plain:
        def __init__(self) -> None:
            self.count = 0

        def process(self, value: int) -> list[int]:
            self.count += 1
            if value == 5 and Processor("p").blocking.connect().epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return [value, self.count]

    found, _ = await collect(chain(source(10), Processor("p", Plain)))
    assert found == [[n, n + 1] for n in range(5)] + [[n, n - 4] for n in range(5, 10)]


class Unfinished:
    """Cannot bring its result home; another instance, which saw nothing, could."""

    def __init__(self) -> None:
        self.count = 0

    def process(self, value: int) -> None:
        self.count += 1

    def teardown(self) -> None:
        if self.count:
            raise ValueError("cannot write the result")


class UnfinishedAsync(Unfinished):
    async def setup(self) -> None:
        pass


@pytest.mark.parametrize("cls", [Unfinished, UnfinishedAsync])
async def test_a_teardown_that_raises_fails_the_pipe_instead_of_being_tried_on_an_empty_instance(cls: type) -> None:
    pipe = Pipe("unfinished")
    pipe.chain(source(10), Processor("sink", cls))
    with pytest.raises(PipeFailed, match="cannot write the result"):  # noqa: PT012 - it may be over before start() is
        await pipe.start()
        await pipe.wait_for_completion(DEADLINE)
