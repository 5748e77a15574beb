/* The producers' end. The caller holds producer_lock, except for up_commit and up_abort. */
#ifndef UPIPE_PRODUCERS_H
#define UPIPE_PRODUCERS_H

#include "_wake.h"

static inline uint64_t up_refresh_tail(up_ring *r) { /* SYNC tail */
    return r->c->cached_tail = up_position(UP_LDA(&r->c->tail));
}

/* Where the next claim goes. A ring that is walked through from end to end is as cold as it is large, though its consumers keep
 * up. So a large claim is placed below the oldest frame in use (the JUMP), where frames were a moment ago, and the next
 * ones follow it upwards, to where those were that are in use now: both ends stay in a window of UP_WARM bytes, or of what is in
 * use and one frame more. (A smaller window is slower: a line is written in 20 % less time where the reader's own cache has
 * no copy of it any more.)
 *
 *     memory    |......[ jumped ][ in use: S ]...........|          positions   S=[tail, from) gap=[from, to) [to, head)
 *
 * A gap holds no frame and costs no bytes, but head stays below tail + capacity: while S is in use, the memory of the gap would be
 * out of reach. A claim that has no room otherwise goes there (the HOP): a second gap reaches over S, and head may then go
 * on to the start of what jumped, to + capacity; S is what makes that more than tail + capacity. So a jump takes no room from
 * frames of equal size (up_jump sees to the granules) as long as S is held. What ends of S after a hop is out of reach until what
 * jumped has ended too: less than a quarter of the ring, for S is no larger. And a free part in front of S and one behind it
 * are two: a frame of more than half of the ring may have to wait until S has ended.
 *   - At most one jump at a time is in front of tail, and one hop behind it.
 *   - Both gaps have state words of their own where no frame starts: the jump's at `from`, one granule of which the hop leaves
 *     out; the hop's in a granule that up_limit keeps free for it.
 *   - Nothing but head says whether a jump, or a hop, was made. */
#ifndef UP_WARM_MIN
#define UP_WARM_MIN 16384 /* ring bytes of a claim that may jump: below, the copy is cheaper than the look at tail */
#endif
#ifndef UP_WARM
#define UP_WARM 6291456 /* ring bytes of the window: still in a shared cache, not any more in the other CPU's own */
#endif

/* A jump whose gap tail has not passed. */
static inline int up_jumped(up_ring *r, uint64_t head, uint64_t tail) {
    return __builtin_expect(tail < UP_LD(&r->c->jump_to), 0) && head > UP_LD(&r->c->jump_to);
}

static inline int up_hopped(up_ring *r, uint64_t head) { return head > UP_LD(&r->c->jump_from) + r->capacity; }

/* How far head may go while tail is there. A tail of earlier gives less, never more. */
static inline uint64_t up_limit(up_ring *r, uint64_t head, uint64_t tail) {
    if (!up_jumped(r, head, tail)) return tail + r->capacity;
    if (up_hopped(r, head)) return UP_LD(&r->c->jump_to) + r->capacity;
    return tail + r->capacity - UP_GRANULE; /* room for the hop's word */
}

/* Where a claim of `need` bytes goes by a hop; 0: there is none. */
static inline uint64_t up_hop(up_ring *r, uint64_t need, uint64_t head, uint64_t tail) {
    if (!up_jumped(r, head, tail) || up_hopped(r, head) || head + UP_GRANULE > tail + r->capacity) return 0;
    uint64_t at = UP_LD(&r->c->jump_from) + r->capacity + UP_GRANULE;
    return at + need <= UP_LD(&r->c->jump_to) + r->capacity ? at : 0;
}

