"""The crew (threads=): who runs a handler, who leads, and what goes on meanwhile.

Handlers block on events and barriers that the tests hold. A handler has *lost the lead*
once another thread runs the loop: in_another_thread() waits for that.
"""

from __future__ import annotations

import contextvars
import ctypes
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

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
    Log,
    chunk,
    get,
    post,
)
from programs import Program

from prefork import ClientDisconnected, ConfigError, Request, Response, Server

PLAIN = ("Content-Type", "text/plain")
INTERFACES = ["native", "wsgi"]
THREADS = 4


class Crowd:
    """Handlers that block at the same time, and are let go together."""

    def __init__(self, size: int) -> None:
        self.all_in = threading.Barrier(size + 1)
        self.go = threading.Event()

    def wait(self) -> None:
        """In a handler."""
        self.all_in.wait(SOON)
        assert self.go.wait(SOON)


def app_of(interface: str, blocking: Callable[[], object], path: str = "/slow") -> Any:
    """An app that calls blocking() at one path, and answers hi."""

    def handler(request: Request) -> bytes:
        if request.path == path:
            blocking()
        return b"hi"

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == path:
            blocking()
        start_response("200 OK", [PLAIN])
        return [b"hi"]

    return {"native": handler, "wsgi": app}[interface]


@pytest.fixture(params=INTERFACES)
def interface(request) -> str:
    return request.param


def block(live: Live, crowd: Crowd, count: int) -> list[Client]:
    """Have so many handlers block."""
    clients = [live.client() for _ in range(count)]
    for client in clients:
        client.send(get("/slow"))
    crowd.all_in.wait(SOON)
    return clients


def logged(live: Live) -> str:
    live.stop()
    return live.log.text


# ---- How many at a time --------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 4, 32])
def test_as_many_handlers_as_threads_block_at_the_same_time(serve, interface, threads):
    crowd = Crowd(threads)
    live = serve(app_of(interface, crowd.wait), threads=threads)
    clients = block(live, crowd, threads)
    crowd.go.set()
    assert [client.answer().body for client in clients] == [b"hi"] * threads


def test_handlers_block_at_the_same_time_again_and_again(serve, interface):
    barrier = threading.Barrier(THREADS)
    live = serve(app_of(interface, lambda: barrier.wait(SOON)), threads=THREADS)
    clients = [live.client() for _ in range(THREADS)]
    for _ in range(50):
        for client in clients:
            client.send(get("/slow"))
        assert [client.answer().body for client in clients] == [b"hi"] * THREADS


def test_one_handler_more_than_threads_waits_for_one_of_them(serve, interface):
    crowd, entered = Crowd(THREADS), []

    def blocking() -> None:
        entered.append(threading.get_ident())
        if len(entered) <= THREADS:
            crowd.wait()

    live = serve(app_of(interface, blocking), threads=THREADS)
    clients = block(live, crowd, THREADS)
    last = live.client()
    last.send(get("/slow"))
    assert last.is_quiet() and len(entered) == THREADS
    crowd.go.set()
    assert [client.answer().body for client in [*clients, last]] == [b"hi"] * 5


def test_who_waits_for_a_thread_and_leaves_is_not_served(serve, interface):
    crowd, entered = Crowd(THREADS), []

    def blocking() -> None:
        entered.append(threading.get_ident())
        crowd.wait()

    live = serve(app_of(interface, blocking), threads=THREADS)
    clients = block(live, crowd, THREADS)
    last = live.client()
    last.send(get("/slow"))
    live.until(lambda stats: stats["lent"] == THREADS + 1)
    last.reset()
    live.until(lambda stats: stats["connections"] == THREADS)
    crowd.go.set()
    assert [client.answer().body for client in clients] == [b"hi"] * THREADS
    assert len(entered) == THREADS and logged(live) == ""


