/* test_loop.c - a loop with real connections: what a peer sends, what it gets, and what
 * the holder of a loan is told.
 */
#define _GNU_SOURCE
#undef NDEBUG
#include "live.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* LARGE is more than the kernel takes, whose buffers grow to 4 MiB and more. */
enum { SHORT_MS = 100, LARGE = 16 << 20 };

static char large[3][LARGE];

/* ---- requests and answers -----------------------------------------------------------*/
static void
a_request_becomes_an_event_and_its_answer_reaches_the_peer(void)
{
    open_server(0);
    int peer = peer_saying("GET /hello HTTP/1.1\r\nHost: a\r\n\r\n");
    pf_request *r = next_request();
    assert(target_is(r, "/hello") && pf_request_body_done(r) && body_is(r, ""));
    answer(r, "world");
    const char *head = hear_head(peer);
    assert(strncmp(head, "HTTP/1.1 200 OK\r\n", 17) == 0);
    assert(says(head, "\r\nContent-Length: 5\r\n") && !says(head, "Connection:"));
    assert(strcmp(hear_bytes(peer, 5), "world") == 0);
    close(peer);
    close_server();
}

static void
an_idle_connection_holds_no_buffer(void)
{
    open_server(0);
    int peer = connected_peer();
    for (int i = 0; i < 3; i++) {
        quiet(0);
        assert(stats().buffers_in_use == 0);
        say(peer, POST_5 "hello");
        answer(next_request(), "x");
        hear_answer(peer);
    }
    assert(stats().connections == 1 && stats().buffers_in_use == 0);
    close(peer);
    close_server();
}

static void
many_idle_connections_hold_no_buffer(void)
{
    enum { MANY = 50 };
    int peers[MANY];
    open_server(0);
    for (int i = 0; i < MANY; i++)
        peers[i] = peer_saying(GET);
    for (int i = 0; i < MANY; i++)
        answer(next_request(), "x");
    for (int i = 0; i < MANY; i++)
        hear_answer(peers[i]);
    assert(stats().connections == MANY && stats().buffers_in_use == 0);
    for (int i = 0; i < MANY; i++)
        close(peers[i]);
    turn_until(nobody_is_connected);
    close_server();
}

static void
an_answer_in_pieces_is_framed_by_its_length(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 10);
    assert(pf_request_field(r, "X", 1, "y", 1) == 0 && !pf_request_begun(r));
    assert(pf_request_write(r, "hello", 5) == 0 && pf_request_begun(r));
    assert(pf_request_field(r, "X", 1, "y", 1) == PF_ERR_STATE);
    assert(pf_request_write(r, "world!", 6) == PF_ERR_APP_BODY_LONG);
    assert(pf_request_write(r, "world", 5) == 0);
    assert(pf_request_end(r) == 0);
    assert(says(hear_head(peer), "\r\nX: y\r\n"));
    assert(strcmp(hear_bytes(peer, 10), "helloworld") == 0);
    close(peer);
    close_server();
}

/* Of what length a begun answer is, its fields may have said; or its body does. */
static void
a_whole_body_ends_an_answer_that_was_begun(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_request_whole(r, "hello", 5, NULL) == PF_ERR_STATE);
    begin(r, -1);
    assert(pf_request_whole(r, "hello", 5, NULL) == 0);
    assert(says(hear_head(peer), "\r\nContent-Length: 5\r\n"));
    assert(strcmp(hear_bytes(peer, 5), "hello") == 0);
    say(peer, GET);
    r = next_request();
    begin(r, 4);
    assert(pf_request_whole(r, "hello", 5, NULL) == PF_ERR_APP_BODY_LONG);
    assert(pf_request_reset(r) == 0);
    begin(r, -1);
    assert(pf_request_field(r, "Content-Length", 14, "6", 1) == 0);
    assert(pf_request_whole(r, "hello", 5, NULL) == PF_ERR_APP_BODY_SHORT);
    assert(pf_request_reset(r) == 0);
    begin(r, 5);
    assert(pf_request_whole(r, "hello", 5, NULL) == 0);
    hear_answer(peer);
    say(peer, GET);
    r = next_request();
    assert(pf_request_begin(r, 304, -1) == 0);
    assert(pf_request_field(r, "Content-Length", 14, "9", 1) == 0);
    assert(pf_request_whole(r, "", 0, NULL) == 0);
    assert(says(hear_head(peer), "\r\nContent-Length: 9\r\n"));
    close(peer);
    turn_until(nobody_is_connected);
    close_server();
}

static void
an_answer_of_unknown_length_is_chunked(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_write(r, "hello", 5) == 0);
    assert(pf_request_write(r, "", 0) == 0); /* which would end the body */
    assert(pf_request_write(r, "0123456789abcdef", 16) == 0);
    assert(pf_request_end(r) == 0);
    assert(says(hear_head(peer), "\r\nTransfer-Encoding: chunked\r\n"));
    const char *expected = "5\r\nhello\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n";
    assert(strcmp(hear_bytes(peer, strlen(expected)), expected) == 0);
    close(peer);
    close_server();
}

