/* Threads, each with a handle and a slot of its own, on one mapping (ThreadSanitizer sees every access) or on one each. */
#ifndef RING_THREADS_H
#define RING_THREADS_H

#include "ring_driver.h"

typedef struct scene {
    const char *name;
    int producers, consumers;
    uint64_t frames; /* per producer, at scale 1 */
    uint64_t capacity;
    uint32_t most, policy;
    uint64_t max_frames;
    int batch, get; /* put and get small frames many at a time; take and finish in one step */
    int gives, aborts, held; /* percent of frames given back, of claims aborted; frames held at a time */
} scene;

static const scene scenes[] = {
    {"one to one, small", 1, 1, 1000000, 4096, 0, UP_POLICY_BLOCK, 0, 0, 1, 0, 0, 0},
    {"one to one, batches", 1, 1, 4000000, 4096, 0, UP_POLICY_BLOCK, 0, 1, 1, 0, 0, 0},
    {"one to one, mixed, taken", 1, 1, 300000, 4096, 3000, UP_POLICY_BLOCK, 0, 0, 0, 0, 0, 0},
    {"two to two, mixed", 2, 2, 100000, 4096, 1500, UP_POLICY_BLOCK, 0, 0, 0, 0, 2, 0},
    {"four to four, small, all at once", 4, 4, 100000, 4096, 0, UP_POLICY_BLOCK, 0, 1, 1, 0, 0, 0},
    {"three to three, gives back", 3, 3, 30000, 8192, 700, UP_POLICY_BLOCK, 0, 0, 0, 10, 5, 0},
    {"two to three, held windows", 2, 3, 30000, 16384, 900, UP_POLICY_BLOCK, 0, 0, 0, 3, 1, 6},
    {"one to one, a window nearly as large as the ring", 1, 1, 30000, 4096, 0, UP_POLICY_BLOCK, 0, 0, 0, 0, 0, 60},
    {"two to two, frames as large as the ring", 2, 2, 4000, 65536, MOST_PAYLOAD - 128, UP_POLICY_BLOCK, 0, 0, 0, 2, 2, 0},
    {"two to two, at most three frames", 2, 2, 20000, 65536, 500, UP_POLICY_BLOCK, 3, 0, 0, 5, 5, 0},
    {"drop the oldest", 3, 2, 60000, 4096, 500, UP_POLICY_DROP_OLDEST, 0, 0, 0, 3, 2, 0},
    {"drop the oldest, at most five frames", 2, 2, 60000, 65536, 500, UP_POLICY_DROP_OLDEST, 5, 0, 0, 3, 0, 0},
    {"latest", 2, 2, 60000, 4096, 500, UP_POLICY_LATEST, 0, 0, 0, 3, 2, 2},
};

typedef struct act { /* what the threads of a scene share */
    const scene *s;
    uint64_t frames, seed;
    up_ring *base;
    int fd, own_mapping;
    _Atomic uint8_t *ended, *given; /* per producer and frame: times finished, times given back */
    _Atomic uint64_t refused, aborted, vain; /* vain: refused, and to be aborted anyhow */
    _Atomic int ids, readers;
    _Atomic int64_t left; /* frames that may still be given back: no frame goes round for ever */
} act;

static void enter(act *a, member *m, uint64_t number) {
    up_ring ring = *a->base;
    uint32_t found[2];
    if (a->own_mapping) CHECK(up_attach(&ring, a->fd, found) == UP_OK, "attach");
    join(m, &ring, a->seed + number, a->s->most);
}

static void quit(act *a, member *m) {
    leave(m);
    if (a->own_mapping) up_unmap(&m->r);
    free(m);
}

static void *produce(void *arg) {
    act *a = arg;
    member *m = calloc(1, sizeof *m);
    int id = atomic_fetch_add(&a->ids, 1);
    uint64_t aborted = 0, vain = 0;
    enter(a, m, (uint64_t)id);
    CHECK(up_use_producer(&m->r, (uint32_t)id, 1) == UP_OK, "producer");
    for (uint64_t i = 0; i < a->frames;) {
        if (a->s->aborts && chance(&m->seed, 100) < (uint32_t)a->s->aborts) *(put_and_abort(m) == UP_OK ? &aborted : &vain) += 1;
        uint32_t n = a->s->batch ? put_batch(m, i, (uint32_t)(a->frames - i < BATCH ? a->frames - i : BATCH)) : 0;
        i += n;
        if (n == 0 && put(m, i++) == UP_REFUSED) atomic_fetch_add(&a->refused, 1);
    }
    atomic_fetch_add(&a->aborted, aborted);
    atomic_fetch_add(&a->vain, vain);
    CHECK(up_set_producer(&m->r, (uint32_t)id, UP_PRODUCER_CLOSED, 0) == UP_OK, "close");
    quit(a, m);
    return NULL;
}

static void got(act *a, const up_frame *f, uint32_t id, uint64_t number, uint64_t *last) {
    uint64_t at = id * a->frames + number;
    CHECK(number < a->frames && id < (uint32_t)a->s->producers, "frame %u:%llu", id, (unsigned long long)number);
    EQUAL(f->deliveries, 1 + atomic_load(&a->given[at]));
    if (a->s->consumers == 1) {
        CHECK(last[id] <= number, "out of order");
        last[id] = number;
    }
}

