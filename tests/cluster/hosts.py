"""Hosts for tests of the whole cluster: an agent in each network namespace, with its own shared memory and data.

    with hosts_of(3, tmp_path) as hosts:
        hosts.start()                               upipe-node on each, found by multicast
        hosts.submit(0, "chain.py", "--count=1000") a program there that starts a pipe on the cluster
        hosts.kill_host(1); hosts.lan.cut(2) ...

The oracle is a ledger outside uPipe: the last stage appends each number that it saw to a file of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tests.cluster.disks import SmallDisk
from tests.cluster.netns import Lan, lan_of
from tests.cluster.oracle import Sighting
from tests.support import files, proc_words
from upipe.cluster import routes, token
from upipe.cluster.client import Client, Target
from upipe.cluster.dealings import Save
from upipe.cluster.keepers import Keeper
from upipe.cluster.keeping import KeeperNews
from upipe.errors import ClusterError

ROOT = Path(__file__).resolve().parents[2]
JOBS = Path(__file__).parent / "jobs"
PORT = 7420


def until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> float:
    """Wait for a condition; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began >= seconds:
            raise AssertionError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.02)
    return time.monotonic() - began


@contextlib.contextmanager
def hosts_of(
    count: int, directory: Path, traced: bool = False, small_disks: bool = False, patient: bool = False
) -> Iterator[Hosts]:
    """Hosts with one cluster's token, none started; at the end nothing of them is left.

    Args:
        traced: agents and programs write what they are told and say into trace-<host> (traced.py). With the agents'
            logs, keepers' directories, ledger and, when it fails, `evidence`, they stay in the directory.
        small_disks: the data directory of each host is a disk of its own that can be full (Hosts.disks).
        patient: agents miss nobody who is away for as long as a start takes (patient.py).
    """
    with lan_of(count) as lan:
        hosts = Hosts(lan, directory, traced, patient)
        try:
            if small_disks:
                hosts.disks.update({host: SmallDisk(hosts.data(host)) for host in range(count)})
            yield hosts
        except BaseException:
            (directory / "evidence").write_text(hosts.evidence())
            raise
        finally:
            hosts.close()


