/* upipe/memq/_crc.h and _crc_back.h: every implementation this CPU has, against a bitwise reference and values from Python's zlib.
 *
 *   gcc -std=c11 -Wall -Wextra -Werror -O2 -pthread tests/native/crc_test.c -o crc_test && ./crc_test
 *   the same with -O1 -g -fsanitize=address,undefined
 *
 * Buffers lie between two unmapped pages, so that one byte read or written outside kills the test even where the
 * sanitizer sees nothing (vector intrinsics). No input is random: a failure repeats. */
#define _DEFAULT_SOURCE
#include "../../upipe/memq/_crc_back.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(ok, ...) ((ok) ? (void)0 : (printf("%s:%d: %s: ", __FILE__, __LINE__, #ok), printf(__VA_ARGS__), exit(1)))
#define IMPLS (sizeof up_crc_impls / sizeof *up_crc_impls)

static uint32_t seed = 1;

static uint8_t next_byte(void) { return (uint8_t)((seed = seed * 1664525u + 1013904223u) >> 24); }

static uint32_t next_u32(void)
{
    uint32_t v = next_byte();
    for (int i = 0; i < 3; i++)
        v = v << 8 | next_byte();
    return v;
}

static void fill(uint8_t *p, size_t n)
{
    while (n--)
        *p++ = next_byte();
}

static uint32_t reference(uint32_t crc, const uint8_t *p, size_t n)
{
    crc = ~crc;
    while (n--) {
        crc ^= *p++;
        for (int i = 0; i < 8; i++)
            crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1)));
    }
    return ~crc;
}

typedef struct {
    uint8_t *start, *end; /* the pages before start and from end on are not mapped */
} area;

static area guarded(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n = (bytes + page - 1) / page * page;
    uint8_t *p = mmap(NULL, n + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED, "mmap\n");
    CHECK(mprotect(p + page, n, PROT_READ | PROT_WRITE) == 0, "mprotect\n");
    return (area){p + page, p + page + n};
}

/* ---- constants ------------------------------------------------------------------------------------------------ */

static uint32_t power(int n) /* reflect32(x^n mod P) */
{
    uint32_t r = 0x80000000u;
    while (n--)
        r = (r >> 1) ^ (0xEDB88320u & (0u - (r & 1)));
    return r;
}

#if UP_CRC_X86
/* What a matrix of GF2P8AFFINEQB makes of a byte, by its definition. */
static uint8_t transform(uint64_t matrix, uint8_t b)
{
    uint8_t out = 0;
    for (int i = 0; i < 8; i++)
        out |= (uint8_t)(__builtin_parity(matrix >> 8 * (7 - i) & 0xff & b) << i);
    return out;
}

/* b, 8 blocks further from the end, is A4(b) 4 blocks further, A5(b) 3, A7(b) 1 and A8(b) 0. That determines the matrices:
 * no other bytes sum up to nothing there, or the 32 columns would not be independent. */
static void test_matrices(void)
{
    static const struct {
        uint64_t matrix;
        int blocks;
    } as[] = {{UP_CRC_A4, 4}, {UP_CRC_A5, 3}, {UP_CRC_A7, 1}, {UP_CRC_A8, 0}};
    uint32_t moved[9], rows[32], rank = 0;
    for (int blocks = 0; blocks <= 8; blocks++)
        moved[blocks] = power(512 * blocks);
    for (int b = 0; b < 256; b++) { /* a byte, reflected, is its own low 8 bits of the register, shifted to the top */
        uint32_t sum = up_crc_product((uint32_t)b << 24, moved[8]);
        for (int j = 0; j < 4; j++)
            sum ^= up_crc_product((uint32_t)transform(as[j].matrix, (uint8_t)b) << 24, moved[as[j].blocks]);
        CHECK(sum == 0, "byte %02x: %08x is left\n", b, sum);
    }
    for (int i = 0; i < 32; i++)
        rows[i] = up_crc_product((uint32_t)1 << (24 + i % 8), moved[as[i / 8].blocks]);
    for (int bit = 0; bit < 32; bit++) {
        uint32_t at = rank;
        while (at < 32 && !(rows[at] >> bit & 1))
            at++;
        if (at == 32)
            continue;
        uint32_t row = rows[at];
        rows[at] = rows[rank], rows[rank++] = row;
        for (uint32_t i = rank; i < 32; i++)
            rows[i] ^= rows[i] >> bit & 1 ? row : 0;
    }
    CHECK(rank == 32, "rank %u\n", rank);
}
#endif

