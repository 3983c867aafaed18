/* response.c - an answer becomes bytes: status line, fields, framing.
 *
 * This is the one place where a response field is checked, for all interfaces: a name
 * must be a token, a value must not hold a control character, and what frames the
 * message (Content-Length, Transfer-Encoding, Connection) is the server's to say, so an
 * app can neither split an answer nor disagree with its own body.
 */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <strings.h>

static const struct {
    uint16_t status;
    const char *line;
} reasons[] = {
    {100, "Continue"},
    {101, "Switching Protocols"},
    {102, "Processing"},
    {103, "Early Hints"},
    {200, "OK"},
    {201, "Created"},
    {202, "Accepted"},
    {203, "Non-Authoritative Information"},
    {204, "No Content"},
    {205, "Reset Content"},
    {206, "Partial Content"},
    {207, "Multi-Status"},
    {208, "Already Reported"},
    {226, "IM Used"},
    {300, "Multiple Choices"},
    {301, "Moved Permanently"},
    {302, "Found"},
    {303, "See Other"},
    {304, "Not Modified"},
    {305, "Use Proxy"},
    {307, "Temporary Redirect"},
    {308, "Permanent Redirect"},
    {400, "Bad Request"},
    {401, "Unauthorized"},
    {402, "Payment Required"},
    {403, "Forbidden"},
    {404, "Not Found"},
    {405, "Method Not Allowed"},
    {406, "Not Acceptable"},
    {407, "Proxy Authentication Required"},
    {408, "Request Timeout"},
    {409, "Conflict"},
    {410, "Gone"},
    {411, "Length Required"},
    {412, "Precondition Failed"},
    {413, "Content Too Large"},
    {414, "URI Too Long"},
    {415, "Unsupported Media Type"},
    {416, "Range Not Satisfiable"},
    {417, "Expectation Failed"},
    {418, "I'm a Teapot"},
    {421, "Misdirected Request"},
    {422, "Unprocessable Content"},
    {423, "Locked"},
    {424, "Failed Dependency"},
    {425, "Too Early"},
    {426, "Upgrade Required"},
    {428, "Precondition Required"},
    {429, "Too Many Requests"},
    {431, "Request Header Fields Too Large"},
    {451, "Unavailable For Legal Reasons"},
    {500, "Internal Server Error"},
    {501, "Not Implemented"},
    {502, "Bad Gateway"},
    {503, "Service Unavailable"},
    {504, "Gateway Timeout"},
    {505, "HTTP Version Not Supported"},
    {506, "Variant Also Negotiates"},
    {507, "Insufficient Storage"},
    {508, "Loop Detected"},
    {511, "Network Authentication Required"},
};

const char *
pf__response_reason(int status)
{
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].status == status)
            return reasons[i].line;
    return "";
}

/* ---- the stamp: Server and Date, once a second --------------------------------------*/
void
pf__response_stamp_init(pf__stamp *stamp, const pf_options *options)
{
    *stamp = (pf__stamp){.second = -1};
    stamp->no_date = (options->flags & PF_OPTION_NO_DATE) != 0;
    if (options->server != NULL && options->server[0] != '\0')
        stamp->server_len = (uint16_t)snprintf(stamp->text, sizeof stamp->text - 40,
                                               "Server: %.180s\r\n", options->server);
    if (options->content_type != NULL && options->content_type[0] != '\0')
        stamp->type_len =
            (uint16_t)snprintf(stamp->type, sizeof stamp->type,
                               "Content-Type: %.100s\r\n", options->content_type);
    stamp->len = stamp->server_len;
}

/* IMF-fixdate, RFC 9110 5.6.7; by hand, since strftime() asks the locale. */
static int
format_date(char *out, size_t size, time_t second)
{
    static const char days[] = "SunMonTueWedThuFriSat";
    static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
    struct tm tm;
    gmtime_r(&second, &tm);
    return snprintf(out, size, "Date: %.3s, %02d %.3s %04d %02d:%02d:%02d GMT\r\n",
                    days + 3 * tm.tm_wday, tm.tm_mday, months + 3 * tm.tm_mon,
                    tm.tm_year + 1900, tm.tm_hour, tm.tm_min, tm.tm_sec);
}

