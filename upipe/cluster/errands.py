"""Tasks that nobody waits for: kept, logged when they fail, and ended with their owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

AGAIN = 1.0
"""Seconds until what goes on for ever begins anew after a failure."""
log = logging.getLogger("upipe.cluster")


class Errands:
    """Owns tasks from run() to close().

    Args:
        most: tasks at a time; one more is not run, and counted in `dropped`.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def run(self, work: Coroutine[Any, Any, None], name: str = "") -> asyncio.Task[None] | None:
        """Begin. A failure is logged: an errand never takes the agent down. None: there are too many, or the owner has
        ended, and it is not run."""
        if self._closed or len(self._tasks) >= self._most:
            work.close()
            self.dropped += 1
            return None
        task = asyncio.get_running_loop().create_task(_logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it was never begun
        return task

    def keep(self, make: Callable[[], Coroutine[Any, Any, None]], name: str = "") -> asyncio.Task[None] | None:
        """Begin what goes on as long as its owner does: when it fails that is logged, and it begins anew after AGAIN
        seconds. It has ended when it returns."""
        return self.run(_again_and_again(make, name), name)

    async def close(self) -> None:
        """Cancel all, and wait until they have ended; nothing is begun any more. Idempotent."""
        self._closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _again_and_again(make: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    while True:
        try:
            return await make()
        except Exception:
            log.exception("%s failed, and begins anew", name or "a task")
        await asyncio.sleep(AGAIN)


async def _logged(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("%s failed", name or "a task")
