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
 * A connection that was switched to a WebSocket stays on loan, and its phase wants input
 * unless messages wait to be received; websocket.c says what the bytes mean.
 *
 * How bytes come in and which of them are body stands in input.c, how they leave in
 * output.c. When a request is over and nothing is left, the read buffer goes back to the
 * pool: an idle connection holds none.
 */
#include "internal.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FILLS_MAX = 16 }; /* reads of one connection before others have their turn */

static void pump(pf_conn *conn);
static void kill_with_reset(pf_conn *conn);

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
/* In a drain: who is still to say something must have done so before others lose their
 * patience with this worker, and who is only to leave may take a little longer. */
static int64_t
before_the_end(const pf_conn *conn, int64_t deadline)
{
    int64_t last;
    switch (conn->phase) {
    case PF__PHASE_FIRST:
    case PF__PHASE_PROXY:
    case PF__PHASE_HANDSHAKE:
    case PF__PHASE_HEAD:
    case PF__PHASE_BODY:
    case PF__PHASE_LENT: /* the rest of its body, while that is wanted */
        last = conn->loop->read_until;
        break;
    case PF__PHASE_IDLE:
    case PF__PHASE_DRAIN:
    case PF__PHASE_LINGER:
        last = conn->loop->close_until;
        break;
    default:
        return deadline;
    }
    return deadline < last ? deadline : last;
}

