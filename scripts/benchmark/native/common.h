/* Shared by the limits: clock, pinning, shared memory, percentiles. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* pins: "free", "one" or "two"; index: which end. */
static inline void pin(const char *pins, int index) {
    cpu_set_t all, set;
    int seen = 0, wanted = strcmp(pins, "two") == 0 ? index : 0;
    if (strcmp(pins, "free") == 0) return;
    sched_getaffinity(0, sizeof all, &all);
    wanted %= CPU_COUNT(&all);
    CPU_ZERO(&set);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &all) && seen++ == wanted) CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static inline void *shared(size_t size) {
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (p == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return p;
}

static int compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Prints p50, p99 and p99.9 in microseconds. */
static inline void print_percentiles(uint64_t *t, long n) {
    qsort(t, (size_t)n, sizeof *t, compare);
    printf("%.3f %.3f %.3f\n", t[n / 2] / 1e3, t[n * 99 / 100] / 1e3, t[n * 999 / 1000] / 1e3);
}
