/* limit.c - the physical limit: what an answer costs when nobody looks at the question.
 *
 * One thread, one edge-triggered epoll. It waits, reads, counts the requests that end
 * in the bytes read, and writes one prepared answer for each, all in one send. It
 * parses no head, keeps no timer and calls no handler, so nothing that serves the same
 * bytes over the same system calls can cost less. What a real server costs is
 * published as a multiple of this.
 *
 * Where two ways cost differently, the cheaper one stands here:
 *   - recv and send save about 2% over read and write;
 *   - the first recv comes right after accept, and a connection that is answered and
 *     closed by it is never registered with epoll;
 *   - TCP_DEFER_ACCEPT: a connection is accepted when its first bytes are there, so
 *     that this first recv finds them (30% of a connection that carries one request);
 *   - MSG_MORE before close: the answer and the FIN leave in one segment (20% more).
 * These made no difference that could be told from noise: level-triggered epoll, 16 or
 * 512 events a wait, all reads of a batch before all writes, TCP_NODELAY, another
 * congestion control, an edge-triggered listener, one accept a wake. Reading until
 * EAGAIN costs 3%; waiting without sleep costs twice as much.
 *
 * A request ends with an empty line: bodies are taken as part of what follows, which
 * holds for every body without an empty line inside, and no load here sends another.
 *
 * With --websocket the first request is a handshake, and then every 11 bytes are a
 * masked frame of five, the answer to which is known: wsload.c sends no others, and
 * always the sample key of RFC 6455, section 1.3.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "program.h"

enum {
    BATCH = 64,
    READ_SIZE = 64 << 10,
    ANSWERS_SIZE = 64 << 10,
    HEAD_SIZE = 256,
    FRAME_SIZE = 11
};

static const char EMPTY_LINE[4] = "\r\n\r\n";
static const char HELLO[] = "Hello, World!";
static const char SWITCHING[] = "HTTP/1.1 101 Switching Protocols\r\n"
                                "Upgrade: websocket\r\n"
                                "Connection: Upgrade\r\n"
                                "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
                                "\r\n";
static const char ECHO[] = "\x81\x05Hello";

/* What a connection needs to remember between two wakes; indexed by its fd. The table
 * is as long as RLIMIT_NOFILE and only touched pages of it take memory. */
typedef struct conn {
    uint32_t matched; /* bytes at the end of the last read: of EMPTY_LINE, 0..3, or of
                         a frame */
    uint32_t sent;    /* of the answer under way */
    uint32_t owed;    /* answers not wholly sent */
    bool watched;     /* by epoll */
    bool switched;    /* from requests to frames */
} conn;

static struct {
    bool close;
    bool defer_accept;
    bool websocket;
    size_t body_size; /* 0: "Hello, World!" */
    uint16_t port;
} options = {.defer_accept = true};

static int poller, listener;
static conn *conns;

/* As many copies of the answer as fit, at least one, end to end. */
static char *answers;
static size_t answer_size, answers_size;
static char
    input[3 + READ_SIZE]; /* three bytes in front for what the last read began */

/* ---- The answer -------------------------------------------------------------------*/

static size_t
write_head(char *out, time_t now)
{
    char date[64];
    struct tm tm;
    gmtime_r(&now, &tm);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", &tm);
    int n = snprintf(out, HEAD_SIZE,
                     "HTTP/1.1 200 OK\r\n"
                     "Server: prefork\r\n"
                     "Date: %s\r\n"
                     "Content-Type: text/plain; charset=utf-8\r\n"
                     "Content-Length: %zu\r\n"
                     "%s\r\n",
                     date, options.body_size ? options.body_size : sizeof HELLO - 1,
                     options.close ? "Connection: close\r\n" : "");
    assert(n > 0 && n < HEAD_SIZE);
    return (size_t)n;
}

static void
prepare_answers(void)
{
    char head[HEAD_SIZE];
    size_t head_size = options.websocket ? 0 : write_head(head, time(NULL));
    size_t body_size = options.body_size ? options.body_size : sizeof HELLO - 1;
    const char *body = HELLO;
    if (options.websocket) {
        body = ECHO;
        body_size = sizeof ECHO - 1;
    }
    answer_size = head_size + body_size;
    size_t copies = answer_size < ANSWERS_SIZE ? ANSWERS_SIZE / answer_size : 1;
    answers_size = copies * answer_size;
    answers = malloc(answers_size);
    if (!answers)
        die("malloc");
    for (char *at = answers; at < answers + answers_size; at += answer_size) {
        memcpy(at, head, head_size);
        if (options.body_size)
            memset(at + head_size, 'x', body_size);
        else
            memcpy(at + head_size, body, body_size);
    }
}

static void
refresh_date(void)
{
    static time_t last;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (now.tv_sec == last || options.websocket)
        return;
    last = now.tv_sec;
    char head[HEAD_SIZE];
    size_t size = write_head(head, last);
    for (char *at = answers; at < answers + answers_size; at += answer_size)
        memcpy(at, head, size);
}

/* ---- Counting requests ------------------------------------------------------------*/

/* How many empty lines end in p[0..n). Blocks of 128 let the compiler count in bytes of
 * a vector register. */
static unsigned
count_empty_lines(const char *p, size_t n)
{
    unsigned count = 0;
    for (; n >= 128 + 3; p += 128, n -= 128) {
        uint8_t some = 0;
        for (int i = 0; i < 128; i++)
            some += (p[i] == '\r') & (p[i + 1] == '\n') & (p[i + 2] == '\r')
                    & (p[i + 3] == '\n');
        count += some;
    }
    const char *end = p + n;
    while ((p = memmem(p, (size_t)(end - p), EMPTY_LINE, 4))) {
        count++;
        p += 4;
    }
    return count;
}

