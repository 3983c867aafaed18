"""An idle worker sleeps: 1,000 kept-alive connections and 1,000 WebSockets wake nobody.

What wakes it are its own timers, of which none is due so early: a WebSocket is pinged
after 20 s of silence, a kept-alive connection closed after 75 s. (In 32 s there were
four wake-ups, all at 20 s, on either event loop.) To fall asleep is a voluntary context
switch, which the kernel counts for each thread.
"""

from __future__ import annotations

import re
import resource
import selectors
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from live import GET, SOON, Client, get
from programs import Program

LOOPS = ["asyncio", *(["uvloop"] if find_spec("uvloop") else [])]
EACH = 1000
QUIET = 1.5  # seconds in which nothing may happen

APP = """
import os

async def app(scope, receive, send):
    assert scope["type"] != "lifespan"
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] == "websocket.receive":
            pass
    else:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"%d" % os.getpid()})
"""
HANDSHAKE = get(
    "/",
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
)


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Enough of them, here and in what is started meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * EACH + 200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"no more than {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def sleeps(pid: int) -> int:
    """How often the threads of a process have gone to sleep."""
    texts = [
        (one / "status").read_text() for one in Path(f"/proc/{pid}/task").iterdir()
    ]
    return sum(
        int(re.search(r"\nvoluntary_ctxt_switches:\s(\d+)", t)[1]) for t in texts
    )


def hears_nothing(clients: list[Client], seconds: float) -> bool:
    """Whether nobody hears anything, not even an end, for so long."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ)
        return selector.select(seconds) == []


def settled(clients: list[Client], *pids: int) -> list[int]:
    """How often they have slept when they sleep on."""
    deadline = time.monotonic() + SOON
    while True:
        before = [sleeps(pid) for pid in pids]
        assert hears_nothing(clients, 0.1)
        after = [sleeps(pid) for pid in pids]
        if before == after:
            return after
        assert time.monotonic() < deadline, "it does not come to rest"


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_wakes_a_worker_whose_clients_are_silent(tmp_path, loop):
    (tmp_path / "idle.py").write_text(APP)
    bind = ["--bind", "127.0.0.1:0", "--workers", "1", "--loop", loop]
    command = ["-m", "prefork", "idle:app", "--app-dir", str(tmp_path), *bind]
    with Program(command) as program, ExitStack() as stack:
        line = program.until_logged("serving on")
        address = ("127.0.0.1", int(re.search(r"127\.0\.0\.1:(\d+)", line)[1]))
        clients = [stack.enter_context(Client(address)) for _ in range(2 * EACH)]
        for client in clients[:EACH]:
            client.send(HANDSHAKE)
        for client in clients[:EACH]:
            assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        worker = {int(client.ask().body) for client in clients[EACH:]}.pop()
        before = settled(clients, worker, program.pid)
        assert hears_nothing(clients, QUIET)
        assert [sleeps(worker), sleeps(program.pid)] == before
        clients[-1].ask(GET)  # and this is what can be seen
        assert settled(clients, worker)[0] > before[0]
        stack.close()
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
