/* fuzz_connection.c - whole connections: what peers send, how handlers behave, and time;
 * as HTTP, and as WebSockets from where a handler accepts one.
 *
 * Input: a byte n, n bytes of script, and the payload that the peers send. The script
 * says which options hold, how the payload is cut, who reads and who leaves, what is
 * done with each loan, and when time passes; where it has ended, the rest is sent at
 * once and answered at once. One loop lives through all inputs; the clock is ours, so
 * that an input always does the same.
 *
 * Asserted: events name only loans; what is lent is what its peer sent, in order; each
 * loan ends once and each borrowed body is released once; who waits for a peer has a
 * deadline; at the end no connection, loan or buffer is left; what a peer read is a
 * sequence of well-formed answers, each with the body that its own handler wrote, never
 * more than there were requests, and cut short only where somebody broke off. Messages
 * are decoded once more by the simplest of decoders, in both directions.
 */
#define _GNU_SOURCE
#undef NDEBUG
#include "internal.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <zlib.h>

enum {
    PEERS = 3,
    ASKED_MAX = 64, /* requests of one peer whose answers are looked at */
    REFS = 256,
    LONGEST = 100000,    /* body of one write */
    SENT_MAX = 1 << 16,  /* bytes of one input, and so of one peer */
    HEARD_MAX = 1 << 20, /* bytes of one peer that are looked at */
    LETTERS = 26,
    MESSAGE_MAX = 20000,
    MESSAGES_MAX = 24, /* that are compared: each is decoded from the beginning */
};

/* ---- the clocks of the loop; libFuzzer reads CLOCK_REALTIME ------------------------*/
static int64_t now_ms = 1000000;

int clock_gettime(clockid_t clock, struct timespec *t);

int
clock_gettime(clockid_t clock, struct timespec *t)
{
    if (clock != CLOCK_MONOTONIC && clock != CLOCK_REALTIME_COARSE)
        return (int)syscall(SYS_clock_gettime, clock, t);
    *t = (struct timespec){now_ms / 1000, now_ms % 1000 * 1000000};
    return 0;
}

/* ---- the world ----------------------------------------------------------------------*/
typedef struct asked {
    bool head;     /* by HEAD */
    bool expects;  /* 100 Continue */
    bool answered; /* its loan ended well */
    bool refused;  /* with a body of the loop's */
    bool silent;   /* aborted before its answer could be sent */
    char letter;   /* that its answer's body is made of */
    int messages;  /* sent to it, when it was a WebSocket */
} asked;

typedef struct peer {
    int fd; /* -1: not connected, or gone */
    uint64_t id;
    bool finished; /* it has shut its sending side */
    bool at_end;   /* it has read the end */
    bool cut;      /* somebody broke off: its last answer may be incomplete */
    bool skipped;  /* more was heard than is kept */
    asked asked[ASKED_MAX];
    int nasked;
    size_t sent;   /* of sent[] */
    size_t start;  /* in sent[], of the request that is lent next */
    size_t len;    /* of heard[] */
    size_t frames; /* in sent[], where its WebSocket begins */
} peer;

typedef struct loan {
    pf_request *request; /* NULL: a free place */
    peer *peer;
    asked *asked; /* NULL: not looked at */
    size_t start; /* of its request in what the peer sent */
    size_t consumed;
    bool refused; /* lent as REFUSED */
    bool closed;  /* its holder was told CLOSED */
    bool broken;  /* because of what its peer sent */
    bool channel; /* it is a WebSocket */
    int received; /* messages of it */
} loan;

static struct world {
    const uint8_t *script, *script_end;
    const char *payload, *payload_end;
    peer peers[PEERS];
    int current;       /* peer that acts */
    loan loans[PEERS]; /* a connection lends one at a time */
    int nloans;
    int released[REFS]; /* times that each was told */
    int borrowed;       /* of REFS */
    bool time_passed;
} w;

static pf_loop *loop;
static char refs[REFS];
static char bodies[LETTERS][LONGEST];
static int file; /* of the same bytes */
static char sent[PEERS][SENT_MAX];
static char heard[PEERS][HEARD_MAX];

static pf_loop_stats
stats(void)
{
    pf_loop_stats s;
    pf_loop_get_stats(loop, &s);
    return s;
}

static uint8_t
next(void)
{
    return w.script < w.script_end ? *w.script++ : 0;
}

/* ---- the loop -----------------------------------------------------------------------*/
static void
open_loop(void)
{
    pf_options options;
    pf_options_init(&options);
    assert(pf_loop_open(&loop, &options) == 0);
    for (int i = 0; i < LETTERS; i++)
        memset(bodies[i], 'a' + i, LONGEST);
    file = memfd_create("bodies", MFD_CLOEXEC);
    if (file < 0 || write(file, bodies, sizeof bodies) != (ssize_t)sizeof bodies)
        abort();
    signal(SIGPIPE, SIG_IGN); /* of sendfile() */
    /* The pool's lists are full for ever: what is released is freed, and seen if used. */
    for (int i = 0; i < PF__BUFFER_CLASSES; i++)
        loop->pool.spares[i] = PF__BUFFER_SPARES;
}

