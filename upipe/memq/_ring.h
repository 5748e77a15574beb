/* The ring: frames of any size, any number of producers and consumers, in one shared mapping. C11, no Python.
 *
 * Life of a frame (its state word stands at the granule where it starts):
 *
 *     producer:  claim -> CLAIMED -> write -> COMMITTED           (put of a small frame: COMMITTED at once, under the lock)
 *                                 \-> ABORTED (padding)
 *     consumer:  take  -> TAKEN   -> read  -> FINISHED | DEAD     then tail passes it and the bytes are free again
 *                                 \-> AVAILABLE -> TAKEN ...      (given back, or its holder died)
 *                COMMITTED -> DROPPED                             (drop policies)
 *
 * Order of positions: tail <= next <= head <= tail + capacity, all monotonic and multiples of 64.
 *
 * Two locks, one per end, never nested, never on one cache line: producer_lock guards head, head_books, cached_tail, the claims
 * of producers; consumer_lock guards next, tail, tail_books, redeliver and every change of a COMMITTED state. Both are
 * robust: when a holder dies the kernel hands the lock over (EOWNERDEAD) and the next holder repairs. Payloads move outside.
 *
 * Commit points are single 8-byte stores, so a crash leaves the old truth or the new one:
 *   - a claim exists once `head` moved (the state word was written before, beyond head nobody looks);
 *   - a take exists once the state word says TAKEN (the repair puts a TAKEN at or after `next` back to COMMITTED);
 *   - the low bit of head and tail selects one of two books, written before: position and counters change together.
 *
 * SYNC head:    release in up_publish,        acquire in up_refresh_head        (state word and small payload before it)
 * SYNC commit:  release in up_commit,         acquire in up_take                (payload before it)
 * SYNC tail:    release in up_advance,        acquire in up_refresh_tail        (reads of the payload before it)
 * SYNC waiting: bit set, fence, look again in up_arm_*;  commit or advance, fence, read bits in up_wake_*   (Dekker)
 */
#ifndef UPIPE_RING_H
#define UPIPE_RING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdlib.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#include "_bell.h"
#include "_crc.h"
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
};
enum { UP_POLICY_BLOCK = 0, UP_POLICY_DROP_OLDEST = 1, UP_POLICY_LATEST = 2, UP_POLICY_DISCARD = 3 };
enum { UP_OPT_NO_PICKLE = 1, UP_OPT_NO_CRC = 2, UP_OPT_SUPERVISED = 4 };
enum { UP_FLAG_INLINE = 1, UP_FLAG_REPLY = 2, UP_FLAG_ERROR = 4, UP_FLAG_SHAPE = 8 };
enum { UP_PRODUCER_UNUSED = 0, UP_PRODUCER_DECLARED = 1, UP_PRODUCER_OPEN = 2, UP_PRODUCER_CLOSED = 3 };
enum { UP_STREAM_NEW = 0, UP_STREAM_OPEN = 1, UP_STREAM_CLOSED = 2 };
#define UP_NONE 0xffffffffu

#define UP_LD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define UP_LDA(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define UP_ST(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define UP_STR(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

/* Named points where a test build kills the process; nothing otherwise. */
#ifndef UP_CRASH
#define UP_CRASH(point) ((void)0)
#endif

#if defined(__x86_64__)
#define UP_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define UP_PAUSE() __asm__ volatile("yield")
#else
#error "uPipe runs on x86-64 and aarch64"
#endif

