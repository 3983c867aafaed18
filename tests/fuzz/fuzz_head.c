/* fuzz_head.c - a request head is the same in every delivery and every SIMD variant.
 *
 * Input: a byte that picks the limits, a byte that picks where to split, the bytes of
 * the connection. They are parsed whole and in two parts in each variant that this CPU
 * has, and byte by byte, which takes longest, in the one that the second byte picks;
 * bytes that were not delivered yet are poisoned.
 */
#undef NDEBUG
#include "internal.h"

#include <sanitizer/asan_interface.h>

typedef struct input {
    char *data;
    size_t len;
    size_t split;
    pf_options limits;
} input;

typedef struct outcome {
    int rc;
    size_t needed; /* bytes delivered when the answer came */
    pf_head head;
} outcome;

/* The first byte: the usual limits below 0x80, else small ones. */
static void
pick_limits(pf_options *limits, uint8_t pick)
{
    pf_options_init(limits);
    if (pick < 0x80)
        return;
    limits->max_header_size = 16 + (pick & 0x7fu) * 4;
    limits->max_target_size = 1 + (pick & 0x0fu) * 2;
    limits->max_field_size = 8 + (pick & 0x1fu) * 2;
    limits->max_fields = 1 + (pick >> 4 & 7u);
}

/* ---- deliveries ---------------------------------------------------------------------*/
/* `fill` is what the head holds before: nothing of it may count. */
static void
parse(const input *in, size_t step, size_t split, int fill, pf__repeat *known,
      outcome *out)
{
    pf__head_state state = {0};
    size_t have = 0;
    memset(&out->head, fill, sizeof out->head);
    out->rc = 0;
    ASAN_POISON_MEMORY_REGION(in->data, in->len);
    while (out->rc == 0 && have < in->len) {
        size_t had = have;
        have = step > 0 ? have + step : have < split ? split : in->len;
        if (have > in->len)
            have = in->len;
        ASAN_UNPOISON_MEMORY_REGION(in->data + had, have - had);
        out->rc =
            pf__http_parse_head(&out->head, &state, in->data, have, &in->limits, known);
    }
    ASAN_UNPOISON_MEMORY_REGION(in->data, in->len);
    out->needed = have;
}

static bool
same_span(pf_span a, pf_span b)
{
    return a.at == b.at && a.len == b.len;
}

static void
check_same_field(const pf_field *a, const pf_field *b)
{
    assert(a->name_at == b->name_at && a->name_len == b->name_len && a->id == b->id);
    assert(a->value_at == b->value_at && a->value_len == b->value_len);
}

static void
check_same(const outcome *a, const outcome *b)
{
    const pf_head *g = &a->head, *h = &b->head;
    assert(a->rc == b->rc);
    if (a->rc <= 0)
        return;
    assert(same_span(g->method, h->method) && same_span(g->target, h->target));
    assert(same_span(g->path, h->path) && same_span(g->query, h->query));
    assert(same_span(g->authority, h->authority) && g->size == h->size);
    assert(g->content_length == h->content_length && g->nfields == h->nfields);
    assert(g->minor == h->minor && g->flags == h->flags && g->host == h->host);
    for (int i = 0; i < g->nfields; i++)
        check_same_field(&g->fields[i], &h->fields[i]);
}

/* ---- what an accepted head promises -------------------------------------------------*/
static void
check_inside(const input *in, pf_span span, int class, const pf_head *head)
{
    assert(span.at <= head->size && span.len <= head->size - span.at);
    for (uint32_t i = 0; i < span.len; i++)
        assert(pf__scan_is(in->data[span.at + i], class));
}

static void
check_field(const input *in, const pf_field *field, const pf_head *head)
{
    const char *value = in->data + field->value_at;
    uint32_t len = field->value_len;
    assert(field->name_len > 0);
    check_inside(in, (pf_span){field->name_at, field->name_len}, PF__CHAR_TOKEN, head);
    check_inside(in, (pf_span){field->value_at, len}, PF__CHAR_VALUE, head);
    assert(field->id == pf__http_field_id(in->data + field->name_at, field->name_len));
    assert(len == 0 || (value[0] != ' ' && value[0] != '\t'));
    assert(len == 0 || (value[len - 1] != ' ' && value[len - 1] != '\t'));
}

