"""ASGI apps over real sockets, a test for each rule of the specification (3.0).

Each runs on asyncio's own loop and on uvloop, where that is installed.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import queue
import select
import signal
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h11
import pytest
from live import GET, SOON, Client, Held, Live, chunk, get, post
from programs import Program, ask, kill

from prefork import AppStartupError, ConfigError, Server
from prefork.asgi import tells_departure
from prefork.errors import ClientDisconnected
from prefork.server import interface_of

HIGH_WATER = 65536
EXPECT = "Expect: 100-continue"
STREAMED = get("/", "Transfer-Encoding: chunked", method="POST")
LOOPS = ["asyncio", *(["uvloop"] if find_spec("uvloop") else [])]

Message = dict[str, Any]
Queue = queue.SimpleQueue


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def asgi(serve: Callable[..., Live], loop: str) -> Callable[..., Live]:
    """asgi(app, **options): a Live that serves it on this loop."""

    def start(app: Any, *args: Any, **options: Any) -> Live:
        return serve(app, *args, **{"loop": loop, "lifespan": "off", **options})

    return start


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [*headers]}


def body(data: bytes = b"", more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def answer(send: Any, data: bytes = b"hi", status: int = 200) -> None:
    await send(start(status))
    await send(body(data))


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await answer(send)


async def read(receive: Any) -> bytes:
    """The whole body."""
    parts = []
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, await read(receive))


class Recorder:
    """An app that remembers its scopes."""

    def __init__(self) -> None:
        self.scopes: list[Message] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await answer(send)


@pytest.fixture
def scope_of(asgi: Callable[..., Live]) -> Callable[..., Message]:
    """The scope that an app gets for a request."""

    def ask(request: bytes = GET, **options: Any) -> Message:
        app = Recorder()
        asgi(app, **options).ask(request)
        return app.scopes[0]

    return ask


def logged(live: Live) -> str:
    """What was logged at the end: every line that comes has come."""
    live.stop()
    return live.log.text


class Gate:
    """What apps of a server wait for until the test opens it."""

    def __init__(self) -> None:
        self.waiting: Queue[None] = Queue()
        self.opened: asyncio.Event | None = None

    async def wait(self) -> None:
        if self.opened is None:
            self.loop, self.opened = asyncio.get_running_loop(), asyncio.Event()
        self.waiting.put(None)
        await self.opened.wait()

    def await_waiter(self) -> None:
        self.waiting.get(timeout=SOON)

    def open(self) -> None:
        assert self.opened is not None
        self.loop.call_soon_threadsafe(self.opened.set)


# ---- scope ---------------------------------------------------------------------------


def test_a_scope_has_all_that_the_specification_says(asgi):
    app = Recorder()
    live = asgi(app)
    client = live.client()
    client.ask(get("/a%20b/%C3%A9?x=%20&y", "X-One: 1"))
    assert app.scopes == [
        {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.5"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/a b/é",
            "raw_path": b"/a%20b/%C3%A9",
            "query_string": b"x=%20&y",
            "root_path": "",
            "headers": [(b"host", b"a"), (b"x-one", b"1")],
            "client": client.socket.getsockname(),
            "server": live.address,
            "state": {},
            "extensions": {
                "http.response.pathsend": {},
                "http.response.zerocopysend": {},
                "http.response.early_hint": {},
            },
        }
    ]


@pytest.mark.parametrize(
    ("target", "path", "raw"),
    [
        ("/", "/", b"/"),
        ("/%2F", "//", b"/%2F"),
        ("/%ff", "/�", b"/%ff"),
        ("/%", "/%", b"/%"),
        ("http://a/x?y", "/x", b"/x"),
        ("http://a", "/", b"/"),
    ],
)
def test_a_path_is_decoded_and_its_raw_form_is_not(scope_of, target, path, raw):
    scope = scope_of(get(target))
    assert (scope["path"], scope["raw_path"]) == (path, raw)


def test_header_names_are_lower_case_and_values_as_sent_in_their_order(scope_of):
    lines = ["X-B: One", "Cookie: a=1", "X-A: é", "COOKIE: b=2", "x-b:  Two "]
    assert scope_of(get("/", *lines))["headers"] == [
        (b"host", b"a"),
        (b"x-b", b"One"),
        (b"cookie", b"a=1"),
        (b"x-a", "é".encode("latin-1")),
        (b"cookie", b"b=2"),
        (b"x-b", b"Two"),
    ]


def test_what_an_app_does_inside_an_extension_does_not_reach_the_next_one(asgi):
    async def app(scope, receive, send):
        extensions = scope["extensions"]
        told = repr([name for name in extensions if extensions[name]])
        for inner in extensions.values():
            inner["mine"] = 1
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": told.encode()})

    live = asgi(app)
    assert [live.ask().body for _ in range(3)] == [b"[]"] * 3


def test_what_an_app_does_to_its_scope_does_not_reach_the_next_one(asgi):
    seen = []

    async def app(scope, receive, send):
        seen.append({k: repr(v) for k, v in scope.items()})
        scope["headers"].append((b"x", b"y"))
        scope["asgi"]["version"] = scope["new"] = "4"
        scope["extensions"]["more"] = {}
        scope["state"]["x"] = 1
        await answer(send)

    client = asgi(app).client()
    for _ in range(5):
        client.ask(get("/", "Accept: */*"))
    assert seen == seen[:1] * 5


def test_header_blocks_that_differ_by_a_byte_are_told_apart(asgi):
    app = Recorder()
    client = asgi(app).client()
    numbers = [1, 1, 1, 2, 1, 2, 2, 2, 1]
    for n in numbers:
        client.ask(get("/", f"X-N: {n}"))
    values = [scope["headers"][1][1] for scope in app.scopes]
    assert values == [b"%d" % n for n in numbers]


def test_http_1_0_is_told(scope_of):
    assert scope_of(b"GET / HTTP/1.0\r\n\r\n")["http_version"] == "1.0"


def test_a_method_is_told_as_sent_for_get_in_small_letters_is_not_get(scope_of):
    assert scope_of(get(method="Purge"))["method"] == "Purge"


@pytest.mark.parametrize("target", ["/shop/x", "/x"], ids=["kept", "taken off"])
def test_root_path_is_part_of_the_path_whatever_a_proxy_does_to_it(scope_of, target):
    scope = scope_of(get(target), root_path="/shop")
    found = [scope[name] for name in ("root_path", "path", "raw_path")]
    assert found == ["/shop", "/shop/x", b"/shop/x"]


def test_the_path_of_the_server_as_a_whole_is_an_asterisk(scope_of):
    scope = scope_of(get("*", method="OPTIONS"), root_path="/shop")
    assert (scope["path"], scope["raw_path"]) == ("*", b"*")


def test_an_absolute_target_does_not_lend_its_host_to_others(asgi):
    app = Recorder()
    client = asgi(app).client()
    for target in ("http://evil/", "/") * 3:
        client.ask(get(target))
    hosts = [scope["headers"][0][1] for scope in app.scopes]
    assert hosts == [b"evil", b"a"] * 3


def test_root_path_ends_at_a_slash(scope_of):
    scope = scope_of(get("/shopping"), root_path="/shop")
    assert scope["path"] == "/shop/shopping"


def test_on_a_unix_socket_the_server_is_its_path_and_the_client_is_nobody(
    asgi, tmp_path
):
    app = Recorder()
    path = str(tmp_path / "sock")
    asgi(app, f"unix:{path}").ask()
    assert (app.scopes[0]["server"], app.scopes[0]["client"]) == ((path, None), None)


def test_a_trusted_proxy_tells_client_scheme_and_host(scope_of):
    lines = ["X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https"]
    scope = scope_of(get("/", *lines, "X-Forwarded-Host: shop.example"))
    assert (scope["client"], scope["scheme"]) == (("1.2.3.4", 0), "https")
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    assert hosts == [b"shop.example"]


def test_a_stranger_tells_nothing(scope_of):
    options = {"forwarded_allow_ips": ()}
    scope = scope_of(get("/", "X-Forwarded-For: 1.2.3.4"), **options)
    assert scope["client"][0] == "127.0.0.1"
    assert scope["headers"] == [(b"host", b"a")]


def test_a_proxy_header_tells_client_and_server(scope_of):
    line = b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 443\r\n"
    scope = scope_of(line + GET, proxy_protocol="v1")
    assert (scope["client"], scope["server"]) == (("1.2.3.4", 1000), ("5.6.7.8", 443))


# ---- receive -------------------------------------------------------------------------


def test_a_request_without_a_body_is_one_empty_message(asgi):
    seen = []

    async def app(scope, receive, send):
        seen.append(await receive())
        await answer(send)

    asgi(app).ask()
    assert seen == [{"type": "http.request", "body": b"", "more_body": False}]


@pytest.mark.parametrize("size", [0, 5, 1 << 20])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_is_read(asgi, size, framing):
    data = os.urandom(size)
    client = asgi(echo).client()
    request = post(data)
    if framing == "chunks":
        request = STREAMED + (chunk(data) if data else b"") + chunk(b"")
    sender = threading.Thread(target=client.send, args=[request])
    sender.start()
    assert client.answer().body == data
    sender.join()


def test_an_app_starts_before_the_body_and_gets_it_piece_by_piece(asgi):
    seen: Queue[Any] = Queue()

    async def app(scope, receive, send):
        seen.put("started")
        for _ in range(3):
            seen.put(await receive())
        await answer(send)

    client = asgi(app).client()
    client.send(STREAMED)
    assert seen.get(timeout=SOON) == "started"
    for part, more in ((b"one", True), (b"two", True), (b"", False)):
        client.send(chunk(part))
        message = {"type": "http.request", "body": part, "more_body": more}
        assert seen.get(timeout=SOON) == message
    assert client.answer().body == b"hi"


def test_what_an_app_does_not_receive_is_not_taken_in(asgi):
    gate = Gate()

    async def app(scope, receive, send):
        await gate.wait()
        await answer(send, b"%d" % len(await read(receive)))

    live = asgi(app)
    client = live.client()
    sender = threading.Thread(target=client.send, args=[post(bytes(16 << 20))])
    sender.start()
    gate.await_waiter()
    assert client.is_quiet() and live.stats()["bytes_in"] <= 4 * HIGH_WATER
    gate.open()
    assert client.answer().body == b"%d" % (16 << 20)
    sender.join()


def test_a_body_may_be_left_unread(asgi):
    client = asgi(hello).client()
    client.send(post(bytes(100)) * 3 + STREAMED + chunk(b"x") + chunk(b""))
    assert [client.answer().body for _ in range(4)] == [b"hi"] * 4


def test_100_continue_is_sent_when_the_app_receives(asgi):
    gate = Gate()

    async def app(scope, receive, send):
        await gate.wait()
        await echo(scope, receive, send)

    client = asgi(app).client()
    client.send(post(b"hello", EXPECT)[:-5])
    gate.await_waiter()
    assert client.is_quiet()
    gate.open()
    found = client.answer(on_100=b"hello")
    assert (found.interim, found.body) == ([(100, [])], b"hello")


def test_100_continue_is_not_sent_when_the_app_does_not_receive(asgi):
    found = asgi(hello).ask(post(b"hello", EXPECT)[:-5])
    assert (found.status, found.interim, found.closes) == (200, [], True)


def test_behind_its_answer_an_app_receives_disconnect(asgi):
    seen: Queue[Message] = Queue()

    async def app(scope, receive, send):
        await answer(send)
        seen.put(await receive())
        seen.put(await receive())

    client = asgi(app).client()
    assert [client.ask(post(b"x")).body for _ in range(2)] == [b"hi"] * 2
    found = [seen.get(timeout=SOON) for _ in range(4)]
    assert found == [{"type": "http.disconnect"}] * 4


def test_who_waits_for_disconnect_is_told_when_the_answer_is_complete(asgi):
    seen: Queue[Message] = Queue()

    async def app(scope, receive, send):
        async def listen():
            seen.put(await receive())

        await receive()
        listener = asyncio.ensure_future(listen())
        await asyncio.sleep(0)
        await answer(send)
        await listener

    asgi(app).ask()
    assert seen.get(timeout=SOON) == {"type": "http.disconnect"}


@pytest.mark.parametrize("leave", [Client.close, Client.reset, Client.half_close])
def test_who_waits_is_told_when_the_client_leaves(asgi, leave):
    seen: Queue[Any] = Queue()

    async def app(scope, receive, send):
        seen.put(await receive())
        seen.put(await receive())
        seen.put(await receive())

    live = asgi(app)
    client = live.client()
    client.send(GET)
    assert seen.get(timeout=SOON)["type"] == "http.request"
    leave(client)
    found = [seen.get(timeout=SOON) for _ in range(2)]
    assert found == [{"type": "http.disconnect"}] * 2
    logged(live)


def test_in_a_drain_who_streams_events_is_told_and_nobody_else(asgi):
    kinds = {"/events": b"text/event-stream; charset=utf-8", "/file": b"text/plain"}
    seen: Queue[tuple[str, Message]] = Queue()
    go: Queue[None] = Queue()

    async def app(scope, receive, send):
        await read(receive)
        fields = iter([(b"Content-Type", kinds[scope["path"]])])
        await send({**start(), "headers": fields})
        await send(body(b"first", more=True))
        told = asyncio.create_task(receive())
        while go.empty() and not told.done():
            await asyncio.sleep(0.01)
        if told.done():
            seen.put((scope["path"], told.result()))
        told.cancel()
        await send(body(b"last"))

    live = asgi(app)
    clients = {path: live.client() for path in kinds}
    for path, client in clients.items():
        client.send(get(path))
        client.until(b"first")
    live.server.shutdown()
    assert seen.get(timeout=SOON) == ("/events", {"type": "http.disconnect"})
    clients["/events"].until(b"last")
    go.put(None)
    clients["/file"].until(b"last")
    assert live.ended() is None and seen.empty()


def test_a_client_that_has_closed_its_side_is_answered_all_the_same(asgi):
    async def app(scope, receive, send):
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        await answer(send)

    client = asgi(app).client()
    client.send(GET)
    client.half_close()
    assert client.answer().body == b"hi"


def test_a_client_that_leaves_in_its_body_is_a_disconnect(asgi):
    seen: Queue[Any] = Queue()

    async def app(scope, receive, send):
        seen.put(await receive())
        seen.put(await receive())
        try:
            await send(start())
        except OSError as error:
            seen.put(error)

    client = asgi(app).client()
    client.send(STREAMED + chunk(b"hello"))
    assert seen.get(timeout=SOON)["body"] == b"hello"
    client.reset()
    assert seen.get(timeout=SOON) == {"type": "http.disconnect"}
    assert isinstance(seen.get(timeout=SOON), OSError)


BROKEN = {
    "malformed": (b"5\nhello\r\n", 400),
    "too-large": (chunk(b"hello, world"), 413),
    "stalled": (b"", 408),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_body_is_answered_for_the_app_which_sees_a_disconnect(asgi, name):
    rest, status = BROKEN[name]
    seen: Queue[Any] = Queue()

    async def app(scope, receive, send):
        seen.put(await receive())
        seen.put(await receive())

    patience = {"read_timeout": 0.1} if name == "stalled" else {}
    live = asgi(app, max_request_body_size=10, **patience)
    client = live.client()
    client.send(STREAMED + chunk(b"hello"))
    assert seen.get(timeout=SOON)["body"] == b"hello"
    client.send(rest)
    found = client.answer()
    assert (found.status, found.closes) == (status, True)
    assert seen.get(timeout=SOON) == {"type": "http.disconnect"}
    assert logged(live) == ""


def test_a_receive_that_is_cancelled_takes_nothing_away(asgi):
    seen: Queue[Any] = Queue()

    async def app(scope, receive, send):
        for _ in range(20):
            try:
                await asyncio.wait_for(receive(), 0.001)
            except asyncio.TimeoutError:
                continue
        seen.put(None)
        await echo(scope, receive, send)

    client = asgi(app).client()
    client.send(post(b"hello")[:-5])
    seen.get(timeout=SOON)
    client.send(b"hello")
    assert client.answer().body == b"hello"


def test_what_receive_and_send_return_may_become_tasks(asgi):
    async def app(scope, receive, send):
        message = await asyncio.create_task(receive())
        await asyncio.wait_for(send(start()), 1)
        await asyncio.gather(send(body(message["body"])))

    assert asgi(app).ask(post(b"abc")).body == b"abc"


# ---- send ----------------------------------------------------------------------------


def test_head_and_body_leave_in_one_segment_with_a_length(asgi):
    async def app(scope, receive, send):
        await send(start(200, (b"x-one", b"1")))
        await asyncio.sleep(0.01)
        await send(body(b"hi"))

    client = asgi(app).client()
    client.send(GET)
    data = client.receive()
    assert b"\r\nx-one: 1\r\n" in data and b"\r\nContent-Length: 2\r\n" in data
    assert data.endswith(b"\r\n\r\nhi")


def test_fields_that_the_message_does_not_name_have_their_defaults(asgi):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 201})
        await send({"type": "http.response.body"})

    found = asgi(app).ask()
    assert (found.status, found.body, found["content-length"]) == (201, b"", "0")


def test_headers_may_come_from_any_iterable_of_pairs(asgi):
    async def app(scope, receive, send):
        fields = ([name, bytearray(b"v")] for name in (b"x-a", b"x-b"))
        await send({**start(), "headers": fields})
        await send(body(memoryview(b"hi")))

    found = asgi(app).ask()
    assert (found["x-a"], found["x-b"], found.body) == ("v", "v", b"hi")


@pytest.mark.parametrize(
    "pair",
    [
        (b"x-mine", b"1"),
        (b"content-length", b"2"),
        (b"connection", b"keep-alive"),
        (b"date", b"x"),
        [b"x-mine", b"1"],
    ],
)
def test_headers_that_come_again_and_again_are_as_the_first_time(asgi, pair):
    """That is how a pair which an app has from a constant is known, and not checked."""

    async def app(scope, receive, send):
        await send({**start(), "headers": [pair]})
        await send(body(b"hi"))

    client = asgi(app).client()
    answers = [client.ask() for _ in range(40)]
    first = (answers[0].status, answers[0].undated, answers[0].body)
    assert [(a.status, a.undated, a.body) for a in answers] == [first] * 40


def test_a_body_is_streamed_in_chunks(asgi):
    async def app(scope, receive, send):
        await send(start())
        for part in (b"a", b"", b"bc"):
            await send(body(part, more=True))
        await send(body(b"d"))

    client = asgi(app).client()
    for _ in range(2):
        found = client.ask()
        assert (found["transfer-encoding"], found.body) == ("chunked", b"abcd")


def test_a_streamed_body_whose_length_the_app_tells_is_not_chunked(asgi):
    async def app(scope, receive, send):
        await send(start(200, (b"content-length", b"2")))
        await send(body(b"a", more=True))
        await send(body(b"b"))

    found = asgi(app).ask()
    assert (found["content-length"], found.body) == ("2", b"ab")


def test_a_part_leaves_when_it_is_sent(asgi):
    gate = Gate()

    async def app(scope, receive, send):
        await send(start())
        await send(body(b"first", more=True))
        await gate.wait()
        await send(body(b"second"))

    client = asgi(app).client()
    client.send(GET)
    assert client.until(b"first")
    gate.open()
    assert b"second" in client.until(b"0\r\n\r\n")


class Endless:
    """An app that sends without end, and tells how that ended."""

    def __init__(self, size: int) -> None:
        self.part = body(b"x" * size, more=True)
        self.sent = 0
        self.ended: Queue[BaseException] = Queue()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send(start())
            while True:
                self.sent += len(self.part["body"])
                await send(self.part)
        except BaseException as error:
            self.ended.put(error)
            raise


@pytest.mark.parametrize("size", [1000, 16384, 65536])
def test_send_waits_while_too_much_is_pending_and_for_no_client_for_ever(asgi, size):
    app = Endless(size)
    live = asgi(app, write_timeout=0.2)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    assert isinstance(app.ended.get(timeout=SOON), OSError)
    assert app.sent - live.stats()["bytes_out"] <= 2 * HIGH_WATER + size
    assert logged(live) == ""


def test_the_time_for_a_reader_begins_when_something_is_sent(asgi):
    held, sent = Held(), bytes(8 << 20)

    async def app(scope, receive, send):
        await asyncio.sleep(0)
        held.wait()
        await send(start())
        await send(body(sent))

    client = asgi(app, write_timeout=1).client(receive_buffer=65536)
    client.send(GET)
    assert all(client.is_quiet() for _ in range(4))  # longer than that
    held.let_go()
    assert client.answer().body == sent


def test_send_goes_on_when_the_client_reads(asgi):
    size = 1 << 16

    async def app(scope, receive, send):
        await send(start())
        for _ in range(100):
            await send(body(bytes(size), more=True))
        await send(body())

    client = asgi(app).client(receive_buffer=4096)
    assert client.ask().body == bytes(100 * size)


STREAM = """
import sys
from prefork import Server

