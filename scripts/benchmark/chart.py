"""The chart: one panel per case, bars per peer, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.render import number
from benchmark.stats import Row, Table

OWN, PEER, LOSSY, LIMIT = "#1f6feb", "#9aa4b2", "#e5b567", "#c0392b"
MOST = 12
COLUMNS = 3


def draw(tables: Sequence[Table], machine: dict[str, Any], path: Path) -> None:
    """Write path.png and path.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [table for table in tables if any(row.median is not None for row in table.rows)]
    if not shown:
        return
    lines = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.6 * columns, 3.4 * lines), squeeze=False)
    for place in axes.flat[len(shown) :]:
        place.axis("off")
    for table, place in zip(shown, axes.flat, strict=False):
        _panel(place, table)
    figure.suptitle(
        f"uPipe and its peers: {machine['cpu']}, {machine['cpus']} CPUs, "
        f"Linux {machine['kernel']}, Python {machine['python']}"
        "  (blue uPipe, grey peers, yellow lost frames, red line: limit of the machine)",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=110)
    pyplot.close(figure)


def _rows(table: Table) -> list[Row]:
    """The best ones, and always ours."""
    rows = [row for row in table.sorted_rows() if row.median is not None]
    chosen = [row for row in rows if row.peer.own] + [row for row in rows if not row.peer.own]
    kept = chosen[:MOST]
    return [row for row in rows if any(row is one for one in kept)]


def _panel(place: Any, table: Table) -> None:
    rows = _rows(table)[::-1]
    values = [row.median or 0.0 for row in rows]
    colours = [LOSSY if row.lost or row.bad else OWN if row.peer.own else PEER for row in rows]
    spread = [
        [v - min(row.values) for v, row in zip(values, rows, strict=True)],
        [max(row.values) - v for v, row in zip(values, rows, strict=True)],
    ]
    place.barh(
        [_label(row) for row in rows], values, color=colours, xerr=spread, error_kw={"lw": 0.8, "ecolor": "#555"}
    )
    if all(value > 0 for value in values) and max(values) > 20 * min(values):
        place.set_xscale("log")
    if table.limit:
        place.axvline(table.limit, color=LIMIT, lw=1)
    for at, value in enumerate(values):
        place.annotate(f" {number(value)}", (value, at), va="center", fontsize=7)
    arrow = "more is better" if table.case.better == "higher" else "less is better"
    place.set_title(f"{table.case.title}\n{table.case.unit}, {arrow}", fontsize=8, wrap=True)
    place.tick_params(labelsize=7)
    place.spines[["top", "right"]].set_visible(False)
    place.margins(x=0.15)


def _label(row: Row) -> str:
    return f"{row.peer.without_crc} (CRC off)" if row.peer.without_crc else row.peer.name
