/* conn.c - the state machine of one connection.
 *
 * A connection moves through the phases of internal.h in three gestures:
 *
 *   pump     as long as the phase wants input: parse what is buffered, else read more;
 *   lend     a request is complete (or complete enough) and joins the ready queue; the
 *            connection does nothing more until its loan ends;
 *   settle   before the loop sleeps: send, register with the poller, pump what is left.
 *
 * Reading follows the edge-triggered poller: `readable` remembers an edge until a read
 * came back short, so that a request costs one recv() and no second one to see EAGAIN.
 * A connection is registered only when it has to wait; one that is answered and closed
 * at once never is.
 *
 * The read buffer holds, from `base` on: the head of the current request, its decoded
 * body [body_at, body_end), and from `raw` on what was not looked at yet. Everything is
 * offsets, so the buffer may grow and move. When a request is over and nothing is left,
 * the buffer goes back to the pool: an idle connection holds none.
 */
#include "internal.h"

#include <errno.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    FILLS_MAX = 16,        /* reads of one connection before others have their turn */
    SENDS_MAX = 4 << 20,   /* bytes sent to one, likewise */
    BODY_READ_MIN = 16384, /* room offered to a read of body bytes */
    BODY_ROOM_MAX = 4 * PF__BODY_WINDOW, /* for a body that goes to a file */
    IOV_MAX_HERE = 64,
};

static void pump(pf_conn *conn);
static void kill_with_reset(pf_conn *conn);

/* ---- notices ------------------------------------------------------------------------*/
static bool
grow_notices(pf__notices *notices)
{
    if (notices->first > notices->cap / 2) {
        memmove(notices->list, notices->list + notices->first,
                notices->count * sizeof *notices->list);
        notices->first = 0;
        return true;
    }
    uint32_t cap = notices->cap ? notices->cap * 2 : 64;
    pf_notice *list = realloc(notices->list, cap * sizeof *list);
    if (list == NULL)
        return false;
    notices->list = list;
    notices->cap = cap;
    return true;
}

/* A notice that finds no memory is lost: it is a report, not a promise. */
void
pf__conn_notice(pf_loop *loop, const pf_conn *conn, int kind, int code)
{
    pf__notices *notices = &loop->notices;
    if (PF__LIKELY(!(loop->options.flags & PF_OPTION_NOTICES)))
        return;
    if (notices->first + notices->count == notices->cap && !grow_notices(notices))
        return;
    notices->list[notices->first + notices->count++] = (pf_notice){
        .connection = conn->id, .kind = kind, .code = code, .peer = conn->peer};
}

/* ---- requests -----------------------------------------------------------------------*/
static pf_request *
new_request(pf_conn *conn)
{
    pf_loop *loop = conn->loop;
    pf_request *r = loop->free_requests;
    if (r != NULL)
        __builtin_prefetch(loop->free_requests = r->next_free, 1);
    else if ((r = malloc(sizeof *r)) == NULL)
        return NULL;
    memset(r, 0, offsetof(pf_request, chunked));
    r->state = (pf__head_state){0};
    memset(&r->head, 0, offsetof(pf_head, fields));
    r->conn = conn;
    r->loop = loop;
    r->body_fd = -1;
    r->max_body = loop->options.max_body_size;
    r->read_timeout_ms = loop->options.read_timeout_ms;
    r->write_timeout_ms = loop->options.write_timeout_ms;
    conn->request = r;
    return r;
}

static void
drop_request(pf_conn *conn)
{
    pf_request *r = conn->request;
    if (r == NULL)
        return;
    conn->request = NULL;
    if (PF__UNLIKELY(r->body_fd >= 0))
        pf__spill_close(&r->body_fd);
    r->next_free = conn->loop->free_requests;
    conn->loop->free_requests = r;
}

/* ---- deadlines ----------------------------------------------------------------------*/
static void
set_deadlines(pf_conn *conn, int64_t read_deadline)
{
    conn->read_deadline = read_deadline;
    int64_t first = read_deadline, write = conn->write_deadline;
    if (write != 0 && (first == 0 || write < first))
        first = write;
    pf__timer_set(&conn->loop->wheel, &conn->timer, first);
}

static void
set_write_deadline(pf_conn *conn, int64_t write_deadline)
{
    conn->write_deadline = write_deadline;
    set_deadlines(conn, conn->read_deadline);
}

/* A body may be slow, but not slower between two reads than the read timeout, nor over
 * all than the least rate, which would let a few bytes a minute hold a connection. */
static int64_t
body_deadline(const pf_conn *conn)
{
    const pf_request *r = conn->request;
    int64_t deadline = conn->loop->now + r->read_timeout_ms;
    uint32_t rate = conn->loop->options.min_body_rate;
    if (rate == 0)
        return deadline;
    int64_t slowest = r->body_since + r->read_timeout_ms
                      + (int64_t)((r->body_received - r->body_before) * 1000 / rate);
    return slowest < deadline ? slowest : deadline;
}

/* ---- output -------------------------------------------------------------------------*/
static void
release_ref(pf_loop *loop, void *ref)
{
    assert(loop->nreleased < loop->released_cap);
    loop->released[loop->nreleased++] = ref;
    loop->borrowed--;
}

static int
reserve_release(pf_loop *loop)
{
    if (loop->nreleased + loop->borrowed < loop->released_cap)
        return 0;
    uint32_t cap = loop->released_cap ? loop->released_cap * 2 : 64;
    void **released = realloc(loop->released, cap * sizeof *released);
    if (released == NULL)
        return -ENOMEM;
    loop->released = released;
    loop->released_cap = cap;
    return 0;
}

static void
drop_segments(pf_conn *conn)
{
    pf__segments *s = conn->segments;
    if (s == NULL)
        return;
    for (uint32_t i = s->first; i < s->count; i++)
        if (s->list[i].kind != PF__SEGMENT_COPIED)
            release_ref(conn->loop, s->list[i].ref);
    free(s);
    conn->segments = NULL;
}

