"""What the workers of a pipe print: one file that is kept small.

Workers write into a pipe that the keeper reads. Rejected: giving them the file, which could only be cut by looking at
its size again and again, and would lose lines at each cut.
"""

from __future__ import annotations

import fcntl
import os
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST = 8 << 20
"""Bytes of the file; then it becomes output.1, in place of the one before."""
_PIECE = 1 << 16


class Output:
    """The file, and the pipe into it.

    Args:
        path: of the file.
        most: see MOST.
    """

    def __init__(self, path: Path, most: int = MOST) -> None:
        self.path = path
        self.most = most
        self.reading, self._writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.reading, False)
        self._lost = 0
        """Bytes for which there was no room on the disk."""
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._file).st_size

    @contextmanager
    def as_own(self) -> Iterator[None]:
        """In the block this process's own standard output and error go into the pipe, for children that keep them. The
        process itself must not: it would wait for itself when the pipe is full."""
        before = [os.dup(1), os.dup(2)]
        try:
            os.dup2(self._writing, 1)
            os.dup2(self._writing, 2)
            yield
        finally:
            for number, fd in enumerate(before, 1):
                os.dup2(fd, number)
                os.close(fd)

    def pump(self) -> None:
        """Write what is there, a bounded piece at a time."""
        try:
            data = os.read(self.reading, _PIECE)
        except BlockingIOError:
            return
        if self._lost:
            data = f"\n... {self._lost:,} bytes were lost: no room on the disk ...\n".encode() + data
        try:
            if self._size + len(data) > self.most:
                self._rotate()
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            self._size += len(data)
            self._lost = 0
        except OSError:  # the disk is full: print() must not end the pipe
            self._lost += len(data)

    def _rotate(self) -> None:
        os.replace(self.path, self.path.with_name(f"{self.path.name}.1"))
        os.close(self._file)
        self._open()
        for number in (1, 2):
            os.dup2(self._file, number)  # the keeper's own

    def finish(self) -> None:
        """Write the rest; nobody prints any more."""
        while self._pending():
            self.pump()

    def _pending(self) -> bool:
        size = bytearray(4)
        fcntl.ioctl(self.reading, termios.FIONREAD, size)
        return any(size)
