"""Native handlers, the Python side: what takes more than one turn of the loop.

A handler is called in the loop's thread as soon as its request is whole, and mostly
that is all (see _native.pyx). The Desk here does the rest: hooks, bodies that are still
on their way, streamed answers, coroutines, errors. An *exchange* follows one request on
loan whose end is not in sight; the loop's events call its on_body(), on_writable() and
on_closed().

A plain `def` handler that is to start before its body has arrived runs in a thread of
its own, because it may wait for that body and the loop may not.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from prefork import _channel, _core, eventloop, log, websocket
from prefork._native import Dispatcher, Request, Response
from prefork.errors import (
    ClientDisconnected,
    ConfigError,
    ProtocolError,
    RequestError,
)

HIGH_WATER = 65536  # bytes pending in an answer above which nothing more is pulled
PULL_TIME = 0.001  # seconds an iterator is pulled before others have their turn
BODY_THREADS = 64  # plain handlers that may wait for their bodies at the same time

FAILED = b"Internal Server Error\n"

Fields = Iterable[tuple[str | bytes, str | bytes]]


# ---- Helpers of Request ------------------------------------------------------------


class Query(Mapping[str, str]):
    """A decoded query: the first value of each name; get_all() gives them all."""

    def __init__(self, text: bytes) -> None:
        try:
            self.pairs = parse_qsl(
                text.decode("latin-1"), keep_blank_values=True, max_num_fields=1000
            )
        except ValueError:
            raise RequestError("too many fields in the query") from None

    def __getitem__(self, name: str) -> str:
        for key, value in self.pairs:
            if key == name:
                return value
        raise KeyError(name)

    def get_all(self, name: str) -> list[str]:
        """Every value of this name, in order."""
        return [value for key, value in self.pairs if key == name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key for key, _ in self.pairs))

    def __len__(self) -> int:
        return len({key for key, _ in self.pairs})

    def __repr__(self) -> str:
        return f"Query({self.pairs!r})"


def parse_cookies(text: str) -> dict[str, str]:
    """Cookie pairs as sent; of two with one name the first, which is more specific."""
    cookies: dict[str, str] = {}
    for part in text.split(";"):
        name, equals, value = part.strip().partition("=")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if equals and name:
            cookies.setdefault(name.strip(), value)
    return cookies


@dataclass(frozen=True)
class RequestLimits:
    """What header_received(request) may return: limits of this one request.

    Sizes are bytes, times seconds; None leaves the server's.
    """

    max_request_body_size: int | None = None
    read_timeout: float | None = None
    write_timeout: float | None = None


@dataclass(frozen=True)
class Hooks:
    """The callbacks of a Server; each runs in the worker, in the loop's thread."""

    header_received: Callable[[Request], RequestLimits | None] | None = None
    continue_handler: Callable[[Request], bool] | None = None
    expect_handler: Callable[[Request], int] | None = None
    error_handler: Callable[[Request, RequestError], Any] | None = None
    conn_state: Callable[[int, str], object] | None = None
    stream_request_body: bool = False
    log_all_errors: bool = False
    max_request_body_size: int | None = None  # what header_received may change


def is_async(handler: Any) -> bool:
    """Whether calling the handler gives a coroutine."""
    call = getattr(handler, "__call__", None)  # noqa: B004 (an object with async call)
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call)


# ---- The desk ----------------------------------------------------------------------


