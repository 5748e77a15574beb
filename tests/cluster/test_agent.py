"""Agents of one process: they form a cluster, and go on after deaths."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.cluster.agent_support import met, running, start, until
from tests.support import crowded
from upipe.cluster import agent as module
from upipe.cluster import routes, tls, wire
from upipe.cluster.token import Secret
from upipe.errors import NodeCannotServe, NodeRefused, NodeUnproven

pytestmark = pytest.mark.slow


async def test_nodes_find_each_other_by_one_seed(tmp_path):
    began = time.monotonic()
    async with running(tmp_path, "a", "b", "c") as nodes:
        assert time.monotonic() - began < 2.0 * len(nodes) * crowded()
        for node in nodes:
            async with node.client() as client:
                members = await client.call(routes.MEMBERS)
                assert {one.info.node_id for one in members.members} == {one.id for one in nodes}
                assert {one.state for one in members.members} == {"alive"}
                status = await client.call(routes.NODE)
                assert (status.info.node_id, status.info.port, status.pipes) == (node.id, node.port, ())
        assert any("joined" in line for line in nodes[0].said)


async def test_a_node_that_leaves_is_known_as_such_and_a_dead_one_as_dead(tmp_path):
    """How soon, is in test_membership.py, where time is simulated."""
    async with running(tmp_path, "a", "b", "c") as nodes:
        a, b, c = nodes
        await b.agent.neighbours.leave()
        await until(lambda: b.id not in a.agent.neighbours.live() and b.id not in c.agent.neighbours.live())
        await c.kill()
        await until(lambda: c.id not in a.agent.neighbours.live())
        assert f"node {b.id} left" in a.said
        assert any(line.startswith(f"node {c.id} died") for line in a.said)


async def test_a_restarted_node_keeps_its_id_and_is_back_at_once(tmp_path):
    async with running(tmp_path, "a", "b") as nodes:
        a, b = nodes
        await b.kill()
        nodes[1] = again = await start(tmp_path, "b", a.seed)
        assert again.id == b.id
        assert again.agent.identity.life == b.agent.identity.life + 1
        await met(a, again)
        await until(lambda: a.agent.neighbours.live()[b.id].port == again.port)


async def test_a_node_of_another_cluster_is_refused_with_a_reason(tmp_path):
    async with running(tmp_path, "a") as nodes:
        nodes.append(await start(tmp_path, "b", nodes[0].seed, cluster="other"))
        await until(lambda: any("--cluster" in line for line in nodes[1].said))
        assert set(nodes[0].agent.neighbours.live()) == {nodes[0].id}


async def test_a_node_with_another_token_is_refused_with_a_reason_and_gets_none(tmp_path):
    async with running(tmp_path, "a") as nodes:
        other = Secret(bytes(range(1, 33)))
        nodes.append(await start(tmp_path, "b", nodes[0].seed, secret=other))
        await until(lambda: any("token" in line and "cannot join" in line for line in nodes[1].said))
        assert set(nodes[0].agent.neighbours.live()) == {nodes[0].id}
        with pytest.raises(NodeUnproven):
            await ask(nodes[0].client(secret=other))


async def test_a_port_in_use_is_one_sentence(tmp_path):
    async with running(tmp_path, "a") as nodes:
        with pytest.raises(NodeCannotServe, match=f"port {nodes[0].port} .*in use"):
            await start(tmp_path, "b", port=nodes[0].port)


async def test_the_unix_socket_answers_without_tls(tmp_path):
    from upipe.cluster.client import Client, Target

    async with running(tmp_path, "a") as nodes:
        client = Client(Target(unix=tmp_path / "a" / "node.sock"), Secret(bytes(range(32))))
        assert (await ask(client)).info.node_id == nodes[0].id


async def test_what_nodes_say_all_the_time_is_not_in_the_audit_log(tmp_path):
    async with running(tmp_path, "a", "b") as nodes:
        await asyncio.sleep(0)
        log = (tmp_path / "a" / "audit" / "log").read_text()
        assert "/v1/members/join" in log
        assert "/v1/members/ping" not in log
        async with nodes[0].client() as client:
            with pytest.raises(NodeRefused):
                await client.call(routes.LEAVE, wire_leave(nodes[1].id))
        assert "node_needed" in (tmp_path / "a" / "audit" / "log").read_text()


async def ask(client):
    async with client:
        return await client.call(routes.NODE)


def wire_leave(node: str):
    from upipe.cluster.messages import Leave

    return Leave(node, 1 << 32)


async def test_nobody_speaks_in_the_name_of_another_node(tmp_path):
    async with running(tmp_path, "a", "b", "c") as nodes:
        a, b, c = nodes
        with pytest.raises(NodeRefused) as caught:
            await b.agent.neighbours.peers.call(a.id, routes.LEAVE, wire_leave(c.id))
        assert caught.value.code == "other_node"
        assert c.id in a.agent.neighbours.live()


async def test_a_node_runs_jobs(tmp_path):
    async with running(tmp_path, "a") as nodes, nodes[0].client() as client:
        assert (await client.call(routes.JOBS)).jobs == ()
        with pytest.raises(NodeRefused) as caught:
            await client.call(routes.RUN_JOB, wire.JobRequest("j", ("x.py",), "ab" * 32))
        assert (caught.value.status, caught.value.code) == (409, "no_content")


async def test_a_job_runs_and_is_told_of_the_agent(tmp_path):
    import hashlib

    from upipe.cluster import archive

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "say.py").write_text("import os; print(os.environ['UPIPE_CLUSTER'])")
    data = archive.pack(tmp_path / "work")
    async with running(tmp_path, "a") as nodes, nodes[0].client() as client:
        sha = hashlib.sha256(data).hexdigest()
        await client.upload(routes.PUT_CODE, data, sha256=sha)
        info = await client.call(routes.RUN_JOB, wire.JobRequest("say", ("say.py",), sha))
        said = b"".join([piece async for piece in client.stream(routes.LOGS, job=info.job)])
        assert nodes[0].seed.encode() in said
        assert (await client.call(routes.JOB, job=info.job)).status == 0


async def test_certificates_are_renewed_when_due(tmp_path):
    from upipe.cluster.tls import RENEW, SKEW

    async with running(tmp_path, "a", "b") as nodes:
        agent = nodes[0].agent
        before = agent.credentials
        agent.renew(before.begins + SKEW + RENEW / 2)
        assert agent.credentials is before
        agent.renew(before.begins + SKEW + RENEW)
        assert agent.credentials is not before
        async with nodes[0].client() as client:
            await client.call(routes.NODE)
        await agent.neighbours.peers.call(nodes[1].id, routes.NODE)


async def test_draining_with_nothing_here_leaves_at_once(tmp_path):
    async with running(tmp_path, "a", "b") as nodes:
        a, b = nodes
        async with b.client() as client:
            await client.call(routes.DRAIN_NODE, wire.Stopping(600.0))
        await asyncio.wait_for(b.agent.ended.wait(), 60.0)
        await until(lambda: b.id not in a.agent.neighbours.live())
        assert f"node {b.id} left" in a.said


async def test_a_renewal_that_fails_is_told_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RENEW_EVERY", 0.01)
    async with running(tmp_path, "a", "b") as nodes:
        agent = nodes[0].agent
        before, issue = agent.credentials, tls.issue
        failures = [OSError(24, "Too many open files"), RuntimeError("what nobody thought of")]

        def failing(secret, identity, *more):
            if failures and identity.id == nodes[0].id:
                raise failures.pop(0)
            return issue(secret, identity, *more)

        monkeypatch.setattr(tls, "issue", failing)
        monkeypatch.setattr(tls, "RENEW", -tls.SKEW)
        await until(lambda: agent.credentials is not before)
        monkeypatch.undo()
        said = [line for line in nodes[0].said if "is not renewed" in line]
        assert "Too many open files" in said[0] and "what nobody thought of" in said[1] and len(said) == 2
        await agent.neighbours.peers.call(nodes[1].id, routes.NODE)


def test_a_clock_that_is_set_back_makes_a_certificate_due():
    made = tls.issue(Secret(bytes(32)), tls.Identity("client", "aa" * 8))
    assert not made.due(made.begins + tls.SKEW)
    assert made.due(made.begins - tls.SKEW) and made.due(made.begins + tls.SKEW + tls.RENEW)
