"""What the agent answers: a handler for each line of the route table. They check who asks, and pass on.

Those of jobs are in jobs.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from upipe.cluster import messages, wire
from upipe.cluster.dealings import Ask, Message, Replicate
from upipe.cluster.jobs import Jobs
from upipe.cluster.link import Link
from upipe.cluster.member_events import LeftProperly
from upipe.cluster.neighbours import Neighbours
from upipe.cluster.parts import Parts
from upipe.cluster.pipe_requests import PipeRequests
from upipe.cluster.pipes import Pipes
from upipe.cluster.server import Call, Handler, refuse
from upipe.cluster.store import Store

TAIL = 0.2
"""Seconds between two looks for more output, while somebody follows it."""
_PIECE = 1 << 16


class LinesHandle(Protocol):
    """lines.Lines."""

    def accepted(self, peer: str, link: Link) -> None: ...
    def forget(self, peer: str) -> None: ...
    def close(self) -> None: ...


class Handlers:
    """All of one agent.

    Args:
        derived: certificates come from the token, and each names its node; those that were brought along do not.
        drain: begins to empty this node, within so many seconds.
        metrics: the text for Prometheus.
    """

    def __init__(
        self, neighbours: Neighbours, pipes: Pipes, requests: PipeRequests, parts: Parts, store: Store,
        lines: LinesHandle, jobs: Jobs, derived: bool, drain: Callable[[float], None], metrics: Callable[[], bytes],
    ) -> None:  # fmt: skip
        self._neighbours = neighbours
        self._pipes = pipes
        self._requests = requests
        self._parts = parts
        self._store = store
        self._lines = lines
        self._jobs = jobs
        self._derived = derived
        self._drain = drain
        self._metrics = metrics

    def all(self) -> dict[str, Handler]:
        """By the name of the route."""
        mine = (
            self.node, self.drain_node, self.members, self.join, self.ping, self.relay, self.leave, self.pipes,
            self.submit, self.pipe, self.stop, self.drain, self.deal, self.orders, self.report, self.attend,
            self.letters, self.output, self.has_code, self.code, self.put_code, self.mirrors, self.mirror, self.metrics,
        )  # fmt: skip
        return {**{one.__name__: one for one in mine}, **self._jobs.handlers()}

    def _proven(self, call: Call, node: str) -> None:
        """What is said in the name of a node must come over a connection of that very node."""
        identity = call.peer.identity
        if self._derived and (identity is None or identity.id != node):
            shown = identity.id if identity else "none"
            raise refuse(403, "other_node", f"That is said in the name of {node}, and the certificate is of {shown}.")

    # ------------------------------------------------------------------ nodes

    async def node(self, call: Call) -> wire.NodeStatus:
        return wire.NodeStatus(self._neighbours.info, time.time(), tuple(sorted(self._parts.all)))

    async def drain_node(self, call: Call) -> wire.Done:
        self._drain(call.body.deadline)
        return wire.Done()

    async def members(self, call: Call) -> wire.Members:
        machine = self._neighbours.machine
        others = (wire.Member(one.info, one.state, one.why[:4096]) for one in machine.members())
        return wire.Members(machine.info.cluster, (wire.Member(machine.info, "alive"), *others))

    async def join(self, call: Call) -> messages.Accepted:
        self._proven(call, call.body.info.node_id)
        return self._neighbours.joined(call.body, call.peer.address)

    async def ping(self, call: Call) -> messages.Gossip:
        self._proven(call, call.body.info.node_id)
        return self._neighbours.pinged(call.body)

    async def relay(self, call: Call) -> messages.Gossip:
        self._proven(call, call.body.gossip.info.node_id)
        return await self._neighbours.relayed(call.body)

    async def leave(self, call: Call) -> wire.Done:
        self._proven(call, call.body.node_id)
        self._neighbours.handle(LeftProperly(call.body))
        return wire.Done()

    # ------------------------------------------------------------------ pipes

    async def pipes(self, call: Call) -> wire.Pipes:
        return wire.Pipes(self._pipes.known.infos())

    async def submit(self, call: Call) -> wire.PipeInfo:
        request: wire.PipeRequest = call.body
        if request.client and (identity := call.peer.identity) and self._derived and identity.id != request.client:
            raise refuse(403, "other_client", f"{identity.id} cannot submit a pipe for {request.client}.")
        if request.job in self._jobs.over():
            raise refuse(409, "job_over", f"The script of job {request.job} has ended, and its pipes with it.")
        if missing := self._store.missing(request.shipment.contents):
            raise refuse(409, "contents_missing", f"Upload these first (PUT /v1/code/...): {' '.join(missing)[:3900]}")
        return await self._requests.submit(request)

    async def pipe(self, call: Call) -> wire.PipeInfo:
        return self._pipes.known.info(call.parameters["pipe"])

    async def stop(self, call: Call) -> wire.PipeInfo:
        return await self._end(call, "stop")

    async def drain(self, call: Call) -> wire.PipeInfo:
        return await self._end(call, "drain")

    async def _end(self, call: Call, how: str) -> wire.PipeInfo:
        by_node = call.peer.identity is not None and call.peer.identity.kind == "node"
        return await self._requests.end(call.parameters["pipe"], how, call.body.deadline, forward=not by_node)

    async def deal(self, call: Call) -> wire.Done:
        self._proven(call, speaker(call.body.message))
        self._pipes.heard(call.parameters["pipe"], call.body.message)
        return wire.Done()

    async def orders(self, call: Call) -> wire.Done:
        orders: wire.Orders = call.body
        self._proven(call, orders.coordinator)
        self._pipes.ordered(call.parameters["pipe"], orders)
        self._parts.order(call.parameters["pipe"], orders)
        return wire.Done()

    async def report(self, call: Call) -> wire.Done:
        self._proven(call, call.body.report.node)
        self._pipes.reported(call.parameters["pipe"], call.body.report)
        return wire.Done()

    async def attend(self, call: Call) -> wire.News:
        asked: wire.Attendance = call.body
        if call.peer.identity is not None:
            self._proven(call, asked.client)
        return await self._requests.attend(call.parameters["pipe"], asked, lambda: call.gone)

    async def letters(self, call: Call) -> bytes:
        return await self._parts.letters(call.parameters["pipe"])

    async def output(self, call: Call) -> AsyncIterator[bytes]:
        pipe = call.parameters["pipe"]
        part, path = self._parts.all.get(pipe), self._parts.output(pipe)
        if not path.is_file():
            raise refuse(404, "no_output", f"No output of workers of pipe {pipe} is kept on this node.")
        return tail(path, lambda: call.gone or part is None or self._parts.all.get(pipe) is not part)

    # ------------------------------------------------------------------ contents and mirrors

    async def has_code(self, call: Call) -> bytes:
        if not self._store.has(call.parameters["sha256"]):
            raise refuse(404, "no_such_content", "This node does not hold it.")
        return b""

    async def code(self, call: Call) -> AsyncIterator[bytes]:
        if not self._store.has(call.parameters["sha256"]):
            raise refuse(404, "no_such_content", "This node does not hold it.")
        return _pieces(self._store, call.parameters["sha256"])

    async def put_code(self, call: Call) -> wire.Stored:
        sha256 = call.parameters["sha256"]
        return wire.Stored(sha256, await self._store.put(sha256, call.pieces()))

    async def mirrors(self, call: Call) -> wire.Mirrors:
        return wire.Mirrors(tuple(one for part in self._parts.all.values() for one in part.mirrors()))

    async def mirror(self, call: Call) -> wire.MirrorInfo | None:
        name = call.parameters["mirror"]
        if call.upgrade:
            await self._line(call, name)
            return None
        for part in self._parts.all.values():
            for one in part.mirrors():
                if one.mirror == name:
                    return one
        raise refuse(404, "no_such_mirror", f"No mirror {name} ends on this node.")

    async def _line(self, call: Call, dialer: str) -> None:
        """Who dials, node or submitting process, names itself in the path; the certificate says the same."""
        self._proven(call, dialer)
        link = Link()
        call.switch(link)
        self._lines.accepted(dialer, link)
        await link.closed

    async def metrics(self, call: Call) -> bytes:
        return self._metrics()


def speaker(message: Message) -> str:
    """In whose name a message of the ballot is."""
    if isinstance(message, Replicate):
        return message.record.coordinator
    return message.candidate if isinstance(message, Ask) else message.node


async def _pieces(store: Store, sha256: str) -> AsyncIterator[bytes]:
    for piece in store.read(sha256):
        yield piece


async def tail(path: Path, over: Callable[[], bool]) -> AsyncIterator[bytes]:
    """What is in a file and what is still written to it, until nothing more comes. What was moved aside as path.1
    (keeper_output.py) comes first, and a file that is moved aside meanwhile is read to its end."""
    before = path.with_name(f"{path.name}.1")
    file: BinaryIO = (before if before.is_file() else path).open("rb")
    try:
        ending = False
        while True:
            while piece := file.read(_PIECE):
                yield piece
            if (newer := _newer(path, file)) is not None:
                rest = file.read()  # written between the last look and the move: at most a piece
                file.close()
                file = newer
                yield rest
                continue
            if ending:
                return
            ending = over()
            if not ending:
                await asyncio.sleep(TAIL)
    finally:
        file.close()


def _newer(path: Path, file: BinaryIO) -> BinaryIO | None:
    """The file of that name, when it is another one."""
    try:
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return None
        return path.open("rb")
    except FileNotFoundError:
        return None  # it is being moved this instant, or the pipe was forgotten
