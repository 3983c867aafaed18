/* test_tls.c - certificates, and connections that speak TLS, with OpenSSL as the peer.
 *
 * The peer's records pass through our hands, so that they can be sent byte by byte, cut
 * off, or held back.
 */
#define _GNU_SOURCE
#undef NDEBUG
#include "live.h"

#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <signal.h>
#include <stdio.h>

typedef struct pem {
    char cert[4096], key[4096], secret[4096]; /* secret: the key, encrypted */
    X509 *x;
    EVP_PKEY *pkey;
} pem;

static pem authority, one, two, client_pem;

/* ---- certificates -------------------------------------------------------------------*/
static void
written(BIO *bio, char text[4096])
{
    int n = BIO_read(bio, text, 4095);
    assert(n > 0);
    text[n] = '\0';
    BIO_free(bio);
}

static void
set_name(X509_NAME *name, const char *text)
{
    assert(X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC,
                                      (const unsigned char *)text, -1, -1, 0)
           == 1);
}

static void
extend(X509 *x, int nid, const char *value)
{
    X509_EXTENSION *e = X509V3_EXT_conf_nid(NULL, NULL, nid, value);
    assert(e != NULL && X509_add_ext(x, e, -1) == 1);
    X509_EXTENSION_free(e);
}

static void
make_certificate(pem *p, const char *name, const char *names, const pem *by)
{
    static long serial = 0x1234;
    p->pkey = EVP_EC_gen("P-256");
    p->x = X509_new();
    assert(p->pkey != NULL && p->x != NULL);
    X509_set_version(p->x, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(p->x), serial++);
    X509_gmtime_adj(X509_getm_notBefore(p->x), -3600);
    X509_gmtime_adj(X509_getm_notAfter(p->x), 3600);
    X509_set_pubkey(p->x, p->pkey);
    set_name(X509_get_subject_name(p->x), name);
    X509_set_issuer_name(p->x, X509_get_subject_name(by ? by->x : p->x));
    if (names != NULL)
        extend(p->x, NID_subject_alt_name, names);
    if (by == NULL)
        extend(p->x, NID_basic_constraints, "critical,CA:TRUE");
    assert(X509_sign(p->x, by ? by->pkey : p->pkey, EVP_sha256()) > 0);
    BIO *bio = BIO_new(BIO_s_mem());
    PEM_write_bio_X509(bio, p->x);
    written(bio, p->cert);
    bio = BIO_new(BIO_s_mem());
    PEM_write_bio_PrivateKey(bio, p->pkey, NULL, NULL, 0, NULL, NULL);
    written(bio, p->key);
    bio = BIO_new(BIO_s_mem());
    PEM_write_bio_PKCS8PrivateKey(bio, p->pkey, EVP_aes_256_cbc(), "sesame", 6, NULL,
                                  NULL);
    written(bio, p->secret);
}

static void
free_certificate(pem *p)
{
    X509_free(p->x);
    EVP_PKEY_free(p->pkey);
}

static pf_tls_options
plain_options(void)
{
    return (pf_tls_options){.min_version = PF_TLS_1_2};
}

static pf_tls_key
key_of(const pem *p)
{
    return (pf_tls_key){.cert = p->cert,
                        .cert_len = strlen(p->cert),
                        .key = p->key,
                        .key_len = strlen(p->key)};
}

static pf_tls *
opened_tls(const pf_tls_options *o)
{
    pf_tls *tls;
    pf_tls_key first = key_of(&one), second = key_of(&two);
    assert(pf_tls_open(&tls, o) == 0);
    assert(pf_tls_add(tls, &first) == 0 && pf_tls_add(tls, &second) == 1);
    return tls;
}

static void
adding_is_refused(pf_tls_key key, int code)
{
    pf_tls *tls;
    pf_tls_options o = plain_options();
    assert(pf_tls_open(&tls, &o) == 0);
    assert(pf_tls_add(tls, &key) == code);
    key = key_of(&one);
    assert(pf_tls_add(tls, &key) == 0); /* it is as it was before */
    pf_tls_close(tls);
}

