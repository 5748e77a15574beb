"""Messages to an agent are in order, bounded, and lost rather than kept."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.cluster.agent_support import until
from upipe.cluster.outbox import Outbox
from upipe.errors import NodeUnreachable


async def test_in_order_bounded_and_lost_when_nobody_answers():
    said: list[Any] = []
    gate = asyncio.Event()
    fails = False

    async def deliver(node: str, pipe: str, message: int) -> None:
        await gate.wait()
        if fails:
            raise NodeUnreachable("nobody")
        said.append((node, pipe, message))

    box = Outbox(deliver, most=2)
    for number in range(5):
        box.send("n", "p", number)
    box.send("n", "other", 9)
    await asyncio.sleep(0)
    gate.set()
    await until(lambda: not box._waiting)
    # the first was on its way when the others came; of these the newest two
    assert [one[2] for one in said if one[1] == "p"] in ([3, 4], [0, 3, 4])
    assert ("n", "other", 9) in said
    said.clear()
    fails = True
    box.send("n", "p", 1)
    box.send("n", "p", 2)
    await until(lambda: not box._waiting)
    assert said == []
    await box.close()
