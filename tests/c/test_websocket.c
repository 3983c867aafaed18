/* test_websocket.c - frames in every delivery: whole, byte by byte, in parts that meet
 * every boundary; and what is said to whom breaks a rule.
 */
#undef NDEBUG
#include "internal.h"

#include <stdio.h>

enum { ROOM = 1 << 18, MAX_SIZE = 65536 };

/* ---- a peer's frames ----------------------------------------------------------------*/
typedef struct stream {
    char data[ROOM];
    size_t len;
} stream;

static stream s; /* what the peer sends in a test */

static void
put_frame(int first, const char *data, size_t len)
{
    static const uint8_t key[4] = {0x12, 0x34, 0x56, 0x78};
    char *p = s.data + s.len;
    assert(s.len + len + 14 < ROOM);
    *p++ = (char)first;
    int more = len <= 125 ? 0 : len <= 0xffff ? 2 : 8;
    *p++ = (char)(0x80 | (more == 0 ? (int)len : more == 2 ? 126 : 127));
    for (int i = more; i-- > 0;)
        *p++ = (char)(len >> 8 * i);
    memcpy(p, key, 4);
    pf__payload_mask(p + 4, data, len, key);
    s.len = (size_t)(p + 4 + len - s.data);
}

static void
put(int first, const char *text)
{
    put_frame(first, text, strlen(text));
}

static void
put_raw(const char *bytes, size_t len)
{
    memcpy(s.data + s.len, bytes, len);
    s.len += len;
}

enum {
    TEXT = 0x81,
    BINARY = 0x82,
    CLOSE = 0x88,
    PING = 0x89,
    PONG = 0x8a,
    TEXT_BEGINS = 1,
    GOES_ON = 0,
    ENDS = 0x80,
    RSV1 = 0x40
};

/* ---- every delivery -----------------------------------------------------------------*/
static pf__pool pool;

typedef struct outcome {
    int rc;
    unsigned code;
    size_t used;      /* bytes delivered when it ended */
    pf__buffer heard; /* messages: kind, length, bytes */
    pf__buffer said;  /* what we send */
} outcome;

static void
append(pf__buffer *b, const void *data, size_t len)
{
    assert(pf__buffer_reserve(&pool, b, len + 1) == 0);
    if (len > 0)
        pf__buffer_put(b, data, len);
}

static void
receive_all(pf__websocket *ws, const pf__buffer *in, pf__buffer *heard)
{
    pf_message message;
    while (pf__websocket_take(ws, in, &message)) {
        char head[32];
        int n = snprintf(head, sizeof head,
                         "%c%zu:", message.kind == PF_MESSAGE_TEXT ? 't' : 'b',
                         message.len);
        append(heard, head, (size_t)n);
        append(heard, message.data, message.len);
    }
}

/* Deliver `step` bytes at a time; a buffer that has no room is compacted first, as
 * input.c does. lazy: messages are taken only when the queue is full. */
static outcome
deliver(size_t step, bool lazy, const char *offer)
{
    outcome o = {0};
    pf__deflate deflate = {0};
    if (offer != NULL)
        assert(pf__deflate_accept(&deflate, offer, strlen(offer)));
    pf__websocket *ws = pf__websocket_new(MAX_SIZE, &deflate);
    pf__buffer in = {0};
    size_t raw = 0;
    while (o.rc == PF__WEBSOCKET_HUNGRY && o.used < s.len) {
        size_t n = s.len - o.used < step ? s.len - o.used : step;
        if (in.len > 0 && o.used % 5 == 0)
            pf__websocket_compact(ws, &in, &raw);
        append(&in, s.data + o.used, n);
        o.used += n;
        do {
            o.rc = pf__websocket_parse(ws, &pool, &in, &raw, &o.said);
            if (!lazy || o.rc == PF__WEBSOCKET_FULL)
                receive_all(ws, &in, &o.heard);
        } while (o.rc == PF__WEBSOCKET_FULL);
    }
    receive_all(ws, &in, &o.heard);
    if (o.rc < 0)
        pf__websocket_fail(ws, &pool, &o.said, o.rc);
    o.code = ws->code;
    pf__buffer_release(&pool, &in);
    pf__websocket_free(ws, &pool);
    return o;
}

