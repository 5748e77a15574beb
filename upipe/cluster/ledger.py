"""The records of pipes on disk.

    DATA_DIR/records/<pipe>          what the scheduler said to save: replaced, never rewritten
    DATA_DIR/records/<pipe>@ended    a pipe that is over and of which nothing is left: history, MOST_ENDED of them

A power cut leaves the old record or the new one: written aside, fsync, rename, fsync of the directory. Owned by the
agent that holds the data directory's lock.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from upipe.cluster.dealings import Save

MOST_ENDED = 100
"""Ended pipes that are remembered."""
_ENDED = "@ended"
_BAD = "@bad"
log = logging.getLogger("upipe.cluster")


def replace_file(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, durably: whole, or as it was."""
    aside = path.with_name(f".{path.name}.new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(aside, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make names in it durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Ledger:
    """The directory of records. All methods block for the disk.

    Args:
        directory: made when missing, 0700.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in directory.glob(".*.new"):
            path.unlink()

    def load(self) -> tuple[dict[str, Save], dict[str, Save]]:
        """Records that go on, and those of ended pipes, the oldest first. One that cannot be read is set aside."""
        going: dict[str, Save] = {}
        ended: dict[str, Save] = {}
        for path in sorted(self.directory.iterdir(), key=lambda one: one.lstat().st_mtime):
            if path.name.startswith(".") or path.name.endswith(_BAD):
                continue
            try:
                saved = msgspec.msgpack.decode(path.read_bytes(), type=Save)
            except (OSError, msgspec.MsgspecError) as error:
                log.error("the record %s cannot be read (%s) and is set aside", path, error)
                path.rename(path.with_name(f"{path.name}{_BAD}"))
                continue
            (ended if path.name.endswith(_ENDED) else going)[saved.record.id] = saved
        return going, ended

    def save(self, saved: Save) -> None:
        """Replace a record.

        Raises:
            OSError: the disk is full, or broken.
        """
        replace_file(self.directory / saved.record.id, msgspec.msgpack.encode(saved))

    def end(self, pipe: str) -> None:
        """It becomes history; what is too old of that goes."""
        path = self.directory / pipe
        if path.exists():
            os.replace(path, path.with_name(f"{pipe}{_ENDED}"))
        ended = sorted(self.directory.glob(f"*{_ENDED}"), key=lambda one: one.lstat().st_mtime)
        for one in ended[:-MOST_ENDED]:
            one.unlink(missing_ok=True)
        sync_directory(self.directory)
