# cython: language_level=3, binding=True, freethreading_compatible=False
"""Sockets that listen, as the core opens them; listeners.py decides which."""
import os

from libc.stdint cimport uint16_t

from prefork._core cimport (
    PF_SOCKET_AVOIDED,
    PF_SOCKET_DEFER_ACCEPT,
    PF_SOCKET_FAST_OPEN,
    PF_SOCKET_REUSEPORT,
    PF_SOCKET_V6ONLY,
    check,
    pf_socket_check,
    pf_socket_listen,
    pf_socket_quiesce,
    pf_socket_spec,
    pf_socket_spread,
)

SOCKET_REUSEPORT = PF_SOCKET_REUSEPORT
SOCKET_V6ONLY = PF_SOCKET_V6ONLY
SOCKET_DEFER_ACCEPT = PF_SOCKET_DEFER_ACCEPT
SOCKET_FAST_OPEN = PF_SOCKET_FAST_OPEN


def listen(int family, str host, int port, int backlog, int mode, unsigned int flags):
    """Open a listening socket and return its fd: close-on-exec, non-blocking, yours.

    host is a numeric address or the path of a unix socket; mode -1 leaves a unix
    socket's permissions to the umask; flags are SOCKET_*. Raises OSError.
    """
    cdef pf_socket_spec spec
    cdef bytes name = os.fsencode(host)
    if b"\0" in name:
        raise ValueError("embedded null byte in the address")
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be between 0 and 65535, not {port}")
    spec.family = family
    spec.host = name
    spec.port = <uint16_t>port
    spec.backlog = backlog
    spec.mode = mode
    spec.flags = flags
    return check(pf_socket_listen(&spec))


def check_listener(int fd):
    """Raise OSError unless fd is a listening stream socket."""
    check(pf_socket_check(fd))


def quiesce(int fd):
    """Let no new handshake begin on this TCP listener; those begun still complete.

    Does nothing to a unix socket: its file is the caller's to remove.
    """
    check(pf_socket_quiesce(fd))


def spread(int fd, int members, avoided):
    """Which of the listeners that share this one's address get new connections.

    members is how many there are, avoided the places, in the order of their listen(),
    of those that get none; if it is empty, all do again. Raises OSError.
    """
    cdef int places[PF_SOCKET_AVOIDED]
    cdef int count = 0
    for place in sorted(avoided):
        if count == PF_SOCKET_AVOIDED:
            raise ValueError("too many places")
        places[count] = place
        count += 1
    check(pf_socket_spread(fd, members, places, count))
