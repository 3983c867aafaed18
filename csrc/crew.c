/* crew.c - threads of which one leads and the others stand by.
 *
 * The leader runs the loop and the handlers itself, so a fast handler pays for no
 * hand-off. It stamps the beginning and the end of each handler in `turn`: odd means
 * inside one. Those who stand by sleep here, last come first called, so that the few
 * that work stay in the cache. One of them is the watcher: it looks at the stamp every
 * millisecond, and a handler that it sees twice has stalled. A look costs the leader 10
 * to 35 us (a timer, two changes of threads, the caches), so where no handler has stalled
 * for a while it looks less often. While nothing has happened for some ticks the watcher
 * dozes, so an idle crew makes no wake-ups.
 *
 * Who leads is not decided here but under the caller's lock (in Python: the GIL), which
 * also orders begin, end and call. A sleeper only learns that it may be needed.
 */
#include "prefork.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum {
    QUIET_TICKS = 50, /* without a handler, until the watcher dozes */
    CALM_TICKS = 250, /* without a handler that stalls, until it looks less often, */
    CALM_NAP = 5,     /* every so many ticks */
};

typedef struct sleeper {
    pthread_cond_t wake;
    struct sleeper *next;
    bool called;
} sleeper;

struct pf_crew {
    pthread_mutex_t lock;
    sleeper *idle;    /* a stack; the watcher is not in it */
    sleeper *watcher; /* NULL: nobody stands by */
    int calm;         /* ticks since a handler stalled or somebody was called */
    bool closed;
    atomic_bool dozing;
    _Atomic uint64_t turn;
    long tick_ns;
};

int
pf_crew_open(pf_crew **out, int tick_ms)
{
    if (tick_ms < 1 || tick_ms > 999)
        return -EINVAL;
    pf_crew *crew = calloc(1, sizeof *crew);
    if (crew == NULL)
        return -ENOMEM;
    int rc = pthread_mutex_init(&crew->lock, NULL);
    if (rc != 0) {
        free(crew);
        return -rc;
    }
    crew->tick_ns = tick_ms * 1000000L;
    *out = crew;
    return 0;
}

void
pf_crew_free(pf_crew *crew)
{
    pthread_mutex_destroy(&crew->lock);
    free(crew);
}

/* ---- standing by --------------------------------------------------------------------*/
static int
open_sleeper(sleeper *self)
{
    pthread_condattr_t monotonic;
    int rc = pthread_condattr_init(&monotonic);
    if (rc != 0)
        return -rc;
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    *self = (sleeper){.called = false};
    rc = pthread_cond_init(&self->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return -rc;
}

static void
push(pf_crew *crew, sleeper *self)
{
    self->next = crew->idle;
    crew->idle = self;
}

static sleeper *
pop(pf_crew *crew)
{
    sleeper *first = crew->idle;
    if (first != NULL)
        crew->idle = first->next;
    return first;
}

static bool
is_inside(uint64_t turn)
{
    return turn & 1;
}

/* A nap of so many ticks. false: it was cut short. */
static bool
nap(pf_crew *crew, sleeper *self, int ticks)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += ticks * crew->tick_ns;
    while (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    return pthread_cond_timedwait(&self->wake, &crew->lock, &until) == ETIMEDOUT;
}

/* The announcement comes before the second look at the stamp: either we see that a
 * handler has begun, or it sees that we doze and wakes us. */
static void
doze(pf_crew *crew, sleeper *self)
{
    atomic_store(&crew->dozing, true);
    if (!is_inside(atomic_load(&crew->turn)))
        pthread_cond_wait(&self->wake, &crew->lock);
    atomic_store(&crew->dozing, false);
}

/* One look. true: the handler that it saw has stalled. */
static bool
watch(pf_crew *crew, sleeper *self, int *quiet)
{
    uint64_t seen = atomic_load(&crew->turn);
    if (*quiet >= QUIET_TICKS && !is_inside(seen)) {
        doze(crew, self);
        *quiet = 0;
        return false;
    }
    int ticks = crew->calm < CALM_TICKS ? 1 : CALM_NAP;
    if (!nap(crew, self, ticks))
        return false;
    uint64_t now = atomic_load(&crew->turn);
    bool stalled = now == seen && is_inside(now);
    *quiet = now == seen ? *quiet + ticks : 0;
    crew->calm = stalled ? 0 : crew->calm + (crew->calm < CALM_TICKS);
    return stalled;
}

/* Somebody stays on watch as long as anybody stands by. */
static void
leave(pf_crew *crew, const sleeper *self)
{
    if (crew->watcher != self)
        return;
    crew->watcher = pop(crew);
    if (crew->watcher != NULL)
        pthread_cond_signal(&crew->watcher->wake);
}

static int
stand_by(pf_crew *crew, sleeper *self)
{
    int quiet = 0;
    if (crew->closed)
        return PF_CREW_CLOSED; /* and joins nobody, who could look for it later */
    if (crew->watcher == NULL)
        crew->watcher = self;
    else
        push(crew, self);
    for (;;) {
        if (crew->closed)
            return PF_CREW_CLOSED;
        if (self->called)
            return PF_CREW_CALLED;
        if (crew->watcher != self)
            pthread_cond_wait(&self->wake, &crew->lock);
        else if (watch(crew, self, &quiet))
            return self->called ? PF_CREW_CALLED : PF_CREW_STALLED;
    }
}

int
pf_crew_wait(pf_crew *crew)
{
    sleeper self;
    int rc = open_sleeper(&self);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&crew->lock);
    rc = stand_by(crew, &self);
    leave(crew, &self);
    pthread_mutex_unlock(&crew->lock);
    pthread_cond_destroy(&self.wake);
    return rc;
}

/* ---- leading ------------------------------------------------------------------------*/
static void
wake_watcher(pf_crew *crew)
{
    pthread_mutex_lock(&crew->lock);
    if (crew->watcher != NULL)
        pthread_cond_signal(&crew->watcher->wake);
    pthread_mutex_unlock(&crew->lock);
}

void
pf_crew_begin(pf_crew *crew)
{
    atomic_store(&crew->turn,
                 atomic_load_explicit(&crew->turn, memory_order_relaxed) + 1);
    if (atomic_load(&crew->dozing))
        wake_watcher(crew);
}

void
pf_crew_end(pf_crew *crew)
{
    uint64_t turn = atomic_load_explicit(&crew->turn, memory_order_relaxed);
    atomic_store_explicit(&crew->turn, turn + 1, memory_order_release);
}

bool
pf_crew_call(pf_crew *crew)
{
    pthread_mutex_lock(&crew->lock);
    crew->calm = 0;
    sleeper *chosen = pop(crew);
    if (chosen == NULL)
        chosen = crew->watcher;
    if (chosen != NULL && !chosen->called) {
        chosen->called = true;
        pthread_cond_signal(&chosen->wake);
    }
    pthread_mutex_unlock(&crew->lock);
    return chosen != NULL;
}

void
pf_crew_close(pf_crew *crew)
{
    pthread_mutex_lock(&crew->lock);
    crew->closed = true;
    for (sleeper *each = crew->idle; each != NULL; each = each->next)
        pthread_cond_signal(&each->wake);
    if (crew->watcher != NULL)
        pthread_cond_signal(&crew->watcher->wake);
    crew->idle = NULL;
    pthread_mutex_unlock(&crew->lock);
}