static void
free_spares(void)
{
    while (loop->free_requests != NULL) {
        pf_request *r = loop->free_requests;
        loop->free_requests = r->next_free;
        free(r);
    }
    while (loop->free_conns != NULL) {
        pf_conn *conn = loop->free_conns;
        loop->free_conns = conn->next;
        free(conn);
    }
}

static void
pick_options(void)
{
    static const unsigned flags[] = {PF_OPTION_LEND_HEADS, PF_OPTION_LEND_REFUSED,
                                     PF_OPTION_NOTICES,    PF_OPTION_NO_KEEP_ALIVE,
                                     PF_OPTION_GET_ONLY,   PF_OPTION_KEEP_ON_DRAIN};
    uint8_t pick = next();
    pf_options *o = &loop->options;
    static const pf_network everybody = {.family = AF_UNIX};
    pf_options_init(o);
    o->forwarded_trust = &everybody; /* what is lent is what was sent */
    o->forwarded_trusted = 1;
    o->server = o->content_type = NULL;
    o->flags |= PF_OPTION_WS_DEFLATE; /* whether it is used is the peers' choice */
    o->ws_max_size = MESSAGE_MAX;
    for (int i = 0; i < 6; i++)
        if (pick & 1 << i)
            o->flags |= flags[i];
    if (pick & 1 << 2)
        o->body_buffer_size = 4; /* nearly every body goes to a file */
    if (pick & 1 << 6) {
        o->max_requests = 2;
        o->max_body_size = 1000;
        o->ws_max_size = 100;
    }
    if (pick & 1 << 7) {
        o->read_buffer_size = 256;
        o->max_header_size = 300;
        o->max_target_size = 40;
        o->max_field_size = 100;
        o->max_fields = 6;
    }
}

/* ---- loans --------------------------------------------------------------------------*/
static peer *
peer_of(uint64_t id)
{
    for (int i = 0; i < PEERS; i++)
        if (w.peers[i].id == id)
            return &w.peers[i];
    return NULL;
}

static loan *
find_loan(const pf_request *request)
{
    for (int i = 0; i < PEERS; i++)
        if (w.loans[i].request == request)
            return &w.loans[i];
    return NULL;
}

static asked *
note_asked(peer *p, const pf_request *request)
{
    const pf_head *head = pf_request_head(request);
    if (p->nasked == ASKED_MAX) {
        p->skipped = true;
        return NULL;
    }
    asked *a = &p->asked[p->nasked++];
    *a = (asked){.head = (head->flags & PF_HEAD_IS_HEAD) != 0,
                 .expects = (head->flags & PF_HEAD_EXPECT) != 0,
                 .letter = (char)((p - w.peers) * 7 + p->nasked) % LETTERS};
    return a;
}

static loan *
begin_loan(pf_request *request)
{
    loan *l = find_loan(NULL);
    peer *p = peer_of(pf_request_connection(request));
    assert(l != NULL && p != NULL);
    *l = (loan){.request = request,
                .peer = p,
                .asked = note_asked(p, request),
                .start = p->start};
    w.nloans++;
    pf_request_set_user(request, l);
    return l;
}

static void
end_loan(loan *l, bool answered)
{
    if (answered && l->asked != NULL)
        l->asked->answered = true;
    if (!answered)
        l->peer->cut = true;
    l->request = NULL;
    w.nloans--;
}

/* The body, as far as the peer has sent it: decoded once more from the beginning. */
static pf_slice
expected_body(const loan *l, size_t *end, bool *done)
{
    static char copy[SENT_MAX];
    const pf_head *head = pf_request_head(l->request);
    size_t raw = l->start + head->size, at = raw, len = l->peer->sent - raw;
    pf__chunked chunked = {0};
    *end = raw + head->content_length;
    *done = len >= head->content_length;
    if (!(head->flags & PF_HEAD_CHUNKED))
        return (pf_slice){sent[l->peer - w.peers] + raw,
                          *done ? head->content_length : len};
    memcpy(copy, sent[l->peer - w.peers], l->peer->sent);
    *done = pf__http_decode_chunked(&chunked, copy, &raw, l->peer->sent, &at, INT64_MAX,
                                    &loop->options)
            > 0;
    *end = raw;
    return (pf_slice){copy + l->start + head->size, at - l->start - head->size};
}

/* What is in its file, which is whole wherever it is looked at. */
static pf_slice
spilled_body(const loan *l)
{
    static char copy[SENT_MAX];
    ssize_t n = pread(pf_request_body_fd(l->request), copy, sizeof copy, 0);
    assert(n > 0);
    return (pf_slice){copy, (size_t)n};
}

static void
check_head(const loan *l)
{
    const pf_head *head = pf_request_head(l->request);
    const char *bytes = sent[l->peer - w.peers] + l->start;
    assert(l->start + head->size <= l->peer->sent);
    assert(memcmp(pf_request_bytes(l->request), bytes, head->size) == 0);
    assert(memcmp(bytes + head->size - 4, "\r\n\r\n", 4) == 0);
}

