/* test_proxy.c - PROXY headers whole and in pieces, and what becomes of connections that
 * must begin with one.
 */
#define _GNU_SOURCE
#undef NDEBUG
#include "internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BOTH = PF_PROXY_V1 | PF_PROXY_V2, BAD = PF_ERR_PROXY, ROOM = 8192 };

#define SIGNATURE "\r\n\r\n\0\r\nQUIT\n"
#define V4 "\xc0\0\2\1\xc6\x33\x64\7\xdc\4\1\xbb" /* as the line of VERSION_1 */
#define V6 "\x20\1\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\1"
#define VERSION_1 "PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n"
#define HEADER(text) text, sizeof text - 1

/* ---- every delivery -----------------------------------------------------------------*/
static char *page_end; /* the byte behind it cannot be read */

static void
open_page(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE) * 4;
    char *map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert(map != MAP_FAILED && mprotect(map + page, page, PROT_NONE) == 0);
    page_end = map + page;
}

typedef struct outcome {
    int rc;
    pf_peer client, server;
} outcome;

static outcome
parse_at_page_end(const char *data, size_t len, unsigned versions)
{
    outcome o;
    char *copy = page_end - len;
    memcpy(copy, data, len);
    o.rc = pf__proxy_parse(copy, len, versions, &o.client, &o.server);
    return o;
}

static bool
same_peer(const pf_peer *a, const pf_peer *b)
{
    return a->family == b->family && a->port == b->port
           && memcmp(a->bytes, b->bytes, sizeof a->bytes) == 0;
}

/* Whole, byte by byte, and with the request behind it there is one answer. */
static outcome
parse(const char *data, size_t len, unsigned versions)
{
    static const char request[] = "GET / HTTP/1.1\r\n";
    char more[ROOM];
    outcome whole = parse_at_page_end(data, len, versions), step = {0};
    for (size_t have = 0; step.rc == 0 && have <= len; have++)
        step = parse_at_page_end(data, have, versions);
    assert(step.rc == whole.rc);
    assert(whole.rc <= 0 || same_peer(&step.client, &whole.client));
    if (whole.rc == 0)
        return whole;
    memcpy(more, data, len);
    memcpy(more + len, request, sizeof request - 1);
    step = parse_at_page_end(more, len + sizeof request - 1, versions);
    assert(step.rc == whole.rc);
    assert(whole.rc < 0 || same_peer(&step.server, &whole.server));
    return whole;
}

static const char *
show(const pf_peer *peer)
{
    static char text[2][80];
    static int turn;
    char host[INET6_ADDRSTRLEN], *out = text[turn++ % 2];
    if (peer->family != AF_INET && peer->family != AF_INET6)
        return peer->family == AF_UNIX ? "unix" : "";
    inet_ntop(peer->family, peer->bytes, host, sizeof host);
    snprintf(out, sizeof text[0], "%s %d", host, peer->port);
    return out;
}

typedef struct row {
    const char *data;
    size_t len;
    const char *client, *server; /* NULL: it is refused; "": it names nobody */
} row;

static void
check_rows(const row *rows, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        outcome o = parse(rows[i].data, rows[i].len, BOTH);
        bool refused = rows[i].client == NULL;
        if (o.rc != (refused ? BAD : (int)rows[i].len))
            printf("row %zu: %d\n", i, o.rc);
        assert(o.rc == (refused ? BAD : (int)rows[i].len));
        assert(refused || strcmp(show(&o.client), rows[i].client) == 0);
        assert(refused || strcmp(show(&o.server), rows[i].server) == 0);
    }
}

