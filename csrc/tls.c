/* tls.c - certificates, and how they are used: what all TLS connections share.
 *
 * Each certificate has a context of OpenSSL's, and all of them are alike but for it: the
 * first greets everybody, and changes places with the one of the name that the client
 * asks for. Nothing is written once a connection uses it, but for the ticket keys where
 * they are our own; so a fork shares it, and a new one can take its place at any time,
 * while connections go on with theirs.
 */
#include "internal.h"

#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/ocsp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdatomic.h>
#include <strings.h>

enum {
    OWN_ROTATION_S = 8 * 3600, /* how old our own ticket key gets */
    COPIES_MAX = 1000,         /* of ticket keys that change meanwhile */
    REASON_MAX = 256,
    NAME_MAX_LEN = 253, /* of the DNS */
};

/* Forward secret AEADs: the "intermediate" list of Mozilla's server side TLS, 5.7. */
static const char CIPHERS[] =
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305";

typedef struct entry {
    pf_tls *tls;
    SSL_CTX *context;
    char *names; /* each ended by a NUL, and one more */
    unsigned char *der;
    int der_len;
    char *staple;
    size_t staple_len;
} entry;

struct pf_tls {
    _Atomic uint32_t owners;
    int min_version, verify;
    bool kernel;
    char *ciphers, *ciphersuites; /* own; NULL: the default ones */
    X509_STORE *authorities;
    STACK_OF(X509_NAME) * authority_names;
    unsigned char session_id[SHA256_DIGEST_LENGTH]; /* whose sessions can be resumed */
    entry **entries; /* do not move: contexts point to them */
    uint32_t count;
    pf_tickets *tickets; /* own_tickets, or borrowed */
    pf_tickets own_tickets;
    char reason[REASON_MAX];
};

/* ---- errors -------------------------------------------------------------------------*/
static int
fail(pf_tls *tls, int code)
{
    unsigned long error = ERR_peek_last_error();
    const char *text = error != 0 ? ERR_reason_error_string(error) : NULL;
    tls->reason[0] = '\0';
    if (text != NULL)
        strncat(tls->reason, text, REASON_MAX - 1);
    ERR_clear_error();
    return code;
}

const char *
pf_tls_reason(const pf_tls *tls)
{
    return tls->reason;
}

/* ---- authorities --------------------------------------------------------------------*/
static X509 *
next_certificate(BIO *pem)
{
    return PEM_read_bio_X509(pem, NULL, NULL, NULL);
}

static bool
add_authority(pf_tls *tls, X509 *x)
{
    X509_NAME *name = X509_NAME_dup(X509_get_subject_name(x));
    if (name == NULL)
        return false;
    if (sk_X509_NAME_push(tls->authority_names, name) <= 0) {
        X509_NAME_free(name);
        return false;
    }
    return X509_STORE_add_cert(tls->authorities, x) == 1;
}

static int
read_authorities(pf_tls *tls, const char *data, size_t len)
{
    BIO *pem = BIO_new_mem_buf(data, (int)len);
    tls->authorities = X509_STORE_new();
    tls->authority_names = sk_X509_NAME_new_null();
    if (pem == NULL || tls->authorities == NULL || tls->authority_names == NULL) {
        BIO_free(pem);
        return -ENOMEM;
    }
    int n = 0;
    bool good = true;
    for (X509 *x; good && (x = next_certificate(pem)) != NULL; n++) {
        good = add_authority(tls, x);
        X509_free(x);
    }
    /* what ends the list is that no other begins */
    good = good && ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
    BIO_free(pem);
    if (n == 0 || !good)
        return fail(tls, PF_ERR_TLS_AUTHORITY);
    ERR_clear_error();
    return 0;
}

/* ---- the name that a client asks for ------------------------------------------------*/
static bool
has_name(const entry *e, const char *name)
{
    for (const char *own = e->names; *own != '\0'; own += strlen(own) + 1)
        if (strcasecmp(own, name) == 0)
            return true;
    return false;
}

