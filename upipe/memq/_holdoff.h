/* A reader of large frames in place holds off for a moment, where it has measured that this is faster.
 *
 * The writer's checksum leaves a frame of about the size of its own cache in there. A reader that looks at it at once takes it
 * out of that cache line by line while the writer fills the next frame, and the fill takes twice as long. 10 us later the writer
 * has thrown the first lines out, the reader stays behind it, and both run at full speed: on a Zen 4 (1 MiB of L2) a frame of
 * 640 KiB to 1.25 MiB takes a third less time. Smaller and larger ones gain little, a fill that reads nothing throws nothing
 * out and loses, and what another machine does nobody knows. So the reader measures: some frames without, some with, and goes
 * on with what was faster by a tenth; now and then again. Only a stream counts: a frame that comes by itself is not held up,
 * and one that has lain there longer never is. (Rejected: a reader that stays a whole frame behind: each frame is late by one,
 * and where the ring outgrows its share of the last cache, both run at the memory's speed. Other orders of the two checksums.)
 *
 * Pure but for up_leave_alone: who calls gives the time. A handle is one reader: threads that share it have Python's lock. */
#ifndef UPIPE_HOLDOFF_H
#define UPIPE_HOLDOFF_H

#include "_segment.h"

enum {
    UP_HOLD_NS = 10000,      /* after its commit a frame is left alone */
    UP_HOLD_GAP_NS = 500000, /* frames further apart are no stream */
    UP_HOLD_SETTLE = 8,      /* frames after a change that are not measured */
    UP_HOLD_WINDOW = 32,     /* frames between two decisions, those included */
    UP_HOLD_STAY_MIN = 4,    /* windows before it is measured again; twice as many when that came out the same */
    UP_HOLD_STAY_MAX = 64
};
#define UP_HOLD_LEAST (512u << 10) /* bytes of a payload */
#define UP_HOLD_MOST (3u << 19)

typedef struct {
    uint64_t size; /* of the frames that are measured */
    int64_t last;  /* when the last one was found, CLOCK_MONOTONIC */
    int64_t took[UP_HOLD_WINDOW];
    int64_t plain; /* ns a frame took without holding off; 0 = not yet measured */
    int n;         /* frames in this window */
    int holds;     /* frames are held off in this window */
    int chosen;    /* what the last measurement came to */
    int stay;      /* windows between two measurements */
    int left;      /* windows before the next one; 0 = this window measures */
} up_hold;

static inline int up_hold_fits(uint64_t size) { return size >= UP_HOLD_LEAST && size <= UP_HOLD_MOST; }

static inline void up_hold_begin(up_hold *h, uint64_t size) { *h = (up_hold){.size = size, .stay = UP_HOLD_STAY_MIN}; }

/* The median of the settled part of a window. */
static inline int64_t up_hold_typical(up_hold *h) {
    int64_t *took = h->took + UP_HOLD_SETTLE;
    int n = UP_HOLD_WINDOW - UP_HOLD_SETTLE;
    for (int i = 1; i < n; i++) {
        int64_t one = took[i];
        int k = i;
        for (; k > 0 && took[k - 1] > one; k--) took[k] = took[k - 1];
        took[k] = one;
    }
    return took[n / 2];
}

/* A window is over. */
static inline void up_hold_decide(up_hold *h) {
    if (h->left > 0) {
        if (--h->left == 0) h->holds = 0, h->plain = 0;
    } else if (h->plain == 0) {
        h->plain = up_hold_typical(h), h->holds = 1;
    } else {
        int better = up_hold_typical(h) < h->plain - h->plain / 10;
        int stay = better != h->chosen ? UP_HOLD_STAY_MIN : 2 * h->stay < UP_HOLD_STAY_MAX ? 2 * h->stay : UP_HOLD_STAY_MAX;
        h->stay = h->left = stay, h->holds = h->chosen = better;
    }
}

/* A frame whose size fits was found at `now` (CLOCK_MONOTONIC). 1 when it shall be left alone for UP_HOLD_NS after its commit. */
static inline int up_hold_off(up_hold *h, uint64_t size, int64_t now) {
    int64_t took = now - h->last;
    if (size != h->size) up_hold_begin(h, size);
    h->last = now;
    if (took > UP_HOLD_GAP_NS) {
        h->n = 0;
        return 0;
    }
    h->took[h->n++] = took;
    if (h->n == UP_HOLD_WINDOW) {
        up_hold_decide(h);
        h->n = 0;
    }
    return h->holds;
}

/* Wait until UP_HOLD_NS after `stamp` (CLOCK_REALTIME, of a commit). Not at all when a clock was set, or on another host differs. */
static inline void up_leave_alone(uint64_t stamp) {
    int64_t age = (int64_t)(up_now_ns(CLOCK_REALTIME) - stamp);
    if (age < 0 || age >= UP_HOLD_NS) return;
    int64_t until = (int64_t)up_now_ns(CLOCK_MONOTONIC) + UP_HOLD_NS - age;
    while ((int64_t)up_now_ns(CLOCK_MONOTONIC) < until) UP_PAUSE();
}

#endif
