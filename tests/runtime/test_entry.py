"""The command line that runs a script as a worker. (What scripts do there: tests/test_processor.py)"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

from upipe.runtime import messages
from upipe.runtime.entry import LAST_CHARACTERS, Overheard, command


def test_the_same_python_finds_the_same_upipe_and_another_is_left_alone() -> None:
    own, other = command(None, "s.py"), command("/opt/python", "s.py")
    root = str(Path(__file__).parents[2])
    assert own[0] == sys.executable and other[0] == "/opt/python"
    assert f"sys.path += {[root]!r}" in own[2] and "sys.path += []" in other[2]


def run_as_worker(script: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], messages.FromWorker | None]:
    """Run it without a supervisor; what it printed, and what it said over the control socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        program, *rest = command(None, str(script))
        ran = subprocess.run(
            [program, *options, *rest], pass_fds=[theirs.fileno()], capture_output=True, text=True, timeout=100,
            env={**os.environ, "UPIPE_WORKER_FD": str(theirs.fileno())},
        )  # fmt: skip
        ours.setblocking(False)
        try:
            return ran, messages.decode_from_worker(ours.recv(messages.PACKET))
        except BlockingIOError:
            return ran, None


def test_a_script_that_exits_before_it_connects_tells_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import argparse\nargparse.ArgumentParser().error('no --model was given')\n")
    ran, told = run_as_worker(script)
    assert ran.returncode == 2 and "no --model was given" in ran.stderr
    assert isinstance(told, messages.Raised) and told.kind == "SystemExit" and not told.fatal
    assert "no --model was given" in told.traceback
    script.write_text("import sys\nsys.exit(0)\n")
    assert run_as_worker(script)[1] is None


def test_standard_error_passes_through_and_a_long_text_is_kept_in_part() -> None:
    stream = io.StringIO()
    heard = Overheard(stream)
    for number in range(10_000):
        print(f"line {number}", file=heard)
    assert stream.getvalue().count("\n") == 10_000 and heard.getvalue() is not None
    assert heard.last_words().endswith("line 9999") and len(heard.last_words()) <= LAST_CHARACTERS


def test_a_python_that_cannot_import_upipe_says_so_over_the_control_socket() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program, flag, text = command(sys.executable, "s.py")
    ran = subprocess.run(
        [program, "-I", "-S", flag, text],
        pass_fds=[theirs.fileno()],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=100,
        env={**os.environ, "UPIPE_WORKER_FD": str(theirs.fileno())},
    )
    told = messages.decode_from_worker(ours.recv(messages.PACKET))
    ours.close()
    theirs.close()
    assert isinstance(told, messages.Raised) and told.fatal and "-m pip install upipe" in told.message
    assert ran.returncode == 1 and "ModuleNotFoundError" in ran.stderr
