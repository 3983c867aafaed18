"""The options of Server, its limits, and how it stops, over real sockets."""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live import GET, QUIET, SOON, Client, chunk, descriptors, get, post
from programs import Program

from prefork import ConfigError, Request, RequestError, RequestLimits, Response, Server

STREAMED = get("/", "Transfer-Encoding: chunked", method="POST")
EXPECT = "Expect: 100-continue"
ANNOUNCED = post(b"", EXPECT).replace(b"Length: 0", b"Length: 5")


def hello(request: Request) -> bytes:
    return b"hi"


def echo(request: Request) -> bytes:
    return request.body


async def hello_async(request: Request) -> bytes:
    return b"hi"


# ---- What answers carry --------------------------------------------------------------


@pytest.mark.contract("option: name")
def test_name_is_the_server_field(serve):
    assert serve(hello, name="mine/1.0").ask()["server"] == "mine/1.0"


@pytest.mark.contract(
    "option: no_default_server_header",
    "option: no_default_date",
    "option: no_default_content_type",
)
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("no_default_server_header", "server"),
        ("no_default_date", "date"),
        ("no_default_content_type", "content-type"),
    ],
)
@pytest.mark.parametrize("body", [b"hi", [b"h", b"i"]], ids=["whole", "streamed"])
def test_a_default_field_can_be_left_out(serve, option, name, body):
    answers = [serve(lambda _: body, **{option: on}).ask() for on in (False, True)]
    assert [name in answer for answer in answers] == [True, False]


def test_what_the_app_says_is_sent_where_the_default_is_left_out(serve):
    live = serve(lambda _: Response("hi", headers={"Date": "x"}), no_default_date=True)
    assert live.ask()["date"] == "x"


# ---- Keeping connections -------------------------------------------------------------


@pytest.mark.contract("option: disable_keepalive")
def test_disable_keepalive_closes_each_connection_behind_its_answer(serve):
    client = serve(hello, disable_keepalive=True).client()
    assert client.ask().closes and client.rest() == b""


@pytest.mark.contract("option: max_requests_per_conn")
def test_max_requests_per_conn_announces_the_close_with_the_last_answer(serve):
    client = serve(hello, max_requests_per_conn=3).client()
    client.send(GET * 4)
    assert [client.answer().closes for _ in range(3)] == [False, False, True]
    assert client.rest() == b""


@pytest.mark.contract("option: idle_timeout")
def test_idle_timeout_closes_a_kept_connection_silently(serve):
    client = serve(hello, idle_timeout=0.1).client()
    client.ask()
    assert client.rest() == b""


def test_a_connection_in_use_is_not_idle(serve):
    entered, leave = threading.Event(), threading.Event()

    def handler(request: Request) -> bytes:
        if request.path == "/slow":
            entered.set()
            leave.wait(SOON)
        return b"hi"

    client = serve(handler, idle_timeout=0.05).client()
    client.send(get("/slow"))
    assert entered.wait(SOON) and client.is_quiet()
    leave.set()
    assert client.answer().body == b"hi"


# ---- How many connections ------------------------------------------------------------


@pytest.mark.contract("option: concurrency")
def test_concurrency_refuses_one_connection_too_many_with_503(serve):
    live = serve(hello, concurrency=2, defer_accept=False)
    held = [live.client(), live.client()]
    assert [client.ask().status for client in held] == [200, 200]
    client = live.client()
    answer = client.answer()
    assert (answer.status, answer.closes) == (503, True)
    assert int(answer["retry-after"]) > 0 and client.rest() == b""


def test_a_connection_that_ends_makes_room_for_another(serve):
    live = serve(hello, concurrency=1, defer_accept=False)
    with live.client() as client:
        client.ask()
        refused = live.client()
        assert refused.answer().status == 503
    refused.close()
    live.until(lambda stats: stats["connections"] == 0)
    assert live.ask().status == 200


def test_who_is_over_the_limit_does_not_harm_who_is_under_it(serve):
    live = serve(hello, concurrency=1, defer_accept=False)
    kept = live.client()
    kept.ask()
    for _ in range(300):
        live.client()
    assert [kept.ask().body for _ in range(10)] == [b"hi"] * 10


def test_concurrency_0_is_no_limit(serve):
    live = serve(hello, concurrency=0)
    assert [live.client().ask().status for _ in range(5)] == [200] * 5


@pytest.mark.contract("option: max_conns_per_ip")
def test_max_conns_per_ip_refuses_one_too_many_with_429(serve):
    live = serve(hello, max_conns_per_ip=2, defer_accept=False)
    held = [live.client(), live.client()]
    assert [client.ask().status for client in held] == [200, 200]
    client = live.client()
    answer = client.answer()
    assert (answer.status, answer.closes) == (429, True)
    assert int(answer["retry-after"]) > 0 and client.rest() == b""


