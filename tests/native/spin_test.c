/* How long an end of a queue spins (_spin.h), in simulated time: waits of known lengths, pauses of known lengths.
 *
 *   spin_test      one small story each
 *   tests/native/test_native.py builds and runs it; by hand: gcc -std=c11 -O2 tests/native/spin_test.c
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#include "../../upipe/memq/_spin.h"

#define CHECK(ok) ((ok) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok), abort()))

static int64_t now, pause_ns, wake_ns; /* wake_ns: from the frame until a sleeper runs */
static int64_t spun, hits, slept;      /* ns spent in spins; waits that ended in one, or in a sleep */
static int64_t away, yields;           /* ns that a yield takes; how many there were */

static void begin(up_spinning *s, int64_t pause, int64_t wake) {
    up_spinning_begin(s);
    pause_ns = pause, wake_ns = wake;
    now = 1000000000, spun = hits = slept = 0;
}

/* A consumer waits for a frame that comes after `ns`; somebody takes the CPU for `taken` ns of a spin that is not short. */
static void wait_for(up_spinning *s, int64_t ns, int64_t taken) {
    int64_t most = s->length * pause_ns;
    int timed = s->length >= UP_SPIN_SHORT, hit = ns <= most || (timed && taken);
    int64_t took = timed && taken ? taken : hit ? ns : most;
    now += took, spun += took;
    up_spinning_spun(s, hit, timed ? took : 0, timed ? now : 0);
    if (hit) {
        hits++;
        return;
    }
    int64_t asleep = ns - took + wake_ns;
    now += asleep, slept++;
    up_spinning_slept(s, asleep, now);
}

static void answers_that_come_soon_are_spun_for(void) {
    for (int64_t ns = 1000; ns <= 55000; ns += 3000) {
        up_spinning s;
        begin(&s, 57, 25000);
        for (int i = 0; i < 40; i++) wait_for(&s, ns, 0);
        hits = slept = 0;
        for (int i = 0; i < 1000; i++) wait_for(&s, i % 20 ? ns : 4 * ns, 0); /* now and then one is late */
        CHECK(hits > 800);
    }
}

static void what_comes_late_is_slept_for(void) {
    up_spinning s;
    begin(&s, 57, 25000);
    for (int i = 0; i < 1000; i++) wait_for(&s, 1000000, 0);
    CHECK(s.length == UP_SPIN_MIN && hits == 0);
    CHECK(spun < now / 500);
}

static void spins_in_vain_become_rare(void) {
    up_spinning s;
    begin(&s, 10, 20000); /* a pause so short that no spin lasts as long as a brief sleep */
    for (int i = 0; i < 100000; i++) wait_for(&s, 60000, 0);
    CHECK(hits == 0 && s.tries == UP_TRIES_MAX);
    CHECK(spun < now / 100);
    for (int i = 0; i < 2 * UP_TRIES_MAX; i++) wait_for(&s, 15000, 0);
    hits = slept = 0;
    for (int i = 0; i < 100; i++) wait_for(&s, 15000, 0);
    CHECK(hits == 100); /* and yet it learns */
    CHECK(s.tries == UP_TRIES_MIN);
}

static void where_somebody_else_needs_the_cpu_nobody_spins_long(void) {
    up_spinning s;
    int64_t lost = 0;
    begin(&s, 57, 25000);
    for (int i = 0; i < 100000; i++) {
        int64_t before = spun;
        wait_for(&s, 30000, i % 75 == 0 && s.length >= UP_SPIN_LONG ? 3000000 : 0);
        if (spun - before > 1000000) lost += spun - before;
    }
    CHECK(s.rest.ns == UP_REST_MAX_NS);
    CHECK(lost < now / 50);
    int64_t until = s.rest.until;
    for (int i = 0; now < until; i++) wait_for(&s, 30000, 0);
    for (int i = 0; i < 10; i++) wait_for(&s, 30000, 0);
    hits = slept = 0;
    for (int i = 0; i < 1000000; i++) wait_for(&s, 30000, 0);
    CHECK(hits == 1000000); /* there is room again */
    wait_for(&s, 30000, 3000000);
    CHECK(s.rest.ns == UP_REST_MIN_NS); /* and one interruption after a long time counts little */
}

static int give_way(up_rest *s) { /* as Sleeper._give_way */
    int64_t began = now;
    if (!up_may_give_way(s, began)) return 0;
    yields++, now += away;
    up_gave_way(s, now - began, now);
    return 1;
}

static void who_shares_the_cpu_gives_way(void) {
    up_rest s = {0, 0};
    now = 1000000000;
    yields = 0, away = 300;
    for (int i = 0; i < 1000; i++) CHECK(give_way(&s)); /* in vain or not: it costs nobody anything */
    away = UP_YIELDED_NS;
    for (int i = 0; i < 1000; i++) CHECK(give_way(&s));
    CHECK(yields == 2000 && s.ns == 0);
}

static void but_not_where_somebody_else_takes_it(void) {
    up_rest s = {0, 0};
    int64_t began, lost = 0;
    now = 1000000000;
    yields = 0, away = 3000000, began = now;
    for (int i = 0; i < 1000000; i++, now += 50000) lost += give_way(&s) ? away : 0;
    CHECK(s.ns == UP_REST_MAX_NS && yields < 70);
    CHECK(lost < (now - began) / 200);
    CHECK(!give_way(&s));
    now += 20 * UP_REST_MAX_NS, away = 300;
    CHECK(give_way(&s) && give_way(&s));
    away = UP_YIELDED_NS + 1;
    CHECK(give_way(&s) && !give_way(&s));
    CHECK(s.ns == UP_REST_MIN_NS);
}

static int64_t spin_room(uint64_t head, uint64_t tail, uint64_t need) { /* ns, of the quickest of many: others may run between */
    up_control c = {.head = head, .tail = tail};
    up_ring r = {.c = &c, .capacity = 1 << 20};
    int64_t best = INT64_MAX;
    for (int i = 0; i < 200; i++) {
        int64_t began = (int64_t)up_now_ns(CLOCK_MONOTONIC);
        up_spin_room(&r, need);
        int64_t took = (int64_t)up_now_ns(CLOCK_MONOTONIC) - began;
        if (took < best) best = took;
    }
    return best;
}

static void in_a_full_ring_a_producer_waits_for_room_for_some_frames(void) {
    uint64_t full = 5 << 20, tail = full - (1 << 20);
    int64_t in_vain = spin_room(full | 1, tail + 64, 64); /* the words' low bits select books */
    CHECK(in_vain < 100000);                              /* and then it goes on */
    CHECK(spin_room(full, tail + UP_SPIN_ROOM, 64) < in_vain / 10);
    CHECK(spin_room(full, (tail + UP_SPIN_ROOM) | 1, 64) < in_vain / 10);
    CHECK(spin_room(full, tail + UP_SPIN_ROOM - 64, 64) > in_vain / 2);
    CHECK(spin_room(full, tail + UP_SPIN_ROOM, 2 * UP_SPIN_ROOM) > in_vain / 2);
    CHECK(spin_room(64, 0, 64) < in_vain / 10); /* of a ring that is full by its number of frames */
}

int main(void) {
    answers_that_come_soon_are_spun_for();
    what_comes_late_is_slept_for();
    spins_in_vain_become_rare();
    where_somebody_else_needs_the_cpu_nobody_spins_long();
    who_shares_the_cpu_gives_way();
    but_not_where_somebody_else_takes_it();
    in_a_full_ring_a_producer_waits_for_room_for_some_frames();
    return 0;
}
