/* channel.c - the loan of a WebSocket: messages in, messages out, and its close.
 *
 * As in request.c the holder may keep the loan for as long as it likes, whatever becomes
 * of the connection meanwhile: messages that came before the close can be received.
 */
#include "internal.h"

int
pf_channel_offered(const pf_request *r)
{
    return pf__websocket_offered(&r->head, pf_request_bytes(r));
}

/* The compression that its offers and our options come to. */
static pf__deflate
agreed(const pf_request *r)
{
    pf__deflate deflate = {0};
    if (r->loop->options.flags & PF_OPTION_WS_DEFLATE)
        pf__websocket_accept_deflate(&deflate, &r->head, pf_request_bytes(r));
    return deflate;
}

int
pf_channel_begin(pf_request *r, const char *subprotocol, size_t len)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    const char *bytes = pf_request_bytes(r);
    int rc = pf__websocket_offered(&r->head, bytes);
    if (rc <= 0)
        return rc < 0 ? rc : PF_ERR_STATE;
    char accept[PF__WEBSOCKET_ACCEPT_SIZE], extensions[PF__DEFLATE_ANSWER_MAX];
    size_t extensions_len = 0;
    pf__deflate deflate = agreed(r);
    pf__websocket_accept_key(&r->head, bytes, accept);
    if (deflate.on)
        extensions_len = pf__deflate_answer(&deflate, extensions);
    return pf__response_switch(&r->loop->pool, &r->conn->out, &r->answer, accept,
                               sizeof accept, subprotocol, len,
                               extensions_len > 0 ? extensions : NULL, extensions_len);
}

int
pf_channel_open(pf_request *r)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    if ((r->answer.flags & (PF__ANSWER_BEGUN | PF__ANSWER_SEALED)) != PF__ANSWER_BEGUN
        || r->answer.status != 101)
        return PF_ERR_STATE;
    pf__deflate deflate = agreed(r);
    int rc = pf__conn_switch(r->conn, &deflate);
    if (rc < 0)
        return rc;
    rc = pf__response_seal(&r->loop->pool, &r->conn->out, &r->answer, &r->loop->stamp);
    if (rc == 0 && r->loop->draining)
        pf__conn_drain(r->conn, false);
    return rc;
}

int
pf_channel_receive(pf_request *r, pf_message *message)
{
    pf_conn *conn = r->conn;
    pf__websocket *ws = conn->websocket;
    if (ws == NULL)
        return PF_ERR_STATE;
    if (!pf__websocket_take(ws, &conn->in, message))
        return 0;
    if (ws->count == 0 && !r->dead)
        pf__conn_mark_dirty(conn); /* there is room for more, or nothing to be kept */
    return 1;
}

/* PF_ERR_*, or 0: it may send. */
static int
check_open(const pf_request *r)
{
    const pf__websocket *ws = r->conn->websocket;
    if (r->dead)
        return PF_ERR_CLOSED;
    if (ws == NULL)
        return PF_ERR_STATE;
    return ws->code != 0 ? PF_ERR_CLOSED : 0;
}

int
pf_channel_send(pf_request *r, int kind, const char *data, size_t len)
{
    pf_conn *conn = r->conn;
    int rc = check_open(r);
    if (PF__UNLIKELY(rc < 0))
        return rc;
    rc = pf__websocket_send(conn->websocket, &r->loop->pool, &conn->out, kind, data,
                            len);
    pf__conn_mark_dirty(conn);
    return rc;
}

int
pf_channel_send_ref(pf_request *r, int kind, const char *data, size_t len, void *ref)
{
    pf_conn *conn = r->conn;
    pf__buffer *out = &conn->out;
    int rc = check_open(r);
    if (rc < 0 || len < PF__BORROW_MIN || pf__websocket_deflates(conn->websocket, len))
        return rc < 0 ? rc : pf_channel_send(r, kind, data, len);
    size_t before = out->len;
    if ((rc = pf__websocket_send_header(&r->loop->pool, out, kind, len)) < 0)
        return rc;
    rc = pf__output_borrow(
        conn, &(pf__segment){
                  .kind = PF__SEGMENT_BORROWED, .data = data, .len = len, .ref = ref});
    if (rc < 0) {
        out->len = before;
        return rc;
    }
    pf__conn_mark_dirty(conn);
    return 1;
}

int
pf_channel_close(pf_request *r, int code, const char *reason, size_t len)
{
    pf_conn *conn = r->conn;
    pf__websocket *ws = conn->websocket;
    if (ws == NULL)
        return PF_ERR_STATE;
    if (!r->dead && ws->code == 0) {
        int rc = pf__websocket_close(ws, &r->loop->pool, &conn->out, (unsigned)code,
                                     reason, len);
        if (rc < 0)
            return rc;
        pf__websocket_end(ws, (unsigned)code, reason, len);
    }
    r->loop->row->stats.lent--;
    pf__conn_left(conn);
    return 0;
}

int
pf_channel_code(const pf_request *r, pf_slice *reason)
{
    const pf__websocket *ws = r->conn->websocket;
    *reason = (pf_slice){"", 0};
    if (ws == NULL)
        return PF_ERR_STATE;
    *reason = (pf_slice){ws->reason, ws->reason_len};
    return ws->code != 0 ? ws->code : 1006;
}
