"""Sessions and segment files: what is created, refused, swept, and left after every kind of end."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.memq.helpers import FORK, ROOT, Thread, end, few_descriptors, kill, python, until
from upipe.errors import OutOfSharedMemory, QueueNotFound, SegmentInvalid, SegmentRefused
from upipe.memq import segment
from upipe.memq.queue import MemQ


def path_of(q: MemQ) -> Path:
    return segment.find(q.name)


# ---------------------------------------------------------------- create and attach


def test_files_and_directories_are_private_and_backed_by_memory(queue):
    q = queue(1 << 20)
    path = path_of(q)
    info = path.stat()
    assert stat.S_IMODE(info.st_mode) == 0o600
    assert info.st_blocks * 512 >= info.st_size > 1 << 20
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(segment.root().stat().st_mode) == 0o700
    assert path.parent.name == f"{os.getpid()}-{segment.start_time(os.getpid())}"


def spoil(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (0, b"\0" * 8, "no uPipe queue"),
        (8, (99).to_bytes(4, "little"), "layout version 99"),
        (12, b"\1\2\3\4", "fingerprint 04030201"),
        (16, (5000).to_bytes(8, "little"), "no uPipe queue"),
        (16, (1 << 63).to_bytes(8, "little"), "no uPipe queue"),
        (16, (1 << 20).to_bytes(8, "little"), "truncated"),
        (24, (1 << 40).to_bytes(8, "little"), "truncated"),
    ],
)
def test_a_file_that_is_no_queue_of_this_version_is_refused_with_both_versions(queue, offset, data, words):
    q = queue()
    spoil(path_of(q), offset, data)
    with pytest.raises(SegmentInvalid, match=words):
        MemQ.attach(q.name)


@pytest.mark.parametrize("size", [0, 7, 4095, 4096, 40_000])
def test_a_truncated_file_is_refused_before_it_is_mapped(queue, size):
    q = queue()
    os.truncate(path_of(q), size)
    with pytest.raises(SegmentInvalid):
        MemQ.attach(q.name)


def test_modes_owners_links_and_other_files_are_refused(queue, tmp_path):
    q = queue()
    path = path_of(q)
    path.chmod(0o640)
    with pytest.raises(SegmentRefused, match="0640"):
        MemQ.attach(q.name)
    path.chmod(0o600)
    link = path.parent / "link"
    link.symlink_to(path)
    fifo = path.parent / "fifo"
    os.mkfifo(fifo, 0o600)
    folder = path.parent / "folder"
    folder.mkdir()
    try:
        with pytest.raises(SegmentRefused, match="symbolic link"):
            MemQ.attach(f"{path.parent.name}/link")
        for name in ("fifo", "folder"):
            with pytest.raises(SegmentRefused):
                MemQ.attach(f"{path.parent.name}/{name}")
    finally:
        link.unlink()
        fifo.unlink()
        folder.rmdir()
    with pytest.raises(SegmentInvalid):
        MemQ.attach(f"{path.parent.name}/lock")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_files_of_another_user_are_refused(queue, shm, monkeypatch):
    q = queue()
    os.chown(path_of(q), 12345, -1)
    with pytest.raises(SegmentRefused, match="owner 12345"):
        MemQ.attach(q.name)
    shm.mkdir(mode=0o700)
    os.chown(shm, 12345, -1)
    monkeypatch.setenv("UPIPE_SHM", str(shm))
    with pytest.raises(SegmentRefused, match="owner 12345"):
        segment.root()


def test_a_root_that_is_open_to_others_or_no_directory_is_refused(shm, monkeypatch):
    monkeypatch.setenv("UPIPE_SHM", str(shm))
    shm.mkdir(mode=0o700)
    shm.chmod(0o755)
    with pytest.raises(SegmentRefused, match="0755"):
        segment.root()
    shm.rmdir()
    shm.write_bytes(b"")
    with pytest.raises(SegmentRefused):
        segment.root()
    shm.unlink()
    shm.symlink_to("/tmp")
    with pytest.raises(SegmentRefused):
        segment.root()
    shm.unlink()
    monkeypatch.setenv("UPIPE_SHM", f"{shm}/missing/parent")
    with pytest.raises(OutOfSharedMemory, match="cannot create"):
        segment.root()


@pytest.mark.parametrize("name", ["", "..", "../x", "a/..", "a/b/c", "/etc/passwd", "no-such-queue", "1-1/q.1"])
def test_names_that_lead_nowhere_are_not_found(name):
    with pytest.raises(QueueNotFound):
        MemQ.attach(name)


def test_a_label_is_found_while_one_live_session_has_it(shm):
    done = python(
        "import os\n"
        "from upipe.memq import MemQ, segment\n"
        "from upipe.errors import QueueNotFound\n"
        "q = MemQ(4096, name='label')\n"
        "MemQ.attach('label').close()\n"
        "dead = segment.root() / '999999999-1'\n"
        "dead.mkdir(); (dead / 'label').write_bytes(b'')\n"
        "MemQ.attach('label').close()\n"  # what a dead session left does not count
        "alive = segment.root() / f'1-{segment.start_time(1)}'\n"
        "alive.mkdir(); (alive / 'label').write_bytes(b'')\n"
        "try:\n"
        "    MemQ.attach('label')\n"
        "except QueueNotFound as error:\n"
        "    print(error)\n",
        shm,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 queues are called 'label'")


# ---------------------------------------------------------------- too little shared memory


def test_a_queue_larger_than_shared_memory_says_both_sizes_and_leaves_nothing():
    before = sorted(os.listdir(segment.process_session().path))
    with pytest.raises(OutOfSharedMemory, match=r"has [\d,]+ bytes .* needs 154,\d+"):
        MemQ(1 << 37)
    assert sorted(os.listdir(segment.process_session().path)) == before


UNSHARE = os.getuid() == 0 and shutil.which("unshare") is not None
UNSHARE = UNSHARE and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not UNSHARE, reason="needs root and mount namespaces")
def test_on_a_small_tmpfs_creation_fails_cleanly_and_smaller_queues_still_work(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, pathlib
        from upipe.errors import OutOfSharedMemory
        from upipe.memq import MemQ, Queue, segment
        kept = []
        try:
            while True:
                kept.append(MemQ(1 << 20))
        except OutOfSharedMemory as error:
            print(error)
        assert 1 <= len(kept) <= 3, kept
        files = [p.name for p in segment.process_session().path.iterdir() if p.name.startswith("q.")]
        assert len(files) == len(kept), files
        q = Queue()                      # takes a smaller ring rather than fail
        for n in range(20):
            q.put(bytes([n]) * 50_000)   # never SIGBUS: all pages are there
        assert [q.get()[0] for n in range(20)] == list(range(20))
        kept.pop().close()
        print("fine")
        """)
    )
    command = f"mount -t tmpfs -o size=4m,mode=1777 tmpfs /dev/shm && exec {sys.executable} {script}"
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert "--shm-size" in first
    assert last == "fine"


