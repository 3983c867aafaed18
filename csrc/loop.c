/* loop.c - accept, timeouts, batches, flush, drain.
 *
 * One turn of pf_loop_wait(): settle what the last batch left (send its answers, close,
 * register), hand out requests that are ready already, else sleep in the poller, let
 * connections act on what woke us, act on deadlines, and hand out what became ready.
 * Turns that bring nothing for the caller go round inside, so that refusing, timing out
 * and writing on never need the caller's locks.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    BATCH = 64,           /* readiness taken from the poller at once */
    ACCEPTS_MAX = 64,     /* of one listener before connections have their turn */
    READY_TURNS_MAX = 16, /* batches of pipelined requests before the poller is asked */
    SWEEP_MAX = 1 << 16,  /* in a drain: more than any queue holds */
    PAUSE_MS = 100,       /* without accepting when descriptors have run out */
    REFUSED_MAX = 128,    /* connections over a limit that may wait for their answer */
    CROWDED = 6,          /* connections more than another, to pass one on */
    MANY = 128,           /* connections, of which a smaller part is too many */
    BALANCE_MS = 100,     /* between two looks at the others' loads */
    UNEVEN_MS = 1,        /* the same, where fewer were quiet than are too many, */
    FRUITLESS_MAX = 64,   /* unless so many looks have found none */
    BALANCE_SCAN = 256,   /* connections looked at for quiet ones */
    LATELY_MS = 128,      /* in which connections that are gone count, too */
    SAMPLE = 4,           /* other workers compared with for each connection */
    STUCK_MS = 100,       /* in one turn: no connection is passed to such a worker */
    LATE_MS = 250,        /* how long a drain accepts what is still on its way */
    CLOSING_PART = 8,   /* of the time that it reads: how long it closes, behind that */
    UNEXPIRED_MAX = 64, /* full batches before deadlines are looked at */
};

/* ---- options ------------------------------------------------------------------------*/
void
pf_options_init(pf_options *o)
{
    *o = (pf_options){
        .max_connections = 65536,
        .header_timeout_ms = 30000,
        .read_timeout_ms = 30000,
        .write_timeout_ms = 30000,
        .idle_timeout_ms = 75000,
        .tls_timeout_ms = 10000,
        .linger_timeout_ms = 2000,
        .drain_idle_ms = 1000,
        .min_body_rate = 240,
        .read_buffer_size = 4096,
        .max_target_size = 8192,
        .max_field_size = 16384,
        .max_header_size = 65536,
        .max_fields = 100,
        .max_body_size = (uint64_t)1 << 30,
        .ws_max_size = 16 << 20,
        .ws_ping_interval_ms = 20000,
        .ws_ping_timeout_ms = 20000,
        .ws_close_timeout_ms = 10000,
        .server = "prefork",
        .content_type = "text/plain; charset=utf-8",
        .flags = PF_OPTION_TCP_KEEPALIVE | PF_OPTION_WS_DEFLATE,
    };
}

/* Limits that the data structures set. */
static int
check_options(const pf_options *o)
{
    bool fits = o->max_fields <= PF_HEAD_FIELDS && o->max_field_size <= UINT16_MAX
                && o->max_header_size <= INT_MAX / 2
                && o->max_target_size <= o->max_header_size
                && o->read_buffer_size >= 256 && o->read_buffer_size <= (1 << 20)
                && o->max_body_size <= INT64_MAX && o->ws_max_size <= 1 << 30
                && pf__trust_is_valid(o->proxy_trust, o->proxy_trusted)
                && pf__trust_is_valid(o->forwarded_trust, o->forwarded_trusted);
    return fits ? 0 : -EINVAL;
}

/* ---- who is in the loop -------------------------------------------------------------
 * One thread at a time, from its call to the return; whose turn it is, the callers' own
 * lock says. But in its light sleep a shared loop's thread is not in it: others may be.
 */
static inline void
enter(pf_loop *loop)
{
    bool entered = false;
    assert(atomic_compare_exchange_strong(&loop->entered, &entered, true));
    (void)loop, (void)entered;
}

static inline void
leave(pf_loop *loop)
{
    bool entered = true;
    assert(atomic_compare_exchange_strong(&loop->entered, &entered, false));
    (void)loop, (void)entered;
}

/* ---- clocks -------------------------------------------------------------------------*/
static void
read_monotonic(pf_loop *loop)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    loop->now_us = (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
    loop->now = loop->now_us / 1000;
}

static void
read_clocks(pf_loop *loop)
{
    struct timespec wall;
    read_monotonic(loop);
    clock_gettime(CLOCK_REALTIME_COARSE, &wall);
    pf__response_stamp_update(&loop->stamp, wall.tv_sec);
}

/* ---- opening ------------------------------------------------------------------------*/
static int
open_wake(pf_loop *loop)
{
    int ends[2];
    if (pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0)
        return -errno;
    loop->wake = (pf__source){.kind = PF__SOURCE_WAKE, .fd = ends[0]};
    loop->wake_write = ends[1];
    return pf__poller_add(&loop->poller, &loop->wake);
}

