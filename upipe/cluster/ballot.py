"""Who coordinates a pipe, and which record counts: one member's part in it. Pure. (What a quorum is: record.py)

    member ──run()──▶ candidate ──quorum of Granted──▶ coordinator
      ▲                   │                                 │
      └─────── gives up ──┴──── a higher epoch is heard ────┘

A member promises an epoch to one candidate and refuses everything lower from then on, so a coordinator that was cut off
learns of its successor from the first member it reaches. What a member answers has been saved before. A coordinator
proposes one record at a time; until it counts nothing is done for it.
"""

from __future__ import annotations

import msgspec

from upipe.cluster.dealings import Accepted, Ask, Command, Granted, Message, Refused, Replicate, Save, Send
from upipe.cluster.record import Record

MEMBER, CANDIDATE, COORDINATOR = "member", "candidate", "coordinator"


class Ballot:
    """One agent's part for one pipe.

    Args:
        me: its node id.
        record: the newest it has.
        promised, promised_to: as saved.
    """

    def __init__(self, me: str, record: Record, promised: int = 0, promised_to: str = "") -> None:
        self.me = me
        self.role = MEMBER
        self.kept = record
        """The newest record accepted here, whether it counts or not."""
        self.counted: Record | None = None
        """The newest that counts, as far as this coordinator knows. None in other roles."""
        self.promised = max(promised, record.epoch)
        """Nothing lower is accepted. Never falls."""
        self.promised_to = promised_to or record.coordinator
        self._seen = self.promised
        """The highest epoch heard of."""
        self._having: set[str] = set()
        """Coordinator: who has `kept`. Candidate: who granted."""
        self._best = record

    @property
    def pending(self) -> bool:
        """A coordinator waits for a quorum."""
        return self.role == COORDINATOR and self.counted is not self.kept

    # ------------------------------------------------------------------ proposing

    def begin(self) -> list[Command]:
        """The first coordinator, with a record that nobody else has yet."""
        self.role = COORDINATOR
        return self._propose(self.kept)

    def propose(self, record: Record) -> list[Command]:
        """Coordinator, nothing pending: make `record` the next one; the fields that tell their order are filled in."""
        last = self.kept
        before = last.members if set(last.members) != set(record.members) else ()
        return self._propose(msgspec.structs.replace(record, revision=last.revision + 1, before=before))

    def _propose(self, record: Record) -> list[Command]:
        self.kept = record
        self._having = {self.me}
        return [self._save(), *self.resend(), *self._count()]

    def _count(self) -> list[Command]:
        if self.kept.counts(self._having):
            self.counted = self.kept
        return []

    def _save(self) -> Save:
        return Save(self.kept, self.promised, self.promised_to)

    def resend(self) -> list[Command]:
        """What may have been lost, to those who have not answered."""
        others = self._voters(self._best if self.role == CANDIDATE else self.kept)
        asked = [node for node in others if node != self.me and node not in self._having]
        if self.role == COORDINATOR:
            return [Send(node, Replicate(self.kept)) for node in asked]
        if self.role == CANDIDATE:
            return [Send(node, Ask(self.promised, self.me, self.kept)) for node in asked]
        return []

    def _voters(self, record: Record) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*record.members, *record.before)))

    # ------------------------------------------------------------------ taking over

    def run(self) -> list[Command]:
        """Ask for the next epoch."""
        self.role, self.counted = CANDIDATE, None
        self.promised = self._seen = max(self._seen, self.promised, self.kept.epoch) + 1
        self.promised_to = self.me
        self._best, self._having = self.kept, {self.me}
        return [self._save(), *self.resend(), *self._won()]

    def give_up(self) -> None:
        """A candidate is a member again. What it promised itself stays promised."""
        if self.role == CANDIDATE:
            self._step_down()

    def _won(self) -> list[Command]:
        best = self._best
        if not best.counts(self._having):
            return []
        self.role = COORDINATOR
        next_ = {"epoch": self.promised, "revision": best.revision + 1, "coordinator": self.me}
        return self._propose(msgspec.structs.replace(best, **next_))

    def _step_down(self) -> None:
        self.role, self.counted, self._having = MEMBER, None, set()

    # ------------------------------------------------------------------ hearing

    def hear(self, message: Message) -> list[Command]:
        """Follow a message. Old, repeated and foreign ones change nothing."""
        if isinstance(message, Replicate):
            return self._replicate(message.record)
        if isinstance(message, Ask):
            return self._ask(message)
        if isinstance(message, Accepted):
            if self.role == COORDINATOR and message.fence == self.kept.fence:
                self._having.add(message.node)
                return self._count()
            return []
        if isinstance(message, Granted):
            return self._granted(message)
        return self._refused(message)

    def _replicate(self, record: Record) -> list[Command]:
        stale = record.epoch < self.promised
        other = record.epoch == self.promised and record.coordinator != self.promised_to
        if stale or other:
            return [Send(record.coordinator, Refused(self.me, self.promised, self.kept))]
        if record.coordinator == self.me:
            return []  # our own, back again
        self._step_down()
        if record.fence > self.kept.fence:
            self.kept = record
        self.promised, self.promised_to = record.epoch, record.coordinator
        self._seen = max(self._seen, record.epoch)
        return [self._save(), Send(record.coordinator, Accepted(self.me, self.kept.fence))]

    def _ask(self, message: Ask) -> list[Command]:
        again = message.epoch == self.promised and message.candidate == self.promised_to
        if message.epoch < self.promised or (message.epoch == self.promised and not again):
            return [Send(message.candidate, Refused(self.me, self.promised, self.kept))]
        if not again:
            self._step_down()
        self.promised, self.promised_to = message.epoch, message.candidate
        self._seen = max(self._seen, message.epoch)
        return [self._save(), Send(message.candidate, Granted(self.me, message.epoch, self.kept))]

    def _granted(self, message: Granted) -> list[Command]:
        if self.role != CANDIDATE or message.epoch != self.promised:
            return []
        self._having.add(message.node)
        newer = message.record.fence > self._best.fence
        if newer:
            self._best = message.record
        return self._won() or (self.resend() if newer else [])  # it may name other members, who must be asked too

    def _refused(self, message: Refused) -> list[Command]:
        self._seen = max(self._seen, message.promised)
        if message.promised <= self.promised:
            return []
        self._step_down()
        if message.record.fence > self.kept.fence:
            self.kept = message.record
            return [self._save()]
        return []