# ---------------------------------------------------------------- sessions and their ends


def test_threads_that_need_the_session_first_get_the_same_one(shm):
    done = python(
        "import threading\n"
        "from upipe.memq import segment\n"
        "barrier = threading.Barrier(16)\n"
        "found = []\n"
        "def work():\n"
        "    barrier.wait(); found.append(segment.process_session())\n"
        "threads = [threading.Thread(target=work) for _ in range(16)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(len(set(map(id, found))), len(list(segment.root().iterdir())))\n",
        shm,
    )
    assert done.stdout.split() == ["1", "1"], done.stderr
    assert list(shm.iterdir()) == []


ENDS = {
    "end of script": "",
    "sys.exit": "sys.exit(0)",
    "exception": "raise SystemExit",
    "thread still waiting": "threading.Thread(target=q.get, daemon=True).start()",
    "forked child that returns": "pid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: q.put(1)",
    "multiprocessing loaded later": "import multiprocessing",
    "event loop with a pending get": (
        "import asyncio\nasync def main():\n    asyncio.ensure_future(q.aget()); await asyncio.sleep(0)\n"
        "asyncio.run(main())"
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_ends_normally_leaves_nothing(shm, how):
    code = (
        "import os, sys, threading, queue\nfrom upipe.memq import MemQ\nq = MemQ(4096)\nq.put(1)\n"
        "t = MemQ.attach(q.name)\nt.take()\n"
        "try: q.get(timeout=0.001)\nexcept queue.Empty: pass\n"
    )
    done = python(code + ENDS[how], shm)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(shm.iterdir()) == []


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_leave_nothing_either(shm, tmp_path, method):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        from upipe.memq import MemQ
        def work(q, back):
            own = MemQ(4096)
            own.put(q.get())
            back.put(own.get())
        if __name__ == "__main__":
            context = multiprocessing.get_context(sys.argv[1])
            q, back = MemQ(4096), MemQ(4096)
            p = context.Process(target=work, args=(q, back))
            p.start()
            q.put("round")
            print(back.get())
        """)
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT), UPIPE_SHM=str(shm))
    done = subprocess.run(
        [sys.executable, "-Werror", str(script), method],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "round\n", "")
    assert list(shm.iterdir()) == []


def test_what_a_killed_process_leaves_is_swept_by_the_next_and_live_mappings_stay(shm):
    done = python(
        "import os\nfrom upipe.memq import MemQ\nq = MemQ(4096)\nprint(q.name, flush=True)\nos.kill(os.getpid(), 9)",
        shm,
    )
    assert done.returncode == -signal.SIGKILL
    left = done.stdout.strip()
    assert (shm / left).exists()
    done = python(
        "from upipe.memq import MemQ, segment\n"
        f"dead = MemQ.attach({left!r})\n"
        "dead.put(1)\n"
        "print(segment.sweep())\n"
        "mine = segment.process_session().path\n"
        "print(dead.get(), list(segment.root().iterdir()) == [mine])\n",
        shm,
    )
    assert done.stdout.splitlines() == [str([left.split("/")[0]]), "1 True"], done.stderr
    assert list(shm.iterdir()) == []


def test_the_session_of_a_killed_process_stays_while_its_forked_children_use_it(shm):
    code = (
        "import os, signal\nfrom upipe.memq import MemQ\nq = MemQ(4096)\npid = os.fork()\n"
        "if pid == 0:\n    os.close(1); os.close(2); signal.pause()\n"
        "print(q.name, pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    name, pid = python(code, shm).stdout.split()
    try:
        sweep = "from upipe.memq import segment\nprint(segment.sweep())"
        assert python(sweep, shm).stdout.strip() == "[]"
        assert (shm / name).exists()
    finally:
        os.kill(int(pid), signal.SIGKILL)
    until(lambda: segment.process_state(int(pid)) in (None, "Z"))
    until(lambda: python(sweep, shm).stdout.strip() != "[]", "the sweep")
    assert list(shm.iterdir()) == []


def test_sweeping_leaves_strangers_and_starting_sessions_alone(shm, monkeypatch):
    monkeypatch.setenv("UPIPE_SHM", str(shm))
    root = segment.root()
    (root / "notes.txt").write_text("mine")
    (root / "12-x").mkdir()
    (root / "999999998-1").write_text("a file of that name")
    (root / "999999997-1").symlink_to("/tmp")
    starting = root / "999999999-1"
    starting.mkdir()
    assert segment.sweep() == []
    old = time.time() - 2 * segment.YOUNG
    os.utime(starting, (old, old))
    assert segment.sweep() == ["999999999-1"]
    assert sorted(p.name for p in root.iterdir()) == ["12-x", "999999997-1", "999999998-1", "notes.txt"]
    assert Path("/tmp").is_dir()


def test_two_sweepers_do_not_disturb_each_other(shm, monkeypatch):
    code = "from upipe.memq import MemQ\nimport os\nq = MemQ(4096)\nos.kill(os.getpid(), 9)"
    for _ in range(3):
        python(code, shm)
    assert len(list(shm.iterdir())) >= 1
    monkeypatch.setenv("UPIPE_SHM", str(shm))
    threads = [Thread(segment.sweep) for _ in range(8)]
    swept = [name for t in threads for name in t.result()]
    assert len(swept) >= 1
    assert list(shm.iterdir()) == []


def test_remove_dead_removes_only_what_is_dead(child):
    made = FORK.SimpleQueue()

    def lives():
        made.put(str(segment.process_session().path))
        signal.pause()

    p = child(lives)
    path = Path(made.get())
    pid, start = path.name.split("-")
    segment.remove_dead(int(pid), int(start))
    assert path.exists()
    kill(p)
    segment.remove_dead(int(pid), int(start))
    assert not path.exists()
    segment.remove_dead(int(pid), int(start))
    made.close()


def test_a_worker_that_died_just_as_it_made_its_session_leaves_nothing(child):
    p = child(signal.pause)
    path = segment.session_path(p.pid, segment.start_time(p.pid))
    path.mkdir()  # killed before it made the lock
    kill(p)
    segment.sweep()
    assert path.exists()  # seen from another pid namespace it might be about to make it
    segment.remove_dead(*map(int, path.name.split("-")))
    assert not path.exists()


def test_a_forked_worker_can_let_go_of_its_parents_session(child):
    def works():
        mine = segment._session
        segment.forked_session()
        assert segment._session is None
        assert mine._lock == -1
        own = segment.process_session()
        assert own.pid == os.getpid()
        segment.end_worker_session()
        assert not own.path.exists()
        os._exit(0)

    segment.process_session()
    end(child(works))
    assert segment.process_session().path.exists()


def test_without_descriptors_no_half_session_is_left(child):
    def works():
        segment.forked_session()
        with few_descriptors(0), pytest.raises(OSError):  # noqa: PT011  (EMFILE, whatever it hits first)
            MemQ(4096)
        q = MemQ(4096)
        q.put(1)
        assert q.get() == 1
        os._exit(0)

    end(child(works))


def test_start_time_and_state_read_processes_with_odd_names(tmp_path):
    odd = tmp_path / "a) R (b"
    odd.write_text("#!/bin/sh\nread line\n")
    odd.chmod(0o755)
    process = subprocess.Popen([str(odd)], stdin=subprocess.PIPE)
    assert segment.start_time(process.pid) > segment.start_time(1)
    assert segment.process_state(process.pid) in "RSD"
    process.communicate(b"\n")
    assert segment.start_time(process.pid) is None
    assert segment.process_state(process.pid) is None
