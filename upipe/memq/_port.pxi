# Ports: what a processor calls for each frame, when one queue and nothing special stands behind it.

cdef object _ENDED = object()


@cython.final
cdef class Way:
    """Whether frames go straight to and from their queue. Any thread may close it; then the slow methods are asked."""
    cdef public bint direct

    def __cinit__(self, bint direct=True):
        self.direct = direct


cdef class Port:
    """One end of one queue. `slow` does the same in every other case (no room, nothing there, a call, a drain ...)."""
    cdef Ring ring
    cdef Way way
    cdef object slow, later
    cdef int turns, every

    def __cinit__(self, Ring ring, Way way, slow, later, int every, *args):
        self.ring = ring
        self.way = way
        self.slow = slow
        self.later = later
        self.turns = self.every = every

    cdef object _done(self, value):
        """An awaitable of value, done but for every `every`-th, which gives the event loop a turn."""
        self.turns -= 1
        if self.turns > 0:
            return READY_TRUE if value is True else Ready.__new__(Ready, value)
        self.turns = self.every
        return self.later(value)

    cdef bint _sent(self, value, dtype, to) except -1:
        return (to is None and self.way.direct
                and self.ring._send(value, -1 if dtype is None else <int>dtype, 0.0, 0, 0, 0))


@cython.final
cdef class Emitter(Port):
    """emit and emit_sync of a processor with one plain edge."""

    @cython.binding(False)
    def emit(self, value, dtype=None, *, to=None):
        """As Processor.emit."""
        if self._sent(value, dtype, to):
            return self._done(True)
        return self.slow(value, dtype, to=to)

    @cython.binding(False)
    def emit_sync(self, value, dtype=None, *, timeout=None, to=None):
        """As Processor.emit_sync."""
        if self._sent(value, dtype, to):
            return self._done(True)
        return self.slow(value, dtype, timeout=timeout, to=to)


@cython.final
cdef class Getter(Port):
    """get_sync of a processor with one input. `took` is told of a frame that belongs to a call, `unreadable` of one
    that cannot be read."""
    cdef object took, unreadable

    def __init__(self, ring, way, slow, later, every, took, unreadable):
        self.took = took
        self.unreadable = unreadable

    @cython.binding(False)
    def get_sync(self, timeout=None):
        """As Processor.get_sync."""
        if not self.way.direct:
            return self.slow(timeout)
        try:
            value = self.ring._receive()
        except FrameError as error:
            self.unreadable(error)
            return self.slow(timeout)
        if value is _EMPTY or value is _ENDED:
            return self.slow(timeout)
        if self.ring.last.execution:
            self.took()
        return self._done(value)
