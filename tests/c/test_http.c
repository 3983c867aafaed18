/* test_http.c - field names and values, heads and chunked bodies in any delivery.
 *
 * What is accepted and what is refused is told by the cases of tests/http; here it is
 * how: the same answer whole and in pieces, under any limit, and never a byte too far.
 */
#undef NDEBUG
#include "internal.h"

#include <ctype.h>
#include <stdio.h>

/* ---- field names --------------------------------------------------------------------*/
static void
change_case(char *out, const char *in, size_t len, int way)
{
    for (size_t i = 0; i < len; i++)
        out[i] = (char)(way == 0 || (way == 2 && i % 2) ? in[i] : toupper(in[i]));
}

static void
every_known_name_has_its_number_in_any_case(void)
{
    for (int id = 1; id < PF_FIELD_COUNT; id++) {
        const char *name = pf_http_field_name(id);
        size_t len = strlen(name);
        char other[PF__NAME_MAX];
        assert(len < PF__NAME_MAX);
        for (int way = 0; way < 3; way++) {
            change_case(other, name, len, way);
            assert(pf__http_field_id(other, len) == id);
        }
    }
}

static void
a_name_that_is_nearly_known_is_not(void)
{
    for (int id = 1; id < PF_FIELD_COUNT; id++) {
        const char *name = pf_http_field_name(id);
        size_t len = strlen(name);
        char other[PF__NAME_MAX + 1];
        for (size_t i = 0; i < len; i++) {
            memcpy(other, name, len);
            other[i] = name[i] == '-' ? '_' : '~';
            assert(pf__http_field_id(other, len) == PF_FIELD_OTHER);
        }
        memcpy(other, name, len);
        other[len] = 's';
        assert(pf__http_field_id(other, len + 1) == PF_FIELD_OTHER);
    }
    assert(pf__http_field_id("", 0) == PF_FIELD_OTHER);
    assert(pf__http_field_id("x", 1) == PF_FIELD_OTHER);
}

static void
numbers_outside_the_table_have_no_name(void)
{
    assert(pf_http_field_name(-1)[0] == '\0');
    assert(pf_http_field_name(PF_FIELD_OTHER)[0] == '\0');
    assert(pf_http_field_name(PF_FIELD_COUNT)[0] == '\0');
}

/* ---- field values -------------------------------------------------------------------*/
static bool
has(const char *list, const char *token)
{
    return pf__http_list_has(list, strlen(list), token);
}

static void
a_list_has_its_elements_in_any_case_and_no_part_of_one(void)
{
    assert(has("close", "close"));
    assert(has("Close", "close"));
    assert(has("keep-alive, Close", "close"));
    assert(has("keep-alive ,\tCLOSE\t, x", "close"));
    assert(has(",, ,close", "close"));
    assert(has("close,", "close"));
    assert(!has("", "close"));
    assert(!has(" , ,", "close"));
    assert(!has("closed", "close"));
    assert(!has("not-close", "close"));
    assert(!has("close x", "close"));
    assert(!has("clo,se", "close"));
    assert(!has("\"close\"", "close"));
}

static int64_t
length_of(const char *value)
{
    return pf__http_parse_length(value, strlen(value));
}

