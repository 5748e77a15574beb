"""MemQ against a list: hypothesis runs random operations of several handles and of a helper process that can be killed.

The model knows each frame: its place in the stream, its state (claimed, committed, held, given back) and who holds it.
Also here: every flipped bit of a frame is found, by every way to read it.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.memq.helpers import FORK, Memory, end
from upipe.errors import EndOfStream, FrameCorrupt
from upipe.memq.queue import POLICIES, Empty, Full, MemQ
from upipe.memq.segment import start_time

CAPACITY = 4096
GRANULE = 64
COMMITTED, HELD, AVAILABLE, CLAIMED, DONE = "committed", "held", "available", "claimed", "done"

values = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.none(), st.booleans(), st.text(max_size=20), st.binary(max_size=900),
    st.floats(allow_nan=False), st.lists(st.integers(0, 9), max_size=5),
)  # fmt: skip


def span(value: object) -> int:
    from upipe.frame import encode

    encoded = encode(value)
    return GRANULE if encoded.flags & 1 else (GRANULE + encoded.size + GRANULE - 1) // GRANULE * GRANULE


@dataclass
class Frame:
    value: object
    span: int
    state: str
    owner: object = None
    deliveries: int = 1
    padding: bool = False


@dataclass
class Model:
    """The stream from the oldest frame that is not finished; what is behind `next` is COMMITTED or CLAIMED."""

    frames: list[Frame] = field(default_factory=list)
    next: int = 0
    finished: int = 0
    aborted: int = 0
    dropped: int = 0
    refused: int = 0
    redelivered: int = 0

    def used(self) -> int:
        return sum(f.span for f in self.frames)

    def advance(self) -> None:
        while self.next and self.frames[0].state == DONE:
            self.frames.pop(0)
            self.next -= 1

    def skip(self) -> None:
        """Pass padding at the consumers' door."""
        while self.next < len(self.frames) and self.frames[self.next].padding:
            self.frames[self.next].state = DONE
            self.next += 1
        self.advance()

    def take(self, owner: object) -> Frame | None:
        for f in self.frames[: self.next]:
            if f.state == AVAILABLE:
                f.state, f.owner = HELD, owner
                return f
        self.skip()
        if self.next < len(self.frames) and self.frames[self.next].state == COMMITTED:
            f = self.frames[self.next]
            f.state, f.owner = HELD, owner
            self.next += 1
            return f
        return None

    def end(self, f: Frame) -> None:
        f.state = DONE
        self.finished += 1
        self.advance()

    def give_back(self, f: Frame) -> None:
        f.state, f.owner = AVAILABLE, None
        f.deliveries += 1
        self.redelivered += 1

    def fits(self, need: int) -> bool:
        return self.used() + need <= CAPACITY

    def drop(self, need: int, all_: bool) -> None:
        while True:
            self.skip()
            if self.next == len(self.frames) or self.frames[self.next].state != COMMITTED:
                return
            if not all_ and (self.fits(need) or self.next != 0):
                return
            self.drop_next()

    def drop_next(self) -> None:
        self.frames[self.next].state = DONE
        self.next += 1
        self.dropped += 1
        self.advance()

    def place(self, need: int, policy: str) -> Frame | None:
        """A claim for a newcomer, or None without room."""
        if policy == "block":
            if not self.fits(need):
                self.skip()
        elif not self.fits(need):
            self.drop(need, False)
        if policy == "latest" and self.fits(need):
            self.drop(need, True)
        if policy != "block" and not self.fits(need):
            self.retract(need, policy)
        if not self.fits(need):
            return None
        self.frames.append(Frame(None, need, CLAIMED))
        return self.frames[-1]

    def retract(self, need: int, policy: str) -> None:
        """A held frame pins the ring: the newest frame goes, if nobody took it and the newcomer fits then."""
        if len(self.frames) <= self.next or self.frames[-1].state != COMMITTED:
            return
        last = self.frames[-1]
        if self.used() - last.span + need > CAPACITY:
            return
        while policy == "latest":
            self.skip()
            if self.frames[self.next] is last or self.frames[self.next].state != COMMITTED:
                break
            self.drop_next()
        self.refused += 1
        self.frames.pop()

    def put(self, value: object, policy: str) -> bool:
        f = self.place(span(value), policy)
        if f is not None:
            f.value, f.state = value, COMMITTED
        elif policy == "block":
            return False
        else:
            self.refused += 1
        return True


