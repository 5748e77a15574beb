"""The table keeps its own promises."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.cluster.secure_support import PARAMETERS
from upipe.cluster import routes
from upipe.cluster.routes import NOTHING, ROUTES, Bytes, Match, NoMatch, Route, match
from upipe.cluster.wire import Done, Stopping


def test_names_are_used_once_and_so_is_each_method_of_a_path() -> None:
    assert max(Counter(route.name for route in ROUTES).values()) == 1
    assert max(Counter((route.method, route.path) for route in ROUTES).values()) == 1


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_each_route_is_found_by_its_path_and_says_what_it_does(route: Route) -> None:
    path = route.fill({name: PARAMETERS[name] for name in route.names})
    found = match(route.method, path)
    assert isinstance(found, Match) and found.route is route
    assert re.match(r"/v1/[a-z]", route.path) and route.doc.endswith((".", "?"))
    assert route.changes == (route.method not in ("GET", "HEAD"))
    assert route.seconds > 0 and 0 < route.most <= 1 << 30


def test_a_get_that_changes_or_carries_something_cannot_be_written_down() -> None:
    with pytest.raises(ValueError, match="change nothing"):
        Route("GET", "/v1/x", "x", NOTHING, Done, "X.", changes=True)
    with pytest.raises(ValueError, match="change nothing"):
        Route("HEAD", "/v1/x", "x", Stopping, Bytes, "X.")
    with pytest.raises(ValueError, match="without a pattern"):
        Route("GET", "/v1/{what}", "x", NOTHING, Done, "X.")


@pytest.mark.parametrize("path", ["/v1/pipes/", "/v1/pipes/../node", "/v1/pipes/a%2fb", "/v1/pipes/.hidden",
                                  "/v1//node", "/v1/code/abc", "/V1/node", "/v1/node\n", "/v1/pipes/é",
                                  "//v1/node"])  # fmt: skip
def test_what_is_no_path_is_found_nowhere(path: str) -> None:
    assert match("GET", path) == NoMatch()


def test_another_method_is_told_the_path_s_own() -> None:
    assert match("PATCH", "/v1/pipes") == NoMatch(("GET", "POST"))


def test_a_parameter_that_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match="pipe"):
        routes.PIPE.fill({})
