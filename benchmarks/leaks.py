"""Requests of every kind, and clients that leave: does anything of them stay?

    python benchmarks/leaks.py wsgi --requests 100000 --threads 16
    python benchmarks/leaks.py asgi --requests 100000

The WSGI run mixes what apps may do, one request in eight being left by its client. Of
the ASGI run all are: in a slow handler, a stream, an upload, a wait for their leaving,
and as WebSockets.
Prints the allocated blocks and the collector's objects of the worker after a tenth of
the run (3,000 requests at least) and after all of it, and exits with 1 if there are 800
more: of one that every hundredth of 100,000 requests left behind there would be 900.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import load
import servers

HERE = Path(__file__).parent
CLIENTS = 16
WARM = 3000  # requests until what is kept for the next ones is there
ALLOWED = 800  # more: free lists, as long as requests came at a time (580 were seen)
RESET = struct.pack("ii", 1, 0)

LARGE = bytes(600_000)  # more than a worker keeps in memory
HINTED = b"HTTP/1.1 103"


def get(path: str, *lines: str, method: str = "GET") -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: a", *lines]
    return "\r\n".join([*head, "", ""]).encode()


def post(path: str, body: bytes, *lines: str) -> bytes:
    return get(path, f"Content-Length: {len(body)}", *lines, method="POST") + body


CHUNKED = get("/echo", "Transfer-Encoding: chunked", method="POST")

ANSWERED = [
    *(get("/"), get("/plain"), get("/nowhere?a=b", "Cookie: a=1; b=2")),
    *(post("/echo", b"x" * 1000), CHUNKED + b"5\r\nhello\r\n0\r\nX-T: 1\r\n\r\n"),
    *(get("/stream"), get("/write"), get("/file"), post("/unread", b"x" * 5000)),
    *(get("/raises"), get("/replaces"), get("/forged"), get("/closing")),
    *(get("/hints"), get("/slow"), get("/plain", method="PUT"), b"BAD\r\n\r\n"),
    *(post("/echo", b"hello", "Expect: 100-continue"), get("/raises_late")),
]
LEFT = [
    *(get("/endless"), get("/slow"), get("/echo", "Content-Length: 9", method="POST")),
    post("/echo", b"hello", "Expect: 100-continue")[:-3],
    post("/echo", LARGE)[:-5],
    get("/stream"),
]
SOCKET = [
    *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
]
DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate"
HELLO = b"\x81\x85\0\0\0\0hello\xc1\x87\0\0\0\0\xca\x48\xcd\xc9\xc9\x07\x00"
ABORTED = [
    *(get("/denied", *SOCKET), get("/socket", *SOCKET), get("/flood", *SOCKET)),
    get("/socket", *SOCKET, DEFLATE) + HELLO,
    get("/socket", *SOCKET, DEFLATE) + HELLO[:-3],
    *(get("/slow"), get("/endless"), get("/waits"), CHUNKED + b"5\r\nhe"),
    post("/upload", b"x" * 100_000)[:-5],
    get("/upload", "Content-Length: 9", "Expect: 100-continue", method="POST"),
]


class Client:
    """One connection after the other; counts how its requests went."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sock: socket.socket | None = None
        self.told: Counter[str] = Counter()

    def connected(self) -> socket.socket:
        if self.sock is None:
            self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self.sock

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def ask(self, request: bytes) -> None:
        """A request that is answered, or whose answer is cut off."""
        sock = self.connected()
        try:
            sock.sendall(request)
            status = self.answer(sock)
            self.told[status] += 1
            if status == "400" or b"Expect" in request:
                self.close()
        except OSError:
            self.told["cut off"] += 1
            self.close()

    def answer(self, sock: socket.socket) -> str:
        """The status; reads all of it."""
        head = b""
        while b"\r\n\r\n" not in head or head.startswith((HINTED, b"HTTP/1.1 100")):
            if b"\r\n\r\n" in head:
                head = head.partition(b"\r\n\r\n")[2]
                continue
            head += receive(sock)
        return finish(sock, head)

    def leave(self, request: bytes, number: int) -> None:
        """A request whose client does not wait for its end."""
        self.close()
        sock = self.connected()
        with contextlib.suppress(OSError):
            sock.sendall(request)
            if request.startswith(b"GET /endless"):
                receive(sock)
        if number % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.told["left"] += 1
        self.close()


