/* deflate.c - permessage-deflate (RFC 7692): what is agreed on, and messages in and out.
 *
 * A stream costs tens of kilobytes, so it is made for the first message that needs it,
 * and does not outlive the message where no context is taken over. Windows of 4 KiB are
 * asked for in both directions, in which messages of the usual size find all they can.
 */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <zlib.h>

enum {
    BITS_MIN = 9, /* zlib cannot compress with a window of 2^8 */
    BITS_USUAL = 12,
    BITS_MAX = 15,
    LEVEL = 1, /* more costs twice the time for a few percent */
    MEMORY = 5,
    ROOM_MIN = 512,
    SYNC_SIZE = 4, /* of what ends a message and is not sent: 7.2.1 */
};

static const char sync_mark[SYNC_SIZE] = {0, 0, (char)0xff, (char)0xff};

/* ---- the offer: a list of extensions (RFC 6455 9.1) ---------------------------------*/
typedef struct words {
    const char *p, *end;
} words;

static void
skip_blank(words *t)
{
    while (t->p < t->end && (*t->p == ' ' || *t->p == '\t'))
        t->p++;
}

/* Past this character and the blanks around it. */
static bool
take(words *t, char c)
{
    skip_blank(t);
    if (t->p == t->end || *t->p != c)
        return false;
    t->p++;
    skip_blank(t);
    return true;
}

static words
take_token(words *t)
{
    size_t n = pf__scan_token(t->p, (size_t)(t->end - t->p));
    words token = {t->p, t->p + n};
    t->p += n;
    return token;
}

static bool
is(words word, const char *name)
{
    size_t n = strlen(name);
    return (size_t)(word.end - word.p) == n && memcmp(word.p, name, n) == 0;
}

/* A value is a token, or a token in quotes. */
static words
take_value(words *t)
{
    bool quoted = t->p < t->end && *t->p == '"';
    t->p += quoted;
    words value = take_token(t);
    if (quoted && (t->p == t->end || *t->p++ != '"'))
        value.end = value.p;
    return value;
}

/* 8..15 without leading zeros, or 0. */
static int
bits_of(words value)
{
    static const char *const names[] = {"8", "9", "10", "11", "12", "13", "14", "15"};
    for (int i = 0; i < 8; i++)
        if (is(value, names[i]))
            return 8 + i;
    return 0;
}

enum parameter { SERVER_FORGETS, CLIENT_FORGETS, SERVER_BITS, CLIENT_BITS, UNKNOWN };

static enum parameter
parameter_of(words name)
{
    static const char *const names[] = {
        "server_no_context_takeover", "client_no_context_takeover",
        "server_max_window_bits", "client_max_window_bits"};
    for (int i = SERVER_FORGETS; i < UNKNOWN; i++)
        if (is(name, names[i]))
            return (enum parameter)i;
    return UNKNOWN;
}

/* false: what is offered cannot be accepted. */
static bool
note(pf__deflate *d, unsigned *seen, words name, const words *value)
{
    enum parameter which = parameter_of(name);
    int bits = value ? bits_of(*value) : 0;
    if (which == UNKNOWN || (*seen & 1u << which) || (value && bits == 0))
        return false;
    *seen |= 1u << which;
    switch (which) {
    case SERVER_FORGETS:
        d->out_forgets = true;
        return value == NULL;
    case CLIENT_FORGETS:
        d->in_forgets = true;
        return value == NULL;
    case SERVER_BITS:
        d->out_bits = (uint8_t)(bits < BITS_USUAL ? bits : BITS_USUAL);
        return bits >= BITS_MIN;
    default:
        d->in_bits = BITS_USUAL;
        if (value && bits < BITS_USUAL)
            d->in_bits = (uint8_t)bits;
        d->in_bits_told = true;
        return true;
    }
}

/* One extension and its parameters. false: not ours, or not as we could have it. */
static bool
parse_offer(pf__deflate *d, words *t, bool *malformed)
{
    words name = take_token(t);
    bool fits = is(name, "permessage-deflate");
    unsigned seen = 0;
    *d = (pf__deflate){.in_bits = BITS_MAX, .out_bits = BITS_USUAL};
    *malformed = name.p == name.end;
    while (!*malformed && take(t, ';')) {
        words parameter = take_token(t), value = {0};
        bool valued = take(t, '=');
        if (valued)
            value = take_value(t);
        *malformed = parameter.p == parameter.end || (valued && value.p == value.end);
        fits = fits && !*malformed && note(d, &seen, parameter, valued ? &value : NULL);
    }
    return fits && !*malformed;
}

bool
pf__deflate_accept(pf__deflate *d, const char *value, size_t len)
{
    words t = {value, value + len};
    bool malformed = false;
    do {
        while (take(&t, ','))
            ; /* a list may have empty elements (RFC 9110 5.6.1) */
        if (t.p == t.end)
            break;
        if (parse_offer(d, &t, &malformed)) {
            skip_blank(&t);
            d->on = t.p == t.end || *t.p == ',';
            return d->on;
        }
    } while (!malformed && take(&t, ','));
    *d = (pf__deflate){0};
    return false;
}

