/* test_response.c - the bytes of an answer: framing, field checks, Date. */
#define _GNU_SOURCE
#undef NDEBUG
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>

static const time_t MOMENT = 784111777; /* Sun, 06 Nov 1994 08:49:37 GMT */

static pf__pool pool;
static pf__buffer out;
static pf__stamp stamp;
static pf_options options;

static void
open_stamp(void)
{
    pf_options_init(&options);
    options.server = "test";
    options.content_type = "text/plain";
    pf__response_stamp_init(&stamp, &options);
    pf__response_stamp_update(&stamp, MOMENT);
}

static void
empty(void)
{
    pf__buffer_release(&pool, &out);
}

#define STAMP "Server: test\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
#define TYPE "Content-Type: text/plain\r\n"

static bool
out_is(const char *expected)
{
    bool same = out.len == strlen(expected) && memcmp(out.data, expected, out.len) == 0;
    if (!same)
        fprintf(stderr, "expected:\n%s\nwritten:\n%.*s\n", expected, (int)out.len,
                out.data);
    empty();
    return same;
}

static bool
out_has(const char *part)
{
    return memmem(out.data, out.len, part, strlen(part)) != NULL;
}

static int
field(pf__answer *a, const char *name, const char *value)
{
    return pf__response_field(&pool, &out, a, name, strlen(name), value, strlen(value));
}

static int
begin(pf__answer *a, int status, int64_t length)
{
    return pf__response_begin(&pool, &out, a, status, NULL, 0, length);
}

static void
seal(pf__answer *a)
{
    assert(pf__response_seal(&pool, &out, a, &stamp) == 0);
}

static void
begin_sealed(pf__answer *a, int status, int64_t length)
{
    assert(begin(a, status, length) == 0);
    seal(a);
}

/* ---- framing ------------------------------------------------------------------------*/
#define LENGTH_5 "Content-Length: 5\r\n"
#define CHUNKED "Transfer-Encoding: chunked\r\n"
#define CLOSE "Connection: close\r\n"

static const struct framing {
    int status, minor;
    bool head;
    int64_t length;
    const char *fields; /* behind the stamp */
    unsigned flags;     /* PF__ANSWER_* that say how the body goes */
} framings[] = {
    {200, 1, false, 5, TYPE LENGTH_5, 0},
    {200, 1, false, 0, "Content-Length: 0\r\n", 0},
    {200, 1, false, -1, TYPE CHUNKED, PF__ANSWER_CHUNKED},
    {200, 1, true, 5, TYPE LENGTH_5, PF__ANSWER_NO_BODY},
    {200, 1, true, -1, TYPE CHUNKED, PF__ANSWER_NO_BODY},
    {200, 0, false, 5, TYPE LENGTH_5, 0},
    {200, 0, false, -1, TYPE CLOSE, PF__ANSWER_CLOSE},
    {200, 0, true, 5, TYPE LENGTH_5, PF__ANSWER_NO_BODY},
    {200, 0, true, -1, TYPE, PF__ANSWER_NO_BODY},
    {204, 1, false, 5, "", PF__ANSWER_NO_BODY},
    {204, 1, false, -1, "", PF__ANSWER_NO_BODY},
    {204, 0, true, 0, "", PF__ANSWER_NO_BODY},
    {304, 1, false, 5, "", PF__ANSWER_NO_BODY},
    {304, 1, false, -1, "", PF__ANSWER_NO_BODY},
    {404, 1, false, 5, TYPE LENGTH_5, 0},
};

enum {
    NFRAMINGS = sizeof framings / sizeof *framings,
    BODY_FLAGS = PF__ANSWER_CHUNKED | PF__ANSWER_NO_BODY | PF__ANSWER_CLOSE,
};

static void
framing_follows_status_version_and_method(void)
{
    for (int i = 0; i < NFRAMINGS; i++) {
        const struct framing *f = &framings[i];
        pf__answer a = {.minor = (uint8_t)f->minor, .head = f->head};
        char expected[512];
        begin_sealed(&a, f->status, f->length);
        snprintf(expected, sizeof expected, "HTTP/1.1 %d %s\r\n" STAMP "%s\r\n",
                 f->status, pf__response_reason(f->status), f->fields);
        assert(out_is(expected));
        assert((a.flags & BODY_FLAGS) == f->flags);
    }
}

