# cython: language_level=3, binding=True, freethreading_compatible=False
"""The fast path of native handlers: from an event to a call to an answer.

What most requests need is here and compiled: a Request, one call, bytes, str or a plain
Response back. Everything that takes more than one turn of the loop (bodies on the way,
streamed answers, coroutines, hooks, errors) goes to the Desk of native.py, in Python.
"""
from urllib.parse import unquote

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t
from libc.string cimport memchr

from prefork cimport _core
from prefork._core cimport (
    PF_EVENT_BODY,
    PF_EVENT_CLOSED,
    PF_EVENT_DRAINED,
    PF_EVENT_READABLE,
    PF_EVENT_REFUSED,
    PF_EVENT_RELEASED,
    PF_EVENT_REQUEST,
    PF_EVENT_WOKEN,
    PF_EVENT_WRITABLE,
    Loop,
)


# ---- What handlers see ----

cdef class Request(_core.Request):
    """A request, as a handler gets it. Lazy: what is not asked for costs nothing.

    Runs in the worker's loop thread, or in a thread of its own when the handler starts
    before the body has arrived. May be kept after the answer.
    """

    @property
    def desk(self):
        """Who knows the rest: native.Desk."""
        return self.loop.desk

    @property
    def path(self):
        """The decoded path: percent-escapes as UTF-8, wrong ones as U+FFFD."""
        cdef bytes raw = self.raw_path
        if memchr(PyBytes_AS_STRING(raw), c"%", PyBytes_GET_SIZE(raw)) is NULL:
            return raw.decode("ascii")
        return unquote(raw.decode("ascii"))

    @property
    def query(self):
        """The decoded query: a read-only mapping, the first value of each name.

        query.get_all(name) gives every value.
        """
        return self.desk.parse_query(self.query_string)

    @property
    def cookies(self):
        """The cookies by name, as sent (RFC 6265 5.4)."""
        return self.desk.parse_cookies(self.headers.get("cookie", ""))

    @property
    def scheme(self):
        """"http" or "https"."""
        return self.desk.scheme

    @property
    def body(self):
        """The whole body, in bytes.

        In a handler that starts before its body has arrived (stream_request_body, or a
        peer that waits for 100 Continue) this waits for it; an async handler says
        `await request.read()` instead. Raises ClientDisconnected or RequestError when
        the body does not come whole.
        """
        if self.content is None:
            self.content = self.desk.whole_body(self)
        return self.content

    async def read(self):
        """The whole body, in bytes, for async handlers."""
        if self.content is None:
            self.content = await self.desk.read_body(self)
        return self.content

    def stream(self):
        """The body in pieces as they arrive: iterate with for, or with async for."""
        return self.desk.body_stream(self)

    def inform(self, int status, headers):
        """An interim answer, sent at once: 103 Early Hints and its like (RFC 8297)."""
        self.desk.inform(self, status, headers)

    def text(self):
        """The body as text, in UTF-8."""
        return self.body.decode()

    def json(self):
        """The body, parsed as JSON."""
        return self.desk.parse_json(self.body)

    @property
    def whole(self):
        """The body if it was taken as a whole before, else None."""
        return self.content

    def __repr__(self):
        target = self.target.decode("ascii", "backslashreplace")
        return f"<Request {self.method} {target}>"


cdef class Response:
    """An answer: body (bytes, str, or an iterator of them), status, header fields.

    headers is a mapping or an iterable of (name, value) pairs. Content-Length, Date,
    Server and Connection are the server's to say; content_type replaces its default.
    """

    cdef public object body
    cdef public int status
    cdef public object headers
    cdef public object content_type

    def __init__(self, body=b"", int status=200, headers=None, content_type=None):
        self.body = body
        self.status = status
        self.headers = headers
        self.content_type = content_type

    def fields(self):
        """The header fields as a list of pairs, content_type among them."""
        cdef list pairs
        headers = self.headers
        if headers is None:
            pairs = []
        elif type(headers) is dict:
            pairs = list((<dict>headers).items())
        elif hasattr(headers, "items"):
            pairs = list(headers.items())
        else:
            pairs = list(headers)
        if self.content_type is not None:
            pairs.append(("Content-Type", self.content_type))
        return pairs

    def __repr__(self):
        return f"<Response {self.status}>"


# ---- From events to handlers ----

