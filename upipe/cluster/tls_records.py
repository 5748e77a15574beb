"""A TLS connection by the OpenSSL inside `cryptography`: what event loops use of an ssl.SSLObject, for tls_engine.py.

    socket -> incoming -> _into -> SSL_read -> the caller's memory        _into, _from: memory BIOs of the SSL object
    the caller's memory -> SSL_write -> _from -> the thread's room -> outgoing -> socket

Bytes go past pyOpenSSL's send() and recv_into(), which copy more than AES costs, straight to the functions below them.
Who owns what there:

- The SSL object owns both BIOs, its Connection owns it, and a FastRecords keeps the Connection: so the three pointers
  are valid as long as the FastRecords lives. Nobody ever replaces a BIO.
- C sees memory of Python only inside `with ffi.from_buffer(...)`, which keeps its owner alive and its size fixed;
  OpenSSL uses no pointer to it after a call. What C writes to is demanded writable.
- A connection belongs to one thread, as of ssl; calls let other threads run, so the rooms are each thread's own.

Rejected: BIO_new_mem_buf over what came (a copy less, 0.01 s/GB, for a BIO that dangles when one forgets its bytes);
SSL_set_fd past the event loop (a system call per record); writes record by record (0.03 s/GB).
"""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from upipe.cluster.inlet import RECORD

ffi: Any = SSL._ffi  # type: ignore[attr-defined]
lib: Any = SSL._lib  # type: ignore[attr-defined]

