"""What `upipe doctor` sees of this machine and of its peers. Faults are facts here; doctor.py says what they mean."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from upipe import __version__
from upipe.cluster import listen, routes, tls, tls_choice, token
from upipe.cluster.client import Client, Target
from upipe.cluster.doctor import Certificate, Memory, Peer, Seen, Token, Wanted
from upipe.cluster.guard import exposed, may_listen
from upipe.cluster.interfaces import found_addresses
from upipe.cluster.member_events import Hint
from upipe.cluster.multicast import by_interface, unheard
from upipe.cluster.reach import browsed
from upipe.cluster.token import Secret
from upipe.errors import ClusterError, NodeCannotServe, TokenError, UpipeError
from upipe.memq import segment
from upipe.memq.layout import LAYOUT_VERSION
from upipe.settings import Certificates

PEER_SECONDS = 3.0
MOST_PEERS = 64
"""Peers that are asked, beside the seeds."""


@dataclass
class SystemProbes:
    """Looks at the real machine.

    Args:
        token_file: default as token.place() finds it.
        own: certificates that were brought along.
    """

    token_file: Path | None = None
    own: Certificates | None = None

    async def look(self, wanted: Wanted) -> Seen:
        """See doctor.Probes."""
        shown, secret = self.token()
        certificate, credentials = self.certificate(secret)
        fault, agent = self.port(wanted, secret is not None), None
        heard, multicast = await asyncio.gather(self.heard(wanted), by_interface())
        peers: list[Peer] = []
        if secret and credentials:
            agent = await _ask(_own_address(wanted), secret, credentials) if fault else None
            peers = await self.peers(wanted, heard, secret, credentials, agent.known if agent else ())
        return Seen(
            memory=self.memory(), descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            port=fault, agent=agent, token=shown, version=__version__, layout=LAYOUT_VERSION,
            certificate=certificate, encryption=tls_choice.chosen().told, multicast=multicast,
            heard=frozenset(one.node_id for one in heard),
            unheard=self.unheard(peers, heard), peers=tuple(peers),
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
            credentials = tls.bring(self.own, me)
        except ClusterError as error:
            return Certificate(self.own.certificate, fault=str(error)), None
        return Certificate(self.own.certificate, credentials.ends), credentials

    def port(self, wanted: Wanted, has_token: bool) -> str:
        """Listen for an instant."""
        try:
            for one in listen.bind_tcp(wanted.host, wanted.port):
                one.close()
        except NodeCannotServe as error:
            return str(error)
        return may_listen(wanted.host, wanted.port, token=True, tls=True)

    async def heard(self, wanted: Wanted) -> list[Hint]:
        """Advertisements of other hosts' nodes; none are looked for by a node that others cannot reach."""
        if not exposed(wanted.host):
            return []
        here = {one for addresses in found_addresses().values() for one in addresses}
        found: list[Hint] = []
        await browsed(found.append)
        return [one for one in found if not here & {address.host for address in one.addresses}]

    def unheard(self, peers: Iterable[Peer], heard: list[Hint]) -> tuple[str, ...]:
        """What to say of nodes of our networks that answer, and whose advertisement does not come."""
        infos = [one.info for one in peers if one.info is not None]
        own = found_addresses()
        here = {one for addresses in own.values() for one in addresses}
        others = [one for one in infos if not here & set(one.hosts)]
        return tuple(unheard(others, {one.node_id for one in heard}, own))

    async def peers(
        self, wanted: Wanted, heard: list[Hint], secret: Secret, credentials: tls.Credentials, known: Iterable[str] = ()
    ) -> list[Peer]:
        """The seeds, those that advertise themselves with our token, and whom these and the agent of this host know."""
        near = [one for one in heard if one.fingerprint == secret.fingerprint]
        first = dict.fromkeys([*wanted.seeds, *(str(one.addresses[0]) for one in near[:MOST_PEERS])])
        asked = list(await asyncio.gather(*(_ask(one, secret, credentials) for one in first)))
        told = (*known, *(address for one in asked for address in one.known))
        known = dict.fromkeys(address for address in told if address not in first)
        others = await asyncio.gather(*(_ask(one, secret, credentials) for one in list(known)[:MOST_PEERS]))
        return [*asked, *others]


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
