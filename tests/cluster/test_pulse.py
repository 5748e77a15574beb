"""A link's pulse and the pauses between attempts to dial."""

from __future__ import annotations

from upipe.cluster.pulse import PATIENCE, QUIET, Backoff, BackoffPolicy, Beat, Pulse


def test_a_silent_link_is_asked_and_then_cut_within_five_seconds():
    pulse = Pulse(10.0)
    assert pulse.due == 10.0 + QUIET
    assert pulse.beat(10.0 + QUIET - 0.1) is Beat.WAIT
    assert pulse.beat(10.0 + QUIET) is Beat.ASK
    assert pulse.beat(pulse.due - 0.1) is Beat.WAIT
    assert pulse.due < 15.0
    assert pulse.beat(pulse.due) is Beat.CUT


def test_any_byte_is_a_sign_of_life():
    pulse = Pulse(0.0)
    assert pulse.beat(QUIET) is Beat.ASK
    pulse.heard(QUIET + 1)
    assert pulse.beat(QUIET + 2) is Beat.WAIT
    assert pulse.due == 2 * QUIET + 1


def test_who_looks_late_was_stopped_itself_and_asks_again():
    pulse = Pulse(0.0)
    assert pulse.beat(QUIET) is Beat.ASK
    assert pulse.beat(100.0) is Beat.ASK
    assert pulse.beat(100.0 + PATIENCE) is Beat.CUT


def test_pauses_double_up_to_the_longest_and_begin_again_after_success():
    backoff = Backoff(lambda: 0.0, BackoffPolicy(first=1, most=5, jitter=0.5))
    assert [backoff.failed() for _ in range(4)] == [1, 2, 4, 5]
    backoff.succeeded()
    assert backoff.failed() == 1
    chancy = Backoff(lambda: 0.5, BackoffPolicy(first=1, most=5, jitter=0.5))
    assert chancy.failed() == 0.75
    for _ in range(2000):
        assert chancy.failed() <= 5
