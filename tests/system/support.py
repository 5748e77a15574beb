"""Helpers of the system tests: wait for conditions, find processes, run a script as a program of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from upipe.memq import segment
from upipe.runtime.local import LocalRunner

ROOT = Path(__file__).resolve().parents[2]
LONG = bool(os.environ.get("UPIPE_LONG"))
MARK = "UPIPE_TEST_MARK"
LONGEST = 60.0
"""Seconds to wait for what comes in one, on a busy machine: only to end a test that hangs."""


def until(condition: Callable[[], object], seconds: float = LONGEST, what: str = "") -> float:
    """Wait for a condition; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what or condition}"
        time.sleep(0.005)
    return time.monotonic() - began


async def auntil(condition: Callable[[], object], seconds: float = LONGEST, what: str = "") -> float:
    """until() that lets the event loop run."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what or condition}"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def stat(pid: int) -> tuple[str, int, int, float] | None:
    """(state, parent, session, cpu seconds) of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[3]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(of: int) -> list[int]:
    """Living processes below one, zombies left out."""
    found: dict[int, int] = {}
    for pid in pids():
        told = stat(pid)
        if told and told[0] not in "ZX":
            found[pid] = told[1]
    below, more = {of}, True
    while more:
        more = False
        for pid, parent in found.items():
            if parent in below and pid not in below:
                below.add(pid)
                more = True
    return sorted(below - {of})


def marked(mark: str) -> list[int]:
    """Living processes whose program was started with that mark in the environment."""
    text = f"{MARK}={mark}".encode()
    found = []
    for pid in pids():
        try:
            if text in Path(f"/proc/{pid}/environ").read_bytes() and segment.process_state(pid) not in ("Z", "X", None):
                found.append(pid)
        except OSError:
            continue
    return found


def worker_pids(runner: LocalRunner, processor: str = "") -> dict[str, int]:
    """Pids of the workers that run now."""
    slots = runner.supervisor.slots.values()
    return {
        slot.name: slot.pid
        for slot in slots
        if slot.pid and slot.name in runner.held.pidfds and slot.name.startswith(processor)
    }


def kill(runner: LocalRunner, worker: str, number: int = signal.SIGKILL) -> bool:
    """Signal a worker by its pidfd; False when it has ended."""
    try:
        signal.pidfd_send_signal(runner.held.pidfds[worker], number)
    except (KeyError, ProcessLookupError):
        return False
    return True


class Script:
    """A Python program of its own, with a shared-memory root of its own."""

    def __init__(
        self, code: str, directory: Path, *, args: tuple[str, ...] = (), shm: Path | None = None, **options: object
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.shm = shm or Path(f"/dev/shm/upipe-test-{self.mark[:12]}")
        self.path = directory / f"script_{self.mark[:8]}.py"
        self.path.write_text(code)
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-W", "error", str(self.path), *args],
            env={**os.environ, "UPIPE_SHM": str(self.shm), MARK: self.mark, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def line(self) -> str:
        """Its next line of output."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, f"{self.path} ended without a word: {self.process.wait(LONGEST)}"
        return text.strip()

    def until_line(self, text: str) -> None:
        """Read until that line."""
        while self.line() != text:
            pass

    def others(self) -> list[int]:
        """Its living relatives, itself left out."""
        return [pid for pid in marked(self.mark) if pid != self.process.pid]

    def end(self) -> tuple[int, str]:
        """Wait; returns its status and the rest of its output."""
        out, _ = self.process.communicate(timeout=LONGEST)
        return self.process.returncode, out

    def leftovers(self) -> list[str]:
        """What lies in its shared-memory root."""
        return sorted(path.name for path in self.shm.iterdir()) if self.shm.exists() else []

    def close(self) -> None:
        for pid in marked(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended
        self.process.wait(LONGEST)
        if self.process.stdout is not None:
            self.process.stdout.close()
        import shutil

        shutil.rmtree(self.shm, ignore_errors=True)