/* RFC 9525 6.3: the wildcard is the whole leftmost label, and stands for one. */
static bool
covers(const entry *e, const char *name)
{
    const char *rest = strchr(name, '.');
    if (rest == NULL || rest == name)
        return false;
    for (const char *own = e->names; *own != '\0'; own += strlen(own) + 1)
        if (own[0] == '*' && own[1] == '.' && strcasecmp(own + 1, rest) == 0)
            return true;
    return false;
}

static const entry *
find_entry(const pf_tls *tls, const char *name)
{
    for (uint32_t i = 0; i < tls->count; i++)
        if (has_name(tls->entries[i], name))
            return tls->entries[i];
    for (uint32_t i = 0; i < tls->count; i++)
        if (covers(tls->entries[i], name))
            return tls->entries[i];
    return NULL;
}

static const entry *
entry_of(const SSL *ssl)
{
    return SSL_CTX_get_app_data(SSL_get_SSL_CTX(ssl));
}

static int
choose_certificate(SSL *ssl, int *alert, void *unused)
{
    (void)alert, (void)unused;
    const char *name = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
    if (name == NULL)
        return SSL_TLSEXT_ERR_NOACK;
    const entry *found = find_entry(entry_of(ssl)->tls, name);
    if (found == NULL)
        return SSL_TLSEXT_ERR_NOACK; /* the default has to do */
    SSL_set_SSL_CTX(ssl, found->context);
    return SSL_TLSEXT_ERR_OK;
}

/* ---- what else is agreed on ---------------------------------------------------------*/
/* RFC 7301 3.2: who offers protocols and none that we speak is told so. */
static int
choose_protocol(SSL *ssl, const unsigned char **out, unsigned char *out_len,
                const unsigned char *offered, unsigned len, void *unused)
{
    static const unsigned char spoken[] = "\x08http/1.1\x08http/1.0";
    (void)ssl, (void)unused;
    unsigned char *chosen;
    int rc = SSL_select_next_proto(&chosen, out_len, spoken, sizeof spoken - 1, offered,
                                   len);
    *out = chosen;
    return rc == OPENSSL_NPN_NEGOTIATED ? SSL_TLSEXT_ERR_OK
                                        : SSL_TLSEXT_ERR_ALERT_FATAL;
}

static int
staple(SSL *ssl, void *unused)
{
    (void)unused;
    const entry *e = entry_of(ssl);
    if (e->staple == NULL)
        return SSL_TLSEXT_ERR_NOACK;
    void *copy = OPENSSL_memdup(e->staple, e->staple_len);
    if (copy == NULL)
        return SSL_TLSEXT_ERR_NOACK;
    SSL_set_tlsext_status_ocsp_resp(ssl, copy, (long)e->staple_len);
    return SSL_TLSEXT_ERR_OK;
}

/* ---- session tickets ----------------------------------------------------------------*/
static uint32_t
load_version(const pf_tickets *tickets)
{
    return __atomic_load_n(&tickets->version, __ATOMIC_ACQUIRE);
}

static void
store_version(pf_tickets *tickets, uint32_t version)
{
    __atomic_store_n(&tickets->version, version, __ATOMIC_RELEASE);
}

int
pf_tls_rotate(pf_tickets *tickets)
{
    pf_ticket_key key;
    if (RAND_priv_bytes((unsigned char *)&key, sizeof key) != 1) {
        ERR_clear_error();
        return -EIO;
    }
    uint32_t version = load_version(tickets);
    store_version(tickets, version + 1);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    memmove(&tickets->keys[1], &tickets->keys[0],
            sizeof tickets->keys - sizeof tickets->keys[0]);
    tickets->keys[0] = key;
    if (tickets->count < PF_TICKET_KEYS)
        tickets->count++;
    tickets->made = time(NULL);
    store_version(tickets, version + 2);
    OPENSSL_cleanse(&key, sizeof key);
    return 0;
}

void
pf_tls_share(pf_tls *tls, pf_tickets *tickets)
{
    tls->tickets = tickets;
}

/* false: who changes them has stopped on the way, for good perhaps. */
static bool
copy_tickets(const pf_tickets *tickets, pf_tickets *copy)
{
    for (int i = 0; i < COPIES_MAX; i++) {
        uint32_t version = load_version(tickets);
        memcpy(copy, tickets, sizeof *copy);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if ((version & 1) == 0 && load_version(tickets) == version)
            return true;
    }
    return false;
}

