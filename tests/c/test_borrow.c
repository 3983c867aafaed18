/* test_borrow.c - a loop that other threads answer through while its own one sleeps. */
#define _GNU_SOURCE
#undef NDEBUG
#include "live.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#define LAST "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

/* ---- alone --------------------------------------------------------------------------*/
static void
a_loop_that_nobody_shares_is_not_borrowed(void)
{
    open_server(0);
    assert(!pf_loop_borrow(loop));
    close_server();
}

static void
a_loop_at_work_is_not_borrowed(void)
{
    open_server(0);
    pf_loop_share(loop);
    assert(!pf_loop_borrow(loop));
    quiet(1);
    assert(!pf_loop_borrow(loop));
    close_server();
}

/* ---- one borrower -------------------------------------------------------------------*/
static void
borrow(void)
{
    while (!pf_loop_borrow(loop))
        sched_yield();
}

static void *
answer_once(void *request)
{
    borrow();
    assert(!pf_loop_borrow(loop)); /* by one at a time */
    answer(request, "x");
    pf_loop_return(loop);
    return NULL;
}

static void
hear_blocking(int fd)
{
    static const char end[] = "\r\n\r\nx";
    char byte;
    for (size_t seen = 0; seen < sizeof end - 1;) {
        assert(recv(fd, &byte, 1, 0) == 1);
        seen = byte == end[seen] ? seen + 1 : byte == end[0];
    }
}

static pthread_t
started(void *(*function)(void *), void *argument)
{
    pthread_t thread;
    assert(pthread_create(&thread, NULL, function, argument) == 0);
    return thread;
}

static atomic_bool peer_heard_the_end;

static void *
hear_the_end(void *peer)
{
    char byte;
    hear_blocking(*(int *)peer);
    assert(recv(*(int *)peer, &byte, 1, 0) == 0);
    peer_heard_the_end = true;
    assert(pf_loop_wake(loop) == 0);
    return NULL;
}

static void
an_idle_connection_that_a_borrower_answered_times_out(void)
{
    options.idle_timeout_ms = 50;
    open_server(0);
    pf_loop_share(loop);
    int peer = peer_saying(GET);
    pthread_t borrower = started(answer_once, next_request());
    pthread_t hearer = started(hear_the_end, &peer);
    int64_t end = clock_ms() + SOON_MS;
    while (!peer_heard_the_end) {
        pf_event event;
        assert(pf_loop_wait(loop, &event, 1, SOON_MS) >= 0 && clock_ms() < end);
    }
    pthread_join(borrower, NULL);
    pthread_join(hearer, NULL);
    close(peer);
    close_server();
}

static void
the_request_behind_the_one_that_a_borrower_answers_wakes_the_sleeper(void)
{
    open_server(0);
    pf_loop_share(loop);
    int peer = peer_saying(GET LAST);
    pthread_t borrower = started(answer_once, next_request());
    pf_event event;
    do
        event = next_event();
    while (event.flags == PF_EVENT_WOKEN);
    assert(event.flags == PF_EVENT_REQUEST);
    pthread_join(borrower, NULL);
    answer(event.request, "x");
    while (!nobody_is_connected())
        assert(pf_loop_wait(loop, &event, 1, 5) == 0 || event.flags == PF_EVENT_WOKEN);
    close(peer);
    close_server();
}

static void *
answer_both(void *request)
{
    pf_event event;
    borrow();
    answer(request, "x");
    assert(pf_loop_poll(loop, &event) && event.flags == PF_EVENT_REQUEST);
    assert(!pf_loop_poll(loop, &event));
    answer(event.request, "x");
    pf_loop_return(loop);
    return NULL;
}

static void
a_borrower_may_take_the_next_request_and_nobody_else_hears_of_it(void)
{
    open_server(0);
    pf_loop_share(loop);
    int peer = peer_saying(GET LAST);
    pthread_t borrower = started(answer_both, next_request());
    pf_event event;
    while (!nobody_is_connected())
        assert(pf_loop_wait(loop, &event, 1, 5) == 0);
    pthread_join(borrower, NULL);
    close(peer);
    close_server();
}

static void *
answer_and_wake(void *request)
{
    pf_event event;
    borrow();
    assert(pf_loop_wake(loop) == 0);
    answer(request, "x");
    assert(!pf_loop_poll(loop, &event));
    pf_loop_return(loop);
    return NULL;
}

