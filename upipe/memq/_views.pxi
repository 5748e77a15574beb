# Zero copy: views into the ring. A view holds its Ring, so the mapping outlives it; the frame is held only inside `with`.

cdef class _Pin:
    """Keeps a Ring mapped for as long as an array refers to its bytes."""
    cdef Ring ring


cdef class Reservation:
    """`with q.reserve(shape, dtype) as array:`: write into the ring; committed at the end, aborted on an exception."""
    cdef Ring ring
    cdef up_meta m
    cdef uint64_t pos
    cdef object array
    cdef double timeout

    def __init__(self, Ring ring, shape, dtype, double timeout, uint32_t key):
        cdef int i
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        descr = _np.dtype(dtype)
        item = _num_to_item[descr.num] if 0 <= descr.num < 24 and descr.isnative else -1
        if item < 0 or len(dims) > 3 or any(not 0 <= d < 2097152 for d in dims):
            raise ValueError(f"reserve takes up to 3 dimensions below 2**21 of a plain numeric dtype, not {dims} of {descr}")
        self.ring = ring
        self.timeout = timeout
        size = descr.itemsize
        for d in dims:
            size *= d
        _meta(&self.m, _ARRAY, UP_FLAG_SHAPE, size)
        self.m.item = item
        self.m.rank = len(dims)
        self.m.key = key
        for i, d in enumerate(dims):
            self.m.inline_ |= <uint64_t>d << (21 * i)

    def __enter__(self):
        cdef Ring ring = self.ring
        cdef up_frame f
        cdef _Pin pin = _Pin()
        ring._produce()
        self.pos = ring._claim(&self.m, self.timeout)
        f.flags = self.m.flags
        f.item = self.m.item
        f.rank = self.m.rank
        f.inline_ = self.m.inline_
        f.size = self.m.size
        pin.ring = ring
        self.array = _array_view(&f, pin, up_payload(&ring.r, self.pos), True)
        return self.array

    def __exit__(self, kind, value, trace):
        cdef Ring ring = self.ring
        cdef uint32_t crc = 0
        cdef uint8_t *data = up_payload(&ring.r, self.pos)
        self.array.flags.writeable = False  # a later write through this view would corrupt a committed frame
        self.array = None
        if kind is not None:
            up_abort(&ring.r, self.pos)
        else:
            if not (ring.r.c.options & UP_OPT_NO_CRC):
                with nogil:
                    crc = up_crc32(0, data, self.m.size)
            self.m.timestamp = up_now_ns(CLOCK_REALTIME)
            self.m.execution = ring.execution
            up_commit(&ring.r, self.pos, &self.m, crc)
        up_wake_consumers(&ring.r, 1)
        return False


cdef class Loan:
    """`with q.borrow() as value:`: read in place; finished at the end, given back on an exception."""
    cdef Ring ring
    cdef double timeout
    cdef uint64_t pos

    def __init__(self, Ring ring, double timeout):
        self.ring = ring
        self.timeout = timeout

    def __enter__(self):
        cdef Ring ring = self.ring
        cdef int rc
        ring._enter()
        rc = ring._wait_frame(&self.pos, NULL, False, self.timeout)
        if rc == UP_END:
            raise EndOfStream(f"queue {ring.label} has ended: every producer closed and every frame is finished")
        if rc != UP_TOOBIG:
            raise _queue.Empty
        try:
            return ring._view(self.pos)
        except FrameCorrupt:
            ring._end(self.pos, UP_DEAD)
            raise

    def __exit__(self, kind, value, trace):
        cdef Ring ring = self.ring
        if kind is None:
            ring._end(self.pos, UP_FINISHED)
        else:
            ring.held = self.pos + 1
            ring.give_back()
        return False