static void
a_304_repeats_the_length_that_the_app_gives(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 304, -1) == 0 && field(&a, "Content-Length", "5") == 0);
    seal(&a);
    assert(out_is("HTTP/1.1 304 Not Modified\r\n" STAMP LENGTH_5 "\r\n"));
}

static void
a_204_carries_no_length_even_if_the_app_gives_one(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 204, -1) == 0 && field(&a, "Content-Length", "0") == 0);
    seal(&a);
    assert(out_is("HTTP/1.1 204 No Content\r\n" STAMP "\r\n"));
}

static void
a_length_of_the_app_frames_the_body(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, -1) == 0 && field(&a, "content-length", "5") == 0);
    seal(&a);
    assert(a.length == 5);
    assert(out_is("HTTP/1.1 200 OK\r\n" STAMP TYPE LENGTH_5 "\r\n"));
}

static void
what_becomes_of_the_connection_is_announced(void)
{
    pf__answer close = {.minor = 1, .flags = PF__ANSWER_CLOSE};
    begin_sealed(&close, 200, 5);
    assert(out_has("\r\n" CLOSE "\r\n"));
    empty();
    pf__answer keep = {.minor = 0, .flags = PF__ANSWER_KEEP};
    begin_sealed(&keep, 200, 5);
    assert(out_has("\r\nConnection: keep-alive\r\n\r\n"));
    empty();
    pf__answer endless = {.minor = 0, .flags = PF__ANSWER_KEEP};
    begin_sealed(&endless, 200, -1);
    assert(out_has("\r\n" CLOSE "\r\n") && !out_has("keep-alive"));
    empty();
}

static void
an_app_may_close_and_nothing_else_about_the_connection(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, 0) == 0);
    assert(field(&a, "Connection", "keep-alive") == PF_ERR_APP_HOP_BY_HOP);
    assert(field(&a, "Connection", "upgrade") == PF_ERR_APP_HOP_BY_HOP);
    assert(!(a.flags & PF__ANSWER_CLOSE));
    assert(field(&a, "Connection", "Close") == 0 && (a.flags & PF__ANSWER_CLOSE));
    seal(&a);
    assert(out_is("HTTP/1.1 200 OK\r\n" STAMP "Content-Length: 0\r\n" CLOSE "\r\n"));
}

/* ---- fields -------------------------------------------------------------------------*/
static void
fields_are_written_as_given(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, 5) == 0);
    assert(field(&a, "X-Thing", "a \"b\"\tc\xe9") == 0);
    assert(field(&a, "set-cookie", "") == 0 && field(&a, "set-cookie", "x") == 0);
    seal(&a);
    assert(out_is("HTTP/1.1 200 OK\r\n"
                  "X-Thing: a \"b\"\tc\xe9\r\nset-cookie: \r\nset-cookie: x\r\n" STAMP
                      TYPE LENGTH_5 "\r\n"));
}

static void
fields_of_the_app_replace_those_of_the_server(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, 5) == 0);
    assert(field(&a, "DATE", "d") == 0 && field(&a, "Server", "s") == 0);
    assert(field(&a, "content-type", "t") == 0);
    seal(&a);
    assert(
        out_is("HTTP/1.1 200 OK\r\nDATE: d\r\nServer: s\r\ncontent-type: t\r\n" LENGTH_5
               "\r\n"));
    a = (pf__answer){.minor = 1};
    assert(begin(&a, 200, 0) == 0 && field(&a, "Date", "d") == 0);
    seal(&a);
    assert(out_is("HTTP/1.1 200 OK\r\nDate: d\r\nServer: test\r\n"
                  "Content-Length: 0\r\n\r\n"));
    a = (pf__answer){.minor = 1};
    assert(begin(&a, 200, 0) == 0 && field(&a, "Server", "s") == 0);
    seal(&a);
    assert(out_is("HTTP/1.1 200 OK\r\nServer: s\r\n"
                  "Date: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 0\r\n\r\n"));
}

/* No byte gets through that could end a line, and none of those that are allowed is
 * refused; nothing is written of a field that is refused. */
