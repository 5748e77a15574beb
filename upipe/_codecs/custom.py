"""Types that the user registered."""

from __future__ import annotations

from typing import Any

from upipe._codecs.common import misfit
from upipe._codecs.scalars import flat
from upipe._types import CUSTOM_BY_CODE, CustomType, Encoded, class_name, show
from upipe.errors import EncodeError, FrameError


def encode_custom(custom: CustomType, value: object) -> Encoded:
    try:
        data = flat(memoryview(custom.encode(value)))
    except MemoryError:
        raise
    except Exception as error:
        raise EncodeError(
            f"the encode function of custom type {custom.name!r} failed for {show(value)} "
            f"({type(error).__name__}: {error}); it must return bytes, a bytearray or a memoryview"
        ) from error
    return Encoded(custom.code, 0, 0, 0, 0, (data,) if len(data) else (), len(data))


def force_custom(code: int, value: object) -> Encoded:
    custom = CUSTOM_BY_CODE.get(code)
    if custom is None:
        raise EncodeError(
            f"{show(value)} cannot be sent as dtype {code}: it is neither a DType nor the code of a registered type "
            f"({_registered()}); use a member of DType, or register_type() first"
        )
    if not isinstance(value, custom.cls):
        misfit(value, code, f"instances of {class_name(custom.cls)}", "emit it without a DType")
    return encode_custom(custom, value)


def read_custom(code: int, data: memoryview) -> Any:
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
