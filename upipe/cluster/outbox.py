"""What is on its way to other agents: losable, the newest first to stay, never more than a few per agent and pipe.

Who sends says it again while it matters (scheduler.RESEND), so nothing is kept for an agent that does not answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from upipe.cluster.errands import Errands
from upipe.errors import ClusterError

MOST = 8
"""Messages that wait for one agent and pipe; the oldest is lost for one more."""

Deliver = Callable[[str, str, Any], Awaitable[Any]]
"""(node, pipe, message): sends it; ClusterError when it did not arrive."""


class Outbox:
    """One kind of message.

    Args:
        deliver: sends one.
        most: that wait for one agent and pipe.
    """

    def __init__(self, deliver: Deliver, most: int = MOST) -> None:
        self._deliver = deliver
        self._most = most
        self._waiting: dict[tuple[str, str], deque[Any]] = {}
        self._errands = Errands()

    def send(self, node: str, pipe: str, message: Any) -> None:
        """Begin to send; messages to one agent about one pipe arrive in order, or not at all."""
        key = (node, pipe)
        if key in self._waiting:
            self._waiting[key].append(message)
            return
        self._waiting[key] = deque([message], self._most)
        if self._errands.run(self._work(key), f"say to {node}") is None:
            del self._waiting[key]

    async def _work(self, key: tuple[str, str]) -> None:
        waiting = self._waiting[key]
        try:
            while waiting:
                try:
                    await self._deliver(*key, waiting.popleft())
                except ClusterError:
                    waiting.clear()
        finally:
            del self._waiting[key]

    async def close(self) -> None:
        """Send no more. Idempotent."""
        await self._errands.close()
