/* mailbox.c - descriptors handed from process to process.
 *
 * Every worker has a datagram socket. A worker that has accepted more than its share
 * sends connections there, and the master sends the listener of a slot whose worker is
 * gone, so that its queue is served meanwhile. The kernel gives the socket an abstract
 * name of its own choosing, which the worker's row tells the others; anybody on the
 * machine could write to such a name, so a letter counts only if the kernel says that
 * it comes from a process of our user.
 */
#include "internal.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int
remember_name(int fd, pf_row *row)
{
    struct sockaddr_un name;
    socklen_t len = sizeof name;
    if (getsockname(fd, (struct sockaddr *)&name, &len) < 0)
        return -errno;
    size_t n = len - offsetof(struct sockaddr_un, sun_path);
    if (n == 0 || n > sizeof row->mailbox)
        return -ENAMETOOLONG;
    memcpy(row->mailbox, name.sun_path, n);
    row->mailbox_len = (uint8_t)n;
    return 0;
}

static int
bind_anywhere(int fd, pf_row *row)
{
    struct sockaddr_un autobind = {.sun_family = AF_UNIX};
    int on = 1;
    if (setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0
        || bind(fd, (struct sockaddr *)&autobind, sizeof(sa_family_t)) < 0)
        return -errno;
    return remember_name(fd, row);
}

int
pf__mailbox_open(pf_row *row)
{
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    int rc = bind_anywhere(fd, row);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    return fd;
}

/* ---- letters ------------------------------------------------------------------------*/
typedef union control {
    struct cmsghdr align;
    char room[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int))];
} control;

static void
enclose(struct msghdr *message, control *c, int fd)
{
    message->msg_control = c;
    message->msg_controllen = CMSG_SPACE(sizeof fd);
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(message);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(cmsg), &fd, sizeof fd);
}

static int
post(int from, struct msghdr *message)
{
    int fd = from >= 0 ? from : socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    ssize_t n;
    do
        n = sendmsg(fd, message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    int rc = n < 0 ? -errno : 0;
    if (from < 0)
        close(fd);
    return rc;
}

int
pf__mailbox_send(int from, const pf_row *to, const pf__mail *mail, int fd)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    size_t len = to->mailbox_len;
    if (len == 0 || len > sizeof to->mailbox)
        return -ECONNREFUSED;
    memcpy(name.sun_path, to->mailbox, len);
    struct iovec iov = {.iov_base = (void *)(uintptr_t)mail, .iov_len = sizeof *mail};
    struct msghdr message = {
        .msg_name = &name,
        .msg_namelen = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len),
        .msg_iov = &iov,
        .msg_iovlen = 1};
    control c = {0};
    if (fd >= 0)
        enclose(&message, &c, fd);
    return post(from, &message);
}

/* The first descriptor is the letter's; more, for which the padding of our room has
 * place, are ours to close: whoever sends them is not asked first. */
static void
keep_first(const struct cmsghdr *c, int *passed)
{
    size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < n; i++) {
        int fd;
        memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
        if (*passed < 0)
            *passed = fd;
        else
            close(fd);
    }
}

/* What came with a letter: who sent it, and a descriptor that is ours from now on. */
static bool
open_enclosures(struct msghdr *message, int *passed)
{
    bool trusted = false;
    *passed = -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level != SOL_SOCKET)
            continue;
        if (c->cmsg_type == SCM_CREDENTIALS) {
            struct ucred sender;
            memcpy(&sender, CMSG_DATA(c), sizeof sender);
            trusted = sender.uid == geteuid() || sender.uid == 0;
        } else if (c->cmsg_type == SCM_RIGHTS) {
            keep_first(c, passed);
        }
    }
    return trusted;
}

int
pf__mailbox_receive(int fd, pf__mail *mail, int *passed)
{
    for (;;) {
        control c = {0};
        struct iovec iov = {.iov_base = mail, .iov_len = sizeof *mail};
        struct msghdr message = {.msg_iov = &iov,
                                 .msg_iovlen = 1,
                                 .msg_control = &c,
                                 .msg_controllen = sizeof c};
        ssize_t n = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? 0 : -errno;
        bool trusted = open_enclosures(&message, passed);
        if (trusted && n == sizeof *mail && !(message.msg_flags & MSG_TRUNC))
            return 1;
        if (*passed >= 0)
            close(*passed);
    }
}
