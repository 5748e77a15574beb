"""Both ends of a mirror, as pure state machines: what was heard in, what to do out. The shell is mirror.py.

    source                                          sink
    Connected -> SayHello  ---- Hello ---->  SayHello (the link is adopted, half frames are forgotten)
    Rewind, streaming      <--- Hello ----
                           ---- data ---->   sink.data(): which bytes land, which are known already
    Retire                 <-- Progress --   allow(): finished here, and what came of it has left this host
    SayRetired             --- Retired --->  known: the source has heard of it
    Rewind                 <--- Resume ---   a gap: what came does not follow
    SayEnd                 ----- End ---->   CloseStream

Why any loss, repetition or reordering is harmless: a position is sent until the sink has it, and the sink takes exactly
the position that follows what it has. Each end follows one link at a time, the newest that greeted it, and ignores what
still comes on older ones. An epoch numbers a pair of copies: who hears a lower one refuses it and changes nothing, who
hears a higher one knows that it was replaced, and stops.
"""

from __future__ import annotations

from dataclasses import dataclass

from upipe.cluster.records import ROLES, SINK, SOURCE, End, Hello, Progress, Refusal, Resume, Retired, Skip

Link = int
"""Number of a connection, never used twice in a process."""

FATAL = frozenset({"stale-epoch", "bad-position", "malformed", "bad-mirror", "version"})
"""Codes of a Refusal after which trying again on this link is of no use; after any other, the next Hello is tried."""
STOPPED = "stopped"
"""Code of a Refusal by an end that failed before: who hears it waits. It is opened again, or its epoch is replaced; if
it were fatal, two ends that failed together and are opened again one after the other would fail each other for ever."""


@dataclass(frozen=True)
class SayHello:
    """Say who we are and where we stand."""

    link: Link


@dataclass(frozen=True)
class SayRefusal:
    link: Link
    code: str
    text: str
    epoch: int
    """Of who is refused."""


@dataclass(frozen=True)
class SayEnd:
    link: Link
    position: int


@dataclass(frozen=True)
class SayResume:
    link: Link
    position: int


@dataclass(frozen=True)
class Rewind:
    """Send from here on; prove first that a frame starts here (`Source.broke` when none does)."""

    position: int


@dataclass(frozen=True)
class Retire:
    """Everything before `position` is finished at the sink (`Source.broke` when that cannot be)."""

    position: int
    dropped: int
    dead: int


@dataclass(frozen=True)
class Hole:
    """Publish padding of so many bytes behind what was received (`Sink.broke` when there is no room)."""

    span: int


@dataclass(frozen=True)
class CloseStream:
    """The copy's producer ends: its consumers see the end of the stream."""


@dataclass(frozen=True)
class Failed:
    """This end cannot go on; who placed the mirror decides what follows. Its copy of the queue is as it was."""

    code: str
    text: str


@dataclass(frozen=True)
class Done:
    """The stream ended, which the sink knows, and all of it is retired."""


@dataclass(frozen=True)
class SayRetired:
    """After Retire: the sink may forget what it told."""

    link: Link
    position: int


Command = (
    SayHello | SayRefusal | SayEnd | SayResume | SayRetired | Rewind | Retire | Hole | CloseStream | Failed | Done
)


