/* Who takes part: slots (processes), producers (ends of stream), and the recovery of the dead. Takes the locks itself.
 * After kill -9 a slot stays until somebody proves the death and recovers it; nothing is ever taken back on a timeout. */
#ifndef UPIPE_MEMBERS_H
#define UPIPE_MEMBERS_H

#include "_lock.h" /* first: it asks for _GNU_SOURCE */

#include <poll.h>
#include <stdlib.h>
#include <sys/syscall.h>

#define UP_PATIENCE 10.0    /* seconds to wait for registry_lock */
#define UP_END_PATIENCE 4.0 /* for each end inside it: together below UP_PATIENCE, so who queues behind gets its turn */

/* ------------------------------------------------------------------ proof of death */

static uint64_t up_start_time(uint32_t pid) { /* field 22 of /proc/<pid>/stat; 0 when it cannot be read */
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return 0;
    text[n] = 0;
    char *p = strrchr(text, ')'); /* the command may hold spaces and parentheses */
    if (!p) return 0;
    for (int field = 2; field < 22; field++) {
        p = strchr(p + 1, ' ');
        if (!p) return 0;
    }
    return strtoull(p + 1, NULL, 10);
}

static uint64_t up_pidns(void) {
    struct stat st;
    return stat("/proc/self/ns/pid", &st) == 0 ? (uint64_t)st.st_ino : 0;
}

/* 1 only when the operating system proves it: no such process, another start time, or a pidfd that says it ended.
 * The number of a dead process may live on as a thread id or a process group: pidfd_open then says ENOENT or EINVAL. */
static int up_process_dead(uint32_t pid, uint64_t start, uint64_t pidns) {
    if (pidns != up_pidns()) return 0; /* its pid means nothing here */
    int fd = (int)syscall(SYS_pidfd_open, pid, 0), why = errno;
    if (fd < 0 && (why == ESRCH || (kill((pid_t)pid, 0) && errno == ESRCH))) return 1;
    uint64_t now = up_start_time(pid);
    int dead = now && start && now != start;
    if (fd < 0) return dead || (!now && (why == ENOENT || why == EINVAL));
    struct pollfd p = {.fd = fd, .events = POLLIN};
    dead = dead || (poll(&p, 1, 0) == 1 && (p.revents & POLLIN));
    close(fd);
    return dead;
}

/* ------------------------------------------------------------------ producers and the end of the stream */

static int up_set_producer(up_ring *r, uint32_t id, uint32_t state, uint32_t epoch) {
    if (id >= UP_PRODUCERS) return UP_NOSLOT;
    if (up_lock(r, r->c->registry_lock, UP_PATIENCE)) return UP_STUCK;
    if (epoch) UP_ST(&r->producers[id].epoch, epoch);
    UP_ST(&r->producers[id].state, state);
    UP_CRASH("stream");
    up_recount_stream(r);
    int closed = UP_LD(&r->c->stream) == UP_STREAM_CLOSED;
    up_unlock(r->c->registry_lock);
    UP_CRASH("closed");
    if (closed) { /* consumers asleep learn the end (SYNC waiting); an unfinished write at the end may still hide it */
        up_fence(r);
        up_wake_consumers_slow(r, UP_SLOTS);
    }
    return UP_OK;
}

/* Frames that producer `id` claimed in all its lives; entry receives the index of the claims entry that says so. */
static uint64_t up_claimed(up_ring *r, uint32_t id, uint32_t *entry) {
    uint64_t head = up_position(UP_LDA(&r->c->head)), most = 0;
    *entry = 0;
    for (uint32_t i = 0; i < 2; i++) {
        up_claims *claims = &r->producers[id].claims[i];
        uint64_t frames = UP_LDA(&claims->frames), position = UP_LDA(&claims->position);
        if (frames != UP_LD(&claims->frames)) continue; /* being written: the other entry is the true one */
        if (frames > most && position < head) most = frames, *entry = i;
    }
    return most;
}

/* Frames it got into the ring: what a resuming source skips. Exact once its last life was recovered. */
static uint64_t up_emitted(up_ring *r, uint32_t id) {
    uint32_t entry;
    uint64_t frames = up_claimed(r, id, &entry), aborted = UP_LD(&r->producers[id].aborted);
    return frames > aborted ? frames - aborted : 0;
}

