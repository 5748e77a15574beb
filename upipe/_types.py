"""What the codec and the frame share: DType codes, the header's form, custom types. Public names live in `upipe.frame`.

The numbers follow ARCHITECTURE.md, section 2; `memq/layout.py` holds the table and checks itself against these.
"""

from __future__ import annotations

import reprlib
import struct
import zlib
from collections.abc import Callable
from enum import EnumType, IntEnum
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

import numpy as np

Buffer: TypeAlias = bytes | bytearray | memoryview
Part: TypeAlias = bytes | memoryview

MAGIC = 0x5055
VERSION = 2
HEADER_BYTES = 64
HEADER = struct.Struct("<IHHBBHBBHIIQQQQQ")
"""The fields of `Header`, in its order: 64 bytes, little endian, without gaps."""
ALIGN = 64
"""Array data and out-of-band buffers start at a multiple of this many bytes in the payload."""

INLINE = 1
REPLY = 2
ERROR = 4
SHAPE = 8
INLINE_BYTES = 8
"""Largest scalar, str or bytes payload, in bytes, that lives in the header."""

ITEMS = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
"""Array item types by item code, all little endian."""
ITEM_DESCRIBED = 255
"""Item code of an array whose item type is described in msgpack at the start of the payload."""
MAX_RANK = 64
SHAPE_RANK = 8
"""Up to this rank, dims that each fit in ``63 // rank`` bits are packed into the header's `inline` (flag SHAPE)."""

CUSTOM_BASE = 1024
CUSTOM_CODES = 64512


class Codes(EnumType):
    """Type of DType, which the native module makes look members up as any class does (memq/_codes.pxi)."""


class DType(IntEnum, metaclass=Codes):
    """What a frame's payload is. Codes are part of the frame's layout and never change.

    ``emit(value)`` picks one, ``emit(value, DType.U32)`` forces one; a value that does not fit is an EncodeError.
    Custom types have codes of 1024 and above, given by `register_type`.
    """

    NONE = 1
    """None; no payload."""
    BOOL = 2
    """bool, 1 byte."""
    I8 = 3
    I16 = 4
    I32 = 5
    I64 = 6
    U8 = 7
    U16 = 8
    U32 = 9
    U64 = 10
    F16 = 11
    """Floats forced to F16 and F32 are rounded to the nearest; one that would become infinite is an EncodeError."""
    F32 = 12
    F64 = 13
    STR = 16
    """str, UTF-8."""
    BYTES = 17
    """Raw bytes; bytearray and memoryview arrive as bytes."""
    ARRAY = 18
    """numpy.ndarray of any shape and any item type without Python objects, in C order."""
    JSON = 19
    """dict, list and leaves that come back from msgpack equal and of the same types."""
    PICKLE = 20
    """Anything else: pickle protocol 5, large buffers out of band."""


for _member in DType:  # as Python 3.12 has them: 3.11 looks each up through a property, at half the price of a frame
    type.__setattr__(DType, _member.name, _member)


class Header(NamedTuple):
    """The header's fields as HEADER reads and writes them; ARCHITECTURE.md, section 2, has the table."""

    crc: int
    deliveries: int
    magic: int
    version: int
    flags: int
    dtype: int
    item: int
    rank: int
    producer: int
    epoch: int
    key: int
    size: int
    position: int
    execution: int
    timestamp: int
    inline: int


class Encoded(NamedTuple):
    """One value as the fields of a frame. ``parts`` make up the payload, in order; their lengths add up to ``size``
    bytes. With flag INLINE there are none: the first ``size`` (at most 8) little-endian bytes of ``inline`` are the
    payload. Parts may be views of the value's own memory, so copy them before the value changes."""

    dtype: int
    item: int
    rank: int
    flags: int
    inline: int
    parts: tuple[Part, ...]
    size: int


class CustomType(NamedTuple):
    """One registered type."""

    code: int
    name: str
    cls: type[Any]
    encode: Callable[[Any], Any]
    decode: Callable[[memoryview], Any]


# Both tables hold the same records; only register_type writes them.
CUSTOM_BY_CODE: dict[int, CustomType] = {}
CUSTOM_BY_CLASS: dict[type[Any], CustomType] = {}

BUILTIN_CLASSES: frozenset[type[Any]] = frozenset(
    {type(None), bool, int, float, str, bytes, bytearray, memoryview, dict, list, np.ndarray}
)
"""Classes that have a DType of their own, so that no custom type can take them."""

T = TypeVar("T")


def custom_code(name: str) -> int:
    """The DType code of a custom type, from its name alone, so that every process finds the same one."""
    return CUSTOM_BASE + zlib.crc32(name.encode()) % CUSTOM_CODES


def dtype_name(code: int) -> str:
    """A DType code in words, for messages: ``DType.U8``, ``custom type 'points.Point' (code 4711)``, ``dtype 99``."""
    if code in CUSTOM_BY_CODE:
        return f"custom type {CUSTOM_BY_CODE[code].name!r} (code {code})"
    try:
        return f"DType.{DType(code).name}"
    except ValueError:
        return f"dtype {code}"


