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
* Everything heals by the same three habits: the dead are dialled again, whoever talks to us is told what we hold
  against it, and lists are compared by digest with every ping and sent whole when they differ.

What is held of the others, and by which rules, is in roster.py; pings, dials and news are kept in probing.py,
dialing.py and member.py. Here events are taken, time runs, and members are reached.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from upipe.cluster.address import Address
from upipe.cluster.dialing import Dialer
from upipe.cluster.member import GONE, Member
from upipe.cluster.member_events import (
    Command,
    Connect,
    DialFailed,
    Event,
    Hint,
    LeftProperly,
    MembersHeard,
    OwnChanged,
    OwnDrain,
    OwnLeave,
    Ping,
    PingAnswered,
    PingFailed,
    PingVia,
    Proven,
    Seen,
    Spread,
    Tick,
)
from upipe.cluster.messages import Gossip, Join, Leave, NodeInfo, Rumour
from upipe.cluster.probing import Probe, Prober, watched
from upipe.cluster.roster import Roster, lasting
from upipe.cluster.timing import Timing


class Membership(Roster):
    """Decides for one agent.

    Args:
        info: ourselves, at the first incarnation of this life (Identity.incarnation).
        timing: knobs.
        rng: chooses whom to tell and whom to ask; give a seeded one in tests.
    """

    def __init__(self, info: NodeInfo, timing: Timing | None = None, rng: random.Random | None = None) -> None:
        super().__init__(info, timing, rng)
        self.left = False
        """We said good-bye; nothing is done any more."""
        self._prober = Prober(self._timing)
        self._dialer = Dialer(self._timing, self._connected)
        self._gossip_at = 0.0
        self._due: float | None = None
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
        self._due = self._next_due(now)
        out, self._out = self._out, []
        return out

    def deadline(self) -> float | None:
        """When to call handle(Tick()) at the latest; None: not before the next event."""
        return self._due

    def validate(self) -> None:
        """Assert the invariants that stand beside the fields (for tests)."""
        super().validate()
        self._prober.validate()
        self._dialer.validate()

    # -------------------------------------------------------------- what happened

    def _seen(self, event: Seen, now: float) -> None:
        hint = event.hint
        if hint.cluster and hint.cluster != self.info.cluster:
            self._other_cluster(hint)
            return
        if hint.protocol and hint.protocol != self.info.protocol:
            self._refuse(replace(
                self.info, node_id=hint.node_id or "0" * 16, protocol=hint.protocol, version=hint.version,
                hosts=tuple(one.host for one in hint.addresses), port=hint.addresses[0].port,
            ))  # fmt: skip
            return
        claim = (
            "" if hint.node_id == self.info.node_id else hint.node_id
        )  # our own id elsewhere: a copied data directory
        for address in hint.addresses:
            if address not in self.info.addresses:
                self._dialer.seen(address, claim, hint.source, now)

    def _other_cluster(self, hint: Hint) -> None:
        """Other clusters on the same network are usual; with the same token one of the names may be a slip."""
        if hint.fingerprint and hint.fingerprint == self.info.fingerprint:
            self._tell("cluster-name", f"node {hint.node_id} at {hint.addresses[0]} has our token and is of cluster "
                       f"{hint.cluster!r}, this one of {self.info.cluster!r}: if that is to be one cluster, give both "
                       "the same --cluster")  # fmt: skip

    def _proven(self, event: Proven, now: float) -> None:
        if self._refuse(event.info):
            if event.address is not None:
                self._dialer.failed(event.address, now, for_good=True)
        elif event.info.node_id == self.info.node_id:
            if event.address is not None:
                self._dialer.proved(event.address, self.info.node_id, now)  # our own address: never again
        else:
            self._meet(event.info, event.address, now)
            if event.gossip is not None:
                self._listen(event.gossip, now)

    def _dial_failed(self, event: DialFailed, now: float) -> None:
        self._dialer.failed(event.address, now, for_good=event.refused is not None)
        if event.refused is not None:
            self._tell(event.refused.code, f"{event.address} refuses this node: {event.refused.sentence}")

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
            self._meet(info, event.address, now)
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
        if lasting(told) == lasting(self.info):
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

    def _meet(self, info: NodeInfo, address: Address | None, now: float) -> None:
        if address is not None:
            self._dialer.proved(address, info.node_id, now)
        self._met(info, address, now)

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
            asked = f", nor through {probe.relays} others" if probe.relays else ""
            why = f"it does not answer node {self.info.node_id} ({probe.reason}){asked}"
            self._doubt(member, why, self._timing.suspicion, now)

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

    def _next_due(self, now: float) -> float | None:
        if self.left:
            return None
        times = [self._prober.deadline(self._pinged()), self._dialer.deadline()]
        times += [member.dead_at for member in self._members.values()]
        times += [self._gossip_at] if self._news.pending else []
        due = min((time for time in times if time is not None), default=None)
        return None if due is None else max(due, now)  # never in the past: that would look as if we had slept

    def _forgive_lateness(self, now: float) -> None:
        late = now - self._due if self._due is not None else 0.0
        if late <= self._timing.late:
            return
        self._prober.postpone(late)
        self._dialer.postpone(late)
        for member in self._members.values():
            if member.dead_at is not None:
                member.dead_at += late

    # -------------------------------------------------------------- reaching members

    def _ask(self, member: Member, now: float, *, at_once: bool = False) -> None:
        if at_once or self._prober.wants(member.info.node_id, now):
            self._ping(member, now)

    def _look_for(self, info: NodeInfo, now: float) -> None:
        for address in info.addresses:
            self._dialer.seen(address, info.node_id, "member", now)
        self._dialer.revive(info.node_id, now)

    def _stop_asking(self, node_id: str) -> None:
        self._prober.forget(node_id)

    def _stop_looking(self, node_id: str) -> None:
        self._dialer.forget(node_id)

    def _connected(self, node_id: str) -> bool:
        member = self._members.get(node_id)
        return node_id == self.info.node_id or (member is not None and member.live)
