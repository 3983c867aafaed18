/* process.c - the children and signals of a supervising process in one blocking wait,
 * and the start of programs.
 *
 * Three kinds of news arrive as readable descriptors, so one poll() waits for all:
 *
 *   signals   blocked in the calling thread and collected by a signalfd;
 *   children  a pidfd each, readable when the child has ended. Unlike a pid it cannot
 *             come to mean another process, so a signal sent through it reaches the
 *             child or nobody;
 *   watched   descriptors of the caller: pipes of its children, mostly.
 *
 * Only adopted children are reaped, each by its own pidfd: other children of the
 * process belong to whoever started them. Process 1 and subreapers inherit strangers as
 * well: pf_process_reap_strangers() takes all that are not adopted, when its caller
 * thinks that nobody else will. poll() rather than epoll because an epoll instance is
 * shared with every forked child, and a supervisor has few descriptors.
 *
 * All descriptors are entries of one table: the first is the signalfd, entries with a
 * pid are children, the others are watched.
 */
#define _GNU_SOURCE
#include "prefork.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

enum { WAIT_BY_PIDFD = 3 }; /* P_PIDFD, which glibc has known since 2.36 */

struct pf_processes {
    struct pollfd *fds; /* the signalfd, pidfds (owned), watched fds (borrowed) */
    int *pids;          /* beside fds: the child's pid, or WATCHED */
    int count, room;
    sigset_t old_mask;
};

enum { WATCHED = 0, SIGNALS_AT = 0, FIRST_ROOM = 16 };

/* ---- The table ---------------------------------------------------------------------*/

static int
grow(pf_processes *p)
{
    int room = p->room ? 2 * p->room : FIRST_ROOM;
    struct pollfd *fds = realloc(p->fds, (size_t)room * sizeof *fds);

    if (!fds)
        return -ENOMEM;
    p->fds = fds;
    int *pids = realloc(p->pids, (size_t)room * sizeof *pids);
    if (!pids)
        return -ENOMEM;
    p->pids = pids;
    p->room = room;
    return 0;
}

static int
add(pf_processes *p, int fd, int pid)
{
    int rc = p->count == p->room ? grow(p) : 0;

    if (rc < 0)
        return rc;
    p->fds[p->count] = (struct pollfd){.fd = fd, .events = POLLIN};
    p->pids[p->count] = pid;
    p->count++;
    return 0;
}

static void
drop(pf_processes *p, int at)
{
    int behind = p->count - at - 1;

    memmove(p->fds + at, p->fds + at + 1, (size_t)behind * sizeof *p->fds);
    memmove(p->pids + at, p->pids + at + 1, (size_t)behind * sizeof *p->pids);
    p->count--;
}

static int
find_child(const pf_processes *p, int pid)
{
    for (int i = SIGNALS_AT + 1; i < p->count; i++)
        if (p->pids[i] == pid && pid != WATCHED)
            return i;
    return -ESRCH;
}

static int
find_watched(const pf_processes *p, int fd)
{
    for (int i = SIGNALS_AT + 1; i < p->count; i++)
        if (p->pids[i] == WATCHED && p->fds[i].fd == fd)
            return i;
    return -ENOENT;
}

/* ---- Open and close ----------------------------------------------------------------*/

static void
fill_set(sigset_t *set, const int *signals, int n)
{
    sigemptyset(set);
    for (int i = 0; i < n; i++)
        sigaddset(set, signals[i]);
}

int
pf_process_open(pf_processes **out, const int *signals, int n)
{
    sigset_t set;
    int rc = -ENOMEM;
    pf_processes *p = calloc(1, sizeof *p);

    if (!p)
        return rc;
    fill_set(&set, signals, n);
    int fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    if (fd < 0) {
        rc = -errno;
        goto signalfd_failed;
    }
    rc = add(p, fd, WATCHED);
    if (rc < 0)
        goto add_failed;
    rc = -pthread_sigmask(SIG_BLOCK, &set, &p->old_mask);
    if (rc < 0)
        goto add_failed;
    *out = p;
    return 0;

add_failed:
    close(fd);
signalfd_failed:
    free(p->fds);
    free(p->pids);
    free(p);
    return rc;
}

