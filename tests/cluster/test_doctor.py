"""Each finding from made-up facts; then the real probes on this machine and against a real node."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cluster.secure_support import CLIENT, INFO, NODE, OTHER, SECRET, running
from upipe import __version__
from upipe.cluster import probes, tls, token
from upipe.cluster.address import Address
from upipe.cluster.doctor import Certificate, Finding, Memory, Peer, Seen, Token, Wanted, examine
from upipe.cluster.member_events import Hint
from upipe.cluster.probes import SystemProbes
from upipe.cluster.server import Call
from upipe.cluster.wire import Member, Members, NodeStatus
from upipe.memq.layout import LAYOUT_VERSION
from upipe.settings import Certificates

NOW = datetime(2026, 11, 22, tzinfo=UTC)
GIB = 1 << 30
WELL = Seen(
    memory=Memory("/dev/shm", 8 * GIB, 4 * GIB), descriptors=65536, port="", token=Token("/t", "ab" * 8),
    version="0.1.0", layout=INFO.layout, multicast={"eth0": ""}, peers=(Peer("h:1", INFO),),
)  # fmt: skip
WANTED = Wanted("0.0.0.0", 7420, "test", ("h:1",))


def found(check: str, wanted: Wanted = WANTED, **facts: Any) -> Finding:
    [one] = [one for one in examine(wanted, replace(WELL, **facts), NOW) if one.check == check and one.level != "ok"]
    assert one.todo and one.where
    return one


def test_all_is_well() -> None:
    findings = examine(WANTED, WELL, NOW)
    assert {one.level for one in findings} == {"ok"}
    assert {one.check for one in findings} == {
        "shared memory", "limits", "token", "port", "multicast", "TLS", "peer", "clock"
    }  # fmt: skip


def test_what_encrypts_is_shown() -> None:
    [one] = [one for one in examine(WANTED, replace(WELL, encryption="OpenSSL 9"), NOW) if one.check == "encryption"]
    assert (one.level, one.what) == ("ok", "OpenSSL 9")


@pytest.mark.parametrize(("memory", "level", "said"), [
    (Memory("/dev/shm", fault="not mounted"), "problem", "not mounted"),
    (Memory("/dev/shm", 64 << 20, 10 << 20), "problem", "only 10 MiB free of 64"),
    (Memory("/dev/shm", GIB, 300 << 20), "warning", "only 300 MiB free"),
])  # fmt: skip
def test_shared_memory(memory: Memory, level: str, said: str) -> None:
    one = found("shared memory", memory=memory)
    assert one.level == level and said in one.what and one.where == "/dev/shm"


@pytest.mark.parametrize(("limit", "level"), [(1024, "warning"), (256, "problem")])
def test_limits(limit: int, level: str) -> None:
    one = found("limits", descriptors=limit)
    assert one.level == level and f"only {limit:,} open files" in one.what and "ulimit -n 4096" in one.todo


def test_token_and_port_hand_on_what_is_wrong() -> None:
    assert found("token", token=Token("/t", fault="is open to others: chmod 600")).todo.endswith("chmod 600")
    one = found("port", port="port 7420 is in use by process 7 (x): stop that")
    assert one.level == "problem" and one.where == "0.0.0.0:7420" and "process 7" in one.todo


def test_a_port_that_this_hosts_agent_has_is_well() -> None:
    used = replace(WELL, port="port 7420 is in use by process 7 (upipe-node): stop that")
    [one] = [one for one in examine(WANTED, replace(used, agent=Peer("h:0", INFO)), NOW) if one.check == "port"]
    assert one.level == "ok" and f"node {INFO.node_id} listens there" in one.what
    assert found("port", port=used.port, agent=Peer("h:0", error="NodeUnproven", fault="x")).level == "problem"


@pytest.mark.parametrize(("certificate", "level", "said"), [
    (Certificate("/c", None, "expired at ...: renew it"), "problem", "cannot be used"),
    (Certificate("/c", NOW + timedelta(days=3)), "warning", "only valid until 2026-11-25"),
])  # fmt: skip
def test_certificates_of_ones_own(certificate: Certificate, level: str, said: str) -> None:
    one = found("certificate", certificate=certificate)
    assert one.level == level and said in one.what


def test_multicast_is_missed_only_where_nothing_else_tells_of_nodes() -> None:
    silent = {"eth0": "did not come back"}
    one = found("multicast", replace(WANTED, seeds=()), multicast=silent)
    assert one.level == "warning" and "--join HOST:PORT" in one.todo
    assert all(one.level == "ok" for one in examine(WANTED, replace(WELL, multicast=silent), NOW))
    assert found("multicast", multicast={"eth0": "", "wlan0": "did not come back"}).where == "wlan0"
    assert found("multicast", replace(WANTED, seeds=()), multicast={}).where == "no interface"


def test_that_this_host_hears_itself_is_not_enough() -> None:
    one = found("multicast", replace(WANTED, seeds=()))
    assert "no node of another host is heard" in one.what and "the network drops it" in one.todo
    others = replace(WELL, heard=frozenset(["a", "b"]))
    [well] = [one for one in examine(WANTED, others, NOW) if one.check == "multicast"]
    assert (well.level, well.what) == ("ok", "sent and received; nodes of other hosts that were heard: 2")
    one = found("multicast", unheard=("node x at 10.0.0.7 is reached, and not heard", "another"))
    assert one.level == "warning" and "10.0.0.7" in one.what


def test_a_node_on_loopback_that_knows_nobody_is_pointed_out() -> None:
    assert "--host 0.0.0.0" in found("address", Wanted()).todo


@pytest.mark.parametrize(("error", "check"), [
    ("NodeUnproven", "TLS"), ("NodeRefused", "token"), ("NodeUnreachable", "peer"), ("NodeTimeout", "peer"),
])  # fmt: skip
def test_peers_that_cannot_be_asked(error: str, check: str) -> None:
    assert found(check, peers=(Peer("h:1", error=error, fault="why, and what to do"),)).level == "problem"
    assert found(check, peers=(Peer("other:1", error=error, fault="why"),)).level == "warning"  # only heard of


def test_peers_of_another_cluster_or_version() -> None:
    def said(**changes: Any) -> Finding:
        return found("peer", peers=(Peer("h:1", msgspec.structs.replace(INFO, **changes)),))

    assert "of cluster 'blue', wanted is 'test'" in said(cluster="blue").what
    one = said(version="9.9", layout=7)
    assert one.level == "problem" and "uPipe 9.9 (protocol 1, layout 7), here is 0.1.0" in one.what
    assert said(protocol=2).level == "problem"
    assert said(version="0.1.1").level == "warning"


@pytest.mark.parametrize(("offset", "level", "said"), [
    (2.0, "warning", "2.0 s ahead"), (-86_400.0, "problem", "86,400.0 s behind"),
])  # fmt: skip
def test_clocks(offset: float, level: str, said: str) -> None:
    one = found("clock", peers=(Peer("h:1", INFO, offset),))
    assert one.level == level and said in one.what and "timedatectl" in one.todo


# ------------------------------------------------------------------------------------------------- the real probes


async def test_a_real_node_and_whom_it_knows_are_asked(tmp_path: Path) -> None:
    async def info(call: Call) -> Any:
        import time

        info = msgspec.structs.replace(INFO, version=__version__, layout=LAYOUT_VERSION)
        return NodeStatus(info, time.time() + 100)

    async def members(call: Call) -> Members:
        other = msgspec.structs.replace(INFO, node_id="bb" * 8, port=1)
        return Members("test", (Member(other, "alive"), Member(INFO, "alive")))

    async with running(tmp_path, node=info, members=members) as node:
        wanted = Wanted(seeds=(f"127.0.0.1:{node.port}", "no port"))
        mine = SystemProbes()
        credentials = tls.issue(SECRET, CLIENT)
        seed, bad, other = await mine.peers(wanted, [], SECRET, credentials)
        [stranger, _] = (await mine.peers(wanted, [], OTHER, tls.issue(OTHER, CLIENT)))[:2]
        token.create(tmp_path / "own")
        (tmp_path / "own").write_text(SECRET.text())
        seen = await SystemProbes(tmp_path / "own").look(Wanted("0.0.0.0", node.port))
    assert seed.info is not None and seed.info.node_id == NODE and 99 < seed.offset < 101
    assert bad.error == "Address" and "HOST:PORT" in bad.fault
    assert other.address == "127.0.0.1:1" and other.error == "NodeUnreachable"
    assert stranger.error == "NodeUnproven" and "token" in stranger.fault
    assert seen.agent is not None and seen.agent.info is not None and seen.agent.info.node_id == NODE
    assert [one.address for one in seen.peers] == ["127.0.0.1:1"]  # whom it knows


async def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "token"
    mine = SystemProbes(path)
    assert "upipe token create" in mine.token()[0].fault
    secret = token.create(path)
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        seen = await mine.look(Wanted("127.0.0.1", port))
    assert seen.token == Token(str(path), secret.fingerprint)
    assert f"process {os.getpid()}" in seen.port
    assert seen.memory.total >= seen.memory.free > 0 and seen.descriptors > 0 and not seen.peers


async def test_certificates_of_ones_own_are_looked_at(tmp_path: Path) -> None:
    missing = tmp_path / "ca"
    certificate, credentials = SystemProbes(own=Certificates(*[str(missing)] * 3)).certificate(SECRET)
    assert credentials is None and certificate is not None and "cannot be read" in certificate.fault


async def test_nodes_that_advertise_themselves_are_asked_and_those_that_are_not_heard_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "found_addresses", lambda: {"eth0": ("10.0.0.1",)})
    mine = SystemProbes()
    hints = [Hint((Address("127.0.0.1", 1),), "zeroconf", NODE, fingerprint=SECRET.fingerprint),
             Hint((Address("127.0.0.1", 2),), "zeroconf", "bb" * 8, fingerprint=OTHER.fingerprint)]  # fmt: skip
    [asked] = await mine.peers(Wanted(), hints, SECRET, tls.issue(SECRET, CLIENT))
    assert asked.address == "127.0.0.1:1"
    here = [Peer(f"{host}:1", msgspec.structs.replace(INFO, hosts=(host,))) for host in ("10.0.0.1", "10.0.0.2")]
    [sentence] = mine.unheard(here, [])
    assert "10.0.0.2" in sentence
    assert not mine.unheard(here, hints)
