# A count in shared memory, with waiting until it is zero: the unfinished tasks of a JoinableQueue.

cdef extern from * nogil:
    """
    #include <linux/futex.h>
    static int up_tally_map(int fd, uint64_t **out) {
        void *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED) return -1;
        *out = (uint64_t *)at;
        return 0;
    }
    static void up_tally_unmap(uint64_t *at) { munmap(at, 4096); }
    static void up_tally_add(uint64_t *at) { __atomic_fetch_add(at, 1, __ATOMIC_SEQ_CST); }
    static int up_tally_take(uint64_t *at) { /* 0: there was none to take */
        uint64_t seen = __atomic_load_n(at, __ATOMIC_SEQ_CST);
        do {
            if (!seen) return 0;
        } while (!__atomic_compare_exchange_n(at, &seen, seen - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        if (seen == 1) { /* at[1] counts the zeros, so that a waiter never misses one */
            __atomic_fetch_add((uint32_t *)(at + 1), 1, __ATOMIC_SEQ_CST);
            syscall(SYS_futex, (uint32_t *)(at + 1), FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0);
        }
        return 1;
    }
    static int up_tally_wait(uint64_t *at, uint32_t zeros) {
        return (int)syscall(SYS_futex, (uint32_t *)(at + 1), FUTEX_WAIT, zeros, NULL, NULL, 0);
    }
    """
    int up_tally_map(int fd, uint64_t **out)
    void up_tally_unmap(uint64_t *at)
    void up_tally_add(uint64_t *at)
    int up_tally_take(uint64_t *at)
    int up_tally_wait(uint64_t *at, uint32_t zeros)


cdef class Tally:
    """The count in the first page of the file behind fd. Nothing in it belongs to a process, so no death needs repair:
    what a dead process should have taken back stays counted, as with multiprocessing's semaphores."""
    cdef uint64_t *at

    def __init__(self, int fd):
        if up_tally_map(fd, &self.at) != 0:
            raise OSError(errno, f"cannot map a count: {os.strerror(errno)}")

    def add(self):
        """One more."""
        up_tally_add(self.at)

    def take(self):
        """One less. False when there was none."""
        return bool(up_tally_take(self.at))

    @property
    def value(self):
        """How many there are."""
        return UP_LDA(self.at)

    def wait(self):
        """Sleep until the count is zero, or was."""
        cdef uint32_t zeros = <uint32_t>UP_LDA(self.at + 1)
        cdef int rc
        while UP_LDA(self.at) and zeros == <uint32_t>UP_LDA(self.at + 1):
            PyErr_CheckSignals()  # of one that came before the system call that it would interrupt
            with nogil:
                rc = up_tally_wait(self.at, zeros)
            if rc != 0 and errno == EINTR:
                PyErr_CheckSignals()

    def __dealloc__(self):
        if self.at != NULL:
            up_tally_unmap(self.at)
