"""Source and Sink in random histories: messages lost, repeated and reordered, links cut, ends crashed, copies replaced.

After each step: the sink copy is a prefix of the source copy at equal positions, nothing is retired that is not
finished there, nothing unfinished is retired. At the end, once messages flow again: everything arrived, and the end of
the stream."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from upipe.cluster.mirror_state import (
    CloseStream,
    Done,
    Failed,
    Hole,
    Retire,
    Rewind,
    SayEnd,
    SayHello,
    SayRefusal,
    SayResume,
    SayRetired,
    Sink,
    Source,
)
from upipe.cluster.records import SINK, SOURCE, End, Hello, Progress, Refusal, Resume, Retired, Skip

G = 64


def hello(role: int, epoch: int, position: int, finished: int = 0, **more) -> Hello:
    values = {"capacity": 4096, "fingerprint": 7, "dropped": 0, "dead": 0, "id": "m", "mirror": 1, **more}
    return Hello(position=position, role=role, epoch=epoch, finished=finished, **values)


@dataclass
class Data:
    """Bytes of a DATA record: for each granule the position that it has in the source."""

    position: int
    granules: list[int]


@dataclass
class Copy:
    """A copy of the queue: what survives the crash of its mirror."""

    start: int = 0
    frames: list[tuple[int, int, bool]] = field(default_factory=list)
    """(start, end, hole)"""
    tail: int = 0

    @property
    def head(self) -> int:
        return self.frames[-1][1] if self.frames else self.start

    def boundaries(self) -> set[int]:
        return {self.start, *(end for _, end, _ in self.frames)}


class Mirror(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.copy = Copy()
        self.closed: int | None = None
        self.epoch = 0
        self.number = 0
        self.wire: dict[int, tuple[list, list]] = {}
        """Per link what is under way: to the sink, to the source."""
        self.standing: set[int] = set()
        self.old: list[Sink] = []
        self.retarget()

    # the two shells

    def new_source(self) -> None:
        self.source = Source("m", self.epoch, self.copy.tail, 4096, 7)
        self.run = 0
        self.done = False
        if self.closed is not None:
            self.do_source(self.source.ends(self.closed))

    def new_sink(self) -> None:
        self.sink = Sink("m", self.epoch, self.far.head, 4096, 7)
        self.sink.ended = self.far_closed

    def do_source(self, commands) -> None:
        for command in commands:
            match command:
                case SayHello(link):
                    self.wire[link][0].append(hello(SOURCE, self.source.epoch, self.copy.head, self.copy.tail))
                case SayEnd(link, position):
                    self.wire[link][0].append(End(1, position))
                case SayRefusal(link, code, text, epoch):
                    self.wire[link][0].append(Refusal(1, code, text, epoch))
                case Rewind(position):
                    assert position in self.copy.boundaries(), "the sink's head is a boundary"
                    self.run = position
                case Retire(position, _, _):
                    assert position <= max(self.far.tail, self.far.start), "retired what is not finished"
                    assert position in self.copy.boundaries()
                    self.copy.tail = max(self.copy.tail, position)
                case SayRetired(link, position):
                    assert self.copy.tail >= position
                    self.wire[link][0].append(Retired(1, position))
                case Done():
                    assert self.copy.tail == self.copy.head == self.closed
                    assert self.far_closed
                    self.done = True
                case Failed():
                    raise AssertionError(command)

    def do_sink(self, commands) -> None:
        for command in commands:
            match command:
                case SayHello(link):
                    finished, ended = self.sink.allowed[0], self.sink.ended
                    self.wire[link][1].append(hello(SINK, self.sink.epoch, self.far.head, finished, ended=ended))
                case SayResume(link, position):
                    self.wire[link][1].append(Resume(1, position))
                case SayRefusal(link, code, text, epoch):
                    self.wire[link][1].append(Refusal(1, code, text, epoch))
                case Hole(span):
                    passed = self.far.tail == self.far.head  # nothing before it is read any more: nobody reads it
                    self.far.frames.append((self.far.head, self.far.head + span, True))
                    self.far.tail = self.far.head if passed else self.far.tail
                case CloseStream():
                    assert self.far.head == self.closed
                    self.far_closed = True
                case Failed():
                    raise AssertionError(command)
        assert self.sink.head == self.far.head

    def to_sink(self, link: int, message) -> None:
        match message:
            case Hello():
                self.do_sink(self.sink.hello(link, message))
                self.half = []
            case Retired():
                self.sink.retired(link, message)
                assert self.sink.known <= self.copy.tail, "what the sink believes to be known is known"
            case Skip():
                self.do_sink(self.sink.skip(link, message))
            case End():
                self.do_sink(self.sink.end(link, message))
            case Refusal():
                self.do_sink(self.sink.refused(link, message))
            case Data(position, granules):
                unwanted, commands = self.sink.data(link, position, G * len(granules))
                self.do_sink(commands)
                if self.sink.landed == 0:
                    self.half = []
                landed = granules[unwanted // G :]
                self.half += landed
                published = self.publish()
                self.sink.received(G * len(landed), published)
                assert self.sink.landed == G * len(self.half)

    def publish(self) -> int:
        """Whole frames of what landed; the header tells the size, here the source's list of frames does."""
        done = 0
        sizes = {start: end - start for start, end, hole in self.copy.frames if not hole}
        while self.half:
            at = self.far.head
            assert self.half[0] == at, "what landed is another position's"
            count = sizes[at] // G
            if len(self.half) < count:
                break
            assert self.half[:count] == list(range(at, at + count * G, G))
            self.half = self.half[count:]
            self.far.frames.append((at, at + count * G, False))
            done += count * G
        return done

    def to_source(self, link: int, message) -> None:
        match message:
            case Hello():
                self.do_source(self.source.hello(link, message))
            case Progress():
                self.do_source(self.source.progress(link, message))
            case Resume():
                self.do_source(self.source.resume(link, message))
            case Refusal():
                self.do_source(self.source.refused(link, message))

    def send(self, granules: int) -> bool:
        """One turn of the source, as MirrorSource.turn does it."""
        link, at = self.source.link, self.source.cursor
        if link is None or at >= self.copy.head:
            return False
        if self.run <= at:
            if at < self.copy.tail:
                self.wire[link][0].append(Skip(1, at, self.copy.tail - at))
                self.do_source(self.source.sent(self.copy.tail))
                return True
            _, end, hole = next(frame for frame in self.copy.frames if frame[0] == at)
            if hole:
                self.wire[link][0].append(Skip(1, at, end - at))
                self.do_source(self.source.sent(end))
                return True
            self.run = end
        end = min(self.run, at + granules * G)
        self.wire[link][0].append(Data(at, list(range(at, end, G))))
        self.do_source(self.source.sent(end))
        return True

    def tell(self) -> None:
        self.sink.allow(self.far.tail, 0, 0)
        if self.sink.link is not None:
            self.wire[self.sink.link][1].append(self.sink.progress(1))

    # what happens

    @precondition(lambda self: self.closed is None)
    @rule(size=st.integers(1, 5), hole=st.booleans())
    def put(self, size, hole):
        start, hole = self.copy.head, hole and size % 2 == 1
        self.copy.frames.append((start, start + size * G, hole))
        if hole and self.copy.tail == start:  # dropped before it was sent: the source passes it by itself
            self.copy.tail = start + size * G

    @precondition(lambda self: self.closed is None)
    @rule(likely=st.integers(0, 5))
    def end(self, likely=0):
        if likely:
            return
        self.closed = self.copy.head
        self.do_source(self.source.ends(self.closed))

    @rule(granules=st.integers(1, 4), times=st.integers(1, 6))
    def pump(self, granules, times):
        for _ in range(times):
            self.send(granules)

    @rule(sizes=st.lists(st.integers(1, 5), max_size=5), granules=st.integers(1, 4), times=st.integers(1, 20))
    def flow(self, sizes, granules, times):
        """A good while: a link stands, frames are put, messages come in order."""
        if not self.standing:
            self.connect()
        for size in sizes if self.closed is None else ():
            self.put(size, size == 3)
        for _ in range(times):
            self.send(granules)
            link = max(self.standing)
            for way in (0, 1):
                if self.wire[link][way]:
                    (self.to_source if way else self.to_sink)(link, self.wire[link][way].pop(0))

    @rule(frames=st.integers(1, 3))
    def finish(self, frames):
        for _, end, _ in self.far.frames:
            if end > self.far.tail and frames:
                self.far.tail, frames = end, frames - 1

    @rule()
    def progress(self):
        self.tell()

    @rule()
    def connect(self):
        self.number += 1
        self.wire[self.number] = ([], [])
        self.standing.add(self.number)
        self.do_source(self.source.connected(self.number))
        self.do_sink(self.sink.connected(self.number))

    @precondition(lambda self: any(any(ways) for ways in self.wire.values()))
    @rule(data=st.data(), how=st.sampled_from(["next", "next", "next", "any", "repeat", "lose"]))
    def deliver(self, data, how):
        link = data.draw(st.sampled_from([link for link, ways in self.wire.items() if any(ways)]))
        way = data.draw(st.sampled_from([way for way in (0, 1) if self.wire[link][way]]))
        queue = self.wire[link][way]
        at = data.draw(st.integers(0, len(queue) - 1)) if how == "any" else 0
        message = queue[at] if how == "repeat" else queue.pop(at)
        if how != "lose":
            (self.to_source if way else self.to_sink)(link, message)

    @precondition(lambda self: self.standing)
    @rule(data=st.data(), lose=st.booleans())
    def cut(self, data, lose):
        """Each end hears of it when it does; what was under way may still come, or not."""
        link = data.draw(st.sampled_from(sorted(self.standing)))
        self.standing.discard(link)
        if lose:
            self.wire[link] = ([], [])
        self.do_source(self.source.disconnected(link))
        self.do_sink(self.sink.disconnected(link))

    @rule(likely=st.integers(0, 2))
    def source_crashes(self, likely):
        if likely:
            return
        self.new_source()
        for link in sorted(self.standing):
            self.do_source(self.source.connected(link))

    @rule(likely=st.integers(0, 2))
    def sink_crashes(self, likely):
        if likely:
            return
        self.new_sink()
        self.half = []
        for link in sorted(self.standing):
            self.do_sink(self.sink.connected(link))

    @rule(likely=st.integers(0, 5))
    def retarget(self, likely=0):
        """The sink copy is lost: a fresh one begins at the source's tail, on links of its own."""
        if likely:
            return
        self.epoch += 1
        self.wire, self.standing = {}, set()
        self.far, self.far_closed, self.half = Copy(self.copy.tail, tail=self.copy.tail), False, []
        self.new_source()
        self.new_sink()

    @precondition(lambda self: self.epoch > 1)
    @rule(role=st.sampled_from([SOURCE, SINK]), back=st.integers(1, 3))
    def an_old_end_comes_back(self, role, back):
        """It is refused with a code and a sentence, and nothing changes."""
        self.connect()
        link = self.number
        end = self.source if role == SINK else self.sink
        before = (end.link, self.copy.tail, self.far.head)
        commands = end.hello(link, hello(role, max(0, self.epoch - back), self.copy.head, self.copy.head))
        assert [type(command) for command in commands] == [SayRefusal]
        assert commands[0].code == "stale-epoch"
        assert (end.link, self.copy.tail, self.far.head) == before

    # what holds

    @invariant()
    def the_sink_copy_is_a_prefix_of_the_source_copy(self):
        whole = {(start, end) for start, end, hole in self.copy.frames if not hole}
        mine = [(start, end) for start, end, hole in self.far.frames if not hole]
        assert all(frame in whole for frame in mine)
        holes = [(start, end) for start, end, hole in self.far.frames if hole]
        for start, end in holes:  # nothing unfinished was skipped
            inside = [frame for frame in self.copy.frames if start < frame[1] and frame[0] < end]
            assert all(hole or last <= self.copy.tail for _, last, hole in inside)
        over = max(self.far.tail, self.far.start)
        assert all(hole or end <= over for _, end, hole in self.copy.frames if end <= self.copy.tail)
        assert self.far.head <= self.copy.head

    def teardown(self):
        """Messages flow again, in order: everything arrives, is finished and retired, and the end is known."""
        for link in sorted(self.standing):
            self.standing.discard(link)
            self.do_source(self.source.disconnected(link))
            self.do_sink(self.sink.disconnected(link))
        self.wire = {}
        if self.closed is None:
            self.end()
        self.connect()
        for _ in range(10_000):
            queue = next((queue for queue in self.wire[self.number] if queue), None)
            if queue is not None:
                (self.to_sink if queue is self.wire[self.number][0] else self.to_source)(self.number, queue.pop(0))
            elif not self.send(3):
                if self.done:
                    break
                self.far.tail = self.far.head
                self.tell()
        assert self.done
        assert self.far_closed
        assert self.copy.tail == self.far.tail == self.copy.head


