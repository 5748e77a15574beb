/* CRC32 on x86-64, for _crc.h only: by carry-less multiplications, 128 or 512 bits wide. */
#ifndef UPIPE_MEMQ_CRC_X86_H
#define UPIPE_MEMQ_CRC_X86_H

#include "_crc_sw.h"

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

UP_CRC_128 UP_CRC_FN __attribute__((hot)) uint32_t up_crc32_header_pclmul(const void *h64, uint32_t crc)
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

/* From x, which stands for the first i bytes (64 or more), to the CRC. */
UP_CRC_512 UP_CRC_INLINE uint32_t up_crc_end512(__m512i x, uint8_t *dst, const uint8_t *src, size_t i, size_t n, int copy)
{
    const __m512i k = UP_CRC_PAIRS(UP_CRC_FOLD_512);
    for (; n - i >= 64; i += 64)
        x = up_crc_fold512(x, k, up_crc_take512(dst, src, i, copy));
    if (n - i) { /* x's first bytes fold onto the last 64: the rest of x, then the tail (as up_crc_tail) */
        __mmask64 last = ~(uint64_t)0 << (64 - (n - i));
        x = up_crc_rotate(x, n - i, ~(uint64_t)0);
        __m512i y = _mm512_mask_loadu_epi8(x, last, src + n - 64);
        if (copy) {
            UP_CRC_ONCE(y);
            _mm512_mask_storeu_epi8(dst + n - 64, last, y);
        }
        x = up_crc_fold512(_mm512_maskz_mov_epi8(last, x), k, y);
    }
    return ~up_crc_reduce512(x);
}

/* The same from x[0..4), which stand for the first i bytes (256 or more), 64 bytes apart. */
UP_CRC_512 UP_CRC_INLINE uint32_t up_crc_four512(__m512i x[4], uint8_t *dst, const uint8_t *src, size_t i, size_t n,
                                                 int copy)
{
    const __m512i k = UP_CRC_PAIRS(UP_CRC_FOLD_2048);
    for (; n - i >= 256; i += 256) {
        for (size_t j = 0; j < 4; j++)
            x[j] = up_crc_fold512(x[j], k, up_crc_take512(dst, src, i + 64 * j, copy));
    }
    __m512i last = up_crc_fold512(x[2], UP_CRC_PAIRS(UP_CRC_FOLD_512), x[3]);
    last = up_crc_fold512(x[1], UP_CRC_PAIRS(UP_CRC_FOLD_1024), last);
    return up_crc_end512(up_crc_fold512(x[0], UP_CRC_PAIRS(UP_CRC_FOLD_1536), last), dst, src, i, n, copy);
}

UP_CRC_512 UP_CRC_INLINE uint32_t up_crc_512(uint32_t crc, uint8_t *dst, const uint8_t *src, size_t n, int copy)
{
    if (n == 0)
        return crc;
    crc = ~crc;
    if (n <= 64)
        return ~up_crc_short512(crc, dst, src, n, copy);
    __m512i x = up_crc_take512(dst, src, 0, copy);
    x = _mm512_xor_si512(x, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    if (n < 256)
        return up_crc_end512(x, dst, src, 64, n, copy);
    __m512i four[4] = {x, up_crc_take512(dst, src, 64, copy), up_crc_take512(dst, src, 128, copy),
                       up_crc_take512(dst, src, 192, copy)};
    return up_crc_four512(four, dst, src, 256, n, copy);
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

#endif