class Desk:
    """Serves plain handlers; the loop's thread is the only one that calls it."""

    parse_query = staticmethod(Query)
    parse_cookies = staticmethod(parse_cookies)
    parse_json = staticmethod(json.loads)
    unix_path: str | None = None  # of the unix socket, if it is served alone

    def __init__(
        self,
        handler: Any,
        core: _core.Loop,
        hooks: Hooks,
        logger: log.Logger,
        threads: int = 1,
    ) -> None:
        self.handler = handler
        self.core = core
        self.scheme = "https" if core.secured else "http"
        self.hooks = hooks
        self.logger = logger
        self.crew_size = threads
        self.watched: dict[int, Callable[[], object]] = {}
        self.threads: ThreadPoolExecutor | None = None
        self.threaded: set[Threaded] = set()
        simple = not (hooks.header_received or hooks.conn_state or hooks.log_all_errors)
        self.dispatcher = self.make_dispatcher(simple)

    def make_dispatcher(self, simple: bool) -> Any:
        return Dispatcher(self.core, self.handler, self, simple)

    def run(self, start: Callable[[], object]) -> None:
        """Call start(), which has the loop listen, and serve until it has drained."""
        start()
        if self.crew_size > 1:
            self.dispatcher.run_crew(self.crew_size, start_thread)
            return
        try:
            while not self.dispatcher.drained:
                if self.has_notices:
                    self.dispatcher.turn(-1)
                    self.take_notices()
                else:
                    self.dispatcher.run()
        finally:
            self.dispatcher.end_sending()

    def on_drain(self) -> None:
        """The loop begins to drain, or is told so once more."""

    def close(self) -> None:
        """Let go of what is still on its way; after the loop was shut."""
        self.dispatcher.close()
        for exchange in self.threaded:
            exchange.shut()
            exchange.request.abort()
        if self.threads is not None:
            self.threads.shutdown(wait=False, cancel_futures=True)

    # -- beginning --

    def begin(self, request: Request) -> None:
        """A request on loan that is not whole, or that hooks want to see first."""
        try:
            if not self.admit(request):
                return
            if request.body_done:
                self.serve(request)
            elif self.starts_early(request):
                self.start_early(request)
            else:
                Gathering(self, request)
        except RequestError as error:
            self.refuse(request, error)
        except Exception as error:
            self.failed(request, error)

    def admit(self, request: Request) -> bool:
        """Ask the hooks; false when one has answered."""
        hooks = self.hooks
        if hooks.header_received is not None:
            limits = hooks.header_received(request) or RequestLimits()
            size = limits.max_request_body_size
            request.limit(
                hooks.max_request_body_size if size is None else size,
                limits.read_timeout,
                limits.write_timeout,
            )
        if not request.expects_continue or request.body_done:
            return True
        if hooks.expect_handler is not None:
            status = hooks.expect_handler(request)
            if status != 100:
                request.respond(status, [], b"")
                return False
        elif hooks.continue_handler and not hooks.continue_handler(request):
            request.respond(417, [], b"")
            return False
        return True

    def starts_early(self, request: Request) -> bool:
        """Whether the handler is called before the body is here."""
        return self.hooks.stream_request_body or request.expects_continue

    def start_early(self, request: Request) -> None:
        """In a thread. Where all of them wait, a body that nobody wants to have in
        pieces is taken in whole meanwhile."""
        if len(self.threaded) < BODY_THREADS or self.hooks.stream_request_body:
            Threaded(self, request)
        else:
            Gathering(self, request)

    def serve(self, request: Request) -> None:
        """Call the handler."""
        self.dispatcher.serve(request)

    def refused(self, request: Request, code: int) -> None:
        """The core refused this request."""
        self.refuse(request, _core.error(code))

    def refuse(self, request: Request, error: RequestError) -> None:
        """Answer what is not served; error_handler words it."""
        if self.hooks.error_handler is None:
            self.failed(request, error)
            return
        try:
            result = self.hooks.error_handler(request, error)
            if result is None:
                result = Response(f"{error}\n", status=error.status)
            self.dispatcher.finish(request, result)
        except Exception as raised:
            self.failed(request, raised)

    # -- bodies --

    def whole_body(self, request: Request) -> bytes:
        """The body for a plain handler: here already, or waited for in its thread."""
        if isinstance(request.exchange, Threaded):
            return request.exchange.read()
        if request.body_done:
            return request.take_body()
        raise RuntimeError(
            "the body has not arrived yet: read it before the handler returns, and an "
            "async one by await request.read()"
        )

    async def read_body(self, request: Request) -> bytes:
        return self.whole_body(request)

    def body_stream(self, request: Request) -> BodyStream:
        return BodyStream(request)

    # -- WebSockets --

    def open_websocket(
        self, request: Request, subprotocol: str | None, headers: Any
    ) -> websocket.WebSocket:
        raise RuntimeError("WebSockets are for async handlers")

    # -- answering --

    def inform(self, request: Request, status: int, headers: Fields) -> None:
        """An interim answer; in the handler's thread."""
        if isinstance(request.exchange, Threaded):
            request.exchange.inform(status, headers)
        else:
            if request.answered:
                raise ClientDisconnected("the request is over")
            self.dispatcher.inform(request, status, list(headers))

    def finish(self, request: Request, result: Any) -> None:
        """Answer with what is not bytes, str or Response."""
        if isinstance(result, (bytes, bytearray, memoryview)):
            self.dispatcher.finish(request, bytes(result))
        elif isinstance(result, str):
            self.dispatcher.finish(request, str(result))
        elif isinstance(result, Response):
            self.respond(request, result)
        else:
            self.respond(request, Response(result))

    def respond(self, request: Request, response: Response) -> None:
        """Answer with a Response of any kind."""
        body = response.body
        if isinstance(body, str):
            body = body.encode()
        if isinstance(body, (bytes, bytearray, memoryview)):
            request.respond(response.status, response.fields(), bytes(body))
        else:
            self.stream(request, response, body)

    def stream(self, request: Request, response: Response, body: Any) -> None:
        """Stream from an iterator."""
        parts = iterate(body)
        if parts is None:
            raise TypeError(self.misfit(body))
        Pulled(self, request, response, parts)

    def misfit(self, result: Any) -> str:
        return (
            f"the handler returned {type(result).__name__}; return bytes, str, "
            "Response or an iterator of bytes"
        )

    def failed(self, request: Request, error: Exception | None) -> None:
        """A handler raised: 500 if its answer can still be begun, else abort."""
        if isinstance(error, ClientDisconnected):
            request.abort()
            return
        status, name, value, body = 500, "Content-Type", "text/plain", FAILED
        if isinstance(error, RequestError):
            status, name, value = error.status, "Connection", "close"
            body = f"{error}\n".encode()
        elif error is not None:
            self.core.unborrowed(self.log_raised, request, error)
        if request.begun:
            request.abort()
            return
        try:
            request.reset()
            request.respond(status, [(name, value)], body)
        except ClientDisconnected:
            request.abort()
        except ProtocolError as wrong:  # the status of a RequestError that the app made
            self.failed(request, wrong)

    def log_raised(self, request: Request, error: Exception) -> None:
        """With its traceback; what a logger does with it may take its time."""
        self.logger.error("%r failed", request, exc_info=error)

    # -- other threads, other descriptors, notices --

    def executor(self) -> ThreadPoolExecutor:
        """The threads of plain handlers that wait for their bodies."""
        if self.threads is None:
            self.threads = ThreadPoolExecutor(BODY_THREADS, "prefork-handler")
        return self.threads

    def readable(self, fd: int) -> None:
        """A watched fd can be read."""
        self.watched[fd]()

    def watch(self, fd: int, callback: Callable[[], object]) -> None:
        """Call back in the loop's thread when fd can be read."""
        self.watched[fd] = callback
        self.core.watch(fd)

    def unwatch(self, fd: int) -> None:
        """Stop watching."""
        if self.watched.pop(fd, None) is not None:
            self.core.unwatch(fd)

    @property
    def has_notices(self) -> bool:
        return bool(self.hooks.conn_state or self.hooks.log_all_errors)

    def take_notices(self) -> None:
        """Report what happened to connections."""
        for kind, connection, client, error in self.core.notices():
            if kind == "error" and self.hooks.log_all_errors:
                self.logger.warning("%s: %s", _core_address(client), error)
            elif kind != "error" and self.hooks.conn_state:
                try:
                    self.hooks.conn_state(connection, kind)
                except Exception:
                    self.logger.exception("conn_state failed")