static int
find_key(const pf_tickets *tickets, const unsigned char name[16])
{
    for (uint32_t i = 0; i < tickets->count && i < PF_TICKET_KEYS; i++)
        if (memcmp(tickets->keys[i].name, name, 16) == 0)
            return (int)i;
    return -1;
}

static bool
begin_ticket(const pf_ticket_key *key, unsigned char *iv, EVP_CIPHER_CTX *cipher,
             EVP_MAC_CTX *mac, int seals)
{
    static char digest[] = "SHA256"; /* which is not written to */
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_octet_string(OSSL_MAC_PARAM_KEY,
                                          (void *)(uintptr_t)key->mac, sizeof key->mac),
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
        OSSL_PARAM_construct_end(),
    };
    return EVP_CipherInit_ex(cipher, EVP_aes_256_cbc(), NULL, key->cipher, iv, seals)
               == 1
           && EVP_MAC_CTX_set_params(mac, params) == 1;
}

/* As SSL_CTX_set_tlsext_ticket_key_evp_cb(3) has it. < 0: end the handshake; 0: this is
 * no ticket of ours; 2: it is, and its owner is to have a newer one. */
static int
use_ticket_key(SSL *ssl, unsigned char *name, unsigned char *iv, EVP_CIPHER_CTX *cipher,
               EVP_MAC_CTX *mac, int seals)
{
    pf_tls *tls = entry_of(ssl)->tls;
    pf_tickets tickets;
    if (seals && tls->tickets == &tls->own_tickets
        && time(NULL) - tls->own_tickets.made >= OWN_ROTATION_S
        && pf_tls_rotate(&tls->own_tickets) < 0)
        return -1;
    if (!copy_tickets(tls->tickets, &tickets))
        tickets = tls->own_tickets;
    int i = seals ? (tickets.count > 0 ? 0 : -1) : find_key(&tickets, name);
    int rc = 0;
    if (i >= 0 && seals) {
        memcpy(name, tickets.keys[0].name, sizeof tickets.keys[0].name);
        rc = RAND_bytes(iv, EVP_CIPHER_get_iv_length(EVP_aes_256_cbc())) == 1 ? 1 : -1;
    } else if (i >= 0) {
        bool once = SSL_version(ssl) >= TLS1_3_VERSION; /* good once: RFC 8446 C.4 */
        rc = once || i > 0 ? 2 : 1;
    }
    if (rc > 0 && !begin_ticket(&tickets.keys[i], iv, cipher, mac, seals))
        rc = -1;
    OPENSSL_cleanse(&tickets, sizeof tickets);
    return rc;
}

/* It may outlive the certificate that its client presented: a resumed session is not
 * verified again. */
static bool
has_expired(SSL_SESSION *session)
{
    X509 *x = SSL_SESSION_get0_peer(session);
    return x != NULL && X509_cmp_current_time(X509_get0_notAfter(x)) < 0;
}

static SSL_TICKET_RETURN
judge_ticket(SSL *ssl, SSL_SESSION *session, const unsigned char *name, size_t name_len,
             SSL_TICKET_STATUS status, void *unused)
{
    (void)ssl, (void)name, (void)name_len, (void)unused;
    bool opened = status == SSL_TICKET_SUCCESS || status == SSL_TICKET_SUCCESS_RENEW;
    if (!opened || has_expired(session))
        return SSL_TICKET_RETURN_IGNORE_RENEW;
    return status == SSL_TICKET_SUCCESS ? SSL_TICKET_RETURN_USE
                                        : SSL_TICKET_RETURN_USE_RENEW;
}

/* ---- a context ----------------------------------------------------------------------*/
static int
set_ciphers(pf_tls *tls, SSL_CTX *c)
{
    if (SSL_CTX_set_cipher_list(c, tls->ciphers ? tls->ciphers : CIPHERS) != 1)
        return fail(tls, PF_ERR_TLS_CIPHERS);
    if (tls->ciphersuites && SSL_CTX_set_ciphersuites(c, tls->ciphersuites) != 1)
        return fail(tls, PF_ERR_TLS_CIPHERS);
    return 0;
}

