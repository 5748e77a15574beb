"""What issue 3 asks for, judged on ratios of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from benchmark.cases import Case
from benchmark.peers import Peer
from benchmark.stats import Row, Table

ENOUGH = 3
"""Repeats below which no target is called met or missed."""


@dataclass(frozen=True)
class Verdict:
    """One line of the table of targets."""

    what: str
    wanted: str
    reached: str
    against: str
    verdict: str
    factor: float | None
    """Reached in the direction wanted: 1 is just enough."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """`row` of `case` against `peers` (by prefix; none: the best of all) or against the limit of that name."""

    what: str
    case: str
    row: str
    factor: float
    peers: tuple[str, ...] = ()
    limit: str = ""
    most: bool = False
    """The ratio must be at most the factor; otherwise at least."""
    measure: str = "median"
    """median, or cpu."""
    absolute: str = ""
    """Not a ratio: the value itself must be at most `factor`, in this unit."""


TARGETS: tuple[Target, ...] = (
    Target("small values, MemQ put/get", "small", "upipe.put", 4),
    Target("small values, awaited emit/get_sync in a pipe", "small", "upipe.pipe", 2),
    Target("small values, put_many/get_many over arrays", "small", "upipe.many", 15),
    Target("round trip, both running", "rtt", "upipe.put", 0.5, ("iceoryx2.poll",), most=True),
    *[
        Target(
            f"round trip, asleep, {pins}, sync",
            f"rtt-asleep-{pins}",
            "upipe.put",
            1.2,
            limit=f"futex-{pins}",
            most=True,
        )
        for pins in ("two", "one", "free")
    ],
    *[
        Target(
            f"round trip, asleep, {pins}, awaited",
            f"rtt-asleep-{pins}",
            "upipe.aio",
            1.5,
            limit=f"futex-{pins}",
            most=True,
        )
        for pins in ("two", "one", "free")
    ],
    Target("1 MiB, copies, CRC on", "frames-1m-copy", "upipe.put", 1.2),
    Target("1080p, copies, CRC on", "frames-1080p-copy", "upipe.put", 1.2),
    *[
        target
        for size, label in (("1m", "1 MiB"), ("1080p", "1080p"))
        for target in (
            Target(f"{label}, reserve/borrow, CRC off", f"frames-{size}-view", "upipe.view~", 1.0, ("iceoryx2",)),
            Target(f"{label}, reserve/borrow, CRC on", f"frames-{size}-view", "upipe.view", 1.3, ("ray.channel",)),
        )
    ],
    Target("4 producers x 4 consumers", "mpmc", "upipe.put", 3, ("faster-fifo", "mp.Queue")),
    Target("CPU per million small values", "small", "upipe.put", 0.5, ("pyzmq",), most=True, measure="cpu"),
    Target("start to first frame, two processors", "start", "upipe.pipe", 100, most=True, absolute="ms"),
    Target("256 idle queues and 64 idle workers", "idle-many", "upipe.pipe", 1.0, most=True, absolute="% of a core"),
    Target("a queue among 64 keeps its lone rate", "among", "upipe.put", 0.8, absolute="of the lone rate"),
)


def judged(case: Case, peer: Peer | None) -> bool:
    """Is a target about that row of that case, or measured against it? No peer: against the physical limits.

    Where a target is against the best of all, these are the peers that are known for it (`Peer.key`); another that is
    better is the one compared to, with the fewer rounds that it has.
    """
    mine = [target for target in TARGETS if target.case == case.name]
    if peer is None:
        return any(target.limit for target in mine)
    if peer.own:
        return any(target.row == peer.name for target in mine)
    return any(
        peer.name.startswith(target.peers) if target.peers else peer.key and not peer.heavy
        for target in mine
        if not target.limit and not target.absolute
    )


def in_turns(case: Case, peer: Peer) -> bool:
    """Is a target about that row against the physical limit? Then both are measured in turns (`Work.beside`)."""
    return any(target.limit and (target.case, target.row) == (case.name, peer.name) for target in TARGETS)


def judge(tables: Sequence[Table]) -> list[Verdict]:
    """All targets whose case was run."""
    known = {table.case.name: table for table in tables}
    return [_judge(target, known[target.case]) for target in TARGETS if target.case in known]


def _judge(target: Target, table: Table) -> Verdict:
    row = table.row(target.row)
    mine = _values(row, target) if row is not None and not row.lost and not row.bad else {}
    sign = "≤" if target.most else "≥"
    against, theirs = ("", dict.fromkeys(mine, 1.0)) if target.absolute else _against(target, table, row)
    wanted = f"{sign} {target.factor:g} {target.absolute or '×'}"
    # Round by round, so that a slow minute is in both.
    ratios = [value / theirs[number] for number, value in mine.items() if theirs.get(number)]
    if not ratios:
        return Verdict(target.what, wanted, "–", against or "no such peer here", "not measured", None)
    reached = max(median(ratios), 1e-9)
    factor = target.factor / reached if target.most else reached / target.factor
    verdict = _sure("met" if factor >= 1 else "missed", target, ratios)
    return Verdict(target.what, wanted, f"{reached:.3g}", against, verdict, factor)


def _sure(verdict: str, target: Target, ratios: list[float]) -> str:
    """The verdict, unless there are too few repeats, or the middle half of the ratios holds both answers."""
    if len(ratios) < ENOUGH:
        return f"unclear: {len(ratios)} of {ENOUGH} runs ({verdict})"
    low, _, high = quantiles(ratios, n=4)
    if low < target.factor < high:
        return f"unclear: {low:.3g} to {high:.3g} ({verdict})"
    return verdict


def _values(row: Row, target: Target) -> dict[int, float]:
    """Round -> what it gave."""
    if target.measure == "median":
        return {one.round: one.value for one in row.good}
    return {one.round: one.cpu for one in row.good if one.cpu}


def _against(target: Target, table: Table, row: Row | None) -> tuple[str, dict[int, float]]:
    if target.limit:
        turns = {one.round: one.beside for one in row.good if one.beside} if row is not None else {}
        return f"C {target.limit}", turns or table.limit_values.get(target.limit, {})
    if target.measure == "cpu":
        rows = [row for row in table.rows if row.comparable and row.cpu and row.peer.name.startswith(target.peers)]
        best = min(rows, key=lambda row: row.cpu or 0.0, default=None)
    else:
        best = table.best(names=target.peers)
    return (best.peer.name, _values(best, target)) if best is not None else ("no such peer here", {})
