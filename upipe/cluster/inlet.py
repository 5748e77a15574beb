"""How a link reads over TLS: all that one read of the socket brought, with one call.

OpenSSL decrypts a record of 16 KiB per call, and event loops make several Python calls around each, and take a turn per
buffer, in which they copy together what comes meanwhile. So half of a sink's time in Python goes by itself.
"""

from __future__ import annotations

import ssl
from typing import Any

RECORD = 1 << 14
"""Most bytes of a TLS record."""


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
