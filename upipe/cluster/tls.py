"""Who is who between nodes: the cluster's CA, derived from its secret, and a certificate that each process makes.

    secret --HKDF--> CA key (P-256, the same on each host, never stored) --signs--> node certificate
                                                                       `--signs--> client certificate

Certificates are made at start, last 7 days, and are in memory only.

A node serves and dials with its certificate; a client (a submitting process, `upipe`) only dials with its own. Both
are checked inside the handshake, TLS 1.3 only, before a byte of HTTP: a client expects the name of the very node
(`<id>.node.upipe.internal`), or of any node of the cluster when it dials a seed (`node.upipe.internal`), whatever
address it dialled. So a proven peer holds the secret, or a certificate that a holder made.

A browser or curl has no certificate, and may come without one: it must still bring the bearer token, and routes
between nodes are closed to it (guard.py). Who has certificates of their own brings CA, certificate and key (`bring`):
then hostnames are checked as everywhere, and each certificate of that CA counts as a node's, so that CA should sign
nothing else.

Rejected: Ed25519 (no browser takes it), a CA file to copy beside the token (two secrets instead of one), revocation
lists (a lost node key is worth at most 7 days, a lost secret needs a new secret), session tickets (they outlive a
certificate).
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from upipe.cluster import tls_choice
from upipe.cluster.inlet import TlsRecords
from upipe.cluster.token import Secret
from upipe.errors import CertificateError, OptionInvalid
from upipe.settings import Certificates

SKEW = timedelta(minutes=15)
"""How far the clocks of two hosts may differ at first contact: certificates are valid from this long ago."""
LIFE = timedelta(days=7)
"""How long a derived certificate is valid: short, since it cannot be revoked; a running node renews it each day."""
RENEW = timedelta(days=1)
"""Age at which a running node makes itself a new certificate."""
MOST_AFTER_ALERT = 8
"""Reads of what a peer still sends that failed the handshake and was told so; then the connection is cut."""
VARIABLES = ("UPIPE_CA", "UPIPE_CERTIFICATE", "UPIPE_KEY")
"""Environment variables that name the files of certificates of one's own."""
DOMAIN = "node.upipe.internal"
"""Name that the certificate of each node carries; never resolved, only compared."""
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
_URN = "urn:upipe:"


@dataclass(frozen=True)
class Identity:
    """Who a certificate names: kind "node" or "client", and its id."""

    kind: str
    id: str

    @property
    def uri(self) -> str:
        """As it stands in a certificate."""
        return f"{_URN}{self.kind}:{self.id}"


@dataclass(frozen=True)
class Credentials:
    """What one process shows and whom it trusts. The key is in memory only."""

    identity: Identity
    ca: bytes
    """PEM of the only CA that is trusted."""
    certificate: bytes
    key: bytes
    begins: datetime
    ends: datetime
    derived: bool
    """False: brought along by the user."""

    def __repr__(self) -> str:
        return f"<Credentials of {self.identity.uri} until {self.ends:%Y-%m-%d %H:%M} UTC>"

    def due(self, now: datetime) -> bool:
        """Whether it is time to make new ones: they are old, or the clock was set back to before they begin."""
        return self.derived and not self.begins <= now < self.begins + SKEW + RENEW

    def expected(self, host: str, node: str = "") -> str:
        """Name that a peer's certificate must carry when `host` is dialled and node `node` ("": any) expected."""
        return host if not self.derived else f"{node}.{DOMAIN}" if node else DOMAIN


# ---------------------------------------------------------------------------------------------------- deriving


