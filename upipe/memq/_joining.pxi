# Handle: joining a queue and leaving it.


cdef class Handle:
    """One handle of one queue: the mapping, and this process's place among the participants."""
    cdef up_ring r
    cdef int generation
    cdef bint closed, mapped, supervised
    cdef readonly bint allow_pickle
    cdef public double patience   # seconds that an operation waits for a lock of the ring; then QueueStuck
    cdef public bint interrupted  # waits end at once, as if their time were over (a worker that drains)
    cdef int users                # operations, reservations and loans under way; close() leaves when they are done
    cdef uint64_t held            # position + 1 of the frame that take() holds, 0 = none
    cdef up_frame last            # header of the frame that was read last
    cdef Doorbell bell_frames, bell_room  # of the consumer's and of the producer's end, made at the first sleep
    cdef object wakeup            # module upipe.memq.wakeup
    cdef Watch watch              # PeerWatch of a stand-alone queue, made at the first long sleep or at many
    cdef uint64_t post            # of the lookout, for that watch; 0 = none
    cdef int often                # naps of a stand-alone queue so far, up to OFTEN
    cdef double looked            # when a try that cannot wait looked for dead peers last
    cdef object trouble           # an exception that get_many met after good values: raised by the next get
    cdef uint64_t execution       # execution id for the frames to come
    cdef readonly str label
    cdef object __weakref__

    def __cinit__(self, *args, **kwargs):
        self.mapped = False
        self.closed = False
        self.r.slot = UP_NONE
        self.r.producer = UP_NONE
        self.patience = LOCK_PATIENCE

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
                str label, uint64_t start=0):
        """Format the file behind fd and map it."""
        if up_create(&self.r, fd, capacity, policy, max_frames, options, start) != UP_OK:
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
            self.post = 0
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

    cdef inline int _produce(self) except -1:
        cdef int rc
        if self.r.producer == UP_NONE:
            self._enter()
            self._not_a_copy()
            with nogil:
                rc = up_auto_producer(&self.r)
            self._unstuck(rc)
            if rc != UP_OK:
                raise TooManyParticipants(f"queue {self.label} has {UP_PRODUCERS} open producers, the most it can have")
        return 0

    cdef int _not_a_copy(self) except -1:
        if self.r.c.mirror == UP_MIRROR_SINK:
            raise QueueError(f"queue {self.label} is the copy of a queue on another node; only its mirror writes it. "
                             "Put into the queue there")
        return 0

    def close(self):
        """Close this handle and this producer's end of stream; what it holds is given back. Idempotent.

        Threads and tasks that wait on it get QueueClosed. While an operation, a reservation or a loan is under way in
        another thread, the handle leaves the queue when that is done.

        Raises:
            QueueStuck: another process holds a lock of the queue. What this handle holds stays held until close() is
                called again, or until this process ends.
        """
        if not self.mapped or (self.closed and (self.users or self.r.slot == UP_NONE)):
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

    cdef int _depart(self) except -1:
        """Leave the queue. One thread does it: the others find the handle closed, and no longer in use."""
        cdef size_t found
        cdef int rc = UP_OK
        if self.generation != _generation:
            return 0
        if self.r.slot != UP_NONE:
            self.users += 1  # the lock may be waited for without the GIL
            with nogil:
                rc = up_recover(&self.r, self.r.slot, 0, NULL, 0, &found, NULL, 0)
            self.users -= 1
            self._unstuck(rc)
            self.r.slot = self.r.producer = UP_NONE
        self.held = 0
        up_post_end(self.post)
        for bell in (self.bell_frames, self.bell_room, self.watch):
            if bell is not None:
                bell.close()
        self.bell_frames = self.bell_room = self.watch = None
        return 0

    cdef _at_exit(self):
        if self.users == 0:  # else a daemon thread is inside, and the others see our end by our pidfd
            try:
                self.close()
            except QueueStuck:
                pass  # as with a daemon thread

    def __del__(self):
        self.close()

    def __dealloc__(self):
        if self.mapped:
            up_post_end(self.post)  # of a handle that could not leave
            up_lookout_settle()
            up_unmap(&self.r)

    cdef inline int _lock(self, uint64_t *area) except -1:
        if up_trylock(&self.r, area) != UP_OK:
            self._lock_slowly(area)
        return 0

    cdef int _lock_slowly(self, uint64_t *area) except -1:
        cdef int rc
        with nogil:
            rc = up_lock(&self.r, area, self.patience)
        return self._unstuck(rc)

    cdef int _unstuck(self, int rc) except -1:
        """Raise for UP_STUCK: a lock was not had within the patience, here or in the C core."""
        if rc == UP_STUCK:
            raise QueueStuck(f"a process holds a lock of queue {self.label} for more than {self.patience:g} s; "
                             "look for a stopped participant (ps -o pid,stat)")
        return 0

    cdef int _set_producer(self, uint32_t id, uint32_t state) except -1:
        cdef int rc
        self._mapped()
        with nogil:
            rc = up_set_producer(&self.r, id, state, 0)
        self._unstuck(rc)
        if rc != UP_OK:
            raise TooManyParticipants(f"queue {self.label} has no producer id {id}; they go up to {UP_PRODUCERS - 1}")
        return 0

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
                self._unstuck(rc)
        return n
