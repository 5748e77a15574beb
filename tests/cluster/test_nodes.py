"""Real agents, keepers and mirrors on one host: pipes run over two nodes, and outlive the agents."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cluster.agent_support import until
from tests.cluster.nodes import Nodes, nodes_of
from upipe.cluster import routes, wire
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.settings import MIB, Place, Settings

pytestmark = [pytest.mark.slow, pytest.mark.system]


def functions(out: Path, count: int, gate: Path | None = None) -> dict[str, Any]:
    """numbers -> double -> write; beyond the first hundred numbers wait for the file `gate`."""

    def numbers():
        import time

        for number in range(count):
            while gate is not None and number >= 100 and not gate.exists():
                time.sleep(0.01)
            yield number

    def double(value):
        return 2 * value

    def write(value):
        with open(out, "a") as file:
            file.write(f"{value}\n")

    return {"numbers": numbers, "double": double, "write": write}


def chain(middle: str, name: str = "chain") -> PipeSpec:
    """Ends on node 0, the middle where it is said."""

    def there(label: str) -> Place:
        return Place(labels=(label,))

    code = "00" * 32
    return PipeSpec(
        name,
        (
            ProcessorSpec("numbers", "source", code=code, resources=(("cpu", 0.01),), place=there("n0")),
            ProcessorSpec("double", "map", code=code, resources=(("cpu", 0.01),), place=there(middle)),
            ProcessorSpec("write", "map", code=code, resources=(("cpu", 0.01),), place=there("n0")),
        ),
        (EdgeSpec("numbers", "double"), EdgeSpec("double", "write")),
        Settings(edge_bytes=MIB),
    )


def balanced(info: wire.PipeInfo, count: int) -> None:
    for stream in ("e0-numbers-double", "e1-double-write"):
        books = info.told.books[stream]
        assert (books.emitted, books.finished, books.dead, books.dropped) == (count, count, 0, 0), (stream, books)


def lines(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


async def nothing_left(nodes: Nodes) -> None:
    await until(lambda: not nodes.keepers())
    for node in nodes.agents:
        await until(lambda node=node: not any((nodes.data(node) / "parts").iterdir()))


@pytest.mark.parametrize("middle", ["n0", "n1"])
async def test_a_pipe_submitted_by_http_runs_to_its_end_over_two_nodes(tmp_path, middle):
    out = tmp_path / "out"
    async with nodes_of(2, tmp_path) as nodes:
        info = await nodes.submit(0, chain(middle), functions(out, 2000))
        assert info.seats["double"] == (nodes.id(int(middle[1:])),)
        info = await nodes.ended(0, "chain-1")
        assert info.told.state == "completed", (info, nodes.said(0), nodes.said(1))
        balanced(info, 2000)
        assert lines(out) == [2 * number for number in range(2000)]
        await nothing_left(nodes)
        info = await nodes.ended(1, "chain-1")
        assert info.told.state == "completed"


@pytest.mark.parametrize("killed", [0, 1])
async def test_an_agent_is_killed_and_restarted_and_its_workers_run_on(tmp_path, killed):
    out, gate = tmp_path / "out", tmp_path / "gate"
    async with nodes_of(2, tmp_path, patient=True) as nodes:
        await nodes.submit(0, chain("n1"), functions(out, 1000, gate))
        await until(lambda: len(lines(out)) >= 50)
        before = pids(nodes)
        assert len(before) == 3
        nodes.kill(killed)
        gate.touch()
        nodes.start(killed)
        info = await nodes.ended(0, "chain-1")
        assert info.told.state == "completed", (info, nodes.said(0), nodes.said(1))
        balanced(info, 1000)
        assert lines(out) == [2 * number for number in range(1000)]
        assert all(crew.restarts == 0 for crew in info.told.crews.values()), info.told.crews
        await nothing_left(nodes)


def pids(nodes: Nodes) -> list[int]:
    """Of all workers: children of children of the keepers."""
    found = []
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            if "#" in (path.parent / "comm").read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    keepers = set(nodes.keepers())
    return sorted(one for one in found if keepers & set(_ancestors(one, parents)))


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found = []
    while pid := parents.get(pid, 0):
        found.append(pid)
    return found


async def test_sigterm_on_the_only_node_keeps_workers_for_the_next_agent(tmp_path):
    out, gate = tmp_path / "out", tmp_path / "gate"
    async with nodes_of(1, tmp_path) as nodes:
        await nodes.submit(0, chain("n0"), functions(out, 500, gate))
        await until(lambda: len(lines(out)) >= 50)
        before = pids(nodes)
        assert nodes.kill(0, signal.SIGTERM) == 0
        assert pids(nodes) == before
        assert "go on without an agent" in nodes.said(0)
        nodes.start(0)
        await nodes.met(0)
        assert pids(nodes) == before
        gate.touch()
        info = await nodes.ended(0, "chain-1")
        assert info.told.state == "completed"
        balanced(info, 500)


async def test_a_pipe_is_stopped_from_the_other_node(tmp_path):
    out, gate = tmp_path / "out", tmp_path / "gate"
    async with nodes_of(2, tmp_path) as nodes:
        await nodes.submit(0, chain("n1"), functions(out, 500, gate))
        await until(lambda: len(lines(out)) >= 50)
        info = await nodes.call(1, routes.STOP, wire.Stopping(1.0), pipe="chain-1")
        assert info.told.state == "stopped"
        assert (await nodes.ended(0, "chain-1")).told.state == "stopped"
        await nothing_left(nodes)


async def test_a_missing_package_fails_the_pipe_with_its_name(tmp_path):
    import hashlib

    from upipe.cluster.record import Shipment

    async with nodes_of(1, tmp_path) as nodes:
        async with nodes.client(0) as client:
            data = b"never unpickled here"
            sha = hashlib.sha256(data).hexdigest()
            await client.upload(routes.PUT_CODE, data, sha256=sha)
            shipment = Shipment(dict.fromkeys(("numbers", "double", "write"), sha), packages={"no-such-thing": "1.0"})
            await client.call(routes.SUBMIT, wire.PipeRequest("chain-1", chain("n0"), shipment))
        info = await nodes.ended(0, "chain-1")
        assert info.told.state == "failed"
        assert "no-such-thing==1.0" in info.told.reasons[0] and nodes.id(0) in info.told.reasons[0]
        assert not os.listdir(nodes.data(0) / "pipes")


async def test_a_second_sigterm_ends_at_once_and_the_next_agent_goes_on(tmp_path):
    out, gate = tmp_path / "out", tmp_path / "gate"
    async with nodes_of(2, tmp_path) as nodes:
        info = await nodes.submit(0, chain("n1"), functions(out, 500, gate))
        await until(lambda: len(lines(out)) >= 50)
        nodes.agents[1].send_signal(signal.SIGTERM)
        assert info.seats["double"] == (nodes.id(1),)
        await until(lambda: "drains" in nodes.said(1), 10)  # two signals that both wait are one
        nodes.agents[1].send_signal(signal.SIGTERM)  # its only worker is pinned there: it could never move
        assert nodes.agents[1].wait(60) == 0
        assert "ends at once" in nodes.said(1)
        nodes.start(1)
        gate.touch()
        info = await nodes.ended(0, "chain-1")
        assert info.told.state == "completed"
        balanced(info, 500)


async def test_draining_moves_workers_that_may_run_elsewhere(tmp_path):
    out, gate = tmp_path / "out", tmp_path / "gate"
    async with nodes_of(2, tmp_path) as nodes:
        spec = chain("n1")
        place = Place(how="spread")
        free = [msgspec.structs.replace(one, place=place) if one.name == "double" else one for one in spec.processors]
        free[1] = msgspec.structs.replace(free[1], workers=2)
        spec = msgspec.structs.replace(spec, processors=tuple(free))
        info = await nodes.submit(0, spec, functions(out, 500, gate))
        assert set(info.seats["double"]) == {nodes.id(0), nodes.id(1)}
        await until(lambda: len(lines(out)) >= 50)
        nodes.agents[1].send_signal(signal.SIGTERM)
        await until(lambda: nodes.agents[1].poll() is not None)
        assert nodes.agents[1].returncode == 0
        assert "go on without an agent" not in nodes.said(1), nodes.said(1)
        assert set((await nodes.info(0, "chain-1")).seats["double"]) == {nodes.id(0)}
        gate.touch()
        info = await nodes.ended(0, "chain-1")
        assert info.told.state == "completed"
        balanced(info, 500)
        assert sorted(lines(out)) == [2 * number for number in range(500)]
        await until(lambda: not nodes.keepers())
