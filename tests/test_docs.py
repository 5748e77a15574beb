"""What the documents say is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from upipe import lifecycle
from upipe.cluster.member import MEMBER
from upipe.memq import layout

ROOT = Path(__file__).parent.parent


def _block(marker: str) -> str:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    found = re.search(rf"<!-- {re.escape(marker)} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found, f"ARCHITECTURE.md has no block {marker!r}"
    return found.group(1)


@pytest.mark.parametrize("name", [name for name, _, _ in layout.STRUCTS])
def test_the_layout_tables_of_the_document_are_those_of_the_code(name: str) -> None:
    assert _block(f"layout: {name}") == layout.markdown(name)


@pytest.mark.parametrize("name", ["PIPE", "WORKER"])
def test_the_transition_tables_of_the_document_are_those_of_the_code(name: str) -> None:
    assert _block(f"lifecycle: {name}") == lifecycle.markdown(getattr(lifecycle, name)).rstrip()


def test_the_table_of_members_is_that_of_the_code() -> None:
    assert _block("lifecycle: MEMBER") == lifecycle.markdown(MEMBER).rstrip()


def test_the_committed_c_header_is_the_one_that_the_table_makes() -> None:
    assert (ROOT / "upipe/memq/_layout.h").read_text() == layout.c_header()


def test_every_file_that_the_map_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## 2.")[0]
    named = set(re.findall(r"\b([\w/]+\.(?:py|pyx|h))\b", text))
    missing = [name for name in named if not any(ROOT.glob(f"upipe/**/{name}"))]
    assert not missing


def test_the_map_of_the_cluster_names_each_of_its_modules_once() -> None:
    folder = ROOT / "upipe/cluster"
    named = re.findall(r"\b(\w+\.py) ", (folder / "__init__.py").read_text())
    assert sorted(named) == sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")


def test_the_two_commands_of_the_readme_exist_and_can_be_run() -> None:
    text = (ROOT / "README.md").read_text()
    for command in ("scripts/demo", "scripts/test"):
        assert command in text
        assert (ROOT / command).stat().st_mode & 0o111
