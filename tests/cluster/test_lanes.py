"""Lanes follow the workers: every producer reaches every consumer it should, and nothing that can be had is lost."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from upipe.cluster.lanes import Lane, Layout, lay_out, prune, relay, streams
from upipe.cluster.placement import Placement
from upipe.graph.plan import ANY, PIPE, REPLIES
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec

CODE = "0" * 64
CLIENT = "client"


def one(name: str, workers: int = 1, **more: Any) -> ProcessorSpec:
    return ProcessorSpec(name, more.pop("kind", "map"), CODE, workers=workers, **more)


AB = PipeSpec("p", (one("a", 2, kind="source"), one("b", 2)), (EdgeSpec("a", "b"),))


def ends(layout: Layout, stream: str) -> list[tuple[str, str, bool]]:
    return [(lane.home, lane.reader, lane.open) for lane in layout.of(stream)]


def seats(**rows: str) -> Placement:
    """seats(a="12", b="2"): worker by worker, the node; "-" is nowhere."""
    return Placement({name: tuple("" if each == "-" else each for each in row) for name, row in rows.items()})


def test_on_one_node_there_is_one_queue_per_stream_as_on_one_host() -> None:
    laid = lay_out(AB, seats(a="11", b="11"), "")
    assert [(lane.name, lane.home, lane.reader) for lane in laid.lanes] == [
        ("e0-a-b-r0", "1", "1"),
        ("results-r1", "1", ""),
        ("replies-r2", "1", ""),
    ]


def test_each_node_that_writes_has_a_queue_for_each_that_reads() -> None:
    laid = lay_out(AB, seats(a="12", b="23"), CLIENT)
    assert ends(laid, "e0-a-b") == [("1", "2", True), ("1", "3", True), ("2", "2", True), ("2", "3", True)]
    assert ends(laid, "results") == [("2", CLIENT, True), ("3", CLIENT, True)]
    assert ends(laid, "replies") == [("1", CLIENT, True), ("2", CLIENT, True), ("3", CLIENT, True)]
    assert laid.nodes() == ("1", "2", "3", CLIENT)


def test_what_a_lost_reader_had_not_finished_goes_to_another() -> None:
    before = lay_out(AB, seats(a="11", b="23"), CLIENT)
    after = relay(AB, before, seats(a="11", b="22"), ["3"])
    assert ends(after, "e0-a-b") == [("1", "2", True), ("1", "2", False)]  # the second drains
    assert [lane.name for lane in after.of("e0-a-b")] == [lane.name for lane in before.of("e0-a-b")]


def test_while_nobody_reads_frames_wait_where_they_are() -> None:
    before = lay_out(AB, seats(a="11", b="33"), CLIENT)
    waiting = relay(AB, before, seats(a="11", b="--"), ["3"])
    assert ends(waiting, "e0-a-b") == [("1", "", True)]
    assert ends(relay(AB, waiting, seats(a="11", b="12")), "e0-a-b") == [("1", "1", True), ("1", "2", True)]


def test_the_copy_of_a_lost_home_is_what_is_left_and_drains_where_it_is() -> None:
    before = lay_out(AB, seats(a="12", b="33"), CLIENT)
    after = relay(AB, before, seats(a="22", b="33"), ["1"])
    assert ends(after, "e0-a-b") == [("3", "3", False), ("2", "3", True)]
    later = relay(AB, after, seats(a="22", b="44"))  # b leaves 3 while it drains: mirrored on, from there
    assert ends(later, "e0-a-b") == [("3", "4", False), ("2", "4", True)]
    assert relay(AB, after, seats(a="22", b="44"), ["3"]).of("e0-a-b")[0].home == "2"  # 3 lost as well: gone


def test_a_partition_is_read_by_its_worker_wherever_that_is() -> None:
    spec = PipeSpec("p", (one("a", 2), one("b", 2)), (EdgeSpec("a", "b", keyed=True),))
    before = lay_out(spec, seats(a="12", b="23"), CLIENT)
    assert [(r.home, r.partition, r.reader) for r in before.of("e0-a-b")] == [
        ("1", 0, "2"),
        ("1", 1, "3"),
        ("2", 0, "2"),
        ("2", 1, "3"),
    ]
    after = relay(spec, before, seats(a="12", b="2-"), ["3"])
    assert [(r.partition, r.reader) for r in after.of("e0-a-b")] == [(0, "2"), (1, ""), (0, "2"), (1, "")]
    assert [r.open for r in relay(spec, after, seats(a="12", b="21")).of("e0-a-b")] == [True] * 4


def test_only_closed_and_empty_lanes_are_removed_and_no_reader_is_left_without_a_queue() -> None:
    before = lay_out(AB, seats(a="12", b="33"), CLIENT)
    moved = relay(AB, before, seats(a="22", b="33"))
    names = [lane.name for lane in moved.lanes]
    assert ends(moved, "e0-a-b") == [("1", "3", False), ("2", "3", True)]
    assert ends(prune(moved, []), "e0-a-b") == ends(moved, "e0-a-b")
    assert ends(prune(moved, names), "e0-a-b") == [("2", "3", True)]
    alone = relay(AB, before, seats(a="--", b="33"))
    assert ends(prune(alone, [lane.name for lane in alone.lanes]), "e0-a-b") == ends(alone, "e0-a-b")


def test_a_reader_that_is_seated_while_nobody_writes_waits_at_a_queue_of_its_own() -> None:
    before = lay_out(AB, seats(a="11", b="1-"), CLIENT)
    lost = relay(AB, before, seats(a="--", b="23"), ["1"])
    assert ends(lost, "e0-a-b") == [("2", "2", False), ("3", "3", False)]  # or they would see the end of the stream
    assert ends(prune(lost, [lane.name for lane in lost.lanes]), "e0-a-b") == ends(lost, "e0-a-b")
    back = relay(AB, lost, seats(a="11", b="23"))
    assert ends(prune(back, [lane.name for lane in back.lanes]), "e0-a-b") == [("1", "2", True), ("1", "3", True)]


def test_without_its_client_a_pipe_takes_nothing_in_and_keeps_what_was_emitted() -> None:
    spec = PipeSpec("p", (one("a"),))
    before = lay_out(spec, seats(a="1"), CLIENT)
    assert ends(before, "in0-a") == [(CLIENT, "1", True)]
    after = relay(spec, before, seats(a="1"), [CLIENT])
    assert ends(after, "in0-a") == [("1", "1", False)] and ends(after, "results") == [("1", "", True)]
    assert after.client == ""


# ------------------------------------------------------------------ for every history

NODES = "1234"


@st.composite
def histories(draw: Any) -> tuple[PipeSpec, list[tuple[Placement, set[str]]]]:
    counts = {name: draw(st.integers(1, 3)) for name in "abc"}
    spec = PipeSpec(
        "p",
        tuple(one(name, count) for name, count in counts.items()),
        (EdgeSpec("a", "b", keyed=draw(st.booleans())), EdgeSpec("b", "c"), EdgeSpec("a", "c")),
    )
    steps: list[tuple[Placement, set[str]]] = []
    for number in range(draw(st.integers(1, 6))):
        lost = set(draw(st.lists(st.sampled_from(NODES), max_size=2))) if number else set()
        alive = [node for node in NODES if node not in lost] + ([""] if number else [])
        rows = {name: tuple(draw(st.sampled_from(alive)) for _ in range(count)) for name, count in counts.items()}
        steps.append((Placement(rows), lost))
    return spec, steps


def check(spec: PipeSpec, laid: Layout) -> None:
    names = [lane.name for lane in laid.lanes]
    assert len(set(names)) == len(names)
    where = laid.placement
    for stream in streams(spec):
        lanes = laid.of(stream.name)
        writers = {PIPE: {laid.client}, ANY: set(where.nodes())}.get(stream.source, set(where.nodes(stream.source)))
        if stream.name == "results":
            writers = {node for one in spec.ends() for node in where.nodes(one.name)}
        for home in writers:
            mine = [lane for lane in lanes if lane.home == home and lane.open]
            if stream.keyed:
                row = where.seats[stream.target]
                assert sorted((lane.partition, lane.reader) for lane in mine) == list(enumerate(row))
            else:
                able = {laid.client} if stream.target == PIPE else set(where.nodes(stream.target))
                assert sorted(lane.reader for lane in mine) == sorted(able or {""})
        if PIPE not in (stream.source, stream.target):
            readers = {node for node in where.seats[stream.target] if node}
            assert readers <= {lane.reader for lane in lanes}, "a worker without input sees the end"
        for lane in lanes:
            assert lane.home
            assert not lane.open or lane.home in writers
            if stream.target != PIPE:
                able = set(where.nodes(stream.target)) if lane.partition < 0 else {where.seats["b"][lane.partition]}
                assert lane.reader in able or (not able - {""} and lane.reader == "")


@given(histories())
@settings(deadline=None, max_examples=200)
def test_every_writer_reaches_every_reader_and_what_a_living_node_holds_stays(history: Any) -> None:
    spec, steps = history
    laid, seen = None, set[str]()
    for where, lost in steps:
        before: tuple[Lane, ...] = laid.lanes if laid else ()
        laid = relay(spec, laid, where, lost) if laid else lay_out(spec, where, CLIENT)
        check(spec, laid)
        now = {lane.name: lane for lane in laid.lanes}
        for lane in before:
            if lane.home not in lost:
                assert now[lane.name].home == lane.home
            elif lane.reader not in ("", lane.home) and lane.reader not in lost:
                assert now[lane.name].home == lane.reader and not now[lane.name].open
            else:
                assert lane.name not in now  # no copy of it is left
        assert not (now.keys() - {lane.name for lane in before}) & seen  # a name is never used again
        seen |= now.keys()
        assert relay(spec, laid, where) == laid  # nothing changes when nothing happened
        pruned = prune(laid, now)
        check(spec, pruned)
        assert {(r.stream, r.reader, r.partition) for r in pruned.lanes} == {
            (r.stream, r.reader, r.partition) for r in laid.lanes
        }
    assert laid is None or REPLIES in {lane.stream for lane in laid.lanes} or not laid.placement.nodes()


def test_a_lane_that_gets_another_reader_is_another_pair_with_a_higher_number() -> None:
    spec = PipeSpec("p", (one("a"), one("b")), (EdgeSpec("a", "b"),))
    first = lay_out(spec, Placement({"a": ("1",), "b": ("2",)}), "")
    lost = relay(spec, first, Placement({"a": ("1",), "b": ("",)}), ["2"])
    back = relay(spec, lost, Placement({"a": ("1",), "b": ("2",)}))
    pairs = [laid.of("e0-a-b")[0].pair for laid in (first, lost, back)]
    assert [laid.of("e0-a-b")[0].reader for laid in (first, lost, back)] == ["2", "", "2"]
    assert pairs == sorted(set(pairs)), "each higher than before"
    assert relay(spec, back, back.placement) == back, "and the same as long as nothing changes"
