"""What supervisor, fork server and workers say to each other, named by direction; one door for encoding.

    supervisor -> server   Spawn                          (the worker's socket travels beside it)
    server -> supervisor   Spawned (with a pidfd), Exited, Paused
    supervisor -> worker   Assignment, Drain
    worker -> supervisor   Ready, Done, Raised, Buried, Checkpointed

All over SOCK_SEQPACKET socketpairs: one message a packet, and the end of the file is the death of the other side. Frames
never travel here.
"""

from __future__ import annotations

import socket

import msgspec

from upipe.graph.plan import OutputPlan

PACKET = 1 << 20
"""Largest message in bytes."""


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

    @property
    def worker(self) -> str:
        """Name of the worker: processor#index."""
        return f"{self.processor}#{self.index}"


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Finish what you hold, close your ends, end."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Code loaded, queues attached."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The code returned, everything is finished and closed; the process is about to exit."""


class Raised(msgspec.Struct, frozen=True, tag=True):
    """User code raised. phase "load": the code cannot run here at all; "frame": one value; "run": it ended the worker."""

    phase: str
    kind: str
    message: str
    traceback: str
    fatal: bool = False


class Buried(msgspec.Struct, frozen=True, tag=True):
    """A dead letter was written. size: bytes of its file."""

    size: int


ToServer = Spawn
FromServer = Spawned | Exited | Paused
ToWorker = Assignment | Drain
FromWorker = Ready | Done | Raised | Buried

_encoder = msgspec.msgpack.Encoder()
_to_server = msgspec.msgpack.Decoder(ToServer)
_from_server = msgspec.msgpack.Decoder(FromServer)
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToServer | FromServer | ToWorker | FromWorker) -> bytes:
    """The one door out."""
    return _encoder.encode(message)


def decode_to_server(data: bytes) -> ToServer:
    """Read a message of the supervisor to the fork server."""
    return _to_server.decode(data)


def decode_from_server(data: bytes) -> FromServer:
    """Read a message of the fork server."""
    return _from_server.decode(data)


def decode_to_worker(data: bytes) -> ToWorker:
    """Read a message of the supervisor to a worker."""
    return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> FromWorker:
    """Read a message of a worker."""
    return _from_worker.decode(data)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that keep packets whole and carry PACKET bytes at once."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in (ours, theirs):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET)
    return ours, theirs
