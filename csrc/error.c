/* error.c - one table: code, HTTP status, text. */
#include "internal.h"

#include <string.h>

static const struct {
    int code, status;
    const char *name, *text;
} errors[] = {
#define X(name, code, status, text) {code, status, #name, text},
    PF_ERRORS(X)
#undef X
};

enum { NERRORS = sizeof errors / sizeof *errors };

static int
find(int code)
{
    for (int i = 0; i < NERRORS; i++)
        if (errors[i].code == code)
            return i;
    return -1;
}

const char *
pf_error_text(int code)
{
    int i = find(code);
    if (i >= 0)
        return errors[i].text;
    if (code >= 0)
        return "no error";
    return code > -4096 ? strerror(-code) : "unknown error";
}

const char *
pf_error_name(int code)
{
    int i = find(code);
    return i >= 0 ? errors[i].name : "";
}

int
pf_error_status(int code)
{
    int i = find(code);
    return i >= 0 ? errors[i].status : 0;
}
