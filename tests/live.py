"""A server that runs and a client with deadlines: what the tests over sockets share.

A Live serves in a thread of this process. It ends with nothing left: no thread, no
descriptor, no request on loan, no buffer in use, and no line in the log that the test
did not ask for. Waiting is for an event, with a deadline.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import h11

from prefork import Server

SOON = 10.0  # seconds until we give up waiting for what must happen
QUIET = 0.3  # seconds in which nothing happened: then it will not

HIGH_WATER = 65536  # bytes pending in an answer above which nothing more is pulled

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def get(target: str = "/", *lines: str, method: str = "GET") -> bytes:
    """A request without a body."""
    head = [f"{method} {target} HTTP/1.1", "Host: a", *lines]
    return "\r\n".join([*head, "", ""]).encode("latin-1")


def post(body: bytes, *lines: str, target: str = "/") -> bytes:
    """A request with a body of this length."""
    return get(target, f"Content-Length: {len(body)}", *lines, method="POST") + body


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; the empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---- The client ----------------------------------------------------------------------


@dataclass
class Answer:
    """A final answer as h11 read it, and the interim ones before it."""

    status: int = 0
    reason: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    interim: list[tuple[int, list[tuple[str, str]]]] = field(default_factory=list)
    trailers: list[tuple[str, str]] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        """The value of a field that comes once."""
        (value,) = self.all(name)
        return value

    def __contains__(self, name: str) -> bool:
        return self.all(name) != []

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    @property
    def undated(self) -> list[tuple[str, str]]:
        """The fields without Date, which may be another a moment later."""
        return [pair for pair in self.headers if pair[0] != "date"]

    @property
    def closes(self) -> bool:
        return self.all("connection") == ["close"]


class Client:
    """The client's end of one connection."""

    def __init__(self, address: Any, receive_buffer: int = 0) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        if isinstance(address, tuple) and ":" in address[0]:
            family = socket.AF_INET6
        self.socket = socket.socket(family)
        self.socket.settimeout(SOON)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise
        if family != socket.AF_UNIX:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.unread = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def half_close(self) -> None:
        """Send no more, but go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Leave with an RST."""
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()

    def receive(self) -> bytes:
        """What comes next; empty when the server has closed."""
        data, self.unread = self.unread or self.socket.recv(65536), b""
        return data

    def until(self, wanted: bytes) -> bytes:
        """What comes until the wanted bytes, which are its end."""
        data = b""
        while wanted not in data:
            part = self.receive()
            assert part, f"no {wanted!r} in {data!r}"
            data += part
        head, _, self.unread = data.partition(wanted)
        return head + wanted

    def rest(self) -> bytes:
        """Everything until the server closes."""
        data = b""
        while part := self.receive():
            data += part
        return data

    def is_quiet(self) -> bool:
        """Whether nothing comes for a while, not even the end."""
        self.socket.settimeout(QUIET)
        try:
            self.unread += self.socket.recv(1)
            return False
        except TimeoutError:
            return self.unread == b""
        finally:
            self.socket.settimeout(SOON)

    def answer(self, method: str = "GET", on_100: bytes | None = None) -> Answer:
        """The next answer, to a request with this method; on_100 follows a 100.

        Raises h11.RemoteProtocolError when it is malformed or truncated.
        """
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        reader.send(h11.EndOfMessage())
        if self.unread:
            reader.receive_data(self.unread)
        answer = Answer()
        parts = []
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                reader.receive_data(self.socket.recv(65536))
            elif isinstance(event, h11.Data):
                parts.append(event.data)
            elif isinstance(event, h11.InformationalResponse):
                answer.interim.append((event.status_code, _texts(event.headers)))
                if event.status_code == 100 and on_100 is not None:
                    self.send(on_100)
            elif isinstance(event, h11.Response):
                answer.status = event.status_code
                answer.reason = event.reason.decode()
                answer.headers = _texts(event.headers)
        answer.body = b"".join(parts)
        answer.trailers = _texts(event.headers)
        self.unread = reader.trailing_data[0]
        return answer

    def ask(self, request: bytes = GET, on_100: bytes | None = None) -> Answer:
        """Send a request and read its answer."""
        self.send(request)
        return self.answer("HEAD" if request[:5] == b"HEAD " else "GET", on_100)