/* What is lent is what the peer sent, wherever the buffer has moved to. */
static void
look_at(loan *l)
{
    pf_slice body = pf_request_body(l->request);
    size_t end;
    bool done, done_here = pf_request_body_done(l->request);
    if (l->refused)
        return;
    check_head(l);
    pf_slice expected = expected_body(l, &end, &done);
    if (pf_request_body_fd(l->request) >= 0) {
        assert(body.len == 0);
        body = spilled_body(l);
    }
    assert(l->consumed + body.len <= expected.len);
    assert(body.len == pf_request_body_size(l->request));
    assert(body.len == 0
           || memcmp(body.data, expected.data + l->consumed, body.len) == 0);
    assert(!done_here || (done && l->consumed + body.len == expected.len));
    assert(!(l->broken && done_here));
    l->peer->start = end;
}

/* ---- what a handler may do ----------------------------------------------------------*/
static int
letter_of(const loan *l)
{
    return l->asked != NULL ? l->asked->letter : 0;
}

static char *
letters_of(const loan *l)
{
    return bodies[letter_of(l)];
}

static size_t
some_length(void)
{
    static const size_t lengths[] = {0,    1,     5,     100,   1000,   4096,
                                     9000, 16384, 16385, 40000, 100000, 65536};
    return lengths[next() % (sizeof lengths / sizeof *lengths)];
}

static int
some_status(void)
{
    static const int statuses[] = {200, 204, 304, 404, 500, 299, 199, 1000};
    return statuses[next() % 8];
}

static void
answer_whole(loan *l, int status, size_t len, bool borrow)
{
    void *ref = borrow && w.borrowed < REFS ? &refs[w.borrowed] : NULL;
    int rc = pf_request_answer(l->request, status, NULL, 0, letters_of(l), len, ref);
    if (rc >= 0)
        end_loan(l, true);
    assert(rc <= 1 && (rc < 1 || ref != NULL));
    w.borrowed += rc == 1;
}

static void
add_field(loan *l)
{
    static const char *const fields[][2] = {
        {"X", "y"},
        {"Content-Length", "5"},
        {"Content-Length", "100"},
        {"Date", "d"},
        {"Connection", "close"},
        {"Transfer-Encoding", "chunked"},
        {"X\r\n", "y"},
        {"X", "y\r\n\r\nHTTP/1.1 200 OK"},
    };
    const char *const *f = fields[next() % 8];
    pf_request_field(l->request, f[0], strlen(f[0]), f[1], strlen(f[1]));
}

static int
write_file(loan *l, size_t len)
{
    int64_t at = (int64_t)letter_of(l) * LONGEST;
    return pf_request_write_file(l->request, file, at, len, &refs[w.borrowed]);
}

static void
write_some(loan *l, bool borrow)
{
    size_t len = some_length();
    if (!borrow || w.borrowed == REFS || !pf_request_borrows(l->request, len)) {
        pf_request_write(l->request, letters_of(l), len);
        return;
    }
    if (letter_of(l) % 2 == 1) { /* half of them out of a file */
        w.borrowed += write_file(l, len) == 1;
        return;
    }
    int rc = pf_request_write_ref(l->request, letters_of(l), len, &refs[w.borrowed]);
    w.borrowed += rc >= 0;
}

static void
consume_some(loan *l)
{
    size_t have = pf_request_body(l->request).len, n = next();
    if (n == 0)
        n = have;
    assert(pf_request_consume(l->request, n) == (n <= have ? 0 : PF_ERR_STATE));
    l->consumed += n <= have ? n : 0;
}

static void
refuse(loan *l)
{
    static const int codes[] = {PF_ERR_BODY_SIZE, PF_ERR_BODY_TIMEOUT,
                                PF_ERR_CHUNK_DATA, PF_ERR_CLOSED};
    bool dead = l->request->dead;
    if (pf_request_refuse(l->request, codes[next() % 4]) < 0)
        return;
    if (l->asked != NULL)
        l->asked->refused = true;
    end_loan(l, !dead);
}

static void
inform(loan *l)
{
    static const char field[] = "Link: x\r\n";
    int status = 100 + next() % 4;
    pf_request_inform(l->request, status, field, next() % 2 ? sizeof field - 1 : 0);
}

static void
abort_loan(loan *l)
{
    if (l->asked != NULL)
        l->asked->silent = !pf_request_begun(l->request);
    pf_request_abort(l->request);
    end_loan(l, false);
}

static void
set_limits(loan *l)
{
    int64_t size = next();
    pf_request_limit(l->request, size, (int64_t)next() * 100, -1);
}

static void
add_trailer(loan *l)
{
    static const char *const fields[][2] = {
        {"X", "y"}, {"Empty", ""}, {"Content-Length", "5"}, {"X", "y\r\n\r\nHTTP/1.1"}};
    const char *const *f = fields[next() % 4];
    pf_request_trailer(l->request, f[0], strlen(f[0]), f[1], strlen(f[1]));
}

