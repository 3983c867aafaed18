# cython: language_level=3, binding=True, freethreading_compatible=False
"""ASGI 3.0: from a request to scope, a task that calls the app, and an answer.

What an app needs most is done when it asks: receive() and send() are no coroutines but
return awaitables that are done already, so a task that is started eagerly has mostly
ended before it is one, and then it runs the next app, too (Shift). Whatever has to wait
(a body on its way, an answer that is not read, a client that might leave) waits in
coroutines of asgi.py.

The head of an answer is held back until its first body, so that both leave together.
"""
import asyncio
import gc
import os
import sys
import weakref
from urllib.parse import unquote_to_bytes

cimport cython
from cpython.bytes cimport PyBytes_GET_SIZE
from cpython.dict cimport (
    PyDict_Copy,
    PyDict_GetItemWithError,
    PyDict_Next,
    PyDict_SetItem,
)
from cpython.list cimport PyList_GET_SIZE
from cpython.object cimport PyObject, PyObject_Call
from cpython.ref cimport Py_DECREF
from cpython.tuple cimport PyTuple_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeLatin1, PyUnicode_GET_LENGTH
from libc.stdint cimport int64_t
from libc.string cimport memchr, memcmp

from prefork import _core as core
from prefork.errors import ClientDisconnected

from prefork cimport _dispatch, _native
from prefork._blocks cimport Blocks
from prefork._tls cimport extension_of
from prefork._core cimport (
    PF_ERR_APP_BODY_LONG,
    PF_ERR_APP_BODY_SHORT,
    PF_EVENT_REQUEST,
    PF_FIELD_OTHER,
    PF_HEAD_CHUNKED,
    PF_HEAD_IS_GET,
    PF_HEAD_IS_HEAD,
    PF_HEAD_TRAILERS,
    PF_HEAD_UPGRADE,
    Request,
    pf_event,
    pf_field,
    pf_head,
    pf_peer,
    pf_request_body_done,
    pf_request_head,
    remember,
)
from prefork._dispatch cimport references, same_host
from prefork._waiting cimport NOTHING, done, give
from prefork._watch cimport changes, watch, watches


try:
    from _asyncio import Task as CTask
except ImportError:
    CTask = None


cdef extern from "Python.h":
    Py_ssize_t PyDict_GET_SIZE(dict mapping)
    int PyUnicode_KIND(object text)
    void *PyUnicode_DATA(object text)
    bint PyContext_CheckExact(object thing)
    cdef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(object coroutine, object value, PyObject **result)
    PyObject **PySequence_Fast_ITEMS(object list)
    ctypedef int (*visitproc)(PyObject *, void *) noexcept
    ctypedef struct PyTypeObject:
        int (*tp_traverse)(PyObject *, visitproc, void *) noexcept
    PyTypeObject *Py_TYPE(object thing)


cdef enum:
    BATCH_MS = 1        # how long apps share a task: then other events have their turn
    HIGH_WATER = 65536  # bytes pending above which send() waits for room
    AF_UNIX = 1

cdef list NONE = []  # of an answer's fields
cdef str GET = sys.intern("GET")
cdef str METHOD = sys.intern("method")
cdef str PATH = sys.intern("path")
cdef str RAW_PATH = sys.intern("raw_path")
cdef str QUERY_STRING = sys.intern("query_string")
cdef str HTTP_VERSION = sys.intern("http_version")
cdef str HEADERS = sys.intern("headers")
cdef str CLIENT = sys.intern("client")
cdef str SERVER = sys.intern("server")
cdef str SCHEME = sys.intern("scheme")
cdef str STATE = sys.intern("state")
cdef str ASGI = sys.intern("asgi")
cdef str EXTENSIONS = sys.intern("extensions")
cdef str TYPE = sys.intern("type")
cdef str STATUS = sys.intern("status")
cdef str BODY = sys.intern("body")
cdef str MORE_BODY = sys.intern("more_body")
cdef str TRAILERS = sys.intern("trailers")
cdef str SLASH = sys.intern("/")
cdef bytes SLASH_BYTES = b"/"

