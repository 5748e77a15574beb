"""Which OpenSSL encrypts between nodes: Python's own, or that of `cryptography`. Decided once a process, here.

Python's ssl is the one to have, unless it is known to be slow and the other known to be faster: the AES-GCM of AVX-512
came with OpenSSL 3.1, and takes half the CPU time of what 3.0 does on the same processor.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FAST = (3, 1)
"""First version of OpenSSL with that AES."""
FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "vaes", "vpclmulqdq"})
"""What a processor needs for it (/proc/cpuinfo)."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and a sentence on it."""

    told: str
    context: type[ssl.SSLContext] = ssl.SSLContext


@cache
def chosen() -> Choice:
    """What this process encrypts with."""
    return choose(ssl.OPENSSL_VERSION_INFO, _flags())


def choose(own: tuple[int, ...], flags: frozenset[str]) -> Choice:
    """Choose for a version of Python's OpenSSL and a processor. Python's own whenever something is not as expected."""
    if own >= FAST:
        return _python("it is fast")
    if not flags >= FLAGS:
        return _python("this processor has no AES of AVX-512, for which alone another is faster")
    try:
        from upipe.cluster import tls_engine  # its import takes time, and needs pyOpenSSL

        fault = tls_engine.fault()
    except Exception as error:  # whatever it is: it is no part of its documented interface that is looked at
        return _python(f"pyOpenSSL cannot be used: {type(error).__name__}: {error}")
    if fault:
        return _python(fault)
    if tls_engine.version() < FAST:
        return _python("that of cryptography is as old")
    told = f"{tls_engine.about()} of cryptography: it has the AES of AVX-512, which {ssl.OPENSSL_VERSION} has not"
    return Choice(told, tls_engine.FastContext)


def _python(why: str) -> Choice:
    return Choice(f"{ssl.OPENSSL_VERSION} of Python: {why}")


def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
