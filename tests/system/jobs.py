"""What workers run in the system tests."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from upipe import Processor


def sized(number: int) -> Any:
    """A value of a size that depends on its number: from eight bytes to 200 KB, checkable."""
    kind = number % 7
    if kind == 0:
        return (number, np.full(50_000 if number % 35 == 0 else 300, number, dtype=np.int32))
    if kind == 1:
        return (number, b"x" * (number % 5000))
    if kind == 2:
        return (number, {"n": number, "text": "é" * (number % 100)})
    return number


def number_of(value: Any) -> int:
    """The number, checking the rest."""
    if isinstance(value, int):
        return value
    number, rest = value
    if isinstance(rest, np.ndarray):
        assert (rest == number).all()
    elif isinstance(rest, bytes):
        assert rest == b"x" * (number % 5000)
    else:
        assert rest["n"] == number
    return int(number)


def reader(count: int, gate: Path | None = None) -> Any:
    """A generator function of so many sized values; the second half waits for the file `gate`."""

    def read() -> Iterator[Any]:
        for number in range(count):
            while gate is not None and number == count // 2 and not gate.exists():
                time.sleep(0.01)
            yield sized(number)

    return read


def busy(seconds: float) -> None:
    """Take that much time of the clock, as work would."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def check(value: Any) -> Any:
    """Map: the same value, checked, after a little work."""
    number_of(value)
    busy(0.0004)
    return value


def check_slowly(value: Any) -> Any:
    """Map: check(), taking its time."""
    time.sleep(0.01)
    return check(value)


def to_number(value: Any) -> int:
    """Map: the number."""
    return number_of(value)


def double(value: int) -> int:
    return value * 2


def identity(value: Any) -> Any:
    return value


def count_up(count: int) -> Any:
    def numbers() -> Iterator[int]:
        yield from range(count)

    return numbers


def endless() -> Iterator[int]:
    """A source that never ends by itself."""
    number = 0
    while True:
        yield number
        number += 1


def slow(value: Any) -> Any:
    time.sleep(0.05)
    return value


def stuck(value: Any) -> Any:
    """Never returns."""
    while True:
        signal.pause()


def sink(value: Any) -> None:
    return None


def poisoned(value: int) -> int:
    """Dies of 13."""
    if value == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def with_child(value: Any) -> int:
    """Map: starts a process of its own that would run on, and one that leaves the group and the session."""
    subprocess.Popen(["sleep", "1000"])
    return os.getpid()


def with_daemon(value: Any) -> int:
    """Map: starts a process that leaves group and session, and is orphaned."""
    subprocess.Popen(["setsid", "sh", "-c", "sleep 1000 & exit 0"])
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return os.getpid()


async def driver_emitting() -> None:
    """Driver: emits until the stream is drained."""
    me = Processor("driver")
    await me.connect()
    number = 0
    while True:
        await me.emit_sync(number)
        number += 1


def complaining(value: int) -> None:
    """Raises, at length, with a letter that UTF-8 does not know."""
    raise ValueError(f"{value} \udcff " + "no " * 200_000)


def pages() -> Iterator[bytes]:
    """A source of more than its queue holds, which ends."""
    for _ in range(300):
        yield b"p" * 1000


class Tally:
    """Counts pages, and takes its time for numbers. Its checkpoints are further apart than any queue is long."""

    def __init__(self) -> None:
        self.pages = 0

    def process(self, value: Any) -> Any:
        if isinstance(value, bytes):
            self.pages += 1
            return "page"
        busy(0.0002)
        return None

    def checkpoint(self) -> int:
        return self.pages

    def restore(self, state: int) -> None:
        self.pages = state
