"""The regression check: uPipe's ratios to its peers in this run against those that were written down.

Ratios, never times: machines differ and are busy. A ratio may fall to SLACK of what it was before that is an error,
since short runs on a shared machine spread so far; what it is there to find are the lost factors of two and more.
Large frames are compared with the same copies in C instead: peers that sleep between the chunks of a frame take
0.5 GB/s on a quiet machine, whose CPUs must be woken, and 1 to 3 on a busy one; a ratio to them follows the machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmark.stats import Table

SLACK = 0.5
"""Share of the written ratio that must be reached."""


def ratios(tables: Sequence[Table]) -> dict[str, float]:
    """How many times as good as others uPipe's lossless rows are (above 1: better): "case: row / peer" for each
    lossless peer; for frames "case: row / limit", the physical limit that makes as many copies."""
    found = {}
    for table in tables:
        for mine in (row for row in table.rows if row.peer.own and row.good and not row.lost and not row.bad):
            for name, value in _others(table).items():
                assert mine.median is not None
                times = mine.median / value if table.case.better == "higher" else value / mine.median
                found[f"{table.case.name}: {mine.peer.name} / {name}"] = round(times, 3)
    return found


def _others(table: Table) -> dict[str, float]:
    if table.case.kind == "frames":
        return {name: value for name, value in table.limits.items() if name.startswith(("copy-", "view-"))}
    return {row.peer.name: row.median for row in table.rows if row.comparable and row.median}


def write(tables: Sequence[Table], path: Path) -> None:
    """Write the ratios of this run down."""
    path.write_text(json.dumps(ratios(tables), indent=1, sort_keys=True) + "\n")


def problems(tables: Sequence[Table], path: Path) -> list[str]:
    """What became worse, and what is written down but was not measured (which is no pass)."""
    now, before = ratios(tables), json.loads(path.read_text())
    measured = {table.case.name for table in tables}
    found = []
    for pair, wanted in before.items():
        if pair.partition(":")[0] not in measured:
            continue
        if pair not in now:
            found.append(f"{pair}: not measured, or lossy; it was {wanted:g}")
        elif now[pair] < SLACK * wanted:
            found.append(f"{pair}: {now[pair]:g}, less than {SLACK:g} of the {wanted:g} that it was")
    return found
