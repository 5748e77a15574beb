"""Following a file that is moved aside while it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from upipe.cluster import handlers


async def test_output_is_followed_across_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "TAIL", 0.0)
    path = tmp_path / "output"
    (tmp_path / "output.1").write_bytes(b"first ")
    path.write_bytes(b"second ")
    looks = 0

    def over() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            with path.open("ab") as file:
                file.write(b"third ")
            os.replace(path, tmp_path / "output.1")
            path.write_bytes(b"fourth ")
        if looks == 2:
            with path.open("ab") as file:
                file.write(b"fifth")
        return looks > 1

    assert b"".join([piece async for piece in handlers.tail(path, over)]) == b"first second third fourth fifth"
