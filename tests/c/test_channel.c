/* test_channel.c - the loan of a WebSocket, through a loop with real connections. */
#define _GNU_SOURCE
#undef NDEBUG
#include "live.h"

#include <stdio.h>

#define HANDSHAKE                                                                      \
    "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"   \
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
#define KEY "\0\0\0\0" /* masks nothing, so that frames can be read here */
#define HELLO "\x81\x85" KEY "Hello"
#define PING "\x89\x81" KEY "?"
#define CLOSE_1000 "\x88\x82" KEY "\x03\xe8"
#define SAY(fd, text) say_bytes(fd, text, sizeof text - 1)

static pf_request *
offered(int fd, const char *more)
{
    say(fd, HANDSHAKE);
    say(fd, more);
    say(fd, "\r\n");
    pf_request *r = next_request();
    assert(pf_channel_offered(r) == 1);
    return r;
}

static pf_request *
accepted(int fd)
{
    pf_request *r = offered(fd, "");
    assert(pf_channel_begin(r, NULL, 0) == 0 && pf_channel_open(r) == 0);
    const char *head = hear_head(fd);
    assert(says(head, "HTTP/1.1 101 Switching Protocols\r\n"));
    assert(says(head, "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
    assert(!says(head, "Content-") && !says(head, "Connection: close"));
    return r;
}

static void
expect_message(pf_request *r, int kind, const char *text)
{
    pf_message m;
    assert(pf_channel_receive(r, &m) == 1);
    assert(m.kind == kind && m.len == strlen(text) && memcmp(m.data, text, m.len) == 0);
}

static void
expect_code(pf_request *r, int code)
{
    pf_slice reason;
    assert(pf_channel_code(r, &reason) == code);
}

static void
expect_heard(int fd, const char *bytes, size_t len)
{
    assert(memcmp(hear_bytes(fd, len), bytes, len) == 0);
}

static void
check_handshake(void)
{
    open_server(0);
    int fd = connected_peer();
    pf_request *r = offered(fd, "Sec-WebSocket-Extensions: permessage-deflate\r\n");
    pf_message m;
    assert(pf_channel_receive(r, &m) == PF_ERR_STATE);
    assert(pf_channel_send(r, PF_MESSAGE_TEXT, "x", 1) == PF_ERR_STATE);
    assert(pf_channel_close(r, 1000, "", 0) == PF_ERR_STATE);
    assert(pf_channel_open(r) == PF_ERR_STATE);
    assert(pf_channel_begin(r, "not a token", 11) == PF_ERR_APP_SUBPROTOCOL);
    assert(pf_channel_begin(r, "chat", 4) == 0);
    assert(pf_channel_begin(r, "chat", 4) == PF_ERR_STATE);
    assert(pf_request_field(r, "X-A", 3, "1", 1) == 0);
    assert(pf_request_field(r, "Sec-WebSocket-Accept", 20, "1", 1)
           == PF_ERR_APP_HOP_BY_HOP);
    assert(pf_request_field(r, "Connection", 10, "close", 5) == PF_ERR_APP_HOP_BY_HOP);
    assert(pf_channel_open(r) == 0);
    const char *head = hear_head(fd);
    assert(says(head, "Sec-WebSocket-Protocol: chat\r\n") && says(head, "X-A: 1\r\n"));
    assert(says(head, "Sec-WebSocket-Extensions: permessage-deflate; "));
    assert(pf_request_abort(r) == 0);
    char byte;
    assert(hear_byte(fd, &byte) == -ECONNRESET);
    close(fd);
    close_server();
}

/* What is no handshake is answered like any other request; a wrong one is refused. */
static void
check_refusals(void)
{
    open_server(0);
    int fd = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_channel_offered(r) == 0);
    assert(pf_channel_begin(r, NULL, 0) == PF_ERR_STATE);
    answer(r, "plain");
    assert(says(hear_answer(fd), "HTTP/1.1 200 OK"));
    close(fd);
    fd = peer_saying("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\n"
                     "Upgrade: websocket\r\n\r\n");
    r = next_request();
    assert(pf_channel_offered(r) == PF_ERR_WEBSOCKET_VERSION);
    assert(pf_request_refuse(r, PF_ERR_WEBSOCKET_VERSION) == 0);
    const char *head = hear_answer(fd);
    assert(says(head, "HTTP/1.1 426 Upgrade Required\r\n"));
    assert(says(head, "Sec-WebSocket-Version: 13\r\n"));
    hear_end(fd);
    close(fd);
    close_server();
}

static void
check_messages(void)
{
    open_server(0);
    int fd = connected_peer();
    pf_request *r = accepted(fd);
    pf_message m;
    assert(pf_channel_receive(r, &m) == 0);
    SAY(fd, HELLO PING "\x82\x81" KEY "b");
    expect_event(PF_EVENT_MESSAGE, r);
    expect_message(r, PF_MESSAGE_TEXT, "Hello");
    expect_message(r, PF_MESSAGE_BINARY, "b");
    assert(pf_channel_receive(r, &m) == 0);
    assert(pf_channel_send(r, PF_MESSAGE_TEXT, "hi", 2) == 0);
    expect_heard(fd, "\x8a\1?\x81\2hi", 7);
    assert(stats().buffers_in_use == 0); /* it is idle */
    SAY(fd, "\x81\x85" KEY "He");        /* in parts */
    quiet(20);
    say(fd, "llo");
    expect_event(PF_EVENT_MESSAGE, r);
    expect_message(r, PF_MESSAGE_TEXT, "Hello");
    SAY(fd, CLOSE_1000);
    expect_event(PF_EVENT_CLOSED, r);
    expect_code(r, 1000);
    assert(pf_channel_send(r, PF_MESSAGE_TEXT, "hi", 2) == PF_ERR_CLOSED);
    assert(pf_channel_close(r, 1000, "", 0) == 0);
    expect_heard(fd, "\x88\2\x03\xe8", 4);
    hear_end(fd);
    close(fd);
    turn_until(nobody_is_connected);
    close_server();
}

/* Messages that came before the close, or the loss, can be received behind it. */
static void
check_closes(void)
{
    open_server(0);
    int fd = connected_peer();
    pf_request *r = accepted(fd);
    SAY(fd, HELLO CLOSE_1000);
    pf_event event = next_event();
    assert(event.flags == (PF_EVENT_MESSAGE | PF_EVENT_CLOSED) && event.request == r);
    quiet(20);
    expect_message(r, PF_MESSAGE_TEXT, "Hello");
    assert(pf_request_end(r) == PF_ERR_CLOSED); /* which ends it all the same */
    close(fd);
    fd = connected_peer();
    r = accepted(fd);
    SAY(fd, HELLO);
    expect_event(PF_EVENT_MESSAGE, r);
    reset_peer(fd);
    expect_event(PF_EVENT_CLOSED, r);
    assert(pf_channel_send(r, PF_MESSAGE_TEXT, "hi", 2) == PF_ERR_CLOSED);
    expect_message(r, PF_MESSAGE_TEXT, "Hello");
    expect_code(r, 1006);
    assert(pf_request_abort(r) == 0);
    close_server();
}

static void
check_our_close(void)
{
    open_server(0);
    int fd = connected_peer();
    pf_request *r = accepted(fd);
    assert(pf_channel_close(r, 1005, "", 0) == PF_ERR_APP_CLOSE);
    assert(pf_channel_close(r, 4000, "bye", 3) == 0); /* which ends the loan */
    expect_heard(fd,
                 "\x88\5\x0f\xa0"
                 "bye",
                 7);
    assert(stats().lent == 0 && stats().connections == 1);
    SAY(fd, HELLO PING CLOSE_1000); /* too late, but for the last */
    hear_end(fd);
    close(fd);
    close_server();
}

/* Messages wait in the socket when nobody receives them, and while our own wait. */
static void
check_pressure(void)
{
    static char large[100000];
    open_server(0);
    int fd = connected_peer();
    pf_request *r = accepted(fd);
    enum { SIZE = sizeof HELLO - 1 };
    for (int i = 0; i < 40; i++)
        memcpy(large + SIZE * i, HELLO, SIZE);
    say_bytes(fd, large, 40 * SIZE);
    expect_event(PF_EVENT_MESSAGE, r);
    quiet(20);
    for (int i = 0; i < PF__WEBSOCKET_QUEUE; i++)
        expect_message(r, PF_MESSAGE_TEXT, "Hello");
    expect_event(PF_EVENT_MESSAGE, r); /* of those that were not parsed */
    pf_message m;
    int rest = 0;
    for (; rest < 40 - PF__WEBSOCKET_QUEUE; rest++)
        while (pf_channel_receive(r, &m) == 0)
            expect_event(PF_EVENT_MESSAGE, r);
    assert(pf_channel_send_ref(r, PF_MESSAGE_BINARY, "small", 5, large) == 0);
    assert(pf_channel_send_ref(r, PF_MESSAGE_BINARY, large, sizeof large, large) == 1);
    assert(pf_request_pending(r) > sizeof large);
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_RELEASED && event.user == large);
    expect_heard(fd, "\x82\5small\x82\x7f\0\0\0\0\0\x01\x86\xa0", 17);
    hear_bytes(fd, 60000);
    hear_bytes(fd, 40000);
    assert(pf_channel_close(r, 1000, "", 0) == 0);
    close(fd);
    close_server();
}

