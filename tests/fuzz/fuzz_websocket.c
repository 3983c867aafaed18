/* fuzz_websocket.c - what a peer sends is the same in every delivery.
 *
 * Input: a byte of options, one that says where to split, the bytes behind a handshake.
 * They are parsed whole, byte by byte, and in two parts with the messages left waiting.
 * Frames need masks; so that few bytes get far, a key of zeros is as good as any.
 */
#undef NDEBUG
#include "internal.h"

enum { MAX_SIZE = 4096, MOST = 1 << 20 };

static pf__pool pool;

typedef struct outcome {
    int rc;
    unsigned code;
    pf__buffer heard, said;
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
        pf__utf8 utf8 = {0};
        uint32_t len = (uint32_t)message.len;
        assert(message.len <= MAX_SIZE);
        assert(message.kind == PF_MESSAGE_BINARY
               || (pf__payload_utf8(&utf8, message.data, message.len) && !utf8.left));
        append(heard, &message.kind, sizeof message.kind);
        append(heard, &len, sizeof len);
        append(heard, message.data, message.len);
    }
}

static pf__websocket *
open_websocket(uint8_t options)
{
    static const char *const offers[] = {
        NULL, "permessage-deflate", "permessage-deflate; client_no_context_takeover",
        "permessage-deflate; client_max_window_bits=9"};
    const char *offer = offers[options & 3];
    pf__deflate deflate = {0};
    if (offer != NULL)
        assert(pf__deflate_accept(&deflate, offer, strlen(offer)));
    return pf__websocket_new(MAX_SIZE, &deflate);
}

/* A copy of its own for each delivery, so that no byte behind it can be read. */
static outcome
parse(const uint8_t *data, size_t len, size_t first, size_t step, uint8_t options)
{
    outcome o = {0};
    pf__websocket *ws = open_websocket(options);
    pf__buffer in = {0};
    size_t raw = 0;
    if (options & 4)
        pf__websocket_close(ws, &pool, &o.said, 1000, "", 0);
    for (size_t at = 0, n; o.rc == 0 && at < len; at += n, first = step) {
        n = len - at < first ? len - at : first;
        if (at % 3 == 0 && in.len > 0)
            pf__websocket_compact(ws, &in, &raw);
        append(&in, data + at, n);
        do {
            o.rc = pf__websocket_parse(ws, &pool, &in, &raw, &o.said);
            if (step == 1 || o.rc == PF__WEBSOCKET_FULL)
                receive_all(ws, &in, &o.heard);
        } while (o.rc == PF__WEBSOCKET_FULL);
        assert(raw <= in.len);
    }
    receive_all(ws, &in, &o.heard);
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

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (size < 3 || size > MOST)
        return 0;
    const uint8_t *data = input + 2;
    size_t len = size - 2, split = 1 + input[1];
    outcome whole = parse(data, len, len, len, input[0]);
    outcome steps = parse(data, len, 1, 1, input[0]);
    outcome parts = parse(data, len, split, len, input[0]);
    assert(whole.rc == steps.rc && whole.rc == parts.rc);
    assert(whole.code == steps.code && whole.code == parts.code);
    check_same(&whole.heard, &steps.heard);
    check_same(&whole.heard, &parts.heard);
    check_same(&whole.said, &steps.said);
    check_same(&whole.said, &parts.said);
    drop(&whole);
    drop(&steps);
    drop(&parts);
    assert(pool.in_use == 0);
    return 0;
}
