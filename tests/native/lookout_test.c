/* The lookout without Python (_lookout.h): who naps on a word is woken when a descriptor becomes readable, whatever else goes on.
 *
 *   lookout_test cases              one small story each
 *   lookout_test threads SECONDS    posts made, armed, moved and ended by many threads, while words are unmapped
 *   lookout_test forks COUNT        forks while other threads make posts: the child begins with none, and harms none of the parent's
 *   tests/native/test_native.py builds and runs it; by hand: gcc -std=c11 -O2 -pthread tests/native/lookout_test.c
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "../../upipe/memq/_lookout.h"

#define FAIL(...) (fprintf(stderr, "%s:%d: ", __FILE__, __LINE__), fprintf(stderr, __VA_ARGS__), fprintf(stderr, "\n"), abort())
#define CHECK(ok) ((ok) ? (void)0 : FAIL("%s", #ok))
#ifdef __SANITIZE_THREAD__
#define EARLY 0 /* it takes the use of a number that may be another's now for a race, which up_post_end() is made for */
#else
#define EARLY 1
#endif
#define PATIENCE 10 /* seconds: a nap that lasts so long was not ended */

static void make_pipe(int ends[2]) { CHECK(pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0); }
static void fill(int ends[2]) { CHECK(write(ends[1], "x", 1) == 1); }
static void drain(int ends[2]) {
    char junk[64];
    while (read(ends[0], junk, sizeof junk) > 0) {
    }
}

static void close_pipe(int ends[2]) {
    close(ends[0]);
    close(ends[1]);
}

static void rest(int ms) { usleep((useconds_t)ms * 1000); }

/* As _nap() does: 1 when something ended it, 0 when nobody did in time. */
static int nap(uint64_t id, uint32_t *word, int lull) {
    up_nap_set(word, 1);
    if (lull) up_post_nap(id, word);
    int rc = up_post_quiet(id) ? up_nap_sleep(word, PATIENCE * 1000000000ll) : 0;
    if (lull) up_post_nap(id, NULL);
    return rc != ETIMEDOUT;
}

static void until_loud(uint64_t id) {
    for (int i = 0; up_post_quiet(id); i++) {
        CHECK(i < PATIENCE * 1000);
        rest(1);
    }
}

/* ------------------------------------------------------------------ cases */

static void case_wakes(void) {
    uint32_t words[2] = {0, 0};
    int ends[2];
    make_pipe(ends);
    uint64_t id = up_post_new(ends[0], &words[0], &words[1]);
    CHECK(id && up_post_quiet(id));
    for (int i = 0; i < 4; i++) {
        up_nap_set(&words[i % 2], 1);
        fill(ends);
        until_loud(id);
        CHECK(up_nap_sleep(&words[i % 2], -1) == 0); /* the word is 0: it ends at once */
        drain(ends);
        fill(ends); /* loud it stays, and does not fire again */
        up_nap_set(&words[0], 1);
        rest(2);
        CHECK(words[0] == 1);
        CHECK(up_post_again(id)); /* but it does at once when it is armed while readable */
        until_loud(id);
        drain(ends);
        CHECK(up_post_again(id) && up_post_quiet(id));
        rest(2);
        CHECK(up_post_quiet(id));
    }
    up_post_end(id);
    up_post_end(id);
    close_pipe(ends);
}

static void case_ids(void) {
    uint32_t mine = 0, other = 0;
    int ends[2];
    make_pipe(ends);
    uint64_t old = up_post_new(ends[0], &mine, NULL);
    up_post_end(old);
    uint64_t id = up_post_new(ends[0], &mine, NULL);
    CHECK(id != old && id % UP_POSTS == old % UP_POSTS); /* the same place, another name */
    CHECK(!up_post_quiet(old) && !up_post_again(old));
    up_post_nap(old, &other);
    up_post_end(old);
    up_post_end(0);
    CHECK(!up_post_quiet(0) && !up_post_again(0));
    up_nap_set(&mine, 1);
    fill(ends);
    until_loud(id);
    CHECK(up_nap_sleep(&mine, -1) == 0);
    up_post_end(id);
    close_pipe(ends);
}

