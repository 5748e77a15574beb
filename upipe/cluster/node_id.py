"""The agent's data directory, and what a node remembers of itself: its id, and how often it was started.

    DATA_DIR/            0700, owned by the user
      node_id            0600, 16 hexadecimal digits, made once
      life               0600, starts so far; raised before anything is announced
      lock               flock held while an agent runs here; it dies with its process, whatever kills it

Files are replaced, never rewritten: temporary file, fsync, rename, fsync of the directory. So a power cut leaves the
old or the new number. A number that went backwards would make the others refuse us as our own ghost.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from upipe.errors import DataDirRefused

_NODE_ID = re.compile(r"[0-9a-f]{16}")
_LIFE = re.compile(r"[0-9]{1,9}")


def default_data_dir() -> Path:
    """$XDG_STATE_HOME/upipe/node where that is set; else ~/.local/state/upipe/node, for root /var/lib/upipe."""
    base = os.environ.get("XDG_STATE_HOME")
    if not base and os.geteuid() == 0:
        return Path("/var/lib/upipe")
    base = base or str(Path.home() / ".local" / "state")
    return Path(base) / "upipe" / "node"


@dataclass(frozen=True)
class Identity:
    """Who this agent is in this life."""

    node_id: str
    life: int
    """Starts of this node's agent, this one included."""

    @property
    def incarnation(self) -> int:
        """The first incarnation of this life; see NodeInfo.incarnation."""
        return self.life << 32


class DataDir:
    """The data directory, opened and locked. Use it as a context manager, or close() it.

    Args:
        path: made with mode 0700 when it does not exist.

    Raises:
        DataDirRefused: not ours, open to others, in use by another agent, or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check(path)
            self._lock = _locked(path / "lock")
        except OSError as error:
            if isinstance(error, DataDirRefused):
                raise
            raise DataDirRefused(
                f"the data directory {path} cannot be used: {error}; choose another with --data-dir"
            ) from None

    def identity(self) -> Identity:
        """Who we are; each call begins a new life, on disk before it returns.

        Raises:
            DataDirRefused: a file holds something else, or cannot be written.
        """
        try:
            node_id = self._read("node_id", _NODE_ID)
            if node_id is None:
                node_id = secrets.token_hex(8)
                self.write("node_id", node_id)
            life = int(self._read("life", _LIFE) or "0") + 1
            self.write("life", str(life))
        except OSError as error:
            if isinstance(error, DataDirRefused):
                raise
            raise DataDirRefused(
                f"{self.path} cannot be written: {error}; make room or choose another --data-dir"
            ) from None
        return Identity(node_id, life)

    def outlive(self, life: int) -> None:
        """Remember that a life was seen which this directory did not know (it was restored from a copy)."""
        if life > int(self._read("life", _LIFE) or "0"):
            self.write("life", str(life))

    def write(self, name: str, text: str) -> None:
        """Replace the file `name` (0600), durably."""
        temporary = self.path / f".{name}.new"
        temporary.unlink(missing_ok=True)  # what a crash left; the lock makes it ours
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, f"{text}\n".encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, self.path / name)
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)  # the rename itself
        finally:
            os.close(directory)

    def close(self) -> None:
        """Let the next agent in. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> DataDir:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, name: str, pattern: re.Pattern[str]) -> str | None:
        path = self.path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            text = os.read(fd, 256).decode("ascii", "replace").strip()
        finally:
            os.close(fd)
        if not pattern.fullmatch(text):
            raise DataDirRefused(
                f"{path} holds {text[:40]!r}, which uPipe did not write; remove it, and this node joins as a new one"
            )
        return text


def _check(path: Path) -> None:
    """Ours and closed to others. One that is open is refused, not repaired: somebody may have been in."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise DataDirRefused(f"the data directory {path} is no directory; choose another with --data-dir")
    if found.st_uid != os.geteuid():
        raise DataDirRefused(
            f"the data directory {path} belongs to uid {found.st_uid}, this agent runs as {os.geteuid()}; "
            "choose another with --data-dir"
        )
    if found.st_mode & 0o077:
        raise DataDirRefused(
            f"the data directory {path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"look through it and run: chmod 700 {path}"
        )


def _locked(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        owner = ""
        with contextlib.suppress(OSError):
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise DataDirRefused(
            f"another agent{f' (pid {owner})' if owner else ''} runs in {path.parent}; "
            "stop it, or give this one a --data-dir of its own"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd
