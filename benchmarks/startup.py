"""How long a start takes, and what a worker weighs: `python benchmarks/startup.py`.

Sixteen workers (--workers) are forked from an app that holds 200 MiB (--mebibytes):
half of it one block, half of it small objects. Told are

    ready   from listen_and_serve() to on_master_ready(), when every worker accepts
    PSS     of each worker after 10,000 requests (--requests): its own pages, and its
            share of those that are still shared

The app runs as `startup.py --serve`, in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

BATCH = 500  # requests that a client sends at once
CROWD = 64  # clients


def serve(options: argparse.Namespace) -> None:
    from prefork import Prefork, Server

    block = bytearray(os.urandom(1 << 20) * (options.mebibytes // 2))
    count = (options.mebibytes << 19) // 130  # bytes of a dict entry, its key and value
    small = {f"key {n}": f"value {n}" for n in range(count)}

    def app(request: object) -> str:
        return f"{os.getpid():08d}"

    def ready(pids: list[int]) -> None:
        took = time.monotonic() - began
        print("ready", took, prefork.address[1], *pids, flush=True)

    prefork = Prefork(
        Server(app),
        workers=options.workers,
        reuseport=options.reuseport,
        spawn=options.spawn,
        on_master_ready=ready,
        log_level="error",
    )
    began = time.monotonic()
    prefork.listen_and_serve("127.0.0.1:0")
    assert block and small


def ask(port: int, counts: Counter[int]) -> None:
    """Send a batch on each of many connections at once; count who answered."""
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    address = ("127.0.0.1", port)
    socks = [socket.create_connection(address, timeout=10) for _ in range(CROWD)]
    for sock in socks:
        sock.sendall(request * (BATCH - 1) + last)
    for sock in socks:
        with sock:
            data = b""
            while part := sock.recv(1 << 20):
                data += part
        counts.update(int(pid) for pid in re.findall(rb"\r\n\r\n(\d{8})", data))


def pss(pid: int) -> float:
    """Proportional set size of a process, in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


def measure(arguments: list[str], requests: int) -> tuple[float, list[float]]:
    """The time to ready, and the PSS of each worker."""
    command = [sys.executable, __file__, "--serve", *arguments]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    try:
        while not (line := program.stdout.readline()).startswith("ready"):
            assert line, "the app has ended"
        _, took, port, *pids = line.split()
        counts: Counter[int] = Counter({int(pid): 0 for pid in pids})
        while min(counts.values()) < requests:
            ask(int(port), counts)
        return float(took), [pss(int(pid)) for pid in pids]
    finally:
        program.send_signal(signal.SIGTERM)
        program.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--mebibytes", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--reuseport", action="store_true")
    parser.add_argument("--spawn", default="fork", choices=["fork", "exec"])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    took, sizes = measure(sys.argv[1:], options.requests)
    print(f"{options.workers} workers, an app of {options.mebibytes} MiB:")
    print(f"  ready after {took * 1000:.0f} ms")
    print(f"  PSS of a worker {min(sizes):.1f} to {max(sizes):.1f} MiB")


if __name__ == "__main__":
    main()
