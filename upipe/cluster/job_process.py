"""The process beside a submitted script: keeps its output within bounds, and its exit status for whoever asks later.

    python -P job_process.py DIRECTORY          in a session of its own, so that it outlives the agent that started it

    DIRECTORY/job.json         what to run (jobs.py)
    DIRECTORY/pid              our pid and start time, written first
    DIRECTORY/work/            where it runs
    DIRECTORY/output.<start>   what it printed, from that byte on: pieces of SEGMENT bytes, of which KEPT are kept
    DIRECTORY/status           its exit status, written whole when it ended and all output is on disk

SIGTERM is passed on to the script and its children, SIGUSR1 kills them. When we are killed the kernel kills the script.
Only the standard library is imported, by its full path: this file runs without uPipe around it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SEGMENT = 8 * 1024 * 1024
"""Bytes of one piece of the output."""
KEPT = 8
"""Pieces that are kept: of a script that prints more, the last 56 to 64 MiB."""
LINGER = 2.0
"""Seconds that output is still read from children which the script left behind."""
PIECE = 1 << 16
_PR_SET_PDEATHSIG = 1


class Output:
    """Writes the pieces."""

    def __init__(self, directory: Path, segment: int = SEGMENT) -> None:
        self._directory = directory
        self._segment = segment
        self._position = self._begun = 0
        self._file: Any = None

    def write(self, data: bytes) -> None:
        """Append; a new piece begins where one is full, and the oldest goes."""
        while data:
            if self._file is None or self._position - self._begun >= self._segment:
                self._next()
            part = data[: self._segment - (self._position - self._begun)]
            self._file.write(part)
            self._position += len(part)
            data = data[len(part) :]

    def _next(self) -> None:
        self.close()
        self._begun = self._position
        self._file = (self._directory / f"output.{self._position:020d}").open("wb", buffering=0)
        for old in sorted(self._directory.glob("output.*"))[:-KEPT]:
            old.unlink()

    def close(self) -> None:
        """All is on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def write_whole(path: Path, text: str) -> None:
    """Replace a file, durably."""
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def start_time(pid: int) -> int:
    """Ticks after boot, which with the pid name a process for ever."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def main(directory: Path) -> int:
    """Run the script to its end."""
    me = os.getpid()
    signals = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGKILL}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # they wait until there is somebody to pass them to
    write_whole(directory / "pid", f"{me} {start_time(me)}\n")
    job = json.loads((directory / "job.json").read_text())
    output = Output(directory)
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != me:
            os._exit(1)

    read, write = os.pipe()
    try:
        script = subprocess.Popen(
            [sys.executable, "-u", *job["arguments"]], cwd=directory / "work", env=job["environment"], stdout=write,
            stderr=write, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=in_child,
        )  # fmt: skip
    except OSError as error:
        output.write(f"upipe: the script cannot be started: {error}\n".encode())
        output.close()
        write_whole(directory / "status", "127\n")
        return 127
    for number, sent in signals.items():
        signal.signal(number, lambda *_, sent=sent: _kill_group(script.pid, sent))  # type: ignore[misc]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    os.close(write)
    status = _follow(script, read, output)
    output.close()
    write_whole(directory / "status", f"{status}\n")
    return 0


def _follow(script: subprocess.Popen[bytes], read: int, output: Output) -> int:
    """Copy what it prints until it has ended, and its children have closed their output or LINGER is over."""
    ended = os.pidfd_open(script.pid)
    poll = select.poll()
    poll.register(read, select.POLLIN | select.POLLHUP)
    poll.register(ended, select.POLLIN)
    until = float("inf")
    is_open = True
    while is_open and (left := until - time.monotonic()) > 0:
        ready = {fd for fd, _ in poll.poll(None if until == float("inf") else left * 1000)}
        if read in ready:
            data = os.read(read, PIECE)
            output.write(data)
            if not data:
                poll.unregister(read)
                is_open = False
        if ended in ready:
            poll.unregister(ended)
            until = time.monotonic() + LINGER
    if until == float("inf"):
        poll.poll()  # it closed its output before its end
    os.waitid(os.P_PIDFD, ended, os.WEXITED | os.WNOWAIT)
    _kill_group(script.pid, signal.SIGKILL)  # before it is reaped, so that the number cannot be anybody else's
    return script.wait()


def _kill_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in it


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
