"""`upipe-node`: what stands in the way of its start is one sentence and status 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from upipe.cluster import token

ROOT = Path(__file__).resolve().parents[2]


def node(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "upipe.cli.node", "--data-dir", str(folder / "data"), "--token-file",
         str(folder / "token"), "--no-multicast", *options],
        capture_output=True, text=True, timeout=100, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("upipe-node: "), done.stderr
    return done.stderr


@pytest.mark.slow
def test_no_token(tmp_path):
    assert "upipe token create" in one_sentence(node(tmp_path))
    assert "upipe token create" in one_sentence(node(tmp_path, "--host", "0.0.0.0"))
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--labels", "no-value"), "NAME=VALUE"),
        (("--resources", "gpu=half"), "no amount"),
        (("--join", "http://x"), "no seed"),
        (("--cluster", ""), "--cluster"),
        (("--ca", "x", "--certificate", "y", "--key", "z"), "cannot be read"),
        (("--host", "192.0.2.1", "--port", "0"), "no address of this host"),
        (("--drain-seconds", "-1"), "--drain-seconds"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, word):
    token.create(tmp_path / "token")
    said = one_sentence(node(tmp_path, *options))
    assert word in said or word.strip("-") in said


@pytest.mark.slow
def test_certificates_of_ones_own_go_together(tmp_path):
    done = node(tmp_path, "--ca", "x")
    assert done.returncode == 2 and "go together" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_port_in_use_names_who_has_it(tmp_path):
    token.create(tmp_path / "token")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = one_sentence(node(tmp_path, "--port", str(taken.getsockname()[1])))
    assert f"in use by process {os.getpid()}" in said


@pytest.mark.slow
def test_a_data_directory_that_is_open_to_others(tmp_path):
    token.create(tmp_path / "token")
    (tmp_path / "data").mkdir(mode=0o755)
    assert "chmod 700" in one_sentence(node(tmp_path, "--port", "0"))
