"""The commands in the README of examples/04_cluster do, as they stand there, what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.netns import Lan, lan_of
from tests.support import files

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "examples" / "04_cluster" / "README.md"
PRIMES = 664_579
"""Below 10,000,000."""
_COMMANDS = {
    "upipe": f"#!{sys.executable}\nfrom upipe.cli.main import main\nmain()\n",
    "upipe-node": f"#!{sys.executable}\nfrom upipe.cli.node import main\nmain()\n",
    # host b's home lies beside that of host a
    "ssh": '#!/bin/sh\nHOME="$HOME/../$1" exec sh -c "$2"\n',
}

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.timeout(240)]


def commands(prompt: str) -> list[tuple[str, str]]:
    """(host, command) of each line of the README that begins with such a prompt."""
    found = re.findall(rf"^    ({prompt})\$ (.+)$", README.read_text(), re.MULTILINE)
    return [(host or "a", command) for host, command in found]


class Shells:
    """Two hosts of a user, each with a home; they share the checkout and the programs."""

    def __init__(self, lan: Lan, directory: Path) -> None:
        self.lan = lan
        self.directory = directory
        self.nodes: list[subprocess.Popen[str]] = []
        programs = directory / "bin"
        programs.mkdir()
        for name, text in _COMMANDS.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        for host in "ab":
            (directory / host).mkdir()
            self.shm(host).mkdir(0o700)

    def shm(self, host: str) -> Path:
        return Path(f"/dev/shm/upipe-test-{os.getpid()}-{host}")

    def environment(self, host: str) -> dict[str, str]:
        home = self.directory / host
        mine = {name: text for name, text in os.environ.items() if not name.startswith("UPIPE_")}
        return mine | {
            "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "UPIPE_SHM": str(self.shm(host)), "COLUMNS": "80",
            "PATH": f"{self.directory / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def type(self, host: str, command: str) -> str:
        """Run a line in the checkout, as a shell does; what it printed. With & it goes on, once it says it listens."""
        options: dict[str, Any] = {"cwd": self.directory / "checkout", "env": self.environment(host)}
        words = ("sh", "-c", command.removesuffix(" &"))
        if not command.endswith(" &"):
            done = self.lan.run("ab".index(host), *words, timeout=100, check=False, **options)
            assert done.returncode == 0, f"{host}$ {command}\n{done.stdout}{done.stderr}"
            return done.stdout
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        node = self.lan.popen("ab".index(host), "sh", "-c", f"exec {words[2]}", **options)
        self.nodes.append(node)
        assert node.stdout is not None
        first: str = node.stdout.readline()
        assert "listens at" in first, first + node.stdout.read()
        return first

    def met(self, host: str) -> str:
        """`upipe nodes`, once both are in it."""
        began = time.monotonic()
        while (found := self.type(host, "upipe nodes")).count("alive") < 2:
            assert time.monotonic() - began < 60, found
        return found

    def end(self) -> None:
        """Ctrl-C, once; nothing is left."""
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            told = node.communicate(timeout=100)[0]
            assert node.returncode == 0, told
            assert "Traceback" not in told
        for host in "ab":
            assert [str(path) for path in files(self.shm(host), "**/*")] == []
            self.shm(host).rmdir()


@pytest.fixture
def shells(tmp_path: Path) -> Iterator[Shells]:
    with lan_of(2) as lan:
        made = Shells(lan, tmp_path)
        (tmp_path / "checkout").mkdir()
        (tmp_path / "checkout" / "examples").symlink_to(ROOT / "examples")
        yield made
        made.end()


def counted(out: str) -> list[tuple[str, str, int]]:
    """(host, process, primes) of what the script printed; all are there."""
    found = re.findall(r"^ *([\d,]+) by process (\d+) on (\S+)$", out, re.MULTILINE)
    assert f"{PRIMES:,} primes below 10,000,000" in out and "books balanced" in out
    rows = [(host, process, int(primes.replace(",", ""))) for primes, process, host in found]
    assert sum(primes for _, _, primes in rows) == PRIMES
    return rows


def test_two_nodes_on_one_machine(shells: Shells) -> None:
    lines = commands("")
    assert len(lines) == 5 and [command for _, command in lines if "submit" in command] == [lines[3][1]]
    for _, command in lines[:3]:
        shells.type("a", command)
    shells.met("a")
    assert len(counted(shells.type("a", lines[3][1]))) == 4
    told = shells.type("a", lines[4][1])
    nodes = re.findall(r"^([0-9a-f]{16}) +alive +127\.0\.0\.1:742[01]", told, re.MULTILINE)
    assert len(nodes) == 2
    assert all(f"{node[:8]}: " in told for node in nodes), "both had workers"
    assert re.search(r"^primes-\w+ +completed +1,000 +1,000 +0 +0", told, re.MULTILINE)
    assert re.search(r"^primes-\w+ +completed +0 +[0-9a-f]{16}$", told, re.MULTILINE)
    assert all(len(line) <= 80 for line in told.splitlines())


def test_two_hosts_in_five_commands(shells: Shells) -> None:
    lines = commands("[ab]")
    assert len(lines) == 5 and [host for host, _ in lines] == ["a", "a", "a", "b", "a"]
    for host, command in lines[:4]:
        shells.type(host, command)
    shells.met("a")  # by multicast
    assert len(counted(shells.type("a", lines[4][1]))) == 4
    told = shells.type("b", "upipe pipes")
    assert len(set(re.findall(r"^.* ([0-9a-f]{8}): ", told, re.MULTILINE))) == 2, "both had workers"
    for host in "ab":
        told = shells.type(host, "upipe doctor --host 0.0.0.0")
        assert "everything is well" in told and "the agent of this host" in " ".join(told.split()), told


def test_the_script_runs_without_a_cluster_too(shells: Shells) -> None:
    out = shells.type("b", "python examples/04_cluster/primes.py")
    assert len(counted(out)) == 4