cdef str REQUEST_MESSAGE = sys.intern("http.request")
cdef str DISCONNECT_MESSAGE = sys.intern("http.disconnect")
cdef str START_MESSAGE = sys.intern("http.response.start")
cdef str BODY_MESSAGE = sys.intern("http.response.body")
cdef str TRAILERS_MESSAGE = sys.intern("http.response.trailers")

cdef tuple NAMES = tuple([name.encode() for name in core.FIELD_NAMES_KNOWN])

cdef object current_task = asyncio.current_task
cdef object referents_of = gc.get_referents
cdef object weak_refs_of = weakref.getweakrefcount

VERSIONS = {"version": "3.0", "spec_version": "2.5"}


def template(root_path="", scheme="http"):
    """What all scopes have in common, and a place for what they have not."""
    return {
        TYPE: "http", ASGI: None, HTTP_VERSION: "1.1", METHOD: GET, SCHEME: scheme,
        PATH: SLASH, RAW_PATH: SLASH_BYTES, QUERY_STRING: b"", "root_path": root_path,
        HEADERS: None, CLIENT: None, SERVER: None, STATE: None, EXTENSIONS: None,
    }


# ---- Who waits ----

cdef int wake(list waiters) except -1:
    """Let all who wait go on."""
    if waiters is None:
        return 0
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()
    return 0


cdef list joined(list waiters, waiter):
    """One more who waits; who has given up is left out."""
    cdef list found = [] if waiters is None else [w for w in waiters if not w.done()]
    found.append(waiter)
    return found


# ---- What is lent to apps ----

@cython.final
cdef class Mapping:
    """A dict of which every scope has a copy: the last one once more if nobody has it,
    and nobody has changed it."""

    cdef int lend(self, dict template) except -1:
        """Have the next copy of the template contain one."""
        cdef bint same = watches and self.seen == changes
        if references(<PyObject *>self.lent) != 2 or not (same or self.is_same()):
            self.lent = PyDict_Copy(self.original)
            watch(self.lent)
            PyDict_SetItem(template, self.name, self.lent)
        self.seen = changes
        return 0

    cdef bint is_same(self) noexcept:
        """Whether it is what it was; by identity, which asks nobody's __eq__."""
        cdef Py_ssize_t at = 0, original_at = 0
        cdef PyObject *key
        cdef PyObject *value
        cdef PyObject *original_key
        cdef PyObject *original_value
        if PyDict_GET_SIZE(self.lent) != PyDict_GET_SIZE(self.original):
            return False
        if PyDict_GET_SIZE(self.lent) == 0:
            return True
        while PyDict_Next(self.original, &original_at, &original_key, &original_value):
            if (not PyDict_Next(self.lent, &at, &key, &value)
                    or key != original_key or value != original_value):
                return False
        return True


@cython.final
cdef class Pairs:
    """Header fields, of which scopes have lists: the last one once more, likewise."""

    cdef tuple original
    cdef list lent

    cdef list lend(self):
        cdef Py_ssize_t size = PyTuple_GET_SIZE(self.original)
        if (references(<PyObject *>self.lent) != 1 or PyList_GET_SIZE(self.lent) != size
                or memcmp(PySequence_Fast_ITEMS(self.lent),
                          PySequence_Fast_ITEMS(self.original),
                          size * sizeof(PyObject *)) != 0):
            self.lent = list(self.original)
        return self.lent


cdef Mapping mapping_of(str name, dict original):
    cdef Mapping found = Mapping.__new__(Mapping)
    found.name, found.original, found.lent = name, original, {}
    watch(original)
    return found


cdef Mapping extensions_of(names):
    """What they tell of themselves is in dicts of their own, which are empty."""
    cdef dict original = {name: {} for name in names}
    for inner in original.values():
        watch(inner)
    return mapping_of(EXTENSIONS, original)


cdef Pairs pairs_of(list pairs):
    cdef Pairs found = Pairs.__new__(Pairs)
    found.original, found.lent = tuple(pairs), []
    return found


# ---- Messages ----

cdef object value_of(message, str key, object default):
    """message.get(key, default), without a call where it is a plain dict."""
    cdef PyObject *found
    if type(message) is not dict:
        return message.get(key, default)
    found = PyDict_GetItemWithError(message, key)
    return default if found is NULL else <object>found