static void
restore_and_free(pf_processes *p)
{
    for (int i = 0; i < p->count; i++)
        if (i == SIGNALS_AT || p->pids[i] != WATCHED)
            close(p->fds[i].fd);
    pthread_sigmask(SIG_SETMASK, &p->old_mask, NULL);
    free(p->fds);
    free(p->pids);
    free(p);
}

/* A signal that came too late to be collected was meant for the supervision that just
 * ended; left pending it would strike the process as soon as the mask is restored. */
void
pf_process_close(pf_processes *p)
{
    struct signalfd_siginfo late;

    if (!p)
        return;
    while (read(p->fds[SIGNALS_AT].fd, &late, sizeof late) > 0)
        continue;
    restore_and_free(p);
}

/* A forked child has the fds but not the children. Signals pending here were sent to
 * this child and are delivered now. */
void
pf_process_forget(pf_processes *p)
{
    if (p)
        restore_and_free(p);
}

/* ---- Children and watched fds ------------------------------------------------------*/

int
pf_process_adopt(pf_processes *p, int pid)
{
    if (pid <= 0)
        return -EINVAL;
    if (find_child(p, pid) >= 0)
        return -EEXIST;
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0)
        return -errno;
    int rc = add(p, fd, pid);
    if (rc < 0)
        close(fd);
    return rc;
}

int
pf_process_watch(pf_processes *p, int fd)
{
    if (fd < 0)
        return -EBADF;
    return find_watched(p, fd) >= 0 ? -EEXIST : add(p, fd, WATCHED);
}

int
pf_process_unwatch(pf_processes *p, int fd)
{
    int at = find_watched(p, fd);

    if (at < 0)
        return at;
    drop(p, at);
    return 0;
}

int
pf_process_kill(pf_processes *p, int pid, int signal)
{
    int at = find_child(p, pid);

    if (at < 0)
        return at;
    return syscall(SYS_pidfd_send_signal, p->fds[at].fd, signal, NULL, 0) < 0 ? -errno
                                                                              : 0;
}

/* ---- The wait ----------------------------------------------------------------------*/

static int
status_of(const siginfo_t *info)
{
    switch (info->si_code) {
    case CLD_EXITED:
        return (info->si_status & 0xff) << 8;
    case CLD_DUMPED:
        return info->si_status | 0x80;
    default:
        return info->si_status;
    }
}

/* 1: ended and reaped, 0: not yet. ECHILD means that somebody else has reaped it. */
static int
reap(int pidfd, int *status)
{
    siginfo_t info = {0};

    if (waitid((idtype_t)WAIT_BY_PIDFD, (id_t)pidfd, &info, WEXITED | WNOHANG) < 0) {
        *status = PF_PROCESS_STATUS_UNKNOWN;
        return errno == ECHILD ? 1 : -errno;
    }
    *status = status_of(&info);
    return info.si_pid != 0;
}

static int
collect_signals(pf_processes *p, pf_process_event *events, int max)
{
    struct signalfd_siginfo info;
    int n = 0;

    while (n < max && read(p->fds[SIGNALS_AT].fd, &info, sizeof info) > 0)
        events[n++] = (pf_process_event){PF_PROCESS_SIGNALLED, (int)info.ssi_pid,
                                         (int)info.ssi_signo};
    return n;
}

/* What entry `at` has to say: 1 event, none or -errno. A reaped child leaves the table
 * here, so the caller must not step on to the next index. */
static int
collect_entry(pf_processes *p, int at, pf_process_event *event)
{
    int fd = p->fds[at].fd, pid = p->pids[at], status = 0;

    if (pid == WATCHED) {
        *event = (pf_process_event){PF_PROCESS_READABLE, fd, 0};
        return 1;
    }
    int rc = reap(fd, &status);
    if (rc <= 0)
        return rc;
    close(fd);
    drop(p, at);
    *event = (pf_process_event){PF_PROCESS_EXITED, pid, status};
    return 1;
}

/* Signals first: a stop sent to the whole group must be known before the exits that it
 * caused. What does not fit into events is found again by the next wait. */