static void
check_same(const pf__buffer *a, const pf__buffer *b)
{
    assert(a->len == b->len && (a->len == 0 || memcmp(a->data, b->data, a->len) == 0));
}

static void
drop(outcome *o)
{
    pf__buffer_release(&pool, &o->heard);
    pf__buffer_release(&pool, &o->said);
}

/* What comes of the stream, which is then empty. */
static outcome
run_with(const char *offer)
{
    outcome whole = deliver(s.len, false, offer);
    for (size_t step = 1; step < 40 && step < s.len; step += 1 + step / 3)
        for (int lazy = 0; lazy < 2; lazy++) {
            outcome o = deliver(step, lazy, offer);
            assert(o.rc == whole.rc && o.code == whole.code);
            check_same(&o.heard, &whole.heard);
            check_same(&o.said, &whole.said);
            drop(&o);
        }
    s.len = 0;
    return whole;
}

static void
expect_with(const char *offer, int rc, unsigned code, const char *heard,
            const char *said, size_t said_len)
{
    outcome o = run_with(offer);
    if (o.rc != rc || o.code != code)
        fprintf(stderr, "%d, code %u; not %d, code %u\n", o.rc, o.code, rc, code);
    assert(o.rc == rc && o.code == code);
    assert(o.heard.len == strlen(heard));
    assert(o.heard.len == 0 || memcmp(o.heard.data, heard, o.heard.len) == 0);
    assert(said == NULL || (o.said.len == said_len));
    assert(said == NULL || said_len == 0 || memcmp(o.said.data, said, said_len) == 0);
    drop(&o);
}

#define SAID(text) text, sizeof text - 1

static void
expect(int rc, unsigned code, const char *heard, const char *said, size_t said_len)
{
    expect_with(NULL, rc, code, heard, said, said_len);
}

static void
expect_heard(const char *heard)
{
    expect(PF__WEBSOCKET_HUNGRY, 0, heard, SAID(""));
}

static void
expect_failure(int error, unsigned code, const char *heard)
{
    expect(error, code, heard, NULL, 0);
}

/* ---- what is good -------------------------------------------------------------------*/
static void
check_messages(void)
{
    put(TEXT, "Hello");
    put(BINARY, "\x01\xff");
    put(TEXT, "");
    expect_heard("t5:Hellob2:\x01\xfft0:");
    put(TEXT_BEGINS, "Hel");
    put(GOES_ON, "");
    put(ENDS, "lo");
    put(TEXT, "!");
    expect_heard("t5:Hellot1:!");
    for (int i = 0; i < 100; i++)
        put(TEXT, "again");
    outcome o = run_with(NULL);
    assert(o.rc == 0 && o.heard.len == 100 * strlen("t5:again"));
    drop(&o);
}

static void
check_lengths(void)
{
    static char data[MAX_SIZE];
    static const size_t lengths[] = {125, 126, 127, 65535, 65536};
    memset(data, 'x', sizeof data);
    for (int i = 0; i < 5; i++) {
        char head[32];
        put_frame(BINARY, data, lengths[i]);
        outcome o = run_with(NULL);
        int n = snprintf(head, sizeof head, "b%zu:", lengths[i]);
        assert(o.rc == 0 && o.heard.len == (size_t)n + lengths[i]);
        assert(memcmp(o.heard.data, head, (size_t)n) == 0);
        drop(&o);
    }
}

static void
check_control(void)
{
    put(TEXT_BEGINS, "Hel");
    put(PING, "are you there");
    put(GOES_ON, "l");
    put(PONG, "unasked");
    put(ENDS, "o");
    put(PING, "");
    expect(PF__WEBSOCKET_HUNGRY, 0, "t5:Hello",
           SAID("\x8a\x0d"
                "are you there\x8a\0"));
}

