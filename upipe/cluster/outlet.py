"""How a link writes. Over TLS by its transport; over plain TCP past it, from ring memory into the socket without a
copy.

A selector transport copies what the socket does not take at once, which is most of a large chunk when the other end is
the slower one. The outlet keeps the memory itself, on a second descriptor of the connection, and calls back when all is
sent. """

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable


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
