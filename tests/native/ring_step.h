/* kill -9 at any instruction. A child does one operation under ptrace, one machine instruction at a time, and each state
 * that the shared memory goes through is kept. When the child is dead, every one of them is put back (with the locks that
 * the child held marked as the kernel marks them) for a survivor to recover, and the checks are exact, not "at least".
 * Then the same with real kills, after some of the instructions that changed anything. Built as production is built, without
 * named points, so what is tried is the compiler's order of the stores.
 */
#ifndef RING_STEP_H
#define RING_STEP_H

#include "ring_driver.h"
#include <linux/futex.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

enum { SURVIVOR, CHILD, VICTIM, STEP_IDS }; /* producer ids; the victim died before, for operations that mend */
enum { STEP_FRAMES = 3, STEP_MOST = 200 };  /* of the survivor, put before */

typedef struct step {
    const char *name;
    void (*before)(member *); /* in the child, not stepped */
    void (*op)(member *);
    void (*victim)(member *); /* in a process that dies before */
    uint64_t puts_before, puts; /* of the child: certain, and all or none */
    uint64_t held, takes, ends, drops; /* of the survivor's frames: held in `before`; at most taken, ended, dropped by op */
    uint64_t victims_puts, victims_held;
    uint64_t replaces; /* of the child's frames: at most dropped by op for a newcomer, and counted */
} step;

static uint64_t step_pos[4];

static void lock_and_die(member *m) { (void)m; raise(SIGKILL); }
static void nothing(member *m) { (void)m; }