static void
check_closes(void)
{
    static const unsigned good[] = {1000, 1001, 1002, 1003, 1007, 1011,
                                    1012, 1014, 3000, 3999, 4000, 4999};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        char payload[] = {(char)(good[i] >> 8), (char)good[i], 'b', 'y', 'e'};
        char echo[] = {(char)0x88, 2, payload[0], payload[1]};
        put(TEXT, "last");
        put_frame(CLOSE, payload, 5);
        put(TEXT, "too late");
        expect(PF__WEBSOCKET_CLOSED, good[i], "t4:last", echo, 4);
    }
    put(CLOSE, "");
    expect(PF__WEBSOCKET_CLOSED, 1005, "", SAID("\x88\0"));
}

/* ---- what is not --------------------------------------------------------------------*/
static void
check_malformed(void)
{
    static const int first[] = {
        TEXT | RSV1, TEXT | 0x20, TEXT | 0x10, 0x83,
        0x87,        0x8b,        0x8f,        0x09 /* a ping in pieces */,
        ENDS,        PING | RSV1, 0x08};
    for (size_t i = 0; i < sizeof first / sizeof *first; i++) {
        put(TEXT, "ok");
        put(first[i], "no");
        expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "t2:ok");
    }
    put(TEXT_BEGINS, "a");
    put(TEXT, "b"); /* within a message */
    expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "");
    put_raw("\x81\x05Hello", 7); /* not masked */
    expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "");
    put_raw("\x81\xfe\0\x05", 4); /* 5 in two bytes */
    expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "");
    put_raw("\x81\xff\0\0\0\0\0\0\xff\xff", 10); /* 65535 in eight */
    expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "");
    put_raw("\x81\xff\x80\0\0\0\0\0\0\0", 10); /* with the highest bit */
    expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "");
    put_raw("\x89\xfe\0\x7e", 4); /* a ping of 126 bytes */
    expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "");
}

static void
check_bad_closes(void)
{
    static const unsigned bad[] = {0,    999,  1004, 1005, 1006, 1015,
                                   1016, 1100, 2000, 2999, 5000, 65535};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char payload[] = {(char)(bad[i] >> 8), (char)bad[i]};
        put_frame(CLOSE, payload, 2);
        expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "");
    }
    put_frame(CLOSE, "\x03", 1);
    expect_failure(PF_ERR_WEBSOCKET_FRAME, 1002, "");
    put(CLOSE, "\x03\xe8\xff");
    expect_failure(PF_ERR_WEBSOCKET_TEXT, 1007, "");
    put(CLOSE, "\x03\xe8\xe2\x82");
    expect_failure(PF_ERR_WEBSOCKET_TEXT, 1007, "");
}

static void
check_text(void)
{
    put(TEXT_BEGINS, "\xce\xba\xe1");
    put(PING, "");
    put(GOES_ON, "\xbd");
    put(ENDS, "\xb9");
    expect(PF__WEBSOCKET_HUNGRY, 0, "t5:\xce\xba\xe1\xbd\xb9", SAID("\x8a\0"));
    put(TEXT, "\xed\xa0\x80");
    expect_failure(PF_ERR_WEBSOCKET_TEXT, 1007, "");
    put(TEXT, "\xce");
    expect_failure(PF_ERR_WEBSOCKET_TEXT, 1007, "");
    put(BINARY, "\xce");
    expect_heard("b1:\xce");
}

/* Text that cannot be is refused before its frame, or its message, is there. */
static void
check_fail_fast(void)
{
    put(TEXT, "abc\xf4\x90 and much more that is not needed");
    for (size_t have = 0; have <= 6 + 5; have++) {
        pf__deflate none = {0};
        pf__websocket *ws = pf__websocket_new(MAX_SIZE, &none);
        pf__buffer in = {0}, out = {0};
        size_t raw = 0;
        append(&in, s.data, have);
        int rc = pf__websocket_parse(ws, &pool, &in, &raw, &out);
        assert(rc == (have < 6 + 5 ? PF__WEBSOCKET_HUNGRY : PF_ERR_WEBSOCKET_TEXT));
        pf__buffer_release(&pool, &in);
        pf__websocket_free(ws, &pool);
    }
    s.len = 0;
}

