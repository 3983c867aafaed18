/* test_spill.c - bodies that are too large to wait in memory, and the files that they
 * wait in. Each test of a server ends with as many descriptors as it began with.
 */
#define _GNU_SOURCE
#undef NDEBUG
#include "live.h"

#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

enum { LIMIT = 1000, SIZE = 3 << 20, MEMORY_MAX = 256 << 10 };

static char bytes[SIZE]; /* of every large body */
static int fds_before;

/* ---- file systems -------------------------------------------------------------------*/
static int unnamed_errno; /* of an open() with O_TMPFILE; 0: it may be tried */

int
open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;
    va_end(rest);
    if ((flags & O_TMPFILE) == O_TMPFILE && unnamed_errno != 0) {
        errno = unnamed_errno;
        return -1;
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static bool
holds(int fd, const char *data, size_t len)
{
    static char found[SIZE];
    struct stat file;
    assert(len <= SIZE && fstat(fd, &file) == 0);
    return (size_t)file.st_size == len && lseek(fd, 0, SEEK_CUR) == 0
           && pread(fd, found, len, 0) == (ssize_t)len && memcmp(found, data, len) == 0;
}

static void
expect_file_of_nobody_else(int fd)
{
    struct stat file;
    assert(fd >= 0 && fstat(fd, &file) == 0);
    assert(file.st_nlink == 0 && (file.st_mode & 07777) == 0600);
    assert(fcntl(fd, F_GETFD) == FD_CLOEXEC);
    assert(pf__spill_write(fd, "hello ", 6, 0) == 0);
    assert(pf__spill_write(fd, "world", 5, 6) == 0);
    assert(holds(fd, "hello world", 11));
    pf__spill_close(&fd);
    assert(fd == -1);
    pf__spill_close(&fd);
}

static void
a_file_has_no_name_and_is_written_from_its_beginning(void)
{
    expect_file_of_nobody_else(pf__spill_open("/tmp"));
}

static void
without_unnamed_files_one_loses_its_name_at_once(void)
{
    char dir[] = "/tmp/test_spill-XXXXXX";
    assert(mkdtemp(dir) != NULL);
    unnamed_errno = EOPNOTSUPP;
    expect_file_of_nobody_else(pf__spill_open(dir));
    assert(rmdir(dir) == 0); /* so it is empty */
    assert(pf__spill_open(dir) == -ENOENT);
    unnamed_errno = 0;
}

static void
what_keeps_a_file_from_being_made_is_told(void)
{
    assert(pf__spill_open("/nowhere") == -ENOENT);
    unnamed_errno = ENOSPC;
    assert(pf__spill_open("/tmp") == -ENOSPC);
    unnamed_errno = 0;
}

/* ---- a server that spills -----------------------------------------------------------*/
static int
count_fds(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static void
open_spilling(unsigned flags)
{
    fds_before = count_fds();
    options.body_buffer_size = LIMIT;
    open_server(flags);
}

static void
close_spilling(int peer)
{
    close(peer);
    turn_until(nobody_is_connected);
    close_server();
    assert(count_fds() == fds_before);
}

static void
say_head(int peer, const char *framing)
{
    say(peer, "POST / HTTP/1.1\r\nHost: a\r\n");
    say(peer, framing);
    say(peer, "\r\n\r\n");
}

static void
say_length(int peer, size_t len)
{
    char line[64];
    snprintf(line, sizeof line, "Content-Length: %zu", len);
    say_head(peer, line);
}

static size_t memory_max = MEMORY_MAX;

static size_t
memory_held(void)
{
    size_t most = 0;
    for (const pf_conn *conn = loop->conns; conn != NULL; conn = conn->next)
        most = conn->in.cap > most ? conn->in.cap : most;
    return most;
}

/* Says bytes[from .. to) while the loop turns; it holds little of them. */
static void
say_body(int peer, size_t from, size_t to)
{
    int64_t end = clock_ms() + SOON_MS;
    while (from < to) {
        ssize_t n = send(peer, bytes + from, to - from, MSG_NOSIGNAL | MSG_DONTWAIT);
        assert(n > 0 || (n < 0 && errno == EAGAIN));
        from += n > 0 ? (size_t)n : 0;
        if (from < to)
            quiet(0);
        assert(memory_held() <= memory_max && clock_ms() < end);
    }
}

static void
say_chunk(int peer, size_t from, size_t to)
{
    char line[64];
    snprintf(line, sizeof line, "%zx\r\n", to - from);
    say(peer, line);
    say_body(peer, from, to);
    say(peer, "\r\n");
}

static void
expect_spilled(const pf_request *r, const char *data, size_t len)
{
    assert(pf_request_body_done(r) && pf_request_body_size(r) == len);
    assert(body_is(r, "") && holds(pf_request_body_fd(r), data, len));
}

/* ---- gathered bodies ----------------------------------------------------------------*/
static void
a_body_within_the_limit_stays_in_memory(void)
{
    open_spilling(0);
    int peer = connected_peer();
    say_length(peer, LIMIT);
    say_body(peer, 0, LIMIT);
    pf_request *r = next_request();
    assert(pf_request_body_fd(r) == -1 && pf_request_take_body_fd(r) == -1);
    assert(pf_request_body_size(r) == LIMIT && pf_request_body(r).len == LIMIT);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
without_a_limit_every_body_stays_in_memory(void)
{
    open_spilling(0);
    loop->options.body_buffer_size = 0;
    int peer = connected_peer();
    say_length(peer, 100000);
    say_body(peer, 0, 100000);
    pf_request *r = next_request();
    assert(pf_request_body_fd(r) == -1 && pf_request_body(r).len == 100000);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
a_request_without_a_body_has_no_file(void)
{
    open_spilling(0);
    int peer = peer_saying(GET);
    pf_request *r = next_request();
    assert(pf_request_body_fd(r) == -1 && pf_request_body_size(r) == 0);
    answer(r, "x");
    close_spilling(peer);
}

static void
a_body_that_came_with_its_head_is_spilled_too(void)
{
    open_spilling(0);
    int peer = connected_peer();
    say_length(peer, LIMIT + 1);
    say_body(peer, 0, LIMIT + 1);
    pf_request *r = next_request();
    expect_spilled(r, bytes, LIMIT + 1);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
a_large_body_is_spilled_and_little_of_it_held(void)
{
    open_spilling(0);
    int peer = connected_peer();
    say_length(peer, SIZE);
    say_body(peer, 0, SIZE);
    pf_request *r = next_request();
    expect_spilled(r, bytes, SIZE);
    assert(memory_held() <= MEMORY_MAX);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
what_a_body_took_in_memory_is_given_back_when_it_is_spilled(void)
{
    open_spilling(0);
    loop->options.body_buffer_size = 1 << 20;
    int peer = connected_peer();
    say_length(peer, SIZE);
    memory_max = 4 << 20;
    say_body(peer, 0, SIZE);
    memory_max = MEMORY_MAX;
    pf_request *r = next_request();
    expect_spilled(r, bytes, SIZE);
    assert(memory_held() <= MEMORY_MAX);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
a_chunked_body_is_spilled_without_its_framing(void)
{
    open_spilling(0);
    int peer = connected_peer();
    say_head(peer, "Transfer-Encoding: chunked");
    size_t at = 0;
    for (size_t n = 1; at + n < SIZE - 10; at += n, n = n * 2 + 1)
        say_chunk(peer, at, at + n);
    say_chunk(peer, at, SIZE - 10);
    for (at = SIZE - 10; at < SIZE; at++) /* the tail comes in bits */
        say_chunk(peer, at, at + 1);
    say(peer, "0\r\nX: y\r\n\r\n");
    pf_request *r = next_request();
    expect_spilled(r, bytes, SIZE);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
what_is_pipelined_behind_a_spilled_body_is_the_next_request(void)
{
    open_spilling(0);
    int peer = connected_peer();
    say_length(peer, 5000);
    say_body(peer, 0, 5000);
    say(peer, POST_5 "hello" GET);
    pf_request *r = next_request();
    expect_spilled(r, bytes, 5000);
    answer(r, "x");
    r = next_request();
    assert(pf_request_body_fd(r) == -1 && body_is(r, "hello"));
    assert(pf_request_body_size(r) == 5);
    answer(r, "x");
    answer(next_request(), "x");
    for (int i = 0; i < 3; i++)
        hear_answer(peer);
    close_spilling(peer);
}

static void
a_file_that_is_taken_outlives_its_loan(void)
{
    open_spilling(0);
    int peer = connected_peer();
    say_length(peer, 5000);
    say_body(peer, 0, 5000);
    pf_request *r = next_request();
    int fd = pf_request_take_body_fd(r);
    assert(fd >= 0 && pf_request_take_body_fd(r) == -1);
    assert(pf_request_body_fd(r) == -1 && pf_request_body_size(r) == 5000);
    answer(r, "x");
    hear_answer(peer);
    assert(holds(fd, bytes, 5000));
    close(fd);
    close_spilling(peer);
}

/* ---- bodies that are wanted ---------------------------------------------------------*/
static void
a_body_wanted_whole_is_spilled(void)
{
    open_spilling(PF_OPTION_LEND_HEADS);
    int peer = connected_peer();
    say_length(peer, SIZE);
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    say_body(peer, 0, SIZE - 1);
    quiet(0);
    assert(pf_request_take_body_fd(r) == -1); /* it is not done */
    say_body(peer, SIZE - 1, SIZE);
    expect_event(PF_EVENT_BODY, r);
    expect_spilled(r, bytes, SIZE);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
a_streamed_body_is_not_spilled(void)
{
    open_spilling(PF_OPTION_LEND_HEADS);
    int peer = connected_peer();
    say_length(peer, 5000);
    say_body(peer, 0, 5000);
    pf_request *r = next_request();
    for (size_t at = 0; at < 5000;) {
        if (pf_request_body(r).len == 0) {
            assert(pf_request_want_body(r, PF_WANT_SOME) == 0);
            expect_event(PF_EVENT_BODY, r);
        }
        pf_slice body = pf_request_body(r);
        assert(body.len > 0 && memcmp(body.data, bytes + at, body.len) == 0);
        assert(pf_request_consume(r, body.len) == 0);
        at += body.len;
    }
    assert(pf_request_body_fd(r) == -1 && pf_request_body_size(r) == 0);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
what_was_consumed_before_is_not_in_the_file(void)
{
    open_spilling(PF_OPTION_LEND_HEADS);
    int peer = connected_peer();
    say_length(peer, 5000);
    say_body(peer, 0, 100);
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_SOME) == 0);
    expect_event(PF_EVENT_BODY, r);
    assert(pf_request_consume(r, 60) == 0);
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    say_body(peer, 100, 5000);
    expect_event(PF_EVENT_BODY, r);
    expect_spilled(r, bytes + 60, 4940);
    answer(r, "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
some_more_of_a_spilled_body_is_told_and_is_in_the_file(void)
{
    open_spilling(PF_OPTION_LEND_HEADS);
    int peer = connected_peer();
    say_length(peer, 5000);
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    say_body(peer, 0, 3000);
    quiet(0);
    while (pf_request_body_size(r) < 3000)
        quiet(5);
    assert(pf_request_want_body(r, PF_WANT_SOME) == 0);
    quiet(0);
    say_body(peer, 3000, 3010);
    expect_event(PF_EVENT_BODY, r);
    assert(pf_request_body_size(r) == 3010 && !pf_request_body_done(r));
    assert(body_is(r, "") && holds(pf_request_body_fd(r), bytes, 3010));
    answer(r, "x");
    close_spilling(peer);
}

/* ---- files that nobody takes --------------------------------------------------------*/
static int
peer_in_the_middle_of_a_body(void)
{
    int peer = connected_peer();
    say_length(peer, 10000);
    say_body(peer, 0, 5000);
    for (int64_t end = clock_ms() + SOON_MS;; quiet(5)) {
        pf_conn *conn = loop->conns;
        if (conn != NULL && conn->request != NULL && conn->request->body_fd >= 0)
            return peer;
        assert(clock_ms() < end);
    }
}

static void
a_body_that_ends_early_leaves_no_file(void)
{
    open_spilling(0);
    int peer = peer_in_the_middle_of_a_body();
    shutdown(peer, SHUT_WR);
    assert(strncmp(hear_answer(peer), "HTTP/1.1 400 ", 13) == 0);
    close_spilling(peer);
}

static void
a_peer_that_leaves_in_its_body_leaves_no_file(void)
{
    open_spilling(0);
    int before = count_fds(), peer = peer_in_the_middle_of_a_body();
    reset_peer(peer);
    turn_until(nobody_is_connected);
    assert(count_fds() == before);
    close_server();
    assert(count_fds() == fds_before);
}

static void
a_loop_that_closes_in_a_body_leaves_no_file(void)
{
    open_spilling(0);
    int peer = peer_in_the_middle_of_a_body();
    close(peer);
    pf_loop_close(loop);
    close_server();
    assert(count_fds() == fds_before);
}

static void
an_answer_in_the_middle_of_a_body_leaves_no_file(void)
{
    open_spilling(PF_OPTION_LEND_HEADS);
    int peer = connected_peer();
    say_length(peer, 10000);
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    say_body(peer, 0, 5000);
    while (pf_request_body_fd(r) < 0)
        quiet(5);
    int before = count_fds();
    answer(r, "x"); /* the rest of its body is dropped */
    assert(count_fds() == before - 1);
    say_body(peer, 5000, 10000);
    hear_answer(peer);
    say(peer, GET);
    answer(next_request(), "x");
    hear_answer(peer);
    close_spilling(peer);
}

static void
the_file_of_a_lost_peer_is_there_until_its_loan_ends(void)
{
    open_spilling(0);
    int peer = connected_peer();
    say_length(peer, 5000);
    say_body(peer, 0, 5000);
    pf_request *r = next_request();
    reset_peer(peer);
    expect_event(PF_EVENT_CLOSED, r);
    expect_spilled(r, bytes, 5000);
    answer_refused(r);
    close_server();
    assert(count_fds() == fds_before);
}

/* ---- files that cannot be made or written -------------------------------------------*/
static bool
is_noticed(int code)
{
    pf_notice notice;
    bool found = false;
    while (pf_loop_notices(loop, &notice, 1) > 0)
        found |= notice.kind == PF_NOTICE_ERROR && notice.code == code;
    return found;
}

/* A notice that nobody takes ends the wait: without events to expect, that is all. */
static void
expect_503(int peer)
{
    const char *head = hear_answer(peer);
    assert(strncmp(head, "HTTP/1.1 503 ", 13) == 0);
    assert(says(head, "\r\nConnection: close\r\n") && says(head, "\r\nRetry-After: "));
}

static void
without_a_directory_for_it_a_large_body_is_refused(void)
{
    options.spill_dir = "/nowhere";
    open_spilling(PF_OPTION_NOTICES);
    int peer = connected_peer();
    say_length(peer, 5000);
    say_body(peer, 0, 5000);
    expect_503(peer);
    assert(is_noticed(-ENOENT));
    close_spilling(peer);
}

static void
a_disk_that_is_full_refuses_the_rest_of_a_body(void)
{
    struct rlimit limit, little;
    assert(getrlimit(RLIMIT_FSIZE, &limit) == 0);
    little = (struct rlimit){.rlim_cur = 6000, .rlim_max = limit.rlim_max};
    open_spilling(PF_OPTION_NOTICES);
    int peer = peer_in_the_middle_of_a_body();
    assert(setrlimit(RLIMIT_FSIZE, &little) == 0);
    say_body(peer, 5000, 10000);
    expect_503(peer);
    assert(is_noticed(-EFBIG));
    assert(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    close_spilling(peer);
}

static void
a_holder_is_told_that_its_body_could_not_be_stored(void)
{
    options.spill_dir = "/nowhere";
    open_spilling(PF_OPTION_LEND_HEADS);
    int peer = connected_peer();
    say_length(peer, 5000);
    pf_request *r = next_request();
    assert(pf_request_want_body(r, PF_WANT_WHOLE) == 0);
    say_body(peer, 0, 5000);
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_CLOSED && event.request == r);
    assert(event.code == PF_ERR_BODY_STORE && pf_request_body_fd(r) == -1);
    assert(pf_request_refuse(r, event.code) == 0);
    expect_503(peer);
    close_spilling(peer);
}

static void
a_request_whose_body_could_not_be_stored_can_be_lent(void)
{
    options.spill_dir = "/nowhere";
    open_spilling(PF_OPTION_LEND_REFUSED);
    int peer = connected_peer();
    say_length(peer, 5000);
    say_body(peer, 0, 5000);
    pf_event event = next_event();
    assert(event.flags == (PF_EVENT_REQUEST | PF_EVENT_REFUSED));
    assert(event.code == PF_ERR_BODY_STORE);
    answer(event.request, "x");
    assert(says(hear_answer(peer), "\r\nConnection: close\r\n"));
    close_spilling(peer);
}

int
main(void)
{
    signal(SIGXFSZ, SIG_IGN);
    pf_options_init(&options);
    for (size_t i = 0; i < SIZE; i++)
        bytes[i] = (char)((i >> 8) * 31 + i);

    a_file_has_no_name_and_is_written_from_its_beginning();
    without_unnamed_files_one_loses_its_name_at_once();
    what_keeps_a_file_from_being_made_is_told();

    a_body_within_the_limit_stays_in_memory();
    without_a_limit_every_body_stays_in_memory();
    a_request_without_a_body_has_no_file();
    a_body_that_came_with_its_head_is_spilled_too();
    a_large_body_is_spilled_and_little_of_it_held();
    what_a_body_took_in_memory_is_given_back_when_it_is_spilled();
    a_chunked_body_is_spilled_without_its_framing();
    what_is_pipelined_behind_a_spilled_body_is_the_next_request();
    a_file_that_is_taken_outlives_its_loan();

    a_body_wanted_whole_is_spilled();
    a_streamed_body_is_not_spilled();
    what_was_consumed_before_is_not_in_the_file();
    some_more_of_a_spilled_body_is_told_and_is_in_the_file();

    a_body_that_ends_early_leaves_no_file();
    a_peer_that_leaves_in_its_body_leaves_no_file();
    a_loop_that_closes_in_a_body_leaves_no_file();
    an_answer_in_the_middle_of_a_body_leaves_no_file();
    the_file_of_a_lost_peer_is_there_until_its_loan_ends();

    without_a_directory_for_it_a_large_body_is_refused();
    a_disk_that_is_full_refuses_the_rest_of_a_body();
    a_holder_is_told_that_its_body_could_not_be_stored();
    a_request_whose_body_could_not_be_stored_can_be_lent();
    return 0;
}
