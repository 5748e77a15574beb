"""Physical limits, measured in the same run by small C programs (native/*.c)."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

from benchmark import hosts
from benchmark.cases import HD_BYTES, Case, power_of_two
from benchmark.model import MIB

NATIVE = Path(__file__).parent / "native"
HEADERS = Path(__file__).parents[2] / "upipe" / "memq"
"""Of the checksum."""


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


def beside(case: Case) -> list[str]:
    """The limits that belong beside a case; the one it is judged by first."""
    if not case.limit:
        return []
    found = [case.limit]
    if case.limit.startswith("futex"):
        found.append(case.limit.replace("futex", "futex-busy"))
    if case.limit.startswith("memcpy"):
        way = "copy" if case.name.endswith("copy") or "-copy-" in case.name else "view"
        found += [case.limit.replace("memcpy", kind) for kind in (way, f"{way}+crc")]
        found.append(f"tcp-{case.limit.split('-')[1]}")
    return found


class Limits:
    """Measures the limits of a case, once for each call: rounds call it beside uPipe's own rows, so that a slow minute
    hits both. Programs are built in `folder`, when they are first wanted."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self._folder = folder
        self._commands = _commands(quick)

    def __call__(self, case: Case) -> dict[str, float]:
        """Name -> value in the unit of the case. What cannot be built or run is left out."""
        if shutil.which("gcc") is None:
            return {}
        found = {name: self._measure(name) for name in beside(case) if name in self._commands}
        return {name: value for name, value in found.items() if value is not None}

    def command(self, case: Case, trips: int) -> tuple[str, ...]:
        """The program that makes as many trips as the limit of a case, with its arguments; () if it cannot be built."""
        name, how, pins, _, pause = self._commands[case.limit]
        program = _built(self._folder, name) if shutil.which("gcc") is not None else None
        return (str(program), how, pins, str(trips), pause) if program is not None else ()

    def _measure(self, name: str) -> float | None:
        cable = name.startswith("cable")
        if cable and hosts.why_not():
            return None
        with hosts.pair() if cable else nullcontext():
            return _run(self._folder, self._commands[name])


def _built(folder: Path, name: str) -> Path | None:
    """The program, None when it does not compile."""
    program = folder / name
    sources = [f"-I{HEADERS}", str(NATIVE / f"{name}.c")]
    try:
        if not program.exists():
            subprocess.run(["gcc", "-O3", "-march=native", "-o", str(program), *sources], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return program


def _run(folder: Path, command: list[str]) -> float | None:
    program = _built(folder, command[0])
    if program is None:
        return None
    try:
        done = subprocess.run([str(program), *command[1:]], check=True, timeout=20, capture_output=True, text=True)
        return float(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
