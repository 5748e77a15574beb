"""The two ends of a mirror at work: what mirror_state.py decides is done to the ring and the link, in the agent's event
loop.

    MirrorSource(ring, "pipe/edge/p-c", epoch=1)     on the producers' node; link.add(it)
    MirrorSink(ring, "pipe/edge/p-c")                on the consumers' node; link.add(it)

Each has a handle of its own on its copy of the queue and closes it with itself. No task runs and no CPU is used while
nothing moves: each end sleeps on its handle's bell, the source for frames, the sink for what is finished.
"""

from __future__ import annotations

from collections.abc import Callable

from upipe.cluster import mirror_state
from upipe.cluster.gate import Tail
from upipe.cluster.link import CHUNK, Link
from upipe.cluster.mirror_end import MirrorEnd, ignore, safe
from upipe.cluster.mirror_state import (
    CloseStream,
    Command,
    Done,
    Hole,
    Retire,
    Rewind,
    SayHello,
    SayRetired,
    Sink,
    Source,
)
from upipe.cluster.records import (
    SINK,
    SOURCE,
    End,
    Hello,
    Progress,
    Record,
    Refusal,
    Resume,
    Retired,
    Skip,
    data_header,
    encode,
)
from upipe.cluster.tail_watch import STEP, TailWatch
from upipe.errors import MirrorRefused
from upipe.memq._ring import fingerprint
from upipe.memq.queue import MemQ

JOIN = 1 << 16
"""Bytes of data up to which header and data are copied into one write: a copy is cheaper than a call."""
LINGER = 0.001
"""Seconds until a source looks again after a run of MANY frames, instead of being rung: small frames then travel
together, and their producers do not ring for each. A single frame is sent at once."""
MANY = 16


class MirrorSource(MirrorEnd):
    """Sends what is put into the queue to its sink copy, and retires what is finished there.

    Args:
        ring: a handle of its own on the source copy.
        name: the mirror's id, equal at both ends: up to 200 bytes.
        epoch: of this pair of copies, from 1; a higher one than before needs a fresh sink copy that begins at the tail.

    Raises:
        MirrorRefused: the queue has seen a mirror of a later epoch.
    """

    role = SOURCE

    def __init__(self, ring: MemQ, name: str, epoch: int) -> None:
        tail = ring.mirror_source(epoch)
        self.machine: Source = Source(name, epoch, tail, ring.capacity, fingerprint()[1])
        self.on_received: Callable[[MirrorSource], None] = ignore
        """Called when the sink copy has more (`received`)."""
        self.on_done: Callable[[MirrorSource], None] = ignore
        """Called when the stream ended and everything is retired."""
        self._run = memoryview(b"")
        """Ring bytes from the cursor on, which are not sent yet."""
        self._frames = 0
        """Sent since the source last had nothing to send."""
        super().__init__(ring, name)
        self._bell = ring.bell(0)
        self._loop.add_reader(self._bell.fd, self._rung)

    @property
    def received(self) -> int:
        """The sink copy has everything before this position."""
        return self.machine.received

    @property
    def is_over(self) -> bool:
        return self.machine.done

    @safe(None)
    def heard(self, link: Link, record: Record) -> None:
        machine, number = self.machine, link.number
        match record:
            case Progress():
                before = machine.received
                self._do(machine.progress(number, record))
                if machine.received != before:
                    self.on_received(self)
                self.on_news()
            case Resume():
                self._do(machine.resume(number, record))
            case Hello():
                self._do(machine.hello(number, record))
                self.on_received(self)
                self.on_news()
            case Refusal():
                self._do(machine.refused(number, record))

    @safe(False)
    def turn(self, link: Link) -> bool:
        if self.machine.link != link.number:
            return False
        if not self._run and not self._fetch(link):
            return False
        if not self._run:
            return True  # a hole was told
        length = len(self._run) if len(self._run) <= CHUNK + JOIN else CHUNK  # a frame of 1 MiB has a header, too
        chunk, self._run = self._run[:length], self._run[length:]
        header = data_header(self.key, self.machine.cursor, len(chunk))
        if len(chunk) <= JOIN:
            link.write(header + bytes(chunk))
        else:
            link.write(header)
            link.write(chunk)
        self._do(self.machine.sent(self.machine.cursor + len(chunk)))
        return True

    def _fetch(self, link: Link) -> bool:
        """Fill the run, or tell a hole. False when there is nothing to send; a bell or a timer tells when there is."""
        found = self.ring.outgoing(self.machine.cursor, CHUNK)
        if found is None:
            many, self._frames = self._frames >= MANY, 0
            if many:
                self._timer = self._loop.call_later(LINGER, self._rung)
                return False
            self.on_news()
            self.ring.arm(0)
            found = self.ring.outgoing(self.machine.cursor, CHUNK)  # what came before the bell was armed
            if found is None:
                self._look_for_end()
                return False
        view, end, frames = found
        if view is None:
            link.say(Skip(self.key, self.machine.cursor, end - self.machine.cursor))
            self._do(self.machine.sent(end))
            return True
        self._frames += frames
        self._run = view
        return True

    def _begin_again(self) -> None:
        self.machine.restart(self.ring.settled()[0])

    def _look_for_end(self) -> None:
        if self.ring.stream_closed and self.machine.end != self.ring.head:
            self._do(self.machine.ends(self.ring.head))

    def _sleep_no_more(self) -> None:
        self._loop.remove_reader(self._bell.fd)

    @safe(None)
    def _rung(self) -> None:
        self._bell.drain()
        link = self._links.get(self.machine.link) if self.machine.link is not None else None
        if link is not None:
            link.wants(self)

    def _one(self, command: Command) -> None:
        match command:
            case Rewind(position):
                self._run = memoryview(b"")
                if not self.ring.is_boundary(position):
                    raise MirrorRefused("bad-position", f"no frame of mirror {self.name} starts at {position}")
                self._rung()
            case Retire(position, dropped, dead):
                self.ring.retire(position, dropped, dead)
            case SayRetired(link, position):
                self._say(link, Retired(self.key, position))
            case Done():
                self.on_done(self)
            case _:
                super()._one(command)

    def incoming(self, link: Link, position: int, length: int) -> int:
        return length  # data for a source: the other end is confused, and hears so at its Hello

    def landing(self, most: int) -> memoryview:
        return memoryview(b"")

    def landed(self, count: int) -> None:
        pass


