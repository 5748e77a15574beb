"""What keeps a node from working here, found before it matters: pure checks of what probes.py saw.

Each check turns facts into findings: ok, warning (it works, and may surprise) or problem (it will not work), and each
of the latter two says what to do. Nothing here looks at the machine, so each sentence is tested with made-up facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, Protocol

import msgspec

from upipe.cluster.guard import exposed
from upipe.cluster.messages import PROTOCOL, NodeInfo
from upipe.cluster.tls import SKEW
from upipe.settings import DEFAULT_EDGE_BYTES, MIB

Level = Literal["ok", "warning", "problem"]
DESCRIPTORS = 4096
"""File descriptors that a node with some dozens of workers and peers uses."""
FEW_DESCRIPTORS = 512
EXPIRES_SOON = timedelta(days=14)
CLOCK_WARNING = 1.0
"""Seconds between two hosts' clocks from which ages of frames mislead."""


class Finding(msgspec.Struct, frozen=True):
    """One line of the doctor's."""

    check: str
    level: Level
    what: str
    where: str
    todo: str = ""
    """What to do; "" when ok."""


@dataclass(frozen=True)
class Wanted:
    """The node that one wants to run: as the options of `upipe-node`."""

    host: str = "127.0.0.1"
    port: int = 7420
    cluster: str = ""
    seeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Shared memory: its directory, bytes in all and free, or why it cannot be used."""

    where: str
    total: int = 0
    free: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Peer:
    """What came of asking a node: what it says, or which kind of error said what."""

    address: str
    info: NodeInfo | None = None
    offset: float = 0.0
    """Seconds that its clock is ahead of ours."""
    known: tuple[str, ...] = ()
    """Addresses of nodes that it knows."""
    error: str = ""
    """Class of the error: NodeUnproven, NodeUnreachable, ..."""
    fault: str = ""


@dataclass(frozen=True)
class Certificate:
    """Own certificates: who brought none has those of the token."""

    where: str
    ends: datetime | None = None
    fault: str = ""


@dataclass(frozen=True)
class Token:
    """The token file."""

    where: str
    fingerprint: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Seen:
    """Everything that the probes saw."""

    memory: Memory
    descriptors: int
    """Soft limit of open files."""
    port: str
    """Why it cannot be listened on; "" when it can."""
    token: Token
    version: str
    """Of uPipe here."""
    layout: int
    encryption: str = ""
    """Which OpenSSL this process encrypts with, and why."""
    certificate: Certificate | None = None
    multicast: Mapping[str, str] = field(default_factory=dict)
    """By interface: "" when a datagram to the mDNS group came back, or what went wrong."""
    heard: frozenset[str] = frozenset()
    """Node ids that other hosts advertise."""
    unheard: tuple[str, ...] = ()
    """Sentences on nodes that answer, and whose advertisement does not come."""
    peers: tuple[Peer, ...] = ()
    agent: Peer | None = None
    """Where the port is in use: who listens there."""


class Probes(Protocol):
    """Looks at the machine and the network; faked in tests."""

    async def look(self, wanted: Wanted) -> Seen:
        """Look at everything; never raises, faults are facts."""


def examine(wanted: Wanted, seen: Seen, now: datetime) -> list[Finding]:
    """Every finding, in the order in which one would mend things."""
    return [
        memory(seen.memory),
        descriptors(seen.descriptors),
        token(seen.token),
        *([certificate(seen.certificate, now)] if seen.certificate else []),
        *([Finding("encryption", "ok", seen.encryption, "this host")] if seen.encryption else []),
        port(wanted, seen.port, seen.agent),
        *multicast(wanted, seen),
        *(finding for one in seen.peers for finding in peer(wanted, one, seen)),
        *([] if wanted.seeds or exposed(wanted.host) else [alone(wanted)]),
    ]


def memory(seen: Memory) -> Finding:
    """Is there shared memory for a few queues?"""
    if seen.fault:
        return Finding("shared memory", "problem", seen.fault, seen.where, "mount a tmpfs there, or set UPIPE_SHM")
    told = f"{seen.free / MIB:,.0f} MiB free of {seen.total / MIB:,.0f}"
    more = f"one edge takes {DEFAULT_EDGE_BYTES // MIB} MiB: `upipe sweep`, or a larger one (docker: --shm-size)"
    if seen.free < 2 * DEFAULT_EDGE_BYTES:
        return Finding("shared memory", "problem", f"only {told}", seen.where, more)
    if seen.free < 16 * DEFAULT_EDGE_BYTES:
        return Finding("shared memory", "warning", f"only {told}", seen.where, more)
    return Finding("shared memory", "ok", told, seen.where)


def descriptors(limit: int) -> Finding:
    """Are there descriptors for workers, queues and connections? uPipe locks no memory: memlock does not matter."""
    if limit >= DESCRIPTORS:
        return Finding("limits", "ok", f"{limit:,} open files", "ulimit -n")
    level: Level = "warning" if limit >= FEW_DESCRIPTORS else "problem"
    todo = f"`ulimit -n {DESCRIPTORS}` before the start, or LimitNOFILE= of its systemd unit"
    return Finding("limits", level, f"only {limit:,} open files", "ulimit -n", todo)


def token(seen: Token) -> Finding:
    """Is there the cluster's secret?"""
    if seen.fault:
        return Finding("token", "problem", "it cannot be used", seen.where, seen.fault)
    return Finding("token", "ok", f"fingerprint {seen.fingerprint}", seen.where)


