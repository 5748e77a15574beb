"""What a worker decides, as pure functions: how a failed frame ends, how an error is told, where a key belongs."""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Callable, Hashable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from upipe.runtime.messages import shorten

LONGEST_MESSAGE = 8 * 1024
LONGEST_TRACEBACK = 64 * 1024
"""Characters of an error that travel: the head and the tail of what is longer."""
_OWN = str(Path(__file__).parent)

Verdict = Literal["give_back", "bury", "fail"]


def verdict(on_error: str, deliveries: int, max_deliveries: int, unreadable: bool = False) -> Verdict:
    """What happens to a frame whose processing raised.

    Args:
        on_error: "retry", "dead_letter" or "fail", as the processor declares.
        deliveries: of this frame, this one included (1 at first).
        max_deliveries: after as many a frame is buried.
        unreadable: the frame itself cannot be read (CRC, unknown type, pickle refused): another try reads the same.
    """
    if on_error == "fail" and not unreadable:
        return "fail"
    if unreadable or on_error == "dead_letter" or deliveries >= max_deliveries:
        return "bury"
    return "give_back"


class Told(NamedTuple):
    """An exception as bounded text that any encoding can carry."""

    kind: str
    message: str
    traceback: str


def describe(error: BaseException) -> Told:
    """Tell an exception, whatever its class does when it is asked. The stack starts at the user's own code."""
    try:
        message = str(error)
    except BaseException as second:
        message = f"<its __str__ raised {type(second).__qualname__}>"
    try:
        told = "".join(traceback.format_exception(type(error), error, _users_part(error.__traceback__)))
    except BaseException as second:
        told = f"<no traceback: formatting it raised {type(second).__qualname__}>\n"
    return Told(type(error).__qualname__, shorten(message, LONGEST_MESSAGE), shorten(told, LONGEST_TRACEBACK))


def _users_part(stack: TracebackType | None) -> TracebackType | None:
    """The stack without uPipe's frames on top; all of it when there are no others."""
    inner = stack
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(_OWN):
        inner = inner.tb_next
    return inner or stack


def key_hash(key: Hashable) -> int:
    """A 32-bit hash of a partition key that is the same in every process (Python's own is salted). Never 0.

    Keys that are equal hash equal for int, float, str, bytes, bool, None and tuples of them.

    Raises:
        TypeError: the key is of another type.
    """
    return (zlib.crc32(_key_bytes(key)) or 1) & 0xFFFFFFFF


def _key_bytes(key: Any) -> bytes:
    if isinstance(key, float) and key.is_integer():
        key = int(key)
    if isinstance(key, int):  # bool too: True == 1
        return b"i" + str(int(key)).encode()
    if isinstance(key, str):
        return b"s" + key.encode("utf-8", "surrogatepass")
    if isinstance(key, bytes):
        return b"b" + key
    if isinstance(key, float):
        return b"f" + repr(key).encode()
    if key is None:
        return b"n"
    if isinstance(key, tuple):
        parts = [_key_bytes(part) for part in key]
        return b"t" + b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    if hasattr(key, "item"):
        return _key_bytes(key.item())  # a numpy scalar
    raise TypeError(
        f"a partition key is int, float, str, bytes, bool, None or a tuple of them, not {type(key).__name__}"
    )


KeyFunction = Callable[[Any], Hashable]


def key_function(key: KeyFunction | str | int) -> KeyFunction:
    """The function behind an edge's `key`: itself, or a field (mapping key, attribute) or index by name."""
    if callable(key):
        return key
    name = key

    def pick(value: Any) -> Hashable:
        if isinstance(name, str) and not isinstance(value, dict):
            found: Hashable = getattr(value, name)
        else:
            found = value[name]
        return found

    return pick
