/* socket.c - listening sockets: TCP over IPv4 and IPv6, and unix.
 *
 * A listener is made in one go: socket, options, bind, listen. What accepted sockets
 * inherit from their listener on Linux (TCP_NODELAY) is set here once, not for every
 * connection.
 *
 * A unix socket outlives its process as a file, so bind() finds the name taken after a
 * crash. The file is replaced only if it is a socket on which nobody listens, that is,
 * if connecting is refused. Two servers that start at the same moment must not take
 * each other's fresh socket for a stale one: a socket that is bound but does not listen
 * yet refuses connections too. So bind and listen, and the look at a file in the way,
 * happen under a lock of the directory. If the lock is taken (we never wait for it),
 * nothing is replaced and the name counts as in use.
 */
#define _GNU_SOURCE
#include "prefork.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef SO_DETACH_REUSEPORT_BPF
#define SO_DETACH_REUSEPORT_BPF 68
#endif

typedef struct address {
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_un un;
    };
    socklen_t len;
} address;

static int
open_socket(int family)
{
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    return fd < 0 ? -errno : fd;
}

static int
set_option(int fd, int level, int name, int value)
{
    return setsockopt(fd, level, name, &value, sizeof value) < 0 ? -errno : 0;
}

static int
get_option(int fd, int name, int *value)
{
    socklen_t len = sizeof *value;
    return getsockopt(fd, SOL_SOCKET, name, value, &len) < 0 ? -errno : 0;
}

/* ---- Addresses ---------------------------------------------------------------------*/

static int
address_v4(address *out, const pf_socket_spec *spec)
{
    out->len = sizeof out->v4;
    out->v4.sin_family = AF_INET;
    out->v4.sin_port = htons(spec->port);
    return inet_pton(AF_INET, spec->host, &out->v4.sin_addr) == 1 ? 0 : -EINVAL;
}

/* A link-local address names its interface: fe80::1%eth0. */
static int
address_v6(address *out, const pf_socket_spec *spec)
{
    char host[INET6_ADDRSTRLEN];
    const char *scope = strchr(spec->host, '%');
    size_t len = scope ? (size_t)(scope - spec->host) : strlen(spec->host);

    if (len >= sizeof host)
        return -EINVAL;
    memcpy(host, spec->host, len);
    host[len] = '\0';
    out->len = sizeof out->v6;
    out->v6.sin6_family = AF_INET6;
    out->v6.sin6_port = htons(spec->port);
    if (inet_pton(AF_INET6, host, &out->v6.sin6_addr) != 1)
        return -EINVAL;
    if (scope && !(out->v6.sin6_scope_id = if_nametoindex(scope + 1)))
        return -ENODEV;
    return 0;
}

static int
address_unix(address *out, const pf_socket_spec *spec)
{
    size_t len = strlen(spec->host);

    if (len == 0)
        return -EINVAL;
    if (len >= sizeof out->un.sun_path)
        return -ENAMETOOLONG;
    out->un.sun_family = AF_UNIX;
    memcpy(out->un.sun_path, spec->host, len + 1);
    out->len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len + 1);
    return 0;
}

static int
address_of(address *out, const pf_socket_spec *spec)
{
    memset(out, 0, sizeof *out);
    switch (spec->family) {
    case AF_INET:
        return address_v4(out, spec);
    case AF_INET6:
        return address_v6(out, spec);
    case AF_UNIX:
        return address_unix(out, spec);
    default:
        return -EAFNOSUPPORT;
    }
}

/* ---- TCP ---------------------------------------------------------------------------*/

enum { DEFER_ACCEPT_SECONDS = 1, FAST_OPEN_QUEUE = 256 };

static int
set_tcp_options(int fd, const pf_socket_spec *spec)
{
    const struct {
        bool wanted;
        int level, name, value;
    } options[] = {
        {true, SOL_SOCKET, SO_REUSEADDR, 1},
        {spec->flags & PF_SOCKET_REUSEPORT, SOL_SOCKET, SO_REUSEPORT, 1},
        {spec->family == AF_INET6, IPPROTO_IPV6, IPV6_V6ONLY,
         !!(spec->flags & PF_SOCKET_V6ONLY)},
        {true, IPPROTO_TCP, TCP_NODELAY, 1},
        {spec->flags & PF_SOCKET_DEFER_ACCEPT, IPPROTO_TCP, TCP_DEFER_ACCEPT,
         DEFER_ACCEPT_SECONDS},
        {spec->flags & PF_SOCKET_FAST_OPEN, IPPROTO_TCP, TCP_FASTOPEN, FAST_OPEN_QUEUE},
    };

    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        if (!options[i].wanted)
            continue;
        int rc = set_option(fd, options[i].level, options[i].name, options[i].value);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int
listen_tcp(int fd, const address *addr, const pf_socket_spec *spec)
{
    int rc = set_tcp_options(fd, spec);

    if (rc < 0)
        return rc;
    if (bind(fd, &addr->any, addr->len) < 0)
        return -errno;
    return listen(fd, spec->backlog) < 0 ? -errno : 0;
}

/* ---- Unix --------------------------------------------------------------------------*/

/* The directory's lock as an fd to close, or -errno: then nothing may be replaced. */
static int
lock_directory(const char *path)
{
    char parent[sizeof((struct sockaddr_un *)0)->sun_path + 2];
    const char *slash = strrchr(path, '/');
    size_t len = slash ? (size_t)(slash - path) + 1 : 0;

    memcpy(parent, path, len);
    memcpy(parent + len, ".", 2);
    int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0)
        return fd;
    int rc = -errno;
    close(fd);
    return rc;
}

/* A socket file that refuses connections; a full backlog says EAGAIN and is alive. */
static bool
is_stale(const address *addr)
{
    struct stat st;

    if (lstat(addr->un.sun_path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return false;
    int fd = open_socket(AF_UNIX);
    if (fd < 0)
        return false;
    bool refused = connect(fd, &addr->any, addr->len) < 0 && errno == ECONNREFUSED;
    close(fd);
    return refused;
}

static int
bind_unix(int fd, const address *addr, bool may_replace)
{
    if (bind(fd, &addr->any, addr->len) == 0)
        return 0;
    if (errno != EADDRINUSE || !may_replace || !is_stale(addr))
        return -errno;
    if (unlink(addr->un.sun_path) < 0 && errno != ENOENT)
        return -errno;
    return bind(fd, &addr->any, addr->len) < 0 ? -errno : 0;
}

/* Permissions are set before listen(): until then nobody can connect. */
static int
listen_unix(int fd, const address *addr, const pf_socket_spec *spec)
{
    int lock = lock_directory(addr->un.sun_path);
    int rc = bind_unix(fd, addr, lock >= 0);

    if (rc == 0) {
        bool moded = spec->mode >= 0;
        if ((moded && chmod(addr->un.sun_path, (mode_t)spec->mode) < 0)
            || listen(fd, spec->backlog) < 0) {
            rc = -errno;
            unlink(addr->un.sun_path);
        }
    }
    if (lock >= 0)
        close(lock);
    return rc;
}

/* ---- What prefork.h declares -------------------------------------------------------*/

int
pf_socket_listen(const pf_socket_spec *spec)
{
    address addr;
    int rc = address_of(&addr, spec);

    if (rc < 0)
        return rc;
    int fd = open_socket(spec->family);
    if (fd < 0)
        return fd;
    rc = spec->family == AF_UNIX ? listen_unix(fd, &addr, spec)
                                 : listen_tcp(fd, &addr, spec);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    return fd;
}

int
pf_socket_check(int fd)
{
    int type, listening;
    int rc = get_option(fd, SO_TYPE, &type);

    if (rc == 0)
        rc = get_option(fd, SO_ACCEPTCONN, &listening);
    if (rc < 0)
        return rc;
    return type == SOCK_STREAM && listening ? 0 : -EINVAL;
}

/* A closed listener resets what is in its queue, and a connection that completes while
 * the queue is swept before close() is lost the same way. So the stream is cut at its
 * source: a filter that drops the segments which would begin a handshake (SYN without
 * ACK). The peer's kernel repeats them a second later, when a successor listens or the
 * port is closed for good; segments of handshakes already begun pass. The filter of a
 * TCP socket sees the packet from its TCP header on: the flags are byte 13. */
int
pf_socket_quiesce(int fd)
{
    enum { FLAGS_AT = 13, SYN = 0x02, ACK = 0x10, DROP = 0, PASS = 0x7fffffff };
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_B | BPF_ABS, FLAGS_AT),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, SYN | ACK),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYN, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, DROP),
        BPF_STMT(BPF_RET | BPF_K, PASS),
    };
    const struct sock_fprog program = {sizeof code / sizeof *code, code};
    int domain;
    int rc = get_option(fd, SO_DOMAIN, &domain);

    if (rc < 0 || domain == AF_UNIX)
        return rc;
    rc = setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program);
    return rc < 0 ? -errno : 0;
}

static int
forget_spread(int fd)
{
    int unused = 0;
    int rc =
        setsockopt(fd, SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, &unused, sizeof unused);
    return rc < 0 && errno != ENOENT ? -errno : 0;
}

/* A listener that is to be closed while others of its address live on must not be given
 * new connections, and the filter above would make their peers wait for a second. So the
 * group gets a program that chooses among the others: a random number, modulo how many
 * there are, moved past each place that is avoided. A place that does not exist any
 * more, in the moment between a close and the next program, falls back to hashing. */
int
pf_socket_spread(int fd, int members, const int *avoided, int n)
{
    enum { HEAD = 2, TAIL = 1 };
    struct sock_filter code[HEAD + 2 * PF_SOCKET_AVOIDED + TAIL];
    struct sock_fprog program = {(unsigned short)(HEAD + 2 * n + TAIL), code};

    if (n == 0)
        return forget_spread(fd);
    if (n < 0 || n >= members || n > PF_SOCKET_AVOIDED)
        return -EINVAL;
    code[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                           (unsigned)(SKF_AD_OFF + SKF_AD_RANDOM));
    code[1] = (struct sock_filter)BPF_STMT(BPF_ALU | BPF_MOD | BPF_K,
                                           (unsigned)(members - n));
    for (int i = 0; i < n; i++) {
        struct sock_filter *step = code + HEAD + 2 * i;
        step[0] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K,
                                               (unsigned)avoided[i], 0, 1);
        step[1] = (struct sock_filter)BPF_STMT(BPF_ALU | BPF_ADD | BPF_K, 1);
    }
    code[HEAD + 2 * n] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_A, 0);
    int rc =
        setsockopt(fd, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof program);
    return rc < 0 ? -errno : 0;
}
