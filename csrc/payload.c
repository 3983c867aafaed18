/* payload.c - what is done to every byte of a message: masking, and whether it is UTF-8.
 *
 * Both come in variants, as scan.c's do: by wide vectors where the CPU has them, else
 * byte by byte; all give the same answer on the same bytes, and tests compare them.
 *
 * UTF-8 may come in any pieces, so a check leaves off within a character and goes on
 * there. A piece is refused at the first byte that no valid text could have there.
 */
#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* ---- masking ------------------------------------------------------------------------
 * RFC 6455 5.3: each byte is XORed with one of four. The result may go to where it is
 * wanted, which lies before or at the source; so vectors are taken from front to back.
 */
static void
mask_bytes(char *to, const char *from, size_t n, const uint8_t key[4])
{
    for (size_t i = 0; i < n; i++)
        to[i] = (char)((uint8_t)from[i] ^ key[i % 4]);
}

static void
mask_portable(char *to, const char *from, size_t n, const uint8_t key[4])
{
    uint64_t wide, word;
    memcpy(&wide, key, 4);
    memcpy((char *)&wide + 4, key, 4);
    size_t i = 0;
    for (; n - i >= 8; i += 8) {
        memcpy(&word, from + i, 8);
        word ^= wide;
        memcpy(to + i, &word, 8);
    }
    mask_bytes(to + i, from + i, n - i, key);
}

/* ---- UTF-8, byte by byte: Unicode 15, table 3-7 -------------------------------------*/
static bool
begin_char(pf__utf8 *state, uint8_t lead)
{
    if (lead < 0xc2 || lead > 0xf4)
        return false;
    state->left = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    state->low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    state->high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    return true;
}

static bool
continue_char(pf__utf8 *state, uint8_t byte)
{
    if (byte < state->low || byte > state->high)
        return false;
    state->left--;
    state->low = 0x80;
    state->high = 0xbf;
    return true;
}

static size_t
ascii_portable(const char *p, size_t n)
{
    size_t i = 0;
    for (uint64_t word; n - i >= 8; i += 8) {
        memcpy(&word, p + i, 8);
        if (word & 0x8080808080808080)
            break;
    }
    while (i < n && !(p[i] & 0x80))
        i++;
    return i;
}

static inline bool
utf8_by(size_t (*ascii)(const char *, size_t), pf__utf8 *state, const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (state->left == 0) {
            i += ascii(p + i, n - i);
            if (i == n)
                break;
        }
        uint8_t byte = (uint8_t)p[i];
        if (!(state->left > 0 ? continue_char(state, byte) : begin_char(state, byte)))
            return false;
    }
    return true;
}

static bool
utf8_portable(pf__utf8 *state, const char *p, size_t n)
{
    return utf8_by(ascii_portable, state, p, n);
}

#if defined(__x86_64__)

static void
mask_sse2(char *to, const char *from, size_t n, const uint8_t key[4])
{
    int word;
    memcpy(&word, key, 4);
    __m128i wide = _mm_set1_epi32(word);
    size_t i = 0;
    for (; n - i >= 16; i += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(const void *)(from + i));
        _mm_storeu_si128((__m128i *)(void *)(to + i), _mm_xor_si128(x, wide));
    }
    mask_portable(to + i, from + i, n - i, key);
}

__attribute__((target("avx2"))) static void
mask_avx2(char *to, const char *from, size_t n, const uint8_t key[4])
{
    int word;
    memcpy(&word, key, 4);
    __m256i wide = _mm256_set1_epi32(word);
    size_t i = 0;
    for (; n - i >= 32; i += 32) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(from + i));
        _mm256_storeu_si256((__m256i *)(void *)(to + i), _mm256_xor_si256(x, wide));
    }
    mask_portable(to + i, from + i, n - i, key);
}

static size_t
ascii_sse2(const char *p, size_t n)
{
    size_t i = 0;
    for (; n - i >= 16; i += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(const void *)(p + i));
        unsigned high = (unsigned)_mm_movemask_epi8(x);
        if (high)
            return i + (size_t)__builtin_ctz(high);
    }
    return i + ascii_portable(p + i, n - i);
}

static bool
utf8_sse2(pf__utf8 *state, const char *p, size_t n)
{
    return utf8_by(ascii_sse2, state, p, n);
}

/* A whole vector at once, after J. Keiser and D. Lemire, "Validating UTF-8 in less than
 * one instruction per byte" (2021): what is wrong with two neighbours shows in the high
 * nibble of the first, its low nibble and the high nibble of the second. Each nibble
 * looks up the faults it may be part of; a fault that all three agree on is one. That a
 * third or fourth byte is due is looked up two and three bytes back.
 */
enum {
    SHORT = 1 << 0,     /* a lead, or ASCII, where a continuation is due */
    LONG = 1 << 1,      /* a continuation behind ASCII */
    LOW_3 = 1 << 2,     /* E0 80..9F: overlong */
    SURROGATE = 1 << 3, /* ED A0..BF */
    LOW_2 = 1 << 4,     /* C0, C1: overlong */
    BEYOND = 1 << 5,    /* F4 90.., F5..: above U+10FFFF */
    LOW_4 = 1 << 6,     /* F0 80..8F: overlong; F5.. 80..8F: above, too */
    PAIR = 1 << 7,      /* two continuations: wrong unless a longer character is due */
    CARRY = SHORT | LONG | PAIR,
};

#define ROWS(...) _mm256_setr_epi8(__VA_ARGS__, __VA_ARGS__)
#define S(x) ((char)(x))

__attribute__((target("avx2"))) static inline __m256i
nibble(__m256i x)
{
    return _mm256_and_si256(x, _mm256_set1_epi8(15));
}

