/* How long to spin before a sleep, learned at each end of a queue from how often it helped. Pure but for up_spin.
 *
 * A spin that helped is twice as long the next time, one that did not is half as long. That alone would never find out that
 * answers come a little later than a short spin lasts, since then each wait ends in a sleep: so after a few brief sleeps in a
 * row, a long spin is tried. Each of those that does not help doubles the number of brief sleeps before the next one, each
 * that does takes an eighth off it. When somebody else took the CPU during a spin there are not enough of them for spinning:
 * no long spin follows for a while, which is twice as long if that happened not long before. (Rejected: counting involuntary
 * context switches, a system call each; long spins of producers, who wait for more than the next frame's room.) */
#ifndef UPIPE_SPIN_H
#define UPIPE_SPIN_H

#include "_segment.h"

#include <sched.h>

enum {
    UP_SPIN_MIN = 16,   /* pause instructions: 57 ns each on a Zen 5 */
    UP_SPIN_SHORT = 64, /* below, it is not worth to give Python's lock away, to look at the clock, or to give way */
    UP_SPIN_LONG = 1000,
    UP_SPIN_MAX = 2000, /* about as long as it takes to be put to sleep and woken on a halted CPU of a virtual machine */
    UP_TRIES_MIN = 4,
    UP_TRIES_MAX = 4096
};
#define UP_BRIEF_NS 100000ll    /* a sleep that was no longer might as well have been a long spin */
#define UP_TAKEN_NS 1000000ll   /* a spin that lasted longer was interrupted */
#define UP_YIELDED_NS 200000ll  /* as long may a yield last: the other end's answer, not somebody's slice */
#define UP_REST_MIN_NS 8000000ll
#define UP_REST_MAX_NS 1000000000ll

typedef struct {
    int64_t ns;    /* without long spins, or without yields, after the last interruption */
    int64_t until; /* CLOCK_MONOTONIC */
} up_rest;

typedef struct {
    int length;    /* pause instructions before the next sleep */
    int brief;     /* brief sleeps in a row */
    int tries;     /* so many before a long spin is tried */
    up_rest rest;
} up_spinning;

static inline void up_spinning_begin(up_spinning *s) { *s = (up_spinning){UP_SPIN_LONG / 2, 0, UP_TRIES_MIN, {0, 0}}; }

/* A spin, or a yield, ended at `now` after `ns`. 1 when somebody else had the CPU for longer than `most`: a rest begins. */
static inline int up_taken(up_rest *r, int64_t ns, int64_t most, int64_t now) {
    if (ns <= most) return 0;
    int64_t twice = 2 * r->ns < UP_REST_MAX_NS ? 2 * r->ns : UP_REST_MAX_NS;
    r->ns = r->ns && now - r->until < 16 * r->ns ? twice : UP_REST_MIN_NS;
    r->until = now + r->ns;
    return 1;
}

/* A spin of s->length ended at `now` after `ns` (0 when it was short: nobody looked), in a hit or not. */
static inline void up_spinning_spun(up_spinning *s, int hit, int64_t ns, int64_t now) {
    int n = s->length;
    if (up_taken(&s->rest, ns, UP_TAKEN_NS, now)) {
        s->length = UP_SPIN_MIN;
        return;
    }
    if (hit)
        s->length = 2 * n + UP_SPIN_MIN < UP_SPIN_MAX ? 2 * n + UP_SPIN_MIN : UP_SPIN_MAX;
    else
        s->length = n / 2 > UP_SPIN_MIN ? n / 2 : UP_SPIN_MIN;
    if (n < UP_SPIN_LONG) return;
    if (hit)
        s->tries = s->tries * 7 / 8 > UP_TRIES_MIN ? s->tries * 7 / 8 : UP_TRIES_MIN;
    else
        s->tries = 2 * s->tries < UP_TRIES_MAX ? 2 * s->tries : UP_TRIES_MAX;
}

/* A consumer slept from the end of its spin until `now`. */
static inline void up_spinning_slept(up_spinning *s, int64_t ns, int64_t now) {
    s->brief = ns < UP_BRIEF_NS ? s->brief + 1 : 0;
    if (s->brief < s->tries || now < s->rest.until) return;
    s->brief = 0;
    s->length = UP_SPIN_MAX;
}

/* Wait for a word to change for `n` pause instructions. 1 when it did. A long wait gives way now and then: the kernel may have
 * woken the other end on our CPU. */
static inline int up_spin(uint64_t *word, uint64_t before, int n) {
    for (int i = 1; i <= n; i++) {
        UP_PAUSE();
        if (UP_LD(word) != before) return 1;
        if (n >= UP_SPIN_SHORT && i % 32 == 0 && i < n) sched_yield(); /* a shorter one holds Python's lock */
    }
    return 0;
}

/* Behind a full ring, a producer that puts one frame for each that is taken works on the very cache lines that the consumer works
 * on: each of them travels for every frame, and both ends run at half their speed. It has the time, so when room came it waits for
 * some more of it (and looks seldom, for the same reason). A consumer close behind its producer costs less, and a wait of its
 * would be one of the frame. */
#define UP_SPIN_ROOM 16384u /* ring bytes to wait for: larger frames share few lines */
#define UP_SPIN_LOOKS 32    /* 8 pauses apart: 15 us */

static inline void up_spin_room(up_ring *r, uint64_t need) {
    uint64_t more = r->capacity / 8 < UP_SPIN_ROOM ? r->capacity / 8 : UP_SPIN_ROOM;
    uint64_t want = up_position(UP_LDA(&r->c->head)) + (need > more ? need : more);
    for (int i = 0; i < UP_SPIN_LOOKS && up_position(UP_LD(&r->c->tail)) + r->capacity < want; i++)
        for (int k = 0; k < 8; k++) UP_PAUSE();
}

/* On the CPU of the other end nothing comes while we spin. Give way to it once instead (sched_yield), before a sleep: its frame
 * may be there when we are back, without a sleep of ours and a wake of its, or it gets ours sooner. Whatever else needs this
 * CPU runs first as well, for a slice, where a sleeper's wake might go before it: so this rests as long spins do, with one
 * rest for all queues of a process: whether somebody needs the CPU is not the queue's matter. */
static inline int up_may_give_way(const up_rest *r, int64_t now) { return now >= r->until; }

static inline void up_gave_way(up_rest *r, int64_t ns, int64_t now) { (void)up_taken(r, ns, UP_YIELDED_NS, now); }

/* Was the other end last seen on our CPU? Then it cannot run while we spin. */
static inline int up_on_one_cpu(up_ring *r, int producer) {
    return UP_LD(producer ? &r->c->consumer_cpu : &r->c->producer_cpu) == up_cpu();
}

#endif
