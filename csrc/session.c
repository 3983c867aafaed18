/* session.c - the TLS of one connection: a read and a write like those of a socket.
 *
 * OpenSSL makes and reads the records; what it sends and receives goes through a BIO of
 * our own, which knows what the connection knows: that the kernel has no more when a
 * read came back short, so that no second recv() has to say so; that more is about to be
 * sent; and the bytes that were read before, behind a PROXY header. With kTLS it is
 * OpenSSL's BIO instead, as the kernel and it speak of the socket among themselves.
 */
#include "internal.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/socket.h>

enum {
    HANDSHAKE_RECORD = 22,
    READS_MAX = 4, /* of the socket, in one call: enough for the largest record */
};

struct pf__session {
    SSL *ssl;
    pf_tls *tls; /* a part of it */
    int fd;
    int error;       /* errno of the last system call that failed */
    uint8_t reads;   /* of the socket, in this call */
    bool begun;      /* a byte of the peer's was seen */
    bool plain;      /* and it was none of TLS */
    bool dry;        /* the kernel has nothing more, as far as we know */
    bool last;       /* the peer's side is shut: behind the last byte is the end */
    bool ended;      /* which we have seen */
    bool waits;      /* it could not go on: what it has is no whole record */
    bool more;       /* bytes follow at once */
    bool broken;     /* nothing can be said any more */
    bool curt;       /* no good-bye: something is missing */
    bool wants_room; /* before it can read on, something has to be sent */
    bool blind;      /* OpenSSL's BIO: dry is not known */
    char *early;     /* owns; bytes that were read before */
    size_t early_at, early_len;
    unsigned char *chain; /* owns; the peer's certificates in DER */
    size_t chain_len;
    const char *reason; /* what OpenSSL says of the error */
    int refusal;
};

/* ---- the BIO ------------------------------------------------------------------------*/
static int
take_early(pf__session *s, char *data, int room)
{
    size_t n = s->early_len - s->early_at;
    if (n > (size_t)room)
        n = (size_t)room;
    memcpy(data, s->early + s->early_at, n);
    s->early_at += n;
    if (s->early_at == s->early_len) {
        free(s->early);
        s->early = NULL;
    }
    return (int)n;
}

/* -1: nothing, or an error; 0: the end. */
static int
receive(pf__session *s, BIO *bio, char *data, int room)
{
    ssize_t n;
    if (s->early != NULL)
        return take_early(s, data, room);
    if (s->dry || s->reads++ >= READS_MAX) {
        BIO_set_retry_read(bio);
        return -1;
    }
    do
        n = recv(s->fd, data, (size_t)room, 0);
    while (n < 0 && errno == EINTR);
    if (n < 0 || (n < room && !s->last))
        s->dry = true;
    if (n < 0 && errno == EAGAIN)
        BIO_set_retry_read(bio);
    else if (n < 0)
        s->error = errno;
    else if (n == 0)
        s->ended = true;
    return (int)n;
}

static void
note_first(pf__session *s, char byte)
{
    s->begun = true;
    s->plain = byte != HANDSHAKE_RECORD && (byte & 0x80) == 0;
}

static int
on_read(BIO *bio, char *data, int room)
{
    pf__session *s = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    int n = receive(s, bio, data, room);
    if (n <= 0 || s->begun)
        return n;
    note_first(s, data[0]);
    if (!s->plain)
        return n;
    s->error = EPROTO;
    return -1;
}

static int
on_write(BIO *bio, const char *data, int len)
{
    pf__session *s = BIO_get_data(bio);
    ssize_t n;
    BIO_clear_retry_flags(bio);
    do
        n = send(s->fd, data, (size_t)len, MSG_NOSIGNAL | (s->more ? MSG_MORE : 0));
    while (n < 0 && errno == EINTR);
    if (n < 0 && errno == EAGAIN)
        BIO_set_retry_write(bio);
    else if (n < 0)
        s->error = errno;
    return (int)n;
}

static long
on_control(BIO *bio, int command, long number, void *pointer)
{
    (void)bio, (void)number, (void)pointer;
    return command == BIO_CTRL_FLUSH; /* nothing is held back; it can do nothing else */
}

static BIO_METHOD *method;
static pthread_once_t method_once = PTHREAD_ONCE_INIT;

static void
make_method(void)
{
    BIO_METHOD *m = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "prefork");
    if (m != NULL && BIO_meth_set_read(m, on_read) && BIO_meth_set_write(m, on_write)
        && BIO_meth_set_ctrl(m, on_control))
        method = m;
    else
        BIO_meth_free(m);
}