static int
set_verification(pf_tls *tls, SSL_CTX *c)
{
    int mode = SSL_VERIFY_NONE;
    if (tls->verify != PF_TLS_VERIFY_NONE)
        mode = SSL_VERIFY_PEER;
    if (tls->verify == PF_TLS_VERIFY_REQUIRED)
        mode |= SSL_VERIFY_FAIL_IF_NO_PEER_CERT;
    SSL_CTX_set_verify(c, mode, NULL);
    SSL_CTX_set_session_id_context(c, tls->session_id, SSL_MAX_SID_CTX_LENGTH);
    if (tls->authorities == NULL)
        return 0;
    if (SSL_CTX_set1_verify_cert_store(c, tls->authorities) != 1)
        return -ENOMEM;
    STACK_OF(X509_NAME) *names = SSL_dup_CA_list(tls->authority_names);
    if (names == NULL)
        return -ENOMEM;
    SSL_CTX_set_client_CA_list(c, names); /* which owns them */
    return 0;
}

/* Sessions are kept by clients, in tickets, so that every worker can resume them. The
 * clock of a ticket is its own: an old one is opened, and found to be too old. */
static void
set_sessions(SSL_CTX *c)
{
    SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_timeout(c, PF_TICKET_LIFE_S);
    SSL_CTX_set_tlsext_ticket_key_evp_cb(c, use_ticket_key);
    SSL_CTX_set_session_ticket_cb(c, NULL, judge_ticket, NULL);
}