/* ---- version 1 ----------------------------------------------------------------------*/
static void
a_line_names_both_ends(void)
{
    static const row rows[] = {
        {HEADER(VERSION_1), "192.0.2.1 56324", "198.51.100.7 443"},
        {HEADER("PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n"), "0.0.0.0 0",
         "255.255.255.255 65535"},
        {HEADER("PROXY TCP6 2001:db8::1 ::1 1 2\r\n"), "2001:db8::1 1", "::1 2"},
        {HEADER("PROXY TCP6 2001:DB8:0:0:0:0:0:1 ::ffff:192.0.2.1 1 2\r\n"),
         "2001:db8::1 1", "::ffff:192.0.2.1 2"},
        {HEADER("PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff "
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n"),
         "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535",
         "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535"},
    };
    check_rows(rows, sizeof rows / sizeof *rows);
}

static void
what_stands_behind_unknown_is_ignored(void)
{
    static const row rows[] = {
        {HEADER("PROXY UNKNOWN\r\n"), "", ""},
        {HEADER("PROXY UNKNOWN \r\n"), "", ""},
        {HEADER("PROXY UNKNOWN some words of no meaning\r\n"), "", ""},
        {HEADER("PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff "
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n"),
         "", ""},
    };
    check_rows(rows, sizeof rows / sizeof *rows);
    assert(rows[3].len == PF__PROXY_V1_MAX);
}

static void
a_line_has_one_spelling(void)
{
    static const char *const wrong[] = {
        "PROXY\r\n",
        "PROXY \r\n",
        "PROXY TCP4\r\n",
        "PROXY TCP4 \r\n",
        "proxy TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY tcp4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY  TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY\tTCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 \r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 \r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
        "PROXY TCP4 1.2.3.4 1 2\r\n",
        "PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
        "PROXY TCP4 1.2.3.4.5 5.6.7.8 1 2\r\n",
        "PROXY TCP4 1.2.3.256 5.6.7.8 1 2\r\n",
        "PROXY TCP4 1.2.3.04 5.6.7.8 1 2\r\n",
        "PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.0x8 1 2\r\n",
        "PROXY TCP4 16909060 5.6.7.8 1 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 00\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 65536 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 99999999999999999999\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 -1 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2a\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1, 2\r\n",
        "PROXY TCP4 ::1 ::1 1 2\r\n",
        "PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP6 ::1 1.2.3.4 1 2\r\n",
        "PROXY TCP6 [::1] [::1] 1 2\r\n",
        "PROXY TCP6 fe80::1%lo ::1 1 2\r\n",
        "PROXY TCP6 1::2::3 ::1 1 2\r\n",
        "PROXY TCP5 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY UNKNOWNS\r\n",
        "PROXY UNKNOWN \x7f\r\n",
        "PROXY UNKNOWN \xff\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\rx",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST / HTTP/1.1\r\n",
        "\r\nPROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        " PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff "
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 655350\r\n",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        row one = {wrong[i], strlen(wrong[i]), NULL, NULL};
        check_rows(&one, 1);
    }
    row nul = {HEADER("PROXY UNKNOWN \0\r\n"), NULL, NULL};
    check_rows(&nul, 1);
}

static void
a_line_without_end_is_refused_at_its_limit(void)
{
    char text[PF__PROXY_V1_MAX];
    memset(text, 'a', sizeof text);
    memcpy(text, "PROXY UNKNOWN ", 14);
    assert(parse(text, PF__PROXY_V1_MAX - 2, BOTH).rc == 0);
    assert(parse(text, PF__PROXY_V1_MAX - 1, BOTH).rc == BAD);
    text[PF__PROXY_V1_MAX - 2] = '\r';
    assert(parse(text, PF__PROXY_V1_MAX - 1, BOTH).rc == 0);
    text[PF__PROXY_V1_MAX - 1] = '\n';
    assert(parse(text, PF__PROXY_V1_MAX, BOTH).rc == PF__PROXY_V1_MAX);
}

/* ---- version 2 ----------------------------------------------------------------------*/
static void
a_binary_header_names_both_ends(void)
{
    static const row rows[] = {
        {HEADER(SIGNATURE "\x21\x11\0\x0c" V4), "192.0.2.1 56324", "198.51.100.7 443"},
        {HEADER(SIGNATURE "\x21\x21\0\x24" V6 V6 "\0\1\xff\xff"), "2001:db8::1 1",
         "2001:db8::1 65535"},
        {HEADER(SIGNATURE "\x21\x11\0\x0f" V4 "\4\0\0"), "192.0.2.1 56324",
         "198.51.100.7 443"},
        {HEADER(SIGNATURE "\x21\x11\0\x16" V4 "\5\0\1x\xea\0\3abc"), "192.0.2.1 56324",
         "198.51.100.7 443"},
    };
    check_rows(rows, sizeof rows / sizeof *rows);
}

static void
a_unix_client_has_no_address(void)
{
    char text[16 + 216] = SIGNATURE "\x21\x31\0\xd8/there";
    row one = {text, sizeof text, "unix", "unix"};
    check_rows(&one, 1);
    text[15]--;
    row shorter = {text, sizeof text - 1, NULL, NULL};
    check_rows(&shorter, 1);
}

static void
a_header_of_the_proxy_itself_names_nobody(void)
{
    static const row rows[] = {
        {HEADER(SIGNATURE "\x20\0\0\0"), "", ""},
        {HEADER(SIGNATURE "\x20\x11\0\x0c" V4), "", ""},
        {HEADER(SIGNATURE "\x20\xff\0\3abc"), "", ""},
        {HEADER(SIGNATURE "\x21\0\0\0"), "", ""},
        {HEADER(SIGNATURE "\x21\0\0\3abc"), "", ""},
    };
    check_rows(rows, sizeof rows / sizeof *rows);
}

static void
a_binary_header_fits_its_length(void)
{
    static const row rows[] = {
        {HEADER("\r\n\r\n\0\r\nQUIT\r\x21\x11\0\x0c" V4), NULL, NULL},
        {HEADER("\r\n\r\nGET"), NULL, NULL},
        {HEADER(SIGNATURE "\x11\x11\0\x0c" V4), NULL, NULL}, /* version 1 */
        {HEADER(SIGNATURE "\x31\x11\0\x0c" V4), NULL, NULL}, /* version 3 */
        {HEADER(SIGNATURE "\x22\x11\0\x0c" V4), NULL, NULL}, /* no such command */
        {HEADER(SIGNATURE "\x21\x12\0\x0c" V4), NULL, NULL}, /* datagrams */
        {HEADER(SIGNATURE "\x21\x10\0\x0c" V4), NULL, NULL}, /* no transport */
        {HEADER(SIGNATURE "\x21\x01\0\x0c" V4), NULL, NULL}, /* no family */
        {HEADER(SIGNATURE "\x21\x41\0\x0c" V4), NULL, NULL}, /* no such family */
        {HEADER(SIGNATURE "\x21\x13\0\x0c" V4), NULL, NULL}, /* no such transport */
        {HEADER(SIGNATURE "\x21\x11\0\x0b" V4), NULL, NULL}, /* less than addresses */
        {HEADER(SIGNATURE "\x21\x11\0\0"), NULL, NULL},
        {HEADER(SIGNATURE "\x21\x21\0\x0c" V4), NULL, NULL},
        {HEADER(SIGNATURE "\x21\x11\0\x0d" V4 "\4"), NULL, NULL}, /* half a record */
        {HEADER(SIGNATURE "\x21\x11\0\x0e" V4 "\4\0"), NULL, NULL},
        {HEADER(SIGNATURE "\x21\x11\0\x0f" V4 "\4\0\1"), NULL, NULL},
        {HEADER(SIGNATURE "\x21\x11\0\x10" V4 "\4\0\2x"), NULL, NULL},
        {HEADER(SIGNATURE "\x21\x11\0\x10" V4 "\4\xff\xffx"), NULL, NULL},
        {HEADER(SIGNATURE "\x21\x11\0\x11" V4 "\4\0\0\4\0"), NULL, NULL},
    };
    check_rows(rows, sizeof rows / sizeof *rows);
}

static void
a_length_beyond_the_limit_is_refused_before_it_arrives(void)
{
    static char text[16 + PF__PROXY_V2_MAX] = SIGNATURE "\x20";
    text[14] = PF__PROXY_V2_MAX >> 8;
    assert(parse(text, 16, BOTH).rc == 0);
    assert(parse(text, sizeof text, BOTH).rc == (int)sizeof text);
    text[15] = 1;
    assert(parse(text, 16, BOTH).rc == BAD);
}

static void
a_checksum_must_be_right_where_there_is_one(void)
{
    static const char right[] =
        SIGNATURE "\x21\x11\0\x17" V4 "\3\0\4\xc5\x88\xf1\x1f\4\0\1x";
    static char text[sizeof right - 1];
    memcpy(text, right, sizeof text);
    assert(parse(text, sizeof text, BOTH).rc == (int)sizeof text);
    for (size_t i = 16; i < sizeof text; i++) {
        text[i] ^= 0x40;
        outcome o = parse_at_page_end(text, sizeof text, BOTH);
        bool type = i == 28; /* then it is no checksum */
        assert(o.rc == (type ? (int)sizeof text : BAD));
        text[i] ^= 0x40;
    }
    static const row wrong_size = {HEADER(SIGNATURE "\x21\x11\0\x12" V4 "\3\0\3abc"),
                                   NULL, NULL};
    check_rows(&wrong_size, 1);
}

static void
only_the_versions_that_are_asked_for_are_taken(void)
{
    static const char second[] = SIGNATURE "\x20\0\0\0";
    assert(parse(HEADER(VERSION_1), PF_PROXY_V1).rc > 0);
    assert(parse(HEADER(VERSION_1), PF_PROXY_V2).rc == BAD);
    assert(parse(HEADER(second), PF_PROXY_V2).rc > 0);
    assert(parse(HEADER(second), PF_PROXY_V1).rc == BAD);
    assert(parse("P", 1, PF_PROXY_V2).rc == BAD);
    assert(parse("\r", 1, PF_PROXY_V1).rc == BAD);
    assert(parse("", 0, BOTH).rc == 0);
}

/* ---- connections --------------------------------------------------------------------*/
#define REQUEST "GET / HTTP/1.1\r\nHost: a\r\n\r\n"

static const pf_network near = {{10}, AF_INET, 8};
static const pf_peer proxy = {{10, 1, 1, 1}, 999, AF_INET, 0};
static const pf_peer stranger = {{192, 0, 2, 9}, 999, AF_INET, 0};

static pf_options options;
static pf_loop *loop;
static pf_event event;

static void
open_loop(unsigned versions)
{
    options.proxy_protocol = versions;
    options.proxy_trust = &near;
    options.proxy_trusted = 1;
    options.flags |= PF_OPTION_NOTICES;
    assert(pf_loop_open(&loop, &options) == 0);
    pf_options_init(&options);
}

static void
close_loop(void)
{
    pf_loop_close(loop);
    assert(loop->row->stats.connections == 0 && loop->pool.in_use == 0);
    assert(loop->peers.used == 0);
    assert(pf_loop_free(loop) == 0);
}

/* A connection from this peer; returns the peer's end. */
static int
accept_from(const pf_peer *peer)
{
    int ends[2];
    pf__origin origin = {.peer = *peer};
    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends)
           == 0);
    assert(pf__conn_open(loop, ends[1], &origin, 0) == 0);
    return ends[0];
}

