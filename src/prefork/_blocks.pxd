# cython: language_level=3
"""Header blocks that come again, and what was made from them."""
from libc.stdint cimport uint64_t

from prefork._core cimport pf_head


cdef enum:
    BLOCKS = 128  # that are remembered

cdef struct Block:  # of header fields that came at least once
    uint64_t hash
    size_t size
    unsigned nfields  # fewer if some were not to be believed
    char *bytes       # NULL: it came once
    void *made        # owned

cdef class Blocks:
    cdef Block table[BLOCKS]
    cdef Block *again  # where to keep what is made now; NULL: nowhere
    cdef object find(self, const pf_head *head, const char *data)
    cdef int keep(self, const pf_head *head, const char *data, object made) except -1
    cdef void forget(self, Block *block) noexcept
