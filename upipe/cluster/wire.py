"""What travels in the bodies of HTTP requests and answers, as JSON; unknown fields are ignored: versions can mix.

Each string that names something has a pattern and each list a bound: what does not fit never reaches a handler.
Frames do not travel here, they go over mirrors.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from upipe.cluster.dealings import Message, NodeReport, TellClient
from upipe.cluster.layout import NodePlan
from upipe.cluster.messages import NodeInfo
from upipe.cluster.record import Shipment
from upipe.graph.spec import PipeSpec

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
Origin = Annotated[str, Meta(pattern=f"^({NODE_ID}/{NAME})?$")]
"""NODE/JOB; "": of no job."""
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


class NodeStatus(msgspec.Struct, frozen=True):
    """What a node says of itself to tools."""

    info: NodeInfo
    now: float
    """Its clock, seconds since 1970."""
    pipes: Annotated[tuple[Name, ...], Meta(max_length=4096)] = ()
    """Of which it has workers or queues."""


class Member(msgspec.Struct, frozen=True):
    """A node as another one sees it."""

    info: NodeInfo
    state: Text
    why: Text = ""


class Members(msgspec.Struct, frozen=True):
    """All nodes that a node knows, itself among them."""

    cluster: Text
    members: Annotated[tuple[Member, ...], Meta(max_length=4096)]


class PipeRequest(msgspec.Struct, frozen=True):
    """Run this pipe."""

    id: Name
    """Of this run, chosen by who submits, so that asking twice runs it once."""
    spec: PipeSpec
    """The declared graph, without code."""
    shipment: Shipment = Shipment()
    """The node must hold its contents already (put_code)."""
    client: Annotated[str, Meta(pattern=f"^({NODE_ID})?$")] = ""
    """The submitting process, when it emits or reads results."""
    job: Origin = ""
    """The submitted script that it belongs to: the pipe ends with it."""


class PipeInfo(msgspec.Struct, frozen=True):
    """A pipe as this node knows it."""

    pipe: Name
    """Its id."""
    name: Text
    epoch: Epoch
    coordinator: Text
    told: TellClient
    seats: dict[str, tuple[str, ...]] = {}
    """Node id per worker, by processor."""
    members: tuple[str, ...] = ()
    closed: bool = False
    """It has ended and nothing of it is left on any node that lives: who keeps its record may forget it."""


class Pipes(msgspec.Struct, frozen=True):
    """Every pipe that a node knows."""

    pipes: tuple[PipeInfo, ...]


class Deal(msgspec.Struct, frozen=True):
    """What agents say to each other about a pipe's record."""

    message: Message


class Orders(msgspec.Struct, frozen=True):
    """From a pipe's coordinator to a node: be like that. Refused when `fence` is lower than the highest one seen."""

    fence: tuple[int, int]
    plan: NodePlan | None = None
    """None: end everything of the pipe there."""
    spec: PipeSpec | None = None
    shipment: Shipment = Shipment()
    coordinator: Annotated[str, Meta(pattern=f"^({NODE_ID})?$")] = ""
    """Who says so: reports go there. Its certificate must say the same; "" in orders to the submitting process."""
    refused: tuple[tuple[str, int], ...] = ()
    """On the disk of the node that follows them: workers of the plan that it had no room for."""


class Told(msgspec.Struct, frozen=True):
    """From a node to a pipe's coordinator: this is how it is here."""

    report: NodeReport


class Attendance(msgspec.Struct, frozen=True):
    """The submitting process asks what there is for it; answered at once when there is something new."""

    client: NodeId
    fence: tuple[int, int] = (0, 0)
    """Of the orders that it follows."""
    heard: Annotated[int, Meta(ge=0, le=2**53)] = 0
    """Number of the newest answer it has."""
    report: NodeReport | None = None
    patience: Annotated[float, Meta(ge=0, le=20)] = 10.0
    """Seconds until it is answered when there is nothing new."""


class News(msgspec.Struct, frozen=True):
    """What the coordinator tells the submitting process."""

    number: int
    """Of this state of things; differs when something did."""
    told: TellClient
    orders: Orders | None = None
    """When they are newer than those it follows."""
    nodes: dict[str, tuple[str, ...]] = {}
    """Addresses (HOST:PORT) of the nodes with a part of the pipe, and of those that keep its record."""


class Stopping(msgspec.Struct, frozen=True):
    """How to end."""

    deadline: Annotated[float, Meta(ge=0, le=86_400)] = 30.0
    """Seconds until it is ended by force."""


class Stored(msgspec.Struct, frozen=True):
    """The node holds that content, and its hash was checked."""

    sha256: Sha256
    size: int


class Mirrors(msgspec.Struct, frozen=True):
    """Every mirror that ends on this node."""

    mirrors: tuple[MirrorInfo, ...]


class MirrorInfo(msgspec.Struct, frozen=True):
    """Where one mirror stands, in ring positions."""

    mirror: Text
    """Pipe and queue, and the node of its sink copy."""
    role: Text
    """"source" or "sink": the end on this node."""
    epoch: Epoch
    peer: Text
    """Node of the other end."""
    head: int
    """Everything before it is in the queue."""
    received: int
    """Everything before it is in the sink copy too."""
    finished: int
    """Everything before it is finished, and so is what came of it, as the source copy knows."""
    lag_seconds: float = 0.0
    """Age of the oldest frame that the sink copy has not; a sink does not know, and says 0."""
    state: Text = "open"
    """"open", "cut" (no connection now), "ended" or "failed", with the reason."""


class JobRequest(msgspec.Struct, frozen=True):
    """Run this script on a node."""

    name: Name
    arguments: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=1024)]
    """The script, relative to the working directory, and what follows it."""
    working_directory: Sha256
    """Content hash of its archive."""
    environment: Annotated[dict[str, Text], Meta(max_length=256)] = {}
    id: Annotated[str, Meta(pattern=f"^({NAME})?$")] = ""
    """Chosen by who submits, so that asking twice runs it once; "" lets the node choose."""


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