static void
an_answer_of_unknown_length_to_http_1_0_ends_with_its_connection(void)
{
    open_server(0);
    int peer = peer_saying("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_write(r, "hello", 5) == 0 && pf_request_end(r) == 0);
    const char *head = hear_head(peer);
    assert(says(head, "\r\nConnection: close\r\n") && !says(head, "chunked"));
    assert(strcmp(hear_bytes(peer, 5), "hello") == 0);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
an_answer_to_head_has_no_body_and_claims_no_empty_one(void)
{
    open_server(0);
    int peer = peer_saying("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    answer(next_request(), "hello");
    assert(says(hear_head(peer), "\r\nContent-Length: 5\r\n"));
    say(peer, "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_write(r, "hello", 5) == 0 && pf_request_end(r) == 0);
    assert(!says(hear_head(peer), "Content-Length"));
    say(peer, "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    r = next_request();
    begin(r, -1); /* of a GET's body nothing is known */
    assert(pf_request_end(r) == 0);
    assert(!says(hear_head(peer), "Content-Length"));
    say(peer, GET);
    answer(next_request(), "x");
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
an_answer_can_be_begun_anew_until_it_is_sent(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 5);
    assert(pf_request_field(r, "Wrong", 5, "x", 1) == 0);
    assert(pf_request_reset(r) == 0);
    assert(pf_loop_flush(loop) == 0 && hears_nothing(peer));
    assert(pf_request_begin(r, 500, 0) == 0 && pf_request_write(r, "", 0) == 0);
    assert(pf_request_reset(r) == PF_ERR_STATE);
    assert(pf_request_end(r) == 0);
    const char *head = hear_answer(peer);
    assert(strncmp(head, "HTTP/1.1 500 ", 13) == 0 && !says(head, "Wrong"));
    close(peer);
    close_server();
}

static void
an_unfinished_head_is_not_sent(void)
{
    open_server(0);
    int peer = peer_saying(GET GET);
    answer(next_request(), "x");
    pf_request *r = next_request();
    begin(r, 0);
    assert(pf_loop_flush(loop) == 0);
    hear_answer(peer);
    quiet(0);
    assert(hears_nothing(peer));
    assert(pf_request_end(r) == 0);
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_body_shorter_than_its_length_closes_the_connection(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 10);
    assert(pf_request_write(r, "hello", 5) == 0);
    assert(pf_request_end(r) == PF_ERR_APP_BODY_SHORT);
    hear_head(peer);
    hear_bytes(peer, 5);
    hear_end(peer);
    close(peer);
    close_server();
}

static int
trailer(pf_request *r, const char *name, const char *value)
{
    return pf_request_trailer(r, name, strlen(name), value, strlen(value));
}

static void
trailers_come_behind_the_body_to_who_takes_them(void)
{
    static const char taking[] = "GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\n\r\n";
    open_server(0);
    int peer = peer_saying(taking);
    pf_request *r = next_request();
    assert(pf_request_trailers(r) == PF_ERR_STATE);
    begin(r, 5);
    assert(pf_request_trailers(r) == 1);
    assert(trailer(r, "Content-Length", "5") == PF_ERR_APP_TRAILER);
    assert(pf_request_write(r, "hello", 5) == 0);
    assert(pf_request_trailers(r) == PF_ERR_STATE);
    assert(trailer(r, "X", "y") == 0 && trailer(r, "X", "z") == 0);
    assert(pf_request_write(r, "", 0) == PF_ERR_STATE);
    assert(pf_request_end(r) == 0);
    assert(says(hear_head(peer), "\r\nTransfer-Encoding: chunked\r\n"));
    const char *expected = "5\r\nhello\r\n0\r\nX: y\r\nX: z\r\n\r\n";
    assert(strcmp(hear_bytes(peer, strlen(expected)), expected) == 0);
    say(peer, taking);
    r = next_request();
    begin(r, -1); /* without a body, and with none in the end */
    assert(pf_request_trailers(r) == 1 && pf_request_end(r) == 0);
    hear_head(peer);
    assert(strcmp(hear_bytes(peer, 5), "0\r\n\r\n") == 0);
    close(peer);
    close_server();
}

static void
trailers_are_dropped_for_who_does_not_take_them(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 5);
    assert(pf_request_trailers(r) == 0);
    assert(pf_request_write(r, "hello", 5) == 0);
    assert(trailer(r, "X", "y") == 0 && trailer(r, "Host", "a") == PF_ERR_APP_TRAILER);
    assert(pf_request_write(r, "", 0) == PF_ERR_STATE && pf_request_end(r) == 0);
    assert(says(hear_head(peer), "\r\nContent-Length: 5\r\n"));
    assert(strcmp(hear_bytes(peer, 5), "hello") == 0);
    say(peer, GET);
    answer(next_request(), "x");
    hear_answer(peer);
    say(peer, "GET / HTTP/1.0\r\nTE: trailers\r\n\r\n");
    r = next_request();
    begin(r, -1);
    assert(pf_request_trailers(r) == 0 && trailer(r, "X", "y") == 0);
    assert(pf_request_end(r) == 0);
    assert(!says(hear_head(peer), "chunked"));
    hear_end(peer);
    close(peer);
    close_server();
}

static void
an_interim_answer_comes_before_the_answer(void)
{
    static const char link[] = "Link: </a>\r\n";
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_request_inform(r, 103, link, sizeof link - 1) == 0);
    assert(pf_request_inform(r, 102, NULL, 0) == 0);
    assert(pf_request_inform(r, 101, link, sizeof link - 1) == PF_ERR_STATE);
    assert(pf_request_inform(r, 103, "x", 1) == PF_ERR_APP_FIELD_NAME);
    answer(r, "x");
    assert(strcmp(hear_head(peer), "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
           == 0);
    assert(strcmp(hear_head(peer), "HTTP/1.1 102 Processing\r\n\r\n") == 0);
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
both_ends_of_a_connection_are_told(void)
{
    struct sockaddr_in at;
    socklen_t len = sizeof at;
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    pf_peer theirs, ours;
    pf_request_get_peer(r, &theirs);
    assert(pf_request_get_local(r, &ours) == 0);
    assert(getsockname(peer, (struct sockaddr *)&at, &len) == 0);
    assert(theirs.family == AF_INET && theirs.port == ntohs(at.sin_port));
    assert(memcmp(theirs.bytes, &at.sin_addr, 4) == 0);
    assert(getpeername(peer, (struct sockaddr *)&at, &len) == 0);
    assert(ours.family == AF_INET && ours.port == ntohs(at.sin_port));
    answer(r, "x");
    close(peer);
    close_server();
}

/* It is known from the first request on, also when the peer is gone. */
static void
our_end_of_a_connection_is_asked_for_once(void)
{
    pf_peer first, second;
    open_server(0);
    int peer = peer_saying(GET GET GET);
    pf_request *r = next_request();
    assert(pf_request_get_local(r, &first) == 0);
    answer(r, "x");
    r = next_request();
    r->conn->source.fd += 1000; /* where no socket is */
    assert(pf_request_get_local(r, &second) == 0);
    r->conn->source.fd -= 1000;
    assert(memcmp(&first, &second, sizeof first) == 0);
    answer(r, "x");
    r = next_request();
    reset_peer(peer);
    expect_event(PF_EVENT_CLOSED, r);
    assert(pf_request_get_local(r, &second) == 0);
    assert(memcmp(&first, &second, sizeof first) == 0);
    answer_refused(r);
    close_server();
}

static void
our_end_of_a_lost_connection_is_not_known(void)
{
    pf_peer ours;
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    reset_peer(peer);
    expect_event(PF_EVENT_CLOSED, r);
    assert(pf_request_get_local(r, &ours) == PF_ERR_CLOSED && ours.family == 0);
    answer_refused(r);
    close_server();
}

/* ---- many requests on one connection ------------------------------------------------*/
static int
count(const char *text, const char *part)
{
    int n = 0;
    while ((text = strstr(text, part)) != NULL) {
        text += strlen(part);
        n++;
    }
    return n;
}

static void
sixteen_pipelined_requests_are_answered_in_one_write(void)
{
    open_server(0);
    int peer = connected_peer();
    for (int i = 0; i < 16; i++)
        say(peer, GET);
    for (int i = 0; i < 16; i++) {
        pf_request *r = next_request();
        assert(hears_nothing(peer));
        answer(r, "x");
    }
    quiet(0);
    ssize_t n = recv(peer, heard, sizeof heard - 1, MSG_DONTWAIT);
    assert(n > 0);
    heard[n] = '\0';
    assert(count(heard, "HTTP/1.1 200 OK\r\n") == 16 && hears_nothing(peer));
    assert(stats().buffers_in_use == 0);
    close(peer);
    close_server();
}

static void
a_slow_handler_does_not_hold_back_what_is_flushed(void)
{
    open_server(0);
    int peer = peer_saying(GET GET);
    answer(next_request(), "x");
    pf_request *r = next_request();
    assert(hears_nothing(peer));
    assert(pf_loop_flush(loop) == 0);
    assert(recv(peer, heard, sizeof heard, MSG_DONTWAIT) > 0);
    answer(r, "x");
    close(peer);
    close_server();
}

static void
valid_requests_are_answered_before_the_refusal_of_another(void)
{
    open_server(0);
    int peer = peer_saying(GET GET "BAD\r\n\r\n" GET);
    answer(next_request(), "x");
    answer(next_request(), "x");
    hear_answer(peer);
    hear_answer(peer);
    assert(strncmp(hear_answer(peer), "HTTP/1.1 400 ", 13) == 0);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
a_peer_that_reads_no_answers_gets_no_more_requests_served(void)
{
    open_server(0);
    int peer = peer_saying(GET GET);
    assert(pf_request_answer(next_request(), 200, NULL, 0, large[0], LARGE, NULL) == 0);
    pf_loop_flush(loop);
    quiet(SHORT_MS);
    pf_request *r = NULL;
    while (r == NULL) {
        pf_event event;
        assert(recv(peer, heard, sizeof heard, 0) > 0);
        if (pf_loop_wait(loop, &event, 1, 0) == 1)
            r = event.request;
    }
    answer(r, "x");
    close(peer);
    close_server();
}

static void
a_connection_is_closed_behind_its_last_request(void)
{
    options.max_requests = 2;
    open_server(0);
    int peer = peer_saying(GET GET GET);
    answer(next_request(), "x");
    answer(next_request(), "x");
    assert(!says(hear_answer(peer), "Connection:"));
    assert(says(hear_answer(peer), "\r\nConnection: close\r\n"));
    hear_end(peer);
    close(peer);
    close_server();
}

static void
without_keep_alive_every_answer_closes(void)
{
    open_server(PF_OPTION_NO_KEEP_ALIVE);
    int peer = peer_saying(GET);
    answer(next_request(), "x");
    assert(says(hear_answer(peer), "\r\nConnection: close\r\n"));
    hear_end(peer);
    close(peer);
    close_server();
}

static void
a_peer_that_has_finished_sending_is_answered(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    assert(shutdown(peer, SHUT_WR) == 0);
    answer(next_request(), "hello");
    hear_answer(peer);
    hear_end(peer);
    close(peer);
    turn_until(nobody_is_connected);
    close_server();
}

/* ---- bodies -------------------------------------------------------------------------*/
static void
a_body_is_gathered_before_its_request_is_lent(void)
{
    static const char *const requests[] = {
        POST_5 "hello", POST_CHUNKED "2\r\nhe\r\n3;a=b\r\nllo\r\n0\r\nX: y\r\n\r\n"};
    open_server(0);
    int peer = connected_peer();
    for (int i = 0; i < 2; i++) {
        size_t len = strlen(requests[i]);
        for (size_t at = 0; at + 1 < len; at++) {
            say_bytes(peer, requests[i] + at, 1);
            quiet(0);
        }
        say(peer, requests[i] + len - 1);
        pf_request *r = next_request();
        assert(pf_request_body_done(r) && body_is(r, "hello"));
        answer(r, "x");
        hear_answer(peer);
    }
    close(peer);
    close_server();
}

static void
a_large_body_is_gathered_whole(void)
{
    open_server(0);
    int peer = connected_peer();
    char head[128];
    snprintf(head, sizeof head,
             "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", LARGE);
    say(peer, head);
    pf_event event = {0};
    size_t sent = 0;
    for (int n = 0; n == 0;) {
        ssize_t more = send(peer, large[1] + sent, LARGE - sent, MSG_DONTWAIT);
        sent += more > 0 ? (size_t)more : 0;
        n = pf_loop_wait(loop, &event, 1, 5);
    }
    pf_slice body = pf_request_body(event.request);
    assert(body.len == LARGE && memcmp(body.data, large[1], LARGE) == 0);
    answer(event.request, "x");
    hear_answer(peer);
    assert(stats().buffers_in_use == 0);
    close(peer);
    close_server();
}

static void
a_streamed_body_comes_as_it_arrives(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5);
    pf_request *r = next_request();
    assert(!pf_request_body_done(r) && body_is(r, ""));
    assert(pf_request_want_body(r, PF_WANT_SOME) == 0);
    quiet(0);
    say(peer, "hel");
    expect_event(PF_EVENT_BODY, r);
    assert(body_is(r, "hel") && pf_request_consume(r, 2) == 0 && body_is(r, "l"));
    assert(pf_request_consume(r, 2) == PF_ERR_STATE);
    assert(pf_request_consume(r, 1) == 0);
    say(peer, "lo");
    quiet(0); /* not wanted yet */
    assert(pf_request_want_body(r, PF_WANT_SOME) == 0);
    expect_event(PF_EVENT_BODY, r);
    assert(body_is(r, "lo") && pf_request_body_done(r));
    answer(r, "x");
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_body_wanted_whole_comes_once(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_CHUNKED "3\r\nhel\r\n");
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    quiet(0);
    say(peer, "2\r\nlo\r\n");
    quiet(0);
    say(peer, "0\r\n\r\n");
    expect_event(PF_EVENT_BODY, r);
    assert(body_is(r, "hello") && pf_request_body_done(r));
    answer(r, "x");
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_streamed_body_fills_no_more_than_its_window(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = connected_peer();
    char head[128];
    snprintf(head, sizeof head,
             "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", LARGE);
    say(peer, head);
    pf_request *r = next_request();
    size_t sent = 0, got = 0;
    while (!pf_request_body_done(r)) {
        ssize_t more = send(peer, large[1] + sent, LARGE - sent, MSG_DONTWAIT);
        sent += more > 0 ? (size_t)more : 0;
        assert(pf_request_want_body(r, PF_WANT_SOME) == 0);
        expect_event(PF_EVENT_BODY, r);
        pf_slice body = pf_request_body(r);
        assert(memcmp(body.data, large[1] + got, body.len) == 0);
        got += body.len;
        assert(pf_request_consume(r, body.len) == 0);
        assert(r->conn->in.cap <= 4 * PF__BODY_WINDOW);
    }
    assert(got == LARGE);
    answer(r, "x");
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_body_that_is_done_can_be_wanted_again(void)
{
    open_server(0);
    int peer = peer_saying(POST_CHUNKED "5\r\nhello\r\n0\r\n\r\n" GET);
    pf_request *r = next_request();
    for (int i = 0; i < 2; i++) {
        assert(pf_request_want_body(r, i ? PF_WANT_SOME : PF_WANT_WHOLE) == 0);
        expect_event(PF_EVENT_BODY, r);
        assert(body_is(r, "hello"));
    }
    answer(r, "x");
    answer(next_request(), "x");
    hear_answer(peer);
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_short_unread_body_is_dropped_and_the_next_request_served(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5);
    answer(next_request(), "x");
    assert(!says(hear_answer(peer), "Connection:"));
    say(peer, "hello" GET);
    answer(next_request(), "x");
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_long_unread_body_closes_the_connection(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer =
        peer_saying("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n");
    answer(next_request(), "x");
    assert(says(hear_answer(peer), "\r\nConnection: close\r\n"));
    hear_end(peer);
    close(peer);
    close_server();
}

static void
a_body_that_breaks_its_framing_stays_broken(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_CHUNKED);
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    say(peer, "5\r\nhello\n0\r\n\r\n" GET);
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_CLOSED && event.code == PF_ERR_CHUNK_DATA);
    pf_request_want_body(r, PF_WANT_WHOLE);
    quiet(0);
    assert(!pf_request_body_done(r));
    assert(pf_request_refuse(r, event.code) == 0);
    const char *head = hear_answer(peer);
    assert(strncmp(head, "HTTP/1.1 400 ", 13) == 0 && says(head, "Connection: close"));
    hear_end(peer);
    close(peer);
    close_server();
}

static void
a_body_that_ends_early_is_told_to_its_holder(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5 "hel");
    pf_request *r = next_request();
    assert(shutdown(peer, SHUT_WR) == 0);
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_CLOSED && event.code == PF_ERR_TRUNCATED);
    assert(pf_request_closed(r));
    pf_request_abort(r);
    hear_end(peer);
    close(peer);
    turn_until(nobody_is_connected);
    close_server();
}

static void
a_limit_counts_payload_and_not_its_framing(void)
{
    open_server(0);
    int peer = peer_saying(POST_CHUNKED "1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n");
    pf_request *r = next_request();
    assert(pf_request_limit(r, 3, -1, -1) == 0);
    assert(pf_request_limit(r, 2, -1, -1) == PF_ERR_BODY_SIZE);
    assert(pf_request_refuse(r, PF_ERR_BODY_SIZE) == 0);
    assert(strncmp(hear_answer(peer), "HTTP/1.1 413 ", 13) == 0);
    close(peer);
    close_server();
}

static void
a_limit_holds_for_what_is_still_to_come(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_CHUNKED "3\r\nabc\r\n");
    pf_request *r = next_request();
    assert(pf_request_limit(r, 5, -1, -1) == 0);
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    say(peer, "3\r\ndef\r\n0\r\n\r\n");
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_CLOSED && event.code == PF_ERR_BODY_SIZE);
    assert(pf_request_refuse(r, event.code) == 0);
    assert(strncmp(hear_answer(peer), "HTTP/1.1 413 ", 13) == 0);
    close(peer);
    close_server();
}

/* ---- Expect: 100-continue -----------------------------------------------------------*/
static void
a_peer_that_waits_is_told_to_continue_when_its_body_is_wanted(void)
{
    open_server(0);
    int peer = peer_saying(POST_EXPECT);
    pf_request *r = next_request();
    quiet(0);
    assert(hears_nothing(peer));
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    assert(strcmp(hear_head(peer), "HTTP/1.1 100 Continue\r\n\r\n") == 0);
    say(peer, "hello");
    expect_event(PF_EVENT_BODY, r);
    answer(r, "x");
    assert(strncmp(hear_answer(peer), "HTTP/1.1 200 ", 13) == 0);
    close(peer);
    close_server();
}

static void
a_peer_that_waits_and_is_answered_at_once_is_closed(void)
{
    open_server(0);
    int peer = peer_saying(POST_EXPECT);
    answer(next_request(), "x");
    const char *head = hear_answer(peer);
    assert(strncmp(head, "HTTP/1.1 200 ", 13) == 0);
    assert(says(head, "\r\nConnection: close\r\n"));
    hear_end(peer);
    close(peer);
    close_server();
}

static void
a_body_that_came_unasked_is_taken_without_100(void)
{
    open_server(0);
    int peer = peer_saying(POST_EXPECT "hello");
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    expect_event(PF_EVENT_BODY, r);
    assert(body_is(r, "hello"));
    answer(r, "x");
    assert(strncmp(hear_answer(peer), "HTTP/1.1 200 ", 13) == 0);
    close(peer);
    close_server();
}

/* An app may choose its status before it reads: the 100 still comes first, and not in
 * the midst of the head. */
static void
a_100_does_not_break_a_head_that_is_begun(void)
{
    open_server(0);
    int peer = peer_saying(POST_EXPECT);
    pf_request *r = next_request();
    begin(r, 2);
    assert(pf_request_field(r, "X", 1, "y", 1) == 0);
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    assert(strcmp(hear_head(peer), "HTTP/1.1 100 Continue\r\n\r\n") == 0);
    say(peer, "hello");
    expect_event(PF_EVENT_BODY, r);
    assert(pf_request_field(r, "Z", 1, "z", 1) == 0);
    assert(pf_request_write(r, "ok", 2) == 0 && pf_request_end(r) == 0);
    const char *head = hear_head(peer);
    assert(strncmp(head, "HTTP/1.1 200 OK\r\nX: y\r\nZ: z\r\n", 29) == 0);
    assert(strcmp(hear_bytes(peer, 2), "ok") == 0);
    close(peer);
    close_server();
}

/* ---- large and borrowed bodies ------------------------------------------------------*/
static char refs[3]; /* their addresses stand for the bodies */
static int released[3];

static void
note_release(const pf_event *event)
{
    assert(event->flags == PF_EVENT_RELEASED && event->request == NULL);
    for (int i = 0; i < 3; i++)
        released[i] += event->user == &refs[i];
}

static void
expect_released(int first, int second, int third)
{
    int expected[3] = {first, second, third};
    int due = first + second + third - released[0] - released[1] - released[2];
    for (; due > 0; due--) {
        pf_event event = next_event();
        note_release(&event);
    }
    quiet(0);
    assert(memcmp(released, expected, sizeof expected) == 0);
    memset(released, 0, sizeof released);
}

static void
three_large_borrowed_bodies_reach_a_slow_reader(void)
{
    int small = 4096;
    open_server(0);
    int peer = open_peer();
    setsockopt(peer, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    connect_peer(peer);
    say(peer, GET);
    pf_request *r = next_request();
    begin(r, 3 * (int64_t)LARGE);
    for (int i = 0; i < 3; i++) {
        assert(pf_request_borrows(r, LARGE));
        assert(pf_request_write_ref(r, large[i], LARGE, &refs[i]) == 0);
    }
    assert(pf_request_pending(r) > 3 * (size_t)LARGE);
    assert(pf_request_end(r) == 0);
    hear_head(peer);
    size_t got = 0;
    while (got < 3 * (size_t)LARGE) {
        pf_event event;
        ssize_t n = recv(peer, heard, 10000, MSG_DONTWAIT);
        for (ssize_t i = 0; i < n; i++, got++)
            assert(heard[i] == large[got / LARGE][got % LARGE]);
        if (pf_loop_wait(loop, &event, 1, n > 0 ? 0 : 5) > 0)
            note_release(&event);
    }
    expect_released(1, 1, 1);
    assert(stats().buffers_in_use == 0);
    say(peer, GET);
    answer(next_request(), "x");
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_borrowed_body_between_copied_ones_keeps_its_place(void)
{
    enum { MEDIUM = PF__BORROW_MIN };
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_write(r, "<", 1) == 0);
    assert(pf_request_write_ref(r, large[1], MEDIUM, &refs[0]) == 0);
    assert(pf_request_write(r, ">", 1) == 0);
    assert(pf_request_write_ref(r, large[2], MEDIUM, &refs[1]) == 0);
    assert(pf_request_end(r) == 0);
    expect_released(1, 1, 0);
    hear_head(peer);
    assert(strcmp(hear_bytes(peer, 6 + 6), "1\r\n<\r\n4000\r\n") == 0);
    assert(memcmp(hear_bytes(peer, MEDIUM), large[1], MEDIUM) == 0);
    assert(strcmp(hear_bytes(peer, 2 + 6 + 6), "\r\n1\r\n>\r\n4000\r\n") == 0);
    assert(memcmp(hear_bytes(peer, MEDIUM), large[2], MEDIUM) == 0);
    assert(strcmp(hear_bytes(peer, 7), "\r\n0\r\n\r\n") == 0);
    close(peer);
    close_server();
}

static void
an_answer_in_one_call_borrows_what_pays(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    assert(pf_request_answer(next_request(), 200, NULL, 0, large[0], 100, &refs[0])
           == 0);
    hear_answer(peer);
    say(peer, GET);
    assert(pf_request_answer(next_request(), 200, NULL, 0, large[0], 30000, &refs[1])
           == 1);
    expect_released(0, 1, 0);
    hear_answer(peer);
    say(peer, "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert(pf_request_answer(next_request(), 200, NULL, 0, large[0], 30000, &refs[2])
           == 0);
    hear_head(peer);
    close(peer);
    close_server();
}

static void
a_small_or_dropped_body_is_not_borrowed(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 5);
    assert(!pf_request_borrows(r, 5));
    assert(pf_request_write_ref(r, "hello", 5, &refs[0]) == PF_ERR_STATE);
    assert(pf_request_write(r, "hello", 5) == 0); /* nothing of it was counted */
    assert(pf_request_end(r) == 0);
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_reset_releases_each_body_once(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 2 * (int64_t)LARGE);
    assert(pf_request_write_ref(r, large[0], LARGE, &refs[0]) == 0);
    assert(pf_request_write_ref(r, large[1], LARGE, &refs[1]) == 0);
    assert(pf_request_end(r) == 0);
    hear_head(peer);
    reset_peer(peer);
    expect_released(1, 1, 0);
    assert(stats().connections == 0 && stats().buffers_in_use == 0);
    close_server();
}

static void
a_reset_during_a_loan_releases_and_is_told(void)
{
    bool told = false;
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 2 * (int64_t)LARGE);
    assert(pf_request_write_ref(r, large[0], LARGE, &refs[0]) == 0);
    hear_head(peer);
    reset_peer(peer);
    for (int i = 0; i < 2; i++) {
        pf_event event = next_event();
        if (event.flags == PF_EVENT_CLOSED)
            told = event.request == r;
        else
            note_release(&event);
    }
    assert(told && released[0] == 1 && pf_request_closed(r));
    assert(pf_request_write_ref(r, large[1], LARGE, &refs[1]) == PF_ERR_CLOSED);
    assert(pf_request_end(r) == PF_ERR_CLOSED);
    expect_released(1, 0, 0);
    close_server();
}

static void
an_abort_sends_what_is_queued_and_releases_it(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 100000);
    assert(pf_request_write_ref(r, large[0], 50000, &refs[0]) == 0);
    assert(pf_request_abort(r) == 0);
    expect_released(1, 0, 0);
    hear_head(peer);
    hear_bytes(peer, 50000);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
room_is_told_when_little_is_pending(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_want_room(r) == 0);
    expect_event(PF_EVENT_WRITABLE, r);
    assert(pf_request_write(r, large[0], LARGE) == 0);
    assert(pf_request_want_room(r) == 0);
    quiet(0);
    pf_event event;
    while (pf_loop_wait(loop, &event, 1, 5) == 0)
        assert(recv(peer, heard, sizeof heard, MSG_DONTWAIT) > 0 || errno == EAGAIN);
    assert(event.flags == PF_EVENT_WRITABLE && pf_request_pending(r) < PF__LOW_WATER);
    assert(pf_request_abort(r) == 0);
    close(peer);
    close_server();
}

