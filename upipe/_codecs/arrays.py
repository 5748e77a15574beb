"""numpy arrays: their shape and item type in the header where they fit, else in a preamble."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import msgspec
import numpy as np

from upipe._codecs.common import ARRAY, AnyArray, AnyDType, malformed, misfit
from upipe._codecs.pickles import encode_pickle
from upipe._types import ALIGN, ITEM_DESCRIBED, ITEMS, MAX_RANK, SHAPE, SHAPE_RANK, Encoded, Part

_ITEM_DTYPES: tuple[AnyDType, ...] = tuple(np.dtype(f"<{item}") for item in ITEMS)
_ITEM_OF: dict[AnyDType, int] = {dtype: code for code, dtype in enumerate(_ITEM_DTYPES)}
_PLAIN_DTYPE = re.compile(r"[<>|]([biufcSUV]\d{1,10}|[mM]8(\[\d{0,10}[a-zA-Zμ]{1,7}\])?)")
_DESCRIBED_DEPTH = 32


def encode_array(value: AnyArray, allow_pickle: bool) -> Encoded:
    dtype = value.dtype
    item = _ITEM_OF.get(dtype)
    described = b""
    if item is None or dtype.names is not None:
        found = _described(dtype)
        if found is None or value.ndim > MAX_RANK:
            return encode_pickle(value, allow_pickle)
        item, described = ITEM_DESCRIBED, found
    data: tuple[Part, ...] = ()
    if value.nbytes:
        dense = value if value.flags.c_contiguous else np.ascontiguousarray(value)
        data = (dense.reshape(-1).view(np.uint8).data,)
    rank, size = value.ndim, value.nbytes
    bits = _dim_bits(rank)
    if rank <= SHAPE_RANK and not described and all(dim < 1 << bits for dim in value.shape):
        packed = sum(dim << bits * axis for axis, dim in enumerate(value.shape))
        return Encoded(ARRAY, item, rank, SHAPE, packed, data, size)
    preamble = struct.pack(f"<{rank}Q", *value.shape)
    if described:
        preamble += struct.pack("<I", len(described)) + described
    preamble += bytes(-len(preamble) % ALIGN)
    return Encoded(ARRAY, item, rank, 0, 0, (preamble, *data), len(preamble) + size)


def force_array(value: object, allow_pickle: bool) -> Encoded:
    holds = "numpy arrays without Python objects"
    if not isinstance(value, np.ndarray):
        misfit(value, ARRAY, holds, "convert it with numpy.asarray() or emit it without a DType")
    if type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray):  # numpy.ma loads slowly
        misfit(value, ARRAY, holds, "its mask would be lost: use .filled(), or emit it without a DType")
    encoded = None if value.dtype.hasobject else encode_array(np.asarray(value), True)
    if encoded is None or encoded.dtype != ARRAY:
        remedy = f"its dtype {value.dtype} has no portable description: convert it with .astype() or use DType.PICKLE"
        misfit(value, ARRAY, holds, remedy)
    return encoded


def _described(dtype: AnyDType) -> bytes | None:
    """The item type in msgpack, or None when it would not come back the same (objects, subclasses, user dtypes).

    A plain type is numpy's string (">f8", "<M8[ns]"); a sub-array is [type, [dims]]; a structure is
    {"itemsize", "aligned", "fields": [[name, type, offset, title or nil], ...]}, since `dtype.descr` loses overlaps,
    order and alignment. Nothing is cached: a dtype's field names can be assigned to.
    """
    if dtype.hasobject:
        return None
    try:
        description = _describe(dtype)
        return msgspec.msgpack.encode(description) if _dtype_of(description, 0) == dtype else None
    except (ValueError, TypeError):
        return None


def _describe(dtype: AnyDType) -> object:
    if dtype.subdtype is not None:
        return [_describe(dtype.subdtype[0]), list(dtype.subdtype[1])]
    if dtype.names is None:
        if np.dtype(dtype.str).type is not dtype.type:
            raise TypeError(f"{dtype} is no plain numpy type")
        return dtype.str
    if dtype.type is not np.void or dtype.fields is None:
        raise TypeError(f"{dtype} is no plain structure")
    fields = []
    for name in dtype.names:
        kind, offset, *title = dtype.fields[name]
        if title and type(title[0]) is not str:
            raise TypeError(f"the title of field {name!r} is no str")
        fields.append([name, _describe(kind), offset, *(title or [None])])
    return {"itemsize": dtype.itemsize, "aligned": dtype.isalignedstruct, "fields": fields}


def _dtype_of(described: Any, depth: int) -> AnyDType:
    """The item type of a description; ValueError or TypeError when it is none. Never yields Python objects."""
    if depth > _DESCRIBED_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(described, str):
        if not _PLAIN_DTYPE.fullmatch(described):
            raise ValueError(f"{described[:40]!r} is no plain item type")
        return np.dtype(described)
    if isinstance(described, list):
        base, dims = described
        if not isinstance(dims, list) or not all(type(dim) is int and 0 <= dim < 2**31 for dim in dims):
            raise ValueError("a sub-array without proper dims")
        return np.dtype((_dtype_of(base, depth + 1), tuple(dims)))
    if not isinstance(described, dict):
        raise TypeError("neither a type, nor a sub-array, nor a structure")
    names, formats, offsets, titles = [], [], [], []
    for name, kind, offset, title in described["fields"]:
        names.append(name)
        formats.append(_dtype_of(kind, depth + 1))
        offsets.append(offset)
        titles.append(title)
    form: dict[str, Any] = {"names": names, "formats": formats, "offsets": offsets, "itemsize": described["itemsize"]}
    if any(title is not None for title in titles):
        form["titles"] = titles
    return np.dtype(form, align=described["aligned"] is True)  # type: ignore[call-overload,no-any-return]


def _dim_bits(rank: int) -> int:
    """Of each packed dim."""
    return 63 // max(rank, 1)


def read_array(item: int, rank: int, flags: int, inline: int, data: memoryview) -> AnyArray:
    if rank > MAX_RANK:
        malformed(ARRAY, f"rank {rank}, and the highest is {MAX_RANK}")
    if item >= len(ITEMS) and item != ITEM_DESCRIBED:
        malformed(ARRAY, f"unknown item code {item}")
    if flags & SHAPE:
        bits = _dim_bits(rank)
        if rank > SHAPE_RANK or item == ITEM_DESCRIBED or inline >> bits * rank:
            malformed(ARRAY, f"rank {rank} and item code {item} do not go with the packed dims 0x{inline:x}")
        dims = tuple(inline >> bits * axis & (1 << bits) - 1 for axis in range(rank))
        dtype, start = _ITEM_DTYPES[item], 0
    else:
        dims, dtype, start = _read_preamble(item, rank, data)
    if math.prod(dims) * dtype.itemsize != len(data) - start:
        malformed(ARRAY, f"{len(data) - start} bytes for shape {_short(dims)} of {dtype}")
    try:
        array = np.ndarray(dims, dtype, buffer=data[start:])
    except (ValueError, TypeError, OverflowError) as error:
        malformed(ARRAY, f"shape {_short(dims)} of {dtype}: {error}")
    return array


def _read_preamble(item: int, rank: int, data: memoryview) -> tuple[tuple[int, ...], AnyDType, int]:
    """(dims, item type, offset of the data in the payload)."""
    end = 8 * rank
    if len(data) < end:
        malformed(ARRAY, f"{len(data)} bytes cannot hold {rank} dims")
    dims = struct.unpack_from(f"<{rank}Q", data)
    if item != ITEM_DESCRIBED:
        dtype = _ITEM_DTYPES[item]
    else:
        if len(data) < end + 4:
            malformed(ARRAY, "it ends before the description of its item type")
        start, end = end + 4, end + 4 + int.from_bytes(data[end : end + 4], "little")
        if len(data) < end:
            malformed(ARRAY, "it ends within the description of its item type")
        try:
            dtype = _dtype_of(msgspec.msgpack.decode(data[start:end]), 0)
        except (msgspec.MsgspecError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            malformed(ARRAY, f"the description of its item type does not read ({error})")
    end += -end % ALIGN
    if len(data) < end:
        malformed(ARRAY, f"{len(data)} bytes, and its preamble alone has {end}")
    return dims, dtype, end


def _short(dims: tuple[int, ...]) -> str:
    return str(dims) if len(dims) <= 6 else f"({', '.join(map(str, dims[:6]))}, ...)"
