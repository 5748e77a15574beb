"""Dead letters and checkpoints as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from upipe import DataFrame
from upipe.errors import FrameError
from upipe.runtime.spool import (
    Checkpoint,
    DeadLetter,
    bury,
    checkpoint_path,
    letters,
    load_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "dead").mkdir()
    return tmp_path


def letter(position: int = 64, value: Any = "hello", queue: str = "p1.e0", raw: bytes | None = None) -> DeadLetter:
    data = DataFrame(value).pack() if raw is None else raw
    return DeadLetter("b", "b#0", "a", queue, position, 5, "ValueError", "bad", "Traceback ...", data)


def test_a_buried_letter_comes_back_whole(spool: Path) -> None:
    size = bury(spool, letter(value={"a": [1, 2]}))
    (found,) = letters(spool)
    assert found == letter(value={"a": [1, 2]}) or found.value == {"a": [1, 2]}
    assert found.value == {"a": [1, 2]} and found.frame.size > 0 and size > 64
    assert "b#0, from a, after 5 deliveries, ValueError: bad" in repr(found)


def test_burying_a_frame_again_replaces_its_letter(spool: Path) -> None:
    for _ in range(3):
        bury(spool, letter(64))
    bury(spool, letter(0))
    bury(spool, letter(0, queue="p1.e1"))
    assert [(one.queue, one.position) for one in letters(spool)] == [("p1.e0", 0), ("p1.e0", 64), ("p1.e1", 0)]


def test_a_letter_half_written_by_a_process_that_died_is_not_seen(spool: Path) -> None:
    (spool / "dead" / ".p1.e0.64.4711").write_bytes(b"half")
    assert letters(spool) == []


def test_a_letter_whose_frame_is_damaged_can_still_be_shown(spool: Path) -> None:
    damaged = bytearray(DataFrame(b"x" * 100).pack())
    damaged[80] ^= 1
    bury(spool, letter(raw=bytes(damaged)))
    (found,) = letters(spool)
    with pytest.raises(FrameError):
        _ = found.value
    assert "unreadable" in repr(found) or "DataFrame" in repr(found)


def test_the_newest_checkpoint_replaces_the_one_before(spool: Path) -> None:
    path = checkpoint_path(spool, "sum", 2)
    assert load_checkpoint(path) is None
    save_checkpoint(path, Checkpoint(b"one", {"q": [0, 64]}))
    save_checkpoint(path, Checkpoint(b"two", {}))
    assert load_checkpoint(path) == Checkpoint(b"two", {})
    assert [one.name for one in spool.iterdir() if one.is_file()] == [path.name]
