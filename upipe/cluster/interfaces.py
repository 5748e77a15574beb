"""The addresses of this machine, and news when they change. Linux: getifaddrs and a netlink socket, no polling."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping

import psutil

from upipe.cluster.messages import MAX_HOSTS

WILDCARDS = frozenset({"0.0.0.0", "::", ""})
SETTLE = 0.25
"""Seconds from the first change to the telling of all that came with it: an interface that comes up sends several."""

_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100


def reachable_at(host: str) -> tuple[str, ...]:
    """The addresses to tell others when an agent listens on `host`: itself, or all of the machine for a wildcard.

    Loopback and link-local addresses mean another machine elsewhere; they are told only when there is nothing else.
    """
    if host not in WILDCARDS:
        return (host,)
    return chosen(found_addresses(), ipv6=host != "0.0.0.0")


def found_addresses() -> dict[str, tuple[str, ...]]:
    """Interface name -> its IP addresses; of interfaces that are up, in the kernel's order."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(one.address for one in addresses if one.family in families)
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def chosen(found: Mapping[str, Iterable[str]], *, ipv6: bool = True) -> tuple[str, ...]:
    """Which of these to tell: routable ones, IPv4 first, at most MAX_HOSTS; else link-local ones, else loopback."""
    everything = {text: ipaddress.ip_address(text) for addresses in found.values() for text in addresses}
    everything = {text: one for text, one in everything.items() if ipv6 or one.version == 4}
    loopback = [text for text, one in everything.items() if one.is_loopback]
    local = [text for text, one in everything.items() if one.is_link_local]
    routable = [text for text in everything if text not in loopback and text not in local]
    best = routable or local or loopback
    return tuple(sorted(best, key=lambda text: everything[text].version)[:MAX_HOSTS])


class Watch:
    """Calls back, some SETTLE after the addresses or links of this machine changed.

    Args:
        changed: called in the event loop.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
        self._loop.add_reader(self._socket, self._readable)

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    self._socket.recv(65536)  # what it says is not read: who is told looks again anyway
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
                    break  # ENOBUFS: more changed than the socket could hold; one look covers it all
        if self._timer is None:
            self._timer = self._loop.call_later(SETTLE, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._changed()

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
