"""Asking other agents: a pool of clients by node and address, each of which proves the node before it is told anything.

Owned by the agent; nothing is left when it dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from upipe.cluster import tls
from upipe.cluster.address import Address
from upipe.cluster.client import Client, Target
from upipe.cluster.routes import MIRROR, Bytes, Route
from upipe.cluster.token import Secret
from upipe.errors import NodeTimeout, NodeUnproven, NodeUnreachable

Q = TypeVar("Q")
A = TypeVar("A")

MOST_ADDRESSES = 4
"""Of one node that are tried for one request: the likeliest ones."""


class Peers:
    """All clients of one agent.

    Args:
        me: node id of this agent.
        secret: of the cluster.
        credentials: of this node; see renew().
        addresses: where a node is, the likeliest first; () when it is not known.
    """

    def __init__(
        self, me: str, secret: Secret, credentials: tls.Credentials, addresses: Callable[[str], tuple[Address, ...]]
    ) -> None:
        self.me = me
        self.credentials = credentials
        self._secret = secret
        self._addresses = addresses
        self._clients: dict[tuple[str, Address], Client] = {}
        self._closed = False

    def _client(self, node: str, address: Address) -> Client:
        if self._closed:
            raise NodeUnreachable("this agent is stopping")
        key = (node, address)
        if key not in self._clients:
            expected = node if self.credentials.derived else ""
            self._clients[key] = Client(Target(address.host, address.port, expected), self._secret, self.credentials)
        return self._clients[key]

    @asynccontextmanager
    async def stranger(self, address: Address) -> AsyncIterator[Client]:
        """A client of whoever of the cluster is there, for once."""
        async with Client(Target(address.host, address.port), self._secret, self.credentials) as client:
            yield client

    async def call(
        self, node: str, route: Route[Q, A], body: Q | None = None, *, seconds: float | None = None,
        addresses: tuple[Address, ...] = (), **parameters: str,
    ) -> A:  # fmt: skip
        """Ask a node, at one of its addresses after the other.

        Args:
            seconds: for all of them together; default the route's.
            addresses: instead of those that are known.

        Raises:
            As Client.call; NodeUnreachable too when the node is not known.
        """

        async def ask(client: Client, share: float) -> A:
            return await client.call(route, body, seconds=share, attempts=1, **parameters)

        return await self._at(node, addresses, route.seconds if seconds is None else seconds, ask)

    async def _at(
        self, node: str, addresses: tuple[Address, ...], seconds: float, ask: Callable[[Client, float], Awaitable[A]]
    ) -> A:
        known = (addresses or self._addresses(node))[:MOST_ADDRESSES]
        if not known:
            raise NodeUnreachable(f"node {node} is not known here: it has left, or has not been met yet")
        for number, address in enumerate(known, 1):
            try:
                return await ask(self._client(node, address), seconds / len(known))
            except (NodeUnreachable, NodeTimeout, NodeUnproven):
                if number == len(known):
                    raise
        raise AssertionError("unreachable")

    async def content(self, node: str, route: Route[None, Bytes], **parameters: str) -> AsyncIterator[bytes]:
        """Get bytes as they come, from the node's likeliest address; as Client.stream."""
        known = self._addresses(node)
        if not known:
            raise NodeUnreachable(f"node {node} is not known here: it has left, or has not been met yet")
        async for piece in self._client(node, known[0]).stream(route, **parameters):
            yield piece

    async def line(self, node: str, protocol: asyncio.BaseProtocol) -> None:
        """Open a connection for mirrors to a node, and give it to `protocol`."""

        async def ask(client: Client, share: float) -> None:
            await client.upgrade(MIRROR, protocol, seconds=share, mirror=self.me)

        await self._at(node, (), 10.0, ask)

    def renew(self, credentials: tls.Credentials) -> None:
        """Show another certificate from the next connection on."""
        self.credentials = credentials
        for client in self._clients.values():
            client.renew(credentials)

    async def forget(self, node: str) -> None:
        """Close the connections to a node, and with them what still waits there."""
        gone = [key for key in self._clients if key[0] == node]
        for client in [self._clients.pop(key) for key in gone]:
            await client.close()

    async def close(self) -> None:
        """Close everything; nobody is asked any more. Idempotent."""
        self._closed = True
        while self._clients:
            _, client = self._clients.popitem()
            await client.close()
