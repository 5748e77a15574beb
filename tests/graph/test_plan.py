"""The physical layout of a pipe on one host."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upipe.errors import DeclarationError
from upipe.graph.plan import (
    ANY,
    DRIVER_INPUT_BYTES,
    PIPE,
    REPLIES,
    RESULTS,
    SLOTS,
    OutputPlan,
    Plan,
    QueuePlan,
    WorkerPlan,
    plan,
    topological_order,
)
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.settings import MIB, Settings

CODE = "0" * 64


def processor(name: str, kind: str = "map", workers: int = 1, autoscale: int | None = None) -> ProcessorSpec:
    if kind == "entry":
        return ProcessorSpec(name, kind, entry="x.py", workers=workers, autoscale=autoscale)
    return ProcessorSpec(name, kind, code=CODE, workers=workers, autoscale=autoscale)


def pipe(processors: list[ProcessorSpec], *edges: EdgeSpec, **knobs: int) -> PipeSpec:
    return PipeSpec("p", tuple(processors), edges, Settings(**knobs))  # type: ignore[arg-type]


def queues(made: Plan) -> dict[str, QueuePlan]:
    return {queue.name: queue for queue in made.queues}


def worker(made: Plan, name: str, index: int = 0) -> WorkerPlan:
    return next(one for one in made.workers if (one.processor, one.index) == (name, index))


def test_the_seed_example() -> None:
    made = plan(pipe([processor("a", "driver"), processor("b", "driver")], EdgeSpec("a", "b")))
    assert made.pipe == "p"
    assert made.order == ("a", "b")
    assert made.queues == (
        QueuePlan("in0-a", PIPE, "a", -1, DRIVER_INPUT_BYTES, "block", (0,)),
        QueuePlan("e0-a-b", "a", "b", -1, 32 * MIB, "block", (0,)),
        QueuePlan(RESULTS, ANY, PIPE, -1, 32 * MIB, "drop_oldest", (0,)),
        QueuePlan(REPLIES, ANY, PIPE, -1, 32 * MIB, "block", (0, 1)),
    )
    assert made.workers == (
        WorkerPlan("a", 0, ("in0-a",), (OutputPlan("b", ("e0-a-b",), 0),), REPLIES, 0),
        WorkerPlan("b", 0, ("e0-a-b",), (OutputPlan(PIPE, (RESULTS,), 0),), REPLIES, 1),
    )
    assert made.capacity == 97 * MIB
    assert made.queues[1].edge == ("a", "b")


@pytest.mark.parametrize(
    ("kind", "capacity"), [("map", 2 * MIB), ("class", 2 * MIB), ("driver", MIB), ("entry", MIB), ("source", None)]
)
def test_roots_are_fed_by_the_pipe_unless_they_are_sources(kind: str, capacity: int | None) -> None:
    made = plan(pipe([processor("a", kind)], edge_bytes=2 * MIB))
    assert worker(made, "a").inputs == (() if capacity is None else ("in0-a",))
    assert {queue.capacity for queue in made.queues if queue.source == PIPE} == set(filter(None, [capacity]))


def test_every_worker_is_a_producer_autoscale_included() -> None:
    made = plan(pipe([processor("a", workers=2, autoscale=4), processor("b", workers=3)], EdgeSpec("a", "b")))
    assert queues(made)["e0-a-b"].producers == (0, 1, 2, 3)
    assert [worker(made, "a", index).outputs[0].producer for index in range(4)] == [0, 1, 2, 3]
    assert queues(made)[RESULTS].producers == (0, 1, 2)
    assert queues(made)[REPLIES].producers == tuple(range(7))
    assert [one.reply_producer for one in made.workers] == list(range(7))


def test_keyed_edge_has_a_queue_per_worker_of_the_target() -> None:
    spec = pipe(
        [processor("a", workers=2), processor("b", workers=3), processor("c", "source")],
        EdgeSpec("a", "b", size=MIB, keyed=True),
        EdgeSpec("c", "b"),
    )
    made = plan(spec)
    parts = [queue for queue in made.queues if queue.edge == ("a", "b")]
    assert [(one.name, one.partition, one.capacity, one.producers) for one in parts] == [
        ("e0-a-b-p0", 0, MIB, (0, 1)),
        ("e0-a-b-p1", 1, MIB, (0, 1)),
        ("e0-a-b-p2", 2, MIB, (0, 1)),
    ]
    output = OutputPlan("b", ("e0-a-b-p0", "e0-a-b-p1", "e0-a-b-p2"), 1, keyed=True)
    assert worker(made, "a", 1).outputs == (output,)
    assert [worker(made, "b", index).inputs for index in range(3)] == [
        (f"e0-a-b-p{index}", "e1-c-b") for index in range(3)
    ]


def test_ends_share_the_results_with_disjoint_producers() -> None:
    spec = pipe(
        [processor("b", workers=2), processor("a"), processor("c", workers=3)], EdgeSpec("a", "b"), EdgeSpec("a", "c")
    )
    made = plan(spec)
    ids = [(one.processor, out.producer) for one in made.workers for out in one.outputs if out.target == PIPE]
    assert ids == [("b", 0), ("b", 1), ("c", 2), ("c", 3), ("c", 4)]
    assert queues(made)[RESULTS].producers == (0, 1, 2, 3, 4)
    assert [out.target for out in worker(made, "a").outputs] == ["b", "c"]


@pytest.mark.parametrize(("size", "capacity"), [(MIB, 8 * MIB), (64 * MIB, 64 * MIB)])
def test_results_and_replies_hold_what_the_largest_edge_holds(size: int, capacity: int) -> None:
    made = plan(pipe([processor("a", "source"), processor("b")], EdgeSpec("a", "b", size=size)))
    assert queues(made)[RESULTS].capacity == queues(made)[REPLIES].capacity == capacity


def test_edges_keep_their_policy() -> None:
    made = plan(pipe([processor("a", "source"), processor("b")], EdgeSpec("a", "b", policy="latest")))
    assert queues(made)["e0-a-b"].policy == "latest"


def test_long_names_that_begin_alike_stay_apart() -> None:
    one, two, three = ("x" * 60 + tail for tail in ("1", "2", "3"))
    made = plan(pipe([processor(one), processor(two), processor(three)], EdgeSpec(one, two), EdgeSpec(one, three)))
    names = [queue.name for queue in made.queues]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 40


def test_a_bad_pipe_is_refused_with_everything_that_is_wrong() -> None:
    with pytest.raises(DeclarationError) as caught:
        plan(pipe([processor("a", workers=0)], EdgeSpec("a", "b")))
    assert len(caught.value.problems) == 2


def test_more_workers_than_can_hold_a_queue_open() -> None:
    plan(pipe([processor("a", workers=SLOTS - 1)]))
    with pytest.raises(DeclarationError, match=rf"up to {SLOTS} workers in all .* one host runs {SLOTS - 1}"):
        plan(pipe([processor("a", workers=SLOTS - 3), processor("b", autoscale=3)]))


def test_slots_are_those_of_the_layout() -> None:
    layout = pytest.importorskip("upipe.memq.layout")
    assert layout.SLOTS == SLOTS


def test_topological_order_follows_declaration_and_refuses_cycles() -> None:
    everyone = [processor(name) for name in "dcba"]
    assert topological_order(pipe(everyone, EdgeSpec("a", "b"), EdgeSpec("b", "d"))) == ("c", "a", "b", "d")
    with pytest.raises(DeclarationError, match="b -> a -> b"):
        topological_order(pipe(everyone, EdgeSpec("a", "b"), EdgeSpec("b", "a")))
    with pytest.raises(DeclarationError, match="a -> a"):
        topological_order(pipe(everyone, EdgeSpec("a", "a")))


@st.composite
def specs(draw: st.DrawFn) -> PipeSpec:
    """Any acyclic pipe: edges lead from earlier to later in a hidden order."""
    count = draw(st.integers(1, 6))
    edges = [
        EdgeSpec(f"n{source}", f"n{target}", keyed=draw(st.booleans()))
        for source in range(count)
        for target in range(source + 1, count)
        if draw(st.booleans())
    ]
    keyed = {edge.target for edge in edges if edge.keyed}
    fed = {edge.target for edge in edges}
    processors = []
    for name in (f"n{index}" for index in range(count)):
        kind = draw(st.sampled_from(["map", "class", "driver", "entry"] if name in fed else ["map", "entry", "source"]))
        workers = draw(st.integers(1, 4))
        fixed = name in keyed or kind == "source"
        autoscale = None if fixed else draw(st.sampled_from([None, workers, workers + 2]))
        processors.append(processor(name, kind, workers, autoscale))
    return PipeSpec("p", tuple(draw(st.permutations(processors))), tuple(draw(st.permutations(edges))))


@settings(max_examples=60)
@given(spec=specs())
def test_any_plan_is_closed_deterministic_and_serialisable(spec: PipeSpec) -> None:
    made = plan(spec)
    assert plan(spec) == made
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Plan) == made
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=PipeSpec) == spec
    by_name = queues(made)
    assert len(by_name) == len(made.queues)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name) for name in by_name)

    written: dict[str, list[int]] = {name: [] for name in by_name}
    read: dict[str, list[int]] = {name: [] for name in by_name}
    for one in made.workers:
        written[one.replies].append(one.reply_producer)
        for name in one.inputs:
            assert by_name[name].target == one.processor
            read[name].append(one.index)
        for output in one.outputs:
            for name in output.queues:
                assert by_name[name].target == output.target
                written[name].append(output.producer)
    most = {one.name: one.most_workers for one in spec.processors}
    for queue in made.queues:
        assert queue.source == PIPE or sorted(written[queue.name]) == list(queue.producers)
        if queue.target != PIPE:
            assert read[queue.name] == (list(range(most[queue.target])) if queue.partition < 0 else [queue.partition])

    place = {name: index for index, name in enumerate(made.order)}
    assert set(place) == set(most)
    assert all(place[edge.source] < place[edge.target] for edge in spec.edges)
