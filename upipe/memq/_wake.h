/* Who sleeps and who is woken. A bit per slot says "asleep"; exactly one waker clears it and rings that slot's bell.
 *
 * SYNC waiting (Dekker): the sleeper sets its bit, fences and looks again; the waker changes the ring, fences and reads the
 * bits. One of them sees the other.
 *
 * One frame wakes one consumer. No wake is lost, because whoever was woken either takes a frame, or arms and looks again, or
 * leaves; and leaving (up_disarm) hands the wake on while there is anything left to take: the frame in question may have
 * stood behind one that was committed later, or the sleeper gave up at the very moment it was rung.
 */
#ifndef UPIPE_WAKE_H
#define UPIPE_WAKE_H

#include "_bell.h"
#include "_segment.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>

/* A thread sleeps in a nap on a futex in its slot: half the system calls of a doorbell. The word is 1 from before the
 * bit is set until somebody wakes it (or the last thread leaves); a nap is short, or watched by a supervisor or by the lookout
 * (_lookout.h), since a futex cannot be waited for together with pidfds. */
static inline uint32_t *up_nap(up_slot *s, int producer) { return producer ? &s->nap_producer : &s->nap_consumer; }

static inline void up_nap_set(uint32_t *nap, uint32_t value) { __atomic_store_n(nap, value, __ATOMIC_SEQ_CST); }

/* Nap until woken, at most `ns` (negative: for ever). 0 when woken or never asleep, else errno. */
UP_HOT static int up_nap_sleep(uint32_t *nap, int64_t ns) {
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    return syscall(SYS_futex, nap, FUTEX_WAIT, 1, ns < 0 ? NULL : &t, NULL, 0) == 0 || errno == EAGAIN ? 0 : errno;
}

/* Wake all threads that nap there. 1 when there were any: 0 also when they are about to, or dead, and the bell decides. */
UP_HOT static int up_nap_wake(uint32_t *nap) {
    if (!UP_LD(nap) || !__atomic_exchange_n(nap, 0, __ATOMIC_SEQ_CST)) return 0;
    return syscall(SYS_futex, nap, FUTEX_WAKE, INT_MAX, NULL, NULL, 0) > 0;
}

static int up_bell_slot(up_ring *r, uint32_t slot, int producer) {
    up_slot *s = &r->slots[slot];
    uint32_t pid = UP_LDA(&s->pid), id = producer ? UP_LD(&s->bell_producer) : UP_LD(&s->bell_consumer);
    return pid && id ? up_bell_ring(r->root, r->root_hash, pid, UP_LD(&s->start), id) : UP_BELL_NOBODY;
}

/* Clear one bit and ring. 1 when somebody was woken. A bell that nobody hears belongs to the dead; one that cannot be rung
 * for want of a descriptor keeps its bit, for the next waker. */
UP_HOT static int up_wake_one(up_ring *r, uint64_t *bits, uint32_t word, uint32_t bit, int producer) {
    uint64_t mask = 1ull << bit;
    if (!(__atomic_fetch_and(&bits[word], ~mask, __ATOMIC_SEQ_CST) & mask)) return 0; /* another waker was first */
    UP_CRASH("wake");
    if (up_nap_wake(up_nap(&r->slots[word * 64 + bit], producer))) return 1;
    int rc = up_bell_slot(r, word * 64 + bit, producer);
    if (rc == UP_BELL_BROKE) __atomic_fetch_or(&bits[word], mask, __ATOMIC_SEQ_CST);
    return rc == 0;
}

/* Wake up to `count` sleeping consumers, not always the same first. */
UP_HOT static void up_wake_consumers_slow(up_ring *r, uint64_t count) {
    static uint32_t turn; /* spreads the wakes; a lost increment does no harm */
    uint32_t rot = __atomic_fetch_add(&turn, 1, __ATOMIC_RELAXED) & 63;
    for (uint32_t i = 0; i < UP_SLOTS / 64 && count; i++) {
        uint64_t seen = UP_LD(&r->c->consumers_waiting[i]);
        uint64_t turned = rot ? (seen >> rot) | (seen << (64 - rot)) : seen;
        for (; turned && count; turned &= turned - 1)
            count -= (uint64_t)up_wake_one(r, r->c->consumers_waiting, i, ((uint32_t)__builtin_ctzll(turned) + rot) & 63, 0);
    }
}