static void
every_byte_of_a_field_is_checked(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, 5) == 0);
    size_t before = out.len;
    for (int c = 0; c < 256; c++) {
        char text[] = {'x', (char)c, 'x'};
        bool token = pf__scan_is((char)c, PF__CHAR_TOKEN);
        bool value = pf__scan_is((char)c, PF__CHAR_VALUE);
        assert(pf__response_field(&pool, &out, &a, text, 3, "v", 1)
               == (token ? 0 : PF_ERR_APP_FIELD_NAME));
        assert((out.len != before) == token);
        out.len = before;
        assert(pf__response_field(&pool, &out, &a, "n", 1, text, 3)
               == (value ? 0 : PF_ERR_APP_FIELD_VALUE));
        assert((out.len != before) == value);
        out.len = before;
    }
    assert(field(&a, "", "v") == PF_ERR_APP_FIELD_NAME);
    empty();
}

static void
hop_by_hop_fields_are_the_servers(void)
{
    static const char *const names[] = {"Transfer-Encoding", "Keep-Alive", "Upgrade",
                                        "Proxy-Connection",  "TE",         "Trailer"};
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, 5) == 0);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        assert(field(&a, names[i], "x") == PF_ERR_APP_HOP_BY_HOP);
    assert(out_is("HTTP/1.1 200 OK\r\n"));
}

/* An app can be told at once, before an answer is begun. */
static void
a_field_is_checked_alone_as_in_an_answer(void)
{
    static const struct {
        const char *name, *value;
    } fields[] = {
        {"X-Mine", "v"},           {"", "v"},
        {"X Mine", "v"},           {"X-Mine", "a\r\nb"},
        {"Connection", "close"},   {"connection", "keep-alive"},
        {"Upgrade", "h2c"},        {"Content-Length", "5"},
        {"Content-Length", "+5"},  {"Content-Length", ""},
        {"Transfer-Encoding", ""}, {"Content-Type", "a/b"},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const char *name = fields[i].name, *value = fields[i].value;
        pf__answer a = {.minor = 1};
        assert(begin(&a, 200, -1) == 0);
        int rc = field(&a, name, value);
        assert(pf_response_check_field(name, strlen(name), value, strlen(value)) == rc);
        empty();
    }
}

/* Whatever the answer: what was prepared does what the field would have done. */
static void
a_prepared_field_is_put_as_the_field_is(void)
{
    static const char *const fields[][2] = {
        {"X-Mine", "v"},       {"Date", "d"},           {"Server", "s"},
        {"Content-Type", "t"}, {"Connection", "close"}, {"Content-Length", "5"},
        {"X-Empty", ""},       {"content-length", "7"}, {"Sec-WebSocket-Accept", "a"},
    };
    static const pf__answer answers[] = {
        {.minor = 1, .status = 200, .length = -1},
        {.minor = 1, .status = 200, .length = 5},
        {.minor = 1, .status = 200, .length = 5, .flags = PF__ANSWER_LENGTH},
        {.minor = 1, .status = 304, .length = -1},
        {.minor = 0, .status = 200, .length = 0, .head = true},
        {.minor = 1, .status = 101, .length = 0},
        {.minor = 1, .status = 200, .length = -1, .flags = PF__ANSWER_SEALED},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        char text[64];
        size_t name_len = strlen(fields[i][0]), value_len = strlen(fields[i][1]);
        snprintf(text, sizeof text, "%s: %s\r\n", fields[i][0], fields[i][1]);
        pf_line line;
        assert(pf_response_prepare(&line, text, name_len, value_len) == 0);
        for (size_t k = 0; k < sizeof answers / sizeof *answers; k++) {
            pf__answer one = answers[k], other = answers[k];
            one.flags |= PF__ANSWER_BEGUN;
            other.flags |= PF__ANSWER_BEGUN;
            int rc = field(&one, fields[i][0], fields[i][1]);
            char written[64];
            size_t len = out.len;
            if (len > 0)
                memcpy(written, out.data, len);
            empty();
            assert(pf__response_line(&pool, &out, &other, &line) == rc);
            assert(out.len == len);
            assert(len == 0 || memcmp(out.data, written, len) == 0);
            assert(one.flags == other.flags && one.length == other.length);
            empty();
        }
    }
}

