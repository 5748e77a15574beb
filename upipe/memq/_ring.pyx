# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, embedsignature=True
"""Ring: one handle of one queue. The thin wrapper of _ring.h: arguments in, encode, lock, move, wake, decode.

Waiting, in every blocking call: try; spin briefly; arm (set the waiting bit); try again; sleep in poll(2) on the own doorbell
and, in a stand-alone queue, on pidfds of the other participants. The second try under the lock makes the sleep safe.
"""

import os
import queue as _queue
import time as _time

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_AS_DOUBLE
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.errno cimport EINTR, errno
from libc.math cimport INFINITY, isinf
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, strlen

cimport numpy as cnp

from upipe import frame as _frame
from upipe.errors import (
    EndOfStream,
    FrameCorrupt,
    FrameError,
    FrameTooLarge,
    PickleRefused,
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
    const int CLOCK_REALTIME
    const int CLOCK_REALTIME_COARSE

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **out, size_t alignment, size_t size)

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1
    const char *PyUnicode_AsUTF8AndSize(object value, Py_ssize_t *size) except NULL

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(void *subtype, cnp.dtype descr, int nd, cnp.npy_intp *dims, cnp.npy_intp *strides,
                                void *data, int flags, object obj)
    int PyArray_SetBaseObject(cnp.ndarray arr, object base) except -1
    const int NPY_ARRAY_WRITEABLE
    const int NPY_ARRAY_CARRAY

include "_memory.pxi"
include "_codec.pxi"

cdef enum:
    MAX_WATCH = 64          # pidfds beside the doorbell in one poll
    LARGE = 32768           # payload bytes from which a copy runs without the GIL
    BATCH = 256             # frames moved per lock by put_many and get_many
    SPIN_MAX = 2000         # pause instructions before arming; halves when spinning did not help

cdef double LOCK_PATIENCE = 10.0
cdef double ALONE = 0.05    # seconds asleep before a stand-alone queue also watches its peers

cdef int _generation = 0    # raised in every forked child: handles join again there, with slots and bells of their own


def _after_fork_in_child():
    global _generation
    _generation += 1
    up_bell_child()
    up_bell_forget()


os.register_at_fork(after_in_child=_after_fork_in_child)


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
    bint armed, fresh           # counted as a sleeper; armed since the last try


cdef inline void _waiting(Waiting *w, int producer, uint64_t need, double timeout) noexcept:
    w.producer = producer
    w.need = need
    w.timeout = timeout
    w.deadline = 0
    w.armed = w.fresh = False


