"""What a ledger must say about a pipe that went through faults. Pure.

    missing          a number that the source emitted in its last life and nobody saw
    begun anew       a source begins at 0 again only when the node it ran on counted as lost; elsewhere it resumes
    two copies       what an older life of the source emitted after a newer one had begun is seen by nobody
    again            beside that a number is seen twice only if something died that held it, or told too late that it
                     did not
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

ON_ITS_WAY = 100
"""After a node was lost: numbers whose results had left it and which it had not told as finished; a third of a second's
worth, which its agent may be late on a busy machine. (What it had taken and not passed on is not seen twice.)"""


class Sighting(NamedTuple):
    """A value that arrived at the last stage (jobs/chain.py); times in ns of one clock."""

    number: int
    life: int
    """When that run of the source began."""
    emitted: int
    seen: int


class Losses(NamedTuple):
    """What is known to have died."""

    workers: int = 0
    """Killed, each of which held one frame at most."""
    nodes: int = 0
    """Times that a node was given up, or lost its keeper."""
    source: bool = False
    """The node of the source was among them."""


def wrong(sightings: Iterable[Sighting], emitted: int, losses: Losses) -> list[str]:
    """Sentences; none when all is as it must be.

    Args:
        emitted: numbers of the last life of the source: 0 .. emitted - 1.
    """
    known = sorted(sightings, key=lambda one: one.emitted)
    lives: dict[int, list[Sighting]] = {}
    for one in sorted(known, key=lambda one: one.life):
        lives.setdefault(one.life, []).append(one)
    return [
        *_missing({one.number for one in known}, emitted),
        *_anew(list(lives.values()), losses),
        *_two_copies(list(lives.values())),
        *_again(list(lives.values()), losses),
    ]


def anew(lives: list[list[Sighting]]) -> int:
    """Numbers that a later life of the source emitted again."""
    seen: set[int] = set()
    again = 0
    for life in lives:
        numbers = {one.number for one in life}
        again += len(numbers & seen)
        seen |= numbers
    return again


def _missing(seen: set[int], emitted: int) -> list[str]:
    missing = sorted(set(range(emitted)) - seen)
    return [f"{len(missing)} are missing: {missing[:20]}"] if missing else []


def _anew(lives: list[list[Sighting]], losses: Losses) -> list[str]:
    again = anew(lives)
    if not again or losses.source:
        return []
    return [f"the source emitted {again} numbers in two lives, and its node was never given up"]


def _two_copies(lives: list[list[Sighting]]) -> list[str]:
    found = []
    for older, newer in pairwise(lives):
        began = min(one.emitted for one in newer)
        late = [one.number for one in older if one.emitted > began]
        if late:
            found.append(f"two copies of the source: {len(late)} numbers of the older one were emitted and seen after "
                         f"the newer one had begun: {late[:20]}")  # fmt: skip
    return found


def _again(lives: list[list[Sighting]], losses: Losses) -> list[str]:
    again = sum(sum(Counter(one.number for one in life).values()) - len({one.number for one in life}) for life in lives)
    most = losses.workers + ON_ITS_WAY * losses.nodes
    if again <= most:
        return []
    return [f"{again} numbers were seen again, and {losses} explain {most} at most"]
