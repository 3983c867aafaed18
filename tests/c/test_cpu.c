/* test_cpu.c - which SIMD variants there are, and which of them is the best. */
#include "internal.h"

#include <errno.h>

static void
the_best_is_the_first_that_is_found(void)
{
    for (pf__cpu v = 0; v < pf__cpu_best(); v++)
        assert(pf__cpu_find(pf__cpu_name(v)) == -ENOTSUP);
    for (pf__cpu v = pf__cpu_best(); v < PF__CPU_VARIANTS; v++)
        assert(pf__cpu_find(pf__cpu_name(v)) == (int)v);
}

static void
every_cpu_runs_the_portable_one(void)
{
    assert(pf__cpu_find("portable") == PF__CPU_PORTABLE);
}

static void
a_variant_that_does_not_exist_is_refused(void)
{
    assert(pf__cpu_find("sse9") == -ENOTSUP);
    assert(pf__cpu_find("") == -ENOTSUP);
}

int
main(void)
{
    the_best_is_the_first_that_is_found();
    every_cpu_runs_the_portable_one();
    a_variant_that_does_not_exist_is_refused();
    return 0;
}