class Helper:
    """A forked process that does what it is told on the queue, until it is killed."""

    def __init__(self, name: str) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=self._serve, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()

    @staticmethod
    def _serve(name, pipe):
        q = MemQ.attach(name)
        kept = []
        while True:
            command, argument = pipe.recv()
            answer = None
            if command == "take":
                try:
                    answer = (q.take(block=False), q.header()[1])
                    q.detach_held()
                except Empty:
                    pass
            elif command == "claim":
                kept.append(q.reserve(argument, "u1", timeout=0))
                try:
                    kept[-1].__enter__()
                    answer = True
                except Full:
                    kept.pop()
            elif command == "put":
                answer = q.send(argument)
            pipe.send(answer)

    def ask(self, command: str, argument: object = None) -> object:
        self.pipe.send((command, argument))
        return self.pipe.recv()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.process.close()
        self.pipe.close()


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.q = MemQ(CAPACITY)
        self.q.never_end()
        self.handles = [MemQ.attach(self.q.name) for _ in range(3)]
        self.model = Model()
        self.policy = "block"
        self.held: dict[int, tuple[Frame, int]] = {}
        self.helper: Helper | None = None

    @initialize(policy=st.sampled_from(list(POLICIES)))
    def start(self, policy):
        self.policy = policy
        self.q.set_policy(POLICIES[policy])

    @rule(handle=st.integers(0, 2), value=values)
    def put(self, handle, value):
        expected = self.model.put(value, self.policy)
        assert self.handles[handle].send(value) is expected

    @rule(handle=st.integers(0, 2), many=st.lists(values, max_size=8))
    def put_many(self, handle, many):
        done = self.handles[handle].put_many(many, timeout=0)
        expected = 0
        for value in many:
            if not self.model.put(value, self.policy):
                break
            expected += 1
        assert done == expected

    @rule(handle=st.integers(0, 2), many=st.lists(st.integers(0, 100), max_size=20))
    def put_array(self, handle, many):
        done = self.handles[handle].put_many(np.array(many, dtype="i8"), timeout=0)
        expected = 0
        for value in many:
            if not self.model.put(value, self.policy):
                break
            expected += 1
        assert done == expected

    @rule(handle=st.integers(0, 2))
    def get(self, handle):
        self._expect(lambda: self.handles[handle].get_nowait(), handle)

    def _expect(self, get, handle) -> None:
        f = self.model.take(handle)
        if f is None:
            with pytest.raises(Empty):
                get()
            return
        assert same(get(), f.value)
        assert self.handles[handle].header()[1] == f.deliveries
        self.model.end(f)

    @rule(handle=st.integers(0, 2), most=st.integers(1, 30))
    def get_many(self, handle, most):
        expected = []
        while len(expected) < most and (f := self.model.take(handle)) is not None:
            expected.append(f.value)
            self.model.end(f)
        if not expected:
            with pytest.raises(Empty):
                self.handles[handle].get_many(most, timeout=0)
        else:
            got = self.handles[handle].get_many(most, timeout=0)
            assert len(got) == len(expected)
            assert all(map(same, got, expected))

    @rule(handle=st.integers(0, 2))
    def take(self, handle):
        if handle in self.held:
            self.model.end(self.held.pop(handle)[0])
        f = self.model.take(handle)
        q = self.handles[handle]
        if f is None:
            with pytest.raises(Empty):
                q.take(block=False)
        else:
            assert same(q.take(block=False), f.value)
            self.held[handle] = (f, q.holding)
            assert q.header()[1] == f.deliveries

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["finish", "give back", "end"]))
    def let_go(self, data, how):
        handle = data.draw(st.sampled_from(sorted(self.held)))
        f, position = self.held.pop(handle)
        q = self.handles[handle]
        if how == "give back":
            q.give_back()
            self.model.give_back(f)
            return
        if how == "end":
            assert q.detach_held() == position
            q.end(position)
        else:
            q.finish()
        self.model.end(f)

    @rule(handle=st.integers(0, 2), fails=st.booleans())
    def borrow(self, handle, fails):
        f = self.model.take(handle)
        q = self.handles[handle]
        if f is None:
            with pytest.raises(Empty), q.borrow(timeout=0):
                pass
            return
        try:
            with q.borrow(timeout=0) as value:
                assert same(value, f.value)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            self.model.give_back(f)
        else:
            self.model.end(f)

    @rule(handle=st.integers(0, 2), size=st.integers(0, 1000), fails=st.booleans())
    def reserve(self, handle, size, fails):
        need = (GRANULE + size + GRANULE - 1) // GRANULE * GRANULE
        f = self.model.place(need, self.policy)
        value = np.full(size, 7, "u1")
        try:
            with self.handles[handle].reserve(size, "u1", timeout=0) as view:
                assert f is not None
                view[:] = 7
                if fails:
                    raise ZeroDivisionError
        except Full:
            assert f is None
        except ZeroDivisionError:
            f.state, f.padding = DONE, True
            self.model.aborted += 1
        else:
            f.value, f.state = value, COMMITTED

    @rule(handle=st.integers(0, 2))
    def close_and_attach(self, handle):
        self.handles[handle].close()
        if handle in self.held:
            self.model.give_back(self.held.pop(handle)[0])
        self.handles[handle] = MemQ.attach(self.q.name)

    @rule(policy=st.sampled_from(list(POLICIES)))
    def set_policy(self, policy):
        self.policy = policy
        self.q.set_policy(POLICIES[policy])

    # the helper process

    @precondition(lambda self: self.helper is None)
    @rule()
    def start_helper(self):
        self.helper = Helper(self.q.name)

    @precondition(lambda self: self.helper is not None)
    @rule(value=values)
    def helper_puts(self, value):
        assert self.helper.ask("put", value) is self.model.put(value, self.policy)

    @precondition(lambda self: self.helper is not None)
    @rule()
    def helper_takes(self):
        f = self.model.take("helper")
        answer = self.helper.ask("take")
        if f is None:
            assert answer is None
        else:
            assert same(answer[0], f.value)
            assert answer[1] == f.deliveries

    @precondition(lambda self: self.helper is not None)
    @rule(size=st.integers(1, 800))
    def helper_claims(self, size):
        need = (GRANULE + size + GRANULE - 1) // GRANULE * GRANULE
        f = self.model.place(need, self.policy)
        assert bool(self.helper.ask("claim", size)) is (f is not None)
        if f is not None:
            f.owner = "helper"

    @precondition(lambda self: self.helper is not None)
    @rule()
    def crash_and_recover(self):
        pid, start = self.helper.process.pid, start_time(self.helper.process.pid)
        self.helper.kill()
        self.helper = None
        for f in self.model.frames:
            if f.owner == "helper" and f.state == CLAIMED:
                f.state, f.padding = DONE, True
                self.model.aborted += 1
        for f in self.model.frames[: self.model.next]:
            if f.owner == "helper" and f.state == HELD:
                self.model.give_back(f)
        assert self.q.recover(pid, start) == []

    # what must hold after each rule

    @invariant()
    def books_balance_and_agree_with_the_model(self):
        stats = self.q.stats()
        model = self.model
        waiting = sum(f.state == AVAILABLE for f in model.frames[: model.next])
        waiting += sum(f.state == COMMITTED for f in model.frames[model.next :])
        assert self.q.qsize() == waiting
        assert stats.redelivered == model.redelivered
        assert stats.refused == model.refused
        assert stats.corrupt == 0
        assert stats.balanced
        assert 0 <= stats.depth <= CAPACITY

    def teardown(self):
        if self.helper is not None:
            self.crash_and_recover()
        for handle in list(self.held):
            self.handles[handle].give_back()
            self.model.give_back(self.held.pop(handle)[0])
        expected = []
        while (f := self.model.take("end")) is not None:
            expected.append(f.value)
            self.model.end(f)
        got = []
        while True:
            try:
                got.append(self.q.get_nowait())
            except Empty:
                break
        assert len(got) == len(expected)
        assert all(map(same, got, expected))
        stats = self.q.stats()
        assert (stats.finished, stats.dropped, stats.aborted) == (
            self.model.finished, self.model.dropped, self.model.aborted,
        )  # fmt: skip
        assert stats.depth == 0
        for handle in (*self.handles, self.q):
            handle.close()
        self.q.unlink()


