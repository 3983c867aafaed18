/* websocket.c - RFC 6455: the handshake, frames in and out. Bytes in, structs out.
 *
 * A message is parsed where it arrived. Frames are unmasked in place; the payload of a
 * fragment moves down to the end of the one before it, so that a message is one piece
 * whatever its frames and the control frames between them were. Compressed ones are
 * inflated as they come, into a buffer of their own. Text is checked as it comes, too:
 * a peer that sends what cannot become UTF-8 hears so at once.
 *
 * Messages that are complete wait in a short queue, as offsets. Pings are answered and
 * a close is echoed here, into the output; who holds the connection does the rest.
 */
#include "internal.h"

#include <errno.h>

enum opcode {
    CONTINUATION = 0,
    TEXT = PF_MESSAGE_TEXT,
    BINARY = PF_MESSAGE_BINARY,
    CLOSE = 8,
    PING = 9,
    PONG = 10,

    FIN = 0x80,
    RSV1 = 0x40, /* of a message's first frame: it is compressed (RFC 7692 6) */
    RSV = 0x70,
    MASKED = 0x80,

    KEY_SIZE = 4,
    CONTROL_MAX = 125,
    DEFLATE_MIN = 64, /* compressing less is not worth its time */
};

/* ---- the handshake ------------------------------------------------------------------*/
static const pf_field *
find(const pf_head *head, const char *bytes, const char *name, int *from)
{
    *from = pf_http_find_field(head, bytes, name, strlen(name), *from);
    return *from < 0 ? NULL : &head->fields[(*from)++];
}

/* The only field of this name; NULL: none, or more than one. */
static const pf_field *
find_only(const pf_head *head, const char *bytes, const char *name)
{
    int at = 0;
    const pf_field *field = find(head, bytes, name, &at);
    return field != NULL && find(head, bytes, name, &at) == NULL ? field : NULL;
}

static bool
is_base64(char c)
{
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9')
           || c == '+' || c == '/';
}

/* Sixteen bytes in base64: 4.2.1. */
static bool
is_key(const char *value, size_t len)
{
    if (len != PF__WEBSOCKET_KEY_SIZE || value[22] != '=' || value[23] != '=')
        return false;
    for (int i = 0; i < 22; i++)
        if (!is_base64(value[i]))
            return false;
    return strchr("AQgw", value[21]) != NULL;
}

static bool
asks(const pf_head *head, const char *bytes)
{
    unsigned wanted = PF_HEAD_UPGRADE | PF_HEAD_IS_GET;
    if ((head->flags & wanted) != wanted || head->flags & PF_HEAD_CHUNKED
        || head->content_length > 0)
        return false;
    int at = 0;
    const pf_field *field;
    while ((field = find(head, bytes, "upgrade", &at)) != NULL)
        if (pf__http_list_has(bytes + field->value_at, field->value_len, "websocket"))
            return true;
    return false;
}

int
pf__websocket_offered(const pf_head *head, const char *bytes)
{
    if (!asks(head, bytes))
        return 0;
    const pf_field *version = find_only(head, bytes, "sec-websocket-version");
    if (version == NULL || version->value_len != 2
        || memcmp(bytes + version->value_at, "13", 2) != 0)
        return PF_ERR_WEBSOCKET_VERSION;
    const pf_field *key = find_only(head, bytes, "sec-websocket-key");
    if (key == NULL || !is_key(bytes + key->value_at, key->value_len))
        return PF_ERR_WEBSOCKET_KEY;
    return 1;
}

static void
base64(char *to, const uint8_t *p, size_t n)
{
    static const char digits[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        uint32_t b = i + 1 < n ? p[i + 1] : 0, c = i + 2 < n ? p[i + 2] : 0;
        uint32_t word = (uint32_t)p[i] << 16 | b << 8 | c;
        *to++ = digits[word >> 18];
        *to++ = digits[word >> 12 & 63];
        *to++ = i + 1 < n ? digits[word >> 6 & 63] : '=';
        *to++ = i + 2 < n ? digits[word & 63] : '=';
    }
}

