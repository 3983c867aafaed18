/* test_http_cases.c - every HTTP case against the parser, between unreadable pages.
 *
 * tests/http_cases.py turns the Markdown of tests/http into a stream of lines, bytes in
 * hexadecimal, "-" for none:
 *
 *     case NAME                                 begins a case
 *     sent BYTES
 *     request METHOD TARGET BODY KEEP CONTINUE  the next request, as it must be parsed
 *     path BYTES | query BYTES | version BYTES  } of that request, if they are checked
 *     field NAME COUNT BYTES,BYTES,..           }
 *     error STATUS NAME CONTINUE                what refuses the input at last
 *     incomplete CONTINUE                       or: the parser waits for more
 *     end                                       ends the case
 *
 * CONTINUE says whether a 100 is due before the body. Each input is parsed with every
 * SIMD variant, ending exactly where an unreadable page begins and beginning exactly
 * where one ends; whole, byte by byte, and in two parts split at every position. All of
 * these must see the same spans, bytes and errors; what they see must be what the case
 * says.
 *
 * usage: test_http_cases [FILE]    "-": standard input; none: runs tests/http_cases.py
 */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    MAX_LINES = 256, /* of one case's expectation */
    SMALL = 2048,    /* larger inputs are split at PLACES positions only */
    PLACES = 64,
};

/* ---- A page that cannot be read on either side --------------------------------------*/
typedef struct pages {
    char *first, *last; /* the readable bytes; the page before and behind is not */
} pages;

static pages
open_pages(size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size = (size + page - 1) / page * page;
    char *map = mmap(NULL, size + 2 * page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map, page, PROT_NONE) != 0
        || mprotect(map + page + size, page, PROT_NONE) != 0) {
        perror("test_http_cases: guard page");
        exit(2);
    }
    return (pages){map + page, map + page + size};
}

/* ---- Cases --------------------------------------------------------------------------*/
typedef struct test_case {
    char *name;
    char *sent;
    size_t len;
    char *lines[MAX_LINES];
    int nlines;
} test_case;

