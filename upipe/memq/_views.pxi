# Zero copy: views into the ring. A view holds its Ring, and so the mapping; the frame is held only inside `with`.

cdef class _Pin:
    """Keeps a Ring mapped for as long as an array or a memoryview refers to its bytes."""
    cdef Ring ring
    cdef uint8_t *data            # for bytes: what the buffer protocol gives
    cdef Py_ssize_t size
    cdef bint writable            # where a mirror receives

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, not self.writable, flags)


cdef tuple _dims(shape):
    """Of a shape as numpy takes it. Raises TypeError."""
    try:
        return (_index(shape),)
    except TypeError:
        return tuple([_index(d) for d in shape])


cdef class Reservation:
    """`with q.reserve(shape, dtype) as array:`: write into the ring; committed at the end, aborted on an exception.

    While it is open the handle counts as in use: a close() meanwhile takes effect at its end. Dropped without its end
    (a generator that nobody finished), it aborts. In a forked child it is the parent's, and does nothing.
    """
    cdef Ring ring
    cdef up_meta m
    cdef uint64_t pos
    cdef cnp.ndarray array
    cdef double timeout
    cdef bint entered
    cdef int generation

    def __init__(self, Ring ring, shape, dtype, double timeout, uint32_t key):
        cdef cnp.dtype descr = _np.dtype(dtype)
        cdef tuple dims = _dims(shape)
        cdef int i, num = descr.type_num, rank = len(dims), item = -1, bits = 0
        cdef uint64_t size = descr.itemsize, packed = 0, dim
        if 0 <= num < 24 and cnp.PyArray_ISNBO(descr.byteorder):
            item = _num_to_item[num]
        if item < 0:
            raise ValueError(f"reserve takes a plain numeric dtype in this machine's byte order, not {descr}; put() "
                             "takes any")
        if rank <= SHAPE_RANK:
            bits = up_dim_bits[rank]
        for i, d in enumerate(dims):
            if rank > SHAPE_RANK or not 0 <= d < <uint64_t>1 << bits:
                raise ValueError(f"reserve takes up to {SHAPE_RANK} dimensions, each below 2**(63 // their number), "
                                 f"not {dims}; put() takes any")
            dim = d
            packed |= dim << (bits * i)
            size = size * dim if dim == 0 or size <= (<uint64_t>1 << 62) // dim else <uint64_t>1 << 62  # fits no ring
        self.ring = ring
        self.timeout = timeout
        _meta(&self.m, _ARRAY, UP_FLAG_SHAPE, size)
        self.m.item = item
        self.m.rank = rank
        self.m.key = key
        self.m.inline_ |= packed

    def __enter__(self):
        cdef Ring ring = self.ring
        cdef up_frame f
        cdef _Pin pin = _Pin()
        if self.entered:
            raise ValueError("a reservation is entered once; call reserve() again")
        ring._begin()
        try:
            ring._produce()
            self.pos = ring._claim(&self.m, self.timeout)
        except BaseException:
            ring._done()
            raise
        self.entered = True
        self.generation = _generation
        f.flags = self.m.flags
        f.item = self.m.item
        f.rank = self.m.rank
        f.inline_ = self.m.inline_
        f.size = self.m.size
        pin.ring = ring
        try:
            self.array = _array_view(&f, pin, up_payload(&ring.r, self.pos), True)
        except BaseException:
            self._leave(False)
            raise
        return self.array

    def __exit__(self, kind, value, trace):
        self._leave(kind is None)
        return False

    cdef _leave(self, bint commit):
        cdef Ring ring = self.ring
        cdef uint32_t crc = 0
        cdef uint8_t *data
        if not self.entered:
            return
        self.entered = False
        if self.array is not None:
            # a later write through this view would corrupt a committed frame
            cnp.PyArray_CLEARFLAGS(self.array, cnp.NPY_ARRAY_WRITEABLE)
            self.array = None
        if self.generation != _generation:
            return
        if commit:
            data = up_payload(&ring.r, self.pos)
            if not (ring.r.c.options & UP_OPT_NO_CRC):
                with nogil:
                    crc = up_crc32_in_place(data, self.m.size)
            self.m.timestamp = up_stamp()
            self.m.execution = ring.execution
            up_commit(&ring.r, self.pos, &self.m, crc)
            up_wake_consumers(&ring.r, 1)
        else:
            ring._abort(self.pos)
        ring._done()

    def __del__(self):
        self._leave(False)


cdef class Loan:
    """`with q.borrow() as value:`: read in place; finished at the end, given back on an exception.

    As with a Reservation: a close() meanwhile takes effect at its end, and dropped without its end it gives back.
    """
    cdef Ring ring
    cdef double timeout
    cdef uint64_t pos
    cdef bint entered
    cdef int generation

    def __init__(self, Ring ring, double timeout):
        self.ring = ring
        self.timeout = timeout

    def __enter__(self):
        cdef Ring ring = self.ring
        cdef up_frame none
        cdef int rc
        if self.entered:
            raise ValueError("a loan is entered once; call borrow() again")
        ring._begin()
        try:
            rc = ring._wait_frame(&self.pos, NULL, False, self.timeout, None)
            if rc != UP_TOOBIG:
                ring._nothing(rc, &none)
            value = self._value()
        except BaseException:
            ring._done()
            raise
        self.entered = True
        self.generation = _generation
        return value

    cdef object _value(self):
        try:
            return self.ring._view(self.pos)
        except FrameCorrupt:
            self.ring._end(self.pos, UP_DEAD)
            raise
        except Exception:
            self.ring._end(self.pos, UP_FINISHED)
            raise
        except BaseException:
            self.ring._return(self.pos)
            raise

    def __exit__(self, kind, value, trace):
        self._leave(kind is None)
        return False

    cdef _leave(self, bint finish):
        if not self.entered:
            return
        self.entered = False
        if self.generation != _generation:
            return
        try:
            if finish:
                self.ring._end(self.pos, UP_FINISHED)
            else:
                self.ring._return(self.pos)
        finally:
            self.ring._done()

    def __del__(self):
        self._leave(False)
