# One value into several rings, all or nothing.

def fan_send(tuple rings, value, int dtype=-1, uint64_t execution=0, tuple keys=(), int flags=0):
    """Put one value into each ring, or into none. True when it is in (or dropped by a policy), False without room.

    The producers' locks of all rings are held together for the claims only, taken in the order given: every emitter of
    the same rings must name them in the same order. A crash between two publishes leaves the frame in some of them; the
    emit had not returned then, and the frame that caused it is delivered again.

    Args:
        keys: hash of the partition key per ring, or empty.
    """
    cdef Ring ring
    cdef Py_ssize_t begun = 0, i
    try:
        for ring in rings:
            ring._begin()
            begun += 1
        return _fan_send(rings, value, dtype, execution, keys, flags)
    finally:
        for i in range(begun):
            ring = rings[i]
            ring._done()


cdef _fan_send(tuple rings, value, int dtype, uint64_t execution, tuple keys, int flags):
    cdef Out o
    cdef Ring ring
    cdef Py_ssize_t i, locked, full
    cdef uint64_t need
    cdef uint32_t crc
    cdef uint64_t pos[64]
    cdef list parts, chosen = list(rings), refused = []
    if len(chosen) > 63:  # the last place is for queues where the newcomer replaces a frame
        raise ValueError(f"one emit reaches at most 63 queues, not {len(chosen)}")
    ring = chosen[0]
    parts = _encode(value, dtype, &o, ring.allow_pickle)
    for ring in chosen:
        ring._produce()
    o.m.execution = execution
    o.m.flags |= flags
    need = up_need(o.m.size, o.m.flags)
    for ring in chosen:
        ring._fits(need)
        if ring.r.c.policy == UP_POLICY_LATEST:
            ring._clear(need)
    while True:
        locked, full = 0, -1
        try:
            for i in range(len(chosen)):
                ring = chosen[i]
                ring._lock(ring.r.c.producer_lock)
                locked += 1
                if ring.r.c.policy == UP_POLICY_DISCARD or up_room(&ring.r, need, 1) != UP_OK:
                    full = i
                    break
            if full < 0:
                for i in range(len(chosen)):
                    ring = chosen[i]
                    o.m.key = keys[i] if keys else 0
                    if o.m.flags & UP_FLAG_INLINE:
                        up_put_inline(&ring.r, &o.m)
                    else:
                        pos[i] = up_claim(&ring.r, need, o.m.size)
        finally:
            for i in range(locked):
                ring = chosen[i]
                up_unlock(ring.r.c.producer_lock)
        if full < 0:
            break
        ring = chosen[full]
        if ring._skip_padding():
            continue
        if ring.r.c.policy == UP_POLICY_BLOCK:
            return False
        if ring._full(need, False) == UP_REFUSED:  # counted only when the emit as a whole succeeds
            refused.append(chosen.pop(full))
            if keys:
                keys = keys[:full] + keys[full + 1:]
            if not chosen:
                break
    for ring in refused:
        if ring.r.c.policy == UP_POLICY_DISCARD or not ring._replace(need, &pos[63]):
            ring._count_refused()
            continue
        try:
            ring._copy_in(pos[63], &o, parts, &crc)
        except BaseException:
            ring._abort(pos[63])
            raise
        up_commit(&ring.r, pos[63], &o.m, crc)
        up_wake_consumers(&ring.r, 1)
    for i in range(len(chosen)):
        ring = chosen[i]
        if not o.m.flags & UP_FLAG_INLINE:
            o.m.key = keys[i] if keys else 0
            try:
                ring._copy_in(pos[i], &o, parts, &crc)
            except BaseException:
                for k in range(i, len(chosen)):
                    ring = chosen[k]
                    ring._abort(pos[k])
                raise
            up_commit(&ring.r, pos[i], &o.m, crc)
        up_wake_consumers(&ring.r, 1)
    return True
