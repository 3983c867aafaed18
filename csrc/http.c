/* http.c - the bytes of a request become slices, or an error with a name.
 *
 * The head is parsed line by line, in place. A line that is not complete is looked at
 * all the same, so that a malformed one is refused at its first wrong byte and an
 * endless one at its limit, however its bytes are delivered; the parser then resumes at
 * the start of that line. Every scan runs inside a window that ends at the data or at
 * the limit that holds there, whichever is nearer: running out of the first asks for
 * more bytes, running out of the second is an error. That way a limit answers the same
 * for a head that comes whole and for one that comes byte by byte.
 *
 * Strict by default: what RFC 9112 does not allow is refused, and what it lets a server
 * repair (bare LF, folded lines, white space before a colon) is refused too, because two
 * servers that repair differently are a smuggling hole.
 */
#include "internal.h"

#include <errno.h>

enum head_phase { REQUEST_LINE, FIELDS };

enum head_seen {
    SEEN_HOST = 1 << 0,
    SEEN_LENGTH = 1 << 1,
    SEEN_CODING = 1 << 2,
    SEEN_TYPE = 1 << 3,
    SEEN_UPGRADE = 1 << 4,
    SAID_CHUNKED = 1 << 5,
    SAID_UNKNOWN_CODING = 1 << 6,
    SAID_CLOSE = 1 << 7,
    SAID_KEEP_ALIVE = 1 << 8,
    SAID_UPGRADE = 1 << 9,
    SAID_CONTINUE = 1 << 10,
};

/* ---- known field names --------------------------------------------------------------
 * An open-addressed table by length, first and last letter; filled once at load time.
 */
enum { NAME_SLOTS = 256 };

static const struct {
    const char *text;
    uint8_t len;
} names[PF_FIELD_COUNT] = {
#define X(name, text) {text, sizeof text - 1},
    PF_FIELDS(X)
#undef X
};

static uint8_t name_slots[NAME_SLOTS];

static inline unsigned
name_hash(const char *name, size_t len)
{
    unsigned first = (uint8_t)name[0] | 0x20u, last = (uint8_t)name[len - 1] | 0x20u;
    return (unsigned)(len * 7 + first * 5 + last * 31) % NAME_SLOTS;
}

__attribute__((constructor)) static void
fill_name_slots(void)
{
    for (int id = 1; id < PF_FIELD_COUNT; id++) {
        unsigned slot = name_hash(names[id].text, names[id].len);
        while (name_slots[slot] != 0)
            slot = (slot + 1) % NAME_SLOTS;
        name_slots[slot] = (uint8_t)id;
    }
}

/* Both are token characters or the test below it fails anyway; OR 0x20 folds case and
 * maps no other token character onto a letter, digit or "-" of a known name. */
static inline bool
same_name(const char *a, const char *lower, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if ((a[i] | 0x20) != lower[i])
            return false;
    return true;
}

int
pf__http_field_id(const char *name, size_t len)
{
    if (len == 0)
        return PF_FIELD_OTHER;
    unsigned slot = name_hash(name, len);
    for (int id; (id = name_slots[slot]) != 0; slot = (slot + 1) % NAME_SLOTS)
        if (names[id].len == len && same_name(name, names[id].text, len))
            return id;
    return PF_FIELD_OTHER;
}

const char *
pf_http_field_name(int id)
{
    return id >= 0 && id < PF_FIELD_COUNT ? names[id].text : "";
}

static bool
same_any_case(const char *a, const char *b, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        uint8_t x = (uint8_t)a[i], y = (uint8_t)b[i];
        bool letter = (uint8_t)((x | 0x20) - 'a') < 26;
        if (x != y && !(letter && (x | 0x20) == (y | 0x20)))
            return false;
    }
    return true;
}

/* Eight bytes at a time, in two lanes that wait for nothing of each other. Who makes
 * two blocks collide gains nothing: they are compared before they are taken for one. */
uint64_t
pf_http_hash(const char *bytes, size_t len)
{
    uint64_t a = 0x9e3779b97f4a7c15u ^ len, b = 0xd6e8feb86659fd93u, word;
    while (len >= 16) {
        memcpy(&word, bytes, 8);
        a = (a ^ word) * 0x9e3779b97f4a7c15u;
        memcpy(&word, bytes + 8, 8);
        b = (b ^ word) * 0xd6e8feb86659fd93u;
        a ^= a >> 29;
        b ^= b >> 32;
        bytes += 16;
        len -= 16;
    }
    for (; len > 0; len -= len < 8 ? len : 8) {
        word = 0;
        memcpy(&word, bytes, len < 8 ? len : 8);
        a = (a ^ word) * 0x9e3779b97f4a7c15u;
        a ^= a >> 29;
        bytes += len < 8 ? len : 8;
    }
    a ^= b;
    return a ^ a >> 32;
}

