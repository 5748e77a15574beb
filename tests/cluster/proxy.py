"""A TCP proxy that loses connections on demand: drops them, stalls them, cuts them after so many bytes."""

from __future__ import annotations

import asyncio
import contextlib


class Proxy:
    """Forwards to (host, port) until told otherwise. `async with Proxy(...) as proxy: proxy.port`."""

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self._tasks: set[asyncio.Task] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.budget: int | None = None
        """Bytes still forwarded, of both directions, before everything is cut; None: no end."""
        self.connections = 0
        self.refuses = False

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self) -> None:
        """Forward nothing, silently, until flow()."""
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refuses:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(*self._to)
            self._writers |= {writer, far_writer}
            for one in (self._forward(reader, far_writer), self._forward(far_reader, writer)):
                task = asyncio.create_task(one)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._flows.wait()
                if self.budget is not None:
                    data = data[: self.budget]
                    self.budget -= len(data)
                writer.write(data)
                await writer.drain()
                if self.budget == 0:
                    self.budget = None
                    self.cut()
                    return
        writer.transport.abort()
