"""The machine and the versions, for the head of the table."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from benchmark.peers import PEERS


def describe() -> dict[str, Any]:
    """What a reader needs to know to compare."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30),
        "l3": _text("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "versions": {peer.requires[0][1]: peer.version for peer in PEERS if peer.requires and peer.version},
    }


def _cpu() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
