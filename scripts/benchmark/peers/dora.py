"""dora-rs: a dataflow of two nodes, run by `dora run`; nodes/dora_node.py is the nodes' code.

Its sender never waits: what the receiver's queue does not hold is dropped (policy drop_oldest), or beyond ten times its
size (policy backpressure). Losses are counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark import roles
from benchmark.model import Outcome, Unsupported, Work
from benchmark.peers.base import Transport

FLOW = """\
nodes:
  - id: one
    path: {node}
    outputs: [there]
    inputs:
      back: {{source: other/back, queue_size: {slots}{policy}}}
    env: {{BENCH_ROLE: {first}, BENCH_ORDER: {order}}}
  - id: other
    path: {node}
    outputs: [back]
    inputs:
      there: {{source: one/there, queue_size: {slots}{policy}}}
    env: {{BENCH_ROLE: {second}, BENCH_ORDER: {order}}}
"""


class Dora(Transport):
    """Option policy."""

    def _flow(self, work: Work, first: str, second: str) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(prefix="bench-dora-"))
        result = folder / "result.json"
        order = folder / "order.json"
        order.write_text(json.dumps({"work": work.to_json(), "into": str(result)}))
        policy = f", queue_policy: {self.options['policy']}" if "policy" in self.options else ""
        flow = folder / "flow.yml"
        node = Path(__file__).parents[1] / "nodes" / "dora_node.py"  # beside dora.py, "import dora" would find that
        flow.write_text(
            FLOW.format(
                node=node, slots=min(work.slots, 10_000), policy=policy, first=first, second=second, order=order
            )
        )
        self._run(flow, folder, result)
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _run(self, flow: Path, folder: Path, result: Path) -> None:
        here = os.path.dirname(sys.executable)
        environment = {**os.environ, "PATH": f"{here}:{os.environ['PATH']}"}
        began = time.monotonic()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [f"{here}/dora", "run", str(flow)], cwd=folder, stdout=log, stderr=log, env=environment
            )
            while not result.exists() and process.poll() is None and time.monotonic() - began < 40:
                time.sleep(0.02)
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
        if not result.exists():
            print((folder / "log").read_text(errors="replace"))
            raise RuntimeError("dora gave no result: " + (folder / "log").read_text(errors="replace").strip()[-120:])

    def run_stream(self, work: Work) -> Outcome:
        found = self._flow(work, "produce", "consume")
        total, scale = work.n + work.warm, work.size / 1e9 if work.kind == "frames" else 1.0
        return Outcome(found["rate"] * scale, total, found["arrived"], found["bad"])

    run_frames = run_stream

    def run_rtt(self, work: Work) -> Outcome:
        if work.pins != "free" and work.pause:
            raise Unsupported
        return roles.percentiles(self._flow(work, "ping", "echo"), work)

    def run_start(self, work: Work) -> Outcome:
        before = time.perf_counter()
        found = self._flow(Work("start", "stream", n=1), "produce", "consume")
        return Outcome((found["ended"] - before) * 1000, 1, found["arrived"], found["bad"])
