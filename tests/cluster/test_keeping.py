"""What agents and keepers say to each other."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster.keeper_support import all_here, chain, one
from upipe.cluster import keeping
from upipe.cluster.keeper_queues import renewed
from upipe.cluster.keeping import Fenced, Follow, Hello, Job, KeeperNews, WorkerState
from upipe.cluster.lanes import lay_out, relay
from upipe.cluster.layout import node_plan
from upipe.cluster.placement import Placement
from upipe.cluster.record import Crew
from upipe.errors import MessageInvalid

SPEC = chain(one("a", "source"), one("b", workers=2))
PLAN = node_plan(SPEC, all_here(SPEC), "1", (1, 1))
NEWS = KeeperNews((1, 2), True, "s", {"q": "s/l"}, (("a", 0),), (("b", 1),), "no", True, {"a": Crew(1, 2, 0.5, 3)},
                  (WorkerState("a#0", 7, "running", 2),))  # fmt: skip
SAID = [Hello(1, "test-1", 7), NEWS, Fenced((1, 1), (2, 1)), KeeperNews()]


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(1, 40), min_size=1))
def test_messages_come_whole_however_they_are_cut(chosen: list[int], pieces: list[int]) -> None:
    said = [SAID[number] for number in chosen]
    data = b"".join(keeping.encode(message) for message in said)
    reader, heard, at, turn = keeping.from_keeper(), [], 0, 0
    while at < len(data):
        step = pieces[turn % len(pieces)]
        heard += reader.feed(data[at : at + step])
        at, turn = at + step, turn + 1
    assert heard == said


def test_plans_and_stops_travel() -> None:
    said = [Follow((1, 1), PLAN), Follow((1, 2), None)]
    assert list(keeping.to_keeper().feed(b"".join(keeping.encode(one) for one in said))) == said


@given(st.binary(max_size=60))
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(MessageInvalid, match="cannot be read"):
        list(keeping.to_keeper().feed(len(data).to_bytes(4, "little") + data))
    with pytest.raises(MessageInvalid, match="announced"):
        list(keeping.to_keeper().feed(b"\xff\xff\xff\xff" + data))


def test_what_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "MOST", 100)
    with pytest.raises(MessageInvalid, match="a Follow of"):
        keeping.encode(Follow((1, 1), PLAN))


def test_files_of_the_directory() -> None:
    job = Job("test-1", SPEC, {"a": "/x"}, {}, ("/m",), "/w")
    assert keeping.decode_job(keeping.encode_file(job)) == job
    assert keeping.decode_ended(keeping.encode_file(NEWS)) == NEWS
    with pytest.raises(MessageInvalid, match="a job of a keeper cannot be read"):
        keeping.decode_job(b"\x00")
    with pytest.raises(MessageInvalid, match="a last word of a keeper cannot be read"):
        keeping.decode_ended(msgspec.msgpack.encode([1]))


def test_a_copy_whose_reader_went_and_came_is_another_one() -> None:
    spec = chain(one("a"), one("b"))
    first = lay_out(spec, Placement({"a": ("2",), "b": ("1",)}), "")
    away = relay(spec, first, Placement({"a": ("2",), "b": ("3",)}))
    back = relay(spec, away, Placement({"a": ("2",), "b": ("1",)}))
    before, after = (node_plan(spec, laid, "1", (1, number)) for number, laid in enumerate((first, back)))
    (lane,) = first.of("e0-a-b")
    assert renewed(before, after) == [lane.name]
    assert renewed(before, before) == renewed(None, before) == []
