"""What users get wrong, and what their networks do: each a sentence that names what, where and what to do, from the
real commands on hosts of their own. No traceback, no hang, and no exit status 0."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.cluster.hosts import JOBS, PORT, Hosts, hosts_of, until
from tests.cluster.jobs import altered
from tests.cluster.own_certificates import Authority
from upipe.settings import Certificates

pytestmark = [pytest.mark.slow, pytest.mark.system]

UPIPE = (sys.executable, "-c", "from upipe.cli.main import main; main()")
NODE = (sys.executable, "-c", "from upipe.cli.node import main; main()")
ALTERED = (sys.executable, str(JOBS / "altered.py"))
T = TypeVar("T")
DAY = 86_400
NOBODY = "10.77.0.77:7420"
LONGEST = 60.0
"""Seconds for one command, on a busy machine; what fails, fails within 8."""


class Place:
    """Four hosts; an agent runs on the first one. Tests leave it as they found it."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder

    def run(self, host: int, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command there, to its end, in a terminal of 80 columns."""
        known = {**self.hosts.environment(host), "COLUMNS": "80", "XDG_STATE_HOME": str(self.folder / f"state{host}")}
        return self.hosts.lan.run(
            host, *command, env={**known, **environment}, check=False, timeout=LONGEST, cwd=self.folder
        )

    def upipe(self, host: int, *words: str, **environment: str) -> str:
        """`upipe` there: what it says, and it succeeds."""
        done = self.run(host, *UPIPE, *words, **environment)
        assert done.returncode == 0, done
        return done.stdout

    def fails(self, host: int, *words: str, status: int = 1, **environment: str) -> str:
        """`upipe` there fails, with this sentence."""
        return sentence(self.run(host, *UPIPE, *words, **environment), status)

    def refuses(self, host: int, *words: str, **environment: str) -> str:
        """`upipe-node` there does not start, with this sentence."""
        return sentence(self.run(host, *NODE, "--data-dir", str(self.folder / "x"), *words, **environment), 2)

    def doctor(self, host: int, *words: str, status: int = 1, **environment: str) -> str:
        """`upipe doctor --host 0.0.0.0` there: its lines as one, and its exit status."""
        done = self.run(host, *UPIPE, "doctor", "--host", "0.0.0.0", *words, **environment)
        assert done.returncode == status and not done.stderr, done
        assert all(len(line) <= 80 for line in done.stdout.splitlines()), done.stdout
        return " ".join(done.stdout.split())

    def seed(self, host: int = 0, port: int = PORT) -> str:
        return f"{self.hosts.lan.ipv4(host)}:{port}"

    def agent(
        self, host: int, *options: str, program: tuple[str, ...] = NODE, log: str = "", **environment: str
    ) -> Agent:
        """One more agent there, which ends with the block."""
        file = self.folder / (log or f"agent{time.monotonic_ns()}.log")
        data = self.folder / f"d{time.monotonic_ns()}"
        with file.open("ab") as out:
            process = self.hosts.lan.popen(
                host, *program, "--cluster", "test", "--host", "0.0.0.0", "--data-dir", str(data), "--labels",
                f"host=h{host}", *options, env={**self.hosts.environment(host), **environment}, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return Agent(process, file, data)


class Agent:
    """A process of upipe-node, killed at the end of its block."""

    def __init__(self, process: subprocess.Popen[Any], log: Path, data: Path) -> None:
        self.process, self.log, self.data = process, log, data

    def said(self) -> str:
        return self.log.read_text()

    def says(self, pattern: str, seconds: float = LONGEST) -> str:
        """Wait for a line of its log."""
        until(lambda: re.search(pattern, self.said()), seconds, lambda: f"{pattern!r} in\n{self.said()}")
        assert "Traceback" not in self.said(), self.said()
        found = re.search(f".*{pattern}.*", self.said())
        assert found
        return found[0]

    def __enter__(self) -> Agent:
        self.says("seeds: ")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(LONGEST)


def together(*calls: Callable[[], T]) -> list[T]:
    """Make them at the same time: most of a command's time is waiting."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [one.result() for one in [pool.submit(call) for call in calls]]


def sentence(done: subprocess.CompletedProcess[str], status: int) -> str:
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr and not done.stdout, done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("bad")
    with hosts_of(4, folder) as hosts:
        hosts.start_agent(0)
        until(lambda: hosts.living(0), LONGEST, hosts.told)
        yield Place(hosts, folder)


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that adds $UPIPE_TEST_CLOCK seconds to the clock of who loads it."""
    made = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", made, source], check=True, timeout=60)
    return str(made)


def log_of(place: Place, host: int = 0) -> str:
    return place.hosts.log(host).read_text()


# ------------------------------------------------------------------------------------------------- beginning


def test_one_secret_sets_all_up(place: Place) -> None:
    made = place.folder / "made"
    fingerprint = re.search(r"fingerprint (\w+)", place.upipe(0, "token", "create", str(made)))
    assert fingerprint
    copies = [Path(shutil.copy(made, place.folder / f"copy{host}")) for host in range(3)]
    tokens = [("--token-file", str(copy), "--port", "7500", "--cluster", "one") for copy in copies]
    with place.agent(0, *tokens[0]), place.agent(1, *tokens[1]) as second:
        second.says("joined")
        shown = place.upipe(2, "nodes", "--to", place.seed(0, 7500), UPIPE_TOKEN_FILE=str(copies[2]))
        assert shown.count("alive") == 2 and place.seed(1, 7500) in shown
    said = place.fails(2, "nodes", "--to", place.seed(), UPIPE_TOKEN_FILE=str(copies[2]))
    assert place.seed() in said and "both hosts need the same token file" in said and fingerprint[1] in said


def test_nothing_listens_without_a_token_nor_beyond_loopback_without_tls(place: Place) -> None:
    missing = str(place.folder / "nowhere")
    for said in together(
        lambda: place.refuses(1, "--host", "0.0.0.0", UPIPE_TOKEN_FILE=missing),
        lambda: place.fails(1, "nodes", "--to", place.seed(), UPIPE_TOKEN_FILE=missing),
        lambda: place.doctor(1, UPIPE_TOKEN_FILE=missing),
    ):
        assert missing in said and "upipe token create" in said
    assert "tls" not in place.run(1, *NODE, "--help").stdout.lower()  # there is no switch for it
    shouted = place.run(1, sys.executable, "-c", "import socket; s = socket.create_connection(('10.77.0.1', 7420), 5); "
                        "s.sendall(b'GET /v1/node HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); print(s.recv(99))")  # fmt: skip
    assert "HTTP" not in shouted.stdout  # who does not speak TLS hears nothing


def test_a_port_in_use(place: Place) -> None:
    said = place.refuses(0, "--host", "0.0.0.0")
    assert re.search(r"port 7420 on 0\.0\.0\.0 is in use by process \d+ \(python.*\): stop that, or .*--port", said)
    assert "the agent of this host" in place.doctor(0, status=0)  # warnings: it is alone here
    listens = "import socket, time; s = socket.create_server(('0.0.0.0', 7420)); print(flush=True); time.sleep(60)"
    with place.hosts.lan.popen(1, sys.executable, "-c", listens, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None and stranger.stdout.readline()
        assert "port 7420 on 0.0.0.0 is in use by process" in place.doctor(1)
        stranger.kill()


def test_a_seed_that_cannot_be_reached(place: Place) -> None:
    silent, refusing = NOBODY, place.seed(3)
    with place.agent(1, "--join", silent, "--join", refusing, "--join", "dns://nobody.invalid:7420") as agent:
        assert "is `upipe-node` running?; it is tried again" in agent.says(f"cannot join by way of {refusing}")
        assert re.search("firewall|network cut", agent.says(f"cannot join by way of {silent}"))
        assert "asked again" in agent.says("seed dns://nobody.invalid:7420 has no addresses yet")
        agent.says("joined")  # the others are found all the same
    asked, other, seen = together(
        lambda: place.fails(2, "nodes", "--to", silent),
        lambda: place.fails(2, "nodes", "--to", refusing),
        lambda: place.doctor(2, "--join", silent, "--join", refusing),
    )
    assert silent in asked and re.search("firewall|network cut", asked)
    assert f"{refusing} does not answer: nothing listens there" in other
    assert f"peer problem {silent}" in seen and f"peer problem {refusing}" in seen


# ------------------------------------------------------------------------------------------------- mismatches


def test_another_cluster_name(place: Place) -> None:
    with place.agent(1, "--cluster", "mine") as near, place.agent(2, "--cluster", "mine", "--join", place.seed(),
                                                                  "--no-multicast") as far:  # fmt: skip
        assert "'test', this one of 'mine'" in near.says("give both the same --cluster")
        assert place.seed() in far.says("belongs to cluster 'mine'") and "--join" in far.said()
    until(lambda: "is of cluster 'mine', this one of 'test'" in log_of(place), LONGEST, lambda: log_of(place))
    script = place.folder / "hello.py"
    script.write_text("print('hello')")
    said = place.fails(3, "submit", "--cluster", "mine", "--to", place.seed(), "--working-dir", str(place.folder),
                       script.name)  # fmt: skip
    assert f"{place.seed()} is of the cluster 'test', and 'mine' was asked for" in said
    said = place.doctor(3, "--cluster", "mine", "--join", place.seed())
    assert "it is of cluster 'test', wanted is 'mine' → give both the same --cluster" in said


def test_another_version(place: Place) -> None:
    with place.agent(1, "--join", place.seed(), program=(*ALTERED, "other-version", "upipe-node")) as other:
        assert "update node" in other.says("refuses this node: .*runs uPipe 9.9.9")
        said = place.fails(2, "nodes", "--to", place.seed(1))
        assert re.search(r"10\.77\.0\.2:7420 runs uPipe 9\.9\.9 \(protocol 9.*0\.1\.0.*install the same version", said)
        said = place.doctor(2, "--join", place.seed(1))
        assert "it runs uPipe 9.9.9" in said and "→ install the same version on both" in said
    until(lambda: "at 10.77.0.2:7420 runs uPipe 9.9.9" in log_of(place), LONGEST, lambda: log_of(place))


def test_a_clock_off_by_a_day(place: Place, wrong_clock: str) -> None:
    """On host 1 it is tomorrow, on host 2 yesterday."""
    ahead, behind = ({"LD_PRELOAD": wrong_clock, "UPIPE_TEST_CLOCK": str(days * DAY)} for days in (1, -1))
    good, todo = place.seed(), "compare `date -u` on both hosts"
    with place.agent(1, "--join", good, **ahead) as first, place.agent(2, "--join", good, **behind) as second:
        *said, doctor, other = together(
            lambda: place.fails(1, "nodes", "--to", good, **ahead),
            lambda: place.fails(2, "nodes", "--to", good, **behind),
            lambda: place.fails(3, "nodes", "--to", place.seed(1)),
            lambda: place.doctor(3, "--join", place.seed(1), "--join", place.seed(2)),
            lambda: place.doctor(1, "--port", "7421", "--join", good, **ahead),
        )
        for one, where in zip(said, (good, good, place.seed(1)), strict=True):
            assert where in one and "not valid" in one and one.rstrip().endswith(todo)
        assert f"TLS problem {place.seed(1)}" in doctor and f"TLS problem {place.seed(2)}" in doctor and todo in doctor
        assert f"TLS problem {good}" in other and todo in other
        for agent in (first, second):
            assert todo in agent.says(f"cannot join by way of {good}.*not valid")
        for address in map(place.hosts.lan.ipv4, (1, 2)):
            told = re.compile(f"{re.escape(address)}[: ].*{re.escape(todo)}")
            until(lambda told=told: told.search(log_of(place)), LONGEST, lambda: log_of(place))


# ------------------------------------------------------------------------------------------------- no multicast


def test_no_multicast_on_the_network(place: Place) -> None:
    lan = place.hosts.lan
    for host in range(4):  # the last one as well: without it, it still hears what an agent says as it starts
        lan.multicast_passes(host, False)
    try:
        lan.multicast(3, False)
        soon = (sys.executable, "-c", f"from upipe.cluster import neighbours; neighbours.HEAR = 2.0; {NODE[-1]}")
        with place.agent(1, program=soon) as alone, place.agent(2, "--join", place.seed(), program=soon) as joined:
            nobody, one, own, asked = together(
                lambda: place.doctor(1, "--port", "7421", status=0),
                lambda: place.doctor(2, "--port", "7421", "--join", place.seed(), status=0),
                lambda: place.doctor(3, status=0),
                lambda: place.fails(3, "nodes"),
            )
            assert "no node of another host is heard" in nobody and "--join HOST:PORT" in nobody
            assert "10.77.0.1 is on our network and reached, but its multicast is not heard" in one
            assert "run: ip link set eth0 multicast on" in own
            assert "multicast DNS: nobody answered" in asked and "HOST:PORT" in asked
            assert "name one of them with --join HOST:PORT" in alone.says("no other node was heard by multicast")
            assert "--join" in joined.says("at 10.77.0.1 is on our network and reached, but its multicast is not heard")
    finally:
        lan.multicast(3, True)
        for host in range(4):
            lan.multicast_passes(host, True)


# ------------------------------------------------------------------------------------------------- no room


@pytest.fixture
def little_memory(place: Place) -> Iterator[Path]:
    """Host 1 has 20 MiB of shared memory."""
    root = place.hosts.shm(1)
    root.mkdir(0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m,mode=0700", "tmpfs", root], check=True, timeout=LONGEST)
    yield root
    subprocess.run(["umount", "--lazy", root], check=True, timeout=LONGEST)


def test_too_little_shared_memory(place: Place, little_memory: Path) -> None:
    squares, to = str(JOBS / "squares.py"), ("--cluster", place.seed())
    with place.agent(1) as small:
        assert f"only 20 MiB free of 20, at {little_memory}" in small.says("shared memory: ")
        small.says("joined")
        assert re.search(r"10\.77\.0\.2:7420 .* (20|21)(\.\d)?M ", place.upipe(2, "nodes", "--to", place.seed()))
        assert "one edge takes 32 MiB" in place.doctor(1, "--port", "7421")
        assert "completed 10" in place.run(2, sys.executable, squares, *to).stdout  # elsewhere
        done = place.run(2, sys.executable, squares, *to, "--on", "h1")
        assert done.returncode == 1 and "DeclarationError" in done.stderr, done
        assert re.search(r"node \w{16} \(h1\) has [\d,]+ bytes of shared memory left for queues, [\d,]+ are needed",
                         done.stderr), done.stderr  # fmt: skip


def test_memory_that_is_gone_when_the_queues_are_made(place: Place, little_memory: Path) -> None:
    """The node told of more when it was chosen."""
    told = "from upipe.cluster import options, neighbours; options.free_shared_memory = lambda: 1 << 40; " \
        "neighbours.LOOK_EVERY = 99"  # fmt: skip
    with place.agent(1, program=(sys.executable, "-c", f"{told}; {NODE[-1]}")) as small:
        small.says("joined")
        done = place.run(2, sys.executable, str(JOBS / "squares.py"), "--cluster", place.seed(), "--on", "h1")
        assert done.returncode == 1 and "PipeFailed" in done.stderr, done
        assert re.search(r"shared memory available, the queue needs [\d,]+; free some", done.stderr), done.stderr


def test_what_can_never_fit_fails_at_once_with_a_reason_for_each_node(place: Place) -> None:
    with place.agent(1) as second:
        second.says("joined")
        nodes = [place.hosts.node_id(0), (second.data / "node_id").read_text().strip()]
        squares, job = together(
            lambda: place.run(2, sys.executable, str(JOBS / "squares.py"), "--cluster", place.seed(), "--gpu"),
            lambda: place.run(
                2, *UPIPE, "submit", "--to", place.seed(), "--working-dir", str(JOBS), "squares.py", "--gpu"
            ),
        )
    for done, output in ((squares, squares.stderr), (job, job.stdout)):
        assert done.returncode == 1 and "worker square#0 can never run here" in output, done
        assert "ask for less, change its place, or add a node" in output
        for number, node in enumerate(nodes):
            assert f"node {node} (h{number}) has gpu 0 in all, gpu 1 is needed" in output


# ------------------------------------------------------------------------------------------------- certificates


def options_of(own: Certificates) -> tuple[str, ...]:
    return ("--ca", own.ca, "--certificate", own.certificate, "--key", own.key)


def variables_of(own: Certificates) -> dict[str, str]:
    return {"UPIPE_CA": own.ca, "UPIPE_CERTIFICATE": own.certificate, "UPIPE_KEY": own.key}


def test_certificates_of_ones_own(place: Place) -> None:
    ours = Authority(place.folder / "own")
    files = [ours.sign(f"h{host}", place.hosts.lan.ipv4(host)) for host in range(2)]
    me, to = ours.sign("me"), place.seed(0, 7600)
    more = ("--cluster", "own", "--port", "7600")
    with place.agent(0, *more, *options_of(files[0])) as first, place.agent(
        1, *more, "--join", to, *options_of(files[1])
    ) as second:
        first.says("joined")
        second.says("joined")
        nodes, doctor, job, pipe, stranger = together(
            lambda: place.upipe(2, "nodes", "--to", to, **variables_of(me)),
            lambda: place.doctor(2, "--join", to, *options_of(me), status=0),
            lambda: place.run(2, *UPIPE, "submit", "--to", to, *options_of(me), "--working-dir", str(JOBS),
                              "squares.py", "--apart"),
            lambda: place.run(2, sys.executable, str(JOBS / "squares.py"), "--cluster", to, "--apart", "--own", me.ca,
                              me.certificate, me.key),
            lambda: place.fails(2, "nodes", "--to", to),
        )  # fmt: skip
        assert nodes.count("alive") == 2 and "TLS ok" in doctor
        for done in (job, pipe):
            assert (done.returncode, done.stdout) == (0, "completed 10\n"), (done, first.said(), second.said())
        assert to in stranger and "of another CA" in stranger and "UPIPE_CA" in stranger
        wrong = ours.sign("other", "10.9.9.9")
        with place.agent(2, *more, *options_of(wrong)):
            said = place.fails(2, "nodes", "--to", place.seed(2, 7600), *options_of(me))
            assert "does not carry the address by which it was dialled" in said and "subjectAltName" in said


def test_an_expired_certificate(place: Place) -> None:
    ours = Authority(place.folder / "old")
    old, me = ours.sign("old", place.hosts.lan.ipv4(1), life=timedelta(hours=-1)), ours.sign("me")
    soon = ours.sign("soon", place.hosts.lan.ipv4(1))
    program, to = (*ALTERED, "short-lived", "upipe-node"), place.seed(1, 7700)
    with place.agent(1, "--port", "7700", "--cluster", "old", *options_of(soon), program=program) as agent:
        ours.sign("soon", place.hosts.lan.ipv4(1), life=timedelta(seconds=8))  # only now that it runs, however slowly
        agent.says("shows another certificate from now on")
        told = re.compile(rf"the certificate in {re.escape(old.certificate)} expired at .* UTC .*: renew it")
        refused, failed, seen = together(
            lambda: place.refuses(3, *options_of(old)),
            lambda: place.fails(3, "nodes", "--to", place.seed(), *options_of(old)),
            lambda: place.doctor(3, *options_of(old)),
        )
        assert told.search(refused) and told.search(failed) and "certificate problem" in seen and "renew it" in seen
        said = agent.says("the certificate of this node is not renewed.*expired")  # as it ran
        assert soon.certificate in said and "renew it" in said
        said = place.fails(2, "nodes", "--to", to, *options_of(me))
        assert to in said and "has expired" in said and "must be renewed" in said
        ours.sign("soon", place.hosts.lan.ipv4(1))
        until(lambda: agent.said().count("shows another certificate from now on") == 2, LONGEST, agent.said)
        assert "alive" in place.upipe(2, "nodes", "--to", to, *options_of(me))  # without a restart


def test_derived_certificates_are_renewed_while_a_pipe_runs(place: Place) -> None:
    """All connections are cut when every first certificate has expired: pings, mirrors and the client come back."""
    short, more = (*ALTERED, "short-lived"), ("--cluster", "short", "--port", "7800")
    over, to = place.folder / "over", place.seed(1, 7800)
    with place.agent(1, *more, "--no-multicast", program=(*short, "upipe-node")) as one, place.agent(
        2, *more, "--no-multicast", "--join", to, program=(*short, "upipe-node")
    ) as two:
        two.says("joined")
        client = place.hosts.lan.popen(
            3, *short, str(JOBS / "chain.py"), "--cluster", to, "--until", str(over), "--source", "h1", "--sink", "h2",
            "--work", "2", env=place.hosts.environment(3), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: place.hosts.seen(), LONGEST, lambda: f"{one.said()}\n{two.said()}")
        began = time.monotonic()
        until(lambda: time.monotonic() - began > altered.LIFE + 1, LONGEST, "they have expired")
        for agent in (one, two):
            os.kill(agent.process.pid, signal.SIGUSR1)
            agent.says("cut")
        before = len(place.hosts.seen())
        until(lambda: len(place.hosts.seen()) > before + 400, LONGEST, lambda: f"{one.said()}\n{two.said()}")
        over.touch()
        out, err = client.communicate(timeout=LONGEST)
        assert client.returncode == 0 and '"balanced": true' in out, (out, err, one.said(), two.said())
        count = int(Path(f"{over}.count").read_text())
        assert set(place.hosts.seen()) == set(range(count))
        # a node whose answer is late on a busy machine is suspected, and objects
        assert not re.search("died|not renewed", one.said() + two.said()), (one.said(), two.said())
