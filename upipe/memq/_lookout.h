/* The lookout: ends naps for what cannot wake a futex.
 *
 * A nap on a futex is the cheapest sleep, but neither the pidfd of a peer nor the descriptor of an event loop ends it, and a
 * timeout costs a kernel timer at every nap (0.5 us a round trip, of 4.2 in C). So one thread of the process watches those
 * descriptors in an epoll set, without a timeout and without Python's lock, and wakes the futexes that their posts name. It
 * starts with the first post, which a process makes that sleeps often; it costs nothing while nothing happens.
 *
 * A post fires once: then it stays loud until who wants to nap again arms it anew, so that a descriptor that somebody else
 * attends to (a busy event loop) does not run this thread for each of its events.
 *
 * SYNC lookout (Dekker): who naps sets its futex word, says which word (up_post_nap) and looks whether the post is quiet; the
 * thread makes the post loud, reads which word, and wakes it. One of them sees the other.
 *
 * Owner: the process; nothing outlives it. A forked child has no such thread and no posts: pthread_atfork sees to that inside
 * fork(2), before any code there can end a post, which would be a change to the parent's set. The words that posts name lie in
 * mappings: before one is unmapped its posts are gone or name nothing, and up_lookout_settle() has been called.
 * Rejected: futex_waitv on robust words that the kernel wakes when their owner dies (it is a thread that dies there, not a
 * process); POSIX timers (signals in the user's program).
 */
#ifndef UPIPE_LOOKOUT_H
#define UPIPE_LOOKOUT_H

#include "_wake.h"

#include <sys/epoll.h>

#define UP_POSTS 1024 /* at a time, in one process; who gets none sleeps in poll(2) */
#define UP_POST_WORDS 2
#define UP_LOOKOUT_STACK (128 * 1024)

typedef struct up_post {
    uint64_t id; /* 0 = free; else a multiple of UP_POSTS plus the index, never used again; written with the mutex */
    int fd;
    uint32_t quiet; /* armed, and has not fired since */
    uint32_t *words[UP_POST_WORDS]; /* to wake, NULL = none */
} up_post;

static up_post up_posts[UP_POSTS];
static uint64_t up_posts_made;
static int up_lookout_fd = -1; /* the epoll set; -1 = the thread does not run */
static pthread_mutex_t up_lookout_mutex = PTHREAD_MUTEX_INITIALIZER;

/* The post of that id, NULL when it is gone, or there never was one (0). */
static inline up_post *up_post_of(uint64_t id) {
    up_post *p = &up_posts[id % UP_POSTS];
    return id && __atomic_load_n(&p->id, __ATOMIC_RELAXED) == id ? p : NULL;
}

/* With the mutex. Who looks without it at a post that another thread ends sees that, or what it was. */
static void up_post_name(up_post *p, uint64_t id, uint32_t *first, uint32_t *second) {
    __atomic_store_n(&p->words[0], first, __ATOMIC_SEQ_CST);
    __atomic_store_n(&p->words[1], second, __ATOMIC_SEQ_CST);
    __atomic_store_n(&p->id, id, __ATOMIC_RELEASE);
}

static void up_post_fire(up_post *p) { /* with the mutex */
    __atomic_store_n(&p->quiet, 0, __ATOMIC_SEQ_CST); /* SYNC lookout */
    for (int i = 0; i < UP_POST_WORDS; i++) {
        uint32_t *word = __atomic_load_n(&p->words[i], __ATOMIC_SEQ_CST);
        if (word) (void)up_nap_wake(word);
    }
}

static void *up_lookout_run(void *set) {
    int fd = (int)(intptr_t)set;
    for (;;) {
        struct epoll_event found[16];
        int n = epoll_wait(fd, found, 16, -1);
        if (n < 0 && errno != EINTR) return NULL; /* cannot be: nobody closes it */
        pthread_mutex_lock(&up_lookout_mutex);
        for (int i = 0; i < n; i++) {
            up_post *p = up_post_of(found[i].data.u64);
            if (p) up_post_fire(p);
        }
        pthread_mutex_unlock(&up_lookout_mutex);
    }
}

static void up_lookout_forks(void) { pthread_mutex_lock(&up_lookout_mutex); }
static void up_lookout_parent(void) { pthread_mutex_unlock(&up_lookout_mutex); }

/* In a forked child: the parent's set is only closed. */
static void up_lookout_child(void) {
    if (up_lookout_fd >= 0) close(up_lookout_fd);
    up_lookout_fd = -1;
    memset(up_posts, 0, sizeof up_posts);
    pthread_mutex_unlock(&up_lookout_mutex);
}