static void
what_depends_on_its_answer_is_not_prepared(void)
{
    pf_line line;
    assert(pf_response_prepare(&line, "Trailer: x\r\n", 7, 1) == PF_ERR_APP_HOP_BY_HOP);
    assert(pf_response_prepare(&line, "Upgrade: x\r\n", 7, 1) == PF_ERR_APP_HOP_BY_HOP);
    assert(pf_response_prepare(&line, "X: a\nb\r\n", 1, 3) == PF_ERR_APP_FIELD_VALUE);
    assert(pf_response_prepare(&line, ": v\r\n", 0, 1) == PF_ERR_APP_FIELD_NAME);
    assert(pf_response_prepare(&line, "Content-Length: x\r\n", 14, 1)
           == PF_ERR_APP_LENGTH);
}

static void
contradictory_lengths_are_refused(void)
{
    static const char *const wrong[] = {"", "+5", "05", "5,5", "abc", "-1"};
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, 5) == 0);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert(field(&a, "Content-Length", wrong[i]) == PF_ERR_APP_LENGTH);
    assert(field(&a, "Content-Length", "6") == PF_ERR_APP_LENGTH);
    assert(field(&a, "Content-Length", "5") == 0);
    assert(field(&a, "Content-Length", "5") == PF_ERR_APP_LENGTH);
    empty();
    a = (pf__answer){.minor = 1, .head = true};
    assert(begin(&a, 200, 0) == 0); /* the empty body of HEAD says nothing of GET's */
    assert(field(&a, "Content-Length", "5") == 0 && a.length == 5);
    empty();
}

/* ---- order --------------------------------------------------------------------------*/
static void
calls_out_of_order_are_refused(void)
{
    pf__answer a = {.minor = 1};
    assert(field(&a, "X", "y") == PF_ERR_STATE);
    assert(begin(&a, 200, 5) == 0 && begin(&a, 200, 5) == PF_ERR_STATE);
    assert(pf__response_whole(&pool, &out, &a, 200, &stamp, NULL, 0, "x", 1, true)
           == PF_ERR_STATE);
    seal(&a);
    assert(field(&a, "X", "y") == PF_ERR_STATE);
    empty();
}

static void
a_status_that_is_none_is_refused(void)
{
    static const int wrong[] = {-1, 0, 99, 100, 101, 199, 1000, 20000};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        pf__answer a = {.minor = 1};
        assert(begin(&a, wrong[i], 5) == PF_ERR_APP_STATUS);
        assert(
            pf__response_whole(&pool, &out, &a, wrong[i], &stamp, NULL, 0, "", 0, true)
            == PF_ERR_APP_STATUS);
        assert(out.len == 0 && !(a.flags & PF__ANSWER_BEGUN));
    }
}

static void
a_status_without_a_name_keeps_its_space(void)
{
    pf__answer a = {.minor = 1};
    begin_sealed(&a, 299, 0);
    assert(out_is("HTTP/1.1 299 \r\n" STAMP "Content-Length: 0\r\n\r\n"));
}

static void
an_answer_goes_behind_what_is_queued(void)
{
    pf__answer first = {.minor = 1}, second = {.minor = 1};
    begin_sealed(&first, 204, 0);
    size_t end = out.len;
    assert(begin(&second, 204, 0) == 0 && second.mark == end);
    empty();
}

/* ---- in one go ----------------------------------------------------------------------*/
static char *
pieces(int status, const pf__answer *template, const char *body, size_t len)
{
    char *text;
    pf__answer a = *template;
    begin_sealed(&a, status, (int64_t)len);
    bool bodiless = a.flags & PF__ANSWER_NO_BODY;
    assert(asprintf(&text, "%.*s%.*s", (int)out.len, out.data, bodiless ? 0 : (int)len,
                    body)
           >= 0);
    empty();
    return text;
}

static void
whole_and_in_pieces_are_the_same_bytes(void)
{
    static const int statuses[] = {200, 201, 204, 299, 304, 404, 500};
    static const unsigned flags[] = {0, PF__ANSWER_CLOSE, PF__ANSWER_KEEP};
    static const char *const bodies[] = {"", "hello"};
    for (unsigned i = 0; i < 7 * 3 * 2 * 2 * 2; i++) {
        const char *body = bodies[i % 2];
        pf__answer a = {
            .minor = i / 2 % 2, .head = i / 4 % 2, .flags = (uint16_t)flags[i / 8 % 3]};
        int status = statuses[i / 24];
        char *expected = pieces(status, &a, body, strlen(body));
        assert(pf__response_whole(&pool, &out, &a, status, &stamp, NULL, 0, body,
                                  strlen(body), true)
               == 0);
        assert(a.flags & PF__ANSWER_SEALED && out_is(expected));
        free(expected);
    }
}

