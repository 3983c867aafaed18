"""WSGI apps over real sockets: every rule of PEP 3333, and what is decided beyond it.

wsgiref's validator stands around the apps: it checks our side of the bargain as well as
theirs. It hides that an answer is a list, so where that matters, and where an app is to
break a rule, it is left out.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.validate import validator

import h11
import pytest
from live import (
    GET,
    HIGH_WATER,
    SOON,
    Client,
    Endless,
    Held,
    Live,
    chunk,
    get,
    post,
)
from programs import ask
from runs import ready, stop

from prefork import ClientDisconnected, ConfigError, ProtocolError, Server

# The validator complains in __del__ about what nobody has closed.
pytestmark = pytest.mark.filterwarnings("error")

MODES = {"one thread": 1, "crew": 4, "lead lost": 4}
PLAIN = ("Content-Type", "text/plain")
EXPECT = "Expect: 100-continue"
CLOSING = get("/", "Connection: close")
ANNOUNCED = post(b"", EXPECT).replace(b"Length: 0", b"Length: 5")
CHUNKED = get("/", "Transfer-Encoding: chunked", method="POST")
ITERATED = [pytest.param(True, id="iterated"), pytest.param(False, id="plain")]

App = Callable[[dict[str, Any], Any], Any]
Wsgi = Callable[..., Live]


@pytest.fixture(params=MODES)
def wsgi(request, serve) -> Wsgi:
    """wsgi(app, **options): a Live that serves it; strict=False: without the validator.

    Where the lead is lost, the app's thread waits before it calls the app until another
    one runs the loop.
    """

    def start(app: App, *args: Any, strict: bool = True, **options: Any) -> Live:
        inner = validator(app) if strict else app

        def outer(environ: dict[str, Any], start_response: Any) -> Any:
            if request.param == "lead lost":
                live.run(threading.get_ident)
            return inner(environ, start_response)

        options = {"threads": MODES[request.param], **options}
        live = serve(outer, *args, interface="wsgi", **options)
        return live

    return start


def app_of(result: Any, status: Any = "200 OK", fields: Any = (PLAIN,)) -> App:
    """An app that answers every request with this."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response(status, list(fields) if fields == (PLAIN,) else fields)
        return result() if callable(result) else result

    return app


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [PLAIN])
    return [b"hi"]


def echo(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [PLAIN])
    return [environ["wsgi.input"].read(-1)]


class Parts:
    """What an app returns; counts how often it is closed."""

    def __init__(self, parts: Iterable[Any], closing: Callable[[], object] = int):
        self.parts = iter(parts)
        self.closing = closing
        self.closed = 0
        self.done = threading.Event()

    def __iter__(self) -> Parts:
        return self

    def __next__(self) -> Any:
        return next(self.parts)

    def close(self) -> None:
        self.closed += 1
        self.done.set()
        self.closing()


def closed_once(live: Live, parts: Parts) -> bool:
    """Whether close() was called, and was not called again until the end."""
    assert parts.done.wait(SOON)
    live.stop()
    return parts.closed == 1


def logged(live: Live) -> str:
    """What was logged at the end: every line that comes has come."""
    live.stop()
    return live.log.text


def refused(live: Live, reason: str, request: bytes = GET) -> bool:
    """Whether the app's answer becomes a 500 of which the log says why."""
    answer = live.ask(request)
    assert reason in live.log.until(reason)
    return (answer.status, answer.body) == (500, b"Internal Server Error\n")


# ---- environ: the request line and the ends ------------------------------------------


TIMES = 40  # more often than a pair comes until it is taken for a constant


