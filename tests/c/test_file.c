/* test_file.c - answers out of files: what the peer gets of them, and when they are
 * given back.
 */
#define _GNU_SOURCE
#undef NDEBUG
#include "live.h"

#include <fcntl.h>
#include <linux/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>

enum { SIZE = 1 << 20 };

static char bytes[SIZE]; /* of every file */
static char ref;         /* its address stands for the file */

static int
file_of(size_t len)
{
    int fd = memfd_create("file", MFD_CLOEXEC);
    assert(fd >= 0 && len <= SIZE && write(fd, bytes, len) == (ssize_t)len);
    return fd;
}

/* Sockets that hold little, so that a large answer takes many turns. */
static int
slow_peer_saying(const char *text)
{
    int small = 4096;
    setsockopt(listener, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    int peer = open_peer();
    setsockopt(peer, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    connect_peer(peer);
    say(peer, text);
    return peer;
}

static void
expect_released(void)
{
    pf_event event = next_event();
    assert(event.flags == PF_EVENT_RELEASED && event.user == &ref);
}

/* Hears len bytes that are those of the files from offset on; returns how many times
 * something was released meanwhile. */
static int
hear_file(int peer, size_t offset, size_t len)
{
    static char part[65536];
    int releases = 0;
    int64_t end = clock_ms() + SOON_MS;
    while (len > 0) {
        pf_event event;
        assert(clock_ms() < end);
        if (pf_loop_wait(loop, &event, 1, 0) == 1) {
            assert(event.flags == PF_EVENT_RELEASED && event.user == &ref);
            releases++;
        }
        ssize_t n =
            recv(peer, part, len < sizeof part ? len : sizeof part, MSG_DONTWAIT);
        assert(n > 0 || (n < 0 && errno == EAGAIN));
        if (n < 0)
            continue;
        assert(memcmp(part, bytes + offset % SIZE, (size_t)n) == 0);
        offset += (size_t)n;
        len -= (size_t)n;
    }
    return releases;
}

/* ---- what the peer gets -------------------------------------------------------------*/
static void
a_file_is_sent_behind_its_head_and_released(void)
{
    open_server(0);
    int fd = file_of(100), peer = peer_saying(GET GET);
    pf_request *r = next_request();
    begin(r, 100);
    assert(pf_request_write_file(r, fd, 0, 100, &ref) == 1);
    assert(pf_request_pending(r) > 100 && pf_request_end(r) == 0);
    r = next_request();
    answer(r, "x");
    expect_released();
    assert(says(hear_head(peer), "\r\nContent-Length: 100\r\n"));
    hear_file(peer, 0, 100);
    hear_answer(peer);
    assert(lseek(fd, 0, SEEK_CUR) == 100); /* its position is its owner's */
    close(peer);
    close(fd);
    close_server();
}

/* The first thing that can be read is all of it: not the head alone. */
static void
a_head_and_its_file_share_a_segment(void)
{
    open_server(0);
    int fd = file_of(100), peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 100);
    assert(pf_request_write_file(r, fd, 0, 100, &ref) == 1);
    size_t all = pf_request_pending(r);
    assert(pf_request_end(r) == 0);
    expect_released();
    struct tcp_info info;
    socklen_t len = sizeof info;
    assert(getsockopt(peer, IPPROTO_TCP, TCP_INFO, &info, &len) == 0);
    assert(info.tcpi_data_segs_in == 1);
    assert(recv(peer, heard, sizeof heard, 0) == (ssize_t)all);
    close(peer);
    close(fd);
    close_server();
}

static void
a_part_of_a_file_keeps_its_place_between_other_bytes(void)
{
    open_server(0);
    int fd = file_of(SIZE), peer = slow_peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 5 + 300000 + 20000 + 7 + 5);
    assert(pf_request_write(r, "hello", 5) == 0);
    assert(pf_request_write_file(r, fd, 1000, 300000, &ref) == 1);
    assert(pf_request_write_ref(r, bytes + 5, 20000, &ref) == 0);
    assert(pf_request_write_file(r, fd, 3, 7, &ref) == 1);
    assert(pf_request_write(r, "world", 5) == 0);
    assert(pf_request_end(r) == 0);
    hear_head(peer);
    assert(strcmp(hear_bytes(peer, 5), "hello") == 0);
    int releases = hear_file(peer, 1000, 300000);
    releases += hear_file(peer, 5, 20000);
    releases += hear_file(peer, 3, 7);
    for (; releases < 3; releases++)
        expect_released();
    assert(strcmp(hear_bytes(peer, 5), "world") == 0);
    close(peer);
    close(fd);
    close_server();
}