static void
a_length_is_digits_without_leading_zero(void)
{
    assert(length_of("0") == 0);
    assert(length_of("5") == 5);
    assert(length_of("1234567890123") == 1234567890123);
    assert(length_of("9223372036854775807") == INT64_MAX);
    static const char *const wrong[] = {"",
                                        "00",
                                        "05",
                                        "+5",
                                        "-5",
                                        "-0",
                                        "5 ",
                                        " 5",
                                        "5x",
                                        "0x5",
                                        "5,5",
                                        "1_0",
                                        "5\xb5",
                                        ".",
                                        "1e3",
                                        "9223372036854775808",
                                        "18446744073709551616",
                                        "99999999999999999999"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert(length_of(wrong[i]) < 0);
    assert(pf__http_parse_length("5\0", 2) < 0);
    assert(pf__http_parse_length("57", 1) == 5);
}

/* ---- heads --------------------------------------------------------------------------*/
static pf_options limits;

/* Parses what is at `text` from a copy that ends where its bytes end. */
static int
parse(pf_head *head, const char *text, size_t len)
{
    char *copy = malloc(len + (len == 0));
    pf__head_state state = {0};
    memcpy(copy, text, len);
    int rc = pf__http_parse_head(head, &state, copy, len, &limits, NULL);
    free(copy);
    return rc;
}

static bool
span_is(const char *text, pf_span span, const char *expected)
{
    return span.len == strlen(expected)
           && memcmp(text + span.at, expected, span.len) == 0;
}

static const char plain[] = "GET /a/b?c=d HTTP/1.1\r\n"
                            "Host: example.org\r\n"
                            "Accept:*/*\r\n"
                            "X-Empty:\r\n"
                            "x-empty: \t two words\t \r\n"
                            "\r\n"
                            "GET /next HTTP/1.1\r\n";

static void
a_head_becomes_slices_of_its_bytes(void)
{
    pf_head head;
    size_t size = strstr(plain, "GET /next") - plain;
    assert(parse(&head, plain, sizeof plain - 1) == (int)size && head.size == size);
    assert(span_is(plain, head.method, "GET"));
    assert(span_is(plain, head.target, "/a/b?c=d"));
    assert(span_is(plain, head.path, "/a/b"));
    assert(span_is(plain, head.query, "c=d"));
    assert(head.authority.len == 0 && head.content_length == 0 && head.minor == 1);
    assert(head.nfields == 4 && head.host == 0);
    assert(head.flags == (PF_HEAD_KEEP_ALIVE | PF_HEAD_IS_GET));
    assert(head.fields[1].id == PF_FIELD_ACCEPT);
    assert(head.fields[2].id == PF_FIELD_OTHER && head.fields[2].value_len == 0);
    pf_span value = {head.fields[3].value_at, head.fields[3].value_len};
    assert(span_is(plain, value, "two words"));
}

static void
fields_are_found_by_name_in_any_case_one_after_the_other(void)
{
    pf_head head;
    assert(parse(&head, plain, sizeof plain - 1) > 0);
    assert(pf_http_find_field(&head, plain, "HOST", 4, 0) == 0);
    assert(pf_http_find_field(&head, plain, "x-empty", 7, 0) == 2);
    assert(pf_http_find_field(&head, plain, "X-EMPTY", 7, 3) == 3);
    assert(pf_http_find_field(&head, plain, "x-empty", 7, 4) == -1);
    assert(pf_http_find_field(&head, plain, "x-empt", 6, 0) == -1);
    assert(pf_http_find_field(&head, plain, "x_empty", 7, 0) == -1);
    assert(pf_http_find_field(&head, plain, "", 0, 0) == -1);
}

/* "^" and "~", "@" and "`" differ in the bit that folds the case of letters. */
static void
only_letters_fold_their_case(void)
{
    static const char text[] = "GET / HTTP/1.1\r\nHost: a\r\nx^y: 1\r\n\r\n";
    pf_head head;
    assert(parse(&head, text, sizeof text - 1) > 0);
    assert(pf_http_find_field(&head, text, "X^Y", 3, 0) == 1);
    assert(pf_http_find_field(&head, text, "x~y", 3, 0) == -1);
}

static void
the_authority_of_a_target_is_what_host_holds(void)
{
    static const char text[] = "GET HTTP://b:8/x HTTP/1.1\r\nHost: a\r\n\r\n";
    pf_head head;
    assert(parse(&head, text, sizeof text - 1) > 0);
    assert(span_is(text, head.authority, "b:8") && span_is(text, head.path, "/x"));
    pf_span host = {head.fields[head.host].value_at, head.fields[head.host].value_len};
    assert(span_is(text, host, "b:8"));
}

static void
spans_count_from_the_first_byte_also_behind_ignored_lines(void)
{
    static const char text[] = "\r\n\r\nGET / HTTP/1.0\r\n\r\n";
    pf_head head;
    assert(parse(&head, text, sizeof text - 1) == (int)sizeof text - 1);
    assert(head.method.at == 4 && span_is(text, head.target, "/"));
    assert(head.host == 0xff && head.minor == 0);
}

/* ---- heads in pieces ----------------------------------------------------------------*/
/* Every delivery copies its bytes elsewhere: nothing may be remembered by address. */
static int
parse_pieces(pf_head *head, const char *text, size_t len, const size_t *ends)
{
    pf__head_state state = {0};
    int rc = 0;
    for (; rc == 0; ends++) {
        char *copy = malloc(*ends + (*ends == 0));
        memcpy(copy, text, *ends);
        rc = pf__http_parse_head(head, &state, copy, *ends, &limits, NULL);
        free(copy);
        if (*ends == len)
            break;
    }
    return rc;
}

static bool
same_span(pf_span a, pf_span b)
{
    return a.at == b.at && a.len == b.len;
}

static bool
same_head(const pf_head *a, const pf_head *b)
{
    if (!same_span(a->method, b->method) || !same_span(a->target, b->target)
        || !same_span(a->path, b->path) || !same_span(a->query, b->query)
        || !same_span(a->authority, b->authority)
        || a->content_length != b->content_length || a->size != b->size
        || a->nfields != b->nfields || a->minor != b->minor || a->flags != b->flags
        || a->host != b->host)
        return false;
    for (int i = 0; i < a->nfields; i++) {
        const pf_field *f = &a->fields[i], *g = &b->fields[i];
        if (f->name_at != g->name_at || f->name_len != g->name_len || f->id != g->id
            || f->value_at != g->value_at || f->value_len != g->value_len)
            return false;
    }
    return true;
}

static void
same_in_pieces(const char *text, size_t len, const size_t *ends, int expected,
               const pf_head *whole)
{
    pf_head head;
    assert(parse_pieces(&head, text, len, ends) == expected);
    assert(expected <= 0 || same_head(&head, whole));
}

/* Whole, byte by byte, and in two parts: one answer, which is returned. */
static int
parse_every_way(const char *text, size_t len)
{
    enum { LONGEST = 2048 };
    static size_t steps[LONGEST];
    pf_head whole;
    int rc = parse(&whole, text, len);
    assert(len > 0 && len < LONGEST);
    for (size_t i = 0; i < len; i++)
        steps[i] = i + 1;
    same_in_pieces(text, len, steps, rc, &whole);
    for (size_t at = 0; at < len; at++)
        same_in_pieces(text, len, (size_t[]){at, len}, rc, &whole);
    return rc;
}

static const char *const heads[] = {
    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "\r\n\r\nPOST /path/that/is/longer?with=query HTTP/1.1\r\nHost: example.org:80\r\n"
    "Content-Length: 1234\r\nContent-Type: text/plain\r\nConnection: x, close\r\n\r\n",
    "PUT http://b/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    "Expect: 100-continue\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\n\r\n",
    "GET / HTTP/1.0\r\nConnection: keep-alive\r\nX: \t padded \t\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n folded\r\n\r\n",
    "GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/2.0\r\n\r\n",
    "GET /",
    "\r\n\r\n\r\nGET / HTTP/1.1\r\n\r\n",
};

enum { NHEADS = sizeof heads / sizeof *heads };

static void
a_head_is_the_same_in_every_delivery(void)
{
    pf_options_init(&limits);
    for (int i = 0; i < NHEADS; i++)
        parse_every_way(heads[i], strlen(heads[i]));
}

static void
a_head_that_is_cut_anywhere_wants_more(void)
{
    pf_head head;
    pf_options_init(&limits);
    for (size_t len = 0; len < strlen(heads[2]); len++)
        assert(parse(&head, heads[2], len) == 0);
    assert(parse(&head, heads[2], strlen(heads[2])) > 0);
}

/* ---- blocks that come again ---------------------------------------------------------*/
static pf__repeat known;

static int
parse_knowing(pf_head *head, const char *text, size_t len)
{
    char *copy = malloc(len + (len == 0));
    pf__head_state state = {0};
    memcpy(copy, text, len);
    int rc = pf__http_parse_head(head, &state, copy, len, &limits, &known);
    assert(rc <= 0 || state.at == (uint32_t)rc);
    free(copy);
    return rc;
}

static void
after_any_other_head_a_head_is_parsed_the_same(void)
{
    pf_head head, whole;
    pf_options_init(&limits);
    for (int i = 0; i < NHEADS * NHEADS; i++) {
        const char *before = heads[i / NHEADS], *text = heads[i % NHEADS];
        known.size = 0;
        parse_knowing(&head, before, strlen(before));
        int rc = parse(&whole, text, strlen(text));
        for (int time = 0; time < 2; time++) {
            assert(parse_knowing(&head, text, strlen(text)) == rc);
            assert(rc <= 0 || same_head(&head, &whole));
        }
    }
}

#define BLOCK "Host: a\r\nX-Real: 1\r\nContent-Length: 7\r\n\r\n"

static void
a_block_is_known_behind_another_request_line(void)
{
    static const char *const lines[] = {
        "POST / HTTP/1.1\r\n",        "\r\nPOST /elsewhere?x HTTP/1.1\r\n",
        "GET / HTTP/1.0\r\n",         "HEAD /x HTTP/1.1\r\n",
        "PUT http://b/ HTTP/1.1\r\n", "DELETE / HTTP/1.1\r\n",
    };
    char text[256];
    pf_head head, whole;
    pf_options_init(&limits);
    known.size = 0;
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        int len = snprintf(text, sizeof text, "%s" BLOCK "7 bytes", lines[i]);
        assert(parse(&whole, text, (size_t)len) == len - 7);
        assert(parse_knowing(&head, text, (size_t)len) == len - 7);
        assert(same_head(&head, &whole));
        assert(known.size == sizeof BLOCK - 1);
        assert(known.content_length == 7 && known.nfields == 3);
    }
}