int
pf_http_find_field(const pf_head *head, const char *bytes, const char *name, size_t len,
                   int from)
{
    for (int i = from; i < head->nfields; i++) {
        const pf_field *field = &head->fields[i];
        if (field->name_len == len && same_any_case(bytes + field->name_at, name, len))
            return i;
    }
    return -1;
}

/* ---- field values -------------------------------------------------------------------*/
static inline bool
is_ows(char c)
{
    return c == ' ' || c == '\t';
}

/* The next element of a comma-separated list, without white space; false at the end. */
static bool
next_element(const char **p, const char *end, const char **element, size_t *len)
{
    while (*p < end && (is_ows(**p) || **p == ','))
        ++*p;
    if (*p == end)
        return false;
    *element = *p;
    while (*p < end && **p != ',')
        ++*p;
    const char *last = *p;
    while (last > *element && is_ows(last[-1]))
        last--;
    *len = (size_t)(last - *element);
    return true;
}

bool
pf__http_list_has(const char *value, size_t len, const char *token)
{
    const char *p = value, *end = value + len, *element;
    size_t n, want = strlen(token);
    while (next_element(&p, end, &element, &n))
        if (n == want && same_name(element, token, n))
            return true;
    return false;
}

/* Digits only, no sign, no list, no leading zero: RFC 9110 8.6 and no more. */
int64_t
pf__http_parse_length(const char *value, size_t len)
{
    if (len == 0 || len > 19 || (value[0] == '0' && len > 1))
        return -1;
    uint64_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (!pf__scan_is(value[i], PF__CHAR_DIGIT))
            return -1;
        n = n * 10 + (uint64_t)(value[i] - '0');
    }
    return n <= INT64_MAX ? (int64_t)n : -1;
}

static bool
valid_port(const char *p, const char *end)
{
    unsigned port = 0;
    for (; p < end; p++) {
        if (!pf__scan_is(*p, PF__CHAR_DIGIT))
            return false;
        port = port * 10 + (unsigned)(*p - '0');
        if (port > 65535)
            return false;
    }
    return true;
}

static bool
valid_escapes(const char *p, const char *end)
{
    for (; p < end; p++)
        if (*p == '%'
            && (end - p < 3 || !pf__scan_is(p[1], PF__CHAR_HEX)
                || !pf__scan_is(p[2], PF__CHAR_HEX)))
            return false;
    return true;
}

static const char *
ip_literal_end(const char *p, const char *end)
{
    const char *start = ++p;
    while (p < end && (pf__scan_is(*p, PF__CHAR_HEX) || *p == ':' || *p == '.'))
        p++;
    return p < end && *p == ']' && p > start ? p + 1 : NULL;
}

/* uri-host [ ":" port ], RFC 9110 7.2; no userinfo, no path, no list. */
static bool
valid_host(const char *p, size_t len)
{
    const char *end = p + len, *host = p;
    if (len == 0)
        return false;
    if (*p == '[') {
        p = ip_literal_end(p, end);
        if (p == NULL)
            return false;
    } else {
        while (p < end && pf__scan_is(*p, PF__CHAR_HOST))
            p++;
        if (p == host || !valid_escapes(host, p))
            return false;
    }
    return p == end || (*p == ':' && valid_port(p + 1, end));
}

/* ---- request line -------------------------------------------------------------------*/
enum { MORE = 0, DONE = 1 };

/* A stretch of bytes that may be looked at: up to the data's end or a limit's. */
typedef struct window {
    const char *data;
    size_t at, end;
    int limit; /* the error when the limit is what ended it; 0: the data did */
} window;

static window
open_window(const char *data, size_t at, size_t len, size_t limit_end, int error)
{
    bool limited = len > limit_end;
    return (window){data, at, limited ? limit_end : len, limited ? error : 0};
}

/* What running out of a window means. */
static inline int
ran_out(const window *w)
{
    return w->limit ? w->limit : MORE;
}

