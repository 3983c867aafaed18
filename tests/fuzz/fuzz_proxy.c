/* fuzz_proxy.c - a PROXY header is the same in every delivery.
 *
 * Input: a byte that picks the versions and where to split, the bytes of the connection.
 * They are parsed whole, byte by byte and in two parts; bytes that were not delivered yet
 * are poisoned.
 */
#undef NDEBUG
#include "internal.h"

#include <sanitizer/asan_interface.h>
#include <sys/socket.h>

typedef struct outcome {
    int rc;
    size_t needed; /* bytes delivered when the answer came */
    pf_peer client, server;
} outcome;

/* The first `first` bytes, then `step` more at a time. */
static outcome
parse(char *data, size_t len, unsigned versions, size_t first, size_t step)
{
    outcome o = {0};
    for (size_t have = first; o.rc == 0 && o.needed < len; have += step) {
        o.needed = have < len ? have : len;
        ASAN_POISON_MEMORY_REGION(data + o.needed, len - o.needed);
        o.rc = pf__proxy_parse(data, o.needed, versions, &o.client, &o.server);
        ASAN_UNPOISON_MEMORY_REGION(data, len);
    }
    return o;
}

static bool
same_peer(const pf_peer *a, const pf_peer *b)
{
    return a->family == b->family && a->port == b->port
           && memcmp(a->bytes, b->bytes, sizeof a->bytes) == 0;
}

static void
check_same(const outcome *a, const outcome *b)
{
    assert(a->rc == b->rc);
    if (a->rc > 0)
        assert(same_peer(&a->client, &b->client) && same_peer(&a->server, &b->server));
}

static bool
begins(const char *data, size_t len, const char *with, size_t n)
{
    return len >= n && memcmp(data, with, n) == 0;
}

/* What an accepted header promises. */
static void
check_accepted(const char *data, size_t len, unsigned versions, const outcome *o)
{
    static const char signature[] = "\r\n\r\n\0\r\nQUIT\n";
    size_t size = (size_t)o->rc;
    bool v1 = begins(data, len, "PROXY ", 6), v2 = begins(data, len, signature, 12);
    int family = o->client.family;
    assert(size <= len && (v1 || v2));
    assert(versions & (v1 ? PF_PROXY_V1 : PF_PROXY_V2));
    assert(family == o->server.family);
    assert(family == AF_UNSPEC || family == AF_INET || family == AF_INET6
           || (v2 && family == AF_UNIX));
    if (v1)
        assert(size <= PF__PROXY_V1_MAX && memcmp(data + size - 2, "\r\n", 2) == 0);
    else
        assert(size >= 16 && size <= 16 + PF__PROXY_V2_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (size < 2)
        return 0;
    unsigned versions = input[0] & (PF_PROXY_V1 | PF_PROXY_V2);
    size_t len = size - 1, split = 1 + (input[0] >> 2);
    char *data = malloc(len);
    memcpy(data, input + 1, len);
    outcome whole = parse(data, len, versions, len, 1);
    outcome steps = parse(data, len, versions, 1, 1);
    outcome parts = parse(data, len, versions, split, len);
    check_same(&whole, &steps);
    check_same(&whole, &parts);
    if (whole.rc > 0) {
        assert(steps.needed == (size_t)whole.rc); /* no byte later than it could */
        check_accepted(data, len, versions, &whole);
    }
    free(data);
    return 0;
}
