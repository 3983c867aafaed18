/* request.c - the loan: what a handler sees of its request, and the answer it writes.
 *
 * Nothing here assumes that a connection lends one request at a time; what is particular
 * to HTTP/1.1 stays behind the pf__conn_ calls. The holder may keep a loan for as long
 * as it likes: when the connection dies meanwhile, the head stays readable, every write
 * says PF_ERR_CLOSED, and the loan still ends with end or abort.
 */
#include "internal.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>

/* ---- reading ------------------------------------------------------------------------*/
const pf_head *
pf_request_head(const pf_request *r)
{
    return &r->head;
}

const char *
pf_request_bytes(const pf_request *r)
{
    return r->conn->in.data + r->conn->base;
}

void
pf_request_get_peer(const pf_request *r, pf_peer *peer)
{
    *peer = r->conn->peer;
}

static int
ask_local(int fd, pf_peer *local)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_storage room;
    } address = {0};
    socklen_t len = sizeof address;
    if (getsockname(fd, &address.any, &len) < 0)
        return -errno;
    local->family = address.any.sa_family;
    if (local->family == AF_INET) {
        memcpy(local->bytes, &address.v4.sin_addr, 4);
        local->port = ntohs(address.v4.sin_port);
    } else if (local->family == AF_INET6) {
        memcpy(local->bytes, &address.v6.sin6_addr, 16);
        local->port = ntohs(address.v6.sin6_port);
        local->scope = address.v6.sin6_scope_id;
    }
    return 0;
}

/* It stays the same for as long as the connection lives: the kernel is asked once. */
int
pf_request_get_local(const pf_request *r, pf_peer *local)
{
    pf_conn *conn = r->conn;
    int rc = 0;
    if (conn->local.family == 0)
        rc = r->dead ? PF_ERR_CLOSED : ask_local(conn->source.fd, &conn->local);
    *local = conn->local;
    return rc;
}

int
pf_request_tls(const pf_request *r, pf_tls_info *info)
{
    if (r->conn->session == NULL)
        return 0;
    pf__session_describe(r->conn->session, info);
    return 1;
}

void
pf_request_set_user(pf_request *r, void *user)
{
    r->user = user;
}

uint64_t
pf_request_connection(const pf_request *r)
{
    return r->conn->id;
}

bool
pf_request_closed(const pf_request *r)
{
    return r->dead || r->conn->hung_up;
}

/* ---- the body -----------------------------------------------------------------------*/
pf_slice
pf_request_body(const pf_request *r)
{
    return (pf_slice){r->conn->in.data + r->body_at, r->body_end - r->body_at};
}

bool
pf_request_body_done(const pf_request *r)
{
    return r->body_done;
}

int
pf_request_body_fd(const pf_request *r)
{
    return r->body_fd;
}

int
pf_request_take_body_fd(pf_request *r)
{
    int fd = r->body_done ? r->body_fd : -1;
    if (fd >= 0)
        r->body_fd = -1;
    return fd;
}

uint64_t
pf_request_body_size(const pf_request *r)
{
    return r->body_spilled + (r->body_end - r->body_at);
}

int
pf_request_consume(pf_request *r, size_t n)
{
    if (n > r->body_end - r->body_at)
        return PF_ERR_STATE;
    if (r->dead)
        r->body_at += n;
    else
        pf__input_consume(r->conn, n);
    return 0;
}

int
pf_request_want_body(pf_request *r, int want)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    if (r->expect && !r->body_done && !(r->answer.flags & PF__ANSWER_SEALED)) {
        int rc = pf__conn_continue(r->conn);
        if (rc < 0)
            return rc;
    }
    r->expect = false;
    r->want = (uint8_t)want;
    pf__conn_body_wanted(r->conn);
    return 0;
}

int
pf_request_limit(pf_request *r, int64_t max_body_size, int64_t read_timeout_ms,
                 int64_t write_timeout_ms)
{
    if (read_timeout_ms >= 0)
        r->read_timeout_ms = (uint32_t)read_timeout_ms;
    if (write_timeout_ms >= 0)
        r->write_timeout_ms = (uint32_t)write_timeout_ms;
    if (max_body_size < 0)
        return 0;
    r->max_body = (uint64_t)max_body_size;
    bool chunked = r->has_body && (r->head.flags & PF_HEAD_CHUNKED);
    uint64_t size = chunked ? r->chunked.total : r->head.content_length;
    return size > r->max_body ? PF_ERR_BODY_SIZE : 0;
}

