"""Asking one agent, or all of them: what only some nodes know (a job, the books of a pipe, output) is asked of all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from upipe.cli.extra import Asked
from upipe.errors import ClusterError, NodeRefused, NodeUnreachable

if TYPE_CHECKING:
    from upipe.cluster.client import Client
    from upipe.cluster.peers import Peers
    from upipe.cluster.reach import Reached

T = TypeVar("T")
SECONDS = 5.0
"""That a node has to answer. Longer shows more of slow clusters, and waits longer for nodes that are cut off."""


async def reached(to: Asked, cluster: str = "") -> Reached:
    """The agent that is asked first."""
    from upipe.cluster.reach import reach

    return await reach(to.where, cluster=cluster, own=to.own)


async def client(to: Asked, cluster: str = "") -> Client:
    """To that agent. Close it."""
    return (await reached(to, cluster)).client()


@asynccontextmanager
async def peers(found: Reached) -> AsyncIterator[Peers]:
    """To all nodes that it knows."""
    from upipe.cluster.peers import Peers

    known, me = found.addresses, found.credentials.identity.id
    made = Peers(me, found.secret, found.credentials, lambda node: known.get(node, ()))
    try:
        yield made
    finally:
        await made.close()


async def client_of(found: Reached, node: str) -> Client:
    """To one of the nodes that it knows, at the first of its addresses that answers. Close it.

    Raises:
        ClusterError: none does.
    """
    from upipe.cluster.client import Client, Target
    from upipe.cluster.routes import NODE

    failure: ClusterError = NodeUnreachable(f"node {node} is not known to {found.target}")
    for address in found.addresses.get(node, ()):
        target = Target(address.host, address.port, node if found.credentials.derived else "")
        made = Client(target, found.secret, found.credentials)
        try:
            await made.call(NODE, seconds=SECONDS, attempts=1)
            return made
        except ClusterError as error:
            failure = error
        await made.close()
    raise failure


async def everywhere(
    nodes: Iterable[str], ask: Callable[[str], Awaitable[T]]
) -> tuple[dict[str, T], dict[str, ClusterError]]:
    """Ask all of them at the same time; what they answered, and why some did not, by node."""

    async def one(node: str) -> T | ClusterError:
        try:
            return await ask(node)
        except ClusterError as error:
            return error

    asked = list(nodes)
    told = dict(zip(asked, await asyncio.gather(*map(one, asked)), strict=True))
    failed = {node: answer for node, answer in told.items() if isinstance(answer, ClusterError)}
    return {node: answer for node, answer in told.items() if not isinstance(answer, ClusterError)}, failed


def silent(failed: Mapping[str, ClusterError]) -> list[str]:
    """A sentence for each node that did not answer; one that refused has answered."""
    return [f"node {node} does not answer: {error}" for node, error in failed.items() if _silent(error)]


def _silent(error: ClusterError) -> bool:
    return not (isinstance(error, NodeRefused) and error.status == 404)