static void
the_end_is_told_to_who_wants_to_know_and_the_answer_still_goes_out(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_request_want_end(r) == 0);
    quiet(0);
    assert(shutdown(peer, SHUT_WR) == 0);
    expect_event(PF_EVENT_ENDED, r);
    assert(pf_request_want_end(r) == 0); /* it is there already */
    expect_event(PF_EVENT_ENDED, r);
    assert(!pf_request_closed(r));
    answer(r, "x");
    hear_answer(peer);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
the_end_is_not_told_of_a_loan_that_is_over(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_request_want_end(r) == 0);
    answer(r, "x");
    hear_answer(peer);
    assert(shutdown(peer, SHUT_WR) == 0);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
a_head_begun_behind_a_slow_answer_stays_whole(void)
{
    int small = 4096;
    open_server(0);
    setsockopt(listener, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    int peer = open_peer();
    setsockopt(peer, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    connect_peer(peer);
    say(peer, GET GET);
    assert(pf_request_answer(next_request(), 200, NULL, 0, large[0], 300000, NULL)
           == 0);
    hear_head(peer);
    pf_event event;
    size_t got = 0;
    while (pf_loop_wait(loop, &event, 1, 0) == 0) {
        ssize_t n = recv(peer, heard, 1000, MSG_DONTWAIT);
        got += n > 0 ? (size_t)n : 0;
    }
    assert(event.flags == PF_EVENT_REQUEST);
    begin(event.request, 5);
    assert(pf_request_field(event.request, "X", 1, "y", 1) == 0);
    for (; got < 300000; got++)
        hear_bytes(peer, 1);
    assert(pf_request_write(event.request, "hello", 5) == 0);
    assert(pf_request_end(event.request) == 0);
    assert(says(hear_head(peer), "\r\nX: y\r\n"));
    assert(strcmp(hear_bytes(peer, 5), "hello") == 0);
    close(peer);
    close_server();
}

/* A stream that is always a little ahead of its reader must not keep what was sent. */
static void
a_long_stream_keeps_little_in_memory(void)
{
    int small = 4096;
    options.write_timeout_ms = 60000;
    open_server(0);
    setsockopt(listener, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    int peer = open_peer();
    setsockopt(peer, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    connect_peer(peer);
    say(peer, GET);
    pf_request *r = next_request();
    begin(r, -1);
    for (size_t written = 0; written < 2 * (size_t)LARGE; written += 40000) {
        pf_event event;
        assert(pf_request_write(r, large[0], 40000) == 0);
        assert(pf_request_want_room(r) == 0);
        while (pf_loop_wait(loop, &event, 1, 0) == 0)
            assert(recv(peer, heard, 4000, MSG_DONTWAIT) > 0 || errno == EAGAIN);
        assert(event.flags == PF_EVENT_WRITABLE);
        assert(r->conn->out.cap <= 1 << 20);
    }
    assert(pf_request_abort(r) == 0);
    close(peer);
    close_server();
}

/* ---- aborts -------------------------------------------------------------------------*/
static void
an_abort_before_the_head_is_sent_sends_nothing(void)
{
    open_server(0);
    int peer = peer_saying(GET GET);
    answer(next_request(), "x");
    pf_request *r = next_request();
    begin(r, 5);
    assert(pf_request_abort(r) == 0);
    hear_answer(peer);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
an_aborted_chunked_answer_lacks_its_end(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_write(r, "hello", 5) == 0 && pf_request_abort(r) == 0);
    hear_head(peer);
    assert(strcmp(hear_bytes(peer, 10), "5\r\nhello\r\n") == 0);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
an_aborted_answer_that_ends_with_its_connection_is_reset(void)
{
    char byte;
    int rc;
    open_server(0);
    int peer = peer_saying(GET_1_0);
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_write(r, "hello", 5) == 0);
    pf_loop_flush(loop);
    hear_until(peer, "hello");
    assert(pf_request_abort(r) == 0);
    while ((rc = hear_byte(peer, &byte)) > 0)
        continue;
    assert(rc == -ECONNRESET);
    close(peer);
    close_server();
}

/* ---- events belong to loans ---------------------------------------------------------*/
static void
no_event_of_a_loan_outlives_it(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5 "hello"
                                  "GET ");
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_SOME) == 0); /* and it is there */
    answer(r, "x");
    quiet(0);
    hear_answer(peer);
    say(peer, "/ HTTP/1.1\r\nHost: a\r\n\r\n");
    r = next_request();
    assert(pf_request_want_room(r) == 0 && pf_loop_flush(loop) == 0);
    answer(r, "x");
    quiet(0);
    hear_answer(peer);
    say(peer, POST_5 "he");
    r = next_request();
    assert(pf_request_want_body(r, PF_WANT_SOME) == 0);
    assert(pf_request_want_room(r) == 0);
    answer(r, "x"); /* the rest of its body is dropped */
    quiet(0);
    close(peer);
    close_server();
}

static void
no_event_of_an_aborted_loan_outlives_it(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5 "he");
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_SOME) == 0);
    pf_request_abort(r);
    quiet(0);
    hear_end(peer);
    close(peer);
    close_server();
}