def class_name(cls: type[Any]) -> str:
    """``module.qualname``, or only the name of a builtin."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def show(value: Any) -> str:
    """A value and its type for a message: short, and never raising, whatever the value's repr does."""
    try:
        huge = isinstance(value, int) and value.bit_length() > 128  # Python refuses to print the largest
        text = f"an integer of {value.bit_length()} bits" if huge else reprlib.repr(value)
    except Exception:
        text = "a value"
    return f"{text} ({class_name(type(value))})"


@overload
def register_type(
    cls: type[T],
    *,
    name: str | None = None,
    encode: Callable[[T], Any] | None = None,
    decode: Callable[[memoryview], T] | None = None,
) -> int: ...


@overload
def register_type(
    cls: None = None,
    *,
    name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[memoryview], Any] | None = None,
) -> Callable[[type[T]], type[T]]: ...


def register_type(
    cls: type[T] | None = None,
    *,
    name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[memoryview], Any] | None = None,
) -> int | Callable[[type[T]], type[T]]:
    """Give a class a frame type of its own: no pickle, and readable where pickle is refused.

    Call ``register_type(Point)``, which returns the code, or decorate with ``@register_type()`` or
    ``@register_type(name="point")``, which returns the class. (The parentheses matter: a bare ``@register_type``
    is the first form and would bind the class's name to an int.)

    Only instances of exactly this class are encoded so; a subclass needs a registration of its own. Every process
    that reads such frames must register the type too; uPipe passes `registered_types` on to workers.

    Args:
        cls: the class.
        name: what the code is computed from, equal in all processes. Default: ``module.qualname``.
        encode: value -> bytes-like of any size. Default: ``cls.encode``.
        decode: memoryview of the payload (1-d bytes, valid for good) -> value. Default: ``cls.decode``, a
            classmethod or staticmethod.

    Returns:
        The DType code, 1024..65535. Registering the same class under the same name again replaces its codec.

    Raises:
        ValueError: the name belongs to another class, the class has another name, or two names share a code.
        TypeError: ``cls`` is no class, or has no codec.
    """
    if cls is None:
        return lambda decorated: _register_and_return(decorated, name, encode, decode)
    return _register(cls, name, encode, decode)


def _register_and_return(
    cls: type[T], name: str | None, encode: Callable[[Any], Any] | None, decode: Callable[[memoryview], Any] | None
) -> type[T]:
    _register(cls, name, encode, decode)
    return cls


def _register(
    cls: type[Any], name: str | None, encode: Callable[[Any], Any] | None, decode: Callable[[memoryview], Any] | None
) -> int:
    if not isinstance(cls, type):
        raise TypeError(f"register_type needs a class, not {show(cls)}")
    full = class_name(cls)
    if cls in BUILTIN_CLASSES or issubclass(cls, np.generic):
        raise ValueError(f"{full} has a DType of its own and cannot be registered; wrap it in a class of yours")
    encoder = encode if encode is not None else getattr(cls, "encode", None)
    decoder = decode if decode is not None else getattr(cls, "decode", None)
    if not callable(encoder) or not callable(decoder):
        missing = "encode(self) -> bytes-like" if not callable(encoder) else "a classmethod decode(buffer) -> object"
        raise TypeError(f"{full} has no {missing}: define it, or pass encode= and decode= to register_type")
    name = full if name is None else name
    code = custom_code(name)
    _refuse_collision(cls, full, name, code)
    CUSTOM_BY_CODE[code] = CUSTOM_BY_CLASS[cls] = CustomType(code, name, cls, encoder, decoder)
    return code


def _refuse_collision(cls: type[Any], full: str, name: str, code: int) -> None:
    taken = CUSTOM_BY_CODE.get(code)
    if taken is not None and taken.name != name:
        raise ValueError(
            f"custom types {name!r} and {taken.name!r} share the code {code}; register one of them under another name="
        )
    if taken is not None and taken.cls is not cls:
        raise ValueError(
            f"custom type {name!r} is already registered for {class_name(taken.cls)} at 0x{id(taken.cls):x}, "
            f"so {full} at 0x{id(cls):x} needs another name="
        )
    known = CUSTOM_BY_CLASS.get(cls)
    if known is not None and known.name != name:
        raise ValueError(f"{full} is already registered as {known.name!r}, so it cannot also be {name!r}")


def registered_types() -> tuple[tuple[str, type[Any], Callable[[Any], Any], Callable[[memoryview], Any]], ...]:
    """Every registered type as (name, cls, encode, decode), in order of registration, for
    ``register_type(cls, name=name, encode=encode, decode=decode)`` in a worker that does not inherit this process."""
    return tuple((custom.name, custom.cls, custom.encode, custom.decode) for custom in CUSTOM_BY_CODE.values())
