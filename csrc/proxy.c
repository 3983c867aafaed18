/* proxy.c - the header of a proxied connection: for whom it is, and where it went.
 *
 * The PROXY protocol of HAProxy: a proxy that passes a connection on says first, once,
 * between whom it was. Version 1 is a line of text, version 2 is binary.
 *
 *     PROXY TCP4 192.0.2.1 198.51.100.7 56324 443 CR LF
 *     signature (12), version and command (1), family and transport (1), length (2),
 *     addresses, then records of type (1), length (2), value
 *
 * Who connects here is known to be a proxy, so what does not begin like this is refused
 * as soon as that shows: guessing would let a client write its own address. For the same
 * reason nothing is repaired: a number has one spelling, a length fits exactly.
 */
#include "internal.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

static uint16_t
read_u16(const char *p)
{
    const uint8_t *b = (const uint8_t *)p;
    return (uint16_t)(b[0] << 8 | b[1]);
}

static uint32_t
read_u32(const char *p)
{
    return (uint32_t)read_u16(p) << 16 | read_u16(p + 2);
}

/* ---- version 1 ----------------------------------------------------------------------*/
static const char word[] = "PROXY ";

enum { WORD = sizeof word - 1 };

/* Up to the next space, or to the line's end; "" if nothing is left. */
typedef struct token {
    char text[INET6_ADDRSTRLEN];
} token;

static bool
take_token(const char **p, const char *end, token *out)
{
    const char *start = *p;
    while (*p < end && **p != ' ')
        ++*p;
    size_t len = (size_t)(*p - start);
    if (len == 0 || len >= sizeof out->text)
        return false;
    memcpy(out->text, start, len);
    out->text[len] = '\0';
    return true;
}

static bool
take_space(const char **p, const char *end)
{
    if (*p == end || **p != ' ')
        return false;
    ++*p;
    return true;
}

static bool
take_address(const char **p, const char *end, pf_peer *peer)
{
    token t;
    return take_token(p, end, &t) && inet_pton(peer->family, t.text, peer->bytes) == 1
           && take_space(p, end);
}

static bool
take_port(const char **p, const char *end, uint16_t *port)
{
    token t;
    if (!take_token(p, end, &t) || (t.text[0] == '0' && t.text[1] != '\0'))
        return false;
    unsigned n = 0;
    for (const char *c = t.text; *c != '\0'; c++) {
        if (!pf__scan_is(*c, PF__CHAR_DIGIT))
            return false;
        n = n * 10 + (unsigned)(*c - '0');
        if (n > UINT16_MAX)
            return false;
    }
    *port = (uint16_t)n;
    return true;
}

/* A whole line, without its CR LF. What stands behind UNKNOWN is not for us. */
static bool
parse_line(const char *p, const char *end, pf_peer *client, pf_peer *server)
{
    token family;
    p += WORD;
    if (!take_token(&p, end, &family))
        return false;
    if (strcmp(family.text, "UNKNOWN") == 0)
        return true;
    bool v4 = strcmp(family.text, "TCP4") == 0;
    if (!v4 && strcmp(family.text, "TCP6") != 0)
        return false;
    client->family = server->family = v4 ? AF_INET : AF_INET6;
    return take_space(&p, end) && take_address(&p, end, client)
           && take_address(&p, end, server) && take_port(&p, end, &client->port)
           && take_space(&p, end) && take_port(&p, end, &server->port) && p == end;
}

static int
parse_v1(const char *data, size_t len, pf_peer *client, pf_peer *server)
{
    size_t at = 0;
    for (; at < len && data[at] != '\r'; at++) {
        bool fits =
            at < WORD ? data[at] == word[at] : data[at] >= ' ' && data[at] <= '~';
        if (!fits || at == PF__PROXY_V1_MAX - 2)
            return PF_ERR_PROXY;
    }
    if (at == len)
        return 0;
    if (at <= WORD)
        return PF_ERR_PROXY;
    if (at + 1 == len)
        return 0;
    if (data[at + 1] != '\n' || !parse_line(data, data + at, client, server))
        return PF_ERR_PROXY;
    return (int)at + 2;
}

/* ---- version 2 ----------------------------------------------------------------------*/
static const char signature[] = "\r\n\r\n\0\r\nQUIT\n";

