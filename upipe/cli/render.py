"""What a person sees: a pipe's report as tables, its progress while it runs, queues. Only this module imports rich."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from upipe.memq.stats import QueueStats
from upipe.pipe import Pipe
from upipe.runtime.report import EdgeReport, ProcessorReport, Report

REDRAW_EVERY = 0.25
"""Seconds between two drawings on a terminal."""
LINE_EVERY = 2.0
"""Seconds between two lines when the output is no terminal."""
RATE_WINDOW = 1.0
"""Seconds over which the rate of the moment is taken: shorter follows faster, and jumps more."""
BAR = 12
"""Characters of a fill bar."""
_UNITS = "kMGTPE"
_STATE_STYLES = {"completed": "green", "failed": "bold red", "stopped": "yellow", "running": "cyan"}

# ---------------------------------------------------------------------------------------------------- numbers


def count(number: int) -> str:
    """A count, exact below ten million: 9,999,999 and 12.3M."""
    return f"{number:,}" if number < 10_000_000 else _short(number)


def rate(number: float) -> str:
    """Something per second, in at most six characters: 0.4, 23.1, 9,431, 2.35M."""
    if 0 < number < 99.95:
        return f"{number:.1f}"
    return f"{number:,.0f}" if number < 99_999.5 else _short(number)


def size(number: int) -> str:
    """Bytes, in powers of ten: 640, 12.3k, 33.6M."""
    return str(number) if number < 1000 else _short(number)


def _short(number: float) -> str:
    """Three figures and a unit: 12.3M is 12,300,000."""
    power = 1
    while number >= 999.5 * 1000**power and power < len(_UNITS):
        power += 1
    return f"{number / 1000**power:.3g}{_UNITS[power - 1]}"


# ---------------------------------------------------------------------------------------------------- tables


def terminal() -> Console:
    """Standard output; 80 columns wide when it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=80)


def table(name: str, columns: Iterable[str], title: str = "") -> Table:
    """A table as this command line draws it: one column of names, then numbers on the right."""
    made = Table(
        expand=True, box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title=title or None,
        title_justify="left", title_style="bold", header_style="bold", show_edge=False,
    )
    made.add_column(name, overflow="fold", ratio=1, min_width=8, vertical="bottom")
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True, vertical="bottom", min_width=5)
    return made


def _flag(number: int, style: str) -> Text:
    """A count that should be 0, in colour when it is not."""
    return Text(count(number), style=style if number else "dim")


def _processors(report: Report) -> Table:
    columns = ("in", "out", "frames\n/s", "MB/s", "workers", "re-\nstarts", "rede-\nlivered", "dead", "cpu s")
    made = table("processor", columns)
    for one in report.processors:
        frames, size_ = (one.frames_in, one.bytes_in) if one.frames_in else (one.frames_out, one.bytes_out)
        seconds = report.seconds or 1.0
        made.add_row(
            one.name,
            count(one.frames_in),
            count(one.frames_out),
            rate(frames / seconds),
            rate(size_ / 1e6 / seconds),
            str(one.workers),
            _flag(one.restarts, "yellow"),
            _flag(one.redeliveries, "yellow"),
            _flag(one.dead_letters, "red"),
            f"{one.cpu_seconds:.2f}",
        )
    return made


def edge_name(edge: EdgeReport) -> str:
    """reader → detector; the pipe's own ends are called pipe, and all end processors together ends."""
    source = {"": "pipe", "*": "ends"}.get(edge.source, edge.source)
    return f"{source} → {edge.target or 'pipe'}"


def _edges(report: Report) -> Table:
    made = table(
        "edge", ("emitted", "finished", "dead", "dropped", "frames\n/s", "MB/s", "depth/max\nbytes", "rede-\nlivered")
    )
    for edge in report.edges:
        made.add_row(
            edge_name(edge),
            count(edge.emitted),
            count(edge.finished),
            _flag(edge.dead, "red"),
            _flag(edge.dropped, "yellow"),
            rate(edge.rate),
            rate(edge.mb_s),
            f"{size(edge.depth)}/{size(edge.max_depth)}",
            _flag(edge.redelivered, "yellow"),
        )
    return made


