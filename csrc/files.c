/* files.c - which files of a directory change (inotify). */
#include "internal.h"

#include <errno.h>
#include <sys/inotify.h>

int
pf_files_open(void)
{
    int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* A file is written, moved over another, or a link to where it lies is made anew. */
int
pf_files_watch(int fd, const char *directory)
{
    const uint32_t changes = IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_DELETE;
    return inotify_add_watch(fd, directory, changes | IN_ONLYDIR) < 0 ? -errno : 0;
}