/* ---- the end of a loan --------------------------------------------------------------*/
static void
ended(pf_request *r)
{
    r->loop->row->stats.lent--;
}

int
pf_request_refuse(pf_request *r, int code)
{
    if (r->answer.flags & PF__ANSWER_SEALED || pf_error_status(code) == 0)
        return PF_ERR_STATE;
    pf_conn *conn = r->conn;
    if (r->dead)
        return pf_request_abort(r);
    pf_request_reset(r);
    ended(r);
    conn->lent = false;
    pf__conn_refuse(conn, code);
    return 0;
}

int
pf_request_abort(pf_request *r)
{
    ended(r);
    pf__conn_abort(r->conn);
    return 0;
}

/* ---- the answer ---------------------------------------------------------------------*/
static inline pf__pool *
pool(const pf_request *r)
{
    return &r->loop->pool;
}

int
pf_request_begin(pf_request *r, int status, int64_t length)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    return pf__response_begin(pool(r), &r->conn->out, &r->answer, status, NULL, 0,
                              length);
}

int
pf_request_begin_line(pf_request *r, int status, const char *reason, size_t reason_len,
                      int64_t length)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    return pf__response_begin(pool(r), &r->conn->out, &r->answer, status, reason,
                              reason_len, length);
}

int
pf_request_set_length(pf_request *r, uint64_t length)
{
    pf__answer *a = &r->answer;
    if (r->dead)
        return PF_ERR_CLOSED;
    if ((a->flags & (PF__ANSWER_BEGUN | PF__ANSWER_SEALED)) != PF__ANSWER_BEGUN
        || length > INT64_MAX)
        return PF_ERR_STATE;
    if (a->length < 0)
        a->length = (int64_t)length;
    return 0;
}

int64_t
pf_request_length(const pf_request *r)
{
    return r->answer.length;
}

int
pf_request_field(pf_request *r, const char *name, size_t name_len, const char *value,
                 size_t value_len)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    return pf__response_field(pool(r), &r->conn->out, &r->answer, name, name_len, value,
                              value_len);
}

int
pf_request_line(pf_request *r, const pf_line *line)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    return pf__response_line(pool(r), &r->conn->out, &r->answer, line);
}

/* Whether the connection is kept is known only now, and announced before the fact. */
static inline void
decide_keep(pf_request *r)
{
    if (PF__UNLIKELY(!pf__conn_keeps(r->conn)))
        r->answer.flags |= PF__ANSWER_CLOSE;
    else if (PF__UNLIKELY(r->head.minor == 0))
        r->answer.flags |= PF__ANSWER_KEEP;
}

static int
seal(pf_request *r)
{
    if (r->answer.flags & PF__ANSWER_SEALED)
        return 0;
    if (!(r->answer.flags & PF__ANSWER_BEGUN))
        return PF_ERR_STATE;
    decide_keep(r);
    int rc = pf__response_seal(pool(r), &r->conn->out, &r->answer, &r->loop->stamp);
    pf__conn_mark_dirty(r->conn);
    return rc;
}

enum { CHUNK_FRAME = 24 }; /* size line and line end around a chunk */

static char *
put_chunk_size(char *p, size_t len)
{
    return p + snprintf(p, CHUNK_FRAME - 2, "%zx\r\n", len);
}

/* 1: there is something to write; 0: it is dropped; < 0: it must not be written. */
static int
before_write(pf_request *r, uint64_t len)
{
    pf__answer *a = &r->answer;
    if (r->dead)
        return PF_ERR_CLOSED;
    if (PF__UNLIKELY(a->flags & PF__ANSWER_TRAILED))
        return PF_ERR_STATE;
    int rc = seal(r);
    if (rc < 0)
        return rc;
    if (a->length >= 0 && len > (uint64_t)a->length - a->written)
        return PF_ERR_APP_BODY_LONG;
    return len > 0 && !(a->flags & PF__ANSWER_NO_BODY);
}

int
pf_request_write(pf_request *r, const char *data, size_t len)
{
    int rc = before_write(r, len);
    if (rc == 0)
        r->answer.written += len;
    if (rc <= 0)
        return rc;
    pf__buffer *out = &r->conn->out;
    if ((rc = pf__buffer_reserve(pool(r), out, len + CHUNK_FRAME)) < 0)
        return rc;
    bool chunked = r->answer.flags & PF__ANSWER_CHUNKED;
    if (chunked)
        out->len = (size_t)(put_chunk_size(out->data + out->len, len) - out->data);
    pf__buffer_put(out, data, len);
    r->answer.written += len;
    if (chunked)
        pf__buffer_put(out, "\r\n", 2);
    pf__conn_mark_dirty(r->conn);
    return 0;
}

