# cython: language_level=3, binding=True, freethreading_compatible=False
"""WSGI (PEP 3333): from a request to environ, one call, and an answer.

environ is a copy of a template whose keys are all there already, so that filling it in
moves nothing. An Answer is what the app knows as start_response, and follows the
request to its end, through whichever thread: what touches the loop is done at once if
this thread leads, else posted to the one that does.
"""
import io
import os
import stat
import sys
import threading
from urllib.parse import unquote_to_bytes

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Copy, PyDict_GetItem, PyDict_SetItem
from cpython.ref cimport PyObject
from cpython.unicode cimport PyUnicode_DecodeLatin1
from libc.stdint cimport int64_t, uint16_t, uint64_t
from libc.string cimport memchr, memcmp

from prefork import _core as core
from prefork.errors import ClientDisconnected, ProtocolError, RequestError

from prefork cimport _dispatch, _native
from prefork._blocks cimport Blocks
from prefork._tls cimport set_environ
from prefork._watch cimport changes, watch, watches
from prefork._core cimport (
    PF_ERR_APP_BODY_SHORT,
    PF_FIELD_COOKIE,
    PF_FIELD_OTHER,
    PF_HEAD_CHUNKED,
    PF_HEAD_FORWARDED,
    PF_HEAD_IS_GET,
    Request,
    check_fields,
    check_line,
    latin,
    pf_field,
    pf_head,
    pf_peer,
)
from prefork._dispatch cimport references, same_host


cdef extern from "Python.h":
    object PyUnicode_FromStringAndSize(const char *text, Py_ssize_t size)
    Py_ssize_t PyVectorcall_NARGS(size_t nargsf)
    void PyType_Modified(type changed)
    enum:
        Py_TPFLAGS_HAVE_VECTORCALL
    ctypedef struct PyTypeObject:
        Py_ssize_t tp_vectorcall_offset
        unsigned long tp_flags


cdef enum:
    HIGH_WATER = 65536  # bytes pending above which a handler waits for room
    LOW_WATER = 16384   # a first part that is larger is sent at once
    PULL_MS = 1         # so long an iterable is pulled before others have their turn
    NAME_MAX = 256      # of a field name that becomes a key without a detour
    PORTS = 1024        # that are remembered as text
    COPIES = 64         # environs after one that was kept or changed: another may be
    AF_UNIX = 1

cdef str HTTP_1_0 = sys.intern("HTTP/1.0")
cdef str GET = sys.intern("GET")
cdef str SLASH = sys.intern("/")
cdef str EMPTY = ""

cdef str METHOD = sys.intern("REQUEST_METHOD")
cdef str RAW_URI = sys.intern("RAW_URI")
cdef str REQUEST_URI = sys.intern("REQUEST_URI")
cdef str SCRIPT_NAME = sys.intern("SCRIPT_NAME")
cdef str PATH_INFO = sys.intern("PATH_INFO")
cdef str QUERY_STRING = sys.intern("QUERY_STRING")
cdef str PROTOCOL = sys.intern("SERVER_PROTOCOL")
cdef str SERVER_NAME = sys.intern("SERVER_NAME")
cdef str SERVER_PORT = sys.intern("SERVER_PORT")
cdef str REMOTE_ADDR = sys.intern("REMOTE_ADDR")
cdef str REMOTE_PORT = sys.intern("REMOTE_PORT")
cdef str CONTENT_LENGTH = sys.intern("CONTENT_LENGTH")
cdef str INPUT = sys.intern("wsgi.input")
cdef str EARLY_HINTS = sys.intern("wsgi.early_hints")


def key_of(name):
    """The environ key of a field: HTTP_ACCEPT for accept."""
    if name in ("content-type", "content-length"):
        return sys.intern(name.upper().replace("-", "_"))
    return sys.intern("HTTP_" + name.upper().replace("-", "_"))


cdef tuple KEYS = tuple([key_of(name) for name in core.FIELD_NAMES_KNOWN])


def template(multithread, multiprocess, errors, software, root_path="", scheme="http"):
    """What all environs have in common, and a place for what they have not."""
    secure = {"HTTPS": "on"} if scheme == "https" else {}
    return {
        METHOD: GET, SCRIPT_NAME: root_path, PATH_INFO: SLASH, QUERY_STRING: EMPTY,
        RAW_URI: SLASH, REQUEST_URI: SLASH, PROTOCOL: sys.intern("HTTP/1.1"),
        SERVER_NAME: EMPTY, SERVER_PORT: EMPTY, REMOTE_ADDR: EMPTY, REMOTE_PORT: EMPTY,
        "SERVER_SOFTWARE": software, "wsgi.version": (1, 0), "wsgi.url_scheme": scheme,
        INPUT: NO_BODY, "wsgi.errors": errors, "wsgi.multithread": multithread,
        "wsgi.multiprocess": multiprocess, "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper, "wsgi.input_terminated": True,
        EARLY_HINTS: None, **secure,
    }


