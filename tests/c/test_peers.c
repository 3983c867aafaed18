/* test_peers.c - the census of addresses, against an array that is searched. */
#undef NDEBUG
#include "internal.h"

#include <stdio.h>
#include <sys/socket.h>

static unsigned
random_below(unsigned n)
{
    static uint32_t x = 2463534242;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x % n;
}

static pf_peer
v4(unsigned n)
{
    pf_peer peer = {.family = AF_INET, .port = (uint16_t)random_below(65536)};
    memcpy(peer.bytes, &n, 4);
    return peer;
}

/* Another address of the same bytes. */
static pf_peer
v6(unsigned n)
{
    pf_peer peer = v4(n);
    peer.family = AF_INET6;
    return peer;
}

static void
an_address_is_counted_up_to_its_limit(void)
{
    pf__peers peers = {0};
    pf_peer a = v4(1);
    assert(pf__peers_add(&peers, &a, 2) == 0);
    assert(pf__peers_add(&peers, &a, 2) == 0);
    assert(pf__peers_add(&peers, &a, 2) == 1);
    pf__peers_remove(&peers, &a);
    assert(pf__peers_add(&peers, &a, 2) == 0);
    assert(pf__peers_add(&peers, &a, 2) == 1);
    pf__peers_close(&peers);
}

static void
ports_are_the_same_address_and_families_are_not(void)
{
    pf__peers peers = {0};
    pf_peer a = v4(1), other_port = a, other_family = a;
    other_port.port ^= 1;
    other_family.family = AF_INET6;
    assert(pf__peers_add(&peers, &a, 1) == 0);
    assert(pf__peers_add(&peers, &other_port, 1) == 1);
    assert(pf__peers_add(&peers, &other_family, 1) == 0);
    pf__peers_remove(&peers, &other_port);
    assert(pf__peers_add(&peers, &a, 1) == 0);
    pf__peers_close(&peers);
}

static void
an_address_that_is_not_counted_is_not_removed(void)
{
    pf__peers peers = {0};
    pf_peer a = v4(1), b = v4(2);
    assert(pf__peers_add(&peers, &a, 1) == 0);
    pf__peers_remove(&peers, &b);
    assert(peers.used == 1 && pf__peers_add(&peers, &a, 1) == 1);
    pf__peers_close(&peers);
}

/* Bursts of adding and of removing, so that the table grows, and runs of neighbours
 * form and are closed up again, many times. */
static void
counts_agree_with_a_model(void)
{
    enum { ADDRESSES = 700, STEPS = 200000, LIMIT = 3 };
    static uint32_t model[2][ADDRESSES];
    pf__peers peers = {0};
    uint32_t used = 0;
    for (int step = 0; step < STEPS; step++) {
        bool growing = step / 5000 % 2 == 0;
        unsigned family = random_below(2), n = random_below(ADDRESSES);
        pf_peer peer = family ? v6(n) : v4(n);
        uint32_t *count = &model[family][n];
        if (random_below(10) < (growing ? 8u : 2u)) {
            assert(pf__peers_add(&peers, &peer, LIMIT) == (*count == LIMIT));
            used += *count == 0;
            *count += *count < LIMIT;
        } else if (*count > 0) {
            pf__peers_remove(&peers, &peer);
            used -= --*count == 0;
        }
        assert(peers.used == used && used * 2 <= peers.size);
    }
    for (unsigned i = 0; i < 2 * ADDRESSES; i++) {
        pf_peer peer = i < ADDRESSES ? v4(i) : v6(i - ADDRESSES);
        for (uint32_t k = model[i / ADDRESSES][i % ADDRESSES]; k > 0; k--)
            pf__peers_remove(&peers, &peer);
    }
    assert(peers.used == 0);
    pf__peers_close(&peers);
    assert(peers.table == NULL && peers.size == 0);
}

static void
one_table_is_used_again_after_close(void)
{
    pf__peers peers = {0};
    pf_peer a = v6(1);
    for (int i = 0; i < 2; i++) {
        assert(pf__peers_add(&peers, &a, 1) == 0);
        assert(pf__peers_add(&peers, &a, 1) == 1);
        pf__peers_close(&peers);
    }
}

int
main(void)
{
    an_address_is_counted_up_to_its_limit();
    ports_are_the_same_address_and_families_are_not();
    an_address_that_is_not_counted_is_not_removed();
    counts_agree_with_a_model();
    one_table_is_used_again_after_close();
    return 0;
}