/* x moved up by n bytes, with the last of `before` in front. */
#define BACK(x, before, n)                                                             \
    _mm256_alignr_epi8(x, _mm256_permute2x128_si256(before, x, 0x21), 16 - (n))

__attribute__((target("avx2"))) static inline __m256i
faults(__m256i x, __m256i before)
{
    const __m256i first_high =
        ROWS(LONG, LONG, LONG, LONG, LONG, LONG, LONG, LONG, S(PAIR), S(PAIR), S(PAIR),
             S(PAIR), SHORT | LOW_2, SHORT, SHORT | LOW_3 | SURROGATE,
             SHORT | BEYOND | LOW_4);
    const __m256i first_low = ROWS(
        S(CARRY | LOW_3 | LOW_2 | LOW_4), S(CARRY | LOW_2), S(CARRY), S(CARRY),
        S(CARRY | BEYOND), S(CARRY | BEYOND | LOW_4), S(CARRY | BEYOND | LOW_4),
        S(CARRY | BEYOND | LOW_4), S(CARRY | BEYOND | LOW_4), S(CARRY | BEYOND | LOW_4),
        S(CARRY | BEYOND | LOW_4), S(CARRY | BEYOND | LOW_4), S(CARRY | BEYOND | LOW_4),
        S(CARRY | BEYOND | LOW_4 | SURROGATE), S(CARRY | BEYOND | LOW_4),
        S(CARRY | BEYOND | LOW_4));
    const __m256i second_high = ROWS(
        SHORT, SHORT, SHORT, SHORT, SHORT, SHORT, SHORT, SHORT,
        S(LONG | LOW_2 | PAIR | LOW_3 | LOW_4), S(LONG | LOW_2 | PAIR | LOW_3 | BEYOND),
        S(LONG | LOW_2 | PAIR | SURROGATE | BEYOND),
        S(LONG | LOW_2 | PAIR | SURROGATE | BEYOND), SHORT, SHORT, SHORT, SHORT);
    __m256i one = BACK(x, before, 1);
    __m256i high = _mm256_shuffle_epi8(first_high, nibble(_mm256_srli_epi16(one, 4)));
    __m256i low = _mm256_shuffle_epi8(first_low, nibble(one));
    __m256i next = _mm256_shuffle_epi8(second_high, nibble(_mm256_srli_epi16(x, 4)));
    __m256i pair = _mm256_and_si256(_mm256_and_si256(high, low), next);
    /* a continuation is due behind E0.. two bytes back, behind F0.. three bytes back */
    __m256i third =
        _mm256_subs_epu8(BACK(x, before, 2), _mm256_set1_epi8(S(0xe0 - 0x80)));
    __m256i fourth =
        _mm256_subs_epu8(BACK(x, before, 3), _mm256_set1_epi8(S(0xf0 - 0x80)));
    __m256i due =
        _mm256_and_si256(_mm256_or_si256(third, fourth), _mm256_set1_epi8(S(0x80)));
    return _mm256_xor_si256(due, pair);
}

/* Bytes at the end of p[..n) that begin a character and do not end it. */
static size_t
unfinished(const char *p, size_t n)
{
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        uint8_t byte = (uint8_t)p[n - back];
        if (byte >= 0xc0)
            return back < (byte >= 0xf0 ? 4u : byte >= 0xe0 ? 3u : 2u) ? back : 0;
        if (byte < 0x80)
            return 0;
    }
    return 0;
}

/* Whole vectors, from the beginning of a character on. How many bytes, which end with
 * one; SIZE_MAX: they are not UTF-8. */
__attribute__((target("avx2"))) static size_t
whole_avx2(const char *p, size_t n)
{
    __m256i before = _mm256_setzero_si256(), wrong = before;
    size_t i = 0;
    for (; n - i >= 32; i += 32) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(p + i));
        /* ASCII behind ASCII has no faults; a character may be due, so look at both */
        if (_mm256_movemask_epi8(_mm256_or_si256(x, before)) != 0)
            wrong = _mm256_or_si256(wrong, faults(x, before));
        before = x;
    }
    if (!_mm256_testz_si256(wrong, wrong))
        return SIZE_MAX;
    return i - unfinished(p, i);
}

__attribute__((target("avx2"))) static bool
utf8_avx2(pf__utf8 *state, const char *p, size_t n)
{
    size_t first = 0;
    for (; state->left > 0 && first < n; first++)
        if (!continue_char(state, (uint8_t)p[first]))
            return false;
    if (n - first >= 32) {
        size_t whole = whole_avx2(p + first, n - first);
        if (whole == SIZE_MAX)
            return false;
        first += whole;
    }
    return utf8_portable(state, p + first, n - first);
}
#endif

static const struct variant {
    void (*mask)(char *, const char *, size_t, const uint8_t[4]);
    bool (*utf8)(pf__utf8 *, const char *, size_t);
} variants[PF__CPU_VARIANTS] = {
#if defined(__x86_64__)
    [PF__CPU_AVX2] = {mask_avx2, utf8_avx2},
    [PF__CPU_SSE2] = {mask_sse2, utf8_sse2},
#endif
    [PF__CPU_PORTABLE] = {mask_portable, utf8_portable},
};

void (*pf__payload_mask)(char *, const char *, size_t,
                         const uint8_t[4]) = mask_portable;
bool (*pf__payload_utf8)(pf__utf8 *, const char *, size_t) = utf8_portable;

void
pf__payload_select(pf__cpu variant)
{
    pf__payload_mask = variants[variant].mask;
    pf__payload_utf8 = variants[variant].utf8;
}

__attribute__((constructor)) static void
select_best(void)
{
    pf__payload_select(pf__cpu_best());
}