static void
a_known_block_that_is_cut_wants_more_and_one_that_differs_is_parsed(void)
{
    static const char text[] = "GET / HTTP/1.1\r\n" BLOCK;
    char other[sizeof text];
    pf_head head;
    pf_options_init(&limits);
    known.size = 0;
    assert(parse_knowing(&head, text, sizeof text - 1) == (int)sizeof text - 1);
    for (size_t len = 0; len < sizeof text - 1; len++)
        assert(parse_knowing(&head, text, len) == 0);
    memcpy(other, text, sizeof text);
    *strchr(other, '7') = '8';
    assert(parse_knowing(&head, other, sizeof text - 1) == (int)sizeof text - 1);
    assert(head.content_length == 8);
    memcpy(strstr(other, "X-Real"), "X Real", 6);
    assert(parse_knowing(&head, other, sizeof text - 1) == PF_ERR_FIELD_NAME);
}

static void
a_known_block_is_held_to_the_limit_of_the_head(void)
{
    static const char text[] = "GET / HTTP/1.1\r\n" BLOCK;
    static const char longer[] = "GET /longer HTTP/1.1\r\n" BLOCK;
    pf_head head;
    pf_options_init(&limits);
    limits.max_header_size = sizeof text - 1;
    known.size = 0;
    for (int time = 0; time < 2; time++)
        assert(parse_knowing(&head, text, sizeof text - 1) == (int)sizeof text - 1);
    assert(parse_knowing(&head, longer, sizeof longer - 1) == PF_ERR_HEAD_SIZE);
}

