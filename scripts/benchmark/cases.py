"""The cases: what is measured, in which unit, and how much of it in a quick and in a full run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmark import amounts
from benchmark.amounts import power_of_two
from benchmark.model import MIB, Work
from benchmark.peers import PEERS, Peer

FEW = ("mp.Pipe", "iceoryx2.wait", "pyzmq.ipc")
HD = (1080, 1920, 3)
HD_BYTES = 1080 * 1920 * 3


@dataclass(frozen=True)
class Curve:
    """A family of cases that the chart shows as one panel: how something grows."""

    title: str
    x: str
    """What grows."""
    at: float
    """Where this case stands on that axis."""


@dataclass(frozen=True)
class Case:
    """One table."""

    name: str
    groups: tuple[str, ...]
    """Other names for --case."""
    title: str
    unit: str
    better: Literal["higher", "lower"]
    kind: str
    work: Callable[[Peer, float], Work]
    """The work for a peer that is to take so many seconds."""
    seconds: tuple[float, float]
    """Of measuring, in a quick and in a full run."""
    rounds: tuple[int, int] = (3, 3)
    """Repeats, interleaved, in a quick and in a full run. What a target is about takes part in every round of a full
    run (schedule.py)."""
    quick: bool = True
    """Part of a quick run."""
    limit: str = ""
    """Which physical limit stands beside it, see limits.py."""
    only: Callable[[Peer], bool] = lambda peer: True
    quick_only: Callable[[Peer], bool] = lambda peer: True
    """Those of the peers that take part in quick runs."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(peer, reason): said below the table."""
    extra: tuple[str, ...] = ()
    """Other numbers of an outcome to show."""
    curve: Curve | None = None
    """A point of a curve in the chart; None: a panel of its own."""
    drawn: bool = True
    """Part of the chart; otherwise of the tables only."""

    def peers(self) -> list[Peer]:
        kind = "frames" if self.kind == "payload" else self.kind
        return [peer for peer in PEERS if kind in peer.kinds and self.only(peer)]


