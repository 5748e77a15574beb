# Pacer: large frames do not run far ahead of a consumer that keeps up.

cdef enum:
    PACED = 262144          # ring bytes of a frame that is paced: smaller ones stay in the caches by their number
    AHEAD = 4194304         # bytes in use that are still warm at both ends, or two frames: one written, one read

cdef double KEEPS_UP = 5e9  # bytes a second: who takes so many is as fast as memory, and faster from the caches


cdef class Pacer(Sleeper):
    """A put that may wait lets a fast consumer catch up before it claims.

    Who writes faster than the consumer reads fills the ring, and then every frame goes through memory: both ends run at
    its speed instead of that of the caches, and the consumer, who sets the pace, gains nothing from the frames that
    wait. So with more than AHEAD in use the claim waits until half of that is left: only as long as the consumers take
    what is in use at KEEPS_UP, which was measured in the milliseconds before. A consumer that works on its frames is
    slower; ahead of it the ring is filled as before. This is about speed and nothing else: whether there is room the
    ring says.
    """

    cdef uint64_t passed        # ring bytes that tail had passed when it was last looked at
    cdef double looked_at       # seconds; 0 = never
    cdef bint keeps_up          # the consumers took KEEPS_UP between the last two looks

    cdef uint64_t _used(self, uint64_t *passed) noexcept:
        """Ring bytes in use; *passed: those that are not any more, in all."""
        cdef up_books claimed, ended
        cdef uint64_t head, tail
        up_books_read(&self.r.c.tail, self.r.c.tail_books, &tail, &ended)
        up_books_read(&self.r.c.head, self.r.c.head_books, &head, &claimed)
        passed[0] = ended.bytes
        return up_in_use(&self.r, head, &claimed, &ended)

    cdef int _pace(self, uint64_t need, double timeout) except -1:
        """Before the claim of a frame of `need` ring bytes that may wait up to `timeout` seconds for its room."""
        cdef uint64_t used, passed = 0
        cdef double now, since
        if need < PACED or timeout <= 0 or self.r.c.policy != UP_POLICY_BLOCK:
            return 0
        used = self._used(&passed)
        now = _now()
        since = now - self.looked_at
        if since >= 0.001 and since * KEEPS_UP >= 4.0 * need:  # long enough to be no chance
            self.keeps_up = passed - self.passed >= since * KEEPS_UP
            self.passed = passed
            self.looked_at = now
        if self.keeps_up and used + need > max(2 * need, <uint64_t>AHEAD):
            self._let_catch_up(need, used, min(timeout, 0.0001 + used / KEEPS_UP))
        return 0

    cdef int _let_catch_up(self, uint64_t need, uint64_t used, double timeout) except -1:
        """Wait until the frame and what is in use before it are at most half of AHEAD, or two frames."""
        cdef Waiting w
        cdef uint64_t half = AHEAD // 2, most = max(need, half - min(need, half)), passed = 0
        _waiting(&w, 1, max(self.r.capacity - min(most, self.r.capacity), <uint64_t>UP_GRANULE), timeout)
        w.exact = True
        try:
            while self._used(&passed) > most:
                if not self._again(&w):
                    self.keeps_up = False
                    break
        finally:
            self._left(&w, 0)
        return 0