# ---- environ ----

FORWARDED = frozenset([
    key_of(name)
    for name in (
        "forwarded", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"
    )
])


cdef str latin_text(const char *text, Py_ssize_t size):
    return PyUnicode_DecodeLatin1(text, size, NULL)


cdef object other_key(const char *name, Py_ssize_t size):
    """HTTP_X_Y for x-y; None if it has an underscore, which would be the same."""
    cdef char key[NAME_MAX + 5]
    cdef Py_ssize_t i
    cdef char c
    if size > NAME_MAX:
        if memchr(name, c"_", size) is not NULL:
            return None
        return key_of(latin_text(name, size))
    key[0], key[1], key[2], key[3], key[4] = c"H", c"T", c"T", c"P", c"_"
    for i in range(size):
        c = name[i]
        if c == c"_":
            return None
        if c"a" <= c <= c"z":
            c -= 32
        elif c == c"-":
            c = c"_"
        key[5 + i] = c
    return PyUnicode_FromStringAndSize(key, size + 5)


# ---- What is lent to apps ----

cdef class Sheet:
    """What one request needs, filled in anew for the next one.

    To copy an environ and to free it costs a third of a small request. Most apps read
    it, call start_response, and keep neither: if both are as they were, and nobody else
    has a reference to them, no app can tell that another one had them before.
    """

    cdef dict environ
    cdef Answer answer  # start_response, in environ as wsgi.early_hints
    cdef bytes target   # what environ tells: the request target,
    cdef pf_peer remote  # and both ends
    cdef pf_peer local

    cdef bint is_back(self) except -1:
        """Whether nobody has kept it."""
        return (references(<PyObject *>self.environ) == 1
                and references(<PyObject *>self.answer) == 2 and self.answer.renew())


cdef class Known:
    """What is made of a block of header fields that has come again."""

    cdef dict fields  # the template with them
    cdef Sheet sheet  # None: none yet, or it is lent
    cdef int copies   # so many environs are copied before one is lent again


cdef inline bint same_end(const pf_peer *a, const pf_peer *b) noexcept:
    return a.port == b.port and same_host(a, b)