size_t
pf__deflate_answer(const pf__deflate *d, char text[PF__DEFLATE_ANSWER_MAX])
{
    int n = snprintf(text, PF__DEFLATE_ANSWER_MAX,
                     "permessage-deflate; server_max_window_bits=%u", d->out_bits);
    if (d->in_bits_told)
        n += snprintf(text + n, (size_t)(PF__DEFLATE_ANSWER_MAX - n),
                      "; client_max_window_bits=%u", d->in_bits);
    n += snprintf(text + n, (size_t)(PF__DEFLATE_ANSWER_MAX - n), "%s%s",
                  d->out_forgets ? "; server_no_context_takeover" : "",
                  d->in_forgets ? "; client_no_context_takeover" : "");
    return (size_t)n;
}

/* ---- streams ------------------------------------------------------------------------*/
static int
open_in(pf__deflate *d)
{
    if (d->in != NULL)
        return 0;
    d->in = calloc(1, sizeof *d->in);
    if (d->in != NULL && inflateInit2(d->in, -d->in_bits) == Z_OK)
        return 0;
    free(d->in);
    d->in = NULL;
    return -ENOMEM;
}

static int
open_out(pf__deflate *d)
{
    if (d->out != NULL)
        return 0;
    d->out = calloc(1, sizeof *d->out);
    if (d->out != NULL
        && deflateInit2(d->out, LEVEL, Z_DEFLATED, -d->out_bits, MEMORY,
                        Z_DEFAULT_STRATEGY)
               == Z_OK)
        return 0;
    free(d->out);
    d->out = NULL;
    return -ENOMEM;
}

static void
close_in(pf__deflate *d)
{
    if (d->in == NULL)
        return;
    inflateEnd(d->in);
    free(d->in);
    d->in = NULL;
}

static void
close_out(pf__deflate *d)
{
    if (d->out == NULL)
        return;
    deflateEnd(d->out);
    free(d->out);
    d->out = NULL;
}

void
pf__deflate_close(pf__deflate *d)
{
    close_in(d);
    close_out(d);
}

/* A block said that it is the last (7.2.3.4), but the next message may still refer to
 * what stands before it. To save the window and put it back would copy 64 KiB for two
 * bytes of a peer that sends nothing but such blocks. */
static int
begin_again(z_stream *in)
{
    return inflateResetKeep(in) == Z_OK ? 0 : PF_ERR_WEBSOCKET_DATA;
}

static int
inflate_some(z_stream *in, pf__pool *pool, pf__buffer *to)
{
    size_t want = in->avail_in > ROOM_MIN / 4 ? 4 * (size_t)in->avail_in : ROOM_MIN;
    if (to->cap == to->len) {
        int rc = pf__buffer_reserve(pool, to, want);
        if (rc < 0)
            return rc;
    }
    size_t room = to->cap - to->len;
    in->next_out = (Bytef *)to->data + to->len;
    in->avail_out = room < UINT32_MAX ? (uInt)room : UINT32_MAX;
    room = in->avail_out;
    int rc = inflate(in, Z_SYNC_FLUSH);
    to->len += room - in->avail_out;
    if (rc == Z_STREAM_END)
        return begin_again(in);
    if (rc == Z_MEM_ERROR)
        return -ENOMEM;
    return rc == Z_OK || rc == Z_BUF_ERROR ? 0 : PF_ERR_WEBSOCKET_DATA;
}

/* All of these bytes; not more than max bytes may come of them. */
static int
inflate_all(z_stream *in, pf__pool *pool, const char *data, size_t len, pf__buffer *to,
            size_t max)
{
    size_t most = to->len + max;
    in->next_in = (z_const Bytef *)(uintptr_t)data;
    in->avail_in = (uInt)len;
    do {
        int rc = inflate_some(in, pool, to);
        if (to->len > most)
            return PF_ERR_WEBSOCKET_SIZE;
        if (rc < 0)
            return rc;
    } while (in->avail_in > 0 || in->avail_out == 0);
    return 0;
}

int
pf__deflate_inflate(pf__deflate *d, pf__pool *pool, const char *data, size_t len,
                    bool last, pf__buffer *to, size_t max)
{
    size_t before = to->len;
    int rc = open_in(d);
    if (rc == 0 && len > 0)
        rc = inflate_all(d->in, pool, data, len, to, max);
    if (rc < 0 || !last)
        return rc;
    max -= to->len - before;
    rc = inflate_all(d->in, pool, sync_mark, SYNC_SIZE, to, max);
    if (d->in_forgets)
        close_in(d);
    return rc;
}

int
pf__deflate_deflate(pf__deflate *d, pf__pool *pool, const char *data, size_t len,
                    pf__buffer *to)
{
    int rc = open_out(d);
    if (rc < 0)
        return rc;
    z_stream *out = d->out;
    out->next_in = (z_const Bytef *)(uintptr_t)data;
    out->avail_in = (uInt)len;
    do {
        rc = pf__buffer_reserve(pool, to, out->avail_in / 2 + ROOM_MIN);
        if (rc < 0)
            break;
        size_t room = to->cap - to->len;
        out->next_out = (Bytef *)to->data + to->len;
        out->avail_out = room < UINT32_MAX ? (uInt)room : UINT32_MAX;
        room = out->avail_out;
        deflate(out, Z_SYNC_FLUSH); /* which cannot fail, but for want of room */
        to->len += room - out->avail_out;
    } while (out->avail_out == 0);
    if (rc == 0) {
        assert(memcmp(to->data + to->len - SYNC_SIZE, sync_mark, SYNC_SIZE) == 0);
        to->len -= SYNC_SIZE;
    }
    if (d->out_forgets || rc < 0)
        close_out(d);
    return rc;
}