def test_requests_that_wait_for_a_thread_are_served_in_order(serve, interface):
    crowd, order = Crowd(2), []

    def handler(request: Request) -> bytes:
        if request.path == "/slow":
            crowd.wait()
        order.append(request.path)
        return request.body

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/slow":
            crowd.wait()
        order.append(environ["PATH_INFO"])
        start_response("200 OK", [PLAIN])
        return [environ["wsgi.input"].read()]

    live = serve({"native": handler, "wsgi": app}[interface], threads=2)
    block(live, crowd, 2)
    clients = [live.client() for _ in range(10)]
    for n, client in enumerate(clients):
        client.send(post(b"%d" % n, target=f"/{n}"))
        live.until(lambda stats, n=n: stats["lent"] == 3 + n)
    crowd.go.set()
    bodies = [client.answer().body for client in clients]
    assert bodies == [b"%d" % n for n in range(10)]
    assert set(order) == {"/slow", *(f"/{n}" for n in range(10))}


def test_a_large_upload_may_wait_for_a_thread(serve):
    crowd, body = Crowd(2), os.urandom(4 << 20)

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/slow":
            crowd.wait()
        start_response("200 OK", [PLAIN])
        return [environ["wsgi.input"].read()]

    live = serve(app, threads=2, body_buffer_size=65536)
    block(live, crowd, 2)
    uploader = live.client()
    uploader.send(post(body))
    live.until(lambda stats: stats["lent"] == 3)
    crowd.go.set()
    assert uploader.answer().body == body


@pytest.mark.filterwarnings("error")  # of files that only the collector closes
def test_a_large_upload_that_leaves_while_it_waits_leaves_no_file(serve):
    crowd = Crowd(2)
    live = serve(app_of("wsgi", crowd.wait), threads=2, body_buffer_size=65536)
    block(live, crowd, 2)
    uploader = live.client()
    uploader.send(post(bytes(4 << 20)))
    live.until(lambda stats: stats["lent"] == 3)
    uploader.reset()
    live.until(lambda stats: stats["connections"] == 2)
    crowd.go.set()


def test_an_async_handler_has_one_thread():
    async def handler(request: Request) -> bytes:
        return b"hi"

    with pytest.raises(ConfigError, match="threads must be 1, not 2"):
        Server(handler, threads=2).listen_and_serve("127.0.0.1:0")


# ---- What goes on while handlers block -----------------------------------------------


def test_fast_requests_are_served_while_all_but_one_handler_block(serve, interface):
    crowd = Crowd(THREADS - 1)
    live = serve(app_of(interface, crowd.wait), threads=THREADS)
    clients = block(live, crowd, THREADS - 1)
    with live.client() as fast:
        assert [fast.ask().body for _ in range(100)] == [b"hi"] * 100
    crowd.go.set()
    assert [client.answer().body for client in clients] == [b"hi"] * (THREADS - 1)


@pytest.mark.parametrize("count", [1, THREADS - 1, THREADS])
def test_bad_requests_are_refused_while_handlers_block(serve, interface, count):
    crowd = Crowd(count)
    live = serve(app_of(interface, crowd.wait), threads=THREADS)
    block(live, crowd, count)
    assert live.ask(get("/", "No colon")).status == 400
    crowd.go.set()


@pytest.mark.parametrize("count", [1, THREADS - 1, THREADS])
def test_deadlines_are_kept_while_handlers_block(serve, interface, count):
    crowd = Crowd(count)
    live = serve(app_of(interface, crowd.wait), threads=THREADS, header_timeout=0.05)
    block(live, crowd, count)
    assert live.ask(b"GET / HT").status == 408
    crowd.go.set()


@pytest.mark.parametrize("count", [1, THREADS - 1, THREADS])
def test_large_answers_are_sent_while_handlers_block(serve, interface, count):
    crowd, body = Crowd(count), os.urandom(4 << 20)

    def handler(request: Request) -> bytes:
        return crowd.wait() or b"hi" if request.path == "/slow" else body

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [PLAIN])
        return [crowd.wait() or b"hi" if environ["PATH_INFO"] == "/slow" else body]

    live = serve({"native": handler, "wsgi": app}[interface], threads=THREADS)
    reader = live.client(receive_buffer=4096)
    reader.send(GET)
    live.until(lambda stats: stats["bytes_out"] > 0)
    block(live, crowd, count)
    assert reader.answer().body == body
    crowd.go.set()


