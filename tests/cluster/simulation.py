"""A network of membership machines in simulated time: losses, delays, duplicates, one-way cuts, crashes, pauses.

It plays the shell: commands become messages, messages become events at the other end. Nobody's clock shows the same.
All randomness comes from one seed, so that a history repeats.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from msgspec.structs import replace

from upipe.cluster import member_events as ev
from upipe.cluster.address import Address
from upipe.cluster.handshake import judge
from upipe.cluster.membership import Membership
from upipe.cluster.messages import Gossip, Leave, NodeInfo, NodeMessage, Refused, decode, encode
from upipe.cluster.timing import Timing

M = TypeVar("M", bound=NodeMessage)
PORT = 7420
REQUEST_TIMEOUT = 1.0


@dataclass
class Network:
    """What happens to a message."""

    loss: float = 0.0
    """Probability of each message to vanish."""
    duplicate: float = 0.0
    delay: tuple[float, float] = (0.001, 0.01)
    cuts: set[tuple[int, int]] = field(default_factory=set)
    """(from, to): nothing passes this way."""


@dataclass
class Host:
    """One machine. membership is None while no agent runs."""

    index: int
    info: NodeInfo
    clock: float
    """Offset of its monotonic clock."""
    membership: Membership | None = None
    reachable: bool = True
    """False: the machine is off, dials time out; True without membership: they are refused."""
    paused_until: float = 0.0
    awake_since: float = 0.0
    """Since when it runs without a pause."""
    crashed_at: float | None = None
    up: set[str] = field(default_factory=set)
    """Node ids after NodeUp and before NodeDown or NodeLeft."""
    log: list[tuple[float, ev.Command]] = field(default_factory=list)
    """Everything told by this life's machine but dials, pings and gossip."""
    sent: int = 0
    ticking: float | None = None

    @property
    def address(self) -> Address:
        return self.info.addresses[0]


