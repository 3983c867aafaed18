/* internal.h - every name that the rooms of csrc share, in sections headed by file.
 *
 * Names that begin with pf__ travel no further than this directory; a room's statics
 * carry no prefix. The order of the sections is the order of the layers: a room may
 * call what stands above it, never what stands below.
 */
#ifndef PREFORK_INTERNAL_H
#define PREFORK_INTERNAL_H

#include "prefork.h"

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/types.h>
#include <time.h>

#define PF__LIKELY(x) __builtin_expect(!!(x), 1)
#define PF__UNLIKELY(x) __builtin_expect(!!(x), 0)

/* ---- buffer.c: growable bytes, taken from free lists by size class ------------------*/
enum {
    PF__BUFFER_SHIFT = 10,  /* the smallest class is 1 KiB */
    PF__BUFFER_CLASSES = 9, /* the largest class is 256 KiB; above it malloc serves */
    PF__BUFFER_SPARES = 1 << 20, /* bytes kept in each class's free list at most */
};

typedef struct pf__buffer {
    char *data;
    size_t len, cap;
} pf__buffer;

typedef struct pf__pool {
    void *free[PF__BUFFER_CLASSES];
    uint32_t spares[PF__BUFFER_CLASSES];
    uint32_t in_use; /* buffers held by somebody */
} pf__pool;

int pf__buffer_grow(pf__pool *pool, pf__buffer *b, size_t cap); /* -ENOMEM */
void pf__buffer_shrink(pf__pool *pool, pf__buffer *b, size_t cap);
void pf__buffer_release(pf__pool *pool, pf__buffer *b);
void pf__buffer_empty_pool(pf__pool *pool);

/* Make sure that `more` bytes can be appended. */
static inline int
pf__buffer_reserve(pf__pool *pool, pf__buffer *b, size_t more)
{
    if (PF__LIKELY(b->cap - b->len >= more))
        return 0;
    return pf__buffer_grow(pool, b, b->len + more);
}

/* Append without asking: the room was reserved before. */
static inline void
pf__buffer_put(pf__buffer *b, const void *data, size_t len)
{
    assert(b->cap - b->len >= len);
    memcpy(b->data + b->len, data, len);
    b->len += len;
}

/* ---- spill.c: a request's body in a temporary file -----------------------------------*/
int pf__spill_open(const char *dir); /* the fd of an unnamed file, or -errno */
int pf__spill_write(int fd, const char *data, size_t len, uint64_t offset); /* all */
void pf__spill_close(int *fd); /* if there is one; then it is -1 */

/* ---- cpu.c: which variants of what comes in several this CPU can run -----------------*/
typedef enum pf__cpu { /* best first */
                       PF__CPU_AVX2,
                       PF__CPU_SSE2,
                       PF__CPU_PORTABLE,
                       PF__CPU_VARIANTS,
} pf__cpu;

pf__cpu pf__cpu_best(void);
int pf__cpu_find(const char *name); /* a variant; -ENOTSUP if this CPU has it not */
const char *pf__cpu_name(pf__cpu variant);

/* ---- scan.c: how long a run of one character class is, by SIMD or by table ----------*/
enum {
    PF__CHAR_TOKEN = 1 << 0,  /* tchar, RFC 9110 5.6.2 */
    PF__CHAR_VALUE = 1 << 1,  /* HTAB, SP, VCHAR, obs-text: RFC 9110 5.5 */
    PF__CHAR_TARGET = 1 << 2, /* VCHAR without "#" */
    PF__CHAR_HOST = 1 << 3,   /* reg-name of RFC 3986 3.2.2, without "," */
    PF__CHAR_HEX = 1 << 4,
    PF__CHAR_DIGIT = 1 << 5,
};

extern const uint8_t pf__scan_class[256];
extern size_t (*pf__scan_value)(const char *p, size_t n);
extern size_t (*pf__scan_target)(const char *p, size_t n);
extern size_t (*pf__scan_token)(const char *p, size_t n);

pf__cpu pf__scan_variant(void);
void pf__scan_select(pf__cpu variant); /* one that was found */

static inline bool
pf__scan_is(char c, int class)
{
    return (pf__scan_class[(uint8_t)c] & class) != 0;
}

/* ---- repeat.c: header blocks that come again -----------------------------------------*/
enum {
    PF__REPEAT_BYTES = 1024, /* of a block that is kept */
    PF__REPEAT_FIELDS = 24,
    PF__REPEATS = 64, /* places in a loop */
};

typedef struct pf__repeat {
    uint64_t content_length;
    uint16_t size; /* of the block with its last CR LF; 0: none is kept */
    uint16_t nfields;
    uint8_t host, minor, flags;         /* as in pf_head */
    pf_field fields[PF__REPEAT_FIELDS]; /* counting from the block's start */
    char bytes[PF__REPEAT_BYTES];
} pf__repeat;