def test_uploads_are_taken_in_while_all_handlers_block(serve, interface):
    crowd = Crowd(THREADS)
    live = serve(app_of(interface, crowd.wait), threads=THREADS)
    block(live, crowd, THREADS)
    with live.client() as uploader:
        uploader.send(post(bytes(4 << 20)))
        live.until(lambda stats: stats["bytes_in"] > 4 << 20)
        crowd.go.set()
        assert uploader.answer().body == b"hi"


def test_an_answer_of_the_same_batch_does_not_wait_for_a_blocked_handler(
    serve, interface
):
    held = Held()
    live = serve(app_of(interface, held.wait), threads=2)
    first, second = live.client(), live.client()
    first.send(get("/slow"))
    second.send(GET)
    assert second.answer().body == b"hi"
    held.let_go()
    assert first.answer().body == b"hi"


def test_a_pipelined_request_waits_for_the_blocked_one_before_it(serve, interface):
    held = Held()
    live = serve(app_of(interface, held.wait), threads=THREADS)
    client = live.client()
    client.send(get("/slow") + GET)
    assert held.begun.wait(SOON) and client.is_quiet()
    held.let_go()
    assert [client.answer().body for _ in range(2)] == [b"hi"] * 2


def test_other_threads_call_into_the_loop_while_all_handlers_block(serve, interface):
    crowd = Crowd(THREADS)
    live = serve(app_of(interface, crowd.wait), threads=THREADS)
    block(live, crowd, THREADS)
    assert live.run(threading.get_ident) != threading.get_ident()
    crowd.go.set()


# ---- The main thread, signals and the end --------------------------------------------

MAIN = """
import os, signal, sys, threading
from prefork import Server

blocked, go = threading.Barrier(4), threading.Event()

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def blocking():
    if blocked.wait(20) == 0:
        say("blocked")
    go.wait(20)

def act(path):
    say("thread", threading.current_thread() is threading.main_thread())
    if path == "/slow":
        blocking()
    elif path == "/forever":
        say("forever")
        threading.Event().wait()
    elif path == "/exit":
        sys.exit(3)

def handler(request):
    act(request.path)
    return b"hi"

def app(environ, start_response):
    act(environ["PATH_INFO"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hi"]

def on_usr1(number, frame):
    say("signal", threading.current_thread() is threading.main_thread())

def on_usr2(number, frame):
    go.set()

def on_alrm(number, frame):
    raise LookupError

signal.signal(signal.SIGUSR1, on_usr1)
signal.signal(signal.SIGUSR2, on_usr2)
signal.signal(signal.SIGALRM, on_alrm)
try:
    Server(globals()[sys.argv[1]], threads=4, drain_idle=0).listen_and_serve(
        "127.0.0.1:0", on_ready=lambda server: say("ready", server.address[1])
    )
except LookupError:
    for thread in threading.enumerate()[1:]:
        thread.join(10)
say("returned", threading.active_count())
"""


@pytest.fixture(params=["handler", "app"])
def program(request) -> Iterator[Program]:
    with Program(["-c", MAIN, request.param]) as program:
        yield program
        if program.process.poll() is None:
            program.signal(signal.SIGUSR2)
            program.signal(signal.SIGTERM)
        assert program.wait() in (0, 3), program.stderr
        assert program.stderr == ""


def four_blocked(program: Program) -> list[Client]:
    """Clients whose handlers block, and one that is idle."""
    (port,) = program.until("ready")
    *clients, idle = [Client(("127.0.0.1", int(port))) for _ in range(5)]
    idle.ask()
    for client in clients:
        client.send(get("/slow"))
    program.until("blocked")
    return [*clients, idle]


def close(clients: list[Client]) -> None:
    for client in clients:
        client.close()


def test_the_main_thread_runs_no_handler(program):
    clients = four_blocked(program)
    program.signal(signal.SIGUSR2)
    assert [client.answer().body for client in clients[:4]] == [b"hi"] * 4
    close(clients)
    assert program.events("thread") == [["thread", "False"]] * 5


def test_signals_are_answered_while_all_handlers_block(program):
    clients = four_blocked(program)
    program.signal(signal.SIGUSR1)
    assert program.until("signal") == ["True"]
    close(clients)


