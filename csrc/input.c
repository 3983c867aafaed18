/* input.c - what a connection has received, and what of it is body.
 *
 * The read buffer holds, from `base` on: the head of the current request, its decoded
 * body [body_at, body_end), and from `raw` on what was not looked at yet. Everything is
 * offsets, so the buffer may grow and move.
 *
 * A body is absorbed: what is behind raw moves before it, decoded. One that is gathered
 * whole waits in memory up to body_buffer_size and is spilled into a file behind that.
 */
#include "internal.h"

#include <errno.h>
#include <sys/socket.h>

enum {
    BODY_READ_MIN = 16384,               /* room offered to a read of body bytes */
    BODY_ROOM_MAX = 4 * PF__BODY_WINDOW, /* for a body that goes to a file */
};

/* ---- reading ------------------------------------------------------------------------*/
/* Close the gaps: before the request, between its head and body, before raw. */
static void
compact(pf_conn *conn)
{
    pf_request *r = conn->request;
    char *data = conn->in.data;
    size_t shift = conn->base;
    if (conn->websocket != NULL) {
        pf__websocket_compact(conn->websocket, &conn->in, &conn->raw);
        return;
    }
    memmove(data, data + shift, conn->in.len - shift);
    conn->in.len -= shift;
    conn->raw -= shift;
    conn->base = 0;
    if (r == NULL || r->head.size == 0)
        return;
    r->body_at -= shift;
    r->body_end -= shift;
    size_t gap = r->body_at - r->head.size;
    memmove(data + r->head.size, data + r->body_at, r->body_end - r->body_at);
    r->body_at -= gap;
    r->body_end -= gap;
    gap = conn->raw - r->body_end;
    memmove(data + r->body_end, data + conn->raw, conn->in.len - conn->raw);
    conn->raw -= gap;
    conn->in.len -= gap;
}

/* A large message has to be in one piece: its buffer grows by as much as it has. */
static size_t
message_read_size(const pf_conn *conn, size_t least)
{
    const pf__websocket *ws = conn->websocket;
    size_t most = conn->in.len > PF__BODY_WINDOW ? conn->in.len : PF__BODY_WINDOW;
    if (conn->in.len < BODY_READ_MIN)
        most = BODY_READ_MIN; /* as of a body */
    size_t expected = ws->left < most ? (size_t)ws->left : most;
    return expected > least ? expected : least;
}

static size_t
read_size(const pf_conn *conn)
{
    const pf_request *r = conn->request;
    size_t least = conn->loop->options.read_buffer_size;
    if (conn->websocket != NULL)
        return message_read_size(conn, least);
    if (r == NULL || !r->has_body)
        return least;
    size_t expected = r->head.flags & PF_HEAD_CHUNKED || r->body_left > PF__BODY_WINDOW
                          ? PF__BODY_WINDOW
                          : (size_t)r->body_left;
    if (expected > BODY_READ_MIN && r->body_received < BODY_READ_MIN)
        expected = BODY_READ_MIN; /* no announced length reserves much by itself */
    return expected > least ? expected : least;
}

/* What a body took before it was spilled is not needed while the rest comes. */
static void
shrink(pf_conn *conn, size_t want)
{
    const pf_request *r = conn->request;
    if (r != NULL && r->body_fd >= 0)
        pf__buffer_shrink(&conn->loop->pool, &conn->in, conn->in.len + want);
}

static int
make_room(pf_conn *conn)
{
    pf__buffer *in = &conn->in;
    size_t want = read_size(conn);
    if (PF__UNLIKELY(in->cap > BODY_ROOM_MAX))
        shrink(conn, want);
    if (in->cap - in->len > want / 4)
        return 0;
    if (in->len > 0)
        compact(conn);
    if (in->cap - in->len > want / 4)
        return 0;
    return pf__buffer_grow(&conn->loop->pool, in, in->len + want);
}

