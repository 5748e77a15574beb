"""Runs an example in a process of its own, watches its process tree, and looks for what it left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support import files

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
_AUDIT = """\
import os, sys
path = os.environ["UPIPE_TEST_AUDIT"]
def hook(event, arguments):
    if event == "socket.__new__" and arguments[1] in (2, 10):  # AF_INET, AF_INET6
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)  # opened each time: the fork server closes what it inherits
        os.write(fd, f"{os.getpid()} opened a socket of family {arguments[1]}\\n".encode())
        os.close(fd)
sys.addaudithook(hook)
"""


@dataclass
class Run:
    """How a run of an example went."""

    status: int
    out: str
    err: str
    seconds: float
    most_processes: int = 0
    sockets: list[str] = field(default_factory=list)
    """TCP and UDP sockets that any process of the tree was seen with."""


@contextmanager
def shared_memory() -> Iterator[Path]:
    """A root of sessions of its own in /dev/shm; it also marks the processes that use it, by their environment."""
    root = Path(f"/dev/shm/upipe-{os.getuid()}-test-{uuid.uuid4().hex}")
    root.mkdir(0o700)
    try:
        yield root
    finally:
        shutil.rmtree(root)


def left_behind(root: Path) -> list[str]:
    """Files of a root, and processes that still live with it."""
    found = [str(path) for path in files(root, "**/*")]
    for process in psutil.process_iter():
        try:
            if process.environ().get("UPIPE_SHM") == str(root) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid}: {' '.join(process.cmdline())}")
        except psutil.Error:
            continue  # of somebody else, or it ended this instant
    return found


Watch = Callable[[int], None]


def run(script: Path, *arguments: str, root: Path, cwd: Path, limit: float, watch: Watch | None = None) -> Run:
    """Run to its end. All the while its process tree is sampled, or `watch` is called with its process instead.

    Raises:
        subprocess.TimeoutExpired: after `limit` seconds; it is killed.
    """
    paths = {"UPIPE_SHM": str(root), "PYTHONPATH": f"{cwd}:{ROOT}", "UPIPE_TEST_AUDIT": str(cwd / "audit")}
    (cwd / "audit").touch()
    (cwd / "sitecustomize.py").write_text(_AUDIT)  # every Python of the tree loads it, and forks keep it
    began = time.monotonic()
    with open(cwd / "stdout", "w+") as out, open(cwd / "stderr", "w+") as err:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments], cwd=cwd, env={**os.environ, **paths},
            stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        )
        result = Run(-1, "", "", 0.0)
        try:
            while not _ended(process):
                if time.monotonic() - began > limit:
                    raise subprocess.TimeoutExpired(process.args, limit)
                if watch is None:
                    _sample(process.pid, result)
                else:
                    watch(process.pid)
        finally:
            process.kill()
            result.status = process.wait()
        result.seconds = time.monotonic() - began
        result.out, result.err = (Path(one.name).read_text() for one in (out, err))
    result.sockets += (cwd / "audit").read_text().splitlines()
    return result


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(0.005)  # between two looks; the processor cores belong to the example
    except subprocess.TimeoutExpired:
        return False
    return True


def _sample(pid: int, result: Run) -> None:
    try:
        caller = psutil.Process(pid)
        tree = [caller, *caller.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    result.most_processes = max(result.most_processes, len(tree))
    for one in tree:
        try:
            result.sockets += [f"{one.pid}: {socket}" for socket in one.net_connections("inet")]
        except psutil.Error:
            continue  # it ended this instant