typedef struct up_ring { /* one handle: process-local */
    up_control *c;
    up_slot *slots;
    up_producer *producers;
    uint64_t *state;
    uint8_t *bytes; /* mapped twice in a row, so that no frame wraps */
    uint64_t capacity, mask;
    size_t mapped;
    uint32_t slot;     /* own slot, UP_NONE before joining */
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

static inline uint64_t up_now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline uint32_t up_kind(uint64_t word) { return (uint32_t)(word & 15); }
static inline uint32_t up_owner(uint64_t word) { return (uint32_t)(word >> 4) & 0xffff; }
static inline uint64_t up_span(uint64_t word) { return (word >> 32) * UP_GRANULE; } /* bytes */
static inline uint64_t up_word(uint32_t kind, uint32_t owner, uint64_t span) {
    return (uint64_t)kind | ((uint64_t)(owner & 0xffff) << 4) | ((span / UP_GRANULE) << 32);
}
static inline uint64_t *up_state_at(up_ring *r, uint64_t pos) { return &r->state[(pos & r->mask) / UP_GRANULE]; }
static inline up_frame *up_frame_at(up_ring *r, uint64_t pos) { return (up_frame *)(r->bytes + (pos & r->mask)); }
static inline uint64_t up_need(uint64_t size, uint8_t flags) { /* ring bytes of a frame */
    return (flags & UP_FLAG_INLINE) ? UP_GRANULE : (UP_GRANULE + size + UP_GRANULE - 1) & ~(uint64_t)(UP_GRANULE - 1);
}
static inline uint64_t up_position(uint64_t word) { return word & ~(uint64_t)63; }

/* ------------------------------------------------------------------ locks */

static inline pthread_mutex_t *up_mutex(uint64_t *area) { return (pthread_mutex_t *)area; }
static void up_repair_producer(up_ring *r);
static void up_repair_consumer(up_ring *r);
static void up_recount_stream(up_ring *r);

static int up_lock_result(up_ring *r, uint64_t *area, int rc) {
    if (rc == EOWNERDEAD) { /* the holder died inside: mend what it left, then the lock is ours */
        if (area == r->c->producer_lock) up_repair_producer(r);
        if (area == r->c->consumer_lock) up_repair_consumer(r);
        if (area == r->c->registry_lock) up_recount_stream(r);
        pthread_mutex_consistent(up_mutex(area));
        rc = 0;
    }
    return rc == 0 ? UP_OK : UP_STUCK;
}

static inline int up_trylock(up_ring *r, uint64_t *area) { /* short spin; the critical sections are tens of ns */
    int rc = pthread_mutex_trylock(up_mutex(area));
    for (int i = 0; rc == EBUSY && i < 200; i++) {
        UP_PAUSE();
        rc = pthread_mutex_trylock(up_mutex(area));
    }
    return __builtin_expect(rc == 0, 1) ? UP_OK : up_lock_result(r, area, rc);
}

static int up_lock(up_ring *r, uint64_t *area, double seconds) { /* may sleep: call it without the GIL */
    struct timespec until;
    if (up_trylock(r, area) == UP_OK) return UP_OK;
    clock_gettime(CLOCK_REALTIME, &until);
    uint64_t ns = (uint64_t)until.tv_sec * 1000000000ull + (uint64_t)until.tv_nsec + (uint64_t)(seconds * 1e9);
    until.tv_sec = (time_t)(ns / 1000000000ull);
    until.tv_nsec = (long)(ns % 1000000000ull);
    return up_lock_result(r, area, pthread_mutex_timedlock(up_mutex(area), &until));
}

static inline void up_unlock(uint64_t *area) { pthread_mutex_unlock(up_mutex(area)); }

/* ------------------------------------------------------------------ segment */

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
    r->epoch = 0;
    return UP_OK;
}

static void up_unmap(up_ring *r) {
    if (r->c) munmap((void *)r->c, r->mapped);
    r->c = NULL;
}

static int up_lock_init(uint64_t *area) {
    pthread_mutexattr_t attr;
    _Static_assert(sizeof(pthread_mutex_t) <= 64, "the mutex has a cache line of its own");
    if (pthread_mutexattr_init(&attr)) return UP_SYSTEM;
    int rc = pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED) ||
             pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST) || pthread_mutex_init(up_mutex(area), &attr);
    pthread_mutexattr_destroy(&attr);
    return rc ? UP_SYSTEM : UP_OK;
}

