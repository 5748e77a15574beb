"""The report of a pipe on a cluster, from what its coordinator tells: the same report as on one host. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from upipe.cluster.lanes import Stream, streams
from upipe.cluster.record import Books, Crew
from upipe.graph.plan import ANY, PIPE, REPLIES
from upipe.graph.spec import PipeSpec, ProcessorSpec
from upipe.runtime.report import EdgeReport, ProcessorReport, Report

_NOTHING = Books()


def report(
    spec: PipeSpec, state: str, seconds: float, books: Mapping[str, Books], crews: Mapping[str, Crew]
) -> Report:
    """Add up what the nodes told.

    Args:
        state: of the pipe.
        seconds: since its start, or from start to end.
        books: by stream. While the pipe runs they are of several moments, so they may not balance exactly.
        crews: by processor.
    """
    edges = {one.name: _edge(one, books.get(one.name, _NOTHING), seconds) for one in streams(spec)}
    shown = tuple(
        edge for name, edge in edges.items() if name != REPLIES and (edge.emitted or edge.source not in (PIPE, ANY))
    )
    return Report(
        pipe=spec.name,
        state=state,
        seconds=seconds,
        processors=tuple(_processor(one, spec, edges, crews.get(one.name, Crew())) for one in spec.processors),
        edges=shown,
        dead_letters=sum(edge.dead for edge in shown),
    )


def _edge(stream: Stream, books: Books, seconds: float) -> EdgeReport:
    left = books.emitted - books.finished - books.dead - books.dropped
    return EdgeReport(
        source=stream.source,
        target=stream.target,
        emitted=books.emitted,
        finished=books.finished,
        dead=books.dead,
        dropped=books.dropped,
        aborted=books.aborted,
        in_flight=max(0, left),
        bytes=books.bytes,
        depth=0,  # nodes tell what passed, not what lies where
        max_depth=0,
        capacity=0,
        redelivered=books.redelivered,
        seconds=seconds,
    )


def _processor(one: ProcessorSpec, spec: PipeSpec, edges: Mapping[str, EdgeReport], crew: Crew) -> ProcessorReport:
    inputs = [edge for edge in edges.values() if edge.target == one.name]
    outputs = [edge for edge in edges.values() if edge.source == one.name]
    if not outputs and len(spec.ends()) == 1:
        outputs = [edge for name, edge in edges.items() if edge.source == ANY and name != REPLIES]
    return ProcessorReport(
        name=one.name,
        workers=crew.workers or one.workers,
        frames_in=sum(edge.finished + edge.dead for edge in inputs),
        frames_out=max((edge.emitted for edge in outputs), default=0),
        bytes_in=sum(edge.bytes for edge in inputs),
        bytes_out=sum(edge.bytes for edge in outputs),
        restarts=crew.restarts,
        redeliveries=sum(edge.redelivered for edge in inputs),
        dead_letters=sum(edge.dead for edge in inputs),
        cpu_seconds=crew.cpu_seconds,
    )