static void op_put_small(member *m) {
    up_meta meta;
    make_frame(&meta, m->payload, m->r.producer, SMALL, STEP_MOST);
    (void)try_put(m, &meta, 0);
}
static void op_put_large(member *m) {
    up_meta meta;
    make_frame(&meta, m->payload, m->r.producer, 5, STEP_MOST);
    (void)try_put(m, &meta, 0);
}
static void op_put_batch(member *m) { (void)put_batch(m, SMALL, 4); }
static void op_abort(member *m) { (void)put_and_abort(m); }
static void op_refuse(member *m) {
    lock(m, m->r.c->producer_lock);
    up_count_refused(&m->r);
    unlock(m->r.c->producer_lock);
}
static void op_drop(member *m) { drop(m, 4096, 1); }
static void op_take(member *m) { (void)take(m, &step_pos[0], 0, 1); }
static void pin_and_fill(member *m, uint32_t policy) { /* a held frame at the front, one of ours at the end, no room */
    op_take(m);
    (void)put_batch(m, SMALL, 1);
    UP_ST(&m->r.c->policy, policy);
    UP_ST(&m->r.c->max_frames, STEP_FRAMES + 1);
}
static void pin_and_fill_oldest(member *m) { pin_and_fill(m, UP_POLICY_DROP_OLDEST); }
static void pin_and_fill_latest(member *m) { pin_and_fill(m, UP_POLICY_LATEST); }
static void op_put_another(member *m) {
    up_meta meta;
    make_frame(&meta, m->payload, m->r.producer, SMALL | 1, STEP_MOST);
    (void)try_put(m, &meta, 0);
}
static void put_nth_large(member *m, uint64_t nth) { /* of those large enough to jump */
    up_meta meta;
    for (uint64_t number = 0;; number++) {
        CHECK(number < 8, "no such frame");
        make_frame(&meta, m->payload, m->r.producer, number, STEP_MOST);
        if (!(meta.flags & UP_FLAG_INLINE) && up_need(meta.size, 0) >= UP_WARM_MIN && nth-- == 0) break;
    }
    EQUAL(try_put(m, &meta, 0), UP_OK);
}
static void op_put_first(member *m) { put_nth_large(m, 0); }
static void finish_two(member *m) { /* memory below tail; a frame in the way, and one more for the granules that a jump needs */
    EQUAL(put_batch(m, SMALL | 7, 1), 1);
    for (int i = 0; i < 2; i++) {
        (void)take(m, &step_pos[0], 0, 1);
        finish(m, step_pos[0], UP_FINISHED);
    }
}
static void op_put_jumping(member *m) {
    op_put_first(m);
    CHECK(up_jumped(&m->r, up_position(m->r.c->head), up_position(m->r.c->tail)), "it did not jump");
}
static void finish_two_put_one(member *m) {
    finish_two(m);
    op_put_jumping(m);
}
static void op_put_hopping(member *m) {
    put_nth_large(m, 1);
    CHECK(up_hopped(&m->r, up_position(m->r.c->head)), "it did not hop");
}
static void op_finish(member *m) { finish(m, step_pos[0], UP_FINISHED); }
static void op_bury(member *m) { finish(m, step_pos[0], UP_DEAD); }
static void op_give_back(member *m) { give_back(m, step_pos[0]); }
static void op_take_finish(member *m) { op_take(m), op_finish(m); }
static void op_consume(member *m) {
    up_frame f[4];
    uint32_t n = 2;
    (void)consume(m, f, &n);
}
static void op_get(member *m) {
    up_frame f;
    uint32_t n = 1;
    (void)consume(m, &f, &n);
}
static void take_two(member *m) {
    (void)take(m, &step_pos[1], 0, 1);
    (void)take(m, &step_pos[0], 0, 1);
}
static void put_one_take_two(member *m) {
    (void)put_batch(m, SMALL, 1);
    take_two(m);
}
static void claim_two(member *m) { /* and leave them unfinished */
    lock(m, m->r.c->producer_lock);
    for (int i = 0; i < 2; i++) (void)up_claim(&m->r, 256, 100);
    unlock(m->r.c->producer_lock);
}
static void claim_two_take_two(member *m) {
    (void)put_batch(m, SMALL, 1);
    claim_two(m);
    take_two(m);
}
static void die_holding(member *m) {
    claim_two_take_two(m);
    lock_and_die(m);
}
static void die_in_publish(member *m) { /* everything of a put but the store to head */
    up_control *c = m->r.c;
    up_meta meta;
    (void)put_batch(m, SMALL, 1);
    lock(m, c->producer_lock);
    make_frame(&meta, m->payload, m->r.producer, SMALL | 1, STEP_MOST);
    up_put_inline_at(&m->r, &meta, 0);
    up_claims *note = &m->r.producers[m->r.producer].claims[m->r.turn ^ 1];
    UP_ST(&note->position, up_position(UP_LD(&c->head)));
    UP_ST(&note->frames, 2);
    lock_and_die(m);
}
static void die_in_jump(member *m) { /* everything of a claim but the store to head */
    up_control *c = m->r.c;
    finish_two(m);
    lock(m, c->producer_lock);
    uint64_t head = up_position(UP_LD(&c->head)), gap = up_jump(&m->r, 192);
    CHECK(gap, "it does not jump");
    UP_ST(up_state_at(&m->r, head), up_word(UP_GAP, 0, gap));
    UP_ST(up_state_at(&m->r, head + gap), up_word(UP_CLAIMED, m->r.slot, 192));
    lock_and_die(m);
}
static void die_in_hop(member *m) { /* a gap and no claim behind it */
    finish_two_put_one(m);
    lock(m, m->r.c->producer_lock);
    EQUAL(up_room(&m->r, 192, 1), UP_OK);
    up_open(&m->r, 192);
    lock_and_die(m);
}
static void die_in_take(member *m) { /* everything of a take but the store to next; and one that is given back, uncounted */
    up_control *c = m->r.c;
    (void)take(m, &step_pos[0], 0, 1);
    lock(m, c->consumer_lock);
    (void)up_give_back(&m->r, step_pos[0]);
    UP_ST(&c->redeliver, 0);
    uint64_t *state = up_state_at(&m->r, UP_LD(&c->next));
    UP_ST(state, up_word(UP_TAKEN, m->r.slot, up_span(UP_LD(state))));
    lock_and_die(m);
}
static void op_recover(member *m) {
    size_t found;
    for (uint32_t i = 0; i < 4; i++)
        if (i != m->r.slot && up_process_dead(UP_LD(&m->r.slots[i].pid), UP_LD(&m->r.slots[i].start), UP_LD(&m->r.slots[i].pidns)))
            (void)up_recover(&m->r, i, 0, NULL, 0, &found, NULL, 0);
}
static void op_leave(member *m) {
    size_t found;
    (void)up_recover(&m->r, m->r.slot, 0, NULL, 0, &found, NULL, 0);
}
static void op_close(member *m) { (void)up_set_producer(&m->r, CHILD, UP_PRODUCER_CLOSED, 0); }

