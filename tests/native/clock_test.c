/* When the time of a header is read again (_clock.h), with counters of our own; and that the real one is never far off.
 *
 *   clock_test
 *   tests/native/test_native.py builds and runs it; by hand: gcc -std=c11 -O2 tests/native/clock_test.c
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "../../upipe/memq/_clock.h"

#define CHECK(ok) ((ok) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok), abort()))

/* Whether a look at the counter `ticks` reads the time, whatever was known of it. */
static int reads(up_clock *clock, uint64_t ticks) {
    clock->ns = 1;
    return up_clock_at(clock, ticks) != 1;
}

static void the_time_is_read_again_when_the_counter_went_on(void) {
    up_clock clock = {0, 0, 1};
    CHECK(reads(&clock, 1000000));
    CHECK(!reads(&clock, 1000000) && !reads(&clock, 1000000 + UP_TICKS - 1));
    CHECK(reads(&clock, 1000000 + UP_TICKS) && !reads(&clock, 1000001 + UP_TICKS));
    CHECK(reads(&clock, 999999)); /* set back */
}

static void a_counter_that_may_halt_is_not_believed(void) {
    up_clock clock = {0, 0, 0};
    for (int i = 0; i < 3; i++) CHECK(reads(&clock, 5));
    clock = (up_clock){0, 0, -1};
    CHECK(reads(&clock, 0));
    CHECK(clock.steady == up_clock_steady());
}

static void a_stamp_is_never_far_from_the_time(void) {
    uint64_t last = 0;
    for (int i = 0; i < 200000; i++) {
        if (i % 1000 == 0) usleep(100);
        uint64_t before = up_now_ns(CLOCK_REALTIME), stamp = up_stamp(), after = up_now_ns(CLOCK_REALTIME);
        CHECK(stamp <= after && stamp + 1000000 > before); /* it could only be older than that with a counter of 4 MHz */
        CHECK(stamp >= last);
        last = stamp;
    }
}

int main(void) {
    the_time_is_read_again_when_the_counter_went_on();
    a_counter_that_may_halt_is_not_believed();
    a_stamp_is_never_far_from_the_time();
    return 0;
}