static void test_constants(void)
{
    CHECK(UP_CRC_DELIVERIES == power(58 * 8 + 32), "%08x\n", power(58 * 8 + 32));
#if UP_CRC_X86
    static const struct {
        int n;
        uint64_t k;
    } ks[] = {{32, UP_CRC_K32},     {96, UP_CRC_K96},     {160, UP_CRC_K160},   {224, UP_CRC_K224},
              {288, UP_CRC_K288},   {352, UP_CRC_K352},   {416, UP_CRC_K416},   {480, UP_CRC_K480},
              {544, UP_CRC_K544},   {992, UP_CRC_K992},   {1056, UP_CRC_K1056}, {1504, UP_CRC_K1504},
              {1568, UP_CRC_K1568}, {2016, UP_CRC_K2016}, {2080, UP_CRC_K2080}};
    for (size_t i = 0; i < sizeof ks / sizeof *ks; i++)
        CHECK(ks[i].k == (uint64_t)power(ks[i].n) << 1, "K(%d)\n", ks[i].n);

    /* Long division of x^96 by P: each bit leaving the register is a quotient bit, x^64 first, and reflect64 of the
     * quotient without its last bit has that first one at bit 0. */
    uint64_t mu = 0;
    uint32_t r = 0x80000000u;
    for (int step = 1; step < 96; step++) {
        uint32_t out = r & 1;
        if (step >= 32)
            mu |= (uint64_t)out << (step - 32);
        r = (r >> 1) ^ (0xEDB88320u & (0u - out));
    }
    CHECK(mu == UP_CRC_MU, "mu %016llx\n", (unsigned long long)mu);
    CHECK(UP_CRC_P == ((uint64_t)0xEDB88320u << 1 | 1), "P\n");
    test_matrices();
#endif
}

/* ---- one implementation --------------------------------------------------------------------------------------- */

static void test_zlib_values(const up_crc_impl *m)
{
    static const struct {
        size_t n;
        uint32_t crc, expected; /* zlib.crc32(data[:n], crc), CPython 3.11 */
    } zlib[] = {
        {1, 0x00000000u, 0xfd6d930au},     {3, 0xdeadbeefu, 0x1c28cdaau},     {7, 0x00000001u, 0x23efdcbfu},
        {9, 0xffffffffu, 0x01019356u},     {15, 0x12345678u, 0xebc447c0u},    {16, 0x00000000u, 0x05d50646u},
        {63, 0x00000005u, 0xfe5180e6u},    {64, 0x00000000u, 0xbc5eb72du},    {65, 0xcafebabeu, 0x20c681e6u},
        {255, 0x00000000u, 0x3e557871u},   {256, 0x00000009u, 0x8aff5a19u},   {1000, 0x80000000u, 0x5a52e889u},
        {4096, 0x00000000u, 0x5b24a61au},  {65537, 0xabcdef01u, 0x656db13cu}, {1048576, 0x00000000u, 0xc0f68319u},
    };
    uint8_t *data = malloc(1 << 20), *copy = malloc(1 << 20);
    seed = 1;
    fill(data, 1 << 20);
    for (size_t i = 0; i < sizeof zlib / sizeof *zlib; i++) {
        uint32_t got = m->crc(zlib[i].crc, data, zlib[i].n);
        CHECK(got == zlib[i].expected, "%s n=%zu got %08x\n", m->name, zlib[i].n, got);
        got = m->copy(zlib[i].crc, copy, data, zlib[i].n);
        CHECK(got == zlib[i].expected && !memcmp(copy, data, zlib[i].n), "%s n=%zu\n", m->name, zlib[i].n);
    }
    CHECK(m->crc(0, "123456789", 9) == 0xcbf43926u, "%s\n", m->name);
    CHECK(m->crc(7, NULL, 0) == 7 && m->copy(7, NULL, NULL, 0) == 7, "%s: empty\n", m->name);
    CHECK(m->header(data, m->crc(0, "payload", 7)) == 0xc349e36bu, "%s: header\n", m->name);
    CHECK(m->header(data, 0) == 0x09f2e00bu, "%s: header alone\n", m->name);
    free(data), free(copy);
}

enum { LONGEST = 1100 };

static void copy_once(const up_crc_impl *m, uint32_t crc, uint8_t *dst, area within, const uint8_t *src, size_t n,
                      uint32_t expected)
{
    int before = dst > within.start, after = dst + n < within.end;
    memset(dst, 0xA5, n);
    if (before)
        dst[-1] = 0x5A;
    if (after)
        dst[n] = 0x5A;
    uint32_t got = m->copy(crc, dst, src, n);
    CHECK(got == expected, "%s n=%zu got %08x\n", m->name, n, got);
    CHECK(!memcmp(dst, src, n), "%s n=%zu\n", m->name, n);
    CHECK((!before || dst[-1] == 0x5A) && (!after || dst[n] == 0x5A), "%s n=%zu: wrote outside\n", m->name, n);
}

