"""None, bool, integers, floats, text and bytes."""

from __future__ import annotations

import math
import struct
import sys
from typing import Any

import numpy as np

from upipe._codecs.common import BOOL, BYTES, F16, F32, F64, I64, NONE, STR, U64, inlined, malformed, misfit
from upipe._codecs.pickles import encode_pickle
from upipe._types import INLINE, INLINE_BYTES, DType, Encoded, Part, dtype_name

MASK64 = 2**64 - 1


# code: (width in bytes, lowest, highest); unsigned before signed, so that the first that fits is the remedy
INTS: dict[int, tuple[int, int, int]] = {
    **{int(DType.U8) + i: (1 << i, 0, (1 << (8 << i)) - 1) for i in range(4)},
    **{int(DType.I8) + i: (1 << i, -(1 << ((8 << i) - 1)), (1 << ((8 << i) - 1)) - 1) for i in range(4)},
}
FLOATS: dict[int, tuple[struct.Struct, float]] = {
    F16: (struct.Struct("<e"), 65504.0),
    F32: (struct.Struct("<f"), float(np.finfo(np.float32).max)),
    F64: (struct.Struct("<d"), sys.float_info.max),
}


def encode_none(value: None, allow_pickle: bool) -> Encoded:
    return Encoded(NONE, 0, 0, INLINE, 0, (), 0)


def encode_bool(value: Any, allow_pickle: bool) -> Encoded:
    return Encoded(BOOL, 0, 0, INLINE, 1 if value else 0, (), 1)


def encode_int(value: int, allow_pickle: bool) -> Encoded:
    if -(2**63) <= value < 2**63:
        return Encoded(I64, 0, 0, INLINE, value & MASK64, (), 8)
    if 0 <= value < 2**64:
        return Encoded(U64, 0, 0, INLINE, value, (), 8)
    return encode_pickle(value, allow_pickle)


def encode_float(value: float, allow_pickle: bool) -> Encoded:
    return inlined(F64, struct.pack("<d", value))


def encode_numpy_int(code: int, value: Any, allow_pickle: bool) -> Encoded:
    width = INTS[code][0]
    return Encoded(code, 0, 0, INLINE, int(value) & ((1 << 8 * width) - 1), (), width)


def encode_numpy_float(code: int, value: Any, allow_pickle: bool) -> Encoded:
    return inlined(code, FLOATS[code][0].pack(value))


def force_none(value: object, allow_pickle: bool) -> Encoded:
    if value is not None:
        misfit(value, NONE, "only None", "emit it without a DType")
    return encode_none(None, allow_pickle)


def force_bool(value: object, allow_pickle: bool) -> Encoded:
    if not isinstance(value, (bool, np.bool_)):
        misfit(value, BOOL, "only True and False", "convert it with bool() or emit it without a DType")
    return encode_bool(value, allow_pickle)


def is_int(value: object) -> bool:
    # numpy files timedelta64 under its integers
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def force_int(code: int, value: Any, allow_pickle: bool) -> Encoded:
    width, low, high = INTS[code]
    if not is_int(value):
        remedy = "convert it with int() or emit it without a DType"
        misfit(value, code, f"integers from {low} to {high}", remedy)
    number = int(value)
    if not low <= number <= high:
        fits = next((other for other, (_, lo, hi) in INTS.items() if lo <= number <= hi), None)
        remedy = "no integer DType holds it, so emit it without a DType" if fits is None else f"use {dtype_name(fits)}"
        misfit(value, code, f"integers from {low} to {high}", remedy)
    return Encoded(code, 0, 0, INLINE, number & ((1 << 8 * width) - 1), (), width)


def force_float(code: int, value: Any, allow_pickle: bool) -> Encoded:
    form, highest = FLOATS[code]
    holds = f"floats from -{highest:g} to {highest:g}, inf, nan, and integers that it represents exactly"
    exact = is_int(value)
    if not exact and not isinstance(value, (float, np.floating)):
        misfit(value, code, holds, "convert it with float() or emit it without a DType")
    try:
        number = float(value)
        data = form.pack(number)
    except OverflowError:
        remedy = "emit it without a DType" if exact or code == F64 else "use DType.F64 or emit it without a DType"
        misfit(value, code, holds, remedy)
    if exact and form.unpack(data)[0] != int(value):
        misfit(value, code, holds, "round it yourself with float(), or emit it without a DType")
    if math.isinf(number) and not exact and not np.isinf(value):  # longdouble reaches further than F64
        misfit(value, code, holds, "emit it without a DType")
    return inlined(code, data)


def read_none(data: memoryview) -> None:
    if len(data):
        malformed(NONE, f"{len(data)} bytes where none belong")


def read_bool(data: memoryview) -> bool:
    if len(data) != 1 or data[0] > 1:
        malformed(BOOL, f"{bytes(data[:8])!r} is neither 0 nor 1 in one byte")
    return data[0] == 1


def read_int(code: int, data: memoryview) -> int:
    width, low, _ = INTS[code]
    if len(data) != width:
        malformed(code, f"{len(data)} bytes instead of {width}")
    return int.from_bytes(data, "little", signed=low < 0)


def read_float(code: int, data: memoryview) -> float:
    form = FLOATS[code][0]
    if len(data) != form.size:
        malformed(code, f"{len(data)} bytes instead of {form.size}")
    number: float = form.unpack(data)[0]
    return number


def _raw(code: int, data: Part) -> Encoded:
    size = len(data)
    return inlined(code, bytes(data)) if size <= INLINE_BYTES else Encoded(code, 0, 0, 0, 0, (data,), size)


def encode_str(value: str, allow_pickle: bool) -> Encoded:
    try:
        data = value.encode()
    except UnicodeEncodeError:  # lone surrogates, as in undecodable file names: only pickle keeps them
        return encode_pickle(value, allow_pickle)
    return _raw(STR, data)


def encode_bytes(value: bytes, allow_pickle: bool) -> Encoded:
    return _raw(BYTES, value)


def encode_view(value: Any, allow_pickle: bool) -> Encoded:
    return _raw(BYTES, flat(memoryview(value)))


def flat(view: memoryview) -> Part:
    """Any buffer as 1-d bytes; copied only when its memory has gaps or another order."""
    if view.nbytes == 0:
        return b""
    return view.cast("B") if view.c_contiguous else view.tobytes()


def force_str(value: object, allow_pickle: bool) -> Encoded:
    if not isinstance(value, str):
        misfit(value, STR, "str", "convert it (bytes have .decode()) or emit it without a DType")
    try:
        return _raw(STR, value.encode())
    except UnicodeEncodeError:
        misfit(value, STR, "text that UTF-8 can express (no lone surrogates)", "emit it without a DType")


def force_bytes(value: object, allow_pickle: bool) -> Encoded:
    if isinstance(value, bytes):
        return _raw(BYTES, bytes(value))
    if not isinstance(value, (bytearray, memoryview)):
        remedy = "convert it (str has .encode(), arrays have .tobytes()) or emit it without a DType"
        misfit(value, BYTES, "bytes, bytearray and memoryview", remedy)
    return encode_view(value, allow_pickle)


def read_str(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        malformed(STR, f"no UTF-8 ({error})")
