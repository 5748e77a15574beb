/* The time of a frame's header. clock_gettime takes 22 ns here, a fifth of a small put; reading the processor's counter takes
 * a third of that. So the time is read again only when the counter has gone on by UP_TICKS, which is 1 to 4 us, and only
 * where it goes on at one rate whatever the processor does (invariant TSC): one that halts would make the time stand still.
 * A counter that was set back (another processor, a suspended machine) is far off, which reads the time again.
 *
 * For one thread at a time (Python's lock). */
#ifndef UPIPE_CLOCK_H
#define UPIPE_CLOCK_H

#include "_segment.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <x86intrin.h>
#endif

#define UP_TICKS 4096u

typedef struct {
    uint64_t ticks, ns; /* when the time was read, and it */
    int steady;         /* 1 the counter can be used, 0 it cannot, -1 nobody has asked yet */
} up_clock;

static inline int up_clock_steady(void) {
#if defined(__x86_64__)
    unsigned int a, b, c, d = 0;
    return __get_cpuid(0x80000007u, &a, &b, &c, &d) && (d >> 8 & 1);
#else
    return 0;
#endif
}

/* Nanoseconds since 1970, now or at most UP_TICKS ago; `ticks` is the counter now. */
static inline uint64_t up_clock_at(up_clock *clock, uint64_t ticks) {
    if (__builtin_expect(clock->steady == 1 && ticks - clock->ticks < UP_TICKS, 1)) return clock->ns;
    if (clock->steady < 0) clock->steady = up_clock_steady();
    clock->ticks = ticks;
    return clock->ns = up_now_ns(CLOCK_REALTIME);
}

static inline uint64_t up_stamp(void) {
    static up_clock clock = {0, 0, -1};
#if defined(__x86_64__)
    return up_clock_at(&clock, __rdtsc());
#else
    return up_clock_at(&clock, 0);
#endif
}

#endif
