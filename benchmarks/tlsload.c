/* tlsload.c - TLS handshakes: how many a second, and how many of them were resumed.
 *
 * N threads make one connection after the other: the handshake, one request, its answer
 * up to the end of the connection. With --reuse each offers the ticket that the one
 * before it was given last; without, every handshake is a full one. What a server does
 * not resume is done in full, and counted.
 *
 * Certificates are not verified: that would be work for who loads, not for who serves.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "program.h"

enum { ANSWER_SIZE = 16384 };

static const char REQUEST[] = "GET / HTTP/1.1\r\n"
                              "Host: localhost\r\n"
                              "Connection: close\r\n"
                              "\r\n";

static struct {
    unsigned threads;
    double seconds;
    bool reuse;
    uint16_t port;
} options = {.threads = 8, .seconds = 3};

typedef struct client {
    pthread_t thread;
    SSL_SESSION *session; /* owns; the one to be offered next */
    unsigned long handshakes, resumed, errors;
    char cipher[64];
} client;

static SSL_CTX *context;
static uint64_t end_ns;

/* ---- One connection ---------------------------------------------------------------*/

/* OpenSSL calls this for each ticket; 1: the session is ours now. */
static int
keep_session(SSL *ssl, SSL_SESSION *session)
{
    client *c = SSL_get_app_data(ssl);
    SSL_SESSION_free(c->session);
    c->session = session;
    return 1;
}

/* Whether the answer came, and was a good one. */
static bool
ask(SSL *ssl)
{
    static const char GOOD[] = "HTTP/1.1 200 ";
    char answer[ANSWER_SIZE];
    size_t size = 0;
    int n;
    if (SSL_write(ssl, REQUEST, sizeof REQUEST - 1) <= 0)
        return false;
    while (size < sizeof answer
           && (n = SSL_read(ssl, answer + size, (int)(sizeof answer - size))) > 0)
        size += (size_t)n;
    return size > sizeof GOOD && !memcmp(answer, GOOD, sizeof GOOD - 1);
}

static bool
make_connection(client *c, SSL *ssl)
{
    SSL_set_app_data(ssl, c);
    SSL_set_tlsext_host_name(ssl, "localhost");
    if (options.reuse && c->session)
        SSL_set_session(ssl, c->session);
    if (SSL_connect(ssl) != 1 || !ask(ssl))
        return false;
    c->handshakes++;
    c->resumed += (unsigned long)SSL_session_reused(ssl);
    snprintf(c->cipher, sizeof c->cipher, "%s %s", SSL_get_version(ssl),
             SSL_get_cipher_name(ssl));
    SSL_shutdown(ssl);
    return true;
}

static void *
run(void *arg)
{
    client *c = arg;
    while (now_ns() < end_ns) {
        int fd = connect_to_server(options.port);
        SSL *ssl = SSL_new(context);
        if (!ssl)
            die("SSL_new");
        if (fd < 0 || !SSL_set_fd(ssl, fd) || !make_connection(c, ssl))
            c->errors++;
        SSL_free(ssl);
        if (fd >= 0)
            close(fd);
    }
    return NULL;
}

/* ---- All of them ------------------------------------------------------------------*/

static int
usage(void)
{
    fprintf(stderr,
            "usage: tlsload [--threads N] [--seconds SECONDS] [--reuse] PORT\n");
    return 2;
}

int
main(int argc, char **argv)
{
    static const struct option LONG[] = {{"threads", required_argument, NULL, 't'},
                                         {"seconds", required_argument, NULL, 's'},
                                         {"reuse", no_argument, NULL, 'r'},
                                         {0}};
    int option;
    while ((option = getopt_long(argc, argv, "", LONG, NULL)) >= 0) {
        switch (option) {
        case 't':
            options.threads = (unsigned)strtoul(optarg, NULL, 10);
            break;
        case 's':
            options.seconds = strtod(optarg, NULL);
            break;
        case 'r':
            options.reuse = true;
            break;
        default:
            return usage();
        }
    }
    if (argc - optind != 1 || options.threads < 1)
        return usage();
    options.port = (uint16_t)strtoul(argv[optind], NULL, 10);
    context = SSL_CTX_new(TLS_client_method());
    client *clients = calloc(options.threads, sizeof *clients);
    if (!context || !clients)
        die("tlsload");
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT
                                                | SSL_SESS_CACHE_NO_INTERNAL_STORE);
    SSL_CTX_sess_set_new_cb(context, keep_session);
    uint64_t start = now_ns();
    end_ns = start + (uint64_t)(options.seconds * 1e9);
    for (unsigned i = 0; i < options.threads; i++)
        if (pthread_create(&clients[i].thread, NULL, run, &clients[i]))
            die("pthread_create");
    unsigned long handshakes = 0, resumed = 0, errors = 0;
    for (unsigned i = 0; i < options.threads; i++) {
        pthread_join(clients[i].thread, NULL);
        handshakes += clients[i].handshakes;
        resumed += clients[i].resumed;
        errors += clients[i].errors;
        SSL_SESSION_free(clients[i].session);
    }
    double seconds = (double)(now_ns() - start) / 1e9;
    printf("%lu handshakes in %.3f s, %.0f/s, %lu resumed, %lu errors, %s\n",
           handshakes, seconds, (double)handshakes / seconds, resumed, errors,
           clients[0].cipher);
    free(clients);
    SSL_CTX_free(context);
}
