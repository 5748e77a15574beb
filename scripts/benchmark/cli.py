"""Command line of scripts/bench."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from benchmark import cases, limits, machine, processes, regress, render, schedule, stats, targets
from benchmark.peers import PEERS

QUICK_BUDGET = 85.0
FULL_BUDGET = 65 * 60.0


@click.command(help=(__doc__ or "") + " Runs uPipe and its peers in turn on the same work.")
@click.option("--quick", is_flag=True, help="Fewer cases, shorter, fewer repeats: under 2 minutes.")
@click.option("--case", "names", multiple=True, help="Only this case or group (again for more).")
@click.option("--peer", "peers", multiple=True, help="Only this peer, such as pyzmq or pyzmq.ipc (again for more).")
@click.option("--json", "into", type=click.Path(path_type=Path), help="Write everything there, too.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw there: FILE.png and FILE.svg are written.")
@click.option("--check", type=click.Path(path_type=Path, exists=True), help="Fail when a ratio fell far below it.")
@click.option("--baseline", type=click.Path(path_type=Path), help="Write the ratios there, for --check.")
@click.option("--budget", type=float, help="Seconds after which no further measurement begins.")
@click.option("--list", "listing", is_flag=True, help="Name the cases and the peers.")
def main(
    quick: bool,
    names: tuple[str, ...],
    peers: tuple[str, ...],
    into: Path | None,
    chart: Path | None,
    check: Path | None,
    baseline: Path | None,
    budget: float | None,
    listing: bool,
) -> None:
    if listing:
        _list()
        return
    try:
        chosen = cases.select(list(names), quick)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--case") from None
    _check_peers(peers)
    processes.adopt_orphans()
    about = machine.describe()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="upipe-bench-") as folder:
        measure_limits = limits.Limits(Path(folder), quick)
        seconds = budget or (QUICK_BUDGET if quick else FULL_BUDGET)
        tables = schedule.run(chosen, peers, quick, seconds, limits=measure_limits, command=measure_limits.command)
    verdicts = targets.judge(tables)
    console = Console(width=None if sys.stdout.isatty() else 150)
    render.show(tables, about, verdicts, console)
    about["load_end"], about["rebuilt"] = os.getloadavg()[0], machine.build() != about["build"]
    if about["rebuilt"]:
        console.print(
            "\nuPipe's native module was rebuilt during the run: its rows mix two builds. Run again.", style="bold red"
        )
    console.print(f"\n{time.monotonic() - started:.0f} s, load now {os.getloadavg()[0]:.2f}", highlight=False)
    if into is not None:
        data = {
            "machine": about,
            "quick": quick,
            "tables": [stats.to_json(one) for one in tables],
            "targets": [one.to_json() for one in verdicts],
        }
        into.write_text(json.dumps(data, indent=1) + "\n")
    if chart is not None:
        from benchmark.chart import draw

        draw(tables, about, chart)
    if baseline is not None:
        regress.write(tables, baseline)
    worse = regress.problems(tables, check) if check is not None else []
    for text in worse:
        console.print(f"worse: {text}", style="bold red", highlight=False)
    if worse:
        sys.exit(1)


def _check_peers(peers: tuple[str, ...]) -> None:
    for one in peers:
        if not any(schedule.matches(peer.name, [one]) for peer in PEERS):
            raise click.BadParameter(f"there is no peer {one!r}; see --list", param_hint="--peer")


def _list() -> None:
    for case in cases.CASES:
        groups = f" (in {', '.join(case.groups)})" if case.groups else ""
        click.echo(f"case {case.name:24} {case.title}{groups}{'' if case.quick else '; not in quick runs'}")
    for peer in PEERS:
        click.echo(f"peer {peer.name:24} {peer.version or ('absent: ' + peer.absent if peer.absent else '')}")
