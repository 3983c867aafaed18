/* core.c - the C core by itself: every request is answered from C.
 *
 * What it costs above limit.c is the core's; what prefork costs above it is Python's.
 */
#include "prefork.h"
#include "program.h"

#include <getopt.h>
#include <string.h>

enum { BATCH = 256 };

static void
check(int rc, const char *what)
{
    if (rc >= 0)
        return;
    fprintf(stderr, "%s: %s\n", what, pf_error_text(rc));
    exit(1);
}

static int
open_listener(uint16_t port)
{
    pf_socket_spec spec = {
        .family = AF_INET,
        .host = "127.0.0.1",
        .port = port,
        .backlog = 4096,
        .mode = -1,
        .flags = PF_SOCKET_DEFER_ACCEPT, /* as prefork does */
    };
    int fd = pf_socket_listen(&spec);
    check(fd, "listen");
    tell_port(fd);
    return fd;
}

static void
serve(pf_loop *loop, char *body, size_t size)
{
    pf_event events[BATCH];
    for (;;) {
        int n = pf_loop_wait(loop, events, BATCH, -1);
        check(n, "wait");
        for (int i = 0; i < n; i++) {
            const pf_event *event = &events[i];
            if (event->flags & PF_EVENT_REQUEST)
                check(pf_request_answer(event->request, 200, NULL, 0, body, size, body),
                      "answer");
        }
    }
}

int
main(int argc, char **argv)
{
    static const struct option LONG[] = {{"body", required_argument, NULL, 'b'}, {0}};
    static char hello[] = "Hello, World!";
    char *body = hello;
    size_t size = sizeof hello - 1;
    while (getopt_long(argc, argv, "", LONG, NULL) == 'b') {
        size = strtoul(optarg, NULL, 10);
        body = malloc(size);
        if (body == NULL)
            abort();
        memset(body, 'x', size);
    }
    pf_options options;
    pf_loop *loop;
    pf_options_init(&options);
    check(pf_loop_open(&loop, &options), "open");
    uint16_t port = optind < argc ? (uint16_t)atoi(argv[optind]) : 0;
    check(pf_loop_listen(loop, open_listener(port)), "listen");
    serve(loop, body, size);
}
