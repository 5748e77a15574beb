"""What `upipe doctor` sees of this machine and of its peers. Faults are facts here; doctor.py says what they mean."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from upipe import __version__
from upipe.cluster import listen, routes, tls, token
from upipe.cluster.client import Client, Target
from upipe.cluster.doctor import Certificate, Memory, Peer, Seen, Token, Wanted
from upipe.cluster.guard import may_listen
from upipe.cluster.token import Secret
from upipe.errors import ClusterError, NodeCannotServe, TokenError, UpipeError
from upipe.memq import segment
from upipe.memq.layout import LAYOUT_VERSION

GROUP, PORT = "224.0.0.251", 5353
"""Of mDNS."""
MULTICAST_SECONDS = 1.0
"""A datagram of our own comes back within a millisecond, or never."""
PEER_SECONDS = 3.0
MOST_PEERS = 64
"""Peers that are asked, beside the seeds."""


@dataclass
class SystemProbes:
    """Looks at the real machine.

    Args:
        token_file: default as token.place() finds it.
        own: paths of a CA, certificate and key that were brought along.
    """

    token_file: Path | None = None
    own: tuple[Path, Path, Path] | None = None

    async def look(self, wanted: Wanted) -> Seen:
        """See doctor.Probes."""
        shown, secret = self.token()
        certificate, credentials = self.certificate(secret)
        fault, agent = self.port(wanted, secret is not None), None
        peers: list[Peer] = []
        if secret and credentials:
            agent = await _ask(_own_address(wanted), secret, credentials) if fault else None
            peers = await self.peers(wanted, secret, credentials, agent.known if agent else ())
        return Seen(
            memory=self.memory(), descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            port=fault, agent=agent, token=shown, version=__version__, layout=LAYOUT_VERSION,
            certificate=certificate, multicast=await self.multicast(), peers=tuple(peers),
        )  # fmt: skip

    def memory(self) -> Memory:
        """Shared memory, by making a small file in it."""
        where = os.environ.get("UPIPE_SHM", "/dev/shm")
        try:
            root = segment.root()
            probe = root / f".doctor-{secrets.token_hex(4)}"
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                probe.unlink()
                os.posix_fallocate(fd, 0, 4096)
            finally:
                os.close(fd)
            sizes = os.statvfs(root)
            return Memory(str(root), sizes.f_blocks * sizes.f_frsize, sizes.f_bavail * sizes.f_frsize)
        except (OSError, UpipeError) as error:
            return Memory(where, fault=str(error))

    def token(self) -> tuple[Token, Secret | None]:
        """The token file."""
        path = self.token_file or token.place()
        try:
            secret = token.load(path)
        except TokenError as error:
            return Token(str(path), fault=str(error)), None
        return Token(str(path), secret.fingerprint), secret

    def certificate(self, secret: Secret | None) -> tuple[Certificate | None, tls.Credentials | None]:
        """What a client would show: certificates that were brought, or one of the token's."""
        me = tls.Identity("client", secrets.token_hex(8))
        if self.own is None:
            return None, tls.issue(secret, me) if secret else None
        try:
            credentials = tls.bring(*self.own, me)
        except ClusterError as error:
            return Certificate(str(self.own[1]), fault=str(error)), None
        return Certificate(str(self.own[1]), credentials.ends), credentials

    def port(self, wanted: Wanted, has_token: bool) -> str:
        """Listen for an instant."""
        try:
            for one in listen.bind_tcp(wanted.host, wanted.port):
                one.close()
        except NodeCannotServe as error:
            return str(error)
        return may_listen(wanted.host, wanted.port, token=True, tls=True)

    async def multicast(self) -> dict[str, str]:
        """On each interface: send a question to the mDNS group, and hear it."""
        found: dict[str, str] = {}
        for name, address in interfaces():
            try:
                await _ask_the_group(address)
                found[name] = ""
            except TimeoutError:
                found[name] = "a datagram to the mDNS group did not come back: a packet filter?"
            except OSError as error:
                found[name] = f"the mDNS group cannot be used: {error.strerror or error}"
        return found

    async def peers(
        self, wanted: Wanted, secret: Secret, credentials: tls.Credentials, known: Iterable[str] = ()
    ) -> list[Peer]:
        """The seeds, whom they know, and whom the agent of this host knows."""
        seeds = await asyncio.gather(*(_ask(one, secret, credentials) for one in wanted.seeds))
        told = (*known, *(address for one in seeds for address in one.known))
        known = dict.fromkeys(address for address in told if address not in wanted.seeds)
        others = await asyncio.gather(*(_ask(one, secret, credentials) for one in list(known)[:MOST_PEERS]))
        return [*seeds, *others]


def interfaces() -> Iterable[tuple[str, str]]:
    """Names and IPv4 addresses of the interfaces that are up and carry multicast; loopback last, when it is all."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [
        (name, one.address)
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if name in up and one.family == socket.AF_INET
    ]
    return [one for one in found if not one[1].startswith("127.")] or found


def question(number: int) -> bytes:
    """An mDNS question for nodes of uPipe, told by its id."""
    labels = b"".join(bytes([len(one)]) + one for one in (b"_upipe", b"_tcp", b"local"))
    return struct.pack(">6H", number, 0, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 12, 1)


async def _ask_the_group(address: str) -> None:
    loop = asyncio.get_running_loop()
    number = secrets.randbelow(1 << 16)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hearing,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
    ):
        for one in (hearing, asking):
            one.setblocking(False)
        hearing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        hearing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # avahi and nodes listen there too
        hearing.bind((GROUP, PORT))
        hearing.setsockopt(
            socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + socket.inet_aton(address)
        )
        asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        await loop.sock_sendto(asking, question(number), (GROUP, PORT))
        async with asyncio.timeout(MULTICAST_SECONDS):
            while await loop.sock_recv(hearing, 9000) != question(number):
                pass


def _own_address(wanted: Wanted) -> str:
    """Of whoever listens on the port that is wanted."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(wanted.host, wanted.host)
    return f"[{host}]:{wanted.port}" if ":" in host else f"{host}:{wanted.port}"


async def _ask(address: str, secret: Secret, credentials: tls.Credentials) -> Peer:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return Peer(address, error="Address", fault="an address is HOST:PORT, as 10.0.0.1:7420")
    async with Client(Target(host.strip("[]"), int(port)), secret, credentials) as client:
        try:
            await client.call(routes.NODE, seconds=PEER_SECONDS, attempts=1)  # opens the connection
            began = time.time()
            status = await client.call(routes.NODE, seconds=PEER_SECONDS, attempts=1)
            offset = status.now - (began + time.time()) / 2
            members = await client.call(routes.MEMBERS, seconds=PEER_SECONDS, attempts=1)
        except ClusterError as error:
            return Peer(address, error=type(error).__name__, fault=str(error))
    others = (one.info for one in members.members if one.info.node_id != status.info.node_id)
    known = tuple(str(one.addresses[0]) for one in others if one.addresses)
    return Peer(address, status.info, offset, known)
