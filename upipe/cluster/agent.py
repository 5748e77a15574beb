"""`upipe-node`: one agent, from its start to its end. Everything is made, joined and closed here, and nothing decided.

    Server ── Handlers ──┬── Neighbours ── Peers ──▶ other agents
                         ├── Pipes ── Ledger (records)
                         ├── Parts ── Part ─┬─ Keeper (a process of its own, survives us)
                         │                  └─ Ferry ── Lines (mirrors)
                         ├── Jobs (scripts)
                         └── Store (contents)

On disk, below the data directory (node_id.py): node.sock, audit/log, records/, parts/, pipes/, code/, modules/,
jobs/.
After kill -9 the keepers and their workers go on; the next agent in that directory finds them, and opens mirrors anew.

How it ends. SIGTERM and SIGINT, and POST /v1/node/drain, mean: take nothing new, let workers that can run elsewhere
move there, for at most drain_seconds; then say good-bye and end. What cannot move (the only node, a pinned worker, no
room) keeps running, in its keeper, for the next agent in this directory: ending a keeper would throw away the frames in
its queues, and only the user can mean that (`stop` the pipe). A second signal ends the agent at once; keepers stay.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from upipe.cluster import doctor, tls, token
from upipe.cluster import member_events as events
from upipe.cluster.address import Address
from upipe.cluster.audit import Audit
from upipe.cluster.errands import Errands
from upipe.cluster.guard import Policy
from upipe.cluster.handlers import Handlers, LinesHandle
from upipe.cluster.jobs import Jobs
from upipe.cluster.ledger import Ledger
from upipe.cluster.link import Link
from upipe.cluster.messages import Resources
from upipe.cluster.metrics import Metrics
from upipe.cluster.neighbours import Neighbours, NodeEvent
from upipe.cluster.node_id import DataDir, Identity
from upipe.cluster.offers import node_of
from upipe.cluster.options import Settled
from upipe.cluster.part_means import FerryHandle, KeeperHandle
from upipe.cluster.parts import Parts
from upipe.cluster.peers import Peers
from upipe.cluster.pipe_requests import PipeRequests
from upipe.cluster.pipes import Pipes
from upipe.cluster.probes import SystemProbes
from upipe.cluster.resources import detect
from upipe.cluster.server import Server
from upipe.cluster.store import Store
from upipe.cluster.timing import Timing
from upipe.cluster.wire import Member

if TYPE_CHECKING:
    from upipe.cluster.keeping import KeeperNews

LOOK_AT_PARTS = 0.1
"""Seconds between two looks whether all workers have moved, while draining."""
RENEW_EVERY = 60.0
"""Seconds between two looks whether the certificate is to be made anew, or one's own files were replaced. Short, since
a clock that is set right, or a machine that slept for a week, makes it due at once."""
log = logging.getLogger("upipe.cluster")


class Engines(Protocol):
    """What runs pipes on a node: keepers and mirrors. Faked in tests."""

    def lines(self, node: str, dial: Callable[[str, Link], Awaitable[None]]) -> LinesHandle: ...
    def keeper(
        self, directory: Path, news: Callable[[KeeperNews], None], lost: Callable[[str], None]
    ) -> KeeperHandle: ...
    def ferry(self, node: str, pipe: str, lines: LinesHandle, changed: Callable[[], None]) -> FerryHandle: ...


class RealEngines:
    """Processes and connections."""

    def lines(self, node: str, dial: Callable[[str, Link], Awaitable[None]]) -> LinesHandle:
        """See lines.Lines."""
        from upipe.cluster.lines import Lines

        return Lines(node, dial)

    def keeper(
        self, directory: Path, news: Callable[[KeeperNews], None], lost: Callable[[str], None]
    ) -> KeeperHandle:
        """See keepers.Keeper."""
        from upipe.cluster.keepers import Keeper

        return Keeper(directory, news, lost)

    def ferry(self, node: str, pipe: str, lines: LinesHandle, changed: Callable[[], None]) -> FerryHandle:
        """See ferry.Ferry."""
        from upipe.cluster.ferry import Ferry
        from upipe.cluster.lines import Lines

        assert isinstance(lines, Lines)
        return Ferry(node, pipe, lines, changed)


class Agent:
    """One agent: make it, start() it, wait for `ended`, close() it.

    Args:
        settled: the user's options, read.
        data: the data directory, opened and locked.
        identity: who this node is in this life.
        found: resources of this machine.
        tell: told sentences for the user, one a line.
        engines: what runs pipes.
        timing: of membership.
    """

    def __init__(
        self, settled: Settled, data: DataDir, identity: Identity, found: Resources,
        tell: Callable[[str], None] = log.info, engines: Engines | None = None, timing: Timing | None = None,
    ) -> None:  # fmt: skip
        self.settled = settled
        self.identity = identity
        self.ended = asyncio.Event()
        self._data = data
        self._found = found
        self._tell = tell
        self._engines = engines or RealEngines()
        self._timing = timing
        self._errands = Errands()
        self._draining = False
        self._open: list[Callable[[], Awaitable[None]]] = []
        """What has to be closed, the last first."""

    # ------------------------------------------------------------------ beginning

    async def start(self) -> None:
        """Listen, find again what runs, and look for others.

        Raises:
            ClusterError: it cannot; nothing is left open after close().
        """
        options, secret, me = self.settled.options, self.settled.secret, self.identity.node_id
        self.credentials = self.settled.credentials(me)
        audit = Audit(self._data.path / "audit" / "log", secret.bearer)
        self._open.append(_later(audit.close))
        self._make_parts(me)
        server = self._server = Server(self._policy(me), self._handlers().all(), audit, tell=self._tell)
        self._open.append(self._stop_server)
        self._open.append(_later(self.lines.close))  # first: the server waits for connections that are mirrors
        bound = server.listen_tcp(options.host, options.port, self.credentials)
        server.listen_unix(self._data.path / "node.sock")
        self._bound, port = bound, bound[0][1]
        self.neighbours.machine.info = self.settled.info(self.identity, port, self._found)
        await self.parts.start()
        self.pipes.start()
        for job in self.jobs.over():  # perhaps while no agent lived
            self._end_pipes_of(job)
        self.store.tidy()
        self._say_hello(bound)
        await self.neighbours.start(self.settled.seeds, options.multicast)
        self._errands.run(self._renew(), "renew the certificate")

    def _policy(self, me: str) -> Policy:
        options = self.settled.options
        hosts = frozenset(one.lower() for one in (options.host, *options.allow_host))
        return Policy(self.settled.secret.bearer, me, hosts)

    def _make_parts(self, me: str) -> None:
        options = self.settled.options
        info = self.settled.info(self.identity, options.port, self._found)
        self.neighbours = Neighbours(
            info, options.host, self._make_peers, self._node_event, self._data.outlive, self._tell, self._timing
        )
        self._open.append(self.neighbours.close)
        self.lines = self._engines.lines(me, self._dial)
        self.store = Store(self._data.path)
        peers, live = self.neighbours.peers, self.neighbours.live
        self.parts = Parts(
            me, self.identity.life, self._data.path, self.store, peers, lambda *told: self.pipes.reported(*told),
            lambda pipe: pipe in self.pipes.entries, lambda *asked: self.pipes.known.successor(*asked),
            lambda: tuple(live()), lambda: node_of(self.neighbours.info, {}, 0).resources, self._promised,
            self._engines.keeper, lambda pipe, changed: self._engines.ferry(me, pipe, self.lines, changed),
        )  # fmt: skip
        self._open.append(self.parts.close)
        self.pipes = Pipes(
            me, Ledger(self._data.path / "records"), peers, live, self.neighbours.suspects, self.parts.order,
            self._tell,
        )  # fmt: skip
        self.store.needed = self.pipes.known.contents
        self._open.append(self.pipes.close)
        self._requests = PipeRequests(self.pipes, peers, live, self.neighbours.addresses)
        self._open.append(self._errands.close)

    def _make_peers(self, addresses: Callable[[str], tuple[Address, ...]]) -> Peers:
        return Peers(self.identity.node_id, self.settled.secret, self.credentials, addresses)

    def _handlers(self) -> Handlers:
        machine = self.neighbours.machine
        self.metrics = Metrics(
            lambda: machine.info, self._members, self.pipes.known.infos,
            lambda: [one for part in self.parts.all.values() for one in part.mirrors()],
        )  # fmt: skip
        jobs = self.jobs = self._make_jobs()
        jobs.load()
        self._open.append(jobs.close)
        return Handlers(
            self.neighbours, self.pipes, self._requests, self.parts, self.store, self.lines, jobs,
            self.credentials.derived, self.drain, self.metrics.text,
        )  # fmt: skip

    def _make_jobs(self) -> Jobs:
        async def content(sha256: str) -> bytes | None:
            if not self.store.has(sha256):
                return None
            return await asyncio.to_thread(lambda: b"".join(self.store.read(sha256)))

        token_file = self.settled.options.token_file or token.place()
        own = self.settled.options.own
        access = {token.VARIABLE: str(token_file.absolute()), **(tls.variables(own) if own else {})}
        return Jobs(
            self._data.path / "jobs", self.identity.node_id, self._near, access, content, self._end_pipes_of
        )  # fmt: skip

    def _end_pipes_of(self, job: str) -> None:
        self._errands.run(self._requests.end_of_job(job), f"end the pipes of job {job}")

    def _near(self) -> str:
        """Where processes of this host find us. One's own certificates carry the names that others dial, perhaps no
        loopback."""
        if not self.credentials.derived:
            return str(self.neighbours.info.addresses[0])
        hosts = [host for host, _ in self._bound]
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = next((one for one in hosts if one.startswith("127.") or one in anywhere), hosts[0])
        return str(Address(anywhere.get(host, host), self._bound[0][1]))

    async def _stop_server(self) -> None:
        await self._server.stop(1.0)

    def _say_hello(self, bound: list[tuple[str, int]]) -> None:
        options, secret = self.settled.options, self.settled.secret
        where = ", ".join(str(Address(host, port)) for host, port in bound)
        self._tell(f"node {self.identity.node_id} of cluster {options.cluster} listens at {where}")
        self._tell(f"token fingerprint {secret.fingerprint}")
        seeds = ", ".join(map(str, self.settled.seeds)) or "none"
        self._tell(f"seeds: {seeds}; multicast: {'on' if options.multicast else 'off'}")
        found = doctor.memory(SystemProbes().memory())
        if found.level == "problem":
            self._tell(f"shared memory: {found.what}, at {found.where}: pipes get other nodes. {found.todo}")

    # ------------------------------------------------------------------ while it runs

    def _members(self) -> list[Member]:
        machine = self.neighbours.machine
        return [Member(machine.info, "alive"), *(Member(one.info, one.state) for one in machine.members())]

    def _promised(self, by_pipe: dict[str, dict[str, float]]) -> None:
        """What our resources are promised to: every coordinator shall see it."""
        info = replace(self.neighbours.info, promised=by_pipe)
        self.neighbours.handle(events.OwnChanged(info))
        self.pipes.met(info)

    def _node_event(self, event: NodeEvent) -> None:
        if isinstance(event, events.NodeDown | events.NodeLeft):
            self.lines.forget(event.info.node_id)
            self.pipes.lost(event.info.node_id)
        elif not isinstance(event, events.NodeSuspect):
            self.pipes.met(event.info)

    async def _dial(self, node: str, link: Link) -> None:
        await self.neighbours.peers.line(node, link)

    async def _renew(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(RENEW_EVERY)
            try:
                self.renew(datetime.now(UTC))
                said = ""
            except Exception as error:  # no descriptor, a file that is just being replaced: the next look may do
                why = str(error) or type(error).__name__
                if why != said:
                    self._tell(f"the certificate of this node is not renewed: {why}; the one in use ends at "
                               f"{self.credentials.ends:%Y-%m-%d %H:%M} UTC. It is tried again")  # fmt: skip
                said = why

    def renew(self, now: datetime) -> None:
        """Show a new certificate when it is time for one, or the user has replaced the files of their own.

        Raises:
            CertificateError, OSError: it cannot be had; the one in use stays, and the next call tries again.
        """
        if self.credentials.derived and not self.credentials.due(now):
            return
        made = self.settled.credentials(self.identity.node_id)
        if (made.ca, made.certificate) == (self.credentials.ca, self.credentials.certificate):
            return
        self._server.renew(made)
        self.neighbours.peers.renew(made)
        self.credentials = made  # last: what failed above is done again
        if not made.derived:
            self._tell(f"shows another certificate from now on, valid until {made.ends:%Y-%m-%d %H:%M} UTC")

    # ------------------------------------------------------------------ ending

    def signalled(self) -> None:
        """SIGTERM or SIGINT: the first one drains, the second ends at once."""
        if self._draining:
            self._tell("ends at once; what runs here goes on without an agent until the next start")
            self.ended.set()
        else:
            self.drain(self.settled.options.drain_seconds)

    def drain(self, seconds: float) -> None:
        """Begin to empty this node; it ends afterwards. Again does nothing."""
        if not self._draining:
            self._draining = True
            self._errands.run(self._empty(seconds), "drain")

    async def _empty(self, seconds: float) -> None:
        try:
            await self._leave(seconds)
        finally:  # whatever failed on the way: who said SIGTERM means it
            self.ended.set()

    async def _leave(self, seconds: float) -> None:
        self.neighbours.drain()
        until = asyncio.get_running_loop().time() + seconds
        others = [one for one in self.neighbours.live().values() if not one.draining]
        if self._busy() and others:
            self._tell(f"drains: {self._busy()} pipes have {seconds:g} s to move elsewhere")
        while self._busy() and others and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(LOOK_AT_PARTS)
            others = [one for one in self.neighbours.live().values() if not one.draining]
        if left := self._busy():
            self._tell(f"{left} pipes cannot move elsewhere; they go on without an agent until the next start")
        await self.neighbours.leave()

    def _busy(self) -> int:
        return sum(1 for part in self.parts.all.values() if part.present)

    async def close(self) -> None:
        """Let go of everything; keepers go on. Idempotent."""
        while self._open:
            await self._open.pop()()


def _later(close: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def closing() -> None:
        close()

    return closing


async def serve(
    settled: Settled, data: DataDir, tell: Callable[[str], None], engines: Engines | None = None
) -> None:
    """Run an agent until it is told to end.

    Raises:
        ClusterError: it cannot begin.
    """
    agent = Agent(settled, data, data.identity(), await asyncio.to_thread(detect, settled.resources), tell, engines)
    loop = asyncio.get_running_loop()
    try:
        await agent.start()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, agent.signalled)
        await agent.ended.wait()
    finally:
        await agent.close()
