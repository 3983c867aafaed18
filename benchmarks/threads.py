"""What handlers that block cost: `python benchmarks/threads.py`.

Two workers of 256 threads serve a WSGI app; wrk makes the load, and all share the CPUs.

    sleep   every request sleeps 100 ms; 512 connections allow 5,120 a second at most.
            Beside it, in turn: sleepers.c, which does nothing but read, sleep and write
    mixed   one request in ten does; told is the latency of the nine others
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cpu
import programs
import servers

SLEEP, CONNECTIONS = 0.1, 512
HERE = Path(__file__).parent


def app(environ, start_response):
    if environ["PATH_INFO"] == "/slow":
        time.sleep(SLEEP)
    start_response("200 OK", [("Content-Length", "13")])
    return [b"Hello, World!"]


@contextmanager
def sleepers() -> Iterator[tuple[int, list[int]]]:
    """The limit; the same."""
    command = [programs.program("sleepers")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), [process.pid]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def server(python: Path) -> Iterator[tuple[int, list[int]]]:
    """Two workers; the port, and the pids."""
    port = servers.free_port()
    command = [str(python.parent / "prefork"), "threads:app", "-w2", "--threads=256"]
    command += ["--bind", f"127.0.0.1:{port}", "--log-level=error"]
    process = subprocess.Popen([*command, "--app-dir", str(HERE)])
    try:
        while not servers.answers(port):
            time.sleep(0.05)
        yield port, cpu.tree(process.pid)
    finally:
        process.terminate()
        process.wait()


def wrk(port: int, path: str, connections: int, seconds: int) -> list[str]:
    command = ["wrk", "--latency", "--timeout=5", f"--duration={seconds}"]
    command += [f"--connections={connections}", f"--threads={min(4, connections)}"]
    return [*command, f"http://127.0.0.1:{port}{path}"]


def told(text: str) -> tuple[int, float, str]:
    """Requests, p99 in milliseconds, errors."""
    match = re.search(r"99% +([\d.]+)(us|ms|s)\b", text)
    assert match, text
    factor = {"us": 0.001, "ms": 1.0, "s": 1000.0}[match[2]]
    errors = re.search(r"Socket errors: (.*)|Non-2xx.*: (\d+)", text)
    requests = re.search(r"(\d+) requests in", text)
    assert requests
    return int(requests[1]), float(match[1]) * factor, errors[0] if errors else "0"


def measure_sleep(name: str, port: int, pids: list[int], seconds: int) -> None:
    before = cpu.read(pids)
    command = wrk(port, "/slow", CONNECTIONS, seconds)
    text = subprocess.run(command, capture_output=True, text=True).stdout
    usage = cpu.between(before, cpu.read(pids))
    requests, p99, errors = told(text)
    rate, most = requests / seconds, CONNECTIONS / SLEEP
    print(
        f"sleep: {name}: {rate:,.0f}/s, {rate / most:.1%} of {most:,.0f}; "
        f"p99 {p99:.1f} ms; {usage.cpu_ns / 1e3 / requests:.1f} µs CPU a request; "
        f"errors {errors}"
    )


def measure_mixed(port: int, seconds: int) -> None:
    """Slow requests on 32 connections are 320 a second; fast ones nine times more."""
    slow = subprocess.Popen(wrk(port, "/slow", 32, seconds), stdout=subprocess.PIPE)
    command = [sys.executable, str(HERE / "pace.py"), str(port), "2880", str(seconds)]
    fast = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = slow.communicate()[0].decode()
    requests, p99, errors = told(text)
    print(f"mixed: slow {requests / seconds:,.0f}/s, p99 {p99:.1f} ms, errors {errors}")
    print(f"mixed: fast {fast.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--seconds", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("threads.py: wrk is not here: apt-get install wrk", file=sys.stderr)
        return 1
    with server(options.python) as ours, sleepers() as limit:
        for _ in range(options.rounds):
            measure_sleep("limit", *limit, options.seconds)
            measure_sleep("prefork", *ours, options.seconds)
        measure_mixed(ours[0], options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