static void
a_file_in_chunks_is_one_chunk(void)
{
    open_server(0);
    int fd = file_of(70000), peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_write(r, "hello", 5) == 0);
    assert(pf_request_write_file(r, fd, 0, 70000, &ref) == 1);
    assert(pf_request_end(r) == 0);
    expect_released();
    assert(says(hear_head(peer), "\r\nTransfer-Encoding: chunked\r\n"));
    const char *before = "5\r\nhello\r\n11170\r\n", *after = "\r\n0\r\n\r\n";
    assert(strcmp(hear_bytes(peer, strlen(before)), before) == 0);
    hear_file(peer, 0, 70000);
    assert(strcmp(hear_bytes(peer, strlen(after)), after) == 0);
    close(peer);
    close(fd);
    close_server();
}

static void
what_has_no_body_borrows_no_file(void)
{
    open_server(0);
    int fd = file_of(100);
    int peer = peer_saying("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" GET GET);
    pf_request *r = next_request();
    begin(r, 100);
    assert(pf_request_write_file(r, fd, 0, 100, &ref) == 0);
    assert(pf_request_end(r) == 0); /* it was counted */
    r = next_request();
    assert(pf_request_begin(r, 304, -1) == 0);
    assert(pf_request_write_file(r, fd, 0, 100, &ref) == 0);
    assert(pf_request_end(r) == 0);
    r = next_request();
    begin(r, 0);
    assert(pf_request_write_file(r, fd, 100, 0, &ref) == 0);
    assert(pf_request_end(r) == 0);
    quiet(0);
    assert(says(hear_head(peer), "\r\nContent-Length: 100\r\n"));
    assert(says(hear_head(peer), " 304 "));
    assert(says(hear_head(peer), "\r\nContent-Length: 0\r\n"));
    close(peer);
    close(fd);
    close_server();
}

/* ---- what is refused ----------------------------------------------------------------*/
static void
more_of_a_file_than_was_announced_is_refused(void)
{
    open_server(0);
    int fd = file_of(100), peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 10);
    assert(pf_request_write_file(r, fd, 0, 11, &ref) == PF_ERR_APP_BODY_LONG);
    assert(pf_request_write_file(r, fd, 0, 10, &ref) == 1);
    assert(pf_request_write_file(r, fd, 0, 1, &ref) == PF_ERR_APP_BODY_LONG);
    assert(pf_request_end(r) == 0);
    expect_released();
    hear_head(peer);
    hear_file(peer, 0, 10);
    close(peer);
    close(fd);
    close_server();
}

/* Nothing was sent yet: another answer can be begun. */
static void
what_cannot_be_sent_is_told_before_the_head_is(void)
{
    int ends[2];
    open_server(0);
    assert(pipe(ends) == 0);
    int fd = file_of(100), peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, -1);
    assert(pf_request_write_file(r, fd, 0, 101, &ref) == PF_ERR_APP_FILE_SHORT);
    assert(pf_request_write_file(r, fd, 200, 1, &ref) == PF_ERR_APP_FILE_SHORT);
    assert(pf_request_write_file(r, fd, 1, UINT64_MAX, &ref) == PF_ERR_APP_FILE_SHORT);
    assert(pf_request_write_file(r, fd, -1, 1, &ref) == -EINVAL);
    assert(pf_request_write_file(r, ends[0], 0, 1, &ref) == -EINVAL);
    assert(pf_request_write_file(r, -1, 0, 1, &ref) == -EBADF);
    assert(!pf_request_begun(r) && pf_request_reset(r) == 0);
    answer(r, "x");
    hear_answer(peer);
    close(peer);
    close(fd);
    close(ends[0]);
    close(ends[1]);
    close_server();
}