/* Bind this handle to a producer id (a declared one in a pipe) whose earlier life was recovered. */
static int up_use_producer(up_ring *r, uint32_t id, uint32_t epoch) {
    int rc = up_set_producer(r, id, UP_PRODUCER_OPEN, epoch);
    if (rc != UP_OK) return rc;
    r->epoch = UP_LD(&r->producers[id].epoch);
    r->produced = up_claimed(r, id, &r->turn);
    r->producer = id;
    return UP_OK;
}

/* Stand-alone: take a declared id, else an unused one, else one that closed. Once per handle, whichever thread comes first. */
static int up_auto_producer(up_ring *r) {
    uint32_t wanted[3] = {UP_PRODUCER_DECLARED, UP_PRODUCER_UNUSED, UP_PRODUCER_CLOSED}, found = UP_NONE;
    if (up_lock(r, r->c->registry_lock, UP_PATIENCE)) return UP_STUCK;
    if (r->producer != UP_NONE) {
        up_unlock(r->c->registry_lock);
        return UP_OK;
    }
    for (int pass = 0; pass < 3 && found == UP_NONE; pass++)
        for (uint32_t i = 0; i < UP_PRODUCERS && found == UP_NONE; i++)
            if (UP_LD(&r->producers[i].state) == wanted[pass]) found = i;
    if (found != UP_NONE) {
        up_producer *p = &r->producers[found];
        UP_ST(&r->slots[r->slot].producer, found + 1); /* first, so that our death closes what it opens */
        UP_CRASH("producer");
        r->epoch = UP_LD(&p->epoch) + 1;
        UP_ST(&p->epoch, r->epoch);
        UP_ST(&p->state, UP_PRODUCER_OPEN);
        UP_CRASH("open");
        r->produced = up_claimed(r, found, &r->turn);
        r->producer = found;
        up_recount_stream(r);
    }
    up_unlock(r->c->registry_lock);
    return found == UP_NONE ? UP_NOSLOT : UP_OK;
}

/* ------------------------------------------------------------------ joining */

static int up_join_locked(up_ring *r) { /* caller holds registry_lock */
    uint32_t pid = (uint32_t)getpid();
    uint64_t start = up_start_time(pid);
    if (!start) return UP_SYSTEM; /* no descriptor left for /proc: nobody could find our bell or prove our death */
    for (uint32_t i = 0; i < UP_SLOTS; i++) {
        up_slot *s = &r->slots[i];
        if (UP_LD(&s->pid)) continue;
        UP_ST(&s->bell_consumer, 0);
        UP_ST(&s->bell_producer, 0);
        UP_ST(&s->nap_consumer, 0);
        UP_ST(&s->nap_producer, 0);
        UP_ST(&s->producer, 0);
        UP_ST(&s->need_tail, 0);
        UP_ST(&s->start, start);
        UP_ST(&s->pidns, up_pidns());
        UP_CRASH("join");
        UP_STR(&s->pid, pid);
        UP_CRASH("joined");
        r->slot = i;
        UP_ST(&r->left, 0);
        __atomic_fetch_add(&r->c->joined, 1, __ATOMIC_SEQ_CST);
        return UP_OK;
    }
    return UP_NOSLOT;
}

/* ------------------------------------------------------------------ recovery */

typedef struct up_verdict { /* what becomes of frames that the dead one held */
    uint64_t max_deliveries, *dead;
    size_t room, *found;
    const uint64_t *covered; /* sorted positions */
    size_t ncovered;
} up_verdict;

static int up_covered(uint64_t pos, const uint64_t *covered, size_t n) {
    size_t low = 0, high = n;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (covered[mid] < pos) low = mid + 1;
        else high = mid;
    }
    return low < n && covered[low] == pos;
}

/* Unfinished writes of a slot become padding; first the one whose abort was under way, since its note tells of the count
 * before any other is made. Others commit, take and finish meanwhile; nobody claims, so no word in sight is used anew. */
static int up_leave_producers(up_ring *r, uint32_t slot) {
    if (up_lock(r, r->c->producer_lock, UP_END_PATIENCE)) return UP_STUCK;
    uint64_t head = up_position(UP_LD(&r->c->head)), word;
    for (int noted = 1; noted >= 0; noted--)
        for (uint64_t at = up_position(UP_LDA(&r->c->tail)); at < head; at = up_after(at, word, head)) {
            word = UP_LDA(up_state_at(r, at));
            if (!up_claimed_by(word, slot) || (noted && !up_note(word))) continue;
            up_pad(r, at);
            UP_CRASH("reclaim");
        }
    up_unlock(r->c->producer_lock);
    return UP_OK;
}