static int
reserve_segments(pf_conn *conn, uint32_t more)
{
    pf__segments *s = conn->segments;
    if (s != NULL && s->first > s->cap / 2) {
        s->count -= s->first;
        memmove(s->list, s->list + s->first, s->count * sizeof s->list[0]);
        s->first = 0;
    }
    if (s != NULL && s->cap - s->count >= more)
        return 0;
    uint32_t cap = s ? s->cap * 2 : 8;
    pf__segments *bigger = realloc(s, sizeof *s + cap * sizeof s->list[0]);
    if (bigger == NULL)
        return -ENOMEM;
    if (s == NULL)
        *bigger = (pf__segments){0};
    bigger->cap = cap;
    conn->segments = bigger;
    return 0;
}

int
pf__conn_borrow(pf_conn *conn, const pf__segment *segment)
{
    if (segment->len > PTRDIFF_MAX - pf__conn_unsent(conn))
        return -EOVERFLOW;
    int rc = reserve_release(conn->loop);
    if (rc < 0 || (rc = reserve_segments(conn, 2)) < 0)
        return rc;
    pf__segments *s = conn->segments;
    size_t before = conn->out.len - conn->sent - s->copied;
    if (before > 0) {
        s->list[s->count++] = (pf__segment){.len = before};
        s->copied += before;
    }
    s->list[s->count++] = *segment;
    s->borrowed += segment->len;
    conn->loop->borrowed++;
    return 0;
}

/* How far conn->out may be sent: not into a head that is still being written. */
static size_t
sendable(const pf_conn *conn)
{
    const pf_request *r = conn->request;
    if (r != NULL
        && (r->answer.flags & (PF__ANSWER_BEGUN | PF__ANSWER_SEALED))
               == PF__ANSWER_BEGUN)
        return r->answer.mark;
    return conn->out.len;
}

/* Before a close the last bytes wait for the FIN and leave in one segment with it. */
static int
send_flags(const pf_conn *conn)
{
    return MSG_NOSIGNAL | (conn->phase == PF__PHASE_CLOSING ? MSG_MORE : 0);
}

static ssize_t
send_plain(const pf_conn *conn, size_t end)
{
    return send(conn->source.fd, conn->out.data + conn->sent, end - conn->sent,
                send_flags(conn));
}

static ssize_t
send_segments(const pf_conn *conn, size_t end)
{
    const pf__segments *s = conn->segments;
    struct iovec iov[IOV_MAX_HERE];
    size_t n = 0, copied = conn->sent;
    uint32_t i = s->first;
    for (; i < s->count && n < IOV_MAX_HERE; i++, n++) {
        const pf__segment *segment = &s->list[i];
        if (segment->kind == PF__SEGMENT_FILE)
            break;
        bool is_copy = segment->kind == PF__SEGMENT_COPIED;
        const char *data = is_copy ? conn->out.data + copied : segment->data;
        iov[n].iov_base = (void *)(uintptr_t)data;
        iov[n].iov_len = segment->len;
        copied += is_copy ? segment->len : 0;
    }
    if (i == s->count && n < IOV_MAX_HERE && copied < end) {
        iov[n].iov_base = conn->out.data + copied;
        iov[n++].iov_len = end - copied;
    }
    /* a head leaves in one segment with the beginning of its file */
    int more = i < s->count ? MSG_MORE : 0;
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = n};
    return sendmsg(conn->source.fd, &message, send_flags(conn) | more);
}

static ssize_t
send_file(const pf_conn *conn, const pf__segment *file)
{
    off_t offset = file->offset;
    size_t n = file->len < SENDS_MAX ? file->len : SENDS_MAX;
    return sendfile(conn->source.fd, file->fd, &offset, n);
}

/* Bytes that the kernel took, or -errno, or PF_ERR_APP_FILE_SHORT. */
static ssize_t
send_some(const pf_conn *conn, size_t end)
{
    const pf__segments *s = conn->segments;
    const pf__segment *file = s != NULL ? &s->list[s->first] : NULL;
    if (file != NULL && file->kind != PF__SEGMENT_FILE)
        file = NULL;
    ssize_t n;
    do
        n = file ? send_file(conn, file)
            : s  ? send_segments(conn, end)
                 : send_plain(conn, end);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return -errno;
    return n == 0 && file ? PF_ERR_APP_FILE_SHORT : n;
}

static void
forget_part(pf_conn *conn, pf__segment *segment, size_t n)
{
    pf__segments *s = conn->segments;
    segment->len -= n;
    switch (segment->kind) {
    case PF__SEGMENT_COPIED:
        s->copied -= n;
        conn->sent += n;
        return;
    case PF__SEGMENT_BORROWED:
        segment->data += n;
        break;
    default:
        segment->offset += (int64_t)n;
    }
    s->borrowed -= n;
}

static void
forget_sent(pf_conn *conn, size_t n)
{
    pf__segments *s = conn->segments;
    while (s != NULL && s->first < s->count && n > 0) {
        pf__segment *segment = &s->list[s->first];
        size_t part = n < segment->len ? n : segment->len;
        n -= part;
        forget_part(conn, segment, part);
        if (segment->len > 0)
            break;
        if (segment->kind != PF__SEGMENT_COPIED)
            release_ref(conn->loop, segment->ref);
        s->first++;
    }
    if (s == NULL || s->first == s->count) {
        conn->sent += n;
        free(s);
        conn->segments = NULL;
    }
}

static void
output_is_sent(pf_conn *conn)
{
    if (conn->sent == conn->out.len) {
        pf__buffer_release(&conn->loop->pool, &conn->out);
        conn->sent = 0;
    }
    if (conn->write_deadline != 0)
        set_write_deadline(conn, 0);
}

