/* zlib's CRC32 (IEEE 802.3, reflected polynomial 0xEDB88320) at the speed of the machine. Header only, C11, libc only.
 *
 *   up_crc32(crc, p, n)             zlib.crc32(p[0:n], crc)
 *   up_crc32_copy(crc, dst, src, n) the same, and dst[0:n] = src[0:n], which must not overlap; the CRC is of the very
 *                                   bytes stored in dst, even while somebody else is changing src
 *   up_crc32_header(h64, crc)       continues crc over 64 bytes, the first 4 of them taken as zero
 *   up_crc32_deliveries(crc, a, b)  the CRC of a frame (payload, then header) whose u16 at header byte 4 goes a -> b
 *   up_crc32_name()                 the implementation chosen: "vpclmul", "pclmul", "armv8" or "sw"
 *
 * Each implementation is also callable by name (up_crc32_sw, up_crc32_pclmul, ...) and listed in up_crc_impls: one
 * interface, one conformance suite (tests/native/crc_test.c). The choice is made once per translation unit, by a
 * constructor, so before anything can call us: the call path needs no lock, no atomic and no "is it ready" test.
 *
 * Sources. V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009
 * (folding, Barrett reduction, reflected constants). M. Adler, crc32_combine() of zlib (a CRC is linear over GF(2), so
 * a change at a known distance from the end moves it by a known amount). M. Kounavis and F. Berry, "A Systematic
 * Approach to Building High Performance Software-based CRC Generators", 2005 (slicing by 8).
 *
 * Notation. x^n is taken mod P = x^32 + 0x04C11DB7. A register holds polynomials reflected: lower bits (and lower
 * addresses) are higher powers. K(n) = reflect32(x^n mod P) << 1; clmul(w, K(n)) of a 64-bit word w, read as 96 bits,
 * is w * x^n. The test recomputes every constant here from 0xEDB88320. */
#ifndef UPIPE_MEMQ_CRC_H
#define UPIPE_MEMQ_CRC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define UP_CRC_X86 1
#elif defined(__aarch64__) && defined(__linux__) && defined(__AARCH64EL__)
#include <sys/auxv.h>
#define UP_CRC_ARM 1
#endif

typedef struct {
    const char *name;
    int (*supported)(void);
    uint32_t (*crc)(uint32_t crc, const void *p, size_t n);
    uint32_t (*copy)(uint32_t crc, void *dst, const void *src, size_t n);
    uint32_t (*header)(const void *h64, uint32_t crc);
} up_crc_impl;

/* From here on the compiler may not assume that memory still holds what it wrote: bytes copied from a source that
 * somebody else may be changing are read back from the copy, never again from the source. */
#define UP_CRC_REREAD() __asm__ __volatile__("" ::: "memory")
/* The same promise for one register: v was loaded once, and what is stored is what is summed. */
#define UP_CRC_ONCE(v) __asm__("" : "+v"(v))
#define UP_CRC_FN static inline __attribute__((unused))

/* ---- portable: slicing by 8 ---------------------------------------------------------------------------------- */

#define UP_CRC_POLY 0xEDB88320u
#define UP_CRC_BLOCK ((size_t)4096) /* bytes copied, then summed while in L1; up to 64 KiB: a tenth slower or less */

/* up_crc_table[k][b] = CRC register after byte b and k zero bytes. Filled by the constructor, constant after it. */
static uint32_t up_crc_table[8][256];

UP_CRC_FN void up_crc_fill_table(void)
{
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t c = b;
        for (int i = 0; i < 8; i++)
            c = (c >> 1) ^ (UP_CRC_POLY & (0u - (c & 1)));
        up_crc_table[0][b] = c;
    }
    for (int k = 1; k < 8; k++)
        for (int b = 0; b < 256; b++)
            up_crc_table[k][b] = (up_crc_table[k - 1][b] >> 8) ^ up_crc_table[0][up_crc_table[k - 1][b] & 255];
}

UP_CRC_FN uint32_t up_crc_le32(const uint8_t *p) /* compilers make it one load */
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

