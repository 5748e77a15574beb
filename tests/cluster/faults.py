"""What may happen to hosts, drawn from a seed: a plan of faults with their ends, and how each is done to Hosts.

    for fault in drawn(seed, hosts=3, spared=0, seconds=20.0): ...      pure
    Faults(hosts).run(plan)                                             does them in time, and waits for the last end

The spared host holds what only it has (the source, the submitting process): its agent may die and its workers may be
stopped, but it never dies as a whole, and is never away for as long as it takes to be called dead - unless the machine
is slow, since the start of an agent comes on top. Then its source begins anew, and the oracle has to see why.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import Hosts, until

ANYWHERE = ("kill worker", "stop worker", "stop keeper", "kill agent")
ELSEWHERE = (*ANYWHERE, "end agent", "kill host", "cut", "cut one way", "kill keeper")
"""Faults of hosts that are not spared."""
DISKS = (*ELSEWHERE, "fill disk")
"""Where each host has a small disk (hosts_of)."""
BRIEF = 2.0
"""Seconds that a spared host may be without its agent at most."""


@dataclass(frozen=True)
class Fault:
    """One fault of one host."""

    at: float
    """Seconds after the start."""
    kind: str
    host: int
    seconds: float
    """Until it is mended, where there is something to mend."""
    pick: float
    """0..1: which worker, or which other host."""

    def __str__(self) -> str:
        return f"{self.at:5.1f} s: {self.kind} h{self.host} for {self.seconds:.1f} s"


def drawn(
    seed: int, hosts: int, seconds: float, spared: int = 0, overlap: float = 0.3, kinds: tuple[str, ...] = ELSEWHERE
) -> list[Fault]:
    """Faults that begin within `seconds`, in order.

    Args:
        kinds: of hosts that are not spared.
        overlap: share of faults that begin before the one before is mended.
    """
    rng = random.Random(seed)
    found: list[Fault] = []
    at = 0.5
    while at < seconds:
        host = rng.randrange(hosts)
        kind = rng.choice(ANYWHERE if host == spared else kinds)
        longest = BRIEF if host == spared else 10.0
        fault = Fault(at, kind, host, rng.uniform(0.1, longest), rng.random())
        found.append(fault)
        at += rng.uniform(0.3, 2.0) + (0.0 if rng.random() < overlap or kind == "kill worker" else fault.seconds)
    return found


class Faults:
    """Does faults to hosts. A host has one at a time: what comes while another one lasts waits for its end."""

    def __init__(
        self, hosts: Hosts, tell: Callable[[str], None] = print, program: subprocess.Popen[str] | None = None
    ) -> None:
        self.hosts = hosts
        self.program = program
        """That submitted the pipe; for "kill program"."""
        self._tell = tell
        self._locks = [threading.Lock() for _ in range(hosts.lan.hosts)]
        self._began = 0.0
        self._wrong: list[BaseException] = []

    def run(self, plan: list[Fault]) -> None:
        """All of them; returns when the last is mended."""
        self._began = time.monotonic()
        threads = [threading.Thread(target=self._one, args=(fault,), name=str(fault)) for fault in plan]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._wrong:
            raise self._wrong[0]

    def _one(self, fault: Fault) -> None:
        try:
            time.sleep(max(0.0, self._began + fault.at - time.monotonic()))
            with self._locks[fault.host]:
                self._tell(f"{time.monotonic() - self._began:5.1f} s: {fault.kind} h{fault.host}")
                getattr(self, "_" + fault.kind.replace(" ", "_"))(fault)
                self._tell(f"{time.monotonic() - self._began:5.1f} s: mended {fault.kind} h{fault.host}")
        except BaseException as error:  # told by run()
            self._wrong.append(error)

    # ------------------------------------------------------------------ processes

    def _kill_worker(self, fault: Fault) -> None:
        found = self.hosts.workers(fault.host)
        if found:
            _signal(found[int(fault.pick * len(found))], signal.SIGKILL)

    def _stop_worker(self, fault: Fault) -> None:
        found = self.hosts.workers(fault.host)
        self._stop(found[int(fault.pick * len(found)) :][:1], fault.seconds)

    def _stop_keeper(self, fault: Fault) -> None:
        self._stop(keepers(self.hosts, fault.host), fault.seconds)

    def _stop(self, pids: list[int], seconds: float) -> None:
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in pids:
            _signal(pid, signal.SIGCONT)

    def _kill_keeper(self, fault: Fault) -> None:
        for pid in keepers(self.hosts, fault.host):
            _signal(pid, signal.SIGKILL)

    def _kill_program(self, fault: Fault) -> None:
        assert self.program is not None
        self.program.kill()
        self.program.wait(60)

    def _kill_agent(self, fault: Fault) -> None:
        self.hosts.kill_agent(fault.host)
        time.sleep(fault.seconds)
        self.hosts.start_agent(fault.host)

    def _end_agent(self, fault: Fault) -> None:
        self.hosts.stop_agent(fault.host)
        time.sleep(fault.seconds)
        self.hosts.start_agent(fault.host)

    def _kill_host(self, fault: Fault) -> None:
        self.hosts.kill_host(fault.host)
        self.hosts.agents[fault.host].wait(60)
        time.sleep(fault.seconds)
        self.hosts.start_agent(fault.host)

    def _fill_disk(self, fault: Fault) -> None:
        until(lambda: self.hosts.living(fault.host), 60, "the agent has begun: with a full disk it would refuse to")
        self.hosts.disks[fault.host].fill()
        time.sleep(fault.seconds)
        self.hosts.disks[fault.host].free()

    # ------------------------------------------------------------------ cables

    def _cut(self, fault: Fault) -> None:
        self.hosts.lan.cut(fault.host)
        time.sleep(fault.seconds)
        self.hosts.lan.join(fault.host)

    def _cut_one_way(self, fault: Fault) -> None:
        """What it says to one of the others is lost."""
        others = [host for host in range(self.hosts.lan.hosts) if host != fault.host]
        other = others[int(fault.pick * len(others))]
        self.hosts.lan.cut_one_way(fault.host, other)
        time.sleep(fault.seconds)
        self.hosts.lan.join_one_way(fault.host, other)


def keepers(hosts: Hosts, host: int) -> list[int]:
    """The keepers there: not their fork servers and workers, which are below them."""
    found: list[int] = []
    for pid in hosts.processes(host):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            leads = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3]) == pid
            if b"upipe.cluster.keeper" in words and leads:
                found.append(pid)
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
