/* The ring without Python: see ring_driver.h (how it is driven), ring_cases.h, ring_fence.h, ring_threads.h, ring_crash.h, ring_step.h.
 *
 *   ring_test cases                           one small story each
 *   ring_test threads SCALE MAPPINGS SEED     many threads; contents, order, counts and books
 *   ring_test points SEED NAME...             processes, killed at each of the named points
 *   ring_test steps KILLS SEED                a process, dead after each machine instruction of each operation
 *   ring_test fence SECONDS                   two threads that must not miss each other; status 1: they did
 *   ring_test chaos SECONDS SEED              processes, killed anywhere
 *   tests/native/test_native.py builds and runs it all; by hand:
 *   gcc -std=c11 -O2 -pthread -DKILL_AT_POINTS tests/native/ring_test.c -o ring_test
 */
#include "ring_crash.h"
#include "ring_cases.h"
#include "ring_fence.h"
#include "ring_jump.h"
#include "ring_mirror.h"
#include "ring_step.h"
#include "ring_threads.h"

static void remove_root(void) {
    char command[200];
    snprintf(command, sizeof command, "rm -rf '%s'", test_root);
    if (system(command)) perror("rm");
}

int main(int n, char **arg) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *tmp = getenv("TMPDIR");
    snprintf(test_root, sizeof test_root, "%s/ring.XXXXXX", tmp && strlen(tmp) < 100 ? tmp : "/tmp");
    if (n < 2 || !mkdtemp(test_root)) return 2;
    signal(SIGPIPE, SIG_DFL);
    double scale = n > 2 ? atof(arg[2]) : 1;
    if (!strcmp(arg[1], "threads")) run_threads(scale, n > 3 ? atoi(arg[3]) : 0, n > 4 ? strtoull(arg[4], NULL, 10) : 1);
    else if (!strcmp(arg[1], "points")) run_points(n - 3, arg + 3, strtoull(arg[2], NULL, 10));
    else if (!strcmp(arg[1], "cases")) run_cases();
    else if (!strcmp(arg[1], "steps")) run_steps((uint32_t)scale, n > 3 ? strtoull(arg[3], NULL, 10) : 1);
    else if (!strcmp(arg[1], "chaos")) run_chaos(scale, n > 3 ? strtoull(arg[3], NULL, 10) : 1);
    int failed = !strcmp(arg[1], "fence") && run_fence(scale);
    remove_root();
    return failed;
}
