"""One member as another sees it: its states as a literal table, and what is remembered of it. Pure.

The word of a node about itself wins over everybody's, by incarnation: only it raises that number, and does so when it
hears that it is suspect or dead, so a living node can always object. The dead and those who left come back only with
a higher one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from upipe.cluster.address import Address
from upipe.cluster.messages import NodeInfo, Rumour
from upipe.lifecycle import Machine, Table

MEMBER: Final[Table] = {
    "joining": {"prove": "alive", "hear": "joining", "die": "dead", "leave": "left"},
    "alive": {"prove": "alive", "hear": "alive", "doubt": "suspect", "leave": "left"},
    "suspect": {"prove": "alive", "hear": "alive", "doubt": "suspect", "die": "dead", "leave": "left"},
    "dead": {"prove": "alive", "hear": "joining", "die": "dead", "leave": "left"},
    "left": {"prove": "alive", "hear": "joining", "die": "left", "leave": "left"},
}
"""``prove``: it spoke to us itself over a proven connection, newer than what we hold; ``hear``: a member tells of a
newer incarnation; ``doubt``: it answers neither us nor through others; ``die``: it did not object in time; ``leave``:
it said good-bye. joining: members hold it alive, we have not met it yet. alive cannot die at once: it is suspect
first."""

LIVE: Final = frozenset({"alive", "suspect"})
"""The states in which it is used: from NodeUp to NodeDown or NodeLeft."""
GONE: Final = frozenset({"dead", "left"})
"""The states that only a higher incarnation ends."""


@dataclass
class Member:
    """What this agent holds of one other node."""

    info: NodeInfo
    """The newest it or a member told; info.incarnation never goes back."""
    machine: Machine
    since: float
    """When the state last changed."""
    met: int = 0
    """The life in which it last proved itself to us; 0: never. Invariant: live members have been met."""
    contact: Address | None = None
    """Where it last answered."""
    dead_at: float | None = None
    """When it dies unless it objects. Set exactly while it is suspect."""
    why: str = ""
    """What made it suspect, for people."""
    heard: float = -math.inf
    """When it last spoke to us itself."""
    behind: bool = False
    """It spoke with a lower incarnation than the one we hold: it has not heard of its own later life."""
    charged: bool = False
    """Others suspect it and we, who hear from it, do not. Only while it is alive."""
    synced: float = -math.inf
    """When it was last sent the whole list."""

    @property
    def state(self) -> str:
        """Present state."""
        return self.machine.state

    @property
    def live(self) -> bool:
        """Whether it is used."""
        return self.state in LIVE

    @property
    def accused(self) -> bool:
        """Whether something is held against it that only it can set right: every message to it says so."""
        return self.behind or self.charged or self.state in ("suspect", "dead")

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where to reach it, the likeliest first."""
        rest = tuple(one for one in self.info.addresses if one != self.contact)
        return rest if self.contact is None else (self.contact, *rest)

    def rumour(self) -> Rumour:
        """What we tell of it."""
        state: dict[str, Literal["alive", "suspect", "dead", "left"]]
        state = {"joining": "alive", "alive": "alive", "suspect": "suspect", "dead": "dead", "left": "left"}
        return Rumour(self.info, state[self.state])

    def charge(self) -> Rumour:
        """What it should know that is said of it."""
        return Rumour(self.info, "suspect") if self.charged else self.rumour()

    def validate(self) -> None:
        """Assert the invariants that stand beside the fields (for tests)."""
        assert (self.dead_at is not None) == (self.state == "suspect"), self
        assert not self.live or self.met > 0, self
        assert not self.charged or self.state == "alive", self
        assert self.met <= self.info.life, self


def digest(infos: Iterable[NodeInfo]) -> int:
    """A number that is equal when two nodes hold the same ones alive, in the same incarnations.

    The dead are not in it: everybody forgets them at another time, and lists would differ for ever.
    """
    told = sorted(f"{one.node_id}/{one.incarnation:x}" for one in infos)
    return zlib.crc32(" ".join(told).encode())


class News:
    """What changed lately and is still to be told, least told first.

    Args:
        retransmit: see Timing.
    """

    def __init__(self, retransmit: float) -> None:
        self._retransmit = retransmit
        self._left: dict[str, int] = {}
        # Invariant: every count is positive.

    @property
    def pending(self) -> bool:
        """Whether anything is to be told."""
        return bool(self._left)

    def note(self, node_id: str, members: int) -> None:
        """Something changed about `node_id`, in a cluster of so many."""
        self._left[node_id] = max(2, math.ceil(self._retransmit * math.log10(members + 1)))

    def pick(self, most: int) -> list[str]:
        """Up to `most` node ids, the least told first. Picking is not telling: see told()."""
        return sorted(self._left, key=lambda one: -self._left[one])[:most]

    def told(self, node_ids: Iterable[str]) -> None:
        """A round with these went out."""
        for one in node_ids:
            left = self._left.get(one, 0) - 1
            if left > 0:
                self._left[one] = left
            else:
                self._left.pop(one, None)

    def drop(self, node_id: str) -> None:
        """It was forgotten."""
        self._left.pop(node_id, None)
