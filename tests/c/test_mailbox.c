/* test_mailbox.c - what reaches a worker through its mailbox. */
#define _GNU_SOURCE
#undef NDEBUG
#include "internal.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

static pf_scoreboard *board;
static pf_loop *loop;
static int row;

static void
open_worker(void)
{
    pf_options options;
    pf_options_init(&options);
    assert(pf_scoreboard_open(&board, 4) == 0);
    row = pf_scoreboard_claim(board, 0, 1);
    assert(row >= 0);
    assert(pf_loop_open(&loop, &options) == 0);
    assert(pf_loop_attach(loop, board, row) == 0);
}

static void
close_worker(void)
{
    pf_loop_close(loop);
    assert(pf_loop_free(loop) == 0);
    pf_scoreboard_close(board);
}

static int
listen_tcp(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert(fd >= 0 && bind(fd, (struct sockaddr *)&at, sizeof at) == 0);
    assert(listen(fd, 64) == 0);
    return fd;
}

static int
connected_peer(int listener)
{
    struct sockaddr_in at;
    socklen_t len = sizeof at;
    assert(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(fd >= 0 && connect(fd, (struct sockaddr *)&at, len) == 0);
    return fd;
}

/* A turn that brings nothing to the caller. */
static void
quiet(void)
{
    pf_event event;
    assert(pf_loop_wait(loop, &event, 1, 0) == 0);
}

/* ---- listeners of vacant slots ------------------------------------------------------*/
static void
an_adopted_listener_is_accepted_from_until_it_is_released(void)
{
    open_worker();
    int listener = listen_tcp();
    assert(pf_scoreboard_adopt(board, row, 7, listener) == 0);
    quiet();
    int served = connected_peer(listener);
    quiet();
    assert(loop->row->stats.accepted == 1);
    assert(pf_scoreboard_release(board, row, 7) == 0);
    quiet();
    int waiting = connected_peer(listener);
    quiet();
    assert(loop->row->stats.accepted == 1);
    close(served);
    close(waiting);
    close(listener);
    close_worker();
}

/* The letter and the connection are told by the poller in one batch, in this order. */
static void
a_listener_may_be_released_just_when_somebody_connects(void)
{
    open_worker();
    int listener = listen_tcp();
    assert(pf_scoreboard_adopt(board, row, 7, listener) == 0);
    quiet();
    assert(pf_scoreboard_release(board, row, 7) == 0);
    int peer = connected_peer(listener);
    quiet();
    assert(loop->listeners == NULL && loop->row->stats.accepted == 1);
    close(peer);
    close(listener);
    close_worker();
}

int
main(void)
{
    an_adopted_listener_is_accepted_from_until_it_is_released();
    a_listener_may_be_released_just_when_somebody_connects();
}