static void
a_block_that_is_large_is_not_kept(void)
{
    char text[4 * PF__REPEAT_BYTES];
    pf_head head;
    pf_options_init(&limits);
    known.size = 0;
    int len = snprintf(text, sizeof text, "GET / HTTP/1.1\r\nHost: a\r\nX: %*d\r\n\r\n",
                       PF__REPEAT_BYTES, 1);
    assert(parse_knowing(&head, text, (size_t)len) == len && known.size == 0);
    len = snprintf(text, sizeof text, "GET / HTTP/1.1\r\nHost: a\r\n");
    for (int i = 0; i < PF__REPEAT_FIELDS; i++)
        len += snprintf(text + len, sizeof text - (size_t)len, "X: 1\r\n");
    len += snprintf(text + len, sizeof text - (size_t)len, "\r\n");
    assert(parse_knowing(&head, text, (size_t)len) == len && known.size == 0);
}

static bool
is_limit(int rc)
{
    return rc == PF_ERR_HEAD_SIZE || rc == PF_ERR_TARGET_LENGTH;
}

/* A head that is good without limits is good, or over the limit, with them; and a
 * higher limit never refuses what a lower one took. */
static void
check_limit(const char *text, uint32_t *limit, uint32_t highest)
{
    bool taken = false;
    int unlimited = parse_every_way(text, strlen(text));
    for (*limit = 0; *limit <= highest; ++*limit) {
        int rc = parse_every_way(text, strlen(text));
        assert(rc == unlimited || is_limit(rc));
        assert(!taken || rc == unlimited);
        taken = rc == unlimited;
    }
    assert(taken);
}

static void
a_limit_gives_one_answer_in_every_delivery(void)
{
    for (int i = 0; i < 4; i++) {
        uint32_t len = (uint32_t)strlen(heads[i]);
        pf_options_init(&limits);
        check_limit(heads[i], &limits.max_header_size, len);
        pf_options_init(&limits);
        check_limit(heads[i], &limits.max_field_size, len);
        pf_options_init(&limits);
        check_limit(heads[i], &limits.max_target_size, len);
        pf_options_init(&limits);
        check_limit(heads[i], &limits.max_fields, PF_HEAD_FIELDS);
    }
}

