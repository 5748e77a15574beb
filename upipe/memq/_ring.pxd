# What _ring.pyx uses of the C core; one declaration per name.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "_ring.h" nogil:
    ctypedef struct up_frame:
        uint32_t crc
        uint16_t deliveries
        uint16_t magic
        uint8_t version
        uint8_t flags
        uint16_t dtype
        uint8_t item
        uint8_t rank
        uint16_t producer
        uint32_t epoch
        uint32_t key
        uint64_t size
        uint64_t position
        uint64_t execution
        uint64_t timestamp
        uint64_t inline_

    ctypedef struct up_books:
        uint64_t frames
        uint64_t bytes
        uint64_t finished
        uint64_t dropped
        uint64_t dead
        uint64_t aborted
        uint64_t far_dropped
        uint64_t far_dead

    ctypedef struct up_slot:
        uint32_t pid
        uint32_t bell_consumer
        uint64_t start
        uint64_t pidns
        uint64_t need_tail
        uint32_t bell_producer
        uint32_t nap_consumer
        uint32_t nap_producer
        uint32_t producer

    ctypedef struct up_producer:
        uint32_t state
        uint32_t epoch
        uint64_t aborted

    ctypedef struct up_control:
        uint64_t capacity
        uint64_t total
        uint64_t max_frames
        uint32_t options
        uint32_t policy
        uint32_t stream
        uint32_t joined
        uint64_t created
        uint64_t registry_lock[8]
        uint64_t producer_lock[8]
        uint64_t head
        uint64_t cached_tail
        up_books head_books[2]
        uint64_t consumer_lock[8]
        uint64_t next
        uint64_t cached_head
        uint64_t redeliver
        uint64_t redelivered
        uint64_t corrupt
        uint64_t taken
        uint32_t mirror
        uint64_t mirror_epoch
        uint64_t tail
        up_books tail_books[2]
        uint64_t consumers_waiting[8]
        uint64_t producers_waiting[8]
        uint64_t max_depth
        uint64_t full_waits
        uint64_t empty_waits

    ctypedef struct up_ring:
        up_control *c
        up_slot *slots
        up_producer *producers
        uint8_t *bytes
        uint64_t capacity
        uint64_t mask
        uint32_t slot
        uint32_t producer
        uint32_t epoch
        uint64_t root_hash
        char root[160]

    ctypedef struct up_meta:
        uint16_t dtype
        uint8_t flags
        uint8_t item
        uint8_t rank
        uint32_t key
        uint64_t size
        uint64_t inline_
        uint64_t execution
        uint64_t timestamp

    enum:
        UP_OK, UP_FULL, UP_EMPTY, UP_END, UP_TOOBIG, UP_STUCK, UP_NOTYOURS, UP_REFUSED, UP_NOSLOT, UP_ALIVE, UP_SYSTEM
        UP_FOREIGN, UP_OTHERVERSION, UP_TRUNCATED, UP_STALE, UP_CORRUPT
        UP_POLICY_BLOCK, UP_POLICY_DROP_OLDEST, UP_POLICY_LATEST, UP_POLICY_DISCARD
        UP_OPT_NO_PICKLE, UP_OPT_NO_CRC, UP_OPT_SUPERVISED
        UP_FLAG_INLINE, UP_FLAG_REPLY, UP_FLAG_ERROR, UP_FLAG_SHAPE
        UP_MIRROR_SINK, UP_STREAM_CLOSED
        UP_PRODUCER_DECLARED, UP_PRODUCER_OPEN, UP_PRODUCER_CLOSED
    const uint32_t UP_CLAIMED, UP_COMMITTED, UP_TAKEN, UP_AVAILABLE, UP_FINISHED, UP_DEAD, UP_ABORTED
    const uint32_t UP_NONE, UP_SLOTS, UP_PRODUCERS, UP_GRANULE, UP_VERSION, UP_FRAME_MAGIC
    const uint64_t UP_MAX_RING

    uint64_t up_need(uint64_t size, uint8_t flags)
    uint64_t up_capacity_for(uint64_t wanted)
    uint64_t up_total(uint64_t capacity)
    uint32_t up_fingerprint()
    uint64_t up_now_ns(int clock)
    uint64_t up_span(uint64_t word)
    uint32_t up_kind(uint64_t word)
    uint64_t up_bell_hash(const char *text)
    int up_bell_ring(const char *root, uint64_t root_hash, uint32_t pid, uint64_t start, uint32_t id)
    void up_bell_forget()
    void up_bell_child()
    void up_bell_drain(int fd)
    int up_create(up_ring *r, int fd, uint64_t capacity, uint32_t policy, uint64_t max_frames, uint32_t options,
                  uint64_t start)
    int up_attach(up_ring *r, int fd, uint32_t *found)
    void up_unmap(up_ring *r)
    int up_trylock(up_ring *r, uint64_t *area)
    int up_lock(up_ring *r, uint64_t *area, double seconds)
    void up_unlock(uint64_t *area)
    void up_unlock_consumers(up_ring *r, uint64_t before)
    int up_put_locked(up_ring *r, const up_meta *m)
    int up_get_locked(up_ring *r, up_frame *out)
    int up_room(up_ring *r, uint64_t need, uint64_t frames)
    void up_open(up_ring *r, uint64_t need)
    uint64_t up_in_use(up_ring *r, uint64_t head, const up_books *claimed, const up_books *passed)
    void up_put_inline(up_ring *r, const up_meta *m)
    void up_put_inline_at(up_ring *r, const up_meta *m, uint64_t pos)
    void up_publish(up_ring *r, uint64_t need, uint64_t frames, uint64_t bytes)
    uint64_t up_claim(up_ring *r, uint64_t need, uint64_t bytes)
    int up_commit(up_ring *r, uint64_t pos, const up_meta *m, uint32_t payload_crc)
    int up_abort(up_ring *r, uint64_t pos)
    void up_count_refused(up_ring *r)
    void up_drop(up_ring *r, uint64_t need, int all)
    int up_make_room(up_ring *r, uint64_t need)
    uint8_t *up_payload(up_ring *r, uint64_t pos)
    up_frame *up_frame_at(up_ring *r, uint64_t pos)
    uint64_t *up_state_at(up_ring *r, uint64_t pos)
    uint64_t up_position(uint64_t word)
    int up_peek(up_ring *r, uint64_t *pos, uint64_t *span)
    int up_take(up_ring *r, uint64_t *pos)
    int up_advance(up_ring *r)
    int up_mirror_source(up_ring *r, uint64_t epoch)
    int up_mirror_sink(up_ring *r, uint64_t epoch)
    void up_mirror_local(up_ring *r)
    int up_is_boundary(up_ring *r, uint64_t pos)
    int up_outgoing(up_ring *r, uint64_t cursor, uint64_t most, uint64_t *end, uint64_t *frames)
    int up_retire(up_ring *r, uint64_t pos, uint64_t dropped, uint64_t dead)
    uint64_t up_landing_room(up_ring *r)
    int up_publish_landed(up_ring *r, uint64_t landed, uint64_t *published, uint64_t *frames)
    int up_publish_hole(up_ring *r, uint64_t span)
    void up_drop_arrived(up_ring *r)
    int up_consume(up_ring *r, up_frame *out)
    int up_finish(up_ring *r, uint64_t pos, uint32_t kind)
    int up_give_back(up_ring *r, uint64_t pos)
    int up_ended(up_ring *r)
    void up_fence(up_ring *r)
    void up_wake_waiting(up_ring *r, uint64_t count)
    void up_wake_consumers(up_ring *r, uint64_t count)
    void up_wake_producers(up_ring *r)
    void up_wake_all(up_ring *r)
    void up_arm(up_ring *r, uint64_t *bits)
    void up_nap_set(uint32_t *nap, uint32_t value)
    int up_nap_sleep(uint32_t *nap, int64_t ns)
    int up_nap_wake(uint32_t *nap)
    int up_disarm(up_ring *r, uint64_t *bits)
    int up_join_locked(up_ring *r)
    int up_set_producer(up_ring *r, uint32_t id, uint32_t state, uint32_t epoch)
    int up_use_producer(up_ring *r, uint32_t id, uint32_t epoch)
    int up_auto_producer(up_ring *r)
    uint64_t up_emitted(up_ring *r, uint32_t id)
    int up_recover(up_ring *r, uint32_t slot, uint64_t max_deliveries, uint64_t *dead, size_t room, size_t *found,
                   const uint64_t *covered, size_t ncovered)
    void up_books_read(uint64_t *word, up_books *books, uint64_t *pos, up_books *out)
    uint32_t up_crc32(uint32_t crc, const void *p, size_t n)
    uint32_t up_crc32_in_place(const void *p, size_t n)
    uint32_t up_crc32_copy(uint32_t crc, void *dst, const void *src, size_t n)
    uint32_t up_crc32_header(const void *h, uint32_t crc)
    uint64_t UP_LD(uint64_t *p)
    uint64_t UP_LDA(uint64_t *p)
    uint32_t UP_LDA32 "UP_LDA"(uint32_t *p)
    uint32_t UP_LD32 "UP_LD"(uint32_t *p)
    void UP_PAUSE()