/* Does the known block begin at data[at]? Its fields in the head, and its size; or 0. */
uint32_t pf__repeat_find(const pf__repeat *known, pf_head *head, const char *data,
                         size_t at, size_t len);
/* The block of a head that is complete begins at data[at]: keep it, if it is small. */
void pf__repeat_keep(pf__repeat *known, const pf_head *head, const char *data,
                     size_t at);

/* ---- sha1.c: SHA-1 -----------------------------------------------------------------*/
enum { PF__SHA1_SIZE = 20 };

void pf__sha1_digest(uint8_t digest[PF__SHA1_SIZE], const void *data, size_t len);

/* ---- payload.c: what is done to every byte of a message -----------------------------*/
typedef struct pf__utf8 {
    uint8_t left;      /* bytes that the character under way still needs */
    uint8_t low, high; /* what the next of them may be */
} pf__utf8;

/* to may lie before from, or be it. */
extern void (*pf__payload_mask)(char *to, const char *from, size_t n,
                                const uint8_t key[4]);
/* false: no text goes on like this. Between two calls a character may be cut. */
extern bool (*pf__payload_utf8)(pf__utf8 *state, const char *p, size_t n);

void pf__payload_select(pf__cpu variant); /* one that was found */

/* ---- http.c: request head and chunked body -> slices --------------------------------*/
enum {
    PF__METHOD_MAX = 32,
    PF__LEADING_CRLF_MAX = 2,
    PF__CHUNK_DIGITS_MAX = 16,
    PF__CHUNK_EXT_MAX = 256,        /* bytes of one chunk's extensions */
    PF__CHUNK_EXT_TOTAL_MAX = 4096, /* of one body's */
    PF__NAME_MAX = 32,              /* longer than any field name we know */
};

/* What a parser needs between two deliveries. It resumes at the start of the line that
 * was incomplete, so that bytes sent one by one cost no more than their lines' length.
 */
typedef struct pf__head_state {
    uint32_t at;    /* start of the line to parse next */
    uint32_t start; /* of the request line, behind ignored CR LF */
    uint8_t phase;
    uint8_t major;
    uint16_t seen; /* fields that must not come twice, and what they said */
} pf__head_state;

typedef struct pf__chunked {
    uint64_t left;  /* of the current chunk */
    uint64_t total; /* decoded so far */
    uint32_t ext, ext_total;
    uint32_t trailer_size, trailer_fields, line_size;
    int error; /* PF_ERR_*: it was refused, and stays so */
    uint8_t state, digits;
    uint8_t name_len;
    char name[PF__NAME_MAX];
} pf__chunked;

/* > 0: the head's size; 0: more bytes are needed; < 0: PF_ERR_*. Reads no byte at or
 * behind data + len. Spans count from data. `known` is the block that this client sent
 * last, under the same limits, and then this one; NULL: every head is parsed. */
int pf__http_parse_head(pf_head *head, pf__head_state *state, const char *data,
                        size_t len, const pf_options *limits, pf__repeat *known);

/* Decodes data[*raw .. len) in place, payload going to data[*end ..]; *end <= *raw.
 * 1: the body and its trailers are complete; 0: more bytes are needed; < 0: PF_ERR_*. */
int pf__http_decode_chunked(pf__chunked *chunked, char *data, size_t *raw, size_t len,
                            size_t *end, uint64_t max_body, const pf_options *limits);

int pf__http_field_id(const char *name, size_t len); /* PF_FIELD_*, any case */
bool pf__http_list_has(const char *value, size_t len, const char *token);
int64_t pf__http_parse_length(const char *value, size_t len); /* < 0: malformed */

bool pf__http_is_forbidden_trailer(const char *name, size_t len);
void pf__http_drop_forwarded(pf_head *head); /* Forwarded, X-Forwarded-*: they go */

/* ---- trust.c: whose word counts -----------------------------------------------------*/
bool pf__trust_is_valid(const pf_network *list, uint32_t n);
bool pf__trust_has(const pf_network *list, uint32_t n, const pf_peer *peer);

/* ---- proxy.c: the header of a proxied connection -> its two ends --------------------*/
enum {
    PF__PROXY_V1_MAX = 107,  /* the longest line there is, CR LF included */
    PF__PROXY_V2_MAX = 4096, /* behind the fixed part. Addresses take 216 bytes at most,
                                the rest is what a proxy knows of TLS, a client's
                                certificate being the largest; no byte of it is kept */
};

/* > 0: the header's size; 0: more bytes are needed; < 0: PF_ERR_PROXY. A header that
 * names no addresses (LOCAL, UNKNOWN, AF_UNSPEC) leaves both with family 0: the ends of
 * the connection itself are meant. */
int pf__proxy_parse(const char *data, size_t len, unsigned versions, pf_peer *client,
                    pf_peer *server);

