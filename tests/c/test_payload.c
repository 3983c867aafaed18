/* test_payload.c - every SIMD variant masks alike, and knows the same UTF-8. */
#define _GNU_SOURCE
#undef NDEBUG
#include "internal.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LONGEST = 140, ROUNDS = 50000 };

static const char *const variants[] = {"portable", "sse2", "avx2"};

enum { NVARIANTS = sizeof variants / sizeof *variants };

static char *page_end; /* the byte behind it cannot be read */

static void
open_page(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert(map != MAP_FAILED && mprotect(map + page, page, PROT_NONE) == 0);
    page_end = map + page;
}

static unsigned
random_below(unsigned n)
{
    static uint32_t x = 2463534242;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x % n;
}

/* ---- masking ------------------------------------------------------------------------*/
static void
check_mask(size_t n, size_t shift)
{
    static const uint8_t key[4] = {0x37, 0xfa, 0x21, 0x3d};
    char expected[LONGEST], *to = page_end - n - shift, *from = page_end - n;
    for (size_t i = 0; i < n; i++) {
        from[i] = (char)random_below(256);
        expected[i] = (char)((uint8_t)from[i] ^ key[i % 4]);
    }
    pf__payload_mask(to, from, n, key);
    assert(memcmp(to, expected, n) == 0);
}

static void
check_masks(void)
{
    for (size_t n = 0; n < LONGEST; n++)
        for (size_t shift = 0; shift < 70; shift++)
            check_mask(n, shift);
}

/* ---- UTF-8, against a decoder -------------------------------------------------------*/
/* Bytes of the character at p; 0: there is none; < 0: it may still become one. */
static int
decode(const uint8_t *p, size_t n)
{
    uint8_t lead = p[0];
    int size = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}, code = lead;
    if (size == 1)
        return 1;
    if (lead < 0xc0 || lead > 0xf7)
        return 0;
    code = lead & (0x7fu >> size);
    uint32_t low = code, high = code;
    for (int i = 1; i < size; i++) {
        bool here = (size_t)i < n;
        if (here && (p[i] & 0xc0) != 0x80)
            return 0;
        low = low << 6 | (here ? p[i] & 63u : 0);
        high = high << 6 | (here ? p[i] & 63u : 63);
    }
    bool out =
        high < least[size] || low > 0x10ffff || (low >= 0xd800 && high <= 0xdfff);
    if (out)
        return 0;
    return (size_t)size <= n ? size : -1;
}

/* 1: UTF-8; 0: it may become so; -1: it will not. */
static int
judge(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n;) {
        int size = decode(p + i, n - i);
        if (size <= 0)
            return size < 0 ? 0 : -1;
        i += (size_t)size;
    }
    return 1;
}

/* Delivered in pieces that end at a, b and n. */
static int
judge_pieces(const char *p, size_t n, size_t a, size_t b)
{
    pf__utf8 state = {0};
    size_t ends[] = {a < b ? a : b, a < b ? b : a, n}, from = 0;
    for (int i = 0; i < 3; from = ends[i++])
        if (!pf__payload_utf8(&state, p + from, ends[i] - from))
            return -1;
    return state.left == 0;
}

static void
check_text(const uint8_t *text, size_t n)
{
    char *p = page_end - n;
    memcpy(p, text, n);
    int expected = judge(text, n);
    assert(judge_pieces(p, n, 0, 0) == expected);
    size_t cuts = (unsigned)n + 1;
    for (int i = 0; i < 3; i++)
        assert(judge_pieces(p, n, random_below((unsigned)cuts),
                            random_below((unsigned)cuts))
               == expected);
}

/* Every pair of bytes, with what may follow, anywhere around a vector's end. */
static void
check_pairs(void)
{
    static const uint8_t tails[][2] = {
        {'a', 'a'}, {0x80, 'a'}, {0x80, 0x80}, {0xbf, 0xbf}};
    uint8_t text[68];
    for (int pair = 0; pair < 0x10000; pair++)
        for (int tail = 0; tail < 4; tail++) {
            size_t at = 28 + random_below(8), n = at + 4 + random_below(32);
            memset(text, 'x', sizeof text);
            text[at] = (uint8_t)(pair >> 8);
            text[at + 1] = (uint8_t)pair;
            memcpy(text + at + 2, tails[tail], 2);
            check_text(text, n < sizeof text ? n : sizeof text);
        }
}

static size_t
put_char(uint8_t *p)
{
    static const char *const chars[] = {"a",
                                        "\x7f",
                                        "\xc2\x80",
                                        "\xdf\xbf",
                                        "\xe0\xa0\x80",
                                        "\xed\x9f\xbf",
                                        "\xee\x80\x80",
                                        "\xef\xbf\xbf",
                                        "\xf0\x90\x80\x80",
                                        "\xf4\x8f\xbf\xbf"};
    const char *c = chars[random_below(10)];
    size_t n = strlen(c);
    memcpy(p, c, n);
    return n;
}

/* Text of all kinds, mostly with one byte changed or some cut off. */
static void
check_random(void)
{
    uint8_t text[LONGEST + 4];
    for (int round = 0; round < ROUNDS; round++) {
        size_t want = random_below(LONGEST), n = 0;
        while (n < want)
            n += put_char(text + n);
        if (n > 0 && random_below(2))
            text[random_below((unsigned)n)] = (uint8_t)random_below(256);
        check_text(text,
                   n - (n > 0 ? random_below((unsigned)n < 4 ? (unsigned)n : 4) : 0));
    }
}

int
main(void)
{
    open_page();
    for (int i = 0; i < NVARIANTS; i++) {
        int variant = pf__cpu_find(variants[i]);
        if (variant < 0) {
            printf("%s: not here\n", variants[i]);
            continue;
        }
        pf__payload_select((pf__cpu)variant);
        check_masks();
        check_pairs();
        check_random();
    }
    return 0;
}