PART = 65536

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    try:
        for number in range((1 << 30) // PART):
            part = number.to_bytes(4, "big") * (PART // 4)
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except OSError:
        print("left", number, flush=True)

Server(app, loop=sys.argv[1], lifespan="off").listen_and_serve(
    "127.0.0.1:0", on_ready=lambda server: print("ready", *server.address, flush=True)
)
"""


def peak(pid: int) -> int:
    """The most memory that a process has held so far, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def test_a_reader_of_1_kib_a_second_of_1_gib_costs_no_memory(loop):
    with Program(["-c", STREAM, loop]) as program:
        host, port = program.until("ready")
        with Client((host, int(port)), receive_buffer=4096) as client:
            client.send(GET)
            assert b"chunked" in client.until(b"\r\n\r\n")
            before = peak(program.pid)
            for _ in range(2):
                assert client.socket.recv(1024)
                assert select.select([], [], [client.socket], 1) == ([], [], [])
            assert peak(program.pid) - before < 1024
            client.reset()
        assert int(program.until("left")[0]) < 200  # the rest is the kernel's
        program.signal(signal.SIGTERM)
        assert program.wait() == 0, program.stderr


def test_send_raises_oserror_when_the_client_has_left(asgi):
    app = Endless(1000)

    async def gated(scope, receive, send):
        await receive()
        await receive()
        await app(scope, receive, send)

    live = asgi(gated)
    client = live.client()
    client.send(GET)
    client.reset()
    assert isinstance(app.ended.get(timeout=SOON), OSError)
    assert logged(live) == ""


@pytest.mark.parametrize("sizes", [[5], [2, 3], [0, 5]])
def test_head_is_answered_as_get_without_the_body(asgi, sizes):
    async def app(scope, receive, send):
        await send(start(200, (b"x", b"y")))
        for size in sizes[:-1]:
            await send(body(bytes(size), more=True))
        await send(body(bytes(sizes[-1])))

    client = asgi(app).client()
    found = [client.ask(get(method=method)) for method in ("GET", "HEAD", "GET")]
    assert [len(one.body) for one in found] == [5, 0, 5]
    assert found[0].undated == found[1].undated


def test_head_of_an_app_that_tells_the_length_and_sends_nothing(asgi):
    async def app(scope, receive, send):
        await send(start(200, (b"content-length", b"1000")))
        await send(body())

    client = asgi(app).client()
    found = [client.ask(get(method="HEAD")) for _ in range(2)]
    assert [one["content-length"] for one in found] == ["1000", "1000"]


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("data", [b"", b"body"])
def test_204_and_304_have_no_body(asgi, status, data):
    async def app(scope, receive, send):
        await answer(send, data, status)

    client = asgi(app).client()
    found = [client.ask() for _ in range(2)]
    assert [(one.status, one.body) for one in found] == [(status, b"")] * 2


@pytest.mark.parametrize(
    "field",
    [
        (b"transfer-encoding", b"chunked"),
        (b"connection", b"keep-alive"),
        (b"keep-alive", b"timeout=5"),
    ],
)
def test_what_is_the_servers_to_say_of_the_connection_is_left_out(asgi, field):
    async def app(scope, receive, send):
        await send(start(200, field))
        await send(body(b"hi"))

    client = asgi(app).client()
    found = [client.ask() for _ in range(2)]
    assert [(one.body, field[0].decode() in one) for one in found] == [
        (b"hi", False)
    ] * 2


def test_an_app_may_close_the_connection(asgi):
    async def app(scope, receive, send):
        await send(start(200, (b"connection", b"close")))
        await send(body(b"hi"))

    client = asgi(app).client()
    assert client.ask().closes and client.rest() == b""


def test_an_app_may_send_a_date_and_a_server_of_its_own(asgi):
    async def app(scope, receive, send):
        await send(start(200, (b"server", b"me"), (b"date", b"now")))
        await send(body(b"hi"))

    found = asgi(app).ask()
    assert (found["server"], found["date"]) == ("me", "now")


ORDERS = {
    "a body first": ([body()], "before http.response.start"),
    "two starts": ([start(), start()], "http.response.start was sent twice"),
    "an unknown type": ([{"type": "http.response.x"}], "'http.response.x' is no mess"),
    "trailers before the body": (
        [{**start(), "trailers": True}, {"type": "http.response.trailers"}],
        "must follow the last http.response.body",
    ),
    "a path first": (
        [{"type": "http.response.pathsend", "path": "/dev/null"}],
        "must follow http.response.start",
    ),
    "no status": ([{"type": "http.response.start"}], "KeyError: 'status'"),
    "a status of text": ([start("200")], "status must be an int, not '200'"),
    "a status of 99": ([start(99), body()], "99"),
    "names of text": ([start(200, ("x", "y")), body()], "bytes, not 'x'"),
    "a body of text": ([start(), {**body(), "body": "hi"}], "bytes, not 'hi'"),
    "a forged field": ([start(200, (b"x", b"y\r\nz: 1")), body()], "b'y\\r\\nz: 1'"),
    "a bad name": ([start(200, (b"x y", b"z")), body()], "b'x y'"),
    "two lengths": (
        [start(200, *[(b"content-length", b"%d" % n) for n in (1, 2)]), body()],
        "content-length",
    ),
    "a short body": ([start(200, (b"content-length", b"3")), body(b"hi")], "than its"),
    "a long body": ([start(200, (b"content-length", b"1")), body(b"hi")], "than its"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_what_an_app_must_not_send_is_an_error_that_says_so(asgi, name):
    messages, text = ORDERS[name]

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    live = asgi(app)
    client = live.client()
    assert client.ask().status == 500
    assert text in logged(live)


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2]], ids=["short", "long"])
def test_a_streamed_body_that_belies_its_length_ends_the_connection(asgi, sizes):
    async def app(scope, receive, send):
        await send(start(200, (b"content-length", b"3")))
        await send(body(bytes(sizes[0]), more=True))
        await send(body(bytes(sizes[1])))

    live = asgi(app)
    client = live.client()
    with pytest.raises(h11.RemoteProtocolError):
        client.ask()
    assert "ProtocolError" in logged(live)


def test_a_message_behind_the_last_is_an_error_and_the_connection_lives(asgi):
    async def app(scope, receive, send):
        await answer(send)
        await send(body(b"more"))

    live = asgi(app)
    client = live.client()
    assert [client.ask(get("/x")).body for _ in range(2)] == [b"hi"] * 2
    text = logged(live)
    assert text.count("GET /x failed") == 2
    assert "http.response.body was sent after the answer was complete" in text


def test_an_app_may_answer_differently_after_a_head_that_was_refused(asgi):
    async def app(scope, receive, send):
        await send(start(200, (b"x", b"\n")))
        try:
            await send(body(b"no"))
        except Exception:
            await answer(send, b"sorry", 503)

    found = asgi(app).ask()
    assert (found.status, found.body) == (503, b"sorry")


# ---- Extensions ----------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    return path


def test_a_path_is_sent_as_the_whole_body(asgi, file):
    async def app(scope, receive, send):
        await send(start(200, (b"x", b"y")))
        await send({"type": "http.response.pathsend", "path": str(file)})

    client = asgi(app).client()
    for _ in range(2):
        found = client.ask()
        assert (found["content-length"], found["x"]) == ("300000", "y")
        assert found.body == file.read_bytes()
    assert client.ask(get(method="HEAD"))["content-length"] == "300000"


def test_a_path_whose_length_the_app_gets_wrong_is_a_500(asgi, file):
    async def app(scope, receive, send):
        await send(start(200, (b"content-length", b"300001")))
        await send({"type": "http.response.pathsend", "path": str(file)})

    live = asgi(app)
    assert live.ask().status == 500
    assert "ProtocolError" in logged(live)


def test_a_path_that_is_not_there_is_the_apps_to_answer(asgi):
    async def app(scope, receive, send):
        await send(start())
        try:
            await send({"type": "http.response.pathsend", "path": "/no/such"})
        except FileNotFoundError:
            await send(body(b"gone"))

    assert asgi(app).ask().body == b"gone"


def test_a_file_is_sent_from_an_offset_and_may_be_closed_at_once(asgi, file):
    async def app(scope, receive, send):
        await send(start())
        with file.open("rb") as opened:
            message = {"file": opened, "offset": 10, "count": 1000}
            await send({"type": "http.response.zerocopysend", **message})

    found = asgi(app).ask()
    assert found.body == file.read_bytes()[10:1010]
    assert found["content-length"] == "1000"


def test_files_and_bodies_may_alternate_and_a_file_goes_on_where_it_was(asgi, file):
    async def app(scope, receive, send):
        await send(start())
        with file.open("rb") as opened:
            part = {"type": "http.response.zerocopysend", "file": opened}
            await send({**part, "count": 5, "more_body": True})
            await send(body(b"-", more=True))
            await send(part)

    data = file.read_bytes()
    assert asgi(app).ask().body == data[:5] + b"-" + data[5:]


@pytest.mark.parametrize("started", [False, True], ids=["before", "behind"])
def test_early_hints_arrive_while_the_app_still_works(asgi, started):
    gate = Gate()

    async def app(scope, receive, send):
        links = [b"</a.css>; rel=preload", b"</b.js>"]
        if started:
            await send(start())
        await send({"type": "http.response.early_hint", "links": links})
        await gate.wait()
        if not started:
            await send(start())
        await send(body(b"hi"))

    client = asgi(app).client()
    client.send(GET)
    head = client.until(b"\r\n\r\n")
    assert head == (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n"
        b"Link: </b.js>\r\n\r\n"
    )
    gate.open()
    assert client.answer().body == b"hi"


def test_early_hints_are_ignored_when_the_head_has_left(asgi):
    async def app(scope, receive, send):
        await send(start())
        await send(body(b"h", more=True))
        await send({"type": "http.response.early_hint", "links": [b"</a.js>"]})
        await send(body(b"i"))

    found = asgi(app).ask()
    assert (found.interim, found.body) == ([], b"hi")


# ---- Trailers ------------------------------------------------------------------------

TAKING = get("/", "TE: trailers")


def trailers(*headers: tuple[bytes, bytes], more: bool = False) -> Message:
    kind = "http.response.trailers"
    return {"type": kind, "headers": [*headers], "more_trailers": more}


class Trailing:
    """An app that answers in parts, with trailers and a Trailer field."""

    def __init__(
        self, *parts: bytes, length: int | None = None, field: bytes = b"x"
    ) -> None:
        self.parts = parts
        self.headers = [(b"trailer", b"x, y")]
        if length is not None:
            self.headers.append((b"content-length", b"%d" % length))
        self.field = field
        self.extensions: list[bool] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.extensions.append("http.response.trailers" in scope["extensions"])
        await send({**start(200, *self.headers), "trailers": True})
        *parts, last = self.parts
        for part in parts:
            await send(body(part, more=True))
        await send(body(last))
        await send(trailers((self.field, b"1"), more=True))
        await send(trailers((b"y", b"2")))


@pytest.mark.parametrize("parts", [[b"hello"], [b"hel", b"lo"], [b"hello", b""]])
@pytest.mark.parametrize("length", [None, 5])
def test_trailers_follow_the_body_of_who_takes_them(asgi, parts, length):
    app = Trailing(*parts, length=length)
    client = asgi(app).client()
    for _ in range(2):
        found = client.ask(TAKING)
        assert (found.body, found.trailers) == (b"hello", [("x", "1"), ("y", "2")])
        assert (found["transfer-encoding"], found["trailer"]) == ("chunked", "x, y")
        assert "content-length" not in found
    assert app.extensions == [True, True]


@pytest.mark.parametrize(
    "request_",
    [
        GET,
        get("/", "TE: deflate"),
        get("/", "TE: trailers", method="HEAD"),
        b"GET / HTTP/1.0\r\nTE: trailers\r\nConnection: keep-alive\r\n\r\n",
    ],
    ids=["not asked for", "another coding", "HEAD", "HTTP/1.0"],
)
def test_trailers_are_dropped_and_not_announced_to_others(asgi, request_):
    app = Trailing(b"hello")
    client = asgi(app).client()
    for _ in range(2):
        found = client.ask(request_)
        assert (found["content-length"], found.trailers) == ("5", [])
        assert "trailer" not in found
    assert app.extensions == [False, False]


@pytest.mark.parametrize("asked", ["TE: trailers", "TE: gzip;q=0.5, Trailers"])
def test_who_lists_trailers_takes_them(asgi, asked):
    assert asgi(Trailing(b"")).ask(get("/", asked)).trailers == [("x", "1"), ("y", "2")]


def test_a_file_may_have_trailers(asgi, file):
    async def app(scope, receive, send):
        await send({**start(), "trailers": True})
        await send({"type": "http.response.pathsend", "path": str(file)})
        await send(trailers((b"x", b"1")))

    found = asgi(app).ask(TAKING)
    assert (found.body, found.trailers) == (file.read_bytes(), [("x", "1")])


def test_the_body_leaves_before_its_trailers(asgi):
    gate = Gate()

    async def app(scope, receive, send):
        await send({**start(), "trailers": True})
        await send(body(b"hello"))
        await gate.wait()
        await send(trailers((b"x", b"1")))

    client = asgi(app).client()
    client.send(TAKING)
    assert client.until(b"5\r\nhello\r\n")
    gate.open()
    assert client.until(b"0\r\nx: 1\r\n\r\n")


FORBIDDEN = [b"content-length", b"Transfer-Encoding", b"host", b"set-cookie", b"x y"]


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "dropped"])
@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_trailer_that_must_be_none_is_an_error_that_names_it(asgi, name, taken):
    live = asgi(Trailing(b"hello", field=name))
    with live.client() as client:
        client.send(TAKING if taken else GET)
        client.rest()
    text = live.log.until("ProtocolError")
    assert f"{name!r}: b'1'" in text


