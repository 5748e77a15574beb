"""When a fork server that owes an answer is killed."""

from __future__ import annotations

import pytest

from upipe.runtime import overdue
from upipe.runtime.overdue import EVERY, HANGS, LATE, STOPPED, Overdue


@pytest.fixture
def owing() -> Overdue:
    found = Overdue()
    found.asked(100.0)
    return found


def test_nobody_looks_at_one_that_owes_nothing() -> None:
    found = Overdue()
    assert found.due is None and found.look("T", 1e9) == ""
    found.asked(1.0)
    found.answered(False, 2.0)
    assert found.due is None


def test_a_stopped_one_is_killed_at_the_first_look(owing: Overdue) -> None:
    owing.asked(103.0)  # another request gives it no more time
    assert owing.due == 100.0 + STOPPED
    assert owing.look("T", owing.due) == "it was stopped (SIGSTOP) and answered nothing for 5 s"


def test_each_answer_gives_the_others_their_time(owing: Overdue) -> None:
    owing.answered(True, 104.0)
    assert owing.due == 104.0 + STOPPED


@pytest.mark.parametrize("state", ["S", "D", "R", None])
def test_a_slow_one_has_longer(owing: Overdue, state: str | None) -> None:
    looks = 0
    while not (why := owing.look(state, now := owing.due or 0.0)):
        assert owing.due == now + EVERY
        looks += 1
    assert now - 100.0 == HANGS and looks == HANGS - STOPPED and why == "it answered nothing for 30 s"


def test_one_that_is_stopped_while_it_is_slow_is_killed_then(owing: Overdue) -> None:
    assert not owing.look("R", 105.0)
    assert owing.look("T", 106.0)


def test_a_late_look_and_a_debugger_prove_nothing(owing: Overdue) -> None:
    late = 100.0 + STOPPED + LATE + 0.1
    assert not owing.look("T", late) and owing.due == late + STOPPED
    assert not owing.look("t", owing.due) and owing.due == late + 2 * STOPPED
    assert owing.look("T", owing.due)


def test_the_knobs_agree() -> None:
    from upipe.cluster import halts

    assert overdue.STOPPED == halts.GRACE and overdue.HANGS > overdue.STOPPED
