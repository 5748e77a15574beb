"""uPipe's queue over two hosts: an edge whose mirror is kept by an agent's ferry on each host, over TLS as always.

Four processes, as on a cluster: producer and an agent on host 0, an agent and consumer on host 1. Both ends use an
ordinary MemQ. Option many: put_many and get_many over arrays.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvloop

from benchmark import hosts, roles
from benchmark.model import Work
from benchmark.peers.base import Receiver, Sender
from benchmark.peers.upipe_memq import ManyReceiver, ManySender, Memq, MemqReceiver, MemqSender
from upipe import MemQ
from upipe.cluster import copies, tls
from upipe.cluster.ferry import Ferry
from upipe.cluster.lanes import lay_out
from upipe.cluster.layout import NodePlan, node_plan
from upipe.cluster.lines import Lines
from upipe.cluster.link import Link
from upipe.cluster.placement import Placement
from upipe.cluster.token import Secret
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec

NODES = ("0" * 16, "1" * 16)
SECRET = Secret(bytes(32))
EDGE = "e0-a-b"


class Mirrored(Memq):
    """put and get over a mirrored edge."""

    def open(self, work: Work, channels: int) -> None:
        spec = PipeSpec(
            "bench", (ProcessorSpec("a", "source"), ProcessorSpec("b")), (EdgeSpec("a", "b", size=work.ring),)
        )
        layout = lay_out(spec, Placement({"a": (NODES[0],), "b": (NODES[1],)}), "")
        plans = [node_plan(spec, layout, node, (1, 1)) for node in NODES]
        named = [self._made(plan) for plan in plans]
        self.queues = [queue for made in named for queue in made.values()]
        self.ends = [next(queue for name, queue in made.items() if name.startswith(EDGE)) for made in named]
        self.ends[0].declare_producer(0)
        with hosts.inside(1):
            listener = socket.create_server((hosts.ADDRESSES[1], 0))
        self.agents = []
        for host, (plan, made) in enumerate(zip(plans, named, strict=True)):
            labels = {name: queue.name for name, queue in made.items()}
            process = roles.CONTEXT.Process(target=_agent, args=(host, plan, labels, listener), daemon=True)
            process.start()
            self.agents.append(process)
        listener.close()

    def _made(self, plan: NodePlan) -> dict[str, MemQ]:
        """The queues of a node, as its keeper makes them."""
        made = {}
        for one in plan.queues:
            queue = made[one.plan.name] = MemQ(one.plan.capacity, supervised=True)
            copies.begin(queue, one.role)
        return made

    def close(self) -> None:
        for agent in self.agents:
            agent.kill()
            agent.join()
        super().close()

    def sender(self, work: Work, channel: int = 0) -> Sender:
        queue = self.ends[0]
        queue.use_producer(0, 1)
        return ManySender(queue, work.batch, False) if self._many(work) else MemqSender(queue)

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        queue = self.ends[1]
        return ManyReceiver(queue, work.batch, False) if self._many(work) else MemqReceiver(queue)

    def _many(self, work: Work) -> bool:
        return bool(self.options.get("many")) and not work.frames


class _Accepted(Link):
    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._lines.accepted(NODES[0], self)


def _agent(host: int, plan: NodePlan, labels: dict[str, str], listener: socket.socket) -> None:
    hosts.enter(host)
    uvloop.run(_ferry(host, plan, labels, listener))


async def _ferry(host: int, plan: NodePlan, labels: dict[str, str], listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    credentials = tls.issue(SECRET, tls.Identity("node", NODES[host]), (hosts.ADDRESSES[host],))

    async def dial(peer: str, link: Link) -> None:
        context: Any = tls.client_context(credentials)
        name = credentials.expected(hosts.ADDRESSES[1], peer)
        await loop.create_connection(lambda: link, *listener.getsockname(), ssl=context, server_hostname=name)

    lines = Lines(NODES[host], dial)
    if host == 1:
        await loop.create_server(lambda: _Accepted(lines), sock=listener, ssl=tls.server_context(credentials))
    ferry = Ferry(NODES[host], "bench", lines, lambda: None)
    ferry.follow(plan, labels)
    await asyncio.Event().wait()