def test_trailers_that_were_not_announced_are_an_error(asgi):
    async def app(scope, receive, send):
        await send(start())
        await send(body(b"hello", more=True))
        await send(trailers())

    live = asgi(app)
    with pytest.raises(h11.RemoteProtocolError):
        live.ask(TAKING)
    assert "must follow the last http.response.body" in logged(live)


@pytest.mark.parametrize("kind", ["body", "zerocopysend"])
def test_behind_the_body_come_trailers_alone(asgi, kind, file):
    errors = []

    async def app(scope, receive, send):
        await send({**start(), "trailers": True})
        await send(body(b"hello"))
        with file.open("rb") as opened:
            try:
                await send({"type": f"http.response.{kind}", "file": opened})
            except RuntimeError as error:
                errors.append(str(error))
        await send(trailers())

    assert asgi(app).ask(TAKING).body == b"hello"
    assert f"{kind} was sent after the last http.response.body" in errors[0]


def test_an_app_that_returns_without_its_trailers_leaves_the_answer_truncated(asgi):
    async def app(scope, receive, send):
        await send({**start(), "trailers": True})
        await send(body(b"hello"))

    live = asgi(app)
    with pytest.raises(h11.RemoteProtocolError):
        live.ask(TAKING)
    assert live.log.until("without the http.response.trailers it had announced")