def test_a_drain_waits_for_blocked_handlers(program):
    *clients, idle = four_blocked(program)
    program.signal(signal.SIGTERM)
    assert idle.rest() == b""  # so it has begun
    program.signal(signal.SIGUSR2)
    answers = [client.answer() for client in clients]
    assert [(a.body, a.closes) for a in answers] == [(b"hi", True)] * 4
    close([*clients, idle])
    assert program.until("returned") == ["1"] and program.wait() == 0


def test_a_signal_whose_handler_raises_ends_the_crew(program):
    (port,) = program.until("ready")
    with Client(("127.0.0.1", int(port))) as client:
        client.ask()
        program.signal(signal.SIGALRM)
        assert program.until("returned") == ["1"] and program.wait() == 0


def test_an_exit_ends_the_process_while_other_handlers_block(program):
    clients = four_blocked(program)
    program.signal(signal.SIGUSR2)
    for client in clients[:4]:
        client.answer()
    clients[0].send(get("/forever"))
    program.until("forever")
    answer = clients[1].ask(get("/exit"))
    close(clients)
    assert (answer.status, program.wait()) == (500, 3)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("lost", [False, True], ids=["leading", "lead lost"])
def test_an_exit_in_a_handler_ends_the_server(serve, interface, error, lost):
    def blocking() -> None:
        if lost:
            live.run(threading.get_ident)
        raise error

    live = serve(app_of(interface, blocking), threads=THREADS)
    client = live.client()
    client.send(get("/slow"))
    assert client.answer().status == 500
    assert live.ended() is error


# ---- Clients that leave --------------------------------------------------------------


def test_a_client_that_leaves_its_blocked_handler_harms_nobody(serve, interface):
    held = Held()
    live = serve(app_of(interface, held.wait), threads=2)
    client = live.client()
    client.send(get("/slow"))
    assert held.begun.wait(SOON)
    client.reset()
    live.until(lambda stats: stats["connections"] == 0)
    held.let_go()
    live.until(lambda stats: stats["lent"] == 0)
    assert live.ask().body == b"hi" and logged(live) == ""


def test_a_handler_whose_client_has_left_still_has_its_request(serve, interface):
    held, seen = Held(), []

    def handler(request: Request) -> bytes:
        held.wait()
        seen.append((request.path, request.headers["x-mine"], request.body))
        seen.append(request.client)
        return b""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        held.wait()
        body = environ["wsgi.input"].read()
        seen.append((environ["PATH_INFO"], environ["HTTP_X_MINE"], body))
        seen.append((environ["REMOTE_ADDR"], int(environ["REMOTE_PORT"])))
        start_response("200 OK", [PLAIN])
        return [b""]

    live = serve({"native": handler, "wsgi": app}[interface], threads=2)
    client = live.client()
    address = client.socket.getsockname()
    client.send(post(b"hello", "X-Mine: 1", target="/x"))
    assert held.begun.wait(SOON)
    client.reset()
    live.until(lambda stats: stats["connections"] == 0)
    held.let_go()
    live.stop()
    assert seen == [("/x", "1", b"hello"), address]


# ---- Answers from a thread that has lost the lead ------------------------------------

BIG = bytes(range(256)) * 2000


def parts() -> Iterator[bytes]:
    yield b"h"
    yield b""
    yield b"i"