/* Format a fresh, zeroed file of up_total(capacity) bytes. The magic is written last: nobody attaches to half a queue. */
static int up_create(up_ring *r, int fd, uint64_t capacity, uint32_t policy, uint64_t max_frames, uint32_t options) {
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
    if (up_lock_init(c->registry_lock) || up_lock_init(c->producer_lock) || up_lock_init(c->consumer_lock)) {
        up_unmap(r);
        return UP_SYSTEM;
    }
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

/* ------------------------------------------------------------------ waking */

static int up_bell_slot(up_ring *r, uint32_t slot, int producer) {
    up_slot *s = &r->slots[slot];
    uint32_t pid = UP_LDA(&s->pid), id = producer ? UP_LD(&s->bell_producer) : UP_LD(&s->bell_consumer);
    return pid && id ? up_bell_ring(r->root, r->root_hash, pid, UP_LD(&s->start), id) : -1;
}

/* Wake up to `count` sleeping consumers. A bell that nobody hears belongs to the dead: wake another. */
static void up_wake_consumers_slow(up_ring *r, uint64_t count) {
    static uint32_t turn; /* spreads the wakes; a lost increment does no harm */
    uint32_t first = __atomic_fetch_add(&turn, 1, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < UP_SLOTS / 64 && count; i++) {
        uint64_t *bits = &r->c->consumers_waiting[i], seen;
        while (count && (seen = UP_LD(bits)) != 0) {
            uint32_t rot = first & 63, bit;
            uint64_t turned = rot ? (seen >> rot) | (seen << (64 - rot)) : seen;
            bit = ((uint32_t)__builtin_ctzll(turned) + rot) & 63;
            if (!(__atomic_fetch_and(bits, ~(1ull << bit), __ATOMIC_SEQ_CST) & (1ull << bit))) continue;
            UP_CRASH("wake");
            if (up_bell_slot(r, i * 64 + bit, 0) == 0) count--;
        }
    }
}

static inline uint64_t up_any(uint64_t *bits) {
    uint64_t any = 0;
    for (int i = 0; i < UP_SLOTS / 64; i++) any |= UP_LD(&bits[i]);
    return any;
}

static inline void up_wake_consumers(up_ring *r, uint64_t count) { /* SYNC waiting */
    up_fence(r);
    if (__builtin_expect(up_any(r->c->consumers_waiting) != 0, 0)) up_wake_consumers_slow(r, count);
}

/* Wake every producer whose room is there now (need_tail), or all of them. */
static void up_wake_producers_slow(up_ring *r, int all) {
    uint64_t tail = up_position(UP_LDA(&r->c->tail));
    for (uint32_t i = 0; i < UP_SLOTS / 64; i++) {
        uint64_t *bits = &r->c->producers_waiting[i];
        for (uint64_t seen = UP_LD(bits); seen; seen &= seen - 1) {
            uint32_t bit = (uint32_t)__builtin_ctzll(seen);
            if (!all && UP_LD(&r->slots[i * 64 + bit].need_tail) > tail) continue;
            if (__atomic_fetch_and(bits, ~(1ull << bit), __ATOMIC_SEQ_CST) & (1ull << bit)) up_bell_slot(r, i * 64 + bit, 1);
        }
    }
}

static inline void up_wake_producers(up_ring *r) { /* SYNC waiting */
    up_fence(r);
    if (__builtin_expect(up_any(r->c->producers_waiting) != 0, 0)) up_wake_producers_slow(r, 0);
}

static void up_wake_all(up_ring *r) {
    up_fence(r);
    up_wake_consumers_slow(r, UP_SLOTS);
    up_wake_producers_slow(r, 1);
}

static inline void up_arm(up_ring *r, uint64_t *bits) { /* SYNC waiting: after this, look again before sleeping */
    __atomic_fetch_or(&bits[r->slot / 64], 1ull << (r->slot & 63), __ATOMIC_SEQ_CST);
    up_fence(r);
}

/* 1 when nobody had woken us: otherwise the caller owes the wake to another if it leaves without taking. */
static inline int up_disarm(up_ring *r, uint64_t *bits) {
    uint64_t bit = 1ull << (r->slot & 63);
    return (__atomic_fetch_and(&bits[r->slot / 64], ~bit, __ATOMIC_SEQ_CST) & bit) != 0;
}

/* ------------------------------------------------------------------ producers' end (caller holds producer_lock) */

static inline uint64_t up_refresh_tail(up_ring *r) { /* SYNC tail */
    return r->c->cached_tail = up_position(UP_LDA(&r->c->tail));
}

static void up_books_read(uint64_t *word, up_books *books, uint64_t *pos, up_books *out) { /* consistent pair, lock-free */
    uint64_t before, after = UP_LDA(word);
    do {
        before = after;
        const uint64_t *from = (const uint64_t *)&books[before & 1];
        uint64_t *to = (uint64_t *)out;
        for (size_t i = 0; i < sizeof *out / 8; i++) to[i] = UP_LD(&from[i]);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        after = UP_LDA(word);
    } while (before != after);
    *pos = up_position(before);
}

/* Room for `need` more bytes and `frames` more frames? UP_OK or UP_FULL. */
static inline int up_room(up_ring *r, uint64_t need, uint64_t frames) {
    up_control *c = r->c;
    uint64_t end = up_position(UP_LD(&c->head)) + need;
    if (end - c->cached_tail > r->capacity && end - up_refresh_tail(r) > r->capacity) return UP_FULL;
    if (__builtin_expect(c->max_frames != 0, 0)) {
        up_books passed;
        uint64_t pos;
        up_books_read(&c->tail, c->tail_books, &pos, &passed);
        if (UP_LD(&c->head_books[UP_LD(&c->head) & 1].frames) - passed.frames + frames > c->max_frames) return UP_FULL;
    }
    return UP_OK;
}

/* Move head over `need` bytes holding `frames` frames; state words were written before. The commit point of a claim. */
static inline void up_publish(up_ring *r, uint64_t need, uint64_t frames, uint64_t bytes) {
    up_control *c = r->c;
    uint64_t word = UP_LD(&c->head), pos = up_position(word), old = word & 1, new_ = old ^ 1;
    up_books *b = c->head_books;
    if (r->producer != UP_NONE) { /* how far this producer came: the entry counts once head passed its position */
        up_claims *mine = &r->producers[r->producer].claims[r->turn ^= 1]; /* the other entry stays true until then */
        UP_STR(&mine->frames, 0);
        UP_STR(&mine->position, pos);
        r->produced += frames;
        UP_STR(&mine->frames, r->produced);
    }
    UP_ST(&b[new_].frames, UP_LD(&b[old].frames) + frames);
    UP_ST(&b[new_].bytes, UP_LD(&b[old].bytes) + bytes);
    UP_ST(&b[new_].dropped, UP_LD(&b[old].dropped));
    UP_CRASH("publish");
    UP_STR(&c->head, (pos + need) | new_); /* SYNC head */
    UP_CRASH("published");
}

/* After EOWNERDEAD: a claim that head did not reach never happened; void the producer's note of it before head goes on. */
static void up_repair_producer(up_ring *r) {
    uint64_t head = up_position(UP_LD(&r->c->head));
    for (uint32_t i = 0; i < UP_PRODUCERS; i++)
        for (int k = 0; k < 2; k++) {
            up_claims *claims = &r->producers[i].claims[k];
            if (UP_LD(&claims->frames) && UP_LD(&claims->position) >= head) UP_STR(&claims->frames, 0);
        }
}

/* A drop policy refused the newcomer itself: it counts as emitted and as dropped. */
static void up_count_refused(up_ring *r) {
    up_control *c = r->c;
    uint64_t word = UP_LD(&c->head), old = word & 1, new_ = old ^ 1;
    UP_ST(&c->head_books[new_].frames, UP_LD(&c->head_books[old].frames));
    UP_ST(&c->head_books[new_].bytes, UP_LD(&c->head_books[old].bytes));
    UP_ST(&c->head_books[new_].dropped, UP_LD(&c->head_books[old].dropped) + 1);
    UP_STR(&c->head, up_position(word) | new_);
}

static inline void up_header(up_ring *r, up_frame *f, const up_meta *m, uint64_t pos, uint32_t payload_crc) {
    uint64_t w[8]; /* whole words: narrow stores would stall the CRC's loads */
    w[0] = (1ull << 32) | ((uint64_t)UP_FRAME_MAGIC << 48);
    w[1] = UP_VERSION | (uint64_t)m->flags << 8 | (uint64_t)m->dtype << 16 | (uint64_t)m->item << 32 |
           (uint64_t)m->rank << 40 | (uint64_t)(r->producer & 0xffff) << 48;
    w[2] = r->epoch | (uint64_t)m->key << 32;
    w[3] = m->size;
    w[4] = pos;
    w[5] = m->execution;
    w[6] = m->timestamp;
    w[7] = m->inline_;
    if (!(r->c->options & UP_OPT_NO_CRC)) w[0] |= up_crc32_header(w, payload_crc);
    memcpy(f, w, sizeof w);
}

/* A frame of at most 8 bytes: claim, write and commit in one critical section. Room was checked. */
static inline void up_put_inline(up_ring *r, const up_meta *m) {
    uint64_t pos = up_position(UP_LD(&r->c->head));
    up_header(r, up_frame_at(r, pos), m, pos, 0);
    UP_CRASH("small");
    UP_ST(up_state_at(r, pos), up_word(UP_COMMITTED, 0, UP_GRANULE));
    up_publish(r, UP_GRANULE, 1, m->size);
}

/* One of a batch: `done` bytes into a claim that one up_publish of the whole batch will make. */
static inline void up_put_inline_at(up_ring *r, const up_meta *m, uint64_t done) {
    uint64_t pos = up_position(UP_LD(&r->c->head)) + done;
    up_header(r, up_frame_at(r, pos), m, pos, 0);
    UP_ST(up_state_at(r, pos), up_word(UP_COMMITTED, 0, UP_GRANULE));
}

/* Claim room for one frame; the payload is written outside the lock, then up_commit or up_abort. */
static inline uint64_t up_claim(up_ring *r, uint64_t need, uint64_t bytes) {
    uint64_t pos = up_position(UP_LD(&r->c->head));
    up_frame *f = up_frame_at(r, pos);
    f->producer = (uint16_t)r->producer; /* for the recoverer, which counts it as aborted */
    UP_ST(up_state_at(r, pos), up_word(UP_CLAIMED, r->slot, need));
    UP_CRASH("claim");
    up_publish(r, need, 1, bytes);
    return pos;
}

/* ------------------------------------------------------------------ outside the lock */

static inline uint8_t *up_payload(up_ring *r, uint64_t pos) { return (uint8_t *)up_frame_at(r, pos) + UP_GRANULE; }

static inline void up_commit(up_ring *r, uint64_t pos, const up_meta *m, uint32_t payload_crc) {
    uint64_t *state = up_state_at(r, pos);
    UP_CRASH("write");
    up_header(r, up_frame_at(r, pos), m, pos, payload_crc);
    UP_CRASH("commit");
    UP_STR(state, up_word(UP_COMMITTED, 0, up_span(UP_LD(state)))); /* SYNC commit */
    UP_CRASH("committed");
}

static inline void up_abort(up_ring *r, uint64_t pos) {
    uint64_t *state = up_state_at(r, pos);
    UP_STR(state, up_word(UP_ABORTED, 0, up_span(UP_LD(state))));
}

/* ------------------------------------------------------------------ consumers' end (caller holds consumer_lock) */

static inline uint64_t up_refresh_head(up_ring *r) { /* SYNC head */
    up_control *c = r->c;
    c->cached_head = up_position(UP_LDA(&c->head));
    uint64_t depth = c->cached_head - up_position(UP_LD(&c->tail));
    if (depth > UP_LD(&c->max_depth)) UP_ST(&c->max_depth, depth);
    return c->cached_head;
}

/* Move tail over everything that ended, counting how. Idempotent, so a crash inside is repaired by calling it again. */
static inline int up_advance(up_ring *r) {
    up_control *c = r->c;
    uint64_t word = UP_LD(&c->tail), pos = up_position(word), old = word & 1, new_ = old ^ 1, next = UP_LD(&c->next), from = pos;
    uint64_t ended[UP_ABORTED + 1] = {0};
    while (pos < next) {
        uint64_t state = UP_LDA(up_state_at(r, pos));
        uint32_t kind = up_kind(state);
        if (kind < UP_FINISHED || kind > UP_ABORTED) break;
        ended[kind]++;
        pos += up_span(state);
    }
    if (pos == from) return 0;
    up_books *was = &c->tail_books[old], *now = &c->tail_books[new_];
    UP_ST(&now->finished, UP_LD(&was->finished) + ended[UP_FINISHED]);
    UP_ST(&now->dropped, UP_LD(&was->dropped) + ended[UP_DROPPED]);
    UP_ST(&now->dead, UP_LD(&was->dead) + ended[UP_DEAD]);
    UP_ST(&now->aborted, UP_LD(&was->aborted) + ended[UP_ABORTED]);
    UP_ST(&now->frames, UP_LD(&was->frames) + ended[UP_FINISHED] + ended[UP_DROPPED] + ended[UP_DEAD] + ended[UP_ABORTED]);
    UP_ST(&now->bytes, UP_LD(&was->bytes) + (pos - from));
    UP_CRASH("advance");
    UP_STR(&c->tail, pos | new_); /* SYNC tail */
    return 1;
}

static int up_take_available(up_ring *r, uint64_t *pos) {
    up_control *c = r->c;
    uint64_t next = UP_LD(&c->next);
    for (uint64_t at = up_position(UP_LD(&c->tail)); at < next; at += up_span(UP_LD(up_state_at(r, at)))) {
        uint64_t *state = up_state_at(r, at), word = UP_LD(state);
        if (up_kind(word) != UP_AVAILABLE) continue;
        UP_ST(state, up_word(UP_TAKEN, r->slot, up_span(word)));
        UP_CRASH("retake");
        c->redeliver--;
        *pos = at;
        return UP_OK;
    }
    c->redeliver = 0;
    return UP_EMPTY;
}

/* Position of the next committed frame without taking it, past padding. UP_OK, UP_EMPTY. */
static inline int up_peek(up_ring *r, uint64_t *pos, uint64_t *span) {
    up_control *c = r->c;
    for (;;) {
        uint64_t next = UP_LD(&c->next);
        if (next == c->cached_head && next == up_refresh_head(r)) return UP_EMPTY;
        uint64_t word = UP_LDA(up_state_at(r, next)); /* SYNC commit */
        uint32_t kind = up_kind(word);
        if (__builtin_expect(kind == UP_COMMITTED, 1)) {
            *pos = next;
            *span = up_span(word);
            return UP_OK;
        }
        if (kind != UP_ABORTED) return UP_EMPTY; /* still being written: order is kept, so wait for it */
        UP_ST(&c->next, next + up_span(word));
        up_advance(r);
    }
}

/* Take the next frame: redelivered ones first. */
static inline int up_take(up_ring *r, uint64_t *pos) {
    up_control *c = r->c;
    uint64_t span;
    if (__builtin_expect(c->redeliver != 0, 0) && up_take_available(r, pos) == UP_OK) return UP_OK;
    int rc = up_peek(r, pos, &span);
    if (rc != UP_OK) return rc;
    UP_ST(up_state_at(r, *pos), up_word(UP_TAKEN, r->slot, span));
    UP_CRASH("take");
    UP_ST(&c->next, *pos + span);
    UP_CRASH("taken");
    UP_ST(&c->taken, UP_LD(&c->taken) + 1);
    return UP_OK;
}

/* Take, copy and finish the next frame in one critical section when it is a single granule.
 * UP_OK: *out is its copy. UP_TOOBIG: the next frame is larger, nothing changed. Else as up_take. */
static inline int up_consume(up_ring *r, up_frame *out) {
    up_control *c = r->c;
    uint64_t pos, span;
    if (__builtin_expect(c->redeliver != 0, 0)) return UP_TOOBIG;
    int rc = up_peek(r, &pos, &span);
    if (rc != UP_OK) return rc;
    if (span != UP_GRANULE) return UP_TOOBIG;
    memcpy(out, up_frame_at(r, pos), sizeof *out);
    UP_ST(up_state_at(r, pos), up_word(UP_FINISHED, 0, span));
    UP_CRASH("consume");
    UP_ST(&c->next, pos + span);
    UP_ST(&c->taken, UP_LD(&c->taken) + 1);
    return UP_OK; /* the caller calls up_advance, once for a batch */
}

/* End a frame this handle holds: kind is UP_FINISHED or UP_DEAD. */
static inline int up_finish(up_ring *r, uint64_t pos, uint32_t kind) {
    uint64_t *state = up_state_at(r, pos), word = UP_LD(state);
    if (up_kind(word) != UP_TAKEN || up_owner(word) != r->slot) return UP_NOTYOURS;
    UP_CRASH("finish");
    UP_ST(state, up_word(kind, 0, up_span(word)));
    UP_CRASH("finished");
    if (pos == up_position(UP_LD(&r->c->tail))) up_advance(r);
    return UP_OK;
}

/* Raise the delivery count; count and CRC share one 8-byte store. A mismatch that was there stays (linearity). */
static void up_raise(up_ring *r, uint64_t pos) {
    up_frame *f = up_frame_at(r, pos);
    uint64_t *first = (uint64_t *)f, word = UP_LD(first);
    uint16_t count = (uint16_t)(word >> 32), more = count == 0xffff ? count : (uint16_t)(count + 1);
    uint32_t crc = (uint32_t)word;
    if (!(r->c->options & UP_OPT_NO_CRC)) crc = up_crc32_deliveries(crc, count, more);
    UP_ST(first, (word & 0xffff000000000000ull) | ((uint64_t)more << 32) | crc);
}

static void up_make_available(up_ring *r, uint64_t pos, uint64_t word) {
    up_raise(r, pos);
    UP_CRASH("raise");
    UP_ST(up_state_at(r, pos), up_word(UP_AVAILABLE, 0, up_span(word)));
    r->c->redeliver++;
    UP_ST(&r->c->redelivered, UP_LD(&r->c->redelivered) + 1);
}

/* Give a held frame back: it is delivered again, to anyone, with its count raised. */
static inline int up_give_back(up_ring *r, uint64_t pos) {
    uint64_t word = UP_LD(up_state_at(r, pos));
    if (up_kind(word) != UP_TAKEN || up_owner(word) != r->slot) return UP_NOTYOURS;
    up_make_available(r, pos, word);
    return UP_OK;
}

/* After EOWNERDEAD: a take that did not reach `next` never happened; recount; finish an interrupted advance. */
static void up_repair_consumer(up_ring *r) {
    up_control *c = r->c;
    uint64_t next = UP_LD(&c->next), head = up_refresh_head(r), available = 0;
    if (next < head) {
        uint64_t *state = up_state_at(r, next), word = UP_LDA(state);
        if (up_kind(word) == UP_TAKEN || (up_kind(word) >= UP_FINISHED && up_kind(word) <= UP_DEAD))
            UP_ST(state, up_word(UP_COMMITTED, 0, up_span(word)));
    }
    for (uint64_t at = up_position(UP_LD(&c->tail)); at < next; at += up_span(UP_LD(up_state_at(r, at))))
        available += up_kind(UP_LD(up_state_at(r, at))) == UP_AVAILABLE;
    c->redeliver = available;
    up_advance(r);
}

/* 1 when nothing will ever come. Reads without the lock: closing comes after the last commit (SYNC stream). */
static inline int up_ended(up_ring *r) {
    if (UP_LDA(&r->c->stream) != UP_STREAM_CLOSED) return 0;
    return up_position(UP_LDA(&r->c->head)) == up_position(UP_LDA(&r->c->tail));
}

/* Drop committed frames nobody took, oldest first: until `need` bytes fit (DROP_OLDEST) or all of them (LATEST).
 * While a held frame pins tail, dropping frees nothing: then it drops nothing. */
static void up_drop(up_ring *r, uint64_t need, int all) {
    up_control *c = r->c;
    uint64_t pos, span;
    while (up_peek(r, &pos, &span) == UP_OK) {
        uint64_t tail = up_position(UP_LD(&c->tail));
        up_books *claimed = &c->head_books[UP_LD(&c->head) & 1], *passed = &c->tail_books[UP_LD(&c->tail) & 1];
        int crowded = up_position(UP_LD(&c->head)) - tail + need > r->capacity ||
                      (c->max_frames && UP_LD(&claimed->frames) - UP_LD(&passed->frames) >= c->max_frames);
        if (!all && (!crowded || tail != pos)) break;
        UP_ST(up_state_at(r, pos), up_word(UP_DROPPED, 0, span));
        UP_CRASH("drop");
        UP_ST(&c->next, pos + span);
        up_advance(r);
    }
}

/* ------------------------------------------------------------------ participants (registry_lock inside) */

static uint64_t up_start_time(uint32_t pid) { /* field 22 of /proc/<pid>/stat; 0 when it cannot be read */
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return 0;
    text[n] = 0;
    char *p = strrchr(text, ')'); /* the command may hold spaces and parentheses */
    if (!p) return 0;
    for (int field = 2; field < 22; field++) {
        p = strchr(p + 1, ' ');
        if (!p) return 0;
    }
    return strtoull(p + 1, NULL, 10);
}

static uint64_t up_pidns(void) {
    struct stat st;
    return stat("/proc/self/ns/pid", &st) == 0 ? (uint64_t)st.st_ino : 0;
}

/* 1 only when the operating system proves it: no such process, another start time, or a pidfd that says it ended. */
static int up_process_dead(uint32_t pid, uint64_t start, uint64_t pidns) {
    if (pidns != up_pidns()) return 0; /* its pid means nothing here */
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0) return errno == ESRCH;
    uint64_t now = up_start_time(pid);
    struct pollfd p = {.fd = fd, .events = POLLIN};
    int dead = (now && start && now != start) || (poll(&p, 1, 0) == 1 && (p.revents & POLLIN));
    close(fd);
    return dead;
}

