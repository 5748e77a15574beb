"""The shell of the schedulers: one pure Scheduler for each pipe that this agent is a member of, its record on disk.

    handlers, membership, timers ──events──▶ Scheduler ──commands──▶ Save, Send, Arrange, TellClient, in that order

Around it: known_pipes.py (what there is, and what is told of it), pipe_commands.py (does the commands) and
pipe_requests.py (what users ask).

Commands of a pipe are done one after the other by one task, so that nothing is said before what it rests on is on disk.
A disk that refuses is tried again, and the pipe waits. What other pipes take of a node is known from the records that
lie here, and from what each node tells of its promises (NodeInfo.promised); both are of a moment ago, and the node
itself refuses what it has not (part.py).

After a start a pipe sleeps until every node of its record has been met, or GRACE has passed: a coordinator that
believed its first look at an empty cluster would move every worker away from nodes that are well.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from upipe.cluster import backlog, wire
from upipe.cluster.ballot import MEMBER
from upipe.cluster.dealings import (
    Ask,
    Command,
    Event,
    Heard,
    Message,
    NodeDown,
    NodeReport,
    NodeUp,
    Replicate,
    Reported,
    Save,
    TellClient,
    Tick,
)
from upipe.cluster.desk import Desk
from upipe.cluster.errands import Errands
from upipe.cluster.known_pipes import Entry, KnownPipes
from upipe.cluster.ledger import MOST_ENDED, Ledger
from upipe.cluster.messages import NodeInfo
from upipe.cluster.offers import node_of, promised, queue_bytes
from upipe.cluster.peers import Peers
from upipe.cluster.pipe_commands import SAY_SECONDS, PipeCommands
from upipe.cluster.record import ENDED, Record
from upipe.cluster.room import Node
from upipe.cluster.routes import PIPE
from upipe.cluster.scheduler import GRACE, Scheduler
from upipe.cluster.server import refuse
from upipe.errors import ClusterError, NodeRefused

FORGET = 10.0
"""Seconds that a coordinator keeps an ended pipe for members that do not answer."""
ASK_ENDED, ASK_GOING = 2.0, 30.0
"""Seconds between two questions of a member to the coordinator whether a pipe, ended or going, is history."""
MOST_PIPES = 4096
log = logging.getLogger("upipe.cluster")


class Pipes:
    """All pipes of one agent.

    Args:
        me: node id of this agent.
        ledger: records on disk.
        peers: the other agents.
        live: nodes in use, this one among them, by id.
        suspects: those of them that do not answer just now.
        arrange: follows orders for this node.
        tell: told sentences for the user.
    """

    def __init__(
        self, me: str, ledger: Ledger, peers: Peers, live: Callable[[], dict[str, NodeInfo]],
        suspects: Callable[[], frozenset[str]], arrange: Callable[[str, wire.Orders], None],
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> None:  # fmt: skip
        self.me = me
        self._ledger = ledger
        self._peers = peers
        self._live = live
        self._suspects = suspects
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._errands = Errands()
        self._commands = PipeCommands(me, ledger, peers, arrange, tell)
        self.known = KnownPipes(me)
        self.entries, self.history = self.known.entries, self.known.history

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Go on with what is on disk."""
        going, ended = self._ledger.load()
        self.history.update(list(ended.items())[-MOST_ENDED:])
        for saved in going.values():
            self._enter(Scheduler(self.me, saved.record, saved.promised, saved.promised_to), patient=True)
        self._errands.keep(self._ask_around, "asking for ended pipes")

    async def close(self) -> None:
        """End; records stay. Idempotent."""
        for entry in self.entries.values():
            entry.close()
        await self._errands.close()
        await self._commands.close()

    def _enter(self, scheduler: Scheduler, patient: bool) -> Entry:
        record = scheduler.record
        entry = Entry(scheduler, Desk(record.layout.client, lambda: self._client_gone(record.id)))
        wanted = {record.coordinator, *(record.layout.nodes() if patient else ()), *(record.members if patient else ())}
        entry.awaited = wanted - {record.layout.client, self.me} - self._live().keys()
        self.entries[record.id] = entry
        if entry.awaited:
            entry.timer = self._loop.call_later(GRACE, self._wake, entry)
        else:
            self._wake(entry)
        return entry

    def begin(self, scheduler: Scheduler, commands: Iterable[Command]) -> None:
        """A pipe that was submitted here, with what its scheduler commands at once."""
        record = scheduler.record
        desk = Desk(record.layout.client, lambda: self._client_gone(record.id))
        entry = self.entries[record.id] = Entry(scheduler, desk)
        self._queue(entry, commands)

    def _wake(self, entry: Entry) -> None:
        entry.awaited = set()
        for node in self.nodes(entry.record):
            self.follow(entry, NodeUp(node))

    # ------------------------------------------------------------------ events

    def follow(self, entry: Entry, event: Event) -> None:
        """Something happened to a pipe; nothing to one that is not awake."""
        if entry.awaited or self.entries.get(entry.record.id) is not entry:
            return
        self._queue(entry, entry.scheduler.handle(event, self._loop.time()))
        held = entry.scheduler.held_up(self._loop.time())
        if bool(held) != bool(entry.held):
            self._tell(f"pipe {entry.record.id}: {held or 'it goes on'}")
        entry.held = held

    def _queue(self, entry: Entry, commands: Iterable[Command]) -> None:
        entry.todo.extend(commands)
        if len(entry.todo) > backlog.MOST:  # the disk has been full for a while
            entry.todo = deque(backlog.shortened(entry.todo))
        if entry.todo and not entry.working:
            entry.working = True
            self._errands.run(self._work(entry), f"pipe {entry.record.id}")
        if entry.scheduler.coordinates:
            entry.desk.expect()
        self._rearm(entry)

    def _rearm(self, entry: Entry) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
        due = entry.scheduler.deadline()
        if entry.record.state in ENDED and entry.scheduler.coordinates:
            soon = self._loop.time() + 1.0
            due = soon if due is None else min(due, soon)
        entry.timer = None if due is None else self._loop.call_at(due, self._tick, entry)
        if not entry.working:
            self._close_when_over(entry)

    def _tick(self, entry: Entry) -> None:
        self.follow(entry, Tick())

    def met(self, info: NodeInfo) -> None:
        """A node is up, or has changed."""
        for entry in list(self.entries.values()):
            if entry.awaited:
                entry.awaited.discard(info.node_id)
                if not entry.awaited:
                    self._wake(entry)
            else:
                self._offer(entry, info)

    def _offer(self, entry: Entry, info: NodeInfo) -> None:
        node = self._node(info, entry.record)
        if entry.scheduler.up.get(node.id) != node:
            self.follow(entry, NodeUp(node))

    def lost(self, node: str) -> None:
        """A node is dead, or has left."""
        for entry in list(self.entries.values()):
            if node in entry.awaited:
                entry.awaited.discard(node)
                if not entry.awaited:
                    self._wake(entry)
            else:
                self.follow(entry, NodeDown(node))

    def _client_gone(self, pipe: str) -> None:
        entry = self.entries.get(pipe)
        if entry is not None and entry.scheduler.coordinates and entry.record.state not in ENDED:
            self._tell(f"pipe {pipe}: the process that submitted it is gone")
            self.follow(entry, NodeDown(entry.record.layout.client))

    # ------------------------------------------------------------------ what nodes offer

    def _node(self, info: NodeInfo, record: Record | None) -> Node:
        records = [one.record for one in self.entries.values()]
        has = queue_bytes(record, info.node_id) if record is not None else 0
        return node_of(info, promised(info, records, record.id if record is not None else ""), has)

    def nodes(self, record: Record | None) -> list[Node]:
        """What every node in use offers to a pipe; None: to a new one, and not those that do not answer just now."""
        hidden = self._suspects() if record is None else frozenset()
        return [self._node(info, record) for one, info in self._live().items() if one not in hidden]

    def _offer_again(self) -> None:
        """A pipe has ended: what waits for room may find some."""
        for entry in list(self.entries.values()):
            if entry.scheduler.coordinates and entry.scheduler.waiting and not entry.awaited:
                for info in self._live().values():
                    self._offer(entry, info)

    # ------------------------------------------------------------------ commands

    async def _work(self, entry: Entry) -> None:
        try:
            while entry.todo:
                await self._commands.do(entry, entry.todo.popleft())
        finally:
            entry.working = False
        self._close_when_over(entry)

    # ------------------------------------------------------------------ forgetting

    def _close_when_over(self, entry: Entry) -> None:
        """Into history once nothing is left anywhere, and every member that answers has the last record."""
        scheduler, now = entry.scheduler, self._loop.time()
        if entry.awaited or not scheduler.finished or entry.working or entry.record.id not in self.entries:
            return
        entry.over_since = now if entry.over_since is None else entry.over_since
        heard = scheduler.coordinates and not scheduler.ballot.pending and not scheduler.ballot.resend()
        if heard or entry.over_since + FORGET <= now:
            self._into_history(entry)

    def _into_history(self, entry: Entry, told: TellClient | None = None) -> None:
        """told: how it ended, by who knows; the record here may be older."""
        record, ballot = entry.record, entry.scheduler.ballot
        if told is not None and record.state not in ENDED:
            ending = {"state": told.state, "reasons": told.reasons, "books": told.books, "crews": told.crews}
            record = msgspec.structs.replace(record, **ending)
        self.entries.pop(record.id, None)
        entry.close()
        self.history[record.id] = Save(record, ballot.promised, ballot.promised_to)
        while len(self.history) > MOST_ENDED:
            del self.history[next(iter(self.history))]
        try:
            self._ledger.end(record.id)
        except OSError as error:
            log.error("the record of pipe %s cannot be put away: %s", record.id, error)
        self._offer_again()

    async def _ask_around(self) -> None:
        """Coordinators forget by themselves, members when their coordinator has."""
        while True:
            await asyncio.sleep(ASK_ENDED)
            now = self._loop.time()
            for entry in list(self.entries.values()):
                pause = ASK_ENDED if entry.record.state in ENDED else ASK_GOING
                if entry.scheduler.ballot.role == MEMBER and not entry.awaited and entry.asked + pause <= now:
                    entry.asked = now
                    await self._ask(entry)

    async def _ask(self, entry: Entry) -> None:
        record = entry.record
        if record.coordinator == self.me or record.coordinator not in self._live():
            return
        told: TellClient | None = None
        try:
            info = await self._peers.call(record.coordinator, PIPE, seconds=SAY_SECONDS, pipe=record.id)
            told = info.told if info.closed else None
        except NodeRefused as error:
            if error.status == 404:  # it has forgotten even the history
                told = TellClient("stopped", ("its coordinator has forgotten it",))
        except ClusterError:
            pass
        if told and entry.scheduler.ballot.role == MEMBER and entry.record.coordinator == record.coordinator:
            self._into_history(entry, told)

    # ------------------------------------------------------------------ what agents say

    def heard(self, pipe: str, message: Message) -> None:
        """Another agent says something about a pipe's record.

        Raises:
            NodeRefused: it is about another pipe, or there are too many.
        """
        record = getattr(message, "record", None)
        if record is not None and record.id != pipe:
            raise refuse(400, "other_pipe", f"The record is of pipe {record.id}, not {pipe}.")
        entry = self.entries.get(pipe)
        if entry is None:
            if not isinstance(message, Ask | Replicate):
                return
            entry = self._begin(pipe, message.record)
        self.follow(entry, Heard(message))

    def _begin(self, pipe: str, record: Record) -> Entry:
        if len(self.entries) >= MOST_PIPES:
            raise refuse(503, "too_many_pipes", f"This node keeps {MOST_PIPES} pipes, and that is the most.")
        saved = self.history.pop(pipe, None)
        if saved is not None:  # somebody has not heard of its end: the scheduler knows what to say
            return self._enter(Scheduler(self.me, saved.record, saved.promised, saved.promised_to), patient=False)
        return self._enter(Scheduler(self.me, record), patient=False)

    def ordered(self, pipe: str, orders: wire.Orders) -> None:
        """A coordinator orders this node, which may have no part of the pipe that would know newer orders.

        Raises:
            NodeRefused: 409, the record here is of a later epoch.
        """
        if (successor := self.known.successor(pipe, orders.fence[0])) not in ("", orders.coordinator):
            raise refuse(409, "stale", f"Pipe {pipe} is coordinated by {successor} now, in a later epoch.")

    def reported(self, pipe: str, report: NodeReport) -> None:
        """A node says how a pipe is there.

        Raises:
            NodeRefused: 404 nobody knows it here; 409 another agent coordinates it; 503 not just now.
        """
        entry = self.entries.get(pipe)
        if entry is None and pipe in self.history:
            if report.present or report.lost or report.failed:  # it has not obeyed a stop
                self._end_there(pipe, report.node)
            return
        entry = self.known.entry(pipe)
        if entry.awaited:
            raise refuse(503, "not_yet", "This node has just started, and waits for the others.")
        self.known.coordinated(entry)
        self.follow(entry, Reported(report))

    def _end_there(self, pipe: str, node: str) -> None:
        self._commands.order(node, pipe, wire.Orders(self.history[pipe].record.fence, None, coordinator=self.me))