/* A descriptor is closed before its post ends, and its number goes to another. */
static void case_closed_before(void) {
    uint32_t word = 0;
    int one[2], two[2];
    make_pipe(one);
    uint64_t old = up_post_new(one[0], NULL, NULL);
    int number = one[0];
    close_pipe(one);
    CHECK(!up_post_again(old)); /* the kernel has forgotten it */
    make_pipe(two);
    CHECK(two[0] == number);
    uint64_t id = up_post_new(two[0], &word, NULL);
    up_post_end(old);
    up_nap_set(&word, 1);
    fill(two);
    until_loud(id);
    CHECK(word == 0);
    up_post_end(id);
    close_pipe(two);
}

static void case_many(void) {
    static uint64_t ids[UP_POSTS];
    static uint32_t words[UP_POSTS];
    static int ends[UP_POSTS][2];
    struct rlimit most;
    CHECK(getrlimit(RLIMIT_NOFILE, &most) == 0);
    most.rlim_cur = most.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &most) == 0);
    int count = 0;
    for (; count < UP_POSTS; count++) {
        make_pipe(ends[count]);
        if (!(ids[count] = up_post_new(ends[count][0], &words[count], NULL))) break;
    }
    CHECK(count == UP_POSTS - 1);
    up_post_end(ids[500]);
    CHECK((ids[500] = up_post_new(ends[500][0], &words[500], NULL)));
    for (int i = 0; i < count; i++) up_nap_set(&words[i], 1);
    for (int i = 0; i < count; i += 3) fill(ends[i]);
    for (int i = 0; i < count; i += 3) until_loud(ids[i]);
    for (int i = 0; i < count; i++) CHECK(up_post_quiet(ids[i]) == (i % 3 != 0) && words[i] == (i % 3 != 0));
    for (int i = 0; i < count; i++) up_post_end(ids[i]);
    for (int i = 0; i <= count; i++) close_pipe(ends[i]);
}

/* No descriptor is left for the set: no post, and later one again. Call it first. */
static void case_no_descriptor(void) {
    struct rlimit was, none;
    int ends[2];
    make_pipe(ends);
    CHECK(getrlimit(RLIMIT_NOFILE, &was) == 0);
    none = was;
    none.rlim_cur = 3;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    CHECK(up_post_new(ends[0], NULL, NULL) == 0 && up_lookout_fd == -1);
    CHECK(setrlimit(RLIMIT_NOFILE, &was) == 0);
    uint64_t id = up_post_new(ends[0], NULL, NULL);
    CHECK(id && up_lookout_fd > 2);
    CHECK(up_post_new(-1, NULL, NULL) == 0); /* nothing to watch: no post, and its place is free */
    up_post_end(id);
    close_pipe(ends);
}

/* The lookout's line of a file in its directory under /proc/self/task. */
static void told(const char *file, const char *key, char *out, size_t size) {
    DIR *tasks = opendir("/proc/self/task");
    out[0] = 0;
    for (struct dirent *task; (task = readdir(tasks));) {
        char path[300], line[300] = "";
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", task->d_name);
        FILE *f = fopen(path, "r");
        if (!f) continue;
        CHECK(fgets(line, sizeof line, f));
        fclose(f);
        if (strcmp(line, "upipe-lookout\n")) continue;
        CHECK(!out[0]); /* there is one */
        snprintf(path, sizeof path, "/proc/self/task/%s/%s", task->d_name, file);
        CHECK((f = fopen(path, "r")));
        while (fgets(line, sizeof line, f))
            if (!strncmp(line, key, strlen(key))) snprintf(out, size, "%s", line + strlen(key));
        fclose(f);
    }
    closedir(tasks);
    CHECK(out[0]);
}

static atomic_int signal_thread;
static void on_signal(int number) {
    (void)number;
    atomic_store(&signal_thread, gettid());
}