static const step steps[] = {
    {.name = "put, small", .before = nothing, .op = op_put_small, .puts = 1},
    {.name = "put, large", .before = nothing, .op = op_put_large, .puts = 1},
    {.name = "put, batch", .before = nothing, .op = op_put_batch, .puts = 4},
    {.name = "put, the reader asleep behind", .before = op_put_batch, .op = op_put_large, .puts_before = 4, .puts = 1},
    {.name = "claim and abort", .before = nothing, .op = op_abort},
    {.name = "refuse", .before = nothing, .op = op_refuse},
    {.name = "drop", .before = nothing, .op = op_drop, .drops = 3},
    {.name = "replace, small", .before = pin_and_fill_oldest, .op = op_put_another, .puts_before = 1, .puts = 1, .held = 1, .replaces = 1},
    {.name = "replace, large", .before = pin_and_fill_oldest, .op = op_put_large, .puts_before = 1, .puts = 1, .held = 1, .replaces = 1},
    {.name = "replace, only the latest", .before = pin_and_fill_latest, .op = op_put_large, .puts_before = 1, .puts = 1, .held = 1, .drops = 2, .replaces = 1},
    {.name = "take", .before = nothing, .op = op_take, .takes = 1},
    {.name = "take and finish", .before = nothing, .op = op_take_finish, .takes = 1, .ends = 1},
    {.name = "finish out of order", .before = take_two, .op = op_finish, .held = 2, .ends = 1},
    {.name = "bury", .before = op_take, .op = op_bury, .held = 1, .ends = 1},
    {.name = "give back", .before = take_two, .op = op_give_back, .held = 2},
    {.name = "consume", .before = nothing, .op = op_consume, .ends = 2},
    {.name = "get", .before = nothing, .op = op_get, .ends = 1},
    {.name = "close the stream", .before = nothing, .op = op_close},
    {.name = "leave", .before = put_one_take_two, .op = op_leave, .puts_before = 1, .held = 2},
    {.name = "leave with claims", .before = claim_two_take_two, .op = op_leave, .puts_before = 1, .held = 2},
    {.name = "recover", .before = nothing, .op = op_recover, .victim = die_holding, .victims_puts = 1, .victims_held = 2},
    {.name = "put into what a put left", .before = nothing, .op = op_put_small, .victim = die_in_publish, .puts = 1, .victims_puts = 1},
    {.name = "put, jumping", .before = finish_two, .op = op_put_jumping, .puts_before = 1, .puts = 1, .ends = 2},
    {.name = "put, hopping", .before = finish_two_put_one, .op = op_put_hopping, .puts_before = 2, .puts = 1, .ends = 2},
    {.name = "take and finish beyond a jump", .before = finish_two_put_one, .op = op_take_finish, .puts_before = 2, .takes = 3, .ends = 3},
    {.name = "put into what a jump left", .before = nothing, .op = op_put_first, .victim = die_in_jump, .puts = 1, .ends = 2, .victims_puts = 1},
    {.name = "put into what a hop left", .before = nothing, .op = op_put_first, .victim = die_in_hop, .puts = 1, .ends = 2, .victims_puts = 2},
    {.name = "take from what a take left", .before = nothing, .op = op_take_finish, .victim = die_in_take, .takes = 1, .ends = 1, .victims_held = 1},
};

static pid_t step_child(const step *s, const up_ring *base, int victim) {
    fflush(NULL);
    pid_t parent = getpid(), pid = fork();
    if (pid) return pid;
    member *m = calloc(1, sizeof *m);
    die_with(parent);
    join(m, base, 1, STEP_MOST);
    CHECK(up_use_producer(&m->r, victim ? VICTIM : CHILD, 1) == UP_OK, "producer");
    if (victim) s->victim(m);
    s->before(m);
    CHECK(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0, "ptrace: %s", strerror(errno));
    raise(SIGSTOP);
    s->op(m);
    raise(SIGSTOP);
    for (;;) pause();
}

static void reap(pid_t pid) {
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "child ended with %x", (unsigned)status);
}

typedef struct stage {
    up_ring base;
    member m; /* the survivor */
    int fd;
    size_t bytes;
    pid_t victim, child;
} stage;

typedef struct states { /* what the shared memory went through, and after how many instructions */
    uint8_t *copy[4096];
    uint64_t at[4096];
    uint8_t rung[4096]; /* the survivor's bell was rung before */
    size_t n;
} states;