def balance(report: Report) -> Text:
    """The books of all edges in one line."""
    names = ("emitted", "finished", "dead", "dropped", "in_flight")
    emitted, finished, dead, dropped, in_flight = (sum(getattr(edge, name) for edge in report.edges) for name in names)
    verdict, style = ("books balanced", "bold green") if report.balanced else ("BOOKS DO NOT BALANCE", "bold red")
    text = Text(verdict, style=style)
    sign = "=" if emitted == finished + dead + dropped + in_flight else "≠"
    sums = f": {emitted:,} emitted {sign} {finished:,} finished + {dead:,} dead + {dropped:,} dropped"
    text.append(sums + (f" + {in_flight:,} in flight" if in_flight else ""), style="default not bold")
    return text


def _headline(report: Report) -> Text:
    text = Text("pipe ", style="bold")
    text.append(report.pipe, style="bold cyan")
    text.append(f"  {report.state}", style=_STATE_STYLES.get(report.state, "default"))
    return text.append(f"  {report.seconds:.2f} s", style="not bold")


def show(report: Report, console: Console | None = None) -> None:
    """Print the report: a table of its processors, a table of its edges, and the balance of the books."""
    console = console or terminal()
    console.print("", _headline(report), "", _processors(report), "", _edges(report), "", balance(report), sep="\n")
    if report.dead_letters:
        console.print(f"{report.dead_letters:,} dead letters: pipe.dead_letters() has each with its error", style="red")


# ---------------------------------------------------------------------------------------------------- queues

Picture = RenderableType
Queues = Mapping[str, Mapping[str, QueueStats | str]]
"""By session title, by queue: its counters, or why they cannot be read."""
_STREAMS = {0: "unused", 1: "open", 2: "ended"}


def queues(now: Queues, before: Queues | None = None, passed: float = 1.0) -> Group:
    """A table of queues per session; with rates when there is an earlier look, `passed` seconds before."""
    drawn: list[Picture] = []
    totals = ("size", "emitted", "finished") if before is None else ("emitted", "in/s", "out/s", "MB/s")
    for title, found in now.items():
        made = table("queue", ("frames", "depth", *totals, "stream", "proc."), title)
        for name, stats in found.items():
            if isinstance(stats, str):
                made.add_row(f"{name}: {stats}")
                continue
            middle: tuple[str, ...] = (size(stats.capacity), count(stats.emitted), count(stats.finished))
            if before is not None:
                then = before.get(title, {}).get(name)
                middle = _changes(stats, stats if then is None or isinstance(then, str) else then, passed)
            stream = _STREAMS.get(stats.stream, "?")
            made.add_row(name, count(stats.in_flight), size(stats.depth), *middle, stream, str(stats.participants))
        drawn += [made, ""]
    return Group(*drawn[:-1]) if drawn else Group("no queues")


def _changes(now: QueueStats, then: QueueStats, passed: float) -> tuple[str, ...]:
    changes = (now.emitted - then.emitted, now.passed - then.passed, (now.bytes - then.bytes) / 1e6)
    return (count(now.emitted), *(rate(change / passed) for change in changes))


def redraw(pictures: Iterable[Picture]) -> None:
    """Show one picture after the other in the same place; one below the other when the output is no terminal."""
    console = terminal()
    if not console.is_terminal:
        for picture in pictures:
            console.print(picture)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for picture in pictures:
            live.update(picture, refresh=True)


# ---------------------------------------------------------------------------------------------------- doctor

_LEVELS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def findings(found: Iterable[tuple[str, str, str, str, str]]) -> Group:
    """Check, level, where, what and what to do: a table, and how it looks in all."""
    made = Table(
        expand=True, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", show_edge=False
    )
    for name in ("check", "", "found"):
        made.add_column(name, no_wrap=name != "found", overflow="fold", ratio=1 if name == "found" else None)
    levels = []
    for check, level, where, what, todo in found:
        levels.append(level)
        text = Text(f"{where}: {what}")
        if todo:
            text.append(f"\n→ {todo}", style=_LEVELS[level])
        made.add_row(check, Text(level, style=_LEVELS[level]), text)
    counts = [(levels.count(name), name) for name in ("problem", "warning")]
    told = ", ".join(f"{number} {name}{'s' if number != 1 else ''}" for number, name in counts if number)
    worst = "problem" if "problem" in levels else "warning" if "warning" in levels else "ok"
    return Group(made, "", Text(told or "everything is well", style=_LEVELS[worst]))


