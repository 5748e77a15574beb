"""The document has every route, and a real server does what it says to whatever schemathesis makes of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.cluster.secure_support import SECRET, running
from upipe.cluster import openapi, routes, tls

DOCUMENT = openapi.document("0.1.0")
CHECKS = (
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, ignored_auth,
    unsupported_method,
)  # fmt: skip


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    written = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert written == {(route.method, route.path) for route in routes.ROUTES}
    assert DOCUMENT["security"] == [{"token": []}]


def test_the_table_in_the_architecture_is_the_one_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text()
    assert f"<!-- routes -->\n{openapi.markdown()}\n<!-- end -->" in text


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    text = json.dumps(DOCUMENT)
    for kind in ("schemas", "responses"):
        for name in DOCUMENT["components"][kind]:
            assert f'"#/components/{kind}/{name}"' in text
    found: list[str] = []
    _references(DOCUMENT, found)
    for reference in found:
        at: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            at = at[step]


def _references(at: Any, found: list[str]) -> None:
    if isinstance(at, dict):
        found += [value for name, value in at.items() if name == "$ref"]
        for value in at.values():
            _references(value, found)
    elif isinstance(at, list):
        for value in at:
            _references(value, found)


# ------------------------------------------------------------------------------------------------- schemathesis


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A real server in a thread of its own; how requests reaches it as a node."""
    folder = tmp_path_factory.mktemp("node")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = AsyncExitStack()
    started = stack.enter_async_context(running(folder))
    port = asyncio.run_coroutine_threadsafe(started, loop).result(60).port
    own = tls.issue(SECRET, tls.Identity("node", "bb" * 8))
    for name, data in (("ca", own.ca), ("cert", own.certificate), ("key", own.key)):
        (folder / name).write_bytes(data)
    try:
        yield {
            "base_url": f"https://127.0.0.1:{port}", "verify": str(folder / "ca"),
            "cert": (str(folder / "cert"), str(folder / "key")),
        }  # fmt: skip
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


schema = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.slow
@pytest.mark.timeout(400)  # one route's examples take long to be made, longer beside other work
@schema.parametrize()
@settings(
    max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_a_real_server_does_what_the_document_says(case: schemathesis.Case, node: dict[str, Any]) -> None:
    case.call_and_validate(
        headers={"Authorization": f"Bearer {SECRET.bearer}"}, checks=list(CHECKS), timeout=60, **node
    )


def test_the_file_is_served(tmp_path: Path) -> None:
    async def ask() -> bytes:
        async with running(tmp_path) as one, one.client() as client:
            return await client.fetch(routes.OPENAPI)

    assert json.loads(asyncio.run(ask()))["openapi"] == "3.1.0"
