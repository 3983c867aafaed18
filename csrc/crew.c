/* crew.c - threads of which one leads and the others stand by.
 *
 * The leader runs the loop and the handlers itself, so a fast handler pays for no
 * hand-off. It stamps the beginning and the end of each handler in `turn`: odd means
 * inside one. Those who stand by sleep here, last come first called, so that the few
 * that work stay in the cache. One of them is the watcher: it looks at the stamp every
 * millisecond, and a handler that it sees twice has stalled. A look costs the leader
 * some 35 us on a virtual machine (a timer, two changes of threads, the caches), so where
 * no handler has waited for a while it looks less often. While nothing has happened for
 * some ticks the watcher dozes, so an idle crew makes no wake-ups.
 *
 * Who leads is not decided here but under the caller's lock (in Python: the GIL), which
 * also orders begin, end and call. A sleeper only learns that it may be needed.
 */
#include "prefork.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    QUIET_TICKS = 50, /* without a handler, until the watcher dozes */
    CALM_TICKS = 250, /* without a handler that waits, until it looks less often, */
    CALM_NAP = 5,     /* every so many ticks */
};

/* What a sleeper is told besides PF_CREW_*, which is the last that it is told. */
enum { NOTHING = 0, TO_WATCH = -1, TO_LOOK = -2 };

typedef struct sleeper {
    struct sleeper *next;
    unsigned long name;
    bool watches;
    atomic_int told;
} sleeper;

