"""What the two ends of a mirror say to each other: binary records over one connection, for many mirrors.

    | kind u8 | 0 u8 | 0 u16 | length u32 | mirror u64 | position u64 |  then `length` bytes of body, little endian

    Hello      both      who I am, my epoch, where I stand; the sink's answer starts the stream
    DATA       source -> ring bytes from `position` on (no object: they go straight into the ring)
    Skip       source -> a hole: padding and dropped frames, which nobody will read
    End        source -> the stream ends at `position`
    Progress   <- sink   received up to `position`; finished so far, with the books up to there
    Resume     <- sink   go on from `position`: what came after it did not follow
    Retired    source -> the source copy is finished up to `position`: it knows what the sink told of that
    Refusal    both      no, with a code for machines and a sentence for people
    Ping Pong  both      `position` is a number to send back

Decoding is total: any bytes give a record or MirrorRefused with a code and a sentence, and lengths are bounded before
memory is taken. The sender has proved who it is; still nothing it says is believed without a check.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple

import msgspec

from upipe.errors import MirrorRefused

PROTOCOL: Final = 1
"""Raised with any change here; the ends refuse each other when it differs."""
UPGRADE: Final = f"upipe-mirror/{PROTOCOL}"
"""Value of the Upgrade header of the connection that carries these records."""

_HEADER: Final = struct.Struct("<BBHIQQ")
HEADER_BYTES: Final = _HEADER.size
MOST_DATA: Final = 16 << 20
"""Bytes of one DATA record at most."""
MOST_BODY: Final = 4096
"""Bytes of the body of any other record at most."""
MOST_ID: Final = 200
"""Bytes of a mirror's id at most."""

SOURCE: Final = 1
SINK: Final = 2
ROLES: Final = {SOURCE: "source", SINK: "sink"}

HELLO, DATA, SKIP, END, PROGRESS, RESUME, REFUSAL, PING, PONG, RETIRED = range(1, 11)
_HELLO: Final = struct.Struct("<HBBIQQQQQ")
_SKIP: Final = struct.Struct("<Q")
_PROGRESS: Final = struct.Struct("<QQQB")
_TOP: Final = (1 << 63) - 1


class Header(NamedTuple):
    """The fixed part of a record."""

    kind: int
    length: int
    """Bytes of body that follow."""
    mirror: int
    """mirror_key() of the mirror's id."""
    position: int


class Hello(msgspec.Struct, frozen=True):
    """The first record of each end for a mirror; the sink's answers the source's."""

    mirror: int
    position: int
    """Head of the speaker's copy: committed (source), received (sink)."""
    role: int
    epoch: int
    capacity: int
    """Bytes of ring; both copies have as many."""
    finished: int
    """Tail of the source copy; what the sink allows to be retired."""
    dropped: int
    dead: int
    fingerprint: int
    """Of the ring's layout; both copies are of one build's layout."""
    id: str
    ended: bool = False
    """As of Progress."""
    protocol: int = PROTOCOL


class Skip(msgspec.Struct, frozen=True):
    mirror: int
    position: int
    span: int
    """Bytes of the hole."""


class End(msgspec.Struct, frozen=True):
    mirror: int
    position: int


class Progress(msgspec.Struct, frozen=True):
    mirror: int
    position: int
    """Received up to here."""
    finished: int
    dropped: int
    """Of the frames up to `finished`, since the sink copy began."""
    dead: int
    ended: bool = False
    """The sink knows that its stream ended."""


class Resume(msgspec.Struct, frozen=True):
    mirror: int
    position: int


class Retired(msgspec.Struct, frozen=True):
    mirror: int
    position: int


class Refusal(msgspec.Struct, frozen=True):
    mirror: int
    code: str
    text: str
    epoch: int = 0
    """Of the end that is refused; another one that came since is not meant. 0: whoever hears it."""


class Ping(msgspec.Struct, frozen=True):
    position: int


class Pong(msgspec.Struct, frozen=True):
    position: int


Record = Hello | Skip | End | Progress | Resume | Retired | Refusal | Ping | Pong