static int
take_line_end(window *w)
{
    if (w->at == w->end)
        return ran_out(w);
    if (w->data[w->at] != '\r')
        return PF_ERR_LINE_END;
    if (w->at + 1 == w->end)
        return ran_out(w);
    if (w->data[w->at + 1] != '\n')
        return PF_ERR_LINE_END;
    w->at += 2;
    return DONE;
}

static int
parse_method(pf_head *head, window *w)
{
    size_t start = w->at, left = w->end - w->at;
    size_t n = left;
    if (n > PF__METHOD_MAX + 1)
        n = PF__METHOD_MAX + 1;
    size_t len = pf__scan_token(w->data + start, n);
    if (len > PF__METHOD_MAX)
        return PF_ERR_METHOD;
    if (len == left)
        return ran_out(w);
    if (len == 0 || w->data[start + len] != ' ')
        return PF_ERR_METHOD;
    head->method = (pf_span){(uint32_t)start, (uint32_t)len};
    w->at = start + len + 1;
    return DONE;
}

static int
parse_target(pf_head *head, const window *line, size_t max, window *rest)
{
    window w = open_window(line->data, line->at, line->end, line->at + max + 1,
                           PF_ERR_TARGET_LENGTH);
    if (w.limit == 0)
        w.limit = line->limit;
    size_t start = w.at;
    size_t len = pf__scan_target(w.data + start, w.end - start);
    if (len > max)
        return PF_ERR_TARGET_LENGTH;
    if (start + len == w.end)
        return ran_out(&w);
    char stop = w.data[start + len];
    if (stop == '\r' || stop == '\n')
        return PF_ERR_REQUEST_LINE;
    if (len == 0 || stop != ' ')
        return PF_ERR_TARGET;
    head->target = (pf_span){(uint32_t)start, (uint32_t)len};
    rest->at = start + len + 1;
    return DONE;
}

static int
parse_version(pf_head *head, pf__head_state *state, window *w)
{
    static const char form[] = "HTTP/d.d"; /* d: a digit; the same two for both */
    const char *p = w->data + w->at;
    size_t n = w->end - w->at;
    for (size_t i = 0; i < sizeof form - 1; i++) {
        if (i == n)
            return ran_out(w);
        bool digit = form[i] == 'd';
        if (digit ? !pf__scan_is(p[i], PF__CHAR_DIGIT) : p[i] != form[i])
            return PF_ERR_VERSION;
    }
    state->major = (uint8_t)(p[5] - '0');
    head->minor = (uint8_t)(p[7] - '0');
    w->at += sizeof form - 1;
    if (w->at < w->end && w->data[w->at] != '\r' && w->data[w->at] != '\n')
        return PF_ERR_VERSION;
    return take_line_end(w);
}

static pf_span
span_between(const char *data, const char *from, const char *to)
{
    return (pf_span){(uint32_t)(from - data), (uint32_t)(to - from)};
}

static void
split_query(pf_head *head, const char *data, const char *path, const char *end)
{
    const char *mark = memchr(path, '?', (size_t)(end - path));
    const char *path_end = mark ? mark : end;
    head->path = span_between(data, path, path_end);
    head->query = span_between(data, mark ? mark + 1 : end, end);
}

/* Where "http://" or "https://" ends, or NULL. */
static const char *
skip_scheme(const char *p, const char *end)
{
    static const char *const schemes[] = {"http://", "https://"};
    for (int i = 0; i < 2; i++) {
        size_t n = strlen(schemes[i]);
        if ((size_t)(end - p) >= n && same_name(p, schemes[i], n - 3)
            && memcmp(p + n - 3, "://", 3) == 0)
            return p + n;
    }
    return NULL;
}

/* RFC 9112 3.2.2: the target's authority will replace the Host that is received. */
static int
split_absolute(pf_head *head, const char *data, const char *p, const char *end)
{
    const char *authority = skip_scheme(p, end);
    if (authority == NULL)
        return PF_ERR_TARGET;
    const char *slash = authority;
    while (slash < end && *slash != '/' && *slash != '?')
        slash++;
    if (!valid_host(authority, (size_t)(slash - authority)))
        return PF_ERR_TARGET;
    head->authority = span_between(data, authority, slash);
    split_query(head, data, slash, end);
    return DONE;
}

static bool
method_is(const pf_head *head, const char *data, const char *name)
{
    size_t len = strlen(name);
    return head->method.len == len && memcmp(data + head->method.at, name, len) == 0;
}

