# cython: language_level=3, binding=True, freethreading_compatible=False
"""ASGI over WebSockets: the same task and the same awaitables, with messages.

A message that is there when the app asks is returned at once; it is taken out of the
core's queue then and not before, so a client that sends more than the app receives is
not read. What the app sends leaves when the loop turns next, with all else. Who waits
for a message goes on in the turn that brings it (_waiting.pyx).
"""
import sys

cimport cython

from cpython.dict cimport PyDict_SetItem
from cpython.object cimport PyObject

from prefork import _core as core

from prefork cimport _asgi, _waiting
from prefork._asgi cimport COMPLETE, bytes_of, is_text, value_of
from prefork._asgi cimport wake as wake_all
from prefork._core cimport (
    PF_ERR_CLOSED,
    PF_HEAD_UPGRADE,
    Request,
)
from prefork._dispatch cimport references
from prefork._waiting cimport NOTHING, Stay, Waiter, joined, resume_all
from prefork.errors import ClientDisconnected


cdef str TYPE = sys.intern("type")
cdef str TEXT = sys.intern("text")
cdef str BYTES = sys.intern("bytes")
cdef str SCHEME = sys.intern("scheme")

cdef str CONNECT = sys.intern("websocket.connect")
cdef str ACCEPT = sys.intern("websocket.accept")
cdef str RECEIVE = sys.intern("websocket.receive")
cdef str SEND = sys.intern("websocket.send")
cdef str DISCONNECT = sys.intern("websocket.disconnect")
cdef str CLOSE = sys.intern("websocket.close")
cdef str START = sys.intern("websocket.http.response.start")
cdef str BODY = sys.intern("websocket.http.response.body")

cdef dict SCHEMES = {"http": "ws", "https": "wss"}
PROTOCOL = b"sec-websocket-protocol"


# ---- From requests to WebSockets ----

cdef class Dispatcher(_asgi.Dispatcher):
    """Calls ASGI apps, for requests and for WebSockets."""

    cdef int perform(self, Request request) except -1:
        cdef int offered
        cdef WebSocket socket
        cdef _asgi.Shift shift
        if not request.head.flags & PF_HEAD_UPGRADE:
            return _asgi.Dispatcher.perform(self, request)
        offered = request.offered()
        if offered < 0:
            request.refuse(offered)
            return 0
        if offered == 0:
            return _asgi.Dispatcher.perform(self, request)
        shift = _asgi.Shift.__new__(_asgi.Shift)
        shift.exchange = socket = WebSocket.__new__(WebSocket)
        socket.request, socket.dispatcher = request, self
        return self.start(shift)


cdef enum:
    LOST = 1006  # the code of a WebSocket that was not closed

cdef enum:  # where the handshake is
    ASKED     # the app has not answered
    OPEN
    DENIED    # it answers as to any other request
    CLOSED    # by the app, or by the client


cdef class Reception(_waiting.Reception):
    """receive(), of which an app mostly has one at a time."""

    cdef WebSocket socket

    cdef object take(self):
        cdef WebSocket socket = self.socket
        cdef dict message = socket.next_message()
        while message is None and not socket.expect(self.at(socket.loop)):
            message = socket.next_message()
        return message


