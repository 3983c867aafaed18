"""WebSockets of native async handlers: request.websocket() and what comes of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from prefork import _core
from prefork._websocket import Waiter
from prefork.errors import ClientDisconnected, RequestError

if TYPE_CHECKING:
    from prefork.native import AsyncDesk, Fields, Request

HIGH_WATER = 65536  # bytes pending above which send() waits for room
NORMAL, LOST, ERROR, AWAY = 1000, 1006, 1011, 1012  # close codes


class WebSocket:
    """A WebSocket, as an async handler has it: receive, send, close.

    It lasts for as long as the handler runs: one that returns has it closed with 1000,
    one that raises with 1011. Text is str, binary messages are bytes. All of it runs in
    the worker's event loop, and tasks of one handler may share it.

    subprotocol is what was agreed on; close_code and close_reason are set once it is
    closed (1005: the peer gave no code, 1006: it was lost).
    """

    def __init__(
        self, desk: AsyncDesk, request: Request, subprotocol: str | None, fields: Fields
    ) -> None:
        self.desk = desk
        self.request = request
        self.subprotocol = subprotocol
        self.close_code: int | None = None
        self.close_reason = ""
        self.backlog: list[str | bytes] = []  # came before the close, last first
        self.readers: list[Waiter] = []
        self.writers: list[Waiter] = []
        request.accept(subprotocol, fields)
        request.attach(self)
        desk.schedule()

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        return self.close_code is not None

    async def receive(self) -> str | bytes:
        """The next message; ClientDisconnected when there will be none."""
        while (message := self.next_message()) is None:
            if self.closed:
                raise ClientDisconnected(self.farewell())
            self.desk.schedule()  # to read on, if there was no room before
            await self.waiting(self.readers)
        return message

    def next_message(self) -> str | bytes | None:
        if self.closed:
            return self.backlog.pop() if self.backlog else None
        return self.request.take_message()

    async def send(self, message: str | bytes) -> None:
        """Send a message; waits while too much of what was sent is not taken."""
        if self.closed:
            raise ClientDisconnected(self.farewell())
        pending = self.request.send_message(message)
        self.desk.schedule()
        while pending >= HIGH_WATER:
            self.request.want_room()
            await self.waiting(self.writers)
            if self.close_code == LOST:
                raise ClientDisconnected(self.farewell())
            if self.close_code is not None:
                return  # in good order: what was sent goes out all the same
            pending = self.request.unsent_bytes

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close it; nothing if it is closed already. ProtocolError for a code that may
        not be sent, or a reason of more than 123 bytes."""
        if not self.closed:
            self.request.close(code, reason)
            self.end(code, reason)

    def __aiter__(self) -> WebSocket:
        return self

    async def __anext__(self) -> str | bytes:
        """The messages, until it is closed."""
        try:
            return await self.receive()
        except ClientDisconnected:
            raise StopAsyncIteration from None

    def __repr__(self) -> str:
        state = f"closed, {self.close_code}" if self.closed else "open"
        return f"<WebSocket {self.request!r}, {state}>"

    def farewell(self) -> str:
        reason = f": {self.close_reason}" if self.close_reason else ""
        return f"the WebSocket is closed ({self.close_code}{reason})"

    def waiting(self, waiters: list[Waiter]) -> Waiter:
        """A future for who waits; those who have given up are left out."""
        waiter = Waiter(self.desk.loop)
        waiters[:] = [*(one for one in waiters if not one.done()), waiter]
        return waiter

    def end(self, code: int, reason: str, now: bool = False) -> None:
        self.close_code, self.close_reason = code, reason
        wake(self.readers, now)
        wake(self.writers, now)
        self.desk.schedule()

    # Events of the loan.

    def on_message(self) -> None:
        wake(self.readers, True)

    def on_body(self) -> None:
        """A handshake has none."""

    def on_ended(self) -> None:
        """Nobody has asked for this."""

    def on_writable(self) -> None:
        wake(self.writers, True)

    def on_closed(self, code: int) -> None:
        """The peer has closed, or is lost, or the core has closed."""
        while (message := self.request.take_message()) is not None:
            self.backlog.insert(0, message)
        how = self.request.close_reason()
        self.request.close(NORMAL, "")
        self.end(*how, now=True)

    # The handler's task.

    def follow(self, task: asyncio.Task[Any]) -> None:
        """Close when this task is done."""
        task.add_done_callback(self.on_done)

    def on_done(self, task: asyncio.Task[Any]) -> None:
        self.desk.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            self.finish(AWAY if task.cancelled() else NORMAL)
        else:
            self.desk.failed(
                self.request, error if isinstance(error, Exception) else None
            )

    def finish(self, code: int) -> None:
        """The handler has ended."""
        if not self.closed:
            self.request.close(code, "")
            self.end(code, "")


def wake(waiters: list[Waiter], now: bool) -> None:
    """Let all who wait go on: now, in an event of the core, or soon."""
    woken = waiters[:]
    waiters.clear()
    for waiter in woken:
        waiter.resume(now)


def check(request: Request) -> None:
    """Raise RequestError, which answers it, for a request that is no handshake."""
    try:
        if request.is_websocket():
            return
    except RequestError as error:
        request.refuse(
            _core.WEBSOCKET_VERSION if error.status == 426 else _core.WEBSOCKET_KEY
        )
        raise
    raise RequestError("a WebSocket handshake is expected here")


__all__ = ["WebSocket"]
