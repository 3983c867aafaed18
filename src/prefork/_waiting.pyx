# cython: language_level=3, binding=True, freethreading_compatible=False
"""Tasks that wait for the core's events, and go on in the turn that brings them.

A Waiter is what such a task waits for: a future, to asyncio. Who waits is not put off
to the event loop's next iteration: the core's events come while no task runs, so the
task is stepped then and there, and a batch of messages is answered before the core
turns again.

To wait for a future, be woken and wait for the next one costs a task more than a small
message does otherwise. So the task of an app that mostly waits for messages does it
once: its coroutine is a Stay, which runs the app's and waits in its place. As long as
the app comes back only to wait for one of ours again, its task stays where it is: the
app runs as the current task and in its context, and the task is not asked. What else
the app does (awaits a stranger's future, returns, raises) is kept, the task is woken,
and gets it from the Stay as it would have got it from the app.
"""
from asyncio import CancelledError, current_task
from asyncio.tasks import _enter_task, _leave_task
from contextvars import copy_context

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF


cdef extern from "Python.h":
    void PyErr_SetObject(object kind, object value)  # raises when NULL is returned
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    cdef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(object coroutine, object value, PyObject **result)


cdef extern from *:
    """
    #if PY_VERSION_HEX >= 0x030C0000
    #define pf_take_raised PyErr_GetRaisedException
    #define pf_raise_again(error) PyErr_SetRaisedException(Py_NewRef(error))
    #else
    static PyObject *
    pf_take_raised(void)
    {
        PyObject *kind, *error, *traceback;
        PyErr_Fetch(&kind, &error, &traceback);
        PyErr_NormalizeException(&kind, &error, &traceback);
        if (traceback != NULL)
            PyException_SetTraceback(error, traceback);
        Py_XDECREF(traceback);
        Py_DECREF(kind);
        return error;
    }
    static void
    pf_raise_again(PyObject *error)
    {
        PyObject *traceback = PyException_GetTraceback(error);
        PyErr_Restore(Py_NewRef((PyObject *)Py_TYPE(error)), Py_NewRef(error),
                      traceback);
    }
    #endif
    """
    object pf_take_raised()
    void pf_raise_again(object error)  # when NULL is returned


cdef enum:
    PENDING
    WOKEN
    CANCELLED

cdef enum:
    LEFT_NOTHING = 100  # beside PYGEN_*


cdef int give(object value) except -1:
    """Have __next__() return this as a coroutine would, when it raises StopIteration
    next: to Cython that means no more than to return NULL. What may be a tuple, or an
    exception, is given in a tuple."""
    PyErr_SetObject(StopIteration, value)
    return 0


# ---- What is done ----

@cython.freelist(16)
cdef class Done:
    """An awaitable that has its result; a coroutine to those who ask for one."""

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        if self.result is not None:
            give(self.result)
        raise StopIteration

    def send(self, value):
        """As a coroutine's; so that it may become a task."""
        raise StopIteration(self.result)

    def throw(self, kind, value=None, traceback=None):
        """As a coroutine's: whoever cancels it has it cancelled."""
        if value is None:
            value = kind if isinstance(kind, BaseException) else kind()
        raise value

    def close(self):
        """As a coroutine's: there is nothing to close."""


NOTHING = Done()


cdef Done done(object result):
    cdef Done found = Done.__new__(Done)
    found.result = result
    return found


# ---- Waiters ----

@cython.freelist(64)
cdef class Waiter:
    """What a task waits for: a future to asyncio, without a result, for one task.

    resume(True) steps the task at once. That is for the core's events, which come while
    no task runs; within a task it is resume(False), and the loop does so soon.
    """

    def __init__(self, loop):
        self.loop = loop

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        if self.outcome != PENDING:
            raise StopIteration
        self._asyncio_future_blocking = True
        return self

    @cython.binding(False)
    def get_loop(self):
        """As a future's."""
        return self.loop

    @cython.binding(False)
    def add_done_callback(self, callback, *, context=None):
        """As a future's; of its task."""
        self.callback = callback
        self.context = copy_context() if context is None else context
        if self.outcome != PENDING:
            self.call(False)

    def remove_done_callback(self, callback):
        """As a future's."""
        self.callback = None

    def done(self):
        """As a future's."""
        return self.outcome != PENDING

    def cancelled(self):
        """As a future's."""
        return self.outcome == CANCELLED

    def cancel(self, msg=None):
        """As a future's."""
        if self.outcome != PENDING:
            return False
        self.outcome = CANCELLED
        self.message = msg
        self.call(False)
        return True

    @cython.binding(False)
    def result(self):
        """As a future's."""
        if self.outcome == CANCELLED:
            raise CancelledError(*(() if self.message is None else (self.message,)))

    def set_result(self, result):
        """As a future's: resume(False)."""
        self.resume(False)

    cpdef int resume(self, bint now) except -1:
        """Let the task go on, if it has not given up."""
        if self.outcome != PENDING:
            return 0
        self.outcome = WOKEN
        if self.stay is None:
            return self.call(now)
        return self.stay.go_on() if now else self.stay.resume(False)

    cdef int call(self, bint now) except -1:
        callback, context = self.callback, self.context
        self.callback = self.context = None
        if callback is None:
            return 0
        if not now:
            self.loop.call_soon(callback, self, context=context)
            return 0
        PyContext_Enter(context)
        try:
            callback(self)
        finally:
            PyContext_Exit(context)
        return 0


