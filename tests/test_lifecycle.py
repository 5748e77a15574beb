"""The transition tables and the machine that runs them."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upipe.errors import IllegalTransition
from upipe.lifecycle import (
    PIPE,
    PIPE_ENDED,
    STORY_LENGTH,
    WORKER,
    WORKER_ENDED,
    Machine,
    Table,
    events,
    markdown,
)

TABLES = {"pipe": (PIPE, "declared", PIPE_ENDED), "worker": (WORKER, "spawning", WORKER_ENDED)}
every_table = pytest.mark.parametrize(("table", "initial", "ended"), TABLES.values(), ids=TABLES)


def run(table: Table, initial: str, *fired: str) -> Machine:
    machine = Machine(table, initial)
    for event in fired:
        machine.fire(event)
    return machine


@every_table
def test_tables_lead_to_known_states_and_all_can_be_reached(table: Table, initial: str, ended: frozenset[str]) -> None:
    reached, front = {initial}, [initial]
    while front:
        for after in table[front.pop()].values():
            assert after in table
            if after not in reached:
                reached.add(after)
                front.append(after)
    assert reached == set(table)


@every_table
def test_what_ended_stays_and_what_lives_can_be_stopped(table: Table, initial: str, ended: frozenset[str]) -> None:
    for state, moves in table.items():
        if state in ended:
            assert set(moves.values()) == {state}
            assert {"drain", "stop"} <= set(moves)
        else:
            assert moves["stop"] == "stopped"


@pytest.mark.parametrize(
    ("fired", "state"),
    [
        (("start", "up", "complete"), "completed"),
        (("start", "up", "drain", "complete"), "completed"),
        (("start", "drain", "up", "drain", "complete"), "completed"),
        (("start", "complete"), "completed"),
        (("start", "up", "fail", "fail"), "failed"),
        (("start", "fail", "stop", "drain"), "failed"),
        (("start", "up", "stop", "stop", "drain"), "stopped"),
        (("start", "up", "complete", "stop", "drain"), "completed"),
        (("stop", "stop"), "stopped"),
    ],
)
def test_pipe_paths(fired: tuple[str, ...], state: str) -> None:
    assert run(PIPE, "declared", *fired).state == state


@pytest.mark.parametrize(
    ("fired", "illegal"),
    [
        ((), "up"),
        ((), "drain"),
        ((), "complete"),
        ((), "fail"),
        (("start",), "start"),
        (("start", "up"), "start"),
        (("start", "up"), "up"),
        (("start", "up", "complete"), "start"),
        (("start", "up", "complete"), "fail"),
        (("start", "up", "fail"), "complete"),
        (("start", "stop"), "start"),
        (("start", "stop"), "up"),
        (("stop",), "start"),
    ],
)
def test_pipe_refuses(fired: tuple[str, ...], illegal: str) -> None:
    machine = run(PIPE, "declared", *fired)
    before = (machine.state, machine.story)
    assert not machine.can(illegal)
    with pytest.raises(IllegalTransition):
        machine.fire(illegal)
    assert (machine.state, machine.story) == before


@pytest.mark.parametrize(
    ("fired", "state"),
    [
        (("ready", "exit"), "exited"),
        (("exit",), "exited"),
        (("ready", "die", "spawn", "ready", "drain", "exit"), "exited"),
        (("drain", "ready", "exit"), "exited"),
        (("ready", "drain", "die", "drain"), "exited"),
        (("die", "fail"), "failed"),
        (("ready", "fail", "die", "stop"), "failed"),
        (("ready", "stop", "die", "exit"), "stopped"),
        (("die", "stop"), "stopped"),
    ],
)
def test_worker_paths(fired: tuple[str, ...], state: str) -> None:
    assert run(WORKER, "spawning", *fired).state == state


@pytest.mark.parametrize(
    ("fired", "illegal"),
    [
        ((), "spawn"),
        (("die",), "ready"),
        (("die",), "die"),
        (("ready",), "ready"),
        (("exit",), "spawn"),
        (("exit",), "die"),
    ],
)
def test_worker_refuses(fired: tuple[str, ...], illegal: str) -> None:
    with pytest.raises(IllegalTransition):
        run(WORKER, "spawning", *fired, illegal)


def test_fire_returns_the_new_state_and_tells_the_story() -> None:
    machine = Machine(PIPE, "declared")
    assert machine.fire("start") == "starting"
    assert machine.fire("up") == "running"
    assert machine.story == (("declared", "start"), ("starting", "up"))


def test_refusal_names_the_machine_the_event_what_is_possible_and_the_history() -> None:
    machine = Machine(PIPE, "declared", "pipe 'plus-one'")
    machine.fire("start")
    machine.fire("stop")
    with pytest.raises(IllegalTransition) as caught:
        machine.fire("up")
    text = str(caught.value)
    assert "pipe 'plus-one' is stopped" in text
    assert "'up' is not possible" in text
    assert "possible now: drain, stop" in text
    assert "declared (start) -> starting (stop)" in text
    assert caught.value.story == machine.story
    assert pickle.loads(pickle.dumps(caught.value)).story == machine.story


def test_story_is_bounded_and_repeats_do_not_push_it_out() -> None:
    machine = run(PIPE, "declared", "start", "stop", *["stop"] * 100)
    assert machine.story == (("declared", "start"), ("starting", "stop"), ("stopped", "stop"))
    lives = run(WORKER, "spawning", *["ready", "die", "spawn"] * STORY_LENGTH)
    assert len(lives.story) == STORY_LENGTH
    assert lives.story[-1] == ("lost", "spawn")


def test_dead_end_and_unknown_initial_state() -> None:
    with pytest.raises(IllegalTransition, match="possible now: nothing"):
        Machine({"end": {}}, "end").fire("go")
    with pytest.raises(ValueError, match="'nowhere' is no state; the table has declared"):
        Machine(PIPE, "nowhere")


def test_repr() -> None:
    assert repr(Machine(WORKER, "lost", "worker a#0")) == "<worker a#0: lost>"


@every_table
@given(data=st.data())
def test_any_sequence_follows_the_table(table: Table, initial: str, ended: frozenset[str], data: st.DataObject) -> None:
    machine = Machine(table, initial)
    for event in data.draw(st.lists(st.sampled_from((*events(table), "nonsense")), max_size=20)):
        before, story = machine.state, machine.story
        if machine.can(event):
            assert machine.fire(event) == machine.state == table[before][event]
        else:
            with pytest.raises(IllegalTransition):
                machine.fire(event)
            assert (machine.state, machine.story) == (before, story)


def test_markdown_is_one_rectangle_with_every_transition() -> None:
    small = {"off": {"press": "on"}, "on": {"press": "off", "break": "dead"}, "dead": {}}
    assert markdown(small) == (
        "| state | press | break |\n"
        "| --- | --- | --- |\n"
        "| **off** | on | - |\n"
        "| **on** | off | dead |\n"
        "| **dead** | - | - |\n"
    )


@every_table
def test_markdown_of_the_tables(table: Table, initial: str, ended: frozenset[str]) -> None:
    rows = markdown(table).splitlines()
    assert len(rows) == len(table) + 2
    assert len({row.count("|") for row in rows}) == 1
