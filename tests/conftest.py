"""The whole suite runs in a root of sessions of its own, and each test leaves the process as it found it."""

from __future__ import annotations

import atexit
import os
import shutil
from collections.abc import Generator, Iterator

import pytest

from tests.memq.helpers import FORK
from tests.turns import turn
from upipe.memq import segment

if segment._session is None and "UPIPE_SHM" not in os.environ:  # other programs come and go in the usual root
    os.environ["UPIPE_SHM"] = f"/dev/shm/upipe-test-{os.getpid()}"
    atexit.register(shutil.rmtree, os.environ["UPIPE_SHM"], ignore_errors=True)
_ROOT = os.environ.get("UPIPE_SHM")
_PID = os.getpid()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around everything: who waits for its turn runs into no timeout
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Each test has its turn; one that is marked `alone` has the machine."""
    with turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """No forked child goes on with the suite, and who moves the root moves it back: the session is where it began."""
    yield
    if os.getpid() != _PID:
        os._exit(99)
    assert os.environ.get("UPIPE_SHM") == _ROOT, "a test changed UPIPE_SHM and did not restore it"
    session = segment._session
    assert session is None or session.path.parent == segment.root(), f"a test made the session in {session.path.parent}"


@pytest.fixture
def child():
    """start(function, *args) -> a forked process, killed at the end if it still runs."""
    started = []

    def start(function, *args):
        process = FORK.Process(target=function, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()