/* ---- a slow reader ------------------------------------------------------------------*/
/* A file of many GiB that take no room on the disk. */
static void
a_huge_file_waits_in_the_file(void)
{
    const uint64_t huge = (uint64_t)5 << 30;
    open_server(0);
    int fd = file_of(SIZE), peer = slow_peer_saying(GET);
    assert(ftruncate(fd, (off_t)huge) == 0);
    pf_request *r = next_request();
    begin(r, (int64_t)huge);
    assert(pf_request_write_file(r, fd, 0, huge, &ref) == 1);
    assert(pf_request_want_room(r) == 0);
    quiet(0);
    assert(pf_request_pending(r) > huge - SIZE && stats().buffers_in_use <= 2);
    hear_head(peer);
    hear_file(peer, 0, 100000);
    assert(pf_request_abort(r) == 0);
    reset_peer(peer);
    expect_released();
    assert(stats().connections == 0);
    close(fd);
    close_server();
}

static void
room_is_told_when_little_of_a_file_is_left(void)
{
    open_server(0);
    int fd = file_of(500000), peer = slow_peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 500000 + 5);
    assert(pf_request_write_file(r, fd, 0, 500000, &ref) == 1);
    assert(pf_request_want_room(r) == 0);
    size_t got = 0;
    pf_event event = {0};
    for (int64_t end = clock_ms() + SOON_MS; event.flags != PF_EVENT_WRITABLE;) {
        ssize_t n = recv(peer, heard, sizeof heard, MSG_DONTWAIT);
        got += n > 0 ? (size_t)n : 0;
        pf_loop_wait(loop, &event, 1, 0);
        assert(clock_ms() < end);
    }
    assert(pf_request_pending(r) < PF__LOW_WATER && got > 300000);
    assert(pf_request_abort(r) == 0);
    reset_peer(peer);
    if (loop->borrowed + loop->nreleased > 0)
        expect_released();
    close(fd);
    close_server();
}

/* A reader that is as fast as we are would otherwise have the loop for itself. */
static void
a_fast_reader_of_a_large_file_does_not_keep_others_waiting(void)
{
    uint64_t size = (uint64_t)64 << 20;
    int large = 1 << 30;
    open_on(listen_unix());
    int fd = file_of(SIZE), peer = connected_peer();
    assert(ftruncate(fd, (off_t)size) == 0);
    say(peer, GET);
    pf_request *r = next_request();
    setsockopt(r->conn->source.fd, SOL_SOCKET, SO_SNDBUFFORCE, &large, sizeof large);
    begin(r, (int64_t)size);
    assert(pf_request_write_file(r, fd, 0, size, &ref) == 1);
    size_t before = pf_request_pending(r);
    pf_loop_flush(loop);
    assert(before - pf_request_pending(r) <= (5 << 20)); /* it is more than one turn */
    assert(pf_request_abort(r) == 0);
    reset_peer(peer);
    expect_released();
    close(fd);
    close_server();
}

static void
a_reader_of_a_file_that_stops_is_reset(void)
{
    char byte;
    int rc;
    options.write_timeout_ms = 100;
    open_server(PF_OPTION_NOTICES);
    int fd = file_of(SIZE), peer = slow_peer_saying(GET);
    pf_request *r = next_request();
    begin(r, SIZE);
    assert(pf_request_write_file(r, fd, 0, SIZE, &ref) == 1);
    assert(pf_request_end(r) == 0);
    for (pf_event event = {0}; event.flags != PF_EVENT_RELEASED;) {
        pf_notice notice;
        assert(pf_loop_wait(loop, &event, 1, SOON_MS) >= 0);
        while (pf_loop_notices(loop, &notice, 1) > 0)
            assert(notice.code == 0 || notice.code == PF_ERR_WRITE_TIMEOUT);
    }
    while ((rc = hear_byte(peer, &byte)) > 0)
        continue;
    assert(rc == -ECONNRESET);
    close(peer);
    close(fd);
    close_server();
}

/* ---- files that change, peers that leave --------------------------------------------*/
static bool
is_noticed(int code)
{
    pf_notice notice;
    bool found = false;
    while (pf_loop_notices(loop, &notice, 1) > 0)
        found |= notice.kind == PF_NOTICE_ERROR && notice.code == code;
    return found;
}

