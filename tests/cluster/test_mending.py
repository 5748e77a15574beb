"""Mirrors that failed for good: fresh pairs while that helps, and then a sentence."""

from __future__ import annotations

import msgspec
import pytest

from tests.cluster.test_lanes import CLIENT, seats
from tests.cluster.test_placement import one, pipe
from tests.cluster.test_scheduler import begun, healthy
from upipe.cluster.dealings import NodeReport, QueueState
from upipe.cluster.lanes import Lane, Layout, lay_out, relay
from upipe.cluster.mending import MOST, mended
from upipe.graph.spec import EdgeSpec

SPEC = pipe(one("a"), one("b"), EdgeSpec("a", "b"))
LAID = lay_out(SPEC, seats(a="1", b="2"), CLIENT)
EDGE = "e0-a-b"


def lane(layout: Layout, stream: str = EDGE) -> Lane:
    (found,) = [each for each in layout.of(stream) if each.open]
    return found


def told(layout: Layout, node: str, at: int = 64, epoch: int | None = None) -> dict[str, NodeReport]:
    broken = lane(layout)
    mirrored = broken.reader not in ("", broken.home)
    known = broken.pair + 1 if mirrored else 0
    state = QueueState(broken="the header is none", epoch=known if epoch is None else epoch, broken_at=at)
    return {node: NodeReport(node, 1, queues={broken.name: state})}


@pytest.mark.parametrize("node", ["1", "2"])
def test_whichever_end_tells_the_lane_gets_a_fresh_pair_of_copies_and_nothing_else_changes(node: str) -> None:
    after, reasons = mended(SPEC, LAID, told(LAID, node), ())
    before = lane(LAID)
    assert reasons == () and after.made == LAID.made + 1
    assert lane(after) == msgspec.structs.replace(before, pair=LAID.made, mended=1, broken_at=64)
    assert [each for each in after.lanes if each.name != before.name] == [
        each for each in LAID.lanes if each.name != before.name
    ]
    assert mended(SPEC, after, told(LAID, node), ()) == (after, ())  # of the pair before: nothing new


@pytest.mark.parametrize(
    ("reports", "lost"), [({}, ()), (told(LAID, "1"), ("1",)), (told(LAID, "1", epoch=99), ()), (told(LAID, "9"), ())]
)
def test_without_a_fault_of_this_pair_nothing_changes(reports: dict[str, NodeReport], lost: tuple[str, ...]) -> None:
    assert mended(SPEC, LAID, reports, lost) == (LAID, ())


def test_one_that_breaks_at_the_same_place_again_and_again_fails_with_edge_nodes_and_reason() -> None:
    layout = LAID
    for _ in range(MOST):
        layout, reasons = mended(SPEC, layout, told(layout, "2"), ())
        assert reasons == ()
    after, (reason,) = mended(SPEC, layout, told(layout, "2"), ())
    assert lane(after) == lane(layout)
    assert reason == (
        "edge a -> b from node 1 to node 2 cannot go on (2 fresh pairs of copies did not help): "
        "node 2 says: the header is none"
    )


def test_one_that_gets_further_each_time_goes_on_for_ever_and_another_reader_begins_anew() -> None:
    layout = LAID
    for at in range(64, 64 * 20, 64):
        layout, reasons = mended(SPEC, layout, told(layout, "2", at), ())
        assert reasons == () and lane(layout).mended == 1
    moved = lane(relay(SPEC, layout, seats(a="1", b="3"), ["2"]))
    assert (moved.reader, moved.mended, moved.broken_at) == ("3", 0, 0)


def test_a_queue_without_a_copy_that_cannot_be_used_fails_the_pipe() -> None:
    layout = lay_out(SPEC, seats(a="1", b="1"), CLIENT)
    after, (reason,) = mended(SPEC, layout, told(layout, "1"), ())
    assert after == layout and reason == "edge a -> b on node 1 cannot go on: node 1 says: the header is none"


# ------------------------------------------------------------------ with coordinator and keepers


def test_a_coordinator_mends_what_a_node_tells_as_broken_and_the_pipe_goes_on() -> None:
    world = begun()
    broken = next(each for each in healthy(world).layout.of(EDGE) if each.reader != each.home)
    world.keepers[broken.reader].faults[broken.name] = broken.pair + 1
    world.settle(20)
    after = next(each for each in healthy(world).layout.of(EDGE) if each.name == broken.name)
    assert after.pair > broken.pair and (after.mended, after.home, after.reader) == (1, broken.home, broken.reader)
    plan = world.keepers[broken.reader].plan
    assert plan is not None and {each.epoch for each in plan.mirrors if each.queue == broken.name} == {after.pair + 1}


def test_what_no_fresh_pair_mends_fails_the_pipe_and_says_so_to_who_submitted_it() -> None:
    world = begun()
    broken = next(each for each in healthy(world).layout.of(EDGE) if each.reader != each.home)
    world.keepers[broken.reader].faults[broken.name] = 1 << 20
    world.settle(40)
    assert world.leader.record.state == "failed" and world.running() == []
    (reason,) = world.told[-1].reasons
    assert f"edge a -> b from node {broken.home} to node {broken.reader} cannot go on" in reason
    assert "no frame starts there" in reason
