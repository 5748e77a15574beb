# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=True
"""Ring: one handle of one queue. The thin wrapper of _ring.h: arguments in, encode, lock, move, wake, decode.

Waiting, in every blocking call: try; spin briefly; arm (set the waiting bit); try again; sleep in poll(2) on the own
doorbell and, in a stand-alone queue, on pidfds of the other participants. The second try under the lock makes the sleep
safe.
"""

import errno as _errno
import os
import queue as _queue
import weakref as _weakref

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_AS_DOUBLE
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.errno cimport EINTR, errno
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

cimport numpy as cnp

from upipe import frame as _frame
from upipe.errors import (
    EncodeError,
    EndOfStream,
    FrameCorrupt,
    FrameTooLarge,
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
    const char *PyUnicode_AsUTF8AndSize(object value, Py_ssize_t *size) except NULL

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
    SPIN_MAX = 2000         # pause instructions before arming; halves when spinning did not help

cdef double LOCK_PATIENCE = 10.0
cdef double ALONE = 0.05    # seconds asleep before a stand-alone queue also watches its peers
cdef double LAZY = 0.002    # seconds a producer sleeps for much room at once, before it sleeps for what it needs

cdef int _generation = 0    # raised in every forked child: handles join again there, with slots and bells of their own


def _after_fork_in_child():
    global _generation
    _generation += 1
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
    bint armed, fresh           # counted as a sleeper; armed since the last try
    bint exact                  # asks for no more room than it needs


cdef inline void _waiting(Waiting *w, int producer, uint64_t need, double timeout) noexcept:
    w.producer = producer
    w.need = need
    w.timeout = timeout
    w.deadline = 0
    w.armed = w.fresh = w.exact = False


cdef object _handles = _weakref.WeakSet()
cdef int _exit_pid = 0      # process whose exit closes its handles


def close_handles():
    """At the end of this process: leave every queue, so that ends of stream are closed and slots are free at once."""
    for ring in list(_handles):
        (<Ring>ring)._at_exit()


cdef class Ring:
    """One handle of one queue (see MemQ, which adds names, files and pickling).

    A handle belongs to its process; in a forked child it joins the queue again by itself. Threads and tasks may share
    it: each get, put, reserve and borrow stands for itself, take() holds one frame per handle.
    """
    cdef up_ring r
    cdef int generation
    cdef bint closed, mapped, supervised
    cdef readonly bint allow_pickle
    cdef public bint interrupted  # waits end at once, as if their time were over (a worker that drains)
    cdef int users                # operations, reservations and loans under way; close() leaves when they are done
    cdef uint64_t held            # position + 1 of the frame that take() holds, 0 = none
    cdef up_frame last            # header of the frame that was read last
    cdef Doorbell bell_frames, bell_room  # of the consumer's and of the producer's end, made at the first sleep
    cdef object wakeup            # module upipe.memq.wakeup
    cdef object watch             # PeerWatch of a stand-alone queue, made at the first long sleep
    cdef double looked            # when a try that cannot wait looked for dead peers last
    cdef object trouble           # an exception that get_many met after good values: raised by the next get
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

    cdef _opened(self, str root, str label):
        self.mapped = True
        raw = os.fsencode(root)
        if len(raw) >= 160:
            raise QueueError(f"the path {root} is longer than 159 bytes; set UPIPE_SHM to a shorter one")
        memcpy(self.r.root, PyBytes_AS_STRING(raw), len(raw) + 1)
        self.r.root_hash = up_bell_hash(self.r.root)
        self.generation = _generation
        self.label = label
        self.allow_pickle = not (self.r.c.options & UP_OPT_NO_PICKLE)
        self.supervised = (self.r.c.options & UP_OPT_SUPERVISED) != 0
        _handles.add(self)

    def _create(self, int fd, uint64_t capacity, int policy, uint64_t max_frames, uint32_t options, str root,
                str label):
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
            raise SegmentInvalid(f"{label} is no uPipe queue (its magic is not ours); this build has layout version "
                                 f"{UP_VERSION}")
        elif rc == UP_OTHERVERSION:
            raise SegmentInvalid(
                f"{label} has layout version {found[0]} (fingerprint {found[1]:08x}), this build has version "
                f"{UP_VERSION} (fingerprint {up_fingerprint():08x}); use the same uPipe on both sides")
        elif rc == UP_TRUNCATED:
            raise SegmentInvalid(f"{label} (layout version {found[0]}) is shorter than it says; it was truncated, this "
                                 f"build has version {UP_VERSION}; create it again")
        else:
            raise OSError(errno, f"cannot map queue {label}: {os.strerror(errno)}")

    # ---------------------------------------------------------------- joining and leaving

    cdef int _enter(self) except -1:
        """Open, and joined in this very process?"""
        if self.closed or not self.mapped:
            raise QueueClosed(f"this handle of queue {self.label} is closed")
        if self.generation != _generation:  # a forked child: what the parent joined, holds and sleeps on is not ours
            self.generation = _generation
            self.r.slot = UP_NONE
            self.r.producer = UP_NONE
            self.held = 0
            self.users = 0
            self.bell_frames = self.bell_room = None
            self.watch = None
            self.trouble = None
        if self.r.slot == UP_NONE:
            self._join()
        return 0

    cdef inline int _begin(self) except -1:
        """Before every operation. _done() ends it, in a finally."""
        if self.closed or self.generation != _generation or self.r.slot == UP_NONE:
            self._enter()
        self.users += 1
        return 0

    cdef inline void _done(self) noexcept:
        self.users -= 1
        if self.closed and self.users == 0:
            self._depart()

    cdef int _mapped(self) except -1:
        """For what only reads the segment, which a closed handle still can."""
        if not self.mapped:
            raise QueueClosed("this handle was never opened; use MemQ(...) or MemQ.attach(name)")
        return 0

    cdef _join(self):
        global _exit_pid
        cdef int rc = UP_NOSLOT
        if _exit_pid != getpid():
            from upipe.memq import segment
            segment.at_exit(close_handles, -50)
            _exit_pid = getpid()
        for _attempt in range(2):
            self._lock(self.r.c.registry_lock)
            if self.r.slot != UP_NONE:  # another thread of ours was faster
                up_unlock(self.r.c.registry_lock)
                return
            rc = up_join_locked(&self.r)
            up_unlock(self.r.c.registry_lock)
            if rc != UP_NOSLOT:
                break
            self.recover_dead()
        if rc == UP_SYSTEM:
            raise QueueError(f"cannot read /proc/self/stat to join queue {self.label}: no file descriptor is left "
                             "(ulimit -n), or /proc is not mounted")
        if rc != UP_OK:
            raise TooManyParticipants(f"queue {self.label} has {UP_SLOTS} live participants, the most it can have")
        if not self.supervised:
            up_wake_all(&self.r)  # sleepers watch the newcomer's pidfd from now on

    cdef int _produce(self) except -1:
        if self.r.producer == UP_NONE:
            self._enter()
            if self.r.producer == UP_NONE and up_auto_producer(&self.r) != UP_OK:
                raise TooManyParticipants(f"queue {self.label} has {UP_PRODUCERS} open producers, the most it can have")
        return 0

    def close(self):
        """Close this handle and this producer's end of stream; what it holds is given back. Idempotent.

        Threads and tasks that wait on it get QueueClosed. While an operation, a reservation or a loan is under way in
        another thread, the handle leaves the queue when that is done.
        """
        if self.closed or not self.mapped:
            return
        self.closed = True
        if self.generation != _generation:
            return
        if self.users == 0:
            self._depart()
        else:
            for bell in (self.bell_frames, self.bell_room):
                if bell is not None:
                    bell.closing()

    @property
    def is_closed(self):
        """True after close()."""
        return bool(self.closed)

    cdef _depart(self):
        cdef size_t found
        if self.generation != _generation:
            return
        if self.r.slot != UP_NONE:
            up_recover(&self.r, self.r.slot, 0, NULL, 0, &found, NULL, 0)
            self.r.slot = self.r.producer = UP_NONE
        self.held = 0
        for bell in (self.bell_frames, self.bell_room, self.watch):
            if bell is not None:
                bell.close()
        self.bell_frames = self.bell_room = self.watch = None

    cdef _at_exit(self):
        if self.users == 0:  # else a daemon thread is inside, and the others see our end by our pidfd
            self.close()

    def __del__(self):
        self.close()

    def __dealloc__(self):
        if self.mapped:
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

    cdef Doorbell _bell(self, int producer):
        cdef Doorbell bell = self.bell_room if producer else self.bell_frames
        cdef Doorbell other
        if bell is None:
            if self.wakeup is None:
                from upipe.memq import wakeup
                self.wakeup = wakeup
            try:
                bell = self.wakeup.Bell()
            except OSError as error:
                self._no_descriptor(error)
                raise
            other = self.bell_room if producer else self.bell_frames
            if other is not None:  # another thread was faster
                bell.close()
                return other
            if producer:
                self.bell_room = bell
                self.r.slots[self.r.slot].bell_producer = bell.id
            else:
                self.bell_frames = bell
                self.r.slots[self.r.slot].bell_consumer = bell.id
        return bell

    cdef _no_descriptor(self, error):
        if error.errno in (_errno.EMFILE, _errno.ENFILE):
            raise QueueError(f"cannot sleep on queue {self.label}: no file descriptor is left (ulimit -n); nothing was "
                             "put or taken; close some, or raise the limit") from error

    cdef inline uint64_t *_bits(self, int producer) noexcept:
        if producer:
            return self.r.c.producers_waiting
        return self.r.c.consumers_waiting

    cdef int _spin(self, int producer) noexcept:
        """Spin while nothing changes; 1 when something did. The length follows how often spinning helped."""
        cdef int _i, n = self.spin[producer]
        cdef uint64_t *word = &self.r.c.tail
        cdef uint64_t before
        cdef int hit = 0
        if not producer:
            before = UP_LD(&self.r.c.next)
            if before == up_position(UP_LDA(&self.r.c.head)):
                word = &self.r.c.head  # nothing claimed: wait for a claim
            else:
                word = up_state_at(&self.r, before)  # the next frame is being written: wait for its commit
        before = UP_LD(word)
        with nogil:
            for _i in range(n):
                UP_PAUSE()
                if UP_LD(word) != before:
                    hit = 1
                    break
        if hit:
            self.spin[producer] = min(SPIN_MAX, n * 2 + 16)
        else:
            self.spin[producer] = max(16, n // 2)
        return hit

    def arm(self, int producer, uint64_t need=0, bint exact=False):
        """Set the waiting bit (bell ready). Try again after this, then sleep on bell(producer).fd.

        Args:
            producer: 1 waits for room, 0 for a frame.
            need: ring bytes that must be free, 0 = wake whenever some come free.
            exact: False waits until an eighth of the ring is free, so that a fast producer is not woken for each frame.
                Who is not exact must look again after a moment if anything can depend on it: room for one frame may be
                all that comes.
        """
        self._begin()
        try:
            self._arm(producer, self._bell(producer), need, need != 0 and not exact)
        finally:
            self._done()

    cdef void _arm(self, int producer, Doorbell bell, uint64_t need, bint lazy) noexcept:
        cdef uint64_t head, want = 0, free_ = need
        if producer:
            if lazy:
                free_ = min(max(need, self.r.capacity // 8), self.r.capacity)
            if free_ and not self.r.c.max_frames and bell.sleepers + bell.tasks <= 1:  # more: each has its own need
                head = up_position(UP_LDA(&self.r.c.head))
                if head + free_ > self.r.capacity:
                    want = head + free_ - self.r.capacity
            self.r.slots[self.r.slot].need_tail = want
            self.r.c.full_waits += 1
        else:
            self.r.c.empty_waits += 1
        up_arm(&self.r, self._bits(producer))

    def disarm(self, int producer):
        """Clear the waiting bit. False: somebody rang, so who leaves without a frame passes the wake on."""
        if self.closed or self.generation != _generation or self.r.slot == UP_NONE:
            return True
        return bool(up_disarm(&self.r, self._bits(producer)))

    def pass_on(self, int producer):
        """Wake another sleeper in our stead."""
        self._mapped()
        if producer:
            up_wake_producers(&self.r)
        else:
            up_wake_consumers(&self.r, 1)

    def left(self, int producer):
        """A waiter on bell(producer) is done waiting, with or without success: nobody's wake is lost."""
        self._left_bell(producer)

    cdef void _left_bell(self, int producer) noexcept:
        """The next on this bell looks when there may be more for it (the bit tells nothing about the frames before it
        was set, and we may have set it ourselves). When there is no next, the bit goes; a wake that we were given goes
        on to another process if there is more than we took."""
        cdef Doorbell bell = self.bell_room if producer else self.bell_frames
        if bell is None or self.closed or self.generation != _generation or self.r.slot == UP_NONE:
            return
        if bell.sleepers + bell.tasks > 0:
            if (producer or self._something()
                    or not UP_LD(&self._bits(producer)[self.r.slot // 64]) >> (self.r.slot & 63) & 1):
                bell.ring()
        else:
            up_disarm(&self.r, self._bits(producer))

    cdef bint _something(self) noexcept:
        """Is there a frame to take, or the end to learn? (A hint, without the lock: yes when in doubt.)"""
        cdef uint64_t at = UP_LD(&self.r.c.next)
        if UP_LD(&self.r.c.redeliver):
            return True
        if at == up_position(UP_LDA(&self.r.c.head)):
            return up_ended(&self.r) != 0
        return up_kind(UP_LDA(up_state_at(&self.r, at))) != UP_CLAIMED  # its commit wakes somebody

    def bell(self, int producer):
        """The doorbell of this handle for frames (0) or room (1): a file descriptor to watch is its .fd."""
        self._begin()
        try:
            return self._bell(producer)
        finally:
            self._done()

    cdef bint _again(self, Waiting *w) except -1:
        """After a try that failed: spin, arm or sleep; False when it is time to give up."""
        cdef int rc
        cdef Doorbell bell
        if w.timeout <= 0 or self.interrupted:
            return w.deadline == 0 and not self.supervised and self._peers_ended()
        if w.deadline == 0:
            w.deadline = _now() + w.timeout
            if self._spin(w.producer):
                return True
        if not w.fresh:  # arm, and let the caller try once more before we sleep
            bell = self._bell(w.producer)
            if not w.armed:
                w.armed = True
                bell.sleepers += 1
            self._arm(w.producer, bell, w.need, not w.exact)
            w.fresh = True
            return True
        w.fresh = False
        try:
            rc = self._sleep(w.producer, w.deadline, w.need != 0 and not w.exact)
        except BaseException:
            self._left(w, 0)
            raise
        if rc == 0:
            w.timeout = 0
        elif rc == 2:
            w.exact = True
        if self.closed:
            self._left(w, 0)
            raise QueueClosed(f"this handle of queue {self.label} was closed while it waited")
        return True

    cdef int _left(self, Waiting *w, int rc) noexcept:
        """Done waiting. Runs no Python code: a signal handler must not raise between a take and its return."""
        cdef Doorbell bell = self.bell_room if w.producer else self.bell_frames
        if w.armed:
            w.armed = False
            bell.sleepers -= 1
            self._left_bell(w.producer)
        return rc

    cdef int _sleep(self, int producer, double deadline, bint lazy) except -1:
        """Sleep until the bell, a peer's death or the deadline. 0 when the deadline passed, 2 when LAZY did, else 1."""
        cdef pollfd fds[2]
        cdef int n = 1, rc = 0, timeout
        cdef double left, start = _now(), most
        cdef Doorbell bell = self._bell(producer)
        fds[0].fd = bell.fd
        fds[0].events = POLLIN
        fds[1].events = POLLIN
        while True:
            left = most = deadline - _now()
            if left <= 0:
                return 0
            if lazy:
                most = min(left, start + LAZY - _now())
                if most <= 0:
                    return 2
            n = 1
            if not self.supervised:
                if self.watch is not None and self.watch.joined == self.r.c.joined:
                    fds[1].fd = self.watch.fd
                    n = 2
                else:
                    most = min(most, start + ALONE - _now())
                    if most <= 0:
                        if self._watch():
                            return 1
                        continue
            timeout = -1 if most > 1e6 else <int>(most * 1000) + 1
            with nogil:
                rc = c_poll(fds, n, timeout)
            if rc < 0 and errno != EINTR:
                raise OSError(errno, "poll failed while waiting for a queue")
            if rc < 0:
                PyErr_CheckSignals()
                continue
            if rc > 0:
                if self.closed:
                    return 1  # the bell stays rung: all that sleep on it shall see this
                if fds[0].revents:
                    up_bell_drain(fds[0].fd)
                if n == 2 and fds[1].revents:
                    self._watch()
                return 1

    cdef bint _watch(self) except -1:
        """Watch the pidfds of all peers. True when some had ended: they are recovered, so try again."""
        cdef uint32_t joined = self.r.c.joined
        if self.watch is None:
            if self.wakeup is None:
                from upipe.memq import wakeup
                self.wakeup = wakeup
            try:
                watch = self.wakeup.PeerWatch()
            except OSError as error:
                self._no_descriptor(error)
                raise
            if self.watch is None:  # no other thread was faster
                self.watch = watch
        try:
            ended = self.watch.refresh(self._watchable(), joined)
        except OSError as error:
            self._no_descriptor(error)
            raise
        if ended:
            self.recover_dead()
            self.watch.joined = -1  # their slots are free now: look at the list again before the next sleep
        return ended

    def watch_fd(self):
        """For event loops: a descriptor that becomes readable when a peer ends (then call look()), -1 when a supervisor
        watches instead."""
        self._begin()
        try:
            while not self.supervised:
                if (self.watch is not None and self.watch.joined == self.r.c.joined) or not self._watch():
                    return self.watch.fd
            return -1
        finally:
            self._done()

    def attend(self):
        """Let the running event loop recover peers that end, while its tasks wait (after watch_fd())."""
        if self.watch is not None:
            self.watch.attend(self)

    def look(self):
        """Recover the peers that ended. True when there were any."""
        self._begin()
        try:
            return bool(self._watch())
        finally:
            self._done()

    cdef bint _peers_ended(self) except -1:
        """For tries that never sleep: at most every ALONE seconds, see whether a peer died with what we want."""
        cdef pollfd one
        cdef double now = <double>up_now_ns(CLOCK_MONOTONIC_COARSE) * 1e-9
        if now - self.looked < ALONE:
            return False
        self.looked = now
        try:
            if self.watch is None or self.watch.joined != self.r.c.joined:
                return self._watch()
            one.fd = self.watch.fd
            one.events = POLLIN
            return c_poll(&one, 1, 0) > 0 and self._watch()
        except QueueError as error:
            if isinstance(error, QueueStuck):
                raise
            return False  # no descriptor left: then later

    cdef list _watchable(self):
        cdef uint32_t i
        mine = os.getpid()
        cdef uint64_t here = self.r.slots[self.r.slot].pidns  # a pid of another namespace means nothing here
        return [(self.r.slots[i].pid, self.r.slots[i].start) for i in range(UP_SLOTS)
                if self.r.slots[i].pid and self.r.slots[i].pid != mine and self.r.slots[i].pidns == here]

    # ---------------------------------------------------------------- putting

    cdef int _copy_in(self, uint64_t pos, Out *o, list parts, uint32_t *crc) except -1:
        cdef uint8_t *to = up_payload(&self.r, pos)
        cdef uint64_t left = o.m.size
        cdef Py_buffer view
        crc[0] = 0
        if o.m.flags & UP_FLAG_INLINE:
            return 0
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
                try:
                    if <uint64_t>view.len > left:
                        break
                    with nogil:
                        c = up_crc32_copy(c, to, view.buf, view.len)
                    to += view.len
                    left -= view.len
                finally:
                    PyBuffer_Release(&view)
            else:
                if left == 0:
                    crc[0] = c
                    return 0
            raise EncodeError(f"the buffers of a value changed their size while it was put into queue {self.label}; "
                              "nothing was put")
        crc[0] = c
        return 0

    cdef int _try_put(self, Out *o, list parts) except -100:
        """One attempt. UP_OK, UP_FULL, or UP_REFUSED (a drop policy dropped the newcomer)."""
        cdef uint64_t need = up_need(o.m.size, o.m.flags), pos
        cdef uint32_t crc = 0
        cdef int rc
        self._fits(need)
        if self.r.c.policy == UP_POLICY_LATEST:
            self._clear(need)
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
            if self._skip_padding():
                return UP_AGAIN
            rc = self._full(need, False)
            if rc != UP_REFUSED:
                return rc
            if not self._replace(need, &pos):
                self._count_refused()
                return rc
        try:
            self._copy_in(pos, o, parts, &crc)
        except BaseException:
            self._abort(pos)
            raise
        up_commit(&self.r, pos, &o.m, crc)
        up_wake_consumers(&self.r, 1)
        return UP_OK

    cdef void _abort(self, uint64_t pos) noexcept:
        """A claim of ours becomes padding."""
        up_abort(&self.r, pos)
        up_wake_consumers(&self.r, 1)

    cdef void _unlock_consumers(self, uint64_t before) noexcept:
        """Leave the consumers' lock. When tail moved since `before`, who waits for room or for the end hears of it."""
        cdef uint64_t after = UP_LD(&self.r.c.tail)
        up_unlock(self.r.c.consumer_lock)
        if after != before:
            up_wake_producers(&self.r)
            if up_ended(&self.r):
                up_wake_consumers(&self.r, UP_SLOTS)

    cdef int _drop(self, uint64_t need, bint all_) except -1:
        cdef uint64_t before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        up_drop(&self.r, need, all_)
        self._unlock_consumers(before)
        return 0

    cdef int _clear(self, uint64_t need) except -1:
        """Only the newest counts: drop what waits, unless the newcomer has no room and takes the newest one's place."""
        cdef int rc
        self._lock(self.r.c.producer_lock)
        rc = up_room(&self.r, need, 1)
        up_unlock(self.r.c.producer_lock)
        return self._drop(need, 1) if rc == UP_OK else 0

    cdef bint _replace(self, uint64_t need, uint64_t *pos) except -1:
        """Claim the place of the newest frame that nobody took, which counts as dropped; see up_replace."""
        cdef int rc
        cdef uint64_t before
        self._lock(self.r.c.producer_lock)
        try:
            self._lock(self.r.c.consumer_lock)
            before = UP_LD(&self.r.c.tail)
            rc = up_replace(&self.r, need, pos)
            self._unlock_consumers(before)
        finally:
            up_unlock(self.r.c.producer_lock)
        return rc == UP_OK

    cdef int _count_refused(self) except -1:
        self._lock(self.r.c.producer_lock)
        up_count_refused(&self.r)
        up_unlock(self.r.c.producer_lock)
        return 0

    cdef bint _skip_padding(self) except -1:
        """Free unfinished writes that no consumer passed yet, since none may be there. True when room came of it."""
        cdef uint64_t at = UP_LD(&self.r.c.next), before, pos, span
        cdef bint moved
        if at == up_position(UP_LDA(&self.r.c.head)) or up_kind(UP_LDA(up_state_at(&self.r, at))) != UP_ABORTED:
            return False
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        up_peek(&self.r, &pos, &span)
        moved = UP_LD(&self.r.c.tail) != before
        self._unlock_consumers(before)
        return moved

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
        try:
            while True:
                rc = self._try_put(o, parts)
                if rc != UP_AGAIN and (rc != UP_FULL or not self._again(&w)):
                    return rc
        finally:
            self._left(&w, 0)

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
        if not self._send(value, dtype, _timeout(block, timeout), self.execution, key, 0):
            raise _queue.Full

    def put_nowait(self, value):
        """put(value, block=False)."""
        if not self._send(value, -1, 0.0, self.execution, 0, 0):
            raise _queue.Full

    def send(self, value, int dtype=-1, double timeout=0.0, uint64_t execution=0, uint32_t key=0, int flags=0):
        """The runtime's put: True when it is in (or was dropped by policy), False when there was no room in time."""
        return self._send(value, dtype, timeout, execution, key, flags)

    cdef bint _send(self, value, int dtype, double timeout, uint64_t execution, uint32_t key, int flags) except -1:
        cdef Out o
        self._begin()
        try:
            parts = _encode(value, dtype, &o, self.allow_pickle)
            self._produce()  # after the value has proved good: who puts nothing has no end of stream to close
            o.m.execution = execution
            o.m.key = key
            o.m.flags |= flags
            return self._put(&o, parts, timeout) != UP_FULL
        finally:
            self._done()

    def put_many(self, values, int dtype=-1, timeout=None):
        """Put each element of an iterable, or each scalar of a 1-d array, as a frame of its own; many frames per lock.

        Returns the number of frames put: all of them, or fewer when `timeout` (seconds, None = for ever) ran out.
        When an element cannot be put (EncodeError, FrameTooLarge ...), those before it are in.
        """
        cdef double wait = _timeout(True, timeout), deadline
        self._begin()
        try:
            self._produce()
            deadline = _now() + wait
            if isinstance(values, cnp.ndarray):
                flat = _scalar_array(values, dtype)
                if flat is not None:
                    return self._put_array(flat, deadline)
                values = values.tolist() if values.ndim == 1 and values.dtype != object else list(values)
            return self._put_sequence(values if isinstance(values, (list, tuple)) else list(values), dtype, deadline)
        finally:
            self._done()

    cdef Py_ssize_t _put_batch(self, Out *outs, Py_ssize_t n, double deadline) except -1:
        """Put n inline frames, waiting for room. Returns how many are in when the deadline passes."""
        cdef Py_ssize_t done = 0, k, i
        cdef uint64_t bytes_
        while done < n:
            k = 0
            if self.r.c.policy <= UP_POLICY_DROP_OLDEST:
                k = n - done
                bytes_ = 0
                self._lock(self.r.c.producer_lock)
                while k and up_room(&self.r, k * UP_GRANULE, k) != UP_OK:
                    k //= 2
                for i in range(k):
                    up_put_inline_at(&self.r, &outs[done + i].m, i * UP_GRANULE)
                    bytes_ += outs[done + i].m.size
                if k:
                    up_publish(&self.r, k * UP_GRANULE, k, bytes_)
                up_unlock(self.r.c.producer_lock)
            if k:
                up_wake_consumers(&self.r, k)
                done += k
            elif self._put(&outs[done], None, max(0.0, deadline - _now())) == UP_FULL:
                break
            else:
                done += 1
        return done

    cdef _put_array(self, cnp.ndarray values, double deadline):
        cdef Py_ssize_t done = 0, total = values.shape[0], width = values.itemsize, n, i, k
        cdef const uint8_t *data = <const uint8_t *>cnp.PyArray_DATA(values)
        cdef Out outs[BATCH]
        _meta(&outs[0].m, _item_to_dtype[_item_of(values)], UP_FLAG_INLINE, width)
        outs[0].m.execution = self.execution
        for i in range(1, min(BATCH, total)):
            outs[i] = outs[0]
        while done < total:
            n = min(BATCH, total - done)
            if done:
                outs[0].m.timestamp = up_now_ns(CLOCK_REALTIME)
            for i in range(n):
                outs[i].m.inline_ = _element(data, done + i, width)
                outs[i].m.timestamp = outs[0].m.timestamp
            k = self._put_batch(outs, n, deadline)
            done += k
            if k < n:
                break
        return done

    cdef _put_sequence(self, values, int dtype, double deadline):
        cdef Py_ssize_t done = 0, total = len(values), n, k
        cdef Out outs[BATCH]
        cdef list parts
        cdef bint single
        while done < total:
            n = 0
            single = False
            while n < BATCH and done + n < total:
                try:
                    parts = _encode(values[done + n], dtype, &outs[n], self.allow_pickle)
                except Exception:
                    if n == 0:
                        raise
                    break  # those before it go in first
                outs[n].m.execution = self.execution
                if not outs[n].m.flags & UP_FLAG_INLINE:
                    single = True
                    break
                n += 1
            k = self._put_batch(outs, n, deadline)
            done += k
            if k < n:
                break
            if single:
                if self._put(&outs[n], parts, max(0.0, deadline - _now())) == UP_FULL:
                    break
                done += 1
        return done

    # ---------------------------------------------------------------- taking

    cdef int _try_consume(self, up_frame *out) except -100:
        """Take, copy, check and finish a one-granule frame. UP_TOOBIG: it is larger (or a redelivery).
        UP_CORRUPT: it was buried."""
        cdef int rc = UP_TOOBIG
        cdef uint64_t before, pos, span
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        if self.r.c.redeliver == 0:
            rc = up_peek(&self.r, &pos, &span)
            if rc == UP_OK:
                rc = self._consume_at(pos, span, out)
                if rc == UP_OK:
                    up_advance(&self.r)
                elif rc == UP_CORRUPT and up_take(&self.r, &pos) == UP_OK:
                    up_finish(&self.r, pos, UP_DEAD)
        self._unlock_consumers(before)
        if rc == UP_EMPTY and up_ended(&self.r):
            rc = UP_END
        return rc

    cdef inline int _consume_at(self, uint64_t pos, uint64_t span, up_frame *out) noexcept:
        """The peeked frame into *out, checked, and consumed when it is right. Under the consumers' lock."""
        cdef up_frame again
        if span != UP_GRANULE:
            return UP_TOOBIG
        out[0] = up_frame_at(&self.r, pos)[0]
        if not (self.r.c.options & UP_OPT_NO_CRC) and up_crc32_header(out, 0) != out.crc:
            return UP_CORRUPT
        return up_consume(&self.r, &again)

    cdef int _try_take(self, uint64_t *pos, bint holding) except -100:
        """Take one frame. holding: as take() does, which finishes the one that it held before."""
        cdef int rc
        cdef uint64_t before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        if holding and self.held:
            self._finish_at(self.held - 1, UP_FINISHED)
            self.held = 0
        rc = up_take(&self.r, pos)
        if holding and rc == UP_OK:
            self.held = pos[0] + 1
        self._unlock_consumers(before)
        if rc == UP_EMPTY and up_ended(&self.r):
            rc = UP_END
        return rc

    cdef int _finish_at(self, uint64_t pos, uint32_t kind) noexcept:
        """Under the consumers' lock. UP_NOTYOURS when we do not hold it any more."""
        if pos < up_position(UP_LD(&self.r.c.tail)) or pos >= UP_LD(&self.r.c.next) or pos % UP_GRANULE:
            return UP_NOTYOURS
        return up_finish(&self.r, pos, kind)

    cdef int _wait_frame(self, uint64_t *pos, up_frame *out, bint holding, double timeout) except -100:
        """Take, or with out != NULL consume, waiting up to timeout. UP_OK: consumed into *out. UP_TOOBIG: taken at
        *pos. UP_CORRUPT: buried, see *out. UP_EMPTY, UP_END."""
        cdef Waiting w
        cdef int rc
        if self.trouble is not None:
            error, self.trouble = self.trouble, None
            raise error
        _waiting(&w, 0, 0, timeout)
        try:
            while True:
                rc = self._try_consume(out) if out != NULL else UP_TOOBIG
                if rc == UP_TOOBIG:
                    rc = self._try_take(pos, holding)
                    if rc == UP_OK:
                        rc = UP_TOOBIG
                if rc != UP_EMPTY or not self._again(&w):
                    return rc
        finally:
            self._left(&w, 0)

    cdef int _checked(self, up_frame *f, uint64_t pos) except -1:
        """Header sane and the frame inside its span? Raises FrameCorrupt otherwise."""
        cdef uint64_t span = up_span(UP_LD(up_state_at(&self.r, pos)))
        if f.magic != UP_FRAME_MAGIC or f.version != UP_VERSION or f.size > span or up_need(f.size, f.flags) > span:
            self._corrupt(pos)
        return 0

    cdef _corrupt(self, uint64_t pos):
        self.r.c.corrupt += 1
        raise FrameCorrupt(f"the frame at position {pos} of queue {self.label} does not match its CRC32: its bytes "
                           "changed after they were written (a stray write or bad memory); it was not delivered")

    cdef object _read(self, uint64_t pos):
        """Copy the frame out, check it, decode it. Raises FrameCorrupt, or what decoding raises."""
        cdef up_frame f = up_frame_at(&self.r, pos)[0]  # a copy of our own: other threads read on this handle, too
        cdef uint32_t crc = 0
        cdef bint check = not (self.r.c.options & UP_OPT_NO_CRC)
        cdef uint8_t *to
        cdef uint8_t *data = up_payload(&self.r, pos)
        self.last = f
        self._checked(&f, pos)
        if f.flags & UP_FLAG_INLINE or f.size == 0:
            if check and up_crc32_header(&f, 0) != f.crc:
                self._corrupt(pos)
            return _decode(&f, None if f.flags & UP_FLAG_INLINE else _block(0), self.allow_pickle)
        if f.dtype == _BYTES:
            target = PyBytes_FromStringAndSize(NULL, f.size)
            to = <uint8_t *>PyBytes_AS_STRING(target)
        else:
            target = _block(f.size)
            to = (<Block>target).data
        if not check:
            with nogil:
                memcpy(to, data, f.size)
        elif f.size >= LARGE:
            with nogil:
                crc = up_crc32_copy(0, to, data, f.size)
        else:
            crc = up_crc32_copy(0, to, data, f.size)
        if check and up_crc32_header(&f, crc) != f.crc:
            self._corrupt(pos)
        self.last = f
        return target if f.dtype == _BYTES else _decode(&f, target, self.allow_pickle)

    cdef object _get(self, double timeout, up_frame *f):
        """get(); the frame's header into *f."""
        cdef uint64_t pos = 0
        cdef int rc = self._wait_frame(&pos, f, False, timeout)
        if rc == UP_OK:
            self.last = f[0]
            return _decode(f, None, self.allow_pickle)
        if rc == UP_TOOBIG:
            f[0] = up_frame_at(&self.r, pos)[0]
            return self._read_and_end(pos)
        self._nothing(rc, f)

    cdef object _read_and_end(self, uint64_t pos):
        """The value of a taken frame, which is ended whatever happens; only an interrupt (Ctrl-C) gives it back."""
        try:
            value = self._read(pos)
        except FrameCorrupt:
            self._end(pos, UP_DEAD)
            raise
        except Exception:
            self._end(pos, UP_FINISHED)
            raise
        except BaseException:
            self._return(pos)
            raise
        self._end(pos, UP_FINISHED)
        return value

    cdef _nothing(self, int rc, up_frame *f):
        """Raise why there is no frame."""
        if rc == UP_CORRUPT:
            self.last = f[0]
            self._corrupt(f.position)
        if rc == UP_END:
            raise EndOfStream(f"queue {self.label} has ended: every producer closed and every frame is finished")
        raise _queue.Empty

    cdef int _end(self, uint64_t pos, uint32_t kind) except -1:
        cdef int rc
        cdef uint64_t before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        rc = self._finish_at(pos, kind)
        self._unlock_consumers(before)
        if rc != UP_OK:
            raise QueueError(f"the frame at {pos} of queue {self.label} is not held by this handle (it was recovered)")
        return 0

    cdef int _return(self, uint64_t pos) except -1:
        """Give a frame back. Without effect when it was recovered meanwhile."""
        cdef int rc = UP_NOTYOURS
        self._lock(self.r.c.consumer_lock)
        if up_position(UP_LD(&self.r.c.tail)) <= pos < UP_LD(&self.r.c.next):
            rc = up_give_back(&self.r, pos)
        up_unlock(self.r.c.consumer_lock)
        if rc == UP_OK:
            up_wake_consumers(&self.r, 1)
        return 0

    def get(self, block=True, timeout=None):
        """Take, copy and finish the next value: what multiprocessing.Queue.get does.

        A worker that must not lose a frame when it dies uses take() and finish(), or borrow().

        Raises:
            queue.Empty, EndOfStream, FrameCorrupt, QueueClosed. What decoding raises (PickleRefused, an exception of a
            class that is unpickled): the frame is finished then, and the next get goes on behind it.
        """
        cdef up_frame f
        cdef double wait = _timeout(block, timeout)
        self._begin()
        try:
            return self._get(wait, &f)
        finally:
            self._done()

    def get_nowait(self):
        """get(block=False)."""
        cdef up_frame f
        self._begin()
        try:
            return self._get(0.0, &f)
        finally:
            self._done()

    def get_keyed(self, double timeout):
        """(value, key in its header): get() for who puts a meaning into keys."""
        cdef up_frame f
        self._begin()
        try:
            return self._get(timeout, &f), f.key
        finally:
            self._done()

    def take(self, block=True, timeout=None):
        """Take the next value and hold its frame until finish(), give_back() or the next take().

        If this process dies before, the frame is delivered again with its count raised. A frame whose value cannot be
        read (FrameCorrupt, or what decoding raises) is held as well: finish(dead=True) buries it.
        """
        cdef up_frame none
        cdef uint64_t pos = 0
        cdef double wait = _timeout(block, timeout)
        cdef int rc
        self._begin()
        try:
            rc = self._wait_frame(&pos, NULL, True, wait)
            if rc != UP_TOOBIG:
                self._nothing(rc, &none)
            return self._read(pos)
        finally:
            self._done()

    def receive(self, double timeout=0.0):
        """The runtime's take: (True, value), (False, None) when empty, or None at the end of the stream."""
        cdef uint64_t pos = 0
        cdef int rc
        self._begin()
        try:
            rc = self._wait_frame(&pos, NULL, True, timeout)
            if rc == UP_TOOBIG:
                return (True, self._read(pos))
            return None if rc == UP_END else _NOTHING
        finally:
            self._done()

    def finish(self, bint dead=False):
        """End the held frame: finished, or (dead) moved to the dead letters. Nothing held: does nothing.

        Raises:
            QueueError: the frame was recovered meanwhile, so that somebody else gets it.
        """
        if self.held == 0:
            return
        self._begin()
        try:
            if self.held:  # not in a forked child, where _begin() forgot what the parent holds
                self._end_held(UP_DEAD if dead else UP_FINISHED)
        finally:
            self._done()

    cdef int _end_held(self, uint32_t kind) except -1:
        try:
            self._end(self.held - 1, kind)
        except QueueStuck:
            raise  # still ours: the next finish() tries again
        except QueueError:
            self.held = 0
            raise
        self.held = 0
        return 0

    def give_back(self):
        """Give the held frame back: it is delivered again, to anyone, with its delivery count raised."""
        if self.held == 0:
            return
        self._begin()
        try:
            if self.held:
                self._return(self.held - 1)
                self.held = 0
        finally:
            self._done()

    def detach_held(self):
        """Position of the held frame, which stays held beyond the next take(); end it with end(position)."""
        pos, self.held = self.held, 0
        return pos - 1 if pos and self.generation == _generation else None

    def end(self, uint64_t position, bint dead=False):
        """End a frame that detach_held() or recover() named."""
        self._begin()
        try:
            self._end(position, UP_DEAD if dead else UP_FINISHED)
        finally:
            self._done()

    @property
    def holding(self):
        """Position of the frame that take() holds, or None."""
        return self.held - 1 if self.held and self.generation == _generation else None

    def raw(self, uint64_t position):
        """Header and payload of a frame this handle holds, as bytes; only the ring's span is trusted."""
        self._mapped()
        cdef up_frame *f = up_frame_at(&self.r, position)
        cdef uint64_t span = up_span(UP_LD(up_state_at(&self.r, position)))
        cdef uint64_t size = 0 if f.flags & UP_FLAG_INLINE else min(f.size, span - UP_GRANULE)
        return PyBytes_FromStringAndSize(<char *>f, UP_GRANULE + size)

    def header(self):
        """Of the last frame read: (position, deliveries, execution, key, producer, epoch, timestamp ns, dtype, flags,
        size)."""
        cdef up_frame *f = &self.last
        return (f.position, f.deliveries, f.execution, f.key, f.producer, f.epoch, f.timestamp, f.dtype, f.flags,
                f.size)

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

        Returns a list, or with array=True a 1-d array of scalars: it ends where the DType changes, and a value that is
        no scalar comes back as a list of one. A frame that cannot be read ends the batch before it, and the next get
        raises.

        Raises:
            queue.Empty, EndOfStream, FrameCorrupt: as get().
        """
        cdef double wait = _timeout(True, timeout)
        if max < 1:
            raise ValueError(f"get_many takes at least 1, not {max}")
        self._begin()
        try:
            return self._get_array(max, wait) if array else self._get_list(max, wait)
        finally:
            self._done()

    cdef _get_list(self, Py_ssize_t most, double wait):
        cdef up_frame batch[BATCH]
        cdef up_frame f
        cdef Py_ssize_t n, i
        cdef int dtype = -1
        cdef list values = []
        while len(values) < most:
            n = 0
            if self.trouble is None:
                n = self._consume_batch(batch, min(BATCH, most - len(values)), False, &dtype, NULL)
            for i in range(n):
                values.append(_decode(&batch[i], None, self.allow_pickle))
            if n:
                self.last = batch[n - 1]
                continue
            if not values:  # wait; or it is a frame of the other kinds
                values.append(self._get(wait, &f))
                continue
            try:
                values.append(self._get(0.0, &f))
            except (_queue.Empty, EndOfStream):
                break
            except Exception as error:
                self.trouble = error
                break
        return values

    cdef _get_array(self, Py_ssize_t most, double wait):
        cdef up_frame batch[BATCH]
        cdef up_frame f
        cdef Py_ssize_t n = 0, i, total = 0, width, room = 0
        cdef int dtype = -1
        cdef uint8_t *to = NULL
        if self.trouble is None:
            n = self._consume_batch(batch, min(BATCH, most), True, &dtype, &room)
        if n == 0:
            first = self._get(wait, &f)
            if not (f.flags & UP_FLAG_INLINE and f.dtype in _dtype_to_num):
                return [first]
            batch[0] = f
            dtype = f.dtype
            n = 1
            room = (up_position(UP_LDA(&self.r.c.head)) - UP_LD(&self.r.c.next)) // UP_GRANULE
        room = min(most, n + room)
        out = _array_of(dtype, room)
        to = <uint8_t *>cnp.PyArray_DATA(out)
        width = cnp.PyArray_ITEMSIZE(out)
        while True:
            for i in range(n):
                _set_element(to, total + i, width, batch[i].inline_)
            total += n
            self.last = batch[n - 1]
            if total == room:
                return out
            n = self._consume_batch(batch, min(BATCH, room - total), True, &dtype, NULL)
            if n == 0:
                return out[:total]

    cdef Py_ssize_t _consume_batch(self, up_frame *batch, Py_ssize_t most, bint scalars, int *dtype,
                                   Py_ssize_t *behind) except -1:
        """Consume up to `most` frames whose decoding cannot fail, under one lock; it ends before any other frame.

        scalars: only scalars of one DType (*dtype, -1 = that of the first). *behind: granules in the ring behind them.
        """
        cdef Py_ssize_t n = 0
        cdef uint64_t pos = 0, span = 0, before
        self._lock(self.r.c.consumer_lock)
        before = UP_LD(&self.r.c.tail)
        while n < most and self.r.c.redeliver == 0 and up_peek(&self.r, &pos, &span) == UP_OK:
            if span != UP_GRANULE or not _is_plain(up_frame_at(&self.r, pos), scalars):
                break
            if scalars:
                if dtype[0] < 0:
                    dtype[0] = up_frame_at(&self.r, pos).dtype
                elif up_frame_at(&self.r, pos).dtype != dtype[0]:
                    break
            if self._consume_at(pos, span, &batch[n]) != UP_OK:
                break
            n += 1
        if n:
            up_advance(&self.r)
        if behind != NULL:
            behind[0] = (self.r.c.cached_head - UP_LD(&self.r.c.next)) // UP_GRANULE
        self._unlock_consumers(before)
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
            self._clear(need)
        try:
            while True:
                self._lock(self.r.c.producer_lock)
                rc = up_room(&self.r, need, 1)
                pos = up_claim(&self.r, need, m.size) if rc == UP_OK else 0
                up_unlock(self.r.c.producer_lock)
                if rc == UP_OK:
                    return pos
                if self._skip_padding() or (
                        self.r.c.policy != UP_POLICY_BLOCK and self._full(need, False) == UP_AGAIN):
                    continue
                if self.r.c.policy not in (UP_POLICY_BLOCK, UP_POLICY_DISCARD) and self._replace(need, &pos):
                    return pos
                if not self._again(&w):
                    raise _queue.Full
        finally:
            self._left(&w, 0)

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
            with nogil:
                crc = up_crc32(0, data, f.size)
            if up_crc32_header(&f, crc) != f.crc:
                self._corrupt(pos)
        self.last = f
        pin = _Pin()
        pin.ring = self
        if f.dtype == _ARRAY:
            value = _array_view(&f, pin, data, False)
            return self._read(pos) if value is None else value
        if f.size >= 2097152:
            return memoryview(self._read(pos))
        pin.data = data
        pin.size = f.size
        return memoryview(pin)

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
        self._mapped()
        mine = os.getpid()
        return [(self.r.slots[i].pid, self.r.slots[i].start) for i in range(UP_SLOTS)
                if self.r.slots[i].pid and self.r.slots[i].pid != mine]

    def recover_dead(self):
        """Recover every participant that is proven dead. Returns how many there were."""
        cdef uint32_t i
        cdef size_t found
        cdef int rc
        self._mapped()
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
        self._mapped()
        up_set_producer(&self.r, id, UP_PRODUCER_DECLARED, 0)

    def use_producer(self, uint32_t id, uint32_t epoch=0):
        """Bind this handle to a declared producer id, in its life number `epoch`."""
        self._enter()
        if up_use_producer(&self.r, id, epoch) != UP_OK:
            raise TooManyParticipants(f"queue {self.label} has no producer id {id}")

    def close_producer(self, uint32_t id):
        """Close a producer's end of stream. Idempotent."""
        self._mapped()
        if up_set_producer(&self.r, id, UP_PRODUCER_CLOSED, 0) != UP_OK:
            raise QueueStuck(f"producer {id} of queue {self.label} could not be closed")

    def never_end(self):
        """The stream of this queue has no end: get() waits even when every producer closed."""
        self._mapped()
        up_set_producer(&self.r, UP_PRODUCERS - 1, UP_PRODUCER_OPEN, 0)

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
        return {
            "capacity": c.capacity, "head": head_pos, "tail": tail_pos, "next": UP_LD(&c.next),
            "claimed": head.frames, "bytes": head.bytes, "refused": head.dropped,
            "passed": tail.frames, "finished": tail.finished, "dropped": tail.dropped, "dead": tail.dead,
            "aborted": tail.aborted, "redelivered": c.redelivered, "corrupt": c.corrupt, "taken": c.taken,
            "max_depth": c.max_depth, "full_waits": c.full_waits, "empty_waits": c.empty_waits,
            "oldest_ns": oldest, "policy": c.policy, "stream": c.stream, "max_frames": c.max_frames,
            "participants": len({self.r.slots[i].pid for i in range(UP_SLOTS) if self.r.slots[i].pid}),
        }

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
        self._unlock_consumers(before)
        return nothing

    def full(self):
        """True when not even a frame of 8 bytes has room (a moment's truth)."""
        self._open()
        self._skip_padding()
        self._lock(self.r.c.producer_lock)
        cdef bint none = up_room(&self.r, UP_GRANULE, 1) != UP_OK
        up_unlock(self.r.c.producer_lock)
        return none

    cdef int _open(self) except -1:
        if self.closed or not self.mapped:
            raise QueueClosed(f"this handle of queue {self.label} is closed")
        return 0


include "_views.pxi"
include "_fan.pxi"
include "_ready.pxi"
include "_tally.pxi"