cdef extern from "_clock.h" nogil:
    uint64_t up_stamp()

cdef extern from "_spin.h" nogil:
    enum: UP_SPIN_SHORT
    ctypedef struct up_spinning:
        int length
    void up_spinning_begin(up_spinning *s)
    void up_spinning_spun(up_spinning *s, int hit, int64_t ns, int64_t now)
    void up_spinning_slept(up_spinning *s, int64_t ns, int64_t now)
    int up_spin(uint64_t *word, uint64_t before, int n)
    void up_spin_room(up_ring *r, uint64_t need)
    ctypedef struct up_rest:
        pass
    int up_may_give_way(up_rest *r, int64_t now)
    void up_gave_way(up_rest *r, int64_t ns, int64_t now)
    int sched_yield()
    int up_on_one_cpu(up_ring *r, int producer)

cdef extern from "_holdoff.h" nogil:
    ctypedef struct up_hold:
        pass
    int up_hold_fits(uint64_t size)
    int up_hold_off(up_hold *h, uint64_t size, int64_t now)
    void up_leave_alone(uint64_t stamp)

cdef extern from "_lookout.h" nogil:
    uint64_t up_post_new(int fd, uint32_t *first, uint32_t *second)
    int up_post_quiet(uint64_t id)
    int up_post_again(uint64_t id)
    void up_post_nap(uint64_t id, uint32_t *word)
    void up_post_end(uint64_t id)
    void up_lookout_settle()
