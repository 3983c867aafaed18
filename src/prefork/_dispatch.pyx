# cython: language_level=3, binding=True, freethreading_compatible=False
"""From the loop's events to handlers, by one thread or by a crew of them.

One thread: it waits on the loop and runs the handlers of each batch. What a handler
waits for (room in its socket, the rest of its body) it waits for by turning the loop
itself; events of others are put aside until it is done.

A crew: the thread that *leads* does the same, so a fast handler pays for no hand-off.
But while it is inside a handler, any other thread that holds the GIL may *claim* the
lead, with the rest of the batch and the loop: that the GIL is to be had says that the
handler waits for something. Whoever has lost the lead runs its handler to the end and
has the answer written by who leads then (Loop.call). A watcher claims it from a handler
that stalls (crew.c). Where handlers keep blocking, a thread is called before each of
them (`eager`), so all can block at the same time; where they stop, that stops.

There is a thread more than handlers may run at a time: the last one that is left keeps
the loop and runs none, so accepting, timing out and writing go on whatever handlers do.

All of this state is guarded by the GIL alone, and handlers are the only places where
the leader lets go of it with `inside` set.
"""
import os
import sys
import threading
from collections import OrderedDict, deque
from concurrent.futures import Future
from time import monotonic

from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t

from prefork._core cimport (
    PF_CREW_APPOINTED,
    PF_CREW_CALLED,
    PF_CREW_CLOSED,
    PF_EVENT_BODY,
    PF_EVENT_CLOSED,
    PF_EVENT_DRAINED,
    PF_EVENT_ENDED,
    PF_EVENT_MESSAGE,
    PF_EVENT_READABLE,
    PF_EVENT_REFUSED,
    PF_EVENT_RELEASED,
    PF_EVENT_REQUEST,
    PF_EVENT_WOKEN,
    PF_EVENT_WRITABLE,
    host_of,
    packed,
)
from prefork.errors import ClientDisconnected


cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident()

cdef extern from "<sys/prctl.h>":
    int PR_GET_TIMERSLACK
    int PR_SET_TIMERSLACK
    int prctl(int, ...) nogil


cdef enum:
    BATCH_MS = 2      # how long finished answers wait for others in their batch
    BLOCKED_MS = 1    # what a handler takes that has blocked, at least
    TOLD = 4          # exchanges that are told something between two looks at the clock
    EAGER_MORE = 16   # handlers that must not block until one that did is forgotten
    EAGER_MOST = 64
    HOSTS_MAX = 4096  # addresses that are remembered as text
    SLACK_NS = 50000        # by how much Linux lets timers be late, if nobody has said,
    MORE_SLACK_NS = 500000  # and by how much we do where handlers block


cdef int pid = os.getpid()


def note_fork():
    """In a forked child: who we are now."""
    global pid
    pid = os.getpid()


os.register_at_fork(after_in_child=note_fork)


cdef object end_fork(object error):
    """A handler has forked, and the child came back from it: here it ends.

    It shares our poller, connections and counters, and would take them from us: so it
    does whatever its last words do, which are the app's to change.
    """
    code = 1
    try:
        code = last_words(error)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        os._exit(code & 0xFF)


cdef int last_words(object error) except? -1:
    """Say what ended the child, as Python does; returns its exit status."""
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def be_patient():
    """Where handlers block: have this thread wake up when others do, and press nobody.

    Its timers may be late by half a millisecond (prctl(2), PR_SET_TIMERSLACK), unless
    somebody has said by how much: so those who sleep wake up together, to warm caches,
    and not one by one, each on a CPU that was idle. And when it is woken it waits until
    who runs has paused (sched(7), SCHED_BATCH). Threads of a crew wake one another, and
    who wakes has what the other one is about to want: the GIL, of which Python tells
    while it holds its lock. To run at once would be to run into that, and to wait once
    more. Where handlers do not block it would make all requests dearer, by one in a
    hundred.
    """
    if prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0) == SLACK_NS:
        prctl(PR_SET_TIMERSLACK, <unsigned long>MORE_SLACK_NS, 0, 0, 0)
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except OSError:
            pass  # somebody forbids it: then it goes without


cdef class Held:
    """The events of one loan, which wait for their turn."""


cdef class Follower:
    """Who follows the loan of a WebSocket: an exchange, of which messages are told by a
    plain call."""

    cdef int hear(self) except -1:
        """Messages have come, where none were."""
        raise NotImplementedError


