/* Two copies of a queue in one mapping each, and a mirror between them that is killed at named points and goes on by position.
 *
 * The child produces, sends, receives, consumes and retires; it dies; the parent recovers its slots and goes on with the same
 * play from whatever the rings say. At the end every frame was seen, twice only when its reader was killed in between, and the books of
 * both copies balance alike.
 */
#ifndef RING_MIRROR_H
#define RING_MIRROR_H

#include "ring_cases.h"
#include "ring_crash.h"

enum { PLAY_NUMBERS = 120, PLAY_EPOCH = 1 };

typedef struct both { /* shared with the child */
    up_ring source, sink;
    _Atomic uint32_t seen[PLAY_NUMBERS], kills;
} both;

static int mirror_call(member *m, int (*call)(up_ring *, uint64_t), uint64_t epoch) {
    lock(m, m->r.c->consumer_lock);
    int rc = call(&m->r, epoch);
    unlock(m->r.c->consumer_lock);
    return rc;
}

/* Send what the sink has not, in runs of at most `most` bytes. */
static void play_send(member *a, member *b, uint64_t most) {
    uint64_t at = up_position(UP_LDA(&b->r.c->head)), end, frames, published;
    lock(a, a->r.c->consumer_lock);
    CHECK(up_is_boundary(&a->r, at), "the sink's head is no boundary");
    int rc = up_outgoing(&a->r, at, most, &end, &frames);
    unlock(a->r.c->consumer_lock);
    if (rc == UP_EMPTY) return;
    lock(b, b->r.c->producer_lock);
    if (rc == UP_OK) {
        memcpy(up_frame_at(&b->r, at), up_frame_at(&a->r, at), end - at);
        EQUAL(up_publish_landed(&b->r, end - at, &published, &frames), UP_OK);
        EQUAL(published, end - at);
    } else {
        EQUAL(up_publish_hole(&b->r, end - at), UP_OK);
    }
    unlock(b->r.c->producer_lock);
    if (b->r.c->policy != UP_POLICY_LATEST) return;
    lock(b, b->r.c->consumer_lock);
    up_drop_arrived(&b->r);
    unlock(b->r.c->consumer_lock);
}

static void play_consume(both *s, member *b) {
    uint64_t pos, number;
    uint32_t id;
    up_frame f;
    if (try_take(b, &pos) != UP_OK) return;
    read_frame(b, pos, &f, &id, &number);
    if (atomic_fetch_add(&s->seen[number], 1)) CHECK(f.deliveries > 1, "frame %llu came twice", (unsigned long long)number);
    finish(b, pos, number % 7 == 3 ? UP_DEAD : UP_FINISHED);
}

static void play_retire(member *a, member *b) {
    up_books books;
    uint64_t pos;
    up_books_read(&b->r.c->tail, b->r.c->tail_books, &pos, &books);
    lock(a, a->r.c->consumer_lock);
    EQUAL(up_retire(&a->r, pos, books.dropped, books.dead), UP_OK);
    unlock(a->r.c->consumer_lock);
}

/* Goes on from whatever the rings say. Ends when every number was put, sent, read and retired. */
static void play(both *s, uint64_t seed) {
    member *a = calloc(1, sizeof *a), *b = calloc(1, sizeof *b);
    join(a, &s->source, seed, 300), join(b, &s->sink, seed + 1, 300);
    EQUAL(mirror_call(a, up_mirror_source, PLAY_EPOCH), UP_OK);
    EQUAL(mirror_call(b, up_mirror_sink, PLAY_EPOCH), UP_OK);
    EQUAL(mirror_call(a, up_mirror_source, PLAY_EPOCH - 1), UP_STALE);
    CHECK(up_use_producer(&a->r, 0, 0) == UP_OK, "producer");
    uint64_t number = up_emitted(&a->r, 0);
    for (;;) {
        up_meta meta;
        uint64_t dice = chance(&a->seed, 10);
        make_frame(&meta, a->payload, 0, number, 300);
        if (number < PLAY_NUMBERS && dice < 4 && try_put(a, &meta, 0) == UP_OK) number++;
        if (dice == 4) (void)try_put(a, &(up_meta){.size = 100}, 1);
        if (dice == 5 && chance(&a->seed, 4) == 0) {
            lock(a, a->r.c->consumer_lock);
            up_mirror_local(&a->r);
            UP_ST(&a->r.c->mirror, UP_MIRROR_SOURCE); /* as if it had died before its last store */
            EQUAL(up_mirror_source(&a->r, PLAY_EPOCH), UP_OK);
            unlock(a->r.c->consumer_lock);
        }
        if (dice > 5) play_send(a, b, 64 + chance(&a->seed, 1500));
        play_consume(s, b);
        if (dice & 1) play_retire(a, b);
        uint64_t head = up_position(UP_LD(&a->r.c->head));
        if (number == PLAY_NUMBERS && up_position(UP_LD(&a->r.c->tail)) == head && up_position(UP_LD(&b->r.c->tail)) == head) break;
    }
    leave(a), leave(b);
    free(a), free(b);
}

