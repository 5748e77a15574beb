"""Hosts and cables fail while a pipe runs over three of them: nothing is lost, it goes on by itself, books balance."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.faults import keepers
from tests.cluster.hosts import Hosts, hosts_of, left, until
from tests.cluster.oracle import ON_ITS_WAY
from tests.support import crowded
from upipe.cluster.desk import BROKEN
from upipe.cluster.timing import Timing

pytestmark = pytest.mark.timeout(240)
COUNT, RATE, WORK = 2400, 300.0, 6
ONE_EACH = 2
"""Numbers seen again after two workers were killed: each held one, whose result may have gone out before."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with hosts_of(3, tmp_path) as found:
        found.start()
        yield found


def begin(hosts: Hosts, *arguments: str, client: int = 0, source: str = "h0", sink: str = "h2") -> Any:
    """Start the chain; returns when some numbers arrived at its end."""
    program = hosts.submit(
        client, "chain.py", f"--count={COUNT}", f"--rate={RATE}", f"--work={WORK}", f"--source={source}",
        f"--sink={sink}", *arguments,
    )  # fmt: skip
    arrived(hosts, program, COUNT // 10)
    return program


def arrived(hosts: Hosts, program: subprocess.Popen[str], count: int, seconds: float = 60.0) -> None:
    """Wait until so many different numbers are in the ledger."""
    until(lambda: program.poll() is not None or len(hosts.seen()) >= count, seconds, f"{count} numbers arrive")
    if program.poll() is not None:
        hosts.result(program)  # says how it ended, when it failed


def complete(hosts: Hosts, program: subprocess.Popen[str], again: int, seconds: float = 150.0) -> dict[str, Any]:
    """The pipe ended well, nothing is missing, and at most `again` numbers were seen more than once."""
    told = hosts.result(program, seconds)
    seen = hosts.seen()
    enough = hosts.directory / "enough.count"
    count = int(enough.read_text()) if enough.exists() else COUNT
    missing = sorted(set(range(count)) - set(seen))
    assert not missing, f"{len(missing)} are missing: {missing[:20]}\n{hosts.told()}"
    assert told["state"] == "completed" and told["balanced"], told
    repeated = sum(times - 1 for times in seen.values())
    print(f"{len(seen)} numbers, {repeated} of them again")
    assert repeated <= again, f"{repeated} numbers were seen again"
    return told


def every_worker_once(hosts: Hosts, program: subprocess.Popen[str], *where: int) -> None:
    """While the pipe runs: each worker runs once over all hosts, and `where` have some of the work."""
    wanted = Counter({"numbers#0": 1, "record#0": 1, **{f"work#{index}": 1 for index in range(WORK)}})

    def met() -> bool:
        assert program.poll() is None, f"it has ended: {program.communicate()}\n{hosts.told()}"
        return hosts.running() == wanted and all(hosts.workers(host, "work") for host in where)

    until(met, 100, lambda: f"{hosts.running()}\n{hosts.state()}")


def test_without_failures_each_number_arrives_exactly_once(hosts: Hosts) -> None:
    program = begin(hosts)
    assert all(hosts.workers(host, "work") for host in range(3)), "work is spread over all hosts"
    told = complete(hosts, program, again=0)
    assert told["edges"]["numbers>work"] == [COUNT, COUNT, 0, 0]


def test_a_worker_is_killed(hosts: Hosts) -> None:
    program = begin(hosts)
    for host in (1, 2):
        os.kill(hosts.workers(host, "work")[0], signal.SIGKILL)
    complete(hosts, program, again=ONE_EACH)


def test_an_agent_is_killed_and_started_again_while_its_workers_run_on(tmp_path: Path) -> None:
    """Away for longer than an agent that others miss may be: its workers stay, since these are patient."""
    with hosts_of(3, tmp_path, patient=True) as hosts:
        hosts.start()
        enough = hosts.directory / "enough"
        program = begin(hosts, f"--until={enough}")
        before = hosts.workers(1, "work")
        assert before
        hosts.kill_agent(1)
        time.sleep(Timing().detection + 1)
        hosts.start_agent(1)
        hosts.wait_for_members()
        arrived(hosts, program, len(hosts.seen()) + COUNT // 4)
        assert hosts.workers(1, "work") == before, "the same processes"
        enough.touch()
        complete(hosts, program, again=0)


def test_the_agent_that_coordinates_is_killed_for_good_and_its_workers_go_elsewhere(hosts: Hosts) -> None:
    program = begin(hosts, "--cluster=10.77.0.2:7420", source="h0", sink="h2")
    hosts.kill_host(1)
    complete(hosts, program, again=ON_ITS_WAY)


def test_a_host_dies_with_all_its_processes(hosts: Hosts) -> None:
    program = begin(hosts)
    hosts.kill_host(1)
    began = time.monotonic()
    arrived(hosts, program, COUNT // 2)
    assert time.monotonic() - began < 30 * crowded()
    complete(hosts, program, again=ON_ITS_WAY)


def test_a_host_comes_back_and_takes_work_again(hosts: Hosts) -> None:
    program = begin(hosts)
    hosts.kill_host(1)
    until(lambda: len(hosts.living(0)) == 2, 60, "its death is known")
    hosts.start_agent(1)
    hosts.wait_for_members()
    every_worker_once(hosts, program, 0, 1, 2)
    complete(hosts, program, again=ON_ITS_WAY)


@pytest.mark.parametrize("way", ["both ways", "one way"])
def test_the_network_of_a_host_is_cut_for_thirty_seconds(hosts: Hosts, way: str) -> None:
    enough = hosts.directory / "enough"
    program = begin(hosts, f"--until={enough}")
    if way == "both ways":
        hosts.lan.cut(1)
    else:
        hosts.lan.cut_one_way(1, 2)  # first, or results would go on leaving that it cannot tell as finished
        hosts.lan.cut_one_way(1, 0)
    until(lambda: len(hosts.living(0)) == 2, 60, "it is taken for dead")
    time.sleep(30)
    assert not hosts.workers(1, "record")
    until(lambda: len(hosts.seen()) > 20 * RATE, 60, "the others go on")
    if way == "both ways":
        hosts.lan.join(1)
    else:
        hosts.lan.join_one_way(1, 0)
        hosts.lan.join_one_way(1, 2)
    every_worker_once(hosts, program, 0, 1, 2)
    enough.touch()
    complete(hosts, program, again=ON_ITS_WAY)
    until(lambda: not hosts.workers(1), 60, "what ran has ended")


def test_all_agents_are_restarted_one_after_another(hosts: Hosts) -> None:
    program = begin(hosts)
    for host in range(3):
        hosts.stop_agent(host)
        hosts.start_agent(host)
        hosts.wait_for_members()
    complete(hosts, program, again=ON_ITS_WAY)


def test_the_submitting_process_is_killed(hosts: Hosts) -> None:
    """Its pipe ends everywhere BROKEN seconds later, and leaves nothing: it is nobody's any more."""
    program = begin(hosts, f"--until={hosts.directory / 'never'}")
    program.kill()
    program.wait(60)
    took = until(lambda: not left(hosts), BROKEN + 60, lambda: f"it ends: {left(hosts)}\n{hosts.told()}")
    assert took > BROKEN / 2
    assert "the process that submitted it is gone" in "".join(hosts.log(host).read_text() for host in range(3))


def test_the_disk_of_a_node_is_full(tmp_path: Path) -> None:
    """It says so, and what it has to write waits; the others go on, and with room it follows."""
    with hosts_of(3, tmp_path, small_disks=True) as hosts:
        hosts.start()
        enough = tmp_path / "enough"
        program = begin(hosts, f"--until={enough}")
        hosts.disks[1].fill()
        os.kill(keepers(hosts, 1)[0], signal.SIGKILL)  # what it had is to run elsewhere, then here again
        sentence = "No space left on device): make room on that disk"
        until(lambda: sentence in hosts.log(1).read_text(), 60, lambda: f"it says so\n{hosts.told()}")
        arrived(hosts, program, len(hosts.seen()) + 300)
        said = hosts.log(1).read_text()
        assert said.count(sentence) <= 2, said  # once for each way it failed
        hosts.disks[1].free()
        every_worker_once(hosts, program, 0, 1, 2)
        enough.touch()
        complete(hosts, program, again=ON_ITS_WAY)
        until(lambda: not left(hosts), 60, lambda: f"nothing is left: {left(hosts)}")
