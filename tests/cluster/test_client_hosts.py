"""The submitting side on real hosts: two agents, a host that lies about being one, and one that only submits."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import JOBS, Hosts, hosts_of, until
from tests.support import crowded
from upipe.cluster import token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
LIAR, CLIENT = 2, 3
MAIN = "from upipe.cli.main import main; main()"
WIDTH = 80
LONGEST = 60.0
"""Seconds to wait for what comes in some, on a busy machine: only to end a test that hangs."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts_of(4, tmp_path_factory.mktemp("c")) as found:
        found.start(0, 1)
        yield found


def upipe(hosts: Hosts, *arguments: str, host: int = CLIENT) -> subprocess.CompletedProcess[str]:
    """The command line on a host, to its end."""
    return hosts.lan.run(host, sys.executable, "-c", MAIN, *arguments, env=hosts.environment(host), timeout=90.0,
                         check=False, cwd=hosts.directory)  # fmt: skip


def keepers(hosts: Hosts) -> list[int]:
    """All processes of pipes on the nodes."""
    agents = {agent.pid for agent in hosts.agents.values()}
    return [pid for host in (0, 1) for pid in hosts.processes(host) if pid not in agents]


def left_in_memory(hosts: Hosts) -> list[str]:
    """Files in the shared memory of the nodes, but for the locks of sessions."""
    return [name for host in (0, 1) for _, _, names in os.walk(hosts.shm(host)) for name in names if name != "lock"]


def shown(told: subprocess.CompletedProcess[str]) -> str:
    """Its output, which fits a terminal."""
    assert told.returncode == 0, told.stderr
    assert all(len(line) <= WIDTH for line in told.stdout.splitlines()), told.stdout
    return told.stdout


def shows(hosts: Hosts, pattern: str, *arguments: str, host: int = CLIENT) -> str:
    """The output of a command, once there is that in it: what agents know of each other comes a moment later."""
    found: list[str] = []

    def look() -> object:
        found.append(shown(upipe(hosts, *arguments, host=host)))
        return re.search(pattern, found[-1])

    until(look, LONGEST, lambda: f"{pattern!r} in {found[-1]}")
    return found[-1]


