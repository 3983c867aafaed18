/* micro.c - what the core's two pure rooms cost: parsing a head, writing an answer.
 *
 * Bytes in memory, hot caches, no system call; the best of many short runs, since all
 * that can happen to a run is that it takes longer. Inside a server, where the kernel
 * has run in between, expect one and a half times as much.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "internal.h"
#include "program.h"

enum { RUNS = 41, LOOPS = 20000 };

#define CRLF "\r\n"

static const char WRK[] = "GET / HTTP/1.1" CRLF "Host: 127.0.0.1:8000" CRLF CRLF;

static const char BROWSER[] =
    "GET /wp-content/uploads/2010/03/hello-kitty-darth-vader-pink.jpg HTTP/1.1" CRLF
    "Host: www.kittyhell.com" CRLF
    "User-Agent: Mozilla/5.0 (Macintosh; U; Intel Mac OS X 10.6; ja-JP-mac; "
    "rv:1.9.2.3) Gecko/20100401 Firefox/3.6.3 Pathtraq/0.9" CRLF
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8" CRLF
    "Accept-Language: ja,en-us;q=0.7,en;q=0.3" CRLF "Accept-Encoding: gzip,deflate" CRLF
    "Accept-Charset: Shift_JIS,utf-8;q=0.7,*;q=0.7" CRLF "Keep-Alive: 115" CRLF
    "Connection: keep-alive" CRLF
    "Cookie: wp_ozh_wsa_visits=2; wp_ozh_wsa_visit_lasttime=xxxxxxxxxx; "
    "__utma=xxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.x; "
    "__utmz=xxxxxxxxx.xxxxxxxxxx.x.x.utmccn=(referral)|utmcsr=reader.livedoor.com|"
    "utmcct=/reader/|utmcmd=referral" CRLF CRLF;

static const char API[] =
    "POST /v1/items/42/comments?notify=true&lang=en HTTP/1.1" CRLF
    "Host: api.example.com" CRLF "User-Agent: python-httpx/0.28.1" CRLF
    "Accept: application/json" CRLF "Accept-Encoding: gzip, deflate" CRLF
    "Connection: keep-alive" CRLF
    "Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc" CRLF
    "Content-Type: application/json" CRLF "Content-Length: 27" CRLF CRLF;

static pf_options options;
static pf__pool pool;
static pf__stamp stamp;
static pf__buffer out;

/* ---- What is measured -------------------------------------------------------------*/

typedef struct work {
    const char *name;
    void (*once)(const struct work *it);
    const char *text;
    size_t size;
} work;

static void
must(bool good, const work *it)
{
    if (good)
        return;
    fprintf(stderr, "micro: %s: wrong result\n", it->name);
    exit(1);
}

static void
parse(const work *it)
{
    static pf_head head;
    pf__head_state state = {0};
    int size = pf__http_parse_head(&head, &state, it->text, it->size, &options, NULL);
    must(size == (int)it->size, it);
}

/* The same from a client that has sent this block before. */
static void
parse_again(const work *it)
{
    static pf_head head;
    static pf__repeat known;
    pf__head_state state = {0};
    int size = pf__http_parse_head(&head, &state, it->text, it->size, &options, &known);
    must(size == (int)it->size, it);
}

/* The same in three deliveries, as slow networks bring it. */
static void
parse_in_thirds(const work *it)
{
    static pf_head head;
    pf__head_state state = {0};
    size_t third = it->size / 3;
    for (int i = 1; i <= 2; i++)
        must(!pf__http_parse_head(&head, &state, it->text, i * third, &options, NULL),
             it);
    int size = pf__http_parse_head(&head, &state, it->text, it->size, &options, NULL);
    must(size == (int)it->size, it);
}

static void
answer(const work *it)
{
    pf__answer a = {.minor = 1};
    out.len = 0;
    int rc = pf__response_whole(&pool, &out, &a, 200, &stamp, NULL, 0, it->text,
                                it->size, true);
    must(rc == 0, it);
}

static void
answer_field_by_field(const work *it)
{
    static const struct {
        const char *name, *value;
    } fields[] = {
        {"Content-Type", "application/json"},
        {"Cache-Control", "no-store"},
        {"X-Request-Id", "7f9c2ba4e88f827d616045507605853e"},
        {"Vary", "Accept-Encoding, Cookie"},
    };
    pf__answer a = {.minor = 1};
    out.len = 0;
    int rc = pf__response_begin(&pool, &out, &a, 200, NULL, 0, (int64_t)it->size);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        rc |=
            pf__response_field(&pool, &out, &a, fields[i].name, strlen(fields[i].name),
                               fields[i].value, strlen(fields[i].value));
    rc |= pf__response_seal(&pool, &out, &a, &stamp);
    must(rc == 0, it);
}

#define TEXT(literal) literal, sizeof(literal) - 1

static const work works[] = {
    {"parse: wrk's GET", parse, TEXT(WRK)},
    {"parse: a browser's GET", parse, TEXT(BROWSER)},
    {"parse: an API client's POST", parse, TEXT(API)},
    {"parse: wrk's GET, again", parse_again, TEXT(WRK)},
    {"parse: a browser's GET, again", parse_again, TEXT(BROWSER)},
    {"parse: the browser's GET in thirds", parse_in_thirds, TEXT(BROWSER)},
    {"answer: whole, 13 bytes", answer, TEXT("Hello, World!")},
    {"answer: head of four fields", answer_field_by_field, TEXT("{\"id\": 42}")},
};

enum { WORKS = sizeof works / sizeof *works };

/* ---- Measuring --------------------------------------------------------------------*/

static double
nanoseconds(const work *it)
{
    uint64_t begin = now_ns();
    for (int i = 0; i < LOOPS; i++)
        it->once(it);
    return (double)(now_ns() - begin) / LOOPS;
}

int
main(void)
{
    static const char *const variants[] = {"avx2", "sse2", "portable"};
    enum { VARIANTS = sizeof variants / sizeof *variants };
    static double best[VARIANTS][WORKS];

    pf_options_init(&options);
    pf__response_stamp_init(&stamp, &options);
    pf__response_stamp_update(&stamp, time(NULL));
    for (int run = 0; run < RUNS; run++) {
        for (int v = 0; v < VARIANTS; v++) {
            if (pf_http_set_simd(variants[v]) < 0)
                continue;
            for (int w = 0; w < WORKS; w++) {
                double ns = nanoseconds(&works[w]);
                if (best[v][w] == 0 || ns < best[v][w])
                    best[v][w] = ns;
            }
        }
    }

    printf("%-36s %5s", "ns", "bytes");
    for (int v = 0; v < VARIANTS; v++)
        printf(" %9s", variants[v]);
    puts("");
    for (int w = 0; w < WORKS; w++) {
        printf("%-36s %5zu", works[w].name, works[w].size);
        for (int v = 0; v < VARIANTS; v++) {
            if (best[v][w] > 0)
                printf(" %9.1f", best[v][w]);
            else
                printf(" %9s", "-"); /* not on this CPU */
        }
        puts("");
    }
    return 0;
}
