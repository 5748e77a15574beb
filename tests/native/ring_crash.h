/* Processes that are killed: at every named point (UP_CRASH), and anywhere by chance.
 *
 * Workers produce and consume; reapers (processes as well, so that they can die in a recovery) recover the dead; the parent
 * only starts them again. The oracle is a ledger outside the ring: what a put returned for, what was delivered, who held it
 * when it died. Afterwards: nothing committed is lost, a frame came twice only when its holder was killed, with a raised
 * count, contents are whole, a producer that resumes at up_emitted() skips and repeats nothing, the stream ends, the books
 * balance.
 */
#ifndef RING_CRASH_H
#define RING_CRASH_H

#include "ring_driver.h"
#include <dirent.h>
#include <sys/wait.h>

enum { CRASH_IDS = 2, CRASH_READERS = 2, CRASH_NUMBERS = 1 << 16, CRASH_PROCESSES = CRASH_IDS + CRASH_READERS + 1, MAX_DELIVERIES = 4 };

typedef struct story { /* of one frame; atomics: whoever is killed leaves what it wrote */
    _Atomic uint32_t tried, put; /* a put began, returned */
    _Atomic uint32_t delivered;  /* times handed to a reader */
    _Atomic uint32_t first;      /* of them with a delivery count of 1 */
    _Atomic uint32_t holder;     /* pid that was given it last and did not finish it or give it back */
    _Atomic uint32_t finished, buried;
} story;

typedef struct ledger {
    plan plans[5];
    story of[CRASH_IDS][CRASH_NUMBERS];
} ledger;

typedef struct drill {
    const char *name;
    uint32_t numbers, most, policy;
    int batch, get, gives, aborts;
} drill;

static const drill drills[] = {
    {"take and finish", 150, 600, UP_POLICY_BLOCK, 0, 0, 6, 6},
    {"batches, get", 300, 0, UP_POLICY_BLOCK, 1, 1, 0, 5},
    {"drop the oldest", 200, 400, UP_POLICY_DROP_OLDEST, 0, 0, 5, 5},
    {"latest", 200, 400, UP_POLICY_LATEST, 0, 0, 5, 5},
};

static ledger *book;
static const drill *now_drill;
static pid_t parent_pid;

/* In a child: die with the parent, and choose at which passage of each planned point to die. */
static void armed(uint64_t seed, uint32_t spread) {
    die_with(parent_pid);
    plans = book->plans;
    for (int i = 0; i < plan_count; i++) {
        static const uint32_t passages[] = {1, 1, 2, 3, 7, 20, 60};
        plan_left[i] = passages[chance(&seed, spread)];
    }
}

static void crash_producer(const up_ring *base, uint32_t id, uint64_t seed) {
    member *m = calloc(1, sizeof *m);
    armed(seed, 7);
    join(m, base, seed, now_drill->most);
    CHECK(up_use_producer(&m->r, id, 0) == UP_OK, "producer");
    uint64_t number = up_emitted(&m->r, id); /* exact: the life before was recovered */
    if (now_drill->policy != UP_POLICY_BLOCK) /* refused frames are not in the ring: the producer keeps its own place */
        for (number = 0; number < now_drill->numbers && atomic_load(&book->of[id][number].tried);) number++;
    while (number < now_drill->numbers) {
        if (chance(&m->seed, 100) < (uint32_t)now_drill->aborts) (void)put_and_abort(m);
        uint32_t left = now_drill->numbers - (uint32_t)number, n = 0;
        atomic_store(&book->of[id][number].tried, 1);
        if (now_drill->batch) n = put_batch(m, number, left < BATCH ? left : BATCH);
        if (n == 0) (void)put(m, number), n = 1;
        for (; n; n--) atomic_fetch_add(&book->of[id][number++].put, 1);
    }
    CHECK(up_set_producer(&m->r, id, UP_PRODUCER_CLOSED, 0) == UP_OK, "close");
    leave(m);
    _exit(0);
}

static story *deliver(const up_frame *f, uint32_t id, uint64_t number) {
    CHECK(id < CRASH_IDS && number < now_drill->numbers, "frame %u:%llu", id, (unsigned long long)number);
    story *s = &book->of[id][number];
    uint32_t before = atomic_exchange(&s->holder, (uint32_t)getpid());
    uint32_t times = atomic_fetch_add(&s->delivered, 1) + 1;
    if (f->deliveries == 1) EQUAL(atomic_fetch_add(&s->first, 1), 0);
    CHECK(f->deliveries >= times, "delivery %u carries a count of %u", times, f->deliveries);
    EQUAL(atomic_load(&s->finished), 0);
    if (before) CHECK(atomic_load(&killed_pids[before]), "frame %u:%llu of %u, which lives", id, (unsigned long long)number, before);
    return s;
}

