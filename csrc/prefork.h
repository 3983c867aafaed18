/* prefork.h - the C core of prefork: the whole API, to be read like a manual page.
 *
 * The core owns sockets, connections, timers and bytes; its caller owns policy. Calls
 * go down, events come up as return values: the core never calls back, never prints,
 * never exits. One pf_loop belongs to one thread at a time; the calls that any thread
 * may make at any moment are pf_loop_wake() and pf_loop_borrow(). Calls marked "sleeps" may block and
 * should be made without the caller's locks (in Python: without the GIL); no other
 * call makes a system call that waits.
 *
 * Errors: every function that returns int returns >= 0 when good; a bad result is
 * either -errno or one of PF_ERR_*, which lie far below any errno. pf_error_text()
 * words both.
 *
 * Ownership is told by four verbs: owns (the callee keeps and frees it), borrows (the
 * callee uses it until told otherwise), lends (the caller may look until told
 * otherwise), copies.
 */
#ifndef PREFORK_H
#define PREFORK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Errors (error.c) --------------------------------------------------------------
 * One table: name, code, the HTTP status a peer gets for it (0: not the peer's fault),
 * text. "PEER" errors are answered by the core itself, with Connection: close.
 */
#define PF_ERRORS(X)                                                                   \
    X(REQUEST_LINE, -20001, 400, "malformed request line")                             \
    X(METHOD, -20002, 400, "malformed method")                                         \
    X(TARGET, -20003, 400, "malformed request target")                                 \
    X(VERSION, -20004, 400, "malformed HTTP version")                                  \
    X(VERSION_UNSUPPORTED, -20005, 505, "HTTP version not supported")                  \
    X(FIELD_NAME, -20006, 400, "malformed header field name")                          \
    X(FIELD_VALUE, -20007, 400, "malformed header field value")                        \
    X(LINE_END, -20008, 400, "line not ended by CR LF")                                \
    X(FOLDED, -20009, 400, "obsolete line folding")                                    \
    X(HOST, -20010, 400, "missing, repeated or malformed Host")                        \
    X(CONTENT_LENGTH, -20011, 400, "repeated or malformed Content-Length")             \
    X(TRANSFER_ENCODING, -20012, 400, "repeated or malformed Transfer-Encoding")       \
    X(TRANSFER_CODING, -20013, 501, "transfer coding not implemented")                 \
    X(FRAMING, -20014, 400, "Content-Length beside Transfer-Encoding")                 \
    X(CONTENT_TYPE, -20015, 400, "repeated Content-Type")                              \
    X(CHUNK_SIZE, -20016, 400, "malformed chunk size")                                 \
    X(CHUNK_EXTENSION, -20017, 400, "malformed or oversized chunk extension")          \
    X(CHUNK_DATA, -20018, 400, "chunk data not ended by CR LF")                        \
    X(TRAILER, -20019, 400, "malformed or forbidden trailer field")                    \
    X(TARGET_LENGTH, -20020, 414, "request target too long")                           \
    X(HEAD_SIZE, -20021, 431, "request header fields too large")                       \
    X(BODY_SIZE, -20022, 413, "request body too large")                                \
    X(EXPECTATION, -20023, 417, "expectation failed")                                  \
    X(CONNECT, -20024, 501, "CONNECT is not served here")                              \
    X(METHOD_NOT_ALLOWED, -20025, 405, "only GET and HEAD are allowed")                \
    X(TRUNCATED, -20026, 400, "request ended before it was complete")                  \
    X(HEAD_TIMEOUT, -20027, 408, "request head took too long")                         \
    X(BODY_TIMEOUT, -20028, 408, "request body took too long")                         \
    X(CONNECTIONS, -20029, 503, "too many connections")                                \
    X(CONNECTIONS_PER_IP, -20030, 429, "too many connections from one address")        \
    X(BODY_STORE, -20031, 503, "request body could not be stored")                     \
    X(WEBSOCKET_KEY, -20032, 400, "missing or malformed Sec-WebSocket-Key")            \
    X(WEBSOCKET_VERSION, -20033, 426, "Sec-WebSocket-Version is not 13")               \
    X(TLS_PLAIN, -20034, 400, "plain HTTP was sent to an HTTPS port")                  \
    X(APP_STATUS, -20101, 0, "status is not between 100 and 999")                      \
    X(APP_FIELD_NAME, -20102, 0, "response field name is not a token")                 \
    X(APP_FIELD_VALUE, -20103, 0, "response field value holds a control character")    \
    X(APP_HOP_BY_HOP, -20104, 0, "response field is hop-by-hop; the server sets it")   \
    X(APP_LENGTH, -20105, 0, "response Content-Length is malformed or contradictory")  \
    X(APP_BODY_LONG, -20106, 0, "response body is longer than its Content-Length")     \
    X(APP_BODY_SHORT, -20107, 0, "response body is shorter than its Content-Length")   \
    X(STATE, -20108, 0, "call made out of order")                                      \
    X(CLOSED, -20109, 0, "the peer has closed the connection")                         \
    X(WRITE_TIMEOUT, -20110, 0, "the peer stopped reading the response")               \
    X(IDLE_TIMEOUT, -20111, 0, "the kept-alive connection stayed idle")                \
    X(APP_REASON, -20112, 0, "reason phrase holds a control character")                \
    X(PROXY, -20113, 0, "malformed or missing PROXY header")                           \
    X(APP_FILE_SHORT, -20114, 0, "file ends before what is to be sent of it")          \
    X(WEBSOCKET_FRAME, -20115, 0, "malformed WebSocket frame")                         \
    X(WEBSOCKET_TEXT, -20116, 0, "text is not UTF-8")                                  \
    X(WEBSOCKET_DATA, -20117, 0, "compressed message is malformed")                    \
    X(WEBSOCKET_SIZE, -20118, 0, "message too large")                                  \
    X(WEBSOCKET_PONG, -20119, 0, "keepalive ping timeout")                             \
    X(APP_CLOSE, -20120, 0, "close code may not be sent, or its reason is too long")   \
    X(APP_SUBPROTOCOL, -20121, 0, "subprotocol is not a token")                        \
    X(TLS_CERTIFICATE, -20122, 0, "certificate is missing, malformed or too weak")     \
    X(TLS_KEY, -20123, 0, "private key is missing or malformed")                       \
    X(TLS_PASSWORD, -20124, 0, "private key is encrypted, and this is not its password") \
    X(TLS_MISMATCH, -20125, 0, "private key does not belong to the certificate")       \
    X(TLS_CIPHERS, -20126, 0, "no such cipher")                                        \
    X(TLS_AUTHORITY, -20127, 0, "certificate of an authority is missing or malformed") \
    X(TLS_STAPLE, -20128, 0, "OCSP response is malformed")                             \
    X(TLS_VERSION, -20129, 0, "no such version of TLS")                                \
    X(TLS_HANDSHAKE, -20130, 0, "TLS handshake failed")                                \
    X(TLS_TIMEOUT, -20131, 0, "TLS handshake took too long")                           \
    X(TLS_RECORD, -20132, 0, "malformed TLS record")                                   \
    X(APP_TRAILER, -20133, 0, "response field may not be sent as a trailer")

enum pf_err {
#define X(name, code, status, text) PF_ERR_##name = code,
    PF_ERRORS(X)
#undef X
};

const char *pf_error_text(int code);  /* lends for ever; also words -errno */
const char *pf_error_name(int code);  /* "CHUNK_SIZE"; lends for ever; "" if unknown */
int pf_error_status(int code);        /* 400..599 for peer errors, else 0 */

/* ---- Request heads (http.c) --------------------------------------------------------
 * A parsed head is offsets into the bytes it was parsed from, so that the buffer may
 * grow and move. pf_request_bytes() gives the base they count from.
 */
typedef struct pf_span {
    uint32_t at, len;
} pf_span;

/* Fields the core knows by number, so that nobody compares their names again. */
#define PF_FIELDS(X)                                                                   \
    X(OTHER, "")                                                                       \
    X(HOST, "host")                                                                    \
    X(CONTENT_LENGTH, "content-length")                                                \
    X(CONTENT_TYPE, "content-type")                                                    \
    X(TRANSFER_ENCODING, "transfer-encoding")                                          \
    X(CONNECTION, "connection")                                                        \
    X(EXPECT, "expect")                                                                \
    X(UPGRADE, "upgrade")                                                              \
    X(TE, "te")                                                                        \
    X(TRAILER, "trailer")                                                              \
    X(KEEP_ALIVE, "keep-alive")                                                        \
    X(PROXY_CONNECTION, "proxy-connection")                                            \
    X(PROXY_AUTHORIZATION, "proxy-authorization")                                      \
    X(PROXY_AUTHENTICATE, "proxy-authenticate")                                        \
    X(DATE, "date")                                                                    \
    X(SERVER, "server")                                                                \
    X(ACCEPT, "accept")                                                                \
    X(ACCEPT_ENCODING, "accept-encoding")                                              \
    X(ACCEPT_LANGUAGE, "accept-language")                                              \
    X(AUTHORIZATION, "authorization")                                                  \
    X(CACHE_CONTROL, "cache-control")                                                  \
    X(CONTENT_ENCODING, "content-encoding")                                            \
    X(COOKIE, "cookie")                                                                \
    X(FORWARDED, "forwarded")                                                          \
    X(IF_MODIFIED_SINCE, "if-modified-since")                                          \
    X(IF_NONE_MATCH, "if-none-match")                                                  \
    X(ORIGIN, "origin")                                                                \
    X(RANGE, "range")                                                                  \
    X(REFERER, "referer")                                                              \
    X(USER_AGENT, "user-agent")                                                        \
    X(X_FORWARDED_FOR, "x-forwarded-for")                                              \
    X(X_FORWARDED_HOST, "x-forwarded-host")                                            \
    X(X_FORWARDED_PROTO, "x-forwarded-proto")                                          \
    X(X_REQUEST_ID, "x-request-id")

enum pf_field_id {
#define X(name, text) PF_FIELD_##name,
    PF_FIELDS(X)
#undef X
    PF_FIELD_COUNT
};

typedef struct pf_field {
    uint32_t name_at;
    uint32_t value_at;
    uint32_t value_len;
    uint16_t name_len;
    uint8_t id; /* PF_FIELD_* */
} pf_field;

enum { PF_HEAD_FIELDS = 128 }; /* no head has more; pf_options.max_fields may be less */

enum pf_head_flag {
    PF_HEAD_KEEP_ALIVE = 1 << 0, /* the peer wants the connection kept (RFC 9112 9.3) */
    PF_HEAD_CHUNKED = 1 << 1,    /* the body is chunked */
    PF_HEAD_EXPECT = 1 << 2,     /* Expect: 100-continue */
    PF_HEAD_UPGRADE = 1 << 3,    /* Connection: upgrade and an Upgrade field */
    PF_HEAD_IS_HEAD = 1 << 4,    /* the method is HEAD */
    PF_HEAD_IS_GET = 1 << 5,     /* the method is GET */
    PF_HEAD_FORWARDED = 1 << 6,  /* Forwarded or X-Forwarded-* fields are there; in a
                                    request on loan they are a listed peer's word */
    PF_HEAD_TRAILERS = 1 << 7,   /* TE: trailers, in HTTP/1.1: the peer takes fields
                                    behind a body */
};

typedef struct pf_head {
    pf_span method;
    pf_span target;         /* as sent */
    pf_span path;           /* of the target, without query; empty means "/" */
    pf_span query;          /* behind the "?", empty if none */
    pf_span authority;      /* of an absolute-form target; empty if none. It is also
                               what the Host field then holds (RFC 9112 3.2.2) */
    uint64_t content_length; /* 0 if absent or chunked */
    uint32_t size;          /* bytes of the whole head, its last CR LF included */
    uint16_t nfields;
    uint8_t minor;          /* HTTP/1.0 or HTTP/1.1 */
    uint8_t flags;          /* PF_HEAD_* */
    uint8_t host;           /* index of the Host field; 0xff if there is none */
    pf_field fields[PF_HEAD_FIELDS + 1]; /* one spare for the line that is too many */
} pf_head;

const char *pf_http_field_name(int id); /* lower case; lends for ever */
int pf_http_find_field(const pf_head *head, const char *bytes, const char *name,
                       size_t len, int from); /* index of the next field of this name,
                                                 any case, at or behind from; or -1 */

uint64_t pf_http_hash(const char *bytes, size_t len); /* to recognise a block of fields
                                                         that was seen before */

/* ---- Listeners (socket.c) ----------------------------------------------------------*/
enum pf_socket_flag {
    PF_SOCKET_REUSEPORT = 1 << 0,
    PF_SOCKET_V6ONLY = 1 << 1,       /* without it an IPv6 listener is dual-stack */
    PF_SOCKET_DEFER_ACCEPT = 1 << 2, /* wake the loop when the first bytes are there */
    PF_SOCKET_FAST_OPEN = 1 << 3,
};

typedef struct pf_socket_spec {
    int family;       /* AF_INET, AF_INET6, AF_UNIX */
    const char *host; /* numeric address, or the path of a unix socket; borrows */
    uint16_t port;    /* 0: any free one */
    int backlog;
    int mode;         /* permission bits of a unix socket, -1: by umask */
    unsigned flags;   /* PF_SOCKET_* */
} pf_socket_spec;

int pf_socket_listen(const pf_socket_spec *spec); /* a listening fd, close-on-exec,
                                                     non-blocking; the caller owns it */
int pf_socket_check(int fd); /* 0 if fd is a listening stream socket, else -errno */
int pf_socket_quiesce(int fd); /* from now on no new handshake begins on this listener;
                                  those begun complete and can be accepted, so that a
                                  sweep of the queue before close() loses nobody */
enum { PF_SOCKET_AVOIDED = 1024 };
int pf_socket_spread(int fd, int members, const int *avoided,
                     int n); /* which of the `members` listeners that share this one's
      address by SO_REUSEPORT take new connections: all but those at the n places in
      `avoided` (ascending; places count in the order of listen()); n 0: all again */

/* ---- Processes (process.c) ---------------------------------------------------------
 * The children and signals of a supervising process behind one blocking wait. A child
 * is known by its pidfd: a pid that was reaped is never signalled.
 */
typedef struct pf_processes pf_processes;

enum pf_process_kind { PF_PROCESS_EXITED = 1, PF_PROCESS_SIGNALLED = 2, PF_PROCESS_READABLE = 3 };

typedef struct pf_process_event {
    int kind;   /* EXITED: a child ended and is reaped; SIGNALLED: we got a signal;
                   READABLE: a watched fd can be read or was closed by its peer */
    int pid;    /* EXITED: the child; SIGNALLED: the sender or 0; READABLE: the fd */
    int status; /* EXITED: as waitpid() gives it; SIGNALLED: the signal's number */
} pf_process_event;

enum { PF_PROCESS_STATUS_UNKNOWN = -1 }; /* the child was reaped behind our back */

int pf_process_open(pf_processes **out, const int *signals, int n); /* blocks these
                                        signals in the calling thread, collects them */
int pf_process_adopt(pf_processes *p, int pid);        /* watch a child of ours */
int pf_process_watch(pf_processes *p, int fd);         /* borrows fd; level-triggered */
int pf_process_unwatch(pf_processes *p, int fd);
int pf_process_wait(pf_processes *p, pf_process_event *events, int max,
                    int timeout_ms); /* sleeps; -1: for ever. Returns the number of
      events, signals first; 0 when the time is up or a handler of another signal ran */
int pf_process_kill(pf_processes *p, int pid, int signal); /* -ESRCH once reaped */
void pf_process_close(pf_processes *p);  /* restores the signal mask; takes pending
                                            signals with it; NULL is allowed */
void pf_process_forget(pf_processes *p); /* the same in a forked child: the parent's
                                            view stays as it is */
int pf_process_set_parent_death_signal(int signal, int expected_parent); /* -ESRCH if
                                                           the parent is gone already */

/* Process 1 inherits the children that others leave behind, a subreaper those of its
 * descendants: both have to reap strangers. */
bool pf_process_is_reaper(void);
int pf_process_set_reaper(bool on); /* become a subreaper, or be none any more */
int pf_process_reap_strangers(pf_processes *p); /* reap ended children that nobody has
                                                   adopted here; returns how many */

enum { PF_PROCESS_FIRST_FD = 3, PF_PROCESS_FDS = 200 };

typedef struct pf_process_program {
    const char *path;      /* as execve() takes it, with argv and envp */
    char *const *argv;
    char *const *envp;
    const char *directory; /* it starts in; NULL: ours */
    const int *fds;        /* it finds them at PF_PROCESS_FIRST_FD and behind; borrows */
    int nfds;
} pf_process_program;

int pf_process_start(const pf_process_program *program); /* the pid, or -errno, also of
      its exec. Its stdin is /dev/null, stdout and stderr are ours; signals that are
      blocked here are blocked there */

/* ---- Files (files.c) ---------------------------------------------------------------
 * An fd that can be read when something changes in a watched directory: events as
 * inotify(7) has them.
 */
int pf_files_open(void); /* the caller owns it; close-on-exec, non-blocking */
int pf_files_watch(int fd, const char *directory);

/* ---- TLS (tls.c) -------------------------------------------------------------------
 * Certificates, and how they are used: made in one thread, given to a loop with
 * pf_loop_secure(), and from then on only read, so that forked workers share it.
 */
typedef struct pf_tls pf_tls;

enum { PF_TLS_1_2 = 0x0303, PF_TLS_1_3 = 0x0304 };

enum pf_tls_verify {
    PF_TLS_VERIFY_NONE,     /* no certificate is asked for */
    PF_TLS_VERIFY_OPTIONAL, /* one that is presented has to be good */
    PF_TLS_VERIFY_REQUIRED,
};

typedef struct pf_tls_options {
    int min_version;         /* PF_TLS_1_2, PF_TLS_1_3 */
    int verify;              /* PF_TLS_VERIFY_*: of clients */
    const char *ciphers;     /* of TLS 1.2, in OpenSSL's words; NULL: forward secret AEADs */
    const char *ciphersuites; /* of TLS 1.3; NULL: OpenSSL's */
    const char *ca;          /* who may vouch for clients: certificates in PEM */
    size_t ca_len;
    bool kernel;             /* let the kernel encrypt (kTLS), where it can; SIGPIPE is
                                to be ignored then, as Python does */
} pf_tls_options;

typedef struct pf_tls_key {
    const char *cert;     /* the certificate and the chain behind it, in PEM */
    size_t cert_len;
    const char *key;      /* in PEM; NULL: it stands beside the certificate */
    size_t key_len;
    const char *password; /* of the key; NULL: it has none */
    const char *staple;   /* an OCSP response in DER; NULL: none */
    size_t staple_len;
} pf_tls_key;

int pf_tls_open(pf_tls **out, const pf_tls_options *options); /* copies. The caller, and
                                   each loop and connection that uses it, own it */
int pf_tls_add(pf_tls *tls, const pf_tls_key *key); /* copies; before it is used. The
      first is the default, another is chosen by the name that a client asks for (SNI,
      RFC 6066 3): one of its DNS names, of which "*.example.org" has one label more.
      Returns its place: 0, 1, ... */
const char *pf_tls_reason(const pf_tls *tls); /* what the library said of the last error,
                                                 lent; "" if nothing */
void pf_tls_close(pf_tls *tls); /* the caller's part; NULL is allowed */

/* The facts of a certificate. Texts are owned by the caller: pf_tls_forget(). */
typedef struct pf_certificate {
    size_t size;                 /* bytes of DER that it takes */
    int64_t not_before, not_after; /* unix time */
    char *pem, *subject, *issuer; /* names as RFC 2253 writes them */
    char *serial;                /* hexadecimal */
    char *names;                 /* its DNS names, each ended by a NUL, and one more */
} pf_certificate;

int pf_tls_describe(const void *der, size_t len, pf_certificate *out);
void pf_tls_forget(pf_certificate *certificate);
int pf_tls_certificate(const pf_tls *tls, int place, const void **der, size_t *len); /*
      that was added there, lent; -EINVAL: there is none */

/* Keys that encrypt session tickets (RFC 5077 4, RFC 8446 4.6.1), so that whoever has
 * them can resume a session: workers share them through the scoreboard. */
enum { PF_TICKET_KEYS = 4, PF_TICKET_LIFE_S = 24 * 3600 };

typedef struct pf_ticket_key {
    uint8_t name[16], cipher[32], mac[32];
} pf_ticket_key;

typedef struct pf_tickets {
    uint32_t version; /* odd while they change */
    uint32_t count;   /* newest first */
    int64_t made;     /* unix time, of the newest */
    pf_ticket_key keys[PF_TICKET_KEYS];
} pf_tickets;

int pf_tls_rotate(pf_tickets *tickets); /* a new key for new tickets; the oldest goes. One
                                           writer, readers in every process */
void pf_tls_share(pf_tls *tls, pf_tickets *tickets); /* borrows: use these from now on;
      without it the keys are its own, and change by themselves */

/* What is known of a connection's TLS. */
typedef struct pf_tls_info {
    int version;             /* PF_TLS_* */
    uint16_t cipher;         /* its number at IANA */
    bool resumed;
    const char *version_name, *cipher_name; /* lent for ever */
    const char *server_name; /* that the client asked for; NULL: none. Lent with the loan */
    const char *protocol;    /* chosen by ALPN, not ended by NUL; NULL: none was offered */
    size_t protocol_len;
    const void *server;      /* our certificate in DER */
    size_t server_len;
    const void *client;      /* its certificate and what stood behind it, verified, one
                                after the other in DER; NULL: it presented none */
    size_t client_len;
} pf_tls_info;

/* ---- The scoreboard (scoreboard.c) -------------------------------------------------
 * One row of shared memory for each worker, written by its loop without locks, read by
 * the master and by every worker. What a worker has counted is kept when it ends. The
 * memory is made by the master; fork inherits it, exec attaches to its descriptor.
 */
typedef struct pf_scoreboard pf_scoreboard;

typedef struct pf_loop_stats {
    uint64_t accepted, closed, requests, refused, timeouts, bytes_in, bytes_out;
    uint64_t passed_on;      /* accepted here, served by a worker with less to do */
    uint64_t statuses[6];    /* answers by class: [2] counts 2xx; [0] aborted */
    uint32_t connections;    /* open now */
    uint32_t lent;           /* requests on loan now */
    uint32_t buffers_in_use; /* read and write buffers held now */
} pf_loop_stats;

enum pf_row_state {
    PF_ROW_FREE,
    PF_ROW_BOOTING,  /* claimed by the master; its loop is not attached yet */
    PF_ROW_WAITING,  /* asleep in pf_loop_wait() */
    PF_ROW_RUNNING,  /* at work: in handlers, or in the core itself */
    PF_ROW_DRAINING, /* accepts no more */
};

enum { PF_LATENCY_BUCKETS = 104 }; /* four to each power of two of microseconds */

typedef struct pf_row {
    uint32_t pid, slot, generation;
    uint32_t state;                      /* PF_ROW_* */
    int64_t started_ms, heartbeat_ms;    /* monotonic; the last turn of its loop */
    int32_t expected;                    /* connections passed on to it, on their way;
                                            the only word that others write */
    uint8_t mailbox_len;                 /* the abstract name of its mailbox */
    char mailbox[15];
    pf_loop_stats stats;
    uint64_t latency[PF_LATENCY_BUCKETS]; /* requests by time from head to answer */
    uint32_t taken, taken_at;             /* connections of late, and when that was */
} pf_row;

int pf_scoreboard_open(pf_scoreboard **out, uint32_t rows);
int pf_scoreboard_attach(pf_scoreboard **out, int fd); /* owns fd */
int pf_scoreboard_fileno(const pf_scoreboard *board);  /* lends; close-on-exec */
void pf_scoreboard_close(pf_scoreboard *board);
int pf_scoreboard_claim(pf_scoreboard *board, uint32_t slot, uint32_t generation);
      /* the master, before a spawn: the index of a fresh row; -ENOSPC */
int pf_scoreboard_retire(pf_scoreboard *board, int row); /* the master, when its worker
                                       has ended: its counters join the retired */
int pf_scoreboard_rows(const pf_scoreboard *board); /* all that were ever claimed stand
                                       before this index */
pf_row *pf_scoreboard_row(pf_scoreboard *board, int row); /* lends; NULL: no such row */
void pf_scoreboard_totals(const pf_scoreboard *board, pf_row *out); /* all rows and the
                                       retired ones, summed */
int pf_scoreboard_adopt(pf_scoreboard *board, int row, uint32_t slot, int fd); /* the
      master: have this worker accept from the listener of a vacant slot, too; fd is
      copied, as descriptors are between processes */
int pf_scoreboard_release(pf_scoreboard *board, int row, uint32_t slot); /* and no more */
pf_tickets *pf_scoreboard_tickets(pf_scoreboard *board); /* lends: the session ticket
                                                           keys that all workers use */
int pf_scoreboard_bucket(uint64_t us);       /* the latency bucket of a duration */
uint64_t pf_scoreboard_bound(int bucket);    /* its upper bound in microseconds */

/* ---- A crew (crew.c) ---------------------------------------------------------------
 * Threads of which one leads: it runs the loop and the handlers. The others stand by,
 * asleep, and one of them takes over the loop when a handler stalls. Who leads is
 * decided under a lock of the caller's, which also orders begin, end and call.
 */
typedef struct pf_crew pf_crew;

enum pf_crew_reason {
    PF_CREW_CALLED = 1,
    PF_CREW_STALLED = 2,
    PF_CREW_CLOSED = 3,
    PF_CREW_APPOINTED = 4, /* it leads already */
};

int pf_crew_open(pf_crew **out, int tick_ms); /* a handler has stalled when it has run
                                                 for one to two ticks; the first one in
                                                 a while, for five to ten */
int pf_crew_wait(pf_crew *crew,
                 unsigned long name); /* sleeps: stand by, known by a name that is not
                                         0. PF_CREW_*, or -errno */
void pf_crew_begin(pf_crew *crew); /* the leader enters a handler */
void pf_crew_end(pf_crew *crew);   /* and has left it, or somebody leads in its place */
void pf_crew_took_long(pf_crew *crew); /* behind an end, in the leader: that handler ran
                                          for a tick or more. If it has waited, the next
                                          that does is seen after one to two ticks */
bool pf_crew_call(pf_crew *crew);  /* wake one who stands by; false: nobody does */
unsigned long pf_crew_appoint(pf_crew *crew); /* wake one who stands by, to lead: its
                                                 name; 0: nobody is to be had */
void pf_crew_close(pf_crew *crew); /* whoever stands by, or will, is told CLOSED */
void pf_crew_free(pf_crew *crew);  /* when nobody waits any more */

/* ---- The loop (loop.c) -------------------------------------------------------------*/
typedef struct pf_loop pf_loop;
typedef struct pf_request pf_request;

enum pf_option_flag {
    PF_OPTION_LEND_HEADS = 1 << 0,   /* lend a request at its head, not when its body is
                                        whole (stream_request_body, header_received) */
    PF_OPTION_LEND_REFUSED = 1 << 1, /* lend refused requests too (error_handler) */
    PF_OPTION_NOTICES = 1 << 2,      /* collect pf_loop_notices() */
    PF_OPTION_NO_DATE = 1 << 3,
    PF_OPTION_NO_KEEP_ALIVE = 1 << 4,
    PF_OPTION_GET_ONLY = 1 << 5,
    PF_OPTION_TCP_KEEPALIVE = 1 << 6,
    PF_OPTION_KEEP_ON_DRAIN = 1 << 7, /* do not announce Connection: close in a drain */
    PF_OPTION_WS_DEFLATE = 1 << 8,    /* agree to permessage-deflate (RFC 7692) */
};

/* The versions of the PROXY protocol that are understood. */
enum pf_proxy_version { PF_PROXY_V1 = 1 << 0, PF_PROXY_V2 = 1 << 1 };

/* Peers whose word counts: a network, or (AF_UNIX) whoever can open our unix socket. */
typedef struct pf_network {
    uint8_t bytes[16]; /* as in pf_peer */
    uint16_t family;   /* AF_INET, AF_INET6, AF_UNIX */
    uint8_t prefix;    /* leading bits that count */
} pf_network;

typedef struct pf_options {
    uint32_t max_connections;         /* then 503; 0: no limit */
    uint32_t max_connections_per_ip;  /* then 429; 0: no limit */
    uint32_t max_requests;            /* per connection; 0: no limit */
    uint32_t header_timeout_ms;       /* from accept or the first byte to a whole head */
    uint32_t read_timeout_ms;         /* between two reads of a body */
    uint32_t write_timeout_ms;        /* without progress in a write */
    uint32_t idle_timeout_ms;         /* of a kept-alive connection */
    uint32_t tls_timeout_ms;          /* from accept to the end of the TLS handshake */
    uint32_t linger_timeout_ms;       /* reading on after a refusal, before close */
    uint32_t drain_idle_ms;           /* lame duck of idle connections in a drain */
    uint32_t min_body_rate;           /* bytes a second, after read_timeout; 0: none */
    uint32_t read_buffer_size;        /* first size of a connection's buffer */
    uint32_t max_target_size;         /* then 414 */
    uint32_t max_field_size;          /* one field line, then 431 */
    uint32_t max_header_size;         /* the whole head, then 431 */
    uint32_t max_fields;              /* then 431 */
    uint64_t max_body_size;           /* then 413 */
    uint32_t body_buffer_size;        /* of a body gathered whole; a larger one is spilled
                                         into a file; 0: none is */
    uint32_t ws_max_size;             /* of a message, inflated; then close 1009 */
    uint32_t ws_ping_interval_ms;     /* a WebSocket that said nothing for so long is
                                         pinged; 0: none is */
    uint32_t ws_ping_timeout_ms;      /* and must say something then; 0: for ever */
    uint32_t ws_close_timeout_ms;     /* for the peer's part of a close we began */
    const char *spill_dir;            /* where that file is made, NULL: "/tmp"; copies */
    const char *server;               /* Server field, NULL: none; copies */
    const char *content_type;         /* default Content-Type, NULL: none; copies */
    unsigned flags;                   /* PF_OPTION_* */
    unsigned proxy_protocol;          /* PF_PROXY_*: peers of proxy_trust begin with such
                                         a header, or are closed; 0: nobody does */
    uint32_t proxy_trusted, forwarded_trusted; /* how many there are of each: */
    const pf_network *proxy_trust;    /* copies */
    const pf_network *forwarded_trust; /* whose Forwarded and X-Forwarded-* are lent;
                                          those of others are dropped; copies */
} pf_options;

void pf_options_init(pf_options *options); /* every default, all limits on */

/* One turn of the loop brings a batch of these. */
enum pf_event_flag {
    PF_EVENT_REQUEST = 1 << 0,  /* a request is on loan; ends with pf_request_end/abort */
    PF_EVENT_BODY = 1 << 1,     /* wanted body bytes are there, or the body is done */
    PF_EVENT_WRITABLE = 1 << 2, /* the wanted room is there */
    PF_EVENT_CLOSED = 1 << 3,   /* the peer left during the loan: answer no more; the
                                   loan still ends with end or abort */
    PF_EVENT_RELEASED = 1 << 4, /* what pf_request_write_ref(.., ref) or _write_file()
                                   borrowed is no longer needed; request is NULL */
    PF_EVENT_DRAINED = 1 << 5,  /* the drain is done: no connection is left */
    PF_EVENT_REFUSED = 1 << 6,  /* with REQUEST: the loop refused it for pf_event.code;
                                   what is answered is followed by close */
    PF_EVENT_WOKEN = 1 << 7,    /* pf_loop_wake() was called */
    PF_EVENT_READABLE = 1 << 8, /* a watched fd, in code, can be read; request is NULL */
    PF_EVENT_ENDED = 1 << 9,    /* the peer will send nothing more: it has left, or has
                                   only closed its side and still reads */
    PF_EVENT_MESSAGE = 1 << 10, /* messages of a WebSocket are there, where none were */
};

typedef struct pf_event {
    uint32_t flags;      /* PF_EVENT_* */
    int32_t code;        /* REFUSED: PF_ERR_*; READABLE: the fd; WOKEN: 1 if a byte
                            other than 0 was written to pf_loop_wake_fileno() */
    pf_request *request; /* NULL for RELEASED, DRAINED, WOKEN, READABLE */
    void *user;          /* what pf_request_set_user() said last; RELEASED: ref */
} pf_event;

int pf_loop_open(pf_loop **out, const pf_options *options); /* copies options */
int pf_loop_attach(pf_loop *loop, pf_scoreboard *board, int row); /* borrows board:
      count there from now on; before the loop has done anything */
int pf_loop_listen(pf_loop *loop, int fd); /* borrows fd; accept from it, one of many
                                              loops or processes that may */
int pf_loop_secure(pf_loop *loop, pf_tls *tls); /* owns a part of it; connections that
      come from now on speak TLS; NULL: they do not */
int pf_loop_watch(pf_loop *loop, int fd);  /* borrows fd; READABLE, level-triggered */
int pf_loop_unwatch(pf_loop *loop, int fd);
int pf_loop_wait(pf_loop *loop, pf_event *events, int max, int timeout_ms);
      /* sleeps, at most timeout_ms (-1: until something happens): sends what is queued,
         then waits, accepts, reads, parses, times out. Returns the number of events;
         0 also when only notices have come. */
int pf_loop_flush(pf_loop *loop); /* send what is queued now, without waiting */
int pf_loop_wake(pf_loop *loop);  /* any thread, any signal handler: end the wait */
void pf_loop_share(pf_loop *loop); /* from now on it can be borrowed; before its threads */
bool pf_loop_borrow(pf_loop *loop); /* any thread: if its own thread sleeps in
      pf_loop_wait() the loop belongs to the caller until pf_loop_return(), and who wakes
      meanwhile waits for that. false: its thread is at work, or it is borrowed */
bool pf_loop_poll(pf_loop *loop, pf_event *event); /* who has borrowed it: sends what is
      queued, then looks, without waiting, whether a request has come, and takes it if it
      is whole: the caller may answer it as any other thread does */
void pf_loop_return(pf_loop *loop); /* sends what is queued, and wakes the loop's thread
                                       if there is something for it to do or to tell */
int pf_loop_fileno(pf_loop *loop); /* an fd that is readable when pf_loop_wait(.., 0)
      would find something, timers included; arms the timer fd, so call it to embed the
      loop in another. A queued answer is not sent by itself then: call wait. */
bool pf_loop_ready(const pf_loop *loop); /* events or queued answers that fileno does
                                            not show: call pf_loop_wait(.., 0) again */
int pf_loop_wake_fileno(pf_loop *loop); /* the fd whose write wakes the loop: one byte
                                           (signal.set_wakeup_fd) */
int pf_loop_drain(pf_loop *loop, bool sweep,
                  int read_ms); /* stop accepting (sweep: first accept all that is
      queued), finish what is under way, give idle connections drain_idle_ms; then
      DRAINED. Peers have read_ms to say what they have begun to say, and an eighth more
      to leave (-1: as long as otherwise). Calling it again closes idle connections at
      once. */
int64_t pf_loop_touch(pf_loop *loop); /* read the clock, which otherwise stands since
      the last wake-up: after a handler, so that deadlines do not count its time and
      its caller knows how long the batch has run. Returns monotonic ms. */
int64_t pf_loop_now(const pf_loop *loop); /* the clock as it stands, monotonic ms */
void pf_loop_close(pf_loop *loop); /* closes all connections and descriptors; what is
                                      on loan stays readable until end or abort */
int pf_loop_take_released(pf_loop *loop, void **refs, int max); /* after close: refs
                                      whose bytes are no longer borrowed */
int pf_loop_free(pf_loop *loop); /* PF_ERR_STATE before close, or while anything is
                                    on loan or a ref was not taken back */

void pf_loop_get_stats(const pf_loop *loop, pf_loop_stats *stats);

/* What happened to connections, for conn_state= and log_all_errors=; kept only with
 * PF_OPTION_NOTICES. */
enum pf_notice_kind {
    PF_NOTICE_NEW = 1,
    PF_NOTICE_ACTIVE,
    PF_NOTICE_IDLE,
    PF_NOTICE_CLOSED,
    PF_NOTICE_ERROR, /* code says what the peer did or met */
};

typedef struct pf_peer {
    uint8_t bytes[16]; /* IPv4 in the first four; empty for unix */
    uint16_t port;
    uint16_t family;   /* AF_INET, AF_INET6, AF_UNIX */
    uint32_t scope;    /* of a link-local IPv6 address */
} pf_peer;

typedef struct pf_notice {
    uint64_t connection; /* a number that no other connection of this loop had */
    int kind, code;
    pf_peer peer;
    const char *reason;  /* of an error of TLS, in OpenSSL's words; NULL: none. Lent for ever */
} pf_notice;

int pf_loop_notices(pf_loop *loop, pf_notice *out, int max); /* takes them out */

/* ---- Requests: one request and its answer, on loan (request.c) ---------------------
 * What is lent here is valid until the next pf_loop_wait() (bytes may move then: ask
 * again) and ends with the loan.
 */
const pf_head *pf_request_head(const pf_request *request);
const char *pf_request_bytes(const pf_request *request); /* what the head's spans count
                                                            from */
void pf_request_get_peer(const pf_request *request, pf_peer *peer); /* or the client of
                                                                       its PROXY header */
int pf_request_get_local(const pf_request *request, pf_peer *local); /* our address, or
                                     the one that the PROXY header says was connected to;
                                     asks the kernel once a connection */
int pf_request_tls(const pf_request *request, pf_tls_info *info); /* 1; 0: it is plain.
                                                           Lends until the loan ends */
void pf_request_set_user(pf_request *request, void *user); /* comes with its events */
uint64_t pf_request_connection(const pf_request *request); /* the connection's number */
bool pf_request_closed(const pf_request *request); /* the peer is known to be gone */

/* The body. In a loan that began with a whole body everything is there at once. */
typedef struct pf_slice {
    const char *data;
    size_t len;
} pf_slice;

pf_slice pf_request_body(const pf_request *request);  /* lends what has arrived */
bool pf_request_body_done(const pf_request *request); /* nothing more will arrive */
int pf_request_consume(pf_request *request, size_t n); /* give back n body bytes */

/* A body that is gathered whole, before its loan or because WHOLE was wanted, and is
 * larger than body_buffer_size, goes to a temporary file without a name: all that was
 * not consumed before, in order, and nothing of it stays in memory. If that fails, the
 * request is refused (BODY_STORE), or CLOSED says so; a notice carries the errno. */
int pf_request_body_fd(const pf_request *request); /* lends; -1: it is in memory */
int pf_request_take_body_fd(pf_request *request);  /* the caller owns it; at its
      beginning. -1: it is in memory, not done, or taken already */
uint64_t pf_request_body_size(const pf_request *request); /* bytes that have arrived,
      in memory or in the file, and were not consumed */

enum pf_want { PF_WANT_SOME = 1, PF_WANT_WHOLE = 2 };
int pf_request_want_body(pf_request *request, int want);
      /* read (on): BODY comes when bytes are there or, WHOLE, when all are. Sends 100
         Continue if the peer waits for it (RFC 9110 10.1.1). */
int pf_request_limit(pf_request *request, int64_t max_body_size,
                     int64_t read_timeout_ms, int64_t write_timeout_ms);
      /* limits of this one request (-1: leave); PF_ERR_BODY_SIZE if its announced
         length is larger: the caller answers 413 or calls pf_request_refuse() */
int pf_request_refuse(pf_request *request, int code); /* answer code's status and close;
                                                         ends the loan */

/* A field that comes again and again: checked and laid out once, for many answers. */
typedef struct {
    const char *text; /* "Name: value\r\n", lent by who has prepared it */
    size_t name_len, value_len;
    int64_t length;   /* of the body, if it says that; else -1 */
    unsigned notes;   /* what an answer learns by it, and */
    bool spoken_for;  /* whether it is written by the answer itself, where that ends */
} pf_line;
int pf_response_prepare(pf_line *line, const char *text, size_t name_len,
                        size_t value_len); /* 0, or what pf_response_check_field() says:
      then, in some answer, it may still be a field. Any thread */

/* The answer: begin, field.., write.., end. Fields come one by one, so that CR, LF and
 * NUL are refused in one place for all interfaces. After an error the unsent head can
 * be dropped with pf_request_reset() and another answer begun. */
int pf_request_begin(pf_request *request, int status, int64_t length); /* -1: unknown */
int pf_request_begin_line(pf_request *request, int status, const char *reason,
                          size_t reason_len, int64_t length); /* with the app's own
      reason phrase (RFC 9112 4); copies */
int pf_request_set_length(pf_request *request, uint64_t length); /* of the body, unless a
      field said it; before the first write */
int64_t pf_request_length(const pf_request *request); /* as announced; -1: unknown */
int pf_request_field(pf_request *request, const char *name, size_t name_len,
                     const char *value, size_t value_len); /* copies */
int pf_request_line(pf_request *request, const pf_line *line); /* pf_request_field() with
      what was checked before */
int pf_request_trailers(pf_request *request); /* fields will follow the body; before the
      first write. 1: the peer takes them, so the body is chunked, of whatever length,
      and a Trailer field is let through; 0: it does not, or there is no body, and they
      are dropped */
int pf_request_trailer(pf_request *request, const char *name, size_t name_len,
                       const char *value, size_t value_len); /* copies; behind the last
      write. PF_ERR_APP_TRAILER: it frames, routes, or says what is decided by then (RFC
      9110 6.5.1) */
int pf_response_check_line(int status, const char *reason, size_t reason_len);
int pf_response_check_field(const char *name, size_t name_len, const char *value,
                            size_t value_len); /* whether an answer may have this status
      line, this field, whatever else it has: 0 or what pf_request_begin_line() and
      pf_request_field() would say. Any thread */
int pf_request_write(pf_request *request, const char *data, size_t len); /* copies */
int pf_request_write_ref(pf_request *request, const char *data, size_t len, void *ref);
      /* borrows data until RELEASED with ref; an error leaves it to the caller. For
         data that pf_request_borrows(); the rest is better copied by write. */
bool pf_request_borrows(const pf_request *request, size_t len);
int pf_request_write_file(pf_request *request, int fd, int64_t offset, uint64_t len,
                          void *ref);
      /* len bytes of a regular file (else -EINVAL), as one chunk where there are
         chunks. 1: borrows fd until RELEASED with ref; 0: nothing of it is to be sent
         (HEAD, 204, 304, no bytes), and nothing is borrowed. PF_ERR_APP_FILE_SHORT: it
         has not as many bytes; if it loses them later, its answer is cut short by a
         reset, with a notice. sendfile(2) has no MSG_NOSIGNAL: SIGPIPE is to be ignored,
         as Python does. */
int pf_request_whole(pf_request *request, const char *data, size_t len, void *ref);
      /* the whole body of an answer that was begun, of the length that its fields say, if
         they do. Ends the loan, if it returns >= 0. 1: borrows data, as write_ref does */
int pf_request_reset(pf_request *request); /* PF_ERR_STATE once bytes may be sent */
int pf_request_end(pf_request *request);   /* ends the loan, whatever it returns */
int pf_request_abort(pf_request *request); /* ends the loan; closes the connection so
                                              that the peer sees a truncated answer */
int pf_request_inform(pf_request *request, int status, const char *fields, size_t len);
      /* an interim 1xx answer; fields are checked "name: value CR LF" lines */
bool pf_request_begun(const pf_request *request); /* its head may have been sent */
size_t pf_request_pending(const pf_request *request); /* bytes not yet taken by the
                                                         kernel */
int pf_request_want_room(pf_request *request); /* WRITABLE comes when little is pending;
                                                  at the next wait if that is so now */
int pf_request_want_end(pf_request *request);  /* ENDED comes when the peer has closed its
                                       side; at the next wait if it has done so already */

/* The common case in one call: the whole answer; default fields and the default
 * Content-Type (unless content_type is given; empty: none) are added. Ends the loan if
 * it returns >= 0. ref NULL: copies body; else borrows it if that pays (returns 1) or
 * copies it (returns 0). */
int pf_request_answer(pf_request *request, int status, const char *content_type,
                      size_t content_type_len, const char *body, size_t len, void *ref);

/* ---- WebSockets: a request on loan that became a channel (channel.c) ----------------
 * RFC 6455, and permessage-deflate (RFC 7692). Frames, masking, UTF-8, pings and the
 * close handshake are the core's; what crosses the seam are whole messages. The loan
 * goes on: MESSAGE tells that there are messages, CLOSED that no more will come, and
 * pf_channel_close() ends it. Reading stops while messages wait to be received, and
 * pf_request_pending() and _want_room() tell how sending goes.
 */
enum pf_message_kind { PF_MESSAGE_TEXT = 1, PF_MESSAGE_BINARY = 2 };

typedef struct pf_message {
    const char *data;
    size_t len;
    int kind; /* PF_MESSAGE_*; text is UTF-8 */
} pf_message;

enum { PF_CHANNEL_REASON = 123 }; /* bytes of a close's reason, at most */

int pf_channel_offered(const pf_request *request); /* 1: it asks for a WebSocket; 0: it
      does not. PF_ERR_WEBSOCKET_KEY, _VERSION: it does so wrongly, which
      pf_request_refuse() answers */
int pf_channel_begin(pf_request *request, const char *subprotocol,
                     size_t len); /* accept: begins a 101; NULL: no subprotocol. Fields
      may follow, but those that begin with Sec-WebSocket- */
int pf_channel_open(pf_request *request); /* sends it. The head is not lent any more */
int pf_channel_receive(pf_request *request, pf_message *message); /* 1: lends a message,
      until the next call or wait; 0: none is there, MESSAGE will come. Good also after
      CLOSED, for what came before that */
int pf_channel_send(pf_request *request, int kind, const char *data,
                    size_t len); /* copies; text has to be UTF-8, which nobody checks */
int pf_channel_send_ref(pf_request *request, int kind, const char *data, size_t len,
                        void *ref); /* 1: borrows data until RELEASED with ref; 0: has
      copied it, as it was too little to borrow or is sent compressed */
int pf_channel_close(pf_request *request, int code, const char *reason,
                     size_t len); /* ends the loan unless that is refused (APP_CLOSE);
      the close handshake goes on by itself. After CLOSED nothing more is sent */
int pf_channel_code(const pf_request *request, pf_slice *reason); /* after CLOSED: the
      code of the close, lending its reason; 1005: it had none, 1006: there was no close */

/* ---- Implementation facts that tests and benchmarks ask for (http.c) ----------------*/
const char *pf_http_simd(void);          /* "avx2", "sse2" or "portable" */
int pf_http_set_simd(const char *name);  /* -ENOTSUP if this CPU has it not */

#ifdef __cplusplus
}
#endif
#endif
