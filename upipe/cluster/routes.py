"""THE table of everything a node answers over HTTP. Server, client, guard, OpenAPI and tests come from it.

A route that is not here does not exist, and one that is here is closed: token, host and origin are checked before the
table is looked at (guard.py), so a new line here needs no thought of that. GET and HEAD change nothing; the table
refuses one that says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from upipe.cluster import messages, wire
from upipe.settings import KIB, MIB

Request = TypeVar("Request")
Answer = TypeVar("Answer")

PARAMETERS: dict[str, str] = {
    "sha256": wire.SHA256,
    "pipe": wire.NAME,
    "mirror": "[A-Za-z0-9][A-Za-z0-9._@:-]{0,199}",
    "job": wire.NAME,
    "node": wire.NODE_ID,
}
"""What may stand for each {name} in a path. Nothing is percent-decoded: no name needs it."""
_SAFE = frozenset({"GET", "HEAD"})


class Bytes:
    """Stands for a body of plain bytes in the table."""


@dataclass(frozen=True)
class Route(Generic[Request, Answer]):
    """One method of one path.

    Raises:
        ValueError: it contradicts itself.
    """

    method: Literal["GET", "HEAD", "PUT", "POST", "DELETE"]
    path: str
    name: str
    """Of its handler."""
    request: type[Request]
    """Struct of the body; NoneType: no body; Bytes: plain bytes, which the handler reads as they come."""
    answer: type[Answer]
    """Struct of the answer; Bytes: the handler writes them as they come."""
    doc: str
    changes: bool = False
    """Whether it changes anything. Such a request is written to the audit log, but see quiet."""
    quiet: bool = False
    """Said by nodes to each other many times a second: only refusals of it are written to the audit log, or they would
    push everything else out of it."""
    again: bool = True
    """Whether sending it twice does what sending it once does: then a client may try again by itself."""
    node_only: bool = False
    """Open only to who shows a node's certificate."""
    upgrade: str = ""
    """Protocol to which the connection may be upgraded."""
    most: int = 64 * KIB
    """Bytes of a body."""
    most_answer: int = 16 * MIB
    """Bytes of an answer that a client takes."""
    seconds: float = 10.0
    """Deadline of a client, and of the server for reading the body; of streams, between two pieces."""
    media: str = "application/json"
    """Content type of an answer."""
    status: int = 200

    def __post_init__(self) -> None:
        if self.method in _SAFE and (self.changes or self.request is not type(None) or not self.again):
            raise ValueError(f"{self.method} {self.path} must change nothing and carry nothing")
        if unknown := set(self.names) - set(PARAMETERS):
            raise ValueError(f"{self.path} has parameters without a pattern: {unknown}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Parameters in the path, in order."""
        return tuple(re.findall(r"\{(\w+)\}", self.path))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What the path of a request must match as a whole."""
        pieces = re.split(r"\{(\w+)\}", self.path)
        texts = (f"(?P<{one}>{PARAMETERS[one]})" if number % 2 else re.escape(one) for number, one in enumerate(pieces))
        return re.compile("".join(texts))

    def fill(self, parameters: dict[str, str]) -> str:
        """The path with its parameters.

        Raises:
            ValueError: one is missing, or cannot stand there.
        """
        path = self.path.format_map(parameters)
        if not self.pattern.fullmatch(path):
            raise ValueError(f"{path} is no path of the route {self.name}")
        return path


NOTHING = type(None)

# ---- this node, and what it knows of the others
NODE = Route("GET", "/v1/node", "node", NOTHING, wire.NodeStatus, "What this node is, has and runs.")
DRAIN_NODE = Route(
    "POST",
    "/v1/node/drain",
    "drain_node",
    wire.Stopping,
    wire.Done,
    "Move everything elsewhere and take nothing new.",
    changes=True,
)
MEMBERS = Route("GET", "/v1/members", "members", NOTHING, wire.Members, "The nodes that this node knows.")
JOIN = Route(
    "POST",
    "/v1/members/join",
    "join",
    messages.Join,
    messages.Accepted,
    "Take a node into the cluster.",
    changes=True,
    node_only=True,
    most_answer=MIB,
)
PING = Route(
    "POST",
    "/v1/members/ping",
    "ping",
    messages.Gossip,
    messages.Gossip,
    "Are you there, and what is new?",
    changes=True,
    quiet=True,
    node_only=True,
    most=MIB,
    most_answer=MIB,
    seconds=2.0,
)
RELAY = Route(
    "POST",
    "/v1/members/relay",
    "relay",
    messages.Relay,
    messages.Gossip,
    "Ping that one for me.",
    changes=True,
    quiet=True,
    node_only=True,
    most=MIB,
    most_answer=MIB,
    seconds=2.0,
)
LEAVE = Route(
    "POST",
    "/v1/members/leave",
    "leave",
    messages.Leave,
    wire.Done,
    "A node goes, properly.",
    changes=True,
    node_only=True,
)

# ---- pipes
PIPES = Route("GET", "/v1/pipes", "pipes", NOTHING, wire.Pipes, "The pipes that this node knows.")
SUBMIT = Route(
    "POST",
    "/v1/pipes",
    "submit",
    wire.PipeRequest,
    wire.PipeInfo,
    "Run a pipe; this node coordinates it.",
    changes=True,
    most=4 * MIB,
    seconds=60.0,
    status=201,
)
PIPE = Route("GET", "/v1/pipes/{pipe}", "pipe", NOTHING, wire.PipeInfo, "One pipe: state, placement, books.")
STOP = Route(
    "POST", "/v1/pipes/{pipe}/stop", "stop", wire.Stopping, wire.PipeInfo, "End a pipe now.", changes=True, seconds=60.0
)
DRAIN = Route(
    "POST",
    "/v1/pipes/{pipe}/drain",
    "drain",
    wire.Stopping,
    wire.PipeInfo,
    "End a pipe once everything in it is finished.",
    changes=True,
    seconds=60.0,
)
DEAL = Route(
    "POST",
    "/v1/pipes/{pipe}/deal",
    "deal",
    wire.Deal,
    wire.Done,
    "What agents say to each other about a pipe's record.",
    changes=True,
    quiet=True,
    node_only=True,
    most=8 * MIB,
)
ORDERS = Route(
    "POST",
    "/v1/pipes/{pipe}/orders",
    "orders",
    wire.Orders,
    wire.Done,
    "What this node shall do for a pipe, from its coordinator.",
    changes=True,
    quiet=True,
    node_only=True,
    most=8 * MIB,
)
REPORT = Route(
    "POST",
    "/v1/pipes/{pipe}/report",
    "report",
    wire.Told,
    wire.Done,
    "How a pipe is on a node, told to its coordinator.",
    changes=True,
    quiet=True,
    node_only=True,
    most=8 * MIB,
)
ATTEND = Route(
    "POST",
    "/v1/pipes/{pipe}/attend",
    "attend",
    wire.Attendance,
    wire.News,
    "The submitting process asks what there is for it.",
    changes=True,
    quiet=True,
    most=8 * MIB,
    seconds=30.0,
)
LETTERS = Route(
    "GET",
    "/v1/pipes/{pipe}/letters",
    "letters",
    NOTHING,
    Bytes,
    "Dead letters that lie on this node.",
    most_answer=1024 * MIB,
    seconds=60.0,
    media="application/octet-stream",
)
OUTPUT = Route(
    "GET",
    "/v1/pipes/{pipe}/output",
    "output",
    NOTHING,
    Bytes,
    "What the workers here printed so far and print, until the pipe has left.",
    most_answer=1024 * MIB,
    seconds=3600.0,
    media="text/plain; charset=utf-8",
)

# ---- code and queues
HAS_CODE = Route("HEAD", "/v1/code/{sha256}", "has_code", NOTHING, Bytes, "Whether this node holds a content.")
CODE = Route(
    "GET",
    "/v1/code/{sha256}",
    "code",
    NOTHING,
    Bytes,
    "A content.",
    most_answer=1024 * MIB,
    seconds=60.0,
    media="application/octet-stream",
)
PUT_CODE = Route(
    "PUT",
    "/v1/code/{sha256}",
    "put_code",
    Bytes,
    wire.Stored,
    "Hold a content; refused when its hash is another.",
    changes=True,
    most=1024 * MIB,
    seconds=60.0,
    status=201,
)
MIRRORS = Route("GET", "/v1/mirrors", "mirrors", NOTHING, wire.Mirrors, "The mirrors that end on this node.")
MIRROR = Route(
    "GET",
    "/v1/mirrors/{mirror}",
    "mirror",
    NOTHING,
    wire.MirrorInfo,
    "Where a mirror stands; with `Upgrade: upipe-mirror/1` and a certificate a connection for mirrors, and {mirror} is "
    "the id of who dials.",
    upgrade="upipe-mirror/1",
)

# ---- jobs
JOBS = Route("GET", "/v1/jobs", "jobs", NOTHING, wire.Jobs, "The jobs that this node knows.")
RUN_JOB = Route(
    "POST",
    "/v1/jobs",
    "run_job",
    wire.JobRequest,
    wire.JobInfo,
    "Run a script.",
    changes=True,
    most=MIB,
    seconds=60.0,
    status=201,
)
JOB = Route("GET", "/v1/jobs/{job}", "job", NOTHING, wire.JobInfo, "One job.")
LOGS = Route(
    "GET",
    "/v1/jobs/{job}/logs",
    "logs",
    NOTHING,
    Bytes,
    "What a job printed so far and prints, until it ends.",
    most_answer=1024 * MIB,
    seconds=3600.0,
    media="text/plain; charset=utf-8",
)
STOP_JOB = Route(
    "POST", "/v1/jobs/{job}/stop", "stop_job", wire.Stopping, wire.JobInfo, "End a job.", changes=True, seconds=60.0
)

# ---- for tools
METRICS = Route(
    "GET",
    "/v1/metrics",
    "metrics",
    NOTHING,
    Bytes,
    "Counters, as Prometheus reads them.",
    media="text/plain; version=0.0.4; charset=utf-8",
)
OPENAPI = Route(
    "GET", "/v1/openapi.json", "openapi", NOTHING, Bytes, "This table, as OpenAPI.", media="application/json"
)

ROUTES: tuple[Route[Any, Any], ...] = tuple(one for one in list(globals().values()) if isinstance(one, Route))
"""All of them, in the order above."""


@dataclass(frozen=True)
class Match:
    """A route was found."""

    route: Route[Any, Any]
    parameters: dict[str, str]


@dataclass(frozen=True)
class NoMatch:
    """None was; `allowed` has the methods that the path knows, empty when there is no such path."""

    allowed: tuple[str, ...] = ()


def match(method: str, path: str, routes: Iterable[Route[Any, Any]] = ROUTES) -> Match | NoMatch:
    """Find the route of a request, by its undecoded path without the query."""
    allowed = []
    for route in routes:
        if found := route.pattern.fullmatch(path):
            if route.method == method:
                return Match(route, found.groupdict())
            allowed.append(route.method)
    return NoMatch(tuple(allowed))
