/* A host whose clock is wrong: LD_PRELOAD this, and $UPIPE_TEST_CLOCK seconds are added to what the calendar says.
   Monotonic clocks are right, as on such a host. (libfaketime would do, and leaves files in /dev/shm after kill -9.) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

int clock_gettime(clockid_t id, struct timespec *now)
{
    static int (*system_one)(clockid_t, struct timespec *);
    const char *offset = getenv("UPIPE_TEST_CLOCK");
    int done;

    if (!system_one)
        system_one = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    done = system_one(id, now);
    if (!done && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += atol(offset);
    return done;
}

time_t time(time_t *where) /* OpenSSL asks this one */
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    if (where)
        *where = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec at;

    (void)zone;
    clock_gettime(CLOCK_REALTIME, &at);
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return 0;
}
