"""Submitted scripts as real processes: output, exit status, stop, and the death of the agent."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from upipe.cluster import archive, job_process, jobs, wire
from upipe.cluster.jobs import Jobs
from upipe.errors import NodeRefused
from upipe.memq import segment

NODE = "00000000000000aa"
CONTENTS: dict[str, bytes] = {}


async def content(digest: str) -> bytes | None:
    return CONTENTS.get(digest)


def made(directory: Path) -> Jobs:
    access = {"UPIPE_TOKEN_FILE": str(directory / "token")}
    return Jobs(directory / "jobs", NODE, lambda: "127.0.0.1:7420", access, content)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Jobs]:
    found = made(tmp_path)
    yield found
    for job in list(found.all):
        await found.stop(job, 0.0)
    await found.close()


def request(tmp_path: Path, text: str, *arguments: str, **more: Any) -> wire.JobRequest:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "script.py").write_text(text)
    (source / "beside.py").write_text("VALUE = 'from beside'\n")
    data = archive.pack(source)
    digest = hashlib.sha256(data).hexdigest()
    CONTENTS[digest] = data
    return wire.JobRequest("test", ("script.py", *arguments), digest, **more)


async def output(here: Jobs, job: str) -> str:
    async with asyncio.timeout(60):
        return b"".join([piece async for piece in here.logs(job)]).decode()


async def first_line(here: Jobs, job: str) -> bytes:
    async with asyncio.timeout(60):
        async for piece in here.logs(job):
            return piece
    raise AssertionError("it printed nothing")


async def test_a_script_runs_in_its_directory_with_what_it_was_given(here: Jobs, tmp_path: Path) -> None:
    text = """
