/* Made by `python -m upipe.memq.layout`; do not edit. */
#ifndef UPIPE_LAYOUT_H
#define UPIPE_LAYOUT_H
#include <stddef.h>
#include <stdint.h>
#define UP_MAGIC 0x00514d4550495075ull
#define UP_VERSION 2
#define UP_FRAME_MAGIC 0x5055
#define UP_FINGERPRINT 0x8f8d1c9cu
#define UP_GRANULE 64
#define UP_CONTROL_BYTES 4096
#define UP_SLOTS 512
#define UP_PRODUCERS 1024
#define UP_MIN_RING 4096ull
#define UP_MAX_RING 137438953472ull
#define UP_FREE 0u /* no frame starts here */
#define UP_CLAIMED 1u /* a producer writes it (owner = its slot) */
#define UP_COMMITTED 2u /* ready to be taken */
#define UP_TAKEN 3u /* a consumer holds it (owner = its slot) */
#define UP_AVAILABLE 4u /* given back: to be taken again, before newer ones */
#define UP_FINISHED 5u /* done */
#define UP_DROPPED 6u /* removed by the queue's policy */
#define UP_DEAD 7u /* moved to the dead letters */
#define UP_ABORTED 8u /* padding: the write was never finished */
#define UP_GAP 9u /* no frame: claims went on at a warmer place */

typedef struct up_books {
    uint64_t frames; /* frames: claimed (head) or passed (tail) */
    uint64_t bytes; /* payload bytes of them (head), ring bytes without gaps (tail) */
    uint64_t finished; /* tail: ended FINISHED; head: bytes of gaps */
    uint64_t dropped; /* tail: ended DROPPED; head: refused on arrival by a drop policy */
    uint64_t dead; /* tail: ended DEAD (in the dead letters) */
    uint64_t aborted; /* tail: ended ABORTED (never a frame: an unfinished write) */
    uint64_t far_dropped; /* tail: of dropped, how many the sink copy of this epoch told */
    uint64_t far_dead; /* tail: of dead, how many the sink copy of this epoch told */
} up_books;
_Static_assert(sizeof(up_books) == 64, "up_books");
_Static_assert(offsetof(up_books, frames) == 0, "up_books.frames");
_Static_assert(offsetof(up_books, bytes) == 8, "up_books.bytes");
_Static_assert(offsetof(up_books, finished) == 16, "up_books.finished");
_Static_assert(offsetof(up_books, dropped) == 24, "up_books.dropped");
_Static_assert(offsetof(up_books, dead) == 32, "up_books.dead");
_Static_assert(offsetof(up_books, aborted) == 40, "up_books.aborted");
_Static_assert(offsetof(up_books, far_dropped) == 48, "up_books.far_dropped");
_Static_assert(offsetof(up_books, far_dead) == 56, "up_books.far_dead");

typedef struct up_claims {
    uint64_t position; /* where its latest claim starts */
    uint64_t frames; /* frames it has claimed with it */
} up_claims;
_Static_assert(sizeof(up_claims) == 16, "up_claims");
_Static_assert(offsetof(up_claims, position) == 0, "up_claims.position");
_Static_assert(offsetof(up_claims, frames) == 8, "up_claims.frames");

typedef struct up_frame {
    uint32_t crc; /* CRC32 of the payload, continued over the header with this field as 0 */
    uint16_t deliveries; /* 1 at first delivery; raised by recovery, stored together with the CRC */
    uint16_t magic; /* 0x5055 */
    uint8_t version; /* layout version */
    uint8_t flags; /* 1 INLINE, 2 REPLY, 4 ERROR, 8 SHAPE */
    uint16_t dtype; /* DType code */
    uint8_t item; /* array item code, 255 = described in the payload */
    uint8_t rank; /* array rank */
    uint16_t producer; /* producer id in this queue */
    uint32_t epoch; /* life number of that producer */
    uint32_t key; /* hash of the partition key, 0 = none */
    uint64_t size; /* payload bytes */
    uint64_t position; /* byte position of this header in the ring's stream */
    uint64_t execution; /* execution id of a call, 0 = none */
    uint64_t timestamp; /* ns since 1970 when it was written, or up to 4 us before */
    uint64_t inline_; /* payload of at most 8 bytes, or packed dims */
} up_frame;
_Static_assert(sizeof(up_frame) == 64, "up_frame");
_Static_assert(offsetof(up_frame, crc) == 0, "up_frame.crc");
_Static_assert(offsetof(up_frame, deliveries) == 4, "up_frame.deliveries");
_Static_assert(offsetof(up_frame, magic) == 6, "up_frame.magic");
_Static_assert(offsetof(up_frame, version) == 8, "up_frame.version");
_Static_assert(offsetof(up_frame, flags) == 9, "up_frame.flags");
_Static_assert(offsetof(up_frame, dtype) == 10, "up_frame.dtype");
_Static_assert(offsetof(up_frame, item) == 12, "up_frame.item");
_Static_assert(offsetof(up_frame, rank) == 13, "up_frame.rank");
_Static_assert(offsetof(up_frame, producer) == 14, "up_frame.producer");
_Static_assert(offsetof(up_frame, epoch) == 16, "up_frame.epoch");
_Static_assert(offsetof(up_frame, key) == 20, "up_frame.key");
_Static_assert(offsetof(up_frame, size) == 24, "up_frame.size");
_Static_assert(offsetof(up_frame, position) == 32, "up_frame.position");
_Static_assert(offsetof(up_frame, execution) == 40, "up_frame.execution");
_Static_assert(offsetof(up_frame, timestamp) == 48, "up_frame.timestamp");
_Static_assert(offsetof(up_frame, inline_) == 56, "up_frame.inline_");

