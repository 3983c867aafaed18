"""WebSockets over real sockets: a test for each rule of ASGI's part of it and of the
native API, and for what the core does by itself.

Two foreign clients judge what we send, wsproto and websockets; what they would not say
is said in bytes. The C units try every frame in every delivery, and the Autobahn suite
(`make autobahn`) is the long form of both.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import queue
import socket
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import anyio
import pytest
import websockets.sync.client
from live import SOON, Client, Live, get
from websockets.exceptions import ConnectionClosed
from wsproto import ConnectionType, WSConnection
from wsproto import events as ws

from prefork import Response
from prefork.errors import ClientDisconnected

LOOPS = ["asyncio", *(["uvloop"] if find_spec("uvloop") else [])]
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    f"Sec-WebSocket-Key: {KEY}",
    "Sec-WebSocket-Version: 13",
)
ACCEPTED = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3

TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A

Message = dict[str, Any]


def frame(first: int, payload: bytes = b"", key: bytes = b"\x12\x34\x56\x78") -> bytes:
    """A client's frame."""
    size = len(payload)
    if size < 126:
        head = bytes([first, 0x80 | size])
    elif size < 65536:
        head = bytes([first, 0x80 | 126]) + struct.pack("!H", size)
    else:
        head = bytes([first, 0x80 | 127]) + struct.pack("!Q", size)
    repeated = key * (size // 4 + 1)
    masked = bytes(a ^ b for a, b in zip(payload, repeated, strict=False))
    return head + key + masked


def closing(code: int, reason: str = "") -> bytes:
    return frame(CLOSE, struct.pack("!H", code) + reason.encode())


class Raw:
    """A client that speaks in bytes, once its handshake is done."""

    def __init__(self, client: Client, *lines: str) -> None:
        self.client = client
        client.send(get("/", *HANDSHAKE, *lines))
        self.data = bytearray()
        while b"\r\n\r\n" not in self.data:
            self.more()
        self.head, _, self.data = self.data.partition(b"\r\n\r\n")

    def more(self) -> None:
        data = self.client.socket.recv(65536)
        assert data, "the server has closed"
        self.data += data

    def take(self, size: int) -> bytes:
        while len(self.data) < size:
            self.more()
        part = bytes(self.data[:size])
        del self.data[:size]
        return part

    def frame(self) -> tuple[int, bytes]:
        """The next frame of the server, which is never masked."""
        first, size = self.take(2)
        if size == 126:
            (size,) = struct.unpack("!H", self.take(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self.take(8))
        return first, self.take(size)

    def send(self, data: bytes) -> None:
        self.client.send(data)

    def closed(self) -> tuple[int, str]:
        """The server closes; what it says."""
        first, payload = self.frame()
        assert first == CLOSE
        code = struct.unpack("!H", payload[:2])[0] if payload else 1005
        return code, payload[2:].decode()

    def ended(self) -> bool:
        """Whether the server closes its side now."""
        return self.data == b"" and self.client.socket.recv(1) == b""


class Proto:
    """wsproto over a socket."""

    def __init__(self, client: Client, **options: Any) -> None:
        self.client = client
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self.say(ws.Request(host="a", target="/", **options))
        self.found: Iterator[Any] = iter(())
        self.answer = self.event()

    def say(self, event: Any) -> None:
        self.client.send(self.protocol.send(event))

    def event(self) -> Any:
        while True:
            for event in self.found:
                return event
            self.protocol.receive_data(self.client.socket.recv(65536) or None)
            self.found = self.protocol.events()


@pytest.fixture(params=LOOPS)
def asgi(serve: Callable[..., Live], request: Any) -> Callable[..., Live]:
    """asgi(app, **options): a Live that serves it on this loop."""

    def start(app: Any, *args: Any, **options: Any) -> Live:
        return serve(app, *args, **{"loop": request.param, "lifespan": "off"} | options)

    return start


def connect(live: Live, **options: Any) -> Any:
    """A connection of the websockets client."""
    host, port = live.address
    return websockets.sync.client.connect(
        f"ws://{host}:{port}/", open_timeout=SOON, close_timeout=SOON, **options
    )


async def accept(receive: Any, send: Any, **more: Any) -> None:
    assert await receive() == {"type": "websocket.connect"}
    await send({"type": "websocket.accept", **more})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await accept(receive, send)
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


class Told:
    """An app that accepts, and keeps what it receives."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        while True:
            message = await receive()
            self.messages.put(message)
            if message["type"] == "websocket.disconnect":
                return

    def next(self) -> Message:
        return self.messages.get(timeout=SOON)


def disconnect(code: int, reason: str = "") -> Message:
    return {"type": "websocket.disconnect", "code": code, "reason": reason}


# ---- the scope -----------------------------------------------------------------------


def test_the_scope_is_that_of_a_websocket(asgi):
    seen = []

    async def app(scope, receive, send):
        seen.append(dict(scope))
        await accept(receive, send)

    live = asgi(app, root_path="/mount")
    client = live.client()
    client.send(get("/caf%C3%A9?a=b", *HANDSHAKE, "Sec-WebSocket-Protocol: chat, two"))
    client.receive()
    (scope,) = seen
    assert "method" not in scope
    assert scope["type"] == "websocket"
    assert scope["asgi"] == {"version": "3.0", "spec_version": "2.5"}
    assert (scope["http_version"], scope["scheme"]) == ("1.1", "ws")
    assert (scope["path"], scope["raw_path"]) == ("/mount/café", b"/mount/caf%C3%A9")
    assert (scope["query_string"], scope["root_path"]) == (b"a=b", "/mount")
    assert (b"sec-websocket-key", KEY.encode()) in scope["headers"]
    assert scope["client"] == client.socket.getsockname()
    assert scope["server"] == live.address
    assert scope["subprotocols"] == ["chat", "two"]
    assert scope["state"] == {}
    assert scope["extensions"] == {"websocket.http.response": {}}


def test_a_trusted_proxy_says_that_it_is_wss(asgi):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["scheme"])

    live = asgi(app)
    live.ask(get("/", *HANDSHAKE, "X-Forwarded-Proto: https"))
    live.log.until("without accepting")
    assert seen == ["wss"]


# ---- the handshake -------------------------------------------------------------------


def test_an_accepted_handshake_is_a_101(asgi):
    raw = Raw(asgi(echo).client())
    lines = raw.head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 101 Switching Protocols"
    assert b"Sec-WebSocket-Accept: " + ACCEPTED in lines
    assert b"Upgrade: websocket" in lines
    assert b"Connection: Upgrade" in lines
    assert not [line for line in lines if line.startswith((b"Content-", b"Transfer-"))]


def test_a_subprotocol_and_headers_are_accepted_with(asgi):
    async def app(scope, receive, send):
        headers = [(b"x-a", b"1"), (b"sec-websocket-accept", b"forged")]
        await accept(receive, send, subprotocol="two", headers=headers)

    proto = Proto(asgi(app).client(), subprotocols=["one", "two"])
    assert proto.answer.subprotocol == "two"
    assert (b"x-a", b"1") in proto.answer.extra_headers


def test_a_subprotocol_may_stand_among_the_headers(asgi):
    async def app(scope, receive, send):
        await accept(receive, send, headers=[(b"sec-websocket-protocol", b"one")])

    proto = Proto(asgi(app).client(), subprotocols=["one", "two"])
    assert proto.answer.subprotocol == "one"


def test_a_subprotocol_that_is_no_token_is_an_error(asgi):
    errors = []

    async def app(scope, receive, send):
        try:
            await accept(receive, send, subprotocol="a\r\nb")
        except Exception as error:
            errors.append(error)
        await send({"type": "websocket.accept"})

    Raw(asgi(app).client())
    assert "subprotocol is not a token" in str(errors[0])


@pytest.mark.parametrize("header", [(b"x\r\n", b"a"), (b"x", b"a\r\nb")])
def test_a_forged_header_is_a_500(asgi, header):
    async def app(scope, receive, send):
        await accept(receive, send, headers=[header])

    live = asgi(app)
    assert live.ask(get("/", *HANDSHAKE)).status == 500
    live.log.until("response field")


@pytest.mark.parametrize("version", [(), ("Sec-WebSocket-Version: 99",)])
def test_another_version_is_a_426(asgi, version):
    live = asgi(echo)
    answer = live.ask(get("/", *HANDSHAKE[:3], *version))
    assert (answer.status, answer["sec-websocket-version"]) == (426, "13")
    assert answer["upgrade"] == "websocket"


@pytest.mark.parametrize("key", [(), ("Sec-WebSocket-Key: short",)])
def test_a_malformed_key_is_a_400(asgi, key):
    lines = HANDSHAKE[:2] + HANDSHAKE[3:]
    assert asgi(echo).ask(get("/", *lines, *key)).status == 400


@pytest.mark.parametrize(
    "request_",
    [
        get("/", *HANDSHAKE, method="POST"),
        get("/", *HANDSHAKE[1:]),
        get("/", "Connection: Upgrade", "Upgrade: h2c", *HANDSHAKE[2:]),
        get("/", *HANDSHAKE).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["POST", "no Connection", "another protocol", "HTTP/1.0"],
)
def test_what_is_no_handshake_is_a_request(asgi, request_):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"x"})

    assert asgi(app).ask(request_).status == 200
    assert seen == ["http"]


def native(request):
    return b"plain"


def wsgi(environ, start_response):
    start_response("200 OK", [])
    return [b"plain"]


@pytest.mark.parametrize("app", [native, wsgi])
def test_who_takes_no_websockets_does_not_see_an_upgrade(serve, app):
    answer = serve(app).ask(get("/", *HANDSHAKE))
    assert (answer.status, answer.body) == (200, b"plain")


def test_a_close_before_the_accept_is_a_403(asgi):
    seen = []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.close", "code": 3000})
        seen.append(await receive())

    assert asgi(app).ask(get("/", *HANDSHAKE)).status == 403
    assert seen[0]["type"] == "websocket.disconnect"


def test_a_handshake_is_denied_with_an_answer(asgi):
    async def app(scope, receive, send):
        await receive()
        headers = [(b"www-authenticate", b"Basic")]
        kind = "websocket.http.response"
        await send({"type": f"{kind}.start", "status": 401, "headers": headers})
        await send({"type": f"{kind}.body", "body": b"not ", "more_body": True})
        await send({"type": f"{kind}.body", "body": b"you"})

    answer = asgi(app).ask(get("/", *HANDSHAKE))
    assert (answer.status, answer.body) == (401, b"not you")
    assert answer["www-authenticate"] == "Basic"


def test_an_app_that_raises_before_the_accept_is_a_500(asgi):
    async def app(scope, receive, send):
        raise ValueError("early")

    live = asgi(app)
    assert live.ask(get("/", *HANDSHAKE)).status == 500
    live.log.until("early")


def test_an_app_that_returns_before_the_accept_is_a_500(asgi):
    async def app(scope, receive, send):
        await receive()

    live = asgi(app)
    assert live.ask(get("/", *HANDSHAKE)).status == 500
    live.log.until("without accepting")


def test_a_client_that_leaves_before_the_accept_is_told(asgi):
    waiting, seen = queue.SimpleQueue(), queue.SimpleQueue()

    async def app(scope, receive, send):
        await receive()
        waiting.put(True)
        seen.put(await receive())
        try:
            await send({"type": "websocket.accept"})
        except OSError as error:
            seen.put(error)

    client = asgi(app).client()
    client.send(get("/", *HANDSHAKE))
    waiting.get(timeout=SOON)
    client.reset()
    assert seen.get(timeout=SOON) == disconnect(1006)
    assert isinstance(seen.get(timeout=SOON), ClientDisconnected)


def test_frames_may_come_with_the_handshake(asgi):
    client = asgi(echo).client()
    client.send(get("/", *HANDSHAKE) + frame(TEXT, b"early") + closing(1000))
    data = b""
    while not data.endswith(b"\x88\x02\x03\xe8"):
        data += client.socket.recv(65536)
    assert data.partition(b"\r\n\r\n")[2].startswith((b"\x81\x05early", b"\x88"))


# ---- messages ------------------------------------------------------------------------


def test_text_and_bytes_come_as_such(asgi):
    app = Told()
    with connect(asgi(app)) as client:
        client.send("häh")
        client.send(b"\x00\xff")
        assert app.next() == {"type": "websocket.receive", "text": "häh"}
        assert app.next() == {"type": "websocket.receive", "bytes": b"\x00\xff"}


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 3 << 20])
def test_messages_of_every_size_come_back(asgi, size, compression):
    text = ("aé\U0001f40d" * (size // 3 + 1))[:size]
    with connect(asgi(echo), compression=compression, max_size=None) as client:
        for message in (text, text.encode()):
            client.send(message)
            assert client.recv(SOON) == message


def test_many_messages_come_back_in_order(asgi):
    with connect(asgi(echo)) as client:
        for i in range(1000):
            client.send(str(i))
        assert [client.recv(SOON) for _ in range(1000)] == [str(i) for i in range(1000)]


def test_a_message_may_come_in_fragments(asgi):
    raw = Raw(asgi(echo).client())
    raw.send(frame(0x01, b"Hel") + frame(PING, b"?") + frame(0x00) + frame(0x80, b"lo"))
    assert [raw.frame(), raw.frame()] == [(PONG, b"?"), (TEXT, b"Hello")]


def test_both_keys_may_be_there(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)
        await send({"type": "websocket.send", "text": None, "bytes": b"b"})
        await send({"type": "websocket.send", "text": "t", "bytes": None})

    raw = Raw(asgi(app).client())
    assert [raw.frame(), raw.frame()] == [(BINARY, b"b"), (TEXT, b"t")]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"type": "websocket.send"}, ValueError),
        ({"type": "websocket.send", "text": None, "bytes": None}, ValueError),
        ({"type": "websocket.send", "text": b"no"}, TypeError),
        ({"type": "websocket.send", "bytes": "no"}, TypeError),
        ({"type": "websocket.accept"}, RuntimeError),
        ({"type": "websocket.unknown"}, RuntimeError),
        ({"type": "http.response.start", "status": 200}, RuntimeError),
        ({"type": "websocket.http.response.start", "status": 200}, RuntimeError),
        ({"type": "websocket.close", "code": 1006}, Exception),
        ({"type": "websocket.close", "reason": "x" * 124}, Exception),
    ],
)
def test_a_wrong_message_is_an_error_and_nothing_is_sent(asgi, message, error):
    async def app(scope, receive, send):
        await accept(receive, send)
        with pytest.raises(error):
            await send(message)
        await send({"type": "websocket.send", "text": "fine"})

    raw = Raw(asgi(app).client())
    assert raw.frame() == (TEXT, b"fine")


@pytest.mark.parametrize("kind", ["websocket.send", "websocket.http.response.body"])
def test_nothing_is_sent_before_the_accept(asgi, kind):
    async def app(scope, receive, send):
        await receive()
        with pytest.raises(RuntimeError):
            await send({"type": kind, "text": "early", "body": b""})
        await send({"type": "websocket.close"})

    assert asgi(app).ask(get("/", *HANDSHAKE)).status == 403


# ---- compression ---------------------------------------------------------------------


def test_compression_is_agreed_on(asgi):
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    raw = Raw(asgi(echo).client(), offer)
    agreed = b"permessage-deflate; server_max_window_bits=12; client_max_window_bits=12"
    assert b"Sec-WebSocket-Extensions: " + agreed in raw.head
    raw.send(frame(TEXT, b"a" * 1000))
    first, payload = raw.frame()
    assert (first, len(payload) < 100) == (TEXT | 0x40, True)


def test_compression_can_be_turned_off(asgi):
    live = asgi(echo, ws_per_message_deflate=False)
    raw = Raw(live.client(), "Sec-WebSocket-Extensions: permessage-deflate")
    assert b"Extensions" not in raw.head
    raw.send(frame(TEXT | 0x40, b"compressed all the same"))
    assert raw.closed()[0] == 1002


def test_a_bomb_is_too_large(asgi):
    with connect(asgi(echo, ws_max_size=65536)) as client:
        client.send(b"\0" * (8 << 20))
        with pytest.raises(ConnectionClosed):
            client.recv(SOON)
        assert client.close_code == 1009


# ---- the close -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        (closing(1000), 1000, ""),
        (closing(3999, "tschüß"), 3999, "tschüß"),
        (frame(CLOSE), 1005, ""),
    ],
)
def test_a_client_s_close_is_answered_and_told(asgi, sent, code, reason):
    app = Told()
    raw = Raw(asgi(app).client())
    raw.send(sent)
    assert raw.closed()[0] == code
    assert raw.ended()
    assert app.next() == disconnect(code, reason)


def test_a_lost_client_is_1006(asgi):
    app = Told()
    raw = Raw(asgi(app).client())
    raw.client.reset()
    assert app.next() == disconnect(1006)


def test_what_came_before_the_close_is_received_first(asgi):
    app = Told()
    raw = Raw(asgi(app).client())
    raw.send(frame(TEXT, b"one") + frame(TEXT, b"two") + closing(1001))
    assert [app.next()["text"], app.next()["text"]] == ["one", "two"]
    assert app.next() == disconnect(1001)


def test_the_app_closes(asgi):
    seen = []

    async def app(scope, receive, send):
        await accept(receive, send)
        await send({"type": "websocket.close", "code": 4000, "reason": "enough"})
        seen.extend([await receive(), await receive()])
        with pytest.raises(RuntimeError):
            await send({"type": "websocket.send", "text": "more"})

    raw = Raw(asgi(app).client())
    assert raw.closed() == (4000, "enough")
    raw.send(closing(4000))
    assert raw.ended()
    assert seen == [disconnect(4000, "enough")] * 2


def test_a_close_is_1000_by_default(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)
        await send({"type": "websocket.close", "reason": None})

    assert Raw(asgi(app).client()).closed() == (1000, "")


def test_an_app_that_returns_closes_with_1000(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)

    assert Raw(asgi(app).client()).closed() == (1000, "")


def test_an_app_that_raises_closes_with_1011(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)
        await receive()
        raise ValueError("oh dear")

    live = asgi(app)
    raw = Raw(live.client())
    raw.send(frame(TEXT, b"go"))
    assert raw.closed() == (1011, "")
    live.log.until("oh dear")


def test_who_sends_behind_a_disconnect_is_told_by_oserror(asgi):
    seen = queue.SimpleQueue()

    async def app(scope, receive, send):
        await accept(receive, send)
        await receive()
        for kind in ("websocket.send", "websocket.close"):
            try:
                await send({"type": kind, "text": "x"})
            except OSError as error:
                seen.put(error)
        await send({"type": "websocket.send", "text": "x"})

    raw = Raw(asgi(app).client())
    raw.send(closing(1000))
    for _ in range(2):
        assert isinstance(seen.get(timeout=SOON), ClientDisconnected)


def test_a_client_that_does_not_close_is_not_awaited(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)

    live = asgi(app, ws_close_timeout=0.1)
    raw = Raw(live.client())
    assert raw.closed() == (1000, "")
    assert raw.ended()
    assert live.until(lambda stats: stats["connections"] == 0)["timeouts"] == 1


LONG = bytes(8 << 20)  # more than lies on the way to a client that does not read


def test_a_close_is_awaited_when_all_before_it_is_sent(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)
        long = (await receive())["text"] == "long"
        sent = send({"type": "websocket.send", "bytes": LONG if long else b""})
        await send({"type": "websocket.close"})
        await sent

    live = asgi(app, ws_close_timeout=0.2)
    slow, other = Raw(live.client(65536)), Raw(live.client())
    slow.send(frame(TEXT, b"long"))
    assert slow.take(10)[0] == BINARY
    other.send(frame(TEXT, b"short"))
    assert other.frame() == (BINARY, b"")
    assert other.closed() == (1000, "") and other.ended()  # its time is over
    assert slow.take(len(LONG)) == LONG
    assert slow.closed() == (1000, "")


# ---- what a client does wrong --------------------------------------------------------

BROKEN = {
    "not masked": (b"\x81\x01a", 1002),
    "a reserved bit": (frame(TEXT | 0x20, b"a"), 1002),
    "an unknown opcode": (frame(0x83, b"a"), 1002),
    "a control frame in pieces": (frame(0x09, b"a"), 1002),
    "nothing to go on with": (frame(0x80, b"a"), 1002),
    "text that is none": (frame(TEXT, b"\xff"), 1007),
    "text that will be none": (frame(0x01, b"\xed\xa0"), 1007),
    "a close code that is none": (closing(1005), 1002),
    "a close reason that is none": (frame(CLOSE, b"\x03\xe8\xff"), 1007),
    "too large": (b"\x82\xff" + struct.pack("!Q", 1 << 25), 1009),
}


@pytest.mark.parametrize(("data", "code"), BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_protocol_is_closed(asgi, data, code):
    app = Told()
    raw = Raw(asgi(app).client())
    raw.send(data)
    assert raw.closed()[0] == code
    assert raw.ended()
    assert app.next()["code"] == code


def test_what_came_before_it_is_answered_first(asgi):
    raw = Raw(asgi(echo).client())
    raw.send(frame(TEXT, b"good") + frame(0x83, b"bad"))
    assert raw.frame() == (TEXT, b"good")
    assert raw.closed()[0] == 1002


def test_a_message_may_be_as_large_as_the_limit(asgi):
    raw = Raw(asgi(echo, ws_max_size=1000).client())
    raw.send(frame(BINARY, b"x" * 1000))
    assert raw.frame() == (BINARY, b"x" * 1000)
    raw.send(frame(0x02, b"x" * 600) + frame(0x80, b"x" * 401))
    assert raw.closed()[0] == 1009


# ---- pings ---------------------------------------------------------------------------


def test_a_ping_is_answered_while_the_app_is_busy(asgi):
    go = queue.SimpleQueue()

    async def app(scope, receive, send):
        await accept(receive, send)
        while go.empty():
            await asyncio.sleep(0.01)

    raw = Raw(asgi(app).client())
    raw.send(frame(TEXT, b"not received") + frame(PING, b"hello"))
    assert raw.frame() == (PONG, b"hello")
    go.put(True)


def test_a_silent_client_is_pinged_and_one_that_answers_stays(asgi):
    app = Told()
    raw = Raw(asgi(app, ws_ping_interval=0.1, ws_ping_timeout=1).client())
    given_up = time.monotonic() + 1.5  # one that did not answer would be by then
    while time.monotonic() < given_up:
        assert raw.frame() == (PING, b"")
        raw.send(frame(PONG))
    raw.send(frame(TEXT, b"still here"))
    assert app.next()["text"] == "still here"


def test_a_client_that_does_not_answer_a_ping_is_given_up(asgi):
    app = Told()
    raw = Raw(asgi(app, ws_ping_interval=0.1, ws_ping_timeout=0.1).client())
    assert raw.frame() == (PING, b"")
    assert raw.closed() == (1011, "keepalive ping timeout")
    assert raw.ended()
    assert app.next() == disconnect(1011, "keepalive ping timeout")


def test_a_client_that_still_reads_is_not_expected_to_answer_a_ping(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)
        while (message := await receive())["type"] == "websocket.receive":
            sent = LONG if message["text"] == "long" else b"short"
            await send({"type": "websocket.send", "bytes": sent})

    live = asgi(app, ws_ping_interval=0.2, ws_ping_timeout=1)
    slow, other = Raw(live.client(65536)), Raw(live.client())
    slow.send(frame(TEXT, b"long"))
    assert slow.take(10)[0] == BINARY
    other.send(frame(TEXT, b"short"))
    assert [other.frame() for _ in range(2)] == [(BINARY, b"short"), (PING, b"")]
    assert other.closed()[0] == 1011  # its time is over
    slow.send(frame(TEXT, b"short"))
    assert slow.take(len(LONG)) == LONG
    while (found := slow.frame()) == (PING, b""):
        slow.send(frame(PONG))
    assert found == (BINARY, b"short")


def test_no_interval_means_no_ping(asgi):
    live = asgi(echo, ws_ping_interval=None, drain_idle=0)
    raw = Raw(live.client())
    raw.client.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        raw.client.socket.recv(1)


# ---- pressure ------------------------------------------------------------------------


def fill(client: Client, data: bytes) -> int:
    """Send until nobody takes more; how many bytes were taken."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    client.socket.settimeout(0.5)
    total = 0
    try:
        while total < 64 << 20:
            total += client.socket.send(data[total % len(data) :])
    except TimeoutError:
        pass
    return total


def test_a_client_is_not_read_while_the_app_does_not_receive(asgi):
    go = queue.SimpleQueue()
    sizes = []

    async def app(scope, receive, send):
        await accept(receive, send)
        while go.empty():
            await asyncio.sleep(0.01)
        while (message := await receive())["type"] == "websocket.receive":
            sizes.append(len(message["bytes"]))

    live = asgi(app)
    raw = Raw(live.client())
    one = frame(BINARY, b"x" * 10000)
    total = fill(raw.client, one * 10)
    assert total < 32 << 20  # what sockets hold, and not much more
    go.put(True)
    raw.client.socket.settimeout(SOON)
    rest = total % len(one)
    raw.send(one[rest:] if rest else b"")
    raw.send(closing(1000))
    assert raw.closed()[0] == 1000
    assert sum(sizes) == -(-total // len(one)) * 10000


def test_send_waits_for_a_client_that_does_not_read(asgi):
    sent = []

    async def app(scope, receive, send):
        await accept(receive, send)
        for _ in range(640):
            await send({"type": "websocket.send", "bytes": b"x" * 100000})
            sent.append(time.monotonic())

    live = asgi(app)
    raw = Raw(live.client(receive_buffer=65536))
    live.until(lambda stats: stats["bytes_out"] > 100000)
    deadline = time.monotonic() + SOON
    while sent == [] or time.monotonic() - sent[-1] < 0.3:
        assert time.monotonic() < deadline
    assert len(sent) < 640
    for _ in range(640):
        assert raw.frame() == (BINARY, b"x" * 100000)
    assert raw.closed() == (1000, "")


def test_who_waits_for_room_is_told_when_the_client_leaves(asgi):
    outcome = queue.SimpleQueue()

    async def app(scope, receive, send):
        await accept(receive, send)
        try:
            while True:
                await send({"type": "websocket.send", "bytes": b"x" * 100000})
        except OSError as error:
            outcome.put(error)

    live = asgi(app)
    raw = Raw(live.client(receive_buffer=65536))
    live.until(lambda stats: stats["bytes_out"] > 100000)
    raw.client.reset()
    assert isinstance(outcome.get(timeout=SOON), ClientDisconnected)


def leave_while_it_waits(live: Live, size: int) -> None:
    """Close while the app waits for room, and read what it has sent."""
    raw = Raw(live.client(receive_buffer=65536))
    live.until(lambda stats: stats["bytes_out"] > 100000)
    raw.send(closing(1000, "bye"))
    assert raw.frame() == (BINARY, bytes(size))
    assert raw.closed() == (1000, "")


def test_a_send_that_waits_succeeds_when_the_client_closes_in_good_order(asgi):
    outcome = queue.SimpleQueue()

    async def app(scope, receive, send):
        await accept(receive, send)
        await send({"type": "websocket.send", "bytes": bytes(6_000_000)})
        outcome.put(await receive())

    leave_while_it_waits(asgi(app), 6_000_000)
    assert outcome.get(timeout=SOON) == disconnect(1000, "bye")


def test_a_native_send_that_waits_succeeds_when_the_client_closes(serve):
    outcome = queue.SimpleQueue()

    async def handler(request):
        socket = await request.websocket()
        await socket.send(bytes(6_000_000))
        with pytest.raises(ClientDisconnected):
            await socket.receive()
        outcome.put((socket.close_code, socket.close_reason))

    leave_while_it_waits(serve(handler), 6_000_000)
    assert outcome.get(timeout=SOON) == (1000, "bye")


# ---- idleness and the end ------------------------------------------------------------


def test_an_idle_websocket_holds_no_buffer(asgi):
    live = asgi(echo)
    raws = [Raw(live.client()) for _ in range(10)]
    for raw in raws:
        raw.send(frame(TEXT, b"x" * 70000))
        assert raw.frame()[1] == b"x" * 70000
    live.until(lambda stats: stats["buffers_in_use"] == 0)
    assert live.stats()["lent"] == 10


def test_a_drain_closes_with_1012(asgi):
    app = Told()
    live = asgi(app, drain_idle=1)
    raw = Raw(live.client())
    live.server.shutdown()
    assert raw.closed() == (1012, "")
    assert app.next() == disconnect(1012)
    raw.send(closing(1012))
    assert raw.ended()
    assert live.ended() is None


def test_a_drain_does_not_wait_for_who_does_not_close(asgi):
    app = Told()
    live = asgi(app, ws_close_timeout=0.2)
    raw = Raw(live.client())
    live.server.shutdown()
    assert raw.closed() == (1012, "")
    assert live.ended() is None


def test_a_handshake_that_is_accepted_in_a_drain_is_closed(asgi):
    waiting, go = queue.SimpleQueue(), queue.SimpleQueue()

    async def app(scope, receive, send):
        await receive()
        waiting.put(True)
        while go.empty():
            await asyncio.sleep(0.01)
        await send({"type": "websocket.accept"})
        await receive()

    live = asgi(app)
    client = live.client()
    client.send(get("/", *HANDSHAKE))
    waiting.get(timeout=SOON)
    live.server.shutdown()
    go.put(True)
    data = b""
    while not data.endswith(b"\x88\x02\x03\xf4"):
        data += client.socket.recv(65536)
    assert data.startswith(b"HTTP/1.1 101 ")
    client.close()
    assert live.ended() is None


def test_cancelled_receives_lose_nothing(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(receive(), 0.02)
        await send({"type": "websocket.send", "text": "now"})
        await send({"type": "websocket.send", "text": (await receive())["text"]})

    raw = Raw(asgi(app).client())
    assert raw.frame() == (TEXT, b"now")
    raw.send(frame(TEXT, b"a"))
    assert raw.frame() == (TEXT, b"a")


def test_a_task_may_send_while_another_receives(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)
        got = asyncio.create_task(receive())
        for i in range(3):
            await asyncio.sleep(0)
            await send({"type": "websocket.send", "text": str(i)})
        await send({"type": "websocket.send", "text": (await got)["text"]})

    raw = Raw(asgi(app).client())
    assert [raw.frame()[1] for _ in range(3)] == [b"0", b"1", b"2"]
    raw.send(frame(TEXT, b"end"))
    assert raw.frame() == (TEXT, b"end")


# ---- the task that receives ----------------------------------------------------------
# It goes on with a message in the core's turn, and without asyncio stepping it. So each
# of these is played twice: over a WebSocket, and in a plain task that reads a queue.


async def suppresses(seen: list[Any]) -> str:
    try:
        await asyncio.sleep(SOON)
    except asyncio.CancelledError as error:
        seen.append(error.args)
    return "suppressed"


async def cancels_itself_and_receives(receive: Any, seen: list[Any]) -> None:
    await receive()
    asyncio.current_task().cancel("why")
    seen.append("still here")
    try:
        await receive()
    except asyncio.CancelledError as error:
        seen.append(error.args)
    await asyncio.sleep(0)


async def cancels_itself_and_sleeps(receive: Any, seen: list[Any]) -> None:
    await receive()
    asyncio.current_task().cancel("why")
    await suppresses(seen)
    raise ValueError("awake")


async def cancels_itself_and_gives_way(receive: Any, seen: list[Any]) -> None:
    await receive()
    asyncio.current_task().cancel()
    await asyncio.sleep(0)
    seen.append("not reached")


async def cancels_itself_and_awaits_who_suppresses_it(
    receive: Any, seen: list[Any]
) -> None:
    await receive()
    inner = asyncio.create_task(suppresses(seen))
    await asyncio.sleep(0)
    await receive()
    asyncio.current_task().cancel("why")
    seen.append(await inner)


async def cancels_itself_and_returns(receive: Any, seen: list[Any]) -> None:
    await receive()
    asyncio.current_task().cancel("why")


async def cancels_itself_and_raises(receive: Any, seen: list[Any]) -> None:
    await receive()
    asyncio.current_task().cancel()
    raise ValueError("first")


async def takes_it_back(receive: Any, seen: list[Any]) -> None:
    await receive()
    task = asyncio.current_task()
    task.cancel()
    if hasattr(task, "uncancel"):
        seen.append(task.uncancel())
    try:
        await receive()
        seen.append("received")
    except asyncio.CancelledError:
        seen.append("cancelled")


async def is_cancelled_by_another(receive: Any, seen: list[Any]) -> None:
    for _ in range(MESSAGES):
        await receive()
    asyncio.get_running_loop().call_soon(asyncio.current_task().cancel, "why")
    try:
        await receive()
    except asyncio.CancelledError as error:
        seen.append(error.args)
        raise


async def is_who_it_was(receive: Any, seen: list[Any]) -> None:
    task = asyncio.current_task()
    NUMBER.set(1)
    await receive()
    seen.append((asyncio.current_task() is task, NUMBER.get()))
    NUMBER.set(2)
    await asyncio.sleep(0)
    await receive()
    seen.append((asyncio.current_task() is task, NUMBER.get()))
    seen.append(await asyncio.create_task(in_a_child()))


async def in_a_child() -> int:
    return NUMBER.get()


async def runs_out_of_time(receive: Any, seen: list[Any]) -> None:
    await receive()
    for _ in range(2):
        await receive()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(receive(), 0.01)
    seen.append("late")


async def receives_in_other_tasks(receive: Any, seen: list[Any]) -> None:
    await asyncio.wait_for(receive(), SOON)
    await asyncio.gather(receive(), receive())
    seen.append("received")


async def is_left_by_anyio(receive: Any, seen: list[Any]) -> None:
    await receive()
    with anyio.move_on_after(0.01) as scope:
        for _ in range(9):
            await receive()
    seen.append(scope.cancelled_caught)
    async with anyio.create_task_group() as group:
        group.start_soon(cancel, group)
        await receive()
    seen.append("left")


async def cancel(group: Any) -> None:
    group.cancel_scope.cancel()


async def raises(receive: Any, seen: list[Any]) -> None:
    await receive()
    raise LookupError("nothing")


async def looks_at_itself(receive: Any, seen: list[Any]) -> None:
    await receive()
    task = asyncio.current_task()
    seen.append((len(task.get_stack(limit=1)), task in asyncio.all_tasks()))
    seen.append((asyncio.iscoroutine(task.get_coro()), task.done()))


NUMBER = contextvars.ContextVar("NUMBER", default=0)
SCENES = [
    cancels_itself_and_receives,
    cancels_itself_and_sleeps,
    cancels_itself_and_gives_way,
    cancels_itself_and_awaits_who_suppresses_it,
    cancels_itself_and_returns,
    cancels_itself_and_raises,
    takes_it_back,
    is_cancelled_by_another,
    is_who_it_was,
    runs_out_of_time,
    receives_in_other_tasks,
    is_left_by_anyio,
    raises,
    looks_at_itself,
]
MESSAGES = 3


def fate(task: asyncio.Task[None]) -> str:
    """How a task has ended."""
    return "cancelled" if task.cancelled() else repr(task.exception())


def in_a_plain_task(scene: Any) -> tuple[list[Any], str]:
    async def main() -> tuple[list[Any], str]:
        seen: list[Any] = []
        messages: asyncio.Queue[str] = asyncio.Queue()
        task = asyncio.create_task(scene(messages.get, seen))
        for i in range(MESSAGES):
            await asyncio.sleep(0)
            messages.put_nowait(str(i))
        await asyncio.wait([task])
        return seen, fate(task)

    return asyncio.run(main())


@pytest.mark.parametrize("scene", SCENES)
def test_who_receives_is_in_a_task_like_any_other(asgi, scene):
    ended = queue.SimpleQueue()

    async def app(scope, receive, send):
        await accept(receive, send)
        seen = []
        task = asyncio.current_task()
        task.add_done_callback(lambda task: ended.put((seen, fate(task))))
        await scene(receive, seen)

    assert play(asgi(app), ended) == in_a_plain_task(scene)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("scene", SCENES)
def test_a_native_handler_that_receives_is_in_a_task_like_any_other(serve, scene, loop):
    ended = queue.SimpleQueue()

    async def handler(request):
        socket = await request.websocket()
        seen = []
        task = asyncio.current_task()
        task.add_done_callback(lambda task: ended.put((seen, fate(task))))
        await scene(socket.receive, seen)

    assert play(serve(handler, loop=loop), ended) == in_a_plain_task(scene)


def play(live: Live, ended: queue.SimpleQueue[Any]) -> Any:
    """Send messages, each in a turn of its own."""
    raw = Raw(live.client())
    for i in range(MESSAGES):
        raw.send(frame(TEXT, b"%d" % i) + frame(PING))
        if raw.frame()[0] == CLOSE:
            break
    found = ended.get(timeout=SOON)
    live.log.until("failed" if "Error" in found[1] else "")
    return found


eager = pytest.mark.skipif(
    sys.version_info < (3, 12),
    reason="the task is followed as that of a request, which it is when it is made",
)


@pytest.mark.parametrize(
    "how",
    [
        "returns",
        pytest.param("raises", marks=eager),
        pytest.param("is cancelled", marks=eager),
    ],
)
def test_nothing_of_a_websocket_is_left_to_the_collector(serve, how):
    things = queue.SimpleQueue()

    async def handler(request):
        socket = await request.websocket()
        things.put(weakref.ref(socket))
        things.put(weakref.ref(asyncio.current_task()))
        async for message in socket:
            if how == "returns":
                return
            if how == "raises":
                raise ValueError(message)
            asyncio.current_task().cancel()

    live = serve(handler)
    gc.disable()
    try:
        raw = Raw(live.client())
        raw.send(frame(TEXT, b"one"))
        assert raw.closed()[0] == {"raises": 1011, "is cancelled": 1012}.get(how, 1000)
        live.log.until("ValueError" if how == "raises" else "")
        deadline = time.monotonic() + SOON
        for thing in (things.get(timeout=SOON), things.get(timeout=SOON)):
            while thing() is not None:
                assert time.monotonic() < deadline
    finally:
        gc.enable()


def test_a_traceback_of_who_received_tells_of_the_app_alone(asgi):
    async def app(scope, receive, send):
        await accept(receive, send)
        await receive()
        raise ValueError("oh dear")

    live = asgi(app)
    raw = Raw(live.client())
    raw.send(frame(TEXT, b"go"))
    assert raw.closed() == (1011, "")
    live.log.until("ValueError: oh dear")
    assert "_waiting.pyx" not in live.log.text


# ---- native handlers -----------------------------------------------------------------


async def native_echo(request):
    socket = await request.websocket()
    async for message in socket:
        await socket.send(message)


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_native_handler_echoes(serve, compression):
    with connect(serve(native_echo), compression=compression) as client:
        for message in ("häh" * 1000, b"\x00\xff", ""):
            client.send(message)
            assert client.recv(SOON) == message


def test_a_native_handler_agrees_on_a_subprotocol(serve):
    async def handler(request):
        names = request.subprotocols
        socket = await request.websocket(subprotocol=names[-1], headers={"X-A": "1"})
        await socket.send(f"{socket.subprotocol} {request.path}")

    proto = Proto(serve(handler).client(), subprotocols=["one", "two"])
    assert proto.answer.subprotocol == "two"
    assert (b"x-a", b"1") in proto.answer.extra_headers
    assert proto.event().data == "two /"
    assert proto.event().code == 1000


def test_a_native_handler_closes(serve):
    seen = queue.SimpleQueue()

    async def handler(request):
        socket = await request.websocket()
        await socket.close(4001, "bye")
        await socket.close()
        seen.put((socket.close_code, socket.close_reason, socket.closed))
        with pytest.raises(ClientDisconnected):
            await socket.send("more")
        with pytest.raises(ClientDisconnected):
            await socket.receive()

    assert Raw(serve(handler).client()).closed() == (4001, "bye")
    assert seen.get(timeout=SOON) == (4001, "bye", True)


def test_a_native_handler_learns_how_it_was_closed(serve):
    seen = queue.SimpleQueue()

    async def handler(request):
        socket = await request.websocket()
        messages = [message async for message in socket]
        seen.put((messages, socket.close_code, socket.close_reason))

    raw = Raw(serve(handler).client())
    raw.send(frame(TEXT, b"a") + frame(BINARY, b"b") + closing(3000, "why"))
    assert seen.get(timeout=SOON) == (["a", b"b"], 3000, "why")


def test_a_native_handler_that_raises_closes_with_1011(serve):
    async def handler(request):
        await request.websocket()
        raise ValueError("oh dear")

    live = serve(handler)
    assert Raw(live.client()).closed() == (1011, "")
    live.log.until("oh dear")


def test_a_native_handler_may_wait_before_it_accepts(serve):
    async def handler(request):
        await asyncio.sleep(0.01)
        socket = await request.websocket()
        await socket.send("late")

    raw = Raw(serve(handler).client())
    assert raw.frame() == (TEXT, b"late")
    assert raw.closed() == (1000, "")


def test_a_handshake_that_was_answered_cannot_be_accepted(serve):
    outcome = queue.SimpleQueue()

    async def accept_late(request):
        with pytest.raises(ClientDisconnected) as told:
            await request.websocket()
        outcome.put(str(told.value))

    async def handler(request):
        asyncio.get_running_loop().call_soon(
            lambda: tasks.append(asyncio.create_task(accept_late(request)))
        )
        return b"instead"

    tasks: list[Any] = []
    assert serve(handler).ask(get("/", *HANDSHAKE)).body == b"instead"
    assert outcome.get(timeout=SOON) == "the request is over"


@pytest.mark.parametrize(
    ("lines", "status"),
    [((), 400), (HANDSHAKE[:3], 426), (HANDSHAKE[:2] + HANDSHAKE[3:], 400)],
)
def test_a_native_handler_refuses_what_is_no_handshake(serve, lines, status):
    assert serve(native_echo).ask(get("/", *lines)).status == status


def test_a_native_handler_may_answer_instead(serve):
    async def handler(request):
        return Response("not you", status=401)

    assert serve(handler).ask(get("/", *HANDSHAKE)).status == 401


def test_a_plain_handler_has_no_websockets(serve):
    def handler(request):
        request.websocket().send(None)

    live = serve(handler)
    assert live.ask(get("/", *HANDSHAKE)).status == 500
    live.log.until("WebSockets are for async handlers")


def test_a_native_send_waits_for_room(serve):
    async def handler(request):
        socket = await request.websocket()
        for _ in range(100):
            await socket.send(b"x" * 100000)

    raw = Raw(serve(handler).client(receive_buffer=65536))
    for _ in range(100):
        assert raw.frame() == (BINARY, b"x" * 100000)
