/* scan.c - how long a run of one character class is, by SIMD or by table.
 *
 * Each scan returns the number of leading bytes of p[0..n) that belong to the class and
 * reads no byte behind them. The wide variants only look at whole vectors inside the
 * range and leave the rest to the table, so all variants give the same answer on the
 * same bytes; tests compare them.
 */
#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define T PF__CHAR_TOKEN
#define V PF__CHAR_VALUE
#define G PF__CHAR_TARGET
#define H PF__CHAR_HOST
#define X PF__CHAR_HEX
#define D PF__CHAR_DIGIT
#define ALPHA (T | V | G | H)
#define HEXA (ALPHA | X)
#define DIG (ALPHA | X | D)

const uint8_t pf__scan_class[256] = {
    ['\t'] = V,
    [' '] = V,
    ['!'] = T | V | G | H,
    ['"'] = V | G,
    ['#'] = T | V,
    ['$'] = T | V | G | H,
    ['%'] = T | V | G | H,
    ['&'] = T | V | G | H,
    ['\''] = T | V | G | H,
    ['('] = V | G | H,
    [')'] = V | G | H,
    ['*'] = T | V | G | H,
    ['+'] = T | V | G | H,
    [','] = V | G,
    ['-'] = T | V | G | H,
    ['.'] = T | V | G | H,
    ['/'] = V | G,
    ['0' ... '9'] = DIG,
    [':'] = V | G,
    [';'] = V | G | H,
    ['<'] = V | G,
    ['='] = V | G | H,
    ['>'] = V | G,
    ['?'] = V | G,
    ['@'] = V | G,
    ['A' ... 'F'] = HEXA,
    ['G' ... 'Z'] = ALPHA,
    ['['] = V | G,
    ['\\'] = V | G,
    [']'] = V | G,
    ['^'] = T | V | G,
    ['_'] = ALPHA,
    ['`'] = T | V | G,
    ['a' ... 'f'] = HEXA,
    ['g' ... 'z'] = ALPHA,
    ['{'] = V | G,
    ['|'] = T | V | G,
    ['}'] = V | G,
    ['~'] = ALPHA,
    [0x80 ... 0xff] = V,
};

static inline size_t
scan_table(const char *p, size_t i, size_t n, int class)
{
    while (i < n && pf__scan_is(p[i], class))
        i++;
    return i;
}

static size_t
value_portable(const char *p, size_t n)
{
    return scan_table(p, 0, n, PF__CHAR_VALUE);
}

static size_t
target_portable(const char *p, size_t n)
{
    return scan_table(p, 0, n, PF__CHAR_TARGET);
}

static size_t
token_portable(const char *p, size_t n)
{
    return scan_table(p, 0, n, PF__CHAR_TOKEN);
}

#if defined(__x86_64__)

/* In signed bytes, obs-text is negative, so "below space" needs the unsigned minimum:
 * min(x, 0x1f) == x holds exactly for 0x00..0x1f. */
static inline int
value_mask_sse2(const char *p)
{
    __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
    __m128i low = _mm_cmpeq_epi8(_mm_min_epu8(x, _mm_set1_epi8(0x1f)), x);
    __m128i tab = _mm_cmpeq_epi8(x, _mm_set1_epi8('\t'));
    __m128i del = _mm_cmpeq_epi8(x, _mm_set1_epi8(0x7f));
    return _mm_movemask_epi8(_mm_or_si128(_mm_andnot_si128(tab, low), del));
}

/* 0x21..0x7e as signed bytes are those above 0x20 and not DEL: one comparison catches
 * controls, space and everything from 0x80 on. */
static inline int
target_mask_sse2(const char *p)
{
    __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
    __m128i ok = _mm_cmpgt_epi8(x, _mm_set1_epi8(0x20));
    __m128i del = _mm_cmpeq_epi8(x, _mm_set1_epi8(0x7f));
    __m128i hash = _mm_cmpeq_epi8(x, _mm_set1_epi8('#'));
    __m128i bad = _mm_or_si128(del, hash);
    return ~_mm_movemask_epi8(_mm_andnot_si128(bad, ok)) & 0xffff;
}

static size_t
value_sse2(const char *p, size_t n)
{
    size_t i = 0;
    for (; n - i >= 16; i += 16) {
        int bad = value_mask_sse2(p + i);
        if (bad)
            return i + (size_t)__builtin_ctz((unsigned)bad);
    }
    return scan_table(p, i, n, PF__CHAR_VALUE);
}

static size_t
target_sse2(const char *p, size_t n)
{
    size_t i = 0;
    for (; n - i >= 16; i += 16) {
        int bad = target_mask_sse2(p + i);
        if (bad)
            return i + (size_t)__builtin_ctz((unsigned)bad);
    }
    return scan_table(p, i, n, PF__CHAR_TARGET);
}

