/* The consumers' end. The caller holds consumer_lock, except for up_ended. */
#ifndef UPIPE_CONSUMERS_H
#define UPIPE_CONSUMERS_H

#include "_producers.h"

static inline uint64_t up_refresh_head(up_ring *r) { /* SYNC head */
    up_control *c = r->c;
    uint64_t head = UP_LDA(&c->head);
    c->cached_head = up_position(head);
    const up_books *claimed = &c->head_books[head & 1], *passed = &c->tail_books[UP_LD(&c->tail) & 1];
    uint64_t depth = up_in_use(r, c->cached_head, claimed, passed); /* a claim meanwhile may have torn it: then none is noted */
    if (depth > UP_LD(&c->max_depth) && depth <= r->capacity) UP_ST(&c->max_depth, depth);
    return c->cached_head;
}

/* Move tail over everything that ended, counting how. Idempotent, so a crash inside is repaired by calling it again. */
UP_HOT static inline int up_advance(up_ring *r) {
    up_control *c = r->c;
    uint64_t word = UP_LD(&c->tail), old = word & 1, new_ = old ^ 1, next = UP_LD(&c->next);
    uint64_t from = up_position(word), pos = from, gaps = 0;
    uint64_t ended[UP_GAP + 1] = {0};
    while (pos < next) {
        uint64_t state = UP_LDA(up_state_at(r, pos));
        uint32_t kind = up_kind(state);
        if (kind < UP_FINISHED || kind > UP_GAP || !up_span(state)) break;
        ended[kind]++;
        gaps += kind == UP_GAP ? up_span(state) : 0;
        pos += up_span(state);
    }
    if (pos == from) return 0;
    up_books *was = &c->tail_books[old], *now = &c->tail_books[new_]; /* SYNC books */
    UP_STR(&now->finished, UP_LD(&was->finished) + ended[UP_FINISHED]);
    UP_STR(&now->dropped, UP_LD(&was->dropped) + ended[UP_DROPPED]);
    UP_STR(&now->dead, UP_LD(&was->dead) + ended[UP_DEAD]);
    UP_STR(&now->aborted, UP_LD(&was->aborted) + ended[UP_ABORTED]);
    UP_STR(&now->frames, UP_LD(&was->frames) + ended[UP_FINISHED] + ended[UP_DROPPED] + ended[UP_DEAD] + ended[UP_ABORTED]);
    UP_STR(&now->bytes, UP_LD(&was->bytes) + (pos - from - gaps));
    UP_STR(&now->far_dropped, UP_LD(&was->far_dropped));
    UP_STR(&now->far_dead, UP_LD(&was->far_dead));
    UP_CRASH("advance");
    UP_STR(&c->tail, pos | new_); /* SYNC tail */
    UP_CRASH("advanced");
    return 1;
}

static int up_take_available(up_ring *r, uint64_t *pos) {
    up_control *c = r->c;
    uint64_t next = UP_LD(&c->next), word;
    for (uint64_t at = up_position(UP_LD(&c->tail)); at < next; at = up_after(at, word, next)) {
        uint64_t *state = up_state_at(r, at);
        word = UP_LD(state);
        if (up_kind(word) != UP_AVAILABLE) continue;
        UP_ST(state, up_word(UP_TAKEN, r->slot, up_span(word)));
        UP_CRASH("retake");
        UP_ST(&c->redeliver, UP_LD(&c->redeliver) - 1);
        *pos = at;
        return UP_OK;
    }
    UP_ST(&c->redeliver, 0);
    return UP_EMPTY;
}

/* Position of the next committed frame without taking it, past padding and gaps. UP_OK, UP_EMPTY.
 * Nothing left to take: what is held may not end before more comes (a window, a checkpoint), so producers who wait for a
 * better moment than the first free bytes (need_tail) are woken now. */
static inline int up_peek(up_ring *r, uint64_t *pos, uint64_t *span) {
    up_control *c = r->c;
    for (;;) {
        uint64_t next = UP_LD(&c->next);
        if (next == c->cached_head && next == up_refresh_head(r)) {
            if (__builtin_expect(up_any(c->producers_waiting) != 0, 0)) up_wake_producers_slow(r, 1);
            return UP_EMPTY;
        }
        uint64_t word = UP_LDA(up_state_at(r, next)); /* SYNC commit */
        uint32_t kind = up_kind(word);
        if (__builtin_expect(kind == UP_COMMITTED, 1)) {
            *pos = next;
            *span = up_span(word);
            return UP_OK;
        }
        if (kind != UP_ABORTED && kind != UP_GAP) return UP_EMPTY; /* still being written: order is kept, so wait for it */
        UP_ST(&c->next, next + up_span(word));
        UP_CRASH("skip");
        up_advance(r);
    }
}

static inline int up_mirrored(up_ring *r) { /* a source copy: its frames are read where its sink copy is */
    return __builtin_expect(UP_LD(&r->c->mirror) == UP_MIRROR_SOURCE, 0);
}

/* Take the next frame: redelivered ones first. */
static inline int up_take(up_ring *r, uint64_t *pos) {
    up_control *c = r->c;
    uint64_t span;
    if (up_mirrored(r)) return UP_EMPTY;
    if (__builtin_expect(UP_LD(&c->redeliver) != 0, 0) && up_take_available(r, pos) == UP_OK) return UP_OK;
    int rc = up_peek(r, pos, &span);
    if (rc != UP_OK) return rc;
    UP_ST(up_state_at(r, *pos), up_word(UP_TAKEN, r->slot, span));
    UP_CRASH("take");
    UP_STR(&c->next, *pos + span);
    UP_CRASH("taken");
    UP_ST(&c->taken, UP_LD(&c->taken) + 1);
    UP_ST(&c->consumer_cpu, up_cpu());
    return UP_OK;
}