static void
check_sizes(void)
{
    static char data[MAX_SIZE];
    put_raw("\x82\xff\0\0\0\0\0\x01\0\x01", 10);
    expect_failure(PF_ERR_WEBSOCKET_SIZE, 1009, "");
    put_frame(0x02, data, MAX_SIZE);
    put(ENDS, "x");
    outcome o = run_with(NULL);
    assert(o.rc == PF_ERR_WEBSOCKET_SIZE && o.heard.len == 0);
    drop(&o);
}

/* ---- compressed ---------------------------------------------------------------------*/
static void
check_compressed(void)
{
    static const char offer[] = "permessage-deflate";
    put_frame(TEXT | RSV1, "\xf2\x48\xcd\xc9\xc9\x07\x00", 7);
    put_frame(TEXT | RSV1, "\xf2\x00\x11\x00\x00", 5);
    put(TEXT, "plain");
    put_frame(TEXT_BEGINS | RSV1, "\xf2\x48\xcd", 3);
    put(PING, "");
    put_frame(ENDS, "\xc9\xc9\x07\x00", 4);
    expect_with(offer, PF__WEBSOCKET_HUNGRY, 0, "t5:Hellot5:Hellot5:plaint5:Hello",
                SAID("\x8a\0"));
    put(ENDS | RSV1, "");
    expect_with(offer, PF_ERR_WEBSOCKET_FRAME, 1002, "", NULL, 0);
    put(PING | RSV1, "");
    expect_with(offer, PF_ERR_WEBSOCKET_FRAME, 1002, "", NULL, 0);
    put(TEXT_BEGINS, "a");
    put(ENDS | RSV1, "b"); /* only the first says so */
    expect_with(offer, PF_ERR_WEBSOCKET_FRAME, 1002, "", NULL, 0);
    put(TEXT | RSV1, "\xff\xff\xff");
    expect_with(offer, PF_ERR_WEBSOCKET_DATA, 1007, "", NULL, 0);
    put_frame(TEXT | RSV1, "\x00\x03\x00\xfc\xff\xed\xa0\x80\xff\xff\xff", 11);
    expect_with(offer, PF_ERR_WEBSOCKET_TEXT, 1007, "", NULL, 0); /* what is first */
    put_frame(TEXT | RSV1, "\x00\x03\x00\xfc\xff\xed\xa0\x80\x00", 9);
    expect_with(offer, PF_ERR_WEBSOCKET_TEXT, 1007, "", NULL, 0);
}

static void
check_bomb(void)
{
    static char zeros[8 * MAX_SIZE];
    static const char offer[] = "permessage-deflate";
    pf__deflate d;
    pf__buffer bomb = {0};
    assert(pf__deflate_accept(&d, offer, strlen(offer)));
    assert(pf__deflate_deflate(&d, &pool, zeros, sizeof zeros, &bomb) == 0);
    put_frame(BINARY | RSV1, bomb.data, bomb.len);
    expect_with(offer, PF_ERR_WEBSOCKET_SIZE, 1009, "", NULL, 0);
    pf__buffer_release(&pool, &bomb);
    pf__deflate_close(&d);
}