/* A flush finds out that the peer is gone, and the holder ends its loan unasked. */
static void
no_event_of_a_lost_connection_outlives_its_loan(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 5);
    reset_peer(peer);
    assert(pf_request_write(r, "hello", 5) == 0);
    assert(pf_loop_flush(loop) == 0 && pf_request_closed(r));
    assert(pf_request_end(r) == PF_ERR_CLOSED);
    quiet(0);
    assert(nobody_is_connected());
    close_server();
}

static void
events_carry_what_was_set_with_their_loan(void)
{
    int mine = 0;
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5);
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_REQUEST && event.user == NULL);
    pf_request_set_user(event.request, &mine);
    assert(pf_request_want_body(event.request, PF_WANT_WHOLE) == 0);
    say(peer, "hello" POST_5);
    event = next_event();
    assert(event.flags == PF_EVENT_BODY && event.user == &mine);
    answer(event.request, "x");
    event = next_event();
    assert(event.flags == PF_EVENT_REQUEST && event.user == NULL);
    answer(event.request, "x");
    close(peer);
    close_server();
}

/* ---- refusals -----------------------------------------------------------------------*/
static void
a_refusal_reaches_a_peer_that_is_still_sending(void)
{
    open_server(0);
    int peer = peer_saying("BAD\r\n\r\n");
    say_bytes(peer, large[0], 100000);
    const char *head = hear_answer(peer);
    assert(strncmp(head, "HTTP/1.1 400 ", 13) == 0 && says(head, "Connection: close"));
    hear_end(peer);
    say_bytes(peer, large[0], 1000);
    quiet(0);
    close(peer);
    turn_until(nobody_is_connected);
    assert(stats().refused == 1 && stats().buffers_in_use == 0);
    close_server();
}

