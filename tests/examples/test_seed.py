"""The example of the document that uPipe started from runs as it is written there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from running import EXAMPLES, left_behind, run, shared_memory

DOCUMENT = Path(__file__).parent / "upipe-basics.md"
"""A copy of the document, byte for byte."""


def example() -> str:
    """The last code block of the document, which is indented by four spaces and runs to its end."""
    text = DOCUMENT.read_text()
    block = text[text.index("    import asyncio\n") :]
    return "".join(line.removeprefix("    ") for line in block.splitlines(keepends=True))


def test_the_counter_example_is_the_document_s_byte_for_byte() -> None:
    assert (EXAMPLES / "01_counter" / "counter.py").read_bytes() == example().encode() + b"\n"


@pytest.mark.slow
@pytest.mark.system
def test_the_example_of_the_document_runs_prints_and_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "seed.py"
    script.write_text(example())
    with shared_memory() as root:
        done = run(script, root=root, cwd=tmp_path, limit=30)
        assert done.status == 0, done.out + done.err
        assert done.err == ""
        lines = done.out.splitlines()
        for said in (
            "Hello embedded processor a", "Hello embedded processor b", "a connected", "a done",
            "embedded processor b completed", "Running",
        ):
            assert lines.count(said) == 1, said
        assert lines[-1] == "Running"
        assert {f"{number / 1000}K" for number in range(1000, 100_000, 1000)} <= set(lines)
        assert left_behind(root) == []
