"""`upipe token` and `upipe doctor`, through click's runner."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support import free_port
from upipe.cli.main import main
from upipe.cluster import token
from upipe.cluster.doctor import Finding, Memory, Seen, Token, Wanted
from upipe.cluster.probes import SystemProbes

WELL = Seen(Memory("/dev/shm", 8 << 30, 4 << 30), 65536, "", Token("/t", "ab" * 8), "0.1.0", 1, multicast={"eth0": ""},
            heard=frozenset(["aa" * 8]))  # fmt: skip


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert all(len(line) <= 80 for line in result.output.splitlines() if "\u2500" in line or "problem" in line)
    return result


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's token would be."""
    made = tmp_path / "conf" / "token"
    monkeypatch.setenv(token.VARIABLE, str(made))
    return made


def test_a_token_is_made_and_never_printed(path: Path) -> None:
    result = invoke("token", "create")
    assert result.exit_code == 0
    secret = token.load(path)
    assert f"made {path}" in result.output and secret.fingerprint in result.output
    assert secret.text().split(".")[1] not in result.output and secret.bearer not in result.output
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert invoke("token", "show-fingerprint").output == f"{secret.fingerprint}\n"


def test_a_token_is_not_replaced_unless_forced(path: Path) -> None:
    invoke("token", "create")
    first = token.load(path)
    result = invoke("token", "create")
    assert result.exit_code == 1 and "--force replaces it" in result.output and token.load(path) == first
    assert invoke("token", "create", "--force").exit_code == 0 and token.load(path) != first


def test_a_path_can_be_given(path: Path, tmp_path: Path) -> None:
    assert invoke("token", "create", str(tmp_path / "t")).exit_code == 0
    assert invoke("token", "show-fingerprint", str(tmp_path / "t")).exit_code == 0
    result = invoke("token", "show-fingerprint")
    assert result.exit_code == 1 and f"no cluster token at {path}" in result.output


def test_missing_libraries_are_named_with_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upipe.cluster.token", None)
    monkeypatch.delattr("upipe.cluster.token")
    result = invoke("token", "create")
    assert result.exit_code == 1 and "pip install 'upipe[cluster]'" in result.output


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What the probes will see; the last one counts."""
    made = [WELL]

    async def look(self: SystemProbes, wanted: Wanted) -> Seen:
        return made[-1]

    monkeypatch.setattr(SystemProbes, "look", look)
    return made


def test_the_doctor_finds_all_well(seen: list[Seen]) -> None:
    result = invoke("doctor", "--host", "0.0.0.0")
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("everything is well")


def test_a_warning_leaves_the_status_and_a_problem_does_not(seen: list[Seen]) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0 and "1 warning" in result.output and "--host 0.0.0.0" in result.output
    fault = "port 7420 on 127.0.0.1 is in use by process 4711 (a-program): stop that, or choose another with --port"
    seen.append(Seen(WELL.memory, WELL.descriptors, fault, WELL.token, "0.1.0", 1, multicast=WELL.multicast))
    result = invoke("doctor")
    assert result.exit_code == 1 and "1 problem, 1 warning" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())
    assert "process 4711" in " ".join(result.output.split())


def test_the_doctor_as_json(seen: list[Seen]) -> None:
    result = invoke("doctor", "--json")
    lines = json.loads(result.output)
    assert {tuple(one) for one in lines} == {("check", "level", "what", "where", "todo")}
    assert Finding("port", "ok", "free", "127.0.0.1:7420") in [Finding(**one) for one in lines]


def test_certificates_go_together(seen: list[Seen], tmp_path: Path) -> None:
    result = invoke("doctor", "--ca", str(tmp_path / "ca"))
    assert result.exit_code == 2 and "go together" in result.output


@pytest.mark.slow
def test_the_doctor_looks_at_this_machine(path: Path) -> None:
    invoke("token", "create")
    result = invoke("doctor", "--port", str(free_port()), "--json")
    levels = {one["check"]: one["level"] for one in json.loads(result.output)}
    assert levels["token"] == levels["port"] == "ok" and "multicast" in levels