# ---- What goes wrong -----------------------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "after an await", "after the start"])
def test_an_app_that_raises_is_a_500_and_its_traceback_is_in_the_log(asgi, when):
    async def app(scope, receive, send):
        if when == "after an await":
            await asyncio.sleep(0)
        if when == "after the start":
            await send(start(200, (b"content-length", b"5")))
        raise ValueError("broken")

    live = asgi(app)
    client = live.client()
    assert [client.ask(get("/x")).status for _ in range(2)] == [500, 500]
    text = logged(live)
    assert text.count("<Request GET /x> failed") == 2
    assert text.count("ValueError: broken") == 2


def test_an_app_that_raises_in_its_answer_leaves_it_truncated(asgi):
    async def app(scope, receive, send):
        await send(start())
        await send(body(b"part", more=True))
        raise ValueError("broken")

    live = asgi(app)
    client = live.client()
    with pytest.raises(h11.RemoteProtocolError):
        client.ask()
    assert live.log.until("ValueError: broken")


def test_an_app_that_raises_behind_its_answer_does_not_harm_the_connection(asgi):
    async def app(scope, receive, send):
        await answer(send)
        raise ValueError("broken")

    live = asgi(app)
    client = live.client()
    assert [client.ask(get("/x")).body for _ in range(2)] == [b"hi"] * 2
    assert logged(live).count("GET /x failed") == 2


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "the app returned without an answer"),
        ([start()], "the app returned after http.response.start, without a body"),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
