"""Where the submitting process of a pipe is served: what there is for it, and whether it is still there.

It polls (`attend`). It counts as gone SILENT seconds after its last poll, or BROKEN seconds after a connection on which
a poll waited broke, when no other came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from upipe.cluster.dealings import TellClient
from upipe.cluster.wire import Orders

SILENT = 45.0
"""Seconds: twice the longest patience of a poll, and a bit. Longer bears a longer cut and keeps workers of the dead."""
BROKEN = 15.0
"""Seconds to come back after a broken connection: a process that died closes its connections at once. Longer than a
living one needs to ask another node that is cut off before it comes back (attending.SEARCHING, for each address)."""
SLICE = 0.5
"""Seconds between two looks whether the connection of a waiting poll is still there."""


class Desk:
    """Of one pipe.

    Args:
        client: node id of the submitting process; "" when nobody stays.
        gone: called once, when it is.
    """

    def __init__(self, client: str, gone: Callable[[], None]) -> None:
        self.client = client
        self.orders: Orders | None = None
        self.told: TellClient | None = None
        self._gone = gone
        self._number = 0
        self._epoch = 0
        self._news = asyncio.Event()
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def number(self) -> int:
        """Of what there is now; differs from every other one of any coordinator, since the epoch is in it."""
        return (self._epoch << 32) + self._number

    def put(self, epoch: int, orders: Orders | None = None, told: TellClient | None = None) -> None:
        """There is something new."""
        self.orders = orders or self.orders
        self.told = told or self.told
        self._number, self._epoch = self._number + 1, epoch
        self._news.set()
        self._news = asyncio.Event()

    def expect(self) -> None:
        """It is to poll from now on: this agent coordinates."""
        if self.client and self._timer is None:
            self._arm(SILENT)

    async def wait(self, heard: int, patience: float, broken: Callable[[], bool]) -> bool:
        """Until there is something else than `heard`, for at most `patience` seconds; False: its connection broke."""
        self._waiting += 1
        self._disarm()
        loop = asyncio.get_running_loop()
        until, lost = loop.time() + patience, False
        try:
            while self.number == heard and (left := until - loop.time()) > 0 and not lost:
                try:
                    async with asyncio.timeout(min(left, SLICE)):
                        await self._news.wait()
                except TimeoutError:
                    pass
                lost = broken()
            return not lost
        except asyncio.CancelledError:
            lost = True
            raise
        finally:
            self._waiting -= 1
            if not self._waiting and self.client:
                self._arm(BROKEN if lost else SILENT)

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._over)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self) -> None:
        self._timer = None
        self._gone()

    def close(self) -> None:
        """Expect nobody any more. Idempotent."""
        self._disarm()
        self.client = ""
