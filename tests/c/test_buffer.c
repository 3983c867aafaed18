/* test_buffer.c - buffers keep their bytes, the pool keeps its count. */
#undef NDEBUG
#include "internal.h"

enum {
    SMALLEST = 1 << PF__BUFFER_SHIFT,
    LARGEST = SMALLEST << (PF__BUFFER_CLASSES - 1),
};

static pf__pool pool;

static void
append(pf__buffer *b, const void *data, size_t len)
{
    assert(pf__buffer_reserve(&pool, b, len) == 0);
    pf__buffer_put(b, data, len);
}

static uint32_t
spares(void)
{
    uint32_t n = 0;
    for (int i = 0; i < PF__BUFFER_CLASSES; i++)
        n += pool.spares[i];
    return n;
}

static void
a_buffer_takes_memory_at_its_first_byte(void)
{
    pf__buffer b = {0};
    assert(pf__buffer_reserve(&pool, &b, 0) == 0);
    assert(b.data == NULL && pool.in_use == 0);
    append(&b, "x", 1);
    assert(b.len == 1 && b.cap == SMALLEST && pool.in_use == 1);
    pf__buffer_release(&pool, &b);
    assert(b.data == NULL && b.len == 0 && b.cap == 0 && pool.in_use == 0);
}

static void
releasing_an_empty_buffer_does_nothing(void)
{
    pf__buffer b = {0};
    uint32_t before = spares();
    pf__buffer_release(&pool, &b);
    assert(pool.in_use == 0 && spares() == before);
}

static void
the_buffer_released_last_is_taken_first(void)
{
    pf__buffer a = {0}, b = {0};
    append(&a, "a", 1);
    append(&b, "b", 1);
    char *first = a.data, *second = b.data;
    pf__buffer_release(&pool, &a);
    pf__buffer_release(&pool, &b);
    append(&a, "a", 1);
    append(&b, "b", 1);
    assert(a.data == second && b.data == first);
    pf__buffer_release(&pool, &a);
    pf__buffer_release(&pool, &b);
}

static void
a_buffer_keeps_its_bytes_through_every_size(void)
{
    pf__buffer b = {0};
    char piece[1000];
    for (size_t i = 0; i < 4 * (size_t)LARGEST / sizeof piece; i++) {
        memset(piece, (int)(i % 251), sizeof piece);
        append(&b, piece, sizeof piece);
        assert(pool.in_use == 1);
    }
    for (size_t i = 0; i < b.len; i++)
        assert((uint8_t)b.data[i] == i / sizeof piece % 251);
    pf__buffer_release(&pool, &b);
}

static void
growing_doubles_at_least(void)
{
    pf__buffer b = {0};
    for (size_t cap = 0; cap < 16 * (size_t)LARGEST; cap = b.cap) {
        assert(pf__buffer_grow(&pool, &b, b.cap + 1) == 0);
        assert(b.cap >= 2 * cap && b.cap > cap);
        b.len = b.cap;
        memset(b.data, 0, b.len);
    }
    pf__buffer_release(&pool, &b);
}

static void
what_is_asked_for_at_once_is_there(void)
{
    static const size_t sizes[] = {1,       SMALLEST,    SMALLEST + 1,
                                   LARGEST, LARGEST + 1, 10 * (size_t)LARGEST};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        pf__buffer b = {0};
        assert(pf__buffer_grow(&pool, &b, sizes[i]) == 0);
        assert(b.cap >= sizes[i]);
        memset(b.data, 0xff, b.cap);
        pf__buffer_release(&pool, &b);
    }
}

static void
shrinking_keeps_the_bytes_and_gives_back_the_room(void)
{
    pf__buffer b = {0};
    append(&b, "hello", 5);
    assert(pf__buffer_grow(&pool, &b, 10 * (size_t)LARGEST) == 0);
    pf__buffer_shrink(&pool, &b, 4); /* there is more in it */
    pf__buffer_shrink(&pool, &b, b.cap);
    assert(b.cap >= 10 * (size_t)LARGEST);
    pf__buffer_shrink(&pool, &b, 100);
    assert(b.cap == SMALLEST && b.len == 5 && memcmp(b.data, "hello", 5) == 0);
    assert(pool.in_use == 1);
    pf__buffer_release(&pool, &b);
}

static void
spare_memory_is_bounded(void)
{
    enum { MANY = 3000 };
    static pf__buffer many[MANY];
    for (int i = 0; i < MANY; i++)
        append(&many[i], "x", 1);
    assert(pool.in_use == MANY);
    for (int i = 0; i < MANY; i++)
        pf__buffer_release(&pool, &many[i]);
    assert(pool.in_use == 0);
    for (int i = 0; i < PF__BUFFER_CLASSES; i++)
        assert((uint64_t)pool.spares[i] << (PF__BUFFER_SHIFT + i) <= PF__BUFFER_SPARES);
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

/* Many buffers that grow and go in any order never share a byte. */
static void
buffers_do_not_overlap(void)
{
    enum { N = 32, ROUNDS = 4000 };
    pf__buffer b[N] = {0};
    char piece[9000];
    for (int round = 0; round < ROUNDS; round++) {
        unsigned i = random_below(N);
        for (size_t k = 0; k < b[i].len; k += 97)
            assert(b[i].data[k] == (char)i);
        if (random_below(8) == 0) {
            pf__buffer_release(&pool, &b[i]);
            continue;
        }
        memset(piece, (int)i, sizeof piece);
        append(&b[i], piece, random_below(sizeof piece));
    }
    for (int i = 0; i < N; i++)
        pf__buffer_release(&pool, &b[i]);
    assert(pool.in_use == 0);
}

static void
an_emptied_pool_holds_nothing(void)
{
    pf__buffer_empty_pool(&pool);
    assert(spares() == 0);
    for (int i = 0; i < PF__BUFFER_CLASSES; i++)
        assert(pool.free[i] == NULL);
}

int
main(void)
{
    a_buffer_takes_memory_at_its_first_byte();
    releasing_an_empty_buffer_does_nothing();
    the_buffer_released_last_is_taken_first();
    a_buffer_keeps_its_bytes_through_every_size();
    growing_doubles_at_least();
    what_is_asked_for_at_once_is_there();
    shrinking_keeps_the_bytes_and_gives_back_the_room();
    spare_memory_is_bounded();
    buffers_do_not_overlap();
    an_emptied_pool_holds_nothing();
    return 0;
}
