"""Two hosts on this machine: network namespaces joined by a cable (veth). Root and Debian's iproute2 are needed.

What is measured "across hosts" sends through two kernels' whole TCP stacks, as over a real cable without its limits: no
loopback shortcut, no shared abstract sockets. The namespaces belong to the measuring process and are removed at its
end; what a killed one left, the next one removes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmark.model import Unsupported

ADDRESSES = ("10.78.0.1", "10.78.0.2")
"""Of host 0 and host 1."""
_NAMES = ("upipe-bench-0", "upipe-bench-1")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Why there can be no hosts here; "" when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    return "" if shutil.which("ip") else "network namespaces need the program ip (apt install iproute2)"


@contextmanager
def pair() -> Iterator[None]:
    """Both hosts, for as long as the block runs.

    Raises:
        Unsupported: not here.
    """
    if reason := why_not():
        raise Unsupported(reason)
    _remove()
    try:
        for name in _NAMES:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", _NAMES[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", _NAMES[1])
        for name, address in zip(_NAMES, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
        yield
    finally:
        _remove()


def path(host: int) -> Path:
    """Of a host's namespace."""
    return Path("/run/netns") / _NAMES[host]


def enter(host: int) -> None:
    """This thread, and what it forks, is on that host from now on."""
    with path(host).open() as namespace:
        if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {path(host)}")


@contextmanager
def inside(host: int) -> Iterator[None]:
    """Sockets that are made in the block are that host's."""
    with Path("/proc/thread-self/ns/net").open() as home:
        enter(host)
        try:
            yield
        finally:
            _libc.setns(home.fileno(), _CLONE_NEWNET)


def _remove() -> None:
    for name in _NAMES:
        if (Path("/run/netns") / name).exists():
            _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)
