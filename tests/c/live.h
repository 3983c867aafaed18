/* live.h - a loop with real connections, as the units that need one share it.
 *
 * The peer is in the same thread: where it has to wait, hear_byte() lets the loop turn.
 */
#ifndef PREFORK_TESTS_LIVE_H
#define PREFORK_TESTS_LIVE_H

#include "internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { SOON_MS = 10000 };

/* ---- a server and its peers ---------------------------------------------------------*/
static pf_options options; /* of the next server */
static pf_loop *loop;
static int listener;

static inline int64_t
clock_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static inline int
listen_tcp(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert(fd >= 0 && bind(fd, (struct sockaddr *)&at, sizeof at) == 0);
    assert(listen(fd, 64) == 0);
    return fd;
}

/* In the abstract namespace, at a name that the kernel chooses. */
static inline int
listen_unix(void)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(fd >= 0);
    assert(bind(fd, (struct sockaddr *)&at, offsetof(struct sockaddr_un, sun_path))
           == 0);
    assert(listen(fd, 64) == 0);
    return fd;
}

static inline void
open_on(int fd)
{
    listener = fd;
    assert(pf_loop_open(&loop, &options) == 0);
    assert(pf_loop_listen(loop, listener) == 0);
}

static inline void
open_server(unsigned flags)
{
    options.flags |= flags;
    open_on(listen_tcp());
}

static inline pf_loop_stats
stats(void)
{
    pf_loop_stats s;
    pf_loop_get_stats(loop, &s);
    return s;
}

static inline void
close_server(void)
{
    assert(stats().lent == 0);
    pf_loop_close(loop);
    assert(stats().connections == 0 && stats().buffers_in_use == 0);
    assert(pf_loop_free(loop) == 0);
    close(listener);
    pf_options_init(&options);
}

static inline int
open_peer(void)
{
    struct sockaddr_storage at;
    socklen_t len = sizeof at;
    assert(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
    int fd = socket(at.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(fd >= 0);
    return fd;
}

static inline void
connect_peer(int fd)
{
    struct sockaddr_storage at;
    socklen_t len = sizeof at;
    assert(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
    assert(connect(fd, (struct sockaddr *)&at, len) == 0);
}

static inline int
connected_peer(void)
{
    int fd = open_peer();
    connect_peer(fd);
    return fd;
}

static inline void
say_bytes(int fd, const char *data, size_t len)
{
    assert(send(fd, data, len, MSG_NOSIGNAL) == (ssize_t)len);
}

static inline void
say(int fd, const char *text)
{
    say_bytes(fd, text, strlen(text));
}

static inline int
peer_saying(const char *text)
{
    int fd = connected_peer();
    say(fd, text);
    return fd;
}

/* A close that the other side sees as ECONNRESET. */
static inline void
reset_peer(int fd)
{
    struct linger now = {.l_onoff = 1};
    assert(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0);
    close(fd);
}

/* ---- events -------------------------------------------------------------------------*/
/* Not one that is only found when the time is up. */
static inline pf_event
next_event(void)
{
    pf_event event = {0};
    int64_t end = clock_ms() + SOON_MS;
    assert(pf_loop_wait(loop, &event, 1, SOON_MS) == 1 && clock_ms() < end);
    return event;
}

static inline pf_request *
next_request(void)
{
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_REQUEST);
    return event.request;
}

static inline void
expect_event(unsigned flags, const pf_request *request)
{
    pf_event event = next_event();
    assert(event.flags == flags && event.request == request);
}

/* A turn that brings nothing. */
static inline void
quiet(int timeout_ms)
{
    pf_event event;
    assert(pf_loop_wait(loop, &event, 1, timeout_ms) == 0);
}

static inline void
turn_until(bool (*done)(void))
{
    for (int64_t end = clock_ms() + SOON_MS; !done(); quiet(5))
        assert(clock_ms() < end);
}

static inline bool
nobody_is_connected(void)
{
    return stats().connections == 0;
}

/* ---- what a peer hears --------------------------------------------------------------*/
static char heard[65536];

/* 1, or 0 at the end, or -errno. */
static inline int
hear_byte(int fd, char *byte)
{
    for (int64_t end = clock_ms() + SOON_MS;; quiet(5)) {
        ssize_t n = recv(fd, byte, 1, MSG_DONTWAIT);
        if (n >= 0)
            return (int)n;
        if (errno != EAGAIN)
            return -errno;
        assert(clock_ms() < end);
    }
}

static inline const char *
hear_bytes(int fd, size_t len)
{
    assert(len < sizeof heard);
    for (size_t i = 0; i < len; i++)
        assert(hear_byte(fd, &heard[i]) == 1);
    heard[len] = '\0';
    return heard;
}

/* Everything up to this text and with it. */
static inline const char *
hear_until(int fd, const char *text)
{
    size_t len = 0, n = strlen(text);
    do {
        assert(len + 1 < sizeof heard && hear_byte(fd, &heard[len]) == 1);
        heard[++len] = '\0';
    } while (len < n || memcmp(heard + len - n, text, n) != 0);
    return heard;
}

static inline const char *
hear_head(int fd)
{
    return hear_until(fd, "\r\n\r\n");
}

/* One answer of known length: its head, which is returned, and its body, dropped. */
static inline const char *
hear_answer(int fd)
{
    static char head[4096];
    size_t len = strlen(hear_head(fd));
    assert(len < sizeof head);
    memcpy(head, heard, len + 1);
    const char *length = strstr(head, "Content-Length: ");
    hear_bytes(fd, length ? (size_t)atoi(length + 16) : 0);
    return head;
}

static inline void
hear_end(int fd)
{
    char byte;
    assert(hear_byte(fd, &byte) == 0);
}

static inline bool
hears_nothing(int fd)
{
    char byte;
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
}

static inline bool
says(const char *head, const char *part)
{
    return strstr(head, part) != NULL;
}

/* ---- answers ------------------------------------------------------------------------*/
static inline void
answer(pf_request *r, const char *text)
{
    assert(pf_request_answer(r, 200, NULL, 0, text, strlen(text), NULL) == 0);
}

static inline void
answer_refused(pf_request *r)
{
    assert(pf_request_answer(r, 200, NULL, 0, "", 0, NULL) == PF_ERR_CLOSED);
    assert(pf_request_abort(r) == 0);
}

static inline void
begin(pf_request *r, int64_t length)
{
    assert(pf_request_begin(r, 200, length) == 0);
}

static inline bool
target_is(const pf_request *r, const char *target)
{
    pf_span span = pf_request_head(r)->target;
    return span.len == strlen(target)
           && memcmp(pf_request_bytes(r) + span.at, target, span.len) == 0;
}

static inline bool
body_is(const pf_request *r, const char *text)
{
    pf_slice body = pf_request_body(r);
    return body.len == strlen(text) && memcmp(body.data, text, body.len) == 0;
}

#define GET "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
#define GET_1_0 "GET / HTTP/1.0\r\n\r\n"
#define POST_5 "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
#define POST_CHUNKED "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
#define POST_EXPECT                                                                    \
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"

#endif
