"""Finding an agent of this user's cluster, from a process that is none.

    "HOST:PORT"    that one
    "auto"         $UPIPE_CLUSTER, where it is set (in a submitted script it names the agent that runs it); else the
                   agent of this host, by its Unix socket, then at 127.0.0.1; else whoever answers multicast DNS

Each candidate must prove itself in the TLS handshake (or lie in a directory of this user's) before the token is sent to
it. An advertisement proves nothing: those with this cluster's fingerprint are only asked first. All who are heard are
asked beside each other while the listening goes on, so those that lie or keep silent cost time only to themselves.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

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
BROWSE = 3.0
"""Seconds to listen for advertisements. Longer finds an agent in a slow network, and makes the failure slower."""
ASK = 6.0
"""Seconds that a candidate has to answer: a busy host takes some for a handshake."""
ASKED, MOST = 16, 64
"""Advertised addresses that are asked at a time, and in all: more are a flood."""
SEARCH = 10.0
"""Seconds for all who are advertised, from the first listening."""
TOLD = 8
"""Failures that are told one by one, the first ones."""


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


Browse = Callable[[Callable[[Hint], None]], Awaitable[None]]
"""Calls what it is given with each advertisement, until it returns."""


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
        OptionInvalid: `where` is no address. NoAgent: names what was tried and what came of it.
    """
    secret = token.load()
    search = _Search(secret, tls.client(secret, secrets.token_hex(8), own or tls.named(os.environ)), cluster)
    variable = os.environ.get(CLUSTER_VARIABLE, "")
    named = where if where != "auto" else "" if variable in ("auto", LOCAL) else variable
    if named:
        address = parse(named)
        told = "" if where != "auto" else f"${CLUSTER_VARIABLE}={named}"
        found = await search.ask(told, Target(address.host, address.port))
    else:
        found = await search.here() or await search.advertised(browse or browsed)
    if found is None:
        start = "Start one with `upipe-node`, or name one: HOST:PORT"
        raise search.failure("Is that the right address?" if named else start)
    return found


class _Search:
    """Asks candidates, and remembers what came of it."""

    def __init__(self, secret: Secret, credentials: tls.Credentials, cluster: str) -> None:
        self.tried: list[str] = []
        self._secret = secret
        self._credentials = credentials
        self._cluster = cluster
        self._silent = True

    async def ask(self, told: str, target: Target) -> Reached | None:
        """None: that is no agent for us."""
        try:
            async with Client(target, self._secret, self._credentials) as client:
                return await _asked(client, target, self._secret, self._credentials, self._cluster)
        except ClusterError as error:
            self._silent = self._silent and isinstance(error, NodeUnreachable | NodeTimeout)
            self.tried.append(f"{told}: {error}" if told else str(error))
            return None

    async def here(self) -> Reached | None:
        """The agent of this host."""
        own, found = default_data_dir() / SOCKET, None
        if own.exists():
            found = await self.ask("the agent of this host", Target(unix=own))
        else:
            self.tried.append(f"the agent of this host: there is no {own}")
        return found or await self.ask("this host", Target("127.0.0.1", DEFAULT_PORT))

    async def advertised(self, browse: Browse) -> Reached | None:
        """Whoever is advertised and proves itself first."""
        waiting: asyncio.PriorityQueue[tuple[bool, int, Target]] = asyncio.PriorityQueue()
        heard: set[Target] = set()
        winner: asyncio.Future[Reached] = asyncio.get_running_loop().create_future()

        def hear(hint: Hint) -> None:
            for target in (Target(one.host, one.port) for one in hint.addresses):
                if target not in heard and len(heard) < MOST:
                    heard.add(target)
                    waiting.put_nowait((hint.fingerprint != self._secret.fingerprint, len(heard), target))

        async def ask() -> None:
            while True:
                found = await self.ask("by multicast DNS", (await waiting.get())[2])
                if found is not None and not winner.done():
                    winner.set_result(found)
                waiting.task_done()

        async def search() -> None:
            await browse(hear)
            await waiting.join()

        tasks = [asyncio.create_task(one) for one in (search(), *(ask() for _ in range(ASKED)))]
        try:
            # Each ends for one of three reasons only: somebody was found, all were asked, or it broke.
            waited: list[asyncio.Future[Any]] = [winner, *tasks]
            await asyncio.wait(waited, timeout=SEARCH, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not heard:
            self.tried.append(f"multicast DNS: nobody answered within {BROWSE:g} s")
        return winner.result() if winner.done() else None

    def failure(self, todo: str) -> NoAgent:
        """What was tried, and what to do; what answered, and is none of ours, says that itself."""
        more = [f"and {len(self.tried) - TOLD} more"] if len(self.tried) > TOLD else []
        told = "; ".join([*self.tried[:TOLD], *more])
        if self._silent:
            told += f" {todo}" if told.endswith("?") else f". {todo}"
        return NoAgent(f"no agent of this cluster ({self._secret.fingerprint}) answers. Tried: {told}")


async def browsed(hear: Callable[[Hint], None]) -> None:
    """Listen for BROWSE seconds to the agents that advertise themselves in the local networks."""
    multicast = Multicast(hear)
    try:
        nobody = NodeInfo("0" * 16, "", (), 1, 0)
        if await multicast.start(nobody, advertise=False) is None:
            await asyncio.sleep(BROWSE)
    finally:
        await multicast.close()


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
