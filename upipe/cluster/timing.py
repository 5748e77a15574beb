"""Knobs of membership, each with unit, formula and what turning it costs."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True):
    """How fast a dead node is known, and what it costs.

    A node that dies is known dead by the one that notices within ``detection`` = ``ping_interval + ping_timeout +
    relay_timeout + suspicion`` = 4 s, and by all others ``rumour_grace`` and a few ``gossip_interval`` later, since
    the suspicion has travelled to them in the meantime. 5 s are promised.
    """

    ping_interval: float = 0.5
    """Seconds between two pings of one node by one of its watchers. Half of it finds the dead a quarter second earlier
    and doubles the idle traffic, which is ``2 * min(watchers, n - 1) / ping_interval`` messages per second and node."""
    ping_timeout: float = 0.5
    """Seconds to wait for an answer before others are asked to try. Above the worst round trip and pause of an agent;
    too low costs relayed pings, never a life."""
    relay_timeout: float = 0.5
    """Seconds for the others' tries. When all fail, the node is suspect."""
    suspicion: float = 2.5
    """Seconds in which a suspect may object. This is the pause that a living agent can afford (garbage collection, a
    machine swapping): ``relay_timeout + suspicion`` and more. Longer spares the slow and keeps work waiting for the
    dead."""
    rumour_grace: float = 0.5
    """Seconds left to a node that another member holds dead: nobody dies of hearsay without the chance to object."""
    fresh: float = 1.0
    """Seconds for which having heard from a node weighs more than what others hold against it. ``ping_interval +
    ping_timeout``: then only its watchers judge by themselves, and one member with bad links makes no stir."""
    watchers: int = 6
    """How many members ping one node: up to watchers + 1 nodes everybody watches everybody. When all watchers of a node
    die at the same moment as it does, its death is found one ``detection`` later, by the next ones."""
    relays: int = 3
    """Members that are asked to try when a ping fails. More need more bad links at once for a false suspicion."""
    gossip_interval: float = 0.2
    """Seconds between two rounds of news, while there are any: a round reaches ``fanout`` members, so news is with n
    members after about ``log(n) / log(1 + fanout)`` rounds. Quiet clusters send none."""
    fanout: int = 3
    """Members told in each round. More is faster by a logarithm and costs linearly."""
    retransmit: float = 4.0
    """Each news is told ``ceil(retransmit * log10(n + 1))`` rounds long; more survives more loss."""
    rumours: int = 16
    """Most news in one message: about 400 bytes each."""
    sync_interval: float = 1.0
    """Seconds between two whole lists sent to the same member, when its digest differs from ours."""
    dial_timeout: float = 4.0
    """Seconds after which a dial that was never reported back counts as failed."""
    dials: int = 16
    """Most dials at a time. A flood of false hints can use them, for dial_timeout each; seeds and members go first."""
    redial_first: float = 0.25
    """Seconds before the second dial of an address; doubles with each failure."""
    redial_known: float = 3.0
    """Longest wait in seconds between two dials of a seed or of a former member: an outage heals this much later."""
    redial_hint: float = 60.0
    """Longest wait in seconds between two dials of an address that only an advertisement named."""
    hint_tries: int = 8
    """Failures after which such an address is dialled only when it is advertised again, and once each time."""
    addresses: int = 512
    """Most addresses remembered. When full, the advertised one with the most failures goes, seeds never."""
    forget: float = 24 * 3600.0
    """Seconds that the dead and those who left are remembered, and the dead dialled again: a partition that lasts
    longer heals only by seeds and advertisements."""
    late: float = 1.0
    """Seconds by which our own timers may be late before we distrust ourselves instead of the others: a machine that
    slept gives everybody the time again."""

    @property
    def detection(self) -> float:
        """Seconds from a death until the first watcher declares it, at most, when timers run on time."""
        return self.ping_interval + self.ping_timeout + self.relay_timeout + self.suspicion
