/* The three robust locks. Whoever gets one from a dead holder mends what it left before it goes on; dying in the mending
 * hands the lock over once more, and every repair can be repeated. */
#ifndef UPIPE_LOCK_H
#define UPIPE_LOCK_H

#include "_consumers.h"

static inline pthread_mutex_t *up_mutex(uint64_t *area) { return (pthread_mutex_t *)area; }

/* The stream follows from the producers' states; caller holds registry_lock. */
static void up_recount_stream(up_ring *r) {
    uint32_t waited = 0, closed = 0;
    for (uint32_t i = 0; i < UP_PRODUCERS; i++) {
        uint32_t state = UP_LD(&r->producers[i].state);
        waited += state == UP_PRODUCER_DECLARED || state == UP_PRODUCER_OPEN;
        closed += state == UP_PRODUCER_CLOSED;
    }
    UP_STR(&r->c->stream, waited ? UP_STREAM_OPEN : closed ? UP_STREAM_CLOSED : UP_STREAM_NEW); /* SYNC stream */
}

static int up_lock_result(up_ring *r, uint64_t *area, int rc) {
    if (rc == EOWNERDEAD) { /* the holder died inside: mend what it left, then the lock is ours */
        if (area == r->c->producer_lock) up_repair_producer(r);
        if (area == r->c->consumer_lock) up_repair_consumer(r);
        if (area == r->c->registry_lock) up_recount_stream(r);
        UP_CRASH("repaired");
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

/* May sleep: call it without the GIL. The deadline follows CLOCK_MONOTONIC, also when somebody sets the clock. */
static int up_lock(up_ring *r, uint64_t *area, double seconds) {
    if (up_trylock(r, area) == UP_OK) return UP_OK;
    uint64_t now = up_now_ns(CLOCK_MONOTONIC), end = now + (uint64_t)(seconds * 1e9);
    for (;;) {
        uint64_t until = up_now_ns(CLOCK_REALTIME) + (end - now); /* the only clock that pthread_mutex_timedlock knows */
        struct timespec at = {(time_t)(until / 1000000000ull), (long)(until % 1000000000ull)};
        int rc = pthread_mutex_timedlock(up_mutex(area), &at);
        now = up_now_ns(CLOCK_MONOTONIC);
        if (rc != ETIMEDOUT || now >= end) return up_lock_result(r, area, rc);
    }
}

static inline void up_unlock(uint64_t *area) { pthread_mutex_unlock(up_mutex(area)); }

/* Leave the consumers' lock. When tail moved since `before`, who waits for room or for the end hears of it. */
static inline void up_unlock_consumers(up_ring *r, uint64_t before) {
    uint64_t after = UP_LD(&r->c->tail);
    up_unlock(r->c->consumer_lock);
    if (after == before) return;
    up_fence_unlocked(r);
    up_wake_room(r);
    if (__builtin_expect(up_ended(r), 0)) up_wake_consumers(r, UP_SLOTS);
}

#endif