def _payload(size: int) -> Case:
    name, ring = f"payload-{size}", max(4 * MIB, power_of_two(4 * (size + 64)))

    def work(peer: Peer, seconds: float) -> Work:
        n = max(12, int(seconds / (1 / (peer.rate or 100e3) + size / (peer.gigabytes * 1e9))))
        return Work(
            name, "payload", n=n, warm=min(n // 4 + 4, ring // (size + 64)), size=size, shape=(size,), ring=ring
        )

    text = f"{size} B" if size < 1024 else f"{size // 1024} KiB" if size < MIB else f"{size // MIB} MiB"
    return Case(
        name,
        ("growth", "payload"),
        f"Frames of {text} by copy",
        "frames/s",
        "higher",
        "payload",
        work,
        (0.2, 0.7),
        (1, 2),
        quick=False,
        only=lambda peer: peer.copies,
        curve=Curve("Frames by copy, as their size grows", "bytes of payload", max(1, size)),
    )


def _frame_cases() -> list[Case]:
    found = []
    for label, size, shape in (("1m", MIB, (MIB,)), ("1080p", HD_BYTES, HD)):
        for way, in_place in (("copy", False), ("view", True)):
            for depth in (8, 2, 32):
                name = f"frames-{label}-{way}" + ("" if depth == 8 else f"-{depth}")
                what = "1 MiB arrays" if label == "1m" else "1080p RGB frames (6.2 MB)"
                how = "read in place, every byte" if in_place else "copied to the consumer, who reads every byte"
                ring = power_of_two(depth * (size + 64)) // MIB
                found.append(
                    Case(
                        name,
                        ("frames", f"frames-{label}", f"frames-{way}"),
                        f"{what}, {how}; ring for {depth} ({ring} MiB)",
                        "GB/s",
                        "higher",
                        "frames",
                        amounts.frames(name, size, shape, depth, in_place),
                        (0.15, 1.0),
                        rounds=(2, 3) if depth == 8 else (2, 2),
                        quick=depth == 8,
                        limit=f"memcpy-{label}-{depth}",
                        only=(lambda peer: peer.views) if in_place else (lambda peer: peer.copies),
                        drawn=depth == 8,
                    )
                )
    return found


CASES: list[Case] = [
    Case(
        "small",
        (),
        "Small values, one producer, one consumer",
        "values/s",
        "higher",
        "stream",
        amounts.stream,
        (0.3, 1.5),
        limit="ring",
    ),
    Case(
        "rtt",
        (),
        "Round trip of 8 bytes, both ends running, on two CPUs",
        "us (p50)",
        "lower",
        "rtt",
        amounts.trips("rtt", "two"),
        (0.15, 1.0),
        limit="spin",
        extra=("p99", "p99.9"),
    ),
    *[
        Case(
            f"rtt-asleep-{pins}",
            ("rtt", "rtt-asleep"),
            f"Round trip of 8 bytes, both ends asleep between, {text}",
            "us (p50)",
            "lower",
            "rtt",
            amounts.trips(f"rtt-asleep-{pins}", pins, 0.001),
            (0.25, 1.5),
            rounds=(2, 3),
            limit=f"futex-{pins}",
            only=lambda peer: not peer.polls,
            extra=("p99", "p99.9"),
            left_out=(("iceoryx2.poll", "it never sleeps"),),
            quick_only=lambda peer, pins=pins: peer.own or pins == "two" or peer.name in FEW,  # type: ignore[misc]
        )
        for pins, text in (("two", "on two CPUs"), ("one", "on one CPU"), ("free", "not pinned"))
    ],
    *_frame_cases(),
    Case(
        "mpmc",
        (),
        "4 producers, 4 consumers, small values",
        "values/s",
        "higher",
        "mpmc",
        amounts.many("mpmc", 4, 4),
        (0.4, 1.5),
        rounds=(2, 3),
    ),
    Case(
        "fanout",
        (),
        "One producer, each value to 4 consumers",
        "values/s to each",
        "higher",
        "fanout",
        amounts.fanout,
        (0.4, 1.5),
        rounds=(1, 3),
    ),
    Case(
        "start",
        (),
        "Start of two processes to the first frame, after import",
        "ms",
        "lower",
        "start",
        amounts.start,
        (0.2, 0.2),
        rounds=(2, 3),
    ),
    Case(
        "chain",
        (),
        "One value through 10 processes and back",
        "us (p50)",
        "lower",
        "chain",
        amounts.chain,
        (0.2, 1.5),
        rounds=(1, 3),
        extra=("p99",),
        only=lambda peer: not peer.polls,
        left_out=(("iceoryx2.poll", "11 polling processes on few CPUs do not come to an end"),),
    ),
    Case(
        "idle",
        ("cpu",),
        "Idle: one consumer that waits",
        "% of a core",
        "lower",
        "idle",
        amounts.idle("idle", 1),
        (0.5, 3),
        rounds=(1, 3),
        quick=False,
        only=lambda peer: peer.name != "upipe.pipe",
        drawn=False,
    ),
    Case(
        "idle-many",
        ("cpu", "growth"),
        "Idle: 64 consumers that wait (uPipe's pipe: and 256 queues)",
        "% of a core",
        "lower",
        "idle",
        amounts.idle("idle-many", 64),
        (1.0, 5),
        rounds=(1, 3),
        only=lambda peer: peer.name in ("upipe.pipe", "mp.Queue"),
        drawn=False,
    ),
    *[
        Case(
            f"among-{count}" if count != 64 else "among",
            ("growth",),
            f"Rate of one queue among {count}, as a share of its lone rate",
            "x lone",
            "higher",
            "among",
            amounts.among("among", count),
            (0.3, 1.0),
            rounds=(2, 3 if count == 64 else 2),
            quick=count == 64,
            only=lambda peer: peer.own,
            extra=("lone", "in turn"),
            drawn=False,
        )
        for count in (4, 16, 64, 256)
    ],
    *[
        Case(
            f"workers-{count}",
            ("growth", "workers"),
            f"One producer, {count} consumers, small values",
            "values/s",
            "higher",
            "mpmc",
            amounts.many(f"workers-{count}", 1, count),
            (0.3, 1.0),
            rounds=(1, 2),
            quick=False,
            curve=Curve("One producer of small values, more consumers", "consumers", count),
        )
        for count in (1, 4, 16, 64)
    ],
    Case(
        "across",
        (),
        "Small values between two hosts (namespaces and a veth cable)",
        "values/s",
        "higher",
        "across",
        amounts.across,
        (0.4, 1.5),
        quick=False,
    ),
    *[
        Case(
            f"across-{label}",
            ("across",),
            f"{what} between two hosts, copied to the consumer, who reads every byte",
            "GB/s",
            "higher",
            "across_frames",
            amounts.across_frames(f"across-{label}", size, shape),
            (0.4, 1.5),
            quick=False,
            limit=f"cable-{label}",
        )
        for label, what, size, shape in (
            ("1m", "1 MiB arrays", MIB, (MIB,)),
            ("1080p", "1080p RGB frames (6.2 MB)", HD_BYTES, HD),
        )
    ],
    *[_payload(size) for size in (0, 64, 1024, 16384, 65536, 262144, MIB, 4 * MIB, 16 * MIB)],
]


def select(names: list[str], quick: bool) -> list[Case]:
    """The cases with one of these names or in one of these groups; all for no names.

    Raises:
        ValueError: nothing is called so.
    """
    for name in names:
        if not any(name == case.name or name in case.groups for case in CASES):
            known = sorted({case.name for case in CASES} | {group for case in CASES for group in case.groups})
            raise ValueError(f"there is no case {name!r}; there are {', '.join(known)}")
    return [
        case
        for case in CASES
        if (case.name in names)
        or ((not names or any(group in names for group in case.groups)) and (case.quick or not quick))
    ]
