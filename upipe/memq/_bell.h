/* Doorbells: how a sleeper is woken.
 *
 * A doorbell is a FIFO `<root>/<pid>-<start>/bell.<id>` in the sleeper's own session directory, so that both poll(2) and an
 * event loop can watch it, together with pidfds. Who rings writes one byte; who sleeps drains it.
 * Owner: the sleeper creates and unlinks it; after kill -9 the sweep of its session removes it, and ringing it fails
 * (ENOENT, ENXIO or EPIPE), which tells the waker to wake somebody else.
 * Rejected: a futex (asyncio cannot watch it, poll cannot join it with pidfds), eventfd (has no name), one FIFO per
 * queue (wakes the whole herd). A round trip costs what a futex's does: the wake-up of the other core decides.
 */
#ifndef UPIPE_BELL_H
#define UPIPE_BELL_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define UP_BELL_CACHE 128 /* open write ends kept by a process; direct mapped, so descriptors stay bounded */

typedef struct up_bell_entry {
    uint32_t pid, id;
    uint64_t start;
    int fd;
    uint64_t inode_guard; /* hash of root: two roots may hold the same pid */
} up_bell_entry;

static up_bell_entry up_bell_cache[UP_BELL_CACHE];
static pthread_mutex_t up_bell_mutex = PTHREAD_MUTEX_INITIALIZER; /* process-local, a handful of instructions */

static void up_bell_child(void) { pthread_mutex_init(&up_bell_mutex, NULL); } /* after fork: another thread may have held it */

static uint64_t up_bell_hash(const char *text) {
    uint64_t h = 1469598103934665603ull; /* FNV-1a */
    for (; *text; text++) h = (h ^ (uint8_t)*text) * 1099511628211ull;
    return h;
}

static void up_bell_path(char *out, size_t n, const char *root, uint32_t pid, uint64_t start, uint32_t id) {
    snprintf(out, n, "%s/%u-%llu/bell.%u", root, pid, (unsigned long long)start, id);
}

/* Ring once. 0 when the byte is in (or the FIFO is full, which wakes as well); -1 when nobody can hear it. */
static int up_bell_ring(const char *root, uint64_t root_hash, uint32_t pid, uint64_t start, uint32_t id) {
    up_bell_entry *e = &up_bell_cache[(pid * 31u + id * 7u + (uint32_t)start) % UP_BELL_CACHE];
    int rc = -1;
    pthread_mutex_lock(&up_bell_mutex);
    for (int attempt = 0; attempt < 2; attempt++) {
        int hit = e->fd > 0 && e->pid == pid && e->id == id && e->start == start && e->inode_guard == root_hash;
        if (!hit) {
            char path[256];
            if (e->fd > 0) close(e->fd);
            e->fd = 0;
            up_bell_path(path, sizeof path, root, pid, start, id);
            int fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);
            if (fd < 0) break;
            e->pid = pid, e->id = id, e->start = start, e->inode_guard = root_hash, e->fd = fd;
        }
        char one = 1;
        if (write(e->fd, &one, 1) == 1 || errno == EAGAIN) {
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
    for (int i = 0; i < UP_BELL_CACHE; i++) {
        if (up_bell_cache[i].fd > 0) close(up_bell_cache[i].fd);
        up_bell_cache[i].fd = 0;
    }
    pthread_mutex_unlock(&up_bell_mutex);
}

static void up_bell_drain(int fd) {
    char junk[256];
    while (read(fd, junk, sizeof junk) == (ssize_t)sizeof junk) {
    }
}

#endif