class MirrorSink(MirrorEnd):
    """Receives into the sink copy, and tells what is finished.

    Args:
        ring: a handle of its own on the sink copy, which was made with `start` at the source's tail and one declared
            producer.
        name, epoch: as of MirrorSource.
        producer: id of that producer, which is closed when the stream ends.
        gated: False tells what is finished at once; True only what allow() permits (gate.py).
    """

    role = SINK

    def __init__(self, ring: MemQ, name: str, epoch: int, *, producer: int = 0, gated: bool = False) -> None:
        ring.mirror_sink(epoch)
        self.machine: Sink = Sink(name, epoch, ring.head, ring.capacity, fingerprint()[1])
        self.machine.ended = ring.stream_closed
        self.on_settled: Callable[[MirrorSink], None] = ignore
        """Called when more is finished here (`settled`); then allow() what may be told."""
        self.gated = gated
        self._ends = producer
        self._told: tuple[int, int, bool] = (-1, -1, False)
        super().__init__(ring, name)
        self._tails = TailWatch(ring, self._moved, self.troubled)

    @property
    def settled(self) -> Tail:
        """What is finished here, with the books."""
        return Tail(*self.ring.settled())

    @property
    def is_over(self) -> bool:
        return self.machine.ended and self.machine.known >= self.machine.head

    @safe(None)
    def allow(self, tail: Tail) -> None:
        """The source may retire up to here: everything that came of it left this host."""
        if self.machine.allow(tail.position, tail.dropped, tail.dead):
            self._tell(tail.position - self._told[1])

    @safe(None)
    def heard(self, link: Link, record: Record) -> None:
        machine, number = self.machine, link.number
        match record:
            case Retired():
                if machine.retired(number, record):
                    self.on_news()
            case Skip():
                self._do(machine.skip(number, record))
                self._tell(record.span)
            case End():
                self._do(machine.end(number, record))
                self._tell(0)
            case Hello():
                self._do(machine.hello(number, record))
                self.on_news()
            case Refusal():
                self._do(machine.refused(number, record))

    def incoming(self, link: Link, position: int, length: int) -> int:
        unwanted, commands = self.machine.data(link.number, position, length)
        if commands:
            self._do(commands)
        return unwanted

    @safe(memoryview(b""))
    def landing(self, most: int) -> memoryview:
        if self.machine.failure is not None:
            return memoryview(b"")
        place = self.ring.landing(self.machine.landed, most)
        if not place:
            self._do(self.machine.broke("malformed", f"mirror {self.name} sends more than its ring holds"))
        return place

    @safe(None)
    def landed(self, count: int) -> None:
        try:
            published = self.ring.publish(self.machine.landed + count)
        except MirrorRefused as refused:
            self._do(self.machine.broke(refused.code, refused.message))
            return
        self.machine.received(count, published)
        if published:
            self._tell(self.machine.head - self._told[0])

    def turn(self, link: Link) -> bool:
        return False

    def _tell(self, news: int) -> None:
        """Tell the source how far we are: at once when it is much, else with what follows within LINGER."""
        if news >= self.ring.capacity // STEP:
            self._tell_now()
        elif self._timer is None:
            self._timer = self._loop.call_later(LINGER, self._tell_now)

    @safe(None)
    def _tell_now(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        machine = self.machine
        now = machine.head, machine.allowed[0], machine.ended
        link = self._links.get(machine.link) if machine.link is not None else None
        if link is not None and now != self._told:
            self._told = now
            link.write(encode(machine.progress(self.key)))

    def _begin_again(self) -> None:
        """The copy says where we stand: a hole or the end that it did not take has not come."""
        self.machine.restart(self.ring.head, self.ring.stream_closed)
        self._tails.close()
        self._tails = TailWatch(self.ring, self._moved, self.troubled)

    def _sleep_no_more(self) -> None:
        self._tails.close()

    def _moved(self, settled: tuple[int, int, int]) -> None:
        self.on_settled(self)
        if not self.gated and not self.ring.is_closed:
            self.allow(Tail(*settled))

    def _one(self, command: Command) -> None:
        match command:
            case Hole(span):
                self.ring.skip(span)
            case CloseStream():
                self.ring.close_producer(self._ends)
            case SayHello():
                self._told = (-1, -1, False)
                super()._one(command)
            case _:
                super()._one(command)


Mirror = MirrorSource | MirrorSink
__all__ = ["Mirror", "MirrorSink", "MirrorSource", "mirror_state"]
