"""The supervisor of one node's workers: they come, change and go. Nothing sleeps, nothing runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.keeper_support import chain, one
from upipe.cluster.keeper_supervisor import NodeSupervisor
from upipe.graph.plan import OutputPlan, WorkerPlan
from upipe.graph.spec import PipeSpec
from upipe.runtime import events as ev

SPEC = chain(one("a", "source"), one("b", workers=2), one("c"))
LOAD = ev.Load("b", 0.0, 0.0, 0)


def plan(name: str, index: int = 0, *queues: str) -> WorkerPlan:
    return WorkerPlan(name, index, (), (OutputPlan("", queues, index),), "replies", index)


def make(*workers: WorkerPlan, spec: PipeSpec = SPEC) -> NodeSupervisor:
    machine = NodeSupervisor(spec)
    assert machine.start(0.0) == []
    for worker in workers:
        machine.handle(ev.Joined(worker), 0.0)
    return machine


def ready(machine: NodeSupervisor, *names: str) -> None:
    for number, name in enumerate(names, 100):
        machine.handle(ev.Spawned(name, number, 1), 0.0)
        machine.handle(ev.Ready(name), 0.0)
    machine.validate()


def exits(machine: NodeSupervisor, name: str, done: bool = True) -> list[ev.Command]:
    if done:
        machine.handle(ev.Done(name), 0.0)
    found = machine.handle(ev.Exited(name, machine.slots[name].pid, 0 if done else -9, 0.5), 0.0)
    machine.validate()
    return found


def test_workers_join_one_by_one_and_it_is_up_when_all_are() -> None:
    machine = make()
    assert machine.up
    assert machine.handle(ev.Joined(plan("b", 1)), 0.0) == [ev.DeclareEnds("b#1"), ev.StartWorker("b#1", 1)]
    assert not machine.up
    ready(machine, "b#1")
    assert machine.up and machine.ended() == machine.left() == ()
    machine.handle(ev.Joined(plan("a")), 0.0)
    assert not machine.up
    ready(machine, "a#0")
    assert machine.up and [slot.name for slot in machine.present()] == ["a#0", "b#1"]


def test_what_ends_here_completes_nothing_and_discards_nothing() -> None:
    machine = make(plan("a"), plan("b"))
    ready(machine, "a#0", "b#0")
    assert exits(machine, "a#0") == [ev.Recover("a#0", 100, 1), ev.CloseEnds("a#0")]
    assert exits(machine, "b#0") == [ev.Recover("b#0", 101, 1), ev.CloseEnds("b#0")]
    assert machine.state == "running" and machine.ended() == (("a", 0), ("b", 0))


def test_one_that_leaves_finishes_and_is_not_counted_as_ended() -> None:
    machine = make(plan("b"), plan("b", 1))
    ready(machine, "b#0", "b#1")
    assert machine.handle(ev.Leaving("b#1"), 0.0) == [ev.DrainWorker("b#1")]
    assert machine.left() == ()
    exits(machine, "b#1")
    assert machine.left() == (("b", 1),) and machine.ended() == ()
    exits(machine, "b#0")
    assert machine.left() == (("b", 1),) and machine.ended() == (("b", 0),)


def test_one_that_leaves_and_dies_has_left() -> None:
    machine = make(plan("b"))
    ready(machine, "b#0")
    machine.handle(ev.Leaving("b#0"), 0.0)
    assert exits(machine, "b#0", done=False) == [ev.Recover("b#0", 100, 1), ev.CloseEnds("b#0")]
    assert machine.left() == (("b", 0),) and machine.deadline() is None


def test_one_that_waits_for_its_restart_leaves_at_once() -> None:
    machine = make(plan("b"))
    ready(machine, "b#0")
    exits(machine, "b#0", done=False)
    exits(machine, "b#0", done=False)
    assert machine.slots["b#0"].machine.state == "lost"
    assert machine.handle(ev.Leaving("b#0"), 0.0) == [ev.CloseEnds("b#0")]
    assert machine.left() == (("b", 0),) and machine.deadline() is None
    machine.validate()


@pytest.mark.parametrize("heard", [False, True])
def test_one_whose_code_had_returned_does_not_leave(heard: bool) -> None:
    machine = make(plan("b"))
    ready(machine, "b#0")
    machine.handle(ev.Done("b#0"), 0.0)
    if heard:
        exits(machine, "b#0")
    assert machine.handle(ev.Leaving("b#0"), 0.0) == []
    if not heard:
        exits(machine, "b#0")
    assert machine.left() == () and machine.ended() == (("b", 0),)


def test_one_that_is_to_stay_after_all_begins_again() -> None:
    machine = make(plan("b"))
    ready(machine, "b#0")
    machine.handle(ev.Leaving("b#0"), 0.0)
    assert machine.handle(ev.Joined(plan("b")), 0.0) == []
    assert exits(machine, "b#0")[-1] == ev.StartWorker("b#0", 2)
    assert machine.left() == machine.ended() == ()
    machine.handle(ev.Leaving("b#0"), 0.0)
    machine.handle(ev.Spawned("b#0", 7, 1), 0.0)
    exits(machine, "b#0")
    assert machine.handle(ev.Joined(plan("b")), 0.0)[-1] == ev.StartWorker("b#0", 3)


def test_one_that_is_removed_is_killed_and_that_is_no_failure() -> None:
    machine = make(plan("b"), plan("b", 1))
    ready(machine, "b#0", "b#1")
    assert machine.handle(ev.Removed("b#1"), 0.0) == [ev.KillWorker("b#1")]
    assert machine.handle(ev.Joined(plan("b", 1)), 0.0) == []  # it comes back before its death is heard
    commands = exits(machine, "b#1", done=False)
    assert commands[:2] == [ev.Recover("b#1", 101, 1), ev.CloseEnds("b#1")]
    assert commands[-1] == ev.StartWorker("b#1", 2)
    machine.handle(ev.Spawned("b#1", 7, 1), 0.0)
    machine.handle(ev.Removed("b#1"), 0.0)
    assert exits(machine, "b#1", done=False) == [ev.Recover("b#1", 7, 1), ev.CloseEnds("b#1")]
    assert machine.crews["b"].deaths == 0 and machine.crews["b"].cpu_seconds == 1.0
    assert machine.ended() == machine.left() == () and [slot.name for slot in machine.present()] == ["b#0"]


def test_one_that_is_removed_before_it_was_forked_is_killed_then() -> None:
    machine = make(plan("b"))
    machine.handle(ev.Removed("b#0"), 0.0)
    assert machine.handle(ev.Spawned("b#0", 5, 1), 0.0) == [ev.KillWorker("b#0")]
    assert ev.CloseEnds("b#0") in machine.handle(ev.Exited("b#0", 5, -9, 0.0), 0.0)
    machine = make(plan("b"))
    machine.handle(ev.Removed("b#0"), 0.0)
    assert machine.handle(ev.Refused("b#0", "no memory"), 0.0) == [ev.CloseEnds("b#0"), ev.PipeUp()]


def test_one_that_changes_is_told_and_one_that_ended_is_not() -> None:
    machine = make(plan("b"), plan("b", 1))
    ready(machine, "b#0", "b#1")
    exits(machine, "b#1")
    other = plan("b", 0, "q2")
    assert machine.handle(ev.Changed(other), 0.0) == [ev.DeclareEnds("b#0"), ev.RewireWorker("b#0")]
    assert machine.slots["b#0"].plan == other
    assert machine.handle(ev.Changed(plan("b", 1, "q2")), 0.0) == []
    assert machine.handle(ev.Changed(plan("c")), 0.0) == []


def test_when_it_drains_what_drives_itself_ends_and_is_not_begun() -> None:
    machine = make(plan("a"), plan("b"))
    ready(machine, "a#0", "b#0")
    assert machine.handle(ev.DrainPipe(), 0.0) == [ev.CloseInput(), ev.DrainWorker("a#0")]
    exits(machine, "a#0")
    assert machine.ended() == (("a", 0),) and machine.left() == ()
    machine = make()
    machine.handle(ev.DrainPipe(), 0.0)
    assert machine.handle(ev.Joined(plan("a")), 0.0) == [ev.CloseEnds("a#0")]
    assert machine.ended() == (("a", 0),) and machine.up
    assert machine.handle(ev.Joined(plan("b")), 0.0)[-1] == ev.StartWorker("b#0", 1)


# ------------------------------------------------------------------ autoscaling

SCALED = chain(one("a", "source"), one("b", autoscale=4))


def test_room_for_autoscaling_ends_with_the_last_that_runs() -> None:
    machine = make(plan("b"), plan("b", 1), plan("b", 2), spec=SCALED)
    ready(machine, "b#0")
    assert machine.up and list(machine.slots) == ["b#0"]
    busy = ev.Load("b", 1.0, 9.0, 50)
    assert machine.handle(busy, 10.0)[-1] == ev.StartWorker("b#1", 1)
    machine.handle(ev.Spawned("b#1", 5, 1), 0.0)
    exits(machine, "b#0")
    assert machine.ended() == (("b", 0),)
    exits(machine, "b#1")
    assert machine.ended() == (("b", 0), ("b", 1), ("b", 2))


def test_what_autoscaling_ended_is_room_again() -> None:
    machine = make(plan("b"), plan("b", 1), spec=SCALED)
    ready(machine, "b#0")
    machine.handle(ev.Load("b", 1.0, 9.0, 50), 10.0)
    ready(machine, "b#1")
    machine.handle(LOAD, 20.0)
    assert machine.handle(LOAD, 60.0) == [ev.DrainWorker("b#1")]
    exits(machine, "b#1")
    assert machine.ended() == machine.left() == ()
    assert machine.handle(ev.Load("b", 1.0, 9.0, 50), 70.0)[-1] == ev.StartWorker("b#1", 2)


def test_what_leaves_is_no_room() -> None:
    machine = make(plan("b"), plan("b", 1), spec=SCALED)
    ready(machine, "b#0")
    assert machine.handle(ev.Leaving("b#1"), 0.0) == [] and machine.left() == (("b", 1),)
    assert machine.handle(ev.Load("b", 1.0, 9.0, 50), 10.0) == []


def test_a_node_with_room_only_starts_with_the_first_frame_and_ends_with_the_stream() -> None:
    machine = make(plan("b", 2), plan("b", 3), spec=SCALED)
    assert machine.state == "running"  # or nobody would measure
    assert machine.up and machine.handle(LOAD, 1.0) == [] and machine.ended() == ()
    assert machine.handle(ev.Load("b", 0.0, 0.0, 1), 2.0)[-1] == ev.StartWorker("b#2", 1)
    machine = make(plan("b", 2), plan("b", 3), spec=SCALED)
    assert machine.handle(ev.Load("b", 0.0, 0.0, 0, True), 2.0) == []
    assert machine.ended() == (("b", 2), ("b", 3))


# ------------------------------------------------------------------ whatever happens

NAMES = ("a#0", "b#0", "b#1", "b#2", "c#0")
PLANNED = ["join", "change", "leave", "stay", "remove"]
HAPPENED = ["spawn", "ready", "done", "exit", "die", "tick", "load"]
happenings = st.tuples(st.sampled_from([*PLANNED, *HAPPENED]), st.sampled_from(NAMES))


@settings(max_examples=300, deadline=None)
@given(st.lists(happenings, max_size=60))
def test_whatever_happens_processes_and_slots_agree(story: list[tuple[str, str]]) -> None:
    """A model of the processes beside it: one at most per worker, none of a worker that is not here any more."""
    spec = chain(one("a", "source"), one("b", workers=2, autoscale=3), one("c"))
    machine = make(spec=spec)
    running: dict[str, int] = {}
    here: set[str] = set()
    going: set[str] = set()
    now, pids = 0.0, 10

    def obey(commands: list[ev.Command]) -> None:
        for command in commands:
            if isinstance(command, ev.StartWorker):
                assert command.worker not in running and command.worker in here, (command, story)
                running[command.worker] = 0

    def plan_of(name: str) -> WorkerPlan:
        return plan(name[0], int(name[2:]))

    for what, name in story:
        now += 1.0
        event: Any = None
        if what == "join" and name not in here:
            here.add(name)
            event = ev.Joined(plan_of(name))
        elif what == "change" and name in here:
            event = ev.Changed(plan_of(name))
        elif what == "leave" and name in here:
            going.add(name)
            event = ev.Leaving(name)
        elif what == "stay" and name in going:
            going.discard(name)
            event = ev.Joined(plan_of(name))
        elif what == "remove" and name in here:
            here.discard(name)
            going.discard(name)
            event = ev.Removed(name)
        elif what == "spawn" and running.get(name) == 0:
            pids += 1
            running[name] = pids
            event = ev.Spawned(name, pids, 1)
        elif what in ("ready", "done") and running.get(name):
            event = ev.Ready(name) if what == "ready" else ev.Done(name)
        elif what in ("exit", "die") and running.get(name):
            pid = running.pop(name)
            if what == "exit":
                obey(machine.handle(ev.Done(name), now))
            event = ev.Exited(name, pid, 0 if what == "exit" else -9, 0.0)
        elif what == "tick":
            event = ev.Tick()
        elif what == "load":
            event = ev.Load("b", 1.0, 9.0, 5)
        if event is not None:
            obey(machine.handle(event, now))
        machine.validate()
        told = {f"{one}#{index}" for one, index in (*machine.ended(), *machine.left())}
        assert {f"{one}#{index}" for one, index in machine.left()} <= going
        assert told <= here and not set(machine.ended()) & set(machine.left())
        assert not told & {name for name in running if name in here}
        assert machine.state in ("starting", "running")
