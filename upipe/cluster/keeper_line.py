"""One connection between an agent and a keeper, at either end."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from upipe.cluster import keeping
from upipe.errors import MessageInvalid

SOCKET = "keeper.sock"
_CREDENTIALS = struct.Struct("3i")


def peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as the kernel says."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


def short_path(directory_fd: int) -> str:
    """The socket in a directory that may have a longer path than the 107 bytes a socket's name has room for."""
    return f"/proc/self/fd/{directory_fd}/{SOCKET}"


def socket_path(directory: Path) -> Path:
    """Where the socket of a keeper is."""
    return directory / SOCKET


class Line(asyncio.Protocol):
    """Says the newest, and hears. While the other end does not read, only the newest message is kept: each is the whole
    truth.

    Args:
        reader: of what is heard.
        on_open: called with the line when it stands.
        on_message: called with each message.
        on_gone: called once at the end, with what was wrong ("" when the other end closed).
    """

    def __init__(
        self,
        reader: keeping.Reader,
        on_open: Callable[[Line], None],
        on_message: Callable[[Line, Any], None],
        on_gone: Callable[[Line, str], None],
    ) -> None:
        self._reader = reader
        self._on_open = on_open
        self._on_message = on_message
        self._on_gone = on_gone
        self._transport: asyncio.Transport | None = None
        self._full = False
        self._kept: bytes | None = None
        self._wrong = ""
        self.pid = self.uid = 0

    def say(self, data: bytes) -> None:
        """Send an encoded message, or keep it as the newest."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._full:
            self._kept = data
        else:
            self._transport.write(data)

    def close(self, wrong: str = "") -> None:
        """End it, once all is sent. Idempotent."""
        self._wrong = self._wrong or wrong
        kept, self._kept = self._kept, None
        if self._transport is not None and not self._transport.is_closing():
            if kept is not None:
                self._transport.write(kept)
            self._transport.close()

    # ------------------------------------------------------------------ as asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        self.pid, self.uid = peer(sock)
        self._on_open(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._on_message(self, message)
        except MessageInvalid as error:
            self.close(str(error))

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        kept, self._kept = self._kept, None
        if kept is not None:
            self.say(kept)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._full = False
        self._on_gone(self, self._wrong or (str(error) if error else ""))
