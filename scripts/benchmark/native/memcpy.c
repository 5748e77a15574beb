/* One process copying between two shared segments: `memcpy SIZE SLOTS N`, from one warm frame into slots in turn. GB/s. */
#include "common.h"

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    const size_t size = (size_t)atoll(argv[1]);
    const uint64_t slots = (uint64_t)atoll(argv[2]), n = (uint64_t)atoll(argv[3]);
    char *from = shared(size), *ring = shared(size * slots);
    memset(from, 1, size);
    for (uint64_t i = 0; i < slots; i++) memcpy(ring + i * size, from, size);
    uint64_t began = now_ns();
    for (uint64_t i = 0; i < n; i++) {
        memcpy(ring + i % slots * size, from, size);
        __asm__ volatile("" ::: "memory");
    }
    printf("%.3f\n", (double)n * (double)size / ((now_ns() - began) / 1e9) / 1e9);
    return 0;
}