static void
set_deadlines(pf_conn *conn, int64_t read_deadline)
{
    if (PF__UNLIKELY(conn->loop->read_until != 0))
        read_deadline = before_the_end(conn, read_deadline);
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

/* When a connection must have said something. In a drain it has little time. */
static int64_t
first_deadline(const pf_conn *conn, uint32_t timeout)
{
    const pf_loop *loop = conn->loop;
    if (loop->draining && loop->options.drain_idle_ms < timeout)
        timeout = loop->options.drain_idle_ms;
    return loop->now + timeout;
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
    pf__notices_add(conn->loop, conn, PF_NOTICE_ERROR, error);
    kill_with_reset(conn);
}

/* Send what may be sent. false: the connection is dead. */
static bool
flush(pf_conn *conn)
{
    int rc = pf__output_flush(conn);
    switch (rc) {
    case PF__OUTPUT_SENT:
        if (conn->write_deadline != 0)
            set_write_deadline(conn, 0);
        return true;
    case PF__OUTPUT_STUCK:
        if (conn->write_deadline == 0)
            output_is_blocked(conn);
        return true;
    case PF__OUTPUT_MORE:
        pf__conn_mark_dirty(conn);
        output_is_blocked(conn);
        return true;
    case PF__OUTPUT_BLOCKED:
        output_is_blocked(conn);
        return true;
    default:
        output_failed(conn, rc);
        return false;
    }
}

int
pf__conn_continue(pf_conn *conn)
{
    static const char line[] = "HTTP/1.1 100 Continue\r\n\r\n";
    int rc = pf__output_insert(conn, line, sizeof line - 1);
    if (rc < 0)
        return rc;
    pf__conn_mark_dirty(conn);
    return 0;
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

/* TLS tells an answer that is over from one that was cut (RFC 8446 6.1). false: it has
 * to be said again when there is room. */
static bool
say_goodbye(pf_conn *conn)
{
    if (conn->session == NULL || conn->lent || pf__output_unsent(conn) > 0)
        return true;
    return pf__session_shut(conn->session);
}

static void
say_no_goodbye(pf_conn *conn)
{
    if (conn->session != NULL)
        pf__session_curt(conn->session);
}

void
pf__conn_kill(pf_conn *conn)
{
    pf_loop *loop = conn->loop;
    if (conn->phase == PF__PHASE_DEAD)
        return;
    say_goodbye(conn);
    close(conn->source.fd); /* which also takes it out of the poller */
    conn->source.fd = -1;
    conn->phase = PF__PHASE_DEAD;
    pf__timer_cancel(&loop->wheel, &conn->timer);
    unlink_conn(conn);
    pf__output_drop(conn);
    loop->row->stats.connections--;
    loop->row->stats.closed++;
    if (conn->counted)
        pf__peers_remove(&loop->peers, &conn->peer);
    loop->turned_away -= conn->turned_away;
    pf__notices_add(loop, conn, PF_NOTICE_CLOSED, 0);
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

static void
drop_session(pf_conn *conn)
{
    pf__session_free(conn->session);
    conn->session = NULL;
}

void
pf__conn_reap(pf_conn *conn)
{
    if (conn->phase != PF__PHASE_DEAD || conn->in_dirty || conn->in_ready || conn->lent)
        return;
    pf_loop *loop = conn->loop;
    drop_request(conn);
    pf__buffer_release(&loop->pool, &conn->in);
    pf__websocket_free(conn->websocket, &loop->pool);
    conn->websocket = NULL;
    drop_session(conn);
    pf_conn **list = loop->borrowed_out ? &loop->quarantine : &loop->free_conns;
    conn->next = *list;
    *list = conn;
}

/* An RST instead of a FIN: for an answer whose end is the end of the connection. */
static void
kill_with_reset(pf_conn *conn)
{
    struct linger now = {.l_onoff = 1};
    say_no_goodbye(conn);
    setsockopt(conn->source.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    pf__conn_kill(conn);
}

static void
begin_closing(pf_conn *conn, bool linger)
{
    conn->phase = PF__PHASE_CLOSING;
    conn->linger = linger;
    set_deadlines(conn, 0);
    bool wanted = conn->websocket != NULL && conn->websocket->count > 0;
    if (!wanted) /* messages that came before the close can still be received */
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
    if (!say_goodbye(conn)) {
        if (conn->write_deadline == 0)
            output_is_blocked(conn);
        return;
    }
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
    conn->write_deadline = 0;
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
    pf__notices_add(loop, conn, PF_NOTICE_ERROR, code);
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
    pf__notices_add(conn->loop, conn, PF_NOTICE_ERROR, PF_ERR_PROXY);
    pf__conn_kill(conn);
}

/* ---- the end of input ---------------------------------------------------------------*/
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
        if (pf__output_unsent(conn) > 0) {
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
    case PF__PHASE_WEBSOCKET: /* without a close */
        pf__conn_kill(conn);
        return;
    default:
        pf__conn_refuse(conn, PF_ERR_TRUNCATED);
    }
}

static void
input_failed(pf_conn *conn, int error)
{
    if (conn->phase != PF__PHASE_IDLE)
        pf__notices_add(conn->loop, conn, PF_NOTICE_ERROR, error);
    pf__conn_kill(conn);
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
    if (conn->loop->read_until != 0 && conn->loop->now >= conn->loop->read_until)
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
        rc = early ? pf__input_absorb(conn) : pf__input_gather(conn);
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
    pf__notices_add(conn->loop, conn, PF_NOTICE_ACTIVE, 0);
}

static void
begin_idle(pf_conn *conn)
{
    pf_loop *loop = conn->loop;
    conn->phase = PF__PHASE_IDLE;
    pf__buffer_release(&loop->pool, &conn->in);
    conn->raw = conn->base = 0;
    set_deadlines(conn, first_deadline(conn, loop->options.idle_timeout_ms));
    pf__notices_add(loop, conn, PF_NOTICE_IDLE, 0);
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
    if (pf__output_unsent(conn) >= PF__HIGH_WATER)
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
    int rc = pf__input_gather(conn);
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
    int rc = whole ? pf__input_gather(conn) : pf__input_absorb(conn);
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
    int rc = pf__input_absorb(conn);
    r->drained += (uint32_t)(conn->raw - before);
    if (rc < 0 || r->drained > PF__DRAIN_MAX) {
        drop_request(conn);
        begin_closing(conn, true);
        return CONTENT;
    }
    pf__input_consume(conn, r->body_end - r->body_at);
    if (!r->body_done)
        return HUNGRY;
    next_request(conn);
    if (conn->phase == PF__PHASE_IDLE)
        return HUNGRY;
    return conn->phase == PF__PHASE_HEAD ? advance_head(conn) : CONTENT;
}

/* ---- WebSockets ---------------------------------------------------------------------*/
/* Nothing is to be read that would turn the close into a reset. */
static bool
is_clean(const pf_conn *conn)
{
    return conn->raw == conn->in.len && !conn->readable;
}

static void
websocket_closed(pf_conn *conn)
{
    if (conn->lent)
        tell_holder(conn, PF_ERR_CLOSED);
    begin_closing(conn, !is_clean(conn));
}

static void
websocket_failed(pf_conn *conn, int error)
{
    pf__notices_add(conn->loop, conn, PF_NOTICE_ERROR, error);
    pf__websocket_fail(conn->websocket, &conn->loop->pool, &conn->out, error);
    if (conn->lent)
        tell_holder(conn, error);
    begin_closing(conn, true);
}

/* We close: the peer is to do so, too. */
static void
await_close(pf_conn *conn)
{
    set_deadlines(conn, conn->loop->now + conn->loop->options.ws_close_timeout_ms);
    pf__conn_mark_dirty(conn);
}

static int
advance_websocket(pf_conn *conn)
{
    pf__websocket *ws = conn->websocket;
    size_t unsent = pf__output_unsent(conn);
    if (unsent >= PF__HIGH_WATER)
        return CONTENT; /* it does not read what we answer: settle comes back to it */
    if (PF__UNLIKELY(ws->failed != 0)) {
        if (ws->count == 0)
            websocket_failed(conn, ws->failed);
        return CONTENT;
    }
    if (conn->in.len > conn->raw)
        ws->heard = conn->loop->now;
    bool had = ws->count > 0;
    int rc =
        pf__websocket_parse(ws, &conn->loop->pool, &conn->in, &conn->raw, &conn->out);
    if (conn->lent && ws->count > 0 && !had)
        pf__conn_mark_ready(conn, PF_EVENT_MESSAGE);
    if (PF__UNLIKELY(rc < 0)) {
        ws->failed = rc;
        if (ws->count > 0 && !had) /* what came before may be answered first */
            set_deadlines(conn, conn->loop->now + PF__LAST_WORD_MS);
        else
            websocket_failed(conn, rc);
        return CONTENT;
    }
    if (PF__UNLIKELY(rc == PF__WEBSOCKET_CLOSED)) {
        websocket_closed(conn);
        return CONTENT;
    }
    if (PF__UNLIKELY(pf__output_unsent(conn) != unsent))
        pf__conn_mark_dirty(conn);
    if (rc == PF__WEBSOCKET_FULL)
        return CONTENT;
    return ws->count > 0 && pf__websocket_waiting(ws) >= PF__BODY_WINDOW ? CONTENT
                                                                         : HUNGRY;
}

/* It said nothing for a while, or nothing to our ping, or did not close in time. What
 * we have not listened to counts as said; and to what it has not got it cannot answer,
 * but as long as it takes something of it, it is there: else the write timeout ends it. */
static void
websocket_due(pf_conn *conn)
{
    pf__websocket *ws = conn->websocket;
    const pf_options *o = &conn->loop->options;
    int64_t now = conn->loop->now;
    if (ws->close_sent && pf__output_unsent(conn) > 0) {
        await_close(conn); /* it cannot have read our close: its time begins later */
        return;
    }
    if (ws->close_sent) {
        conn->loop->row->stats.timeouts++;
        pf__conn_kill(conn);
        return;
    }
    if (ws->failed != 0) {
        websocket_failed(conn, ws->failed);
        return;
    }
    if (!is_clean(conn) || pf__output_unsent(conn) > 0)
        ws->heard = now;
    if (ws->heard >= ws->pinged)
        ws->pinged = 0;
    if (now < ws->heard + o->ws_ping_interval_ms) {
        set_deadlines(conn, ws->heard + o->ws_ping_interval_ms);
        return;
    }
    if (ws->pinged > 0 && o->ws_ping_timeout_ms > 0) {
        conn->loop->row->stats.timeouts++;
        websocket_failed(conn, PF_ERR_WEBSOCKET_PONG);
        return;
    }
    if (pf__websocket_ping(&conn->loop->pool, &conn->out) < 0) {
        pf__conn_kill(conn);
        return;
    }
    uint32_t wait = o->ws_ping_timeout_ms;
    ws->pinged = now;
    set_deadlines(conn, now + (wait > 0 ? wait : o->ws_ping_interval_ms));
    pf__conn_mark_dirty(conn);
}

/* The server goes: 1012, of IANA's registry. */
static void
drain_websocket(pf_conn *conn, bool now)
{
    pf__websocket *ws = conn->websocket;
    if (ws->close_sent) {
        if (now)
            pf__conn_kill(conn);
        return;
    }
    pf__websocket_end(ws, 1012, NULL, 0);
    if (pf__websocket_close(ws, &conn->loop->pool, &conn->out, 1012, NULL, 0) < 0) {
        pf__conn_kill(conn);
        return;
    }
    if (conn->lent)
        tell_holder(conn, PF_ERR_CLOSED);
    await_close(conn);
}

int
pf__conn_switch(pf_conn *conn, const pf__deflate *deflate)
{
    pf_loop *loop = conn->loop;
    pf_request *r = conn->request;
    conn->websocket = pf__websocket_new(loop->options.ws_max_size, deflate);
    if (conn->websocket == NULL)
        return -ENOMEM;
    conn->phase = PF__PHASE_WEBSOCKET;
    conn->websocket->heard = loop->now;
    conn->in.len -= conn->raw; /* what came behind the head are frames */
    memmove(conn->in.data, conn->in.data + conn->raw, conn->in.len);
    conn->raw = conn->base = 0;
    if (conn->in.len == 0)
        pf__buffer_release(&loop->pool, &conn->in);
    r->head.size = 0;
    count_answer(loop, 101);
    count_latency(loop, r);
    if (loop->options.ws_ping_interval_ms > 0)
        set_deadlines(conn, loop->now + loop->options.ws_ping_interval_ms);
    pf__conn_mark_dirty(conn);
    return 0;
}

void
pf__conn_left(pf_conn *conn)
{
    pf__websocket *ws = conn->websocket;
    conn->lent = false;
    conn->pending = 0;
    if (conn->phase == PF__PHASE_DEAD) {
        pf__conn_reap(conn);
        return;
    }
    ws->count = 0;
    conn->write_timeout_ms = conn->request->write_timeout_ms;
    drop_request(conn);
    if (conn->phase != PF__PHASE_WEBSOCKET)
        return;
    await_close(conn);
    pf__websocket_end(ws, 1000, NULL, 0); /* who ends the loan says no more */
    if (pf__websocket_close(ws, &conn->loop->pool, &conn->out, 1000, NULL, 0) < 0)
        pf__conn_kill(conn);
}

/* ---- the beginning of a connection, and of what it says ------------------------------*/
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

static int
advance_first(pf_conn *conn)
{
    if (conn->raw == conn->in.len)
        return HUNGRY;
    begin_head(conn);
    return conn->phase == PF__PHASE_HEAD ? advance_head(conn) : CONTENT;
}

static uint32_t
first_byte_timeout(const pf_conn *conn)
{
    uint32_t timeout = conn->loop->options.header_timeout_ms;
    return timeout < PF__FIRST_BYTE_MS ? timeout : PF__FIRST_BYTE_MS;
}

/* ---- TLS ----------------------------------------------------------------------------*/
/* refusal: 0, or the PF_ERR_* that is told once that can be. -ENOMEM: it is dead. */
static int
begin_handshake(pf_conn *conn, int refusal)
{
    size_t early = conn->in.len - conn->raw; /* what came behind a PROXY header */
    conn->session = pf__session_new(conn->loop->tls, conn->source.fd,
                                    conn->in.data + conn->raw, early);
    if (conn->session == NULL) {
        pf__conn_kill(conn);
        return -ENOMEM;
    }
    pf__session_refuse(conn->session, refusal);
    pf__buffer_release(&conn->loop->pool, &conn->in);
    conn->raw = conn->base = 0;
    conn->phase = PF__PHASE_HANDSHAKE;
    conn->read_deadline = first_deadline(conn, conn->loop->options.tls_timeout_ms);
    return 0;
}

static void
handshake_failed(pf_conn *conn, int error)
{
    if (error == -ECONNRESET && !pf__session_begun(conn->session)) {
        pf__conn_kill(conn); /* a balancer that looks whether we are there */
        return;
    }
    if (error == PF_ERR_TLS_PLAIN) {
        drop_session(conn); /* it is told in its own language */
        pf__conn_refuse(conn, error);
        return;
    }
    conn->loop->row->stats.refused++;
    pf__notices_add(conn->loop, conn, PF_NOTICE_ERROR, error);
    if (error == PF_ERR_TLS_HANDSHAKE) { /* the alert is out, and is to arrive */
        drop_session(conn);
        begin_closing(conn, true);
    } else {
        pf__conn_kill(conn);
    }
}

static int
advance_handshake(pf_conn *conn)
{
    int rc = pf__session_handshake(conn->session);
    conn->readable = rc == 0 && !pf__session_is_dry(conn->session);
    if (rc < 0)
        handshake_failed(conn, rc);
    else if (conn->readable)
        pf__conn_mark_dirty(conn); /* it goes on when others have had their turn */
    if (rc <= 0)
        return CONTENT;
    conn->readable = true;
    conn->phase = PF__PHASE_FIRST;
    int refusal = pf__session_refusal(conn->session);
    if (PF__UNLIKELY(refusal != 0)) {
        pf__conn_refuse(conn, refusal);
        return CONTENT;
    }
    set_deadlines(conn, first_deadline(conn, first_byte_timeout(conn)));
    return advance_first(conn);
}

/* ---- a PROXY header -----------------------------------------------------------------*/
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
    if (conn->loop->tls != NULL) {
        if (begin_handshake(conn, rc) < 0)
            return CONTENT;
        set_deadlines(conn, conn->read_deadline);
        return advance_handshake(conn);
    }
    if (rc < 0) {
        pf__conn_refuse(conn, rc);
        return CONTENT;
    }
    return advance_first(conn);
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
    return begin_introduced(conn, &client, &server);
}

static int
advance(pf_conn *conn)
{
    switch (conn->phase) {
    case PF__PHASE_PROXY:
        return advance_proxy(conn);
    case PF__PHASE_HANDSHAKE:
        return advance_handshake(conn);
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
    case PF__PHASE_WEBSOCKET:
        return advance_websocket(conn);
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
            ssize_t n = pf__input_fill(conn);
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
    size_t unsent = pf__output_unsent(conn);
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
    if (conn->phase == PF__PHASE_CLOSING && pf__output_unsent(conn) == 0)
        finish_closing(conn);
    if (conn->phase == PF__PHASE_LINGER)
        linger(conn);
    if (conn->phase == PF__PHASE_DEAD)
        return;
    pf_request *r = conn->request;
    if (r != NULL && r->want_room && pf__output_unsent(conn) < PF__LOW_WATER) {
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
    if (!conn->readable && conn->raw == conn->in.len && conn->websocket == NULL)
        return; /* of a WebSocket, messages may have been taken out */
    if (force)  /* a flush in the middle of a batch only sends */
        pf__conn_mark_dirty(conn);
    else
        pump(conn);
}

/* What it reads may have to wait for room to send. */
static void
heed_session(pf_conn *conn)
{
    if (conn->readable)
        pf__session_wet(conn->session, conn->fin);
    else
        conn->readable = pf__session_wants_room(conn->session);
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
    if (conn->session != NULL)
        heed_session(conn);
    bool holds = conn->phase == PF__PHASE_LENT || (conn->websocket && conn->lent);
    if (holds && (flags & EPOLLHUP))
        tell_holder(conn, PF_ERR_CLOSED);
    if (conn->request != NULL && conn->request->want_end)
        pf__conn_end_wanted(conn);
    if (pf__output_unsent(conn) > 0 || conn->phase == PF__PHASE_CLOSING
        || conn->phase == PF__PHASE_LINGER
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
    if (PF__UNLIKELY(conn->websocket != NULL)) {
        pf__conn_left(conn);
        return;
    }
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
    bool open = conn->phase == PF__PHASE_WEBSOCKET && !conn->websocket->close_sent;
    if (conn->websocket != NULL && !open) {
        pf__conn_left(conn);
        return;
    }
    conn->lent = false;
    conn->pending = 0;
    conn->loop->row->stats.statuses[0]++;
    if (conn->phase == PF__PHASE_DEAD) {
        pf__conn_reap(conn);
        return;
    }
    bool sealed = a->flags & PF__ANSWER_SEALED;
    bool framed = a->length >= 0 || (a->flags & PF__ANSWER_CHUNKED);
    if (open || (sealed && !framed)) {
        kill_with_reset(conn);
        return;
    }
    if (sealed)
        say_no_goodbye(conn);
    else if (a->flags & PF__ANSWER_BEGUN)
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
    if (conn->phase == PF__PHASE_WEBSOCKET && !write) {
        websocket_due(conn);
        return;
    }
    conn->loop->row->stats.timeouts++;
    if (write) {
        pf__notices_add(conn->loop, conn, PF_NOTICE_ERROR, PF_ERR_WRITE_TIMEOUT);
        kill_with_reset(conn);
        return;
    }
    switch (conn->phase) {
    case PF__PHASE_PROXY:
        turn_away(conn);
        return;
    case PF__PHASE_HANDSHAKE:
        pf__notices_add(conn->loop, conn, PF_NOTICE_ERROR, PF_ERR_TLS_TIMEOUT);
        pf__conn_kill(conn);
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
           || conn->phase == PF__PHASE_HANDSHAKE
           || (conn->phase == PF__PHASE_PROXY && conn->in.len == 0);
}

/* New and idle connections get a lame-duck time in which one request is still answered,
 * so that a client that is just sending is not reset. */
void
pf__conn_drain(pf_conn *conn, bool now)
{
    if (conn->phase == PF__PHASE_WEBSOCKET)
        drain_websocket(conn, now);
    if (conn->phase != PF__PHASE_DEAD)
        set_deadlines(conn, conn->read_deadline); /* which may be too late by now */
    if (!is_waiting(conn))
        return;
    if (now && pf__output_unsent(conn) == 0) {
        pf__conn_kill(conn);
        return;
    }
    int64_t last = conn->loop->now + conn->loop->options.drain_idle_ms;
    if (conn->read_deadline == 0 || last < conn->read_deadline)
        set_deadlines(conn, last);
}

/* ---- passing on ---------------------------------------------------------------------
 * A connection between two requests is no more than its socket: another worker can have
 * it. What the peer may have sent meanwhile waits in the socket. One that speaks TLS is
 * more than that from its first byte on.
 */
bool
pf__conn_is_quiet(const pf_conn *conn)
{
    if (conn->session != NULL && pf__session_begun(conn->session))
        return false;
    return is_waiting(conn) && conn->in.len == 0 && pf__output_unsent(conn) == 0;
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

/* Over a limit, and in clear: where TLS is spoken nobody would understand it. */
static void
turn_out(pf_conn *conn, int refusal)
{
    if (conn->loop->tls != NULL)
        pf__conn_kill(conn);
    else
        pf__conn_refuse(conn, refusal);
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
    conn->read_deadline = first_deadline(conn, first_byte_timeout(conn));
    conn->readable = true;
    conn->peer = origin->peer;
    conn->local = origin->local;
    conn->introduced = origin->introduced;
    conn->served = origin->served;
    conn->counted = o->max_connections_per_ip > 0 && refusal == 0 && !introduces
                    && conn->peer.family != AF_UNIX;
    loop->row->stats.connections++;
    loop->row->stats.accepted++;
    pf__notices_add(loop, conn, PF_NOTICE_NEW, 0);
    pf__conn_mark_dirty(conn);
    if (refusal != 0) {
        conn->turned_away = true;
        loop->turned_away++;
    }
    if (loop->tls != NULL && !introduces) {
        if (begin_handshake(conn, refusal) < 0)
            return -ENOMEM;
    } else if (refusal != 0) {
        turn_out(conn, refusal);
        return 0;
    }
    pump(conn);
    if (conn->phase <= PF__PHASE_HANDSHAKE)
        set_deadlines(conn, conn->read_deadline);
    return 0;
}