# ---------------------------------------------------------------------------------------------------- lists


def listing(
    columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], nothing: str, notes: Iterable[str] = ()
) -> Picture:
    """Plain rows under their columns; where 80 columns are not enough the first and the last one are folded. `nothing`
    when there are none; notes stand below."""
    found = list(rows)
    made = Table(
        expand=False, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", show_edge=False
    )
    for number, name in enumerate(columns):
        longest = max((len(line) for row in found for line in row[number].splitlines()), default=0)
        least = {0: 20, len(columns) - 1: 12}.get(number)
        made.add_column(
            name, overflow="fold", no_wrap=least is None, min_width=None if least is None else min(longest, least)
        )
    for row in found:
        made.add_row(*map(Text, row))
    below = [Text(note, style="yellow") for note in notes]
    return Group(made if found else Text(nothing), *(Text(), *below) * bool(below))


# ---------------------------------------------------------------------------------------------------- progress


def bar(share: float) -> Text:
    """How full something is; yellow when it is nearly full: the next processor is the slower one."""
    share = min(1.0, max(0.0, share))
    full = min(BAR, round(share * BAR) or (1 if share > 0 else 0))
    text = Text("█" * full, style="yellow" if share > 0.9 else "cyan")
    return text.append("░" * (BAR - full), style="dim")


class Progress:
    """Shows a running pipe until the block ends; then its report has the last word (`show`).

        async with Progress(pipe):
            report = await pipe.wait_for_completion()

    On a terminal a small table is redrawn about four times a second, and cleared at the end; otherwise a plain line is
    printed every few seconds and at the end. It reads counters in shared memory: the pipe does not notice. No thread.

    Args:
        pipe: started.
        console: where to draw; default standard output.
    """

    def __init__(self, pipe: Pipe, console: Console | None = None) -> None:
        self.pipe = pipe
        self.console = console or terminal()
        self._history: deque[tuple[float, dict[str, int]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._live: Live | None = None

    async def __aenter__(self) -> Self:
        self._began = time.monotonic()
        self._note(self.pipe.stats())
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._live is not None:
            self._live.transient = kind is None  # what it was doing when it broke stays on the screen
            self._draw()
            self._live.stop()
        else:
            self._draw()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(REDRAW_EVERY if self._live is not None else LINE_EVERY)
            self._draw()

    def _draw(self) -> None:
        report = self.pipe.stats()
        rates = self._note(report)
        if self._live is not None:
            self._live.update(self.picture(report, rates), refresh=True)
        else:
            print(line(report, rates), file=self.console.file, flush=True)

    def _note(self, report: Report) -> dict[str, float]:
        """Remember this moment; frames per second of each processor over the last RATE_WINDOW."""
        now = time.monotonic()
        done = {one.name: _done(one) for one in report.processors}
        self._history.append((now, done))
        while len(self._history) > 2 and self._history[1][0] <= now - RATE_WINDOW:
            self._history.popleft()
        then, before = self._history[0]
        passed = now - then
        return {name: (number - before[name]) / passed if passed > 0 else 0.0 for name, number in done.items()}

    def picture(self, report: Report, rates: dict[str, float]) -> Group:
        """What is drawn on a terminal."""
        made = table("processor", ("in", "out", "frames/s", "workers", "input queue"))
        for one in report.processors:
            inputs = [edge for edge in report.edges if edge.target == one.name]
            capacity = sum(edge.capacity for edge in inputs)
            fill = bar(sum(edge.depth for edge in inputs) / capacity) if capacity else Text("none", style="dim")
            made.add_row(
                one.name, count(one.frames_in), count(one.frames_out), rate(rates[one.name]), str(one.workers), fill
            )
        return Group(_headline(report), "", made)


def _done(one: ProcessorReport) -> int:
    return max(one.frames_in, one.frames_out)


def line(report: Report, rates: dict[str, float]) -> str:
    """What is printed where there is no terminal: frames done and the rate of the moment of each processor."""
    shown = ", ".join(f"{one.name} {_done(one):,} ({rate(rates[one.name])}/s)" for one in report.processors)
    return f"{report.pipe} {report.seconds:.1f} s: {shown}"
