"""Everything else: pickle protocol 5, its large buffers out of band, classes of a main program by value."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from types import CodeType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from upipe._codecs.common import PICKLE, malformed
from upipe._types import ALIGN, Encoded, Part, class_name, show
from upipe.errors import EncodeError, FrameError, PickleRefused

MAX_U32 = 2**32 - 1
OUT_OF_BAND_BYTES = 1024
"""Pickle buffers of at least this many bytes travel out of band. Lower: more zero-copy, and 64 + 8 bytes for each."""

_Pickler: TypeAlias = Callable[[object, Callable[[pickle.PickleBuffer], bool] | None], bytes]

_MAINS = ("__main__", "__mp_main__")
_TREE = os.urandom(16).hex()  # names a main program without a file (python -c, a prompt); forks inherit it


def encode_pickle(value: object, allow_pickle: bool) -> Encoded:
    """Payload: u32 buffers, u32 length of the pickle, u64 length of each buffer, the pickle, each buffer; the pickle
    and the buffers are zero-padded to ALIGN."""
    if not allow_pickle:
        raise PickleRefused(
            f"{show(value)} could only be sent as a pickle, and pickle is refused here; send a scalar, str, bytes, an "
            "array or a plain dict or list, give its class a codec with register_type(), or take "
            "pickles: Settings(allow_pickle=True)"
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
    return Encoded(PICKLE, 0, 0, 0, 0, tuple(part for part in parts if len(part)), sum(map(len, parts)))


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
    return _cloudpickled(_picklers()[1], value, buffer_callback)


def _cloudpickled(
    pickler: Any, value: object, buffer_callback: Callable[[pickle.PickleBuffer], bool] | None = None
) -> bytes:
    out = io.BytesIO()
    pickler(out, protocol=5, buffer_callback=buffer_callback).dump(value)
    return out.getvalue()


@cache
def _picklers() -> tuple[Any, Any]:
    """For a class of the main program itself, and for all else."""
    import cloudpickle  # only here: a worker that never pickles code does without

    class CodePickler(cloudpickle.Pickler):  # type: ignore[misc]
        """cloudpickle, and code keeps the name of its file, so that a remote traceback shows the line that raised
        (cloudpickle itself forgets it from 3.1.3 on)."""

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, CodeType):
                _, fields = self.dispatch_table[CodeType](obj)
                return _code, (obj.co_filename, *fields)
            return super().reducer_override(obj)

    class MainPickler(CodePickler):
        """The same, except for classes of the main program: by reference where the reader runs the same program
        (a fork), so that isinstance() and == hold there, and by value elsewhere."""

        def reducer_override(self, obj: Any) -> Any:
            origin = _origin(obj) if isinstance(obj, type) and obj.__module__ in _MAINS else None
            return super().reducer_override(obj) if origin is None else (_adopt, origin)

    return CodePickler, MainPickler


def _code(filename: str, *fields: Any) -> CodeType:
    """Named inside pickles: code as cloudpickle takes it apart, from the file it was written in."""
    return CodeType(*fields).replace(co_filename=filename)


# class -> (program that defines it, its qualname, the class by value): of our main program, or of another's
_origins: WeakKeyDictionary[type[Any], tuple[str, str, bytes]] = WeakKeyDictionary()


def _origin(cls: type[Any]) -> tuple[str, str, bytes] | None:
    """None: a class that no main program has under its name. A class is pickled once; later changes are not sent."""
    origin = _origins.get(cls)
    if origin is None and _in_main(cls.__qualname__) is cls:
        origin = _origins[cls] = (_program(), cls.__qualname__, _cloudpickled(_picklers()[0], cls))
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


def read_pickle(data: memoryview, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise PickleRefused(
            "a pickled frame arrived where pickle is refused, and was not opened; let the sender use a type that needs "
            "no pickle (scalars, str, bytes, arrays, plain dicts and lists, register_type()), or take pickles: "
            "Settings(allow_pickle=True)"
        )
    if len(data) < 8:
        malformed(PICKLE, f"{len(data)} bytes cannot hold its preamble")
    count, length = struct.unpack_from("<II", data)
    start = 8 + 8 * count
    if len(data) < start + length:
        malformed(PICKLE, f"{len(data)} bytes cannot hold {count} buffer lengths and {length} bytes of pickle")
    end = start + length
    buffers = []
    place = end + -end % ALIGN
    for size in struct.unpack_from(f"<{count}Q", data, 8):
        buffers.append(data[place : place + size])
        place += size + -size % ALIGN
    if place != len(data):
        malformed(PICKLE, f"{len(data)} bytes where pickle and buffers add up to {place}")
    try:
        return pickle.loads(data[start:end], buffers=buffers)
    except Exception as error:
        raise FrameError(
            f"the pickle of a frame does not open ({type(error).__name__}: {error}); the modules and classes it names "
            "must be importable in this process"
        ) from error
