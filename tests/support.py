"""What tests of running pipes share: a chain with quick settings, and everything it gives."""

from __future__ import annotations

import asyncio
import glob
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from upipe import Pipe, Processor, Report, RestartPolicy, Settings

DEADLINE = 60.0
QUICK = RestartPolicy(limit=0, backoff=0.01, backoff_max=0.05)


def crowded() -> float:
    """How many times as long as on an idle machine something may take now: other work on it is no fault of ours."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def files(root: Path, pattern: str) -> list[Path]:
    """Path.glob that bears that others remove what it walks through (Python 3.11's raises)."""
    return [root / found for found in glob.glob(pattern, root_dir=root, recursive=True, include_hidden=True)]


def proc_words(path: str | Path) -> list[str]:
    """Of a file in /proc; none if what it tells of has just ended."""
    try:
        return Path(path).read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def threads(name: str) -> int:
    """How many threads of this process are called this."""
    return sum(proc_words(f"/proc/self/task/{one}/comm") == [name] for one in os.listdir("/proc/self/task"))


def free_port() -> int:
    """One that the kernel gives to nobody who did not ask for it."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in range(lowest - 1, 1024, -1):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def chain(*processors: Processor, **settings: Any) -> Pipe:
    """A pipe of these, forked from here (quick), restarted without limit."""
    pipe = Pipe("test", settings=Settings(**{"start_method": "fork", "restart": QUICK, **settings}))
    pipe.chain(*processors)
    return pipe


async def collect(pipe: Pipe) -> tuple[list[Any], Report]:
    """Run it; what its ends emitted, and the report, whose books must balance."""
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        found = [one async for one in pipe.results()]
        report = await pipe.wait_for_completion()
    assert report.balanced, str(report)
    return found, report


async def feed(pipe: Pipe, values: Any) -> tuple[list[Any], Report]:
    """Emit the values into it; what its ends emitted, and the report."""

    async def emit() -> None:
        for value in values:
            assert await pipe.emit(value)
        await pipe.wait_for_completion()

    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        emitting = asyncio.create_task(emit())
        found = [one async for one in pipe.results()]
        await emitting
    report = pipe.report()
    assert report.balanced, str(report)
    return found, report
