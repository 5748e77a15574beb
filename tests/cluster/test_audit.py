"""The audit log: one JSON object a line, ours alone, bounded, and without the token."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from upipe.cluster.audit import MOST, Audit


def test_a_line_is_an_object_in_a_file_of_our_own(tmp_path: Path) -> None:
    path = tmp_path / "audit" / "log"
    with Audit(path) as audit:
        audit.write("refused", peer="10.0.0.1", status=401, code="", path='/"\n\x1b[31m\udcff')
    [line] = path.read_text().splitlines()
    told = json.loads(line)
    assert told.pop("time").endswith("Z")
    assert told == {"event": "refused", "peer": "10.0.0.1", "status": 401, "path": '/"\n\x1b[31m\\udcff'}
    assert "\x1b" not in line
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_token_is_cut_out_and_long_values_are_shortened(tmp_path: Path) -> None:
    with Audit(tmp_path / "log", "s3cret") as audit:
        audit.write("refused", path="/v1/s3cret/" + "x" * 9999)
    text = (tmp_path / "log").read_text()
    assert "s3cret" not in text and "/v1/[token]/xxx" in text and len(text) < MOST + 100


def test_files_are_bounded_in_size_and_number(tmp_path: Path) -> None:
    with Audit(tmp_path / "log", most=1000, keep=2) as audit:
        for number in range(200):
            audit.write("changed", status=number)
    files = sorted(tmp_path.iterdir())
    assert [one.name for one in files] == ["log", "log.1", "log.2"]
    assert all(one.stat().st_size <= 1000 and stat.S_IMODE(one.stat().st_mode) == 0o600 for one in files)
    lines = [json.loads(line)["status"] for one in reversed(files) for line in one.read_text().splitlines()]
    assert lines == list(range(lines[0], 200))


def test_it_goes_on_where_it_was_and_follows_no_link(tmp_path: Path) -> None:
    for _ in range(2):
        with Audit(tmp_path / "log") as audit:
            audit.write("changed")
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    (tmp_path / "link").symlink_to(tmp_path / "log")
    with pytest.raises(OSError, match="symbolic"):
        Audit(tmp_path / "link")


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with Audit(tmp_path / "log") as audit:
        monkeypatch.setattr(os, "write", full)
        audit.write("changed")
        monkeypatch.undo()
        audit.write("refused")
    assert json.loads((tmp_path / "log").read_text())["event"] == "refused"