static void
a_refused_request_can_be_lent_for_its_answer(void)
{
    open_server(PF_OPTION_LEND_REFUSED);
    int peer = peer_saying("GET / HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n");
    pf_event event = next_event();
    assert(event.flags == (PF_EVENT_REQUEST | PF_EVENT_REFUSED));
    assert(event.code == PF_ERR_FIELD_NAME && pf_request_body_done(event.request));
    assert(pf_request_answer(event.request, 400, NULL, 0, "mine", 4, NULL) == 0);
    assert(says(hear_head(peer), "\r\nConnection: close\r\n"));
    assert(strcmp(hear_bytes(peer, 4), "mine") == 0);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
the_body_of_a_refused_request_has_ended(void)
{
    options.read_timeout_ms = SHORT_MS;
    open_server(PF_OPTION_LEND_REFUSED);
    int peer = peer_saying(POST_5 "he");
    pf_event event = next_event();
    assert(event.code == PF_ERR_BODY_TIMEOUT);
    assert(pf_request_want_body(event.request, PF_WANT_WHOLE) == 0);
    expect_event(PF_EVENT_BODY, event.request);
    assert(pf_request_body_done(event.request));
    answer(event.request, "x");
    assert(says(hear_answer(peer), "\r\nConnection: close\r\n"));
    close(peer);
    close_server();
}

static void
only_get_and_head_are_served_where_that_is_asked(void)
{
    open_server(PF_OPTION_GET_ONLY);
    int peer = peer_saying(POST_5);
    const char *head = hear_answer(peer);
    assert(strncmp(head, "HTTP/1.1 405 ", 13) == 0 && says(head, "\r\nAllow: "));
    close(peer);
    close_server();
}

static void
a_body_over_the_limit_is_refused_before_it_is_read(void)
{
    options.max_body_size = 4;
    open_server(0);
    int peer = peer_saying(POST_5);
    assert(strncmp(hear_answer(peer), "HTTP/1.1 413 ", 13) == 0);
    close(peer);
    close_server();
}

/* ---- timeouts -----------------------------------------------------------------------*/
static int64_t started;

static void
begin_timing(void)
{
    started = clock_ms();
}

static void
took_a_short_time(void)
{
    int64_t took = clock_ms() - started;
    assert(took >= SHORT_MS - 1 && took < SOON_MS);
}

static void
a_connection_without_a_whole_head_gets_408(void)
{
    static const char *const starts[] = {"", "G", "GET / HTTP/1.1\r\nHost: a\r\n"};
    options.header_timeout_ms = SHORT_MS;
    open_server(0);
    for (int i = 0; i < 3; i++) {
        begin_timing();
        int peer = peer_saying(starts[i]);
        const char *head = hear_answer(peer);
        assert(strncmp(head, "HTTP/1.1 408 ", 13) == 0);
        took_a_short_time();
        hear_end(peer);
        close(peer);
    }
    assert(stats().timeouts >= 3);
    close_server();
}

static void
bytes_now_and_then_do_not_prolong_a_head(void)
{
    options.header_timeout_ms = SHORT_MS;
    open_server(0);
    begin_timing();
    int peer = peer_saying("GET / HTTP/1.1\r\nX: ");
    while (hears_nothing(peer)) {
        say(peer, "x");
        quiet(5);
    }
    assert(strncmp(hear_answer(peer), "HTTP/1.1 408 ", 13) == 0);
    took_a_short_time();
    close(peer);
    close_server();
}

static void
a_gathered_body_that_stalls_gets_408(void)
{
    options.read_timeout_ms = SHORT_MS;
    open_server(0);
    begin_timing();
    int peer = peer_saying(POST_5 "he");
    assert(strncmp(hear_answer(peer), "HTTP/1.1 408 ", 13) == 0);
    took_a_short_time();
    close(peer);
    close_server();
}

static void
a_body_below_the_least_rate_gets_408(void)
{
    options.read_timeout_ms = 2 * SHORT_MS;
    options.min_body_rate = 100000;
    open_server(0);
    int peer =
        peer_saying("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n");
    while (hears_nothing(peer)) {
        say(peer, "x");
        quiet(5);
    }
    assert(strncmp(hear_answer(peer), "HTTP/1.1 408 ", 13) == 0);
    close(peer);
    close_server();
}

static void
a_streamed_body_that_stalls_is_told_to_its_holder(void)
{
    options.read_timeout_ms = SHORT_MS;
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5);
    begin_timing();
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_CLOSED && event.code == PF_ERR_BODY_TIMEOUT);
    took_a_short_time();
    assert(pf_request_refuse(r, event.code) == 0);
    assert(strncmp(hear_answer(peer), "HTTP/1.1 408 ", 13) == 0);
    close(peer);
    close_server();
}