cdef Waiter joined(Waiter first, Waiter last):
    """One more who waits; who has given up is left out. Returns the first."""
    cdef Waiter end
    while first is not None and first.outcome != PENDING:
        first = first.behind
    last.behind = None
    if first is None:
        return last
    end = first
    while end.behind is not None:
        if end.behind.outcome != PENDING:
            end.behind = end.behind.behind
        else:
            end = end.behind
    end.behind = last
    return first


cdef int resume_all(Waiter first, bint now) except -1:
    """Let all who wait go on."""
    cdef Waiter behind
    while first is not None:
        behind, first.behind = first.behind, None
        first.resume(now)
        first = behind
    return 0


# ---- Stays ----

@cython.freelist(64)
cdef class Stay(Waiter):
    """A task's stay with us: the coroutine that it runs, and what it waits for.

    In between, go_on() runs the app's coroutine without its task. A cancellation finds
    the task waiting here; one that the app asks for itself while it so runs is left to
    the task, which is woken for it.
    """

    def __init__(self, coroutine, loop):
        self.coroutine = coroutine
        self.loop = loop
        self.left = LEFT_NOTHING

    # -- what asyncio asks of a coroutine --

    def __next__(self):
        cdef int left
        if self.left == LEFT_NOTHING:
            self.step()
        left, what = self.left, self.what
        self.left, self.what = LEFT_NOTHING, None
        if left == PYGEN_NEXT:
            return self.wait_for(what)
        self.task = None
        if left == PYGEN_ERROR:
            pf_raise_again(what)
        elif what is not None:
            give((what,))
        raise StopIteration

    def send(self, value):
        """As a coroutine's; a task sends nothing."""
        return self.__next__()

    def throw(self, *error):
        """As a coroutine's: whoever waits is cancelled. What the app did last may not
        be told yet, if it has asked for that itself."""
        cdef int left = self.left
        what = self.what
        self.left, self.what = LEFT_NOTHING, None
        if left == PYGEN_ERROR:
            raise what
        if left == PYGEN_RETURN:
            raise error[0]
        if left == PYGEN_NEXT and hasattr(what, "cancel"):
            what.cancel(*error[0].args)
            return what
        self.depart(CANCELLED)
        self.task = None
        return self.wait_for(self.coroutine.throw(*error))

    def close(self):
        """As a coroutine's."""
        self.depart(CANCELLED)
        self.task = None
        self.coroutine.close()

    def __getattr__(self, name):
        """cr_frame and the like, for who asks what a task does."""
        return getattr(self.coroutine, name)

    # -- what it asks of a future --

    def cancel(self, msg=None):
        """False, as of one that is done: then the task remembers it."""
        if self.running:
            self.cancelled = True
            return False
        return Waiter.cancel(self, msg)

    # -- the app --

    cdef int step(self) except -1:
        """Run the app to where it waits next; what it does there is kept."""
        cdef PyObject *result = NULL
        self.depart(WOKEN)
        self.left = PyIter_Send(self.coroutine, None, &result)
        if self.left == PYGEN_ERROR:
            self.what = pf_take_raised()
        else:
            self.what = <object>result
            Py_DECREF(self.what)
        return 0

    cdef int depart(self, int outcome) except -1:
        """The app does not wait any more where it did."""
        if self.waiter is not None:
            self.waiter.stay = None
            self.waiter.outcome = outcome
            self.waiter = None
        return 0

    cdef object wait_for(self, waited):
        """What the task waits for, where the app waits for this."""
        if not is_open(waited):
            return waited
        if self.task is None:
            self.task = current_task()
        self.settle(<Waiter>waited)
        self.outcome = PENDING
        self._asyncio_future_blocking = True
        return self

    cdef int settle(self, Waiter waiter) except -1:
        waiter.stay = self
        self.waiter = waiter
        return 0

    cdef int go_on(self) except -1:
        """Run the app without its task, which is woken only if it has to know."""
        if self.outcome != PENDING:
            return 0  # it was cancelled
        if self.callback is None:
            return Waiter.resume(self, False)
        PyContext_Enter(self.context)
        try:
            _enter_task(self.loop, self.task)
            self.running = True
            self.step()
            self.running = False
            _leave_task(self.loop, self.task)
        finally:
            PyContext_Exit(self.context)
        if self.left == PYGEN_NEXT and is_open(self.what) and not self.cancelled:
            self.settle(<Waiter>self.what)
            self.left, self.what = LEFT_NOTHING, None
            return 0
        self.cancelled = False
        self.outcome = WOKEN
        return self.call(True)


cdef bint is_open(thing):
    """Whether it is one of our waiters, and nobody has woken it yet."""
    return type(thing) is Waiter and (<Waiter>thing).outcome == PENDING


# ---- Receptions ----

cdef class Reception:
    """What receive() returns: an awaitable; a coroutine to those who ask for one."""

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        message = self.take()
        if message is None:
            self.waiter._asyncio_future_blocking = True
            return self.waiter
        give(message)
        raise StopIteration

    def send(self, value):
        """As a coroutine's; so that it may become a task."""
        return self.__next__()

    def throw(self, kind, value=None, traceback=None):
        """As a coroutine's: whoever cancels it has it cancelled."""
        if value is None:
            value = kind if isinstance(kind, BaseException) else kind()
        raise value

    def close(self):
        """As a coroutine's: there is nothing to close."""

    cdef object take(self):
        """The message. None: its waiter waits for one."""
        raise NotImplementedError

    cdef Waiter at(self, loop):
        """Its waiter, for one more wait. One that was woken stands in no queue now;
        one that has given up may, so it is left there."""
        if self.waiter is None or self.waiter.outcome != WOKEN:
            self.waiter = Waiter.__new__(Waiter)
            self.waiter.loop = loop
        self.waiter.outcome = PENDING
        return self.waiter