static int
split_target(pf_head *head, const char *data)
{
    const char *p = data + head->target.at, *end = p + head->target.len;
    if (method_is(head, data, "CONNECT"))
        return PF_ERR_CONNECT;
    if (PF__LIKELY(*p == '/')) {
        split_query(head, data, p, end);
        return DONE;
    }
    if (*p != '*')
        return split_absolute(head, data, p, end);
    if (head->target.len != 1 || !method_is(head, data, "OPTIONS"))
        return PF_ERR_TARGET;
    split_query(head, data, p, end);
    return DONE;
}

static int
skip_leading_lines(pf__head_state *state, const char *data, size_t len)
{
    while (state->at < len && (data[state->at] == '\r' || data[state->at] == '\n')) {
        window w = open_window(data, state->at, len, SIZE_MAX, 0);
        if (state->at >= 2 * PF__LEADING_CRLF_MAX)
            return PF_ERR_REQUEST_LINE;
        int rc = take_line_end(&w);
        if (rc != DONE)
            return rc;
        state->at = (uint32_t)w.at;
    }
    state->start = state->at;
    return state->at < len ? DONE : MORE;
}

static int
parse_request_line(pf_head *head, pf__head_state *state, const char *data, size_t len,
                   const pf_options *limits)
{
    int rc = skip_leading_lines(state, data, len);
    if (rc != DONE)
        return rc;
    window w = open_window(data, state->at, len, state->start + limits->max_header_size,
                           PF_ERR_HEAD_SIZE);
    if ((rc = parse_method(head, &w)) != DONE)
        return rc;
    if ((rc = parse_target(head, &w, limits->max_target_size, &w)) != DONE)
        return rc;
    if ((rc = parse_version(head, state, &w)) != DONE)
        return rc;
    if (state->major != 1)
        return PF_ERR_VERSION_UNSUPPORTED;
    head->minor = head->minor > 0;
    head->flags = method_is(head, data, "GET")    ? PF_HEAD_IS_GET
                  : method_is(head, data, "HEAD") ? PF_HEAD_IS_HEAD
                                                  : 0;
    state->at = (uint32_t)w.at;
    state->phase = FIELDS;
    return split_target(head, data);
}

/* ---- fields -------------------------------------------------------------------------*/
static int
note_once(pf__head_state *state, int bit, int error)
{
    if (state->seen & bit)
        return error;
    state->seen |= (uint16_t)bit;
    return DONE;
}

static int
note_host(pf_head *head, pf__head_state *state, pf_field *field, const char *value)
{
    if (note_once(state, SEEN_HOST, PF_ERR_HOST) != DONE
        || !valid_host(value, field->value_len))
        return PF_ERR_HOST;
    if (head->authority.len > 0) {
        field->value_at = head->authority.at;
        field->value_len = head->authority.len;
    }
    head->host = (uint8_t)head->nfields;
    return DONE;
}

static int
note_length(pf_head *head, pf__head_state *state, const char *value, size_t len)
{
    int64_t length = pf__http_parse_length(value, len);
    if (length < 0)
        return PF_ERR_CONTENT_LENGTH;
    head->content_length = (uint64_t)length;
    return note_once(state, SEEN_LENGTH, PF_ERR_CONTENT_LENGTH);
}

/* Only exactly "chunked" is served. One other plain token is a coding that we have not
 * (501, unless Content-Length makes it worse); everything else is malformed. */
static int
note_coding(pf__head_state *state, const char *value, size_t len)
{
    int rc = note_once(state, SEEN_CODING, PF_ERR_TRANSFER_ENCODING);
    if (rc != DONE)
        return rc;
    if (len == 7 && same_name(value, "chunked", 7))
        state->seen |= SAID_CHUNKED;
    else if (len > 0 && pf__scan_token(value, len) == len)
        state->seen |= SAID_UNKNOWN_CODING;
    else
        return PF_ERR_TRANSFER_ENCODING;
    return DONE;
}

static int
note_connection(pf__head_state *state, const char *value, size_t len)
{
    if (len == 10 && same_name(value, "keep-alive", 10)) {
        state->seen |= SAID_KEEP_ALIVE;
        return DONE;
    }
    if (pf__http_list_has(value, len, "close"))
        state->seen |= SAID_CLOSE;
    if (pf__http_list_has(value, len, "keep-alive"))
        state->seen |= SAID_KEEP_ALIVE;
    if (pf__http_list_has(value, len, "upgrade"))
        state->seen |= SAID_UPGRADE;
    return DONE;
}