static void
check_pings(void)
{
    options.ws_ping_interval_ms = 50;
    options.ws_ping_timeout_ms = 50;
    open_server(0);
    int fd = connected_peer();
    pf_request *r = accepted(fd);
    for (int i = 0; i < 3; i++) {
        expect_heard(fd, "\x89\0", 2);
        SAY(fd, "\x8a\x80" KEY);
    }
    expect_heard(fd, "\x89\0", 2);
    expect_event(PF_EVENT_CLOSED, r);
    expect_code(r, 1011);
    assert(pf_channel_close(r, 1000, "", 0) == 0);
    assert(hear_bytes(fd, 2)[0] == '\x88');
    assert(stats().timeouts == 1);
    close(fd);
    turn_until(nobody_is_connected);
    close_server();
}

static void
check_close_timeout(void)
{
    options.ws_close_timeout_ms = 50;
    open_server(0);
    int fd = connected_peer();
    assert(pf_channel_close(accepted(fd), 1000, "", 0) == 0);
    expect_heard(fd, "\x88\2\x03\xe8", 4);
    hear_end(fd);
    assert(stats().timeouts == 1);
    close(fd);
    close_server();
}

static void
check_drain(void)
{
    open_server(0);
    int fd = connected_peer();
    pf_request *r = accepted(fd);
    assert(pf_loop_drain(loop, false, -1) == 0);
    expect_event(PF_EVENT_CLOSED, r);
    expect_code(r, 1012);
    assert(pf_channel_close(r, 1000, "", 0) == 0);
    expect_heard(fd, "\x88\2\x03\xf4", 4);
    SAY(fd, "\x88\x82" KEY "\x03\xf4");
    assert(next_event().flags == PF_EVENT_DRAINED);
    close(fd);
    close_server();
}