def test_max_conns_per_ip_counts_each_address_by_itself(serve):
    live = serve(hello, max_conns_per_ip=1, defer_accept=False)
    live.client().ask()
    other = socket.create_connection(live.address, SOON, ("127.0.0.2", 0))
    with other:
        other.sendall(GET)
        assert other.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_an_address_over_its_limit_takes_no_place_of_others(serve):
    live = serve(hello, concurrency=3, max_conns_per_ip=1, defer_accept=False)
    live.client().ask()
    assert [live.client().answer().status for _ in range(5)] == [429] * 5
    other = socket.create_connection(live.address, SOON, ("127.0.0.2", 0))
    with other:
        other.sendall(GET)
        assert other.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_max_conns_per_ip_counts_who_is_there_and_not_who_was(serve):
    live = serve(hello, max_conns_per_ip=1)
    for _ in range(5):
        assert live.ask().status == 200
        live.until(lambda stats: stats["connections"] == 0)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.contract("option: max_conns_per_ip")
@ipv6
def test_max_conns_per_ip_counts_ipv6_addresses_too(serve):
    options = {"network": "tcp6", "max_conns_per_ip": 1, "defer_accept": False}
    live = serve(hello, "[::1]:0", **options)
    live.client().ask()
    assert live.client().answer().status == 429


# ---- How long ------------------------------------------------------------------------


@pytest.mark.contract("option: header_timeout")
@pytest.mark.parametrize("app", [hello, hello_async], ids=["plain", "async"])
@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n"])
def test_header_timeout_answers_a_head_that_does_not_end_with_408(serve, app, sent):
    live = serve(app, header_timeout=0.1, defer_accept=False)
    client = live.client()
    client.send(sent)
    answer = client.answer()
    assert (answer.status, answer.closes, client.rest()) == (408, True, b"")


def test_header_timeout_is_for_the_whole_head(serve):
    client = serve(hello, header_timeout=0.2).client()
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")
    client.socket.settimeout(0.02)
    deadline = time.monotonic() + SOON
    while not client.unread and time.monotonic() < deadline:
        client.send(b"x")
        try:
            client.unread = client.socket.recv(65536)
        except TimeoutError:
            continue
    client.socket.settimeout(SOON)
    assert client.answer().status == 408


def test_header_timeout_is_for_each_request(serve):
    client = serve(hello, header_timeout=0.1).client()
    client.ask()
    client.send(b"GET / HT")
    assert client.answer().status == 408


@pytest.mark.contract("option: read_timeout")
@pytest.mark.parametrize("app", [echo, hello_async], ids=["plain", "async"])
def test_read_timeout_answers_a_body_that_stalls_with_408(serve, app):
    client = serve(app, read_timeout=0.1).client()
    client.send(post(b"hello")[:-2])
    answer = client.answer()
    assert (answer.status, answer.closes, client.rest()) == (408, True, b"")


def test_min_body_rate_answers_a_body_that_trickles_with_408(serve):
    client = serve(echo, read_timeout=0.1, min_body_rate=10_000).client()
    client.send(post(b"x" * 100_000)[:-99_000])
    client.socket.settimeout(0.02)
    deadline = time.monotonic() + SOON
    while not client.unread and time.monotonic() < deadline:
        client.send(b"x")
        try:
            client.unread = client.socket.recv(65536)
        except TimeoutError:
            continue
    client.socket.settimeout(SOON)
    assert client.answer().status == 408


@pytest.mark.contract("option: write_timeout")
def test_write_timeout_gives_up_a_client_that_does_not_read(serve):
    live = serve(lambda _: bytes(8 << 20), write_timeout=0.1)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    live.until(lambda stats: stats["connections"] == 0 and stats["timeouts"] == 1)
    with pytest.raises(ConnectionResetError):
        client.rest()


# ---- How much ------------------------------------------------------------------------


@pytest.mark.contract("option: max_request_body_size")
def test_max_request_body_size_refuses_an_announced_length_with_413(serve):
    live = serve(echo, max_request_body_size=10)
    assert live.ask(post(b"x" * 10)).body == b"x" * 10
    client = live.client()
    client.send(post(b"x" * 11)[:-11])
    answer = client.answer()
    assert (answer.status, answer.closes) == (413, True)


@pytest.mark.contract("option: max_request_body_size")
def test_max_request_body_size_refuses_chunks_as_they_arrive_with_413(serve):
    live = serve(echo, max_request_body_size=10)
    whole = STREAMED + chunk(b"hello") + chunk(b"world")
    assert live.ask(whole + chunk(b"")).body == b"helloworld"
    client = live.client()
    client.send(whole)
    assert client.is_quiet()
    client.send(chunk(b"!"))
    answer = client.answer()
    assert (answer.status, answer.closes) == (413, True)


def test_an_upload_that_is_refused_reads_its_413_though_it_goes_on_sending(serve):
    client = serve(echo, max_request_body_size=10).client()
    client.send(post(bytes(500_000)))
    assert client.answer().status == 413


@pytest.mark.contract("option: max_header_size")
@pytest.mark.parametrize("size", [100, 255, 256, 257, 4096, 8000])
def test_a_head_may_be_larger_than_the_read_buffer(serve, size):
    live = serve(lambda request: request.headers["x"], read_buffer_size=256)
    assert live.ask(get("/", "X: " + "x" * size)).body == b"x" * size


