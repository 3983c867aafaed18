/* fuzz_chunked.c - a chunked body gives the same payload however it is delivered.
 *
 * Input: a byte that picks the limits, a byte n, n sizes of pieces (taken in turn), the
 * bytes of the body. It is decoded whole, in these pieces and byte by byte; bytes that
 * were not delivered yet are poisoned. What is accepted is decoded once more by a
 * decoder too simple to be wrong in the same way.
 */
#undef NDEBUG
#include "internal.h"

#include <sanitizer/asan_interface.h>

typedef struct input {
    const uint8_t *pieces;
    size_t npieces;
    const char *data;
    size_t len;
    uint64_t max_body;
    pf_options limits;
} input;

typedef struct outcome {
    int rc;
    size_t used, len;
    char *data; /* payload [0, len), then bytes already used, then the rest */
} outcome;

static void
pick_limits(input *in, uint8_t pick)
{
    pf_options_init(&in->limits);
    in->max_body = in->limits.max_body_size;
    if (pick < 0x80)
        return;
    in->max_body = (pick & 0x7fu) * 4;
    in->limits.max_header_size = 8 + (pick & 0x1fu) * 4;
    in->limits.max_field_size = 8 + (pick & 0x0fu) * 2;
    in->limits.max_fields = pick & 3u;
}

/* ---- deliveries ---------------------------------------------------------------------*/
enum { WHOLE, PIECES, BYTES };

static size_t
next_piece(const input *in, int delivery, size_t turn)
{
    if (delivery == WHOLE)
        return in->len;
    if (delivery == BYTES || in->npieces == 0)
        return 1;
    return 1u + in->pieces[turn % in->npieces];
}

/* A decoder that is asked again after an error must not find its way back. */
static void
check_stays_refused(const input *in, pf__chunked *chunked, outcome *out)
{
    size_t raw = out->used, end = out->len;
    int rc = pf__http_decode_chunked(chunked, out->data, &raw, in->len, &end,
                                     in->max_body, &in->limits);
    assert(rc == out->rc && raw == out->used && end == out->len);
}

static void
decode(const input *in, int delivery, outcome *out)
{
    pf__chunked chunked = {0};
    size_t have = 0;
    *out = (outcome){.data = malloc(in->len)};
    memcpy(out->data, in->data, in->len);
    for (size_t turn = 0; out->rc == 0 && have < in->len; turn++) {
        have += next_piece(in, delivery, turn);
        if (have > in->len)
            have = in->len;
        ASAN_POISON_MEMORY_REGION(out->data + have, in->len - have);
        out->rc = pf__http_decode_chunked(&chunked, out->data, &out->used, have,
                                          &out->len, in->max_body, &in->limits);
        ASAN_UNPOISON_MEMORY_REGION(out->data, in->len);
        assert(out->len <= out->used && out->used <= have);
        assert(out->rc != 0 || out->used == have);
        assert(out->len <= in->max_body);
    }
    assert(memcmp(out->data + out->used, in->data + out->used, in->len - out->used)
           == 0);
    if (out->rc < 0)
        check_stays_refused(in, &chunked, out);
}

static void
check_same(const outcome *a, const outcome *b)
{
    assert(a->rc == b->rc && a->used == b->used && a->len == b->len);
    assert(memcmp(a->data, b->data, a->len) == 0);
}

/* ---- the simple decoder -------------------------------------------------------------*/
/* The line at `at`, without its CR LF; -1 if there is none. */
static long
line_length(const input *in, size_t at)
{
    for (size_t i = at; i + 1 < in->len; i++)
        if (in->data[i] == '\r' && in->data[i + 1] == '\n')
            return (long)(i - at);
    return -1;
}

static size_t
chunk_size(const char *line, long len)
{
    char digits[20] = {0};
    for (long i = 0; i < len && i < 17 && line[i] != ';'; i++)
        digits[i] = line[i];
    char *end;
    size_t size = strtoull(digits, &end, 16);
    assert(end != digits && *end == '\0');
    return size;
}

static void
check_accepted(const input *in, const outcome *out)
{
    size_t at = 0, len = 0, size;
    do {
        long line = line_length(in, at);
        assert(line > 0);
        size = chunk_size(in->data + at, line);
        at += (size_t)line + 2;
        assert(at + size <= in->len && len + size <= out->len);
        assert(memcmp(in->data + at, out->data + len, size) == 0);
        len += size;
        at += size;
        assert(size == 0 || memcmp(in->data + at, "\r\n", 2) == 0);
        at += size == 0 ? 0 : 2;
    } while (size > 0);
    long line;
    do { /* trailers */
        line = line_length(in, at);
        assert(line == 0 || memchr(in->data + at, ':', (size_t)line) != NULL);
        at += (size_t)line + 2;
    } while (line > 0);
    assert(len == out->len && at == out->used);
}

/* ---- one input ----------------------------------------------------------------------*/
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2 || size < 3 + (size_t)(data[1] & 7))
        return 0;
    input in = {.pieces = data + 2, .npieces = data[1] & 7};
    in.data = (const char *)data + 2 + in.npieces;
    in.len = size - 2 - in.npieces;
    pick_limits(&in, data[0]);
    outcome whole, pieces, bytes;
    decode(&in, WHOLE, &whole);
    decode(&in, PIECES, &pieces);
    decode(&in, BYTES, &bytes);
    check_same(&whole, &pieces);
    check_same(&whole, &bytes);
    if (whole.rc > 0)
        check_accepted(&in, &whole);
    free(whole.data);
    free(pieces.data);
    free(bytes.data);
    return 0;
}
