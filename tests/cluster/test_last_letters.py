"""Dead letters outlive the pipe on their node."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from upipe.cluster import last_letters
from upipe.cluster.last_letters import LastLetters
from upipe.runtime.spool import DeadLetter

LETTER = DeadLetter("a", "a#0", "", "q", 64, 5, "ValueError", "no", "", b"raw")


def test_they_are_there_in_the_next_life_and_the_newest_pipes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_letters, "KEPT", 2)
    kept = LastLetters(tmp_path / "letters")
    for number in range(3):
        kept.keep(f"pipe{number}", [LETTER] * (number + 1))
    kept.keep("none", [])
    later = LastLetters(tmp_path / "letters")
    found = [msgspec.msgpack.decode(later.of(f"pipe{n}"), type=list[DeadLetter]) for n in range(3)]
    assert found == [[], [LETTER] * 2, [LETTER] * 3]
    assert msgspec.msgpack.decode(kept.of("none")) == []
