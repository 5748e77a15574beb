"""Which OpenSSL is chosen: Python's own, unless it is slow and all is as expected of the other."""

from __future__ import annotations

import builtins
import ssl
import subprocess
import sys
from typing import Any

import pytest
from OpenSSL import SSL

from upipe.cluster import tls_choice, tls_engine
from upipe.cluster.tls_choice import FLAGS, choose

OLD, NEW = (3, 0, 9), (3, 1)


def test_a_slow_one_of_python_gives_way_to_a_fast_one() -> None:
    choice = choose(OLD, FLAGS | {"sse2"})
    assert choice.context is tls_engine.FastContext
    assert "of cryptography" in choice.told


@pytest.mark.parametrize(
    ("own", "flags", "said"),
    [
        (NEW, FLAGS, "of Python: it is fast"),
        ((4, 0, 0), FLAGS, "of Python: it is fast"),
        (OLD, FLAGS - {"vaes"}, "no AES of AVX-512"),
        (OLD, frozenset(), "no AES of AVX-512"),
    ],
)
def test_pythons_own_stays_where_another_is_no_faster(own: tuple[int, ...], flags: frozenset[str], said: str) -> None:
    choice = choose(own, flags)
    assert choice.context is ssl.SSLContext
    assert said in choice.told


def test_pythons_own_stays_without_pyopenssl(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if "tls_engine" in (arguments[2] or ()) if len(arguments) > 2 else False:
            raise ModuleNotFoundError("No module named 'OpenSSL'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    choice = choose(OLD, FLAGS)
    assert choice.context is ssl.SSLContext
    assert "No module named 'OpenSSL'" in choice.told


def test_pythons_own_stays_where_the_other_is_as_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_engine, "version", lambda: OLD)
    assert choose(OLD, FLAGS).context is ssl.SSLContext


class Bare:
    """A Connection of another shape."""

    def __init__(self, context: Any) -> None:
        self._ssl = self._into_ssl = self._from_ssl = 5


def test_pythons_own_stays_where_pyopenssl_has_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tls_engine.fault() == ""
    monkeypatch.setattr(SSL, "Connection", Bare)
    choice = choose(OLD, FLAGS)
    assert choice.context is ssl.SSLContext
    assert "no SSL * in _ssl" in choice.told
    monkeypatch.setattr(tls_engine, "NEEDED", (*tls_engine.NEEDED, "SSL_no_such"))
    assert "pyOpenSSL has no SSL_no_such" in choose(OLD, FLAGS).told


def test_a_process_chooses_once() -> None:
    assert tls_choice.chosen() is tls_choice.chosen()
    assert "OpenSSL" in tls_choice.chosen().told


def test_who_makes_no_context_loads_no_other_openssl() -> None:
    program = "import sys, upipe, upipe.cluster.tls; sys.exit('OpenSSL' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
