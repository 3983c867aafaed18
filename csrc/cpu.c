/* cpu.c - what comes in several variants, by SIMD: which ones this CPU can run. */
#include "internal.h"

#include <errno.h>

static const char *const names[PF__CPU_VARIANTS] = {
    [PF__CPU_AVX2] = "avx2",
    [PF__CPU_SSE2] = "sse2",
    [PF__CPU_PORTABLE] = "portable",
};

static bool
can_run(pf__cpu variant)
{
    if (variant == PF__CPU_PORTABLE)
        return true;
#if defined(__x86_64__)
    if (variant == PF__CPU_SSE2)
        return true; /* x86-64 has it by definition */
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

pf__cpu
pf__cpu_best(void)
{
    pf__cpu variant = 0;
    while (!can_run(variant))
        variant++;
    return variant;
}

int
pf__cpu_find(const char *name)
{
    for (pf__cpu variant = 0; variant < PF__CPU_VARIANTS; variant++)
        if (strcmp(names[variant], name) == 0 && can_run(variant))
            return (int)variant;
    return -ENOTSUP;
}

const char *
pf__cpu_name(pf__cpu variant)
{
    return names[variant];
}