static void
nothing_times_out_while_a_handler_works(void)
{
    options.read_timeout_ms = options.header_timeout_ms = SHORT_MS;
    options.idle_timeout_ms = options.write_timeout_ms = SHORT_MS;
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5);
    pf_request *r = next_request();
    quiet(4 * SHORT_MS);
    say(peer, "hello");
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    expect_event(PF_EVENT_BODY, r);
    answer(r, "x");
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
an_idle_connection_is_closed_without_a_word(void)
{
    options.idle_timeout_ms = SHORT_MS;
    open_server(0);
    begin_timing();
    int peer = peer_saying(GET);
    answer(next_request(), "x");
    hear_answer(peer);
    hear_end(peer);
    took_a_short_time();
    close(peer);
    close_server();
}

static void
a_peer_that_stops_reading_is_reset(void)
{
    options.write_timeout_ms = SHORT_MS;
    open_server(0);
    begin_timing();
    int peer = peer_saying(GET);
    assert(pf_request_answer(next_request(), 200, NULL, 0, large[0], LARGE, &refs[0])
           == 1);
    expect_released(1, 0, 0);
    took_a_short_time();
    assert(stats().connections == 0 && stats().timeouts == 1);
    close(peer);
    close_server();
}

static void
a_peer_that_does_not_close_after_a_refusal_is_closed(void)
{
    options.linger_timeout_ms = SHORT_MS;
    open_server(0);
    begin_timing();
    int peer = peer_saying("BAD\r\n\r\n");
    hear_answer(peer);
    assert(stats().connections == 1);
    turn_until(nobody_is_connected);
    took_a_short_time();
    close(peer);
    close_server();
}

static void
an_unread_body_that_never_comes_is_given_up(void)
{
    options.linger_timeout_ms = SHORT_MS;
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5);
    answer(next_request(), "x");
    hear_answer(peer);
    hear_end(peer);
    close(peer);
    close_server();
}

static void
an_unread_body_that_has_ended_early_is_given_up(void)
{
    options.linger_timeout_ms = SHORT_MS;
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5 "he");
    pf_request *r = next_request();
    assert(shutdown(peer, SHUT_WR) == 0);
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    expect_event(PF_EVENT_CLOSED, r);
    answer(r, "x");
    hear_answer(peer);
    hear_end(peer);
    turn_until(nobody_is_connected);
    close(peer);
    close_server();
}

/* ---- too many -----------------------------------------------------------------------*/
static int highest_fd;

static void
allow_descriptors(rlim_t n)
{
    struct rlimit limit;
    assert(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = n;
    assert(setrlimit(RLIMIT_NOFILE, &limit) == 0);
}

static int
shortages(void)
{
    pf_notice notice;
    int n = 0;
    while (pf_loop_notices(loop, &notice, 1) == 1)
        n += notice.kind == PF_NOTICE_ERROR && notice.code == -EMFILE;
    return n;
}

/* The listener stays readable all the while: asking it again and again would spin. */
static void
without_descriptors_accepting_is_paused_and_nobody_lost(void)
{
    struct rlimit before;
    assert(getrlimit(RLIMIT_NOFILE, &before) == 0);
    open_server(PF_OPTION_NOTICES);
    int peer = peer_saying(GET);
    highest_fd = peer;
    for (int fd; (fd = dup(peer)) < 40;) /* no hole is left below the limit */
        highest_fd = fd;
    allow_descriptors((rlim_t)highest_fd + 1);
    for (int fd = highest_fd + 1; fd < 64; fd++)
        close(fd);
    int n = 0;
    for (int64_t end = clock_ms() + 4 * SHORT_MS; clock_ms() < end; n += shortages())
        quiet(SHORT_MS);
    assert(n >= 2 && n <= 6);
    allow_descriptors(before.rlim_cur);
    answer(next_request(), "x");
    hear_answer(peer);
    for (int fd = peer + 1; fd <= highest_fd; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            close(fd);
    close(peer);
    close_server();
}

static void
one_connection_too_many_gets_503(void)
{
    options.max_connections = 2;
    open_server(0);
    int a = peer_saying(GET), b = peer_saying(GET);
    answer(next_request(), "x");
    answer(next_request(), "x");
    int c = peer_saying(GET);
    const char *head = hear_answer(c);
    assert(strncmp(head, "HTTP/1.1 503 ", 13) == 0 && says(head, "Retry-After"));
    hear_end(c);
    close(c);
    close(a);
    close(b);
    turn_until(nobody_is_connected);
    c = peer_saying(GET);
    answer(next_request(), "x");
    hear_answer(c);
    close(c);
    close_server();
}

static void
one_connection_too_many_of_an_address_gets_429(void)
{
    options.max_connections_per_ip = 1;
    open_server(0);
    int a = peer_saying(GET);
    answer(next_request(), "x");
    int b = peer_saying(GET);
    assert(strncmp(hear_answer(b), "HTTP/1.1 429 ", 13) == 0);
    hear_end(b);
    close(b);
    close(a);
    turn_until(nobody_is_connected);
    b = peer_saying(GET);
    answer(next_request(), "x");
    hear_answer(b);
    close(b);
    close_server();
}

static void
connections_of_a_unix_socket_have_no_address_to_count(void)
{
    options.max_connections_per_ip = 1;
    open_on(listen_unix());
    int a = peer_saying(GET), b = peer_saying(GET);
    answer(next_request(), "x");
    answer(next_request(), "x");
    hear_answer(a);
    hear_answer(b);
    close(a);
    close(b);
    close_server();
}

/* ---- drain --------------------------------------------------------------------------*/
static void
drained(void)
{
    expect_event(PF_EVENT_DRAINED, NULL);
    quiet(0); /* said once */
}

static void
a_drain_with_nothing_open_is_done_at_once(void)
{
    open_server(0);
    assert(pf_loop_drain(loop, false, -1) == 0);
    drained();
    close_server();
}

static void
a_drain_gives_idle_connections_a_while(void)
{
    options.drain_idle_ms = SHORT_MS;
    open_server(0);
    int peer = peer_saying(GET);
    answer(next_request(), "x");
    hear_answer(peer);
    begin_timing(); /* a drain reads the clock itself */
    assert(pf_loop_drain(loop, false, -1) == 0);
    drained();
    took_a_short_time();
    hear_end(peer);
    close(peer);
    close_server();
}

static void
a_request_that_comes_in_a_drain_is_the_last(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    answer(next_request(), "x");
    hear_answer(peer);
    assert(pf_loop_drain(loop, false, -1) == 0);
    say(peer, GET);
    answer(next_request(), "x");
    assert(says(hear_answer(peer), "\r\nConnection: close\r\n"));
    close(peer);
    drained();
    close_server();
}

static void
a_drain_waits_for_loans(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_loop_drain(loop, false, -1) == 0);
    quiet(SHORT_MS);
    answer(r, "x");
    assert(says(hear_head(peer), "\r\nConnection: close\r\n"));
    close(peer);
    drained();
    close_server();
}

/* However late it was begun, or goes on; and though the peer does not leave. */
static void
what_is_half_said_has_no_longer_than_the_drain(void)
{
    static const char *const starts[] = {"GET / HT", POST_5 "he"};
    static const char *const more[] = {"T", "l"};
    for (int i = 0; i < 2; i++) {
        options.min_body_rate = 0;
        options.linger_timeout_ms = 6 * SOON_MS;
        open_server(0);
        int early = peer_saying(starts[i]), late = connected_peer();
        quiet(5);
        begin_timing();
        assert(pf_loop_drain(loop, true, SHORT_MS) == 0);
        say(late, starts[i]);
        quiet(5);
        say(early, more[i]);
        assert(strncmp(hear_answer(early), "HTTP/1.1 408 ", 13) == 0);
        took_a_short_time();
        assert(strncmp(hear_answer(late), "HTTP/1.1 408 ", 13) == 0);
        drained();
        close(early);
        close(late);
        close_server();
    }
}

static void
a_handler_that_waits_for_its_body_hears_that_a_drain_does_not(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peer = peer_saying(POST_5 "he");
    pf_request *r = next_request();
    begin_timing();
    assert(pf_loop_drain(loop, false, SHORT_MS) == 0);
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_CLOSED && event.code == PF_ERR_BODY_TIMEOUT);
    took_a_short_time();
    pf_request_abort(r);
    drained();
    close(peer);
    close_server();
}

static void
a_handler_that_is_not_waiting_is_not_hurried_by_a_drain(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_loop_drain(loop, false, 1) == 0);
    quiet(SHORT_MS);
    answer(r, "x");
    assert(strncmp(hear_answer(peer), "HTTP/1.1 200 ", 13) == 0);
    close(peer);
    drained();
    close_server();
}

