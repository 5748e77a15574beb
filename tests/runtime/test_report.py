"""The report's books and rates."""

from __future__ import annotations

import msgspec

from upipe import MemQ
from upipe.runtime.report import EdgeReport, ProcessorReport, Report, edge_report


def edge(**counts: int) -> EdgeReport:
    zero = {one: 0 for one in EdgeReport.__struct_fields__ if one not in ("source", "target", "seconds")}
    return EdgeReport(source="a", target="b", seconds=2.0, **{**zero, **counts})


def report(one: EdgeReport, state: str = "completed") -> Report:
    worker = ProcessorReport(
        name="b", workers=1, frames_in=1, frames_out=0, bytes_in=8, bytes_out=0, restarts=2, redeliveries=0,
        dead_letters=1, cpu_seconds=0.1,
    )
    return Report(pipe="p", state=state, seconds=2.0, processors=(worker,), edges=(one,), dead_letters=1)


def test_an_edge_balances_when_every_frame_is_accounted_for() -> None:
    assert edge(emitted=10, finished=6, dead=1, dropped=2, in_flight=1).balanced
    assert not edge(emitted=10, finished=6).balanced


def test_a_completed_pipe_has_nothing_in_flight_but_for_unread_results() -> None:
    flying = edge(emitted=2, finished=1, in_flight=1)
    assert not report(flying).balanced and report(flying, "running").balanced
    assert report(msgspec.structs.replace(flying, target="")).balanced


def test_rates_are_per_second_of_the_run() -> None:
    assert (edge(emitted=10, bytes=4_000_000).rate, edge(bytes=4_000_000).mb_s) == (5.0, 2.0)
    assert msgspec.structs.replace(edge(emitted=10), seconds=0.0).rate == 0.0


def test_the_report_tells_itself() -> None:
    text = str(report(edge(emitted=3, finished=2, dead=1)))
    assert "pipe p: completed after 2.00 s, books balanced" in text
    assert "a -> b: 3 emitted = 2 finished + 1 dead + 0 dropped + 0 in flight" in text and "2 restarts" in text
    assert "NOT BALANCED" in str(report(edge(emitted=3)))


def test_the_queues_of_a_keyed_edge_are_added_up() -> None:
    queues = [MemQ(4096), MemQ(4096)]
    for number, queue in enumerate(queues):
        for value in range(3 + number):
            queue.put(value)
        queue.get()
    found = edge_report("a", "b", [queue.stats() for queue in queues], 1.0)
    assert (found.emitted, found.finished, found.in_flight, found.capacity) == (7, 2, 5, 8192) and found.balanced
    for queue in queues:
        queue.close()
        queue.unlink()
