"""This node's part of one pipe: its keeper (the process with queues and workers), its ferry (mirrors), and its reports.

Orders come from the coordinator; the newest wins, and one task follows them, in this order (see ARCHITECTURE.md):

    1. what the code needs is fetched and checked       once; then it is seen what there is room for
    2. the orders are put on disk                       so that a restarted agent knows the plan of the keeper it finds
    3. ferry.release(plan)                              mirrors that end; their handles close
    4. keeper.follow(fence, plan)                       queues, workers; answered by news with that fence
    5. ferry.follow(plan, labels)                       mirrors that begin
    6. reports carry that fence

A report is composed of what the keeper said last, then of what the queues say now: a worker that is told as ended or
left has done all that shows in the queues' states. Reports may be lost: the newest is said again until it was heard.

After kill -9 of the agent the keeper, its queues and workers go on; `recover` finds them, and mirrors are opened anew.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from upipe.cluster import wire
from upipe.cluster.dealings import NodeReport
from upipe.cluster.layout import NodePlan
from upipe.cluster.ledger import replace_file
from upipe.cluster.part_means import Fence, FerryHandle, KeeperHandle, Means, Unfit
from upipe.cluster.promises import Promises
from upipe.errors import ClusterError, KeeperFailed, MessageInvalid, NodeRefused, UpipeError
from upipe.runtime.spool import DeadLetter

if TYPE_CHECKING:
    from upipe.cluster.keeping import Job, KeeperNews

AGAIN = 1.0
"""Seconds after which a report that was not heard, or one of queues that go on, is sent again, and after which a failed
step is tried again."""
REMIND = 5.0
"""Seconds after which even a report that was heard is said again: a coordinator may have forgotten it with its life."""
GATHER = 0.005
"""Seconds in which changes gather for one report: shorter ends streams sooner, and sends more."""
FAREWELL = 60.0
"""Seconds for which it is said that nothing is left, to a coordinator that does not answer. Who asks later is told
without a part (parts.py)."""
FORGOTTEN = 30.0
"""Seconds for which a coordinator says that it knows no such pipe, and nobody here keeps its record, until the part
ends by itself."""
READY = 30.0
"""Seconds for which it is tried to get what the pipe's code needs, before this node counts as unfit for it. Longer
outlives longer cuts from those that have it; meanwhile the pipe waits for its workers here."""
TRIES = 3
"""Of starting a keeper, before this node counts as unfit for the pipe, with the reason."""
log = logging.getLogger("upipe.cluster")


class Part:
    """One pipe on this node.

    Args:
        pipe: its id.
        path: file of the orders on disk.
        means: of the agent.
        over: called when nothing of the pipe is left here and its coordinator knows.
    """

    def __init__(self, pipe: str, path: Path, means: Means, over: Callable[[Part], None]) -> None:
        self.pipe = pipe
        self.orders = wire.Orders((0, 0))
        """The newest."""
        self.news: KeeperNews | None = None
        self.followed: Fence = (0, 0)
        """What keeper and ferry have both reached."""
        self.lost = False
        self.failed = ""
        self.unfit = ""
        """Why nothing of the pipe can run here."""
        self.waits = ""
        """Why the newest orders are not followed yet, as it was told."""
        self.promises = Promises(pipe, means)
        self._path = path
        self._means = means
        self._over = over
        self._plans: dict[Fence, NodePlan] = {}
        """Told to the keeper, and not followed yet."""
        self._keeper: KeeperHandle | None = None
        self._ferry: FerryHandle | None = None
        self._job: Job | None = None
        self._gone = True
        """No keeper lives here. Then only it may be reported that nothing is present."""
        self._seeking = False
        """After a restart: the keeper that may live here was not found yet."""
        self._stopped: Fence = (0, 0)
        """Of the stop that was obeyed."""
        self._heard: tuple[Any, ...] = ()
        """What the coordinator knows."""
        self._heard_at = 0.0
        self._unknown_since: float | None = None
        self._successor = ""
        """Who shall hear the reports, when the coordinator of the orders says that it is none any more."""
        self._wake = asyncio.Event()
        self._dirty = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks = [
            self._loop.create_task(self._follow_orders(), name=f"part {pipe}"),
            self._loop.create_task(self._report_changes(), name=f"reports {pipe}"),
        ]

    # ------------------------------------------------------------------ orders

    def order(self, orders: wire.Orders) -> bool:
        """Follow these, unless newer ones are known: then False."""
        if orders.fence < self.orders.fence:
            return False
        if orders.fence > self.orders.fence:
            self.orders, self._successor = orders, ""
            self.promises.spec = orders.spec or self.promises.spec
            self._wake.set()
        self._heard = ()  # who says it again has not heard the report
        self._dirty.set()
        return True

    @property
    def present(self) -> bool:
        """Whether a keeper of the pipe lives here, or is about to."""
        return not self._gone or self.orders.plan is not None

    def recover(self, orders: wire.Orders) -> None:
        """After a restart of the agent: find the keeper again. Nothing is reported before."""
        self.orders, self._seeking = orders, True
        self.promises.recover(orders)
        self._keeper = self._means.keeper(self.pipe, self._on_news, self._on_lost)
        self._wake.set()

    async def _follow_orders(self) -> None:
        done, failures, since = (0, 0), 0, None
        while True:
            await self._wake.wait()
            self._wake.clear()
            orders = self.orders
            if orders.fence == done:
                continue
            try:
                await self._follow(orders)
                done, since, failures = orders.fence, None, 0
                self._wait_for("")
            except Unfit as error:
                self._turn_down(str(error))
                done, since = orders.fence, None
            except MessageInvalid as error:  # a plan that no keeper can be told, however often
                self._fail(f"node {self._means.node}: {error}")
                done = orders.fence
            except (UpipeError, OSError) as error:
                failures += isinstance(error, KeeperFailed)
                if failures >= TRIES:
                    failures, done = 0, orders.fence
                    self._failed_often(error)
                    continue
                if self._gone and self._job is None and not self._seeking:
                    since = since or self._loop.time()
                    if self._loop.time() - since > READY:
                        lacks = f"could not get what the pipe's code needs within {READY:g} s"
                        self._turn_down(f"node {self._means.node} {lacks}: {error}")
                        done, since = orders.fence, None
                        continue
                self._wait_for(str(error))
                await asyncio.sleep(AGAIN)
                self._wake.set()
            except Exception as error:  # a bug: said, or the pipe would hang without a word
                log.exception("pipe %s: orders %s cannot be followed", self.pipe, orders.fence)
                self._fail(f"node {self._means.node} failed inside, which is a bug of uPipe: {error!r}")
                done = orders.fence

    def _failed_often(self, error: Exception) -> None:
        """Where no keeper can be started the pipe runs elsewhere; one that lives and does not answer is given up."""
        if self._keeper is not None:
            self._keeper.kill()  # one that answers nobody must not run beside its successor on another node
        if self._seeking and self._keeper is not None:
            self._seeking = False
            self._on_lost(f"it was killed: {error}")
            return
        self._release()
        self.promises.broken()
        self._job = None
        self._turn_down(f"node {self._means.node} cannot start a keeper for the pipe ({TRIES} tries): {error}")

    async def _find(self) -> None:
        assert self._keeper is not None
        plan = self.orders.plan  # as it was on disk, or newer: then the keeper has missed it
        if await self._keeper.find():
            self._gone = False
        elif plan is not None:
            self._on_lost("it was not found after a restart")
        self._seeking = False

    async def _follow(self, orders: wire.Orders) -> None:
        if self._seeking:
            await self._find()
        if orders.plan is None:
            await self._end(orders)
            return
        if self.lost:
            return  # what the plan speaks of is gone; a stop comes first
        if self._gone and self._job is None:
            self._job, self.unfit = await self._means.prepare(self.pipe, orders), ""
            if self.orders is not orders:
                self._wake.set()  # newer ones came; nothing was begun for these
                return
        plan = await self.promises.admit(orders.fence, orders.plan, lambda: self.orders is orders and not self.lost)
        if self.orders is not orders:
            self._wake.set()
            return
        noted = msgspec.structs.replace(orders, refused=self.promises.refused)
        await self._keep(noted)
        if self.lost:
            return  # since just now
        self._ferry = self._ferry or self._means.ferry(self.pipe, self._dirty.set)
        self._ferry.release(plan)
        if self._gone:
            self._keeper = self._means.keeper(self.pipe, self._on_news, self._on_lost)
            assert self._job is not None
            await self._keeper.start(self._job)
            self._gone, self.news = False, None
        assert self._keeper is not None
        self._plans[orders.fence] = plan
        self._keeper.follow(orders.fence, plan)
        if self.news is not None and self.news.fence == orders.fence:
            self._on_news(self.news)  # a keeper that was found again follows it already, and said so before we listened

    async def _keep(self, orders: wire.Orders) -> None:
        """On disk. Without it nothing is done: the next agent would follow older ones."""
        try:
            await asyncio.to_thread(replace_file, self._path, msgspec.msgpack.encode(orders))
        except OSError as error:
            why = f"its orders cannot be written to {self._path} and wait ({error.strerror}): make room on that disk"
            raise ClusterError(why) from error

    async def _end(self, orders: wire.Orders) -> None:
        await self._keep(orders)
        self._release()
        if not self._gone and self._keeper is not None:
            await self._means.keep_letters(self.pipe, await self._keeper.letters())  # they go with the keeper
        if self._gone or self._keeper is None:  # perhaps since just now
            self._obeyed(orders.fence)
        else:
            self._keeper.follow(orders.fence, None)

    def _release(self) -> None:
        if self._ferry is not None:
            self._ferry.release(None)
            self._ferry.close()
            self._ferry = None
        self._plans.clear()

    def _obeyed(self, fence: Fence) -> None:
        self._gone, self.lost, self.failed, self.unfit, self.waits, self._stopped = True, False, "", "", "", fence
        self._job = self.news = None
        self.promises.broken()
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None
        self._dirty.set()
        self._loop.call_later(FAREWELL, self._leave, fence)

    def _leave(self, fence: Fence) -> None:
        if self._gone and self._stopped == fence == self.orders.fence:
            self._over(self)

    def _wait_for(self, why: str) -> None:
        """Told when it is another thing, not when another number stands in it: a disk may be full for hours."""
        if _but_numbers(why) == _but_numbers(self.waits):
            return
        if why:
            log.warning("pipe %s: %s; it is tried again", self.pipe, why)
        self.waits = why
        self._dirty.set()

    def _turn_down(self, why: str) -> None:
        log.error("pipe %s: %s", self.pipe, why)
        self.unfit, self.waits = why, ""
        self._dirty.set()

    def _fail(self, why: str) -> None:
        self.failed = why
        self._dirty.set()

    # ------------------------------------------------------------------ the keeper

    def _on_news(self, news: KeeperNews) -> None:
        before, self.news = self.news, news
        if before is not None and before.ended != news.ended:
            self._means.promises()
        if not news.present:
            self._keeper_ended()
            return
        fence = (news.fence[0], news.fence[1])
        plan = self._plans.get(fence)
        if plan is not None and self._ferry is not None:
            try:
                self._ferry.follow(plan, news.labels)
            except Exception as error:  # else the connection to the keeper, whose callback this is, would break
                log.exception("pipe %s: the mirrors of plan %s cannot be set up", self.pipe, fence)
                self._fail(f"node {self._means.node} failed inside, which is a bug of uPipe: {error!r}")
                return
            self.followed = fence
            self._plans = {one: kept for one, kept in self._plans.items() if one > fence}
        self._dirty.set()

    def _keeper_ended(self) -> None:
        """It obeyed a stop. The newest orders may be of a later one, which it can hear no more and which says the
        same; or, from somebody who knew nothing of the stop, a plan."""
        if self.orders.plan is None:
            self._obeyed(self.orders.fence)
        else:
            self._on_lost("it obeyed a stop, and newer orders have a plan again")

    def _on_lost(self, why: str) -> None:
        log.error("pipe %s: its keeper on this node is lost: %s", self.pipe, why)
        self._release()
        self._gone, self.news = True, None
        self.promises.broken()
        if self.orders.plan is None:
            self._obeyed(self.orders.fence)
        else:
            self.lost = True
        self._dirty.set()

    # ------------------------------------------------------------------ reports

    def report(self) -> NodeReport | None:
        """Everything this node has to say about the pipe now; None: nothing yet."""
        number, news = self._means.number(), self.news
        waits = f"node {self._means.node} waits: {self.waits}" if self.waits and not self._seeking else ""
        if self._gone:
            if not (self.lost or self.failed or self.unfit or waits or self._stopped > (0, 0)):
                return None
            return NodeReport(
                self._means.node, number, self._stopped, False, self.lost, failed=self.failed, unfit=self.unfit,
                waits=waits,
            )  # fmt: skip
        if news is None or self._ferry is None or self.followed == (0, 0):
            if why := self.failed or (news.failed if news is not None else ""):  # in the middle of its first plan
                return NodeReport(self._means.node, number, self.followed, failed=why)
            return None
        ended, left = tuple(news.ended), tuple(news.left)
        states, mine = dict(self._ferry.states()), self.promises
        why = self.failed or (news.failed and f"on node {self._means.node}: {news.failed}")
        return NodeReport(
            self._means.node, number, self.followed, True, False, ended, left, states, False, why,
            news.up and not mine.refused, news.crews, mine.refused, mine.others if mine.refused else {},
            waits=waits,
        )  # fmt: skip

    async def _report_changes(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN):
                    await self._dirty.wait()
            await asyncio.sleep(GATHER)
            self._dirty.clear()
            try:
                await self._tell()
            except UpipeError as error:  # a queue that is just being made or dropped
                log.debug("pipe %s: no report: %s", self.pipe, error)
            except Exception:  # a bug; without reports the pipe would stand still without a word for ever
                log.exception("pipe %s: no report; it is tried again", self.pipe)

    async def _tell(self) -> None:
        report, coordinator = self.report(), self._successor or self.orders.coordinator
        if report is None or not coordinator:
            return
        news = (coordinator, *msgspec.structs.astuple(msgspec.structs.replace(report, number=0)))
        if news == self._heard and self._loop.time() < self._heard_at + REMIND:
            self._settled(report)
            return
        try:
            await self._means.report(coordinator, self.pipe, report)
        except NodeRefused as error:
            self._refused(error, report)
        except ClusterError:
            pass
        else:
            self._heard, self._heard_at, self._unknown_since = news, self._loop.time(), None
            self._settled(report)

    def _settled(self, report: NodeReport) -> None:
        trouble = report.lost or report.failed or report.unfit
        if not report.present and not trouble and report.fence == self.orders.fence:
            self._over(self)

    def _refused(self, error: NodeRefused, report: NodeReport) -> None:
        """The coordinator knows no such pipe: it has ended and is forgotten. Then nobody else would end it here."""
        if error.status != 404:
            self._unknown_since = None
            self._successor = self._means.successor(self.pipe, self.orders.fence[0])
            return
        if not report.present and not self.lost:
            self._over(self)
            return
        now = self._loop.time()
        self._unknown_since = now if self._unknown_since is None else self._unknown_since
        if now - self._unknown_since > FORGOTTEN and self._means.orphaned(self.pipe):
            epoch, revision = self.orders.fence
            self.order(wire.Orders((epoch, revision + 1), None, coordinator=self.orders.coordinator))

    # ------------------------------------------------------------------ asked by handlers

    @property
    def promised(self) -> dict[str, float]:
        """What its workers here may use."""
        return self.promises.of(self.news.ended if self.news is not None else ())

    @property
    def workers(self) -> int:
        """That run here now, as the keeper said last."""
        return sum(crew.workers for crew in self.news.crews.values()) if self.news is not None else 0

    def mirrors(self) -> list[wire.MirrorInfo]:
        """Its mirrors."""
        return self._ferry.infos() if self._ferry is not None else []

    async def letters(self) -> list[DeadLetter]:
        """Its dead letters here."""
        return await self._keeper.letters() if self._keeper is not None and not self._gone else []

    def forget(self) -> None:
        """Nothing is left here, so nothing stays on disk."""
        self._path.unlink(missing_ok=True)

    async def close(self) -> None:
        """Let go of it; the keeper goes on. Idempotent."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._ferry is not None:
            self._ferry.close()
            self._ferry = None
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None


def _but_numbers(text: str) -> str:
    return re.sub("[0-9]+", "", text)
