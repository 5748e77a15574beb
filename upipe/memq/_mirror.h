/* The two copies of a queue over two nodes, at equal positions.
 *
 * Source copy (where producers write): only its mirror reads it. What was sent lies before `next` and stays COMMITTED, without an
 * owner: so no drop policy reaches it, no consumer takes it, and the death of the mirror changes nothing; whoever goes on sends
 * again from the position that the sink copy has. `tail` moves when the sink says how frames ended.
 * Sink copy (where consumers read): only its mirror writes it. Bytes are received behind `head`, where nobody looks, and exist once
 * `head` moved over whole frames.
 *
 * An epoch numbers the pair: each epoch has a sink copy of its own, that begins at the tail which the source copy has then. So the
 * far counts, which are those of that sink copy, begin at 0 with it.
 */
#ifndef UPIPE_MIRROR_H
#define UPIPE_MIRROR_H

#include "_members.h"

/* ------------------------------------------------------------------ source copy; the caller holds consumer_lock */

/* Tail books in which the sink copy has told nothing yet; tail and counts stay. */
static void up_forget_far(up_ring *r) {
    up_control *c = r->c;
    uint64_t word = UP_LD(&c->tail), new_ = (word & 1) ^ 1;
    const uint64_t *was = (const uint64_t *)&c->tail_books[word & 1];
    uint64_t *now = (uint64_t *)&c->tail_books[new_];
    for (size_t i = 0; i < sizeof(up_books) / 8; i++) UP_STR(&now[i], UP_LD(&was[i])); /* SYNC books */
    UP_STR(&c->tail_books[new_].far_dropped, 0);
    UP_STR(&c->tail_books[new_].far_dead, 0);
    UP_CRASH("forget far");
    UP_STR(&c->tail, up_position(word) | new_);
}

/* A frame that was given back is sent instead; its count stays raised. */
static uint64_t up_withdraw(up_ring *r, uint64_t pos, uint64_t word) {
    uint64_t now = up_word(UP_COMMITTED, 0, up_span(word));
    UP_ST(up_state_at(r, pos), now);
    UP_CRASH("withdraw");
    UP_ST(&r->c->redeliver, UP_LD(&r->c->redeliver) - 1);
    return now;
}

/* From here on only a mirror reads this queue. The same epoch again goes on where it was, unless consumers here read since.
 * UP_OK, or UP_STALE: nothing changed. A crash before the last store is repeated as a whole: nothing was retired in between. */
static int up_mirror_source(up_ring *r, uint64_t epoch) {
    up_control *c = r->c;
    uint64_t last = UP_LD(&c->mirror_epoch), next = UP_LD(&c->next), word;
    if (epoch < last || (epoch == last && UP_LD(&c->mirror) != UP_MIRROR_SOURCE)) return UP_STALE;
    if (epoch > last) up_forget_far(r);
    UP_CRASH("mirror");
    UP_ST(&c->mirror, UP_MIRROR_SOURCE);
    for (uint64_t at = up_position(UP_LD(&c->tail)); at < next; at = up_after(at, word, next)) { /* up_mirror_local died in it */
        word = UP_LD(up_state_at(r, at));
        if (up_kind(word) == UP_AVAILABLE) word = up_withdraw(r, at, word);
    }
    UP_CRASH("epoch");
    UP_ST(&c->mirror_epoch, epoch);
    return UP_OK;
}

/* The epoch is over, consumers here read this queue again: what was sent and not retired is given back, its delivery count as
 * it is. A crash before the last store leaves a source copy, some of it AVAILABLE, which sends as COMMITTED does. */
static void up_mirror_local(up_ring *r) {
    up_control *c = r->c;
    uint64_t next = UP_LD(&c->next), word;
    if (UP_LD(&c->mirror) != UP_MIRROR_SOURCE) return;
    for (uint64_t at = up_position(UP_LD(&c->tail)); at < next; at = up_after(at, word, next)) {
        word = UP_LD(up_state_at(r, at));
        if (up_kind(word) != UP_COMMITTED) continue;
        UP_ST(up_state_at(r, at), up_word(UP_AVAILABLE, 0, up_span(word)));
        UP_CRASH("hand back");
        UP_ST(&c->redeliver, UP_LD(&c->redeliver) + 1);
    }
    UP_CRASH("local");
    UP_ST(&c->mirror, UP_MIRROR_NONE);
}

