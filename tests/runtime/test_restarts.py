"""Back-off, window and limit of restarts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upipe.runtime.restarts import Restarts
from upipe.settings import RestartPolicy


def test_first_restart_is_immediate_then_back_off_doubles_up_to_its_maximum() -> None:
    restarts = Restarts(RestartPolicy(limit=0, window=60.0, backoff=0.05, backoff_max=0.3))
    assert [restarts.died(now) for now in range(6)] == [0.0, 0.05, 0.1, 0.2, 0.3, 0.3]
    assert restarts.count == 6


def test_gives_up_at_one_death_more_than_the_limit() -> None:
    restarts = Restarts(RestartPolicy(limit=2, window=10.0))
    assert restarts.died(0.0) is not None
    assert restarts.died(1.0) is not None
    assert restarts.died(2.0) is None
    assert restarts.count == 3


def test_deaths_leave_the_window() -> None:
    restarts = Restarts(RestartPolicy(limit=1, window=10.0))
    assert restarts.died(0.0) == 0.0
    assert restarts.died(10.0) == 0.0  # exactly one window later is outside
    assert restarts.count == 1
    assert restarts.died(19.9) is None


def test_no_death_yet() -> None:
    assert Restarts(RestartPolicy()).count == 0


def test_limit_zero_never_gives_up_nor_overflows() -> None:
    policy = RestartPolicy(limit=0, window=1e9, backoff=0.05, backoff_max=5.0)
    restarts = Restarts(policy)
    assert [restarts.died(0.0) for _ in range(3000)][-1] == 5.0


@pytest.mark.parametrize("backoff", [0.0, 1e-300, 1e300])
def test_extreme_back_off_stays_within_bounds(backoff: float) -> None:
    restarts = Restarts(RestartPolicy(limit=0, backoff=backoff, backoff_max=2.0))
    delays = [restarts.died(0.0) for _ in range(200)]
    assert all(delay is not None and 0.0 <= delay <= 2.0 for delay in delays)


@given(
    steps=st.lists(st.integers(min_value=0, max_value=40), max_size=40),
    limit=st.integers(min_value=0, max_value=5),
)
def test_count_is_the_deaths_inside_the_window(steps: list[int], limit: int) -> None:
    policy = RestartPolicy(limit=limit, window=30.0)
    restarts = Restarts(policy)
    now, deaths = 0, []
    for step in steps:
        now += step
        deaths.append(now)
        delay = restarts.died(float(now))
        inside = sum(1 for one in deaths if now - one < policy.window)
        assert restarts.count == inside
        assert (delay is None) == (0 < limit < inside)
        assert delay is None or 0.0 <= delay <= policy.backoff_max