static void
say_bytes(int fd, const char *data, size_t len)
{
    assert(send(fd, data, len, MSG_NOSIGNAL) == (ssize_t)len);
}

static void
say(int fd, const char *text)
{
    say_bytes(fd, text, strlen(text));
}

/* What happens at once; a Unix socket delivers without delay. */
static int
turn(void)
{
    return pf_loop_wait(loop, &event, 1, 0);
}

static pf_request *
next_request(void)
{
    assert(turn() == 1 && (event.flags & PF_EVENT_REQUEST));
    return event.request;
}

static void
queue_answer(pf_request *r)
{
    assert(pf_request_answer(r, 200, NULL, 0, "hi", 2, NULL) >= 0);
}

static void
answer(pf_request *r)
{
    queue_answer(r);
    turn();
}

static void
check_ends(const pf_request *r, const char *client, const char *server)
{
    pf_peer peer, local;
    pf_request_get_peer(r, &peer);
    assert(pf_request_get_local(r, &local) == 0);
    assert(strcmp(show(&peer), client) == 0 && strcmp(show(&local), server) == 0);
}

/* How the answer begins; "" for a close without one, NULL while neither is there. */
static const char *
hear(int fd)
{
    static char text[4096];
    ssize_t n = recv(fd, text, sizeof text - 1, 0);
    if (n < 0)
        return errno == ECONNRESET ? "" : NULL;
    text[n] = '\0';
    return text;
}

