# cython: language_level=3, binding=True, freethreading_compatible=False
"""WebSockets of native async handlers: request.websocket() and what comes of it.

receive() and send() are no coroutines but do what can be done at once, as those of ASGI
do. What is not there yet is waited for as _waiting.pyx says.
"""
from asyncio import iscoroutine

cimport cython
from cpython.object cimport PyObject

from prefork cimport _waiting
from prefork._core cimport PF_HEAD_UPGRADE, Request
from prefork._dispatch cimport Dispatcher, Follower, references
from prefork._waiting cimport NOTHING, Stay, Waiter, joined, resume_all
from prefork.errors import ClientDisconnected


cdef enum:
    HIGH_WATER = 65536  # bytes pending above which send() waits for room

cdef enum:  # close codes
    NORMAL = 1000
    LOST = 1006
    ERROR = 1011
    AWAY = 1012


def around(Request request not None, coroutine, loop):
    """What the task of a handler runs: if it may become a WebSocket's, which mostly
    waits for messages, more than the handler's coroutine."""
    if request.head.flags & PF_HEAD_UPGRADE and iscoroutine(coroutine):
        return Stay(coroutine, loop)
    return coroutine


cdef class Reception(_waiting.Reception):
    """A receive(), or a step of a loop over the messages; a handler mostly has one at a
    time."""

    cdef WebSocket socket
    cdef bint iterates

    cdef object take(self):
        cdef WebSocket socket = self.socket
        message = socket.next_message()
        if message is None:
            if socket.closed:
                if self.iterates:
                    raise StopAsyncIteration
                raise ClientDisconnected(socket.farewell())
            socket.expect(self.at(socket.loop))
        return message


cdef class WebSocket(Follower):
    """A WebSocket, as an async handler has it: receive, send, close.

    It lasts for as long as the handler runs: one that returns has it closed with 1000,
    one that raises with 1011. Text is str, binary messages are bytes. All of it runs in
    the worker's event loop, and tasks of one handler may share it.

    subprotocol is what was agreed on; close_code and close_reason are set once it is
    closed (1005: the peer gave no code, 1006: it was lost).
    """

    cdef object desk
    cdef object loop
    cdef Dispatcher dispatcher
    cdef readonly Request request
    cdef readonly object subprotocol
    cdef readonly object close_code
    cdef readonly str close_reason
    cdef readonly bint closed  # nothing more can be sent
    cdef list backlog          # came before the close, last first
    cdef Reception reception   # the one that was made last
    cdef Waiter readers        # the first of those who wait for a message
    cdef Waiter writers        # and for room
    cdef dict __dict__
    cdef object __weakref__

    def __init__(self, desk, Request request not None, subprotocol, fields):
        self.desk = desk
        self.loop = desk.loop
        self.dispatcher = desk.dispatcher
        self.request = request
        self.subprotocol = subprotocol
        self.close_reason = ""
        request.accept(subprotocol, fields)
        request.attach(self)
        self.turn()

    # -- receiving --

    @cython.binding(False)
    def receive(self):
        """The next message; ClientDisconnected when there will be none."""
        return self.next_reception(False)

    def __aiter__(self):
        return self

    def __anext__(self):
        """The messages, until it is closed."""
        return self.next_reception(True)

    cdef Reception next_reception(self, bint iterates):
        cdef Reception reception = self.reception
        if reception is None or references(<PyObject *>reception) != 2:  # ours, a local
            reception = self.reception = Reception.__new__(Reception)
            reception.socket = self
        reception.iterates = iterates
        return reception

    cdef object next_message(self):
        if not self.closed:
            return self.request.message()
        return self.backlog.pop() if self.backlog else None

    cdef int expect(self, Waiter waiter) except -1:
        self.readers = joined(self.readers, waiter)
        return self.turn()  # to read on, if there was no room before

    # -- sending --

    @cython.binding(False)
    def send(self, message):
        """Send a message; waits while too much of what was sent is not taken."""
        if self.closed:
            raise ClientDisconnected(self.farewell())
        if type(message) is str:
            self.request.send_text(<str>message)
        elif type(message) is bytes:
            self.request.send_bytes(<bytes>message)
        else:
            self.request.send_message(message)
        self.turn()
        return self.drained() if self.is_full() else NOTHING

    cdef bint is_full(self) except -1:
        return self.request.unsent() >= HIGH_WATER

    async def drained(self):
        """Until little enough is pending."""
        while self.close_code is None and self.is_full():
            self.request.want_room()
            waiter = Waiter(self.loop)
            self.writers = joined(self.writers, waiter)
            self.turn()
            await waiter
        if self.close_code == LOST:  # else what was sent goes out all the same
            raise ClientDisconnected(self.farewell())

    def close(self, int code=NORMAL, str reason not None=""):
        """Close it; nothing if it is closed already. ProtocolError for a code that may
        not be sent, or a reason of more than 123 bytes."""
        if not self.closed:
            self.request.close_websocket(code, reason)
            self.end(code, reason, False)
        return NOTHING

    # -- the end --

    cdef int turn(self) except -1:
        """Have the loop turn soon."""
        if not self.dispatcher.at_work:
            self.desk.schedule()
        return 0

    cdef str farewell(self):
        reason = f": {self.close_reason}" if self.close_reason else ""
        return f"the WebSocket is closed ({self.close_code}{reason})"

    cdef int end(self, int code, str reason, bint now) except -1:
        self.closed = True
        self.close_code, self.close_reason = code, reason
        self.wake_readers(now)
        self.wake_writers(now)
        return self.turn()

    cdef int wake_readers(self, bint now) except -1:
        cdef Waiter first = self.readers
        self.readers = None
        return resume_all(first, now)

    cdef int wake_writers(self, bint now) except -1:
        cdef Waiter first = self.writers
        self.writers = None
        return resume_all(first, now)

    # -- events of the loan --

    cdef int hear(self) except -1:
        return self.wake_readers(True)

    def on_body(self):
        """A handshake has none."""

    def on_ended(self):
        """Nobody has asked for this."""

    def on_writable(self):
        self.wake_writers(True)

    def on_closed(self, code):
        """The peer has closed, or is lost, or the core has closed."""
        cdef list found = []
        message = self.request.message()
        while message is not None:
            found.append(message)
            message = self.request.message()
        found.reverse()
        self.backlog = found
        code, reason = self.request.closing()
        self.request.close_websocket(NORMAL, "")
        self.end(code, reason, True)

    # -- the handler's task --

    def follow(self, task):
        """Close when this task is done."""
        task.add_done_callback(self.on_done)

    def on_done(self, task):
        self.desk.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            self.finish(AWAY if task.cancelled() else NORMAL)
        else:
            self.desk.failed(self.request,
                             error if isinstance(error, Exception) else None)

    def fail(self):
        """The handler has raised."""
        self.finish(ERROR)

    def finish(self, int code=NORMAL):
        """The handler has ended."""
        self.reception = None
        if not self.closed:
            self.request.close_websocket(code, "")
            self.end(code, "", False)

    def __repr__(self):
        state = f"closed, {self.close_code}" if self.closed else "open"
        return f"<WebSocket {self.request!r}, {state}>"