cdef bint is_text(object text, str known) except -1:
    """text == known, which is of ASCII. What has a dot in it is never interned."""
    cdef Py_ssize_t size = PyUnicode_GET_LENGTH(known)
    if type(text) is not str:
        return text == known
    return (PyUnicode_GET_LENGTH(text) == size and PyUnicode_KIND(text) == 1
            and memcmp(PyUnicode_DATA(text), PyUnicode_DATA(known), size) == 0)


# ---- scope ----

cdef bytes lower_name(const char *name, Py_ssize_t size):
    cdef bytes text = name[:size]
    return text.lower()


cdef bint same_end(const pf_peer *a, const pf_peer *b):
    return a.port == b.port and same_host(a, b)


cdef class Dispatcher(_dispatch.Dispatcher):
    """Calls ASGI apps, each in a task of its own, on the event loop of the desk."""

    def configure(self, str root_path, tuple extensions, dict state):
        """What scopes are made from; before run()."""
        self.template = template(root_path, self.desk.scheme)
        self.no_server = True
        self.root_path = root_path
        self.raw_root = root_path.encode()
        self.versions = mapping_of(ASGI, VERSIONS)
        self.extensions = extensions_of(extensions)
        self.state = mapping_of(STATE, state)
        self.blocks = Blocks()

    def attach(self, loop, unix_path):
        """Run on this event loop; unix_path: of our unix socket, if there is one."""
        self.eager = sys.version_info >= (3, 12)
        self.shares = self.eager and asyncio.Task is CTask
        self.make_task = asyncio.Task
        self.how = {"loop": loop, "eager_start": True} if self.eager else {"loop": loop}
        if unix_path is not None:
            self.unix_server = (unix_path, None)

    cdef Request make(self):
        return _native.Request.__new__(_native.Request)

    cdef int set_ends(self, dict scope, Request request) except -1:
        """client and server."""
        cdef pf_peer remote, local
        request.ends(&remote, &local)
        if remote.family > AF_UNIX:
            if not same_host(&remote, &self.remote):
                self.remote, self.remote_text = remote, self.host_text(&remote)
            PyDict_SetItem(scope, CLIENT, (self.remote_text, remote.port))
        if self.no_server or not same_end(&local, &self.local):
            self.no_server = False
            self.local = local
            if local.family > AF_UNIX:
                scope[SERVER] = (self.host_text(&local), local.port)
            else:
                scope[SERVER] = self.unix_server
            self.template[SERVER] = scope[SERVER]  # likely that of the next, too
        return 0

    cdef int set_origin(self, dict scope, Request request) except -1:
        """What a trusted proxy says of the client."""
        host, port = request.client
        scope[CLIENT] = (host, port) if host else None
        scope[SCHEME] = request.told_scheme() or self.desk.scheme
        asked = request.host.encode("latin-1")
        headers = scope[HEADERS]
        if asked and (b"host", asked) not in headers:
            rest = [pair for pair in headers if pair[0] != b"host"]
            scope[HEADERS] = [(b"host", asked), *rest]
        return 0

    cdef int set_path(self, dict scope, const pf_head *head,
                      const char *data) except -1:
        cdef str path = SLASH
        cdef bytes raw = SLASH_BYTES
        if head.query.len > 0:
            PyDict_SetItem(scope, QUERY_STRING,
                           data[head.query.at:head.query.at + head.query.len])
        if head.path.len > 1 or (head.path.len == 1 and data[head.path.at] != c"/"):
            raw = data[head.path.at:head.path.at + head.path.len]
            if memchr(data + head.path.at, c"%", head.path.len) is NULL:
                path = raw.decode("utf-8", "replace")
            else:
                path = unquote_to_bytes(raw).decode("utf-8", "replace")
        elif not self.root_path:
            return 0
        if self.root_path and not self.is_under_root(path):
            path, raw = self.root_path + path, self.raw_root + raw
        PyDict_SetItem(scope, PATH, path)
        PyDict_SetItem(scope, RAW_PATH, raw)
        return 0

    cdef bint is_under_root(self, str path):
        """False: a proxy has taken root_path off, which ASGI wants in the path."""
        return (path == self.root_path or path.startswith(self.root_path + "/")
                or path == "*")

    cdef list header_list(self, const pf_head *head, const char *data):
        """[(name, value)] with names in lower case."""
        cdef list pairs
        cdef const pf_field *field
        found = self.blocks.find(head, data)
        if found is not None:
            return (<Pairs>found).lend()
        pairs = []
        for i in range(head.nfields):
            field = &head.fields[i]
            if field.id != PF_FIELD_OTHER:
                name = NAMES[field.id]
            else:
                name = lower_name(data + field.name_at, field.name_len)
            value = data[field.value_at:field.value_at + field.value_len]
            pairs.append((name, value))
        if self.blocks.again is not NULL:
            self.blocks.keep(head, data, pairs_of(pairs))
        return pairs

    cdef int clear_extensions(self) except -1:
        """An app may have changed what is inside of them."""
        if any(self.extensions.original.values()):
            self.extensions = extensions_of(list(self.extensions.original))
        return 0

    cdef dict scope(self, Request request):
        """The scope of a request on loan."""
        cdef const pf_head *head = request.head
        cdef const char *data = request.bytes()
        cdef dict scope
        if not watches or self.extensions.seen != changes:
            self.clear_extensions()
        self.versions.lend(self.template)
        self.extensions.lend(self.template)
        self.state.lend(self.template)
        scope = PyDict_Copy(self.template)
        if request.loop.secured:
            scope[EXTENSIONS]["tls"] = extension_of(request)
        PyDict_SetItem(scope, HEADERS, self.header_list(head, data))
        if not head.flags & PF_HEAD_IS_GET:
            PyDict_SetItem(scope, METHOD, PyUnicode_DecodeLatin1(
                data + head.method.at, head.method.len, NULL))
        if head.minor == 0:
            PyDict_SetItem(scope, HTTP_VERSION, "1.0")
        if head.flags & PF_HEAD_TRAILERS and not head.flags & PF_HEAD_IS_HEAD:
            scope[EXTENSIONS][TRAILERS_MESSAGE] = {}
        self.set_path(scope, head, data)
        self.set_ends(scope, request)
        if request.is_forwarded():
            self.set_origin(scope, request)
        return scope

    # ---- The call ----

    cdef int perform(self, Request request) except -1:
        """Start the app's task; mostly it has ended then."""
        cdef Shift shift = Shift.__new__(Shift)
        shift.exchange = self.next_exchange(request)
        return self.start(shift)

    cdef Exchange next_exchange(self, Request request):
        """For the app of this request: the last one once more, with its two methods, if
        nobody else refers to any of them. That saves making and ending all three."""
        cdef Exchange exchange = self.exchange
        if (exchange is None
                or references(<PyObject *>exchange) != 4  # ours, a local, two methods'
                or references(<PyObject *>self.receive) != 1
                or references(<PyObject *>self.send) != 1):
            exchange = self.exchange = Exchange.__new__(Exchange)
            exchange.dispatcher = self
            self.receive, self.send = exchange.receive, exchange.send
        else:
            exchange.reset()
        exchange.request = request
        return exchange

    cdef int start(self, Shift shift) except -1:
        """Have a task call the app for an exchange, and maybe for those that follow."""
        cdef Exchange exchange
        shift.dispatcher = self
        try:
            shift.call()
            if self.shares and shift.exchange is self.exchange:
                coroutine = shift
            else:
                coroutine = shift.exchange.around(shift.coroutine)
            task = PyObject_Call(self.make_task, (coroutine,), self.how)
        except BaseException as error:
            self.check_fork(error)
            shift.exchange.fail(error)
            if not isinstance(error, Exception):
                raise
            return 0
        exchange = shift.exchange
        if self.in_child():
            self.check_fork(failure_of(task))
        if self.eager and task.done():
            exchange.settle(task)
        else:
            self.desk.follow(task, exchange)
            if exchange.request.loan is not NULL:
                exchange.request.attach(exchange)
        self.loop.touch()
        return 0

    cdef pf_event *next_request(self) noexcept:
        """The next event of the batch, if it is a request that lies there whole."""
        cdef pf_event *event = &self.loop.events[self.at]
        if (self.at < self.count and event.flags == PF_EVENT_REQUEST and self.simple
                and pf_request_body_done(event.request)
                and not pf_request_head(event.request).flags & PF_HEAD_UPGRADE):
            return event
        return NULL


