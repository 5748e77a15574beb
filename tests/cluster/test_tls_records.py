"""Connections of either OpenSSL, with either at the other end: the same bytes, errors and ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.cluster.engines import ENGINES, use
from tests.cluster.secure_support import CLIENT, NODE, OTHER, SECRET
from upipe.cluster import tls
from upipe.cluster.inlet import RECORD, Takes
from upipe.cluster.tls_records import FastRecords

NOW = datetime.now(UTC)
SERVER = tls.Identity("node", NODE)
NAME = f"{NODE}.{tls.DOMAIN}"
PAIRS = [(server, client) for server in ENGINES for client in ENGINES]
ROOM = 1 << 18
WANTS: Any = ("SSLWantReadError", None, None, "The operation did not complete (read)")


@dataclass
class End:
    """One end, and what it reads from and writes to."""

    tls: Any
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO

    def said(self, call: Callable[[], Any]) -> Any:
        """The result of a call, or what it raised, without the line of _ssl.c."""
        try:
            return call()
        except ssl.SSLError as error:
            text = str(error).partition(" (_ssl")[0]
            return type(error).__name__, getattr(error, "reason", None), getattr(error, "verify_code", None), text

    def read(self) -> Any:
        room = bytearray(ROOM)
        got = self.said(lambda: self.tls.read(len(room), room))
        return bytes(room[:got]) if isinstance(got, int) else got


def ends(server: ssl.SSLContext, client: ssl.SSLContext, name: str = NAME) -> tuple[End, End]:
    a, b, c, d = (ssl.MemoryBIO() for _ in range(4))
    return (
        End(server.wrap_bio(a, b, server_side=True), a, b),
        End(client.wrap_bio(c, d, server_hostname=name), c, d),
    )


def carry(one: End, other: End, count: int = -1) -> None:
    """What one wrote comes to the other."""
    other.incoming.write(one.outgoing.read(count))


def shake(server: End, client: End) -> list[Any]:
    """How the handshake went at each end; the client's reads what the server says to it behind it."""
    results = [WANTS, WANTS]
    for _ in range(4):
        for number, (one, other) in enumerate(((client, server), (server, client))):
            if results[number] == WANTS:
                results[number] = one.said(one.tls.do_handshake)
            carry(one, other)
    if results[0] is None:
        results[0] = client.read()
    return results


