"""The guard alone: pure decisions, whole tables of them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upipe.cluster import guard, routes, tls
from upipe.cluster.guard import Allowed, Peer, Policy, Refusal, decide

TOKEN = "a-token"
POLICY = Policy(TOKEN, "aa" * 8, frozenset({"box.example", "fd00::1"}))
PLAIN = Peer("10.0.0.9", "10.0.0.1")
SECURE = Peer("10.0.0.9", "10.0.0.1", tls=True, identity=tls.Identity("node", "bb" * 8))
GOOD = {"host": "localhost:7420", "authorization": f"Bearer {TOKEN}"}


def code(method: str, target: str, headers: dict[str, str], peer: Peer = PLAIN) -> str:
    verdict = decide(method, target, headers, peer, POLICY)
    return verdict.code if isinstance(verdict, Refusal) else "allowed"


def test_with_host_and_token_it_is_allowed() -> None:
    verdict = decide("GET", "/v1/pipes/words?x=1", GOOD, PLAIN, POLICY)
    assert isinstance(verdict, Allowed) and verdict.match.route is routes.PIPE
    assert verdict.match.parameters == {"pipe": "words"} and not verdict.upgrade


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]", "[::1]:2", "10.0.0.1:7420", "BOX.example",
                                  "[fd00::1]:1", "node.upipe.internal", f"{'aa' * 8}.node.upipe.internal"])  # fmt: skip
def test_hosts_of_ours(host: str) -> None:
    assert code("GET", "/v1/node", {**GOOD, "host": host}) == "allowed"


@pytest.mark.parametrize("host", ["", "evil", "10.0.0.2", "localhost.", "localhost, evil", "evil, localhost",
                                  "a@localhost", "localhost:x", "localhost:", "::1", "[::1", "[::2]",
                                  f"{'bb' * 8}.node.upipe.internal", "localhost/", "localhost:1:1",
                                  "²:1", "localhost:²"])  # fmt: skip
def test_hosts_of_others(host: str) -> None:
    assert code("GET", "/v1/node", {**GOOD, "host": host}) == "foreign_host"


@pytest.mark.parametrize(("origin", "secure", "said"), [
    ("http://localhost:7420", False, "allowed"), ("https://localhost:7420", True, "allowed"),
    ("https://localhost:7420", False, "foreign_origin"), ("http://localhost:7420", True, "foreign_origin"),
    ("http://localhost", False, "foreign_origin"), ("http://evil", False, "foreign_origin"),
    ("null", False, "foreign_origin"), ("", False, "foreign_origin"),
])  # fmt: skip
def test_origins(origin: str, secure: bool, said: str) -> None:
    assert code("GET", "/v1/node", {**GOOD, "origin": origin}, SECURE if secure else PLAIN) == said


def test_a_page_is_refused_before_its_token_is_looked_at_and_a_stranger_before_the_path_is() -> None:
    assert code("GET", "/nothing", {"host": "evil"}) == "foreign_host"
    assert code("BREW", "/nothing", {"host": "localhost"}) == "unauthorized"
    assert code("BREW", "/nothing", GOOD) == "no_such_path"


def test_every_route_is_closed_to_who_shows_nothing() -> None:
    for route in routes.ROUTES:
        path = route.path.format_map(dict.fromkeys(route.names, "x"))
        assert code(route.method, path, {}) == "foreign_host"
        assert code(route.method, path, {"host": "localhost"}, SECURE) == "unauthorized"


@pytest.mark.parametrize("shown", ["Bearer ", "Bearer", "", None])
def test_an_empty_token_opens_nothing(shown: str | None) -> None:
    assert guard.stranger(shown, "") is not None


def test_the_token_is_compared_in_constant_time() -> None:
    source = inspect.getsource(guard.stranger)
    assert "compare_digest" in source and "== bearer" not in source


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_other_authorization_is_let_in(shown: str) -> None:
    if shown.partition(" ")[0].lower() != "bearer" or shown.partition(" ")[2] != TOKEN:
        assert guard.stranger(shown, TOKEN) is not None


@pytest.mark.slow
@given(st.text(max_size=60), st.text(max_size=20), st.dictionaries(st.sampled_from(
    ["content-length", "transfer-encoding", "content-type", "content-encoding", "expect", "upgrade", "connection",
     "origin", "sec-fetch-site"]), st.text(max_size=30)))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_it_never_raises(path: str, method: str, headers: dict[str, str]) -> None:
    decide(method, "/" + path, {**GOOD, **headers}, PLAIN, POLICY)
    for route in routes.ROUTES:
        guard.bounds(route, headers)


JSON = {"content-type": "application/json; charset=utf-8"}


@pytest.mark.parametrize(("headers", "said"), [
    ({**JSON, "content-length": "2"}, "allowed"),
    ({**JSON, "transfer-encoding": "chunked"}, "allowed"),
    ({**JSON, "content-length": str(routes.STOP.most)}, "allowed"),
    ({**JSON, "content-length": str(routes.STOP.most + 1)}, "too_large"),
    ({**JSON, "content-length": "٣"}, "bad_length"),
    ({**JSON, "content-length": "9" * 19}, "bad_length"),
    ({**JSON, "content-encoding": "br"}, "compressed"),
    ({**JSON, "content-encoding": "Identity"}, "allowed"),
    ({"content-type": "text/plain"}, "wrong_type"), ({}, "wrong_type"),
])  # fmt: skip
def test_bounds_of_bodies(headers: dict[str, str], said: str) -> None:
    assert code("POST", "/v1/pipes/p/stop", {**GOOD, **headers}) == said


UPGRADE = {"upgrade": "upipe-mirror/1", "connection": "keep-alive, Upgrade"}


@pytest.mark.parametrize(("peer", "said"), [
    (PLAIN, "certificate_needed"), (SECURE, "allowed"),
    (Peer("h", "10.0.0.1", True, tls.Identity("client", "c")), "allowed"),
])  # fmt: skip
def test_mirrors_are_for_who_has_a_certificate(peer: Peer, said: str) -> None:
    assert code("GET", "/v1/mirrors/m", {**GOOD, **UPGRADE}, peer) == said
    assert code("GET", "/v1/mirrors/m", GOOD, peer) == "allowed"


@pytest.mark.parametrize(("host", "others"), [
    ("127.0.0.1", False), ("::1", False), ("localhost", False), ("127.9.9.9", False), ("0.0.0.0", True), ("::", True),
    ("10.0.0.1", True), ("box", True), ("fe80::1%eth0", True),
])  # fmt: skip
def test_who_can_reach_an_address(host: str, others: bool) -> None:
    assert guard.exposed(host) == others
    assert bool(guard.may_listen(host, 1, token=True, tls=False)) == others
    assert guard.may_listen(host, 1, token=False, tls=True)
    assert not guard.may_listen(host, 1, token=True, tls=True)


def test_refusals_are_sentences() -> None:
    seen: list[Any] = [
        decide("GET", "/v1/node", {}, PLAIN, POLICY),
        decide("GET", "/v1/node", {"host": "localhost"}, PLAIN, POLICY),
        decide("GET", "/x", GOOD, PLAIN, POLICY),
        decide("PUT", "/v1/node", GOOD, PLAIN, POLICY),
    ]
    assert [one.status for one in seen] == [403, 401, 404, 405]
    assert all(one.sentence.endswith(".") and one.sentence[0].isupper() for one in seen)
    assert dict(seen[3].headers)["Allow"] == "GET" and TOKEN not in repr(POLICY)
