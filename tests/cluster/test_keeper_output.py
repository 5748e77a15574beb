"""What workers print, in a file that is kept small."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from upipe.cluster.keeper_output import Output


def say(output: Output, text: str) -> None:
    with output.as_own():
        subprocess.run(["echo", text], check=True)


def test_children_write_into_the_file_and_we_do_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = Output(tmp_path / "output")
    output.pump()
    say(output, "one")
    os.write(1, b"ours\n")
    say(output, "two")
    output.finish()
    assert (tmp_path / "output").read_text() == "one\ntwo\n" and capfd.readouterr().out == "ours\n"
    os.close(output.reading)


def test_it_rotates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = [os.dup(1), os.dup(2)]
    output = Output(tmp_path / "output", most=30)
    for number in range(10):
        say(output, f"line {number}")
        output.pump()
    for number, fd in enumerate(own, 1):
        os.dup2(fd, number)
        os.close(fd)
    assert (tmp_path / "output").read_text() == "line 8\nline 9\n"
    assert (tmp_path / "output.1").read_text() == "".join(f"line {number}\n" for number in range(4, 8))
    os.close(output.reading)


def test_a_full_disk_loses_lines_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "output")
    say(output, "lost")
    with monkeypatch.context() as patch:
        patch.setattr(output, "_file", os.open("/dev/full", os.O_WRONLY))
        output.pump()
    say(output, "there")
    output.finish()
    assert (tmp_path / "output").read_text() == "\n... 5 bytes were lost: no room on the disk ...\nthere\n"
    os.close(output.reading)
