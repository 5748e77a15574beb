"""Producers and consumers that are killed at random: nothing that put() accepted is lost, nothing corrupt is delivered.

The oracle is outside uPipe: plain files, written with O_APPEND, one write(2) per line, so that a SIGKILL leaves whole
lines. Each process writes down what it is about to do and what it has done:

    producer   I <id>   about to put      D <id>   put returned
    consumer   C <id> <hash of the content> <deliveries>   taken and read, not finished yet
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.memq.helpers import FORK, descriptors, until
from upipe.errors import EndOfStream
from upipe.memq import _ring, segment
from upipe.memq.queue import MemQ

KILLS = 1000 if os.environ.get("UPIPE_LONG") == "1" else 200
PRODUCERS = CONSUMERS = 4


def content(number: int) -> bytes:
    """64 B to 1 MiB, from the id alone: the id, and then bytes that follow from it."""
    rng = random.Random(number)
    size = int(64 * 2 ** rng.uniform(0, 14))
    block = hashlib.sha256(str(number).encode()).digest()
    return number.to_bytes(8, "little") + (block * (size // 32 + 1))[: size - 8]


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Ledger:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(self, *words: object) -> None:
        os.write(self.fd, (" ".join(map(str, words)) + "\n").encode())


def producer(name: str, folder: Path, first: int, stop: Path) -> None:
    q = MemQ.attach(name)
    ledger = Ledger(folder / f"p{os.getpid()}")
    rng = random.Random(first)
    number = first
    while not os.path.exists(stop):
        ledger.note("I", number)
        how = rng.randrange(4)
        data = content(number)
        if how == 0:
            with q.reserve(len(data), "u1") as view:
                view[:] = memoryview(data)
        elif how == 1:
            q.put_many([data])
        else:
            q.put(data)
        ledger.note("D", number)
        number += 1
    q.close()


def consumer(name: str, folder: Path) -> None:
    q = MemQ.attach(name)
    ledger = Ledger(folder / f"c{os.getpid()}")
    rng = random.Random(os.getpid())
    try:
        while True:
            if rng.randrange(4) == 0:
                with q.borrow() as view:
                    data = bytes(view)
                    ledger.note("C", int.from_bytes(data[:8], "little"), digest(data), q.header()[1])
            else:
                data = bytes(q.take())
                ledger.note("C", int.from_bytes(data[:8], "little"), digest(data), q.header()[1])
                q.finish()
    except EndOfStream:
        q.close()


def left_by(pids: set[int]) -> list[str]:
    """Sessions of these processes. (Others, of whoever else runs on this machine, are not ours to judge.)"""
    return [entry.name for entry in segment.root().iterdir() if entry.name.split("-")[0] in map(str, pids)]


@pytest.mark.chaos
@pytest.mark.timeout(900 if KILLS > 200 else 400)
def test_nothing_is_lost_or_corrupt_when_producers_and_consumers_are_killed_at_random(tmp_path, monkeypatch):
    rng = random.Random(20240)
    _ring.forget_bells()
    before = descriptors()
    q = MemQ(8 << 20)
    q.never_end()  # until the killing is over
    stop = tmp_path / "stop"  # no Event: its lock may die with a process that is killed
    running: dict[int, tuple[object, str]] = {}
    started = Counter()
    pids: set[int] = set()

    def start(role: str) -> None:
        started[role] += 1
        if role == "producer":
            args = (q.name, tmp_path, started[role] * 10**6, stop)
            process = FORK.Process(target=producer, args=args)
        else:
            process = FORK.Process(target=consumer, args=(q.name, tmp_path))
        process.start()
        running[process.pid] = (process, role)
        pids.add(process.pid)

    def reap(pid: int, expected: int) -> str:
        process, role = running.pop(pid)
        process.join(30)
        assert process.exitcode == expected, f"{role} {pid} ended with {process.exitcode}"
        process.close()
        return role

    for role in ["producer"] * PRODUCERS + ["consumer"] * CONSUMERS:
        start(role)
    killed = Counter()
    deadline = time.monotonic() + KILLS * 1.5
    for _ in range(KILLS):
        assert time.monotonic() < deadline, f"only {killed} kills: the queue is stuck: {q.stats()}"
        passed = q.stats().passed
        wanted = passed + rng.randrange(1, 40)
        until(lambda wanted=wanted: q.stats().passed >= wanted, f"progress from {passed}: {q.stats()}")
        victim = rng.choice(list(running))
        os.kill(victim, signal.SIGKILL)
        role = reap(victim, -signal.SIGKILL)
        killed[role] += 1
        start(role)

    stop.touch()
    for pid in [pid for pid, (_, role) in running.items() if role == "producer"]:
        reap(pid, 0)
    until(lambda: q.stats().in_flight == 0 or q.recover_dead(), f"the rest to be consumed: {q.stats()}")
    until(lambda: q.stats().in_flight == 0, f"the rest to be consumed: {q.stats()}")
    q.close_producer(1023)  # the end that never_end() kept open
    for pid in list(running):
        reap(pid, 0)

    intended, put, consumed = set(), set(), Counter()
    delivered_again, wrong = set(), []
    stop.unlink()
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert text.endswith("\n") or not text
        for line in text.splitlines():
            mark, number, *rest = line.split()
            number = int(number)
            if mark == "I":
                intended.add(number)
            elif mark == "D":
                put.add(number)
            else:
                consumed[number] += 1
                if rest[0] != digest(content(number)):
                    wrong.append(number)
                if int(rest[1]) > 1:
                    delivered_again.add(number)
    assert wrong == [], "corrupt frames were delivered"
    assert put - consumed.keys() == set(), "frames that put() accepted were lost"
    assert consumed.keys() <= intended, "frames came out that nobody put in"
    twice = {number for number, count in consumed.items() if count > 1}
    assert twice <= delivered_again, "a frame came twice without its delivery count telling so"
    assert len(consumed.keys() - put) <= killed["producer"], "more unrecorded puts than killed producers"
    stats = q.stats()
    assert sum(consumed.values()) - len(consumed) <= stats.redelivered <= killed["consumer"]
    assert stats.balanced
    assert (stats.in_flight, stats.corrupt, stats.dead, stats.dropped) == (0, 0, 0, 0)
    assert stats.finished == len(consumed) == stats.emitted
    print(
        f"\n{sum(killed.values())} kills {dict(killed)}, {len(put)} puts, {stats.redelivered} redelivered, "
        f"{stats.aborted} aborted, {len(twice)} recorded twice"
    )

    name = q.name
    q.close()
    q.unlink()
    assert not (segment.root() / name).exists()
    # One that was killed between making its session and locking it leaves a directory without a lock. That might be
    # of a process that starts, so it is left alone for a minute; of these processes none starts any more.
    monkeypatch.setattr(segment, "YOUNG", 0.0)
    until(lambda: segment.sweep() is not None and not left_by(pids), "the sweep")
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # no zombie, no child
    _ring.forget_bells()  # those kept to ring others with are bounded, and no leak
    assert descriptors() <= before + 1  # the session's lock, when this test was the first to need it
