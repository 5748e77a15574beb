"""TLS by the OpenSSL inside `cryptography`: contexts for event loops, in the place of Python's own.

Python's ssl is linked against the system's OpenSSL, and 3.0 of Debian 12 does not know the AES of AVX-512: it takes
0.53 s of CPU per GB for both ends, where this one takes 0.31 (tls_choice.py says when it is used). asyncio and uvloop
ask a context for wrap_bio() only, and then move bytes through two ssl.MemoryBIOs; what they get is a FastRecords
(tls_records.py). Set-up and handshake go through pyOpenSSL.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from upipe.cluster.tls_records import FastRecords, NotAName, ffi, lib

NEEDED = (
    "BIO_get_mem_data", "BIO_read", "BIO_set_mem_eof_return", "BIO_write", "ERR_GET_REASON", "ERR_clear_error",
    "ERR_get_error", "ERR_reason_error_string", "SSL_MODE_ENABLE_PARTIAL_WRITE", "SSL_OP_NO_RENEGOTIATION",
    "SSL_R_UNEXPECTED_EOF_WHILE_READING", "SSL_do_handshake", "SSL_get0_param", "SSL_get_error", "SSL_get_shutdown",
    "SSL_get_verify_result", "SSL_pending", "SSL_read", "SSL_shutdown", "SSL_write",
    "X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS", "X509_VERIFY_PARAM_set1_host", "X509_VERIFY_PARAM_set1_ip",
    "X509_VERIFY_PARAM_set_hostflags", "X509_V_ERR_HOSTNAME_MISMATCH", "X509_V_ERR_INVALID_EXTENSION",
    "X509_V_ERR_IP_ADDRESS_MISMATCH", "X509_V_FLAG_X509_STRICT", "X509_verify_cert_error_string",
)  # fmt: skip
"""What must be there."""


def version() -> tuple[int, int]:
    """Of that OpenSSL; other libraries of this interface tell an old one."""
    number = int(lib.OPENSSL_VERSION_NUMBER)
    return number >> 28, number >> 20 & 0xFF


def about() -> str:
    """Its name and version."""
    return " ".join(SSL.SSLeay_version(SSL.OPENSSL_VERSION).decode("ascii", "replace").split()[:2])


def fault() -> str:
    """What this pyOpenSSL lacks of what is used here beside its documented interface; "" when nothing."""
    missing = [name for name in NEEDED if not hasattr(lib, name)]
    missing += [] if hasattr(SSL.Context, "clear_mode") else ["Context.clear_mode (25.2 has it)"]
    if missing:
        return f"pyOpenSSL has no {', '.join(missing)}"
    one = SSL.Connection(SSL.Context(SSL.TLS_METHOD))
    pointers = {"_ssl": "SSL *", "_into_ssl": "BIO *", "_from_ssl": "BIO *"}
    for name, kind in pointers.items():
        found = getattr(one, name, None)
        if not isinstance(found, ffi.CData) or ffi.typeof(found) is not ffi.typeof(kind) or found == ffi.NULL:
            return f"pyOpenSSL's Connection has another shape: no {kind} in {name}"
    return ""


class FastContext(ssl.SSLContext):
    """A context of Python's, set up as ever, whose wrap_bio() goes to the other OpenSSL.

    What is not carried over there is refused, not ignored: so wrap_bio() fails for a context that takes TLS 1.2, or a
    client's that does not check. wrap_socket() is Python's.
    """

    fast_class: type[FastRecords] = FastRecords

    _trusted: tuple[bytes, ...] = ()
    _shown: SSL.Context | None = None

    def load_verify_locations(self, cafile: Any = None, capath: Any = None, cadata: str | Any = None) -> None:
        """As of SSLContext, with cadata in PEM only; of avail to the next load_cert_chain()."""
        if cafile is not None or capath is not None or not isinstance(cadata, str):
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "CAs are taken as cadata in PEM only")
        super().load_verify_locations(cadata=cadata)
        self._trusted = tuple(dict.fromkeys((*self._trusted, cadata.encode("ascii"))))

    def load_cert_chain(self, certfile: Any, keyfile: Any = None, password: Any = None) -> None:
        """As of SSLContext, of two files: what the next connections show and trust; those that run go on."""
        super().load_cert_chain(certfile, keyfile, password)
        strict = bool(self.verify_flags & ssl.VERIFY_X509_STRICT)
        try:
            chain, key = Path(certfile).read_bytes(), Path(keyfile or certfile).read_bytes()
            self._shown = _prepared(chain, key, self._trusted, strict)
        except (SSL.Error, crypto.Error, UnsupportedAlgorithm, ValueError, TypeError) as error:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, f"OpenSSL of cryptography: {error}") from None

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> Any:
        """As of SSLContext; a session cannot be resumed."""
        serves = self.protocol == ssl.PROTOCOL_TLS_SERVER
        checks = self.verify_mode == (ssl.CERT_OPTIONAL if serves else ssl.CERT_REQUIRED)
        if not checks or self.minimum_version != ssl.TLSVersion.TLSv1_3 or not (serves or self.check_hostname):
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "this context checks less than it must")
        if self._shown is None or server_side != serves or session is not None:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "no certificate was loaded, or the other side's context is used")
        name = server_hostname.decode("ascii") if isinstance(server_hostname, bytes) else server_hostname
        try:
            return self.fast_class(self, SSL.Connection(self._shown), incoming, outgoing, serves, name)
        except NotAName:  # no less secure: Python's ssl expects the same
            return super().wrap_bio(incoming, outgoing, server_side, server_hostname)


def _prepared(chain: bytes, key: bytes, trusted: tuple[bytes, ...], strict: bool) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_cipher_list(b"DEFAULT@SECLEVEL=2")  # of keys and signatures, as Python; 1.3 has its own ciphers
    context.clear_mode(lib.SSL_MODE_ENABLE_PARTIAL_WRITE)  # else SSL_write returns after each record
    # No session outlives its connection: there is no cache, and without tickets a client gets a number of one at most.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET | lib.SSL_OP_NO_RENEGOTIATION)
    # A client's VERIFY_PEER demands a certificate; a server's asks for one, and verifies what is shown (CERT_OPTIONAL).
    # Purposes are OpenSSL's: a client's certificate must be for clients, a server's for servers.
    context.set_verify(SSL.VERIFY_PEER)
    first, *rest = x509.load_pem_x509_certificates(chain)
    context.use_certificate(first)
    for one in rest:
        context.add_extra_chain_cert(one)
    private: Any = load_pem_private_key(key, None)
    context.use_privatekey(private)
    context.check_privatekey()
    store = context.get_cert_store()
    if store is None:
        raise ValueError("it has no store of CAs")
    for pem in trusted:
        for one in x509.load_pem_x509_certificates(pem):
            store.add_cert(crypto.X509.from_cryptography(one))
    if strict:
        store.set_flags(lib.X509_V_FLAG_X509_STRICT)
    return context