__attribute__((format(printf, 1, 2), noreturn)) static void
stop(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("test_http_cases: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(2);
}

static int
hex_digit(char c)
{
    return c <= '9' ? c - '0' : c - 'a' + 10;
}

static void
read_sent(test_case *c, const char *hex)
{
    c->len = strcmp(hex, "-") == 0 ? 0 : strlen(hex) / 2;
    c->sent = malloc(c->len + 1);
    for (size_t i = 0; i < c->len; i++)
        c->sent[i] = (char)(hex_digit(hex[2 * i]) << 4 | hex_digit(hex[2 * i + 1]));
}

static void
free_case(test_case *c)
{
    free(c->name);
    free(c->sent);
    for (int i = 0; i < c->nlines; i++)
        free(c->lines[i]);
}

/* False at the end of the stream. */
static bool
read_case(FILE *in, test_case *c)
{
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    *c = (test_case){0};
    while ((n = getline(&line, &cap, in)) > 0) {
        line[n - 1] = '\0';
        if (strncmp(line, "case ", 5) == 0)
            c->name = strdup(line + 5);
        else if (strncmp(line, "sent ", 5) == 0)
            read_sent(c, line + 5);
        else if (c->nlines == MAX_LINES)
            stop("%s: more than %d lines", c->name, MAX_LINES);
        else
            c->lines[c->nlines++] = strdup(line);
        if (strcmp(line, "end") == 0) {
            free(line);
            return true;
        }
    }
    free(line);
    return false;
}

/* ---- What a run saw -----------------------------------------------------------------
 * The first run of a case is compared with the expectation, line by line; all others
 * with the first, by a digest of everything that was parsed.
 */
typedef struct run {
    const test_case *c;
    bool checking;
    int line; /* the expected line that is due */
    uint64_t digest;
    char *text; /* of a mismatch; NULL: none */
    /* the connection: bytes of the current request, and how far it is */
    pages room;
    bool at_end; /* placed to end at the unreadable page */
    char *data;
    size_t len;
    pf_head head;
    pf__head_state state;
    pf__chunked chunked;
    bool in_body, said_continue, ended;
    size_t raw, body_end;
    int requests;
    pf_options limits;
    pf__repeat
        known; /* from run to run: those that are only compared know the blocks */
} run;

static void
note(run *r, const void *data, size_t len)
{
    for (size_t i = 0; i < len; i++)
        r->digest = (r->digest ^ ((const uint8_t *)data)[i]) * 0x100000001b3;
}

static void
note_int(run *r, uint64_t n)
{
    note(r, &n, sizeof n);
}

static void
note_span(run *r, pf_span s)
{
    note_int(r, s.at);
    note_int(r, s.len);
    note(r, r->data + s.at, s.len);
}

static void
put_hex(FILE *out, const char *data, size_t len)
{
    if (len == 0)
        fputc('-', out);
    for (size_t i = 0; i < len; i++)
        fprintf(out, "%02x", (uint8_t)data[i]);
}

static const char *
expected_line(const run *r)
{
    return r->line < r->c->nlines ? r->c->lines[r->line] : "end";
}

static bool
next_is(const run *r, const char *word)
{
    size_t n = strlen(word);
    return strncmp(expected_line(r), word, n) == 0 && expected_line(r)[n] == ' ';
}

/* Takes seen. */
static void
check_line(run *r, char *seen)
{
    if (r->text == NULL && strcmp(seen, expected_line(r)) != 0) {
        if (asprintf(&r->text, "expected: %.300s\n        seen: %.300s",
                     expected_line(r), seen)
            < 0)
            abort();
    }
    r->line++;
    free(seen);
}

/* ---- Lines as the stream has them ---------------------------------------------------*/
static bool
has_body(const pf_head *head)
{
    return (head->flags & PF_HEAD_CHUNKED) || head->content_length > 0;
}

static char *
request_line(const run *r, const char *body, size_t len)
{
    char *text;
    size_t n;
    FILE *out = open_memstream(&text, &n);
    fputs("request ", out);
    put_hex(out, r->data + r->head.method.at, r->head.method.len);
    fputc(' ', out);
    put_hex(out, r->data + r->head.target.at, r->head.target.len);
    fputc(' ', out);
    put_hex(out, body, len);
    fprintf(out, " %d %d", (r->head.flags & PF_HEAD_KEEP_ALIVE) != 0, r->said_continue);
    fclose(out);
    return text;
}

static char *
part_line(const char *word, const char *data, size_t len)
{
    char *text;
    size_t n;
    FILE *out = open_memstream(&text, &n);
    fprintf(out, "%s ", word);
    put_hex(out, data, len);
    fclose(out);
    return text;
}

/* An empty path means "/". */
static char *
path_line(const run *r)
{
    pf_span path = r->head.path;
    if (path.len == 0)
        return part_line("path", "/", 1);
    return part_line("path", r->data + path.at, path.len);
}

/* The line of the field that the expected line asks for. */
static char *
field_line(const run *r)
{
    char *text, name[256];
    const char *hex = strchr(expected_line(r), ' ') + 1;
    size_t n, len = strcspn(hex, " ") / 2;
    int count = 0;
    FILE *list = open_memstream(&text, &n);
    if (len >= sizeof name)
        stop("%s: a field name is too long", r->c->name);
    for (size_t i = 0; i < len; i++)
        name[i] = (char)(hex_digit(hex[2 * i]) << 4 | hex_digit(hex[2 * i + 1]));
    for (int i = 0; i < r->head.nfields; i++) {
        const pf_field *f = &r->head.fields[i];
        if (f->name_len != len || strncasecmp(r->data + f->name_at, name, len) != 0)
            continue;
        if (count++ > 0)
            fputc(',', list);
        if (f->value_len > 0)
            put_hex(list, r->data + f->value_at, f->value_len);
    }
    fclose(list);
    char *line;
    if (asprintf(&line, "field %.*s %d %s", (int)(2 * len), hex, count,
                 n > 0 ? text : "-")
        < 0)
        abort();
    free(text);
    return line;
}

static void
check_request(run *r, const char *body, size_t len)
{
    check_line(r, request_line(r, body, len));
    for (;;) {
        const pf_head *h = &r->head;
        const char version[] = {'1', '.', (char)('0' + h->minor)};
        if (next_is(r, "path"))
            check_line(r, path_line(r));
        else if (next_is(r, "query"))
            check_line(r, part_line("query", r->data + h->query.at, h->query.len));
        else if (next_is(r, "version"))
            check_line(r, part_line("version", version, 3));
        else if (next_is(r, "field"))
            check_line(r, field_line(r));
        else
            return;
    }
}

static void
note_head(run *r)
{
    const pf_head *h = &r->head;
    note_span(r, h->method);
    note_span(r, h->target);
    note_span(r, h->path);
    note_span(r, h->query);
    note_span(r, h->authority);
    note_int(r, h->content_length);
    note_int(r, h->size);
    note_int(r, h->minor);
    note_int(r, h->flags);
    note_int(r, h->host);
    for (int i = 0; i < h->nfields; i++) {
        note_span(r, (pf_span){h->fields[i].name_at, h->fields[i].name_len});
        note_span(r, (pf_span){h->fields[i].value_at, h->fields[i].value_len});
        note_int(r, h->fields[i].id);
    }
}

/* ---- A connection's part: bytes in, requests out ------------------------------------*/
static void
begin_request(run *r)
{
    r->state = (pf__head_state){0};
    r->chunked = (pf__chunked){0};
    r->in_body = r->said_continue = false;
}

/* Make room for n bytes behind those that are there, and return where. */
static char *
make_room(run *r, size_t n)
{
    if (r->at_end) {
        memmove(r->data - n, r->data, r->len);
        r->data -= n;
    }
    r->len += n;
    return r->data + r->len - n;
}

static void
drop(run *r, size_t n)
{
    r->len -= n;
    if (r->at_end)
        r->data += n;
    else
        memmove(r->data, r->data + n, r->len);
}

static void
finish_request(run *r, size_t body_at, size_t body_end, size_t used)
{
    note(r, r->data + body_at, body_end - body_at);
    note_int(r, used);
    if (r->checking)
        check_request(r, r->data + body_at, body_end - body_at);
    r->requests++;
    r->ended = !(r->head.flags & PF_HEAD_KEEP_ALIVE);
    drop(r, used);
    begin_request(r);
}

static void
fail_request(run *r, int code)
{
    char *line;
    bool any = strstr(expected_line(r), " - ") != NULL;
    r->ended = true;
    note_int(r, (uint64_t)code);
    if (asprintf(&line, "error %d %s %d", pf_error_status(code),
                 any ? "-" : pf_error_name(code), r->said_continue)
        < 0)
        abort();
    if (r->checking)
        check_line(r, line);
    else
        free(line);
}

/* The head of a request: whether the next step may be taken. */
static bool
parse_head(run *r)
{
    int rc = pf__http_parse_head(&r->head, &r->state, r->data, r->len, &r->limits,
                                 r->checking ? NULL : &r->known);
    if (rc > 0 && r->head.content_length > r->limits.max_body_size)
        rc = PF_ERR_BODY_SIZE;
    if (rc < 0)
        fail_request(r, rc);
    if (rc <= 0)
        return false;
    note_head(r);
    r->in_body = true;
    r->raw = r->body_end = r->head.size;
    r->said_continue = (r->head.flags & PF_HEAD_EXPECT) && has_body(&r->head);
    return true;
}

static bool
parse_body(run *r)
{
    if (!(r->head.flags & PF_HEAD_CHUNKED)) {
        size_t end = r->head.size + r->head.content_length;
        if (r->len < end)
            return false;
        finish_request(r, r->head.size, end, end);
        return !r->ended;
    }
    int rc = pf__http_decode_chunked(&r->chunked, r->data, &r->raw, r->len,
                                     &r->body_end, r->limits.max_body_size, &r->limits);
    if (rc < 0)
        fail_request(r, rc);
    if (rc <= 0)
        return false;
    finish_request(r, r->head.size, r->body_end, r->raw);
    return !r->ended;
}

static void
deliver(run *r, const char *bytes, size_t n)
{
    if (r->ended)
        return;
    memcpy(make_room(r, n), bytes, n);
    while (r->len > 0)
        if (!(r->in_body ? parse_body(r) : parse_head(r)))
            return;
}

static void
check_end(run *r)
{
    bool incomplete = !r->ended && (r->len > 0 || r->requests == 0);
    note_int(r, incomplete);
    note_int(r, r->said_continue);
    if (!r->checking)
        return;
    if (incomplete)
        check_line(r, strdup(r->said_continue ? "incomplete 1" : "incomplete 0"));
    check_line(r, strdup("end"));
}

/* ---- Deliveries ---------------------------------------------------------------------
 * WHOLE; STEPS: byte by byte (of a large input, in PLACES parts); else split in two at
 * that position.
 */
enum { WHOLE = -1, STEPS = -2 };

static char running[512]; /* what crashed, if it crashes */

static uint64_t
run_case(const test_case *c, pages room, const char *variant, bool at_end,
         long delivery, bool checking, char **text)
{
    static run r; /* large, and its unused parts need not be cleared */
    snprintf(running, sizeof running, "%s (%s, %s page, delivery %ld)\n", c->name,
             variant, at_end ? "before a" : "behind a", delivery);
    r.c = c;
    r.checking = checking;
    r.digest = 0xcbf29ce484222325;
    r.line = r.requests = 0;
    r.text = NULL;
    r.room = room;
    r.at_end = at_end;
    r.data = at_end ? room.last : room.first;
    r.len = 0;
    r.ended = false;
    pf_options_init(&r.limits);
    begin_request(&r);
    if (delivery == WHOLE) {
        deliver(&r, c->sent, c->len);
    } else if (delivery == STEPS) {
        size_t step = c->len > SMALL ? c->len / PLACES : 1;
        for (size_t i = 0; i < c->len; i += step)
            deliver(&r, c->sent + i, c->len - i < step ? c->len - i : step);
    } else {
        deliver(&r, c->sent, (size_t)delivery);
        deliver(&r, c->sent + delivery, c->len - (size_t)delivery);
    }
    check_end(&r);
    *text = r.text;
    return r.digest;
}

static int
compare(const test_case *c, pages room, const char *variant, long delivery,
        uint64_t expected)
{
    int failed = 0;
    for (int at_end = 0; at_end < 2; at_end++) {
        char *text;
        if (run_case(c, room, variant, at_end, delivery, false, &text) == expected)
            continue;
        printf("differs from whole, portable: %s", running);
        failed++;
    }
    return failed;
}

/* Every delivery in one variant; at the first difference the rest is spared. */
static int
test_variant(const test_case *c, pages room, const char *variant, uint64_t expected)
{
    int failed = compare(c, room, variant, WHOLE, expected)
                 + compare(c, room, variant, STEPS, expected);
    size_t step = c->len > SMALL ? c->len / PLACES : 1;
    for (size_t at = 1; at < c->len && failed == 0; at += step)
        failed += compare(c, room, variant, (long)at, expected);
    return failed;
}

static int
test(const test_case *c)
{
    static const char *const variants[] = {"portable", "sse2", "avx2"};
    static pages shared;
    static size_t size;
    char *text;
    int failed = 0;
    if (c->len > size || size == 0)
        shared = open_pages(size = c->len + (1 << 20));
    pf_http_set_simd("portable");
    uint64_t expected = run_case(c, shared, "portable", true, WHOLE, true, &text);
    if (text != NULL) {
        printf("%s\n    %s\n", c->name, text);
        free(text);
        failed++;
    }
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if (pf_http_set_simd(variants[i]) == 0)
            failed += test_variant(c, shared, variants[i], expected);
    return failed > 0;
}

/* ---- The program --------------------------------------------------------------------*/
static void
crashed(int signal)
{
    static const char what[] = "read or wrote outside its bytes: ";
    if (write(2, what, sizeof what - 1) < 0 || write(2, running, strlen(running)) < 0)
        _exit(128 + signal);
    _exit(1);
}

static FILE *
open_input(int argc, char **argv)
{
    if (argc > 1)
        return strcmp(argv[1], "-") == 0 ? stdin : fopen(argv[1], "r");
    return popen("python3 tests/http_cases.py", "r");
}

int
main(int argc, char **argv)
{
    FILE *in = open_input(argc, argv);
    int cases = 0, failed = 0;
    test_case c;
    if (in == NULL)
        stop("%s: %s", argc > 1 ? argv[1] : "python3", strerror(errno));
    signal(SIGSEGV, crashed);
    signal(SIGBUS, crashed);
    while (read_case(in, &c)) {
        failed += test(&c);
        free_case(&c);
        cases++;
    }
    if (argc == 1 && pclose(in) != 0)
        stop("python3 tests/http_cases.py failed");
    printf("%d cases", cases);
    if (failed > 0)
        printf(", %d failed", failed);
    puts("");
    return failed > 0 || cases == 0;
}
