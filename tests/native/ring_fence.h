/* The wake-up as a litmus test (SYNC waiting, Dekker): one thread commits and then reads the waiting bits, the other sets its
 * bit and then looks for the frame. Both at once may miss each other only if a store waits in a core's buffer behind a later
 * load, which the fence in up_wake_consumers forbids; a sleeper that neither saw the frame nor was woken would sleep for ever.
 *
 * up_commit is the one place on x86 where nothing but that fence stands between the two. Without it (test_native.py compiles that
 * as well) a loss shows within moments on two cores; with it never. Puts of small frames (every other round) have no fence
 * there, since they end with an unlock, which is a locked instruction. The Spin model proves the protocol; this shows that
 * the machine keeps to it.
 */
#ifndef RING_FENCE_H
#define RING_FENCE_H

#include "ring_driver.h"

typedef struct duel {
    member waker, sleeper;
    _Atomic uint64_t begin, end; /* rounds: begun by the waker, done by the sleeper */
    _Atomic int saw, over;
    uint64_t pos;                /* of the frame: below head, and committed, once it is there */
} duel;

static void run_on(int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    (void)sched_setaffinity(0, sizeof one, &one);
}

static void meet(_Atomic uint64_t *round, uint64_t wanted, _Atomic int *over) {
    for (uint32_t i = 1; atomic_load(round) < wanted && !atomic_load(over); i++)
        if (i % 1024 == 0) sched_yield(); /* the other one's core is taken */
}

static void linger_a_little(uint64_t *seed) {
    for (uint32_t i = chance(seed, 40); i; i--) UP_PAUSE();
}

static void *sleep_in_rounds(void *arg) {
    duel *d = arg;
    uint64_t *bits_ = d->sleeper.r.c->consumers_waiting, seed = 7;
    run_on(1);
    for (uint64_t round = 1;; round++) {
        meet(&d->begin, round, &d->over);
        if (atomic_load(&d->over)) return NULL;
        linger_a_little(&seed);
        up_arm(&d->sleeper.r, bits_);
        atomic_store(&d->saw, up_position(UP_LDA(&d->sleeper.r.c->head)) > d->pos &&
                                  up_kind(UP_LDA(up_state_at(&d->sleeper.r, d->pos))) == UP_COMMITTED);
        atomic_store(&d->end, round);
    }
}

/* 1 when the sleeper would have slept on beside a committed frame. */
static int duel_once(duel *d, uint64_t round) {
    up_ring *r = &d->waker.r;
    int small = round & 1;
    up_meta m = {.size = 8, .flags = small ? UP_FLAG_INLINE : 0};
    uint64_t pos, *bits_ = r->c->consumers_waiting;
    lock(&d->waker, r->c->producer_lock);
    d->pos = small ? up_position(UP_LD(&r->c->head)) : up_claim(r, 128, 8);
    if (!small) unlock(r->c->producer_lock);
    atomic_store(&d->begin, round);
    linger_a_little(&d->waker.seed);
    if (small) {
        CHECK(up_put_locked(r, &m) == UP_OK, "put");
    } else {
        CHECK(up_commit(r, d->pos, &m, 0) == UP_OK, "commit");
        up_wake_consumers(r, 1);
    }
    meet(&d->end, round, &d->over);
    int lost = !atomic_load(&d->saw) && (UP_LD(&bits_[d->sleeper.r.slot / 64]) >> (d->sleeper.r.slot & 63) & 1);
    (void)up_disarm(&d->sleeper.r, bits_);
    up_bell_drain(d->sleeper.bell[0]);
    EQUAL(take(&d->waker, &pos, 0, 1), UP_OK);
    finish(&d->waker, pos, UP_FINISHED);
    return lost;
}

/* Until a wake-up is lost, or the time is over. */
static int run_fence(double seconds) {
    static duel d;
    up_ring base;
    pthread_t thread;
    uint64_t end = up_now_ns(CLOCK_MONOTONIC) + (uint64_t)(seconds * 1e9), round = 0;
    int fd = make_ring(&base, 4096, UP_POLICY_BLOCK, 0), lost = 0;
    join(&d.waker, &base, 1, 0);
    join(&d.sleeper, &base, 2, 0);
    CHECK(up_use_producer(&d.waker.r, 0, 1) == UP_OK, "producer");
    CHECK(pthread_create(&thread, NULL, sleep_in_rounds, &d) == 0, "thread");
    run_on(0);
    while (!lost && (round % 256 || up_now_ns(CLOCK_MONOTONIC) < end)) lost = duel_once(&d, ++round);
    atomic_store(&d.over, 1);
    pthread_join(thread, NULL);
    printf("%llu rounds, %s\n", (unsigned long long)round, lost ? "and a wake-up was lost" : "no wake-up was lost");
    leave(&d.waker), leave(&d.sleeper);
    up_unmap(&base);
    close(fd);
    return lost;
}

#endif