# ---- The task ----


cdef struct Marks:  # what objects referred to, and how many of that were found again
    PyObject **held
    Py_ssize_t count
    Py_ssize_t found


cdef int compare(PyObject *thing, void *context) noexcept:
    """Visits what an object refers to; stops where it is not what it was."""
    cdef Marks *marks = <Marks *>context
    if marks.found == marks.count or marks.held[marks.found] != thing:
        return 1
    marks.found += 1
    return 0


cdef bint differs(object thing, Marks *marks) noexcept:
    return Py_TYPE(thing).tp_traverse(<PyObject *>thing, compare, marks) != 0


@cython.freelist(8)
cdef class Shift:
    """The coroutine of a task that calls apps: for one request, and then, as long as
    nobody could tell, for those that follow it in the batch.

    To make and end a task costs a fifth of a small request. Most apps end without
    having waited, and leave the task that ran them as it was. Such a task may as well
    run the next one: if it is as untouched as a new one, and nobody has a reference to
    it, then an app cannot tell the two apart. So it is compared, after each app, with
    what it was before the first:

    - all that it refers to, as it tells the collector: callbacks, its name (which is
      made when somebody asks), a message of cancel(), attributes, its context;
    - all that its context refers to, which is replaced when a variable is set;
    - how many refer to the task, to the context and to this coroutine.

    A task that is not what it was ends with the app that has touched it, and so does
    one whose app raises or waits: that was this request's from its beginning on.
    """

    # -- what asyncio asks of a coroutine --

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        cdef PyObject *result = NULL
        cdef int how
        if self.dispatcher is not None:
            self.begin()
        how = PyIter_Send(self.coroutine, None, &result)
        while how == PYGEN_RETURN and self.dispatcher is not None and self.goes_on():
            Py_DECREF(<object>result)
            how = PyIter_Send(self.coroutine, None, &result)
        self.leave()
        if how == PYGEN_NEXT:
            waited = <object>result
            Py_DECREF(waited)
            return waited
        if how == PYGEN_RETURN:
            if <object>result is not None:
                give((<object>result,))
            Py_DECREF(<object>result)
        raise StopIteration  # to Cython it means no more than to return NULL

    def send(self, value):
        return self.coroutine.send(value)

    def throw(self, *error):
        return self.coroutine.throw(*error)

    def close(self):
        self.coroutine.close()

    def __getattr__(self, name):
        """cr_frame and the like, for who asks what a task does."""
        return getattr(self.coroutine, name)

    # -- the apps --

    cdef int call(self) except -1:
        """Have the app's coroutine for this exchange; it has not begun."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef Exchange exchange = self.exchange
        exchange.scope = exchange.make_scope()
        if exchange is dispatcher.exchange:
            receive, send = dispatcher.receive, dispatcher.send
        else:
            receive, send = exchange.receive, exchange.send
        self.coroutine = dispatcher.handler(exchange.scope, receive, send)
        return 0

    cdef int begin(self) except -1:
        """The task has begun: what is it like?"""
        if self.dispatcher.next_request() is NULL:
            return self.leave()  # nothing follows
        self.since = self.dispatcher.loop.now()
        self.task = current_task()
        self.held = referents_of(self.task)
        for held in self.held:
            if PyContext_CheckExact(held):
                self.context = held
        self.held += referents_of(self.context)
        self.refs = self.count_refs()
        if self.context is None or self.weak_refs() > 0:
            self.leave()
        return 0

    cdef int leave(self) except -1:
        """The task is one request's from now on."""
        self.dispatcher = None
        self.task = self.context = self.held = None
        return 0

    cdef Py_ssize_t count_refs(self) noexcept:
        """None of them is ever taken back, so a sum tells whether there are more."""
        return (references(<PyObject *>self.task) + references(<PyObject *>self.context)
                + references(<PyObject *>self))

    cdef Py_ssize_t weak_refs(self) except -1:
        return (<Py_ssize_t>weak_refs_of(self.task)
                + <Py_ssize_t>weak_refs_of(self.context))

    cdef bint is_untouched(self) except -1:
        """Whether the task is what it was when it began."""
        cdef Marks marks
        marks.held = PySequence_Fast_ITEMS(self.held)
        marks.count, marks.found = PyList_GET_SIZE(self.held), 0
        return (self.count_refs() == self.refs
                and not differs(self.task, &marks)
                and not differs(self.context, &marks)
                and marks.found == marks.count
                and self.weak_refs() == 0)

    cdef bint goes_on(self) except -1:
        """An app has returned: put the next one in its place, if it may be there."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef pf_event *event = dispatcher.next_request()
        cdef Request request
        if (event is NULL or self.exchange.request.loan is not NULL
                or dispatcher.in_child()
                or dispatcher.loop.touch() - self.since >= BATCH_MS
                or not self.is_untouched()):
            return False
        self.exchange.scope = None
        self.exchange = None
        dispatcher.at += 1
        request = dispatcher.make()
        request.lend(dispatcher.loop, event.request)
        self.exchange = dispatcher.next_exchange(request)
        try:
            self.call()
        except BaseException:
            self.leave()
            raise
        return True


# ---- The exchange ----

@cython.freelist(64)
cdef class Exchange(_dispatch.Follower):
    """receive() and send() of one request; all of it runs in the event loop's thread.

    The loan ends with the answer, or when the client leaves: then the app goes on, and
    is told so whenever it asks.
    """

    cdef int reset(self) except -1:
        """For another request, as if it were new."""
        self.request = self.scope = self.status = self.fields = self.error = None
        self.readers = self.writers = None
        self.stage = WAITING
        self.received = self.ended = self.events = False
        self.trailers = self.lost = False
        return 0

    cdef dict make_scope(self):
        """What the app is called with."""
        return self.dispatcher.scope(self.request)

    cdef object around(self, coroutine):
        """What its task runs, if that runs no other app."""
        return coroutine

    # -- receiving --

    @cython.binding(False)
    def receive(self):
        """The next message of the client."""
        self.dispatcher.refuse_child()
        cdef dict message = self.next_message()
        if message is None:
            return self.dispatcher.desk.receive(self)
        return done(message)

    cpdef dict next_message(self):
        """A message, if there is one by now."""
        cdef Request request = self.request
        cdef const pf_head *head
        if request.loan is NULL or self.ended:
            return {TYPE: DISCONNECT_MESSAGE}
        if self.received:
            if self.events and self.dispatcher.desk.draining:
                return {TYPE: DISCONNECT_MESSAGE}
            return None
        head = request.head
        if not head.flags & PF_HEAD_CHUNKED and head.content_length == 0:
            self.received = True
            return {TYPE: REQUEST_MESSAGE, BODY: b"", MORE_BODY: False}
        whole = request.is_whole()
        part = request.take_body()
        if not part and not whole:
            return None
        self.received = whole
        return {TYPE: REQUEST_MESSAGE, BODY: part, MORE_BODY: not whole}

    def message_coming(self):
        """A future that is done when next_message() is worth a look."""
        waiter = self.dispatcher.desk.loop.create_future()
        try:
            if self.received:
                self.request.want_end()
            else:
                self.request.want_body(False)
        except ClientDisconnected:
            self.ended = True
            return NOTHING
        self.readers = joined(self.readers, waiter)
        self.dispatcher.desk.schedule()
        return waiter

    # -- sending --

    @cython.binding(False)
    def send(self, message):
        """Send a message; RuntimeError if it is not its turn, OSError if nobody is
        there any more."""
        kind = message[TYPE]
        self.dispatcher.refuse_child()
        if self.stage == COMPLETE:
            raise RuntimeError(f"{kind} was sent after the answer was complete")
        if self.request.loan is NULL:
            raise ClientDisconnected(str(self.error))
        if is_text(kind, BODY_MESSAGE):
            return self.send_body(message)
        if is_text(kind, START_MESSAGE):
            self.send_start(message)
        elif kind == "http.response.pathsend":
            self.send_path(message)
        elif kind == "http.response.zerocopysend":
            return self.send_file(message)
        elif kind == "http.response.early_hint":
            self.send_hint(message)
        elif kind == TRAILERS_MESSAGE:
            self.send_trailers(message)
        else:
            raise RuntimeError(f"{kind!r} is no message that an answer is made of")
        return NOTHING

    cdef int send_start(self, message) except -1:
        if self.stage != WAITING:
            raise RuntimeError("http.response.start was sent twice")
        status = message[STATUS]
        if not isinstance(status, int):
            raise TypeError(f"status must be an int, not {status!r}")
        self.status = status
        self.fields = value_of(message, HEADERS, ())
        self.trailers = value_of(message, TRAILERS, False)
        self.stage = STARTED
        return 0

    cdef bint streams_events(self) except -1:
        """Whether these are server-sent events, which go on until somebody leaves."""
        self.fields = list(self.fields)
        for name, value in self.fields:
            if bytes_of(name).lower() == b"content-type":
                return bytes_of(value).lower().startswith(b"text/event-stream")
        return False

    cdef object send_body(self, message):
        cdef object body = value_of(message, BODY, b"")
        cdef bint more = value_of(message, MORE_BODY, False)
        if type(body) is not bytes:
            body = bytes_of(body)
        if self.stage == WAITING:
            raise RuntimeError("http.response.body was sent before http.response.start")
        if self.stage == STARTED:
            self.events = more and self.streams_events()
            self.begin()
            if not more:
                self.complete_whole(body)
                return NOTHING
        elif self.stage == TRAILING:
            self.refuse_behind_body("http.response.body")
        self.request.put(body)
        return self.sent(more)

    cdef object sent(self, bint more):
        """Part of the body is written: have it leave, and wait if it is too much."""
        if not more:
            self.complete()
        elif self.is_full():
            return self.dispatcher.desk.drain(self)
        elif not self.dispatcher.at_work:
            self.dispatcher.desk.schedule()
        return NOTHING

    cdef int begin(self) except -1:
        """Write the head that was held back."""
        cdef Request request = self.request
        self.stage = WAITING
        request.start(self.status, None, NONE)
        if self.trailers:
            request.announce_trailers()
        try:
            for pair in self.fields:
                if request.put_again(pair):
                    continue
                name, value = pair
                if type(name) is not bytes or type(value) is not bytes:
                    name, value = bytes_of(name), bytes_of(value)
                request.plain_field(<bytes>name, <bytes>value)
                remember(pair)
        except BaseException:
            request.reset()
            raise
        self.fields = None
        self.stage = STREAMING
        return 0

    cdef int complete_whole(self, bytes body) except -1:
        """All of the body at once: its length is known."""
        cdef int64_t size = PyBytes_GET_SIZE(body)
        if size > 0 or not self.request.asks_for_head():
            self.tell_length(size)
        self.request.put(body)
        return self.complete()

    cdef int tell_length(self, int64_t size) except -1:
        """The length of a body that is sent whole; the app may have told it, too."""
        cdef int64_t announced = self.request.announced()
        if announced < 0:
            return self.request.tell_length(size)
        if announced != size and not self.is_bodiless():
            self.stage = WAITING
            self.request.reset()
            raise core.error(PF_ERR_APP_BODY_SHORT if size < announced
                             else PF_ERR_APP_BODY_LONG)
        return 0

    cdef bint is_bodiless(self) except -1:
        """Whether all of the answer is its head."""
        return self.status in (204, 304) or self.request.asks_for_head()

    cdef int complete(self) except -1:
        """The body is; nothing more comes, but for trailers."""
        if self.trailers and self.stage != TRAILING:
            self.stage = TRAILING
            if not self.dispatcher.at_work:
                self.dispatcher.desk.schedule()
            return 0
        self.stage = COMPLETE
        self.request.conclude()
        wake(self.readers)
        if not self.dispatcher.at_work:
            self.dispatcher.desk.schedule()
        return 0

    cdef int send_path(self, message) except -1:
        """A file as the whole body; the kernel takes it from its cache."""
        if self.stage != STARTED:
            raise RuntimeError("http.response.pathsend must follow http.response.start")
        file = open(message["path"], "rb", buffering=0)
        size = os.fstat(file.fileno()).st_size
        self.begin()
        self.tell_length(size)
        self.request.write_file(file, 0, size)
        return self.complete()

    cdef object send_file(self, message):
        """Some of an open file, which stays the app's."""
        if self.stage == WAITING:
            raise RuntimeError(
                "http.response.zerocopysend was sent before http.response.start")
        if self.stage == TRAILING:
            self.refuse_behind_body("http.response.zerocopysend")
        file = Duplicate(message["file"].fileno())
        offset, count = message.get("offset"), message.get("count")
        moves = offset is None
        if moves:
            offset = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        if count is None:
            count = max(0, os.fstat(file.fileno()).st_size - offset)
        more = message.get(MORE_BODY, False)
        if self.stage == STARTED:
            self.begin()
            if not more:
                self.tell_length(count)
        self.request.write_file(file, offset, count)
        if moves:
            os.lseek(file.fileno(), offset + count, os.SEEK_SET)
        return self.sent(more)

    cdef int send_hint(self, message) except -1:
        """103 Early Hints, at once; ignored when the head has left."""
        if self.stage > STARTED:
            return 0
        links = [(b"Link", bytes_of(link)) for link in message["links"]]
        core.Request.inform(self.request, 103, links)
        return 0

    cdef int refuse_behind_body(self, str kind) except -1:
        raise RuntimeError(f"{kind} was sent after the last http.response.body")

    cdef int send_trailers(self, message) except -1:
        """Fields behind the body."""
        if self.stage != TRAILING:
            raise RuntimeError(
                f"{TRAILERS_MESSAGE} must follow the last http.response.body, and be "
                "announced by trailers in http.response.start")
        for name, value in message.get("headers", ()):
            self.request.trailer(bytes_of(name), bytes_of(value))
        if not message.get("more_trailers", False):
            self.complete()
        return 0

    cpdef bint is_full(self) noexcept:
        """Whether more is pending than should be."""
        return self.request.unsent() >= HIGH_WATER

    def room_coming(self):
        """A future that is done when is_full() is worth a look."""
        waiter = self.dispatcher.desk.loop.create_future()
        self.request.want_room()
        self.writers = joined(self.writers, waiter)
        self.dispatcher.desk.schedule()
        return waiter

    # -- events of the loan --

    def on_body(self):
        wake(self.readers)

    def on_writable(self):
        wake(self.writers)

    def on_ended(self):
        """It has closed its side. It may still read, so the answer goes on."""
        self.ended = True
        wake(self.readers)

    def on_closed(self, code):
        """The client has left, or its body is broken or late."""
        self.error = core.error(code)
        self.lost = True
        if core.error_status(code) and not self.request.begun:
            self.request.refuse(code)
        else:
            self.request.abort()
        wake(self.readers)
        wake(self.writers)

    def on_drain(self):
        """The worker stops, and a stream of events would not: its app is told."""
        if self.events:
            wake(self.readers)

    # -- the end --

    def on_done(self, task):
        """The app's task has ended, later than its start."""
        self.dispatcher.check_fork(failure_of(task))
        self.dispatcher.desk.unfollow(task)
        self.settle(task)

    cdef int settle(self, task) except -1:
        """The app has returned or raised."""
        try:
            task.result()
            if self.request.loan is not NULL:
                self.fail(RuntimeError(self.missing()))
        except asyncio.CancelledError:
            self.fail(None if self.dispatcher.desk.stopping
                      else RuntimeError("the app's task was cancelled"))
        except Exception as error:
            self.fail(error)
        except BaseException:  # it has ended the event loop already
            self.fail(None)
        self.scope = None
        return 0

    cdef str missing(self):
        if self.stage == WAITING:
            return "the app returned without an answer"
        if self.stage == STARTED:
            return "the app returned after http.response.start, without a body"
        if self.stage == TRAILING:
            return f"the app returned without the {TRAILERS_MESSAGE} it had announced"
        return "the app returned before the last http.response.body"

    cdef int fail(self, error) except -1:
        """End the loan: 500 if nothing is sent yet, else the answer stays truncated."""
        self.stage = COMPLETE
        self.dispatcher.desk.fail(self, self.request, error)
        wake(self.readers)
        wake(self.writers)
        return 0


cdef object failure_of(task):
    """What a task has raised so far."""
    return task.exception() if task.done() and not task.cancelled() else None


cdef bytes bytes_of(object data):
    """What stands for bytes, as bytes."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise TypeError(f"bodies and header fields are bytes, not {data!r}")


class Duplicate:
    """A descriptor of our own for a file that is being sent: the app may close its."""

    def __init__(self, fd):
        self.fd = os.dup(fd)

    def fileno(self):
        return self.fd

    def __del__(self):
        os.close(self.fd)