static bool
is_answered(int fd, const char *status)
{
    const char *text = hear(fd);
    return text != NULL && strncmp(text, "HTTP/1.1 ", 9) == 0
           && strncmp(text + 9, status, 3) == 0;
}

static bool
is_closed(int fd)
{
    const char *text = hear(fd);
    return text != NULL && text[0] == '\0';
}

static int
last_error(void)
{
    pf_notice list[16];
    int code = 0, n = pf_loop_notices(loop, list, 16);
    for (int i = 0; i < n; i++)
        if (list[i].kind == PF_NOTICE_ERROR)
            code = list[i].code;
    return code;
}

static void
a_listed_peer_speaks_for_its_client_however_it_is_delivered(void)
{
    static const char text[] = VERSION_1 REQUEST;
    size_t len = sizeof text - 1;
    open_loop(BOTH);
    for (size_t step = 1; step <= len; step = step == 1 ? 46 : step + 13) {
        int fd = accept_from(&proxy);
        for (size_t at = 0; at < len; at += step) {
            say_bytes(fd, text + at, at + step < len ? step : len - at);
            if (at + step < len)
                assert(turn() == 0 && hear(fd) == NULL);
        }
        pf_request *r = next_request();
        check_ends(r, "192.0.2.1 56324", "198.51.100.7 443");
        answer(r);
        assert(is_answered(fd, "200"));
        say(fd, REQUEST); /* it has introduced itself: once is enough */
        r = next_request();
        check_ends(r, "192.0.2.1 56324", "198.51.100.7 443");
        answer(r);
        close(fd);
    }
    close_loop();
}

