"""What an agent holds of the other nodes, and by which rules it changes. Pure; the lower half of membership.py.

Three sources, by weight: the node itself over a proven connection (`_met`), proven members (`_hear`), and our own pings
that fail (`_doubt`, `_die`). An incarnation orders what the first two say; only the node itself raises it (`_object`).

Members are reached through four methods that membership.py supplies, so that nothing here knows of pings and addresses.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

from msgspec.structs import replace

from upipe.cluster.address import Address
from upipe.cluster.handshake import judge
from upipe.cluster.member import GONE, MEMBER, Member, News, digest
from upipe.cluster.member_events import (
    Announce,
    Command,
    NodeChanged,
    NodeDown,
    NodeLeft,
    NodeSuspect,
    NodeTrusted,
    NodeUp,
    Persist,
    Tell,
)
from upipe.cluster.messages import MAX_INCARNATION, MAX_MEMBERS, Gossip, NodeInfo, Rumour
from upipe.cluster.timing import Timing
from upipe.lifecycle import Machine

_TOLD = 256
"""Sentences remembered, so that each is told once."""


class Roster(ABC):
    """The members, without the means to reach them.

    Args:
        info: ourselves, at the first incarnation of this life (Identity.incarnation).
        timing: knobs.
        rng: chooses whom to tell and whom to ask; give a seeded one in tests.
    """

    def __init__(self, info: NodeInfo, timing: Timing | None = None, rng: random.Random | None = None) -> None:
        self.info = info
        self._timing = timing or Timing()
        self._rng = rng or random.Random()
        self._members: dict[str, Member] = {}
        # Invariant: we are not among them; at most MAX_MEMBERS.
        self._news = News(self._timing.retransmit)
        self._told: set[tuple[str, str]] = set()
        self._out: list[Command] = []
        # Invariant: empty between two calls.

    # -------------------------------------------------------------- supplied by membership.py

    @abstractmethod
    def _ask(self, member: Member, now: float, *, at_once: bool = False) -> None:
        """Ping it when its next ping is due, or at once."""

    @abstractmethod
    def _look_for(self, info: NodeInfo, now: float) -> None:
        """Dial it where it says it is."""

    @abstractmethod
    def _stop_asking(self, node_id: str) -> None:
        """It is not pinged any more."""

    @abstractmethod
    def _stop_looking(self, node_id: str) -> None:
        """It is not dialled any more."""

    # -------------------------------------------------------------- asked by the shell

    def gossip(self, to: str, *, whole: bool = False) -> Gossip:
        """What to say to `to` now, as a ping or as the answer to one; whole: the list for Accepted."""
        picked = list(self._members) if whole else self._news.pick(self._timing.rumours)
        rumours = [self._members[one].rumour() for one in picked if one != to and one in self._members]
        receiver = self._members.get(to)
        if receiver is not None and receiver.accused:  # first: it must hear this, however much is cut off
            rumours.insert(0, receiver.charge())
        return Gossip(self.info, self._digest(), tuple(rumours[:MAX_MEMBERS]))

    def members(self) -> tuple[Member, ...]:
        """Everybody but us, in the order of ids. Read only."""
        return tuple(self._members[one] for one in sorted(self._members))

    def member(self, node_id: str) -> Member | None:
        """What we hold of one node."""
        return self._members.get(node_id)

    def live(self) -> tuple[NodeInfo, ...]:
        """The members in use, ourselves first."""
        return (self.info, *(member.info for member in self.members() if member.live))

    def validate(self) -> None:
        """Assert the invariants that stand beside the fields (for tests)."""
        assert self.info.node_id not in self._members
        assert len(self._members) <= MAX_MEMBERS
        for node_id, member in self._members.items():
            assert node_id == member.info.node_id
            member.validate()
        assert len(self._told) <= _TOLD
        assert not self._out

    # -------------------------------------------------------------- what we make of it

    def _met(self, info: NodeInfo, contact: Address | None, now: float) -> None:
        """The node itself spoke to us, over a connection that proved it. contact: where, when we dialled."""
        member = self._members.get(info.node_id) or self._add(info, now)
        if member is None:
            return
        member.contact = contact or member.contact
        member.heard, held = now, member.info.incarnation
        member.behind = info.incarnation < held
        if member.behind or (info.incarnation == held and member.state in ("suspect", "dead")):
            self._ask(member, now)  # it does not know what is held against it: tell it
        elif info.incarnation > held or member.state == "joining" or (member.live and member.met < info.life):
            self._proved(member, info, now)
        elif member.state == "alive":
            member.info = info

    def _proved(self, member: Member, info: NodeInfo, now: float) -> None:
        before, known, restarted = member.state, member.info, info.life > member.met
        self._move(member, "prove", info, now)
        member.met = info.life
        if before not in ("alive", "suspect"):
            self._out.append(NodeUp(info))
        elif restarted:
            self._out.append(NodeUp(info, restarted=True))
        else:
            self._refreshed(before, known, info)

    def _hear(self, rumour: Rumour, now: float) -> None:
        """A member tells of a node."""
        info = rumour.info
        if info.node_id == self.info.node_id:
            self._object(rumour)
            return
        if judge(self.info, info) is not None:
            return
        member = self._members.get(info.node_id)
        if member is None:
            if rumour.state in ("alive", "suspect") and self._add(info, now) is not None:
                self._look_for(info, now)
            return
        if info.incarnation > member.info.incarnation and rumour.state in ("alive", "suspect"):
            self._heard_newer(member, info, now)
        if info.incarnation < member.info.incarnation or rumour.state == "alive":
            return
        if rumour.state == "left":
            self._leave(member, info, now)
        elif member.state == "alive" and now - member.heard <= self._timing.fresh:
            member.charged = True  # we know better; it must object to the others, and hears of it from us
            self._ask(member, now)
        elif rumour.state == "suspect":
            if member.state == "alive":
                self._doubt(member, "another member gets no answer from it", self._timing.suspicion, now)
        else:
            self._heard_dead(member, info, now)

    def _heard_newer(self, member: Member, info: NodeInfo, now: float) -> None:
        before, known = member.state, member.info
        self._move(member, "hear", info, now)
        self._refreshed(before, known, info)
        if member.state == "joining":
            self._look_for(info, now)
        elif info.life > member.met:
            self._ask(member, now, at_once=True)  # a new life of a node in use: meet it

    def _heard_dead(self, member: Member, info: NodeInfo, now: float) -> None:
        if member.state == "joining":
            self._move(member, "die", info, now)
        elif member.state == "alive":
            self._doubt(member, "another member holds it dead", self._timing.rumour_grace, now)
        elif member.dead_at is not None:
            member.dead_at = min(member.dead_at, now + self._timing.rumour_grace)

    def _refreshed(self, before: str, known: NodeInfo, info: NodeInfo) -> None:
        """A member that stays in use told something newer."""
        if before == "suspect":
            self._out.append(NodeTrusted(info))
        if before in ("alive", "suspect") and lasting(known) != lasting(info):
            self._out.append(NodeChanged(info))

    def _object(self, rumour: Rumour) -> None:
        """Others hold us suspect or dead, or know a later life of ours than we do: outbid them."""
        heard = rumour.info.incarnation
        if heard < self.info.incarnation or (heard == self.info.incarnation and rumour.state == "alive"):
            return
        if heard >= MAX_INCARNATION:
            self._tell("incarnation", f"a member holds this node at incarnation {heard:#x}, which no node can reach; "
                       "remove node_id from --data-dir and start again")  # fmt: skip
            return
        if heard >> 32 > self.info.life:
            self._out.append(Persist((heard + 1) >> 32))
        self._speak(self.info, heard + 1)

    def _speak(self, info: NodeInfo, incarnation: int) -> None:
        self.info = replace(info, incarnation=incarnation)
        self._news.note(self.info.node_id, len(self._members))
        self._out.append(Announce(self.info))

    def _doubt(self, member: Member, why: str, patience: float, now: float) -> None:
        self._move(member, "doubt", member.info, now)
        member.dead_at, member.why = now + patience, why
        self._out.append(NodeSuspect(member.info, why))
        self._ask(member, now)

    def _die(self, member: Member, now: float) -> None:
        self._move(member, "die", member.info, now)
        self._out.append(NodeDown(member.info, f"{member.why}, and it did not object in time"))
        self._look_for(member.info, now)

    def _leave(self, member: Member, info: NodeInfo, now: float) -> None:
        was_live, was_left = member.live, member.state == "left"
        if was_left and info.incarnation == member.info.incarnation:
            return
        self._move(member, "leave", info, now)
        self._stop_looking(info.node_id)
        if was_live:
            self._out.append(NodeLeft(info))

    def _move(self, member: Member, event: str, info: NodeInfo, now: float) -> None:
        before = member.state
        member.machine.fire(event)
        member.info, member.behind, member.charged = info, False, False
        if member.state != before:
            member.since = now
        if member.state != "suspect":
            member.dead_at, member.why = None, member.why if member.state == "dead" else ""
        if not member.live:
            self._stop_asking(info.node_id)
        self._news.note(info.node_id, len(self._members))

    def _add(self, info: NodeInfo, now: float) -> Member | None:
        if len(self._members) >= MAX_MEMBERS:
            gone = [one for one in self._members.values() if one.state in GONE]
            if not gone:
                self._tell(
                    "cluster-full", f"node {info.node_id} is left out: this cluster has {MAX_MEMBERS} nodes, the most"
                )
                return None
            self._forget(min(gone, key=lambda one: one.since))
        member = Member(info, Machine(MEMBER, "joining", f"node {info.node_id}"), now)
        self._members[info.node_id] = member
        self._news.note(info.node_id, len(self._members))
        return member

    def _forget(self, member: Member) -> None:
        node_id = member.info.node_id
        del self._members[node_id]
        self._stop_asking(node_id)
        self._stop_looking(node_id)
        self._news.drop(node_id)

    # -------------------------------------------------------------- small things

    def _digest(self) -> int:
        return digest([self.info, *(member.info for member in self._members.values() if member.state not in GONE)])

    def _refuse(self, info: NodeInfo) -> bool:
        refused = judge(self.info, info)
        if refused is not None:
            self._tell(refused.code, refused.sentence)
        return refused is not None

    def _tell(self, code: str, sentence: str) -> None:
        if (code, sentence) in self._told:
            return
        if len(self._told) >= _TOLD:
            self._told.clear()
        self._told.add((code, sentence))
        self._out.append(Tell(code, sentence))


def lasting(info: NodeInfo) -> NodeInfo:
    """Without what changes all the time."""
    return replace(info, incarnation=0, load=0.0, free_shared_memory=0)