/* Little bombs that come together are inflated as they are taken, not at once. */
static void
check_bombs(void)
{
    static char zeros[MAX_SIZE];
    static const char offer[] = "permessage-deflate";
    pf__deflate d;
    pf__buffer bomb = {0}, in = {0}, out = {0};
    pf_message message;
    size_t raw = 0;
    assert(pf__deflate_accept(&d, offer, strlen(offer)));
    pf__websocket *ws = pf__websocket_new(MAX_SIZE, &d);
    for (int i = 0; i < 3; i++) {
        bomb.len = 0;
        assert(pf__deflate_deflate(&d, &pool, zeros, sizeof zeros, &bomb) == 0);
        put_frame(BINARY | RSV1, bomb.data, bomb.len);
    }
    append(&in, s.data, s.len);
    for (int i = 0; i < 3; i++) {
        assert(pf__websocket_parse(ws, &pool, &in, &raw, &out) == PF__WEBSOCKET_FULL);
        assert(ws->count == 1 && ws->plain.len == MAX_SIZE);
        assert(pf__websocket_take(ws, &in, &message) && message.len == MAX_SIZE);
    }
    assert(pf__websocket_parse(ws, &pool, &in, &raw, &out) == PF__WEBSOCKET_HUNGRY);
    s.len = 0;
    pf__buffer_release(&pool, &bomb);
    pf__buffer_release(&pool, &in);
    pf__deflate_close(&d);
    pf__websocket_free(ws, &pool);
}

/* ---- what we send -------------------------------------------------------------------*/
static void
check_sent(void)
{
    static char data[70000];
    static const struct {
        size_t len, header;
        const char *bytes;
    } rows[] = {{0, 2, "\x82\0"},
                {125, 2, "\x82\x7d"},
                {126, 4, "\x82\x7e\0\x7e"},
                {65535, 4, "\x82\x7e\xff\xff"},
                {65536, 10, "\x82\x7f\0\0\0\0\0\x01\0\0"}};
    pf__deflate none = {0};
    pf__websocket *ws = pf__websocket_new(MAX_SIZE, &none);
    for (int i = 0; i < 5; i++) {
        pf__buffer out = {0};
        assert(pf__websocket_send(ws, &pool, &out, PF_MESSAGE_BINARY, data, rows[i].len)
               == 0);
        assert(out.len == rows[i].header + rows[i].len);
        assert(memcmp(out.data, rows[i].bytes, rows[i].header) == 0);
        pf__buffer_release(&pool, &out);
    }
    pf__websocket_free(ws, &pool);
}

static void
check_sent_closes(void)
{
    static char reason[PF__WEBSOCKET_REASON_MAX + 1];
    static const int bad[] = {0, 999, 1004, 1005, 1006, 1015, 2999, 5000};
    pf__deflate none = {0};
    pf__websocket *ws = pf__websocket_new(MAX_SIZE, &none);
    pf__buffer out = {0};
    memset(reason, 'x', sizeof reason);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert(pf__websocket_close(ws, &pool, &out, (unsigned)bad[i], "", 0)
               == PF_ERR_APP_CLOSE);
    assert(pf__websocket_close(ws, &pool, &out, 1000, reason, sizeof reason)
           == PF_ERR_APP_CLOSE);
    assert(pf__websocket_close(ws, &pool, &out, 1000, "\xff", 1) == PF_ERR_APP_CLOSE);
    assert(out.len == 0 && !ws->close_sent);
    assert(pf__websocket_close(ws, &pool, &out, 1000, reason, sizeof reason - 1) == 0);
    assert(out.len == 2 + 2 + sizeof reason - 1 && ws->close_sent);
    assert(pf__websocket_close(ws, &pool, &out, 1000, "", 0) == 0); /* but once */
    assert(out.len == 2 + 2 + sizeof reason - 1);
    pf__buffer_release(&pool, &out);
    pf__websocket_free(ws, &pool);
}

/* Behind our close only the peer's counts; what it still sends is dropped. */
static void
check_closing(void)
{
    pf__deflate none = {0};
    pf__websocket *ws = pf__websocket_new(MAX_SIZE, &none);
    pf__buffer in = {0}, out = {0};
    size_t raw = 0, said;
    assert(pf__websocket_close(ws, &pool, &out, 1001, "", 0) == 0);
    said = out.len;
    put(TEXT, "\xff is not even text");
    put(PING, "?");
    put(TEXT_BEGINS, "a");
    put(CLOSE, "\x03\xe9");
    append(&in, s.data, s.len);
    assert(pf__websocket_parse(ws, &pool, &in, &raw, &out) == PF__WEBSOCKET_CLOSED);
    assert(out.len == said && ws->count == 0);
    s.len = 0;
    pf__buffer_release(&pool, &in);
    pf__buffer_release(&pool, &out);
    pf__websocket_free(ws, &pool);
}

