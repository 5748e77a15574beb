"""Queue, JoinableQueue and SimpleQueue: what code written for multiprocessing's queues relies on.

CPython's own tests of them run here too, against these classes, where the installed Python has its test suite.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import unittest
from queue import Empty, Full

import numpy as np
import pytest

from tests.memq.helpers import FORK, ROOT, Thread, end, kill, python, until
from upipe.memq import JoinableQueue, Queue, SimpleQueue, mpqueue, segment

METHODS = ["fork", "spawn", "forkserver"]


@pytest.fixture
def make():
    made = []

    def build(kind=Queue, *args, **knobs):
        made.append(kind(*args, **knobs))
        return made[-1]

    yield build
    for q in made:
        q.close()


@pytest.fixture
def small(monkeypatch):
    """Rings of 64 KiB, so that they overflow soon."""
    monkeypatch.setattr(mpqueue, "RING_BYTES", 1 << 16)


def spills() -> list[str]:
    return [p.name for p in segment.process_session().path.iterdir() if p.name.startswith("q.spill")]


# ---------------------------------------------------------------- CPython's tests


def cpython_tests():
    try:
        from test import _test_multiprocessing as theirs
    except ImportError:
        return None

    class TestQueue(theirs._TestQueue, theirs.ProcessesMixin, unittest.TestCase):
        """CPython's test_multiprocessing, class _TestQueue, on our queues."""

        Queue = staticmethod(Queue)
        JoinableQueue = staticmethod(JoinableQueue)

    return TestQueue


THEIRS = cpython_tests()


@pytest.mark.slow
@pytest.mark.parametrize("name", [] if THEIRS is None else unittest.TestLoader().getTestCaseNames(THEIRS))
def test_cpythons_own_test_of_multiprocessing_queue_passes(name, monkeypatch):
    from test import _test_multiprocessing as theirs

    # Their waits are seconds long, to be safe with slow pipes; what they prove does not depend on that.
    for constant, value in (("DELTA", 0.02), ("TIMEOUT1", 0.12), ("TIMEOUT2", 0.05), ("TIMEOUT3", 0.2)):
        monkeypatch.setattr(theirs, constant, value)
    monkeypatch.setattr(multiprocessing, "Queue", Queue)
    monkeypatch.setattr(multiprocessing, "JoinableQueue", JoinableQueue)
    monkeypatch.setattr(multiprocessing.queues, "Queue", Queue)
    monkeypatch.setattr(multiprocessing, "Process", FORK.Process)
    monkeypatch.setattr(THEIRS, "Process", FORK.Process)
    result = unittest.TestResult()
    THEIRS(name).run(result)
    assert not result.errors + result.failures, (result.errors + result.failures)[0][1]
    assert result.testsRun == 1


# ---------------------------------------------------------------- values


class Plain:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return self.x == other.x

    __hash__ = None


@pytest.mark.parametrize("kind", [Queue, JoinableQueue, SimpleQueue])
def test_values_come_back_as_pickle_would_bring_them(make, kind):
    q = make(kind)
    values = [
        None, True, 1, -(10**40), 1.5, "text", "\ud800 lone", b"bytes", (1, (2,)), [1], {"a": {1, 2}}, Plain(3),
        range(3), np.float64(2.5), np.int8(1), Empty, len, bytearray(b"ab"),
    ]  # fmt: skip
    for value in values:
        q.put(value)
    for value in values:
        got = q.get()
        assert got == value
        assert type(got) is type(value)
    table = np.arange(6).reshape(2, 3)
    arrays = [
        table, table.T, np.array([{}, None]), np.zeros((0, 3), "f2"), np.array([1, 2], ">i4"), np.array(["ab", "c"]),
        np.array(5),
    ]  # fmt: skip
    for array in arrays:
        q.put(array)
        got = q.get()
        assert got.dtype == pickle.loads(pickle.dumps(array)).dtype  # which makes other byte orders native
        assert np.array_equal(got, array)
        assert got.flags.writeable


def test_what_only_multiprocessing_can_pickle_travels_too(make):
    q = make()
    ours, theirs = multiprocessing.Pipe()
    q.put(theirs)
    theirs = q.get()
    ours.send("through")
    assert theirs.recv() == "through"
    ours.close()
    theirs.close()