static void
limits_count_what_they_say(void)
{
    static const char text[] = "GET /1234567 HTTP/1.1\r\nHost: a\r\nX: 45678\r\n\r\n";
    pf_head head;
    pf_options_init(&limits);
    limits.max_target_size = 8;
    limits.max_fields = 2;
    limits.max_field_size = 10; /* with its CR LF */
    limits.max_header_size = sizeof text - 1;
    assert(parse(&head, text, sizeof text - 1) > 0);
    limits.max_target_size = 7;
    assert(parse(&head, text, sizeof text - 1) == PF_ERR_TARGET_LENGTH);
    limits.max_target_size = 8;
    limits.max_fields = 1;
    assert(parse(&head, text, sizeof text - 1) == PF_ERR_HEAD_SIZE);
    limits.max_fields = 2;
    limits.max_field_size = 9;
    assert(parse(&head, text, sizeof text - 1) == PF_ERR_HEAD_SIZE);
    limits.max_field_size = 10;
    limits.max_header_size = sizeof text - 2;
    assert(parse(&head, text, sizeof text - 1) == PF_ERR_HEAD_SIZE);
}

static void
an_endless_line_is_refused_at_its_limit(void)
{
    static char text[20000];
    pf_head head;
    pf_options_init(&limits);
    memset(text, 'a', sizeof text);
    assert(parse(&head, text, PF__METHOD_MAX) == 0);
    assert(parse(&head, text, PF__METHOD_MAX + 1) == PF_ERR_METHOD);
    memcpy(text, "GET /", 5);
    assert(parse(&head, text, 4 + limits.max_target_size) == 0);
    assert(parse(&head, text, 5 + limits.max_target_size) == PF_ERR_TARGET_LENGTH);
    static const char line[] = "GET / HTTP/1.1\r\n";
    size_t at = sizeof line - 1;
    memset(text, 'a', sizeof text);
    memcpy(text, line, at);
    assert(parse(&head, text, at + limits.max_field_size) == 0);
    assert(parse(&head, text, at + limits.max_field_size + 1) == PF_ERR_HEAD_SIZE);
}

static void
as_many_fields_as_there_is_room_for_are_taken(void)
{
    static char text[4096];
    pf_head head;
    pf_options_init(&limits);
    limits.max_fields = PF_HEAD_FIELDS;
    int len = snprintf(text, sizeof text, "GET / HTTP/1.1\r\nHost: a\r\n");
    for (int i = 1; i < PF_HEAD_FIELDS; i++)
        len += snprintf(text + len, sizeof text - (size_t)len, "x: %d\r\n", i);
    snprintf(text + len, sizeof text - (size_t)len, "\r\n");
    assert(parse(&head, text, (size_t)len + 2) == len + 2);
    assert(head.nfields == PF_HEAD_FIELDS);
    snprintf(text + len, sizeof text - (size_t)len, "y: 1\r\n\r\n");
    assert(parse(&head, text, strlen(text)) == PF_ERR_HEAD_SIZE);
}

/* ---- chunked bodies -----------------------------------------------------------------*/
typedef struct decoded {
    int rc;
    size_t used, len; /* bytes of framing and payload taken; of payload given */
    char payload[512];
} decoded;

static const uint64_t NO_LIMIT = INT64_MAX;

/* Delivered in pieces of `step` bytes, or (step 0) split once at `at`. */
static decoded
decode(const char *text, size_t len, size_t step, size_t at, uint64_t max_body)
{
    decoded d = {0};
    pf__chunked chunked = {0};
    char *data = malloc(len + 1);
    size_t raw = 0, end = 0, have = 0;
    memcpy(data, text, len);
    while (d.rc == 0 && have < len) {
        have = step > 0 ? have + step : have < at ? at : len;
        if (have > len)
            have = len;
        d.rc = pf__http_decode_chunked(&chunked, data, &raw, have, &end, max_body,
                                       &limits);
        assert(end <= raw && raw <= have);
        assert(memcmp(data + raw, text + raw, len - raw) == 0);
    }
    d.used = raw;
    d.len = end;
    assert(end < sizeof d.payload);
    memcpy(d.payload, data, end);
    free(data);
    return d;
}

