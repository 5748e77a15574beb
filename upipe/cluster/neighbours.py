"""The shell of membership: runs what the pure machine commands, and tells it what came of it.

    Multicast, Seeds, handlers, timers ──events──▶ Membership ──commands──▶ requests to other agents, news to `changed`

Each command that asks somebody is a task of its own with a deadline; none waits for another. Nothing is on disk but the
life (Persist).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from upipe.cluster import member_events as events
from upipe.cluster.address import Address
from upipe.cluster.client import Client
from upipe.cluster.discovery import Multicast
from upipe.cluster.errands import Errands
from upipe.cluster.guard import exposed
from upipe.cluster.handshake import judge
from upipe.cluster.interfaces import WILDCARDS, Watch, found_addresses, reachable_at
from upipe.cluster.membership import Membership
from upipe.cluster.messages import Accepted, Gossip, Join, Leave, NodeInfo, Refused, Relay
from upipe.cluster.multicast import local_problems, unheard
from upipe.cluster.peers import Peers
from upipe.cluster.resources import free_shared_memory, load
from upipe.cluster.routes import JOIN, LEAVE, PING, RELAY
from upipe.cluster.seeds import Seed, Seeds
from upipe.cluster.server import refuse
from upipe.cluster.timing import Timing
from upipe.errors import ClusterError, NodeRefused, NodeUnproven

LOOK_EVERY = 5.0
"""Seconds between two looks at load and shared memory of this machine. They travel with pings anyway, so looking more
often costs nothing on the wire."""
HEAR = 5.0
"""Seconds in which a node that advertises itself is heard, where the network carries multicast."""
LEAVE_SECONDS = 1.0
"""For saying good-bye to all members at once; who misses it finds out by its pings."""
NodeEvent = (
    events.NodeUp
    | events.NodeChanged
    | events.NodeSuspect
    | events.NodeTrusted
    | events.NodeDown
    | events.NodeLeft
)


class Neighbours:
    """The members, kept up to date from start() to close().

    Args:
        info: of this node, in this life.
        host: on which it listens.
        make_peers: makes the clients, given where nodes are.
        changed: called with each change of another node, and with NodeChanged of this one when it drains.
        persist: remembers a life.
        tell: told sentences for the user.
    """

    def __init__(
        self,
        info: NodeInfo,
        host: str,
        make_peers: Callable[[Callable[[str], tuple[Address, ...]]], Peers],
        changed: Callable[[NodeEvent], None],
        persist: Callable[[int], None] = lambda life: None,
        tell: Callable[[str], None] = lambda sentence: None,
        timing: Timing | None = None,
    ) -> None:
        self._timing = timing or Timing()
        self.machine = Membership(info, self._timing)
        self.peers = make_peers(self.addresses)
        self._host = host
        self._changed = changed
        self._persist = persist
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._errands = Errands()
        self._multicast: Multicast | None = None
        self._watch: Watch | None = None
        self._said: set[str] = set()
        self._seeds: set[Address] = set()

    # ------------------------------------------------------------------ life

    async def start(self, seeds: tuple[Seed, ...], multicast: bool) -> None:
        """Begin to look for others."""
        if multicast:
            self._multicast = Multicast(self._found, self.look_around)
            if why := await self._multicast.start(self.info):
                self._tell(why)
                self._multicast = None
            else:
                self._errands.run(self._listen(self._multicast, bool(seeds)), "multicast")
        if self._multicast is None and self._host in WILDCARDS:
            self._watch = Watch(self.look_around)
        if seeds:
            self._errands.keep(Seeds(seeds, self._found_seed, self._tell).run, "looking for seeds")
        self._errands.keep(self._look, "looking at the load")

    async def leave(self) -> None:
        """Say good-bye to everybody; nothing is done any more after it."""
        farewells = self.machine.handle(events.OwnLeave(), self._now())
        self._rearm()
        said = [self._spread(one) for one in farewells if isinstance(one, events.Spread)]
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await asyncio.gather(*said)
        except TimeoutError:
            pass

    async def close(self) -> None:
        """End, without a word. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is not None:
            self._watch.close()
        await self._errands.close()
        if self._multicast is not None:
            await self._multicast.close()
        await self.peers.close()

    # ------------------------------------------------------------------ asked by others

    @property
    def info(self) -> NodeInfo:
        """Ourselves."""
        return self.machine.info

    def addresses(self, node: str) -> tuple[Address, ...]:
        """Where to dial a node, the likeliest first; () when it is not known."""
        member = self.machine.member(node)
        return member.addresses if member is not None else ()

    def live(self) -> dict[str, NodeInfo]:
        """Nodes in use by id, this one among them."""
        return {one.node_id: one for one in self.machine.live()}

    def suspects(self) -> frozenset[str]:
        """Nodes that do not answer just now."""
        return frozenset(one.info.node_id for one in self.machine.members() if one.state == "suspect")

    def drain(self) -> None:
        """We take nothing new from now on."""
        self.handle(events.OwnDrain())
        self._changed(events.NodeChanged(self.info))

    def _now(self) -> float:
        return self._loop.time()

    def handle(self, event: events.Event) -> None:
        """Something happened."""
        for command in self.machine.handle(event, self._now()):
            self._do(command)
        self._rearm()

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self.machine.deadline()
        self._timer = None if due is None else self._loop.call_at(due, self.handle, events.Tick())

    # ------------------------------------------------------------------ what others say

    def joined(self, join: Join, came_from: str) -> Accepted:
        """A proven node says hello.

        Args:
            came_from: IP address of its connection.

        Raises:
            NodeRefused: it cannot be a member, with the reason.
        """
        host = came_from.partition("%")[0]
        listens = next((one for one in join.info.hosts if one.partition("%")[0] == host), None)
        address = Address(listens, join.info.port) if listens and join.info.port else None
        self.handle(events.Proven(join.info, address))
        self._judge(join.info)
        return Accepted(self.machine.gossip(join.info.node_id, whole=True))

    def pinged(self, gossip: Gossip) -> Gossip:
        """A proven node asks whether we are there."""
        self.handle(events.MembersHeard(gossip))
        self._judge(gossip.info)
        return self.machine.gossip(gossip.info.node_id)

    async def relayed(self, relay: Relay) -> Gossip:
        """A proven node asks us to ping another one. What it holds against that one, we heard; so we tell it too."""
        self.pinged(relay.gossip)
        answer = await self.peers.call(relay.target, PING, self.machine.gossip(relay.target), seconds=RELAY.seconds)
        self.handle(events.MembersHeard(answer))
        return answer

    def _judge(self, other: NodeInfo) -> None:
        if refused := judge(self.info, other):
            raise refuse(409, refused.code, refused.sentence)

    # ------------------------------------------------------------------ what the machine wants

    def _do(self, command: events.Command) -> None:
        if isinstance(command, events.Connect):
            self._errands.run(self._connect(command), f"dial {command.address}")
        elif isinstance(command, events.Ping):
            self._errands.run(self._ping(command), f"ping {command.node_id}")
        elif isinstance(command, events.PingVia):
            self._errands.run(self._ping_via(command), f"ping {command.node_id} via {command.via}")
        elif isinstance(command, events.Spread):
            self._errands.run(self._spread(command), f"news for {command.node_id}")
        elif isinstance(command, events.Announce):
            if self._multicast is not None:
                self._errands.run(self._multicast.update(command.info), "advertise")
        elif isinstance(command, events.Persist):
            self._persist(command.life)
        elif isinstance(command, events.Tell):
            self._tell(command.sentence)
        else:
            self._node_event(command)

    def _node_event(self, event: NodeEvent) -> None:
        if isinstance(event, events.NodeDown | events.NodeLeft):
            self._errands.run(self.peers.forget(event.info.node_id), "close connections")
        self._tell(told(event))
        self._changed(event)

    async def _connect(self, command: events.Connect) -> None:
        try:
            async with asyncio.timeout(self._timing.dial_timeout), self.peers.stranger(command.address) as client:
                accepted = await self._join(client, command)
        except NodeRefused as error:
            refused = Refused(error.code[:128] or "refused", error.sentence[:2000])
            self.handle(events.DialFailed(command.address, str(error), refused))
        except (ClusterError, TimeoutError) as error:
            self._complain(command.address, error)
            self.handle(events.DialFailed(command.address, str(error)))
        else:
            self.handle(events.Proven(accepted.gossip.info, command.address, accepted.gossip))

    async def _join(self, client: Client, command: events.Connect) -> Accepted:
        """Any node of the cluster may answer there: whom it says to be it has to prove, before it is believed."""
        accepted = await client.call(JOIN, command.join, seconds=self._timing.dial_timeout, attempts=1)
        node = accepted.gossip.info.node_id
        if node != self.info.node_id and self.peers.credentials.derived:
            await self.peers.call(node, PING, self.machine.gossip(node), addresses=(command.address,))
        return accepted

    def _complain(self, address: Address, error: Exception) -> None:
        """Strangers are told of always, silence only of seeds: an advertisement may be old."""
        if isinstance(error, NodeUnproven) or address in self._seeds:
            self._once(f"cannot join by way of {address}: {error}; it is tried again")

    def _once(self, sentence: str) -> None:
        if sentence not in self._said and len(self._said) < 256:
            self._said.add(sentence)
            self._tell(sentence)

    async def _ping(self, command: events.Ping) -> None:
        try:
            answer = await self.peers.call(command.node_id, PING, command.gossip, addresses=command.addresses)
            self.handle(events.PingAnswered(command.number, answer))
        except ClusterError as error:
            self.handle(events.PingFailed(command.number, str(error)))

    async def _ping_via(self, command: events.PingVia) -> None:
        try:
            answer = await self.peers.call(command.via, RELAY, Relay(command.node_id, command.gossip))
            self.handle(events.PingAnswered(command.number, answer, relayed=True))
        except ClusterError as error:
            self.handle(events.PingFailed(command.number, str(error)))

    async def _spread(self, command: events.Spread) -> None:
        """It may be lost; the machine says it again while it matters."""
        message = command.message
        try:
            if isinstance(message, Leave):
                await self.peers.call(command.node_id, LEAVE, message, addresses=command.addresses)
            else:
                answer = await self.peers.call(command.node_id, PING, message, addresses=command.addresses)
                self.handle(events.MembersHeard(answer))
        except ClusterError:
            pass

    # ------------------------------------------------------------------ looking around

    def _found(self, hint: events.Hint) -> None:
        self.handle(events.Seen(hint))

    def _found_seed(self, hint: events.Hint) -> None:
        self._seeds.update(hint.addresses)
        self._found(hint)

    def look_around(self) -> None:
        """Addresses of this machine may have changed."""
        hosts = reachable_at(self._host)
        if hosts != self.info.hosts:
            self.handle(events.OwnChanged(replace(self.info, hosts=hosts)))

    async def _listen(self, multicast: Multicast, seeds: bool) -> None:
        """Say what keeps others from being found here, or us from being found, once each."""
        if not exposed(self._host):
            return
        for sentence in await local_problems():
            self._tell(sentence)
        await asyncio.sleep(HEAR)
        if not (seeds or self.machine.members() or multicast.heard - {self.info.node_id}):
            self._tell(f"no other node was heard by multicast within {HEAR:g} s; where some run, this network does not "
                       "carry it: name one of them with --join HOST:PORT")  # fmt: skip
        known: set[str] = set()
        while True:
            met = {one.info.node_id: one.info for one in self.machine.members() if one.live}
            long = [info for node, info in met.items() if node in known]
            if sentences := unheard(long, multicast.heard, found_addresses()):
                self._tell(sentences[0])  # of the others the same can be said
                return
            known = set(met)
            await asyncio.sleep(HEAR)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            now, free = load(), free_shared_memory()
            changed = abs(now - self.info.load) > 0.25 or abs(free - self.info.free_shared_memory) > free // 50
            if changed:
                self.handle(events.OwnChanged(replace(self.info, load=now, free_shared_memory=free)))


def told(event: NodeEvent) -> str:
    """A line for the user."""
    node = f"node {event.info.node_id}"
    where = f" at {event.info.addresses[0]}" if event.info.addresses else ""
    if isinstance(event, events.NodeUp):
        return f"{node}{where} {'is back, restarted' if event.restarted else 'joined'}"
    if isinstance(event, events.NodeSuspect):
        return f"{node} is suspected: {event.reason}"
    if isinstance(event, events.NodeTrusted):
        return f"{node} answers again"
    if isinstance(event, events.NodeDown):
        return f"{node} died: {event.reason}"
    if isinstance(event, events.NodeLeft):
        return f"{node} left"
    return f"{node} is draining" if event.info.draining else f"{node} has news of itself"
