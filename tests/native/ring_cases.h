/* One small story each: flaws that were found once, and rules that no crowd of threads is sure to try. */
#ifndef RING_CASES_H
#define RING_CASES_H

#include "ring_driver.h"
#include <sys/resource.h>
#include <sys/wait.h>

typedef struct pair { /* one queue, two members of this process, producer 0 open in the first */
    up_ring base;
    int fd;
    member a, b;
} pair;

static pair *open_pair(uint32_t policy) {
    pair *p = calloc(1, sizeof *p);
    p->fd = make_ring(&p->base, 4096, policy, 0);
    join(&p->a, &p->base, 1, 0);
    join(&p->b, &p->base, 2, 0);
    CHECK(up_use_producer(&p->a.r, 0, 1) == UP_OK, "producer");
    return p;
}

static void close_pair(pair *p) {
    leave(&p->a), leave(&p->b);
    up_unmap(&p->base);
    close(p->fd);
    free(p);
}

static int heard(member *m, int producer) {
    struct pollfd bell = {.fd = m->bell[producer], .events = POLLIN};
    int yes = poll(&bell, 1, 0) == 1;
    up_bell_drain(bell.fd);
    return yes;
}

static int try_take(member *m, uint64_t *pos) {
    lock(m, m->r.c->consumer_lock);
    int rc = up_take(&m->r, pos);
    unlock(m->r.c->consumer_lock);
    return rc;
}

static uint64_t up_books_dropped(up_control *c) { return c->head_books[c->head & 1].dropped; }

/* A sleeper that gives up, or got another frame, at the moment it is rung: the wake goes on. */
static void case_wake_goes_on(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    uint64_t *bits = p->base.c->consumers_waiting;
    up_arm(&p->a.r, bits), up_arm(&p->b.r, bits);
    (void)put(&p->a, 0);
    member *rung = heard(&p->a, 0) ? &p->a : &p->b, *other = rung == &p->a ? &p->b : &p->a;
    CHECK(rung == &p->a || heard(&p->b, 0), "one is rung");
    CHECK(!heard(other, 0), "one only");
    EQUAL(up_disarm(&rung->r, bits), 0);
    CHECK(heard(other, 0), "the wake was lost");
    EQUAL(up_disarm(&other->r, bits), 0);
    uint64_t pos;
    EQUAL(try_take(other, &pos), UP_OK);
    up_arm(&p->a.r, bits);
    EQUAL(up_disarm(&p->a.r, bits), 1);
    close_pair(p);
}

/* Frames committed out of order: who waited for the first is not the only one with something to do. */
static void case_wake_behind(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    uint64_t *bits = p->base.c->consumers_waiting, first, second, pos;
    up_meta m = {.size = 100};
    up_arm(&p->b.r, bits);
    lock(&p->a, p->base.c->producer_lock);
    first = up_claim(&p->a.r, 192, 100), second = up_claim(&p->a.r, 192, 100);
    unlock(p->base.c->producer_lock);
    EQUAL(up_commit(&p->a.r, second, &m, 0), UP_OK);
    up_wake_consumers(&p->a.r, 1);
    CHECK(heard(&p->b, 0), "rung for the second");
    EQUAL(try_take(&p->b, &pos), UP_EMPTY);
    up_arm(&p->b.r, bits);
    up_arm(&p->a.r, bits);
    EQUAL(up_commit(&p->a.r, first, &m, 0), UP_OK);
    up_wake_consumers(&p->a.r, 1);
    member *rung = heard(&p->a, 0) ? &p->a : &p->b, *other = rung == &p->a ? &p->b : &p->a;
    EQUAL(try_take(rung, &pos), UP_OK);
    EQUAL(up_disarm(&rung->r, bits), 0);
    CHECK(heard(other, 0), "the second frame has nobody");
    close_pair(p);
}

/* Who holds nearly all of the ring and finds nothing more must not keep a producer asleep that has room by now. */
static void case_window(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    uint64_t pos[64], *bits = p->base.c->producers_waiting;
    for (uint64_t i = 0; i < 64; i++) (void)put(&p->a, i);
    for (int i = 0; i < 64; i++) EQUAL(try_take(&p->b, &pos[i]), UP_OK);
    UP_ST(&p->base.slots[p->a.r.slot].need_tail, 8 * 64);
    up_arm(&p->a.r, bits);
    for (int i = 0; i < 4; i++) finish(&p->b, pos[i], UP_FINISHED);
    CHECK(!heard(&p->a, 1), "no wake for each frame");
    EQUAL(try_take(&p->b, &pos[0]), UP_EMPTY);
    CHECK(heard(&p->a, 1), "the producer sleeps beside its room");
    close_pair(p);
}

