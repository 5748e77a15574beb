"""Seeds: what users write, and names that move, fail and come back. The resolver and the clock are given."""

from __future__ import annotations

import asyncio
import socket

import pytest

from upipe.cluster.address import Address
from upipe.cluster.member_events import Hint
from upipe.cluster.seeds import RESOLVE_AGAIN, RESOLVE_FIRST, Seed, Seeds, parse_seed, pause, system_resolve
from upipe.errors import OptionInvalid


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("10.0.0.1:7421", Seed(Address("10.0.0.1", 7421))),
        ("10.0.0.1", Seed(Address("10.0.0.1", 7420))),
        ("[fd00::1]:7421", Seed(Address("fd00::1", 7421))),
        ("[fe80::1%eth0]", Seed(Address("fe80::1%eth0", 7420))),
        ("node-a:1", Seed(Address("node-a", 1))),
        (" node-a.example.org. ", Seed(Address("node-a.example.org.", 7420))),
        ("dns://upipe.default.svc:9", Seed(Address("upipe.default.svc", 9), dns=True)),
        ("dns://upipe/", Seed(Address("upipe", 7420), dns=True)),
    ],
)
def test_seeds(text: str, seed: Seed) -> None:
    assert parse_seed(text) == seed
    assert parse_seed(str(seed)) == seed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither"),
        ("host:", "no port"),
        ("host:0", "no port"),
        ("host:65536", "no port"),
        ("host:٣", "no port"),
        ("fd00::1:7420", "brackets"),
        ("[10.0.0.1]:7420", "brackets"),
        ("[fd00::1", "brackets"),
        ("[fd00::1]7420", "brackets"),
        ("10.0.0.256", "no IPv4 address"),
        ("bad host", "neither"),
        ("-x", "neither"),
        ("http://node:7420", "no seed"),
        ("dns://10.0.0.1", "needs no DNS"),
        ("dns://", "neither"),
        ("a" * 300, "neither"),
    ],
)
def test_seeds_that_are_none(text: str, words: str) -> None:
    with pytest.raises(OptionInvalid, match=words):
        parse_seed(text)


class Clock:
    """sleep() that returns at once, notes how long it was, and ends the run after so many."""

    def __init__(self, most: int) -> None:
        self.slept: list[float] = []
        self._most = most

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) >= self._most:
            raise asyncio.CancelledError


async def feed(seed: str, answers: list[list[str] | OSError]) -> tuple[list[Hint], list[str], list[float]]:
    hints: list[Hint] = []
    told: list[str] = []
    clock = Clock(len(answers))
    remaining = iter(answers)

    async def resolve(name: str, port: int) -> list[str]:
        answer = next(remaining)
        if isinstance(answer, OSError):
            raise answer
        return answer

    await Seeds((parse_seed(seed),), hints.append, told.append, resolve, clock.sleep).run()
    return hints, told, clock.slept


async def test_an_ip_address_is_a_hint_once() -> None:
    assert await feed("[fd00::1]:1", []) == ([Hint((Address("fd00::1", 1),), "seed")], [], [])


async def test_a_name_is_followed() -> None:
    hints, told, slept = await feed("dns://n:1", [["10.0.0.1", "fd00::1"], ["10.0.0.2"]])
    assert [hint.addresses for hint in hints] == [
        (Address("10.0.0.1", 1), Address("fd00::1", 1)),
        (Address("10.0.0.2", 1),),
    ]
    assert told == []
    assert slept == [RESOLVE_AGAIN] * 2


async def test_a_name_that_fails_is_told_once_and_tried_less_and_less() -> None:
    error = socket.gaierror(-2, "Name or service not known")
    hints, told, slept = await feed("node-a", [error, error, error, ["10.0.0.1"]])
    assert len(hints) == 1
    assert "node-a:7420 does not resolve (Name or service not known)" in told[0]
    assert told[1:] == ["seed node-a:7420 resolves again"]
    assert slept == [RESOLVE_FIRST, RESOLVE_FIRST * 2, RESOLVE_FIRST * 4, RESOLVE_AGAIN]
    assert pause(10_000) == RESOLVE_AGAIN


async def test_a_dns_seed_without_records_is_waiting() -> None:
    _, told, _ = await feed("dns://n", [socket.gaierror(-5, "No address")])
    assert "no addresses yet" in told[0]


async def test_a_flood_of_records_is_bounded() -> None:
    hints, _, _ = await feed("dns://n", [[f"10.0.{number >> 8}.{number & 255}" for number in range(5000)]])
    assert len(hints[0].addresses) == 256


async def test_the_system_resolves() -> None:
    assert await system_resolve("127.0.0.1", 1) == ["127.0.0.1"]
    with pytest.raises(OSError, match="label"):
        await system_resolve("a" * 64 + ".example", 1)