UP_CRC_FN uint64_t up_crc_le64(const uint8_t *p)
{
    return (uint64_t)up_crc_le32(p) | (uint64_t)up_crc_le32(p + 4) << 32;
}

UP_CRC_FN uint32_t up_crc32_sw(uint32_t crc, const void *data, size_t n)
{
    const uint8_t *p = (const uint8_t *)data;
    uint32_t(*t)[256] = up_crc_table;
    crc = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t a = crc ^ up_crc_le32(p), b = up_crc_le32(p + 4);
        crc = t[7][a & 255] ^ t[6][a >> 8 & 255] ^ t[5][a >> 16 & 255] ^ t[4][a >> 24] ^
              t[3][b & 255] ^ t[2][b >> 8 & 255] ^ t[1][b >> 16 & 255] ^ t[0][b >> 24];
    }
    for (; n; n--)
        crc = (crc >> 8) ^ t[0][(crc ^ *p++) & 255];
    return ~crc;
}

/* Copies by blocks and sums each block of the copy while it is in L1. Right where a sum has no wide registers to
 * store from; the vector code stores as it sums instead: 62 GB/s against 45 at 4 KiB, 53 against 36 at 1 MiB. */
UP_CRC_FN uint32_t up_crc_copy_blocks(uint32_t (*sum)(uint32_t, const void *, size_t), uint32_t crc, void *dst,
                                      const void *src, size_t n)
{
    uint8_t *d = (uint8_t *)dst;
    const uint8_t *s = (const uint8_t *)src;
    while (n) {
        size_t m = n < UP_CRC_BLOCK ? n : UP_CRC_BLOCK;
        memcpy(d, s, m);
        UP_CRC_REREAD();
        crc = sum(crc, d, m);
        d += m, s += m, n -= m;
    }
    return crc;
}

UP_CRC_FN uint32_t up_crc32_copy_sw(uint32_t crc, void *dst, const void *src, size_t n)
{
    return up_crc_copy_blocks(up_crc32_sw, crc, dst, src, n);
}

UP_CRC_FN uint32_t up_crc32_header_sw(const void *h64, uint32_t crc)
{
    static const uint8_t zero[4] = {0};
    return up_crc32_sw(up_crc32_sw(crc, zero, 4), (const uint8_t *)h64 + 4, 60);
}

UP_CRC_FN int up_crc_has_sw(void) { return 1; }

#if UP_CRC_X86
/* ---- x86-64, PCLMULQDQ and SSE4.1: 4 x 128 bits per step ------------------------------------------------------ */

#define UP_CRC_128 __attribute__((target("pclmul,sse4.1")))
#define UP_CRC_INLINE static inline __attribute__((always_inline, unused))

#define UP_CRC_K32 0x1db710640 /* K(n), by n; see Notation */
#define UP_CRC_K96 0x0ccaa009e
#define UP_CRC_K160 0x1751997d0
#define UP_CRC_K224 0x15a546366
#define UP_CRC_K288 0x0f1da05aa
#define UP_CRC_K352 0x174359406
#define UP_CRC_K416 0x03db1ecdc
#define UP_CRC_K480 0x1c6e41596
#define UP_CRC_K544 0x154442bd4
#define UP_CRC_K992 0x14a7fe880
#define UP_CRC_K1056 0x1e88ef372
#define UP_CRC_K1504 0x12e958ac4
#define UP_CRC_K1568 0x1821d8bc0
#define UP_CRC_K2016 0x1322d1430
#define UP_CRC_K2080 0x11542778a
#define UP_CRC_MU 0xb4e5b025f7011641 /* reflect64(floor(x^96 / P) / x) */
#define UP_CRC_P 0x1db710641         /* reflect33(P) */

/* A pair of constants moving 128 bits forward by d bits: the word at the lower address has 64 bits further to go, and
 * the product of a word and K(n) sits 32 bits lower in 128 bits than in 96. */
