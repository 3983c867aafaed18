/* test_sha1.c - SHA-1 of the standard's examples, and of texts around a block's end. */
#undef NDEBUG
#include "internal.h"

#include <stdio.h>

static void
check(const char *text, size_t len, const char *expected)
{
    uint8_t digest[PF__SHA1_SIZE];
    char hex[2 * PF__SHA1_SIZE + 1];
    pf__sha1_digest(digest, text, len);
    for (int i = 0; i < PF__SHA1_SIZE; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    if (strcmp(hex, expected) != 0)
        fprintf(stderr, "%zu bytes: %s, not %s\n", len, hex, expected);
    assert(strcmp(hex, expected) == 0);
}

static void
check_texts(void)
{
    static const char two_blocks[] =
        "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    static char million[1000000];
    memset(million, 'a', sizeof million);
    check("", 0, "da39a3ee5e6b4b0d3255bfef95601890afd80709");
    check("abc", 3, "a9993e364706816aba3e25717850c26c9cd0d89d");
    check(two_blocks, sizeof two_blocks - 1,
          "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
    check(million, sizeof million, "34aa973cd4c4daa4f61eeb2bdbad27316534016f");
    check(million, 55, "c1c8bbdc22796e28c0e15163d20899b65621d65a");
    check(million, 56, "c2db330f6083854c99d4b5bfb6e8f29f201be699");
    check(million, 63, "03f09f5b158a7a8cdad920bddc29b81c18a551f5");
    check(million, 64, "0098ba824b5c16427bd7a1122a5a442a25ec644d");
    check(million, 65, "11655326c708d70319be2610e8a57d9a5b959d3b");
}

int
main(void)
{
    check_texts();
    return 0;
}
