"""What supervisor, fork server and workers say to each other, named by direction; one door for encoding.

    supervisor -> server   Spawn                          (the worker's socket travels beside it)
    server -> supervisor   Spawned (with a pidfd), Refused, Exited, Paused
    supervisor -> worker   Assignment, Rewire, Drain
    worker -> supervisor   Ready, Done, Raised, Buried

All over SOCK_SEQPACKET socketpairs: one message a packet, and the end of the file is the death of the other side.
Frames never travel here. What users write into an exception is bounded here, at the sender: see `encode`.
"""

from __future__ import annotations

import socket

import msgspec

from upipe.errors import PipeError
from upipe.graph.plan import OutputPlan

PACKET = 192 * 1024
"""Largest message in bytes. The kernel's default of net.core.wmem_max, 208 KiB, is the most a socket buffer may ask
for, and a packet must fit the buffer."""
TEXT = 12 * 1024
"""Most characters of a remote message or traceback that travel: the beginning and, twice as much, the end."""


class Spawn(msgspec.Struct, frozen=True, tag=True):
    """Fork one worker; with `command`, execute it instead of running the fork server's own Python."""

    worker: str
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """It runs; a pidfd is attached. start: ticks after boot, for the path of its session."""

    worker: str
    pid: int
    start: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It could not be forked."""

    worker: str
    reason: str


class Exited(msgspec.Struct, frozen=True, tag=True):
    """It ended and was reaped. status: as subprocess.Popen.returncode (negative: killed by that signal)."""

    worker: str
    pid: int
    status: int
    cpu_seconds: float


class Paused(msgspec.Struct, frozen=True, tag=True):
    """It was stopped (SIGSTOP) or continued."""

    worker: str
    pid: int
    paused: bool


class Assignment(msgspec.Struct, frozen=True, tag=True):
    """Everything a worker needs to know."""

    pipe: str
    processor: str
    index: int
    epoch: int
    """Life number of this worker slot, 1 at first."""
    workers: int
    kind: str
    root: str
    """Directory of the sessions."""
    session: str
    """Session of the supervisor; queue names are `<session>/<queue>`."""
    spool: str
    """Directory of this pipe: code, dead letters, checkpoints."""
    code: str
    """File with the pickled function and configuration; "" for an entry script without configuration."""
    inputs: tuple[str, ...]
    sources: tuple[str, ...]
    """Processor that emits into each input, in the order of inputs; "" is the pipe."""
    outputs: tuple[OutputPlan, ...]
    replies: str
    reply_producer: int
    on_error: str
    max_deliveries: int
    resume: bool
    checkpoint_every: int
    takes_config: bool
    emit_wait: float
    sys_path: tuple[str, ...]
    cwd: str
    frame_timeout: float | None = None
    """Seconds a frame may take; see Processor."""
    rewires: bool = False
    """Rewire may come (a cluster)."""
    modules: tuple[str, ...] = ()
    """Modules that came with the code (a cluster): put before sys.path."""
    emitted: dict[str, int] = {}
    """Frames that earlier lives emitted, by target, into queues that are not among the outputs any more (a cluster)."""

    @property
    def worker(self) -> str:
        """Name of the worker: processor#index."""
        return f"{self.processor}#{self.index}"


class Rewire(msgspec.Struct, frozen=True, tag=True):
    """Use these queues from now on, without a pause: those that are new, those that stay; others are left. Names as in
    the Assignment. The whole truth, so that only the newest counts."""

    inputs: tuple[str, ...]
    sources: tuple[str, ...]
    outputs: tuple[OutputPlan, ...]


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Finish what you hold, close your ends, end."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Code loaded, queues attached."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The code returned, everything is finished and closed; the process is about to exit."""


class Raised(msgspec.Struct, frozen=True, tag=True):
    """User code raised. phase "load": the code cannot run here at all; "frame": one value; "run": it ended the
    worker."""

    phase: str
    kind: str
    message: str
    traceback: str
    fatal: bool = False


class Buried(msgspec.Struct, frozen=True, tag=True):
    """A dead letter was written. size: bytes of its file."""

    size: int


ToServer = Spawn
FromServer = Spawned | Refused | Exited | Paused
ToWorker = Assignment | Rewire | Drain
FromWorker = Ready | Done | Raised | Buried

_encoder = msgspec.msgpack.Encoder()
_to_server = msgspec.msgpack.Decoder(ToServer)
_from_server = msgspec.msgpack.Decoder(FromServer)
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToServer | FromServer | ToWorker | FromWorker) -> bytes:
    """The one door out.

    Texts of users are made to fit: shortened in the middle, and with what cannot be encoded replaced.

    Raises:
        PipeError: the message is larger than PACKET.
    """
    if isinstance(message, Raised):
        message = msgspec.structs.replace(
            message,
            kind=shorten(message.kind, 200),
            message=shorten(message.message),
            traceback=shorten(message.traceback),
        )
    data = _encoder.encode(message)
    if len(data) > PACKET:
        raise PipeError(
            f"a control message ({type(message).__name__}) of {len(data):,} bytes is larger than {PACKET:,}"
        )
    return data


def shorten(text: str, most: int = TEXT) -> str:
    """At most about `most` characters of a text, all of which UTF-8 can carry."""
    if len(text) > most:
        start, end = most // 3, most - most // 3
        text = f"{text[:start]}\n... {len(text) - most:,} characters left out ...\n{text[-end:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def decode_to_server(data: bytes) -> ToServer:
    """Read a message of the supervisor to the fork server."""
    return _to_server.decode(data)


def decode_from_server(data: bytes) -> FromServer:
    """Read a message of the fork server."""
    message: FromServer = _from_server.decode(data)
    return message


def decode_to_worker(data: bytes) -> ToWorker:
    """Read a message of the supervisor to a worker."""
    message: ToWorker = _to_worker.decode(data)
    return message


def decode_from_worker(data: bytes) -> FromWorker:
    """Read a message of a worker."""
    message: FromWorker = _from_worker.decode(data)
    return message


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that keep packets whole and carry PACKET bytes at once."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in (ours, theirs):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET)
    return ours, theirs