def start_thread(work: Callable[[], None]) -> threading.Thread:
    """A thread of a crew. Signals are the main thread's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread = threading.Thread(target=work, name="prefork-crew", daemon=True)
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread


def _core_address(client: tuple[str, int]) -> str:
    host, port = client
    return f"{host}:{port}" if host else "unix peer"


def iterate(body: Any) -> Iterator[Any] | None:
    """An iterator over a streamed body, or None if it is none."""
    if isinstance(body, Iterator):
        return body
    if isinstance(body, Iterable) and not isinstance(body, Mapping):
        return iter(body)
    return None


def to_bytes(part: Any) -> bytes:
    """A piece of a streamed answer."""
    if isinstance(part, bytes):
        return part
    if isinstance(part, str):
        return part.encode()
    if isinstance(part, (bytearray, memoryview)):
        return bytes(part)
    raise TypeError(f"a streamed answer is made of bytes or str, not {part!r}")


def is_bodiless(request: Request, response: Response) -> bool:
    """Whether all of the answer is its head, which its first part completes."""
    return request.method == "HEAD" or response.status in (204, 304)


# ---- Exchanges of plain handlers ---------------------------------------------------


class Exchange:
    """Follows one request on loan; all its events come in the loop's thread."""

    def __init__(self, desk: Desk, request: Request) -> None:
        self.desk = desk
        self.request = request
        request.attach(self)

    def on_body(self) -> None:
        """Body bytes are there, or the body is done."""

    def on_writable(self) -> None:
        """The answer has room again."""

    def on_closed(self, code: int) -> None:
        """The peer is gone, or its body is broken or late."""
        self.give_up(code)

    def give_up(self, code: int) -> None:
        """End the loan: tell the peer what it did wrong, if it can still be told."""
        if self.request.answered:
            return
        if _core.error_status(code) and not self.request.begun:
            self.request.refuse(code)
        else:
            self.request.abort()


