"""What travels in the bodies of HTTP requests and answers, as JSON; unknown fields are ignored: versions can mix.

Each string that names something has a pattern and each list a bound: what does not fit never reaches a handler.
Frames do not travel here, they go over mirrors.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

PROTOCOL = 1
"""Version of what nodes say to each other; nodes of different ones refuse each other at join."""

NODE_ID = "[0-9a-f]{16}"
SHA256 = "[0-9a-f]{64}"
NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

NodeId = Annotated[str, Meta(pattern=f"^{NODE_ID}$")]
"""Sixteen hex digits, made when a node first starts."""
Sha256 = Annotated[str, Meta(pattern=f"^{SHA256}$")]
Name = Annotated[str, Meta(pattern=f"^{NAME}$")]
Address = Annotated[str, Meta(min_length=1, max_length=255)]
"""HOST:PORT."""
Text = Annotated[str, Meta(max_length=4096)]
Epoch = Annotated[int, Meta(ge=0, le=2**53)]
"""Life number of a pipe's coordination; JSON numbers are exact up to 2^53."""


class Problem(msgspec.Struct, frozen=True):
    """The body of each refusal."""

    code: str
    """For programs: a word that does not change."""
    sentence: str
    """For people: what, where, what to do."""


class Done(msgspec.Struct, frozen=True):
    """It was done, and there is nothing more to say."""


class NodeInfo(msgspec.Struct, frozen=True):
    """What a node says of itself."""

    node: NodeId
    cluster: Name
    version: Text
    """Of uPipe."""
    protocol: int
    """Of messages between nodes: differing ones are refused at join."""
    layout: int
    """Of queues in shared memory: differing ones cannot be mirrored."""
    host: Text
    now: float
    """Its clock, seconds since 1970."""
    state: Text = "alive"
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}


class Member(msgspec.Struct, frozen=True):
    """A node as another one sees it."""

    node: NodeId
    addresses: Annotated[tuple[Address, ...], Meta(max_length=64)]
    state: Text
    incarnation: Annotated[int, Meta(ge=0, le=2**53)] = 0


class Members(msgspec.Struct, frozen=True):
    """All nodes that a node knows, itself among them."""

    cluster: Name
    members: Annotated[tuple[Member, ...], Meta(max_length=4096)]


class Join(msgspec.Struct, frozen=True):
    """I am this node: take me in."""

    info: NodeInfo
    addresses: Annotated[tuple[Address, ...], Meta(max_length=64)]


class Gossip(msgspec.Struct, frozen=True):
    """I live, and this is what changed as far as I know."""

    sender: NodeId
    members: Annotated[tuple[Member, ...], Meta(max_length=4096)] = ()
    extra: dict[str, Any] = {}
    """Loads, versions of records: of the membership machine."""


class Leave(msgspec.Struct, frozen=True):
    """A node goes, properly."""

    node: NodeId


class PipeRequest(msgspec.Struct, frozen=True):
    """Run this pipe."""

    name: Name
    spec: dict[str, Any]
    """The declared graph, without code."""
    code: Annotated[tuple[Sha256, ...], Meta(max_length=4096)] = ()
    """Contents that a node needs to run it; asked for one by one where they are missing."""
    client: NodeId | None = None
    """The submitting process, when it emits or reads results."""


class PipeInfo(msgspec.Struct, frozen=True):
    """A pipe as its coordinator knows it."""

    pipe: Name
    name: Name
    state: Text
    epoch: Epoch
    coordinator: NodeId
    detail: dict[str, Any] = {}


class Pipes(msgspec.Struct, frozen=True):
    """Every pipe that a node knows."""

    pipes: tuple[PipeInfo, ...]


class Record(msgspec.Struct, frozen=True):
    """A pipe's record, from its coordinator to the members that keep copies."""

    pipe: Name
    epoch: Epoch
    coordinator: NodeId
    content: dict[str, Any]


class Stopping(msgspec.Struct, frozen=True):
    """How to end."""

    deadline: Annotated[float, Meta(ge=0, le=86_400)] = 30.0
    """Seconds until it is ended by force."""


class Command(msgspec.Struct, frozen=True):
    """From a pipe's coordinator to its keeper on this node; refused when `epoch` is lower than the highest one seen."""

    epoch: Epoch
    command: dict[str, Any]


class Outcome(msgspec.Struct, frozen=True):
    """What a keeper answers."""

    epoch: Epoch
    result: dict[str, Any] = {}


class Stored(msgspec.Struct, frozen=True):
    """The node holds that content, and its hash was checked."""

    sha256: Sha256
    size: int


class Mirrors(msgspec.Struct, frozen=True):
    """Every mirror that ends on this node."""

    mirrors: tuple[MirrorInfo, ...]


class MirrorInfo(msgspec.Struct, frozen=True):
    """Where one mirror stands, in ring positions."""

    mirror: Name
    role: Text
    epoch: Epoch
    sent: int
    received: int
    finished: int
    state: Text = "open"


class JobRequest(msgspec.Struct, frozen=True):
    """Run this script on a node."""

    name: Name
    arguments: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=1024)]
    """The script, relative to the working directory, and what follows it."""
    working_directory: Sha256
    """Content hash of its archive."""
    environment: Annotated[dict[str, Text], Meta(max_length=256)] = {}


class JobInfo(msgspec.Struct, frozen=True):
    """A submitted script."""

    job: Name
    name: Name
    state: Text
    node: NodeId
    status: int | None = None
    """Exit status, once it ended; negative: killed by that signal."""


class Jobs(msgspec.Struct, frozen=True):
    """Every job that a node knows."""

    jobs: tuple[JobInfo, ...]
