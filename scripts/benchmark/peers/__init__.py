"""Every peer: where its adapter is, what it needs, and about how fast it is (to choose how much work to give it)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from importlib import metadata, util
from typing import Any

from benchmark.peers.base import Transport


@dataclass(frozen=True)
class Peer:
    """One row of the tables."""

    name: str
    adapter: str
    """module:class below benchmark.peers."""
    requires: tuple[tuple[str, str], ...] = ()
    """(module, distribution) it needs."""
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("stream", "rtt")
    """Kinds of work it takes part in."""
    rate: float = 200e3
    """Small values a second, roughly."""
    gigabytes: float = 1.0
    """GB/s of frames, roughly."""
    trip: float = 100.0
    """Microseconds of a round trip, roughly."""
    heavy: float = 0.0
    """Seconds it needs to start; such a peer does all its work of a round in one go."""
    quick: tuple[str, ...] | None = None
    """Kinds or names of the cases of a quick run that it takes part in; None: all. The others say so."""
    key: bool = False
    """The targets are about it: first in a round, so that it is measured even when time runs out."""
    own: bool = False
    """uPipe's: never the peer a ratio is taken against."""
    without_crc: str = ""
    """It is the row of that name with the CRC check off: shown as a column of it."""
    copies: bool = True
    """It can hand its consumer a frame to keep."""
    views: bool = False
    """Its consumer can read a frame where it lies."""
    polls: bool = False
    """Its waiting burns a core, so it has no place among those that sleep."""
    reference: str = ""
    """Not comparable, for this reason: shown, but no ratio is taken against it."""

    @property
    def absent(self) -> str:
        """What it needs and is not installed; "" when all is there."""
        return ", ".join(dist for module, dist in self.requires if util.find_spec(module) is None)

    @property
    def version(self) -> str:
        """Of the distribution, "" when there is none."""
        try:
            return metadata.version(self.requires[0][1]) if self.requires else ""
        except metadata.PackageNotFoundError:
            return ""

    def transport(self) -> Transport:
        """Its adapter, imported only in the process that measures."""
        module, name = self.adapter.split(":")
        made: Transport = getattr(importlib.import_module(f"benchmark.peers.{module}"), name)(**self.options)
        return made


S, R, F, M, O = "stream", "rtt", "frames", "mpmc", "fanout"  # noqa: E741
C, I, A, ST = "chain", "idle", "among", "start"  # noqa: E741
X, XF = "across", "across_frames"

FIFO = (("faster_fifo", "faster-fifo"),)
ZMQ = (("zmq", "pyzmq"),)
NNG = (("pynng", "pynng"),)
ZENOH = (("zenoh", "eclipse-zenoh"),)
RAY = (("ray", "ray"),)
DORA = (("dora", "dora-rs"), ("pyarrow", "pyarrow"), ("dora_cli", "dora-rs-cli"))
CLUSTER = (("cryptography", "cryptography"), ("aiohttp", "aiohttp"))
IOX = (("iceoryx2", "iceoryx2"),)

