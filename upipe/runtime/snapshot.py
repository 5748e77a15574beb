"""The report of a pipe on this host at one moment: from the counters in its queues and the supervisor's account."""

from __future__ import annotations

from collections.abc import Mapping

from upipe.graph.plan import PIPE, REPLIES, Plan, QueuePlan
from upipe.memq.queue import MemQ
from upipe.runtime.report import EdgeReport, ProcessorReport, Report, edge_report
from upipe.runtime.supervisor import Supervisor

Edges = Mapping[tuple[str, str], EdgeReport]


def report(plan: Plan, supervisor: Supervisor, queues: Mapping[str, MemQ], seconds: float) -> Report:
    """Add up what the queues count."""
    by_edge: dict[tuple[str, str], list[QueuePlan]] = {}
    for queue in plan.queues:
        if queue.name != REPLIES and queue.name in queues:
            by_edge.setdefault(queue.edge, []).append(queue)
    edges = {
        edge: edge_report(*edge, [queues[queue.name].stats() for queue in found], seconds)
        for edge, found in by_edge.items()
    }
    return Report(
        pipe=plan.pipe,
        state=supervisor.state,
        seconds=seconds,
        processors=tuple(_processor(name, plan, supervisor, queues, edges) for name in supervisor.crews),
        edges=tuple(one for edge, one in edges.items() if one.emitted or edge[0] not in (PIPE, "*")),
        dead_letters=sum(one.dead for one in edges.values()),
    )


def _processor(
    name: str, plan: Plan, supervisor: Supervisor, queues: Mapping[str, MemQ], edges: Edges
) -> ProcessorReport:
    crew = supervisor.crews[name]
    inputs = [edge for (_, target), edge in edges.items() if target == name]
    sent = _sent(name, plan, queues)
    size = 0
    for target, frames in sent.items():
        edge = edges.get((name, target)) or edges.get(("*", target))
        if edge is not None and edge.emitted:
            size += edge.bytes * frames // edge.emitted
    running = sum(1 for slot in crew.slots if slot.alive)
    return ProcessorReport(
        name=name,
        workers=running or crew.spec.workers,
        frames_in=sum(edge.finished + edge.dead for edge in inputs),
        frames_out=max(sent.values(), default=0),
        bytes_in=sum(edge.bytes for edge in inputs),
        bytes_out=size,
        restarts=crew.deaths,
        redeliveries=sum(edge.redelivered for edge in inputs),
        dead_letters=sum(edge.dead for edge in inputs),
        cpu_seconds=crew.cpu_seconds,
    )


def _sent(name: str, plan: Plan, queues: Mapping[str, MemQ]) -> dict[str, int]:
    """Frames that all its workers emitted, per target."""
    sent: dict[str, int] = {}
    for worker in plan.workers:
        for output in worker.outputs if worker.processor == name else ():
            frames = sum(queues[queue].emitted(output.producer) for queue in output.queues if queue in queues)
            sent[output.target] = sent.get(output.target, 0) + frames
    return sent