cdef class Dispatcher(_dispatch.Dispatcher):
    """Calls WSGI apps.

    Clients repeat their header fields, whatever they ask for: environs begin as a copy
    of one that was made for the same bytes, or are lent again (Sheet). Not those of an
    absolute-form target, whose authority stands for the Host that was sent (RFC 9112
    3.2.2).
    """

    cdef dict template
    cdef str root_path
    cdef str header_map   # what becomes of names with underscores
    cdef bint allows      # they are let in
    cdef pf_peer remote   # the ends that stand in the template
    cdef pf_peer local
    cdef bint template_ends
    cdef Blocks blocks    # of header fields, and environs with them
    cdef list ports                     # some of them as text,
    cdef uint16_t port_numbers[PORTS]   # and which they are
    cdef object last_status
    cdef int last_code
    cdef bytes last_reason

    def configure(self, dict template, str root_path, str header_map):
        """What environs are made from; before run()."""
        self.template = template
        self.root_path = root_path
        self.header_map = header_map
        self.allows = header_map == "allow"
        self.blocks = Blocks()
        self.ports = [EMPTY] * PORTS

    cdef Request make(self):
        return _native.Request.__new__(_native.Request)

    cdef int set_ends(self, dict environ, Request request) except -1:
        """REMOTE_* and SERVER_*, where they are not those of the template."""
        cdef pf_peer remote, local
        request.ends(&remote, &local)
        if self.template_ends == 0:
            self.adopt_ends(environ, &remote, &local)
        if remote.family > AF_UNIX:
            if not same_host(&remote, &self.remote):
                PyDict_SetItem(environ, REMOTE_ADDR, self.host_text(&remote))
            PyDict_SetItem(environ, REMOTE_PORT, self.port_text(remote.port))
        elif self.remote.family > AF_UNIX:
            PyDict_SetItem(environ, REMOTE_ADDR, EMPTY)
        if local.family <= AF_UNIX:
            self.name_server(environ)
        elif not same_host(&local, &self.local) or local.port != self.local.port:
            environ[SERVER_NAME] = self.host_text(&local)
            environ[SERVER_PORT] = self.port_text(local.port)
        return 0

    cdef str port_text(self, uint16_t port):
        """A port as text, remembered: a connection has the same one all its life."""
        cdef int at = port % PORTS
        if self.port_numbers[at] != port or port == 0:
            self.ports[at] = str(port)
            self.port_numbers[at] = port
        return <str>self.ports[at]

    cdef int name_server(self, dict environ) except -1:
        """SERVER_* on a unix socket, where only the client's Host can tell them; PEP
        3333 forbids that they are empty."""
        name, colon, port = environ.get("HTTP_HOST", "").rpartition(":")
        if not colon or "]" in port:
            name, port = name + colon + port, EMPTY
        environ[SERVER_NAME], environ[SERVER_PORT] = name or "localhost", port or "80"
        return 0

    cdef int adopt_ends(self, dict environ, const pf_peer *remote,
                        const pf_peer *local) except -1:
        """The first request's ends are likely to be those of many: a proxy's, ours."""
        self.template_ends = 1
        self.remote, self.local = remote[0], local[0]
        if remote.family > AF_UNIX:
            self.template[REMOTE_ADDR] = environ[REMOTE_ADDR] = self.host_text(remote)
        if local.family > AF_UNIX:
            self.template[SERVER_NAME] = environ[SERVER_NAME] = self.host_text(local)
            port = self.port_text(local.port)
            self.template[SERVER_PORT] = environ[SERVER_PORT] = port
        return 0

    cdef int set_origin(self, dict environ, Request request) except -1:
        """What a trusted proxy says of the client."""
        host, port = request.client
        environ[REMOTE_ADDR], environ[REMOTE_PORT] = host, str(port) if port else EMPTY
        scheme = request.told_scheme() or self.desk.scheme
        environ["wsgi.url_scheme"] = scheme
        if scheme == "http":
            environ.pop("HTTPS", None)  # between client and proxy it was clear
        if request.host:
            environ["HTTP_HOST"] = request.host
        return 0

    cdef int set_path(self, dict environ, const pf_head *head,
                      const char *data) except -1:
        cdef str path, target
        if head.target.len != 1 or data[head.target.at] != c"/":
            target = latin_text(data + head.target.at, head.target.len)
            PyDict_SetItem(environ, RAW_URI, target)
            PyDict_SetItem(environ, REQUEST_URI, target)
        if head.query.len > 0:
            PyDict_SetItem(environ, QUERY_STRING,
                           latin_text(data + head.query.at, head.query.len))
        if head.path.len == 0 or (head.path.len == 1 and data[head.path.at] == c"/"):
            path = SLASH
        elif memchr(data + head.path.at, c"%", head.path.len) is NULL:
            path = latin_text(data + head.path.at, head.path.len)
        else:
            raw = data[head.path.at:head.path.at + head.path.len]
            path = unquote_to_bytes(raw).decode("latin-1")
        if self.root_path:
            path = self.under_root(path)
        if path is not SLASH:
            PyDict_SetItem(environ, PATH_INFO, path)
        return 0

    cdef str under_root(self, str path):
        """The rest behind root_path; all of it if a proxy has taken that off."""
        if path == self.root_path or path.startswith(self.root_path + "/"):
            return path[len(self.root_path):]
        return path

    cdef int set_fields(self, dict environ, const pf_head *head,
                        const char *data) except -1:
        cdef const pf_field *field
        cdef uint64_t seen = 0
        cdef object key
        cdef str value
        for i in range(head.nfields):
            field = &head.fields[i]
            value = latin_text(data + field.value_at, field.value_len)
            if field.id != PF_FIELD_OTHER:
                key = KEYS[field.id]
                if seen >> field.id & 1 or (self.allows and key in environ):
                    glue = "; " if field.id == PF_FIELD_COOKIE else ","
                    value = <str>environ[key] + glue + value
                seen |= <uint64_t>1 << field.id
            else:
                key = other_key(data + field.name_at, field.name_len)
                if key is None:
                    key = self.underscored(latin_text(data + field.name_at,
                                                      field.name_len))
                    if key is None:
                        continue
                if PyDict_GetItem(environ, key) is not NULL:
                    value = <str>environ[key] + "," + value
            PyDict_SetItem(environ, key, value)
        return 0

    cdef object underscored(self, str name):
        """Its underscore makes it the same as another name: see header_map."""
        if self.header_map == "drop":
            return None
        if self.header_map == "refuse":
            raise RequestError(f"header field name with an underscore: {name}", 400)
        key = key_of(name.lower())
        return None if key in FORWARDED else key  # trust looks at real names only

    cdef Known known(self, Request request):
        """What was made of its header fields before, or None."""
        return <Known>self.blocks.find(request.head, request.bytes())

    cdef dict with_fields(self, const pf_head *head, const char *data):
        """A copy of the template with the header fields of this head; after known() has
        found nothing."""
        cdef Known known
        cdef dict environ = PyDict_Copy(self.template)
        self.set_fields(environ, head, data)
        if self.blocks.again is not NULL:
            known = Known.__new__(Known)
            known.fields = PyDict_Copy(environ)
            self.blocks.keep(head, data, known)
        return environ

    cdef dict environ(self, Known known, Request request, Answer answer):
        """PEP 3333's environ of a request on loan."""
        cdef const pf_head *head = request.head
        cdef const char *data = request.bytes()
        cdef dict environ
        if known is None:
            environ = self.with_fields(head, data)
        else:
            environ = PyDict_Copy(known.fields)
        if not head.flags & PF_HEAD_IS_GET:
            PyDict_SetItem(environ, METHOD, latin_text(data + head.method.at,
                                                       head.method.len))
        if head.minor == 0:
            PyDict_SetItem(environ, PROTOCOL, HTTP_1_0)
        self.set_path(environ, head, data)
        self.set_ends(environ, request)
        if request.loop.secured:
            set_environ(environ, request)
        if request.is_forwarded():
            self.set_origin(environ, request)
        if head.flags & PF_HEAD_CHUNKED or head.content_length > 0:
            self.take_body(environ, request, answer)
        PyDict_SetItem(environ, EARLY_HINTS, answer)
        return environ

    cdef int take_body(self, dict environ, Request request, Answer answer) except -1:
        """All of it that is here; a chunked one has a length then, RFC 9112 7.1.3."""
        cdef Input body = Input.__new__(Input)
        body.answer = answer
        PyDict_SetItem(environ, INPUT, body)
        if not request.is_whole():
            body.answer.input = body
            return 0
        size = body.take(request)
        if request.head.flags & PF_HEAD_CHUNKED:
            environ[CONTENT_LENGTH] = str(size)
            environ.pop("HTTP_TRANSFER_ENCODING", None)
        return 0

    cdef bint is_plain(self, Request request) noexcept:
        """Whether the target and the ends are all that its environ has of its own."""
        cdef const pf_head *head = request.head
        return (head.flags & (PF_HEAD_IS_GET | PF_HEAD_CHUNKED | PF_HEAD_FORWARDED)
                == PF_HEAD_IS_GET and head.minor > 0 and head.content_length <= 0
                and not request.loop.secured)

    cdef Sheet new_sheet(self, Known known):
        cdef Sheet sheet = Sheet.__new__(Sheet)
        sheet.environ = PyDict_Copy(known.fields)
        sheet.answer = Answer.__new__(Answer)
        sheet.answer.dispatcher = self
        sheet.environ[EARLY_HINTS] = sheet.answer
        watch(sheet.environ)
        return sheet

    cdef int fill_in(self, Sheet sheet, Request request) except -1:
        """Have it tell of this request, of which is_plain() is true."""
        cdef dict environ = sheet.environ
        cdef const pf_head *head = request.head
        cdef const char *target = request.bytes() + head.target.at
        cdef pf_peer remote, local
        cdef bint first = sheet.target is None
        if (first or PyBytes_GET_SIZE(sheet.target) != head.target.len
                or memcmp(PyBytes_AS_STRING(sheet.target), target, head.target.len)):
            sheet.target = target[:head.target.len]
            environ[RAW_URI] = environ[REQUEST_URI] = environ[PATH_INFO] = SLASH
            environ[QUERY_STRING] = EMPTY
            self.set_path(environ, head, request.bytes())
        request.ends(&remote, &local)
        if first or not same_end(&remote, &sheet.remote):
            self.set_client(sheet, &remote)
        if first or not same_end(&local, &sheet.local):
            self.set_server(sheet, &local)
        return 0

    cdef int set_client(self, Sheet sheet, const pf_peer *remote) except -1:
        if remote.family > AF_UNIX:
            PyDict_SetItem(sheet.environ, REMOTE_PORT, self.port_text(remote.port))
            if not same_host(remote, &sheet.remote):
                sheet.environ[REMOTE_ADDR] = self.host_text(remote)
        else:
            sheet.environ[REMOTE_ADDR] = sheet.environ[REMOTE_PORT] = EMPTY
        sheet.remote = remote[0]
        return 0

    cdef int set_server(self, Sheet sheet, const pf_peer *local) except -1:
        if local.family > AF_UNIX:
            sheet.environ[SERVER_NAME] = self.host_text(local)
            sheet.environ[SERVER_PORT] = self.port_text(local.port)
        else:
            self.name_server(sheet.environ)
        sheet.local = local[0]
        return 0

    # ---- The call ----

    cdef Answer answer_to(self, Request request):
        cdef Answer answer = Answer.__new__(Answer)
        answer.dispatcher = self
        self.address(answer, request)
        return answer

    cdef int address(self, Answer answer, Request request) except -1:
        """It will be the answer to this request."""
        answer.request = request
        if self.crew is not None:
            request.exchange = answer
        return 0

    cdef int perform(self, Request request) except -1:
        cdef Answer answer
        cdef Known known = self.known(request)
        if known is not None and watches and self.is_plain(request):
            if known.copies == 0:
                return self.perform_on_sheet(known, request)
            known.copies -= 1
        answer = self.answer_to(request)
        try:
            environ = self.environ(known, request, answer)
        except BaseException as error:
            answer.end_now(None, error)
            return 0
        return self.call(answer, environ)

    cdef int perform_on_sheet(self, Known known, Request request) except -1:
        cdef unsigned long before
        cdef Sheet sheet = known.sheet
        known.sheet = None
        if sheet is None:
            sheet = self.new_sheet(known)
        self.address(sheet.answer, request)
        try:
            self.fill_in(sheet, request)
        except BaseException as error:
            sheet.answer.end_now(None, error)
            return 0
        before = changes
        self.call(sheet.answer, sheet.environ)
        if changes == before and sheet.is_back():
            known.sheet = sheet
        else:
            known.copies = COPIES
        return 0

    cdef tuple job(self, Request request):
        cdef Answer answer = self.answer_to(request)
        try:
            return (self.call_later, answer,
                    self.environ(self.known(request), request, answer))
        except BaseException as error:
            return self.post, answer.end_now, None, error

    def call_later(self, Answer answer, dict environ):
        """The app for a request that found every thread at work, unless it has left."""
        if answer.error is None:
            self.call(answer, environ)
        else:
            answer.fail(answer.error)

    cdef int call(self, Answer answer, dict environ) except -1:
        """Call the app, and send what it returns; in its thread."""
        cdef bytes body
        try:
            self.enter(answer.request)
            result = self.handler(environ, answer)
            self.check_fork(None)
            body = answer.only_part(result)
            if body is None:
                answer.deliver(result)
            elif self.crew is None and answer.input is None:
                self.leave(answer.request)
                self.loop.touch()
                answer.complete_now(body)
            else:
                answer.conclude(body, None)
        except BaseException as error:
            self.check_fork(error)
            answer.fail(error)
        return 0

    cdef int read_status(self, str status) except -1:
        """The code and the reason phrase of "200 OK", kept for the next time."""
        if status is self.last_status or status == self.last_status:
            return 0
        digits = status[:3]
        if status[3:4] != " " or not digits.isdecimal() or not digits.isascii():
            raise ProtocolError(f"status must be like '200 OK', not {status!r}")
        reason = latin(status[4:])
        check_line(int(digits), reason)
        self.last_code = int(digits)
        self.last_reason = None if status == "200 OK" else reason
        self.last_status = status
        return 0


