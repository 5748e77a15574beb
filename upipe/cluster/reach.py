"""Finding an agent of this user's cluster, from a process that is none.

    "HOST:PORT"    that one
    "auto"         $UPIPE_CLUSTER, where it is set (in a submitted script it names the agent that runs it); else the
                   agent of this host, by its Unix socket, then at 127.0.0.1; else whoever answers multicast DNS

Each candidate must prove itself in the TLS handshake (or lie in a directory of this user's) before the token is sent to
it. An advertisement proves nothing: those with this cluster's fingerprint are only asked first.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

from upipe import __version__
from upipe.cluster import tls, token
from upipe.cluster.address import DEFAULT_PORT, Address, parse
from upipe.cluster.client import Client, Target
from upipe.cluster.discovery import Multicast
from upipe.cluster.member_events import Hint
from upipe.cluster.messages import PROTOCOL, NodeInfo
from upipe.cluster.node_id import default_data_dir
from upipe.cluster.routes import MEMBERS, NODE
from upipe.cluster.token import Secret
from upipe.errors import ClusterError, NoAgent, NodeTimeout, NodeUnreachable
from upipe.memq.layout import LAYOUT_VERSION
from upipe.pipe import CLUSTER_VARIABLE, LOCAL
from upipe.settings import Certificates

SOCKET = "node.sock"
"""Of an agent, in its data directory."""
BROWSE = 2.0
"""Seconds to listen for advertisements. Longer finds an agent in a slow network, and makes the failure slower."""
ASK = 3.0
"""Seconds that a candidate has to answer."""


@dataclass(frozen=True)
class Reached:
    """An agent that has proven itself, and those it knows."""

    node: str
    """Its id."""
    info: NodeInfo
    target: Target
    """Where it was found."""
    secret: Secret
    credentials: tls.Credentials
    """Of this process, as a client of the cluster."""
    addresses: dict[str, tuple[Address, ...]]
    """Of the members in use, by id, the likeliest first; without those it was not asked for."""

    def client(self) -> Client:
        """To the agent itself. Close it."""
        return Client(self.target, self.secret, self.credentials)


Browse = Callable[[], Awaitable[list[Hint]]]


async def reach(
    where: str = "auto", *, cluster: str = "", own: Certificates | None = None, browse: Browse | None = None
) -> Reached:
    """Find an agent.

    Args:
        where: "auto" or HOST:PORT.
        cluster: name that its cluster must have; "": any.
        own: certificates of one's own; None: as $UPIPE_CA, $UPIPE_CERTIFICATE and $UPIPE_KEY say, else derived ones.
        browse: listens for advertisements; for tests.

    Raises:
        TokenError: there is no token to ask with. CertificateError: one's own cannot be used.
        OptionInvalid: `where` is no address. NoAgent: names everything that was tried and what came of it.
    """
    secret = token.load()
    credentials = tls.client(secret, secrets.token_hex(8), own or tls.named(os.environ))
    tried: list[str] = []
    silent = True
    async for told, target in _candidates(where, secret, browse or browsed, tried):
        try:
            async with Client(target, secret, credentials) as client:
                return await _asked(client, target, secret, credentials, cluster)
        except ClusterError as error:
            silent = silent and isinstance(error, NodeUnreachable | NodeTimeout)
            tried.append(f"{told}: {error}" if told else str(error))
    told = "; ".join(tried)
    todo = ""  # what answered, and is none of ours, says itself what to do
    if silent:
        named = where != "auto" or os.environ.get(CLUSTER_VARIABLE, "auto") not in ("auto", LOCAL)
        todo = "Is that the right address?" if named else "Start one with `upipe-node`, or name one: HOST:PORT"
        todo = f" {todo}" if told.endswith("?") else f". {todo}"
    raise NoAgent(f"no agent of this cluster ({secret.fingerprint}) answers. Tried: {told}{todo}")


async def _candidates(
    where: str, secret: Secret, browse: Browse, tried: list[str]
) -> AsyncIterator[tuple[str, Target]]:
    told = os.environ.get(CLUSTER_VARIABLE, "")
    named = where if where != "auto" else "" if told in ("auto", LOCAL) else told
    if named:
        address = parse(named)
        yield "" if where != "auto" else f"${CLUSTER_VARIABLE}={named}", Target(address.host, address.port)
        return
    own = default_data_dir() / SOCKET
    if own.exists():
        yield "the agent of this host", Target(unix=own)
    else:
        tried.append(f"the agent of this host: there is no {own}")
    yield "this host", Target("127.0.0.1", DEFAULT_PORT)
    found = await browse()
    for hint in sorted(found, key=lambda one: one.fingerprint != secret.fingerprint):
        for address in hint.addresses:
            yield "by multicast DNS", Target(address.host, address.port)
    if not found:
        tried.append(f"multicast DNS: nobody answered within {BROWSE:g} s")


async def browsed() -> list[Hint]:
    """The agents that advertise themselves in the local networks, after BROWSE seconds at most."""
    found: dict[str, Hint] = {}
    first = asyncio.Event()

    def heard(hint: Hint) -> None:
        found[hint.node_id] = hint
        first.set()

    multicast = Multicast(heard)
    try:
        nobody = NodeInfo("0" * 16, "", (), 1, 0)
        if await multicast.start(nobody, advertise=False) is not None:
            return []
        async with asyncio.timeout(BROWSE):
            await first.wait()
            await asyncio.sleep(0.2)  # others that answer as fast
    except TimeoutError:
        pass  # those that were heard are all there are
    finally:
        await multicast.close()
    return list(found.values())


async def _asked(
    client: Client, target: Target, secret: Secret, credentials: tls.Credentials, cluster: str
) -> Reached:
    status = await client.call(NODE, seconds=ASK)
    info = status.info
    if cluster and info.cluster != cluster:
        raise NoAgent(
            f"{target} is of the cluster {info.cluster!r}, and {cluster!r} was asked for: name a node of that one, or "
            "leave out --cluster"
        )
    if (info.protocol, info.layout) != (PROTOCOL, LAYOUT_VERSION):
        raise NoAgent(
            f"{target} runs uPipe {info.version} (protocol {info.protocol}, layout {info.layout}), and this process is "
            f"{__version__} (protocol {PROTOCOL}, layout {LAYOUT_VERSION}): install the same version on both"
        )
    members = await client.call(MEMBERS, seconds=ASK)
    addresses = {one.info.node_id: one.info.addresses for one in members.members if one.state in ("alive", "suspect")}
    here = () if target.unix is not None else (Address(target.host, target.port),)
    addresses[info.node_id] = tuple(dict.fromkeys((*here, *info.addresses)))
    known = target if target.unix is not None or not credentials.derived else replace(target, node=info.node_id)
    return Reached(info.node_id, info, known, secret, credentials, addresses)