TestMirror = Mirror.TestCase
TestMirror.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMirror = pytest.mark.slow(TestMirror)


# ---------------------------------------------------------------- single rules


def pair(epoch: int = 1) -> tuple[Source, Sink]:
    return Source("m", epoch, 0, 4096, 7), Sink("m", epoch, 0, 4096, 7)


def test_who_hears_a_higher_epoch_stops_and_says_so_from_then_on():
    source, sink = pair()
    for end, role in ((source, SINK), (sink, SOURCE)):
        end.connected(1)
        assert [command.code for command in end.hello(1, hello(role, 2, 0))] == ["stale-epoch"]
        assert end.failure.code == "stale-epoch"
        assert isinstance(end.hello(1, hello(role, 1, 0))[0], SayRefusal)
        assert end.connected(2) == []


def test_two_sources_two_layouts_and_two_sizes_refuse_each_other_in_a_sentence():
    source, _ = pair()
    source.connected(1)
    assert source.hello(1, hello(SOURCE, 1, 0))[0].code == "bad-mirror"
    assert source.hello(1, hello(SINK, 1, 0, capacity=8192))[0].code == "version"
    assert "8,192" in source.hello(1, hello(SINK, 1, 0, capacity=8192))[0].text
    assert source.hello(1, hello(SINK, 1, 0, fingerprint=8))[0].code == "version"
    assert source.failure is None


