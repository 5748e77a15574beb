"""Records: what is encoded is decoded, and any other bytes give a typed error with a code and a sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upipe.cluster import records
from upipe.cluster.records import (
    DATA,
    HEADER_BYTES,
    MOST_BODY,
    MOST_DATA,
    End,
    Hello,
    Ping,
    Pong,
    Progress,
    Refusal,
    Resume,
    Retired,
    Skip,
    data_header,
    decode_body,
    decode_header,
    encode,
    mirror_key,
)
from upipe.errors import MirrorRefused

numbers = st.integers(0, 2**63 - 1)
names = st.text(min_size=1, max_size=50)
hellos = names.flatmap(
    lambda name: st.builds(
        Hello,
        st.just(mirror_key(name)),
        numbers,
        st.sampled_from([1, 2]),
        numbers,
        numbers,
        numbers,
        numbers,
        numbers,
        st.integers(0, 2**32 - 1),
        st.just(name),
        st.booleans(),
    )
)
every_record = st.one_of(
    hellos,
    st.builds(Skip, numbers, numbers, numbers),
    st.builds(End, numbers, numbers),
    st.builds(Progress, numbers, numbers, numbers, numbers, numbers, st.booleans()),
    st.builds(Resume, numbers, numbers),
    st.builds(Retired, numbers, numbers),
    st.builds(Refusal, numbers, st.text("abc-", max_size=20), st.text(max_size=200), numbers),
    st.builds(Ping, numbers),
    st.builds(Pong, numbers),
)


@given(every_record)
def test_a_record_comes_back_as_it_was(record):
    data = encode(record)
    header = decode_header(data)
    assert len(data) == HEADER_BYTES + header.length
    assert decode_body(header, data[HEADER_BYTES:]) == record


@given(numbers, numbers, st.integers(0, MOST_DATA))
def test_a_data_header_comes_back_as_it_was(mirror, position, length):
    assert decode_header(data_header(mirror, position, length)) == (DATA, length, mirror, position)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.binary(max_size=100))
def test_any_bytes_are_a_record_or_refused(head, body):
    try:
        header = decode_header(head)
        if header.kind != DATA:
            decode_body(header, body)
    except MirrorRefused as refused:
        _told(refused)


@given(every_record, st.data())
def test_a_damaged_record_is_a_record_or_refused(record, data):
    damaged = bytearray(encode(record))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(HEADER_BYTES, len(damaged)))
    try:
        header = decode_header(damaged)
        if header.kind != DATA:
            again = decode_body(header, bytes(damaged[HEADER_BYTES:cut]))
            assert encode(again)
    except MirrorRefused as refused:
        _told(refused)


def _told(refused: MirrorRefused) -> None:
    assert refused.code in ("bad-record", "version")
    assert len(str(refused)) > 20


@pytest.mark.parametrize(("kind", "length"), [(DATA, MOST_DATA + 1), (records.HELLO, MOST_BODY + 1), (0, 0), (11, 0)])
def test_lengths_and_kinds_are_bounded_before_memory_is_taken(kind, length):
    head = records._HEADER.pack(kind, 0, 0, length, 1, 0)
    with pytest.raises(MirrorRefused) as refused:
        decode_header(head)
    assert refused.value.code == "bad-record"


def test_another_protocol_is_refused_naming_both():
    data = encode(Hello(mirror_key("m"), 0, 1, 1, 4096, 0, 0, 0, 7, "m", protocol=9))
    with pytest.raises(MirrorRefused, match="protocol 9, this one 1") as refused:
        decode_body(decode_header(data), data[HEADER_BYTES:])
    assert refused.value.code == "version"


def test_a_long_sentence_of_a_refusal_is_cut_and_a_long_id_refused():
    data = encode(Refusal(1, "x", "ä" * 10_000))
    assert decode_header(data).length <= MOST_BODY
    with pytest.raises(ValueError, match="1 to 200 bytes"):
        encode(Hello(1, 0, 1, 1, 4096, 0, 0, 0, 7, "m" * 201))
