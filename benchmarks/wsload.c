/* wsload.c - WebSocket echoes: how many a second, and how long one takes.
 *
 * One thread, one epoll, N connections with one masked text frame of five bytes under
 * way on each: when its echo is here, the next one leaves. Which is what wrk does with
 * requests, and no server can batch what has not been sent.
 *
 * All handshakes are made first, one after the other. Their key is always the sample
 * of RFC 6455, section 1.3, so that limit.c need not hash it; masks differ from frame
 * to frame. Pings are answered, and whatever else is not the echo breaks a connection.
 *
 * With --wait a line is awaited on stdin when all connections stand, and again when the
 * result is printed: whoever measures the server reads its clocks there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "program.h"

enum {
    BATCH = 64,
    PAYLOAD_SIZE = 5,
    SMALL = 126,      /* payloads from here on have a longer head, and none is sent */
    INPUT_SIZE = 256, /* more than one frame may come: a ping and an echo */
    HEAD_SIZE = 1024, /* of an answer to the handshake */
    LONGEST_US = 1 << 21 /* an echo that takes longer counts as this long */
};
enum {
    OPCODE_TEXT = 0x1,
    OPCODE_PING = 0x9,
    OPCODE_PONG = 0xa,
    FIN = 0x80,
    MASK = 0x80
};

static const char PAYLOAD[PAYLOAD_SIZE] = "Hello";
static const char HANDSHAKE[] = "GET / HTTP/1.1\r\n"
                                "Host: localhost\r\n"
                                "Upgrade: websocket\r\n"
                                "Connection: Upgrade\r\n"
                                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                                "Sec-WebSocket-Version: 13\r\n"
                                "\r\n";
static const char ACCEPT[] = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

typedef struct conn {
    int fd; /* -1: broken */
    uint64_t sent_ns;
    size_t size; /* of the frames in input */
    unsigned char input[INPUT_SIZE];
} conn;

static struct {
    unsigned connections;
    double seconds;
    bool wait;
    uint16_t port;
} options = {.connections = 512, .seconds = 3};

static int poller;
static conn *conns;
static uint64_t echoes, errors;
static uint32_t took[LONGEST_US + 1]; /* echoes by microseconds */

/* ---- Frames -----------------------------------------------------------------------*/

/* A mask for each frame; that it can be foreseen harms nobody here (xorshift). */
static uint32_t
next_mask(void)
{
    static uint32_t state = 0x9e3779b9;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

/* False if the frame could not be sent at once: so little always fits. */
static bool
send_frame(conn *c, unsigned opcode, const void *payload, size_t size)
{
    unsigned char frame[6 + SMALL];
    uint32_t mask = next_mask();
    frame[0] = (unsigned char)(FIN | opcode);
    frame[1] = (unsigned char)(MASK | size);
    memcpy(frame + 2, &mask, 4);
    for (size_t i = 0; i < size; i++)
        frame[6 + i] = ((const unsigned char *)payload)[i] ^ frame[2 + i % 4];
    return send(c->fd, frame, 6 + size, MSG_NOSIGNAL) == (ssize_t)(6 + size);
}

static bool
send_message(conn *c)
{
    c->sent_ns = now_ns();
    return send_frame(c, OPCODE_TEXT, PAYLOAD, PAYLOAD_SIZE);
}

static bool
take_echo(conn *c, const unsigned char *payload, size_t size)
{
    if (size != PAYLOAD_SIZE || memcmp(payload, PAYLOAD, PAYLOAD_SIZE))
        return false;
    uint64_t us = (now_ns() - c->sent_ns) / 1000;
    took[us < LONGEST_US ? us : LONGEST_US]++;
    echoes++;
    return send_message(c);
}

static bool
take_frames(conn *c)
{
    const unsigned char *p = c->input, *end = p + c->size;
    while (end - p >= 2) {
        size_t size = p[1];
        if (size >= SMALL) /* or masked, which a server's are not */
            return false;
        if ((size_t)(end - p) < 2 + size)
            break;
        bool good = p[0] == (FIN | OPCODE_TEXT) ? take_echo(c, p + 2, size)
                    : p[0] == (FIN | OPCODE_PING)
                        ? send_frame(c, OPCODE_PONG, p + 2, size)
                        : false;
        if (!good)
            return false;
        p += 2 + size;
    }
    c->size = (size_t)(end - p);
    memmove(c->input, p, c->size);
    return true;
}

/* ---- Connections ------------------------------------------------------------------*/

/* The answer to the handshake, and nothing behind it. */
static void
read_accept(int fd)
{
    char head[HEAD_SIZE + 1];
    size_t size = 0;
    do {
        ssize_t n = recv(fd, head + size, HEAD_SIZE - size, 0);
        if (n <= 0)
            die("no answer to the handshake");
        size += (size_t)n;
        head[size] = '\0';
    } while (size < HEAD_SIZE && !strstr(head, "\r\n\r\n"));
    if (strncmp(head, "HTTP/1.1 101 ", 13) || !strstr(head, ACCEPT)) {
        fprintf(stderr, "wsload: no WebSocket: %.*s\n", (int)strcspn(head, "\r"), head);
        exit(1);
    }
}

static void
open_connection(conn *c)
{
    c->fd = connect_to_server(options.port);
    if (c->fd < 0)
        die("connect");
    if (send(c->fd, HANDSHAKE, sizeof HANDSHAKE - 1, MSG_NOSIGNAL) < 0)
        die("send");
    read_accept(c->fd);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event))
        die("epoll_ctl");
}

