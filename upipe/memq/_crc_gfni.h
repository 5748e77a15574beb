/* CRC32 on x86-64, for _crc.h only: long input by transformations of bytes, where multiplications are slow.
 *
 * Carry-less multiplication moves 64 bytes with two instructions, of which Zen 5 starts one every 2 cycles: 64 GB/s, half
 * of what its second-level cache gives. GF2P8AFFINEQB transforms 64 bytes by any 8 x 8 matrix over GF(2), and it
 * starts two each cycle. So a byte is moved forward as four bytes: with X = x^512, one 64-byte block,
 *
 *     b = A4(b) X^-4 + A5(b) X^-5 + A7(b) X^-7 + A8(b) X^-8    (mod P)
 *
 * for each byte b. Four unknown bytes are 32 bits, and so is everything mod P: for distances where the 32 x 32 system is
 * regular the matrices exist, and they are the same for each place in the block. These are the closest distances above 3 for
 * which it is (one below would wait for the result of the one before), and 8 of them fit 8 registers: block i becomes
 *
 *     y[i] = m[i] ^ A4(y[i-4]) ^ A5(y[i-5]) ^ A7(y[i-7]) ^ A8(y[i-8])
 *
 * and takes the register of y[i-8]. The test checks the matrices against their definition. Of no use where a multiplication starts each
 * cycle and one port transforms (Intel), hence asked for on AMD only. (Rejected: sums of blocks alone, by sparse multiples of
 * P, which take a window of 300 blocks or more in memory; both at once, for nothing reads memory so fast.) */
#ifndef UPIPE_MEMQ_CRC_GFNI_H
#define UPIPE_MEMQ_CRC_GFNI_H

#include "_crc_x86.h"

#if UP_CRC_X86
#define UP_CRC_GFNI __attribute__((target("pclmul,sse4.1,avx512f,avx512bw,avx512vl,avx512vbmi,vpclmulqdq,gfni")))

#define UP_CRC_A4 0x52555bb6a4704bfc /* a matrix: byte 7 - i has the bits of the input that bit i of the output sums */
#define UP_CRC_A5 0xf0d16aec4bc44118
#define UP_CRC_A7 0xf8c0127f5ce3fe04
#define UP_CRC_A8 0xc14bcc5870bb47d5
#define UP_CRC_LONG 1536 /* bytes from which on this is faster: what is left at the end is multiplied */

UP_CRC_GFNI UP_CRC_INLINE __m512i up_crc_affine(__m512i y, uint64_t matrix)
{
    return _mm512_gf2p8affine_epi64_epi8(y, _mm512_set1_epi64((long long)matrix), 0);
}

/* m ^ A4(y4) ^ A5(y5) ^ A7(y7) ^ A8(y8): the youngest, y4, comes last. */
UP_CRC_GFNI UP_CRC_INLINE __m512i up_crc_next(__m512i m, __m512i y4, __m512i y5, __m512i y7, __m512i y8)
{
    m = _mm512_ternarylogic_epi64(m, up_crc_affine(y8, UP_CRC_A8), up_crc_affine(y7, UP_CRC_A7), 0x96);
    return _mm512_ternarylogic_epi64(m, up_crc_affine(y5, UP_CRC_A5), up_crc_affine(y4, UP_CRC_A4), 0x96);
}

UP_CRC_GFNI UP_CRC_INLINE uint32_t up_crc_gfni(uint32_t crc, uint8_t *dst, const uint8_t *src, size_t n, int copy)
{
    if (n < UP_CRC_LONG)
        return up_crc_512(crc, dst, src, n, copy);
    __m512i y[8], zero = _mm512_setzero_si512();
    for (int j = 0; j < 8; j++)
        y[j] = zero;
    size_t i = 0;
    __m512i first = _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)~crc)); /* added to the first block */
    for (; n - i >= 1024; i += 512, first = zero) {
        for (size_t j = 0; j < 8; j++) {
            __m512i m = up_crc_take512(dst, src, i + 64 * j, copy);
            m = j ? m : _mm512_xor_si512(m, first);
            y[j] = up_crc_next(m, y[(j + 4) % 8], y[(j + 3) % 8], y[(j + 1) % 8], y[j]);
        }
    }
    /* The next 8 blocks take over what the last 8 y give, and give nothing themselves. */
    __m512i z[8];
    for (size_t j = 0; j < 8; j++)
        z[j] = up_crc_next(up_crc_take512(dst, src, i + 64 * j, copy), j < 4 ? y[j + 4] : zero, j < 5 ? y[j + 3] : zero,
                           j < 7 ? y[j + 1] : zero, y[j]);
    for (int j = 0; j < 4; j++)
        z[j] = up_crc_fold512(z[j], UP_CRC_PAIRS(UP_CRC_FOLD_2048), z[j + 4]);
    return up_crc_four512(z, dst, src, i + 512, n, copy);
}

UP_CRC_GFNI UP_CRC_FN uint32_t up_crc32_gfni(uint32_t crc, const void *p, size_t n)
{
    return up_crc_gfni(crc, NULL, (const uint8_t *)p, n, 0);
}

UP_CRC_GFNI UP_CRC_FN uint32_t up_crc32_copy_gfni(uint32_t crc, void *dst, const void *src, size_t n)
{
    return up_crc_gfni(crc, (uint8_t *)dst, (const uint8_t *)src, n, 1);
}

UP_CRC_FN int up_crc_has_gfni(void)
{
    return up_crc_has_vpclmul() && __builtin_cpu_supports("gfni") && __builtin_cpu_is("amd");
}
#endif

#endif
