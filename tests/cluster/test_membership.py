"""Membership in simulated time: named situations, then random histories with the invariants checked after every
event."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.cluster.simulation import Host, Network, World
from upipe import lifecycle
from upipe.cluster import member_events as ev
from upipe.cluster.address import Address
from upipe.cluster.member import MEMBER
from upipe.cluster.membership import Membership
from upipe.cluster.messages import MAX_MEMBERS, Gossip, Leave, NodeInfo, Rumour
from upipe.cluster.timing import Timing

USABLE = 2.0
KNOWN_DEAD = 5.0
HEALED = 10.0
EXAMPLES = int(os.environ.get("UPIPE_HISTORIES", "60"))
"""Random histories of each kind; CI runs thousands."""


def world_of(nodes: int, **kwargs: object) -> World:
    """A cluster that has found itself."""
    world = World(nodes, **kwargs)  # type: ignore[arg-type]
    world.start_all()
    world.run(USABLE)
    assert world.agreed()
    return world


def downs(world: World, since: float = 0.0) -> list[tuple[float, int, ev.Command]]:
    return [one for one in world.told(ev.NodeDown) if one[0] >= since]


# ------------------------------------------------------------------ the table


def test_every_state_is_reachable_and_none_is_a_dead_end() -> None:
    reached = {"joining"}
    for _ in MEMBER:
        reached |= {after for state in reached for after in MEMBER[state].values()}
    assert reached == set(MEMBER)
    assert all(MEMBER[state] for state in MEMBER)


def test_the_alive_are_suspect_before_they_are_dead() -> None:
    assert "die" not in MEMBER["alive"]
    assert {state for state, moves in MEMBER.items() if "dead" in moves.values()} == {"joining", "suspect", "dead"}
    assert "| **suspect** |" in lifecycle.markdown(MEMBER)


# ------------------------------------------------------------------ coming and going


@pytest.mark.parametrize("nodes", [2, 3, 7])
def test_nodes_that_appear_are_usable_within_two_seconds(nodes: int) -> None:
    world = World(nodes, network=Network(loss=0.05, delay=(0.001, 0.05)))
    world.start_all()
    world.run(USABLE)
    assert world.agreed()


def test_one_seed_is_enough_to_meet_everybody() -> None:
    world = World(5)
    for host in world.hosts:
        world.start(host.index, hints=False)
    for host in world.hosts[1:]:
        world.handle(host, ev.Seen(ev.Hint((world.hosts[0].address,), "seed")))
    world.run(USABLE)
    assert world.agreed()


@pytest.mark.parametrize("machine", [True, False], ids=["power off", "kill -9"])
@pytest.mark.parametrize("nodes", [2, 3, 7])
def test_a_crash_is_known_to_everybody_within_five_seconds(nodes: int, machine: bool) -> None:
    world = world_of(nodes, network=Network(loss=0.05))
    world.crash(0, machine)
    world.run(KNOWN_DEAD)
    assert world.agreed()
    assert {index for _, index, _ in downs(world)} == set(range(1, nodes))


def test_three_of_seven_crash_at_once() -> None:
    world = world_of(7)
    for index in range(3):
        world.crash(index)
    world.run(KNOWN_DEAD)
    assert world.agreed()


def test_one_that_leaves_is_gone_at_once() -> None:
    world = world_of(5)
    world.leave(2)
    world.run(0.1)
    assert world.agreed()
    assert len(world.told(ev.NodeLeft)) == 4
    assert not world.told(ev.NodeSuspect)


def test_a_good_bye_that_reached_one_reaches_all() -> None:
    world = world_of(5)
    for target in (1, 2, 3):
        world.cut(4, target)
    world.leave(4)
    world.run(1.5)
    assert world.agreed()
    assert not downs(world)


def test_a_restarted_agent_is_taken_back_without_having_been_down() -> None:
    world = world_of(3)
    world.crash(0, machine=False)
    world.run(1.0)
    world.start(0)
    world.run(USABLE)
    assert world.agreed()
    assert not downs(world)
    assert [command.restarted for _, _, command in world.told(ev.NodeUp) if command.info.life == 2] == [True, True]  # type: ignore[union-attr]


def test_the_dead_and_those_who_left_come_back_with_a_new_life() -> None:
    world = world_of(4)
    world.crash(0)
    world.leave(1)
    world.run(20.0)
    world.start(0)
    world.start(1)
    world.run(USABLE)
    assert world.agreed()


def test_draining_is_known_to_all_and_changes_no_life() -> None:
    world = world_of(5)
    world.handle(world.hosts[0], ev.OwnDrain())
    world.run(1.0)
    changed = world.told(ev.NodeChanged)
    assert sorted(index for _, index, _ in changed) == [1, 2, 3, 4]
    assert all(command.info.draining for _, _, command in changed)  # type: ignore[union-attr]
    assert world.agreed()
    assert not world.told(ev.NodeSuspect)


def test_load_travels_with_pings_and_is_no_news() -> None:
    world = world_of(3)
    first = world.hosts[0]
    world.handle(first, ev.OwnChanged(replace(first.info, load=7.5, free_shared_memory=1 << 30)))
    world.run(1.1)
    for host in world.hosts[1:]:
        assert host.membership is not None
        held = host.membership.member(first.info.node_id)
        assert held is not None
        assert held.info.load == 7.5
    assert not world.told(ev.NodeChanged)
    assert not world.told(ev.Announce)


# ------------------------------------------------------------------ bad links


def test_one_bad_link_kills_nobody() -> None:
    world = world_of(3)
    world.cut(0, 1)
    world.cut(1, 0)
    world.run(60.0)
    assert world.agreed()
    assert not downs(world)


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_a_one_way_cut_heals(nodes: int) -> None:
    world = world_of(nodes)
    for other in range(1, nodes):
        world.cut(0, other)
    world.run(30.0)
    assert world.hosts[0].info.node_id not in world.hosts[1].up, "it hears, and nobody hears it"
    world.heal()
    world.run(HEALED)
    assert world.agreed()


@pytest.mark.parametrize("left", [{0}, {0, 1}, {0, 1, 2}])
def test_a_partition_of_thirty_seconds_heals(left: set[int]) -> None:
    world = world_of(5)
    world.partition(left)
    world.run(30.0)
    ids = [host.info.node_id for host in world.hosts]
    for host in world.hosts:
        same = left if host.index in left else set(range(5)) - left
        assert host.up == {ids[index] for index in same - {host.index}}
    world.heal()
    healed = world.now
    world.run(5.0)
    assert world.agreed()
    assert not downs(world, healed), "who came back is not doubted for what was said of it"


def test_a_machine_that_slept_distrusts_itself() -> None:
    world = world_of(3)
    world.pause(0, 3600.0)
    world.run(3600.0)
    woken = world.now
    world.run(HEALED)
    assert world.agreed()
    assert not [one for one in downs(world, woken) if one[1] == 0]


def test_a_short_pause_is_forgiven() -> None:
    world = world_of(4)
    world.pause(0, 2.0)
    world.run(10.0)
    assert world.agreed()
    assert not downs(world)


def test_a_quiet_cluster_only_pings() -> None:
    world = world_of(7)
    world.run(5.0)
    before = sum(host.sent for host in world.hosts)
    world.run(10.0)
    per_second = (sum(host.sent for host in world.hosts) - before) / 10.0 / 7
    assert per_second == pytest.approx(6 / world.timing.ping_interval, rel=0.05)


# ------------------------------------------------------------------ lies


def machine(**changes: object) -> Membership:
    info = replace(NodeInfo("a" * 16, "here", ("10.0.0.1",), 7420, 1 << 32), **changes)
    return Membership(info)


def other(number: int = 1, life: int = 1, **changes: object) -> NodeInfo:
    return replace(NodeInfo(f"{number:016x}", "here", (f"10.0.1.{number}",), 7420, life << 32), **changes)


def kinds(commands: list[ev.Command]) -> list[type]:
    return [type(command) for command in commands]


def test_a_hint_makes_no_member() -> None:
    membership = machine()
    commands = membership.handle(ev.Seen(ev.Hint((Address("10.0.1.1", 1),), "zeroconf", "1" * 16, "here", 1)), 0.0)
    assert kinds(commands) == [ev.Connect]
    assert membership.members() == ()


def test_hearsay_makes_no_usable_member() -> None:
    membership = machine()
    first = other(1)
    membership.handle(ev.Proven(first, first.addresses[0]), 0.0)
    commands = membership.handle(ev.MembersHeard(Gossip(first, 0, (Rumour(other(2), "alive"),))), 0.1)
    assert ev.NodeUp not in kinds(commands)
    assert ev.Connect in kinds(commands)
    assert [member.state for member in membership.members()] == ["alive", "joining"]


def test_a_flood_of_lies_costs_bounded_work() -> None:
    membership = machine()
    dials, now = 0, 0.0
    for number in range(5_000):
        address = Address(f"10.{number >> 14 & 127}.{number >> 7 & 127}.{number & 127}", 7420)
        hint = ev.Hint((address,), "zeroconf", f"{number:016x}", "here", 1)
        for command in membership.handle(ev.Seen(hint), now):
            assert isinstance(command, ev.Connect)
            dials += 1
        now += 0.001
        membership.validate()
    assert dials <= Timing().dials * (1 + now / Timing().dial_timeout)


def test_a_seed_is_dialled_among_a_flood_of_lies() -> None:
    membership = machine()
    seed = Address("10.9.9.9", 7420)
    for number in range(1000):
        membership.handle(ev.Seen(ev.Hint((Address(f"10.1.{number >> 8}.{number & 255}", 1),), "zeroconf")), 0.0)
    membership.handle(ev.Seen(ev.Hint((seed,), "seed")), 0.0)
    now, dialled = 0.0, []
    while now <= Timing().dial_timeout:
        dialled += [one.address for one in membership.handle(ev.Tick(), now) if isinstance(one, ev.Connect)]
        now = membership.deadline() or 0.0
    assert seed in dialled


def test_repeating_a_dead_hint_dials_no_more_often() -> None:
    membership = machine()
    address = Address("10.0.1.1", 7420)
    dials, now = [], 0.0
    for step in range(20_000):
        now = step * 0.05
        for command in membership.handle(ev.Seen(ev.Hint((address,), "zeroconf")), now):
            assert isinstance(command, ev.Connect)
            dials.append(now)
            membership.handle(ev.DialFailed(address, "refused"), now)
    longest = Timing().redial_first * 2 ** (Timing().hint_tries - 1)
    assert len(dials) <= Timing().hint_tries + now / longest
    assert all(later - earlier >= Timing().redial_first for earlier, later in itertools.pairwise(dials))


def test_our_own_address_is_dialled_once() -> None:
    membership = machine()
    ours, alias = Address("10.0.0.1", 7420), Address("node-a", 7420)
    assert membership.handle(ev.Seen(ev.Hint((ours,), "seed")), 0.0) == []
    assert kinds(membership.handle(ev.Seen(ev.Hint((alias,), "seed")), 0.0)) == [ev.Connect]
    membership.handle(ev.Proven(membership.info, alias), 0.1)
    assert membership.deadline() is None


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"cluster": "there"}, "cluster-name", ("'there'", "'here'", "10.0.1.1:7420", "--cluster")),
        ({"protocol": 99, "version": "9.9"}, "protocol-version", ("9.9", "99", "0.1", "update node aaaa")),
    ],
)
def test_a_stranger_is_refused_naming_both(changes: dict[str, object], code: str, words: tuple[str, ...]) -> None:
    membership = machine(version="0.1")
    address = Address("10.0.1.1", 7420)
    commands = membership.handle(ev.Proven(other(1, **changes), address), 0.0)
    assert kinds(commands) == [ev.Tell]
    assert isinstance(commands[0], ev.Tell)
    assert commands[0].code == code
    assert all(word in commands[0].sentence for word in words), commands[0].sentence
    assert membership.handle(ev.Proven(other(1, **changes), address), 1.0) == [], "each is told once"
    assert membership.members() == ()


def test_a_copied_data_directory_is_told() -> None:
    membership = machine()
    twin = replace(membership.info, hosts=("10.0.0.2",))
    commands = membership.handle(ev.Proven(twin, twin.addresses[0]), 0.0)
    assert kinds(commands) == [ev.Tell]
    assert "data directory was copied" in commands[0].sentence  # type: ignore[union-attr]


def test_hints_of_other_clusters_and_versions_are_not_dialled() -> None:
    membership = machine()
    address = Address("10.0.1.1", 7420)
    assert membership.handle(ev.Seen(ev.Hint((address,), "zeroconf", "1" * 16, "there", 1)), 0.0) == []
    assert kinds(membership.handle(ev.Seen(ev.Hint((address,), "zeroconf", "1" * 16, "here", 2)), 0.0)) == [ev.Tell]


def test_a_lying_hint_cannot_shadow_a_member() -> None:
    membership = machine()
    first = other(1)
    membership.handle(ev.Proven(first, first.addresses[0]), 0.0)
    liar = Address("10.6.6.6", 7420)
    assert membership.handle(ev.Seen(ev.Hint((liar,), "zeroconf", first.node_id, "here", 1)), 0.1) == []
    held = membership.member(first.node_id)
    assert held is not None
    assert held.addresses == first.addresses


def test_a_restored_data_directory_outbids_its_own_ghost() -> None:
    membership = machine()
    first = other(1)
    membership.handle(ev.Proven(first, first.addresses[0]), 0.0)
    ghost = replace(membership.info, incarnation=7 << 32)
    commands = membership.handle(ev.MembersHeard(Gossip(first, 0, (Rumour(ghost, "dead"),))), 0.1)
    assert ev.Persist(7) in commands
    assert membership.info.incarnation == (7 << 32) + 1


def test_an_absurd_incarnation_is_not_outbid() -> None:
    membership = machine()
    first = other(1)
    membership.handle(ev.Proven(first, first.addresses[0]), 0.0)
    ghost = replace(membership.info, incarnation=(1 << 62) - 1)
    commands = membership.handle(ev.MembersHeard(Gossip(first, 0, (Rumour(ghost, "dead"),))), 0.1)
    assert ev.Tell in kinds(commands)
    assert membership.info.life == 1


def test_a_replayed_good_bye_of_an_earlier_life_is_ignored() -> None:
    membership = machine()
    first = other(1, life=2)
    membership.handle(ev.Proven(first, first.addresses[0]), 0.0)
    assert ev.NodeLeft not in kinds(membership.handle(ev.LeftProperly(Leave(first.node_id, 1 << 32)), 0.1))
    assert ev.NodeLeft in kinds(membership.handle(ev.LeftProperly(Leave(first.node_id, 2 << 32)), 0.2))


def test_another_node_at_the_address_of_a_member_answers_for_itself_only() -> None:
    membership = machine()
    first = other(1)
    pings = membership.handle(ev.Proven(first, first.addresses[0]), 0.0)
    number = next(command.number for command in pings if isinstance(command, ev.Ping))
    commands = membership.handle(ev.PingAnswered(number, Gossip(other(2), 0)), 0.1)
    assert ev.NodeSuspect in kinds(commands)


def test_the_table_of_members_is_bounded_and_the_dead_make_room() -> None:
    membership = machine()
    for number in range(1, MAX_MEMBERS + 1):
        info = replace(other(1), node_id=f"{number:016x}", hosts=())
        membership.handle(ev.Proven(info), 0.0)
    late = replace(other(1), node_id="f" * 16, hosts=())
    assert ev.Tell in kinds(membership.handle(ev.Proven(late), 0.0))
    membership.handle(ev.LeftProperly(Leave(f"{1:016x}", 1 << 32)), 0.0)
    assert ev.NodeUp in kinds(membership.handle(ev.Proven(late), 0.0))
    membership.validate()


def test_whoever_left_says_nothing_more() -> None:
    membership = machine()
    first = other(1)
    membership.handle(ev.Proven(first, first.addresses[0]), 0.0)
    assert kinds(membership.handle(ev.OwnLeave(), 1.0)) == [ev.Spread]
    assert membership.deadline() is None
    assert membership.handle(ev.Proven(other(2)), 2.0) == []


# ------------------------------------------------------------------ random histories

ACTIONS = st.one_of(
    st.tuples(st.just("crash"), st.integers(0, 6), st.booleans()),
    st.tuples(st.just("start"), st.integers(0, 6), st.booleans()),
    st.tuples(st.just("restore"), st.integers(0, 6), st.booleans()),
    st.tuples(st.just("drain"), st.integers(0, 6), st.booleans()),
    st.tuples(st.just("leave"), st.integers(0, 6), st.booleans()),
    st.tuples(st.just("pause"), st.integers(0, 6), st.floats(0.1, 8.0)),
    st.tuples(st.just("cut"), st.integers(0, 6), st.integers(0, 6)),
    st.tuples(st.just("partition"), st.integers(0, 127), st.booleans()),
    st.tuples(st.just("heal"), st.integers(0, 6), st.booleans()),
    st.tuples(st.just("lie"), st.integers(0, 6), st.integers(0, 6)),
)
HISTORIES = st.lists(st.tuples(st.floats(0.0, 6.0), ACTIONS), max_size=12)


def act(world: World, action: tuple[str, object, object]) -> None:
    """One step of a history."""
    what, number, extra = action
    assert isinstance(number, int)
    index = number % len(world.hosts)
    host = world.hosts[index]
    if what == "crash":
        world.crash(index, bool(extra))
    elif what == "start" and host.membership is None:
        world.start(index)
    elif what == "restore" and host.membership is None:  # its data directory comes from an old copy
        host.info = replace(host.info, incarnation=0)
        world.start(index)
    elif what == "drain":
        world.handle(host, ev.OwnDrain())
    elif what == "leave":
        world.leave(index)
    elif what == "pause":
        assert isinstance(extra, float)
        world.pause(index, extra)
    elif what == "cut":
        assert isinstance(extra, int)
        world.cut(index, extra % len(world.hosts))
    elif what == "partition":
        world.partition({one for one in range(len(world.hosts)) if number >> one & 1})
    elif what == "heal":
        world.heal()
    elif what == "lie" and host.membership is not None:
        assert isinstance(extra, int)
        claimed = world.hosts[extra % len(world.hosts)]
        hint = ev.Hint((Address("10.66.6.6", 7420), claimed.address), "zeroconf", host.info.node_id, "sim", 1)
        world.handle(host, ev.Seen(hint))


def nobody_uses_the_dead(world: World) -> None:
    """Who crashed or left KNOWN_DEAD ago is used by nobody who was awake in the meantime."""
    for dead in world.hosts:
        if dead.crashed_at is None or world.now - dead.crashed_at <= KNOWN_DEAD:
            continue
        for host in world.running:
            if host.awake_since <= dead.crashed_at and dead.info.node_id in host.up:
                raise AssertionError(
                    f"{world.now - dead.crashed_at:.2f} s after its crash {dead.index} is up at {host.index}"
                )


def settle(world: World) -> None:
    """All cuts heal, everybody is awake: then all agree, and stay so."""
    world.heal()
    world.network.loss = 0.0
    world.run(max([0.0] + [host.paused_until - world.now for host in world.hosts]), nobody_uses_the_dead)
    world.run(HEALED, nobody_uses_the_dead)
    assert world.agreed(), describe(world)
    quiet = world.now
    world.run(5.0)
    assert world.agreed()
    assert not list(downs(world, quiet))
    assert not [one for one in world.told(ev.NodeSuspect) if one[0] > quiet]


def describe(world: World) -> str:
    def one(host: Host) -> str:
        assert host.membership is not None
        held = ", ".join(f"{member.info.node_id[:4]} {member.state}" for member in host.membership.members())
        return f"{host.index} {host.info.node_id[:4]}: {held}"

    return "; ".join(one(host) for host in world.running)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(3, 7), st.integers(0, 1 << 32), st.floats(0.0, 0.2), st.floats(0.0, 0.3), HISTORIES)
def test_random_histories(
    nodes: int, seed: int, loss: float, duplicate: float, history: list[tuple[float, tuple[str, object, object]]]
) -> None:
    world = World(nodes, seed, Network(loss=loss, duplicate=duplicate, delay=(0.0, 0.1)))
    world.start_all()
    for wait, action in history:
        world.run(wait, nobody_uses_the_dead)
        act(world, action)
    settle(world)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(3, 7), st.integers(0, 1 << 32), st.sets(st.integers(1, 6), max_size=3))
def test_the_well_connected_never_die(nodes: int, seed: int, crashes: set[int]) -> None:
    """Messages are lost, repeated and late, and some nodes crash: nobody who lives is declared dead."""
    world = World(nodes, seed, Network(loss=0.05, duplicate=0.1, delay=(0.0, 0.1)))
    world.start_all()
    world.run(USABLE)
    crashed = {index for index in crashes if index < nodes - 1}
    for index in crashed:
        world.run(0.7, nobody_uses_the_dead)
        world.crash(index)
    world.run(30.0, nobody_uses_the_dead)
    dead = {world.hosts[index].info.node_id for index in crashed}
    assert {command.info.node_id for _, _, command in downs(world)} <= dead  # type: ignore[union-attr]
    assert world.agreed()
