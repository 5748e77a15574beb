"""The submitting process's part in the control of its pipe, as a pure state machine: it asks the coordinator what there
is for it, and finds another coordinator when that is gone.

    poll()            whom to ask, and what to say          wire.Attendance
    answered(news)    what to do                            Follow, Tell
    failed(code)      how long to wait before the next poll, or GiveUp

Any member of the pipe may come to coordinate it, so all that were ever named are asked in turn, and the one that did
last between any two of them. Meanwhile data goes on.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from upipe.cluster.dealings import NodeReport, TellClient
from upipe.cluster.record import ENDED
from upipe.cluster.wire import Attendance, News, Orders

PATIENCE = 2.0
"""Seconds that an answer may take when there is nothing new: as old the books in pipe.stats() may be. Longer asks less
often; what is new is told at once in any case."""
MARGIN, SEARCHING = 5.0, 2.0
"""Seconds beside its patience that an answer may take for each address of a node: of the coordinator, and of one that
may be it and may be cut off as well. Meanwhile nobody else is asked, and the coordinator counts the seconds
(desk.BROKEN)."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds after nobody of a whole round coordinated; doubles."""
LOST = 60.0
"""Seconds without a coordinator until the submitting process gives up. Longer than a takeover takes (some seconds), and
than it may be silent before the cluster takes it for dead (desk.SILENT)."""
FORGOTTEN = "no_such_pipe"
"""Code of a node that knows nothing of the pipe."""


class Poll(msgspec.Struct, frozen=True):
    """Ask that node."""

    node: str
    attendance: Attendance


class Follow(msgspec.Struct, frozen=True):
    """Be as these orders say, then report."""

    orders: Orders


class Tell(msgspec.Struct, frozen=True):
    """That is how the pipe is."""

    told: TellClient


class GiveUp(msgspec.Struct, frozen=True):
    """There is no coordinator any more."""

    reason: str


class Attending:
    """Of one pipe.

    Args:
        client: node id of this process.
        nodes: ids of those that may coordinate, the likeliest first; at least one.
    """

    def __init__(self, client: str, nodes: Iterable[str]) -> None:
        self.client = client
        self.nodes = list(dict.fromkeys(nodes))
        """Whom to ask; the first one is asked until it fails. Every node is in it once."""
        self.heard = 0
        self.fence = (0, 0)
        self.told: TellClient | None = None
        self._failures = 0
        """In a row."""
        self._last = ""
        """Who coordinated last. It is asked between any two others: when it still does, it counts the seconds for which
        it hears nothing (desk.BROKEN), and many others may be cut off, each of which takes seconds to find out."""
        self._strangers: set[str] = set()
        """Nodes that know nothing of the pipe, since one last answered."""
        self._lost_since: float | None = None
        self._why = ""

    @property
    def ended(self) -> bool:
        """Whether the pipe has ended, as it was told."""
        return self.told is not None and self.told.state in ENDED

    def poll(self, report: NodeReport | None, patience: float = PATIENCE) -> Poll:
        """What to ask next. With patience 0 it only delivers the report, beside a poll that waits."""
        wait = 0.0 if self.searching else patience
        return Poll(self.nodes[0], Attendance(self.client, self.fence, self.heard, report, wait))

    @property
    def searching(self) -> bool:
        """The node that is asked next may not be the coordinator: it did not answer as one since another one failed."""
        return self._failures > 0

    @property
    def margin(self) -> float:
        """See MARGIN."""
        return SEARCHING if self.searching else MARGIN

    def answered(self, node: str, news: News) -> list[Follow | Tell]:
        """A node answered, so it coordinates. Late answers of others do no harm: orders have a fence, and what has
        ended stays so."""
        if node == self.nodes[0]:
            self.heard = news.number
        self._failures, self._lost_since, self._last = 0, None, node
        self._strangers.clear()
        self.nodes += [one for one in news.nodes if one not in self.nodes]
        found: list[Follow | Tell] = []
        if self.ended:
            return found
        if news.orders is not None and news.orders.fence > self.fence:
            self.fence = news.orders.fence
            found.append(Follow(news.orders))
        self.told = news.told
        return [*found, Tell(news.told)]

    def failed(self, node: str, code: str, why: str, now: float) -> float | GiveUp:
        """A node did not answer, or does not coordinate. Returns the seconds to wait before the next poll.

        Args:
            code: of its refusal; "" when it did not answer.
            why: for the user, should nobody be found.
        """
        if node != self.nodes[0]:
            return 0.0
        self._why = why
        self._failures += 1
        self._lost_since = now if self._lost_since is None else self._lost_since
        if code == FORGOTTEN:
            self._strangers.add(node)
        if self._strangers >= set(self.nodes) and self._failures > 2 * len(self.nodes):
            return GiveUp("no node knows the pipe any more: it has ended, or every node that kept its record is gone")
        if now - self._lost_since > LOST:
            return GiveUp(f"no node has coordinated the pipe for {LOST:g} s; the last one that was asked: {self._why}")
        self.nodes.append(self.nodes.pop(0))
        turns = len(self.nodes)
        if self._last in self.nodes:
            turns = max(1, 2 * turns - 2)
            if node != self._last:
                self.nodes.remove(self._last)
                self.nodes.insert(0, self._last)
        self.heard = 0
        rounds, rest = divmod(self._failures, turns)
        return 0.0 if rest else min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(rounds - 1, 16))
