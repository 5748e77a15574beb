"""THE table of everything that lies in shared memory, from which `_layout.h` and the documents are made.

    segment = | control (4 KiB) | slots | producers | state words | ring bytes |

`python -m upipe.memq.layout` prints the C header, `... --markdown` the tables of ARCHITECTURE.md; a test checks that
both are what is committed. The C header asserts every offset and size with `_Static_assert`; `check()` here asserts at
import that no field overlaps another. The fingerprint is a CRC of this table: two builds that disagree about one byte
of it refuse each other at attach (LMDB's idea of folding struct sizes into the format number).
"""

from __future__ import annotations

import sys
import zlib
from typing import NamedTuple

LAYOUT_VERSION = 2
MAGIC = 0x0051_4D45_5049_5075  # "uPIPEMQ\0", little endian
FRAME_MAGIC = 0x5055
GRANULE = 64
"""Bytes of the unit in which ring space is handed out: one cache line, the size of a frame header."""
CONTROL_BYTES = 4096
SLOTS = 512
"""Participants (processes) that can hold a queue open at the same time."""
PRODUCERS = 1024
"""Logical producers (ends of stream to count) of one queue."""
MIN_RING = 4096
MAX_RING = 1 << 37


class Field(NamedTuple):
    """One field: its byte offset, C type, name, array length (0 = scalar) and meaning."""

    offset: int
    ctype: str
    name: str
    length: int
    doc: str


SIZES = {"uint8_t": 1, "uint16_t": 2, "uint32_t": 4, "uint64_t": 8, "up_books": 64, "up_claims": 16}

FRAME = (
    Field(0, "uint32_t", "crc", 0, "CRC32 of the payload, continued over the header with this field as 0"),
    Field(4, "uint16_t", "deliveries", 0, "1 at first delivery; raised by recovery, stored together with the CRC"),
    Field(6, "uint16_t", "magic", 0, "0x5055"),
    Field(8, "uint8_t", "version", 0, "layout version"),
    Field(9, "uint8_t", "flags", 0, "1 INLINE, 2 REPLY, 4 ERROR, 8 SHAPE"),
    Field(10, "uint16_t", "dtype", 0, "DType code"),
    Field(12, "uint8_t", "item", 0, "array item code, 255 = described in the payload"),
    Field(13, "uint8_t", "rank", 0, "array rank"),
    Field(14, "uint16_t", "producer", 0, "producer id in this queue"),
    Field(16, "uint32_t", "epoch", 0, "life number of that producer"),
    Field(20, "uint32_t", "key", 0, "hash of the partition key, 0 = none"),
    Field(24, "uint64_t", "size", 0, "payload bytes"),
    Field(32, "uint64_t", "position", 0, "byte position of this header in the ring's stream"),
    Field(40, "uint64_t", "execution", 0, "execution id of a call, 0 = none"),
    Field(48, "uint64_t", "timestamp", 0, "ns since 1970 when it was written, or up to 4 us before"),
    Field(56, "uint64_t", "inline_", 0, "payload of at most 8 bytes, or packed dims"),
)