def test_a_host_without_an_agent_finds_the_cluster_among_liars(hosts: Hosts) -> None:
    heard, secret = hosts.directory / "heard", token.load(hosts.token)
    liar = hosts.lan.popen(
        LIAR, sys.executable, "-m", "tests.cluster.liar", hosts.lan.ipv4(LIAR), secret.fingerprint, str(heard),
        env=hosts.environment(LIAR), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    token.create(hosts.directory / "other-token")
    foreign = hosts.lan.popen(
        LIAR, sys.executable, "-m", "upipe.cli.node", "--cluster", "test", "--host", "0.0.0.0", "--token-file",
        str(hosts.directory / "other-token"), "--data-dir", str(hosts.data(LIAR)),
        env=hosts.environment(LIAR), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert liar.stdout.readline() == "up\n" and "listens" in foreign.stdout.readline()
        told = hosts.result(hosts.submit(CLIENT, "client.py", "ask"))
        # alone on the network they are found out, in a bounded time and one sentence
        for host in (0, 1):
            hosts.lan.cut(host)
        refused = upipe(hosts, "nodes")
        assert refused.returncode == 1 and "no agent of this cluster" in refused.stderr, refused
        assert f"{hosts.lan.ipv4(LIAR)}:7420 is not proven to be of this cluster" in refused.stderr
        assert f"{hosts.lan.ipv4(LIAR)}:7431 did not answer" in refused.stderr
    finally:
        for host in (0, 1):
            hosts.lan.join(host)
        liar.kill()
        foreign.kill()
    assert told["number"] == 13 and told["balanced"] and told["letters"] == [["double", 13]]
    assert told["node"] == hosts.node_id(0) and f"worker double#0 on node {told['node']}" in told["error"]
    assert "in double" in told["error"] and told["seconds"] < 30 * crowded()
    said = heard.read_bytes()
    assert said[:1] == b"\x16" and secret.bearer.encode() not in said  # the first step of TLS, and nothing else
    hosts.wait_for_members()


def test_a_script_travels_with_what_it_imports_and_is_found_from_every_host(hosts: Hosts) -> None:
    work, ready = hosts.directory / "work", hosts.directory / "ready"
    work.mkdir()
    ready.write_text("")
    (work / "script.py").write_text((JOBS / "script.py").read_text())
    for word in ("first", "second"):  # what has changed is not stale
        (work / "beside.py").write_text(f"WORD = {word!r}\n")
        told = upipe(hosts, "submit", "--working-dir", str(work), "script.py", str(ready))
        assert (told.returncode, told.stdout) == (5, f"up\n{word} True False\n"), told.stderr
        assert re.search("job script-.* on node [0-9a-f]{16} ended with exit status 5", told.stderr)
    assert all(shown(upipe(hosts, "jobs", host=host)).count("script-") == 2 for host in (0, 1))


def test_a_running_job_is_shown_followed_and_stopped_from_anywhere(hosts: Hosts) -> None:
    work, ready = hosts.directory / "work2", hosts.directory / "ready2"
    work.mkdir()
    (work / "script.py").write_text((JOBS / "script.py").read_text())
    (work / "beside.py").write_text("WORD = 'hello'\n")
    job = shown(upipe(hosts, "submit", "--detach", "--to", f"{hosts.lan.ipv4(1)}:7420", "--working-dir", str(work),
                      "script.py", str(ready))).strip()  # fmt: skip
    following = hosts.lan.popen(
        0, sys.executable, "-c", MAIN, "logs", job, env=hosts.environment(0), stdout=subprocess.PIPE, text=True
    )
    assert following.stdout.readline() == "up\n"
    following.send_signal(signal.SIGINT)
    assert following.wait(LONGEST) == 130  # and the job goes on
    listed = [shows(hosts, r"script-\w+ +running +[1-9]", "pipes", host=host) for host in (0, 1)]  # whoever is asked
    [pipe] = re.findall(r"script-\w+(?= +running)", listed[0])
    until(lambda: "no dead letters" not in shown(upipe(hosts, "pipe", "letters", pipe)), LONGEST, "letters")
    first, second = hosts.node_id(0)[:8], hosts.node_id(1)[:8]
    shows(hosts, rf"e0-numbers-work\S* +{first} → {second} +\S+ +\S+ \d+\.\d s +\S+ +open", "pipe", pipe)
    shows(hosts, rf"e0-numbers-work\S* +{second} ← {first} +\S+ +\S+ +open", "pipe", pipe)
    letters = upipe(hosts, "pipe", "letters", "--traceback", pipe).stdout
    assert f"work#0 on {second}, from numbers" in letters and "ValueError: no 3 here" in letters, letters
    assert "in work" in letters
    ready.write_text("")
    printed = upipe(hosts, "pipe", "output", pipe)  # until it has ended
    assert f"{second}: worker prints 3 hello\n" in printed.stdout and printed.returncode == 0, printed
    assert upipe(hosts, "logs", job).stdout == "up\nhello True True\n"
    again = upipe(hosts, "pipe", "output", pipe, host=0)  # and it stays
    assert again.stdout == printed.stdout and "no 3 here" in upipe(hosts, "pipe", "letters", pipe).stdout
    ready.unlink()
    job = shown(upipe(hosts, "submit", "--detach", "--working-dir", str(work), "script.py", str(ready))).strip()
    assert f"{job} stopped with exit status -15" in shown(upipe(hosts, "stop", job, host=0))


def test_whatever_ends_a_submitting_process_leaves_nothing_on_the_nodes(hosts: Hosts) -> None:
    until(lambda: not keepers(hosts), LONGEST, "the pipes of earlier tests ended")
    ends = {how: hosts.submit(CLIENT, "client.py", how) for how in ("exception", "leave", "interrupt", "kill")}
    said = {how: program.communicate(timeout=90) for how, program in ends.items()}
    assert all(out == "up\n" for out, _ in said.values()), said
    assert {how: program.returncode for how, program in ends.items()} == {
        "exception": 1, "leave": 0, "interrupt": -signal.SIGINT, "kill": -signal.SIGKILL,
    }  # fmt: skip
    told = "'endless' (resume=True) from the first value; 'add' without its checkpoint"
    assert all(told in err and "Unclosed" not in err for _, err in said.values()), said
    until(lambda: not keepers(hosts), LONGEST, "the cluster missed the one that was killed")
    # who could say good-bye did: only the killed one had to be missed
    logs = "".join(hosts.log(host).read_text() for host in (0, 1))
    assert re.findall(r"pipe end-(\w+)-\w+: the process that submitted it is gone", logs) == ["kill"]
    until(lambda: not left_in_memory(hosts), LONGEST, lambda: f"{left_in_memory(hosts)} goes")
    assert upipe(hosts, "sweep").returncode == 0 and not list(hosts.shm(CLIENT).iterdir())