#define UP_CRC_FOLD_128 UP_CRC_K96, UP_CRC_K160 /* high word K(d - 32), low word K(d + 32) */
#define UP_CRC_FOLD_256 UP_CRC_K224, UP_CRC_K288
#define UP_CRC_FOLD_384 UP_CRC_K352, UP_CRC_K416
#define UP_CRC_FOLD_512 UP_CRC_K480, UP_CRC_K544
#define UP_CRC_FOLD_1024 UP_CRC_K992, UP_CRC_K1056
#define UP_CRC_FOLD_1536 UP_CRC_K1504, UP_CRC_K1568
#define UP_CRC_FOLD_2048 UP_CRC_K2016, UP_CRC_K2080
#define UP_CRC_PAIR(...) UP_CRC_PAIR_(__VA_ARGS__)
#define UP_CRC_PAIR_(high, low) _mm_set_epi64x((long long)(high), (long long)(low))

UP_CRC_128 UP_CRC_INLINE __m128i up_crc_fold(__m128i x, __m128i k)
{
    return _mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11));
}

/* Barrett: s is 96 bits, H * x^32 + L, with H its low word and L its dword 2. q = floor(H * x^32 / P) is exact, and
 * L ^ (q * P mod x^32) remains. Two dependent multiplications, no table. */
UP_CRC_128 UP_CRC_INLINE uint32_t up_crc_barrett(__m128i s)
{
    const __m128i k = _mm_set_epi64x((long long)UP_CRC_P, (long long)UP_CRC_MU);
    __m128i q = _mm_clmulepi64_si128(s, k, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(s, _mm_clmulepi64_si128(q, k, 0x10)), 2);
}

/* The CRC register after the 16 bytes x. */
UP_CRC_128 UP_CRC_INLINE uint32_t up_crc_reduce(__m128i x)
{
    return up_crc_barrett(up_crc_fold(x, _mm_set_epi64x(UP_CRC_K32, UP_CRC_K96)));
}

/* n < 16 bytes, moved to the end of a register: zeros before a message change nothing once the incoming register is
 * xored into the message's first 4 bytes. What of it lies beyond a message of 1 to 3 bytes comes out shifted. */
UP_CRC_128 UP_CRC_INLINE uint32_t up_crc_short(uint32_t crc, const uint8_t *p, size_t n)
{
    uint64_t reg = crc, m;
    int bits = (int)n * 8;
    if (n > 8) {
        uint64_t low = (up_crc_le64(p) ^ reg) << (128 - bits), high = up_crc_le64(p + n - 8) ^ (reg >> (bits - 64));
        return up_crc_reduce(_mm_set_epi64x((long long)high, (long long)low));
    }
    if (n >= 4)
        m = up_crc_le32(p) | (uint64_t)up_crc_le32(p + n - 4) << (bits - 32);
    else if (n)
        m = p[0] | (uint64_t)p[n / 2] << (n / 2 * 8) | (uint64_t)p[n - 1] << (bits - 8);
    else
        return crc;
    __m128i s = _mm_cvtsi64_si128((long long)((m ^ reg) << (64 - bits)));
    s = _mm_clmulepi64_si128(s, _mm_cvtsi64_si128(UP_CRC_K32), 0x00);
    return up_crc_barrett(s) ^ (uint32_t)(reg >> bits / 2 >> bits / 2);
}

/* Next 16 bytes; with copy, also stored. */
UP_CRC_128 UP_CRC_INLINE __m128i up_crc_take(uint8_t *dst, const uint8_t *src, size_t at, int copy)
{
    __m128i v = _mm_loadu_si128((const __m128i *)(const void *)(src + at));
    if (copy) {
        UP_CRC_ONCE(v);
        _mm_storeu_si128((__m128i *)(void *)(dst + at), v);
    }
    return v;
}

/* The last m (1..15) bytes, at end[-m..0), after the 16 bytes x: x's first m bytes fold onto the 16 that follow. */
UP_CRC_128 UP_CRC_INLINE __m128i up_crc_tail(__m128i x, const uint8_t *end, size_t m)
{
    static const uint8_t at[48] = {128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
                                   0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,  11,  12,  13,  14,  15,
                                   128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128};
    __m128i first = _mm_loadu_si128((const __m128i *)(const void *)(at + m));
    __m128i rest = _mm_loadu_si128((const __m128i *)(const void *)(at + 16 + m));
    __m128i last = _mm_loadu_si128((const __m128i *)(const void *)(end - 16));
    last = _mm_blendv_epi8(_mm_shuffle_epi8(x, rest), last, rest);
    return _mm_xor_si128(last, up_crc_fold(_mm_shuffle_epi8(x, first), UP_CRC_PAIR(UP_CRC_FOLD_128)));
}

