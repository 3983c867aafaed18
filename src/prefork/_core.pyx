# cython: language_level=3, binding=True, freethreading_compatible=False
"""The bridge between the C core and Python: the only module that sees prefork.h.

It converts, checks and counts references; decisions are C (mechanism) or Python
(policy). The GIL is released only around the calls that sleep.
"""
import math
import os
from collections import deque
from collections.abc import Mapping
from socket import AF_INET as _AF_INET
from socket import AF_INET6 as _AF_INET6
from socket import inet_ntop
from sys import intern

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_REFCNT, Py_XDECREF, PyObject
from cpython.unicode cimport (
    PyUnicode_AsUTF8AndSize,
    PyUnicode_DecodeLatin1,
    PyUnicode_DecodeUTF8,
    PyUnicode_GET_LENGTH,
)
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from "Python.h":
    int PyUnicode_KIND(object text)
    void *PyUnicode_DATA(object text)
    int PyObject_AsFileDescriptor(object file) except -1
    unsigned long PyThread_get_thread_ident()

from prefork.errors import ClientDisconnected, ProtocolError, RequestError


# ---- Errors ----

cdef int FIRST_PEER_ERROR = -20001
cdef int FIRST_APP_ERROR = -20101


cdef object error_of(int rc, str reason=None):
    """The exception that words a bad result of the core, and what a library says of it.
    """
    system = rc > FIRST_PEER_ERROR
    text = os.strerror(-rc) if system else pf_error_text(rc).decode("utf-8", "replace")
    if reason is not None:
        text = f"{text} ({reason})"
    if system:
        return OSError(-rc, text)
    if rc in (PF_ERR_CLOSED, PF_ERR_WRITE_TIMEOUT, PF_ERR_IDLE_TIMEOUT, PF_ERR_PROXY):
        return ClientDisconnected(text)
    if rc <= FIRST_APP_ERROR:
        return ProtocolError(text)
    return RequestError(text, pf_error_status(rc))


cdef int check(int rc) except -1:
    """Pass a good result on; raise a bad one."""
    if rc >= 0:
        return rc
    raise error_of(rc)


def error(int rc, str reason=None):
    """The exception of a code that an event carried, with a library's words for it."""
    return error_of(rc, reason)


def error_status(int rc):
    """The HTTP status that answers this error; 0 if it is not the peer's."""
    return pf_error_status(rc)


# ---- Time ----

cdef int milliseconds(object timeout) except -2:
    """Seconds as the core counts them, rounded up so that nobody wakes too early."""
    if timeout is None:
        return -1
    return min(max(0, math.ceil(timeout * 1000)), 0x7FFFFFFF)


# ---- The scoreboard ----

ROW_STATES = {
    PF_ROW_FREE: "free",
    PF_ROW_BOOTING: "booting",
    PF_ROW_WAITING: "waiting",
    PF_ROW_RUNNING: "running",
    PF_ROW_DRAINING: "draining",
}

LATENCY_BOUNDS = tuple([
    pf_scoreboard_bound(i) / 1_000_000 for i in range(PF_LATENCY_BUCKETS)
])


cdef dict figures(const pf_loop_stats *s):
    """Counters, and what is open now."""
    return {
        "accepted": s.accepted, "closed": s.closed, "requests": s.requests,
        "refused": s.refused, "timeouts": s.timeouts, "bytes_in": s.bytes_in,
        "bytes_out": s.bytes_out, "passed_on": s.passed_on,
        "connections": s.connections, "lent": s.lent, "aborted": s.statuses[0],
        "statuses": {n: s.statuses[n] for n in range(1, 6)},
    }


cdef dict row_figures(const pf_row *row):
    cdef dict found = figures(&row.stats)
    found["latency"] = [row.latency[i] for i in range(PF_LATENCY_BUCKETS)]
    return found


cdef class Scoreboard:
    """A row of shared memory for each worker: what it does and what it has counted.

    Any process that has it may read; the master claims and retires rows. Durations are
    seconds, times those of time.monotonic(); latency is a list of counts, one for each
    of LATENCY_BOUNDS.
    """

    def __cinit__(self, int rows=0, fd=None):
        if fd is None:
            check(pf_scoreboard_open(&self.handle, rows))
        else:
            check(pf_scoreboard_attach(&self.handle, os.dup(fd)))

    def __dealloc__(self):
        self.close()

    cdef pf_scoreboard *opened(self) except NULL:
        if self.handle is NULL:
            raise ValueError("this Scoreboard is closed")
        return self.handle

    def close(self):
        """Unmap the memory; may be repeated. RuntimeError while a loop counts here."""
        if self.loops > 0:
            raise RuntimeError("a loop still counts on this Scoreboard")
        if self.handle is not NULL:
            pf_scoreboard_close(self.handle)
            self.handle = NULL

    @property
    def bounds(self):
        """The upper bounds of the latency buckets, in seconds."""
        return LATENCY_BOUNDS

    def fileno(self):
        """The memory's fd, for a process that attaches to it."""
        return pf_scoreboard_fileno(self.opened())

    def claim(self, int slot, int generation):
        """The index of a fresh row for a worker that is about to be started."""
        return check(pf_scoreboard_claim(self.opened(), slot, generation))

    def retire(self, int row):
        """The worker of this row has ended: keep its counters, free the row."""
        check(pf_scoreboard_retire(self.opened(), row))

    def adopt(self, int row, int slot, int fd):
        """Have the worker of row accept from the listener of a vacant slot, too."""
        check(pf_scoreboard_adopt(self.opened(), row, slot, fd))

    def release(self, int row, int slot):
        """Have the worker of row leave that listener again."""
        check(pf_scoreboard_release(self.opened(), row, slot))

    def rotate_tickets(self):
        """Encrypt new TLS session tickets with a new key; the master does so.

        Tickets of the three keys before are still good.
        """
        check(pf_tls_rotate(pf_scoreboard_tickets(self.opened())))

    def row(self, int index):
        """What one worker does: a dict; None if the row is free."""
        cdef pf_row *row = pf_scoreboard_row(self.opened(), index)
        if row is NULL:
            raise IndexError(index)
        if row.state == PF_ROW_FREE:
            return None
        return {
            "row": index, "pid": row.pid, "slot": row.slot,
            "generation": row.generation, "state": ROW_STATES[row.state],
            "started": row.started_ms / 1000, "heartbeat": row.heartbeat_ms / 1000,
            **row_figures(row),
        }

    def rows(self):
        """row() of every worker there is."""
        rows = [self.row(i) for i in range(pf_scoreboard_rows(self.opened()))]
        return [row for row in rows if row is not None]

    def totals(self):
        """The counters of all workers, those that have ended included."""
        cdef pf_row sum
        pf_scoreboard_totals(self.opened(), &sum)
        return row_figures(&sum)


