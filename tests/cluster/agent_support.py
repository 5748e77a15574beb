"""Agents on loopback in one process, with keepers and mirrors that only pretend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.connections import all_closed, connections
from upipe.cluster import tls, wire
from upipe.cluster.agent import Agent
from upipe.cluster.client import Client, Target
from upipe.cluster.dealings import QueueState
from upipe.cluster.keeping import KeeperNews
from upipe.cluster.layout import NodePlan
from upipe.cluster.link import Link
from upipe.cluster.messages import Resources
from upipe.cluster.node_id import DataDir
from upipe.cluster.options import Options, settle
from upipe.cluster.record import Books, Crew
from upipe.cluster.token import Secret
from upipe.errors import KeeperFailed
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.settings import Place

SECRET = Secret(bytes(range(32)))
LONGEST = 60.0
"""Seconds to wait for what comes in one, on a busy machine: only to end a test that hangs."""
CLIENT = tls.Identity("client", "00000000000000cc")
SPEC = PipeSpec(
    "words",
    (
        ProcessorSpec("a", "source", code="ab" * 32, resources=(("cpu", 0.1),), place=Place(labels=("left",))),
        ProcessorSpec("b", "map", code="cd" * 32, resources=(("cpu", 0.1),), place=Place(labels=("right",))),
    ),
    (EdgeSpec("a", "b", size=1 << 16),),
)


@dataclass
class Survivors:
    """What fake keepers have in common: they live on when their agent does not."""

    alive: dict[Path, Any] = field(default_factory=dict)
    """By directory: (fence, plan) that is followed."""
    ended: dict[Path, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    started: list[Any] = field(default_factory=list)
    """Every job that was started."""
    stillborn: list[str] = field(default_factory=list)
    """Why the next keepers do not start, one after the other."""
    fails: str = ""
    """Why no keeper can do what its first plan says."""


class FakeKeeper:
    """A keeper that follows at once."""

    def __init__(
        self, crew: Survivors, directory: Path, news: Callable[[KeeperNews], None], lost: Callable[[str], None]
    ) -> None:
        self.crew, self.directory, self.news, self.lost = crew, directory, news, lost
        self.open = True

    async def start(self, job: Any) -> None:
        if self.crew.stillborn:
            raise KeeperFailed(self.crew.stillborn.pop(0))
        self.crew.started.append(job)
        self.crew.alive[self.directory] = ((0, 0), None)

    async def find(self) -> bool:
        if self.directory not in self.crew.alive:
            return False
        self.tell()
        return True

    def follow(self, fence: tuple[int, int], plan: NodePlan | None) -> None:
        self.crew.alive[self.directory] = (fence, plan)
        self.tell()

    def end(self, *workers: tuple[str, int]) -> None:
        """These return."""
        self.crew.ended[self.directory] = (*self.crew.ended.get(self.directory, ()), *workers)
        self.tell()

    def tell(self) -> None:
        asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        if not self.open or self.directory not in self.crew.alive:
            return
        fence, plan = self.crew.alive[self.directory]
        if self.crew.fails:
            self.news(KeeperNews(failed=self.crew.fails))
            return
        if plan is None and fence != (0, 0):
            del self.crew.alive[self.directory]
        labels = {queue.plan.name: f"session/{queue.plan.name}" for queue in plan.queues} if plan else {}
        ended = self.crew.ended.get(self.directory, ())
        runs = len([one for one in plan.workers if (one.processor, one.index) not in ended]) if plan else 0
        left = tuple(
            (one.processor, one.index) for one in plan.workers if f"{one.processor}#{one.index}" in plan.leaving
        ) if plan else ()  # fmt: skip
        self.news(KeeperNews(
            fence=fence, present=plan is not None or fence == (0, 0), session="session", labels=labels, ended=ended,
            left=left, failed="", up=True, crews={"x": Crew(workers=runs)}, workers=(),
        ))  # fmt: skip

    async def letters(self) -> list[Any]:
        return []

    def output(self) -> Path:
        return self.directory / "output"

    def close(self) -> None:
        self.open = False

    def kill(self) -> None:
        if self.crew.alive.pop(self.directory, None):
            self.lost("it was killed")


class FakeFerry:
    """Every queue is empty and known everywhere."""

    def __init__(self, node: str, pipe: str) -> None:
        self.node, self.pipe = node, pipe
        self.plan: NodePlan | None = None
        self.calls: list[str] = []

    def release(self, plan: NodePlan | None) -> None:
        self.calls.append("release")

    def follow(self, plan: NodePlan, labels: dict[str, str]) -> None:
        assert set(labels) == {queue.plan.name for queue in plan.queues}
        self.calls.append("follow")
        self.plan = plan

    def states(self) -> dict[str, QueueState]:
        queues = self.plan.queues if self.plan else ()
        return {queue.plan.name: QueueState(True, True, True, Books(3, 3)) for queue in queues}

    def infos(self) -> list[wire.MirrorInfo]:
        if self.plan is None:
            return []
        return [
            wire.MirrorInfo(f"{self.pipe}:{one.id}", "source" if one.source == self.node else "sink", one.epoch,
                            one.sink if one.source == self.node else one.source, 30, 20, 10)
            for one in self.plan.mirrors
        ]  # fmt: skip

    def close(self) -> None:
        self.calls.append("close")


class FakeLines:
    def __init__(self, node: str, dial: Callable[[str, Link], Awaitable[None]]) -> None:
        self.dial = dial
        self.links: dict[str, Link] = {}

    def accepted(self, peer: str, link: Link) -> None:
        self.links[peer] = link

    def forget(self, peer: str) -> None:
        self.links.pop(peer, None)

    def close(self) -> None:
        for link in self.links.values():
            link.close()


class FakeEngines:
    """See agent.Engines; what keepers run outlives the agents that share a `crew`."""

    def __init__(self, crew: Survivors | None = None) -> None:
        self.crew = crew or Survivors()
        self.keepers: dict[str, FakeKeeper] = {}
        self.ferries: dict[str, FakeFerry] = {}

    def lines(self, node: str, dial: Callable[[str, Link], Awaitable[None]]) -> FakeLines:
        return FakeLines(node, dial)

    def keeper(
        self, directory: Path, news: Callable[[KeeperNews], None], lost: Callable[[str], None]
    ) -> FakeKeeper:
        made = self.keepers[directory.name] = FakeKeeper(self.crew, directory, news, lost)
        return made

    def ferry(self, node: str, pipe: str, lines: Any, changed: Callable[[], None]) -> FakeFerry:
        made = self.ferries[pipe] = FakeFerry(node, pipe)
        return made


@dataclass
class Node:
    """One running agent."""

    agent: Agent
    data: DataDir
    engines: FakeEngines
    said: list[str]

    @property
    def id(self) -> str:
        return self.agent.identity.node_id

    @property
    def port(self) -> int:
        return self.agent.neighbours.info.port

    @property
    def seed(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self, identity: tls.Identity = CLIENT, secret: Secret = SECRET) -> Client:
        return Client(Target("127.0.0.1", self.port, self.id), secret, tls.issue(secret, identity))

    async def kill(self) -> None:
        """As kill -9 for everybody else: not a word is said."""
        await self.agent.close()
        self.data.close()


def token_file(folder: Path, secret: Secret = SECRET) -> Path:
    path = folder / f"token-{secret.fingerprint}"
    path.write_text(secret.text())
    path.chmod(0o600)
    return path


async def start(
    folder: Path, name: str, *join: str, engines: FakeEngines | None = None, secret: Secret = SECRET, **options: Any
) -> Node:
    """An agent in folder/name."""
    directory = folder / name
    directory.mkdir(mode=0o700, exist_ok=True)
    settled = settle(Options(
        join=join, data_dir=directory, token_file=token_file(folder, secret), multicast=False,
        **{"port": 0, "labels": (name,) if "=" in name else (f"{name}=yes",), **options},
    ))  # fmt: skip
    data, said = DataDir(directory), []
    engines = engines or FakeEngines()
    agent = Agent(settled, data, data.identity(), Resources(cpu=4.0, memory=1 << 30), said.append, engines)
    try:
        await agent.start()
    except BaseException:
        await agent.close()
        data.close()
        raise
    return Node(agent, data, engines, said)


@asynccontextmanager
async def running(folder: Path, *names: str, **options: Any) -> AsyncIterator[list[Node]]:
    """Agents that know each other; those that a test replaced in the list are closed too."""
    nodes: list[Node] = []
    before = connections()
    try:
        for name in names:
            nodes.append(await start(folder, name, *(node.seed for node in nodes[:1]), **options))
        await met(*nodes)
        yield nodes
    finally:
        for node in nodes:
            await node.kill()
        await all_closed(before)


async def met(*nodes: Node, seconds: float = LONGEST) -> None:
    """Until all know all."""
    ids = {node.id for node in nodes}
    await until(lambda: all(ids <= node.agent.neighbours.live().keys() for node in nodes), seconds)


class Room:
    """What a part asks its agent of room, as a base of its fake means."""

    full: tuple[tuple[str, int], ...] = ()
    """Workers that there is no room for."""
    changes = 0
    """How often it was said that promises are others now."""

    def beyond(self, pipe: str, spec: Any, seats: Any, agreed: Any) -> Any:
        over = tuple(seat for seat in seats if seat in self.full and seat not in agreed)
        return over, "there is no room", {"cpu": 4.0}

    def promises(self) -> None:
        self.changes += 1


async def until(true: Callable[[], Any], seconds: float = LONGEST) -> None:
    """Look again and again, with a deadline."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 (what is waited for is in many places)
            await asyncio.sleep(0.01)
