"""Tables of 80 columns, exact numbers, and progress with and without a terminal."""

from __future__ import annotations

import asyncio
import io
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from upipe.cli import render
from upipe.runtime.report import EdgeReport, ProcessorReport, Report

NAMES = ("reader", "detector", "a-processor-with-a-rather-long-name")


def edge(source: str, target: str, **changes: Any) -> EdgeReport:
    made = EdgeReport(
        source=source, target=target, emitted=120, finished=120, dead=0, dropped=0, aborted=0, in_flight=0,
        bytes=9_000_000, depth=0, max_depth=33_554_432, capacity=33_554_432, redelivered=0, seconds=2.0,
    )
    return msgspec.structs.replace(made, **changes)


def processor(name: str, **changes: Any) -> ProcessorReport:
    made = ProcessorReport(
        name=name, workers=2, frames_in=120, frames_out=120, bytes_in=9_000_000, bytes_out=9_000_000,
        restarts=0, redeliveries=0, dead_letters=0, cpu_seconds=1.25,
    )
    return msgspec.structs.replace(made, **changes)


def report(**changes: Any) -> Report:
    made = Report(
        pipe="video", state="completed", seconds=2.0, processors=tuple(processor(name) for name in NAMES),
        edges=tuple(edge(*pair) for pair in pairwise(NAMES)), dead_letters=0,
    )
    return msgspec.structs.replace(made, **changes)


def shown(what: Report) -> list[str]:
    file = io.StringIO()
    render.show(what, Console(file=file, width=80))
    return file.getvalue().splitlines()


def row(lines: list[str], start: str) -> list[str]:
    [found] = [line for line in lines if line.startswith(start)]
    return found.split()


HUGE = 2**50


def huge() -> Report:
    """Numbers that no run reaches."""
    one = {"frames_in": HUGE, "frames_out": HUGE, "bytes_in": HUGE, "workers": 1024, "cpu_seconds": 99_999.0}
    bad = {"restarts": 9999, "redeliveries": HUGE, "dead_letters": 12_345}
    books = {"emitted": HUGE, "finished": HUGE, "dead": 123_456, "dropped": HUGE, "bytes": HUGE, "redelivered": HUGE}
    rings = {"depth": 2**37, "max_depth": 2**37}
    return report(
        processors=tuple(processor(name, **one, **bad) for name in NAMES),
        edges=tuple(edge(*pair, **books, **rings) for pair in pairwise(NAMES)),
    )


@pytest.mark.parametrize("what", [report(), huge()], ids=["usual", "huge"])
def test_the_report_keeps_to_eighty_columns_and_shows_every_name(what: Report) -> None:
    lines = shown(what)
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in "".join(lines)
    text = "".join(line[:20].strip() for line in lines)  # long names are folded
    assert all(name in text for name in NAMES)


def test_the_report_shows_each_processor_with_its_numbers() -> None:
    lines = shown(report(processors=(processor("p", frames_out=7, restarts=3, redeliveries=4, dead_letters=5),)))
    assert row(lines, "p ") == ["p", "120", "7", "60.0", "4.5", "2", "3", "4", "5", "1.25"]


def test_a_source_is_rated_by_what_it_emits() -> None:
    lines = shown(report(processors=(processor("source", frames_in=0, bytes_in=0, frames_out=300),)))
    assert row(lines, "source ")[:5] == ["source", "0", "300", "150", "4.5"]


def test_the_report_shows_each_edge_with_its_numbers() -> None:
    lines = shown(report(edges=(edge("a", "b", finished=110, dead=3, dropped=7, redelivered=2, depth=640),)))
    assert row(lines, "a → b") == ["a", "→", "b", "120", "110", "3", "7", "60.0", "4.5", "640/33.6M", "2"]


def test_the_pipe_s_own_ends_have_names() -> None:
    assert render.edge_name(edge("", "a")) == "pipe → a"
    assert render.edge_name(edge("*", "")) == "ends → pipe"


def test_one_line_says_that_the_books_balance_with_the_sums_of_all_edges() -> None:
    lines = shown(report(edges=(edge("a", "b", finished=110, dead=3, dropped=7), edge("b", "c"))))
    assert lines[-1] == "books balanced: 240 emitted = 230 finished + 3 dead + 7 dropped"