static void
a_file_that_has_become_shorter_resets_its_answer(void)
{
    char byte;
    int rc;
    open_server(PF_OPTION_NOTICES);
    int fd = file_of(SIZE), peer = peer_saying("GET / HTTP/1.0\r\n\r\n");
    pf_request *r = next_request();
    begin(r, -1); /* so its end would be that of the connection */
    assert(pf_request_write_file(r, fd, 0, SIZE, &ref) == 1);
    assert(ftruncate(fd, 1000) == 0);
    assert(pf_request_end(r) == 0);
    expect_released();
    assert(is_noticed(PF_ERR_APP_FILE_SHORT) && stats().connections == 0);
    while ((rc = hear_byte(peer, &byte)) > 0)
        continue;
    assert(rc == -ECONNRESET);
    close(peer);
    close(fd);
    close_server();
}

static void
a_file_that_has_become_shorter_is_told_to_its_holder(void)
{
    open_server(0);
    int fd = file_of(SIZE), peer = peer_saying(GET);
    pf_request *r = next_request();
    begin(r, SIZE);
    assert(pf_request_write_file(r, fd, 0, SIZE, &ref) == 1);
    assert(ftruncate(fd, 0) == 0);
    expect_released();
    expect_event(PF_EVENT_CLOSED, r);
    assert(pf_request_write_file(r, fd, 0, 1, &ref) == PF_ERR_CLOSED);
    assert(pf_request_end(r) == PF_ERR_CLOSED);
    close(peer);
    close(fd);
    close_server();
}

static void
a_peer_that_leaves_releases_its_files(void)
{
    open_server(0);
    int fd = file_of(SIZE), peer = slow_peer_saying(GET);
    pf_request *r = next_request();
    begin(r, 2 * SIZE);
    assert(pf_request_write_file(r, fd, 0, SIZE, &ref) == 1);
    assert(pf_request_write_file(r, fd, 0, SIZE, &ref) == 1);
    assert(pf_request_end(r) == 0);
    hear_head(peer);
    reset_peer(peer);
    expect_released();
    expect_released();
    assert(stats().connections == 0 && stats().buffers_in_use == 0);
    close(fd);
    close_server();
}

/* What comes behind its FIN makes the kernel say EPIPE, and send SIGPIPE. */
static void
a_peer_that_closes_orderly_releases_its_file(void)
{
    open_server(0);
    int fd = file_of(SIZE), peer = slow_peer_saying(GET);
    pf_request *r = next_request();
    begin(r, SIZE);
    assert(pf_request_write_file(r, fd, 0, SIZE, &ref) == 1);
    assert(pf_request_end(r) == 0);
    assert(shutdown(peer, SHUT_WR) == 0);
    hear_head(peer);
    close(peer);
    expect_released();
    turn_until(nobody_is_connected);
    close(fd);
    close_server();
}

static void
a_loop_that_closes_releases_its_files(void)
{
    void *refs[2];
    open_server(0);
    int fd = file_of(SIZE), peer = slow_peer_saying(GET);
    pf_request *r = next_request();
    begin(r, SIZE);
    assert(pf_request_write_file(r, fd, 0, SIZE, &ref) == 1);
    assert(pf_request_end(r) == 0);
    quiet(0);
    pf_loop_close(loop);
    assert(pf_loop_take_released(loop, refs, 2) == 1 && refs[0] == &ref);
    close(peer);
    close(fd);
    close_server();
}

int
main(void)
{
    signal(SIGPIPE, SIG_IGN);
    pf_options_init(&options);
    for (size_t i = 0; i < SIZE; i++)
        bytes[i] = (char)((i >> 8) * 31 + i);

    a_file_is_sent_behind_its_head_and_released();
    a_head_and_its_file_share_a_segment();
    a_part_of_a_file_keeps_its_place_between_other_bytes();
    a_file_in_chunks_is_one_chunk();
    what_has_no_body_borrows_no_file();

    more_of_a_file_than_was_announced_is_refused();
    what_cannot_be_sent_is_told_before_the_head_is();

    a_huge_file_waits_in_the_file();
    room_is_told_when_little_of_a_file_is_left();
    a_fast_reader_of_a_large_file_does_not_keep_others_waiting();
    a_reader_of_a_file_that_stops_is_reset();

    a_file_that_has_become_shorter_resets_its_answer();
    a_file_that_has_become_shorter_is_told_to_its_holder();
    a_peer_that_leaves_releases_its_files();
    a_peer_that_closes_orderly_releases_its_file();
    a_loop_that_closes_releases_its_files();
    return 0;
}
