"""Whether multicast works: what one machine can see of itself, and members that were never heard."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from tests.cluster.netns import Lan, lan_of
from upipe.cluster import multicast
from upipe.cluster.messages import NodeInfo

ASK = "import asyncio; from upipe.cluster import multicast; print('|'.join(asyncio.run(multicast.local_problems())))"


def member(*hosts: str) -> NodeInfo:
    return NodeInfo("b" * 16, "here", hosts, 7420, 1 << 32)


def test_a_neighbour_that_is_not_heard_is_told() -> None:
    (sentence,) = multicast.unheard([member("172.16.0.1", "10.0.0.7")], set(), {"eth0": ["10.0.0.1", "fe80::1%eth0"]})
    assert "bbbbbbbbbbbbbbbb at 10.0.0.7" in sentence
    assert "--join" in sentence


@pytest.mark.parametrize(
    ("hosts", "heard"),
    [(["10.0.0.7"], {"b" * 16}), (["10.0.1.7"], set()), (["127.0.0.1"], set()), (["a-name"], set()), ([], set())],
)
def test_who_is_heard_or_far_away_is_not_told(hosts: list[str], heard: set[str]) -> None:
    assert multicast.unheard([member(*hosts)], heard, {"eth0": ["10.0.0.1"], "lo": ["127.0.0.1"]}) == []


def ask(lan: Lan) -> list[str]:
    return lan.run(0, sys.executable, "-c", ASK).stdout.strip().split("|")


@pytest.mark.system
@pytest.mark.slow
def test_what_a_machine_sees_of_itself() -> None:
    with lan_of(1) as lan:
        assert ask(lan) == [""]
        lan.multicast(0, False)
        assert ask(lan) == [
            "interface eth0: it does no multicast; run: ip link set eth0 multicast on (or name nodes with --join)"
        ]
        lan.run(0, "ip", "link", "set", "eth0", "down")
        assert "no network interface that is up" in ask(lan)[0]


@pytest.mark.system
@pytest.mark.slow
def test_a_switch_that_drops_multicast_is_not_seen_by_the_machine_itself() -> None:
    with lan_of(2) as lan:
        lan.multicast_passes(1, False)
        assert ask(lan) == [""]
        send = (
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
            "s.setsockopt(0, socket.IP_MULTICAST_IF, socket.inet_aton('10.77.0.1')); "
            "s.sendto(b'x', ('224.0.0.251', 7999))"
        )
        for passes in (False, True):
            lan.multicast_passes(1, passes)
            sent = partial(lan.run, 0, sys.executable, "-c", send)
            assert lan.receives(1, lan.ipv4(1), sent, 20.0 if passes else 0.3, group="224.0.0.251") is passes
