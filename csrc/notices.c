/* notices.c - what happened to connections, for who wants to know.
 *
 * They are kept until pf_loop_notices() takes them out, and only if the loop was opened
 * with PF_OPTION_NOTICES.
 */
#include "internal.h"

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
pf__notices_append(pf_loop *loop, const pf_conn *conn, int kind, int code)
{
    pf__notices *notices = &loop->notices;
    if (notices->first + notices->count == notices->cap && !grow_notices(notices))
        return;
    pf_notice *notice = &notices->list[notices->first + notices->count++];
    *notice = (pf_notice){
        .connection = conn->id, .kind = kind, .code = code, .peer = conn->peer};
    if (kind == PF_NOTICE_ERROR && conn->session != NULL)
        notice->reason = pf__session_reason(conn->session);
}