static inline uint64_t up_any(uint64_t *bits) {
    uint64_t any = 0;
    for (int i = 0; i < UP_SLOTS / 64; i++) any |= UP_LD(&bits[i]);
    return any;
}

static inline void up_wake_waiting(up_ring *r, uint64_t count) { /* SYNC waiting: after a fence of the caller's */
    if (__builtin_expect(up_any(r->c->consumers_waiting) != 0, 0)) up_wake_consumers_slow(r, count);
}

static inline void up_wake_consumers(up_ring *r, uint64_t count) { /* SYNC waiting */
    up_fence(r);
    up_wake_waiting(r, count);
}

/* The fence of SYNC waiting when the ring was changed under a lock that was let go of since. To learn who waits for it, that
 * must read and write the lock's word at once, and on x86-64 whatever does so is a full fence already. */
static inline void up_fence_unlocked(up_ring *r) {
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
    (void)r;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#else
    up_fence(r);
#endif
}

/* Wake every producer whose room is there now (need_tail), or all of them. */
static void up_wake_producers_slow(up_ring *r, int all) {
    uint64_t tail = up_position(UP_LDA(&r->c->tail));
    for (uint32_t i = 0; i < UP_SLOTS / 64; i++)
        for (uint64_t seen = UP_LD(&r->c->producers_waiting[i]); seen; seen &= seen - 1) {
            uint32_t bit = (uint32_t)__builtin_ctzll(seen);
            if (!all && UP_LD(&r->slots[i * 64 + bit].need_tail) > tail) continue;
            (void)up_wake_one(r, r->c->producers_waiting, i, bit, 1);
        }
}

static inline void up_wake_room(up_ring *r) { /* SYNC waiting: after a fence of the caller's */
    if (__builtin_expect(up_any(r->c->producers_waiting) != 0, 0)) up_wake_producers_slow(r, 0);
}

static inline void up_wake_producers(up_ring *r) { /* SYNC waiting */
    up_fence(r);
    up_wake_room(r);
}

static void up_wake_all(up_ring *r) {
    up_fence(r);
    up_wake_consumers_slow(r, UP_SLOTS);
    up_wake_producers_slow(r, 1);
}

/* Ring everybody's bells, asleep or not: the dead may have cleared a sleeper's bit and not have rung any more, or have been
 * given a wake that it did not use. Who is not asleep looks once too often. */
static void up_ring_everybody(up_ring *r) {
    for (uint32_t i = 0; i < UP_SLOTS; i++)
        for (int producer = 0; UP_LD(&r->slots[i].pid) && producer < 2; producer++) {
            (void)up_nap_wake(up_nap(&r->slots[i], producer));
            (void)up_bell_slot(r, i, producer);
        }
}

static inline void up_arm(up_ring *r, uint64_t *bits) { /* SYNC waiting: after this, look again before sleeping */
    if (!up_joined(r)) return;
    __atomic_fetch_or(&bits[r->slot / 64], 1ull << (r->slot & 63), __ATOMIC_SEQ_CST);
    up_fence(r);
}

/* Done waiting. 1 when nobody had woken us. Otherwise the wake went on to another sleeper if there is something to take
 * (producers need not: everyone whose room is there is woken). A handle that closed meanwhile has no bit any more. */
UP_HOT static inline int up_disarm(up_ring *r, uint64_t *bits) {
    up_control *c = r->c;
    if (!up_joined(r)) return 1;
    uint64_t bit = 1ull << (r->slot & 63), *word = &bits[r->slot / 64];
    /* A bit that is clear was cleared by who woke us, and the acquire shows us what that was for. */
    if (UP_LDA(word) & bit && __atomic_fetch_and(word, ~bit, __ATOMIC_SEQ_CST) & bit) return 1;
    if (bits == c->consumers_waiting && (UP_LD(&c->redeliver) || UP_LD(&c->next) != up_position(UP_LDA(&c->head))))
        up_wake_consumers(r, 1);
    return 0;
}

#endif
