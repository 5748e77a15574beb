"""The guard: may this request go in? Pure, asked for each request before anything of it is looked up, read or done.

The order matters, so that a stranger learns nothing:

    1. Host, Origin, Sec-Fetch-Site   403   a web page must not drive this node, whatever it knows
    2. the bearer token               401   the same answer for every path and method, existing or not
    3. path, then method              404, 405
    4. a node's certificate           403   on routes between nodes, and to upgrade
    5. bounds and form of the body    4xx   by its headers; what comes is counted while it is read (server.py)
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from upipe.cluster.routes import ROUTES, Bytes, Match, NoMatch, Route, match
from upipe.cluster.tls import DOMAIN, Identity

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Peer:
    """The other end of a connection, as far as the system and TLS vouch for it."""

    address: str
    """IP address, or "unix:<uid>"."""
    local: str = ""
    """Our own address of that connection; "" for a Unix socket."""
    tls: bool = False
    identity: Identity | None = None
    """What its verified certificate says; None when it showed none."""


@dataclass(frozen=True)
class Policy:
    """What this node lets in."""

    bearer: str
    node: str = ""
    hosts: frozenset[str] = frozenset()
    """Names and addresses by which this node may be called, lower case, beside loopback, its node names and the address
    at which a connection came in."""
    routes: tuple[Route[Any, Any], ...] = ROUTES

    def __repr__(self) -> str:
        return f"<Policy of node {self.node}>"


@dataclass(frozen=True)
class Refusal:
    """No."""

    status: int
    code: str
    sentence: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Allowed:
    """Yes; `upgrade` when the peer asks for the route's other protocol."""

    match: Match
    upgrade: bool = False


def decide(method: str, target: str, headers: Mapping[str, str], peer: Peer, policy: Policy) -> Allowed | Refusal:
    """May it go in?

    Args:
        method: of the request.
        target: its path with query, undecoded.
        headers: with names in lower case; a header that came twice has both values, joined by a comma.
        peer: who asks.
        policy: of this node.
    """
    path = target.partition("?")[0]
    return (
        foreign(headers, peer, policy)
        or stranger(headers.get("authorization"), policy.bearer)
        or _routed(method, path, headers, peer, policy)
    )


# ---------------------------------------------------------------------------------------------------- 1: whence


def foreign(headers: Mapping[str, str], peer: Peer, policy: Policy) -> Refusal | None:
    """Whether a web page of somewhere else sends this, through a browser that means no harm."""
    host = headers.get("host", "")
    if not _ours(host, peer, policy):
        return Refusal(
            403,
            "foreign_host",
            "This node is not called by that Host; name it with --host or --allow-host if it should be.",
        )
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"{'https' if peer.tls else 'http'}://{host.lower()}":
        return Refusal(403, "foreign_origin", "Pages of other origins may not speak to this node.")
    if headers.get("sec-fetch-site", "none").lower() not in ("none", "same-origin"):
        return Refusal(403, "foreign_site", "Pages of other sites may not speak to this node.")
    return None


def _ours(host: str, peer: Peer, policy: Policy) -> bool:
    name = host_name(host)
    if not name:
        return False
    names = (*LOOPBACK, DOMAIN, f"{policy.node}.{DOMAIN}", *policy.hosts)
    return name in names or (bool(peer.local) and _same_address(name, peer.local))


def _same_address(one: str, other: str) -> bool:
    """Rebinding needs a name, so an IP address is ours when the connection came in there."""
    try:
        return ip_address(one) == ip_address(other.partition("%")[0])
    except ValueError:
        return False


def host_name(host: str) -> str:
    """The name in a Host header, lower case, without port and brackets; "" when it is none.

    The port is not compared: a port that is forwarded (`ssh -L`) is another one on the way in.
    """
    name, colon, port = host.lower().rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host.lower(), ""
    if colon and not host.endswith("]") and not (port.isascii() and port.isdigit()):
        return ""
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    elif ":" in name:
        return ""
    return "" if set(name) & set("@/,\\ \t#?[]") else name


