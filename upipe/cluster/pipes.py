"""The shell of the schedulers: one pure Scheduler for each pipe that this agent is a member of, its record on disk.

    handlers, membership, timers ──events──▶ Scheduler ──commands──▶ Save, Send, Arrange, TellClient, in that order

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
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from upipe.cluster import wire
from upipe.cluster.address import Address
from upipe.cluster.ballot import MEMBER
from upipe.cluster.dealings import (
    Arrange,
    Ask,
    Command,
    DrainPipe,
    Event,
    Heard,
    Message,
    NodeDown,
    NodeReport,
    NodeUp,
    Replicate,
    Reported,
    Save,
    Send,
    StopPipe,
    TellClient,
    Tick,
)
from upipe.cluster.desk import Desk
from upipe.cluster.errands import Errands
from upipe.cluster.layout import cluster_problems
from upipe.cluster.ledger import MOST_ENDED, Ledger
from upipe.cluster.messages import NodeInfo
from upipe.cluster.offers import node_of, promised, queue_bytes
from upipe.cluster.outbox import Outbox
from upipe.cluster.peers import Peers
from upipe.cluster.placement import Unplaceable
from upipe.cluster.record import ENDED, Record
from upipe.cluster.room import Node
from upipe.cluster.routes import DEAL, DRAIN, ORDERS, PIPE, STOP
from upipe.cluster.scheduler import Scheduler
from upipe.cluster.server import refuse
from upipe.errors import ClusterError, NodeRefused
from upipe.graph.validate import problems

GRACE = 5.0
"""Seconds after a start that a pipe waits for its nodes. As long as the death of a node takes to be known."""
SAVE_AGAIN = 1.0
FORGET = 10.0
"""Seconds that a coordinator keeps an ended pipe for members that do not answer."""
ASK_ENDED, ASK_GOING = 2.0, 30.0
"""Seconds between two questions of a member to the coordinator whether a pipe, ended or going, is history."""
SAY_SECONDS = 5.0
"""For one message to another agent."""
MOST_PIPES = 4096
log = logging.getLogger("upipe.cluster")


@dataclass
class Entry:
    """One pipe here."""

    scheduler: Scheduler
    desk: Desk
    awaited: set[str] = field(default_factory=set)
    """Nodes that have to be met before it wakes. Empty: it is awake."""
    todo: deque[Command] = field(default_factory=deque)
    working: bool = False
    timer: asyncio.TimerHandle | None = None
    said: tuple[str, str] = ("", "")
    held: str = ""
    """Why nothing can change here, as the user was told."""
    over_since: float | None = None
    asked: float = 0.0
    """When its coordinator was last asked whether it is history."""
    stop_timer: asyncio.TimerHandle | None = None

    @property
    def record(self) -> Record:
        """The newest here."""
        return self.scheduler.record

    def close(self) -> None:
        """Timers end. Idempotent."""
        self.desk.close()
        for timer in (self.timer, self.stop_timer):
            if timer is not None:
                timer.cancel()


class Pipes:
    """All pipes of one agent.

    Args:
        me: node id of this agent.
        ledger: records on disk.
        peers: the other agents.
        live: nodes in use, this one among them, by id.
        suspects: those of them that do not answer just now.
        arrange: follows orders for this node.
        addresses: where a node is.
        tell: told sentences for the user.
    """

    def __init__(
        self, me: str, ledger: Ledger, peers: Peers, live: Callable[[], dict[str, NodeInfo]],
        suspects: Callable[[], frozenset[str]], arrange: Callable[[str, wire.Orders], None],
        addresses: Callable[[str], tuple[Address, ...]], tell: Callable[[str], None] = lambda sentence: None,
    ) -> None:  # fmt: skip
        self.me = me
        self._ledger = ledger
        self._peers = peers
        self._live = live
        self._suspects = suspects
        self._arrange_here = arrange
        self._addresses = addresses
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._errands = Errands()
        self._deals = Outbox(self._deal)
        self._orders = Outbox(self._order, most=1)
        self.entries: dict[str, Entry] = {}
        self.history: dict[str, Save] = {}
        """Ended pipes of which nothing is left, the oldest first; at most MOST_ENDED."""

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Go on with what is on disk."""
        going, ended = self._ledger.load()
        self.history = dict(list(ended.items())[-MOST_ENDED:])
        for saved in going.values():
            self._enter(Scheduler(self.me, saved.record, saved.promised, saved.promised_to), patient=True)
        self._errands.keep(self._ask_around, "asking for ended pipes")

    async def close(self) -> None:
        """End; records stay. Idempotent."""
        for entry in self.entries.values():
            entry.close()
        await self._errands.close()
        await self._deals.close()
        await self._orders.close()

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

    def _wake(self, entry: Entry) -> None:
        entry.awaited = set()
        for node in self.nodes(entry.record):
            self._follow(entry, NodeUp(node))

    # ------------------------------------------------------------------ events

    def _follow(self, entry: Entry, event: Event) -> None:
        if entry.awaited or self.entries.get(entry.record.id) is not entry:
            return
        self._queue(entry, entry.scheduler.handle(event, self._loop.time()))
        held = entry.scheduler.held_up(self._loop.time())
        if bool(held) != bool(entry.held):
            self._tell(f"pipe {entry.record.id}: {held or 'it goes on'}")
        entry.held = held

    def _queue(self, entry: Entry, commands: Iterable[Command]) -> None:
        entry.todo.extend(commands)
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
        self._follow(entry, Tick())

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
            self._follow(entry, NodeUp(node))

    def lost(self, node: str) -> None:
        """A node is dead, or has left."""
        for entry in list(self.entries.values()):
            if node in entry.awaited:
                entry.awaited.discard(node)
                if not entry.awaited:
                    self._wake(entry)
            else:
                self._follow(entry, NodeDown(node))

    def _client_gone(self, pipe: str) -> None:
        entry = self.entries.get(pipe)
        if entry is not None and entry.scheduler.coordinates and entry.record.state not in ENDED:
            self._tell(f"pipe {pipe}: the process that submitted it is gone")
            self._follow(entry, NodeDown(entry.record.layout.client))

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
                await self._do(entry, entry.todo.popleft())
        finally:
            entry.working = False
        self._close_when_over(entry)

    async def _do(self, entry: Entry, command: Command) -> None:
        record = entry.record
        if isinstance(command, Save):
            await self._save(command)
        elif isinstance(command, Send):
            self._deals.send(command.node, record.id, command.message)
        elif isinstance(command, TellClient):
            entry.desk.put(record.epoch, told=command)
            self._say(entry, command)
        else:
            self._arrange(entry, command)

    def _say(self, entry: Entry, told: TellClient) -> None:
        """Each state once, and what waits for room."""
        short = (told.state, told.waiting)
        if short != entry.said:
            entry.said = short
            more = "".join(f"; {one}" for one in (*told.reasons, told.waiting) if one)
            self._tell(f"pipe {entry.record.id} is {told.state}{more}")

    def _arrange(self, entry: Entry, command: Arrange) -> None:
        record = entry.record
        orders = wire.Orders(command.fence, command.plan, record.spec, record.shipment, self.me)
        if command.node == record.layout.client:
            entry.desk.put(record.epoch, orders=orders)
        elif command.node == self.me:
            with suppress(NodeRefused):  # newer orders are known: we shall hear that another one coordinates
                self._arrange_here(record.id, orders)
        else:
            self._orders.send(command.node, record.id, orders)

    async def _save(self, saved: Save) -> None:
        failed = False
        while True:
            try:
                await asyncio.to_thread(self._ledger.save, saved)
                return
            except OSError as error:
                if not failed:
                    log.error("the record of pipe %s cannot be written, and it waits: %s", saved.record.id, error)
                failed = True
            await asyncio.sleep(SAVE_AGAIN)

    async def _deal(self, node: str, pipe: str, message: Message) -> None:
        await self._peers.call(node, DEAL, wire.Deal(message), seconds=SAY_SECONDS, pipe=pipe)

    async def _order(self, node: str, pipe: str, orders: wire.Orders) -> None:
        await self._peers.call(node, ORDERS, orders, seconds=SAY_SECONDS, pipe=pipe)

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
        self._follow(entry, Heard(message))

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
        if (successor := self.successor(pipe, orders.fence[0])) not in ("", orders.coordinator):
            raise refuse(409, "stale", f"Pipe {pipe} is coordinated by {successor} now, in a later epoch.")

    def successor(self, pipe: str, epoch: int) -> str:
        """Who coordinates a pipe after `epoch`, as far as the record here tells; "" when it knows of no later one."""
        entry = self.entries.get(pipe)
        record = entry.record if entry is not None else self.history[pipe].record if pipe in self.history else None
        return record.coordinator if record is not None and record.epoch > epoch else ""

    def reported(self, pipe: str, report: NodeReport) -> None:
        """A node says how a pipe is there.

        Raises:
            NodeRefused: 404 nobody knows it here; 409 another agent coordinates it; 503 not just now.
        """
        entry = self.entries.get(pipe)
        if entry is None and pipe in self.history:
            if report.present:
                self._end_there(pipe, report.node)
            return
        entry = self._entry(pipe)
        if entry.awaited:
            raise refuse(503, "not_yet", "This node has just started, and waits for the others.")
        self._coordinated(entry)
        self._follow(entry, Reported(report))

    def _end_there(self, pipe: str, node: str) -> None:
        orders = wire.Orders(self.history[pipe].record.fence, None, coordinator=self.me)
        if node == self.me:
            with suppress(NodeRefused):
                self._arrange_here(pipe, orders)
        else:
            self._orders.send(node, pipe, orders)

    # ------------------------------------------------------------------ what users say

    def _entry(self, pipe: str) -> Entry:
        entry = self.entries.get(pipe)
        if entry is None:
            raise refuse(404, "no_such_pipe", f"This node knows no pipe {pipe}.")
        return entry

    def _coordinated(self, entry: Entry) -> None:
        if not entry.scheduler.coordinates:
            other = entry.record.coordinator
            where = f"node {other} does, as far as this node knows" if other != self.me else "it is about to"
            why = f" Here {entry.held}." if entry.held else ""
            text = f"This node does not coordinate pipe {entry.record.id}; {where}.{why}"
            raise refuse(409, "not_coordinator", text)

    async def submit(self, request: wire.PipeRequest) -> wire.PipeInfo:
        """Run a pipe, coordinated here; asked again, say how it is.

        Raises:
            NodeRefused: 400 it is no pipe, 409 it finds no room on any node or its id is taken, 503 this node drains.
        """
        if request.id in self.entries or request.id in self.history:
            known = self.entries[request.id].record if request.id in self.entries else self.history[request.id].record
            if known.spec != request.spec:
                raise refuse(409, "id_taken", f"Another pipe runs or ran as {request.id}: choose another id.")
            return self.info(request.id)
        if wrong := problems(request.spec) or cluster_problems(request.spec):
            raise refuse(400, "no_pipe", "; ".join(wrong)[:4000])
        if self._live()[self.me].draining:
            raise refuse(503, "draining", "This node is about to leave: ask another one.")
        found = Scheduler.submit(
            self.me, request.id, request.spec, self.nodes(None), request.client, self._loop.time(), request.shipment
        )
        if isinstance(found, Unplaceable):
            raise refuse(409, "no_room", found.told()[:4000])
        scheduler, commands = found
        entry = Entry(scheduler, Desk(request.client, lambda: self._client_gone(request.id)))
        self.entries[request.id] = entry
        self._queue(entry, commands)
        return self.info(request.id)

    async def end(self, pipe: str, how: str, deadline: float, forward: bool) -> wire.PipeInfo:
        """Stop or drain a pipe, by its coordinator.

        Args:
            how: "stop" or "drain".
            deadline: seconds after which a drained pipe is stopped.
            forward: pass it on when another agent coordinates; agents do not pass on what agents passed on.
        """
        if pipe in self.history:
            return self.info(pipe)
        entry = self._entry(pipe)
        coordinator = entry.record.coordinator
        if not entry.scheduler.coordinates and coordinator != self.me and forward:
            route = STOP if how == "stop" else DRAIN
            return await self._peers.call(coordinator, route, wire.Stopping(deadline), pipe=pipe)
        self._coordinated(entry)
        if how == "drain":
            if entry.stop_timer is None:
                entry.stop_timer = self._loop.call_later(deadline, self._follow, entry, StopPipe())
            self._follow(entry, DrainPipe())
        else:
            self._follow(entry, StopPipe())
        return self.info(pipe)

    async def attend(self, pipe: str, asked: wire.Attendance, broken: Callable[[], bool]) -> wire.News:
        """The submitting process asks what there is for it.

        Raises:
            NodeRefused: 403 another process submitted it; 404, 409 and 503 as reported().
        """
        if pipe in self.history:
            return wire.News(asked.heard + 1, told_of(self.history[pipe].record))
        entry = self._entry(pipe)
        if asked.client != entry.record.layout.client or (asked.report and asked.report.node != asked.client):
            raise refuse(403, "other_client", f"Pipe {pipe} was submitted by another process.")
        if asked.report is not None:
            self.reported(pipe, asked.report)
        self._coordinated(entry)
        await entry.desk.wait(asked.heard, asked.patience, broken)
        if pipe in self.history:
            return wire.News(asked.heard + 1, told_of(self.history[pipe].record))
        self._coordinated(entry)
        orders = entry.desk.orders if entry.desk.orders and entry.desk.orders.fence > asked.fence else None
        return wire.News(entry.desk.number, entry.scheduler.telling(), orders, self._whereabouts(entry.record))

    def _whereabouts(self, record: Record) -> dict[str, tuple[str, ...]]:
        nodes = {*record.layout.nodes(), *record.members, self.me} - {record.layout.client}
        here = self._live().get(self.me)
        found = {node: self._addresses(node) for node in sorted(nodes)}
        if here is not None:
            found[self.me] = here.addresses
        return {node: tuple(map(str, addresses)) for node, addresses in found.items() if addresses}

    # ------------------------------------------------------------------ telling

    def contents(self) -> set[str]:
        """What the pipes that go on need of the store."""
        return {one for entry in self.entries.values() for one in entry.record.shipment.contents}

    def info(self, pipe: str) -> wire.PipeInfo:
        """How a pipe is, as far as this node knows.

        Raises:
            NodeRefused: 404.
        """
        if pipe in self.history:
            return _info(self.history[pipe].record, told_of(self.history[pipe].record), closed=True)
        entry = self._entry(pipe)
        scheduler, record = entry.scheduler, entry.record
        told = scheduler.telling() if scheduler.coordinates else told_of(record)
        if entry.held:
            told = msgspec.structs.replace(told, waiting="; ".join(filter(None, (entry.held, told.waiting))))
        return _info(record, told, closed=False)

    def infos(self) -> tuple[wire.PipeInfo, ...]:
        """All that are known, ended ones first."""
        return tuple(self.info(pipe) for pipe in (*self.history, *self.entries))


def told_of(record: Record) -> TellClient:
    """What a record alone tells: all of it when the pipe has ended."""
    return TellClient(record.state, record.reasons, "", record.books, record.crews, record.state in ENDED)


def _info(record: Record, told: TellClient, closed: bool) -> wire.PipeInfo:
    seats = record.layout.placement.seats
    return wire.PipeInfo(
        record.id, record.spec.name, record.epoch, record.coordinator, told, dict(seats), record.members, closed
    )


