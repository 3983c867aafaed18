"""WebSockets of FastAPI, Starlette, Litestar, Quart and BlackSheep, through websockets.

Each framework serves the same three endpoints, written as its manual does it; every
test asks all of them. (Django has no WebSockets without Channels.)
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import blacksheep
import fastapi
import litestar
import pytest
import quart
import websockets.sync.client
from blacksheep.server.websocket import WebSocketDisconnectError
from litestar.exceptions import WebSocketDisconnect as LitestarDisconnect
from live import SOON, Live
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus

LOOPS = ["asyncio", *(["uvloop"] if find_spec("uvloop") else [])]
CHAT = "chat.v2"

told: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # codes of closes


def chosen(offered: list[str]) -> str | None:
    return CHAT if CHAT in offered else None


# ---- The endpoints, five times -------------------------------------------------------


async def starlette_echo(socket: Any) -> None:
    await socket.accept(chosen(socket.scope["subprotocols"]))
    try:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            if message.get("text") is not None:
                await socket.send_text(message["text"])
            else:
                await socket.send_bytes(message["bytes"])
    except WebSocketDisconnect as error:
        told.put(error.code)


async def starlette_leave(socket: Any) -> None:
    await socket.accept()
    await socket.close(4001, "enough")


async def starlette_deny(socket: Any) -> None:
    await socket.send_denial_response(PlainTextResponse("members only", 401))


def starlette_app() -> Any:
    routes = [
        WebSocketRoute("/echo", starlette_echo),
        WebSocketRoute("/leave", starlette_leave),
        WebSocketRoute("/deny", starlette_deny),
    ]
    return Starlette(routes=routes)


def fastapi_app() -> Any:
    app = fastapi.FastAPI()

    @app.websocket("/echo")
    async def echo(websocket: fastapi.WebSocket) -> None:
        await starlette_echo(websocket)

    @app.websocket("/leave")
    async def leave(websocket: fastapi.WebSocket) -> None:
        await starlette_leave(websocket)

    @app.websocket("/deny")
    async def deny(websocket: fastapi.WebSocket) -> None:
        raise fastapi.HTTPException(401, "members only")

    return app


def litestar_app() -> Any:
    @litestar.websocket("/echo")
    async def echo(socket: litestar.WebSocket[Any, Any, Any]) -> None:
        await socket.accept(subprotocols=chosen(socket.scope["subprotocols"]))
        try:
            while True:
                message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    raise LitestarDisconnect(code=message["code"], detail="")
                if message.get("text") is not None:
                    await socket.send_text(message["text"])
                else:
                    await socket.send_bytes(message["bytes"])
        except LitestarDisconnect as error:
            told.put(error.code)

    @litestar.websocket("/leave")
    async def leave(socket: litestar.WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        await socket.close(4001, "enough")

    @litestar.websocket("/deny")
    async def deny(socket: litestar.WebSocket[Any, Any, Any]) -> None:
        raise litestar.exceptions.NotAuthorizedException("members only")

    quiet = {"openapi_config": None, "logging_config": None}  # it would close pytest's
    return litestar.Litestar([echo, leave, deny], **quiet)


def quart_app() -> Any:
    app = quart.Quart(__name__)

    @app.websocket("/echo")
    async def echo() -> None:
        offered = quart.websocket.requested_subprotocols
        await quart.websocket.accept(subprotocol=chosen(offered))
        try:
            while True:
                await quart.websocket.send(await quart.websocket.receive())
        except asyncio.CancelledError:
            told.put(None)  # Quart does not say the code
            raise

    @app.websocket("/leave")
    async def leave() -> None:
        await quart.websocket.accept()
        await quart.websocket.close(4001, "enough")

    @app.websocket("/deny")
    async def deny() -> Any:
        return "members only", 401

    return app


def blacksheep_app() -> Any:
    app = blacksheep.Application(router=blacksheep.Router())

    @app.router.ws("/echo")
    async def echo(socket: blacksheep.WebSocket) -> None:
        await socket.accept(subprotocol=chosen(socket.scope["subprotocols"]))
        try:
            while True:
                message = await socket.receive()
                if message.get("text") is not None:
                    await socket.send_text(message["text"])
                else:
                    await socket.send_bytes(message["bytes"])
        except WebSocketDisconnectError as error:
            told.put(error.code)

    @app.router.ws("/leave")
    async def leave(socket: blacksheep.WebSocket) -> None:
        await socket.accept()
        await socket.close(4001, "enough")

    @app.router.ws("/deny")
    async def deny(socket: blacksheep.WebSocket) -> None:
        raise blacksheep.HTTPException(401, "members only")

    return app


APPS: dict[str, Callable[[], Any]] = {
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "litestar": litestar_app,
    "quart": quart_app,
    "blacksheep": blacksheep_app,
}

SILENT = ("litestar", "blacksheep")  # they close a handshake without an answer


@pytest.fixture(params=APPS)
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LOOPS)
def live(serve: Callable[..., Live], framework: str, request: Any) -> Live:
    return serve(APPS[framework](), loop=request.param)


@pytest.fixture
def connect(live: Live) -> Callable[..., Any]:
    """connect(path, **options): a WebSocket of the client."""

    def connect(path: str, **options: Any) -> Any:
        url = "ws://{}:{}{}".format(*live.address, path)
        times = {"open_timeout": SOON, "close_timeout": SOON}
        return websockets.sync.client.connect(url, **times, **options)

    return connect


def closed(client: Any) -> tuple[int, str]:
    """How the server closes."""
    with pytest.raises(ConnectionClosed) as caught:
        client.recv(SOON)
    return caught.value.rcvd.code, caught.value.rcvd.reason


def code_told(framework: str) -> int | None:
    """What the app was told; that of Quart only learns that it was closed."""
    code = told.get(timeout=SOON)
    assert (code is None) == (framework == "quart")
    return code


# ---- What is asked -------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["deflate", None])
def test_text_and_bytes_come_back(connect, framework, compression):
    messages = ["x", "é" * 1000, b"\0\xff", b"y" * 100_000]
    with connect("/echo", compression=compression) as client:
        for message in messages:
            client.send(message)
        assert [client.recv(SOON) for _ in messages] == messages
    code_told(framework)


def test_a_subprotocol_is_agreed_on(connect, framework):
    with connect("/echo", subprotocols=["other", CHAT]) as client:
        assert client.subprotocol == CHAT
    with connect("/echo", subprotocols=["other"]) as client:
        assert client.subprotocol is None
    for _ in range(2):
        code_told(framework)


def test_the_client_s_code_reaches_the_app(connect, framework):
    with connect("/echo") as client:
        client.close(4000, "bye")
    assert code_told(framework) in (4000, None)


def test_the_app_s_code_and_reason_reach_the_client(connect):
    with connect("/leave") as client:
        assert closed(client) == (4001, "enough")


def test_a_handshake_may_be_refused(connect, framework):
    with pytest.raises(InvalidStatus) as caught:
        connect("/deny")
    answer = caught.value.response
    says = framework not in SILENT
    assert answer.status_code == (401 if says else 403)
    assert (b"members only" in answer.body) == says


def test_a_worker_that_leaves_closes_with_1012(connect, framework, live):
    with connect("/echo") as client:
        client.send("x")
        assert client.recv(SOON) == "x"
        live.server.shutdown()
        assert closed(client)[0] == 1012
    assert code_told(framework) in (1012, None)
    assert live.ended() is None