# ---- The answer ----

cdef tuple TEXT = (bytes, str, bytearray, memoryview)


cdef bytes plain(part):
    """Bytes of a subclass as bytes."""
    return <bytes>part if type(part) is bytes else bytes(part)


@cython.freelist(64)
cdef class Answer:
    """start_response(status, headers, exc_info=None) of one request, and its state.

    The app's thread calls send(), finish() and fail(); what is named .._now() belongs
    to the thread that leads, which the app's may be. Raises TypeError, AssertionError
    and ProtocolError where PEP 3333 forbids what the app does.
    """

    cdef void *vectorcall  # PEP 590
    cdef Request request
    cdef Dispatcher dispatcher
    cdef int code         # the status
    cdef bytes reason
    cdef list fields      # None: start_response() was not called yet
    cdef bint committed   # the app has sent body bytes
    cdef bint begun       # the head is on its way
    cdef bint head        # all of the answer is its head
    cdef object error     # why nothing more can be sent, or received
    cdef int64_t written  # bytes of the body
    cdef int64_t pending  # of them, not taken by the socket, as far as known
    cdef int64_t posted   # and not yet seen by who leads
    cdef object parts     # the iterator that the app returned
    cdef object closing   # close() of what the app returned
    cdef bint waits       # the app's thread waits for an event
    cdef object gate      # a lock, at which it does so in a crew
    cdef Input input      # whose body is in a file, or still to come

    def __cinit__(self):
        self.vectorcall = <void *>call_answer

    cdef bint renew(self) except -1:
        """Be as if new, if that takes no more than to forget a request."""
        if (self.request.loan is not NULL or self.error is not None
                or self.parts is not None or self.closing is not None
                or self.gate is not None or self.input is not None or self.waits):
            return False
        self.request = self.fields = self.reason = None
        self.committed = self.begun = self.head = False
        self.written = self.pending = self.posted = 0
        return True

    # -- what apps call --

    def __call__(self, status, headers=None, exc_info=None):
        """start_response(status, headers, exc_info=None), and two more.

        Hardly any app calls write(data) or wsgi.early_hints(headers), so what these
        would be is not made for it: they are this, too.
        """
        return self.called(status, headers, exc_info)

    cdef object called(self, status, headers, exc_info):
        if self.dispatcher is None:
            raise TypeError("this is no start_response: the server makes those")
        if headers is None and (self.fields is not None or type(status) is not str):
            self.tell(status)
            return None
        if type(status) is not str:
            if not isinstance(status, str):
                raise TypeError(f"status must be a str, not {status!r}")
            status = str.__str__(status)
        if type(headers) is not list:
            raise TypeError(f"headers must be a list of pairs, not {headers!r}")
        if exc_info is not None:
            self.replace(exc_info)
        elif self.fields is not None:
            raise AssertionError("start_response() was called twice without exc_info")
        self.dispatcher.read_status(status)
        check_fields(headers)
        self.code, self.reason = self.dispatcher.last_code, self.dispatcher.last_reason
        self.fields = headers
        self.head = (self.code == 204 or self.code == 304
                     or self.request.asks_for_head())
        return self

    cdef int tell(self, what) except -1:
        """write(data), or wsgi.early_hints(headers): a 103 with them (RFC 8297)."""
        if hasattr(what, "__iter__") and not isinstance(what, TEXT):
            self.hint(list(what))
        elif self.checked(what):
            self.send(plain(what))
        return 0

    cdef int replace(self, exc_info) except -1:
        """Another answer is to take the place of this one, if it is not too late."""
        try:
            if self.committed:
                raise exc_info[1].with_traceback(exc_info[2])
        finally:
            exc_info = None  # PEP 3333: no circular reference
        return 0

    cdef int hint(self, list fields) except -1:
        """An interim answer; in the app's thread."""
        cdef Dispatcher dispatcher = self.dispatcher
        dispatcher.refuse_child()
        if self.error is not None:
            raise self.error
        if not dispatcher.leads():
            dispatcher.deliver(self.hint_posted, fields)
            return 0
        dispatcher.leave(self.request)
        try:
            self.hint_now(fields)
        finally:
            dispatcher.enter(self.request)
        return 0

    def hint_posted(self, fields):
        """What a thread hints that does not lead; it hears of errors later."""
        try:
            self.hint_now(fields)
        except Exception as error:
            self.found(error)

    def hint_now(self, fields):
        if self.request.loan is not NULL and not self.begun:
            core.Request.inform(self.request, 103, fields)

    # -- the whole answer at once --

    cdef bytes only_part(self, result):
        """The body, if it is one piece or none, and nobody has to wait for it."""
        cdef object part
        if self.committed or self.fields is None:
            return None
        if type(result) is not list and type(result) is not tuple:
            return None
        if len(result) == 1:
            part = result[0]
            return <bytes>part if type(part) is bytes else None
        return None if len(result) else b""

    cdef int complete_now(self, bytes body) except -1:
        """Answer with a body that is whole."""
        self.start_now()
        return self.request.whole(body)

    cdef int complete_file_now(self, file) except -1:
        """Answer with a file, as much of it as was announced."""
        cdef Request request = self.request
        self.start_now()
        length = file.length
        if request.announced() < 0:
            request.set_length(length)
        elif request.announced() < length:
            length = request.announced()
        elif request.announced() > length and not self.head:
            raise core.error(PF_ERR_APP_BODY_SHORT)
        request.write_file(file, file.offset, length)
        return request.conclude()

    # -- piece by piece --

    cdef int deliver(self, result) except -1:
        """Send what the app returned; in its thread."""
        self.closing = getattr(result, "close", None)
        try:
            if type(result) is FileWrapper and not self.committed:
                sent = result.sendable()
                if sent is not None:
                    self.conclude(sent, None)
                    return 0
            self.parts = iter(result)
        except BaseException as error:
            self.fail(error)
            return 0
        if self.dispatcher.crew is not None:
            self.exhaust()
            return 0
        if self.dispatcher.sender is None:
            self.dispatcher.start_sender()
        self.pull()
        return 0

    cdef int exhaust(self) except -1:
        """All parts, in a thread that may wait."""
        try:
            for part in self.parts:
                self.dispatcher.check_fork(None)
                if self.checked(part):
                    self.send(plain(part))
                    if self.head:
                        break
        except BaseException as error:
            self.fail(error)
            return 0
        self.finish()
        return 0

    cdef int pull(self) except -1:
        """As many as there is room and time for, in the only thread there is."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef int64_t until = dispatcher.loop.touch() + PULL_MS
        try:
            if self.error is not None:
                raise self.error
            dispatcher.enter(self.request)
            for part in self.parts:
                dispatcher.leave(self.request)
                dispatcher.check_fork(None)
                if self.checked(part):
                    self.committed = True
                    self.write_now(plain(part))
                    if self.head:
                        break
                    if self.pending >= HIGH_WATER or dispatcher.loop.touch() > until:
                        self.request.attach(self)
                        self.request.want_room()
                        return 0
                dispatcher.enter(self.request)
        except BaseException as error:
            self.fail(error)
            return 0
        self.finish()
        return 0

    cdef Py_ssize_t checked(self, part) except -1:
        """How many bytes a part has."""
        if not isinstance(part, bytes):
            raise TypeError(f"the body of an answer is made of bytes, not {part!r}")
        return PyBytes_GET_SIZE(part)

    cdef int send(self, bytes data) except -1:
        """Send, and wait while too much is pending."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef bint full
        if self.error is not None:
            raise self.error
        if self.fields is None:
            raise ProtocolError("the app did not call start_response()")
        dispatcher.refuse_child()
        self.committed = True
        if not dispatcher.leads():
            self.posted += PyBytes_GET_SIZE(data)
            full = self.posted + self.pending >= HIGH_WATER
            if full:
                self.close_gate()
            dispatcher.deliver(self.write_posted, data)
        else:
            dispatcher.leave(self.request)
            try:
                self.write_now(data)
                full = self.pending >= HIGH_WATER
                if full:
                    self.close_gate()
                    self.request.attach(self)
                    self.request.want_room()
            finally:
                dispatcher.enter(self.request)
        if full:
            self.wait()
        return 0

    def write_posted(self, bytes data):
        """What a thread sends that does not lead; it hears of errors later."""
        self.posted -= PyBytes_GET_SIZE(data)
        if self.error is not None:
            return
        try:
            self.write_now(data)
            if self.waits and self.pending >= HIGH_WATER:
                self.request.want_room()
            elif self.posted + self.pending < HIGH_WATER:
                self.open_gate()
        except Exception as error:
            self.found(error)

    cdef int write_now(self, bytes data) except -1:
        """Write, and send at once, as PEP 3333 wants it.

        But the first part, with which most answers are complete, leaves with those of
        others: should the second be long in coming, who leads then, or the sender of
        the only thread, sends it.
        """
        cdef Request request = self.request
        cdef bint first
        if request.loan is NULL:
            raise ClientDisconnected("the request is over")
        if not self.begun:
            self.start_now()
        if self.head:
            return 0
        request.put(data)
        first = self.written == 0 and PyBytes_GET_SIZE(data) < LOW_WATER
        self.written += PyBytes_GET_SIZE(data)
        if not first or not self.dispatcher.sends_later():
            self.dispatcher.loop.flush()
        self.pending = request.unsent()
        return 0

    cdef int start_now(self) except -1:
        """Begin the answer."""
        if self.fields is None:
            raise ProtocolError("the app did not call start_response()")
        self.request.start(self.code, self.reason, self.fields)
        self.begun = True
        return 0

    # -- waiting --

    cdef int close_gate(self) except -1:
        """From now on the app's thread is going to wait."""
        self.waits = True
        if self.gate is None and self.dispatcher.crew is not None:
            self.gate = threading.Lock()
            self.gate.acquire()
        return 0

    cdef int open_gate(self) except -1:
        if self.waits:
            self.waits = False
            if self.gate is not None:
                self.gate.release()
        return 0

    cdef int found(self, error) except -1:
        """Have the app's thread raise it when it comes here next. The first counts."""
        if self.error is None:
            self.error = error
        self.open_gate()
        return 0

    cdef int wait(self) except -1:
        """Until the gate is opened. In a crew somebody else leads meanwhile; the only
        thread turns the loop itself."""
        if self.gate is not None:
            self.dispatcher.expect_to_block()
            self.gate.acquire()
        else:
            self.dispatcher.leave(self.request)
            while self.waits:
                self.dispatcher.pump(self.request.loan)
            self.dispatcher.enter(self.request)
        if self.error is not None:
            raise self.error
        return 0

    cdef int await_body(self) except -1:
        """Have the rest of the body read: a peer waits for 100 Continue."""
        cdef Dispatcher dispatcher = self.dispatcher
        dispatcher.refuse_child()
        if self.error is not None:
            raise self.error
        self.close_gate()
        if not dispatcher.leads():
            dispatcher.deliver(self.want_body_now)
        else:
            dispatcher.leave(self.request)
            try:
                self.want_body_now()
            finally:
                dispatcher.enter(self.request)
        self.wait()
        return 0

    def want_body_now(self):
        try:
            self.request.attach(self)
            self.request.want_body(True)
        except Exception as error:
            self.found(error)

    # -- events of the loan, told by who leads --

    def on_body(self):
        self.input.take(self.request)
        self.open_gate()

    def on_writable(self):
        self.pending = 0
        if self.waits:
            self.open_gate()
        elif self.dispatcher.crew is None and self.parts is not None:
            self.pull()

    def on_closed(self, code):
        """The client has left, or its body is broken or late."""
        self.error = core.error(code)
        if self.waits or self.dispatcher.crew is not None:
            self.open_gate()
        else:
            self.fail(self.error)

    # -- the end --

    cdef int finish(self) except -1:
        """All is sent."""
        return self.conclude(None, None)

    cdef int fail(self, error) except -1:
        """The app has raised, or broken a rule."""
        return self.conclude(None, error)

    cdef int conclude(self, body, error) except -1:
        """End the loan where the lead is, then have the app clean up here."""
        cdef Dispatcher dispatcher = self.dispatcher
        dispatcher.check_fork(error)
        self.parts = None
        if not dispatcher.leave(self.request):
            dispatcher.deliver(self.end_now, body, error)
            self.clean_up()
            return 0
        try:
            self.end_now(body, error)
        finally:
            if self.closing is not None or self.input is not None:
                # It may take its time: then somebody else leads, or sends.
                if not dispatcher.sends_later():
                    dispatcher.loop.flush()
                dispatcher.enter(self.request)
                try:
                    self.clean_up()
                finally:
                    dispatcher.leave(self.request)
        return 0

    cpdef end_now(self, body, error):
        """End the loan: with a whole body, with what was sent, or with an error."""
        cdef Request request = self.request
        if request.loan is NULL:
            if error is not None and not isinstance(error, Exception):
                raise error
            return
        try:
            if error is None:
                error = self.error
            if error is not None:
                raise error
            if type(body) is SentFile:
                self.complete_file_now(body)
            elif body is not None:
                self.complete_now(body)
            elif self.begun and self.written < request.announced():
                request.end()  # raises; the log may name the request
            elif self.begun:
                request.conclude()
            else:
                self.complete_now(b"")
        except Exception as raised:
            self.dispatcher.desk.failed(request, raised)
        except BaseException:
            self.dispatcher.desk.failed(request, None)
            raise

    cdef int clean_up(self) except -1:
        """close() of what the app returned, which PEP 3333 owes on every path."""
        closing, self.closing = self.closing, None
        if self.input is not None:
            self.input.close()
            self.input = None
        if closing is None:
            return 0
        try:
            closing()
            self.dispatcher.check_fork(None)
        except Exception as error:
            self.dispatcher.check_fork(error)
            self.dispatcher.desk.logger.exception("close() of an answer failed")
        return 0