/* What is borrowed goes out as it is, in a chunk of its own where there are chunks. */
static int
write_borrowed(pf_request *r, const pf__segment *segment)
{
    pf__buffer *out = &r->conn->out;
    int rc = pf__buffer_reserve(pool(r), out, CHUNK_FRAME);
    if (rc < 0)
        return rc;
    bool chunked = r->answer.flags & PF__ANSWER_CHUNKED;
    size_t before = out->len;
    if (chunked)
        out->len =
            (size_t)(put_chunk_size(out->data + before, segment->len) - out->data);
    if ((rc = pf__output_borrow(r->conn, segment)) < 0) {
        out->len = before;
        return rc;
    }
    r->answer.written += segment->len;
    if (chunked)
        pf__buffer_put(out, "\r\n", 2);
    pf__conn_mark_dirty(r->conn);
    return 0;
}

int
pf_request_write_ref(pf_request *r, const char *data, size_t len, void *ref)
{
    pf__segment segment = {
        .kind = PF__SEGMENT_BORROWED, .data = data, .len = len, .ref = ref};
    int rc = before_write(r, len);
    if (rc < 0)
        return rc;
    if (rc == 0 || len < PF__BORROW_MIN)
        return PF_ERR_STATE; /* the caller asks pf_request_borrows() first */
    return write_borrowed(r, &segment);
}

/* What can be known of a file before it is promised. */
static int
check_file(int fd, int64_t offset, uint64_t len)
{
    struct stat file;
    if (offset < 0)
        return -EINVAL;
    if (fstat(fd, &file) < 0)
        return -errno;
    if (!S_ISREG(file.st_mode))
        return -EINVAL;
    bool has = offset <= file.st_size && len <= (uint64_t)(file.st_size - offset);
    return has ? 0 : PF_ERR_APP_FILE_SHORT;
}

int
pf_request_write_file(pf_request *r, int fd, int64_t offset, uint64_t len, void *ref)
{
    int rc = r->dead ? PF_ERR_CLOSED : check_file(fd, offset, len);
    if (rc < 0 || (rc = before_write(r, len)) < 0)
        return rc;
    if (rc == 0) {
        r->answer.written += len;
        return 0;
    }
    rc = write_borrowed(r, &(pf__segment){.kind = PF__SEGMENT_FILE,
                                          .fd = fd,
                                          .offset = offset,
                                          .len = (size_t)len,
                                          .ref = ref});
    return rc < 0 ? rc : 1;
}

int
pf_request_trailers(pf_request *r)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    if ((r->answer.flags & (PF__ANSWER_BEGUN | PF__ANSWER_SEALED)) != PF__ANSWER_BEGUN)
        return PF_ERR_STATE;
    return r->head.flags & PF_HEAD_TRAILERS
           && pf__response_announce_trailers(&r->answer);
}

int
pf_request_trailer(pf_request *r, const char *name, size_t name_len, const char *value,
                   size_t value_len)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    int rc = pf__response_check_trailer(name, name_len, value, value_len);
    if (rc < 0 || (rc = seal(r)) < 0)
        return rc;
    pf__conn_mark_dirty(r->conn);
    return pf__response_trailer(pool(r), &r->conn->out, &r->answer, name, name_len,
                                value, value_len);
}

int
pf_request_reset(pf_request *r)
{
    pf__answer *a = &r->answer;
    if (a->flags & PF__ANSWER_SEALED)
        return PF_ERR_STATE;
    if (a->flags & PF__ANSWER_BEGUN && !r->dead)
        r->conn->out.len = a->mark;
    a->flags = 0;
    a->written = 0;
    a->length = -1;
    return 0;
}

static int
finish_body(pf_request *r)
{
    pf__answer *a = &r->answer;
    if (!(a->flags & PF__ANSWER_SEALED) && a->length < 0 && !a->head)
        a->length = 0; /* nothing was written */
    int rc = seal(r);
    if (rc < 0 || a->flags & PF__ANSWER_NO_BODY)
        return rc;
    if (a->length >= 0 && a->written < (uint64_t)a->length)
        return PF_ERR_APP_BODY_SHORT;
    if (!(a->flags & PF__ANSWER_CHUNKED))
        return 0;
    return pf__response_end_chunks(pool(r), &r->conn->out, a);
}

int
pf_request_end(pf_request *r)
{
    int rc = r->dead ? PF_ERR_CLOSED : finish_body(r);
    if (rc < 0) {
        pf_request_abort(r);
        return rc;
    }
    ended(r);
    pf__conn_answered(r->conn);
    return 0;
}

