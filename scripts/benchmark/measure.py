"""`python -m benchmark.measure`: one peer's work, in a fresh process. JSON on stdin says what, results go to a file.

{"peer": {...fields of Peer...}, "works": [...], "into": path}  ->  one JSON line per work
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import traceback
from typing import Any

from benchmark.model import Outcome, Unsupported, Work
from benchmark.peers import Peer
from benchmark.peers.base import Transport


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the runner dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def one(transport: Transport, work: Work) -> Outcome:
    try:
        return transport.run(work)
    except Unsupported as error:
        return Outcome(error=f"unsupported {error}".strip())
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip().split("\n")[0] or type(error).__name__
        return Outcome(error=text if type(error).__name__ in ("Failed", text) else f"{type(error).__name__}: {text}")


def main() -> None:
    _die_with_parent()
    order: dict[str, Any] = json.load(sys.stdin)
    peer = Peer(**{**order["peer"], "requires": tuple(map(tuple, order["peer"]["requires"]))})
    with open(order["into"], "w", buffering=1) as results:
        transport = peer.transport()
        for data in order["works"]:
            outcome = one(transport, Work.from_json(data))
            results.write(json.dumps(outcome.to_json()) + "\n")


if __name__ == "__main__":
    main()