static void up_recount_stream(up_ring *r) { /* caller holds registry_lock */
    uint32_t waited = 0, closed = 0;
    for (uint32_t i = 0; i < UP_PRODUCERS; i++) {
        uint32_t state = UP_LD(&r->producers[i].state);
        waited += state == UP_PRODUCER_DECLARED || state == UP_PRODUCER_OPEN;
        closed += state == UP_PRODUCER_CLOSED;
    }
    UP_STR(&r->c->stream, waited ? UP_STREAM_OPEN : closed ? UP_STREAM_CLOSED : UP_STREAM_NEW); /* SYNC stream */
}

static int up_set_producer(up_ring *r, uint32_t id, uint32_t state, uint32_t epoch) {
    if (id >= UP_PRODUCERS) return UP_NOSLOT;
    if (up_lock(r, r->c->registry_lock, 10.0)) return UP_STUCK;
    if (epoch) UP_ST(&r->producers[id].epoch, epoch);
    UP_ST(&r->producers[id].state, state);
    UP_CRASH("stream");
    up_recount_stream(r);
    int closed = UP_LD(&r->c->stream) == UP_STREAM_CLOSED;
    up_unlock(r->c->registry_lock);
    if (closed) { /* consumers asleep learn the end; padding at the end may still hide it */
        up_fence(r);
        up_wake_consumers_slow(r, UP_SLOTS);
    }
    return UP_OK;
}