def contexts(
    engines: tuple[str, str], monkeypatch: pytest.MonkeyPatch, server: tls.Credentials, client: tls.Credentials
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    use(engines[0], monkeypatch)
    serving = tls.server_context(server)
    use(engines[1], monkeypatch)
    return serving, tls.client_context(client)


@pytest.fixture(params=PAIRS, ids="-".join)
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's context, of each OpenSSL."""
    credentials = tls.issue(SECRET, SERVER), tls.issue(SECRET, CLIENT)
    made = contexts(request.param, monkeypatch, *credentials)
    assert [hasattr(one, "fast_class") for one in made] == [one == "fast" for one in request.param]
    return made


@pytest.fixture
def pair(both: tuple[ssl.SSLContext, ssl.SSLContext]) -> tuple[End, End]:
    """A server and a client after their handshake."""
    made = ends(*both)
    shake(*made)
    for one in made:
        assert isinstance(one.tls, Takes)
        assert one.tls.version() == "TLSv1.3"
        assert one.tls.cipher()[1] == "TLSv1.3"
        assert one.tls.compression() is one.tls.selected_alpn_protocol() is None
    return made


def test_large_transfers_both_ways_at_once_arrive_byte_for_byte(pair: tuple[End, End]) -> None:
    dice = random.Random(1)
    data = [dice.randbytes(3_000_000) for _ in pair]
    sent, got = [0, 0], [bytearray(), bytearray()]
    while min(map(len, got)) < len(data[0]):
        for mine, (one, other) in enumerate((pair, pair[::-1])):
            count = dice.choice((1, 100, RECORD - 1, RECORD, RECORD + 1, 1 << 17, 300_001))
            piece = data[mine][sent[mine] : sent[mine] + count]
            if piece and one.outgoing.pending < 1 << 19:  # back pressure
                assert one.tls.write(dice.choice((bytes, bytearray, memoryview))(piece)) == len(piece)
                sent[mine] += len(piece)
            carry(one, other, dice.choice((1, 5, 4096, 1 << 17, -1)))
            room = bytearray(dice.choice((1, 1000, RECORD, 1 << 18)))
            with contextlib.suppress(ssl.SSLWantReadError):
                if dice.random() < 0.2:
                    got[1 - mine] += other.tls.read(len(room))
                else:
                    got[1 - mine] += room[: other.tls.read(len(room), room)]
    assert got[::-1] == data


def test_the_end_is_told_once_all_is_read(pair: tuple[End, End]) -> None:
    server, client = pair
    client.tls.write(b"last")
    assert client.said(client.tls.unwrap) == WANTS
    carry(client, server)
    assert server.read() == b"last"
    assert server.read() == server.tls.read() == b""
    server.tls.write(b"not yet")
    server.tls.unwrap()
    carry(server, client)
    assert client.said(lambda: client.tls.write(b"more"))[1] == "PROTOCOL_IS_SHUTDOWN"
    assert client.said(client.tls.unwrap)[1] == "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"


def test_both_ends_close_in_order(pair: tuple[End, End]) -> None:
    server, client = pair
    assert client.said(client.tls.unwrap) == WANTS
    carry(client, server)
    server.tls.unwrap()
    carry(server, client)
    client.tls.unwrap()
    assert client.read()[0] == "SSLZeroReturnError"


@pytest.mark.parametrize("kept", [0, 3, 50], ids=["between records", "inside a head", "inside a record"])
def test_a_cut_is_told_as_by_python(pair: tuple[End, End], kept: int) -> None:
    server, client = pair
    client.tls.write(b"whole")
    carry(client, server)
    client.tls.write(b"b" * 100)
    carry(client, server, kept)
    server.incoming.write_eof()
    assert server.read() == b"whole"
    assert server.read() == ("SSLEOFError", None, None, "EOF occurred in violation of protocol")


def test_a_forged_record_fails_for_good_and_the_peer_is_told(pair: tuple[End, End]) -> None:
    server, client = pair
    client.tls.write(b"true")
    carry(client, server)
    client.tls.write(b"x" * 100)
    forged = bytearray(client.outgoing.read())
    forged[50] ^= 1
    server.incoming.write(forged)
    assert server.read() == b"true"
    kind, reason, _, text = server.read()
    if isinstance(server.tls, FastRecords):  # Python's has forgotten by now which error it was
        assert (kind, reason) == ("SSLError", "DECRYPTION_FAILED_OR_BAD_RECORD_MAC")
        assert text == "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed or bad record mac"
    assert kind in ("SSLError", "SSLEOFError")
    carry(server, client)
    assert client.read()[:2] == ("SSLError", "SSLV3_ALERT_BAD_RECORD_MAC")
    assert server.read()[0] != "SSLWantReadError"
    room = bytearray(ROOM)
    with contextlib.suppress(ssl.SSLError):
        server.tls.read(len(room), room)
    room.extend(b"x")  # BufferError while a kept error holds its frames


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another CA at the server": ({"secret": OTHER}, {}, NAME),
    "another CA at the client": ({}, {"secret": OTHER}, NAME),
    "an expired server": ({"now": NOW - timedelta(days=9)}, {}, NAME),
    "an expired client": ({}, {"now": NOW - timedelta(days=9)}, NAME),
    "a client of tomorrow": ({}, {"now": NOW + timedelta(days=1)}, NAME),
    "another name": ({}, {}, f"{'f' * 16}.{tls.DOMAIN}"),
    "another address": ({}, {}, "10.9.9.9"),
    "an address of version 6": ({}, {}, "fe80::9"),
    "a client that serves": ({"identity": CLIENT}, {}, NAME),
}