def environs(
    serve: Any, request: bytes, *args: Any, strict: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """The environs of a request sent TIMES times: what is made of the first, and then
    is copied or lent again, must be as that. The validator sees half of them, as it
    changes them, so that they are not lent.
    """
    seen: list[dict[str, Any]] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(dict(environ))
        return hello(environ, start_response)

    def outer(environ: dict[str, Any], start_response: Any) -> Any:
        checked = strict and len(seen) < TIMES // 2
        return (validator(app) if checked else app)(environ, start_response)

    live = serve(outer, *args, interface="wsgi", **options)
    for _ in range(TIMES):
        live.ask(request)
    live.stop()
    return seen


HTTP_1_0 = b"GET / HTTP/1.0\r\n\r\n"
ENVIRON: dict[str, tuple[bytes, str, Any]] = {
    "method": (get(), "REQUEST_METHOD", "GET"),
    "method-post": (post(b"x"), "REQUEST_METHOD", "POST"),
    "method-head": (get(method="HEAD"), "REQUEST_METHOD", "HEAD"),
    "script-name": (get(), "SCRIPT_NAME", ""),
    "path": (get("/a/b"), "PATH_INFO", "/a/b"),
    "path-root": (get(), "PATH_INFO", "/"),
    "path-without-query": (get("/a?b"), "PATH_INFO", "/a"),
    "path-two-slashes": (get("//a//b"), "PATH_INFO", "//a//b"),
    "path-dots": (get("/a/../b/."), "PATH_INFO", "/a/../b/."),
    "path-slash-escaped": (get("/a%2Fb"), "PATH_INFO", "/a/b"),
    "path-percent-escaped": (get("/100%25"), "PATH_INFO", "/100%"),
    "path-escaped-once": (get("/%2541"), "PATH_INFO", "/%41"),
    "path-plus": (get("/a+b"), "PATH_INFO", "/a+b"),
    "path-utf-8": (get("/%C3%A9"), "PATH_INFO", "/é".encode().decode("latin-1")),
    "path-latin-1": (get("/%e9"), "PATH_INFO", "/é"),
    "path-every-byte": (
        get("/" + "".join(f"%{n:02x}" for n in range(256))),
        "PATH_INFO",
        "/" + bytes(range(256)).decode("latin-1"),
    ),
    "path-wrong-escape": (get("/%zz%4"), "PATH_INFO", "/%zz%4"),
    "path-absolute-form": (get("http://b/c?d"), "PATH_INFO", "/c"),
    "path-absolute-empty": (get("http://b"), "PATH_INFO", "/"),
    "path-absolute-only-query": (get("http://b?d"), "PATH_INFO", "/"),
    "query": (get("/?a=1&b=%20+%C3%A9"), "QUERY_STRING", "a=1&b=%20+%C3%A9"),
    "query-two-marks": (get("/?a?b"), "QUERY_STRING", "a?b"),
    "query-none": (get(), "QUERY_STRING", ""),
    "query-empty": (get("/?"), "QUERY_STRING", ""),
    "query-absolute-form": (get("http://b/c?d"), "QUERY_STRING", "d"),
    "raw-uri": (get("//a%2Fb?c=%20"), "RAW_URI", "//a%2Fb?c=%20"),
    "raw-uri-absolute": (get("http://b/c?d"), "RAW_URI", "http://b/c?d"),
    "request-uri": (get("/a%2Fb?c"), "REQUEST_URI", "/a%2Fb?c"),
    "protocol": (get(), "SERVER_PROTOCOL", "HTTP/1.1"),
    "protocol-1.0": (HTTP_1_0, "SERVER_PROTOCOL", "HTTP/1.0"),
    "protocol-1.2": (
        b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
        "SERVER_PROTOCOL",
        "HTTP/1.1",
    ),
    "host": (get(), "HTTP_HOST", "a"),
    "host-absolute-form": (get("http://b:80/"), "HTTP_HOST", "b:80"),
    "host-none": (HTTP_1_0, "HTTP_HOST", None),
    "field": (get("/", "X-Mine: 1"), "HTTP_X_MINE", "1"),
    "field-any-case": (get("/", "x-MiNe: 1"), "HTTP_X_MINE", "1"),
    "field-known": (get("/", "user-agent: me"), "HTTP_USER_AGENT", "me"),
    "field-empty": (get("/", "X-Mine:"), "HTTP_X_MINE", ""),
    "field-latin-1": (get("/", "X-Mine: \xe9"), "HTTP_X_MINE", "é"),
    "field-trimmed": (get("/", "X-Mine: \t a b \t"), "HTTP_X_MINE", "a b"),
    "field-long-name": (get("/", f"{'x' * 300}: 1"), f"HTTP_{'X' * 300}", "1"),
    "field-repeated": (
        get("/", "X-A: 1", "X-B: 2", "x-a: 3", "X-A: 4"),
        "HTTP_X_A",
        "1,3,4",
    ),
    "field-known-repeated": (get("/", "Accept: a", "ACCEPT: b"), "HTTP_ACCEPT", "a,b"),
    "field-cookies": (
        get("/", "Cookie: a=1", "COOKIE: b=2"),
        "HTTP_COOKIE",
        "a=1; b=2",
    ),
    "field-proxy": (get("/", "Proxy-Foo: 1"), "HTTP_PROXY_FOO", "1"),
    "content-type": (post(b"x", "Content-Type: a/b"), "CONTENT_TYPE", "a/b"),
    "content-type-none": (get(), "CONTENT_TYPE", None),
    "content-type-once": (post(b"x", "Content-Type: a"), "HTTP_CONTENT_TYPE", None),
    "content-length": (post(b"hello"), "CONTENT_LENGTH", "5"),
    "content-length-0": (post(b""), "CONTENT_LENGTH", "0"),
    "content-length-none": (get(), "CONTENT_LENGTH", None),
    "content-length-once": (post(b"hello"), "HTTP_CONTENT_LENGTH", None),
    "content-length-chunked": (
        CHUNKED + chunk(b"hello, ") + chunk(b"world") + chunk(b""),
        "CONTENT_LENGTH",
        "12",
    ),
    "content-length-chunked-empty": (CHUNKED + chunk(b""), "CONTENT_LENGTH", "0"),
    "transfer-encoding": (CHUNKED + chunk(b""), "HTTP_TRANSFER_ENCODING", None),
    "version": (get(), "wsgi.version", (1, 0)),
    "scheme": (get(), "wsgi.url_scheme", "http"),
    "run-once": (get(), "wsgi.run_once", False),
    "multiprocess": (get(), "wsgi.multiprocess", False),
    "input-terminated": (get(), "wsgi.input_terminated", True),
    "software": (get(), "SERVER_SOFTWARE", "prefork"),
    "address": (get(), "REMOTE_ADDR", "127.0.0.1"),
    "server-name": (get(), "SERVER_NAME", "127.0.0.1"),
}


@pytest.mark.parametrize("name", ENVIRON)
def test_environ_tells(serve, name):
    request, key, expected = ENVIRON[name]
    seen = environs(serve, request)
    assert [environ.get(key) for environ in seen] == [expected] * TIMES


def test_environ_tells_of_the_server_as_a_whole(serve):
    seen = environs(serve, b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", strict=False)
    told = [(e["PATH_INFO"], e["RAW_URI"], e["REQUEST_URI"]) for e in seen]
    assert told == [("*", "*", "*")] * TIMES


def test_environ_has_a_method_as_it_was_sent(serve):
    (environ, *_) = environs(serve, get(method="pUrge"), strict=False)
    assert environ["REQUEST_METHOD"] == "pUrge"


def test_environ_is_a_dict_that_the_app_may_change(serve):
    seen = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append((type(environ), environ.get("mine"), environ["HTTP_HOST"]))
        environ["mine"] = 1
        environ["HTTP_HOST"] = "changed"
        return hello(environ, start_response)

    live = serve(app, interface="wsgi")
    for _ in range(TIMES):
        live.ask()
    assert seen == [(dict, None, "a")] * TIMES


# An environ and a start_response are lent to one request after the other, as long as no
# app can tell: what follows are the ways to tell.


def test_an_environ_that_is_kept_stays_as_it_was(wsgi):
    kept = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["QUERY_STRING"] == "keep":
            kept.append(environ)
        return hello(environ, start_response)

    live = wsgi(app, strict=False)
    for target in ["/", "/", "/", "/a?keep", "/b?keep", "/", "/", "/c?keep"]:
        live.ask(get(target))
    live.stop()
    told = [(e["PATH_INFO"], e["RAW_URI"]) for e in kept]
    assert told == [(f"/{name}", f"/{name}?keep") for name in "abc"]
    assert len({id(environ) for environ in kept}) == 3


@pytest.mark.parametrize("change", ["add", "replace", "delete", "clear"])
def test_what_an_app_changes_in_its_environ_no_other_one_sees(wsgi, change):
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "add": lambda environ: environ.setdefault("mine", 1),
        "replace": lambda environ: environ.update(HTTP_HOST="mine", REMOTE_ADDR="x"),
        "delete": lambda environ: environ.pop("wsgi.input"),
        "clear": lambda environ: environ.clear(),
    }
    seen = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append({**environ, "wsgi.early_hints": None, "REMOTE_PORT": None})
        if environ["QUERY_STRING"]:
            changes[change](environ)
        return hello(environ, start_response)

    live = wsgi(app, strict=False)
    for target in ["/", "/", "/", "/?", "/?change", "/", "/?change", "/", "/"]:
        live.ask(get(target))
    live.stop()
    plain = [environ for environ in seen if environ["RAW_URI"] == "/"]
    assert plain == [plain[0]] * 6


def test_what_is_asked_for_in_turns_has_its_own_environ(wsgi):
    targets = ["/", "/a", "/a?b", "/?b", "/%61?", "//", "/%C3%A9"]
    asked = [
        *map(get, targets),
        *(get(target, "X-Mine: 1") for target in targets),
        get("/a", method="HEAD"),
        get("/a", method="PUT"),
        get("http://b/a"),
        get("/a").replace(b"/1.1", b"/1.2"),
        post(b"hello"),
        CHUNKED + chunk(b"world") + chunk(b""),
    ]
    seen = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        told = {key: text for key, text in environ.items() if type(text) is str}
        seen.append((told.pop("REMOTE_PORT"), told, environ["wsgi.input"].read()))
        return hello(environ, start_response)

    live = wsgi(app, strict=False)
    clients = [live.client() for _ in range(3)]
    ports = [str(client.socket.getsockname()[1]) for client in clients]
    for step in range(1, 6):  # each time in another order, with other clients
        for k in range(0, len(asked) * step, step):
            clients[k % 3].ask(asked[k % len(asked)])
    live.stop()
    first: dict[int, Any] = {}
    at = iter(seen)
    for step in range(1, 6):
        for k in range(0, len(asked) * step, step):
            port, *told = next(at)
            assert port == ports[k % 3]
            assert told == first.setdefault(k % len(asked), told)
    different = len({repr(told) for told in first.values()})
    assert different == len(asked) - 1  # HTTP/1.2 is served as 1.1


def test_a_start_response_that_is_kept_answers_no_other_request(wsgi):
    kept = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["QUERY_STRING"]:
            kept.append(start_response)
        elif kept:
            with pytest.raises(AssertionError, match="called twice"):
                kept[-1]("500 Wrong", [])
        return hello(environ, start_response)

    live = wsgi(app, strict=False)
    targets = ["/", "/", "/", "/?keep", "/", "/?keep", "/", "/"]
    answers = [live.ask(get(target)) for target in targets]
    live.stop()
    assert [(a.status, a.body) for a in answers] == [(200, b"hi")] * len(targets)


@pytest.mark.parametrize("called", [True, False])
def test_a_start_response_that_is_called_behind_its_request_harms_nobody(wsgi, called):
    kept: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["QUERY_STRING"] == "keep":
            kept.append(start_response)
            return hello(environ, start_response) if called else []
        try:
            raise LookupError
        except LookupError:
            kept[0]("500 Wrong", [PLAIN], sys.exc_info())
        return hello(environ, start_response)

    live = wsgi(app, strict=False)
    client = live.client()
    answers = [client.ask(get(target)) for target in ("/?keep", "/", "/")]
    assert [a.status for a in answers] == [200 if called else 500, 200, 200]
    assert called or live.log.until("start_response")


@pytest.mark.parametrize("way", ["iterated", "raised", "not started"])
def test_an_environ_serves_again_behind_an_answer_of_another_kind(wsgi, way):
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        assert environ["QUERY_STRING"] in ("", "odd")
        if not environ["QUERY_STRING"]:
            return hello(environ, start_response)
        if way == "raised":
            raise ValueError(environ)
        if way == "iterated":
            start_response("203 Odd", [("X-Odd", "1")])
            return (environ["QUERY_STRING"].encode() for _ in range(2))
        return [b"not started"]

    live = wsgi(app, strict=False)
    odd = {"iterated": (203, b"oddodd")}.get(way, (500, b"Internal Server Error\n"))
    for target in ["/", "/", "/", "/?odd", "/", "/", "/?odd", "/?odd", "/"]:
        answer = live.ask(get(target))
        assert (answer.status, answer.body) == (odd if "?" in target else (200, b"hi"))
        assert ("x-odd" in dict(answer.headers)) == (answer.status == 203)
    assert way == "iterated" or logged(live)


def test_handlers_that_overlap_have_environs_of_their_own(serve):
    arrived, seen = threading.Barrier(3), []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["QUERY_STRING"]:
            arrived.wait(SOON)
        seen.append((id(environ), environ["PATH_INFO"]))
        if environ["QUERY_STRING"]:
            arrived.wait(SOON)
        return hello(environ, start_response)

    live = serve(app, interface="wsgi", threads=3)
    for _ in range(TIMES):
        live.ask()
    clients = [live.client() for _ in range(3)]
    for name, client in zip("abc", clients, strict=True):
        client.send(get(f"/{name}?wait"))
    for client in clients:
        assert client.answer().body == b"hi"
    live.stop()
    overlapping = seen[TIMES:]
    assert sorted(path for _, path in overlapping) == ["/a", "/b", "/c"]
    assert len({number for number, _ in overlapping}) == 3


def test_early_hints_belong_to_the_request_that_gives_them(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["wsgi.early_hints"]([("Link", environ["PATH_INFO"])])
        return hello(environ, start_response)

    live = wsgi(app, strict=False)
    for name in "aaabab":
        assert live.ask(get(f"/{name}")).interim == [(103, [("link", f"/{name}")])]
    live.stop()


def test_environ_of_an_absolute_target_is_not_taken_for_that_of_another(serve):
    live = serve(
        lambda environ, start: [environ["HTTP_HOST"].encode(), start("200 OK", [])][:1],
        interface="wsgi",
    )
    targets = ["http://b/", "http://b/", "/", "/", "/", "http://b/", "http://c/", "/"]
    hosts = [live.ask(get(target)).body for target in targets]
    assert hosts == [b"b", b"b", b"a", b"a", b"a", b"b", b"c", b"a"]


def test_environ_of_different_clients_has_their_own_ports(serve):
    seen = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append((environ["REMOTE_ADDR"], int(environ["REMOTE_PORT"])))
        return hello(environ, start_response)

    live = serve(app, interface="wsgi")
    clients = [live.client() for _ in range(3)]
    for client in [*clients, *clients]:
        client.ask()
    assert seen == [client.socket.getsockname() for client in clients] * 2


def test_server_port_is_the_one_that_the_client_connected_to(serve):
    seen = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append((environ["SERVER_NAME"], int(environ["SERVER_PORT"])))
        return hello(environ, start_response)

    live = serve(app, ["127.0.0.1:0", "127.0.0.2:0"], interface="wsgi")
    addresses = live.run(lambda: [s.getsockname() for s in sockets_of(live.server)])
    for address in [*addresses, *addresses]:
        with Client(address) as client:
            client.ask()
    assert seen == addresses * 2


def sockets_of(server: Server) -> list[Any]:
    return [listener.socket_of(0) for listener in server._own]


@pytest.mark.parametrize(
    ("request_", "name", "port"),
    [
        pytest.param(get(), "a", "80", id="no-port"),
        pytest.param(get("http://b:81/"), "b", "81", id="port"),
        pytest.param(get("http://[::1]:82/"), "[::1]", "82", id="ipv6"),
        pytest.param(get("http://[::1]/"), "[::1]", "80", id="ipv6-no-port"),
        pytest.param(HTTP_1_0, "localhost", "80", id="no-host"),
    ],
)
def test_on_a_unix_socket_the_server_is_named_by_the_host_field(
    serve, tmp_path, request_, name, port
):
    """PEP 3333: SERVER_NAME and SERVER_PORT can never be empty strings."""
    seen = environs(serve, request_, f"unix:{tmp_path}/s")
    assert [(e["SERVER_NAME"], e["SERVER_PORT"]) for e in seen] == [
        (name, port)
    ] * TIMES


def test_on_a_unix_socket_the_client_has_no_address(serve, tmp_path):
    seen = environs(serve, get(), f"unix:{tmp_path}/s")
    assert [(e["REMOTE_ADDR"], e["REMOTE_PORT"]) for e in seen] == [("", "")] * TIMES


def test_unix_and_tcp_clients_of_one_server_are_told_apart(serve, tmp_path):
    seen = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        keys = ("REMOTE_ADDR", "REMOTE_PORT", "SERVER_NAME", "SERVER_PORT")
        seen.append(tuple(environ[key] for key in keys))
        return hello(environ, start_response)

    live = serve(app, [f"unix:{tmp_path}/s", "127.0.0.1:0"], interface="wsgi")
    unix, tcp = live.run(lambda: [s.getsockname() for s in sockets_of(live.server)])
    expected = []
    for address in (unix, tcp, unix, tcp):
        with Client(address) as client:
            client.ask()
            if address == unix:
                expected.append(("", "", "a", "80"))
            else:
                host, port = client.socket.getsockname()
                expected.append((host, str(port), tcp[0], str(tcp[1])))
    assert seen == expected


@pytest.mark.parametrize(
    ("target", "script", "path"),
    [
        ("/shop", "/shop", ""),
        ("/shop/", "/shop", "/"),
        ("/shop/cart", "/shop", "/cart"),
        ("/shop/%C3%A9", "/shop", "/\xc3\xa9"),
        ("/shop//cart", "/shop", "//cart"),
        ("/%73hop/cart", "/shop", "/cart"),
        ("/shopping", "/shop", "/shopping"),
        ("/cart", "/shop", "/cart"),
        ("/", "/shop", "/"),
    ],
)
def test_root_path_is_script_name_and_not_in_path_info(serve, target, script, path):
    seen = environs(serve, get(target), root_path="/shop")
    told = [(environ["SCRIPT_NAME"], environ["PATH_INFO"]) for environ in seen]
    assert told == [(script, path)] * TIMES


@pytest.mark.parametrize("path", ["shop", "/shop/", "/"])
def test_a_root_path_that_is_none_is_refused(path):
    with pytest.raises(ConfigError, match="root_path"):
        Server(hello, root_path=path)


@pytest.mark.parametrize(("threads", "multithread"), [(1, False), (2, True), (4, True)])
def test_multithread_is_true_where_threads_are_more_than_one(
    serve, threads, multithread
):
    (environ, *_) = environs(serve, get(), threads=threads)
    assert environ["wsgi.multithread"] is multithread


def test_multiprocess_is_true_in_workers(start):
    program = start("""
        from prefork import Server

        def app(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [repr(environ["wsgi.multiprocess"]).encode()]

        run(server=Server(app), workers=2)
    """)
    address, _ = ready(program)
    assert ask(address, CLOSING).endswith(b"\r\n\r\nTrue")
    stop(program)


# ---- environ: names with underscores -------------------------------------------------

LONG = "x_" * 200
FORGED_NAMES = get(
    "/",
    "X_Mine: forged",
    "X-Mine: true",
    "Content_Type: x",
    "X__: y",
    f"{LONG}: z",
)


def test_a_name_with_an_underscore_is_dropped(serve):
    for environ in environs(serve, FORGED_NAMES):
        found = {k: v for k, v in environ.items() if k.startswith("HTTP_")}
        assert found == {"HTTP_HOST": "a", "HTTP_X_MINE": "true"}


@pytest.mark.parametrize("name", ["X_Mine", "Transfer_Encoding", LONG])
def test_a_name_with_an_underscore_can_be_refused(wsgi, name):
    live = wsgi(hello, header_map="refuse")
    client = live.client()
    answer = client.ask(get("/", f"{name}: 1"))
    assert (answer.status, answer.closes) == (400, True)
    assert client.rest() == b"" and logged(live) == ""


def test_a_name_with_an_underscore_can_be_allowed(serve):
    request = get("/", "X_Mine: 1", "X-Mine: 2", "Content_Type: x", f"{LONG}: z")
    for environ in environs(serve, request, header_map="allow", strict=False):
        assert environ["HTTP_X_MINE"] == "1,2"
        assert environ[f"HTTP_{LONG.upper()}"] == "z"
        assert "CONTENT_TYPE" not in environ


def test_an_allowed_name_does_not_displace_a_known_field(serve):
    request = get("/", "User_Agent: 1", "User-Agent: 2", "User_Agent: 3")
    for environ in environs(serve, request, header_map="allow"):
        assert environ["HTTP_USER_AGENT"] == "1,2,3"


# ---- wsgi.input ----------------------------------------------------------------------

LINES = b"one\ntwo\r\n\nfour"
READS: dict[str, tuple[bytes, Callable[[Any], Any], Any]] = {
    "read-all": (LINES, lambda f: f.read(), LINES),
    "read-minus-one": (LINES, lambda f: f.read(-1), LINES),
    "read-none": (LINES, lambda f: f.read(None), LINES),
    "read-some": (LINES, lambda f: [f.read(3), f.read(4)], [b"one", b"\ntwo"]),
    "read-0": (LINES, lambda f: [f.read(0), f.read(3)], [b"", b"one"]),
    "read-past-the-end": (LINES, lambda f: [f.read(99), f.read(99)], [LINES, b""]),
    "read-at-the-end": (LINES, lambda f: [f.read(), f.read()], [LINES, b""]),
    "readline": (
        LINES,
        lambda f: [f.readline() for _ in range(6)],
        [b"one\n", b"two\r\n", b"\n", b"four", b"", b""],
    ),
    "readline-size": (
        LINES,
        lambda f: [f.readline(2), f.readline(9), f.readline(0), f.readline(-1)],
        [b"on", b"e\n", b"", b"two\r\n"],
    ),
    "readlines": (
        LINES,
        lambda f: [f.readlines(), f.readlines()],
        [[b"one\n", b"two\r\n", b"\n", b"four"], []],
    ),
    "readlines-hint": (LINES, lambda f: f.readlines(5), [b"one\n", b"two\r\n"]),
    "iterate": (LINES, list, [b"one\n", b"two\r\n", b"\n", b"four"]),
    "mixed": (
        LINES,
        lambda f: [f.read(1), f.readline(), next(iter(f)), f.readlines()],
        [b"o", b"ne\n", b"two\r\n", [b"\n", b"four"]],
    ),
    "empty-read": (b"", lambda f: [f.read(), f.read(5), f.read(0)], [b""] * 3),
    "empty-readline": (b"", lambda f: [f.readline(), f.readline(5)], [b""] * 2),
    "empty-readlines": (b"", lambda f: [f.readlines(), list(f)], [[], []]),
}


@pytest.mark.parametrize("framing", ["length", "chunked", "100", "spilled"])
@pytest.mark.parametrize("name", READS)
def test_input_can_be_read(wsgi, name, framing):
    body, look, expected = READS[name]
    seen = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(look(environ["wsgi.input"]))
        return hello(environ, start_response)

    options = {"body_buffer_size": 1} if framing == "spilled" else {}
    live = wsgi(app, strict=False, **options)
    if framing in ("length", "spilled"):
        live.ask(post(body))
    elif framing == "chunked":
        parts = [body[n : n + 4] for n in range(0, len(body), 4)]
        live.ask(CHUNKED + b"".join(map(chunk, [*parts, b""])))
    else:
        live.ask(
            CHUNKED.replace(b"\r\n\r\n", f"\r\n{EXPECT}\r\n\r\n".encode())
            + (chunk(body) if body else b"")
            + chunk(b"")
        )
    assert seen == [expected]


def test_input_without_a_body_is_empty(wsgi):
    assert wsgi(echo).ask(get()).body == b""


def test_input_ends_where_the_body_does(wsgi):
    client = wsgi(echo).client()
    client.send(post(b"one") + post(b"two") + get())
    assert [client.answer().body for _ in range(3)] == [b"one", b"two", b""]


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_large_body_arrives_whole(wsgi, framing):
    body = os.urandom(4 << 20)
    if framing == "length":
        message = post(body)
    else:
        parts = [body[n : n + 50000] for n in range(0, len(body), 50000)]
        message = CHUNKED + b"".join(map(chunk, [*parts, b""]))
    client = wsgi(echo).client()
    sender = threading.Thread(target=client.send, args=[message])
    sender.start()
    assert client.answer().body == body
    sender.join()


def test_a_body_that_nobody_reads_does_not_spoil_the_next_request(wsgi):
    client = wsgi(hello).client()
    client.send(post(b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n") + get("/next"))
    assert [client.answer().status for _ in range(2)] == [200, 200]
    assert client.is_quiet()


def test_input_may_be_read_while_the_answer_is_iterated(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [PLAIN])
        yield b"got "
        yield environ["wsgi.input"].read(-1)

    assert wsgi(app).ask(post(b"hello")).body == b"got hello"


def test_input_can_be_read_after_the_answer(wsgi):
    kept: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        kept.append(environ["wsgi.input"])
        return hello(environ, start_response)

    live = wsgi(app)
    live.ask(post(b"hello"))
    live.stop()
    assert kept[0].read(5) == b"hello"


# ---- wsgi.errors ---------------------------------------------------------------------


def test_errors_are_written_to_standard_error(wsgi, capfd):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["wsgi.errors"].write("one é\n")
        environ["wsgi.errors"].writelines(["two\n", "three\n"])
        environ["wsgi.errors"].flush()
        return hello(environ, start_response)

    wsgi(app).ask()
    assert capfd.readouterr().err == "one é\ntwo\nthree\n"


# ---- Expect: 100-continue ------------------------------------------------------------


def test_100_is_sent_when_the_app_reads(wsgi):
    answer = wsgi(echo).client().ask(ANNOUNCED, on_100=b"hello")
    assert (answer.interim, answer.body) == ([(100, [])], b"hello")


def test_100_is_not_sent_before_the_app_reads(wsgi):
    held = Held()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        held.wait()
        return echo(environ, start_response)

    client = wsgi(app).client()
    client.send(ANNOUNCED)
    assert held.begun.wait(SOON) and client.is_quiet()
    held.let_go()
    assert client.answer(on_100=b"hello").body == b"hello"


def test_an_answer_without_reading_comes_without_100_and_closes(wsgi):
    client = wsgi(app_of([b"no"], "403 Forbidden")).client()
    answer = client.ask(ANNOUNCED)
    assert (answer.status, answer.interim, answer.closes) == (403, [], True)
    assert client.rest() == b""


def test_a_body_sent_without_waiting_for_100_is_read(wsgi):
    client = wsgi(echo).client()
    client.send(ANNOUNCED + b"hello" + GET)
    assert [client.answer().body for _ in range(2)] == [b"hello", b""]


def test_an_app_may_read_for_the_first_time_amid_its_answer(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        yield b""
        start_response("200 OK", [PLAIN])
        yield environ["wsgi.input"].read(5)

    answer = wsgi(app, strict=False).client().ask(ANNOUNCED, on_100=b"hello")
    assert (answer.interim, answer.body) == ([(100, [])], b"hello")


def test_http_1_0_is_never_told_to_continue(wsgi):
    client = wsgi(echo).client()
    client.send(ANNOUNCED.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert client.is_quiet()
    client.send(b"hello")
    assert client.rest().endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("leave", ["reset", "half_close"])
def test_an_app_that_waits_for_a_body_hears_that_it_will_not_come(wsgi, leave):
    raised: list[str] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            return echo(environ, start_response)
        except Exception as error:
            raised.append(type(error).__name__)
            raise

    live = wsgi(app)
    client = live.client()
    client.send(ANNOUNCED)
    client.until(b"100 Continue\r\n\r\n")
    client.send(b"he")
    getattr(client, leave)()
    if leave == "half_close":
        assert client.answer().status == 400
    assert logged(live) == ""
    expected = {"reset": "ClientDisconnected", "half_close": "RequestError"}
    assert raised == [expected[leave]]


def test_a_body_that_stalls_behind_the_100_is_a_408(wsgi):
    live = wsgi(echo, read_timeout=0.1)
    client = live.client()
    client.send(ANNOUNCED)
    answer = client.answer()
    assert (answer.status, answer.interim, answer.closes) == (408, [(100, [])], True)
    assert logged(live) == ""


def test_a_body_too_large_behind_the_100_is_a_413(wsgi):
    live = wsgi(echo, max_request_body_size=10)
    client = live.client()
    client.send(CHUNKED.replace(b"\r\n\r\n", f"\r\n{EXPECT}\r\n\r\n".encode()))
    client.until(b"100 Continue\r\n\r\n")
    client.send(chunk(b"hello, world") + chunk(b""))
    answer = client.answer()
    assert (answer.status, answer.closes) == (413, True)
    assert logged(live) == ""


def test_an_app_that_does_not_care_does_not_hide_what_the_client_did_wrong(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            environ["wsgi.input"].read(5)
        except Exception:
            pass
        return hello(environ, start_response)

    live = wsgi(app, read_timeout=0.1)
    client = live.client()
    client.send(ANNOUNCED)
    answer = client.answer()
    assert (answer.status, answer.closes) == (408, True)


# ---- start_response ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        ("200 OK", 200, b"OK"),
        ("200 Fine, thanks!", 200, b"Fine, thanks!"),
        ("404 not found", 404, b"not found"),
        ("404 N\xf6", 404, b"N\xf6"),
        ("404 ", 404, b""),
        ("404  two  spaces ", 404, b" two  spaces "),
        ("404 tab\t", 404, b"tab\t"),
        ("299 " + "x" * 1000, 299, b"x" * 1000),
        ("999 Odd", 999, b"Odd"),
    ],
)
@pytest.mark.parametrize("strict", ITERATED)
def test_a_status_is_sent_byte_by_byte(wsgi, status, code, reason, strict):
    client = wsgi(app_of([b"hi"], status), strict=strict).client()
    client.send(GET)
    assert client.until(b"\r\n") == b"HTTP/1.1 %d %b\r\n" % (code, reason)


@pytest.mark.parametrize(
    "status",
    [
        "",
        "200",
        "200OK",
        "2000 OK",
        "20 OK",
        "abc OK",
        "-20 OK",
        " 200 OK",
        "+20 OK",
        "\uff12\uff10\uff10 OK",
        "200\tOK",
    ],
)
@pytest.mark.parametrize("result", [[b"hi"], [b"h", b"i"]], ids=["whole", "parts"])
def test_a_status_that_is_none_is_a_500(wsgi, status, result):
    live = wsgi(app_of(result, status), strict=False)
    assert refused(live, f"status must be like '200 OK', not {status!r}")


@pytest.mark.parametrize("status", ["000 X", "099 X", "100 Continue", "101 X", "199 X"])
def test_a_status_that_is_not_final_is_a_500(wsgi, status):
    live = wsgi(app_of([b"hi"], status), strict=False)
    assert refused(live, "status is not between")


FORGED = ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b", "a\x7fb", "\r\n"]


@pytest.mark.parametrize("text", FORGED)
@pytest.mark.parametrize("result", [[b"hi"], [b"h", b"i"]], ids=["whole", "parts"])
def test_a_forged_reason_is_a_500(wsgi, text, result):
    live = wsgi(app_of(result, "200 " + text), strict=False)
    assert refused(live, "reason phrase holds a control character")


@pytest.mark.parametrize("text", FORGED)
@pytest.mark.parametrize("result", [[b"hi"], [b"h", b"i"]], ids=["whole", "parts"])
def test_a_forged_value_is_a_500_and_named_in_the_log(wsgi, text, result):
    live = wsgi(app_of(result, fields=[("X-Mine", text)]), strict=False)
    assert refused(live, f"'X-Mine': {text!r}")


@pytest.mark.parametrize("name", ["X\r\nY", "X\n", "X Y", "X:", "", "\0", "N\xe4me"])
def test_a_forged_name_is_a_500_and_named_in_the_log(wsgi, name):
    live = wsgi(app_of([b"hi"], fields=[(name, "value")]), strict=False)
    assert refused(live, f"{name!r}: 'value'")


@pytest.mark.parametrize("status", ["404 \u20ac", "404 a\nb", "abc"])
def test_a_refused_status_does_not_show_in_the_next_answer(wsgi, status):
    statuses = iter(["200 OK", status, "200 OK"])

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response(next(statuses), [PLAIN])
        return [b"hi"]

    live = wsgi(app, strict=False)
    assert [live.ask().status for _ in range(3)] == [200, 500, 200]
    assert live.log.until("ProtocolError")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Connection", "keep-alive"),
        ("Connection", "upgrade"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Connection", "close"),
        ("TE", "trailers"),
        ("Trailer", "X"),
        ("Transfer-Encoding", "chunked"),
        ("Upgrade", "websocket"),
    ],
)
def test_a_hop_by_hop_field_is_a_500(wsgi, name, value):
    live = wsgi(app_of([b"hi"], fields=[PLAIN, (name, value)]))
    assert refused(live, f"hop-by-hop; the server sets it: '{name}': '{value}'")


def test_the_app_may_have_the_connection_closed(wsgi):
    client = wsgi(app_of([b"hi"], fields=[PLAIN, ("Connection", "close")])).client()
    answer = client.ask()
    assert answer.closes and answer.body + client.rest() == b"hi"


@pytest.mark.parametrize("strict", ITERATED)
def test_fields_are_sent_as_given_and_in_order(wsgi, strict):
    fields = [
        PLAIN,
        ("X-a", "1"),
        ("Set-Cookie", "a"),
        ("x-A", "\xe9"),
        ("Set-Cookie", "b"),
    ]
    client = wsgi(app_of([b"hi"], fields=fields), strict=strict).client()
    client.send(GET)
    head = client.until(b"\r\n\r\n")
    block = b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in fields)
    assert block in head


class Text(str):
    """As Django's SafeString and markupsafe's Markup are."""

    def __str__(self) -> str:
        return self


FIELDS = {
    "plain": [PLAIN],
    "length": [PLAIN, ("Content-Length", "2")],
    "two lengths": [("Content-Length", "2"), ("Content-Length", "3")],
    "ours": [("Date", "x"), ("Server", "y")],
    "hop by hop": [PLAIN, ("Transfer-Encoding", "chunked")],
    "not latin": [("X", "\u20ac")],
    "subclass": [(Text("X-Mine"), Text("1"))],
    "twice": [("Set-Cookie", "a"), ("Set-Cookie", "a"), ("Set-Cookie", "b")],
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_fields_that_come_again_and_again_are_as_the_first_time(wsgi, fields):
    """That is how a pair which an app has from a constant is known, and not checked."""
    live = wsgi(app_of([b"hi"], fields=fields), strict=False)
    client = live.client()
    answers = [client.ask() for _ in range(TIMES)]
    first = (answers[0].status, answers[0].undated, answers[0].body)
    assert [(a.status, a.undated, a.body) for a in answers] == [first] * TIMES
    assert logged(live).count("ProtocolError: ") == (first[0] == 500) * TIMES


def test_a_field_that_is_made_for_one_answer_is_not_kept_behind_it(wsgi):
    values = [f"value {n}" for n in range(TIMES)]
    before = [sys.getrefcount(values[n]) for n in range(TIMES)]
    kept: list[bool] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        n = len(kept)
        kept.append(n > 0 and sys.getrefcount(values[n - 1]) > before[n - 1])
        start_response("200 OK", [("X-Mine", values[n])])
        return [b"hi"]

    client = wsgi(app, strict=False).client()
    assert [client.ask()["x-mine"] for _ in values] == values
    assert sum(kept) <= 2  # that looked like a constant: where the ones before had been


def test_no_content_type_is_made_up(wsgi):
    assert "content-type" not in wsgi(app_of([b"hi"], fields=[]), strict=False).ask()


@pytest.mark.parametrize("name", ["Date", "Server"])
def test_the_app_may_say_what_the_server_says_by_default(wsgi, name):
    assert wsgi(app_of([b"hi"], fields=[PLAIN, (name, "x")])).ask()[name.lower()] == "x"


@pytest.mark.parametrize("status", [b"200 OK", 200, None, ["200 OK"]])
def test_a_status_that_is_no_str_is_a_500(wsgi, status):
    live = wsgi(app_of([b"hi"], status), strict=False)
    assert refused(live, f"status must be a str, not {status!r}")


@pytest.mark.parametrize(
    "fields", [None, (), (PLAIN, PLAIN), {"X": "y"}, "X", iter([])]
)
def test_fields_that_are_no_list_are_a_500(wsgi, fields):
    live = wsgi(app_of([b"hi"], fields=fields), strict=False)
    assert refused(live, f"headers must be a list of pairs, not {fields!r}")


@pytest.mark.parametrize(
    "pair", [(b"X", "y"), ("X", b"y"), ("X", 5), ("X", None), (None, "y")]
)
def test_a_field_that_is_no_pair_of_str_is_a_500(wsgi, pair):
    live = wsgi(app_of([b"hi"], fields=[PLAIN, pair]), strict=False)
    assert refused(live, f"a header field must be a pair of str, not {pair!r}")


@pytest.mark.parametrize("pair", [("X",), ("X", "y", "z"), 5])
def test_a_field_that_is_no_pair_is_a_500(wsgi, pair):
    live = wsgi(app_of([b"hi"], fields=[PLAIN, pair]), strict=False)
    assert live.ask().status == 500
    assert re.search("ValueError|TypeError", live.log.until("Error"))


def test_a_field_that_is_no_latin_1_is_a_500(wsgi):
    live = wsgi(app_of([b"hi"], fields=[PLAIN, ("X", "\u20ac")]))
    assert refused(live, "a header field must be latin-1, not '\u20ac'")


class Data(bytes):
    pass


@pytest.mark.parametrize("result", [[Data(b"hi")], [Data(b"h"), b"i"]], ids=repr)
def test_subclasses_of_str_and_bytes_are_as_good(wsgi, result):
    fields = [(Text("X-Mine"), Text("1"))]
    live = wsgi(app_of(result, Text("201 Made"), fields), strict=False)
    answer = live.ask()
    told = (answer.status, answer.reason, answer["x-mine"], answer.body)
    assert told == (201, "Made", "1", b"hi")


def test_start_response_returns_write(wsgi):
    returned = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        returned.append(start_response("200 OK", [PLAIN]))
        return [b"hi"]

    wsgi(app, strict=False).ask()
    assert callable(returned[0])


@pytest.mark.parametrize(
    ("status", "field", "error"),
    [
        ("abc", PLAIN, ProtocolError),
        ("100 Continue", PLAIN, ProtocolError),
        ("200 a\nb", PLAIN, ProtocolError),
        ("200 \u20ac", PLAIN, ProtocolError),
        ("200 OK", ("X-Mine", "a\nb"), ProtocolError),
        ("200 OK", ("X-Mine", "\u20ac"), ProtocolError),
        ("200 OK", ("X Mine", "v"), ProtocolError),
        ("200 OK", ("Upgrade", "websocket"), ProtocolError),
        ("200 OK", ("Content-Length", "+5"), ProtocolError),
        ("200 OK", ("X-Mine", 5), TypeError),
        ("200 OK", ("X-Mine",), ValueError),
    ],
)
def test_what_is_wrong_with_a_head_is_raised_in_the_app_s_own_call(
    wsgi, status, field, error
):
    raised = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            start_response(status, [PLAIN, field])
        except error as wrong:
            raised.append(wrong)
            start_response("503 Mine", [PLAIN])
        return [b"hi"]

    answer = wsgi(app, strict=False).ask()
    assert (answer.status, answer.reason, answer.body) == (503, "Mine", b"hi")
    assert len(raised) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda start: start("201 Made", headers=[PLAIN]),
        lambda start: start(headers=[PLAIN], status="201 Made"),
        lambda start: start("201 Made", [PLAIN], exc_info=None),
        lambda start: start("201 Made", [PLAIN], None),
        lambda start: start(*["201 Made", [PLAIN]]),
        lambda start: functools.partial(start, "201 Made")([PLAIN]),
    ],
)
def test_start_response_takes_its_arguments_in_any_way(wsgi, call):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        call(start_response)
        return [b"hi"]

    answer = wsgi(app, strict=False).ask()
    assert (answer.status, answer.reason, answer.body) == (201, "Made", b"hi")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda start: start(), "__call__()"),
        (lambda start: start("200 OK", [PLAIN], None, None), "__call__()"),
        (lambda start: start("200 OK", [PLAIN], headers=[PLAIN]), "__call__()"),
        (lambda start: start("200 OK", [PLAIN], fields=[PLAIN]), "__call__()"),
        (lambda start: start(headers=[PLAIN]), "__call__()"),
        (lambda start: type(start)()("200 OK", [PLAIN]), "the server makes those"),
    ],
)
def test_what_is_no_call_of_a_start_response_is_a_type_error(wsgi, call, text):
    raised: list[TypeError] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            call(start_response)
        except TypeError as wrong:
            raised.append(wrong)
        start_response("200 OK", [PLAIN])
        return [b"hi"]

    assert wsgi(app, strict=False).ask().body == b"hi"
    assert text in str(raised[0])


