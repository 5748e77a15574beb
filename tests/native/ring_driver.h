/* Drives the ring from C the way upipe/memq/_ring.pyx drives it: put and get with waiting, batches, give-backs. Frames carry
 * (producer, number), and their content follows from that, so whoever gets one can tell whether it is whole. */
#ifndef RING_DRIVER_H
#define RING_DRIVER_H

#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

/* Named points (UP_CRASH): a plan kills whoever passes `point` for the n-th time, `budget` times in all. Kept in memory that
 * all processes of a test share. */
typedef struct plan {
    char point[48];
    _Atomic int budget;
    _Atomic int hits;
} plan;
static plan *plans; /* NULL: nobody dies */
static _Atomic uint8_t *killed_pids; /* shared: told before the kill, so that nobody can know of the death first */
static int plan_count;
static uint32_t plan_left[5]; /* passages until this process dies */
static void pass_point(const char *point);

#ifdef KILL_AT_POINTS
#define UP_CRASH(point) (__atomic_signal_fence(__ATOMIC_SEQ_CST), plans ? pass_point(point) : (void)0)
#endif
#define UP_WARM_MIN 128 /* so that these small rings jump, too */
static uint64_t window = 128; /* by one frame, unless a case says so */
#define UP_WARM window
#include "../../upipe/memq/_ring.h"

#define FAIL(...) (fprintf(stderr, "%s:%d: ", __FILE__, __LINE__), fprintf(stderr, __VA_ARGS__), fprintf(stderr, "\n"), abort())
#define CHECK(ok, ...) ((ok) ? (void)0 : FAIL(#ok ": " __VA_ARGS__))
#define EQUAL(a, b) (((uint64_t)(a) == (uint64_t)(b)) ? (void)0 : FAIL(#a " is %llu, " #b " is %llu", (unsigned long long)(a), (unsigned long long)(b)))

#define MOST_PAYLOAD 65536
#define PATIENCE_MS 10000 /* asleep that long with something to do: a wake-up was lost */
#define BATCH 16
#define SMALL (1ull << 40) /* in a number: a frame of 8 bytes in any case */

static char test_root[128]; /* sessions with doorbells live here */

