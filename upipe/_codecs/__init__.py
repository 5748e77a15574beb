"""encode() and decode(): one Python value <-> the fields of a frame. Public names live in `upipe.frame`.

The two doors; behind them, imports going up only: common <- scalars, pickles <- arrays, values, custom.
Reading never trusts a payload: every size is checked before it is used, and what is wrong is a FrameError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from upipe._codecs.arrays import encode_array, force_array, read_array
from upipe._codecs.common import ARRAY, BOOL, BYTES, F16, F32, F64, JSON, NONE, PICKLE, STR, Encoder, malformed
from upipe._codecs.custom import encode_custom, force_custom, read_custom
from upipe._codecs.pickles import encode_pickle, read_pickle
from upipe._codecs.scalars import (
    FLOATS,
    INTS,
    encode_bool,
    encode_bytes,
    encode_float,
    encode_int,
    encode_none,
    encode_numpy_float,
    encode_numpy_int,
    encode_str,
    encode_view,
    force_bool,
    force_bytes,
    force_float,
    force_int,
    force_none,
    force_str,
    read_bool,
    read_float,
    read_int,
    read_none,
    read_str,
)
from upipe._codecs.values import encode_json, force_json, read_json
from upipe._types import CUSTOM_BASE, CUSTOM_BY_CLASS, INLINE, INLINE_BYTES, DType, Encoded
from upipe.errors import FrameError


def _numpy_scalars() -> dict[type[Any], Encoder]:
    by_class: dict[type[Any], Encoder] = {np.bool_: encode_bool, np.str_: encode_str, np.bytes_: force_bytes}
    for char in "bhilqBHILQefd":
        dtype = np.dtype(char)
        if dtype.kind == "f":
            by_class[dtype.type] = partial(encode_numpy_float, {2: F16, 4: F32, 8: F64}[dtype.itemsize])
        else:
            first = DType.U8 if dtype.kind == "u" else DType.I8
            by_class[dtype.type] = partial(encode_numpy_int, int(first) + dtype.itemsize.bit_length() - 1)
    return by_class


_AUTOMATIC: dict[type[Any], Encoder] = {
    type(None): encode_none,
    bool: encode_bool,
    int: encode_int,
    float: encode_float,
    str: encode_str,
    bytes: encode_bytes,
    bytearray: encode_view,
    memoryview: encode_view,
    np.ndarray: encode_array,
    dict: encode_json,
    list: encode_json,
    **_numpy_scalars(),
}

_FORCED: dict[int, Encoder] = {
    NONE: force_none,
    BOOL: force_bool,
    **{code: partial(force_int, code) for code in INTS},
    **{code: partial(force_float, code) for code in FLOATS},
    STR: force_str,
    BYTES: force_bytes,
    ARRAY: force_array,
    JSON: force_json,
    PICKLE: encode_pickle,
}

_READERS: Mapping[int, Callable[[memoryview], Any]] = {
    NONE: read_none,
    BOOL: read_bool,
    **{code: partial(read_int, code) for code in INTS},
    **{code: partial(read_float, code) for code in FLOATS},
    STR: read_str,
    BYTES: bytes,
    JSON: read_json,
}
"""Readers that need the payload alone; arrays, pickles and custom types need more."""


def encode(value: Any, dtype: int | None = None, *, allow_pickle: bool = True) -> Encoded:
    """One value as the fields of a frame.

    Without ``dtype`` the type is chosen so that the value comes back equal and of the same type:

    - None, bool, float, str, bytes: NONE, BOOL, F64, STR, BYTES; int: I64, else U64, else PICKLE.
    - bytearray and memoryview: BYTES; they come back as **bytes**.
    - numpy scalars: the DType of their width; they come back as **Python scalars** (np.str_ as str, np.bytes_ as
      bytes). Complex, longdouble, datetime64 and void scalars: PICKLE.
    - numpy.ndarray: ARRAY, with any shape, byte order and item type without Python objects. It comes back in C order,
      of the same dtype (without its metadata).
    - dict and list made only of dict with str keys, list, str, int of 64 bits, float, bool, None and bytes, at most
      JSON_DEPTH deep, no container twice: JSON.
    - registered classes: their custom type.
    - everything else, subclasses of all these included (an IntEnum, an OrderedDict, a masked array), and str with lone
      surrogates: PICKLE.

    Args:
        value: what to send.
        dtype: a DType or the code of a registered type to force. Integers must be real integers (no bool) in range;
            F16 and F32 round floats to the nearest; integers become floats only when that is exact. Subclasses of
            int, float, str, bytes and ndarray are taken, and come back as the plain type.
        allow_pickle: False refuses values that only pickle can send.

    Returns:
        Encoded; its parts may be views of the value's memory.

    Raises:
        EncodeError: the value does not fit ``dtype``, or cannot be pickled.
        PickleRefused: only a pickle would do, and ``allow_pickle`` is False.
    """
    if dtype is None:
        automatic = _AUTOMATIC.get(type(value))
        if automatic is not None:
            return automatic(value, allow_pickle)
        custom = CUSTOM_BY_CLASS.get(type(value))
        return encode_pickle(value, allow_pickle) if custom is None else encode_custom(custom, value)
    forced = _FORCED.get(dtype)
    return force_custom(dtype, value) if forced is None else forced(value, allow_pickle)


def decode(
    dtype: int,
    item: int,
    rank: int,
    flags: int,
    inline: int,
    size: int,
    payload: memoryview,
    *,
    allow_pickle: bool = True,
) -> Any:
    """The value of a frame; the inverse of `encode`.

    Args:
        dtype, item, rank, flags, inline, size: the header's fields.
        payload: 1-d bytes, exactly ``size`` of them (with flag INLINE it is ignored). It belongs to the value from
            now on: an array, and the large buffers of a pickle, are views of it, writable if and only if it is.
        allow_pickle: False refuses pickled frames unopened.

    Raises:
        FrameError: the fields and the payload do not make a value; the message says what is wrong.
        PickleRefused: the frame is a pickle and ``allow_pickle`` is False.
    """
    if flags & INLINE:
        if size > INLINE_BYTES or dtype == ARRAY:
            malformed(dtype, f"{size} bytes cannot be inline")
        data = memoryview(inline.to_bytes(8, "little")[:size])
    elif payload.nbytes != size or payload.ndim != 1 or payload.itemsize != 1:
        malformed(dtype, f"{payload.nbytes} bytes where the header says {size}")
    else:
        data = payload
    reader = _READERS.get(dtype)
    if reader is not None:
        return reader(data)
    if dtype == ARRAY:
        return read_array(item, rank, flags, inline, data)
    if dtype == PICKLE:
        return read_pickle(data, allow_pickle)
    if dtype < CUSTOM_BASE:
        raise FrameError(
            f"unknown dtype {dtype}: the frame was written by another version of uPipe, or its header was changed"
        )
    return read_custom(dtype, data)
