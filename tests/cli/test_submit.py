"""`upipe submit` and its company against a real agent (in this process), the command line in a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster import agent_support as support
from tests.cluster.agent_support import Node
from tests.cluster.test_runner import cluster
from upipe.cluster import token
from upipe.cluster.dealings import TellClient
from upipe.pipe import CLUSTER_VARIABLE

DEADLINE = 200.0
"""Seconds for a test: only to end one that hangs."""
pytestmark = pytest.mark.timeout(240)
MAIN = "from upipe.cli.main import main; main()"
PIPE = """
import asyncio, sys
from helper import work
from upipe import Pipe, Processor

async def main():
    pipe = Pipe("job")
    pipe.add(Processor("a", work))
    await pipe.start(cluster="auto")
    print("answer", await pipe.call(20), flush=True)
    print((await pipe.wait_for_completion()).balanced)

if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setenv(token.VARIABLE, str(support.token_file(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # for scripts, where uPipe is not installed
    async with asyncio.timeout(DEADLINE), cluster(tmp_path, "one") as [found]:
        monkeypatch.setenv(CLUSTER_VARIABLE, found.seed)
        yield found


@pytest.fixture
def work(tmp_path: Path) -> Path:
    found = tmp_path / "work"
    found.mkdir()
    (found / "script.py").write_text(PIPE)
    (found / "helper.py").write_text("def work(value): return value + 1\n")
    return found


async def begin(*arguments: str) -> asyncio.subprocess.Process:
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    return await asyncio.create_subprocess_exec(sys.executable, "-c", MAIN, *arguments, **pipes)  # type: ignore[arg-type]


async def upipe(*arguments: str) -> tuple[int, str, str]:
    process = await begin(*arguments)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_script_runs_a_pipe_there_and_its_status_comes_back(node: Node, work: Path) -> None:
    status, out, err = await upipe("submit", "--working-dir", str(work), "script.py", "3")
    assert (status, out) == (3, "answer 21\nTrue\n") and f"on node {node.id} ended with exit status 3" in err, err
    status, out, _ = await upipe("jobs")
    assert status == 0 and "failed" in out and node.id in out
    status, out, err = await upipe("submit", "--to", node.seed, "--working-dir", str(work), "gone.py")
    assert status == 2 and "there is no gone.py in" in err


async def test_detached_it_is_found_by_its_id(node: Node, work: Path) -> None:
    (work / "script.py").write_text("import os, sys\nprint(os.environ['MINE'], sys.argv[1:])\nsys.exit(4)\n")
    options = ("--name", "my job", "--env", "MINE=1", "--detach", "--working-dir", str(work))
    status, out, err = await upipe("submit", *options, "script.py", "--name", "x")
    job = out.strip()
    assert status == 0 and job.startswith("my-job-"), err
    assert await upipe("logs", job) == (4, "1 ['--name', 'x']\n", "")
    status, out, err = await upipe("logs", "other")
    assert status == 1 and "no node that answers knows job other" in err


async def test_stop_ends_it_and_so_does_ctrl_c(node: Node, work: Path) -> None:
    (work / "script.py").write_text("import time\nprint('up')\ntime.sleep(99)\n")
    _, out, _ = await upipe("submit", "--detach", "--working-dir", str(work), "script.py")
    status, out, _ = await upipe("stop", out.strip())
    assert status == 0 and "stopped with exit status -15" in out
    process = await begin("submit", "--working-dir", str(work), "script.py")
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130 and b"stopping job" in err
    _, out, _ = await upipe("jobs")
    assert out.count("stopped") == 2


ENDLESS = """
import asyncio
from helper import work
from upipe import Pipe, Processor

async def main():
    pipe = Pipe("endless")
    pipe.add(Processor("a", work))
    await pipe.start(cluster="auto")
    print("up", flush=True)
    await asyncio.sleep(99)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_stopped_it_takes_its_pipes_with_it_at_once(node: Node, work: Path) -> None:
    (work / "script.py").write_text(ENDLESS)
    process = await begin("submit", "--working-dir", str(work), "script.py")
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    [pipe] = node.agent.pipes.entries
    [job] = node.agent.jobs.all
    status, out, _ = await upipe("stop", job)
    assert status == 0 and "stopped with exit status -15" in out  # it had no time to say good-bye
    await process.communicate()

    def told() -> TellClient:
        return node.agent.pipes.known.info(pipe).told

    await support.until(lambda: told().state == "stopped", 30)
    assert told().reasons == ()  # and was not missed: that would be a reason
    await support.until(lambda: not node.agent.parts.all, 30)


async def test_the_cluster_is_listed_and_its_pipes_ended(node: Node, tmp_path: Path) -> None:
    from upipe import Pipe, Processor

    status, out, _ = await upipe("nodes")
    assert status == 0 and node.id in out and "alive" in out
    assert (await upipe("pipes"))[1].strip() == "no pipes"
    pipe = Pipe("listed")
    pipe.add(Processor("a", len, workers=2))
    await pipe.start(cluster=node.seed)
    _, out, _ = await upipe("pipes")
    assert "listed-" in out and "a#0,1" in out and "running" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    name = out.split("listed-")[1].split()[0]
    status, out, err = await upipe("pipe", "drain", f"listed-{name}")
    assert status == 0 and "drains" in out, err
    await pipe.wait_for_completion()
    assert pipe.state == "completed"
    assert (await upipe("pipe", "stop", "unknown"))[0] == 1
