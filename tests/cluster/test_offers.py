"""What nodes offer, what they have promised, and that nothing is promised twice, however little coordinators know."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.test_placement import node, one, pipe, placed
from tests.cluster.world import Refusal, World
from upipe.cluster.dealings import NodeUp
from upipe.cluster.lanes import lay_out
from upipe.cluster.layout import NodePlan
from upipe.cluster.messages import NodeInfo, Resources
from upipe.cluster.offers import beyond, needs, promised
from upipe.cluster.placement import Placement
from upipe.cluster.record import Record
from upipe.graph.spec import PipeSpec

INFO = NodeInfo("1" * 16, "c", ("10.0.0.1",), 7420, 0, resources=Resources(cpu=4.0))
SPEC = pipe(one("a", 4, cpu=1.5))


def record(id: str, seats: str, state: str = "running", spec: PipeSpec = SPEC) -> Record:  # noqa: A002
    placement = Placement({"a": tuple(each * 16 for each in seats)})
    return Record(id, spec, 1, 1, "1", ("1",), "1", lay_out(spec, placement, ""), wanted=placement, state=state)


def test_what_a_node_tells_counts_for_pipes_whose_records_lie_elsewhere() -> None:
    info = msgspec.structs.replace(INFO, promised={"far": {"cpu": 1.0}, "mine": {"cpu": 3.0}})
    assert promised(info, [], "mine") == {"cpu": 1.0}
    assert promised(info, [record("near", "1222")], "mine") == {"cpu": 2.5}
    assert promised(info, [record("far", "1122")], "mine") == {"cpu": 3.0}  # its record knows more already
    assert promised(info, [record("far", "2222")], "mine") == {"cpu": 1.0}  # or is old, and the node knows better
    assert promised(info, [record("far", "1111", "completed")], "mine") == {}
    assert promised(info, [], "") == {"cpu": 4.0}


def test_a_node_refuses_what_it_has_not_and_says_what_is_missing() -> None:
    seats = [("a", index) for index in range(4)]
    assert beyond({"cpu": 4.0}, {}, SPEC, seats[:2], ()) == ((), "")
    refused, why = beyond({"cpu": 4.0}, {"cpu": 1.0}, SPEC, seats, ())
    assert refused == (("a", 2), ("a", 3)) and why == "worker a#2 needs 1.5 of cpu, and 0 of 4 is left"
    assert beyond({"cpu": 4.0}, {"cpu": 4.0}, SPEC, seats[:2], seats[:2]) == ((), "")  # they run there
    assert beyond({"cpu": 4.0}, {}, SPEC, seats, seats[2:])[0] == (("a", 0), ("a", 1))
    gpu = pipe(one("a", 1, resources=(("gpu", 1.0),)))
    assert beyond({"cpu": 4.0}, {}, gpu, [("a", 0)], ())[1] == "worker a#0 needs 1 of gpu, and 0 of 0 is left"


def test_what_runs_stays_whatever_others_are_said_to_take() -> None:
    spec = pipe(one("a", 2))
    current = Placement({"a": ("1", "1")})
    assert placed(spec, node("1", 2, taken={"cpu": 2.0}), node("2", 8), current=current) == current
    more = pipe(one("a", 3))
    current = Placement({"a": ("1", "1", "")})
    assert placed(more, node("1", 3, taken={"cpu": 1.0}), node("2", 8), current=current).seats["a"] == ("1", "1", "2")


# ------------------------------------------------------------------ two coordinators, which know nothing of each other


class Owners:
    """The nodes, as they see themselves, under several pipes."""

    def __init__(self, ids: str, cpu: float) -> None:
        self.ids, self.cpu = ids, cpu
        self.worlds: dict[str, World] = {}
        self.specs: dict[str, PipeSpec] = {}
        self.refusals = 0

    def run(self, name: str, spec: PipeSpec, to: str) -> World:
        world = self.worlds[name] = World(self.ids, cpu=self.cpu)
        self.specs[name] = spec
        for there, keeper in world.keepers.items():
            keeper.room = lambda plan, runs, there=there: self.room(name, there, plan, runs)
        assert world.submit(spec, to) is None
        return world

    def used(self, there: str, but: str = "") -> float:
        return sum(
            needs(self.specs[name], world.keepers[there].seats()).get("cpu", 0.0)
            for name, world in self.worlds.items()
            if name != but and world.keepers[there].plan is not None
        )

    def room(self, name: str, there: str, plan: NodePlan, runs: set[str]) -> Refusal:
        others = {"cpu": self.used(there, name)}
        seats = [(worker.processor, worker.index) for worker in plan.workers]
        agreed = [seat for seat in seats if f"{seat[0]}#{seat[1]}" in runs]
        refused, _ = beyond({"cpu": self.cpu}, others, self.specs[name], seats, agreed)
        self.refusals += len(refused)
        return refused, others

    def gossip(self) -> None:
        """Every coordinator hears what each node has promised to the others."""
        for name, world in self.worlds.items():
            for there in self.ids:
                taken = {"cpu": self.used(there, name)}
                world.nodes[there] = msgspec.structs.replace(world.nodes[there], taken=taken)
                for agent in sorted(world.alive):
                    if agent in world.schedulers and there in world.seen[agent]:
                        world.event(agent, NodeUp(world.nodes[there]))

    def settle(self, rounds: int, gossip: bool) -> None:
        for _ in range(rounds):
            for world in self.worlds.values():
                world.settle(1)
                for there in self.ids:
                    assert self.used(there) <= self.cpu, "promised twice"
            if gossip:
                self.gossip()


@pytest.mark.parametrize("gossip", [True, False])
def test_on_twelve_nodes_two_coordinators_fill_the_cluster_and_nothing_is_promised_twice(gossip: bool) -> None:
    owners = Owners("123456789abc", cpu=4)  # 48 cores; members are 7, so neither record lies everywhere
    first = owners.run("one", pipe(one("a", 20)), "1")
    second = owners.run("two", pipe(one("a", 24)), "c")
    owners.settle(40, gossip)
    assert owners.refusals > 0, "both had chosen the same nodes"
    assert len(first.running()) == 20 and len(second.running()) == 24
    assert first.leader.waiting == second.leader.waiting == ""


def test_what_finds_no_room_anywhere_waits_with_a_reason_and_begins_when_the_other_pipe_ends() -> None:
    owners = Owners("0123456789", cpu=2)
    first = owners.run("one", pipe(one("a", 16)), "0")
    second = owners.run("two", pipe(one("a", 10)), "9")
    owners.settle(40, True)
    assert len(first.running()) + len(second.running()) == 20
    late = first if first.leader.waiting else second
    assert "has cpu 0 left of cpu 2, cpu 1 is needed" in late.told[-1].waiting
    other = first if late is second else second
    other.over = True
    owners.settle(40, True)
    assert other.leader.record.state == "completed"
    assert late.leader.waiting == "" and len(late.running()) == (16 if late is first else 10)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=200 if os.environ.get("UPIPE_LONG") else 4, deadline=None)
def test_whatever_is_heard_late_and_whoever_dies_nothing_is_promised_twice(data: Any) -> None:
    owners = Owners("0123456789", cpu=3)
    names = ["one", "two", "three"]
    for number, name in enumerate(names):
        owners.run(name, pipe(one("a", data.draw(st.integers(1, 9))), one("b", 2, cpu=0.5)), "059"[number])
    for _ in range(data.draw(st.integers(1, 6))):
        owners.settle(data.draw(st.integers(1, 8)), data.draw(st.booleans()))
        node_ = data.draw(st.sampled_from("12346"))
        for world in owners.worlds.values():
            if node_ in world.alive:
                world.kill_node(node_)
            else:
                world.start_agent(node_)
    for world in owners.worlds.values():
        for each in owners.ids:
            world.start_agent(each)
    owners.settle(60, True)
    for name, world in owners.worlds.items():
        wanted = sum(each.workers for each in owners.specs[name].processors)
        assert world.leader.waiting == "" and len(world.running()) == wanted
