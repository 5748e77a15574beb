"""Where a node listens: host and port, as users write it and as it is shown. Pure.

node-a:7420      10.0.0.1:7420      [fd00::1]:7420      [fe80::1%eth0]:7420      node-a (the default port)
"""

from __future__ import annotations

import ipaddress
import re

import msgspec

from upipe.errors import OptionInvalid

DEFAULT_PORT = 7420
"""Port of an agent unless told otherwise."""

_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_LONGEST_NAME = 253  # RFC 1035


class Address(msgspec.Struct, frozen=True, order=True):
    """One place to dial. host: an IP address (IPv6 without brackets, link-local ones with %zone) or a name."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_ip(self) -> bool:
        """Whether the host needs no resolving."""
        return _is_ip(self.host)


def parse(text: str, default_port: int = DEFAULT_PORT) -> Address:
    """Read HOST, HOST:PORT or [IPV6]:PORT.

    Raises:
        OptionInvalid: names the text and the forms that are understood.
    """
    host, port = _split(text.strip(), default_port, text)
    if not _is_ip(host) and not (_NAME.fullmatch(host) and len(host) <= _LONGEST_NAME):
        raise _refusal(text, f"{host!r} is neither an IP address nor a host name")
    if not _is_ip(host) and re.fullmatch(r"[0-9.]+", host):
        raise _refusal(text, f"{host!r} is no IPv4 address")
    return Address(host, port)


def _split(text: str, default_port: int, told: str) -> tuple[str, int]:
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or ":" not in host or (rest and not rest.startswith(":")):
            raise _refusal(told, "the brackets do not hold one IPv6 address")
        return host, _port(rest[1:], told) if rest else default_port
    if text.count(":") > 1:
        raise _refusal(told, "an IPv6 address stands in brackets")
    host, colon, port = text.partition(":")
    return host, _port(port, told) if colon else default_port


def _port(text: str, told: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise _refusal(told, f"{text!r} is no port (1 to 65535)")
    return int(text)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _refusal(text: str, why: str) -> OptionInvalid:
    return OptionInvalid(f"{text!r} is no address: {why}; write HOST:PORT, 10.0.0.1:7420 or [fd00::1]:7420")
