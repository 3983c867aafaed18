/* test_socket.c - listeners, against the kernel itself. */
#define _GNU_SOURCE
#undef NDEBUG
#include "prefork.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { SOON_MS = 5000, NEVER_MS = 50 };

static pf_socket_spec
tcp(int family, const char *host, int port, unsigned flags)
{
    return (pf_socket_spec){
        .family = family,
        .host = host,
        .port = (uint16_t)port,
        .backlog = 16,
        .mode = -1,
        .flags = flags,
    };
}

static int
listen_tcp(int family, const char *host, int port, unsigned flags)
{
    pf_socket_spec spec = tcp(family, host, port, flags);
    return pf_socket_listen(&spec);
}

static int
listen_unix(const char *path, int mode)
{
    pf_socket_spec spec = {
        .family = AF_UNIX, .host = path, .backlog = 16, .mode = mode};
    return pf_socket_listen(&spec);
}

static int
port_of(int fd)
{
    struct sockaddr_storage name;
    socklen_t len = sizeof name;

    assert(getsockname(fd, (struct sockaddr *)&name, &len) == 0);
    if (name.ss_family == AF_INET6)
        return ntohs(((struct sockaddr_in6 *)&name)->sin6_port);
    return ntohs(((struct sockaddr_in *)&name)->sin_port);
}

static int
option_of(int fd, int level, int name)
{
    int value = -1;
    socklen_t len = sizeof value;

    assert(getsockopt(fd, level, name, &value, &len) == 0);
    return value;
}

/* A non-blocking connect to 127.0.0.1; the fd. */
static int
begin_connect(int port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    assert(fd >= 0);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert(connect(fd, (struct sockaddr *)&to, sizeof to) == 0 || errno == EINPROGRESS);
    return fd;
}

static bool
wait_for(int fd, short events, int timeout_ms)
{
    struct pollfd pfd = {.fd = fd, .events = events};
    int rc = poll(&pfd, 1, timeout_ms);

    assert(rc >= 0);
    return rc == 1;
}

static bool
connected(int fd, int timeout_ms)
{
    return wait_for(fd, POLLOUT, timeout_ms)
           && option_of(fd, SOL_SOCKET, SO_ERROR) == 0;
}

static int
accept_soon(int fd)
{
    assert(wait_for(fd, POLLIN, SOON_MS));
    int conn = accept(fd, NULL, NULL);
    assert(conn >= 0);
    return conn;
}

/* ---- TCP ---------------------------------------------------------------------------*/

static void
a_listener_accepts_and_neither_blocks_nor_outlives_exec(void)
{
    int fd = listen_tcp(AF_INET, "127.0.0.1", 0, 0);
    assert(fd >= 0);
    assert(pf_socket_check(fd) == 0);
    assert(fcntl(fd, F_GETFL) & O_NONBLOCK);
    assert(fcntl(fd, F_GETFD) & FD_CLOEXEC);

    int peer = begin_connect(port_of(fd));
    int conn = accept_soon(fd);
    assert(option_of(conn, IPPROTO_TCP, TCP_NODELAY) == 1);
    close(conn);
    close(peer);
    close(fd);
}

static void
a_port_in_use_is_refused_but_shared_with_reuseport(void)
{
    int first = listen_tcp(AF_INET, "127.0.0.1", 0, PF_SOCKET_REUSEPORT);
    int port = port_of(first);
    int second = listen_tcp(AF_INET, "127.0.0.1", port, PF_SOCKET_REUSEPORT);

    assert(second >= 0 && port_of(second) == port);
    assert(listen_tcp(AF_INET, "127.0.0.1", port, 0) == -EADDRINUSE);
    close(first);
    close(second);
}

static void
a_port_can_be_listened_on_again_at_once(void)
{
    int fd = listen_tcp(AF_INET, "127.0.0.1", 0, 0);
    int port = port_of(fd);
    int peer = begin_connect(port);
    int conn = accept_soon(fd);

    close(conn); /* first, so that our side is the one in TIME_WAIT */
    close(fd);
    fd = listen_tcp(AF_INET, "127.0.0.1", port, 0);
    assert(fd >= 0);
    close(peer);
    close(fd);
}

static void
an_ipv6_listener_is_dual_stack_unless_told_otherwise(void)
{
    int both = listen_tcp(AF_INET6, "::", 0, 0);
    if (both == -EAFNOSUPPORT || both == -EADDRNOTAVAIL)
        return; /* a machine without IPv6 */
    assert(both >= 0);
    int peer = begin_connect(port_of(both));
    close(accept_soon(both));
    close(peer);
    close(both);

    int only = listen_tcp(AF_INET6, "::", 0, PF_SOCKET_V6ONLY);
    assert(option_of(only, IPPROTO_IPV6, IPV6_V6ONLY) == 1);
    peer = begin_connect(port_of(only));
    assert(!connected(peer, SOON_MS));
    close(peer);
    close(only);
}

static void
a_wrong_address_is_refused(void)
{
    assert(listen_tcp(AF_INET, "localhost", 0, 0) == -EINVAL);
    assert(listen_tcp(AF_INET, "", 0, 0) == -EINVAL);
    assert(listen_tcp(AF_INET6, "127.0.0.1", 0, 0) == -EINVAL);
    assert(listen_tcp(AF_INET6, "fe80::1%no-such-interface", 0, 0) == -ENODEV);
    assert(listen_tcp(AF_APPLETALK, "1", 0, 0) == -EAFNOSUPPORT);
    assert(listen_tcp(AF_INET, "192.0.2.1", 0, 0) == -EADDRNOTAVAIL);
}

static void
options_of_the_listener_are_set(void)
{
    int fd = listen_tcp(AF_INET, "127.0.0.1", 0,
                        PF_SOCKET_DEFER_ACCEPT | PF_SOCKET_FAST_OPEN);
    assert(fd >= 0);
    assert(option_of(fd, IPPROTO_TCP, TCP_DEFER_ACCEPT) > 0);
    assert(option_of(fd, IPPROTO_TCP, TCP_FASTOPEN) > 0);
    close(fd);
}

static void
check_knows_a_listener_from_everything_else(void)
{
    int pair[2];
    int idle = socket(AF_INET, SOCK_STREAM, 0);
    int datagram = socket(AF_INET, SOCK_DGRAM, 0);

    assert(pf_socket_check(idle) == -EINVAL);
    assert(pf_socket_check(datagram) == -EINVAL);
    assert(pipe(pair) == 0);
    assert(pf_socket_check(pair[0]) == -ENOTSOCK);
    close(pair[0]);
    close(pair[1]);
    close(idle);
    close(datagram);
    assert(pf_socket_check(datagram) == -EBADF);
}

/* ---- Quiesce -----------------------------------------------------------------------*/

static void
no_handshake_begins_after_quiesce_and_the_queue_stays(void)
{
    int fd = listen_tcp(AF_INET, "127.0.0.1", 0, 0);
    int before = begin_connect(port_of(fd));

    assert(connected(before, SOON_MS));
    assert(pf_socket_quiesce(fd) == 0);
    int after = begin_connect(port_of(fd));
    assert(!connected(after, NEVER_MS));
    int conn = accept_soon(fd);
    assert(accept(fd, NULL, NULL) < 0 && errno == EAGAIN);

    char byte = 0; /* the accepted connection is none the worse for it */
    assert(write(before, "a", 1) == 1);
    assert(wait_for(conn, POLLIN, SOON_MS) && read(conn, &byte, 1) == 1 && byte == 'a');
    close(conn);
    close(before);
    close(after);
    close(fd);
}

/* With TCP_DEFER_ACCEPT the server's side stays in SYN_RECV until the first bytes. */
static void
a_handshake_begun_before_quiesce_completes(void)
{
    int fd = listen_tcp(AF_INET, "127.0.0.1", 0, PF_SOCKET_DEFER_ACCEPT);
    int peer = begin_connect(port_of(fd));

    assert(connected(peer, SOON_MS));
    assert(!wait_for(fd, POLLIN, 0));
    assert(pf_socket_quiesce(fd) == 0);
    assert(write(peer, "a", 1) == 1);
    close(accept_soon(fd));
    close(peer);
    close(fd);
}

static void
quiesce_of_one_reuseport_socket_leaves_the_others_alone(void)
{
    int first = listen_tcp(AF_INET, "127.0.0.1", 0, PF_SOCKET_REUSEPORT);
    int port = port_of(first);
    int second = listen_tcp(AF_INET, "127.0.0.1", port, PF_SOCKET_REUSEPORT);
    int peers[16], landed = 0;

    assert(pf_socket_quiesce(first) == 0);
    for (int i = 0; i < 16; i++)
        peers[i] = begin_connect(port);
    while (wait_for(second, POLLIN, NEVER_MS)) {
        close(accept_soon(second));
        landed++;
    }
    assert(landed > 0 && accept(first, NULL, NULL) < 0);
    for (int i = 0; i < 16; i++)
        close(peers[i]);
    close(first);
    close(second);
}