enum {
    SIGNATURE = sizeof signature - 1,
    FIXED = 16, /* signature, version and command, family and transport, length */
    TLV = 3,    /* type and length of a record */
    LOCAL = 0x20,
    PROXY = 0x21,
    TYPE_CRC32C = 0x03,
};

static_assert(SIGNATURE == 12, "as the protocol has it");

/* Streams only: a datagram did not bring this connection. */
static const struct {
    uint8_t code, address_len;
    uint16_t family;
} transports[] = {
    {0x00, 0, AF_UNSPEC},
    {0x11, 4, AF_INET},
    {0x21, 16, AF_INET6},
    {0x31, 108, AF_UNIX},
};

/* As iSCSI counts it (RFC 3720 B.4), with the checksum's own four bytes taken as zero. */
static uint32_t
crc32c(const char *data, size_t len, size_t checksum_at)
{
    uint32_t crc = UINT32_MAX;
    for (size_t i = 0; i < len; i++) {
        crc ^= i - checksum_at < 4 ? 0 : (uint8_t)data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
    }
    return ~crc;
}

/* Records say nothing that we need, but a header whose records do not add up to its
 * length was not understood. */
static bool
valid_records(const char *data, size_t at, size_t size)
{
    while (at < size) {
        if (size - at < TLV)
            return false;
        size_t value = at + TLV, n = read_u16(data + at + 1);
        if (n > size - value)
            return false;
        if (data[at] == TYPE_CRC32C
            && (n != 4 || read_u32(data + value) != crc32c(data, size, value)))
            return false;
        at = value + n;
    }
    return true;
}

static void
read_addresses(const char *p, size_t n, pf_peer *client, pf_peer *server)
{
    if (client->family == AF_UNIX)
        return; /* their paths are the proxy's, and mean nothing here */
    memcpy(client->bytes, p, n);
    memcpy(server->bytes, p + n, n);
    client->port = read_u16(p + 2 * n);
    server->port = read_u16(p + 2 * n + 2);
}

static int
find_transport(uint8_t code)
{
    for (size_t i = 0; i < sizeof transports / sizeof *transports; i++)
        if (transports[i].code == code)
            return (int)i;
    return -1;
}

/* A whole header of this size, with the command PROXY. */
static bool
parse_block(const char *data, size_t size, pf_peer *client, pf_peer *server)
{
    int i = find_transport((uint8_t)data[13]);
    if (i < 0)
        return false;
    uint16_t family = transports[i].family;
    if (family == AF_UNSPEC)
        return true; /* what follows is of a kind that we cannot know */
    size_t n = transports[i].address_len;
    size_t addresses = 2 * n + (family == AF_UNIX ? 0 : 4);
    if (size < FIXED + addresses)
        return false;
    client->family = server->family = family;
    read_addresses(data + FIXED, n, client, server);
    return valid_records(data, FIXED + addresses, size);
}

static int
parse_v2(const char *data, size_t len, pf_peer *client, pf_peer *server)
{
    if (memcmp(data, signature, len < SIGNATURE ? len : SIGNATURE) != 0)
        return PF_ERR_PROXY;
    if (len < FIXED)
        return 0;
    uint8_t command = (uint8_t)data[12];
    size_t rest = read_u16(data + 14), size = FIXED + rest;
    if ((command != LOCAL && command != PROXY) || rest > PF__PROXY_V2_MAX)
        return PF_ERR_PROXY;
    if (len < size)
        return 0;
    if (command == PROXY && !parse_block(data, size, client, server))
        return PF_ERR_PROXY;
    return (int)size;
}

/* ---- either -------------------------------------------------------------------------*/
int
pf__proxy_parse(const char *data, size_t len, unsigned versions, pf_peer *client,
                pf_peer *server)
{
    *client = *server = (pf_peer){.family = AF_UNSPEC};
    if (len == 0)
        return 0;
    if (data[0] == word[0] && (versions & PF_PROXY_V1))
        return parse_v1(data, len, client, server);
    if (data[0] == signature[0] && (versions & PF_PROXY_V2))
        return parse_v2(data, len, client, server);
    return PF_ERR_PROXY;
}
