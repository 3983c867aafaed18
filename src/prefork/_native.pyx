# cython: language_level=3, binding=True, freethreading_compatible=False
"""The fast path of native handlers: from an event to a call to an answer.

What most requests need is here and compiled: a Request, one call, bytes, str or a plain
Response back. Everything that takes more than one turn of the loop (bodies on the way,
streamed answers, coroutines, hooks, errors) goes to the Desk of native.py, in Python.
"""
from urllib.parse import unquote

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memchr

from prefork cimport _core, _dispatch
from prefork._tls cimport info_of


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
        """"http" or "https": what the client uses, if a trusted proxy tells."""
        return self.told_scheme() or self.desk.scheme

    @property
    def tls(self):
        """What is known of the connection's TLS (_tls.Info); None if it has none.

        To be asked for before the answer.
        """
        return info_of(self)

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
        """The body in pieces as they arrive: iterate with for, or with async for.

        A plain handler does so before it returns: not in an iterator that it returns.
        """
        return self.desk.body_stream(self)

    async def websocket(self, subprotocol=None, headers=None):
        """Accept a WebSocket handshake; returns a websocket.WebSocket.

        For async handlers. subprotocol is one of those that the client speaks,
        headers are fields of the answer. RequestError, which answers it, if the request
        is no handshake.
        """
        return self.desk.open_websocket(self, subprotocol, headers)

    @property
    def subprotocols(self):
        """The WebSocket subprotocols that the client speaks, as it prefers them."""
        text = self.headers.get("sec-websocket-protocol", "")
        return [part.strip() for part in text.split(",") if part.strip()]

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


# ---- From requests to handlers ----

cdef class Dispatcher(_dispatch.Dispatcher):
    """Calls native handlers."""

    cdef _core.Request make(self):
        return Request.__new__(Request)

    cdef int perform(self, _core.Request request) except -1:
        """Call the handler and finish with what it returns."""
        if self.crew is not None:
            return self.perform_in_crew(request)
        try:
            result = self.handler(request)
            self.check_fork(None)
            self.loop.touch()
            if type(result) is bytes:
                request.answer(200, None, <bytes>result)
            else:
                self.finish(request, result)
        except BaseException as error:
            self.check_fork(error)
            self.desk.failed(request, error if isinstance(error, Exception) else None)
            if not isinstance(error, Exception):
                raise
        return 0

    cdef int perform_in_crew(self, _core.Request request) except -1:
        """The same, but who leads in the end may be somebody else."""
        cdef object result = None
        cdef object error = None
        self.enter(request)
        try:
            result = self.handler(request)
        except BaseException as raised:
            error = raised
        self.check_fork(error)
        if self.leave(request):
            self.settle(request, result, error)
        elif type(result) is bytes or type(result) is str:
            self.deliver(self.settle, request, result, error)
        else:
            self.post(self.settle, request, result, error)
        return 0

    cdef tuple job(self, _core.Request request):
        return self.perform_later, request

    def perform_later(self, _core.Request request not None):
        """The handler of a request that found every thread at work."""
        if not request.answered:
            self.perform_in_crew(request)

    cpdef settle(self, _core.Request request, result, error):
        """A handler has returned or raised."""
        if request.loan is NULL:
            return
        try:
            if error is not None:
                raise error
            self.finish(request, result)
        except Exception as raised:
            self.desk.failed(request, raised)
        except BaseException:
            self.desk.failed(request, None)
            raise

    cpdef int finish(self, _core.Request request, result) except -1:
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

    cdef int respond(self, _core.Request request, Response response) except -1:
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