static bool
connect_bio(pf__session *s)
{
    pthread_once(&method_once, make_method);
    BIO *bio = method ? BIO_new(method) : NULL;
    if (bio == NULL)
        return false;
    BIO_set_data(bio, s);
    BIO_set_init(bio, 1);
    SSL_set_bio(s->ssl, bio, bio); /* which owns it */
    return true;
}

/* ---- its life -----------------------------------------------------------------------*/
static bool
connect_ssl(pf__session *s)
{
    s->blind = pf__tls_in_kernel(s->tls) && s->early == NULL;
    if (!s->blind)
        return connect_bio(s);
    SSL_set_read_ahead(s->ssl, 0); /* the kernel reads records whole */
    SSL_set_options(s->ssl, SSL_OP_IGNORE_UNEXPECTED_EOF); /* HTTP tells, as below */
    return SSL_set_fd(s->ssl, s->fd) == 1;
}

pf__session *
pf__session_new(pf_tls *tls, int fd, const char *early, size_t len)
{
    pf__session *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->fd = fd;
    s->tls = pf__tls_own(tls);
    s->ssl = pf__tls_greet(tls);
    s->early = len > 0 ? malloc(len) : NULL;
    if (s->ssl == NULL || (len > 0 && s->early == NULL) || !connect_ssl(s)) {
        ERR_clear_error();
        pf__session_free(s);
        return NULL;
    }
    if (len > 0)
        memcpy(s->early, early, len);
    s->early_len = len;
    SSL_set_accept_state(s->ssl);
    return s;
}

void
pf__session_free(pf__session *s)
{
    if (s == NULL)
        return;
    SSL_free(s->ssl);
    pf_tls_close(s->tls);
    free(s->early);
    OPENSSL_free(s->chain);
    free(s);
}

void
pf__session_refuse(pf__session *s, int code)
{
    s->refusal = code;
}

int
pf__session_refusal(const pf__session *s)
{
    return s->refusal;
}

/* ---- what OpenSSL says --------------------------------------------------------------*/
/* OpenSSL's BIO does not say what the kernel has: 1: a byte is there, 0: the end is,
 * -EAGAIN: nothing, or -errno. */
