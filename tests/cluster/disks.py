"""A small disk of a test: a tmpfs of its own that can be full. Root, as network namespaces.

Its source in /proc/mounts names the process that mounted it: what a test that was killed left is unmounted by the next.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path

_PREFIX = "upipe-test-disk-"
_DEADLINE = 60.0


class SmallDisk:
    """Mounted from its making until close().

    Args:
        path: made when missing.
        size: bytes.
    """

    def __init__(self, path: Path, size: int = 4 << 20) -> None:
        sweep()
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", f"{_PREFIX}{os.getpid()}", str(path))

    def fill(self) -> None:
        """Take all the room there is."""
        with open(self.path / ".filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    def free(self) -> None:
        """Give it back. Idempotent."""
        (self.path / ".filler").unlink(missing_ok=True)

    @property
    def full(self) -> bool:
        """Whether a byte finds no room."""
        probe = self.path / ".probe"
        try:
            probe.write_bytes(b"1")
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            probe.unlink(missing_ok=True)
        return False

    def close(self) -> None:
        """Unmount. Idempotent."""
        if os.path.ismount(self.path):
            _run("umount", "-l", str(self.path))


def sweep() -> None:
    """Unmount what dead tests left."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, path = line.split()[:2]
        owner = source.removeprefix(_PREFIX)
        if owner != source and not Path(f"/proc/{owner}").exists():
            _run("umount", "-l", path)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=_DEADLINE, capture_output=True, text=True)