/* ---- tls.c: what all TLS connections share ------------------------------------------*/
pf_tls *pf__tls_own(pf_tls *tls); /* one more owner of it; NULL stays NULL */
struct ssl_st *pf__tls_greet(const pf_tls *tls);
bool pf__tls_in_kernel(const pf_tls *tls);
void pf__tls_certificate(const struct ssl_st *ssl, const void **der, size_t *len);

/* ---- session.c: the TLS of one connection -------------------------------------------*/
typedef struct pf__session pf__session;

/* early: bytes of the peer's that were read before; copies. NULL: no memory */
pf__session *pf__session_new(pf_tls *tls, int fd, const char *early, size_t len);
void pf__session_free(pf__session *s);
void pf__session_refuse(pf__session *s, int code); /* once the handshake is done */
int pf__session_refusal(const pf__session *s);
/* 1: it is done; 0: later; PF_ERR_TLS_PLAIN, PF_ERR_TLS_HANDSHAKE or -errno */
int pf__session_handshake(pf__session *s);
/* Bytes; 0: the end; -EAGAIN; -errno or PF_ERR_TLS_RECORD */
ssize_t pf__session_read(pf__session *s, char *data, size_t room);
/* more: bytes follow at once. What was begun has to be tried again. */
ssize_t pf__session_write(pf__session *s, const char *data, size_t len, bool more);
bool pf__session_sends_files(const pf__session *s); /* the kernel encrypts */
ssize_t pf__session_send_file(pf__session *s, int fd, int64_t offset, size_t len);
/* Nothing is missing, if nobody was curt. false: there is no room yet to say so. */
bool pf__session_shut(pf__session *s);
void pf__session_curt(pf__session *s); /* it ends without a good-bye */
/* The kernel may have more; last: and then the end. */
void pf__session_wet(pf__session *s, bool last);
/* Nothing can be read now: neither there nor here is more, or it wants room. */
bool pf__session_is_dry(const pf__session *s);
bool pf__session_wants_room(const pf__session *s); /* to send, before it reads on */
/* The peer has said something. */
bool pf__session_begun(const pf__session *s);
/* What the library says of the error that ended it, lent for ever; NULL: nothing. */
const char *pf__session_reason(const pf__session *s);
void pf__session_describe(pf__session *s, pf_tls_info *info);

/* ---- deflate.c: permessage-deflate (RFC 7692) ---------------------------------------*/
enum { PF__DEFLATE_ANSWER_MAX = 160 };

typedef struct pf__deflate {
    bool on;
    bool in_forgets, out_forgets; /* no context is taken over from message to message */
    bool in_bits_told;            /* the peer takes a word on its own window */
    uint8_t in_bits, out_bits;
    struct z_stream_s *in, *out; /* owns; NULL until needed */
} pf__deflate;

/* Accept the first offer of a Sec-WebSocket-Extensions field that can be. */
bool pf__deflate_accept(pf__deflate *d, const char *value, size_t len);
size_t pf__deflate_answer(const pf__deflate *d, char text[PF__DEFLATE_ANSWER_MAX]);
/* Append to `to`, max bytes at most (PF_ERR_WEBSOCKET_SIZE), what comes out of a part
 * of a message. */
int pf__deflate_inflate(pf__deflate *d, pf__pool *pool, const char *data, size_t len,
                        bool last, pf__buffer *to, size_t max);
/* Append a message, which is not empty. */
int pf__deflate_deflate(pf__deflate *d, pf__pool *pool, const char *data, size_t len,
                        pf__buffer *to);
void pf__deflate_close(pf__deflate *d);

/* ---- websocket.c: RFC 6455, bytes in, structs out -----------------------------------*/
enum {
    PF__WEBSOCKET_KEY_SIZE = 24,
    PF__WEBSOCKET_ACCEPT_SIZE = 28,
    PF__WEBSOCKET_REASON_MAX = PF_CHANNEL_REASON,
    PF__WEBSOCKET_QUEUE = 16, /* messages parsed ahead of who receives them */
};

typedef struct pf__queued {
    uint32_t at, len;
    uint8_t kind;
    bool plain; /* it was inflated, and lies in plain, not in the input */
} pf__queued;

typedef struct pf__websocket {
    pf__deflate deflate;
    pf__buffer plain; /* inflated messages */
    uint32_t max_size;
    bool in_message, in_frame; /* something of one was parsed, not all */
    bool deflated, fin;        /* the message, the frame under way */
    bool close_sent;           /* what comes now is dropped, but for the peer's close */
    uint8_t kind;
    uint8_t key[4];
    pf__utf8 utf8;
    uint64_t left;     /* of the frame's payload */
    size_t start, end; /* of the message's payload so far, in the input */
    size_t plain_at;   /* or where it begins in plain */
    pf__queued queue[PF__WEBSOCKET_QUEUE];
    uint8_t first, count;
    uint8_t reason_len;
    uint16_t code; /* how it was closed; 0: it is open */
    int failed;    /* PF_ERR_WEBSOCKET_*: closed when all that came before is taken */
    char reason[PF__WEBSOCKET_REASON_MAX];
    int64_t heard, pinged; /* ms; when the peer said something, and we asked it to */
} pf__websocket;