/* Every length at every alignment, from either end of the mapped pages, and to either end of others. */
static void test_every_length(const up_crc_impl *m, area src, area dst)
{
    static uint32_t expected[LONGEST + 1];
    for (size_t align = 0; align <= 64; align += align < 17 ? 1 : 7) {
        uint32_t start = align % 3 ? next_u32() : 0;
        uint8_t *p = src.start + align;
        fill(p, LONGEST);
        expected[0] = start;
        for (size_t n = 0; n < LONGEST; n++)
            expected[n + 1] = reference(expected[n], p + n, 1);
        for (size_t n = 0; n <= LONGEST; n++) {
            uint8_t *q = src.end - n - align;
            uint32_t got = m->crc(start, p, n);
            CHECK(got == expected[n], "%s n=%zu align=%zu got %08x\n", m->name, n, align, got);
            copy_once(m, start, dst.end - n - align / 2, dst, p, n, expected[n]);
            memmove(q, p, n);
            got = m->crc(start, q, n);
            CHECK(got == expected[n], "%s n=%zu end-%zu got %08x\n", m->name, n, align, got);
            copy_once(m, start, dst.start + align, dst, q, n, expected[n]);
        }
    }
}

/* On the heap at the exact size: what the guard pages are for the vector code, the sanitizer's red zones are here. */
static void test_heap(const up_crc_impl *m)
{
    for (size_t n = 1; n < 600; n++) {
        uint8_t *src = malloc(n), *dst = malloc(n);
        fill(src, n);
        CHECK(m->crc(1, src, n) == m->copy(1, dst, src, n), "%s n=%zu\n", m->name, n);
        CHECK(!memcmp(src, dst, n), "%s n=%zu\n", m->name, n);
        free(src), free(dst);
    }
}

static void test_big_and_chained(const up_crc_impl *m, area src, area dst)
{
    size_t room = (size_t)(src.end - src.start);
    fill(src.start, room);
    for (int round = 0; round < 24; round++) {
        size_t n = next_u32() % (room - 64), at = next_u32() % 64, cut = next_u32() % (n + 1), again;
        uint8_t *p = src.start + at, *d = dst.end - n;
        uint32_t start = next_u32(), expected = reference(start, p, n), crc;
        CHECK(m->crc(start, p, n) == expected, "%s n=%zu\n", m->name, n);
        CHECK(m->crc(m->crc(start, p, cut), p + cut, n - cut) == expected, "%s n=%zu cut=%zu\n", m->name, n, cut);
        copy_once(m, start, d, dst, p, n, expected);
        crc = m->copy(start, d, p, cut);
        CHECK(m->copy(crc, d + cut, p + cut, n - cut) == expected, "%s n=%zu cut=%zu\n", m->name, n, cut);
        crc = start;
        for (size_t i = 0; i < n; i += again) { /* many short pieces */
            again = next_byte() % 100;
            again = again < n - i ? again : n - i;
            crc = m->crc(crc, p + i, again);
        }
        CHECK(crc == expected, "%s pieces of n=%zu\n", m->name, n);
    }
}

static void test_header(const up_crc_impl *m, area a)
{
    for (int round = 0; round < 2000; round++) {
        uint8_t *h = round & 1 ? a.start + round % 64 : a.end - 64 - round % 64, zeroed[64];
        uint32_t crc = round % 5 ? next_u32() : 0;
        fill(h, 64);
        memcpy(zeroed, h, 64);
        memset(zeroed, 0, 4);
        uint32_t expected = reference(crc, zeroed, 64), got = m->header(h, crc);
        CHECK(got == expected, "%s got %08x\n", m->name, got);
    }
}

static void test_deliveries(const up_crc_impl *m)
{
    uint8_t payload[77], h[64];
    for (int round = 0; round < 3000; round++) {
        uint16_t old = (uint16_t)next_u32(), new = (uint16_t)(round % 3 ? old + 1 : (int)next_u32());
        uint32_t wrong = round % 4 ? 0 : next_u32();
        size_t n = next_byte() % sizeof payload;
        fill(payload, n), fill(h, 64);
        h[4] = (uint8_t)old, h[5] = (uint8_t)(old >> 8);
        uint32_t before = m->header(h, m->crc(0, payload, n));
        h[4] = (uint8_t)new, h[5] = (uint8_t)(new >> 8);
        uint32_t after = m->header(h, m->crc(0, payload, n));
        CHECK(up_crc32_deliveries(before ^ wrong, old, new) == (after ^ wrong), "%u -> %u\n", old, new);
    }
}

