# cython: language_level=3
"""Tasks that wait for the core's events. The theory stands in _waiting.pyx."""


cdef class Done:
    cdef object result


cdef Done NOTHING
cdef Done done(object result)


cdef class Waiter:
    cdef public bint _asyncio_future_blocking  # asyncio's protocol for futures
    cdef object loop
    cdef object callback
    cdef object context
    cdef object message  # of cancel()
    cdef int outcome
    cdef Stay stay       # of who waits here; None: a task does, without one
    cdef Waiter behind   # who waits for the same, and came later

    cpdef int resume(self, bint now) except -1
    cdef int call(self, bint now) except -1


cdef class Stay(Waiter):
    cdef object coroutine  # the app's
    cdef object task       # that runs it
    cdef Waiter waiter     # where the app waits, if that is one of ours
    cdef bint running      # the app goes on, and its task takes it to be waiting
    cdef bint cancelled    # meanwhile
    cdef int left          # what it did then, which is not told yet: PYGEN_*
    cdef object what       # that it has yielded, returned or raised

    cdef int step(self) except -1
    cdef int depart(self, int outcome) except -1
    cdef object wait_for(self, waited)
    cdef int settle(self, Waiter waiter) except -1
    cdef int go_on(self) except -1


cdef class Reception:
    cdef Waiter waiter

    cdef object take(self)
    cdef Waiter at(self, loop)


cdef Waiter joined(Waiter first, Waiter last)
cdef int resume_all(Waiter first, bint now) except -1
cdef int give(object value) except -1