# ---- A crew ----

cdef class Crew:
    """Threads of which one leads and the others stand by, asleep, without the GIL.

    Who leads is decided under the GIL, by _dispatch. tick_ms: a handler has stalled
    when it has run for one to two of these, the first one in a while for five to ten.
    """

    def __cinit__(self, int tick_ms=1):
        check(pf_crew_open(&self.handle, tick_ms))

    def __dealloc__(self):
        if self.handle is not NULL:
            pf_crew_free(self.handle)

    cdef int stand_by(self, Loop loop) except -1:
        """Sleep until needed: PF_CREW_CALLED, _STALLED or _CLOSED.

        Who is PF_CREW_APPOINTED has gone on to the loop, and comes back with a batch:
        it did not need the GIL in between, which who appointed it still had.
        """
        cdef pf_crew *handle = self.handle
        cdef unsigned long name = PyThread_get_thread_ident()
        cdef int reason
        cdef int count = 0
        with nogil:
            reason = pf_crew_wait(handle, name)
            if reason == PF_CREW_APPOINTED:
                count = pf_loop_wait(loop.handle, loop.events, BATCH, -1)
        if reason == PF_CREW_APPOINTED:
            loop.get_up(count)
        return check(reason)

    cdef void begin(self) noexcept:
        """The leader enters a handler."""
        pf_crew_begin(self.handle)

    cdef void end(self) noexcept:
        """It has left it, or somebody leads in its place."""
        pf_crew_end(self.handle)

    cdef void took_long(self) noexcept:
        """Behind end(), in the leader: it ran for a tick or more. Has it waited?"""
        pf_crew_took_long(self.handle)

    cdef bint call(self) noexcept:
        """Wake one who stands by; False: nobody does."""
        return pf_crew_call(self.handle)

    cdef unsigned long appoint(self) noexcept:
        """Wake one who stands by, to lead: which thread. 0: nobody is free."""
        return pf_crew_appoint(self.handle)

    def close(self):
        """Whoever stands by, or will, is told CLOSED. Any thread."""
        pf_crew_close(self.handle)


# ---- The loop ----

cdef dict OPTION_FLAGS = {
    "lend_heads": PF_OPTION_LEND_HEADS,
    "lend_refused": PF_OPTION_LEND_REFUSED,
    "notices": PF_OPTION_NOTICES,
    "no_date": PF_OPTION_NO_DATE,
    "no_keep_alive": PF_OPTION_NO_KEEP_ALIVE,
    "get_only": PF_OPTION_GET_ONLY,
    "tcp_keepalive": PF_OPTION_TCP_KEEPALIVE,
    "keep_on_drain": PF_OPTION_KEEP_ON_DRAIN,
    "ws_deflate": PF_OPTION_WS_DEFLATE,
}

REQUEST = PF_EVENT_REQUEST
BODY = PF_EVENT_BODY
WRITABLE = PF_EVENT_WRITABLE
CLOSED = PF_EVENT_CLOSED
DRAINED = PF_EVENT_DRAINED
REFUSED = PF_EVENT_REFUSED
WOKEN = PF_EVENT_WOKEN
READABLE_FD = PF_EVENT_READABLE
ENDED = PF_EVENT_ENDED
MESSAGE = PF_EVENT_MESSAGE
WEBSOCKET_KEY = PF_ERR_WEBSOCKET_KEY
WEBSOCKET_VERSION = PF_ERR_WEBSOCKET_VERSION

PROXY_V1 = PF_PROXY_V1
PROXY_V2 = PF_PROXY_V2

NOTICES = {1: "new", 2: "active", 3: "idle", 4: "closed", 5: "error"}


cdef bytes networks(list rows):
    """An array of pf_network out of (family, address, prefix)."""
    cdef pf_network network
    cdef bytes address
    cdef list found = []
    for family, address, prefix in rows:
        if len(address) > 16:
            raise ValueError(f"no address is as long as {address!r}")
        memset(&network, 0, sizeof(network))
        memcpy(network.bytes, PyBytes_AS_STRING(address), PyBytes_GET_SIZE(address))
        network.family = family
        network.prefix = prefix
        found.append((<const char *>&network)[:sizeof(network)])
    return b"".join(found)


cdef int read_options(pf_options *o, dict given, list keep) except -1:
    """Fill in the options of a loop; keep holds what they borrow."""
    cdef bytes text
    pf_options_init(o)
    for name, value in given.items():
        if name in OPTION_FLAGS:
            if value:
                o.flags |= <unsigned>OPTION_FLAGS[name]
            else:
                o.flags &= ~<unsigned>OPTION_FLAGS[name]
        elif name in ("server", "content_type"):
            text = (value or "").encode("latin-1")
            keep.append(text)
            if name == "server":
                o.server = text
            else:
                o.content_type = text
        elif name in ("proxy_trust", "forwarded_trust"):
            text = networks(value)
            keep.append(text)
            if name == "proxy_trust":
                o.proxy_trust = <const pf_network *>PyBytes_AS_STRING(text)
                o.proxy_trusted = len(value)
            else:
                o.forwarded_trust = <const pf_network *>PyBytes_AS_STRING(text)
                o.forwarded_trusted = len(value)
        elif name == "proxy_protocol":
            o.proxy_protocol = value
        elif name == "max_connections":
            o.max_connections = value
        elif name == "max_connections_per_ip":
            o.max_connections_per_ip = value
        elif name == "max_requests":
            o.max_requests = value
        elif name == "header_timeout_ms":
            o.header_timeout_ms = value
        elif name == "read_timeout_ms":
            o.read_timeout_ms = value
        elif name == "write_timeout_ms":
            o.write_timeout_ms = value
        elif name == "idle_timeout_ms":
            o.idle_timeout_ms = value
        elif name == "tls_handshake_timeout_ms":
            o.tls_timeout_ms = value
        elif name == "linger_timeout_ms":
            o.linger_timeout_ms = value
        elif name == "drain_idle_ms":
            o.drain_idle_ms = value
        elif name == "min_body_rate":
            o.min_body_rate = value
        elif name == "read_buffer_size":
            o.read_buffer_size = value
        elif name == "max_target_size":
            o.max_target_size = value
        elif name == "max_field_size":
            o.max_field_size = value
        elif name == "max_header_size":
            o.max_header_size = value
        elif name == "max_fields":
            o.max_fields = value
        elif name == "max_body_size":
            o.max_body_size = value
        elif name == "body_buffer_size":
            o.body_buffer_size = value
        elif name == "ws_max_size":
            o.ws_max_size = value
        elif name == "ws_ping_interval_ms":
            o.ws_ping_interval_ms = value
        elif name == "ws_ping_timeout_ms":
            o.ws_ping_timeout_ms = value
        elif name == "ws_close_timeout_ms":
            o.ws_close_timeout_ms = value
        elif name == "spill_dir":
            text = os.fsencode(value)
            keep.append(text)
            o.spill_dir = text
        else:
            raise TypeError(f"a loop has no option {name!r}")
    return 0