def mirror_key(name: str) -> int:
    """The number that stands for a mirror's id in every record (64 bits of BLAKE2b; Hello proves that it is that
    id)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def data_header(mirror: int, position: int, length: int) -> bytes:
    """The header of a DATA record; ring bytes follow."""
    return _HEADER.pack(DATA, 0, 0, length, mirror, position)


def encode(record: Record) -> bytes:
    """A record as bytes, header and body."""
    kind, position, body = _parts(record)
    mirror = 0 if isinstance(record, (Ping, Pong)) else record.mirror
    return _HEADER.pack(kind, 0, 0, len(body), mirror, position) + body


def _parts(record: Record) -> tuple[int, int, bytes]:
    match record:
        case Progress():
            return PROGRESS, record.position, _PROGRESS.pack(record.finished, record.dropped, record.dead, record.ended)
        case Skip():
            return SKIP, record.position, _SKIP.pack(record.span)
        case Hello(protocol=protocol, role=role, fingerprint=fingerprint, epoch=epoch, capacity=capacity):
            books = (record.finished, record.dropped, record.dead)
            name = record.id.encode()
            if not 0 < len(name) <= MOST_ID:
                raise ValueError(f"the id of a mirror has 1 to {MOST_ID} bytes, not {len(name)}")
            head = _HELLO.pack(protocol, role, record.ended, fingerprint, epoch, capacity, *books)
            return HELLO, record.position, head + name
        case Refusal():
            code, text = record.code.encode()[:60], _cut(record.text, MOST_BODY - 64)
            return REFUSAL, record.epoch, bytes((len(code),)) + code + text
        case End():
            return END, record.position, b""
        case Resume():
            return RESUME, record.position, b""
        case Retired():
            return RETIRED, record.position, b""
        case Ping():
            return PING, record.position, b""
        case Pong():
            return PONG, record.position, b""


def _cut(text: str, most: int) -> bytes:
    return text.encode()[:most].decode(errors="ignore").encode()


def decode_header(data: bytes | bytearray | memoryview, offset: int = 0) -> Header:
    """The HEADER_BYTES at `offset`; MirrorRefused "bad-record" when they are none."""
    kind, zero, zeros, length, mirror, position = _HEADER.unpack_from(data, offset)
    if not HELLO <= kind <= RETIRED or zero or zeros:
        raise MirrorRefused("bad-record", f"a record of kind {kind} is unknown to protocol {PROTOCOL}")
    if length > (MOST_DATA if kind == DATA else MOST_BODY):
        raise MirrorRefused("bad-record", f"{length:,} bytes are too long for a record of kind {kind}")
    if position > _TOP:
        raise MirrorRefused("bad-record", f"position {position} of a record of kind {kind} is out of range")
    return Header(kind, length, mirror, position)


def decode_body(header: Header, body: bytes) -> Record:
    """The record of a header (not DATA) and its body; MirrorRefused "bad-record" when they are none."""
    try:
        return _record(header, body)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise MirrorRefused("bad-record", f"the body of a record of kind {header.kind} is malformed: {error}") from None


def _record(header: Header, body: bytes) -> Record:
    kind, length, mirror, position = header
    if kind == PROGRESS:
        finished, dropped, dead, ended = _ranged(_PROGRESS.unpack(body))
        return Progress(mirror, position, finished, dropped, dead, _flag(ended))
    if kind == SKIP:
        return Skip(mirror, position, *_ranged(_SKIP.unpack(body)))
    if kind == HELLO:
        return _hello(header, body)
    if kind == REFUSAL:
        size = body[0]
        return Refusal(mirror, body[1 : 1 + size].decode(), body[1 + size :].decode(), position)
    if length:
        raise MirrorRefused("bad-record", f"a record of kind {kind} has no body, this one has {length} bytes")
    if kind in (PING, PONG):
        return Ping(position) if kind == PING else Pong(position)
    if kind == RETIRED:
        return Retired(mirror, position)
    return End(mirror, position) if kind == END else Resume(mirror, position)


def _hello(header: Header, body: bytes) -> Hello:
    protocol, role, ended, fingerprint, epoch, capacity, finished, dropped, dead = _HELLO.unpack_from(body)
    name = body[_HELLO.size :].decode()
    if protocol != PROTOCOL:
        text = f"the other end speaks mirror protocol {protocol}, this one {PROTOCOL}; run one version"
        raise MirrorRefused("version", text)
    if role not in ROLES or not 0 < len(name.encode()) <= MOST_ID or mirror_key(name) != header.mirror:
        raise MirrorRefused("bad-record", f"a Hello of role {role} for a mirror {name!r} that its key does not name")
    _ranged((epoch, capacity, finished, dropped, dead))
    return Hello(
        header.mirror, header.position, role, epoch, capacity, finished, dropped, dead, fingerprint, name, _flag(ended)
    )


def _flag(value: int) -> bool:
    if value > 1:
        raise MirrorRefused("bad-record", f"a flag of a record is 0 or 1, not {value}")
    return value == 1


def _ranged(values: tuple[int, ...]) -> tuple[int, ...]:
    if max(values) > _TOP:
        raise MirrorRefused("bad-record", f"a number of a record is out of range: {max(values)}")
    return values
