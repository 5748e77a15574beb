"""What all codecs share: codes, and how they say that a value does not fit or that a payload is malformed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import numpy as np

from upipe._types import INLINE, DType, Encoded, dtype_name, show
from upipe.errors import EncodeError, FrameError

AnyDType: TypeAlias = "np.dtype[Any]"
AnyArray: TypeAlias = "np.ndarray[Any, Any]"
Encoder: TypeAlias = Callable[[Any, bool], Encoded]

# Plain ints: reading a member of an IntEnum costs more than encoding a scalar.
NONE, BOOL, I64, U64 = int(DType.NONE), int(DType.BOOL), int(DType.I64), int(DType.U64)
F16, F32, F64 = int(DType.F16), int(DType.F32), int(DType.F64)
STR, BYTES, ARRAY, JSON, PICKLE = (
    int(DType.STR), int(DType.BYTES), int(DType.ARRAY), int(DType.JSON), int(DType.PICKLE)
)  # fmt: skip


def misfit(value: object, code: int, holds: str, remedy: str) -> NoReturn:
    """The value is not what the DType holds."""
    raise EncodeError(f"{show(value)} does not fit {dtype_name(code)}, which holds {holds}; {remedy}")


def malformed(code: int, what: str) -> NoReturn:
    """The payload is not what its DType says."""
    raise FrameError(
        f"malformed {dtype_name(code)} payload: {what}; it was changed after it was written, "
        "or was not written by this version of uPipe"
    )


def inlined(code: int, data: bytes) -> Encoded:
    """At most 8 bytes, which travel in the header."""
    return Encoded(code, 0, 0, INLINE, int.from_bytes(data, "little"), (), len(data))