static int
note_expect(pf__head_state *state, const char *value, size_t len)
{
    if (len != 12 || !same_name(value, "100-continue", 12))
        return PF_ERR_EXPECTATION;
    state->seen |= SAID_CONTINUE;
    return DONE;
}

static int
note_field(pf_head *head, pf__head_state *state, pf_field *field, const char *data)
{
    const char *value = data + field->value_at;
    size_t len = field->value_len;
    switch (field->id) {
    case PF_FIELD_HOST:
        return note_host(head, state, field, value);
    case PF_FIELD_CONTENT_LENGTH:
        return note_length(head, state, value, len);
    case PF_FIELD_TRANSFER_ENCODING:
        return note_coding(state, value, len);
    case PF_FIELD_CONTENT_TYPE:
        return note_once(state, SEEN_TYPE, PF_ERR_CONTENT_TYPE);
    case PF_FIELD_CONNECTION:
        return note_connection(state, value, len);
    case PF_FIELD_EXPECT:
        return note_expect(state, value, len);
    case PF_FIELD_TE:
        if (head->minor > 0 && pf__http_list_has(value, len, "trailers"))
            head->flags |= PF_HEAD_TRAILERS;
        return DONE;
    case PF_FIELD_UPGRADE:
        state->seen |= SEEN_UPGRADE;
        return DONE;
    case PF_FIELD_FORWARDED:
    case PF_FIELD_X_FORWARDED_FOR:
    case PF_FIELD_X_FORWARDED_HOST:
    case PF_FIELD_X_FORWARDED_PROTO:
        head->flags |= PF_HEAD_FORWARDED;
        return DONE;
    default:
        return DONE;
    }
}

static int
parse_field_name(window *w, pf_field *field)
{
    size_t left = w->end - w->at;
    size_t len = pf__scan_token(w->data + w->at, left);
    if (len == left)
        return ran_out(w);
    if (len == 0 || w->data[w->at + len] != ':')
        return PF_ERR_FIELD_NAME;
    field->name_at = (uint32_t)w->at;
    field->name_len = (uint16_t)len;
    w->at += len + 1;
    return DONE;
}

/* The byte that ended a value early says which rule was broken. */
static int
value_error(char c)
{
    return c == '\n' ? PF_ERR_LINE_END : PF_ERR_FIELD_VALUE;
}

static int
parse_field_value(window *w, pf_field *field)
{
    while (w->at < w->end && is_ows(w->data[w->at]))
        w->at++;
    size_t start = w->at;
    size_t end = start + pf__scan_value(w->data + start, w->end - start);
    w->at = end;
    if (end < w->end && w->data[end] != '\r')
        return value_error(w->data[end]);
    int rc = take_line_end(w);
    if (rc != DONE)
        return rc;
    while (end > start && is_ows(w->data[end - 1]))
        end--;
    field->value_at = (uint32_t)start;
    field->value_len = (uint32_t)(end - start);
    return DONE;
}

static int
parse_field(pf_head *head, pf__head_state *state, window *w, const pf_options *limits)
{
    char first = w->data[w->at];
    if (is_ows(first))
        return head->nfields > 0 ? PF_ERR_FOLDED : PF_ERR_FIELD_NAME;
    pf_field *field = &head->fields[head->nfields];
    int rc = parse_field_name(w, field);
    if (rc != DONE || (rc = parse_field_value(w, field)) != DONE)
        return rc;
    if (head->nfields >= limits->max_fields)
        return PF_ERR_HEAD_SIZE;
    const char *name = w->data + field->name_at;
    field->id = (uint8_t)pf__http_field_id(name, field->name_len);
    if (field->id != PF_FIELD_OTHER
        && (rc = note_field(head, state, field, w->data)) != DONE)
        return rc;
    head->nfields++;
    state->at = (uint32_t)w->at;
    return DONE;
}

/* RFC 9112 9.3: persistent by default in 1.1, on request in 1.0. */
static bool
keeps_alive(const pf_head *head, unsigned seen)
{
    if (seen & SAID_CLOSE)
        return false;
    return head->minor > 0 || (seen & SAID_KEEP_ALIVE);
}

