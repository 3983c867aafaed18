/* peers.c - how many connections each address holds.
 *
 * Open addressing with linear probing and backward-shift deletion, so no tombstones;
 * the hash is seeded, since peers choose the keys (an IPv6 user has 2^64 of them).
 */
#include "internal.h"

#include <errno.h>
#include <sys/random.h>

enum { FIRST_SIZE = 64 };

static bool
same_address(const pf_peer *a, const pf_peer *b)
{
    return a->family == b->family && memcmp(a->bytes, b->bytes, sizeof a->bytes) == 0;
}

static uint32_t
home(const pf__peers *peers, const pf_peer *peer)
{
    uint64_t lo, hi;
    memcpy(&lo, peer->bytes, 8);
    memcpy(&hi, peer->bytes + 8, 8);
    uint64_t h = peers->seed ^ peer->family;
    h = (h ^ lo) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
    h = (h ^ hi) * 0xd6e8feb86659fd93u;
    h ^= h >> 29;
    return (uint32_t)h & (peers->size - 1);
}

static uint32_t
find(const pf__peers *peers, const pf_peer *peer)
{
    uint32_t i = home(peers, peer);
    while (peers->table[i].count > 0 && !same_address(&peers->table[i].peer, peer))
        i = (i + 1) & (peers->size - 1);
    return i;
}

static int
resize(pf__peers *peers, uint32_t size)
{
    pf__peers bigger = {.size = size, .used = peers->used, .seed = peers->seed};
    bigger.table = calloc(size, sizeof *bigger.table);
    if (bigger.table == NULL)
        return -ENOMEM;
    for (uint32_t i = 0; i < peers->size; i++)
        if (peers->table[i].count > 0)
            bigger.table[find(&bigger, &peers->table[i].peer)] = peers->table[i];
    free(peers->table);
    *peers = bigger;
    return 0;
}

static int
make_room(pf__peers *peers)
{
    if (peers->table == NULL) {
        if (getrandom(&peers->seed, sizeof peers->seed, GRND_NONBLOCK) < 0)
            peers->seed = (uint64_t)(uintptr_t)peers;
        return resize(peers, FIRST_SIZE);
    }
    if (peers->used * 2 < peers->size)
        return 0;
    return resize(peers, peers->size * 2);
}

int
pf__peers_add(pf__peers *peers, const pf_peer *peer, uint32_t max)
{
    int rc = make_room(peers);
    if (rc < 0)
        return rc;
    pf__peer_count *cell = &peers->table[find(peers, peer)];
    if (cell->count >= max)
        return 1;
    if (cell->count == 0) {
        cell->peer = *peer;
        peers->used++;
    }
    cell->count++;
    return 0;
}

void
pf__peers_remove(pf__peers *peers, const pf_peer *peer)
{
    uint32_t hole = find(peers, peer), mask = peers->size - 1;
    if (peers->table[hole].count == 0 || --peers->table[hole].count > 0)
        return;
    peers->used--;
    for (uint32_t i = (hole + 1) & mask; peers->table[i].count > 0;
         i = (i + 1) & mask) {
        uint32_t want = home(peers, &peers->table[i].peer);
        if (((i - want) & mask) < ((i - hole) & mask))
            continue; /* it would land before its home */
        peers->table[hole] = peers->table[i];
        peers->table[i].count = 0;
        hole = i;
    }
}

void
pf__peers_close(pf__peers *peers)
{
    free(peers->table);
    *peers = (pf__peers){0};
}