def test_start_response_called_twice_is_a_500(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [PLAIN])
        start_response("201 Made", [PLAIN])
        return [b"hi"]

    assert refused(wsgi(app), "start_response() was called twice without exc_info")


def test_start_response_never_called_is_a_500(wsgi):
    live = wsgi(lambda environ, start: [b"hi"], strict=False)
    assert refused(live, "the app did not call start_response()")


@pytest.mark.parametrize(
    "result", [[], (), iter([])], ids=["list", "tuple", "iterator"]
)
def test_start_response_never_called_for_an_empty_body_is_a_500(wsgi, result):
    live = wsgi(lambda environ, start: result, strict=False)
    assert refused(live, "the app did not call start_response()")


def test_start_response_may_be_called_by_the_first_next(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("201 Made", [PLAIN])
        yield b"hi"

    answer = wsgi(app).ask()
    assert (answer.status, answer.body) == (201, b"hi")


def test_start_response_may_be_called_behind_empty_blocks(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        yield b""
        start_response("201 Made", [PLAIN])
        yield b""
        yield b"hi"

    answer = wsgi(app, strict=False).ask()
    assert (answer.status, answer.body) == (201, b"hi")


def test_start_response_called_behind_a_block_is_too_late(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        yield b"hi"
        start_response("201 Made", [PLAIN])

    live = wsgi(app, strict=False)
    assert refused(live, "the app did not call start_response()")


def failing(environ: dict[str, Any], start_response: Any) -> Any:
    """Reports an error as PEP 3333 wants it, behind as many parts as the query says."""
    start_response("200 OK", [PLAIN, ("X-Mine", "1")])
    for _ in range(int(environ["QUERY_STRING"])):
        yield b"begun"
    yield b""
    try:
        raise LookupError("nobody home")
    except LookupError:
        start_response("503 Sorry", [PLAIN], sys.exc_info())
    yield b"sorry"


def test_exc_info_replaces_an_answer_that_was_not_begun(wsgi):
    answer = wsgi(failing).ask(get("/?0"))
    assert (answer.status, answer.reason, answer.body) == (503, "Sorry", b"sorry")
    assert "x-mine" not in answer


def test_exc_info_is_raised_when_the_answer_was_begun(wsgi):
    live = wsgi(failing)
    client = live.client()
    client.send(get("/?1"))
    assert client.rest().endswith(b"5\r\nbegun\r\n")
    assert 'raise LookupError("nobody home")' in live.log.until("nobody home")


def test_exc_info_is_raised_when_the_answer_was_written(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [PLAIN])(b"begun")
        try:
            raise LookupError("nobody home")
        except LookupError:
            start_response("503 Sorry", [PLAIN], sys.exc_info())
        return [b"sorry"]

    live = wsgi(app)
    client = live.client()
    client.send(GET)
    assert client.rest().endswith(b"5\r\nbegun\r\n")
    assert live.log.until("LookupError: nobody home")


def test_exc_info_may_be_given_the_first_time(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            raise LookupError("nobody home")
        except LookupError:
            start_response("503 Sorry", [PLAIN], sys.exc_info())
        return [b"sorry"]

    assert wsgi(app).ask().status == 503


# ---- write() -------------------------------------------------------------------------


def writing(*parts: Any, rest: Any = ()) -> App:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        write = start_response("200 OK", [PLAIN])
        for part in parts:
            write(part)
        return rest

    return app


@pytest.mark.parametrize(
    ("parts", "rest"),
    [
        ([b"hi"], []),
        ([b"h", b"", b"i"], []),
        ([b""], [b"hi"]),
        ([b"h"], [b"i"]),
        ([b"h"], [b"", b"i"]),
        ([b"h"], [b"i", b""]),
    ],
)
def test_what_is_written_comes_before_what_is_returned(wsgi, parts, rest):
    answer = wsgi(writing(*parts, rest=rest), strict=False).ask()
    assert (answer.status, answer.body) == (200, b"hi")


@pytest.mark.parametrize("part", ["hi", bytearray(b"hi"), None, 5])
def test_writing_what_is_no_bytes_is_a_500(wsgi, part):
    live = wsgi(writing(part), strict=False)
    assert refused(live, f"the body of an answer is made of bytes, not {part!r}")


def test_what_is_written_is_transmitted_at_once(wsgi):
    held = Held()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [PLAIN])(b"first")
        held.wait()
        return [b"second"]

    client = wsgi(app).client()
    client.send(GET)
    client.until(b"first")
    held.let_go()
    assert client.until(b"second")


def test_write_waits_for_a_slow_reader(wsgi):
    written = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        write = start_response("200 OK", [PLAIN])
        try:
            while True:
                write(bytes(50_000))
                written.append(50_000)
        except ClientDisconnected:
            done.set()
            raise

    done = threading.Event()
    live = wsgi(app, write_timeout=0.2)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    assert done.wait(SOON)
    assert sum(written) - live.stats()["bytes_out"] <= 2 * HIGH_WATER + 50_000
    assert logged(live) == ""


def test_a_slow_reader_has_the_only_thread_until_the_write_timeout(serve):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        write = start_response("200 OK", [PLAIN])
        while environ["PATH_INFO"] == "/much":
            write(bytes(50_000))
        return [b"hi"]

    live = serve(app, write_timeout=1)
    slow, other = live.client(receive_buffer=4096), live.client()
    slow.send(get("/much"))
    slow.until(b"\r\n\r\n")
    other.send(GET)
    assert other.is_quiet()
    assert other.answer().body == b"hi" and logged(live) == ""


def test_a_slow_body_behind_100_has_the_only_thread_until_the_read_timeout(serve):
    live = serve(echo, read_timeout=1)
    slow, other = live.client(), live.client()
    slow.send(ANNOUNCED)
    slow.until(b"100 Continue\r\n\r\n")
    other.send(post(b"hello"))
    assert other.is_quiet()
    assert other.answer().body == b"hello" and slow.answer().status == 408


@contextlib.contextmanager
def waiting_for_a_body(live: Live) -> Iterator[None]:
    """Inside, the only thread waits for one client; then it goes on with the others."""
    slow = live.client()
    slow.send(ANNOUNCED)
    slow.until(b"100 Continue\r\n\r\n")
    yield
    slow.send(b"hello")
    assert slow.answer().body == b"hello"


def test_who_has_left_while_the_only_thread_waited_is_not_served(serve):
    called: list[str] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        called.append(environ["PATH_INFO"])
        return echo(environ, start_response)

    live = serve(app)
    with waiting_for_a_body(live):
        other = live.client()
        other.send(get("/left"))
        live.until(lambda stats: stats["lent"] == 2)
        other.reset()
        live.until(lambda stats: stats["connections"] == 1)
    assert live.ask().body == b"" and called == ["/", "/"]


def test_an_iterable_ends_whose_client_reads_and_leaves_while_others_wait(serve):
    endless = Endless(50_000)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/":
            return echo(environ, start_response)
        start_response("200 OK", [PLAIN])
        return iter(endless)

    live = serve(app)
    reader = live.client(receive_buffer=4096)
    reader.send(get("/endless"))
    reader.until(b"\r\n\r\n")
    with waiting_for_a_body(live):
        while live.stats()["bytes_out"] < endless.pulled:  # nothing pulls meanwhile
            reader.receive()
        reader.reset()
        live.until(lambda stats: stats["connections"] == 1)
    assert endless.closed.wait(SOON) and live.ask().body == b""


def test_the_only_thread_hears_that_its_master_died_while_it_waits():
    server = Server(echo, interface="wsgi", drain_idle=0)
    ready, died = threading.Event(), threading.Event()
    lifeline, end = os.pipe()
    options = {"lifeline": lifeline, "on_master_death": died.set, "on_ready": ready.set}
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.serve, args=[[sock]], kwargs=options)
        thread.start()
        assert ready.wait(SOON)
        with Client(sock.getsockname()) as slow:
            slow.send(ANNOUNCED)
            slow.until(b"100 Continue\r\n\r\n")
            os.close(end)
            heard = died.wait(SOON)
            slow.send(b"hello")
            assert slow.answer().body == b"hello"
        server.shutdown()
        thread.join(SOON)
    os.close(lifeline)
    assert heard and not thread.is_alive()


def test_the_time_for_a_body_begins_when_the_app_reads(serve):
    held = Held()

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        held.wait()
        return echo(environ, start_response)

    client = serve(app, read_timeout=1).client()
    client.send(ANNOUNCED)
    assert all(client.is_quiet() for _ in range(4))  # longer than that
    held.let_go()
    client.until(b"100 Continue\r\n\r\n")
    assert client.is_quiet()
    client.send(b"hello")
    assert client.answer().body == b"hello"


def test_write_goes_on_when_its_reader_reads(wsgi):
    parts = [os.urandom(50_000) for _ in range(100)]
    client = wsgi(writing(*parts)).client(receive_buffer=4096)
    client.send(GET)
    assert client.answer().body == b"".join(parts)


def test_writing_to_a_client_that_has_left_raises(wsgi):
    held, raised = Held(), []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        write = start_response("200 OK", [PLAIN])
        held.wait()
        try:
            while True:
                write(bytes(50_000))
        except ClientDisconnected as error:
            raised.append(error)
            raise

    live = wsgi(app)
    client = live.client()
    client.send(GET)
    assert held.begun.wait(SOON)
    client.reset()
    held.let_go()
    live.until(lambda stats: stats["connections"] == 0)
    assert logged(live) == "" and len(raised) == 1


def test_write_is_of_no_use_behind_the_answer(serve):
    kept = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        kept.append(start_response("200 OK", [PLAIN]))
        return [b"hi"]

    live = serve(app, interface="wsgi")
    client = live.client()
    client.ask()
    with pytest.raises(ClientDisconnected):
        live.run(lambda: kept[0](b"more"))
    assert client.ask().body == b"hi"


# ---- The iterable --------------------------------------------------------------------


class Files(io.BytesIO):
    """Lines, as a file has them."""


BODIES: dict[str, Callable[[], Any]] = {
    "list": lambda: [b"hi"],
    "list-of-two": lambda: [b"h", b"i"],
    "tuple": lambda: (b"hi",),
    "generator": lambda: (part for part in (b"h", b"i")),
    "iterator": lambda: iter([b"hi"]),
    "class-with-next": lambda: Parts([b"h", b"i"]),
    "file": lambda: Files(b"hi"),
    "dict-keys": lambda: {b"h": 1, b"i": 2}.keys(),
    "empty-blocks": lambda: [b"", b"", b"h", b"", b"i", b""],
    "empty-blocks-generated": lambda: (part for part in (b"", b"hi", b"")),
}


@pytest.mark.parametrize("strict", ITERATED)
@pytest.mark.parametrize("kind", BODIES)
def test_an_iterable_is_the_body(wsgi, kind, strict):
    client = wsgi(app_of(BODIES[kind]), strict=strict).client()
    answers = [client.ask() for _ in range(2)]
    assert [(answer.status, answer.body) for answer in answers] == [(200, b"hi")] * 2


@pytest.mark.parametrize(
    "result",
    [list, lambda: (), lambda: iter([]), lambda: [b""], lambda: [b"", b""]],
    ids=["list", "tuple", "iterator", "empty", "two-empty"],
)
@pytest.mark.parametrize("strict", ITERATED)
def test_an_iterable_without_bytes_is_an_empty_body(wsgi, result, strict):
    answer = wsgi(app_of(result), strict=strict).ask()
    assert (answer.status, answer.body, answer["content-length"]) == (200, b"", "0")


def test_a_list_of_one_has_a_length(wsgi):
    answer = wsgi(app_of([b"hello"]), strict=False).ask()
    assert answer["content-length"] == "5" and "transfer-encoding" not in answer


def test_what_has_no_announced_length_is_chunked(wsgi):
    answer = wsgi(app_of([b"h", b"i"])).ask()
    assert answer["transfer-encoding"] == "chunked" and "content-length" not in answer


def test_what_has_no_announced_length_ends_with_the_connection_in_http_1_0(wsgi):
    client = wsgi(app_of([b"h", b"i"])).client()
    answer = client.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert answer.closes and "transfer-encoding" not in answer
    assert answer.body == b"hi"


@pytest.mark.parametrize(
    "result", [["hi"], ["h", "i"], [bytearray(b"hi")], [None], [b"", 5], b"hi", "hi"]
)
def test_a_block_that_is_no_bytes_is_a_500(wsgi, result):
    live = wsgi(app_of(result), strict=False)
    assert refused(live, "the body of an answer is made of bytes, not")


def test_a_block_that_is_no_bytes_behind_the_first_cuts_the_answer_off(wsgi):
    live = wsgi(app_of([b"begun", "more"]), strict=False)
    client = live.client()
    client.send(GET)
    assert client.rest().endswith(b"5\r\nbegun\r\n")
    assert live.log.until("the body of an answer is made of bytes, not 'more'")


@pytest.mark.parametrize("result", [None, 5, object()])
def test_what_is_no_iterable_is_a_500(wsgi, result):
    live = wsgi(app_of(lambda: result), strict=False)
    assert refused(live, "object is not iterable")


# ---- HEAD, 204, 304 and Content-Length -----------------------------------------------


@pytest.mark.parametrize("strict", ITERATED)
@pytest.mark.parametrize("kind", BODIES)
def test_head_is_answered_as_get_without_the_body(wsgi, kind, strict):
    client = wsgi(app_of(BODIES[kind]), strict=strict).client()
    answers = [client.ask(get(method=method)) for method in ("GET", "HEAD", "GET")]
    assert [answer.body for answer in answers] == [b"hi", b"", b"hi"]
    assert answers[0].undated == answers[1].undated


def test_head_may_announce_any_length(wsgi):
    fields = [PLAIN, ("Content-Length", "1000")]
    client = wsgi(app_of([], fields=fields), strict=False).client()
    for _ in range(2):
        answer = client.ask(get(method="HEAD"))
        assert (answer.status, answer["content-length"]) == (200, "1000")


def test_head_of_an_endless_answer_ends(wsgi):
    endless = Endless()
    live = wsgi(app_of(lambda: iter(endless)))
    assert live.ask(get(method="HEAD")).status == 200
    assert endless.closed.wait(SOON) and endless.pulled == len(endless.part)


def test_head_drops_what_is_written(wsgi):
    client = wsgi(writing(b"hello", rest=[b"more"])).client()
    assert [client.ask(get(method="HEAD")).body for _ in range(2)] == [b"", b""]


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
@pytest.mark.parametrize("strict", ITERATED)
@pytest.mark.parametrize("kind", ["list", "list-of-two", "generator"])
def test_a_status_without_a_body_drops_it(wsgi, status, kind, strict):
    client = wsgi(app_of(BODIES[kind], status, []), strict=strict).client()
    answers = [client.ask() for _ in range(2)]
    assert [(a.status, a.body) for a in answers] == [(int(status[:3]), b"")] * 2


def test_204_has_no_content_length(wsgi):
    fields = [("Content-Length", "0")]
    answer = wsgi(app_of([], "204 No Content", fields)).ask()
    assert "content-length" not in answer and "transfer-encoding" not in answer


@pytest.mark.parametrize("result", [[], [b""], iter(())], ids=["none", "one", "iter"])
def test_no_body_for_head_does_not_say_that_get_has_none(wsgi, result):
    """RFC 9110 8.6: a Content-Length is that of the answer to GET."""
    live = wsgi(app_of(result), strict=False)
    assert "content-length" not in live.ask(get(method="HEAD"))


def test_304_keeps_the_content_length_of_what_it_stands_for(wsgi):
    fields = [("Content-Length", "1000")]
    answer = wsgi(app_of([], "304 Not Modified", fields)).ask()
    assert answer["content-length"] == "1000"


@pytest.mark.parametrize("strict", ITERATED)
@pytest.mark.parametrize("result", [[b"hello"], [b"hel", b"lo"]], ids=["one", "two"])
def test_the_right_content_length_is_sent_once(wsgi, result, strict):
    fields = [PLAIN, ("content-length", "5")]
    answer = wsgi(app_of(result, fields=fields), strict=strict).ask()
    assert (answer["content-length"], answer.body) == ("5", b"hello")
    assert "transfer-encoding" not in answer


@pytest.mark.parametrize("length", ["-1", "five", "", "5, 5", "+5", "05", "5 "])
def test_a_malformed_content_length_is_a_500(wsgi, length):
    fields = [PLAIN, ("Content-Length", length)]
    live = wsgi(app_of([b"hello"], fields=fields))
    assert refused(live, f"'Content-Length': '{length}'")


def test_two_content_lengths_are_a_500(wsgi):
    live = wsgi(app_of([b"hello"], fields=[PLAIN, *[("Content-Length", "5")] * 2]))
    assert refused(live, "Content-Length is malformed or contradictory")


@pytest.mark.parametrize("length", ["4", "6", "0"])
def test_a_wrong_content_length_of_a_whole_body_is_a_500(wsgi, length):
    fields = [PLAIN, ("Content-Length", length)]
    live = wsgi(app_of([b"hello"], fields=fields), strict=False)
    assert refused(live, "Content-Length")


@pytest.mark.parametrize("result", [[b"hel"], [b"h", b"el"]], ids=["one", "two"])
def test_a_body_shorter_than_announced_is_cut_off_and_logged(wsgi, result):
    live = wsgi(app_of(result, fields=[PLAIN, ("Content-Length", "5")]))
    client = live.client()
    client.send(GET + GET)
    assert client.rest().endswith(b"\r\n\r\nhel")
    assert live.log.until("shorter than its Content-Length")


def test_no_body_where_one_is_announced_is_a_500(wsgi):
    live = wsgi(app_of(lambda: iter([]), fields=[PLAIN, ("Content-Length", "5")]))
    assert refused(live, "shorter than its Content-Length")


def test_a_body_longer_than_announced_is_cut_off_and_logged(wsgi):
    parts = [b"hel", b"lo, world"]
    live = wsgi(app_of(parts, fields=[PLAIN, ("Content-Length", "5")]))
    client = live.client()
    client.send(GET + GET)
    assert client.rest().partition(b"\r\n\r\n")[2] == b"hel"
    assert live.log.until("longer than its Content-Length")


def test_a_block_behind_the_announced_length_is_not_sent_and_logged(wsgi):
    live = wsgi(app_of([b"hello", b"!"], fields=[PLAIN, ("Content-Length", "5")]))
    client = live.client()
    client.send(GET + GET)
    assert client.rest().partition(b"\r\n\r\n")[2] == b"hello"
    assert live.log.until("longer than its Content-Length")


# ---- close() -------------------------------------------------------------------------


def test_close_is_called_once_behind_a_normal_end(wsgi):
    parts = Parts([b"h", b"i"])
    live = wsgi(app_of(parts))
    assert live.ask().body == b"hi"
    assert closed_once(live, parts)


def test_close_is_called_when_the_last_byte_was_sent(wsgi):
    received = threading.Event()
    parts = Parts([b"h", b"i"], lambda: outcome.append(received.wait(SOON)))
    outcome: list[bool] = []
    live = wsgi(app_of(parts))
    client = live.client()
    client.ask()
    received.set()
    assert closed_once(live, parts) and outcome == [True]


def test_an_answer_that_is_whole_arrives_while_close_takes_its_time(wsgi):
    received = threading.Event()
    parts = Parts([b"hi"], lambda: outcome.append(received.wait(SOON)))
    outcome: list[bool] = []
    live = wsgi(app_of(parts, fields=[PLAIN, ("Content-Length", "2")]))
    client = live.client()
    client.ask()
    received.set()
    assert closed_once(live, parts) and outcome == [True]


def test_the_answer_before_arrives_while_a_handler_takes_its_time(wsgi):
    received = threading.Event()
    outcome: list[bool] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/slow":
            outcome.append(received.wait(SOON))
        start_response("200 OK", [PLAIN, ("Content-Length", "2")])
        return iter([b"hi"])

    live = wsgi(app)
    client = live.client()
    client.send(GET + GET.replace(b"GET / ", b"GET /slow "))
    client.answer()
    received.set()
    client.answer()
    live.stop()
    assert outcome == [True]


def test_who_sends_for_the_only_thread_never_collects_garbage(serve):
    held = Held()
    names: list[str] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/slow":
            held.wait()
        start_response("200 OK", [PLAIN, ("Content-Length", "2")])
        return iter([b"hi"])

    def note(*_: object) -> None:
        names.append(threading.current_thread().name)

    live = serve(app)
    live.ask()
    before = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    try:
        client = live.client()
        client.send(GET + get("/slow"))
        client.answer()
        held.let_go()
        client.answer()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(note)
    assert names and "prefork-sender" not in names


def test_close_is_called_once_when_an_iterable_raises(wsgi):
    def parts() -> Iterator[bytes]:
        yield b"begun"
        raise LookupError("nobody home")

    returned = Parts(parts())
    live = wsgi(app_of(returned))
    with pytest.raises(h11.RemoteProtocolError):
        live.ask()
    assert live.log.until("LookupError: nobody home")
    assert closed_once(live, returned)


def test_close_is_called_once_when_an_iterable_raises_at_once(wsgi):
    def parts() -> Iterator[bytes]:
        raise LookupError("nobody home")
        yield b"never"

    returned = Parts(parts())
    live = wsgi(app_of(returned))
    assert refused(live, "LookupError: nobody home")
    assert closed_once(live, returned)


def test_close_is_called_once_when_a_block_is_no_bytes(wsgi):
    parts = Parts(["hi"])
    live = wsgi(app_of(parts), strict=False)
    assert refused(live, "is made of bytes")
    assert closed_once(live, parts)


def test_close_is_called_once_when_iter_raises(wsgi):
    class Broken(Parts):
        def __iter__(self) -> Parts:
            raise LookupError("nobody home")

    parts = Broken([])
    live = wsgi(app_of(parts), strict=False)
    assert refused(live, "LookupError: nobody home")
    assert closed_once(live, parts)


@pytest.mark.parametrize("fields", [[("Content-Length", "2")] * 2, None])
def test_close_is_called_once_when_the_head_is_refused(wsgi, fields):
    parts = Parts([b"hi"])

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        if fields is not None:  # else start_response() is not called
            start_response("200 OK", fields)
        return parts

    live = wsgi(app, strict=False)
    assert live.ask().status == 500 and live.log.until("Error")
    assert closed_once(live, parts)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "304 Not Modified"])