class Gathering(Exchange):
    """Waits for the whole body, then has the handler called."""

    def __init__(self, desk: Desk, request: Request) -> None:
        super().__init__(desk, request)
        request.want_body(True)

    def on_body(self) -> None:
        request = self.request
        request.exchange = None
        self.desk.serve(request)


END = object()  # of an iterator


class Pulled(Exchange):
    """Streams an iterator: pulled only while the socket has room."""

    def __init__(
        self, desk: Desk, request: Request, response: Response, parts: Iterator[Any]
    ) -> None:
        self.parts = parts
        self.bodiless = is_bodiless(request, response)
        self.pulling = self.gone = False
        try:
            request.begin(response.status, response.fields())
            super().__init__(desk, request)
        except BaseException:
            self.close()
            raise
        self.on_writable()

    def on_writable(self) -> None:
        """Pull while there is room and time, as handlers are called."""
        dispatcher, request = self.desk.dispatcher, self.request
        self.until = time.monotonic() + PULL_TIME
        self.pulling = True
        while self.pulling:
            called, part, error = dispatcher.apart(request, self.next_part, self.pulled)
            if not called:
                return
            self.take(part, error)

    def next_part(self) -> Any:
        return next(self.parts, END)

    def pulled(self, part: Any, error: BaseException | None) -> None:
        """A part that came when another thread was leading."""
        self.take(part, error)
        if self.pulling:
            self.on_writable()

    def take(self, part: Any, error: BaseException | None) -> None:
        """Write it; `pulling` says whether to go on at once."""
        request = self.request
        self.pulling = False
        try:
            if self.gone:
                self.close()
            elif error is not None:
                raise error
            elif part is END or self.write(to_bytes(part)):
                request.end()
                self.close()
        except Exception as raised:
            self.desk.failed(request, raised)
            self.close()
        except BaseException:
            request.abort()
            self.close()
            raise

    def write(self, data: bytes) -> bool:
        """True if that completes the answer, whatever else is to come."""
        pending = self.request.write(data) if data else 0
        if data and self.bodiless:
            return True
        if pending >= HIGH_WATER or time.monotonic() >= self.until:
            self.request.want_room()
        else:
            self.pulling = True
        return False

    def on_closed(self, code: int) -> None:
        self.request.abort()
        if self.pulling:  # by another thread: closing waits until it comes back
            self.gone = True
        else:
            self.close()

    def close(self) -> None:
        """Let the iterator clean up; what it raises is logged, not passed on."""
        close = getattr(self.parts, "close", None)
        if close is None:
            return
        try:
            close()
        except Exception:
            self.desk.logger.exception("closing a streamed answer failed")