static int
finish_framing(pf_head *head, unsigned seen)
{
    if (!(seen & SEEN_CODING))
        return DONE;
    if (seen & SEEN_LENGTH)
        return PF_ERR_FRAMING;
    if (head->minor == 0)
        return PF_ERR_TRANSFER_ENCODING;
    if (seen & SAID_UNKNOWN_CODING)
        return PF_ERR_TRANSFER_CODING;
    head->flags |= PF_HEAD_CHUNKED;
    return DONE;
}

static int
finish_head(pf_head *head, const pf__head_state *state)
{
    unsigned seen = state->seen;
    if (!(seen & SEEN_HOST) && head->minor > 0)
        return PF_ERR_HOST;
    int rc = finish_framing(head, seen);
    if (rc != DONE)
        return rc;
    if (keeps_alive(head, seen))
        head->flags |= PF_HEAD_KEEP_ALIVE;
    if ((seen & SAID_CONTINUE) && head->minor > 0)
        head->flags |= PF_HEAD_EXPECT;
    if ((seen & SAID_UPGRADE) && (seen & SEEN_UPGRADE) && head->minor > 0)
        head->flags |= PF_HEAD_UPGRADE;
    head->size = state->at;
    return (int)head->size;
}

static int
parse_fields(pf_head *head, pf__head_state *state, const char *data, size_t len,
             const pf_options *limits)
{
    size_t head_end = (size_t)state->start + limits->max_header_size;
    for (;;) {
        size_t line_end = (size_t)state->at + limits->max_field_size;
        size_t limit = line_end < head_end ? line_end : head_end;
        window w = open_window(data, state->at, len, limit, PF_ERR_HEAD_SIZE);
        if (w.at >= w.end)
            return ran_out(&w);
        char first = data[w.at];
        if (first != '\r' && first != '\n') {
            int rc = parse_field(head, state, &w, limits);
            if (rc != DONE)
                return rc;
            continue;
        }
        int rc = take_line_end(&w);
        if (rc != DONE)
            return rc;
        state->at = (uint32_t)w.at;
        return finish_head(head, state);
    }
}

/* The fields of a head whose request line has just been parsed. */
static int
take_fields(pf_head *head, pf__head_state *state, const char *data, size_t len,
            const pf_options *limits, pf__repeat *known)
{
    uint32_t at = state->at;
    size_t most = (size_t)state->start + limits->max_header_size;
    uint32_t size = pf__repeat_find(known, head, data, at, len < most ? len : most);
    if (PF__LIKELY(size > 0)) {
        state->at = head->size = at + size;
        return (int)head->size;
    }
    int rc = parse_fields(head, state, data, len, limits);
    if (rc > 0)
        pf__repeat_keep(known, head, data, at);
    return rc;
}

int
pf__http_parse_head(pf_head *head, pf__head_state *state, const char *data, size_t len,
                    const pf_options *limits, pf__repeat *known)
{
    if (state->phase == REQUEST_LINE) {
        if (state->at == 0) {
            head->nfields = 0;
            head->flags = 0;
            head->host = 0xff;
            head->content_length = 0;
            head->authority = (pf_span){0};
        }
        int rc = parse_request_line(head, state, data, len, limits);
        if (rc != DONE)
            return rc;
        if (known != NULL)
            return take_fields(head, state, data, len, limits, known);
    }
    return parse_fields(head, state, data, len, limits);
}

static bool
is_forwarded(int id)
{
    return id == PF_FIELD_FORWARDED || id == PF_FIELD_X_FORWARDED_FOR
           || id == PF_FIELD_X_FORWARDED_HOST || id == PF_FIELD_X_FORWARDED_PROTO;
}

void
pf__http_drop_forwarded(pf_head *head)
{
    uint16_t kept = 0;
    for (uint16_t i = 0; i < head->nfields; i++) {
        if (is_forwarded(head->fields[i].id))
            continue;
        if (head->host == i)
            head->host = (uint8_t)kept;
        head->fields[kept++] = head->fields[i];
    }
    head->nfields = kept;
    head->flags &= (uint8_t)~PF_HEAD_FORWARDED;
}

/* ---- chunked bodies (RFC 9112 7.1) ---------------------------------------------------
 * A byte-wise machine for the framing; the payload between is moved in one piece.
 */
