"""Promises, quorums and what counts: message by message."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from upipe.cluster.ballot import CANDIDATE, COORDINATOR, MEMBER, Ballot
from upipe.cluster.dealings import Accepted, Ask, Granted, Refused, Replicate, Save, Send
from upipe.cluster.lanes import Layout
from upipe.cluster.placement import Placement
from upipe.cluster.record import Record, quorum
from upipe.graph.spec import PipeSpec


def record(epoch: int = 1, revision: int = 1, members: str = "123", **more: Any) -> Record:
    chosen = {"coordinator": "1", "decider": "1", **more}
    return Record("r", PipeSpec("p"), epoch, revision, members=tuple(members), layout=Layout("", Placement()), **chosen)


def said(commands: list[Any]) -> list[tuple[str, Any]]:
    """What is sent; a save comes before it."""
    kinds = [type(command) for command in commands]
    assert Save not in kinds or kinds.index(Save) == 0
    return [(one.node, one.message) for one in commands if isinstance(one, Send)]


@pytest.mark.parametrize(
    ("members", "have", "enough"),
    [
        ("1", "1", True),
        ("12", "1", True),  # the decider
        ("12", "2", False),
        ("123", "1", False),
        ("123", "23", True),
        ("1234", "12", True),
        ("1234", "34", False),
        ("1234", "234", True),
        ("23", "2", True),  # without the decider the lowest id stands for it
        ("23", "3", False),
    ],
)
def test_any_two_quorums_have_a_member_in_common(members: str, have: str, enough: bool) -> None:
    assert quorum(tuple(members), set(have), "1") == enough
    assert not (enough and quorum(tuple(members), set(members) - set(have), "1"))


def test_while_members_change_both_sets_must_agree() -> None:
    changing = record(members="14", before=tuple("123"))
    assert changing.counts("124") and not changing.counts("14") and not changing.counts("23")


def test_a_record_counts_when_a_quorum_has_it() -> None:
    ballot = Ballot("1", record())
    assert [node for node, _ in said(ballot.begin())] == ["2", "3"]
    assert ballot.role == COORDINATOR and ballot.pending and ballot.counted is None
    assert ballot.hear(Accepted("2", (9, 9))) == [] and ballot.pending
    ballot.hear(Accepted("2", (1, 1)))
    assert ballot.counted == record() and not ballot.pending
    ballot.propose(record(members="124"))
    assert ballot.kept.revision == 2 and ballot.kept.before == ("1", "2", "3") and ballot.counted == record()
    assert [node for node, _ in said(ballot.resend())] == ["2", "4", "3"]


def test_a_member_keeps_what_it_is_told_and_answers_again_when_asked_again() -> None:
    ballot = Ballot("2", record())
    newer = record(1, 2)
    for _ in range(2):
        assert said(ballot.hear(Replicate(newer))) == [("1", Accepted("2", (1, 2)))]
    assert said(ballot.hear(Replicate(record()))) == [("1", Accepted("2", (1, 2)))]  # late: what it has is newer
    assert ballot.kept == newer


def test_who_promised_refuses_everything_lower_and_a_second_candidate() -> None:
    ballot = Ballot("3", record())
    granted = [("2", Granted("3", 2, record()))]
    assert said(ballot.hear(Ask(2, "2", record()))) == granted == said(ballot.hear(Ask(2, "2", record())))
    refused = Refused("3", 2, record())
    assert said(ballot.hear(Ask(2, "1", record()))) == [("1", refused)]
    assert said(ballot.hear(Ask(1, "1", record()))) == [("1", refused)]
    assert said(ballot.hear(Replicate(record(1, 5)))) == [("1", refused)]
    assert said(ballot.hear(Replicate(record(2, 5, coordinator="1")))) == [("1", refused)]
    assert ballot.kept == record() and ballot.promised == 2
    again = Ballot("3", record(), ballot.promised, ballot.promised_to)  # after a restart, from what was saved
    assert said(again.hear(Replicate(record(1, 5)))) == [("1", refused)]


def test_a_candidate_goes_on_with_the_newest_record_that_its_quorum_has() -> None:
    ballot = Ballot("2", record())
    assert {message.epoch for _, message in said(ballot.run())} == {2} and ballot.role == CANDIDATE
    assert ballot.hear(Granted("3", 1, record())) == []  # of another time
    told = said(ballot.hear(Granted("3", 2, record(1, 7, reasons=("newest",)))))
    assert ballot.role == COORDINATOR and ballot.pending
    assert ballot.kept.fence == (2, 8) and ballot.kept.coordinator == "2" and ballot.kept.reasons == ("newest",)
    assert {node for node, message in told if isinstance(message, Replicate)} == {"1", "3"}


def test_a_record_that_names_other_members_makes_the_candidate_ask_them_too() -> None:
    ballot = Ballot("2", record())
    ballot.run()
    told = said(ballot.hear(Granted("3", 2, record(1, 4, "3456", before=tuple("123")))))
    assert {node for node, message in told if isinstance(message, Ask)} == {"1", "4", "5", "6"}
    assert ballot.role == CANDIDATE
    ballot.hear(Granted("4", 2, record()))
    assert ballot.role == COORDINATOR and ballot.kept.before == ("1", "2", "3")


def test_a_coordinator_that_hears_of_a_higher_epoch_steps_down_and_learns() -> None:
    for message in (
        Refused("2", 3, record(3, 9, coordinator="3")),
        Replicate(record(3, 9, coordinator="3")),
    ):
        ballot = Ballot("1", record())
        ballot.begin()
        ballot.hear(message)
        assert ballot.role == MEMBER and ballot.counted is None and ballot.kept.fence == (3, 9)
    ballot = Ballot("1", record())
    ballot.begin()
    ballot.hear(Ask(2, "2", record()))
    assert ballot.role == MEMBER
    ballot.hear(Refused("2", 6, record()))
    ballot.run()
    assert ballot.promised == 7


def test_alone_it_counts_at_once() -> None:
    ballot = Ballot("1", record(members="1"))
    ballot.begin()
    assert not ballot.pending
    ballot.run()
    assert ballot.counted is ballot.kept and ballot.kept.fence == (2, 2)
    assert msgspec.structs.asdict(ballot.kept)["coordinator"] == "1"
