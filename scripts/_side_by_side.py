"""The test suite as two pytest processes side by side: tests of agents mostly wait, the others mostly compute.

    python scripts/_side_by_side.py        what scripts/test does without arguments

What "others" prints is seen at once, what "agents" prints when that has ended. Each has a root of shared memory and a
pytest cache of its own; a test that is marked `alone` runs with no other (tests/turns.py). Both run to their ends,
whatever the other finds; the status is 0 when both have 0.
Who owns what: the two are children of this process. SIGTERM and SIGINT end them, and when it is killed they die too.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import IO

AGENTS = ("tests/cluster", "tests/cli", "tests/examples")
"""Everything that runs agents or needs network namespaces: it never runs beside its like. All that is not here is
"others", so that a new folder is not forgotten."""
PARTS = {"agents": AGENTS, "others": tuple(f"--ignore={folder}" for folder in AGENTS)}
PATIENCE = 20.0
"""Seconds to end after SIGTERM or SIGINT, before SIGKILL."""
_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Stopped(BaseException):
    """A signal came; its number."""


def begin(name: str, arguments: Sequence[str], place: str, out: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start one of the two; place: a directory for their turns; out: where it prints, None: here."""
    environment = {**os.environ, "UPIPE_TEST_TURNS": place}
    if root := environment.get("UPIPE_SHM"):
        environment["UPIPE_SHM"] = f"{root}-{name}"
    command = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir=.pytest_cache/{name}", *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out and subprocess.STDOUT,
        preexec_fn=lambda: _libc.prctl(_PDEATHSIG, signal.SIGKILL),
    )  # fmt: skip


def show(log: str, process: subprocess.Popen[bytes]) -> None:
    """What a log holds and what comes, until its writer has ended."""
    with open(log, "rb") as file:
        over = False
        while not over:
            over = process.poll() is not None
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.flush()
            time.sleep(0 if over else 0.2)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """None of them runs afterwards. SIGINT first: pytest sums up, and tests clean up."""
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
    until = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(parts: dict[str, tuple[str, ...]]) -> int:
    """Two parts by name, each with its arguments for pytest; the status of both.

    Raises:
        Stopped: neither runs any more.
    """
    (quiet, silent), (loud, seen) = parts.items()
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="upipe-test-") as place, open(f"{place}/log", "wb") as log:
        try:
            started.append(begin(quiet, silent, place, log))
            started.append(begin(loud, seen, place, None))
            started[1].wait()
            print(f"\n== {quiet}", flush=True)
            show(log.name, started[0])
        except Stopped:
            end(started)
            for process in started[:1]:
                show(log.name, process)
            raise
    print("== " + "; ".join(f"{name}: status {one.returncode}" for name, one in zip(parts, started, strict=True)))
    return max(abs(one.returncode) for one in started)


def stop(number: int, frame: FrameType | None) -> None:
    """Of SIGINT and SIGTERM: the first one counts."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    raise Stopped(number)


def main() -> int:
    """The whole suite."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return run(PARTS)
    except Stopped as signalled:
        return 128 + int(signalled.args[0])


if __name__ == "__main__":
    sys.exit(main())
