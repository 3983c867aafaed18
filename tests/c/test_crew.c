/* test_crew.c - who is woken when a handler stalls, or when somebody is called. */
#undef NDEBUG
#include "prefork.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

enum { TICK_MS = 1, THREADS = 4, NAME = 7 };

static pf_crew *crew;
static atomic_int woken[5]; /* by PF_CREW_* */
static atomic_int ended;

static void
open_crew(void)
{
    assert(pf_crew_open(&crew, TICK_MS) == 0);
    for (int i = 0; i < 5; i++)
        atomic_store(&woken[i], 0);
    atomic_store(&ended, 0);
}

/* Stands by for as long as it is called or told of a stall. */
static void *
stand_by(void *unused)
{
    int reason;
    do {
        reason = pf_crew_wait(crew, NAME);
        assert(reason > 0);
        atomic_fetch_add(&woken[reason], 1);
    } while (reason != PF_CREW_CLOSED);
    atomic_fetch_add(&ended, 1);
    return unused;
}

static void
pause_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static void
await(atomic_int *counter, int least)
{
    for (int i = 0; i < 10000 && atomic_load(counter) < least; i++)
        pause_ms(1);
    assert(atomic_load(counter) >= least);
}

static void
with_threads(void (*body)(void), int count)
{
    pthread_t threads[THREADS];
    open_crew();
    for (int i = 0; i < count; i++)
        assert(pthread_create(&threads[i], NULL, stand_by, NULL) == 0);
    body();
    pf_crew_close(crew);
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    assert(atomic_load(&ended) == count);
    pf_crew_free(crew);
}

static void
stall(void)
{
    pf_crew_begin(crew);
    await(&woken[PF_CREW_STALLED], 1);
    pf_crew_end(crew);
}

static void
a_handler_that_stalls_is_told(void)
{
    with_threads(stall, 2);
    with_threads(stall, 1);
}

static void
run_fast_handlers(void)
{
    for (int i = 0; i < 200000; i++) {
        pf_crew_begin(crew);
        pf_crew_end(crew);
    }
}

static void
fast_handlers_wake_nobody(void)
{
    with_threads(run_fast_handlers, 2);
    assert(atomic_load(&woken[PF_CREW_CALLED]) == 0);
}

static void
call_often(void)
{
    int calls = 0;
    for (int i = 0; i < 500; i++) {
        calls += pf_crew_call(crew);
        if (i % 50 == 0)
            pause_ms(1);
    }
    assert(calls > 0);
    await(&woken[PF_CREW_CALLED], 1);
    assert(atomic_load(&woken[PF_CREW_CALLED]) <= calls);
}

static void
who_is_called_wakes_once(void)
{
    with_threads(call_often, THREADS);
    with_threads(call_often, 1);
}

static void
appoint_often(void)
{
    int appointed = 0;
    for (int i = 0; i < 500; i++) {
        unsigned long name = pf_crew_appoint(crew);
        assert(name == NAME || name == 0);
        appointed += name != 0;
        if (i % 50 == 0)
            pause_ms(1);
    }
    assert(appointed > 0);
    await(&woken[PF_CREW_APPOINTED], appointed);
    assert(atomic_load(&woken[PF_CREW_APPOINTED]) == appointed);
    assert(atomic_load(&woken[PF_CREW_CALLED]) == 0);
}

static void
who_is_appointed_knows_it(void)
{
    with_threads(appoint_often, THREADS);
    with_threads(appoint_often, 1);
}

static void
doze_and_stall(void)
{
    pause_ms(150); /* the watcher dozes by now, and the handler must wake it */
    stall();
}

static void
a_handler_after_a_quiet_time_is_watched(void)
{
    with_threads(doze_and_stall, 2);
}

/* After a while without a stall the watcher naps longer, but it watches. */
static void
be_calm_and_stall(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t until = t.tv_sec * 1000 + t.tv_nsec / 1000000 + 400;
    do {
        pf_crew_begin(crew);
        pf_crew_end(crew);
        clock_gettime(CLOCK_MONOTONIC, &t);
    } while (t.tv_sec * 1000 + t.tv_nsec / 1000000 < until);
    stall();
}

static void
a_handler_that_stalls_after_many_that_did_not_is_told(void)
{
    with_threads(be_calm_and_stall, 2);
}

static void
nobody_stands_by_and_nobody_can_be_called(void)
{
    open_crew();
    assert(!pf_crew_call(crew) && pf_crew_appoint(crew) == 0);
    pf_crew_begin(crew);
    pf_crew_end(crew);
    pf_crew_close(crew);
    assert(pf_crew_wait(crew, NAME) == PF_CREW_CLOSED);
    pf_crew_free(crew);
}

static void
a_tick_has_bounds(void)
{
    assert(pf_crew_open(&crew, 0) == -EINVAL);
    assert(pf_crew_open(&crew, 1000) == -EINVAL);
}

static void
stall_again_and_again(void)
{
    for (int i = 1; i <= 20; i++) {
        pf_crew_begin(crew);
        await(&woken[PF_CREW_STALLED], i);
        pf_crew_end(crew);
        pf_crew_call(crew);
    }
}

static void
the_watch_is_handed_on(void)
{
    with_threads(stall_again_and_again, THREADS);
}

static void
come_late(void)
{
    pause_ms(2); /* there is a watcher by now */
    pf_crew_close(crew);
    assert(pf_crew_wait(crew, NAME) == PF_CREW_CLOSED);
    await(&ended, 1);
    assert(!pf_crew_call(crew) && pf_crew_appoint(crew) == 0);
}

static void
who_comes_after_the_close_is_nobody_s_successor(void)
{
    for (int i = 0; i < 100; i++)
        with_threads(come_late, 1);
}

int
main(void)
{
    a_handler_that_stalls_is_told();
    fast_handlers_wake_nobody();
    who_is_called_wakes_once();
    who_is_appointed_knows_it();
    a_handler_after_a_quiet_time_is_watched();
    a_handler_that_stalls_after_many_that_did_not_is_told();
    nobody_stands_by_and_nobody_can_be_called();
    a_tick_has_bounds();
    the_watch_is_handed_on();
    who_comes_after_the_close_is_nobody_s_successor();
    return 0;
}
