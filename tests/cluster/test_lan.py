"""Agents on hosts of their own (network namespaces) that only multicast joins."""

from __future__ import annotations

import pytest

from tests.cluster.hosts import hosts_of, until
from tests.support import crowded

pytestmark = [pytest.mark.slow, pytest.mark.system]


def test_hosts_find_each_other_by_multicast_and_learn_of_deaths(tmp_path):
    with hosts_of(3, tmp_path) as hosts:
        for host in range(3):
            hosts.start_agent(host)
        for host in range(3):
            until(lambda host=host: "listens at" in hosts.log(host).read_text(), 60, "it listens")
        ids = [hosts.node_id(host) for host in range(3)]
        took = until(lambda: all(knows(hosts, host, ids) for host in range(3)), 60, "all know all")
        assert took < 2.0 * crowded(), f"{took:.1f} s after the last one listened"
        hosts.kill_host(1)
        took = until(lambda: says(hosts, (0, 2), f"node {ids[1]} died"), 60, "its death is known")
        assert took < 5.0 * crowded()
        hosts.agents[2].terminate()
        took = until(lambda: says(hosts, (0,), f"node {ids[2]} left"), 60, "it said good-bye")
        assert hosts.agents[2].wait(60) == 0
        assert took < 1.5 * crowded()


def test_a_cut_host_is_dead_and_comes_back(tmp_path):
    with hosts_of(2, tmp_path) as hosts:
        for host in range(2):
            hosts.start_agent(host)
        until(lambda: all("joined" in hosts.log(host).read_text() for host in range(2)), 60, "they know each other")
        hosts.lan.cut(1)
        took = until(lambda: "died" in hosts.log(0).read_text(), 60, "it is dead")
        assert took < 5.0 * crowded()
        hosts.lan.join(1)
        until(lambda: hosts.log(0).read_text().count("joined") == 2, 60, "it is back")


def knows(hosts, host, ids):
    text = hosts.log(host).read_text()
    return all(f"node {one} at" in text for number, one in enumerate(ids) if number != host)


def says(hosts, who, sentence):
    return all(sentence in hosts.log(host).read_text() for host in who)