void
pf__websocket_accept_key(const pf_head *head, const char *bytes,
                         char accept[PF__WEBSOCKET_ACCEPT_SIZE])
{
    static const char guid[] = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    const pf_field *key = find_only(head, bytes, "sec-websocket-key");
    char text[PF__WEBSOCKET_KEY_SIZE + sizeof guid - 1];
    uint8_t digest[PF__SHA1_SIZE];
    memcpy(text, bytes + key->value_at, PF__WEBSOCKET_KEY_SIZE);
    memcpy(text + PF__WEBSOCKET_KEY_SIZE, guid, sizeof guid - 1);
    pf__sha1_digest(digest, text, sizeof text);
    base64(accept, digest, sizeof digest);
}

/* The first offer that can be accepted: several fields are one list. */
bool
pf__websocket_accept_deflate(pf__deflate *deflate, const pf_head *head,
                             const char *bytes)
{
    int at = 0;
    const pf_field *field;
    while ((field = find(head, bytes, "sec-websocket-extensions", &at)) != NULL)
        if (pf__deflate_accept(deflate, bytes + field->value_at, field->value_len))
            return true;
    return false;
}

/* ---- frames out ---------------------------------------------------------------------*/
enum { HEADER_MAX = 10 };

static size_t
put_header(char *p, int first, uint64_t len)
{
    size_t size = len <= CONTROL_MAX ? 2 : len <= 0xffff ? 4 : HEADER_MAX;
    p[0] = (char)first;
    p[1] = (char)(size == 2 ? len : size == 4 ? 126 : 127);
    for (size_t i = size; i > 2; len >>= 8)
        p[--i] = (char)(len & 0xff);
    return size;
}

static int
put_frame(pf__pool *pool, pf__buffer *out, int first, const char *data, size_t len)
{
    int rc = pf__buffer_reserve(pool, out, HEADER_MAX + len);
    if (rc < 0)
        return rc;
    out->len += put_header(out->data + out->len, first, len);
    if (len > 0)
        pf__buffer_put(out, data, len);
    return 0;
}

/* The header comes first and says how long the rest is: leave room, then close up. */
static int
put_deflated(pf__websocket *ws, pf__pool *pool, pf__buffer *out, int kind,
             const char *data, size_t len)
{
    size_t before = out->len, room = before + HEADER_MAX;
    int rc = pf__buffer_reserve(pool, out, HEADER_MAX);
    if (rc < 0)
        return rc;
    out->len = room;
    rc = pf__deflate_deflate(&ws->deflate, pool, data, len, out);
    if (rc < 0) {
        out->len = before;
        return rc;
    }
    size_t deflated = out->len - room;
    size_t size = put_header(out->data + before, FIN | RSV1 | kind, deflated);
    memmove(out->data + before + size, out->data + room, deflated);
    out->len = before + size + deflated;
    return 0;
}

bool
pf__websocket_deflates(const pf__websocket *ws, size_t len)
{
    return ws->deflate.on && len >= DEFLATE_MIN;
}

int
pf__websocket_send(pf__websocket *ws, pf__pool *pool, pf__buffer *out, int kind,
                   const char *data, size_t len)
{
    if (PF__UNLIKELY(pf__websocket_deflates(ws, len)))
        return put_deflated(ws, pool, out, kind, data, len);
    return put_frame(pool, out, FIN | kind, data, len);
}

int
pf__websocket_send_header(pf__pool *pool, pf__buffer *out, int kind, size_t len)
{
    int rc = pf__buffer_reserve(pool, out, HEADER_MAX);
    if (rc < 0)
        return rc;
    out->len += put_header(out->data + out->len, FIN | kind, len);
    return 0;
}

int
pf__websocket_ping(pf__pool *pool, pf__buffer *out)
{
    return put_frame(pool, out, FIN | PING, NULL, 0);
}