NATIVE: dict[str, tuple[Callable[[], Any], bytes]] = {
    "bytes": (lambda: b"hi", b"hi"),
    "str": (lambda: "hi", b"hi"),
    "bytearray": (lambda: bytearray(b"hi"), b"hi"),
    "large": (lambda: BIG, BIG),
    "Response": (lambda: Response(b"hi"), b"hi"),
    "Response-with-headers": (lambda: Response("hi", headers={"X": "y"}), b"hi"),
    "Response-large": (lambda: Response(BIG, headers={"X": "y"}), BIG),
    "list": (lambda: [b"h", "i"], b"hi"),
    "generator": (parts, b"hi"),
    "Response-generator": (lambda: Response(parts(), headers={"X": "y"}), b"hi"),
    "generator-large": (lambda: iter([BIG] * 10), BIG * 10),
}
WSGI: dict[str, tuple[Callable[[Any], Any], bytes]] = {
    "list": (lambda write: [b"hi"], b"hi"),
    "list-of-two": (lambda write: [b"h", b"i"], b"hi"),
    "empty-list": (lambda write: [], b""),
    "tuple": (lambda write: (b"hi",), b"hi"),
    "generator": (lambda write: parts(), b"hi"),
    "write": (lambda write: [write(b"h"), write(b"i")][:0], b"hi"),
    "write-and-list": (lambda write: [write(b"h") or b"i"], b"hi"),
    "large": (lambda write: [BIG], BIG),
    "large-list": (lambda write: [BIG] * 10, BIG * 10),
    "large-generator": (lambda write: (BIG for _ in range(10)), BIG * 10),
    "large-write": (lambda write: [write(BIG) for _ in range(10)][:0], BIG * 10),
}


@pytest.mark.parametrize("kind", NATIVE)
def test_a_handler_that_has_lost_the_lead_is_answered(serve, kind):
    result, expected = NATIVE[kind]

    def handler(request: Request) -> Any:
        live.run(threading.get_ident)
        return result()

    live = serve(handler, threads=2)
    client = live.client()
    assert [client.ask().body for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize("kind", WSGI)
def test_an_app_that_has_lost_the_lead_is_answered(serve, kind):
    result, expected = WSGI[kind]

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        live.run(threading.get_ident)
        return result(start_response("200 OK", [PLAIN]))

    live = serve(app, threads=2)
    client = live.client()
    assert [client.ask().body for _ in range(3)] == [expected] * 3


def test_an_app_may_lose_the_lead_in_each_block(serve):
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [PLAIN])
        for n in range(10):
            live.run(threading.get_ident)
            yield b"%d" % n

    live = serve(app, threads=2)
    assert live.ask().body == b"0123456789"


def test_a_native_stream_may_lose_the_lead_in_each_part(serve):
    def handler(request: Request) -> Iterator[bytes]:
        for n in range(10):
            live.run(threading.get_ident)
            yield b"%d" % n

    live = serve(handler, threads=2)
    assert live.ask().body == b"0123456789"


def test_a_native_stream_that_lost_the_lead_is_closed_when_its_reader_leaves(serve):
    endless = Endless()

    def pull() -> Iterator[bytes]:
        for part in (stream := iter(endless)):
            live.run(threading.get_ident)
            try:
                yield part
            except GeneratorExit:
                stream.close()
                raise

    live = serve(lambda request: pull(), threads=2)
    client = live.client()
    client.send(GET)
    client.until(b"xxx")
    client.reset()
    assert endless.closed.wait(SOON)
    live.until(lambda stats: stats["connections"] == 0)
    assert logged(live) == ""


def test_a_stream_that_lost_the_lead_is_not_pulled_far_ahead(serve):
    endless = Endless()

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [PLAIN])
        live.run(threading.get_ident)
        return iter(endless)

    live = serve(app, threads=2, write_timeout=0.2)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    assert endless.closed.wait(SOON)
    size = len(endless.part)
    assert endless.pulled - live.stats()["bytes_out"] <= 2 * HIGH_WATER + size
    assert logged(live) == ""


@pytest.mark.parametrize("body", [b"", b"body"])
def test_a_request_may_be_kept_after_the_answer(serve, body):
    kept: list[Request] = []

    def handler(request: Request) -> bytes:
        live.run(threading.get_ident)
        kept.append(request)
        return b"hi"

    live = serve(handler, threads=2)
    live.ask(post(body, "X-Mine: 1", target="/a?b"))
    live.stop()
    (request,) = kept
    told = (request.path, request.query_string, request.headers["x-mine"], request.body)
    assert told == ("/a", b"b", "1", body)


def test_a_handler_that_has_lost_the_lead_may_raise(serve, interface):
    def blocking() -> None:
        live.run(threading.get_ident)
        raise LookupError("nobody home")

    live = serve(app_of(interface, blocking), threads=2)
    client = live.client()
    assert [client.ask(get(path)).status for path in ("/slow", "/")] == [500, 200]
    text = live.log.until("LookupError: nobody home")
    assert "Traceback" in text and 'raise LookupError("nobody home")' in text