@pytest.mark.contract("option: max_header_size")
def test_max_header_size_refuses_a_larger_head_with_431(serve):
    sizes = {"max_header_size": 1000, "max_target_size": 500, "max_field_size": 500}
    live = serve(hello, **sizes)
    fields = ["X: " + "x" * 400] * 2
    assert live.ask(get("/", *fields)).status == 200
    answer = live.ask(get("/", *fields, "Y: " + "y" * 300))
    assert (answer.status, answer.closes) == (431, True)


def test_max_header_size_does_not_wait_for_the_end_of_the_head(serve):
    sizes = {"max_header_size": 1000, "max_target_size": 500, "max_field_size": 500}
    client = serve(hello, **sizes).client()
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: xxxx\r\n" * 200)
    assert client.answer().status == 431


@pytest.mark.parametrize(
    ("option", "request_of", "status"),
    [
        ("max_field_size", lambda n: get("/", "X: " + "x" * n), 431),
        ("max_target_size", lambda n: get("/" + "x" * n), 414),
        ("max_fields", lambda n: get("/", *["X: y"] * n), 431),
    ],
)
def test_a_limit_of_the_head_refuses_what_is_over_it(serve, option, request_of, status):
    live = serve(hello, **{option: 50})
    answers = [live.ask(request_of(n)) for n in (40, 60)]
    assert [(a.status, a.closes) for a in answers] == [(200, False), (status, True)]


# ---- What is served at all -----------------------------------------------------------


@pytest.mark.contract("option: get_only")
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get", "X"])
def test_get_only_refuses_other_methods_with_405_and_allow(serve, method):
    answer = serve(hello, get_only=True).ask(get(method=method))
    assert (answer.status, answer["allow"], answer.closes) == (405, "GET, HEAD", True)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_get_only_serves_get_and_head(serve, method):
    assert serve(hello, get_only=True).ask(get(method=method)).status == 200


# ---- Hooks ---------------------------------------------------------------------------


@pytest.mark.contract("option: continue_handler")
def test_continue_handler_may_refuse_with_417(serve):
    live = serve(echo, continue_handler=lambda request: request.path == "/yes")
    answer = live.ask(ANNOUNCED)
    assert (answer.status, answer.interim, answer.closes) == (417, [], True)
    answer = live.ask(ANNOUNCED.replace(b"POST / ", b"POST /yes "), on_100=b"hello")
    assert (answer.body, len(answer.interim)) == (b"hello", 1)


def test_continue_handler_is_not_asked_when_nobody_expects(serve):
    asked = []
    live = serve(echo, continue_handler=lambda request: asked.append(request))
    assert live.ask(post(b"hello")).body == b"hello"
    assert asked == []


@pytest.mark.contract("option: expect_handler")
def test_expect_handler_says_what_who_expects_is_answered(serve):
    statuses = {"/": 100, "/secret": 401}
    live = serve(echo, expect_handler=lambda request: statuses[request.path])
    assert live.ask(ANNOUNCED, on_100=b"hello").body == b"hello"
    answer = live.ask(ANNOUNCED.replace(b"POST / ", b"POST /secret "))
    assert (answer.status, answer.interim, answer.closes) == (401, [], True)


@pytest.mark.parametrize("hook", ["continue_handler", "expect_handler"])
def test_a_hook_that_raises_is_a_500(serve, hook):
    def failing(request: Request) -> Any:
        raise LookupError("in the hook")

    live = serve(echo, **{hook: failing})
    assert live.ask(ANNOUNCED).status == 500
    assert live.log.until("LookupError: in the hook")


def test_header_received_sees_the_request_before_its_body(serve):
    seen: queue.SimpleQueue[tuple[str, str, bool]] = queue.SimpleQueue()

    def look(request: Request) -> None:
        seen.put((request.path, request.headers["host"], request.body_done))

    client = serve(echo, header_received=look).client()
    client.send(post(b"hello", target="/upload")[:-5])
    assert seen.get(timeout=SOON) == ("/upload", "a", False)
    client.send(b"hello")
    assert client.answer().body == b"hello"


@pytest.mark.contract("option: header_received")
@pytest.mark.parametrize("app", [echo, hello_async], ids=["plain", "async"])
def test_header_received_may_limit_the_body_of_one_request(serve, app):
    limits = {"/small": RequestLimits(max_request_body_size=5)}
    live = serve(app, header_received=lambda request: limits.get(request.path))
    statuses = [
        live.ask(post(b"x" * size, target=target)).status
        for target in ("/small", "/")
        for size in (5, 6)
    ]
    assert statuses == [200, 413, 200, 200]


def test_header_received_may_limit_a_chunked_body(serve):
    small = RequestLimits(max_request_body_size=5)
    client = serve(echo, header_received=lambda _: small).client()
    client.send(STREAMED + chunk(b"hello"))
    assert client.is_quiet()
    client.send(chunk(b"!"))
    answer = client.answer()
    assert (answer.status, answer.closes) == (413, True)


