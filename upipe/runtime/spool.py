"""The pipe's spool: dead letters and checkpoints as files in the supervisor's session.

    <session>/<pipe>.<n>/            one directory per pipe, removed with it
      code.<sha256>                  pickled functions
      dead/<queue>.<position>        dead letters: written whole (temporary name, then rename), one per frame, so a
                                     worker that dies between writing and finishing only writes the same file again
      checkpoint.<processor>.<n>     newest state of a stateful worker, replaced whole

Owner: the supervisor, which reads and removes them. After kill -9 of everything the sweep removes the session.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from upipe.errors import FrameError
from upipe.frame import DataFrame


class DeadLetter(msgspec.Struct, frozen=True):
    """A frame that could not be processed."""

    processor: str
    """Processor that failed on it."""
    worker: str
    """The worker, as processor#index."""
    source: str
    """Processor that emitted it, "" = the pipe."""
    queue: str
    position: int
    """Byte position in that queue: names the frame."""
    deliveries: int
    """How often it was delivered."""
    error_kind: str
    """Class of the exception; "WorkerDied" when its worker was killed by it each time."""
    error: str
    traceback: str
    """Remote traceback as text, "" when the worker died."""
    raw: bytes
    """Header and payload as they stood in the ring."""
    allow_pickle: bool = True
    """Whether it may be unpickled here. As its reader says, whatever was written: see cluster/runner.py."""

    @property
    def frame(self) -> DataFrame:
        """The frame, checked. FrameError when its bytes do not match its CRC."""
        return DataFrame.unpack(self.raw, lazy=True, allow_pickle=self.allow_pickle)

    @property
    def value(self) -> Any:
        """The decoded value. FrameError when it cannot be decoded here."""
        return DataFrame.unpack(self.raw, allow_pickle=self.allow_pickle).value

    def __repr__(self) -> str:
        try:
            text = repr(self.frame)
        except FrameError as error:
            text = f"<unreadable: {error}>"
        return (
            f"DeadLetter({self.worker}, from {self.source or 'the pipe'}, after {self.deliveries} deliveries, "
            f"{self.error_kind}: {self.error}, {text})"
        )


_letters = msgspec.msgpack.Decoder(DeadLetter)


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def bury(spool: Path, letter: DeadLetter) -> int:
    """Write a dead letter; returns its bytes. Finish the frame (dead) after this, never before."""
    data = msgspec.msgpack.encode(letter)
    _write_whole(spool / "dead" / f"{letter.queue}.{letter.position}", data)
    return len(data)


def letters(spool: Path) -> list[DeadLetter]:
    """All dead letters, by queue and position."""
    found = [_letters.decode(path.read_bytes()) for path in (spool / "dead").iterdir() if not path.name.startswith(".")]
    return sorted(found, key=lambda letter: (letter.queue, letter.position))


class Checkpoint(msgspec.Struct, frozen=True):
    """State of a stateful worker, and the frames that are in it."""

    state: bytes
    covered: dict[str, list[int]]
    """Per queue: positions that the state contains and that may not be finished yet."""


_checkpoints = msgspec.msgpack.Decoder(Checkpoint)


def checkpoint_path(spool: Path, processor: str, index: int) -> Path:
    """Where the newest checkpoint of a worker is."""
    return spool / f"checkpoint.{processor}.{index}"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the newest checkpoint."""
    _write_whole(path, msgspec.msgpack.encode(checkpoint))


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The newest checkpoint, None before the first."""
    try:
        return _checkpoints.decode(path.read_bytes())
    except FileNotFoundError:
        return None