UP_CRC_128 UP_CRC_INLINE uint32_t up_crc_128(uint32_t crc, uint8_t *dst, const uint8_t *src, size_t n, int copy)
{
    crc = ~crc;
    if (n < 16) {
        if (copy && n) {
            memcpy(dst, src, n);
            UP_CRC_REREAD();
            src = dst;
        }
        return ~up_crc_short(crc, src, n);
    }
    const __m128i k128 = UP_CRC_PAIR(UP_CRC_FOLD_128);
    __m128i x = _mm_xor_si128(up_crc_take(dst, src, 0, copy), _mm_cvtsi32_si128((int)crc));
    size_t i = 16;
    if (n >= 64) {
        const __m128i k = UP_CRC_PAIR(UP_CRC_FOLD_512);
        __m128i x1 = up_crc_take(dst, src, 16, copy), x2 = up_crc_take(dst, src, 32, copy),
                x3 = up_crc_take(dst, src, 48, copy);
        for (i = 64; n - i >= 64; i += 64) {
            x = _mm_xor_si128(up_crc_fold(x, k), up_crc_take(dst, src, i, copy));
            x1 = _mm_xor_si128(up_crc_fold(x1, k), up_crc_take(dst, src, i + 16, copy));
            x2 = _mm_xor_si128(up_crc_fold(x2, k), up_crc_take(dst, src, i + 32, copy));
            x3 = _mm_xor_si128(up_crc_fold(x3, k), up_crc_take(dst, src, i + 48, copy));
        }
        x = _mm_xor_si128(up_crc_fold(x, UP_CRC_PAIR(UP_CRC_FOLD_384)), up_crc_fold(x1, UP_CRC_PAIR(UP_CRC_FOLD_256)));
        x = _mm_xor_si128(_mm_xor_si128(x, x3), up_crc_fold(x2, k128));
    }
    for (; n - i >= 16; i += 16)
        x = _mm_xor_si128(up_crc_fold(x, k128), up_crc_take(dst, src, i, copy));
    if (n - i) {
        if (copy) {
            memcpy(dst + i, src + i, n - i);
            UP_CRC_REREAD();
            src = dst;
        }
        x = up_crc_tail(x, src + n, n - i);
    }
    return ~up_crc_reduce(x);
}

UP_CRC_128 UP_CRC_FN uint32_t up_crc32_pclmul(uint32_t crc, const void *p, size_t n)
{
    return up_crc_128(crc, NULL, (const uint8_t *)p, n, 0);
}

UP_CRC_128 UP_CRC_FN uint32_t up_crc32_copy_pclmul(uint32_t crc, void *dst, const void *src, size_t n)
{
    return up_crc_128(crc, (uint8_t *)dst, (const uint8_t *)src, n, 1);
}

/* All eight words go to the end at once: three dependent multiplications in all. The words are loaded one by one
 * because the header has just been written: a load wider than a store waits until that store has reached L1. So write
 * the header as eight u64, not by its narrow fields: 5 ns against 12 here. One 64-byte load was slower either way. */
UP_CRC_128 UP_CRC_INLINE __m128i up_crc_word(const uint8_t *p, long long k)
{
    return _mm_clmulepi64_si128(_mm_loadl_epi64((const __m128i *)(const void *)p), _mm_cvtsi64_si128(k), 0x00);
}

