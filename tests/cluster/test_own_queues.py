"""The submitting process's own queues, as plans come: homes of what it emits, copies of what comes to it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from upipe.cluster.lanes import Layout, lay_out, relay
from upipe.cluster.layout import NodePlan, node_plan
from upipe.cluster.own_queues import OwnQueues
from upipe.cluster.placement import Placement
from upipe.errors import EndOfStream, PickleRefused, QueueNotFound
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.memq import segment
from upipe.memq.queue import MemQ
from upipe.settings import Settings

CLIENT = "c"
SPEC = PipeSpec(
    "p", (ProcessorSpec("a", workers=2), ProcessorSpec("b")), (EdgeSpec("a", "b"),), Settings(allow_pickle=False)
)
TWO = lay_out(SPEC, Placement({"a": ("1", "2"), "b": ("2",)}), CLIENT)


def plan(layout: Layout, revision: int = 1, ends: tuple[str, ...] = ()) -> NodePlan:
    return node_plan(SPEC, layout, CLIENT, (1, revision), ends=frozenset(ends))


@pytest.fixture
def own() -> Iterator[OwnQueues]:
    made = OwnQueues(SPEC)
    yield made
    made.end()


def files() -> set[str]:
    return {path.name for path in segment.process_session().path.iterdir() if ".in0" in path.name or ".re" in path.name}


def test_it_makes_what_the_plan_says_and_leaves_nothing() -> None:
    before, own = files(), OwnQueues(SPEC)
    own.follow(plan(TWO))
    assert [one.name for one in own.inputs.queues] == ["in0-a-r0", "in0-a-r1"]
    assert {name.partition("-")[0] for name in own.of("results")} == {"results"}
    assert len(own.of("replies")) == 2 and len(files() - before) == len(own.queues)
    assert all(MemQ.attach(label).name == label for label in own.labels.values())
    own.follow(plan(TWO, 2))
    assert len(own.queues) == len(own.labels)  # again changes nothing
    own.end()
    own.end()
    assert files() == before


def test_a_copy_whose_mirror_broke_begins_anew_and_what_was_not_read_is_not_read_there(own: OwnQueues) -> None:
    own.follow(plan(TWO))
    before, labels = dict(own.queues), own.labels
    (name,) = own.of("results")
    lanes = tuple(msgspec.structs.replace(one, pair=9) if one.name == name else one for one in TWO.lanes)
    own.follow(plan(msgspec.structs.replace(TWO, lanes=lanes, made=10), 2))
    assert {one for one in own.queues if own.queues[one] is not before[one]} == {name}
    assert own.labels[name] != labels[name] and own.of("results")[name] is own.queues[name]
    with pytest.raises(QueueNotFound):
        MemQ.attach(labels[name])
    before[name].close()


def test_a_home_does_not_end_before_its_hold_is_closed(own: OwnQueues) -> None:
    own.follow(plan(TWO))
    queue = own.queues["in0-a-r0"]
    assert queue.send(7)
    own.close_input()
    assert queue.get_or(None) == 7 and queue.get_or("nothing") == "nothing"
    own.follow(plan(TWO, 2, ("in0-a",)))
    with pytest.raises(EndOfStream):
        queue.get_or(None)


def test_pickles_are_refused_unless_the_pipe_takes_them(own: OwnQueues) -> None:
    own.follow(plan(TWO))
    with pytest.raises(PickleRefused):
        own.queues["in0-a-r0"].send({1, 2})


def test_a_queue_that_drains_is_left_and_then_dropped(own: OwnQueues) -> None:
    own.follow(plan(TWO))
    gone = relay(SPEC, TWO, Placement({"a": ("2", "2"), "b": ("2",)}), ("1",))
    own.follow(plan(gone, 2))
    [open_] = own.inputs.queues
    [closed] = [name for name in own.queues if name.startswith("in0") and name != open_.name]
    reader = MemQ.attach(own.labels[closed])
    own.leave()
    assert reader.counters()["stream"] == 1  # the hold keeps it; only our end is closed
    without = msgspec.structs.replace(gone, lanes=tuple(lane for lane in gone.lanes if lane.name != closed))
    own.follow(plan(without, 3))
    assert closed not in own.queues and closed not in own.labels


def test_queues_that_come_after_the_input_was_closed_are_closed_too(own: OwnQueues) -> None:
    one = lay_out(SPEC, Placement({"a": ("1", "1"), "b": ("1",)}), CLIENT)
    own.follow(plan(one))
    own.close_input()
    two = relay(SPEC, one, Placement({"a": ("1", "2"), "b": ("1",)}))
    own.follow(plan(two, 2, ("in0-a",)))
    for name in (one.name for one in own.inputs.queues):
        with pytest.raises(EndOfStream):
            own.queues[name].get_or(None)


def test_the_copy_of_a_queue_whose_home_was_lost_becomes_its_home(own: OwnQueues) -> None:
    own.follow(plan(TWO))
    [results] = own.of("results")
    lost = relay(SPEC, TWO, Placement({"a": ("1", "1"), "b": ("1",)}), ("2",))
    own.follow(plan(lost, 2))
    queue = own.of("results")[results]
    assert queue.get_or("nothing") == "nothing"  # it has not ended
    own.follow(plan(lost, 3, ("results",)))
    with pytest.raises(EndOfStream):
        queue.get_or(None)


def test_at_the_end_emits_are_dropped_and_what_came_can_be_read() -> None:
    own = OwnQueues(SPEC)
    own.follow(plan(TWO))
    home = own.queues["in0-a-r0"]
    [copy] = own.of("results").values()
    own.end()
    assert home.send(1) and home.stats().refused == 1
    with pytest.raises(EndOfStream):
        copy.get_or(None)
