"""What an agent and the keepers of its node say to each other, and what lies in a keeper's directory; one door for
encoding. Pure.

    agent  -> keeper    Follow                     the newest plan; the whole truth each time
    keeper -> agent     Hello, KeeperNews, Fenced  who I am; the whole truth each time; your plan is older than mine

Over a Unix socket, each message with its length before it (4 bytes, little endian). What a keeper says is of the same
user and host, and still bounded and decoded into these types only.

    DIR/                 0700, <data-dir>/pipes/<pipe id>, made by the agent
      job                Job: what the keeper starts from
      lock               flock'ed by the keeper, dies with it; holds "<pid> <start>"
      keeper.sock        0600
      plan               JSON, for tools: what it follows
      ended              KeeperNews: the last word of a keeper that obeyed a stop
      output, output.1   what workers print, and what the keeper has to complain of
      work/              where the workers run, unless the job says otherwise
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from upipe.cluster.layout import NodePlan
from upipe.cluster.record import Crew
from upipe.errors import MessageInvalid
from upipe.graph.spec import PipeSpec

PROTOCOL: Final = 1
"""Raised with any change here: an agent that was updated tells a keeper of before."""
MOST: Final = 64 << 20
"""Bytes of one message at most: a plan of many thousand workers."""
SPOOL: Final = "p1"
"""Name of the spool in the keeper's session."""
_PREFIX: Final = 4


class Job(msgspec.Struct, frozen=True):
    """What the keeper needs beside plans. Written to DIR/job before it starts."""

    pipe: str
    """Record id, as "video-1a2b3c4d"."""
    spec: PipeSpec
    code: dict[str, str]
    """Path of the pickled Bundle, by processor."""
    scripts: dict[str, str]
    """Path of the entry script, by processor."""
    sys_path: tuple[str, ...] = ()
    """Put before sys.path of the workers."""
    cwd: str = ""
    """Directory of the workers; "" is DIR/work."""


class WorkerState(msgspec.Struct, frozen=True):
    """A worker, for tools."""

    name: str
    """processor#index."""
    pid: int
    """0 while it does not run."""
    state: str
    """As lifecycle.WORKER."""
    epoch: int
    """Life number."""


class KeeperNews(msgspec.Struct, frozen=True, tag=True):
    """Everything a keeper has to say. Sent when anything in it changed, and at connect."""

    fence: tuple[int, int] = (0, 0)
    """Of the plan that is followed: all its steps that can be done at once are done."""
    present: bool = True
    """False: everything of the pipe has ended here, the keeper is about to exit."""
    session: str = ""
    """Of the queues."""
    labels: dict[str, str] = {}
    """Queue name -> name for MemQ.attach, as "<session>/<label>". Another one is another copy."""
    ended: tuple[tuple[str, int], ...] = ()
    """As NodeReport.ended."""
    left: tuple[tuple[str, int], ...] = ()
    """As NodeReport.left."""
    failed: str = ""
    """As NodeReport.failed."""
    up: bool = False
    """As NodeReport.up."""
    crews: dict[str, Crew] = {}
    """By processor."""
    workers: tuple[WorkerState, ...] = ()


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The keeper's first message."""

    protocol: int
    pipe: str
    pid: int


class Follow(msgspec.Struct, frozen=True, tag=True):
    """Do what this says. plan None: end everything, and yourself."""

    fence: tuple[int, int]
    plan: NodePlan | None


class Fenced(msgspec.Struct, frozen=True, tag=True):
    """Refused: a plan of a higher fence is followed."""

    fence: tuple[int, int]
    """Of the refused one."""
    kept: tuple[int, int]


FromKeeper = Hello | KeeperNews | Fenced
_encoder = msgspec.msgpack.Encoder()
_to_keeper = msgspec.msgpack.Decoder(Follow)
_from_keeper: msgspec.msgpack.Decoder[FromKeeper] = msgspec.msgpack.Decoder(FromKeeper)
_job = msgspec.msgpack.Decoder(Job)
_news = msgspec.msgpack.Decoder(KeeperNews)


def encode(message: Follow | FromKeeper) -> bytes:
    """The one door out, with the length before it.

    Raises:
        MessageInvalid: it is larger than MOST.
    """
    data = _encoder.encode(message)
    if len(data) > MOST:
        raise MessageInvalid(f"a {type(message).__name__} of {len(data):,} bytes is larger than {MOST:,}")
    return len(data).to_bytes(_PREFIX, "little") + data


class Reader:
    """Puts messages together from pieces of a stream.

    Args:
        decoder: of the messages: to_keeper or from_keeper.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are whole now.

        Raises:
            MessageInvalid: this is none, or too large; the stream is of no use any more.
        """
        self._data += data
        while len(self._data) >= _PREFIX:
            size = int.from_bytes(self._data[:_PREFIX], "little")
            if size > MOST:
                raise MessageInvalid(f"a message of {size:,} bytes was announced, {MOST:,} is the most")
            if len(self._data) < _PREFIX + size:
                return
            message = _decoded(self._decoder, bytes(self._data[_PREFIX : _PREFIX + size]), "message")
            del self._data[: _PREFIX + size]
            yield message


def to_keeper() -> Reader:
    """Reads what an agent says: Follow."""
    return Reader(_to_keeper)


def from_keeper() -> Reader:
    """Reads what a keeper says: FromKeeper."""
    return Reader(_from_keeper)


def encode_file(content: Job | KeeperNews) -> bytes:
    """DIR/job or DIR/ended."""
    return _encoder.encode(content)


def decode_job(data: bytes) -> Job:
    """DIR/job. Raises MessageInvalid."""
    found: Job = _decoded(_job, data, "job")
    return found


def decode_ended(data: bytes) -> KeeperNews:
    """DIR/ended. Raises MessageInvalid."""
    found: KeeperNews = _decoded(_news, data, "last word")
    return found


def _decoded(decoder: Any, data: bytes, what: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageInvalid(f"a {what} of a keeper cannot be read ({error}); is it of another version?") from None