typedef struct up_slot {
    uint32_t pid; /* process id, 0 = free; written last at registration */
    uint32_t bell_consumer; /* id of the doorbell for frames, 0 = none */
    uint64_t start; /* start time of the process in clock ticks after boot (/proc/pid/stat field 22) */
    uint64_t pidns; /* inode of its pid namespace: pids of others prove nothing */
    uint64_t need_tail; /* a waiting producer wants tail to reach this position */
    uint32_t bell_producer; /* id of the doorbell for room, 0 = none */
    uint32_t producer; /* 1 + producer id opened by this slot on its own, 0 = none */
    uint32_t nap_consumer; /* futex for frames: 1 = a thread of this slot naps on it */
    uint32_t nap_producer; /* futex for room: 1 = a thread of this slot naps on it */
    uint8_t pad0_[16];
} up_slot;
_Static_assert(sizeof(up_slot) == 64, "up_slot");
_Static_assert(offsetof(up_slot, pid) == 0, "up_slot.pid");
_Static_assert(offsetof(up_slot, bell_consumer) == 4, "up_slot.bell_consumer");
_Static_assert(offsetof(up_slot, start) == 8, "up_slot.start");
_Static_assert(offsetof(up_slot, pidns) == 16, "up_slot.pidns");
_Static_assert(offsetof(up_slot, need_tail) == 24, "up_slot.need_tail");
_Static_assert(offsetof(up_slot, bell_producer) == 32, "up_slot.bell_producer");
_Static_assert(offsetof(up_slot, producer) == 36, "up_slot.producer");
_Static_assert(offsetof(up_slot, nap_consumer) == 40, "up_slot.nap_consumer");
_Static_assert(offsetof(up_slot, nap_producer) == 44, "up_slot.nap_producer");

typedef struct up_producer {
    uint32_t state; /* 0 unused, 1 declared, 2 open, 3 closed */
    uint32_t epoch; /* life number */
    uint64_t aborted; /* its claims that recovery turned into padding */
    up_claims claims[2]; /* (position, frames so far): the larger count whose position < head is true */
    uint8_t pad0_[16];
} up_producer;
_Static_assert(sizeof(up_producer) == 64, "up_producer");
_Static_assert(offsetof(up_producer, state) == 0, "up_producer.state");
_Static_assert(offsetof(up_producer, epoch) == 4, "up_producer.epoch");
_Static_assert(offsetof(up_producer, aborted) == 8, "up_producer.aborted");
_Static_assert(offsetof(up_producer, claims) == 16, "up_producer.claims");