/* Codes that may stand in a frame: 7.4, and what IANA has registered since. */
static bool
is_code(unsigned code)
{
    return (code >= 1000 && code <= 1014 && (code < 1004 || code > 1006))
           || (code >= 3000 && code <= 4999);
}

static int
put_close(pf__websocket *ws, pf__pool *pool, pf__buffer *out, const char *payload,
          size_t len)
{
    if (ws->close_sent)
        return 0;
    ws->close_sent = true;
    return put_frame(pool, out, FIN | CLOSE, payload, len);
}

int
pf__websocket_close(pf__websocket *ws, pf__pool *pool, pf__buffer *out, unsigned code,
                    const char *reason, size_t len)
{
    pf__utf8 utf8 = {0};
    char payload[CONTROL_MAX];
    if (!is_code(code) || len > PF__WEBSOCKET_REASON_MAX)
        return PF_ERR_APP_CLOSE;
    if (len > 0 && (!pf__payload_utf8(&utf8, reason, len) || utf8.left > 0))
        return PF_ERR_APP_CLOSE;
    payload[0] = (char)(code >> 8);
    payload[1] = (char)(code & 0xff);
    if (len > 0)
        memcpy(payload + 2, reason, len);
    return put_close(ws, pool, out, payload, len + 2);
}

static unsigned
code_of(int error)
{
    switch (error) {
    case PF_ERR_WEBSOCKET_TEXT:
    case PF_ERR_WEBSOCKET_DATA:
        return 1007;
    case PF_ERR_WEBSOCKET_SIZE:
        return 1009;
    case PF_ERR_WEBSOCKET_FRAME:
        return 1002;
    default: /* PF_ERR_WEBSOCKET_PONG, and our own */
        return 1011;
    }
}

void
pf__websocket_fail(pf__websocket *ws, pf__pool *pool, pf__buffer *out, int error)
{
    const char *reason = pf_error_text(error);
    size_t len = strlen(reason);
    pf__websocket_end(ws, code_of(error), reason, len);
    pf__websocket_close(ws, pool, out, code_of(error), reason,
                        len < PF__WEBSOCKET_REASON_MAX ? len : 0);
}

void
pf__websocket_end(pf__websocket *ws, unsigned code, const char *reason, size_t len)
{
    if (ws->code != 0)
        return;
    ws->code = (uint16_t)code;
    ws->reason_len = (uint8_t)(len < sizeof ws->reason ? len : 0);
    if (ws->reason_len > 0)
        memcpy(ws->reason, reason, ws->reason_len);
}

/* ---- frames in ----------------------------------------------------------------------*/
enum { GO_ON = 100 }; /* beside PF__WEBSOCKET_*: there may be more to parse */

typedef struct frame {
    uint64_t len;
    size_t header;
    int first, opcode;
    bool fin;
} frame;

static uint64_t
big_endian(const char *p, int n)
{
    uint64_t value = 0;
    for (int i = 0; i < n; i++)
        value = value << 8 | (uint8_t)p[i];
    return value;
}

/* Its first two bytes, which say most of what can be wrong. */
static bool
is_frame(const pf__websocket *ws, const frame *f)
{
    bool data = f->opcode == TEXT || f->opcode == BINARY;
    int allowed = data && ws->deflate.on ? RSV1 : 0;
    if (f->first & RSV & ~allowed)
        return false;
    if (f->opcode >= CLOSE)
        return f->opcode <= PONG && f->fin && f->len <= CONTROL_MAX;
    return data ? !ws->in_message : f->opcode == CONTINUATION && ws->in_message;
}

static size_t
message_size(const pf__websocket *ws)
{
    return ws->deflated ? ws->plain.len - ws->plain_at : ws->end - ws->start;
}

static bool
is_too_large(const pf__websocket *ws, const frame *f)
{
    size_t before = f->opcode == CONTINUATION ? message_size(ws) : 0;
    return f->opcode < CLOSE && f->len > ws->max_size - before;
}

