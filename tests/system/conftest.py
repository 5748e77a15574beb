"""Every system test ends with nothing left: no process, no zombie, no descriptor, no file in shared memory."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty

import pytest

from tests.support import proc_words, threads
from tests.system.support import Script, descendants, segment, stat, until
from upipe.memq import MemQ
from upipe.runtime import process

ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us, so that we can count them


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
        if not ("/bell." in link and link.endswith("(deleted)")):  # the ring caches write ends, 128 at most
            found[name] = link
    return found


def _children() -> list[int]:
    found = []
    for task in os.listdir("/proc/self/task"):
        found += map(int, proc_words(f"/proc/self/task/{task}/children"))
    return found


@pytest.fixture(scope="session", autouse=True)
def lookout() -> None:
    """The thread that watches for naps has a descriptor, and begins once in a process, when naps are frequent: which
    test makes it begin depends on the timing."""
    with MemQ(4096, producers=2) as queue:
        for _ in range(50):
            with pytest.raises(Empty):
                queue.get(timeout=0.001)
    assert threads("upipe-lookout")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Around every test."""
    servers: list[int] = []
    for name in ("_fork_server", "_exec_server"):
        original = getattr(process, name)

        def recording(*args: object, original: Callable[..., int] = original) -> int:
            servers.append(original(*args))
            return servers[-1]

        monkeypatch.setattr(process, name, recording)
    session = segment.process_session()
    before = _descriptors()
    running = set(descendants(os.getpid()))
    files = set(os.listdir(session.path))
    sessions = set(os.listdir(segment.root()))
    yield
    gc.collect()
    until(lambda: not set(descendants(os.getpid())) - running, what="processes end")
    zombies = [pid for pid in _children() if (told := stat(pid)) and told[0] == "Z"]
    assert not set(zombies) & set(servers), f"fork servers were not reaped: {zombies}"
    for pid in zombies:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass
    gc.collect()
    after = _descriptors()
    new = {fd: link for fd, link in after.items() if before.get(fd) != link}
    assert not new, f"descriptors are left: {new}"
    left = sorted(set(os.listdir(session.path)) - files)
    assert not left, f"files are left in the session: {left}"
    names = set(os.listdir(segment.root())) - sessions
    assert not [name for name in names if segment._is_dead(segment.root() / name)], f"sessions are left: {names}"


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Start scripts that end with the test."""
    started: list[Script] = []

    def start(code: str, **options: object) -> Script:
        started.append(Script(code, tmp_path, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.close()