/* Padding is the last thing in a closed stream: all who sleep learn that it ended. */
static void case_abort_ends(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    uint64_t *bits = p->base.c->consumers_waiting, pos, at;
    lock(&p->a, p->base.c->producer_lock);
    at = up_claim(&p->a.r, 128, 10);
    unlock(p->base.c->producer_lock);
    EQUAL(up_set_producer(&p->a.r, 0, UP_PRODUCER_CLOSED, 0), UP_OK);
    up_arm(&p->a.r, bits), up_arm(&p->b.r, bits);
    EQUAL(try_take(&p->b, &pos), UP_EMPTY);
    EQUAL(up_ended(&p->b.r), 0);
    EQUAL(up_abort(&p->a.r, at), UP_OK);
    CHECK(heard(&p->a, 0) && heard(&p->b, 0), "both are rung");
    EQUAL(take(&p->b, &pos, 0, 1), UP_END);
    EQUAL(up_emitted(&p->base, 0), 0);
    close_pair(p);
}

/* A claim that its own process gives up is no frame of its producer. */
static void case_emitted(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    for (uint64_t i = 0; i < 5; i++) {
        (void)put(&p->a, i);
        (void)put_and_abort(&p->a);
        EQUAL(up_emitted(&p->base, 0), i + 1);
    }
    close_pair(p);
}

/* Positions that are not, or not any more, held by this handle. */
static void case_not_yours(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    uint64_t pos, old = 0;
    for (uint64_t i = 0; i < 65; i++) {
        (void)put(&p->a, i);
        EQUAL(try_take(&p->b, &pos), UP_OK);
        EQUAL(up_finish(&p->a.r, pos, UP_FINISHED), UP_NOTYOURS);
        if (i < 64) finish(&p->b, pos, UP_FINISHED);
    }
    EQUAL(pos & p->base.mask, old & p->base.mask); /* the ring went round: the same place */
    EQUAL(up_finish(&p->b.r, old, UP_FINISHED), UP_NOTYOURS);
    EQUAL(up_give_back(&p->b.r, old), UP_NOTYOURS);
    EQUAL(up_give_back(&p->b.r, pos), UP_OK);
    EQUAL(up_finish(&p->b.r, pos, UP_FINISHED), UP_NOTYOURS);
    close_pair(p);
}

/* A handle that closed while one of its threads wrote: the write ends in nothing, and harms nobody who got the room since. */
static void case_closed_writer(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    up_meta m = {.size = 10};
    uint64_t *bits = p->base.c->consumers_waiting, pos, at;
    size_t found;
    lock(&p->a, p->base.c->producer_lock);
    at = up_claim(&p->a.r, 128, 10);
    unlock(p->base.c->producer_lock);
    EQUAL(up_recover(&p->a.r, p->a.r.slot, 0, NULL, 0, &found, NULL, 0), UP_OK);
    EQUAL(up_commit(&p->a.r, at, &m, 0), UP_NOTYOURS);
    EQUAL(up_abort(&p->a.r, at), UP_NOTYOURS);
    up_arm(&p->a.r, bits);
    EQUAL(bits[0], 0);
    EQUAL(up_disarm(&p->a.r, bits), 1);
    EQUAL(try_take(&p->b, &pos), UP_EMPTY);
    EQUAL(up_emitted(&p->base, 0), 0);
    close_pair(p);
}

/* The number of a dead process lives on as a thread, or as a process group: dead all the same. */
static void *linger(void *tid) {
    atomic_store((_Atomic int *)tid, (int)syscall(SYS_gettid));
    pause();
    return NULL;
}