static void
a_wrong_certificate_or_key_is_told(void)
{
    pf_tls_key key = key_of(&one);
    key.cert_len = 60;
    adding_is_refused(key, PF_ERR_TLS_CERTIFICATE);
    key = key_of(&one);
    key.key_len = 60;
    adding_is_refused(key, PF_ERR_TLS_KEY);
    key = key_of(&one);
    key.key = NULL; /* and there is none beside the certificate */
    adding_is_refused(key, PF_ERR_TLS_KEY);
    key = key_of(&one);
    key.key = two.key;
    key.key_len = strlen(two.key);
    adding_is_refused(key, PF_ERR_TLS_MISMATCH);
    key = key_of(&one);
    key.staple = "x";
    key.staple_len = 1;
    adding_is_refused(key, PF_ERR_TLS_STAPLE);
}

static void
a_key_may_have_a_password(void)
{
    pf_tls *tls;
    pf_tls_options o = plain_options();
    pf_tls_key key = key_of(&one);
    key.key = one.secret;
    key.key_len = strlen(one.secret);
    adding_is_refused(key, PF_ERR_TLS_PASSWORD);
    key.password = "open";
    adding_is_refused(key, PF_ERR_TLS_PASSWORD);
    key.password = "sesame";
    assert(pf_tls_open(&tls, &o) == 0 && pf_tls_add(tls, &key) == 0);
    pf_tls_close(tls);
}

static void
a_wrong_option_is_told(void)
{
    pf_tls *tls;
    pf_tls_options o = plain_options();
    o.min_version = 0x0302;
    assert(pf_tls_open(&tls, &o) == PF_ERR_TLS_VERSION);
    o = plain_options();
    o.ciphers = "NO-SUCH";
    assert(pf_tls_open(&tls, &o) == PF_ERR_TLS_CIPHERS);
    o = plain_options();
    o.verify = PF_TLS_VERIFY_REQUIRED;
    assert(pf_tls_open(&tls, &o) == PF_ERR_TLS_AUTHORITY);
    o.ca = "no certificate";
    o.ca_len = strlen(o.ca);
    assert(pf_tls_open(&tls, &o) == PF_ERR_TLS_AUTHORITY);
}

static void
the_facts_of_a_certificate(void)
{
    unsigned char *der = NULL;
    int n = i2d_X509(one.x, &der);
    pf_certificate facts;
    assert(pf_tls_describe(der, (size_t)n, &facts) == 0);
    assert(facts.size == (size_t)n && strcmp(facts.subject, "CN=one") == 0);
    assert(strcmp(facts.issuer, "CN=authority") == 0 && strlen(facts.serial) == 4);
    assert(facts.not_after - facts.not_before == 7200);
    assert(memcmp(facts.names, "one.test\0", 10) == 0);
    assert(strcmp(facts.pem, one.cert) == 0);
    pf_tls_forget(&facts);
    for (int cut = 0; cut < n; cut++)
        assert(pf_tls_describe(der, (size_t)cut, &facts) == PF_ERR_TLS_CERTIFICATE);
    OPENSSL_free(der);
}

/* ---- a peer -------------------------------------------------------------------------*/
typedef struct peer {
    int fd;
    SSL_CTX *context;
    SSL *ssl;
    BIO *in, *out; /* what it hears and says */
    int piece;     /* bytes of its records that are sent at once; 0: all */
    size_t budget; /* of them that are sent at all */
    bool deaf;     /* the server has closed */
} peer;

static SSL_SESSION *kept;