void
pf__response_stamp_update(pf__stamp *stamp, time_t second)
{
    if (PF__LIKELY(second == stamp->second) || stamp->no_date)
        return;
    stamp->second = second;
    size_t room = sizeof stamp->text - stamp->server_len;
    int n = format_date(stamp->text + stamp->server_len, room, second);
    stamp->len = (uint16_t)(stamp->server_len + n);
}

/* ---- writing ------------------------------------------------------------------------*/
#define PUT_LITERAL(p, text) put((p), (text), sizeof(text) - 1)

static inline char *
put(char *p, const void *data, size_t len)
{
    memcpy(p, data, len);
    return p + len;
}

static char *
put_number(char *p, uint64_t n)
{
    char digits[20];
    int i = sizeof digits;
    do {
        digits[--i] = (char)('0' + n % 10);
        n /= 10;
    } while (n > 0);
    return put(p, digits + i, sizeof digits - (size_t)i);
}

enum { STATUS_LINE_MAX = 64 };

static char *
put_reasoned_line(char *p, int status, const char *reason, size_t len)
{
    p = PUT_LITERAL(p, "HTTP/1.1 ");
    p = put_number(p, (uint64_t)status);
    *p++ = ' ';
    p = put(p, reason, len);
    return PUT_LITERAL(p, "\r\n");
}

static char *
put_status_line(char *p, int status)
{
    if (PF__LIKELY(status == 200))
        return PUT_LITERAL(p, "HTTP/1.1 200 OK\r\n");
    const char *reason = pf__response_reason(status);
    return put_reasoned_line(p, status, reason, strlen(reason));
}

/* ---- the answer, piece by piece -----------------------------------------------------*/
bool
pf__response_is_bodiless(const pf__answer *a)
{
    return a->head || a->status < 200 || a->status == 204 || a->status == 304;
}

int
pf_response_check_line(int status, const char *reason, size_t reason_len)
{
    if (status < 200 || status > 999)
        return PF_ERR_APP_STATUS;
    if (reason != NULL && pf__scan_value(reason, reason_len) != reason_len)
        return PF_ERR_APP_REASON;
    return 0;
}

int
pf__response_begin(pf__pool *pool, pf__buffer *out, pf__answer *a, int status,
                   const char *reason, size_t reason_len, int64_t length)
{
    if (a->flags & PF__ANSWER_BEGUN)
        return PF_ERR_STATE;
    int rc = pf_response_check_line(status, reason, reason_len);
    if (rc == 0)
        rc = pf__buffer_reserve(pool, out, STATUS_LINE_MAX + reason_len);
    if (rc < 0)
        return rc;
    a->mark = out->len;
    a->status = (uint16_t)status;
    a->length = length;
    a->flags |= PF__ANSWER_BEGUN;
    char *p = out->data + out->len;
    p = reason == NULL ? put_status_line(p, status)
                       : put_reasoned_line(p, status, reason, reason_len);
    out->len = (size_t)(p - out->data);
    return 0;
}

static char *
put_field(char *p, const char *name, size_t name_len, const char *value, size_t len)
{
    p = put(p, name, name_len);
    p = PUT_LITERAL(p, ": ");
    p = put(p, value, len);
    return PUT_LITERAL(p, "\r\n");
}

#define PUT_FIELD(p, name, value, len)                                                 \
    put_field((p), (name), sizeof(name) - 1, (value), (len))

/* RFC 6455 4.2.2. Its length is none, and it has no type. */
int
pf__response_switch(pf__pool *pool, pf__buffer *out, pf__answer *a, const char *accept,
                    size_t accept_len, const char *subprotocol, size_t subprotocol_len,
                    const char *extensions, size_t extensions_len)
{
    if (a->flags & PF__ANSWER_BEGUN)
        return PF_ERR_STATE;
    if (subprotocol != NULL
        && (subprotocol_len == 0
            || pf__scan_token(subprotocol, subprotocol_len) != subprotocol_len))
        return PF_ERR_APP_SUBPROTOCOL;
    size_t room = STATUS_LINE_MAX + 192 + accept_len + subprotocol_len + extensions_len;
    int rc = pf__buffer_reserve(pool, out, room);
    if (rc < 0)
        return rc;
    a->mark = out->len;
    a->status = 101;
    a->length = 0;
    a->flags |= PF__ANSWER_BEGUN;
    char *p = put_status_line(out->data + out->len, 101);
    p = PUT_LITERAL(p, "Upgrade: websocket\r\nConnection: Upgrade\r\n");
    p = PUT_FIELD(p, "Sec-WebSocket-Accept", accept, accept_len);
    if (subprotocol != NULL)
        p = PUT_FIELD(p, "Sec-WebSocket-Protocol", subprotocol, subprotocol_len);
    if (extensions != NULL)
        p = PUT_FIELD(p, "Sec-WebSocket-Extensions", extensions, extensions_len);
    out->len = (size_t)(p - out->data);
    return 0;
}

