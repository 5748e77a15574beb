"""The scheduler of one pipe in one agent, as a pure state machine: events and `now` in, commands out.

    Heard  NodeUp  NodeDown  Reported  StopPipe  DrainPipe  Tick          dealings.py
                 |
             handle(event, now)            ballot.py: who coordinates, and which record counts
                 |                         planning.py: what the record becomes
    Save  Send  Arrange  TellClient

Every member of a pipe has one. The coordinator turns what it knows into the next record, and tells the nodes what it
says once it counts; the others keep the record, and take over when the coordinator is dead, in the order of their ids.
Who sees no quorum of the members (the small side of a cut) decides nothing: it neither runs nor plans, and workers and
mirrors go on as they are. Nor does it at once when the cut has healed: what it knows of the others is old, and messages
arrive before membership has met everybody again. An agent that ran for the next epoch all the while would be granted
it by the first that it reaches, and would then move everything away from nodes that it still takes for dead.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from upipe.cluster.ballot import CANDIDATE, COORDINATOR, MEMBER, Ballot
from upipe.cluster.dealings import (
    Arrange,
    Command,
    DrainPipe,
    Event,
    Heard,
    NodeDown,
    NodeReport,
    NodeUp,
    Reported,
    StopPipe,
    TellClient,
)
from upipe.cluster.lanes import lay_out
from upipe.cluster.placement import Placement, Unplaceable, place
from upipe.cluster.planning import View, crews, ended, planned, plans, totals
from upipe.cluster.record import DRAINING, ENDED, MOST_MEMBERS, NO_SHIPMENT, RUNNING, Record, Shipment
from upipe.cluster.room import Node
from upipe.graph.spec import PipeSpec

RESEND = 1.0
"""Seconds after which what was not answered is said again. Shorter heals losses faster and talks more."""
MOST_STEPS = 16
"""Records in a row for one event, when nobody else has to be waited for."""
HELD = 3.0
"""Seconds without a quorum until that is told: a takeover, or a record that counts, takes less."""
GRACE = 5.0
"""Seconds for the nodes of a pipe to be met (again), after a start or a time without a quorum. As long as the death of
a node takes to be known."""
STEP = 0.5
"""Seconds between the candidates for a takeover: the first waits one of them, the next two. Longer than an answer
takes, so that usually one is enough."""


class Scheduler:
    """One agent's part in one pipe.

    Args:
        me: its node id.
        record: the newest it has (from disk, or a Replicate that it knew nothing of before).
        promised, promised_to: as saved with it.
    """

    def __init__(self, me: str, record: Record, promised: int = 0, promised_to: str = "") -> None:
        self.me = me
        self.ballot = Ballot(me, record, promised, promised_to)
        self.up: dict[str, Node] = {}
        self.reports: dict[str, NodeReport] = {}
        self.full: dict[str, dict[str, float]] = {}
        """See View.full. Forgotten when what is told of the node's promises changes: that is newer."""
        self.waiting = ""
        """What finds no room."""
        self._client_gone = False
        self._changed = True
        self._wish = ""
        """A state that the user asked for and that the record does not have yet."""
        self._arranged: tuple[int, int] | None = None
        """Fence of the record that the nodes have been told of. Set only while coordinating."""
        self._told: TellClient | None = None
        """Without books and crews, which change all the time."""
        self._was_up = False
        self._resend_at: float | None = None
        self._run_at: float | None = None
        self._held_since: float | None = None
        """Since when there are too few members for anything to change; None: there are enough."""
        self._tell_at: float | None = None
        """When held_up() has something to say that it has not yet."""
        self._quorum: bool | None = None
        """Whether one is in sight; None: it never was."""
        self._settle_at: float | None = None
        """One is in sight again: when what is seen counts at the latest."""

    @classmethod
    def submit(
        cls, me: str, id: str, spec: PipeSpec, nodes: Iterable[Node], client: str, now: float,  # noqa: A002
        shipment: Shipment = NO_SHIPMENT, job: str = "",
    ) -> tuple[Scheduler, list[Command]] | Unplaceable:
        """Begin to coordinate a new pipe, submitted to this agent.

        Args:
            id: unique in the cluster.
            spec: valid, also for cluster_problems().
            nodes: agents that are alive, this one among them.
            client: node id of the submitting process; "" when it does not stay.
            shipment: what its nodes need beside the spec.
            job: see Record.job.

        Returns:
            The scheduler with its first commands, or why the pipe cannot run.
        """
        alive = sorted(nodes, key=lambda node: node.id)
        found = place(spec, alive)
        if isinstance(found, Unplaceable):
            return found
        others = [node.id for node in alive if node.id != me and not node.draining]
        members = tuple(sorted((me, *others[: MOST_MEMBERS - 1])))
        record = Record(id, spec, 1, 1, me, members, me, lay_out(spec, Placement(found.seats), client), wanted=found,
            shipment=shipment, job=job)
        made = cls(me, record)
        made.up = {node.id: node for node in alive}
        made._changed = False
        return made, [*made.ballot.begin(), *made._go_on(now)]

    # ------------------------------------------------------------------ what it knows

    @property
    def record(self) -> Record:
        """The newest record here: it may not count yet."""
        return self.ballot.kept

    @property
    def coordinates(self) -> bool:
        """Whether this agent is the pipe's coordinator, as far as it knows."""
        return self.ballot.role == COORDINATOR

    @property
    def finished(self) -> bool:
        """The pipe has ended, and no living node has anything of it left: the record can be forgotten."""
        record = self.record
        left = [node for node in plans(record) if node in self.up] if record.state in ENDED else [""]
        left += self._strays()
        known = [self.reports.get(node) for node in left]
        return all(one is not None and not one.present and one.fence >= record.fence for one in known)

    def deadline(self) -> float | None:
        """When to call handle(Tick()) at the latest; None: not before the next event."""
        dues = (self._resend_at, self._run_at, self._settle_at, self._tell_at)
        return min((due for due in dues if due is not None), default=None)

    def held_up(self, now: float) -> str:
        """Why nothing about this pipe can change here, for the user; "" when it can, or somebody else sees to it."""
        if self._held_since is None or now < self._held_since + HELD or self.record.state in ENDED:
            return ""
        record, members = self.record, dict.fromkeys((*self.record.members, *self.record.before))
        silent = sorted(node for node in members if node != self.me and node not in self.up)
        who = f"{', '.join(silent)} cannot be reached" if silent else "too few of them answer"
        rule = "" if len(members) != 2 else " (of two nodes only the one that the pipe was submitted to goes on alone)"
        return (
            f"nothing is moved or begun for this pipe from here: of the {len(members)} nodes that keep its record "
            f"{who}, and the others are no majority{rule}; its workers here run on; it goes on once node "
            f"{' or '.join(silent) or record.coordinator} is back"
        )

    # ------------------------------------------------------------------ events

    def handle(self, event: Event, now: float) -> list[Command]:
        """Follow one event."""
        commands: list[Command] = []
        if isinstance(event, Heard):
            commands += self.ballot.hear(event.message)
        elif isinstance(event, NodeUp):
            known = self.up.get(event.node.id)
            self._changed = self._changed or known != event.node
            if known is None or known.taken != event.node.taken:
                self.full.pop(event.node.id, None)
            self.up[event.node.id] = event.node
        elif isinstance(event, NodeDown):
            self._down(event.node)
        elif isinstance(event, Reported):
            commands += self._reported(event.report)
        elif isinstance(event, StopPipe):
            self._wish = "stopped"
        elif isinstance(event, DrainPipe):
            self._wish = self._wish or DRAINING
        return [*commands, *self._go_on(now)]

    def _down(self, node: str) -> None:
        self._client_gone = self._client_gone or (node != "" and node == self.record.layout.client)
        self._changed = self.up.pop(node, None) is not None or self._changed

    def _reported(self, report: NodeReport) -> list[Command]:
        known = self.reports.get(report.node)
        if known is not None and known.number >= report.number:
            return []
        self.reports[report.node] = report
        if report.refused:
            self.full[report.node] = report.others
        counted = self.ballot.counted
        if counted is None or not report.present or report.node in plans(counted):
            return []
        return [Arrange(report.node, counted.fence, None)]  # from a time that is over

    # ------------------------------------------------------------------ going on

    def _go_on(self, now: float) -> list[Command]:
        settled = self._settled(now)
        commands = self._take_over(settled, now)
        if self.ballot.role != COORDINATOR:
            self._arranged = self._told = None
        else:
            commands += self._lead(settled)
        held = self.ballot.role == CANDIDATE or self.ballot.pending or not self._quorum
        self._held_since = (now if self._held_since is None else self._held_since) if held else None
        due = None if self._held_since is None else self._held_since + HELD
        self._tell_at = due if due is not None and now < due else None
        return [*commands, *self._say_again(now)]

    def _settled(self, now: float) -> bool:
        """Whether what is seen of the cluster may decide anything: a quorum of the members is up, and where that was
        not so, every node of the pipe has been met again, or had the time for it."""
        record, seen = self.record, {*self.up, self.me}
        had = self._quorum
        self._quorum = record.counts(seen) or (None if had is None else False)
        if not self._quorum:
            self._settle_at = None
            return False
        missing = {*record.members, *record.layout.nodes()} - seen - {record.layout.client}
        if had is False and missing:
            self._settle_at = now + GRACE
        if self._settle_at is not None and (not missing or self._settle_at <= now):
            self._settle_at = None
        return self._settle_at is None

    def _lead(self, settled: bool) -> list[Command]:
        """Next records until one has to be waited for or there is nothing to do."""
        commands: list[Command] = []
        for _ in range(MOST_STEPS):
            if self.ballot.pending:
                break
            commands += self._arrange()
            if not settled:
                return [*commands, *self._tell()]
            view = View(self.up, self.reports, self._client_gone, self.full, self._changed)
            found = planned(self._wished(self.record), view)
            self._changed = False
            self.waiting = self.waiting if found.waiting is None else found.waiting
            if found.record == self.record:
                return [*commands, *self._tell()]
            commands += self.ballot.propose(found.record)
        return commands

    def _wished(self, record: Record) -> Record:
        if record.state in ENDED or not self._wish or record.state == self._wish:
            return record
        if self._wish == DRAINING and record.state != RUNNING:
            return record
        if self._wish in ENDED:
            return ended(record, self._wish, self.reports.values())
        return msgspec.structs.replace(record, state=self._wish)

    def _arrange(self, behind: bool = False) -> list[Command]:
        """Tell the nodes what a record says that counts: once, or those that are behind. A node that had something of
        the pipe and has nothing in this record ends everything: nothing else tells one from which all has moved."""
        record = self.record
        if self._arranged == record.fence and not behind:
            return []
        self._arranged = record.fence
        found = []
        for node, plan in sorted({**dict.fromkeys(self._strays()), **plans(record)}.items()):
            report = self.reports.get(node)
            if (node in self.up or node == record.layout.client) and (report is None or report.fence < record.fence):
                found.append(Arrange(node, record.fence, plan))
        return list(found)

    def _strays(self) -> list[str]:
        """Nodes that have nothing to do for the pipe any more, and have not ended what they had of it."""
        known = plans(self.record)
        return [node for node, one in self.reports.items() if one.present and node in self.up and node not in known]

    def _tell(self) -> list[Command]:
        told = self.telling()
        short = msgspec.structs.replace(told, books={}, crews={})
        if short == self._told or (self._told is not None and self._told.state in ENDED):
            return []
        self._told = short
        return [told]

    def telling(self) -> TellClient:
        """What the submitting process would be told now."""
        record, reports = self.record, self.reports.values()
        now = [self.reports.get(node) for node in record.layout.placement.nodes()]
        self._was_up = self._was_up or all(report is not None and report.up for report in now)
        books = totals(record, reports)
        return TellClient(record.state, record.reasons, self._waits(), books, crews(record, reports), self._was_up)

    def _waits(self) -> str:
        """What finds no room, and what nodes wait for that shall run something."""
        nodes = () if self.record.state in ENDED else sorted(self.record.layout.nodes())
        here = [self.reports.get(node) for node in nodes]
        return "; ".join(filter(None, (self.waiting, *(one.waits for one in here if one is not None))))

    # ------------------------------------------------------------------ time

    def _take_over(self, settled: bool, now: float) -> list[Command]:
        """Run for the next epoch when nobody coordinates, after those with lower ids had their chance."""
        ballot, record = self.ballot, self.record
        if not settled:
            ballot.give_up()
        wanted = ballot.role == CANDIDATE or (
            ballot.role == MEMBER and (record.coordinator == self.me or record.coordinator not in self.up)
        )
        if not settled or not wanted or self.me not in ballot.kept.members:
            self._run_at = None
        elif self._run_at is None:
            self._run_at = now + STEP * self._rank()
        elif self._run_at <= now:
            self._run_at = now + STEP * (self._rank() + len(record.members))
            self._changed = True
            return ballot.run()
        return []

    def _rank(self) -> int:
        """1 for the first candidate: the coordinator that was, then the members that live by id."""
        living = [node for node in self.record.members if node in self.up or node == self.me]
        first = [node for node in living if node == self.record.coordinator]
        return 1 + [*first, *(node for node in living if node not in first)].index(self.me)

    def _say_again(self, now: float) -> list[Command]:
        if self.ballot.role == MEMBER:
            self._resend_at = None
        elif self._resend_at is None:
            self._resend_at = now + RESEND
        elif self._resend_at <= now:
            self._resend_at = now + RESEND
            arranged = self._arrange(True) if self.ballot.role == COORDINATOR and not self.ballot.pending else []
            return [*self.ballot.resend(), *arranged]
        return []