static int up_leave_consumers(up_ring *r, uint32_t slot, const up_verdict *v) {
    if (up_lock(r, r->c->consumer_lock, UP_END_PATIENCE)) return UP_STUCK;
    uint64_t next = UP_LD(&r->c->next), word;
    for (uint64_t at = up_position(UP_LD(&r->c->tail)); at < next; at = up_after(at, word, next)) {
        uint64_t *state = up_state_at(r, at);
        word = UP_LD(state);
        if (up_kind(word) != UP_TAKEN || up_owner(word) != slot) continue;
        int worn = v->max_deliveries && up_frame_at(r, at)->deliveries >= v->max_deliveries;
        if (up_covered(at, v->covered, v->ncovered)) {
            UP_ST(state, up_word(UP_FINISHED, 0, up_span(word)));
        } else if (worn && up_joined(r) && *v->found < v->room) {
            UP_ST(state, up_word(UP_TAKEN, r->slot, up_span(word)));
            v->dead[(*v->found)++] = at;
        } else {
            up_make_available(r, at);
        }
        UP_CRASH("release");
    }
    up_advance(r);
    up_unlock(r->c->consumer_lock);
    return UP_OK;
}

static int up_recover_locked(up_ring *r, uint32_t slot, const up_verdict *v) { /* caller holds registry_lock */
    up_slot *s = &r->slots[slot];
    uint32_t pid = UP_LD(&s->pid);
    int own = slot == r->slot && pid == (uint32_t)getpid();
    if (!pid) return UP_OK; /* somebody else was first */
    if (!own && !up_process_dead(pid, UP_LD(&s->start), UP_LD(&s->pidns))) return UP_ALIVE;
    if (up_leave_producers(r, slot) || up_leave_consumers(r, slot, v)) return UP_STUCK;
    UP_CRASH("left");
    uint32_t producer = UP_LD(&s->producer);
    if (producer && producer <= UP_PRODUCERS && UP_LD(&r->producers[producer - 1].state) == UP_PRODUCER_OPEN)
        UP_ST(&r->producers[producer - 1].state, UP_PRODUCER_CLOSED);
    UP_CRASH("end of stream");
    up_recount_stream(r);
    uint64_t bit = 1ull << (slot & 63);
    __atomic_fetch_and(&r->c->consumers_waiting[slot / 64], ~bit, __ATOMIC_SEQ_CST);
    __atomic_fetch_and(&r->c->producers_waiting[slot / 64], ~bit, __ATOMIC_SEQ_CST);
    UP_CRASH("recover");
    if (own) up_wake_all(r);
    else up_ring_everybody(r);
    UP_CRASH("rung");
    UP_STR(&s->pid, 0); /* last: who dies before is recovered once more, and so are the wakes it owed */
    UP_CRASH("recovered");
    if (own) UP_ST(&r->left, 1);
    return UP_OK;
}

/* Free the slot of a process that is proven dead (or, slot == r->slot, our own at close).
 * Its unfinished writes become padding, what it held becomes available again with the count raised, except: positions in
 * `covered` (sorted; a checkpoint has them) are finished, and frames at max_deliveries (> 0) stay TAKEN by this handle
 * and are returned in `dead` for the caller to bury with up_finish(UP_DEAD). Idempotent: a crash inside is recovered again.
 * registry_lock is held throughout: a second recoverer, and a newcomer to the slot, wait until this one is done. */
static int up_recover(up_ring *r, uint32_t slot, uint64_t max_deliveries, uint64_t *dead, size_t room, size_t *found,
                      const uint64_t *covered, size_t ncovered) {
    up_verdict verdict = {max_deliveries, dead, room, found, covered, ncovered};
    *found = 0;
    if (!UP_LDA(&r->slots[slot].pid)) return UP_OK;
    if (up_lock(r, r->c->registry_lock, UP_PATIENCE)) return UP_STUCK;
    int rc = up_recover_locked(r, slot, &verdict);
    up_unlock(r->c->registry_lock);
    UP_CRASH("unlocked");
    if (rc == UP_STUCK) up_wake_all(r); /* half of it is done */
    return rc;
}

#endif
