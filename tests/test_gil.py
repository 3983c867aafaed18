"""Accept, parse, refuse, time out and write happen without the GIL.

A thread of the server's process holds the GIL in a C call, system(), whose shell says
so and ends when the test lets it. What clients in this process get meanwhile, the loop
has done without the GIL: no Python code runs over there. If the loop wanted the GIL for
it, they would wait in vain.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live import GET, Client, get
from programs import Program

SERVER = """
import ctypes, json, os, sys, threading
from prefork import Server

system = ctypes.PyDLL(None).system  # unlike that of CDLL it keeps the GIL
gate = os.open(sys.argv[1], os.O_RDWR)
large = bytes(64 << 20)

def hold():
    while os.read(gate, 1):
        system(b"echo holds; read line < %b" % os.fsencode(sys.argv[1]))
        os.write(1, b"released\\n")

def handler(request):
    return large if request.path == "/large" else b"hi"

threading.Thread(target=hold, daemon=True).start()
limits = {"drain_idle": 0, "defer_accept": False, **json.loads(sys.argv[2])}
Server(handler, **limits).listen_and_serve(
    "127.0.0.1:0", on_ready=lambda server: print("ready", *server.address, flush=True)
)
"""


class Held:
    """A server's process, and who holds its GIL."""

    def __init__(self, program: Program, gate: int) -> None:
        self.program = program
        self.gate = gate
        host, port = program.until("ready")
        self.address = (host, int(port))

    def client(self) -> Client:
        return Client(self.address, receive_buffer=65536)

    @contextmanager
    def gil(self) -> Iterator[None]:
        """In here no Python code runs over there.

        It begins with an answer, so the loop is where it answers. At its end a request
        bears witness, which only a handler could answer. (Not before: the loop itself
        would wait for the GIL from then on.)
        """
        with self.client() as client:
            client.ask()
        os.write(self.gate, b"h")
        self.program.until("holds")
        try:
            yield
            witness = self.client()
            witness.send(GET)
            unanswered = witness.is_quiet()
        finally:
            os.write(self.gate, b"\n")
        with witness:
            assert unanswered and witness.answer().body == b"hi"
        self.program.until("released")


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Held]:
    """A Held whose server has these options."""
    options = json.dumps(getattr(request, "param", {}))
    path = tmp_path / "gate"
    os.mkfifo(path)
    gate = os.open(path, os.O_RDWR)
    try:
        with Program(["-c", SERVER, str(path), options]) as program:
            yield Held(program, gate)
            program.signal(signal.SIGTERM)
            assert program.wait() == 0, program.stderr
    finally:
        os.close(gate)


def test_a_connection_is_accepted_and_a_malformed_request_refused(held):
    with held.gil(), held.client() as client:
        answer = client.ask(get("/", "No colon"))
        assert (answer.status, answer.closes, client.rest()) == (400, True, b"")


def test_a_body_is_parsed_as_it_arrives_and_refused(held):
    with held.client() as client:
        client.send(get("/", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhe")
        with held.gil():
            client.send(b"llo\r\nmalformed\r\n")
            assert client.answer().status == 400


@pytest.mark.parametrize("held", [{"header_timeout": 1}], indirect=True, ids=str)
def test_a_head_that_stalls_is_answered_408(held):
    with held.gil(), held.client() as client:
        client.send(b"GET / HTTP/1.1\r\n")
        answer = client.answer()
        assert (answer.status, answer.closes, client.rest()) == (408, True, b"")


@pytest.mark.parametrize("held", [{"idle_timeout": 1}], indirect=True, ids=str)
def test_a_kept_connection_is_closed_when_its_time_is_up(held):
    with held.client() as client:
        client.ask()
        with held.gil():
            assert client.rest() == b""


def test_an_answer_goes_on_being_sent(held):
    with held.client() as client:
        client.send(get("/large"))
        head = client.until(b"\r\n\r\n")
        assert b"Content-Length: 67108864\r\n" in head
        with held.gil():
            left = 64 << 20
            while left > 0:
                left -= len(client.receive())
            assert left == 0
