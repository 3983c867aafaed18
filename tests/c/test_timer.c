/* test_timer.c - deadlines are never early and at most a tick late. */
#undef NDEBUG
#include "internal.h"

enum {
    TICK = 1 << PF__TIMER_TICK_SHIFT,
    ROUND = TICK * PF__TIMER_SLOTS, /* once around the wheel */
};

static const int64_t START = 1234567; /* of no particular phase */

static pf__wheel wheel;

static unsigned
random_below(unsigned n)
{
    static uint32_t x = 2463534242;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x % n;
}

/* The moment at which a deadline is due to be reported. */
static int64_t
due(int64_t deadline)
{
    return (deadline + TICK - 1) / TICK * TICK;
}

/* Follow the wheel's own word from moment to moment until something expires. */
static int64_t
run_until_expired(int64_t now, const pf__timer *timer)
{
    pf__timer *expired = NULL;
    while (expired == NULL) {
        int64_t next = pf__timer_next(&wheel);
        assert(next != INT64_MAX && next > now);
        now = next;
        expired = pf__timer_expired(&wheel, now);
    }
    assert(expired == timer && timer->link == NULL);
    return now;
}

static void
nothing_is_due_in_an_empty_wheel(void)
{
    pf__timer_open(&wheel, START);
    assert(pf__timer_next(&wheel) == INT64_MAX);
    assert(pf__timer_expired(&wheel, START + 10 * ROUND) == NULL);
}

static void
a_deadline_is_not_early_and_at_most_a_tick_late(void)
{
    for (int64_t after = 1; after < 3 * ROUND; after += 1 + after / 50) {
        pf__timer timer = {0};
        pf__timer_open(&wheel, START);
        pf__timer_set(&wheel, &timer, START + after);
        int64_t now = run_until_expired(START, &timer);
        assert(now >= START + after && now < START + after + TICK);
        assert(pf__timer_next(&wheel) == INT64_MAX);
    }
}

static void
a_deadline_that_has_passed_is_due_at_the_next_tick(void)
{
    pf__timer timer = {0};
    pf__timer_open(&wheel, START);
    pf__timer_set(&wheel, &timer, START - 1000);
    assert(run_until_expired(START, &timer) <= START + TICK);
}

static void
a_cancelled_timer_never_expires(void)
{
    pf__timer a = {0}, b = {0};
    pf__timer_open(&wheel, START);
    pf__timer_set(&wheel, &a, START + 100);
    pf__timer_set(&wheel, &b, START + 100);
    pf__timer_cancel(&wheel, &a);
    pf__timer_cancel(&wheel, &a);
    assert(pf__timer_expired(&wheel, START + 200) == &b);
    assert(pf__timer_expired(&wheel, START + ROUND) == NULL);
}

static void
a_deadline_of_zero_is_none(void)
{
    pf__timer timer = {0};
    pf__timer_open(&wheel, START);
    pf__timer_set(&wheel, &timer, 0);
    assert(timer.link == NULL);
    pf__timer_set(&wheel, &timer, START + 100);
    pf__timer_set(&wheel, &timer, 0);
    assert(pf__timer_expired(&wheel, START + ROUND) == NULL);
    assert(pf__timer_next(&wheel) == INT64_MAX);
}

static void
a_deadline_that_moves_later_leaves_its_timer_in_place(void)
{
    pf__timer timer = {0};
    pf__timer_open(&wheel, START);
    pf__timer_set(&wheel, &timer, START + 100);
    int64_t tick = timer.tick;
    pf__timer_set(&wheel, &timer, START + 5000);
    assert(timer.tick == tick);
    assert(pf__timer_expired(&wheel, START + 200) == NULL && timer.tick > tick);
    int64_t now = run_until_expired(START + 200, &timer);
    assert(now >= START + 5000 && now < START + 5000 + TICK);
}

static void
a_deadline_that_moves_earlier_counts_at_once(void)
{
    pf__timer timer = {0};
    pf__timer_open(&wheel, START);
    pf__timer_set(&wheel, &timer, START + 2 * ROUND);
    pf__timer_set(&wheel, &timer, START + 5000);
    pf__timer_set(&wheel, &timer, START + 300);
    int64_t now = run_until_expired(START, &timer);
    assert(now >= START + 300 && now < START + 300 + TICK);
}