def test_header_received_may_raise_the_limit_of_one_request(serve):
    large = RequestLimits(max_request_body_size=100)
    live = serve(echo, header_received=lambda _: large, max_request_body_size=5)
    assert live.ask(STREAMED + chunk(b"x" * 100) + chunk(b"")).body == b"x" * 100
    assert live.ask(post(b"x" * 100)).body == b"x" * 100


@pytest.mark.contract("option: header_received")
def test_header_received_may_set_the_read_timeout_of_one_request(serve):
    hasty = RequestLimits(read_timeout=0.1)
    client = serve(echo, header_received=lambda _: hasty).client()
    client.send(post(b"hello")[:-2])
    assert client.answer().status == 408


def test_header_received_may_set_the_write_timeout_of_one_request(serve):
    hasty = RequestLimits(write_timeout=0.1)
    live = serve(lambda _: bytes(8 << 20), header_received=lambda _: hasty)
    live.client(receive_buffer=4096).send(GET)
    live.until(lambda stats: stats["timeouts"] == 1 and stats["connections"] == 0)


def test_header_received_may_refuse(serve):
    def refuse(request: Request) -> None:
        raise RequestError("go away", 403)

    answer = serve(echo, header_received=refuse).ask(post(b"hello"))
    assert (answer.status, answer.body) == (403, b"go away\n")


def test_header_received_that_raises_is_a_500(serve):
    def failing(request: Request) -> None:
        raise LookupError("in the hook")

    live = serve(echo, header_received=failing)
    assert live.ask().status == 500
    assert live.log.until("LookupError: in the hook")