static void ended(act *a, uint32_t id, uint64_t number) {
    EQUAL(atomic_fetch_add(&a->ended[id * a->frames + number], 1), 0);
}

static void *consume_all(void *arg) {
    act *a = arg;
    member *m = calloc(1, sizeof *m);
    uint64_t last[16] = {0}, held[64], pos, number;
    int holding = 0, rc = 0;
    uint32_t id;
    up_frame f[BATCH];
    enter(a, m, 1000 + (uint64_t)atomic_fetch_add(&a->readers, 1));
    while (rc != UP_END) {
        uint32_t n = a->s->batch ? BATCH : 1;
        rc = a->s->get ? consume(m, f, &n) : UP_TOOBIG;
        if (rc == UP_OK)
            for (uint32_t i = 0; i < n; i++) {
                check_frame(&f[i], NULL, 0, &id, &number, a->s->most);
                got(a, &f[i], id, number, last);
                ended(a, id, number);
            }
        if (rc == UP_OK || rc == UP_END) continue;
        rc = take(m, &pos, holding, a->s->consumers == 1);
        while (rc == UP_EMPTY && holding) finish(m, held[--holding], UP_FINISHED);
        if (rc != UP_OK) continue;
        read_frame(m, pos, f, &id, &number);
        got(a, f, id, number, last);
        if (a->s->gives && chance(&m->seed, 100) < (uint32_t)a->s->gives && atomic_fetch_sub(&a->left, 1) > 0 && f->deliveries < 200) {
            atomic_fetch_add(&a->given[id * a->frames + number], 1);
            give_back(m, pos);
            continue;
        }
        ended(a, id, number);
        held[holding++] = pos;
        if (holding <= a->s->held) continue;
        /* A sliding window, or any of them; never so old that it keeps the ring from turning. */
        int old = a->s->held > 10 || pos - held[0] > a->s->capacity / 4;
        uint32_t which = old ? 0 : chance(&m->seed, (uint32_t)holding);
        pos = held[which];
        memmove(&held[which], &held[which + 1], (size_t)(--holding - (int)which) * sizeof *held);
        finish(m, pos, chance(&m->seed, 50) ? UP_FINISHED : UP_DEAD);
    }
    quit(a, m);
    return NULL;
}

static void run_scene(const scene *s, double scale, int own_mapping, uint64_t seed) {
    up_ring base;
    act a = {.s = s, .frames = (uint64_t)((double)s->frames * scale) + 100, .seed = seed, .base = &base, .own_mapping = own_mapping};
    pthread_t threads[32];
    uint64_t start = up_now_ns(CLOCK_MONOTONIC), all = a.frames * (uint64_t)s->producers, finished = 0;
    a.fd = make_ring(&base, s->capacity, s->policy, s->max_frames);
    a.ended = calloc(all, 1), a.given = calloc(all, 1);
    atomic_store(&a.left, (int64_t)all);
    for (int i = 0; i < s->producers; i++) CHECK(up_set_producer(&base, (uint32_t)i, UP_PRODUCER_DECLARED, 0) == UP_OK, "declare");
    for (int i = 0; i < s->producers; i++) CHECK(pthread_create(&threads[i], NULL, produce, &a) == 0, "thread");
    for (int i = 0; i < s->consumers; i++) CHECK(pthread_create(&threads[s->producers + i], NULL, consume_all, &a) == 0, "thread");
    for (int i = 0; i < s->producers + s->consumers; i++) pthread_join(threads[i], NULL);
    totals t = check_at_rest(&base);
    for (uint64_t i = 0; i < all; i++) finished += a.ended[i];
    EQUAL(t.aborted, a.aborted);
    EQUAL(t.claimed - t.aborted + t.refused - a.vain, all); /* emitted = finished + dead + dropped, what was refused included */
    CHECK(t.refused >= a.refused + a.vain, "refused"); /* and those whose place a newcomer took */
    EQUAL(t.finished + t.dead, finished);
    if (s->policy == UP_POLICY_BLOCK) EQUAL(t.finished + t.dead, all);
    for (int i = 0; i < 8; i++) CHECK(base.c->consumers_waiting[i] == 0 && base.c->producers_waiting[i] == 0, "a bit stays set");
    for (int i = 0; i < s->producers; i++)
        if (s->policy == UP_POLICY_BLOCK) EQUAL(up_emitted(&base, (uint32_t)i), a.frames);
    EQUAL(base.c->stream, UP_STREAM_CLOSED);
    double seconds = (double)(up_now_ns(CLOCK_MONOTONIC) - start) * 1e-9;
    printf("  %-50s %9llu frames %7.2f M/s  dropped %llu refused %llu\n", s->name, (unsigned long long)all,
           (double)all / seconds * 1e-6, (unsigned long long)t.dropped, (unsigned long long)t.refused);
    free(a.ended), free(a.given);
    up_unmap(&base);
    close(a.fd);
}

static void run_threads(double scale, int own_mapping, uint64_t seed) {
    printf("threads, %s:\n", own_mapping ? "a mapping each" : "one mapping");
    for (size_t i = 0; i < sizeof scenes / sizeof *scenes; i++) {
        window = 128ull << mix(seed + i) % 8;
        run_scene(&scenes[i], scale, own_mapping, seed + i);
    }
    window = 128;
}

#endif
