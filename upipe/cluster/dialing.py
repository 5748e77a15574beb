"""Which addresses to dial, and when: a bounded table with a back-off for each. Pure.

An address is only a place where a member may be. What an advertisement claims of it is used to save work (a claimed
node that we are connected with is not dialled) and for nothing else: identity comes from the handshake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from upipe.cluster.address import Address
from upipe.cluster.timing import Timing

KNOWN = frozenset({"seed", "member"})
"""Sources that are trusted to name real places: configuration, and the lists of proven members. dns:// names and their
answers count as seeds."""


@dataclass
class Target:
    """One address."""

    address: Address
    node_id: str
    """Who is said to be there, or was proven; "" unknown."""
    source: str
    due: float
    """When it is dialled next; while a dial runs, when that counts as failed."""
    failures: int = 0
    """In a row."""
    dialling: bool = False

    @property
    def known(self) -> bool:
        """Whether it is more than an advertisement."""
        return self.source in KNOWN


class Dialer:
    """The table.

    Args:
        timing: bounds and back-off.
        connected: whether a node id is a live member, so that it needs no dial.
    """

    def __init__(self, timing: Timing, connected: Callable[[str], bool]) -> None:
        self._timing = timing
        self._connected = connected
        self._targets: dict[Address, Target] = {}
        # Invariants: at most timing.addresses; at most timing.dials of them dialling.

    def __len__(self) -> int:
        return len(self._targets)

    def seen(self, address: Address, node_id: str, source: str, now: float) -> None:
        """Somebody names an address. Naming it again changes no back-off: repetition must not cost us dials."""
        target = self._targets.get(address)
        if target is None:
            if self._room():
                self._targets[address] = Target(address, node_id, source, now)
            return
        if self._given_up(target):
            target.failures -= 1  # one more try, when its longest wait is over
        if source in KNOWN or not target.known:
            target.node_id = node_id or target.node_id
        if source == "seed" or (source in KNOWN and not target.known):
            target.source = source

    def due(self, now: float) -> list[Address]:
        """Addresses to dial now, known ones first, and mark them. Dials that were never reported back failed."""
        for target in list(self._targets.values()):
            if target.dialling and target.due <= now:
                self.failed(target.address, now)
        free = self._timing.dials - sum(target.dialling for target in self._targets.values())
        ready = [target for target in self._targets.values() if self._waits(target) and target.due <= now]
        ready.sort(key=lambda target: (not target.known, target.failures, target.due))
        for target in ready[: max(0, free)]:
            target.dialling, target.due = True, now + self._timing.dial_timeout
        return [target.address for target in ready[: max(0, free)]]

    def failed(self, address: Address, now: float, *, for_good: bool = False) -> None:
        """A dial failed. for_good: it was refused for what will not change soon, so wait the longest."""
        target = self._targets.get(address)
        if target is None:
            return
        longest = self._timing.redial_known if target.known else self._timing.redial_hint
        if for_good:
            longest = self._timing.redial_hint
        wait = longest if for_good else self._timing.redial_first * 2.0 ** min(target.failures, 32)
        target.failures += 1
        target.dialling, target.due = False, now + min(longest, wait)

    def proved(self, address: Address, node_id: str, now: float) -> None:
        """A member answered there."""
        self.seen(address, node_id, "member", now)
        target = self._targets.get(address)
        if target is not None:
            target.node_id, target.failures = node_id, 0
            target.dialling, target.due = False, now + self._timing.redial_first

    def revive(self, node_id: str, now: float) -> None:
        """There is reason to dial this node anew: forgive its addresses their failures."""
        for target in self._targets.values():
            if target.node_id == node_id and not target.dialling:
                target.failures, target.due = 0, now

    def forget(self, node_id: str) -> None:
        """Remove the addresses of a node that left or is forgotten; seeds stay and are asked again."""
        for address in [
            one.address for one in self._targets.values() if one.node_id == node_id and one.source != "seed"
        ]:
            del self._targets[address]

    def postpone(self, seconds: float) -> None:
        """Our clock stood still: give every running dial this much more."""
        for target in self._targets.values():
            if target.dialling:
                target.due += seconds

    def deadline(self) -> float | None:
        """When due() has something to do at the latest; None: not before the next event."""
        running = [target.due for target in self._targets.values() if target.dialling]
        if len(running) >= self._timing.dials:
            return min(running)
        return min([target.due for target in self._targets.values() if self._waits(target)] + running, default=None)

    def validate(self) -> None:
        """Assert the bounds (for tests)."""
        assert len(self._targets) <= self._timing.addresses
        assert sum(target.dialling for target in self._targets.values()) <= self._timing.dials

    def _waits(self, target: Target) -> bool:
        if target.dialling or self._given_up(target):
            return False
        return not (target.node_id and self._connected(target.node_id))

    def _given_up(self, target: Target) -> bool:
        return not target.known and not target.dialling and target.failures >= self._timing.hint_tries

    def _room(self) -> bool:
        if len(self._targets) < self._timing.addresses:
            return True
        weak = [target for target in self._targets.values() if target.source != "seed" and not target.dialling]
        worst = max(weak, key=lambda target: (not target.known, target.failures), default=None)
        if worst is None or (worst.known and not worst.failures):
            return False
        del self._targets[worst.address]
        return True