struct pf_crew {
    pthread_mutex_t lock;
    sleeper *idle;    /* a stack; the watcher is not in it */
    sleeper *watcher; /* NULL: nobody stands by */
    bool closed;
    atomic_int calm; /* ticks since a handler waited or somebody was called */
    long slept;      /* so often had a leader, when it was last asked */
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

/* ---- sleeping -----------------------------------------------------------------------
 * By futex(2): who waits at a condition variable is woken to take its mutex, and then
 * leaves that marked as one that others wait for, so the next unlock is a system call,
 * too. Here a wake-up is two calls, and who was taken off the stack needs no lock.
 */

/* Until something is told, for so many ns (0: for ever), or for no reason. false: the
 * time is up. */
static bool
sleep_on(sleeper *self, long ns)
{
    struct timespec t = {ns / 1000000000L, ns % 1000000000L};
    long rc = syscall(SYS_futex, &self->told, FUTEX_WAIT_PRIVATE, NOTHING,
                      ns > 0 ? &t : NULL, NULL, 0);
    return rc == 0 || errno != ETIMEDOUT;
}

/* Under the lock. Returns whom to wake(), or NULL. */
static atomic_int *
tell(sleeper *it, int what)
{
    int told = atomic_load(&it->told);
    if (told > 0 || (told < 0 && what < 0))
        return NULL;
    atomic_store(&it->told, what);
    return &it->told;
}

/* Without the lock, for who wakes up may run at once and want it. The sleeper may have
 * seen what it was told, and be gone, before: waking nobody at an address does no harm.
 */
static void
wake(atomic_int *told)
{
    if (told != NULL)
        syscall(SYS_futex, told, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* ---- standing by --------------------------------------------------------------------*/
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

static int
await(sleeper *self)
{
    int told;
    while ((told = atomic_load(&self->told)) == NOTHING)
        sleep_on(self, 0);
    return told;
}

/* The announcement comes before the second look at the stamp: either we see that a
 * handler has begun, or it sees that we doze and tells us to look. */
static void
doze(pf_crew *crew, sleeper *self)
{
    atomic_store(&crew->dozing, true);
    if (!is_inside(atomic_load(&crew->turn)))
        sleep_on(self, 0);
    atomic_store(&crew->dozing, false);
}

/* One look. true: the handler that it saw has stalled. */
static bool
look(pf_crew *crew, sleeper *self, int *quiet)
{
    uint64_t seen = atomic_load(&crew->turn);
    if (*quiet >= QUIET_TICKS && !is_inside(seen)) {
        doze(crew, self);
        *quiet = 0;
        return false;
    }
    int ticks = atomic_load(&crew->calm) < CALM_TICKS ? 1 : CALM_NAP;
    if (sleep_on(self, ticks * crew->tick_ns))
        return false;
    uint64_t now = atomic_load(&crew->turn);
    *quiet = now == seen ? *quiet + ticks : 0;
    if (atomic_load(&crew->calm) < CALM_TICKS)
        atomic_fetch_add(&crew->calm, ticks);
    return now == seen && is_inside(now);
}

/* Returns PF_CREW_*. */
static int
watch(pf_crew *crew, sleeper *self)
{
    int quiet = 0;
    for (;;) {
        int told = atomic_load(&self->told);
        if (told > 0)
            return told;
        if (told < 0)
            atomic_compare_exchange_strong(&self->told, &told, NOTHING);
        else if (look(crew, self, &quiet))
            return PF_CREW_STALLED;
    }
}

/* Somebody stays on watch as long as anybody stands by. */
static int
end_watch(pf_crew *crew, sleeper *self, int reason)
{
    atomic_int *next = NULL;
    pthread_mutex_lock(&crew->lock);
    crew->watcher = pop(crew);
    if (crew->watcher != NULL) {
        crew->watcher->watches = true;
        next = tell(crew->watcher, TO_WATCH);
    }
    pthread_mutex_unlock(&crew->lock);
    wake(next);
    int told = atomic_load(&self->told); /* perhaps since: but it is the last */
    return told > 0 ? told : reason;
}

/* What it has to do at first: PF_CREW_CLOSED, TO_WATCH, or NOTHING. */
static int
join(pf_crew *crew, sleeper *self)
{
    int told = NOTHING;
    pthread_mutex_lock(&crew->lock);
    if (crew->closed) {
        told = PF_CREW_CLOSED; /* it joins nobody, who could look for it later */
    } else if (crew->watcher == NULL) {
        told = TO_WATCH;
        self->watches = true;
        crew->watcher = self;
    } else {
        push(crew, self);
    }
    pthread_mutex_unlock(&crew->lock);
    return told;
}

int
pf_crew_wait(pf_crew *crew, unsigned long name)
{
    sleeper self = {.name = name};
    int told = join(crew, &self);
    if (told == NOTHING)
        told = await(&self);
    return self.watches ? end_watch(crew, &self, watch(crew, &self)) : told;
}

/* ---- leading ------------------------------------------------------------------------*/
static void
wake_watcher(pf_crew *crew)
{
    atomic_int *watcher = NULL;
    pthread_mutex_lock(&crew->lock);
    if (crew->watcher != NULL)
        watcher = tell(crew->watcher, TO_LOOK);
    pthread_mutex_unlock(&crew->lock);
    wake(watcher);
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

/* A handler that waits for less than a long nap is never seen to stall, whatever its kind:
 * each would be waited for. One that computes for as long is not to be looked at often. */
void
pf_crew_took_long(pf_crew *crew)
{
    struct rusage usage;
    if (getrusage(RUSAGE_THREAD, &usage) == 0 && usage.ru_nvcsw != crew->slept) {
        crew->slept = usage.ru_nvcsw;
        atomic_store(&crew->calm, 0);
    }
}

/* Tell who came last, or the watcher if there is nobody else. false: nobody stands by.
 * name: who that is; 0 if it is on its way already. */
static bool
wake_one(pf_crew *crew, int what, unsigned long *name)
{
    atomic_int *told = NULL;
    *name = 0;
    pthread_mutex_lock(&crew->lock);
    atomic_store(&crew->calm, 0);
    sleeper *chosen = pop(crew);
    if (chosen == NULL)
        chosen = crew->watcher;
    if (chosen != NULL && atomic_load(&chosen->told) <= 0) {
        *name = chosen->name;
        told = tell(chosen, what);
    }
    pthread_mutex_unlock(&crew->lock);
    wake(told);
    return chosen != NULL;
}

bool
pf_crew_call(pf_crew *crew)
{
    unsigned long name;
    return wake_one(crew, PF_CREW_CALLED, &name);
}

unsigned long
pf_crew_appoint(pf_crew *crew)
{
    unsigned long name;
    wake_one(crew, PF_CREW_APPOINTED, &name);
    return name;
}

void
pf_crew_close(pf_crew *crew)
{
    pthread_mutex_lock(&crew->lock);
    crew->closed = true;
    sleeper *each;
    while ((each = pop(crew)) != NULL)
        wake(tell(each, PF_CREW_CLOSED));
    if (crew->watcher != NULL)
        wake(tell(crew->watcher, PF_CREW_CLOSED));
    pthread_mutex_unlock(&crew->lock);
}
