/* Jumps and hops: large claims go to warm memory, and no room is lost by it. */
#ifndef RING_JUMP_H
#define RING_JUMP_H

#include "ring_cases.h"

enum { JUMP_RING = 65536, JUMP_NEED = 4096 + 192, JUMP_FIT = JUMP_RING / JUMP_NEED }; /* 15 frames, and more than two granules */

static up_ring *open_jumper(member *m, up_ring *base) {
    make_ring(base, JUMP_RING, UP_POLICY_BLOCK, 0);
    memset(m, 0, sizeof *m);
    join(m, base, 1, 0);
    CHECK(up_use_producer(&m->r, 0, 1) == UP_OK, "producer");
    return &m->r;
}

static void close_jumper(member *m, up_ring *base) {
    check_at_rest(base);
    leave(m);
    up_unmap(base);
}

static uint64_t in_use(up_ring *r) {
    up_books claimed, passed;
    uint64_t head, tail;
    up_books_read(&r->c->tail, r->c->tail_books, &tail, &passed);
    up_books_read(&r->c->head, r->c->head_books, &head, &claimed);
    return up_in_use(r, head, &claimed, &passed);
}

/* Claim, fill and commit `need` ring bytes; UP_FULL, or the position in *pos. */
static int place(member *m, uint64_t need, uint64_t *pos) {
    up_meta meta = {.size = need - UP_GRANULE};
    lock(m, m->r.c->producer_lock);
    int rc = room(m, need);
    if (rc == UP_OK) *pos = up_claim(&m->r, need, meta.size);
    unlock(m->r.c->producer_lock);
    if (rc != UP_OK) return rc;
    memset(up_payload(&m->r, *pos), (int)(*pos / UP_GRANULE & 0xff), meta.size);
    return up_commit(&m->r, *pos, &meta, 0);
}

static void take_it(member *m, uint64_t pos, uint64_t need) { /* in the order of their claims, and whole */
    uint64_t at;
    EQUAL(try_take(m, &at), UP_OK);
    EQUAL(at, pos);
    EQUAL(up_span(UP_LD(up_state_at(&m->r, at))), need);
    for (uint64_t i = 0; i < need - UP_GRANULE; i++) EQUAL(up_payload(&m->r, pos)[i], (pos / UP_GRANULE) & 0xff);
}

/* A consumer that keeps up: `held` frames are in use at each claim, and two windows of that size are all that is touched, or
 * one of `warm` bytes. */
static void keep_up(uint32_t held, uint64_t warm) {
    up_ring base;
    member m;
    static uint8_t touched[JUMP_RING / UP_GRANULE];
    uint64_t pos[64], count = 0, rounds = 200;
    open_jumper(&m, &base);
    window = warm;
    for (uint64_t i = 0; i < rounds; i++) {
        uint64_t *at = &pos[i % 64];
        EQUAL(place(&m, JUMP_NEED, at), UP_OK);
        take_it(&m, *at, JUMP_NEED);
        if (i >= held) finish(&m, pos[(i - held) % 64], UP_FINISHED);
        if (i == 4 * held + 8 + 2 * JUMP_FIT) memset(touched, 0, sizeof touched);
        for (uint64_t g = 0; g < JUMP_NEED; g += UP_GRANULE) touched[((*at + g) & (JUMP_RING - 1)) / UP_GRANULE] = 1;
    }
    for (uint64_t i = rounds - held; i < rounds; i++) finish(&m, pos[i % 64], UP_FINISHED);
    for (size_t g = 0; g < sizeof touched; g++) count += touched[g];
    uint64_t drift = rounds * UP_GRANULE; /* each jump leaves one granule */
    uint64_t most = (held + 2) * JUMP_NEED > warm + JUMP_NEED ? (held + 2) * JUMP_NEED : warm + JUMP_NEED;
    CHECK(count * UP_GRANULE <= most + drift, "%u held: %llu bytes are touched", held, (unsigned long long)count * UP_GRANULE);
    CHECK(count * UP_GRANULE >= warm / JUMP_NEED * JUMP_NEED, "%llu bytes warm, %llu touched", (unsigned long long)warm,
          (unsigned long long)count * UP_GRANULE);
    window = 128;
    close_jumper(&m, &base);
}

static void case_jump(void) {
    for (uint32_t held = 0; held < 3; held++)
        for (uint64_t frames = 0; frames < 6; frames++) keep_up(held, frames * JUMP_NEED);
}