def receive(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise ConnectionResetError("cut off")
    return data


def finish(sock: socket.socket, data: bytes) -> str:
    """Read the rest of an answer whose head is here; its status."""
    head, _, body = data.partition(b"\r\n\r\n")
    fields = head.lower().split(b"\r\n")
    lengths = [int(f[15:]) for f in fields if f.startswith(b"content-length:")]
    while lengths and len(body) < lengths[0]:
        body += receive(sock)
    while not lengths and not body.endswith(b"0\r\n\r\n"):
        body += receive(sock)
    return head[9:12].decode()


# ---- The run -----------------------------------------------------------------------


def mixed(client: Client, number: int) -> None:
    if number % 8 == 7:
        client.leave(LEFT[number // 8 % len(LEFT)], number // 8)
    else:
        client.ask(ANSWERED[number % len(ANSWERED)])


def aborting(client: Client, number: int) -> None:
    client.leave(ABORTED[number % len(ABORTED)], number)


def drive(port: int, numbers: Iterator[int], act: Callable[[Client, int], None]) -> str:
    """Have all clients take numbers until there are no more."""

    def work(client: Client) -> Counter[str]:
        for number in numbers:
            act(client, number)
        client.close()
        return client.told

    with ThreadPoolExecutor(CLIENTS) as pool:
        told = sum(pool.map(work, [Client(port) for _ in range(CLIENTS)]), Counter())
    return ", ".join(f"{what} {n:,}" for what, n in sorted(told.items()))


def objects(port: int) -> tuple[int, Counter[str]]:
    """Blocks and objects, once they do not become fewer: who left was noticed."""
    best: tuple[int, Counter[str]] | None = None
    same = 0
    while same < 5:
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(get("/count", "Connection: close"))
            blocks, kinds = json.loads(load.read_answer(sock)[1])
        found = blocks, Counter(kinds)
        if best is None or blocks + found[1].total() < best[0] + best[1].total():
            best, same = found, 0
        same += 1
    assert best is not None
    return best


def run(port: int, requests: int, act: Callable[[Client, int], None]) -> bool:
    """Whether nothing stays."""
    warm = max(requests // 10, WARM)
    print(f"{warm:>9,} requests: {drive(port, iter(range(warm)), act)}")
    blocks, kinds = objects(port)
    print(f"{'':9} {blocks:,} blocks, {kinds.total():,} objects")
    numbers = iter(range(warm, requests))
    print(f"{requests - warm:>9,} requests: {drive(port, numbers, act)}")
    more_blocks, more_kinds = objects(port)
    print(f"{'':9} {more_blocks:,} blocks, {more_kinds.total():,} objects")
    left = (more_kinds - kinds).most_common(8)
    print(f"more than before: {', '.join(f'{n} {kind}' for kind, n in left) or 'none'}")
    return max(more_blocks - blocks, more_kinds.total() - kinds.total()) <= ALLOWED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("interface", choices=["wsgi", "asgi"])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    command = [sys.executable, "-m", "prefork", f"leaks:{options.interface}"]
    command += ["--workers", "1", "--threads", str(options.threads)]
    command += ["--log-level", "critical"]
    command += ["--app-dir", str(HERE / "apps"), "--interface", options.interface]
    act = {"wsgi": mixed, "asgi": aborting}[options.interface]
    with servers.serving(command) as port:
        since = time.monotonic()
        clean = run(port, options.requests, act)
    seconds = time.monotonic() - since
    print(f"{options.interface}, threads {options.threads}: {seconds:.0f} s")
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())