static inline int up_is_over(uint64_t word) { return up_kind(word) >= UP_FINISHED && up_kind(word) <= UP_GAP; }

/* 1 when a frame starts at `pos`, or the ring ends there: what another node says of positions is proved before it is used. */
static int up_is_boundary(up_ring *r, uint64_t pos) {
    uint64_t head = up_refresh_head(r), at = up_position(UP_LD(&r->c->tail)), word;
    if (pos < at) return (pos & (UP_GRANULE - 1)) == 0;
    while (at < pos && at < head) {
        word = UP_LDA(up_state_at(r, at));
        at = up_after(at, word, head);
    }
    return at == pos;
}

/* The run that begins at `cursor` (a boundary) and ends after `most` bytes or a little more: UP_OK, frames to send, which stay where
 * they are from now on; UP_END, a hole: nothing of it will ever be read. UP_EMPTY: somebody still writes there, or holds it.
 * SYNC commit */
static int up_outgoing(up_ring *r, uint64_t cursor, uint64_t most, uint64_t *end, uint64_t *frames) {
    up_control *c = r->c;
    uint64_t head = up_refresh_head(r), at = cursor, word;
    int hole = 0;
    *frames = 0;
    *end = up_position(UP_LD(&c->tail));
    if (cursor < *end) return UP_END;
    for (; at < head && at - cursor < most; at += up_span(word), *frames += 1) {
        word = UP_LDA(up_state_at(r, at));
        if (up_kind(word) == UP_AVAILABLE) word = up_withdraw(r, at, word); /* by a consumer of the time before the mirror */
        if (!up_span(word) || (up_kind(word) != UP_COMMITTED && !up_is_over(word))) break;
        if (at == cursor) hole = up_is_over(word);
        else if (hole != up_is_over(word)) break;
    }
    if (at == cursor) return UP_EMPTY;
    UP_CRASH("send");
    if (at > UP_LD(&c->next)) UP_STR(&c->next, at);
    *end = at;
    if (hole) up_advance(r);
    return hole ? UP_END : UP_OK;
}

/* The sink copy is finished up to `pos`; since it began, so many of its frames were dropped there, so many died, the others were
 * finished. Tail and books follow. UP_OK (also when tail was there before), or UP_MALFORMED: that cannot be, nothing changed. */
static int up_retire(up_ring *r, uint64_t pos, uint64_t dropped, uint64_t dead) {
    up_control *c = r->c;
    uint64_t tail = UP_LD(&c->tail), new_ = (tail & 1) ^ 1, at = up_position(tail), sent = 0, ended[16] = {0}, gaps = 0, word;
    up_books *was = &c->tail_books[tail & 1], *now = &c->tail_books[new_];
    if (pos <= at) return UP_OK;
    if (pos > UP_LD(&c->next)) return UP_MALFORMED;
    for (; at < pos; at += up_span(word)) {
        word = UP_LD(up_state_at(r, at));
        if (!up_span(word) || (up_kind(word) != UP_COMMITTED && !up_is_over(word))) return UP_MALFORMED;
        sent += up_kind(word) == UP_COMMITTED;
        ended[up_kind(word)] += up_kind(word) != UP_COMMITTED;
        gaps += up_kind(word) == UP_GAP ? up_span(word) : 0;
    }
    uint64_t more_dropped = dropped - UP_LD(&was->far_dropped), more_dead = dead - UP_LD(&was->far_dead);
    if (at != pos || more_dropped > sent || more_dead > sent - more_dropped) return UP_MALFORMED;
    uint64_t passed = sent + ended[UP_FINISHED] + ended[UP_DROPPED] + ended[UP_DEAD] + ended[UP_ABORTED];
    UP_STR(&now->frames, UP_LD(&was->frames) + passed); /* SYNC books */
    UP_STR(&now->bytes, UP_LD(&was->bytes) + (pos - up_position(tail) - gaps));
    UP_STR(&now->finished, UP_LD(&was->finished) + ended[UP_FINISHED] + sent - more_dropped - more_dead);
    UP_STR(&now->dropped, UP_LD(&was->dropped) + ended[UP_DROPPED] + more_dropped);
    UP_STR(&now->dead, UP_LD(&was->dead) + ended[UP_DEAD] + more_dead);
    UP_STR(&now->aborted, UP_LD(&was->aborted) + ended[UP_ABORTED]);
    UP_STR(&now->far_dropped, dropped);
    UP_STR(&now->far_dead, dead);
    UP_CRASH("retire");
    UP_STR(&c->tail, pos | new_); /* SYNC tail */
    UP_CRASH("retired");
    up_advance(r);
    return UP_OK;
}