static void
a_second_header_is_no_request(void)
{
    open_loop(BOTH);
    int fd = accept_from(&proxy);
    say(fd, VERSION_1 VERSION_1 REQUEST);
    assert(turn() == 0 && is_answered(fd, "400"));
    close(fd);
    close_loop();
}

static void
a_proxy_that_speaks_for_itself_keeps_its_address(void)
{
    open_loop(BOTH);
    int fd = accept_from(&proxy);
    say_bytes(fd, HEADER(SIGNATURE "\x20\0\0\0"));
    say(fd, REQUEST);
    pf_request *r = next_request();
    check_ends(r, "10.1.1.1 999", "unix");
    answer(r);
    close(fd);
    close_loop();
}

static void
a_listed_peer_without_a_header_is_closed_without_an_answer(void)
{
    static const char *const said[] = {REQUEST, "PROXY TCP9\r\n", "\r\n\r\n\r\n"};
    open_loop(BOTH);
    for (size_t i = 0; i < sizeof said / sizeof *said; i++) {
        int fd = accept_from(&proxy);
        say(fd, said[i]);
        assert(turn() == 0 && is_closed(fd));
        assert(last_error() == PF_ERR_PROXY);
        close(fd);
    }
    assert(loop->row->stats.refused == 3 && loop->row->stats.requests == 0);
    close_loop();
}

static void
a_header_that_breaks_off_is_told_and_a_look_without_a_byte_is_not(void)
{
    open_loop(BOTH);
    int fd = accept_from(&proxy);
    close(fd);
    assert(turn() == 0 && last_error() == 0);
    fd = accept_from(&proxy);
    say(fd, "PROXY TCP4 1.2.3.4 ");
    assert(turn() == 0 && last_error() == 0);
    close(fd);
    assert(turn() == 0 && last_error() == PF_ERR_PROXY);
    close_loop();
}

static void
a_header_that_does_not_come_in_time_closes(void)
{
    options.header_timeout_ms = 1;
    open_loop(BOTH);
    int fds[2] = {accept_from(&proxy), accept_from(&proxy)};
    say(fds[1], "PROXY ");
    while (loop->row->stats.connections > 0)
        pf_loop_wait(loop, &event, 1, 1000);
    for (int i = 0; i < 2; i++) {
        assert(is_closed(fds[i]));
        close(fds[i]);
    }
    assert(loop->row->stats.timeouts == 2);
    close_loop();
}

static void
who_is_not_listed_is_not_believed(void)
{
    open_loop(BOTH);
    int fd = accept_from(&stranger);
    say(fd, VERSION_1 REQUEST);
    assert(turn() == 0 && is_answered(fd, "400"));
    close(fd);
    fd = accept_from(&stranger);
    say(fd, REQUEST);
    pf_request *r = next_request();
    check_ends(r, "192.0.2.9 999", "unix");
    answer(r);
    close(fd);
    close_loop();
}

static void
without_the_option_nobody_is_asked(void)
{
    open_loop(0);
    int fd = accept_from(&proxy);
    say(fd, REQUEST);
    answer(next_request());
    assert(is_answered(fd, "200"));
    close(fd);
    close_loop();
}

