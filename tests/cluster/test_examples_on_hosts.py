"""The examples run unchanged over three hosts, with $UPIPE_CLUSTER set and nothing else, and do what they do on one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import ROOT, Hosts, hosts_of, until
from upipe.cluster import routes
from upipe.errors import ClusterError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
FRAMES = 120


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with hosts_of(3, tmp_path) as found:
        found.start()
        yield found


class Example:
    """An example that runs on host 0, its workers wherever the cluster put them."""

    def __init__(self, hosts: Hosts, script: str, *arguments: str) -> None:
        self.hosts = hosts
        self.most: Counter[tuple[int, str]] = Counter()
        """By host and processor: the most workers that were seen there at a time."""
        self._out = hosts.directory / "example.out"
        with self._out.open("wb") as out:
            self.program = hosts.lan.popen(
                0, sys.executable, str(ROOT / "examples" / script), *arguments, cwd=hosts.directory, stdout=out,
                stdin=subprocess.DEVNULL, stderr=out, env=hosts.environment(0) | {"UPIPE_CLUSTER": "127.0.0.1:7420"},
            )  # fmt: skip

    @property
    def out(self) -> str:
        """What it printed so far."""
        return self._out.read_text()

    def run_until(self, condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
        """Look at its workers until something is so; it must not end before."""

        def look() -> bool:
            self._look()
            over = self.program.poll() is not None
            met = bool(condition())
            assert met or not over, f"it ended before {what}:\n{self.out}\n{self.hosts.told()}"
            return met

        until(look, seconds, what)

    def _look(self) -> None:
        for host in range(3):
            found: Counter[str] = Counter()
            for pid in self.hosts.workers(host):
                with suppress(OSError):  # it ended this instant
                    found[Path(f"/proc/{pid}/comm").read_text().partition("#")[0]] += 1
            for processor, count in found.items():
                self.most[host, processor] = max(self.most[host, processor], count)

    def end(self, seconds: float = 150.0) -> str:
        """Its output, after its good end."""
        self.run_until(lambda: self.program.poll() is not None, "its end", seconds)
        assert self.program.returncode == 0, f"{self.out}\n{self.hosts.told()}"
        return self.out

    def finished(self, stream: str) -> int:
        """Frames of a stream (e1-detector-writer) that were finished, as the coordinator was told."""
        try:
            [pipe] = self.hosts.ask(0, routes.PIPES).pipes
        except (ClusterError, ValueError):
            return 0
        book = pipe.told.books.get(stream)
        return 0 if book is None else int(book.finished)


def video(hosts: Hosts) -> Example:
    return Example(hosts, "02_video/video.py", "--workers", "6", "--out", str(hosts.directory / "out"))


def decoded(path: Path) -> int:
    """Frames of a video that come out of the decoder."""
    av: Any = pytest.importorskip("av")
    with av.open(str(path)) as clip:
        return sum(1 for _ in clip.decode(video=0))


def is_whole(hosts: Hosts, out: str) -> None:
    """Every frame was written, with a face; the clip and the picture are there."""
    cv2: Any = pytest.importorskip("cv2")
    assert f"{FRAMES} of {FRAMES} frames written, {FRAMES} with face" in out
    assert "books balanced" in out
    assert decoded(hosts.directory / "out" / "carphone.mp4") == FRAMES
    assert cv2.imread(str(hosts.directory / "out" / "carphone.png")).shape == (1157, 1670, 3)


def test_the_video_is_the_same_with_detectors_on_three_hosts(hosts: Hosts) -> None:
    pytest.importorskip("av")
    example = video(hosts)
    out = example.end()
    is_whole(hosts, out)
    assert [example.most[host, "detector"] for host in range(3)] == [2, 2, 2]


def test_the_video_is_whole_when_a_host_with_a_third_of_the_detectors_dies(hosts: Hosts) -> None:
    pytest.importorskip("av")
    example = video(hosts)
    example.run_until(lambda: example.finished("e1-detector-writer") >= FRAMES // 4, "a quarter is written")
    [victim, *_] = [host for host in (1, 2) if not hosts.workers(host, "writer")]
    assert len(hosts.workers(victim, "detector")) == 2
    hosts.kill_host(victim)
    assert example.finished("e1-detector-writer") < FRAMES - 20, "this was in the middle"
    is_whole(hosts, example.end())


def test_the_words_are_the_same_with_counters_on_three_hosts(hosts: Hosts) -> None:
    example = Example(hosts, "03_words/words.py", "--workers", "6", "--limit", "8000")
    out = example.end()
    assert "check: a single process counts the same" in out
    assert "books balanced" in out
    assert [example.most[host, "counter"] for host in range(3)] == [2, 2, 2]