/* Frames that producer `id` claimed in all its lives; entry receives the index of the claims entry that says so. */
static uint64_t up_claimed(up_ring *r, uint32_t id, uint32_t *entry) {
    uint64_t head = up_position(UP_LDA(&r->c->head)), frames = 0;
    *entry = 0;
    for (uint32_t i = 0; i < 2; i++) {
        up_claims *claims = &r->producers[id].claims[i];
        if (UP_LDA(&claims->frames) > frames && UP_LD(&claims->position) < head) frames = UP_LD(&claims->frames), *entry = i;
    }
    return frames;
}

/* Frames it got into the ring: what a resuming source skips. Its last life must have been recovered. */
static uint64_t up_emitted(up_ring *r, uint32_t id) {
    uint32_t entry;
    uint64_t frames = up_claimed(r, id, &entry), aborted = UP_LD(&r->producers[id].aborted);
    return frames > aborted ? frames - aborted : 0;
}

/* Bind this handle to a producer id (a declared one in a pipe). */
static int up_use_producer(up_ring *r, uint32_t id, uint32_t epoch) {
    int rc = up_set_producer(r, id, UP_PRODUCER_OPEN, epoch);
    if (rc != UP_OK) return rc;
    r->epoch = UP_LD(&r->producers[id].epoch);
    r->produced = up_claimed(r, id, &r->turn);
    r->producer = id;
    return UP_OK;
}

