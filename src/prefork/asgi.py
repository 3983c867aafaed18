"""ASGI apps: what is decided about them in Python, what waits, and their lifespan.

_asgi.pyx calls the desk here wherever a request takes more than one turn of the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from prefork import _core, eventloop, log
from prefork._asgi import VERSIONS, Exchange
from prefork._native import Request
from prefork._websocket import Dispatcher
from prefork.errors import AppStartupError, ClientDisconnected
from prefork.native import Hooks, LoopDesk, is_async

Message = dict[str, Any]
App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]

EXTENSIONS = (
    "http.response.pathsend",
    "http.response.zerocopysend",
    "http.response.early_hint",
)

PATIENCE = 0.75  # of the grace period; then tasks are cancelled, and the app shuts down
LAST_WORDS = 1.0  # seconds in which a lifespan may still end that is complete


@dataclass(frozen=True)
class Manners:
    """The options of a Server that only ASGI apps have."""

    root_path: str = ""
    lifespan: str = "auto"
    grace: float | None = None  # seconds from a drain to a kill; None: nobody kills


def as_coroutine(app: Any) -> App:
    """An app whose call gives a coroutine, so that all of it runs in its task."""
    if is_async(app):
        return app  # type: ignore[no-any-return]

    async def called(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return called


# ---- The lifespan ------------------------------------------------------------------


class Lifespan:
    """The app's own start and end in this worker (ASGI lifespan 2.0).

    mode is "auto", "on" or "off". In auto an app that raises, or returns, before it has
    asked for lifespan.startup is taken not to know it, and so is one that answers with
    what it would send to a client.
    """

    def __init__(self, app: App, mode: str, logger: log.Logger) -> None:
        self.app = app
        self.mode = mode
        self.logger = logger
        self.state: dict[str, Any] = {}
        self.task: asyncio.Task[None] | None = None
        self.asked = False  # the app has received lifespan.startup
        self.foreign = False  # it has sent what is no lifespan message

    async def startup(self) -> None:
        """Let the app start. Raises AppStartupError if it fails to."""
        if self.mode == "off":
            return
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.stopping = asyncio.Event()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.task = loop.create_task(self.live())
        try:
            await first(self.task, self.started)
        except asyncio.CancelledError:
            self.task.cancel()
            raise
        if not self.started.done():
            self.without(self.task)
            self.task = None
        elif self.started.exception() is not None:
            await self.end(self.task)
            self.started.result()

    async def live(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {**VERSIONS, "spec_version": "2.0"},
            "state": self.state,
        }
        await self.app(scope, self.receive, self.send)

    def without(self, task: asyncio.Task[None]) -> None:
        """The app has ended instead of starting: does it know lifespan at all?"""
        error = task.exception()
        if error is not None and self.asked and not self.foreign:
            raise AppStartupError("the app raised in its startup") from bare(error)
        if self.mode == "on":
            what = "raised" if error else "returned"
            raise AppStartupError(
                f"lifespan is on, but the app {what} before lifespan.startup.complete"
            ) from bare(error)

    async def shutdown(self) -> None:
        """Let the app end; what goes wrong is logged."""
        if self.task is None:
            return
        self.stopping.set()
        await first(self.task, self.ended)
        if self.ended.done() and self.ended.exception() is not None:
            self.logger.error("%s", self.ended.exception())
        await self.end(self.task)
        if not self.task.cancelled() and self.task.exception() is not None:
            error = bare(self.task.exception())
            self.logger.error("the app raised in its lifespan", exc_info=error)

    async def end(self, task: asyncio.Task[None]) -> None:
        """The app has said its last word; let it return."""
        await asyncio.wait({task}, timeout=LAST_WORDS)
        if task.cancel():
            await asyncio.wait({task})

    # What the app calls.

    async def receive(self) -> Message:
        if not self.asked:
            self.asked = True
            return {"type": "lifespan.startup"}
        await self.stopping.wait()
        self.stopping.clear()  # it is told once
        return {"type": "lifespan.shutdown"}

    async def send(self, message: Message) -> None:
        kind = message["type"]
        text = message.get("message", "")
        if kind == "lifespan.startup.complete":
            self.say(kind, self.started, None)
        elif kind == "lifespan.startup.failed":
            error = AppStartupError(f"the app's startup failed: {text}".rstrip(": "))
            self.say(kind, self.started, error)
        elif kind == "lifespan.shutdown.complete":
            self.say(kind, self.ended, None)
        elif kind == "lifespan.shutdown.failed":
            failed = RuntimeError(f"the app's shutdown failed: {text}".rstrip(": "))
            self.say(kind, self.ended, failed)
        else:
            self.foreign = True
            raise RuntimeError(f"{kind!r} is no message of a lifespan")

    def say(
        self, kind: str, outcome: asyncio.Future[None], error: Exception | None
    ) -> None:
        if outcome.done():
            raise RuntimeError(f"{kind} was sent when that was decided already")
        if error is None:
            outcome.set_result(None)
        else:
            outcome.set_exception(error)
            outcome.exception()  # is looked at, if only by who comes later


async def first(*waited: asyncio.Future[None]) -> None:
    """Until one of them is done."""
    await asyncio.wait(set(waited), return_when=asyncio.FIRST_COMPLETED)


def bare(error: BaseException | None) -> BaseException | None:
    """Without our own frame, which tells an app's author nothing."""
    if error is None or error.__traceback__ is None:
        return error
    return error.with_traceback(error.__traceback__.tb_next)


