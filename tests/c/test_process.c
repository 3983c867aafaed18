/* test_process.c - children, signals and watched fds, with real ones. */
#define _GNU_SOURCE
#undef NDEBUG
#include "prefork.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SOON_MS = 10000, FOR_EVER_MS = -1 };

static const int stops[] = {SIGTERM, SIGINT};

static pf_processes *
open_processes(void)
{
    pf_processes *p = NULL;

    assert(pf_process_open(&p, stops, 2) == 0 && p);
    return p;
}

/* A child that lives until it is signalled. */
static int
fork_sleeper(void)
{
    int pid = fork();

    assert(pid >= 0);
    if (pid > 0)
        return pid;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (;;)
        pause();
}

static int
fork_exiting(int status)
{
    int pid = fork();

    assert(pid >= 0);
    if (pid == 0)
        _exit(status);
    return pid;
}

/* Ended, but not reaped. */
static void
await_zombie(int pid)
{
    siginfo_t info;
    assert(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT) == 0);
}

static pf_process_event
next(pf_processes *p)
{
    pf_process_event event = {0};

    assert(pf_process_wait(p, &event, 1, SOON_MS) == 1);
    return event;
}

static bool
quiet(pf_processes *p)
{
    pf_process_event event;
    return pf_process_wait(p, &event, 1, 0) == 0;
}

static bool
is_blocked(int signal)
{
    sigset_t now;

    pthread_sigmask(SIG_BLOCK, NULL, &now);
    return sigismember(&now, signal);
}