static void
what_a_borrower_comes_upon_but_may_not_take_is_the_sleepers(void)
{
    open_server(0);
    pf_loop_share(loop);
    int peer = peer_saying(GET);
    pthread_t borrower = started(answer_and_wake, next_request());
    expect_event(PF_EVENT_WOKEN, NULL);
    pthread_join(borrower, NULL);
    hear_blocking(peer);
    close(peer);
    close_server();
}

/* ---- many ---------------------------------------------------------------------------*/
enum { PEERS = 4, ROUNDS = 300, THREADS = 3, QUEUE = 64 };

static struct {
    pthread_mutex_t lock;
    pf_request *items[QUEUE];
    int count;
} given = {.lock = PTHREAD_MUTEX_INITIALIZER},
  left = {.lock = PTHREAD_MUTEX_INITIALIZER};

static atomic_int served, borrowed;
static atomic_bool over;

#define PUSH(queue, item)                                                              \
    do {                                                                               \
        pthread_mutex_lock(&(queue).lock);                                             \
        assert((queue).count < QUEUE);                                                 \
        (queue).items[(queue).count++] = item;                                         \
        pthread_mutex_unlock(&(queue).lock);                                           \
    } while (0)

#define POP(queue, out)                                                                \
    do {                                                                               \
        pthread_mutex_lock(&(queue).lock);                                             \
        out = (queue).count > 0 ? (queue).items[--(queue).count] : NULL;               \
        pthread_mutex_unlock(&(queue).lock);                                           \
    } while (0)

/* Takes requests, and answers those for which it can have the loop; then looks for
 * another one. */
static void *
borrow_often(void *unused)
{
    (void)unused;
    while (!over) {
        pf_request *r;
        POP(given, r);
        if (r == NULL) {
            sched_yield();
        } else if (pf_loop_borrow(loop)) {
            pf_event event;
            answer(r, "x");
            if (pf_loop_poll(loop, &event))
                PUSH(given, event.request);
            pf_loop_return(loop);
            borrowed++;
        } else {
            PUSH(left, r);
            assert(pf_loop_wake(loop) == 0);
        }
    }
    return NULL;
}

/* Keeps some connections, opens others anew, and sends two requests at a time. */
static void *
ask_often(void *unused)
{
    (void)unused;
    int peer = connected_peer();
    for (int i = 0; i < ROUNDS; i++) {
        bool last = i % 4 == 3;
        say(peer, last ? GET LAST : GET GET);
        hear_blocking(peer);
        hear_blocking(peer);
        served += 2;
        if (!last)
            continue;
        close(peer);
        peer = connected_peer();
    }
    close(peer);
    return NULL;
}

static void
take_event(const pf_event *event)
{
    pf_request *r;
    if (event->flags == PF_EVENT_REQUEST)
        PUSH(given, event->request);
    else
        assert(event->flags == PF_EVENT_WOKEN);
    for (;;) {
        POP(left, r);
        if (r == NULL)
            return;
        answer(r, "x");
    }
}

static void
all_that_many_threads_answer_arrives(void)
{
    pthread_t peers[PEERS], threads[THREADS];
    int64_t end = clock_ms() + 6 * SOON_MS;
    open_server(0);
    pf_loop_share(loop);
    for (int i = 0; i < PEERS; i++)
        peers[i] = started(ask_often, NULL);
    for (int i = 0; i < THREADS; i++)
        threads[i] = started(borrow_often, NULL);
    while (served < 2 * PEERS * ROUNDS || !nobody_is_connected()) {
        pf_event events[8];
        int n = pf_loop_wait(loop, events, 8, 100);
        assert(n >= 0 && clock_ms() < end);
        for (int i = 0; i < n; i++)
            take_event(&events[i]);
    }
    over = true;
    for (int i = 0; i < PEERS; i++)
        pthread_join(peers[i], NULL);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    assert(served == 2 * PEERS * ROUNDS && borrowed > 0);
    close_server();
}

int
main(void)
{
    pf_options_init(&options);
    a_loop_that_nobody_shares_is_not_borrowed();
    a_loop_at_work_is_not_borrowed();
    an_idle_connection_that_a_borrower_answered_times_out();
    the_request_behind_the_one_that_a_borrower_answers_wakes_the_sleeper();
    a_borrower_may_take_the_next_request_and_nobody_else_hears_of_it();
    what_a_borrower_comes_upon_but_may_not_take_is_the_sleepers();
    all_that_many_threads_answer_arrives();
}
