"""Records survive a restart, are whole, and history is bounded."""

from __future__ import annotations

import os

import pytest

from upipe.cluster import ledger as module
from upipe.cluster.dealings import Save
from upipe.cluster.lanes import lay_out
from upipe.cluster.ledger import Ledger, replace_file
from upipe.cluster.placement import Placement
from upipe.cluster.record import Record
from upipe.graph.spec import PipeSpec, ProcessorSpec

SPEC = PipeSpec("p", (ProcessorSpec("a", "source"),))
LAYOUT = lay_out(SPEC, Placement({"a": ("n1",)}), "")


def saved(pipe: str, revision: int = 1) -> Save:
    return Save(Record(pipe, SPEC, 1, revision, "n1", ("n1",), "n1", LAYOUT), 1, "n1")


def test_the_newest_is_found_again(tmp_path):
    ledger = Ledger(tmp_path / "records")
    ledger.save(saved("p-1"))
    ledger.save(saved("p-1", 2))
    ledger.save(saved("p-2@ended".replace("@", "."), 1))
    going, ended = Ledger(tmp_path / "records").load()
    assert going == {"p-1": saved("p-1", 2), "p-2.ended": saved("p-2.ended")} and ended == {}


def test_ended_ones_are_history_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_ENDED", 2)
    ledger = Ledger(tmp_path)
    for number in range(4):
        ledger.save(saved(f"p-{number}"))
        os.utime(tmp_path / f"p-{number}", (number, number))
        ledger.end(f"p-{number}")
    going, ended = ledger.load()
    assert going == {} and list(ended) == ["p-2", "p-3"]
    ledger.end("p-9")  # never written


def test_one_that_cannot_be_read_is_set_aside_and_what_a_crash_left_removed(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.save(saved("p-1"))
    (tmp_path / "p-2").write_bytes(b"\xff\xff")
    (tmp_path / ".p-3.new").write_bytes(b"half")
    going, _ = Ledger(tmp_path).load()
    assert list(going) == ["p-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-1", "p-2@bad"]
    assert list(Ledger(tmp_path).load()[0]) == ["p-1"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
