/* test_error.c - the table of errors: no code twice, a status for each peer's fault. */
#undef NDEBUG
#include "prefork.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

static const struct {
    int code, status;
    const char *name, *text;
} errors[] = {
#define X(name, code, status, text) {PF_ERR_##name, status, #name, text},
    PF_ERRORS(X)
#undef X
};

enum { NERRORS = sizeof errors / sizeof *errors };

static void
every_error_has_its_name_text_and_status(void)
{
    for (int i = 0; i < NERRORS; i++) {
        assert(strcmp(pf_error_name(errors[i].code), errors[i].name) == 0);
        assert(strcmp(pf_error_text(errors[i].code), errors[i].text) == 0);
        assert(pf_error_status(errors[i].code) == errors[i].status);
    }
}

static void
no_two_errors_share_a_code_a_name_or_a_text(void)
{
    for (int i = 0; i < NERRORS; i++)
        for (int j = 0; j < i; j++) {
            assert(errors[i].code != errors[j].code);
            assert(strcmp(errors[i].name, errors[j].name) != 0);
            assert(strcmp(errors[i].text, errors[j].text) != 0);
        }
}

static void
codes_lie_far_below_any_errno(void)
{
    for (int i = 0; i < NERRORS; i++)
        assert(errors[i].code < -4096);
}

/* A peer is only ever told that it, or the server, cannot: never a success. */
static void
a_peer_error_has_a_status_that_says_no(void)
{
    for (int i = 0; i < NERRORS; i++) {
        int status = errors[i].status;
        assert(status == 0 || (status >= 400 && status <= 599));
    }
    assert(pf_error_status(PF_ERR_APP_LENGTH) == 0);
    assert(pf_error_status(PF_ERR_CHUNK_SIZE) == 400);
}

static void
texts_fit_in_a_line_and_need_no_escape(void)
{
    for (int i = 0; i < NERRORS; i++) {
        size_t len = strlen(errors[i].text);
        assert(len > 0 && len < 80);
        for (size_t k = 0; k < len; k++)
            assert(errors[i].text[k] >= ' ' && errors[i].text[k] <= '~');
    }
}

static void
errno_is_worded_and_what_is_unknown_says_so(void)
{
    assert(strcmp(pf_error_text(-ENOMEM), strerror(ENOMEM)) == 0);
    assert(strcmp(pf_error_text(0), "no error") == 0);
    assert(strcmp(pf_error_text(7), "no error") == 0);
    assert(strcmp(pf_error_text(-30000), "unknown error") == 0);
    assert(strcmp(pf_error_name(-ENOMEM), "") == 0);
    assert(pf_error_status(-ENOMEM) == 0 && pf_error_status(0) == 0);
}

int
main(void)
{
    every_error_has_its_name_text_and_status();
    no_two_errors_share_a_code_a_name_or_a_text();
    codes_lie_far_below_any_errno();
    a_peer_error_has_a_status_that_says_no();
    texts_fit_in_a_line_and_need_no_escape();
    errno_is_worded_and_what_is_unknown_says_so();
    return 0;
}