static int
count_field(const pf_head *head, int id)
{
    int n = 0;
    for (int i = 0; i < head->nfields; i++)
        n += head->fields[i].id == id;
    return n;
}

/* Framing that two servers could read differently is never accepted. */
static void
check_framing(const pf_head *head)
{
    bool chunked = head->flags & PF_HEAD_CHUNKED;
    int codings = count_field(head, PF_FIELD_TRANSFER_ENCODING);
    int lengths = count_field(head, PF_FIELD_CONTENT_LENGTH);
    int hosts = count_field(head, PF_FIELD_HOST);
    assert(codings + lengths <= 1 && chunked == (codings == 1));
    assert(lengths == 1 || head->content_length == 0);
    assert(hosts <= 1 && (hosts == 1 || head->minor == 0));
    assert(hosts == 0 ? head->host == 0xff
                      : head->fields[head->host].id == PF_FIELD_HOST);
    assert(count_field(head, PF_FIELD_CONTENT_TYPE) <= 1);
    assert(head->minor > 0 || !(head->flags & (PF_HEAD_CHUNKED | PF_HEAD_EXPECT)));
}

static void
check_accepted(const input *in, const outcome *out)
{
    const pf_head *head = &out->head;
    assert((size_t)out->rc <= in->len && head->size == (uint32_t)out->rc);
    assert(memcmp(in->data + head->size - 4, "\r\n\r\n", 4) == 0);
    assert(head->method.len > 0 && head->method.len <= PF__METHOD_MAX);
    assert(head->target.len > 0 && head->target.len <= in->limits.max_target_size);
    assert(head->nfields <= in->limits.max_fields && head->minor <= 1);
    assert(head->size <= in->limits.max_header_size + 2 * PF__LEADING_CRLF_MAX);
    check_inside(in, head->method, PF__CHAR_TOKEN, head);
    check_inside(in, head->target, PF__CHAR_TARGET, head);
    check_inside(in, head->path, PF__CHAR_TARGET, head);
    check_inside(in, head->query, PF__CHAR_TARGET, head);
    check_inside(in, head->authority, PF__CHAR_TARGET, head);
    for (int i = 0; i < head->nfields; i++)
        check_field(in, &head->fields[i], head);
    check_framing(head);
}

/* ---- one input ----------------------------------------------------------------------*/
static void
check_variant(const input *in, const outcome *expected, bool bytes)
{
    static outcome out;
    static pf__repeat known;
    known.size = 0;
    for (int time = 0; time < 2; time++) {
        parse(in, in->len, 0, 0xff, &known, &out);
        check_same(expected, &out);
    }
    parse(in, 0, in->split, 0x55, &known, &out);
    check_same(expected, &out);
    if (!bytes)
        return;
    parse(in, 1, 0, 0xaa, NULL, &out);
    check_same(expected, &out);
    assert(out.rc <= 0 || out.needed == (size_t)out.rc); /* not a byte too late */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const variants[3] = {"portable", "sse2", "avx2"};
    static outcome expected;
    if (size < 3)
        return 0;
    input in = {.len = size - 2, .split = (size - 2) * data[1] / 256};
    in.data = malloc(in.len);
    memcpy(in.data, data + 2, in.len);
    pick_limits(&in.limits, data[0]);
    pf_http_set_simd("portable");
    parse(&in, in.len, 0, 0, NULL, &expected);
    if (expected.rc > 0)
        check_accepted(&in, &expected);
    /* Whoever is over the limit is not waited for. */
    assert(expected.rc != 0
           || in.len <= in.limits.max_header_size + 2 * PF__LEADING_CRLF_MAX);
    for (size_t i = 0; i < 3; i++)
        if (pf_http_set_simd(variants[i]) == 0)
            check_variant(&in, &expected, data[1] % 3 == i);
    free(in.data);
    return 0;
}