/* 1: a header; 0: more bytes are needed; < 0: it is none. */
static int
parse_header(const pf__websocket *ws, frame *f, const char *p, size_t have)
{
    if (have < 2)
        return 0;
    f->first = (uint8_t)p[0];
    f->fin = f->first & FIN;
    f->opcode = f->first & 15;
    f->len = (uint8_t)p[1] & 127;
    if (!(p[1] & MASKED) || !is_frame(ws, f))
        return PF_ERR_WEBSOCKET_FRAME;
    int more = f->len == 126 ? 2 : f->len == 127 ? 8 : 0;
    f->header = 2 + (size_t)more + KEY_SIZE;
    if (have < 2 + (size_t)more)
        return 0;
    if (more > 0) {
        f->len = big_endian(p + 2, more);
        if (f->len > INT64_MAX || f->len <= (more == 2 ? 125u : 0xffffu))
            return PF_ERR_WEBSOCKET_FRAME; /* it had a shorter form: 5.2 */
    }
    if (is_too_large(ws, f))
        return PF_ERR_WEBSOCKET_SIZE;
    return have >= f->header;
}

static int
heed_close(pf__websocket *ws, pf__pool *pool, const char *p, size_t len,
           pf__buffer *out)
{
    pf__utf8 utf8 = {0};
    if (len == 1 || (len > 1 && !is_code((unsigned)big_endian(p, 2))))
        return PF_ERR_WEBSOCKET_FRAME;
    if (len > 2 && (!pf__payload_utf8(&utf8, p + 2, len - 2) || utf8.left > 0))
        return PF_ERR_WEBSOCKET_TEXT;
    if (len == 0)
        pf__websocket_end(ws, 1005, NULL, 0);
    else
        pf__websocket_end(ws, (unsigned)big_endian(p, 2), p + 2, len - 2);
    int rc = put_close(ws, pool, out, p, len < 2 ? 0 : 2);
    return rc < 0 ? rc : PF__WEBSOCKET_CLOSED;
}

static int
heed_control(pf__websocket *ws, pf__pool *pool, const frame *f, char *p,
             pf__buffer *out)
{
    int rc = 0;
    pf__payload_mask(p, p, f->len, (const uint8_t *)p - KEY_SIZE);
    if (f->opcode == CLOSE)
        return heed_close(ws, pool, p, f->len, out);
    if (f->opcode == PING && !ws->close_sent)
        rc = put_frame(pool, out, FIN | PONG, p, f->len);
    return rc < 0 ? rc : GO_ON;
}

static void
begin_message(pf__websocket *ws, const frame *f, size_t at)
{
    ws->in_message = true;
    ws->kind = (uint8_t)f->opcode;
    ws->deflated = f->first & RSV1;
    ws->utf8 = (pf__utf8){0};
    ws->start = ws->end = at;
    ws->plain_at = ws->plain.len;
}

static int
begin_frame(pf__websocket *ws, pf__pool *pool, pf__buffer *in, size_t *raw,
            pf__buffer *out)
{
    frame f;
    size_t have = in->len - *raw;
    if (have == 0)
        return PF__WEBSOCKET_HUNGRY;
    char *p = in->data + *raw;
    int rc = parse_header(ws, &f, p, have);
    if (rc <= 0)
        return rc;
    if (f.opcode >= CLOSE) {
        if (have - f.header < f.len)
            return PF__WEBSOCKET_HUNGRY;
        *raw += f.header + f.len;
        return heed_control(ws, pool, &f, p + f.header, out);
    }
    if (f.opcode != CONTINUATION)
        begin_message(ws, &f, *raw + f.header);
    *raw += f.header;
    ws->left = f.len;
    ws->in_frame = true;
    ws->fin = f.fin;
    memcpy(ws->key, p + f.header - KEY_SIZE, KEY_SIZE);
    return GO_ON;
}