static int
field_length(pf__answer *a, const char *value, size_t len)
{
    int64_t length = pf__http_parse_length(value, len);
    if (length < 0 || (a->flags & PF__ANSWER_LENGTH)
        || (a->length >= 0 && a->length != length && !pf__response_is_bodiless(a)))
        return PF_ERR_APP_LENGTH;
    a->flags |= PF__ANSWER_LENGTH;
    a->length = length;
    return 0;
}

/* What a 101 says of the handshake, and that a WebSocket is not to be closed. */
static bool
is_of_handshake(const pf__answer *a, const char *name, size_t len)
{
    static const char prefix[] = "sec-websocket-";
    return a->status == 101
           && (pf__http_field_id(name, len) == PF_FIELD_CONNECTION
               || (len >= sizeof prefix - 1
                   && strncasecmp(name, prefix, sizeof prefix - 1) == 0));
}

/* 1: the field is spoken for and not written; 0: write it; < 0: refused. */
static int
note_field(pf__answer *a, const char *name, size_t name_len, const char *value,
           size_t len)
{
    switch (pf__http_field_id(name, name_len)) {
    case PF_FIELD_CONTENT_LENGTH: {
        int rc = field_length(a, value, len);
        return rc < 0 ? rc : 1;
    }
    case PF_FIELD_CONNECTION:
        if (!pf__http_list_has(value, len, "close"))
            return PF_ERR_APP_HOP_BY_HOP;
        a->flags |= PF__ANSWER_CLOSE;
        return 1;
    case PF_FIELD_TRANSFER_ENCODING:
    case PF_FIELD_KEEP_ALIVE:
    case PF_FIELD_PROXY_CONNECTION:
    case PF_FIELD_UPGRADE:
    case PF_FIELD_TE:
        return PF_ERR_APP_HOP_BY_HOP;
    case PF_FIELD_TRAILER:
        return a->flags & PF__ANSWER_TRAILERS ? 0 : PF_ERR_APP_HOP_BY_HOP;
    case PF_FIELD_DATE:
        a->flags |= PF__ANSWER_DATE;
        return 0;
    case PF_FIELD_SERVER:
        a->flags |= PF__ANSWER_SERVER;
        return 0;
    case PF_FIELD_CONTENT_TYPE:
        a->flags |= PF__ANSWER_TYPE;
        return 0;
    default:
        return 0;
    }
}

/* What can be said of a field without its answer. */
static int
check_field(const char *name, size_t name_len, const char *value, size_t value_len)
{
    if (name_len == 0 || pf__scan_token(name, name_len) != name_len)
        return PF_ERR_APP_FIELD_NAME;
    if (pf__scan_value(value, value_len) != value_len)
        return PF_ERR_APP_FIELD_VALUE;
    return 0;
}

int
pf_response_check_field(const char *name, size_t name_len, const char *value,
                        size_t value_len)
{
    pf__answer alone = {.length = -1};
    int rc = check_field(name, name_len, value, value_len);
    if (rc == 0)
        rc = note_field(&alone, name, name_len, value, value_len);
    return rc < 0 ? rc : 0;
}