def test_an_app_that_returns_without_an_answer_is_a_500(asgi, messages, text, waits):
    async def app(scope, receive, send):
        for message in messages:
            await send(message)
        if waits:
            await asyncio.sleep(0)

    live = asgi(app)
    assert live.ask().status == 500
    assert text in logged(live)


def test_an_app_that_returns_before_its_last_part_leaves_the_answer_truncated(asgi):
    async def app(scope, receive, send):
        await send(start())
        await send(body(b"part", more=True))

    live = asgi(app)
    client = live.client()
    with pytest.raises(h11.RemoteProtocolError):
        client.ask()
    assert live.log.until("the app returned before the last http.response.body")


def test_an_app_whose_task_is_cancelled_is_a_500(asgi):
    async def app(scope, receive, send):
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    live = asgi(app)
    assert live.ask().status == 500
    assert "the app's task was cancelled" in logged(live)


def test_what_an_app_makes_of_a_client_that_left_is_not_logged(asgi):
    seen: Queue[None] = Queue()

    class ClientDisconnect(Exception):
        pass

    async def app(scope, receive, send):
        await receive()
        await receive()
        try:
            await send(start())
            while True:
                await send(body(b"x", more=True))
                await asyncio.sleep(0)
        except OSError:
            seen.put(None)
            raise ClientDisconnect from None

    live = asgi(app)
    client = live.client()
    client.send(GET)
    client.reset()
    seen.get(timeout=SOON)
    assert logged(live) == ""


