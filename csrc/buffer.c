/* buffer.c - growable bytes, taken from free lists by size class.
 *
 * A buffer is held only while there are bytes in it: a connection takes one when it
 * reads and gives it back when it has answered. The lists are last in, first out, so
 * that a busy loop works in the few buffers that are still in the cache, and an idle
 * connection holds none.
 */
#include "internal.h"

#include <errno.h>

static int
class_of(size_t cap)
{
    for (int i = 0; i < PF__BUFFER_CLASSES; i++)
        if (cap <= (size_t)1 << (PF__BUFFER_SHIFT + i))
            return i;
    return -1;
}

static size_t
class_size(int class)
{
    return (size_t)1 << (PF__BUFFER_SHIFT + class);
}

static void *
take(pf__pool *pool, int class)
{
    void *spare = pool->free[class];
    if (spare == NULL)
        return malloc(class_size(class));
    memcpy(&pool->free[class], spare, sizeof(void *));
    __builtin_prefetch(pool->free[class], 1); /* the next to be taken */
    pool->spares[class]--;
    return spare;
}

static void
give(pf__pool *pool, int class, void *data)
{
    if (class < 0 || pool->spares[class] * class_size(class) >= PF__BUFFER_SPARES) {
        free(data);
        return;
    }
    memcpy(data, &pool->free[class], sizeof(void *));
    pool->free[class] = data;
    pool->spares[class]++;
}

/* Double at least, so that appending stays linear. */
static size_t
next_cap(const pf__buffer *b, size_t cap)
{
    size_t doubled = b->cap * 2;
    cap = cap > doubled ? cap : doubled;
    int class = class_of(cap);
    return class >= 0 ? class_size(class) : cap;
}

static int
grow_large(pf__pool *pool, pf__buffer *b, size_t cap, int old_class)
{
    char *data = old_class < 0 ? realloc(b->data, cap) : malloc(cap);
    if (data == NULL)
        return -ENOMEM;
    if (old_class >= 0) {
        memcpy(data, b->data, b->len);
        give(pool, old_class, b->data);
    }
    b->data = data;
    b->cap = cap;
    return 0;
}

int
pf__buffer_grow(pf__pool *pool, pf__buffer *b, size_t cap)
{
    bool fresh = b->data == NULL;
    cap = next_cap(b, cap);
    int class = class_of(cap);
    if (class < 0 && !fresh)
        return grow_large(pool, b, cap, class_of(b->cap));
    char *data = class < 0 ? malloc(cap) : take(pool, class);
    if (data == NULL)
        return -ENOMEM;
    if (fresh) {
        pool->in_use++;
    } else {
        memcpy(data, b->data, b->len);
        give(pool, class_of(b->cap), b->data);
    }
    b->data = data;
    b->cap = cap;
    return 0;
}

/* A promise to nobody: without memory for a smaller one, it stays as it is. */
void
pf__buffer_shrink(pf__pool *pool, pf__buffer *b, size_t cap)
{
    pf__buffer smaller = {0};
    if (cap < b->len || cap >= b->cap || pf__buffer_grow(pool, &smaller, cap) < 0)
        return;
    pf__buffer_put(&smaller, b->data, b->len);
    pf__buffer_release(pool, b);
    *b = smaller;
}

void
pf__buffer_release(pf__pool *pool, pf__buffer *b)
{
    if (b->data == NULL)
        return;
    pool->in_use--;
    give(pool, class_of(b->cap), b->data);
    *b = (pf__buffer){0};
}

void
pf__buffer_empty_pool(pf__pool *pool)
{
    for (int i = 0; i < PF__BUFFER_CLASSES; i++)
        while (pool->spares[i] > 0)
            free(take(pool, i));
}