/* ---- the handshake ------------------------------------------------------------------*/
#define HEAD "GET / HTTP/1.1\r\nHost: a\r\n"
#define UPGRADE "Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
#define KEY "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
#define VERSION "Sec-WebSocket-Version: 13\r\n"

static int
offered(const char *text, char accept[PF__WEBSOCKET_ACCEPT_SIZE])
{
    static pf_head head;
    pf__head_state state = {0};
    pf_options limits;
    pf_options_init(&limits);
    memset(&head, 0, sizeof head);
    assert(pf__http_parse_head(&head, &state, text, strlen(text), &limits, NULL) > 0);
    int rc = pf__websocket_offered(&head, text);
    if (rc > 0)
        pf__websocket_accept_key(&head, text, accept);
    return rc;
}

static void
check_handshakes(void)
{
    static const struct {
        const char *text;
        int rc;
    } rows[] = {
        {HEAD UPGRADE KEY VERSION "\r\n", 1},
        {HEAD KEY VERSION "\r\n", 0},
        {HEAD "Upgrade: websocket\r\n" KEY VERSION "\r\n", 0},
        {HEAD "Connection: upgrade\r\nUpgrade: h2c\r\n" KEY VERSION "\r\n", 0},
        {"POST / HTTP/1.1\r\nHost: a\r\n" UPGRADE KEY VERSION "\r\n", 0},
        {"GET / HTTP/1.0\r\nHost: a\r\n" UPGRADE KEY VERSION "\r\n", 0},
        {HEAD UPGRADE KEY VERSION "Content-Length: 1\r\n\r\n", 0},
        {HEAD UPGRADE KEY "\r\n", PF_ERR_WEBSOCKET_VERSION},
        {HEAD UPGRADE KEY "Sec-WebSocket-Version: 99\r\n\r\n",
         PF_ERR_WEBSOCKET_VERSION},
        {HEAD UPGRADE KEY VERSION VERSION "\r\n", PF_ERR_WEBSOCKET_VERSION},
        {HEAD UPGRADE VERSION "\r\n", PF_ERR_WEBSOCKET_KEY},
        {HEAD UPGRADE KEY KEY VERSION "\r\n", PF_ERR_WEBSOCKET_KEY},
        {HEAD UPGRADE VERSION "Sec-WebSocket-Key: short==\r\n\r\n",
         PF_ERR_WEBSOCKET_KEY},
        {HEAD UPGRADE VERSION "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZR==\r\n\r\n",
         PF_ERR_WEBSOCKET_KEY},
        {HEAD UPGRADE VERSION "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j*Q==\r\n\r\n",
         PF_ERR_WEBSOCKET_KEY},
    };
    char accept[PF__WEBSOCKET_ACCEPT_SIZE];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int rc = offered(rows[i].text, accept);
        if (rc != rows[i].rc)
            fprintf(stderr, "%s: %d, not %d\n", rows[i].text, rc, rows[i].rc);
        assert(rc == rows[i].rc);
    }
    assert(offered(rows[0].text, accept) == 1); /* RFC 6455 1.3 */
    assert(memcmp(accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", sizeof accept) == 0);
}

int
main(void)
{
    check_messages();
    check_lengths();
    check_control();
    check_closes();
    check_malformed();
    check_bad_closes();
    check_text();
    check_fail_fast();
    check_sizes();
    check_compressed();
    check_bomb();
    check_bombs();
    check_sent();
    check_sent_closes();
    check_closing();
    check_handshakes();
    assert(pool.in_use == 0);
    pf__buffer_empty_pool(&pool);
    return 0;
}
