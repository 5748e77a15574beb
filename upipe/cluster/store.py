"""Contents by their SHA-256, on disk: code, scripts and module archives that pipes need.

    DATA_DIR/code/<sha256>            0600, whole or not there: written aside, checked, renamed
    DATA_DIR/modules/<sha256>/...     an archive, unpacked once: written aside, renamed

Owned by the agent that holds the data directory's lock. After kill -9 files that were being written are left, and
removed at the next start. What nobody used for KEEP_DAYS goes then too (`tidy`); in between the oldest go when
MOST_BYTES are reached; never those that a pipe needs whose workers run here (`pin`) or whose record lies here
(`needed`). Nothing here is executed or unpickled: workers do that.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path

from upipe.cluster import archive
from upipe.cluster.server import refuse
from upipe.errors import NodeRefused
from upipe.settings import MIB

MOST_BYTES = 8192 * MIB
"""Bytes of all contents. More spares sending again, and takes disk."""
KEEP_DAYS = 7.0
_PIECE = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(NodeRefused):
    """It finds no room on this node, whoever gives it."""

    def __init__(self, sentence: str) -> None:
        super().__init__("this node", 507, "no_room", sentence)

    def __reduce__(self) -> tuple[type, tuple[str]]:  # type: ignore[override]
        return (type(self), (self.sentence,))


class Store:
    """The contents of one data directory.

    Args:
        directory: of the agent.
        most: bytes of all contents.
    """

    def __init__(self, directory: Path, most: int = MOST_BYTES) -> None:
        self.directory = directory / "code"
        self.modules = directory / "modules"
        self._most = most
        self.needed: Callable[[], Iterable[str]] = tuple
        """Contents of the pipes whose records lie here: other nodes may ask for them."""
        self._pins: dict[str, frozenset[str]] = {}
        self._large = ("", 0)
        """The content that found no room last, and its bytes: it is not fetched again in vain."""
        for one in (self.directory, self.modules):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (*self.directory.glob(".*"), *self.modules.glob(".*")):
            _remove(path)

    def tidy(self) -> None:
        """Remove what was not used lately. Call it when it is known what is pinned and needed."""
        before, kept = time.time() - KEEP_DAYS * 86_400, self._kept()
        for path in (*self.directory.iterdir(), *self.modules.iterdir()):
            if path.name not in kept and path.lstat().st_mtime < before:
                _remove(path)

    def _kept(self) -> set[str]:
        return {*self.needed()}.union(*self._pins.values())

    # ------------------------------------------------------------------ contents

    def path(self, sha256: str) -> Path:
        """Where a content lies, or would."""
        return self.directory / sha256

    def has(self, sha256: str) -> bool:
        """Whether it is here; asking counts as using."""
        try:
            os.utime(self.path(sha256))
        except FileNotFoundError:
            return False
        return True

    def missing(self, contents: Iterable[str]) -> list[str]:
        """Of these, what is not here."""
        return [one for one in contents if not self.has(one)]

    def pin(self, owner: str, contents: Iterable[str]) -> None:
        """Keep these for `owner` (a pipe); none lets go."""
        kept = frozenset(contents)
        if kept:
            self._pins[owner] = kept
        else:
            self._pins.pop(owner, None)

    def read(self, sha256: str) -> Iterator[bytes]:
        """Its bytes, in pieces.

        Raises:
            NodeRefused: 404, it is not here.
        """
        try:
            file = self.path(sha256).open("rb")
        except FileNotFoundError:
            raise refuse(404, "no_such_content", f"This node does not hold {sha256}.") from None
        with file:
            while piece := file.read(_PIECE):
                yield piece

    async def put(self, sha256: str, pieces: AsyncIterator[bytes]) -> int:
        """Take a content; its size. One that is here already is read to its end and left as it is.

        Raises:
            NoRoom: the disk is full, or what pipes here need takes all that may be kept.
            NodeRefused: its hash is another one (400), or it cannot be written (507).
        """
        name, large = self._large
        if name == sha256 and not self.has(sha256) and _free(self.directory) < large:
            raise self._full(sha256, large, errno.ENOSPC)
        aside = self.directory / f".{sha256}.{secrets.token_hex(4)}"
        seen, size, wrong = hashlib.sha256(), 0, 0
        try:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb", buffering=0) as file:
                async for piece in pieces:
                    seen.update(piece)
                    size += len(piece)
                    wrong = wrong or _written(file, piece)  # the rest of one that finds no room is counted
                if not wrong:
                    os.fsync(file.fileno())
            if seen.hexdigest() != sha256:
                raise refuse(400, "other_content", f"The content's SHA-256 is {seen.hexdigest()}, not {sha256}.")
            if not wrong:
                self._make_room(size, sha256)
                os.rename(aside, self.path(sha256))
        except OSError as error:
            if error.errno not in _FULL:
                raise refuse(507, "no_room", f"The content cannot be written: {error.strerror}.") from None
            wrong = error.errno
            async for piece in pieces:  # what was not read yet
                size += len(piece)
        finally:
            aside.unlink(missing_ok=True)
        if wrong:
            self._large = (sha256, size)
            raise self._full(sha256, size, wrong)
        return size

    def _full(self, sha256: str, size: int, why: int, where: Path | None = None) -> NoRoom:
        where = where or self.directory
        return NoRoom(
            f"the content {sha256} cannot be stored in {where}: {os.strerror(why)}; it takes {size:,} bytes, and "
            f"{_free(where):,} are free there: make room on that disk"
        )

    def _make_room(self, size: int, keep: str) -> None:
        pinned = {keep, *self._kept()}
        found = [(path.lstat(), path) for path in self.directory.iterdir() if not path.name.startswith(".")]
        total = size + sum(status.st_size for status, path in found if path.name != keep)
        for status, path in sorted(found, key=lambda one: one[0].st_mtime):
            if total <= self._most:
                return
            if path.name not in pinned:
                path.unlink()
                shutil.rmtree(self.modules / path.name, ignore_errors=True)
                total -= status.st_size
        if total > self._most:
            raise NoRoom(
                f"the contents in {self.directory} that pipes here need leave no room for {size:,} bytes more: they "
                f"may take {self._most:,}"
            )

    # ------------------------------------------------------------------ archives

    def unpack(self, sha256: str) -> Path:
        """The directory of an archive of modules, unpacked when it is not yet. Blocks: call it in a thread.

        Raises:
            ArchiveRefused: it is no zip archive, has a name that leads out of it, or is too large.
            NoRoom: the disk is full. OSError: it is not here.
        """
        target = self.modules / sha256
        if target.is_dir():
            os.utime(target)
            return target
        aside = self.modules / f".{sha256}.{secrets.token_hex(4)}"
        try:
            data = self.path(sha256).read_bytes()
            try:
                archive.unpack(data, aside)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise self._full(sha256, archive.unpacked_size(data), error.errno, self.modules) from None
            try:
                os.rename(aside, target)
            except OSError:
                if not target.is_dir():  # else another one was faster
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _free(directory: Path) -> int:
    """Bytes."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _written(file: FileIO, piece: bytes) -> int:
    """0, or the errno of a disk that has no room for it."""
    rest = memoryview(piece)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return error.errno
    return 0