cdef class Dispatcher:
    """Hands the loop's events to the handler, in the thread that leads.

    simple: a handler is called as soon as its request is lent whole. desk takes the
    rest: native.Desk. An interface overrides make() and perform().
    """

    def __init__(self, Loop loop, handler, desk, bint simple):
        self.loop = loop
        self.handler = handler
        self.desk = loop.desk = desk
        self.simple = simple
        self.hosts = {}
        self.held = OrderedDict()
        self.waiting = deque()
        self.asked = set()
        self.pid = pid

    # ---- One thread ----

    def run(self):
        """Serve until the loop has drained, or notices have come."""
        while not self.drained:
            if self.turn(-1) == 0:
                PyErr_CheckSignals()

    cpdef int turn(self, int timeout_ms) except -1:
        """One turn of the loop: wait, then handle the batch. Returns its size."""
        cdef int count
        while self.held:
            self.next_event(timeout_ms)
        self.loop.touch()  # others have had the thread since the last turn
        self.count = count = self.loop.wait_batch(timeout_ms)
        self.at = 0
        self.at_work = True
        cdef int64_t since = self.loop.now()
        while self.at < self.count:
            self.at += 1
            self.handle(&self.loop.events[self.at - 1])
            if self.loop.now() - since >= BATCH_MS and self.at < self.count:
                self.loop.flush()
                since = self.loop.now()
        self.at_work = False
        self.raise_fatal()
        return count

    def raise_fatal(self):
        """What ended a handler and is to end the server, too."""
        if self.fatal is not None:
            error, self.fatal = self.fatal, None
            raise error

    cdef int next_event(self, int timeout_ms) except -1:
        """Handle one event: one that was put aside, one of the batch, or a new one."""
        cdef Held held
        if self.loop.called:
            self.run_calls()
            return 0
        if self.held:
            held = self.held.popitem(last=False)[1]
            return self.handle(&held.event)
        if self.at == self.count:
            self.at = self.count = 0
            self.heed(self.loop.wait_batch(timeout_ms))
            if self.over:
                return 0
        if self.at < self.count:
            self.at += 1
            self.handle(&self.loop.events[self.at - 1])
        return 0

    cdef int heed(self, int count) except -1:
        """The loop's thread is awake, with so many events."""
        self.at, self.count = 0, count
        if self.over:  # while it slept
            self.nudge()
        elif not self.simple and self.desk.has_notices:
            self.desk.take_notices()
        return 0

    cdef int handle(self, pf_event *event) except -1:
        """Dispatch; who raises does so when the others have had their answers."""
        try:
            self.dispatch(event)
        except BaseException as error:
            self.fatal = error
        return 0

    cdef int run_calls(self) except -1:
        """Run what other threads asked for, as long as this one leads."""
        while self.loop.calls:
            if not self.leads():
                return 0
            function, arguments = self.loop.calls.popleft()
            function(*arguments)
        self.loop.called = False
        return 0

    cdef int hold_back(self, pf_event *event) except -1:
        """An event has to wait until a handler is done.

        What comes of the same loan joins it: whoever has handled the one event may have
        ended the loan, and what another one would name is gone then.
        """
        cdef object loan = <size_t>event.request
        cdef Held held = self.held.get(loan)
        if held is not None:
            held.event.flags |= event.flags
            held.event.code = event.code
            return 0
        held = Held.__new__(Held)
        held.event = event[0]
        self.held[loan] = held
        return 0

    cdef int pump(self, pf_request *loan) except -1:
        """A turn of the loop amid a handler, for the loan it waits for: events of other
        loans are put aside. First come those of the batch that the handler is in.
        """
        cdef pf_event *event
        if self.at == self.count:
            self.at = self.count = 0
            self.count = self.loop.wait_batch(-1)
            if self.count == 0:
                PyErr_CheckSignals()
        while self.at < self.count:
            event = &self.loop.events[self.at]
            self.at += 1
            if event.request is NULL or event.request == loan:
                self.handle(event)
            else:
                self.hold_back(event)
        self.raise_fatal()
        return 0

    # ---- One thread, and who sends for it ----

    cdef bint sends_later(self) noexcept:
        """Whether an answer that is queued will be sent although its thread goes on."""
        return self.crew is not None or self.sender is not None

    cdef int start_sender(self) except -1:
        """Have answers sent amid the handlers of one thread, if these take their time.

        So an answer need not be sent before the app is called again, each by itself: it
        may leave together with others, which wakes fewer clients.
        """
        sender = Crew()
        thread = threading.Thread(target=self.keep_sending, args=(sender,), daemon=True,
                                  name="prefork-sender")
        try:
            thread.start()
        except RuntimeError:
            return 0  # no thread is to be had: answers are sent at once
        self.sender = sender
        self.sending = thread
        return 0

    def keep_sending(self, Crew sender):
        """The life of the sender.

        The loop is its own while it has the GIL and the only thread is `inside`: there
        that one lets go of the GIL, but calls nothing of the loop before leave(). So
        nothing here may let go of it between the look at `inside` and the end of what
        is sent: no object is made, as that may collect garbage, and run whatever.
        """
        while sender.stand_by(self.loop) != PF_CREW_CLOSED:
            if self.inside:
                self.inside = False  # nothing more to send until it enters again
                sender.end()
                self.loop.send_queued()

    def end_sending(self):
        """The only thread is done with the loop, and so is its sender."""
        sender, self.sender = self.sender, None
        self.inside = False
        if sender is not None:
            sender.close()
            self.sending.join()

    # ---- Events ----

    cdef int dispatch(self, pf_event *event) except -1:
        cdef unsigned flags = event.flags
        if flags & PF_EVENT_REQUEST:
            self.begin(event)
        elif flags & PF_EVENT_RELEASED:
            Py_DECREF(<object>event.user)
        elif event.request is not NULL:
            self.tell(<Request>event.user, flags, event.code)
        elif flags & PF_EVENT_WOKEN:
            if self.crew is None:
                PyErr_CheckSignals()
            elif event.code:
                self.nudge()
            self.run_calls()
        elif flags & PF_EVENT_DRAINED:
            self.drained = True
        elif flags & PF_EVENT_READABLE:
            self.desk.readable(event.code)
        return 0

    cdef str host_text(self, const pf_peer *peer):
        """An IP address as text, remembered."""
        cdef bytes key = packed(peer)
        cdef PyObject *found = PyDict_GetItem(self.hosts, key)
        if found is not NULL:
            return <str><object>found
        if len(self.hosts) >= HOSTS_MAX:
            self.hosts.clear()
        self.hosts[key] = text = host_of(peer)
        return text

    cdef Request make(self):
        """A request object of the interface's kind."""
        return Request.__new__(Request)

    cdef int begin(self, pf_event *event) except -1:
        """A request is on loan."""
        cdef Request request = self.spare
        if request is None:
            request = self.make()
        self.spare = None
        request.lend(self.loop, event.request)
        if event.flags & PF_EVENT_CLOSED:
            request.drop()
        elif event.flags & PF_EVENT_REFUSED:
            self.desk.refused(request, event.code)
        elif self.simple and request.is_whole():
            self.serve(request)
        else:
            self.desk.begin(request)
        if references(<PyObject *>request) == 1 and request.is_blank():
            self.spare = request  # nobody has kept it: as good as a new one
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
            else:
                self.tell_each(exchange, flags)
        except Exception as error:
            self.desk.failed(request, error)
        self.check_fork(None)  # of a handler that went on with what it was told
        self.told += 1
        if self.told % TOLD == 0:
            self.loop.touch()
        return 0

    cdef int tell_each(self, exchange, unsigned flags) except -1:
        if flags & PF_EVENT_MESSAGE:
            (<Follower?>exchange).hear()
        if flags & PF_EVENT_BODY:
            exchange.on_body()
        if flags & PF_EVENT_WRITABLE:
            exchange.on_writable()
        if flags & PF_EVENT_ENDED:
            exchange.on_ended()
        return 0

    cpdef int serve(self, Request request) except -1:
        """Call the handler, or have it called by the thread that is free next."""
        if self.crew is None or self.standing > 0:
            return self.perform(request)
        self.put_off(request)
        return self.offer()

    cdef int put_off(self, Request request) except -1:
        """Have it wait for the thread that is free next."""
        request.hold()
        request.detach()
        self.waiting.append(self.job(request))
        return 0

    cdef int offer(self) except -1:
        """What waits is for who stands by: they may have become free while it was made,
        as to open a body's file lets go of the GIL."""
        if self.waiting and self.standing > 0:
            self.crew.call()
        return 0

    cdef int perform(self, Request request) except -1:
        """Call the handler, between enter() and leave(), and answer."""
        raise NotImplementedError

    cdef tuple job(self, Request request):
        """The same for the thread that is free next: a function, and its arguments."""
        raise NotImplementedError

    cpdef bint in_child(self) noexcept:
        """Whether this is a process that a handler has forked."""
        return pid != self.pid

    cpdef int check_fork(self, error) except -1:
        """Behind a handler: a child that it forked does not come back."""
        if self.in_child():
            end_fork(error)
        return 0

    cpdef int refuse_child(self) except -1:
        """Where a handler sends or asks: in a child that it forked this raises."""
        if self.in_child():
            raise RuntimeError("this process was forked by a handler: the client and "
                               "its request are the parent's")
        return 0

    def inform(self, Request request, int status, list fields):
        """An interim answer, from a handler in whichever thread it runs."""
        if self.leads():
            self.refuse_child()
            Request.inform(request, status, fields)
        else:
            self.ask(Request.inform, request, status, fields)

    def ask(self, function, *arguments):
        """Have who leads call function(), and wait for its outcome. Any other thread.

        Raises ClientDisconnected if the server ends before.
        """
        self.refuse_child()
        asked = Future()
        self.asked.add(asked)
        try:
            self.loop.call(self.reply, asked, function, arguments)
        except OSError:
            self.give_up(asked)
        return asked.result()

    def reply(self, asked, function, arguments):
        """What is asked for; in the thread that leads."""
        self.asked.discard(asked)
        try:
            asked.set_result(function(*arguments))
        except Exception as error:
            asked.set_exception(error)

    cdef int give_up(self, asked) except -1:
        if asked in self.asked:
            self.asked.discard(asked)
            asked.set_exception(ClientDisconnected("the server has ended"))
        return 0

    def close(self):
        """The loop was shut: whoever asked for something hears that it will not be."""
        for asked in list(self.asked):
            self.give_up(asked)

    def apart(self, request, function, then):
        """Call function() as handlers are called, then(result, error) where that leads.

        Returns (True, result, error) if it was called at once and this thread still
        leads: then() is not called. Else (False, None, None), and then() is.
        """
        if self.crew is not None and self.standing == 0 and self.leads():
            (<Request>request).hold()
            (<Request>request).detach()
            self.waiting.append((self.apart, request, function, then))
            return False, None, None
        result = error = None
        self.enter(request)
        try:
            result = function()
        except BaseException as raised:
            error = raised
        self.check_fork(error)
        if self.leave(request):
            return True, result, error
        self.post(then, result, error)
        return False, None, None

    # ---- A crew ----

    cdef bint leads(self) noexcept:
        """Whether this thread may touch the loop."""
        return self.crew is None or self.leader == PyThread_get_thread_ident()

    cdef int enter(self, Request request) except -1:
        """A handler begins: while it runs, the lead may be claimed."""
        if self.crew is None:
            if self.sender is not None and not self.inside:
                self.inside = True
                self.sender.begin()
            return 0
        if self.leader != PyThread_get_thread_ident():
            return 0
        if self.eager > 0 and self.hand_on(request):
            return 0
        self.current = request
        self.inside = True
        self.crew.begin()
        if self.eager > 0 and not self.coming:
            self.coming = self.crew.call()
        return 0

    cdef bint hand_on(self, Request request) except -1:
        """Appoint who leads while a handler runs that is likely to block.

        With nothing left of the batch, that thread lies down in the loop without
        having had the GIL, which the handler has: claiming the lead it would ask for
        the GIL too early, and be put to sleep and woken once more.
        """
        if (self.at < self.count or self.loop.called or self.held or self.coming
                or self.over or self.drained or request.loan is NULL):
            return False
        request.hold()
        request.detach()
        cdef unsigned long successor = self.crew.appoint()
        if successor == 0:
            return False
        self.leader = successor
        self.loop.lie_down()
        request.handed_on = monotonic()
        return True

    cdef void expect_more(self) noexcept:
        """A handler has blocked: others are likely to."""
        self.eager = min(self.eager + EAGER_MORE, EAGER_MOST)

    cdef int settle_account(self, Request request) except -1:
        """A handler has ended before which the loop was handed on: was it worth it?"""
        if (monotonic() - request.handed_on) * 1000 >= BLOCKED_MS:
            self.expect_more()
        elif self.eager > 0:
            self.eager -= 1
        request.handed_on = 0
        return 0

    cdef bint leave(self, Request request) except -1:
        """It has ended. False: somebody else leads."""
        cdef int64_t before, took
        if self.crew is None:
            if self.inside:
                self.inside = False
                self.sender.end()
            return True
        if request.handed_on > 0:
            self.settle_account(request)
        if self.leader != PyThread_get_thread_ident():
            return False
        if not self.inside:
            return True
        self.crew.end()
        self.inside = False
        self.current = None
        before = self.loop.now()
        took = self.loop.touch() - before
        if took > BLOCKED_MS:  # the first of two ticks may have been about to come
            self.crew.took_long()
        elif took < BLOCKED_MS and self.eager > 0:
            self.eager -= 1
        return True

    cdef int expect_to_block(self) except -1:
        """Inside a handler that is about to wait: have somebody take over."""
        if self.inside and self.leads() and not self.coming:
            self.coming = self.crew.call()
        return 0

    cdef bint claim(self) except -1:
        """Take the lead from a handler that waits for something."""
        cdef Request request = self.current
        if not self.inside or self.over:
            return False
        self.leader = PyThread_get_thread_ident()
        self.inside = False
        self.current = None
        self.crew.end()
        self.expect_more()
        if request is not None and request.loan is not NULL:
            request.hold()
            request.detach()
        return True

    cdef int lead(self) except -1:
        """Turn the loop and run handlers, until somebody else leads."""
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef int64_t since = self.loop.now()
        while self.leader == me and not self.over:
            if self.at == self.count or self.loop.called or self.held:
                self.next_event(-1)
                since = self.loop.now()
            else:
                self.at += 1
                self.handle(&self.loop.events[self.at - 1])
                if self.loop.now() - since >= BATCH_MS and self.leader == me:
                    self.loop.flush()
                    since = self.loop.now()
            if self.fatal is not None or (self.drained and self.leader == me):
                self.stop()
        return 0

    def work(self):
        """The life of one thread of the crew."""
        try:
            self.stand_and_lead()
        except BaseException as error:
            self.fatal = error
            self.stop()
        self.nudge()

    def stand_and_lead(self):
        cdef int reason
        cdef bint patient = False
        if self.leader == 0:
            self.leader = PyThread_get_thread_ident()
            self.lead()
        while not self.over:
            if self.eager > 0 and not patient:
                be_patient()
                patient = True
            if self.claim():
                self.offer()
                self.lead()
                continue
            if self.waiting:
                self.run_next()
                continue
            if self.take_another():
                continue
            self.standing += 1
            try:
                reason = self.crew.stand_by(self.loop)
            finally:
                self.standing -= 1
            if reason == PF_CREW_CALLED:
                self.coming = False
            elif reason == PF_CREW_APPOINTED:
                self.heed(self.loop.count)
                self.lead()
            elif reason == PF_CREW_CLOSED:
                return

    def run_next(self):
        """What waits longest; who then lies down keeps nothing of it."""
        method, *arguments = self.waiting.popleft()
        since = monotonic()
        method(*arguments)
        if (monotonic() - since) * 1000 >= BLOCKED_MS:
            self.expect_more()

    def stop(self):
        """The crew has nothing more to do. Any thread of it, and the main one."""
        if not self.over:
            self.over = True
            self.crew.close()
            self.loop.wake()
            self.nudge()

    cdef int nudge(self) except -1:
        """Wake the main thread: a signal may have come just before it fell asleep."""
        if self.gate.locked():
            self.gate.release()
        return 0

    def run_crew(self, int threads, start):
        """Serve with so many handlers at a time until the loop has drained.

        start(function) starts and returns a thread. The thread that calls this waits;
        it answers signals, and runs nothing.
        """
        self.gate = threading.Lock()
        self.crew = Crew()
        self.loop.share()
        started = []
        try:
            for _ in range(threads + 1):
                started.append(start(self.work))
            while not self.over:
                self.gate.acquire()
                PyErr_CheckSignals()
        finally:
            self.stop()
            while self.loop.waiting:  # who leads must be out before the loop is shut
                self.gate.acquire()
        self.raise_fatal()
        for thread in started:
            thread.join()

    def post(self, function, *arguments):
        """Have who leads call function(). Any thread of the crew."""
        if not self.over:  # else with the server has gone whom this was for
            self.loop.leave_word(function, arguments)

    def deliver(self, function, *arguments):
        """The same for what writes, and calls nothing of the app's: while who leads is
        asleep in the loop it is called here and now, which spares a wake-up, and two
        changes of the GIL's hands.
        """
        if not self.loop.borrow():
            self.post(function, *arguments)
            return
        try:
            function(*arguments)
        except BaseException as error:
            self.fatal = error
            self.stop()
        finally:
            self.loop.give_back()

    cdef bint take_another(self) except -1:
        """Where handlers block, a thread that is done looks for its next request, in a
        loop whose own one is asleep, before it lies down.

        That spares waking one thread to lead and another to work: what handlers that
        block cost is the changes of threads.
        """
        cdef pf_event event
        cdef Request request
        cdef bint found = False
        if self.eager == 0 or not self.simple or not self.loop.borrow():
            return False
        try:
            found = self.loop.poll(&event)
            if found:
                request = self.make()
                request.lend(self.loop, event.request)
                request.handed_on = monotonic()
                self.put_off(request)
        finally:
            self.loop.give_back()
        return found