REFUSED = {
    "malformed": (b"GET / HTTP/1.1\r\nHost: a\r\nX y\r\n\r\n", 400),
    "request-line": (b"GET / HTTX/1.1\r\n\r\n", 400),
    "method": (b"G@T /secret HTTP/1.1\r\n\r\n", 400),
    "target": (b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "version": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "no-host": (b"GET /some/path?query HTTP/1.1\r\nX: y\r\n\r\n", 400),
    "head-size": (get("/", *["X: y"] * 200), 431),
    "body-size": (post(b"x" * 100), 413),
    "chunk": (STREAMED + b"x\r\n", 400),
    "stalled": (b"GET /slow HTTP/1.1\r\nHost", 408),
    "expectation": (get("/", "Expect: miracles"), 417),
}


@pytest.mark.contract("option: error_handler")
@pytest.mark.parametrize("name", REFUSED)
def test_error_handler_words_the_answer_to_a_refused_request(serve, name):
    request, status = REFUSED[name]

    def word(request: Request, error: RequestError) -> Response:
        return Response(f"sorry: {error}", status=error.status, headers={"X": "y"})

    limits = {"max_request_body_size": 50, "header_timeout": 0.1}
    client = serve(echo, error_handler=word, **limits).client()
    client.send(request)
    answer = client.answer()
    assert (answer.status, answer["x"], answer.closes) == (status, "y", True)
    assert answer.body.startswith(b"sorry: ") and client.rest() == b""


@pytest.mark.parametrize("name", REFUSED)
def test_error_handler_may_look_at_what_was_read_of_the_request(serve, name):
    message, status = REFUSED[name]
    kept: list[Request] = []

    def look(request: Request) -> list[Any]:
        names = ("method", "target", "raw_path", "query_string", "path", "http_version")
        return [
            *(getattr(request, n) for n in names),
            request.headers.raw,
            request.body,
        ]

    def word(request: Request, error: RequestError) -> str:
        kept.append(request)
        seen.append(look(request))
        return repr(request)

    seen: list[Any] = []
    limits = {"max_request_body_size": 50, "header_timeout": 0.1}
    live = serve(echo, error_handler=word, **limits)
    client = live.client()
    client.send(message)
    assert client.answer().status == 200
    live.stop()
    assert look(kept[0]) == seen[0]


def test_error_handler_words_what_the_limit_of_one_request_refuses(serve):
    live = serve(
        echo,
        header_received=lambda _: RequestLimits(max_request_body_size=5),
        error_handler=lambda request, error: Response("sorry", status=error.status),
    )
    answer = live.ask(post(b"x" * 10))
    assert (answer.status, answer.body) == (413, b"sorry")


def test_error_handler_may_leave_the_default(serve):
    live = serve(hello, error_handler=lambda request, error: None)
    answer = live.ask(b"GET / HTTP/2.0\r\n\r\n")
    assert (answer.status, answer.closes) == (505, True)


def test_error_handler_that_raises_is_a_500(serve):
    def failing(request: Request, error: RequestError) -> None:
        raise LookupError("in the hook")

    live = serve(hello, error_handler=failing)
    assert live.ask(b"GET / HTTP/2.0\r\n\r\n").status == 500
    assert live.log.until("LookupError: in the hook")


def test_requests_before_the_refused_one_are_answered_first(serve):
    word = lambda request, error: Response("sorry", status=error.status)  # noqa: E731
    client = serve(hello, error_handler=word).client()
    client.send(GET + GET + b"nonsense\r\n\r\n")
    assert [client.answer().status for _ in range(3)] == [200, 200, 400]


class Told:
    """conn_state= that remembers, and can be awaited."""

    def __init__(self) -> None:
        self.states: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def __call__(self, connection: int, state: str) -> None:
        self.states.put((connection, state))

    def next(self) -> tuple[int, str]:
        return self.states.get(timeout=SOON)


@pytest.mark.contract("option: conn_state")
@pytest.mark.parametrize("app", [hello, hello_async], ids=["plain", "async"])
def test_conn_state_tells_the_life_of_a_connection(serve, app):
    told = Told()
    live = serve(app, conn_state=told)
    with live.client() as client:
        client.ask()
        client.ask()
    live.until(lambda stats: stats["connections"] == 0)
    numbers, states = zip(*(told.next() for _ in range(6)), strict=True)
    assert states == ("new", "active", "idle", "active", "idle", "closed")
    assert len(set(numbers)) == 1


@pytest.mark.parametrize("app", [hello, hello_async], ids=["plain", "async"])
def test_conn_state_tells_at_once_also_without_a_request(serve, app):
    told = Told()
    live = serve(app, conn_state=told, defer_accept=False)
    client = live.client()
    assert told.next()[1] == "new"
    client.close()
    assert told.next()[1] == "closed"


def test_conn_state_that_raises_is_logged_and_harms_nobody(serve):
    def failing(connection: int, state: str) -> None:
        raise LookupError("in the hook")

    live = serve(hello, conn_state=failing)
    assert live.ask().body == b"hi"
    assert live.log.until("LookupError: in the hook")


# ---- The log -------------------------------------------------------------------------


def test_what_peers_do_wrong_is_not_logged_by_default(serve):
    live = serve(hello)
    live.ask(b"nonsense\r\n\r\n")
    live.stop()
    assert live.log.text == ""


@pytest.mark.contract("option: log_all_errors")
@pytest.mark.parametrize("app", [hello, hello_async], ids=["plain", "async"])
def test_log_all_errors_logs_at_once_what_peers_do_wrong_and_who_they_are(serve, app):
    live = serve(app, log_all_errors=True)
    client = live.client()
    host, port = client.socket.getsockname()
    client.send(b"nonsense\r\n\r\n")
    assert client.answer().status == 400
    assert f"{host}:{port}: malformed method" in live.log.until("malformed")


def test_log_all_errors_logs_who_stops_reading(serve):
    live = serve(lambda _: bytes(8 << 20), log_all_errors=True, write_timeout=0.1)
    live.client(receive_buffer=4096).send(GET)
    assert live.log.until("the peer stopped reading")


def test_logger_may_be_a_logger(serve, caplog):
    logger = logging.getLogger("mine")
    serve(lambda _: None, logger=logger).ask()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mine", "ERROR")
    assert "TypeError: the handler returned NoneType" in caplog.text


def test_logger_may_be_an_adapter(serve, caplog):
    adapter = logging.LoggerAdapter(logging.getLogger("mine"), {})
    serve(lambda _: None, logger=adapter).ask()
    assert "the handler returned NoneType" in caplog.text


def test_logger_may_be_whatever_has_printf(serve):
    class Printer:
        lines: list[str] = []

        def printf(self, fmt: str, *args: object) -> None:
            self.lines.append(fmt % args)

    live = serve(lambda _: None, logger=Printer())
    live.ask()
    live.stop()
    assert "the handler returned NoneType" in Printer.lines[0]


# ---- Addresses -----------------------------------------------------------------------


def test_a_unix_socket_is_served_and_its_file_removed(serve, tmp_path):
    live = serve(hello, f"unix:{tmp_path}/socket")
    assert live.ask().body == b"hi"
    live.stop()
    assert list(tmp_path.iterdir()) == []


def test_several_addresses_are_served(serve, tmp_path):
    path = f"{tmp_path}/socket"
    live = serve(hello, ["127.0.0.1:0", f"unix:{path}", "127.0.0.2:0"])
    with Client(live.address) as one, Client(path) as other:
        assert [one.ask().body, other.ask().body] == [b"hi", b"hi"]


@ipv6
def test_ipv6_is_served(serve):
    live = serve(lambda request: request.client[0], "[::1]:0", network="tcp6")
    assert live.ask().body == b"::1"


@ipv6
def test_one_listener_serves_both_ip_versions(serve):
    live = serve(hello, ":0", network="tcp")
    port = live.address[1]
    with Client(("127.0.0.1", port)) as four, Client(("::1", port)) as six:
        assert [four.ask().body, six.ask().body] == [b"hi", b"hi"]


def test_an_address_in_use_is_the_true_error_and_leaves_nothing(serve):
    live = serve(hello)
    before = descriptors()
    with pytest.raises(OSError, match="address already in use"):
        Server(hello).listen_and_serve("{}:{}".format(*live.address))
    assert descriptors() == before


def test_sockets_of_the_callers_own_are_served_and_stay_open():
    server = Server(hello, drain_idle=0)
    ready = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        args = {"on_ready": ready.set}
        thread = threading.Thread(target=server.serve, args=[[sock]], kwargs=args)
        thread.start()
        assert ready.wait(SOON)
        with Client(sock.getsockname()) as client:
            assert client.ask().body == b"hi"
        server.shutdown()
        thread.join(SOON)
        assert not thread.is_alive() and sock.fileno() >= 0


@pytest.mark.parametrize("custom", [False, True], ids=["default", "on_master_death"])
def test_the_end_of_the_lifeline_ends_the_server(custom):
    server = Server(hello, drain_idle=0)
    ready, dead = threading.Event(), threading.Event()
    lifeline, end = os.pipe()
    options: dict[str, Any] = {"on_ready": ready.set, "lifeline": lifeline}
    if custom:
        options["on_master_death"] = lambda: (dead.set(), server.shutdown())
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.serve, args=[[sock]], kwargs=options)
        thread.start()
        assert ready.wait(SOON)
        os.close(end)
        thread.join(SOON)
        os.close(lifeline)
        assert not thread.is_alive() and dead.is_set() == custom


