"""Tasks that nobody waits for: kept, logged when they fail, and ended with their owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("upipe.cluster")


class Errands:
    """Owns tasks from run() to close().

    Args:
        most: tasks at a time; one more is not run, and counted in `dropped`.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._tasks: set[asyncio.Task[None]] = set()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def run(self, work: Coroutine[Any, Any, None], name: str = "") -> asyncio.Task[None] | None:
        """Begin. A failure is logged: an errand never takes the agent down."""
        if len(self._tasks) >= self._most:
            work.close()
            self.dropped += 1
            return None
        task = asyncio.get_running_loop().create_task(_logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it was never begun
        return task

    async def close(self) -> None:
        """Cancel all, and wait until they have ended. Idempotent."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _logged(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("%s failed", name or "a task")
