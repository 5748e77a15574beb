"""The chart, as PNG and SVG: bars per peer for a case, a line per peer for how something grows. It shows what the
tables say at a glance, not all of it: other depths of the ring and what idles is in the tables only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmark.render import number
from benchmark.stats import Row, Table

OWN, OWN_OTHER, PEER, LOSSY, LIMIT = "#1f6feb", "#79b0ff", "#9aa4b2", "#e5b567", "#c0392b"
MOST = 10
"""Bars of a panel."""
LINES = 5
"""Peers of a curve, beside ours."""
COLUMNS = 3


def draw(tables: Sequence[Table], machine: dict[str, Any], path: Path) -> None:
    """Write path.png and path.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = panels(tables)
    if not shown:
        return
    lines = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.6 * columns, 3.3 * lines), squeeze=False)
    for place in axes.flat[len(shown) :]:
        place.axis("off")
    for panel, place in zip(shown, axes.flat, strict=False):
        _curve(place, panel) if panel[0].case.curve else _bars(place, panel[0])
    figure.suptitle(
        f"uPipe and its peers: {machine['cpu']}, {machine['cpus']} CPUs, "
        f"Linux {machine['kernel']}, Python {machine['python']}"
        "  (blue uPipe, grey peers, yellow lost frames, red line: limit of the machine)",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (3.3 * lines)))
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=110)
    pyplot.close(figure)


def panels(tables: Sequence[Table]) -> list[list[Table]]:
    """What is drawn together: a case alone, or all points of a curve, smallest first."""
    known = [table for table in tables if table.case.drawn and any(row.median is not None for row in table.rows)]
    alone = [[table] for table in known if table.case.curve is None]
    points = sorted(((table.case.curve, table) for table in known if table.case.curve), key=lambda one: one[0].title)
    curves = [[table for _, table in group] for _, group in groupby(points, key=lambda one: one[0].title)]
    return alone + [sorted(one, key=_at) for one in curves]


def _at(table: Table) -> float:
    return table.case.curve.at if table.case.curve else 0.0


def _bars(place: Any, table: Table) -> None:
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
    _frame(place, table, table.case.title)
    place.xaxis.set_major_formatter(lambda value, _: number(value))
    place.xaxis.set_minor_formatter(lambda value, _: "")


def _rows(table: Table) -> list[Row]:
    """The best ones, and always ours."""
    rows = [row for row in table.sorted_rows() if row.median is not None]
    chosen = [row for row in rows if row.peer.own] + [row for row in rows if not row.peer.own]
    kept = chosen[:MOST]
    return [row for row in rows if any(row is one for one in kept)]


def _curve(place: Any, tables: list[Table]) -> None:
    """Ours, and the peers that are among the best at most points."""
    curve = tables[0].case.curve
    assert curve is not None
    ranks: dict[str, int] = {}
    for table in tables:
        peers = [row for row in table.sorted_rows() if not row.peer.own and row.median is not None]
        for at, row in enumerate(peers[:LINES]):
            ranks[row.peer.name] = ranks.get(row.peer.name, 0) + LINES - at
    best = sorted(ranks, key=lambda name: -ranks[name])[:LINES]
    own = list(dict.fromkeys(row.peer.name for table in tables for row in table.rows if row.peer.own))
    for at, name in enumerate([*own, *best]):
        points = [(_at(table), row) for table in tables if (row := table.row(name)) and row.median is not None]
        if not points:
            continue
        ours = name in own
        colour = (OWN, OWN_OTHER)[at % 2] if ours else str(0.2 + 0.12 * (at - len(own)))
        place.plot(
            [x for x, _ in points], [row.median for _, row in points], marker="os^Dvx*"[at % 7], ms=4, color=colour,
            lw=1.8 if ours else 1, ls="-" if ours else "--", label=_label(points[0][1]),
        )  # fmt: skip
    place.set_xscale("log", base=2 if _at(tables[-1]) < 1000 else 10)
    place.xaxis.set_major_formatter(lambda value, _: number(value))
    place.set_yscale("log")
    place.yaxis.set_major_formatter(lambda value, _: number(value))
    place.yaxis.set_minor_formatter(lambda value, _: "")
    place.set_xlabel(curve.x, fontsize=7)
    place.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _frame(place, tables[0], curve.title)


def _frame(place: Any, table: Table, title: str) -> None:
    arrow = "more is better" if table.case.better == "higher" else "less is better"
    place.set_title(f"{title}\n{table.case.unit}, {arrow}", fontsize=8, wrap=True)
    place.tick_params(labelsize=7)
    place.spines[["top", "right"]].set_visible(False)
    place.margins(x=0.15 if table.case.curve is None else 0.05)


def _label(row: Row) -> str:
    return f"{row.peer.without_crc} (CRC off)" if row.peer.without_crc else row.peer.name