def test_who_logs_a_failure_has_not_borrowed_the_loop(serve, interface):
    """A logger may take its time: the loop's thread could not wake meanwhile."""
    borrowed: list[bool] = []

    class Slow(Log):
        def printf(self, fmt: str, *args: object) -> None:
            borrowed.append(live.core.borrowed)
            super().printf(fmt, *args)

    def blocking() -> None:
        live.run(threading.get_ident)
        raise LookupError("nobody home")

    live = serve(app_of(interface, blocking), threads=2, logger=Slow())
    client = live.client()
    for _ in range(20):
        assert client.ask(get("/slow")).status == 500
    live.stop()
    assert borrowed == [False] * 20


def test_a_stream_that_has_lost_the_lead_may_raise(serve, interface):
    def parts() -> Iterator[bytes]:
        yield b"begun"
        live.run(threading.get_ident)
        raise LookupError("nobody home")

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [PLAIN])
        return parts()

    live = serve({"native": lambda r: parts(), "wsgi": app}[interface], threads=2)
    with pytest.raises(h11.RemoteProtocolError):
        live.ask()
    assert live.log.until("LookupError: nobody home")


def test_an_answer_that_breaks_the_protocol_is_a_500(serve, interface):
    fields = [("X-Mine", "a\nb")]

    def handler(request: Request) -> Response:
        live.run(threading.get_ident)
        return Response(b"hi", headers=fields)

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        live.run(threading.get_ident)
        start_response("200 OK", fields)
        return [b"hi"]

    live = serve({"native": handler, "wsgi": app}[interface], threads=2)
    assert live.ask().status == 500 and live.log.until("'X-Mine': 'a\\nb'")


def test_early_hints_of_a_handler_that_has_lost_the_lead_come_first(serve):
    hint = ("link", "</style.css>; rel=preload")

    def handler(request: Request) -> bytes:
        live.run(threading.get_ident)
        request.inform(103, [hint])
        return b"hi"

    live = serve(handler, threads=2)
    answer = live.ask()
    assert (answer.interim, answer.body) == ([(103, [hint])], b"hi")


def test_early_hints_for_a_client_that_has_left_raise_in_the_handler(serve):
    held, raised = Held(), []

    def handler(request: Request) -> bytes:
        held.wait()
        try:
            request.inform(103, [])
        except ClientDisconnected as error:
            raised.append(error)
        return b"hi"

    live = serve(handler, threads=2)
    client = live.client()
    client.send(GET)
    assert held.begun.wait(SOON)
    client.reset()
    live.until(lambda stats: stats["connections"] == 0)
    held.let_go()
    assert logged(live) == "" and len(raised) == 1


# ---- Bodies that come late -----------------------------------------------------------

ANNOUNCED = post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 5")


def test_as_many_bodies_as_threads_may_be_awaited_at_the_same_time(serve):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [PLAIN])
        return [environ["wsgi.input"].read()]

    live = serve(app, threads=THREADS)
    clients = [live.client() for _ in range(THREADS)]
    for client in clients:
        client.send(ANNOUNCED)
        client.until(b"100 Continue\r\n\r\n")
    assert live.ask(get("/", "No colon")).status == 400
    for n, client in enumerate(clients):
        client.send(b"body%d" % n)
    bodies = [client.answer().body for client in clients]
    assert bodies == [b"body%d" % n for n in range(THREADS)]


def test_a_native_handler_may_stream_its_body_in_a_crew(serve):
    def handler(request: Request) -> Iterator[bytes]:
        return (part.upper() for part in list(request.stream()))

    live = serve(handler, threads=2, stream_request_body=True)
    head = get("/", "Transfer-Encoding: chunked", method="POST")
    body = chunk(b"hello, ") + chunk(b"world") + chunk(b"")
    client = live.client()
    client.send(head)
    client.send(body)
    assert client.answer().body == b"HELLO, WORLD"


# ---- Whose thread it is --------------------------------------------------------------

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE")
LOCAL = threading.local()


