/* poller_epoll.c - readiness from epoll.
 *
 * Connections are edge-triggered and registered once, for input, output and the peer's
 * FIN together, and never changed: the kernel raises EPOLLOUT edges only after a write
 * was refused, so the wider interest costs nothing. Listeners are level-triggered and
 * exclusive, so that of many workers behind one socket few wake for one connection. The
 * timerfd exists only when the loop sits inside another event loop, which then sees
 * deadlines as readiness; otherwise the timeout of epoll_wait() serves.
 */
#include "internal.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <unistd.h>

int
pf__poller_open(pf__poller *poller)
{
    *poller = (pf__poller){.timer = {.kind = PF__SOURCE_TIMER, .fd = -1}};
    poller->fd = epoll_create1(EPOLL_CLOEXEC);
    return poller->fd < 0 ? -errno : 0;
}

void
pf__poller_close(pf__poller *poller)
{
    if (poller->timer.fd >= 0)
        close(poller->timer.fd);
    if (poller->fd >= 0)
        close(poller->fd);
    poller->timer.fd = poller->fd = -1;
}

static int
add(pf__poller *poller, pf__source *source, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = source};
    if (epoll_ctl(poller->fd, EPOLL_CTL_ADD, source->fd, &event) < 0)
        return -errno;
    source->registered = true;
    return 0;
}

int
pf__poller_add_conn(pf__poller *poller, pf__source *source)
{
    return add(poller, source, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
}

int
pf__poller_add_listener(pf__poller *poller, pf__source *source)
{
    return add(poller, source, EPOLLIN | EPOLLEXCLUSIVE);
}

int
pf__poller_add(pf__poller *poller, pf__source *source)
{
    return add(poller, source, EPOLLIN);
}

int
pf__poller_remove(pf__poller *poller, pf__source *source)
{
    if (!source->registered)
        return 0;
    source->registered = false;
    return epoll_ctl(poller->fd, EPOLL_CTL_DEL, source->fd, NULL) < 0 ? -errno : 0;
}

int
pf__poller_wait(pf__poller *poller, pf__readiness *out, int max, int timeout_ms)
{
    int n = epoll_wait(poller->fd, out, max, timeout_ms);
    return n < 0 ? -errno : n;
}

int
pf__poller_embed(pf__poller *poller)
{
    if (poller->timer.fd >= 0)
        return 0;
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    poller->timer.fd = fd;
    poller->armed = INT64_MAX;
    return add(poller, &poller->timer, EPOLLIN | EPOLLET); /* nobody reads it */
}

/* Deadlines mostly move later, and then the timer may stay: it fires once too early
 * and is armed again. So a busy loop hardly ever makes this system call. */
int
pf__poller_arm(pf__poller *poller, int64_t now, int64_t deadline)
{
    bool passed = poller->armed <= now;
    if (poller->timer.fd < 0 || (deadline >= poller->armed && !passed)
        || (deadline == INT64_MAX && poller->armed == INT64_MAX))
        return 0;
    struct itimerspec when = {0};
    if (deadline != INT64_MAX) {
        when.it_value.tv_sec = deadline / 1000;
        when.it_value.tv_nsec = deadline % 1000 * 1000000 + 1;
    }
    if (timerfd_settime(poller->timer.fd, TFD_TIMER_ABSTIME, &when, NULL) < 0)
        return -errno;
    poller->armed = deadline;
    return 0;
}
