"""The connections of a node to others: one Link per peer, which carries the mirrors of all pipes between the two.

A line begins with the first mirror to a peer. Who dials is said with each mirror (MirrorPlan.dialer); a line on which
no mirror dials waits to be dialled. A link that broke is dialled again as long as a mirror needs it, at once and then
with growing pauses. Nothing is lost or repeated by any of it: mirrors go on by position.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from upipe.cluster.link import Link
from upipe.cluster.mirror import Mirror
from upipe.cluster.pulse import Backoff
from upipe.errors import ClusterError

DIAL_SECONDS = 10.0
"""Seconds for one try: connection, TLS and the answer."""
IDLE = 10.0
"""Seconds that a link without mirrors is kept by the end that dialled: plans change several times in a row. The other
end keeps it PATIENT times as long, for a peer that got its plan first."""
PATIENT = 6

log = logging.getLogger("upipe.cluster")

Dial = Callable[[str, Link], Awaitable[None]]


def _ignore(_: str) -> None:
    pass


class Lines:
    """All links of a process, by peer. One per agent (or client), shared by its ferries; lives in its event loop.

    Args:
        node: own id, for what is told.
        dial: connects to that node's agent and gives the connection to the link; raises ClusterError or OSError.
        tell: gets a line for people when a peer cannot be reached, and when it can again.
    """

    def __init__(self, node: str, dial: Dial, tell: Callable[[str], None] = _ignore) -> None:
        self.node = node
        self._dial = dial
        self._tell = tell
        self._lines: dict[str, _Line] = {}
        self._of: dict[Mirror, _Line] = {}
        self._closed = False

    def carry(self, mirror: Mirror, peer: str, dials: bool) -> None:
        """Carry this mirror to `peer` from now on; `dials`: this end opens the connection when there is none."""
        self.drop(mirror)
        line = self._line(peer)
        self._of[mirror] = line
        line.carry(mirror, dials)

    def drop(self, mirror: Mirror) -> None:
        """Carry it no more. Idempotent. The last one of a peer closes the link after IDLE seconds."""
        line = self._of.pop(mirror, None)
        if line is not None:
            line.drop(mirror)

    def accepted(self, peer: str, link: Link) -> None:
        """The peer, proven to be that one, dialled us: its older link is replaced."""
        if self._closed:
            link.close("this node stops")
            return
        self._line(peer).joined(link, False)

    def forget(self, peer: str) -> None:
        """The peer is known to be dead: cut its link now. It is dialled again while mirrors need it."""
        line = self._lines.get(peer)
        if line is not None and line.link is not None:
            line.link.close(f"node {peer} is dead")

    def close(self) -> None:
        """Cut everything and dial no more; mirrors are dropped. Idempotent."""
        self._closed = True
        for mirror in list(self._of):
            self.drop(mirror)
        for line in list(self._lines.values()):
            line.close()
        self._lines.clear()

    def _line(self, peer: str) -> _Line:
        line = self._lines.get(peer)
        if line is None:
            line = self._lines[peer] = _Line(peer, self._dial, self._tell, self._over)
        return line

    def _over(self, line: _Line) -> None:
        if self._lines.get(line.peer) is line:
            del self._lines[line.peer]


class _Line:
    """The link to one peer, whoever dials it."""

    def __init__(self, peer: str, dial: Dial, tell: Callable[[str], None], over: Callable[[_Line], None]) -> None:
        self.peer = peer
        self.link: Link | None = None
        self._dial = dial
        self._tell = tell
        self._over = over
        self._mirrors: dict[Mirror, bool] = {}
        """With whether this end dials for it."""
        self._backoff = Backoff(random.random)
        self._dialling: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._dialled = False
        self._trouble = ""
        self._closed = False

    def carry(self, mirror: Mirror, dials: bool) -> None:
        self._mirrors[mirror] = dials
        self._rest()
        if self.link is not None and not self.link.closed.done():
            self.link.add(mirror)
        else:
            self._need(0.0)

    def drop(self, mirror: Mirror) -> None:
        if self._mirrors.pop(mirror, None) is None:
            return
        if self.link is not None:
            self.link.remove(mirror)
        self._rest()

    def joined(self, link: Link, dialled: bool) -> None:
        """This connection is the line's from now on."""
        old, self.link, self._dialled = self.link, link, dialled
        if old is not None:
            old.close("replaced by a newer connection")
        link.closed.add_done_callback(lambda _: self._ended(link))
        if link.closed.done():
            return  # _ended() follows
        if not dialled and self._dialling is not None:
            self._dialling.cancel()
        if self._trouble:
            self._tell(f"node {self.peer} is connected again")
            self._trouble = ""
        for mirror in list(self._mirrors):
            link.add(mirror)
        self._rest()

    def close(self) -> None:
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        if self._dialling is not None:
            self._dialling.cancel()
        if self.link is not None:
            self.link.close()

    def _ended(self, link: Link) -> None:
        if link.heard:
            self._backoff.succeeded()
        if self.link is not link:
            return
        self.link = None
        why = "cancelled" if link.closed.cancelled() else link.closed.result()
        log.info("the link to node %s ended: %s", self.peer, why)
        if self._mirrors:
            self._need(self._backoff.failed())
        else:
            self._rest()

    def _need(self, pause: float) -> None:
        """Dial, unless that is under way, or the peer does."""
        if self._dialling is None and not self._closed and any(self._mirrors.values()):
            self._dialling = asyncio.create_task(self._try(pause), name=f"dial {self.peer}")
            self._dialling.add_done_callback(self._tried)

    async def _try(self, pause: float) -> None:
        while any(self._mirrors.values()):
            await asyncio.sleep(pause)
            link = Link()
            try:
                async with asyncio.timeout(DIAL_SECONDS):
                    await self._dial(self.peer, link)
            except (ClusterError, OSError) as error:
                self._failed(error)
            except Exception as error:
                log.exception("dialling node %s failed", self.peer)
                self._failed(error)
            else:
                self.joined(link, True)
                return
            pause = self._backoff.failed()

    def _failed(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        if text != self._trouble:
            self._tell(f"node {self.peer} cannot be connected, and is tried again: {text}")
        self._trouble = text

    def _tried(self, task: asyncio.Task[None]) -> None:
        self._dialling = None
        if self.link is None and not self._closed:
            self._need(self._backoff.failed())

    def _rest(self) -> None:
        """Without mirrors the link, and then the line, goes after a while."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._mirrors or self._closed:
            return
        pause = IDLE if self._dialled or self.link is None else IDLE * PATIENT
        self._idle = asyncio.get_running_loop().call_later(pause, self._idled)

    def _idled(self) -> None:
        self.close()
        self._over(self)
