/* scoreboard.c - one row of shared memory for each worker.
 *
 * A row has one writer, the loop of its worker, and any number of readers in any
 * process. Everything in it is an aligned word that is stored whole, so nobody locks
 * and the writer pays for plain stores; a reader may see one counter a request ahead of
 * another. When a worker has ended the master adds its row to the retired totals and
 * frees it; version is odd meanwhile, so that nobody counts a row twice or not at all.
 *
 * The memory is a memfd, shared by fork and, through its descriptor, by exec.
 */
#include "internal.h"

#include <errno.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static_assert(sizeof(pf_row) % 64 == 0, "no two workers write to one cache line");

struct pf_scoreboard {
    int fd;
    size_t size;
    struct board *board;
};

struct board {
    uint32_t rows;
    _Atomic uint32_t version;
    _Atomic uint32_t used; /* no row at or behind it was ever claimed */
    alignas(64) pf_tickets tickets;
    alignas(64) pf_row retired; /* totals of those that have ended; the master's */
    pf_row row[];
};

/* ---- making it ----------------------------------------------------------------------*/
static int
map_board(pf_scoreboard *s)
{
    void *memory = mmap(NULL, s->size, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    s->board = memory;
    return 0;
}

static int
own_memory(pf_scoreboard *s, uint32_t rows)
{
    s->size = sizeof(struct board) + rows * sizeof(pf_row);
    s->fd = memfd_create("prefork-scoreboard", MFD_CLOEXEC);
    if (s->fd < 0 || ftruncate(s->fd, (off_t)s->size) < 0)
        return -errno;
    int rc = map_board(s);
    if (rc == 0)
        s->board->rows = rows;
    return rc;
}

static int
others_memory(pf_scoreboard *s, int fd)
{
    struct stat st;
    s->fd = fd;
    if (fstat(fd, &st) < 0)
        return -errno;
    s->size = (size_t)st.st_size;
    if (s->size < sizeof(struct board))
        return -EINVAL;
    int rc = map_board(s);
    if (rc == 0 && s->size != sizeof(struct board) + s->board->rows * sizeof(pf_row))
        return -EINVAL;
    return rc;
}

static int
finish_open(pf_scoreboard **out, pf_scoreboard *s, int rc)
{
    if (rc < 0)
        pf_scoreboard_close(s);
    else
        *out = s;
    return rc;
}

int
pf_scoreboard_open(pf_scoreboard **out, uint32_t rows)
{
    pf_scoreboard *s = calloc(1, sizeof *s);
    if (s == NULL)
        return -ENOMEM;
    s->fd = -1;
    return finish_open(out, s, own_memory(s, rows));
}

int
pf_scoreboard_attach(pf_scoreboard **out, int fd)
{
    pf_scoreboard *s = calloc(1, sizeof *s);
    if (s == NULL)
        return -ENOMEM;
    return finish_open(out, s, others_memory(s, fd));
}

pf_tickets *
pf_scoreboard_tickets(pf_scoreboard *s)
{
    return &s->board->tickets;
}

int
pf_scoreboard_fileno(const pf_scoreboard *s)
{
    return s->fd;
}

void
pf_scoreboard_close(pf_scoreboard *s)
{
    if (s->board != NULL)
        munmap(s->board, s->size);
    if (s->fd >= 0)
        close(s->fd);
    free(s);
}

/* ---- the master's side --------------------------------------------------------------*/
static int64_t
monotonic_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int
pf_scoreboard_claim(pf_scoreboard *s, uint32_t slot, uint32_t generation)
{
    for (uint32_t i = 0; i < s->board->rows; i++) {
        pf_row *row = &s->board->row[i];
        if (row->state != PF_ROW_FREE)
            continue;
        *row = (pf_row){.slot = slot, .generation = generation};
        row->started_ms = row->heartbeat_ms = monotonic_ms();
        row->state = PF_ROW_BOOTING;
        if (i >= atomic_load(&s->board->used))
            atomic_store(&s->board->used, i + 1);
        return (int)i;
    }
    return -ENOSPC;
}

static void
add_stats(pf_loop_stats *to, const pf_loop_stats *from)
{
    to->accepted += from->accepted;
    to->closed += from->closed;
    to->requests += from->requests;
    to->refused += from->refused;
    to->timeouts += from->timeouts;
    to->bytes_in += from->bytes_in;
    to->bytes_out += from->bytes_out;
    to->passed_on += from->passed_on;
    for (int i = 0; i < 6; i++)
        to->statuses[i] += from->statuses[i];
}

static void
add_row(pf_row *to, const pf_row *from)
{
    add_stats(&to->stats, &from->stats);
    for (int i = 0; i < PF_LATENCY_BUCKETS; i++)
        to->latency[i] += from->latency[i];
}

int
pf_scoreboard_retire(pf_scoreboard *s, int index)
{
    struct board *board = s->board;
    if (index < 0 || (uint32_t)index >= board->rows)
        return -EINVAL;
    pf_row *row = &board->row[index];
    atomic_fetch_add(&board->version, 1);
    add_row(&board->retired, row);
    *row = (pf_row){.state = PF_ROW_FREE};
    atomic_fetch_add(&board->version, 1);
    return 0;
}

int
pf_scoreboard_adopt(pf_scoreboard *s, int index, uint32_t slot, int fd)
{
    const pf_row *row = pf_scoreboard_row(s, index);
    pf__mail mail = {.kind = PF__MAIL_ADOPT, .slot = slot};
    return row == NULL ? -EINVAL : pf__mailbox_send(-1, row, &mail, fd);
}

int
pf_scoreboard_release(pf_scoreboard *s, int index, uint32_t slot)
{
    const pf_row *row = pf_scoreboard_row(s, index);
    pf__mail mail = {.kind = PF__MAIL_RELEASE, .slot = slot};
    return row == NULL ? -EINVAL : pf__mailbox_send(-1, row, &mail, -1);
}

/* ---- anybody's side -----------------------------------------------------------------*/
int
pf_scoreboard_rows(const pf_scoreboard *s)
{
    return (int)atomic_load_explicit(&s->board->used, memory_order_relaxed);
}

pf_row *
pf_scoreboard_row(pf_scoreboard *s, int index)
{
    if (index < 0 || (uint32_t)index >= s->board->rows)
        return NULL;
    return &s->board->row[index];
}

void
pf_scoreboard_totals(const pf_scoreboard *s, pf_row *out)
{
    struct board *board = s->board;
    uint32_t before, tries = 0;
    do {
        before = atomic_load(&board->version);
        *out = board->retired;
        for (int i = 0; i < pf_scoreboard_rows(s); i++) {
            const pf_row *row = &board->row[i];
            add_row(out, row);
            out->stats.connections += row->stats.connections;
            out->stats.lent += row->stats.lent;
        }
    } while ((before & 1 || before != atomic_load(&board->version)) && ++tries < 1000);
}

/* ---- latency ------------------------------------------------------------------------
 * Four buckets to each power of two: a bound is at most a quarter above its value.
 */
int
pf_scoreboard_bucket(uint64_t us)
{
    if (us < 4)
        return (int)us;
    int power = 63 - __builtin_clzll(us);
    int bucket = 4 * (power - 1) + (int)(us >> (power - 2) & 3);
    return bucket < PF_LATENCY_BUCKETS ? bucket : PF_LATENCY_BUCKETS - 1;
}

uint64_t
pf_scoreboard_bound(int bucket)
{
    if (bucket < 4)
        return (uint64_t)bucket + 1;
    int power = bucket / 4 + 1;
    return (uint64_t)(4 + bucket % 4 + 1) << (power - 2);
}