static peer
new_peer(const char *name, int version)
{
    peer p = {.fd = connected_peer(), .budget = SIZE_MAX};
    int on = 1;
    setsockopt(p.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    p.context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_max_proto_version(p.context, version);
    SSL_CTX_set_min_proto_version(p.context, version);
    SSL_CTX_set_session_cache_mode(p.context,
                                   SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    X509_STORE_add_cert(SSL_CTX_get_cert_store(p.context), authority.x);
    p.ssl = SSL_new(p.context);
    p.in = BIO_new(BIO_s_mem());
    p.out = BIO_new(BIO_s_mem());
    BIO_set_mem_eof_return(p.in, -1);
    SSL_set_bio(p.ssl, p.in, p.out);
    SSL_set_connect_state(p.ssl);
    if (name != NULL)
        SSL_set_tlsext_host_name(p.ssl, name);
    return p;
}

static void
free_peer(peer *p)
{
    SSL_free(p->ssl);
    SSL_CTX_free(p->context);
    close(p->fd);
}

static void
turn(void)
{
    pf_event event;
    assert(pf_loop_wait(loop, &event, 1, 0) == 0);
}

/* What it has said goes out, what came for it comes in. */
static void
exchange(peer *p)
{
    char data[16384];
    int n;
    while ((n = BIO_read(p->out, data, p->piece ? p->piece : (int)sizeof data)) > 0) {
        size_t left = (size_t)n < p->budget ? (size_t)n : p->budget;
        if (left > 0)
            say_bytes(p->fd, data, left);
        p->budget -= left;
        if (p->piece > 0 && BIO_pending(p->out) > 0)
            turn();
    }
    while ((n = (int)recv(p->fd, data, sizeof data, MSG_DONTWAIT)) > 0)
        assert(BIO_write(p->in, data, n) == n);
    p->deaf = n == 0 || errno != EAGAIN;
}

static int
shake_hands(peer *p)
{
    int rc = 0;
    for (int i = 0; i < 100 && rc != 1 && !p->deaf; i++) {
        rc = SSL_do_handshake(p->ssl);
        exchange(p);
        if (rc != 1)
            turn();
        if (rc != 1 && SSL_get_error(p->ssl, rc) == SSL_ERROR_SSL)
            break;
    }
    ERR_clear_error();
    return rc;
}

static void
tell(peer *p, const char *text)
{
    assert(SSL_write(p->ssl, text, (int)strlen(text)) == (int)strlen(text));
    exchange(p);
}

/* What it is told next; 0: that is the end; -1: there was no good-bye. */
static int
told(peer *p, char *data, int room)
{
    for (int64_t end = clock_ms() + SOON_MS; clock_ms() < end;) {
        int n = SSL_read(p->ssl, data, room);
        if (n > 0)
            return n;
        if (SSL_get_error(p->ssl, n) == SSL_ERROR_ZERO_RETURN)
            return 0;
        if (p->deaf)
            return -1;
        turn();
        exchange(p);
    }
    abort();
}

static const char *
told_until(peer *p, const char *text)
{
    size_t len = 0;
    do {
        int n = told(p, heard + len, (int)(sizeof heard - len - 1));
        assert(n > 0);
        len += (size_t)n;
        heard[len] = '\0';
    } while (strstr(heard, text) == NULL);
    return heard;
}

static void
open_secure(pf_tls *tls)
{
    open_server(0);
    assert(pf_loop_secure(loop, tls) == 0);
    pf_tls_close(tls); /* the loop has its part */
}

static bool in_kernel; /* ask for that; without the module, OpenSSL's BIO is tried */

static void
open_plainly_secure(void)
{
    pf_tls_options o = plain_options();
    o.kernel = in_kernel;
    open_secure(opened_tls(&o));
}

static void
close_peer_and_server(peer *p)
{
    free_peer(p);
    turn_until(nobody_is_connected);
    close_server();
}

static void
is_served(peer *p)
{
    tell(p, GET);
    answer(next_request(), "hello");
    told_until(p, "hello");
}

/* ---- connections --------------------------------------------------------------------*/
static void
requests_are_answered(int version, int piece)
{
    open_plainly_secure();
    peer p = new_peer("one.test", version);
    p.piece = piece;
    assert(shake_hands(&p) == 1);
    is_served(&p);
    is_served(&p);
    assert(stats().requests == 2);
    close_peer_and_server(&p);
}

static void
requests_are_answered_in_both_versions_and_byte_by_byte(void)
{
    requests_are_answered(TLS1_2_VERSION, 0);
    requests_are_answered(TLS1_3_VERSION, 0);
    requests_are_answered(TLS1_2_VERSION, 1);
    requests_are_answered(TLS1_3_VERSION, 1);
}

static void
older_versions_are_refused(void)
{
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_1_VERSION);
    SSL_set_security_level(p.ssl, 0);
    assert(shake_hands(&p) != 1);
    close_peer_and_server(&p);
}

static void
a_request_tells_its_tls(void)
{
    open_plainly_secure();
    peer p = new_peer("one.test", TLS1_3_VERSION);
    SSL_set_alpn_protos(p.ssl, (const unsigned char *)"\2h2\10http/1.1", 12);
    assert(shake_hands(&p) == 1);
    tell(&p, GET);
    pf_request *r = next_request();
    pf_tls_info info;
    assert(pf_request_tls(r, &info) == 1);
    assert(info.version == PF_TLS_1_3 && strcmp(info.version_name, "TLSv1.3") == 0);
    assert(info.cipher >> 8 == 0x13 && !info.resumed && info.client == NULL);
    assert(strcmp(info.server_name, "one.test") == 0);
    assert(info.protocol_len == 8 && memcmp(info.protocol, "http/1.1", 8) == 0);
    answer(r, "");
    close_peer_and_server(&p);
}

static void
is_shown(const char *asked, const pem *expected)
{
    open_plainly_secure();
    peer p = new_peer(asked, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    assert(X509_cmp(SSL_get0_peer_certificate(p.ssl), expected->x) == 0);
    close_peer_and_server(&p);
}

static void
the_name_asked_for_chooses_the_certificate(void)
{
    is_shown("one.test", &one);
    is_shown("two.test", &two);
    is_shown("TWO.test", &two);
    is_shown("a.two.test", &two);
    is_shown("a.b.two.test", &one); /* a wildcard is one label */
    is_shown(".two.test", &one);
    is_shown("unknown.test", &one);
    is_shown(NULL, &one);
}

static void
who_offers_only_other_protocols_is_refused(void)
{
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION);
    SSL_set_alpn_protos(p.ssl, (const unsigned char *)"\2h2", 3);
    assert(shake_hands(&p) != 1);
    close_peer_and_server(&p);
}

static void
plain_http_is_answered_in_clear(void)
{
    open_plainly_secure();
    for (const char *text = "GET / HTTP/1.1\r\n\r\n"; text != NULL;
         text = *text == 'G' ? "OPTIONS * HTTP/1.1\r\n\r\n" : NULL) {
        int fd = peer_saying(text);
        assert(says(hear_answer(fd), "HTTP/1.1 400 Bad Request"));
        hear_end(fd);
        close(fd);
    }
    turn_until(nobody_is_connected);
    close_server();
}

/* Whatever comes, and wherever it ends: nobody waits, and nothing is left. */
static void
garbage_ends_the_connection(void)
{
    static const char *const texts[] = {"\x16\x03\x01\x00\x05hello",
                                        "\x16\x03\x01\xff\xff",
                                        "\x80\x80\x01\x03\x01",
                                        "\xff\xff\xff\xff\xff\xff",
                                        "\x16\x01",
                                        "\x16"};
    open_plainly_secure();
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        int fd = connected_peer();
        say_bytes(fd, texts[i], strlen(texts[i]));
        shutdown(fd, SHUT_WR);
        while (hear_byte(fd, heard) == 1)
            continue;
        close(fd);
    }
    turn_until(nobody_is_connected);
    close_server();
}

