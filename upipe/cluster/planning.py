"""What a pipe's record becomes, given what is known of its nodes. Pure: no epochs, no messages (ballot.py).

A worker that shall run elsewhere moves in steps, each of them a record that counts: its plan says "leaving"; it
finishes what it holds and ends; what it finished is told to the homes of its queues ("settled"); then its seat, and the
lanes that only it read, are the new node's. A worker that was lost with its node is simply seated anew.

What is done about the end of streams: see lanes.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest

import msgspec

from upipe.cluster.dealings import NodeReport, QueueState
from upipe.cluster.lanes import Lane, Layout, Stream, prune, relay, streams
from upipe.cluster.layout import NodePlan, node_plan
from upipe.cluster.mending import mended
from upipe.cluster.placement import Placement, Seat, Unplaceable, place
from upipe.cluster.record import DRAINING, ENDED, MOST_MEMBERS, RUNNING, Books, Crew, Record
from upipe.cluster.room import Node
from upipe.graph.plan import ANY, PIPE, REPLIES, RESULTS

_NOTHING = QueueState()


class View(msgspec.Struct, frozen=True):
    """What a coordinator knows."""

    up: Mapping[str, Node]
    """Agents that are alive."""
    reports: Mapping[str, NodeReport]
    """The newest of each keeper."""
    client_gone: bool = False
    full: Mapping[str, Mapping[str, float]] = {}
    """What nodes that refused workers said they have promised to other pipes, until something newer is known."""
    changed: bool = True
    """Agents came, went or changed since the last time: workers are placed anew."""


class Planned(msgspec.Struct, frozen=True):
    """The record as it should be (its order is not filled in), and what waits for room."""

    record: Record
    waiting: str | None = None
    """What finds no room, for the user; None: as before."""


def planned(record: Record, view: View) -> Planned:
    """The next record; an equal one when there is nothing to do."""
    if record.state in ENDED:
        return Planned(record)
    counted = (one for node, one in sorted(view.reports.items()) if node not in record.evicted)  # not of a lost node
    failed = tuple(one.failed for one in counted if one.failed)
    if failed or view.client_gone:
        state = "failed" if failed else "stopped"
        reasons = failed or ("the process that submitted it is gone",)
        return Planned(ended(record, state, view.reports.values(), reasons))
    step = _Step(record, view)
    step.note_ended()
    step.note_unfit()
    step.evict()
    if wrong := step.mend() or step.place():
        return Planned(ended(record, "failed", view.reports.values(), wrong))
    step.move()
    step.prune()
    step.depart()
    step.close_ends()
    step.complete()
    step.choose_members()
    return Planned(step.record, step.waiting)


def plans(record: Record) -> dict[str, NodePlan | None]:
    """What each node shall do for a record that counts; None: end everything. A client ends by itself."""
    nodes = record.layout.nodes()
    found: dict[str, NodePlan | None] = dict.fromkeys(record.evicted)
    if record.state in ENDED:
        return {**found, **dict.fromkeys(node for node in nodes if node != record.layout.client)}
    leaving = tuple(f"{name}#{index}" for name, index in moving(record))
    done = frozenset(one.name for one in record.spec.processors if _over(record, one.name))
    for node in nodes:
        found[node] = node_plan(
            record.spec,
            record.layout,
            node,
            record.fence,
            leaving=leaving,
            ends=frozenset(record.ends),
            discards=done,
            draining=record.state == DRAINING,
        )
    return found


def moving(record: Record) -> list[Seat]:
    """The workers that shall leave where they are."""
    gone = set(record.ended)
    return [seat for seat in record.layout.placement.moved(record.wanted) if seat not in gone]


def _over(record: Record, processor: str) -> bool:
    """Whether all workers of a processor have ended (those for autoscaling that have no seat need not)."""
    ended, row = set(record.ended), record.layout.placement.seats.get(processor, ())
    one = next(one for one in record.spec.processors if one.name == processor)
    must = {(processor, index) for index, seat in enumerate(row) if seat or index < one.workers}
    return must <= ended and len(row) >= one.workers


class _Step:
    """One pass over everything that may have changed."""

    def __init__(self, record: Record, view: View) -> None:
        self.before = self.record = record
        self.view = view
        self.waiting: str | None = None
        self.fence = record.fence
        here = {*record.layout.nodes(), *record.evicted} - {record.layout.client}
        told = {node: report for node, report in view.reports.items() if node not in record.evicted}
        self.unfit = {node: report.unfit for node, report in told.items() if report.unfit and not report.present}
        dead = {node for node, report in told.items() if report.lost or node in self.unfit}
        self.lost = {node for node in here if node not in view.up or node in dead}
        self.layout: Layout = record.layout
        seats = {(seat, node) for node in here if (report := self._report(node)) for seat in report.refused}
        self.seated = _without(record.layout.placement.without(self.lost), seats)
        """Where workers run now: not on lost nodes, nor where there was no room for them."""

    def _change(self, **fields: object) -> None:
        self.record = msgspec.structs.replace(self.record, **fields)

    def _report(self, node: str) -> NodeReport | None:
        """What the keeper of a node says about the plan that counts; None while it follows an older one."""
        report = self.view.reports.get(node)
        return report if report is not None and report.fence >= self.fence else None

    def _queue(self, node: str, name: str) -> QueueState:
        report = self._report(node)
        return _NOTHING if report is None else report.queues.get(name, _NOTHING)

    # ------------------------------------------------------------------ workers

    def note_ended(self) -> None:
        placement = self.layout.placement
        told = {
            (name, index)
            for node, report in self.view.reports.items()
            if node not in self.record.evicted
            for name, index in report.ended
            if index in placement.indices(name, node)
        }
        self._change(ended=tuple(sorted({*self.record.ended, *told})))

    def note_unfit(self) -> None:
        """They run nothing of it: what they were to run is placed anew, as if they were lost."""
        self._change(unfit={**self.record.unfit, **self.unfit})

    def evict(self) -> None:
        """The lost may still run what they had; those that came back have said that they do not."""
        obeyed = {
            node
            for node, revision in self.record.evicted.items()
            if (report := self.view.reports.get(node)) and not report.present and report.fence[1] >= revision
        }
        known = {node: since for node, since in self.record.evicted.items() if node not in obeyed}
        fresh = sorted(self.lost & set(self.layout.nodes()) - set(known))
        self._change(evicted={**known, **dict.fromkeys(fresh, self.record.revision + 1)})
        self._keep_crews(fresh)

    def mend(self) -> tuple[str, ...]:
        """Fresh copies for what cannot be mirrored; why the pipe cannot go on."""
        self.layout, reasons = mended(
            self.record.spec, self.layout, self.view.reports, {*self.lost, *self.record.evicted}
        )
        self._change(layout=self.layout)
        return reasons

    def place(self) -> tuple[str, ...]:
        """Where workers shall run; why there is no use in waiting for it."""
        before = self.before
        same = before.evicted == self.record.evicted and before.ended == self.record.ended and not self.lost
        same = same and self.seated == self.layout.placement
        if same and not self.view.changed:
            return ()
        self.waiting = ""
        able = [node for name, node in self.view.up.items() if name not in self.record.evicted]
        unfit = self.record.unfit
        known = [msgspec.structs.replace(self._as_told(node), unfit=unfit.get(node.id, "")) for node in able]
        found = place(self.record.spec, known, self.seated, self.record.ended)
        if isinstance(found, Unplaceable):
            if found.never and unfit and self._could_run(self.seated):
                return tuple(unfit[node] for node in sorted(unfit))
            self.waiting = found.told()
            found = found.partial
        self._change(wanted=self._with_roots(found))
        return ()

    def _as_told(self, node: Node) -> Node:
        """One that refused has said what it promised to others, which has not come round yet."""
        told = self.view.full.get(node.id, {})
        taken = {name: max(node.taken.get(name, 0.0), amount) for name, amount in told.items()}
        return msgspec.structs.replace(node, taken={**node.taken, **taken})

    def _could_run(self, current: Placement) -> bool:
        """On the nodes there are, were they all fit: then what they lack is what keeps it, and not a node to come."""
        found = place(self.record.spec, self.view.up.values(), current, self.record.ended)
        return not (isinstance(found, Unplaceable) and found.never)

    def _with_roots(self, wanted: Placement) -> Placement:
        """Roots that drive themselves stay where they run: no queue holds how far they came, so elsewhere they would
        begin anew. A node that drains waits for them, as its user asked it to (upipe-node --drain-seconds)."""
        seats, known = dict(wanted.seats), self.seated.seats
        for one in self.record.spec.roots():
            if one.kind in ("source", "driver", "entry"):
                pairs = zip_longest(known.get(one.name, ()), seats[one.name], fillvalue="")
                seats[one.name] = tuple(before or after for before, after in pairs)
        return Placement(seats)

    def move(self) -> None:
        current, wanted = self.seated, self.record.wanted
        rows = {}
        for name, row in wanted.seats.items():
            before = [*current.seats.get(name, ()), *[""] * len(row)]
            rows[name] = tuple(self._seat(name, index, before[index], there) for index, there in enumerate(row))
        placement = Placement(rows)
        if placement != self.layout.placement or self.lost & set(self.layout.nodes()):
            self.layout = relay(self.record.spec, self.layout, placement, self.lost)
            self._change(layout=self.layout)

    def _seat(self, name: str, index: int, here: str, there: str) -> str:
        if not here or not there or here == there or (name, index) in self.record.ended:
            return here or there
        report = self._report(here)
        gone = set(report.left if report else ())
        if (name, index) not in gone:
            return here
        alone = all((name, other) in gone for other in self.layout.placement.indices(name, here))
        read = [lane for lane in self.layout.lanes if lane.reader == here != lane.home]
        mine = [lane for lane in read if self._read_by(lane, name, index, alone)]
        return there if all(self._queue(here, lane.name).settled for lane in mine) else here

    def _read_by(self, lane: Lane, name: str, index: int, alone: bool) -> bool:
        """Whether nobody else on the worker's node reads the lane."""
        target = next(one.target for one in streams(self.record.spec) if one.name == lane.stream)
        return target == name and (alone if lane.partition < 0 else lane.partition == index)

    # ------------------------------------------------------------------ queues

    def prune(self) -> None:
        closed = [lane for lane in self.layout.lanes if not lane.open and lane in self.record.layout.lanes]
        states = {lane.name: self._queue(lane.home, lane.name) for lane in closed}
        after = prune(self.layout, [name for name, state in states.items() if state.empty and state.left])
        kept = {lane.name for lane in after.lanes}
        books = dict(self.record.books)
        for lane in self.layout.lanes:
            if lane.name not in kept:
                books[lane.stream] = books.get(lane.stream, Books()) + states[lane.name].books
        for lane in self.before.layout.lanes:
            if not any(lane.reader in (one.home, one.reader) for one in after.lanes if one.name == lane.name):
                books[lane.stream] = books.get(lane.stream, Books()) + _at_sink(lane, self.view.reports)
        self.layout = after
        self._change(layout=after, books=books)

    def depart(self) -> None:
        """Nodes that have nothing of the pipe any more: their keepers end, and what they counted goes with them."""
        self._keep_crews(set(self.before.layout.nodes()) - set(self.layout.nodes()) - set(self.record.evicted))

    def _keep_crews(self, nodes: Iterable[str]) -> None:
        """What was told last of the crews on these nodes, none of whose workers counts as running now."""
        gone = [report.crews for node in nodes if (report := self.view.reports.get(node))]
        past = [{name: msgspec.structs.replace(crew, workers=0) for name, crew in one.items()} for one in gone]
        self._change(crews=_sum(self.record.crews, past))

    def close_ends(self) -> None:
        ready = [one.name for one in streams(self.record.spec) if one.name not in self.record.ends and self._ready(one)]
        self._change(ends=(*self.record.ends, *ready))

    def _ready(self, stream: Stream) -> bool:
        """Nobody writes it any more, and nothing is on its way (to the pipe: what is may be read after the end)."""
        if stream.source == PIPE:
            report = self._report(self.layout.client)
            written = not self.layout.client or (report is not None and report.input_closed)
        else:
            written = all(_over(self.record, name) for name in self._writers(stream))
        lanes = self.layout.of(stream.name)
        if not written or (stream.target != PIPE and _over(self.record, stream.target)):
            return written
        if stream.target == PIPE:
            return True
        return lanes == self.record.layout.of(stream.name) and all(
            self._queue(lane.home, lane.name).empty for lane in lanes
        )

    def _writers(self, stream: Stream) -> list[str]:
        if stream.name == RESULTS:
            return [one.name for one in self.record.spec.ends()]
        return [one.name for one in self.record.spec.processors] if stream.source == ANY else [stream.source]

    def complete(self) -> None:
        """Every processor has ended everywhere, and what is for the pipe has reached it."""
        if not all(_over(self.record, one.name) for one in self.record.spec.processors):
            return
        if not {RESULTS, REPLIES} <= set(self.record.ends):
            return
        left = [lane for name in (RESULTS, REPLIES) for lane in self.layout.of(name)]
        if all(self._queue(lane.home, lane.name).settled for lane in left if lane.reader):
            self.record = ended(self.record, "completed", self.view.reports.values())

    # ------------------------------------------------------------------ members

    def choose_members(self) -> None:
        """The living ones stay, others that live fill up; the dead go once that counts without them. A record that
        counts with the members of before is followed by one that needs the new ones only: else the death of one that
        has gone, or of a former tie breaker, would still keep everybody from going on."""
        alive = {*self.view.up, self.record.coordinator}
        staying = [node for node in self.record.members if node in alive]
        more = [node for node in sorted(self.view.up) if node not in staying and not self.view.up[node].draining]
        self._change(members=tuple(sorted((*staying, *more[: max(0, MOST_MEMBERS - len(staying))]))), before=())


