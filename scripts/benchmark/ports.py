"""Free TCP ports of the loopback interface."""

from __future__ import annotations

import socket


def free_ports(n: int) -> list[int]:
    """n of them, all different."""
    found = [socket.socket() for _ in range(n)]
    try:
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]
    finally:
        for one in found:
            one.close()