def _texts(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in headers
    ]


# ---- The server ----------------------------------------------------------------------


class Log:
    """A logger= that remembers, and that can be awaited."""

    def __init__(self) -> None:
        self.asked = False
        self._text = ""
        self._changed = threading.Condition()

    def printf(self, fmt: str, *args: object) -> None:
        with self._changed:
            self._text += fmt % args + "\n"
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """What was logged so far."""
        self.asked = True
        return self._text

    def until(self, wanted: str) -> str:
        """Await a text; returns all that was logged so far."""
        with self._changed:
            found = self._changed.wait_for(lambda: wanted in self.text, SOON)
        assert found, f"no {wanted!r} in the log:\n{self.text}"
        return self.text


class Live:
    """A server in a thread; a context that ends with nothing of it left.

    A stop does not wait for idle connections here, unless the test says drain_idle=.
    """

    def __init__(self, app: Any, addr: Any = "127.0.0.1:0", **options: Any) -> None:
        self.log = Log()
        self.server = Server(app, **{"logger": self.log, "drain_idle": 0, **options})
        self.clients: list[Client] = []
        self._ready: Future[None] = Future()
        self._outcome: Future[None] = Future()
        self._excused = False
        self.thread = threading.Thread(target=self._run, args=[addr], daemon=True)
        self.thread.start()
        self._ready.result(SOON)

    def _run(self, addr: Any) -> None:
        try:
            self.server.listen_and_serve(addr, on_ready=self._on_ready)
            self._outcome.set_result(None)
        except BaseException as error:
            self._outcome.set_exception(error)
            if not self._ready.done():
                self._ready.set_exception(error)

    def _on_ready(self, server: Server) -> None:
        assert server._desk is not None
        self.core = server._desk.core
        self._ready.set_result(None)

    @property
    def address(self) -> Any:
        return self.server.address

    def client(self, receive_buffer: int = 0) -> Client:
        """A new connection, which is closed with the server at the latest."""
        client = Client(self.address, receive_buffer)
        self.clients.append(client)
        return client

    def ask(self, request: bytes = GET, on_100: bytes | None = None) -> Answer:
        """An answer on a connection of its own."""
        with self.client() as client:
            return client.ask(request, on_100)

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function in the loop's thread."""
        result: Future[Any] = Future()

        def call() -> None:
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

        self.core.call(call)
        return result.result(SOON)

    def stats(self) -> dict[str, Any]:
        return self.run(self.core.stats)

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask the loop's figures until they are as wanted."""
        deadline = time.monotonic() + SOON
        while not holds(stats := self.stats()):
            assert time.monotonic() < deadline, stats
        return stats

    def ended(self) -> BaseException | None:
        """Await the server's end; what it raised, which then is as it should be."""
        self._excused = True
        return self._outcome.exception(SOON)

    def stop(self) -> dict[str, Any]:
        """Close the clients, stop the server, and return the loop's last figures."""
        for client in self.clients:
            client.close()
        self.server.shutdown()
        self.thread.join(SOON)
        assert not self.thread.is_alive(), "the server does not stop"
        return self.core.stats()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *error: object) -> None:
        stats = self.stop()
        if error[0] is not None:
            return
        if not self._excused:
            self._outcome.result()
        assert self.log.asked or self.log.text == ""
        left = {n: stats[n] for n in ("connections", "lent", "buffers_in_use")}
        assert left == {"connections": 0, "lent": 0, "buffers_in_use": 0}


# ---- Apps that wait, and that never end ----------------------------------------------


class Held:
    """A handler, or a part of one, that waits until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._go = threading.Event()

    def wait(self) -> None:
        self.begun.set()
        assert self._go.wait(SOON)

    def let_go(self) -> None:
        assert self.begun.wait(SOON)
        self._go.set()


class Endless:
    """Parts without end; counts what was pulled and tells when it is closed."""

    def __init__(self, size: int = 16384) -> None:
        self.part = b"x" * size
        self.pulled = 0
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        try:
            while True:
                self.pulled += len(self.part)
                yield self.part
        finally:
            self.closed.set()


# ---- What must not grow --------------------------------------------------------------


def descriptors() -> list[str]:
    """What the descriptors of this process are, sorted."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
        except FileNotFoundError:  # that of the listing itself
            continue
    return sorted(found)
