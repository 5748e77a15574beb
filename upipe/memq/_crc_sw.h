/* CRC32 for _crc.h: what all implementations share, and the portable one. */
#ifndef UPIPE_MEMQ_CRC_SW_H
#define UPIPE_MEMQ_CRC_SW_H

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

#endif
