"""The route table as an OpenAPI 3.1 document: pure, and complete because nothing but the table is asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from upipe.cluster.routes import PARAMETERS, ROUTES, Bytes, Route
from upipe.cluster.wire import Problem

_REFUSALS = {
    "400": "It cannot be understood.",
    "401": "The token is missing or wrong.",
    "403": "It comes from a foreign page, or needs a certificate.",
    "404": "There is no such thing here.",
    "408": "It came too slowly.",
    "409": "It does not fit the state of things here: a lower epoch, another cluster or version.",
    "413": "It is too large.",
    "415": "It is of another type, or compressed.",
    "500": "This node failed; its log says why.",
    "501": "This node does not do that.",
    "503": "This node cannot do that now.",
}


def document(version: str, routes: Iterable[Route[Any, Any]] = ROUTES) -> dict[str, Any]:
    """Build it.

    Args:
        version: of uPipe.
        routes: the table.
    """
    routes = tuple(routes)
    structs = {one for route in routes for one in (route.request, route.answer) if _is_struct(one)} | {Problem}
    ordered = sorted(structs, key=lambda one: str(one.__name__))
    schemas, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "uPipe node",
            "version": version,
            "description": "Closed by default: the cluster's bearer token on every path and method, over TLS.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": components,
            "responses": {
                status: {"description": told, "content": _json(schema_of[Problem])}
                for status, told in _REFUSALS.items()
            },
        },
    }


def markdown(routes: Iterable[Route[Any, Any]] = ROUTES) -> str:
    """The table for people."""
    rows = ["| method | path | what | open to | bytes |", "| --- | --- | --- | --- | --- |"]
    for one in routes:
        who = "nodes" if one.node_only else "the token, and to upgrade a certificate" if one.upgrade else "the token"
        most = "" if one.request is type(None) else f"{one.most:,}"
        rows.append(f"| {one.method} | {one.path} | {one.doc} | {who} | {most} |")
    return "\n".join(rows)


def _is_struct(one: object) -> bool:
    return isinstance(one, type) and issubclass(one, msgspec.Struct)


def _operation(route: Route[Any, Any], schema_of: dict[Any, Any]) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "Done."}
    if route.method != "HEAD":
        plain: dict[str, Any] = {route.media.partition(";")[0]: {}}
        good["content"] = plain if route.answer is Bytes else _json(schema_of[route.answer])
    made: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.doc,
        "responses": {
            str(route.status): good,
            **{status: {"$ref": f"#/components/responses/{status}"} for status in _REFUSALS},
        },
        "x-changes-state": route.changes,
        "x-node-only": route.node_only,
        "x-max-bytes": route.most,
    }
    if route.upgrade:
        made["responses"]["101"] = {"description": f"From here on {route.upgrade}."}
    if route.names:
        made["parameters"] = [
            {
                "name": name, "in": "path", "required": True,
                "schema": {"type": "string", "pattern": f"^{PARAMETERS[name]}$"},
            }
            for name in route.names
        ]  # fmt: skip
    if route.request is Bytes:
        made["requestBody"] = {"required": True, "content": {"application/octet-stream": {}}}
    elif route.request is not type(None):
        made["requestBody"] = {"required": True, "content": _json(schema_of[route.request])}
    return made


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