/* Stand-alone: take a declared id, else an unused one, else one that closed. */
static int up_auto_producer(up_ring *r) {
    uint32_t wanted[3] = {UP_PRODUCER_DECLARED, UP_PRODUCER_UNUSED, UP_PRODUCER_CLOSED}, found = UP_NONE;
    if (up_lock(r, r->c->registry_lock, 10.0)) return UP_STUCK;
    for (int pass = 0; pass < 3 && found == UP_NONE; pass++)
        for (uint32_t i = 0; i < UP_PRODUCERS && found == UP_NONE; i++)
            if (UP_LD(&r->producers[i].state) == wanted[pass]) found = i;
    if (found != UP_NONE) {
        up_producer *p = &r->producers[found];
        UP_ST(&r->slots[r->slot].producer, found + 1);
        r->epoch = UP_LD(&p->epoch) + 1;
        UP_ST(&p->epoch, r->epoch);
        UP_ST(&p->state, UP_PRODUCER_OPEN);
        r->produced = up_claimed(r, found, &r->turn);
        r->producer = found;
        up_recount_stream(r);
    }
    up_unlock(r->c->registry_lock);
    return found == UP_NONE ? UP_NOSLOT : UP_OK;
}

static int up_join_locked(up_ring *r) {
    uint32_t pid = (uint32_t)getpid();
    for (uint32_t i = 0; i < UP_SLOTS; i++) {
        up_slot *s = &r->slots[i];
        if (UP_LD(&s->pid)) continue;
        s->bell_consumer = s->bell_producer = s->producer = 0;
        s->need_tail = 0;
        s->start = up_start_time(pid);
        s->pidns = up_pidns();
        UP_STR(&s->pid, pid);
        r->slot = i;
        __atomic_fetch_add(&r->c->joined, 1, __ATOMIC_SEQ_CST);
        return UP_OK;
    }
    return UP_NOSLOT;
}

