"""What happens to membership, and what it wants done: the events and commands of membership.py."""

from __future__ import annotations

from dataclasses import dataclass

from upipe.cluster.address import Address
from upipe.cluster.messages import Gossip, Join, Leave, NodeInfo, Refused


@dataclass(frozen=True)
class Hint:
    """Somebody says that a node is here. Never identity: the handshake proves."""

    addresses: tuple[Address, ...]
    source: str
    """"seed" (configured, dns:// included) or "zeroconf"."""
    node_id: str = ""
    cluster: str = ""
    """"" unknown."""
    protocol: int = 0
    """0 unknown."""
    fingerprint: str = ""
    version: str = ""
    """For people."""


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Seen:
    """Discovery found something, true or not."""

    hint: Hint


@dataclass(frozen=True)
class Proven:
    """A handshake succeeded: `info` is what the node, proven by mutual TLS, says of itself.

    address: where we dialled it, or when it dialled us where it says it listens at the address it came from.
    gossip: the list that came with Accepted; None at the accepting side.
    """

    info: NodeInfo
    address: Address | None = None
    gossip: Gossip | None = None


@dataclass(frozen=True)
class DialFailed:
    """A Connect failed. refused: the other side's answer, when it was one."""

    address: Address
    reason: str
    refused: Refused | None = None


@dataclass(frozen=True)
class PingAnswered:
    """The answer to Ping or PingVia `number`. The shell has checked that the connection (or the member that relayed) is
    proven; relayed tells which it was."""

    number: int
    gossip: Gossip
    address: Address | None = None
    relayed: bool = False


@dataclass(frozen=True)
class PingFailed:
    """Ping or one PingVia `number` failed: refused, unreachable, timed out, or not this node any more."""

    number: int
    reason: str


@dataclass(frozen=True)
class MembersHeard:
    """A proven member's Gossip came in. Answer it with Membership.gossip(its id) after handling this."""

    gossip: Gossip


@dataclass(frozen=True)
class LeftProperly:
    """A node said good-bye over its proven connection."""

    leave: Leave


@dataclass(frozen=True)
class OwnChanged:
    """What we tell of ourselves changed (addresses, labels, load). Its incarnation and draining are not taken."""

    info: NodeInfo


@dataclass(frozen=True)
class OwnDrain:
    """We take no new work from now on."""


@dataclass(frozen=True)
class OwnLeave:
    """We go."""


@dataclass(frozen=True)
class Tick:
    """Time passed; see Membership.deadline."""


Event = (
    Seen
    | Proven
    | DialFailed
    | PingAnswered
    | PingFailed
    | MembersHeard
    | LeftProperly
    | OwnChanged
    | OwnDrain
    | OwnLeave
    | Tick
)

# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Connect:
    """Dial, prove each other by TLS, send `join`; report Proven or DialFailed."""

    address: Address
    join: Join


@dataclass(frozen=True)
class Ping:
    """Send `gossip` to that node; report PingAnswered or PingFailed with the number. addresses: likeliest first."""

    number: int
    node_id: str
    addresses: tuple[Address, ...]
    gossip: Gossip


@dataclass(frozen=True)
class PingVia:
    """Ask member `via` to ping `node_id`; report as for Ping."""

    number: int
    node_id: str
    via: str
    gossip: Gossip


@dataclass(frozen=True)
class Spread:
    """Send `message` to that member; no answer is needed, but a Gossip that comes back is MembersHeard."""

    node_id: str
    addresses: tuple[Address, ...]
    message: Gossip | Leave


@dataclass(frozen=True)
class Announce:
    """What we tell of ourselves changed: advertise it."""

    info: NodeInfo


@dataclass(frozen=True)
class Persist:
    """Remember that this life of ours is taken (DataDir.outlive): our data directory was older than we are."""

    life: int


@dataclass(frozen=True)
class NodeUp:
    """A member can be used. restarted: it was up until now in an earlier life (its workers may well run on)."""

    info: NodeInfo
    restarted: bool = False


@dataclass(frozen=True)
class NodeChanged:
    """A live member tells something new of itself (draining, labels, addresses)."""

    info: NodeInfo


@dataclass(frozen=True)
class NodeSuspect:
    """It does not answer; place nothing new there until NodeUp, NodeTrusted or NodeDown."""

    info: NodeInfo
    reason: str


@dataclass(frozen=True)
class NodeTrusted:
    """The suspect objected: all is well."""

    info: NodeInfo


@dataclass(frozen=True)
class NodeDown:
    """It is dead for us: move its work. It may come back with NodeUp."""

    info: NodeInfo
    reason: str


@dataclass(frozen=True)
class NodeLeft:
    """It said good-bye."""

    info: NodeInfo


@dataclass(frozen=True)
class Tell:
    """A sentence for the log and for `upipe doctor`; each is told once."""

    code: str
    sentence: str


Command = (
    Connect
    | Ping
    | PingVia
    | Spread
    | Announce
    | Persist
    | NodeUp
    | NodeChanged
    | NodeSuspect
    | NodeTrusted
    | NodeDown
    | NodeLeft
    | Tell
)