static void
a_sleep_past_the_whole_wheel_misses_no_timer(void)
{
    enum { N = 3 * PF__TIMER_SLOTS };
    static pf__timer timers[N];
    pf__timer_open(&wheel, START);
    for (int i = 0; i < N; i++)
        pf__timer_set(&wheel, &timers[i], START + 1 + (int64_t)i * 90);
    int64_t now = START + 10 * ROUND;
    int expired = 0;
    while (pf__timer_expired(&wheel, now) != NULL)
        expired++;
    assert(expired == N);
}

static void
a_sleep_past_the_whole_wheel_makes_no_timer_early(void)
{
    pf__timer soon = {0}, late = {0};
    int64_t now = START + 7 * ROUND + 5;
    pf__timer_open(&wheel, START);
    pf__timer_set(&wheel, &soon, START + 100);
    pf__timer_set(&wheel, &late, now + 1000);
    assert(pf__timer_expired(&wheel, now) == &soon);
    assert(pf__timer_expired(&wheel, now) == NULL);
    now = run_until_expired(now, &late);
    assert(now >= late.deadline && now < late.deadline + TICK);
}

static void
all_timers_of_one_slot_expire_in_one_moment(void)
{
    enum { N = 100 };
    static pf__timer timers[N];
    pf__timer_open(&wheel, START);
    for (int i = 0; i < N; i++)
        pf__timer_set(&wheel, &timers[i], START + 500);
    for (int i = 0; i < N; i++)
        assert(pf__timer_expired(&wheel, START + 600) != NULL);
    assert(pf__timer_expired(&wheel, START + 600) == NULL);
}

/* ---- against a sorted array ---------------------------------------------------------*/
enum { MANY = 400 };

static pf__timer timers[MANY];
static int64_t due_at[MANY]; /* when it must have been reported; 0: it is not set */

static int64_t
soonest(void)
{
    int64_t first = INT64_MAX;
    for (int i = 0; i < MANY; i++)
        if (due_at[i] != 0 && due_at[i] < first)
            first = due_at[i];
    return first;
}

static void
set_one(int64_t now)
{
    unsigned i = random_below(MANY);
    static const unsigned reach[] = {TICK, 5000, ROUND, 6 * ROUND};
    int64_t deadline = now + random_below(reach[random_below(4)]);
    pf__timer_set(&wheel, &timers[i], deadline);
    int64_t next = (now / TICK + 1) * TICK; /* the present tick was looked at */
    due_at[i] = due(deadline) < next ? next : due(deadline);
}

static void
cancel_one(void)
{
    unsigned i = random_below(MANY);
    pf__timer_cancel(&wheel, &timers[i]);
    due_at[i] = 0;
}

static void
expire_all(int64_t now)
{
    pf__timer *timer;
    while ((timer = pf__timer_expired(&wheel, now)) != NULL) {
        int64_t i = timer - timers;
        assert(due_at[i] != 0 && timer->deadline <= now);
        due_at[i] = 0;
    }
    assert(soonest() > now);
}

/* The next wake-up may be needless, but is never late and never in the past. */
static int64_t
wake_up(int64_t now)
{
    int64_t next = pf__timer_next(&wheel);
    assert(next > now && next <= soonest());
    return next;
}

static void
many_timers_agree_with_a_model(void)
{
    int64_t now = START;
    pf__timer_open(&wheel, now);
    for (int round = 0; round < 20000; round++) {
        for (unsigned n = random_below(6); n > 0; n--)
            set_one(now);
        if (random_below(3) == 0)
            cancel_one();
        int64_t next = wake_up(now);
        unsigned how = random_below(100);
        if (how < 50)
            now += random_below(200);
        else if (how < 60)
            now += random_below(3 * ROUND);
        else if (next != INT64_MAX)
            now = next;
        expire_all(now);
    }
    for (int64_t next; (next = wake_up(now)) != INT64_MAX; now = next)
        expire_all(next);
    assert(soonest() == INT64_MAX);
}

int
main(void)
{
    nothing_is_due_in_an_empty_wheel();
    a_deadline_is_not_early_and_at_most_a_tick_late();
    a_deadline_that_has_passed_is_due_at_the_next_tick();
    a_cancelled_timer_never_expires();
    a_deadline_of_zero_is_none();
    a_deadline_that_moves_later_leaves_its_timer_in_place();
    a_deadline_that_moves_earlier_counts_at_once();
    a_sleep_past_the_whole_wheel_misses_no_timer();
    a_sleep_past_the_whole_wheel_makes_no_timer_early();
    all_timers_of_one_slot_expire_in_one_moment();
    many_timers_agree_with_a_model();
    return 0;
}