static int up_leave_ends(up_ring *r, uint32_t slot, uint64_t max_deliveries, uint64_t *dead, size_t room, size_t *found,
                         const uint64_t *covered, size_t ncovered);

/* Free the slot of a process that is proven dead (or, slot == r->slot, our own at close).
 * Its unfinished writes become padding, what it held becomes available again with the count raised, except: positions in
 * `covered` (sorted; a checkpoint has them) are finished, and frames at max_deliveries (> 0) stay TAKEN by this handle
 * and are returned in `dead` for the caller to bury with up_finish(UP_DEAD). Idempotent: a crash inside is recovered again. */
static int up_recover(up_ring *r, uint32_t slot, uint64_t max_deliveries, uint64_t *dead, size_t room, size_t *found,
                      const uint64_t *covered, size_t ncovered) {
    up_slot *s = &r->slots[slot];
    *found = 0;
    uint32_t pid = UP_LDA(&s->pid);
    if (!pid) return UP_OK;
    if (slot != r->slot && !up_process_dead(pid, s->start, s->pidns)) return UP_ALIVE;
    if (up_leave_ends(r, slot, max_deliveries, dead, room, found, covered, ncovered)) return UP_STUCK;
    if (up_lock(r, r->c->registry_lock, 10.0)) return UP_STUCK;
    uint32_t producer = UP_LD(&s->producer);
    if (producer && UP_LD(&r->producers[producer - 1].state) == UP_PRODUCER_OPEN)
        UP_ST(&r->producers[producer - 1].state, UP_PRODUCER_CLOSED);
    up_recount_stream(r);
    uint64_t bit = 1ull << (slot & 63);
    __atomic_fetch_and(&r->c->consumers_waiting[slot / 64], ~bit, __ATOMIC_SEQ_CST);
    __atomic_fetch_and(&r->c->producers_waiting[slot / 64], ~bit, __ATOMIC_SEQ_CST);
    UP_CRASH("recover");
    if (UP_LD(&s->pid) == pid) UP_STR(&s->pid, 0);
    up_unlock(r->c->registry_lock);
    up_wake_all(r); /* a wake that the dead one had been given, or owed, is made good */
    return UP_OK;
}