/* How many bytes at the end of p[0..n) begin an empty line without completing it. */
static uint32_t
match_tail(const char *p, size_t n)
{
    if (n >= 4 && !memcmp(p + n - 4, EMPTY_LINE, 4))
        return 0;
    for (uint32_t len = n < 3 ? (uint32_t)n : 3; len; len--)
        if (!memcmp(p + n - len, EMPTY_LINE, len))
            return len;
    return 0;
}

/* How many requests, or frames, end in the n bytes that were read. */
static unsigned
count_requests(conn *c, size_t n)
{
    size_t size = n + c->matched;
    if (c->switched) {
        c->matched = (uint32_t)(size % FRAME_SIZE);
        return (unsigned)(size / FRAME_SIZE);
    }
    const char *p = input + 3 - c->matched;
    memcpy(input + 3 - c->matched, EMPTY_LINE, c->matched);
    unsigned requests = count_empty_lines(p, size);
    c->matched = match_tail(p, size);
    return requests;
}

/* ---- Connections ------------------------------------------------------------------*/

static void
watch(int fd)
{
    conn *c = &conns[fd];
    if (c->watched)
        return;
    c->watched = true;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET
                                          | (options.body_size ? EPOLLOUT : 0),
                                .data.fd = fd};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
}

/* Sends what is owed. False if the connection is closed now. */
static bool
answer(int fd)
{
    conn *c = &conns[fd];
    int flags = MSG_NOSIGNAL | (options.close ? MSG_MORE : 0);
    while (c->owed) {
        size_t left = c->owed * answer_size - c->sent;
        size_t here = answers_size - c->sent;
        ssize_t n = send(fd, answers + c->sent, left < here ? left : here, flags);
        if (n < 0 && errno == EAGAIN) {
            if (!(options.body_size)) { /* rare with small answers: not worth EPOLLOUT
                                           on every connection from the start */
                struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET,
                                            .data.fd = fd};
                watch(fd);
                epoll_ctl(poller, EPOLL_CTL_MOD, fd, &event);
            }
            return true;
        }
        if (n < 0) {
            close(fd);
            return false;
        }
        c->owed -= (uint32_t)((c->sent + (size_t)n) / answer_size);
        c->sent = (uint32_t)((c->sent + (size_t)n) % answer_size);
    }
    if (options.close) {
        close(fd);
        return false;
    }
    return true;
}

/* One recv, and a send if a request ends in it. A buffer filled to the brim is the only
 * sign that more may wait. False if the connection is closed now. */
static bool
serve(int fd)
{
    conn *c = &conns[fd];
    ssize_t n;
    do {
        n = recv(fd, input + 3, READ_SIZE, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) {
            close(fd);
            return false;
        }
        if (n < 0)
            break;
        unsigned requests = count_requests(c, (size_t)n);
        if (requests && options.websocket && !c->switched) {
            c->switched = true;
            send(fd, SWITCHING, sizeof SWITCHING - 1, MSG_NOSIGNAL);
            continue;
        }
        c->owed += options.close && requests ? 1 : requests;
        if (options.close && !requests)
            continue;
        if (c->owed && !answer(fd))
            return false;
    } while (n == READ_SIZE);
    return !c->owed || answer(fd);
}

static void
accept_all(void)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        conns[fd] = (conn){0};
        if (!serve(fd))
            continue;
        watch(fd);
    }
    if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
        die("accept4");
}

static void
serve_forever(void)
{
    struct epoll_event events[BATCH];
    for (;;) {
        int n = epoll_wait(poller, events, BATCH, -1);
        refresh_date();
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd == listener)
                accept_all();
            else
                serve(events[i].data.fd);
        }
    }
}

/* ---- Start ------------------------------------------------------------------------*/

static void
open_listener(void)
{
    int on = 1;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (options.defer_accept)
        setsockopt(listener, IPPROTO_TCP, TCP_DEFER_ACCEPT, &on, sizeof on);
    listen_at(listener, options.port);
}

static void
open_poller(void)
{
    rlim_t limit = raise_limit();
    size_t size = (limit < 1 << 20 ? limit : 1 << 20) * sizeof *conns;
    conns = mmap(NULL, size, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (conns == MAP_FAILED)
        die("mmap");
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event))
        die("epoll");
}

static int
usage(void)
{
    fprintf(stderr, "usage: limit [--close] [--no-defer-accept] [--body BYTES]\n"
                    "             [--websocket] [PORT]\n"
                    "PORT 0 (the default) takes a free one; the port is printed.\n");
    return 2;
}

int
main(int argc, char **argv)
{
    static const struct option LONG[] = {{"close", no_argument, NULL, 'c'},
                                         {"no-defer-accept", no_argument, NULL, 'd'},
                                         {"body", required_argument, NULL, 'b'},
                                         {"websocket", no_argument, NULL, 'w'},
                                         {0}};
    int option;
    while ((option = getopt_long(argc, argv, "", LONG, NULL)) >= 0) {
        switch (option) {
        case 'c':
            options.close = true;
            break;
        case 'd':
            options.defer_accept = false;
            break;
        case 'w':
            options.websocket = true;
            break;
        case 'b':
            options.body_size = strtoul(optarg, NULL, 10);
            break;
        default:
            return usage();
        }
    }
    if (argc - optind > 1)
        return usage();
    if (optind < argc)
        options.port = (uint16_t)strtoul(argv[optind], NULL, 10);
    open_listener();
    open_poller();
    prepare_answers();
    serve_forever();
}
