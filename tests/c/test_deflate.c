/* test_deflate.c - what is agreed on, and messages there and back again. */
#undef NDEBUG
#include "internal.h"

#include <stdio.h>
#include <time.h>

static pf__pool pool;

/* ---- negotiation --------------------------------------------------------------------*/
static void
check_offer(const char *offer, const char *expected)
{
    char answer[PF__DEFLATE_ANSWER_MAX];
    pf__deflate d;
    bool accepted = pf__deflate_accept(&d, offer, strlen(offer));
    size_t n = accepted ? pf__deflate_answer(&d, answer) : 0;
    assert(accepted == d.on);
    if (accepted != (expected != NULL)
        || (accepted && (n != strlen(expected) || memcmp(answer, expected, n) != 0)))
        fprintf(stderr, "%s: %.*s, not %s\n", offer, (int)n, answer,
                expected ? expected : "(nothing)");
    assert(accepted == (expected != NULL));
    assert(!accepted || (n == strlen(expected) && memcmp(answer, expected, n) == 0));
}

#define OURS "permessage-deflate; server_max_window_bits="

static void
check_offers(void)
{
    check_offer("permessage-deflate", OURS "12");
    check_offer("permessage-deflate; client_max_window_bits",
                OURS "12; client_max_window_bits=12");
    check_offer("permessage-deflate;client_max_window_bits = 10",
                OURS "12; client_max_window_bits=10");
    check_offer("permessage-deflate; client_max_window_bits=\"15\"",
                OURS "12; client_max_window_bits=12");
    check_offer("permessage-deflate; server_max_window_bits=9", OURS "9");
    check_offer("permessage-deflate; server_max_window_bits=15", OURS "12");
    check_offer("permessage-deflate; server_no_context_takeover; "
                "client_no_context_takeover",
                OURS "12; server_no_context_takeover; client_no_context_takeover");
    check_offer("foo; a=b, ,permessage-deflate; server_max_window_bits=10, bar",
                OURS "10");
    /* what cannot be had is declined, and the next offer is looked at */
    check_offer("permessage-deflate; server_max_window_bits=8, permessage-deflate",
                OURS "12");
    check_offer("permessage-deflate; server_max_window_bits=8", NULL);
    check_offer("permessage-deflate; server_max_window_bits=16", NULL);
    check_offer("permessage-deflate; server_max_window_bits=09", NULL);
    check_offer("permessage-deflate; server_max_window_bits", NULL);
    check_offer("permessage-deflate; client_max_window_bits=7", NULL);
    check_offer("permessage-deflate; server_no_context_takeover=1", NULL);
    check_offer("permessage-deflate; server_no_context_takeover; "
                "server_no_context_takeover",
                NULL);
    check_offer("permessage-deflate; unknown", NULL);
    check_offer("x-webkit-deflate-frame", NULL);
    check_offer("Permessage-Deflate-2", NULL);
    check_offer("", NULL);
    check_offer(",", NULL);
    check_offer("permessage-deflate;", NULL);
    check_offer("permessage-deflate; client_max_window_bits=", NULL);
    check_offer("permessage-deflate; client_max_window_bits=\"12", NULL);
    check_offer("permessage-deflate foo", NULL);
}

/* ---- messages -----------------------------------------------------------------------*/
static pf__deflate
agreed(const char *offer)
{
    pf__deflate d;
    assert(pf__deflate_accept(&d, offer, strlen(offer)));
    return d;
}

/* Deflated here, inflated in pieces as a peer of the same agreement would. */
static size_t
there_and_back(pf__deflate *d, pf__deflate *peer, const char *data, size_t len,
               size_t step)
{
    pf__buffer small = {0}, back = {0};
    assert(pf__deflate_deflate(d, &pool, data, len, &small) == 0);
    for (size_t at = 0, n; at < small.len; at += n) {
        n = small.len - at < step ? small.len - at : step;
        bool last = at + n == small.len;
        assert(pf__deflate_inflate(peer, &pool, small.data + at, n, last, &back, len)
               == 0);
    }
    assert(back.len == len && (len == 0 || memcmp(back.data, data, len) == 0));
    size_t size = small.len;
    pf__buffer_release(&pool, &small);
    pf__buffer_release(&pool, &back);
    return size;
}

static void
fill(char *data, size_t len)
{
    uint32_t x = 1;
    for (size_t i = 0; i < len; i++) {
        x = x * 1664525 + 1013904223;
        data[i] = (char)(i % 3 ? 'a' + (x >> 24) % 26 : ' ');
    }
}

enum { SIZE = 300000 };

static char data[SIZE];

static void
check_messages(void)
{
    static const size_t sizes[] = {1, 2, 64, 1000, 4096, 65536, SIZE};
    pf__deflate d = agreed("permessage-deflate");
    pf__deflate peer = agreed("permessage-deflate");
    peer.in_bits = d.out_bits;
    fill(data, SIZE);
    for (int i = 0; i < 7; i++) {
        there_and_back(&d, &peer, data, sizes[i], 1 << 20);
        there_and_back(&d, &peer, data, sizes[i], 7);
    }
    pf__deflate_close(&d);
    pf__deflate_close(&peer);
    assert(d.in == NULL && d.out == NULL && pool.in_use == 0);
}