CONTROL = (
    Field(0, "uint64_t", "magic", 0, "'uPIPEMQ'; written last at creation"),
    Field(8, "uint32_t", "version", 0, "layout version"),
    Field(12, "uint32_t", "fingerprint", 0, "CRC32 of this table and sizeof(pthread_mutex_t)"),
    Field(16, "uint64_t", "capacity", 0, "ring bytes, a power of two"),
    Field(24, "uint64_t", "total", 0, "bytes of the whole segment"),
    Field(32, "uint64_t", "max_frames", 0, "most frames in the ring at a time, 0 = only bytes count"),
    Field(40, "uint32_t", "options", 0, "1 refuse pickle, 2 no CRC check, 4 a supervisor recovers"),
    Field(44, "uint32_t", "policy", 0, "0 block, 1 drop_oldest, 2 latest, 3 discard; may change while in use"),
    Field(48, "uint32_t", "stream", 0, "0 no producer yet, 1 open, 2 all closed; guarded by the registry lock"),
    Field(52, "uint32_t", "joined", 0, "count of slot registrations: tells watchers to look again"),
    Field(56, "uint64_t", "created", 0, "ns since 1970"),
    Field(128, "uint64_t", "registry_lock", 8, "robust mutex over slots, producers and stream"),
    Field(192, "uint64_t", "producer_lock", 8, "robust mutex of the producers' end"),
    Field(256, "uint64_t", "head", 0, "position after the last claimed frame | selector of head_books"),
    Field(264, "uint64_t", "cached_tail", 0, "producers' copy of tail; guarded by producer_lock"),
    Field(272, "uint64_t", "last", 0, "position of the newest frame; a hint, guarded by producer_lock"),
    Field(280, "uint32_t", "producer_cpu", 0, "1 + CPU of the last claim: a consumer on the same one gives way"),
    Field(288, "uint64_t", "jump_from", 0, "where the latest jump's gap starts; guarded by producer_lock"),
    Field(296, "uint64_t", "jump_to", 0, "where it ends; true once head is behind it; guarded by producer_lock"),
    Field(320, "up_books", "head_books", 2, "claimed frames and bytes, refused frames; the selected one is true"),
    Field(448, "uint64_t", "consumer_lock", 8, "robust mutex of the consumers' end"),
    Field(512, "uint64_t", "next", 0, "position of the next frame to be taken; guarded by consumer_lock"),
    Field(520, "uint64_t", "cached_head", 0, "consumers' copy of head; guarded by consumer_lock"),
    Field(528, "uint64_t", "redeliver", 0, "AVAILABLE frames before next; guarded by consumer_lock, recountable"),
    Field(536, "uint64_t", "redelivered", 0, "frames given back so far (statistic)"),
    Field(544, "uint64_t", "corrupt", 0, "frames refused for their CRC (statistic)"),
    Field(552, "uint64_t", "taken", 0, "frames taken so far (statistic)"),
    Field(560, "uint32_t", "mirror", 0, "0 none, 1 source copy (taken by its mirror only), 2 sink copy (written so)"),
    Field(564, "uint32_t", "consumer_cpu", 0, "1 + CPU of the last take: a producer on the same one does not spin"),
    Field(568, "uint64_t", "mirror_epoch", 0, "number of the pair of copies; guarded by consumer_lock as mirror is"),
    Field(576, "uint64_t", "tail", 0, "position before which everything is finished | selector of tail_books"),
    Field(640, "up_books", "tail_books", 2, "frames that tail passed, by how they ended; the selected one is true"),
    Field(768, "uint64_t", "consumers_waiting", 8, "bit per slot: asleep until a frame comes"),
    Field(832, "uint64_t", "producers_waiting", 8, "bit per slot: asleep until there is room"),
    Field(896, "uint64_t", "max_depth", 0, "most bytes in use seen at a claim (statistic)"),
    Field(904, "uint64_t", "full_waits", 0, "times a producer slept for room (statistic)"),
    Field(912, "uint64_t", "empty_waits", 0, "times a consumer slept for a frame (statistic)"),
    Field(920, "uint64_t", "start", 0, "position where the stream begins"),
)

BOOKS = (
    Field(0, "uint64_t", "frames", 0, "frames: claimed (head) or passed (tail)"),
    Field(8, "uint64_t", "bytes", 0, "payload bytes of them (head), ring bytes without gaps (tail)"),
    Field(16, "uint64_t", "finished", 0, "tail: ended FINISHED; head: bytes of gaps"),
    Field(24, "uint64_t", "dropped", 0, "tail: ended DROPPED; head: refused on arrival by a drop policy"),
    Field(32, "uint64_t", "dead", 0, "tail: ended DEAD (in the dead letters)"),
    Field(40, "uint64_t", "aborted", 0, "tail: ended ABORTED (never a frame: an unfinished write)"),
    Field(48, "uint64_t", "far_dropped", 0, "tail: of dropped, how many the sink copy of this epoch told"),
    Field(56, "uint64_t", "far_dead", 0, "tail: of dead, how many the sink copy of this epoch told"),
)

SLOT = (
    Field(0, "uint32_t", "pid", 0, "process id, 0 = free; written last at registration"),
    Field(4, "uint32_t", "bell_consumer", 0, "id of the doorbell for frames, 0 = none"),
    Field(8, "uint64_t", "start", 0, "start time of the process in clock ticks after boot (/proc/pid/stat field 22)"),
    Field(16, "uint64_t", "pidns", 0, "inode of its pid namespace: pids of others prove nothing"),
    Field(24, "uint64_t", "need_tail", 0, "a waiting producer wants tail to reach this position"),
    Field(32, "uint32_t", "bell_producer", 0, "id of the doorbell for room, 0 = none"),
    Field(36, "uint32_t", "producer", 0, "1 + producer id opened by this slot on its own, 0 = none"),
    Field(40, "uint32_t", "nap_consumer", 0, "futex for frames: 1 = a thread of this slot naps on it"),
    Field(44, "uint32_t", "nap_producer", 0, "futex for room: 1 = a thread of this slot naps on it"),
)

PRODUCER = (
    Field(0, "uint32_t", "state", 0, "0 unused, 1 declared, 2 open, 3 closed"),
    Field(4, "uint32_t", "epoch", 0, "life number"),
    Field(8, "uint64_t", "aborted", 0, "its claims that recovery turned into padding"),
    Field(16, "up_claims", "claims", 2, "(position, frames so far): the larger count whose position < head is true"),
)

CLAIMS = (
    Field(0, "uint64_t", "position", 0, "where its latest claim starts"),
    Field(8, "uint64_t", "frames", 0, "frames it has claimed with it"),
)