def test_close_is_called_once_where_no_body_is_sent(wsgi, method, status):
    parts = Parts([b"h", b"i"])
    fields = [PLAIN] if status == "200 OK" else []
    live = wsgi(app_of(parts, status, fields))
    assert live.ask(get(method=method)).status == int(status[:3])
    assert closed_once(live, parts)


@pytest.mark.parametrize("length", ["1", "5"])
def test_close_is_called_once_when_the_length_is_wrong(wsgi, length):
    parts = Parts([b"hi"])
    live = wsgi(app_of(parts, fields=[PLAIN, ("Content-Length", length)]))
    live.client().send(GET)
    assert live.log.until("Content-Length")
    assert closed_once(live, parts)


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_close_is_called_once_when_the_client_leaves(wsgi, leave):
    parts = Parts(Endless())
    live = wsgi(app_of(parts))
    client = live.client()
    client.send(GET)
    client.until(b"xxx")
    getattr(client, leave)()
    assert closed_once(live, parts) and live.log.text == ""


def test_close_is_called_once_when_the_client_has_left_amid_the_call(wsgi):
    held, parts = Held(), Parts([b"h", b"i"])

    def app(environ: dict[str, Any], start_response: Any) -> Parts:
        held.wait()
        start_response("200 OK", [PLAIN])
        return parts

    live = wsgi(app)
    client = live.client()
    client.send(GET)
    assert held.begun.wait(SOON)
    client.reset()
    held.let_go()
    assert closed_once(live, parts) and live.log.text == ""


