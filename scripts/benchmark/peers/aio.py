"""asyncio streams over a unix socket, with asyncio's own loop or uvloop; length-prefixed frames."""

from __future__ import annotations

import asyncio
import os
import struct
import tempfile
from collections.abc import Callable, Coroutine
from typing import Any

from benchmark import roles
from benchmark.model import Work
from benchmark.peers.base import Transport
from benchmark.tally import Source, Tally, as_array

WORD = struct.Struct("<Q")
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Streams(Transport):
    """Option uvloop."""

    def open(self, work: Work, channels: int) -> None:
        self.path = os.path.join(tempfile.mkdtemp(prefix="bench-aio-"), "socket")
        self.ready = roles.CONTEXT.Event()

    def _run(self, main: Coroutine[Any, Any, Any]) -> Any:
        if self.options.get("uvloop"):
            import uvloop

            return uvloop.run(main)
        return asyncio.run(main)

    async def _listening(self, then: Callable[[Ends], Coroutine[Any, Any, Any]]) -> Any:
        found: asyncio.Future[Ends] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_unix_server(lambda *ends: found.set_result(ends), self.path)
        self.ready.set()
        result = await then(await found)
        server.close()
        return result

    async def _connected(self, then: Callable[[Ends], Coroutine[Any, Any, Any]]) -> Any:
        self.ready.wait(20)
        return await then(await asyncio.open_unix_connection(self.path))

    # ------------------------------------------------------------------ roles

    def produce(self, work: Work, gate: roles.Gate, channel: int = 0) -> dict[str, float]:
        async def send(ends: Ends) -> None:
            writer = ends[1]
            with gate:
                if work.frames:
                    await _send_frames(writer, Source(work.size, work.shape), work.n + work.warm)
                else:
                    await _send_values(writer, work.n + work.warm)
                await _gone(writer)

        self._run(self._listening(send))
        return {}

    def consume(self, work: Work, gate: roles.Gate, channel: int = 0) -> dict[str, float]:
        tally = Tally(work.n, work.warm)

        async def receive(ends: Ends) -> None:
            reader = ends[0]
            with gate:
                if work.frames:
                    await tally.awaited_frames(_frame(reader), Source(work.size, work.shape), work.touch)
                else:
                    await tally.awaited(_value(reader))

        self._run(self._connected(receive))
        return {"rate": tally.rate, "arrived": tally.arrived, "bad": tally.bad}

    def ping(self, work: Work, gate: roles.Gate) -> dict[str, Any]:
        async def trips(ends: Ends) -> dict[str, Any]:
            reader, writer = ends

            async def put(value: int) -> None:
                writer.write(WORD.pack(value))

            with gate:
                return await roles.aping(put, _value(reader), work)

        result: dict[str, Any] = self._run(self._listening(trips))
        return result

    def echo(self, work: Work, gate: roles.Gate) -> dict[str, Any]:
        async def trips(ends: Ends) -> None:
            reader, writer = ends
            with gate:
                for _ in range(work.n + work.warm):
                    writer.write(await reader.readexactly(8))
                await _gone(writer)

        self._run(self._connected(trips))
        return {}


async def _gone(writer: asyncio.StreamWriter) -> None:
    """Wait until the loop has sent everything: the gate is about to stop it."""
    while writer.transport.get_write_buffer_size():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def _send_values(writer: asyncio.StreamWriter, n: int) -> None:
    write, drain = writer.write, writer.drain
    for value in map(WORD.pack, range(n)):
        write(value)
        await drain()


async def _send_frames(writer: asyncio.StreamWriter, source: Source, n: int) -> None:
    for number in range(n):
        frame = source.stamp(number)
        writer.write(WORD.pack(frame.nbytes))
        writer.write(frame.tobytes())  # the transport may keep it
        await writer.drain()


def _value(reader: asyncio.StreamReader) -> Callable[[], Coroutine[Any, Any, int]]:
    read, unpack = reader.readexactly, WORD.unpack

    async def get() -> int:
        value: int = unpack(await read(8))[0]
        return value

    return get


def _frame(reader: asyncio.StreamReader) -> Callable[[], Coroutine[Any, Any, Any]]:
    read = reader.readexactly

    async def get() -> Any:
        return as_array(await read(WORD.unpack(await read(8))[0]))

    return get
