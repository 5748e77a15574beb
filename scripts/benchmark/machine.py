"""The machine and the versions, for the head of the table."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import util
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
        "build": build(),
        "load": os.getloadavg()[0],
        "versions": {peer.requires[0][1]: peer.version for peer in PEERS if peer.requires and peer.version},
    }


def build() -> str:
    """Which native module of uPipe is measured: a digest. Rows before and after a rebuild are not one run."""
    found = util.find_spec("upipe")
    folder = Path(found.origin).parent / "memq" if found is not None and found.origin else Path()
    digest = hashlib.sha256()
    for path in sorted(folder.glob("_ring.*.so")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


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