static void
set_behaviour(const pf_tls *tls, SSL_CTX *c)
{
    SSL_CTX_set_options(c, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    /* An idle connection holds no buffers; a record goes out as it is made, and may be
     * tried again from bytes that have moved. */
    SSL_CTX_set_mode(c, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ENABLE_PARTIAL_WRITE
                            | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(c, 1); /* one recv() for a record, not two */
    /* Records that are for OpenSSL alone end a call: else a peer that sends nothing but
     * these, as fast as they are read, would keep the loop for itself. */
    SSL_CTX_clear_mode(c, SSL_MODE_AUTO_RETRY);
    SSL_CTX_set_alpn_select_cb(c, choose_protocol, NULL);
    SSL_CTX_set_tlsext_servername_callback(c, choose_certificate);
    SSL_CTX_set_tlsext_status_cb(c, staple);
#ifdef SSL_OP_ENABLE_KTLS
    if (tls->kernel)
        SSL_CTX_set_options(c, SSL_OP_ENABLE_KTLS);
#endif
}

static int
new_context(pf_tls *tls, SSL_CTX **out)
{
    SSL_CTX *c = SSL_CTX_new(TLS_server_method());
    if (c == NULL)
        return fail(tls, -ENOMEM);
    *out = c;
    if (SSL_CTX_set_min_proto_version(c, tls->min_version) != 1)
        return fail(tls, PF_ERR_TLS_VERSION);
    int rc = set_ciphers(tls, c);
    if (rc == 0)
        rc = set_verification(tls, c);
    set_sessions(c);
    set_behaviour(tls, c);
    return rc;
}

/* ---- a certificate ------------------------------------------------------------------*/
typedef struct secret {
    const char *password;
    bool asked; /* for it: the key is encrypted */
} secret;

static int
give_password(char *to, int size, int writes, void *user)
{
    (void)writes;
    secret *s = user;
    s->asked = true;
    size_t len = s->password ? strlen(s->password) : 0;
    if (len == 0 || len > (size_t)size)
        return -1;
    memcpy(to, s->password, len);
    return (int)len;
}

static int
use_key(pf_tls *tls, SSL_CTX *c, const pf_tls_key *key)
{
    const char *data = key->key ? key->key : key->cert;
    size_t len = key->key ? key->key_len : key->cert_len;
    BIO *pem = BIO_new_mem_buf(data, (int)len);
    secret s = {key->password, false};
    EVP_PKEY *pkey = pem ? PEM_read_bio_PrivateKey(pem, NULL, give_password, &s) : NULL;
    BIO_free(pem);
    if (pkey == NULL)
        return fail(tls, s.asked ? PF_ERR_TLS_PASSWORD : PF_ERR_TLS_KEY);
    X509 *x = SSL_CTX_get0_certificate(c);
    int rc = 0;
    if (X509_check_private_key(x, pkey) != 1)
        rc = fail(tls, PF_ERR_TLS_MISMATCH);
    else if (SSL_CTX_use_PrivateKey(c, pkey) != 1)
        rc = fail(tls, PF_ERR_TLS_KEY);
    EVP_PKEY_free(pkey);
    return rc;
}

static int
use_chain(pf_tls *tls, SSL_CTX *c, BIO *pem)
{
    for (X509 *x; (x = next_certificate(pem)) != NULL;)
        if (SSL_CTX_add0_chain_cert(c, x) != 1) {
            X509_free(x);
            return fail(tls, PF_ERR_TLS_CERTIFICATE);
        }
    if (ERR_GET_REASON(ERR_peek_last_error()) != PEM_R_NO_START_LINE)
        return fail(tls, PF_ERR_TLS_CERTIFICATE);
    ERR_clear_error();
    return 0;
}

static int
use_certificate(pf_tls *tls, SSL_CTX *c, const pf_tls_key *key)
{
    BIO *pem = BIO_new_mem_buf(key->cert, (int)key->cert_len);
    X509 *x = pem ? PEM_read_bio_X509_AUX(pem, NULL, NULL, NULL) : NULL;
    int rc = 0;
    if (x == NULL || SSL_CTX_use_certificate(c, x) != 1)
        rc = fail(tls, PF_ERR_TLS_CERTIFICATE);
    else
        rc = use_chain(tls, c, pem);
    X509_free(x);
    BIO_free(pem);
    return rc;
}

static int
keep_staple(entry *e, const pf_tls_key *key)
{
    if (key->staple == NULL)
        return 0;
    const unsigned char *p = (const unsigned char *)key->staple;
    OCSP_RESPONSE *response = d2i_OCSP_RESPONSE(NULL, &p, (long)key->staple_len);
    if (response == NULL)
        return fail(e->tls, PF_ERR_TLS_STAPLE);
    OCSP_RESPONSE_free(response);
    e->staple = OPENSSL_memdup(key->staple, key->staple_len);
    e->staple_len = key->staple_len;
    return e->staple ? 0 : -ENOMEM;
}

static void
append_name(char **names, size_t *len, const unsigned char *data, int n)
{
    char *longer;
    if (n <= 0 || n > NAME_MAX_LEN || memchr(data, 0, (size_t)n) != NULL)
        return;
    if ((longer = realloc(*names, *len + (size_t)n + 2)) == NULL)
        return;
    memcpy(longer + *len, data, (size_t)n);
    *len += (size_t)n;
    longer[(*len)++] = '\0';
    longer[*len] = '\0';
    *names = longer;
}

/* Its DNS names: those of subjectAltName, or the common name where it has none. */
static char *
names_of(X509 *x)
{
    size_t len = 0;
    char *names = calloc(1, 1);
    GENERAL_NAMES *all = X509_get_ext_d2i(x, NID_subject_alt_name, NULL, NULL);
    if (names == NULL) {
        GENERAL_NAMES_free(all);
        return NULL;
    }
    for (int i = 0; i < sk_GENERAL_NAME_num(all); i++) {
        const GENERAL_NAME *name = sk_GENERAL_NAME_value(all, i);
        if (name->type == GEN_DNS)
            append_name(&names, &len, ASN1_STRING_get0_data(name->d.dNSName),
                        ASN1_STRING_length(name->d.dNSName));
    }
    if (all == NULL) {
        X509_NAME *subject = X509_get_subject_name(x);
        int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
        const ASN1_STRING *cn =
            at < 0 ? NULL : X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at));
        if (cn != NULL)
            append_name(&names, &len, ASN1_STRING_get0_data(cn),
                        ASN1_STRING_length(cn));
    }
    GENERAL_NAMES_free(all);
    return names;
}

