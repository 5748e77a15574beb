"""One connection that carries mirrors: framing, fair turns, a pulse. TCP or TLS, dialled or accepted: both ends are the
same.

What comes for a sink is received straight into its ring (BufferedProtocol); what a source sends is handed over as ring
memory. A mirror that has something to send waits in a queue for its turn; a turn is one chunk, so that a small one is
never far behind a large one. While there is much left to write nobody gets a turn: so what is copied and kept is
bounded (over TLS by a few slices, over plain TCP nothing is copied, see outlet.py).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import Protocol, cast

from upipe.cluster.inlet import Gathering, Takes
from upipe.cluster.outlet import Outlet, PlainOutlet, TlsOutlet
from upipe.cluster.pulse import Beat, Pulse
from upipe.cluster.records import (
    DATA,
    HEADER_BYTES,
    Header,
    Hello,
    Ping,
    Pong,
    Record,
    decode_body,
    decode_header,
    encode,
)
from upipe.errors import MirrorRefused, UpipeError

CHUNK = 1 << 20
"""Bytes of ring that one turn sends. Larger ones cost fewer calls, and let the others wait longer."""
TURNS = 4
"""Turns before the event loop gets to read again."""
SCRATCH = 1 << 16
"""Bytes of buffer for records and for data of which little is expected."""
LARGE = 1 << 17
"""Bytes of a data record after which a large one is expected again: then only its header is read into the buffer."""
MOST_HELLOS = 4096
"""Mirrors whose Hello is remembered per link, for an end that comes later; beyond it the oldest that nobody here is of
is forgotten."""

_numbers = itertools.count(1)


class Endpoint(Protocol):
    """One end of a mirror (mirror.py), as its link sees it. Nothing here may block or raise."""

    @property
    def key(self) -> int:
        """records.mirror_key of its id."""

    def connected(self, link: Link) -> None:
        """The link carries this mirror from now on."""

    def disconnected(self, link: Link) -> None:
        """It does not any more."""

    def heard(self, link: Link, record: Record) -> None:
        """The other end said this."""

    def turn(self, link: Link) -> bool:
        """Send one chunk. False when there is nothing to send now; Link.wants() asks for turns again."""

    def incoming(self, link: Link, position: int, length: int) -> int:
        """Data comes. How many of its first bytes are not wanted; the others land."""

    def landing(self, most: int) -> memoryview:
        """Where the next bytes land: at most so many. Empty: there is no room, and data is not wanted any more."""

    def landed(self, count: int) -> None:
        """So many bytes were written to landing()."""


class Link(asyncio.BufferedProtocol):
    """One connection after its upgrade: the protocol for Client.upgrade() on the dialling side and Call.switch() on the
    accepting one, whose handler awaits `over()` and returns."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Ends with the reason when the connection did."""
        self.heard = 0
        """Bytes that came."""
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._endpoints: dict[int, Endpoint] = {}
        self._hellos: dict[int, Hello] = {}
        self._ready: deque[Endpoint] = deque()
        """Who wants a turn; each at most once."""
        self._outlet: Outlet | None = None
        self._tls: Takes | None = None
        """What it reads from beside the transport."""
        self._gathering: Gathering | None = None
        self._lost = False
        self._paused = self._pumping = False
        self._pulse = Pulse(self._loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._why = ""
        self._scratch = memoryview(bytearray(SCRATCH))
        self._filled = 0
        self._offered = SCRATCH
        self._direct = False
        self._asked = 0
        """Bytes of room that the transport was given."""
        self._sink: Endpoint | None = None
        self._unwanted = self._left = 0
        """Of the data record under way: bytes to skip first, and bytes that are to land after them."""

    # ------------------------------------------------------------ mirrors

    def add(self, endpoint: Endpoint) -> None:
        """Carry this mirror. What the other end said of it before is heard now."""
        self._endpoints[endpoint.key] = endpoint
        endpoint.connected(self)
        hello = self._hellos.get(endpoint.key)
        if hello is not None and not self.closed.done():
            endpoint.heard(self, hello)

    def remove(self, endpoint: Endpoint) -> None:
        """Carry it no more. Idempotent."""
        if self._endpoints.get(endpoint.key) is not endpoint:
            return
        del self._endpoints[endpoint.key]
        if endpoint in self._ready:
            self._ready.remove(endpoint)
        if self._sink is endpoint:
            self._sink, self._unwanted, self._left = None, self._unwanted + self._left, 0
        endpoint.disconnected(self)

    def say(self, record: Record) -> None:
        """Send a record, before any further turn."""
        self.write(encode(record))

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes; the memory must stay as it is until the other end has answered for it."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._outlet is None and not self._transport.get_write_buffer_size():
            self._outlet = PlainOutlet(self._transport, self.resume_writing, self._write_failed)
        if self._outlet is None:
            self._transport.write(data)
        elif not self._outlet.write(data):
            self._paused = True

    def wants(self, endpoint: Endpoint) -> None:
        """The endpoint has something to send."""
        if endpoint not in self._ready:
            self._ready.append(endpoint)
        if not self._pumping and not self._paused:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        for _ in range(TURNS):
            if self._paused or not self._ready or self.closed.done():
                return
            endpoint = self._ready.popleft()
            more = endpoint.turn(self)
            if more and self._endpoints.get(endpoint.key) is endpoint and endpoint not in self._ready:
                self._ready.append(endpoint)
        if self._ready and not self._paused and not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    # ------------------------------------------------------------ the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._gathering = Gathering(transport)
        tls = transport.get_extra_info("ssl_object")
        if isinstance(tls, Takes):  # later: first comes what was read together with the 101
            self._loop.call_soon(setattr, self, "_tls", tls)
        if tls is None:  # the outlet begins when nothing of the 101 waits in the transport: order is kept
            self._transport.set_write_buffer_limits(high=1)
        else:
            self._outlet = TlsOutlet(self._transport)
        self._beat()

    def connection_lost(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        if not self.closed.done():
            self.closed.set_result(
                self._why or (f"{type(error).__name__}: {error}" if error else "the other end closed it")
            )
        if self._timer is not None:
            self._timer.cancel()
        if self._outlet is not None:
            self._outlet.close()
        for endpoint in list(self._endpoints.values()):
            self.remove(endpoint)

    async def over(self) -> str:
        """Wait for the end of the connection; returns the reason. Who is cancelled while it waits does the link no
        harm."""
        return await asyncio.shield(self.closed)

    def close(self, why: str = "closed by this end") -> None:
        """End the connection now; what was not sent yet is sent again on the next one. Idempotent."""
        self._why = self._why or why
        if self._outlet is not None:
            self._outlet.close()
        if self._transport is not None:
            self._transport.abort()

    def _write_failed(self, error: OSError) -> None:
        self.close(f"{type(error).__name__}: {error}")

    def pause_writing(self) -> None:
        self._paused = True
        if isinstance(self._outlet, TlsOutlet):
            self._outlet.pause()

    def resume_writing(self) -> None:
        self._paused = isinstance(self._outlet, TlsOutlet) and not self._outlet.resume()
        if not self._paused:
            self._pump()

    def eof_received(self) -> bool:
        return False

    def _beat(self) -> None:
        now = self._loop.time()
        beat = self._pulse.beat(now)
        if beat is Beat.CUT:
            self.close("the other end gave no sign of life for 4.5 s")
            return
        if beat is Beat.ASK:
            if self._gathering is not None:
                self._gathering.off()  # what came of a record is a sign of life
            self.say(Ping(int(now * 1000)))
        self._timer = self._loop.call_at(max(self._pulse.due, now + 0.01), self._beat)

    # ------------------------------------------------------------ receiving

    def get_buffer(self, sizehint: int) -> memoryview:
        room = self._place()
        self._asked = len(room)
        return room

    def _place(self) -> memoryview:
        """Where the next bytes go."""
        self._direct = False
        if self._sink is not None and not self._unwanted and not self._filled:
            landing = self._sink.landing(self._left)
            if landing:
                self._direct = True
                return landing
            self._sink, self._unwanted, self._left = None, self._left, 0
        if self._gathering is not None:
            self._gathering.unknown()
        return self._scratch[self._filled : max(self._offered, self._filled + HEADER_BYTES)]

    def buffer_updated(self, count: int) -> None:
        self._pulse.heard(self._loop.time())
        self._took(count)
        if self._tls is not None and count == self._asked:
            self._take_rest(self._tls)

    def _take_rest(self, tls: Takes) -> None:
        """What came with it over TLS."""
        while not self._why:
            room = self._place()
            count = tls.take(room)
            if not count:
                return
            self._took(count)

    def _took(self, count: int) -> None:
        self.heard += count
        try:
            if self._direct:
                self._landed(count)
                return
            self._filled += count
            used = self._parse()
        except UpipeError as error:
            self.close(str(error))
            return
        rest = self._filled - used
        if used and rest:
            self._scratch[:rest] = bytes(self._scratch[used : self._filled])
        self._filled = rest

    def _landed(self, count: int) -> None:
        self._left -= count
        if self._gathering is not None:
            self._gathering.left(self._left, self._loop.time())
        sink = self._sink
        if not self._left:
            self._sink = None
        assert sink is not None
        sink.landed(count)

    def _parse(self) -> int:
        at = 0
        while True:
            if self._unwanted:
                step = min(self._unwanted, self._filled - at)
                self._unwanted -= step
                at += step
            if self._sink is not None and at < self._filled and not self._unwanted:
                at += self._copy(at)
                continue
            if self._unwanted or self._filled - at < HEADER_BYTES:
                break
            header = decode_header(self._scratch, at)
            if header.kind == DATA:
                at += HEADER_BYTES
                self._data(header)
                continue
            end = at + HEADER_BYTES + header.length
            self._offered = SCRATCH
            if end > self._filled:
                break
            record = decode_body(header, bytes(self._scratch[at + HEADER_BYTES : end]))
            at = end
            self._dispatch(record)
        return at

    def _copy(self, at: int) -> int:
        """The first bytes of data came with its header."""
        assert self._sink is not None
        landing = self._sink.landing(min(self._left, self._filled - at))
        step = len(landing)
        if not step:
            self._sink, self._unwanted, self._left = None, self._left, 0
            return 0
        landing[:] = self._scratch[at : at + step]
        self._landed(step)
        return step

    def _data(self, header: Header) -> None:
        self._offered = HEADER_BYTES if header.length >= LARGE else SCRATCH
        endpoint = self._endpoints.get(header.mirror)
        self._unwanted = header.length
        if endpoint is not None:
            self._unwanted = endpoint.incoming(self, header.position, header.length)
        self._left = header.length - self._unwanted
        if self._gathering is not None:
            self._gathering.begins(header.length >= LARGE, self._loop.time())
        self._sink = endpoint if self._left else None

    def _dispatch(self, record: Record) -> None:
        if isinstance(record, Ping):
            self.say(Pong(record.position))
            return
        if isinstance(record, Pong):
            return
        if isinstance(record, Hello):
            self._remember(record)
        endpoint = self._endpoints.get(record.mirror)
        if endpoint is not None:
            endpoint.heard(self, record)

    def _remember(self, hello: Hello) -> None:
        known = self._hellos
        known.pop(hello.mirror, None)  # the newest stand last
        if len(known) >= MOST_HELLOS:
            oldest = next((key for key in known if key not in self._endpoints), None)
            if oldest is None:
                text = f"the other end names more than {MOST_HELLOS} mirrors on one connection"
                raise MirrorRefused("too-many", text)
            del known[oldest]
        known[hello.mirror] = hello