/* Room for `need` more bytes and `frames` more frames? UP_OK or UP_FULL. */
UP_HOT static inline int up_room(up_ring *r, uint64_t need, uint64_t frames) {
    up_control *c = r->c;
    uint64_t head = up_position(UP_LD(&c->head));
    if (head + need > up_limit(r, head, c->cached_tail) && head + need > up_limit(r, head, up_refresh_tail(r)) &&
        !up_hop(r, need, head, c->cached_tail))
        return UP_FULL;
    if (__builtin_expect(c->max_frames != 0, 0)) {
        up_books passed;
        uint64_t pos;
        up_books_read(&c->tail, c->tail_books, &pos, &passed);
        if (UP_LD(&c->head_books[UP_LD(&c->head) & 1].frames) - passed.frames + frames > c->max_frames) return UP_FULL;
    }
    return UP_OK;
}

/* Move head by `need` bytes, `gap` of them no frame's, and its counters with it, in one store. Modulo 2^64: up_retract goes back.
 * SYNC books, SYNC head */
static inline void up_move_head(up_ring *r, uint64_t need, uint64_t gap, uint64_t frames, uint64_t bytes, uint64_t refused) {
    up_control *c = r->c;
    uint64_t word = UP_LD(&c->head), new_ = (word & 1) ^ 1;
    up_books *was = &c->head_books[word & 1], *now = &c->head_books[new_];
    UP_STR(&now->frames, UP_LD(&was->frames) + frames);
    UP_STR(&now->bytes, UP_LD(&was->bytes) + bytes);
    UP_STR(&now->finished, UP_LD(&was->finished) + gap);
    UP_STR(&now->dropped, UP_LD(&was->dropped) + refused);
    UP_CRASH("publish");
    UP_STR(&c->head, (up_position(word) + need) | new_);
    UP_CRASH("published");
}

/* `need` bytes holding `frames` frames behind a gap, whose state words were written before, exist from here on: the commit point
 * of a claim. Its producer's note of how far it came counts once head passed the note's position. */
static inline void up_publish_behind(up_ring *r, uint64_t gap, uint64_t need, uint64_t frames, uint64_t bytes) {
    uint64_t pos = up_position(UP_LD(&r->c->head)) + gap;
    if (r->producer != UP_NONE) {
        up_claims *mine = &r->producers[r->producer].claims[r->turn ^= 1]; /* the other entry stays true until then */
        UP_STR(&mine->frames, 0);
        UP_CRASH("void");
        UP_STR(&mine->position, pos);
        r->produced += frames;
        UP_CRASH("note");
        UP_STR(&mine->frames, r->produced);
    }
    UP_ST(&r->c->producer_cpu, up_cpu());
    UP_ST(&r->c->last, pos + (frames > 1 ? need - UP_GRANULE : 0)); /* batches are of granules */
    up_move_head(r, gap + need, gap, frames, bytes, 0);
}

static inline void up_publish(up_ring *r, uint64_t need, uint64_t frames, uint64_t bytes) {
    up_publish_behind(r, 0, need, frames, bytes);
}

/* Before what up_room found room for is written: the hop, when that is where the room is. A gap of its own that whoever claims
 * next follows up; a crash in between leaves it at the end of the ring, for consumers to pass as padding. */
static inline void up_open(up_ring *r, uint64_t need) {
    uint64_t head = up_position(UP_LD(&r->c->head)), tail = r->c->cached_tail, to;
    if (__builtin_expect(head + need <= up_limit(r, head, tail) || !(to = up_hop(r, need, head, tail)), 1)) return;
    UP_ST(up_state_at(r, head), up_word(UP_GAP, 0, to - head));
    UP_CRASH("hop");
    up_move_head(r, to - head, to - head, 0, 0, 0);
}

/* The gap that a claim of `need` bytes leaves, to be placed below what is in use with as many of its size as fit the window.
 * 0 when it goes on at head, since
 *   - something may be dropped, or a mirror reads or writes here: equal positions there would be gaps to send;
 *   - nothing was below tail since the last jump, or nobody passed that yet; or what follows head was in use at the last jump;
 *   - much of the ring is in use: no small window then, and much to be out of reach; or a frame of this size less would fit. */
