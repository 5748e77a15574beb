"""What the parts of an agent need of other agents: contents, whoever has them."""

from __future__ import annotations

import hashlib
import sys

import pytest

from tests.cluster.agent_support import SPEC, met, running, start, until
from tests.cluster.disks import SmallDisk
from upipe.cluster import part, routes, wire
from upipe.cluster.record import Shipment
from upipe.errors import NodeUnreachable

pytestmark = pytest.mark.slow
DATA = b"what workers unpickle"
SHA = hashlib.sha256(DATA).hexdigest()
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SHIPMENT = Shipment({"a": SHA, "b": SHA}, python=PYTHON)
GONE = "f" * 16


async def test_contents_come_from_another_node_when_the_coordinator_is_gone(tmp_path) -> None:
    async with running(tmp_path, "a", "b", "c") as nodes:
        _, b, c = nodes
        async with c.client() as client:
            await client.upload(routes.PUT_CODE, DATA, sha256=SHA)
        job = await b.agent.parts.prepare("p", wire.Orders((2, 5), None, SPEC, SHIPMENT, GONE))
        assert b.agent.store.path(SHA).read_bytes() == DATA and job.code["a"] == str(b.agent.store.path(SHA))


async def test_contents_that_nobody_has_are_told_with_how_many_were_asked(tmp_path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        a, b = nodes
        orders = wire.Orders((1, 1), None, SPEC, SHIPMENT, a.id)
        with pytest.raises(NodeUnreachable, match=f"the content {SHA} is not here, and none of 1 other nodes gave it"):
            await b.agent.parts.prepare("p", orders)


async def test_a_full_disk_is_told_at_once_by_the_coordinator_and_makes_the_node_unfit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(part, "AGAIN", 0.1)
    monkeypatch.setattr(part, "READY", 3.0)
    async with running(tmp_path, "left", "right") as nodes:
        left, right = nodes
        data = bytes(1 << 20)
        sha = hashlib.sha256(data).hexdigest()
        async with left.client() as client:
            await client.upload(routes.PUT_CODE, data, sha256=sha)
            disk = SmallDisk(right.agent.store.directory, 1 << 16)
            try:
                shipment = Shipment({"a": sha, "b": sha}, python=PYTHON)
                await client.call(routes.SUBMIT, wire.PipeRequest("words-1", SPEC, shipment))
                known = left.agent.pipes.known
                await until(lambda: known.info("words-1").told.waiting, 10)
                said, state = known.info("words-1").told.waiting, known.info("words-1").told.state
                assert state == "running" and said.startswith(f"node {right.id} waits: the content {sha} cannot be")
                assert f"stored in {right.agent.store.directory}: No space left on device; it takes 1,048,576" in said
                await until(lambda: known.info("words-1").told.state == "failed", 20)
            finally:
                disk.close()
        [reason] = known.info("words-1").told.reasons
        assert "could not get what the pipe's code needs within 3 s: the content" in reason
        assert "make room on that disk" in reason and not known.info("words-1").told.waiting


async def test_a_worker_moves_from_a_dead_coordinator_to_a_node_that_has_nothing_of_the_pipe(tmp_path) -> None:
    async with running(tmp_path) as nodes:
        a = await start(tmp_path, "a", labels=("left=yes",))
        nodes.append(a)
        b = await start(tmp_path, "b", a.seed, labels=("right=yes",))
        nodes.append(b)
        await met(a, b)
        async with a.client() as client:
            await client.upload(routes.PUT_CODE, DATA, sha256=SHA)
            await client.call(routes.SUBMIT, wire.PipeRequest("words-1", SPEC, SHIPMENT))
        await until(lambda: b.engines.crew.started)
        c = await start(tmp_path, "c", a.seed, labels=("left=yes",))
        nodes.append(c)
        await met(a, b, c)
        await until(lambda: c.id in a.agent.pipes.entries["words-1"].scheduler.record.members)
        assert not c.agent.store.has(SHA)
        await a.kill()
        nodes.remove(a)
        await until(lambda: c.engines.crew.started)
        assert c.agent.store.path(SHA).read_bytes() == DATA