static void case_proof_of_death(void) {
    static _Atomic int tid;
    pthread_t thread;
    uint64_t ns = up_pidns();
    int pipe_[2], status;
    EQUAL(up_process_dead((uint32_t)getpid(), up_start_time((uint32_t)getpid()), ns), 0);
    EQUAL(up_process_dead((uint32_t)getpid(), up_start_time((uint32_t)getpid()) + 1, ns), 1);
    EQUAL(up_process_dead((uint32_t)getpid(), up_start_time((uint32_t)getpid()) + 1, ns + 1), 0);
    CHECK(pthread_create(&thread, NULL, linger, &tid) == 0, "thread");
    while (!atomic_load(&tid)) sched_yield();
    EQUAL(up_process_dead((uint32_t)atomic_load(&tid), 1, ns), 1);
    CHECK(pipe(pipe_) == 0, "pipe");
    pid_t leader = fork(), member_;
    if (leader == 0) {
        setsid();
        if ((member_ = fork()) == 0)
            for (alarm(60);;) pause(); /* ends by itself when the test does not end it */
        _exit(write(pipe_[1], &member_, sizeof member_) != sizeof member_ || (pause(), 0));
    }
    CHECK(read(pipe_[0], &member_, sizeof member_) == sizeof member_, "read");
    uint64_t start = up_start_time((uint32_t)leader);
    EQUAL(up_process_dead((uint32_t)leader, start, ns), 0);
    kill(leader, SIGKILL);
    while (!up_process_dead((uint32_t)leader, start, ns)) sched_yield(); /* a zombie is dead */
    CHECK(waitpid(leader, &status, 0) == leader, "wait");
    EQUAL(up_process_dead((uint32_t)leader, start, ns), 1);
    kill(member_, SIGKILL);
    close(pipe_[0]), close(pipe_[1]);
}

/* A live process is never recovered; a second recovery of a dead one finds nothing to do. */
static void case_alive(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    size_t found;
    EQUAL(up_recover(&p->a.r, p->b.r.slot, 0, NULL, 0, &found, NULL, 0), UP_ALIVE);
    EQUAL(up_recover(&p->a.r, 77, 0, NULL, 0, &found, NULL, 0), UP_OK);
    close_pair(p);
}

/* A recovery holds the registry: nobody joins a slot, and no second one begins, before it is done. */
static _Atomic int registry_held;

static void *hold_registry(void *arg) {
    member *m = arg;
    struct timespec nap = {0, 30000000};
    lock(m, m->r.c->registry_lock);
    atomic_store(&registry_held, 1);
    nanosleep(&nap, NULL);
    EQUAL(up_kind(UP_LD(up_state_at(&m->r, 0))), UP_TAKEN);
    unlock(m->r.c->registry_lock);
    return NULL;
}

static void case_one_recovery(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    pthread_t thread;
    uint64_t pos;
    size_t found;
    int status;
    pid_t parent = getpid(), pid;
    (void)put(&p->a, 0);
    if ((pid = fork()) == 0) {
        die_with(parent);
        member *m = calloc(1, sizeof *m);
        join(m, &p->base, 1, 0);
        (void)try_take(m, &pos);
        raise(SIGKILL);
    }
    CHECK(waitpid(pid, &status, 0) == pid, "wait");
    sweep(pid);
    CHECK(pthread_create(&thread, NULL, hold_registry, &p->b) == 0, "thread");
    while (!atomic_load(&registry_held)) sched_yield();
    EQUAL(up_recover(&p->a.r, 2, 0, NULL, 0, &found, NULL, 0), UP_OK);
    EQUAL(up_kind(UP_LD(up_state_at(&p->base, 0))), UP_AVAILABLE);
    pthread_join(thread, NULL);
    close_pair(p);
}