static int rung(const member *m) {
    struct pollfd bell = {.fd = m->bell[0], .events = POLLIN};
    return poll(&bell, 1, 0) == 1;
}

static void keep(states *all, const stage *g, uint64_t at) {
    if (all->n && memcmp(all->copy[all->n - 1], g->base.c, g->bytes) == 0) return;
    CHECK(all->n < sizeof all->at / sizeof *all->at, "too many states");
    all->copy[all->n] = memcpy(malloc(g->bytes), g->base.c, g->bytes);
    all->rung[all->n] = (uint8_t)rung(&g->m);
    all->at[all->n++] = at;
}

/* Put a state back as if the child had just been killed in it: what handle_futex_death() does to its locks. */
static void put_back(const stage *g, const uint8_t *copy) {
    up_control *c = g->base.c;
    memcpy(c, copy, g->bytes);
    uint64_t *areas[] = {c->registry_lock, c->producer_lock, c->consumer_lock};
    for (int i = 0; i < 3; i++) {
        uint32_t *futex = (uint32_t *)&((pthread_mutex_t *)areas[i])->__data.__lock;
        if ((*futex & FUTEX_TID_MASK) == (uint32_t)g->child) *futex = (*futex & FUTEX_WAITERS) | FUTEX_OWNER_DIED;
    }
}

/* Run the operation for `most` instructions, then kill. Returns how many it ran; fewer than `most`: it was done. */
static uint64_t step_to(const step *s, stage *g, uint64_t most, states *all) {
    int status;
    uint64_t n = 0;
    g->victim = 0;
    if (s->victim) reap(g->victim = step_child(s, &g->base, 1));
    g->child = step_child(s, &g->base, 0);
    CHECK(waitpid(g->child, &status, 0) == g->child && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP, "child: %x", (unsigned)status);
    up_bell_drain(g->m.bell[0]);
    up_arm(&g->m.r, g->m.r.c->consumers_waiting); /* the survivor sleeps, whatever woke it so far */
    if (all) keep(all, g, 0);
    while (n < most) {
        CHECK(ptrace(PTRACE_SINGLESTEP, g->child, NULL, NULL) == 0, "step: %s", strerror(errno));
        CHECK(waitpid(g->child, &status, 0) == g->child && WIFSTOPPED(status), "child: %x", (unsigned)status);
        if (WSTOPSIG(status) == SIGSTOP) break;
        CHECK(WSTOPSIG(status) == SIGTRAP, "signal %d", WSTOPSIG(status));
        n++;
        if (all) keep(all, g, n);
    }
    kill(g->child, SIGKILL);
    reap(g->child);
    return n;
}

static void check_step(const step *s, member *m, uint64_t at) {
    up_ring *r = &m->r;
    size_t found;
    uint64_t pos, number, emitted[STEP_IDS], ends = 0, got[STEP_IDS][8] = {{0}};
    uint32_t id;
    up_frame f;
    for (int again_ = 0; again_ < 2; again_++)
        for (uint32_t i = 0; i < 4; i++)
            CHECK(i == r->slot || up_recover(r, i, 0, NULL, 0, &found, NULL, 0) == UP_OK, "recover");
    for (uint32_t i = 0; i < 4; i++) CHECK(i == r->slot || !r->slots[i].pid, "slot");
    CHECK(rung(m), "%s at %llu: the sleeper was not woken", s->name, (unsigned long long)at);
    for (uint32_t i = 0; i < STEP_IDS; i++) {
        CHECK(up_set_producer(r, i, UP_PRODUCER_CLOSED, 0) == UP_OK, "close");
        emitted[i] = up_emitted(r, i);
    }
    while (take(m, &pos, 0, 1) == UP_OK) {
        read_frame(m, pos, &f, &id, &number);
        number &= ~SMALL;
        CHECK(id < STEP_IDS && number < 8 && !got[id][number], "%s at %llu: frame %u:%llu", s->name, (unsigned long long)at, id, (unsigned long long)number);
        got[id][number] = f.deliveries;
        finish(m, pos, UP_FINISHED), ends++;
    }
    totals t = check_at_rest(r);
    uint64_t replaced = s->replaces ? t.refused : 0, mine = 0;
    for (uint64_t i = 0; i < 8; i++) mine += got[CHILD][i] != 0;
    CHECK(replaced <= s->replaces, "%s at %llu: replaced", s->name, (unsigned long long)at);
    if (s->replaces) EQUAL(mine + replaced, emitted[CHILD]); /* delivered, or dropped and counted */
    EQUAL(t.claimed - t.aborted + replaced, emitted[SURVIVOR] + emitted[CHILD] + emitted[VICTIM]);
    EQUAL(emitted[SURVIVOR], STEP_FRAMES);
    EQUAL(emitted[VICTIM], s->victims_puts);
    CHECK(emitted[CHILD] == s->puts_before || emitted[CHILD] == s->puts_before + s->puts, "%s at %llu: emitted %llu", s->name,
          (unsigned long long)at, (unsigned long long)emitted[CHILD]);
    CHECK(t.finished - ends + t.dead <= s->ends && t.dropped <= s->drops, "%s at %llu: ended", s->name, (unsigned long long)at);
    uint64_t missing = 0, held = s->held + s->victims_held;
    for (uint64_t i = 0; i < STEP_FRAMES; i++) {
        uint64_t d = got[SURVIVOR][i];
        missing += d == 0;
        if (d) CHECK(i < held ? d >= 2 && d <= (i < s->victims_held && s->takes ? 3 : 2) : d == 1 || (d == 2 && i < held + s->takes),
                     "%s at %llu: frame %llu carries a count of %llu", s->name, (unsigned long long)at, (unsigned long long)i, (unsigned long long)d);
    }
    EQUAL(missing, t.finished - ends + t.dead + t.dropped);
}