/* Bytes; 0: the end; -errno or PF_ERR_TLS_RECORD. */
static ssize_t
receive(pf_conn *conn, char *data, size_t room)
{
    ssize_t n;
    if (PF__UNLIKELY(conn->session != NULL))
        return pf__session_read(conn->session, data, room);
    do
        n = recv(conn->source.fd, data, room, 0);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static bool
is_dry(const pf_conn *conn, bool came_short)
{
    return PF__UNLIKELY(conn->session != NULL) ? pf__session_is_dry(conn->session)
                                               : came_short;
}

ssize_t
pf__input_fill(pf_conn *conn)
{
    pf__buffer *in = &conn->in;
    int rc = make_room(conn);
    if (rc < 0)
        return rc;
    size_t room = in->cap - in->len;
    ssize_t n = receive(conn, in->data + in->len, room);
    if (n < 0) {
        conn->readable = n == -EAGAIN && !is_dry(conn, true);
        return n;
    }
    if (n == 0) {
        conn->eof = true;
        conn->readable = false;
        return 0;
    }
    in->len += (size_t)n;
    conn->loop->row->stats.bytes_in += (uint64_t)n;
    if (is_dry(conn, (size_t)n < room) && !conn->fin)
        conn->readable = false;
    return n;
}

/* ---- bodies -------------------------------------------------------------------------*/
static int
absorb_chunked(pf_conn *conn, pf_request *r)
{
    int rc =
        pf__http_decode_chunked(&r->chunked, conn->in.data, &conn->raw, conn->in.len,
                                &r->body_end, r->max_body, &conn->loop->options);
    if (rc > 0)
        r->body_done = true;
    return rc;
}

static void
absorb_length(pf_conn *conn, pf_request *r)
{
    size_t n = conn->in.len - conn->raw;
    if (n > r->body_left)
        n = (size_t)r->body_left;
    if (r->body_end != conn->raw)
        memmove(conn->in.data + r->body_end, conn->in.data + conn->raw, n);
    conn->raw += n;
    r->body_end += n;
    r->body_left -= n;
    r->body_done = r->body_left == 0;
}

/* Body bytes that have arrived become body: what is behind raw moves before it. */
int
pf__input_absorb(pf_conn *conn)
{
    pf_request *r = conn->request;
    size_t before = conn->raw;
    int rc = 0;
    if (r->body_done)
        return 0; /* what follows is not its body */
    if (r->body_at == r->body_end)
        r->body_at = r->body_end = conn->raw;
    if (r->head.flags & PF_HEAD_CHUNKED)
        rc = absorb_chunked(conn, r);
    else
        absorb_length(conn, r);
    r->body_received += conn->raw - before;
    return rc < 0 ? rc : 0;
}

void
pf__input_consume(pf_conn *conn, size_t n)
{
    pf_request *r = conn->request;
    r->body_at += n;
    if (r->body_at < r->body_end)
        return;
    if (conn->raw == conn->in.len) { /* start over behind the head */
        conn->raw = conn->in.len = conn->base + r->head.size;
        r->body_at = r->body_end = conn->raw;
    }
}

static int
spill_body(pf_conn *conn, pf_request *r)
{
    const char *data = conn->in.data + r->body_at;
    size_t n = r->body_end - r->body_at;
    int fd = r->body_fd >= 0 ? r->body_fd : pf__spill_open(conn->loop->spill_dir);
    int rc = fd < 0 ? fd : pf__spill_write(fd, data, n, r->body_spilled);
    r->body_fd = fd < 0 ? -1 : fd;
    if (rc < 0) {
        pf__notices_add(conn->loop, conn, PF_NOTICE_ERROR, rc);
        return PF_ERR_BODY_STORE;
    }
    r->body_spilled += n;
    pf__input_consume(conn, n);
    return 0;
}

/* More of a body than may wait in memory goes to a file, and then all of it does. */
int
pf__input_gather(pf_conn *conn)
{
    pf_request *r = conn->request;
    int rc = pf__input_absorb(conn);
    size_t n = r->body_end - r->body_at, max = conn->loop->options.body_buffer_size;
    if (PF__LIKELY(rc < 0 || max == 0 || (n <= max && r->body_fd < 0) || n == 0))
        return rc;
    return spill_body(conn, r);
}