@pytest.mark.parametrize("engines", PAIRS, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_a_failed_handshake_is_told_as_by_python(
    case: str, engines: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(engines: tuple[str, str]) -> Any:
        server, client, name = CASES[case]
        issued = [
            tls.issue(one.pop("secret", SECRET), one.pop("identity", default), **one)
            for one, default in ((dict(server), SERVER), (dict(client), CLIENT))
        ]
        return shake(*ends(*contexts(engines, monkeypatch, *issued), name=name))

    found = told(engines)
    assert found == told(("python", "python"))
    assert any(isinstance(one, tuple) and one != WANTS for one in found)


@pytest.mark.parametrize("engines", PAIRS, ids="-".join)
@pytest.mark.parametrize("forger", [0, 1], ids=["server", "client"])
def test_a_forged_signature_is_told_as_by_python(
    forger: int, engines: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = [tls.issue(SECRET, SERVER), tls.issue(SECRET, CLIENT)]
    der = bytearray(x509.load_pem_x509_certificate(issued[forger].certificate).public_bytes(Encoding.DER))
    der[-3] ^= 1
    forged = x509.load_der_x509_certificate(bytes(der)).public_bytes(Encoding.PEM)
    issued[forger] = dataclasses.replace(issued[forger], certificate=forged)

    def told(engines: tuple[str, str]) -> Any:
        return shake(*ends(*contexts(engines, monkeypatch, *issued)))

    found = told(engines)
    assert found == told(("python", "python"))
    if not forger:
        assert found[0][2] == 7  # X509_V_ERR_CERT_SIGNATURE_FAILURE


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("bytes_", "reasons"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", {"HTTP_REQUEST"}),
        (b"\x00" * 64, {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL"}),
        (b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", {"LENGTH_TOO_SHORT", "LENGTH_MISMATCH", "BAD_PACKET"}),
    ],
    ids=["HTTP", "zeros", "an empty hello"],
)
def test_what_is_no_tls_is_an_error(
    engine: str, bytes_: bytes, reasons: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(engine, monkeypatch)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = tls.server_context(tls.issue(SECRET, SERVER))
    end = End(context.wrap_bio(incoming, outgoing, server_side=True), incoming, outgoing)
    assert end.said(end.tls.do_handshake) == WANTS
    incoming.write(bytes_)
    kind, reason, _, text = end.said(end.tls.do_handshake)
    assert kind == "SSLError"
    assert reason in reasons, text


def test_an_end_inside_the_handshake_is_an_error(both: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = ends(*both)
    assert client.said(client.tls.do_handshake) == WANTS
    carry(client, server, 20)
    server.incoming.write_eof()
    assert isinstance(server.said(server.tls.do_handshake), tuple)
    assert server.said(server.tls.do_handshake) != WANTS


def test_who_shows_no_certificate_is_nobody_and_gets_no_session(both: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.load_verify_locations(cadata=tls.issue(SECRET, SERVER).ca.decode())
    server, client = ends(both[0], stranger)
    shake(server, client)
    assert server.tls.getpeercert() is server.tls.getpeercert(True) is None
    server.tls.write(b"hello")
    carry(server, client)
    assert client.read() == b"hello"
    session = client.tls.session
    if session is None or not session.has_ticket:
        return  # none to come again with
    server, client = ends(*both)
    client.tls = stranger.wrap_bio(client.incoming, client.outgoing, server_hostname=NAME, session=session)
    shake(server, client)
    assert client.tls.version() == "TLSv1.3"
    assert not client.tls.session_reused


def test_the_peers_certificate_is_the_same_in_both(pair: tuple[End, End]) -> None:
    server, client = pair
    assert tls.identity_of(server.tls.getpeercert(), derived=True) == CLIENT
    assert tls.identity_of(client.tls.getpeercert(), derived=True) == SERVER
    names = client.tls.getpeercert()["subjectAltName"]
    assert names == (("URI", SERVER.uri), ("DNS", NAME), ("DNS", tls.DOMAIN))
    assert b"urn:upipe:node:" in client.tls.getpeercert(True)


@pytest.mark.parametrize("engine", ENGINES)
def test_new_credentials_are_shown_from_the_next_handshake_on(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = contexts((engine, engine), monkeypatch, tls.issue(SECRET, SERVER), tls.issue(SECRET, CLIENT))
    server, client = ends(*both)
    shake(server, client)
    for context, identity in zip(both, (SERVER, CLIENT), strict=True):
        tls.renew(context, tls.issue(SECRET, identity))
    client.tls.write(b"goes on")
    carry(client, server)
    assert server.read() == b"goes on"
    later = ends(*both)
    shake(*later)
    for old, new in zip((server, client), later, strict=True):
        assert old.tls.getpeercert(True) != new.tls.getpeercert(True)


# ------------------------------------------------------------------------------------------------- the fast one alone


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return contexts(("fast", "fast"), monkeypatch, tls.issue(SECRET, SERVER), tls.issue(SECRET, CLIENT))


def test_a_context_that_checks_less_is_refused(fast: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    def bios() -> tuple[ssl.MemoryBIO, ssl.MemoryBIO]:
        return ssl.MemoryBIO(), ssl.MemoryBIO()

    server, client = fast
    with pytest.raises(ssl.SSLError, match="other side"):
        server.wrap_bio(*bios(), server_side=False, server_hostname=NAME)
    for nobody in (None, "", ".example"):
        with pytest.raises(ValueError, match="server_hostname"):
            client.wrap_bio(*bios(), server_hostname=nobody)
    with pytest.raises(ssl.SSLError, match="cadata"):
        client.load_verify_locations(cafile="/nowhere")
    client.check_hostname = False
    with pytest.raises(ssl.SSLError, match="checks less"):
        client.wrap_bio(*bios(), server_hostname=NAME)
    server.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="checks less"):
        server.wrap_bio(*bios(), server_side=True)


def test_a_name_that_its_openssl_does_not_take_goes_pythons_way(fast: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = ends(*fast, name="x")
    assert not isinstance(client.tls, FastRecords)
    assert isinstance(server.tls, FastRecords)
    assert shake(server, client)[0][2] == 62  # the certificate is of another name


def test_memory_is_written_only_where_that_is_allowed_and_let_go(fast: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = ends(*fast)
    shake(server, client)
    client.tls.write(b"data")
    carry(client, server)
    constant = b"constant"
    for refused in (constant, memoryview(constant)):
        with pytest.raises((BufferError, ValueError, TypeError)):
            server.tls.read(len(constant), refused)
    assert constant == b"constant"
    room, beyond = bytearray(10), bytearray(10)
    assert server.tls.read(2, room) == 2
    assert server.tls.take(memoryview(beyond)[4:6]) == 2
    assert (bytes(room), bytes(beyond)) == (b"da" + bytes(8), bytes(4) + b"ta" + bytes(4))
    with pytest.raises(ssl.SSLWantReadError):
        server.tls.read(10, room)
    for one in (room, beyond):
        one.extend(b"x")  # BufferError while anyone holds it
    words = memoryview(b"0123456789abcdef").cast("I")
    assert client.tls.write(words) == 16
    assert client.tls.write(b"") == 0
    carry(client, server)
    assert server.read() == b"0123456789abcdef"


def test_threads_do_not_mix_their_bytes(fast: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    wrong: list[int] = []

    def run(number: int) -> None:
        server, client = ends(*fast)
        shake(server, client)
        data = bytes([number]) * 50_000
        for _ in range(60):
            client.tls.write(data)
            carry(client, server)
            got = b"".join(server.tls.read(ROOM) for _ in range(4))
            if got != data:
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_event_loops_carry_much_both_ways_over_sockets(
    both: tuple[ssl.SSLContext, ssl.SSLContext], loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    data = random.Random(2).randbytes(1 << 20) * 4

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(ROOM):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=both[0])
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=both[1], server_hostname=NAME)
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(run(), 60))