int
pf_process_wait(pf_processes *p, pf_process_event *events, int max, int timeout_ms)
{
    int ready = poll(p->fds, (nfds_t)p->count, timeout_ms);

    if (ready < 0)
        return errno == EINTR ? 0 : -errno;
    int n = p->fds[SIGNALS_AT].revents ? collect_signals(p, events, max) : 0;
    for (int i = SIGNALS_AT + 1; i < p->count && n < max;) {
        int before = p->count;
        int rc = p->fds[i].revents ? collect_entry(p, i, events + n) : 0;
        if (rc < 0)
            return n ? n : rc;
        n += rc;
        i += p->count == before;
    }
    return n;
}

/* ---- Strangers ---------------------------------------------------------------------*/

bool
pf_process_is_reaper(void)
{
    int subreaper = 0;

    if (prctl(PR_GET_CHILD_SUBREAPER, &subreaper, 0, 0, 0) < 0)
        subreaper = 0;
    return subreaper || getpid() == 1;
}

int
pf_process_set_reaper(bool on)
{
    return prctl(PR_SET_CHILD_SUBREAPER, (unsigned long)on, 0, 0, 0) < 0 ? -errno : 0;
}

/* The one who is next to be reaped is looked at first: the kernel tells the same one
 * again until it is. An adopted child stays for the next wait. */
int
pf_process_reap_strangers(pf_processes *p)
{
    int n = 0;

    for (;;) {
        siginfo_t info = {0};
        if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) < 0 || !info.si_pid)
            return n;
        if (find_child(p, info.si_pid) >= 0)
            return n;
        if (waitid(P_PID, (id_t)info.si_pid, &info, WEXITED | WNOHANG) == 0)
            n++;
    }
}

int
pf_process_set_parent_death_signal(int signal, int expected_parent)
{
    if (prctl(PR_SET_PDEATHSIG, (unsigned long)signal, 0, 0, 0) < 0)
        return -errno;
    return getppid() == expected_parent ? 0 : -ESRCH;
}

/* ---- Programs ----------------------------------------------------------------------*/

/* The fds that a program gets are first copied behind the numbers they will have, so
 * that none is overwritten before it is moved. */
static int
copy_fds(int *copies, const pf_process_program *program)
{
    int behind = PF_PROCESS_FIRST_FD + program->nfds;

    for (int i = 0; i < program->nfds; i++) {
        copies[i] = fcntl(program->fds[i], F_DUPFD_CLOEXEC, behind);
        if (copies[i] >= 0)
            continue;
        int rc = -errno;
        while (i-- > 0)
            close(copies[i]);
        return rc;
    }
    return 0;
}

static int
fill_actions(posix_spawn_file_actions_t *actions, const int *copies,
             const pf_process_program *program)
{
    int rc = posix_spawn_file_actions_addopen(actions, STDIN_FILENO, "/dev/null",
                                              O_RDONLY, 0);
    if (rc == 0 && program->directory)
        rc = posix_spawn_file_actions_addchdir_np(actions, program->directory);
    for (int i = 0; rc == 0 && i < program->nfds; i++)
        rc = posix_spawn_file_actions_adddup2(actions, copies[i],
                                              PF_PROCESS_FIRST_FD + i);
    return -rc;
}

/* The mask is inherited: signals that are collected here wait in the program until it
 * can answer them. */
static int
start(const pf_process_program *program, const int *copies)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t defaults;
    pid_t pid = 0;
    const int ignored[] = {SIGPIPE, SIGXFSZ};
    int rc = -posix_spawn_file_actions_init(&actions);

    if (rc < 0)
        return rc;
    rc = -posix_spawnattr_init(&attributes);
    if (rc < 0)
        goto attributes_failed;
    fill_set(&defaults, ignored, 2);
    posix_spawnattr_setsigdefault(&attributes, &defaults);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
    rc = fill_actions(&actions, copies, program);
    if (rc == 0)
        rc = -posix_spawn(&pid, program->path, &actions, &attributes, program->argv,
                          program->envp);
    posix_spawnattr_destroy(&attributes);
attributes_failed:
    posix_spawn_file_actions_destroy(&actions);
    return rc < 0 ? rc : pid;
}

int
pf_process_start(const pf_process_program *program)
{
    int copies[PF_PROCESS_FDS];

    if (program->nfds < 0 || program->nfds > PF_PROCESS_FDS)
        return -EINVAL;
    int rc = copy_fds(copies, program);
    if (rc < 0)
        return rc;
    rc = start(program, copies);
    for (int i = 0; i < program->nfds; i++)
        close(copies[i]);
    return rc;
}
