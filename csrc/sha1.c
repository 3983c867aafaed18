/* sha1.c - SHA-1 (FIPS 180-4), for the one thing that asks for it: a handshake. */
#include "internal.h"

enum { BLOCK = 64 };

static inline uint32_t
rotate(uint32_t x, int n)
{
    return x << n | x >> (32 - n);
}

static void
expand(uint32_t w[80], const uint8_t block[BLOCK])
{
    for (int i = 0; i < 16; i++, block += 4)
        w[i] = (uint32_t)block[0] << 24 | (uint32_t)block[1] << 16
               | (uint32_t)block[2] << 8 | block[3];
    for (int i = 16; i < 80; i++)
        w[i] = rotate(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
}

static uint32_t
choose(int round, uint32_t b, uint32_t c, uint32_t d)
{
    switch (round / 20) {
    case 0:
        return ((b & c) | (~b & d)) + 0x5a827999;
    case 1:
        return (b ^ c ^ d) + 0x6ed9eba1;
    case 2:
        return ((b & c) | (b & d) | (c & d)) + 0x8f1bbcdc;
    default:
        return (b ^ c ^ d) + 0xca62c1d6;
    }
}

static void
digest_block(uint32_t h[5], const uint8_t block[BLOCK])
{
    uint32_t w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    expand(w, block);
    for (int i = 0; i < 80; i++) {
        uint32_t next = rotate(a, 5) + choose(i, b, c, d) + e + w[i];
        e = d;
        d = c;
        c = rotate(b, 30);
        b = a;
        a = next;
    }
    h[0] += a;
    h[1] += b;
    h[2] += c;
    h[3] += d;
    h[4] += e;
}

/* What is left of the text, a one bit, zeros, and the length in bits. */
static void
digest_tail(uint32_t h[5], const uint8_t *text, size_t left, size_t len)
{
    uint8_t tail[2 * BLOCK] = {0};
    size_t size = left + 9 > BLOCK ? 2 * BLOCK : BLOCK;
    uint64_t bits = (uint64_t)len * 8;
    memcpy(tail, text, left);
    tail[left] = 0x80;
    for (size_t i = 1; i <= 8; i++, bits >>= 8)
        tail[size - i] = (uint8_t)bits;
    for (size_t at = 0; at < size; at += BLOCK)
        digest_block(h, tail + at);
}

void
pf__sha1_digest(uint8_t digest[PF__SHA1_SIZE], const void *data, size_t len)
{
    uint32_t h[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    const uint8_t *text = data;
    size_t left = len;
    for (; left >= BLOCK; left -= BLOCK, text += BLOCK)
        digest_block(h, text);
    digest_tail(h, text, left, len);
    for (int i = 0; i < PF__SHA1_SIZE; i++)
        digest[i] = (uint8_t)(h[i / 4] >> (24 - 8 * (i % 4)));
}