static void
connections_are_counted_for_the_client_and_not_for_its_proxy(void)
{
    int fds[4];
    options.max_connections_per_ip = 2;
    open_loop(BOTH);
    for (int i = 0; i < 4; i++)
        fds[i] = accept_from(&proxy); /* nobody's yet */
    for (int i = 0; i < 3; i++) {
        say(fds[i], VERSION_1);
        assert(turn() == 0);
    }
    assert(hear(fds[0]) == NULL && hear(fds[1]) == NULL);
    assert(is_answered(fds[2], "429"));
    say(fds[3], "PROXY TCP4 192.0.2.2 198.51.100.7 1 443\r\n" REQUEST);
    answer(next_request());
    assert(is_answered(fds[3], "200"));
    for (int i = 0; i < 4; i++)
        close(fds[i]);
    turn();
    close_loop();
}

static void
a_proxied_connection_that_waits_holds_no_buffer(void)
{
    open_loop(BOTH);
    int fd = accept_from(&proxy);
    say(fd, VERSION_1);
    assert(turn() == 0 && loop->pool.in_use == 0 && pf__conn_is_quiet(loop->conns));
    close(fd);
    turn();
    close_loop();
}

static void
a_drain_closes_a_connection_that_has_not_introduced_itself(void)
{
    options.drain_idle_ms = 1;
    open_loop(BOTH);
    int fd = accept_from(&proxy);
    assert(turn() == 0);
    pf_loop_drain(loop, true, -1);
    do
        assert(pf_loop_wait(loop, &event, 1, 1000) == 1);
    while (!(event.flags & PF_EVENT_DRAINED));
    assert(is_closed(fd));
    close(fd);
    close_loop();
}

/* ---- passing on ---------------------------------------------------------------------*/
enum { MANY = 20 };

static pf_scoreboard *board;

static pf_loop *
open_member(void)
{
    open_loop(BOTH);
    assert(pf_loop_attach(loop, board, pf_scoreboard_claim(board, 0, 0)) == 0);
    turn(); /* its heartbeat says that it is there */
    return loop;
}

static pf_loop *own, *other;

/* The second one has the turn, and passes nobody on before it is told to. */
static void
open_pair(void)
{
    assert(pf_scoreboard_open(&board, 4) == 0);
    other = open_member();
    own = open_member();
    own->balance_at = INT64_MAX;
}

static void
close_pair(void)
{
    loop = own;
    close_loop();
    loop = other;
    close_loop();
    pf_scoreboard_close(board);
}

/* Many that are never quiet are looked at every millisecond, but not for ever. */
static void
who_finds_nobody_to_pass_on_looks_less_often(void)
{
    int fds[MANY];
    pf_request *held[MANY];
    open_pair();
    for (int i = 0; i < MANY; i++) {
        fds[i] = accept_from(&proxy);
        say(fds[i], VERSION_1);
        say(fds[i], REQUEST);
        held[i] = next_request();
    }
    int soon = 0;
    for (int i = 0; i < 200; i++) {
        loop = other;
        assert(turn() == 0); /* it is there */
        loop = own;
        own->balance_at = 0;
        assert(turn() == 0);
        soon += own->balance_at <= own->now + 1;
    }
    assert(soon > 50 && soon < 100 && own->row->stats.passed_on == 0);
    queue_answer(held[0]);
    own->balance_at = 0;
    assert(turn() == 0);
    assert(own->row->stats.passed_on == 1 && own->balance_at <= own->now + 1);
    for (int i = 1; i < MANY; i++)
        queue_answer(held[i]);
    close_pair();
    for (int i = 0; i < MANY; i++)
        close(fds[i]);
}

/* Introduced connections are not asked again where they go, others are. */
static void
what_is_passed_on_takes_its_introduction_along(void)
{
    int fds[MANY];
    open_pair();
    for (int i = 0; i < MANY; i++) {
        fds[i] = accept_from(&proxy);
        if (i % 2)
            say(fds[i], VERSION_1);
        assert(turn() == 0);
    }
    loop = other;
    assert(turn() == 0);
    loop = own;
    own->balance_at = 0;
    assert(turn() == 0);
    assert(own->row->stats.passed_on == MANY / 2);
    loop = other;
    assert(turn() == 0 && other->row->stats.connections == MANY / 2);
    for (int i = 0; i < MANY; i++) {
        if (i % 2 == 0)
            say(fds[i], VERSION_1);
        say(fds[i], REQUEST);
    }
    for (int i = 0; i < MANY; i++) {
        loop = i < MANY / 2 ? own : other;
        pf_request *r = next_request();
        check_ends(r, "192.0.2.1 56324", "198.51.100.7 443");
        queue_answer(r);
        pf_loop_flush(loop);
    }
    for (int i = 0; i < MANY; i++) {
        assert(is_answered(fds[i], "200"));
        close(fds[i]);
    }
    close_pair();
}