static void hop(uint32_t warm, uint32_t held) {
    up_ring base;
    member m;
    uint64_t pos[JUMP_FIT + 1], n = 0, at;
    open_jumper(&m, &base);
    for (uint32_t i = 0; i < warm; i++) {
        EQUAL(place(&m, JUMP_NEED, &at), UP_OK);
        take_it(&m, at, JUMP_NEED);
        finish(&m, at, UP_FINISHED);
    }
    for (; n < held; n++) { /* each taken at once, so that the next may jump */
        EQUAL(place(&m, JUMP_NEED, pos + n), UP_OK);
        take_it(&m, pos[n], JUMP_NEED);
    }
    while (n <= JUMP_FIT && place(&m, JUMP_NEED, &pos[n]) == UP_OK) n++;
    EQUAL(n, JUMP_FIT);
    for (uint64_t i = held; i < n; i++) take_it(&m, pos[i], JUMP_NEED);
    for (uint64_t i = 0; i < n; i++) finish(&m, pos[n - 1 - i], UP_FINISHED);
    EQUAL(place(&m, JUMP_RING, &at), UP_OK); /* a frame as large as the ring, behind whatever gaps there were */
    take_it(&m, at, JUMP_RING);
    finish(&m, at, UP_FINISHED);
    close_jumper(&m, &base);
}

/* Whatever jumped before, how far, and is held: as many frames fit as in a ring that never jumped. */
static void case_hop(void) {
    for (uint32_t warm = 0; warm < 12; warm++)
        for (uint32_t held = 0; held < 5; held++)
            for (window = 128; window < JUMP_RING; window = 128 + 4 * window) hop(warm, held);
    window = 128;
}

/* Frames of all sizes, taken in order, finished in any, some held: none overlaps another, the order stays, and no more room is
 * missing than the largest frame and two granules; a quarter of the ring at most where all frames are equal. */
static void case_jump_at_random(void) {
    enum { MOST = 48, LARGEST = 513 * UP_GRANULE };
    uint64_t all_hops = 0;
    for (uint64_t seed = 1; seed <= 80; seed++) {
        up_ring base;
        member m;
        struct { uint64_t pos, need; int taken; } live[MOST];
        uint64_t s = mix(seed), n = 0, used = 0, jumps = 0, hops = 0, most = 1 + chance(&s, 4);
        up_ring *r = open_jumper(&m, &base);
        window = chance(&s, 3) ? 128 : chance(&s, JUMP_RING);
        for (int step = 0; step < 3000; step++) {
            uint32_t what = chance(&s, 3);
            if (what == 0 && n < MOST) {
                uint64_t need = UP_GRANULE * (2 + chance(&s, chance(&s, 8) ? 100 : 512)), head = up_position(r->c->head), pos;
                if (seed % 2) need = JUMP_NEED;
                int rc = place(&m, need, &pos);
                if (rc == UP_FULL) {
                    uint64_t lost = seed % 2 ? JUMP_RING / 4 - JUMP_NEED : LARGEST; /* of equal frames only what a jump left behind */
                    CHECK(in_use(r) + need + lost + 2 * UP_GRANULE > JUMP_RING, "no room for %llu", (unsigned long long)need);
                    continue;
                }
                jumps += r->c->jump_to == pos;
                hops += pos > head && r->c->jump_to != pos;
                for (uint64_t i = 0; i < n; i++) {
                    uint64_t apart = (pos - live[i].pos) & (JUMP_RING - 1);
                    CHECK(apart >= live[i].need && apart + need <= JUMP_RING, "two frames overlap");
                }
                live[n].pos = pos, live[n].need = need, live[n].taken = 0, n++, used += need;
            } else if (what == 1) {
                for (uint64_t i = 0; i < n; i++)
                    if (!live[i].taken) {
                        take_it(&m, live[i].pos, live[i].need), live[i].taken = 1;
                        break;
                    }
            } else if (n && (n > most || chance(&s, 4) == 0)) {
                uint64_t i = chance(&s, (uint32_t)(n < most ? n : most));
                if (!live[i].taken) continue;
                finish(&m, live[i].pos, UP_FINISHED);
                used -= live[i].need;
                memmove(&live[i], &live[i + 1], (--n - i) * sizeof *live);
            }
            CHECK(in_use(r) >= used && in_use(r) <= JUMP_RING, "bytes in use");
        }
        for (uint64_t i = 0; i < n; i++)
            if (!live[i].taken) take_it(&m, live[i].pos, live[i].need);
        for (uint64_t i = 0; i < n; i++) finish(&m, live[i].pos, UP_FINISHED);
        uint64_t pos;
        EQUAL(try_take(&m, &pos), UP_EMPTY);
        CHECK(jumps, "seed %llu: no jump", (unsigned long long)seed);
        all_hops += hops;
        close_jumper(&m, &base);
    }
    CHECK(all_hops > 100, "%llu hops", (unsigned long long)all_hops);
    window = 128;
}