cdef class Loop:
    """The C loop: sockets, connections, timers. Belongs to the thread that runs it.

    Only wake() and call() may be used by other threads. It is opened after a fork,
    never before: parent and child would share its poller.
    """

    def __cinit__(self, **options):
        cdef pf_options o
        cdef list keep = []
        read_options(&o, options, keep)
        check(pf_loop_open(&self.handle, &o))
        self.calls = deque()

    def __dealloc__(self):
        if self.handle is not NULL:
            self.shut()
            pf_loop_free(self.handle)

    cdef pf_loop *opened(self) except NULL:
        if self.handle is NULL:
            raise ValueError("this Loop is closed")
        return self.handle

    cdef int wait_batch(self, int timeout_ms) except -1:
        """One turn: fills self.events, returns how many; drops released bodies."""
        cdef pf_loop *handle = self.handle
        cdef int count
        self.lie_down()
        with nogil:
            count = pf_loop_wait(handle, self.events, BATCH, timeout_ms)
        return self.get_up(count)

    cdef void lie_down(self) noexcept:
        """From now on its thread is at work without the GIL,"""
        self.asleep = self.waiting = True

    cdef int get_up(self, int count) except -1:
        """and from now on no more: it comes back with so many events."""
        self.asleep = self.waiting = False
        self.count = max(count, 0)
        return check(count)

    cdef void forget(self, pf_request *loan) noexcept:
        """A loan is over: the rest of the batch has nothing to tell of it."""
        cdef int i
        for i in range(self.count):
            if self.events[i].request == loan:
                self.events[i].flags = 0
                self.events[i].request = NULL

    cdef int64_t touch(self) noexcept:
        """Read the clock; monotonic milliseconds."""
        return pf_loop_touch(self.handle)

    cdef int64_t now(self) noexcept:
        """The clock as of the last wake-up or touch(); monotonic milliseconds."""
        return pf_loop_now(self.handle)

    cdef object run_calls(self):
        """Run what other threads asked for."""
        while self.calls:
            function, arguments = self.calls.popleft()
            function(*arguments)
        self.called = False

    def shut(self):
        """Close all connections and descriptors; may be repeated."""
        cdef void *ref
        pf_loop_close(self.handle)
        if self.board is not None:
            self.board.loops -= 1
            self.board = None
        while pf_loop_take_released(self.handle, &ref, 1) > 0:
            Py_DECREF(<object>ref)

    def attach(self, Scoreboard board not None, int row):
        """Count in this row from now on; before anything else is done."""
        check(pf_loop_attach(self.opened(), board.opened(), row))
        self.board = board
        board.loops += 1

    def listen(self, int fd):
        """Accept connections from this listening socket, which stays the caller's."""
        check(pf_loop_listen(self.opened(), fd))

    def watch(self, int fd):
        """Have wait() tell (READABLE_FD, None, fd) for as long as fd can be read."""
        check(pf_loop_watch(self.opened(), fd))

    def unwatch(self, int fd):
        """Forget a watched fd; to be called before it is closed."""
        check(pf_loop_unwatch(self.opened(), fd))

    def wait(self, timeout=None):
        """One turn: [(flags, Request or None, code)], empty when the time is up.

        The sleep and all accepting, reading, parsing, refusing, timing out and writing
        happen without the GIL.
        """
        cdef int count = self.wait_batch(milliseconds(timeout))
        cdef list events = []
        cdef Request request
        for i in range(count):
            event = &self.events[i]
            if event.flags & PF_EVENT_RELEASED:
                Py_DECREF(<object>event.user)
                continue
            if event.flags & PF_EVENT_WOKEN:
                self.run_calls()
            request = None
            if event.flags & PF_EVENT_REQUEST:
                request = Request.__new__(Request)
                request.lend(self, event.request)
                request.hold()
            elif event.request is not NULL:
                request = <Request>event.user
            events.append((event.flags, request, event.code))
        return events

    def wake(self):
        """End the current wait, or the next. Any thread may call this."""
        check(pf_loop_wake(self.opened()))

    def call(self, function, *arguments):
        """Have the loop's thread call function soon. Any thread may call this."""
        self.calls.append((function, arguments))
        self.called = True
        check(pf_loop_wake(self.opened()))

    cdef int share(self) except -1:
        """From now on other threads may borrow the loop while its own one sleeps."""
        pf_loop_share(self.opened())
        return 0

    cdef bint borrow(self) noexcept:
        """Whether the loop is the caller's until give_back(): its thread sleeps.

        The sleeper has set `asleep` and let go of the GIL, which we hold. Who has asked
        it for something before comes first.
        """
        if not self.asleep or self.called or not pf_loop_borrow(self.handle):
            return False
        self.asleep = False
        return True

    cdef bint poll(self, pf_event *event) noexcept:
        """With the loop borrowed: whether a request has come; the caller takes it."""
        return pf_loop_poll(self.handle, event)

    cdef int give_back(self) except -1:
        """What was queued is sent, and the loop's thread sleeps on or is woken."""
        cdef list put_off = self.put_off
        self.put_off = None
        self.asleep = True
        pf_loop_return(self.handle)
        if self.called:  # by somebody who took the sleeper for awake
            pf_loop_wake(self.handle)
        if put_off is not None:
            for function, arguments in put_off:
                function(*arguments)
        return 0

    @property
    def borrowed(self):
        """Whether another thread has it while its own one sleeps, and cannot wake."""
        return self.waiting and not self.asleep

    def unborrowed(self, function, *arguments):
        """Call function now, or as soon as whoever has borrowed the loop gives it back:
        what may take its time, or is the app's."""
        if not self.borrowed:
            function(*arguments)
        elif self.put_off is None:
            self.put_off = [(function, arguments)]
        else:
            self.put_off.append((function, arguments))

    cdef int leave_word(self, function, tuple arguments) except -1:
        """call() for a loop whose thread looks at its calls before it sleeps: one that
        is awake is not woken."""
        self.calls.append((function, arguments))
        self.called = True
        if self.asleep:
            check(pf_loop_wake(self.opened()))
        return 0

    cpdef int flush(self) except -1:
        """Send what is queued now, without waiting."""
        cdef pf_loop *handle = self.opened()
        if self.asleep:
            raise RuntimeError("the loop is at work in another thread")
        return check(pf_loop_flush(handle))

    cdef void send_queued(self) noexcept:
        """flush() for who may not let go of the GIL, and knows that it may be done."""
        pf_loop_flush(self.handle)

    def drain(self, bint sweep=True, patience=None):
        """Stop accepting, finish what is under way; DRAINED comes when all is done.

        sweep accepts first what waits in the listeners' queues. patience: for so many
        seconds peers may go on saying what they have begun to say, then it is a 408;
        None: as long as otherwise. A second call closes idle connections at once.
        """
        check(pf_loop_drain(self.opened(), sweep, milliseconds(patience)))

    def fileno(self):
        """The fd that is readable when wait(0) finds something, timers included."""
        return check(pf_loop_fileno(self.opened()))

    @property
    def ready(self):
        """Whether wait(0) would find something that fileno() does not show."""
        return pf_loop_ready(self.opened()) or bool(self.calls)

    @property
    def wake_fileno(self):
        """The fd whose write wakes the loop, for signal.set_wakeup_fd()."""
        return pf_loop_wake_fileno(self.opened())

    def stats(self):
        """Counters since the loop was opened, and what is open now."""
        cdef pf_loop_stats s
        pf_loop_get_stats(self.opened(), &s)
        return {**figures(&s), "buffers_in_use": s.buffers_in_use}

    def notices(self):
        """Take the notices: [(kind, connection number, client, error or None)]."""
        cdef pf_notice found[64]
        cdef str reason
        cdef int count
        cdef list out = []
        while True:
            count = pf_loop_notices(self.opened(), found, 64)
            for i in range(count):
                reason = None
                if found[i].reason is not NULL:
                    reason = found[i].reason.decode("utf-8", "replace")
                error = error_of(found[i].code, reason) if found[i].code else None
                out.append((NOTICES[found[i].kind], found[i].connection,
                            peer_name(&found[i].peer), error))
            if count < 64:
                return out