static void case_quiet_thread(void) {
    char before[300], after[300];
    uint32_t word = 0;
    int ends[2];
    make_pipe(ends);
    uint64_t id = up_post_new(ends[0], &word, NULL);
    told("status", "SigBlk:", before, sizeof before);
    uint64_t blocked = strtoull(before, NULL, 16); /* all that can be; two are the C library's, which nobody sends */
    for (int number = 1; number < 32; number++)
        CHECK(number == SIGKILL || number == SIGSTOP || blocked >> (number - 1) & 1);
    signal(SIGINT, on_signal);
    for (int i = 0; i < 50; i++) {
        atomic_store(&signal_thread, 0);
        CHECK(kill(getpid(), SIGINT) == 0);
        CHECK(atomic_load(&signal_thread) == getpid());
    }
    signal(SIGINT, SIG_DFL);
    fill(ends); /* readable all the time: it fires once, and then sleeps */
    until_loud(id);
    rest(5);
    told("schedstat", "", before, sizeof before);
    for (int i = 0; i < 100; i++) {
        fill(ends);
        rest(1);
    }
    told("schedstat", "", after, sizeof after);
    CHECK(!strcmp(before, after)); /* it did not run once */
    up_post_end(id);
    close_pipe(ends);
}

static void *nap_for_ever(void *word) {
    up_nap_set(word, 1);
    for (;;) (void)up_nap_sleep(word, -1);
    return NULL;
}

/* Its process exits while it watches, and while somebody naps. */
static void case_exit(void) {
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (!child) {
            static uint32_t word;
            pthread_t thread;
            int ends[2];
            alarm(PATIENCE);
            make_pipe(ends);
            CHECK(up_post_new(ends[0], &word, NULL));
            CHECK(pthread_create(&thread, NULL, nap_for_ever, &word) == 0);
            if (i % 2) fill(ends);
            exit(7);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    }
}

/* ------------------------------------------------------------------ threads */

static _Atomic int stopped, started;
static _Atomic uint64_t done[3];

/* Naps until its descriptor ends that, again and again: a lost wake is a nap that takes PATIENCE. */
static void *napper(void *arg) {
    int lull = *(int *)arg, ends[2];
    atomic_fetch_add(&started, 1);
    uint32_t *word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    make_pipe(ends);
    uint64_t id = up_post_new(ends[0], lull ? NULL : word, NULL);
    CHECK(id);
    while (!atomic_load(&stopped)) {
        fill(ends); /* the lookout races with the nap that follows */
        if (!nap(id, word, lull)) FAIL("a nap was not ended");
        until_loud(id);
        drain(ends);
        CHECK(up_post_again(id));
        if (lull) { /* no post names it: it may go */
            up_lookout_settle();
            munmap(word, 4096);
            word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        }
        atomic_fetch_add(&done[lull], 1);
    }
    up_post_end(id);
    up_lookout_settle();
    munmap(word, 4096);
    close_pipe(ends);
    return NULL;
}

/* Posts that come and go, while they fire. */
static void *comer(void *arg) {
    (void)arg;
    while (!atomic_load(&stopped)) {
        uint32_t *word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        int ends[2];
        make_pipe(ends);
        uint64_t id = up_post_new(ends[0], word, word + 1);
        CHECK(id);
        up_nap_set(word, 1);
        fill(ends);
        (void)up_post_again(id);
        int early = EARLY && id & UP_POSTS; /* as a loop that was closed before its Lull was gone */
        if (early) close_pipe(ends);
        up_post_end(id);
        if (!early) close_pipe(ends);
        up_lookout_settle();
        munmap(word, 4096);
        CHECK(!up_post_quiet(id));
        atomic_fetch_add(&done[2], 1);
    }
    return NULL;
}

static uint64_t shared_post; /* of a handle with two threads, one of which closes it */

static void *looker(void *arg) {
    uint32_t word = 0;
    (void)arg;
    while (!atomic_load(&stopped)) {
        uint64_t id = __atomic_load_n(&shared_post, __ATOMIC_SEQ_CST);
        up_nap_set(&word, 1);
        if (up_post_quiet(id)) (void)up_nap_sleep(&word, 1000);
        (void)up_post_again(id);
    }
    return NULL;
}