int
pf__response_field(pf__pool *pool, pf__buffer *out, pf__answer *a, const char *name,
                   size_t name_len, const char *value, size_t value_len)
{
    int rc = check_field(name, name_len, value, value_len);
    if (rc < 0)
        return rc;
    if ((a->flags & (PF__ANSWER_BEGUN | PF__ANSWER_SEALED)) != PF__ANSWER_BEGUN)
        return PF_ERR_STATE;
    if (PF__UNLIKELY(is_of_handshake(a, name, name_len)))
        return PF_ERR_APP_HOP_BY_HOP;
    rc = note_field(a, name, name_len, value, value_len);
    if (rc != 0)
        return rc < 0 ? rc : 0;
    rc = pf__buffer_reserve(pool, out, name_len + value_len + 4);
    if (rc < 0)
        return rc;
    char *p = put_field(out->data + out->len, name, name_len, value, value_len);
    out->len = (size_t)(p - out->data);
    return 0;
}

int
pf_response_prepare(pf_line *line, const char *text, size_t name_len, size_t value_len)
{
    pf__answer alone = {.length = -1};
    const char *value = text + name_len + 2;
    int rc = check_field(text, name_len, value, value_len);
    if (rc == 0)
        rc = note_field(&alone, text, name_len, value, value_len);
    if (rc < 0)
        return rc;
    *line = (pf_line){.text = text,
                      .name_len = name_len,
                      .value_len = value_len,
                      .length = alone.length,
                      .notes = alone.flags,
                      .spoken_for = rc == 1};
    return 0;
}

int
pf__response_line(pf__pool *pool, pf__buffer *out, pf__answer *a, const pf_line *line)
{
    bool ordinary =
        (a->flags & (PF__ANSWER_BEGUN | PF__ANSWER_SEALED)) == PF__ANSWER_BEGUN
        && a->status != 101 && (line->length < 0 || a->length < 0);
    if (PF__UNLIKELY(!ordinary))
        return pf__response_field(pool, out, a, line->text, line->name_len,
                                  line->text + line->name_len + 2, line->value_len);
    size_t len = line->name_len + line->value_len + 4;
    if (!line->spoken_for) {
        int rc = pf__buffer_reserve(pool, out, len);
        if (rc < 0)
            return rc;
        pf__buffer_put(out, line->text, len);
    }
    a->flags |= (uint16_t)line->notes;
    if (line->length >= 0)
        a->length = line->length;
    return 0;
}

enum { FRAMING_MAX = 128 };

/* Content-Length or Transfer-Encoding, RFC 9112 6. */
static char *
put_framing(char *p, pf__answer *a)
{
    bool bodiless = a->status < 200 || a->status == 204;
    if (bodiless)
        return p;
    if (a->length >= 0 && !(a->flags & PF__ANSWER_TRAILERS)) {
        bool silent = a->status == 304 && !(a->flags & PF__ANSWER_LENGTH);
        if (silent)
            return p;
        p = PUT_LITERAL(p, "Content-Length: ");
        p = put_number(p, (uint64_t)a->length);
        return PUT_LITERAL(p, "\r\n");
    }
    if (a->minor > 0 && a->status != 304) {
        if (!pf__response_is_bodiless(a))
            a->flags |= PF__ANSWER_CHUNKED;
        return PUT_LITERAL(p, "Transfer-Encoding: chunked\r\n");
    }
    if (!pf__response_is_bodiless(a))
        a->flags |= PF__ANSWER_CLOSE; /* to 1.0: the close is the end */
    return p;
}

static char *
put_connection(char *p, const pf__answer *a)
{
    if (a->flags & PF__ANSWER_CLOSE)
        return PUT_LITERAL(p, "Connection: close\r\n");
    if (PF__UNLIKELY(a->flags & PF__ANSWER_KEEP))
        return PUT_LITERAL(p, "Connection: keep-alive\r\n");
    return p;
}

static char *
put_stamp(char *p, const pf__answer *a, const pf__stamp *stamp)
{
    if (PF__LIKELY(!(a->flags & (PF__ANSWER_SERVER | PF__ANSWER_DATE))))
        return put(p, stamp->text, stamp->len);
    if (!(a->flags & PF__ANSWER_SERVER))
        p = put(p, stamp->text, stamp->server_len);
    if (!(a->flags & PF__ANSWER_DATE))
        p = put(p, stamp->text + stamp->server_len,
                (size_t)(stamp->len - stamp->server_len));
    return p;
}

