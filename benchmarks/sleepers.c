/* sleepers.c - the least that a server can cost whose handlers sleep for 100 ms.
 *
 * A thread for each connection reads, sleeps, writes, and does nothing else: two changes
 * of threads a request, and no lock that another thread wants. It prints its port.
 */
#include "program.h"

#include <pthread.h>

enum { SLEEP_NS = 100000000, STACK = 1 << 16 };

static const char ANSWER[] = "HTTP/1.1 200 OK\r\n"
                             "Content-Length: 13\r\n\r\n"
                             "Hello, World!";

static void *
serve(void *connection)
{
    static const struct timespec nap = {.tv_nsec = SLEEP_NS};
    int fd = (int)(intptr_t)connection;
    char request[4096]; /* which comes in one piece: this is no server for others */
    while (recv(fd, request, sizeof request, 0) > 0) {
        nanosleep(&nap, NULL);
        if (send(fd, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL) < 0)
            break;
    }
    close(fd);
    return NULL;
}

int
main(void)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK);
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    raise_limit();
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    listen_at(listener, 0);
    for (;;) {
        pthread_t thread;
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            die("accept");
        if (pthread_create(&thread, &small, serve, (void *)(intptr_t)fd) != 0)
            die("thread");
    }
}