enum pf__websocket_outcome {
    PF__WEBSOCKET_HUNGRY, /* more bytes are needed */
    PF__WEBSOCKET_FULL,   /* messages have to be taken first */
    PF__WEBSOCKET_CLOSED, /* the peer has closed, and has its answer */
};

int pf__websocket_offered(const pf_head *head, const char *bytes); /* pf_channel_... */
void pf__websocket_accept_key(const pf_head *head, const char *bytes,
                              char accept[PF__WEBSOCKET_ACCEPT_SIZE]);
bool pf__websocket_accept_deflate(pf__deflate *deflate, const pf_head *head,
                                  const char *bytes);
pf__websocket *pf__websocket_new(uint32_t max_size, const pf__deflate *deflate);
void pf__websocket_free(pf__websocket *ws, pf__pool *pool);

/* Parses in->data[*raw .. len) in place; PF__WEBSOCKET_*, or PF_ERR_WEBSOCKET_*. */
int pf__websocket_parse(pf__websocket *ws, pf__pool *pool, pf__buffer *in, size_t *raw,
                        pf__buffer *out);
bool pf__websocket_take(pf__websocket *ws, const pf__buffer *in, pf_message *message);
size_t pf__websocket_waiting(const pf__websocket *ws); /* bytes of messages */
void pf__websocket_compact(pf__websocket *ws, pf__buffer *in, size_t *raw);

bool pf__websocket_deflates(const pf__websocket *ws, size_t len);
int pf__websocket_send(pf__websocket *ws, pf__pool *pool, pf__buffer *out, int kind,
                       const char *data, size_t len);
int pf__websocket_send_header(pf__pool *pool, pf__buffer *out, int kind, size_t len);
int pf__websocket_ping(pf__pool *pool, pf__buffer *out);
int pf__websocket_close(pf__websocket *ws, pf__pool *pool, pf__buffer *out,
                        unsigned code, const char *reason, size_t len);
void pf__websocket_fail(pf__websocket *ws, pf__pool *pool, pf__buffer *out, int error);
/* This is how it was closed, unless that is decided already. */
void pf__websocket_end(pf__websocket *ws, unsigned code, const char *reason,
                       size_t len);

/* ---- response.c: status line, Date, framing, header checks -> buffer ----------------*/
enum pf__answer_flag {
    PF__ANSWER_DATE = 1 << 0, /* the app gave this field itself */
    PF__ANSWER_SERVER = 1 << 1,
    PF__ANSWER_TYPE = 1 << 2,
    PF__ANSWER_LENGTH = 1 << 3,
    PF__ANSWER_CLOSE = 1 << 4, /* Connection: close is, or will be, announced */
    PF__ANSWER_CHUNKED = 1 << 5,
    PF__ANSWER_NO_BODY = 1 << 6, /* HEAD, 1xx, 204, 304: bytes are dropped */
    PF__ANSWER_BEGUN = 1 << 7,
    PF__ANSWER_SEALED = 1 << 8,    /* its head is complete and may be sent */
    PF__ANSWER_KEEP = 1 << 9,      /* an HTTP/1.0 peer needs Connection: keep-alive */
    PF__ANSWER_TRAILERS = 1 << 10, /* fields may follow its body, and are sent */
    PF__ANSWER_TRAILED = 1 << 11,  /* its body is over: fields, or nothing, follow */
};

typedef struct pf__answer {
    int64_t length; /* -1: unknown */
    uint64_t written;
    size_t mark; /* where its head begins in the output */
    uint16_t flags;
    uint16_t status;
    uint8_t minor; /* the version the peer speaks */
    bool head;     /* it asked with HEAD */
} pf__answer;

/* "Server: ...\r\nDate: ...\r\n", rendered once a second. */
typedef struct pf__stamp {
    time_t second;
    uint16_t server_len, len;
    char text[256];
    char type[128]; /* the default "Content-Type: ...\r\n" */
    uint16_t type_len;
    bool no_date;
} pf__stamp;

void pf__response_stamp_init(pf__stamp *stamp, const pf_options *options);
void pf__response_stamp_update(pf__stamp *stamp, time_t second);
const char *pf__response_reason(int status);
/* HEAD, 1xx, 204, 304: all of it is its head. */
bool pf__response_is_bodiless(const pf__answer *a);
/* reason: NULL for the usual one. */
int pf__response_begin(pf__pool *pool, pf__buffer *out, pf__answer *a, int status,
                       const char *reason, size_t reason_len, int64_t length);
int pf__response_field(pf__pool *pool, pf__buffer *out, pf__answer *a, const char *name,
                       size_t name_len, const char *value, size_t value_len);
