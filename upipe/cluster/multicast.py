"""Does multicast work here? For `upipe doctor`, and for an agent that wonders why nobody finds it.

From one machine only half of it can be seen: that interfaces do multicast and the kernel delivers it
(`local_problems`). Whether the network passes it on shows when a member that we reach by a seed was never heard
(`unheard`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Mapping, Set

import psutil

from upipe.cluster.interfaces import found_addresses
from upipe.cluster.messages import NodeInfo

GROUP4 = "224.0.0.251"
GROUP6 = "ff02::fb"
"""The groups of mDNS: some networks pass only those they know."""
_WAIT = 0.5


async def local_problems(wait: float = _WAIT) -> list[str]:
    """Why multicast cannot work on this machine, a sentence for each interface; empty when all is well.

    Args:
        wait: seconds for our own packet to come back.
    """
    tried = await by_interface(wait)
    if not tried:
        return ["this machine has no network interface that is up, but loopback; nodes find each other only on itself"]
    return [f"interface {name}: {fault} (or name nodes with --join)" for name, fault in tried.items() if fault]


async def by_interface(wait: float = _WAIT) -> dict[str, str]:
    """What is wrong with multicast on each interface of this machine that is up, but loopback; "" when nothing is."""
    outside = {name: addresses for name, addresses in found_addresses().items() if not _loopback(addresses)}
    flags = {name: stats.flags.split(",") for name, stats in psutil.net_if_stats().items()}
    tried = await asyncio.gather(*(_try_interface(name, addresses, wait) for name, addresses in outside.items()))
    return {
        name: f"it does no multicast; run: ip link set {name} multicast on"
        if "multicast" not in flags.get(name, [])
        else problem and f"multicast fails ({problem}); look at its firewall"
        for name, problem in zip(outside, tried, strict=True)
    }


def unheard(members: Iterable[NodeInfo], heard: Set[str], own: Mapping[str, Iterable[str]]) -> list[str]:
    """Sentences on members of our own networks whose advertisement never came.

    Args:
        members: in use for longer than an advertisement takes (some seconds), ourselves not among them.
        heard: node ids that zeroconf has found.
        own: found_addresses() of this machine.
    """
    networks = [_network(text) for addresses in own.values() for text in addresses]
    sentences = []
    for member in members:
        near = [host for host in member.hosts if _inside(host, networks)]
        if near and member.node_id not in heard:
            sentences.append(
                f"node {member.node_id} at {near[0]} is on our network and reached, but its multicast is not "
                "heard: a switch, an access point or a firewall drops it (unless it runs with --no-multicast); keep "
                "naming nodes with --join"
            )
    return sentences


async def _try_interface(name: str, addresses: Iterable[str], wait: float) -> str:
    """Send one packet to the group and wait for it ourselves; "" or what went wrong."""
    for address in addresses:
        one = ipaddress.ip_address(address)
        if one.version == 6 and not one.is_link_local:
            continue  # the group is of the link, and link-local addresses are there whenever IPv6 is
        try:
            await _echo(name, address, one.version, wait)
        except TimeoutError:
            return f"IPv{one.version}: what is sent to {GROUP4 if one.version == 4 else GROUP6} does not come back"
        except OSError as error:
            return f"IPv{one.version}: {error.strerror or error}"
    return ""


async def _echo(name: str, address: str, version: int, wait: float) -> None:
    loop = asyncio.get_running_loop()
    word = os.urandom(16)
    with _joined(name, address, version) as one:
        target = (GROUP4, one.getsockname()[1]) if version == 4 else (GROUP6, one.getsockname()[1], 0, _index(name))
        one.sendto(word, target)  # a datagram never waits; and uvloop has no sock_sendto
        async with asyncio.timeout(wait):
            while await loop.sock_recv(one, 64) != word:
                pass


def _joined(name: str, address: str, version: int) -> socket.socket:
    """A socket in the group, on that interface and a port of its own (5353 is left to who has it)."""
    one = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    try:
        one.setblocking(False)
        if version == 4:
            one.bind(("", 0))
            interface = socket.inet_aton(address)
            one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP4) + interface)
            one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
        else:
            one.bind(("::", 0))
            group = socket.inet_pton(socket.AF_INET6, GROUP6) + struct.pack("@I", _index(name))
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, _index(name))
    except BaseException:
        one.close()
        raise
    return one


def _index(name: str) -> int:
    return socket.if_nametoindex(name)


def _loopback(addresses: Iterable[str]) -> bool:
    return all(ipaddress.ip_address(one).is_loopback for one in addresses)


def _network(address: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """The usual network around an address; prefix lengths are not asked for, this only words a suspicion."""
    one = ipaddress.ip_address(address.partition("%")[0])
    return ipaddress.ip_network((one, 24 if one.version == 4 else 64), strict=False)


def _inside(host: str, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    try:
        one = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return not one.is_loopback and any(one in network for network in networks)
