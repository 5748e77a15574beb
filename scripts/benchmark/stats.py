"""From outcomes to rows: median, spread, losses, and ratios to the best lossless peer and to the physical limit."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmark.cases import Case
from benchmark.model import Outcome
from benchmark.peers import Peer


@dataclass
class Row:
    """One peer in one case."""

    peer: Peer
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def good(self) -> list[Outcome]:
        """Those that gave a value (lossy ones too)."""
        return [one for one in self.outcomes if not one.error]

    @property
    def values(self) -> list[float]:
        return [one.value for one in self.good]

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.good else None

    @property
    def lost(self) -> int:
        return sum(one.lost for one in self.good)

    @property
    def bad(self) -> int:
        return sum(one.bad for one in self.good)

    @property
    def expected(self) -> int:
        return sum(one.expected for one in self.good)

    @property
    def cpu(self) -> float | None:
        """Median of the CPU seconds that the case counts."""
        found = [one.cpu for one in self.good if one.cpu]
        return statistics.median(found) if found else None

    def other(self, name: str) -> float | None:
        """Median of one of the other numbers."""
        found = [one.extra[name] for one in self.good if name in one.extra]
        return statistics.median(found) if found else None

    @property
    def status(self) -> str:
        """ok, lossy, or why there is nothing to see."""
        if not self.good:
            return self.outcomes[0].error if self.outcomes else "not run"
        if self.lost or self.bad:
            return "lossy"
        errors = [one.error for one in self.outcomes if one.error]
        return f"ok in {len(self.good)} of {len(self.outcomes)}: {errors[0]}" if errors else "ok"

    @property
    def comparable(self) -> bool:
        """May a ratio be taken against it? Lossy, failed and differently made rows, and our own, may not."""
        return (
            not self.peer.own
            and not self.peer.reference
            and bool(self.good)
            and all(one.clean for one in self.outcomes)
        )


@dataclass
class Table:
    """One case with all its rows."""

    case: Case
    rows: list[Row]
    limit_values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Physical limits in the unit of the case: name -> round -> value. A round that gave none is not there."""

    @property
    def limits(self) -> dict[str, float]:
        """Their medians."""
        return {name: statistics.median(values.values()) for name, values in self.limit_values.items()}

    def best(self, *, names: tuple[str, ...] = ()) -> Row | None:
        """The best comparable peer (of those whose name begins so), None when there is none."""
        candidates = [
            row
            for row in self.rows
            if row.comparable and (not names or any(row.peer.name.startswith(name) for name in names))
        ]
        pick = max if self.case.better == "higher" else min
        return pick(candidates, key=lambda row: row.median or 0.0) if candidates else None

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.peer.name == name), None)

    def median(self, name: str) -> float | None:
        row = self.row(name)
        return row.median if row is not None else None

    @property
    def limit(self) -> float | None:
        return self.limits.get(self.case.limit)

    def sorted_rows(self) -> list[Row]:
        """Best first, then those without a value."""
        sign = -1.0 if self.case.better == "higher" else 1.0
        return sorted(self.rows, key=lambda row: (row.median is None, sign * (row.median or 0.0)))


def ratio(value: float | None, to: float | None) -> float | None:
    """value / to, None when one is missing."""
    return value / to if value is not None and to else None


def to_json(table: Table) -> dict[str, Any]:
    """A table as data."""
    best = table.best()
    return {
        "case": table.case.name,
        "title": table.case.title,
        "unit": table.case.unit,
        "better": table.case.better,
        "best_peer": best.peer.name if best else None,
        "limits": table.limits,
        "limit_values": {name: list(values.values()) for name, values in table.limit_values.items()},
        "rows": [_row_json(row, best, table) for row in table.sorted_rows()],
    }


def _row_json(row: Row, best: Row | None, table: Table) -> dict[str, Any]:
    values = row.values
    return {
        "peer": row.peer.name,
        "version": row.peer.version,
        "status": row.status,
        "values": values,
        "median": row.median,
        "min": min(values, default=None),
        "max": max(values, default=None),
        "expected": row.expected,
        "lost": row.lost,
        "bad": row.bad,
        "cpu": row.cpu,
        "extra": {name: row.other(name) for name in table.case.extra},
        "to_best_peer": ratio(row.median, best.median if best else None),
        "to_limit": ratio(row.median, table.limit),
        "reference": row.peer.reference,
    }