class World:
    """The simulation."""

    def __init__(self, nodes: int, seed: int = 0, network: Network | None = None, timing: Timing | None = None) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.network = network or Network()
        self.timing = timing or Timing()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.hosts = [self._host(index) for index in range(nodes)]
        self._by_address = {host.address: host for host in self.hosts}
        self._by_id = {host.info.node_id: host for host in self.hosts}

    def _host(self, index: int) -> Host:
        info = NodeInfo(f"{self.rng.getrandbits(64):016x}", "sim", (f"10.0.0.{index + 1}",), PORT, 0)
        return Host(index, info, self.rng.uniform(0, 1e6))

    # -------------------------------------------------------------- what tests do

    def start(self, index: int, hints: bool = True, **changes: object) -> Host:
        """Run a new life of an agent, with hints (as from an advertisement) of every other address."""
        host = self.hosts[index]
        life = host.info.life + 1
        host.info = replace(host.info, incarnation=life << 32, draining=False, **changes)
        host.membership = Membership(host.info, self.timing, random.Random(self.rng.getrandbits(32)))
        host.up, host.log, host.crashed_at, host.reachable = set(), [], None, True
        host.ticking, host.paused_until, host.awake_since = None, 0.0, self.now
        self.handle(host, ev.Tick())
        for other in self.hosts if hints else []:
            if other is not host:
                self.handle(host, ev.Seen(ev.Hint((other.address,), "zeroconf", other.info.node_id, "sim", 1)))
        return host

    def start_all(self) -> None:
        for host in self.hosts:
            self.start(host.index)

    def crash(self, index: int, machine: bool = True) -> None:
        """kill -9 of the agent, or power off of the machine."""
        host = self.hosts[index]
        if host.membership is not None:
            host.membership, host.crashed_at = None, self.now
        host.reachable = not machine

    def leave(self, index: int) -> None:
        host = self.hosts[index]
        if host.membership is not None:
            self.handle(host, ev.OwnLeave())
            host.membership, host.crashed_at = None, self.now

    def pause(self, index: int, seconds: float) -> None:
        """SIGSTOP: what arrives waits, and timers come late."""
        host = self.hosts[index]
        host.paused_until = host.awake_since = max(host.paused_until, self.now + seconds)

    def cut(self, source: int, target: int) -> None:
        self.network.cuts.add((source, target))

    def partition(self, left: set[int]) -> None:
        for one, other in itertools.permutations(range(len(self.hosts)), 2):
            if (one in left) != (other in left):
                self.cut(one, other)

    def heal(self) -> None:
        self.network.cuts.clear()

    def run(self, seconds: float, check: Callable[[World], None] | None = None) -> None:
        """Let time pass; `check` after each event."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, act = heapq.heappop(self._events)
            act()
            if check is not None:
                check(self)
        self.now = end

    # -------------------------------------------------------------- what tests ask

    @property
    def running(self) -> list[Host]:
        return [host for host in self.hosts if host.membership is not None]

    def agreed(self) -> bool:
        """Whether everybody who runs uses exactly those who run."""
        ids = {host.info.node_id for host in self.running}
        return all(host.up == ids - {host.info.node_id} for host in self.running)

    def told(self, kind: type) -> list[tuple[float, int, ev.Command]]:
        """Every command of a kind, as (time, host, command)."""
        return [(at, host.index, one) for host in self.hosts for at, one in host.log if isinstance(one, kind)]

    # -------------------------------------------------------------- machinery

    def handle(self, host: Host, event: ev.Event) -> None:
        """Give an event to a machine, now or when its pause ends, and do what it wants."""
        life = host.membership
        if life is None:
            return
        if host.paused_until > self.now:
            self._at(host.paused_until, lambda: self.handle(host, event) if host.membership is life else None)
            return
        commands = life.handle(event, self.now + host.clock)
        life.validate()
        for command in commands:
            self._do(host, command)
        assert host.up == {info.node_id for info in life.live()[1:]} or life.left, "NodeUp and NodeDown do not add up"
        due = life.deadline()
        if due is not None and (host.ticking is None or due - host.clock < host.ticking or host.ticking <= self.now):
            host.ticking = max(self.now, due - host.clock) + self.rng.uniform(0.0, 0.01)
            self._at(host.ticking, lambda: self._tick(host, life))

    def _tick(self, host: Host, life: Membership) -> None:
        if host.membership is life and host.ticking is not None and host.ticking <= self.now:
            host.ticking = None
            self.handle(host, ev.Tick())

    def _do(self, host: Host, command: ev.Command) -> None:
        if isinstance(command, ev.Connect):
            self._connect(host, command)
        elif isinstance(command, ev.Ping):
            self._ping(host, command)
        elif isinstance(command, ev.PingVia):
            self._ping_via(host, command)
        elif isinstance(command, ev.Spread):
            self._spread(host, command)
        else:
            if isinstance(command, ev.NodeUp):
                host.up.add(command.info.node_id)
            elif isinstance(command, ev.NodeDown | ev.NodeLeft):
                host.up.remove(command.info.node_id)
            elif isinstance(command, ev.Announce):
                host.info = command.info
            host.log.append((self.now, command))
            return
        host.sent += 1

    def _connect(self, host: Host, command: ev.Connect) -> None:
        life, address, target = host.membership, command.address, self._by_address.get(command.address)

        def back(event: ev.Event) -> None:
            if host.membership is life and not answered:
                answered.append(True)
                self.handle(host, event)

        answered: list[bool] = []
        self._at(self.now + REQUEST_TIMEOUT, lambda: back(ev.DialFailed(address, "timed out")))
        if target is None:
            return

        def arrive() -> None:
            if target.membership is None:
                if target.reachable:
                    self._send(target, host, lambda: back(ev.DialFailed(address, "refused")))
                return
            join = _wire(command.join)
            refused = judge(target.membership.info, join.info)
            if refused is not None:
                told: Refused = refused
                self._send(target, host, lambda: back(ev.DialFailed(address, "refused", told)))
                return
            self.handle(target, ev.Proven(join.info, host.address))
            info, gossip = target.membership.info, _wire(target.membership.gossip(host.info.node_id, whole=True))
            self._send(target, host, lambda: back(ev.Proven(info, address, gossip)))

        self._send(host, target, arrive)

    def _ping(self, host: Host, command: ev.Ping) -> None:
        def failed(reason: str) -> None:
            self.handle(host, ev.PingFailed(command.number, reason))

        def answer(gossip: Gossip) -> None:
            self.handle(host, ev.PingAnswered(command.number, gossip, command.addresses[0]))

        self._ask(host, self._by_address[command.addresses[0]], command.gossip, answer, failed)

    def _ask(
        self,
        host: Host,
        target: Host,
        gossip: Gossip,
        answer: Callable[[Gossip], None],
        failed: Callable[[str], None],
    ) -> None:
        life = host.membership

        def back(act: Callable[[], None]) -> None:
            if host.membership is life:
                act()

        def arrive() -> None:
            if target.membership is None:
                if target.reachable:
                    self._send(target, host, lambda: back(lambda: failed("connection refused")))
                return
            self.handle(target, ev.MembersHeard(_wire(gossip)))
            reply = _wire(target.membership.gossip(gossip.info.node_id))
            self._send(target, host, lambda: back(lambda: answer(reply)))

        self._send(host, target, arrive)

    def _ping_via(self, host: Host, command: ev.PingVia) -> None:
        via, target, life = self._by_id[command.via], self._by_id[command.node_id], host.membership

        def report(event: ev.Event) -> None:
            if host.membership is life:
                self.handle(host, event)

        def arrive() -> None:
            relay = via.membership
            if relay is None:
                return
            self.handle(via, ev.MembersHeard(command.gossip))

            def answer(gossip: Gossip) -> None:
                event = ev.PingAnswered(command.number, gossip, relayed=True)
                self._send(via, host, lambda: report(event))

            def failed(reason: str) -> None:
                self._send(via, host, lambda: report(ev.PingFailed(command.number, reason)))

            self._ask(via, target, relay.gossip(command.node_id), answer, failed)

        self._send(host, via, arrive)

    def _spread(self, host: Host, command: ev.Spread) -> None:
        target = self._by_id[command.node_id]
        message = command.message
        if isinstance(message, Leave):
            self._send(host, target, lambda: self.handle(target, ev.LeftProperly(message)))
        else:
            self._send(host, target, lambda: self.handle(target, ev.MembersHeard(_wire(message))))

    def _send(self, source: Host, target: Host, arrive: Callable[[], None]) -> None:
        network = self.network
        copies = 1 + (self.rng.random() < network.duplicate)
        for _ in range(copies):
            passes = (source.index, target.index) not in network.cuts and self.rng.random() >= network.loss
            if passes:
                self._at(self.now + self.rng.uniform(*network.delay), arrive)

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))


def _wire(message: M) -> M:
    got = decode(encode(message))
    assert type(got) is type(message)
    return got