/* ---- the bytes as copied: somebody else keeps changing the source --------------------------------------------- */

typedef struct {
    uint8_t *p;
    size_t n;
    int stop;
} scribble;

static void *scribbler(void *arg)
{
    scribble *s = arg;
    for (uint64_t v = 0x9E3779B97F4A7C15u; !__atomic_load_n(&s->stop, __ATOMIC_RELAXED); v += 0x9E3779B97F4A7C15u)
        for (size_t i = 0; i < s->n; i += 8)
            __atomic_store_n((uint64_t *)(void *)(s->p + i), v ^ i, __ATOMIC_RELAXED);
    return NULL;
}

static void test_changing_source(const up_crc_impl *m, area src, area dst)
{
    static const size_t sizes[] = {1,  7,  8,   9,   13,  15,  16,  17,   31,    47,   63,
                                   64, 65, 100, 127, 255, 256, 300, 1023, 16385, 40001};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        size_t n = sizes[k];
        scribble s = {src.start, (n + 7) / 8 * 8, 0};
        pthread_t t;
        CHECK(pthread_create(&t, NULL, scribbler, &s) == 0, "pthread_create\n");
        for (int i = 0; i < (n < 1000 ? 20000 : 500); i++) {
            uint32_t got = m->copy(0, dst.start, src.start, n);
            CHECK(got == up_crc32_sw(0, dst.start, n), "%s n=%zu: not the CRC of what was stored\n", m->name, n);
        }
        __atomic_store_n(&s.stop, 1, __ATOMIC_RELAXED);
        pthread_join(t, NULL);
    }
}

/* ---- long input ------------------------------------------------------------------------------------------------ */

/* Every length and alignment around those where another loop begins, which are up to 2 KiB. */
static void test_loops(const up_crc_impl *m, area src, area dst)
{
    fill(src.start, 4096);
    for (size_t n = 900; n < 2700; n++) {
        const uint8_t *p = src.start + n % 67;
        uint32_t start = n % 3 ? next_u32() : 0, expected = reference(start, p, n);
        CHECK(m->crc(start, p, n) == expected, "%s n=%zu\n", m->name, n);
        copy_once(m, start, dst.end - n, dst, p, n, expected);
    }
}

static void test_back(void)
{
    size_t own = up_crc_own_cache, most = UP_CRC_BACK * UP_CRC_BACK_BLOCKS;
    uint8_t *p = malloc(most + 1);
    CHECK(p, "malloc\n");
    fill(p, most + 1);
    for (size_t n = 0; n <= most; n = n < UP_CRC_BACK - 2 ? UP_CRC_BACK - 2 : n + (n % UP_CRC_BACK < 3 ? 1 : UP_CRC_BACK * 7 - 5))
        CHECK(up_crc32_back(p, n) == up_crc32(0, p, n), "n=%zu\n", n);
    CHECK(up_crc32_back(p, most) == up_crc32(0, p, most), "the most\n");
    for (up_crc_own_cache = 0; up_crc_own_cache <= most; up_crc_own_cache = 2 * up_crc_own_cache + 65536)
        for (size_t n = 1; n <= most + 1; n = 3 * n + 65536)
            CHECK(up_crc32_in_place(p, n) == up_crc32(0, p, n), "n=%zu, cache %zu\n", n, up_crc_own_cache);
    up_crc_own_cache = own;
    free(p);
}

int main(void)
{
    area src = guarded(200000), dst = guarded(200000);
    test_constants();
    for (size_t i = 0; i < IMPLS; i++) {
        const up_crc_impl *m = &up_crc_impls[i];
        if (!m->supported()) {
            printf("%-8s skipped: not on this CPU\n", m->name);
            continue;
        }
        test_zlib_values(m);
        test_every_length(m, src, dst);
        test_heap(m);
        test_big_and_chained(m, src, dst);
        test_loops(m, src, dst);
        test_header(m, src);
        test_deliveries(m);
        test_changing_source(m, src, dst);
        printf("%-8s ok\n", m->name);
    }
    up_crc_impl chosen = {"chosen", up_crc_has_sw, up_crc32, up_crc32_copy, up_crc32_header};
    test_zlib_values(&chosen);
    test_deliveries(&chosen);
    test_back();
    printf("chosen: %s\n", up_crc32_name());
    return 0;
}