class Threaded(Exchange):
    """A plain handler in a thread of its own, which may wait for its body.

    The head is copied before the thread starts; from then on the loan is touched by the
    loop's thread alone, and the two talk through a queue and Loop.call().
    """

    def __init__(self, desk: Desk, request: Request) -> None:
        super().__init__(desk, request)
        request.keep()
        self.parts: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()
        self.ended = False  # the handler's thread has seen the end of the body
        self.returned = False  # nobody takes in a body for it any more
        self.loop_thread = threading.get_ident()
        self.job: Future[Any] = desk.executor().submit(self.handle)
        desk.threaded.add(self)
        self.job.add_done_callback(
            lambda job: self.call(self.on_returned, job)  # either thread
        )

    # In the loop's thread.

    def on_body(self) -> None:
        data = self.request.take_body()
        done = self.request.body_done
        if data:
            self.parts.put(data)
        if done:
            self.parts.put(None)

    def on_closed(self, code: int) -> None:
        self.parts.put(_core.error(code))
        self.give_up(code)

    def on_returned(self, job: Future[Any]) -> None:
        request = self.request
        self.desk.threaded.discard(self)
        self.returned = True
        self.parts.put(ClientDisconnected("the request is over"))
        if request.answered or job.cancelled():
            return
        request.exchange = None
        error = job.exception()
        if error is None:
            try:
                self.desk.dispatcher.finish(request, job.result())
            except Exception as raised:
                self.desk.failed(request, raised)
        else:
            self.desk.failed(request, error if isinstance(error, Exception) else None)

    def want(self) -> None:
        try:
            if self.request.answered:
                raise ClientDisconnected("the request is over")
            if self.request.body_done:
                self.on_body()
            else:
                self.request.want_body(False)
        except Exception as error:  # it may have left, and on_closed() is next
            self.parts.put(error)

    def shut(self) -> None:
        """The loop has ended: nothing more will come."""
        self.parts.put(ClientDisconnected("the server has ended"))

    # In the handler's thread.

    def handle(self) -> Any:
        """Call the handler."""
        dispatcher = self.desk.dispatcher
        try:
            result = self.desk.handler(self.request)
        except BaseException as error:
            dispatcher.check_fork(error)
            raise
        dispatcher.check_fork(None)
        return result

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have the loop's thread call function."""
        try:
            self.desk.core.call(function, *arguments)
        except OSError:
            self.shut()

    def inform(self, status: int, headers: Fields) -> None:
        inform = _core.Request.inform
        self.desk.dispatcher.ask(inform, self.request, status, list(headers))

    def __iter__(self) -> Iterator[bytes]:
        while not self.ended:
            self.check_reader()
            self.call(self.want)
            while True:
                part = self.parts.get()
                if isinstance(part, Exception):
                    self.ended = True
                    raise part
                if part is None:
                    self.ended = True
                    return
                yield part
                if self.parts.empty():
                    break

    def read(self) -> bytes:
        return b"".join(self)

    def check_reader(self) -> None:
        """Raise where the wait for the body would never end."""
        self.desk.dispatcher.refuse_child()
        alone = self.desk.crew_size == 1
        if self.returned or (alone and threading.get_ident() == self.loop_thread):
            raise RuntimeError(
                "a body that is still on its way is read by the handler of its request "
                "before that returns: list(request.stream())"
            )


