"""The controller that follows the load."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upipe.runtime.autoscale import COOL_DOWN_INTERVALS, Controller
from upipe.settings import AutoscalePolicy

POLICY = AutoscalePolicy(up_depth=0.5, up_age=0.25, down_idle=2.0, interval=0.25)  # exact in binary
COOL_DOWN = COOL_DOWN_INTERVALS * POLICY.interval


def controller(minimum: int = 1, maximum: int = 4) -> Controller:
    return Controller(POLICY, minimum, maximum)


def busy(one: Controller, now: float, workers: int) -> int:
    return one.decide(now, workers, used_share=0.9, oldest_age=1.0, waiting=100)


def idle(one: Controller, now: float, workers: int) -> int:
    return one.decide(now, workers, used_share=0.0, oldest_age=0.0, waiting=0)


@pytest.mark.parametrize(
    ("used_share", "oldest_age", "waiting", "step"),
    [
        (0.51, 0.0, 10, 1),  # depth alone
        (0.0, 0.26, 10, 1),  # age alone
        (0.5, 0.25, 10, 0),  # thresholds are exclusive
        (1.0, 0.0, 0, 0),  # full, but all of it is in work
        (0.0, 9.0, 0, 0),  # an age without a frame says nothing
    ],
)
def test_scales_up_on_depth_or_age(used_share: float, oldest_age: float, waiting: int, step: int) -> None:
    assert controller().decide(0.0, 1, used_share, oldest_age, waiting) == step


def test_never_above_the_maximum() -> None:
    one = controller(maximum=2)
    assert busy(one, 0.0, 2) == 0
    assert busy(one, 10.0, 3) == 0


def test_cool_down_between_two_steps_up() -> None:
    one = controller()
    assert busy(one, 0.0, 1) == 1
    assert busy(one, COOL_DOWN / 2, 2) == 0
    assert busy(one, COOL_DOWN, 2) == 1


def test_scales_down_after_idle_time_one_at_a_time() -> None:
    one = controller()
    workers, steps = 3, []
    for tick in range(33):
        step = idle(one, tick * 0.25, workers)
        workers += step
        if step:
            steps.append(tick * 0.25)
    assert steps == [2.0, 4.0]
    assert workers == 1


def test_never_below_the_minimum() -> None:
    one = controller(minimum=2)
    assert [idle(one, now, 2) for now in (0.0, 5.0, 10.0)] == [0, 0, 0]
    assert idle(one, 11.0, 1) == 0


def test_a_busy_moment_starts_the_idle_time_anew() -> None:
    one = controller(maximum=2)
    idle(one, 0.0, 2)
    assert busy(one, 1.9, 2) == 0
    assert idle(one, 2.5, 2) == 0
    assert idle(one, 4.4, 2) == 0
    assert idle(one, 4.5, 2) == -1


def test_between_the_thresholds_nothing_happens_and_idle_time_starts_anew() -> None:
    one = controller()
    idle(one, 0.0, 3)
    assert one.decide(1.0, 3, used_share=0.3, oldest_age=0.2, waiting=20) == 0
    assert idle(one, 2.5, 3) == 0
    assert idle(one, 4.5, 3) == -1


@pytest.mark.parametrize(
    ("used_share", "oldest_age", "waiting", "step"),
    [
        (0.05, 0.125, 3, -1),  # a frame per worker is nearly empty
        (0.05, 0.125, 4, 0),  # thousands of small frames use no visible share
        (0.06, 0.0, 1, 0),
        (0.0, 0.2, 1, 0),
        (0.3, 0.0, 0, -1),  # one large frame in work, none waiting
    ],
)
def test_what_counts_as_nearly_empty(used_share: float, oldest_age: float, waiting: int, step: int) -> None:
    one = controller()
    one.decide(0.0, 3, used_share, oldest_age, waiting)
    assert one.decide(2.0, 3, used_share, oldest_age, waiting) == step


def test_after_a_step_down_load_may_step_up_at_once() -> None:
    one = controller()
    idle(one, 0.0, 2)
    assert idle(one, 2.0, 2) == -1
    assert busy(one, 2.25, 1) == 1


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 1), (2, 1)])
def test_bounds_are_checked(minimum: int, maximum: int) -> None:
    with pytest.raises(ValueError, match="1 <= minimum <= maximum"):
        controller(minimum, maximum)


@given(
    loads=st.lists(
        st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 1.0), st.floats(0.0, 2.0), st.integers(0, 50)), max_size=60
    ),
    minimum=st.integers(1, 3),
    extra=st.integers(0, 3),
)
def test_stays_within_bounds_and_never_rushes(
    loads: list[tuple[float, float, float, int]], minimum: int, extra: int
) -> None:
    one = controller(minimum, minimum + extra)
    workers, now = minimum, 0.0
    last_up = last_step = float("-inf")
    for pause, used_share, oldest_age, waiting in loads:
        now += pause
        step = one.decide(now, workers, used_share, oldest_age, waiting)
        workers += step
        assert minimum <= workers <= minimum + extra
        if step > 0:
            assert now >= last_up + COOL_DOWN
            last_up = now
        if step < 0:
            assert now - last_step >= POLICY.down_idle
        if step:
            last_step = now


def test_a_steady_load_settles() -> None:
    """A simulated queue: 250 frames/s come, a worker does 100/s; three workers are enough and stay."""
    one = controller(maximum=8)
    workers, waiting, history = 1, 0.0, []
    for tick in range(400):
        waiting = max(0.0, waiting + (250 - 100 * workers) * POLICY.interval)
        age = waiting / (100 * workers)
        workers += one.decide(tick * POLICY.interval, workers, min(1.0, waiting / 1000), age, int(waiting))
        history.append(workers)
    assert max(history) <= 8
    assert min(history[40:]) >= 2
    changes = sum(1 for before, after in itertools.pairwise(history[40:]) if before != after)
    assert changes <= 360 * POLICY.interval / POLICY.down_idle * 2
