"""Physical limits, measured in the same run by small C programs (native/*.c)."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from benchmark import hosts
from benchmark.cases import HD_BYTES, Case, power_of_two
from benchmark.model import MIB

NATIVE = Path(__file__).parent / "native"
HEADERS = Path(__file__).parents[2] / "upipe" / "memq"
"""Of the checksum."""
REPEATS = 3


def _commands(quick: bool) -> dict[str, list[str]]:
    """Name of the limit -> program and arguments. The amounts take 0.05 to 0.5 s each."""
    more = 1 if quick else 4
    found = {
        "ring": ["ring", "free", str(10_000_000 * more)],
        "spin": ["pingpong", "spin", "two", str(100_000 * more), "0"],
    }
    for pins in ("two", "one", "free"):
        found[f"futex-{pins}"] = ["pingpong", "futex", pins, str(150 * more), "1000"]  # as in cases.py
        found[f"futex-busy-{pins}"] = ["pingpong", "futex", pins, str(2000 * more), "0"]
    for label, size in (("1m", MIB), ("1080p", HD_BYTES)):
        frames = str(max(20, int(1e9 * more / size)))
        found[f"tcp-{label}"] = ["tcp", str(size), frames]
        found[f"cable-{label}"] = ["tcp", str(size), frames, *map(str, map(hosts.path, (0, 1))), hosts.ADDRESSES[1]]
        for depth in (2, 8, 32):
            slots = str(power_of_two(depth * (size + 64)) // size)
            found[f"memcpy-{label}-{depth}"] = ["memcpy", str(size), slots, frames]
            for way, copied in (("copy", "1"), ("view", "0")):
                found[f"{way}-{label}-{depth}"] = ["copy", str(size), slots, frames, copied, "0"]
                found[f"{way}+crc-{label}-{depth}"] = ["copy", str(size), slots, frames, copied, "1"]
    return found


def _wanted(names: Iterable[str]) -> list[str]:
    """The limits of the cases, and what is shown beside them."""
    found: dict[str, None] = {}
    for name in names:
        found[name] = None
        if name.startswith("futex"):
            found[name.replace("futex", "futex-busy")] = None
        if name.startswith("memcpy"):
            _, label, _ = name.split("-")
            for kind in ("copy", "copy+crc", "view", "view+crc"):
                found[name.replace("memcpy", kind)] = None
            found[f"tcp-{label}"] = None
    return list(found)


def measure(names: Iterable[str], quick: bool) -> dict[str, float]:
    """The median of three runs of each; what cannot be built or run is left out."""
    wanted = _wanted(names)
    if not wanted or shutil.which("gcc") is None:
        return {}
    commands, found = _commands(quick), {}
    with tempfile.TemporaryDirectory(prefix="upipe-bench-") as folder:
        for name in wanted:
            if name in commands and not (name.startswith("cable") and hosts.why_not()):
                with hosts.pair() if name.startswith("cable") else nullcontext():
                    values = [_run(Path(folder), commands[name]) for _ in range(REPEATS)]
                good = [one for one in values if one is not None]
                if good:
                    found[name] = statistics.median(good)
    return found


def _run(folder: Path, command: list[str]) -> float | None:
    program = folder / command[0]
    try:
        if not program.exists():
            sources = [f"-I{HEADERS}", str(NATIVE / f"{command[0]}.c")]
            build = ["gcc", "-O3", "-march=native", "-o", str(program), *sources]
            subprocess.run(build, check=True, timeout=60)
        done = subprocess.run([str(program), *command[1:]], check=True, timeout=20, capture_output=True, text=True)
        return float(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def beside(case: Case, measured: dict[str, float]) -> dict[str, float]:
    """Those that belong beside a case."""
    if not case.limit:
        return {}
    wanted = _wanted([case.limit])
    other = "view" if case.name.endswith("copy") or "-copy-" in case.name else "copy"
    return {name: measured[name] for name in wanted if name in measured and not name.startswith(other)}