static int
borrow_bytes(pf_conn *conn, const char *data, size_t len, void *ref)
{
    return pf__output_borrow(
        conn, &(pf__segment){
                  .kind = PF__SEGMENT_BORROWED, .data = data, .len = len, .ref = ref});
}

/* Before its head is complete: then another answer may still be given. */
static int
settle_length(pf__answer *a, size_t len)
{
    if ((a->flags & (PF__ANSWER_BEGUN | PF__ANSWER_SEALED | PF__ANSWER_TRAILERS))
        != PF__ANSWER_BEGUN)
        return PF_ERR_STATE;
    if (a->length < 0 && (len > 0 || !a->head)) /* to HEAD, no body says nothing */
        a->length = (int64_t)len;
    if (a->length == (int64_t)len || pf__response_is_bodiless(a))
        return 0;
    return a->length > (int64_t)len ? PF_ERR_APP_BODY_SHORT : PF_ERR_APP_BODY_LONG;
}

int
pf_request_whole(pf_request *r, const char *data, size_t len, void *ref)
{
    pf__buffer *out = &r->conn->out;
    int rc = r->dead ? PF_ERR_CLOSED : settle_length(&r->answer, len);
    if (rc < 0 || (rc = seal(r)) < 0)
        return rc;
    bool body = len > 0 && !(r->answer.flags & PF__ANSWER_NO_BODY);
    bool borrow = body && ref != NULL && len >= PF__BORROW_MIN;
    if (borrow)
        rc = borrow_bytes(r->conn, data, len, ref);
    else if (body && (rc = pf__buffer_reserve(pool(r), out, len)) == 0)
        pf__buffer_put(out, data, len);
    if (rc < 0)
        return rc;
    ended(r);
    pf__conn_answered(r->conn);
    return borrow;
}

int
pf_request_answer(pf_request *r, int status, const char *type, size_t type_len,
                  const char *body, size_t len, void *ref)
{
    pf_conn *conn = r->conn;
    pf__answer *a = &r->answer;
    if (PF__UNLIKELY(r->dead))
        return PF_ERR_CLOSED;
    bool borrow = ref != NULL && len >= PF__BORROW_MIN && !a->head;
    decide_keep(r);
    int rc = pf__response_whole(pool(r), &conn->out, a, status, &r->loop->stamp, type,
                                type_len, body, len, !borrow);
    if (PF__UNLIKELY(rc < 0))
        return rc;
    borrow = borrow && !(a->flags & PF__ANSWER_NO_BODY);
    if (borrow && (rc = borrow_bytes(conn, body, len, ref)) < 0) {
        conn->out.len = a->mark;
        a->flags = 0;
        return rc;
    }
    ended(r);
    pf__conn_answered(conn);
    return borrow;
}

int
pf_request_inform(pf_request *r, int status, const char *fields, size_t len)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    if (status < 102 || status > 199 || r->answer.flags & PF__ANSWER_BEGUN)
        return PF_ERR_STATE;
    int rc = pf__response_check_fields(fields, len);
    if (rc < 0)
        return rc;
    if (r->head.minor == 0)
        return 0; /* 1.0 knows no interim answers */
    pf__buffer *out = &r->conn->out;
    rc = pf__buffer_reserve(pool(r), out, len + 64);
    if (rc < 0)
        return rc;
    out->len += (size_t)snprintf(out->data + out->len, 60, "HTTP/1.1 %d %s\r\n", status,
                                 pf__response_reason(status));
    if (len > 0)
        pf__buffer_put(out, fields, len);
    pf__buffer_put(out, "\r\n", 2);
    pf__conn_mark_dirty(r->conn);
    return 0;
}

bool
pf_request_begun(const pf_request *r)
{
    return (r->answer.flags & PF__ANSWER_SEALED) != 0;
}

bool
pf_request_borrows(const pf_request *r, size_t len)
{
    return len >= PF__BORROW_MIN && !r->answer.head
           && !(r->answer.flags & PF__ANSWER_NO_BODY);
}

size_t
pf_request_pending(const pf_request *r)
{
    return r->dead ? 0 : pf__output_unsent(r->conn);
}

int
pf_request_want_room(pf_request *r)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    r->want_room = true;
    pf__conn_mark_dirty(r->conn);
    return 0;
}

int
pf_request_want_end(pf_request *r)
{
    if (r->dead)
        return PF_ERR_CLOSED;
    pf__conn_end_wanted(r->conn);
    return 0;
}
