"""What tests of keepers share: jobs whose code is shipped as the agent ships it, and plans as a coordinator makes them,
fed by hand."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec

from upipe.cluster.keepers import Keeper
from upipe.cluster.keeping import Job, KeeperNews
from upipe.cluster.lanes import Layout, lay_out
from upipe.cluster.layout import NodePlan, node_plan
from upipe.cluster.placement import Placement
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.memq import segment
from upipe.memq.queue import MemQ
from upipe.runtime.worker import Bundle
from upipe.settings import RestartPolicy, Settings

HERE = "1"
SMALL = Settings(edge_bytes=1 << 20, sink_bytes=1 << 20, restart=RestartPolicy(limit=0, backoff=0.01))
DEADLINE = 60.0
"""Seconds to wait for what comes in one, on a busy machine: only to end a test that hangs."""


def one(name: str, kind: str = "map", workers: int = 1, **more: Any) -> ProcessorSpec:
    return ProcessorSpec(name, kind, "0" * 64, workers=workers, **more)


def chain(*processors: ProcessorSpec, settings: Settings = SMALL, **edge: Any) -> PipeSpec:
    edges = tuple(EdgeSpec(a.name, b.name, **edge) for a, b in pairwise(processors))
    return PipeSpec("test", processors, edges, settings)


def all_here(spec: PipeSpec, client: str = "") -> Layout:
    return lay_out(spec, Placement({one.name: (HERE,) * one.most_workers for one in spec.processors}), client)


class Held:
    """A keeper under test, and what it said."""

    def __init__(self, directory: Path, spec: PipeSpec, layout: Layout | None = None, **codes: Any) -> None:
        self.directory = directory / "pipes" / "test-1"
        self.spec = spec
        self.layout = layout or all_here(spec)
        self.said: list[KeeperNews] = []
        self.lost: list[str] = []
        self.revision = 0
        self.plan: NodePlan | None = None
        self.changed = asyncio.Event()
        self.scripts = {name: str(code) for name, code in codes.items() if isinstance(code, Path)}
        self.code = {name: self._ship(directory, code) for name, code in codes.items() if name not in self.scripts}
        self.pids: set[int] = set()
        self.keeper = self.agent()

    def _ship(self, directory: Path, function: Any) -> str:
        data = cloudpickle.dumps(Bundle(function, None, {}, ()))
        path = directory / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        return str(path)

    def agent(self) -> Keeper:
        """Another agent's end."""
        return Keeper(self.directory, self._news, self._lost)

    def _news(self, news: KeeperNews) -> None:
        self.said.append(news)
        self.pids.update(worker.pid for worker in news.workers if worker.pid)
        self.changed.set()

    def _lost(self, reason: str) -> None:
        self.lost.append(reason)
        self.changed.set()

    @property
    def news(self) -> KeeperNews:
        """The newest."""
        return self.said[-1]

    async def start(self, **more: Any) -> None:
        """The keeper, without a plan."""
        await self.keeper.start(Job("test-1", self.spec, self.code, self.scripts, **more))
        self.pids.add(self.keeper.pid)

    def made(self, node: str = HERE, **changes: Any) -> NodePlan:
        """A next plan of this layout."""
        self.revision += 1
        return node_plan(self.spec, self.layout, node, (1, self.revision), **changes)

    async def follow(self, plan: NodePlan | None = None, **changes: Any) -> KeeperNews:
        """Send it, and wait until it is followed."""
        self.plan = plan or self.made(**changes)
        self.keeper.follow(self.plan.fence, self.plan)
        await self.until(lambda news: news.fence == self.plan.fence or news.failed, "followed")
        return self.news

    async def up(self) -> KeeperNews:
        """Until its workers are."""
        return await self.until(lambda news: news.up, "up")

    async def until(
        self, condition: Callable[[KeeperNews], object], what: str, seconds: float = DEADLINE
    ) -> KeeperNews:
        """Until it said so."""
        until = time.monotonic() + seconds
        while not (self.said and condition(self.news)):
            self.changed.clear()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self.changed.wait()
            except TimeoutError:
                raise AssertionError(f"not {what} within {seconds:g} s: {self.said[-1:]} {self.output()}") from None
        return self.news

    async def stop(self) -> None:
        """plan None, until it is gone."""
        self.revision += 1
        self.keeper.follow((9, self.revision), None)
        await self.until(lambda news: not news.present, "stopped")
        await gone(self.keeper.pid)

    def queue(self, name: str) -> MemQ:
        """Attach."""
        return MemQ.attach(self.news.labels[name])

    def named(self, stream: str) -> str:
        """The queue of a stream that is written here."""
        return next(lane.name for lane in self.layout.of(stream) if lane.open and lane.home == HERE)

    def output(self) -> str:
        """What was printed."""
        path = self.keeper.output()
        return path.read_text() if path.exists() else ""

    def worker(self, name: str) -> int:
        """Its pid, 0 when it does not run."""
        return next((worker.pid for worker in self.news.workers if worker.name == name), 0)

    async def kill(self, name: str) -> None:
        """Kill a worker, and wait for its next life."""
        await self.until(lambda news: self.worker(name), f"{name} runs")
        pid = self.worker(name)
        os.kill(pid, signal.SIGKILL)
        await self.until(lambda news: self.worker(name) not in (0, pid), f"{name} runs again")

    async def end(self) -> None:
        """Of a test, however it went."""
        if self.keeper.pid and segment.process_state(self.keeper.pid) not in ("Z", "X", None):
            os.kill(self.keeper.pid, signal.SIGKILL)
        for pid in self.pids:
            await gone(pid)
        self.keeper.close()
        segment.sweep()


async def gone(pid: int, seconds: float = DEADLINE) -> None:
    """Until a process is dead, zombie or not."""
    until = time.monotonic() + seconds
    while segment.process_state(pid) not in ("Z", "X", None):
        assert time.monotonic() < until, f"process {pid} lives"
        await asyncio.sleep(0.01)


async def drained(queue: MemQ, seconds: float = DEADLINE) -> list[Any]:
    """Everything until the end of the stream."""
    found = []
    async with asyncio.timeout(seconds):
        async for value in queue:
            found.append(value)
    return found


def shifted(spec: PipeSpec, **changes: Any) -> PipeSpec:
    return msgspec.structs.replace(spec, **changes)