static inline uint64_t mix(uint64_t x) { /* splitmix64: the only source of chance, so a seed repeats a run's choices */
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static inline uint32_t chance(uint64_t *seed, uint32_t below) { return (uint32_t)((*seed = mix(*seed)) >> 33) % below; }

/* In a child: never outlive the parent, also when it died before we asked. */
static void die_with(pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    up_bell_child();
    up_bell_forget();
}

static void __attribute__((unused)) pass_point(const char *point) {
    for (int i = 0; i < plan_count; i++) {
        if (strcmp(point, plans[i].point) || plan_left[i] == 0 || --plan_left[i]) continue;
        if (atomic_fetch_sub(&plans[i].budget, 1) <= 0) continue;
        atomic_fetch_add(&plans[i].hits, 1);
        atomic_store(&killed_pids[getpid()], 1);
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
}

/* ------------------------------------------------------------------ frames */

static void make_frame(up_meta *m, uint8_t *payload, uint32_t id, uint64_t number, uint32_t most) {
    uint64_t h = mix((uint64_t)id << 48 ^ number);
    memset(m, 0, sizeof *m);
    m->execution = (uint64_t)id << 48 | number;
    m->timestamp = h;
    m->key = (uint32_t)(h >> 7);
    if (!most || number & SMALL || h % 3 == 0) {
        m->flags = UP_FLAG_INLINE, m->size = 8, m->inline_ = mix(h);
        return;
    }
    m->size = h % 5 ? 9 + (h >> 8) % 120 % most : (h >> 8) % most;
    for (uint64_t i = 0; i < m->size; i++) payload[i] = (uint8_t)(h >> (i & 31)) ^ (uint8_t)i;
}

static void check_frame(const up_frame *f, const uint8_t *payload, uint32_t payload_crc, uint32_t *id, uint64_t *number, uint32_t most) {
    static _Thread_local uint8_t want[MOST_PAYLOAD];
    up_meta m;
    *id = (uint32_t)(f->execution >> 48), *number = f->execution & 0xffffffffffffull;
    EQUAL(f->magic, UP_FRAME_MAGIC);
    EQUAL(f->version, UP_VERSION);
    EQUAL(up_crc32_header(f, payload_crc), f->crc);
    make_frame(&m, want, *id, *number, most);
    EQUAL(f->producer, *id);
    EQUAL(f->flags, m.flags);
    EQUAL(f->size, m.size);
    EQUAL(f->key, m.key);
    EQUAL(f->timestamp, m.timestamp);
    EQUAL(f->inline_, m.inline_);
    if (!(m.flags & UP_FLAG_INLINE)) CHECK(memcmp(payload, want, m.size) == 0, "payload of %u:%llu", *id, (unsigned long long)*number);
}

/* ------------------------------------------------------------------ members */

typedef struct member {
    up_ring r;
    int bell[2];
    uint32_t most; /* payload bytes at most, 0 = only small frames */
    uint64_t seed;
    uint8_t payload[MOST_PAYLOAD];
} member;

static void lock(member *m, uint64_t *area) { CHECK(up_lock(&m->r, area, 30.0) == UP_OK, "a lock stays held"); }
static void unlock(uint64_t *area) { up_unlock(area); }

static void session_path(char *out, size_t n) {
    snprintf(out, n, "%s/%u-%llu", test_root, (unsigned)getpid(), (unsigned long long)up_start_time((uint32_t)getpid()));
}

static void hang_bells(member *m) {
    static _Atomic uint32_t ids = 1;
    char path[256];
    session_path(path, sizeof path);
    (void)mkdir(path, 0700);
    for (int k = 0; k < 2; k++) {
        uint32_t id = atomic_fetch_add(&ids, 1);
        up_bell_path(path, sizeof path, test_root, (uint32_t)getpid(), up_start_time((uint32_t)getpid()), id);
        CHECK(mkfifo(path, 0600) == 0, "mkfifo %s: %s", path, strerror(errno));
        CHECK((m->bell[k] = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC)) >= 0, "open %s", path);
        UP_ST(k ? &m->r.slots[m->r.slot].bell_producer : &m->r.slots[m->r.slot].bell_consumer, id);
    }
}

static void join(member *m, const up_ring *base, uint64_t seed, uint32_t most) {
    m->r = *base;
    m->seed = mix(seed);
    m->most = most;
    snprintf(m->r.root, sizeof m->r.root, "%s", test_root);
    m->r.root_hash = up_bell_hash(m->r.root);
    lock(m, m->r.c->registry_lock);
    int rc = up_join_locked(&m->r);
    unlock(m->r.c->registry_lock);
    CHECK(rc == UP_OK, "join: %d", rc);
    hang_bells(m);
}

static void leave(member *m) {
    size_t found;
    int rc = up_recover(&m->r, m->r.slot, 0, NULL, 0, &found, NULL, 0);
    CHECK(rc == UP_OK, "leave: %d", rc);
    for (int k = 0; k < 2; k++) close(m->bell[k]);
}

static int make_ring_at(up_ring *r, uint64_t capacity, uint32_t policy, uint64_t max_frames, uint64_t start) {
    int fd = memfd_create("ring", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)up_total(capacity)) == 0, "memfd");
    memset(r, 0, sizeof *r);
    CHECK(up_create(r, fd, capacity, policy, max_frames, UP_OPT_SUPERVISED, start) == UP_OK, "create");
    return fd;
}

static int make_ring(up_ring *r, uint64_t capacity, uint32_t policy, uint64_t max_frames) {
    return make_ring_at(r, capacity, policy, max_frames, 0);
}

/* ------------------------------------------------------------------ waiting */

typedef struct waiting {
    int producer, fresh, late, stalls;
    uint64_t need;
} waiting;

static uint64_t *bits(member *m, int producer) { return producer ? m->r.c->producers_waiting : m->r.c->consumers_waiting; }

/* After a try that failed: arm and try again, then sleep. */
static void again(member *m, waiting *w) {
    if (!w->fresh) {
        up_ring *r = &m->r;
        if (w->producer) {
            uint64_t head = up_position(UP_LDA(&r->c->head)), want = 0;
            if (!r->c->max_frames && head + w->need > r->capacity) {
                want = head + w->need - r->capacity + r->capacity / 8;
                want = want < head ? want : head;
            }
            UP_ST(&r->slots[r->slot].need_tail, want);
        }
        up_arm(r, bits(m, w->producer));
        w->fresh = 1;
        return;
    }
    struct pollfd p = {.fd = m->bell[w->producer], .events = POLLIN};
    w->fresh = 0;
    int rc = poll(&p, 1, PATIENCE_MS);
    w->late = rc == 0;
    CHECK(!w->late || ++w->stalls < 3, "a %s starves", w->producer ? "producer" : "consumer");
    up_bell_drain(p.fd);
}

