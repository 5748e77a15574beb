"""The command `upipe`, through click's runner and as a process that looks at another one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from upipe import MemQ, __version__
from upipe.cli.main import main
from upipe.memq import segment

ROOT = Path(__file__).parent.parent.parent
UPIPE = [sys.executable, "-c", "from upipe.cli.main import main; main()"]
HOLDER = """\
from upipe import MemQ
q = MemQ(65536, name="held", policy="drop_oldest")
for number in range(7): q.put(number)
q.get(); q.get()
print(q.name, flush=True)
for line in iter(input, ""): [q.put(number) for number in range(1000)]; print("more", flush=True)
"""


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())
    return result


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of sessions of our own, for this process's commands and its children."""
    path = tmp_path / "shm"
    monkeypatch.setenv("UPIPE_SHM", str(path))
    return path


@pytest.fixture
def queue() -> Iterator[MemQ]:
    with MemQ(65536, name="looked-at") as made:
        yield made


@pytest.fixture
def holder(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, with a queue into which seven frames went, and out of which two."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip().endswith("/held")
        yield process
        process.kill()


def upipe(*arguments: str) -> str:
    """Run the command as a process of its own; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*UPIPE, *arguments], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def row(output: str, name: str) -> list[str]:
    [found] = [line for line in output.splitlines() if line.startswith(name)]
    return found.split()


def test_version_names_upipe_its_layout_and_python() -> None:
    assert invoke("version").output == (
        f"uPipe {__version__} (layout 2), Python {sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}\n"
    )


def test_help_lists_the_commands() -> None:
    output = invoke("--help").output
    assert all(name in output for name in ("queues", "sweep", "version"))


def test_queues_shows_depth_frames_stream_and_participants(queue: MemQ) -> None:
    for number in range(5):
        queue.put(number)
    queue.get()
    output = invoke("queues").output
    assert queue.name.partition("/")[0] in output
    # name, frames, depth, size, emitted, finished, stream
    assert row(output, "looked-at")[:-1] == ["looked-at", "4", "256", "65.5k", "5", "1", "open"]


def test_looking_changes_nothing_in_the_queue(queue: MemQ) -> None:
    queue.put(1)
    before = queue.stats()
    invoke("queues")
    assert queue.stats() == before


def test_queues_says_when_there_are_none(root: Path) -> None:
    assert invoke("queues").output == "no queues\n"


def test_what_is_no_queue_does_not_hide_the_others(queue: MemQ) -> None:
    other = segment.find(queue.name).with_name("a-foreign-file")
    other.write_bytes(b"not a queue" * 1000)
    other.chmod(0o600)
    try:
        output = invoke("queues").output
    finally:
        other.unlink()
    assert "a-foreign-file" in output
    assert row(output, "looked-at")[0] == "looked-at"


@pytest.mark.slow
def test_watch_shows_rates_over_a_second(queue: MemQ) -> None:
    queue.put(1)
    output = invoke("queues", "--watch", "--times", "1").output
    assert "in/s" in output and "out/s" in output and "MB/s" in output
    assert row(output, "looked-at")[:-1] == ["looked-at", "1", "64", "1", "0", "0", "0", "open"]


def test_sweep_says_what_it_removed(root: Path) -> None:
    segment.root()
    dead = root / "999999999-1"  # no such pid can be
    (dead / "p1").mkdir(parents=True)
    for name in ("lock", "q.1", "p1/code"):
        (dead / name).write_bytes(b"x" * 4096)
    assert invoke("sweep").output == "removed 999999999-1: 3 files, 12,288 bytes\n"
    assert not dead.exists()


def test_sweep_leaves_the_living_alone(queue: MemQ) -> None:
    queue.put("still here")
    invoke("sweep")
    assert queue.get() == "still here"
    assert segment.find(queue.name).exists()


def test_sweep_says_when_there_is_nothing(root: Path) -> None:
    assert invoke("sweep").output == "nothing to remove\n"


@pytest.mark.slow
@pytest.mark.system
def test_a_process_sees_the_queues_of_another_and_sweeps_them_after_its_death(
    root: Path, holder: subprocess.Popen[str]
) -> None:
    output = upipe("queues")
    assert f"{holder.pid}-" in output
    assert row(output, "held") == ["held", "5", "320", "65.5k", "7", "2", "open", "1"]  # the watcher is no participant
    assert upipe("sweep") == "nothing to remove\n"
    holder.kill()
    holder.wait()
    assert "dead: `upipe sweep` removes it" in upipe("queues")
    assert upipe("sweep").startswith(f"removed {holder.pid}-")
    assert list(root.iterdir()) == []
    assert upipe("queues") == "no queues\n"


@pytest.mark.slow
@pytest.mark.system
def test_watch_counts_what_another_process_puts(root: Path, holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None and holder.stdout is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with subprocess.Popen(
        [*UPIPE, "queues", "--watch", "--times", "60"], env=environment, stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        rows = (line.split() for line in watcher.stdout if line.startswith("held"))
        assert next(rows)[3:5] == ["7", "0"]
        holder.stdin.write("more\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "more\n"
        rates = []  # of one look, or of more when a busy machine took longer than a second for them
        for row in rows:
            rates.append(float(row[4].replace(",", "")))
            if row[3] == "1,007":
                break
        took = time.monotonic() - began
        watcher.kill()
    assert 1000 / took - 1 < sum(rates) <= 1000 + len(rates), "between two looks passed a second or more, all in `took`"
