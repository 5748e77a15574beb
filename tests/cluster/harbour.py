"""Nodes in one process, each with a ferry, joined by real connections: what agents and keepers do around ferries."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from queue import Empty
from typing import Any

from tests.cluster.linking import dial
from tests.cluster.proxy import Proxy
from upipe import MemQ
from upipe.cluster.dealings import QueueState
from upipe.cluster.ferry import Ferry
from upipe.cluster.lanes import Layout, relay
from upipe.cluster.layout import HOLD, NodePlan, node_plan, rewire
from upipe.cluster.lines import Lines
from upipe.cluster.link import Link
from upipe.cluster.placement import Placement
from upipe.errors import ClusterError
from upipe.graph.spec import PipeSpec


class Node:
    """A node with its part of one pipe. Its workers are whoever calls put() and get()."""

    def __init__(self, name: str, harbour: Harbour) -> None:
        self.name = name
        self.harbour = harbour
        self.plan: NodePlan | None = None
        self.queues: dict[str, MemQ] = {}
        self.writers: dict[str, MemQ] = {}
        self.news = 0
        self.told: list[str] = []
        self.links: list[Link] = []
        """Accepted."""
        self.doors: dict[str, _Door] = {}
        self.lines = Lines(name, self._dial, self.told.append)
        self.ferry = Ferry(name, "run", self.lines, self._changed)

    def _changed(self) -> None:
        self.news += 1

    async def listen(self, peers: list[str]) -> None:
        """Accept at a door for each peer: so it is known who comes, as the guard knows it."""
        for peer in peers:
            door = _Door(self, peer)
            await door.open(self.harbour.tls[0])
            self.doors[peer] = door

    async def _dial(self, peer: str, link: Link) -> None:
        far = self.harbour.nodes.get(peer)
        if far is None:
            raise ClusterError(f"node {peer} does not answer")
        self.harbour.dialled.append((self.name, peer))
        await dial(far.doors[self.name].proxy.port, link, self.harbour.tls[1])

    # ------------------------------------------------------------ the keeper

    def follow(self, plan: NodePlan | None) -> None:
        self.ferry.release(plan)
        self.keep(plan)
        if plan is not None:
            self.ferry.follow(plan, {name: q.name for name, q in self.queues.items()})

    def keep(self, plan: NodePlan | None) -> None:
        steps = rewire(self.plan, plan)
        old = {mirror.queue: mirror for mirror in self.plan.mirrors} if self.plan else {}
        new = {mirror.queue: mirror for mirror in plan.mirrors} if plan else {}
        here = {queue.plan.name: queue for queue in plan.queues} if plan else {}
        for step in steps:
            name = step.name
            if step.what == "promote":
                self.queues[name].never_end()
                self.queues[name].close_producer(0)
            elif step.what == "make":
                self._make(name, here[name].role)
            elif step.what == "discard":
                self.queues[name].set_policy(3)
            elif step.what == "end":
                self.queues[name].close_producer(HOLD)
            elif step.what == "drop":
                self._drop(name)
        for name, mirror in new.items():
            if mirror.sink == self.name and name in old and old[name] != mirror:
                self._drop(name)
                self._make(name, "sink")
        self.plan = plan

    def _make(self, name: str, role: str) -> None:
        q = self.queues[name] = MemQ(self.harbour.size, supervised=True)
        if role == "home":
            q.never_end()
        else:
            q.declare_producer(0)

    def _drop(self, name: str) -> None:
        for table in (self.writers, self.queues):
            q = table.pop(name, None)
            if q is not None:
                q.close()
                q.unlink()

    # ------------------------------------------------------------ the workers

    def queue(self, stream: str, role: str = "") -> str:
        """Name of the only queue here of a stream."""
        assert self.plan is not None
        (name,) = [
            one.plan.name
            for one in self.plan.queues
            if one.plan.name.startswith(stream) and role in ("", one.role)
        ]
        return name

    def writer(self, stream: str) -> MemQ:
        name = self.queue(stream, "home")
        if name not in self.writers:
            self.writers[name] = MemQ.attach(self.queues[name].name)
            self.writers[name].use_producer(0)
        return self.writers[name]

    def reader(self, stream: str) -> MemQ:
        return self.queues[self.queue(stream)]

    async def work(self, source: str, target: str, count: int) -> None:
        """A worker: takes, emits, finishes."""
        reader, writer = self.reader(source), self.writer(target)
        for _ in range(count):
            await writer.aput(await self.take(reader))
            reader.finish()

    @staticmethod
    async def take(q: MemQ) -> Any:
        while True:
            with contextlib.suppress(Empty):
                return q.take(False)
            await asyncio.sleep(0)

    def state(self, stream: str) -> QueueState:
        return self.ferry.states()[self.queue(stream)]

    def close(self) -> None:
        self.ferry.close()
        self.lines.close()
        for name in list(self.queues):
            self._drop(name)

    async def stop(self) -> None:
        self.close()
        for door in self.doors.values():
            await door.close()


class _Door:
    """Where one peer comes in, through a proxy that can lose its connections."""

    def __init__(self, node: Node, peer: str) -> None:
        self._node = node
        self._peer = peer

    async def open(self, tls: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: _Accepted(self), "127.0.0.1", 0, ssl=tls)
        self.proxy = await Proxy("127.0.0.1", self.server.sockets[0].getsockname()[1]).__aenter__()

    def came(self, link: Link) -> None:
        self._node.links.append(link)
        self._node.lines.accepted(self._peer, link)

    async def close(self) -> None:
        self.server.close()
        await self.proxy.__aexit__()


class _Accepted(Link):
    def __init__(self, door: _Door) -> None:
        super().__init__()
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._door.came(self)


class Harbour:
    """All nodes, and the layout that they follow."""

    def __init__(self, spec: PipeSpec, layout: Layout, size: int, tls: tuple[ssl.SSLContext | None, ...]) -> None:
        self.spec = spec
        self.layout = layout
        self.size = size
        self.tls = tls
        self.nodes: dict[str, Node] = {}
        self.dialled: list[tuple[str, str]] = []
        self.revision = 0
        self.ends: frozenset[str] = frozenset()

    def plans(self) -> dict[str, NodePlan]:
        self.revision += 1
        fence = (1, self.revision)
        return {node: node_plan(self.spec, self.layout, node, fence, ends=self.ends) for node in self.layout.nodes()}

    def follow(self) -> None:
        """Every node learns its plan of now."""
        plans = self.plans()
        for name, node in self.nodes.items():
            node.follow(plans.get(name))

    def relay(self, placement: Placement, *gone: str) -> None:
        self.layout = relay(self.spec, self.layout, placement, gone)
        self.follow()

    async def lose(self, name: str) -> None:
        """The host is gone."""
        await self.nodes.pop(name).stop()


@contextlib.asynccontextmanager
async def harbour(
    spec: PipeSpec, layout: Layout, *more: str, size: int = 1 << 16,
    tls: tuple[ssl.SSLContext | None, ssl.SSLContext | None] = (None, None),
) -> AsyncIterator[Harbour]:  # fmt: skip
    made = Harbour(spec, layout, size, tls)
    try:
        names = [*layout.nodes(), *more]
        for name in names:
            made.nodes[name] = Node(name, made)
            await made.nodes[name].listen([peer for peer in names if peer != name])
        made.follow()
        yield made
    finally:
        for node in made.nodes.values():
            await node.stop()