# ---- The life of a Server ------------------------------------------------------------


@pytest.mark.parametrize("app", [hello, hello_async], ids=["plain", "async"])
def test_shutdown_ends_a_server_that_nobody_has_used(serve, app):
    live = serve(app)
    live.server.shutdown()
    assert live.ended() is None


@pytest.mark.parametrize("app", [hello, hello_async], ids=["plain", "async"])
def test_shutdown_ends_a_server_with_idle_connections(serve, app):
    live = serve(app, drain_idle=0.1)
    clients = [live.client() for _ in range(3)]
    assert [client.ask().body for client in clients] == [b"hi"] * 3
    live.server.shutdown()
    assert live.ended() is None
    assert [client.rest() for client in clients] == [b""] * 3


def test_shutdown_twice_closes_idle_connections_at_once(serve):
    live = serve(hello, drain_idle=60)
    client = live.client()
    client.ask()
    live.server.shutdown()
    live.server.shutdown()
    assert client.rest() == b"" and live.ended() is None


def test_shutdown_of_a_server_that_does_not_serve_does_nothing():
    Server(hello).shutdown()


def test_shutdown_in_a_handler_still_answers_it(serve):
    def handler(request: Request) -> bytes:
        live.server.shutdown()
        return b"bye"

    live = serve(handler)
    with live.client() as client:
        assert client.ask().body == b"bye"
    assert live.ended() is None


def test_in_a_stop_one_more_request_is_answered_and_the_connection_closed(serve):
    live = serve(hello, drain_idle=60)
    client = live.client()
    client.ask()
    live.server.shutdown()
    live.run(lambda: None)  # behind the stop
    answer = client.ask()
    assert (answer.body, answer.closes, client.rest()) == (b"hi", True, b"")
    client.close()
    assert live.ended() is None


@pytest.mark.contract("option: close_on_shutdown")
def test_close_on_shutdown_may_be_left_out(serve):
    live = serve(hello, drain_idle=60, close_on_shutdown=False)
    client = live.client()
    client.ask()
    live.server.shutdown()
    live.run(lambda: None)
    assert not client.ask().closes
    live.server.shutdown()
    assert client.rest() == b"" and live.ended() is None


def test_a_server_can_serve_again(serve):
    live = serve(hello)
    live.ask()
    live.stop()
    ready = threading.Event()
    again = threading.Thread(
        target=live.server.listen_and_serve,
        args=["127.0.0.1:0"],
        kwargs={"on_ready": lambda _: ready.set()},
    )
    again.start()
    assert ready.wait(SOON)
    with Client(live.server.address) as client:
        assert client.ask().body == b"hi"
    live.server.shutdown()
    again.join(SOON)
    assert not again.is_alive()


def test_a_server_does_not_serve_twice_at_the_same_time(serve):
    live = serve(hello)
    with pytest.raises(RuntimeError, match="serves already"):
        live.server.listen_and_serve("127.0.0.1:0")
    assert live.ask().body == b"hi"
    live.stop()


def test_what_on_ready_raises_ends_the_server_and_leaves_nothing():
    def failing(server: Server) -> None:
        raise LookupError("not ready")

    before = descriptors()
    with pytest.raises(LookupError, match="not ready"):
        Server(hello).listen_and_serve("127.0.0.1:0", on_ready=failing)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("app", "options", "text"),
    [
        (b"no", {}, "app must be callable"),
        (hello, {"workers": 2}, "workers is no option of Server"),
        (hello, {"idle_timeout": 0}, "idle_timeout must be at least"),
        (hello, {"conn_state": 5}, "conn_state must be callable"),
    ],
)
def test_a_wrong_option_is_told_when_the_server_is_made(app, options, text):
    with pytest.raises(ConfigError, match=text):
        Server(app, **options)


# ---- Peers that leave ----------------------------------------------------------------


@pytest.mark.parametrize("app", [hello, hello_async], ids=["plain", "async"])
def test_a_client_that_sends_no_more_is_answered(serve, app):
    client = serve(app).client()
    client.send(GET + GET)
    client.half_close()
    assert [client.answer().body for _ in range(2)] == [b"hi"] * 2
    assert client.rest() == b""


