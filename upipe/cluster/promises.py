"""What this node has promised to one pipe. The node owns the truth: it refuses what it has not (offers.py says what).

A worker is admitted or refused with the plan that names it first; what runs here stays. Coordinators learn the sums by
gossip, of a moment ago (NodeInfo.promised), and refused workers from the report.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from upipe.cluster import wire
from upipe.cluster.layout import NodePlan
from upipe.cluster.offers import needs
from upipe.cluster.part_means import Fence, Means
from upipe.cluster.placement import Seat
from upipe.graph.spec import PipeSpec

ROOM = 5.0
"""Seconds for which workers that this node has no room for wait for some, before they are refused: a pipe that has
ended for its coordinator may have its workers here a little longer. The rest of the plan waits with them."""
LOOK = 0.1
"""Seconds between two looks for room."""
log = logging.getLogger("upipe.cluster")


class Promises:
    """To one pipe.

    Args:
        pipe: its id.
        means: of the agent.
    """

    def __init__(self, pipe: str, means: Means) -> None:
        self.spec: PipeSpec | None = None
        """Of the pipe, as soon as orders brought one."""
        self.agreed: frozenset[Seat] = frozenset()
        """Workers that have been promised their room here: of the plan that is followed, or about to be."""
        self.refused: tuple[Seat, ...] = ()
        """The others of that plan."""
        self.others: dict[str, float] = {}
        """What was promised to other pipes then."""
        self._pipe = pipe
        self._means = means
        self._admitted: Fence = (0, 0)
        """Of the plan that `agreed` is of."""

    async def admit(self, fence: Fence, plan: NodePlan, wanted: Callable[[], bool]) -> NodePlan:
        """The plan with the workers that there is room for; the others have waited for ROOM seconds.

        Args:
            fence: of the plan.
            plan: what the coordinator orders.
            wanted: whether it is still worth waiting; as soon as not, nothing is promised by this plan.
        """
        loop = asyncio.get_running_loop()
        seats, until = _seats(plan), loop.time() + ROOM
        while self._admitted != fence and wanted():
            assert self.spec is not None
            refused, why, others = self._means.beyond(self._pipe, self.spec, seats, self.agreed)
            if refused and loop.time() < until:
                await asyncio.sleep(LOOK)
                continue
            if refused:
                log.warning("pipe %s: there is no room here for %d of its workers: %s", self._pipe, len(refused), why)
            self._admitted, self.refused, self.others = fence, refused, others
            self._agree(seats)
        workers = tuple(one for one in plan.workers if (one.processor, one.index) not in self.refused)
        return plan if workers == plan.workers else replace(plan, workers=workers)

    def recover(self, orders: wire.Orders) -> None:
        """As an earlier life of this agent noted it."""
        self.spec = orders.spec
        self._admitted, self.refused = orders.fence, orders.refused
        self._agree(_seats(orders.plan))

    def broken(self) -> None:
        """Nothing runs here."""
        self._admitted, self.refused = (0, 0), ()
        self._agree([])

    def of(self, ended: Iterable[Seat]) -> dict[str, float]:
        """What its workers here may use, but those that have ended."""
        return needs(self.spec, self.agreed - set(ended)) if self.spec is not None else {}

    def _agree(self, seats: list[Seat]) -> None:
        self.agreed = frozenset(seats) - set(self.refused)
        self._means.promises()


def _seats(plan: NodePlan | None) -> list[Seat]:
    return [(one.processor, one.index) for one in plan.workers] if plan is not None else []
