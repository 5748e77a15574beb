/* The segment: result codes, words, the handle, creating and attaching, counters that are read without a lock.
 * Owner of the file: the session that created it (segment.py). After kill -9 the mapping goes with the process, and the next
 * sweep removes the file of a dead session. */
#ifndef UPIPE_SEGMENT_H
#define UPIPE_SEGMENT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "_crc_back.h"
#include "_layout.h"

enum {
    UP_OK = 0,
    UP_FULL = -1,    /* no room now */
    UP_EMPTY = -2,   /* nothing to take now */
    UP_END = -3,     /* nothing will ever come */
    UP_TOOBIG = -4,  /* can never fit */
    UP_STUCK = -5,   /* lock not had before the deadline */
    UP_NOTYOURS = -6,/* the frame is not held by this handle */
    UP_REFUSED = -7, /* drop policy: the new frame itself was dropped and counted */
    UP_NOSLOT = -8,  /* no free slot or producer id */
    UP_ALIVE = -9,   /* recovery refused: the owner is not proven dead */
    UP_SYSTEM = -10, /* errno tells */
    UP_FOREIGN = -11,
    UP_OTHERVERSION = -12,
    UP_TRUNCATED = -13,
    UP_STALE = -14,     /* a mirror of a later epoch was here */
    UP_MALFORMED = -15, /* what came from another node is no run of frames; nothing was changed */
    UP_CORRUPT = -16,   /* a frame's bytes do not match its CRC */
};
enum { UP_POLICY_BLOCK = 0, UP_POLICY_DROP_OLDEST = 1, UP_POLICY_LATEST = 2, UP_POLICY_DISCARD = 3 };
enum { UP_OPT_NO_PICKLE = 1, UP_OPT_NO_CRC = 2, UP_OPT_SUPERVISED = 4 };
enum { UP_FLAG_INLINE = 1, UP_FLAG_REPLY = 2, UP_FLAG_ERROR = 4, UP_FLAG_SHAPE = 8 };
enum { UP_PRODUCER_UNUSED = 0, UP_PRODUCER_DECLARED = 1, UP_PRODUCER_OPEN = 2, UP_PRODUCER_CLOSED = 3 };
enum { UP_MIRROR_NONE = 0, UP_MIRROR_SOURCE = 1, UP_MIRROR_SINK = 2 };
enum { UP_STREAM_NEW = 0, UP_STREAM_OPEN = 1, UP_STREAM_CLOSED = 2 };
#define UP_NONE 0xffffffffu
#define UP_HOT __attribute__((hot)) /* a small frame comes by, also past a sleep: laid side by side (_ring.pyx says why) */

#define UP_LD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define UP_LDA(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define UP_ST(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define UP_STR(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

/* Named points between two stores whose order a survivor relies on: stores stay on their side (no instruction is made). A
 * test build kills the process here; tests/native runs through every name it finds in these files. */
#ifndef UP_CRASH
#define UP_CRASH(point) __atomic_signal_fence(__ATOMIC_SEQ_CST)
#endif

#if defined(__x86_64__)
#define UP_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define UP_PAUSE() __asm__ volatile("yield")
#else
#error "uPipe runs on x86-64 and aarch64"
#endif

static inline uint32_t up_cpu(void) { return (uint32_t)sched_getcpu() + 1; } /* a load: glibc keeps it (rseq) */

typedef struct up_ring { /* one handle: process-local */
    up_control *c;
    up_slot *slots;
    up_producer *producers;
    uint64_t *state;
    uint8_t *bytes; /* mapped twice in a row, so that no frame wraps */
    uint64_t capacity, mask;
    size_t mapped;
    uint32_t slot;     /* own slot, UP_NONE before joining */
    uint32_t left;     /* 1 once this handle gave its slot up: another process may be in it */
    uint32_t producer; /* own producer id, UP_NONE before the first put */
    uint32_t epoch;
    uint32_t turn;     /* which of its two claims entries was written last */
    uint64_t produced; /* frames claimed under that id so far */
    uint64_t root_hash;
    char root[160]; /* directory of the sessions, for doorbells */
} up_ring;

typedef struct up_meta { /* what the writer of a frame decides */
    uint16_t dtype;
    uint8_t flags, item, rank;
    uint32_t key;
    uint64_t size, inline_, execution, timestamp;
} up_meta;