static int
peek(const pf__session *s, char *byte)
{
    ssize_t n = recv(s->fd, byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return n < 0 ? -errno : (int)n;
}

/* Of a peer's certificate, what is wrong with it; else what is wrong. */
static void
keep_reason(pf__session *s)
{
    long verdict = SSL_get_verify_result(s->ssl);
    s->reason = verdict != X509_V_OK ? X509_verify_cert_error_string(verdict)
                                     : ERR_reason_error_string(ERR_peek_error());
}

/* 0: the end; -EAGAIN; -errno; or code, if the peer broke the protocol. */
static int
outcome(pf__session *s, int rc, int code)
{
    int error = SSL_get_error(s->ssl, rc);
    s->waits = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
    char byte;
    if (s->waits && s->blind)
        s->dry = peek(s, &byte) == -EAGAIN;
    if (s->waits)
        return -EAGAIN;
    if (error == SSL_ERROR_ZERO_RETURN)
        return 0;
    bool cut =
        error == SSL_ERROR_SSL
        && ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING;
    if (error == SSL_ERROR_SSL && !cut)
        keep_reason(s);
    ERR_clear_error();
    if (s->blind && error == SSL_ERROR_SYSCALL) {
        s->error = errno;
        s->ended = errno == 0;
    }
    if (s->ended || cut)
        return 0; /* without a good-bye: whether something is missing, HTTP tells */
    s->broken = true;
    return error == SSL_ERROR_SYSCALL && s->error != 0 ? -s->error : code;
}

static void
prepare(pf__session *s)
{
    if (ERR_peek_error() != 0) /* somebody else's, which would be taken for ours */
        ERR_clear_error();
    s->error = errno = 0;
    s->reads = 0;
    s->waits = false;
}

/* OpenSSL's BIO shows us no byte that it reads: it gets none before we have seen the
 * first. false: that is not here yet. */
static bool
look_at_first(pf__session *s)
{
    char byte;
    int n = peek(s, &byte);
    s->waits = s->dry = n == -EAGAIN;
    if (n == 1)
        note_first(s, byte);
    return !s->waits;
}

int
pf__session_handshake(pf__session *s)
{
    prepare(s);
    if (s->blind && !s->begun && !look_at_first(s))
        return 0;
    if (s->plain)
        return PF_ERR_TLS_PLAIN;
    int rc = SSL_do_handshake(s->ssl);
    s->wants_room = rc != 1 && SSL_want_write(s->ssl);
    if (rc == 1)
        return 1;
    rc = outcome(s, rc, PF_ERR_TLS_HANDSHAKE);
    if (s->plain)
        return PF_ERR_TLS_PLAIN;
    return rc == 0 ? -ECONNRESET : rc == -EAGAIN ? 0 : rc;
}

ssize_t
pf__session_read(pf__session *s, char *data, size_t room)
{
    size_t n;
    prepare(s);
    int rc = SSL_read_ex(s->ssl, data, room, &n);
    s->wants_room = rc != 1 && SSL_want_write(s->ssl);
    return rc == 1 ? (ssize_t)n : outcome(s, rc, PF_ERR_TLS_RECORD);
}

/* A record that is under way is tried again with the same bytes, of which there may be
 * more by then: what has to be sent first has always been the beginning. */
ssize_t
pf__session_write(pf__session *s, const char *data, size_t len, bool more)
{
    size_t n;
    if (s->broken)
        return -EPIPE;
    prepare(s);
    s->more = more;
    int rc = SSL_write_ex(s->ssl, data, len, &n);
    s->more = false;
    if (rc == 1)
        return (ssize_t)n;
    rc = outcome(s, rc, PF_ERR_TLS_RECORD);
    return rc == 0 ? -EPIPE : rc;
}

bool
pf__session_sends_files(const pf__session *s)
{
    return s->blind && BIO_get_ktls_send(SSL_get_wbio(s->ssl));
}

ssize_t
pf__session_send_file(pf__session *s, int fd, int64_t offset, size_t len)
{
    if (s->broken)
        return -EPIPE;
    prepare(s);
    ssize_t n = SSL_sendfile(s->ssl, fd, offset, len, 0);
    return n >= 0 ? n : outcome(s, (int)n, PF_ERR_TLS_RECORD);
}

/* close_notify (RFC 8446 6.1): nothing is missing. Whether it arrives is the peer's. */
bool
pf__session_shut(pf__session *s)
{
    if (s->broken || s->curt || !SSL_is_init_finished(s->ssl))
        return true;
    prepare(s);
    int rc = SSL_shutdown(s->ssl);
    s->broken = rc >= 0 || !SSL_want_write(s->ssl);
    ERR_clear_error();
    return s->broken;
}

void
pf__session_curt(pf__session *s)
{
    s->curt = true;
}

void
pf__session_wet(pf__session *s, bool last)
{
    s->dry = false;
    s->last = last;
}

bool
pf__session_is_dry(const pf__session *s)
{
    bool all = s->waits || SSL_has_pending(s->ssl) == 0;
    return s->wants_room || (s->early == NULL && s->dry && all);
}

bool
pf__session_wants_room(const pf__session *s)
{
    return s->wants_room;
}

bool
pf__session_begun(const pf__session *s)
{
    return s->begun || s->early != NULL;
}

const char *
pf__session_reason(const pf__session *s)
{
    return s->reason;
}

/* ---- what is known of it ------------------------------------------------------------*/
static bool
append_der(pf__session *s, X509 *x)
{
    int n = i2d_X509(x, NULL);
    if (n <= 0)
        return false;
    unsigned char *longer = OPENSSL_realloc(s->chain, s->chain_len + (size_t)n);
    if (longer == NULL)
        return false;
    s->chain = longer;
    unsigned char *end = longer + s->chain_len;
    i2d_X509(x, &end);
    s->chain_len += (size_t)n;
    return true;
}

/* The certificate first. What was verified; of a resumed session only that is known. */
static void
keep_chain(pf__session *s)
{
    X509 *leaf = SSL_get0_peer_certificate(s->ssl);
    STACK_OF(X509) *chain = SSL_get0_verified_chain(s->ssl);
    if (leaf == NULL || s->chain != NULL || !append_der(s, leaf))
        return;
    for (int i = 1; i < sk_X509_num(chain); i++)
        if (!append_der(s, sk_X509_value(chain, i)))
            return;
}

void
pf__session_describe(pf__session *s, pf_tls_info *info)
{
    const unsigned char *protocol;
    unsigned protocol_len;
    const SSL_CIPHER *cipher = SSL_get_current_cipher(s->ssl);
    *info = (pf_tls_info){.version = SSL_version(s->ssl)};
    info->resumed = SSL_session_reused(s->ssl) == 1;
    info->version_name = SSL_get_version(s->ssl);
    info->cipher = cipher ? SSL_CIPHER_get_protocol_id(cipher) : 0;
    info->cipher_name = cipher ? SSL_CIPHER_standard_name(cipher) : "";
    info->server_name = SSL_get_servername(s->ssl, TLSEXT_NAMETYPE_host_name);
    SSL_get0_alpn_selected(s->ssl, &protocol, &protocol_len);
    info->protocol = (const char *)protocol;
    info->protocol_len = protocol_len;
    pf__tls_certificate(s->ssl, &info->server, &info->server_len);
    keep_chain(s);
    info->client = s->chain;
    info->client_len = s->chain_len;
}
