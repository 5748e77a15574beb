"""Whom to ping, and how far each ping is: first directly, then through others, then it has failed. Pure.

Members stand on a ring in the order of their ids, and each watches the next `watchers` of it. So everybody is watched
by equally many whatever the size, by the same ones all the time (a bound on the time until a death is seen that random
choice does not give), and all agree on the ring as soon as they agree on the members.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from upipe.cluster.timing import Timing


def watched(own: str, others: Iterable[str], watchers: int) -> list[str]:
    """The nodes that `own` watches among `others`."""
    ring: Sequence[str] = sorted(others)
    start = bisect.bisect(ring, own)
    return [*ring[start:], *ring[:start]][:watchers]


@dataclass
class Probe:
    """One ping under way."""

    number: int
    node_id: str
    due: float
    """When this stage has failed."""
    stage: Literal["direct", "relayed"] = "direct"
    outstanding: int = 1
    """Answers that may still come in this stage. Invariant: positive."""
    reason: str = ""
    """Why the direct one failed."""
    relays: int = 0
    """How many others were asked."""


class Prober:
    """All pings under way: at most one for each node.

    Args:
        timing: interval and time-outs.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._last = 0
        self._probes: dict[int, Probe] = {}
        self._by_node: dict[str, Probe] = {}
        self._next: dict[str, float] = {}

    def wants(self, node_id: str, now: float) -> bool:
        """Whether the node's next ping is due and none is under way. One never pinged is due at once."""
        return node_id not in self._by_node and self._next.get(node_id, now) <= now

    def start(self, node_id: str, now: float) -> Probe:
        """Begin a ping; one under way is given up."""
        self.stop(node_id)
        self._last += 1
        probe = Probe(self._last, node_id, now + self._timing.ping_timeout)
        self._probes[probe.number] = self._by_node[node_id] = probe
        self._next[node_id] = now + self._timing.ping_interval
        return probe

    def relay(self, probe: Probe, relays: int, now: float) -> None:
        """The direct ping failed, and so many others try now."""
        probe.stage, probe.due = "relayed", now + self._timing.relay_timeout
        probe.outstanding = probe.relays = relays

    def asked(self, number: int) -> str | None:
        """Whom that ping asks; None when it was given up."""
        probe = self._probes.get(number)
        return probe.node_id if probe is not None else None

    def answered(self, number: int) -> None:
        """It answered. A late answer to a ping that was given up changes nothing here."""
        probe = self._probes.get(number)
        if probe is not None:
            self._end(probe)

    def failed(self, number: int, reason: str) -> Probe | None:
        """One try failed; the probe when that was the last of its stage."""
        probe = self._probes.get(number)
        if probe is None:
            return None
        probe.reason = probe.reason or reason
        probe.outstanding -= 1
        return probe if probe.outstanding <= 0 else None

    def overdue(self, now: float) -> list[Probe]:
        """Probes whose stage timed out."""
        return [probe for probe in self._probes.values() if probe.due <= now]

    def stop(self, node_id: str) -> None:
        """Give up what is under way for this node."""
        probe = self._by_node.get(node_id)
        if probe is not None:
            self._end(probe)

    def forget(self, node_id: str) -> None:
        """The node is gone."""
        self.stop(node_id)
        self._next.pop(node_id, None)

    def postpone(self, seconds: float) -> None:
        """Our clock stood still: give every ping this much more."""
        for probe in self._probes.values():
            probe.due += seconds

    def deadline(self, node_ids: Iterable[str]) -> float | None:
        """When something is to be done for these nodes, or times out."""
        starts = [self._next.get(one, 0.0) for one in node_ids if one not in self._by_node]
        return min(starts + [probe.due for probe in self._probes.values()], default=None)

    def validate(self) -> None:
        """Assert the invariants (for tests)."""
        assert {probe.node_id: probe for probe in self._probes.values()} == self._by_node
        assert all(number == probe.number and probe.outstanding > 0 for number, probe in self._probes.items())

    def _end(self, probe: Probe) -> None:
        del self._probes[probe.number]
        del self._by_node[probe.node_id]