/* With the mutex: make the epoll set and the thread. All signals are blocked there: they are the user's threads' business. */
static int up_lookout_start(void) {
    static int prepared; /* and so are children, and theirs */
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, old;
    int low = epoll_create1(EPOLL_CLOEXEC), fd = low;
    if (low >= 0 && low < 3) { /* as in up_bell_open */
        fd = fcntl(low, F_DUPFD_CLOEXEC, 3);
        close(low);
    }
    if (fd < 0) return UP_SYSTEM;
    if (!prepared) {
        if (pthread_atfork(up_lookout_forks, up_lookout_parent, up_lookout_child)) {
            close(fd);
            return UP_SYSTEM;
        }
        prepared = 1;
    }
    sigfillset(&all);
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, UP_LOOKOUT_STACK);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&thread, &attr, up_lookout_run, (void *)(intptr_t)fd);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    if (rc) {
        close(fd);
        return UP_SYSTEM;
    }
    (void)pthread_setname_np(thread, "upipe-lookout");
    up_lookout_fd = fd;
    return UP_OK;
}

/* With the mutex. 0 when the kernel has no room for it. */
static int up_post_watch(up_post *p, int operation) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = p->id};
    __atomic_store_n(&p->quiet, 1, __ATOMIC_SEQ_CST); /* before: it may fire at once */
    if (epoll_ctl(up_lookout_fd, operation, p->fd, &event) == 0) return 1;
    __atomic_store_n(&p->quiet, 0, __ATOMIC_SEQ_CST);
    return 0;
}

/* Watch a descriptor and wake these words when it becomes readable. Its id, 0 when there is no post, thread or memory left. */
static uint64_t up_post_new(int fd, uint32_t *first, uint32_t *second) {
    uint64_t id = 0;
    pthread_mutex_lock(&up_lookout_mutex);
    if (up_lookout_fd >= 0 || up_lookout_start() == UP_OK) {
        for (uint32_t i = 1; i < UP_POSTS; i++) { /* not the one at 0: no id is 0 */
            up_post *p = &up_posts[i];
            if (p->id) continue;
            id = ++up_posts_made * UP_POSTS + i;
            p->fd = fd;
            up_post_name(p, id, first, second);
            if (up_post_watch(p, EPOLL_CTL_ADD)) break;
            up_post_name(p, id = 0, NULL, NULL);
            break;
        }
    }
    pthread_mutex_unlock(&up_lookout_mutex);
    return id;
}

/* Has it not fired since it was armed? SYNC lookout */
static inline int up_post_quiet(uint64_t id) {
    up_post *p = up_post_of(id);
    return p && __atomic_load_n(&p->quiet, __ATOMIC_SEQ_CST);
}

/* Arm it again after it fired, its descriptor still open; it fires at once when that is readable. 0 when it is gone. */
static int up_post_again(uint64_t id) {
    if (!id) return 0;
    pthread_mutex_lock(&up_lookout_mutex);
    up_post *p = up_post_of(id);
    int rc = p && up_post_watch(p, EPOLL_CTL_MOD);
    pthread_mutex_unlock(&up_lookout_mutex);
    return rc;
}

/* The word that its owner is about to nap on, NULL = none any more. SYNC lookout */
static inline void up_post_nap(uint64_t id, uint32_t *word) {
    up_post *p = up_post_of(id);
    if (p) __atomic_store_n(&p->words[0], word, __ATOMIC_SEQ_CST);
}

/* Before the descriptor is closed, where possible. A later post on the same number means that it was closed before: that
 * number is the other one's now, and the kernel has forgotten ours. */
static void up_post_end(uint64_t id) {
    if (!id) return;
    pthread_mutex_lock(&up_lookout_mutex);
    up_post *p = up_post_of(id);
    if (p) {
        int other = 0;
        for (int i = 0; i < UP_POSTS; i++) other |= up_posts[i].id > id && up_posts[i].fd == p->fd;
        if (!other) (void)epoll_ctl(up_lookout_fd, EPOLL_CTL_DEL, p->fd, NULL);
        up_post_name(p, 0, NULL, NULL);
    }
    pthread_mutex_unlock(&up_lookout_mutex);
}

/* After it, the thread uses no word that no post names any more. */
static void up_lookout_settle(void) {
    pthread_mutex_lock(&up_lookout_mutex);
    pthread_mutex_unlock(&up_lookout_mutex);
}

#endif
