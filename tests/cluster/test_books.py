"""The report of a pipe on a cluster."""

from __future__ import annotations

from upipe.cluster import books
from upipe.cluster.lanes import streams
from upipe.cluster.record import Books, Crew
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec

SPEC = PipeSpec("p", (ProcessorSpec("a", workers=2), ProcessorSpec("b")), (EdgeSpec("a", "b"),))
NAMES = {(one.source, one.target, one.name == "replies"): one.name for one in streams(SPEC)}
IN, AB, OUT = NAMES["", "a", False], NAMES["a", "b", False], NAMES["*", "", False]
FULL = {IN: Books(10, 9, 1, 0, bytes=80), AB: Books(9, 9, redelivered=2), OUT: Books(9, 2, 0, 3)}
FULL["replies"] = Books(4, 4)


def test_it_balances_and_names_what_the_processors_did() -> None:
    found = books.report(SPEC, "completed", 2.0, FULL, {"a": Crew(2, 1, 0.5, 1)})
    edges = [(edge.source, edge.target, edge.emitted) for edge in found.edges]
    assert edges == [("", "a", 10), ("a", "b", 9), ("*", "", 9)]
    assert found.balanced and found.dead_letters == 1 and found.edges[2].in_flight == 4
    a, b = found.processors
    assert (a.workers, a.frames_in, a.frames_out, a.restarts, a.dead_letters, a.bytes_in) == (2, 10, 9, 1, 1, 80)
    assert (b.workers, b.frames_in, b.frames_out, b.redeliveries) == (1, 9, 9, 2)


def test_what_is_missing_at_the_end_does_not_balance() -> None:
    assert not books.report(SPEC, "completed", 1.0, {**FULL, AB: Books(9, 8)}, {}).balanced
    assert books.report(SPEC, "running", 1.0, {**FULL, AB: Books(9, 8)}, {}).balanced  # it is on its way
    assert not books.report(SPEC, "completed", 1.0, {**FULL, AB: Books(9, 10)}, {}).balanced


def test_before_anything_was_told_it_is_empty() -> None:
    found = books.report(SPEC, "starting", 0.0, {}, {})
    assert [(edge.source, edge.emitted) for edge in found.edges] == [("a", 0)] and found.dead_letters == 0