def test_close_is_called_once_when_the_app_replaces_its_answer(wsgi):
    def parts() -> Iterator[bytes]:
        yield b""
        try:
            raise LookupError("nobody home")
        except LookupError:
            again[0]("503 Sorry", [PLAIN], sys.exc_info())
        yield b"sorry"

    again: list[Any] = []
    returned = Parts(parts())

    def app(environ: dict[str, Any], start_response: Any) -> Parts:
        again.append(start_response)
        start_response("200 OK", [PLAIN])
        return returned

    live = wsgi(app)
    assert live.ask().status == 503
    assert closed_once(live, returned)


def test_what_close_raises_is_logged_and_harms_nobody(wsgi):
    def closing() -> None:
        raise LookupError("in close")

    parts = Parts([b"hi"], closing)
    live = wsgi(app_of(parts))
    client = live.client()
    assert client.ask().body == b"hi"
    assert live.log.until("LookupError: in close")
    assert client.ask().status == 200


def test_a_generator_is_closed_when_the_client_leaves(wsgi):
    endless = Endless()
    live = wsgi(app_of(lambda: iter(endless)))
    client = live.client()
    client.send(GET)
    client.until(b"xxx")
    client.reset()
    assert endless.closed.wait(SOON)
    assert logged(live) == ""


