"""Attending as a pure machine: whom it asks, what it follows, when it gives up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upipe.cluster import attending as attending_module
from upipe.cluster import desk
from upipe.cluster.attending import FORGOTTEN, LONGEST_PAUSE, LOST, Attending, Follow, GiveUp, Tell
from upipe.cluster.dealings import NodeReport, TellClient
from upipe.cluster.wire import News, Orders

CLIENT = "c" * 16
RUNNING, DONE = TellClient("running"), TellClient("completed")


def news(number: int = 1, fence: tuple[int, int] | None = None, told: TellClient = RUNNING, *nodes: str) -> News:
    return News(number, told, Orders(fence) if fence else None, dict.fromkeys(nodes, ("h:1",)))


def test_it_asks_the_first_with_what_it_has() -> None:
    one = Attending(CLIENT, ("a", "b", "a"))
    assert one.nodes == ["a", "b"]
    report = NodeReport(CLIENT, 1)
    first = one.poll(report)
    assert (first.node, first.attendance.client, first.attendance.report) == ("a", CLIENT, report)
    assert one.answered("a", news(7, (1, 2), RUNNING, "d")) == [Follow(Orders((1, 2))), Tell(RUNNING)]
    second = one.poll(None, patience=0.0)
    assert (second.attendance.heard, second.attendance.fence, second.attendance.patience) == (7, (1, 2), 0.0)
    assert one.nodes == ["a", "b", "d"]


def test_orders_are_followed_once_and_never_back() -> None:
    one = Attending(CLIENT, ("a", "b"))
    one.answered("a", news(1, (2, 5)))
    for fence in ((2, 5), (2, 4), (1, 9)):
        assert one.answered("b", news(2, fence)) == [Tell(RUNNING)]
    assert one.heard == 1  # b is not the one that is asked
    assert one.answered("a", news(3, (3, 1))) == [Follow(Orders((3, 1))), Tell(RUNNING)]


def test_what_has_ended_stays_so() -> None:
    one = Attending(CLIENT, ("a",))
    assert one.answered("a", news(1, None, DONE)) == [Tell(DONE)] and one.ended
    assert one.answered("a", news(2, (9, 9), RUNNING)) == [] and one.ended


def test_the_others_are_asked_in_turn_and_a_round_for_nothing_is_followed_by_a_pause() -> None:
    one = Attending(CLIENT, ("a", "b", "c"))
    asked, pauses = [], []
    for _ in range(6):
        node = one.poll(None).node
        asked.append(node)
        pauses.append(one.failed(node, "not_coordinator", "no", 1.0))
    assert asked == ["a", "b", "c", "a", "b", "c"] and one.heard == 0
    assert [pause > 0 for pause in pauses] == [False, False, True, False, False, True]  # type: ignore[operator]
    assert pauses[5] > pauses[2]  # type: ignore[operator]
    one.answered("a", news(1))
    assert one.failed("b", "", "late", 2.0) == 0.0 and one.poll(None).node == "a"  # not the one that is asked


def test_who_coordinated_last_is_asked_between_any_two_others() -> None:
    """Or many others that are cut off would take longer than it waits for this process."""
    one = Attending(CLIENT, "abcdefghij")
    one.answered("a", news(4))
    asked, pauses = [], []
    for _ in range(36):
        asked.append(one.poll(None).node)
        pauses.append(one.failed(asked[-1], "", "cut off", 1.0))
    assert asked[::2] == ["a"] * 18 and asked[1::2] == [*"bcdefghij"] * 2
    assert [number for number, pause in enumerate(pauses) if pause] == [17, 35], "a pause after each round"
    one.answered("d", news(5))
    assert one.failed(one.poll(None).node, "", "", 2.0) == 0.0
    assert one._last == "d"


def test_it_gives_up_when_nobody_coordinates_for_long() -> None:
    one = Attending(CLIENT, ("a", "b"))
    now, found = 0.0, 0.0
    while not isinstance(found, GiveUp):
        assert now <= LOST + 2 * LONGEST_PAUSE
        found = one.failed(one.poll(None).node, "", "the cable is cut", now)
        now += found if isinstance(found, float) else 0.0
    assert now > LOST and "the cable is cut" in found.reason


def test_it_gives_up_soon_when_everybody_has_forgotten_the_pipe() -> None:
    one = Attending(CLIENT, ("a", "b"))
    results = [one.failed(one.poll(None).node, FORGOTTEN, "", 1.0) for _ in range(5)]
    assert isinstance(results[-1], GiveUp) and "no node knows the pipe" in results[-1].reason
    assert not any(isinstance(one, GiveUp) for one in results[:-1])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_whatever_happens_it_finds_the_coordinator_and_ends_at_its_newest_orders(seed: int, size: int) -> None:
    """Nodes coordinate in turn, answers are lost or late; at the end one stays, and everything it says is followed."""
    chance = random.Random(seed)
    nodes = [f"n{number}" for number in range(size)]
    one = Attending(CLIENT, nodes[: chance.randint(1, size)])
    one.nodes += [node for node in nodes if node not in one.nodes]
    now, fence = 0.0, (1, 1)
    coordinator = nodes[0]
    late: list[tuple[str, News]] = []
    fences: list[tuple[int, int]] = []
    for step in range(60):
        calm = step >= 60 - 3 * size
        if not calm and chance.random() < 0.3:
            coordinator, fence = chance.choice(nodes), (fence[0] + 1, fence[1] + 1)
        node = one.poll(None).node
        assert node in nodes and sorted(one.nodes) == sorted(set(one.nodes))
        answer = news(step + 1, fence)
        if node != coordinator:
            pause = one.failed(node, chance.choice(("not_coordinator", "", "not_yet")), "no", now)
            assert isinstance(pause, float) and 0 <= pause <= LONGEST_PAUSE
            now += pause
        elif not calm and chance.random() < 0.3:
            late.append((node, answer))
            one.failed(node, "", "lost", now)
        else:
            fences += [found.orders.fence for found in one.answered(node, answer) if isinstance(found, Follow)]
        if late and chance.random() < 0.3:
            fences += [found.orders.fence for found in one.answered(*late.pop(0)) if isinstance(found, Follow)]
    assert fences == sorted(set(fences)) and one.fence == fence and one.poll(None).node == coordinator


@pytest.mark.parametrize("state", ["completed", "failed", "stopped"])
def test_every_end_is_one(state: str) -> None:
    one = Attending(CLIENT, ("a",))
    one.answered("a", news(1, None, TellClient(state)))
    assert one.ended


def test_who_may_not_coordinate_is_asked_briefly() -> None:
    """It may be cut off; the coordinator takes a process for dead that spends too long with such nodes."""
    attending = Attending("c", ["1", "2"])
    assert attending.poll(None).attendance.patience == attending_module.PATIENCE
    attending.failed("1", "", "it is gone", 0.0)
    assert attending.poll(None).node == "2" and attending.poll(None).attendance.patience == 0.0
    assert attending.margin == attending_module.SEARCHING
    assert desk.BROKEN > 2 * 3 * attending_module.SEARCHING, "another one and itself, with three addresses each"