class BodyStream:
    """The body in pieces: `for` in plain handlers, `async for` in async ones."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __iter__(self) -> Iterator[bytes]:
        exchange = self.request.exchange
        if self.request.whole is None and isinstance(exchange, Threaded):
            return iter(exchange)
        body = self.request.body
        return iter([body] if body else [])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        exchange = self.request.exchange
        if self.request.whole is None and isinstance(exchange, Awaited):
            async for part in exchange.body_parts():
                yield part
            return
        body = await self.request.read()
        if body:
            yield body


# ---- Async handlers ----------------------------------------------------------------


class LoopDesk(Desk):
    """Serves on the worker's event loop.

    asyncio's own loop waits in the core (eventloop.CoreSelector); inside any other the
    core's poller sits as one fd, timers included. Nothing polls, and an idle worker
    sleeps. A handler starts in the same turn as its request arrives (eager tasks,
    Python 3.12 and later) and becomes a task that waits only if it must.
    """

    def __init__(
        self,
        handler: Any,
        core: _core.Loop,
        hooks: Hooks,
        logger: log.Logger,
        factory: eventloop.Factory = eventloop.core_loop,
    ) -> None:
        super().__init__(handler, core, hooks, logger)
        self.factory = factory
        self.tasks: set[asyncio.Task[Any]] = set()
        self.scheduled = False

    def run(self, start: Callable[[], object]) -> None:
        eventloop.run(self.main(start), self.factory)

    async def main(self, start: Callable[[], object]) -> None:
        """The worker's main task: until the loop has drained."""
        self.loop = asyncio.get_running_loop()
        self.context = contextvars.copy_context()
        self.stopped = self.loop.create_future()
        selector = eventloop.core_selector_of(self.loop)
        if selector is None:
            self.loop.add_reader(self.core.fileno(), self.pump)
        else:
            selector.attach(self.turn, self.watch)
            self.scheduled = True  # for ever: the core turns whenever the loop does
        try:
            await self.live(start)
        finally:
            if selector is None:
                self.loop.remove_reader(self.core.fileno())
            else:
                selector.detach(self.unwatch)

    async def live(self, start: Callable[[], object]) -> None:
        """What main() does while the core's poller is watched."""
        start()
        self.schedule()
        await self.stopped

    def schedule(self) -> None:
        """Have the core turn soon: something was queued outside of its turn.

        In a context that is no request's: the next one must not see its variables.
        """
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self.pump, context=self.context)

    def turn(self, timeout_ms: int) -> None:
        """One turn of the core; what it raises ends the server."""
        if self.dispatcher.in_child():  # ends, but behind what its task has to say
            self.loop.call_soon(self.dispatcher.check_fork, None)
            return
        try:
            self.dispatcher.turn(timeout_ms)
            if self.has_notices:
                self.take_notices()
        except BaseException as error:
            if not self.stopped.done():
                self.stopped.set_exception(error)
            return
        if self.dispatcher.drained and not self.stopped.done():
            self.stopped.set_result(None)

    def pump(self) -> None:
        """One turn of the core, which never sleeps here."""
        self.scheduled = False
        self.turn(0)
        self.core.fileno()  # arms the timer
        if self.core.ready:
            self.schedule()

    def failed(self, request: Request, error: Exception | None) -> None:
        super().failed(request, error)
        self.schedule()


class AsyncDesk(LoopDesk):
    """Serves `async def` handlers."""

    def __init__(self, handler: Any, *args: Any) -> None:
        super().__init__(self.call, *args)
        self.coroutine = handler

    def call(self, request: Request) -> Any:
        """Start the handler: its answer if it has one at once, else its task."""
        coroutine = _channel.around(request, self.coroutine(request), self.loop)
        if sys.version_info >= (3, 12):
            task = asyncio.Task(coroutine, loop=self.loop, eager_start=True)
            if task.done():
                return outcome(task)
        else:
            task = self.loop.create_task(coroutine)
        self.tasks.add(task)
        return task

    def finish(self, request: Request, result: Any) -> None:
        if isinstance(result, asyncio.Task) and result in self.tasks:
            exchange = request.exchange or Awaited(self, request)
            exchange.follow(result)
        elif isinstance(request.exchange, websocket.WebSocket):
            request.exchange.finish()
        elif not (request.answered and result is None):  # of a closed WebSocket
            super().finish(request, result)

    def failed(self, request: Request, error: Exception | None) -> None:
        exchange = request.exchange
        if not isinstance(exchange, websocket.WebSocket):
            super().failed(request, error)
            return
        if error is not None and not isinstance(error, ClientDisconnected):
            self.log_raised(request, error)
        exchange.fail()

    def open_websocket(
        self, request: Request, subprotocol: str | None, headers: Any
    ) -> websocket.WebSocket:
        websocket.check(request)
        fields = Response(headers=headers).fields()
        return websocket.WebSocket(self, request, subprotocol, fields)

    def stream(self, request: Request, response: Response, body: Any) -> None:
        if not isinstance(body, AsyncIterator):
            super().stream(request, response, body)
            return
        exchange = request.exchange or Awaited(self, request)
        task = self.loop.create_task(exchange.send(response, body))
        self.tasks.add(task)
        exchange.sender = task
        exchange.follow(task)

    def misfit(self, result: Any) -> str:
        return super().misfit(result).replace("iterator", "(async) iterator")

    def starts_early(self, request: Request) -> bool:
        return self.hooks.stream_request_body

    def start_early(self, request: Request) -> None:
        Awaited(self, request)
        self.serve(request)

    async def read_body(self, request: Request) -> bytes:
        if request.body_done:
            return request.take_body()
        exchange = request.exchange or Awaited(self, request)
        return b"".join([part async for part in exchange.body_parts()])