# ---- Requests ----

cdef int AF_INET = _AF_INET
cdef int AF_INET6 = _AF_INET6

cdef list FIELD_NAMES = [
    pf_http_field_name(id).decode("latin-1") for id in range(PF_FIELD_COUNT)
]
FIELD_NAMES = [intern(name) for name in FIELD_NAMES]
FIELD_NAMES_KNOWN = tuple(FIELD_NAMES)  # by the number that pf_field.id has


cdef bytes packed(const pf_peer *peer):
    """The bytes of an IP address: 4, or 16, which tells its family."""
    return peer.bytes[:4] if peer.family == AF_INET else peer.bytes[:16]


cdef str host_of(const pf_peer *peer):
    """An IP address as text."""
    return inet_ntop(peer.family, packed(peer))


cdef object peer_name(const pf_peer *peer):
    """(host, port) of an address; ("", 0) for a unix socket."""
    if peer.family == AF_INET or peer.family == AF_INET6:
        return host_of(peer), peer.port
    return "", 0


# Tracked by the collector as its subclass in _native is, which Cython cannot help: the
# two share this free list, so their memory must be laid out alike.
@cython.freelist(128)
cdef class Request:
    """One request and its answer, on loan from the loop.

    What it tells of the request stays true after the loan: whoever keeps the object
    keeps a copy of the head. The methods that answer belong to the loop's thread and
    raise ClientDisconnected when the peer has left, ProtocolError when the answer
    would break the protocol.
    """

    def __dealloc__(self):
        if self.loan is not NULL:
            pf_request_abort(self.loan)
        free(self.copy)

    cdef void lend(self, Loop loop, pf_request *loan) noexcept:
        self.loan = loan
        self.loop = loop
        self.head = pf_request_head(loan)

    cdef bint is_blank(self) noexcept:
        """Whether it is as it was made: nothing of a loan is left."""
        return (self.loan is NULL and self.copy is NULL and not self.held
                and self.content is None and self.peer is None and self.local is None
                and self.exchange is None and self.handed_on == 0)

    cdef bint is_whole(self) noexcept:
        """Whether nothing more of it will arrive; only while it is on loan."""
        return pf_request_body_done(self.loan)

    cdef pf_request *known(self) except NULL:
        """The loan, to be looked at."""
        if self.loan is NULL:
            raise ProtocolError("the request was answered already")
        return self.loan

    cdef pf_request *lent(self) except NULL:
        """The loan, to be changed: the loop must not be at work without the GIL."""
        if self.loan is NULL:
            return self.known()
        if self.loop.asleep:
            raise RuntimeError("a request is answered in its loop's thread only")
        return self.loan

    cdef const pf_head *heading(self) except NULL:
        if self.head is NULL:
            raise RuntimeError("this request is gone")
        return self.head

    cdef const char *bytes(self) noexcept:
        if self.copy is not NULL:
            return <const char *>self.head + self.head_size()
        return pf_request_bytes(self.loan)

    cdef size_t head_size(self) noexcept:
        return <size_t>(<const char *>&self.head.fields[self.head.nfields]
                        - <const char *>self.head)

    cdef int detach(self) except -1:
        """Make all that it tells our own, and the body if all of it is here."""
        cdef size_t size
        cdef pf_peer *ends
        cdef char *head
        if self.copy is not NULL or self.loan is NULL:
            return 0
        size = self.head_size()
        self.copy = <char *>malloc(2 * sizeof(pf_peer) + size + self.head.size)
        if self.copy is NULL:
            raise MemoryError
        ends = <pf_peer *>self.copy
        pf_request_get_peer(self.loan, &ends[0])
        pf_request_get_local(self.loan, &ends[1])  # empty when the peer is gone
        head = self.copy + 2 * sizeof(pf_peer)
        memcpy(head, self.head, size)
        memcpy(head + size, pf_request_bytes(self.loan), self.head.size)
        self.head = <const pf_head *>head
        if self.content is None and pf_request_body_done(self.loan):
            self.content = self.take_body()
        return 0

    cdef int hold(self) except -1:
        """Let the loan's later events find this object."""
        if not self.held:
            self.held = True
            Py_INCREF(self)
            pf_request_set_user(self.lent(), <void *>self)
        return 0

    cdef int ended(self) except -1:
        """The loan is over."""
        if self.held:
            self.loop.forget(self.loan)
        self.loan = NULL
        self.exchange = None
        if self.copy is NULL:
            self.head = NULL
        if self.held:
            self.held = False
            Py_DECREF(self)
        return 0

    cdef int drop(self) except -1:
        """End the loan without an answer, if it is not over."""
        if self.loan is not NULL:
            self.lent()
            self.detach()
            pf_request_abort(self.loan)
            self.ended()
        return 0

    cdef bint answer(self, int status, bytes content_type, bytes body) except -1:
        """The whole answer in one call; the caller holds the only reference but one."""
        cdef int rc
        cdef const char *type = NULL
        cdef Py_ssize_t type_len = 0
        self.lent()
        if Py_REFCNT(self) > 1:
            self.detach()
        if content_type is not None:
            type = PyBytes_AS_STRING(content_type)
            type_len = PyBytes_GET_SIZE(content_type)
        rc = pf_request_answer(self.loan, status, type, type_len,
                               PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body),
                               <void *>body)
        if rc == PF_ERR_APP_FIELD_VALUE:
            text = pf_error_text(rc).decode("ascii")
            value = content_type.decode("latin-1")
            raise ProtocolError(f"{text}: 'Content-Type': {value!r}")
        if rc < 0:
            check(rc)
        if rc > 0:
            Py_INCREF(body)
        self.ended()
        return True

    cdef void ends(self, pf_peer *peer, pf_peer *local) noexcept:
        """The addresses of both ends; an unknown one is empty."""
        if self.copy is not NULL:
            peer[0] = (<pf_peer *>self.copy)[0]
            local[0] = (<pf_peer *>self.copy)[1]
        else:
            pf_request_get_peer(self.loan, peer)
            pf_request_get_local(self.loan, local)

    cdef bint asks_for_head(self) noexcept:
        """Whether the method is HEAD; False of a request that is gone."""
        return self.head is not NULL and (self.head.flags & PF_HEAD_IS_HEAD) != 0

    cdef size_t unsent(self) noexcept:
        """Bytes of the answer that the kernel has not taken."""
        return pf_request_pending(self.loan) if self.loan is not NULL else 0

    @property
    def unsent_bytes(self):
        """unsent(): bytes of the answer that the kernel has not taken."""
        return self.unsent()

    cdef bytes span(self, pf_span span):
        return self.bytes()[span.at:span.at + span.len]

    # -- what was asked --

    @property
    def method(self):
        """The method as sent: methods are case-sensitive (RFC 9110 9.1)."""
        cdef const pf_head *head = self.heading()
        if head.flags & PF_HEAD_IS_GET:
            return "GET"
        return self.span(head.method).decode("latin-1")

    @property
    def target(self):
        """The request target as sent, in bytes (RFC 9112 3.2)."""
        return self.span(self.heading().target)

    @property
    def raw_path(self):
        """The path of the target as sent, in bytes, without the query."""
        cdef const pf_head *head = self.heading()
        if head.path.len == 0:
            return b"/"
        return self.span(head.path)

    @property
    def query_string(self):
        """What stands behind the target's "?", in bytes."""
        return self.span(self.heading().query)

    @property
    def http_version(self):
        """"1.0" or "1.1"; a higher minor version is served as 1.1."""
        return "1.1" if self.heading().minor else "1.0"

    @property
    def headers(self):
        """The header fields: a read-only, case-insensitive mapping."""
        self.heading()
        cdef Headers headers = Headers.__new__(Headers)
        headers.request = self
        return headers

    @property
    def content_length(self):
        """The announced length of the body; None if it is chunked."""
        cdef const pf_head *head = self.heading()
        return None if head.flags & PF_HEAD_CHUNKED else head.content_length

    @property
    def expects_continue(self):
        """Whether the peer sent Expect: 100-continue."""
        return bool(self.heading().flags & PF_HEAD_EXPECT)

    @property
    def keep_alive(self):
        """Whether the peer wants the connection kept (RFC 9112 9.3)."""
        return bool(self.heading().flags & PF_HEAD_KEEP_ALIVE)

    cdef bint is_forwarded(self) except -1:
        """Whether a trusted proxy has said for whom it speaks."""
        return (self.heading().flags & PF_HEAD_FORWARDED) != 0

    cdef object origin(self):
        """The peer's (host, port), or the Origin that trusted proxies tell."""
        cdef pf_peer peer
        if self.peer is None:
            if self.copy is not NULL:
                peer = (<pf_peer *>self.copy)[0]
            else:
                pf_request_get_peer(self.known(), &peer)
            self.peer = peer_name(&peer)
            if self.is_forwarded() and self.loop.trust is not None:
                self.peer = self.loop.trust.origin(self, self.peer)
        return self.peer

    @property
    def client(self):
        """The client's (host, port); ("", 0) on a unix socket.

        It is the peer of the connection, or for whom that speaks, if it is a trusted
        proxy; then the port is 0 if it is not known.
        """
        found = self.origin()
        return found if type(found) is tuple else found.client

    cdef object told_scheme(self):
        """"http" or "https" as a trusted proxy tells, else None."""
        if not self.is_forwarded():
            return None
        found = self.origin()
        return None if type(found) is tuple else found.scheme

    @property
    def host(self):
        """The host that the client asked for: the Host field's value, or "".

        Where a trusted proxy tells what the field was before, it is that.
        """
        if self.is_forwarded():
            found = self.origin()
            if type(found) is not tuple and found.host is not None:
                return found.host
        return self.headers.get("host", "")

    @property
    def server(self):
        """The (host, port) that the client connected to; ("", 0) on a unix socket.

        It is ours, or what a trusted proxy's PROXY header tells.
        """
        cdef pf_peer peer
        if self.local is None:
            if self.copy is not NULL:
                peer = (<pf_peer *>self.copy)[1]
            else:
                check(pf_request_get_local(self.known(), &peer))
            self.local = peer_name(&peer)
        return self.local

    @property
    def connection(self):
        """The number of its connection, unique in its loop."""
        return pf_request_connection(self.known())

    @property
    def closed(self):
        """Whether the peer is known to be gone."""
        return self.loan is NULL or pf_request_closed(self.loan)

    # -- its body --

    @property
    def body_done(self):
        """Whether all of the body has arrived."""
        return self.loan is NULL or pf_request_body_done(self.loan)

    def take_body(self):
        """Take out the body bytes that have arrived."""
        cdef pf_slice part = pf_request_body(self.lent())
        cdef bytes data = part.data[:part.len] if part.len > 0 else b""
        check(pf_request_consume(self.loan, part.len))
        return data

    def body_file(self):
        """(fd, size) of a body that was spilled, or None: then take_body() has it.

        The fd, at the body's beginning, is the caller's to close; it is given once.
        """
        cdef int fd = pf_request_take_body_fd(self.lent())
        return None if fd < 0 else (fd, pf_request_body_size(self.loan))

    def want_body(self, bint whole):
        """Have BODY told when bytes are there, or all are; sends 100 Continue."""
        if not pf_request_body_done(self.lent()):
            self.detach()  # the buffer moves without the GIL as the body comes
        self.loop.touch()  # the peer's time begins now, not when the handler's did
        check(pf_request_want_body(self.lent(),
                                   PF_WANT_WHOLE if whole else PF_WANT_SOME))

    def limit(self, max_body_size=None, read_timeout=None, write_timeout=None):
        """Limits of this one request; RequestError if it announces a larger body."""
        check(pf_request_limit(
            self.lent(), -1 if max_body_size is None else max_body_size,
            milliseconds(read_timeout), milliseconds(write_timeout)))

    # -- its answer --

    def keep(self):
        """Make this object independent of the loan and of the loop's thread."""
        self.detach()

    def attach(self, exchange):
        """Have the loan's later events call exchange.on_body() and the like."""
        self.hold()
        self.exchange = exchange

    def begin(self, int status, headers, length=None):
        """Begin the answer. length None: unknown, so chunked or ended by the close."""
        cdef int rc = pf_request_begin(self.lent(), status,
                                       -1 if length is None else length)
        check(rc)
        try:
            for name, value in headers:
                self.field(name, value)
        except BaseException:
            if self.loan is not NULL:
                pf_request_reset(self.loan)
            raise

    cdef int field(self, object name, object value) except -1:
        return put_field(self, name, value)

    cdef bint reply(self, int status, list pairs, bytes body) except -1:
        """The whole answer with fields; the caller holds the only reference but one."""
        cdef int rc = pf_request_begin(self.lent(), status, PyBytes_GET_SIZE(body))
        check(rc)
        for name, value in pairs:
            self.field(name, value)
        self.put(body)
        if Py_REFCNT(self) > 1:
            self.detach()
        rc = pf_request_end(self.loan)
        self.ended()
        check(rc)
        return True

    cdef int start(self, int status, bytes reason, list fields) except -1:
        """Begin an answer of (str, str) fields with the app's own reason phrase."""
        cdef int rc
        if reason is None:
            rc = pf_request_begin(self.lent(), status, -1)
        else:
            rc = pf_request_begin_line(self.lent(), status, PyBytes_AS_STRING(reason),
                                       PyBytes_GET_SIZE(reason), -1)
        check(rc)
        for pair in fields:
            if not self.put_again(pair):
                put_pair(self, pair)
        return 0

    cdef bint put_again(self, object pair) except -1:
        """Write a field whose pair was kept, if it was, and may stand here."""
        cdef Prepared *place = place_of(pair)
        if place.pair != <void *>pair or (place.text is NULL and not prepare(place)):
            return False
        return self.loan is not NULL and pf_request_line(self.loan, &place.line) == 0

    cdef int plain_field(self, bytes name, bytes value) except -1:
        """A field of bytes. One that speaks of the connection is ours to say, and is
        left out, but for Connection: close."""
        cdef int rc = pf_request_field(
            self.lent(), PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name),
            PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
        if rc < 0 and rc != PF_ERR_APP_HOP_BY_HOP:
            self.field(name, value)
        return 0

    cdef int announce_trailers(self) except -1:
        """Fields will follow the body, if the peer takes them. Before its first byte.
        """
        return check(pf_request_trailers(self.lent()))

    cdef int trailer(self, bytes name, bytes value) except -1:
        """A field behind the body, which is complete."""
        cdef int rc = pf_request_trailer(
            self.lent(), PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name),
            PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
        return refuse_field(rc, name, value) if rc < 0 else 0

    def set_length(self, uint64_t length):
        """The body's length, unless a field has said it; before the first write."""
        self.tell_length(length)

    cdef int tell_length(self, uint64_t length) except -1:
        """set_length() for other modules."""
        return check(pf_request_set_length(self.lent(), length))

    cdef int64_t announced(self) noexcept:
        """The length of the body, as fields have said it; -1: unknown."""
        return pf_request_length(self.loan)

    cdef int put(self, bytes data) except -1:
        """Write body bytes; large ones are borrowed."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        if pf_request_borrows(self.lent(), size):
            check(pf_request_write_ref(self.loan, PyBytes_AS_STRING(data), size,
                                       <void *>data))
            Py_INCREF(data)
        else:
            check(pf_request_write(self.loan, PyBytes_AS_STRING(data), size))
        return 0

    cdef int whole(self, bytes data) except -1:
        """The whole body, of an answer that was started; ends the loan."""
        cdef int rc = pf_request_whole(self.lent(), PyBytes_AS_STRING(data),
                                       PyBytes_GET_SIZE(data), <void *>data)
        if rc < 0:
            return check(rc)
        if rc > 0:
            Py_INCREF(data)
        return self.ended()

    cdef int conclude(self) except -1:
        """end(), for who keeps nothing of the request."""
        cdef int rc = pf_request_end(self.lent())
        self.ended()
        return check(rc)

    def write(self, data):
        """Write body bytes; returns how many bytes are not taken by the kernel yet."""
        self.put(data if type(data) is bytes else bytes(data))
        return pf_request_pending(self.loan)

    def write_file(self, file, int64_t offset, uint64_t length):
        """Write bytes of a regular file as body; returns how many bytes are pending.

        The kernel takes them from the file, which therefore must stay open until they
        are sent: until then the loop keeps a reference to it, and no longer. Raises
        ProtocolError if the file ends before, OSError if it cannot be sent so; then
        nothing is written, and the answer goes on as if nobody had asked.
        """
        cdef int fd = PyObject_AsFileDescriptor(file)
        if check(pf_request_write_file(self.lent(), fd, offset, length,
                                       <void *>file)) > 0:
            Py_INCREF(file)
        return pf_request_pending(self.loan)

    def want_room(self):
        """Have WRITABLE told when little is pending."""
        check(pf_request_want_room(self.lent()))

    def want_end(self):
        """Have ENDED told when the peer has closed its side: it may have left."""
        check(pf_request_want_end(self.lent()))

    def inform(self, int status, headers):
        """An interim answer, sent at once: 103 Early Hints and its like (RFC 8297)."""
        cdef bytes block = b""
        for name, value in headers:
            line = latin(name) + b": " + latin(value)
            if b"\n" in line:
                text = pf_error_text(PF_ERR_APP_FIELD_VALUE).decode("ascii")
                raise ProtocolError(f"{text}: {name!r}: {value!r}")
            block += line + b"\r\n"
        check(pf_request_inform(self.lent(), status, PyBytes_AS_STRING(block),
                                PyBytes_GET_SIZE(block)))
        self.loop.flush()

    def respond(self, int status, headers, bytes body not None):
        """The whole answer: begin, fields, body, end."""
        self.begin(status, headers, PyBytes_GET_SIZE(body))
        self.write(body)
        self.end()

    @property
    def begun(self):
        """Whether the head of the answer may have been sent."""
        return self.loan is NULL or pf_request_begun(self.loan)

    @property
    def answered(self):
        """Whether the loan is over."""
        return self.loan is NULL

    def reset(self):
        """Drop an answer's unsent head, so that another can be begun."""
        check(pf_request_reset(self.lent()))

    def end(self):
        """The answer is complete. Ends the loan, whatever it raises."""
        cdef pf_request *loan = self.lent()
        self.detach()
        cdef int rc = pf_request_end(loan)
        self.ended()
        check(rc)

    def abort(self):
        """Give up: the peer sees a truncated answer. Ends the loan; may be repeated."""
        self.drop()

    def refuse(self, int code):
        """Answer as the core answers this error, and close. Ends the loan."""
        cdef pf_request *loan = self.lent()
        self.detach()
        cdef int rc = pf_request_refuse(loan, code)
        if rc < 0:
            pf_request_abort(loan)
        self.ended()

    # -- as a WebSocket --

    cdef int offered(self) noexcept:
        """1: it asks to become a WebSocket; 0: it does not; < 0: it does so wrongly."""
        return pf_channel_offered(self.loan)

    def is_websocket(self):
        """Whether it asks to become a WebSocket. RequestError if it does so wrongly."""
        self.known()
        return check(self.offered()) > 0

    cdef int switch(self, bytes subprotocol, fields) except -1:
        """Accept the handshake; fields are pairs of bytes or str."""
        cdef const char *name = NULL
        cdef Py_ssize_t size = 0
        self.lent()
        self.detach()
        if subprotocol is not None:
            name, size = PyBytes_AS_STRING(subprotocol), PyBytes_GET_SIZE(subprotocol)
        check(pf_channel_begin(self.loan, name, size))
        try:
            for name_, value in fields:
                self.plain_field(latin(name_), latin(value))
        except BaseException:
            pf_request_reset(self.loan)
            raise
        return check(pf_channel_open(self.loan))

    def accept(self, subprotocol, fields):
        """switch(): become a WebSocket; then messages come and go."""
        self.switch(None if subprotocol is None else latin(subprotocol), fields)

    cdef object message(self):
        """The next message, str or bytes; None: none is there."""
        cdef pf_message found
        if check(pf_channel_receive(self.lent(), &found)) == 0:
            return None
        if found.kind == PF_MESSAGE_TEXT:
            return PyUnicode_DecodeUTF8(found.data, found.len, NULL)
        return found.data[:found.len]

    def take_message(self):
        """message(): the next message, str or bytes; None: none is there."""
        return self.message()

    cdef int send_bytes(self, bytes data) except -1:
        """A binary message; a large one is borrowed."""
        if check(pf_channel_send_ref(self.lent(), PF_MESSAGE_BINARY,
                                     PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data),
                                     <void *>data)) > 0:
            Py_INCREF(data)
        return 0

    cdef int send_text(self, str text) except -1:
        """A text message; a large one is borrowed."""
        cdef Py_ssize_t size = 0
        cdef const char *data = PyUnicode_AsUTF8AndSize(text, &size)
        if check(pf_channel_send_ref(self.lent(), PF_MESSAGE_TEXT, data, size,
                                     <void *>text)) > 0:
            Py_INCREF(text)
        return 0

    def send_message(self, data):
        """Send a message, str or bytes; returns how many bytes are pending."""
        if isinstance(data, str):
            self.send_text(str(data))
        elif isinstance(data, (bytes, bytearray, memoryview)):
            self.send_bytes(bytes(data))
        else:
            raise TypeError(f"a message is str or bytes, not {data!r}")
        return pf_request_pending(self.loan)

    cdef int close_websocket(self, int code, str reason) except -1:
        """Close it, unless the peer has; ends the loan, unless that is refused."""
        cdef bytes text = reason.encode()
        check(pf_channel_close(self.lent(), code, PyBytes_AS_STRING(text),
                               PyBytes_GET_SIZE(text)))
        self.ended()
        return 0

    def close(self, int code, str reason):
        """close_websocket(): after it nothing is sent; what comes is dropped."""
        self.close_websocket(code, reason)

    cdef tuple closing(self):
        """(code, reason) of a WebSocket that is closed or lost."""
        cdef pf_slice reason
        cdef int code = pf_channel_code(self.loan, &reason)
        return code, reason.data[:reason.len].decode("utf-8", "replace")

    def close_reason(self):
        """closing(): (code, reason) of a WebSocket that was closed or lost."""
        return self.closing()


