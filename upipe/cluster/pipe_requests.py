"""What users ask of pipes: to run one, to end one, and, as its submitting process, what there is for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from upipe.cluster import wire
from upipe.cluster.address import Address
from upipe.cluster.dealings import DrainPipe, StopPipe
from upipe.cluster.desk import BROKEN
from upipe.cluster.known_pipes import told_of
from upipe.cluster.layout import cluster_problems
from upipe.cluster.messages import NodeInfo
from upipe.cluster.peers import Peers
from upipe.cluster.pipes import Pipes
from upipe.cluster.placement import Unplaceable
from upipe.cluster.record import ENDED, Record
from upipe.cluster.routes import DRAIN, STOP
from upipe.cluster.scheduler import Scheduler
from upipe.cluster.server import refuse
from upipe.errors import ClusterError
from upipe.graph.validate import problems

AGAIN = 1.0
"""Seconds between two tries to end the pipes of a script that has ended."""


class PipeRequests:
    """All of one agent. It holds nothing: pipes are in `pipes`, and it checks who may ask for what.

    Args:
        pipes: of this agent.
        peers: the other agents.
        live: nodes in use, this one among them, by id.
        addresses: where a node is.
    """

    def __init__(
        self, pipes: Pipes, peers: Peers, live: Callable[[], dict[str, NodeInfo]],
        addresses: Callable[[str], tuple[Address, ...]],
    ) -> None:  # fmt: skip
        self.me = pipes.me
        self._pipes = pipes
        self._known = pipes.known
        self._peers = peers
        self._live = live
        self._addresses = addresses
        self._loop = asyncio.get_running_loop()

    async def submit(self, request: wire.PipeRequest) -> wire.PipeInfo:
        """Run a pipe, coordinated here; asked again, say how it is.

        Raises:
            NodeRefused: 400 it is no pipe, 409 it finds no room on any node or its id is taken, 503 this node drains.
        """
        known = self._known.record(request.id)
        if known is not None:
            if known.spec != request.spec:
                raise refuse(409, "id_taken", f"Another pipe runs or ran as {request.id}: choose another id.")
            return self._known.info(request.id)
        if wrong := problems(request.spec) or cluster_problems(request.spec):
            raise refuse(400, "no_pipe", "; ".join(wrong)[:4000])
        if self._live()[self.me].draining:
            raise refuse(503, "draining", "This node is about to leave: ask another one.")
        found = Scheduler.submit(
            self.me, request.id, request.spec, self._pipes.nodes(None), request.client, self._loop.time(),
            request.shipment, request.job,
        )  # fmt: skip
        if isinstance(found, Unplaceable):
            raise refuse(409, "no_room", found.told()[:4000])
        scheduler, commands = found
        self._pipes.begin(scheduler, commands)
        return self._known.info(request.id)

    async def end(self, pipe: str, how: str, deadline: float, forward: bool) -> wire.PipeInfo:
        """Stop or drain a pipe, by its coordinator.

        Args:
            how: "stop" or "drain".
            deadline: seconds after which a drained pipe is stopped.
            forward: pass it on when another agent coordinates; agents do not pass on what agents passed on.
        """
        if pipe in self._known.history:
            return self._known.info(pipe)
        entry = self._known.entry(pipe)
        coordinator = entry.record.coordinator
        if not entry.scheduler.coordinates and coordinator != self.me and forward:
            route = STOP if how == "stop" else DRAIN
            return await self._peers.call(coordinator, route, wire.Stopping(deadline), pipe=pipe)
        self._known.coordinated(entry)
        if how == "drain":
            if entry.stop_timer is None:
                entry.stop_timer = self._loop.call_later(deadline, self._pipes.follow, entry, StopPipe())
            self._pipes.follow(entry, DrainPipe())
        else:
            self._pipes.follow(entry, StopPipe())
        return self._known.info(pipe)

    async def end_of_job(self, job: str) -> None:
        """A submitted script has ended, and its pipes that go on end with it: whoever read and fed them is gone, and
        may not have lived to say so. Those that nobody has to stay for (without a client) go on.

        Args:
            job: as in Record.job.
        """
        until = self._loop.time() + BROKEN  # then their client is missed anyway
        while (left := self._begun_by(job)) and self._loop.time() < until:
            for pipe in left:
                try:
                    await self.end(pipe, "stop", 0.0, forward=True)
                except ClusterError:
                    pass  # nobody coordinates it just now
            if self._begun_by(job):
                await asyncio.sleep(AGAIN)

    def _begun_by(self, job: str) -> list[str]:
        records = [entry.record for entry in self._known.entries.values()]
        return [one.id for one in records if one.job == job and one.layout.client and one.state not in ENDED]

    async def attend(self, pipe: str, asked: wire.Attendance, broken: Callable[[], bool]) -> wire.News:
        """The submitting process asks what there is for it.

        Raises:
            NodeRefused: 403 another process submitted it; 404, 409 and 503 as reported().
        """
        if pipe in self._known.history:
            return wire.News(asked.heard + 1, told_of(self._known.history[pipe].record))
        entry = self._known.entry(pipe)
        if asked.client != entry.record.layout.client or (asked.report and asked.report.node != asked.client):
            raise refuse(403, "other_client", f"Pipe {pipe} was submitted by another process.")
        if asked.report is not None:
            self._pipes.reported(pipe, asked.report)
        self._known.coordinated(entry)
        await entry.desk.wait(asked.heard, asked.patience, broken)
        if pipe in self._known.history:
            return wire.News(asked.heard + 1, told_of(self._known.history[pipe].record))
        self._known.coordinated(entry)
        orders = entry.desk.orders if entry.desk.orders and entry.desk.orders.fence > asked.fence else None
        return wire.News(entry.desk.number, entry.scheduler.telling(), orders, self._whereabouts(entry.record))

    def _whereabouts(self, record: Record) -> dict[str, tuple[str, ...]]:
        nodes = {*record.layout.nodes(), *record.members, self.me} - {record.layout.client}
        here = self._live().get(self.me)
        found = {node: self._addresses(node) for node in sorted(nodes)}
        if here is not None:
            found[self.me] = here.addresses
        return {node: tuple(map(str, addresses)) for node, addresses in found.items() if addresses}