static bool
same_decoded(const decoded *a, const decoded *b)
{
    return a->rc == b->rc && a->used == b->used && a->len == b->len
           && memcmp(a->payload, b->payload, a->len) == 0;
}

static decoded
decode_every_way(const char *text, size_t len, uint64_t max_body)
{
    decoded whole = decode(text, len, len, 0, max_body);
    decoded steps = decode(text, len, 1, 0, max_body);
    assert(same_decoded(&whole, &steps));
    for (size_t at = 1; at < len; at++) {
        decoded split = decode(text, len, 0, at, max_body);
        assert(same_decoded(&whole, &split));
    }
    return whole;
}

static decoded
decode_text(const char *text)
{
    return decode_every_way(text, strlen(text), NO_LIMIT);
}

static void
chunks_become_one_payload_and_what_follows_is_left(void)
{
    static const char text[] = "5\r\nhello\r\n1;a=b;c=\"d \\\" e\";f\r\n \r\n"
                               "0005\r\nworld\r\n0\r\nX: y\r\n\r\nGET / ";
    pf_options_init(&limits);
    decoded d = decode_text(text);
    assert(d.rc == 1 && d.len == 11 && memcmp(d.payload, "hello world", 11) == 0);
    assert(strcmp(text + d.used, "GET / ") == 0);
}

static void
an_empty_body_is_its_last_chunk(void)
{
    pf_options_init(&limits);
    decoded d = decode_text("0\r\n\r\n");
    assert(d.rc == 1 && d.len == 0 && d.used == 5);
}

static const struct broken {
    const char *text;
    int error;
} broken[] = {
    {"\r\n", PF_ERR_CHUNK_SIZE},
    {"g\r\n", PF_ERR_CHUNK_SIZE},
    {" 5\r\n", PF_ERR_CHUNK_SIZE},
    {"5 \r\n", PF_ERR_CHUNK_SIZE},
    {"0x5\r\n", PF_ERR_CHUNK_SIZE},
    {"-5\r\n", PF_ERR_CHUNK_SIZE},
    {"5\nhello", PF_ERR_CHUNK_SIZE},
    {"5\r\rhello", PF_ERR_CHUNK_SIZE},
    {"00000000000000005\r\n", PF_ERR_CHUNK_SIZE},
    {"5;\r\n", PF_ERR_CHUNK_EXTENSION},
    {"5;a=\r\n", PF_ERR_CHUNK_EXTENSION},
    {"5;a=\"\r\n", PF_ERR_CHUNK_EXTENSION},
    {"5;a=\"b\"c\r\n", PF_ERR_CHUNK_EXTENSION},
    {"5\r\nhello\n", PF_ERR_CHUNK_DATA},
    {"5\r\nhello0\r\n\r\n", PF_ERR_CHUNK_DATA},
    {"5\r\nhello\r0\r\n\r\n", PF_ERR_CHUNK_DATA},
    {"5\r\nhello!!\r\n0\r\n\r\n", PF_ERR_CHUNK_DATA},
    {"0\r\n\n", PF_ERR_TRAILER},
    {"0\r\n\r\r", PF_ERR_TRAILER},
    {"0\r\nHost: a\r\n\r\n", PF_ERR_TRAILER},
    {"0\r\nContent-Length: 5\r\n\r\n", PF_ERR_TRAILER},
    {"0\r\n folded\r\n\r\n", PF_ERR_TRAILER},
    {"0\r\nX: a\n\r\n", PF_ERR_TRAILER},
    {"0\r\nX: a\r\rY: b\r\n\r\n", PF_ERR_TRAILER},
    {"0\r\nGET / HTTP/1.1\r\n\r\n", PF_ERR_TRAILER},
};

enum { NBROKEN = sizeof broken / sizeof *broken };

static void
broken_framing_has_one_error_in_every_delivery(void)
{
    pf_options_init(&limits);
    for (int i = 0; i < NBROKEN; i++)
        assert(decode_text(broken[i].text).rc == broken[i].error);
}

/* A reader that asks again must not find the wrong byte to be the right next one. */
static void
broken_framing_stays_broken(void)
{
    pf_options_init(&limits);
    for (int i = 0; i < NBROKEN; i++) {
        pf__chunked chunked = {0};
        char data[64];
        size_t raw = 0, end = 0, len = strlen(broken[i].text);
        memcpy(data, broken[i].text, len);
        for (int again = 0; again < 3; again++)
            assert(pf__http_decode_chunked(&chunked, data, &raw, len, &end, NO_LIMIT,
                                           &limits)
                   == broken[i].error);
    }
}

