"""Who is measured when: in a round every case takes every peer once, so that a slow minute hits all alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmark.cases import Case
from benchmark.model import Outcome, Work
from benchmark.peers import Peer
from benchmark.run import measure
from benchmark.stats import Row, Table
from benchmark.targets import in_turns, judged

Measure = Callable[[Peer, Sequence[Work], float], list[Outcome]]
MeasureLimits = Callable[[Case], dict[str, float]]
Command = Callable[[Case, int], tuple[str, ...]]
TURN = 150
"""Round trips after which the program that measures their limit does as many: a sixth of a second for each."""
GRACE = 15.0
"""Seconds that the first round may take longer than the budget; what it has not begun then is shown as not run."""
SLACK = 12.0
"""Seconds a measurement may take longer than it should, before it counts as hung."""
ROUNDS = 9
"""Of a full run. Every third takes all peers; those between only what the targets are about, who are compared round by
round: a host with neighbours is fast for minutes and slow for minutes, and a median of three falls into either."""


@dataclass(frozen=True)
class Job:
    """One process to start: a peer, and the cases it does there. No peer: the physical limits of a case."""

    peer: Peer | None
    cases: tuple[Case, ...]
    round: int

    @property
    def name(self) -> str:
        return self.peer.name if self.peer is not None else "limits"


def jobs(cases: Sequence[Case], wanted: Sequence[str], quick: bool) -> Iterator[Job]:
    """All of them, in order."""
    for number in range(max(case.rounds[0] for case in cases) if quick else ROUNDS):
        heavy: dict[str, tuple[Peer, list[Case]]] = {}
        found: list[Job] = []
        for case in cases:
            # The limits go with uPipe's own rows: those are first, and last where the order is reversed.
            peers = [*([None] if case.limit else []), *(peer for peer in case.peers() if matches(peer.name, wanted))]
            for peer in peers if number % 2 == 0 else reversed(peers):
                if not (_in_quick_round if quick else _in_full_round)(case, peer, number):
                    continue
                if peer is None or not peer.heavy:
                    found.append(Job(peer, (case,), number))
                else:
                    heavy.setdefault(peer.name, (peer, []))[1].append(case)
        for peer, todo in heavy.values():
            found.append(Job(peer, tuple(todo), number))
        yield from sorted(found, key=_urgency) if quick else found


def _in_quick_round(case: Case, peer: Peer | None, number: int) -> bool:
    repeats = 1 if peer is not None and peer.heavy else case.rounds[0]
    return number < repeats and (peer is None or in_quick(case, peer))


def _in_full_round(case: Case, peer: Peer | None, number: int) -> bool:
    """The limits go with what they are compared to. A case that no target is about has no judged peers."""
    if number % 3 == 0 and number // 3 < case.rounds[1]:
        return True
    return judged(case, peer)


def _urgency(job: Job) -> tuple[bool, bool]:
    """In a quick run first what the targets are about, and of that first what has few rows."""
    if job.peer is None:
        return (False, True)
    few = job.peer.heavy > 0 or job.cases[0].kind in ("start", "idle", "among")
    return (not (job.peer.own or job.peer.key), not few)


def in_quick(case: Case, peer: Peer) -> bool:
    """Does the peer take part in this case of a quick run?"""
    few = peer.quick is not None and case.name not in peer.quick and case.kind not in peer.quick
    return not few and case.quick_only(peer)


def matches(name: str, wanted: Sequence[str]) -> bool:
    """No names: everybody. A peer stays together with its row without CRC."""
    return not wanted or any(one in (name, name.rstrip("~")) or name.startswith(f"{one}.") for one in wanted)


def run(
    cases: Sequence[Case],
    wanted: Sequence[str],
    quick: bool,
    budget: float,
    do: Measure = measure,
    limits: MeasureLimits = lambda case: {},
    command: Command = lambda case, trips: (),
) -> list[Table]:
    """Run everything. After `budget` seconds no further measurement is begun."""
    tables = {
        case.name: Table(case, [Row(peer) for peer in case.peers() if matches(peer.name, wanted)]) for case in cases
    }
    started = time.monotonic()
    for job in jobs(cases, wanted, quick):
        spent = time.monotonic() - started
        if spent > (budget if job.round else budget + GRACE):
            break
        _progress(job, started)
        if job.peer is None:
            for name, value in limits(job.cases[0]).items():
                tables[job.cases[0].name].limit_values.setdefault(name, {})[job.round] = value
            continue
        seconds = [case.seconds[0 if quick else 1] for case in job.cases]
        works = [_work(case, job.peer, one, command) for case, one in zip(job.cases, seconds, strict=True)]
        outcomes = do(job.peer, works, job.peer.heavy + 4 * sum(seconds) + SLACK)
        for case, outcome in zip(job.cases, outcomes, strict=True):
            row = tables[case.name].row(job.peer.name)
            assert row is not None
            outcome.round = job.round
            row.outcomes.append(outcome)
    _progress(None, started)
    return [_supported(table, quick) for table in tables.values()]


def _work(case: Case, peer: Peer, seconds: float, command: Command) -> Work:
    work = case.work(peer, seconds)
    beside = command(case, TURN) if in_turns(case, peer) else ()
    return replace(work, beside=beside, turn=TURN) if beside else work


def _supported(table: Table, quick: bool) -> Table:
    """Without the rows of peers that have nothing of that kind."""
    table.rows = [row for row in table.rows if not row.status.startswith("unsupported")]
    for row in table.rows:
        if not row.outcomes:
            short = quick and not in_quick(table.case, row.peer)
            row.outcomes = [Outcome(error="not in quick runs" if short else "not run: out of time")]
    return table


def _progress(job: Job | None, started: float) -> None:
    if not sys.stderr.isatty():
        return
    text = f"round {job.round + 1}: {', '.join(case.name for case in job.cases)[:40]}: {job.name}" if job else ""
    sys.stderr.write(f"\r\033[K{time.monotonic() - started:4.0f} s  {text}"[:110] if job else "\r\033[K")
    sys.stderr.flush()