import beside, os, sys
print(beside.VALUE, sys.argv[1:], os.environ["MINE"], os.environ["UPIPE_CLUSTER"], os.environ["UPIPE_TOKEN_FILE"])
print("to stderr", file=sys.stderr)
sys.exit(3)
"""
    asked = request(tmp_path, text, "a", "b c", environment={"MINE": "mine"}, id="one")
    info = await here.run(asked)
    assert (info.job, info.state, info.status, info.node) == ("one", "running", None, NODE)
    said = await output(here, "one")
    assert said == f"from beside ['a', 'b c'] mine 127.0.0.1:7420 {tmp_path}/token\nto stderr\n"
    assert (here.info("one").state, here.info("one").status) == ("failed", 3)
    assert await here.run(asked) == here.info("one") and len(here.all) == 1  # asked twice, run once
    with pytest.raises(NodeRefused, match="id_taken"):
        await here.run(msgspec.structs.replace(asked, arguments=("beside.py",)))


@pytest.mark.parametrize("beside", [False, True])
async def test_its_end_is_told_however_it_ended(tmp_path: Path, beside: bool) -> None:
    """beside: the process beside it is killed, and the script with it."""
    told: list[str] = []
    access = {"UPIPE_TOKEN_FILE": str(tmp_path / "token")}
    found = Jobs(tmp_path / "jobs", NODE, lambda: "127.0.0.1:7420", access, content, told.append)
    text = "import os, signal\nprint(os.environ['UPIPE_JOB'], os.getpid(), flush=True)\nsignal.pause()"
    await found.run(request(tmp_path, text, id="one"))
    origin, pid = (await first_line(found, "one")).decode().split()
    assert origin == f"{NODE}/one" and not told and not found.over()
    process = found.all["one"].process
    assert process is not None
    os.kill(process.pid if beside else int(pid), signal.SIGKILL)
    async with asyncio.timeout(20):
        await found.all["one"].ended.wait()
    assert told == found.over() == [origin]
    assert found.info("one").state == ("lost" if beside else "failed")
    await found.close()


async def test_output_is_followed_while_it_runs(here: Jobs, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    info = await here.run(request(tmp_path, f"print('first')\nopen({str(fifo)!r}).read()\nprint('last')"))
    logs = here.logs(info.job)
    async with asyncio.timeout(60):
        told = b""
        while told != b"first\n":  # print() may write the end of a line by itself
            told += await anext(logs)
            assert b"first\n".startswith(told)
        assert here.info(info.job).state == "running"
        await asyncio.to_thread(fifo.write_text, "go on")
        assert b"".join([piece async for piece in logs]) == b"last\n"
    assert (here.info(info.job).state, here.info(info.job).status) == ("completed", 0)


async def test_it_outlives_the_agent_and_keeps_its_status(here: Jobs, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    text = f"import sys\nprint('first')\nopen({str(fifo)!r}).read()\nprint('last')\nsys.exit(7)"
    info = await here.run(request(tmp_path, text))
    assert await first_line(here, info.job) == b"first\n"
    process = here.all[info.job].process
    await here.close()
    here.all.clear()
    after = made(tmp_path)
    after.load()
    assert after.info(info.job).state == "running"
    await asyncio.to_thread(fifo.write_text, "go on")
    assert await output(after, info.job) == "first\nlast\n"
    assert process is not None and process.wait(60) == 0
    later = made(tmp_path)
    later.load()  # it ended while nobody looked
    for one in (after, later):
        assert (one.info(info.job).state, one.info(info.job).status) == ("failed", 7)
        await one.close()


async def test_stop_asks_first_and_kills_after_the_deadline(here: Jobs, tmp_path: Path) -> None:
    ends = "signal.signal(15, lambda *_: (print('bye'), sys.exit(5)))"
    asks = f"import signal, sys, time\n{ends}\nprint('up')\ntime.sleep(99)"
    info = await here.run(request(tmp_path, asks))
    await first_line(here, info.job)
    stopped = await here.stop(info.job, 60)
    assert (stopped.state, stopped.status) == ("stopped", 5) and await output(here, info.job) == "up\nbye\n"
    deaf = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up')\ntime.sleep(99)"
    info = await here.run(request(tmp_path, deaf))
    await first_line(here, info.job)
    stopped = await here.stop(info.job, 0.05)
    assert (stopped.state, stopped.status) == ("stopped", -9)


async def test_children_go_with_it(here: Jobs, tmp_path: Path) -> None:
    text = "import subprocess\nprint(subprocess.Popen(['sleep', '99']).pid)"
    info = await here.run(request(tmp_path, text))
    pid = int(await output(here, info.job))
    assert segment.process_state(pid) in (None, "Z", "X")


async def test_killed_with_what_kept_its_status_it_is_lost(here: Jobs, tmp_path: Path) -> None:
    info = await here.run(request(tmp_path, "import os, time\nprint(os.getpid())\ntime.sleep(99)"))
    pid = int(await first_line(here, info.job))
    script = os.pidfd_open(pid)
    signal.pidfd_send_signal(here.all[info.job].pidfd, signal.SIGKILL)
    async with asyncio.timeout(60):
        await here.all[info.job].ended.wait()
    assert (here.info(info.job).state, here.info(info.job).status) == ("lost", None)
    assert await asyncio.to_thread(jobs_wait, script)


def jobs_wait(pidfd: int) -> bool:
    from upipe.runtime.osproc import wait_dead

    try:
        return wait_dead(pidfd, 60)
    finally:
        os.close(pidfd)


async def test_what_cannot_run_is_refused_and_leaves_nothing(here: Jobs, tmp_path: Path) -> None:
    good = request(tmp_path, "pass")
    CONTENTS["ab" * 32] = b"no archive"
    for change, code in (
        ({"working_directory": "cd" * 32}, "no_content"),
        ({"working_directory": "ab" * 32}, "bad_archive"),
        ({"arguments": ("gone.py",)}, "no_script"),
        ({"arguments": ("../../x.py",)}, "no_script"),
        ({"arguments": ("/bin/true",)}, "no_script"),
    ):
        with pytest.raises(NodeRefused, match=code):
            await here.run(msgspec.structs.replace(good, **change))
    assert not os.listdir(tmp_path / "jobs") and not here.all
    for ask in (here.info, here._job):
        with pytest.raises(NodeRefused, match="no_such_job"):
            ask("gone")


async def test_only_so_many_ended_jobs_are_kept(
    here: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MOST_ENDED", 2)
    asked = request(tmp_path, "print(1)")
    for number in range(3):
        info = await here.run(msgspec.structs.replace(asked, id=f"job{number}"))
        await output(here, info.job)
    assert set(here.all) == {"job1", "job2"} == set(os.listdir(tmp_path / "jobs"))


async def test_output_is_bounded_and_says_what_is_left_out(tmp_path: Path) -> None:
    out = job_process.Output(tmp_path, segment=10)
    written = b"".join(b"%09d\n" % number for number in range(30))
    for start in range(0, len(written), 7):
        out.write(written[start : start + 7])
    out.close()
    assert len(os.listdir(tmp_path)) == job_process.KEPT
    left = len(written) - 10 * job_process.KEPT
    pieces = [piece async for piece in jobs._pieces(tmp_path, 0)]
    assert pieces[0][1] == f"upipe: {left} bytes of output are left out here\n".encode()
    assert b"".join(piece for _, piece in pieces[1:]) == written[left:] and pieces[-1][0] == len(written)
    assert [piece async for piece in jobs._pieces(tmp_path, len(written) - 5)] == [(len(written), written[-5:])]
    assert [piece async for piece in jobs._pieces(tmp_path, len(written))] == []
