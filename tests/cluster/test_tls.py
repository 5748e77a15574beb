"""Two ends of a real handshake in memory: who has the same secret gets in, everyone else is told why not."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from tests.cluster.engines import ENGINES, use
from tests.cluster.secure_support import CLIENT, NODE, OTHER, SECRET
from upipe.cluster import tls
from upipe.errors import CertificateError
from upipe.settings import Certificates

NOW = datetime.now(UTC)
SERVER = tls.Identity("node", NODE)
DAY = timedelta(days=1)


@pytest.fixture(params=ENGINES, autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test with each OpenSSL."""
    use(request.param, monkeypatch)
    return str(request.param)


def handshake(server: tls.Credentials, client: tls.Credentials | None, node: str = NODE, host: str = "h") -> Any:
    """Both ends over memory; what the server knows of the client. A client without credentials shows no certificate."""
    into, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = tls.client_context(client or tls.issue(SECRET, CLIENT))
    if client is None:
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.load_verify_locations(cadata=server.ca.decode())
    name = (client or server).expected(host, node)
    ours = tls.server_context(server).wrap_bio(into, back, server_side=True)
    theirs = trusting.wrap_bio(back, into, server_hostname=name)
    for _ in range(4):
        for end in (theirs, ours):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    with contextlib.suppress(ssl.SSLWantReadError):
        theirs.read()  # an alert, when the server does not want us
    theirs.write(b"x")
    assert ours.read() == b"x"
    assert ours.version() == "TLSv1.3"
    return tls.identity_of(ours.getpeercert(), server.derived)


def refused(server: tls.Credentials, client: tls.Credentials, **options: Any) -> str:
    with pytest.raises(ssl.SSLError) as raised:
        handshake(server, client, **options)
    return tls.explain(raised.value)


def issued(identity: tls.Identity = SERVER, now: datetime = NOW, secret: Any = SECRET) -> tls.Credentials:
    return tls.issue(secret, identity, ["10.0.0.1", "fe80::1%eth0", "box.local", "box.local"], now)


def test_two_processes_of_one_secret_prove_themselves_to_each_other() -> None:
    assert handshake(issued(), issued(CLIENT)) == CLIENT
    assert handshake(issued(), issued(tls.Identity("node", "bb" * 8)), node="") == tls.Identity("node", "bb" * 8)


def test_who_shows_no_certificate_is_nobody() -> None:
    assert handshake(issued(), None) is None


def test_a_browser_may_go_by_address_or_name() -> None:
    for name in ("10.0.0.1", "fe80::1", "box.local"):
        server = issued()
        assert handshake(server, _as_browser(server), host=name) == CLIENT


def _as_browser(server: tls.Credentials) -> tls.Credentials:
    return dataclasses.replace(issued(CLIENT), derived=False, ca=server.ca)  # expects the host that it dialled


def test_the_authority_is_the_same_on_each_host_and_another_for_another_secret() -> None:
    (key, one), (again, two) = tls.authority(SECRET), tls.authority(SECRET)
    assert key.private_numbers() == again.private_numbers()
    assert (one.subject, one.serial_number) == (two.subject, two.serial_number)
    assert key.private_numbers() != tls.authority(OTHER)[0].private_numbers()
    assert f"{key.private_numbers().private_value:x}"[:8] == "7eb5e0ef"  # hosts of all versions must agree


def test_another_secret_is_refused_with_what_to_compare() -> None:
    assert "same token file" in refused(issued(), issued(CLIENT, secret=OTHER))


def test_another_node_at_that_address_is_refused() -> None:
    assert "another node" in refused(issued(), issued(CLIENT), node="ff" * 8)


def test_a_client_cannot_play_a_node() -> None:
    with pytest.raises(ssl.SSLError):
        handshake(issued(CLIENT), issued(CLIENT))


@pytest.mark.parametrize("minutes", [-14, 0, 14])
def test_clocks_may_differ_by_minutes(minutes: int) -> None:
    assert handshake(issued(now=NOW + timedelta(minutes=minutes)), issued(CLIENT)) == CLIENT


@pytest.mark.parametrize(("then", "said"), [(NOW + DAY, "not valid yet.*date -u"), (NOW - 8 * DAY, "expired.*date -u")])
def test_a_clock_off_by_a_day_is_told_as_such(then: datetime, said: str) -> None:
    assert re.search(said, refused(issued(now=then), issued(CLIENT)))
    assert "date -u" in tls.explain(_alert(issued(), issued(CLIENT, now=then)))


def _alert(server: tls.Credentials, client: tls.Credentials) -> ssl.SSLError:
    with pytest.raises(ssl.SSLError) as raised:
        handshake(server, client)
    return raised.value


def test_what_does_not_speak_tls_is_told_so() -> None:
    into, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = tls.client_context(issued(CLIENT)).wrap_bio(into, back, server_hostname="x")
    into.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ssl.SSLError) as raised:
        theirs.do_handshake()
    assert "does not speak TLS" in tls.explain(raised.value)