int pf__response_line(pf__pool *pool, pf__buffer *out, pf__answer *a,
                      const pf_line *line);
/* 101 Switching Protocols to a WebSocket. extensions, subprotocol: NULL for none. */
int pf__response_switch(pf__pool *pool, pf__buffer *out, pf__answer *a,
                        const char *accept, size_t accept_len, const char *subprotocol,
                        size_t subprotocol_len, const char *extensions,
                        size_t extensions_len);
/* Have fields follow the body, if there is a place for them; whether there is. */
bool pf__response_announce_trailers(pf__answer *a);
int pf__response_check_trailer(const char *name, size_t name_len, const char *value,
                               size_t value_len);
int pf__response_trailer(pf__pool *pool, pf__buffer *out, pf__answer *a,
                         const char *name, size_t name_len, const char *value,
                         size_t value_len);
int pf__response_end_chunks(pf__pool *pool, pf__buffer *out, const pf__answer *a);
int pf__response_seal(pf__pool *pool, pf__buffer *out, pf__answer *a,
                      const pf__stamp *stamp);
int pf__response_whole(pf__pool *pool, pf__buffer *out, pf__answer *a, int status,
                       const pf__stamp *stamp, const char *type, size_t type_len,
                       const char *body, size_t len, bool copy);
int pf__response_refusal(pf__pool *pool, pf__buffer *out, int code, bool head,
                         const pf__stamp *stamp);
int pf__response_check_fields(const char *fields, size_t len);

/* ---- timer.c: a hashed wheel of deadlines -------------------------------------------
 * A deadline that moves later costs nothing: its owner stays where it is in the wheel
 * and is put further on when its slot comes up. So a connection that answers a
 * thousand requests a second touches the wheel twice a minute.
 */
enum {
    PF__TIMER_TICK_SHIFT = 6, /* 64 ms: never early, at most that late */
    PF__TIMER_SLOTS = 512,    /* 32 s around; longer deadlines go around again */
};

typedef struct pf__timer {
    struct pf__timer *next, **link; /* link is NULL when not in the wheel */
    int64_t deadline;               /* ms; 0: none */
    int64_t tick;                   /* of the slot it is in */
} pf__timer;

typedef struct pf__wheel {
    pf__timer *slots[PF__TIMER_SLOTS];
    uint64_t used[PF__TIMER_SLOTS / 64];
    int64_t tick; /* everything before it was looked at */
} pf__wheel;

void pf__timer_open(pf__wheel *wheel, int64_t now);
void pf__timer_place(pf__wheel *wheel, pf__timer *timer); /* slow part of set */
void pf__timer_cancel(pf__wheel *wheel, pf__timer *timer);
pf__timer *pf__timer_expired(pf__wheel *wheel, int64_t now); /* one, out of the wheel */
int64_t pf__timer_next(const pf__wheel *wheel);              /* ms; INT64_MAX: none */

static inline void
pf__timer_set(pf__wheel *wheel, pf__timer *timer, int64_t deadline)
{
    timer->deadline = deadline;
    if (deadline != 0
        && (timer->link == NULL
            || deadline <= (timer->tick - 1) << PF__TIMER_TICK_SHIFT))
        pf__timer_place(wheel, timer);
}

/* ---- peers.c: how many connections each address holds -------------------------------*/
typedef struct pf__peer_count {
    pf_peer peer; /* its port is not looked at */
    uint32_t count;
} pf__peer_count;

typedef struct pf__peers {
    pf__peer_count *table;
    uint32_t size, used; /* size is a power of two; used counts non-empty cells */
    uint64_t seed;
} pf__peers;

int pf__peers_add(pf__peers *peers, const pf_peer *peer,
                  uint32_t max); /* 1: too many */
void pf__peers_remove(pf__peers *peers, const pf_peer *peer);
void pf__peers_close(pf__peers *peers);

/* ---- mailbox.c: descriptors handed from worker to worker -----------------------------
 * A datagram socket of each worker, under an abstract name that stands in its row. Who
 * may write to it is checked by the credentials that the kernel attaches.
 */
enum pf__mail_kind {
    PF__MAIL_CONNECTION = 1, /* serve it: you have less to do */
    PF__MAIL_ADOPT,          /* accept from this listener until it is released */
    PF__MAIL_RELEASE,
};

/* Who a connection is from, as far as is known. */
typedef struct pf__origin {
    pf_peer peer;    /* its client */
    pf_peer local;   /* where that connected to; family 0: ask the socket */
    bool introduced; /* its PROXY header was read: no other is expected */
    uint32_t served; /* requests that were answered on it elsewhere */
} pf__origin;

typedef struct pf__mail {
    uint32_t kind;
    uint32_t slot;     /* ADOPT, RELEASE */
    pf__origin origin; /* CONNECTION */
} pf__mail;

