"""Hosts, agents, keepers, workers and cables fail at random while a pipe runs over them. See faults.py.

The oracle is the ledger outside uPipe. What must hold for every seed:
  - no number is missing, and the pipe completes by itself, with balanced books;
  - once all is mended, while it still runs, every worker runs exactly once, over all hosts;
  - at the end nothing of it is left: no process, no shared memory, no socket, no orders.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from tests.cluster.faults import Faults, drawn
from tests.cluster.hosts import Hosts, hosts_of, until
from tests.cluster.traced import stamp
from upipe.cluster.dealings import Save

pytestmark = pytest.mark.timeout(400)
LONG = os.environ.get("UPIPE_LONG") == "1"
SEEDS = [int(word) for word in os.environ.get("UPIPE_SEEDS", "").split()] or (list(range(40)) if LONG else [1])
SECONDS, WORK = (30.0, 6) if LONG else (12.0, 6)


def tell(line: str) -> None:
    print(f"{stamp()} {line}", file=sys.stderr, flush=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pipe_survives_whatever_happens_to_its_hosts(seed: int, tmp_path: Path) -> None:
    count = 3 + (seed % 2 if LONG else 0)
    plan = drawn(seed, count, SECONDS)
    with hosts_of(count, tmp_path, traced=True) as hosts:
        hosts.start()
        flag = tmp_path / "enough"
        program = hosts.submit(0, "chain.py", f"--until={flag}", "--rate=200", "--source=h0", f"--work={WORK}")
        until(lambda: program.poll() is not None or len(hosts.seen()) >= 100, 60, "it begins")
        Faults(hosts, tell).run(plan)
        assert program.poll() is None, hosts.result(program)
        hosts.wait_for_members(30)
        wanted = {"numbers#0", "record#0", *(f"work#{index}" for index in range(WORK))}
        once = Counter(dict.fromkeys(wanted, 1))
        until(lambda: hosts.running() == once, 40, lambda: f"every worker once: {hosts.running()}\n{hosts.state()}")
        flag.touch()
        told = hosts.result(program, 60)
        assert told["state"] == "completed" and told["balanced"], told
        seen = hosts.seen()
        missing = sorted(set(range(int(Path(f"{flag}.count").read_text()))) - set(seen))
        assert not missing, f"{len(missing)} are missing: {missing[:20]}\n{hosts.told()}"
        tell(f"{len(seen)} numbers, {sum(seen.values()) - len(seen)} again; {told}")
        until(lambda: not left(hosts), 20, lambda: f"nothing is left: {left(hosts)}\n{hosts.told()}")


def left(hosts: Hosts) -> list[str]:
    """What a pipe that has ended left on hosts whose agents live."""
    found: list[str] = []
    for host, agent in hosts.agents.items():
        found += [f"process {pid} on h{host}" for pid in hosts.processes(host) if pid != agent.pid]
        found += [f"zombie {pid} on h{host}" for pid in zombies(agent.pid)]
        found += [str(path) for path in hosts.shm(host).glob("*/*") if path.parent.name.split("-")[0] != str(agent.pid)]
        found += [str(path) for path in hosts.data(host).glob("pipes/*/*.sock")]
        found += [str(path) for path in hosts.data(host).glob("parts/*")]
        found += [record(path) for path in hosts.data(host).glob("records/[!.]*") if not path.name.endswith("@ended")]
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
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(one) for one in children if ") Z " in Path(f"/proc/{one}/stat").read_text()]