static void mend(const up_ring *base) {
    member *m = calloc(1, sizeof *m);
    size_t found;
    join(m, base, 1, 300);
    for (uint32_t i = 0; i < 8; i++)
        if (i != m->r.slot) CHECK(up_recover(&m->r, i, 0, NULL, 0, &found, NULL, 0) == UP_OK, "recover");
    leave(m);
    free(m);
}

static int run_play(uint64_t seed, uint64_t start, uint32_t policy) {
    both *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(s != MAP_FAILED, "scene");
    int fd[2] = {make_ring_at(&s->source, 4096, UP_POLICY_BLOCK, 0, start), make_ring_at(&s->sink, 4096, policy, 0, start)}, status = 1;
    CHECK(up_set_producer(&s->source, 0, UP_PRODUCER_DECLARED, 0) == UP_OK, "declare");
    CHECK(up_set_producer(&s->sink, 0, UP_PRODUCER_DECLARED, 0) == UP_OK, "declare");
    while (status) {
        fflush(NULL);
        pid_t pid = fork();
        if (pid == 0) {
            armed(seed, 7);
            play(s, seed);
            _exit(0);
        }
        CHECK(waitpid(pid, &status, 0) == pid, "wait");
        CHECK(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL), "the mirror ended with %x", (unsigned)status);
        sweep(pid);
        mend(&s->source), mend(&s->sink);
        s->kills += status != 0;
        seed = mix(seed);
    }
    uint64_t at, end;
    up_books a, b;
    up_books_read(&s->source.c->tail, s->source.c->tail_books, &at, &a);
    up_books_read(&s->sink.c->tail, s->sink.c->tail_books, &end, &b);
    EQUAL(at, up_position(s->source.c->head)), EQUAL(at, up_position(s->sink.c->head)), EQUAL(at, end);
    EQUAL(a.finished, b.finished), EQUAL(a.dead, b.dead), EQUAL(a.dropped, b.dropped);
    EQUAL(a.frames, a.finished + a.dropped + a.dead + a.aborted), EQUAL(b.frames, b.finished + b.dropped + b.dead + b.aborted);
    EQUAL(a.finished + a.dropped + a.dead, PLAY_NUMBERS), EQUAL(a.far_dead, b.dead), EQUAL(a.far_dropped, b.dropped);
    EQUAL(a.bytes, at - start), EQUAL(b.bytes, at - start);
    EQUAL(up_emitted(&s->source, 0), PLAY_NUMBERS);
    for (int i = 0; i < PLAY_NUMBERS; i++) CHECK(s->seen[i] >= 1 || policy, "frame %d is lost", i);
    int kills = (int)s->kills;
    up_unmap(&s->source), up_unmap(&s->sink);
    close(fd[0]), close(fd[1]);
    munmap(s, sizeof *s);
    return kills;
}

/* One small story each. */

static void case_mirror_refuses(void) { /* what another node says is proved first, and changes nothing when it is wrong */
    pair *p = open_pair(UP_POLICY_BLOCK), *q = open_pair(UP_POLICY_BLOCK);
    uint64_t end, frames, published, pos;
    for (uint64_t i = 0; i < 4; i++) (void)put(&p->a, i);
    EQUAL(mirror_call(&p->b, up_mirror_source, 3), UP_OK);
    EQUAL(mirror_call(&p->b, up_mirror_source, 2), UP_STALE);
    EQUAL(try_take(&p->a, &pos), UP_EMPTY);
    EQUAL(up_retire(&p->b.r, 64, 0, 0), UP_MALFORMED); /* never sent */
    EQUAL(up_outgoing(&p->b.r, 0, 128, &end, &frames), UP_OK);
    EQUAL(end, 128), EQUAL(frames, 2);
    EQUAL(up_retire(&p->b.r, 96, 0, 0), UP_MALFORMED);  /* no boundary */
    EQUAL(up_retire(&p->b.r, 128, 2, 1), UP_MALFORMED); /* more than there were */
    EQUAL(up_is_boundary(&p->b.r, 96), 0), EQUAL(up_is_boundary(&p->b.r, 320), 0), EQUAL(up_is_boundary(&p->b.r, 256), 1);
    up_ring *r = &q->b.r;
    static const uint8_t flip[] = {6, 8, 31, 32}; /* magic, version, size, position */
    for (size_t i = 0; i < sizeof flip; i++) {
        memcpy(up_frame_at(r, 0), up_frame_at(&p->b.r, 0), 256);
        ((uint8_t *)up_frame_at(r, 64))[flip[i]] ^= 1;
        EQUAL(up_publish_landed(r, 256, &published, &frames), UP_MALFORMED);
        EQUAL(UP_LD(&r->c->head), 0);
    }
    EQUAL(up_publish_landed(r, 4096 + 64, &published, &frames), UP_MALFORMED);
    EQUAL(up_publish_hole(r, 4096 + 64), UP_MALFORMED), EQUAL(up_publish_hole(r, 65), UP_MALFORMED);
    memcpy(up_frame_at(r, 0), up_frame_at(&p->b.r, 0), 256);
    EQUAL(up_publish_landed(r, 255, &published, &frames), UP_OK); /* the last is not whole */
    EQUAL(published, 192), EQUAL(frames, 3);
    EQUAL(up_retire(&p->b.r, 128, 1, 1), UP_OK);
    EQUAL(up_retire(&p->b.r, 64, 0, 0), UP_OK); /* old news */
    EQUAL(mirror_call(&p->b, up_mirror_source, 4), UP_OK); /* a new sink copy counts from 0 */
    EQUAL(up_outgoing(&p->b.r, 128, 4096, &end, &frames), UP_OK);
    EQUAL(up_retire(&p->b.r, 256, 0, 1), UP_OK);
    totals t = check_at_rest(&p->base);
    EQUAL(t.dropped, 1), EQUAL(t.dead, 2), EQUAL(t.finished, 1);
    close_pair(p), close_pair(q);
}