/* ------------------------------------------------------------------ sink copy */

/* This queue is the sink copy of that epoch; the caller holds consumer_lock. UP_OK, or UP_STALE. */
static int up_mirror_sink(up_ring *r, uint64_t epoch) {
    if (epoch < UP_LD(&r->c->mirror_epoch)) return UP_STALE;
    UP_ST(&r->c->mirror_epoch, epoch);
    UP_CRASH("sink");
    UP_ST(&r->c->mirror, UP_MIRROR_SINK);
    return UP_OK;
}

/* Bytes that can be received behind head. */
static inline uint64_t up_landing_room(up_ring *r) { return r->capacity - (up_position(UP_LD(&r->c->head)) - up_refresh_tail(r)); }

/* A header that came from another node and says that it starts at `pos`: its ring bytes, 0 when it is none. */
static inline uint64_t up_landed_span(up_ring *r, uint64_t pos) {
    const up_frame *f = up_frame_at(r, pos);
    if (f->magic != UP_FRAME_MAGIC || f->version != UP_VERSION || f->position != pos || f->size > r->capacity) return 0;
    if (f->flags & UP_FLAG_INLINE && f->size > 8) return 0;
    uint64_t need = up_need(f->size, f->flags);
    return need <= r->capacity ? need : 0;
}

/* `landed` bytes were received behind head: the whole frames among them exist from here on; *published are their bytes, *frames
 * their number. The caller holds producer_lock. UP_OK, or UP_MALFORMED: head did not move.
 * A frame's CRC is checked by who reads it, as everywhere. */
static int up_publish_landed(up_ring *r, uint64_t landed, uint64_t *published, uint64_t *frames) {
    uint64_t head = up_position(UP_LD(&r->c->head)), at = head, end = head + landed, last = head, bytes = 0, span;
    *published = *frames = 0;
    if (landed > up_landing_room(r)) return UP_MALFORMED;
    for (; at + UP_GRANULE <= end; at += span) {
        if (!(span = up_landed_span(r, at))) return UP_MALFORMED;
        if (at + span > end) break;
        UP_ST(up_state_at(r, at), up_word(UP_COMMITTED, 0, span));
        bytes += up_frame_at(r, at)->size;
        last = at;
        *frames += 1;
    }
    if (!*frames) return UP_OK;
    UP_CRASH("land");
    UP_ST(&r->c->last, last);
    up_move_head(r, *published = at - head, 0, *frames, bytes, 0);
    return UP_OK;
}

/* A hole of the source copy is padding here. The caller holds producer_lock; up_peek passes it. */
static int up_publish_hole(up_ring *r, uint64_t span) {
    if (!span || span % UP_GRANULE || span > up_landing_room(r)) return UP_MALFORMED;
    uint64_t head = up_position(UP_LD(&r->c->head));
    UP_ST(up_state_at(r, head), up_word(UP_ABORTED, 0, span));
    UP_CRASH("hole");
    UP_ST(&r->c->last, head);
    up_move_head(r, span, 0, 1, 0, 0);
    return UP_OK;
}

/* What a drop policy makes of frames that arrived: all of them go (discard), or all but the newest (latest). */
static void up_drop_arrived(up_ring *r) { /* the caller holds consumer_lock */
    uint64_t at, span, keep = r->c->policy == UP_POLICY_LATEST ? UP_LD(&r->c->last) : UINT64_MAX;
    while (up_peek(r, &at, &span) == UP_OK && at != keep) {
        UP_ST(up_state_at(r, at), up_word(UP_DROPPED, 0, span));
        UP_CRASH("drop arrived");
        UP_STR(&r->c->next, at + span);
        up_advance(r);
    }
}

#endif