def authority(secret: Secret) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The CA of the cluster: key, name and serial are those of every host; only the (random) self-signature differs."""
    number = int.from_bytes(secret.derive("ca key", 48), "big")  # 48 bytes: no bias worth a thought
    key = ec.derive_private_key(number % (_ORDER - 1) + 1, ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"uPipe cluster {secret.fingerprint}")])
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), int.from_bytes(secret.derive("ca serial", 15), "big") + 1)
        .not_valid_before(datetime(2020, 1, 1))
        .not_valid_after(datetime(9999, 12, 31, 23, 59, 59))  # "no well-defined end", RFC 5280
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return key, builder.sign(key, SHA256())


def issue(
    secret: Secret, identity: Identity, addresses: Iterable[str] = (), now: datetime | None = None
) -> Credentials:
    """Make a key and a certificate for this process.

    Args:
        secret: the cluster's.
        identity: a node may serve and dial, a client only dial.
        addresses: names and IP addresses by which browsers reach a node; nodes themselves go by its id.
        now: aware; default the clock.
    """
    now = now or datetime.now(UTC)
    ca_key, ca = authority(secret)
    key = ec.generate_private_key(ec.SECP256R1())
    node = identity.kind == "node"
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if node else [])]
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    if node:
        names += [x509.DNSName(f"{identity.id}.{DOMAIN}"), x509.DNSName(DOMAIN)]
        names += [_general(one) for one in dict.fromkeys(addresses)]
    begins, ends = now - SKEW, now + LIFE
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{identity.kind} {identity.id}")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, SHA256())
    )
    return Credentials(
        identity, ca.public_bytes(Encoding.PEM), certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), begins, ends, derived=True,
    )  # fmt: skip


def _usage(sign_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates, key_cert_sign=sign_certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, crl_sign=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _general(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(address.partition("%")[0]))
    except ValueError:
        return x509.DNSName(address)


# ---------------------------------------------------------------------------------------------------- bringing


def named(environment: Mapping[str, str]) -> Certificates | None:
    """The certificates of their own that $UPIPE_CA, $UPIPE_CERTIFICATE and $UPIPE_KEY name; None: none are.

    Raises:
        OptionInvalid: only some of the three are set.
    """
    found = [environment.get(name, "") for name in VARIABLES]
    if not any(found):
        return None
    if not all(found):
        missing = ", ".join(f"${name}" for name, value in zip(VARIABLES, found, strict=True) if not value)
        raise OptionInvalid(f"{', '.join(f'${name}' for name in VARIABLES)} go together: {missing} is not set")
    return Certificates(*found)


def variables(own: Certificates) -> dict[str, str]:
    """The environment from which named() reads them, whatever the working directory."""
    return dict(zip(VARIABLES, (os.path.abspath(one) for one in (own.ca, own.certificate, own.key)), strict=True))


def client(secret: Secret, id_: str, own: Certificates | None) -> Credentials:
    """What a process shows that only dials: its own certificates, or one that it derives.

    Raises:
        CertificateError: its own cannot be used.
    """
    identity = Identity("client", id_)
    return issue(secret, identity) if own is None else bring(own, identity)


def bring(own: Certificates, identity: Identity, now: datetime | None = None) -> Credentials:
    """Take certificates that the user brought, checked as far as one can before the first handshake.

    Raises:
        CertificateError: names the file, what is wrong with it, and what to do.
    """
    now = now or datetime.now(UTC)
    ca, certificate, key = Path(own.ca), Path(own.certificate), Path(own.key)
    authorities, chain = _certificates(ca), _certificates(certificate)
    pem = _read(key, private=True)
    try:
        public = load_pem_private_key(pem, None).public_key()
    except (ValueError, TypeError):
        raise CertificateError(f"the key {key} is no PEM key, or has a passphrase: bring one without") from None
    if _spki(public) != _spki(chain[0].public_key()):
        raise CertificateError(f"the key {key} does not belong to the certificate {certificate}: bring the pair")
    for where, one in ((certificate, chain[0]), *((ca, one) for one in authorities)):
        if told := expiry(one.not_valid_before_utc, one.not_valid_after_utc, now):
            raise CertificateError(f"the certificate in {where} {told}")
    if len(chain) == 1 and all(chain[0].issuer != one.subject for one in authorities):
        raise CertificateError(
            f"the certificate {certificate} was issued by {chain[0].issuer.rfc4514_string()!r}, and {ca} holds no such "
            "CA: bring the CA that signed it"
        )
    dates = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
    return Credentials(identity, _read(ca), _read(certificate), pem, *dates, derived=False)


def expiry(begins: datetime, ends: datetime, now: datetime) -> str:
    """What is wrong with the dates of a certificate; "" when nothing is. Its last second belongs to it (RFC 5280; so
    does OpenSSL 4 see it, while 3 ends it a second earlier)."""
    if now.replace(microsecond=0) > ends:
        return f"expired at {ends:%Y-%m-%d %H:%M} UTC (now: {now:%Y-%m-%d %H:%M}): renew it, or set this host's clock"
    if now < begins:
        return f"is valid from {begins:%Y-%m-%d %H:%M} UTC on (now: {now:%Y-%m-%d %H:%M}): set this host's clock"
    return ""


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise CertificateError(f"{path} holds no certificate in PEM form") from None


def _read(path: Path, private: bool = False) -> bytes:
    try:
        if private and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            raise CertificateError(f"the key {path} is open to others (mode {mode:04o}): `chmod 600` it")
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}") from None


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


# ---------------------------------------------------------------------------------------------------- contexts


@dataclass
class Greeting:
    """One handshake at a door, for whom it concerns."""

    failure: ssl.SSLError | None = None
    """Why it failed, here."""


greeting: ContextVar[Greeting | None] = ContextVar("greeting", default=None)
"""Of the handshake that runs in this context."""


class _Telling:
    """A handshake whose failure reaches the peer: OpenSSL words an alert ("certificate expired"), and both asyncio and
    uvloop throw it away with the connection when do_handshake() raises. So it asks for more to read first, at which
    they send what there is to send, and the peer, which knows why now, ends the connection itself.

    Mixed into the connections of either OpenSSL."""

    _refused: ssl.SSLError | None = None
    _calls = 0

    def do_handshake(self) -> None:
        """As SSLObject's."""
        if self._refused is not None:
            self._calls += 1
            if self._calls < MOST_AFTER_ALERT:
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the peer is told")
            raise self._refused
        try:
            super().do_handshake()  # type: ignore[misc]
        except ssl.SSLCertVerificationError as error:
            self._refused = error
            if (one := greeting.get()) is not None:
                one.failure = error
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the peer is told") from None