int pf__mailbox_open(pf_row *row); /* the fd to read; its name goes into row */
int pf__mailbox_send(int from, const pf_row *to, const pf__mail *mail, int fd);
int pf__mailbox_receive(int fd, pf__mail *mail, int *passed); /* 1: got one, 0: empty */

/* ---- poller_epoll.c: readiness ------------------------------------------------------*/
enum pf__source_kind {
    PF__SOURCE_CONN = 1,
    PF__SOURCE_LISTENER,
    PF__SOURCE_WAKE,
    PF__SOURCE_TIMER,
    PF__SOURCE_WATCH,
    PF__SOURCE_MAILBOX,
};

/* Whatever is polled begins with this. */
typedef struct pf__source {
    uint8_t kind;
    bool registered;
    int fd;
} pf__source;

typedef struct epoll_event pf__readiness;

enum pf__poll_flag {
    PF__POLL_IN = EPOLLIN,
    PF__POLL_OUT = EPOLLOUT,
    PF__POLL_EOF = EPOLLRDHUP,
    PF__POLL_GONE = EPOLLHUP | EPOLLERR,
};

typedef struct pf__poller {
    int fd;
    pf__source timer; /* a timerfd, made when the loop is embedded in another */
    int64_t armed;
} pf__poller;

int pf__poller_open(pf__poller *poller);
void pf__poller_close(pf__poller *poller);
int pf__poller_add_conn(pf__poller *poller, pf__source *source); /* edge-triggered */
int pf__poller_add_listener(pf__poller *poller, pf__source *source); /* exclusive */
int pf__poller_add(pf__poller *poller, pf__source *source); /* level-triggered, input */
int pf__poller_remove(pf__poller *poller, pf__source *source);
int pf__poller_wait(pf__poller *poller, pf__readiness *out, int max, int timeout_ms);
int pf__poller_embed(pf__poller *poller); /* from now on arm() is meant */
int pf__poller_arm(pf__poller *poller, int64_t now, int64_t deadline);

/* ---- One connection: what the rooms that follow share --------------------------------
 * notices.c, input.c and output.c each have a part of it, conn.c has the whole.
 */
typedef struct pf_conn pf_conn;

enum pf__phase {
    PF__PHASE_FIRST,     /* accepted, no byte yet */
    PF__PHASE_PROXY,     /* accepted from a proxy that is to say first whom it brings */
    PF__PHASE_HANDSHAKE, /* of TLS */
    PF__PHASE_IDLE,      /* kept alive between two requests; holds no buffer */
    PF__PHASE_HEAD,      /* some bytes of a request's head are there */
    PF__PHASE_BODY,      /* its head is parsed, its body gathered before it is lent */
    PF__PHASE_LENT,      /* on loan, or waiting in the ready queue to be */
    PF__PHASE_DRAIN,     /* answered; the rest of its body is read and dropped */
    PF__PHASE_WEBSOCKET, /* its 101 is sealed; on loan, or closing by itself */
    PF__PHASE_CLOSING,   /* close, or linger, when the output is sent */
    PF__PHASE_LINGER,    /* our side is shut; what the peer sends is dropped */
    PF__PHASE_DEAD,      /* its fd is closed; kept while a loan or a queue names it */
};

enum {
    PF__DRAIN_MAX = 65536,     /* of an unread body, to keep the connection */
    PF__HIGH_WATER = 65536,    /* pending output above which nothing more is pulled */
    PF__LOW_WATER = 16384,     /* below it there is room again */
    PF__BODY_WINDOW = 65536,   /* of a streamed body, unread by the app */
    PF__BORROW_MIN = 16384,    /* copying less is cheaper than borrowing */
    PF__FIRST_BYTE_MS = 10000, /* a new connection says something within this */
    PF__LINGER_MAX = 1 << 20,  /* bytes dropped in a lingering close */
    PF__LAST_WORD_MS = 100,    /* to answer what came before a malformed frame */
};

enum pf__segment_kind {
    PF__SEGMENT_COPIED,   /* the next len bytes of conn->out */
    PF__SEGMENT_BORROWED, /* ref's bytes, at data */
    PF__SEGMENT_FILE,     /* of ref's file, from offset on */
};

/* Output beside the copied bytes, and between which of them it goes. */
typedef struct pf__segment {
    uint8_t kind;
    int fd;
    union {
        const char *data;
        int64_t offset;
    };
    size_t len;
    void *ref;
} pf__segment;

typedef struct pf__segments {
    uint32_t first, count, cap;
    size_t copied;   /* bytes of conn->out that segments stand for */
    size_t borrowed; /* bytes not yet sent */
    pf__segment list[];
} pf__segments;