cdef const char *latin_view(object text, Py_ssize_t *size) except NULL:
    """The bytes of bytes or of a latin-1 str (RFC 9110 5.5), without a copy: a str of
    one byte a character has them."""
    if type(text) is str:
        if PyUnicode_KIND(text) != 1:
            raise ProtocolError(f"a header field must be latin-1, not {text!r}")
        size[0] = PyUnicode_GET_LENGTH(text)
        return <const char *>PyUnicode_DATA(text)
    if type(text) is bytes:
        size[0] = PyBytes_GET_SIZE(text)
        return PyBytes_AS_STRING(text)
    raise ProtocolError(f"a header field must be str or bytes, not {text!r}")


cdef int put_field(Request request, object name, object value) except -1:
    """Write a field of an answer; without a request see only whether one may have it.
    """
    cdef Py_ssize_t name_len = 0
    cdef Py_ssize_t value_len = 0
    cdef const char *n = latin_view(name, &name_len)
    cdef const char *v = latin_view(value, &value_len)
    cdef int rc
    if request is None:
        rc = pf_response_check_field(n, name_len, v, value_len)
    else:
        rc = pf_request_field(request.lent(), n, name_len, v, value_len)
    return refuse_field(rc, name, value) if rc < 0 else 0


cdef int refuse_field(int rc, object name, object value) except -1:
    """Raise what says that this field cannot be sent."""
    if rc <= FIRST_APP_ERROR and rc != PF_ERR_CLOSED:
        text = pf_error_text(rc).decode("ascii")
        raise ProtocolError(f"{text}: {name!r}: {value!r}")
    return check(rc)