static void
free_entry(entry *e)
{
    if (e == NULL)
        return;
    SSL_CTX_free(e->context);
    free(e->names);
    OPENSSL_free(e->der);
    OPENSSL_free(e->staple);
    free(e);
}

static int
fill_entry(entry *e, const pf_tls_key *key)
{
    int rc = new_context(e->tls, &e->context);
    if (rc == 0)
        rc = use_certificate(e->tls, e->context, key);
    if (rc == 0)
        rc = use_key(e->tls, e->context, key);
    if (rc == 0)
        rc = keep_staple(e, key);
    if (rc < 0)
        return rc;
    SSL_CTX_set_app_data(e->context, e);
    X509 *x = SSL_CTX_get0_certificate(e->context);
    e->names = names_of(x);
    e->der_len = i2d_X509(x, &e->der);
    return e->names == NULL || e->der_len <= 0 ? -ENOMEM : 0;
}

int
pf_tls_add(pf_tls *tls, const pf_tls_key *key)
{
    ERR_clear_error();
    tls->reason[0] = '\0';
    entry **entries = realloc(tls->entries, (tls->count + 1) * sizeof(entry *));
    if (entries == NULL)
        return -ENOMEM;
    tls->entries = entries;
    entry *e = calloc(1, sizeof *e);
    if (e == NULL)
        return -ENOMEM;
    e->tls = tls;
    int rc = fill_entry(e, key);
    if (rc < 0) {
        free_entry(e);
        return rc;
    }
    entries[tls->count] = e;
    return (int)tls->count++;
}

/* ---- opening and closing ------------------------------------------------------------*/
static int
copy_text(char **to, const char *text)
{
    *to = text ? strdup(text) : NULL;
    return text && *to == NULL ? -ENOMEM : 0;
}

/* A session that was begun when other clients were let in is not resumed. */
static int
name_sessions(pf_tls *tls, const pf_tls_options *o)
{
    EVP_MD_CTX *digest = EVP_MD_CTX_new();
    bool good = digest != NULL && EVP_DigestInit_ex(digest, EVP_sha256(), NULL) == 1
                && EVP_DigestUpdate(digest, &o->verify, sizeof o->verify) == 1
                && EVP_DigestUpdate(digest, o->ca ? o->ca : "", o->ca_len) == 1
                && EVP_DigestFinal_ex(digest, tls->session_id, NULL) == 1;
    EVP_MD_CTX_free(digest);
    return good ? 0 : -ENOMEM;
}

static int
set_options(pf_tls *tls, const pf_tls_options *o)
{
    int rc = copy_text(&tls->ciphers, o->ciphers);
    if (rc == 0)
        rc = copy_text(&tls->ciphersuites, o->ciphersuites);
    if (rc == 0 && o->ca != NULL)
        rc = read_authorities(tls, o->ca, o->ca_len);
    if (rc == 0)
        rc = name_sessions(tls, o);
    if (rc == 0)
        rc = pf_tls_rotate(&tls->own_tickets);
    return rc;
}

int
pf_tls_open(pf_tls **out, const pf_tls_options *o)
{
    if (o->min_version != PF_TLS_1_2 && o->min_version != PF_TLS_1_3)
        return PF_ERR_TLS_VERSION;
    if (o->verify < PF_TLS_VERIFY_NONE || o->verify > PF_TLS_VERIFY_REQUIRED
        || (o->verify != PF_TLS_VERIFY_NONE && o->ca == NULL))
        return PF_ERR_TLS_AUTHORITY;
    pf_tls *tls = calloc(1, sizeof *tls);
    if (tls == NULL)
        return -ENOMEM;
    tls->owners = 1;
    tls->min_version = o->min_version;
    tls->verify = o->verify;
    tls->kernel = o->kernel;
    tls->tickets = &tls->own_tickets;
    SSL_CTX *trial = NULL;
    int rc = set_options(tls, o);
    if (rc == 0)
        rc = new_context(tls, &trial); /* so that a wrong option is told here */
    SSL_CTX_free(trial);
    if (rc < 0) {
        pf_tls_close(tls);
        return rc;
    }
    *out = tls;
    return 0;
}