struct pf_conn {
    pf__source source; /* first: what the poller hands back */
    uint8_t phase;     /* enum pf__phase; one writer: conn.c */
    bool readable : 1; /* the kernel may hold bytes for us */
    bool fin : 1;      /* the peer finished sending, says the poller */
    bool eof : 1;      /* and we have read up to there */
    bool linger : 1;   /* close it only when the peer has read the answer */
    bool in_dirty : 1, in_ready : 1;
    bool lent : 1;        /* REQUEST was handed out, end or abort did not come yet */
    bool counted : 1;     /* in the per-address census */
    bool turned_away : 1; /* refused at accept */
    bool hung_up : 1;     /* a loan's holder is to be told CLOSED */
    bool introduced : 1;  /* its PROXY header was read */
    uint32_t pending;     /* PF_EVENT_* not handed out yet */
    pf__timer timer;
    int64_t read_deadline, write_deadline;
    pf_loop *loop;
    pf_conn *next, **link; /* all connections of the loop */
    pf_conn *next_dirty, *next_ready;
    pf_request *request;
    pf__websocket *websocket; /* owns; NULL: it speaks HTTP */
    pf__session *session;     /* owns; NULL: it speaks in clear */
    pf__buffer in;
    size_t base; /* in.data + base is where the current request begins */
    size_t raw;  /* first byte not parsed yet */
    pf__buffer out;
    size_t sent; /* of out */
    pf__segments *segments;
    uint64_t id;
    uint32_t served;
    uint32_t write_timeout_ms; /* of the last answer that is complete */
    pf_peer peer;
    pf_peer
        local; /* our address, or a PROXY header's; family 0: nobody has asked yet */
};

struct pf_request {
    pf_conn *conn;
    pf_loop *loop;
    pf_request *next_free;
    void *user;
    bool has_body, body_done, expect, want_room, want_end, dead;
    bool waiting;             /* its head, or the rest to be dropped, has a deadline */
    uint8_t want;             /* enum pf_want */
    int refused;              /* PF_ERR_* when lent as REFUSED */
    int body_fd;              /* owns; where its body was spilled, or -1 */
    size_t body_at, body_end; /* in conn->in: decoded, not consumed */
    uint64_t body_left;       /* of Content-Length, not received */
    uint64_t body_received;
    uint64_t body_spilled; /* decoded bytes that are in the file */
    uint64_t body_before;  /* received before it was wanted last */
    uint64_t max_body;
    uint32_t drained;
    uint32_t read_timeout_ms, write_timeout_ms;
    int64_t body_since;
    int64_t since_us; /* its head was complete */
    pf__answer answer;
    pf__chunked chunked;
    pf__head_state state;
    pf_head head;
};

/* ---- notices.c: what happened to connections ----------------------------------------*/
typedef struct pf__notices {
    pf_notice *list;
    uint32_t first, count, cap;
} pf__notices;

void pf__notices_append(pf_loop *loop, const pf_conn *conn, int kind, int code);

/* ---- output.c: what a connection has to send ----------------------------------------*/
enum pf__output_state {
    PF__OUTPUT_SENT,    /* all that may be sent was taken by the kernel */
    PF__OUTPUT_BLOCKED, /* some was; the socket is full */
    PF__OUTPUT_STUCK,   /* nothing was; it is still full */
    PF__OUTPUT_MORE,    /* others have their turn before the rest */
};

int pf__output_flush(pf_conn *conn); /* PF__OUTPUT_*, -errno or PF_ERR_APP_FILE_SHORT */
int pf__output_borrow(pf_conn *conn, const pf__segment *segment);
int pf__output_insert(pf_conn *conn, const char *data, size_t len); /* copies */
void pf__output_drop(pf_conn *conn);

static inline size_t
pf__output_unsent(const pf_conn *conn)
{
    return conn->out.len - conn->sent + (conn->segments ? conn->segments->borrowed : 0);
}

/* ---- input.c: what a connection has received ----------------------------------------*/
ssize_t pf__input_fill(pf_conn *conn);
/* one read. > 0: bytes came; 0: the peer finished; < 0: -errno */
int pf__input_absorb(pf_conn *conn); /* what has arrived becomes body; PF_ERR_* */
int pf__input_gather(pf_conn *conn); /* the same; a large body goes to a file */
void pf__input_consume(pf_conn *conn, size_t n);

