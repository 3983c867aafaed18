"""Handlers that are coroutines, on the worker's event loop, over real sockets."""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import h11
import pytest
from live import GET, SOON, Live, chunk, get, post

from prefork import ClientDisconnected, Request, RequestError, Response

HIGH_WATER = 65536  # bytes pending in an answer above which nothing more is pulled
EXPECT = "Expect: 100-continue"
ANNOUNCED = post(b"", EXPECT).replace(b"Length: 0", b"Length: 5")
STREAMED = get("/", "Transfer-Encoding: chunked", method="POST")


def logged(live: Live) -> str:
    """What was logged at the end: every line that comes has come."""
    live.stop()
    return live.log.text


class Gate:
    """What coroutines of a server wait for until the test opens it."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened: asyncio.Event | None = None

    async def wait(self) -> None:
        if self._opened is None:
            self._loop, self._opened = asyncio.get_running_loop(), asyncio.Event()
        self.waiting.put(None)
        await self._opened.wait()

    def await_waiters(self, count: int = 1) -> None:
        for _ in range(count):
            self.waiting.get(timeout=SOON)

    def open(self) -> None:
        assert self._loop is not None and self._opened is not None
        self._loop.call_soon_threadsafe(self._opened.set)


# ---- What a handler may return -------------------------------------------------------


async def parts() -> AsyncIterator[bytes | str]:
    yield b"h"
    await asyncio.sleep(0)
    yield b""
    yield "i"


class Parts:
    """An asynchronous iterator that is no generator."""

    def __init__(self) -> None:
        self.left = [b"i", b"h"]

    def __aiter__(self) -> Parts:
        return self

    async def __anext__(self) -> bytes:
        if not self.left:
            raise StopAsyncIteration
        return self.left.pop()


RESULTS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"hi",
    "str": lambda: "hi",
    "bytearray": lambda: bytearray(b"hi"),
    "Response": lambda: Response("hi"),
    "Response-with-headers": lambda: Response("hi", headers={"X": "y"}),
    "list": lambda: [b"h", "i"],
    "generator": lambda: (part for part in "hi"),
    "async-generator": parts,
    "async-iterator": Parts,
    "Response-async-generator": lambda: Response(parts(), headers={"X": "y"}),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("when", ["at once", "after an await"])
def test_a_coroutine_may_return(serve, name, when):
    async def handler(request: Request) -> Any:
        if when == "after an await":
            await asyncio.sleep(0)
        return RESULTS[name]()

    client = serve(handler).client()
    assert [client.ask().body for _ in range(3)] == [b"hi"] * 3


@pytest.mark.parametrize("result", [None, 42, {"a": 1}])
@pytest.mark.parametrize("when", ["at once", "after an await"])
def test_what_is_no_answer_is_a_500_and_the_log_says_what_would_be(serve, result, when):
    async def handler(request: Request) -> Any:
        if when == "after an await":
            await asyncio.sleep(0)
        return result

    live = serve(handler)
    assert live.ask().status == 500
    assert live.log.until(
        f"the handler returned {type(result).__name__}; return bytes, str, Response or "
        "an (async) iterator of bytes"
    )


def test_a_plain_handler_that_returns_an_async_generator_is_told_so(serve):
    live = serve(lambda _: parts())
    assert live.ask().status == 500
    assert live.log.until("the handler returned async_generator")


def test_an_object_may_be_called_as_a_coroutine(serve):
    class App:
        async def __call__(self, request: Request) -> bytes:
            await asyncio.sleep(0)
            return b"hi"

    assert serve(App()).ask().body == b"hi"


def test_head_of_a_stream_is_answered_as_get_without_the_body(serve):
    async def handler(request: Request) -> Any:
        return parts()

    client = serve(handler).client()
    answers = [client.ask(get(method=method)) for method in ("GET", "HEAD", "GET")]
    assert [a.body for a in answers] == [b"hi", b"", b"hi"]
    assert answers[0].undated == answers[1].undated


# ---- Waiting -------------------------------------------------------------------------


def test_a_handler_may_wait_for_time_to_pass(serve):
    async def handler(request: Request) -> bytes:
        await asyncio.sleep(0.01)
        return b"hi"

    assert serve(handler).ask().body == b"hi"


def test_handlers_wait_side_by_side(serve):
    gate = Gate()

    async def handler(request: Request) -> bytes:
        await gate.wait()
        return request.path.encode()

    live = serve(handler)
    clients = [live.client() for _ in range(50)]
    for n, client in enumerate(clients):
        client.send(get(f"/{n}"))
    gate.await_waiters(50)
    gate.open()
    assert [c.answer().body for c in clients] == [b"/%d" % n for n in range(50)]


def test_a_waiting_handler_does_not_hold_up_the_others(serve):
    gate = Gate()

    async def handler(request: Request) -> bytes:
        if request.path == "/slow":
            await gate.wait()
        return request.path.encode()

    live = serve(handler)
    slow = live.client()
    slow.send(get("/slow"))
    gate.await_waiters()
    assert live.ask(get("/fast")).body == b"/fast"
    gate.open()
    assert slow.answer().body == b"/slow"


def test_a_handler_may_wait_for_a_thread(serve):
    async def handler(request: Request) -> str:
        loop = asyncio.get_running_loop()
        return str(await loop.run_in_executor(None, threading.get_ident))

    assert serve(handler).ask().body


def test_pipelined_requests_are_answered_in_order(serve):
    async def handler(request: Request) -> Any:
        kind, number = request.path[1], request.path[2:].encode()
        if kind == "w":
            await asyncio.sleep(0.001)
        if kind == "s":
            return aiter_of([b"s", number])
        if kind == "p":
            return b"p" + await request.read()
        return kind.encode() + number

    client = serve(handler).client()
    kinds = "fwspfwwsfpsfspff" * 4
    for n, kind in enumerate(kinds):
        target = f"/{kind}{n}"
        client.send(post(b"%d" % n, target=target) if kind == "p" else get(target))
    answers = [client.answer().body.decode() for _ in kinds]
    assert answers == [f"{kind}{n}" for n, kind in enumerate(kinds)]


async def aiter_of(items: list[bytes]) -> AsyncIterator[bytes]:
    for item in items:
        await asyncio.sleep(0)
        yield item


def test_a_request_may_be_kept_beyond_its_answer(serve):
    kept: list[Request] = []

    async def handler(request: Request) -> bytes:
        kept.append(request)
        await asyncio.sleep(0)
        return b""

    live = serve(handler)
    client = live.client()
    for n in range(20):
        client.ask(post(b"body %d" % n, target=f"/{n}"))
    ends = (client.socket.getsockname(), live.address)
    live.stop()
    assert [(r.path, r.body, (r.client, r.server)) for r in kept] == [
        (f"/{n}", b"body %d" % n, ends) for n in range(20)
    ]


def test_context_variables_are_a_requests_own(serve):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("v", default="unset")

    async def handler(request: Request) -> str:
        before = variable.get()
        variable.set(request.path)
        await asyncio.sleep(0)
        return f"{before} {variable.get()}"

    client = serve(handler).client()
    client.send(b"".join(get(f"/{n}") for n in range(10)))
    answers = [client.answer().body.decode() for _ in range(10)]
    assert answers == [f"unset /{n}" for n in range(10)]


def test_early_hints_arrive_while_the_handler_still_works(serve):
    gate = Gate()

    async def handler(request: Request) -> bytes:
        request.inform(103, [("Link", "</style.css>")])
        await gate.wait()
        return b"hi"

    client = serve(handler).client()
    client.send(GET)
    assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 103 Early Hints\r\n")
    gate.open()
    assert client.answer().body == b"hi"


# ---- Request bodies ------------------------------------------------------------------


async def echo(request: Request) -> bytes:
    return await request.read()


async def echo_parts(request: Request) -> bytes:
    return b"".join([part async for part in request.stream()])


async def echo_stream(request: Request) -> AsyncIterator[bytes]:
    return request.stream().__aiter__()


READERS = {"read": echo, "stream": echo_parts, "answered-by-its-stream": echo_stream}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("early", [False, True], ids=["whole", "early"])
@pytest.mark.parametrize("size", [0, 5, 1 << 20])
def test_a_body_is_read(serve, name, early, size):
    body = os.urandom(size)
    client = serve(READERS[name], stream_request_body=early).client()
    sender = threading.Thread(target=client.send, args=[post(body)])
    sender.start()
    assert client.answer().body == body
    sender.join()


def test_a_body_is_there_without_an_await_unless_it_is_streamed(serve):
    async def handler(request: Request) -> bytes:
        return request.body

    client = serve(handler).client()
    client.send(STREAMED + chunk(b"hel"))
    assert client.is_quiet()
    client.send(chunk(b"lo") + chunk(b""))
    assert client.answer().body == b"hello"


def test_a_body_on_its_way_has_to_be_awaited(serve):
    async def handler(request: Request) -> bytes:
        return request.body

    live = serve(handler, stream_request_body=True)
    assert live.client().ask(STREAMED).status == 500
    assert live.log.until("await request.read()")


def test_a_body_may_be_read_again(serve):
    async def handler(request: Request) -> bytes:
        first = await request.read()
        return b"".join([first, await request.read(), request.body])

    answer = serve(handler, stream_request_body=True).ask(post(b"a" * 10))
    assert answer.body == b"a" * 30


def test_parts_of_a_body_are_there_as_they_come(serve):
    seen: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    async def handler(request: Request) -> bytes:
        async for part in request.stream():
            seen.put(part)
        return b"done"

    client = serve(handler, stream_request_body=True).client()
    client.send(STREAMED)
    for part in (b"one", b"two"):
        client.send(chunk(part))
        assert seen.get(timeout=SOON) == part
    client.send(chunk(b""))
    assert client.answer().body == b"done"


def test_what_a_handler_does_not_read_is_not_taken_in(serve):
    gate = Gate()

    async def handler(request: Request) -> str:
        await gate.wait()
        return str(len(await request.read()))

    live = serve(handler, stream_request_body=True)
    client = live.client()
    sender = threading.Thread(target=client.send, args=[post(bytes(16 << 20))])
    sender.start()
    gate.await_waiters()
    assert client.is_quiet() and live.stats()["bytes_in"] <= 4 * HIGH_WATER
    gate.open()
    assert client.answer().body == b"%d" % (16 << 20)
    sender.join()


@pytest.mark.parametrize("early", [False, True], ids=["whole", "early"])
def test_who_waits_for_100_gets_it_and_is_answered(serve, early):
    client = serve(echo, stream_request_body=early).client()
    answer = client.ask(ANNOUNCED, on_100=b"hello")
    assert (answer.interim, answer.body) == ([(100, [])], b"hello")


def test_who_waits_for_100_does_not_get_it_when_nobody_reads(serve):
    async def handler(request: Request) -> Response:
        return Response("no", status=403)

    client = serve(handler, stream_request_body=True).client()
    answer = client.ask(ANNOUNCED)
    assert (answer.status, answer.interim, answer.closes) == (403, [], True)


BROKEN = {
    "malformed": (b"5\nhello\r\n", 400),
    "too-large": (chunk(b"hello, world"), 413),
    "stalled": (b"", 408),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_body_that_breaks_off_raises_what_the_peer_is_answered(serve, name):
    rest, status = BROKEN[name]
    seen: queue.SimpleQueue[Any] = queue.SimpleQueue()

    async def handler(request: Request) -> bytes:
        try:
            async for part in request.stream():
                seen.put(part)
        except RequestError as error:
            seen.put(error.status)
            raise
        return b"never"

    patience = {"read_timeout": 0.1} if name == "stalled" else {}
    options = {"max_request_body_size": 10, **patience}
    live = serve(handler, stream_request_body=True, **options)
    client = live.client()
    client.send(STREAMED + chunk(b"hello"))
    assert seen.get(timeout=SOON) == b"hello"
    client.send(rest)
    answer = client.answer()
    assert (answer.status, answer.closes) == (status, True)
    assert seen.get(timeout=SOON) == status
    assert logged(live) == ""


def test_a_client_that_leaves_in_its_body_raises_client_disconnected(serve):
    seen: queue.SimpleQueue[Any] = queue.SimpleQueue()

    async def handler(request: Request) -> bytes:
        try:
            async for part in request.stream():
                seen.put(part)
        except ClientDisconnected as error:
            seen.put(error)
            raise
        return b"never"

    live = serve(handler, stream_request_body=True)
    client = live.client()
    client.send(STREAMED + chunk(b"hello"))
    assert seen.get(timeout=SOON) == b"hello"
    client.reset()
    assert isinstance(seen.get(timeout=SOON), ClientDisconnected)
    assert logged(live) == ""


# ---- Streamed answers ----------------------------------------------------------------


class Endless:
    """Parts without end; counts what was pulled and tells how it ended."""

    def __init__(self, size: int = 16384) -> None:
        self.part = b"x" * size
        self.pulled = 0
        self.ended: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while True:
                self.pulled += len(self.part)
                yield self.part
        except BaseException as error:
            self.ended.put(error)
            raise

    async def handler(self, request: Request) -> Any:
        return self.__aiter__() if request.path == "/" else b"hi"


@pytest.mark.parametrize("size", [100, 16384, 65536])
def test_a_stream_is_not_pulled_far_ahead_of_its_reader(serve, size):
    endless = Endless(size)
    live = serve(endless.handler, write_timeout=0.2)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    endless.ended.get(timeout=SOON)
    assert endless.pulled - live.stats()["bytes_out"] <= 2 * HIGH_WATER + size
    assert logged(live) == ""


def test_a_stream_goes_on_when_its_reader_reads(serve):
    endless = Endless()
    client = serve(endless.handler).client(receive_buffer=4096)
    client.send(GET)
    size = 0
    while size < 8 << 20:
        size += len(client.receive())
    client.close()
    assert endless.ended.get(timeout=SOON)


@pytest.mark.parametrize("size", [1, 16384])
def test_a_stream_that_never_waits_does_not_hold_up_the_others(serve, size):
    endless = Endless(size)
    live = serve(endless.handler)
    reader = live.client()
    reader.send(GET)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set() and reader.receive():
            pass

    thread = threading.Thread(target=read)
    thread.start()
    with live.client() as client:
        assert [client.ask(get("/x")).body for _ in range(20)] == [b"hi"] * 20
    stop.set()
    thread.join()


def test_each_part_of_a_stream_is_sent_as_it_comes(serve):
    gate = Gate()

    async def slow() -> AsyncIterator[bytes]:
        yield b"first"
        await gate.wait()
        yield b"second"

    async def handler(request: Request) -> Any:
        return slow()

    client = serve(handler).client()
    client.send(GET)
    client.until(b"5\r\nfirst\r\n")
    gate.await_waiters()
    gate.open()
    assert client.until(b"0\r\n\r\n") == b"6\r\nsecond\r\n0\r\n\r\n"


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_a_stream_is_closed_when_its_reader_leaves(serve, leave):
    endless = Endless()
    live = serve(endless.handler)
    client = live.client()
    client.send(GET)
    client.until(b"xxx")
    getattr(client, leave)()
    ended = endless.ended.get(timeout=SOON)
    assert isinstance(ended, (GeneratorExit, asyncio.CancelledError))
    live.until(lambda stats: stats["lent"] == 0)
    assert logged(live) == ""


def test_a_stream_that_waits_is_cancelled_when_its_reader_leaves(serve):
    ended: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    gate = Gate()

    async def waiting() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await gate.wait()
        except BaseException as error:
            ended.put(error)
            raise

    async def handler(request: Request) -> Any:
        return waiting()

    live = serve(handler)
    client = live.client()
    client.send(GET)
    client.until(b"first\r\n")
    gate.await_waiters()
    client.reset()
    assert isinstance(ended.get(timeout=SOON), asyncio.CancelledError)
    live.until(lambda stats: stats["lent"] == 0)
    assert logged(live) == ""


LATE: dict[str, Callable[[], Any]] = {
    "answer": lambda: b"for nobody",
    "stream": parts,
    "head": lambda: Response(b"for nobody", headers={"X": "y"}),
    "refusal": lambda: throw(RequestError("no such page", 404)),
    "end": lambda: throw(ClientDisconnected("gone")),
}


def throw(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", LATE)
def test_a_handler_goes_on_when_its_client_leaves_and_that_is_quiet(serve, name):
    gate, done = Gate(), threading.Event()

    async def handler(request: Request) -> Any:
        await gate.wait()
        done.set()
        return LATE[name]()

    live = serve(handler)
    client = live.client()
    client.send(GET)
    gate.await_waiters()
    client.reset()
    live.until(lambda stats: stats["connections"] == 0)
    gate.open()
    assert done.wait(SOON)
    live.until(lambda stats: stats["lent"] == 0)
    assert logged(live) == ""


def test_a_large_body_reaches_a_slow_reader_whole(serve):
    body = os.urandom(8 << 20)

    async def handler(request: Request) -> bytes:
        await asyncio.sleep(0)
        return body

    before = sys.getrefcount(body)
    live = serve(handler)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    live.until(lambda stats: stats["bytes_out"] > 0)
    assert client.answer().body == body
    live.until(lambda stats: stats["lent"] == 0)
    assert sys.getrefcount(body) == before


# ---- Handlers that raise -------------------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "after an await"])
def test_a_handler_that_raises_is_a_500_with_its_traceback_in_the_log(serve, when):
    async def handler(request: Request) -> bytes:
        if when == "after an await":
            await asyncio.sleep(0)
        raise LookupError("nobody home")

    live = serve(handler)
    client = live.client()
    assert [client.ask().status for _ in range(2)] == [500, 500]
    assert 'raise LookupError("nobody home")' in live.log.until("nobody home")


@pytest.mark.parametrize("when", ["at once", "after an await"])
def test_a_handler_that_is_cancelled_is_a_500_and_the_server_lives(serve, when):
    async def handler(request: Request) -> bytes:
        if request.path == "/":
            return b"hi"
        if when == "after an await":
            await asyncio.sleep(0)
        raise asyncio.CancelledError

    live = serve(handler)
    client = live.client()
    assert [client.ask(get(p)).status for p in ("/x", "/")] == [500, 200]
    assert live.log.until("cancelled")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("when", ["at once", "after an await"])
def test_an_exit_in_a_handler_ends_the_server_but_is_answered(serve, error, when):
    async def handler(request: Request) -> bytes:
        if when == "after an await":
            await asyncio.sleep(0)
        raise error

    live = serve(handler)
    client = live.client()
    client.send(GET)
    assert client.answer().status == 500
    assert type(live.ended()) is type(error)


def test_a_stream_that_raises_before_its_first_byte_is_a_500(serve):
    async def failing() -> AsyncIterator[bytes]:
        raise LookupError("nobody home")
        yield b"never"

    async def handler(request: Request) -> Any:
        return Response(failing(), status=201)

    live = serve(handler)
    assert live.ask().status == 500
    assert live.log.until("LookupError: nobody home")


def test_a_stream_that_raises_behind_its_first_byte_is_cut_off(serve):
    async def failing() -> AsyncIterator[bytes]:
        yield b"begun"
        raise LookupError("nobody home")

    async def handler(request: Request) -> Any:
        return failing()

    live = serve(handler)
    with pytest.raises(h11.RemoteProtocolError):
        live.ask()
    assert live.log.until("LookupError: nobody home")


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\0b"])
def test_a_forged_value_is_a_500_and_named_in_the_log(serve, value):
    async def handler(request: Request) -> Any:
        return Response(parts(), headers={"X-Mine": value})

    live = serve(handler)
    assert live.ask().status == 500
    assert live.log.until(f"'X-Mine': {value!r}")


# ---- The worker's loop ---------------------------------------------------------------


def switches(thread: threading.Thread) -> int:
    """How often a thread has gone to sleep."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    (line,) = (x for x in status.splitlines() if x.startswith("voluntary_ctxt"))
    return int(line.split()[1])


