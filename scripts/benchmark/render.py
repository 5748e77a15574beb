"""The tables as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from benchmark.stats import Row, Table, ratio


def number(value: float | None) -> str:
    """Three figures, with k, M and G."""
    if value is None:
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}" if abs(value) < 999.5 * size else f"{value / size:.0f}{letter}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def spread(values: Collection[float]) -> str:
    """From the least to the most."""
    return f"{number(min(values))}–{number(max(values))}"


def times(value: float | None) -> str:
    """A ratio."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def header(machine: dict[str, Any]) -> str:
    busy = "  (the machine is busy: trust ratios only)" if machine["load"] > 0.7 else ""
    lines = [
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, Python {machine['python']}; load at start {machine['load']:.2f}{busy}",
        "Cells: median of the repeats, with their spread. Ratios: this row / the best lossless peer (*), / limit.",
        "A row that lost frames is shown with its losses, and is never the best peer.",
    ]
    return "\n".join(lines)


def grid(table: Table) -> Grid:
    """One case."""
    best = table.best()
    unit = table.case.unit
    found = Grid(title=f"{table.case.name}: {table.case.title}, {unit}", title_justify="left", title_style="bold")
    found.add_column("peer")
    no_crc = any(row.peer.without_crc for row in table.rows)
    cpu = any(row.cpu for row in table.rows) and table.case.kind in ("stream", "mpmc", "fanout")
    for name in ("median", "spread", "/ best", *(["/ limit"] if table.limit else []), *table.case.extra):
        found.add_column(name, justify="right")
    for name, wanted in (("CRC off", no_crc), ("CPU s/M", cpu)):
        if wanted:
            found.add_column(name, justify="right")
    found.add_column("runs", justify="right")
    found.add_column("lost", justify="right")
    quiet = [row.peer.name for row in table.rows if row.status == "not in quick runs"]
    if quiet:
        found.caption = f"not in quick runs: {', '.join(quiet)}"
        found.caption_justify = "left"
    for row in table.sorted_rows():
        if row.peer.name in quiet:
            continue
        if not row.peer.without_crc or table.row(row.peer.without_crc) is None:
            found.add_row(*_cells(row, table, best, no_crc, cpu), style="bold" if row.peer.own else None)
    for name, value in table.limits.items():
        found.add_row(f"limit: {name}, C", number(value), spread(table.limit_values[name].values()), style="dim")
    return found


def _cells(row: Row, table: Table, best: Row | None, no_crc: bool, cpu: bool) -> list[str]:
    name = row.peer.name + (" *" if row is best else "") + (" (ref)" if row.peer.reference else "")
    if row.median is None:
        return [name, row.status]
    off = next((one for one in table.rows if one.peer.without_crc == row.peer.name), None)
    return [
        name,
        number(row.median),
        spread(row.values),
        times(ratio(row.median, best.median if best else None)),
        *([times(ratio(row.median, table.limit))] if table.limit else []),
        *(number(row.other(one)) for one in table.case.extra),
        *([number(off.median) if off else "–"] if no_crc else []),
        *([times(row.cpu)] if cpu else []),
        f"{len(row.good)}" + (f"/{len(row.outcomes)}" if len(row.good) < len(row.outcomes) else ""),
        _losses(row),
    ]


def _losses(row: Row) -> str:
    if not row.lost and not row.bad:
        return "0"
    wrong = f", {row.bad:,} wrong or out of order" if row.bad else ""
    return f"{row.lost:,} of {row.expected:,}{wrong}"


def show(tables: Sequence[Table], machine: dict[str, Any], targets: Sequence[Any], console: Console) -> None:
    """Everything."""
    console.print(header(machine), markup=False, highlight=False)
    for table in tables:
        console.print()
        console.print(grid(table))
        for name, reason in table.case.left_out:
            console.print(f"  {name}: left out: {reason}", markup=False, highlight=False)
        for row in table.rows:
            if row.median is not None and row.status.startswith("ok in"):
                console.print(f"  {row.peer.name}: {row.status}", markup=False, highlight=False)
            if row.peer.reference and row.median is not None:
                console.print(
                    f"  {row.peer.name}: no peer to be measured against: {row.peer.reference}",
                    markup=False,
                    highlight=False,
                )
    if targets:
        console.print()
        console.print(target_grid(targets))


def target_grid(targets: Sequence[Any]) -> Grid:
    found = Grid(title="Targets", title_justify="left", title_style="bold")
    for name in ("what", "wanted", "reached", "against", "verdict"):
        found.add_column(name, justify="right" if name in ("wanted", "reached") else "left")
    for one in targets:
        found.add_row(
            one.what,
            one.wanted,
            one.reached,
            one.against,
            one.verdict,
            style="bold red" if one.verdict == "missed" else None,
        )
    return found
