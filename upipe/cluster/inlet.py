"""How a link reads: in large pieces, since each costs a turn of the event loop.

OpenSSL decrypts a record of 16 KiB per call, and event loops make several Python calls around each, and take a turn
per buffer, in which they copy together what comes meanwhile. So over TLS all that one read of the socket brought is
taken at once (TlsRecords). And while much of a record is to come, and comes fast, the kernel wakes us for GATHERED
bytes of it, not for each packet (Gathering).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any, Protocol, runtime_checkable

RECORD = 1 << 14
"""Most bytes of a TLS record."""
GATHERED = 1 << 17
"""Bytes that the kernel gathers."""
MARGIN = 1 << 15
"""Bytes that must come beyond them: some of what is to come may be here already, as the first half of a TLS record."""
SWIFT = 0.02
"""Seconds in which a large record came when the next one is gathered: so nothing waits much longer than this."""


@runtime_checkable
class Takes(Protocol):
    """A TLS connection that gives what is there beside its transport: TlsRecords, or tls_records.FastRecords."""

    def take(self, buffer: memoryview) -> int:
        """Fill the buffer with what is there already. Less: there is no more, or the event loop will find out why."""


class TlsRecords(ssl.SSLObject):
    """An SSLObject (SSLContext.sslobject_class) that fills a large buffer from as many records as are there."""

    _ended = False
    """The other end said that nothing follows: the event loop must hear so, which reads only while something is
    pending."""

    def read(self, length: int = 1024, buffer: Any = None) -> Any:
        """As of SSLObject; what is wrong behind the first record is told by the next call."""
        got: Any = super().read(length, buffer)
        if buffer is None or not 0 < got < length or length <= RECORD:
            return got
        return got + self.take(memoryview(buffer)[got:length])

    def take(self, buffer: memoryview) -> int:
        """Fill it with what is there already. Less: there is no more, or the event loop will find out why."""
        read: Any = super().read
        size, got = len(buffer), 0
        try:
            while got < size:
                count: int = read(size - got, buffer[got:])
                if not count:
                    self._ended = True
                    break
                got += count
        except ssl.SSLError:
            pass  # SSLWantReadError: that was all. Any other comes again
        return got

    def pending(self) -> int:
        """As of SSLObject; at the end 1."""
        return super().pending() or self._ended


class Gathering:
    """SO_RCVLOWAT of one connection. The kernel wakes us at the end of the stream and when its buffer is full, too; for
    a sender that falls silent within a record the link calls off().

    Args:
        transport: of the connection.
    """

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        self._socket = transport.get_extra_info("socket")
        self._low = 1
        self._began: float | None = None
        self._swift = False

    def begins(self, large: bool, now: float) -> None:
        """A record begins to come."""
        self._began = now if large else None

    def left(self, count: int, now: float) -> None:
        """So many bytes of it are to come; all that came before is taken."""
        if not count and self._began is not None:
            self._swift = now - self._began < SWIFT
        self._set(GATHERED if self._swift and count > GATHERED + MARGIN else 1)

    def unknown(self) -> None:
        """What comes next is no data for a ring, or of a record that nobody wants any more."""
        self._set(1)

    def off(self) -> None:
        """Wake us for what is there, until a large record came fast again."""
        self._swift = False
        self._set(1)

    def _set(self, low: int) -> None:
        if low != self._low and self._socket is not None:
            self._low = low
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
