"""Who is in the cluster, as one agent sees it: a pure state machine, events and `now` in, commands out.

    Seen  Proven  DialFailed  PingAnswered  PingFailed  MembersHeard  LeftProperly       what happened
    OwnChanged  OwnDrain  OwnLeave  Tick                                                 what we do, and time
                 |
             handle(event, now)
                 |
    Connect  Ping  PingVia  Spread  Announce  Persist                                    what to do
    NodeUp  NodeChanged  NodeSuspect  NodeTrusted  NodeDown  NodeLeft  Tell              what to know

The rules, after SWIM and its successors:

* A hint costs a dial and nothing else. Only a handshake of our own makes a member that we use (NodeUp); what proven
  members tell of others makes us dial those.
* Who does not answer is asked through others, then suspect, then dead unless it objects with a higher incarnation.
  Nobody dies of hearsay: a member that others hold dead is a suspect here, for a shorter time.
* Everything heals by the same three habits: the dead are dialled again, whoever talks to us is told what we hold against
  it, and lists are compared by digest with every ping and sent whole when they differ.

The part of an agent that pings (probing.py), dials (dialing.py) and remembers (member.py) is next door.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from upipe.cluster.address import Address
from upipe.cluster.dialing import Dialer
from upipe.cluster.handshake import judge
from upipe.cluster.member import GONE, MEMBER, Member, News, digest
from upipe.cluster.member_events import (
    Announce,
    Command,
    Connect,
    DialFailed,
    Event,
    LeftProperly,
    MembersHeard,
    NodeChanged,
    NodeDown,
    NodeLeft,
    NodeSuspect,
    NodeTrusted,
    NodeUp,
    OwnChanged,
    OwnDrain,
    OwnLeave,
    Persist,
    Ping,
    PingAnswered,
    PingFailed,
    PingVia,
    Proven,
    Seen,
    Spread,
    Tell,
    Tick,
)
from upipe.cluster.messages import MAX_INCARNATION, MAX_MEMBERS, Gossip, Join, Leave, NodeInfo, Rumour
from upipe.cluster.probing import Prober, Probe, watched
from upipe.cluster.timing import Timing
from upipe.lifecycle import Machine

_TOLD = 256
"""Sentences remembered, so that each is told once."""


class Membership:
    """Decides for one agent.

    Args:
        info: ourselves, at the first incarnation of this life (Identity.incarnation).
        timing: knobs.
        rng: chooses whom to tell and whom to ask; give a seeded one in tests.
    """

    def __init__(self, info: NodeInfo, timing: Timing | None = None, rng: random.Random | None = None) -> None:
        self.info = info
        self.left = False
        """We said good-bye; nothing is done any more."""
        self._timing = timing or Timing()
        self._rng = rng or random.Random()
        self._members: dict[str, Member] = {}
        # Invariant: we are not among them; at most MAX_MEMBERS.
        self._prober = Prober(self._timing)
        self._dialer = Dialer(self._timing, self._connected)
        self._news = News(self._timing.retransmit)
        self._gossip_at = 0.0
        self._due: float | None = None
        self._told: set[tuple[str, str]] = set()
        self._out: list[Command] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            Seen: self._seen,
            Proven: self._proven,
            DialFailed: self._dial_failed,
            PingAnswered: self._ping_answered,
            PingFailed: self._ping_failed,
            MembersHeard: self._members_heard,
            LeftProperly: self._left_properly,
            OwnChanged: self._own_changed,
            OwnDrain: self._own_drain,
            OwnLeave: self._own_leave,
            Tick: lambda _event, _now: None,
        }

    # -------------------------------------------------------------- asked by the shell

    def handle(self, event: Event, now: float) -> list[Command]:
        """Follow one event.

        Args:
            event: what happened.
            now: seconds of a monotonic clock, always the same one.
        """
        if self.left:
            return []
        self._forgive_lateness(now)
        self._handlers[type(event)](event, now)
        if not self.left:
            self._run_timers(now)
        self._due = self._next_due()
        out, self._out = self._out, []
        return out

    def deadline(self) -> float | None:
        """When to call handle(Tick()) at the latest; None: not before the next event."""
        return self._due

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
        self._prober.validate()
        self._dialer.validate()
        assert len(self._told) <= _TOLD
        assert not self._out

    # -------------------------------------------------------------- what happened

    def _seen(self, event: Seen, now: float) -> None:
        hint = event.hint
        if hint.cluster and hint.cluster != self.info.cluster:
            return  # other clusters on the same network are usual
        if hint.protocol and hint.protocol != self.info.protocol:
            seen = replace(self.info, node_id=hint.node_id or "0" * 16, protocol=hint.protocol, version="", hosts=())
            self._refuse(seen)
            return
        claim = (
            "" if hint.node_id == self.info.node_id else hint.node_id
        )  # our own id elsewhere: a copied data directory
        for address in hint.addresses:
            if address not in self.info.addresses:
                self._dialer.seen(address, claim, hint.source, now)

    def _proven(self, event: Proven, now: float) -> None:
        if self._refuse(event.info):
            if event.address is not None:
                self._dialer.failed(event.address, now, for_good=True)
        elif event.info.node_id == self.info.node_id:
            if event.address is not None:
                self._dialer.proved(event.address, self.info.node_id, now)  # our own address: never again
        else:
            self._met(event.info, event.address, now)
            if event.gossip is not None:
                self._listen(event.gossip, now)

    def _dial_failed(self, event: DialFailed, now: float) -> None:
        self._dialer.failed(event.address, now, for_good=event.refused is not None)
        if event.refused is not None:
            self._tell(event.refused.code, event.refused.sentence)

    def _ping_answered(self, event: PingAnswered, now: float) -> None:
        info = event.gossip.info
        if self._refuse(info):
            return
        asked = self._prober.asked(event.number)
        if asked is not None and asked != info.node_id:
            self._ping_failed(PingFailed(event.number, f"node {info.node_id} answers there"), now)
            return
        self._prober.answered(event.number)
        if event.relayed:  # it lives, but we have not met it ourselves
            self._hear(Rumour(info, "alive"), now)
        else:
            self._met(info, event.address, now)
        self._listen(event.gossip, now)

    def _ping_failed(self, event: PingFailed, now: float) -> None:
        probe = self._prober.failed(event.number, event.reason)
        if probe is not None:
            self._stage_failed(probe, now)

    def _members_heard(self, event: MembersHeard, now: float) -> None:
        if not self._refuse(event.gossip.info) and event.gossip.info.node_id != self.info.node_id:
            self._met(event.gossip.info, None, now)
            self._listen(event.gossip, now)

    def _left_properly(self, event: LeftProperly, now: float) -> None:
        member = self._members.get(event.leave.node_id)
        if member is not None:
            self._hear(Rumour(replace(member.info, incarnation=event.leave.incarnation), "left"), now)

    def _own_changed(self, event: OwnChanged, now: float) -> None:
        told = replace(event.info, incarnation=self.info.incarnation, draining=self.info.draining)
        if _lasting(told) == _lasting(self.info):
            self.info = told  # load and free memory travel with every ping, and are no news
        else:
            self._speak(told, self.info.incarnation + 1)

    def _own_drain(self, event: OwnDrain, now: float) -> None:
        if not self.info.draining:
            self._speak(replace(self.info, draining=True), self.info.incarnation + 1)

    def _own_leave(self, event: OwnLeave, now: float) -> None:
        self.left = True
        leave = Leave(self.info.node_id, self.info.incarnation)
        for member in self.members():
            if member.live:
                self._out.append(Spread(member.info.node_id, member.addresses, leave))

    # -------------------------------------------------------------- what we make of it

    def _met(self, info: NodeInfo, address: Address | None, now: float) -> None:
        """The node itself spoke to us, over a connection that proved it."""
        member = self._members.get(info.node_id) or self._add(info, now)
        if member is None:
            return
        if address is not None:
            member.contact = address
            self._dialer.proved(address, info.node_id, now)
        member.heard, held = now, member.info.incarnation
        member.behind = info.incarnation < held
        if member.behind or (info.incarnation == held and member.state in ("suspect", "dead")):
            if self._prober.wants(info.node_id, now):  # it does not know what is held against it: tell it
                self._ping(member, now)
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
            if self._prober.wants(info.node_id, now):
                self._ping(member, now)
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
            self._ping(member, now)  # a new life of a node in use: meet it

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
        if before in ("alive", "suspect") and _lasting(known) != _lasting(info):
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
        if self._prober.wants(member.info.node_id, now):
            self._ping(member, now)

    def _die(self, member: Member, now: float) -> None:
        self._move(member, "die", member.info, now)
        self._out.append(NodeDown(member.info, f"{member.why}, and it did not object in time"))
        self._look_for(member.info, now)

    def _leave(self, member: Member, info: NodeInfo, now: float) -> None:
        was_live, was_left = member.live, member.state == "left"
        if was_left and info.incarnation == member.info.incarnation:
            return
        self._move(member, "leave", info, now)
        self._dialer.forget(info.node_id)
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
            self._prober.forget(info.node_id)
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
        self._prober.forget(node_id)
        self._dialer.forget(node_id)
        self._news.drop(node_id)

    def _look_for(self, info: NodeInfo, now: float) -> None:
        for address in info.addresses:
            self._dialer.seen(address, info.node_id, "member", now)
        self._dialer.revive(info.node_id, now)

    def _listen(self, gossip: Gossip, now: float) -> None:
        for rumour in gossip.rumours:
            self._hear(rumour, now)
        member = self._members.get(gossip.info.node_id)
        if member is None or not member.live or gossip.digest == self._digest():
            return
        if now - member.synced >= self._timing.sync_interval:
            member.synced = now
            self._out.append(
                Spread(member.info.node_id, member.addresses, self.gossip(member.info.node_id, whole=True))
            )

    # -------------------------------------------------------------- time

    def _run_timers(self, now: float) -> None:
        for probe in self._prober.overdue(now):
            probe.reason = probe.reason or f"no answer within {self._timing.ping_timeout:g} s"
            self._stage_failed(probe, now)
        for member in self.members():
            if member.dead_at is not None and member.dead_at <= now:
                self._die(member, now)
            elif member.state in GONE and now - member.since >= self._timing.forget:
                self._forget(member)
        for node_id in self._pinged():
            if self._prober.wants(node_id, now):
                self._ping(self._members[node_id], now)
        if self._news.pending and self._gossip_at <= now:
            self._gossip_round(now)
        for address in self._dialer.due(now):
            self._out.append(Connect(address, Join(self.info)))

    def _stage_failed(self, probe: Probe, now: float) -> None:
        member = self._members.get(probe.node_id)
        if member is None or not member.live:
            self._prober.stop(probe.node_id)
            return
        others = [one.info.node_id for one in self.members() if one.state == "alive" and one is not member]
        if probe.stage == "direct" and others:
            relays = self._rng.sample(others, min(self._timing.relays, len(others)))
            self._prober.relay(probe, len(relays), now)
            for via in relays:
                self._out.append(PingVia(probe.number, probe.node_id, via, self._gossip_about(via, member)))
            return
        self._prober.stop(probe.node_id)
        if member.state == "alive":
            asked = f", nor through {self._timing.relays if others else 0} others" if others else ""
            self._doubt(member, f"it does not answer node {self.info.node_id} ({probe.reason}){asked}",
                        self._timing.suspicion, now)  # fmt: skip

    def _gossip_about(self, via: str, member: Member) -> Gossip:
        """For a relay: with what is held against the one to be pinged, so that it can object there."""
        gossip = self.gossip(via)
        if not member.accused or any(one.info.node_id == member.info.node_id for one in gossip.rumours):
            return gossip
        return replace(gossip, rumours=(member.charge(), *gossip.rumours))

    def _ping(self, member: Member, now: float) -> None:
        node_id = member.info.node_id
        probe = self._prober.start(node_id, now)
        self._out.append(Ping(probe.number, node_id, member.addresses, self.gossip(node_id)))

    def _gossip_round(self, now: float) -> None:
        live = [member for member in self.members() if member.live]
        picked = self._news.pick(self._timing.rumours)
        for member in self._rng.sample(live, min(self._timing.fanout, len(live))):
            self._out.append(Spread(member.info.node_id, member.addresses, self.gossip(member.info.node_id)))
        self._news.told(picked)
        self._gossip_at = now + self._timing.gossip_interval

    def _pinged(self) -> list[str]:
        """Whom we ping regularly: those we watch, and every suspect, so that it can object to each of us."""
        live = [node_id for node_id, member in self._members.items() if member.live]
        ours = watched(self.info.node_id, live, self._timing.watchers)
        return ours + [one for one in live if self._members[one].state == "suspect" and one not in ours]

    def _next_due(self) -> float | None:
        if self.left:
            return None
        times = [self._prober.deadline(self._pinged()), self._dialer.deadline()]
        times += [member.dead_at for member in self._members.values()]
        times += [self._gossip_at] if self._news.pending else []
        return min((time for time in times if time is not None), default=None)

    def _forgive_lateness(self, now: float) -> None:
        late = now - self._due if self._due is not None else 0.0
        if late <= self._timing.late:
            return
        self._prober.postpone(late)
        self._dialer.postpone(late)
        for member in self._members.values():
            if member.dead_at is not None:
                member.dead_at += late

    # -------------------------------------------------------------- small things

    def _connected(self, node_id: str) -> bool:
        member = self._members.get(node_id)
        return node_id == self.info.node_id or (member is not None and member.live)

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


def _lasting(info: NodeInfo) -> NodeInfo:
    """Without what changes all the time."""
    return replace(info, incarnation=0, load=0.0, free_shared_memory=0)