/* Recover everybody who is proven dead; bury what was delivered too often. */
static void recover_all(member *m, uint64_t max_deliveries) {
    uint64_t dead[8];
    for (uint32_t i = 0; i < 32; i++) {
        size_t found = 0;
        int rc = i == m->r.slot ? UP_OK : up_recover(&m->r, i, max_deliveries, dead, 8, &found, NULL, 0);
        CHECK(rc == UP_OK || rc == UP_ALIVE, "recover: %d", rc);
        for (size_t k = 0; k < found; k++) {
            up_frame f;
            uint32_t id;
            uint64_t number;
            read_frame(m, dead[k], &f, &id, &number);
            CHECK(f.deliveries >= MAX_DELIVERIES, "buried at %u", f.deliveries);
            finish(m, dead[k], UP_DEAD);
            atomic_store(&book->of[id][number].buried, 1);
        }
    }
}

static void crash_consumer(const up_ring *base, uint64_t seed) {
    member *m = calloc(1, sizeof *m);
    up_frame f[BATCH];
    uint64_t pos, number;
    uint32_t id;
    int rc = 0;
    armed(seed, 7);
    join(m, base, seed, now_drill->most);
    if (chance(&m->seed, 2)) recover_all(m, 0); /* beside the reaper, as in a queue without a supervisor */
    while (rc != UP_END) {
        uint32_t n = now_drill->get ? 1 + 3 * chance(&m->seed, 2) : 0;
        rc = n ? consume(m, f, &n) : UP_TOOBIG;
        if (rc == UP_OK)
            for (uint32_t i = 0; i < n; i++) {
                check_frame(&f[i], NULL, 0, &id, &number, now_drill->most);
                atomic_store(&deliver(&f[i], id, number)->finished, 1);
            }
        if (rc == UP_OK || rc == UP_END || (rc = take(m, &pos, 0, 1)) != UP_OK) continue;
        read_frame(m, pos, f, &id, &number);
        story *s = deliver(f, id, number);
        if (chance(&m->seed, 100) < (uint32_t)now_drill->gives && f->deliveries < 3) {
            atomic_store(&s->holder, 0);
            give_back(m, pos);
            continue;
        }
        finish(m, pos, UP_FINISHED);
        atomic_store(&s->finished, 1);
        atomic_store(&s->holder, 0);
    }
    leave(m);
    _exit(0);
}

static void crash_reaper(const up_ring *base, uint64_t seed) {
    member *m = calloc(1, sizeof *m);
    armed(seed, 3);
    join(m, base, seed, now_drill->most);
    recover_all(m, MAX_DELIVERIES);
    leave(m);
    _exit(0);
}

/* ------------------------------------------------------------------ the parent */

enum { GONE, RUNS, DEAD, SEEN, REAPER = CRASH_PROCESSES - 1 }; /* SEEN: the reaper that runs began after its death */

typedef struct troupe {
    const up_ring *base;
    pid_t pid[CRASH_PROCESSES]; /* producers, consumers, the reaper */
    int state[CRASH_PROCESSES];
    uint64_t seed;
} troupe;

static void start(troupe *t, int i) {
    uint64_t seed = t->seed = mix(t->seed);
    for (int k = 0; i == REAPER && k < REAPER; k++)
        if (t->state[k] == DEAD) t->state[k] = SEEN;
    t->state[i] = RUNS;
    fflush(NULL);
    if ((t->pid[i] = fork()) != 0) return;
    if (i < CRASH_IDS) crash_producer(t->base, (uint32_t)i, seed);
    if (i == REAPER) crash_reaper(t->base, seed);
    crash_consumer(t->base, seed);
}

static int any(const troupe *t, int state) {
    int n = 0;
    for (int i = 0; i < CRASH_PROCESSES; i++) n += t->state[i] == state;
    return n;
}

static void sweep(pid_t pid) { /* what segment.py does for a dead session */
    char path[512];
    DIR *all = opendir(test_root);
    for (struct dirent *e; all && (e = readdir(all));) {
        if ((pid_t)atoi(e->d_name) != pid) continue;
        snprintf(path, sizeof path, "%s/%s", test_root, e->d_name);
        DIR *one = opendir(path);
        for (struct dirent *b; one && (b = readdir(one));)
            if (b->d_name[0] != '.') unlinkat(dirfd(one), b->d_name, 0);
        if (one) closedir(one);
        rmdir(path);
    }
    if (all) closedir(all);
}