/* A consumer that holds many and asks for one more before it ends the oldest: a jump keeps less than a quarter from it. */
static void case_slide(void) {
    uint64_t pos[64];
    for (uint64_t seed = 1; seed <= 60; seed++) {
        up_ring base;
        member m;
        uint64_t s = mix(seed), first = 0, next = 0, most = 1;
        open_jumper(&m, &base);
        window = 128ull << seed % 9;
        for (int step = 0; step < 3000; step++) {
            if (chance(&s, 20) == 0) most = 1 + chance(&s, chance(&s, 3) ? 4 : JUMP_FIT);
            if (next - first >= most) finish(&m, pos[first++ % 64], UP_FINISHED);
            if (next - first == JUMP_FIT || (next - first >= most && chance(&s, 2))) continue;
            int rc = place(&m, JUMP_NEED, &pos[next % 64]);
            if (rc == UP_OK) take_it(&m, pos[next % 64], JUMP_NEED), next++;
            else {
                CHECK(next - first > JUMP_FIT * 3 / 4, "%llu of %d are held", (unsigned long long)(next - first), JUMP_FIT);
                most = 1 + chance(&s, 4);
            }
        }
        while (first < next) finish(&m, pos[first++ % 64], UP_FINISHED);
        close_jumper(&m, &base);
    }
    window = 128;
}

/* Who claims dies before head moved: there was no jump, and nobody may rely on its gap later. */
static void case_jump_undone(void) {
    up_ring base;
    member m;
    uint64_t pos[60], at, n = 0;
    up_ring *r = open_jumper(&m, &base);
    for (int i = 0; i < 2; i++) {
        EQUAL(place(&m, JUMP_NEED, pos + i), UP_OK);
        take_it(&m, pos[i], JUMP_NEED);
    }
    finish(&m, pos[0], UP_FINISHED);
    at = pos[n++] = pos[1];
    pid_t parent = getpid(), pid = fork();
    if (!pid) {
        die_with(parent);
        lock(&m, r->c->producer_lock);
        CHECK(up_jump(r, JUMP_NEED), "it does not jump");
        raise(SIGKILL);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "child: %x", (unsigned)status);
    UP_ST(&r->c->mirror, UP_MIRROR_SINK); /* no other jump, so that head comes to where that one would have led */
    while (n < 40 && place(&m, JUMP_NEED, pos + n) == UP_OK) n++;
    EQUAL(n, JUMP_FIT);
    for (uint64_t i = 1; i < n; i++) take_it(&m, pos[i], JUMP_NEED);
    for (uint64_t i = 0; i < JUMP_NEED - UP_GRANULE; i++) EQUAL(up_payload(r, at)[i], (at / UP_GRANULE) & 0xff);
    for (uint64_t i = 0; i < n; i++) finish(&m, pos[i], UP_FINISHED);
    close_jumper(&m, &base);
}

/* Who dropped may have to put its frame elsewhere: with a policy, or a mirror, nothing jumps. */
static void case_no_jump(void) {
    for (int k = 0; k < 2; k++) {
        up_ring base;
        member m;
        uint64_t at, end = 0;
        up_ring *r = open_jumper(&m, &base);
        for (int i = 0; i < 40; i++) {
            if (i == 3) k ? UP_ST(&r->c->policy, UP_POLICY_DROP_OLDEST) : UP_ST(&r->c->mirror, UP_MIRROR_SINK);
            end = up_position(r->c->head);
            EQUAL(place(&m, JUMP_NEED, &at), UP_OK);
            if (i > 2) EQUAL(at, end);
            take_it(&m, at, JUMP_NEED);
            finish(&m, at, UP_FINISHED);
        }
        close_jumper(&m, &base);
    }
}

#endif
