"""What nodes say to each other: structs, and one door for reading and writing them.

    Membership    Join -> Accepted | Refused          the first words on a connection, after mutual TLS has proven both
                  Gossip -> Gossip                    ping and answer; the digest tells whether the member lists agree
                  Relay -> Gossip | Refused           "ping that one for me": one bad link kills nobody
                  Leave                               said by the node itself, so it is believed at once

Every text and table is bounded here, so that a member that went mad costs a refusal and not the memory of the others.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from upipe.cluster.address import Address
from upipe.errors import MessageInvalid
from upipe.memq.layout import LAYOUT_VERSION

PROTOCOL = 1
"""Version of what nodes say to each other. Nodes of different versions refuse each other at the handshake."""

MAX_MESSAGE = 1 << 20
"""Most bytes of one message: MAX_MEMBERS records of the usual 400 bytes, twice."""
MAX_MEMBERS = 1024
"""Most nodes of a cluster, the dead that are remembered included."""
MAX_INCARNATION = (1 << 62) - 1
"""Nobody gets there honestly: 2^30 starts."""
MAX_HOSTS = 16
"""Most addresses that a node tells of itself."""

MAX_PROMISED = 64
"""Most pipes of which a node tells what it promised. With more on one node, coordinators that do not keep the records
of the others may ask it for more than it has left, and it refuses."""

NodeId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}$", max_length=16)]
"""16 hexadecimal digits, made at the first start of an agent."""
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=256)]
Sentence = Annotated[str, msgspec.Meta(max_length=2000)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
Incarnation = Annotated[int, msgspec.Meta(ge=0, le=MAX_INCARNATION)]


class Gpu(msgspec.Struct, frozen=True):
    """One graphics processor. memory: bytes, 0 when unknown."""

    index: Annotated[int, msgspec.Meta(ge=0, le=1023)]
    name: Text = ""
    memory: Count = 0


class Resources(msgspec.Struct, frozen=True):
    """What a node has. All of it, not what is left: what is placed there is the scheduler's own knowledge."""

    cpu: Amount = 0.0
    """CPUs that this process may use: affinity and cgroup quota counted, so it may be a fraction."""
    memory: Count = 0
    """Bytes: the least of RAM and cgroup limits."""
    gpus: Annotated[tuple[Gpu, ...], msgspec.Meta(max_length=64)] = ()
    custom: Annotated[dict[Name, Amount], msgspec.Meta(max_length=64)] = {}
    """As given with --resources name=n."""


class NodeInfo(msgspec.Struct, frozen=True):
    """A node as it tells of itself. What is newer has a higher incarnation; load is as of the telling."""

    node_id: NodeId
    cluster: Name
    hosts: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_HOSTS)]
    """IP addresses at which it listens, the likeliest first."""
    port: Port
    incarnation: Incarnation
    """life << 32 | refutations: see `life`. Only the node itself ever raises it."""
    protocol: Count = PROTOCOL
    version: Text = ""
    """uPipe's version, for people."""
    layout: Count = LAYOUT_VERSION
    """Of queues in shared memory: nodes of different ones cannot mirror, and refuse each other too."""
    fingerprint: Text = ""
    """SHA-256 of its public key, as hexadecimal digits. A hint: TLS proves, this only tells early."""
    labels: Annotated[dict[Name, Text], msgspec.Meta(max_length=64)] = {}
    resources: Resources = Resources()
    free_shared_memory: Count = 0
    """Bytes that were free for queues when it was told."""
    load: Amount = 0.0
    """Processes that run or want to, averaged over a minute, when it was told."""
    promised: Annotated[dict[Name, dict[Name, Amount]], msgspec.Meta(max_length=MAX_PROMISED)] = {}
    """What the workers of each pipe may use of its resources, as it has agreed."""
    draining: bool = False
    """It takes no new work and is about to leave."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where to dial it, in its own order."""
        return tuple(Address(host, self.port) for host in self.hosts)

    @property
    def life(self) -> int:
        """How many times its agent has been started, this one included."""
        return self.incarnation >> 32


class Rumour(msgspec.Struct, frozen=True):
    """What one member holds of another. About itself a node says nothing in this way: Gossip.info is that."""

    info: NodeInfo
    state: Literal["alive", "suspect", "dead", "left"]


class Join(msgspec.Struct, frozen=True, tag=True):
    """Here I am; who are you?"""

    info: NodeInfo


class Gossip(msgspec.Struct, frozen=True, tag=True):
    """Ping and answer: the sender as it is now, a digest of whom it holds alive, and news."""

    info: NodeInfo
    digest: U32
    rumours: Annotated[tuple[Rumour, ...], msgspec.Meta(max_length=MAX_MEMBERS)] = ()


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """You are a member. gossip: the whole list."""

    gossip: Gossip


class Refused(msgspec.Struct, frozen=True, tag=True):
    """No. code: for programs, such as "cluster-name"; sentence: what, where, and what to do next."""

    code: Name
    sentence: Sentence


class Relay(msgspec.Struct, frozen=True, tag=True):
    """Ping `target` for me and send me its answer."""

    target: NodeId
    gossip: Gossip


class Leave(msgspec.Struct, frozen=True, tag=True):
    """I go, properly. Only believed over a connection that proved to be this node."""

    node_id: NodeId
    incarnation: Incarnation


NodeMessage = Join | Accepted | Refused | Gossip | Relay | Leave

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[NodeMessage] = msgspec.msgpack.Decoder(NodeMessage)


def encode(message: NodeMessage) -> bytes:
    """The one door out. A list too long for one message goes out in part: the digests still differ, so more follows.

    Raises:
        MessageInvalid: it is larger than MAX_MESSAGE.
    """
    data = _encoder.encode(message)
    while len(data) > MAX_MESSAGE and isinstance(message, Gossip | Accepted) and (shorter := _halved(message)):
        message, data = shorter, _encoder.encode(shorter)
    if len(data) > MAX_MESSAGE:
        raise MessageInvalid(f"{type(message).__name__} of {len(data):,} bytes is larger than {MAX_MESSAGE:,}")
    return data


def decode(data: bytes | bytearray | memoryview) -> NodeMessage:
    """The one door in.

    Raises:
        MessageInvalid: too large, truncated, malformed, or a field out of its bounds; says which.
    """
    if len(data) > MAX_MESSAGE:
        raise MessageInvalid(f"a node's message of {len(data):,} bytes is larger than {MAX_MESSAGE:,}; it was not read")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageInvalid(f"a node's message of {len(data):,} bytes cannot be read: {error}") from None


def _halved(message: Gossip | Accepted) -> Gossip | Accepted | None:
    if isinstance(message, Accepted):
        inner = _halved(message.gossip)
        return Accepted(inner) if isinstance(inner, Gossip) else None
    kept = message.rumours[: len(message.rumours) // 2]
    return msgspec.structs.replace(message, rumours=kept) if message.rumours else None