static void
a_type_is_the_one_given_or_none_if_that_is_empty(void)
{
    pf__answer a = {.minor = 1}, b = {.minor = 1};
    assert(pf__response_whole(&pool, &out, &a, 200, &stamp, "a/b", 3, "hello", 5, true)
           == 0);
    assert(out_is("HTTP/1.1 200 OK\r\n" STAMP "Content-Type: a/b\r\n" LENGTH_5
                  "\r\nhello"));
    assert(pf__response_whole(&pool, &out, &b, 200, &stamp, "", 0, "hello", 5, true)
           == 0);
    assert(out_is("HTTP/1.1 200 OK\r\n" STAMP LENGTH_5 "\r\nhello"));
}

static void
a_type_with_a_line_end_is_refused(void)
{
    pf__answer a = {.minor = 1};
    assert(pf__response_whole(&pool, &out, &a, 200, &stamp, "a\r\nX: y", 7, "", 0, true)
           == PF_ERR_APP_FIELD_VALUE);
    assert(out.len == 0);
}

static void
a_borrowed_body_is_left_to_its_owner(void)
{
    pf__answer a = {.minor = 1};
    assert(pf__response_whole(&pool, &out, &a, 200, &stamp, NULL, 0, "hello", 5, false)
           == 0);
    assert(out_is("HTTP/1.1 200 OK\r\n" STAMP TYPE LENGTH_5 "\r\n"));
}

static void
no_body_needs_no_pointer(void)
{
    pf__answer a = {.minor = 1};
    assert(pf__response_whole(&pool, &out, &a, 200, &stamp, NULL, 0, NULL, 0, true)
           == 0);
    assert(out_is("HTTP/1.1 200 OK\r\n" STAMP "Content-Length: 0\r\n\r\n"));
}

/* ---- the stamp ----------------------------------------------------------------------*/
static void
a_date_is_an_imf_fixdate(void)
{
    time_t second = 0;
    for (int i = 0; i < 2000; i++, second += 5000000 + i * 7919) {
        char expected[64];
        struct tm tm;
        pf__response_stamp_update(&stamp, second);
        gmtime_r(&second, &tm);
        strftime(expected, sizeof expected, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", &tm);
        size_t len = strlen(expected);
        assert(stamp.len == stamp.server_len + len);
        assert(memcmp(stamp.text + stamp.server_len, expected, len) == 0);
    }
    pf__response_stamp_update(&stamp, MOMENT);
}

static void
without_server_date_and_type_none_is_written(void)
{
    pf__answer a = {.minor = 1};
    options.server = options.content_type = NULL;
    options.flags |= PF_OPTION_NO_DATE;
    pf__response_stamp_init(&stamp, &options);
    pf__response_stamp_update(&stamp, MOMENT);
    begin_sealed(&a, 200, 5);
    assert(out_is("HTTP/1.1 200 OK\r\n" LENGTH_5 "\r\n"));
    open_stamp();
}

static void
a_long_server_or_type_is_cut_and_still_a_line(void)
{
    char text[400];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    options.server = options.content_type = text;
    pf__response_stamp_init(&stamp, &options);
    pf__response_stamp_update(&stamp, MOMENT);
    assert(stamp.len < sizeof stamp.text && stamp.type_len < sizeof stamp.type);
    assert(memcmp(stamp.text + stamp.server_len - 2, "\r\nDate: ", 8) == 0);
    assert(memcmp(stamp.text + stamp.len - 6, " GMT\r\n", 6) == 0);
    assert(memcmp(stamp.type + stamp.type_len - 2, "\r\n", 2) == 0);
    open_stamp();
}

/* ---- fields behind the body ---------------------------------------------------------*/
static int
trailer(pf__answer *a, const char *name, const char *value)
{
    size_t name_len = strlen(name), len = strlen(value);
    int rc = pf__response_check_trailer(name, name_len, value, len);
    if (rc == 0)
        rc = pf__response_trailer(&pool, &out, a, name, name_len, value, len);
    return rc;
}

static void
an_answer_with_trailers_is_chunked_whatever_its_length(void)
{
    for (int64_t length = -1; length <= 1; length++) {
        pf__answer a = {.minor = 1};
        assert(begin(&a, 200, length) == 0 && pf__response_announce_trailers(&a));
        assert(field(&a, "Trailer", "X") == 0);
        seal(&a);
        assert(out_has("\r\nTrailer: X\r\n") && out_has("\r\n" CHUNKED "\r\n"));
        assert(!out_has("Content-Length") && a.flags & PF__ANSWER_CHUNKED);
        empty();
    }
}

static void
trailers_have_no_place_where_there_are_no_chunks(void)
{
    static const pf__answer without[] = {
        {.minor = 0, .status = 200},
        {.minor = 1, .status = 200, .head = true},
        {.minor = 1, .status = 204},
        {.minor = 1, .status = 304},
    };
    for (size_t i = 0; i < sizeof without / sizeof *without; i++) {
        pf__answer a = without[i];
        int status = a.status;
        assert(begin(&a, status, -1) == 0 && !pf__response_announce_trailers(&a));
        assert(field(&a, "Trailer", "X") == PF_ERR_APP_HOP_BY_HOP);
        seal(&a);
        empty();
        assert(trailer(&a, "X", "y") == 0 && out.len == 0);
    }
}

static void
trailers_stand_between_the_last_chunk_and_an_empty_line(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, -1) == 0 && pf__response_announce_trailers(&a));
    seal(&a);
    empty();
    assert(trailer(&a, "X", "y") == 0 && trailer(&a, "Empty", "") == 0);
    assert(pf__response_end_chunks(&pool, &out, &a) == 0);
    assert(out_is("0\r\nX: y\r\nEmpty: \r\n\r\n"));
}

