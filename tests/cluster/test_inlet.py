"""Reading many TLS records at once, between two ends in memory; when the kernel is asked to gather."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cluster.engines import ENGINES, use
from upipe.cluster import tls
from upipe.cluster.inlet import GATHERED, MARGIN, RECORD, SWIFT, Gathering, Takes
from upipe.cluster.token import Secret

NODE = tls.Identity("node", "1" * 16)


@dataclass
class Wire:
    """Two ends, and what is on its way to the reading one."""

    reads: Any
    writes: ssl.SSLObject
    arrived: ssl.MemoryBIO
    sent: ssl.MemoryBIO

    def carry(self, count: int = -1) -> None:
        self.arrived.write(self.sent.read(count))


@pytest.fixture(params=ENGINES)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Wire:
    use(request.param, monkeypatch)
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
    assert isinstance(reads, Takes)
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


class Connection(asyncio.BaseTransport):
    """Of a real socket."""

    def __init__(self, one: socket.socket) -> None:
        super().__init__()
        self.one = one

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.one if name == "socket" else default

    @property
    def low(self) -> int:
        return self.one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


@pytest.fixture
def connection() -> Iterator[Connection]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        yield Connection(one)


ENOUGH = GATHERED + MARGIN + 1


def test_the_kernel_gathers_while_enough_is_to_come_and_the_last_large_record_came_fast(connection: Connection) -> None:
    gathering = Gathering(connection)
    gathering.begins(True, 1.0)
    gathering.left(ENOUGH, 1.0)
    assert connection.low == 1  # nothing is known of its pace
    gathering.left(0, 1.0 + SWIFT / 2)
    gathering.begins(True, 2.0)
    gathering.left(ENOUGH, 2.0)
    assert connection.low == GATHERED
    gathering.left(ENOUGH - 1, 2.0)
    assert connection.low == 1
    gathering.left(0, 2.0 + 2 * SWIFT)
    gathering.begins(True, 3.0)
    gathering.left(ENOUGH, 3.0)
    assert connection.low == 1  # the last one was slow


def test_a_small_record_says_nothing_of_the_pace(connection: Connection) -> None:
    gathering = Gathering(connection)
    gathering.begins(False, 1.0)
    gathering.left(0, 1.0)
    gathering.begins(True, 2.0)
    gathering.left(ENOUGH, 2.0)
    assert connection.low == 1


@pytest.mark.parametrize("why", ["silence", "nobody wants it"])
def test_gathering_ends_when_the_rest_may_not_come(connection: Connection, why: str) -> None:
    gathering = Gathering(connection)
    gathering.begins(True, 1.0)
    gathering.left(0, 1.0)
    gathering.left(ENOUGH, 1.0)
    assert connection.low == GATHERED
    if why == "silence":
        gathering.off()
    else:
        gathering.unknown()
    assert connection.low == 1
    gathering.left(ENOUGH, 1.0)
    assert connection.low == (1 if why == "silence" else GATHERED)