/* Its session is here: no other worker could go on with it. */
static void
who_has_said_something_stays(void)
{
    open_plainly_secure();
    int fd = peer_saying("\x16");
    quiet(20);
    assert(!pf__conn_is_quiet(loop->conns));
    close(fd);
    turn_until(nobody_is_connected);
    peer p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    is_served(&p);
    assert(!pf__conn_is_quiet(loop->conns));
    close_peer_and_server(&p);
}

static void
a_handshake_may_end_anywhere(void)
{
    open_plainly_secure();
    for (size_t budget = 0; budget < 600; budget += budget < 32 ? 1 : 37) {
        peer p = new_peer("one.test", TLS1_3_VERSION);
        p.budget = budget;
        shake_hands(&p);
        free_peer(&p);
        turn_until(nobody_is_connected);
    }
    close_server();
}

static void
a_handshake_takes_so_long(void)
{
    pf_tls_options o = plain_options();
    options.tls_timeout_ms = 20;
    open_secure(opened_tls(&o));
    int fd = peer_saying("\x16\x03");
    hear_end(fd);
    assert(stats().timeouts == 1);
    close(fd);
    turn_until(nobody_is_connected);
    close_server();
}

static bool
somebody_came(void)
{
    return stats().closed > 0;
}

static void
who_only_looks_whether_we_are_there_is_no_error(void)
{
    pf_notice notices[8];
    pf_tls_options o = plain_options();
    options.flags |= PF_OPTION_NOTICES;
    open_secure(opened_tls(&o));
    close(connected_peer());
    turn_until(somebody_came);
    int n = pf_loop_notices(loop, notices, 8);
    for (int i = 0; i < n; i++)
        assert(notices[i].kind != PF_NOTICE_ERROR);
    assert(n == 2 && stats().refused == 0);
    close_server();
}