/* Covered frames are finished, worn ones handed to who recovers, the rest given back. */
static void case_verdict(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    uint64_t pos[4], dead[4];
    size_t found;
    int status;
    pid_t parent = getpid();
    for (uint64_t i = 0; i < 4; i++) (void)put(&p->a, i);
    for (int round = 0; round < 2; round++) {
        pid_t pid = fork();
        if (pid == 0) {
            die_with(parent);
            member *m = calloc(1, sizeof *m);
            join(m, &p->base, 1, 0);
            for (int i = 0; i < (round ? 4 : 2); i++) (void)try_take(m, &pos[i]);
            raise(SIGKILL);
        }
        CHECK(waitpid(pid, &status, 0) == pid, "wait");
        sweep(pid);
        uint64_t covered[] = {128};
        EQUAL(up_recover(&p->a.r, 2, 2, dead, 4, &found, covered, (size_t)round), UP_OK);
        EQUAL(found, round ? 2 : 0); /* 0 and 64 were held twice, 128 is covered, 192 was held once */
    }
    EQUAL(dead[0], 0), EQUAL(dead[1], 64);
    for (int i = 0; i < 2; i++) finish(&p->a, dead[i], UP_DEAD);
    EQUAL(try_take(&p->b, &pos[0]), UP_OK);
    EQUAL(pos[0], 192);
    EQUAL(up_frame_at(&p->base, 192)->deliveries, 2);
    finish(&p->b, 192, UP_FINISHED);
    totals t = check_at_rest(&p->base);
    EQUAL(t.dead, 2), EQUAL(t.finished, 2);
    close_pair(p);
}

/* A held frame pins the ring: the newest frame goes for the newcomer and counts as dropped, whoever put it, unless somebody
 * has it or the newcomer would not fit even so. */
static void case_replace(void) {
    pair *p = open_pair(UP_POLICY_DROP_OLDEST);
    up_control *c = p->base.c;
    uint64_t pos, number;
    uint32_t id;
    up_frame f;
    up_meta large = {.size = 128}, huge = {.size = 4096 - 64};
    CHECK(up_use_producer(&p->b.r, 1, 1) == UP_OK, "producer");
    (void)put(&p->b, 0);
    EQUAL(try_take(&p->a, &pos), UP_OK);
    for (uint64_t i = 1; i < 64; i++) EQUAL(put(&p->b, i), UP_OK);
    EQUAL(put(&p->a, 0), UP_OK); /* takes the place of another producer's frame */
    EQUAL(up_books_dropped(c), 1);
    EQUAL(up_emitted(&p->base, 1), 64), EQUAL(up_emitted(&p->base, 0), 1);
    EQUAL(try_put(&p->a, &large, 0), UP_REFUSED); /* three granules for one: no */
    EQUAL(try_put(&p->a, &huge, 0), UP_REFUSED);
    EQUAL(put_and_abort(&p->a), UP_REFUSED);
    EQUAL(up_books_dropped(c), 4);
    finish(&p->a, pos, UP_FINISHED);
    for (uint64_t i = 1; i < 63; i++) {
        EQUAL(try_take(&p->b, &pos), UP_OK);
        read_frame(&p->b, pos, &f, &id, &number);
        EQUAL(id, 1), EQUAL(number, i);
        finish(&p->b, pos, UP_FINISHED);
    }
    EQUAL(try_take(&p->b, &pos), UP_OK); /* the newest is held: nothing to replace, and there is room in any case */
    read_frame(&p->b, pos, &f, &id, &number);
    EQUAL(id, 0), EQUAL(number, 0);
    c->max_frames = 1;
    EQUAL(put(&p->a, 1), UP_REFUSED);
    finish(&p->b, pos, UP_FINISHED);
    totals t = check_at_rest(&p->base);
    EQUAL(t.claimed, 64), EQUAL(t.refused, 5), EQUAL(t.dropped, 0);
    close_pair(p);
}

/* The frame that makes way may be longer or shorter than the newcomer: that has its own length, no padding is left. */
static void case_replace_lengths(void) {
    pair *p = open_pair(UP_POLICY_LATEST);
    uint64_t pos;
    up_meta sizes[] = {{.size = 2000}, {.size = 1900}, {.size = 1840}, {.size = 1900}, {.size = 1700}};
    EQUAL(try_put(&p->a, &sizes[0], 0), UP_OK);
    EQUAL(try_take(&p->b, &pos), UP_OK);
    for (int i = 1; i < 5; i++) {
        EQUAL(try_put(&p->a, &sizes[i], 0), UP_OK);
        EQUAL(up_span(*up_state_at(&p->base, p->base.c->last)), up_need(sizes[i].size, 0));
    }
    finish(&p->b, pos, UP_FINISHED);
    EQUAL(try_take(&p->b, &pos), UP_OK);
    EQUAL(up_frame_at(&p->base, pos)->size, 1700);
    finish(&p->b, pos, UP_FINISHED);
    totals t = check_at_rest(&p->base);
    EQUAL(t.finished, 2), EQUAL(t.refused, 3), EQUAL(t.dropped + t.aborted, 0);
    close_pair(p);
}