/* A worker that was killed starts again once a reaper that saw its death has ended well. */
static void on_end(troupe *t, pid_t pid, int status) {
    int i = 0, well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    while (i < CRASH_PROCESSES && t->pid[i] != pid) i++;
    CHECK(i < CRASH_PROCESSES, "child %d", pid);
    CHECK(well || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL), "worker %d ended with %x", i, (unsigned)status);
    sweep(pid);
    t->pid[i] = 0;
    t->state[i] = well ? GONE : DEAD;
    for (int k = 0; i == REAPER && well && k < REAPER; k++)
        if (t->state[k] == SEEN) start(t, k);
    if (t->state[REAPER] != RUNS && (any(t, DEAD) || any(t, SEEN))) start(t, REAPER);
}

static void check_stories(const drill *d, up_ring *r, uint64_t kills) {
    totals t = check_at_rest(r);
    uint64_t lost = 0, arrived = 0, puts = 0, all = (uint64_t)CRASH_IDS * d->numbers;
    EQUAL(r->c->stream, UP_STREAM_CLOSED);
    for (uint32_t id = 0; id < CRASH_IDS; id++)
        for (uint32_t i = 0; i < d->numbers; i++) {
            const story *s = &book->of[id][i];
            CHECK(s->put <= 1, "put %u times", s->put);
            CHECK(s->finished + s->buried <= 1, "finished and buried");
            arrived += s->delivered || s->buried;
            lost += !s->delivered && !s->buried;
            puts += s->put;
        }
    if (!d->get) CHECK(arrived >= t.finished + t.dead, "%llu arrived, %llu ended", (unsigned long long)arrived, (unsigned long long)(t.finished + t.dead));
    CHECK(puts <= t.claimed - t.aborted + t.refused, "a put returned and is not in the books");
    CHECK(t.claimed - t.aborted <= all, "more frames than puts");
    if (d->policy != UP_POLICY_BLOCK) return;
    CHECK(lost <= (d->get ? 4 * kills : 0), "%llu frames lost", (unsigned long long)lost); /* get() is at most once */
    for (uint32_t id = 0; id < CRASH_IDS; id++) EQUAL(up_emitted(r, id), d->numbers);
    EQUAL(t.finished + t.dead, all);
}

/* Everybody works, the plans kill, and so does chance until `chaos` ns are over. Returns the number of the killed. */
static uint32_t run_drill(const drill *d, uint64_t seed, uint64_t chaos) {
    up_ring base;
    int fd = make_ring(&base, 4096, d->policy, 0), status;
    troupe t = {.base = &base, .seed = seed};
    uint64_t begin = up_now_ns(CLOCK_MONOTONIC);
    uint32_t kills = 0;
    for (uint32_t i = 0; i < CRASH_IDS; i++) memset(book->of[i], 0, d->numbers * sizeof **book->of);
    now_drill = d;
    for (uint32_t i = 0; i < CRASH_IDS; i++) CHECK(up_set_producer(&base, i, UP_PRODUCER_DECLARED, 0) == UP_OK, "declare");
    for (int i = 0; i < REAPER; i++) start(&t, i);
    while (any(&t, RUNS)) {
        int wild = up_now_ns(CLOCK_MONOTONIC) - begin < chaos;
        if (wild) {
            struct timespec nap = {0, (long)chance(&seed, 3000) * 1000};
            int victim = (int)chance(&seed, CRASH_PROCESSES);
            nanosleep(&nap, NULL);
            if (t.state[victim] == RUNS) {
                atomic_store(&killed_pids[t.pid[victim]], 1);
                kill(t.pid[victim], SIGKILL);
            }
        }
        for (pid_t pid; (pid = waitpid(-1, &status, wild ? WNOHANG : 0)) > 0; wild = 1) {
            kills += WIFSIGNALED(status);
            on_end(&t, pid, status);
        }
    }
    check_stories(d, &base, kills);
    up_unmap(&base);
    close(fd);
    return kills;
}

/* Join, open a producer, put, leave, on a queue of its own making: points that no drill passes. */
static int run_life(uint64_t seed) {
    int fd = memfd_create("ring", MFD_CLOEXEC), status;
    uint32_t found[2], born = 0;
    CHECK(fd >= 0 && ftruncate(fd, (off_t)up_total(4096)) == 0, "memfd");
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        member *m = calloc(1, sizeof *m);
        up_ring base = {0};
        armed(0, 1);
        CHECK(up_create(&base, fd, 4096, UP_POLICY_BLOCK, 0, UP_OPT_SUPERVISED, 0) == UP_OK, "create");
        join(m, &base, seed, 0);
        CHECK(up_auto_producer(&m->r) == UP_OK, "producer");
        (void)put(m, 0);
        leave(m);
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid, "wait");
    sweep(pid);
    up_ring r;
    int rc = up_attach(&r, fd, found);
    if (rc == UP_OK) {
        member *m = calloc(1, sizeof *m);
        size_t n;
        born = 1;
        join(m, &r, seed, 0);
        for (uint32_t i = 0; i < 4; i++) CHECK(i == m->r.slot || up_recover(&m->r, i, 0, NULL, 0, &n, NULL, 0) == UP_OK, "recover");
        uint64_t pos, number, had = up_emitted(&r, 0);
        up_frame f;
        uint32_t id;
        CHECK(up_auto_producer(&m->r) == UP_OK, "producer");
        CHECK(m->r.producer <= 1, "id"); /* an id opened in vain was closed, so another one is taken */
        (void)put_batch(m, 1, 3);
        CHECK(up_set_producer(&m->r, m->r.producer, UP_PRODUCER_CLOSED, 0) == UP_OK, "close");
        for (uint64_t i = m->r.producer == 1 ? 1 - had : 1; i < 4; i++) {
            CHECK(take(m, &pos, 0, 1) == UP_OK, "take");
            read_frame(m, pos, &f, &id, &number);
            EQUAL(number, i);
            finish(m, pos, UP_FINISHED);
        }
        EQUAL(take(m, &pos, 0, 1), UP_END);
        leave(m);
        check_at_rest(&r);
        free(m);
        up_unmap(&r);
    } else {
        EQUAL(rc, UP_FOREIGN); /* nobody attaches to half a queue */
    }
    close(fd);
    return (int)born;
}

