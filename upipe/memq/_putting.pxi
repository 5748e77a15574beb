# Putter: putting frames.


cdef class Putter(Pacer):
    """Putting frames."""

    cdef int _copy_in(self, uint64_t pos, Out *o, list parts, uint32_t *crc) except -1:
        cdef uint8_t *to = up_payload(&self.r, pos)
        cdef uint64_t left = o.m.size
        cdef Py_buffer view
        crc[0] = 0
        if o.m.flags & UP_FLAG_INLINE:
            return 0
        cdef bint check = not (self.r.c.options & UP_OPT_NO_CRC)
        cdef uint32_t c = 0
        if parts is None:
            if not check:
                with nogil:
                    memcpy(to, o.data, o.m.size)
            elif o.m.size >= LARGE:
                with nogil:
                    c = up_crc32_copy(0, to, o.data, o.m.size)
            else:
                c = up_crc32_copy(0, to, o.data, o.m.size)
        else:
            for part in parts:
                PyObject_GetBuffer(part, &view, PyBUF_SIMPLE)
                try:
                    if <uint64_t>view.len > left:
                        break
                    with nogil:
                        c = up_crc32_copy(c, to, view.buf, view.len)
                    to += view.len
                    left -= view.len
                finally:
                    PyBuffer_Release(&view)
            else:
                if left == 0:
                    crc[0] = c
                    return 0
            raise EncodeError(f"the buffers of a value changed their size while it was put into queue {self.label}; "
                              "nothing was put")
        crc[0] = c
        return 0

    cdef inline int _try_put(self, Out *o, list parts) except -100:
        """One attempt. UP_OK, UP_FULL, or UP_REFUSED (a drop policy dropped the newcomer)."""
        cdef uint64_t need = up_need(o.m.size, o.m.flags), pos = 0
        cdef bint small = (o.m.flags & UP_FLAG_INLINE) != 0
        cdef int rc = UP_REFUSED
        if not small:
            self._fits(need)
        self._lock(self.r.c.producer_lock)
        if small and up_put_locked(&self.r, &o.m) == UP_OK:
            return UP_OK
        try:
            if self.r.c.policy != UP_POLICY_DISCARD:
                rc = self._admit(need)
            if rc == UP_REFUSED:
                up_count_refused(&self.r)
            elif rc == UP_OK and small:
                up_put_inline(&self.r, &o.m)
            elif rc == UP_OK:
                pos = up_claim(&self.r, need, o.m.size)
        finally:
            up_unlock(self.r.c.producer_lock)
        if rc != UP_OK:
            return rc
        if small:
            up_wake_consumers(&self.r, 1)
        else:
            self._fill(pos, o, parts)
        return UP_OK

    cdef int _fill(self, uint64_t pos, Out *o, list parts) except -1:
        """Write a claimed frame and commit it; on an exception it becomes padding."""
        cdef uint32_t crc = 0
        try:
            self._copy_in(pos, o, parts, &crc)
        except BaseException:
            self._abort(pos)
            raise
        up_commit(&self.r, pos, &o.m, crc)
        up_wake_consumers(&self.r, 1)
        return 0

    cdef int _admit(self, uint64_t need) except -100:
        """Under the producers' lock: room for a newcomer of so many ring bytes, made by dropping if the policy says so.
        UP_OK: claim it now. UP_FULL. UP_REFUSED: it is to be dropped itself, and counted."""
        cdef uint32_t policy = self.r.c.policy
        cdef uint64_t before
        cdef int rc
        if policy == UP_POLICY_BLOCK:
            return self._room(need)
        if up_room(&self.r, need, 1) == UP_OK and (policy == UP_POLICY_DROP_OLDEST or self._nothing_waits()):
            return UP_OK
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        rc = up_make_room(&self.r, need)
        up_unlock_consumers(&self.r, before)
        return rc

    cdef int _room(self, uint64_t need) except -100:
        """Under the producers' lock: is there room, with nothing dropped? Padding that no consumer passed goes (and
        gaps). UP_OK or UP_FULL."""
        cdef uint64_t before, pos, span
        if up_room(&self.r, need, 1) == UP_OK:
            return UP_OK
        if self._nothing_waits() or up_kind(UP_LDA(up_state_at(&self.r, UP_LD(&self.r.c.next)))) < UP_ABORTED:
            return UP_FULL
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        up_peek(&self.r, &pos, &span)
        up_unlock_consumers(&self.r, before)
        return up_room(&self.r, need, 1)

    cdef inline bint _nothing_waits(self) noexcept:
        """Under the producers' lock, which keeps head where it is, while next only grows."""
        return UP_LD(&self.r.c.next) == up_position(UP_LD(&self.r.c.head))

    cdef void _abort(self, uint64_t pos) noexcept:
        """A claim of ours becomes padding."""
        up_abort(&self.r, pos)
        up_wake_consumers(&self.r, 1)

    cdef int _drop(self, uint64_t need, bint all_) except -1:
        cdef uint64_t before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        up_drop(&self.r, need, all_)
        up_unlock_consumers(&self.r, before)
        return 0

    cdef int _fits(self, uint64_t need) except -1:
        if need > self.r.capacity:
            raise FrameTooLarge(f"a frame of {need:,} bytes (64 of them header) can never fit queue {self.label} of "
                                f"{self.r.capacity:,} bytes; make the queue larger or the frame smaller")
        return 0

    cdef inline int _put(self, Out *o, list parts, double timeout) except -100:
        """Put, waiting up to timeout seconds (inf = for ever). UP_OK, UP_REFUSED or UP_FULL."""
        cdef Waiting w
        cdef int rc
        if not o.m.flags & UP_FLAG_INLINE:
            self._pace(up_need(o.m.size, o.m.flags), timeout)
        rc = self._try_put(o, parts)
        if rc != UP_FULL:
            return rc
        _waiting(&w, 1, up_need(o.m.size, o.m.flags), timeout)
        try:
            while rc == UP_FULL and self._again(&w):
                rc = self._try_put(o, parts)
            return rc
        finally:
            self._left(&w, 0)

    @cython.binding(False)
    def put(self, value, block=True, timeout=None, *, int dtype=-1, uint32_t key=0):
        """Put one value, waiting for room. A large frame (256 KiB) also waits a moment, less than 0.1 ms and the
        time in which 5 GB/s take what is in the ring, for consumers that keep up: both are faster within the caches.

        Args:
            value: anything a frame can carry; the DType is chosen from it unless `dtype` forces one.
            block: False raises Full at once when there is no room.
            timeout: seconds to wait, None waits for ever.
            dtype: a DType code to force.
            key: hash of a partition key, carried in the header.

        Raises:
            queue.Full, EncodeError, FrameTooLarge, QueueClosed, PickleRefused.
        """
        if not self._send(value, dtype, _timeout(block, timeout), self.execution, key, 0):
            raise _queue.Full

    @cython.binding(False)
    def put_nowait(self, value):
        """put(value, block=False)."""
        if not self._send(value, -1, 0.0, self.execution, 0, 0):
            raise _queue.Full

    @cython.binding(False)
    def send(self, value, int dtype=-1, double timeout=0.0, uint64_t execution=0, uint32_t key=0, int flags=0):
        """The runtime's put: True when it is in (or was dropped by policy), False when there was no room in time."""
        return self._send(value, dtype, timeout, execution, key, flags)

    cdef inline bint _send(self, value, int dtype, double timeout, uint64_t execution, uint32_t key,
                           int flags) except -1:
        cdef Out o
        self._begin()
        try:
            parts = _encode(value, dtype, &o, self.allow_pickle)
            self._produce()  # after the value has proved good: who puts nothing has no end of stream to close
            o.m.execution = execution
            o.m.key = key
            o.m.flags |= flags
            return self._put(&o, parts, timeout) != UP_FULL
        finally:
            self._done()

    def put_many(self, values, int dtype=-1, timeout=None):
        """Put each element of an iterable, or each scalar of a 1-d array, as a frame of its own; many frames per lock.

        Returns the number of frames put: all of them, or fewer when `timeout` (seconds, None = for ever) ran out.
        When an element cannot be put (EncodeError, FrameTooLarge ...), those before it are in.
        """
        cdef double wait = _timeout(True, timeout), deadline
        self._begin()
        try:
            self._produce()
            deadline = _now() + wait
            if isinstance(values, cnp.ndarray):
                flat = _scalar_array(values, dtype)
                if flat is not None:
                    return self._put_array(flat, deadline)
                values = values.tolist() if values.ndim == 1 and values.dtype != object else list(values)
            return self._put_sequence(values if isinstance(values, (list, tuple)) else list(values), dtype, deadline)
        finally:
            self._done()

    cdef Py_ssize_t _put_batch(self, Out *outs, Py_ssize_t n, double deadline) except -1:
        """Put n inline frames, waiting for room. Returns how many are in when the deadline passes."""
        cdef Py_ssize_t done = 0, k, i
        cdef uint64_t bytes_
        while done < n:
            k = 0
            if self.r.c.policy <= UP_POLICY_DROP_OLDEST:
                k = n - done
                bytes_ = 0
                self._lock(self.r.c.producer_lock)
                while k and up_room(&self.r, k * UP_GRANULE, k) != UP_OK:
                    k //= 2
                if k:
                    up_open(&self.r, k * UP_GRANULE)
                for i in range(k):
                    up_put_inline_at(&self.r, &outs[done + i].m, i * UP_GRANULE)
                    bytes_ += outs[done + i].m.size
                if k:
                    up_publish(&self.r, k * UP_GRANULE, k, bytes_)
                up_unlock(self.r.c.producer_lock)
            if k:
                up_wake_consumers(&self.r, k)
                done += k
            elif self._put(&outs[done], None, max(0.0, deadline - _now())) == UP_FULL:
                break
            else:
                done += 1
        return done

    cdef _put_array(self, cnp.ndarray values, double deadline):
        cdef Py_ssize_t done = 0, total = values.shape[0], width = values.itemsize, n, i, k
        cdef const uint8_t *data = <const uint8_t *>cnp.PyArray_DATA(values)
        cdef Out outs[BATCH]
        _meta(&outs[0].m, _item_to_dtype[_item_of(values)], UP_FLAG_INLINE, width)
        outs[0].m.execution = self.execution
        for i in range(1, min(BATCH, total)):
            outs[i] = outs[0]
        while done < total:
            n = min(BATCH, total - done)
            if done:
                outs[0].m.timestamp = up_now_ns(CLOCK_REALTIME)
            for i in range(n):
                outs[i].m.inline_ = _element(data, done + i, width)
                outs[i].m.timestamp = outs[0].m.timestamp
            k = self._put_batch(outs, n, deadline)
            done += k
            if k < n:
                break
        return done

    cdef _put_sequence(self, values, int dtype, double deadline):
        cdef Py_ssize_t done = 0, total = len(values), n, k
        cdef Out outs[BATCH]
        cdef list parts
        cdef bint single
        while done < total:
            n = 0
            single = False
            while n < BATCH and done + n < total:
                try:
                    parts = _encode(values[done + n], dtype, &outs[n], self.allow_pickle)
                except Exception:
                    if n == 0:
                        raise
                    break  # those before it go in first
                outs[n].m.execution = self.execution
                if not outs[n].m.flags & UP_FLAG_INLINE:
                    single = True
                    break
                n += 1
            k = self._put_batch(outs, n, deadline)
            done += k
            if k < n:
                break
            if single:
                if self._put(&outs[n], parts, max(0.0, deadline - _now())) == UP_FULL:
                    break
                done += 1
        return done