/* ---- WebSockets ---------------------------------------------------------------------*/
static void
accept_websocket(loan *l)
{
    static const char *const protocols[] = {NULL, "chat", "", "a b"};
    const char *protocol = protocols[next() % 4];
    pf_request *r = l->request;
    if (pf_channel_begin(r, protocol, protocol != NULL ? strlen(protocol) : 0) < 0)
        return;
    assert(pf_request_field(r, "X", 1, "y", 1) == 0);
    assert(pf_channel_open(r) == 0);
    l->channel = true;
    l->peer->frames = l->peer->start;
}

/* One frame; false: not all of it is there. */
typedef struct frame {
    int first;
    bool masked;
    uint64_t len;
    const char *key, *payload;
} frame;

static bool
read_frame(const char **p, const char *end, frame *f)
{
    const uint8_t *at = (const uint8_t *)*p;
    size_t left = (size_t)(end - *p), head = 2;
    if (left < head)
        return false;
    *f = (frame){.first = at[0], .masked = at[1] >> 7, .len = at[1] & 0x7f};
    size_t more = f->len == 127 ? 8 : f->len == 126 ? 2 : 0;
    head += more + (f->masked ? 4 : 0);
    if (left < head)
        return false;
    for (size_t i = 0; i < more; i++)
        f->len = (i > 0 ? f->len << 8 : 0) | at[2 + i];
    f->key = *p + 2 + more;
    f->payload = *p + head;
    if (left - head < f->len)
        return false;
    *p += head + f->len;
    return true;
}

/* A message, inflated; the window stays from one to the next. A block that says it is
 * the last ends the stream, not the message (RFC 7692 7.2.3.4). */
static bool
inflate_message(z_stream *z, const char *data, size_t len, char *to, size_t *size,
                size_t max)
{
    static uint8_t in[SENT_MAX + HEARD_MAX + 4], window[32768];
    uInt kept = 0;
    memcpy(in, data, len);
    memcpy(in + len, "\0\0\xff\xff", 4);
    z->next_in = in;
    z->avail_in = (uInt)len + 4;
    z->next_out = (uint8_t *)to;
    z->avail_out = (uInt)max;
    for (;;) {
        int rc = inflate(z, Z_SYNC_FLUSH);
        if (rc == Z_STREAM_END) {
            if (inflateGetDictionary(z, window, &kept) != Z_OK)
                abort();
            inflateReset(z);
            inflateSetDictionary(z, window, kept);
        } else if (rc != Z_OK && rc != Z_BUF_ERROR) {
            return false;
        }
        if (z->avail_out == 0)
            return false;
        if (z->avail_in == 0 || rc == Z_BUF_ERROR)
            break;
    }
    *size = max - z->avail_out;
    return z->avail_in == 0;
}

/* The nth message that a peer has sent, as it must be if it is lent. */
static bool
sent_message(const peer *p, int n, bool forgets, int *kind, pf_slice *message)
{
    static char raw[SENT_MAX], plain[MESSAGE_MAX + 1];
    const char *base = sent[p - w.peers], *at = base + p->frames, *end = base + p->sent;
    z_stream z = {0};
    bool deflated = false, found = false;
    size_t len = 0;
    frame f;
    if (inflateInit2(&z, -15) != Z_OK)
        abort();
    while (!found && read_frame(&at, end, &f) && f.masked && (f.first & 15) != 8) {
        if (f.first & 8)
            continue;
        if (f.first & 15) {
            *kind = f.first & 15;
            deflated = f.first & 0x40;
            len = 0;
        }
        for (size_t i = 0; i < f.len; i++)
            raw[len++] = (char)(f.payload[i] ^ f.key[i % 4]);
        if (!(f.first & 0x80))
            continue;
        *message = (pf_slice){raw, len};
        if (deflated) {
            size_t size;
            if (forgets)
                inflateReset(&z);
            if (!inflate_message(&z, raw, len, plain, &size, sizeof plain))
                break;
            *message = (pf_slice){plain, size};
        }
        found = n-- == 0;
    }
    inflateEnd(&z);
    return found;
}

static bool
receive_message(loan *l)
{
    pf_message message;
    pf_slice expected;
    int kind;
    if (pf_channel_receive(l->request, &message) <= 0)
        return false;
    assert(message.len <= loop->options.ws_max_size);
    if (l->received < MESSAGES_MAX) {
        bool forgets = l->request->conn->websocket->deflate.in_forgets;
        assert(sent_message(l->peer, l->received, forgets, &kind, &expected));
        assert(message.kind == kind && message.len == expected.len);
        assert(message.len == 0 || !memcmp(message.data, expected.data, message.len));
    }
    l->received++;
    return true;
}