/* A sleeper that died is passed over, SIGPIPE at its default or not; without a descriptor its bit stays for the next. */
static void case_dead_sleeper(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    uint64_t *bits = p->base.c->consumers_waiting;
    struct rlimit was, none;
    up_arm(&p->a.r, bits);
    (void)put(&p->a, 0); /* opens the write end */
    CHECK(heard(&p->a, 0), "rung");
    close(p->a.bell[0]); /* the sleeper's end goes: the next byte would raise SIGPIPE */
    p->a.bell[0] = dup(p->a.bell[1]);
    up_arm(&p->a.r, bits), up_arm(&p->b.r, bits);
    for (int i = 0; i < 2; i++) (void)put(&p->a, 1);
    CHECK(heard(&p->b, 0), "the living one is rung");
    EQUAL(bits[0], 0);
    sigset_t pending;
    sigpending(&pending);
    CHECK(!sigismember(&pending, SIGPIPE), "SIGPIPE stays behind");
    up_bell_forget();
    getrlimit(RLIMIT_NOFILE, &was);
    none = was, none.rlim_cur = 3;
    setrlimit(RLIMIT_NOFILE, &none);
    up_arm(&p->b.r, bits);
    (void)put(&p->a, 2);
    CHECK(bits[0] != 0, "nobody could be rung: the bit stays");
    setrlimit(RLIMIT_NOFILE, &was);
    (void)put(&p->a, 3);
    CHECK(heard(&p->b, 0), "rung by the next");
    close_pair(p);
}

/* Half a file, a foreign one, another version, a short one. */
static void case_attach(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    up_ring r;
    uint32_t found[2];
    EQUAL(up_attach(&r, p->fd, found), UP_OK);
    EQUAL(found[0], UP_VERSION), EQUAL(found[1], up_fingerprint());
    up_unmap(&r);
    CHECK(ftruncate(p->fd, (off_t)up_total(4096) - 1) == 0, "truncate");
    EQUAL(up_attach(&r, p->fd, found), UP_TRUNCATED);
    CHECK(ftruncate(p->fd, (off_t)up_total(4096)) == 0, "truncate");
    p->base.c->version++;
    EQUAL(up_attach(&r, p->fd, found), UP_OTHERVERSION);
    p->base.c->version--, p->base.c->magic++;
    EQUAL(up_attach(&r, p->fd, found), UP_FOREIGN);
    p->base.c->magic--;
    for (uint64_t wanted = 1; wanted < UP_MAX_RING; wanted = wanted * 3 + 1) {
        uint64_t capacity = up_capacity_for(wanted);
        CHECK(capacity >= wanted && (capacity & (capacity - 1)) == 0 && up_span(up_word(UP_TAKEN, 1, capacity)) == capacity, "capacity");
    }
    close_pair(p);
}

static void case_mirror_refuses(void), case_mirror_drops(void), case_mirror_after_readers(void); /* ring_mirror.h */

static void case_jump(void);
static void case_hop(void);
static void case_jump_at_random(void);
static void case_slide(void);
static void case_no_jump(void);
static void case_jump_undone(void);

static void run_cases(void) {
    static const struct { const char *name; void (*run)(void); } cases[] = {
        {"wake goes on", case_wake_goes_on}, {"wake behind", case_wake_behind}, {"window", case_window},
        {"abort ends", case_abort_ends}, {"emitted", case_emitted}, {"not yours", case_not_yours},
        {"closed writer", case_closed_writer}, {"proof of death", case_proof_of_death}, {"alive", case_alive},
        {"one recovery", case_one_recovery}, {"verdict", case_verdict}, {"replace", case_replace},
        {"replace lengths", case_replace_lengths}, {"dead sleeper", case_dead_sleeper}, {"attach", case_attach},
        {"mirror refuses", case_mirror_refuses}, {"mirror drops", case_mirror_drops}, {"mirror after readers", case_mirror_after_readers},
        {"jump", case_jump}, {"hop", case_hop}, {"jump at random", case_jump_at_random}, {"slide", case_slide}, {"no jump", case_no_jump},
        {"jump undone", case_jump_undone},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        printf("  %s\n", cases[i].name);
        cases[i].run();
    }
}

#endif