PEERS: tuple[Peer, ...] = (
    Peer("upipe.put", "upipe_memq:Memq", (), {}, (S, R, F, M, O, C, I, A), 4e6, 10, 3, own=True),
    Peer(
        "upipe.put~",
        "upipe_memq:Memq",
        (),
        {"check_crc": False},
        (S, R, F, M),
        4e6,
        10,
        3,
        own=True,
        without_crc="upipe.put",
    ),
    Peer("upipe.many", "upipe_memq:MemqMany", (), {}, (S,), 20e6, own=True),
    Peer(
        "upipe.many~", "upipe_memq:MemqMany", (), {"check_crc": False}, (S,), 20e6, own=True, without_crc="upipe.many"
    ),
    Peer("upipe.many-list", "upipe_memq:MemqMany", (), {"lists": True}, (S,), 6e6, own=True),
    Peer("upipe.aio", "upipe_memq:MemqAwaited", (), {}, (S, R), 1.5e6, 10, 10, own=True),
    Peer("upipe.view", "upipe_memq:MemqViews", (), {}, (F,), 0, 20, own=True, copies=False, views=True),
    Peer(
        "upipe.view~",
        "upipe_memq:MemqViews",
        (),
        {"check_crc": False},
        (F,),
        0,
        20,
        own=True,
        copies=False,
        views=True,
        without_crc="upipe.view",
    ),
    Peer("upipe.pipe", "upipe_pipe:Pipes", (), {}, (S, R, O, C, I, ST), 1.5e6, 10, 60, own=True),
    Peer("upipe.mirror", "upipe_mirror:Mirrored", CLUSTER, {}, (X, XF), 1e6, 1, own=True),
    Peer("upipe.mirror-many", "upipe_mirror:Mirrored", CLUSTER, {"many": True}, (X,), 8e6, own=True),
    Peer("mp.fork", "mp:Start", (), {"method": "fork"}, (ST,)),
    Peer("mp.spawn", "mp:Start", (), {"method": "spawn"}, (ST,)),
    Peer("mp.Queue", "mp:Queue", (), {}, (S, R, F, M, O, C, I, A), 240e3, 0.3, 130, key=True),
    Peer("mp.SimpleQueue", "mp:SimpleQueue", (), {}, (S, R, F, M, C), 210e3, 0.4, 70, quick=(S, M, ST)),
    Peer("mp.Pipe", "mp:Pipe", (), {}, (S, R, F, C), 500e3, 0.5, 50),
    Peer("mp.Pipe.duplex", "mp:Pipe", (), {"duplex": True}, (S, R, F), 300e3, 1.5, 55, quick=(S,)),
    Peer("faster-fifo", "fifo:Fifo", FIFO, {}, (S, R, F, M, O, C, I, A), 220e3, 2, 100, key=True),
    Peer("faster-fifo.many", "fifo:Fifo", FIFO, {"many": True}, (S,), 260e3),
    Peer("faster-fifo.many-pickle", "fifo:Fifo", FIFO, {"many": True, "pickle": True}, (S,), 640e3, key=True),
    Peer("pyzmq.ipc", "zmq:Zmq", ZMQ, {}, (S, R, F, C, I, A), 1.1e6, 2.5, 106, key=True),
    Peer("pyzmq.tcp", "zmq:Zmq", ZMQ, {"tcp": True}, (S, R, F, X, XF), 1.4e6, 2, 110, quick=(S,)),
    Peer("pyzmq.ipc-nocopy", "zmq:Zmq", ZMQ, {"copy": False}, (F,), 0, 3),
    Peer("pyzmq.pub", "zmq:Zmq", ZMQ, {"publish": True}, (O,), 1.0e6),
    Peer("iceoryx2.poll", "iox2:Iox2", IOX, {}, (S, R, F, O, C), 450e3, 20, 5, views=True, polls=True, key=True),
    Peer("iceoryx2.wait", "iox2:Iox2", IOX, {"wait": True}, (S, R, F, C, I), 320e3, 20, 70, views=True, key=True),
    Peer("pynng.ipc", "nng:Nng", NNG, {}, (S, R, F), 22e3, 0.9, 182, quick=(S,)),
    Peer("zenoh.shm", "zenoh:Zenoh", ZENOH, {"shm": True}, (S, R, F), 700e3, 4, 200),
    Peer("zenoh.tcp", "zenoh:Zenoh", ZENOH, {}, (S, R, F, X, XF), 640e3, 0.6, 196, quick=(S,)),
    Peer(
        "ray.channel",
        "ray:Channels",
        RAY,
        {},
        (S, R, F),
        36e3,
        12,
        30,
        heavy=12,
        views=True,
        quick=("small", "rtt", "frames-1m-view", "frames-1080p-view"),
        key=True,
    ),
    Peer("ray.channel16", "ray:Channels", RAY, {"slots": 16}, (S, F), 70e3, 10, heavy=12, views=True, quick=()),
    Peer("ray.call", "ray:Calls", RAY, {}, (S, R, F, ST), 3e3, 0.6, 800, heavy=20, quick=(ST,), key=True),
    Peer("ray.cgraph", "ray:Graph", RAY, {}, (C,), 0, 1, 100, heavy=20, quick=()),
    Peer(
        "dora",
        "dora:Dora",
        DORA,
        {},
        (S, R, F, ST),
        21e3,
        8,
        370,
        heavy=10,
        views=True,
        quick=("small", "frames-1m-view", ST),
        key=True,
    ),
    Peer(
        "dora.backpressure",
        "dora:Dora",
        DORA,
        {"policy": "backpressure"},
        (S, F),
        100e3,
        0.6,
        330,
        heavy=10,
        quick=(),
    ),
    Peer("socket.unix", "sockets:Sockets", (), {}, (S, R, F, C), 700e3, 5, 39),
    Peer("socket.tcp", "sockets:Sockets", (), {"tcp": True}, (S, R, F, X, XF), 150e3, 4, 66, quick=(S,)),
    Peer("socket.tls", "tls_sockets:TlsSockets", CLUSTER, {}, (XF,), 60e3, 1.5, 100),
    Peer("asyncio.unix", "aio:Streams", (), {}, (S, R, F), 600e3, 0.6, 140, quick=(S,)),
    Peer("uvloop.unix", "aio:Streams", (("uvloop", "uvloop"),), {"uvloop": True}, (S, R, F), 700e3, 1.4, 77),
)


def find(name: str) -> Peer:
    """By its name.

    Raises:
        KeyError.
    """
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise KeyError(name)
