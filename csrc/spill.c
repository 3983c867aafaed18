/* spill.c - a request's body in a temporary file.
 *
 * The file has no name, so that it is gone with its last descriptor, also when the
 * process is killed. It is written by offset: whoever takes the descriptor over finds
 * it at its beginning.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

/* For file systems that make no file without a name. */
static int
open_unlinked(const char *dir)
{
    char path[PATH_MAX];
    int n = snprintf(path, sizeof path, "%s/prefork-XXXXXX", dir);
    if (n < 0 || (size_t)n >= sizeof path)
        return -ENAMETOOLONG;
    int fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0)
        return -errno;
    unlink(path);
    return fd;
}

int
pf__spill_open(const char *dir)
{
    int fd;
    do
        fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    while (fd < 0 && errno == EINTR);
    if (fd >= 0)
        return fd;
    bool unknown = errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL;
    return unknown ? open_unlinked(dir) : -errno;
}

int
pf__spill_write(int fd, const char *data, size_t len, uint64_t offset)
{
    while (len > 0) {
        ssize_t n = pwrite(fd, data, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        data += n;
        len -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

void
pf__spill_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}