def test_an_idle_worker_does_not_wake_up(serve):
    async def handler(request: Request) -> bytes:
        await asyncio.sleep(0)
        return b"hi"

    live = serve(handler)
    client = live.client()
    client.ask()
    assert client.is_quiet()  # whatever the answer left to do is done
    before = switches(live.thread)
    assert client.is_quiet()
    assert switches(live.thread) == before


def test_deadlines_are_kept_while_the_loop_is_idle(serve):
    async def handler(request: Request) -> bytes:
        return b"hi"

    client = serve(handler, header_timeout=0.1).client()
    answer = client.ask(b"GET / HTTP/1.1\r\n")
    assert (answer.status, answer.closes) == (408, True)


def test_a_task_that_a_handler_leaves_behind_goes_on(serve):
    gate, done = Gate(), threading.Event()
    tasks = []

    async def later() -> None:
        await gate.wait()
        done.set()

    async def handler(request: Request) -> bytes:
        tasks.append(asyncio.ensure_future(later()))
        return b"hi"

    live = serve(handler)
    assert live.ask().body == b"hi"
    gate.await_waiters()
    gate.open()
    assert done.wait(SOON)


def test_a_stop_waits_for_the_handlers_that_wait(serve):
    gate = Gate()

    async def handler(request: Request) -> bytes:
        await gate.wait()
        return b"hi"

    live = serve(handler)
    client = live.client()
    client.send(GET)
    gate.await_waiters()
    live.server.shutdown()
    gate.open()
    answer = client.answer()
    assert (answer.body, answer.closes) == (b"hi", True)
    client.close()
    assert live.ended() is None


def test_a_stop_ends_when_the_last_stream_has_ended(serve):
    gate = Gate()

    async def slow() -> AsyncIterator[bytes]:
        yield b"first"
        await gate.wait()
        yield b"last"

    async def handler(request: Request) -> Any:
        return slow()

    live = serve(handler)
    client = live.client()
    client.send(GET)
    gate.await_waiters()
    live.server.shutdown()
    gate.open()
    assert client.answer().body == b"firstlast"
    assert live.ended() is None
