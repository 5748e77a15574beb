/* Drop policies: how a newcomer without room gets it. The caller holds both ends' locks, producer_lock taken first: here
 * and nowhere else are the two nested.
 *
 *     BLOCK         nothing is dropped
 *     DROP_OLDEST   what waits goes, oldest first, until the newcomer fits
 *     LATEST        all that waits goes
 *     DISCARD       nobody will read: all that waits goes (and who puts counts the newcomer as refused without asking)
 *
 * Dropping at the front frees nothing while a held frame pins tail. Then the newest frame goes, if nobody took it: head moves
 * back over it (up_retract), and the newcomer is claimed like any other. The one place where head moves back: everything
 * that relies on head only growing must bear it.
 *   - Who looks at frames up to head holds consumer_lock, and cached_head is mended before that is free again.
 *   - A position is never delivered twice, since only what nobody took goes.
 *   - A state word beyond head is nobody's: the next claim writes it before head passes.
 */
#ifndef UPIPE_POLICIES_H
#define UPIPE_POLICIES_H

#include "_consumers.h"

/* 1 when a frame of `need` bytes would not be let in. */
static int up_crowded(up_ring *r, uint64_t need) {
    up_control *c = r->c;
    up_books claimed;
    uint64_t head, word = UP_LD(&c->tail);
    up_books_read(&c->head, c->head_books, &head, &claimed);
    return head + need > up_limit(r, head, up_position(word)) ||
           (c->max_frames && claimed.frames - UP_LD(&c->tail_books[word & 1].frames) >= c->max_frames);
}

/* The next frame is dropped: its state word says so before `next` passes it, and the repair undoes one without the other. */
static void up_drop_next(up_ring *r, uint64_t pos, uint64_t span) {
    UP_ST(up_state_at(r, pos), up_word(UP_DROPPED, 0, span));
    UP_CRASH("drop");
    UP_STR(&r->c->next, pos + span);
    UP_CRASH("dropped");
    up_advance(r);
}

/* Drop committed frames nobody took, oldest first: until `need` bytes fit, or all of them. While a held frame pins tail,
 * dropping some frees nothing: then it drops none. consumer_lock is enough. */
static void up_drop(up_ring *r, uint64_t need, int all) {
    uint64_t pos, span;
    while (up_peek(r, &pos, &span) == UP_OK && (all || (up_position(UP_LD(&r->c->tail)) == pos && up_crowded(r, need))))
        up_drop_next(r, pos, span);
}

/* The newest frame's producer has it in its count of claims, which is true only below head (up_claimed). It stays so when
 * head moves back to `pos`: a frame that was put and dropped was put. */
static void up_keep_claim(up_ring *r, uint64_t pos) {
    uint32_t id = up_frame_at(r, pos)->producer;
    for (uint32_t k = 0; id < UP_PRODUCERS && k < 2; k++) {
        up_claims *claims = &r->producers[id].claims[k];
        if (UP_LD(&claims->position) == pos) UP_STR(&claims->position, pos - 1);
    }
}

/* Drop the newest frame if nobody took it and the newcomer then fits. UP_OK: there is room; the frame counts as refused.
 * Commit point: the store to head, which carries the count with it (up_move_head). Before it the frame is there, after it
 * it is dropped and counted; a stale cached_head goes in up_repair_consumer, since who dies here holds that lock as well. */
static int up_retract(up_ring *r, uint64_t need) {
    up_control *c = r->c;
    uint64_t head = up_refresh_head(r), tail = up_position(UP_LD(&c->tail)), last = UP_LD(&c->last), pos, span;
    if (last >= head || last < UP_LD(&c->next) || last <= tail || last + need - tail > r->capacity) return UP_FULL;
    uint64_t word = UP_LDA(up_state_at(r, last)); /* SYNC commit */
    if (up_kind(word) != UP_COMMITTED || last + up_span(word) != head) return UP_FULL;
    while (UP_LD(&c->policy) == UP_POLICY_LATEST && up_peek(r, &pos, &span) == UP_OK && pos != last)
        up_drop_next(r, pos, span);
    UP_CRASH("replace");
    up_keep_claim(r, last);
    UP_CRASH("retract");
    up_move_head(r, -up_span(word), 0, (uint64_t)-1, 0, 1);
    c->cached_head = last;
    return UP_OK;
}

/* Room for a newcomer of `need` bytes, as the policy makes it. UP_OK: claim it before producer_lock is let go of.
 * UP_FULL: wait. UP_REFUSED: the newcomer itself is to be dropped, which the caller counts. */
static int up_make_room(up_ring *r, uint64_t need) {
    uint32_t policy = UP_LD(&r->c->policy);
    uint64_t pos, span;
    if (policy == UP_POLICY_BLOCK) (void)up_peek(r, &pos, &span); /* passes padding that no consumer is there to pass */
    else if (up_room(r, need, 1) != UP_OK) up_drop(r, need, policy == UP_POLICY_DISCARD);
    int room = up_room(r, need, 1) == UP_OK;
    if (room && policy >= UP_POLICY_LATEST) up_drop(r, need, 1);
    if (room || policy == UP_POLICY_BLOCK) return room ? UP_OK : UP_FULL;
    return policy != UP_POLICY_DISCARD && up_retract(r, need) == UP_OK ? UP_OK : UP_REFUSED;
}

#endif