class _End:
    """What source and sink have in common: links, epochs, failing."""

    role = 0

    def __init__(self, name: str, epoch: int, capacity: int, fingerprint: int) -> None:
        self.name = name
        self.epoch = epoch
        self.capacity = capacity
        self.fingerprint = fingerprint
        self.links: set[Link] = set()
        """Connections that stand."""
        self.link: Link | None = None
        """The one that is followed; always one of `links`."""
        self.failure: Failed | None = None
        """Set once; nothing is done after it."""

    def connected(self, link: Link) -> list[Command]:
        """A connection to the other end stands. The newest is asked first."""
        self.links.add(link)
        return [] if self.failure else self._greet(link)

    def disconnected(self, link: Link) -> list[Command]:
        """It broke, or was closed. Another one that stands is asked."""
        self.links.discard(link)
        if self.link != link:
            return []
        self.link = None
        return self._greet(max(self.links)) if self.links and not self.failure else []

    def broke(self, code: str, text: str) -> list[Command]:
        """The copy of the queue refused what the other end said."""
        link = self.link
        commands = self._fail(code, text)
        return [SayRefusal(link, code, text, self.epoch), *commands] if link is not None else commands

    def refused(self, link: Link, refusal: Refusal) -> list[Command]:
        """The other end refused us: for good, or on this link only. It may mean one of another epoch that was here."""
        if refusal.epoch not in (0, self.epoch):
            return []
        if self.failure or (self.link is not None and self.link != link):
            return []
        if refusal.code in FATAL:
            return self._fail(refusal.code, refusal.text)
        self.link = None
        return []

    def _greet(self, link: Link) -> list[Command]:
        raise NotImplementedError

    def _fail(self, code: str, text: str) -> list[Command]:
        if self.failure:
            return []
        self.failure = Failed(code, text)
        self.link = None
        return [self.failure]

    def _check(self, link: Link, hello: Hello) -> list[Command] | None:
        """None when the other end is our twin; otherwise what to do about it."""
        mine, theirs = ROLES[self.role], ROLES[hello.role]
        if self.failure and hello.epoch > self.epoch:
            return []  # meant for the one that comes after us, who hears it then (Link.add)
        if self.failure:
            text = f"the {mine} of mirror {self.name} stopped: {self.failure.text}"
            return [SayRefusal(link, STOPPED, text, hello.epoch)]
        if hello.epoch < self.epoch:
            text = f"the {theirs} of mirror {self.name} has epoch {hello.epoch}, its {mine} {self.epoch}: replaced"
            return [SayRefusal(link, "stale-epoch", text, hello.epoch)]
        if hello.epoch > self.epoch:
            text = f"the {mine} of mirror {self.name} has epoch {self.epoch}, its {theirs} {hello.epoch}: replaced"
            return self._fail("stale-epoch", text)
        if hello.role == self.role:
            text = f"both ends of mirror {self.name} are its {mine}; place it again"
            return [SayRefusal(link, "bad-mirror", text, hello.epoch)]
        if (hello.capacity, hello.fingerprint) != (self.capacity, self.fingerprint):
            text = (
                f"the copies of mirror {self.name} differ: the {mine} has {self.capacity:,} bytes of layout "
                f"{self.fingerprint:08x}, the {theirs} {hello.capacity:,} of {hello.fingerprint:08x}; run one version"
            )
            return [SayRefusal(link, "version", text, hello.epoch)]
        return None


class Source(_End):
    """The end that sends.

    Args:
        name: the mirror's id.
        epoch: of this pair of copies.
        tail: of the source copy.
        capacity, fingerprint: of the ring; both copies agree.
    """

    role = SOURCE

    def __init__(self, name: str, epoch: int, tail: int, capacity: int, fingerprint: int) -> None:
        super().__init__(name, epoch, capacity, fingerprint)
        self.tail = tail
        """Retired up to here."""
        self.received = tail
        """The sink has everything before it."""
        self.cursor = tail
        """Sent up to here on `link`. tail <= received <= cursor, except right after a Hello of a sink that is
        behind."""
        self.asked: Link | None = None
        """Where our Hello waits for its answer."""
        self.end: int | None = None
        """Where the stream ends, once it did."""
        self.end_said = False
        self.done = False
        """The sink knows the end, and everything before it is retired."""

    @property
    def streaming(self) -> bool:
        """Whether data may be sent on `link`."""
        return self.link is not None

    def restart(self, tail: int) -> None:
        """What was to be retired was not: it ends here, and what the sink says of more is news again."""
        self.tail, self.done = tail, False

    def _greet(self, link: Link) -> list[Command]:
        self.link, self.asked = None, link
        return [SayHello(link)]

    def hello(self, link: Link, hello: Hello) -> list[Command]:
        """The sink's answer starts the stream; a Hello that we did not ask for means that the sink began anew: ask."""
        trouble = self._check(link, hello)
        if trouble is not None:
            return trouble
        if link not in self.links:
            return []
        if self.asked != link:
            return self._greet(link)
        self.link, self.asked = link, None
        self.end_said = False
        commands = self._rewind(hello.position)
        return commands + self._heard(hello.position, (hello.finished, hello.dropped, hello.dead), hello.ended)

    def progress(self, link: Link, heard: Progress) -> list[Command]:
        """The sink received and finished more."""
        if link != self.link:
            return []
        return self._heard(heard.position, (heard.finished, heard.dropped, heard.dead), heard.ended)

    def resume(self, link: Link, heard: Resume) -> list[Command]:
        """The sink misses something."""
        return self._rewind(heard.position) if link == self.link else []

    def sent(self, position: int) -> list[Command]:
        """Everything before `position` was handed to the link."""
        self.cursor = position
        return self._say_end()

    def ends(self, position: int) -> list[Command]:
        """The stream ended: its producers closed, and head is `position`. Repeating it changes nothing."""
        self.end = position
        return self._say_end()

    def _rewind(self, position: int) -> list[Command]:
        self.cursor = position
        self.end_said = False
        return [Rewind(position), *self._say_end()]

    def _say_end(self) -> list[Command]:
        if self.link is None or self.end_said or self.end is None or self.cursor != self.end:
            return []
        self.end_said = True
        return [SayEnd(self.link, self.end)]

    def _heard(self, received: int, books: tuple[int, int, int], ended: bool) -> list[Command]:
        commands: list[Command] = []
        self.received = max(self.received, received)
        if books[0] > self.tail:
            self.tail = books[0]
            commands.append(Retire(*books))
            if self.link is not None:
                commands.append(SayRetired(self.link, self.tail))
        if ended and not self.done and self.end is not None and self.tail >= self.end:
            self.done = True
            commands.append(Done())
        return commands


