"""Pipes over agents whose keepers only pretend: submission, records, takeover, the submitting process, forgetting."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from tests.cluster.agent_support import CLIENT, SPEC, FakeEngines, Node, running, start, until
from upipe.cluster import desk, part, routes, wire
from upipe.cluster.dealings import NodeReport, QueueState
from upipe.cluster.record import ENDED, Books, Shipment
from upipe.errors import NodeRefused
from upipe.settings import Place

pytestmark = pytest.mark.slow


def request(client: str = "", **changes) -> wire.PipeRequest:
    return wire.PipeRequest("words-1", msgspec.structs.replace(SPEC, **changes), client=client)


async def submit(node: Node, client: str = "") -> wire.PipeInfo:
    async with node.client() as there:
        return await there.call(routes.SUBMIT, request(client))


def info(node: Node) -> wire.PipeInfo:
    return node.agent.pipes.known.info("words-1")


async def follows(node: Node) -> None:
    """Until its part follows the newest orders."""
    def done() -> bool:
        part = node.agent.parts.all.get("words-1")
        return part is not None and part.followed == part.orders.fence > (0, 0)

    await until(done)


async def test_a_pipe_runs_on_two_nodes_completes_and_is_forgotten_by_all(tmp_path):
    async with running(tmp_path, "left", "right", "third") as nodes:
        left, right, _ = nodes
        told = await submit(left)
        assert told.seats == {"a": (left.id,), "b": (right.id,)}
        assert set(told.members) == {node.id for node in nodes}
        await follows(left)
        await follows(right)
        await until(lambda: info(left).told.up)
        assert (await submit(left)).epoch == 1, "asked twice, run once"
        left.engines.keepers["words-1"].end(("a", 0))
        right.engines.keepers["words-1"].end(("b", 0))
        for node in nodes:
            await until(lambda node=node: "words-1" in node.agent.pipes.history)
            assert info(node).told.state == "completed" and info(node).closed
            assert not node.agent.parts.all
            assert not list((node.data.path / "parts").iterdir())
            assert [path.name for path in (node.data.path / "records").iterdir()] == ["words-1@ended"]


async def test_the_pipes_of_a_job_end_with_it_and_no_others(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        job = f"{right.id}/script-1"
        wanted = {"mine": ("", ""), "other": (CLIENT.id, f"{right.id}/script-2"), "stays": ("", job),
                  "ends": (CLIENT.id, job)}  # fmt: skip
        async with left.client() as there:
            for name, (client, origin) in wanted.items():
                asked = msgspec.structs.replace(request(client), id=name, job=origin)
                await there.call(routes.SUBMIT, asked)
            with pytest.raises(NodeRefused, match="bad_body"):
                await there.call(routes.SUBMIT, msgspec.structs.replace(request(), job="no origin"))
        await until(lambda: wanted.keys() <= right.agent.pipes.entries.keys())
        await right.agent._requests.end_of_job(job)  # its coordinator is another node

        def told(name: str) -> wire.TellClient:
            return left.agent.pipes.known.info(name).told

        await until(lambda: told("ends").state == "stopped")
        assert told("ends").reasons == ()
        assert {told(name).state for name in wanted if name != "ends"} == {"running"}


async def test_where_no_keeper_starts_nothing_runs_and_the_pipe_fails_when_no_node_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "AGAIN", 0.01)
    async with running(tmp_path, "left", "right") as nodes, nodes[0].client() as there:
        ids = {node.id for node in nodes}
        anywhere = tuple(msgspec.structs.replace(one, place=Place(how="spread"), workers=2) for one in SPEC.processors)
        packed = tuple(msgspec.structs.replace(one, place=Place()) for one in SPEC.processors)
        known = nodes[0].agent.pipes.known
        for sick in nodes:  # spread: some of the pipe is to run there first
            sick.engines.crew.stillborn = ["no memory"] * part.TRIES
            await there.call(routes.SUBMIT, msgspec.structs.replace(request(processors=anywhere), id=f"on-{sick.id}"))
            await until(lambda sick=sick: known.info(f"on-{sick.id}").told.up, 10)
            [well] = ids - {sick.id}
            assert known.info(f"on-{sick.id}").seats == {"a": (well, well), "b": (well, well)}
            assert not sick.engines.crew.stillborn, "it was tried there"
        for node in nodes:
            node.engines.crew.stillborn = ["no memory"] * 20 * part.TRIES  # more than are asked for
        await there.call(routes.SUBMIT, request(processors=packed))
        await until(lambda: info(nodes[0]).told.state == "failed", 10)
        said = "node {} cannot start a keeper for the pipe (3 tries): no memory"
        assert set(info(nodes[0]).told.reasons) == {said.format(node.id) for node in nodes}


async def test_what_cannot_run_is_refused_with_reasons(tmp_path):
    async with running(tmp_path, "left") as nodes, nodes[0].client() as client:
        with pytest.raises(NodeRefused) as caught:
            await client.call(routes.SUBMIT, request())
        assert caught.value.code == "no_room" and "right" in caught.value.sentence
        with pytest.raises(NodeRefused) as caught:
            await client.call(routes.SUBMIT, request(processors=()))
        assert caught.value.code == "no_pipe"
        with pytest.raises(NodeRefused) as caught:
            await client.call(routes.SUBMIT, msgspec.structs.replace(request(), shipment=Shipment({"a": "ab" * 32})))
        assert caught.value.code == "contents_missing" and "ab" * 32 in caught.value.sentence
        with pytest.raises(NodeRefused) as caught:
            await client.call(routes.STOP, wire.Stopping(), pipe="nobody")
        assert caught.value.status == 404
        assert not list((nodes[0].data.path / "records").iterdir())


async def test_a_coordinator_that_restarts_goes_on_with_the_same_keepers(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        await submit(left)
        await follows(left)
        await follows(right)
        survivors = left.engines.crew
        await left.kill()
        nodes[0] = left = await start(tmp_path, "left", right.seed, engines=FakeEngines(survivors))
        await until(lambda: info(left).epoch == 2 and info(left).told.up)
        assert len(survivors.started) == len(right.engines.crew.started) == 1
        assert info(left).seats == {"a": (left.id,), "b": (right.id,)}
        left.engines.keepers["words-1"].end(("a", 0))
        right.engines.keepers["words-1"].end(("b", 0))
        await until(lambda: info(left).told.state == "completed" and info(left).closed)


async def test_another_agent_takes_over_from_a_dead_one(tmp_path):
    async with running(tmp_path, "left", "right", "third") as nodes:
        third = nodes[2]
        await submit(third)
        for node in nodes[:2]:
            await follows(node)
        await third.kill()
        living = nodes[:2]
        await until(lambda: any(node.agent.pipes.entries["words-1"].scheduler.coordinates for node in living))
        for node in living:
            node.engines.keepers["words-1"].end(("a" if node is nodes[0] else "b", 0))
        await until(lambda: all(info(node).told.state == "completed" for node in living))
        assert all(len(node.engines.crew.started) == 1 for node in living)


async def test_a_lost_keeper_is_told_and_its_worker_begins_anew(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        await submit(left)
        await follows(right)
        right.engines.keepers["words-1"].kill()
        await until(lambda: len(right.engines.crew.started) == 2)
        await follows(right)
        assert info(left).told.state == "running"


async def test_stop_at_any_node_ends_it_everywhere(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        await submit(left)
        await follows(left)
        await follows(right)
        async with right.client() as client:
            told = await client.call(routes.STOP, wire.Stopping(1.0), pipe="words-1")
        assert told.told.state == "stopped" and told.coordinator == left.id
        await until(lambda: not left.engines.crew.alive and not right.engines.crew.alive)
        await until(lambda: info(left).closed)


async def test_the_submitting_process_gets_orders_reports_and_hears_the_end(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        await submit(left, CLIENT.id)
        async with left.client() as client, right.client() as other:
            news = await client.call(routes.ATTEND, wire.Attendance(CLIENT.id), pipe="words-1")
            assert news.orders is not None and news.orders.plan.node == CLIENT.id
            assert set(news.nodes) == {left.id, right.id}
            with pytest.raises(NodeRefused) as caught:
                await other.call(routes.ATTEND, wire.Attendance(CLIENT.id), pipe="words-1")
            assert caught.value.code == "not_coordinator"
            with pytest.raises(NodeRefused) as caught:
                await client.call(routes.ATTEND, wire.Attendance("00000000000000dd"), pipe="words-1")
            assert caught.value.code == "other_node"
            await follows(left)
            await follows(right)
            left.engines.keepers["words-1"].end(("a", 0))
            right.engines.keepers["words-1"].end(("b", 0))
            number, fence, plan = 0, (0, 0), None
            async with asyncio.timeout(60):
                while news.told.state not in ENDED:
                    if news.orders is not None:
                        fence, plan = news.orders.fence, news.orders.plan
                    number += 1
                    queues = {one.plan.name: QueueState(True, True, True, Books()) for one in plan.queues}
                    report = NodeReport(CLIENT.id, number, fence, queues=queues, input_closed=True)
                    asked = wire.Attendance(CLIENT.id, fence, news.number, report, 1.0)
                    news = await client.call(routes.ATTEND, asked, pipe="words-1")
            assert news.told.state == "completed"


async def test_a_submitting_process_that_dies_ends_its_pipe(tmp_path, monkeypatch):
    monkeypatch.setattr(desk, "BROKEN", 3.0)
    async with running(tmp_path, "left", "right") as nodes:
        left = nodes[0]
        await submit(left, CLIENT.id)
        await follows(left)
        await follows(nodes[1])
        await until(lambda: info(left).told.up)
        client = left.client()
        news = await client.call(routes.ATTEND, wire.Attendance(CLIENT.id), pipe="words-1")
        asked = wire.Attendance(CLIENT.id, news.orders.fence, news.number, None, 20.0)
        waiting = asyncio.create_task(client.call(routes.ATTEND, asked, pipe="words-1"))
        await until(lambda: left.agent.pipes.entries["words-1"].desk._waiting == 1)
        began = time.monotonic()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await client.close()
        await until(lambda: info(left).told.state == "stopped", desk.SILENT - 15)
        assert time.monotonic() - began > 2.0, "it has BROKEN seconds to come back"
        assert "is gone" in info(left).told.reasons[0]


async def test_a_report_for_a_pipe_that_is_over_is_answered_by_a_stop(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        await submit(left)
        await follows(right)
        part, fence = right.agent.parts.all["words-1"], right.agent.parts.all["words-1"].orders.fence
        async with left.client() as client:
            await client.call(routes.STOP, wire.Stopping(1.0), pipe="words-1")
        await until(lambda: "words-1" in left.agent.pipes.history)
        await until(lambda: "words-1" not in right.agent.parts.all)
        left.agent.pipes.reported("words-1", NodeReport(right.id, 1 << 40, fence, True))
        ordered = []
        right.agent.parts.order = lambda *told: ordered.append(told)
        left.agent.pipes.reported("words-1", NodeReport(right.id, 2 << 40, fence, True))
        await until(lambda: ordered)
        assert ordered[0][1].plan is None and ordered[0][1].fence > fence
        assert part.orders.plan is None
        ordered.clear()  # and of a node whose agent was dead at the end, and whose keeper is lost
        left.agent.pipes.reported("words-1", NodeReport(right.id, 3 << 40, fence, False, True))
        await until(lambda: ordered)
        assert ordered[0][1].plan is None


async def test_metrics_tell_of_nodes_pipes_and_streams(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        await submit(left)
        await follows(left)
        await follows(right)
        await until(lambda: info(left).told.up)
        async with left.client() as client:
            text = (await client.fetch(routes.METRICS)).decode()
            mirrors = await client.call(routes.MIRRORS)
            one = await client.call(routes.MIRROR, mirror=mirrors.mirrors[0].mirror)
        assert one == mirrors.mirrors[0]
        assert 'upipe_nodes{state="alive"} 2.0' in text
        assert 'upipe_pipes{state="running"} 1.0' in text
        assert 'upipe_stream_frames_emitted_total{pipe="words-1",stream="e0-a-b"}' in text
        assert f'upipe_mirror_lag_bytes{{mirror="{one.mirror}"}} 10.0' in text


async def test_what_a_node_promised_is_known_to_all_and_taken_back_at_the_end(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        await submit(left)
        await follows(right)
        await until(lambda: left.agent.neighbours.live()[right.id].promised == {"words-1": {"cpu": 0.1}})
        assert right.agent.neighbours.live()[left.id].promised == {"words-1": {"cpu": 0.1}}
        async with left.client() as client:
            await client.call(routes.STOP, wire.Stopping(5.0), pipe="words-1")
        await until(lambda: not left.agent.neighbours.live()[right.id].promised)


async def test_the_node_that_may_not_go_on_alone_tells_its_user_and_who_asks_it(tmp_path):
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        await submit(left, CLIENT.id)
        await follows(right)
        await left.kill()
        await until(lambda: "its workers here run on" in info(right).told.waiting)
        assert any("pipe words-1: nothing is moved or begun" in line and left.id in line for line in right.said)
        async with right.client() as client:
            with pytest.raises(NodeRefused) as caught:
                await client.call(routes.ATTEND, wire.Attendance(CLIENT.id), pipe="words-1")
        assert caught.value.code == "not_coordinator" and f"once node {left.id} is back" in caught.value.sentence
        nodes[0] = await start(tmp_path, "left", right.seed, engines=FakeEngines(left.engines.crew))
        await until(lambda: not info(right).told.waiting and "pipe words-1: it goes on" in right.said)
