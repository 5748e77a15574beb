/* Frames through a ring of shared memory: `copy SIZE SLOTS N COPY CRC`. GB/s.
 *
 * The producer copies each frame from private memory into a slot; the consumer copies it out to private memory (COPY 1) and
 * adds up every word of it. With CRC 1 both check it: while copying (COPY 1), or in a pass of its own, as a producer that
 * writes in place and a consumer that reads in place have to. The checksum is uPipe's own code: what is measured is
 * what it costs without any queue around it. */
#include "common.h" /* first: it asks for the GNU names */

#include "_crc_back.h"

struct ends {
    _Alignas(64) uint64_t head;
    _Alignas(64) uint64_t tail;
};

static void wait_above(uint64_t *word, uint64_t value) {
    while (__atomic_load_n(word, __ATOMIC_ACQUIRE) <= value) relax();
}

static uint64_t add_up(const uint64_t *words, size_t n) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += words[i];
    return sum;
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    const size_t size = (size_t)atoll(argv[1]) / 8 * 8;
    const uint64_t slots = (uint64_t)atoll(argv[2]), n = (uint64_t)atoll(argv[3]);
    const int copy = atoi(argv[4]), crc = atoi(argv[5]);
    const uint64_t warm = slots + 4;
    struct ends *e = shared(sizeof *e);
    char *ring = shared(size * slots);
    uint64_t *mine = aligned_alloc(64, (size + 63) / 64 * 64);
    memset(mine, 1, size);
    const uint64_t wanted = add_up(mine, size / 8);
    const uint32_t crc_wanted = up_crc32(0, mine, size);
    if (fork() == 0) {
        for (uint64_t i = 0; i < n + warm; i++) {
            if (i >= slots) wait_above(&e->tail, i - slots);
            char *slot = ring + i % slots * size;
            uint32_t found = crc_wanted;
            if (copy && crc)
                found = up_crc32_copy(0, slot, mine, size);
            else
                memcpy(slot, mine, size);
            if (!copy && crc) found = up_crc32_in_place(slot, size);
            if (found != crc_wanted) _exit(3);
            __atomic_store_n(&e->head, i + 1, __ATOMIC_RELEASE);
        }
        _exit(0);
    }
    uint64_t began = 0;
    for (uint64_t i = 0; i < n + warm; i++) {
        wait_above(&e->head, i);
        if (i == warm) began = now_ns();
        const void *from = ring + i % slots * size;
        if (copy && crc) {
            if (up_crc32_copy(0, mine, from, size) != crc_wanted) return 3;
            from = mine;
        } else if (copy)
            from = memcpy(mine, from, size);
        else if (crc && up_crc32_in_place(from, size) != crc_wanted)
            return 3;
        if (add_up(from, size / 8) != wanted) return 3;
        __atomic_store_n(&e->tail, i + 1, __ATOMIC_RELEASE);
    }
    double seconds = (now_ns() - began) / 1e9;
    wait(NULL);
    printf("%.3f\n", (double)n * (double)size / seconds / 1e9);
    return 0;
}
