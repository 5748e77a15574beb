/* The producers' end. The caller holds producer_lock, except for up_commit and up_abort. */
#ifndef UPIPE_PRODUCERS_H
#define UPIPE_PRODUCERS_H

#include "_wake.h"

static inline uint64_t up_refresh_tail(up_ring *r) { /* SYNC tail */
    return r->c->cached_tail = up_position(UP_LDA(&r->c->tail));
}

/* Room for `need` more bytes and `frames` more frames? UP_OK or UP_FULL. */
static inline int up_room(up_ring *r, uint64_t need, uint64_t frames) {
    up_control *c = r->c;
    uint64_t end = up_position(UP_LD(&c->head)) + need;
    if (end - c->cached_tail > r->capacity && end - up_refresh_tail(r) > r->capacity) return UP_FULL;
    if (__builtin_expect(c->max_frames != 0, 0)) {
        up_books passed;
        uint64_t pos;
        up_books_read(&c->tail, c->tail_books, &pos, &passed);
        if (UP_LD(&c->head_books[UP_LD(&c->head) & 1].frames) - passed.frames + frames > c->max_frames) return UP_FULL;
    }
    return UP_OK;
}

/* Move head by `need` bytes and its counters with it, in one store. Modulo 2^64: up_retract goes back. SYNC books, SYNC head */
static inline void up_move_head(up_ring *r, uint64_t need, uint64_t frames, uint64_t bytes, uint64_t refused) {
    up_control *c = r->c;
    uint64_t word = UP_LD(&c->head), new_ = (word & 1) ^ 1;
    up_books *was = &c->head_books[word & 1], *now = &c->head_books[new_];
    UP_STR(&now->frames, UP_LD(&was->frames) + frames);
    UP_STR(&now->bytes, UP_LD(&was->bytes) + bytes);
    UP_STR(&now->dropped, UP_LD(&was->dropped) + refused);
    UP_CRASH("publish");
    UP_STR(&c->head, (up_position(word) + need) | new_);
    UP_CRASH("published");
}

/* `need` bytes holding `frames` frames, whose state words were written before, exist from here on: the commit point of a
 * claim. Its producer's note of how far it came counts once head passed the note's position. */
static inline void up_publish(up_ring *r, uint64_t need, uint64_t frames, uint64_t bytes) {
    if (r->producer != UP_NONE) {
        up_claims *mine = &r->producers[r->producer].claims[r->turn ^= 1]; /* the other entry stays true until then */
        UP_STR(&mine->frames, 0);
        UP_CRASH("void");
        UP_STR(&mine->position, up_position(UP_LD(&r->c->head)));
        r->produced += frames;
        UP_CRASH("note");
        UP_STR(&mine->frames, r->produced);
    }
    UP_ST(&r->c->producer_cpu, up_cpu());
    UP_ST(&r->c->last, up_position(UP_LD(&r->c->head)) + (frames > 1 ? need - UP_GRANULE : 0)); /* batches are of granules */
    up_move_head(r, need, frames, bytes, 0);
}

/* After EOWNERDEAD: a claim that head did not reach never happened; void the producer's note of it before head goes on. */
static void up_repair_producer(up_ring *r) {
    uint64_t head = up_position(UP_LD(&r->c->head));
    for (uint32_t i = 0; i < UP_PRODUCERS; i++)
        for (int k = 0; k < 2; k++) {
            up_claims *claims = &r->producers[i].claims[k];
            if (UP_LD(&claims->frames) && UP_LD(&claims->position) >= head) UP_STR(&claims->frames, 0);
            UP_CRASH("repair producer");
        }
}

/* A drop policy refused the newcomer itself: it counts as emitted and as dropped. */
static void up_count_refused(up_ring *r) { up_move_head(r, 0, 0, 0, 1); }