class Watched:
    """Parts that tell in which thread they are asked for, and what that one knows."""

    def __init__(self, seen: list[Any], blocking: Callable[[], object]) -> None:
        self.seen = seen
        self.blocking = blocking
        self.left = 3
        self.done = threading.Event()

    def look(self) -> None:
        self.seen.append((threading.get_ident(), VARIABLE.get(), LOCAL.value))

    def __iter__(self) -> Watched:
        self.look()
        return self

    def __next__(self) -> bytes:
        self.look()
        self.blocking()
        if self.left == 0:
            raise StopIteration
        self.left -= 1
        return bytes(HIGH_WATER)

    def close(self) -> None:
        self.look()
        self.done.set()


@pytest.mark.parametrize("lost", [False, True], ids=["leading", "lead lost"])
def test_an_iterable_is_iterated_and_closed_in_the_thread_of_its_app(serve, lost):
    seen: list[Any] = []

    def blocking() -> None:
        if lost:
            live.run(threading.get_ident)

    watched = Watched(seen, blocking)

    def app(environ: dict[str, Any], start_response: Any) -> Watched:
        VARIABLE.set("mine")
        LOCAL.value = environ["PATH_INFO"]
        blocking()
        start_response("200 OK", [PLAIN])
        seen.append((threading.get_ident(), VARIABLE.get(), LOCAL.value))
        return watched

    live = serve(app, threads=THREADS)
    client = live.client(receive_buffer=4096)
    assert client.ask(get("/mine")).body == bytes(3 * HIGH_WATER)
    assert watched.done.wait(SOON)
    assert len(seen) >= 7 and set(seen) == {(seen[0][0], "mine", "/mine")}


def test_handlers_that_block_run_in_threads_of_their_own(serve, interface):
    crowd, threads = Crowd(THREADS), []

    def blocking() -> None:
        threads.append(threading.get_ident())
        crowd.wait()

    live = serve(app_of(interface, blocking), threads=THREADS)
    block(live, crowd, THREADS)
    crowd.go.set()
    assert len(set(threads)) == THREADS


@pytest.mark.parametrize("where", ["part", "close"])
def test_who_streams_or_closes_for_long_keeps_no_other_request_waiting(serve, where):
    """Where handlers block, a thread that is done takes another request at once."""
    crowd, closing = Crowd(1), threading.Event()

    class Stream(Iterator[bytes]):
        left = [b"a", b"b"]

        def __next__(self) -> bytes:
            if self.left == [b"b"] and where == "part":
                crowd.wait()
            live.run(threading.get_ident)  # somebody else leads
            if not self.left:
                raise StopIteration
            return self.left.pop(0)

        def close(self) -> None:
            if where == "close":
                crowd.wait()
            closing.set()

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [PLAIN])
        if environ["PATH_INFO"] == "/stream":
            return Stream()
        live.run(threading.get_ident)
        return [b"hi"]

    live = serve(app, threads=THREADS)
    clients = [live.client() for _ in range(THREADS)]
    streaming = live.client()
    for client in clients:
        client.ask()
    streaming.send(get("/stream"))
    for _ in range(5):
        for client in clients:
            client.send(GET * 4)
        for client in clients:
            assert [client.answer().body for _ in range(4)] == [b"hi"] * 4
    crowd.all_in.wait(SOON)
    assert [client.ask().body for client in clients] == [b"hi"] * THREADS
    crowd.go.set()
    assert streaming.answer().body == b"ab"
    assert closing.wait(SOON)


PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30


def prctl(option: int, value: int = 0) -> int:
    result: int = ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
    return result


def test_threads_of_a_crew_do_not_press_forward_where_handlers_block(serve, interface):
    """Who is woken waits until who runs has paused: SCHED_BATCH, sched(7)."""
    seen: list[int] = []

    def blocking() -> None:
        seen.append(os.sched_getscheduler(0))
        live.run(threading.get_ident)  # somebody else leads

    live = serve(app_of(interface, blocking), threads=2)
    client = live.client()
    for _ in range(20):
        client.ask(get("/slow"))
    assert seen[0] == os.SCHED_OTHER and os.SCHED_BATCH in seen


