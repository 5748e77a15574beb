/* A ring for one producer and one consumer, 8-byte messages, both spinning: `ring PINS N`. Messages per second. */
#include "common.h"

#define SLOTS 65536u

struct ring {
    _Alignas(64) uint64_t head;
    _Alignas(64) uint64_t tail;
    _Alignas(64) uint64_t slots[SLOTS];
};

static void produce(struct ring *r, uint64_t n) {
    uint64_t tail = 0;
    for (uint64_t i = 0; i < n; i++) {
        while (i - tail == SLOTS) {
            tail = __atomic_load_n(&r->tail, __ATOMIC_ACQUIRE);
            if (i - tail == SLOTS) relax();
        }
        r->slots[i % SLOTS] = i;
        __atomic_store_n(&r->head, i + 1, __ATOMIC_RELEASE);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const uint64_t n = (uint64_t)atoll(argv[2]);
    struct ring *r = shared(sizeof *r);
    if (fork() == 0) {
        pin(argv[1], 1);
        produce(r, n);
        _exit(0);
    }
    pin(argv[1], 0);
    uint64_t head = 0, began = 0;
    for (uint64_t i = 0; i < n; i++) {
        while (head == i) {
            head = __atomic_load_n(&r->head, __ATOMIC_ACQUIRE);
            if (head == i) relax();
        }
        if (i == n / 10) began = now_ns();
        if (r->slots[i % SLOTS] != i) return 3;
        __atomic_store_n(&r->tail, i + 1, __ATOMIC_RELEASE);
    }
    double seconds = (now_ns() - began) / 1e9;
    wait(NULL);
    printf("%.0f\n", (double)(n - n / 10) / seconds);
    return 0;
}