cdef int put_pair(Request request, pair) except -1:
    """The same with a pair of str."""
    name, value = pair
    if type(name) is not str or type(value) is not str:
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(
                f"a header field must be a pair of str, not {(name, value)!r}")
        name, value = str.__str__(name), str.__str__(value)
    return put_field(request, name, value)


cdef int check_line(int status, bytes reason) except -1:
    """Raise ProtocolError for a status line that no answer may have."""
    return check(pf_response_check_line(status, PyBytes_AS_STRING(reason),
                                        PyBytes_GET_SIZE(reason)))


# Apps have many of their pairs from constants, which come again, and nothing can change
# a tuple of text: who comes again is known by being the same, and checked no more. But
# a pair that was made for one answer often lies where that of the one before lay, too;
# so one that is new is not kept, which would also keep it from being freed, before its
# place has been the same for a while.
cdef enum:
    PREPARED = 64
    AGAIN = 32        # times that a pair comes until it is taken for a constant
cdef struct Prepared:
    void *pair    # owned
    void *text    # owned bytes; NULL: not asked for yet, or not a field of all answers
    pf_line line  # which lends it
    void *seen    # who came last and is not kept: nothing that may be looked into
    int times     # it came since another one that is not kept did
cdef Prepared prepared[PREPARED]
memset(prepared, 0, sizeof(prepared))


