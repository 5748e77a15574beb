"""Ferries of several nodes at work: real rings, real connections, plans made by lay_out and node_plan."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.cluster.harbour import Harbour, harbour
from tests.cluster.test_lanes import CLIENT, one, seats
from tests.cluster.test_mirror import certificate, until
from upipe import MemQ
from upipe.cluster import ferry as ferries
from upipe.cluster import mending, stations
from upipe.cluster.dealings import NodeReport
from upipe.cluster.lanes import lay_out, relay
from upipe.cluster.record import Books
from upipe.errors import MirrorRefused, QueueNotFound, QueueStuck
from upipe.graph.spec import EdgeSpec, PipeSpec

AB = PipeSpec("p", (one("a", kind="source"), one("b")), (EdgeSpec("a", "b"),))
ABC = PipeSpec("p", (one("a", kind="source"), one("b"), one("c")), (EdgeSpec("a", "b"), EdgeSpec("b", "c")))
A_TO_B, B_TO_C = "e0-a-b", "e1-b-c"
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def event_loop_policy(request: Any) -> asyncio.AbstractEventLoopPolicy:
    return asyncio.DefaultEventLoopPolicy() if request.param == "asyncio" else uvloop.EventLoopPolicy()


def chain(**more: Any) -> Any:
    """a on 1, b on 2, c on 3."""
    return harbour(ABC, lay_out(ABC, seats(a="1", b="2", c="3"), ""), **more)


async def put_all(q: MemQ, values: list[int]) -> None:
    for value in values:
        await q.aput(value)


async def get_all(q: MemQ, count: int) -> list[int]:
    return [await q.aget() for _ in range(count)]


def finished(here: Harbour, node: str, stream: str) -> int:
    return here.nodes[node].state(stream).books.finished


async def test_data_flows_over_the_mirrors_of_a_chain_once_and_in_order() -> None:
    values = list(range(3000))
    async with chain() as here:
        one_, two, three = (here.nodes[name] for name in "123")
        began = time.monotonic()
        _, _, found = await asyncio.gather(
            put_all(one_.writer(A_TO_B), values),
            two.work(A_TO_B, B_TO_C, len(values)),
            get_all(three.reader(B_TO_C), len(values)),
        )
        assert found == values
        await until(lambda: finished(here, "1", A_TO_B) == finished(here, "2", B_TO_C) == len(values))
        assert 1 <= two.news <= (time.monotonic() - began) / ferries.CALM + 2
        assert sorted(here.dialled) == [("1", "2"), ("2", "3")]
        await until(lambda: two.state(A_TO_B).settled and three.state(B_TO_C).settled)
        infos = {(info.role, info.peer): info for node in (one_, two, three) for info in node.ferry.infos()}
        assert {info.state for info in infos.values()} == {"open"}
        assert infos["source", "2"].finished == infos["source", "2"].head == infos["sink", "1"].finished > 0
        assert infos["source", "2"].mirror.startswith("run:e0-a-b-r")


async def test_two_edges_share_one_connection() -> None:
    spec = PipeSpec(
        "p", (one("a", kind="source"), one("b"), one("c")), (EdgeSpec("a", "b"), EdgeSpec("a", "c"), EdgeSpec("b", "c"))
    )
    async with harbour(spec, lay_out(spec, seats(a="1", b="2", c="2"), "")) as here:
        writers = [here.nodes["1"].writer(stream) for stream in ("e0-a-b", "e1-a-c")]
        readers = [here.nodes["2"].reader(stream) for stream in ("e0-a-b", "e1-a-c")]
        values = list(range(1000))
        done = await asyncio.gather(
            *(put_all(q, values) for q in writers), *(get_all(q, len(values)) for q in readers)
        )
        assert done[2:] == [values, values]
        assert here.dialled == [("1", "2")]


async def test_the_head_of_a_chain_is_freed_only_when_what_came_of_it_left_the_next_node() -> None:
    async with chain() as here:
        one_, two, three = (here.nodes[name] for name in "123")
        here.nodes["3"].doors["2"].proxy.stall()  # what b emits stays on node 2
        one_.writer(A_TO_B).put(7)
        await two.work(A_TO_B, B_TO_C, 1)
        sink, source = two.queues[two.queue(A_TO_B)], one_.queues[one_.queue(A_TO_B)]
        for _ in range(50):  # many looks later
            await asyncio.sleep(0.002)
        assert sink.stats().finished == 1
        assert source.stats().finished == 0
        assert not two.state(A_TO_B).settled
        assert one_.state(A_TO_B) == ferries.QueueState(False, False, True, Books(1, 0, bytes=8))
        here.nodes["3"].doors["2"].proxy.flow()
        await until(lambda: source.stats().finished == 1)
        assert two.queues[two.queue(B_TO_C)].stats().finished == 0  # received there is enough
        await until(lambda: two.state(A_TO_B).settled)
        assert await three.reader(B_TO_C).aget() == 7
        await until(lambda: two.state(B_TO_C).empty)


async def test_through_a_queue_that_is_read_here_too() -> None:
    async with harbour(ABC, lay_out(ABC, seats(a="1", b="2", c="2"), CLIENT)) as here:
        one_, two, client = here.nodes["1"], here.nodes["2"], here.nodes[CLIENT]
        two.doors[CLIENT].proxy.stall()
        one_.writer(A_TO_B).put(7)
        await two.work(A_TO_B, B_TO_C, 1)
        source = one_.queues[one_.queue(A_TO_B)]
        await asyncio.sleep(0.01)
        assert source.stats().finished == 0  # it waits for c, on this node
        await two.work(B_TO_C, "results", 1)
        await asyncio.sleep(0.05)
        assert source.stats().finished == 0  # and for its result to reach the client
        two.doors[CLIENT].proxy.flow()
        await until(lambda: source.stats().finished == 1)
        assert await client.reader("results").aget() == 7
        await until(lambda: two.state("results").empty)
        assert {peer for _, peer in here.dialled} == {"2", "1"} and (CLIENT, "2") in here.dialled


async def test_links_cut_under_load_lose_and_repeat_nothing() -> None:
    values = list(range(6000))
    async with chain() as here:
        one_, two, three = (here.nodes[name] for name in "123")
        doors = [two.doors["1"], three.doors["2"]]

        async def disturb() -> None:
            for number in range(12):
                proxy = doors[number % 2].proxy
                before = proxy.connections
                proxy.budget = 20_000
                await until(lambda proxy=proxy, before=before: proxy.connections != before)

        disturbing = asyncio.create_task(disturb())
        _, _, found = await asyncio.gather(
            put_all(one_.writer(A_TO_B), values),
            two.work(A_TO_B, B_TO_C, len(values)),
            get_all(three.reader(B_TO_C), len(values)),
        )
        disturbing.cancel()
        for door in doors:
            door.proxy.budget = None
        assert found == values
        await until(lambda: finished(here, "1", A_TO_B) == finished(here, "2", B_TO_C) == len(values))
        assert len(here.dialled) > 6


async def test_a_lost_reader_what_it_had_not_finished_arrives_at_another_exactly_once() -> None:
    spec = PipeSpec("p", (one("a", kind="source"), one("b")), (EdgeSpec("a", "b"),))
    async with harbour(spec, lay_out(spec, seats(a="1", b="2"), ""), "3") as here:
        writer = here.nodes["1"].writer(A_TO_B)
        writer.put_many(range(300))
        first = await get_all(here.nodes["2"].reader(A_TO_B), 120)
        told = here.nodes["1"].queues[here.nodes["1"].queue(A_TO_B)]
        await until(lambda: told.stats().finished == 120)
        await here.lose("2")
        here.relay(seats(a="1", b="3"), "2")
        writer.put_many(range(300, 400))
        second = await get_all(here.nodes["3"].reader(A_TO_B), 280)
        assert first + second == list(range(400))
        await until(lambda: here.nodes["1"].state(A_TO_B).empty)
        assert told.stats().balanced and told.stats().redelivered == 0


async def test_a_lost_reader_and_none_elsewhere_the_home_waits_and_then_reads_itself() -> None:
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        node = here.nodes["1"]
        node.writer(A_TO_B).put_many(range(100))
        assert await get_all(here.nodes["2"].reader(A_TO_B), 40) == list(range(40))
        await until(lambda: finished(here, "1", A_TO_B) == 40)
        await here.lose("2")
        here.layout = relay(AB, here.layout, seats(a="1", b="-"), ["2"])
        plan = here.plans()["1"]
        node.ferry.release(plan)
        assert node.queues[node.queue(A_TO_B)].mirror[0] == 0  # before the keeper starts who reads it
        node.follow(plan)
        assert node.state(A_TO_B).settled and node.ferry.infos() == []
        here.relay(seats(a="1", b="1"))
        assert await get_all(node.reader(A_TO_B), 60) == list(range(40, 100))
        await until(lambda: node.state(A_TO_B).empty)


async def test_an_agent_that_died_in_between_still_gives_the_queue_back_to_its_readers() -> None:
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        node = here.nodes["1"]
        node.writer(A_TO_B).put_many(range(10))
        await until(lambda: node.state(A_TO_B).settled)
        node.ferry.close()  # as kill -9: the queue stands as it is
        node.ferry = ferries.Ferry("1", "run", node.lines, node._changed)
        await here.lose("2")
        home = node.queues[node.queue(A_TO_B)]
        assert home.mirror == (ferries.SOURCE_COPY, 1)
        here.relay(seats(a="1", b="1"), "2")
        assert home.mirror == (0, 1)
        assert await get_all(node.reader(A_TO_B), 10) == list(range(10))


async def test_a_restarted_agent_goes_on_by_position_and_the_gate_with_it() -> None:
    values = list(range(500))
    async with chain() as here:
        one_, two, three = (here.nodes[name] for name in "123")
        putting = asyncio.create_task(put_all(one_.writer(A_TO_B), values))
        working = asyncio.create_task(two.work(A_TO_B, B_TO_C, len(values)))
        found = await get_all(three.reader(B_TO_C), 100)
        two.ferry.close()
        two.ferry = ferries.Ferry("2", "run", two.lines, two._changed)
        assert two.plan is not None
        two.ferry.follow(two.plan, {name: q.name for name, q in two.queues.items()})
        found += await get_all(three.reader(B_TO_C), 400)
        assert found == values
        await asyncio.gather(putting, working)
        await until(lambda: finished(here, "1", A_TO_B) == len(values))


async def test_the_copy_of_a_lost_home_is_promoted_and_read_to_its_end() -> None:
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        two = here.nodes["2"]
        here.nodes["1"].writer(A_TO_B).put_many(range(50))
        name = two.queue(A_TO_B)
        await until(lambda: two.queues[name].stats().claimed == 50)
        await here.lose("1")
        here.relay(seats(a="2", b="2"), "1")
        state = two.ferry.states()[name]
        assert (state.empty, state.left, state.settled) == (False, True, True)
        assert await get_all(two.queues[name], 50) == list(range(50))
        assert two.ferry.states()[name].empty


async def test_the_client_node_emits_and_reads_and_what_it_read_is_freed() -> None:
    spec = PipeSpec("p", (one("a"),))
    async with harbour(spec, lay_out(spec, seats(a="1"), CLIENT)) as here:
        client, node = here.nodes[CLIENT], here.nodes["1"]
        values = list(range(500))
        _, _, found = await asyncio.gather(
            put_all(client.writer("in0"), values),
            node.work("in0", "results", 500),
            get_all(client.reader("results"), 500),
        )
        assert found == values
        await until(lambda: client.state("in0").empty and node.state("results").empty)
        assert here.dialled == [(CLIENT, "1")]


async def test_results_that_nobody_will_read_hold_nothing_up() -> None:
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        here.nodes["1"].writer(A_TO_B).put(1)
        await here.nodes["2"].work(A_TO_B, "results", 1)
        await until(lambda: here.nodes["1"].state(A_TO_B).empty)


async def test_states_through_a_whole_life() -> None:
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        one_, two = here.nodes["1"], here.nodes["2"]
        assert one_.state(A_TO_B).empty and one_.state(A_TO_B).left  # nobody has opened it yet
        writer = one_.writer(A_TO_B)
        await until(lambda: one_.state(A_TO_B).settled)
        assert not one_.state(A_TO_B).left
        writer.put_many(range(10))
        assert not one_.state(A_TO_B).empty
        await until(lambda: one_.state(A_TO_B).settled)
        reader = two.reader(A_TO_B)
        assert [await two.take(reader), reader.give_back()][0] == 0
        await get_all(reader, 10)
        await until(lambda: one_.state(A_TO_B).empty and two.state(A_TO_B).settled)
        assert one_.state(A_TO_B).books == Books(10, 10, bytes=80)
        assert two.state(A_TO_B).books == Books(10, 10, redelivered=1, bytes=80)
        writer.close_producer(0)
        assert one_.state(A_TO_B) == ferries.QueueState(True, True, True, Books(10, 10, bytes=80))
        here.ends = frozenset({A_TO_B})
        here.follow()
        await until(lambda: reader.ended)
        await until(lambda: {info.state for node in (one_, two) for info in node.ferry.infos()} == {"ended"})
        news = one_.news
        one_.follow(None)
        assert one_.ferry.states() == {} and one_.ferry.infos() == []
        assert news > 0


async def test_idle_ferries_use_no_cpu() -> None:
    async with chain() as here:
        here.nodes["1"].writer(A_TO_B).put(1)
        await here.nodes["2"].work(A_TO_B, B_TO_C, 1)
        await get_all(here.nodes["3"].reader(B_TO_C), 1)
        await until(lambda: here.nodes["1"].state(A_TO_B).empty and here.nodes["2"].state(B_TO_C).empty)
        for _ in range(20):  # the garbage collector and other threads may work in one of them, ferries that poll in all
            before, news = time.process_time(), [node.news for node in here.nodes.values()]
            await asyncio.sleep(0.5)
            used, told = time.process_time() - before, [node.news for node in here.nodes.values()]
            if used < 0.01 and told == news:
                break
        else:
            raise AssertionError(f"{used:.3f} s of the last half second, {told} told after {news}")


async def test_one_mirror_in_trouble_says_so_and_the_others_and_itself_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("upipe.cluster.mirror_end.AGAIN", 0.05)
    spec = PipeSpec("p", (one("a", kind="source"), one("b"), one("c")), (EdgeSpec("a", "b"), EdgeSpec("a", "c")))
    async with harbour(spec, lay_out(spec, seats(a="1", b="2", c="2"), "")) as here:
        node, states = here.nodes["1"], []
        sick = node.ferry._stations[node.queue("e0-a-b")].ring
        outgoing, troubles = MemQ.outgoing, 10

        def stuck(self: MemQ, *args: int) -> Any:
            nonlocal troubles
            if self is sick and troubles:
                troubles -= 1
                asyncio.get_running_loop().call_soon(lambda: states.extend(node.ferry.infos()))
                raise QueueStuck("a process holds a lock")
            return outgoing(self, *args)

        monkeypatch.setattr(MemQ, "outgoing", stuck)
        values = list(range(200))
        writers = [node.writer(stream) for stream in ("e0-a-b", "e1-a-c")]
        readers = [here.nodes["2"].reader(stream) for stream in ("e0-a-b", "e1-a-c")]
        done = await asyncio.gather(*(put_all(q, values) for q in writers), *(get_all(q, 200) for q in readers))
        assert done[2:] == [values, values]
        assert troubles == 0
        assert any("a process holds a lock" in info.state and info.state.startswith("failed") for info in states)
        said = sum("a process holds a lock" in one.getMessage() for one in caplog.records)
        assert 1 <= said < 5  # not at each try; on a busy machine a try may come so late that it is news
        assert len(here.dialled) == 1


@pytest.mark.parametrize("where", ["queue", "inside"])
async def test_a_gate_that_cannot_look_says_so_once_and_counts_as_broken_when_it_lasts(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """where: a queue cannot be looked at, or the gate itself fails."""
    monkeypatch.setattr(ferries, "AGAIN", 0.02)
    monkeypatch.setattr(stations, "AGAIN", 0.5)
    monkeypatch.setattr(stations, "BROKEN", 0.2)
    async with chain() as here:
        node, looks, trouble = here.nodes["2"], 0, True
        sick = node.ferry._stations[node.queue(A_TO_B)].ring
        settled, observe = MemQ.settled, node.ferry._gate.observe

        def fail() -> None:
            nonlocal looks
            looks += trouble
            if trouble:
                raise QueueStuck("a process holds a lock")

        def look(queue: MemQ) -> Any:
            if queue is sick:
                fail()
            return settled(queue)

        def decide(*samples: Any) -> Any:
            fail()
            return observe(*samples)

        monkeypatch.setattr(MemQ, "settled", look if where == "queue" else settled)
        monkeypatch.setattr(node.ferry._gate, "observe", decide if where == "inside" else observe)
        here.nodes["1"].writer(A_TO_B).put_many(range(10))
        await node.work(A_TO_B, B_TO_C, 10)
        await until(lambda: looks > 20 and node.state(A_TO_B).broken)
        assert node.state(A_TO_B).broken == "the gate cannot look: QueueStuck: a process holds a lock"
        assert node.state(A_TO_B).epoch == here.layout.of(A_TO_B)[0].pair + 1
        assert finished(here, "1", A_TO_B) == 0
        trouble = False
        await until(lambda: finished(here, "1", A_TO_B) == 10)
        said = [one.getMessage() for one in caplog.records if "the gate" in one.getMessage()]
        assert len(said) == 2 and "cannot look: QueueStuck: a process holds a lock" in said[0] and "again" in said[1]
        await until(lambda: not node.state(A_TO_B).broken)


async def test_a_queue_that_is_not_there_yet_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferries, "AGAIN", 0.01)
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        node = here.nodes["1"]
        assert node.plan is not None
        labels = {name: q.name for name, q in node.queues.items()}
        name = node.queue(A_TO_B)
        node.ferry.follow(node.plan, {**labels, name: "nowhere/p1.e0"})
        assert node.ferry.states()[name] == ferries.QueueState()
        assert node.ferry.infos()[0].state.startswith("failed: ")
        labels[name] = node.queues[name].name
        node.ferry.follow(node.plan, labels)
        await until(lambda: node.state(A_TO_B).settled)


async def test_a_try_that_failed_inside_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferries, "AGAIN", 0.01)
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        node = here.nodes["1"]
        assert node.plan is not None
        labels = {name: q.name for name, q in node.queues.items()}
        tries: list[str] = []
        attach, gone = MemQ.attach, labels[node.queue(A_TO_B)]

        def flaky(label: str) -> MemQ:
            if label == gone and len(tries) < 3:
                tries.append(label)
                raise QueueNotFound("not yet")
            return attach(label)

        def fails(plan: Any) -> None:
            if len(tries) == 2:
                tries.append("")
                raise ZeroDivisionError("a bug")
            rewire(plan)

        node.ferry.close()
        node.ferry = ferries.Ferry("1", "run", node.lines, node._changed)
        rewire = node.ferry._rewire
        monkeypatch.setattr(MemQ, "attach", staticmethod(flaky))
        monkeypatch.setattr(node.ferry, "_rewire", fails)
        node.ferry.follow(node.plan, labels)
        await until(lambda: node.state(A_TO_B).settled)
        assert tries == [gone, gone, ""]


async def test_a_mirror_that_failed_for_good_is_opened_again_and_nothing_is_lost_or_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ferries, "AGAIN", 0.02)
    publish, failures, values = MemQ.publish, 4, list(range(3000))

    def refuse(self: MemQ, *args: int) -> Any:
        nonlocal failures
        if failures and self.head > 4096 * (5 - failures):
            failures -= 1
            raise MirrorRefused("malformed", "the header at 4096 is none")
        return publish(self, *args)

    monkeypatch.setattr(MemQ, "publish", refuse)
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        one_, two = here.nodes["1"], here.nodes["2"]
        _, found = await asyncio.gather(
            put_all(one_.writer(A_TO_B), values), get_all(two.reader(A_TO_B), len(values))
        )
        assert found == values and failures == 0
        await until(lambda: one_.state(A_TO_B).empty)
        assert one_.state(A_TO_B).books.finished == len(values) and not one_.state(A_TO_B).broken


@pytest.mark.parametrize("lost", ["1", "2"])
async def test_a_copy_that_is_gone_is_told_as_broken_and_a_fresh_pair_carries_the_rest(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ferries, "AGAIN", 0.02)
    monkeypatch.setattr(stations, "BROKEN", 0.2)
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
        one_, node = here.nodes["1"], here.nodes[lost]
        writer = one_.writer(A_TO_B)
        writer.put_many(range(100))
        assert await get_all(here.nodes["2"].reader(A_TO_B), 40) == list(range(40))
        await until(lambda: finished(here, "1", A_TO_B) == 40)
        name = node.queue(A_TO_B)
        node.queues[name].unlink()  # somebody emptied /dev/shm; who has it open goes on
        node.ferry.close()
        node.ferry = ferries.Ferry(lost, "run", node.lines, node._changed)  # a restarted agent has nothing open
        assert node.plan is not None
        node.ferry.follow(node.plan, {one: q.name for one, q in node.queues.items()})
        assert not node.state(A_TO_B).broken  # it may pass
        writer.put_many(range(100, 200))
        await until(lambda: node.state(A_TO_B).broken)
        assert node.state(A_TO_B).epoch == here.layout.of(A_TO_B)[0].pair + 1
        for turn in range(mending.MOST + 1):
            reports = {each: NodeReport(each, turn, queues=known.ferry.states()) for each, known in here.nodes.items()}
            here.layout, reasons = mending.mended(AB, here.layout, reports, ())
            here.follow()
            if lost == "2":  # the keeper made a fresh copy
                assert reasons == ()
                assert await get_all(here.nodes["2"].reader(A_TO_B), 160) == list(range(40, 200))
                await until(lambda: one_.state(A_TO_B).empty)
                assert one_.state(A_TO_B).books == Books(200, 200, bytes=1600) and not node.state(A_TO_B).broken
                break
            if turn < mending.MOST:
                await until(lambda: node.state(A_TO_B).epoch == here.layout.of(A_TO_B)[0].pair + 1)
        else:  # nobody can get at what is in the home: the pipe is told
            (reason,) = reasons
            assert reason.startswith("edge a -> b from node 1 to node 2 cannot go on") and "node 1 says: " in reason


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
async def test_readers_lost_one_after_the_other_under_load_and_cuts_lose_nothing(seed: int) -> None:
    """What arrives twice had been taken by a node that was lost, and not told before."""
    chance, values, spare = random.Random(seed), list(range(4000)), list("3456")
    async with harbour(AB, lay_out(AB, seats(a="1", b="2"), ""), *spare) as here:
        putting = asyncio.create_task(put_all(here.nodes["1"].writer(A_TO_B), values))
        home = here.nodes["1"].queues[here.nodes["1"].queue(A_TO_B)]
        reader, found, told = "2", [], 0
        while spare:
            here.nodes[reader].doors["1"].proxy.budget = chance.randrange(1, 20_000)
            got = await get_all(here.nodes[reader].reader(A_TO_B), chance.randrange(1, 600))
            assert got == values[got[0] : got[0] + len(got)], "in order"
            assert got[0] == told, "goes on where the lost one had told"
            found = values[: got[-1] + 1]
            await here.lose(reader)
            lost, reader = reader, spare.pop(0)
            here.relay(seats(a="1", b=reader), lost)
            told = home.stats().finished
            assert told <= len(found)
        rest = await get_all(here.nodes[reader].reader(A_TO_B), len(values) - told)
        assert rest == values[told:]
        await putting
        await until(lambda: here.nodes["1"].state(A_TO_B).empty)
        assert home.stats().balanced


async def test_the_same_node_gets_a_fresh_copy_and_hears_of_it_before_or_after_the_source() -> None:
    for first, second in (("1", "2"), ("2", "1")):
        async with harbour(AB, lay_out(AB, seats(a="1", b="2"), "")) as here:
            here.nodes["1"].writer(A_TO_B).put_many(range(100))
            assert await get_all(here.nodes["2"].reader(A_TO_B), 30) == list(range(30))
            await until(lambda here=here: finished(here, "1", A_TO_B) == 30)
            here.layout = relay(here.spec, here.layout, seats(a="1", b="-"), ["2"])
            here.layout = relay(here.spec, here.layout, seats(a="1", b="2"))
            plans = here.plans()
            here.nodes[first].follow(plans[first])
            stopped = here.nodes[second].ferry.infos
            await until(lambda stopped=stopped: stopped()[0].state.startswith("failed"))  # it heard that it is replaced
            dials = len(here.dialled)
            here.nodes["2"].links[-1].close()  # greetings of both epochs meet on the next link too
            await until(lambda here=here, dials=dials: len(here.dialled) > dials and len(here.nodes["2"].links) > dials)
            await asyncio.sleep(0.02)
            here.nodes[second].follow(plans[second])
            assert await get_all(here.nodes["2"].reader(A_TO_B), 70) == list(range(30, 100))
            await until(lambda here=here: here.nodes["1"].state(A_TO_B).empty)


@pytest.mark.slow
async def test_the_same_over_tls(tmp_path: Path) -> None:
    values = list(range(2000))
    async with chain(tls=certificate(tmp_path)) as here:
        _, _, found = await asyncio.gather(
            put_all(here.nodes["1"].writer(A_TO_B), values),
            here.nodes["2"].work(A_TO_B, B_TO_C, len(values)),
            get_all(here.nodes["3"].reader(B_TO_C), len(values)),
        )
        assert found == values
        await until(lambda: finished(here, "1", A_TO_B) == len(values))
