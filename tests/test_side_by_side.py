"""scripts/test without arguments: two pytests side by side, failures of both are seen, both end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

RUN = """
import signal, sys
sys.path.insert(0, {scripts!r})
import _side_by_side as two
two.PARTS = {{"quiet": ({first!r},), "loud": ({second!r},)}}
sys.exit(two.main())
"""
FINE, WRONG = "pass", "assert 'seen here' == ''"
ENDLESS = "open('up', 'a').write('x'); import time; time.sleep(100)"


@pytest.fixture
def begin(tmp_path: Path):
    """begin(test, test): both run, in tmp_path."""
    started: list[subprocess.Popen[str]] = []

    def start(first: str, second: str) -> subprocess.Popen[str]:
        files = []
        for name, body in (("first", first), ("second", second)):
            files.append(tmp_path / f"test_{name}.py")
            files[-1].write_text(f"import os\ndef test_{name}():\n    print(os.environ['UPIPE_SHM'])\n    {body}\n")
        code = RUN.format(scripts=str(ROOT / "scripts"), first=str(files[0]), second=str(files[1]))
        more = {"UPIPE_SHM": "/dev/shm/nothing-is-made-here", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        started.append(subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | more, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("first", "second", "status"), [(FINE, FINE, 0), (WRONG, FINE, 1), (FINE, WRONG, 1)])
def test_the_failures_of_both_are_shown_and_each_has_a_root_of_its_own(begin, first, second, status):
    process = begin(first, second)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    assert out.count("1 passed") == (first, second).count(FINE) and out.count("1 failed") == status, out
    if status:
        assert "seen here" in out and f"nothing-is-made-here-{'quiet' if first == WRONG else 'loud'}" in out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_both_end_with_it(begin, tmp_path, how):
    process = begin(ENDLESS, ENDLESS)
    up = tmp_path / "up"
    until = time.monotonic() + 60
    while not (up.exists() and up.stat().st_size == 2):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)  # the end of their output: neither runs any more
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how)
    assert how == signal.SIGKILL or out.count("no tests ran") == 2, out
