/* output.c - what a connection has to send, and how it leaves.
 *
 * Bytes that were copied lie in conn->out, from `sent` on. What is borrowed (bytes of
 * somebody else's, or a part of a file) stands in a list of segments beside it, which
 * says between which of the copied bytes it goes. Most answers have no such list.
 *
 * Nothing here knows of phases, deadlines or the loop's queues: flush says what became
 * of the bytes, and conn.c decides what that means.
 */
#include "internal.h"

#include <errno.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    SENDS_MAX = 4 << 20, /* bytes to one connection before others have their turn */
    IOV_MAX_HERE = 64,
    RECORD = 16384, /* bytes that a record of TLS holds (RFC 8446 5.1) */
};

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
pf__output_borrow(pf_conn *conn, const pf__segment *segment)
{
    if (segment->len > PTRDIFF_MAX - pf__output_unsent(conn))
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

/* ---- sealed output ------------------------------------------------------------------
 * A record of TLS is filled from all that is next, so that a head and its body are one.
 */
static ssize_t
copy_part(const pf__segment *segment, const char *copied, char *to, size_t room)
{
    size_t n = segment->len < room ? segment->len : room;
    if (segment->kind != PF__SEGMENT_FILE) {
        bool is_copy = segment->kind == PF__SEGMENT_COPIED;
        memcpy(to, is_copy ? copied : segment->data, n);
        return (ssize_t)n;
    }
    ssize_t got;
    do
        got = pread(segment->fd, to, n, segment->offset);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got == 0 ? PF_ERR_APP_FILE_SHORT : got;
}

/* How much of the record could be filled, or an error if nothing could. */
static ssize_t
fill_record(const pf_conn *conn, size_t end, char record[RECORD])
{
    const pf__segments *s = conn->segments;
    size_t n = 0, copied = conn->sent;
    for (uint32_t i = s->first; i < s->count; i++) {
        const pf__segment *segment = &s->list[i];
        if (segment->kind == PF__SEGMENT_FILE && n > 0
            && pf__session_sends_files(conn->session))
            return (ssize_t)n;
        ssize_t part =
            copy_part(segment, conn->out.data + copied, record + n, RECORD - n);
        if (part < 0)
            return n > 0 ? (ssize_t)n : part;
        n += (size_t)part;
        if ((size_t)part < segment->len)
            return (ssize_t)n; /* it is full, or the file had no more at once */
        copied += segment->kind == PF__SEGMENT_COPIED ? segment->len : 0;
    }
    size_t rest = end - copied < RECORD - n ? end - copied : RECORD - n;
    memcpy(record + n, conn->out.data + copied, rest);
    return (ssize_t)(n + rest);
}

static ssize_t
seal_segments(const pf_conn *conn, size_t end, bool more)
{
    const pf__segment *first = &conn->segments->list[conn->segments->first];
    if (first->kind == PF__SEGMENT_BORROWED && first->len >= RECORD)
        return pf__session_write(conn->session, first->data, RECORD, more);
    if (first->kind == PF__SEGMENT_FILE && pf__session_sends_files(conn->session))
        return pf__session_send_file(conn->session, first->fd, first->offset,
                                     first->len < SENDS_MAX ? first->len : SENDS_MAX);
    char record[RECORD];
    ssize_t n = fill_record(conn, end, record);
    return n < 0 ? n : pf__session_write(conn->session, record, (size_t)n, more);
}

static ssize_t
send_sealed(const pf_conn *conn, size_t end)
{
    size_t n = end - conn->sent;
    bool more = conn->phase == PF__PHASE_CLOSING;
    if (conn->segments != NULL)
        return seal_segments(conn, end, more || n + conn->segments->borrowed > RECORD);
    return pf__session_write(conn->session, conn->out.data + conn->sent,
                             n < RECORD ? n : RECORD, more || n > RECORD);
}

/* Bytes that the kernel took, or -errno, or PF_ERR_APP_FILE_SHORT. */
static ssize_t
send_some(const pf_conn *conn, size_t end)
{
    if (PF__UNLIKELY(conn->session != NULL))
        return send_sealed(conn, end);
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

int
pf__output_flush(pf_conn *conn)
{
    for (size_t sent = 0;;) {
        size_t end = sendable(conn);
        if (conn->sent == end && conn->segments == NULL) {
            if (conn->sent == conn->out.len) {
                pf__buffer_release(&conn->loop->pool, &conn->out);
                conn->sent = 0;
            }
            return PF__OUTPUT_SENT;
        }
        if (sent >= SENDS_MAX) /* a fast reader of a large file */
            return PF__OUTPUT_MORE;
        ssize_t n = send_some(conn, end);
        if (n == -EAGAIN) {
            drop_sent(conn);
            return sent > 0 ? PF__OUTPUT_BLOCKED : PF__OUTPUT_STUCK;
        }
        if (n < 0)
            return (int)n;
        sent += (size_t)n;
        conn->loop->row->stats.bytes_out += (uint64_t)n;
        forget_sent(conn, (size_t)n);
    }
}

/* It goes before the head of an answer that is begun and not sealed. */
int
pf__output_insert(pf_conn *conn, const char *data, size_t len)
{
    size_t at = sendable(conn);
    pf__buffer *out = &conn->out;
    int rc = pf__buffer_reserve(&conn->loop->pool, out, len);
    if (rc < 0)
        return rc;
    memmove(out->data + at + len, out->data + at, out->len - at);
    memcpy(out->data + at, data, len);
    out->len += len;
    conn->request->answer.mark += len;
    return 0;
}

void
pf__output_drop(pf_conn *conn)
{
    drop_segments(conn);
    pf__buffer_release(&conn->loop->pool, &conn->out);
    conn->sent = 0;
}
