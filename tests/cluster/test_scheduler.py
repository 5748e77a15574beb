"""The scheduler in simulated time: nodes die, drain and come, coordinators too, and the network loses and repeats."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.test_placement import one, pipe
from tests.cluster.world import World
from upipe.cluster.dealings import Arrange, DrainPipe, NodeReport, NodeUp, Reported, StopPipe, Tick
from upipe.cluster.placement import Unplaceable
from upipe.cluster.planning import crews
from upipe.cluster.record import Crew, Record
from upipe.cluster.scheduler import HELD
from upipe.graph.spec import EdgeSpec, PipeSpec
from upipe.settings import Place

SPREAD = Place(how="spread")
SPEC = pipe(one("a", 2), one("b", 4, place=SPREAD), EdgeSpec("a", "b"))
EVERYBODY = ["a#0", "a#1", "b#0", "b#1", "b#2", "b#3"]


def begun(ids: str = "123", spec: PipeSpec = SPEC, **more: Any) -> World:
    world = World(ids, **more)
    assert world.submit(spec, ids[0]) is None
    world.settle(10)
    assert world.leader.me == ids[0]
    return world


def join(world: World, node: str) -> None:
    """A node comes."""
    world.nodes[node] = msgspec.structs.replace(world.nodes["1"], id=node, host=f"h{node}")
    world.keepers[node] = type(world.keepers["1"])(node)
    world.seen[node] = {node}
    world.alive.add(node)
    world.settle(10)


def workers(spec: PipeSpec) -> list[str]:
    return sorted(f"{one.name}#{index}" for one in spec.processors for index in range(one.workers))


def healthy(world: World, spec: PipeSpec = SPEC) -> Record:
    """Every worker runs exactly once, where the record that counts says."""
    record = world.leader.ballot.counted
    assert record is not None and record == world.leader.record
    assert world.running() == workers(spec)
    for node, keeper in world.keepers.items():
        assert not keeper.runs or keeper.fence == record.fence
        for name in keeper.runs:
            processor, _, index = name.partition("#")
            assert record.layout.placement.seats[processor][int(index)] == node
    return record


def test_a_submitted_pipe_runs_everywhere_it_was_placed() -> None:
    world = begun()
    record = healthy(world)
    assert record.members == ("1", "2", "3") and record.decider == "1" and (record.epoch, record.evicted) == (1, {})
    assert {node for node, keeper in world.keepers.items() if keeper.runs} == {"1", "2", "3"}
    assert [told.state for told in world.told] == ["running"]
    before = record.fence
    world.settle(20)
    assert world.leader.record.fence == before  # nothing happens, nothing changes


def test_what_cannot_run_is_refused_before_anything_begins() -> None:
    world = World("12", cpu=1)
    told = world.submit(SPEC, "1")
    assert isinstance(told, Unplaceable) and told.never and not world.schedulers


def test_the_workers_of_a_dead_node_run_elsewhere_and_those_of_a_living_one_stay() -> None:
    world = begun()
    before = healthy(world).layout.placement
    world.kill_node("3")
    world.settle(10)
    record = healthy(world)
    assert "3" in record.evicted and before.without(["3"]).moved(record.layout.placement) == []
    world.start_agent("3")
    world.settle(20)
    record = healthy(world)
    assert record.evicted == {} and record.layout.placement.nodes("b") == ("1", "2", "3")  # spread asks for it


def test_what_shall_not_be_spread_stays_when_a_node_comes() -> None:
    spec = pipe(one("a", 2), one("b", 2), EdgeSpec("a", "b"))
    world = begun("12", spec)
    before = healthy(world, spec).layout
    join(world, "3")
    after = healthy(world, spec)
    assert after.layout == before and after.members == ("1", "2", "3")


def test_what_found_no_room_runs_as_soon_as_a_node_comes() -> None:
    spec = pipe(one("a", 6))
    world = begun("123", spec, cpu=2)
    world.kill_node("3")
    world.settle(10)
    assert world.running() == ["a#0", "a#1", "a#2", "a#3"]
    assert "worker a#" in world.leader.waiting and "has cpu 0 left of cpu 2" in world.told[-1].waiting
    world.start_agent("3")
    world.settle(20)
    healthy(world, spec)
    assert world.told[-1].waiting == ""


def test_a_draining_node_is_left_worker_by_worker_and_then_stopped() -> None:
    world = begun()
    drains = msgspec.structs.replace(world.nodes["3"], draining=True)
    world.event("1", NodeUp(drains))
    assert world.leader.ballot.pending or world.leader.record.wanted.nodes() == ("1", "2")
    seen = set[int]()
    for _ in range(200):  # at no moment runs a worker twice
        if not world.wire:
            break
        world.deliver(0)
        assert len(world.running()) == len(set(world.running()))
        seen.add(len(world.running()))
    assert world.keepers["3"].plan is None, "it is told to end, though it has said nothing since all has moved"
    world.settle(10)
    assert healthy(world).layout.placement.nodes() == ("1", "2") and min(seen) >= 4
    assert "3" not in healthy(world).layout.nodes() and world.keepers["3"].plan is None


def test_the_next_agent_takes_over_when_the_coordinator_dies_and_the_old_one_steps_down() -> None:
    world = begun()
    world.kill_agent("1")  # its keeper and workers go on
    world.settle(10)
    assert world.leader.me == "2" and world.leader.record.epoch == 2
    world.start_agent("1")
    world.settle(20)
    assert world.leader.me == "2"
    healthy(world)


def test_when_a_third_node_has_come_the_death_of_the_decider_is_survived() -> None:
    world = begun("12", pipe(one("a", 2), one("b", 2), EdgeSpec("a", "b")))
    join(world, "3")
    assert world.leader.record.members == ("1", "2", "3") and world.leader.record.before == ()
    world.kill_node("1")
    world.settle(20)
    assert healthy(world, world.leader.record.spec).coordinator in ("2", "3")


@pytest.mark.parametrize(("dies", "goes_on"), [("1", False), ("2", True)])
def test_of_two_nodes_the_decider_goes_on_alone_and_the_other_one_waits(dies: str, goes_on: bool) -> None:
    world = begun("12")
    world.kill_node(dies)
    world.settle(20)
    assert (world.running() == EVERYBODY) == goes_on
    world.heal()
    healthy(world)


def test_of_two_nodes_that_are_cut_from_each_other_the_one_that_may_not_go_on_says_so_and_all_heals() -> None:
    world = begun("12")
    before = dict(world.keepers["2"].runs)
    world.cut = {("1", "2"), ("2", "1")}
    world.settle(30)
    one_, other = (world.schedulers[node] for node in "12")
    assert one_.held_up(world.now) == "" and one_.record.evicted.keys() == {"2"}
    assert [keeper.runs == before for node, keeper in world.keepers.items()] == [False, True]
    told = other.held_up(world.now)
    assert "of the 2 nodes that keep its record 1 cannot be reached" in told
    assert "only the one that the pipe was submitted to goes on alone" in told and "once node 1 is back" in told
    world.heal()
    healthy(world)
    assert [each.held_up(world.now) for each in world.schedulers.values()] == ["", ""]


def test_a_coordinator_on_the_small_side_of_a_cut_moves_nothing() -> None:
    world = begun("12345")
    before = {node: dict(keeper.runs) for node, keeper in world.keepers.items()}
    small = ("1", "2")
    world.cut = {(a, b) for a in "12345" for b in "12345" if (a in small) != (b in small)}
    world.settle(20)
    leaders = {one.me: one for one in world.schedulers.values() if one.ballot.counted is not None}
    assert leaders["3"].record.epoch == 2 and set(leaders["3"].record.evicted) <= {"1", "2"}
    assert leaders["1"].ballot.pending  # it asks, and nobody answers
    told = leaders["1"].held_up(world.now)
    assert "of the 5 nodes that keep its record 3, 4, 5 cannot be reached" in told and "of two" not in told
    assert all(world.keepers[node].runs == before[node] for node in small)
    world.heal()
    healthy(world)
    assert world.leader.me == "3"


def isolated(node: str, seconds: float) -> World:
    """Four nodes, one of which nobody has heard for a while, nor it them."""
    world = begun("1234")
    world.cut = {cut for other in "1234" if other != node for cut in ((node, other), (other, node))}
    world.settle(int(4 * seconds))
    world.cut.clear()
    return world


@pytest.mark.parametrize("node", ["2", "1"], ids=["a member", "the coordinator"])
def test_who_comes_back_takes_nothing_over_from_nodes_that_it_still_takes_for_dead(node: str) -> None:
    """The network is whole again, and everything arrives, before anybody has met anybody again."""
    world = isolated(node, 30)
    runs = {other: dict(keeper.runs) for other, keeper in world.keepers.items() if other != node}
    evicted = {other: one.record.evicted.keys() for other, one in world.schedulers.items() if other != node}
    assert set(map(frozenset, evicted.values())) == {frozenset(node)}
    mine = world.schedulers[node]
    assert mine.deadline() is None or mine.deadline() > world.now, "no timer runs in circles"
    assert "cannot be reached, and the others are no majority" in mine.held_up(world.now)
    for _ in range(40):
        world.tick(0.25)
        while world.wire:
            world.deliver(0)
    assert {other: keeper.runs for other, keeper in world.keepers.items() if other != node} == runs
    assert all(one.record.evicted.keys() <= {node} for one in world.schedulers.values())
    for other in "1234":  # and then one after the other, the coordinator last
        leader = world.leader.me
        for each in sorted("1234", key=lambda one: one == leader):
            if each not in world.seen[other]:
                world.seen[other].add(each)
                world.event(other, NodeUp(world.nodes[each]))
                for _ in range(6):
                    world.tick(0.25)
                    while world.wire:
                        world.deliver(0)
                assert all(one.record.evicted.keys() <= {node} for one in world.schedulers.values())
    world.heal()
    healthy(world)


def test_a_member_that_is_cut_off_has_a_timer_for_saying_so() -> None:
    world = begun("123")
    world.cut = {("1", "2"), ("3", "2")}
    world.look()
    mine = world.schedulers["2"]
    assert mine.held_up(world.now) == ""
    due = mine.deadline()
    assert due is not None and due <= world.now + HELD
    assert mine.handle(Tick(), due) == [] and "the others are no majority" in mine.held_up(due)
    assert mine.deadline() is None


def test_what_has_not_come_back_after_a_while_is_dead() -> None:
    world = isolated("2", 30)
    world.kill_node("1")
    world.kill_node("3")
    world.settle(60)  # two of four are no quorum
    assert all(one.held_up(world.now) for one in world.schedulers.values()) and len(world.schedulers) == 2
    world.start_agent("3")
    world.settle(60)
    assert healthy(world).evicted.keys() == {"1"}


def test_a_node_whose_keeper_died_unseen_is_emptied_before_it_is_used_again() -> None:
    world = begun()
    world.keepers["2"].die()
    world.settle(20)
    record = healthy(world)
    assert record.evicted == {} and not world.keepers["2"].lost


def test_what_a_node_cannot_run_runs_on_the_others_and_it_is_not_asked_again() -> None:
    world = World("123")
    world.keepers["3"].unfit = "node 3 lacks the package x"
    assert world.submit(SPEC, "1") is None
    world.settle(20)
    record = healthy(world)
    assert record.unfit == {"3": "node 3 lacks the package x"} and record.layout.placement.nodes() == ("1", "2")
    assert [told.state for told in world.told] == ["running"]
    world.kill_node("2")
    world.start_agent("2")
    world.settle(20)
    assert "3" not in healthy(world).layout.nodes()


def test_a_node_that_becomes_unfit_after_a_death_moves_the_work_on_once_more() -> None:
    world = begun("1234")
    world.keepers["4"].unfit = "node 4 could not get the contents"
    world.keepers["4"].die()  # it has forgotten all of it, and cannot begin again
    world.settle(20)
    assert healthy(world).layout.placement.nodes() == ("1", "2", "3")


def test_a_pipe_that_only_unfit_nodes_could_run_fails_with_what_they_say() -> None:
    spec = pipe(one("a", 2), one("b", 1, place=Place(hosts=("host-3",))), EdgeSpec("a", "b"))
    world = World("123")
    world.keepers["3"].unfit = "node 3 lacks the package x"
    assert world.submit(spec, "1") is None
    world.settle(20)
    assert world.leader.record.state == "failed" and world.running() == []
    assert world.told[-1].reasons == ("node 3 lacks the package x",)


def test_what_an_unfit_node_leaves_no_room_for_waits_for_the_others() -> None:
    spec = pipe(one("a", 4))
    world = World("12", cpu=2)
    taken = {"cpu": 1.0}
    world.nodes["1"] = msgspec.structs.replace(world.nodes["1"], resources={"cpu": 4.0})
    world.keepers["2"].unfit = "node 2 lacks the package x"
    world.nodes["1"] = msgspec.structs.replace(world.nodes["1"], taken=taken)
    assert world.submit(spec, "1") is None
    world.settle(20)
    assert world.leader.record.state == "running" and len(world.running()) == 3
    assert "cannot run this pipe: node 2 lacks the package x" in world.told[-1].waiting
    world.nodes["1"] = msgspec.structs.replace(world.nodes["1"], taken={})
    world.event("1", NodeUp(world.nodes["1"]))
    world.settle(10)
    healthy(world, spec)


def test_old_and_repeated_reports_change_nothing() -> None:
    world = begun()
    record = world.leader.record
    for report in (world.leader.reports["2"], NodeReport("2", 0, (9, 9), False, True)):
        assert world.leader.handle(Reported(report), world.now) == []
    assert world.leader.record == record


def test_a_keeper_from_a_time_that_is_over_is_stopped() -> None:
    world = begun("1234")
    commands = world.leader.handle(Reported(NodeReport("9", 1, (1, 1))), world.now)
    assert [(one.node, one.plan) for one in commands if hasattr(one, "plan")] == [("9", None)]


# ------------------------------------------------------------------ the end


@pytest.mark.parametrize("client", ["", "client"])
def test_a_pipe_is_completed_when_every_processor_has_ended_everywhere(client: str) -> None:
    world = begun(client=client)
    world.settle(5)
    assert world.leader.record.ends == () or client == ""
    world.over = True
    world.settle(20)
    record = world.leader.record
    assert record.state == "completed" and world.running() == []
    assert set(record.ends) == {"in0-a", "e0-a-b", "results", "replies"}
    told = world.told[-1]
    lanes = len(record.layout.of("e0-a-b"))
    assert told.state == "completed" and told.books["e0-a-b"].emitted == lanes > 1
    assert all(keeper.plan is None for node, keeper in world.keepers.items() if node != client)
    assert world.leader.finished


def test_no_stream_ends_while_a_writer_of_it_is_anywhere_on_its_way() -> None:
    world = begun(client="client")
    world.kill_node("3")
    world.over = True
    for _ in range(100):
        world.settle(1)
        record = world.leader.record
        if "e0-a-b" in record.ends:
            assert {("a", 0), ("a", 1)} <= set(record.ended)
        for keeper in world.keepers.values():
            for queue in keeper.plan.queues if keeper.plan else ():
                assert not (queue.ends and queue.plan.source == "a") or not any(
                    name.startswith("a#") for other in world.keepers.values() for name in other.runs
                )
        if record.state == "completed":
            break
    assert world.leader.record.state == "completed"


def test_what_has_ended_is_not_run_again_with_its_node_dead() -> None:
    world = begun(client="client")
    world.over = True
    world.cut = {(node, "1") for node in ("2", "3")}
    world.settle(1)
    world.cut.clear()
    world.heal()
    assert world.leader.record.state == "completed"


def test_stop_and_drain_and_failure() -> None:
    world = begun()
    world.event("1", DrainPipe())
    world.settle(5)
    assert world.leader.record.state == "draining"
    assert all(keeper.plan is None or keeper.plan.draining for keeper in world.keepers.values())
    world.event("1", StopPipe())
    world.settle(5)
    assert world.leader.record.state == "stopped" and world.running() == [] and world.leader.finished

    world = begun()
    keeper = world.keepers["2"]
    keeper.number += 1
    world.event("1", Reported(NodeReport("2", keeper.number, keeper.fence, failed="processor 'b' raised")))
    world.settle(5)
    assert world.told[-1].state == "failed" and world.told[-1].reasons == ("processor 'b' raised",)
    assert world.running() == []


def test_without_its_submitter_a_pipe_stops_unless_it_was_detached() -> None:
    from upipe.cluster.dealings import NodeDown

    world = begun(client="client")
    world.event("1", NodeDown("client"))
    world.settle(5)
    assert world.leader.record.state == "stopped" and world.running() == []


def test_records_travel() -> None:
    record = begun().leader.record
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Record) == record


# ------------------------------------------------------------------ for every history

acts = st.lists(
    st.tuples(
        st.sampled_from(
            ["deliver"] * 6
            + ["lose", "repeat", "tick", "tick", "look", "look", "report"]
            + ["kill agent", "kill node", "start", "start", "cut", "cut one way", "mend"]
        ),
        st.integers(0, 1000),
    ),
    max_size=60,
)


def act(world: World, what: str, number: int) -> None:
    ids = sorted(world.nodes)
    node, other = ids[number % len(ids)], ids[(number // 7) % len(ids)]
    if what in ("deliver", "lose", "repeat") and world.wire:
        at = number % len(world.wire)
        if what == "lose":
            world.wire.pop(at)
        else:
            world.deliver(at, what == "repeat")
    elif what == "tick":
        world.tick(0.6)
    elif what == "look":
        world.look()
    elif what == "report":
        world.report(node)
    elif what == "kill agent":
        world.kill_agent(node)
    elif what == "kill node":
        world.kill_node(node)
    elif what == "start":
        world.start_agent(node)
    elif what.startswith("cut") and node != other:
        world.cut.update([(node, other)] if what.endswith("way") else [(node, other), (other, node)])
    elif what == "mend":
        world.cut.clear()


@pytest.mark.slow
@given(st.integers(1, 5), acts)
@settings(deadline=None, max_examples=int(os.environ.get("UPIPE_HISTORIES", "100")))
def test_whatever_happens_there_is_one_coordinator_per_epoch_and_after_healing_everything_runs_once(
    count: int, history: list[tuple[str, int]]
) -> None:
    world = World("12345"[:count])
    assert world.submit(SPEC, "1") is None
    for what, number in history:
        act(world, what, number)  # World.check() after each command
    saved = [save.record.fence for save in world.disk.values()]
    world.heal()
    record = healthy(world)
    assert record.fence >= max(saved)
    assert record.evicted == {} and not any(keeper.lost for keeper in world.keepers.values())
    world.over = True
    world.settle(20)
    assert world.leader.record.state == "completed" and world.running() == []


def test_a_root_that_drives_itself_stays_on_a_node_that_drains_and_the_others_leave() -> None:
    spec = pipe(msgspec.structs.replace(one("a"), kind="source"), one("b", 2), EdgeSpec("a", "b"))
    world = begun(spec=spec)
    [home] = healthy(world, spec).layout.placement.nodes()
    node = msgspec.structs.replace(world.nodes[home], draining=True)
    for there in sorted(world.alive):
        world.event(there, NodeUp(node))
    world.settle(20)
    seats = healthy(world, spec).layout.placement.seats
    assert seats["a"] == (home,) and home not in seats["b"]


def test_a_node_that_has_nothing_left_to_do_is_told_so_although_it_has_nothing_new_to_say() -> None:
    """Its last report made the record without it; it says nothing again while nothing changes there."""
    world = begun()
    leader = world.leader
    stays = NodeReport("9", 1 << 40, (1, 1), crews={"a": Crew(workers=1, restarts=3)})
    leader.up["9"] = msgspec.structs.replace(leader.up["3"], id="9", draining=True)
    leader.reports["9"] = stays
    told = leader.handle(Tick(), 1e6)
    assert Arrange("9", leader.record.fence, None) in told
    assert not leader.finished
    leader.handle(Reported(NodeReport("9", 2 << 40, leader.record.fence, present=False)), 1e6 + 1)
    assert not [one for one in leader.handle(Tick(), 1e6 + 9) if isinstance(one, Arrange) and one.node == "9"]


def test_what_crews_did_on_nodes_that_left_is_kept_and_they_do_not_run_any_more() -> None:
    world = begun()
    leader = world.leader
    report = leader.reports["3"]
    leader.reports["3"] = msgspec.structs.replace(report, crews={"a": Crew(workers=2, restarts=3)})
    world.kill_node("3")
    world.settle(60)
    assert crews(leader.record, leader.reports.values())["a"].restarts == 3
    assert leader.record.crews["a"].workers == 0