/* A default type is for answers that have a body, or would have one for GET. */
static bool
wants_type(const pf__answer *a)
{
    return !(a->flags & PF__ANSWER_TYPE) && a->status != 204 && a->status != 304
           && a->length != 0;
}

int
pf__response_seal(pf__pool *pool, pf__buffer *out, pf__answer *a,
                  const pf__stamp *stamp)
{
    int rc = pf__buffer_reserve(pool, out, sizeof *stamp + FRAMING_MAX);
    if (rc < 0)
        return rc;
    char *p = put_stamp(out->data + out->len, a, stamp);
    if (wants_type(a))
        p = put(p, stamp->type, stamp->type_len);
    p = put_framing(p, a);
    p = put_connection(p, a);
    p = PUT_LITERAL(p, "\r\n");
    out->len = (size_t)(p - out->data);
    if (pf__response_is_bodiless(a))
        a->flags |= PF__ANSWER_NO_BODY;
    a->flags |= PF__ANSWER_SEALED;
    return 0;
}

/* ---- fields behind the body ---------------------------------------------------------*/
/* They have a place behind chunks alone, RFC 9112 7.1.2. */
bool
pf__response_announce_trailers(pf__answer *a)
{
    if (a->minor == 0 || pf__response_is_bodiless(a))
        return false;
    a->flags |= PF__ANSWER_TRAILERS;
    return true;
}

/* The first one ends the body. */
static int
end_body(pf__pool *pool, pf__buffer *out, pf__answer *a)
{
    if (a->flags & PF__ANSWER_TRAILED)
        return 0;
    if (a->length >= 0 && a->written < (uint64_t)a->length
        && !pf__response_is_bodiless(a))
        return PF_ERR_APP_BODY_SHORT;
    if (a->flags & PF__ANSWER_CHUNKED) {
        int rc = pf__buffer_reserve(pool, out, 3);
        if (rc < 0)
            return rc;
        pf__buffer_put(out, "0\r\n", 3);
    }
    a->flags |= PF__ANSWER_TRAILED;
    return 0;
}

int
pf__response_check_trailer(const char *name, size_t name_len, const char *value,
                           size_t value_len)
{
    int rc = check_field(name, name_len, value, value_len);
    if (rc == 0 && pf__http_is_forbidden_trailer(name, name_len))
        rc = PF_ERR_APP_TRAILER;
    return rc;
}

int
pf__response_trailer(pf__pool *pool, pf__buffer *out, pf__answer *a, const char *name,
                     size_t name_len, const char *value, size_t value_len)
{
    int rc = end_body(pool, out, a);
    if (rc < 0 || !(a->flags & PF__ANSWER_TRAILERS))
        return rc;
    if ((rc = pf__buffer_reserve(pool, out, name_len + value_len + 4)) < 0)
        return rc;
    char *p = put_field(out->data + out->len, name, name_len, value, value_len);
    out->len = (size_t)(p - out->data);
    return 0;
}

int
pf__response_end_chunks(pf__pool *pool, pf__buffer *out, const pf__answer *a)
{
    static const char end[] = "0\r\n\r\n";
    size_t begun = a->flags & PF__ANSWER_TRAILED ? 3 : 0;
    int rc = pf__buffer_reserve(pool, out, sizeof end - 1);
    if (rc == 0)
        pf__buffer_put(out, end + begun, sizeof end - 1 - begun);
    return rc;
}

/* ---- the common case: everything in one go ------------------------------------------*/
static char *
put_type(char *p, const pf__answer *a, const pf__stamp *stamp, const char *type,
         size_t type_len)
{
    if (PF__LIKELY(type == NULL))
        return wants_type(a) ? put(p, stamp->type, stamp->type_len) : p;
    if (type_len == 0)
        return p;
    p = PUT_LITERAL(p, "Content-Type: ");
    p = put(p, type, type_len);
    return PUT_LITERAL(p, "\r\n");
}

