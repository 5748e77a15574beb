"""A stopped process is given up after a while, and not because who looks was stopped itself."""

from __future__ import annotations

from upipe.cluster.halts import EVERY, GRACE, LATE, Halt


def looks(halt: Halt, states: str, began: float = 0.0) -> list[bool]:
    """One look each EVERY seconds."""
    return [halt.look(state, began + number * EVERY) for number, state in enumerate(states)]


def test_what_stays_stopped_is_killed_after_the_grace() -> None:
    found = looks(Halt(), "SS" + "T" * 8)
    assert found.index(True) == 2 + GRACE / EVERY


def test_what_goes_on_in_time_is_left_alone() -> None:
    halt = Halt()
    assert not any(looks(halt, "TTTTT" + "S" + "TTTTT"))
    assert not any(looks(Halt(), "t" * 20)), "a debugger holds it"
    assert not Halt().look(None, 0.0)


def test_late_looks_prove_nothing() -> None:
    halt = Halt()
    assert not any(looks(halt, "TT"))
    assert not halt.look("T", 3600.0), "who looks was stopped too, or the machine slept"
    assert not halt.look("T", 3600.0 + GRACE - 0.1 - LATE) or GRACE <= LATE
    again = Halt()
    times = [number * (EVERY + LATE) for number in range(10)]
    assert any(again.look("T", now) for now in times), "a little late is not late"