cdef inline Prepared *place_of(object pair) noexcept:
    return &prepared[(<size_t>(<void *>pair) >> 4) % PREPARED]


cdef int check_fields(list fields) except -1:
    """Raise TypeError or ProtocolError for (str, str) fields that no answer may have.
    """
    for pair in fields:
        if place_of(pair).pair != <void *>pair:
            put_pair(None, pair)
            remember(pair)
    return 0


cdef int remember(object pair) except -1:
    """A pair that was found good: keep it if it comes again and again, and stays so."""
    cdef Prepared *place = place_of(pair)
    if place.seen != <void *>pair:
        place.seen, place.times = <void *>pair, 1
        return 0
    place.times += 1
    return keep(pair, place) if place.times >= AGAIN else 0


cdef int keep(object pair, Prepared *place) except -1:
    cdef Prepared before = place[0]
    place.times = 0
    if type(pair) is not tuple or type(pair[0]) is not type(pair[1]):
        return 0
    if type(pair[0]) is not str and type(pair[0]) is not bytes:
        return 0
    Py_INCREF(pair)
    place.pair, place.text = <void *>pair, NULL
    Py_XDECREF(<PyObject *>before.pair)
    Py_XDECREF(<PyObject *>before.text)
    return 0


cdef bint prepare(Prepared *place) except -1:
    """It has come again: lay it out, if it is a field of all answers."""
    name, value = <object>place.pair
    cdef bytes text = latin(name) + b": " + latin(value) + b"\r\n"
    if pf_response_prepare(&place.line, PyBytes_AS_STRING(text), len(name),
                           len(value)) < 0:
        return False
    Py_INCREF(text)
    place.text = <void *>text
    return True


