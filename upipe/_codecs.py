"""encode() and decode(): one Python value <-> the fields of a frame. Public names live in `upipe.frame`.

Order: integers and floats, text and bytes, arrays, JSON, pickle, custom types, then the two doors at the end.
Reading never trusts a payload: every size is checked before it is used, and what is wrong is a FrameError.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from typing import Any, NoReturn, TypeAlias
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from upipe._types import (
    ALIGN,
    CUSTOM_BASE,
    CUSTOM_BY_CLASS,
    CUSTOM_BY_CODE,
    DIM_BITS,
    INLINE,
    INLINE_BYTES,
    ITEM_DESCRIBED,
    ITEMS,
    MAX_RANK,
    SHAPE,
    SHAPE_RANK,
    CustomType,
    DType,
    Encoded,
    Part,
    class_name,
    dtype_name,
    show,
)
from upipe.errors import EncodeError, FrameError, PickleRefused

AnyDType: TypeAlias = "np.dtype[Any]"
AnyArray: TypeAlias = "np.ndarray[Any, Any]"
Encoder: TypeAlias = Callable[[Any, bool], Encoded]
_Pickler: TypeAlias = Callable[[object, Callable[[pickle.PickleBuffer], bool] | None], bytes]

JSON_DEPTH = 64
"""Deepest nesting of lists and dicts sent as JSON; deeper values (and cycles) are pickled."""
OUT_OF_BAND_BYTES = 1024
"""Pickle buffers of at least this many bytes travel out of band. Lower: more zero-copy, and 64 + 8 bytes for each."""
MAX_U32 = 2**32 - 1

# Plain ints: reading a member of an IntEnum costs more than encoding a scalar.
_NONE, _BOOL, _I64, _U64 = int(DType.NONE), int(DType.BOOL), int(DType.I64), int(DType.U64)
_F16, _F32, _F64 = int(DType.F16), int(DType.F32), int(DType.F64)
_STR, _BYTES, _ARRAY, _JSON, _PICKLE = (
    int(DType.STR), int(DType.BYTES), int(DType.ARRAY), int(DType.JSON), int(DType.PICKLE)
)  # fmt: skip
_MASK64 = 2**64 - 1


def _misfit(value: object, code: int, holds: str, remedy: str) -> NoReturn:
    raise EncodeError(f"{show(value)} does not fit {dtype_name(code)}, which holds {holds}; {remedy}")


def _malformed(code: int, what: str) -> NoReturn:
    raise FrameError(
        f"malformed {dtype_name(code)} payload: {what}; it was changed after it was written, "
        "or was not written by this version of uPipe"
    )


def _inline(code: int, data: bytes) -> Encoded:
    return Encoded(code, 0, 0, INLINE, int.from_bytes(data, "little"), (), len(data))


# --- integers and floats ---------------------------------------------------------------------------------------------

# code: (width in bytes, lowest, highest); unsigned before signed, so that the first that fits is the remedy
_INTS: dict[int, tuple[int, int, int]] = {
    **{int(DType.U8) + i: (1 << i, 0, (1 << (8 << i)) - 1) for i in range(4)},
    **{int(DType.I8) + i: (1 << i, -(1 << ((8 << i) - 1)), (1 << ((8 << i) - 1)) - 1) for i in range(4)},
}
_FLOATS: dict[int, tuple[struct.Struct, float]] = {
    _F16: (struct.Struct("<e"), 65504.0),
    _F32: (struct.Struct("<f"), float(np.finfo(np.float32).max)),
    _F64: (struct.Struct("<d"), sys.float_info.max),
}


def _none(value: None, allow_pickle: bool) -> Encoded:
    return Encoded(_NONE, 0, 0, INLINE, 0, (), 0)


def _bool(value: Any, allow_pickle: bool) -> Encoded:
    return Encoded(_BOOL, 0, 0, INLINE, 1 if value else 0, (), 1)


def _int(value: int, allow_pickle: bool) -> Encoded:
    if -(2**63) <= value < 2**63:
        return Encoded(_I64, 0, 0, INLINE, value & _MASK64, (), 8)
    if 0 <= value < 2**64:
        return Encoded(_U64, 0, 0, INLINE, value, (), 8)
    return _pickle(value, allow_pickle)


def _float(value: float, allow_pickle: bool) -> Encoded:
    return _inline(_F64, struct.pack("<d", value))


def _numpy_int(code: int, value: Any, allow_pickle: bool) -> Encoded:
    width = _INTS[code][0]
    return Encoded(code, 0, 0, INLINE, int(value) & ((1 << 8 * width) - 1), (), width)


def _numpy_float(code: int, value: Any, allow_pickle: bool) -> Encoded:
    return _inline(code, _FLOATS[code][0].pack(value))


def _forced_none(value: object, allow_pickle: bool) -> Encoded:
    if value is not None:
        _misfit(value, _NONE, "only None", "emit it without a DType")
    return _none(None, allow_pickle)


def _forced_bool(value: object, allow_pickle: bool) -> Encoded:
    if not isinstance(value, (bool, np.bool_)):
        _misfit(value, _BOOL, "only True and False", "convert it with bool() or emit it without a DType")
    return _bool(value, allow_pickle)


def _is_int(value: object) -> bool:
    # numpy files timedelta64 under its integers
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def _forced_int(code: int, value: Any, allow_pickle: bool) -> Encoded:
    width, low, high = _INTS[code]
    if not _is_int(value):
        remedy = "convert it with int() or emit it without a DType"
        _misfit(value, code, f"integers from {low} to {high}", remedy)
    number = int(value)
    if not low <= number <= high:
        fits = next((other for other, (_, lo, hi) in _INTS.items() if lo <= number <= hi), None)
        remedy = "no integer DType holds it, so emit it without a DType" if fits is None else f"use {dtype_name(fits)}"
        _misfit(value, code, f"integers from {low} to {high}", remedy)
    return Encoded(code, 0, 0, INLINE, number & ((1 << 8 * width) - 1), (), width)


def _forced_float(code: int, value: Any, allow_pickle: bool) -> Encoded:
    form, highest = _FLOATS[code]
    holds = f"floats from -{highest:g} to {highest:g}, inf, nan, and integers that it represents exactly"
    exact = _is_int(value)
    if not exact and not isinstance(value, (float, np.floating)):
        _misfit(value, code, holds, "convert it with float() or emit it without a DType")
    try:
        number = float(value)
        data = form.pack(number)
    except OverflowError:
        remedy = "emit it without a DType" if exact or code == _F64 else "use DType.F64 or emit it without a DType"
        _misfit(value, code, holds, remedy)
    if exact and form.unpack(data)[0] != int(value):
        _misfit(value, code, holds, "round it yourself with float(), or emit it without a DType")
    if math.isinf(number) and not exact and not np.isinf(value):  # longdouble reaches further than F64
        _misfit(value, code, holds, "emit it without a DType")
    return _inline(code, data)


def _read_none(data: memoryview) -> None:
    if len(data):
        _malformed(_NONE, f"{len(data)} bytes where none belong")


def _read_bool(data: memoryview) -> bool:
    if len(data) != 1 or data[0] > 1:
        _malformed(_BOOL, f"{bytes(data[:8])!r} is neither 0 nor 1 in one byte")
    return data[0] == 1


def _read_int(code: int, data: memoryview) -> int:
    width, low, _ = _INTS[code]
    if len(data) != width:
        _malformed(code, f"{len(data)} bytes instead of {width}")
    return int.from_bytes(data, "little", signed=low < 0)


def _read_float(code: int, data: memoryview) -> float:
    form = _FLOATS[code][0]
    if len(data) != form.size:
        _malformed(code, f"{len(data)} bytes instead of {form.size}")
    number: float = form.unpack(data)[0]
    return number


# --- text and bytes --------------------------------------------------------------------------------------------------


def _raw(code: int, data: Part) -> Encoded:
    size = len(data)
    return _inline(code, bytes(data)) if size <= INLINE_BYTES else Encoded(code, 0, 0, 0, 0, (data,), size)


def _str(value: str, allow_pickle: bool) -> Encoded:
    try:
        data = value.encode()
    except UnicodeEncodeError:  # lone surrogates, as in undecodable file names: only pickle keeps them
        return _pickle(value, allow_pickle)
    return _raw(_STR, data)


def _bytes(value: bytes, allow_pickle: bool) -> Encoded:
    return _raw(_BYTES, value)


def _view(value: Any, allow_pickle: bool) -> Encoded:
    return _raw(_BYTES, _flat(memoryview(value)))


def _flat(view: memoryview) -> Part:
    """Any buffer as 1-d bytes; copied only when its memory has gaps or another order."""
    if view.nbytes == 0:
        return b""
    return view.cast("B") if view.c_contiguous else view.tobytes()


def _forced_str(value: object, allow_pickle: bool) -> Encoded:
    if not isinstance(value, str):
        _misfit(value, _STR, "str", "convert it (bytes have .decode()) or emit it without a DType")
    try:
        return _raw(_STR, value.encode())
    except UnicodeEncodeError:
        _misfit(value, _STR, "text that UTF-8 can express (no lone surrogates)", "emit it without a DType")


def _forced_bytes(value: object, allow_pickle: bool) -> Encoded:
    if isinstance(value, bytes):
        return _raw(_BYTES, bytes(value))
    if not isinstance(value, (bytearray, memoryview)):
        remedy = "convert it (str has .encode(), arrays have .tobytes()) or emit it without a DType"
        _misfit(value, _BYTES, "bytes, bytearray and memoryview", remedy)
    return _view(value, allow_pickle)


def _read_str(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        _malformed(_STR, f"no UTF-8 ({error})")


# --- arrays ----------------------------------------------------------------------------------------------------------

_ITEM_DTYPES: tuple[AnyDType, ...] = tuple(np.dtype(f"<{item}") for item in ITEMS)
_ITEM_OF: dict[AnyDType, int] = {dtype: code for code, dtype in enumerate(_ITEM_DTYPES)}
_PLAIN_DTYPE = re.compile(r"[<>|]([biufcSUV]\d{1,10}|[mM]8(\[\d{0,10}[a-zA-Zμ]{1,7}\])?)")
_DESCRIBED_DEPTH = 32


def _array(value: AnyArray, allow_pickle: bool) -> Encoded:
    dtype = value.dtype
    item = _ITEM_OF.get(dtype)
    described = b""
    if item is None or dtype.names is not None:
        found = _described(dtype)
        if found is None or value.ndim > MAX_RANK:
            return _pickle(value, allow_pickle)
        item, described = ITEM_DESCRIBED, found
    data: tuple[Part, ...] = ()
    if value.nbytes:
        dense = value if value.flags.c_contiguous else np.ascontiguousarray(value)
        data = (dense.reshape(-1).view(np.uint8).data,)
    rank, size = value.ndim, value.nbytes
    if rank <= SHAPE_RANK and not described and all(dim < 1 << DIM_BITS for dim in value.shape):
        packed = sum(dim << DIM_BITS * axis for axis, dim in enumerate(value.shape))
        return Encoded(_ARRAY, item, rank, SHAPE, packed, data, size)
    preamble = struct.pack(f"<{rank}Q", *value.shape)
    if described:
        preamble += struct.pack("<I", len(described)) + described
    preamble += bytes(-len(preamble) % ALIGN)
    return Encoded(_ARRAY, item, rank, 0, 0, (preamble, *data), len(preamble) + size)


def _forced_array(value: object, allow_pickle: bool) -> Encoded:
    holds = "numpy arrays without Python objects"
    if not isinstance(value, np.ndarray):
        _misfit(value, _ARRAY, holds, "convert it with numpy.asarray() or emit it without a DType")
    if type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray):  # numpy.ma loads slowly
        _misfit(value, _ARRAY, holds, "its mask would be lost: use .filled(), or emit it without a DType")
    encoded = None if value.dtype.hasobject else _array(np.asarray(value), True)
    if encoded is None or encoded.dtype != _ARRAY:
        remedy = f"its dtype {value.dtype} has no portable description: convert it with .astype() or use DType.PICKLE"
        _misfit(value, _ARRAY, holds, remedy)
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


def _read_array(item: int, rank: int, flags: int, inline: int, data: memoryview) -> AnyArray:
    if rank > MAX_RANK:
        _malformed(_ARRAY, f"rank {rank}, and the highest is {MAX_RANK}")
    if item >= len(ITEMS) and item != ITEM_DESCRIBED:
        _malformed(_ARRAY, f"unknown item code {item}")
    if flags & SHAPE:
        if rank > SHAPE_RANK or item == ITEM_DESCRIBED or inline >> DIM_BITS * rank:
            _malformed(_ARRAY, f"rank {rank} and item code {item} do not go with the packed dims 0x{inline:x}")
        dims = tuple(inline >> DIM_BITS * axis & (1 << DIM_BITS) - 1 for axis in range(rank))
        dtype, start = _ITEM_DTYPES[item], 0
    else:
        dims, dtype, start = _read_preamble(item, rank, data)
    if math.prod(dims) * dtype.itemsize != len(data) - start:
        _malformed(_ARRAY, f"{len(data) - start} bytes for shape {_short(dims)} of {dtype}")
    try:
        array = np.ndarray(dims, dtype, buffer=data[start:])
    except (ValueError, TypeError, OverflowError) as error:
        _malformed(_ARRAY, f"shape {_short(dims)} of {dtype}: {error}")
    return array


def _read_preamble(item: int, rank: int, data: memoryview) -> tuple[tuple[int, ...], AnyDType, int]:
    """(dims, item type, offset of the data in the payload)."""
    end = 8 * rank
    if len(data) < end:
        _malformed(_ARRAY, f"{len(data)} bytes cannot hold {rank} dims")
    dims = struct.unpack_from(f"<{rank}Q", data)
    if item != ITEM_DESCRIBED:
        dtype = _ITEM_DTYPES[item]
    else:
        if len(data) < end + 4:
            _malformed(_ARRAY, "it ends before the description of its item type")
        start, end = end + 4, end + 4 + int.from_bytes(data[end : end + 4], "little")
        if len(data) < end:
            _malformed(_ARRAY, "it ends within the description of its item type")
        try:
            dtype = _dtype_of(msgspec.msgpack.decode(data[start:end]), 0)
        except (msgspec.MsgspecError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            _malformed(_ARRAY, f"the description of its item type does not read ({error})")
    end += -end % ALIGN
    if len(data) < end:
        _malformed(_ARRAY, f"{len(data)} bytes, and its preamble alone has {end}")
    return dims, dtype, end


def _short(dims: tuple[int, ...]) -> str:
    return str(dims) if len(dims) <= 6 else f"({', '.join(map(str, dims[:6]))}, ...)"


# --- JSON ------------------------------------------------------------------------------------------------------------

_LEAVES = frozenset({str, int, float, bool, type(None), bytes})
_CONTAINERS = frozenset({dict, list})
_to_msgpack = msgspec.msgpack.Encoder().encode
_from_msgpack = msgspec.msgpack.Decoder().decode


def _json(value: Any, allow_pickle: bool) -> Encoded:
    if _is_plain(value, 0, set()):
        try:
            return _packed(_to_msgpack(value))
        except (ValueError, OverflowError):  # an int beyond 64 bits, a str with lone surrogates
            pass
    return _pickle(value, allow_pickle)


def _packed(data: bytes) -> Encoded:
    return Encoded(_JSON, 0, 0, 0, 0, (data,), len(data))


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


def _forced_json(value: Any, allow_pickle: bool) -> Encoded:
    trouble = _json_trouble(value, "value", 0, set())
    data = b""
    if trouble is None:
        try:
            data = _to_msgpack(value)
        except (ValueError, OverflowError) as error:
            trouble = str(error)
    if trouble is not None:
        holds = "dict with str keys, list, str, int of 64 bits, float, bool, None and bytes, of exactly these types"
        _misfit(value, _JSON, holds, f"{trouble}; convert it or emit it without a DType")
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


def _read_json(data: memoryview) -> Any:
    try:
        return _from_msgpack(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        _malformed(_JSON, f"no msgpack ({error})")


# --- pickle ----------------------------------------------------------------------------------------------------------

_MAINS = ("__main__", "__mp_main__")
_TREE = os.urandom(16).hex()  # names a main program without a file (python -c, a prompt); forks inherit it


def _pickle(value: object, allow_pickle: bool) -> Encoded:
    """Payload: u32 buffers, u32 length of the pickle, u64 length of each buffer, the pickle, each buffer; the pickle
    and the buffers are zero-padded to ALIGN."""
    if not allow_pickle:
        raise PickleRefused(
            f"{show(value)} could only be sent as a pickle, and pickle is refused here; send a scalar, str, bytes, an "
            "array or a plain dict or list, give its class a codec with register_type(), or allow pickle"
        )
    data, buffers = _pickled(value)
    if len(data) > MAX_U32 or len(buffers) > MAX_U32:
        raise EncodeError(
            f"a {class_name(type(value))} has a pickle of {len(data)} bytes, and {MAX_U32} are the most; "
            "send large data as arrays, or as bytes of their own"
        )
    head = struct.pack(f"<II{len(buffers)}Q", len(buffers), len(data), *map(len, buffers))
    parts: list[Part] = [head, data, bytes(-(len(head) + len(data)) % ALIGN)]
    for buffer in buffers:
        parts += (buffer, bytes(-len(buffer) % ALIGN))
    return Encoded(_PICKLE, 0, 0, 0, 0, tuple(part for part in parts if len(part)), sum(map(len, parts)))


def _pickled(value: object) -> tuple[bytes, list[memoryview]]:
    """The pickle and its out-of-band buffers: by reference when every class is importable, else by value."""
    in_main = type(value).__module__ in _MAINS
    plain = None if in_main else _try_pickler(_by_reference, value)
    if isinstance(plain, tuple) and b"_main__" not in plain[0]:
        return plain
    shipped = _try_pickler(_by_value, value)
    if isinstance(shipped, tuple):
        return shipped
    if in_main:
        plain = _try_pickler(_by_reference, value)
    if isinstance(plain, tuple):  # its code does not travel: readable in a fork only, like multiprocessing's queues
        return plain
    raise EncodeError(
        f"{show(value)} cannot be pickled ({type(shipped).__name__}: {shipped}); send the data it stands for, or give "
        "its class a codec with register_type()"
    ) from shipped


def _try_pickler(pickler: _Pickler, value: object) -> tuple[bytes, list[memoryview]] | Exception:
    buffers: list[memoryview] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= OUT_OF_BAND_BYTES:
            buffers.append(raw)
            return False
        return True

    try:
        return pickler(value, keep_in_band), buffers
    except MemoryError:
        raise
    except Exception as error:  # whatever the value's own __reduce__ raises
        return error


def _by_reference(value: object, buffer_callback: Callable[[pickle.PickleBuffer], bool] | None) -> bytes:
    return pickle.dumps(value, 5, buffer_callback=buffer_callback)


def dumps(value: object) -> bytes:
    """Pickle as frames do, in one piece, code of the main program by value; `pickle.loads` reads it. For functions
    and classes that are shipped to workers, so that they agree with the values in the frames about such classes."""
    return _by_value(value, None)


def _by_value(value: object, buffer_callback: Callable[[pickle.PickleBuffer], bool] | None) -> bytes:
    """By cloudpickle: lambdas, local functions, and whatever the main program defines, which is not importable
    where the frame is read."""
    out = io.BytesIO()
    _main_pickler()(out, protocol=5, buffer_callback=buffer_callback).dump(value)
    return out.getvalue()


@cache
def _main_pickler() -> Any:
    import cloudpickle  # only here: a worker that never pickles code does without

    class MainPickler(cloudpickle.Pickler):  # type: ignore[misc]
        """cloudpickle, except for classes of the main program: by reference where the reader runs the same program
        (a fork), so that isinstance() and == hold there, and by value elsewhere."""

        def reducer_override(self, obj: Any) -> Any:
            origin = _origin(obj) if isinstance(obj, type) and obj.__module__ in _MAINS else None
            return super().reducer_override(obj) if origin is None else (_adopt, origin)

    return MainPickler


# class -> (program that defines it, its qualname, the class by value): of our main program, or of another's
_origins: WeakKeyDictionary[type[Any], tuple[str, str, bytes]] = WeakKeyDictionary()


def _origin(cls: type[Any]) -> tuple[str, str, bytes] | None:
    """None: a class that no main program has under its name. A class is pickled once; later changes are not sent."""
    origin = _origins.get(cls)
    if origin is None and _in_main(cls.__qualname__) is cls:
        import cloudpickle

        origin = _origins[cls] = (_program(), cls.__qualname__, cloudpickle.dumps(cls, protocol=5))
    return origin


def _adopt(program: str, qualname: str, data: bytes) -> Any:
    """Named inside pickles: the class of our own main program if that is the writer's, else the class in `data`,
    which goes home under the same origin."""
    found = _in_main(qualname) if program == _program() else None
    if not isinstance(found, type):
        found = _class_from(data)
        _origins[found] = (program, qualname, data)
    return found


@lru_cache(maxsize=256)
def _class_from(data: bytes) -> Any:
    # cached, since loading a class again would reset the attributes of the one that is there
    return pickle.loads(data)


def _in_main(qualname: str) -> object:
    found: object = sys.modules.get("__main__")
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


def _program() -> str:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return os.path.abspath(file) if isinstance(file, str) else _TREE


def _read_pickle(data: memoryview, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise PickleRefused(
            "a pickled frame arrived where pickle is refused, and was not opened; let the sender use a type that needs "
            "no pickle (scalars, str, bytes, arrays, plain dicts and lists, register_type()), or allow pickle"
        )
    if len(data) < 8:
        _malformed(_PICKLE, f"{len(data)} bytes cannot hold its preamble")
    count, length = struct.unpack_from("<II", data)
    start = 8 + 8 * count
    if len(data) < start + length:
        _malformed(_PICKLE, f"{len(data)} bytes cannot hold {count} buffer lengths and {length} bytes of pickle")
    end = start + length
    buffers = []
    place = end + -end % ALIGN
    for size in struct.unpack_from(f"<{count}Q", data, 8):
        buffers.append(data[place : place + size])
        place += size + -size % ALIGN
    if place != len(data):
        _malformed(_PICKLE, f"{len(data)} bytes where pickle and buffers add up to {place}")
    try:
        return pickle.loads(data[start:end], buffers=buffers)
    except Exception as error:
        raise FrameError(
            f"the pickle of a frame does not open ({type(error).__name__}: {error}); the modules and classes it names "
            "must be importable in this process"
        ) from error


# --- custom types ----------------------------------------------------------------------------------------------------


def _custom(custom: CustomType, value: object) -> Encoded:
    try:
        data = _flat(memoryview(custom.encode(value)))
    except MemoryError:
        raise
    except Exception as error:
        raise EncodeError(
            f"the encode function of custom type {custom.name!r} failed for {show(value)} "
            f"({type(error).__name__}: {error}); it must return bytes, a bytearray or a memoryview"
        ) from error
    return Encoded(custom.code, 0, 0, 0, 0, (data,) if len(data) else (), len(data))


def _forced_custom(code: int, value: object) -> Encoded:
    custom = CUSTOM_BY_CODE.get(code)
    if custom is None:
        raise EncodeError(
            f"{show(value)} cannot be sent as dtype {code}: it is neither a DType nor the code of a registered type "
            f"({_registered()}); use a member of DType, or register_type() first"
        )
    if not isinstance(value, custom.cls):
        _misfit(value, code, f"instances of {class_name(custom.cls)}", "emit it without a DType")
    return _custom(custom, value)


def _read_custom(code: int, data: memoryview) -> Any:
    custom = CUSTOM_BY_CODE.get(code)
    if custom is None:
        raise FrameError(
            f"a frame has the custom type with code {code}, which is not registered in this process ({_registered()}); "
            "call register_type() here with the same name, for example by importing the module that defines the class"
        )
    try:
        return custom.decode(data)
    except Exception as error:
        raise FrameError(
            f"the decode function of custom type {custom.name!r} failed on {len(data)} bytes "
            f"({type(error).__name__}: {error})"
        ) from error


def _registered() -> str:
    return "registered: " + (", ".join(repr(custom.name) for custom in CUSTOM_BY_CODE.values()) or "none")


# --- the two doors ---------------------------------------------------------------------------------------------------


def _numpy_scalars() -> dict[type[Any], Encoder]:
    by_class: dict[type[Any], Encoder] = {np.bool_: _bool, np.str_: _str, np.bytes_: _forced_bytes}
    for char in "bhilqBHILQefd":
        dtype = np.dtype(char)
        if dtype.kind == "f":
            by_class[dtype.type] = partial(_numpy_float, {2: _F16, 4: _F32, 8: _F64}[dtype.itemsize])
        else:
            first = DType.U8 if dtype.kind == "u" else DType.I8
            by_class[dtype.type] = partial(_numpy_int, int(first) + dtype.itemsize.bit_length() - 1)
    return by_class


_AUTOMATIC: dict[type[Any], Encoder] = {
    type(None): _none,
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    bytes: _bytes,
    bytearray: _view,
    memoryview: _view,
    np.ndarray: _array,
    dict: _json,
    list: _json,
    **_numpy_scalars(),
}

_FORCED: dict[int, Encoder] = {
    _NONE: _forced_none,
    _BOOL: _forced_bool,
    **{code: partial(_forced_int, code) for code in _INTS},
    **{code: partial(_forced_float, code) for code in _FLOATS},
    _STR: _forced_str,
    _BYTES: _forced_bytes,
    _ARRAY: _forced_array,
    _JSON: _forced_json,
    _PICKLE: _pickle,
}

_READERS: Mapping[int, Callable[[memoryview], Any]] = {
    _NONE: _read_none,
    _BOOL: _read_bool,
    **{code: partial(_read_int, code) for code in _INTS},
    **{code: partial(_read_float, code) for code in _FLOATS},
    _STR: _read_str,
    _BYTES: bytes,
    _JSON: _read_json,
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
        return _pickle(value, allow_pickle) if custom is None else _custom(custom, value)
    forced = _FORCED.get(dtype)
    return _forced_custom(dtype, value) if forced is None else forced(value, allow_pickle)


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
        if size > INLINE_BYTES or dtype == _ARRAY:
            _malformed(dtype, f"{size} bytes cannot be inline")
        data = memoryview(inline.to_bytes(8, "little")[:size])
    elif payload.nbytes != size or payload.ndim != 1 or payload.itemsize != 1:
        _malformed(dtype, f"{payload.nbytes} bytes where the header says {size}")
    else:
        data = payload
    reader = _READERS.get(dtype)
    if reader is not None:
        return reader(data)
    if dtype == _ARRAY:
        return _read_array(item, rank, flags, inline, data)
    if dtype == _PICKLE:
        return _read_pickle(data, allow_pickle)
    if dtype < CUSTOM_BASE:
        raise FrameError(
            f"unknown dtype {dtype}: the frame was written by another version of uPipe, or its header was changed"
        )
    return _read_custom(dtype, data)
