"""The frame: one value on its way. DType, encode() and decode(), DataFrame, custom types.

A frame is a 64-byte header and a payload (ARCHITECTURE.md, section 2). This is the reference codec: the ring encodes
the hot scalars natively and asks `encode` and `decode` for the rest; both give the same bytes.
"""

from __future__ import annotations

import reprlib
import time
from typing import Any, NoReturn

from upipe._codecs import decode, encode
from upipe._codecs.pickles import dumps
from upipe._types import (
    ALIGN,
    ERROR,
    HEADER,
    HEADER_BYTES,
    INLINE,
    ITEM_DESCRIBED,
    ITEMS,
    MAGIC,
    REPLY,
    SHAPE,
    VERSION,
    Buffer,
    DType,
    Encoded,
    Header,
    dtype_name,
    register_type,
    registered_types,
)
from upipe.errors import EncodeError, FrameCorrupt, FrameError, PickleRefused

__all__ = [
    "ALIGN",
    "ERROR",
    "HEADER",
    "HEADER_BYTES",
    "INLINE",
    "ITEMS",
    "ITEM_DESCRIBED",
    "MAGIC",
    "REPLY",
    "SHAPE",
    "VERSION",
    "DType",
    "DataFrame",
    "Encoded",
    "Header",
    "decode",
    "dumps",
    "encode",
    "register_type",
    "registered_types",
]

_UNREAD = object()


def frame_crc(header: Header, payload: Buffer) -> int:
    """CRC32 (zlib's) of a frame: of the payload outside the header first, then of the header with crc = 0."""
    from isal.isal_zlib import crc32  # here: only frames outside a ring need it, and it takes 2 ms to load

    return crc32(HEADER.pack(*header._replace(crc=0)), crc32(payload))