def test_a_departure_is_found_behind_what_was_made_of_it():
    gone = ClientDisconnected("gone")
    plain, caused = ValueError(), ValueError()
    caused.__cause__ = KeyError()
    caused.__cause__.__context__ = gone
    plain.__context__ = plain
    assert tells_departure(gone) and tells_departure(caused)
    assert not tells_departure(plain)


def test_a_client_that_leaves_does_not_cancel_the_app(asgi):
    gate = Gate()
    seen: Queue[str] = Queue()

    async def app(scope, receive, send):
        await receive()
        await receive()
        await gate.wait()
        seen.put("done")

    client = asgi(app).client()
    client.send(GET)
    client.reset()
    gate.await_waiter()
    gate.open()
    assert seen.get(timeout=SOON) == "done"


# ---- Tasks ---------------------------------------------------------------------------


def test_an_app_runs_in_a_task(asgi):
    async def app(scope, receive, send):
        assert asyncio.current_task() is not None
        await asyncio.wait_for(asyncio.sleep(0), SOON)
        await answer(send)

    assert asgi(app).ask().body == b"hi"


def test_context_variables_are_a_requests_own(asgi):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("v", default="unset")

    async def app(scope, receive, send):
        before = variable.get()
        variable.set(scope["path"])
        await send(start())
        if scope["path"][-1] in "13579":
            await asyncio.sleep(0)
        await send(body(f"{before} {variable.get()}".encode(), more=True))
        await send(body())

    def plain(scope, receive, send):
        variable.set("set")
        return app(scope, receive, send)

    client = asgi(app).client()
    client.send(b"".join(get(f"/{n}") for n in range(30)))
    found = [client.answer().body.decode() for _ in range(30)]
    assert found == [f"unset /{n}" for n in range(30)]
    client = asgi(plain, interface="asgi").client()
    assert client.ask().body == b"set /"
    assert variable.get() == "unset"


class Batch:
    """Requests that have all come when the loop turns."""

    def __init__(self, asgi: Callable[..., Live]) -> None:
        self.asgi = asgi
        self.held: Queue[None] = Queue()
        self.release: Queue[None] = Queue()

    def ask(self, app: Any, count: int = 6) -> list[bytes]:
        """The answers to /0, /1, ..."""
        self.app = app
        self.live = self.asgi(self)
        clients = [self.live.client() for _ in range(count)]
        for client in clients:
            client.ask(get("/connected"))
        holder = self.live.client()
        holder.send(get("/held"))
        self.held.get(timeout=SOON)
        for n, client in enumerate(clients):
            client.send(get(f"/{n}"))
        self.release.put(None)
        return [client.answer().body for client in clients]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/held":
            self.held.put(None)
            self.release.get(timeout=SOON)  # the loop stands still
        if scope["path"] in ("/held", "/connected"):
            await answer(send)
        else:
            await self.app(scope, receive, send)


@pytest.fixture
def batch(asgi: Callable[..., Live]) -> Batch:
    return Batch(asgi)


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("v", default="unset")
KEPT: list[Any] = []
CALLED: list[Any] = []
STATES: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def cancel(task: Any) -> None:
    task.cancel()
    task.uncancel()


TRACES = {  # what an app can do to its task without waiting
    "nothing": lambda task: None,
    "a callback": lambda task: task.add_done_callback(CALLED.append),
    "a name": lambda task: task.set_name("an app's"),
    "a name that was asked for": lambda task: task.get_name(),
    "a variable": lambda task: VARIABLE.set("set"),
    "a variable that is reset": lambda task: VARIABLE.reset(VARIABLE.set("set")),
    "a reference": KEPT.append,
    "a weak reference": lambda task: STATES.setdefault(task, "used"),
    "a reference to the coroutine": lambda task: KEPT.append(task.get_coro()),
}
if sys.version_info >= (3, 12):
    TRACES["a reference to the context"] = lambda task: KEPT.append(task.get_context())
    TRACES["a weak reference to the context"] = lambda task: KEPT.append(
        weakref.ref(task.get_context())
    )
if sys.version_info >= (3, 13):  # before, it could not be taken back
    TRACES["a cancellation"] = cancel


