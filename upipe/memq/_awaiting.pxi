# What aput and aget return: coroutines without a Python frame of their own, as long as they need not wait in the loop.

cdef extern from *:
    """
    static PyAsyncMethods up_awaited_async;
    static void up_awaited_patch(PyTypeObject *type, void *send) {
        up_awaited_async = *type->tp_as_async;
        up_awaited_async.am_send = (sendfunc)send;
        type->tp_as_async = &up_awaited_async;
    #ifdef _Py_TPFLAGS_HAVE_AM_SEND
        type->tp_flags |= _Py_TPFLAGS_HAVE_AM_SEND;
    #endif
        PyType_Modified(type);
    }
    """
    void up_awaited_patch(PyTypeObject *type, void *send)

cdef extern from "Python.h":
    ctypedef struct PyObject:
        pass
    int PyIter_Send(object iter, object arg, PyObject **result) except -1


@cython.final
@cython.freelist(16)
cdef class Awaited:
    """An aput or aget that begins when it is first awaited, as a coroutine does: one that is cancelled before has done
    nothing. What cannot be done at once is a coroutine of the ring's."""
    cdef Awaiting ring
    cdef object value, timeout, coroutine
    cdef bint putting, over
    cdef int dtype
    cdef uint32_t key

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    cdef inline object _first(self):
        """What it gives when that can be had at once, or in a lull; else _EMPTY."""
        if not self.putting:
            return self.ring._get_soon(self.timeout)
        if self.ring._send(self.value, self.dtype, 0.0, self.ring.execution, self.key, 0):
            return None
        return _EMPTY

    cdef inline object _begun(self):
        """The coroutine that goes on; with a first step that ended in a value: None, and the value in self.value."""
        if self.over:
            raise RuntimeError("cannot reuse already awaited aput() or aget()")
        if self.coroutine is None:
            value = self._first()
            if value is not _EMPTY:
                self.over = True
                self.value = value
                return None
            self.coroutine = (self.ring._aput(self.value, self.timeout, self.dtype, self.key) if self.putting
                              else self.ring._aget(self.timeout))
        return self.coroutine

    def send(self, value):
        coroutine = self._begun()
        if coroutine is None:
            raise StopIteration(self.value)
        return coroutine.send(value)

    def throw(self, kind, value=None, trace=None):
        if self.coroutine is not None:
            return self.coroutine.throw(kind) if value is None else self.coroutine.throw(kind, value, trace)
        self.over = True
        raise kind if value is None else value

    def close(self):
        self.over = True
        if self.coroutine is not None:
            self.coroutine.close()


cdef inline int up_awaited_send(object self, object arg, void **result) except -1:
    """am_send: a PySendResult, of which PYGEN_ERROR is -1."""
    result[0] = NULL
    coroutine = (<Awaited>self)._begun()
    if coroutine is not None:
        return PyIter_Send(coroutine, arg, <PyObject **>result)
    value, (<Awaited>self).value = (<Awaited>self).value, None
    Py_INCREF(value)
    result[0] = <void *>value
    return PYGEN_RETURN


up_awaited_patch(<PyTypeObject *>Awaited, <void *>up_awaited_send)


cdef inline Awaited _awaited(Awaiting ring, timeout):
    cdef Awaited made = Awaited.__new__(Awaited)
    made.ring = ring
    made.timeout = timeout
    return made


cdef class Awaiting(Ring):
    """The awaited forms. A subclass has coroutine functions _aput(value, timeout, dtype, key) and _aget(timeout)."""

    @cython.binding(False)
    def aput(self, value, timeout=None, *, int dtype=-1, uint32_t key=0):
        """put() for asyncio: no event-loop turn when there is room.

        Raises:
            queue.Full: after `timeout` seconds (None waits for ever).
        """
        cdef Awaited made = _awaited(self, timeout)
        made.putting = True
        made.value = value
        made.dtype = dtype
        made.key = key
        return made

    @cython.binding(False)
    def aget(self, timeout=None):
        """get() for asyncio: no event-loop turn when a frame is there. Cancelled, it has taken nothing.

        Raises:
            queue.Empty: after `timeout` seconds (None waits for ever). EndOfStream, FrameCorrupt.
        """
        return _awaited(self, timeout)