static void
send_message(loan *l, size_t len, bool borrow)
{
    int kind = next() % 2 ? PF_MESSAGE_TEXT : PF_MESSAGE_BINARY, rc;
    if (borrow && w.borrowed < REFS) {
        rc = pf_channel_send_ref(l->request, kind, letters_of(l), len,
                                 &refs[w.borrowed]);
        w.borrowed += rc == 1;
    } else {
        rc = pf_channel_send(l->request, kind, letters_of(l), len);
    }
    assert(rc >= 0 || rc == PF_ERR_CLOSED);
    if (rc >= 0 && l->asked != NULL)
        l->asked->messages++;
}

static void
close_websocket(loan *l, int code, size_t len)
{
    int rc = pf_channel_close(l->request, code, bodies[0], len);
    assert(rc == 0 || rc == PF_ERR_APP_CLOSE);
    if (rc == 0)
        end_loan(l, true);
}

static void
check_code(const loan *l)
{
    pf_slice reason;
    int code = pf_channel_code(l->request, &reason);
    assert(code >= 1000 && code < 5000 && reason.len <= PF_CHANNEL_REASON);
}

static void
act_on_websocket(loan *l, int action)
{
    static const int codes[] = {1000, 1001, 4999, 3000, 1005, 1006, 999, 0};
    if (l->closed)
        check_code(l);
    switch (action % 8) {
    case 0: /* an echo, but for what it says */
        while (receive_message(l))
            send_message(l, some_length(), true);
        break;
    case 1:
        receive_message(l);
        break;
    case 2:
        send_message(l, some_length(), false);
        break;
    case 3:
        send_message(l, some_length(), true);
        break;
    case 4:
        close_websocket(l, codes[next() % 8], next());
        break;
    case 5:
        pf_request_want_room(l->request);
        break;
    case 6:
        abort_loan(l);
        break;
    default:
        break;
    }
    free_spares();
}

/* ---- what it does at a moment -------------------------------------------------------*/
enum action {
    ANSWER,
    ANSWER_LARGE,
    ANSWER_BORROWED,
    BEGIN,
    BEGIN_LENGTH,
    FIELD,
    WRITE,
    WRITE_REF,
    END,
    ABORT,
    WANT_SOME,
    WANT_WHOLE,
    CONSUME,
    REFUSE,
    RESET,
    INFORM,
    WANT_ROOM,
    LIMIT,
    KEEP,
    TRAILERS,
    TRAILER,
    ACCEPT,
    NACTIONS,
};

static void
act(loan *l, int action)
{
    pf_request *r = l->request;
    if (l->channel) {
        act_on_websocket(l, action);
        return;
    }
    look_at(l);
    switch (action) {
    case ANSWER:
        answer_whole(l, 200, 5, false);
        break;
    case ANSWER_LARGE:
        answer_whole(l, some_status(), some_length(), false);
        break;
    case ANSWER_BORROWED:
        answer_whole(l, some_status(), some_length(), true);
        break;
    case BEGIN:
        pf_request_begin(r, some_status(), -1);
        break;
    case BEGIN_LENGTH:
        pf_request_begin(r, some_status(), (int64_t)some_length());
        break;
    case FIELD:
        add_field(l);
        break;
    case WRITE:
        write_some(l, false);
        break;
    case WRITE_REF:
        write_some(l, true);
        break;
    case END:
        end_loan(l, pf_request_end(r) >= 0);
        break;
    case ABORT:
        abort_loan(l);
        break;
    case WANT_SOME:
        pf_request_want_body(r, PF_WANT_SOME);
        break;
    case WANT_WHOLE:
        pf_request_want_body(r, PF_WANT_WHOLE);
        break;
    case CONSUME:
        consume_some(l);
        break;
    case REFUSE:
        refuse(l);
        break;
    case RESET:
        pf_request_reset(r);
        break;
    case INFORM:
        inform(l);
        break;
    case WANT_ROOM:
        pf_request_want_room(r);
        break;
    case LIMIT:
        set_limits(l);
        break;
    case TRAILERS:
        pf_request_trailers(r);
        break;
    case TRAILER:
        add_trailer(l);
        break;
    case ACCEPT:
        accept_websocket(l);
        break;
    default:
        break;
    }
    free_spares();
}

/* Whatever was begun is ended somehow. */
static void
finish(loan *l)
{
    pf_request *r = l->request;
    if (l->channel) {
        close_websocket(l, 1000, 0);
        return;
    }
    answer_whole(l, 200, 5, false);
    if (l->request == r)
        act(l, END);
}

/* ---- events -------------------------------------------------------------------------*/
static void
note_released(const void *ref)
{
    ptrdiff_t i = (const char *)ref - refs;
    assert(i >= 0 && i < w.borrowed && ++w.released[i] == 1);
}

static void
heed_closed(loan *l, int code)
{
    assert(!l->closed && code < 0);
    l->closed = true;
    l->broken = code != PF_ERR_CLOSED && code != PF_ERR_BODY_TIMEOUT && !l->refused;
}

