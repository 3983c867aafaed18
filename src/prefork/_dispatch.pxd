# cython: language_level=3
"""From the loop's events to handlers. The theory stands in _dispatch.pyx."""
from cpython.ref cimport PyObject
from libc.string cimport memcmp

from prefork cimport _core
from prefork._core cimport Crew, Loop, Request, pf_event, pf_peer, pf_request


cdef extern from "Python.h":
    # To an argument that is an object, Cython makes one reference more.
    Py_ssize_t references "Py_REFCNT" (PyObject *thing)


cdef inline bint same_host(const pf_peer *a, const pf_peer *b) noexcept:
    """Whether two ends have one address, whatever their ports."""
    return a.family == b.family and memcmp(a.bytes, b.bytes, 16) == 0


cdef class Held:
    cdef pf_event event


cdef class Follower:
    cdef int hear(self) except -1


cdef class Dispatcher:
    cdef readonly Loop loop
    cdef object handler
    cdef readonly object desk
    cdef bint simple
    cdef object fatal
    cdef readonly bint drained
    cdef int at         # the next event of the batch at hand
    cdef int count      # of its events
    cdef unsigned told  # so many exchanges were told something
    cdef bint at_work   # on a batch, behind which the loop turns anyway
    cdef dict hosts     # addresses as text, by their bytes
    cdef object held    # events put aside while a handler waited, by their loans
    cdef Request spare  # for the next request; None: there is none
    cdef readonly set asked      # Futures of what other threads wait for
    cdef int pid        # whose loop this is
    cdef Crew sender    # of one thread: who sends while that is in a handler, or None
    cdef object sending         # the thread that does
    # Of a crew; all of it is read and written under the GIL.
    cdef readonly Crew crew     # None: one thread
    cdef unsigned long leader   # the thread that may touch the loop; 0: nobody yet
    cdef bint inside            # the leader is in a handler: others may use the loop
    cdef Request current        # whose handler that is
    cdef int standing           # threads that stand by
    cdef bint coming            # one of them was called and has not looked yet
    cdef int eager              # > 0: handlers block, so the loop is handed on at once
    cdef object waiting         # jobs that found every thread at work
    cdef bint over
    cdef object gate            # a lock at which the main thread sleeps

    cdef str host_text(self, const pf_peer *peer)
    cdef int hold_back(self, pf_event *event) except -1
    cdef Request make(self)
    cdef int perform(self, Request request) except -1
    cdef tuple job(self, Request request)
    cpdef bint in_child(self) noexcept
    cpdef int check_fork(self, error) except -1
    cpdef int refuse_child(self) except -1
    cdef int give_up(self, asked) except -1
    cdef int next_event(self, int timeout_ms) except -1
    cdef int handle(self, pf_event *event) except -1
    cdef int dispatch(self, pf_event *event) except -1
    cdef int begin(self, pf_event *event) except -1
    cdef int tell(self, Request request, unsigned flags, int code) except -1
    cdef int tell_each(self, exchange, unsigned flags) except -1
    cdef int run_calls(self) except -1
    cdef int pump(self, pf_request *loan) except -1
    cdef bint leads(self) noexcept
    cdef bint sends_later(self) noexcept
    cdef int start_sender(self) except -1
    cdef int enter(self, Request request) except -1
    cdef bint leave(self, Request request) except -1
    cdef bint hand_on(self, Request request) except -1
    cdef int heed(self, int count) except -1
    cdef void expect_more(self) noexcept
    cdef int settle_account(self, Request request) except -1
    cdef int expect_to_block(self) except -1
    cdef bint claim(self) except -1
    cdef bint take_another(self) except -1
    cdef int put_off(self, Request request) except -1
    cdef int offer(self) except -1
    cdef int nudge(self) except -1
    cdef int lead(self) except -1
    cpdef int turn(self, int timeout_ms) except -1
    cpdef int serve(self, Request request) except -1