# ---- Apps that raise -----------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_app_that_raises_is_a_500_with_its_traceback_in_the_log(wsgi, when):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if when == "behind":
            start_response("200 OK", [PLAIN, ("X-Mine", "1")])
        raise LookupError("nobody home")

    live = wsgi(app)
    answer = live.ask()
    assert (answer.status, "x-mine" in answer) == (500, False)
    text = live.log.until("LookupError: nobody home")
    assert "Traceback" in text and 'raise LookupError("nobody home")' in text


def test_the_connection_is_kept_after_a_500(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/x":
            raise LookupError("nobody home")
        return hello(environ, start_response)

    live = wsgi(app)
    client = live.client()
    assert [client.ask(get(path)).status for path in ("/x", "/")] == [500, 200]
    assert live.log.until("LookupError")


def test_an_app_that_raises_behind_its_first_write_cuts_the_answer_off(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [PLAIN])(b"begun")
        raise LookupError("nobody home")

    live = wsgi(app)
    client = live.client()
    client.send(GET)
    assert client.rest().endswith(b"5\r\nbegun\r\n")
    assert live.log.until("LookupError: nobody home")


def test_an_app_that_raises_is_still_told_in_http_1_0(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        raise LookupError("nobody home")

    live = wsgi(app)
    client = live.client()
    client.send(HTTP_1_0)
    assert client.answer().status == 500
    assert live.log.until("LookupError")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["call", "first", "amid", "close"])
def test_an_exit_in_an_app_ends_the_server(wsgi, error, where):
    def leave(at: str) -> None:
        if at == where:
            raise error

    def parts() -> Iterator[bytes]:
        leave("first")
        yield b"begun"
        leave("amid")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        leave("call")
        start_response("200 OK", [PLAIN])
        return Parts(parts(), lambda: leave("close"))

    live = wsgi(app)
    client = live.client()
    client.send(GET)
    assert live.ended() is error
    if where in ("call", "first"):
        assert client.answer().status == 500
    else:
        assert client.rest().startswith(b"HTTP/1.1 200 OK\r\n")


# ---- Streaming -----------------------------------------------------------------------


@pytest.mark.parametrize("announced", [False, True], ids=["chunked", "length"])
@pytest.mark.parametrize("size", [1, 20_000])
def test_each_block_is_transmitted_before_the_next_is_asked_for(wsgi, announced, size):
    """PEP 3333, Buffering and Streaming: even behind the last one."""
    reacted = [threading.Event() for _ in range(3)]

    def parts() -> Iterator[bytes]:
        for n, event in enumerate(reacted):
            yield b"%d" % n * size
            outcome.append(event.wait(SOON))

    outcome: list[bool] = []
    fields = [PLAIN, ("Content-Length", str(3 * size))] if announced else [PLAIN]
    live = wsgi(app_of(parts, fields=fields))
    client = live.client()
    client.send(GET)
    for n, event in enumerate(reacted):
        client.until(b"%d" % n * size)
        event.set()
    live.stop()
    assert outcome == [True] * 3


@pytest.mark.parametrize("size", [100, 16384, 65536])
def test_a_stream_is_not_pulled_far_ahead_of_its_reader(wsgi, size):
    endless = Endless(size)
    live = wsgi(app_of(lambda: iter(endless)), write_timeout=0.2)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    assert endless.closed.wait(SOON)
    assert endless.pulled - live.stats()["bytes_out"] <= 2 * HIGH_WATER + size
    assert logged(live) == ""


def test_a_stream_goes_on_when_its_reader_reads(wsgi):
    endless = Endless()
    client = wsgi(app_of(lambda: iter(endless))).client(receive_buffer=4096)
    client.send(GET)
    size = 0
    while size < 8 << 20:
        size += len(client.receive())
    assert endless.pulled >= size - 65536
    client.close()
    assert endless.closed.wait(SOON)


def test_a_large_stream_reaches_a_slow_reader_whole(wsgi):
    parts = [os.urandom(n) for n in (1, 20_000, 100, 300_000) * 10]
    client = wsgi(app_of(lambda: iter(parts))).client(receive_buffer=4096)
    client.send(GET)
    assert client.answer().body == b"".join(parts)


@pytest.mark.parametrize("strict", ITERATED)
def test_a_large_body_reaches_a_slow_reader_whole(wsgi, strict):
    body = os.urandom(8 << 20)
    live = wsgi(app_of([body]), strict=strict)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    live.until(lambda stats: stats["bytes_out"] > 0)
    assert client.answer().body == body


def test_a_stream_does_not_hold_up_other_requests(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [PLAIN])
        return iter(Endless(100)) if environ["PATH_INFO"] == "/stream" else [b"hi"]

    live = wsgi(app)
    reader = live.client()
    reader.send(get("/stream"))
    over = threading.Event()

    def read() -> None:
        while not over.is_set() and reader.receive():
            pass

    thread = threading.Thread(target=read)
    thread.start()
    with live.client() as client:
        assert [client.ask().body for _ in range(20)] == [b"hi"] * 20
    over.set()
    thread.join()


def test_pipelined_requests_are_answered_in_order(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [PLAIN])
        kind, number = environ["PATH_INFO"][1], environ["PATH_INFO"][2:].encode()
        if kind == "s":
            return (part for part in (b"s", b"", number))
        if kind == "l":
            return [number.ljust(100_000, b"l")]
        if kind == "p":
            return [environ["wsgi.input"].read(-1)]
        if kind == "e":
            raise LookupError("nobody home")
        return [b"f", number]

    live = wsgi(app)
    client = live.client()
    kinds = "fslpfefslsfplffs" * 2
    for n, kind in enumerate(kinds):
        target = f"/{kind}{n}"
        client.send(post(b"p%d" % n, target=target) if kind == "p" else get(target))
    bodies = [client.answer().body.rstrip(b"l") for _ in kinds]
    texts = {"l": "{n}", "e": "Internal Server Error\n"}
    expected = [texts.get(k, k + "{n}").format(n=n) for n, k in enumerate(kinds)]
    assert bodies == [text.encode() for text in expected]
    assert live.log.until("LookupError")


# ---- wsgi.early_hints and wsgi.file_wrapper ------------------------------------------

HINT = ("Link", "</style.css>; rel=preload")


def hinting(*fields: Any, behind: Callable[[], object] = int) -> App:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["wsgi.early_hints"](list(fields))
        behind()
        return hello(environ, start_response)

    return app


def test_early_hints_come_before_the_answer(wsgi):
    answer = wsgi(hinting(HINT)).ask()
    hint = (HINT[0].lower(), HINT[1])
    assert (answer.interim, answer.body) == ([(103, [hint])], b"hi")


def test_early_hints_arrive_while_the_app_still_works(wsgi):
    held = Held()
    client = wsgi(hinting(HINT, behind=held.wait)).client()
    client.send(GET)
    assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 103 Early Hints\r\n")
    held.let_go()
    assert client.answer().body == b"hi"


def test_http_1_0_gets_no_hints(wsgi):
    client = wsgi(hinting(HINT)).client()
    client.send(HTTP_1_0)
    assert client.rest().startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("text", FORGED)
def test_forged_hints_are_a_500(wsgi, text):
    live = wsgi(hinting(("X-Mine", text)))
    answer = live.ask()
    assert (answer.status, answer.interim) == (500, [])
    assert live.log.until("ProtocolError")
    assert live.ask(get("/again")).status == 500


def test_hints_for_a_client_that_has_left_harm_nobody(wsgi):
    held = Held()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/held":
            held.wait()
            environ["wsgi.early_hints"]([HINT])
        return hello(environ, start_response)

    live = wsgi(app)
    client = live.client()
    client.send(get("/held"))
    assert held.begun.wait(SOON)
    client.reset()
    held.let_go()
    assert live.ask().body == b"hi"
    assert logged(live) == ""


def test_hints_behind_the_head_are_dropped(wsgi):
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [PLAIN])
        yield b"h"
        environ["wsgi.early_hints"]([HINT])
        yield b"i"

    answer = wsgi(app).ask()
    assert (answer.interim, answer.body) == ([], b"hi")


