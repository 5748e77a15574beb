"""Dead letters of pipes that have ended on this node: kept for the process that submitted them, which asks at the end.

    DATA_DIR/letters/<pipe>      msgpack, 0600, written whole before the keeper and its spool go

The newest KEPT pipes' are kept. After kill -9 they lie there for the next life of the agent.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from upipe.runtime.spool import DeadLetter

KEPT = 32
"""Pipes. Each has up to settings.dead_letter_bytes."""


class LastLetters:
    """Of one agent.

    Args:
        directory: DATA_DIR/letters.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)

    def keep(self, pipe: str, letters: list[DeadLetter]) -> None:
        """Write them down; nothing when there are none. Blocks: call it in a thread.

        Raises:
            OSError.
        """
        if not letters:
            return
        aside = self._directory / f".{pipe}"
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(msgspec.msgpack.encode(letters))
        os.replace(aside, self._directory / pipe)
        known = [path for path in self._directory.iterdir() if not path.name.startswith(".")]
        for old in sorted(known, key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()

    def of(self, pipe: str) -> bytes:
        """msgpack list of DeadLetter. Blocks."""
        try:
            return (self._directory / pipe).read_bytes()
        except FileNotFoundError:
            return msgspec.msgpack.encode([])