static void
trailers_that_nobody_announced_are_dropped(void)
{
    pf__answer a = {.minor = 1};
    begin_sealed(&a, 200, -1);
    empty();
    assert(trailer(&a, "X", "y") == 0);
    assert(pf__response_end_chunks(&pool, &out, &a) == 0);
    assert(out_is("0\r\n\r\n"));
}

static void
no_trailer_comes_before_the_whole_of_a_body_whose_length_is_known(void)
{
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, 5) == 0 && pf__response_announce_trailers(&a));
    seal(&a);
    a.written = 4;
    assert(trailer(&a, "X", "y") == PF_ERR_APP_BODY_SHORT);
    a.written = 5;
    assert(trailer(&a, "X", "y") == 0);
    empty();
}

/* RFC 9110 6.5.1. */
static void
what_frames_routes_authenticates_or_is_decided_is_no_trailer(void)
{
    static const char *const names[] = {
        "Content-Length", "transfer-encoding",
        "Trailer",        "TE",
        "Host",           "Content-Type",
        "Content-Range",  "Content-Encoding",
        "Cache-Control",  "Authorization",
        "Set-Cookie",     "WWW-Authenticate",
        "Date",           "Expires",
        "Location",       "Retry-After",
        "Vary",           "Age",
        "Connection",     "Max-Forwards",
    };
    pf__answer a = {.minor = 1};
    assert(begin(&a, 200, -1) == 0 && pf__response_announce_trailers(&a));
    seal(&a);
    empty();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        assert(trailer(&a, names[i], "x") == PF_ERR_APP_TRAILER);
    assert(trailer(&a, "X Y", "z") == PF_ERR_APP_FIELD_NAME);
    assert(trailer(&a, "X", "y\r\nZ: 1") == PF_ERR_APP_FIELD_VALUE);
    assert(out.len == 0 && trailer(&a, "Server-Timing", "x") == 0);
    empty();
}

/* ---- refusals -----------------------------------------------------------------------*/
static void
check_refusal(int code)
{
    char expected[512];
    int status = pf_error_status(code);
    const char *text = pf_error_text(code);
    assert(pf__response_refusal(&pool, &out, code, true, &stamp) == status);
    size_t head = out.len;
    assert(memcmp(out.data + head - 4, "\r\n\r\n", 4) == 0);
    assert(out_has("\r\n" CLOSE));
    assert(out_has("\r\nAllow: ") == (status == 405));
    assert(out_has("\r\nRetry-After: ") == (status == 429 || status == 503));
    snprintf(expected, sizeof expected, "\r\nContent-Length: %zu\r\n",
             strlen(text) + 1);
    assert(out_has(expected));
    snprintf(expected, sizeof expected, "HTTP/1.1 %d %s\r\n", status,
             pf__response_reason(status));
    assert(memcmp(out.data, expected, strlen(expected)) == 0);
    assert(pf__response_refusal(&pool, &out, code, false, &stamp) == status);
    assert(out.len == 2 * head + strlen(text) + 1);
    assert(memcmp(out.data + 2 * head, text, strlen(text)) == 0);
    empty();
}

