"""Mirrors that failed for good: a fresh pair of copies, or the end of the pipe with a sentence. Pure.

What a ferry can mend by itself (opening the same two copies again goes on by position, with nothing lost and nothing
repeated) it has tried before it tells of a queue as broken. Then one of the copies is of no use, and the lane gets a
new epoch: the keeper of the reader drops its copy and makes a fresh one, and all that home has not heard to be finished
is sent again. That is what the death of the reader's host would cost: nothing is lost, and what the old copy's workers
had finished in the moment before, unheard, comes a second time. A frame that no copy takes breaks each of them at the
same position; so a lane gets MOST fresh pairs without getting further, and then the pipe fails.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from upipe.cluster.dealings import NodeReport, QueueState
from upipe.cluster.lanes import Lane, Layout, streams
from upipe.graph.plan import PIPE
from upipe.graph.spec import PipeSpec

MOST = 2
"""Fresh pairs of copies in a row for a lane that gets no further. More outlive more, and hide it longer."""


def mended(
    spec: PipeSpec, layout: Layout, reports: Mapping[str, NodeReport], lost: Collection[str]
) -> tuple[Layout, tuple[str, ...]]:
    """The layout with fresh pairs for what is broken, and why the pipe cannot go on; an equal layout without faults.

    Args:
        reports: the newest of each node. Their fences do not matter: a fault names the pair of copies that it is of.
        lost: nodes whose word does not count.
    """
    lanes, made, reasons = list(layout.lanes), layout.made, []
    for number, lane in enumerate(lanes):
        faults = {
            node: state
            for node in dict.fromkeys((lane.home, lane.reader))
            if node not in lost and (state := _fault(lane, reports.get(node))) is not None
        }
        if not faults:
            continue
        at = max(state.broken_at for state in faults.values())
        again = lane.mended if at <= lane.broken_at else 0
        if not _carried(lane) or again >= MOST:
            reasons.append(_told(spec, lane, faults))
            continue
        lanes[number] = msgspec.structs.replace(lane, pair=made, mended=again + 1, broken_at=at)
        made += 1
    return msgspec.structs.replace(layout, lanes=tuple(lanes), made=made), tuple(reasons)


def _carried(lane: Lane) -> bool:
    return lane.reader not in ("", lane.home)


def _fault(lane: Lane, report: NodeReport | None) -> QueueState | None:
    """What a node holds against this very pair of copies (or against a queue that has no copy)."""
    state = report.queues.get(lane.name) if report is not None else None
    epoch = lane.pair + 1 if _carried(lane) else 0
    return state if state is not None and state.broken and state.epoch == epoch else None


def _told(spec: PipeSpec, lane: Lane, faults: Mapping[str, QueueState]) -> str:
    stream = next(one for one in streams(spec) if one.name == lane.stream)
    ends = "the pipe's input" if stream.source == PIPE else stream.source, stream.target
    what = f"edge {ends[0]} -> {ends[1]}" if stream.target != PIPE else f"the pipe's {stream.name}"
    where = f"from node {lane.home} to node {lane.reader}" if _carried(lane) else f"on node {lane.home}"
    why = "; ".join(f"node {node} says: {state.broken}" for node, state in faults.items())
    tried = f" ({lane.mended} fresh pairs of copies did not help)" if lane.mended else ""
    return f"{what} {where} cannot go on{tried}: {why}"