static inline void up_header(up_ring *r, up_frame *f, const up_meta *m, uint64_t pos, uint32_t payload_crc) {
    uint64_t w[8]; /* whole words: narrow stores would stall the CRC's loads */
    w[0] = (1ull << 32) | ((uint64_t)UP_FRAME_MAGIC << 48);
    w[1] = UP_VERSION | (uint64_t)m->flags << 8 | (uint64_t)m->dtype << 16 | (uint64_t)m->item << 32 |
           (uint64_t)m->rank << 40 | (uint64_t)(r->producer & 0xffff) << 48;
    w[2] = r->epoch | (uint64_t)m->key << 32;
    w[3] = m->size;
    w[4] = pos;
    w[5] = m->execution;
    w[6] = m->timestamp;
    w[7] = m->inline_;
    if (!(r->c->options & UP_OPT_NO_CRC)) w[0] |= up_crc32_header(w, payload_crc);
    memcpy(f, w, sizeof w);
}

/* One of a batch: `done` bytes into a claim that one up_publish of the whole batch will make. */
static inline void up_put_inline_at(up_ring *r, const up_meta *m, uint64_t done) {
    uint64_t pos = up_position(UP_LD(&r->c->head)) + done;
    up_header(r, up_frame_at(r, pos), m, pos, 0);
    UP_CRASH("small");
    UP_ST(up_state_at(r, pos), up_word(UP_COMMITTED, 0, UP_GRANULE));
}

/* A frame of at most 8 bytes: claim, write and commit in one critical section. Room was checked. */
static inline void up_put_inline(up_ring *r, const up_meta *m) {
    up_put_inline_at(r, m, 0);
    up_publish(r, UP_GRANULE, 1, m->size);
}

/* Claim room for one frame; the payload is written outside the lock, then up_commit or up_abort. */
static inline uint64_t up_claim(up_ring *r, uint64_t need, uint64_t bytes) {
    uint64_t pos = up_position(UP_LD(&r->c->head));
    up_frame *f = up_frame_at(r, pos);
    f->producer = (uint16_t)r->producer; /* for up_pad, which counts it as aborted */
    UP_ST(up_state_at(r, pos), up_word(UP_CLAIMED, r->slot, need));
    UP_CRASH("claim");
    up_publish(r, need, 1, bytes);
    return pos;
}

/* ------------------------------------------------------------------ outside the lock */

static inline int up_claimed_by(uint64_t word, uint32_t slot) {
    return up_kind(word) == UP_CLAIMED && up_owner(word) == slot;
}

/* The frame is there. UP_NOTYOURS, and nothing is touched, when this handle was closed since the claim. */
static inline int up_commit(up_ring *r, uint64_t pos, const up_meta *m, uint32_t payload_crc) {
    uint64_t *state = up_state_at(r, pos), word = UP_LD(state);
    if (!up_claimed_by(word, r->slot) || !up_joined(r)) return UP_NOTYOURS;
    UP_CRASH("write");
    up_header(r, up_frame_at(r, pos), m, pos, payload_crc);
    UP_CRASH("commit");
    UP_STR(state, up_word(UP_COMMITTED, 0, up_span(word))); /* SYNC commit */
    UP_CRASH("committed");
    return UP_OK;
}

/* Turn an unfinished write into padding, counted in its producer exactly once even when it is repeated after a crash: the
 * state word notes the count before the count is made. Two threads of one producer never do this at once (the GIL). */
static void up_pad(up_ring *r, uint64_t pos) {
    uint64_t *state = up_state_at(r, pos), word = UP_LD(state);
    uint32_t id = up_frame_at(r, pos)->producer;
    if (id < UP_PRODUCERS) {
        uint64_t *aborted = &r->producers[id].aborted, more = UP_LD(aborted) + 1;
        if (!up_note(word)) UP_STR(state, word = up_noted(word, more));
        UP_CRASH("pad");
        if (up_note(word) == up_note_of(more)) UP_STR(aborted, more);
        UP_CRASH("padded");
    }
    UP_STR(state, up_word(UP_ABORTED, 0, up_span(word))); /* SYNC commit */
}

/* Give up a claim. Padding at the very end of a closed stream ends it, which every sleeper wants to know (SYNC waiting). */
static inline int up_abort(up_ring *r, uint64_t pos) {
    if (!up_claimed_by(UP_LD(up_state_at(r, pos)), r->slot) || !up_joined(r)) return UP_NOTYOURS;
    up_pad(r, pos);
    UP_CRASH("abort");
    up_fence(r);
    if (UP_LDA(&r->c->stream) == UP_STREAM_CLOSED) up_wake_consumers_slow(r, UP_SLOTS);
    return UP_OK;
}

#endif