/* Sent frames are out of reach of drop policies; dropped ones are a hole, also when the sink never saw what was before it. */
static void case_mirror_drops(void) {
    pair *p = open_pair(UP_POLICY_LATEST);
    uint64_t end, frames, pos;
    EQUAL(mirror_call(&p->b, up_mirror_source, 1), UP_OK);
    (void)put(&p->a, 0);
    EQUAL(up_outgoing(&p->b.r, 0, 4096, &end, &frames), UP_OK);
    (void)put(&p->a, 1), (void)put(&p->a, 2); /* drops 1, cannot drop 0 */
    EQUAL(up_outgoing(&p->b.r, 64, 4096, &end, &frames), UP_END);
    EQUAL(end, 128);
    EQUAL(up_outgoing(&p->b.r, 128, 4096, &end, &frames), UP_OK);
    EQUAL(end, 192), EQUAL(frames, 1);
    EQUAL(up_retire(&p->b.r, 64, 0, 0), UP_OK);
    EQUAL(up_position(p->base.c->tail), 128); /* the hole is passed with what was before it */
    EQUAL(up_outgoing(&p->b.r, 64, 4096, &end, &frames), UP_END);
    lock(&p->b, p->base.c->consumer_lock);
    up_mirror_local(&p->b.r);
    unlock(p->base.c->consumer_lock);
    EQUAL(mirror_call(&p->b, up_mirror_source, 1), UP_STALE);
    EQUAL(try_take(&p->b, &pos), UP_OK);
    EQUAL(pos, 128), EQUAL(up_frame_at(&p->base, 128)->deliveries, 1);
    finish(&p->b, pos, UP_FINISHED);
    totals t = check_at_rest(&p->base);
    EQUAL(t.dropped, 1), EQUAL(t.finished, 2);
    close_pair(p);
}

/* Consumers of the time before the mirror end what they hold; what they give back is sent, with its count. */
static void case_mirror_after_readers(void) {
    pair *p = open_pair(UP_POLICY_BLOCK);
    uint64_t end, frames, pos[3];
    for (uint64_t i = 0; i < 4; i++) (void)put(&p->a, i);
    for (int i = 0; i < 3; i++) EQUAL(try_take(&p->a, &pos[i]), UP_OK);
    give_back(&p->a, pos[0]);
    EQUAL(mirror_call(&p->b, up_mirror_source, 1), UP_OK);
    EQUAL(up_outgoing(&p->b.r, 0, 4096, &end, &frames), UP_OK);
    EQUAL(end, 64), EQUAL(p->base.c->redeliver, 0);
    EQUAL(up_outgoing(&p->b.r, 64, 4096, &end, &frames), UP_EMPTY); /* held */
    finish(&p->a, pos[1], UP_FINISHED), give_back(&p->a, pos[2]);
    EQUAL(up_outgoing(&p->b.r, 64, 4096, &end, &frames), UP_END);
    EQUAL(end, 128);
    EQUAL(up_outgoing(&p->b.r, 128, 4096, &end, &frames), UP_OK);
    EQUAL(end, 256);
    EQUAL(up_retire(&p->b.r, 256, 0, 0), UP_OK);
    totals t = check_at_rest(&p->base);
    EQUAL(t.finished, 4);
    close_pair(p);
}

#endif