@pytest.mark.parametrize(("slack", "later"), [(50_000, 500_000), (70_000, 70_000)])
def test_threads_of_a_crew_that_sleep_wake_up_together(serve, interface, slack, later):
    """Their timers may be late, where handlers block and nobody has said how much."""
    seen: list[tuple[int, int]] = []

    def blocking() -> None:
        seen.append((os.sched_getscheduler(0), prctl(PR_GET_TIMERSLACK)))
        live.run(threading.get_ident)

    before = prctl(PR_GET_TIMERSLACK)
    prctl(PR_SET_TIMERSLACK, slack)  # which threads inherit
    try:
        live = serve(app_of(interface, blocking), threads=2)
        client = live.client()
        for _ in range(20):
            client.ask(get("/slow"))
    finally:
        prctl(PR_SET_TIMERSLACK, before)
    assert set(seen) == {(os.SCHED_OTHER, slack), (os.SCHED_BATCH, later)}


def test_handlers_that_wait_for_some_milliseconds_do_so_together(serve, interface):
    """Behind fast ones, too, among which nobody looks often for one that stalls."""
    inside, lock, all_inside = 0, threading.Lock(), threading.Event()

    def waiting() -> None:
        nonlocal inside
        with lock:
            inside += 1
            if inside == THREADS:
                all_inside.set()
        all_inside.wait(0.003)
        with lock:
            inside -= 1

    live = serve(app_of(interface, waiting), threads=THREADS)
    clients = [live.client() for _ in range(THREADS)]
    calm = time.monotonic() + 0.5
    while time.monotonic() < calm:
        clients[0].ask()
    deadline = time.monotonic() + SOON
    while not all_inside.is_set() and time.monotonic() < deadline:
        for client in clients:
            client.send(get("/slow"))
        for client in clients:
            assert client.answer().body == b"hi"
    assert all_inside.is_set()


def test_after_handlers_that_blocked_fast_ones_share_a_thread_again(serve, interface):
    crowd, threads = Crowd(THREADS), []

    def handler(request: Request) -> bytes:
        if request.path == "/slow":
            crowd.wait()
        threads.append(threading.get_ident())
        return b"hi"

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/slow":
            crowd.wait()
        threads.append(threading.get_ident())
        start_response("200 OK", [PLAIN])
        return [b"hi"]

    live = serve({"native": handler, "wsgi": app}[interface], threads=THREADS)
    clients = block(live, crowd, THREADS)
    crowd.go.set()
    for client in clients:
        client.answer()

    def changes() -> int:
        """How often the lead changes among a hundred, at the end of many."""
        fast.send(GET * 500)  # one batch after the other, in whoever leads
        assert [fast.answer().body for _ in range(500)] == [b"hi"] * 500
        last = threads[-100:]
        return sum(a != b for a, b in pairwise(last))

    with live.client() as fast:
        deadline = time.monotonic() + SOON
        while changes() > 5:  # a busy machine may stall one that is fast
            assert time.monotonic() < deadline


def test_a_crew_leaves_no_thread_behind(serve, interface):
    before = set(threading.enumerate())
    crowd = Crowd(THREADS)
    live = serve(app_of(interface, crowd.wait), threads=THREADS)
    clients = block(live, crowd, THREADS)
    crowd.go.set()
    for client in clients:
        client.answer()
    live.stop()
    assert set(threading.enumerate()) <= before


def test_a_thread_that_is_done_keeps_nothing_of_what_waited_for_it(serve):
    crowd = Crowd(THREADS)
    blocking = app_of("wsgi", crowd.wait)
    things: list[weakref.ref[Crowd]] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["thing"] = thing = Crowd(0)
        things.append(weakref.ref(thing))
        return blocking(environ, start_response)

    live = serve(app, threads=THREADS)
    clients = block(live, crowd, THREADS)
    behind = [live.client() for _ in range(THREADS)]
    for client in behind:
        client.send(GET)
    live.until(lambda stats: stats["lent"] == 2 * THREADS)
    crowd.go.set()
    for client in clients + behind:
        client.answer()
    deadline = time.monotonic() + SOON
    while any(thing() is not None for thing in things):
        assert time.monotonic() < deadline