def test_later_changes_of_a_value_do_not_reach_the_queue(make, small):
    q = make()
    array = np.zeros(30_000, "u1")
    table = [0]
    for n in range(5):  # the later ones wait in the overflow
        array[:] = n
        table[0] = n
        q.put(array)
        q.put(table)
    for n in range(5):
        assert (q.get() == n).all()
        assert q.get() == [n]


# ---------------------------------------------------------------- bounds


def test_maxsize_counts_values_and_blocks_until_one_is_got(make):
    q = make(Queue, 3)
    for n in range(3):
        q.put(n)
    assert q.full()
    assert q.qsize() == 3
    with pytest.raises(Full):
        q.put_nowait(3)
    with pytest.raises(Full):
        q.put(3, timeout=0.02)
    putter = Thread(q.put, 3)
    assert q.get() == 0
    putter.result()
    assert [q.get() for _ in range(3)] == [1, 2, 3]
    assert not q.full()
    assert q.empty()
    with pytest.raises(Empty):
        q.get(timeout=0.02)
    assert not make(Queue, -1).full()


def test_maxsize_holds_for_several_producers_together(make, child):
    q = make(Queue, 5)

    def puts():
        for n in range(200):
            q.put(n)

    processes = [child(puts) for _ in range(3)]
    got = []
    while len(got) < 600:
        assert q.qsize() <= 5
        got.append(q.get(timeout=60))
    for p in processes:
        end(p)
    assert sorted(got) == sorted(list(range(200)) * 3)


def test_maxsize_holds_while_values_wait_outside_the_ring(make, small):
    q = make(Queue, 6)
    for n in range(6):
        q.put(bytes([n]) * 20_000)
    assert q.full()
    with pytest.raises(Full):
        q.put(b"", timeout=0.02)
    got = []
    putter = Thread(q.put, b"last")
    for _ in range(7):
        got.append(q.get(timeout=60))
    putter.result()
    assert [g[:1] for g in got] == [bytes([n]) for n in range(6)] + [b"l"]


def test_an_unbounded_put_never_blocks_and_keeps_the_order(make, small):
    q = make()
    values = [bytes([n % 256]) * (n * 331 % 9000) for n in range(500)]
    for value in values:
        q.put(value)  # 2 MB into 64 KiB
    assert q.qsize() == 500
    assert [q.get(timeout=60) for _ in values] == values
    until(lambda: q.qsize() == 0)


def test_values_larger_than_the_ring_travel_through_files_that_are_gone_afterwards(make, small):
    q = make()
    values = [b"x" * 300_000, "ü" * 200_000, np.arange(100_000), [b"y" * 200_000], "small"]
    for value in values:
        q.put(value)
    assert len(spills()) == 4
    for value in values:
        got = q.get(timeout=60)
        assert type(got) is type(value)
        assert np.array_equal(got, value) if isinstance(value, np.ndarray) else got == value
    assert spills() == []


def test_a_large_value_outlives_the_process_that_put_it(make, small, child):
    q = make()
    p = child(lambda: q.put(b"z" * 500_000))
    end(p)
    assert q.get(timeout=60) == b"z" * 500_000


def test_a_spill_that_does_not_fit_raises_and_leaves_nothing(make, small, monkeypatch):
    from upipe.errors import OutOfSharedMemory

    q = make(SimpleQueue)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OutOfSharedMemory):
        q.put(b"x" * 100_000)
    assert spills() == []


# ---------------------------------------------------------------- errors


class Unserialisable:
    def __reduce__(self):
        raise AttributeError("cannot be pickled")


class Explosive:
    def __reduce__(self):
        return (_explode, ())


def _explode():
    raise RuntimeError("boom")


def test_an_unserialisable_object_is_reported_and_the_queue_lives(make, capsys):
    q = make(Queue, 1)
    q.put(Unserialisable())
    q.put(1)
    assert "cannot be pickled" in capsys.readouterr().err
    assert q.qsize() == 1
    assert q.get() == 1

    class Safe(Queue):
        seen = []

        @staticmethod
        def _on_queue_feeder_error(e, obj):
            Safe.seen.append((type(e), type(obj)))

    q = make(Safe, ctx=multiprocessing.get_context())
    q.put(Unserialisable())
    q.put(2)
    assert q.get() == 2
    assert Safe.seen == [(AttributeError, Unserialisable)]
    s = make(SimpleQueue)
    with pytest.raises(AttributeError):
        s.put(Unserialisable())


def test_a_value_that_does_not_unpickle_raises_once_and_the_next_comes(make):
    q = make()
    q.put(Explosive())
    q.put(2)
    with pytest.raises(RuntimeError, match="boom"):
        q.get()
    assert q.get() == 2


