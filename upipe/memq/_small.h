/* A small frame in one call: from the lock, which is held, to the wake of who waits for it. What needs more than that, a policy or
 * a larger frame, goes the same way in steps (_putting.pxi, _taking.pxi). */
#ifndef UPIPE_SMALL_H
#define UPIPE_SMALL_H

#include "_lock.h"

/* UP_OK: the frame of at most 8 bytes is in. UP_FULL: nothing was done, and producer_lock is still held: there is no room, or a
 * policy says how it is made. */
static inline int up_put_locked(up_ring *r, const up_meta *m) {
    if (__builtin_expect(UP_LD(&r->c->policy) != UP_POLICY_BLOCK, 0) || up_room(r, UP_GRANULE, 1) != UP_OK) return UP_FULL;
    up_put_inline(r, m);
    up_unlock(r->c->producer_lock);
    up_fence_unlocked(r);
    up_wake_waiting(r, 1);
    return UP_OK;
}

/* As up_consume, and tail goes on; consumer_lock is let go of. UP_CORRUPT: the frame is buried. UP_END: nothing will ever come. */
static inline int up_get_locked(up_ring *r, up_frame *out) {
    uint64_t before = UP_LD(&r->c->tail), pos;
    int rc = up_consume(r, out);
    if (rc == UP_OK) up_advance(r);
    if (rc == UP_CORRUPT && up_take(r, &pos) == UP_OK) (void)up_finish(r, pos, UP_DEAD);
    up_unlock_consumers(r, before);
    return rc == UP_EMPTY && up_ended(r) ? UP_END : rc;
}

#endif
