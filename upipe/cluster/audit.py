"""The audit log: who changed or was refused what, one JSON object a line, in files of our own and of bounded size.

    {"time": "2026-11-22T21:00:00.000Z", "event": "refused", "peer": "10.0.0.7", "status": 401, "code":
    "unauthorized", ...}

Events: refused, changed (a request that changes something was let in; its status says how it ended), upgraded,
handshake (TLS failed), turned_away (too many connections). What comes from outside is shortened, and the token cut
out should someone put it into a path.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

MOST = 256
"""Characters of one value."""


class Audit:
    """Append to `path`, and to path.1 .. path.n what came before.

    Args:
        path: 0600, made when missing; its directory is 0700.
        secret: text that must never show: the bearer token.
        most: bytes of one file.
        keep: older files that are kept.

    Raises:
        OSError: it cannot be opened. Nothing is served without an audit log.
    """

    def __init__(self, path: Path, secret: str = "", most: int = 8 << 20, keep: int = 3) -> None:
        self.path = path
        self._secret = secret
        self._most = most
        self._keep = keep
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        os.fchmod(fd, 0o600)
        self._size = os.fstat(fd).st_size
        return fd

    def write(self, event: str, /, **facts: str | int) -> None:
        """Append one line. A full disk loses the line, never the request: counting on logs must not stop a node."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        told = {name: self._clean(value) for name, value in facts.items() if value != ""}
        line = msgspec.json.encode({"time": stamp, "event": event, **told}) + b"\n"
        try:
            if self._size + len(line) > self._most:
                self._rotate()
            os.write(self._fd, line)
            self._size += len(line)
        except OSError:
            pass

    def _clean(self, value: str | int) -> str | int:
        if isinstance(value, int):
            return value
        text = value.replace(self._secret, "[token]") if self._secret else value
        return text[:MOST].encode("utf-8", "backslashreplace").decode()

    def _rotate(self) -> None:
        for number in range(self._keep, 0, -1):
            older = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            if older.exists():
                older.replace(self.path.with_name(f"{self.path.name}.{number}"))
        if not self._keep:
            self.path.unlink(missing_ok=True)
        fresh = self._open()
        os.close(self._fd)
        self._fd = fresh

    def close(self) -> None:
        """Close the file; again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