enum chunk_state {
    CHUNK_SIZE,
    CHUNK_EXT_NAME, /* behind ";": a token must begin */
    CHUNK_EXT_IN_NAME,
    CHUNK_EXT_VALUE, /* behind "=": a token or a quoted string must begin */
    CHUNK_EXT_IN_VALUE,
    CHUNK_EXT_QUOTED,
    CHUNK_EXT_ESCAPED,
    CHUNK_EXT_END, /* behind a quoted string */
    CHUNK_LF,
    CHUNK_DATA,
    CHUNK_DATA_CR,
    CHUNK_DATA_LF,
    TRAILER_LINE,
    TRAILER_NAME,
    TRAILER_VALUE,
    TRAILER_LF,
    LAST_LF,
};

static int
hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    return (c | 0x20) - 'a' + 10;
}

static int
chunk_size_byte(pf__chunked *c, char byte, uint64_t max_body)
{
    if (pf__scan_is(byte, PF__CHAR_HEX)) {
        if (++c->digits > PF__CHUNK_DIGITS_MAX)
            return PF_ERR_CHUNK_SIZE;
        c->left = c->left << 4 | (uint64_t)hex_value(byte);
        return 0;
    }
    if (c->digits == 0 || (byte != '\r' && byte != ';'))
        return PF_ERR_CHUNK_SIZE;
    if (c->left > max_body || c->total > max_body - c->left)
        return PF_ERR_BODY_SIZE;
    c->state = byte == '\r' ? CHUNK_LF : CHUNK_EXT_NAME;
    return 0;
}

/* One byte of chunk-ext: the state behind it, or -1. */
static int
next_ext_state(int state, char byte)
{
    bool token = pf__scan_is(byte, PF__CHAR_TOKEN);
    switch (state) {
    case CHUNK_EXT_NAME:
        return token ? CHUNK_EXT_IN_NAME : -1;
    case CHUNK_EXT_IN_NAME:
        if (byte == '=')
            return CHUNK_EXT_VALUE;
        break;
    case CHUNK_EXT_VALUE:
        return byte == '"' ? CHUNK_EXT_QUOTED : token ? CHUNK_EXT_IN_VALUE : -1;
    case CHUNK_EXT_QUOTED:
        if (byte == '"' || byte == '\\')
            return byte == '"' ? CHUNK_EXT_END : CHUNK_EXT_ESCAPED;
        return pf__scan_is(byte, PF__CHAR_VALUE) ? CHUNK_EXT_QUOTED : -1;
    case CHUNK_EXT_ESCAPED:
        return pf__scan_is(byte, PF__CHAR_VALUE) ? CHUNK_EXT_QUOTED : -1;
    case CHUNK_EXT_END:
        token = false;
        break;
    default:
        break;
    }
    if (byte == ';')
        return CHUNK_EXT_NAME;
    if (byte == '\r')
        return CHUNK_LF;
    return token ? state : -1;
}

static int
chunk_ext_byte(pf__chunked *c, char byte)
{
    if (++c->ext > PF__CHUNK_EXT_MAX || ++c->ext_total > PF__CHUNK_EXT_TOTAL_MAX)
        return PF_ERR_CHUNK_EXTENSION;
    int next = next_ext_state(c->state, byte);
    if (next < 0)
        return PF_ERR_CHUNK_EXTENSION;
    c->state = (uint8_t)next;
    return 0;
}

static int
chunk_lf_byte(pf__chunked *c, char byte)
{
    if (byte != '\n')
        return PF_ERR_CHUNK_SIZE;
    c->state = c->left > 0 ? CHUNK_DATA : TRAILER_LINE;
    c->total += c->left;
    return 0;
}

static void
begin_chunk(pf__chunked *c)
{
    c->state = CHUNK_SIZE;
    c->digits = 0;
    c->ext = 0;
    c->left = 0;
}

/* What would change framing, routing, or what was already decided about the message is
 * an attack or a mistake behind a body (RFC 9110 6.5.1). */
bool
pf__http_is_forbidden_trailer(const char *name, size_t len)
{
    static const char *const others[] = {
        "content-range", "max-forwards", "www-authenticate",
        "set-cookie",    "if-match",     "if-range",
        "pragma",        "age",          "if-unmodified-since",
        "expires",       "location",     "vary",
        "retry-after",   "warning",
    };
    int id = pf__http_field_id(name, len);
    if (id != PF_FIELD_OTHER)
        return id != PF_FIELD_X_REQUEST_ID;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strlen(others[i]) == len && same_name(name, others[i], len))
            return true;
    return false;
}