SLICE = 1 << 17
"""Bytes that are encrypted before they go on to `outgoing`: the room, and _from, hold little more."""
MOST = 1 << 30
"""Bytes that one call reads: C counts them in an int."""
ROOM = SLICE + (SLICE // RECORD + 1) * 64
"""Bytes of a slice as records."""
_ALERT = re.compile(r"^(ssl/)?tls alert ")
"""How OpenSSL 3.2 and newer begin the wording of old alerts; before, it was "sslv3 alert"."""


class _Thread(threading.local):
    """Rooms of a thread."""

    def __init__(self) -> None:
        self.out = memoryview(bytearray(ROOM))
        """For records on their way to `outgoing`."""
        self.out_memory = ffi.from_buffer(self.out, require_writable=True)  # holds it, as long as this lives
        self.plain = memoryview(bytearray(RECORD))
        """For what is read without a buffer."""


_thread = _Thread()


class NotAName(Exception):
    """OpenSSL does not take this for a host's name: 4.0 wants two characters, and none but those of DNS."""


class FastRecords:
    """One connection: what event loops use of an ssl.SSLObject, and take() as of inlet.TlsRecords."""

    def __init__(
        self,
        context: ssl.SSLContext,
        connection: SSL.Connection,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool,
        server_hostname: str | None,
    ) -> None:
        self.context = context
        self.server_side = server_side
        self.server_hostname = server_hostname
        self._incoming = incoming
        self._outgoing = outgoing
        self._connection = connection  # owns the next three
        pyopenssl: Any = connection
        self._ssl, self._into, self._from = pyopenssl._ssl, pyopenssl._into_ssl, pyopenssl._from_ssl
        self._where = ffi.new("char **")
        self._eof = self._ended = self._done = False
        """`incoming` ended; the other end said that nothing follows; the handshake is over."""
        self._failure: ssl.SSLError | None = None
        """Why reading failed, for good."""
        if server_side:
            connection.set_accept_state()
        else:
            connection.set_connect_state()
            self._expect(server_hostname or "")

    def _expect(self, name: str) -> None:
        """The handshake fails unless the server's certificate carries this name, or this IP address."""
        if not name or name.startswith("."):
            raise ValueError("check_hostname requires server_hostname")
        parameters = lib.SSL_get0_param(self._ssl)
        lib.X509_VERIFY_PARAM_set_hostflags(parameters, lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS)
        address = _address(name)
        if address is not None:
            said = lib.X509_VERIFY_PARAM_set1_ip(parameters, address, len(address))
        else:
            encoded = name.encode("idna")
            said = lib.X509_VERIFY_PARAM_set1_host(parameters, encoded, len(encoded))
            if said == 1:
                self._connection.set_tlsext_host_name(encoded)
        if said != 1:
            lib.ERR_clear_error()
            raise NotAName(name)

    # ------------------------------------------------------------ calls of OpenSSL

    def _feed(self) -> bool:
        """Give it what came. False: nothing did."""
        data = self._incoming.read()
        if data:
            with ffi.from_buffer(data) as memory:
                if lib.BIO_write(self._into, memory, len(data)) != len(data):
                    raise MemoryError("OpenSSL keeps no more")
            return True
        if self._incoming.eof and not self._eof:
            self._eof = True
            lib.BIO_set_mem_eof_return(self._into, 0)
            return True
        return False

    def _flush(self) -> None:
        """Pass on what it wrote: records, alerts, key updates. After each call that may write, so little is there."""
        while (count := lib.BIO_read(self._from, _thread.out_memory, ROOM)) > 0:
            self._outgoing.write(_thread.out[:count])
            if count < ROOM:
                break

    def _run(self, call: Callable[..., int], *arguments: Any) -> int:
        """One call, as far as it gets with what came; the result is above 0.

        Raises:
            ssl.SSLError: what went wrong, as Python's ssl words it.
        """
        while True:
            lib.ERR_clear_error()
            result = call(self._ssl, *arguments)
            if result > 0 or lib.SSL_get_error(self._ssl, result) != lib.SSL_ERROR_WANT_READ or not self._feed():
                break
        error = None if result > 0 else self._error(result)
        self._flush()
        if error is not None:
            raise error
        return result

    def _error(self, result: int) -> ssl.SSLError:
        """As _ssl.c words it."""
        code = lib.SSL_get_error(self._ssl, result)
        if code == lib.SSL_ERROR_WANT_READ:
            return _want_read()
        queued = _queued()
        if code == lib.SSL_ERROR_ZERO_RETURN:
            text = "TLS/SSL connection has been closed (EOF)"
            return _made(ssl.SSLZeroReturnError, ssl.SSL_ERROR_ZERO_RETURN, text)
        cut = code == lib.SSL_ERROR_SSL and lib.ERR_GET_REASON(queued) == lib.SSL_R_UNEXPECTED_EOF_WHILE_READING
        if cut or (code == lib.SSL_ERROR_SYSCALL and not queued):
            return _made(ssl.SSLEOFError, ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol")
        if code != lib.SSL_ERROR_SSL or not queued:
            return _made(ssl.SSLError, ssl.SSL_ERROR_SSL, "A failure in the SSL library occurred")
        text = _ALERT.sub("sslv3 alert ", _text(lib.ERR_reason_error_string(queued))) or "unknown"
        reason = text.upper().replace(" ", "_")
        if reason == "CERTIFICATE_VERIFY_FAILED":
            return unverified(lib.SSL_get_verify_result(self._ssl), self.server_hostname)
        return _made(ssl.SSLError, ssl.SSL_ERROR_SSL, f"[SSL: {reason}] {text}", reason)

    # ------------------------------------------------------------ as of SSLObject

    def do_handshake(self) -> None:
        """As of SSLObject."""
        self._run(lib.SSL_do_handshake)
        self._done = True

    def write(self, data: Any) -> int:
        """As of SSLObject: all of it, or what was encrypted before OpenSSL wanted to read."""
        with ffi.from_buffer(data) as memory:
            size, done = len(memory), 0
            while done < size:
                start, count = memory + done, min(SLICE, size - done)
                try:
                    done += self._run(lib.SSL_write, start, count)
                except ssl.SSLWantReadError:
                    if not done:
                        raise
                    break
        return done

    def read(self, length: int = 1024, buffer: Any = None) -> Any:
        """As of inlet.TlsRecords; without a buffer at most one record."""
        if buffer is None:
            if length < 0:
                raise ValueError("size should not be negative")
            room = _thread.plain[:length]
        else:
            room = memoryview(buffer).cast("B")
            room = room[:length] if length > 0 else room
        got = self.take(room, one=buffer is None)
        if not got and room and not self._ended:
            raise _again(self._failure) if self._failure else _want_read()
        return bytes(room[:got]) if buffer is None else got

    def take(self, buffer: memoryview, one: bool = False) -> int:
        """Fill it with what is there already (one: of one record). Less: there is no more, or read() says why."""
        size, got = min(len(buffer), MOST), 0
        if not size or self._failure is not None:
            return 0
        read, handle, into, where = lib.SSL_read, self._ssl, self._into, self._where
        with ffi.from_buffer(buffer, require_writable=True) as memory:
            lib.ERR_clear_error()
            if self._incoming.pending:
                self._feed()
            while got < size:
                count = read(handle, memory + got, size - got)
                if count > 0:
                    got += count
                    if one or not (lib.BIO_get_mem_data(into, where) or self._incoming.pending):
                        break  # it never reads ahead: no other record is there, and to hear that from it costs 1 us
                elif lib.SSL_get_error(handle, count) != lib.SSL_ERROR_WANT_READ:
                    self._over(count)
                    break
                elif not self._feed():
                    break
        self._flush()  # an alert, or the answer to an update of keys
        return got

    def _over(self, result: int) -> None:
        """Reading came to its end, or failed."""
        error = self._error(result)
        if isinstance(error, ssl.SSLZeroReturnError) and lib.SSL_get_shutdown(self._ssl) == SSL.RECEIVED_SHUTDOWN:
            self._ended = True
        else:
            self._failure = error

    def pending(self) -> int:
        """Bytes that OpenSSL has, decrypted or not; 1 when what there is to read is the end, or a failure."""
        there = lib.SSL_pending(self._ssl) or lib.BIO_get_mem_data(self._into, self._where)
        return int(there) or int(self._ended or self._failure is not None)

    def unwrap(self) -> None:
        """As of SSLObject: SSLWantReadError until the other end has said that it sends no more, too."""
        self._run(lambda handle: int(lib.SSL_shutdown(handle) or lib.SSL_shutdown(handle)))

    def getpeercert(self, binary_form: bool = False) -> Any:
        """As of SSLObject, with nothing but subjectAltName in the dictionary: only that is looked at."""
        if not self._done:
            raise ValueError("handshake not done yet")
        try:
            certificate = self._connection.get_peer_certificate(as_cryptography=True)
            if certificate is None:
                return None
            if binary_form:
                return certificate.public_bytes(Encoding.DER)
            return {"subjectAltName": _names(certificate)}
        except ValueError:  # cryptography's parser is stricter than OpenSSL's
            raise unverified(lib.X509_V_ERR_INVALID_EXTENSION, self.server_hostname) from None

    def version(self) -> str | None:
        """As of SSLObject."""
        return self._connection.get_protocol_version_name() if self._done else None

    def cipher(self) -> tuple[str, str, int] | None:
        """As of SSLObject."""
        name, bits = self._connection.get_cipher_name(), self._connection.get_cipher_bits()
        return (name, self._connection.get_protocol_version_name(), bits) if name and bits else None

    def compression(self) -> None:
        """None: TLS 1.3 has none."""

    def selected_alpn_protocol(self) -> None:
        """None: none is offered."""


def _queued() -> int:
    """The error of a call, 0: none. The last is what TLS says; before it may stand what those say that it called. But
    OpenSSL 3.2 and newer put after it that it was in the record layer."""
    found = 0
    while one := lib.ERR_get_error():
        if not found or _text(lib.ERR_reason_error_string(one)) != "record layer failure":
            found = one
    return found


Error = TypeVar("Error", bound=ssl.SSLError)


def _made(kind: type[Error], code: int, text: str, reason: str | None = None) -> Error:
    error = kind(code, text)
    told: Any = error  # of Python's own, reason and library may be None
    told.reason, told.library = reason, "SSL" if reason else None
    return error


def _again(error: ssl.SSLError) -> ssl.SSLError:
    """A copy: what was raised keeps the frames that it passed, and with them the caller's buffer."""
    copy = type(error)(*error.args)
    copy.__dict__.update(error.__dict__)
    return copy


def _want_read() -> ssl.SSLError:
    return _made(ssl.SSLWantReadError, ssl.SSL_ERROR_WANT_READ, "The operation did not complete (read)")


def unverified(code: int, name: str | None) -> ssl.SSLCertVerificationError:
    """Why a certificate is refused, as Python's ssl words it."""
    told = {
        lib.X509_V_ERR_HOSTNAME_MISMATCH: f"Hostname mismatch, certificate is not valid for '{name}'.",
        lib.X509_V_ERR_IP_ADDRESS_MISMATCH: f"IP address mismatch, certificate is not valid for '{name}'.",
    }.get(code) or _text(lib.X509_verify_cert_error_string(code))
    text = f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {told}"
    error = _made(ssl.SSLCertVerificationError, ssl.SSL_ERROR_SSL, text, "CERTIFICATE_VERIFY_FAILED")
    error.verify_code, error.verify_message = code, told
    return error


def _names(certificate: x509.Certificate) -> tuple[tuple[str, str], ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    kinds: dict[type, str] = {x509.UniformResourceIdentifier: "URI", x509.DNSName: "DNS", x509.IPAddress: "IP Address"}
    return tuple((kinds[type(one)], str(one.value)) for one in names if type(one) in kinds)


def _address(name: str) -> bytes | None:
    try:
        address = ip_address(name)
    except ValueError:
        return None
    return address.packed if isinstance(address, IPv4Address) or address.scope_id is None else None


def _text(pointer: Any) -> str:
    return "" if pointer == ffi.NULL else ffi.string(pointer).decode("ascii", "replace")