static int
count_fds(void)
{
    int n = 0;

    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

/* ---- Children ----------------------------------------------------------------------*/

static void
an_exit_is_told_with_its_status(void)
{
    pf_processes *p = open_processes();
    int pid = fork_exiting(7);

    assert(pf_process_adopt(p, pid) == 0);
    pf_process_event event = next(p);
    assert(event.kind == PF_PROCESS_EXITED && event.pid == pid);
    assert(WIFEXITED(event.status) && WEXITSTATUS(event.status) == 7);
    assert(waitpid(pid, NULL, 0) < 0 && errno == ECHILD); /* it is reaped */
    assert(quiet(p));
    pf_process_close(p);
}

static void
a_kill_is_told_and_never_repeated_on_a_reaped_pid(void)
{
    pf_processes *p = open_processes();
    int pid = fork_sleeper();

    assert(pf_process_adopt(p, pid) == 0);
    assert(pf_process_kill(p, pid, SIGKILL) == 0);
    pf_process_event event = next(p);
    assert(event.kind == PF_PROCESS_EXITED && event.pid == pid);
    assert(WIFSIGNALED(event.status) && WTERMSIG(event.status) == SIGKILL);
    assert(pf_process_kill(p, pid, SIGKILL) == -ESRCH);
    pf_process_close(p);
}

static void
only_adopted_children_are_reaped(void)
{
    pf_processes *p = open_processes();
    int stranger = fork_exiting(1), ours = fork_exiting(2), status;

    await_zombie(stranger);
    assert(pf_process_adopt(p, ours) == 0);
    assert(next(p).pid == ours && quiet(p));
    assert(pf_process_kill(p, stranger, SIGKILL) == -ESRCH);
    assert(waitpid(stranger, &status, 0) == stranger && WEXITSTATUS(status) == 1);
    pf_process_close(p);
}

static void
a_child_reaped_by_somebody_else_is_told_with_unknown_status(void)
{
    pf_processes *p = open_processes();
    int pid = fork_exiting(3);

    assert(pf_process_adopt(p, pid) == 0);
    assert(waitpid(pid, NULL, 0) == pid);
    pf_process_event event = next(p);
    assert(event.kind == PF_PROCESS_EXITED && event.pid == pid);
    assert(event.status == PF_PROCESS_STATUS_UNKNOWN);
    pf_process_close(p);
}

static void
more_children_than_room_are_told_one_by_one(void)
{
    enum { CHILDREN = 40 };
    pf_processes *p = open_processes();
    int sum = 0;

    for (int i = 0; i < CHILDREN; i++)
        assert(pf_process_adopt(p, fork_exiting(i)) == 0);
    for (int i = 0; i < CHILDREN; i++)
        sum += WEXITSTATUS(next(p).status);
    assert(sum == CHILDREN * (CHILDREN - 1) / 2 && quiet(p));
    pf_process_close(p);
}

static void
what_cannot_be_adopted_is_refused(void)
{
    pf_processes *p = open_processes();
    int pid = fork_sleeper();

    assert(pf_process_adopt(p, pid) == 0);
    assert(pf_process_adopt(p, pid) == -EEXIST);
    assert(pf_process_adopt(p, 0) == -EINVAL);
    assert(pf_process_adopt(p, -1) == -EINVAL);
    assert(pf_process_kill(p, pid, SIGKILL) == 0);
    assert(next(p).pid == pid);
    assert(pf_process_adopt(p, pid) == -ESRCH);
    pf_process_close(p);
}

/* ---- Signals -----------------------------------------------------------------------*/

static void
a_signal_is_told_with_its_sender(void)
{
    pf_processes *p = open_processes();

    assert(kill(getpid(), SIGTERM) == 0);
    pf_process_event event = next(p);
    assert(event.kind == PF_PROCESS_SIGNALLED && event.status == SIGTERM);
    assert(event.pid == getpid() && quiet(p));
    pf_process_close(p);
}

static void
signals_are_told_before_the_exits_they_caused(void)
{
    pf_processes *p = open_processes();
    pf_process_event events[8];
    int pid = fork_exiting(0);

    assert(pf_process_adopt(p, pid) == 0);
    await_zombie(pid);
    assert(kill(getpid(), SIGINT) == 0);
    assert(pf_process_wait(p, events, 8, SOON_MS) == 2);
    assert(events[0].kind == PF_PROCESS_SIGNALLED);
    assert(events[1].kind == PF_PROCESS_EXITED);
    pf_process_close(p);
}

static void
close_restores_the_mask_and_takes_late_signals_with_it(void)
{
    int before = count_fds();
    pf_processes *p = open_processes();

    assert(is_blocked(SIGTERM) && is_blocked(SIGINT));
    assert(kill(getpid(), SIGTERM) == 0);
    pf_process_close(p); /* or SIGTERM would end us here */
    assert(!is_blocked(SIGTERM) && !is_blocked(SIGINT));
    assert(count_fds() == before);
    pf_process_close(NULL);
}

static void
nothing(int signal)
{
    (void)signal;
}

static void
the_handler_of_another_signal_ends_the_wait(void)
{
    pf_processes *p = open_processes();
    pf_process_event event;
    struct sigaction action = {.sa_handler = nothing}, old;
    struct itimerval tick = {{0, 10000}, {0, 10000}}, none = {{0, 0}, {0, 0}};

    sigaction(SIGALRM, &action, &old);
    setitimer(ITIMER_REAL, &tick, NULL);
    assert(pf_process_wait(p, &event, 1, FOR_EVER_MS) == 0);
    setitimer(ITIMER_REAL, &none, NULL);
    sigaction(SIGALRM, &old, NULL);
    pf_process_close(p);
}

/* ---- Watched fds -------------------------------------------------------------------*/

static void
a_watched_fd_is_told_for_as_long_as_it_can_be_read(void)
{
    pf_processes *p = open_processes();
    int ends[2];
    char byte;

    assert(pipe(ends) == 0);
    assert(pf_process_watch(p, ends[0]) == 0);
    assert(pf_process_watch(p, ends[0]) == -EEXIST);
    assert(quiet(p));
    assert(write(ends[1], "a", 1) == 1);
    for (int i = 0; i < 2; i++) {
        pf_process_event event = next(p);
        assert(event.kind == PF_PROCESS_READABLE && event.pid == ends[0]);
    }
    assert(read(ends[0], &byte, 1) == 1 && quiet(p));
    close(ends[1]);
    assert(next(p).pid == ends[0]); /* its end is news, too */
    assert(pf_process_unwatch(p, ends[0]) == 0);
    assert(pf_process_unwatch(p, ends[0]) == -ENOENT);
    assert(quiet(p));
    close(ends[0]);
    pf_process_close(p);
}

static void
a_short_list_of_events_loses_nothing(void)
{
    pf_processes *p = open_processes();
    int pids[3];

    for (int i = 0; i < 3; i++) {
        pids[i] = fork_exiting(i);
        assert(pf_process_adopt(p, pids[i]) == 0);
        await_zombie(pids[i]);
    }
    assert(kill(getpid(), SIGTERM) == 0 && kill(getpid(), SIGINT) == 0);
    assert(next(p).kind == PF_PROCESS_SIGNALLED);
    assert(next(p).kind == PF_PROCESS_SIGNALLED);
    for (int i = 0; i < 3; i++)
        assert(next(p).pid == pids[i]);
    assert(quiet(p));
    pf_process_close(p);
}

/* ---- In a forked child -------------------------------------------------------------*/

static int
forget_and_look_around(pf_processes *p, int fds_before)
{
    if (!is_blocked(SIGTERM))
        return 1;
    pf_process_forget(p);
    if (is_blocked(SIGTERM))
        return 2;
    return count_fds() == fds_before ? 0 : 3;
}

static void
forget_in_a_child_leaves_the_view_of_the_parent_alone(void)
{
    int before = count_fds();
    pf_processes *p = open_processes();
    int sleeper = fork_sleeper();
    assert(pf_process_adopt(p, sleeper) == 0);

    int pid = fork();
    if (pid == 0)
        _exit(forget_and_look_around(p, before));
    assert(pf_process_adopt(p, pid) == 0);
    pf_process_event event = next(p);
    assert(event.pid == pid && event.status == 0);
    assert(pf_process_kill(p, sleeper, SIGKILL) == 0);
    assert(next(p).pid == sleeper);
    assert(kill(getpid(), SIGTERM) == 0 && next(p).status == SIGTERM);
    pf_process_close(p);
    assert(count_fds() == before);
}

/* A middle process ends as soon as its child is prepared; the child's death closes the
 * pipe that we read. */
static void
the_parent_death_signal_ends_a_child_that_lost_its_parent(void)
{
    int prepared[2], alive[2];

    assert(pipe(prepared) == 0 && pipe(alive) == 0);
    int middle = fork();
    if (middle == 0) {
        int parent = getpid();
        if (fork() == 0) {
            close(alive[0]);
            if (pf_process_set_parent_death_signal(SIGKILL, parent) != 0
                || write(prepared[1], "a", 1) != 1)
                _exit(1);
            for (;;)
                pause();
        }
        char byte;
        _exit(read(prepared[0], &byte, 1) == 1 ? 0 : 1);
    }
    int status;
    char byte;
    close(alive[1]);
    assert(waitpid(middle, &status, 0) == middle && status == 0);
    struct pollfd pfd = {.fd = alive[0], .events = POLLIN};
    assert(poll(&pfd, 1, SOON_MS) == 1 && read(alive[0], &byte, 1) == 0);
    close(alive[0]);
    close(prepared[0]);
    close(prepared[1]);
}

static void
a_parent_that_is_gone_already_is_told(void)
{
    int pid = fork();

    if (pid == 0) /* it is not its own parent */
        _exit(pf_process_set_parent_death_signal(SIGTERM, getpid()) == -ESRCH ? 0 : 1);
    int status;
    assert(waitpid(pid, &status, 0) == pid && status == 0);
}

int
main(void)
{
    an_exit_is_told_with_its_status();
    a_kill_is_told_and_never_repeated_on_a_reaped_pid();
    only_adopted_children_are_reaped();
    a_child_reaped_by_somebody_else_is_told_with_unknown_status();
    more_children_than_room_are_told_one_by_one();
    what_cannot_be_adopted_is_refused();
    a_signal_is_told_with_its_sender();
    signals_are_told_before_the_exits_they_caused();
    close_restores_the_mask_and_takes_late_signals_with_it();
    the_handler_of_another_signal_ends_the_wait();
    a_watched_fd_is_told_for_as_long_as_it_can_be_read();
    a_short_list_of_events_loses_nothing();
    forget_in_a_child_leaves_the_view_of_the_parent_alone();
    the_parent_death_signal_ends_a_child_that_lost_its_parent();
    a_parent_that_is_gone_already_is_told();
    return 0;
}