@pytest.mark.parametrize("trace", TRACES)
def test_no_app_sees_traces_of_another_in_its_task(batch, trace):
    KEPT.clear()
    CALLED.clear()
    numbers = []

    async def app(scope, receive, send):
        task = asyncio.current_task()
        assert task is not None and task in asyncio.all_tasks() and not task.done()
        assert task.cancelling() == 0 if sys.version_info >= (3, 11) else True
        assert VARIABLE.get() == "unset"
        assert task not in STATES
        known = [task, task.get_coro()]
        if sys.version_info >= (3, 12):
            known.append(task.get_context())
        for kept in KEPT:
            kept = kept() if isinstance(kept, weakref.ref) else kept
            assert all(kept is not one for one in known)
        TRACES[trace](task)
        if "name" in trace:
            numbers.append(task.get_name())
        await answer(send, b"untouched")

    assert batch.ask(app) == [b"untouched"] * 6
    batch.live.stop()
    if trace == "a callback":
        assert len(CALLED) == len({id(task) for task in CALLED}) == 6
        assert all(task.done() for task in CALLED)
    if trace == "a name that was asked for":
        assert len(set(numbers)) == 6
    for kept in KEPT:
        if isinstance(kept, asyncio.Task):
            assert kept.done() and kept.exception() is None


def test_apps_of_a_batch_end_each_in_its_own_way(batch):
    async def app(scope, receive, send):
        number = int(scope["path"][1:])
        if number == 1:
            raise ValueError
        if number == 2:
            await asyncio.sleep(0)
        if number == 3:
            asyncio.current_task().cancel()
        if number == 4:
            return
        await answer(send, scope["raw_path"])

    failed = b"Internal Server Error"
    found = batch.ask(app)
    assert [found[0], found[2], found[3], found[5]] == [b"/0", b"/2", b"/3", b"/5"]
    assert failed in found[1] and failed in found[4]
    log = logged(batch.live)
    assert log.count("GET /1> failed") == log.count("without an answer") == 1
    assert "the app's task was cancelled" in log


def test_a_task_tells_of_the_app_that_it_runs(batch):
    async def app(scope, receive, send):
        before = told(asyncio.current_task())
        await asyncio.sleep(0)
        assert told(asyncio.current_task()) == before
        await answer(send, before)

    def told(task: Any) -> bytes:
        coroutine = task.get_coro()
        state = inspect.getcoroutinestate(coroutine)
        frame = task.get_stack()[-1]
        assert coroutine.__name__ in repr(task)
        return f"{coroutine.__name__} {state} {frame.f_code.co_name}".encode()

    assert set(batch.ask(app)) == {b"__call__ CORO_RUNNING __call__"}


def test_what_apps_do_to_their_scopes_is_their_own(batch):
    kept: list[Any] = []

    async def app(scope, receive, send):
        parts = [scope, *(scope[name] for name in ("asgi", "extensions", "state"))]
        assert all("mark" not in part for part in parts)
        assert scope["headers"][-1] == (b"host", b"a")
        assert scope["asgi"]["version"] == "3.0" and len(scope["extensions"]) == 3
        number = int(scope["path"][1:])
        if number % 4 == 0:
            scope["asgi"]["mark"] = scope["extensions"]["mark"] = 1
            scope["state"]["mark"] = scope["mark"] = 1
            scope["headers"].append((b"mark", b"1"))
        elif number % 4 == 1:
            kept.append((scope["asgi"], scope["state"], scope["headers"]))
        elif number % 4 == 2:
            scope["asgi"]["version"] = "2.0"
            scope["extensions"].popitem()
            scope["headers"][-1] = (b"host", b"y")
        await answer(send, scope["raw_path"])

    found = batch.ask(app, count=12)
    assert found == [b"/%d" % n for n in range(12)]
    assert len({id(part) for parts in kept for part in parts}) == 9
    assert all(parts[1:] == ({}, [(b"host", b"a")]) for parts in kept)


def test_methods_that_an_app_has_kept_stay_its_own(batch):
    kept: list[Any] = []

    async def app(scope, receive, send):
        kept.append((receive, send, scope))
        await answer(send)

    batch.ask(app)
    assert len({id(one) for three in kept for one in three}) == 18
    assert all(asyncio.run(ended(receive)) for receive, _, _ in kept)


async def ended(receive: Any) -> bool:
    return (await receive())["type"] == "http.disconnect"


def test_apps_wait_side_by_side(asgi):
    gate = Gate()

    async def app(scope, receive, send):
        await gate.wait()
        await answer(send, scope["raw_path"])

    live = asgi(app)
    clients = [live.client() for _ in range(20)]
    for n, client in enumerate(clients):
        client.send(get(f"/{n}"))
    for _ in clients:
        gate.await_waiter()
    gate.open()
    assert [c.answer().body for c in clients] == [b"/%d" % n for n in range(20)]


def test_pipelined_requests_are_answered_in_order(asgi):
    async def app(scope, receive, send):
        data = await read(receive)
        if data[:1] in b"02468":
            await asyncio.sleep(0.001)
        await send(start())
        for part in (data, b"!"):
            await send(body(part, more=True))
        await send(body())

    client = asgi(app).client()
    client.send(b"".join(post(b"%d" % n) for n in range(50)))
    found = [client.answer().body for _ in range(50)]
    assert found == [b"%d!" % n for n in range(50)]


def test_what_an_app_does_behind_its_answer_holds_up_nobody(asgi):
    gate = Gate()

    async def app(scope, receive, send):
        await answer(send)
        if scope["path"] == "/slow":
            await gate.wait()

    client = asgi(app).client()
    assert client.ask(get("/slow")).body == b"hi"
    assert client.ask(get("/fast")).body == b"hi"
    gate.await_waiter()
    gate.open()


def test_a_stop_waits_for_what_apps_do_behind_their_answers(asgi):
    gate = Gate()
    ended: Queue[None] = Queue()

    async def app(scope, receive, send):
        await answer(send)
        await gate.wait()
        ended.put(None)

    live = asgi(app)
    live.ask()
    gate.await_waiter()
    live.server.shutdown()
    gate.open()
    live.thread.join(SOON)
    assert ended.qsize() == 1


def test_a_second_shutdown_cancels_what_still_runs(asgi):
    begun: Queue[None] = Queue()
    seen: Queue[Any] = Queue()

    async def app(scope, receive, send):
        try:
            begun.put(None)
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            seen.put(error)
            raise

    live = asgi(app)
    client = live.client()
    client.send(GET)
    begun.get(timeout=SOON)
    live.server.shutdown()
    live.server.shutdown()
    assert isinstance(seen.get(timeout=SOON), asyncio.CancelledError)
    assert live.log.until("1 requests still run and are cancelled")


# ---- Lifespan ------------------------------------------------------------------------


class Lived:
    """An app with a lifespan, which tells what it hears."""

    def __init__(self) -> None:
        self.told: Queue[Any] = Queue()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.told.put("http")
            await answer(send, repr(scope["state"]).encode())
            return
        self.told.put(scope["asgi"])
        scope["state"]["shared"] = ["x"]
        for step in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{step}"
            self.told.put(step)
            await send({"type": f"lifespan.{step}.complete"})

    def heard(self) -> list[Any]:
        return [self.told.get(timeout=SOON) for _ in range(self.told.qsize())]


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_an_app_starts_before_the_first_request_and_ends_behind_the_last(asgi, mode):
    app = Lived()
    live = asgi(app, lifespan=mode)
    live.ask()
    live.stop()
    versions = {"version": "3.0", "spec_version": "2.0"}
    assert app.heard() == [versions, "startup", "http", "shutdown"]


