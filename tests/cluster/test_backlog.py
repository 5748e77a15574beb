"""What waits for a full disk is bounded, and what counts of it stays."""

from __future__ import annotations

from msgspec.structs import replace

from tests.cluster.test_ballot import record
from upipe.cluster.backlog import shortened
from upipe.cluster.dealings import Accepted, Arrange, Command, Replicate, Save, Send, TellClient


def test_the_newest_of_each_kind_stays_and_the_record_comes_first() -> None:
    first = record()
    waiting: list[Command] = []
    for revision in range(2, 300):
        newer = replace(first, revision=revision)
        waiting += [
            Save(newer, 1, "1"), Send("2", Replicate(newer)), Send("3", Replicate(newer)),
            Send("2", Accepted("1", newer.fence)), Arrange("2", newer.fence, None),
            TellClient("running", (str(revision),)),
        ]  # fmt: skip
    found = shortened(waiting)
    assert found == waiting[-6:]
    assert shortened([TellClient("running"), *found])[0] == waiting[-6], "the record"
