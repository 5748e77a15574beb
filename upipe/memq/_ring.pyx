# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=True
"""Ring: one handle of one queue. The thin wrapper of _ring.h: arguments in, encode, lock, move, wake, decode.

Waiting, in every blocking call: try; spin briefly; arm (set the waiting bit); look again; nap on a futex, or sleep in
poll(2) on the own doorbell and, in a stand-alone queue, on pidfds of the other participants. The look after the bit was
set makes the sleep safe.

`cdef inline` is on all that a small frame comes by, also past a sleep, and not on what raises: setup.py has such
functions laid side by side, and _trip.ld those of every trip in their order. Who was asleep for a millisecond finds
caches and TLB empty, and then each line and page of code costs what it takes to fetch it, which is more than to run it.
"""

import errno as _errno
import os
import queue as _queue
import weakref as _weakref
from operator import index as _index

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_AS_DOUBLE
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.errno cimport EINTR, ETIMEDOUT, errno
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy
from posix.resource cimport RLIMIT_NOFILE, getrlimit, rlimit

cimport numpy as cnp

from upipe import frame as _frame
from upipe._types import Codes as _Codes
from upipe.errors import (
    EncodeError,
    EndOfStream,
    FrameCorrupt,
    FrameError,
    FrameTooLarge,
    MirrorRefused,
    QueueClosed,
    QueueError,
    QueueStuck,
    SegmentInvalid,
    TooManyParticipants,
)

cnp.import_array()

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int c_poll "poll"(pollfd *fds, unsigned long n, int timeout)
    const short POLLIN

cdef extern from "<time.h>" nogil:
    const int CLOCK_MONOTONIC
    const int CLOCK_MONOTONIC_COARSE
    const int CLOCK_REALTIME

cdef extern from "<unistd.h>" nogil:
    Py_ssize_t c_write "write"(int fd, const void *data, size_t size)
    int c_close "close"(int fd)
    int c_unlink "unlink"(const char *path)
    int getpid()

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **out, size_t alignment, size_t size)

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1
    unsigned long PyThread_get_thread_ident()
    const char *PyUnicode_AsUTF8AndSize(object value, Py_ssize_t *size) except NULL

cdef extern from *:
    """
    /* What ends there is laid apart from what does not. */
    static void __Pyx_AddTraceback(const char *, int, int, const char *) __attribute__((cold));

    /* Is this the only thread of the interpreter? */
    static inline int up_only_thread(void) {
        PyThreadState *mine = PyThreadState_Get();
        return PyInterpreterState_ThreadHead(mine->interp) == mine && PyThreadState_Next(mine) == NULL;
    }
    """
    int up_only_thread()

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(void *subtype, cnp.dtype descr, int nd, cnp.npy_intp *dims, cnp.npy_intp *strides,
                                void *data, int flags, object obj)
    int PyArray_SetBaseObject(cnp.ndarray arr, object base) except -1
    const int NPY_ARRAY_WRITEABLE
    const int NPY_ARRAY_CARRAY

include "_memory.pxi"
include "_codec.pxi"
include "_doorbell.pxi"

cdef enum:
    LARGE = 32768           # payload bytes from which a copy runs without the GIL
    BATCH = 256             # frames moved per lock by put_many and get_many
    OFTEN = 16              # sleeps after which it pays to let the lookout watch, which makes each of them cheaper

cdef double LOCK_PATIENCE = 10.0
cdef double ALONE = 0.05    # seconds asleep before a stand-alone queue also watches its peers
cdef double LAZY = 0.002    # seconds a producer sleeps for much room at once, before it sleeps for what it needs

cdef int _generation = 0    # raised in every forked child: handles join again there, with slots and bells of their own


def _after_fork_in_child():
    global _generation, _lull_loop, _lull_last
    _generation += 1
    _lull_loop = _lull_last = None
    up_bell_child()
    up_bell_forget()


os.register_at_fork(after_in_child=_after_fork_in_child)


def forget_bells():
    """Close the write ends of others' doorbells that this process keeps (at most 128); they open again when needed."""
    up_bell_forget()


cdef inline double _now() noexcept:
    return <double>up_now_ns(CLOCK_MONOTONIC) * 1e-9


def fingerprint():
    """(layout version, fingerprint) of this build."""
    return UP_VERSION, up_fingerprint()


def segment_bytes(wanted):
    """(ring capacity, bytes of the whole segment) for a ring of at least `wanted` bytes."""
    if not 0 < wanted <= UP_MAX_RING:
        raise ValueError(f"a ring holds 1 to {UP_MAX_RING} bytes, not {wanted}")
    cdef uint64_t capacity = up_capacity_for(wanted)
    return capacity, up_total(capacity)


def crc32(data, uint32_t crc=0):
    """zlib.crc32 by the ring's own code."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return up_crc32(crc, view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


cdef struct Waiting:
    int producer                # which end
    uint64_t need               # ring bytes wanted
    double timeout, deadline    # seconds; deadline 0 = not started
    uint64_t since              # ns: when a consumer had spun in vain, 0 = nobody wants to know
    bint armed, fresh           # counted as a sleeper; armed since the last try
    bint naps                   # the next sleep is a nap
    bint exact                  # asks for no more room than it needs
    void *lull                  # Lull that ends it as well (the caller keeps it), NULL = none


cdef inline void _waiting(Waiting *w, int producer, uint64_t need, double timeout) noexcept:
    w.producer = producer
    w.need = need
    w.timeout = timeout
    w.deadline = 0
    w.since = 0
    w.lull = NULL
    w.armed = w.fresh = w.exact = w.naps = False


cdef object _EMPTY = object()
cdef object _handles = _weakref.WeakSet()
cdef int _exit_pid = 0      # process whose exit closes its handles


def close_handles():
    """At the end of this process: leave every queue, so that ends of stream are closed and slots are free at once."""
    for ring in list(_handles):
        (<Ring>ring)._at_exit()


include "_lulling.pxi"
include "_joining.pxi"
include "_sleeping.pxi"
include "_pacing.pxi"
include "_putting.pxi"
include "_taking.pxi"
include "_mirroring.pxi"
include "_watching.pxi"
include "_views.pxi"
include "_fan.pxi"
include "_ready.pxi"
include "_codes.pxi"
include "_awaiting.pxi"
include "_port.pxi"
include "_tally.pxi"
