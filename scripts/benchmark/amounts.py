"""How much work a case gives a peer, so that all take about as long."""

from __future__ import annotations

from collections.abc import Callable

from benchmark.model import MIB, Pins, Work
from benchmark.peers import Peer

Amount = Callable[[Peer, float], Work]


def stream(peer: Peer, seconds: float) -> Work:
    n = max(500, int(peer.rate * seconds))
    return Work("small", "stream", n=n, warm=n // 10)


def many(name: str, producers: int, consumers: int) -> Amount:
    def work(peer: Peer, seconds: float) -> Work:
        n = max(1000, int(min(peer.rate, 1e6) * seconds / (2 if consumers < 16 else 4)))
        return Work(name, "mpmc", n=n, producers=producers, consumers=consumers)

    return work


def fanout(peer: Peer, seconds: float) -> Work:
    n = max(1000, int(peer.rate * seconds / 2))
    return Work("fanout", "fanout", n=n, warm=n // 10, consumers=4)


def chain(peer: Peer, seconds: float) -> Work:
    n = max(30, int(min(seconds / (peer.trip * 6e-6), 5000)))
    return Work("chain", "chain", n=n, warm=10, count=10)


def idle(name: str, count: int) -> Amount:
    return lambda peer, seconds: Work(name, "idle", n=0, pause=seconds, count=count, ring=65536)


def among(name: str, count: int) -> Amount:
    def work(peer: Peer, seconds: float) -> Work:
        n = max(1000, int(peer.rate * seconds / 3))
        return Work(name, "among", n=n, warm=n // 10, count=count, ring=MIB)

    return work


def start(peer: Peer, seconds: float) -> Work:
    return Work("start", "start", n=1)


def across(peer: Peer, seconds: float) -> Work:
    n = max(500, int(peer.rate * seconds / 3))
    return Work("across", "across", n=n, warm=n // 10, ring=32 * MIB, hosts=True)


def across_frames(name: str, size: int, shape: tuple[int, ...]) -> Amount:
    def work(peer: Peer, seconds: float) -> Work:
        n = max(12, int(min(peer.gigabytes, 1.5) * 1e9 * seconds / size))
        return Work(name, "across_frames", n=n, warm=12, size=size, shape=shape, ring=64 * MIB, hosts=True)

    return work


def trips(name: str, pins: Pins, pause: float = 0.0) -> Amount:
    def work(peer: Peer, seconds: float) -> Work:
        n = max(50, int(min(seconds / (peer.trip * 1e-6 + pause), 50_000)))
        return Work(name, "rtt", n=n, warm=max(10, n // 10), pins=pins, pause=pause)

    return work


def power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def frames(name: str, size: int, shape: tuple[int, ...], depth: int, in_place: bool, touch: bool = False) -> Amount:
    ring = power_of_two(depth * (size + 64))  # what uPipe would round it to: the others get as much

    def work(peer: Peer, seconds: float) -> Work:
        n = max(12, int(peer.gigabytes * 1e9 * seconds / size))
        slots = ring // size
        warm = slots + 4 if peer.gigabytes > 1 else 4
        return Work(name, "frames", n=n, warm=warm, size=size, shape=shape, ring=ring, in_place=in_place, touch=touch)

    return work