def test_older_tls_is_refused() -> None:
    server = issued()
    into, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    theirs = context.wrap_bio(back, into, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        theirs.do_handshake()
    with pytest.raises(ssl.SSLError, match="PROTOCOL"):
        tls.server_context(server).wrap_bio(into, back, server_side=True).do_handshake()


def test_a_running_node_renews_its_certificate_each_day() -> None:
    server = issued()
    assert not server.due(NOW + DAY - timedelta(minutes=1))
    assert server.due(NOW + DAY)
    context = tls.server_context(server)
    tls.renew(context, issued())


def test_the_key_shows_nowhere_and_leaves_no_file(tmp_path: Path) -> None:
    gc.collect()  # what other tests left goes now
    before = set(os.listdir("/proc/self/fd"))
    server = issued()
    tls.server_context(server)
    assert "PRIVATE" not in f"{server!r} {server}"
    assert set(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------------------------- brought along


class Own:
    """A CA of the user, and files of a certificate that it signed."""

    def __init__(self, folder: Path, begins: datetime = NOW - DAY, ends: datetime = NOW + DAY) -> None:
        key, self.ca_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.ca, self.certificate, self.key = (folder / name for name in ("ca.pem", "node.pem", "node.key"))
        self.ca.write_bytes(self.sign("Our CA", self.ca_key, NOW - DAY, NOW + 99 * DAY, authority=True))
        self.certificate.write_bytes(self.sign("box.example", key, begins, ends))
        self.key.write_bytes(key.private_bytes(tls.Encoding.PEM, tls.PrivateFormat.PKCS8, tls.NoEncryption()))
        self.key.chmod(0o600)

    def sign(self, name: str, key: Any, begins: datetime, ends: datetime, authority: bool = False) -> bytes:
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in (name, "Our CA")]
        return (
            x509.CertificateBuilder(names[1], names[0], key.public_key(), 7, begins, ends)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name.replace(" ", "-"))]), critical=False)
            .sign(self.ca_key, SHA256())
            .public_bytes(tls.Encoding.PEM)
        )

    def bring(self, now: datetime = NOW) -> tls.Credentials:
        return tls.bring(Certificates(*map(str, (self.ca, self.certificate, self.key))), SERVER, now)


def test_own_certificates_go_by_their_host_names_and_make_a_node(tmp_path: Path) -> None:
    own = Own(tmp_path).bring()
    assert handshake(own, own, host="box.example") == tls.Identity("node", "box.example")
    assert "another node" in refused(own, own, host="other.example")
    assert "same token file" in refused(own, issued(CLIENT))


@pytest.mark.parametrize(
    ("begins", "ends", "said"),
    [
        (NOW - 9 * DAY, NOW - DAY, "node.pem expired at .*renew it"),
        (NOW + DAY, NOW + 9 * DAY, "node.pem is valid from .*clock"),
    ],
)
def test_own_certificates_out_of_their_time_are_refused(
    tmp_path: Path, begins: datetime, ends: datetime, said: str
) -> None:
    with pytest.raises(CertificateError, match=said):
        Own(tmp_path, begins, ends).bring()


def test_own_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    def said(own: Own) -> str:
        with pytest.raises(CertificateError) as raised:
            own.bring()
        return str(raised.value)

    folders = [tmp_path / str(number) for number in range(2)]
    for folder in folders:
        folder.mkdir()
    one, other = (Own(folder) for folder in folders)
    key, ca = one.key, one.ca
    one.key = other.key
    assert f"the key {other.key} does not belong to" in said(one)
    one.key = key
    key.chmod(0o644)
    assert "chmod 600" in said(one)
    key.chmod(0o600)
    one.ca = tmp_path / "nowhere"
    assert "nowhere cannot be read: No such file" in said(one)
    one.ca = key
    assert "holds no certificate" in said(one)
    one.ca, one.key = ca, ca
    ca.chmod(0o600)
    assert "is no PEM key" in said(one)


def test_a_certificate_of_an_unknown_ca_is_refused(tmp_path: Path) -> None:
    own = Own(tmp_path)
    own.ca.write_bytes(tls.authority(SECRET)[1].public_bytes(tls.Encoding.PEM))
    with pytest.raises(CertificateError, match="holds no such CA"):
        own.bring()


def test_the_last_second_of_a_certificate_belongs_to_it() -> None:
    begins, ends = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 8, tzinfo=UTC)
    assert not tls.expiry(begins, ends, begins) and not tls.expiry(begins, ends, ends + timedelta(seconds=0.9))
    assert "expired at 2026-01-08" in tls.expiry(begins, ends, ends + timedelta(seconds=1))
    assert "is valid from 2026-01-01" in tls.expiry(begins, ends, begins - timedelta(seconds=0.1))
