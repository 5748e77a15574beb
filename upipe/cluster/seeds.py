"""Seeds: addresses that the user names, for networks that multicast does not cross.

    --join 10.0.0.1:7420     --join [fd00::1]:7420     --join node-a:7420     --join dns://upipe.example.org:7420

An IP address is a hint once; a name is resolved again and again, since clouds move it (a headless service of Kubernetes
is a name with an A record for each node). dns:// differs from a host name only in what a failure means: a name without
records yet is usual there and is told as waiting, not as a mistake. SRV records are not read: the C library does not
give them, and a resolver of our own is not worth a port number that is nearly always 7420.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from upipe.cluster.address import Address, parse
from upipe.cluster.member_events import Hint
from upipe.errors import OptionInvalid

RESOLVE_FIRST = 0.5
"""Seconds before the second try of a name that did not resolve; doubles with each failure."""
RESOLVE_AGAIN = 30.0
"""Seconds between two looks at a name, and the longest wait after failures. Shorter follows DNS closer and asks it
more: one query for each seed, node and period."""
MOST_ADDRESSES = 256
"""Addresses taken from one name."""

_DNS = "dns://"


@dataclass(frozen=True)
class Seed:
    """One --join."""

    address: Address
    dns: bool = False
    """Written as dns://: every record is a node."""

    def __str__(self) -> str:
        return f"{_DNS if self.dns else ''}{self.address}"


def parse_seed(text: str) -> Seed:
    """Read HOST:PORT, [IPV6]:PORT or dns://NAME[:PORT].

    Raises:
        OptionInvalid: names the text and the forms that are understood.
    """
    if not text.startswith(_DNS):
        if "://" in text:
            raise OptionInvalid(f"{text!r} is no seed: write HOST:PORT, [IPV6]:PORT or dns://NAME:PORT")
        return Seed(parse(text))
    address = parse(text.removeprefix(_DNS).rstrip("/"))
    if address.is_ip:
        raise OptionInvalid(f"{text!r} is no seed: an IP address needs no DNS, write {address}")
    return Seed(address, dns=True)


Resolve = Callable[[str, int], Awaitable[list[str]]]
"""(name, port) -> IP addresses; OSError when there are none."""


class Seeds:
    """Feeds the hints of all seeds, until its run() is cancelled.

    Args:
        seeds: of parse_seed().
        found: called with each hint.
        tell: called with a sentence when a name does not resolve, and once when it does again.
        resolve: all addresses of a name.
        sleep: as asyncio.sleep.
    """

    def __init__(
        self,
        seeds: tuple[Seed, ...],
        found: Callable[[Hint], None],
        tell: Callable[[str], None] = lambda sentence: None,
        resolve: Resolve | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._seeds = seeds
        self._found = found
        self._tell = tell
        self._resolve = resolve or system_resolve
        self._sleep = sleep

    async def run(self) -> None:
        """Look after every seed."""
        async with asyncio.TaskGroup() as group:
            for seed in self._seeds:
                group.create_task(self._one(seed), name=f"seed {seed}")

    async def _one(self, seed: Seed) -> None:
        if seed.address.is_ip:
            self._found(Hint((seed.address,), "seed"))
            return
        failures = 0
        while True:
            try:
                hosts = await self._resolve(seed.address.host, seed.address.port)
            except OSError as error:
                if failures == 0:
                    self._tell(_sentence(seed, error))
                failures += 1
            else:
                if failures:
                    self._tell(f"seed {seed} resolves again")
                failures = 0
                addresses = tuple(Address(host, seed.address.port) for host in hosts[:MOST_ADDRESSES])
                self._found(Hint(addresses, "seed"))
            await self._sleep(pause(failures))


def pause(failures: int) -> float:
    """Seconds until a name is resolved again after so many failures in a row."""
    return RESOLVE_AGAIN if failures == 0 else min(RESOLVE_AGAIN, RESOLVE_FIRST * 2.0 ** min(failures - 1, 16))


async def system_resolve(name: str, port: int) -> list[str]:
    """All A and AAAA records that the system's resolver gives, in its order of preference."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # labels too long for IDNA
        raise OSError(str(error)) from None
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def _sentence(seed: Seed, error: OSError) -> str:
    reason = error.strerror or str(error)
    if seed.dns:
        return f"seed {seed} has no addresses yet ({reason}); it is asked again every {RESOLVE_AGAIN:g} s"
    return f"seed {seed} does not resolve ({reason}); check the name, or write an IP address. It is tried again"
