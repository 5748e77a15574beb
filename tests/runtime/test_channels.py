"""A worker's ends of its queues, on real rings in this process."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from upipe import EndOfStream, FrameTooLarge, MemQ
from upipe.graph.plan import OutputPlan
from upipe.runtime.channels import Ended, Inputs, Output, Outputs


@pytest.fixture
def make() -> Any:
    made: list[MemQ] = []

    def queue(size: int = 64 * 1024, producers: int = 1) -> MemQ:
        made.append(MemQ(size, producers=producers))
        made[-1].use_producer(0, 1)
        return made[-1]

    yield queue
    for one in made:
        one.close()
        one.unlink()


def inputs(*queues: MemQ) -> Inputs:
    return Inputs(tuple(MemQ.attach(one.name) for one in queues), tuple(f"q{number}" for number in range(len(queues))))


def outputs(*queues: MemQ, key: Any = None, replies: MemQ | None = None, of: Inputs | None = None) -> Outputs:
    edges = tuple(Output(OutputPlan(f"t{n}", (one.name,), 0), (one,), key) for n, one in enumerate(queues))
    return Outputs(edges, replies, of)


# ------------------------------------------------------------------ inputs


def test_the_next_try_finishes_the_frame_before_and_only_then(make: Any) -> None:
    queue = make()
    ends = inputs(queue)
    queue.put(1)
    assert ends.held is None
    assert ends.try_receive() == (True, 1) and ends.held is not None and queue.stats().finished == 0
    assert ends.try_receive() == (False, None) and ends.held is None and queue.stats().finished == 1


def test_finish_and_give_back_end_the_frame_in_hand(make: Any) -> None:
    queue = make()
    ends = inputs(queue)
    queue.put(1)
    ends.try_receive()
    ends.give_back()
    assert ends.held is None and ends.try_receive() == (True, 1)
    ends.finish(dead=True)
    assert ends.held is None and queue.stats().dead == 1
    ends.finish()  # nothing to finish: does nothing


def test_several_inputs_are_read_in_turn_and_name_their_source(make: Any) -> None:
    first, second = make(), make()
    ends = inputs(first, second)
    for number in range(3):
        first.put(number)
        second.put(10 + number)
    seen = []
    for _ in range(6):
        found, value = ends.try_receive()
        assert found and ends.held is not None
        seen.append((ends.sources[ends.held], value))
    assert [source for source, _ in seen] in (["q0", "q1"] * 3, ["q1", "q0"] * 3)
    assert sorted(value for _, value in seen) == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize("count", [1, 3])
def test_the_end_comes_when_every_input_ended_and_every_frame_is_finished(make: Any, count: int) -> None:
    queues = [make() for _ in range(count)]
    ends = inputs(*queues)
    for queue in queues:
        queue.put(1)
        queue.close_producer(0)
    for _ in range(count):
        assert ends.try_receive() == (True, 1)
    with pytest.raises(EndOfStream):
        ends.try_receive()
    with pytest.raises(EndOfStream):
        ends.receive()
    assert all(queue.stats().finished == 1 for queue in queues)


@pytest.mark.parametrize("count", [1, 2])
def test_receive_waits_and_times_out(make: Any, count: int) -> None:
    queues = [make() for _ in range(count)]
    ends = inputs(*queues)
    with pytest.raises(TimeoutError, match=r"no frame came within 0.01 s"):
        ends.receive(0.01)
    thread = threading.Thread(target=lambda: queues[-1].put(7))
    thread.start()
    assert ends.receive(20) == 7
    thread.join()


@pytest.mark.parametrize("count", [1, 2])
async def test_areceive_waits_and_times_out(make: Any, count: int) -> None:
    queues = [make() for _ in range(count)]
    ends = inputs(*queues)
    with pytest.raises(TimeoutError, match=r"no frame came within 0.01 s"):
        await ends.areceive(0.01)
    waiting = asyncio.create_task(ends.areceive(20))
    await asyncio.sleep(0)
    queues[-1].put(7)
    assert await waiting == 7


@pytest.mark.parametrize("count", [1, 2])
def test_interrupt_from_another_thread_ends_a_wait_and_finishes_the_frame_in_hand(make: Any, count: int) -> None:
    queues = [make() for _ in range(count)]
    ends = inputs(*queues)
    queues[0].put(1)
    assert ends.receive(20) == 1
    for ring in ends.rings:
        ring.bell(0)
    thread = threading.Timer(0.02, ends.interrupt)
    thread.start()
    with pytest.raises(Ended):
        ends.receive()
    thread.join()
    assert queues[0].stats().finished == 1
    queues[0].put(2)
    with pytest.raises(Ended):
        ends.try_receive()


async def test_interrupt_ends_an_awaited_wait(make: Any) -> None:
    ends = inputs(make(), make())
    waiting = asyncio.create_task(ends.areceive())
    await asyncio.sleep(0)
    ends.interrupt()
    with pytest.raises(Ended):
        await waiting


def test_covering_keeps_frames_until_they_are_ended_and_saves_before_there_is_nothing(make: Any) -> None:
    queue = make()
    ends = inputs(queue)
    saved: list[int] = []
    ends.covering = True
    ends.before_sleep = lambda: saved.append(1)
    for number in range(3):
        queue.put(number)
    held = []
    for number in range(3):
        assert ends.try_receive() == (True, number) and ends.held is not None
        held.append((ends.held, ends.held.detach_held()))
    assert queue.stats().finished == 0 and saved == []
    assert ends.try_receive() == (False, None) and saved == [1]
    for ring, position in held:
        ring.end(position)
    assert queue.stats().finished == 3


# ------------------------------------------------------------------ outputs


def test_an_emit_reaches_every_edge_or_none(make: Any) -> None:
    wide, narrow = make(), make(4096)
    out = outputs(wide, narrow)
    sent = 0
    while out.try_send(b"x" * 400):
        sent += 1
    assert wide.qsize() == narrow.qsize() == sent > 0
    with pytest.raises(FrameTooLarge):
        out.try_send(b"x" * 5000)
    assert wide.qsize() == sent
    assert out.send(b"x" * 400, timeout=0.01) is False


async def test_sends_wait_for_room_on_every_edge(make: Any) -> None:
    wide, narrow = make(), make(4096)
    out, reader = outputs(wide, narrow), MemQ.attach(narrow.name)
    while out.try_send(b"x" * 400):
        pass
    assert await out.asend(b"x" * 400, timeout=0.01) is False
    waiting = asyncio.create_task(out.asend(b"y" * 400, timeout=20))
    await asyncio.sleep(0)
    drained = [reader.get_nowait() for _ in range(narrow.qsize())]
    assert await waiting and reader.get_nowait() == b"y" * 400 and len(drained) > 1
    while out.try_send(b"x" * 400):
        pass
    thread = threading.Thread(target=lambda: [reader.get() for _ in range(5)])
    thread.start()
    assert out.send(b"z" * 400, timeout=20)
    thread.join()


def test_a_key_always_leads_to_the_same_queue_and_to_names_one_edge(make: Any) -> None:
    parts = (make(), make(), make())
    other = make()
    keyed = Output(OutputPlan("k", tuple(one.name for one in parts), 0, True), parts, lambda value: value["user"])
    out = Outputs((keyed, Output(OutputPlan("o", (other.name,), 0), (other,), None)), None)
    for number in range(60):
        assert out.try_send({"user": number % 6, "n": number})
    seen = [{value["user"] for value in (part.get() for _ in range(part.qsize()))} for part in parts]
    assert sum(len(users) for users in seen) == 6 and other.qsize() == 60
    assert out.try_send({"user": 1}, to="k") and other.qsize() == 60
    assert out.children("k") == 1 and out.children(None) == 2
    with pytest.raises(ValueError, match="edges lead to: 'k', 'o'"):
        out.try_send({"user": 1}, to="x")


def test_what_ends_a_call_goes_to_the_replies_and_else_to_the_sink(make: Any) -> None:
    sink, replies = make(), make()
    out = Outputs((Output(OutputPlan("", (sink.name,), 0), (sink,), None),), replies)
    assert out.try_send("plain") and out.try_send("answer", execution=9)
    assert sink.get() == "plain" and replies.get() == "answer" and replies.last_execution == 9
    assert out.children(None) == 0


def test_draining_refuses_emits_unless_a_frame_is_in_hand(make: Any) -> None:
    source, target = make(), make(4096)
    ends = inputs(source)
    out = outputs(target, of=ends)
    target.bell(1)
    source.put(1)
    assert ends.receive(20) == 1
    out.interrupt()
    while out.try_send(b"x" * 400):
        pass
    reader = MemQ.attach(target.name)
    thread = threading.Thread(target=lambda: [reader.get() for _ in range(5)])
    thread.start()
    assert out.send(b"last" * 100, timeout=20)  # and it may still wait for room
    thread.join()
    ends.finish()
    with pytest.raises(Ended):
        out.try_send(1)


async def test_interrupt_ends_a_send_that_waits(make: Any) -> None:
    target = make(4096)
    out = outputs(target)
    while out.try_send(b"x" * 400):
        pass
    waiting = asyncio.create_task(out.asend(b"x" * 400))
    await asyncio.sleep(0)
    out.interrupt()
    with pytest.raises(Ended):
        await waiting


def test_close_ends_the_stream_of_every_edge(make: Any) -> None:
    first, second, replies = make(), make(), make()
    reader = inputs(first, second)
    outputs(first, second, replies=replies).close(reply_producer=0)
    with pytest.raises(EndOfStream):
        reader.receive(20)
