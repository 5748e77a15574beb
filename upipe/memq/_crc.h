/* zlib's CRC32 (IEEE 802.3, reflected polynomial 0xEDB88320) at the speed of the machine. Header only, C11, libc only.
 *
 *   up_crc32(crc, p, n)             zlib.crc32(p[0:n], crc)
 *   up_crc32_copy(crc, dst, src, n) the same, and dst[0:n] = src[0:n], which must not overlap; the CRC is of the very
 *                                   bytes stored in dst, even while somebody else is changing src
 *   up_crc32_header(h64, crc)       continues crc over 64 bytes, the first 4 of them taken as zero
 *   up_crc32_deliveries(crc, a, b)  the CRC of a frame (payload, then header) whose u16 at header byte 4 goes a -> b
 *   up_crc32_name()                 the implementation chosen: "gfni", "vpclmul", "pclmul", "armv8" or "sw"
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

#include "_crc_sw.h"
#include "_crc_gfni.h"
#include "_crc_x86.h"

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
    {"gfni", up_crc_has_gfni, up_crc32_gfni, up_crc32_copy_gfni, up_crc32_header_pclmul},
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