cdef bytes latin(object text):
    """The same as bytes."""
    cdef Py_ssize_t size = 0
    if type(text) is bytes:
        return text
    cdef const char *view = latin_view(text, &size)
    return view[:size]


# ---- Headers ----

cdef class Headers:
    """The header fields of a request: read-only, names in any case.

    Repeated fields are joined as RFC 9110 5.3 allows, cookies by "; ". get_all() and
    raw tell them apart.
    """

    cdef int find(self, name, int start) except -2:
        cdef const pf_head *head = self.request.heading()
        cdef bytes key
        if type(name) is str:
            try:
                key = name.encode("latin-1")
            except UnicodeEncodeError:
                return -1
        elif type(name) is bytes:
            key = name
        else:
            return -1
        return pf_http_find_field(head, self.request.bytes(), PyBytes_AS_STRING(key),
                                  PyBytes_GET_SIZE(key), start)

    cdef str value(self, int index):
        cdef const pf_field *field = &self.request.head.fields[index]
        return PyUnicode_DecodeLatin1(self.request.bytes() + field.value_at,
                                      field.value_len, NULL)

    cdef str name(self, int index):
        cdef const pf_field *field = &self.request.head.fields[index]
        if field.id != PF_FIELD_OTHER:
            return FIELD_NAMES[field.id]
        return PyUnicode_DecodeLatin1(self.request.bytes() + field.name_at,
                                      field.name_len, NULL).lower()

    def get_all(self, name):
        """Every value of this field, in order; an empty list if there is none."""
        cdef list values = []
        cdef int i = self.find(name, 0)
        while i >= 0:
            values.append(self.value(i))
            i = self.find(name, i + 1)
        return values

    def get(self, name, default=None):
        """The field's value, or default."""
        cdef int first = self.find(name, 0)
        if first < 0:
            return default
        if self.find(name, first + 1) < 0:
            return self.value(first)
        glue = "; " if self.request.head.fields[first].id == PF_FIELD_COOKIE else ", "
        return glue.join(self.get_all(name))

    def __getitem__(self, name):
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __contains__(self, name):
        return self.find(name, 0) >= 0

    def names(self):
        """The distinct names, in lower case, in order."""
        return list(dict.fromkeys(
            [self.name(i) for i in range(self.request.heading().nfields)]))

    def __iter__(self):
        return iter(self.names())

    def __len__(self):
        return len(self.names())

    def keys(self):
        """The distinct names, in lower case."""
        return self.names()

    def values(self):
        """The values, in the order of keys()."""
        return [self[name] for name in self.names()]

    def items(self):
        """(name, value) pairs, repeated fields joined."""
        return [(name, self[name]) for name in self.names()]

    def __eq__(self, other):
        if not isinstance(other, (Headers, Mapping)):
            return NotImplemented
        return dict(self.items()) == dict(other.items())

    __hash__ = None

    def __repr__(self):
        return f"Headers({self.items()!r})"

    @property
    def raw(self):
        """The fields as sent: a list of (name, value) pairs of bytes."""
        cdef const pf_head *head = self.request.heading()
        cdef const char *data = self.request.bytes()
        cdef list pairs = []
        for i in range(head.nfields):
            field = &head.fields[i]
            pairs.append((data[field.name_at:field.name_at + field.name_len],
                          data[field.value_at:field.value_at + field.value_len]))
        return pairs


Mapping.register(Headers)


# ---- Facts for tests and benchmarks ----

def simd():
    """Which SIMD variant scans: "avx2", "sse2" or "portable"."""
    return pf_http_simd().decode("ascii")


def set_simd(str name):
    """Choose the variant; OSError if this CPU has it not."""
    check(pf_http_set_simd(name.encode("ascii")))
