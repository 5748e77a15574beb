"""Pipes and scripts submitted to agents that are processes of their own, some of which are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.cluster.nodes import ROOT, Nodes, nodes_of
from tests.support import free_port
from upipe import Pipe, Place, Processor
from upipe.cluster import routes, token
from upipe.cluster.submitting import forgotten

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.timeout(240)]
DEADLINE = 200.0
SUBMITTER = """
import asyncio, sys
from upipe import Pipe, Processor

async def main():
    pipe = Pipe("orphan")
    pipe.add(Processor("a", len, workers=2))
    await pipe.start(cluster=sys.argv[1])
    print(await pipe.call("four"), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def double(value: int) -> int:
    return 2 * value


def environment(nodes: Nodes) -> dict[str, str]:
    return {**os.environ, token.VARIABLE: str(nodes.token), "PYTHONPATH": str(ROOT)}


async def until_gone(nodes: Nodes, *which: int) -> None:
    """Until nothing of any pipe is left on these."""
    for node in which:
        while (await nodes.call(node, routes.NODE)).pipes:  # noqa: ASYNC110 - the state of another process
            await asyncio.sleep(0.05)


async def test_data_goes_on_when_the_agent_under_the_workers_dies_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(DEADLINE), nodes_of(2, tmp_path, patient=True) as nodes:
        monkeypatch.setenv(token.VARIABLE, str(nodes.token))
        pipe = Pipe("survives")
        pipe.add(Processor("a", double, place=Place(labels=("n1",)), workers=2))
        await pipe.start(cluster=nodes.address(0))
        found: list[int] = []

        async def read() -> None:
            async for one in pipe.results():
                found.append(one)

        reading = asyncio.create_task(read())
        for value in range(200):
            assert await pipe.emit(value)
        nodes.agents[1].kill()
        nodes.agents[1].wait()
        nodes.start(1)
        for value in range(200, 400):
            assert await pipe.emit(value)
        report = await pipe.wait_for_completion()
        await reading
        assert pipe.state == "completed" and report.balanced, str(report)
        assert set(found) == {2 * value for value in range(400)}
        await until_gone(nodes, 0, 1)


async def test_a_pipe_ends_with_the_process_that_submitted_it(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE), nodes_of(1, tmp_path) as nodes:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SUBMITTER, nodes.address(0), stdout=asyncio.subprocess.PIPE, env=environment(nodes)
        )
        assert process.stdout is not None and await process.stdout.readline() == b"4\n"
        assert (await nodes.call(0, routes.NODE)).pipes
        process.kill()
        await process.wait()
        await until_gone(nodes, 0)
        [info] = (await nodes.call(0, routes.PIPES)).pipes
        assert info.told.state == "stopped" and "the process that submitted it is gone" in info.told.reasons[0]


async def test_a_job_outlives_its_agent_and_whoever_follows_it_hears_its_status(tmp_path: Path) -> None:
    work, fifo = tmp_path / "work", tmp_path / "fifo"
    work.mkdir()
    os.mkfifo(fifo)
    (work / "script.py").write_text(f"print('first')\nopen({str(fifo)!r}).read()\nprint('last')\nraise SystemExit(6)\n")
    async with asyncio.timeout(DEADLINE), nodes_of(1, tmp_path, "--port", str(free_port())) as nodes:
        where = nodes.address(0)
        words = ("submit", "--to", where, "--working-dir", str(work), "script.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from upipe.cli.main import main; main()", *words,
            stdout=asyncio.subprocess.PIPE, env=environment(nodes),
        )  # fmt: skip
        assert process.stdout is not None and await process.stdout.readline() == b"first\n"
        nodes.agents[0].send_signal(signal.SIGKILL)
        nodes.agents[0].wait()
        nodes.start(0, "--port", where.rpartition(":")[2])  # nobody else was given it meanwhile
        await asyncio.to_thread(fifo.write_text, "go on")
        assert await process.stdout.read() == b"last\n"
        assert await process.wait() == 6


def test_what_the_death_of_a_node_forgets_is_told() -> None:
    class Keeps:
        def process(self, value: int) -> int:
            return value

        def checkpoint(self) -> int:
            return 0

    source = Processor("source", lambda: iter(()), resume=True)
    said = forgotten([source, Processor("keeps", Keeps), Processor("plain", double)])
    assert said.endswith("'source' (resume=True) from the first value; 'keeps' without its checkpoint")
    assert forgotten([Processor("plain", double)]) == ""
