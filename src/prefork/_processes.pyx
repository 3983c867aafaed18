# cython: language_level=3, binding=True, freethreading_compatible=False
"""Children, and signals: how they are started, awaited, told and reaped.

The GIL is released only around the call that sleeps.
"""
import os

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdlib cimport free, malloc

from prefork._core cimport (
    PF_PROCESS_EXITED,
    PF_PROCESS_FDS,
    PF_PROCESS_FIRST_FD,
    PF_PROCESS_READABLE,
    PF_PROCESS_SIGNALLED,
    PF_PROCESS_STATUS_UNKNOWN,
    check,
    milliseconds,
    pf_process_adopt,
    pf_process_close,
    pf_process_event,
    pf_process_forget,
    pf_process_is_reaper,
    pf_process_kill,
    pf_process_open,
    pf_process_program,
    pf_process_reap_strangers,
    pf_process_set_parent_death_signal,
    pf_process_set_reaper,
    pf_process_start,
    pf_process_unwatch,
    pf_process_wait,
    pf_process_watch,
    pf_processes,
)

EXITED = PF_PROCESS_EXITED
SIGNALLED = PF_PROCESS_SIGNALLED
READABLE = PF_PROCESS_READABLE
STATUS_UNKNOWN = PF_PROCESS_STATUS_UNKNOWN

cdef enum:
    MAX_EVENTS = 64
    MAX_SIGNALS = 64


cdef class Processes:
    """Children and signals of this process behind one blocking wait.

    Belongs to the thread that made it: there the signals stay blocked until close().
    """

    cdef pf_processes *handle

    def __cinit__(self, signals=()):
        cdef int numbers[MAX_SIGNALS]
        cdef int count = 0
        for number in signals:
            if count == MAX_SIGNALS:
                raise ValueError("too many signals")
            numbers[count] = number
            count += 1
        check(pf_process_open(&self.handle, numbers, count))

    def __dealloc__(self):
        pf_process_close(self.handle)

    cdef pf_processes *opened(self) except NULL:
        if self.handle is NULL:
            raise ValueError("this Processes is closed")
        return self.handle

    def adopt(self, int pid):
        """Watch a child of ours; wait() reaps it and tells (EXITED, pid, status)."""
        check(pf_process_adopt(self.opened(), pid))

    def watch(self, int fd):
        """Have wait() tell (READABLE, fd, 0) for as long as fd can be read."""
        check(pf_process_watch(self.opened(), fd))

    def unwatch(self, int fd):
        """Forget a watched fd; to be called before it is closed."""
        check(pf_process_unwatch(self.opened(), fd))

    def wait(self, timeout=None):
        """Sleep until something happens, at most timeout seconds (None: for ever).

        Returns a list of (kind, pid, status), signals first: (EXITED, pid, status as
        os.waitpid gives it or STATUS_UNKNOWN), (SIGNALLED, sender or 0, signal),
        (READABLE, fd, 0). The list is empty when the time is up, or earlier when a
        handler of another signal is to run.
        """
        cdef pf_process_event events[MAX_EVENTS]
        cdef pf_processes *handle = self.opened()
        cdef int timeout_ms = milliseconds(timeout)
        cdef int count
        with nogil:
            count = pf_process_wait(handle, events, MAX_EVENTS, timeout_ms)
        check(count)
        return [(events[i].kind, events[i].pid, events[i].status) for i in range(count)]

    def kill(self, int pid, int signal):
        """Signal an adopted child; ProcessLookupError once it is reaped."""
        check(pf_process_kill(self.opened(), pid, signal))

    def reap_strangers(self):
        """Reap ended children that were not adopted here; returns how many."""
        return check(pf_process_reap_strangers(self.opened()))

    def close(self):
        """Restore the signal mask and give everything back; may be repeated."""
        pf_process_close(self.handle)
        self.handle = NULL

    def forget(self):
        """close() in a forked child: the parent's view stays as it is."""
        pf_process_forget(self.handle)
        self.handle = NULL


def is_reaper():
    """Whether this process inherits the children that others leave behind."""
    return bool(pf_process_is_reaper())


def set_reaper(bint on):
    """Become a subreaper, which inherits what its descendants leave, or be none."""
    check(pf_process_set_reaper(on))


FIRST_FD = PF_PROCESS_FIRST_FD


cdef char **strings(list items) except NULL:
    """A C array that borrows these bytes; the caller frees it."""
    cdef char **found = <char **>malloc((len(items) + 1) * sizeof(char *))
    if found is NULL:
        raise MemoryError
    for i in range(len(items)):
        found[i] = PyBytes_AS_STRING(items[i])
    found[len(items)] = NULL
    return found


def start_program(str path, arguments, environment, fds=(), directory=None):
    """Start a program; returns its pid. Raises OSError, also if it cannot be executed.

    environment is a mapping; the program finds fds at FIRST_FD and behind, /dev/null as
    stdin, and our stdout, stderr and signal mask.
    """
    cdef pf_process_program program
    cdef int numbers[PF_PROCESS_FDS]
    cdef bytes name = os.fsencode(path)
    cdef bytes start = None if directory is None else os.fsencode(directory)
    cdef list argv = [os.fsencode(text) for text in arguments]
    cdef list envp = [os.fsencode(f"{key}={text}") for key, text in environment.items()]
    cdef char **c_argv = NULL
    if len(fds) > PF_PROCESS_FDS:
        raise ValueError("too many descriptors")
    for i, fd in enumerate(fds):
        numbers[i] = fd
    c_argv = strings(argv)
    try:
        program.envp = strings(envp)
        program.path, program.argv = PyBytes_AS_STRING(name), c_argv
        program.directory = NULL if start is None else PyBytes_AS_STRING(start)
        program.fds, program.nfds = numbers, len(fds)
        try:
            return check(pf_process_start(&program))
        finally:
            free(program.envp)
    finally:
        free(c_argv)


def set_parent_death_signal(int signal, int expected_parent):
    """Have the kernel send us this signal when the thread that forked us ends.

    Raises ProcessLookupError if our parent is not expected_parent any more.
    """
    check(pf_process_set_parent_death_signal(signal, expected_parent))
