"""The scenarios: what a server is put under, and what one run of it brought.

Most are wrk's, WebSocket's is wsload.c's, handshakes are tlsload.c's; idle connections
are held by this process.
"""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cpu
from programs import program

HERE = Path(__file__).parent
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
IDLE_CONNECTIONS = 10_000
IDLE_TLS_CONNECTIONS = 1_000  # a client of TLS is not small
IDLE_SECONDS = 1.0


class LoadError(Exception):
    """A load could not be put on: what, and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One run of one scenario against one server."""

    requests: int
    usage: cpu.Usage
    errors: int = 0
    p50_us: float | None = None
    p99_us: float | None = None
    pss_before: int = 0
    pss_after: int = 0
    held: int = 0
    alive: int = 0
    resumed: int = 0

    @property
    def rate(self) -> float:
        return self.requests / self.usage.seconds

    @property
    def cpu_us(self) -> float:
        """CPU time of the server for one request, in microseconds."""
        return self.usage.cpu_ns / 1e3 / max(self.requests, 1)

    @property
    def connection_bytes(self) -> float:
        return (self.pss_after - self.pss_before) / max(self.held, 1)


@dataclass(frozen=True)
class Scenario:
    """A load: who runs it, and with what."""

    name: str
    title: str
    run: Callable[[Scenario, Target], Sample]
    connections: int = 64
    arguments: tuple[str, ...] = ()
    answer: str = "app"  # what the server is to serve: "app", "big", "echo" ...
    module: str = ""  # where that is, if not where the server's other apps are
    close: bool = False  # every answer ends its connection
    tls: bool = False
    workers: int = 1


@dataclass(frozen=True)
class Target:
    """A server that runs: its processes, its port, and for how long it is loaded."""

    pids: list[int]
    port: int
    seconds: int
    core: int  # of the load


def check(names: Iterable[str]) -> None:
    """Raises where a load cannot be put on here."""
    runs = {SCENARIOS[name].run for name in names}
    if run_wrk in runs:
        wrk()
    if run_websocket in runs:
        program("wsload")
    if run_handshakes in runs:
        program("tlsload")


# ---- wrk ---------------------------------------------------------------------------


def wrk() -> str:
    path = shutil.which("wrk")
    if path is None:
        raise LoadError("wrk makes the load and is not here: apt-get install wrk")
    return path


def run_wrk(scenario: Scenario, target: Target) -> Sample:
    pss_before = cpu.pss(target.pids)
    before = cpu.read(target.pids)
    done = subprocess.run(wrk_command(scenario, target), capture_output=True, text=True)
    after = cpu.read(target.pids)
    if done.returncode:
        raise LoadError(f"wrk failed: {(done.stderr or done.stdout).strip()}")
    return Sample(
        requests=_number(r"(\d+) requests in", done.stdout),
        usage=cpu.between(before, after),
        errors=errors(done.stdout),
        p50_us=_latency("50", done.stdout),
        p99_us=_latency("99", done.stdout),
        pss_before=pss_before,
        pss_after=cpu.pss(target.pids),
    )


def wrk_command(scenario: Scenario, target: Target) -> list[str]:
    command = ["taskset", "-c", str(target.core), wrk(), "--latency", "--threads=1"]
    command += [f"--connections={scenario.connections}", f"--duration={target.seconds}"]
    command += [f"--timeout={2 + target.seconds}", *scenario.arguments]
    scheme = "https" if scenario.tls else "http"
    return [*command, f"{scheme}://127.0.0.1:{target.port}/"]


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def errors(text: str) -> int:
    """Connections that broke, requests that timed out, answers that were not 2xx."""
    match = re.search(r"Socket errors: (.*)", text)
    broken = sum(map(int, re.findall(r"\d+", match[1]))) if match else 0
    return broken + _number(r"Non-2xx or 3xx responses: (\d+)", text)


_MICROSECONDS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


def _latency(percent: str, text: str) -> float | None:
    match = re.search(rf"^ +{percent}% +([\d.]+)(us|ms|s|m)$", text, re.MULTILINE)
    value = float(match[1]) * _MICROSECONDS[match[2]] if match else 0.0
    return value or None  # wrk keeps no latency of pipelined requests


# ---- WebSocket ---------------------------------------------------------------------