static void
check_takeover(void)
{
    pf__deflate d = agreed("permessage-deflate");
    pf__deflate peer = agreed("permessage-deflate");
    size_t first = there_and_back(&d, &peer, data, 1000, 1000);
    size_t second = there_and_back(&d, &peer, data, 1000, 1000);
    assert(second < first / 10 && d.out != NULL && peer.in != NULL);
    pf__deflate_close(&d);
    pf__deflate_close(&peer);
    d = agreed("permessage-deflate; server_no_context_takeover; "
               "client_no_context_takeover");
    peer = d;
    first = there_and_back(&d, &peer, data, 1000, 1000);
    second = there_and_back(&d, &peer, data, 1000, 1000);
    assert(second == first && d.out == NULL && peer.in == NULL);
}

/* A bomb is given up as soon as too much has come of it. */
static void
check_limit(void)
{
    pf__deflate d = agreed("permessage-deflate");
    pf__deflate peer = agreed("permessage-deflate");
    pf__buffer small = {0}, back = {0};
    char *zeros = calloc(1, 16 << 20);
    assert(pf__deflate_deflate(&d, &pool, zeros, 16 << 20, &small) == 0);
    assert(small.len < 100000);
    assert(pf__deflate_inflate(&peer, &pool, small.data, small.len, true, &back, 65536)
           == PF_ERR_WEBSOCKET_SIZE);
    assert(back.cap <= 4 * small.len + (256 << 10));
    free(zeros);
    pf__buffer_release(&pool, &small);
    pf__buffer_release(&pool, &back);
    pf__deflate_close(&d);
    pf__deflate_close(&peer);
}

static int
inflate_text(pf__deflate *d, const char *text, size_t len, pf__buffer *to)
{
    return pf__deflate_inflate(d, &pool, text, len, true, to, 65536);
}

/* RFC 7692 7.2.3: its examples, and a block that says it is the last. */
static void
check_examples(void)
{
    pf__deflate d = agreed("permessage-deflate");
    pf__buffer to = {0};
    assert(inflate_text(&d, "\xf2\x48\xcd\xc9\xc9\x07\x00", 7, &to) == 0);
    assert(to.len == 5 && memcmp(to.data, "Hello", 5) == 0);
    assert(inflate_text(&d, "\xf2\x00\x11\x00\x00", 5, &to) == 0); /* with its window */
    assert(to.len == 10 && memcmp(to.data + 5, "Hello", 5) == 0);
    assert(inflate_text(&d, "\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00", 11, &to)
           == 0);
    assert(to.len == 15 && memcmp(to.data + 10, "Hello", 5) == 0);
    assert(inflate_text(&d, "\xf3\x48\xcd\xc9\xc9\x07\x00\x00", 8, &to) == 0);
    assert(to.len == 20 && memcmp(to.data + 15, "Hello", 5) == 0);
    assert(inflate_text(&d, "\xf2\x00\x11\x00\x00", 5, &to) == 0); /* behind the last */
    assert(to.len == 25 && memcmp(to.data + 20, "Hello", 5) == 0);
    assert(inflate_text(&d, "\xff\xff\xff", 3, &to) == PF_ERR_WEBSOCKET_DATA);
    pf__buffer_release(&pool, &to);
    pf__deflate_close(&d);
}

/* Seconds of processor time for a message of these bytes, again and again. */
static double
time_of(pf__deflate *d, const char *part, size_t len)
{
    enum { TOTAL = 250000 };
    pf__buffer many = {0}, to = {0};
    assert(pf__buffer_reserve(&pool, &many, TOTAL + len + 1) == 0);
    while (many.len < TOTAL)
        pf__buffer_put(&many, part, len);
    many.data[many.len++] = 0;
    clock_t since = clock();
    assert(inflate_text(d, many.data, many.len, &to) == 0 && to.len == 0);
    double seconds = (double)(clock() - since) / CLOCKS_PER_SEC;
    pf__buffer_release(&pool, &many);
    pf__buffer_release(&pool, &to);
    return seconds;
}

/* A peer cannot have us copy its window again and again by saying that this is all: that
 * cost 600 times as much. Under ThreadSanitizer, which zlib is without, it is 45. */
static void
check_last_blocks(void)
{
    pf__deflate d = agreed("permessage-deflate");
    pf__deflate peer = agreed("permessage-deflate");
    there_and_back(&d, &peer, data, 65536, 65536);
    double usual = time_of(&peer, "\0\0\0\xff\xff", 5);
    double last = time_of(&peer, "\x03", 2);
    if (last > 150 * usual)
        fprintf(stderr, "%g s for last blocks, %g s for others\n", last, usual);
    assert(last <= 150 * usual);
    pf__deflate_close(&d);
    pf__deflate_close(&peer);
}

int
main(void)
{
    check_offers();
    check_messages();
    check_takeover();
    check_limit();
    check_examples();
    check_last_blocks();
    assert(pool.in_use == 0);
    pf__buffer_empty_pool(&pool);
    return 0;
}
