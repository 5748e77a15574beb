"""Running measurements: a fresh process for each, a hard timeout, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmark.model import Outcome, Work
from benchmark.peers import Peer
from benchmark.processes import end_descendants

SHARED = Path("/dev/shm")
LITTER = ("iox2_*", "*.zenoh", "sem.hdr*", "sem.obj*")
"""What iceoryx2, zenoh and Ray leave in shared memory when their processes are killed, or even when they are not."""
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "RAY_DEDUP_LOGS": "0"}


def measure(peer: Peer, works: Sequence[Work], timeout: float) -> list[Outcome]:
    """Let a fresh process do these works. One outcome each; those it did not reach say why."""
    if peer.absent:
        return [Outcome(error=f"absent: {peer.absent} is not installed")] * len(works)
    with tempfile.TemporaryDirectory(prefix="upipe-bench-", ignore_cleanup_errors=True) as folder, _swept():
        into, log = Path(folder, "results"), Path(folder, "log")
        order = {"peer": asdict(peer), "works": [work.to_json() for work in works], "into": str(into)}
        with log.open("wb") as output:
            code = _run(
                [sys.executable, "-m", "benchmark.measure"], json.dumps(order), output.fileno(), timeout, folder
            )
        lines = into.read_text().splitlines() if into.exists() else []
        found = [Outcome.from_json(json.loads(line)) for line in lines if line.endswith("}")]
        reason = f"failed: no end within {timeout:.0f} s" if code is None else f"failed: exit code {code}: {_last(log)}"
        if os.environ.get("UPIPE_BENCH_LOGS") and (code != 0 or any(one.error for one in found)):
            sys.stderr.write(log.read_text(errors="replace"))
    for one in found:
        if one.error and not one.error.startswith("unsupported"):
            one.error = f"failed: {one.error}"
    return found + [Outcome(error=reason)] * (len(works) - len(found))


@contextmanager
def _swept() -> Iterator[None]:
    """What the peers leave does not fill the memory of those measured after them. What was there before stays."""
    before = _litter()
    yield
    for path in _litter() - before:
        path.unlink(missing_ok=True)


def _litter() -> set[Path]:
    return {path for pattern in LITTER for path in SHARED.glob(pattern)}


def _run(command: list[str], order: str, output: int, timeout: float, folder: str) -> int | None:
    """Exit code, None when the time was over. Its process group and what it left are killed either way."""
    paths = [str(Path(__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, **ENVIRONMENT, "TMPDIR": folder, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
        env=environment,
        cwd=folder,
    )
    try:
        process.communicate(order.encode(), timeout)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        process.wait()
        end_descendants()


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"