/* The try succeeded (or is given up). */
static void waited(member *m, waiting *w, int succeeded) {
    CHECK(!(w->late && succeeded), "lost wake-up: a %s slept %d ms beside what it waited for", w->producer ? "producer" : "consumer", PATIENCE_MS);
    up_disarm(&m->r, bits(m, w->producer));
}

/* ------------------------------------------------------------------ putting */

static void drop(member *m, uint64_t need, int all) {
    lock(m, m->r.c->consumer_lock);
    up_drop(&m->r, need, all);
    unlock(m->r.c->consumer_lock);
}

static void after_finish(member *m) {
    up_wake_producers(&m->r);
    if (up_ended(&m->r)) up_wake_consumers(&m->r, UP_SLOTS);
}

static int room(member *m, uint64_t need) { /* under producer_lock: padding and gaps that no consumer passed go */
    up_ring *r = &m->r;
    uint64_t pos, span;
    if (up_room(r, need, 1) == UP_OK) return UP_OK;
    lock(m, r->c->consumer_lock);
    (void)up_peek(r, &pos, &span);
    unlock(r->c->consumer_lock);
    after_finish(m);
    return up_room(r, need, 1);
}

static int admit(member *m, uint64_t need) { /* under producer_lock */
    up_ring *r = &m->r;
    if (r->c->policy == UP_POLICY_BLOCK) return room(m, need);
    lock(m, r->c->consumer_lock);
    int rc = up_make_room(r, need);
    unlock(r->c->consumer_lock);
    after_finish(m);
    return rc;
}

static int try_put(member *m, const up_meta *meta, int abort_) {
    up_ring *r = &m->r;
    uint64_t need = up_need(meta->size, meta->flags), pos = 0;
    int small = meta->flags & UP_FLAG_INLINE && !abort_;
    lock(m, r->c->producer_lock);
    if (small && up_put_locked(r, meta) == UP_OK) return UP_OK;
    int rc = admit(m, need);
    if (rc == UP_OK && small) up_put_inline(r, meta);
    if (rc == UP_OK && !small) pos = up_claim(r, need, meta->size);
    if (rc == UP_REFUSED) up_count_refused(r);
    unlock(r->c->producer_lock);
    if (rc != UP_OK) return rc;
    if (abort_) {
        CHECK(up_abort(r, pos) == UP_OK, "abort");
    } else if (!small) {
        uint32_t crc = up_crc32_copy(0, up_payload(r, pos), m->payload, meta->size);
        CHECK(up_commit(r, pos, meta, crc) == UP_OK, "commit");
    }
    up_wake_consumers(r, 1);
    return UP_OK;
}

/* UP_OK or UP_REFUSED. */
static int put_meta(member *m, const up_meta *meta, int abort_) {
    waiting w = {.producer = 1, .need = up_need(meta->size, meta->flags)};
    int rc;
    while ((rc = try_put(m, meta, abort_)) == UP_FULL) again(m, &w);
    waited(m, &w, 1);
    return rc;
}

static int put(member *m, uint64_t number) {
    up_meta meta;
    make_frame(&meta, m->payload, m->r.producer, number, m->most);
    return put_meta(m, &meta, 0);
}

static int put_and_abort(member *m) {
    up_meta meta = {.size = 1 + chance(&m->seed, 200)};
    return put_meta(m, &meta, 1);
}

/* Small frames number .. number + n - 1 in one claim; as many as there is room for. */
static uint32_t put_batch(member *m, uint64_t number, uint32_t n) {
    up_ring *r = &m->r;
    up_meta meta[BATCH];
    for (uint32_t i = 0; i < n; i++) make_frame(&meta[i], m->payload, r->producer, number + i, 0);
    lock(m, r->c->producer_lock);
    while (n && up_room(r, n * UP_GRANULE, n) != UP_OK) n /= 2;
    if (n) up_open(r, n * UP_GRANULE);
    for (uint32_t i = 0; i < n; i++) up_put_inline_at(r, &meta[i], i * UP_GRANULE);
    if (n) up_publish(r, n * UP_GRANULE, n, n * 8);
    unlock(r->c->producer_lock);
    if (n) up_wake_consumers(r, n);
    return n;
}