static inline void up_fence(up_ring *r) {
#ifdef __SANITIZE_THREAD__ /* knows no fences; the variables are atomics in any case */
    (void)__atomic_fetch_add(&r->mapped, 0, __ATOMIC_SEQ_CST);
#else
    (void)r;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

static inline int up_joined(const up_ring *r) { return r->slot < UP_SLOTS && !UP_LD(&r->left); }

static inline uint64_t up_now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* ------------------------------------------------------------------ words */

/* State word: kind in bits 0-3, owner slot in 4-19, note in 20-31, granules in 32-63. */
static inline uint32_t up_kind(uint64_t word) { return (uint32_t)(word & 15); }
static inline uint32_t up_owner(uint64_t word) { return (uint32_t)(word >> 4) & 0xffff; }
static inline uint32_t up_note(uint64_t word) { return (uint32_t)(word >> 20) & 0xfff; }
static inline uint64_t up_span(uint64_t word) { return (word >> 32) * UP_GRANULE; } /* bytes */
static inline uint64_t up_word(uint32_t kind, uint32_t owner, uint64_t span) {
    return (uint64_t)kind | ((uint64_t)(owner & 0xffff) << 4) | ((span / UP_GRANULE) << 32);
}

/* Note of the value that a counter elsewhere is about to get; 0 = no note. The counter moves by one, so 12 bits tell. */
static inline uint32_t up_note_of(uint64_t value) { return (uint32_t)(value % 4095) + 1; }
static inline uint64_t up_noted(uint64_t word, uint64_t value) {
    return (word & ~(0xfffull << 20)) | (uint64_t)up_note_of(value) << 20;
}

static inline uint64_t *up_state_at(up_ring *r, uint64_t pos) { return &r->state[(pos & r->mask) / UP_GRANULE]; }
static inline up_frame *up_frame_at(up_ring *r, uint64_t pos) { return (up_frame *)(r->bytes + (pos & r->mask)); }
static inline uint8_t *up_payload(up_ring *r, uint64_t pos) { return (uint8_t *)up_frame_at(r, pos) + UP_GRANULE; }
static inline uint64_t up_position(uint64_t word) { return word & ~(uint64_t)63; }
static inline uint64_t up_need(uint64_t size, uint8_t flags) { /* ring bytes of a frame */
    return (flags & UP_FLAG_INLINE) ? UP_GRANULE : (UP_GRANULE + size + UP_GRANULE - 1) & ~(uint64_t)(UP_GRANULE - 1);
}

/* The frame after the one at `at`; `end` when its word was destroyed, so that no walk spins for ever under a lock. */
static inline uint64_t up_after(uint64_t at, uint64_t word, uint64_t end) {
    return up_span(word) ? at + up_span(word) : end;
}

/* Counters and their position as one moment's truth, lock-free. The word may come back to an old value only by refusals and
 * by a frame in the place of a dropped one: the same number of frames, and one counter more or less. SYNC books */
static void up_books_read(uint64_t *word, up_books *books, uint64_t *pos, up_books *out) {
    uint64_t before, after = UP_LDA(word);
    do {
        before = after;
        const uint64_t *from = (const uint64_t *)&books[before & 1];
        uint64_t *to = (uint64_t *)out;
        for (size_t i = 0; i < sizeof *out / 8; i++) to[i] = UP_LDA(&from[i]);
        after = UP_LDA(word);
    } while (before != after);
    *pos = up_position(before);
}

/* Ring bytes that frames use: between the two positions, without gaps. */
static inline uint64_t up_in_use(up_ring *r, uint64_t head, const up_books *claimed, const up_books *passed) {
    return head - UP_LD(&claimed->finished) - UP_LD(&r->c->start) - UP_LD(&passed->bytes);
}

/* ------------------------------------------------------------------ mapping */

static inline uint64_t up_page(uint64_t n) { return (n + 4095) & ~(uint64_t)4095; }
static inline uint64_t up_state_offset(void) {
    return UP_CONTROL_BYTES + up_page(UP_SLOTS * sizeof(up_slot)) + up_page(UP_PRODUCERS * sizeof(up_producer));
}
static inline uint64_t up_ring_offset(uint64_t capacity) { return up_state_offset() + up_page(capacity / UP_GRANULE * 8); }
static inline uint64_t up_total(uint64_t capacity) { return up_ring_offset(capacity) + capacity; }
static inline uint64_t up_capacity_for(uint64_t wanted) { /* a power of two, so that an offset is a mask */
    uint64_t capacity = UP_MIN_RING;
    while (capacity < wanted && capacity < UP_MAX_RING) capacity *= 2;
    return capacity;
}
static inline uint32_t up_fingerprint(void) { return UP_FINGERPRINT ^ (uint32_t)sizeof(pthread_mutex_t); }

static int up_map(up_ring *r, int fd, uint64_t capacity) {
    uint64_t offset = up_ring_offset(capacity), total = up_total(capacity);
    uint8_t *base = mmap(NULL, total + capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return UP_SYSTEM;
    if (mmap(base, total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED ||
        mmap(base + total, capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) == MAP_FAILED) {
        munmap(base, total + capacity);
        return UP_SYSTEM;
    }
    r->c = (up_control *)base;
    r->slots = (up_slot *)(base + UP_CONTROL_BYTES);
    r->producers = (up_producer *)(base + UP_CONTROL_BYTES + up_page(UP_SLOTS * sizeof(up_slot)));
    r->state = (uint64_t *)(base + up_state_offset());
    r->bytes = base + offset;
    r->capacity = capacity;
    r->mask = capacity - 1;
    r->mapped = total + capacity;
    r->slot = r->producer = UP_NONE;
    r->produced = 0;
    r->epoch = r->turn = r->left = 0;
    return UP_OK;
}

/* Nobody may be inside a lock of this mapping: the kernel would look for a dead holder's lock where nothing is any more. */
static void up_unmap(up_ring *r) {
    if (r->c) munmap((void *)r->c, r->mapped);
    r->c = NULL;
}

static int up_lock_init(uint64_t *area) {
    pthread_mutexattr_t attr;
    _Static_assert(sizeof(pthread_mutex_t) <= 64, "the mutex has a cache line of its own");
    if (pthread_mutexattr_init(&attr)) return UP_SYSTEM;
    int rc = pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED) ||
             pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST) || pthread_mutex_init((pthread_mutex_t *)area, &attr);
    pthread_mutexattr_destroy(&attr);
    return rc ? UP_SYSTEM : UP_OK;
}

/* Format a fresh, zeroed file of up_total(capacity) bytes; its stream begins at position `start`, a multiple of 64. The magic
 * is written last: nobody attaches to half a queue. */
static int up_create(up_ring *r, int fd, uint64_t capacity, uint32_t policy, uint64_t max_frames, uint32_t options,
                     uint64_t start) {
    int rc = up_map(r, fd, capacity);
    if (rc != UP_OK) return rc;
    up_control *c = r->c;
    c->version = UP_VERSION;
    c->fingerprint = up_fingerprint();
    c->capacity = capacity;
    c->total = up_total(capacity);
    c->max_frames = max_frames;
    c->options = options;
    c->policy = policy;
    c->created = up_now_ns(CLOCK_REALTIME);
    c->head = c->last = c->cached_head = c->next = c->tail = c->cached_tail = up_position(start);
    c->start = c->jump_from = c->jump_to = up_position(start);
    if (up_lock_init(c->registry_lock) || up_lock_init(c->producer_lock) || up_lock_init(c->consumer_lock)) {
        up_unmap(r);
        return UP_SYSTEM;
    }
    UP_CRASH("create");
    UP_STR(&c->magic, UP_MAGIC);
    return UP_OK;
}

/* Check the file before mapping it. found receives the version and the fingerprint that the file carries. */
static int up_attach(up_ring *r, int fd, uint32_t found[2]) {
    struct stat st;
    up_control head = {0}, *c = &head;
    found[0] = found[1] = 0;
    if (fstat(fd, &st)) return UP_SYSTEM;
    ssize_t got = pread(fd, c, sizeof head, 0);
    if (got < 0) return UP_SYSTEM;
    if (c->magic != UP_MAGIC) return UP_FOREIGN;
    if (got < (ssize_t)sizeof head) return UP_TRUNCATED;
    found[0] = c->version, found[1] = c->fingerprint;
    if (c->version != UP_VERSION || c->fingerprint != up_fingerprint()) return UP_OTHERVERSION;
    if (c->capacity < UP_MIN_RING || c->capacity > UP_MAX_RING || (c->capacity & (c->capacity - 1))) return UP_FOREIGN;
    if (c->total != up_total(c->capacity) || (uint64_t)st.st_size < c->total) return UP_TRUNCATED;
    return up_map(r, fd, c->capacity);
}

#endif
