# Lull: an event loop that has nothing to do, so that its task may sleep in its stead.

cdef class Watch:
    """Base of wakeup.PeerWatch."""
    cdef public int64_t joined  # the queue's count of registrations when the list was made; another count: look again

    def __cinit__(self, *args, **kwargs):
        self.joined = -1


cdef class Lull:
    """A wait that ends as well when the descriptor `fd` becomes readable: that of a loop in whose stead a task sleeps.

    The first few sleep in poll(2) on doorbell and descriptor. When frames end them one after the other, naps on a
    futex follow, while the lookout watches the descriptor: 2 system calls a frame instead of 5. Whatever else ends one
    begins again.

    Owner: the loop (wakeup keeps it as long as that); the descriptor is the loop's.
    """
    cdef readonly int fd
    cdef readonly int frames    # waits in a row that a frame ended, up to OFTEN
    cdef uint64_t post          # of the lookout, 0 = none

    def __cinit__(self, int fd):
        self.fd = fd

    def __dealloc__(self):
        up_post_end(self.post)

    cdef inline void ended(self, bint by_frame) noexcept:
        self.frames = min(OFTEN, self.frames + 1) if by_frame else 0

    cdef bint naps(self) noexcept:
        """May the next sleep be a nap? Then the lookout watches."""
        if self.frames < OFTEN:
            return False
        if up_post_quiet(self.post) or up_post_again(self.post):
            return True
        up_post_end(self.post)
        self.post = up_post_new(self.fd, NULL, NULL)
        if self.post == 0:
            self.frames = 0
        return self.post != 0


cdef object _lull_loop = None   # the loop that asked last, and its Lull: asking which loop runs costs a getpid
cdef Lull _lull_last = None
cdef object _lull_find = None   # wakeup._lull_of


cdef Lull _lull(timeout, double *seconds):
    """The running loop's Lull when it has nothing else to do, else None. seconds: until it has, or `timeout`."""
    global _lull_loop, _lull_last, _lull_find
    cdef double left
    loop = _lull_loop
    try:
        if loop is None or loop._thread_id != PyThread_get_thread_ident():
            if _lull_find is None:
                from upipe.memq import wakeup
                _lull_find = wakeup._lull_of
            loop, _lull_last = _lull_find()
            _lull_loop = loop
        if loop._ready or loop._stopping or loop._debug:
            return None
        timers = loop._scheduled
        left = timers[0]._when - loop.time() if timers else INFINITY
    except AttributeError:  # uvloop, and whatever comes
        _lull_loop = _lull_last = None
        return None
    seconds[0] = left if timeout is None else min(left, <double>timeout)
    return _lull_last if seconds[0] > 0 else None


def lull(timeout=None):
    """When the running loop has nothing else to do: (seconds until it has, or `timeout`; its Lull). Else None.

    The task may then sleep in its stead, as long as the loop's descriptor is quiet, and a frame need not travel through
    selector, handle, future and task, which is most of the way. None with another kind of loop, and in debug mode,
    which would call that slow.
    """
    cdef double seconds = 0
    found = _lull(timeout, &seconds)
    return None if found is None else (seconds, found)