int
pf__response_whole(pf__pool *pool, pf__buffer *out, pf__answer *a, int status,
                   const pf__stamp *stamp, const char *type, size_t type_len,
                   const char *body, size_t len, bool copy)
{
    if (a->flags & PF__ANSWER_BEGUN)
        return PF_ERR_STATE;
    if (status < 200 || status > 999)
        return PF_ERR_APP_STATUS;
    if (type != NULL && pf__scan_value(type, type_len) != type_len)
        return PF_ERR_APP_FIELD_VALUE;
    a->status = (uint16_t)status;
    a->length = (int64_t)len;
    bool bodiless = pf__response_is_bodiless(a);
    size_t copied = copy && !bodiless ? len : 0;
    size_t room =
        STATUS_LINE_MAX + sizeof *stamp + FRAMING_MAX + type_len + 16 + copied;
    int rc = pf__buffer_reserve(pool, out, room);
    if (rc < 0)
        return rc;
    a->mark = out->len;
    char *p = put_status_line(out->data + out->len, status);
    p = put(p, stamp->text, stamp->len);
    p = put_type(p, a, stamp, type, type_len);
    p = put_framing(p, a);
    p = put_connection(p, a);
    p = PUT_LITERAL(p, "\r\n");
    if (copied > 0)
        p = put(p, body, copied);
    out->len = (size_t)(p - out->data);
    a->flags |= PF__ANSWER_BEGUN | PF__ANSWER_SEALED;
    if (bodiless)
        a->flags |= PF__ANSWER_NO_BODY;
    a->written = len;
    return 0;
}

/* ---- refusals -----------------------------------------------------------------------*/
/* What a status owes beside the usual fields. */
static const char *
owed_field(int status)
{
    switch (status) {
    case 405:
        return "Allow: GET, HEAD\r\n";
    case 426:
        return "Upgrade: websocket\r\nConnection: Upgrade\r\n"
               "Sec-WebSocket-Version: 13\r\n";
    case 429:
    case 503:
        return "Retry-After: 1\r\n";
    default:
        return "";
    }
}

int
pf__response_refusal(pf__pool *pool, pf__buffer *out, int code, bool head,
                     const pf__stamp *stamp)
{
    int status = pf_error_status(code);
    const char *text = pf_error_text(code), *owed = owed_field(status);
    size_t len = strlen(text);
    size_t room = STATUS_LINE_MAX + sizeof *stamp + FRAMING_MAX + len + 128;
    int rc = pf__buffer_reserve(pool, out, room);
    if (rc < 0)
        return rc;
    char *p = put_status_line(out->data + out->len, status);
    p = put(p, stamp->text, stamp->len);
    p = PUT_LITERAL(p, "Content-Type: text/plain; charset=utf-8\r\n");
    p = PUT_LITERAL(p, "Content-Length: ");
    p = put_number(p, len + 1);
    p = PUT_LITERAL(p, "\r\n");
    p = put(p, owed, strlen(owed));
    p = PUT_LITERAL(p, "Connection: close\r\n\r\n");
    if (!head) {
        p = put(p, text, len);
        *p++ = '\n';
    }
    out->len = (size_t)(p - out->data);
    return status;
}

/* ---- interim answers ----------------------------------------------------------------*/
/* What frames a message, or is about the connection: an interim answer has no body, and
 * who believes that it has one takes the answer for it (RFC 9110 8.6, RFC 9112 6.1). */
static bool
frames(const char *name, size_t len)
{
    switch (pf__http_field_id(name, len)) {
    case PF_FIELD_CONTENT_LENGTH:
    case PF_FIELD_TRANSFER_ENCODING:
    case PF_FIELD_CONNECTION:
    case PF_FIELD_KEEP_ALIVE:
    case PF_FIELD_PROXY_CONNECTION:
    case PF_FIELD_UPGRADE:
    case PF_FIELD_TE:
    case PF_FIELD_TRAILER:
        return true;
    default:
        return false;
    }
}

int
pf__response_check_fields(const char *fields, size_t len)
{
    const char *p = fields, *end = fields + len;
    while (p < end) {
        size_t name = pf__scan_token(p, (size_t)(end - p));
        if (name == 0 || p + name == end || p[name] != ':')
            return PF_ERR_APP_FIELD_NAME;
        if (frames(p, name))
            return PF_ERR_APP_HOP_BY_HOP;
        p += name + 1;
        p += pf__scan_value(p, (size_t)(end - p));
        if (end - p < 2 || p[0] != '\r' || p[1] != '\n')
            return PF_ERR_APP_FIELD_VALUE;
        p += 2;
    }
    return 0;
}
