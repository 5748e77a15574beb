"""What each node does for a pipe, and the order in which it changes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings

from tests.cluster.test_lanes import AB, CLIENT, histories, one, seats
from upipe.cluster.lanes import lay_out, relay
from upipe.cluster.layout import HOLD, STEPS, MirrorPlan, NodePlan, Step, cluster_problems, node_plan, rewire
from upipe.errors import DeclarationError
from upipe.graph.plan import OutputPlan, plan
from upipe.graph.spec import EdgeSpec, PipeSpec
from upipe.settings import Settings

FENCE = (1, 1)


def at(spec: PipeSpec, laid: Any, node: str, **more: Any) -> NodePlan:
    return node_plan(spec, laid, node, more.pop("fence", FENCE), **more)


def test_on_one_node_it_is_the_plan_of_one_host_but_for_the_names() -> None:
    spec = PipeSpec(
        "p",
        (one("a", 2), one("b", 3), one("c", autoscale=2)),
        (EdgeSpec("a", "b", keyed=True), EdgeSpec("b", "c", size=65536, policy="latest"), EdgeSpec("a", "c")),
    )
    here = at(spec, lay_out(spec, seats(a="11", b="111", c="11"), CLIENT), "1").plan
    local = plan(spec)
    names = dict(zip([queue.name for queue in here.queues], [queue.name for queue in local.queues], strict=True))

    def renamed(value: Any) -> Any:
        if isinstance(value, msgspec.Struct):
            known = {name: renamed(getattr(value, name)) for name in value.__struct_fields__}
            return type(value)(**{**known, "local": 0}) if isinstance(value, OutputPlan) else type(value)(**known)
        if isinstance(value, tuple):
            return tuple(renamed(one) for one in value)
        return names.get(value, value) if isinstance(value, str) else value

    results = local.queues[-2]
    assert results.policy == "drop_oldest"  # on a cluster the client drops what nobody reads
    queues = (*local.queues[:-2], msgspec.structs.replace(results, policy="block"), local.queues[-1])
    assert renamed(here) == msgspec.structs.replace(local, queues=queues)


def test_a_worker_writes_into_local_queues_first_and_reads_what_comes_to_its_node() -> None:
    laid = lay_out(AB, seats(a="12", b="23"), CLIENT)
    first, second, third = (at(AB, laid, node) for node in "123")
    assert first.workers[0].outputs == (OutputPlan("b", ("e0-a-b-r0", "e0-a-b-r1"), 0, False, 0),)
    assert second.workers[0].outputs == (OutputPlan("b", ("e0-a-b-r2", "e0-a-b-r3"), 1, False, 1),)
    assert [out.choice for worker in second.workers for out in worker.outputs] == ["free", "only"]
    assert [(one.processor, one.index, one.inputs) for one in (*second.workers, *third.workers)] == [
        ("a", 1, ()),
        ("b", 0, ("e0-a-b-r0", "e0-a-b-r2")),
        ("b", 1, ("e0-a-b-r1", "e0-a-b-r3")),
    ]
    assert {queue.plan.name: queue.role for queue in second.queues if queue.plan.source == "a"} == {
        "e0-a-b-r0": "sink",
        "e0-a-b-r2": "home",
        "e0-a-b-r3": "home",
    }


def test_who_dials_is_the_client_or_the_node_with_the_lower_id() -> None:
    mirrors = {one.queue: one for one in at(AB, lay_out(AB, seats(a="11", b="22"), "0"), "2").mirrors}
    assert mirrors["e0-a-b-r0"] == MirrorPlan("e0-a-b-r0@2", "e0-a-b-r0", "1", "2", "1")
    assert mirrors["results-r1"] == MirrorPlan("results-r1@0", "results-r1", "2", "0", "0", 2)
    assert at(AB, lay_out(AB, seats(a="11", b="22"), "9"), "9").mirrors[0].dialer == "9"


def test_the_client_has_its_own_ends_and_no_workers() -> None:
    spec = PipeSpec("p", (one("a"), one("b")))
    laid = lay_out(spec, seats(a="1", b="2"), CLIENT)
    mine = at(spec, laid, CLIENT)
    assert mine.workers == () and [(queue.plan.name, queue.role) for queue in mine.queues] == [
        ("in0-a-r0", "home"),
        ("in1-b-r1", "home"),
        ("results-r2", "sink"),
        ("results-r3", "sink"),
        ("replies-r4", "sink"),
        ("replies-r5", "sink"),
    ]
    assert {one.dialer for one in mine.mirrors} == {CLIENT}


def test_ends_discards_and_leaving_are_marked_where_they_count() -> None:
    laid = lay_out(AB, seats(a="12", b="22"), CLIENT)
    told = at(AB, laid, "2", ends=frozenset({"e0-a-b"}), discards=frozenset({"b"}), leaving=("a#0", "b#1"))
    assert told.leaving == ("b#1",)
    assert [(queue.ends, queue.discard) for queue in told.queues] == [(True, True)] * 2 + [(False, False)] * 2


def test_too_many_writers_for_one_queue_are_a_clear_problem() -> None:
    spec = PipeSpec("p", (one("a", 600), one("b", 600)), (), Settings())
    assert "up to 1200 workers write into one queue, and a queue tells 1023 apart" in cluster_problems(spec)[0]
    with pytest.raises(DeclarationError):
        at(spec, lay_out(spec, seats(), ""), "1")
    assert HOLD == 1023


# ------------------------------------------------------------------ changing


def steps(old: NodePlan | None, new: NodePlan | None) -> list[tuple[str, str]]:
    return [(step.what, step.name) for step in rewire(old, new)]


def test_a_node_that_begins_makes_queues_then_mirrors_then_workers() -> None:
    new = at(AB, lay_out(AB, seats(a="1", b="2"), ""), "1")
    assert steps(None, new) == [
        ("make", "e0-a-b-r0"),
        ("make", "replies-r2"),
        ("mirror", "e0-a-b-r0@2"),
        ("start", "a#0"),
    ]
    assert steps(new, new) == [] and steps(None, None) == []
    assert steps(new, None) == [
        ("kill", "a#0"),
        ("unmirror", "e0-a-b-r0@2"),
        ("drop", "e0-a-b-r0"),
        ("drop", "replies-r2"),
    ]


def test_a_copy_whose_home_is_lost_is_promoted_before_anything_else() -> None:
    before = lay_out(AB, seats(a="12", b="33"), "")
    after = relay(AB, before, seats(a="22", b="33"), ["1"])
    told = steps(at(AB, before, "3"), at(AB, after, "3", fence=(2, 1), ends=frozenset({"e0-a-b"})))
    assert told == [
        ("promote", "e0-a-b-r0"),
        ("unmirror", "e0-a-b-r0@3"),
        ("end", "e0-a-b-r0"),
    ]


def test_a_running_worker_is_rewired_when_the_queues_are_there_and_before_old_ones_go() -> None:
    before = lay_out(AB, seats(a="1", b="22"), "")
    after = relay(AB, before, seats(a="1", b="23"))
    assert steps(at(AB, before, "1"), at(AB, after, "1")) == [
        ("make", "e0-a-b-r4"),
        ("mirror", "e0-a-b-r4@3"),
        ("rewire", "a#0"),
    ]
    leaving = at(AB, before, "2", leaving=("b#1",))
    assert steps(at(AB, before, "2"), leaving) == [("leave", "b#1")] and steps(leaving, leaving) == []


@given(histories())
@settings(deadline=None, max_examples=100)
def test_both_ends_of_a_mirror_agree_and_the_steps_lead_from_each_plan_to_the_next(history: Any) -> None:
    spec, moves = history
    laid, known = None, dict[str, NodePlan | None]()
    for number, (where, lost) in enumerate(moves):
        laid = relay(spec, laid, where, lost) if laid else lay_out(spec, where, CLIENT)
        plans = {node: at(spec, laid, node, fence=(number, 0)) for node in laid.nodes()}
        for node, told in plans.items():
            queues = {queue.plan.name: queue for queue in told.queues}
            for mirror in told.mirrors:
                other = plans[mirror.sink if node == mirror.source else mirror.source]
                assert mirror in other.mirrors and mirror.source != mirror.sink
                twin = {queue.plan.name: queue for queue in other.queues}[mirror.queue]
                assert twin.plan == queues[mirror.queue].plan
                assert {twin.role, queues[mirror.queue].role} == {"home", "sink"}
                assert CLIENT not in (mirror.source, mirror.sink) or mirror.dialer == CLIENT
            for worker in told.workers:
                assert set(worker.inputs) <= queues.keys()
                for output in worker.outputs:
                    assert output.queues and all(queues[name].role == "home" for name in output.queues)
                    assert not output.keyed or [queues[name].plan.partition for name in output.queues] == list(
                        range(len(output.queues))
                    )
                assert queues[worker.replies].role == "home"
        for node in {*plans, *known}:
            follow(known.get(node), plans.get(node), rewire(known.get(node), plans.get(node)))
        known = {**dict.fromkeys(known), **plans}


def follow(old: NodePlan | None, new: NodePlan | None, told: tuple[Step, ...]) -> None:
    """Do the steps, and see that each finds what it needs."""
    assert [STEPS.index(step.what) for step in told] == sorted(STEPS.index(step.what) for step in told)
    queues = {queue.plan.name for queue in old.queues} if old else set[str]()
    mirrors = {one.id for one in old.mirrors} if old else set[str]()
    workers = {f"{one.processor}#{one.index}": one for one in old.workers} if old else {}
    after = {f"{one.processor}#{one.index}": one for one in new.workers} if new else {}
    for step in told:
        if step.what == "make":
            queues.add(step.name)
        elif step.what == "mirror":
            assert step.name.partition("@")[0] in queues
            mirrors.add(step.name)
        elif step.what in ("start", "rewire"):
            worker = workers[step.name] = after[step.name]
            assert {*worker.inputs, *(name for output in worker.outputs for name in output.queues)} <= queues
        elif step.what == "kill":
            del workers[step.name]
        elif step.what == "unmirror":
            mirrors.remove(step.name)
        elif step.what == "drop":
            queues.remove(step.name)
            used = {name for one in workers.values() for out in one.outputs for name in out.queues}
            assert step.name not in used and not any(name.startswith(step.name + "@") for name in mirrors)
    assert queues == ({queue.plan.name for queue in new.queues} if new else set())
    assert mirrors == ({one.id for one in new.mirrors} if new else set()) and workers == after


def test_plans_travel() -> None:
    told = at(AB, lay_out(AB, seats(a="12", b="23"), CLIENT), "2")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=NodePlan) == told
    assert told.fence == (1, 1)