def test_a_refusal_for_good_ends_the_mirror_and_another_one_only_the_link():
    source, _ = pair()
    source.connected(1)
    source.hello(1, hello(SINK, 1, 0))
    assert source.refused(1, Refusal(1, "busy", "later")) == []
    assert source.link is None
    assert source.connected(2) == [SayHello(2)]
    assert source.refused(2, Refusal(1, "stale-epoch", "too old")) == [Failed("stale-epoch", "too old")]


def test_a_refusal_that_meant_the_one_before_it_is_not_heard():
    old, sink = pair(1)[0], pair(3)[1]
    (no,) = sink.hello(1, hello(SOURCE, old.epoch, 0))
    said = Refusal(1, no.code, no.text, no.epoch)
    new, _ = pair(3)
    new.connected(1)
    assert new.refused(1, said) == []
    assert new.hello(1, hello(SINK, 3, 0)) == [Rewind(0)]
    old.connected(1)
    assert [type(command) for command in old.refused(1, said)] == [Failed]


def test_one_that_was_replaced_does_not_refuse_those_that_replace_it():
    sink = pair(1)[1]
    for link in (1, 2):
        sink.connected(link)
        assert not any(isinstance(command, SayRefusal) for command in sink.hello(link, hello(SOURCE, 3, 0)))
    assert [type(command) for command in sink.hello(2, hello(SOURCE, 1, 0))] == [SayRefusal]


def test_data_behind_the_end_is_refused_and_the_ring_unchanged():
    _, sink = pair()
    sink.connected(1)
    sink.hello(1, hello(SOURCE, 1, 0))
    assert sink.end(1, End(1, 0)) == [CloseStream()]
    unwanted, commands = sink.data(1, 0, 64)
    assert unwanted == 64
    assert [command.code for command in commands] == ["malformed", "malformed"]
    assert sink.head == 0


def test_when_its_link_breaks_a_source_asks_on_another_that_stands():
    source, _ = pair()
    source.connected(1)
    source.connected(2)
    source.hello(2, hello(SINK, 1, 0))
    assert source.disconnected(2) == [SayHello(1)]