cdef class Ring:
    """One handle of one queue (see MemQ, which adds names, files and pickling).

    A handle belongs to its process; in a forked child it joins the queue again by itself. Threads may share it.
    """
    cdef up_ring r
    cdef int generation
    cdef bint closed, mapped, supervised
    cdef readonly bint allow_pickle
    cdef public bint interrupted  # waits end at once, as if their time were over (a worker that drains)
    cdef uint64_t held            # position + 1 of the frame that take() holds, 0 = none
    cdef up_frame last            # header of the frame that was read last
    cdef object bells, wakeup     # (consumer Bell | None, producer Bell | None), module upipe.memq.wakeup
    cdef object watch
    cdef int spin[2]
    cdef uint64_t execution       # execution id for the frames to come
    cdef readonly str label
    cdef object __weakref__

    def __cinit__(self, *args, **kwargs):
        self.mapped = False
        self.closed = False
        self.r.slot = UP_NONE
        self.r.producer = UP_NONE
        self.spin[0] = self.spin[1] = SPIN_MAX // 4
        self.bells = [None, None]

    cdef _opened(self, str root, str label):
        raw = os.fsencode(root)
        if len(raw) >= 160:
            raise QueueError(f"the path {root} is longer than 159 bytes; set UPIPE_SHM to a shorter one")
        memcpy(self.r.root, PyBytes_AS_STRING(raw), len(raw) + 1)
        self.r.root_hash = up_bell_hash(self.r.root)
        self.generation = _generation
        self.mapped = True
        self.label = label
        self.allow_pickle = not (self.r.c.options & UP_OPT_NO_PICKLE)
        self.supervised = (self.r.c.options & UP_OPT_SUPERVISED) != 0

    def _create(self, int fd, uint64_t capacity, int policy, uint64_t max_frames, uint32_t options, str root, str label):
        """Format the file behind fd and map it."""
        if up_create(&self.r, fd, capacity, policy, max_frames, options) != UP_OK:
            raise OSError(errno, f"cannot map queue {label}: {os.strerror(errno)}")
        self._opened(root, label)

    def _attach(self, int fd, str root, str label):
        """Check and map the file behind fd."""
        cdef uint32_t found[2]
        cdef int rc = up_attach(&self.r, fd, found)
        if rc == UP_OK:
            self._opened(root, label)
        elif rc == UP_FOREIGN:
            raise SegmentInvalid(f"{label} is no uPipe queue (its magic is not ours); this build has layout version {UP_VERSION}")
        elif rc == UP_OTHERVERSION:
            raise SegmentInvalid(
                f"{label} has layout version {found[0]} (fingerprint {found[1]:08x}), this build has version {UP_VERSION} "
                f"(fingerprint {up_fingerprint():08x}); use the same uPipe on both sides")
        elif rc == UP_TRUNCATED:
            raise SegmentInvalid(f"{label} (layout version {found[0]}) is shorter than it says; it was truncated, this build "
                                 f"has version {UP_VERSION}; create it again")
        else:
            raise OSError(errno, f"cannot map queue {label}: {os.strerror(errno)}")

    # ---------------------------------------------------------------- joining and leaving

    cdef int _enter(self) except -1:
        """Before every operation: open, and joined in this very process."""
        if self.closed or not self.mapped:
            raise QueueClosed(f"this handle of queue {self.label} is closed")
        if self.generation != _generation:
            self.generation = _generation
            self.r.slot = UP_NONE
            self.r.producer = UP_NONE
            self.held = 0
            self.bells = [None, None]
            self.watch = None
        if self.r.slot == UP_NONE:
            self._join()
        return 0

    cdef _join(self):
        cdef int rc = UP_NOSLOT
        for attempt in range(2):
            self._lock(self.r.c.registry_lock)
            rc = up_join_locked(&self.r)
            up_unlock(self.r.c.registry_lock)
            if rc == UP_OK:
                break
            self.recover_dead()
        if rc != UP_OK:
            raise TooManyParticipants(f"queue {self.label} has {UP_SLOTS} live participants, the most it can have")
        if not self.supervised:
            up_wake_all(&self.r)  # sleepers watch the newcomer's pidfd from now on

    cdef int _produce(self) except -1:
        self._enter()
        if self.r.producer == UP_NONE:
            if up_auto_producer(&self.r) != UP_OK:
                raise TooManyParticipants(f"queue {self.label} has {UP_PRODUCERS} open producers, the most it can have")
        return 0

    def close(self):
        """Close this handle and this producer's end of stream; what it holds is given back. Idempotent."""
        cdef size_t found
        if self.closed or not self.mapped:
            return
        if self.generation == _generation and self.r.slot != UP_NONE:
            up_recover(&self.r, self.r.slot, 0, NULL, 0, &found, NULL, 0)
        self.closed = True
        for bell in self.bells:
            if bell is not None and self.generation == _generation:
                bell.close()
        self.bells = [None, None]

    def __dealloc__(self):
        cdef size_t found
        if self.mapped:
            if not self.closed and self.generation == _generation and self.r.slot != UP_NONE:
                up_recover(&self.r, self.r.slot, 0, NULL, 0, &found, NULL, 0)
            up_unmap(&self.r)

    cdef int _lock(self, uint64_t *area) except -1:
        cdef int rc = up_trylock(&self.r, area)
        if rc != UP_OK:
            with nogil:
                rc = up_lock(&self.r, area, LOCK_PATIENCE)
            if rc != UP_OK:
                raise QueueStuck(f"a process holds a lock of queue {self.label} for more than {LOCK_PATIENCE:g} s; "
                                 "look for a stopped participant (ps -o pid,stat)")
        return 0

    # ---------------------------------------------------------------- sleeping

    cdef object _bell(self, int producer):
        bell = self.bells[producer]
        if bell is None:
            if self.wakeup is None:
                from upipe.memq import wakeup
                self.wakeup = wakeup
            bell = self.bells[producer] = self.wakeup.Bell()
            if producer:
                self.r.slots[self.r.slot].bell_producer = bell.id
            else:
                self.r.slots[self.r.slot].bell_consumer = bell.id
        return bell

    cdef inline uint64_t *_bits(self, int producer) noexcept:
        if producer:
            return self.r.c.producers_waiting
        return self.r.c.consumers_waiting

    cdef int _spin(self, int producer) noexcept:
        """Spin while nothing changes; 1 when something did. The length follows how often spinning helped."""
        cdef int i, n = self.spin[producer]
        cdef uint64_t *word = &self.r.c.head
        cdef uint64_t before, next_
        cdef uint64_t *state = NULL
        cdef int hit = 0
        if producer:
            word = &self.r.c.tail
        before = UP_LD(word)
        if not producer:
            next_ = UP_LD(&self.r.c.next)
            state = up_state_at(&self.r, next_)
        with nogil:
            for i in range(n):
                UP_PAUSE()
                if UP_LD(word) != before:
                    hit = 1
                    break
        if hit:
            self.spin[producer] = min(SPIN_MAX, n * 2 + 16)
        else:
            self.spin[producer] = max(16, n // 2)
        return hit

    def arm(self, int producer, uint64_t need=0):
        """Set the waiting bit (bell ready). Try again after this, then sleep on fd(producer)."""
        cdef uint64_t head, tail, want
        self._enter()
        self._bell(producer)
        if producer:
            head = up_position(UP_LDA(&self.r.c.head))
            want = 0
            if need and not self.r.c.max_frames and head + need > self.r.capacity:
                want = min(head, head + need - self.r.capacity + self.r.capacity // 8)  # some room at once, not one frame
            self.r.slots[self.r.slot].need_tail = want
            self.r.c.full_waits += 1
        else:
            self.r.c.empty_waits += 1
        up_arm(&self.r, self._bits(producer))

    def disarm(self, int producer):
        """Clear the waiting bit. False: somebody rang, so who leaves without a frame passes the wake on."""
        return bool(up_disarm(&self.r, self._bits(producer)))

    def pass_on(self, int producer):
        """Wake another sleeper in our stead."""
        if producer:
            up_wake_producers(&self.r)
        else:
            up_wake_consumers(&self.r, 1)

    def bell(self, int producer):
        """The doorbell of this handle for frames (0) or room (1): a file descriptor to watch is its .fd."""
        self._enter()
        return self._bell(producer)

    cdef bint _again(self, Waiting *w) except -1:
        """After a try that failed: spin, arm or sleep; False when it is time to give up."""
        cdef int rc
        if w.timeout <= 0 or self.interrupted:
            return False
        if w.deadline == 0:
            w.deadline = _now() + w.timeout
            if self._spin(w.producer):
                return True
        if not w.fresh:  # arm, and let the caller try once more before we sleep
            self.arm(w.producer, w.need)
            w.fresh = True
            if not w.armed:
                w.armed = True
                self.bells[w.producer].sleepers += 1
            return True
        w.fresh = False
        try:
            rc = self._sleep(w.producer, w.deadline)
        except BaseException:
            if not up_disarm(&self.r, self._bits(w.producer)):
                self.pass_on(w.producer)
            self._left(w, 0)
            raise
        if rc == 0:
            w.timeout = 0
        return True

    cdef int _left(self, Waiting *w, int rc) except -100:
        """Done waiting. Other threads and tasks may sleep on the same bell: they look again."""
        if w.armed:
            up_disarm(&self.r, self._bits(w.producer))
            w.armed = False
            bell = self.bells[w.producer]
            bell.sleepers -= 1
            bell.left()
        return rc

    cdef int _sleep(self, int producer, double deadline) except -1:
        """Sleep until the bell, a peer's death or the deadline. 0 when the deadline passed."""
        cdef pollfd fds[MAX_WATCH + 1]
        cdef int n = 1, rc = 0, timeout, i
        cdef double left
        cdef bint watching = False
        bell = self._bell(producer)
        fds[0].fd = bell.fd
        fds[0].events = POLLIN
        while True:
            left = deadline - _now()
            if left <= 0:
                return 0
            if not self.supervised and not watching:
                left = min(left, ALONE)
            timeout = -1 if left > 1e6 else <int>(left * 1000) + 1
            with nogil:
                rc = c_poll(fds, n, timeout)
            if rc < 0 and errno != EINTR:
                raise OSError(errno, "poll failed while waiting for a queue")
            if rc < 0:
                PyErr_CheckSignals()
                continue
            if rc > 0:
                if fds[0].revents:
                    up_bell_drain(fds[0].fd)
                for i in range(1, n):
                    if fds[i].revents:
                        self.recover_dead()
                        break
                return 1
            if self.supervised or watching:
                continue
            watching = True
            peers = self._peers()
            if peers is None:
                return 1
            for fd in peers[:MAX_WATCH]:
                fds[n].fd = fd
                fds[n].events = POLLIN
                n += 1

    cdef object _peers(self):
        if self.watch is None:
            self.watch = self.wakeup.PeerWatch()
        fds = self.watch.fds(self.peers())
        if fds is None:  # one of them is dead already
            self.recover_dead()
        return fds

    # ---------------------------------------------------------------- putting

    cdef int _copy_in(self, uint64_t pos, Out *o, list parts, uint32_t *crc) except -1:
        cdef uint8_t *to = up_payload(&self.r, pos)
        cdef Py_buffer view
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
                with nogil:
                    c = up_crc32_copy(c, to, view.buf, view.len)
                to += view.len
                PyBuffer_Release(&view)
        crc[0] = c
        return 0

    cdef int _try_put(self, Out *o, list parts) except -100:
        """One attempt. UP_OK, UP_FULL, or UP_REFUSED (a drop policy dropped the newcomer)."""
        cdef uint64_t need = up_need(o.m.size, o.m.flags), pos
        cdef uint32_t crc = 0
        cdef int rc
        self._fits(need)
        if self.r.c.policy == UP_POLICY_LATEST:
            self._drop(need, 1)
        elif self.r.c.policy == UP_POLICY_DISCARD:
            return self._full(need)
        self._lock(self.r.c.producer_lock)
        rc = up_room(&self.r, need, 1)
        if rc == UP_OK:
            if o.m.flags & UP_FLAG_INLINE:
                up_put_inline(&self.r, &o.m)
                up_unlock(self.r.c.producer_lock)
                up_wake_consumers(&self.r, 1)
                return UP_OK
            pos = up_claim(&self.r, need, o.m.size)
        up_unlock(self.r.c.producer_lock)
        if rc != UP_OK:
            return self._full(need)
        try:
            self._copy_in(pos, o, parts, &crc)
        except BaseException:
            up_abort(&self.r, pos)
            up_wake_consumers(&self.r, 1)
            raise
        up_commit(&self.r, pos, &o.m, crc)
        up_wake_consumers(&self.r, 1)
        return UP_OK

    cdef int _drop(self, uint64_t need, bint all_) except -1:
        self._lock(self.r.c.consumer_lock)
        up_drop(&self.r, need, all_)
        up_unlock(self.r.c.consumer_lock)
        return 0

    cdef int _fits(self, uint64_t need) except -1:
        if need > self.r.capacity:
            raise FrameTooLarge(f"a frame of {need:,} bytes (64 of them header) can never fit queue {self.label} of "
                                f"{self.r.capacity:,} bytes; make the queue larger or the frame smaller")
        return 0

    cdef int _full(self, uint64_t need, bint refuse=True) except -100:
        """No room: what the policy says. A drop policy never waits."""
        cdef int rc
        if self.r.c.policy == UP_POLICY_BLOCK:
            return UP_FULL
        self._drop(need, self.r.c.policy == UP_POLICY_DISCARD)
        self._lock(self.r.c.producer_lock)
        rc = UP_FULL if self.r.c.policy == UP_POLICY_DISCARD else up_room(&self.r, need, 1)
        if rc != UP_OK and refuse:
            up_count_refused(&self.r)
        up_unlock(self.r.c.producer_lock)
        return UP_REFUSED if rc != UP_OK else UP_AGAIN

    cdef int _put(self, Out *o, list parts, double timeout) except -100:
        """Put, waiting up to timeout seconds (inf = for ever). UP_OK, UP_REFUSED or UP_FULL."""
        cdef Waiting w
        cdef int rc
        _waiting(&w, 1, up_need(o.m.size, o.m.flags), timeout)
        while True:
            rc = self._try_put(o, parts)
            if rc != UP_AGAIN and (rc != UP_FULL or not self._again(&w)):
                return self._left(&w, rc)

    def put(self, value, block=True, timeout=None, *, int dtype=-1, uint32_t key=0):
        """Put one value, waiting for room.

        Args:
            value: anything a frame can carry; the DType is chosen from it unless `dtype` forces one.
            block: False raises Full at once when there is no room.
            timeout: seconds to wait, None waits for ever.
            dtype: a DType code to force.
            key: hash of a partition key, carried in the header.

        Raises:
            queue.Full, EncodeError, FrameTooLarge, QueueClosed, PickleRefused.
        """
        cdef Out o
        cdef double wait = _timeout(block, timeout)
        self._produce()
        parts = _encode(value, dtype, &o, self.allow_pickle)
        o.m.key = key
        o.m.execution = self.execution
        if self._put(&o, parts, wait) == UP_FULL:
            raise _queue.Full

    def put_nowait(self, value):
        """put(value, block=False)."""
        self.put(value, False)

    def send(self, value, int dtype=-1, double timeout=0.0, uint64_t execution=0, uint32_t key=0, int flags=0):
        """The runtime's put: True when it is in (or was dropped by policy), False when there was no room in time."""
        cdef Out o
        self._produce()
        parts = _encode(value, dtype, &o, self.allow_pickle)
        o.m.execution = execution
        o.m.key = key
        o.m.flags |= flags
        return self._put(&o, parts, timeout) != UP_FULL

    def put_many(self, values, int dtype=-1, timeout=None):
        """Put each element of an iterable, or each scalar of a 1-d array, as a frame of its own; many frames per lock.

        Returns the number of frames put: all of them, or fewer when `timeout` (seconds, None = for ever) ran out.
        """
        cdef double wait = _timeout(True, timeout), deadline
        self._produce()
        deadline = _now() + wait
        if isinstance(values, cnp.ndarray):
            flat = _scalar_array(values, dtype)
            if flat is not None:
                return self._put_array(flat, deadline)
            values = values.tolist() if values.ndim == 1 and values.dtype != object else list(values)
        return self._put_sequence(values if isinstance(values, (list, tuple)) else list(values), dtype, deadline)

    cdef _put_array(self, cnp.ndarray values, double deadline):
        cdef Py_ssize_t done = 0, total = values.shape[0], width = values.itemsize, n, i
        cdef const uint8_t *data = <const uint8_t *>cnp.PyArray_DATA(values)
        cdef up_meta m
        _meta(&m, _item_to_dtype[_item_of(values)], UP_FLAG_INLINE, width)
        m.execution = self.execution
        while done < total:
            n = min(BATCH, total - done)
            self._lock(self.r.c.producer_lock)
            while n and up_room(&self.r, n * UP_GRANULE, n) != UP_OK:
                n //= 2
            for i in range(n):
                m.inline_ = 0
                memcpy(&m.inline_, data + (done + i) * width, width)
                up_put_inline_at(&self.r, &m, i * UP_GRANULE)
            if n:
                up_publish(&self.r, n * UP_GRANULE, n, n * width)
            up_unlock(self.r.c.producer_lock)
            up_wake_consumers(&self.r, n)
            done += n
            if n == 0 and not self._put_one_waiting(values[done], m.dtype, deadline):
                break
            done += n == 0
        return done

    cdef bint _put_one_waiting(self, value, int dtype, double deadline) except -1:
        cdef Out o
        parts = _encode(value, dtype, &o, self.allow_pickle)
        o.m.execution = self.execution
        return self._put(&o, parts, max(0.0, deadline - _now())) != UP_FULL

    cdef _put_sequence(self, values, int dtype, double deadline):
        cdef Py_ssize_t done = 0, total = len(values), n, i
        cdef Out outs[BATCH]
        cdef uint64_t bytes_
        while done < total:
            n = 0
            bytes_ = 0
            parts = None
            while n < BATCH and done + n < total:
                parts = _encode(values[done + n], dtype, &outs[n], self.allow_pickle)
                if not outs[n].m.flags & UP_FLAG_INLINE:
                    break
                outs[n].m.execution = self.execution
                bytes_ += outs[n].m.size
                n += 1
            if n < 2 or self.r.c.policy != UP_POLICY_BLOCK:
                if not self._put_one_waiting(values[done], dtype, deadline):
                    break
                done += 1
                continue
            self._lock(self.r.c.producer_lock)
            while n and up_room(&self.r, n * UP_GRANULE, n) != UP_OK:
                n //= 2
            bytes_ = 0
            for i in range(n):
                up_put_inline_at(&self.r, &outs[i].m, i * UP_GRANULE)
                bytes_ += outs[i].m.size
            if n:
                up_publish(&self.r, n * UP_GRANULE, n, bytes_)
            up_unlock(self.r.c.producer_lock)
            up_wake_consumers(&self.r, n)
            done += n
            if n == 0:
                if not self._put_one_waiting(values[done], dtype, deadline):
                    break
                done += 1
        return done

    # ---------------------------------------------------------------- taking

    cdef int _after_finish(self) except -1:
        up_wake_producers(&self.r)
        if up_ended(&self.r):
            up_wake_consumers(&self.r, UP_SLOTS)
        return 0

    cdef int _try_consume(self, up_frame *out) except -100:
        """Take, copy and finish a one-granule frame. UP_TOOBIG: it is larger (or a redelivery)."""
        cdef int rc
        self._lock(self.r.c.consumer_lock)
        rc = up_consume(&self.r, out)
        if rc == UP_OK:
            up_advance(&self.r)
        up_unlock(self.r.c.consumer_lock)
        if rc == UP_OK:
            self._after_finish()
        elif rc == UP_EMPTY and up_ended(&self.r):
            rc = UP_END
        return rc

    cdef int _try_take(self, uint64_t *pos) except -100:
        """Take one frame, finishing the one that take() held before in the same critical section."""
        cdef int rc
        cdef bint finished = False
        self._lock(self.r.c.consumer_lock)
        if self.held:
            finished = up_finish(&self.r, self.held - 1, UP_FINISHED) == UP_OK
            self.held = 0
        rc = up_take(&self.r, pos)
        up_unlock(self.r.c.consumer_lock)
        if finished:
            self._after_finish()
        if rc == UP_EMPTY and up_ended(&self.r):
            rc = UP_END
        return rc

    cdef int _wait_frame(self, uint64_t *pos, up_frame *out, bint consume, double timeout) except -100:
        """Take (or consume) waiting up to timeout. UP_OK: consumed into *out. UP_TOOBIG: taken at *pos. UP_EMPTY, UP_END."""
        cdef Waiting w
        cdef int rc
        _waiting(&w, 0, 0, timeout)
        while True:
            rc = self._try_consume(out) if consume else UP_TOOBIG
            if rc == UP_TOOBIG:
                rc = self._try_take(pos)
                if rc == UP_OK:
                    rc = UP_TOOBIG
            if rc != UP_EMPTY or not self._again(&w):
                return self._left(&w, rc)

    cdef int _checked(self, up_frame *f, uint64_t pos) except -1:
        """Header sane and the frame inside its span? Raises FrameCorrupt otherwise."""
        cdef uint64_t span = up_span(UP_LD(up_state_at(&self.r, pos)))
        if f.magic != UP_FRAME_MAGIC or f.version != UP_VERSION or f.size > span or up_need(f.size, f.flags) != span:
            self._corrupt(pos)
        return 0

    cdef _corrupt(self, uint64_t pos):
        self.r.c.corrupt += 1
        raise FrameCorrupt(f"the frame at position {pos} of queue {self.label} does not match its CRC32: its bytes changed "
                           "after they were written (a stray write or bad memory); it was not delivered")

    cdef object _read(self, uint64_t pos):
        """Copy the frame out, check it, decode it. Raises FrameCorrupt."""
        cdef up_frame *f = up_frame_at(&self.r, pos)
        cdef uint32_t crc = 0
        cdef bint check = not (self.r.c.options & UP_OPT_NO_CRC)
        cdef uint8_t *to
        cdef uint8_t *data = up_payload(&self.r, pos)
        cdef uint64_t size
        self.last = f[0]
        self._checked(&self.last, pos)
        size = self.last.size
        if self.last.flags & UP_FLAG_INLINE or size == 0:
            if check and up_crc32_header(&self.last, 0) != self.last.crc:
                self._corrupt(pos)
            return _decode(&self.last, None, self.allow_pickle)
        if self.last.dtype == _BYTES:
            target = PyBytes_FromStringAndSize(NULL, size)
            to = <uint8_t *>PyBytes_AS_STRING(target)
        else:
            target = _block(size)
            to = (<Block>target).data
        if not check:
            with nogil:
                memcpy(to, data, size)
        elif size >= LARGE:
            with nogil:
                crc = up_crc32_copy(0, to, data, size)
        else:
            crc = up_crc32_copy(0, to, data, size)
        if check and up_crc32_header(&self.last, crc) != self.last.crc:
            self._corrupt(pos)
        return target if self.last.dtype == _BYTES else _decode(&self.last, target, self.allow_pickle)

    cdef object _get(self, double timeout):
        cdef up_frame f
        cdef uint64_t pos
        cdef int rc
        self._enter()
        rc = self._wait_frame(&pos, &f, True, timeout)
        if rc == UP_OK:
            self.last = f
            if not (self.r.c.options & UP_OPT_NO_CRC) and up_crc32_header(&f, 0) != f.crc:
                self._corrupt(f.position)
            return _decode(&f, None, self.allow_pickle)
        if rc == UP_TOOBIG:
            try:
                value = self._read(pos)
            except FrameCorrupt:
                self._end(pos, UP_DEAD)
                raise
            except BaseException:
                self._end(pos, UP_FINISHED)
                raise
            self._end(pos, UP_FINISHED)
            return value
        if rc == UP_END:
            raise EndOfStream(f"queue {self.label} has ended: every producer closed and every frame is finished")
        raise _queue.Empty

    cdef int _end(self, uint64_t pos, uint32_t kind) except -1:
        cdef int rc
        self._lock(self.r.c.consumer_lock)
        rc = up_finish(&self.r, pos, kind)
        up_unlock(self.r.c.consumer_lock)
        if rc != UP_OK:
            raise QueueError(f"the frame at {pos} of queue {self.label} is not held by this handle (it was recovered)")
        return self._after_finish()

    def get(self, block=True, timeout=None):
        """Take, copy and finish the next value: what multiprocessing.Queue.get does.

        A worker that must not lose a frame when it dies uses take() and finish(), or borrow().

        Raises:
            queue.Empty, EndOfStream, FrameCorrupt, QueueClosed.
        """
        return self._get(_timeout(block, timeout))

    def get_nowait(self):
        """get(block=False)."""
        return self._get(0.0)

    def take(self, block=True, timeout=None):
        """Take the next value and hold its frame until finish(), give_back() or the next take().

        If this process dies before, the frame is delivered again with its count raised.
        """
        cdef uint64_t pos
        cdef int rc = self._take(_timeout(block, timeout), &pos)
        if rc == UP_OK:
            return self._read(pos)
        if rc == UP_END:
            raise EndOfStream(f"queue {self.label} has ended: every producer closed and every frame is finished")
        raise _queue.Empty

    cdef int _take(self, double timeout, uint64_t *pos) except -100:
        cdef int rc
        self._enter()
        rc = self._wait_frame(pos, NULL, False, timeout)
        if rc == UP_TOOBIG:
            self.held = pos[0] + 1
            return UP_OK
        return rc

    def receive(self, double timeout=0.0):
        """The runtime's take: (True, value), (False, None) when empty, or None at the end of the stream."""
        cdef uint64_t pos
        cdef int rc = self._take(timeout, &pos)
        if rc == UP_OK:
            return (True, self._read(pos))
        return None if rc == UP_END else _NOTHING

    def finish(self, bint dead=False):
        """End the held frame: finished, or (dead) moved to the dead letters. Nothing held: does nothing."""
        if self.held:
            self._enter()
            pos, self.held = self.held - 1, 0
            self._end(pos, UP_DEAD if dead else UP_FINISHED)

    def give_back(self):
        """Give the held frame back: it is delivered again, to anyone, with its delivery count raised."""
        cdef int rc
        if self.held:
            self._enter()
            self._lock(self.r.c.consumer_lock)
            rc = up_give_back(&self.r, self.held - 1)
            up_unlock(self.r.c.consumer_lock)
            self.held = 0
            if rc == UP_OK:
                up_wake_consumers(&self.r, 1)

    def detach_held(self):
        """Position of the held frame, which stays held beyond the next take(); end it with end(position)."""
        pos, self.held = self.held, 0
        return pos - 1 if pos else None

    def end(self, uint64_t position, bint dead=False):
        """End a frame that detach_held() or recover() named."""
        self._enter()
        self._end(position, UP_DEAD if dead else UP_FINISHED)

    @property
    def holding(self):
        """Position of the frame that take() holds, or None."""
        return self.held - 1 if self.held else None

    def raw(self, uint64_t position):
        """Header and payload of a frame this handle holds, as bytes; only the ring's span is trusted."""
        cdef up_frame *f = up_frame_at(&self.r, position)
        cdef uint64_t span = up_span(UP_LD(up_state_at(&self.r, position)))
        cdef uint64_t size = 0 if f.flags & UP_FLAG_INLINE else min(f.size, span - UP_GRANULE)
        return PyBytes_FromStringAndSize(<char *>f, UP_GRANULE + size)

    def header(self):
        """(position, deliveries, execution, key, producer, epoch, timestamp ns, dtype, flags, size) of the last frame read."""
        cdef up_frame *f = &self.last
        return (f.position, f.deliveries, f.execution, f.key, f.producer, f.epoch, f.timestamp, f.dtype, f.flags, f.size)

    @property
    def last_execution(self):
        """Execution id of the frame that was read last."""
        return self.last.execution

    @property
    def last_flags(self):
        """Header flags of the frame that was read last."""
        return self.last.flags

    def get_many(self, Py_ssize_t max=1024, timeout=None, *, bint array=False):
        """Take, copy and finish up to `max` values; many frames per lock. Waits for the first one only.

        Returns a list, or with array=True a 1-d array of scalars (it ends where the DType changes; a value that is no
        scalar comes back as a list of one).

        Raises:
            queue.Empty, EndOfStream, FrameCorrupt: as get().
        """
        cdef up_frame batch[BATCH]
        cdef Py_ssize_t n = 0, i, total = 0, width = 0
        cdef double wait = _timeout(True, timeout)
        cdef int dtype = -1
        cdef uint8_t *to = NULL
        cdef bint check = not (self.r.c.options & UP_OPT_NO_CRC)
        if max < 1:
            raise ValueError(f"get_many takes at least 1, not {max}")
        self._enter()
        values = [] if not array else None
        out = None
        while total < max:
            n = self._consume_batch(batch, min(BATCH, max - total), dtype if array else -1)
            if n == 0:
                if total:
                    break
                first = self._get(wait)
                if array and not (self.last.flags & UP_FLAG_INLINE and self.last.dtype in _dtype_to_num):
                    return [first]
                batch[0] = self.last
                n = 1
                if not array:
                    values.append(first)
                    total = 1
                    continue
            for i in range(n):
                if check and up_crc32_header(&batch[i], 0) != batch[i].crc:
                    self._corrupt(batch[i].position)
            if array:
                if out is None:
                    dtype = batch[0].dtype
                    if dtype not in _dtype_to_num:
                        return [_decode(&batch[0], None, self.allow_pickle)] + [
                            _decode(&batch[i], None, self.allow_pickle) for i in range(1, n)]
                    out = _array_of(dtype, max)
                    to = <uint8_t *>cnp.PyArray_DATA(out)
                    width = out.itemsize
                for i in range(n):
                    if batch[i].dtype != dtype:
                        raise FrameError(f"get_many(array=True) met DType {batch[i].dtype} after {dtype} in queue {self.label}; "
                                         "use get_many() without array for mixed values")
                    memcpy(to + total * width, &batch[i].inline_, width)
                    total += 1
            else:
                for i in range(n):
                    values.append(_decode(&batch[i], None, self.allow_pickle))
                total += n
        return out[:total] if array else values

    cdef Py_ssize_t _consume_batch(self, up_frame *batch, Py_ssize_t most, int dtype) except -1:
        """Consume up to `most` one-granule frames (of that dtype unless -1) under one lock."""
        cdef Py_ssize_t n = 0
        cdef uint64_t pos, span
        self._lock(self.r.c.consumer_lock)
        while n < most:
            if dtype >= 0 and (up_peek(&self.r, &pos, &span) != UP_OK or up_frame_at(&self.r, pos).dtype != dtype):
                break
            if up_consume(&self.r, &batch[n]) != UP_OK:
                break
            n += 1
        if n:
            up_advance(&self.r)
        up_unlock(self.r.c.consumer_lock)
        if n:
            self._after_finish()
        return n

    # ---------------------------------------------------------------- zero copy

    cdef uint64_t _claim(self, up_meta *m, double timeout) except? 0:
        """Claim room for a frame whose payload is written in place."""
        cdef Waiting w
        cdef uint64_t need = up_need(m.size, m.flags), pos
        cdef int rc
        self._fits(need)
        _waiting(&w, 1, need, timeout)
        if self.r.c.policy == UP_POLICY_LATEST:
            self._drop(need, 1)
        while True:
            self._lock(self.r.c.producer_lock)
            rc = up_room(&self.r, need, 1)
            pos = up_claim(&self.r, need, m.size) if rc == UP_OK else 0
            up_unlock(self.r.c.producer_lock)
            if rc == UP_FULL and self.r.c.policy != UP_POLICY_BLOCK and self._full(need, False) == UP_AGAIN:
                continue
            if rc == UP_OK or not self._again(&w):
                if self._left(&w, rc) == UP_OK:
                    return pos
                raise _queue.Full

    cdef object _view(self, uint64_t pos):
        """The value of a taken frame as a read-only view where it lies, checked."""
        cdef up_frame *f = up_frame_at(&self.r, pos)
        cdef uint8_t *data = up_payload(&self.r, pos)
        cdef uint32_t crc = 0
        cdef _Pin pin
        self.last = f[0]
        self._checked(&self.last, pos)
        if self.last.flags & UP_FLAG_INLINE or not (self.last.dtype == _ARRAY or self.last.dtype == _BYTES):
            return self._read(pos)
        if not (self.r.c.options & UP_OPT_NO_CRC):
            with nogil:
                crc = up_crc32(0, data, self.last.size)
            if up_crc32_header(&self.last, crc) != self.last.crc:
                self._corrupt(pos)
        pin = _Pin()
        pin.ring = self
        if self.last.dtype == _ARRAY:
            value = _array_view(&self.last, pin, data, False)
            return self._read(pos) if value is None else value
        self.last.flags |= UP_FLAG_SHAPE  # bytes: a 1-d array of u1 is the buffer
        self.last.item, self.last.rank = 5, 1
        if self.last.size >= 2097152:
            return self._read(pos)
        self.last.inline_ = self.last.size
        return memoryview(_array_view(&self.last, pin, data, False))

    def reserve(self, shape, dtype="u1", timeout=None, *, uint32_t key=0):
        """A writable array inside the ring, committed when the with block ends, aborted when it raises.

        Args:
            shape: int or tuple of ints, at most three dimensions below 2**21 each.
            dtype: numpy dtype of fixed width.
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

    # ---------------------------------------------------------------- watching, ending, recovering

    def peers(self):
        """[(pid, start time)] of the other processes that joined."""
        cdef uint32_t i
        mine = os.getpid()
        return [(self.r.slots[i].pid, self.r.slots[i].start) for i in range(UP_SLOTS)
                if self.r.slots[i].pid and self.r.slots[i].pid != mine]

    def recover_dead(self):
        """Recover every participant that is proven dead. Returns how many there were."""
        cdef uint32_t i
        cdef size_t found
        cdef int rc
        n = 0
        for i in range(UP_SLOTS):
            if self.r.slots[i].pid and i != self.r.slot:
                with nogil:
                    rc = up_recover(&self.r, i, 0, NULL, 0, &found, NULL, 0)
                n += rc == UP_OK
                if rc == UP_STUCK:
                    raise QueueStuck(f"a process holds a lock of queue {self.label} for more than {LOCK_PATIENCE:g} s")
        return n

    def recover(self, uint32_t pid, uint64_t max_deliveries=0, covered=()):
        """Recover one dead process (a supervisor). Frames in `covered` (positions in a checkpoint) are finished.

        Returns the positions of frames that reached max_deliveries: they are held by this handle now, for end(dead=True).

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
            if self.r.slots[i].pid != pid:
                continue
            with nogil:
                rc = up_recover(&self.r, i, max_deliveries, dead, 256, &found, positions, n)
            if rc == UP_ALIVE:
                raise QueueError(f"process {pid} is not proven dead; queue {self.label} keeps what it holds")
            if rc != UP_OK:
                raise QueueStuck(f"a process holds a lock of queue {self.label} for more than {LOCK_PATIENCE:g} s")
            buried += [dead[k] for k in range(found)]
        return buried

    def declare_producer(self, uint32_t id):
        """Announce a producer: the stream does not end before it closed."""
        up_set_producer(&self.r, id, UP_PRODUCER_DECLARED, 0)

    def use_producer(self, uint32_t id, uint32_t epoch=0):
        """Bind this handle to a declared producer id, in its life number `epoch`."""
        self._enter()
        if up_use_producer(&self.r, id, epoch) != UP_OK:
            raise TooManyParticipants(f"queue {self.label} has no producer id {id}")

    def close_producer(self, uint32_t id):
        """Close a producer's end of stream. Idempotent."""
        if up_set_producer(&self.r, id, UP_PRODUCER_CLOSED, 0) != UP_OK:
            raise QueueStuck(f"producer {id} of queue {self.label} could not be closed")

    def emitted(self, uint32_t id):
        """Frames that producer id got into the ring in all its lives (its dead lives recovered)."""
        return up_emitted(&self.r, id)

    def set_policy(self, uint32_t policy):
        """0 block, 1 drop_oldest, 2 latest, 3 discard (nobody will read: drop and count all); from now on."""
        self.r.c.policy = policy
        if policy == UP_POLICY_DISCARD:
            self._drop(0, True)
        up_wake_all(&self.r)

    def wake_all(self):
        """Wake every sleeper: each looks again."""
        up_wake_all(&self.r)

    @property
    def ended(self):
        """True when every producer closed and every frame is finished."""
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
        cdef up_control *c = self.r.c
        cdef up_books head, tail
        cdef uint64_t head_pos, tail_pos
        up_books_read(&c.tail, c.tail_books, &tail_pos, &tail)
        up_books_read(&c.head, c.head_books, &head_pos, &head)
        oldest = 0
        if head_pos != tail_pos and up_kind(UP_LDA(up_state_at(&self.r, tail_pos))) in (UP_COMMITTED, UP_AVAILABLE, UP_TAKEN):
            oldest = up_frame_at(&self.r, tail_pos).timestamp
        return {
            "capacity": c.capacity, "head": head_pos, "tail": tail_pos, "next": UP_LD(&c.next),
            "claimed": head.frames, "bytes": head.bytes, "refused": head.dropped,
            "passed": tail.frames, "finished": tail.finished, "dropped": tail.dropped, "dead": tail.dead,
            "aborted": tail.aborted, "redelivered": c.redelivered, "corrupt": c.corrupt, "taken": c.taken,
            "max_depth": c.max_depth, "full_waits": c.full_waits, "empty_waits": c.empty_waits,
            "oldest_ns": oldest, "policy": c.policy, "stream": c.stream, "max_frames": c.max_frames,
            "participants": len(self.peers()) + (self.r.slot != UP_NONE),
        }

    def qsize(self):
        """Frames that nobody has taken yet (a moment's count)."""
        cdef up_books head, tail
        cdef uint64_t pos, waiting = 0
        cdef up_control *c = self.r.c
        if self.closed:
            raise QueueClosed(f"this handle of queue {self.label} is closed")
        self._lock(c.consumer_lock)
        pos = UP_LD(&c.next)
        waiting = c.redeliver
        while pos < up_position(UP_LDA(&c.head)):
            if up_kind(UP_LDA(up_state_at(&self.r, pos))) == UP_COMMITTED:
                waiting += 1
            pos += up_span(UP_LDA(up_state_at(&self.r, pos)))
        up_unlock(c.consumer_lock)
        return waiting

    def empty(self):
        """True when get_nowait would raise Empty (a moment's truth)."""
        cdef uint64_t pos, span
        if self.closed:
            raise QueueClosed(f"this handle of queue {self.label} is closed")
        self._lock(self.r.c.consumer_lock)
        cdef bint nothing = self.r.c.redeliver == 0 and up_peek(&self.r, &pos, &span) != UP_OK
        up_unlock(self.r.c.consumer_lock)
        return nothing

    def full(self):
        """True when not even a frame of 8 bytes has room (a moment's truth)."""
        if self.closed:
            raise QueueClosed(f"this handle of queue {self.label} is closed")
        self._lock(self.r.c.producer_lock)
        cdef bint none = up_room(&self.r, UP_GRANULE, 1) != UP_OK
        up_unlock(self.r.c.producer_lock)
        return none


include "_views.pxi"
include "_fan.pxi"
include "_ready.pxi"