/* ------------------------------------------------------------------ getting */

/* UP_OK, UP_END; UP_EMPTY to one that holds frames: at once when it is not to sleep on them (others may wait for the room
 * they pin), else when no more will come, since its own frames hide the end. */
static int take(member *m, uint64_t *pos, int holding, int sleep) {
    waiting w = {0};
    for (;;) {
        lock(m, m->r.c->consumer_lock);
        int rc = up_take(&m->r, pos);
        unlock(m->r.c->consumer_lock);
        if (rc == UP_EMPTY && up_ended(&m->r)) rc = UP_END;
        if (rc != UP_EMPTY || (holding && (!sleep || UP_LDA(&m->r.c->stream) == UP_STREAM_CLOSED))) {
            waited(m, &w, rc != UP_EMPTY);
            return rc;
        }
        again(m, &w);
    }
}

/* UP_OK: up to n one-granule frames are in out. UP_TOOBIG: take() has to. UP_EMPTY, UP_END. */
static int consume(member *m, up_frame *out, uint32_t *n) {
    uint32_t most = *n, got = 0;
    int rc = UP_OK;
    lock(m, m->r.c->consumer_lock);
    if (most == 1) {
        rc = up_get_locked(&m->r, out);
        *n = rc == UP_OK;
        return rc;
    }
    while (got < most && (rc = up_consume(&m->r, &out[got])) == UP_OK) got++;
    if (got) up_advance(&m->r);
    unlock(m->r.c->consumer_lock);
    *n = got;
    if (got) after_finish(m);
    if (got) return UP_OK;
    return rc == UP_EMPTY && up_ended(&m->r) ? UP_END : rc;
}

static void read_frame(member *m, uint64_t pos, up_frame *f, uint32_t *id, uint64_t *number) {
    uint32_t crc = 0;
    *f = *up_frame_at(&m->r, pos);
    EQUAL(f->position, pos);
    EQUAL(up_need(f->size, f->flags), up_span(UP_LD(up_state_at(&m->r, pos))));
    if (!(f->flags & UP_FLAG_INLINE)) crc = up_crc32_copy(0, m->payload, up_payload(&m->r, pos), f->size);
    check_frame(f, m->payload, crc, id, number, m->most);
}

static void finish(member *m, uint64_t pos, uint32_t kind) {
    lock(m, m->r.c->consumer_lock);
    int rc = up_finish(&m->r, pos, kind);
    unlock(m->r.c->consumer_lock);
    CHECK(rc == UP_OK, "finish: %d", rc);
    after_finish(m);
}

static void give_back(member *m, uint64_t pos) {
    lock(m, m->r.c->consumer_lock);
    int rc = up_give_back(&m->r, pos);
    unlock(m->r.c->consumer_lock);
    CHECK(rc == UP_OK, "give back: %d", rc);
    up_wake_consumers(&m->r, 1);
}

/* ------------------------------------------------------------------ the whole queue, at rest */

typedef struct totals {
    uint64_t claimed, refused, finished, dropped, dead, aborted;
} totals;

/* Everything ended: positions meet, the books balance, nothing is left behind. */
static totals check_at_rest(up_ring *r) {
    up_control *c = r->c;
    up_books head, tail;
    uint64_t at, end;
    up_books_read(&c->tail, c->tail_books, &at, &tail);
    up_books_read(&c->head, c->head_books, &end, &head);
    EQUAL(at, end);
    EQUAL(c->next, end);
    EQUAL(c->redeliver, 0);
    EQUAL(head.frames, tail.frames);
    EQUAL(tail.frames, tail.finished + tail.dropped + tail.dead + tail.aborted);
    EQUAL(tail.bytes + head.finished, end); /* and the gaps */
    CHECK(c->max_depth <= r->capacity, "max_depth");
    return (totals){head.frames, head.dropped, tail.finished, tail.dropped, tail.dead, tail.aborted};
}

#endif