STREAMED = object()  # what Awaited.send() returns: the answer is complete


def outcome(task: asyncio.Task[Any]) -> Any:
    """What a done task returned; raises what it raised."""
    if task.cancelled():
        raise RuntimeError("the handler was cancelled")
    return task.result()


class Awaited(Exchange):
    """A coroutine handler that waits for something; runs in the loop's thread."""

    desk: AsyncDesk

    def __init__(self, desk: AsyncDesk, request: Request) -> None:
        self.body: asyncio.Future[None] | None = None
        self.room: asyncio.Future[None] | None = None
        self.error: Exception | None = None
        self.sender: asyncio.Task[Any] | None = None
        super().__init__(desk, request)

    def follow(self, task: asyncio.Task[Any]) -> None:
        """Answer when this task is done."""
        task.add_done_callback(self.on_done)

    def on_done(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        self.desk.dispatcher.check_fork(error)
        self.desk.tasks.discard(task)
        self.desk.schedule()
        request = self.request
        if task.cancelled() and request.closed:
            request.abort()
            return
        try:
            result = outcome(task)
            if result is not STREAMED and not request.answered:
                self.desk.dispatcher.finish(request, result)
        except Exception as error:
            self.desk.failed(request, error)
        except BaseException:  # it has ended the event loop already
            self.desk.failed(request, None)

    # -- the body --

    async def body_parts(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        request = self.request
        while True:
            if self.error is not None:
                raise self.error
            done = request.body_done
            data = request.take_body()
            if data:
                yield data
            elif done:
                return
            else:
                if self.body is None or self.body.done():  # else another reader waits
                    self.body = self.desk.loop.create_future()
                request.want_body(False)
                self.desk.schedule()
                await self.body

    def on_body(self) -> None:
        wake(self.body)

    # -- the answer --

    async def send(self, response: Response, parts: AsyncIterator[Any]) -> object:
        """Stream an async iterator, no faster than the peer reads."""
        request = self.request
        try:
            request.begin(response.status, response.fields())
            async for part in parts:
                data = to_bytes(part)
                if data:
                    await self.write(data)
                if data and is_bodiless(request, response):
                    break
            request.end()
            return STREAMED
        finally:
            aclose = getattr(parts, "aclose", None)
            if aclose is not None:
                await aclose()

    async def write(self, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        pending = self.request.write(data)
        self.desk.schedule()
        if pending >= HIGH_WATER:
            self.room = self.desk.loop.create_future()
            self.request.want_room()
            await self.room

    def on_writable(self) -> None:
        wake(self.room)

    def on_closed(self, code: int) -> None:
        self.error = _core.error(code)
        wake(self.body)
        wake(self.room)
        if _core.error_status(code) and not self.request.begun:
            self.request.refuse(code)
        elif not _core.error_status(code) and self.sender is not None:
            self.sender.cancel()  # there is nobody left to stream to


def wake(waiter: asyncio.Future[None] | None) -> None:
    """Let whoever waits go on."""
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def desk_for(
    handler: Any,
    core: _core.Loop,
    hooks: Hooks,
    logger: log.Logger,
    threads: int = 1,
    loop: str = "auto",
) -> Desk:
    """The desk that serves this kind of handler; threads is for plain ones."""
    if not is_async(handler):
        return Desk(handler, core, hooks, logger, threads)
    if threads > 1:
        raise ConfigError(
            f"threads must be 1, not {threads}, for an async handler: it runs on the "
            "event loop"
        )
    return AsyncDesk(handler, core, hooks, logger, eventloop.factory_of(loop))


__all__ = [
    "Awaitable",
    "Desk",
    "Hooks",
    "ProtocolError",
    "Query",
    "Request",
    "RequestLimits",
    "Response",
    "desk_for",
]
