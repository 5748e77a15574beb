"""The layout table: it is checked, its fingerprint follows it, and what is made from it is what is committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from upipe import frame
from upipe.memq import _ring, layout
from upipe.memq.layout import Field

HERE = Path(layout.__file__).parent


def test_the_committed_header_is_the_one_the_table_makes():
    assert (HERE / "_layout.h").read_text() == layout.c_header()


def test_the_extension_was_built_from_this_table():
    version, fingerprint = _ring.fingerprint()
    assert version == layout.LAYOUT_VERSION
    assert fingerprint & 0xFFFFFF00 == layout.fingerprint() & 0xFFFFFF00  # the C side mixes in sizeof(pthread_mutex_t)


def tables():
    return [(name, i) for name, fields, _ in layout.STRUCTS for i in range(len(fields))]


@pytest.mark.parametrize(("name", "index"), tables(), ids=lambda value: str(value))
def test_the_fingerprint_changes_with_every_field(monkeypatch, name, index):
    before = layout.fingerprint()
    seen = {before}
    for change in ({"offset": 2048}, {"ctype": "uint16_t"}, {"name": "other"}, {"length": 3}):
        structs = tuple(
            (n, tuple(f._replace(**change) if (n, k) == (name, index) else f for k, f in enumerate(fields)), size)
            for n, fields, size in layout.STRUCTS
        )
        if structs != layout.STRUCTS:
            monkeypatch.setattr(layout, "STRUCTS", structs)
            seen.add(layout.fingerprint())
            monkeypatch.undo()
    assert len(seen) >= 4
    assert layout.fingerprint() == before


@pytest.mark.parametrize("constant", ["LAYOUT_VERSION", "GRANULE", "CONTROL_BYTES", "SLOTS", "PRODUCERS"])
def test_the_fingerprint_changes_with_every_constant(monkeypatch, constant):
    before = layout.fingerprint()
    monkeypatch.setattr(layout, constant, getattr(layout, constant) + 1)
    assert layout.fingerprint() != before


@pytest.mark.parametrize(
    ("fields", "size", "words"),
    [
        ((Field(0, "uint64_t", "a", 0, ""), Field(4, "uint32_t", "b", 0, "")), 16, "overlaps"),
        ((Field(0, "uint64_t", "a", 2, ""), Field(8, "uint32_t", "b", 0, "")), 64, "overlaps"),
        ((Field(4, "uint64_t", "a", 0, ""),), 64, "misaligned"),
        ((Field(2, "uint32_t", "a", 0, ""),), 64, "misaligned"),
        ((Field(56, "uint64_t", "a", 2, ""),), 64, "more than 64"),
        ((Field(8, "uint64_t", "a", 0, ""), Field(0, "uint64_t", "b", 0, "")), 64, "overlaps"),
    ],
)
def test_check_catches_overlap_misalignment_and_overflow(monkeypatch, fields, size, words):
    layout.check()
    monkeypatch.setattr(layout, "STRUCTS", (("up_test", fields, size),))
    with pytest.raises(AssertionError, match=words):
        layout.check()


def test_the_two_ends_share_no_cache_line():
    line = {field.name: field.offset // 64 for field in layout.CONTROL}
    producers = {line[n] for n in ("producer_lock", "head", "cached_tail", "head_books")}
    consumers = {line[n] for n in ("consumer_lock", "next", "cached_head", "redeliver", "taken", "tail", "tail_books")}
    assert not producers & consumers
    assert line["producer_lock"] != line["head"]
    assert line["consumer_lock"] != line["next"] != line["tail"]


def test_the_frame_header_of_the_table_is_the_codecs():
    assert sum(layout._size(f) for f in layout.FRAME) == layout.GRANULE == frame.HEADER_BYTES == frame.HEADER.size
    assert layout.FRAME_MAGIC == frame.MAGIC
    assert layout.LAYOUT_VERSION == frame.VERSION
    names = [f.name.rstrip("_") for f in layout.FRAME]
    assert names == list(frame.Header._fields)


@pytest.mark.parametrize("name", [entry[0] for entry in layout.STRUCTS])
def test_each_table_can_be_printed_for_the_documents(name):
    text = layout.markdown(name)
    fields = next(entry[1] for entry in layout.STRUCTS if entry[0] == name)
    assert len(text.splitlines()) == len(fields) + 2
    assert all(field.doc in text for field in fields)


def test_a_segment_is_laid_out_as_documented():
    for wanted in (1, 4096, 4097, 1 << 20, (1 << 30) + 1):
        capacity, total = _ring.segment_bytes(wanted)
        assert capacity >= max(wanted, layout.MIN_RING)
        assert capacity & (capacity - 1) == 0
        slots, producers = layout.SLOTS * 64, layout.PRODUCERS * 64
        states = -(-capacity // layout.GRANULE * 8 // 4096) * 4096
        assert total == layout.CONTROL_BYTES + slots + producers + states + capacity
    for wrong in (0, -1, layout.MAX_RING + 1):
        with pytest.raises(ValueError, match="ring"):
            _ring.segment_bytes(wrong)