# ---- The desk ----------------------------------------------------------------------


class AsgiDesk(LoopDesk):
    """Serves an ASGI app; hooks and errors are those of native handlers."""

    dispatcher: Dispatcher

    def __init__(
        self,
        app: Any,
        core: _core.Loop,
        hooks: Hooks,
        logger: log.Logger,
        factory: eventloop.Factory = eventloop.core_loop,
        manners: Manners | None = None,
    ) -> None:
        app = as_coroutine(app)
        self.manners = manners or Manners()
        self.lifespan = Lifespan(app, self.manners.lifespan, logger)
        self.draining = self.stopping = False
        self.exchanges: dict[asyncio.Task[None], Exchange] = {}  # whose tasks run
        super().__init__(app, core, hooks, logger, factory)

    def make_dispatcher(self, simple: bool) -> Dispatcher:
        dispatcher = Dispatcher(self.core, self.handler, self, simple)
        state = self.lifespan.state
        dispatcher.configure(self.manners.root_path, EXTENSIONS, state)
        return dispatcher

    def starts_early(self, request: Request) -> bool:
        """Always: receive() brings a body as it comes."""
        return True

    def start_early(self, request: Request) -> None:
        self.serve(request)

    # -- the life of the worker --

    async def live(self, start: Callable[[], object]) -> None:
        """From the app's startup to its shutdown; stopped before it has started, it
        never accepts."""
        self.dispatcher.attach(self.loop, self.unix_path)
        self.schedule()
        startup = self.loop.create_task(self.lifespan.startup())
        await first(startup, self.stopped)
        if not startup.done():
            startup.cancel()
            return
        startup.result()
        start()
        self.schedule()
        try:
            await self.stopped
        except BaseException:
            self.give_up()
            raise
        finally:
            await self.finish_tasks()
            await self.lifespan.shutdown()

    def on_drain(self) -> None:
        """A stop begins, or somebody has lost patience with one that has begun."""
        if self.draining:
            self.give_up()
        elif self.manners.grace is not None:
            self.loop.call_later(self.manners.grace * PATIENCE, self.give_up)
        self.draining = True
        for exchange in list(self.exchanges.values()):
            exchange.on_drain()

    def give_up(self) -> None:
        """Cancel what still runs, so that there is time for the app's shutdown."""
        if self.exchanges:
            self.logger.warning(
                "%d requests still run and are cancelled", len(self.exchanges)
            )
        self.stopping = True
        for task in self.exchanges:
            task.cancel()
        if not self.stopped.done():
            self.stopped.set_result(None)

    async def finish_tasks(self) -> None:
        """Let apps do what they do behind their answers."""
        while self.exchanges:
            await asyncio.wait(set(self.exchanges))
            await asyncio.sleep(0)

    def follow(self, task: asyncio.Task[None], exchange: Exchange) -> None:
        """The app waits for something: keep its task until it is done."""
        self.exchanges[task] = exchange
        task.add_done_callback(exchange.on_done)

    def unfollow(self, task: asyncio.Task[None]) -> None:
        self.exchanges.pop(task, None)
        self.schedule()

    # -- what waits --

    async def receive(self, exchange: Exchange) -> Message:
        """The next message, which is not there yet."""
        while (message := exchange.next_message()) is None:
            await exchange.message_coming()
        return message

    async def drain(self, exchange: Exchange) -> None:
        """Until little enough of the answer is pending."""
        while exchange.is_full():
            await exchange.room_coming()
        if exchange.lost:
            raise ClientDisconnected(str(exchange.error))

    # -- errors --

    def fail(
        self, exchange: Exchange, request: Request, error: BaseException | None
    ) -> None:
        """The app has raised, or ended without an answer."""
        told = error if isinstance(error, Exception) else None
        if not request.answered:
            self.failed(request, told)
        else:
            self.log_failure(exchange, told)

    def log_failure(self, exchange: Exchange, error: BaseException | None) -> None:
        """Say what failed, unless it is what becomes of a client that has left."""
        if error is not None and not tells_departure(error):
            method = exchange.scope.get("method", "WebSocket")
            path = exchange.scope["path"]
            self.logger.error("%s %s failed", method, path, exc_info=error)


def tells_departure(error: BaseException) -> bool:
    """Whether it is what an app makes of a client that has left."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, ClientDisconnected):
            return True
        inner = getattr(cause, "exceptions", None)  # of a group
        if inner:
            return all(tells_departure(one) for one in inner)
        cause = cause.__cause__ or cause.__context__
    return False


__all__ = ["AsgiDesk", "Manners"]