/* ---- conn.c: the state machine of one connection ------------------------------------*/
int pf__conn_open(pf_loop *loop, int fd, const pf__origin *origin, int refusal);
/* owns fd; refusal: 0, or the PF_ERR_* to answer at once. -ENOMEM */
bool pf__conn_introduces(const pf_loop *loop, const pf__origin *origin);
/* it begins with a PROXY header; until that is read, nobody's connections are counted */
void pf__conn_event(pf_conn *conn, uint32_t poll_flags);
void pf__conn_timeout(pf_conn *conn);
void pf__conn_settle(pf_conn *conn, bool force); /* before sleeping: send, register */
void pf__conn_refuse(pf_conn *conn, int code);
void pf__conn_answered(pf_conn *conn); /* the loan ended; on to what comes next */
void pf__conn_abort(pf_conn *conn);    /* the loan ended; the answer stays truncated */
void pf__conn_kill(pf_conn *conn);     /* close now */
void pf__conn_reap(pf_conn *conn);     /* free it if nothing names it any more */
void pf__conn_drain(pf_conn *conn, bool now);
bool pf__conn_is_quiet(const pf_conn *conn); /* between two requests */
void pf__conn_leave(pf_conn *conn); /* its socket is another worker's from now on */
void pf__conn_body_wanted(pf_conn *conn);
void pf__conn_end_wanted(pf_conn *conn);
int pf__conn_switch(pf_conn *conn, const pf__deflate *deflate); /* it is a WebSocket */
void pf__conn_left(pf_conn *conn); /* nobody holds the WebSocket; it closes by itself */
int pf__conn_continue(pf_conn *conn);     /* queue 100 Continue */
bool pf__conn_keeps(const pf_conn *conn); /* may the connection outlive this answer? */

/* ---- loop.c: accept, timeouts, batches, flush, drain --------------------------------*/
typedef struct pf__listener {
    pf__source source;
    struct pf__listener *next;
    bool shared;  /* between workers, by its kind */
    bool adopted; /* of a vacant slot: fd is ours */
    uint32_t slot;
} pf__listener;

struct pf_loop {
    pf__poller poller;
    pf__wheel wheel;
    pf__pool pool;
    pf__stamp stamp;
    pf__peers peers;
    pf_options options;
    int64_t now_us;
    int64_t now;                 /* ms, monotonic, as of the last wake-up */
    pf_conn *conns;              /* all, newest first */
    pf_conn *dirty;              /* to be settled before sleeping */
    pf_conn *ready, **ready_end; /* with events to hand out */
    pf_conn *free_conns;
    pf_request *free_requests;
    void **released;                            /* refs to hand out as RELEASED */
    uint32_t nreleased, released_cap, borrowed; /* cap >= nreleased + borrowed */
    uint32_t turns;       /* waits answered from the ready queue in a row */
    uint32_t turned_away; /* refused at accept and still open */
    pf__listener *listeners;
    pf_tls *tls; /* a part of it; NULL: connections speak in clear */
    pf__source **watches;
    uint32_t nwatches;
    pf__source wake;
    int wake_write;
    int64_t accept_again; /* when accepting was paused: retry then */
    int64_t balance_at;   /* when to compare loads again */
    uint32_t fruitless;   /* such comparisons, since one was followed by something */
    int64_t mail_until;   /* in a drain, for what was promised */
    int64_t accept_until; /* in a drain, of quiesced listeners */
    int64_t read_until;   /* in a drain, what peers have begun to say; 0: for ever */
    int64_t close_until;  /* in a drain, connections that nothing is expected of */
    bool draining, drained, closed, embedded, woken, has_mail;
    uint32_t unexpired;  /* full batches since deadlines were looked at */
    bool signalled;      /* woken by Python's signal handler, which writes the number */
    atomic_bool entered; /* a thread is in here: for assertions only */
    bool shared;         /* may be borrowed while its thread sleeps; then also: */
    pthread_mutex_t door; /* held while it is borrowed, and when its thread lies down
                             or gets up */
    bool asleep, borrowed_out;
    int64_t asleep_until; /* ms; INT64_MAX: until something happens */
    pf_conn *quarantine;  /* closed by a borrower: what has woken the sleeper may name
                              them still, so they are not free before it has looked */
    uint64_t next_id;
    pf_scoreboard *board; /* of the fleet; NULL: alone */
    pf__source mailbox;
    uint32_t candidate; /* row to compare with next */
    pf_row *row;        /* where it counts: its own, or one of a scoreboard */
    pf_row own_row;
    pf__notices notices;
    char *spill_dir;                  /* owns */
    pf__repeat *repeats[PF__REPEATS]; /* own; NULL until needed */
};

static inline void
pf__notices_add(pf_loop *loop, const pf_conn *conn, int kind, int code)
{
    if (PF__UNLIKELY(loop->options.flags & PF_OPTION_NOTICES))
        pf__notices_append(loop, conn, kind, code);
}

static inline void
pf__conn_mark_dirty(pf_conn *conn)
{
    pf_loop *loop = conn->loop;
    if (conn->in_dirty)
        return;
    conn->in_dirty = true;
    conn->next_dirty = loop->dirty;
    loop->dirty = conn;
}

static inline void
pf__conn_mark_ready(pf_conn *conn, uint32_t events)
{
    pf_loop *loop = conn->loop;
    conn->pending |= events;
    if (conn->in_ready)
        return;
    conn->in_ready = true;
    conn->next_ready = NULL;
    *loop->ready_end = conn;
    loop->ready_end = &conn->next_ready;
}

#endif
