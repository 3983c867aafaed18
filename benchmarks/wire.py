"""A real loop and its clients in one thread: requests lie ready when it is timed.

Sockets cannot be left out, for the loop takes its requests from nowhere else. But
sixteen connections with sixteen pipelined requests each cost thirty-two system calls
for 256 requests, so what is measured is what happens between them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from prefork import _core, log, native

CONNECTIONS = 16
DEPTH = 16
BATCH = CONNECTIONS * DEPTH
TIMEOUT_MS = 5000

WRK = b"GET / HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n"

BROWSER = (
    b"GET /wp-content/uploads/2010/03/hello-kitty-darth-vader-pink.jpg HTTP/1.1\r\n"
    b"Host: www.kittyhell.com\r\n"
    b"User-Agent: Mozilla/5.0 (Macintosh; U; Intel Mac OS X 10.6; ja-JP-mac; "
    b"rv:1.9.2.3) Gecko/20100401 Firefox/3.6.3 Pathtraq/0.9\r\n"
    b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
    b"Accept-Language: ja,en-us;q=0.7,en;q=0.3\r\n"
    b"Accept-Encoding: gzip,deflate\r\n"
    b"Accept-Charset: Shift_JIS,utf-8;q=0.7,*;q=0.7\r\n"
    b"Keep-Alive: 115\r\n"
    b"Connection: keep-alive\r\n"
    b"Cookie: wp_ozh_wsa_visits=2; wp_ozh_wsa_visit_lasttime=xxxxxxxxxx; "
    b"__utma=xxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.xxxxxxxxxx.x; "
    b"__utmz=xxxxxxxxx.xxxxxxxxxx.x.x.utmccn=(referral)|utmcsr=reader.livedoor.com|"
    b"utmcct=/reader/|utmcmd=referral\r\n\r\n"
)


class Wire:
    """A loop that listens, and clients that have sent it BATCH requests."""

    def __init__(
        self, handler: Callable[..., Any], make_desk: Callable[..., Any] = native.Desk
    ) -> None:
        self.loop = _core.Loop(server="prefork", content_type="text/plain")
        self.desk = make_desk(handler, self.loop, native.Hooks(), log.error_logger())
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)
        self.listener.setblocking(False)
        self.loop.listen(self.listener.fileno())
        address = self.listener.getsockname()
        self.clients = [socket.create_connection(address) for _ in range(CONNECTIONS)]
        self.answer_size = 0  # of all DEPTH on one connection
        self.loaded = False

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.loop.shut()
        self.listener.close()

    def load(self, request: bytes) -> None:
        """Take in the answers of the batch before; send the next, to lie ready."""
        if self.loaded:
            self.receive()
        for client in self.clients:
            client.sendall(request * DEPTH)
        self.loaded = True

    def serve(self) -> None:
        """Handle one batch by the dispatcher, as a worker does."""
        turn = self.desk.dispatcher.turn
        left = BATCH
        while left:
            count = turn(TIMEOUT_MS)
            assert count, "the loop found nothing to do"
            left -= count

    def receive(self) -> bytes:
        """Send off what is queued and take the answers in; returns one of them."""
        self.loop.wait(0)
        if not self.answer_size:
            self.answer_size = len(self.clients[0].recv(1 << 20, socket.MSG_PEEK))
        for client in self.clients:
            data = _receive(client, self.answer_size)
        return data[: self.answer_size // DEPTH]


def _receive(client: socket.socket, size: int) -> bytes:
    data = client.recv(size, socket.MSG_WAITALL)
    assert len(data) == size, "the loop closed the connection"
    return data