cdef object call_answer(Answer self, PyObject **args, size_t flags, PyObject *names):
    """Answer.__call__ by the protocol that makes no tuple (PEP 590)."""
    cdef Py_ssize_t count = PyVectorcall_NARGS(flags)
    if count == 2 and names is NULL:
        return self.called(<object>args[0], <object>args[1], None)
    return call_by_name(self, args, count, names)


cdef object call_by_name(self, PyObject **args, Py_ssize_t count, PyObject *names):
    cdef Py_ssize_t i
    cdef dict named = {}
    cdef list given = [<object>args[i] for i in range(count)]
    if names is not NULL:
        for i, name in enumerate(<tuple>names):
            named[name] = <object>args[count + i]
    return Answer.__call__(self, *given, **named)


cdef int speak_vectorcall():
    """Cython has no word for it: the type is told where to look in its instances."""
    cdef Answer some = Answer.__new__(Answer)
    cdef PyTypeObject *kind = <PyTypeObject *>Answer
    kind.tp_vectorcall_offset = <char *>&some.vectorcall - <char *><PyObject *>some
    kind.tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL
    PyType_Modified(Answer)
    return 0


speak_vectorcall()


# ---- wsgi.input ----

@cython.freelist(64)
cdef class Input:
    """wsgi.input: the request body as a file. Belongs to the app's thread.

    It is all here before the app is called, in memory or in an unnamed temporary file,
    unless the client waits for 100 Continue: then the first read asks for it.
    """

    cdef Answer answer
    cdef bytes content
    cdef object file

    cdef object take(self, Request request):
        """Take the body over from its request, where the lead is; returns its size."""
        found = request.body_file() if request.loan is not NULL else None
        if found is not None:
            self.file = open(found[0], "rb")
            self.answer.input = self
            return found[1]
        self.content = request.content
        if self.content is None:
            self.content = request.take_body()
        return PyBytes_GET_SIZE(self.content)

    cdef object opened(self):
        if self.file is None:
            if self.content is None and self.answer.input is self:
                self.answer.await_body()
            if self.file is None:
                self.file = io.BytesIO(self.content or b"")
        return self.file

    cdef int close(self) except -1:
        """The answer is complete, and with it what the app may read."""
        if self.file is not None:
            self.file.close()
        return 0

    def read(self, size=-1):
        """Up to size bytes, all if it is negative or None."""
        return self.opened().read(size)

    def readline(self, size=-1):
        """A line with its end, or its first size bytes."""
        return self.opened().readline(size)

    def readlines(self, hint=-1):
        """The lines; not many more than hint bytes of them."""
        return self.opened().readlines(hint)

    def __iter__(self):
        return iter(self.opened())


cdef Input NO_BODY = Input()  # of all requests without one
NO_BODY.content = b""


# ---- wsgi.file_wrapper ----

class FileWrapper:
    """wsgi.file_wrapper(file, block_size): the file in blocks, as an iterable."""

    def __init__(self, file, block_size=65536):
        self.file = file
        self.block_size = block_size
        if hasattr(file, "close"):
            self.close = file.close

    def __iter__(self):
        return iter(lambda: self.file.read(self.block_size), b"")

    def sendable(self):
        """The rest of a regular file, for the kernel to send; None if it is none."""
        try:
            fd = self.file.fileno()
            offset = self.file.tell()
            status = os.fstat(fd)
        except (AttributeError, OSError, ValueError, TypeError):
            return None
        if not stat.S_ISREG(status.st_mode) or offset > status.st_size:
            return None
        return SentFile(os.dup(fd), offset, status.st_size - offset)


class SentFile:
    """A file of our own that is being sent: the app may close the one it has."""

    def __init__(self, fd, offset, length):
        self.fd, self.offset, self.length = fd, offset, length

    def fileno(self):
        return self.fd

    def __del__(self):
        os.close(self.fd)