class Hosts:
    """See above. Host i is labelled host=h<i>; the directory must be short enough for Unix sockets below it."""

    def __init__(self, lan: Lan, directory: Path, traced: bool = False, patient: bool = False) -> None:
        self.lan = lan
        self.traced = traced
        self.program = "tests.cluster.patient" if patient else "upipe.cli.node"
        self.directory = directory
        self.agents: dict[int, subprocess.Popen[Any]] = {}
        self.disks: dict[int, SmallDisk] = {}
        self.token = directory / "token"
        self.ledger = directory / "ledger"
        self.ledger.mkdir()
        token.create(self.token)

    # ------------------------------------------------------------------ hosts and agents

    def environment(self, host: int) -> dict[str, str]:
        """Of every process of a host."""
        shm = self.shm(host)
        shm.mkdir(0o700, exist_ok=True)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "UPIPE_SHM": str(shm), "UPIPE_TOKEN_FILE": str(self.token), "PYTHONPATH": path,
                "UPIPE_TEST_LEDGER": str(self.ledger)}  # fmt: skip

    def shm(self, host: int) -> Path:
        """Its root of sessions."""
        return Path(f"/dev/shm/upipe-test-{os.getpid()}-h{host}")

    def start(self, *hosts: int, options: tuple[str, ...] = ()) -> None:
        """Start agents (all hosts by default); returns when each of them knows all that run."""
        for host in hosts or range(self.lan.hosts):
            self.start_agent(host, options=options)
        self.wait_for_members()

    def start_agent(self, host: int, options: tuple[str, ...] = ()) -> None:
        """Start one; it keeps its data directory."""
        with open(self.log(host), "ab") as log:
            self.agents[host] = self.lan.popen(
                host, sys.executable, "-m", *self._traced(host, "node", [self.program]),
                "--cluster", "test", "--host", "0.0.0.0",
                "--data-dir", str(self.data(host)), "--labels", f"host=h{host}", *options,
                env=self.environment(host), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def _traced(self, host: int, what: str, command: list[str]) -> list[str]:
        if not self.traced:
            return command
        more = command if what == "program" else []
        return ["tests.cluster.traced", str(self.directory / f"trace-h{host}"), what, *more]

    def data(self, host: int) -> Path:
        """Its data directory."""
        return self.directory / f"d{host}"

    def log(self, host: int) -> Path:
        """What its agent printed."""
        return self.directory / f"agent{host}.log"

    def node_id(self, host: int) -> str:
        """Of its agent."""
        return (self.data(host) / "node_id").read_text().strip()

    def wait_for_members(self, seconds: float = 60.0) -> float:
        """Until every agent that runs holds all that run alive."""
        running = [host for host, agent in self.agents.items() if agent.poll() is None]

        def met() -> bool:
            return all(len(self.living(host)) >= len(running) for host in running)

        return until(met, seconds, "all agents know each other")

    def living(self, host: int) -> set[str]:
        """Node ids that the agent of a host holds alive; empty while it does not answer."""
        try:
            found = self.ask(host, routes.MEMBERS)
        except ClusterError:
            return set()
        return {one.info.node_id for one in found.members if one.state == "alive"}

    def ask(self, host: int, route: Any, body: Any = None, **parameters: str) -> Any:
        """Ask its agent over its Unix socket, which no network namespace hides."""

        async def call() -> Any:
            async with Client(Target(unix=self.data(host) / "node.sock"), token.load(self.token)) as client:
                return await client.call(route, body, attempts=1, **parameters)

        return asyncio.run(call())

    # ------------------------------------------------------------------ programs

    def submit(self, host: int, job: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a program of tests/cluster/jobs there; its output is text in pipes."""
        command = [str(JOBS / job)]
        if self.traced:
            command = ["-m", *self._traced(host, "program", command)]
        return self.lan.popen(
            host, sys.executable, *command, *arguments, env=self.environment(host), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=self.directory,
        )  # fmt: skip

    def result(self, program: subprocess.Popen[str], seconds: float = 120.0) -> dict[str, Any]:
        """Wait for its end; what it printed as JSON in its last line."""
        try:
            out, err = program.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            told = self.told()
            program.kill()
            out, err = program.communicate()
            raise AssertionError(f"no end within {seconds} s\n{out}\n{err}\n{told}") from None
        assert program.returncode == 0, f"status {program.returncode}\n{out}\n{err}\n{self.told()}"
        told: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return told

    def told(self) -> str:
        """What each agent printed last, and knows of pipes and mirrors now, for messages."""
        parts = (f"--- agent {host}\n{self.log(host).read_text()[-3000:]}\n{self._known(host)}" for host in self.agents)
        return "\n".join(parts)

    def _known(self, host: int) -> str:
        try:
            pipes, mirrors = self.ask(host, routes.PIPES).pipes, self.ask(host, routes.MIRRORS).mirrors
        except ClusterError as error:
            return str(error)
        return "\n".join(map(str, (self.node_id(host), *pipes, *mirrors)))

    def state(self) -> str:
        """Where workers should be, by the records and by their keepers, for messages."""

        async def news(directory: Path) -> KeeperNews | None:
            found: list[KeeperNews] = []
            keeper = Keeper(directory, found.append, print)
            if await keeper.find():
                await asyncio.sleep(0.2)
            keeper.close()
            return found[-1] if found else None

        told = []
        for host in range(self.lan.hosts):
            told.append(f"--- h{host} is {self.node_id(host)}")
            for path in files(self.data(host), "records/[!.]*"):
                one = msgspec.msgpack.decode(path.read_bytes(), type=Save).record
                told.append(f"record {one.fence} of {one.coordinator}, {one.state} {one.reasons}: "
                            f"{one.layout.placement.seats} wanted {one.wanted.seats} "
                            f"ended {one.ended} evicted {one.evicted}")
            for path in files(self.data(host), "pipes/*"):
                said = asyncio.run(news(path))
                told.append(f"keeper: {said and (said.fence, said.present, said.left, said.ended, said.workers)}")
        return "\n".join([*told, self.told()])

    def evidence(self) -> str:
        """What can be known of all hosts now, and is not in files that stay."""
        told = []
        for host in range(self.lan.hosts):
            told += [f"--- processes and shared memory of h{host}"]
            for pid in self.processes(host):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    told.append(f"{Path(f'/proc/{pid}/stat').read_text()[:60]} | {words[:200]}")
            told += [str(path) for path in files(self.shm(host), "*/*")]
        try:
            return "\n".join([*told, self.state()])
        except Exception as error:  # the failure that it shall explain counts
            return "\n".join([*told, f"no state: {error!r}", self.told()])

    def seen(self) -> Counter[int]:
        """The ledger: how often the last stage saw each number."""
        return Counter(sighting.number for sighting in self.sightings())

    def sightings(self) -> list[Sighting]:
        """The ledger, in the order of time."""
        lines = [line.split() for path in self.ledger.iterdir() for line in path.read_text().splitlines()]
        found = [Sighting(*map(int, words)) for words in lines if len(words) == 4]  # the last may be half written
        return sorted(found, key=lambda one: one.seen)

    def given_up(self) -> list[str]:
        """Node ids, each time that one was given up or lost its keeper; of traced hosts. From the records: what counts
        is that a coordinator evicted it, not what somebody suspected."""
        found: set[tuple[str, str]] = set()
        for path in files(self.directory, "trace-*"):
            for evicted in re.findall(r" -> Save .* evicted \{(.*?)\}", path.read_text()):
                found.update(re.findall(r"'(\w+)': (\d+)", evicted))
        return [node for node, _ in sorted(found)]

    def processes(self, host: int) -> list[int]:
        """All of a host."""
        return self.lan.processes(host)

    def workers(self, host: int, processor: str = "") -> list[int]:
        """Workers there, by their titles: what stands in /proc/<pid>/comm or cmdline."""
        found = []
        for pid in self.processes(host):
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if re.fullmatch(rf"{re.escape(processor) if processor else '.+'}#[0-9]+", name):
                    found.append(pid)
        return found

    def running(self) -> Counter[str]:
        """How often each worker runs, over all hosts."""
        found: Counter[str] = Counter()
        for host in range(self.lan.hosts):
            for pid in self.workers(host):
                with contextlib.suppress(OSError):  # it ended
                    found[Path(f"/proc/{pid}/comm").read_text().strip()] += 1
        return found

    def kill_host(self, host: int) -> None:
        """Power off: every process of it dies at once, and its shared memory is gone."""
        while left := self.processes(host):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.shm(host), ignore_errors=True)

    def kill_agent(self, host: int) -> None:
        """kill -9 of the agent alone."""
        self.agents[host].kill()
        self.agents[host].wait(60)

    def stop_agent(self, host: int, seconds: float = 100.0) -> None:
        """SIGTERM, and its end."""
        self.agents[host].terminate()
        self.agents[host].wait(seconds)

    def close(self) -> None:
        """Power off all."""
        for host in range(self.lan.hosts):
            self.kill_host(host)
        for disk in self.disks.values():
            disk.close()


def left(hosts: Hosts) -> list[str]:
    """What a pipe that has ended left on hosts whose agents live."""
    found: list[str] = []
    for host, agent in hosts.agents.items():
        found += [f"process {pid} on h{host}" for pid in hosts.processes(host) if pid != agent.pid]
        found += [f"zombie {pid} on h{host}" for pid in zombies(agent.pid)]
        sessions = files(hosts.shm(host), "*/*")
        found += [str(path) for path in sessions if path.parent.name.split("-")[0] != str(agent.pid)]
        found += [str(path) for path in files(hosts.data(host), "pipes/*/*.sock")]
        found += [str(path) for path in files(hosts.data(host), "parts/*")]
        found += [record(path) for path in files(hosts.data(host), "records/[!.]*") if not path.name.endswith("@ended")]
    return found


def record(path: Path) -> str:
    """What a record that is left says."""
    try:
        saved = msgspec.msgpack.decode(path.read_bytes(), type=Save)
    except FileNotFoundError:
        return f"{path}, which is just gone"
    found = saved.record
    return f"{path}: {found.state}, {found.fence}, of {found.coordinator} with {found.members}, {saved.promised=}"


def zombies(parent: int) -> list[int]:
    """Children that nobody waited for."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()  # the parent lives
    return [int(one) for one in children if "Z" in proc_words(f"/proc/{one}/stat")]
