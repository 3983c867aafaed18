# cython: language_level=3
"""ASGI over HTTP, as WebSockets build on it. The theory stands in _asgi.pyx."""
cimport cython
from libc.stdint cimport int64_t

from prefork cimport _dispatch
from prefork._blocks cimport Blocks
from prefork._core cimport Request, pf_event, pf_head, pf_peer


cdef int wake(list waiters) except -1
cdef list joined(list waiters, waiter)
cdef bytes bytes_of(object data)
cdef object value_of(message, str key, object default)
cdef bint is_text(object text, str known) except -1

cdef enum:  # what the app has sent
    WAITING    # nothing
    STARTED    # the head, which is held back
    STREAMING  # the head and some of the body
    TRAILING   # the body, and will send trailers
    COMPLETE   # all


@cython.final
cdef class Mapping:
    cdef str name       # in a scope
    cdef dict original
    cdef dict lent      # in the template of scopes as well
    cdef unsigned long seen  # changes, when it was last as it should be

    cdef int lend(self, dict template) except -1
    cdef bint is_same(self) noexcept


cdef class Dispatcher(_dispatch.Dispatcher):
    cdef dict template
    cdef Mapping versions
    cdef Mapping extensions
    cdef Mapping state     # of the lifespan
    cdef str root_path
    cdef bytes raw_root
    cdef Blocks blocks     # of header fields, and lists of them
    cdef pf_peer remote    # the end that came last, which is likely to come again
    cdef str remote_text
    cdef pf_peer local     # the end that `server` names
    cdef object server
    cdef object unix_server
    cdef bint no_server    # it is not known yet
    cdef Exchange exchange  # the one that was made last
    cdef object receive    # its methods, as apps get them
    cdef object send
    cdef object make_task
    cdef dict how          # its keywords
    cdef bint eager        # a task has begun when it is made
    cdef bint shares       # one may run apps of several requests

    cdef int clear_extensions(self) except -1
    cdef int set_ends(self, dict scope, Request request) except -1
    cdef int set_origin(self, dict scope, Request request) except -1
    cdef int set_path(self, dict scope, const pf_head *head,
                      const char *data) except -1
    cdef bint is_under_root(self, str path)
    cdef list header_list(self, const pf_head *head, const char *data)
    cdef dict scope(self, Request request)
    cdef Exchange next_exchange(self, Request request)
    cdef int start(self, Shift shift) except -1
    cdef pf_event *next_request(self) noexcept


cdef class Shift:
    cdef Dispatcher dispatcher  # None: the task is its last app's
    cdef Exchange exchange  # whose app runs, or ran last
    cdef object coroutine   # the app's
    cdef int64_t since
    cdef object task        # and its context
    cdef object context
    cdef list held          # to what both refer
    cdef Py_ssize_t refs    # how many refer to them

    cdef int call(self) except -1
    cdef int begin(self) except -1
    cdef int leave(self) except -1
    cdef Py_ssize_t count_refs(self) noexcept
    cdef Py_ssize_t weak_refs(self) except -1
    cdef bint is_untouched(self) except -1
    cdef bint goes_on(self) except -1


cdef class Exchange(_dispatch.Follower):
    cdef Request request
    cdef Dispatcher dispatcher
    cdef readonly dict scope
    cdef int stage
    cdef object status
    cdef object fields
    cdef bint trailers       # the app will send some behind the body
    cdef bint received       # the app has the whole body
    cdef bint ended          # the client has closed its side
    cdef bint events         # a stream of events, which has no end of its own
    cdef readonly object error  # why nothing more can be sent
    cdef readonly bint lost     # and what was sent has not all arrived
    cdef list readers        # futures of those who wait for a message
    cdef list writers        # and for room

    cdef int reset(self) except -1
    cdef dict make_scope(self)
    cdef object around(self, coroutine)
    cpdef dict next_message(self)
    cdef int send_start(self, message) except -1
    cdef bint streams_events(self) except -1
    cdef object send_body(self, message)
    cdef object sent(self, bint more)
    cdef int begin(self) except -1
    cdef int complete_whole(self, bytes body) except -1
    cdef int tell_length(self, int64_t size) except -1
    cdef bint is_bodiless(self) except -1
    cdef int complete(self) except -1
    cdef int send_path(self, message) except -1
    cdef object send_file(self, message)
    cdef int send_hint(self, message) except -1
    cdef int refuse_behind_body(self, str kind) except -1
    cdef int send_trailers(self, message) except -1
    cpdef bint is_full(self) noexcept
    cdef int settle(self, task) except -1
    cdef str missing(self)
    cdef int fail(self, error) except -1
