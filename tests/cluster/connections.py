"""Connections of the running event loop that are not closed yet.

Those of TLS close some turns of the loop after close(): one that the loop left open when it ended would warn as
garbage, in whatever test runs then, where warnings are errors.
"""

from __future__ import annotations

import asyncio
from typing import Any

LONGEST = 60.0


def connections() -> set[Any]:
    """Transports whose sockets are open; of uvloop, which does not tell, none."""
    known: Any = getattr(asyncio.get_running_loop(), "_transports", {})
    return {transport for transport in known.values() if transport._sock is not None}


async def all_closed(before: set[Any]) -> None:
    """Until there are none but those of before."""
    async with asyncio.timeout(LONGEST):
        while connections() - before:  # noqa: ASYNC110 (the end of a transport is no event)
            await asyncio.sleep(0.005)