cdef class WebSocket(_asgi.Exchange):
    """receive() and send() of one WebSocket, in the event loop's thread.

    The loan ends with the close, whoever begins it; messages that came before are kept.
    """

    cdef int state
    cdef bint connected  # the app has received websocket.connect
    cdef list backlog    # messages that came before the client left, last first
    cdef object code
    cdef object reason
    cdef object loop
    cdef Reception reception  # the one that was made last
    cdef Waiter first         # of those who wait for a message

    cdef dict make_scope(self):
        cdef dict scope = self.dispatcher.scope(self.request)
        del scope["method"]
        PyDict_SetItem(scope, TYPE, "websocket")
        PyDict_SetItem(scope, SCHEME, SCHEMES[scope[SCHEME]])
        scope["subprotocols"] = self.subprotocols(scope["headers"])
        tls = scope["extensions"].get("tls")
        scope["extensions"] = {"websocket.http.response": {}}
        if tls is not None:
            scope["extensions"]["tls"] = tls
        return scope

    cdef list subprotocols(self, headers):
        """What the client speaks, as it prefers it (RFC 6455 4.1)."""
        names = []
        for name, value in headers:
            if name == PROTOCOL:
                names += [part.strip() for part in value.decode("latin-1").split(",")]
        return [name for name in names if name]

    cdef object around(self, coroutine):
        """It waits for messages, mostly."""
        self.loop = self.dispatcher.desk.loop
        return Stay(coroutine, self.loop)

    # -- receiving --

    @cython.binding(False)
    def receive(self):
        """The next message of the client."""
        cdef Reception reception = self.reception
        if reception is None or references(<PyObject *>reception) != 2:  # ours, a local
            reception = self.reception = Reception.__new__(Reception)
            reception.socket = self
        return reception

    cpdef dict next_message(self):
        if not self.connected:
            self.connected = True
            return {TYPE: CONNECT}
        if self.state == OPEN:
            data = self.request.message()
        elif self.backlog:
            data = self.backlog.pop()
        elif self.request.loan is NULL or self.ended:
            code = LOST if self.code is None else self.code
            return {TYPE: DISCONNECT, "code": code, "reason": self.reason or ""}
        else:
            return None
        if data is None:
            return None
        return {TYPE: RECEIVE, (TEXT if type(data) is str else BYTES): data}

    cdef bint expect(self, Waiter waiter) except -1:
        """Wake it when next_message() is worth a look. False: it is so now."""
        if self.state != OPEN:
            try:
                self.request.want_end()
            except ClientDisconnected:
                self.ended = True
                return False
        self.first = joined(self.first, waiter)
        self.turn()  # to read on, if there was no room before
        return True

    cdef int wake_readers(self, bint now) except -1:
        cdef Waiter first = self.first
        self.first = None
        return resume_all(first, now)

    cdef int turn(self) except -1:
        """Have the loop turn soon."""
        if not self.dispatcher.at_work:
            self.dispatcher.desk.schedule()
        return 0

    # -- sending --

    @cython.binding(False)
    def send(self, message):
        """Send a message; RuntimeError if it is not its turn, OSError if nobody is
        there any more."""
        kind = message[TYPE]
        if self.state == OPEN and is_text(kind, SEND):
            return self.send_message(message)
        if self.error is not None:
            raise ClientDisconnected(str(self.error))
        if self.state == CLOSED or self.stage == COMPLETE:
            raise RuntimeError(f"{kind} was sent after the WebSocket was closed")
        if kind == ACCEPT and self.state == ASKED:
            self.accept(message)
        elif kind == CLOSE and self.state == OPEN:
            self.close(message.get("code", 1000), message.get("reason") or "")
        elif kind == CLOSE and self.state == ASKED:
            self.deny(403, "the app closed the WebSocket before it accepted it")
        elif kind == START and self.state == ASKED:
            self.send_start(message)
            self.trailers = False  # there is no message for them
            self.state = DENIED
        elif kind == BODY and self.state == DENIED:
            awaitable = self.send_body(message)
            if self.stage == COMPLETE:
                self.wake_readers(False)
            return awaitable
        else:
            raise RuntimeError(f"{kind!r} cannot be sent now")
        self.turn()
        return NOTHING

    cdef object send_message(self, message):
        cdef object text = value_of(message, TEXT, None)
        if type(text) is str:
            self.request.send_text(<str>text)
        elif text is not None:
            if not isinstance(text, str):
                raise TypeError(f"text must be a str, not {text!r}")
            self.request.send_text(str.__str__(text))
        else:
            data = value_of(message, BYTES, None)
            if data is None:
                raise ValueError("websocket.send has neither text nor bytes")
            self.request.send_bytes(data if type(data) is bytes else bytes_of(data))
        if self.is_full():
            return self.dispatcher.desk.drain(self)
        self.turn()
        return NOTHING

    cdef int accept(self, message) except -1:
        """Complete the handshake. A subprotocol among the headers counts, too."""
        cdef list fields = []
        subprotocol = message.get("subprotocol")
        for name, value in message.get("headers") or ():
            name, value = bytes_of(name), bytes_of(value)
            if name.lower() == PROTOCOL and subprotocol is None:
                subprotocol = value.decode("latin-1")
            fields.append((name, value))
        self.request.switch(None if subprotocol is None
                            else subprotocol.encode("latin-1"), fields)
        self.state = OPEN
        self.request.attach(self)
        self.wake_readers(False)
        return 0

    cdef int close(self, int code, str reason) except -1:
        self.request.close_websocket(code, reason)
        self.state = CLOSED
        self.code, self.reason = code, reason
        self.wake_readers(False)
        wake_all(self.writers)
        return 0

    cdef int deny(self, int status, str reason) except -1:
        """The client gets an ordinary answer instead of a WebSocket."""
        self.request.respond(status, [], b"")
        self.state, self.stage = CLOSED, COMPLETE
        self.wake_readers(False)
        return 0

    # -- events of the loan --

    cdef int hear(self) except -1:
        return self.go_on()

    def on_ended(self):
        """The client has closed its side before the handshake was answered."""
        self.ended = True
        self.go_on()

    cdef int go_on(self) except -1:
        """An event: who waits for a message goes on here and now."""
        self.wake_readers(True)
        self.dispatcher.check_fork(None)
        return 0

    def on_closed(self, code):
        """Closed by the client, by the core, or lost."""
        self.error = core.error(PF_ERR_CLOSED)
        if self.state == OPEN:
            self.keep_backlog()
            self.code, self.reason = self.request.closing()
            self.lost = self.code == LOST  # else what was sent goes out all the same
            self.request.close_websocket(1000, "")
        else:
            self.lost = True
            self.request.abort()
        self.state = CLOSED
        self.go_on()
        wake_all(self.writers)

    cdef int keep_backlog(self) except -1:
        cdef list found = []
        data = self.request.message()
        while data is not None:
            found.append(data)
            data = self.request.message()
        found.reverse()
        self.backlog = found
        return 0

    # -- the end --

    cdef str missing(self):
        return "the app returned without accepting or closing the WebSocket"

    cdef int settle(self, task) except -1:
        """The app has returned or raised. Who returns has nothing more to say."""
        self.reception = None
        if (self.state == OPEN and self.request.loan is not NULL
                and not task.cancelled() and task.exception() is None):
            self.close(1000, "")
            self.scope = None
            return 0
        return _asgi.Exchange.settle(self, task)

    cdef int fail(self, error) except -1:
        """500 if the handshake was not answered; else 1011, or 1012 when we leave."""
        if self.state == OPEN and self.request.loan is not NULL:
            self.dispatcher.desk.log_failure(self, error)
            self.close(1012 if error is None else 1011, "")
            return 0
        self.state = CLOSED
        _asgi.Exchange.fail(self, error)
        return self.wake_readers(False)
