# Ports: what a processor calls for each frame, when plain queues and nothing special stand behind it.

cdef object _ENDED = object()


@cython.final
cdef class Way:
    """Whether frames go straight to and from their queue. Any thread may close it; then the slow methods are asked."""
    cdef public bint direct

    def __cinit__(self, bint direct=True):
        self.direct = direct


cdef class Port:
    """One end. `slow` does the same in every other case (no room, nothing there, a call, a drain ...)."""
    cdef Way way
    cdef object slow, later
    cdef int turns, every

    def __cinit__(self, queues, Way way, slow, later, int every, *args):
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


@cython.final
cdef class Emitter(Port):
    """emit and emit_sync of a processor with plain edges: each value goes to every one of `rings`, or to none."""
    cdef Ring only          # of one edge; else None
    cdef tuple rings

    def __init__(self, tuple rings, *args):
        self.rings = rings
        self.only = rings[0] if len(rings) == 1 else None

    cdef inline bint _sent(self, value, dtype, to) except -1:
        if to is not None or not self.way.direct:
            return False
        code = -1 if dtype is None else <int>dtype
        if self.only is not None:
            return self.only._send(value, code, 0.0, 0, 0, 0)
        return _fan_put(self.rings, value, code, 0, (), 0)

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
    cdef Ring ring
    cdef object took, unreadable

    def __init__(self, Ring ring, way, slow, later, every, took, unreadable):
        self.ring = ring
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
