# The part of a doorbell that must not run Python code: a signal handler could raise between a take and its return.

cdef class Doorbell:
    """Base of wakeup.Bell: the descriptor, and how many wait on it. `fd` becomes readable when somebody rings `id`."""
    cdef readonly int fd
    cdef readonly uint32_t id
    cdef public int sleepers      # threads that poll it, or are about to
    cdef public int tasks         # waits of event loops registered on it
    cdef uint32_t *nap            # futex of the handle's slot, while it is mapped and joined

    def __cinit__(self, *args, **kwargs):
        self.fd = -1
        self.nap = NULL

    def _made(self, int fd, uint32_t id):
        """Take over the descriptor."""
        self.fd = fd
        self.id = id

    def _unmade(self):
        """Give the descriptor up; returns it, -1 when it is gone already."""
        fd, self.fd = self.fd, -1
        self.nap = NULL
        return fd

    cdef void ring(self) noexcept:
        cdef char one = 1
        if self.nap != NULL:
            up_nap_wake(self.nap)
        if self.fd >= 0:
            c_write(self.fd, &one, 1)  # EAGAIN: it is readable already, with thousands of rings pending

    def ring_self(self):
        """Make it readable."""
        self.ring()

    def drain(self):
        """Forget the rings so far."""
        if self.fd >= 0:
            up_bell_drain(self.fd)

    def closing(self):
        """The handle was closed: all threads that sleep here look."""
        self.ring()
