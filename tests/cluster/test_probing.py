"""Pings: the ring of watchers, and how far each ping is."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from upipe.cluster.probing import Prober, watched
from upipe.cluster.timing import Timing

TIMING = Timing()


@given(st.sets(st.text("0123456789abcdef", min_size=1, max_size=4), min_size=1, max_size=30), st.integers(1, 6))
def test_everybody_is_watched_by_equally_many(ids: set[str], watchers: int) -> None:
    counts = Counter(one for own in ids for one in watched(own, ids - {own}, watchers))
    assert counts == ({one: min(watchers, len(ids) - 1) for one in ids} if len(ids) > 1 else {})


def test_the_next_ones_on_the_ring() -> None:
    assert watched("c", ["a", "b", "d"], 2) == ["d", "a"]


def test_a_new_node_is_pinged_at_once_and_then_once_in_an_interval() -> None:
    prober = Prober(TIMING)
    assert prober.wants("a", 10.0)
    probe = prober.start("a", 10.0)
    assert not prober.wants("a", 10.0)
    prober.answered(probe.number)
    assert not prober.wants("a", 10.4)
    assert prober.wants("a", 10.5)
    assert prober.deadline(["a"]) == 10.5
    prober.validate()


def test_the_last_relay_ends_the_stage() -> None:
    prober = Prober(TIMING)
    probe = prober.start("a", 0.0)
    assert prober.failed(probe.number, "refused") is probe
    prober.relay(probe, 2, 0.1)
    assert prober.overdue(0.5) == []
    assert prober.failed(probe.number, "nor I") is None
    assert prober.failed(probe.number, "nor I") is probe
    assert probe.reason == "refused"


def test_a_stage_times_out_unless_our_clock_stood_still() -> None:
    prober = Prober(TIMING)
    probe = prober.start("a", 0.0)
    assert prober.overdue(TIMING.ping_timeout) == [probe]
    prober.postpone(10.0)
    assert prober.overdue(10.0) == []
    assert prober.overdue(10.0 + TIMING.ping_timeout) == [probe]


def test_what_comes_too_late_changes_nothing() -> None:
    prober = Prober(TIMING)
    old = prober.start("a", 0.0)
    new = prober.start("a", 1.0)
    prober.answered(old.number)
    assert prober.failed(old.number, "late") is None
    assert prober.asked(old.number) is None
    assert prober.asked(new.number) == "a"
    prober.forget("a")
    assert prober.asked(new.number) is None
    prober.validate()
