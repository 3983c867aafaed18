# cython: language_level=3, binding=True, freethreading_compatible=False
"""Which files of a directory change."""
import os
import sys

from prefork._core cimport check, pf_files_open, pf_files_watch


cdef class FileWatch:
    """Tells which files change in some directories; fileno() can be read then."""

    cdef int fd

    def __cinit__(self):
        self.fd = -1
        self.fd = check(pf_files_open())

    def __dealloc__(self):
        self.close()

    def fileno(self):
        """Its fd."""
        return self.fd

    def add(self, directory):
        """Watch this directory, too. OSError."""
        cdef bytes name = os.fsencode(directory)
        check(pf_files_watch(self.fd, name))

    def read(self):
        """The names that were written, moved here, made or removed since; a set."""
        found = set()
        while True:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return found
            while data:  # struct inotify_event, of inotify(7)
                size = int.from_bytes(data[12:16], sys.byteorder)
                found.add(os.fsdecode(data[16:16 + size].rstrip(b"\0")))
                data = data[16 + size:]

    def close(self):
        """Watch no more; may be repeated."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