/* ---- forwarded fields ---------------------------------------------------------------*/
#define FORWARDED                                                                      \
    "GET / HTTP/1.1\r\nX-Forwarded-For: 1.1.1.1\r\nA: b\r\nFORWARDED: for=1.1.1.1\r\n" \
    "x-forwarded-proto: https\r\nHost: a\r\nX-Forwarded-Host: c\r\n\r\n"

static void
forwarded_fields_are_lent_from_listed_peers_only(void)
{
    options.forwarded_trust = &near;
    options.forwarded_trusted = 1;
    open_loop(0);
    int fd = accept_from(&proxy);
    say(fd, FORWARDED);
    pf_request *r = next_request();
    assert(r->head.nfields == 6 && (r->head.flags & PF_HEAD_FORWARDED));
    answer(r);
    close(fd);
    fd = accept_from(&stranger);
    say(fd, FORWARDED);
    r = next_request();
    assert(r->head.nfields == 2 && !(r->head.flags & PF_HEAD_FORWARDED));
    assert(r->head.fields[1].id == PF_FIELD_HOST && r->head.host == 1);
    answer(r);
    close(fd);
    close_loop();
}

/* What a client says of itself is not its proxy's word. */
static void
behind_a_proxy_the_client_is_asked_for_in_the_list(void)
{
    options.forwarded_trust = &near;
    options.forwarded_trusted = 1;
    open_loop(BOTH);
    int fd = accept_from(&proxy);
    say(fd, VERSION_1 FORWARDED);
    pf_request *r = next_request();
    assert(r->head.nfields == 2 && !(r->head.flags & PF_HEAD_FORWARDED));
    answer(r);
    close(fd);
    close_loop();
}

static void
a_refused_request_shows_no_forwarded_field_either(void)
{
    options.flags |= PF_OPTION_LEND_REFUSED;
    open_loop(0);
    int fd = accept_from(&stranger);
    say(fd, "GET / HTTP/1.1\r\nX-Forwarded-For: 1.1.1.1\r\n\r\n");
    pf_request *r = next_request();
    assert(event.code == PF_ERR_HOST && r->head.nfields == 0);
    answer(r);
    close(fd);
    close_loop();
}

static void
a_malformed_list_is_refused(void)
{
    static const pf_network wrong[] = {
        {{0}, AF_INET, 33}, {{0}, AF_INET6, 129}, {{0}, AF_UNIX, 1}, {{0}, 99, 0}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        options.proxy_trust = &wrong[i];
        options.proxy_trusted = 1;
        assert(pf_loop_open(&loop, &options) == -EINVAL);
        pf_options_init(&options);
    }
}

int
main(void)
{
    open_page();
    a_line_names_both_ends();
    what_stands_behind_unknown_is_ignored();
    a_line_has_one_spelling();
    a_line_without_end_is_refused_at_its_limit();

    a_binary_header_names_both_ends();
    a_unix_client_has_no_address();
    a_header_of_the_proxy_itself_names_nobody();
    a_binary_header_fits_its_length();
    a_length_beyond_the_limit_is_refused_before_it_arrives();
    a_checksum_must_be_right_where_there_is_one();
    only_the_versions_that_are_asked_for_are_taken();

    pf_options_init(&options);
    a_listed_peer_speaks_for_its_client_however_it_is_delivered();
    a_second_header_is_no_request();
    a_proxy_that_speaks_for_itself_keeps_its_address();
    a_listed_peer_without_a_header_is_closed_without_an_answer();
    a_header_that_breaks_off_is_told_and_a_look_without_a_byte_is_not();
    a_header_that_does_not_come_in_time_closes();
    who_is_not_listed_is_not_believed();
    without_the_option_nobody_is_asked();
    connections_are_counted_for_the_client_and_not_for_its_proxy();
    a_proxied_connection_that_waits_holds_no_buffer();
    a_drain_closes_a_connection_that_has_not_introduced_itself();
    who_finds_nobody_to_pass_on_looks_less_often();
    what_is_passed_on_takes_its_introduction_along();

    forwarded_fields_are_lent_from_listed_peers_only();
    behind_a_proxy_the_client_is_asked_for_in_the_list();
    a_refused_request_shows_no_forwarded_field_either();
    a_malformed_list_is_refused();
    return 0;
}