/* What was sent goes once it outweighs the rest, so that a stream that is always a bit
 * ahead of its reader keeps little. */
static void
drop_sent(pf_conn *conn)
{
    pf__buffer *out = &conn->out;
    size_t n = conn->sent;
    if (n < PF__HIGH_WATER || n < out->len - n)
        return;
    memmove(out->data, out->data + n, out->len - n);
    out->len -= n;
    conn->sent = 0;
    if (conn->request != NULL && conn->request->answer.mark >= n)
        conn->request->answer.mark -= n;
}

static void
output_is_blocked(pf_conn *conn)
{
    const pf_request *r = conn->request;
    bool streams = r != NULL && (r->answer.flags & PF__ANSWER_SEALED);
    uint32_t timeout = streams ? r->write_timeout_ms : conn->write_timeout_ms;
    set_write_deadline(conn, conn->loop->now + timeout);
}

/* Its answer stays incomplete, which a FIN might hide: one may end with the connection. */
static void
output_failed(pf_conn *conn, int error)
{
    pf__conn_notice(conn->loop, conn, PF_NOTICE_ERROR, error);
    kill_with_reset(conn);
}

/* Send what may be sent. false: the connection is dead. */
static bool
flush(pf_conn *conn)
{
    for (size_t sent = 0;;) {
        size_t end = sendable(conn);
        if (conn->sent == end && conn->segments == NULL) {
            output_is_sent(conn);
            return true;
        }
        if (sent >= SENDS_MAX) { /* a fast reader of a large file */
            output_is_blocked(conn);
            pf__conn_mark_dirty(conn);
            return true;
        }
        ssize_t n = send_some(conn, end);
        if (n == -EAGAIN) {
            if (sent > 0 || conn->write_deadline == 0)
                output_is_blocked(conn);
            drop_sent(conn);
            return true;
        }
        if (n < 0) {
            output_failed(conn, (int)n);
            return false;
        }
        sent += (size_t)n;
        conn->loop->row->stats.bytes_out += (uint64_t)n;
        forget_sent(conn, (size_t)n);
    }
}

/* ---- the end of a connection --------------------------------------------------------*/
static void
tell_holder(pf_conn *conn, int code)
{
    pf_request *r = conn->request;
    if (r->refused == 0)
        r->refused = code;
    if (conn->hung_up)
        return;
    conn->hung_up = true;
    pf__conn_mark_ready(conn, PF_EVENT_CLOSED);
}

static void
unlink_conn(pf_conn *conn)
{
    *conn->link = conn->next;
    if (conn->next)
        conn->next->link = conn->link;
}

void
pf__conn_kill(pf_conn *conn)
{
    pf_loop *loop = conn->loop;
    if (conn->phase == PF__PHASE_DEAD)
        return;
    close(conn->source.fd); /* which also takes it out of the poller */
    conn->source.fd = -1;
    conn->phase = PF__PHASE_DEAD;
    pf__timer_cancel(&loop->wheel, &conn->timer);
    unlink_conn(conn);
    drop_segments(conn);
    pf__buffer_release(&loop->pool, &conn->out);
    conn->sent = 0;
    loop->row->stats.connections--;
    loop->row->stats.closed++;
    if (conn->counted)
        pf__peers_remove(&loop->peers, &conn->peer);
    loop->turned_away -= conn->turned_away;
    pf__conn_notice(loop, conn, PF_NOTICE_CLOSED, 0);
    if (conn->lent) {
        conn->request->dead = true;
        tell_holder(conn, PF_ERR_CLOSED); /* its head stays readable: in is kept */
        return;
    }
    conn->pending = 0;
    drop_request(conn);
    pf__buffer_release(&loop->pool, &conn->in);
    pf__conn_reap(conn);
}

void
pf__conn_reap(pf_conn *conn)
{
    if (conn->phase != PF__PHASE_DEAD || conn->in_dirty || conn->in_ready || conn->lent)
        return;
    pf_loop *loop = conn->loop;
    drop_request(conn);
    pf__buffer_release(&loop->pool, &conn->in);
    conn->next = loop->free_conns;
    loop->free_conns = conn;
}

