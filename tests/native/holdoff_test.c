/* When a reader of large frames holds off (_holdoff.h), in simulated time: streams whose frames take known times with and
 * without it.
 *
 *   holdoff_test      one small story each
 *   tests/native/test_native.py builds and runs it; by hand: gcc -std=c11 -O2 tests/native/holdoff_test.c
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#include "../../upipe/memq/_holdoff.h"

#define CHECK(ok) ((ok) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok), abort()))

static const uint64_t MIB = 1 << 20;
static int64_t now = 1000000000;

/* So many frames, each after `plain` ns, or `held` when the one before was held off; every tenth is late. How many were held. */
static int stream(up_hold *h, uint64_t size, int frames, int64_t plain, int64_t held) {
    int count = 0, before = 0;
    for (int i = 0; i < frames; i++) {
        now += (before ? held : plain) + (i % 10 ? i * 7919 % 2000 : 100000);
        count += before = up_hold_off(h, size, now);
    }
    return count;
}

static void where_it_is_faster_it_is_done(void) {
    up_hold h = {0};
    CHECK(stream(&h, MIB, 10000, 75000, 50000) > 9500);
}

static void where_it_is_not_it_is_hardly_tried(void) {
    int64_t held[] = {68000, 75000, 90000, 300000}; /* a little faster is not worth it */
    for (int i = 0; i < 4; i++) {
        up_hold h = {0};
        stream(&h, MIB, 10000, 75000, held[i]);
        CHECK(!h.chosen && stream(&h, MIB, 10000, 75000, held[i]) < 200);
    }
}

static void it_is_measured_again(void) {
    up_hold h = {0};
    int most = UP_HOLD_WINDOW * (UP_HOLD_STAY_MAX + 3);
    for (int i = 0; i < 3; i++) {
        stream(&h, MIB, 10 * most, 75000, 90000);
        CHECK(!h.chosen);
        stream(&h, MIB, most, 75000, 50000);
        CHECK(h.chosen);
        stream(&h, MIB, 10 * most, 75000, 50000);
        stream(&h, MIB, most, 75000, 90000);
        CHECK(!h.chosen);
    }
}

static void what_comes_by_itself_is_not_held_up(void) {
    up_hold h = {0};
    stream(&h, MIB, 1000, 75000, 50000);
    CHECK(h.chosen);
    CHECK(stream(&h, MIB, 1000, UP_HOLD_GAP_NS + 1, UP_HOLD_GAP_NS + 1) == 0);
    CHECK(stream(&h, MIB, 100, 75000, 50000) > 90); /* what was learned stays */
}

static void another_size_is_another_stream(void) {
    up_hold h = {0};
    stream(&h, MIB, 1000, 75000, 50000);
    CHECK(stream(&h, MIB / 2, UP_HOLD_WINDOW, 40000, 40000) <= 1);
    CHECK(h.size == MIB / 2 && !h.chosen);
    CHECK(up_hold_fits(UP_HOLD_LEAST) && up_hold_fits(UP_HOLD_MOST));
    CHECK(!up_hold_fits(UP_HOLD_LEAST - 1) && !up_hold_fits(UP_HOLD_MOST + 1));
}

static int64_t left_alone(int64_t age) { /* ns, of the quickest of many: others may run between */
    int64_t best = INT64_MAX;
    for (int i = 0; i < 200; i++) {
        int64_t began = (int64_t)up_now_ns(CLOCK_MONOTONIC);
        up_leave_alone(up_now_ns(CLOCK_REALTIME) - (uint64_t)age);
        int64_t took = (int64_t)up_now_ns(CLOCK_MONOTONIC) - began;
        if (took < best) best = took;
    }
    return best;
}

static void only_the_newest_frames_wait_and_not_for_long(void) {
    CHECK(left_alone(0) >= UP_HOLD_NS * 3 / 4 && left_alone(0) < 3 * UP_HOLD_NS);
    CHECK(left_alone(UP_HOLD_NS) < UP_HOLD_NS / 2);
    CHECK(left_alone(1000000000) < UP_HOLD_NS / 2);
    CHECK(left_alone(-1000000) < UP_HOLD_NS / 2); /* a clock was set */
}

int main(void) {
    where_it_is_faster_it_is_done();
    where_it_is_not_it_is_hardly_tried();
    it_is_measured_again();
    what_comes_by_itself_is_not_held_up();
    another_size_is_another_stream();
    only_the_newest_frames_wait_and_not_for_long();
    return 0;
}
