"""The C core without Python: its layout, its checksum, and the ring under threads, sanitizers and kill -9.

The programs are beside this file; each says at its top what it does. `UPIPE_LONG=1` runs them for minutes.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from upipe.memq import _ring, layout

HERE = Path(__file__).parent
MEMQ = HERE.parents[1] / "upipe" / "memq"
LONG = os.environ.get("UPIPE_LONG") == "1"
COMPILER = os.environ.get("CC", "gcc")
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-g", "-pthread", "-Wl,-z,now"]
BUILDS = {
    "production": ["-O3", "-fno-plt"],  # as setup.py compiles it
    "fenceless": ["-O3", "-fno-plt", "-D__atomic_thread_fence(order)=__atomic_signal_fence(order)"],
    "points": ["-O2", "-DKILL_AT_POINTS"],
    "thread": ["-O1", "-fsanitize=thread", "-fno-builtin"],  # else small copies are inlined unseen
    "address": ["-O1", "-DKILL_AT_POINTS", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 if LONG else 400)]


def missing(what: str) -> None:
    """Without a tool a developer goes on; CI does not."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}; CI runs every native test")
    pytest.skip(what)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """build(source, flavour) -> the program, compiled once."""
    directory = tmp_path_factory.mktemp("native")

    @functools.cache
    def compiled(source: str, flavour: str) -> Path:
        if shutil.which(COMPILER) is None:
            missing(f"no C compiler {COMPILER}")
        probe = directory / f"probe_{flavour}"
        (directory / "probe.c").write_text("int main(void) { return 0; }\n")
        arguments = [*STRICT, *BUILDS[flavour]]
        if subprocess.run([COMPILER, *arguments, directory / "probe.c", "-o", probe], capture_output=True).returncode:
            missing(f"{COMPILER} cannot link {BUILDS[flavour]}")
        program = directory / f"{Path(source).stem}_{flavour}"
        done = subprocess.run([COMPILER, *arguments, HERE / source, "-o", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return program

    return compiled


def run(program: Path, *arguments: object) -> str:
    command = [str(program), *map(str, arguments)]
    if "thread" in program.name and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # its shadow memory needs the addresses that full randomization uses
    place = {**os.environ, "TMPDIR": str(program.parent)}  # what a failed run leaves is pytest's to remove
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700 if LONG else 300, env=place)
    print(done.stdout)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def crash_points() -> list[str]:
    """Every name in UP_CRASH("..."): the sources are the list, so that a new point cannot be forgotten."""
    found: set[str] = set()
    for header in MEMQ.glob("_*.h"):
        text = header.read_text()
        names = re.findall(r'UP_CRASH\("([^"]+)"\)', text)
        uses = re.findall(r"^(?!#define).*UP_CRASH\(", text, re.MULTILINE)
        assert len(names) == len(uses), f"an UP_CRASH of {header.name} has no plain name, or shares its line"
        found.update(names)
    assert len(found) >= 40
    return sorted(found)


def test_layout_header_is_generated():
    printed = subprocess.run([sys.executable, "-m", "upipe.memq.layout"], capture_output=True, text=True, check=True)
    assert printed.stdout == (MEMQ / "_layout.h").read_text() == layout.c_header()


def test_the_functions_of_a_trip_lie_side_by_side_in_the_extension():
    """All that _trip.ld names was there to be put in order; a small function may be inlined, and gone, instead."""
    if shutil.which("nm") is None:
        missing("no nm")
    done = subprocess.run(["nm", "-f", "sysv", _ring.__file__], check=True, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.count("|") == 6]
    sections = {row[0]: row[6] for row in rows if row[3] == "FUNC" and not row[0].endswith(".cold")}
    if ".text.trip" not in sections.values():
        missing("the extension was built with a linker that cannot order functions")
    wanted = re.findall(r"\(\.text\.hot\.(\S+) \.text\.(\S+)\)", (MEMQ / "_trip.ld").read_text())
    assert len(wanted) == 24
    for hot, other in wanted:
        assert hot == other
        found = {name for name in sections if fnmatchcase(name, hot) or fnmatchcase(name, f"{hot}.*")}
        assert found or hot.startswith("up_"), hot
        assert {sections[name] for name in found} <= {".text.trip"}, hot


@pytest.mark.parametrize("header", sorted(path.name for path in MEMQ.glob("_*.h")))
def test_header_stands_alone(header, tmp_path):
    """Each header compiles by itself and twice; the offsets and sizes in _layout.h are asserted by the compiler."""
    if shutil.which(COMPILER) is None:
        missing(f"no C compiler {COMPILER}")
    source = tmp_path / "one.c"
    source.write_text(f'#include "{MEMQ / header}"\n' * 2)
    done = subprocess.run([COMPILER, *STRICT, "-fsyntax-only", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flavour", ["production", "address"])
def test_crc(build, flavour):
    run(build("crc_test.c", flavour))


@pytest.mark.parametrize("flavour", ["production", "address"])
def test_cases(build, flavour):
    run(build("ring_test.c", flavour), "cases")


@pytest.mark.parametrize(
    ("flavour", "scale", "mappings"),
    [("production", 0.7, 1), ("production", 0.2, 0), ("thread", 0.1, 0), ("address", 0.05, 0)],
)
def test_threads(build, flavour, scale, mappings):
    for seed in range(10 if LONG else 1):
        run(build("ring_test.c", flavour), "threads", scale * (3 if LONG else 1), mappings, seed)


@pytest.mark.parametrize("flavour", ["production", "address"])
@pytest.mark.parametrize("source", ["spin_test.c", "clock_test.c", "holdoff_test.c"])
def test_how_long_spins_last_what_time_it_is_and_when_a_reader_holds_off(build, source, flavour):
    run(build(source, flavour))


@pytest.mark.parametrize("flavour", ["production", "address"])
def test_lookout(build, flavour):
    program = build("lookout_test.c", flavour)
    run(program, "cases")
    run(program, "forks", 3000 if LONG else 150)


@pytest.mark.parametrize("flavour", ["production", "thread", "address"])
def test_threads_with_a_lookout(build, flavour):
    run(build("lookout_test.c", flavour), "threads", 60 if LONG else 2)


def test_no_wake_up_is_lost_between_a_commit_and_a_sleeper(build):
    run(build("ring_test.c", "production"), "fence", 20 if LONG else 2)


@pytest.mark.alone
def test_the_litmus_test_sees_that_a_fence_is_missing(build):
    """x86 too lets the load of the waiting bits pass the store of the commit: a loss shows within milliseconds, where
    both threads run at the same time. Beside other work they rarely do."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two threads on one core never miss each other")
    program = build("ring_test.c", "fenceless")
    place = {**os.environ, "TMPDIR": str(program.parent)}
    done = subprocess.run([program, "fence", "200"], capture_output=True, text=True, timeout=300, env=place)
    assert done.returncode == 1, done.stdout
    assert "a wake-up was lost" in done.stdout


@pytest.mark.chaos
@pytest.mark.parametrize(("flavour", "seeds"), [("points", 1), ("address", 1)])
def test_killed_at_every_named_point(build, flavour, seeds):
    for seed in range(seeds * (20 if LONG else 1)):
        run(build("ring_test.c", flavour), "points", seed + 1, *crash_points())


@pytest.mark.chaos
def test_killed_at_every_instruction(build):
    run(build("ring_test.c", "production"), "steps", 40 if LONG else 3, 1)


@pytest.mark.chaos
def test_killed_by_chance(build):
    run(build("ring_test.c", "production"), "chaos", 300 if LONG else 8, int.from_bytes(os.urandom(4), "little"))
