/* test_scan.c - every SIMD variant stops at the same byte and reads none behind. */
#define _GNU_SOURCE
#undef NDEBUG
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LONGEST = 130 };

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

static const struct scan {
    int class;
    size_t (**run)(const char *p, size_t n);
} scans[] = {
    {PF__CHAR_VALUE, &pf__scan_value},
    {PF__CHAR_TARGET, &pf__scan_target},
    {PF__CHAR_TOKEN, &pf__scan_token},
};

enum { NSCANS = sizeof scans / sizeof *scans };

static unsigned
random_below(unsigned n)
{
    static uint32_t x = 2463534242;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x % n;
}

/* ---- the table, against the grammar -------------------------------------------------*/
static bool
is_alnum(int c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static bool
is_one_of(int c, const char *list)
{
    return c != 0 && strchr(list, c) != NULL;
}

static void
the_table_says_what_the_grammar_says(void)
{
    for (int c = 0; c < 256; c++) {
        bool visible = c >= 0x21 && c <= 0x7e;
        assert(pf__scan_is((char)c, PF__CHAR_TOKEN)
               == (is_alnum(c) || is_one_of(c, "!#$%&'*+-.^_`|~")));
        assert(pf__scan_is((char)c, PF__CHAR_VALUE)
               == (visible || c == ' ' || c == '\t' || c >= 0x80));
        assert(pf__scan_is((char)c, PF__CHAR_TARGET) == (visible && c != '#'));
        assert(pf__scan_is((char)c, PF__CHAR_HOST)
               == (is_alnum(c) || is_one_of(c, "-._~%!$&'()*+;=")));
        assert(pf__scan_is((char)c, PF__CHAR_HEX)
               == is_one_of(c, "0123456789abcdefABCDEF"));
        assert(pf__scan_is((char)c, PF__CHAR_DIGIT) == is_one_of(c, "0123456789"));
    }
}

/* ---- the variants -------------------------------------------------------------------*/
static char
member(int class)
{
    for (;;) {
        char c = (char)random_below(256);
        if (pf__scan_is(c, class))
            return c;
    }
}

static void
stops_at_every_byte_of_every_length(const struct scan *scan)
{
    for (size_t n = 0; n <= LONGEST; n++) {
        char *p = page_end - n;
        for (size_t i = 0; i < n; i++)
            p[i] = member(scan->class);
        assert((*scan->run)(p, n) == n);
        for (size_t at = 0; at < n; at++) {
            char kept = p[at];
            for (int c = 0; c < 256; c++) {
                p[at] = (char)c;
                size_t expected = pf__scan_is((char)c, scan->class) ? n : at;
                assert((*scan->run)(p, n) == expected);
            }
            p[at] = kept;
        }
    }
}

/* Two bytes outside: the first counts, in whatever vector or remainder each lies. */
static void
stops_at_the_first_of_two(const struct scan *scan)
{
    char *p = page_end - LONGEST;
    for (int i = 0; i < LONGEST; i++)
        p[i] = member(scan->class);
    for (size_t first = 0; first < LONGEST; first++)
        for (size_t second = first + 1; second < LONGEST; second++) {
            char a = p[first], b = p[second];
            p[first] = p[second] = '\x7f';
            assert((*scan->run)(p, LONGEST) == first);
            p[first] = a;
            p[second] = b;
        }
}

static void
looks_at_no_byte_behind_its_range(const struct scan *scan)
{
    for (size_t n = 0; n <= LONGEST; n++) {
        char *p = page_end - LONGEST - 64; /* readable on both sides, but not its own */
        memset(p - 64, 0, LONGEST + 128);
        for (size_t i = 0; i < n; i++)
            p[i] = member(scan->class);
        assert((*scan->run)(p, n) == n);
        memset(p + n, member(scan->class), 64);
        assert((*scan->run)(p, n) == n);
    }
}

static void
every_variant_gives_the_same_answer(void)
{
    int tried = 0;
    for (int v = 0; v < NVARIANTS; v++) {
        if (pf_http_set_simd(variants[v]) != 0)
            continue;
        tried++;
        assert(strcmp(pf_http_simd(), variants[v]) == 0);
        for (int s = 0; s < NSCANS; s++) {
            stops_at_every_byte_of_every_length(&scans[s]);
            stops_at_the_first_of_two(&scans[s]);
            looks_at_no_byte_behind_its_range(&scans[s]);
        }
    }
    assert(tried >= 1);
}

static void
a_variant_that_does_not_exist_is_refused_and_changes_nothing(void)
{
    assert(pf_http_set_simd("portable") == 0);
    assert(pf_http_set_simd("sse9") == -ENOTSUP);
    assert(pf_http_set_simd("") == -ENOTSUP);
    assert(strcmp(pf_http_simd(), "portable") == 0);
}

static void
the_best_variant_was_chosen_by_itself(void)
{
    const char *chosen = pf_http_simd();
    for (int v = NVARIANTS - 1; v >= 0; v--)
        if (pf_http_set_simd(variants[v]) == 0) {
            assert(strcmp(chosen, variants[v]) == 0);
            return;
        }
}

int
main(void)
{
    open_page();
    the_best_variant_was_chosen_by_itself();
    the_table_says_what_the_grammar_says();
    every_variant_gives_the_same_answer();
    a_variant_that_does_not_exist_is_refused_and_changes_nothing();
    return 0;
}
