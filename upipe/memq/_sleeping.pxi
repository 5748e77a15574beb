# Sleeper: waiting until the other end moves.


cdef up_rest _yields_rest  # of this process


cdef class Sleeper(Handle):
    """Waiting until the other end moves."""
    cdef up_spinning spinning[2]  # per end
    cdef uint64_t gave_way        # 1 + the position waited for when we did last

    def __cinit__(self, *args, **kwargs):
        up_spinning_begin(&self.spinning[0])
        up_spinning_begin(&self.spinning[1])

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
                bell.nap = &self.r.slots[self.r.slot].nap_producer
                self.r.slots[self.r.slot].bell_producer = bell.id
            else:
                self.bell_frames = bell
                bell.nap = &self.r.slots[self.r.slot].nap_consumer
                self.r.slots[self.r.slot].bell_consumer = bell.id
        return bell

    cdef _no_descriptor(self, error):
        """Say it as an error of the queue, with the limit and the remedy."""
        cdef rlimit most
        if error.errno == _errno.EMFILE:
            getrlimit(RLIMIT_NOFILE, &most)
            limit = (f"this process may have {most.rlim_cur} open (ulimit -n); close some, or raise the limit, to "
                     f"{most.rlim_max} at most")
        elif error.errno == _errno.ENFILE:
            limit = "the whole system has as many open as it may; raise it with sysctl fs.file-max"
        else:
            return
        raise QueueError(f"cannot sleep on queue {self.label}: no file descriptor is left; nothing was put or taken; "
                         f"{limit}") from error

    cdef inline uint64_t *_bits(self, int producer) noexcept:
        if producer:
            return self.r.c.producers_waiting
        return self.r.c.consumers_waiting

    cdef inline int _give_way(self) noexcept:
        """Before a consumer's sleep, once for each frame: let a producer run that shares our CPU. 1 when it has
        something now."""
        cdef int64_t began, ended
        cdef uint64_t wanted = UP_LD(&self.r.c.next) + 1
        if self.gave_way == wanted or not up_on_one_cpu(&self.r, 0):
            return 0
        began = up_now_ns(CLOCK_MONOTONIC)
        if not up_may_give_way(&_yields_rest, began):
            return 0
        self.gave_way = wanted
        if up_only_thread():  # nobody waits for Python's lock
            sched_yield()
        else:
            with nogil:
                sched_yield()
        ended = up_now_ns(CLOCK_MONOTONIC)
        up_gave_way(&_yields_rest, ended - began, ended)
        return self._something()

    cdef inline int _spin(self, int producer) noexcept:
        """Spin while nothing changes; 1 when something did. (_spin.h says how long.)"""
        cdef up_spinning *spinning = &self.spinning[producer]
        cdef int n = spinning.length, hit
        cdef uint64_t *word = &self.r.c.tail
        cdef uint64_t before
        cdef int64_t began, ended
        if up_on_one_cpu(&self.r, producer):
            return 0
        if not producer:
            before = UP_LD(&self.r.c.next)
            if before == up_position(UP_LDA(&self.r.c.head)):
                word = &self.r.c.head  # nothing claimed: wait for a claim
            else:
                word = up_state_at(&self.r, before)  # the next frame is being written: wait for its commit
        before = UP_LD(word)
        if n < UP_SPIN_SHORT:
            hit = up_spin(word, before, n)
            up_spinning_spun(spinning, hit, 0, 0)
            return hit
        began = up_now_ns(CLOCK_MONOTONIC)
        with nogil:
            hit = up_spin(word, before, n)
        ended = up_now_ns(CLOCK_MONOTONIC)
        up_spinning_spun(spinning, hit, ended - began, ended)
        return hit

    cdef inline void _slept(self, int64_t since) noexcept:
        """The consumer slept for a frame, since it had spun in vain."""
        cdef int64_t now = up_now_ns(CLOCK_MONOTONIC)
        up_spinning_slept(&self.spinning[0], now - since, now)

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

    cdef inline void _arm(self, int producer, Doorbell bell, uint64_t need, bint lazy) noexcept:
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

    cdef inline void _left_bell(self, int producer) noexcept:
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

    cdef inline bint _something(self) noexcept:
        """Is there a frame to take, or the end to learn? (A hint, without the lock: yes when in doubt.)"""
        cdef uint64_t at = UP_LD(&self.r.c.next)
        if UP_LD(&self.r.c.redeliver):
            return True
        if at == up_position(UP_LDA(&self.r.c.head)):
            return up_ended(&self.r) != 0
        return up_kind(UP_LDA(up_state_at(&self.r, at))) != UP_CLAIMED  # its commit wakes somebody

    cdef inline bint _nothing_yet(self) noexcept:
        """Surely nothing to take, and no end; without the lock. The producers' word is looked at only when all that was
        known of has been taken, so that a stream does not pay for it."""
        return UP_LD(&self.r.c.next) == UP_LD(&self.r.c.cached_head) and not self._something()

    def bell(self, int producer):
        """The doorbell of this handle for frames (0) or room (1): a file descriptor to watch is its .fd."""
        self._begin()
        try:
            return self._bell(producer)
        finally:
            self._done()

    cdef inline bint _again(self, Waiting *w) except -1:
        """After a try that failed: spin, arm or sleep; False when it is time to give up."""
        cdef int rc
        cdef Doorbell bell
        if w.timeout <= 0 or self.interrupted:
            return w.timeout >= 0 and w.deadline == 0 and not self.supervised and self._peers_ended()
        if w.deadline == 0:
            w.deadline = INFINITY if w.timeout == INFINITY else _now() + w.timeout
            if self._spin(w.producer):
                if w.producer and not w.exact:
                    with nogil:
                        up_spin_room(&self.r, w.need)
                return True
            if not w.producer:
                if not up_on_one_cpu(&self.r, 0):
                    w.since = up_now_ns(CLOCK_MONOTONIC)
                elif self._give_way():
                    return True
        if not w.fresh:  # arm, and let the caller try once more before we sleep
            bell = self._bell(w.producer)
            if not w.armed:
                w.armed = True
                w.naps = w.lull == NULL or (<Lull>w.lull).naps()
                bell.sleepers += 1
            if w.naps and bell.nap != NULL:  # before the bit: who clears that sees this
                up_nap_set(bell.nap, 1)
            self._arm(w.producer, bell, w.need, not w.exact)
            w.fresh = True
            if w.producer or self._something():
                return True  # else another try could only find the same
        w.fresh = False
        try:
            # A signal that came while we tried, spun and armed has only set Python's flag, for want of a system call to
            # interrupt: a sleep without end would keep its handler (Ctrl-C) from running.
            PyErr_CheckSignals()
            bell = self._bell(w.producer)
            if w.naps and bell.nap != NULL:
                rc = self._nap(w, bell.nap)
            else:
                rc = self._sleep(w)
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

    cdef inline int _left(self, Waiting *w, int rc) noexcept:
        """Done waiting. Runs no Python code: a signal handler must not raise between a take and its return."""
        cdef Doorbell bell = self.bell_room if w.producer else self.bell_frames
        if w.armed:
            w.armed = False
            bell.sleepers -= 1
            if w.since:
                self._slept(w.since)
            if bell.sleepers == 0 and bell.nap != NULL and UP_LD32(bell.nap):
                up_nap_set(bell.nap, 0)
            self._left_bell(w.producer)
        return rc

    cdef inline int _nap(self, Waiting *w, uint32_t *nap) except -1:
        """Sleep until woken, or the deadline; with a lull until that ends; in a stand-alone queue until peers end,
        or, as long as the lookout does not watch them, until they must be watched. As _sleep()."""
        cdef int rc = 1
        cdef bint lazy = w.need != 0 and not w.exact
        cdef double most = LAZY if lazy else INFINITY
        cdef Lull lull = <Lull>w.lull if w.lull != NULL else None
        if not self.supervised:
            rc = self._lookout()
            if rc == 2:
                return 1
            if rc == 0:
                w.naps = False  # its doorbell comes next, with its peers
                most = min(most, ALONE)
        if w.deadline != INFINITY:
            most = min(most, w.deadline - _now())
        if most <= 0 or self.interrupted or self.closed:
            return 1 if most > 0 or _now() < w.deadline else 0
        if lull is not None:
            return self._nap_in(lull, nap, most)
        with nogil:
            rc = up_nap_sleep(nap, -1 if most > 1e6 else <int64_t>(most * 1e9))
        if rc == EINTR:
            PyErr_CheckSignals()
        if rc != ETIMEDOUT:
            return 1
        return 0 if w.deadline != INFINITY and _now() >= w.deadline else 2 if lazy else 1

    cdef inline int _nap_in(self, Lull lull, uint32_t *nap, double most) except -1:
        """_nap() in the stead of an event loop: 1 when woken for a frame, 0 when the loop has something to do."""
        cdef int rc = 0
        up_post_nap(lull.post, nap)
        if up_post_quiet(lull.post):
            with nogil:
                rc = up_nap_sleep(nap, -1 if most > 1e6 else <int64_t>(most * 1e9))
        up_post_nap(lull.post, NULL)
        if not up_post_quiet(lull.post):
            lull.ended(False)
            return 0
        if rc == EINTR:
            PyErr_CheckSignals()  # a handler may have given the loop something to do
        return rc == 0

    cdef int _lookout(self) except -1:
        """Before a nap in a stand-alone queue. 1: the lookout ends it when a peer ends. 0: nobody watches them, or not
        yet, while sleeps are few. 2: some had ended; they are recovered, so try again."""
        if self.often < OFTEN:
            self.often += 1
            return 0
        if self.watch is not None and self.watch.joined == self.r.c.joined and up_post_quiet(self.post):
            return 1
        try:
            if self._watch():
                return 2
        except QueueError as error:
            if isinstance(error, QueueStuck):
                raise
            self.often = 0  # no descriptor left: then later
            return 0
        if not up_post_again(self.post):
            up_post_end(self.post)
            self.post = up_post_new(self.watch.fd, &self.r.slots[self.r.slot].nap_consumer,
                                    &self.r.slots[self.r.slot].nap_producer)
            if self.post == 0:
                self.often = 0
        return self.post != 0

    cdef int _sleep(self, Waiting *w) except -1:
        """Sleep until the bell, a peer's death, the deadline or the end of the lull. 0 for these two, 2 when LAZY
        passed, else 1."""
        cdef pollfd fds[3]
        cdef int n = 1, rc = 0, timeout
        cdef bint lazy = w.need != 0 and not w.exact
        cdef double deadline = w.deadline, left, start = _now(), most
        cdef Doorbell bell = self._bell(w.producer)
        cdef Lull lull = <Lull>w.lull if w.lull != NULL else None
        fds[0].fd = bell.fd
        fds[0].events = POLLIN
        fds[1].events = POLLIN
        fds[2].fd = -1 if lull is None else lull.fd
        fds[2].events = POLLIN
        while True:
            left = most = deadline - _now()
            if left <= 0:
                return 0
            if lazy:
                most = min(left, start + LAZY - _now())
                if most <= 0:
                    return 2
            n = 1
            fds[1].fd = -1  # which poll leaves out
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
                rc = c_poll(fds, n if lull is None else 3, timeout)
            if rc < 0 and errno != EINTR:
                raise OSError(errno, "poll failed while waiting for a queue")
            if rc < 0:
                PyErr_CheckSignals()
                if lull is not None:
                    return 0  # a handler may have given the loop something to do
                continue
            if rc > 0:
                if self.closed:
                    return 1  # the bell stays rung: all that sleep on it shall see this
                if fds[0].revents:
                    up_bell_drain(fds[0].fd)
                if lull is not None:
                    lull.ended(fds[0].revents != 0)
                if n == 2 and fds[1].revents:
                    self._watch()
                return 1 if fds[0].revents or fds[1].fd >= 0 and fds[1].revents else 0

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