def test_requests_get_a_shallow_copy_of_the_state(asgi):
    seen: list[Any] = []

    class App(Lived):
        async def __call__(self, scope, receive, send):
            if scope["type"] == "http":
                scope["state"]["shared"].append("y")
                scope["state"]["own"] = 1
                seen.append(scope["state"])
            await super().__call__(scope, receive, send)

    client = asgi(App(), lifespan="auto").client()
    client.ask()
    assert client.ask().body == b"{'shared': ['x', 'y', 'y'], 'own': 1}"
    assert seen[0] is not seen[1]


def test_lifespan_off_asks_nobody(asgi):
    app = Lived()
    assert asgi(app, lifespan="off").ask().body == b"{}"
    assert app.heard() == ["http"]


async def raises(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await answer(send)


async def returns(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await answer(send)


async def takes_all_for_http(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await answer(send)


STRANGERS = [raises, returns, hello, takes_all_for_http]


@pytest.mark.parametrize("app", STRANGERS)
def test_an_app_that_does_not_know_lifespan_is_served_all_the_same(asgi, app):
    live = asgi(app, lifespan="auto")
    assert live.ask().body == b"hi"
    assert logged(live) == ""


@pytest.mark.parametrize("app", STRANGERS)
def test_lifespan_on_is_for_apps_that_know_it(asgi, app):
    with pytest.raises(AppStartupError):
        asgi(app, lifespan="on")


async def says_failed(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


async def fails(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise ValueError("no database")


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_startup_that_failed_ends_the_server_with_the_apps_words(asgi, mode):
    with pytest.raises(AppStartupError, match="the app's startup failed: no database"):
        asgi(says_failed, lifespan=mode)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_startup_that_raises_ends_the_server(asgi, mode):
    with pytest.raises(AppStartupError) as caught:
        asgi(fails, lifespan=mode)
    assert str(caught.value.__cause__) == "no database"


def test_a_shutdown_that_failed_is_logged(asgi):
    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "too late"})

    assert logged(asgi(app, lifespan="auto")) == (
        "the app's shutdown failed: too late\n"
    )


def test_a_shutdown_that_raises_is_logged(asgi):
    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        raise ValueError("broken")

    assert "ValueError: broken" in logged(asgi(app, lifespan="auto"))


def test_a_server_that_is_stopped_in_its_startup_never_accepts(loop):
    begun, over = threading.Event(), threading.Event()

    async def app(scope, receive, send):
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            over.set()

    server = Server(app, loop=loop)
    thread = threading.Thread(
        target=server.listen_and_serve,
        args=["127.0.0.1:0"],
        kwargs={"on_ready": lambda _: pytest.fail("it accepts")},
    )
    thread.start()
    assert begun.wait(SOON)
    server.shutdown()
    thread.join(SOON)
    assert not thread.is_alive() and over.is_set()


# ---- Workers -------------------------------------------------------------------------

APP = """
    import asyncio, os

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await lifespan(scope, receive, send)
        await receive()
        if scope["path"] == "/hang":
            say("hangs")
            await asyncio.sleep(60)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": str(os.getpid()).encode()})

    async def lifespan(scope, receive, send):
        await receive()
        say("startup", os.getpid())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        say("shutdown", os.getpid())
        await send({"type": "lifespan.shutdown.complete"})
"""
FAILS = """
    async def app(scope, receive, send):
        await receive()
        %s
"""
CLOSE = b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture
def run(tmp_path: Path, loop: str):
    """run(text, *flags): the command line serves an app of this text on a socket."""
    programs: list[Program] = []

    def start(text: str, *flags: str) -> tuple[Program, str]:
        lines = [line[4:] for line in text.splitlines()]
        (tmp_path / "main.py").write_text("\n".join(lines))
        address = f"unix:{tmp_path / 'sock'}"
        command = ["-m", "prefork", "main:app", "--bind", address, "--loop", loop]
        programs.append(Program([*command, *flags], cwd=tmp_path))
        return programs[-1], address

    yield start
    for program in programs:
        with program:
            if program.process.poll() is None:
                kill(program.pid)


def test_each_worker_starts_the_app_before_it_is_ready_and_ends_it(run):
    program, address = run(APP, "--workers", "2")
    started = {program.until("startup")[0] for _ in range(2)}
    assert ask(address, CLOSE % b"/").rpartition(b"\r\n")[2].decode() in started
    program.signal(15)
    assert program.wait() == 0
    assert {words[1] for words in program.events("shutdown")} == started


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            'await send({"type": "lifespan.startup.failed", "message": "no db"})',
            "the app's startup failed: no db",
        ),
        ('raise ValueError("no db")', "ValueError: no db"),
    ],
)
def test_a_startup_that_fails_is_a_boot_failure(run, line, text):
    program, _ = run(FAILS % line, "--workers", "1")
    assert program.wait() == 3
    assert text in program.stderr
    assert "prefork/asgi.py" not in program.stderr


def test_the_grace_period_has_time_for_the_apps_shutdown(run):
    program, address = run(APP, "--workers", "1", "--shutdown-grace-period", "4")
    program.until("startup")
    asker = threading.Thread(target=ask, args=[address, CLOSE % b"/hang"])
    asker.start()
    program.until("hangs")
    program.signal(15)
    program.until_logged("1 requests still run and are cancelled")
    program.until("shutdown")
    assert program.wait() == 0
    asker.join(SOON)


# ---- Options -------------------------------------------------------------------------


def test_an_app_runs_on_the_loop_that_was_asked_for(asgi, loop):
    async def app(scope, receive, send):
        module = type(asyncio.get_running_loop()).__module__
        await answer(send, module.partition(".")[0].encode())

    assert asgi(app).ask().body == loop.encode()


def test_an_async_handler_runs_on_the_loop_that_was_asked_for(serve, loop):
    async def handler(request):
        return type(asyncio.get_running_loop()).__module__.partition(".")[0]

    assert serve(handler, loop=loop).ask().body == loop.encode()


def test_a_loop_that_is_not_installed_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("prefork.eventloop.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install uvloop"):
        Server(hello, loop="uvloop")


def test_threads_are_not_for_asgi_apps():
    with pytest.raises(ConfigError, match="threads must be 1, not 2, for an ASGI app"):
        Server(hello, threads=2)


class Instance:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        pass


class Plain:
    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        return hello(scope, receive, send)


@pytest.mark.parametrize("app", [hello, Instance(), Plain(), Instance().__call__])
def test_an_asgi_app_is_known_by_its_parameters(app):
    assert interface_of(app) == "asgi"


def test_an_app_that_is_no_coroutine_function_is_served(asgi):
    assert asgi(Plain()).ask().body == b"hi"


class Double:
    def __init__(self, scope: Any) -> None:
        pass

    async def __call__(self, receive: Any, send: Any) -> None:
        pass


@pytest.mark.parametrize("app", [Double, lambda scope: hello])
def test_an_app_of_asgi_2_is_refused_with_the_remedy(app):
    with pytest.raises(ConfigError, match="guarantee_single_callable"):
        Server(app)