static void
a_body_over_its_limit_is_refused_at_the_size_that_exceeds_it(void)
{
    static const char text[] = "5\r\nhello\r\n5\r\nworld\r\n0\r\n\r\n";
    pf_options_init(&limits);
    assert(decode_every_way(text, sizeof text - 1, 10).rc == 1);
    decoded d = decode_every_way(text, sizeof text - 1, 9);
    assert(d.rc == PF_ERR_BODY_SIZE && d.len == 5);
    static const char huge[] = "ffffffffffffffff\r\n";
    assert(decode_every_way(huge, sizeof huge - 1, NO_LIMIT).rc == PF_ERR_BODY_SIZE);
}

static void
extensions_are_limited_for_a_chunk_and_for_a_body(void)
{
    static char text[32768];
    pf_options_init(&limits);
    int len =
        snprintf(text, sizeof text, "1;%0*d\r\nx\r\n0\r\n\r\n", PF__CHUNK_EXT_MAX, 0);
    assert(decode(text, (size_t)len, 1, 0, NO_LIMIT).rc == PF_ERR_CHUNK_EXTENSION);
    len = snprintf(text, sizeof text, "1;%0*d\r\nx\r\n0\r\n\r\n", PF__CHUNK_EXT_MAX - 1,
                   0);
    assert(decode(text, (size_t)len, 1, 0, NO_LIMIT).rc == 1);
    len = 0;
    for (int i = 0; i < 100; i++)
        len +=
            snprintf(text + len, sizeof text - (size_t)len, "1;%0*d\r\nx\r\n", 100, 0);
    assert(decode(text, (size_t)len, 1, 0, NO_LIMIT).rc == PF_ERR_CHUNK_EXTENSION);
    assert(decode(text, 3000, 1, 0, NO_LIMIT).rc == 0);
}

static void
trailers_obey_the_limits_of_a_head(void)
{
    static const char text[] = "0\r\nA: 1\r\nBcd: 234\r\n\r\n";
    pf_options_init(&limits);
    limits.max_fields = 2;
    limits.max_field_size = 10;
    limits.max_header_size = 18;
    assert(decode_text(text).rc == 1);
    limits.max_fields = 1;
    assert(decode_text(text).rc == PF_ERR_HEAD_SIZE);
    limits.max_fields = 2;
    limits.max_field_size = 9;
    assert(decode_text(text).rc == PF_ERR_HEAD_SIZE);
    limits.max_field_size = 10;
    limits.max_header_size = 12;
    assert(decode_text(text).rc == PF_ERR_HEAD_SIZE);
}

int
main(void)
{
    every_known_name_has_its_number_in_any_case();
    a_name_that_is_nearly_known_is_not();
    numbers_outside_the_table_have_no_name();
    a_list_has_its_elements_in_any_case_and_no_part_of_one();
    a_length_is_digits_without_leading_zero();
    pf_options_init(&limits);
    a_head_becomes_slices_of_its_bytes();
    fields_are_found_by_name_in_any_case_one_after_the_other();
    only_letters_fold_their_case();
    the_authority_of_a_target_is_what_host_holds();
    spans_count_from_the_first_byte_also_behind_ignored_lines();
    a_head_is_the_same_in_every_delivery();
    a_head_that_is_cut_anywhere_wants_more();
    after_any_other_head_a_head_is_parsed_the_same();
    a_block_is_known_behind_another_request_line();
    a_known_block_that_is_cut_wants_more_and_one_that_differs_is_parsed();
    a_known_block_is_held_to_the_limit_of_the_head();
    a_block_that_is_large_is_not_kept();
    a_limit_gives_one_answer_in_every_delivery();
    limits_count_what_they_say();
    an_endless_line_is_refused_at_its_limit();
    as_many_fields_as_there_is_room_for_are_taken();
    chunks_become_one_payload_and_what_follows_is_left();
    an_empty_body_is_its_last_chunk();
    broken_framing_has_one_error_in_every_delivery();
    broken_framing_stays_broken();
    a_body_over_its_limit_is_refused_at_the_size_that_exceeds_it();
    extensions_are_limited_for_a_chunk_and_for_a_body();
    trailers_obey_the_limits_of_a_head();
    return 0;
}