static void
break_connection(conn *c)
{
    close(c->fd);
    c->fd = -1;
    errors++;
}

static void
serve(conn *c)
{
    ssize_t n =
        recv(c->fd, c->input + c->size, sizeof c->input - c->size, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        break_connection(c);
        return;
    }
    c->size += (size_t)n;
    if (!take_frames(c))
        break_connection(c);
}

/* ---- The load ---------------------------------------------------------------------*/

/* The seconds that it took. */
static double
load(void)
{
    struct epoll_event events[BATCH];
    uint64_t start = now_ns();
    uint64_t end = start + (uint64_t)(options.seconds * 1e9), now;
    for (unsigned i = 0; i < options.connections; i++)
        if (!send_message(&conns[i]))
            break_connection(&conns[i]);
    while ((now = now_ns()) < end && errors < options.connections) {
        int n = epoll_wait(poller, events, BATCH, (int)((end - now) / 1000000) + 1);
        for (int i = 0; i < n; i++)
            serve(events[i].data.ptr);
    }
    return (double)(now - start) / 1e9;
}

/* The time within which this part of all echoes came. */
static unsigned
percentile(double part)
{
    uint64_t wanted = (uint64_t)(part * (double)echoes), count = 0;
    for (unsigned us = 0; us < LONGEST_US; us++)
        if ((count += took[us]) > wanted)
            return us;
    return LONGEST_US;
}

static void
await_line(void)
{
    fflush(stdout);
    for (int c = 0; options.wait && c != EOF && c != '\n';)
        c = getchar();
}

static int
usage(void)
{
    fprintf(stderr,
            "usage: wsload [--connections N] [--seconds SECONDS] [--wait] PORT\n");
    return 2;
}

int
main(int argc, char **argv)
{
    static const struct option LONG[] = {{"connections", required_argument, NULL, 'c'},
                                         {"seconds", required_argument, NULL, 's'},
                                         {"wait", no_argument, NULL, 'w'},
                                         {0}};
    int option;
    while ((option = getopt_long(argc, argv, "", LONG, NULL)) >= 0) {
        switch (option) {
        case 'c':
            options.connections = (unsigned)strtoul(optarg, NULL, 10);
            break;
        case 's':
            options.seconds = strtod(optarg, NULL);
            break;
        case 'w':
            options.wait = true;
            break;
        default:
            return usage();
        }
    }
    if (argc - optind != 1 || options.connections < 1)
        return usage();
    options.port = (uint16_t)strtoul(argv[optind], NULL, 10);
    raise_limit();
    poller = epoll_create1(EPOLL_CLOEXEC);
    conns = calloc(options.connections, sizeof *conns);
    if (poller < 0 || !conns)
        die("wsload");
    for (unsigned i = 0; i < options.connections; i++)
        open_connection(&conns[i]);
    printf("%u connections\n", options.connections);
    await_line();
    double seconds = load();
    printf("%llu echoes in %.3f s, %.0f/s, p50 %u us, p99 %u us, %llu errors\n",
           (unsigned long long)echoes, seconds, (double)echoes / seconds,
           percentile(0.50), percentile(0.99), (unsigned long long)errors);
    await_line();
}
