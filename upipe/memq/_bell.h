/* Doorbells: how a sleeper is woken.
 *
 * A doorbell is a FIFO `<root>/<pid>-<start>/bell.<id>` in the sleeper's own session directory, so that both poll(2) and an
 * event loop can watch it, together with pidfds. Who rings writes one byte; who sleeps drains it.
 * Owner: the sleeper creates and unlinks it; after kill -9 the sweep of its session removes it, and ringing it fails
 * (ENOENT, ENXIO or EPIPE), which tells the waker to wake somebody else. A child that the sleeper forked may hold it open:
 * then the ring is lost in it until the sleeper is recovered, which wakes everybody.
 * Rejected: a futex alone (asyncio cannot watch it, poll cannot join it with pidfds; threads nap on one first, _wake.h),
 * eventfd (has no name), one FIFO per queue (wakes the whole herd).
 */
#ifndef UPIPE_BELL_H
#define UPIPE_BELL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define UP_BELL_CACHE 128 /* open write ends kept by a process; direct mapped, so descriptors stay bounded */
#define UP_BELL_NOBODY -1 /* nobody can hear it: its sleeper is dead */
#define UP_BELL_BROKE -2  /* this process has no descriptor left to ring it with */

typedef struct up_bell_entry {
    uint32_t pid, id;
    uint64_t start;
    int fd;
    uint64_t inode_guard; /* hash of root: two roots may hold the same pid */
} up_bell_entry;

static up_bell_entry up_bell_cache[UP_BELL_CACHE];
static pthread_mutex_t up_bell_mutex = PTHREAD_MUTEX_INITIALIZER; /* process-local, a handful of instructions */

/* After fork: another thread may have held it. */
static void up_bell_child(void) { pthread_mutex_init(&up_bell_mutex, NULL); }

static uint64_t up_bell_hash(const char *text) {
    uint64_t h = 1469598103934665603ull; /* FNV-1a */
    for (; *text; text++) h = (h ^ (uint8_t)*text) * 1099511628211ull;
    return h;
}

static void up_bell_path(char *out, size_t n, const char *root, uint32_t pid, uint64_t start, uint32_t id) {
    snprintf(out, n, "%s/%u-%llu/bell.%u", root, pid, (unsigned long long)start, id);
}

static void up_bell_close_all(void) {
    for (int i = 0; i < UP_BELL_CACHE; i++) {
        if (up_bell_cache[i].fd > 0) close(up_bell_cache[i].fd);
        up_bell_cache[i].fd = 0;
    }
}

/* The write end by name: a descriptor above 2 (in a daemon 0 to 2 may be free, and printing must not ring), or UP_BELL_*. */
static int up_bell_open(const char *path) {
    int fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM)) {
        up_bell_close_all();
        fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);
    }
    if (fd >= 0 && fd < 3) {
        int low = fd;
        fd = fcntl(low, F_DUPFD_CLOEXEC, 3);
        close(low);
    }
    if (fd >= 0) return fd;
    return errno == EMFILE || errno == ENFILE || errno == ENOMEM ? UP_BELL_BROKE : UP_BELL_NOBODY;
}

/* Write one byte; 0 when it is in, or the FIFO is full, which wakes as well. A program that has SIGPIPE at its default must
 * not die because a sleeper did. */
static int up_bell_write(int fd) {
    struct sigaction now;
    char one = 1;
    if (sigaction(SIGPIPE, NULL, &now) == 0 && now.sa_handler == SIG_IGN)
        return write(fd, &one, 1) == 1 || errno == EAGAIN ? 0 : -1;
    sigset_t pipe_, old, pending;
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    sigpending(&pending);
    pthread_sigmask(SIG_BLOCK, &pipe_, &old);
    int rc = write(fd, &one, 1) == 1 || errno == EAGAIN ? 0 : -1;
    if (rc && !sigismember(&pending, SIGPIPE)) {
        struct timespec none = {0, 0};
        while (sigtimedwait(&pipe_, NULL, &none) < 0 && errno == EINTR) {
        }
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return rc;
}

/* Ring once: 0, UP_BELL_NOBODY or UP_BELL_BROKE. */
static int up_bell_ring(const char *root, uint64_t root_hash, uint32_t pid, uint64_t start, uint32_t id) {
    up_bell_entry *e = &up_bell_cache[(pid * 31u + id * 7u + (uint32_t)start) % UP_BELL_CACHE];
    int rc = UP_BELL_NOBODY;
    pthread_mutex_lock(&up_bell_mutex);
    for (int attempt = 0; attempt < 2; attempt++) {
        int hit = e->fd > 0 && e->pid == pid && e->id == id && e->start == start && e->inode_guard == root_hash;
        if (!hit) {
            char path[256];
            if (e->fd > 0) close(e->fd);
            e->fd = 0;
            up_bell_path(path, sizeof path, root, pid, start, id);
            int fd = up_bell_open(path);
            if (fd < 0) {
                rc = fd;
                break;
            }
            e->pid = pid, e->id = id, e->start = start, e->inode_guard = root_hash, e->fd = fd;
        }
        if (up_bell_write(e->fd) == 0) {
            rc = 0;
            break;
        }
        close(e->fd); /* EPIPE: the sleeper is gone, or its id was used again: look once more by name */
        e->fd = 0;
    }
    pthread_mutex_unlock(&up_bell_mutex);
    return rc;
}

/* Forget every cached write end: in a forked child, and when a test counts descriptors. */
static void up_bell_forget(void) {
    pthread_mutex_lock(&up_bell_mutex);
    up_bell_close_all();
    pthread_mutex_unlock(&up_bell_mutex);
}

static void up_bell_drain(int fd) {
    char junk[256];
    while (read(fd, junk, sizeof junk) == (ssize_t)sizeof junk) {
    }
}

#endif