class File(io.BytesIO):
    """A file that tells how it was read and closed."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.sizes: list[int] = []
        self.done = threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        self.sizes.append(-1 if size is None else size)
        return super().read(size)

    def close(self) -> None:
        self.done.set()
        super().close()


def test_file_wrapper_sends_a_file_in_blocks_and_closes_it(wsgi):
    file = File(b"hello, world")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [PLAIN])
        return environ["wsgi.file_wrapper"](file, 5)

    assert wsgi(app).ask().body == b"hello, world"
    assert file.done.wait(SOON) and set(file.sizes) == {5}


def test_file_wrapper_begins_where_the_file_stands(wsgi):
    file = File(b"hello, world")
    file.seek(7)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [PLAIN])
        return environ["wsgi.file_wrapper"](file)

    assert wsgi(app).ask().body == b"world"


def test_file_wrapper_needs_no_more_than_read(wsgi):
    class Reader:
        def __init__(self) -> None:
            self.read = io.BytesIO(b"hi").read

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [PLAIN])
        return environ["wsgi.file_wrapper"](Reader())

    assert wsgi(app).ask().body == b"hi"


def test_file_wrapper_closes_the_file_when_the_client_leaves(wsgi, tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as large:
        large.truncate(64 << 20)
    file = path.open("rb")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [PLAIN])
        return environ["wsgi.file_wrapper"](file)

    live = wsgi(app)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    client.until(b"\0")
    client.reset()
    live.until(lambda stats: stats["connections"] == 0)
    assert logged(live) == "" and file.closed


def sending(file: Any, fields: Any = (PLAIN,), status: str = "200 OK") -> App:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response(status, list(fields))
        return environ["wsgi.file_wrapper"](file)

    return app


@pytest.mark.parametrize("strict", ITERATED)
@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, None, FILE := bytes(range(256)) * 1000),
        (1000, None, FILE[1000:]),
        (len(FILE), None, b""),
        (len(FILE) - 1, 1, FILE[-1:]),
    ],
)
def test_a_regular_file_is_sent_from_where_it_stands(
    wsgi, tmp_path, strict, offset, length, expected
):
    (tmp_path / "file").write_bytes(FILE)
    file = (tmp_path / "file").open("rb")
    file.seek(offset)
    announced = [("Content-Length", str(length))] if length is not None else []
    live = wsgi(sending(file, [PLAIN, *announced]), strict=strict)
    client = live.client()
    client.send(CLOSING)
    assert client.answer().body == expected and client.rest() == b""
    live.stop()
    assert file.closed


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "304 Not Modified"])
def test_a_file_is_closed_and_not_sent_where_there_is_no_body(
    wsgi, tmp_path, method, status
):
    (tmp_path / "file").write_bytes(FILE)
    file = (tmp_path / "file").open("rb")
    fields = [PLAIN] if status == "200 OK" else []
    live = wsgi(sending(file, fields, status), strict=False)
    client = live.client()
    answer = client.ask(get(method=method))
    whole = status == "200 OK" and method == "GET"
    assert answer.body == (FILE if whole else b"")
    live.stop()
    assert file.closed


def test_a_file_is_sent_as_far_as_its_length_is_announced(wsgi, tmp_path):
    (tmp_path / "file").write_bytes(FILE)
    file = (tmp_path / "file").open("rb")
    file.seek(1000)
    live = wsgi(sending(file, [PLAIN, ("Content-Length", "50000")]), strict=False)
    assert live.ask().body == FILE[1000:51_000]
    live.stop()
    assert file.closed


def test_a_file_shorter_than_announced_is_a_500(wsgi, tmp_path):
    (tmp_path / "file").write_bytes(b"hel")
    file = (tmp_path / "file").open("rb")
    live = wsgi(sending(file, [PLAIN, ("Content-Length", "5")]), strict=False)
    assert refused(live, "shorter than its Content-Length")
    live.stop()
    assert file.closed


# ---- How an app is known -------------------------------------------------------------


class Application:
    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        return hello(environ, start_response)

    def method(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        return hello(environ, start_response)


@pytest.mark.parametrize(
    "app",
    [
        hello,
        Application(),
        Application().method,
        lambda environ, start, x=1: hello(environ, start),
    ],
    ids=["function", "object", "method", "default"],
)
def test_an_app_of_two_parameters_is_a_wsgi_app(serve, app):
    assert serve(app).ask().body == b"hi"


def test_an_app_whose_parameters_do_not_tell_is_refused_without_a_name():
    with pytest.raises(ConfigError, match="interface must be native, wsgi or asgi"):
        Server(validator(hello))