static inline uint64_t up_jump(up_ring *r, uint64_t need) {
    up_control *c = r->c;
    uint64_t head = up_position(UP_LD(&c->head)), from = UP_LD(&c->jump_from), to = UP_LD(&c->jump_to), used, most, gap;
    if (UP_LD(&c->policy) != UP_POLICY_BLOCK || UP_LD(&c->mirror) != UP_MIRROR_NONE) return 0;
    if (from < to && head + need <= from + r->capacity) return 0;
    if (up_refresh_tail(r) < to + need) return 0;
    used = head + need - c->cached_tail;
    if (used > r->capacity / 4 || (r->capacity - used) % need < 2 * UP_GRANULE) return 0;
    most = r->capacity / 2 < UP_WARM ? r->capacity / 2 : UP_WARM;
    if (used < most) used += (most - used) / need * need;
    gap = r->capacity - used - UP_GRANULE;
    UP_ST(&c->jump_from, head);
    UP_CRASH("jump");
    UP_ST(&c->jump_to, head + gap);
    UP_CRASH("jumped");
    return gap;
}

/* After EOWNERDEAD: a claim that head did not reach never happened; void the jump and the producer's note of it before head goes
 * on. */
static void up_repair_producer(up_ring *r) {
    uint64_t head = up_position(UP_LD(&r->c->head));
    if (UP_LD(&r->c->jump_to) >= head) { /* head did not get there: there was no jump */
        UP_ST(&r->c->jump_to, up_refresh_tail(r));
        UP_CRASH("no jump");
        UP_ST(&r->c->jump_from, r->c->cached_tail);
    }
    for (uint32_t i = 0; i < UP_PRODUCERS; i++)
        for (int k = 0; k < 2; k++) {
            up_claims *claims = &r->producers[i].claims[k];
            if (UP_LD(&claims->frames) && UP_LD(&claims->position) >= head) UP_STR(&claims->frames, 0);
            UP_CRASH("repair producer");
        }
}

/* A drop policy refused the newcomer itself: it counts as emitted and as dropped. */
static void up_count_refused(up_ring *r) { up_move_head(r, 0, 0, 0, 0, 1); }

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

/* One of a batch: `done` bytes into a claim that one up_publish of the whole batch will make, after one up_open of it. */
static inline void up_put_inline_at(up_ring *r, const up_meta *m, uint64_t done) {
    uint64_t pos = up_position(UP_LD(&r->c->head)) + done;
    up_header(r, up_frame_at(r, pos), m, pos, 0);
    UP_CRASH("small");
    UP_ST(up_state_at(r, pos), up_word(UP_COMMITTED, 0, UP_GRANULE));
}

/* A frame of at most 8 bytes: claim, write and commit in one critical section. Room was checked. */
static inline void up_put_inline(up_ring *r, const up_meta *m) {
    up_open(r, UP_GRANULE);
    up_put_inline_at(r, m, 0);
    up_publish(r, UP_GRANULE, 1, m->size);
}

/* Claim room for one frame; the payload is written outside the lock, then up_commit or up_abort. */
static inline uint64_t up_claim(up_ring *r, uint64_t need, uint64_t bytes) {
    up_open(r, need);
    uint64_t gap = need >= UP_WARM_MIN ? up_jump(r, need) : 0, head = up_position(UP_LD(&r->c->head)), pos = head + gap;
    up_frame *f = up_frame_at(r, pos);
    f->producer = (uint16_t)r->producer; /* for up_pad, which counts it as aborted */
    UP_ST(up_state_at(r, pos), up_word(UP_CLAIMED, r->slot, need));
    if (gap) UP_ST(up_state_at(r, head), up_word(UP_GAP, 0, gap));
    UP_CRASH("claim");
    up_publish_behind(r, gap, need, 1, bytes);
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
