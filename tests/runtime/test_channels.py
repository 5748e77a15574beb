"""A worker's ends of its queues, on real rings in this process."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from upipe import EndOfStream, FrameTooLarge, MemQ
from upipe.graph.plan import OutputPlan
from upipe.runtime.channels import LEAD, Ended, Inputs, Output, Outputs


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
    waiting = asyncio.create_task(out.asend(b"y" * 400, timeout=60))
    await asyncio.sleep(0)
    drained = [reader.get_nowait() for _ in range(narrow.qsize())]
    assert await waiting and reader.get_nowait() == b"y" * 400 and len(drained) > 1
    while out.try_send(b"x" * 400):
        pass
    thread = threading.Thread(target=lambda: [reader.get() for _ in range(5)])
    thread.start()
    assert out.send(b"z" * 400, timeout=60)
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
    assert out.send(b"last" * 100, timeout=60)  # and it may still wait for room
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


# ------------------------------------------------------------------ several queues of one edge


def free(local: int, *queues: MemQ, key: Any = None) -> Outputs:
    plan = OutputPlan("t", tuple(one.name for one in queues), 0, False, local)
    return Outputs((Output(plan, queues, key),), None)


def test_a_local_queue_goes_first_and_when_frames_wait_there_the_others_get_as_many(make: Any) -> None:
    local, half, empty = make(), make(), make()
    out = free(1, local, half, empty)
    assert out.only is None
    while half.room > half.capacity // 2:
        half.put(b"x" * 900)
    used = half.qsize()
    while local.capacity - local.room <= LEAD:
        assert out.try_send(b"x" * 900)
    assert (half.qsize(), empty.qsize()) == (used, 0)
    ahead = local.qsize()
    for _ in range(20):
        assert out.try_send(b"x" * 900)
    assert half.qsize() == used and local.qsize() + empty.qsize() == ahead + 20
    assert 0 <= local.qsize() - empty.qsize() <= ahead
    while out.try_send(b"x" * 900):
        pass
    assert max(one.room for one in (local, half, empty)) < 1024


def test_a_local_queue_whose_readers_keep_up_gets_all(make: Any) -> None:
    local, far = make(), make()
    out, reader = free(1, local, far), MemQ.attach(local.name)
    for number in range(100):
        assert out.try_send(number) and reader.get_nowait() == number
    assert far.qsize() == 0


def test_of_equal_queues_each_gets_its_share(make: Any) -> None:
    queues = [make(), make(), make()]
    out = free(0, *queues)
    for number in range(30):
        assert out.try_send(number)
    assert [one.qsize() for one in queues] == [10, 10, 10]


def test_a_value_too_large_for_what_is_left_here_goes_where_it_fits(make: Any) -> None:
    local, far = make(), make()
    out = free(1, local, far)
    for queue, frames in ((local, 22), (far, 20)):
        for _ in range(frames):
            queue.put(b"x" * 900)
    large = far.room - 128
    assert local.room < large and far.room - local.room <= LEAD, "the local one is chosen first"
    assert out.try_send(b"x" * large) and far.qsize() == 21


def test_a_free_choice_and_a_copy_for_everyone_go_together(make: Any) -> None:
    near, far, other = make(), make(), make()
    plan = OutputPlan("t", (near.name, far.name), 0, False, 1)
    edges = (Output(plan, (near, far), None), Output(OutputPlan("o", (other.name,), 0), (other,), None))
    out = Outputs(edges, None)
    sent = 0
    while out.try_send(b"x" * 900):
        sent += 1
    assert near.qsize() + far.qsize() == other.qsize() == sent > 0


async def test_who_waits_for_room_waits_for_that_of_any_queue(make: Any) -> None:
    near, far = make(4096), make(4096)
    out, reader = free(1, near, far), MemQ.attach(far.name)
    while out.try_send(b"x" * 400):
        pass
    assert out.send(b"x" * 400, timeout=0.01) is False
    waiting = asyncio.create_task(out.asend(b"y" * 400, timeout=60))
    await asyncio.sleep(0)
    for _ in range(reader.qsize()):
        reader.get_nowait()
    assert await waiting
    while out.try_send(b"x" * 400):
        pass
    thread = threading.Thread(target=lambda: [reader.get() for _ in range(5)])
    thread.start()
    assert out.send(b"z" * 400, timeout=60)
    thread.join()


@pytest.mark.parametrize("last", ["t1", ""])
def test_of_several_plain_edges_one_at_the_end_of_the_pipe_sends_answers_to_their_caller(make: Any, last: str) -> None:
    near, far, replies = make(), make(), make()
    plans = (OutputPlan("t0", (near.name,), 0), OutputPlan(last, (far.name,), 0))
    out = Outputs(tuple(Output(plan, (one,), None) for plan, one in zip(plans, (near, far), strict=True)), replies)
    assert out.plain == (near, far) and out.only is None
    assert out.try_send(1) and (near.qsize(), far.qsize(), replies.qsize()) == (1, 1, 0)
    assert out.try_send(2, execution=7) and out.try_send(3, execution=7, to="t0")
    other = far if last else replies
    assert [near.get_nowait() for _ in range(3)] == [1, 2, 3] and near.last_execution == 7
    assert other.get_nowait() == (1 if last else 2) and (far.qsize(), replies.qsize()) == (1, 0)


def test_a_key_a_free_choice_or_no_edge_leaves_no_plain_queues(make: Any) -> None:
    one, two = make(), make()
    plain = Output(OutputPlan("t", (one.name,), 0), (one,), None)
    keyed = Output(OutputPlan("k", (two.name,), 0), (two,), lambda value: value)
    several = Output(OutputPlan("f", (one.name, two.name), 0), (one, two), None)
    assert Outputs((plain,), None).plain == (one,)
    assert [Outputs(edges, None).plain for edges in ((plain, keyed), (several, plain), ())] == [(), (), ()]


# ------------------------------------------------------------------ queues that change


def known(ends: Inputs) -> dict[Any, str]:
    return dict(ends.sources)


def test_inputs_that_were_handed_over_are_read_from_the_next_try_and_the_others_left(make: Any) -> None:
    first, second = make(), make()
    ends = inputs(first)
    first.put(1)
    assert ends.try_receive() == (True, 1)
    more = MemQ.attach(second.name)
    ends.rewire({**known(ends), more: "new"})
    second.put(2)
    assert ends.try_receive() == (True, 2) and ends.held is not None and ends.sources[ends.held] == "new"
    assert first.stats().finished == 1 and first.empty()
    ends.rewire({more: "new"})
    first.put(3)
    assert ends.try_receive() == (False, None) and second.stats().finished == 1 and len(ends.rings) == 1
    second.close_producer(0)
    with pytest.raises(EndOfStream):
        ends.try_receive()
    ends.close()


def test_an_input_that_ended_does_not_come_back(make: Any) -> None:
    first, second = make(), make()
    ends = inputs(first, second)
    first.close_producer(0)
    assert ends.try_receive() == (False, None) and len(ends.rings) == 1
    ends.rewire({**known(ends), MemQ.attach(make().name): "new"})
    assert ends.try_receive() == (False, None) and len(ends.rings) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_who_sleeps_for_a_frame_sleeps_on_the_new_queue_too(make: Any, count: int) -> None:
    queues = [make() for _ in range(count)]
    ends, late = inputs(*queues), make()
    more = MemQ.attach(late.name)
    for ring in (*ends.rings, more):
        ring.bell(0)

    def change() -> None:
        ends.rewire({**known(ends), more: "new"})
        late.put(7)

    thread = threading.Timer(0.02, change)
    thread.start()
    assert ends.receive(20) == 7
    thread.join()
    with pytest.raises(TimeoutError):
        ends.receive(0.01)
    thread = threading.Timer(0.02, lambda: queues[0].put(8))
    thread.start()
    assert ends.receive(20) == 8
    thread.join()


async def test_an_awaited_wait_takes_the_new_queue_too(make: Any) -> None:
    ends, late = inputs(make()), make()
    waiting = asyncio.create_task(ends.areceive(20))
    await asyncio.sleep(0)
    ends.rewire({**known(ends), MemQ.attach(late.name): "new"})
    late.put(7)
    assert await waiting == 7


def test_a_drain_after_a_change_ends_the_wait_on_what_is_new(make: Any) -> None:
    ends, late = inputs(make()), make()
    more = MemQ.attach(late.name)
    for ring in (*ends.rings, more):
        ring.bell(0)
    ends.rewire({more: "new"})
    assert ends.try_receive() == (False, None)
    thread = threading.Timer(0.02, ends.interrupt)
    thread.start()
    with pytest.raises(Ended):
        ends.receive()
    thread.join()


def edge(local: int, *queues: MemQ) -> tuple[Output, ...]:
    return (Output(OutputPlan("t", tuple(one.name for one in queues), 0, False, local), queues, None),)


def test_outputs_that_were_handed_over_are_used_and_the_end_of_the_others_is_closed(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)  # whatever other tests left running
    first, second, third = make(), make(), make()
    reader = inputs(first)
    out = Outputs(edge(1, first), None)
    assert out.try_send(1) and out.only is first
    out.rewire(edge(1, first, second))
    first.set_policy(0)
    assert out.try_send(2) and out.only is None
    out.rewire(edge(0, third))
    assert out.try_send(3) and out.only is third and third.qsize() == 1
    assert [reader.receive(20) for _ in range(2)] == [1, 2]
    with pytest.raises(EndOfStream):
        reader.receive(20)
    out.close()
    assert third.stats().claimed == 1


def test_with_other_threads_about_the_end_of_a_queue_that_was_left_waits_for_theirs(make: Any) -> None:
    first, second = make(), make()
    stop = threading.Event()
    others = [threading.Thread(target=stop.wait) for _ in range(2)]
    for one in others:
        one.start()
    out = Outputs(edge(1, first), None)
    out.rewire(edge(1, second))
    assert out.try_send(1) and not first.ended
    stop.set()
    for one in others:
        one.join()
    out.close()


@pytest.mark.parametrize("count", [1, 2])
def test_who_sleeps_for_room_finds_that_of_the_new_queue(make: Any, count: int) -> None:
    full, late = [make(4096) for _ in range(count)], make(4096)
    out = Outputs(edge(1, *full), None)
    while out.try_send(b"x" * 400):
        pass
    for ring in (*full, late):
        ring.bell(1)
    thread = threading.Timer(0.02, lambda: out.rewire(edge(1, *full, late)))
    thread.start()
    assert out.send(b"y" * 400, timeout=60) and late.qsize() == 1
    thread.join()


async def test_an_awaited_send_finds_the_new_queue(make: Any) -> None:
    full, late = make(4096), make(4096)
    out = Outputs(edge(1, full), None)
    while out.try_send(b"x" * 400):
        pass
    waiting = asyncio.create_task(out.asend(b"y" * 400, timeout=60))
    await asyncio.sleep(0)
    out.rewire(edge(1, full, late))
    assert await waiting and late.qsize() == 1


@pytest.mark.slow
def test_changes_under_load_lose_and_repeat_nothing(make: Any) -> None:
    """One thread emits and one receives without a pause, while queues come and go between them."""
    queues = [make(1 << 16) for _ in range(6)]
    theirs = {one: MemQ.attach(one.name) for one in queues}
    for one in queues:
        one.bell(1)
        theirs[one].bell(0)
    out, ends = Outputs(edge(1, queues[0]), None), Inputs((theirs[queues[0]],), ("s",))
    total, got = 30_000, list[int]()

    def emit() -> None:
        for number in range(total):
            assert out.send(number, timeout=10)

    def take() -> None:
        while len(got) < total:
            got.append(ends.receive(10))
        ends.finish()

    threads = [threading.Thread(target=emit), threading.Thread(target=take)]
    for thread in threads:
        thread.start()
    ends.rewire(dict.fromkeys(theirs.values(), "s"))
    turn = 0
    while threads[0].is_alive():
        turn += 1
        out.rewire(edge(turn % 2, *(queues[(turn + more) % 6] for more in range(1 + turn % 3))))
    for thread in threads:
        thread.join(60)
    assert sorted(got) == list(range(total)) and turn > 1
