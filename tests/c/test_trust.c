/* test_trust.c - a network has the addresses that share its prefix, and no others. */
#undef NDEBUG
#include "internal.h"

#include <arpa/inet.h>
#include <sys/socket.h>

static int
family_of(const char *text)
{
    return text[0] == '\0' ? AF_UNIX : strchr(text, ':') ? AF_INET6 : AF_INET;
}

/* "" is a unix socket. */
static bool
has(const char *network, int prefix, const char *address)
{
    pf_network net = {.family = (uint16_t)family_of(network),
                      .prefix = (uint8_t)prefix};
    pf_peer peer = {.family = (uint16_t)family_of(address)};
    if (net.family != AF_UNIX)
        assert(inet_pton(net.family, network, net.bytes) == 1);
    if (peer.family != AF_UNIX)
        assert(inet_pton(peer.family, address, peer.bytes) == 1);
    assert(pf__trust_is_valid(&net, 1));
    return pf__trust_has(&net, 1, &peer);
}

static void
a_network_has_what_shares_its_prefix(void)
{
    assert(has("127.0.0.1", 32, "127.0.0.1") && !has("127.0.0.1", 32, "127.0.0.2"));
    assert(has("10.0.0.0", 8, "10.255.1.2") && !has("10.0.0.0", 8, "11.0.0.0"));
    assert(has("10.1.128.0", 17, "10.1.255.1") && !has("10.1.128.0", 17, "10.1.127.1"));
    assert(has("10.1.2.252", 30, "10.1.2.255") && !has("10.1.2.252", 30, "10.1.2.251"));
    assert(has("0.0.0.0", 0, "255.1.2.3"));
    assert(has("::1", 128, "::1") && !has("::1", 128, "::2"));
    assert(has("2001:db8::", 33, "2001:db8:7fff::1"));
    assert(!has("2001:db8::", 33, "2001:db8:8000::1"));
    assert(has("::", 0, "2001:db8::1"));
}

static void
families_do_not_mix(void)
{
    assert(!has("0.0.0.0", 0, "::1") && !has("::", 0, "0.0.0.0"));
    assert(!has("0.0.0.0", 0, "") && !has("::", 0, "") && has("", 0, ""));
    assert(!has("", 0, "0.0.0.0") && !has("", 0, "::"));
}

static void
an_ipv4_peer_of_a_dual_stack_listener_is_known_by_its_ipv4_address(void)
{
    assert(has("10.0.0.0", 8, "::ffff:10.1.2.3"));
    assert(!has("10.0.0.0", 8, "::ffff:11.1.2.3"));
    assert(!has("10.0.0.0", 8, "::10.1.2.3"));
    assert(!has("::", 0, "::ffff:10.1.2.3"));
}

static void
an_empty_list_has_nobody(void)
{
    pf_peer peer = {.family = AF_UNIX};
    assert(pf__trust_is_valid(NULL, 0) && !pf__trust_has(NULL, 0, &peer));
}

static void
any_network_of_a_list_will_do(void)
{
    static const pf_network list[] = {
        {{10}, AF_INET, 8}, {{0}, AF_UNIX, 0}, {{192, 168}, AF_INET, 16}};
    pf_peer peer = {{192, 168, 1, 1}, 0, AF_INET, 0}, unknown = {.family = AF_UNSPEC};
    assert(pf__trust_has(list, 3, &peer) && !pf__trust_has(list, 2, &peer));
    assert(!pf__trust_has(list, 3, &unknown));
}

int
main(void)
{
    a_network_has_what_shares_its_prefix();
    families_do_not_mix();
    an_ipv4_peer_of_a_dual_stack_listener_is_known_by_its_ipv4_address();
    an_empty_list_has_nobody();
    any_network_of_a_list_will_do();
    return 0;
}
