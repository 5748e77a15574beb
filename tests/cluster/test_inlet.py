"""Reading many TLS records at once, between two ends in memory."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any

import pytest

from upipe.cluster import tls
from upipe.cluster.inlet import RECORD, TlsRecords
from upipe.cluster.token import Secret

NODE = tls.Identity("node", "1" * 16)


@dataclass
class Wire:
    """Two ends, and what is on its way to the reading one."""

    reads: TlsRecords
    writes: ssl.SSLObject
    arrived: ssl.MemoryBIO
    sent: ssl.MemoryBIO

    def carry(self, count: int = -1) -> None:
        self.arrived.write(self.sent.read(count))


@pytest.fixture
def wire() -> Wire:
    credentials = tls.issue(Secret(bytes(32)), NODE)
    name = credentials.expected("", NODE.id)
    arrived, sent, back, heard = (ssl.MemoryBIO() for _ in range(4))
    reads: Any = tls.server_context(credentials).wrap_bio(arrived, back, server_side=True)
    writes = tls.client_context(credentials).wrap_bio(heard, sent, server_hostname=name)
    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for end in (writes, reads):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
            arrived.write(sent.read())
            heard.write(back.read())
    assert isinstance(reads, TlsRecords)
    return Wire(reads, writes, arrived, sent)


def test_one_call_reads_all_records_that_came_into_a_large_buffer(wire: Wire) -> None:
    data = bytes(range(256)) * 400  # seven records
    wire.writes.write(data)
    wire.carry()
    room = bytearray(1 << 18)
    assert wire.reads.read(len(room), room) == len(data)
    assert room[: len(data)] == data
    with pytest.raises(ssl.SSLWantReadError):
        wire.reads.read(len(room), room)


def test_a_small_buffer_and_none_read_as_ever(wire: Wire) -> None:
    wire.writes.write(b"a" * (2 * RECORD))
    wire.writes.write(b"bc")
    wire.carry()
    assert wire.reads.read(RECORD, bytearray(RECORD)) == RECORD
    assert wire.reads.read(1 << 18) == b"a" * RECORD
    assert wire.reads.read() == b"bc"
    assert wire.reads.pending() == 0


def test_half_a_record_waits_for_its_other_half(wire: Wire) -> None:
    wire.writes.write(b"a" * RECORD + b"b" * RECORD)
    wire.carry(RECORD + RECORD // 2)
    room = bytearray(1 << 18)
    assert wire.reads.read(len(room), room) == RECORD
    assert wire.reads.take(memoryview(room)) == 0
    wire.carry()
    assert wire.reads.take(memoryview(room)) == RECORD
    assert room[:RECORD] == b"b" * RECORD


def test_the_end_behind_data_is_pending_until_it_is_read(wire: Wire) -> None:
    wire.writes.write(b"last")
    with pytest.raises(ssl.SSLWantReadError):  # it waits for our end
        wire.writes.unwrap()
    wire.carry()
    room = bytearray(1 << 18)
    assert wire.reads.read(len(room), room) == 4
    assert wire.arrived.pending == 0
    assert wire.reads.pending() == 1
    assert wire.reads.read(len(room), room) == 0


def test_what_came_before_a_forged_record_is_read_and_the_forgery_told_then(wire: Wire) -> None:
    wire.writes.write(b"true")
    wire.carry()
    wire.writes.write(b"x" * 100)
    forged = bytearray(wire.sent.read())
    forged[50] ^= 1
    wire.arrived.write(forged)
    room = bytearray(1 << 18)
    assert wire.reads.read(len(room), room) == 4
    assert room[:4] == b"true"
    with pytest.raises(ssl.SSLError):
        wire.reads.read(len(room), room)
