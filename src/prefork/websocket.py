"""WebSockets of native async handlers: what can be done without compiling it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefork import _core
from prefork._channel import WebSocket
from prefork.errors import ClientDisconnected, RequestError

if TYPE_CHECKING:
    from prefork.native import Request


def check(request: Request) -> None:
    """Raise RequestError, which answers it, for a request that is no handshake;
    ClientDisconnected if it is over."""
    if request.answered:
        raise ClientDisconnected("the request is over")
    try:
        if request.is_websocket():
            return
    except RequestError as error:
        request.refuse(
            _core.WEBSOCKET_VERSION if error.status == 426 else _core.WEBSOCKET_KEY
        )
        raise
    raise RequestError("a WebSocket handshake is expected here")


__all__ = ["WebSocket", "check"]