def test_the_line_says_so_when_the_books_do_not_balance() -> None:
    lines = shown(report(edges=(edge("a", "b", finished=119),)))
    assert lines[-1] == "BOOKS DO NOT BALANCE: 120 emitted ≠ 119 finished + 0 dead + 0 dropped"


def test_frames_left_in_flight_at_completion_are_not_called_balanced() -> None:
    lines = shown(report(edges=(edge("a", "b", finished=119, in_flight=1),)))
    text = " ".join("".join(lines[-2:]).split())
    assert text == "BOOKS DO NOT BALANCE: 120 emitted = 119 finished + 0 dead + 0 dropped + 1 in flight"


def test_dead_letters_are_pointed_out() -> None:
    assert shown(report(dead_letters=2))[-1].startswith("2 dead letters: pipe.dead_letters()")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (9_999_999, "9,999,999"), (12_345_678, "12.3M"), (12_345_678_901, "12.3G")]
)
def test_counts_are_exact_below_ten_million(number: int, text: str) -> None:
    assert render.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.44, "0.4"), (99.94, "99.9"), (99.96, "100"), (9431.0, "9,431"), (123_456, "123k"), (2.3e6, "2.3M")],
)
def test_rates_have_three_or_four_figures(number: float, text: str) -> None:
    assert render.rate(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (12_345, "12.3k"), (999_600, "1M"), (2**25, "33.6M"), (2**37, "137G")]
)
def test_sizes_are_powers_of_ten(number: int, text: str) -> None:
    assert render.size(number) == text


# ---------------------------------------------------------------------------------------------------- progress


class Running:
    """Stands for a pipe: each look at it shows ten frames more, as if a tenth of a second later."""

    def __init__(self) -> None:
        self.looks = 0
        self.looked = asyncio.Event()

    def stats(self) -> Report:
        self.looks += 1
        if self.looks >= 4:
            self.looked.set()
        done = 10 * self.looks
        one = processor("reader", frames_in=0, frames_out=done)
        two = processor("writer", frames_in=done, frames_out=0)
        return report(state="running", processors=(one, two), edges=(edge("reader", "writer", depth=2**24),))


async def test_progress_prints_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "LINE_EVERY", 0.001)
    file, pipe = io.StringIO(), Running()
    async with render.Progress(pipe, Console(file=file, width=80)):  # type: ignore[arg-type]
        await pipe.looked.wait()
    lines = file.getvalue().splitlines()
    assert len(lines) == pipe.looks - 1  # the first look is where the rates start
    assert all("\x1b" not in line for line in lines)
    assert lines[0].startswith("video 2.0 s: reader 20 (") and ", writer 20 (" in lines[0]


async def test_progress_prints_its_last_line_when_the_pipe_was_quick() -> None:
    file = io.StringIO()
    async with render.Progress(Running(), Console(file=file, width=80)):  # type: ignore[arg-type]
        pass
    assert len(file.getvalue().splitlines()) == 1


async def test_progress_redraws_on_a_terminal_and_clears_it_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "REDRAW_EVERY", 0.001)
    file, pipe = io.StringIO(), Running()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    async with render.Progress(pipe, console):  # type: ignore[arg-type]
        await pipe.looked.wait()
    text = file.getvalue()
    assert text.count("pipe video  running") >= pipe.looks - 1
    assert text.count("\x1b[2K") >= 6 * (pipe.looks - 2)  # each goes where the one before was
    assert "██████░░░░░░" in text  # the writer's queue is half full
    assert text.rstrip("\r\n").endswith("\x1b[2K")  # the last thing is that its lines are cleared


async def test_progress_leaves_its_last_picture_when_the_block_raises() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    with pytest.raises(ZeroDivisionError):
        async with render.Progress(Running(), console):  # type: ignore[arg-type]
            raise ZeroDivisionError
    assert "reader" in file.getvalue().rpartition("\x1b[2K")[2]


def test_rates_are_those_of_the_last_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(render, "time", SimpleNamespace(monotonic=lambda: now))
    progress = render.Progress(Running(), Console(file=io.StringIO()))  # type: ignore[arg-type]
    rates = {}
    for frames, now in ((0, 100.0), (1000, 101.0), (1010, 101.5), (1020, 102.0)):  # noqa: B007
        rates = progress._note(report(processors=(processor("p", frames_in=frames, frames_out=0),)))
    assert rates == {"p": 20.0}