UP_CRC_128 UP_CRC_FN uint32_t up_crc32_header_pclmul(const void *h64, uint32_t crc)
{
    const uint8_t *h = (const uint8_t *)h64;
    long long w0 = (long long)((uint64_t)up_crc_le32(h + 4) << 32 | (uint32_t)~crc);
    __m128i a = _mm_xor_si128(up_crc_word(h + 8, UP_CRC_K416), up_crc_word(h + 16, UP_CRC_K352));
    __m128i b = _mm_xor_si128(up_crc_word(h + 24, UP_CRC_K288), up_crc_word(h + 32, UP_CRC_K224));
    __m128i c = _mm_xor_si128(up_crc_word(h + 40, UP_CRC_K160), up_crc_word(h + 48, UP_CRC_K96));
    __m128i d = _mm_xor_si128(up_crc_word(h + 56, UP_CRC_K32),
                              _mm_clmulepi64_si128(_mm_cvtsi64_si128(w0), _mm_cvtsi64_si128(UP_CRC_K480), 0x00));
    return ~up_crc_barrett(_mm_xor_si128(_mm_xor_si128(a, b), _mm_xor_si128(c, d)));
}

UP_CRC_FN int up_crc_has_pclmul(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

/* ---- x86-64, VPCLMULQDQ and AVX-512 (Ice Lake, Zen 4 and later): 4 x 512 bits per step ------------------------- */

/* Zen 5 starts one multiplication every 2 cycles whatever its width, and 64 bytes take two: 16 bytes per cycle, which
 * four accumulators reach. More of them gain nothing. */

#define UP_CRC_512 __attribute__((target("pclmul,sse4.1,avx512f,avx512bw,avx512vl,avx512vbmi,vpclmulqdq")))

#define UP_CRC_PAIRS(...) UP_CRC_PAIRS_(__VA_ARGS__)
#define UP_CRC_PAIRS_(high, low) _mm512_set_epi64(high, low, high, low, high, low, high, low)

UP_CRC_512 UP_CRC_INLINE __m512i up_crc_fold512(__m512i x, __m512i k, __m512i add)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, k, 0x00), _mm512_clmulepi64_epi128(x, k, 0x11), add,
                                     0x96); /* a ^ b ^ c */
}

