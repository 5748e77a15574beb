"""Fixtures of the queue tests: whatever a test makes is gone at its end."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from tests.memq.helpers import Memory
from upipe.memq.queue import MemQ


@pytest.fixture
def queue():
    """make(size, ...) -> MemQ, closed and unlinked at the end."""
    made = []

    def make(size: int = 1 << 16, **knobs) -> MemQ:
        made.append(MemQ(size, **knobs))
        return made[-1]

    yield make
    for q in made:
        q.close()
        q.unlink()


@pytest.fixture
def memory():
    """memory(q) -> Memory."""
    made = []

    def make(q: MemQ) -> Memory:
        made.append(Memory(q))
        return made[-1]

    yield make
    for m in made:
        m.close()


@pytest.fixture
def shm():
    """A directory of sessions of its own, in shared memory."""
    path = Path(f"/dev/shm/upipe-test-{os.getpid()}-{time.monotonic_ns()}")
    yield path
    shutil.rmtree(path, ignore_errors=True)