static int
own_networks(const pf_network **place, uint32_t n)
{
    const pf_network *list = *place;
    pf_network *copy = n > 0 ? malloc(n * sizeof *copy) : NULL;
    *place = copy;
    if (copy == NULL)
        return n > 0 ? -ENOMEM : 0;
    memcpy(copy, list, n * sizeof *copy);
    return 0;
}

/* From here on nothing of them is borrowed, whatever this returns. */
static int
own_options(pf_options *o)
{
    o->server = o->content_type = NULL; /* the stamp has copies */
    int proxies = own_networks(&o->proxy_trust, o->proxy_trusted);
    int forwarders = own_networks(&o->forwarded_trust, o->forwarded_trusted);
    return proxies < 0 ? proxies : forwarders;
}

static void
free_options(pf_options *o)
{
    free((void *)(uintptr_t)o->proxy_trust);
    free((void *)(uintptr_t)o->forwarded_trust);
}

static int
copy_spill_dir(pf_loop *loop)
{
    const char *dir = loop->options.spill_dir;
    loop->options.spill_dir = NULL;
    loop->spill_dir = strdup(dir ? dir : "/tmp");
    return loop->spill_dir ? 0 : -ENOMEM;
}

int
pf_loop_open(pf_loop **out, const pf_options *options)
{
    int rc = check_options(options);
    if (rc < 0)
        return rc;
    pf_loop *loop = calloc(1, sizeof *loop);
    if (loop == NULL)
        return -ENOMEM;
    pthread_mutex_init(&loop->door, NULL);
    loop->row = &loop->own_row;
    loop->mailbox.fd = -1;
    loop->ready_end = &loop->ready;
    loop->wake.fd = loop->wake_write = -1;
    pf__response_stamp_init(&loop->stamp, options);
    loop->options = *options;
    int owned = own_options(&loop->options);
    rc = pf__poller_open(&loop->poller);
    if (rc == 0)
        rc = owned;
    if (rc == 0)
        rc = open_wake(loop);
    if (rc == 0)
        rc = copy_spill_dir(loop);
    read_clocks(loop);
    pf__timer_open(&loop->wheel, loop->now);
    if (rc < 0) {
        pf_loop_close(loop);
        pf_loop_free(loop);
        return rc;
    }
    *out = loop;
    return 0;
}

int
pf_loop_attach(pf_loop *loop, pf_scoreboard *board, int index)
{
    pf_row *row = pf_scoreboard_row(board, index);
    if (row == NULL)
        return -EINVAL;
    int fd = pf__mailbox_open(row);
    if (fd < 0)
        return fd;
    loop->mailbox = (pf__source){.kind = PF__SOURCE_MAILBOX, .fd = fd};
    int rc = pf__poller_add(&loop->poller, &loop->mailbox);
    if (rc < 0)
        return rc;
    loop->board = board;
    loop->row = row;
    row->pid = (uint32_t)getpid();
    row->state = PF_ROW_RUNNING;
    return 0;
}

/* ---- accepting ----------------------------------------------------------------------*/
/* Accepted sockets inherit these from their listener, which saves calls on each. */
static void
set_inherited_options(const pf_loop *loop, int fd)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (loop->options.flags & PF_OPTION_TCP_KEEPALIVE)
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
}

static bool
is_tcp(int fd)
{
    int domain = 0;
    socklen_t len = sizeof domain;
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len);
    return domain == AF_INET || domain == AF_INET6;
}

/* Between workers, as none is that has others beside it at its address. */
static bool
is_shared(int fd)
{
    int reuseport = 0;
    socklen_t len = sizeof reuseport;
    getsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &reuseport, &len);
    return reuseport == 0;
}

static int
set_nonblocking(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    return 0;
}

static int
add_listener(pf_loop *loop, const pf__listener *like)
{
    pf__listener *listener = malloc(sizeof *listener);
    if (listener == NULL)
        return -ENOMEM;
    *listener = *like;
    int rc = pf__poller_add_listener(&loop->poller, &listener->source);
    if (rc < 0) {
        free(listener);
        return rc;
    }
    listener->next = loop->listeners;
    loop->listeners = listener;
    return 0;
}

int
pf_loop_listen(pf_loop *loop, int fd)
{
    pf__listener like = {.source = {.kind = PF__SOURCE_LISTENER, .fd = fd},
                         .shared = is_shared(fd)};
    if (is_tcp(fd))
        set_inherited_options(loop, fd);
    int rc = set_nonblocking(fd);
    return rc < 0 ? rc : add_listener(loop, &like);
}

int
pf_loop_secure(pf_loop *loop, pf_tls *tls)
{
    pf_tls *before = loop->tls;
    loop->tls = pf__tls_own(tls);
    pf_tls_close(before);
    return 0;
}

static void
forget_listener(pf_loop *loop, pf__listener **place)
{
    pf__listener *listener = *place;
    *place = listener->next;
    pf__poller_remove(&loop->poller, &listener->source);
    if (listener->adopted)
        close(listener->source.fd);
    free(listener);
}

typedef union any_address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    struct sockaddr_storage room;
} any_address;