static void
who_is_kept_in_a_drain_is_told_when_that_ends(void)
{
    open_server(PF_OPTION_KEEP_ON_DRAIN);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_loop_drain(loop, false, SHORT_MS) == 0);
    answer(r, "x");
    assert(!says(hear_answer(peer), "\r\nConnection: close\r\n"));
    say(peer, GET);
    r = next_request();
    quiet(SHORT_MS);
    answer(r, "x");
    assert(says(hear_answer(peer), "\r\nConnection: close\r\n"));
    close(peer);
    drained();
    close_server();
}

/* A handler has held up the loop meanwhile; and they are more than one batch. */
static void
what_was_said_in_time_is_heard_although_the_loop_is_late(void)
{
    enum { PEERS = 150 };
    int peers[PEERS];
    open_server(0);
    for (int i = 0; i < PEERS; i++) {
        peers[i] = peer_saying("GET / HT");
        quiet(0); /* the queue of the listener is short */
    }
    quiet(5);
    assert(stats().connections == PEERS);
    assert(pf_loop_drain(loop, false, SHORT_MS) == 0);
    for (int i = 0; i < PEERS; i++)
        say(peers[i], "TP/1.1\r\nHost: a\r\n\r\n");
    struct timespec held_up = {.tv_nsec = 2 * SHORT_MS * 1000000L};
    nanosleep(&held_up, NULL);
    for (int i = 0; i < PEERS; i++)
        answer(next_request(), "x");
    for (int i = 0; i < PEERS; i++)
        close(peers[i]);
    drained();
    close_server();
}

static void
a_drain_is_done_when_the_loan_of_a_lost_peer_ends(void)
{
    open_server(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_loop_drain(loop, false, -1) == 0);
    reset_peer(peer);
    expect_event(PF_EVENT_CLOSED, r);
    quiet(0);
    answer_refused(r);
    drained();
    close_server();
}

static void
a_second_drain_closes_idle_connections_at_once(void)
{
    options.drain_idle_ms = 6 * SOON_MS;
    open_server(0);
    int peer = peer_saying(GET);
    answer(next_request(), "x");
    hear_answer(peer);
    assert(pf_loop_drain(loop, false, -1) == 0);
    quiet(0);
    assert(pf_loop_drain(loop, false, -1) == 0);
    drained();
    hear_end(peer);
    close(peer);
    close_server();
}

static void
a_sweep_serves_who_is_waiting_in_the_queue(void)
{
    open_server(0);
    int a = peer_saying(GET), b = peer_saying(GET);
    assert(pf_loop_drain(loop, true, -1) == 0);
    answer(next_request(), "x");
    answer(next_request(), "x");
    hear_answer(a);
    hear_answer(b);
    close(a);
    close(b);
    drained();
    close_server();
}

/* ---- close --------------------------------------------------------------------------*/
static void
what_is_on_loan_stays_readable_after_close(void)
{
    open_server(0);
    int peer =
        peer_saying("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
    pf_request *r = next_request();
    begin(r, 2 * (int64_t)LARGE);
    assert(pf_request_write_ref(r, large[0], LARGE, &refs[0]) == 0);
    pf_loop_flush(loop);
    pf_loop_close(loop);
    pf_loop_close(loop);
    assert(pf_loop_free(loop) == PF_ERR_STATE);
    void *ref = NULL;
    assert(pf_loop_take_released(loop, &ref, 1) == 1 && ref == &refs[0]);
    assert(pf_loop_take_released(loop, &ref, 1) == 0);
    assert(target_is(r, "/x") && body_is(r, "hello") && pf_request_closed(r));
    assert(pf_request_write(r, "x", 1) == PF_ERR_CLOSED);
    assert(pf_request_want_body(r, PF_WANT_SOME) == PF_ERR_CLOSED);
    assert(pf_request_want_room(r) == PF_ERR_CLOSED);
    assert(pf_loop_free(loop) == PF_ERR_STATE);
    assert(pf_request_end(r) == PF_ERR_CLOSED);
    close_server();
    close(peer);
}

static void
a_loop_closes_what_it_has_in_every_phase(void)
{
    open_server(PF_OPTION_LEND_HEADS);
    int peers[] = {connected_peer(), peer_saying("GET"), peer_saying("BAD\r\n\r\n"),
                   peer_saying(POST_5), peer_saying(GET)};
    for (int i = 0; i < 2; i++)
        answer(next_request(), "x");
    pf_loop_flush(loop);
    close_server();
    for (size_t i = 0; i < sizeof peers / sizeof *peers; i++)
        close(peers[i]);
}

static void
a_request_that_was_not_handed_out_is_no_loan(void)
{
    pf_event event;
    open_server(0);
    int a = peer_saying(GET), b = peer_saying(GET);
    assert(pf_loop_wait(loop, &event, 1, SOON_MS) == 1);
    answer(event.request, "x"); /* the other is still in the ready queue */
    close_server();
    close(a);
    close(b);
}

static void
a_loop_with_wrong_options_is_not_opened(void)
{
    pf_loop *none = NULL;
    pf_options wrong = options;
    wrong.max_fields = PF_HEAD_FIELDS + 1;
    assert(pf_loop_open(&none, &wrong) == -EINVAL && none == NULL);
    wrong = options;
    wrong.read_buffer_size = 100;
    assert(pf_loop_open(&none, &wrong) == -EINVAL && none == NULL);
}

/* ---- waking and watching ------------------------------------------------------------*/
static void *
wake_often(void *arg)
{
    (void)arg;
    for (int i = 0; i < 1000; i++)
        assert(pf_loop_wake(loop) == 0);
    return NULL;
}

static void
any_thread_can_end_the_wait(void)
{
    pthread_t threads[2];
    open_server(0);
    for (int i = 0; i < 2; i++) {
        assert(pthread_create(&threads[i], NULL, wake_often, NULL) == 0);
        expect_event(PF_EVENT_WOKEN, NULL);
    }
    for (int i = 0; i < 2; i++)
        assert(pthread_join(threads[i], NULL) == 0);
    pf_event event;
    while (pf_loop_wait(loop, &event, 1, 0) > 0)
        assert(event.flags == PF_EVENT_WOKEN);
    close_server();
}

static void
a_wake_before_the_wait_ends_it(void)
{
    open_server(0);
    assert(pf_loop_wake(loop) == 0 && pf_loop_wake(loop) == 0);
    expect_event(PF_EVENT_WOKEN, NULL);
    quiet(0);
    assert(write(pf_loop_wake_fileno(loop), "", 1) == 1);
    expect_event(PF_EVENT_WOKEN, NULL);
    close_server();
}

static void
a_wake_that_finds_the_batch_full_comes_with_the_next(void)
{
    open_server(0);
    int peer = connected_peer();
    quiet(0);
    say(peer, GET);
    assert(pf_loop_wake(loop) == 0);
    pf_request *r = next_request();
    expect_event(PF_EVENT_WOKEN, NULL);
    answer(r, "x");
    hear_answer(peer);
    close(peer);
    close_server();
}

static void
a_watched_descriptor_is_told_for_as_long_as_it_can_be_read(void)
{
    int ends[2];
    assert(pipe2(ends, O_CLOEXEC) == 0);
    open_server(0);
    assert(pf_loop_watch(loop, ends[0]) == 0);
    quiet(0);
    assert(write(ends[1], "x", 1) == 1);
    for (int i = 0; i < 2; i++) {
        pf_event event = next_event();
        assert(event.flags == PF_EVENT_READABLE && event.code == ends[0]);
    }
    assert(pf_loop_unwatch(loop, ends[0]) == 0);
    assert(pf_loop_unwatch(loop, ends[0]) == -ENOENT);
    quiet(0);
    assert(pf_loop_watch(loop, ends[0]) == 0); /* close takes it along */
    close_server();
    close(ends[0]);
    close(ends[1]);
}

static bool
readable_within(int fd, int timeout_ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, timeout_ms) == 1;
}

static void
inside_another_loop_its_descriptor_tells_requests_and_deadlines(void)
{
    options.header_timeout_ms = SHORT_MS;
    open_server(0);
    assert(!readable_within(pf_loop_fileno(loop), 0));
    int peer = peer_saying(GET);
    assert(readable_within(pf_loop_fileno(loop), SOON_MS));
    answer(next_request(), "x");
    assert(pf_loop_ready(loop));
    quiet(0);
    hear_answer(peer);
    begin_timing();
    say(peer, "GET");
    assert(readable_within(pf_loop_fileno(loop), SOON_MS));
    quiet(0);
    assert(!readable_within(pf_loop_fileno(loop), 0) && !pf_loop_ready(loop));
    assert(readable_within(pf_loop_fileno(loop), SOON_MS));
    quiet(0);
    took_a_short_time();
    assert(recv(peer, heard, sizeof heard, MSG_DONTWAIT) > 0);
    assert(strncmp(heard, "HTTP/1.1 408 ", 13) == 0);
    close(peer);
    close_server();
}