def same(a: object, b: object) -> bool:
    if isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b) and (type(a) is type(b) or isinstance(a, memoryview))


TestModel = QueueMachine.TestCase
TestModel.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestModel = pytest.mark.slow(TestModel)


# ---------------------------------------------------------------- flipped bits

READS = ["get", "get_many", "array", "take", "borrow", "receive"]
FRAMES = [7, "text", None, b"", b"x" * 100, np.arange(30, dtype="i2"), np.zeros(0), {"k": [1]}, (1, 2)]


def read(q: MemQ, how: str) -> object:
    if how == "array":
        return q.get_many(timeout=0, array=True)
    if how == "get_many":
        return q.get_many(timeout=0)
    if how == "borrow":
        with q.borrow(timeout=0) as value:
            return value
    if how == "receive":
        return q.receive()
    return getattr(q, how)(block=False)


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("value", FRAMES, ids=lambda v: repr(v)[:12])
def test_any_flipped_bit_of_a_frame_is_found_and_the_frame_never_delivered(queue, value, how):
    q = queue(CAPACITY)
    m = Memory(q)
    bits = span(value) * 8 if not isinstance(value, np.ndarray) else (64 + value.nbytes) * 8
    if not isinstance(value, np.ndarray):
        from upipe.frame import encode

        encoded = encode(value)
        bits = 512 if encoded.flags & 1 else (64 + encoded.size) * 8  # behind it is padding, which carries nothing
    start = 0
    for bit in range(bits):
        q.put(value)
        m.flip(start, bit)
        with pytest.raises(FrameCorrupt):
            read(q, how)
        if how in ("take", "receive"):
            q.finish(dead=True)
        start = q.stats().head % CAPACITY
    stats = q.stats()
    assert (stats.corrupt, stats.dead, stats.finished, stats.in_flight) == (bits, bits, 0, 0)
    m.close()


@pytest.mark.parametrize("payload", [500, 100_000])
def test_flipped_bits_of_a_redelivered_frame_are_found_too(queue, payload):
    q = queue(1 << 18)
    m = Memory(q)
    for bit in (0, 33, 47, 100, 63 * 8, 64 * 8, (63 + payload) * 8 + 7):
        q.put(b"x" * payload)
        q.take()
        start = q.holding % q.capacity
        q.give_back()
        m.flip(start, bit)
        with pytest.raises(FrameCorrupt):
            q.get()
    m.close()


def test_without_the_check_values_are_delivered_as_they_are(queue):
    q = queue(CAPACITY, check_crc=False)
    m = Memory(q)
    q.put(b"a" * 100)
    m.flip(0, 64 * 8)
    assert q.get() == b"`" + b"a" * 99
    m.close()


def test_a_queue_closed_by_all_keeps_its_frames_for_who_comes_later(queue):
    q = queue(CAPACITY)
    writer = MemQ.attach(q.name)
    writer.put_many(range(5))
    writer.close()
    p = FORK.Process(target=lambda: MemQ.attach(q.name).get_many())
    p.start()
    end(p)
    with pytest.raises(EndOfStream):
        q.get()