# ---------------------------------------------------------------------------------------------------- 2: who


def stranger(authorization: str | None, bearer: str) -> Refusal | None:
    """Whether the token is missing or wrong. One answer for all, in a time that tells nothing of the token."""
    scheme, _, shown = (authorization or "").partition(" ")
    same = hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), bearer.encode())
    if same and bearer and scheme.lower() == "bearer":
        return None  # an empty token is never one, whoever forgot to set it
    return Refusal(
        401, "unauthorized", "This needs the cluster's token: use `upipe` with the cluster's token file.",
        (("WWW-Authenticate", 'Bearer realm="upipe"'),),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- 3 to 5: what


def _routed(method: str, path: str, headers: Mapping[str, str], peer: Peer, policy: Policy) -> Allowed | Refusal:
    found = match(method, path, policy.routes)
    if isinstance(found, NoMatch):
        if not found.allowed:
            return Refusal(404, "no_such_path", "This node knows no such path; GET /v1/openapi.json has them all.")
        allow = ", ".join(found.allowed)
        return Refusal(405, "no_such_method", f"That path takes {allow}.", (("Allow", allow),))
    route, asked = found.route, headers.get("upgrade", "")
    if asked and asked != route.upgrade:
        return Refusal(400, "no_such_upgrade", "That path cannot be upgraded to that protocol.")
    if asked and "upgrade" not in {one.strip().lower() for one in headers.get("connection", "").split(",")}:
        return Refusal(400, "half_an_upgrade", "Upgrade needs Connection: Upgrade beside it.")
    if (route.node_only or asked) and not (peer.identity and peer.identity.kind in ("node", "client")):
        return Refusal(
            403, "certificate_needed", "This is between nodes: it needs a certificate of this cluster (TLS)."
        )
    if route.node_only and peer.identity and peer.identity.kind != "node":
        return Refusal(403, "node_needed", "This is between nodes, and your certificate is a client's.")
    return bounds(route, headers) or Allowed(found, bool(asked))


def bounds(route: Route[Any, Any], headers: Mapping[str, str]) -> Refusal | None:
    """Whether the body that the headers announce fits the route."""
    if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        return Refusal(415, "compressed", "Compressed bodies are not taken; send it plain.")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        return Refusal(417, "expectation", "Only Expect: 100-continue is understood.")
    length = headers.get("content-length")
    if length is not None and not (length.isascii() and length.isdigit() and len(length) < 19):
        return Refusal(400, "bad_length", "Content-Length is no number.")
    announced = int(length) if length is not None else 0
    if route.request is type(None):
        if announced or "transfer-encoding" in headers:
            return Refusal(400, "unwanted_body", f"{route.method} takes no body there.")
        return None
    if announced > route.most:
        return Refusal(413, "too_large", f"That body has {announced:,} bytes; at most {route.most:,} are taken there.")
    wanted = "application/octet-stream" if route.request is Bytes else "application/json"
    if headers.get("content-type", "").partition(";")[0].strip().lower() != wanted:
        return Refusal(415, "wrong_type", f"That path takes {wanted}.")  # also keeps simple forms of web pages out
    return None


# ---------------------------------------------------------------------------------------------------- before it listens


def exposed(host: str) -> bool:
    """Whether others than this host can reach who listens there."""
    try:
        return not ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() != "localhost"


def may_listen(host: str, port: int, token: bool, tls: bool) -> str:
    """Why a node must not listen there; "" when it may. There is no switch that opens it."""
    if not token:
        return (
            f"{host}:{port} needs a cluster token, on loopback too: make one with `upipe token create`, or copy the "
            "cluster's file"
        )
    if exposed(host) and not tls:
        return f"{host}:{port} is open to other hosts and needs TLS: give it certificates, or listen on 127.0.0.1"
    return ""