static void set_stage(const step *s, stage *g) {
    memset(g, 0, sizeof *g);
    g->fd = make_ring(&g->base, 4096, UP_POLICY_BLOCK, 0);
    g->bytes = up_total(4096);
    join(&g->m, &g->base, 1, STEP_MOST);
    for (uint32_t i = 0; i < STEP_IDS; i++) CHECK(up_set_producer(&g->base, i, UP_PRODUCER_DECLARED, 0) == UP_OK, "declare");
    CHECK(up_use_producer(&g->m.r, SURVIVOR, 1) == UP_OK, "producer");
    if (s->op == op_consume || s->op == op_get) CHECK(put_batch(&g->m, SMALL, STEP_FRAMES) == STEP_FRAMES, "put");
    else for (uint64_t i = 0; i < STEP_FRAMES; i++) (void)put(&g->m, i);
}

static void clear_stage(stage *g) {
    leave(&g->m);
    up_unmap(&g->base);
    close(g->fd);
    sweep(g->child), sweep(getpid());
    if (g->victim) sweep(g->victim);
}

static uint64_t every_state(const step *s, stage *g, states *all) {
    all->n = 0;
    set_stage(s, g);
    uint64_t total = step_to(s, g, UINT64_MAX, all);
    for (size_t i = 0; i < all->n; i++) {
        put_back(g, all->copy[i]);
        up_bell_drain(g->m.bell[0]);
        if (all->rung[i]) (void)!write(g->m.bell[0], "", 1);
        check_step(s, &g->m, all->at[i]);
        free(all->copy[i]);
    }
    clear_stage(g);
    return total;
}

static void run_steps(uint32_t kills, uint64_t seed) {
    static stage g;
    static states all;
    uint64_t tried = 0;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one); /* on one core a step is two context switches, not two wake-ups of another core */
    (void)sched_setaffinity(0, sizeof one, &one);
    printf("killed at any instruction:\n");
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        uint64_t begin = up_now_ns(CLOCK_MONOTONIC), total = every_state(&steps[i], &g, &all);
        for (uint32_t k = 0; k < kills; k++) {
            uint64_t at = all.at[k * all.n / kills + chance(&seed, (uint32_t)(all.n / kills) + 1) % (all.n - k * all.n / kills)];
            set_stage(&steps[i], &g);
            (void)step_to(&steps[i], &g, at, NULL);
            check_step(&steps[i], &g.m, at);
            clear_stage(&g);
        }
        tried += all.n;
        printf("  %-32s %6llu instructions, %4zu states, %u kills, %.2f s\n", steps[i].name, (unsigned long long)total, all.n, kills,
               (double)(up_now_ns(CLOCK_MONOTONIC) - begin) * 1e-9);
    }
    printf("  %llu states\n", (unsigned long long)tried);
}

#endif
