"""The command line that runs a script as a worker. (What scripts do there: tests/test_processor.py)"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from upipe.runtime import messages
from upipe.runtime.entry import command


def test_the_same_python_finds_the_same_upipe_and_another_is_left_alone() -> None:
    own, other = command(None, "s.py"), command("/opt/python", "s.py")
    root = str(Path(__file__).parents[2])
    assert own[0] == sys.executable and other[0] == "/opt/python"
    assert f"sys.path += {[root]!r}" in own[2] and "sys.path += []" in other[2]


def test_a_python_that_cannot_import_upipe_says_so_over_the_control_socket() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program, flag, text = command(sys.executable, "s.py")
    ran = subprocess.run(
        [program, "-I", "-S", flag, text],
        pass_fds=[theirs.fileno()],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=30,
        env={**os.environ, "UPIPE_WORKER_FD": str(theirs.fileno())},
    )
    told = messages.decode_from_worker(ours.recv(messages.PACKET))
    ours.close()
    theirs.close()
    assert isinstance(told, messages.Raised) and told.fatal and "-m pip install upipe" in told.message
    assert ran.returncode == 1 and "ModuleNotFoundError" in ran.stderr