def test_a_closed_queue_says_so(make):
    for q in (make(), make(JoinableQueue)):
        q.close()
        q.close()
        for call in (lambda q=q: q.put(1), q.get, q.get_nowait):
            with pytest.raises(ValueError, match=r"Queue .* is closed"):
                call()
        q.join_thread()
    q = make()
    with pytest.raises(AssertionError, match="not closed"):
        q.join_thread()
    s = make(SimpleQueue)
    s.close()
    for call in (lambda: s.put(1), s.get, s.empty):
        with pytest.raises(OSError, match="closed"):
            call()


def test_who_put_nothing_may_ask_a_closed_queue_whether_it_is_empty(make):
    """As CPython's own test_closed_queue_empty_exceptions."""
    for kind in (Queue, JoinableQueue):
        q, used = make(kind), make(kind)
        q.close()
        assert q.empty()
        used.put("foo")
        used.close()
        with pytest.raises(OSError, match="is closed"):
            used.empty()
    q = make()
    other = pickle.loads(pickle.dumps(q))
    q.close()
    other.put(1)
    assert not q.empty()
    assert other.get() == 1
    assert q.empty()


def test_a_closed_queue_tells_its_size_as_long_as_its_owner_lives(make):
    for kind in (Queue, JoinableQueue):
        q = make(kind, 3)
        other = pickle.loads(pickle.dumps(q))
        for n in range(3):
            q.put(n)
        q.close()
        q.join_thread()
        assert (q.qsize(), q.full()) == (3, True)
        assert other.get() == 0
        assert (q.qsize(), q.full()) == (2, False)
    q = make(Queue, 3)
    other = pickle.loads(pickle.dumps(q))
    other.close()
    q._ring.unlink()  # as at its end
    for call in (other.qsize, other.empty, other.full):
        with pytest.raises(OSError, match="is closed"):
            call()


def test_close_wakes_a_thread_that_waits(make):
    q = make()
    t = Thread(q.get)
    until(lambda: q._ring.counters()["empty_waits"])
    q.close()
    with pytest.raises(ValueError, match="is closed"):
        t.result()


# ---------------------------------------------------------------- processes


def _echo(inbox, outbox):
    for value in iter(inbox.get, None):
        outbox.put((os.getpid(), value))
    inbox.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Queue, JoinableQueue, SimpleQueue])
def test_queues_reach_children_of_every_start_method(make, method, kind):
    inbox, outbox = make(kind), make(kind)
    p = multiprocessing.get_context(method).Process(target=_echo, args=(inbox, outbox))
    p.start()
    inbox.put({"n": 1})
    inbox.put(None)
    assert outbox.get() == (p.pid, {"n": 1})
    end(p)
    p.close()


def test_a_queue_may_be_pickled_at_any_time(make):
    q = make(Queue, 2)
    twin = pickle.loads(pickle.dumps(q))
    twin.put(1)
    twin.put(2)
    assert q.full()
    assert q.get() == 1
    twin.close()
    j = make(JoinableQueue)
    twin = pickle.loads(pickle.dumps(j))
    twin.put(1)
    j.get()
    j.task_done()
    twin.join()
    twin.close()


def test_get_waits_on_when_every_producer_has_closed_or_died(make, child):
    q = make()
    p = child(lambda: (q.put(1), q.close()))
    end(p)
    died = FORK.Event()

    def dies():
        q.put(2)
        died.set()
        signal.pause()

    p = child(dies)
    assert died.wait(60)
    kill(p)
    assert [q.get(timeout=60), q.get(timeout=60)] == [1, 2]
    with pytest.raises(Empty):
        q.get(timeout=0.1)
    t = Thread(q.get)
    q.put(3)
    assert t.result() == 3


def test_a_forked_child_does_not_send_what_waits_in_its_parent(make, small, child):
    q = make()
    for n in range(100):
        q.put(bytes([n]) * 3000)
    p = child(lambda: q.put(b"child"))
    got = [q.get(timeout=60) for _ in range(101)]
    end(p)
    assert [g[:1] for g in got if g != b"child"] == [bytes([n]) for n in range(100)]


@pytest.mark.parametrize("leave", ["return", "exit"])
def test_a_child_ends_only_when_what_it_put_is_in_the_ring(make, small, child, leave):
    q = make()

    def puts():
        for n in range(100):
            q.put(bytes([n]) * 3000)
        if leave == "exit":
            sys.exit(0)

    p = child(puts)
    assert [q.get(timeout=60)[0] for _ in range(100)] == list(range(100))
    end(p)


