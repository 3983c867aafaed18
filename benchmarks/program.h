/* program.h - what the programs that load and that serve have in common. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* What errno says, and the end. */
static inline void
die(const char *what)
{
    perror(what);
    exit(1);
}

static inline uint64_t
now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Has this process open as many descriptors as it may, and tells how many those are. */
static inline rlim_t
raise_limit(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    return limit.rlim_cur;
}

static inline struct sockaddr_in
loopback(uint16_t port)
{
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons(port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

/* Prints the port of a socket: who has started the program waits for that line. */
static inline void
tell_port(int fd)
{
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
}

/* Has a fresh socket listen on this port of the loopback (0: a free one), and tells it.
 * Connections inherit TCP_NODELAY. */
static inline void
listen_at(int fd, uint16_t port)
{
    int on = 1;
    struct sockaddr_in address = loopback(port);
    if (fd < 0)
        die("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address))
        die("bind");
    if (listen(fd, 4096))
        die("listen");
    tell_port(fd);
}

/* A connection on which a read waits five seconds at most; -1: it was refused. */
static inline int
connect_to_server(uint16_t port)
{
    int on = 1;
    struct timeval patience = {.tv_sec = 5};
    struct sockaddr_in address = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (!connect(fd, (struct sockaddr *)&address, sizeof address))
        return fd;
    close(fd);
    return -1;
}

#endif