typedef struct up_control {
    uint64_t magic; /* 'uPIPEMQ'; written last at creation */
    uint32_t version; /* layout version */
    uint32_t fingerprint; /* CRC32 of this table and sizeof(pthread_mutex_t) */
    uint64_t capacity; /* ring bytes, a power of two */
    uint64_t total; /* bytes of the whole segment */
    uint64_t max_frames; /* most frames in the ring at a time, 0 = only bytes count */
    uint32_t options; /* 1 refuse pickle, 2 no CRC check, 4 a supervisor recovers */
    uint32_t policy; /* 0 block, 1 drop_oldest, 2 latest, 3 discard; may change while in use */
    uint32_t stream; /* 0 no producer yet, 1 open, 2 all closed; guarded by the registry lock */
    uint32_t joined; /* count of slot registrations: tells watchers to look again */
    uint64_t created; /* ns since 1970 */
    uint8_t pad0_[64];
    uint64_t registry_lock[8]; /* robust mutex over slots, producers and stream */
    uint64_t producer_lock[8]; /* robust mutex of the producers' end */
    uint64_t head; /* position after the last claimed frame | selector of head_books */
    uint64_t cached_tail; /* producers' copy of tail; guarded by producer_lock */
    uint64_t last; /* position of the newest frame; a hint, guarded by producer_lock */
    uint32_t producer_cpu; /* 1 + CPU of the last claim: a consumer on the same one gives way */
    uint8_t pad1_[4];
    uint64_t jump_from; /* where the latest jump's gap starts; guarded by producer_lock */
    uint64_t jump_to; /* where it ends; true once head is behind it; guarded by producer_lock */
    uint8_t pad2_[16];
    up_books head_books[2]; /* claimed frames and bytes, refused frames; the selected one is true */
    uint64_t consumer_lock[8]; /* robust mutex of the consumers' end */
    uint64_t next; /* position of the next frame to be taken; guarded by consumer_lock */
    uint64_t cached_head; /* consumers' copy of head; guarded by consumer_lock */
    uint64_t redeliver; /* AVAILABLE frames before next; guarded by consumer_lock, recountable */
    uint64_t redelivered; /* frames given back so far (statistic) */
    uint64_t corrupt; /* frames refused for their CRC (statistic) */
    uint64_t taken; /* frames taken so far (statistic) */
    uint32_t mirror; /* 0 none, 1 source copy (taken by its mirror only), 2 sink copy (written so) */
    uint32_t consumer_cpu; /* 1 + CPU of the last take: a producer on the same one does not spin */
    uint64_t mirror_epoch; /* number of the pair of copies; guarded by consumer_lock as mirror is */
    uint64_t tail; /* position before which everything is finished | selector of tail_books */
    uint8_t pad3_[56];
    up_books tail_books[2]; /* frames that tail passed, by how they ended; the selected one is true */
    uint64_t consumers_waiting[8]; /* bit per slot: asleep until a frame comes */
    uint64_t producers_waiting[8]; /* bit per slot: asleep until there is room */
    uint64_t max_depth; /* most bytes in use seen at a claim (statistic) */
    uint64_t full_waits; /* times a producer slept for room (statistic) */
    uint64_t empty_waits; /* times a consumer slept for a frame (statistic) */
    uint64_t start; /* position where the stream begins */
    uint8_t pad4_[3168];
} up_control;
_Static_assert(sizeof(up_control) == 4096, "up_control");
_Static_assert(offsetof(up_control, magic) == 0, "up_control.magic");
_Static_assert(offsetof(up_control, version) == 8, "up_control.version");
_Static_assert(offsetof(up_control, fingerprint) == 12, "up_control.fingerprint");
_Static_assert(offsetof(up_control, capacity) == 16, "up_control.capacity");
_Static_assert(offsetof(up_control, total) == 24, "up_control.total");
_Static_assert(offsetof(up_control, max_frames) == 32, "up_control.max_frames");
_Static_assert(offsetof(up_control, options) == 40, "up_control.options");
_Static_assert(offsetof(up_control, policy) == 44, "up_control.policy");
_Static_assert(offsetof(up_control, stream) == 48, "up_control.stream");
_Static_assert(offsetof(up_control, joined) == 52, "up_control.joined");
_Static_assert(offsetof(up_control, created) == 56, "up_control.created");
_Static_assert(offsetof(up_control, registry_lock) == 128, "up_control.registry_lock");
_Static_assert(offsetof(up_control, producer_lock) == 192, "up_control.producer_lock");
_Static_assert(offsetof(up_control, head) == 256, "up_control.head");
_Static_assert(offsetof(up_control, cached_tail) == 264, "up_control.cached_tail");
_Static_assert(offsetof(up_control, last) == 272, "up_control.last");
_Static_assert(offsetof(up_control, producer_cpu) == 280, "up_control.producer_cpu");
_Static_assert(offsetof(up_control, jump_from) == 288, "up_control.jump_from");
_Static_assert(offsetof(up_control, jump_to) == 296, "up_control.jump_to");
_Static_assert(offsetof(up_control, head_books) == 320, "up_control.head_books");
_Static_assert(offsetof(up_control, consumer_lock) == 448, "up_control.consumer_lock");
_Static_assert(offsetof(up_control, next) == 512, "up_control.next");
_Static_assert(offsetof(up_control, cached_head) == 520, "up_control.cached_head");
_Static_assert(offsetof(up_control, redeliver) == 528, "up_control.redeliver");
_Static_assert(offsetof(up_control, redelivered) == 536, "up_control.redelivered");
_Static_assert(offsetof(up_control, corrupt) == 544, "up_control.corrupt");
_Static_assert(offsetof(up_control, taken) == 552, "up_control.taken");
_Static_assert(offsetof(up_control, mirror) == 560, "up_control.mirror");
_Static_assert(offsetof(up_control, consumer_cpu) == 564, "up_control.consumer_cpu");
_Static_assert(offsetof(up_control, mirror_epoch) == 568, "up_control.mirror_epoch");
_Static_assert(offsetof(up_control, tail) == 576, "up_control.tail");
_Static_assert(offsetof(up_control, tail_books) == 640, "up_control.tail_books");
_Static_assert(offsetof(up_control, consumers_waiting) == 768, "up_control.consumers_waiting");
_Static_assert(offsetof(up_control, producers_waiting) == 832, "up_control.producers_waiting");
_Static_assert(offsetof(up_control, max_depth) == 896, "up_control.max_depth");
_Static_assert(offsetof(up_control, full_waits) == 904, "up_control.full_waits");
_Static_assert(offsetof(up_control, empty_waits) == 912, "up_control.empty_waits");
_Static_assert(offsetof(up_control, start) == 920, "up_control.start");

#endif