static void
every_refusal_is_a_whole_answer_that_says_close(void)
{
#define X(name, code, status, text)                                                    \
    if (status != 0)                                                                   \
        check_refusal(code);
    PF_ERRORS(X)
#undef X
}

static void
every_refusal_has_a_named_status(void)
{
#define X(name, code, status, text)                                                    \
    assert(status == 0 || pf__response_reason(status)[0] != '\0');
    PF_ERRORS(X)
#undef X
}

/* ---- interim answers ----------------------------------------------------------------*/
static bool
valid(const char *fields)
{
    return pf__response_check_fields(fields, strlen(fields)) == 0;
}

static void
interim_fields_are_whole_lines_without_controls(void)
{
    assert(valid(""));
    assert(valid("Link: </a>; rel=preload\r\n"));
    assert(valid("A: b\r\nC:\r\n"));
    static const char *const wrong[] = {
        "A: b",        "A: b\r",    "A: b\n",           "A b\r\n",     ": b\r\n",
        "A : b\r\n",   " A: b\r\n", "A: b\r\n\r\n",     "A: b\rc\r\n", "A: b\r\nC",
        "A: \x01\r\n", "\r\n",      "A: b\r\n c: d\r\n"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert(!valid(wrong[i]));
    assert(pf__response_check_fields("A: \0\r\n", 6) == PF_ERR_APP_FIELD_VALUE);
}

static void
interim_fields_frame_no_body(void)
{
    assert(pf__response_check_fields("content-length: 5\r\n", 19)
           == PF_ERR_APP_HOP_BY_HOP);
    assert(!valid("A: b\r\nTransfer-Encoding: chunked\r\n"));
    assert(!valid("Connection: close\r\n") && valid("Content-Lengthy: 5\r\n"));
}

int
main(void)
{
    open_stamp();
    framing_follows_status_version_and_method();
    a_304_repeats_the_length_that_the_app_gives();
    a_204_carries_no_length_even_if_the_app_gives_one();
    a_length_of_the_app_frames_the_body();
    what_becomes_of_the_connection_is_announced();
    an_app_may_close_and_nothing_else_about_the_connection();
    fields_are_written_as_given();
    fields_of_the_app_replace_those_of_the_server();
    every_byte_of_a_field_is_checked();
    hop_by_hop_fields_are_the_servers();
    a_field_is_checked_alone_as_in_an_answer();
    a_prepared_field_is_put_as_the_field_is();
    what_depends_on_its_answer_is_not_prepared();
    contradictory_lengths_are_refused();
    calls_out_of_order_are_refused();
    a_status_that_is_none_is_refused();
    a_status_without_a_name_keeps_its_space();
    an_answer_goes_behind_what_is_queued();
    whole_and_in_pieces_are_the_same_bytes();
    a_type_is_the_one_given_or_none_if_that_is_empty();
    a_type_with_a_line_end_is_refused();
    a_borrowed_body_is_left_to_its_owner();
    no_body_needs_no_pointer();
    a_date_is_an_imf_fixdate();
    without_server_date_and_type_none_is_written();
    a_long_server_or_type_is_cut_and_still_a_line();
    an_answer_with_trailers_is_chunked_whatever_its_length();
    trailers_have_no_place_where_there_are_no_chunks();
    trailers_stand_between_the_last_chunk_and_an_empty_line();
    trailers_that_nobody_announced_are_dropped();
    no_trailer_comes_before_the_whole_of_a_body_whose_length_is_known();
    what_frames_routes_authenticates_or_is_decided_is_no_trailer();
    every_refusal_is_a_whole_answer_that_says_close();
    every_refusal_has_a_named_status();
    interim_fields_are_whole_lines_without_controls();
    interim_fields_frame_no_body();
    pf__buffer_empty_pool(&pool);
    return 0;
}
