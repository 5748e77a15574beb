"""Multicast DNS: what is said and read, and real multicast between hosts in network namespaces."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster.netns import Lan, lan_of
from tests.support import crowded
from upipe.cluster import discovery
from upipe.cluster.address import Address
from upipe.cluster.messages import NodeInfo

NODE_A, NODE_B, NODE_C = "a" * 16, "b" * 16, "c" * 16
USABLE = 2.0
DEADLINE = 60.0


def info(**changes: Any) -> NodeInfo:
    return NodeInfo(**{"node_id": NODE_A, "cluster": "video", "hosts": ("10.0.0.1", "fd00::1"), "port": 7420,
                       "incarnation": 1 << 32, "version": "0.1.0", "fingerprint": "ab" * 32, **changes})  # fmt: skip


# ------------------------------------------------------------------ what is said and read


def records(one: NodeInfo) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in discovery.txt(one).items()}


def test_what_is_advertised_is_read_back() -> None:
    hint = discovery.read_hint(records(info()), ["10.0.0.1", "fd00::1", "fe80::1%eth0"], 7420)
    assert hint is not None
    assert hint.addresses == (Address("10.0.0.1", 7420), Address("fd00::1", 7420), Address("fe80::1%eth0", 7420))
    assert (hint.node_id, hint.cluster, hint.protocol, hint.fingerprint) == (NODE_A, "video", 1, "ab" * 32)
    assert hint.source == "zeroconf"


def test_zeroconf_makes_the_same_records() -> None:
    service = discovery.service_info(info())
    hint = discovery.read_hint(service.properties, service.parsed_addresses(), service.port or 0)
    assert hint is not None
    assert hint.addresses == info().addresses


def test_a_long_cluster_name_fits_and_is_left_to_the_handshake() -> None:
    service = discovery.service_info(info(cluster="é" * 128))
    hint = discovery.read_hint(service.properties, ["10.0.0.1"], 7420)
    assert hint is not None
    assert hint.cluster == ""


@pytest.mark.parametrize(
    ("changes", "hosts", "port"),
    [
        ({b"node": b"../../../etc"}, ["10.0.0.1"], 1),
        ({b"node": b"\xff" * 16}, ["10.0.0.1"], 1),
        ({b"node": None}, ["10.0.0.1"], 1),
        ({b"proto": b"-1"}, ["10.0.0.1"], 1),
        ({b"proto": b"9" * 200}, ["10.0.0.1"], 1),
        ({}, [], 1),
        ({}, ["10.0.0.1"], 0),
        ({}, ["not an address"], 1),
    ],
)
def test_lies_in_a_bad_form_are_no_hint(changes: dict[bytes, bytes | None], hosts: list[str], port: int) -> None:
    assert discovery.read_hint({**records(info()), **changes}, hosts, port) is None


@given(
    st.dictionaries(st.binary(max_size=20) | st.sampled_from([b"node", b"proto", b"fp"]), st.none() | st.binary()),
    st.lists(st.text(max_size=20)),
    st.integers(-1, 70000),
)
def test_rubbish_never_raises(properties: dict[bytes, bytes | None], hosts: list[str], port: int) -> None:
    discovery.read_hint(properties, hosts, port)


def test_addresses_are_bounded() -> None:
    hosts = [f"10.0.{number >> 8}.{number & 255}" for number in range(1000)]
    hint = discovery.read_hint(records(info()), hosts, 7420)
    assert hint is not None
    assert len(hint.addresses) == 16


def test_zeroconf_is_not_imported_until_it_is_started() -> None:
    code = "import sys, upipe.cluster.discovery, upipe.cluster.membership; sys.exit('zeroconf' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)


# ------------------------------------------------------------------ real multicast


class Advertiser:
    """A process on a host that tells what it notices."""

    def __init__(self, lan: Lan, host: int, node_id: str, loop: str = "asyncio") -> None:
        command = (sys.executable, "-m", "tests.cluster.advertiser", node_id, "video", loop)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = lan.popen(host, *command, **pipes, bufsize=0)  # select sees nothing of what lies in a buffer
        self._heard: list[dict[str, Any]] = []
        self.started = self.until("problems")

    def until(self, key: str, value: object = None) -> dict[str, Any]:
        """The first thing noticed with that key (and value); those before it are skipped."""
        end = time.monotonic() + DEADLINE
        while True:
            for index, words in enumerate(self._heard):
                if key in words and value in (None, words[key]):
                    del self._heard[: index + 1]
                    return words
            assert self.process.stdout is not None
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            line = self.process.stdout.readline() if ready else b""
            assert line, f"nothing with {key}={value} in {DEADLINE:g} s; heard {self._heard}"
            self._heard.append(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.until("closed")
        assert self.process.wait(DEADLINE) == 0


@pytest.fixture
def lan() -> Iterator[Lan]:
    with lan_of(3) as made:
        yield made


@pytest.mark.system
@pytest.mark.slow
def test_two_hosts_hear_each_other_over_ipv4_and_ipv6(lan: Lan) -> None:
    first = Advertiser(lan, 0, NODE_A)
    assert first.started == {"problems": [], "refused": None}
    second = Advertiser(lan, 1, NODE_B, "uvloop")
    assert second.started == first.started
    begin = time.monotonic()
    heard = first.until("found", NODE_B)
    took = time.monotonic() - begin
    assert second.until("found", NODE_A)["cluster"] == "video"
    assert (heard["protocol"], heard["fingerprint"]) == (1, "ab" * 32)
    assert f"{lan.ipv4(1)}:7420" in heard["addresses"]
    assert f"[{lan.ipv6(1)}]:7420" in heard["addresses"]
    assert took < USABLE * crowded()
    first.close()
    second.close()


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("ipv6", [True, False], ids=["IPv6 alone", "IPv4 alone"])
def test_one_family_is_enough(ipv6: bool) -> None:
    with lan_of(2, ipv6=ipv6) as lan:
        for host in range(2) if ipv6 else ():
            lan.run(host, "ip", "addr", "del", f"{lan.ipv4(host)}/24", "dev", "eth0")
        first, second = Advertiser(lan, 0, NODE_A), Advertiser(lan, 1, NODE_B)
        expected = f"[{lan.ipv6(1)}]:7420" if ipv6 else f"{lan.ipv4(1)}:7420"
        assert expected in first.until("found", NODE_B)["addresses"]
        first.close()
        second.close()


@pytest.mark.system
@pytest.mark.slow
def test_an_address_that_comes_later_is_advertised(lan: Lan) -> None:
    first, second = Advertiser(lan, 0, NODE_A), Advertiser(lan, 1, NODE_B, "uvloop")
    first.until("found", NODE_B)
    lan.run(1, "ip", "addr", "add", "10.77.9.9/16", "dev", "eth0")
    assert "10.77.9.9" in second.until("changed")["changed"]
    while "10.77.9.9:7420" not in first.until("found", NODE_B)["addresses"]:
        pass
    first.close()
    second.close()


@pytest.mark.system
@pytest.mark.slow
def test_an_interface_that_comes_up_later_is_used(lan: Lan) -> None:
    lan.run(1, "ip", "link", "set", "eth0", "down")
    second = Advertiser(lan, 1, NODE_B)
    assert "loopback" in second.started["problems"][0]
    first = Advertiser(lan, 0, NODE_A)
    lan.run(1, "ip", "link", "set", "eth0", "up")
    while f"{lan.ipv4(1)}:7420" not in first.until("found", NODE_B)["addresses"]:
        pass  # until then it advertises its loopback
    first.close()
    second.close()


@pytest.mark.system
@pytest.mark.slow
def test_no_multicast_on_an_interface_is_told(lan: Lan) -> None:
    lan.multicast(0, False)
    first = Advertiser(lan, 0, NODE_A)
    assert "eth0: it does no multicast" in first.started["problems"][0]
    assert "--join" in first.started["problems"][0]
    first.close()


@pytest.mark.system
@pytest.mark.slow
def test_the_helpers_cut_links(lan: Lan) -> None:
    def reaches(source: int, target: str, seconds: float = DEADLINE) -> bool:
        """One datagram from a host to an address, and whether it was received."""
        family = "AF_INET6" if ":" in target else "AF_INET"
        host = int(target.rpartition(":" if ":" in target else ".")[2], 16) - 1
        send = f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM).sendto(b'x', ('{target}', 7999))"
        return lan.receives(host, target, lambda: lan.run(source, sys.executable, "-c", send, check=False), seconds)

    for address in (lan.ipv4, lan.ipv6):
        assert reaches(0, address(1))
        lan.cut_one_way(0, 1)
        assert not reaches(0, address(1), 0.3)
        assert reaches(1, address(0))
        assert reaches(2, address(1))
        lan.join_one_way(0, 1)
        assert reaches(0, address(1))
        lan.cut(1)
        assert not reaches(0, address(1), 0.3)
        assert reaches(0, address(2))
        lan.join(1)
        assert reaches(0, address(1))