static void
heed(const pf_event *event)
{
    if (event->flags & PF_EVENT_RELEASED) {
        note_released(event->user);
        return;
    }
    if (event->request == NULL)
        return;
    loan *l = find_loan(event->request);
    if (event->flags & PF_EVENT_REQUEST) {
        assert(l == NULL);
        l = begin_loan(event->request);
        l->refused = event->flags & PF_EVENT_REFUSED;
    } else {
        assert(l != NULL && event->user == l);
    }
    if (event->flags & PF_EVENT_CLOSED)
        heed_closed(l, event->code);
    act(l, next() % NACTIONS);
}

/* A connection that nobody looks after is one that nobody will ever close. */
static void
check_deadlines(void)
{
    for (const pf_conn *conn = loop->conns; conn != NULL; conn = conn->next) {
        bool holder = conn->phase == PF__PHASE_LENT
                      && (conn->request->want == 0 || conn->hung_up);
        if (!holder && !conn->in_dirty && !conn->in_ready)
            assert(conn->timer.link != NULL && conn->timer.deadline != 0);
    }
}

static void
turn(int max)
{
    pf_event events[8];
    int n = pf_loop_wait(loop, events, max, 0);
    assert(n >= 0 && n <= max);
    free_spares();
    check_deadlines();
    /* A handler must not end another loan of its batch. */
    for (int i = 0; i < n; i++)
        heed(&events[i]);
    assert(stats().lent == (uint32_t)w.nloans);
}

/* ---- peers --------------------------------------------------------------------------*/
static void
connect_peer(int i)
{
    int ends[2], small = 2048;
    pf__origin origin = {.peer.family = AF_UNIX};
    uint8_t pick = next();
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) < 0)
        abort();
    if (pick & 1)
        setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    w.peers[i] = (peer){.fd = ends[1], .id = loop->next_id + 1};
    int refusal = (pick & 0x1f) == 0x1f ? PF_ERR_CONNECTIONS : 0;
    assert(pf__conn_open(loop, ends[0], &origin, refusal) == 0);
}

static void
send_some(peer *p)
{
    size_t n = next(), left = (size_t)(w.payload_end - w.payload);
    n = n >= 0xf0 ? left : n >= 0x80 ? (n - 0x7f) * 64 : n;
    if (n > left)
        n = left;
    if (p->fd < 0 || p->finished || n == 0)
        return;
    ssize_t done = send(p->fd, w.payload, n, MSG_NOSIGNAL);
    if (done <= 0)
        return;
    memcpy(sent[p - w.peers] + p->sent, w.payload, (size_t)done);
    p->sent += (size_t)done;
    w.payload += done;
}

static bool
hear_some(peer *p, size_t max)
{
    static char bytes[65536];
    if (p->fd < 0 || p->at_end)
        return false;
    ssize_t n = recv(p->fd, bytes, max < sizeof bytes ? max : sizeof bytes, 0);
    if (n <= 0) {
        p->at_end = n == 0 || errno != EAGAIN;
        return false;
    }
    if (p->len + (size_t)n > HEARD_MAX)
        p->skipped = true;
    if (!p->skipped) {
        memcpy(heard[p - w.peers] + p->len, bytes, (size_t)n);
        p->len += (size_t)n;
    }
    return true;
}

static void
leave(peer *p)
{
    if (p->fd >= 0)
        close(p->fd);
    p->fd = -1;
    p->cut = true;
}

static void
pass_time(void)
{
    static const int steps[] = {1, 64, 500, 2000, 10000, 31000, 80000, 1000000};
    now_ms += steps[next() % 8];
    w.time_passed = true;
}

static void
act_on_some_loan(void)
{
    int pick = next(), action = next() % NACTIONS;
    for (int i = 0; i < PEERS; i++) {
        loan *l = &w.loans[(pick + i) % PEERS];
        if (l->request != NULL) {
            act(l, action);
            return;
        }
    }
}

static void
step(uint8_t what)
{
    peer *p = &w.peers[w.current];
    switch (what % 16) {
    case 0:
    case 1:
    case 2:
        send_some(p);
        break;
    case 3:
    case 4:
        turn(1 + what / 16 % 8);
        break;
    case 5:
        hear_some(p, 1u + next() * 64u);
        break;
    case 6:
        if (p->fd >= 0)
            shutdown(p->fd, SHUT_WR);
        p->finished = true;
        break;
    case 7:
        leave(p);
        break;
    case 8:
        pass_time();
        break;
    case 9:
        w.current = what / 16 % PEERS;
        if (w.peers[w.current].id == 0)
            connect_peer(w.current);
        break;
    case 10:
        pf_loop_flush(loop);
        break;
    case 11:
        pf_loop_drain(loop, false, -1);
        break;
    case 12:
        pf_loop_touch(loop);
        break;
    default:
        act_on_some_loan();
        break;
    }
    free_spares();
}

/* ---- what was heard -----------------------------------------------------------------*/
typedef struct reply {
    int status;
    bool close, chunked, deflates;
    int64_t length; /* -1: none given */
} reply;