__attribute__((target("avx2"))) static size_t
value_avx2(const char *p, size_t n)
{
    size_t i = 0;
    for (; n - i >= 32; i += 32) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(p + i));
        __m256i low = _mm256_cmpeq_epi8(_mm256_min_epu8(x, _mm256_set1_epi8(0x1f)), x);
        __m256i tab = _mm256_cmpeq_epi8(x, _mm256_set1_epi8('\t'));
        __m256i del = _mm256_cmpeq_epi8(x, _mm256_set1_epi8(0x7f));
        __m256i bad = _mm256_or_si256(_mm256_andnot_si256(tab, low), del);
        unsigned mask = (unsigned)_mm256_movemask_epi8(bad);
        if (mask)
            return i + (size_t)__builtin_ctz(mask);
    }
    return i + value_sse2(p + i, n - i);
}

__attribute__((target("avx2"))) static size_t
target_avx2(const char *p, size_t n)
{
    size_t i = 0;
    for (; n - i >= 32; i += 32) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(p + i));
        __m256i ok = _mm256_cmpgt_epi8(x, _mm256_set1_epi8(0x20));
        __m256i del = _mm256_cmpeq_epi8(x, _mm256_set1_epi8(0x7f));
        __m256i hash = _mm256_cmpeq_epi8(x, _mm256_set1_epi8('#'));
        __m256i good = _mm256_andnot_si256(_mm256_or_si256(del, hash), ok);
        unsigned mask = ~(unsigned)_mm256_movemask_epi8(good);
        if (mask)
            return i + (size_t)__builtin_ctz(mask);
    }
    return i + target_sse2(p + i, n - i);
}

static const uint8_t token_rows[16] __attribute__((aligned(16))) = {
    0xe8, 0xfc, 0xf8, 0xfc, 0xfc, 0xfc, 0xfc, 0xfc,
    0xf8, 0xf8, 0xf4, 0x54, 0xd0, 0x54, 0xf4, 0x70,
};

/* tchar by two shuffles: the low nibble picks a row of bits, the high nibble picks the
 * bit. Bit k of row r says that byte 0xkr is a token character; only k = 2..7 can. */
__attribute__((target("avx2"))) static size_t
token_avx2(const char *p, size_t n)
{
    size_t i = 0;
    __m256i row = _mm256_broadcastsi128_si256(
        _mm_load_si128((const __m128i *)(const void *)token_rows));
    __m256i bit =
        _mm256_setr_epi8(1, 2, 4, 8, 16, 32, 64, (char)128, 0, 0, 0, 0, 0, 0, 0, 0, 1,
                         2, 4, 8, 16, 32, 64, (char)128, 0, 0, 0, 0, 0, 0, 0, 0);
    __m256i nibble = _mm256_set1_epi8(15);
    for (; n - i >= 32; i += 32) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(p + i));
        __m256i lo = _mm256_shuffle_epi8(row, _mm256_and_si256(x, nibble));
        __m256i hi =
            _mm256_shuffle_epi8(bit, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
        __m256i miss =
            _mm256_cmpeq_epi8(_mm256_and_si256(lo, hi), _mm256_setzero_si256());
        unsigned mask = (unsigned)_mm256_movemask_epi8(miss);
        if (mask)
            return i + (size_t)__builtin_ctz(mask);
    }
    return scan_table(p, i, n, PF__CHAR_TOKEN);
}
#endif

static const struct variant {
    size_t (*value)(const char *, size_t);
    size_t (*target)(const char *, size_t);
    size_t (*token)(const char *, size_t);
} variants[PF__CPU_VARIANTS] = {
#if defined(__x86_64__)
    [PF__CPU_AVX2] = {value_avx2, target_avx2, token_avx2},
    [PF__CPU_SSE2] = {value_sse2, target_sse2, token_portable},
#endif
    [PF__CPU_PORTABLE] = {value_portable, target_portable, token_portable},
};

static pf__cpu chosen = PF__CPU_PORTABLE;
size_t (*pf__scan_value)(const char *, size_t) = value_portable;
size_t (*pf__scan_target)(const char *, size_t) = target_portable;
size_t (*pf__scan_token)(const char *, size_t) = token_portable;

void
pf__scan_select(pf__cpu variant)
{
    chosen = variant;
    pf__scan_value = variants[variant].value;
    pf__scan_target = variants[variant].target;
    pf__scan_token = variants[variant].token;
}

__attribute__((constructor)) static void
select_best(void)
{
    pf__scan_select(pf__cpu_best());
}

pf__cpu
pf__scan_variant(void)
{
    return chosen;
}
