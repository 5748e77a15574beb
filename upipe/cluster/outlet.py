"""How a link writes ring memory: over TLS slice by slice through its transport; over plain TCP past it, into the socket
without a copy.

A selector transport copies what the socket does not take at once, which is most of a large chunk when the other end is
the slower one. The plain outlet keeps the memory itself, on a second descriptor of the connection, and calls back when
all is sent. A TLS transport encrypts at once whatever it is given, into memory of its own; so the TLS outlet keeps the
ring memory too, and gives a slice when the last ones are on their way.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

SLICE = 1 << 17
"""Bytes that a TLS transport encrypts at a time: more do not stay in a core's own cache, fewer cost more calls."""
KEPT = 1 << 22
"""Bytes: a process that writes over TLS uses freed blocks of up to so many again, and keeps about twice as many."""


class Outlet(Protocol):
    """What a link writes with."""

    def write(self, data: bytes | memoryview) -> bool:
        """Send, or keep what cannot be sent now. False: something is kept."""

    def close(self) -> None:
        """Forget what is not sent. Idempotent."""


def keep_blocks() -> None:
    """glibc takes blocks of 128 KiB and more from the kernel one by one, zeroed page by page: as dear as a copy.
    Freeing a larger one raises that bound (mallopt(3), M_MMAP_THRESHOLD). It is never touched, so it costs nothing."""
    bytes(KEPT)


class TlsOutlet:
    """Writes to a TLS transport, slice by slice; what it is given in between comes in order, too.

    Args:
        transport: which calls the link's pause_writing() and resume_writing(), and the link pause() and resume().
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        keep_blocks()
        transport.set_write_buffer_limits(high=2 * SLICE, low=SLICE)  # encrypts a slice while the last is on its way
        self._transport = transport
        self._queue: deque[memoryview] = deque()
        self._paused = False

    def write(self, data: bytes | memoryview) -> bool:
        """Send, or keep what cannot be sent now. False: something is kept."""
        if not self._queue and not self._paused and len(data) <= SLICE:
            self._transport.write(data)
            return not self._paused
        self._queue.append(memoryview(data))
        return self._go_on()

    def pause(self) -> None:
        """The transport has enough."""
        self._paused = True

    def resume(self) -> bool:
        """The transport takes more. False: something is kept still."""
        self._paused = False
        return self._go_on()

    def _go_on(self) -> bool:
        queue = self._queue
        while queue and not self._paused:
            data = queue.popleft()
            if len(data) > SLICE + SLICE // 2:
                queue.appendleft(data[SLICE:])
                data = data[:SLICE]
            self._transport.write(data)  # may call pause()
        return not queue and not self._paused

    def close(self) -> None:
        """Forget what is not sent. Idempotent."""
        self._queue.clear()


class PlainOutlet:
    """Writes to the connection of a plain TCP transport, which writes nothing itself from then on.

    Owner of its descriptor: the link, which closes it with the connection.

    Args:
        drained: called when everything is sent, after write() has returned False.
        broken: called when the connection broke while writing.
    """

    def __init__(
        self, transport: asyncio.Transport, drained: Callable[[], None], broken: Callable[[OSError], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        theirs: socket.socket = transport.get_extra_info("socket")
        self._socket = socket.socket(theirs.family, socket.SOCK_STREAM, 0, socket.dup(theirs.fileno()))
        self._socket.setblocking(False)
        self._queue: deque[memoryview] = deque()
        self._drained = drained
        self._broken = broken

    def write(self, data: bytes | memoryview) -> bool:
        """Send, or keep what cannot be sent now. False: something is kept."""
        if not self._queue:
            data = memoryview(data)[self._send(data) :]
            if not data:
                return True
            self._loop.add_writer(self._socket.fileno(), self._go_on)
        self._queue.append(memoryview(data))
        return False

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._loop.call_soon(self._broken, error)
            return 0

    def _go_on(self) -> None:
        while self._queue:
            data = self._queue[0]
            sent = self._send(data)
            if sent < len(data):
                self._queue[0] = data[sent:]
                return
            self._queue.popleft()
        self._loop.remove_writer(self._socket.fileno())
        self._drained()

    def close(self) -> None:
        """Forget what is not sent. Idempotent."""
        self._queue.clear()
        if self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