/* The key as it stands n bytes on. */
static void
turn_key(uint8_t key[KEY_SIZE], size_t n)
{
    uint8_t before[KEY_SIZE];
    memcpy(before, key, KEY_SIZE);
    for (size_t i = 0; i < KEY_SIZE; i++)
        key[i] = before[(i + n) % KEY_SIZE];
}

static int
check_text(pf__websocket *ws, const char *p, size_t len, bool last)
{
    if (ws->kind != TEXT)
        return 0;
    if (len > 0 && !pf__payload_utf8(&ws->utf8, p, len))
        return PF_ERR_WEBSOCKET_TEXT;
    if (last && ws->utf8.left > 0)
        return PF_ERR_WEBSOCKET_TEXT;
    return 0;
}

static int
take_plain(pf__websocket *ws, char *data, size_t raw, size_t n, bool last)
{
    char *to = data + ws->end;
    pf__payload_mask(to, data + raw, n, ws->key);
    ws->end += n;
    return check_text(ws, to, n, last);
}

static int
take_deflated(pf__websocket *ws, pf__pool *pool, char *raw, size_t n, bool last)
{
    size_t before = ws->plain.len;
    size_t room = ws->max_size - (before - ws->plain_at);
    pf__payload_mask(raw, raw, n, ws->key);
    int rc = pf__deflate_inflate(&ws->deflate, pool, raw, n, last, &ws->plain, room);
    /* what came out before it failed may have been wrong already */
    size_t made = ws->plain.len - before;
    const char *p = made > 0 ? ws->plain.data + before : "";
    int text = check_text(ws, p, made < room ? made : room, last && rc == 0);
    return text < 0 ? text : rc;
}

static void
push_message(pf__websocket *ws)
{
    unsigned at = (ws->first + ws->count++) % PF__WEBSOCKET_QUEUE;
    ws->queue[at] = (pf__queued){
        .at = (uint32_t)(ws->deflated ? ws->plain_at : ws->start),
        .len = (uint32_t)message_size(ws),
        .kind = ws->kind,
        .plain = ws->deflated,
    };
    ws->in_message = false;
}

static int
take_payload(pf__websocket *ws, pf__pool *pool, pf__buffer *in, size_t *raw)
{
    size_t n = in->len - *raw;
    if (n > ws->left)
        n = (size_t)ws->left;
    if (n == 0 && ws->left > 0)
        return PF__WEBSOCKET_HUNGRY;
    bool last = ws->fin && n == ws->left;
    int rc = 0;
    if (ws->close_sent)
        ws->start = ws->end = *raw; /* whatever it is, it comes too late */
    else if (ws->deflated)
        rc = take_deflated(ws, pool, in->data + *raw, n, last);
    else
        rc = take_plain(ws, in->data, *raw, n, last);
    if (rc < 0)
        return rc;
    *raw += n;
    ws->left -= n;
    if (ws->left > 0) {
        turn_key(ws->key, n);
        return PF__WEBSOCKET_HUNGRY;
    }
    ws->in_frame = false;
    if (ws->fin && ws->close_sent)
        ws->in_message = false;
    else if (ws->fin)
        push_message(ws);
    return GO_ON;
}

static void
drop_plain(pf__websocket *ws)
{
    pf__buffer *plain = &ws->plain;
    plain->len -= ws->plain_at;
    memmove(plain->data, plain->data + ws->plain_at, plain->len);
    ws->plain_at = 0;
}

/* What was taken out is not lent any more: its place is free. */
static void
tidy(pf__websocket *ws, pf__pool *pool, pf__buffer *in, size_t *raw)
{
    bool inflating = ws->in_message && ws->deflated;
    if (ws->count > 0)
        return;
    if (!inflating && ws->plain.data != NULL)
        pf__buffer_release(pool, &ws->plain);
    else if (inflating && ws->plain_at > 0)
        drop_plain(ws);
    if ((!ws->in_message || inflating) && *raw == in->len)
        *raw = in->len = 0;
}

