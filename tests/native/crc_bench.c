/* Speed of upipe/memq/_crc.h, beside memcpy. Each figure is the best of several runs, so that the neighbours on the
 * machine show as little as possible.
 *
 *   gcc -std=c11 -Wall -Wextra -O2 tests/native/crc_bench.c -o crc_bench && ./crc_bench */
#define _DEFAULT_SOURCE
#include "../../upipe/memq/_crc.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define IMPLS (sizeof up_crc_impls / sizeof *up_crc_impls)
enum { RUNS = 15 };

static volatile uint32_t sink;
static uint8_t *src, *dst;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

typedef uint32_t (*work)(const up_crc_impl *m, uint32_t crc, size_t n);

static uint32_t do_crc(const up_crc_impl *m, uint32_t crc, size_t n) { return m->crc(crc, src, n); }
static uint32_t do_copy(const up_crc_impl *m, uint32_t crc, size_t n) { return m->copy(crc, dst, src, n); }
static uint32_t do_unaligned(const up_crc_impl *m, uint32_t crc, size_t n) { return m->copy(crc, dst, src + 13, n); }
static uint32_t do_blocks(const up_crc_impl *m, uint32_t crc, size_t n)
{
    return up_crc_copy_blocks(m->crc, crc, dst, src, n);
}
static uint32_t do_memcpy(const up_crc_impl *m, uint32_t crc, size_t n)
{
    (void)m;
    memcpy(dst, src, n);
    UP_CRC_REREAD();
    return crc;
}
static uint32_t do_header(const up_crc_impl *m, uint32_t crc, size_t n)
{
    (void)n;
    return m->header(src, crc);
}
/* As a producer does: the header is written, then summed, then its CRC stored. No call waits for the one before. */
static uint32_t do_words_header(const up_crc_impl *m, uint32_t crc, size_t n)
{
    (void)crc;
    for (int i = 0; i < 64; i += 8)
        memcpy(src + i, &(uint64_t){n}, 8);
    UP_CRC_REREAD();
    crc = m->header(src, 0);
    memcpy(src, &crc, 4);
    return crc;
}
static uint32_t do_fields_header(const up_crc_impl *m, uint32_t crc, size_t n)
{
    (void)crc;
    src[8] = 1, src[9] = (uint8_t)n, src[12] = 0;
    memcpy(src + 16, &(uint32_t){(uint32_t)n}, 4);
    for (int i = 24; i < 64; i += 8)
        memcpy(src + i, &(uint64_t){n}, 8);
    UP_CRC_REREAD();
    crc = m->header(src, 0);
    memcpy(src, &crc, 4);
    return crc;
}
static uint32_t do_deliveries(const up_crc_impl *m, uint32_t crc, size_t n)
{
    (void)m;
    return up_crc32_deliveries(crc, (uint16_t)n, (uint16_t)crc);
}

/* ns per call. Each call continues the CRC of the one before, so this is latency. */
static double measure(work f, const up_crc_impl *m, size_t n)
{
    size_t calls = 200000000 / (n + 2000) / 8 + 1;
    double best = 1e30;
    for (int run = 0; run < RUNS; run++) {
        uint32_t crc = 0;
        double start = now();
        for (size_t i = 0; i < calls; i++)
            crc = f(m, crc, n);
        double ns = (now() - start) / (double)calls;
        sink = crc;
        best = ns < best ? ns : best;
    }
    return best;
}

static const size_t sizes[] = {64, 4096, 65536, 1 << 20};
#define SIZES (sizeof sizes / sizeof *sizes)

static void row(const char *name, const char *what, work f, const up_crc_impl *m)
{
    printf("%-8s %-16s", name, what);
    for (size_t i = 0; i < SIZES; i++) {
        double ns = measure(f, m, sizes[i]);
        printf(" %7.2f GB/s", (double)sizes[i] / ns);
    }
    printf("\n");
}

int main(void)
{
    src = aligned_alloc(4096, (1 << 20) + 4096), dst = aligned_alloc(4096, (1 << 20) + 4096);
    for (size_t i = 0; i < (1 << 20) + 4096; i++)
        src[i] = (uint8_t)(i * 2654435761u >> 13), dst[i] = 0;
    printf("%-25s %12s %12s %12s %12s\n", "", "64 B", "4 KiB", "64 KiB", "1 MiB");
    row("", "memcpy", do_memcpy, NULL);
    for (size_t i = 0; i < IMPLS; i++) {
        const up_crc_impl *m = &up_crc_impls[i];
        if (!m->supported())
            continue;
        row(m->name, "crc", do_crc, m);
        row(m->name, "copy", do_copy, m);
        row(m->name, "copy unaligned", do_unaligned, m);
        row(m->name, "copy by blocks", do_blocks, m);
    }
    printf("\nns per call, each waiting for the one before except for a written header\n");
    for (size_t i = 0; i < IMPLS; i++) {
        const up_crc_impl *m = &up_crc_impls[i];
        if (!m->supported())
            continue;
        printf("%-8s header %.1f, written as u64s and summed %.1f, by fields %.1f\n", m->name,
               measure(do_header, m, 64), measure(do_words_header, m, 64), measure(do_fields_header, m, 64));
        static const size_t small[] = {9, 16, 33, 100, 200, 500};
        for (size_t k = 0; k < sizeof small / sizeof *small; k++)
            printf("%s %zu B: crc %.1f copy %.1f", k ? ";" : "        ", small[k], measure(do_crc, m, small[k]),
                   measure(do_copy, m, small[k]));
        printf("\n");
    }
    printf("deliveries %.1f\n", measure(do_deliveries, NULL, 3));
    return 0;
}
