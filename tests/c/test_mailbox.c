/* test_mailbox.c - what reaches a worker through its mailbox, from friends and others. */
#define _GNU_SOURCE
#undef NDEBUG
#include "internal.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
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

static int
open_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int n = 0;
    assert(dir != NULL);
    while (readdir(dir) != NULL)
        n++;
    closedir(dir);
    return n;
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

/* The loop's own thread may be about to handle a batch that names the listener. */
static void *
borrow_and_poll(void *unused)
{
    (void)unused;
    pf_event event;
    while (!pf_loop_borrow(loop))
        sched_yield();
    assert(pf_scoreboard_release(board, row, 7) == 0);
    assert(!pf_loop_poll(loop, &event));
    assert(loop->listeners != NULL);
    pf_loop_return(loop);
    return NULL;
}

static void
a_listener_is_released_by_the_loops_own_thread(void)
{
    open_worker();
    pf_loop_share(loop);
    int listener = listen_tcp();
    assert(pf_scoreboard_adopt(board, row, 7, listener) == 0);
    quiet();
    pthread_t borrower;
    assert(pthread_create(&borrower, NULL, borrow_and_poll, NULL) == 0);
    pf_event event;
    while (loop->listeners != NULL)
        assert(pf_loop_wait(loop, &event, 1, 5) == 0);
    pthread_join(borrower, NULL);
    close(listener);
    close_worker();
}

/* ---- letters of others --------------------------------------------------------------*/
/* As many descriptors as the receiver takes, by somebody who is not us. */
static void
send_descriptors(int n)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    size_t len = loop->row->mailbox_len;
    memcpy(name.sun_path, loop->row->mailbox, len);
    pf__mail mail = {.kind = PF__MAIL_ADOPT};
    struct iovec iov = {.iov_base = &mail, .iov_len = sizeof mail};
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(8 * sizeof(int))];
    } control = {0};
    struct msghdr message = {
        .msg_name = &name,
        .msg_namelen = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len),
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = CMSG_SPACE((size_t)n * sizeof(int))};
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN((size_t)n * sizeof(int));
    for (int i = 0; i < n; i++)
        memcpy(CMSG_DATA(cmsg) + (size_t)i * sizeof(int), &(int){STDIN_FILENO},
               sizeof(int));
    int from = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert(from >= 0 && sendmsg(from, &message, 0) == sizeof mail);
    close(from);
}

static void
no_descriptor_of_a_letter_that_holds_too_many_is_kept(void)
{
    open_worker();
    int before = open_descriptors();
    for (int n = 2; n <= 8; n++)
        send_descriptors(n);
    quiet();
    assert(open_descriptors() == before && loop->listeners == NULL);
    close_worker();
}

/* Where we are root, another user can be had. */
static void
no_descriptor_of_another_user_is_kept(void)
{
    if (geteuid() != 0)
        return;
    open_worker();
    int before = open_descriptors();
    pid_t pid = fork();
    if (pid == 0) {
        assert(setuid(65534) == 0);
        for (int n = 1; n <= 3; n++)
            send_descriptors(n);
        _exit(0);
    }
    int status;
    assert(waitpid(pid, &status, 0) == pid && status == 0);
    quiet();
    assert(open_descriptors() == before && loop->listeners == NULL);
    close_worker();
}

int
main(void)
{
    an_adopted_listener_is_accepted_from_until_it_is_released();
    a_listener_may_be_released_just_when_somebody_connects();
    a_listener_is_released_by_the_loops_own_thread();
    no_descriptor_of_a_letter_that_holds_too_many_is_kept();
    no_descriptor_of_another_user_is_kept();
}
