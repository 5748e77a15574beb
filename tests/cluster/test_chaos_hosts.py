"""Hosts, agents, keepers, workers and cables fail at random while a pipe runs over them. See faults.py.

The oracle is the ledger outside uPipe. What must hold for every seed:
  - no number is missing, none is seen twice without a death that explains it, and no two copies of the source send
    (oracle.py); the pipe completes by itself, with balanced books;
  - once all is mended, while it still runs, every worker runs exactly once, over all hosts;
  - at the end nothing of it is left: no process, no shared memory, no socket, no orders. So it is, too, some time after
    the process that submitted it was killed.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.faults import DISKS, ELSEWHERE, Fault, Faults, drawn
from tests.cluster.hosts import Hosts, hosts_of, left, until
from tests.cluster.oracle import Losses, wrong
from tests.cluster.traced import stamp
from upipe.cluster.desk import SILENT

pytestmark = pytest.mark.timeout(400)
LONG = os.environ.get("UPIPE_LONG") == "1"
SEEDS = [int(word) for word in os.environ.get("UPIPE_SEEDS", "").split()] or (list(range(60)) if LONG else [1])
FULL_DISKS = 40
"""Seeds from here on fill disks, too."""
WANDERING = range(2, 60, 3)
"""Seeds whose source runs on a host that may be cut off or die, and then begins anew on another one."""
ORPHANED = range(4, 60, 7)
"""Seeds in whose middle the submitting process is killed."""
SECONDS, WORK = (30.0, 6) if LONG else (12.0, 6)


def tell(line: str) -> None:
    print(f"{stamp()} {line}", file=sys.stderr, flush=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pipe_survives_whatever_happens_to_its_hosts(seed: int, tmp_path: Path) -> None:
    count = 3 + (seed % 2 if LONG else 0)
    small = seed >= FULL_DISKS
    plan = drawn(seed, count, SECONDS, kinds=DISKS if small else ELSEWHERE)
    with hosts_of(count, tmp_path, traced=True, small_disks=small) as hosts:
        hosts.start()
        flag = tmp_path / "enough"
        where = ("--sink=h0", "--apart=record") if seed in WANDERING else ("--source=h0",)
        program = hosts.submit(0, "chain.py", f"--until={flag}", "--rate=200", *where, f"--work={WORK}")
        until(lambda: program.poll() is not None or len(hosts.seen()) >= 100, 60, "it begins")
        if seed in ORPHANED:
            plan = sorted([*plan, Fault(SECONDS / 2, "kill program", 0, 0.0, 0.0)], key=lambda fault: fault.at)
        Faults(hosts, tell, program).run(plan)
        if seed in ORPHANED:
            hosts.wait_for_members()
            until(lambda: not left(hosts), SILENT + 60, lambda: f"it ends: {left(hosts)}\n{hosts.told()}")
            return
        assert program.poll() is None, hosts.result(program)
        hosts.wait_for_members()
        wanted = {"numbers#0", "record#0", *(f"work#{index}" for index in range(WORK))}
        once = Counter(dict.fromkeys(wanted, 1))
        until(lambda: hosts.running() == once, 100, lambda: f"every worker once: {hosts.running()}\n{hosts.state()}")
        flag.touch()
        told = hosts.result(program)
        assert told["state"] == "completed" and told["balanced"], told
        seen, losses = hosts.seen(), suffered(hosts, plan, seed in WANDERING)
        tell(f"{len(seen)} numbers, {sum(seen.values()) - len(seen)} again; {losses}; {told}")
        found = wrong(hosts.sightings(), int(Path(f"{flag}.count").read_text()), losses)
        assert not found, "\n".join([*found, hosts.told()])
        until(lambda: not left(hosts), 60, lambda: f"nothing is left: {left(hosts)}\n{hosts.told()}")


def suffered(hosts: Hosts, plan: list[Fault], wandering: bool) -> Losses:
    """What died, by what was done to workers, and by what the coordinators gave up."""
    workers = sum(fault.kind in ("kill worker", "stop worker") for fault in plan)
    given_up = hosts.given_up()
    source = bool(given_up) if wandering else hosts.node_id(0) in given_up
    return Losses(workers, len(given_up), source)