/* One that is open when the loop is closed stays on loan until it is given back. */
static void
check_closed_loop(void)
{
    open_server(0);
    int fd = connected_peer();
    pf_request *r = accepted(fd);
    pf_loop_close(loop);
    assert(pf_channel_send(r, PF_MESSAGE_TEXT, "hi", 2) == PF_ERR_CLOSED);
    expect_code(r, 1006);
    assert(pf_channel_close(r, 1000, "", 0) == 0);
    close(fd);
    close_server();
}

static bool
some_has_come(void)
{
    return loop->conns->websocket->left < 0xffffff;
}

/* A peer that announces much and sends nothing does not hold much of ours. */
static void
check_announced(void)
{
    pf_options_init(&options);
    open_server(0);
    int fd = connected_peer();
    pf_request *r = accepted(fd);
    SAY(fd, "\x82\xff\0\0\0\0\0\xff\xff\xff" KEY);
    quiet(20);
    SAY(fd, "x");
    turn_until(some_has_come);
    assert(loop->conns->in.cap <= 16384);
    assert(pf_request_abort(r) == 0);
    close(fd);
    close_server();
}

int
main(void)
{
    pf_options_init(&options);
    check_handshake();
    check_refusals();
    check_messages();
    check_closes();
    check_our_close();
    check_pressure();
    check_pings();
    check_close_timeout();
    check_drain();
    check_closed_loop();
    check_announced();
    return 0;
}
