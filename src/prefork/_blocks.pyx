# cython: language_level=3, binding=True, freethreading_compatible=False
"""Header blocks that come again, and what was made from them.

Clients repeat their header fields, whatever they ask for: what an interface makes of a
block that came twice is kept, and found again by its bytes.
"""
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

from prefork._core cimport pf_head, pf_http_hash


cdef enum:
    BLOCK_MAX = 4096  # bytes of one


cdef class Blocks:
    """A table with a place for each hash; who comes later has the place."""

    def __dealloc__(self):
        cdef int i
        for i in range(BLOCKS):
            self.forget(&self.table[i])

    cdef void forget(self, Block *block) noexcept:
        if block.bytes is not NULL:
            free(block.bytes)
            Py_DECREF(<object>block.made)
        block.bytes, block.made = NULL, NULL

    cdef object find(self, const pf_head *head, const char *data):
        """What was made of the fields of this head before, or None.

        After None, `again` says whether they came before and are worth keeping.
        """
        cdef const char *bytes = data + head.fields[0].name_at
        cdef size_t size = head.size - head.fields[0].name_at
        cdef uint64_t hash
        cdef Block *block
        self.again = NULL
        if head.nfields == 0 or size > BLOCK_MAX or head.authority.len > 0:
            return None  # with an authority, the Host field is not as it was sent
        hash = pf_http_hash(bytes, size)
        block = &self.table[hash % BLOCKS]
        if (block.hash != hash or block.size != size
                or block.nfields != head.nfields):
            self.forget(block)  # for the first time: it may never come again
            block.hash, block.size, block.nfields = hash, size, head.nfields
            return None
        if block.bytes is not NULL and memcmp(block.bytes, bytes, size) == 0:
            return <object>block.made
        self.again = block
        return None

    cdef int keep(self, const pf_head *head, const char *data, object made) except -1:
        """Remember what was made, after find() has found nothing."""
        cdef Block *block = self.again
        self.forget(block)
        block.bytes = <char *>malloc(block.size)
        if block.bytes is NULL:
            raise MemoryError
        memcpy(block.bytes, data + head.fields[0].name_at, block.size)
        Py_INCREF(made)
        block.made = <void *>made
        return 0
