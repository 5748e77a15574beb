"""JSON-like values as msgpack: only those that come back equal and of equal types."""

from __future__ import annotations

from typing import Any

import msgspec

from upipe._codecs.common import JSON, malformed, misfit
from upipe._codecs.pickles import encode_pickle
from upipe._types import Encoded, show

JSON_DEPTH = 64
"""Deepest nesting of lists and dicts sent as JSON; deeper values (and cycles) are pickled."""

_LEAVES = frozenset({str, int, float, bool, type(None), bytes})
_CONTAINERS = frozenset({dict, list})
_to_msgpack = msgspec.msgpack.Encoder().encode
_from_msgpack = msgspec.msgpack.Decoder().decode


def encode_json(value: Any, allow_pickle: bool) -> Encoded:
    if _is_plain(value, 0, set()):
        try:
            return _packed(_to_msgpack(value))
        except (ValueError, OverflowError):  # an int beyond 64 bits, a str with lone surrogates
            pass
    return encode_pickle(value, allow_pickle)


def _packed(data: bytes) -> Encoded:
    return Encoded(JSON, 0, 0, 0, 0, (data,), len(data))


def _is_plain(value: Any, depth: int, seen: set[int]) -> bool:
    """Exact types only, so that what comes back has the same ones. A container met twice (shared, or a cycle) is not
    plain: msgpack would send copies of it, in the worst case exponentially many. Types are compared as sets, at the
    speed of C; the msgpack encoder itself refuses what only the values tell."""
    if depth > JSON_DEPTH or id(value) in seen:
        return False
    seen.add(id(value))
    items = value
    if type(value) is dict:
        if any(kind is not str for kind in set(map(type, value))):
            return False
        items = value.values()
    inner = set(map(type, items)) - _LEAVES
    if not inner:
        return True
    if not inner <= _CONTAINERS:
        return False
    return all(_is_plain(item, depth + 1, seen) for item in items if type(item) in _CONTAINERS)


def force_json(value: Any, allow_pickle: bool) -> Encoded:
    trouble = _json_trouble(value, "value", 0, set())
    data = b""
    if trouble is None:
        try:
            data = _to_msgpack(value)
        except (ValueError, OverflowError) as error:
            trouble = str(error)
    if trouble is not None:
        holds = "dict with str keys, list, str, int of 64 bits, float, bool, None and bytes, of exactly these types"
        misfit(value, JSON, holds, f"{trouble}; convert it or emit it without a DType")
    return _packed(data)


def _json_trouble(value: Any, where: str, depth: int, clean: set[int]) -> str | None:
    """The first part that would not come back the same, with its place. Shared containers are fine here: they were
    asked for, and arrive as copies."""
    if type(value) in _LEAVES or id(value) in clean:
        return None
    if type(value) not in _CONTAINERS:
        return f"{where} is {show(value)}"
    if depth > JSON_DEPTH:
        return f"it is nested deeper than {JSON_DEPTH} levels, or contains itself"
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                return f"{where} has the key {show(key)}"
    for step, item in value.items() if type(value) is dict else enumerate(value):
        trouble = _json_trouble(item, f"{where}[{step!r:.40}]", depth + 1, clean)
        if trouble is not None:
            return trouble
    clean.add(id(value))
    return None


def read_json(data: memoryview) -> Any:
    try:
        return _from_msgpack(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        malformed(JSON, f"no msgpack ({error})")