static int up_covered(uint64_t pos, const uint64_t *covered, size_t n) {
    size_t low = 0, high = n;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (covered[mid] < pos) low = mid + 1;
        else high = mid;
    }
    return low < n && covered[low] == pos;
}

static int up_leave_ends(up_ring *r, uint32_t slot, uint64_t max_deliveries, uint64_t *dead, size_t room, size_t *found,
                         const uint64_t *covered, size_t ncovered) {
    if (up_lock(r, r->c->producer_lock, 10.0)) return UP_STUCK;
    {
        uint64_t head = up_position(UP_LD(&r->c->head));
        for (uint64_t at = up_position(UP_LDA(&r->c->tail)); at < head;) {
            uint64_t *state = up_state_at(r, at), word = UP_LDA(state);
            if (up_kind(word) == UP_CLAIMED && up_owner(word) == slot) {
                uint32_t id = up_frame_at(r, at)->producer;
                if (id < UP_PRODUCERS) UP_ST(&r->producers[id].aborted, UP_LD(&r->producers[id].aborted) + 1);
                UP_CRASH("reclaim");
                UP_STR(state, up_word(UP_ABORTED, 0, up_span(word)));
            }
            at += up_span(word);
        }
        up_unlock(r->c->producer_lock);
    }
    if (up_lock(r, r->c->consumer_lock, 10.0)) return UP_STUCK;
    {
        uint64_t next = UP_LD(&r->c->next);
        for (uint64_t at = up_position(UP_LD(&r->c->tail)); at < next;) {
            uint64_t *state = up_state_at(r, at), word = UP_LD(state), span = up_span(word);
            if (up_kind(word) == UP_TAKEN && up_owner(word) == slot) {
                if (up_covered(at, covered, ncovered)) {
                    UP_ST(state, up_word(UP_FINISHED, 0, span));
                } else if (max_deliveries && up_frame_at(r, at)->deliveries >= max_deliveries && *found < room) {
                    UP_ST(state, up_word(UP_TAKEN, r->slot, span));
                    dead[(*found)++] = at;
                } else {
                    up_make_available(r, at, word);
                }
            }
            at += span;
        }
        up_advance(r);
        up_unlock(r->c->consumer_lock);
    }
    return UP_OK;
}

#endif