class DataFrame:
    """One frame, immutable: its header's fields, its value, its payload. For dead letters, files and tests.

    Args:
        value: what to send. The frame keeps its own copy of the bytes, not the object.
        dtype: DType or custom code to force, as in `encode`. Default: chosen from the value.
        key: hash of the partition key, u32; 0 (default) means none.
        execution: id of the call this frame belongs to, u64; 0 (default) means none.
        allow_pickle: False refuses values that only pickle can send.

    Raises:
        EncodeError, PickleRefused: as `encode`; EncodeError also for a key or execution out of range.

    Two frames are equal when all their bytes are.
    """

    __slots__ = ("_allow_pickle", "_header", "_payload", "_value")

    _header: Header
    _payload: memoryview
    _value: Any
    _allow_pickle: bool

    def __init__(
        self, value: Any, dtype: int | None = None, *, key: int = 0, execution: int = 0, allow_pickle: bool = True
    ) -> None:
        for name, number, bits in (("key", key, 32), ("execution", execution, 64)):
            if type(number) is not int or number >> bits:
                raise EncodeError(f"{name} {number!r} is no integer from 0 to {2**bits - 1}; 0 means none")
        encoded = encode(value, dtype, allow_pickle=allow_pickle)
        header = Header(
            crc=0,
            deliveries=1,
            magic=MAGIC,
            version=VERSION,
            flags=encoded.flags,
            dtype=encoded.dtype,
            item=encoded.item,
            rank=encoded.rank,
            producer=0,
            epoch=0,
            key=key,
            size=encoded.size,
            position=0,
            execution=execution,
            timestamp=time.time_ns(),
            inline=encoded.inline,
        )
        payload = b"".join(encoded.parts)
        self._fill(header._replace(crc=frame_crc(header, payload)), memoryview(payload), allow_pickle)

    def _fill(self, header: Header, payload: memoryview, allow_pickle: bool) -> None:
        for name, content in (
            ("_header", header),
            ("_payload", payload),
            ("_value", _UNREAD),
            ("_allow_pickle", allow_pickle),
        ):
            object.__setattr__(self, name, content)

    @classmethod
    def unpack(cls, buffer: Buffer, *, allow_pickle: bool = True, lazy: bool = False) -> DataFrame:
        """The frame in ``buffer``, which holds exactly one, as `pack` made it. Anything but bytes is copied.

        Args:
            buffer: 64 bytes of header and the payload.
            allow_pickle: False refuses a pickled frame, unopened.
            lazy: True leaves the value unread until `value` is asked for, so that a frame whose value does not
                decode here can still be looked at. Default False: what is wrong with the value is raised now.

        Raises:
            FrameCorrupt: the CRC does not match: at least one bit changed, or bytes are missing.
            FrameError: shorter than a header, of another layout version, or no proper frame in spite of its CRC.
            PickleRefused: the frame is a pickle and ``allow_pickle`` is False.
        """
        data = memoryview(buffer if type(buffer) is bytes else memoryview(buffer).tobytes())
        if len(data) < HEADER_BYTES:
            raise FrameError(f"{len(data)} bytes are no frame: the header alone has {HEADER_BYTES}")
        frame = cls.from_ring(data[:HEADER_BYTES], data[HEADER_BYTES:], allow_pickle=allow_pickle)
        frame._check()
        if not lazy:
            frame.value  # noqa: B018  (raises here what is wrong with the value)
        return frame

    @classmethod
    def from_ring(cls, header: Buffer, payload: Buffer, *, allow_pickle: bool = True) -> DataFrame:
        """A frame from a header (64 bytes) and the payload outside it, neither checked nor copied: the ring did the
        first, and the payload must not change while the frame lives. The value is read when asked for."""
        frame = cls.__new__(cls)
        frame._fill(Header(*HEADER.unpack(header)), memoryview(payload).toreadonly(), allow_pickle)
        return frame

    def _check(self) -> None:
        header, outside = self._header, self._payload.nbytes
        found = frame_crc(header, self._payload)
        if found != header.crc:
            self._corrupt(found)
        if header.magic != MAGIC:
            raise FrameError(f"no frame of uPipe: its magic is 0x{header.magic:04x} instead of 0x{MAGIC:04x}")
        if header.version != VERSION:
            raise FrameError(
                f"a frame of layout version {header.version}, and this uPipe reads version {VERSION}: "
                "use the same uPipe at both ends"
            )
        if outside != self.nbytes - HEADER_BYTES:
            raise FrameError(f"{outside} bytes follow the header, which announces {self.nbytes - HEADER_BYTES}")

    def _corrupt(self, found: int) -> NoReturn:
        header, outside = self._header, self._payload.nbytes
        hints = [f"CRC32 0x{found:08x} instead of 0x{header.crc:08x}"]
        if header.magic != MAGIC:
            hints.append(f"magic 0x{header.magic:04x} instead of 0x{MAGIC:04x}")
        if outside != self.nbytes - HEADER_BYTES:
            hints.append(f"{outside} bytes after the header instead of {self.nbytes - HEADER_BYTES}")
        raise FrameCorrupt(
            f"the frame at position {header.position} of producer {header.producer} is corrupt ({', '.join(hints)}); "
            "its bytes changed after they were written, so it was not read"
        )

    def pack(self) -> bytes:
        """Header and payload in one piece, `nbytes` long, CRC set; the inverse of `unpack`."""
        return HEADER.pack(*self._header) + self._payload

    @property
    def value(self) -> Any:
        """What a consumer gets, decoded on first use and then kept; arrays are read-only views of the payload.

        Raises FrameError or PickleRefused when it cannot be read here (only for frames read lazily).
        """
        if self._value is _UNREAD:
            header = self._header
            fields = (header.dtype, header.item, header.rank, header.flags, header.inline, header.size)
            object.__setattr__(self, "_value", decode(*fields, self._payload, allow_pickle=self._allow_pickle))
        return self._value

    @property
    def payload(self) -> memoryview:
        """The payload, `size` bytes, read-only; where it is inline, those bytes of the header."""
        if self.inline:
            return memoryview(self._header.inline.to_bytes(8, "little")[: self.size])
        return self._payload

    @property
    def header(self) -> Header:
        """All fields of the header."""
        return self._header

    @property
    def dtype(self) -> DType | int:
        """The DType; for custom types their code."""
        try:
            return DType(self._header.dtype)
        except ValueError:
            return self._header.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The dims of an array; () for everything else."""
        return tuple(self.value.shape) if self._header.dtype == DType.ARRAY else ()

    @property
    def size(self) -> int:
        """Payload in bytes."""
        return self._header.size

    @property
    def nbytes(self) -> int:
        """The whole frame in bytes: the header, and the payload unless it is inside the header."""
        return HEADER_BYTES + (0 if self.inline else self._header.size)

    @property
    def inline(self) -> bool:
        """Whether the payload is inside the header."""
        return bool(self._header.flags & INLINE)

    @property
    def crc(self) -> int:
        """CRC32 of the frame, u32."""
        return self._header.crc

    @property
    def deliveries(self) -> int:
        """How often it was delivered, counting this time: 1 at first."""
        return self._header.deliveries

    @property
    def producer(self) -> int:
        """Id of the producer in its queue."""
        return self._header.producer

    @property
    def epoch(self) -> int:
        """Which life of that producer wrote it; raised at each restart."""
        return self._header.epoch

    @property
    def key(self) -> int:
        """Hash of the partition key, u32; 0 means none."""
        return self._header.key

    @property
    def position(self) -> int:
        """Byte position of its header in the stream of its ring."""
        return self._header.position

    @property
    def execution(self) -> int:
        """Id of the call it belongs to; 0 means none."""
        return self._header.execution

    @property
    def timestamp(self) -> int:
        """When it was written, in ns since the epoch."""
        return self._header.timestamp

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a DataFrame is immutable, so {name!r} cannot be set; make a new one from the value")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a DataFrame is immutable, so {name!r} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DataFrame):
            return NotImplemented
        return self._header == other._header and self._payload == other._payload

    def __hash__(self) -> int:
        return hash(self._header)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self.pack(), self._allow_pickle))

    def __repr__(self) -> str:
        header = self._header
        call = f", execution {header.execution}" if header.execution else ""
        key = f", key {header.key}" if header.key else ""
        return (
            f"<DataFrame {self._summary()}, {self.nbytes} bytes at {header.position} from producer {header.producer} "
            f"(epoch {header.epoch}), delivery {header.deliveries}{call}{key}>"
        )

    def _summary(self) -> str:
        """The type and, where that is cheap and harmless, the value. Opens no pickle and runs no codec of users."""
        kind = dtype_name(self._header.dtype).removeprefix("DType.")
        try:
            if self._header.dtype == DType.ARRAY:
                return f"{kind} {self.value.dtype} {self.shape}"
            if self._header.dtype < DType.PICKLE or self._value is not _UNREAD:
                return f"{kind} {reprlib.repr(self.value)}"
        except (FrameError, PickleRefused):
            return f"{kind} (unreadable)"
        return kind


def _restore(packed: bytes, allow_pickle: bool) -> DataFrame:
    return DataFrame.unpack(packed, allow_pickle=allow_pickle, lazy=True)
