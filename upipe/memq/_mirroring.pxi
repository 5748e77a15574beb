# Mirrored: the two copies of a queue over two nodes; see _mirror.h.


cdef class Mirrored(Taker):
    """What a mirror does with its copy of a queue. Positions are bytes of the stream, equal in both copies.

    Source copy: outgoing() what the sink copy has not, retire() what it finished. Sink copy: receive into landing(),
    publish(), and tell settled(). One mirror at a time; after kill -9 of it another goes on by position.
    """

    def mirror_source(self, uint64_t epoch):
        """From now on only a mirror reads this queue. Returns the tail, where the sink copy of a new epoch begins.

        Raises:
            MirrorRefused: a mirror of a later epoch was here (code "stale-epoch").
        """
        self._begin()
        try:
            self._lock(self.r.c.consumer_lock)
            rc = up_mirror_source(&self.r, epoch)
            up_unlock(self.r.c.consumer_lock)
            self._not_stale(rc, epoch)
            return up_position(UP_LDA(&self.r.c.tail))
        finally:
            self._done()

    def mirror_sink(self, uint64_t epoch):
        """From now on only a mirror writes this queue. Raises MirrorRefused as mirror_source()."""
        self._begin()
        try:
            self._lock(self.r.c.consumer_lock)
            rc = up_mirror_sink(&self.r, epoch)
            up_unlock(self.r.c.consumer_lock)
            self._not_stale(rc, epoch)
        finally:
            self._done()

    def mirror_local(self):
        """The epoch is over: consumers of this host read the source copy again. What was sent and is not retired is
        given back to them, with its delivery count as it is. Idempotent."""
        self._begin()
        try:
            self._lock(self.r.c.consumer_lock)
            up_mirror_local(&self.r)
            up_unlock(self.r.c.consumer_lock)
            up_wake_all(&self.r)
        finally:
            self._done()

    cdef int _not_stale(self, int rc, epoch) except -1:
        if rc == UP_STALE:
            raise MirrorRefused("stale-epoch", f"queue {self.label} has seen a mirror of epoch "
                                f"{self.r.c.mirror_epoch}; one of epoch {epoch} is too old, and must stop")
        return 0

    @property
    def mirror(self):
        """(0 none, 1 source copy, 2 sink copy; epoch)."""
        self._mapped()
        return self.r.c.mirror, self.r.c.mirror_epoch

    @property
    def head(self):
        """Position after the last frame (of a sink copy: what was received)."""
        self._mapped()
        return up_position(UP_LDA(&self.r.c.head))

    @property
    def stream_closed(self):
        """True when every producer closed; head is where the stream ends then."""
        self._mapped()
        return UP_LDA32(&self.r.c.stream) == UP_STREAM_CLOSED  # SYNC stream

    def settled(self):
        """(tail, dropped, dead): the position before which all is finished, and the books up to there, as one moment's
        truth."""
        cdef up_books passed
        cdef uint64_t pos
        self._mapped()
        up_books_read(&self.r.c.tail, self.r.c.tail_books, &pos, &passed)
        return pos, passed.dropped, passed.dead

    def standing(self, uint32_t but):
        """(closed, tail, head, emitted, finished, dead, dropped, aborted, redelivered, bytes) as one moment's truth:
        `closed` when no producer except `but` can put any more, and tail == head only when nothing was in it then."""
        cdef up_books head, tail
        cdef uint64_t head_pos, tail_pos
        cdef uint32_t i, state
        cdef bint closed = True
        self._mapped()
        for i in range(UP_PRODUCERS):
            state = UP_LDA32(&self.r.producers[i].state)
            if i != but and (state == UP_PRODUCER_DECLARED or state == UP_PRODUCER_OPEN):
                closed = False
                break
        up_books_read(&self.r.c.tail, self.r.c.tail_books, &tail_pos, &tail)  # after the producers, before head
        up_books_read(&self.r.c.head, self.r.c.head_books, &head_pos, &head)
        return (closed, tail_pos, head_pos, head.frames - tail.aborted + head.dropped, tail.finished, tail.dead,
                tail.dropped + head.dropped, tail.aborted, self.r.c.redelivered, head.bytes)

    def written(self, uint64_t position):
        """When the frame at a boundary before head was written, ns since 1970; 0: none is there."""
        self._mapped()
        if position % UP_GRANULE or not up_position(UP_LDA(&self.r.c.tail)) <= position < up_position(
                UP_LDA(&self.r.c.head)):
            return 0
        state = up_kind(UP_LDA(up_state_at(&self.r, position)))
        if state != UP_COMMITTED and state != UP_AVAILABLE and state != UP_TAKEN:
            return 0
        return up_frame_at(&self.r, position).timestamp

    def is_boundary(self, uint64_t position):
        """True when a frame starts at a position, or the ring ends there, or it is passed."""
        self._begin()
        try:
            self._lock(self.r.c.consumer_lock)
            found = up_is_boundary(&self.r, position)
            up_unlock(self.r.c.consumer_lock)
            return bool(found)
        finally:
            self._done()

    def outgoing(self, uint64_t cursor, uint64_t most):
        """What follows a boundary of the source copy, None when there is nothing that can be sent.

        Returns (view, end, frames): `view` are the bytes [cursor, end) in the ring, whole frames, about `most` bytes or
        one frame; they stay until retired. None for `view`: a hole; padding and dropped frames, which nobody will read.
        """
        cdef uint64_t end, before, frames
        cdef _Pin pin
        cdef int rc
        self._begin()
        try:
            self._lock(self.r.c.consumer_lock)
            before = UP_LD(&self.r.c.tail)
            rc = up_outgoing(&self.r, cursor, most, &end, &frames)
            up_unlock_consumers(&self.r, before)
            if rc == UP_EMPTY:
                return None
            if rc == UP_END:
                return None, end, frames
            pin = _Pin()
            pin.ring = <Ring>self
            pin.data = <uint8_t *>up_frame_at(&self.r, cursor)
            pin.size = end - cursor
            return memoryview(pin), end, frames
        finally:
            self._done()

    def retire(self, uint64_t position, uint64_t dropped, uint64_t dead):
        """The sink copy settled() so: tail and books of the source copy follow, who waits for room is woken. Old news
        is ignored.

        Raises:
            MirrorRefused: the source copy has no such position or books (code "bad-position"); nothing was changed.
        """
        cdef uint64_t before
        cdef int rc
        self._begin()
        try:
            self._lock(self.r.c.consumer_lock)
            before = UP_LD(&self.r.c.tail)
            rc = up_retire(&self.r, position, dropped, dead)
            up_unlock_consumers(&self.r, before)
            if rc != UP_OK:
                raise MirrorRefused("bad-position", f"queue {self.label} cannot be finished up to {position} with "
                                    f"{dropped} dropped and {dead} dead: its tail is {up_position(before)}, it sent "
                                    f"up to {UP_LD(&self.r.c.next)}; the sink copy is one of another queue or epoch")
        finally:
            self._done()

    def landing(self, uint64_t offset, uint64_t most):
        """Writable ring memory `offset` bytes behind the head of a sink copy: up to `most` bytes, less when there is no
        more room."""
        cdef _Pin pin = _Pin()
        cdef uint64_t room
        self._begin()
        try:
            room = self.r.capacity - (up_position(UP_LD(&self.r.c.head)) - up_position(UP_LDA(&self.r.c.tail)))
            pin.ring = <Ring>self
            pin.data = <uint8_t *>up_frame_at(&self.r, up_position(UP_LD(&self.r.c.head))) + offset
            pin.size = min(most, room - offset) if offset < room else 0
            pin.writable = True
            return memoryview(pin)
        finally:
            self._done()

    def publish(self, uint64_t landed):
        """`landed` bytes were received behind head: the whole frames among them can be taken from now on. Returns their
        bytes.

        Raises:
            MirrorRefused: these are no frames for these positions (code "malformed"); nothing was changed.
        """
        cdef uint64_t published = 0, frames = 0
        cdef int rc
        self._begin()
        try:
            self._lock(self.r.c.producer_lock)
            rc = up_publish_landed(&self.r, landed, &published, &frames)
            up_unlock(self.r.c.producer_lock)
            if rc != UP_OK:
                raise MirrorRefused("malformed", f"what was received for queue {self.label} behind position "
                                    f"{self.head} is no frame, of another version, or does not fit; nothing was kept")
            if frames:
                up_wake_consumers(&self.r, frames)
                if self.r.c.policy >= UP_POLICY_LATEST:
                    self._drop_arrived()
            return published
        finally:
            self._done()

    cdef int _drop_arrived(self) except -1:
        cdef uint64_t before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        up_drop_arrived(&self.r)
        up_unlock_consumers(&self.r, before)
        return 0

    def skip(self, uint64_t span):
        """`span` bytes of the source copy are a hole: padding in the sink copy. Raises MirrorRefused as publish()."""
        cdef uint64_t piece, room
        cdef int rc = UP_OK
        self._begin()
        try:
            while span and rc == UP_OK:  # a hole larger than the ring has only finished frames before it
                self._lock(self.r.c.producer_lock)
                room = up_landing_room(&self.r)
                piece = min(span, room)
                rc = up_publish_hole(&self.r, piece)
                up_unlock(self.r.c.producer_lock)
                span -= piece
                self._pass_padding()
            if rc != UP_OK:
                raise MirrorRefused("malformed", f"a hole behind {self.head} of queue {self.label} has no room")
            up_wake_consumers(&self.r, 1)
        finally:
            self._done()

    cdef int _pass_padding(self) except -1:
        """No consumer need be there to pass it."""
        cdef uint64_t before, pos, span_
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        up_peek(&self.r, &pos, &span_)
        up_unlock_consumers(&self.r, before)
        return 0

    def arm_tail(self, uint64_t position):
        """Ring bell(1) when tail reaches a position, 0: when it moves. Look again after this."""
        self._begin()
        try:
            self._bell(1)
            self.r.slots[self.r.slot].need_tail = position
            up_arm(&self.r, self.r.c.producers_waiting)
        finally:
            self._done()