cdef enum:
    BATCH_MS = 1  # how long finished answers wait for others in their batch


cdef class Dispatcher:
    """Hands the loop's events to the handler, in the loop's thread.

    simple: a handler is called as soon as its request is lent whole. desk takes the
    rest: native.Desk.
    """

    cdef Loop loop
    cdef object handler
    cdef object desk
    cdef bint simple
    cdef object fatal
    cdef readonly bint drained

    def __init__(self, Loop loop, handler, desk, bint simple):
        self.loop = loop
        self.handler = handler
        self.desk = loop.desk = desk
        self.simple = simple

    def run(self):
        """Serve until the loop has drained."""
        while not self.drained:
            if self.turn(-1) == 0:
                PyErr_CheckSignals()

    cpdef int turn(self, int timeout_ms) except -1:
        """One turn of the loop: wait, then handle the batch. Returns its size."""
        cdef int count = self.loop.wait_batch(timeout_ms)
        cdef int64_t since = self.loop.now()
        cdef int i
        for i in range(count):
            try:
                self.dispatch(&self.loop.events[i])
            except BaseException as error:
                self.fatal = error  # the others in the batch get their answers first
            if self.loop.now() - since >= BATCH_MS and i + 1 < count:
                self.loop.flush()
                since = self.loop.now()
        if self.fatal is not None:
            error, self.fatal = self.fatal, None
            raise error
        return count

    cdef int dispatch(self, _core.pf_event *event) except -1:
        cdef unsigned flags = event.flags
        if flags & PF_EVENT_REQUEST:
            self.begin(event)
        elif flags & PF_EVENT_RELEASED:
            Py_DECREF(<object>event.user)
        elif event.request is not NULL:
            self.tell(<Request>event.user, flags, event.code)
        elif flags & PF_EVENT_WOKEN:
            PyErr_CheckSignals()
            self.loop.run_calls()
        elif flags & PF_EVENT_DRAINED:
            self.drained = True
        elif flags & PF_EVENT_READABLE:
            self.desk.readable(event.code)
        return 0

    cdef int begin(self, _core.pf_event *event) except -1:
        """A request is on loan."""
        cdef Request request = Request.__new__(Request)
        request.lend(self.loop, event.request)
        if event.flags & PF_EVENT_CLOSED:
            request.drop()
        elif event.flags & PF_EVENT_REFUSED:
            self.desk.refused(request, event.code)
        elif self.simple and request.is_whole():
            self.serve(request)
        else:
            self.desk.begin(request)
        return 0

    cpdef int serve(self, Request request) except -1:
        """Call the handler and finish with what it returns."""
        try:
            result = self.handler(request)
            self.loop.touch()
            if type(result) is bytes:
                request.answer(200, None, <bytes>result)
            else:
                self.finish(request, result)
        except Exception as error:
            self.desk.failed(request, error)
        except BaseException:
            self.desk.failed(request, None)
            raise
        return 0

    cpdef int finish(self, Request request, result) except -1:
        """Answer with what a handler returned."""
        if type(result) is bytes:
            request.answer(200, None, <bytes>result)
        elif type(result) is str:
            request.answer(200, None, (<str>result).encode())
        elif type(result) is Response:
            self.respond(request, <Response>result)
        else:
            self.desk.finish(request, result)
        return 0

    cdef int respond(self, Request request, Response response) except -1:
        """A Response: at once if its body is bytes or str."""
        cdef object body = response.body
        cdef bytes kind = None
        if type(body) is str:
            body = (<str>body).encode()
        if type(body) is not bytes:
            self.desk.respond(request, response)
            return 0
        if response.headers is not None:
            request.reply(response.status, response.fields(), <bytes>body)
            return 0
        if response.content_type is not None:
            kind = _core.latin(response.content_type)
        request.answer(response.status, kind, <bytes>body)
        return 0

    cdef int tell(self, Request request, unsigned flags, int code) except -1:
        """Something happened to a loan that an exchange follows."""
        cdef object exchange = request.exchange
        if exchange is None:
            request.drop()
            return 0
        try:
            if flags & PF_EVENT_CLOSED:
                exchange.on_closed(code)
                return 0
            if flags & PF_EVENT_BODY:
                exchange.on_body()
            if flags & PF_EVENT_WRITABLE:
                exchange.on_writable()
        except Exception as error:
            self.desk.failed(request, error)
        return 0
