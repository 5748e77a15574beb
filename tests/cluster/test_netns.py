"""The helper itself: it skips with a reason, fails in CI, and cleans up after kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import netns
from tests.cluster.hosts import until


def test_without_root_the_tests_say_what_they_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="need root"):
        netns.require()


def test_in_ci_a_skip_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI runs this test"):
        netns.require()


@pytest.mark.system
@pytest.mark.slow
def test_what_a_killed_test_left_is_swept() -> None:
    netns.require()
    code = (
        "from tests.cluster.netns import Lan\n"
        "lan = Lan(1)\n"
        "child = lan.popen(0, 'cat', stdin=-1)\n"
        "print(lan.name(0), child.pid, flush=True)\n"
        "input()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdin is not None
    name, _child = owner.stdout.readline().split()
    netns.sweep()
    assert (Path("/run/netns") / name).exists(), "its owner lives"
    owner.send_signal(signal.SIGKILL)
    owner.wait(60)
    netns.sweep()
    assert not (Path("/run/netns") / name).exists()
    owner.stdin.close()
    owner.stdout.close()


@pytest.mark.system
@pytest.mark.slow
def test_the_processes_of_a_host_are_those_inside_and_no_others() -> None:
    with netns.lan_of(2) as lan:
        child = lan.popen(0, "cat", stdin=-1)
        entering = f"nsenter is in /proc/{child.pid}/ns/net"
        until(lambda: lan.processes(0) == [child.pid], 60, entering)
        assert lan.processes(1) == []
        child.kill()
        child.wait(60)
        assert lan.processes(0) == []