/* A head is lines of ASCII with one colon rule; false: it is incomplete. */
static bool
read_head(const char **p, const char *end, reply *r)
{
    const char *head = *p,
               *head_end = memmem(head, (size_t)(end - head), "\r\n\r\n", 4);
    if (head_end == NULL)
        return false;
    *r = (reply){.length = -1};
    assert(head_end - head > 12 && memcmp(head, "HTTP/1.1 ", 9) == 0);
    r->status = atoi(head + 9);
    assert(head[12] == ' ' && r->status >= 100 && r->status <= 999);
    const char *line_end = memmem(head, (size_t)(end - head), "\r\n", 2);
    while (line_end < head_end) {
        const char *line = line_end + 2;
        line_end = memmem(line, (size_t)(end - line), "\r\n", 2);
        size_t n = (size_t)(line_end - line), name = pf__scan_token(line, n);
        assert(name > 0 && memcmp(line + name, ": ", 2) == 0);
        assert(pf__scan_value(line + name + 2, n - name - 2) == n - name - 2);
        if (strncmp(line, "Content-Length: ", 16) == 0) {
            assert(r->length < 0);
            r->length = atoll(line + 16);
        }
        r->chunked |= strncmp(line, "Transfer-Encoding: chunked\r\n", 28) == 0;
        r->deflates |= strncmp(line, "Sec-WebSocket-Extensions: permessage-", 37) == 0;
        r->close |= strncmp(line, "Connection: close\r\n", 19) == 0;
    }
    assert(!r->chunked || r->length < 0);
    *p = head_end + 4;
    return true;
}

static void
check_letters(const char *p, size_t n, const asked *a)
{
    if (a == NULL || a->refused)
        return;
    for (size_t i = 0; i < n; i += LONGEST) {
        size_t left = n - i < LONGEST ? n - i : LONGEST;
        assert(memcmp(p + i, bodies[(int)a->letter], left) == 0);
    }
}

/* The next stretch of a body; false: it is incomplete. */
static bool
read_stretch(const char **p, const char *end, int64_t n, const asked *a)
{
    size_t left = (size_t)(end - *p);
    size_t have = left < (size_t)n ? left : (size_t)n;
    check_letters(*p, have, a);
    *p += have;
    return have == (size_t)n;
}

static bool
read_line_end(const char **p, const char *end)
{
    if (end - *p < 2)
        return false;
    assert(memcmp(*p, "\r\n", 2) == 0);
    *p += 2;
    return true;
}

/* To the empty line. */
static bool
read_trailers(const char **p, const char *end)
{
    for (;;) {
        const char *line = *p,
                   *line_end = memmem(line, (size_t)(end - line), "\r\n", 2);
        if (line_end == NULL)
            return false;
        *p = line_end + 2;
        if (line == line_end)
            return true;
        assert(strncmp(line, "X: y\r\n", 6) == 0
               || strncmp(line, "Empty: \r\n", 9) == 0);
    }
}

static bool
read_chunks(const char **p, const char *end, const asked *a)
{
    for (;;) {
        const char *line_end = memmem(*p, (size_t)(end - *p), "\r\n", 2);
        if (line_end == NULL)
            return false;
        char *digits_end;
        long size = strtol(*p, &digits_end, 16);
        assert(digits_end == line_end && line_end > *p && **p != '+' && **p != '-');
        *p = line_end + 2;
        if (size == 0)
            return read_trailers(p, end);
        if (!read_stretch(p, end, size, a) || !read_line_end(p, end))
            return false;
    }
}

/* One whole answer; false: it is incomplete. No asked: what the loop refused before it
 * was lent, perhaps by HEAD; then it is the last. */
static bool
read_reply(const char **p, const char *end, reply *r, const asked *a)
{
    if (!read_head(p, end, r))
        return false;
    bool head = a != NULL ? a->head : *p == end;
    if (head || r->status < 200 || r->status == 204 || r->status == 304)
        return true;
    if (r->chunked)
        return read_chunks(p, end, a);
    if (r->length >= 0)
        return read_stretch(p, end, r->length, a);
    assert(r->close); /* its end is the connection's */
    check_letters(*p, (size_t)(end - *p), a);
    *p = end;
    return true;
}

static void
check_message(z_stream *z, const frame *f, bool deflates, const asked *a)
{
    static char plain[LONGEST + 1];
    size_t len = f->len;
    const char *data = f->payload;
    if (f->first & 0x40) {
        assert(deflates);
        assert(inflate_message(z, data, len, plain, &len, sizeof plain));
        data = plain;
    }
    check_letters(data, len, a);
}

/* What comes behind a 101, to its end; false: it is incomplete. A close is the last. */
static bool
read_frames(const char **p, const char *end, bool deflates, const asked *a)
{
    int messages = 0;
    bool closed = false;
    z_stream z = {0};
    frame f;
    if (inflateInit2(&z, -15) != Z_OK)
        abort();
    while (read_frame(p, end, &f)) {
        int opcode = f.first & 15;
        assert(!closed && !f.masked && (f.first & 0xb0) == 0x80);
        assert(f.len < 126
               || f.key[-1 - (f.len > 65535 ? 8 : 2)] == (f.len > 65535 ? 127 : 126));
        assert(opcode == 1 || opcode == 2 || (f.len < 126 && !(f.first & 0x40)));
        assert(opcode < 3 || opcode == 8 || opcode == 10
               || (opcode == 9 && f.len == 0));
        if (opcode < 3) {
            messages++;
            check_message(&z, &f, deflates, a);
        }
        closed = opcode == 8;
    }
    inflateEnd(&z);
    assert(a == NULL || messages <= a->messages);
    return *p == end;
}

