/* timer.c - a hashed wheel of deadlines. The theory stands in internal.h.
 *
 * A timer sits in the slot of the tick at which its deadline has passed; one that lies
 * further away than the wheel is round sits in the last slot before the present and is
 * put on when its turn comes. used[] tells which slots hold anything, so that finding
 * the next one reads eight words.
 */
#include "internal.h"

static inline int64_t
tick_of(int64_t deadline) /* the first tick at which it has passed */
{
    int64_t round_up = ((int64_t)1 << PF__TIMER_TICK_SHIFT) - 1;
    return (deadline + round_up) >> PF__TIMER_TICK_SHIFT;
}

static inline unsigned
slot_of(int64_t tick)
{
    return (unsigned)(tick & (PF__TIMER_SLOTS - 1));
}

static void
take_out(pf__wheel *wheel, pf__timer *timer)
{
    unsigned slot = slot_of(timer->tick);
    *timer->link = timer->next;
    if (timer->next)
        timer->next->link = timer->link;
    timer->link = NULL;
    if (wheel->slots[slot] == NULL)
        wheel->used[slot / 64] &= ~((uint64_t)1 << (slot % 64));
}

static void
put_in(pf__wheel *wheel, pf__timer *timer, int64_t tick)
{
    unsigned slot = slot_of(tick);
    timer->tick = tick;
    timer->next = wheel->slots[slot];
    timer->link = &wheel->slots[slot];
    if (timer->next)
        timer->next->link = &timer->next;
    wheel->slots[slot] = timer;
    wheel->used[slot / 64] |= (uint64_t)1 << (slot % 64);
}

void
pf__timer_open(pf__wheel *wheel, int64_t now)
{
    *wheel = (pf__wheel){.tick = now >> PF__TIMER_TICK_SHIFT};
}

void
pf__timer_place(pf__wheel *wheel, pf__timer *timer)
{
    int64_t tick = tick_of(timer->deadline);
    int64_t last = wheel->tick + PF__TIMER_SLOTS - 1;
    if (tick > last)
        tick = last;
    if (tick <= wheel->tick)
        tick = wheel->tick + 1;
    if (timer->link != NULL) {
        if (timer->tick == tick)
            return;
        take_out(wheel, timer);
    }
    put_in(wheel, timer, tick);
}

void
pf__timer_cancel(pf__wheel *wheel, pf__timer *timer)
{
    timer->deadline = 0;
    if (timer->link != NULL)
        take_out(wheel, timer);
}

/* Move what is in this slot further on unless its deadline has passed. */
static pf__timer *
sweep_slot(pf__wheel *wheel, int64_t tick, int64_t now)
{
    pf__timer *timer = wheel->slots[slot_of(tick)], *next;
    for (; timer != NULL; timer = next) {
        next = timer->next;
        take_out(wheel, timer);
        if (timer->deadline == 0)
            continue;
        if (timer->deadline <= now)
            return timer;
        pf__timer_place(wheel, timer);
    }
    return NULL;
}

pf__timer *
pf__timer_expired(pf__wheel *wheel, int64_t now)
{
    int64_t present = now >> PF__TIMER_TICK_SHIFT;
    if (present - wheel->tick > PF__TIMER_SLOTS)
        wheel->tick = present - PF__TIMER_SLOTS; /* slept past the whole wheel */
    while (wheel->tick < present) {
        int64_t tick = wheel->tick + 1;
        if (wheel->slots[slot_of(tick)] != NULL) {
            pf__timer *timer = sweep_slot(wheel, tick, now);
            if (timer != NULL)
                return timer; /* the rest of this slot at the next call */
        }
        wheel->tick = tick;
    }
    return NULL;
}

int64_t
pf__timer_next(const pf__wheel *wheel)
{
    for (int i = 1; i <= PF__TIMER_SLOTS;) {
        unsigned slot = slot_of(wheel->tick + i);
        uint64_t word = wheel->used[slot / 64] >> (slot % 64);
        if (word == 0) {
            i += 64 - (int)(slot % 64);
            continue;
        }
        i += __builtin_ctzll(word);
        if (i > PF__TIMER_SLOTS)
            break;
        return (wheel->tick + i) << PF__TIMER_TICK_SHIFT;
    }
    return INT64_MAX;
}