@cache
def _telling(records: Any) -> Any:
    return type("Telling", (_Telling, records), {})


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """For a node's port. Who shows a certificate is checked; who shows none is a browser or a stranger (guard.py)."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, credentials)
    name = "fast_class" if hasattr(context, "fast_class") else "sslobject_class"
    setattr(context, name, _telling(getattr(context, name)))
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0
    return context


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """For dialling: pass `credentials.expected(...)` as server_hostname, and the handshake proves the node."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, credentials)
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True
    return context


def _context(protocol: int, credentials: Credentials) -> ssl.SSLContext:
    context = tls_choice.chosen().context(protocol)
    context.sslobject_class = TlsRecords
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=credentials.ca.decode("ascii"))
    if credentials.derived:
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    renew(context, credentials)
    return context


def renew(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Show new credentials from the next handshake on; running connections go on.

    ssl reads keys from files only: these are in memory (memfd), so that a key is never on a disk. A CA of one's own
    that was replaced is trusted beside the former.
    """
    if not credentials.derived:
        context.load_verify_locations(cadata=credentials.ca.decode("ascii"))
    with ExitStack() as stack:
        paths = [_in_memory(stack, data) for data in (credentials.certificate, credentials.key)]
        try:
            context.load_cert_chain(*paths)
        except ssl.SSLError as error:
            raise CertificateError(f"the certificate of {credentials.identity.uri} cannot be used: {error}") from None


def _in_memory(stack: ExitStack, data: bytes) -> str:
    fd = os.memfd_create("upipe", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.write(fd, data)
    return f"/proc/self/fd/{fd}"


# ---------------------------------------------------------------------------------------------------- peers


def identity_of(certificate: Mapping[str, Any] | None, derived: bool) -> Identity | None:
    """Who a verified peer is.

    Args:
        certificate: as ssl's getpeercert() tells it; None or {} when the peer showed none.
        derived: False when the CA was brought along: then whoever it signed is a node, by the name it carries.
    """
    if not certificate:
        return None
    names: tuple[tuple[str, str], ...] = certificate.get("subjectAltName", ())
    for kind, value in names:
        parts = value.removeprefix(_URN).split(":")
        if kind == "URI" and value.startswith(_URN) and len(parts) == 2 and parts[0] in ("node", "client"):
            return Identity(parts[0], parts[1])
    if derived:
        return None
    return Identity("node", next((value for kind, value in names if kind == "DNS"), "unnamed"))


_VERIFY = {
    9: "its certificate is not valid yet, as this host's clock goes: the clocks differ by more than 15 minutes; "
    "compare `date -u` on both hosts",
    10: "its certificate has expired, as this host's clock goes: compare `date -u` on both hosts; a certificate that "
    "you brought must be renewed, a derived one is new after a restart of that node",
    62: "it is another node than the one expected there, or no node at all: its address has been taken over; of "
    "certificates that you brought: its certificate does not carry the name by which it was dialled",
    64: "its certificate does not carry the address by which it was dialled: one that you bring needs each address of "
    "its host as a subjectAltName, or its name, where --host and HOST:PORT say that name",
}
_SAME_TOKEN = "both hosts need the same token file (`upipe token show-fingerprint` on each)"
_OTHER_CA = (
    f"its certificate is of another CA: {_SAME_TOKEN}, or, where that one has certificates of its own, some of the "
    "same CA (--ca, --certificate and --key, or $UPIPE_CA, $UPIPE_CERTIFICATE and $UPIPE_KEY)"
)
_ALERTS = {
    "UNKNOWN_CA": f"it does not know our CA: {_SAME_TOKEN}",
    "CERTIFICATE_EXPIRED": "it finds our certificate expired, by its clock: compare `date -u` on both hosts; "
    "one that you brought must be renewed",
    "BAD_CERTIFICATE": "it finds our certificate not valid, perhaps not yet: compare `date -u` on both hosts",
    "WRONG_VERSION_NUMBER": "it does not speak TLS: another program listens there, or TLS is off",
    "RECORD_LAYER_FAILURE": "it does not speak TLS: another program listens there, or TLS is off",
    "PROTOCOL_VERSION": "it does not speak TLS 1.3",
}


def explain(error: BaseException) -> str:
    """Why a handshake failed, as a sentence about "it", the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY.get(error.verify_code, _OTHER_CA)
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None) or str(error)
        return next((told for name, told in _ALERTS.items() if name in reason), f"TLS failed: {reason}")
    return "it ended the connection inside the TLS handshake: another program listens there, or it is stopping"