class Sink(_End):
    """The end that receives.

    Args: as of Source; `head` is what the sink copy has.
    """

    role = SINK

    def __init__(self, name: str, epoch: int, head: int, capacity: int, fingerprint: int) -> None:
        super().__init__(name, epoch, capacity, fingerprint)
        self.head = head
        """Published up to here."""
        self.landed = 0
        """Bytes of frames that are not whole yet, received behind head on `link`."""
        self.allowed = (0, 0, 0)
        """(finished, dropped, dead) that the source may retire. 0 says nothing: after a restart the source knows
        more."""
        self.known = 0
        """The source has retired up to here."""
        self.ended = False
        self._gap: int | None = None

    def restart(self, head: int, ended: bool) -> None:
        """What was to be done to the copy was not: it stands here."""
        self.head, self.landed, self.ended, self._gap = head, 0, ended, None

    def _greet(self, link: Link) -> list[Command]:
        return []  # the source asks first; a Hello that came before this end was there is heard when it is

    def hello(self, link: Link, hello: Hello) -> list[Command]:
        """The source asks: follow this link from now on."""
        trouble = self._check(link, hello)
        if trouble is not None:
            return trouble
        if link not in self.links:
            return []
        self.link, self.landed, self._gap = link, 0, None
        self.known = max(self.known, hello.finished)
        return [SayHello(link)]

    def retired(self, link: Link, heard: Retired) -> bool:
        """The source has heard what was told. True when that is news."""
        if heard.position <= self.known:
            return False
        self.known = heard.position
        return True

    def data(self, link: Link, position: int, length: int) -> tuple[int, list[Command]]:
        """How many of the first bytes of this data are not for us (all: known, or they do not follow); the rest
        lands."""
        if link != self.link:
            return length, []
        expected = self.head + self.landed
        if position > expected:
            return length, self._missing(expected)
        if position + length <= expected:
            return length, []
        if self.ended:
            return length, self.broke("malformed", f"mirror {self.name} ended at {self.head}, and data came behind it")
        self._gap = None
        return expected - position, []

    def received(self, count: int, published: int) -> None:
        """`count` bytes landed, and head moved by `published` over the frames that are whole now."""
        self.head += published
        self.landed += count - published

    def skip(self, link: Link, hole: Skip) -> list[Command]:
        """A hole follows, unless it is known already."""
        if link != self.link or hole.position + hole.span <= self.head:
            return []
        if hole.position > self.head or self.landed:
            return self._missing(self.head)
        span = hole.position + hole.span - self.head
        if span % 64 or self.ended:
            return self.broke("malformed", f"a hole of {span} bytes at {self.head} does not fit mirror {self.name}")
        self.head += span
        return [Hole(span)]

    def end(self, link: Link, heard: End) -> list[Command]:
        """The stream ends, once everything before its end is here."""
        if link != self.link or self.ended:
            return []
        if heard.position != self.head or self.landed:
            return self._missing(self.head) if heard.position > self.head else []
        self.ended = True
        return [CloseStream()]

    def allow(self, finished: int, dropped: int, dead: int) -> bool:
        """The source may retire up to here. True when that is news, which progress() tells."""
        if finished <= self.allowed[0]:
            return False
        self.allowed = (finished, dropped, dead)
        return True

    def progress(self, key: int) -> Progress:
        """What to tell the source now."""
        return Progress(key, self.head, *self.allowed, self.ended)

    def _missing(self, position: int) -> list[Command]:
        """Ask for `position` again, once: the source sends all that follows it. Half a frame is forgotten with it."""
        self.landed = 0
        if self._gap == self.head or self.link is None:
            return []
        self._gap = self.head
        return [SayResume(self.link, self.head)]
