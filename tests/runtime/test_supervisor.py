"""The supervisor as a pure machine: events and times in, commands out. Nothing sleeps, nothing runs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upipe.errors import IllegalTransition
from upipe.graph.plan import plan
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.lifecycle import PIPE_ENDED
from upipe.runtime import events as ev
from upipe.runtime.supervisor import Supervisor
from upipe.settings import AutoscalePolicy, RestartPolicy, Settings

CODE = "0" * 64
POLICY = RestartPolicy(limit=3, window=60.0, backoff=0.1, backoff_max=1.0)


def make(*processors: ProcessorSpec, edges: tuple[tuple[str, str], ...] = (), **knobs: Any) -> Supervisor:
    spec = PipeSpec("pipe", processors, tuple(EdgeSpec(*edge) for edge in edges), Settings(**knobs))
    return Supervisor(spec, plan(spec))


def one(name: str, kind: str = "map", **options: Any) -> ProcessorSpec:
    return ProcessorSpec(name, kind, CODE, restart=options.pop("restart", POLICY), **options)  # type: ignore[arg-type]


def chain(**knobs: Any) -> Supervisor:
    """source -> work (2 workers) -> end."""
    return make(
        one("source", "source"),
        one("work", workers=2),
        one("end"),
        edges=(("source", "work"), ("work", "end")),
        **knobs,
    )


def run(machine: Supervisor, now: float = 0.0) -> None:
    """Start, and let every worker report."""
    machine.start(now)
    for number, name in enumerate(list(machine.slots), 100):
        machine.handle(ev.Spawned(name, number, 1), now)
        machine.handle(ev.Ready(name), now)
    machine.validate()


def died(machine: Supervisor, worker: str, now: float = 0.0, status: int = -9) -> list[ev.Command]:
    found = machine.handle(ev.Exited(worker, machine.slots[worker].pid, status, 0.5), now)
    machine.validate()
    return found


def finish(machine: Supervisor, worker: str) -> list[ev.Command]:
    machine.handle(ev.Done(worker), 0.0)
    return died(machine, worker, status=0)


def kinds(commands: list[ev.Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def test_start_begins_with_the_consumers() -> None:
    commands = chain().start(0.0)
    names = ["end#0", "work#0", "work#1", "source#0"]
    assert [command.worker for command in commands if isinstance(command, ev.DeclareEnds)] == names
    assert [command for command in commands if isinstance(command, ev.StartWorker)] == [
        ev.StartWorker(name, 1) for name in names
    ]


def test_it_is_up_when_every_worker_is_ready() -> None:
    machine = chain()
    machine.start(0.0)
    for name in ("end#0", "work#0", "work#1"):
        assert machine.handle(ev.Ready(name), 0.0) == []
    assert machine.state == "starting"
    assert machine.handle(ev.Ready("source#0"), 0.0) == [ev.PipeUp()]
    assert machine.state == "running"
    assert machine.handle(ev.Ready("source#0"), 0.0) == []


def test_it_does_not_wait_for_scripts() -> None:
    machine = make(one("script", "entry", entry="x.py"), one("end"), edges=(("script", "end"),))
    machine.start(0.0)
    assert machine.handle(ev.Ready("end#0"), 0.0) == [ev.PipeUp()]


def test_start_twice_is_refused() -> None:
    machine = chain()
    machine.start(0.0)
    with pytest.raises(IllegalTransition):
        machine.start(0.0)


def test_a_worker_that_died_is_recovered_and_started_again_with_back_off() -> None:
    machine = chain()
    run(machine)
    pid = machine.slots["work#0"].pid
    assert died(machine, "work#0", 1.0) == [ev.Recover("work#0", pid, 1), ev.StartWorker("work#0", 2)]
    machine.handle(ev.Spawned("work#0", 200, 2), 1.0)
    assert died(machine, "work#0", 2.0) == [ev.Recover("work#0", 200, 2)]
    assert machine.deadline() == pytest.approx(2.1)
    assert machine.handle(ev.Tick(), 2.05) == []
    assert machine.handle(ev.Tick(), 2.11) == [ev.StartWorker("work#0", 3)]
    assert machine.deadline() is None
    machine.handle(ev.Spawned("work#0", 201, 3), 2.2)
    died(machine, "work#1", 3.0)  # the window counts the processor's workers together
    assert machine.deadline() == pytest.approx(3.2)


def test_deaths_outside_the_window_do_not_count() -> None:
    machine = chain()
    run(machine)
    for number in range(10):
        now = number * 100.0
        machine.handle(ev.Spawned("work#0", 200 + number, 2), now)
        assert kinds(died(machine, "work#0", now)) == ["Recover", "StartWorker"]


def test_more_deaths_than_the_limit_fail_the_pipe_with_the_reason() -> None:
    machine = chain()
    run(machine)
    for number in range(3):
        machine.handle(ev.Spawned("work#0", 200 + number, 2), 0.0)
        died(machine, "work#0", number * 1.0)
        machine.handle(ev.Tick(), number + 0.9)
    machine.handle(ev.Spawned("work#0", 300, 2), 4.0)
    machine.handle(ev.Raised("work#0", "run", "ValueError", "no good", "the stack", False), 4.0)
    commands = died(machine, "work#0", 4.0)
    assert commands[0] == ev.Recover("work#0", 300, 2)
    assert {command.worker for command in commands if isinstance(command, ev.KillWorker)} == {
        "end#0",
        "work#1",
        "source#0",
    }
    ended = commands[-1]
    assert isinstance(ended, ev.PipeEnded) and ended.state == "failed"
    for text in ("'work'", "4 times", "restart.limit=3", "signal 9", "ValueError: no good", "the stack", "work#0"):
        assert text in ended.reasons[0]


def test_without_a_limit_it_goes_on() -> None:
    machine = make(one("work", restart=RestartPolicy(limit=0, backoff=0.0, backoff_max=0.0)))
    run(machine)
    for number in range(500):
        machine.handle(ev.Spawned("work#0", 1000 + number, 2), 0.0)
        assert kinds(died(machine, "work#0", 0.0)) == ["Recover", "StartWorker"]


def test_done_then_killed_has_ended() -> None:
    machine = chain()
    run(machine)
    machine.handle(ev.Done("source#0"), 0.0)
    commands = died(machine, "source#0", status=-9)
    assert kinds(commands) == ["Recover", "CloseEnds", "DiscardInputs"]


@pytest.mark.parametrize(
    ("kind", "ends"), [("map", False), ("class", False), ("driver", True), ("source", True), ("entry", True)]
)
def test_exit_0_without_done_is_the_end_only_of_code_that_drives_itself(kind: str, ends: bool) -> None:
    machine = make(one("work", kind, entry="x.py" if kind == "entry" else ""))
    run(machine)
    commands = died(machine, "work#0", status=0)
    assert (machine.state == "completed") == ends
    assert kinds(commands)[1] == ("CloseEnds" if ends else "StartWorker")


def test_completion_follows_the_stream() -> None:
    machine = chain()
    run(machine)
    assert kinds(finish(machine, "source#0")) == ["Recover", "CloseEnds", "DiscardInputs"]
    assert kinds(finish(machine, "work#0")) == ["Recover", "CloseEnds"]
    assert kinds(finish(machine, "work#1")) == ["Recover", "CloseEnds", "DiscardInputs"]
    assert finish(machine, "end#0")[-1] == ev.PipeEnded("completed")
    assert machine.crews["work"].cpu_seconds == 1.0


def test_workers_that_end_before_all_are_ready_complete_the_pipe() -> None:
    machine = chain()
    machine.start(0.0)
    for name in ("source#0", "work#0", "work#1"):
        finish(machine, name)
    assert finish(machine, "end#0")[-1] == ev.PipeEnded("completed")


def test_code_that_cannot_load_fails_at_once() -> None:
    machine = chain()
    machine.start(0.0)
    commands = machine.handle(ev.Raised("work#1", "load", "ImportError", "no module x", "stack", True), 0.0)
    machine.validate()
    assert kinds(commands) == ["KillWorker"] * 4 + ["PipeEnded"]
    assert "cannot load its code: ImportError: no module x" in machine.reasons[0]


def test_a_worker_that_cannot_be_forked_counts_as_a_death() -> None:
    machine = chain()
    machine.start(0.0)
    assert kinds(machine.handle(ev.Refused("work#0", "fork: too many"), 0.0)) == ["StartWorker"]
    for number in range(1, 4):
        commands = machine.handle(ev.Refused("work#0", "fork: too many"), number * 10.0)
        machine.handle(ev.Tick(), number * 10.0 + 5)
    assert isinstance(commands[-1], ev.PipeEnded)
    assert "fork: too many" in machine.reasons[0]


def test_a_stopped_worker_is_killed_after_the_grace_and_replaced() -> None:
    machine = chain(stopped_grace=1.0)
    run(machine)
    assert machine.handle(ev.Paused("work#0", True), 5.0) == []
    assert machine.deadline() == 6.0
    assert machine.handle(ev.Tick(), 5.9) == []
    assert machine.handle(ev.Tick(), 6.0) == [ev.KillWorker("work#0")]
    assert kinds(died(machine, "work#0", 6.0)) == ["Recover", "StartWorker"]


def test_a_worker_that_continues_within_the_grace_is_left_alone() -> None:
    machine = chain(stopped_grace=1.0)
    run(machine)
    machine.handle(ev.Paused("work#0", True), 5.0)
    machine.handle(ev.Paused("work#0", False), 5.5)
    assert machine.deadline() is None
    assert machine.handle(ev.Tick(), 7.0) == []


def test_a_supervisor_that_was_stopped_itself_gives_a_stopped_worker_its_time_again() -> None:
    machine = chain(stopped_grace=1.0)
    run(machine)
    machine.handle(ev.Paused("work#0", True), 5.0)
    assert machine.handle(ev.Tick(), 60.0) == []
    assert machine.deadline() == 61.0
    assert machine.handle(ev.Tick(), 61.0) == [ev.KillWorker("work#0")]


@pytest.mark.parametrize("kind", ["driver", "source", "entry"])
def test_drain_asks_roots_that_drive_themselves(kind: str) -> None:
    machine = make(one("root", kind, entry="x" if kind == "entry" else ""), one("end"), edges=(("root", "end"),))
    run(machine)
    assert machine.handle(ev.DrainPipe(), 0.0) == [ev.CloseInput(), ev.DrainWorker("root#0")]
    machine.validate()
    assert kinds(died(machine, "root#0")) == [
        "Recover",
        "CloseEnds",
        "DiscardInputs",
    ]  # it died draining: that is its end
    assert kinds(died(machine, "end#0")) == ["Recover", "StartWorker"]  # what is in the pipe is still to be processed
    machine.handle(ev.Spawned("end#0", 300, 1), 0.0)
    assert finish(machine, "end#0")[-1] == ev.PipeEnded("completed")


def test_drain_only_closes_the_input_of_mapped_roots() -> None:
    machine = make(one("root"), one("end"), edges=(("root", "end"),))
    run(machine)
    assert machine.handle(ev.DrainPipe(), 0.0) == [ev.CloseInput()]
    assert kinds(died(machine, "root#0")) == ["Recover", "StartWorker"]


def test_drain_does_not_bring_back_a_source_that_waits_for_its_restart() -> None:
    machine = chain()
    run(machine)
    died(machine, "source#0", 1.0)
    machine.handle(ev.Spawned("source#0", 300, 1), 1.0)
    died(machine, "source#0", 1.0)
    assert machine.deadline() is not None
    commands = machine.handle(ev.DrainPipe(), 1.05)
    machine.validate()
    assert kinds(commands) == ["CloseInput", "CloseEnds", "DiscardInputs"]
    assert machine.deadline() is None


def test_drain_while_starting() -> None:
    machine = chain()
    machine.start(0.0)
    assert ev.DrainWorker("source#0") in machine.handle(ev.DrainPipe(), 0.0)
    machine.handle(ev.Ready("source#0"), 0.0)
    machine.validate()
    assert machine.state == "draining"


def scaled(most: int = 3) -> Supervisor:
    policy = AutoscalePolicy(up_depth=0.5, up_age=0.25, down_idle=1.0, interval=0.1)
    machine = make(one("work", autoscale=most), autoscale=policy)
    run(machine)
    return machine


def test_scale_up_and_down() -> None:
    machine = scaled()
    assert machine.handle(ev.Load("work", 0.9, 1.0, 50), 1.0) == [ev.DeclareEnds("work#1"), ev.StartWorker("work#1", 1)]
    machine.handle(ev.Spawned("work#1", 201, 1), 1.0)
    machine.handle(ev.Ready("work#1"), 1.0)
    assert machine.handle(ev.Load("work", 0.9, 1.0, 50), 2.0) == [ev.DeclareEnds("work#2"), ev.StartWorker("work#2", 1)]
    assert machine.handle(ev.Load("work", 0.9, 1.0, 50), 3.0) == []
    machine.handle(ev.Spawned("work#2", 202, 1), 3.0)
    machine.handle(ev.Ready("work#2"), 3.0)
    machine.validate()
    assert machine.handle(ev.Load("work", 0.0, 0.0, 0), 4.0) == []
    assert machine.handle(ev.Load("work", 0.0, 0.0, 0), 5.1) == [ev.DrainWorker("work#2")]
    assert kinds(finish(machine, "work#2")) == ["Recover", "CloseEnds"]
    assert machine.handle(ev.Load("work", 0.9, 1.0, 50), 6.0) == [ev.DeclareEnds("work#2"), ev.StartWorker("work#2", 2)]
    machine.validate()


def test_a_worker_that_dies_while_it_drains_is_not_replaced() -> None:
    machine = scaled()
    machine.handle(ev.Load("work", 0.9, 1.0, 50), 1.0)
    machine.handle(ev.Spawned("work#1", 201, 1), 1.0)
    machine.handle(ev.Ready("work#1"), 1.0)
    machine.handle(ev.Load("work", 0.0, 0.0, 0), 2.0)
    assert machine.handle(ev.Load("work", 0.0, 0.0, 0), 4.0) == [ev.DrainWorker("work#1")]
    assert kinds(died(machine, "work#1", 4.0)) == ["Recover", "CloseEnds"]


def test_nothing_is_scaled_once_the_stream_ended() -> None:
    machine = scaled()
    machine.handle(ev.Done("work#0"), 1.0)
    assert machine.handle(ev.Load("work", 0.9, 1.0, 50), 1.0) == []


def test_late_and_strange_events_change_nothing() -> None:
    machine = chain()
    run(machine)
    assert machine.handle(ev.Exited("nobody#0", 1, 0, 0.0), 0.0) == []
    assert machine.handle(ev.Exited("work#0", 4711, -9, 0.0), 0.0) == []  # an earlier life
    assert kinds(machine.handle(ev.StopPipe(), 0.0)) == ["KillWorker"] * 4 + ["PipeEnded"]
    for event in (
        ev.StopPipe(),
        ev.DrainPipe(),
        ev.Tick(),
        ev.Ready("work#0"),
        ev.Paused("work#0", True),
        ev.Load("work", 1.0, 1.0, 9),
        ev.GaveUp("x"),
        ev.Spawned("nobody#0", 1, 1),
        ev.Exited("nobody#0", 1, 0, 0.0),
    ):
        assert machine.handle(event, 1.0) == []
        machine.validate()
    assert machine.state == "stopped" and machine.reasons == []
    assert machine.handle(ev.Spawned("work#0", 300, 3), 1.0) == [ev.KillWorker("work#0")]
    assert machine.handle(ev.Exited("work#0", 300, -9, 1.0), 1.0) == [ev.Recover("work#0", 300, 3)]


def test_stop_before_start() -> None:
    machine = chain()
    assert machine.handle(ev.StopPipe(), 0.0) == [ev.PipeEnded("stopped")]


# ------------------------------------------------------------------ random histories


class World:
    """Processes as the supervisor's commands make them: what may happen next, and what must hold of what is asked
    for."""

    def __init__(self, machine: Supervisor) -> None:
        self.machine = machine
        self.now = 0.0
        self.pids = 100
        self.asked: dict[str, int] = {}
        """Workers to be forked, with their epoch."""
        self.alive: dict[str, int] = {}
        """Pid of each process."""
        self.epochs: dict[str, int] = {}
        self.owed: set[str] = set()
        """Died and not recovered."""
        self.open: set[str] = set()
        """Ends declared and not closed by the supervisor."""
        self.done: set[str] = set()
        self.ended = False

    def follow(self, event: ev.Event) -> None:
        commands = self.machine.handle(event, self.now)
        self.machine.validate()
        self.obey(commands)

    def obey(self, commands: list[ev.Command]) -> None:
        for command in commands:
            if isinstance(command, ev.StartWorker):
                assert not self.ended, "an ended pipe starts nothing"
                assert command.epoch > self.epochs.get(command.worker, 0)
                assert command.worker not in self.owed, "recovered before it is started again"
                assert command.worker not in self.alive and command.worker not in self.asked
                assert command.worker in self.open
                self.epochs[command.worker] = command.epoch
                self.asked[command.worker] = command.epoch
            elif isinstance(command, ev.Recover):
                self.owed.discard(command.worker)
            elif isinstance(command, ev.DeclareEnds):
                assert command.worker not in self.open
                self.open.add(command.worker)
            elif isinstance(command, ev.CloseEnds):
                assert command.worker in self.open
                self.open.discard(command.worker)
                assert self.machine.slots[command.worker].ended
                assert command.worker not in self.alive
            elif isinstance(command, ev.DiscardInputs):
                assert all(slot.ended for slot in self.machine.crews[command.processor].slots)
            elif isinstance(command, ev.PipeEnded):
                assert not self.ended
                self.ended = True
        assert self.ended == (self.machine.state in PIPE_ENDED)
        for name, slot in self.machine.slots.items():
            if not self.ended and slot.ended:
                assert name not in self.open, "who never runs again has its ends closed"
            if slot.alive or slot.spawn_at is not None:
                assert name in self.open

    def step(self, draw: Any) -> None:
        self.now += draw(st.sampled_from([0.0, 0.01, 0.3, 2.0]))
        names = sorted(self.machine.slots)
        name = draw(st.sampled_from(names))
        move = draw(st.integers(0, 13))
        if move <= 3 and self.asked:
            name = draw(st.sampled_from(sorted(self.asked)))
            del self.asked[name]
            self.pids += 1
            if draw(st.integers(0, 9)) == 0 and not self.ended:
                self.follow(ev.Refused(name, "no more"))
                return
            self.alive[name] = self.pids
            self.done.discard(name)
            self.follow(ev.Spawned(name, self.pids, self.pids))
        elif move <= 5 and name in self.alive:
            self.follow(ev.Ready(name))
        elif move == 6 and name in self.alive:
            self.done.add(name)
            self.follow(ev.Done(name))
        elif move <= 9 and name in self.alive:
            pid = self.alive.pop(name)
            self.owed.add(name)
            self.follow(ev.Exited(name, pid, 0 if name in self.done else draw(st.sampled_from([0, 1, -9, -11])), 0.1))
            assert name not in self.owed, "what a dead process held is given back at once"
        elif move == 10 and name in self.alive:
            self.follow(ev.Paused(name, draw(st.booleans())))
        elif move == 11:
            self.follow(ev.Tick())
        elif move == 12:
            self.follow(ev.Load("work", *draw(st.sampled_from([(0.9, 1.0, 50), (0.0, 0.0, 0)]))))
        elif move == 13 and draw(st.integers(0, 12)) == 0:
            raised = ev.Raised(name, "frame", "E", "m", "t", draw(st.booleans()))
            self.follow(draw(st.sampled_from([ev.DrainPipe(), ev.StopPipe(), ev.GaveUp("no"), raised])))

    def come_to_an_end(self) -> None:
        """From any state: when all processes end well, the pipe ends, with nothing left to start."""
        self.follow(ev.DrainPipe())
        for _ in range(200):
            if self.ended and not self.alive and not self.asked:
                break
            self.now += 10.0
            self.follow(ev.Tick())
            for name in sorted(self.asked):
                del self.asked[name]
                self.pids += 1
                self.alive[name] = self.pids
                self.follow(ev.Spawned(name, self.pids, self.pids))
                self.follow(ev.Ready(name))
            for name, pid in sorted(self.alive.items()):
                self.follow(ev.Done(name))
                del self.alive[name]
                self.follow(ev.Exited(name, pid, 0, 0.1))
        assert self.ended
        assert self.machine.deadline() is None


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_histories(data: st.DataObject) -> None:
    limit = data.draw(st.sampled_from([0, 2, 20]))
    policy = RestartPolicy(limit=limit, window=5.0, backoff=0.1, backoff_max=1.0)
    machine = make(
        one("source", data.draw(st.sampled_from(["source", "driver"])), restart=policy),
        one("work", workers=1, autoscale=3, restart=policy),
        one("end", "class", workers=2, restart=policy),
        edges=(("source", "work"), ("work", "end")),
        autoscale=AutoscalePolicy(down_idle=0.5, interval=0.1),
    )
    world = World(machine)
    commands = machine.start(0.0)
    machine.validate()
    world.obey(commands)
    for _ in range(data.draw(st.integers(0, 80))):
        world.step(data.draw)
    world.come_to_an_end()


def script(**options: Any) -> Supervisor:
    machine = make(ProcessorSpec("s", "entry", entry="/s.py", restart=options.pop("restart", POLICY), **options))
    machine.start(0.0)
    return machine


def spawned(machine: Supervisor, pid: int, now: float) -> None:
    machine.handle(ev.Tick(), now)
    for name in machine.slots:
        machine.handle(ev.Spawned(name, pid, 1), now)


def test_a_script_that_never_connects_fails_the_pipe_after_three_deaths_with_what_it_said() -> None:
    machine = script(restart=RestartPolicy(limit=0))
    for life in range(3):
        assert machine.state == "starting" and not machine.reasons
        spawned(machine, 100 + life, 60.0 * life)
        machine.handle(ev.Raised("s#0", "run", "SystemExit", "2", "error: no --model was given", False), 60.0 * life)
        died(machine, "s#0", 60.0 * life, status=2)
    assert machine.state == "failed"
    (reason,) = machine.reasons
    assert "/s.py ended 3 times and never once got to Processor('s').connect()" in reason
    assert "exit status 2" in reason and "no --model was given" in reason


def test_a_script_that_connected_once_or_was_killed_has_its_whole_restart_limit() -> None:
    for connects, status in ((True, 1), (False, -9)):
        machine = script(restart=RestartPolicy(limit=0))
        for life in range(8):
            spawned(machine, 100 + life, 60.0 * life)
            if connects and life == 2:
                machine.handle(ev.Ready("s#0"), 60.0 * life)
            died(machine, "s#0", 60.0 * life, status=status)
        assert machine.state != "failed"


def test_of_a_plan_with_some_of_the_workers_only_those_are_started_and_scaled() -> None:
    spec = PipeSpec("p", (one("work", workers=3, autoscale=5),))
    whole = plan(spec)
    some = msgspec.structs.replace(whole, workers=tuple(part for part in whole.workers if part.index in (1, 2, 4)))
    machine = Supervisor(spec, some)
    started = [command.worker for command in machine.start(0.0) if isinstance(command, ev.StartWorker)]
    assert started == ["work#1", "work#2"]
    assert machine._indices("work") == [1, 2, 4] and machine._indices("nobody") == []
    machine.validate()
