import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any

from prefork._core import Request

def around(
    request: Request,
    coroutine: Coroutine[Any, Any, Any],
    loop: asyncio.AbstractEventLoop,
) -> Coroutine[Any, Any, Any]: ...

class WebSocket:
    request: Request
    subprotocol: str | None
    close_code: int | None
    close_reason: str
    closed: bool
    def __init__(
        self,
        desk: Any,
        request: Request,
        subprotocol: str | None,
        fields: Iterable[tuple[str | bytes, str | bytes]],
    ) -> None: ...
    def receive(self) -> Coroutine[Any, Any, str | bytes]: ...
    def send(self, message: str | bytes) -> Coroutine[Any, Any, None]: ...
    def close(
        self, code: int = 1000, reason: str = ""
    ) -> Coroutine[Any, Any, None]: ...
    def __aiter__(self) -> WebSocket: ...
    def __anext__(self) -> Awaitable[str | bytes]: ...
    def follow(self, task: asyncio.Task[Any]) -> None: ...
    def finish(self, code: int = 1000) -> None: ...
    def fail(self) -> None: ...