def test_a_client_that_sends_no_more_gets_a_large_answer_whole(serve):
    body = os.urandom(8 << 20)
    client = serve(lambda _: body).client(receive_buffer=4096)
    client.send(GET)
    client.half_close()
    assert client.answer().body == body


def test_a_client_that_sends_no_more_gets_a_stream_whole(serve):
    parts = [os.urandom(50_000) for _ in range(40)]
    client = serve(lambda _: parts).client(receive_buffer=4096)
    client.send(GET)
    client.half_close()
    assert client.answer().body == b"".join(parts)


@pytest.mark.parametrize(
    "sent", [b"GET / HT", post(b"hello")[:-2], STREAMED + b"5\r\n"]
)
def test_a_request_that_ends_too_early_is_answered_400(serve, sent):
    client = serve(echo).client()
    client.send(sent)
    client.half_close()
    answer = client.answer()
    assert (answer.status, answer.closes, client.rest()) == (400, True, b"")


def test_a_client_that_never_says_anything_is_closed_silently(serve):
    client = serve(hello, defer_accept=False).client()
    client.half_close()
    assert client.rest() == b""


STAGES: dict[str, bytes] = {
    "nothing": b"",
    "half-a-head": GET[:-4],
    "a-request": GET,
    "a-pipeline": GET * 50,
    "half-a-body": post(bytes(100_000))[:-50_000],
    "half-a-chunk": STREAMED + b"ffff\r\nabc",
    "a-100": ANNOUNCED,
    "large": get("/large"),
    "stream": get("/stream"),
    "nonsense": b"\x16\x03\x01" * 100,
}


def mixed(request: Request) -> Any:
    if request.path == "/large":
        return bytes(1 << 20)
    if request.path == "/stream":
        return (bytes(1000) for _ in range(1000))
    return request.body


async def mixed_async(request: Request) -> Any:
    if request.path in ("/large", "/stream"):
        return mixed(request)
    return await request.read()


@pytest.mark.parametrize("app", [mixed, mixed_async], ids=["plain", "async"])
@pytest.mark.parametrize("early", [False, True], ids=["whole", "early"])
def test_a_storm_of_resets_leaves_nothing(serve, app, early):
    live = serve(app, stream_request_body=early, defer_accept=False)
    live.ask()
    live.until(lambda stats: stats["connections"] == 0)
    before = descriptors()
    for _ in range(15):
        clients = [live.client() for _ in STAGES]
        for client, sent in zip(clients, STAGES.values(), strict=True):
            client.send(sent)
        for client in clients:
            client.reset()
    total = len(live.clients)
    live.until(lambda stats: stats["closed"] == total and stats["lent"] == 0)
    assert live.stats()["buffers_in_use"] == 0 and descriptors() == before
    assert live.ask(post(b"hello")).body == b"hello"


def test_an_idle_connection_holds_no_buffer(serve):
    live = serve(hello, defer_accept=False)
    clients = [live.client() for _ in range(20)]
    assert [client.ask().body for client in clients[:10]] == [b"hi"] * 10
    live.until(lambda stats: stats["connections"] == 20)
    assert live.stats()["buffers_in_use"] == 0


# ---- Stopping a program --------------------------------------------------------------

PRELUDE = """
import os, resource, signal
from prefork import Server

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

class Telling(Server):
    def _drain(self, *args):
        super()._drain(*args)
        say("draining")

def ready(server):
    say("ready", *server.address)

def echo(request):
    return request.body

async def echo_async(request):
    return await request.read()

def run(app, **options):
    Telling(app, **options).listen_and_serve("127.0.0.1:0", on_ready=ready)
    say("returned")
"""

Start = Callable[[str], Program]


@pytest.fixture
def start() -> Iterator[Start]:
    """Run lines of Python behind PRELUDE; in the end no process is left."""
    programs: list[Program] = []

    def start(lines: str) -> Program:
        programs.append(Program(["-c", PRELUDE + textwrap.dedent(lines)]))
        return programs[-1]

    yield start
    for program in programs:
        with program:
            pass


def connected(program: Program) -> Callable[[], Client]:
    """Await that it accepts; what makes connections to it."""
    host, port = program.until("ready")
    return lambda: Client((host, int(port)))


def ends(program: Program) -> None:
    """Await its orderly end."""
    assert program.wait() == 0, program.stderr
    assert program.events("returned") and program.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
@pytest.mark.parametrize("app", ["echo", "echo_async"])
@pytest.mark.parametrize("early", [False, True], ids=["whole", "early"])
def test_a_signal_lets_what_is_under_way_finish(start, number, app, early):
    program = start(f"run({app}, stream_request_body={early})")
    with connected(program)() as client:
        client.send(post(b"hello")[:-2])
        assert client.is_quiet()
        program.signal(number)
        program.until("draining")
        client.send(b"lo")
        answer = client.answer()
        assert (answer.body, answer.closes) == (b"hello", True)
    ends(program)