UP_CRC_512 UP_CRC_INLINE uint32_t up_crc_reduce512(__m512i x)
{
    const __m512i k = _mm512_set_epi64(UP_CRC_K32, UP_CRC_K96, UP_CRC_K160, UP_CRC_K224, UP_CRC_K288, UP_CRC_K352,
                                       UP_CRC_K416, UP_CRC_K480);
    __m512i s = _mm512_xor_si512(_mm512_clmulepi64_epi128(x, k, 0x00), _mm512_clmulepi64_epi128(x, k, 0x11));
    __m256i h = _mm256_xor_si256(_mm512_castsi512_si256(s), _mm512_maskz_extracti64x4_epi64(0xff, s, 1));
    return up_crc_barrett(_mm_xor_si128(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}

UP_CRC_512 UP_CRC_INLINE __m512i up_crc_take512(uint8_t *dst, const uint8_t *src, size_t at, int copy)
{
    __m512i v = _mm512_loadu_si512(src + at);
    if (copy) {
        UP_CRC_ONCE(v);
        _mm512_storeu_si512(dst + at, v);
    }
    return v;
}

/* Byte j becomes byte (j + n) % 64: the first n bytes go to the end. */
UP_CRC_512 UP_CRC_INLINE __m512i up_crc_rotate(__m512i x, size_t n, __mmask64 keep)
{
    static const uint8_t iota[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                     32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                     48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    __m512i at = _mm512_add_epi8(_mm512_loadu_si512(iota), _mm512_set1_epi8((char)n));
    return _mm512_maskz_permutexvar_epi8(keep, at, x);
}

/* 1 to 64 bytes: one masked load, which touches no byte outside, moved to the end as in up_crc_short. */
UP_CRC_512 UP_CRC_INLINE uint32_t up_crc_short512(uint32_t crc, uint8_t *dst, const uint8_t *src, size_t n, int copy)
{
    __mmask64 first = ~(uint64_t)0 >> (64 - n);
    __m512i x = _mm512_maskz_loadu_epi8(first, src);
    if (copy) {
        UP_CRC_ONCE(x);
        _mm512_mask_storeu_epi8(dst, first, x);
    }
    x = _mm512_xor_si512(x, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    x = up_crc_rotate(x, n, ~(uint64_t)0 << (64 - n));
    return up_crc_reduce512(x) ^ (n < 4 ? crc >> 8 * n : 0);
}

UP_CRC_512 UP_CRC_INLINE uint32_t up_crc_512(uint32_t crc, uint8_t *dst, const uint8_t *src, size_t n, int copy)
{
    if (n == 0)
        return crc;
    crc = ~crc;
    if (n <= 64)
        return ~up_crc_short512(crc, dst, src, n, copy);
    const __m512i k512 = UP_CRC_PAIRS(UP_CRC_FOLD_512);
    __m512i x = up_crc_take512(dst, src, 0, copy);
    x = _mm512_xor_si512(x, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    size_t i = 64;
    if (n >= 256) {
        const __m512i k = UP_CRC_PAIRS(UP_CRC_FOLD_2048);
        __m512i x1 = up_crc_take512(dst, src, 64, copy), x2 = up_crc_take512(dst, src, 128, copy),
                x3 = up_crc_take512(dst, src, 192, copy);
        for (i = 256; n - i >= 256; i += 256) {
            x = up_crc_fold512(x, k, up_crc_take512(dst, src, i, copy));
            x1 = up_crc_fold512(x1, k, up_crc_take512(dst, src, i + 64, copy));
            x2 = up_crc_fold512(x2, k, up_crc_take512(dst, src, i + 128, copy));
            x3 = up_crc_fold512(x3, k, up_crc_take512(dst, src, i + 192, copy));
        }
        x2 = up_crc_fold512(x2, k512, x3);
        x = up_crc_fold512(x, UP_CRC_PAIRS(UP_CRC_FOLD_1536), up_crc_fold512(x1, UP_CRC_PAIRS(UP_CRC_FOLD_1024), x2));
    }
    for (; n - i >= 64; i += 64)
        x = up_crc_fold512(x, k512, up_crc_take512(dst, src, i, copy));
    if (n - i) { /* x's first bytes fold onto the last 64: the rest of x, then the tail (as up_crc_tail) */
        __mmask64 last = ~(uint64_t)0 << (64 - (n - i));
        x = up_crc_rotate(x, n - i, ~(uint64_t)0);
        __m512i y = _mm512_mask_loadu_epi8(x, last, src + n - 64);
        if (copy) {
            UP_CRC_ONCE(y);
            _mm512_mask_storeu_epi8(dst + n - 64, last, y);
        }
        x = up_crc_fold512(_mm512_maskz_mov_epi8(last, x), k512, y);
    }
    return ~up_crc_reduce512(x);
}

UP_CRC_512 UP_CRC_FN uint32_t up_crc32_vpclmul(uint32_t crc, const void *p, size_t n)
{
    return up_crc_512(crc, NULL, (const uint8_t *)p, n, 0);
}

UP_CRC_512 UP_CRC_FN uint32_t up_crc32_copy_vpclmul(uint32_t crc, void *dst, const void *src, size_t n)
{
    return up_crc_512(crc, (uint8_t *)dst, (const uint8_t *)src, n, 1);
}

UP_CRC_FN int up_crc_has_vpclmul(void)
{
    return up_crc_has_pclmul() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("vpclmulqdq");
}
#endif

#if UP_CRC_ARM
/* ---- aarch64 with the CRC32 extension ------------------------------------------------------------------------- */

/* __crc32b/w/d of arm_acle.h, which older clangs declare only when the whole file is compiled with +crc. */
#define UP_CRC_ARM_OP(name, op, type, reg)                                                              \
    UP_CRC_FN uint32_t name(uint32_t crc, type v)                                                       \
    {                                                                                                   \
        __asm__(".arch_extension crc\n\t" op " %w0, %w0, %" reg "1" : "+r"(crc) : "r"(v));              \
        return crc;                                                                                     \
    }
UP_CRC_ARM_OP(up_crc_arm8, "crc32b", uint32_t, "w")
UP_CRC_ARM_OP(up_crc_arm32, "crc32w", uint32_t, "w")
UP_CRC_ARM_OP(up_crc_arm64, "crc32x", uint64_t, "x")

UP_CRC_FN uint32_t up_crc32_armv8(uint32_t crc, const void *data, size_t n)
{
    const uint8_t *p = (const uint8_t *)data;
    crc = ~crc;
    for (; n >= 32; n -= 32, p += 32)
        for (int i = 0; i < 32; i += 8)
            crc = up_crc_arm64(crc, up_crc_le64(p + i));
    for (; n >= 8; n -= 8, p += 8)
        crc = up_crc_arm64(crc, up_crc_le64(p));
    for (; n; n--)
        crc = up_crc_arm8(crc, *p++);
    return ~crc;
}

UP_CRC_FN uint32_t up_crc32_copy_armv8(uint32_t crc, void *dst, const void *src, size_t n)
{
    return up_crc_copy_blocks(up_crc32_armv8, crc, dst, src, n);
}

UP_CRC_FN uint32_t up_crc32_header_armv8(const void *h64, uint32_t crc)
{
    const uint8_t *h = (const uint8_t *)h64;
    crc = up_crc_arm64(~crc, (uint64_t)up_crc_le32(h + 4) << 32);
    for (int i = 8; i < 64; i += 8)
        crc = up_crc_arm64(crc, up_crc_le64(h + i));
    return ~crc;
}

UP_CRC_FN int up_crc_has_armv8(void) { return (getauxval(AT_HWCAP) & (1ul << 7)) != 0; } /* HWCAP_CRC32 */
#endif

/* ---- the choice ----------------------------------------------------------------------------------------------- */

/* Best first; the last is always supported. */
static const up_crc_impl up_crc_impls[] = {
#if UP_CRC_X86
    {"vpclmul", up_crc_has_vpclmul, up_crc32_vpclmul, up_crc32_copy_vpclmul, up_crc32_header_pclmul},
    {"pclmul", up_crc_has_pclmul, up_crc32_pclmul, up_crc32_copy_pclmul, up_crc32_header_pclmul},
#endif
#if UP_CRC_ARM
    {"armv8", up_crc_has_armv8, up_crc32_armv8, up_crc32_copy_armv8, up_crc32_header_armv8},
#endif
    {"sw", up_crc_has_sw, up_crc32_sw, up_crc32_copy_sw, up_crc32_header_sw},
};

static up_crc_impl up_crc_now; /* written by the constructor only */

/* 101: before every constructor that does not ask for a place. */
__attribute__((constructor(101))) static void up_crc_choose(void)
{
    const up_crc_impl *impl = up_crc_impls;
    up_crc_fill_table();
    while (!impl->supported())
        impl++;
    up_crc_now = *impl;
}

UP_CRC_FN const char *up_crc32_name(void) { return up_crc_now.name; }

UP_CRC_FN uint32_t up_crc32(uint32_t crc, const void *p, size_t n) { return up_crc_now.crc(crc, p, n); }

UP_CRC_FN uint32_t up_crc32_copy(uint32_t crc, void *dst, const void *src, size_t n)
{
    return up_crc_now.copy(crc, dst, src, n);
}

UP_CRC_FN uint32_t up_crc32_header(const void *h64, uint32_t crc) { return up_crc_now.header(h64, crc); }

/* By linearity the CRC moves by what the changed bits alone contribute, whatever the rest is: a frame whose CRC was
 * wrong stays wrong by the same difference. Bit 15 of the count lies 58 bytes and the CRC's own 32 bits from the end
 * and weighs reflect32(x^(58*8 + 32)); each lower bit weighs x times the one above it. */
#define UP_CRC_DELIVERIES 0xc8db04e9u

UP_CRC_FN uint32_t up_crc32_deliveries(uint32_t crc, uint16_t old_count, uint16_t new_count)
{
    uint32_t changed = (uint32_t)(old_count ^ new_count), weight = UP_CRC_DELIVERIES;
    for (int bit = 15; bit >= 0; bit--) {
        crc ^= weight & (0u - (changed >> bit & 1));
        weight = (weight >> 1) ^ (UP_CRC_POLY & (0u - (weight & 1)));
    }
    return crc;
}

#endif