def run_websocket(scenario: Scenario, target: Target) -> Sample:
    """Echoes alone: the clocks are read after the handshakes and before the ends."""
    command = ["taskset", "-c", str(target.core), program("wsload"), "--wait"]
    command += [f"--connections={scenario.connections}", f"--seconds={target.seconds}"]
    pss_before = cpu.pss(target.pids)
    with subprocess.Popen(
        [*command, str(target.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        connected = process.stdout.readline()
        before = cpu.read(target.pids)
        if connected:
            process.stdin.write("load\n")
            process.stdin.flush()
        told = process.stdout.readline()
        after = cpu.read(target.pids)
        pss_after = cpu.pss(target.pids)
        process.stdin.close()
        failure = process.stderr.read().strip()
    if process.returncode or not told:
        raise LoadError(f"wsload failed: {failure}")
    # What it used itself is known when it has ended.
    foreign = cpu.between(before, cpu.read(target.pids)).foreign
    return Sample(
        requests=_number(r"(\d+) echoes", told),
        usage=replace(cpu.between(before, after), foreign=foreign),
        errors=_number(r"(\d+) errors", told),
        p50_us=_number(r"p50 (\d+) us", told),
        p99_us=_number(r"p99 (\d+) us", told),
        pss_before=pss_before,
        pss_after=pss_after,
    )


# ---- TLS ---------------------------------------------------------------------------


def connect(port: int, tls: bool) -> socket.socket:
    """A connection, of which TLS verifies nothing."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    return _TLS.wrap_socket(sock, server_hostname="localhost") if tls else sock


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


_TLS = _unverified()


def run_handshakes(scenario: Scenario, target: Target) -> Sample:
    """Requests are connections here; how many were resumed is told apart."""
    command = ["taskset", "-c", str(target.core), program("tlsload")]
    command += [*scenario.arguments, f"--threads={scenario.connections}"]
    command += [f"--seconds={target.seconds}", str(target.port)]
    pss_before = cpu.pss(target.pids)
    before = cpu.read(target.pids)
    done = subprocess.run(command, capture_output=True, text=True)
    after = cpu.read(target.pids)
    if done.returncode:
        raise LoadError(f"tlsload failed: {done.stderr.strip()}")
    return Sample(
        requests=_number(r"(\d+) handshakes", done.stdout),
        usage=cpu.between(before, after),
        errors=_number(r"(\d+) errors", done.stdout),
        pss_before=pss_before,
        pss_after=cpu.pss(target.pids),
        resumed=_number(r"(\d+) resumed", done.stdout),
    )


# ---- Idle connections --------------------------------------------------------------


def run_idle(scenario: Scenario, target: Target) -> Sample:
    """Connections that made one request each and now say nothing."""
    raise_limit(scenario.connections)
    pss_before = cpu.pss(target.pids)
    with _holding(scenario, target.port) as held:
        pss_after = cpu.pss(target.pids)
        before = cpu.read(target.pids)
        time.sleep(IDLE_SECONDS)
        usage = cpu.between(before, cpu.read(target.pids))
        return Sample(
            requests=len(held),
            usage=usage,
            errors=scenario.connections - len(held),
            pss_before=pss_before,
            pss_after=pss_after,
            held=len(held),
            alive=sum(map(_is_open, held)),
        )


def raise_limit(connections: int) -> None:
    wanted = connections + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise LoadError(
            f"{connections} connections need {wanted} open files, not {hard}:"
            f" ulimit -Hn {wanted}"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def _holding(scenario: Scenario, port: int) -> Iterator[list[socket.socket]]:
    """As many connections as the server takes, each after one answer."""
    with contextlib.ExitStack() as stack:
        held: list[socket.socket] = []
        for _ in range(scenario.connections):
            try:
                sock = connect(port, scenario.tls)
                stack.enter_context(sock)
                sock.sendall(REQUEST)
                read_answer(sock)
            except OSError:
                break
            sock.setblocking(False)
            held.append(sock)
        yield held


def _is_open(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1))
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False


def read_answer(sock: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one answer; the body ends by Content-Length, chunk or close."""
    head, body = read_head(sock)
    match = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    while match and len(body) < int(match[1]):
        body += _receive(sock)
    while not match and not body.endswith(b"0\r\n\r\n"):
        body += _receive(sock)
    return head, body


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """The head of an answer, and what came with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(sock)
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def _receive(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise ConnectionResetError("the server closed the connection in an answer")
    return data


# ---- All of them -------------------------------------------------------------------

_ALL = (
    Scenario("ka64", "keep-alive, 64 connections", run_wrk),
    Scenario("ka512", "keep-alive, 512 connections", run_wrk, connections=512),
    Scenario(
        "pipe16",
        "16 requests pipelined, 64 connections",
        run_wrk,
        arguments=(f"--script={HERE / 'pipeline.lua'}",),
    ),
    Scenario(
        "close",
        "a connection for each request, 64 at a time",
        run_wrk,
        arguments=("--header=Connection: close",),
        close=True,
    ),
    Scenario(
        "post1k",
        "POST of 1 KiB, keep-alive, 64 connections",
        run_wrk,
        arguments=(f"--script={HERE / 'post.lua'}",),
    ),
    Scenario(
        "big", "answers of 1 MiB, keep-alive, 64 connections", run_wrk, answer="big"
    ),
    Scenario(
        "fastapi",
        "JSON of FastAPI, keep-alive, 64 connections",
        run_wrk,
        answer="api",
        module="fastapi_hello",
    ),
    Scenario(
        "json10k",
        "POST of 10 KiB of JSON, parsed and sent back, keep-alive, 64 connections",
        run_wrk,
        arguments=(f"--script={HERE / 'json.lua'}",),
        answer="echo_json",
    ),
    Scenario(
        "ws512",
        "WebSocket, 5 bytes and back, 512 connections",
        run_websocket,
        connections=512,
        answer="echo",
    ),
    Scenario(
        "idle10k",
        "10,000 idle keep-alive connections",
        run_idle,
        connections=IDLE_CONNECTIONS,
    ),
    Scenario("tls64", "TLS, keep-alive, 64 connections", run_wrk, tls=True),
    Scenario(
        "handshake",
        "TLS, full handshakes: a connection for each request, 8 at a time",
        run_handshakes,
        connections=8,
        close=True,
        tls=True,
    ),
    Scenario(
        "resume",
        "TLS, handshakes with the ticket of the last one, 8 at a time, two workers",
        run_handshakes,
        connections=8,
        arguments=("--reuse",),
        close=True,
        tls=True,
        workers=2,
    ),
    Scenario(
        "tlsidle",
        "TLS, 1,000 idle keep-alive connections",
        run_idle,
        connections=IDLE_TLS_CONNECTIONS,
        tls=True,
    ),
)

SCENARIOS = {scenario.name: scenario for scenario in _ALL}
