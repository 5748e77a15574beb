"""The gate: a position is told only when all that came of it has left the host."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upipe.cluster.gate import MOST_MARKS, Gate, Passage, Tail
from upipe.errors import DeclarationError

CHAIN = (Passage("in", ("mid",)), Passage("mid", ("out",)), Passage("out", leaves=True))


def test_a_queue_that_feeds_nothing_is_allowed_at_once():
    assert Gate((Passage("in"),)).observe({"in": Tail(64, 1, 2)}, {}, {}) == {"in": Tail(64, 1, 2)}


def test_a_tail_waits_until_the_next_node_received_what_came_of_it():
    gate = Gate((Passage("in", ("out",)), Passage("out", leaves=True)))
    assert gate.observe({"in": Tail(64)}, {"out": 128}, {"out": 64}) == {}
    assert gate.waits
    assert gate.observe({"in": Tail(64)}, {"out": 999}, {"out": 127}) == {}
    assert gate.observe({"in": Tail(64)}, {"out": 999}, {"out": 128}) == {"in": Tail(64)}
    assert not gate.waits


def test_through_a_local_queue_heads_are_taken_after_its_own_finish():
    gate = Gate(CHAIN)
    assert gate.observe({"in": Tail(64), "mid": Tail(0)}, {"mid": 64, "out": 0}, {"out": 0}) == {}
    # mid is finished as far as needed, but what came of it is not away
    assert gate.observe({"in": Tail(64), "mid": Tail(64)}, {"mid": 64, "out": 192}, {"out": 128}) == {}
    news = gate.observe({"in": Tail(64), "mid": Tail(64)}, {"mid": 64, "out": 192}, {"out": 192})
    assert news == {"mid": Tail(64), "in": Tail(64)}


def test_all_outputs_count():
    passages = (Passage("in", ("a", "b")), Passage("a", leaves=True), Passage("b", leaves=True))
    gate = Gate(passages)
    assert gate.observe({"in": Tail(64)}, {"a": 64, "b": 64}, {"a": 64}) == {}
    assert gate.observe({"in": Tail(64)}, {"a": 64, "b": 64}, {"a": 64, "b": 64}) == {"in": Tail(64)}


def test_an_output_that_is_gone_is_waited_for_no_more():
    gate = Gate((Passage("in", ("out",)), Passage("out", leaves=True)))
    assert gate.observe({"in": Tail(64)}, {"out": 128}, {}) == {}
    gate.rewire((Passage("in"),))
    assert gate.observe({"in": Tail(64)}, {}, {}) == {"in": Tail(64)}


def test_an_output_that_is_read_here_from_now_on_counts_as_local():
    gate = Gate((Passage("in", ("out",)), Passage("out", leaves=True)))
    assert gate.observe({"in": Tail(64)}, {"out": 128}, {"out": 0}) == {}
    gate.rewire((Passage("in", ("out",)), Passage("out")))
    assert gate.observe({"in": Tail(64), "out": Tail(64)}, {"out": 128}, {}) == {"out": Tail(64)}
    assert gate.observe({"in": Tail(64), "out": Tail(128)}, {"out": 128}, {}) == {"out": Tail(128), "in": Tail(64)}


def test_marks_are_bounded_and_the_newest_is_kept():
    gate = Gate((Passage("in", ("out",)), Passage("out", leaves=True)))
    for i in range(1, 10 * MOST_MARKS):
        assert gate.observe({"in": Tail(64 * i)}, {"out": 64 * i}, {}) == {}
    last = 64 * (10 * MOST_MARKS - 1)
    assert gate.observe({}, {}, {"out": last}) == {"in": Tail(last)}


def test_wrong_wiring_lists_every_problem():
    with pytest.raises(DeclarationError) as error:
        Gate((Passage("b"), Passage("a", ("b", "c")), Passage("b", ("b",), leaves=True)))
    assert len(error.value.problems) == 5


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nothing_is_told_that_could_be_lost(data):
    """Frames go in -> mid -> out in random steps; whatever is told has left, each frame traced by itself."""
    gate = Gate(CHAIN)
    ready, mid, out = 0, [], []  # mid, out: which input each frame came of
    tails, received, told = {"in": 0, "mid": 0}, 0, 0
    for step in data.draw(st.lists(st.sampled_from(["in", "mid", "send", "look"]), max_size=80)):
        if step == "in":  # a worker emits 0 to 2 frames, then finishes
            mid += [ready] * data.draw(st.integers(0, 2))
            ready += 1
            tails["in"] += 64
        elif step == "mid" and tails["mid"] < 64 * len(mid):
            out += [mid[tails["mid"] // 64]] * data.draw(st.integers(0, 2))
            tails["mid"] += 64
        elif step == "send":
            received = data.draw(st.integers(received, len(out)))
        elif step == "look":
            heads = {"mid": 64 * len(mid), "out": 64 * len(out)}
            news = gate.observe({name: Tail(at) for name, at in tails.items()}, heads, {"out": 64 * received})
            if "in" in news:
                assert news["in"].position > told
                told = news["in"].position
        inside = set(mid[tails["mid"] // 64 :]) | set(out[received:])
        assert not any(64 * origin < told for origin in inside)
