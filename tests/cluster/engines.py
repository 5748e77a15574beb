"""Both OpenSSLs that contexts of tls.py may go by, whatever this processor and this Python would choose."""

from __future__ import annotations

import pytest

from upipe.cluster import tls_choice
from upipe.cluster.tls_choice import Choice
from upipe.cluster.tls_engine import FastContext

ENGINES = {"python": Choice("of Python"), "fast": Choice("of cryptography", FastContext)}


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make contexts of this one from now on."""
    monkeypatch.setattr(tls_choice, "chosen", lambda: ENGINES[name])
