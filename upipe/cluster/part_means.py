"""What a part of a pipe needs of its agent: handles of its keeper and its ferry, and means that all parts share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from upipe.cluster import wire
from upipe.cluster.dealings import NodeReport, QueueState
from upipe.cluster.layout import NodePlan
from upipe.cluster.placement import Seat
from upipe.graph.spec import PipeSpec
from upipe.runtime.spool import DeadLetter

if TYPE_CHECKING:
    from upipe.cluster.keeping import Job, KeeperNews

Fence = tuple[int, int]


class KeeperHandle(Protocol):
    """keepers.Keeper."""

    async def start(self, job: Job) -> None: ...
    async def find(self) -> bool: ...
    def follow(self, fence: Fence, plan: NodePlan | None) -> None: ...
    async def letters(self) -> list[DeadLetter]: ...
    def close(self) -> None: ...
    def kill(self) -> None: ...


class FerryHandle(Protocol):
    """ferry.Ferry."""

    def release(self, plan: NodePlan | None) -> None: ...
    def follow(self, plan: NodePlan, labels: dict[str, str]) -> None: ...
    def states(self) -> Mapping[str, QueueState]: ...
    def infos(self) -> list[wire.MirrorInfo]: ...
    def close(self) -> None: ...


class Means(Protocol):
    """What a part needs of its agent (parts.py)."""

    node: str

    def number(self) -> int:
        """Of the next report; rises over all lives of this node."""

    def keeper(self, pipe: str, news: Callable[[KeeperNews], None], lost: Callable[[str], None]) -> KeeperHandle: ...
    def ferry(self, pipe: str, changed: Callable[[], None]) -> FerryHandle: ...
    async def prepare(self, pipe: str, orders: wire.Orders) -> Job:
        """Fetch and check what the pipe's code needs. Unfit: it cannot run here."""

    def beyond(
        self, pipe: str, spec: PipeSpec, seats: list[Seat], agreed: frozenset[Seat]
    ) -> tuple[tuple[Seat, ...], str, dict[str, float]]:
        """The workers of a pipe that this node has no room for, why, and what is promised to others (offers.py)."""

    def promises(self) -> None:
        """What this part has promised is something else now."""

    def report(self, coordinator: str, pipe: str, report: NodeReport) -> Awaitable[None]:
        """Tell a coordinator. ClusterError: it was not heard."""

    async def keep_letters(self, pipe: str, letters: list[DeadLetter]) -> None:
        """Of a pipe that ends here, for who asks later."""

    def successor(self, pipe: str, epoch: int) -> str:
        """Who coordinates the pipe after that epoch, as far as is known here; "" when nobody is known to."""

    def orphaned(self, pipe: str) -> bool:
        """Whether nobody here keeps the record of the pipe either."""


class Unfit(Exception):
    """The pipe cannot run on this node; the sentence says why."""
