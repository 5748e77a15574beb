# Taker: taking and finishing frames.


cdef class Taker(Putter):
    """Taking and finishing frames."""

    cdef inline int _try_consume(self, up_frame *out) except -100:
        """Take, copy, check and finish a small frame: up_get_locked."""
        self._lock(self.r.c.consumer_lock)
        return up_get_locked(&self.r, out)

    cdef int _try_take(self, uint64_t *pos, bint holding) except -100:
        """Take one frame. holding: as take() does, which finishes the one that it held before."""
        cdef int rc
        cdef uint64_t before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        if holding and self.held:
            self._finish_at(self.held - 1, UP_FINISHED)
            self.held = 0
        rc = up_take(&self.r, pos)
        if holding and rc == UP_OK:
            self.held = pos[0] + 1
        up_unlock_consumers(&self.r, before)
        if rc == UP_EMPTY and up_ended(&self.r):
            rc = UP_END
        return rc

    cdef int _finish_at(self, uint64_t pos, uint32_t kind) noexcept:
        """Under the consumers' lock. UP_NOTYOURS when we do not hold it any more."""
        if pos < up_position(UP_LD(&self.r.c.tail)) or pos >= UP_LD(&self.r.c.next) or pos % UP_GRANULE:
            return UP_NOTYOURS
        return up_finish(&self.r, pos, kind)

    cdef inline int _wait_frame(self, uint64_t *pos, up_frame *out, bint holding, double timeout,
                                Lull lull) except -100:
        """Take, or with out != NULL consume, waiting up to timeout, and no longer than `lull` (None: no matter) lasts.
        UP_OK: consumed into *out. UP_TOOBIG: taken at *pos. UP_CORRUPT: buried, see *out. UP_EMPTY, UP_END."""
        cdef Waiting w
        cdef bint waits = False
        cdef int rc
        if self.trouble is not None:
            error, self.trouble = self.trouble, None
            raise error
        try:
            while True:
                if out != NULL and self._nothing_yet():
                    rc = UP_EMPTY
                else:
                    rc = self._try_consume(out) if out != NULL else UP_TOOBIG
                if rc == UP_TOOBIG:
                    rc = self._try_take(pos, holding)
                    if rc == UP_OK:
                        rc = UP_TOOBIG
                if rc != UP_EMPTY:
                    return rc
                if not waits:
                    waits = True
                    _waiting(&w, 0, 0, timeout)
                    w.lull = <void *>lull if lull is not None else NULL
                if not self._again(&w):
                    return rc
        finally:
            if waits:
                self._left(&w, 0)

    cdef int _checked(self, up_frame *f, uint64_t pos) except -1:
        """Header sane and the frame inside its span? Raises FrameCorrupt otherwise."""
        cdef uint64_t span = up_span(UP_LD(up_state_at(&self.r, pos)))
        if f.magic != UP_FRAME_MAGIC or f.version != UP_VERSION or f.size > span or up_need(f.size, f.flags) != span:
            self._corrupt(pos)
        return 0

    cdef _corrupt(self, uint64_t pos):
        self.r.c.corrupt += 1
        raise FrameCorrupt(f"the frame at position {pos} of queue {self.label} does not match its CRC32: its bytes "
                           "changed after they were written (a stray write or bad memory); it was not delivered")

    cdef object _read(self, uint64_t pos):
        """Copy the frame out, check it, decode it. Raises FrameCorrupt, or what decoding raises."""
        cdef up_frame f = up_frame_at(&self.r, pos)[0]  # a copy of our own: other threads read on this handle, too
        cdef uint32_t crc = 0
        cdef bint check = not (self.r.c.options & UP_OPT_NO_CRC)
        cdef uint8_t *to
        cdef uint8_t *data = up_payload(&self.r, pos)
        self.last = f
        self._checked(&f, pos)
        if f.flags & UP_FLAG_INLINE or f.size == 0:
            if check and up_crc32_header(&f, 0) != f.crc:
                self._corrupt(pos)
            return _decode(&f, None if f.flags & UP_FLAG_INLINE else _block(0), self.allow_pickle)
        if f.dtype == _BYTES:
            target = PyBytes_FromStringAndSize(NULL, f.size)
            to = <uint8_t *>PyBytes_AS_STRING(target)
        else:
            target = _block(f.size)
            to = (<Block>target).data
        if not check:
            with nogil:
                memcpy(to, data, f.size)
        elif f.size >= LARGE:
            with nogil:
                crc = up_crc32_copy(0, to, data, f.size)
        else:
            crc = up_crc32_copy(0, to, data, f.size)
        if check and up_crc32_header(&f, crc) != f.crc:
            self._corrupt(pos)
        self.last = f
        return target if f.dtype == _BYTES else _decode(&f, target, self.allow_pickle)

    cdef inline object _get(self, double timeout, up_frame *f):
        """get(); the frame's header into *f."""
        cdef uint64_t pos = 0
        cdef int rc = self._wait_frame(&pos, f, False, timeout, None)
        return self._got(rc, pos, f)

    cdef inline object _got(self, int rc, uint64_t pos, up_frame *f):
        """The value that _wait_frame found, or why there is none."""
        if rc == UP_OK:
            self.last = f[0]
            return _decode(f, None, self.allow_pickle)
        if rc == UP_TOOBIG:
            f[0] = up_frame_at(&self.r, pos)[0]
            return self._read_and_end(pos)
        self._nothing(rc, f)

    cdef object _read_and_end(self, uint64_t pos):
        """The value of a taken frame, which is ended whatever happens; only an interrupt (Ctrl-C) gives it back."""
        try:
            value = self._read(pos)
        except FrameCorrupt:
            self._end(pos, UP_DEAD)
            raise
        except Exception:
            self._end(pos, UP_FINISHED)
            raise
        except BaseException:
            self._return(pos)
            raise
        self._end(pos, UP_FINISHED)
        return value

    cdef _nothing(self, int rc, up_frame *f):
        """Raise why there is no frame."""
        if rc == UP_CORRUPT:
            self.last = f[0]
            self._corrupt(f.position)
        if rc == UP_END:
            raise EndOfStream(f"queue {self.label} has ended: every producer closed and every frame is finished")
        raise _queue.Empty

    cdef int _end(self, uint64_t pos, uint32_t kind) except -1:
        cdef int rc
        cdef uint64_t before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        rc = self._finish_at(pos, kind)
        up_unlock_consumers(&self.r, before)
        if rc != UP_OK:
            raise QueueError(f"the frame at {pos} of queue {self.label} is not held by this handle (it was recovered)")
        return 0

    cdef int _return(self, uint64_t pos) except -1:
        """Give a frame back. Without effect when it was recovered meanwhile."""
        cdef int rc = UP_NOTYOURS
        self._lock(self.r.c.consumer_lock)
        if up_position(UP_LD(&self.r.c.tail)) <= pos < UP_LD(&self.r.c.next):
            rc = up_give_back(&self.r, pos)
        up_unlock(self.r.c.consumer_lock)
        if rc == UP_OK:
            up_wake_consumers(&self.r, 1)
        return 0

    @cython.binding(False)
    def get(self, block=True, timeout=None):
        """Take, copy and finish the next value: what multiprocessing.Queue.get does.

        A worker that must not lose a frame when it dies uses take() and finish(), or borrow().

        Raises:
            queue.Empty, EndOfStream, FrameCorrupt, QueueClosed. What decoding raises (PickleRefused, an exception of a
            class that is unpickled): the frame is finished then, and the next get goes on behind it.
        """
        cdef up_frame f
        cdef double wait = _timeout(block, timeout)
        self._begin()
        try:
            return self._get(wait, &f)
        finally:
            self._done()

    @cython.binding(False)
    def get_nowait(self):
        """get(block=False)."""
        cdef up_frame f
        self._begin()
        try:
            return self._get(0.0, &f)
        finally:
            self._done()

    @cython.binding(False)
    def get_or(self, default, double timeout=0.0, Lull lull=None):
        """get(), but `default` when nothing came in time, or as soon as the `lull` ends (of an event loop with
        nothing to do, in whose stead we sleep)."""
        cdef up_frame f
        cdef uint64_t pos = 0
        cdef int rc
        self._begin()
        try:
            rc = self._wait_frame(&pos, &f, False, timeout, lull)
            return default if rc == UP_EMPTY else self._got(rc, pos, &f)
        finally:
            self._done()

    cdef inline object _get_soon(self, timeout):
        """get() for asyncio: the value that is there or comes in a lull of the running loop, else _EMPTY."""
        cdef up_frame f
        cdef uint64_t pos = 0
        cdef double seconds = 0.0
        cdef Lull lull
        cdef int rc
        self._begin()
        try:
            rc = self._wait_frame(&pos, &f, False, -1.0, None)
            # A poll gives way to nobody. The others do before the loop is asked, which takes as long as the rest.
            if rc == UP_EMPTY and (timeout is None or timeout > 0) and self._give_way():
                rc = self._wait_frame(&pos, &f, False, -1.0, None)
            if rc == UP_EMPTY:
                lull = _lull(timeout, &seconds)
                if lull is not None:
                    rc = self._wait_frame(&pos, &f, False, seconds, lull)
            return _EMPTY if rc == UP_EMPTY else self._got(rc, pos, &f)
        finally:
            self._done()

    def get_keyed(self, double timeout):
        """(value, key in its header): get() for who puts a meaning into keys."""
        cdef up_frame f
        self._begin()
        try:
            return self._get(timeout, &f), f.key
        finally:
            self._done()

    def take(self, block=True, timeout=None):
        """Take the next value and hold its frame until finish(), give_back() or the next take().

        If this process dies before, the frame is delivered again with its count raised. A frame whose value cannot be
        read (FrameCorrupt, or what decoding raises) is held as well: finish(dead=True) buries it.
        """
        cdef up_frame none
        cdef uint64_t pos = 0
        cdef double wait = _timeout(block, timeout)
        cdef int rc
        self._begin()
        try:
            rc = self._wait_frame(&pos, NULL, True, wait, None)
            if rc != UP_TOOBIG:
                self._nothing(rc, &none)
            return self._read(pos)
        finally:
            self._done()

    @cython.binding(False)
    def receive(self, double timeout=0.0, Lull lull=None):
        """The runtime's take: (True, value), (False, None) when empty, or None at the end of the stream. Waits up to
        `timeout` seconds, and no longer than `lull` lasts."""
        cdef uint64_t pos = 0
        cdef int rc
        self._begin()
        try:
            rc = self._wait_frame(&pos, NULL, True, timeout, lull)
            if rc == UP_TOOBIG:
                return (True, self._read(pos))
            return None if rc == UP_END else _NOTHING
        finally:
            self._done()

    cdef object _receive(self):
        """receive() without waiting but for a short spin: the value, _EMPTY or _ENDED."""
        cdef uint64_t pos = 0
        cdef int rc
        self._begin()
        try:
            rc = self._try_take(&pos, True)
            if rc == UP_EMPTY and self._spin(0):
                rc = self._try_take(&pos, True)
            if rc == UP_OK:
                return self._read(pos)
            return _ENDED if rc == UP_END else _EMPTY
        finally:
            self._done()

    def finish(self, bint dead=False):
        """End the held frame: finished, or (dead) moved to the dead letters. Nothing held: does nothing.

        Raises:
            QueueError: the frame was recovered meanwhile, so that somebody else gets it.
        """
        if self.held == 0:
            return
        self._begin()
        try:
            if self.held:  # not in a forked child, where _begin() forgot what the parent holds
                self._end_held(UP_DEAD if dead else UP_FINISHED)
        finally:
            self._done()

    cdef int _end_held(self, uint32_t kind) except -1:
        try:
            self._end(self.held - 1, kind)
        except QueueStuck:
            raise  # still ours: the next finish() tries again
        except QueueError:
            self.held = 0
            raise
        self.held = 0
        return 0

    def give_back(self):
        """Give the held frame back: it is delivered again, to anyone, with its delivery count raised."""
        if self.held == 0:
            return
        self._begin()
        try:
            if self.held:
                self._return(self.held - 1)
                self.held = 0
        finally:
            self._done()

    def detach_held(self):
        """Position of the held frame, which stays held beyond the next take(); end it with end(position)."""
        pos, self.held = self.held, 0
        return pos - 1 if pos and self.generation == _generation else None

    def end(self, uint64_t position, bint dead=False):
        """End a frame that detach_held() or recover() named."""
        self._begin()
        try:
            self._end(position, UP_DEAD if dead else UP_FINISHED)
        finally:
            self._done()

    @property
    def holding(self):
        """Position of the frame that take() holds, or None."""
        return self.held - 1 if self.held and self.generation == _generation else None

    def raw(self, uint64_t position):
        """Header and payload of a frame this handle holds, as bytes; only the ring's span is trusted."""
        self._mapped()
        cdef up_frame *f = up_frame_at(&self.r, position)
        cdef uint64_t span = up_span(UP_LD(up_state_at(&self.r, position)))
        cdef uint64_t size = 0 if f.flags & UP_FLAG_INLINE else min(f.size, span - UP_GRANULE)
        return PyBytes_FromStringAndSize(<char *>f, UP_GRANULE + size)

    def header(self):
        """Of the last frame read: (position, deliveries, execution, key, producer, epoch, timestamp ns, dtype, flags,
        size)."""
        cdef up_frame *f = &self.last
        return (f.position, f.deliveries, f.execution, f.key, f.producer, f.epoch, f.timestamp, f.dtype, f.flags,
                f.size)

    @property
    def last_execution(self):
        """Execution id of the frame that was read last."""
        return self.last.execution

    @property
    def last_flags(self):
        """Header flags of the frame that was read last."""
        return self.last.flags

    def get_many(self, Py_ssize_t max=1024, timeout=None, *, bint array=False):
        """Take, copy and finish up to `max` values; many frames per lock. Waits for the first one only.

        Returns a list, or with array=True a 1-d array of scalars: it ends where the DType changes, and a value that is
        no scalar comes back as a list of one. A frame that cannot be read ends the batch before it, and the next get
        raises.

        Raises:
            queue.Empty, EndOfStream, FrameCorrupt: as get().
        """
        cdef double wait = _timeout(True, timeout)
        if max < 1:
            raise ValueError(f"get_many takes at least 1, not {max}")
        self._begin()
        try:
            return self._get_array(max, wait) if array else self._get_list(max, wait)
        finally:
            self._done()

    cdef _get_list(self, Py_ssize_t most, double wait):
        cdef up_frame batch[BATCH]
        cdef up_frame f
        cdef Py_ssize_t n, i
        cdef int dtype = -1
        cdef list values = []
        while len(values) < most:
            n = 0
            if self.trouble is None:
                n = self._consume_batch(batch, min(BATCH, most - len(values)), False, &dtype, NULL)
            for i in range(n):
                values.append(_decode(&batch[i], None, self.allow_pickle))
            if n:
                self.last = batch[n - 1]
                continue
            if not values:  # wait; or it is a frame of the other kinds
                values.append(self._get(wait, &f))
                continue
            try:
                values.append(self._get(0.0, &f))
            except (_queue.Empty, EndOfStream):
                break
            except Exception as error:
                self.trouble = error
                break
        return values

    cdef _get_array(self, Py_ssize_t most, double wait):
        cdef up_frame batch[BATCH]
        cdef up_frame f
        cdef Py_ssize_t n = 0, i, total = 0, width, room = 0
        cdef int dtype = -1
        cdef uint8_t *to = NULL
        if self.trouble is None:
            n = self._consume_batch(batch, min(BATCH, most), True, &dtype, &room)
        if n == 0:
            first = self._get(wait, &f)
            if not (f.flags & UP_FLAG_INLINE and f.dtype in _dtype_to_num):
                return [first]
            batch[0] = f
            dtype = f.dtype
            n = 1
            room = (up_position(UP_LDA(&self.r.c.head)) - UP_LD(&self.r.c.next)) // UP_GRANULE
        room = min(most, n + room)
        out = _array_of(dtype, room)
        to = <uint8_t *>cnp.PyArray_DATA(out)
        width = cnp.PyArray_ITEMSIZE(out)
        while True:
            for i in range(n):
                _set_element(to, total + i, width, batch[i].inline_)
            total += n
            self.last = batch[n - 1]
            if total == room:
                return out
            n = self._consume_batch(batch, min(BATCH, room - total), True, &dtype, NULL)
            if n == 0:
                return out[:total]

    cdef Py_ssize_t _consume_batch(self, up_frame *batch, Py_ssize_t most, bint scalars, int *dtype,
                                   Py_ssize_t *behind) except -1:
        """Consume up to `most` frames whose decoding cannot fail, under one lock; it ends before any other frame.

        scalars: only scalars of one DType (*dtype, -1 = that of the first). *behind: granules in the ring behind them.
        """
        cdef Py_ssize_t n = 0
        cdef uint64_t pos = 0, span = 0, before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        while n < most and self.r.c.redeliver == 0 and up_peek(&self.r, &pos, &span) == UP_OK:
            if span != UP_GRANULE or not _is_plain(up_frame_at(&self.r, pos), scalars):
                break
            if scalars:
                if dtype[0] < 0:
                    dtype[0] = up_frame_at(&self.r, pos).dtype
                elif up_frame_at(&self.r, pos).dtype != dtype[0]:
                    break
            if up_consume(&self.r, &batch[n]) != UP_OK:
                break
            n += 1
        if n:
            up_advance(&self.r)
        if behind != NULL:
            behind[0] = (self.r.c.cached_head - UP_LD(&self.r.c.next)) // UP_GRANULE
        up_unlock_consumers(&self.r, before)
        return n