@pytest.mark.contract("better: drain")
@pytest.mark.parametrize("app", ["echo", "echo_async"])
def test_a_signal_lets_a_head_that_is_half_sent_come_whole(start, app):
    program = start(f"run({app}, drain_idle=0)")
    with connected(program)() as client:
        client.send(GET[:-2])
        assert client.is_quiet()
        program.signal(signal.SIGTERM)
        program.until("draining")
        assert client.is_quiet()
        client.send(GET[-2:])
        answer = client.answer()
        assert (answer.status, answer.closes, client.rest()) == (200, True, b"")
    ends(program)


def test_in_a_stop_a_head_that_does_not_end_has_no_more_than_header_timeout(start):
    program = start("run(echo, header_timeout=0.3, drain_idle=60)")
    with connected(program)() as client:
        client.send(GET[:-2])
        program.signal(signal.SIGTERM)
        program.until("draining")
        answer = client.answer()
        assert (answer.status, answer.closes, client.rest()) == (408, True, b"")
    ends(program)


@pytest.mark.contract("better: drain")
@pytest.mark.parametrize("app", ["echo", "echo_async"])
def test_a_signal_leaves_an_idle_connection_one_more_request(start, app):
    program = start(f"run({app}, drain_idle=60)")
    with connected(program)() as client:
        client.ask()
        program.signal(signal.SIGTERM)
        program.until("draining")
        answer = client.ask(post(b"last"))
        assert (answer.body, answer.closes, client.rest()) == (b"last", True, b"")
    ends(program)


@pytest.mark.contract("better: drain")
@pytest.mark.parametrize("app", ["echo", "echo_async"])
def test_a_signal_closes_idle_connections_after_drain_idle(start, app):
    program = start(f"run({app}, drain_idle=0.1)")
    with connected(program)() as client:
        client.ask()
        program.signal(signal.SIGTERM)
        assert client.rest() == b""
    ends(program)


def test_a_second_signal_closes_idle_connections_at_once(start):
    program = start("run(echo, drain_idle=60)")
    connect = connected(program)
    with connect() as idle, connect() as busy:
        idle.ask()
        busy.send(post(b"hello")[:-2])
        assert busy.is_quiet()
        for _ in range(2):
            program.signal(signal.SIGTERM)
            program.until("draining")
        assert idle.rest() == b""
        busy.send(b"lo")
        assert busy.answer().body == b"hello"
    ends(program)


def test_after_a_stop_nobody_listens(start):
    program = start("run(echo)")
    connect = connected(program)
    program.signal(signal.SIGTERM)
    ends(program)
    with pytest.raises(ConnectionRefusedError):
        connect()


def test_signals_are_given_back_after_serving(start):
    program = start("""
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        run(echo)
        after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        say("same", before == after, signal.set_wakeup_fd(-1))
    """)
    connected(program)
    program.signal(signal.SIGTERM)
    assert program.until("same") == ["True", "-1"]
    ends(program)


def test_a_handler_of_another_signal_runs_while_the_server_is_idle(start):
    program = start("""
        signal.signal(signal.SIGUSR1, lambda *_: say("usr1"))
        run(echo)
    """)
    connected(program)
    program.signal(signal.SIGUSR1)
    program.until("usr1")
    program.signal(signal.SIGTERM)
    ends(program)


def ticks(pid: int) -> int:
    """Clock ticks of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("app", ["echo", "echo_async"])
def test_who_runs_out_of_descriptors_neither_spins_nor_loses_anybody(start, app):
    program = start(f"""
        def ready(server, ready=ready):
            lowest = os.dup(0)
            os.close(lowest)
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 16, hard))
            ready(server)
        run({app})
    """)
    connect = connected(program)
    clients = [connect() for _ in range(30)]
    for n, client in enumerate(clients):
        client.send(post(b"%d" % n))
    answered = awaited(clients)
    assert 0 < len(answered) < len(clients)
    before = ticks(program.pid)
    select.select([c.socket for c in clients if c not in answered], [], [], QUIET)
    assert ticks(program.pid) - before <= QUIET * os.sysconf("SC_CLK_TCK") / 3
    left = clients.copy()
    while left:
        answered = awaited(left)
        assert answered
        for client in answered:
            assert client.answer().body == b"%d" % clients.index(client)
            client.close()
            left.remove(client)
    program.signal(signal.SIGTERM)
    ends(program)


def awaited(clients: list[Client]) -> list[Client]:
    """The clients that have something to read, once nothing more comes for a while."""
    ready: list[Client] = []
    timeout = SOON
    while True:
        waiting = [c for c in clients if c not in ready]
        found = select.select([c.socket for c in waiting], [], [], timeout)[0]
        if not found:
            return ready
        ready += [c for c in waiting if c.socket in found]
        timeout = QUIET


@pytest.mark.contract("better: drain")
def test_who_said_that_it_drains_accepts_nobody_any_more():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
        server = Server(lambda request: b"", drain_idle=0)
        late: list[socket.socket] = []
        server.serve(
            [sock],
            on_ready=server.shutdown,
            on_drain=lambda: late.append(socket.create_connection(address)),
        )
        sock.settimeout(SOON)
        conn, peer = sock.accept()  # by whoever takes its place
        with conn, late[0]:
            assert peer == late[0].getsockname()