pf_tls *
pf__tls_own(pf_tls *tls)
{
    if (tls != NULL)
        tls->owners++;
    return tls;
}

void
pf_tls_close(pf_tls *tls)
{
    if (tls == NULL || --tls->owners > 0)
        return;
    for (uint32_t i = 0; i < tls->count; i++)
        free_entry(tls->entries[i]);
    free(tls->entries);
    X509_STORE_free(tls->authorities);
    sk_X509_NAME_pop_free(tls->authority_names, X509_NAME_free);
    free(tls->ciphers);
    free(tls->ciphersuites);
    OPENSSL_cleanse(&tls->own_tickets, sizeof tls->own_tickets);
    free(tls);
}

SSL *
pf__tls_greet(const pf_tls *tls)
{
    return tls->count > 0 ? SSL_new(tls->entries[0]->context) : NULL;
}

bool
pf__tls_in_kernel(const pf_tls *tls)
{
    return tls->kernel;
}

void
pf__tls_certificate(const SSL *ssl, const void **der, size_t *len)
{
    const entry *e = entry_of(ssl);
    *der = e->der;
    *len = (size_t)e->der_len;
}

int
pf_tls_certificate(const pf_tls *tls, int place, const void **der, size_t *len)
{
    if (place < 0 || (uint32_t)place >= tls->count)
        return -EINVAL;
    *der = tls->entries[place]->der;
    *len = (size_t)tls->entries[place]->der_len;
    return 0;
}

/* ---- the facts of a certificate -----------------------------------------------------*/
static char *
text_in(BIO *bio)
{
    char *data;
    long n = BIO_get_mem_data(bio, &data);
    return n < 0 ? NULL : strndup(data, (size_t)n);
}

static char *
written_name(X509_NAME *name)
{
    BIO *bio = BIO_new(BIO_s_mem());
    unsigned long flags = XN_FLAG_RFC2253 & ~(unsigned long)ASN1_STRFLGS_ESC_MSB;
    char *text = NULL;
    if (bio != NULL && X509_NAME_print_ex(bio, name, 0, flags) >= 0)
        text = text_in(bio);
    BIO_free(bio);
    return text;
}

static char *
written_pem(X509 *x)
{
    BIO *bio = BIO_new(BIO_s_mem());
    char *text = bio != NULL && PEM_write_bio_X509(bio, x) == 1 ? text_in(bio) : NULL;
    BIO_free(bio);
    return text;
}

static char *
written_serial(X509 *x)
{
    BIGNUM *number = ASN1_INTEGER_to_BN(X509_get0_serialNumber(x), NULL);
    char *hex = number ? BN_bn2hex(number) : NULL;
    char *text = hex ? strdup(hex) : NULL;
    OPENSSL_free(hex);
    BN_free(number);
    return text;
}

static int64_t
unix_time(const ASN1_TIME *when)
{
    struct tm tm = {0};
    return ASN1_TIME_to_tm(when, &tm) == 1 ? (int64_t)timegm(&tm) : 0;
}

int
pf_tls_describe(const void *der, size_t len, pf_certificate *out)
{
    const unsigned char *p = der, *begin = p;
    *out = (pf_certificate){0};
    X509 *x = d2i_X509(NULL, &p, (long)len);
    if (x == NULL) {
        ERR_clear_error();
        return PF_ERR_TLS_CERTIFICATE;
    }
    out->size = (size_t)(p - begin);
    out->not_before = unix_time(X509_get0_notBefore(x));
    out->not_after = unix_time(X509_get0_notAfter(x));
    out->pem = written_pem(x);
    out->subject = written_name(X509_get_subject_name(x));
    out->issuer = written_name(X509_get_issuer_name(x));
    out->serial = written_serial(x);
    out->names = names_of(x);
    X509_free(x);
    ERR_clear_error();
    if (out->pem && out->subject && out->issuer && out->serial && out->names)
        return 0;
    pf_tls_forget(out);
    return -ENOMEM;
}

void
pf_tls_forget(pf_certificate *c)
{
    free(c->pem);
    free(c->subject);
    free(c->issuer);
    free(c->serial);
    free(c->names);
    *c = (pf_certificate){0};
}
