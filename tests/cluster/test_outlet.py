"""Writing over TLS in slices; writing past a plain transport is seen at work in test_mirror.py."""

from __future__ import annotations

import asyncio
from typing import Any

from upipe.cluster.outlet import SLICE, TlsOutlet


class Wire(asyncio.Transport):
    """A transport that has enough after so many slices."""

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.enough = enough
        self.given: list[bytes] = []
        self.outlet = TlsOutlet(self)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.limits = high, low

    def write(self, data: Any) -> None:
        assert not isinstance(data, memoryview) or data.nbytes <= 2 * SLICE
        self.given.append(bytes(data))
        if len(self.given) == self.enough:
            self.outlet.pause()

    def drain(self) -> bool:
        self.enough += 2
        return self.outlet.resume()


def test_a_large_piece_goes_in_slices_when_there_is_room_and_what_is_said_meanwhile_behind_it() -> None:
    wire, ring = Wire(2), bytes(range(256)) * (SLICE // 64 + 1)  # four slices and 256 bytes
    assert wire.outlet.write(b"head")
    assert not wire.outlet.write(memoryview(ring))
    assert not wire.outlet.write(b"tail")
    assert [len(one) for one in wire.given] == [4, SLICE]
    assert not wire.drain()
    assert [len(one) for one in wire.given[2:]] == [SLICE, SLICE]
    assert not wire.drain()
    assert wire.drain()
    assert b"".join(wire.given) == b"head" + ring + b"tail"
    assert len(wire.given[4]) == SLICE + 256  # no slice for so little


def test_a_transport_that_has_enough_is_given_nothing() -> None:
    wire = Wire(1)
    assert not wire.outlet.write(b"a")
    assert not wire.outlet.write(b"b")
    assert wire.given == [b"a"]
    assert wire.drain()
    assert wire.given == [b"a", b"b"]


def test_closed_it_forgets() -> None:
    wire = Wire(1)
    wire.outlet.write(bytes(3 * SLICE))
    wire.outlet.close()
    assert wire.drain()
    assert len(wire.given) == 1