/* Trailers of a request are checked and dropped. */
static bool
forbidden_trailer(const pf__chunked *c)
{
    return c->name_len <= PF__NAME_MAX
           && pf__http_is_forbidden_trailer(c->name, c->name_len);
}

static int
trailer_name_byte(pf__chunked *c, char byte)
{
    if (byte == ':' && c->name_len > 0) {
        c->state = TRAILER_VALUE;
        return forbidden_trailer(c) ? PF_ERR_TRAILER : 0;
    }
    if (!pf__scan_is(byte, PF__CHAR_TOKEN))
        return PF_ERR_TRAILER;
    if (c->name_len < PF__NAME_MAX)
        c->name[c->name_len] = byte;
    if (c->name_len <= PF__NAME_MAX)
        c->name_len++;
    return 0;
}

static int
trailer_line_byte(pf__chunked *c, char byte)
{
    if (byte == '\r') {
        c->state = LAST_LF;
        return 0;
    }
    c->state = TRAILER_NAME;
    c->name_len = 0;
    c->trailer_fields++;
    return trailer_name_byte(c, byte);
}

static int
trailer_value_byte(pf__chunked *c, char byte)
{
    if (byte == '\r')
        c->state = TRAILER_LF;
    else if (!pf__scan_is(byte, PF__CHAR_VALUE))
        return PF_ERR_TRAILER;
    return 0;
}

static int
trailer_limits(pf__chunked *c, const pf_options *limits)
{
    c->line_size++;
    if (++c->trailer_size > limits->max_header_size
        || c->line_size > limits->max_field_size
        || c->trailer_fields > limits->max_fields)
        return PF_ERR_HEAD_SIZE;
    return 0;
}

/* One byte of framing. DONE behind the last. */
static int
framing_byte(pf__chunked *c, char byte, uint64_t max_body, const pf_options *limits)
{
    if (c->state >= TRAILER_LINE && c->state != LAST_LF) {
        int rc = trailer_limits(c, limits);
        if (rc < 0)
            return rc;
    }
    switch (c->state) {
    case CHUNK_SIZE:
        return chunk_size_byte(c, byte, max_body);
    case CHUNK_LF:
        return chunk_lf_byte(c, byte);
    case CHUNK_DATA_CR:
        c->state = CHUNK_DATA_LF;
        return byte == '\r' ? 0 : PF_ERR_CHUNK_DATA;
    case CHUNK_DATA_LF:
        begin_chunk(c);
        return byte == '\n' ? 0 : PF_ERR_CHUNK_DATA;
    case TRAILER_LINE:
        return trailer_line_byte(c, byte);
    case TRAILER_NAME:
        return trailer_name_byte(c, byte);
    case TRAILER_VALUE:
        return trailer_value_byte(c, byte);
    case TRAILER_LF:
        c->state = TRAILER_LINE;
        c->line_size = 0;
        return byte == '\n' ? 0 : PF_ERR_TRAILER;
    case LAST_LF:
        return byte == '\n' ? DONE : PF_ERR_TRAILER;
    default:
        return chunk_ext_byte(c, byte);
    }
}

static void
move_payload(pf__chunked *c, char *data, size_t *raw, size_t len, size_t *end)
{
    size_t n = len - *raw;
    if (n > c->left)
        n = (size_t)c->left;
    if (*end != *raw)
        memmove(data + *end, data + *raw, n);
    *raw += n;
    *end += n;
    c->left -= n;
    if (c->left == 0)
        c->state = CHUNK_DATA_CR;
}

int
pf__http_decode_chunked(pf__chunked *c, char *data, size_t *raw, size_t len,
                        size_t *end, uint64_t max_body, const pf_options *limits)
{
    while (*raw < len) {
        if (c->state == CHUNK_DATA) {
            move_payload(c, data, raw, len, end);
            continue;
        }
        int rc = c->error ? c->error : framing_byte(c, data[*raw], max_body, limits);
        if (rc < 0)
            return c->error = rc;
        ++*raw;
        if (rc == DONE)
            return DONE;
    }
    return 0;
}

/* ---- which SIMD ---------------------------------------------------------------------*/
const char *
pf_http_simd(void)
{
    return pf__cpu_name(pf__scan_variant());
}

int
pf_http_set_simd(const char *name)
{
    int variant = pf__cpu_find(name);
    if (variant < 0)
        return variant;
    pf__scan_select((pf__cpu)variant);
    pf__payload_select((pf__cpu)variant);
    return 0;
}
