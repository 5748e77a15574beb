"""The table of addresses: back-off, bounds, who goes first, who makes room."""

from __future__ import annotations

import pytest

from upipe.cluster.address import Address
from upipe.cluster.dialing import Dialer
from upipe.cluster.timing import Timing

TIMING = Timing()


def address(number: int) -> Address:
    return Address(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 7420)


def dialer(*connected: str) -> Dialer:
    return Dialer(TIMING, lambda node_id: node_id in connected)


def dials(table: Dialer, seconds: float) -> list[float]:
    """When addresses are dialled if every dial fails at once."""
    times, now = [], 0.0
    while now <= seconds:
        for one in table.due(now):
            times.append(now)
            table.failed(one, now)
        table.validate()
        following = table.deadline()
        if following is None:
            break
        now = max(following, now)
    return times


def test_failures_wait_twice_as_long_each_time() -> None:
    table = dialer()
    table.seen(address(1), "", "seed", 0.0)
    assert dials(table, 10.0) == pytest.approx([0.0, 0.25, 0.75, 1.75, 3.75, 6.75, 9.75])


def test_an_advertised_address_is_given_up_and_a_seed_never() -> None:
    hint, seed = dialer(), dialer()
    hint.seen(address(1), "", "zeroconf", 0.0)
    seed.seen(address(1), "", "seed", 0.0)
    assert len(dials(hint, 3600.0)) == TIMING.hint_tries
    assert hint.deadline() is None
    assert len(dials(seed, 3600.0)) > 1000


def test_a_refusal_for_good_waits_the_longest() -> None:
    table = dialer()
    table.seen(address(1), "", "seed", 0.0)
    table.due(0.0)
    table.failed(address(1), 0.0, for_good=True)
    assert table.deadline() == TIMING.redial_hint


def test_a_dial_that_is_never_reported_counts_as_failed() -> None:
    table = dialer()
    table.seen(address(1), "", "seed", 0.0)
    assert table.due(0.0) == [address(1)]
    assert table.due(TIMING.dial_timeout / 2) == []
    assert table.deadline() == TIMING.dial_timeout
    assert table.due(TIMING.dial_timeout) == []
    assert table.due(TIMING.dial_timeout + TIMING.redial_first) == [address(1)]


def test_a_clock_that_stood_still_gives_dials_more_time() -> None:
    table = dialer()
    table.seen(address(1), "", "seed", 0.0)
    table.due(0.0)
    table.postpone(100.0)
    assert table.deadline() == TIMING.dial_timeout + 100.0


def test_known_addresses_go_first_and_only_so_many_at_a_time() -> None:
    table = dialer()
    for number in range(40):
        table.seen(address(number), "", "zeroconf", 0.0)
    table.seen(address(100), "", "seed", 1.0)
    table.seen(address(101), "a", "member", 1.0)
    first = table.due(1.0)
    assert set(first[:2]) == {address(100), address(101)}
    assert len(first) == TIMING.dials
    assert table.due(1.0) == []
    table.failed(first[0], 1.0)
    assert len(table.due(1.0)) == 1


def test_a_connected_node_is_not_dialled() -> None:
    connected: set[str] = {"a"}
    table = Dialer(TIMING, lambda node_id: node_id in connected)
    table.seen(address(1), "a", "member", 0.0)
    assert table.due(0.0) == []
    assert table.deadline() is None
    connected.clear()
    table.revive("a", 5.0)
    assert table.due(5.0) == [address(1)]


def test_an_advertisement_does_not_change_whose_a_known_address_is() -> None:
    table = dialer("b")
    table.seen(address(1), "a", "member", 0.0)
    table.seen(address(1), "b", "zeroconf", 0.0)
    assert table.due(0.0) == [address(1)]


def test_when_full_failing_hints_make_room_and_seeds_never() -> None:
    table = dialer()
    seeds = [address(number) for number in range(TIMING.addresses - 1)]
    for one in seeds:
        table.seen(one, "", "seed", 0.0)
    table.seen(address(10_000), "", "zeroconf", 0.0)
    table.seen(address(10_001), "", "zeroconf", 0.0)
    assert len(table) == TIMING.addresses
    table.seen(address(10_002), "a", "member", 0.0)
    table.seen(address(10_003), "", "zeroconf", 0.0)
    table.validate()
    dialled: set[Address] = set()
    now = 0.0
    while len(dialled) < TIMING.addresses:
        for one in table.due(now):
            dialled.add(one)
            table.failed(one, now, for_good=True)
    assert dialled == {*seeds, address(10_002)}


def test_who_left_is_forgotten_and_its_seed_is_asked_again() -> None:
    table = dialer()
    table.seen(address(1), "a", "seed", 0.0)
    table.seen(address(2), "a", "member", 0.0)
    table.forget("a")
    assert table.due(0.0) == [address(1)]
