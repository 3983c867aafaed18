/* trust.c - networks whose word counts.
 *
 * A dual-stack listener shows an IPv4 peer as ::ffff:a.b.c.d; it is the IPv4 address that
 * is looked for. The lists are short and asked seldom, so they are searched in order.
 */
#include "internal.h"

#include <sys/socket.h>

enum { MAPPED = 12 }; /* bytes before the IPv4 address in ::ffff:a.b.c.d */

static bool
is_mapped(const pf_peer *peer)
{
    static const uint8_t prefix[MAPPED] = {[10] = 0xff, [11] = 0xff};
    return peer->family == AF_INET6 && memcmp(peer->bytes, prefix, MAPPED) == 0;
}

static bool
same_bits(const uint8_t *a, const uint8_t *b, unsigned bits)
{
    unsigned whole = bits / 8, rest = bits % 8;
    if (memcmp(a, b, whole) != 0)
        return false;
    return rest == 0 || ((a[whole] ^ b[whole]) >> (8 - rest)) == 0;
}

bool
pf__trust_is_valid(const pf_network *list, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const pf_network *net = &list[i];
        unsigned bits = net->family == AF_INET ? 32 : net->family == AF_INET6 ? 128 : 0;
        if ((bits == 0 && net->family != AF_UNIX) || net->prefix > bits)
            return false;
    }
    return true;
}

bool
pf__trust_has(const pf_network *list, uint32_t n, const pf_peer *peer)
{
    bool mapped = is_mapped(peer);
    const uint8_t *bytes = mapped ? peer->bytes + MAPPED : peer->bytes;
    uint16_t family = mapped ? AF_INET : peer->family;
    for (uint32_t i = 0; i < n; i++)
        if (list[i].family == family && same_bits(list[i].bytes, bytes, list[i].prefix))
            return true;
    return false;
}