static void
check_heard(const peer *p)
{
    const char *at = heard[p - w.peers], *end = at + p->len;
    int replies = 0, continues = 0, expecting = 0, answered = 0;
    bool whole = true, closed = false;
    for (int i = 0; i < p->nasked; i++) {
        expecting += p->asked[i].expects;
        answered += p->asked[i].answered;
    }
    while (whole && at < end && !p->skipped) {
        reply r = {0};
        assert(!closed && replies <= p->nasked);
        const asked *a = replies < p->nasked ? &p->asked[replies] : NULL;
        whole = read_reply(&at, end, &r, a);
        if (a != NULL && a->silent)
            assert(whole ? r.status < 200 : p->fd < 0 || w.time_passed);
        if (whole && r.status == 101) {
            whole = read_frames(&at, end, r.deflates, a);
            replies++;
            break;
        }
        continues += whole && r.status == 100;
        replies += whole && r.status >= 200;
        closed = r.close;
    }
    assert(continues <= expecting);
    assert(p->skipped || p->cut || w.time_passed || (whole && replies >= answered));
}

/* ---- one input ----------------------------------------------------------------------*/
static void
reset_world(const uint8_t *data, size_t size)
{
    memset(&w, 0, sizeof w);
    size_t n = data[0] < size ? data[0] : size - 1;
    w.script = data + 1;
    w.script_end = data + 1 + n;
    w.payload = (const char *)w.script_end;
    w.payload_end = (const char *)data + size;
    for (int i = 0; i < PEERS; i++)
        w.peers[i].fd = -1;
}

static bool
make_progress(void)
{
    bool progress = false;
    turn(8);
    for (int i = 0; i < PEERS; i++)
        if (w.loans[i].request != NULL) {
            finish(&w.loans[i]);
            progress = true;
        }
    turn(8);
    for (int i = 0; i < PEERS; i++)
        while (hear_some(&w.peers[i], SIZE_MAX))
            progress = true;
    return progress || pf_loop_ready(loop);
}

static void
send_the_rest(void)
{
    static const uint8_t everything[] = {0xff};
    for (int i = 0; i < PEERS; i++) {
        w.script = everything;
        w.script_end = everything + 1;
        send_some(&w.peers[i]);
    }
}

static bool
is_over(void)
{
    return stats().connections == 0 && !pf_loop_ready(loop);
}

/* Nothing but time may be needed for everything to be over. */
static void
let_all_end(void)
{
    send_the_rest();
    while (make_progress())
        continue;
    for (int i = 0; i < PEERS; i++)
        if (w.peers[i].fd >= 0)
            shutdown(w.peers[i].fd, SHUT_WR);
    while (make_progress())
        continue;
    w.time_passed |= stats().connections > 0;
    for (int i = 0; i < 20 && !is_over(); i++) {
        now_ms += 10000;
        make_progress();
    }
    assert(is_over());
}

static void
check_nothing_is_left(void)
{
    assert(stats().connections == 0 && stats().lent == 0);
    assert(stats().buffers_in_use == 0);
    assert(w.nloans == 0 && loop->borrowed == 0 && loop->conns == NULL);
    assert(pf__timer_next(&loop->wheel) == INT64_MAX);
    for (int i = 0; i < w.borrowed; i++)
        assert(w.released[i] == 1);
}

/* Files that were spilled are among the first. */
static int
count_fds(void)
{
    struct pollfd fds[64];
    int n = 0;
    for (int fd = 0; fd < 64; fd++)
        fds[fd] = (struct pollfd){.fd = fd};
    if (poll(fds, 64, 0) < 0)
        abort();
    for (int fd = 0; fd < 64; fd++)
        n += !(fds[fd].revents & POLLNVAL);
    return n;
}

static void
clean_up(void)
{
    pf_notice notices[64];
    for (int i = 0; i < PEERS; i++)
        if (w.peers[i].fd >= 0)
            close(w.peers[i].fd);
    while (pf_loop_notices(loop, notices, 64) > 0)
        continue;
    loop->draining = loop->drained = false;
    free_spares();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2 || size > SENT_MAX)
        return 0;
    if (loop == NULL)
        open_loop();
    int fds = count_fds();
    reset_world(data, size);
    pick_options();
    pf_loop_touch(loop);
    connect_peer(0);
    while (w.script < w.script_end)
        step(next());
    let_all_end();
    for (int i = 0; i < PEERS; i++)
        check_heard(&w.peers[i]);
    check_nothing_is_left();
    clean_up();
    assert(count_fds() == fds);
    return 0;
}