STRUCTS = (
    ("up_frame", FRAME, GRANULE),
    ("up_books", BOOKS, 64),
    ("up_claims", CLAIMS, 16),
    ("up_slot", SLOT, 64),
    ("up_producer", PRODUCER, 64),
    ("up_control", CONTROL, CONTROL_BYTES),
)

STATES = (
    ("FREE", "no frame starts here"),
    ("CLAIMED", "a producer writes it (owner = its slot)"),
    ("COMMITTED", "ready to be taken"),
    ("TAKEN", "a consumer holds it (owner = its slot)"),
    ("AVAILABLE", "given back: to be taken again, before newer ones"),
    ("FINISHED", "done"),
    ("DROPPED", "removed by the queue's policy"),
    ("DEAD", "moved to the dead letters"),
    ("ABORTED", "padding: the write was never finished"),
    ("GAP", "no frame: claims went on at a warmer place"),
)
"""State word of a frame, at the granule where it starts: kind in bits 0-3, owner slot in 4-19, granules in 32-63."""


def _size(field: Field) -> int:
    return SIZES[field.ctype] * max(1, field.length)


def check() -> None:
    """Assert that no field overlaps the next, is misaligned or leaves its struct."""
    for name, fields, size in STRUCTS:
        end = 0
        for field in fields:
            align = min(8, SIZES[field.ctype])
            if field.offset < end or field.offset % align:
                raise AssertionError(f"layout: {name}.{field.name} at {field.offset} overlaps or is misaligned")
            end = field.offset + _size(field)
        if end > size:
            raise AssertionError(f"layout: {name} is {end} bytes, more than {size}")


def fingerprint() -> int:
    """CRC32 over the whole table (the C side adds sizeof(pthread_mutex_t))."""
    text = repr((LAYOUT_VERSION, STRUCTS, STATES, GRANULE, CONTROL_BYTES, SLOTS, PRODUCERS))
    return zlib.crc32(text.encode())


def _c_struct(name: str, fields: tuple[Field, ...], size: int) -> list[str]:
    lines, end, pads = [f"typedef struct {name} {{"], 0, 0
    for field in fields:
        if field.offset > end:
            lines.append(f"    uint8_t pad{pads}_[{field.offset - end}];")
            pads += 1
        array = f"[{field.length}]" if field.length else ""
        lines.append(f"    {field.ctype} {field.name}{array}; /* {field.doc} */")
        end = field.offset + _size(field)
    if end < size:
        lines.append(f"    uint8_t pad{pads}_[{size - end}];")
    lines.append(f"}} {name};")
    lines.append(f'_Static_assert(sizeof({name}) == {size}, "{name}");')
    for field in fields:
        lines.append(f'_Static_assert(offsetof({name}, {field.name}) == {field.offset}, "{name}.{field.name}");')
    return lines


def c_header() -> str:
    """The text of `_layout.h`."""
    lines = [
        "/* Made by `python -m upipe.memq.layout`; do not edit. */",
        "#ifndef UPIPE_LAYOUT_H",
        "#define UPIPE_LAYOUT_H",
        "#include <stddef.h>",
        "#include <stdint.h>",
        f"#define UP_MAGIC 0x{MAGIC:016x}ull",
        f"#define UP_VERSION {LAYOUT_VERSION}",
        f"#define UP_FRAME_MAGIC 0x{FRAME_MAGIC:04x}",
        f"#define UP_FINGERPRINT 0x{fingerprint():08x}u",
        f"#define UP_GRANULE {GRANULE}",
        f"#define UP_CONTROL_BYTES {CONTROL_BYTES}",
        f"#define UP_SLOTS {SLOTS}",
        f"#define UP_PRODUCERS {PRODUCERS}",
        f"#define UP_MIN_RING {MIN_RING}ull",
        f"#define UP_MAX_RING {MAX_RING}ull",
    ]
    lines += [f"#define UP_{name} {code}u /* {doc} */" for code, (name, doc) in enumerate(STATES)]
    order = [entry for entry in STRUCTS if entry[0] in ("up_books", "up_claims")]
    order += [entry for entry in STRUCTS if entry not in order]
    for name, fields, size in order:
        lines += ["", *_c_struct(name, fields, size)]
    return "\n".join([*lines, "", "#endif", ""])


def markdown(name: str) -> str:
    """One struct as a table for the documents."""
    fields = next(entry[1] for entry in STRUCTS if entry[0] == name)
    rows = ["| offset | field | type | meaning |", "|---|---|---|---|"]
    for field in fields:
        array = f"[{field.length}]" if field.length else ""
        kind = field.ctype.removesuffix("_t") + array
        rows.append(f"| {field.offset} | {field.name.rstrip('_')} | {kind} | {field.doc} |")
    return "\n".join(rows)


check()

if __name__ == "__main__":
    if "--markdown" in sys.argv:
        print("\n\n".join(f"### {entry[0]}\n\n{markdown(entry[0])}" for entry in STRUCTS))
    else:
        sys.stdout.write(c_header())