static int64_t
cpu_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void
a_deadline_that_was_told_does_not_keep_the_loop_awake(void)
{
    options.header_timeout_ms = SHORT_MS;
    open_server(0);
    int peer = connected_peer();
    quiet(0);
    assert(readable_within(pf_loop_fileno(loop), SOON_MS));
    int64_t before = cpu_ms();
    quiet(5 * SHORT_MS);
    assert(cpu_ms() - before < SHORT_MS / 2);
    close(peer);
    close_server();
}

/* ---- notices ------------------------------------------------------------------------*/
static void
notices_tell_the_life_of_a_connection(void)
{
    static const int expected[] = {PF_NOTICE_NEW,   PF_NOTICE_ACTIVE,
                                   PF_NOTICE_IDLE,  PF_NOTICE_ACTIVE,
                                   PF_NOTICE_ERROR, PF_NOTICE_CLOSED};
    pf_notice notices[8];
    open_server(PF_OPTION_NOTICES);
    int peer = peer_saying(GET);
    answer(next_request(), "x");
    hear_answer(peer);
    say(peer, "BAD\r\n\r\n");
    hear_answer(peer);
    close(peer);
    turn_until(nobody_is_connected);
    assert(pf_loop_notices(loop, notices, 8) == 6);
    for (int i = 0; i < 6; i++) {
        assert(notices[i].kind == expected[i] && notices[i].peer.family == AF_INET);
        assert(notices[i].connection == notices[0].connection);
    }
    assert(notices[4].code == PF_ERR_METHOD);
    close_server();
}

static void
notices_taken_one_by_one_do_not_pile_up(void)
{
    pf_conn nobody = {0};
    pf_notice notice;
    open_server(PF_OPTION_NOTICES);
    pf__notices_add(loop, &nobody, PF_NOTICE_NEW, 0);
    for (int i = 1; i < 10000; i++) {
        pf__notices_add(loop, &nobody, PF_NOTICE_NEW, i);
        assert(pf_loop_notices(loop, &notice, 1) == 1 && notice.code == i - 1);
    }
    assert(loop->notices.cap <= 128);
    close_server();
}

int
main(void)
{
    pf_options_init(&options);
    for (int i = 0; i < 3; i++)
        for (size_t k = 0; k < LARGE; k++)
            large[i][k] = (char)((k >> 8) * 31 + k + (size_t)i);

    a_request_becomes_an_event_and_its_answer_reaches_the_peer();
    an_idle_connection_holds_no_buffer();
    many_idle_connections_hold_no_buffer();
    an_answer_in_pieces_is_framed_by_its_length();
    a_whole_body_ends_an_answer_that_was_begun();
    an_answer_of_unknown_length_is_chunked();
    an_answer_of_unknown_length_to_http_1_0_ends_with_its_connection();
    an_answer_to_head_has_no_body_and_claims_no_empty_one();
    an_answer_can_be_begun_anew_until_it_is_sent();
    an_unfinished_head_is_not_sent();
    a_body_shorter_than_its_length_closes_the_connection();
    trailers_come_behind_the_body_to_who_takes_them();
    trailers_are_dropped_for_who_does_not_take_them();
    an_interim_answer_comes_before_the_answer();
    both_ends_of_a_connection_are_told();
    our_end_of_a_connection_is_asked_for_once();
    our_end_of_a_lost_connection_is_not_known();

    sixteen_pipelined_requests_are_answered_in_one_write();
    a_slow_handler_does_not_hold_back_what_is_flushed();
    valid_requests_are_answered_before_the_refusal_of_another();
    a_peer_that_reads_no_answers_gets_no_more_requests_served();
    a_connection_is_closed_behind_its_last_request();
    without_keep_alive_every_answer_closes();
    a_peer_that_has_finished_sending_is_answered();

    a_body_is_gathered_before_its_request_is_lent();
    a_large_body_is_gathered_whole();
    a_streamed_body_comes_as_it_arrives();
    a_body_wanted_whole_comes_once();
    a_streamed_body_fills_no_more_than_its_window();
    a_body_that_is_done_can_be_wanted_again();
    a_short_unread_body_is_dropped_and_the_next_request_served();
    a_long_unread_body_closes_the_connection();
    a_body_that_breaks_its_framing_stays_broken();
    a_body_that_ends_early_is_told_to_its_holder();
    a_limit_counts_payload_and_not_its_framing();
    a_limit_holds_for_what_is_still_to_come();

    a_peer_that_waits_is_told_to_continue_when_its_body_is_wanted();
    a_peer_that_waits_and_is_answered_at_once_is_closed();
    a_body_that_came_unasked_is_taken_without_100();
    a_100_does_not_break_a_head_that_is_begun();

    three_large_borrowed_bodies_reach_a_slow_reader();
    a_borrowed_body_between_copied_ones_keeps_its_place();
    an_answer_in_one_call_borrows_what_pays();
    a_small_or_dropped_body_is_not_borrowed();
    a_reset_releases_each_body_once();
    a_reset_during_a_loan_releases_and_is_told();
    an_abort_sends_what_is_queued_and_releases_it();
    room_is_told_when_little_is_pending();
    the_end_is_told_to_who_wants_to_know_and_the_answer_still_goes_out();
    the_end_is_not_told_of_a_loan_that_is_over();
    a_head_begun_behind_a_slow_answer_stays_whole();
    a_long_stream_keeps_little_in_memory();

    an_abort_before_the_head_is_sent_sends_nothing();
    an_aborted_chunked_answer_lacks_its_end();
    an_aborted_answer_that_ends_with_its_connection_is_reset();

    no_event_of_a_loan_outlives_it();
    no_event_of_an_aborted_loan_outlives_it();
    no_event_of_a_lost_connection_outlives_its_loan();
    events_carry_what_was_set_with_their_loan();

    a_refusal_reaches_a_peer_that_is_still_sending();
    a_refused_request_can_be_lent_for_its_answer();
    the_body_of_a_refused_request_has_ended();
    only_get_and_head_are_served_where_that_is_asked();
    a_body_over_the_limit_is_refused_before_it_is_read();

    a_connection_without_a_whole_head_gets_408();
    bytes_now_and_then_do_not_prolong_a_head();
    a_gathered_body_that_stalls_gets_408();
    a_body_below_the_least_rate_gets_408();
    a_streamed_body_that_stalls_is_told_to_its_holder();
    nothing_times_out_while_a_handler_works();
    an_idle_connection_is_closed_without_a_word();
    a_peer_that_stops_reading_is_reset();
    a_peer_that_does_not_close_after_a_refusal_is_closed();
    an_unread_body_that_never_comes_is_given_up();
    an_unread_body_that_has_ended_early_is_given_up();

    without_descriptors_accepting_is_paused_and_nobody_lost();
    one_connection_too_many_gets_503();
    one_connection_too_many_of_an_address_gets_429();
    connections_of_a_unix_socket_have_no_address_to_count();

    a_drain_with_nothing_open_is_done_at_once();
    a_drain_gives_idle_connections_a_while();
    a_request_that_comes_in_a_drain_is_the_last();
    a_drain_waits_for_loans();
    what_is_half_said_has_no_longer_than_the_drain();
    a_handler_that_waits_for_its_body_hears_that_a_drain_does_not();
    a_handler_that_is_not_waiting_is_not_hurried_by_a_drain();
    who_is_kept_in_a_drain_is_told_when_that_ends();
    what_was_said_in_time_is_heard_although_the_loop_is_late();
    a_drain_is_done_when_the_loan_of_a_lost_peer_ends();
    a_second_drain_closes_idle_connections_at_once();
    a_sweep_serves_who_is_waiting_in_the_queue();

    what_is_on_loan_stays_readable_after_close();
    a_loop_closes_what_it_has_in_every_phase();
    a_request_that_was_not_handed_out_is_no_loan();
    a_loop_with_wrong_options_is_not_opened();

    any_thread_can_end_the_wait();
    a_wake_before_the_wait_ends_it();
    a_wake_that_finds_the_batch_full_comes_with_the_next();
    a_watched_descriptor_is_told_for_as_long_as_it_can_be_read();
    inside_another_loop_its_descriptor_tells_requests_and_deadlines();
    a_deadline_that_was_told_does_not_keep_the_loop_awake();

    notices_tell_the_life_of_a_connection();
    notices_taken_one_by_one_do_not_pile_up();
    return 0;
}
