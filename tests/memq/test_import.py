"""Importing: machines that cannot run the ring are told so, and the stub names what the extension has."""

from __future__ import annotations

import ast
import os
import platform
import sys
from pathlib import Path

import pytest

import upipe.memq
from tests.memq.helpers import python
from upipe.errors import UnsupportedPlatform
from upipe.memq import _ring


@pytest.mark.parametrize(
    ("where", "name", "value", "words"),
    [
        (sys, "platform", "darwin", "Linux only"),
        (sys, "platform", "win32", "Linux only"),
        (sys, "maxsize", 2**31 - 1, "64-bit"),
        (sys, "byteorder", "big", "little-endian"),
        (platform, "machine", lambda: "riscv64", "x86_64 and aarch64"),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_in_one_sentence(monkeypatch, where, name, value, words):
    monkeypatch.setattr(where, name, value)
    with pytest.raises(UnsupportedPlatform, match=words):
        upipe.memq._check_platform()


@pytest.mark.parametrize("error", [PermissionError(1, "not permitted"), OSError(38, "not implemented")])
def test_a_kernel_or_sandbox_without_pidfds_is_refused(monkeypatch, error):
    def refuses(*_):
        raise error

    monkeypatch.setattr(os, "pidfd_open", refuses)
    with pytest.raises(UnsupportedPlatform, match=r"pidfd_open \(Linux 5.3"):
        upipe.memq._check_platform()
    monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(UnsupportedPlatform, match="pidfd_open"):
        upipe.memq._check_platform()


@pytest.mark.parametrize("module", ["upipe", "upipe.memq"])
def test_a_missing_extension_says_how_to_build_it_and_is_an_import_error(module):
    done = python(
        "import sys\n"
        "sys.modules['upipe.memq._ring'] = None\n"
        f"try:\n    import {module}\n"
        "except ImportError as e:\n    print(repr(e))\n"
    )
    assert "UnsupportedPlatform" in done.stdout, done.stderr
    assert "pip install -e ." in done.stdout


def test_on_this_machine_the_check_passes():
    upipe.memq._check_platform()


def members(node: ast.Module | ast.ClassDef) -> set[str]:
    found = set()
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.ClassDef)):
            found.add(item.name)
        elif isinstance(item, ast.AnnAssign):
            found.add(item.target.id)
    return found


def test_the_stub_and_the_extension_name_the_same_things():
    tree = ast.parse(Path(_ring.__file__).parent.joinpath("_ring.pyi").read_text())
    hidden = {"_Buffer", "_T"}
    public = {n for n, v in vars(_ring).items() if getattr(v, "__module__", "").endswith("_ring") and n[0] != "_"}
    public -= {n for n in public if n.endswith("_in_child")}
    assert members(tree) - hidden - {"READY_TRUE"} == public
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        cls = getattr(_ring, node.name)
        declared = members(node)
        actual = {n for n in vars(cls) if not n.startswith("__")}
        special = {n for n in declared if n.startswith("__")}
        assert declared - special == actual, node.name
        assert all(hasattr(cls, n) for n in special - {"__buffer__"}), node.name
