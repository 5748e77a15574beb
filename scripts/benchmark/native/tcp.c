/* Frames over one TCP connection. GB/s.
 *   tcp SIZE N                          on loopback
 *   tcp SIZE N FROM TO ADDRESS          from one network namespace (a path) to another, which has that IPv4 address
 */
#include "common.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/socket.h>

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void enter(const char *namespace) {
    int fd = open(namespace, O_RDONLY);
    if (fd < 0 || setns(fd, CLONE_NEWNET)) die(namespace);
    close(fd);
}

static void receive(int listener, size_t size, uint64_t n) {
    char *buffer = malloc(size);
    int fd = accept(listener, NULL, NULL);
    uint64_t began = 0, warm = n / 10 + 1;
    for (uint64_t i = 0; i < n + warm; i++) {
        if (i == warm) began = now_ns();
        for (size_t got = 0; got < size;) {
            ssize_t some = read(fd, buffer + got, size - got);
            if (some <= 0) die("read");
            got += (size_t)some;
        }
    }
    printf("%.3f\n", (double)n * (double)size / ((now_ns() - began) / 1e9) / 1e9);
}

int main(int argc, char **argv) {
    if (argc != 3 && argc != 6) return 2;
    const size_t size = (size_t)atoll(argv[1]);
    const uint64_t n = (uint64_t)atoll(argv[2]);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (argc == 6) {
        if (inet_pton(AF_INET, argv[5], &address.sin_addr) != 1) return 2;
        enter(argv[4]);
    }
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1)) die("listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    if (fork() == 0) {
        char *buffer = calloc(1, size);
        if (argc == 6) enter(argv[3]);
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&address, length)) die("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        for (uint64_t i = 0; i < n + n / 10 + 1; i++)
            for (size_t sent = 0; sent < size;) {
                ssize_t some = write(fd, buffer + sent, size - sent);
                if (some <= 0) die("write");
                sent += (size_t)some;
            }
        _exit(0);
    }
    receive(listener, size, n);
    wait(NULL);
    return 0;
}