static void *closer(void *arg) {
    uint32_t word = 0;
    int ends[2];
    atomic_fetch_add(&started, 1);
    (void)arg;
    make_pipe(ends);
    while (!atomic_load(&stopped)) {
        uint64_t id = up_post_new(ends[0], &word, NULL);
        CHECK(id);
        __atomic_store_n(&shared_post, id, __ATOMIC_SEQ_CST);
        sched_yield();
        up_post_end(id);
    }
    up_lookout_settle();
    close_pipe(ends);
    return NULL;
}

static void run_threads(double seconds) {
    int kinds[2] = {0, 1};
    pthread_t threads[9];
    int n = 0;
    atomic_store(&stopped, 0);
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[n++], NULL, napper, &kinds[i % 2]) == 0);
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[n++], NULL, comer, NULL) == 0);
    CHECK(pthread_create(&threads[n++], NULL, closer, NULL) == 0);
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[n++], NULL, looker, NULL) == 0);
    usleep((useconds_t)(seconds * 1e6));
    atomic_store(&stopped, 1);
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < UP_POSTS; i++) CHECK(up_posts[i].id == 0);
    for (int i = 0; i < 3; i++) CHECK(done[i] > 10);
    printf("  %llu naps with a word, %llu lulls, %llu posts that came and went\n", (unsigned long long)done[0],
           (unsigned long long)done[1], (unsigned long long)done[2]);
}

/* ------------------------------------------------------------------ forks */

static void in_child(uint64_t parents, int ends[2]) {
    uint32_t word = 0;
    alarm(PATIENCE);
    CHECK(up_lookout_fd == -1); /* closed, without anybody's doing: pthread_atfork */
    CHECK(!up_post_quiet(parents) && !up_post_again(parents));
    up_post_end(parents); /* a handle that ends in the child: nothing of the parent's changes */
    uint64_t id = up_post_new(ends[0], &word, NULL); /* and one that goes on there */
    CHECK(id && id != parents);
    fill(ends);
    if (!nap(id, &word, 0)) FAIL("the child's nap was not ended");
    drain(ends);
    up_post_end(id);
    _exit(0); /* a search for leaks stops the threads that the parent has, and may wait for ever */
}

static void run_forks(int count) {
    pthread_t busy[3];
    int ends[2], mine[2], status, kind = 0;
    uint32_t word = 0;
    make_pipe(ends);
    make_pipe(mine);
    uint64_t id = up_post_new(mine[0], &word, NULL);
    atomic_store(&stopped, 0);
    CHECK(pthread_create(&busy[0], NULL, napper, &kind) == 0);
    for (int i = 1; i < 3; i++) CHECK(pthread_create(&busy[i], NULL, closer, NULL) == 0);
    while (atomic_load(&started) < 3) rest(1); /* AddressSanitizer's own locks do not survive a fork in a thread's making */
    for (int i = 0; i < count; i++) {
        pid_t child = fork();
        if (!child) in_child(id, ends);
        CHECK(waitpid(child, &status, 0) == child);
        if (status) FAIL("child %d ended with status %#x", i, (unsigned)status);
        CHECK(up_post_quiet(id));
    }
    fill(mine); /* the parent's own still stands */
    if (!nap(id, &word, 0)) FAIL("the parent's nap was not ended");
    atomic_store(&stopped, 1);
    for (int i = 0; i < 3; i++) pthread_join(busy[i], NULL);
    up_post_end(id);
    printf("  %d forks\n", count);
}

int main(int n, char **arg) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (n < 2) return 2;
    if (!strcmp(arg[1], "cases")) {
        case_no_descriptor();
        case_wakes();
        case_ids();
        case_closed_before();
        case_quiet_thread();
        case_many();
        case_exit();
    }
    if (!strcmp(arg[1], "threads")) run_threads(n > 2 ? atof(arg[2]) : 1);
    if (!strcmp(arg[1], "forks")) run_forks(n > 2 ? atoi(arg[2]) : 100);
    return 0;
}
