"""Large uploads at once: do all arrive as they were sent, and in bounded memory?

    python benchmarks/uploads.py wsgi --clients 32 --size 20 --threads 4

Every client sends so many MiB, every second one in chunks and without their length,
and compares the SHA-256 that comes back. Prints by how much the worker's resident
memory was larger at most than before; exits with 1 if a sum was wrong or that is more
than --most MiB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import load
import servers

HERE = Path(__file__).parent
PIECE = 1 << 16
MIB = 1 << 20


def parts_of(number: int, size: int) -> Iterator[bytes]:
    """A body that no other client has: a random MiB, turned round again and again."""
    block = random.Random(number).randbytes(MIB)
    for turn in range(size):
        data = block[turn:] + block[:turn]
        for at in range(0, MIB, PIECE):
            yield data[at : at + PIECE]


def upload(port: int, number: int, size: int) -> bool:
    """Send it; whether the answer tells the sum of it."""
    chunked, digest = number % 2 == 1, hashlib.sha256()
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d"
    head = b"POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + framing
    if not chunked:
        head %= size * MIB
    with socket.create_connection(("127.0.0.1", port), timeout=120) as sock:
        sock.sendall(head + b"\r\n\r\n")
        for part in parts_of(number, size):
            digest.update(part)
            sock.sendall(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        if chunked:
            sock.sendall(b"0\r\n\r\n")
        _, body = load.read_answer(sock)
    return body.decode().strip() == digest.hexdigest()


def memory(port: int) -> tuple[int, int]:
    """The worker's resident bytes: now, and at most so far."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(b"GET /memory HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        now, most = json.loads(load.read_answer(sock)[1])
    return now, most


def run(port: int, clients: int, size: int) -> tuple[int, float, float]:
    """How many sums were wrong, MiB of growth at most, and seconds."""
    upload(port, 0, 1)  # what is used for the first time is there now
    upload(port, 1, 1)
    before, _ = memory(port)
    since = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        sums = pool.map(lambda number: upload(port, number, size), range(clients))
        wrong = sum(not right for right in sums)
    seconds = time.monotonic() - since
    return wrong, (memory(port)[1] - before) / MIB, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("interface", choices=["wsgi", "native", "asgi"])
    add("--clients", type=int, default=32)
    add("--size", type=int, default=20, help="MiB of each body")
    add("--threads", type=int, default=1)
    add("--most", type=float, default=100, help="MiB that the worker may grow by")
    options = parser.parse_args()
    command = [sys.executable, "-m", "prefork", f"uploads:{options.interface}"]
    command += ["--workers", "1", "--threads", str(options.threads)]
    command += ["--app-dir", str(HERE / "apps")]
    command += ["--interface", options.interface]
    if options.interface == "native":
        command.append("--stream-request-body")
    with servers.serving(command) as port:
        wrong, grew, seconds = run(port, options.clients, options.size)
    print(
        f"{options.interface}, threads {options.threads}: {options.clients} x "
        f"{options.size} MiB in {seconds:.1f} s, {wrong} wrong, grew by {grew:.1f} MiB"
    )
    return int(wrong > 0 or grew > options.most)


if __name__ == "__main__":
    sys.exit(main())
