"""All parts of pipes on this node, and what they need of the agent.

    DATA_DIR/parts/<pipe>        the orders that are followed; found again after a restart
    DATA_DIR/pipes/<pipe>/       the keeper's (keepers.py)
    DATA_DIR/letters/<pipe>      dead letters of pipes that have ended here (last_letters.py)
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from upipe.cluster import wire
from upipe.cluster.dealings import NodeReport
from upipe.cluster.errands import Errands
from upipe.cluster.fitting import differences, misfit
from upipe.cluster.last_letters import LastLetters
from upipe.cluster.messages import MAX_PROMISED
from upipe.cluster.offers import beyond
from upipe.cluster.part import Part
from upipe.cluster.part_means import FerryHandle, KeeperHandle, Unfit
from upipe.cluster.peers import Peers
from upipe.cluster.placement import Seat
from upipe.cluster.routes import CODE, REPORT
from upipe.cluster.server import refuse
from upipe.cluster.store import NoRoom, Store
from upipe.errors import ArchiveRefused, ClusterError, NodeUnreachable
from upipe.graph.spec import PipeSpec
from upipe.runtime.spool import DeadLetter

if TYPE_CHECKING:
    from upipe.cluster.keeping import Job, KeeperNews

TELL = 0.1
"""Seconds in which changes of promises gather: shorter lets others know sooner, and is more news for all."""
KEEP = 20
"""Directories of keepers that have ended which are kept."""
log = logging.getLogger("upipe.cluster")
MakeKeeper = Callable[[Path, "Callable[[KeeperNews], None]", Callable[[str], None]], KeeperHandle]
MakeFerry = Callable[[str, Callable[[], None]], FerryHandle]


class Parts:
    """The parts of one agent; the means of each.

    Args:
        node: this node.
        life: of its agent.
        directory: its data directory.
        store: contents.
        peers: the other agents.
        reported: takes a report when this agent is the coordinator.
        known: whether this agent keeps a record of a pipe.
        successor: who coordinates a pipe after an epoch, as far as that record tells, or "".
        others: nodes in use, for fetching contents.
        has: the resources of this node.
        promised: told by pipe what is promised, whenever that changes.
        make_keeper, make_ferry: keepers.Keeper, and ferry.Ferry of (pipe, changed).
    """

    def __init__(
        self, node: str, life: int, directory: Path, store: Store, peers: Peers,
        reported: Callable[[str, NodeReport], None], known: Callable[[str], bool],
        successor: Callable[[str, int], str], others: Callable[[], Iterable[str]],
        has: Callable[[], dict[str, float]], promised: Callable[[dict[str, dict[str, float]]], None],
        make_keeper: MakeKeeper, make_ferry: MakeFerry,
    ) -> None:  # fmt: skip
        self.node = node
        self.all: dict[str, Part] = {}
        self._numbers = itertools.count(life << 32)
        self._directory = directory
        self._store = store
        self._peers = peers
        self._reported = reported
        self._known = known
        self._successor = successor
        self._others = others
        self._has = has
        self._promised = promised
        self._promises: dict[str, dict[str, float]] = {}
        """As told last."""
        self._telling: asyncio.TimerHandle | None = None
        self._make_keeper = make_keeper
        self._make_ferry = make_ferry
        self._errands = Errands()
        self._leaving: set[Part] = set()
        """Over, and not closed yet."""
        self._last = LastLetters(directory / "letters")
        for name in ("parts", "pipes"):
            (directory / name).mkdir(mode=0o700, exist_ok=True)
        for path in (directory / "parts").glob(".*.new"):
            path.unlink()

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Find what an earlier life of this agent left running."""
        for path in sorted((self._directory / "parts").iterdir()):
            try:
                orders = msgspec.msgpack.decode(path.read_bytes(), type=wire.Orders)
            except (OSError, msgspec.MsgspecError) as error:
                log.error("the orders %s cannot be read (%s): what runs of that pipe ends when its coordinator says so",
                          path, error)  # fmt: skip
                continue
            part = self._new(path.name)
            self._store.pin(path.name, orders.shipment.contents)
            part.recover(orders)

    async def close(self) -> None:
        """Let go of all; keepers go on. Idempotent."""
        if self._telling is not None:
            self._telling.cancel()
        await self._errands.close()
        for part in [*self.all.values(), *self._leaving]:
            await part.close()
        self.all.clear()
        self._leaving.clear()

    def _new(self, pipe: str) -> Part:
        part = self.all[pipe] = Part(pipe, self._directory / "parts" / pipe, self, self._over)
        return part

    def _over(self, part: Part) -> None:
        if self.all.get(part.pipe) is part:
            del self.all[part.pipe]
            self._store.pin(part.pipe, ())
            self._tidy()
            part.forget()  # at once: a new part of the same pipe may write there next
            self._leaving.add(part)
            self._errands.run(self._let_go(part), f"forget part {part.pipe}")

    async def _let_go(self, part: Part) -> None:
        await part.close()
        self._leaving.discard(part)

    def _tidy(self) -> None:
        """Output and dead letters of the last pipes stay, so that one can look; older ones go."""
        gone = [path for path in (self._directory / "pipes").iterdir() if path.name not in self.all]
        for path in sorted(gone, key=lambda one: one.lstat().st_mtime, reverse=True)[KEEP:]:
            shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------------ orders

    def order(self, pipe: str, orders: wire.Orders) -> None:
        """A coordinator says what to be.

        Raises:
            NodeRefused: 409, newer orders are known: another one coordinates that pipe now.
        """
        part = self.all.get(pipe)
        if part is None and orders.plan is None:
            self._errands.run(self._nothing_here(pipe, orders), f"nothing of {pipe}")
            return
        part = part or self._new(pipe)
        self._store.pin(pipe, orders.shipment.contents)
        if not part.order(orders):
            newer = part.orders
            raise refuse(409, "stale", f"Pipe {pipe} has newer orders here, {newer.fence} of {newer.coordinator}.")

    async def _nothing_here(self, pipe: str, orders: wire.Orders) -> None:
        report = NodeReport(self.node, self.number(), orders.fence, present=False)
        try:
            await self.report(orders.coordinator, pipe, report)
        except ClusterError:
            pass  # it asks again

    # ------------------------------------------------------------------ means of a part

    def number(self) -> int:
        """See part_means.Means."""
        return next(self._numbers)

    def keeper(self, pipe: str, news: Callable[[KeeperNews], None], lost: Callable[[str], None]) -> KeeperHandle:
        """See part_means.Means."""
        return self._make_keeper(self._directory / "pipes" / pipe, news, lost)

    def ferry(self, pipe: str, changed: Callable[[], None]) -> FerryHandle:
        """See part_means.Means."""
        return self._make_ferry(pipe, changed)

    async def keep_letters(self, pipe: str, letters: list[DeadLetter]) -> None:
        """See part_means.Means."""
        try:
            await asyncio.to_thread(self._last.keep, pipe, letters)
        except OSError as error:
            log.error("the dead letters of pipe %s cannot be kept: %s", pipe, error)

    async def letters(self, pipe: str) -> bytes:
        """The dead letters of a pipe here, or as they were when it ended here: msgpack list of DeadLetter."""
        part = self.all.get(pipe)
        found = await part.letters() if part is not None else []
        return msgspec.msgpack.encode(found) if found else await asyncio.to_thread(self._last.of, pipe)

    def output(self, pipe: str) -> Path:
        """The file into which the workers of a pipe print here, or printed when it ended; it may not be there."""
        return self._directory / "pipes" / pipe / "output"

    def beyond(
        self, pipe: str, spec: PipeSpec, seats: list[Seat], agreed: frozenset[Seat]
    ) -> tuple[tuple[Seat, ...], str, dict[str, float]]:
        """See part_means.Means."""
        others: dict[str, float] = {}
        for part in self.all.values():
            for name, amount in part.promised.items() if part.pipe != pipe else ():
                others[name] = others.get(name, 0.0) + amount
        return *beyond(self._has(), others, spec, seats, agreed), others

    def promises(self) -> None:
        """See part_means.Means. Told a little later: much changes at a time."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL, self._tell_promises)

    def _tell_promises(self) -> None:
        self._telling = None
        now = {pipe: part.promised for pipe, part in sorted(self.all.items()) if part.promised}
        if now != self._promises:
            self._promises = now
            self._promised(dict(list(now.items())[:MAX_PROMISED]))

    def orphaned(self, pipe: str) -> bool:
        """See part_means.Means."""
        return not self._known(pipe)

    def successor(self, pipe: str, epoch: int) -> str:
        """See part_means.Means."""
        return self._successor(pipe, epoch)

    def report(self, coordinator: str, pipe: str, report: NodeReport) -> Awaitable[None]:
        """See part_means.Means."""
        return self._report(coordinator, pipe, report)

    async def _report(self, coordinator: str, pipe: str, report: NodeReport) -> None:
        if coordinator == self.node:
            self._reported(pipe, report)
        else:
            await self._peers.call(coordinator, REPORT, wire.Told(report), pipe=pipe)

    async def prepare(self, pipe: str, orders: wire.Orders) -> Job:
        """See part_means.Means."""
        from upipe.cluster.keeping import Job

        shipment = orders.shipment
        assert orders.spec is not None
        if why := misfit(shipment, self.node):
            raise Unfit(why)
        if told := differences(shipment):
            log.warning("pipe %s: other versions here: %s", pipe, ", ".join(told))
        for content in self._store.missing(shipment.contents):
            await self._fetch(content, orders.coordinator)
        try:
            paths = [str(await asyncio.to_thread(self._store.unpack, one)) for one in shipment.modules]
        except ArchiveRefused as error:
            raise Unfit(f"node {self.node} cannot unpack the modules of the pipe: {error}") from None
        except NoRoom as error:
            raise ClusterError(error.sentence) from None
        places = ({name: str(self._store.path(one)) for name, one in kind.items()}
                  for kind in (shipment.code, shipment.scripts))  # fmt: skip
        code, scripts = places
        return Job(pipe, orders.spec, code, scripts, tuple(paths))

    async def _fetch(self, content: str, first: str) -> None:
        """From the coordinator, else from any other node; hashes are checked, so it does not matter who gives it."""
        asked = [node for node in dict.fromkeys((first, *self._others())) if node not in ("", self.node)]
        failure: ClusterError = NodeUnreachable("no other node is known")
        for node in asked:
            try:
                await self._store.put(content, self._peers.content(node, CODE, sha256=content))
                return
            except NoRoom as error:  # nor for what the others would send
                raise ClusterError(error.sentence) from None
            except ClusterError as error:
                failure = error
        told = f"the content {content} is not here, and none of {len(asked)} other nodes gave it"
        raise NodeUnreachable(f"{told}; the last one: {failure}")
