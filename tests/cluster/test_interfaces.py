"""Which addresses are told, and that changes of them are noticed without polling."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from tests.cluster.netns import lan_of
from upipe.cluster import interfaces


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"lo": ["127.0.0.1", "::1"], "eth0": ["fd00::1", "10.0.0.1", "fe80::1%eth0"]}, ("10.0.0.1", "fd00::1")),
        ({"lo": ["127.0.0.1", "::1"], "eth0": ["fe80::1%eth0"]}, ("fe80::1%eth0",)),
        ({"lo": ["127.0.0.1", "::1"], "eth0": []}, ("127.0.0.1", "::1")),
        ({"a": ["10.0.0.2"], "b": ["10.0.0.1", "10.0.0.2"]}, ("10.0.0.2", "10.0.0.1")),
        ({}, ()),
    ],
)
def test_routable_addresses_are_told_first(found: dict[str, list[str]], expected: tuple[str, ...]) -> None:
    assert interfaces.chosen(found) == expected


def test_an_agent_on_ipv4_tells_no_ipv6() -> None:
    assert interfaces.chosen({"eth0": ["fd00::1", "10.0.0.1"]}, ipv6=False) == ("10.0.0.1",)


def test_addresses_are_bounded() -> None:
    assert len(interfaces.chosen({"eth0": [f"10.0.0.{number}" for number in range(1, 200)]})) == 16


def test_what_is_named_is_told_as_it_is() -> None:
    assert interfaces.reachable_at("10.1.2.3") == ("10.1.2.3",)
    assert interfaces.reachable_at("0.0.0.0")


async def test_a_watch_can_be_closed_twice_and_leaves_nothing() -> None:
    watch = interfaces.Watch(lambda: None)
    watch.close()
    watch.close()


@pytest.mark.system
@pytest.mark.slow
def test_changes_are_noticed() -> None:
    code = (
        "import asyncio\n"
        "from upipe.cluster.interfaces import Watch, reachable_at\n"
        "async def main():\n"
        "    told = asyncio.Event()\n"
        "    watch = Watch(told.set)\n"
        "    print('watching', flush=True)\n"
        "    await asyncio.wait_for(told.wait(), 60)\n"
        "    watch.close()\n"
        "    print(*reachable_at('::'), flush=True)\n"
        "asyncio.run(main())\n"
    )
    with lan_of(1) as lan:
        process = lan.popen(0, sys.executable, "-c", code, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        lan.run(0, "ip", "addr", "add", "10.99.0.1/24", "dev", "eth0")
        assert "10.99.0.1" in process.stdout.readline().split()
        assert process.wait(60) == 0


async def test_a_burst_of_changes_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    done = asyncio.Event()

    def changed() -> None:
        told.append(True)
        done.set()

    monkeypatch.setattr(interfaces, "SETTLE", 0.0)
    watch = interfaces.Watch(changed)
    for _ in range(5):
        watch._readable()
    await done.wait()
    assert told == [True]
    watch.close()
