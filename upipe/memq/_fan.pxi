# One value into several rings, all or nothing.

def fan_send(tuple rings, value, int dtype=-1, uint64_t execution=0, tuple keys=(), int flags=0):
    """Put one value into each ring, or into none. True when it is in (or dropped by a policy), False without room.

    The producers' locks of all rings are held together for the claims only, taken in the order given: every emitter of
    the same rings must name them in the same order. A crash between two publishes leaves the frame in some of them; the
    emit had not returned then, and the frame that caused it is delivered again.

    Args:
        keys: hash of the partition key per ring, or empty.
    """
    return _fan_put(rings, value, dtype, execution, keys, flags)


cdef bint _fan_put(tuple rings, value, int dtype, uint64_t execution, tuple keys, int flags) except -1:
    """fan_send()."""
    cdef Ring ring
    cdef Py_ssize_t begun = 0, i
    try:
        for i in range(len(rings)):
            ring = rings[i]
            ring._begin()
            begun += 1
        return _fan_send(rings, value, dtype, execution, keys, flags)
    finally:
        for i in range(begun):
            (<Ring>rings[i])._done()


cdef bint _fan_send(tuple rings, value, int dtype, uint64_t execution, tuple keys, int flags) except -1:
    cdef Out o
    cdef Ring ring
    cdef Py_ssize_t i, locked = 0, n = len(rings)
    cdef uint64_t need
    cdef uint64_t pos[64]
    cdef list parts
    if n > 64:
        raise ValueError(f"one emit reaches at most 64 queues, not {n}")
    ring = rings[0]
    parts = _encode(value, dtype, &o, ring.allow_pickle)
    o.m.execution = execution
    o.m.flags |= flags
    need = up_need(o.m.size, o.m.flags)
    for i in range(n):
        ring = <Ring>rings[i]  # which _begin() has proved
        ring._produce()
        ring._fits(need)
    try:
        for i in range(n):
            ring = <Ring>rings[i]
            ring._lock(ring.r.c.producer_lock)
            locked += 1
        if not _fan_claim(rings, keys, &o, need, pos):
            return False
    finally:
        for i in range(locked):
            ring = <Ring>rings[i]
            up_unlock(ring.r.c.producer_lock)
    _fan_fill(rings, keys, &o, parts, pos)
    return True


cdef enum:                  # in pos[], where a claim is never odd
    _PLACED = 1             # nothing to fill
    _BLOCKS = 3             # nothing is claimed yet, and it has room


cdef bint _fan_claim(tuple rings, tuple keys, Out *o, uint64_t need, uint64_t *pos) except -1:
    """Under the producers' locks: a claim in each ring, small frames put at once. False, and nothing was dropped
    anywhere, when one that blocks has no room."""
    cdef Ring ring
    cdef Py_ssize_t i, n = len(rings)
    cdef int rc
    for i in range(n):
        ring = <Ring>rings[i]
        pos[i] = _BLOCKS if ring.r.c.policy == UP_POLICY_BLOCK else _PLACED
        if pos[i] == _BLOCKS and ring._room(need) != UP_OK:
            return False
    try:
        for i in range(n):
            ring = <Ring>rings[i]
            if ring.r.c.policy == UP_POLICY_DISCARD:
                rc = UP_REFUSED
            else:
                rc = UP_OK if pos[i] == _BLOCKS else ring._admit(need)  # nobody takes its room while we hold the lock
            pos[i] = _PLACED
            o.m.key = keys[i] if keys else 0
            if rc != UP_OK:  # (UP_FULL: its policy was drop_oldest a moment ago)
                up_count_refused(&ring.r)
            elif o.m.flags & UP_FLAG_INLINE:
                up_put_inline(&ring.r, &o.m)
            else:
                pos[i] = up_claim(&ring.r, need, o.m.size)
    except BaseException:
        _fan_abort(rings, pos)
        raise
    return True


cdef int _fan_fill(tuple rings, tuple keys, Out *o, list parts, uint64_t *pos) except -1:
    cdef Ring ring
    cdef Py_ssize_t i, n = len(rings)
    cdef uint64_t at
    if o.m.flags & UP_FLAG_INLINE:
        up_fence(&(<Ring>rings[0]).r)  # SYNC waiting: one for all of them
        for i in range(n):
            up_wake_waiting(&(<Ring>rings[i]).r, 1)
        return 0
    try:
        for i in range(n):
            ring = <Ring>rings[i]
            if pos[i] == _PLACED:
                continue
            o.m.key = keys[i] if keys else 0
            at, pos[i] = pos[i], _PLACED  # from here on _fill sees to it
            ring._fill(at, o, parts)
    except BaseException:
        _fan_abort(rings, pos)
        raise
    return 0


cdef void _fan_abort(tuple rings, uint64_t *pos) noexcept:
    """Claims that were not filled become padding."""
    cdef Ring ring
    cdef Py_ssize_t i
    for i in range(len(rings)):
        ring = <Ring>rings[i]
        if not pos[i] & 1:
            ring._abort(pos[i])