def _without(placement: Placement, seats: set[tuple[Seat, str]]) -> Placement:
    """The same with these (worker, node) nowhere."""
    rows = placement.seats.items()
    return Placement(
        {name: tuple("" if ((name, i), one) in seats else one for i, one in enumerate(row)) for name, row in rows}
    )


def ended(record: Record, state: str, reports: Iterable[NodeReport], reasons: tuple[str, ...] = ()) -> Record:
    """The record of a pipe that is over, with its books closed."""
    known = tuple(reports)
    reasons = (*record.reasons, *reasons)
    books, all_crews = totals(record, known), crews(record, known)
    return msgspec.structs.replace(record, state=state, reasons=reasons, books=books, crews=all_crews)


def totals(record: Record, reports: Iterable[NodeReport]) -> dict[str, Books]:
    """The books of each stream, over all its queues there are and were."""
    if record.state in ENDED:
        return record.books
    found = dict(record.books)
    by_node = {report.node: report for report in reports}
    for lane in record.layout.lanes:
        report = by_node.get(lane.home)
        if report is not None and lane.name in report.queues:
            found[lane.stream] = found.get(lane.stream, Books()) + report.queues[lane.name].books
        found[lane.stream] = found.get(lane.stream, Books()) + _at_sink(lane, by_node)
    return found


def _at_sink(lane: Lane, reports: Mapping[str, NodeReport]) -> Books:
    """What only the copy of a lane knows: its source is told what is finished there, not how often it was begun."""
    report = reports.get(lane.reader) if lane.reader != lane.home else None
    state = report.queues.get(lane.name) if report is not None else None
    return Books(redelivered=state.books.redelivered) if state is not None else Books()


def crews(record: Record, reports: Iterable[NodeReport]) -> dict[str, Crew]:
    """The crew of each processor, over all nodes; of those that are lost as far as it was told."""
    if record.state in ENDED:
        return record.crews
    here = set(record.layout.nodes()) - set(record.evicted)
    return _sum(record.crews, (report.crews for report in reports if report.node in here))


def _sum(first: Mapping[str, Crew], others: Iterable[Mapping[str, Crew]]) -> dict[str, Crew]:
    found = dict(first)
    for other in others:
        for name, crew in other.items():
            found[name] = found.get(name, Crew()) + crew
    return found


__all__ = ["DRAINING", "RUNNING", "Planned", "View", "crews", "ended", "moving", "planned", "plans", "totals"]