static void make_ledger(void) {
    size_t n = sizeof(ledger), pids = 1 << 22; /* the kernel's most */
    parent_pid = getpid();
    book = mmap(NULL, n + pids, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(book != MAP_FAILED, "ledger");
    killed_pids = (_Atomic uint8_t *)book + n;
}

static void set_plan(int i, const char *point, int budget) {
    snprintf(book->plans[i].point, sizeof book->plans[i].point, "%s", point);
    atomic_store(&book->plans[i].budget, budget);
    atomic_store(&book->plans[i].hits, 0);
}

static int run_play(uint64_t seed, uint64_t start, uint32_t policy); /* ring_mirror.h */

/* At each point named, in every drill. Deaths inside a lock, with a claim and with a frame come with each, so that repairs and
 * recoveries are passed as well. */
static void run_points(int n, char **points, uint64_t seed) {
    const char *helpers[] = {"publish", "take", "commit", "finish"};
    const size_t kinds = sizeof drills / sizeof *drills;
    uint32_t kills = 0;
    make_ledger();
    printf("killed at named points:\n");
    for (int p = 0; p < n; p++) {
        int hits = 0;
        helpers[0] = strcmp(points[p], "no jump") ? "publish" : "jumped"; /* what that mends */
        for (uint32_t round = 0; round < 40 && (round == 0 || !hits); round++) {
            plan_count = 1;
            set_plan(0, points[p], 1);
            run_life(seed);
            hits += atomic_load(&book->plans[0].hits);
            for (size_t k = 0; k < kinds; k++) {
                plan_count = 5;
                set_plan(0, points[p], 3);
                for (int h = 0; h < 4; h++) set_plan(h + 1, helpers[h], strcmp(helpers[h], points[p]) ? 1 : 0);
                kills += run_drill(&drills[k], seed = mix(seed), 0);
                hits += atomic_load(&book->plans[0].hits);
            }
            for (uint32_t policy = UP_POLICY_BLOCK; policy <= UP_POLICY_LATEST; policy += UP_POLICY_LATEST) {
                set_plan(0, points[p], 3);
                kills += (uint32_t)run_play(seed = mix(seed), policy ? 0 : 1 << 20, policy);
                hits += atomic_load(&book->plans[0].hits);
            }
        }
        printf("  %-20s %3d kills\n", points[p], hits);
        CHECK(hits, "no test passes UP_CRASH(\"%s\")", points[p]);
    }
    printf("  %d points, %u kills in all\n", n, kills);
}

static void run_chaos(double seconds, uint64_t seed) {
    uint64_t end = up_now_ns(CLOCK_MONOTONIC) + (uint64_t)(seconds * 1e9), kills = 0, rounds = 0, frames = 0;
    static const drill wild[] = {
        {"take and finish", 40000, 600, UP_POLICY_BLOCK, 0, 0, 6, 6},
        {"batches, get", 60000, 0, UP_POLICY_BLOCK, 1, 1, 0, 5},
        {"drop the oldest", 60000, 400, UP_POLICY_DROP_OLDEST, 0, 0, 5, 5},
    };
    make_ledger();
    plan_count = 0;
    for (; up_now_ns(CLOCK_MONOTONIC) < end; rounds++) {
        const drill *d = &wild[rounds % 3];
        window = 128ull << mix(seed) % 8;
        kills += run_drill(d, seed = mix(seed), 400000000);
        frames += (uint64_t)CRASH_IDS * d->numbers;
    }
    window = 128;
    printf("killed by chance: %llu rounds, %llu frames, %llu kills\n", (unsigned long long)rounds, (unsigned long long)frames, (unsigned long long)kills);
}

#endif