def certificate(seen: Certificate, now: datetime) -> Finding:
    """Are the certificates that were brought along good, and for how long?"""
    if seen.fault or seen.ends is None:
        return Finding("certificate", "problem", "it cannot be used", seen.where, seen.fault)
    told = f"valid until {seen.ends:%Y-%m-%d}"
    if seen.ends - now < EXPIRES_SOON:
        todo = "renew it; a node takes up the new files by itself"
        return Finding("certificate", "warning", f"only {told}", seen.where, todo)
    return Finding("certificate", "ok", told, seen.where)


def port(wanted: Wanted, fault: str, agent: Peer | None) -> Finding:
    """Can the port be listened on, or does the agent of this host do so already?"""
    where = f"{wanted.host}:{wanted.port}"
    if fault and agent is not None and agent.info is not None:
        return Finding("port", "ok", f"node {agent.info.node_id} listens there: the agent of this host", where)
    if fault:
        return Finding("port", "problem", "it cannot be listened on", where, fault)
    return Finding("port", "ok", "free", where)


def multicast(wanted: Wanted, seen: Seen) -> Iterable[Finding]:
    """Can nodes find each other by themselves? That this host hears itself says nothing of the network: only nodes
    that are heard, or are not, do."""
    name_one = "name a node that runs with --join HOST:PORT"
    faults = seen.multicast
    if not any(fault == "" for fault in faults.values()):
        level: Level = "ok" if wanted.seeds else "warning"
        what = "none, and not needed with --join" if wanted.seeds else "no interface carries it: nodes find none"
        todo = "" if wanted.seeds else "; ".join([*filter(None, faults.values()), name_one])
        yield Finding("multicast", level, what, ", ".join(faults) or "no interface", todo)
        return
    for interface, fault in faults.items():
        if fault:
            yield Finding("multicast", "warning", fault, interface, f"{name_one}, if others are there")
        elif seen.heard or seen.unheard or wanted.seeds or not exposed(wanted.host):
            told = f"; nodes of other hosts that were heard: {len(seen.heard)}" if seen.heard else ""
            yield Finding("multicast", "ok", f"sent and received{told}", interface)
        else:
            what = "sent and received here, but no node of another host is heard"
            yield Finding("multicast", "warning", what, interface, f"if nodes run, the network drops it: {name_one}")
    for sentence in seen.unheard[:1]:  # of the others the same can be said
        yield Finding("multicast", "warning", sentence, "network", name_one)


def peer(wanted: Wanted, seen: Peer, ours: Seen) -> Iterable[Finding]:
    """Is a node there, ours, and of our kind and time?"""
    info = seen.info
    if info is None:
        check = {"NodeUnproven": "TLS", "NodeRefused": "token"}.get(seen.error, "peer")
        level: Level = "problem" if seen.address in wanted.seeds else "warning"
        yield Finding(check, level, "it cannot be used", seen.address, seen.fault)
        return
    yield Finding("TLS", "ok", f"node {info.node_id} proved itself", seen.address)
    yield kind(wanted, seen.address, info, ours)
    yield clock(seen.address, seen.offset)


def kind(wanted: Wanted, address: str, info: NodeInfo, ours: Seen) -> Finding:
    """Do cluster name and versions fit?"""
    if wanted.cluster and info.cluster != wanted.cluster:
        what = f"it is of cluster {info.cluster!r}, wanted is {wanted.cluster!r}"
        return Finding("peer", "problem", what, address, "give both the same --cluster, or another --join")
    if (info.protocol, info.layout) != (PROTOCOL, ours.layout):
        what = (
            f"it runs uPipe {info.version} (protocol {info.protocol}, layout {info.layout}), here is {ours.version} "
            f"(protocol {PROTOCOL}, layout {ours.layout})"
        )
        return Finding("peer", "problem", what, address, "install the same version on both")
    told = f"cluster {info.cluster}, uPipe {info.version}, {'draining' if info.draining else 'alive'}"
    if info.version != ours.version:
        return Finding(
            "peer", "warning", f"{told}; here is {ours.version}", address, "install the same version on both"
        )
    return Finding("peer", "ok", told, address)


def clock(address: str, offset: float) -> Finding:
    """Do the clocks agree?"""
    told = f"its clock is {abs(offset):,.1f} s {'ahead' if offset > 0 else 'behind'}"
    todo = "set the clocks by NTP on both (`timedatectl`)"
    if abs(offset) > SKEW.total_seconds():
        return Finding("clock", "problem", f"{told}: certificates are refused", address, todo)
    if abs(offset) > CLOCK_WARNING:
        return Finding("clock", "warning", f"{told}: ages of frames mislead", address, todo)
    return Finding("clock", "ok", told, address)


def alone(wanted: Wanted) -> Finding:
    """A node that nobody can reach and that knows nobody is a cluster of one."""
    what = "only this host can reach a node there"
    return Finding(
        "address", "warning", what, wanted.host, "for a cluster, use --host 0.0.0.0 or an address of this host"
    )