/* An RST instead of a FIN: for an answer whose end is the end of the connection. */
static void
kill_with_reset(pf_conn *conn)
{
    struct linger now = {.l_onoff = 1};
    setsockopt(conn->source.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    pf__conn_kill(conn);
}

static void
begin_closing(pf_conn *conn, bool linger)
{
    conn->phase = PF__PHASE_CLOSING;
    conn->linger = linger;
    set_deadlines(conn, 0);
    pf__buffer_release(&conn->loop->pool, &conn->in);
    conn->raw = conn->base = 0;
    pf__conn_mark_dirty(conn);
}

/* Everything is sent. Closing a socket that has unread bytes, or gets some later, sends
 * an RST that may destroy the answer before its reader has it; so where that can be,
 * only our side is shut, and the rest is read and dropped for a while (RFC 9112 9.6). */
static void
finish_closing(pf_conn *conn)
{
    if (!conn->linger || conn->eof) {
        pf__conn_kill(conn);
        return;
    }
    if (shutdown(conn->source.fd, SHUT_WR) < 0) {
        pf__conn_kill(conn);
        return;
    }
    conn->phase = PF__PHASE_LINGER;
    conn->raw = 0; /* counts what is dropped */
    conn->readable = true;
    set_deadlines(conn, conn->loop->now + conn->loop->options.linger_timeout_ms);
}

static void
linger(pf_conn *conn)
{
    char scratch[16384];
    while (conn->readable) {
        ssize_t n = recv(conn->source.fd, scratch, sizeof scratch, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) {
            conn->readable = false;
            return;
        }
        if (n > 0)
            conn->raw += (size_t)n;
        if (n <= 0 || conn->raw > PF__LINGER_MAX) {
            pf__conn_kill(conn);
            return;
        }
    }
}

/* ---- refusing -----------------------------------------------------------------------*/
static void
count_answer(pf_loop *loop, int status)
{
    int class = status / 100;
    loop->row->stats.statuses[class < 6 ? class : 0]++;
}

static void
count_latency(pf_loop *loop, const pf_request *r)
{
    int64_t us = loop->now_us - r->since_us;
    loop->row->latency[pf_scoreboard_bucket(us > 0 ? (uint64_t)us : 0)]++;
}

static void
lend(pf_conn *conn)
{
    conn->phase = PF__PHASE_LENT;
    if (conn->read_deadline != 0)
        set_deadlines(conn, 0);
    pf__conn_mark_ready(conn, PF_EVENT_REQUEST);
}

/* What a peer says of others counts if it is listed; else nobody gets to see it. */
static void
screen_forwarded(const pf_conn *conn)
{
    const pf_options *o = &conn->loop->options;
    if (!pf__trust_has(o->forwarded_trust, o->forwarded_trusted, &conn->peer))
        pf__http_drop_forwarded(&conn->request->head);
}

static void
lend_refused(pf_conn *conn, int code)
{
    pf_request *r = conn->request;
    screen_forwarded(conn);
    r->refused = code;
    r->body_done = true;
    r->expect = false;
    if (r->head.size == 0) /* it is not whole: its spans lie in what has arrived */
        r->head.size = (uint32_t)(conn->in.len - conn->base);
    r->head.flags &= (uint8_t)~PF_HEAD_KEEP_ALIVE;
    r->answer.minor = 1;
    r->answer.head = (r->head.flags & PF_HEAD_IS_HEAD) != 0;
    conn->raw = conn->in.len;
    lend(conn);
    conn->pending |= PF_EVENT_REFUSED;
}

void
pf__conn_refuse(pf_conn *conn, int code)
{
    pf_loop *loop = conn->loop;
    pf_request *r = conn->request;
    loop->row->stats.refused++;
    pf__conn_notice(loop, conn, PF_NOTICE_ERROR, code);
    bool ours = r != NULL && conn->phase != PF__PHASE_LENT;
    if (ours && (loop->options.flags & PF_OPTION_LEND_REFUSED)) {
        lend_refused(conn, code);
        return;
    }
    bool head = r != NULL && (r->head.flags & PF_HEAD_IS_HEAD);
    int status =
        pf__response_refusal(&loop->pool, &conn->out, code, head, &loop->stamp);
    if (status < 0) {
        pf__conn_kill(conn);
        return;
    }
    count_answer(loop, status);
    drop_request(conn);
    begin_closing(conn, true);
}

/* What did not introduce itself has said nothing that could be answered. */
static void
turn_away(pf_conn *conn)
{
    conn->loop->row->stats.refused++;
    pf__conn_notice(conn->loop, conn, PF_NOTICE_ERROR, PF_ERR_PROXY);
    pf__conn_kill(conn);
}

/* ---- input --------------------------------------------------------------------------*/
/* Close the gaps: before the request, between its head and body, before raw. */
static void
compact(pf_conn *conn)
{
    pf_request *r = conn->request;
    char *data = conn->in.data;
    size_t shift = conn->base;
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

static size_t
read_size(const pf_conn *conn)
{
    const pf_request *r = conn->request;
    size_t least = conn->loop->options.read_buffer_size;
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

/* > 0: bytes were read; 0: the peer finished; < 0: -errno. */
static ssize_t
fill(pf_conn *conn)
{
    pf__buffer *in = &conn->in;
    int rc = make_room(conn);
    if (rc < 0)
        return rc;
    size_t room = in->cap - in->len;
    ssize_t n;
    do
        n = recv(conn->source.fd, in->data + in->len, room, 0);
    while (n < 0 && errno == EINTR);
    if (n < 0) {
        conn->readable = false;
        return -errno;
    }
    if (n == 0) {
        conn->eof = true;
        conn->readable = false;
        return 0;
    }
    in->len += (size_t)n;
    conn->loop->row->stats.bytes_in += (uint64_t)n;
    if ((size_t)n < room && !conn->fin)
        conn->readable = false;
    return n;
}

/* Only empty lines came, which are no request yet. */
static bool
head_is_empty(const pf_conn *conn)
{
    const pf__head_state *state = &conn->request->state;
    return state->phase == 0 && conn->in.len == conn->base + state->at;
}

static void
input_ended(pf_conn *conn)
{
    if (conn->phase == PF__PHASE_HEAD && head_is_empty(conn)) {
        drop_request(conn);
        conn->phase = PF__PHASE_IDLE;
    }
    switch (conn->phase) {
    case PF__PHASE_FIRST:
    case PF__PHASE_IDLE:
    case PF__PHASE_DRAIN:
        if (pf__conn_unsent(conn) > 0) {
            drop_request(conn);
            begin_closing(conn, false);
        } else {
            pf__conn_kill(conn);
        }
        return;
    case PF__PHASE_PROXY: /* without a byte: a proxy that looks whether we are there */
        if (conn->in.len > 0)
            turn_away(conn);
        else
            pf__conn_kill(conn);
        return;
    case PF__PHASE_LENT:
        tell_holder(conn, PF_ERR_TRUNCATED);
        return;
    default:
        pf__conn_refuse(conn, PF_ERR_TRUNCATED);
    }
}

static void
input_failed(pf_conn *conn, int error)
{
    if (conn->phase != PF__PHASE_IDLE)
        pf__conn_notice(conn->loop, conn, PF_NOTICE_ERROR, error);
    pf__conn_kill(conn);
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
static int
absorb(pf_conn *conn)
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
pf__conn_consume(pf_conn *conn, size_t n)
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
        pf__conn_notice(conn->loop, conn, PF_NOTICE_ERROR, rc);
        return PF_ERR_BODY_STORE;
    }
    r->body_spilled += n;
    pf__conn_consume(conn, n);
    return 0;
}

/* More of a body than may wait in memory goes to a file, and then all of it does. */
static int
gather(pf_conn *conn)
{
    pf_request *r = conn->request;
    int rc = absorb(conn);
    size_t n = r->body_end - r->body_at, max = conn->loop->options.body_buffer_size;
    if (PF__LIKELY(rc < 0 || max == 0 || (n <= max && r->body_fd < 0) || n == 0))
        return rc;
    return spill_body(conn, r);
}

/* It goes before the head of an answer that is begun and not sealed. */
int
pf__conn_continue(pf_conn *conn)
{
    static const char line[] = "HTTP/1.1 100 Continue\r\n\r\n";
    size_t len = sizeof line - 1, at = sendable(conn);
    pf__buffer *out = &conn->out;
    int rc = pf__buffer_reserve(&conn->loop->pool, out, len);
    if (rc < 0)
        return rc;
    memmove(out->data + at + len, out->data + at, out->len - at);
    memcpy(out->data + at, line, len);
    out->len += len;
    conn->request->answer.mark += len;
    pf__conn_mark_dirty(conn);
    return 0;
}

/* ---- heads --------------------------------------------------------------------------*/
bool
pf__conn_keeps(const pf_conn *conn)
{
    const pf_request *r = conn->request;
    const pf_options *o = &conn->loop->options;
    if (!(r->head.flags & PF_HEAD_KEEP_ALIVE) || (o->flags & PF_OPTION_NO_KEEP_ALIVE))
        return false;
    if (conn->loop->draining && !(o->flags & PF_OPTION_KEEP_ON_DRAIN))
        return false;
    if (o->max_requests > 0 && conn->served >= o->max_requests)
        return false;
    if (PF__LIKELY(r->body_done))
        return true;
    return !r->expect && !conn->eof && !(r->head.flags & PF_HEAD_CHUNKED)
           && r->body_left <= PF__DRAIN_MAX;
}

static int
body_refusal(const pf_conn *conn)
{
    const pf_head *head = &conn->request->head;
    const pf_options *o = &conn->loop->options;
    if ((o->flags & PF_OPTION_GET_ONLY)
        && !(head->flags & (PF_HEAD_IS_GET | PF_HEAD_IS_HEAD)))
        return PF_ERR_METHOD_NOT_ALLOWED;
    return head->content_length > o->max_body_size ? PF_ERR_BODY_SIZE : 0;
}

static void
begin_body(pf_conn *conn)
{
    pf_request *r = conn->request;
    r->has_body = true;
    r->body_left = r->head.content_length;
    r->expect = (r->head.flags & PF_HEAD_EXPECT) != 0;
    r->body_since = conn->loop->now;
    r->body_at = r->body_end = conn->raw;
    r->chunked = (pf__chunked){0};
}

/* The head is parsed: refuse, lend, or gather the body first. */
static void
begin_request(pf_conn *conn)
{
    pf_request *r = conn->request;
    conn->raw = conn->base + r->head.size;
    conn->served++;
    r->since_us = conn->loop->now_us;
    conn->loop->row->stats.requests++;
    r->answer.minor = r->head.minor;
    r->answer.head = (r->head.flags & PF_HEAD_IS_HEAD) != 0;
    if (PF__UNLIKELY(r->head.flags & PF_HEAD_FORWARDED))
        screen_forwarded(conn);
    bool early = false; /* to be lent before its body is there */
    int rc = body_refusal(conn);
    if (rc == 0 && (r->head.content_length > 0 || r->head.flags & PF_HEAD_CHUNKED)) {
        begin_body(conn);
        early = r->expect || (conn->loop->options.flags & PF_OPTION_LEND_HEADS);
        rc = early ? absorb(conn) : gather(conn);
    } else {
        r->body_done = true;
        r->body_at = r->body_end = conn->raw;
    }
    if (rc < 0)
        pf__conn_refuse(conn, rc);
    else if (r->body_done || early)
        lend(conn);
    else
        conn->phase = PF__PHASE_BODY;
}

static void
begin_head(pf_conn *conn)
{
    if (new_request(conn) == NULL) {
        pf__conn_kill(conn);
        return;
    }
    conn->base = conn->raw;
    conn->phase = PF__PHASE_HEAD;
    pf__conn_notice(conn->loop, conn, PF_NOTICE_ACTIVE, 0);
}

static void
begin_idle(pf_conn *conn)
{
    pf_loop *loop = conn->loop;
    conn->phase = PF__PHASE_IDLE;
    pf__buffer_release(&loop->pool, &conn->in);
    conn->raw = conn->base = 0;
    uint32_t timeout = loop->options.idle_timeout_ms;
    if (loop->draining && loop->options.drain_idle_ms < timeout)
        timeout = loop->options.drain_idle_ms;
    set_deadlines(conn, loop->now + timeout);
    pf__conn_notice(loop, conn, PF_NOTICE_IDLE, 0);
}

/* ---- the gestures -------------------------------------------------------------------*/
enum { CONTENT, HUNGRY }; /* does the phase want more input? */

/* Where the header block that a connection sent last is kept. Some share a place: they
 * are many, and few clients send at a time. */
static pf__repeat *
repeat_of(const pf_conn *conn)
{
    pf__repeat **place = &conn->loop->repeats[conn->id % PF__REPEATS];
    if (PF__UNLIKELY(*place == NULL) && (*place = malloc(sizeof **place)) != NULL)
        (*place)->size = 0;
    return *place;
}

static int
advance_head(pf_conn *conn)
{
    pf_request *r = conn->request;
    if (pf__conn_unsent(conn) >= PF__HIGH_WATER)
        return CONTENT; /* it does not read our answers: settle comes back to it */
    int rc = pf__http_parse_head(&r->head, &r->state, conn->in.data + conn->base,
                                 conn->in.len - conn->base, &conn->loop->options,
                                 repeat_of(conn));
    if (rc == 0)
        return HUNGRY;
    if (rc < 0)
        pf__conn_refuse(conn, rc);
    else
        begin_request(conn);
    return conn->phase == PF__PHASE_BODY ? HUNGRY : CONTENT;
}

static int
advance_body(pf_conn *conn)
{
    int rc = gather(conn);
    if (rc < 0) {
        pf__conn_refuse(conn, rc);
        return CONTENT;
    }
    if (!conn->request->body_done)
        return HUNGRY;
    lend(conn);
    return CONTENT;
}

static int
advance_lent(pf_conn *conn)
{
    pf_request *r = conn->request;
    if (r->want == 0)
        return CONTENT;
    uint64_t before = r->body_spilled;
    bool whole = r->want == PF_WANT_WHOLE || r->body_fd >= 0;
    int rc = whole ? gather(conn) : absorb(conn);
    if (rc < 0) {
        r->want = 0;
        tell_holder(conn, rc);
        return CONTENT;
    }
    bool more = r->body_end > r->body_at || r->body_spilled > before;
    if (!r->body_done && !(r->want == PF_WANT_SOME && more))
        return HUNGRY;
    r->want = 0;
    if (conn->read_deadline != 0)
        set_deadlines(conn, 0);
    pf__conn_mark_ready(conn, PF_EVENT_BODY);
    return CONTENT;
}

static void
next_request(pf_conn *conn)
{
    drop_request(conn);
    if (conn->raw == conn->in.len)
        begin_idle(conn);
    else
        begin_head(conn);
}

static int
advance_drain(pf_conn *conn)
{
    pf_request *r = conn->request;
    size_t before = conn->raw;
    int rc = absorb(conn);
    r->drained += (uint32_t)(conn->raw - before);
    if (rc < 0 || r->drained > PF__DRAIN_MAX) {
        drop_request(conn);
        begin_closing(conn, true);
        return CONTENT;
    }
    pf__conn_consume(conn, r->body_end - r->body_at);
    if (!r->body_done)
        return HUNGRY;
    next_request(conn);
    if (conn->phase == PF__PHASE_IDLE)
        return HUNGRY;
    return conn->phase == PF__PHASE_HEAD ? advance_head(conn) : CONTENT;
}

/* 0, or the PF_ERR_* that the connection gets instead of service. */
static int
count_in(pf_conn *conn)
{
    pf_loop *loop = conn->loop;
    uint32_t max = loop->options.max_connections_per_ip;
    if (max == 0 || conn->peer.family == AF_UNIX)
        return 0;
    int rc = pf__peers_add(&loop->peers, &conn->peer, max);
    conn->counted = rc == 0;
    return rc == 0 ? 0 : rc > 0 ? PF_ERR_CONNECTIONS_PER_IP : PF_ERR_CONNECTIONS;
}

/* The proxy has said whom it brings; from here on it is that client's connection. */
static int
begin_introduced(pf_conn *conn, const pf_peer *client, const pf_peer *server)
{
    if (client->family != AF_UNSPEC) {
        conn->peer = *client;
        conn->local = *server;
    }
    conn->introduced = true;
    conn->phase = PF__PHASE_FIRST;
    if (conn->raw == conn->in.len)
        conn->raw = conn->in.len = 0;
    int rc = count_in(conn);
    if (rc < 0)
        pf__conn_refuse(conn, rc);
    return rc;
}

static int
advance_first(pf_conn *conn)
{
    if (conn->raw == conn->in.len)
        return HUNGRY;
    begin_head(conn);
    return conn->phase == PF__PHASE_HEAD ? advance_head(conn) : CONTENT;
}

static int
advance_proxy(pf_conn *conn)
{
    pf_peer client, server;
    int rc = pf__proxy_parse(conn->in.data, conn->in.len,
                             conn->loop->options.proxy_protocol, &client, &server);
    if (rc == 0)
        return HUNGRY;
    if (rc < 0) {
        turn_away(conn);
        return CONTENT;
    }
    conn->raw = (size_t)rc;
    return begin_introduced(conn, &client, &server) < 0 ? CONTENT : advance_first(conn);
}

static int
advance(pf_conn *conn)
{
    switch (conn->phase) {
    case PF__PHASE_PROXY:
        return advance_proxy(conn);
    case PF__PHASE_FIRST:
    case PF__PHASE_IDLE:
        return advance_first(conn);
    case PF__PHASE_HEAD:
        return advance_head(conn);
    case PF__PHASE_BODY:
        return advance_body(conn);
    case PF__PHASE_LENT:
        return advance_lent(conn);
    case PF__PHASE_DRAIN:
        return advance_drain(conn);
    default:
        return CONTENT;
    }
}

/* Hungry and nothing to read: until when? */
static void
await_input(pf_conn *conn)
{
    const pf_options *o = &conn->loop->options;
    switch (conn->phase) {
    case PF__PHASE_HEAD:
        if (!conn->request->waiting) {
            conn->request->waiting = true;
            set_deadlines(conn, conn->loop->now + o->header_timeout_ms);
        }
        break;
    case PF__PHASE_BODY:
    case PF__PHASE_LENT:
        set_deadlines(conn, body_deadline(conn));
        break;
    case PF__PHASE_DRAIN:
        if (!conn->request->waiting) {
            conn->request->waiting = true;
            set_deadlines(conn, conn->loop->now + o->linger_timeout_ms);
        }
        break;
    default: /* FIRST, PROXY, IDLE: their deadline stands; empty, they hold no buffer */
        if (conn->in.len == 0)
            pf__buffer_release(&conn->loop->pool, &conn->in);
        break;
    }
}

static void
pump(pf_conn *conn)
{
    for (int fills = 0; advance(conn) == HUNGRY; fills++) {
        if (conn->readable && fills < FILLS_MAX) {
            ssize_t n = fill(conn);
            if (n > 0)
                continue;
            if (n == 0) {
                input_ended(conn);
                return;
            }
            if (n != -EAGAIN) {
                input_failed(conn, (int)n);
                return;
            }
        }
        await_input(conn);
        if (conn->readable)
            pf__conn_mark_dirty(conn);
        return;
    }
}

void
pf__conn_settle(pf_conn *conn, bool force)
{
    if (conn->phase == PF__PHASE_DEAD) {
        pf__conn_reap(conn);
        return;
    }
    size_t unsent = pf__conn_unsent(conn);
    if (unsent > 0) {
        /* More answers are coming to the same buffer: send them together. */
        bool pipelined = conn->pending & PF_EVENT_REQUEST;
        if (pipelined && !force && unsent < PF__HIGH_WATER) {
            pf__conn_mark_dirty(conn);
            return;
        }
        if (!flush(conn))
            return;
    }
    if (conn->phase == PF__PHASE_CLOSING && pf__conn_unsent(conn) == 0)
        finish_closing(conn);
    if (conn->phase == PF__PHASE_LINGER)
        linger(conn);
    if (conn->phase == PF__PHASE_DEAD)
        return;
    pf_request *r = conn->request;
    if (r != NULL && r->want_room && pf__conn_unsent(conn) < PF__LOW_WATER) {
        r->want_room = false;
        pf__conn_mark_ready(conn, PF_EVENT_WRITABLE);
    }
    if (!conn->source.registered && (conn->pending & PF_EVENT_REQUEST)) {
        pf__conn_mark_dirty(conn); /* it may be answered and closed before it waits */
        return;
    }
    if (!conn->source.registered
        && pf__poller_add_conn(&conn->loop->poller, &conn->source) < 0) {
        pf__conn_kill(conn);
        return;
    }
    if (!conn->readable && conn->raw == conn->in.len)
        return;
    if (force) /* a flush in the middle of a batch only sends */
        pf__conn_mark_dirty(conn);
    else
        pump(conn);
}

void
pf__conn_event(pf_conn *conn, uint32_t flags)
{
    if (conn->phase == PF__PHASE_DEAD)
        return;
    if (flags & EPOLLERR) {
        input_failed(conn, -ECONNRESET);
        return;
    }
    if (flags & (EPOLLRDHUP | EPOLLHUP))
        conn->fin = conn->readable = true;
    if (flags & EPOLLIN)
        conn->readable = true;
    if (conn->phase == PF__PHASE_LENT && (flags & EPOLLHUP))
        tell_holder(conn, PF_ERR_CLOSED);
    if (conn->request != NULL && conn->request->want_end)
        pf__conn_end_wanted(conn);
    if (pf__conn_unsent(conn) > 0 || conn->phase == PF__PHASE_LINGER
        || (conn->request != NULL && conn->request->want_room))
        pf__conn_mark_dirty(conn);
    if (conn->readable)
        pump(conn);
}

void
pf__conn_body_wanted(pf_conn *conn)
{
    pf_request *r = conn->request;
    r->body_since = conn->loop->now; /* the time before was the app's */
    r->body_before = r->body_received;
    pf__conn_mark_dirty(conn); /* settle pumps it; nothing is read before the wait */
    await_input(conn);
    if (conn->raw == conn->in.len && !r->body_done && !conn->eof
        && r->body_at == r->body_end)
        return;
    if (conn->eof && !r->body_done)
        tell_holder(conn, PF_ERR_TRUNCATED);
    else
        advance(conn);
}

void
pf__conn_end_wanted(pf_conn *conn)
{
    bool ended = conn->fin || conn->eof;
    conn->request->want_end = !ended;
    if (ended)
        pf__conn_mark_ready(conn, PF_EVENT_ENDED);
}

void
pf__conn_answered(pf_conn *conn)
{
    pf_request *r = conn->request;
    conn->lent = false;
    conn->pending = 0; /* its events are nobody's now */
    count_answer(conn->loop, r->answer.status);
    count_latency(conn->loop, r);
    if (conn->phase == PF__PHASE_DEAD) {
        pf__conn_reap(conn);
        return;
    }
    conn->write_timeout_ms = r->write_timeout_ms;
    pf__conn_mark_dirty(conn);
    if (r->answer.flags & PF__ANSWER_CLOSE) {
        bool asked = !(r->head.flags & PF_HEAD_KEEP_ALIVE) && r->refused == 0;
        bool clean = r->body_done && conn->raw == conn->in.len && !conn->readable;
        drop_request(conn);
        begin_closing(conn, !(asked && clean));
    } else if (!r->body_done) {
        conn->phase = PF__PHASE_DRAIN;
        r->waiting = false;
        r->want_room = r->want_end = false; /* the loan is over: nobody is told more */
        r->want = 0;
        pf__spill_close(&r->body_fd);
        await_input(conn);
    } else {
        next_request(conn);
        if (conn->phase == PF__PHASE_HEAD && advance_head(conn) == HUNGRY)
            await_input(conn);
    }
}

void
pf__conn_abort(pf_conn *conn)
{
    pf_request *r = conn->request;
    pf__answer *a = &r->answer;
    conn->lent = false;
    conn->pending = 0;
    conn->loop->row->stats.statuses[0]++;
    if (conn->phase == PF__PHASE_DEAD) {
        pf__conn_reap(conn);
        return;
    }
    bool sealed = a->flags & PF__ANSWER_SEALED;
    bool framed = a->length >= 0 || (a->flags & PF__ANSWER_CHUNKED);
    if (sealed && !framed) {
        kill_with_reset(conn);
        return;
    }
    if (!sealed && (a->flags & PF__ANSWER_BEGUN))
        conn->out.len = a->mark;
    bool clean = r->body_done && conn->raw == conn->in.len && !conn->readable;
    drop_request(conn);
    begin_closing(conn, !clean);
}

/* ---- timeouts and drain -------------------------------------------------------------*/
void
pf__conn_timeout(pf_conn *conn)
{
    int64_t now = conn->loop->now;
    bool write = conn->write_deadline != 0 && conn->write_deadline <= now;
    bool read = conn->read_deadline != 0 && conn->read_deadline <= now;
    if (!write && !read) {
        set_deadlines(conn, conn->read_deadline);
        return;
    }
    conn->loop->row->stats.timeouts++;
    if (write) {
        pf__conn_notice(conn->loop, conn, PF_NOTICE_ERROR, PF_ERR_WRITE_TIMEOUT);
        kill_with_reset(conn);
        return;
    }
    switch (conn->phase) {
    case PF__PHASE_PROXY:
        turn_away(conn);
        return;
    case PF__PHASE_FIRST:
    case PF__PHASE_HEAD:
        pf__conn_refuse(conn, PF_ERR_HEAD_TIMEOUT);
        return;
    case PF__PHASE_BODY:
        pf__conn_refuse(conn, PF_ERR_BODY_TIMEOUT);
        return;
    case PF__PHASE_LENT:
        set_deadlines(conn, 0);
        tell_holder(conn, PF_ERR_BODY_TIMEOUT);
        return;
    default:
        pf__conn_kill(conn);
    }
}

/* Between two requests, or before the first, and no byte of the next is here. */
static bool
is_waiting(const pf_conn *conn)
{
    return conn->phase == PF__PHASE_IDLE || conn->phase == PF__PHASE_FIRST
           || (conn->phase == PF__PHASE_PROXY && conn->in.len == 0);
}

/* New and idle connections get a lame-duck time in which one request is still answered,
 * so that a client that is just sending is not reset. */
void
pf__conn_drain(pf_conn *conn, bool now)
{
    if (!is_waiting(conn))
        return;
    if (now && pf__conn_unsent(conn) == 0) {
        pf__conn_kill(conn);
        return;
    }
    int64_t last = conn->loop->now + conn->loop->options.drain_idle_ms;
    if (conn->read_deadline == 0 || last < conn->read_deadline)
        set_deadlines(conn, last);
}

/* ---- passing on ---------------------------------------------------------------------
 * A connection between two requests is no more than its socket: another worker can have
 * it. What the peer may have sent meanwhile waits in the socket.
 */
bool
pf__conn_is_quiet(const pf_conn *conn)
{
    return is_waiting(conn) && conn->in.len == 0 && pf__conn_unsent(conn) == 0;
}

void
pf__conn_leave(pf_conn *conn)
{
    /* the socket lives on elsewhere, so closing it would not end its registration */
    pf__poller_remove(&conn->loop->poller, &conn->source);
    pf__conn_kill(conn);
}

/* ---- the beginning ------------------------------------------------------------------*/
static pf_conn *
new_conn(pf_loop *loop)
{
    pf_conn *conn = loop->free_conns;
    if (conn != NULL)
        loop->free_conns = conn->next;
    else if ((conn = malloc(sizeof *conn)) == NULL)
        return NULL;
    *conn = (pf_conn){.loop = loop, .id = ++loop->next_id};
    conn->write_timeout_ms = loop->options.write_timeout_ms;
    conn->next = loop->conns;
    conn->link = &loop->conns;
    if (conn->next)
        conn->next->link = &conn->next;
    loop->conns = conn;
    return conn;
}

bool
pf__conn_introduces(const pf_loop *loop, const pf__origin *origin)
{
    const pf_options *o = &loop->options;
    return PF__UNLIKELY(o->proxy_protocol != 0) && !origin->introduced
           && pf__trust_has(o->proxy_trust, o->proxy_trusted, &origin->peer);
}

/* The request mostly is there already when its connection is accepted: read it before
 * asking the poller. */
int
pf__conn_open(pf_loop *loop, int fd, const pf__origin *origin, int refusal)
{
    const pf_options *o = &loop->options;
    pf_conn *conn = new_conn(loop);
    if (conn == NULL) {
        close(fd);
        return -ENOMEM;
    }
    conn->source = (pf__source){.kind = PF__SOURCE_CONN, .fd = fd};
    bool introduces = pf__conn_introduces(loop, origin);
    conn->phase = introduces ? PF__PHASE_PROXY : PF__PHASE_FIRST;
    conn->readable = true;
    conn->peer = origin->peer;
    conn->local = origin->local;
    conn->introduced = origin->introduced;
    conn->counted = o->max_connections_per_ip > 0 && refusal == 0 && !introduces
                    && conn->peer.family != AF_UNIX;
    loop->row->stats.connections++;
    loop->row->stats.accepted++;
    pf__conn_notice(loop, conn, PF_NOTICE_NEW, 0);
    pf__conn_mark_dirty(conn);
    if (refusal != 0) {
        conn->turned_away = true;
        loop->turned_away++;
        pf__conn_refuse(conn, refusal);
        return 0;
    }
    uint32_t timeout = o->header_timeout_ms;
    if (timeout > PF__FIRST_BYTE_MS)
        timeout = PF__FIRST_BYTE_MS;
    if (loop->draining && o->drain_idle_ms < timeout)
        timeout = o->drain_idle_ms;
    conn->read_deadline = loop->now + timeout;
    pump(conn);
    if (conn->phase == PF__PHASE_FIRST || conn->phase == PF__PHASE_PROXY)
        set_deadlines(conn, conn->read_deadline);
    return 0;
}