static void
over_the_limit_is_told_in_tls(void)
{
    pf_tls_options o = plain_options();
    options.max_connections = 1;
    open_secure(opened_tls(&o));
    peer p = new_peer(NULL, TLS1_3_VERSION), q = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1 && shake_hands(&q) == 1);
    told_until(&q, "HTTP/1.1 503");
    while (told(&q, heard, 100) > 0)
        continue;
    free_peer(&q);
    close_peer_and_server(&p);
}

/* ---- the end ------------------------------------------------------------------------*/
static void
a_close_is_told_from_a_cut(void)
{
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    tell(&p, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    answer(next_request(), "all of it");
    told_until(&p, "all of it");
    assert(told(&p, heard, 100) == 0);
    free_peer(&p);

    p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    tell(&p, GET);
    pf_request *r = next_request();
    begin(r, 100);
    assert(pf_request_write(r, "a part", 6) >= 0);
    told_until(&p, "a part");
    pf_request_abort(r);
    assert(told(&p, heard, 100) == -1);
    close_peer_and_server(&p);
}

static void
who_has_closed_its_side_is_still_answered(void)
{
    for (int says_so = 0; says_so < 2; says_so++) {
        open_plainly_secure();
        peer p = new_peer(NULL, TLS1_3_VERSION);
        assert(shake_hands(&p) == 1);
        SSL_write(p.ssl, GET, (int)strlen(GET));
        if (says_so)
            SSL_shutdown(p.ssl);
        exchange(&p);
        shutdown(p.fd, SHUT_WR);
        answer(next_request(), "hello");
        if (!says_so) {
            told_until(&p, "hello");
        } else {
            BIO *raw = p.in; /* a client that has said good-bye may still listen */
            turn_until(nobody_is_connected);
            exchange(&p);
            assert(BIO_pending(raw) > 5);
        }
        close_peer_and_server(&p);
    }
}

static void
a_malformed_record_ends_it(void)
{
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    say_bytes(p.fd, "\x17\x03\x03\x00\x10garbage garbage!", 21);
    assert(told(&p, heard, 100) <= 0);
    close_peer_and_server(&p);
}

static void
records_that_are_for_tls_alone_hold_up_nobody(void)
{
    enum { FLOOD = 6000 };
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION), q = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1 && shake_hands(&q) == 1);
    for (int i = 0; i < FLOOD; i++) {
        assert(SSL_key_update(p.ssl, SSL_KEY_UPDATE_NOT_REQUESTED) == 1);
        assert(SSL_do_handshake(p.ssl) == 1);
    }
    exchange(&p);
    tell(&q, GET);
    answer(next_request(), "hello");
    bool amid_the_flood = false;
    for (const pf_conn *conn = loop->conns; conn != NULL; conn = conn->next)
        amid_the_flood |= conn->readable && conn->served == 0;
    assert(amid_the_flood);
    told_until(&q, "hello");
    tell(&p, GET);
    answer(next_request(), "you, too");
    told_until(&p, "you, too");
    free_peer(&q);
    close_peer_and_server(&p);
}

static void
half_a_record_is_waited_for_asleep(void)
{
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    assert(SSL_write(p.ssl, GET, (int)strlen(GET)) > 0);
    p.budget = 20;
    exchange(&p);
    quiet(50); /* reads it */
    assert(loop->conns->readable == false && loop->dirty == NULL);
    close_peer_and_server(&p);
}

static bool
is_asleep(void)
{
    return loop->dirty == NULL && !loop->conns->readable;
}

