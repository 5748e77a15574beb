"""Which queues feed which on a node, from the plan of the node."""

from __future__ import annotations

from tests.cluster.test_lanes import CLIENT, one, seats
from tests.cluster.test_layout import at
from upipe.cluster.gate import Gate, Passage
from upipe.cluster.lanes import lay_out, relay
from upipe.cluster.passages import NONE, Passages, passages
from upipe.graph.spec import EdgeSpec, PipeSpec

ABC = PipeSpec("p", (one("a"), one("b"), one("c")), (EdgeSpec("a", "b"), EdgeSpec("b", "c")))


def found(spec: PipeSpec, placed: dict[str, str], node: str, client: str = CLIENT) -> Passages:
    return passages(at(spec, lay_out(spec, seats(**placed), client), node))


def named(passage: Passage) -> tuple[str, tuple[str, ...], bool]:
    return passage.name.rsplit("-", 1)[0], tuple(name.rsplit("-", 1)[0] for name in passage.feeds), passage.leaves


def test_where_nothing_arrives_nobody_is_told() -> None:
    assert found(ABC, {"a": "1", "b": "2", "c": "3"}, CLIENT).sinks != ()
    assert found(ABC, {"a": "1", "b": "1", "c": "1"}, "1", "") == NONE


def test_in_the_middle_what_arrives_feeds_what_leaves_and_the_answers() -> None:
    there = found(ABC, {"a": "1", "b": "2", "c": "3"}, "2")
    assert [named(passage) for passage in there.all] == [
        ("e0-a-b", ("e1-b-c", "replies"), False),
        ("e1-b-c", (), True),
        ("replies", (), True),
    ]
    assert (len(there.sinks), there.read) == (1, ())


def test_through_queues_that_are_read_here_and_results_only_from_the_last() -> None:
    there = found(ABC, {"a": "1", "b": "2", "c": "2"}, "2")
    assert [named(passage) for passage in there.all] == [
        ("e0-a-b", ("e1-b-c", "replies"), False),
        ("e1-b-c", ("results", "replies"), False),
        ("replies", (), True),
        ("results", (), True),
    ]
    assert [name.rsplit("-", 1)[0] for name in there.read] == ["e1-b-c"]
    Gate(there.all)  # in an order that it takes


def test_what_nobody_will_ever_read_is_not_waited_for() -> None:
    there = found(ABC, {"a": "1", "b": "2", "c": "2"}, "2", "")
    assert [named(passage) for passage in there.all] == [("e0-a-b", ("e1-b-c",), False), ("e1-b-c", (), False)]
    laid = lay_out(ABC, seats(a="1", b="2", c="3"), "")
    there = passages(at(ABC, laid, "2", discards=frozenset({"c"})))
    assert [named(passage) for passage in there.all] == [("e0-a-b", (), False)]


def test_what_waits_for_its_reader_is_neither_read_nor_left() -> None:
    laid = lay_out(ABC, seats(a="1", b="2", c="3"), "")
    lost = relay(ABC, laid, seats(a="1", b="2"), ["3"])
    there = passages(at(ABC, lost, "2"))
    assert [named(passage) for passage in there.all] == [("e0-a-b", ("e1-b-c",), False), ("e1-b-c", (), False)]
    assert there.read == ()


def test_a_closed_queue_still_counts_and_the_client_only_reads() -> None:
    spec = PipeSpec("p", (one("a"), one("b"), one("c", 2)), (EdgeSpec("a", "b"), EdgeSpec("b", "c")))
    laid = lay_out(spec, seats(a="1", b="2", c="33"), CLIENT)
    moved = relay(spec, laid, seats(a="1", b="2", c="23"))
    again = relay(spec, moved, seats(a="1", b="2", c="22"))
    there = passages(at(spec, again, "2"))
    arriving = next(passage for passage in there.all if passage.name in there.sinks)
    assert sum(name.startswith("e1-b-c") for name in arriving.feeds) == 2
    mine = passages(at(spec, again, CLIENT))
    assert mine.all and all(passage.feeds == () and not passage.leaves for passage in mine.all)
    assert mine.read == mine.fed == ()