/* Take, copy, check and finish the next frame in one critical section when it is a single granule.
 * UP_OK: *out is its copy. UP_TOOBIG: the next frame is larger, or was given back; UP_CORRUPT: its CRC does not match; nothing
 * changed. Else as up_take. */
static inline int up_consume(up_ring *r, up_frame *out) {
    up_control *c = r->c;
    uint64_t pos, span;
    if (up_mirrored(r)) return UP_EMPTY;
    if (__builtin_expect(UP_LD(&c->redeliver) != 0, 0)) return UP_TOOBIG;
    int rc = up_peek(r, &pos, &span);
    if (rc != UP_OK) return rc;
    if (span != UP_GRANULE) return UP_TOOBIG;
    memcpy(out, up_frame_at(r, pos), sizeof *out);
    if (__builtin_expect(!(c->options & UP_OPT_NO_CRC) && up_crc32_header(out, 0) != out->crc, 0)) return UP_CORRUPT;
    UP_ST(up_state_at(r, pos), up_word(UP_FINISHED, 0, span));
    UP_CRASH("consume");
    UP_STR(&c->next, pos + span);
    UP_CRASH("consumed");
    UP_ST(&c->taken, UP_LD(&c->taken) + 1);
    UP_ST(&c->consumer_cpu, up_cpu());
    return UP_OK; /* the caller calls up_advance, once for a batch */
}

/* 1 when `word` at `pos` says that this handle holds that frame; a position of an earlier round does not count. */
static inline int up_holds(up_ring *r, uint64_t pos, uint64_t word) {
    return up_kind(word) == UP_TAKEN && up_owner(word) == r->slot && up_joined(r) &&
           pos >= up_position(UP_LD(&r->c->tail)) && pos < UP_LD(&r->c->next);
}

/* End a frame this handle holds: kind is UP_FINISHED or UP_DEAD. */
static inline int up_finish(up_ring *r, uint64_t pos, uint32_t kind) {
    uint64_t *state = up_state_at(r, pos), word = UP_LD(state);
    if (!up_holds(r, pos, word)) return UP_NOTYOURS;
    UP_CRASH("finish");
    UP_ST(state, up_word(kind, 0, up_span(word)));
    UP_CRASH("finished");
    if (pos == up_position(UP_LD(&r->c->tail))) up_advance(r);
    return UP_OK;
}

/* Raise the delivery count; count and CRC share one 8-byte store. A mismatch that was there stays (linearity). */
static void up_raise(up_ring *r, uint64_t pos) {
    up_frame *f = up_frame_at(r, pos);
    uint64_t *first = (uint64_t *)f, word = UP_LD(first);
    uint16_t count = (uint16_t)(word >> 32), more = count == 0xffff ? count : (uint16_t)(count + 1);
    uint32_t crc = (uint32_t)word;
    if (!(r->c->options & UP_OPT_NO_CRC)) crc = up_crc32_deliveries(crc, count, more);
    UP_STR(first, (word & 0xffff000000000000ull) | ((uint64_t)more << 32) | crc);
}

/* A TAKEN frame can be taken again, its count raised once even when this is repeated after a crash (noted as in up_pad). */
static void up_make_available(up_ring *r, uint64_t pos) {
    uint64_t *state = up_state_at(r, pos), word = UP_LD(state), more = (uint64_t)up_frame_at(r, pos)->deliveries + 1;
    if (!up_note(word)) UP_STR(state, word = up_noted(word, more));
    UP_CRASH("give back");
    if (up_note(word) == up_note_of(more)) up_raise(r, pos);
    UP_CRASH("raise");
    UP_STR(state, up_word(UP_AVAILABLE, 0, up_span(word)));
    UP_CRASH("available");
    UP_ST(&r->c->redeliver, UP_LD(&r->c->redeliver) + 1);
    UP_ST(&r->c->redelivered, UP_LD(&r->c->redelivered) + 1);
}

/* Give a held frame back: it is delivered again, to anyone, with its count raised. */
static inline int up_give_back(up_ring *r, uint64_t pos) {
    if (!up_holds(r, pos, UP_LD(up_state_at(r, pos)))) return UP_NOTYOURS;
    up_make_available(r, pos);
    return UP_OK;
}

/* After EOWNERDEAD: a take that did not reach `next` never happened; recount; finish an interrupted advance. */
static void up_repair_consumer(up_ring *r) {
    up_control *c = r->c;
    uint64_t next = UP_LD(&c->next), head = up_refresh_head(r), available = 0, word;
    if (next < head) {
        uint64_t *state = up_state_at(r, next);
        word = UP_LDA(state);
        if (up_kind(word) == UP_TAKEN || (up_kind(word) >= UP_FINISHED && up_kind(word) <= UP_DEAD))
            UP_ST(state, up_word(UP_COMMITTED, 0, up_span(word)));
    }
    UP_CRASH("repair consumer");
    for (uint64_t at = up_position(UP_LD(&c->tail)); at < next; at = up_after(at, word, next)) {
        word = UP_LD(up_state_at(r, at));
        available += up_kind(word) == UP_AVAILABLE;
    }
    UP_ST(&c->redeliver, available);
    UP_CRASH("recount");
    up_advance(r);
}

/* 1 when nothing will ever come. Reads without the lock: closing comes after the last commit (SYNC stream). */
static inline int up_ended(up_ring *r) {
    if (UP_LDA(&r->c->stream) != UP_STREAM_CLOSED) return 0;
    return up_position(UP_LDA(&r->c->head)) == up_position(UP_LDA(&r->c->tail));
}

#endif