/* Each new key that is asked for is answered: to who does not read that, no more. */
static void
who_does_not_read_what_it_asks_for_is_waited_for_asleep(void)
{
    enum { FLOOD = 6000 };
    int small = 2048;
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    setsockopt(p.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    setsockopt(loop->conns->source.fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    for (int i = 0; i < FLOOD; i++) {
        assert(SSL_key_update(p.ssl, SSL_KEY_UPDATE_REQUESTED) == 1);
        assert(SSL_do_handshake(p.ssl) == 1);
    }
    char records[16384];
    for (int n; (n = BIO_read(p.out, records, sizeof records)) > 0; turn())
        say_bytes(p.fd, records, (size_t)n);
    turn_until(is_asleep);
    tell(&p, GET);
    pf_event event;
    for (int64_t end = clock_ms() + SOON_MS; pf_loop_wait(loop, &event, 1, 0) == 0;) {
        assert(clock_ms() < end);
        exchange(&p); /* now it reads */
    }
    answer(event.request, "hello");
    told_until(&p, "hello");
    close_peer_and_server(&p);
}

static void
a_new_key_may_be_asked_for(void)
{
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    for (int i = 0; i < 3; i++) {
        assert(SSL_key_update(p.ssl, SSL_KEY_UPDATE_REQUESTED) == 1);
        assert(SSL_do_handshake(p.ssl) == 1);
        is_served(&p);
    }
    close_peer_and_server(&p);
}

/* ---- large answers and bodies -------------------------------------------------------*/
static char large[1 << 20];

static void
is_told_all(peer *p, size_t len)
{
    size_t at = 0;
    told_until(p, "\r\n\r\n");
    const char *body = strstr(heard, "\r\n\r\n") + 4;
    for (size_t n = strlen(body); at < len;) {
        assert(memcmp(large + at, body, n) == 0);
        at += n;
        if (at == len)
            return;
        int more = told(p, heard, sizeof heard);
        assert(more > 0);
        body = heard;
        n = (size_t)more;
    }
}

static void
no_byte_of_a_large_answer_is_lost(void)
{
    for (size_t i = 0; i < sizeof large; i++)
        large[i] = (char)('a' + i * i % 23);
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    tell(&p, GET); /* copied */
    assert(pf_request_answer(next_request(), 200, NULL, 0, large, sizeof large, NULL)
           == 0);
    is_told_all(&p, sizeof large);
    tell(&p, GET); /* borrowed, in pieces of all sizes */
    pf_request *r = next_request();
    begin(r, sizeof large);
    int refs = 0;
    for (size_t at = 0, n = 1; at < sizeof large; at += n, n = n * 3 % 70001) {
        n = n < sizeof large - at ? n : sizeof large - at;
        if (pf_request_borrows(r, n)) {
            assert(pf_request_write_ref(r, large + at, n, &refs) >= 0);
            refs++;
        } else {
            assert(pf_request_write(r, large + at, n) >= 0);
        }
    }
    assert(pf_request_end(r) == 0);
    size_t at = 0;
    while (at < sizeof large) { /* RELEASED comes in between */
        pf_event event;
        char data[16384];
        while (pf_loop_wait(loop, &event, 1, 0) > 0) {
            assert(event.flags == PF_EVENT_RELEASED);
            refs--;
        }
        exchange(&p);
        for (int n; (n = SSL_read(p.ssl, data, sizeof data)) > 0;) {
            char *body = data;
            if (at == 0) {
                body = (char *)memmem(data, (size_t)n, "\r\n\r\n", 4) + 4;
                n -= (int)(body - data);
            }
            assert(memcmp(large + at, body, (size_t)n) == 0);
            at += (size_t)n;
        }
    }
    while (refs > 0) {
        expect_event(PF_EVENT_RELEASED, NULL);
        refs--;
    }
    close_peer_and_server(&p);
}

/* Where an answer has filled what the kernel takes, its good-bye comes later. */
static void
a_good_bye_waits_for_room(void)
{
    pf_tls_options o = plain_options();
    pf_tls *tls = opened_tls(&o);
    int least = 1;
    open_on(listen_unix());
    assert(pf_loop_secure(loop, tls) == 0);
    pf_tls_close(tls);
    for (size_t len = 100; len < 8000; len += 100) {
        peer p = new_peer(NULL, TLS1_3_VERSION);
        assert(shake_hands(&p) == 1);
        setsockopt(loop->conns->source.fd, SOL_SOCKET, SO_SNDBUF, &least, sizeof least);
        tell(&p, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert(pf_request_answer(next_request(), 200, NULL, 0, large, len, NULL) == 0);
        turn();
        turn();
        int n;
        while ((n = told(&p, heard, sizeof heard)) > 0)
            continue;
        assert(n == 0);
        free_peer(&p);
        turn_until(nobody_is_connected);
    }
    close_server();
}

static void
pipelined_requests_may_share_a_record(void)
{
    open_plainly_secure();
    peer p = new_peer(NULL, TLS1_3_VERSION);
    assert(shake_hands(&p) == 1);
    tell(&p, GET GET GET);
    for (int i = 0; i < 3; i++)
        answer(next_request(), i < 2 ? "more" : "last");
    told_until(&p, "last");
    close_peer_and_server(&p);
}

/* ---- clients with certificates ------------------------------------------------------*/
static void
a_client_may_have_to_show_a_certificate(void)
{
    pf_tls_options o = plain_options();
    o.verify = PF_TLS_VERIFY_REQUIRED;
    o.ca = authority.cert;
    o.ca_len = strlen(authority.cert);
    open_secure(opened_tls(&o));
    peer p = new_peer(NULL, TLS1_2_VERSION);
    assert(shake_hands(&p) != 1);
    free_peer(&p);

    p = new_peer(NULL, TLS1_3_VERSION);
    SSL_use_certificate(p.ssl, client_pem.x);
    SSL_use_PrivateKey(p.ssl, client_pem.pkey);
    assert(shake_hands(&p) == 1);
    tell(&p, GET);
    pf_request *r = next_request();
    pf_tls_info info;
    pf_certificate facts;
    assert(pf_request_tls(r, &info) == 1 && info.client != NULL);
    assert(pf_tls_describe(info.client, info.client_len, &facts) == 0);
    assert(strcmp(facts.subject, "CN=client") == 0);
    assert(facts.size < info.client_len); /* who vouches for it follows */
    pf_tls_forget(&facts);
    answer(r, "");
    close_peer_and_server(&p);
}

/* ---- sessions -----------------------------------------------------------------------*/
static pf_tickets tickets;

static void
open_sharing(void)
{
    pf_tls_options o = plain_options();
    pf_tls *tls = opened_tls(&o);
    pf_tls_share(tls, &tickets);
    open_secure(tls);
}

static bool
is_resumed(int version)
{
    peer p = new_peer("one.test", version);
    if (kept != NULL)
        SSL_set_session(p.ssl, kept);
    assert(shake_hands(&p) == 1);
    is_served(&p);
    bool resumed = SSL_session_reused(p.ssl) == 1;
    SSL_SESSION_free(kept);
    kept = SSL_get1_session(p.ssl); /* with the newest ticket */
    SSL_shutdown(p.ssl);
    exchange(&p);
    free_peer(&p);
    turn_until(nobody_is_connected);
    return resumed;
}

static void
a_session_is_resumed_by_whoever_has_the_key(int version)
{
    assert(pf_tls_rotate(&tickets) == 0);
    open_sharing();
    assert(!is_resumed(version));
    assert(is_resumed(version));
    close_server();
    open_sharing(); /* another worker */
    assert(is_resumed(version));
    for (int i = 1; i < PF_TICKET_KEYS; i++)
        assert(pf_tls_rotate(&tickets) == 0);
    SSL_SESSION *old = kept;
    SSL_SESSION_up_ref(old);
    assert(is_resumed(version)); /* it gets a newer ticket */
    assert(pf_tls_rotate(&tickets) == 0);
    assert(is_resumed(version));
    SSL_SESSION_free(kept);
    kept = old;
    assert(!is_resumed(version)); /* the key of the old one is gone */
    close_server();
    SSL_SESSION_free(kept);
    kept = NULL;
}

static void
sessions_are_resumed_in_both_versions(void)
{
    a_session_is_resumed_by_whoever_has_the_key(TLS1_2_VERSION);
    a_session_is_resumed_by_whoever_has_the_key(TLS1_3_VERSION);
}

/* A master that was killed while it changed the keys must not stop its workers. */
static void
keys_that_never_are_whole_hold_up_nobody(void)
{
    assert(pf_tls_rotate(&tickets) == 0);
    tickets.version++;
    open_sharing();
    assert(!is_resumed(TLS1_3_VERSION));
    assert(is_resumed(TLS1_3_VERSION));
    tickets.version++;
    assert(!is_resumed(TLS1_3_VERSION));
    close_server();
    SSL_SESSION_free(kept);
    kept = NULL;
}

static void
a_certificate_that_has_expired_resumes_nothing(int version)
{
    pf_tls_options o = plain_options();
    pem brief;
    make_certificate(&brief, "brief", NULL, &authority);
    X509_gmtime_adj(X509_getm_notAfter(brief.x), 2);
    assert(X509_sign(brief.x, authority.pkey, EVP_sha256()) > 0);
    o.verify = PF_TLS_VERIFY_REQUIRED;
    o.ca = authority.cert;
    o.ca_len = strlen(authority.cert);
    open_secure(opened_tls(&o));
    int shaken = 0, resumed = 0;
    for (int64_t end = clock_ms() + SOON_MS; shaken == 0 || kept != NULL;) {
        assert(clock_ms() < end);
        peer p = new_peer(NULL, version);
        SSL_use_certificate(p.ssl, brief.x);
        SSL_use_PrivateKey(p.ssl, brief.pkey);
        if (kept != NULL)
            SSL_set_session(p.ssl, kept);
        SSL_SESSION_free(kept);
        kept = NULL;
        shake_hands(&p);
        SSL_write(p.ssl, GET, (int)strlen(GET));
        exchange(&p);
        pf_event event;
        if (pf_loop_wait(loop, &event, 1, 10) == 1) { /* let in */
            answer(event.request, "hello");
            told_until(&p, "hello");
            kept = SSL_get1_session(p.ssl);
            resumed += SSL_session_reused(p.ssl);
            shaken++;
            SSL_shutdown(p.ssl);
            exchange(&p);
        }
        ERR_clear_error();
        free_peer(&p);
        turn_until(nobody_is_connected);
    }
    assert(resumed > 0);
    close_server();
    free_certificate(&brief);
}

static void
clients_that_have_expired_are_let_in_no_more(void)
{
    a_certificate_that_has_expired_resumes_nothing(TLS1_2_VERSION);
    a_certificate_that_has_expired_resumes_nothing(TLS1_3_VERSION);
}

int
main(void)
{
    pf_options_init(&options);
    make_certificate(&authority, "authority", NULL, NULL);
    make_certificate(&one, "one", "DNS:one.test", &authority);
    make_certificate(&two, "two", "DNS:two.test,DNS:*.two.test", &authority);
    make_certificate(&client_pem, "client", NULL, &authority);

    a_wrong_certificate_or_key_is_told();
    a_key_may_have_a_password();
    a_wrong_option_is_told();
    the_facts_of_a_certificate();
    requests_are_answered_in_both_versions_and_byte_by_byte();
    older_versions_are_refused();
    a_request_tells_its_tls();
    the_name_asked_for_chooses_the_certificate();
    who_offers_only_other_protocols_is_refused();
    plain_http_is_answered_in_clear();
    garbage_ends_the_connection();
    who_has_said_something_stays();
    a_handshake_may_end_anywhere();
    a_handshake_takes_so_long();
    who_only_looks_whether_we_are_there_is_no_error();
    over_the_limit_is_told_in_tls();
    a_close_is_told_from_a_cut();
    who_has_closed_its_side_is_still_answered();
    a_malformed_record_ends_it();
    records_that_are_for_tls_alone_hold_up_nobody();
    half_a_record_is_waited_for_asleep();
    who_does_not_read_what_it_asks_for_is_waited_for_asleep();
    a_new_key_may_be_asked_for();
    no_byte_of_a_large_answer_is_lost();
    a_good_bye_waits_for_room();
    pipelined_requests_may_share_a_record();
    a_client_may_have_to_show_a_certificate();
    signal(SIGPIPE, SIG_IGN);
    in_kernel = true;
    requests_are_answered_in_both_versions_and_byte_by_byte();
    plain_http_is_answered_in_clear();
    garbage_ends_the_connection();
    who_has_said_something_stays();
    a_handshake_may_end_anywhere();
    a_close_is_told_from_a_cut();
    who_has_closed_its_side_is_still_answered();
    a_malformed_record_ends_it();
    half_a_record_is_waited_for_asleep();
    who_does_not_read_what_it_asks_for_is_waited_for_asleep();
    a_new_key_may_be_asked_for();
    no_byte_of_a_large_answer_is_lost();
    pipelined_requests_may_share_a_record();
    in_kernel = false;
    sessions_are_resumed_in_both_versions();
    keys_that_never_are_whole_hold_up_nobody();
    clients_that_have_expired_are_let_in_no_more();

    free_certificate(&authority);
    free_certificate(&one);
    free_certificate(&two);
    free_certificate(&client_pem);
    puts("tls: good");
    return 0;
}