def test_cancel_join_thread_lets_a_child_end_at_once(make, small, child):
    q = make()

    def puts():
        for n in range(100):
            q.put(bytes([n]) * 3000)
        q.cancel_join_thread()

    end(child(puts))
    assert q.get(timeout=60)[0] == 0


def test_close_and_join_thread_wait_until_all_is_in_the_ring(make, small):
    q = make()
    reader = pickle.loads(pickle.dumps(q))
    for n in range(100):
        q.put(bytes([n]) * 3000)
    q.close()
    joiner = Thread(q.join_thread)
    assert [reader.get(timeout=60)[0] for _ in range(100)] == list(range(100))
    joiner.result()
    reader.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_program_leaves_no_file_process_or_message_behind(shm, tmp_path, method):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        from upipe.memq import JoinableQueue, Queue, SimpleQueue
        from upipe.memq.queue import MemQ

        def work(inbox, outbox, ring):
            for value in iter(inbox.get, None):
                outbox.put(value * 2)
                inbox.task_done()
            ring.put(Queue().qsize())

        if __name__ == "__main__":
            multiprocessing.set_start_method(sys.argv[1])
            inbox, outbox, ring = JoinableQueue(), Queue(), MemQ()
            workers = [multiprocessing.Process(target=work, args=(inbox, outbox, ring)) for _ in range(2)]
            for w in workers: w.start()
            for n in range(10): inbox.put(n)
            inbox.join()
            print(sorted(outbox.get() for _ in range(10)))
            for w in workers: inbox.put(None)
            # ends without joining: multiprocessing joins the workers at exit, and they still need the queues
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
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str([n * 2 for n in range(10)])
    assert list(shm.iterdir()) == []


def test_all_that_was_put_arrives_when_the_main_program_ends_with_values_waiting(shm):
    done = python(
        "import multiprocessing as m\n"
        "from upipe.memq import Queue, mpqueue\n"
        "mpqueue.RING_BYTES = 1 << 16\n"
        "def work(q):\n"
        "    print(sum(len(q.get()) for _ in range(100)), flush=True)\n"
        "q = Queue()\n"
        "p = m.get_context('fork').Process(target=work, args=(q,))\n"
        "p.start()\n"
        "for n in range(100): q.put(b'x' * 3000)\n",
        shm,
    )
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", "300000")
    assert list(shm.iterdir()) == []


# ---------------------------------------------------------------- JoinableQueue


def test_join_waits_for_every_task_done_and_one_too_many_is_an_error(make):
    q = make(JoinableQueue)
    q.join()
    for n in range(3):
        q.put(n)
    joiner = Thread(q.join)
    for _ in range(3):
        assert joiner.is_alive()
        q.get()
        q.task_done()
    joiner.result()
    with pytest.raises(ValueError, match="too many"):
        q.task_done()


def test_a_put_that_fails_leaves_no_unfinished_task(make):
    q = make(JoinableQueue, 1)
    q.put(1)
    with pytest.raises(Full):
        q.put_nowait(2)
    q.get()
    q.task_done()
    q.join()


def test_join_is_woken_by_another_process_and_can_be_interrupted(make, child):
    q = make(JoinableQueue)

    def works():
        for _ in range(500):
            q.get()
            q.task_done()

    for n in range(500):
        q.put(n)
    p = child(works)
    q.join()
    end(p)
    q.put(1)

    ready = FORK.Event()

    def once(*_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the next one may come before the exit
        raise KeyboardInterrupt

    def waits():
        try:
            signal.signal(signal.SIGINT, once)
            ready.set()
            q.join()
        except KeyboardInterrupt:
            os._exit(3)

    p = child(waits)
    assert ready.wait(60)
    until(lambda: "futex" in open_text(f"/proc/{p.pid}/wchan") or open_text(f"/proc/{p.pid}/stat").split()[2] == "S")
    while p.is_alive():
        os.kill(p.pid, signal.SIGINT)
        p.join(0.05)
    end(p, 3)


def open_text(path: str) -> str:
    with open(path) as file:
        return file.read()


def test_subclasses_and_annotations_work_as_with_multiprocessing():
    assert Queue[int].__origin__ is Queue
    assert SimpleQueue[str].__origin__ is SimpleQueue
    assert issubclass(JoinableQueue, Queue)
