"""Real agents on this host, each a process with a data directory of its own; and pipes for them, by HTTP alone.

    async with nodes_of(2, tmp_path) as nodes:
        info = await nodes.submit(0, spec, functions)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle

from tests.cluster.agent_support import LONGEST, SECRET, token_file, until
from upipe.cluster import keeping, routes, wire
from upipe.cluster.client import Client, Target
from upipe.cluster.record import ENDED, Shipment
from upipe.errors import ClusterError
from upipe.graph.spec import PipeSpec
from upipe.runtime.worker import Bundle

ROOT = Path(__file__).resolve().parents[2]


class Nodes:
    """See above. Node i is labelled n<i>=yes."""

    def __init__(self, directory: Path, patient: bool) -> None:
        self.directory = directory
        self.program = "tests.cluster.patient" if patient else "upipe.cli.node"
        self.token = token_file(directory)
        self.agents: dict[int, subprocess.Popen[Any]] = {}

    def data(self, node: int) -> Path:
        return self.directory / f"n{node}"

    def log(self, node: int) -> Path:
        return self.directory / f"n{node}.log"

    def start(self, node: int, *options: str) -> subprocess.Popen[Any]:
        """Start its agent; others are found by the lines they printed."""
        self.data(node).mkdir(mode=0o700, exist_ok=True)
        seeds = [word for other in self.agents if other != node for word in ("--join", self.address(other))]
        with self.log(node).open("ab") as log:
            self.agents[node] = subprocess.Popen(
                [sys.executable, "-m", self.program, "--port", "0", "--data-dir", str(self.data(node)),
                 "--token-file", str(self.token), "--labels", f"n{node}=yes", "--no-multicast", *seeds, *options],
                cwd=self.directory, env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return self.agents[node]

    def said(self, node: int) -> str:
        return self.log(node).read_text()

    def address(self, node: int) -> str:
        lines = [line for line in self.said(node).splitlines() if "listens at" in line]
        return lines[-1].rpartition(" ")[2]

    def id(self, node: int) -> str:
        return (self.data(node) / "node_id").read_text().strip()

    def client(self, node: int) -> Client:
        return Client(Target(unix=self.data(node) / "node.sock"), SECRET)

    async def call(self, node: int, route: Any, body: Any = None, **parameters: str) -> Any:
        async with self.client(node) as client:
            return await client.call(route, body, **parameters)

    async def met(self, *nodes: int, seconds: float = LONGEST) -> None:
        """Until these know each other."""

        async def known(node: int) -> int:
            try:
                members = await self.call(node, routes.MEMBERS)
            except ClusterError:
                return 0
            return sum(one.state == "alive" for one in members.members)

        async with asyncio.timeout(seconds):
            for node in nodes:
                while await known(node) < len(nodes):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    async def submit(self, node: int, spec: PipeSpec, functions: dict[str, Callable[..., Any]]) -> wire.PipeInfo:
        """Run a pipe without a submitting process that stays."""
        code = {}
        async with self.client(node) as client:
            for name, function in functions.items():
                data = cloudpickle.dumps(Bundle(function, None, {}, ()))
                code[name] = hashlib.sha256(data).hexdigest()
                await client.upload(routes.PUT_CODE, data, sha256=code[name])
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            shipment = Shipment(code, packages={"cloudpickle": ""}, python=python)
            return await client.call(routes.SUBMIT, wire.PipeRequest(f"{spec.name}-1", spec, shipment))

    async def info(self, node: int, pipe: str) -> wire.PipeInfo:
        found: wire.PipeInfo = await self.call(node, routes.PIPE, pipe=pipe)
        return found

    async def ended(self, node: int, pipe: str, seconds: float = LONGEST) -> wire.PipeInfo:
        """Until the pipe is over, and nothing of it is left."""
        async with asyncio.timeout(seconds):
            while True:
                try:
                    info = await self.info(node, pipe)
                    if info.told.state in ENDED and info.closed:
                        return info
                except ClusterError:
                    pass
                await asyncio.sleep(0.05)

    def workers(self) -> dict[str, int]:
        """Pids of all workers of all nodes, by name, as processes are called."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/comm"):
            try:
                name, status = path.read_text().strip(), (path.parent / "environ").read_bytes()
            except OSError:
                continue
            if "#" in name and str(self.directory).encode() in status + (path.parent / "cmdline").read_bytes():
                found[name] = int(path.parent.name)
        return found

    def keepers(self) -> list[int]:
        """Pids of the keepers of all nodes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            if b"upipe.cluster.keeper" in words and str(self.directory).encode() in words:
                found.append(int(path.parent.name))
        return found

    def kill(self, node: int, how: int = signal.SIGKILL) -> int:
        """Signal its agent, and wait for its end."""
        self.agents[node].send_signal(how)
        return self.agents[node].wait(60)

    def close(self) -> None:
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.kill()
            agent.wait(60)
        for pid in self.keepers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def nodes_of(count: int, directory: Path, *options: str, patient: bool = False) -> AsyncIterator[Nodes]:
    """So many that know each other; at the end nothing of them is left. patient: see patient.py."""
    nodes = Nodes(directory, patient)
    try:
        for node in range(count):
            nodes.start(node, *options)
            await until(lambda node=node: "listens at" in nodes.said(node) or nodes.agents[node].poll() is not None)
        await nodes.met(*range(count))
        yield nodes
    finally:
        nodes.close()


__all__ = ["Nodes", "keeping", "nodes_of"]
