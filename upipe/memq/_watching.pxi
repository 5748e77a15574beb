# Ring: views of its memory; watching, ending, recovering.


cdef class Ring(Mirrored):
    """One handle of one queue (see MemQ, which adds names, files and pickling).

    A handle belongs to its process; in a forked child it joins the queue again by itself. Threads and tasks may share
    it: each get, put, reserve and borrow stands for itself, take() holds one frame per handle.
    """
    cdef up_hold hold

    cdef uint64_t _claim(self, up_meta *m, double timeout) except? 0:
        """Claim room for a frame whose payload is written in place."""
        cdef Waiting w
        cdef uint64_t need = up_need(m.size, m.flags), pos = 0
        cdef int rc = UP_FULL
        self._fits(need)
        self._pace(need, timeout)
        _waiting(&w, 1, need, timeout)
        try:
            while True:
                self._lock(self.r.c.producer_lock)
                try:
                    rc = self._admit(need)
                    if rc == UP_OK:
                        pos = up_claim(&self.r, need, m.size)
                finally:
                    up_unlock(self.r.c.producer_lock)
                if rc == UP_OK:
                    return pos
                if not self._again(&w):
                    raise _queue.Full
        finally:
            self._left(&w, 0)

    cdef inline void _hold_off(self, up_frame *f) noexcept:
        """Leave a large frame to its writer's cache for a moment (_holdoff.h)."""
        if up_hold_fits(f.size) and up_hold_off(&self.hold, f.size, up_now_ns(CLOCK_MONOTONIC)):
            with nogil:
                up_leave_alone(f.timestamp)

    cdef object _view(self, uint64_t pos):
        """The value of a taken frame as a read-only view where it lies, checked."""
        cdef up_frame f = up_frame_at(&self.r, pos)[0]
        cdef uint8_t *data = up_payload(&self.r, pos)
        cdef uint32_t crc = 0
        cdef _Pin pin
        self.last = f
        self._checked(&f, pos)
        if f.flags & UP_FLAG_INLINE or not (f.dtype == _ARRAY or f.dtype == _BYTES):
            return self._read(pos)
        if not (self.r.c.options & UP_OPT_NO_CRC):
            self._hold_off(&f)
            with nogil:
                crc = up_crc32_in_place(data, f.size)
            if up_crc32_header(&f, crc) != f.crc:
                self._corrupt(pos)
        self.last = f
        pin = _Pin()
        pin.ring = self
        pin.data = data
        pin.size = f.size
        if f.dtype == _BYTES:
            return memoryview(pin)
        value = _array_view(&f, pin, data, False)
        if value is None:  # its dims or its item type stand before its data
            value = _frame.decode(f.dtype, f.item, f.rank, f.flags, f.inline_, f.size, memoryview(pin),
                                  allow_pickle=self.allow_pickle)
        return value

    def reserve(self, shape, dtype="u1", timeout=None, *, uint32_t key=0):
        """A writable array inside the ring, committed when the with block ends, aborted when it raises.

        Args:
            shape: int or sequence of ints: up to 8 dimensions, each below 2**(63 // their number).
            dtype: plain numeric numpy dtype (bool, integer, float, complex) in this machine's byte order.
            timeout: seconds to wait for room, None waits for ever.

        Raises (on entry):
            queue.Full, FrameTooLarge.
        """
        return Reservation(self, shape, dtype, _timeout(True, timeout), key)

    def borrow(self, timeout=None):
        """The next value as a read-only view into the ring; the with block holds the frame and finishes it at its end.

        When the block raises, the frame is given back. Values that are no arrays or bytes are decoded as usual; bytes
        come as a read-only memoryview.

        Raises (on entry):
            queue.Empty, EndOfStream, FrameCorrupt.
        """
        return Loan(self, _timeout(True, timeout))

    def peers(self):
        """[(pid, start time)] of the other processes that joined."""
        cdef uint32_t i
        self._mapped()
        mine = os.getpid()
        return [(self.r.slots[i].pid, self.r.slots[i].start) for i in range(UP_SLOTS)
                if self.r.slots[i].pid and self.r.slots[i].pid != mine]

    def recover(self, uint32_t pid, uint64_t start, uint64_t max_deliveries=0, covered=()):
        """Recover one dead process (a supervisor): that with this pid and start time (ticks after boot, as in peers()),
        so that a later process of the same number is left alone. Frames in `covered` (positions in a checkpoint) are
        finished.

        Returns the positions of frames that reached max_deliveries: this handle holds them now, for end(dead=True).

        Raises:
            QueueError: the process is not proven dead.
        """
        cdef uint64_t dead[256]
        cdef cnp.ndarray known = _sorted_positions(covered)
        cdef uint64_t *positions = <uint64_t *>cnp.PyArray_DATA(known)
        cdef size_t found, n = known.shape[0]
        cdef uint32_t i
        cdef int rc
        self._enter()
        buried = []
        for i in range(UP_SLOTS):
            if self.r.slots[i].pid != pid or self.r.slots[i].start != start:
                continue
            with nogil:
                rc = up_recover(&self.r, i, max_deliveries, dead, 256, &found, positions, n)
            if rc == UP_ALIVE and self.r.slots[i].pid == pid and self.r.slots[i].start == start:
                raise QueueError(f"process {pid} is not proven dead; queue {self.label} keeps what it holds")
            self._unstuck(rc)
            buried += [dead[k] for k in range(found)]
        return buried

    def declare_producer(self, uint32_t id):
        """Announce a producer: the stream does not end before it closed."""
        self._set_producer(id, UP_PRODUCER_DECLARED)

    def use_producer(self, uint32_t id, uint32_t epoch=0):
        """Bind this handle to a declared producer id, in its life number `epoch`."""
        cdef int rc
        self._enter()
        self._not_a_copy()
        with nogil:
            rc = up_use_producer(&self.r, id, epoch)
        self._unstuck(rc)
        if rc != UP_OK:
            raise TooManyParticipants(f"queue {self.label} has no producer id {id}")

    def close_producer(self, uint32_t id):
        """Close a producer's end of stream. Idempotent."""
        self._set_producer(id, UP_PRODUCER_CLOSED)

    def never_end(self):
        """The stream of this queue has no end: get() waits even when every producer closed."""
        self._set_producer(UP_PRODUCERS - 1, UP_PRODUCER_OPEN)

    def emitted(self, uint32_t id):
        """Frames that producer id got into the ring in all its lives (its dead lives recovered)."""
        self._mapped()
        return up_emitted(&self.r, id)

    def set_policy(self, uint32_t policy):
        """0 block, 1 drop_oldest, 2 latest, 3 discard (nobody will read: drop and count all); from now on."""
        self._mapped()
        self.r.c.policy = policy
        if policy == UP_POLICY_DISCARD:
            self._drop(0, True)
        up_wake_all(&self.r)

    def shed(self, uint64_t room):
        """Drop frames nobody took, oldest first and counted, until a frame of `room` ring bytes would fit; none while a
        frame that is held is in the way. For the keeper of a sink copy, which no drop policy reaches."""
        self._begin()
        try:
            self._drop(room, False)
        finally:
            self._done()

    def wake_all(self):
        """Wake every sleeper: each looks again."""
        self._mapped()
        up_wake_all(&self.r)

    @property
    def ended(self):
        """True when every producer closed and every frame is finished."""
        self._mapped()
        return bool(up_ended(&self.r))

    @property
    def capacity(self):
        """Bytes of the ring, headers included."""
        return self.r.capacity

    @property
    def execution_id(self):
        """Execution id put into the frames to come."""
        return self.execution

    @execution_id.setter
    def execution_id(self, uint64_t value):
        self.execution = value

    def counters(self):
        """All counters as a dict (QueueStats gives them names and meaning)."""
        cdef up_control *c
        cdef up_books head, tail
        cdef uint64_t head_pos, tail_pos
        self._mapped()
        c = self.r.c
        up_books_read(&c.tail, c.tail_books, &tail_pos, &tail)
        up_books_read(&c.head, c.head_books, &head_pos, &head)
        oldest = 0
        state = up_kind(UP_LDA(up_state_at(&self.r, tail_pos)))
        if head_pos != tail_pos and state in (UP_COMMITTED, UP_AVAILABLE, UP_TAKEN):
            oldest = up_frame_at(&self.r, tail_pos).timestamp
        pids = [self.r.slots[i].pid for i in range(UP_SLOTS) if self.r.slots[i].pid]
        return {
            "capacity": c.capacity, "head": head_pos, "tail": tail_pos, "next": UP_LD(&c.next),
            "depth": up_in_use(&self.r, head_pos, &head, &tail), "claimed": head.frames, "bytes": head.bytes,
            "refused": head.dropped,
            "passed": tail.frames, "finished": tail.finished, "dropped": tail.dropped, "dead": tail.dead,
            "aborted": tail.aborted, "redelivered": c.redelivered, "corrupt": c.corrupt, "taken": c.taken,
            "max_depth": c.max_depth, "full_waits": c.full_waits, "empty_waits": c.empty_waits,
            "oldest_ns": oldest, "policy": c.policy, "stream": c.stream, "max_frames": c.max_frames,
            "participants": len(set(pids)), "handles": len(pids),
        }

    @property
    def room(self):
        """Bytes that no frame uses now. A hint: others write and finish meanwhile."""
        cdef up_books head, tail
        cdef uint64_t pos
        self._mapped()
        up_books_read(&self.r.c.tail, self.r.c.tail_books, &pos, &tail)
        up_books_read(&self.r.c.head, self.r.c.head_books, &pos, &head)
        return self.r.capacity - up_in_use(&self.r, pos, &head, &tail)

    def in_flight(self):
        """Frames between their claim and their end: those that wait and those that somebody holds."""
        cdef up_books head, tail
        cdef uint64_t pos
        self._mapped()
        up_books_read(&self.r.c.tail, self.r.c.tail_books, &pos, &tail)
        up_books_read(&self.r.c.head, self.r.c.head_books, &pos, &head)
        return head.frames - tail.frames

    def wait_frames(self, uint64_t fewer, double timeout):
        """Sleep until fewer than that many frames are in flight. False when the timeout (seconds) passed."""
        cdef Waiting w
        self._begin()
        try:
            _waiting(&w, 1, 0, timeout)
            while self.in_flight() >= fewer:
                if not self._again(&w):
                    return False
            return True
        finally:
            self._left(&w, 0)
            self._done()

    def qsize(self):
        """Frames that nobody has taken yet (a moment's count)."""
        cdef uint64_t pos, head, span, waiting
        cdef up_control *c
        self._open()
        c = self.r.c
        self._lock(c.consumer_lock)
        pos = UP_LD(&c.next)
        head = up_position(UP_LDA(&c.head))
        waiting = c.redeliver
        while pos < head:
            span = UP_LDA(up_state_at(&self.r, pos))
            waiting += up_kind(span) == UP_COMMITTED
            pos += up_span(span)
        up_unlock(c.consumer_lock)
        return waiting

    def empty(self):
        """True when get_nowait would raise Empty (a moment's truth)."""
        cdef uint64_t pos, span, before
        self._open()
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        cdef bint nothing = self.r.c.redeliver == 0 and up_peek(&self.r, &pos, &span) != UP_OK
        up_unlock_consumers(&self.r, before)
        return nothing

    def full(self):
        """True when not even a frame of 8 bytes has room (a moment's truth)."""
        self._open()
        self._lock(self.r.c.producer_lock)
        try:
            return self._room(UP_GRANULE) != UP_OK
        finally:
            up_unlock(self.r.c.producer_lock)

    cdef int _open(self) except -1:
        if self.closed or not self.mapped:
            raise QueueClosed(f"this handle of queue {self.label} is closed")
        return 0