static void
quiesce_refuses_what_is_no_socket(void)
{
    assert(pf_socket_quiesce(-1) == -EBADF);
    assert(pf_socket_quiesce(STDIN_FILENO) < 0);
}

/* ---- Unix --------------------------------------------------------------------------*/

static char directory[] = "/tmp/prefork-test-socket-XXXXXX";

static const char *
path_of(const char *name)
{
    static char path[sizeof directory + 32];

    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static int
connect_unix(const char *path)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(to.sun_path, sizeof to.sun_path, "%s", path);
    assert(connect(fd, (struct sockaddr *)&to, sizeof to) == 0);
    return fd;
}

static void
a_unix_listener_has_the_permissions_asked_for(void)
{
    const char *path = path_of("mode");
    struct stat st;
    int fd = listen_unix(path, 0600);

    assert(fd >= 0 && pf_socket_check(fd) == 0);
    assert(stat(path, &st) == 0 && (st.st_mode & 0777) == 0600);
    int peer = connect_unix(path);
    close(accept_soon(fd));
    assert(pf_socket_quiesce(fd) == 0); /* the file is the caller's */
    assert(stat(path, &st) == 0);
    close(peer);
    close(fd);
    unlink(path);
}

static void
a_stale_unix_socket_is_replaced(void)
{
    const char *path = path_of("stale");
    int fd = listen_unix(path, -1);

    close(fd); /* the file stays, as after a crash */
    fd = listen_unix(path, -1);
    assert(fd >= 0);
    close(connect_unix(path));
    close(fd);
    unlink(path);
}

static void
a_unix_socket_in_use_is_not_replaced(void)
{
    const char *path = path_of("alive");
    int fd = listen_unix(path, -1);

    assert(listen_unix(path, -1) == -EADDRINUSE);
    close(connect_unix(path));
    close(fd);
    unlink(path);
}

static void
a_file_that_is_no_socket_is_not_replaced(void)
{
    const char *path = path_of("file");
    struct stat st;

    close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    assert(listen_unix(path, -1) == -EADDRINUSE);
    assert(stat(path, &st) == 0 && S_ISREG(st.st_mode));
    unlink(path);
}

static void
nothing_is_replaced_while_another_server_is_about_to(void)
{
    const char *path = path_of("race");
    int fd = listen_unix(path, -1);
    int lock = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    close(fd);
    assert(flock(lock, LOCK_EX) == 0);
    assert(listen_unix(path, -1) == -EADDRINUSE);
    close(lock);
    fd = listen_unix(path, -1);
    assert(fd >= 0);
    close(fd);
    unlink(path);
}

static void
a_wrong_path_is_refused(void)
{
    char path[256];

    memset(path, 'a', sizeof path);
    path[sizeof path - 1] = '\0';
    assert(listen_unix(path, -1) == -ENAMETOOLONG);
    assert(listen_unix("", -1) == -EINVAL);
    assert(listen_unix(path_of("no/such"), -1) == -ENOENT);
}

int
main(void)
{
    assert(mkdtemp(directory));
    a_listener_accepts_and_neither_blocks_nor_outlives_exec();
    a_port_in_use_is_refused_but_shared_with_reuseport();
    a_port_can_be_listened_on_again_at_once();
    an_ipv6_listener_is_dual_stack_unless_told_otherwise();
    a_wrong_address_is_refused();
    options_of_the_listener_are_set();
    check_knows_a_listener_from_everything_else();
    no_handshake_begins_after_quiesce_and_the_queue_stays();
    a_handshake_begun_before_quiesce_completes();
    quiesce_of_one_reuseport_socket_leaves_the_others_alone();
    quiesce_refuses_what_is_no_socket();
    a_unix_listener_has_the_permissions_asked_for();
    a_stale_unix_socket_is_replaced();
    a_unix_socket_in_use_is_not_replaced();
    a_file_that_is_no_socket_is_not_replaced();
    nothing_is_replaced_while_another_server_is_about_to();
    a_wrong_path_is_refused();
    assert(rmdir(directory) == 0);
    return 0;
}