static void
peer_from(pf_peer *peer, const any_address *address)
{
    *peer = (pf_peer){.family = address->any.sa_family};
    if (peer->family == AF_INET) {
        memcpy(peer->bytes, &address->v4.sin_addr, 4);
        peer->port = ntohs(address->v4.sin_port);
    } else if (peer->family == AF_INET6) {
        memcpy(peer->bytes, &address->v6.sin6_addr, 16);
        peer->port = ntohs(address->v6.sin6_port);
        peer->scope = address->v6.sin6_scope_id;
    }
}

static void
pause_accepting(pf_loop *loop)
{
    for (pf__listener *l = loop->listeners; l != NULL; l = l->next)
        pf__poller_remove(&loop->poller, &l->source);
    loop->accept_again = loop->now + PAUSE_MS;
}

static void
resume_accepting(pf_loop *loop)
{
    loop->accept_again = 0;
    for (pf__listener *l = loop->listeners; l != NULL; l = l->next)
        if (!l->source.registered
            && pf__poller_add_listener(&loop->poller, &l->source) < 0)
            loop->accept_again = loop->now + PAUSE_MS;
}

/* Out of descriptors or memory: the queue keeps its connections, and asking again at
 * once would spin on a listener that stays readable. */
static bool
is_shortage(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

/* 0, or PF_ERR_* that a new connection gets instead of service. Those that were turned
 * away take nobody's place: else an address over its own limit could fill the other. */
static int
admission(pf_loop *loop, const pf__origin *origin)
{
    const pf_peer *peer = &origin->peer;
    const pf_options *o = &loop->options;
    uint32_t served = loop->row->stats.connections - loop->turned_away;
    if (o->max_connections > 0 && served >= o->max_connections)
        return PF_ERR_CONNECTIONS;
    if (o->max_connections_per_ip == 0 || peer->family == AF_UNIX
        || pf__conn_introduces(loop, origin))
        return 0;
    int rc = pf__peers_add(&loop->peers, peer, o->max_connections_per_ip);
    return rc == 0 ? 0 : rc > 0 ? PF_ERR_CONNECTIONS_PER_IP : PF_ERR_CONNECTIONS;
}

/* Connections that a worker has taken in since the clock's last multiple of LATELY_MS. */
static uint32_t
taken_lately(const pf_loop *loop, const pf_row *row)
{
    return row->taken_at == (uint32_t)(loop->now / LATELY_MS) ? row->taken : 0;
}

static void
take_in(pf_loop *loop, int fd, const pf__origin *origin)
{
    loop->row->taken = taken_lately(loop, loop->row) + 1;
    loop->row->taken_at = (uint32_t)(loop->now / LATELY_MS);
    int refusal = admission(loop, origin);
    if (refusal != 0 && loop->turned_away >= REFUSED_MAX) {
        loop->row->stats.refused++;
        close(fd);
        return;
    }
    pf__conn_open(loop, fd, origin, refusal);
}

/* ---- an even load -------------------------------------------------------------------
 * The kernel wakes some worker for a connection, or hashes it to one, and neither knows
 * how many each has already. So a worker that has accepted clearly more than another
 * passes the connection on, before it has read a byte of it. Connections that end with
 * their first answer hardly show in how many there are: of those, who has taken in more
 * lately gives some to who has less to do.
 */
static bool
takes_more(const pf_loop *loop, const pf_row *row)
{
    if (row == loop->row)
        return false;
    if (row->state == PF_ROW_WAITING)
        return true;
    return row->state == PF_ROW_RUNNING && loop->now - row->heartbeat_ms < STUCK_MS;
}

static uint32_t
load_of(const pf_row *row)
{
    int32_t expected = __atomic_load_n(&row->expected, __ATOMIC_RELAXED);
    return row->stats.connections + (expected > 0 ? (uint32_t)expected : 0);
}

/* The least loaded of a few: in turn, all are looked at. */
static pf_row *
idler(pf_loop *loop)
{
    pf_row *best = NULL;
    int rows = pf_scoreboard_rows(loop->board);
    for (int seen = 0, tried = 0; seen < SAMPLE && tried < rows; tried++) {
        loop->candidate = (loop->candidate + 1) % (uint32_t)rows;
        pf_row *row = pf_scoreboard_row(loop->board, (int)loop->candidate);
        if (!takes_more(loop, row))
            continue;
        seen++;
        if (best == NULL || load_of(row) < load_of(best))
            best = row;
    }
    return best;
}

/* The promise comes before the second look at its state: either we see that it drains,
 * or it sees that something is on its way and waits for it. */
static bool
send_to(pf_loop *loop, pf_row *row, const pf__mail *mail, int fd)
{
    __atomic_fetch_add(&row->expected, 1, __ATOMIC_SEQ_CST);
    uint32_t state = __atomic_load_n(&row->state, __ATOMIC_SEQ_CST);
    bool takes = state == PF_ROW_WAITING || state == PF_ROW_RUNNING;
    if (takes && pf__mailbox_send(loop->mailbox.fd, row, mail, fd) == 0)
        return true;
    __atomic_fetch_sub(&row->expected, 1, __ATOMIC_SEQ_CST);
    return false;
}

/* How many more connections are too many. Few come and go, and their number jumps; many
 * stay, and where each may occupy a thread, a handful too many has to wait. */
static uint32_t
tolerated(uint32_t load)
{
    return load < MANY ? CROWDED : 2 + load / MANY;
}

static bool
is_ahead(const pf_loop *loop, const pf_row *row)
{
    uint32_t taken = taken_lately(loop, row);
    return taken_lately(loop, loop->row) > taken + taken / 16 + CROWDED;
}

/* A worker that should have some of ours, or NULL. A census by address is each worker's
 * own: who is over the limit there may not be so here, and would be turned away. */
static pf_row *
less_loaded(pf_loop *loop)
{
    uint32_t own = loop->row->stats.connections;
    if (PF__LIKELY(loop->board == NULL || own == 0 || loop->draining)
        || loop->options.max_connections_per_ip > 0)
        return NULL;
    pf_row *row = idler(loop);
    if (row == NULL)
        return NULL;
    uint32_t load = load_of(row);
    return own > load + (is_ahead(loop, row) ? 0 : tolerated(load)) ? row : NULL;
}

static bool
pass_to(pf_loop *loop, pf_row *row, int fd, const pf__origin *origin)
{
    pf__mail mail = {.kind = PF__MAIL_CONNECTION, .origin = *origin};
    if (!send_to(loop, row, &mail, fd))
        return false;
    loop->row->stats.passed_on++;
    return true;
}

static bool
pass_on(pf_loop *loop, int fd, const pf__origin *origin)
{
    pf_row *row = less_loaded(loop);
    if (PF__LIKELY(row == NULL) || !pass_to(loop, row, fd, origin))
        return false;
    close(fd);
    return true;
}

/* Loads drift apart as peers leave, and a burst can fill a mailbox: so now and then, on
 * the way to sleep, quiet connections are passed on, half the difference at once. Where
 * handlers take their time hardly any is quiet, and none for long: then it looks again
 * soon. (Those of TLS never are: so it gives that up.) */
static void
balance(pf_loop *loop)
{
    if (PF__LIKELY(loop->board == NULL || loop->now < loop->balance_at))
        return;
    loop->balance_at = loop->now + BALANCE_MS;
    pf_row *row = less_loaded(loop);
    if (row == NULL)
        return;
    uint32_t own = loop->row->stats.connections, load = load_of(row);
    uint32_t more = own > load ? (own - load) / 2 : 0; /* it may have grown just now */
    pf_conn *conn = loop->conns, *next;
    loop->fruitless++;
    for (int i = 0; i < BALANCE_SCAN && conn != NULL && more > 0; i++, conn = next) {
        next = conn->next;
        if (!pf__conn_is_quiet(conn))
            continue;
        pf__origin origin = {conn->peer, conn->local, conn->introduced, conn->served};
        if (!pass_to(loop, row, conn->source.fd, &origin))
            return;
        pf__conn_leave(conn);
        loop->fruitless = 0;
        more--;
    }
    if (more > 0 && loop->fruitless < FRUITLESS_MAX)
        loop->balance_at = loop->now + UNEVEN_MS;
}

static void
admit(pf_loop *loop, int fd, const any_address *address)
{
    pf__origin origin = {.introduced = false};
    peer_from(&origin.peer, address);
    if (pass_on(loop, fd, &origin))
        return;
    take_in(loop, fd, &origin);
}

/* Accept until the queue is empty or `max` were accepted. */
static void
accept_some(pf_loop *loop, pf__listener *listener, int max)
{
    while (max > 0) {
        any_address address;
        socklen_t len = sizeof address;
        int fd = accept4(listener->source.fd, &address.any, &len,
                         SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            admit(loop, fd, &address);
            max--;
            continue;
        }
        if (errno == EINTR || errno == ECONNABORTED)
            continue;
        if (is_shortage(errno)) {
            pf_conn nobody = {.id = 0};
            pf__notices_add(loop, &nobody, PF_NOTICE_ERROR, -errno);
            pause_accepting(loop);
        }
        return;
    }
}

/* Of those that sleep the kernel wakes who has waited longest for this listener, and
 * goes on waking it as long as it sleeps again in time. Who is ahead lines up anew. */
static void
line_up(pf_loop *loop, pf__listener *listener)
{
    if (loop->board == NULL || !listener->shared || !listener->source.registered)
        return;
    pf_row *row = idler(loop);
    if (row == NULL || !is_ahead(loop, row))
        return;
    pf__poller_remove(&loop->poller, &listener->source);
    if (pf__poller_add_listener(&loop->poller, &listener->source) < 0)
        loop->accept_again = loop->now + PAUSE_MS;
}

static void
heed_listener(pf_loop *loop, pf__listener *listener)
{
    if (!listener->source.registered)
        return; /* paused by an earlier one of this batch */
    accept_some(loop, listener, ACCEPTS_MAX);
    line_up(loop, listener);
}

/* No new handshake begins here: pf_socket_quiesce() has attached its filter. */
static bool
is_quiesced(int fd)
{
    socklen_t instructions = 0;
    return getsockopt(fd, SOL_SOCKET, SO_GET_FILTER, NULL, &instructions) == 0
           && instructions > 0;
}

static bool
all_quiesced(const pf_loop *loop)
{
    for (const pf__listener *l = loop->listeners; l != NULL; l = l->next)
        if (!is_quiesced(l->source.fd))
            return false;
    return loop->listeners != NULL;
}

static void
stop_accepting(pf_loop *loop, bool sweep)
{
    while (loop->listeners != NULL) {
        if (sweep)
            accept_some(loop, loop->listeners, SWEEP_MAX);
        forget_listener(loop, &loop->listeners);
    }
    loop->accept_again = loop->accept_until = 0;
}

/* ---- mail ---------------------------------------------------------------------------*/
static void
adopt(pf_loop *loop, uint32_t slot, int fd)
{
    pf__listener like = {.source = {.kind = PF__SOURCE_LISTENER, .fd = fd},
                         .adopted = true,
                         .slot = slot};
    if (fd >= 0 && (loop->draining || add_listener(loop, &like) < 0))
        close(fd);
}

static void
release(pf_loop *loop, uint32_t slot)
{
    pf__listener **place = &loop->listeners;
    while (*place != NULL)
        if ((*place)->adopted && (*place)->slot == slot)
            forget_listener(loop, place);
        else
            place = &(*place)->next;
}

static void
open_mail(pf_loop *loop, const pf__mail *mail, int fd)
{
    switch (mail->kind) {
    case PF__MAIL_CONNECTION:
        __atomic_fetch_sub(&loop->row->expected, 1, __ATOMIC_SEQ_CST);
        if (fd >= 0)
            take_in(loop, fd, &mail->origin);
        return;
    case PF__MAIL_ADOPT:
        adopt(loop, mail->slot, fd);
        return;
    case PF__MAIL_RELEASE:
        release(loop, mail->slot);
        break;
    default:
        break;
    }
    if (fd >= 0)
        close(fd);
}

static void
heed_mail(pf_loop *loop)
{
    pf__mail mail;
    int fd;
    loop->has_mail = false;
    while (pf__mailbox_receive(loop->mailbox.fd, &mail, &fd) > 0)
        open_mail(loop, &mail, fd);
}

/* In a drain: somebody has promised a connection that has not arrived. */
static bool
mail_is_due(const pf_loop *loop)
{
    return loop->board != NULL && loop->now < loop->mail_until
           && __atomic_load_n(&loop->row->expected, __ATOMIC_SEQ_CST) > 0;
}

/* ---- watching other descriptors -----------------------------------------------------*/
static pf__source **
find_watch(pf_loop *loop, int fd)
{
    for (uint32_t i = 0; i < loop->nwatches; i++)
        if (loop->watches[i]->fd == fd)
            return &loop->watches[i];
    return NULL;
}

int
pf_loop_watch(pf_loop *loop, int fd)
{
    pf__source **watches =
        realloc(loop->watches, (loop->nwatches + 1) * sizeof *watches);
    if (watches == NULL)
        return -ENOMEM;
    loop->watches = watches;
    pf__source *watch = malloc(sizeof *watch);
    if (watch == NULL)
        return -ENOMEM;
    *watch = (pf__source){.kind = PF__SOURCE_WATCH, .fd = fd};
    int rc = pf__poller_add(&loop->poller, watch);
    if (rc < 0) {
        free(watch);
        return rc;
    }
    loop->watches[loop->nwatches++] = watch;
    return 0;
}

int
pf_loop_unwatch(pf_loop *loop, int fd)
{
    pf__source **place = find_watch(loop, fd);
    if (place == NULL)
        return -ENOENT;
    int rc = pf__poller_remove(&loop->poller, *place);
    free(*place);
    *place = loop->watches[--loop->nwatches];
    return rc;
}

/* ---- a turn -------------------------------------------------------------------------*/
static void
settle(pf_loop *loop, bool force)
{
    pf_conn *conn = loop->dirty;
    loop->dirty = NULL;
    while (conn != NULL) {
        pf_conn *next = conn->next_dirty;
        conn->in_dirty = false;
        pf__conn_settle(conn, force);
        conn = next;
    }
}

static void
heed_wake(pf_loop *loop)
{
    char bytes[64];
    ssize_t n;
    do {
        n = read(loop->wake.fd, bytes, sizeof bytes);
        for (ssize_t i = 0; i < n; i++)
            loop->signalled |= bytes[i] != 0;
    } while (n == (ssize_t)sizeof bytes);
    loop->woken = true;
}

static int
take_released(pf_loop *loop, pf_event *events, int max)
{
    int n = 0;
    while (n < max && loop->nreleased > 0)
        events[n++] = (pf_event){.flags = PF_EVENT_RELEASED,
                                 .user = loop->released[--loop->nreleased]};
    return n;
}

/* The drain is done, and its caller does not know it yet. */
static bool
is_drained(const pf_loop *loop)
{
    return loop->draining && !loop->drained && loop->row->stats.connections == 0
           && loop->row->stats.lent == 0 && loop->listeners == NULL
           && loop->ready == NULL && !mail_is_due(loop);
}

static int
take_loop_events(pf_loop *loop, pf_event *events, int max)
{
    int n = 0;
    if (n < max && loop->woken) {
        events[n++] = (pf_event){.flags = PF_EVENT_WOKEN, .code = loop->signalled};
        loop->woken = loop->signalled = false;
    }
    if (n < max && is_drained(loop)) {
        loop->drained = true;
        events[n++] = (pf_event){.flags = PF_EVENT_DRAINED};
    }
    return n;
}

/* The connection's pending events become one event; false: there was nothing left. */
static bool
hand_out(pf_conn *conn, pf_event *event)
{
    pf_request *r = conn->request;
    uint32_t flags = conn->pending;
    conn->pending = 0;
    conn->in_ready = false;
    if (flags == 0 || r == NULL) {
        pf__conn_reap(conn);
        return false;
    }
    if (flags & PF_EVENT_REQUEST) {
        conn->lent = true;
        conn->hung_up = (flags & PF_EVENT_CLOSED) != 0;
        conn->loop->row->stats.lent++;
    }
    *event = (pf_event){flags, r->refused, r, r->user};
    return true;
}

static int
take_ready(pf_loop *loop, pf_event *events, int max)
{
    int n = 0;
    while (n < max && loop->ready != NULL) {
        pf_conn *conn = loop->ready;
        loop->ready = conn->next_ready;
        if (loop->ready == NULL)
            loop->ready_end = &loop->ready;
        if (hand_out(conn, &events[n]))
            n++;
    }
    return n;
}

static int
take_events(pf_loop *loop, pf_event *events, int max)
{
    int n = take_released(loop, events, max);
    n += take_ready(loop, events + n, max - n);
    n += take_loop_events(loop, events + n, max - n);
    return n;
}

static int64_t
next_deadline(const pf_loop *loop)
{
    int64_t deadline = pf__timer_next(&loop->wheel);
    if (loop->accept_again != 0 && loop->accept_again < deadline)
        deadline = loop->accept_again;
    if (loop->accept_until != 0 && loop->accept_until < deadline)
        deadline = loop->accept_until;
    if (mail_is_due(loop) && loop->mail_until < deadline)
        deadline = loop->mail_until;
    return deadline;
}

/* How long the poller may sleep: not at all with work left, not past `until`. */
static int
sleep_ms(const pf_loop *loop, int64_t until)
{
    if (pf_loop_ready(loop))
        return 0;
    int64_t deadline = next_deadline(loop);
    if (until < deadline)
        deadline = until;
    if (deadline == INT64_MAX)
        return -1;
    int64_t left = deadline - loop->now;
    return left <= 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left;
}

static void
expire(pf_loop *loop)
{
    pf__timer *timer;
    while ((timer = pf__timer_expired(&loop->wheel, loop->now)) != NULL)
        pf__conn_timeout((pf_conn *)((char *)timer - offsetof(pf_conn, timer)));
    if (loop->accept_again != 0 && loop->accept_again <= loop->now)
        resume_accepting(loop);
    if (loop->accept_until != 0 && loop->accept_until <= loop->now)
        stop_accepting(loop, true);
}

/* Returns 1 if a watched fd took an event slot. */
static int
dispatch(pf_loop *loop, const pf__readiness *ready, pf_event *event)
{
    pf__source *source = ready->data.ptr;
    switch (source->kind) {
    case PF__SOURCE_CONN:
        pf__conn_event((pf_conn *)source, ready->events);
        return 0;
    case PF__SOURCE_LISTENER:
        heed_listener(loop, (pf__listener *)source);
        return 0;
    case PF__SOURCE_WAKE:
        heed_wake(loop);
        return 0;
    case PF__SOURCE_MAILBOX:
        loop->has_mail = true;
        return 0;
    case PF__SOURCE_TIMER:
        loop->poller.armed = 0; /* it has fired: arm it anew */
        return 0;
    default:
        if (event == NULL)
            return 0; /* level-triggered: it comes again */
        *event = (pf_event){.flags = PF_EVENT_READABLE, .code = source->fd};
        return 1;
    }
}

static inline void
set_state(pf_loop *loop, uint32_t state)
{
    if (!loop->draining)
        __atomic_store_n(&loop->row->state, state, __ATOMIC_RELAXED);
}

static void
end_quarantine(pf_loop *loop)
{
    while (loop->quarantine != NULL) {
        pf_conn *conn = loop->quarantine;
        loop->quarantine = conn->next;
        conn->next = loop->free_conns;
        loop->free_conns = conn;
    }
}

/* A sleep in which the loop can be borrowed. */
static int
sleep_lightly(pf_loop *loop, pf__readiness *ready, int timeout_ms)
{
    end_quarantine(loop);
    pthread_mutex_lock(&loop->door);
    loop->asleep = true;
    loop->asleep_until = timeout_ms < 0 ? INT64_MAX : loop->now + timeout_ms;
    leave(loop);
    pthread_mutex_unlock(&loop->door);
    int n = pf__poller_wait(&loop->poller, ready, BATCH, timeout_ms);
    pthread_mutex_lock(&loop->door);
    enter(loop);
    loop->asleep = false;
    pthread_mutex_unlock(&loop->door);
    return n;
}

/* Ask the poller once. Returns the events that watched fds made, or -errno. */
static int
poll_once(pf_loop *loop, pf_event *events, int max, int timeout_ms)
{
    pf__readiness ready[BATCH];
    set_state(loop, PF_ROW_WAITING);
    int n = loop->shared && timeout_ms != 0
                ? sleep_lightly(loop, ready, timeout_ms)
                : pf__poller_wait(&loop->poller, ready, BATCH, timeout_ms);
    read_clocks(loop);
    loop->row->heartbeat_ms = loop->now;
    set_state(loop, PF_ROW_RUNNING);
    loop->turns = 0;
    if (n < 0)
        return n;
    int taken = 0;
    for (int i = 0; i < n; i++)
        __builtin_prefetch(ready[i].data.ptr, 1);
    for (int i = 0; i < n; i++)
        taken += dispatch(loop, &ready[i], taken < max ? &events[taken] : NULL);
    if (PF__UNLIKELY(loop->has_mail))
        heed_mail(loop); /* last: it may free a listener that this batch names */
    /* Where a handler has held up the loop, what peers have sent in time may wait behind
     * this batch: nobody is late before that was looked at. */
    if (n < BATCH || ++loop->unexpired > UNEXPIRED_MAX) {
        loop->unexpired = 0;
        expire(loop);
    }
    return taken;
}

/* One turn. < 0: -errno; else the number of events. */
static int
turn(pf_loop *loop, pf_event *events, int max, int64_t until)
{
    settle(loop, false);
    balance(loop);
    if (loop->ready != NULL && ++loop->turns < READY_TURNS_MAX)
        return take_events(loop, events, max);
    int n = poll_once(loop, events, max, sleep_ms(loop, until));
    if (n < 0)
        return n;
    if (loop->ready == NULL && loop->dirty != NULL)
        settle(loop, false); /* refusals and closes wait for nobody's answer */
    return n + take_events(loop, events + n, max - n);
}

int
pf_loop_wait(pf_loop *loop, pf_event *events, int max, int timeout_ms)
{
    int64_t until = timeout_ms < 0 ? INT64_MAX : loop->now + timeout_ms;
    int n;
    enter(loop);
    do
        n = turn(loop, events, max, until);
    while (n == 0 && loop->notices.count == 0 && loop->now < until);
    leave(loop);
    return n == -EINTR ? 0 : n;
}

int64_t
pf_loop_now(const pf_loop *loop)
{
    return loop->now;
}

int64_t
pf_loop_touch(pf_loop *loop)
{
    read_monotonic(loop);
    return loop->now;
}

int
pf_loop_flush(pf_loop *loop)
{
    bool borrowed = loop->borrowed_out; /* by the caller, who is in it then */
    if (!borrowed)
        enter(loop);
    settle(loop, true);
    if (!borrowed)
        leave(loop);
    return 0;
}

int
pf_loop_wake(pf_loop *loop)
{
    ssize_t n = write(loop->wake_write, "", 1);
    return n < 0 && errno != EAGAIN ? -errno : 0; /* full: it will wake anyway */
}

/* ---- other threads ------------------------------------------------------------------*/
void
pf_loop_share(pf_loop *loop)
{
    loop->shared = true;
}

bool
pf_loop_borrow(pf_loop *loop)
{
    if (!loop->shared || pthread_mutex_trylock(&loop->door) != 0)
        return false;
    if (!loop->asleep) {
        pthread_mutex_unlock(&loop->door);
        return false;
    }
    enter(loop);
    loop->borrowed_out = true;
    read_clocks(loop);
    return true;
}

/* Its thread may have been woken for it already; but then it has not looked yet, and
 * finding nothing it sleeps on without having left the kernel. Or it has looked, and
 * waits at the door with a batch. So a borrower sees to connections alone: mail may free
 * a listener that this batch names, and who accepts is to think of the other workers. All
 * of that is level-triggered, and so still there for the loop's own thread. */
bool
pf_loop_poll(pf_loop *loop, pf_event *event)
{
    pf__readiness ready;
    settle(loop, true);
    if (loop->ready == NULL && pf__poller_wait(&loop->poller, &ready, 1, 0) == 1
        && ((pf__source *)ready.data.ptr)->kind == PF__SOURCE_CONN)
        dispatch(loop, &ready, NULL);
    pf_conn *conn = loop->ready;
    bool whole = conn != NULL && conn->pending == PF_EVENT_REQUEST
                 && conn->request->refused == 0 && conn->request->body_done;
    return whole && take_ready(loop, event, 1) == 1;
}

void
pf_loop_return(pf_loop *loop)
{
    settle(loop, true);
    bool due = pf_loop_ready(loop) || loop->notices.count > 0
               || next_deadline(loop) < loop->asleep_until;
    loop->borrowed_out = false;
    leave(loop);
    pthread_mutex_unlock(&loop->door);
    if (due)
        pf_loop_wake(loop);
}

int
pf_loop_wake_fileno(pf_loop *loop)
{
    return loop->wake_write;
}

/* ---- inside another loop ------------------------------------------------------------*/
int
pf_loop_fileno(pf_loop *loop)
{
    int rc = pf__poller_embed(&loop->poller);
    if (rc < 0)
        return rc;
    loop->embedded = true;
    pf__poller_arm(&loop->poller, loop->now, next_deadline(loop));
    return loop->poller.fd;
}

bool
pf_loop_ready(const pf_loop *loop)
{
    return loop->dirty != NULL || loop->ready != NULL || loop->nreleased > 0
           || loop->woken || is_drained(loop);
}

/* ---- drain and close ----------------------------------------------------------------*/
/* On a quiesced listener with TCP_DEFER_ACCEPT, a peer may have finished its handshake
 * and be about to send: it is in no queue yet, and would be reset by the close. So a
 * quiesced listener is accepted from a little longer; one that lives on in other
 * workers is left to them at once. */
int
pf_loop_drain(pf_loop *loop, bool sweep, int read_ms)
{
    bool again = loop->draining;
    loop->draining = true;
    __atomic_store_n(&loop->row->state, PF_ROW_DRAINING, __ATOMIC_SEQ_CST);
    pf_loop_touch(loop);
    if (!again) {
        loop->mail_until = loop->now + LATE_MS;
        if (read_ms >= 0) {
            loop->read_until = loop->now + read_ms;
            loop->close_until = loop->read_until + read_ms / CLOSING_PART;
        }
    }
    if (sweep && !again && all_quiesced(loop)) {
        int64_t late = loop->options.drain_idle_ms;
        loop->accept_until = loop->now + (late < LATE_MS ? late : LATE_MS);
    } else if (loop->accept_until == 0 || again) {
        stop_accepting(loop, sweep);
    }
    for (pf_conn *conn = loop->conns, *next; conn != NULL; conn = next) {
        next = conn->next;
        pf__conn_drain(conn, again);
    }
    return 0;
}

static void
free_lists(pf_loop *loop)
{
    while (loop->free_conns != NULL) {
        pf_conn *conn = loop->free_conns;
        loop->free_conns = conn->next;
        free(conn);
    }
    while (loop->free_requests != NULL) {
        pf_request *r = loop->free_requests;
        loop->free_requests = r->next_free;
        free(r);
    }
    pf__buffer_empty_pool(&loop->pool);
}

static void
close_sources(pf_loop *loop)
{
    while (loop->nwatches > 0)
        pf_loop_unwatch(loop, loop->watches[0]->fd);
    free(loop->watches);
    loop->watches = NULL;
    if (loop->mailbox.fd >= 0)
        close(loop->mailbox.fd);
    loop->mailbox.fd = -1;
    if (loop->wake.fd >= 0)
        close(loop->wake.fd);
    if (loop->wake_write >= 0)
        close(loop->wake_write);
    loop->wake.fd = loop->wake_write = -1;
    pf__poller_close(&loop->poller);
}

void
pf_loop_close(pf_loop *loop)
{
    if (loop->closed)
        return;
    loop->closed = true;
    stop_accepting(loop, false);
    while (loop->conns != NULL)
        pf__conn_kill(loop->conns);
    settle(loop, true);
    pf_event ignored;
    while (take_ready(loop, &ignored, 1) > 0) {
    }
    close_sources(loop);
    loop->own_row = *loop->row; /* the board may go before the loop's memory does */
    loop->row = &loop->own_row;
    loop->board = NULL;
}

int
pf_loop_take_released(pf_loop *loop, void **refs, int max)
{
    int n = 0;
    while (n < max && loop->nreleased > 0)
        refs[n++] = loop->released[--loop->nreleased];
    return n;
}

int
pf_loop_free(pf_loop *loop)
{
    if (!loop->closed || loop->row->stats.lent > 0 || loop->nreleased > 0)
        return PF_ERR_STATE;
    end_quarantine(loop);
    free_lists(loop);
    pf__peers_close(&loop->peers);
    free(loop->released);
    free(loop->notices.list);
    free_options(&loop->options);
    pf_tls_close(loop->tls);
    free(loop->spill_dir);
    for (int i = 0; i < PF__REPEATS; i++)
        free(loop->repeats[i]);
    pthread_mutex_destroy(&loop->door);
    free(loop);
    return 0;
}

/* ---- figures ------------------------------------------------------------------------*/
void
pf_loop_get_stats(const pf_loop *loop, pf_loop_stats *stats)
{
    *stats = loop->row->stats;
    stats->buffers_in_use = loop->pool.in_use;
}

int
pf_loop_notices(pf_loop *loop, pf_notice *out, int max)
{
    pf__notices *notices = &loop->notices;
    int n = 0;
    while (n < max && notices->count > 0) {
        out[n++] = notices->list[notices->first++];
        notices->count--;
    }
    if (notices->count == 0)
        notices->first = 0;
    return n;
}
