/* Round trip of a word between two processes: `pingpong futex|spin PINS N PAUSE_US`. p50 p99 p99.9 in us.
 *
 * futex: both ends sleep in futex(2) until the other one wakes them. spin: both poll. */
#include "common.h"
#include <linux/futex.h>
#include <sys/syscall.h>

struct ends {
    _Alignas(64) uint32_t there;
    _Alignas(64) uint32_t back;
};

static int sleeping;

static void await_value(uint32_t *word, uint32_t wanted) {
    uint32_t found;
    while ((found = __atomic_load_n(word, __ATOMIC_ACQUIRE)) != wanted) {
        if (sleeping)
            syscall(SYS_futex, word, FUTEX_WAIT, found, NULL, NULL, 0);
        else
            relax();
    }
}

static void tell(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    if (sleeping) syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    sleeping = strcmp(argv[1], "futex") == 0;
    const char *pins = argv[2];
    const uint32_t n = (uint32_t)atol(argv[3]), warm = n / 10 + 1;
    const useconds_t pause = (useconds_t)atol(argv[4]);
    struct ends *e = shared(sizeof *e);
    uint64_t *times = malloc(sizeof *times * n);
    if (fork() == 0) {
        pin(pins, 1);
        for (uint32_t i = 1; i <= n + warm; i++) {
            await_value(&e->there, i);
            tell(&e->back, i);
        }
        _exit(0);
    }
    pin(pins, 0);
    for (uint32_t i = 1; i <= n + warm; i++) {
        if (pause) usleep(pause);
        uint64_t before = now_ns();
        tell(&e->there, i);
        await_value(&e->back, i);
        if (i > warm) times[i - warm - 1] = now_ns() - before;
    }
    wait(NULL);
    print_percentiles(times, n);
    return 0;
}