/* Messages that wait take as much room as their bytes did on the way, unless they were
 * inflated: then one may have become a thousand times larger, and is enough. */
static bool
is_full(const pf__websocket *ws)
{
    return ws->count == PF__WEBSOCKET_QUEUE
           || (ws->count > 0 && ws->plain.len >= PF__BODY_WINDOW);
}

int
pf__websocket_parse(pf__websocket *ws, pf__pool *pool, pf__buffer *in, size_t *raw,
                    pf__buffer *out)
{
    int rc = GO_ON;
    tidy(ws, pool, in, raw);
    while (rc == GO_ON) {
        if (is_full(ws))
            return PF__WEBSOCKET_FULL;
        if (ws->in_frame)
            rc = take_payload(ws, pool, in, raw);
        else
            rc = begin_frame(ws, pool, in, raw, out);
    }
    return rc;
}

bool
pf__websocket_take(pf__websocket *ws, const pf__buffer *in, pf_message *message)
{
    if (ws->count == 0)
        return false;
    const pf__queued *queued = &ws->queue[ws->first];
    const pf__buffer *from = queued->plain ? &ws->plain : in;
    const char *data = queued->len > 0 ? from->data + queued->at : "";
    *message = (pf_message){data, queued->len, queued->kind};
    ws->first = (ws->first + 1) % PF__WEBSOCKET_QUEUE;
    ws->count--;
    return true;
}

/* Where the first byte stands that is still wanted; and behind the last before raw. */
static size_t
kept_from(const pf__websocket *ws, size_t raw)
{
    for (unsigned i = 0; i < ws->count; i++) {
        const pf__queued *queued = &ws->queue[(ws->first + i) % PF__WEBSOCKET_QUEUE];
        if (!queued->plain)
            return queued->at;
    }
    return ws->in_message && !ws->deflated ? ws->start : raw;
}

static size_t
kept_to(const pf__websocket *ws, size_t from)
{
    if (ws->in_message && !ws->deflated)
        return ws->end;
    for (unsigned i = ws->count; i-- > 0;) {
        const pf__queued *queued = &ws->queue[(ws->first + i) % PF__WEBSOCKET_QUEUE];
        if (!queued->plain)
            return queued->at + queued->len;
    }
    return from;
}

void
pf__websocket_compact(pf__websocket *ws, pf__buffer *in, size_t *raw)
{
    size_t from = kept_from(ws, *raw), to = kept_to(ws, from);
    memmove(in->data, in->data + from, to - from);
    memmove(in->data + (to - from), in->data + *raw, in->len - *raw);
    in->len -= from + (*raw - to);
    *raw = to - from;
    if (ws->in_message && !ws->deflated) {
        ws->start -= from;
        ws->end -= from;
    }
    for (unsigned i = 0; i < ws->count; i++) {
        pf__queued *queued = &ws->queue[(ws->first + i) % PF__WEBSOCKET_QUEUE];
        if (!queued->plain)
            queued->at -= (uint32_t)from;
    }
}

size_t
pf__websocket_waiting(const pf__websocket *ws)
{
    size_t size = 0;
    for (unsigned i = 0; i < ws->count; i++)
        size += ws->queue[(ws->first + i) % PF__WEBSOCKET_QUEUE].len;
    return size;
}

pf__websocket *
pf__websocket_new(uint32_t max_size, const pf__deflate *deflate)
{
    pf__websocket *ws = calloc(1, sizeof *ws);
    if (ws != NULL) {
        ws->max_size = max_size;
        ws->deflate = *deflate;
    }
    return ws;
}

void
pf__websocket_free(pf__websocket *ws, pf__pool *pool)
{
    if (ws == NULL)
        return;
    pf__deflate_close(&ws->deflate);
    pf__buffer_release(pool, &ws->plain);
    free(ws);
}
