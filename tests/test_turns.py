"""Turns: together or alone, over processes, and nobody waits for ever."""

from __future__ import annotations

import fcntl
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import sys
from tests.turns import turn
for line in sys.stdin:
    with turn(alone=line.strip() == "alone"):
        print("in", flush=True)
        sys.stdin.readline()
    print("out", flush=True)
"""


@pytest.fixture
def begin(tmp_path):
    """begin(): a process that takes a turn for each two lines: its kind, and its end."""
    started = []

    def start():
        started.append(subprocess.Popen(
            [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={"UPIPE_TEST_TURNS": str(tmp_path), "PYTHONPATH": str(ROOT)},
        ))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def say(process, line: str) -> None:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hears(process, line: str) -> bool:
    return process.stdout.readline() == f"{line}\n"


def waits(process) -> bool:
    """It sleeps between two looks, and has said nothing."""
    return not select.select([process.stdout], [], [], 0.2)[0]


def until_it_stands_in_the_door(place: Path) -> None:
    """Until somebody who wants to be alone keeps new ones out: its process may just begin."""
    until = time.monotonic() + 60
    with (place / "door").open() as door:
        while True:
            try:
                fcntl.flock(door, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            fcntl.flock(door, fcntl.LOCK_UN)
            assert time.monotonic() < until
            time.sleep(0.05)  # or it would never find the door free


def test_who_is_alone_waits_for_those_that_run_and_new_ones_wait_for_it(begin, tmp_path):
    one, two, alone = begin(), begin(), begin()
    say(one, "together")
    say(two, "together")
    assert hears(one, "in") and hears(two, "in")
    say(alone, "alone")
    until_it_stands_in_the_door(tmp_path)
    assert waits(alone)
    say(two, "")
    assert hears(two, "out")
    say(two, "together")
    assert waits(two) and waits(alone), "one still runs; two must not go before who waits"
    say(one, "")
    assert hears(one, "out") and hears(alone, "in") and waits(two)
    say(alone, "")
    assert hears(alone, "out") and hears(two, "in")


def test_a_turn_dies_with_its_process(begin):
    alone, other = begin(), begin()
    say(alone, "alone")
    assert hears(alone, "in")
    say(other, "together")
    began = time.monotonic()
    assert waits(other)
    alone.kill()
    assert hears(other, "in") and time.monotonic() - began < 60
