# An awaitable that is done: `await` of it costs no event-loop turn and raises no StopIteration.

cdef extern from *:
    """
    static PyAsyncMethods up_ready_async;
    static void up_ready_patch(PyTypeObject *type, void *send) {
        up_ready_async = *type->tp_as_async;
        up_ready_async.am_send = (sendfunc)send;
        type->tp_as_async = &up_ready_async;
    #ifdef _Py_TPFLAGS_HAVE_AM_SEND
        type->tp_flags |= _Py_TPFLAGS_HAVE_AM_SEND;
    #endif
        PyType_Modified(type);
    }
    """
    ctypedef struct PyTypeObject:
        pass
    ctypedef enum PySendResult:
        PYGEN_RETURN
    void up_ready_patch(PyTypeObject *type, void *send)


@cython.final
@cython.freelist(16)
cdef class Ready:
    """`await Ready(value)` gives value at once."""
    cdef object value

    def __cinit__(self, value):
        self.value = value

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration(self.value)

    # With these it is a Coroutine to asyncio, so that create_task(me.get_sync()) works whether it is done or not.

    def send(self, value):
        raise StopIteration(self.value)

    def throw(self, kind, value=None, stack=None):
        raise kind if value is None else value

    def close(self):
        pass


cdef PySendResult up_ready_send(object self, object arg, void **result) noexcept:
    value = (<Ready>self).value
    Py_INCREF(value)
    result[0] = <void *>value
    return PYGEN_RETURN


up_ready_patch(<PyTypeObject *>Ready, <void *>up_ready_send)

READY_TRUE = Ready(True)
