"""A program under load: two workers, and a crowd that asks while something happens."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from crowd import Crowd, Stream
from programs import Program

SOCKETS = pytest.mark.parametrize("sockets", ["shared", "slots"])
SECONDS = float(os.environ.get("PREFORK_LOAD_SECONDS", "5"))
RATE = float(os.environ.get("PREFORK_LOAD_RATE", "200"))
TLS_RATE = float(os.environ.get("PREFORK_TLS_RATE", "60"))

PROGRAM = """
import json, sys, time
from prefork import Prefork, Server

def app(request):
    if request.path == "/slow":
        time.sleep(0.05)
    return b"Hello, World!"

prefork = Prefork(
    Server(app, **json.loads(sys.argv[2])), workers=2, recover_threshold=1000,
    reuseport=sys.argv[1] == "slots",
    on_master_ready=lambda pids: print("ready", prefork.address[1], *pids, flush=True),
    on_child_recover=lambda old, new: print("new", new, flush=True),
)
prefork.listen_and_serve("127.0.0.1:0")
print("returned", flush=True)
"""

Party = TypeVar("Party", bound=Crowd)
Scenario = Callable[[Program, list[int]], Awaitable[None]]


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def under_load(
    crowd: Party, scenario: Scenario, sockets: str, **options: object
) -> Party:
    """Await scenario(program, pids of workers) while the crowd asks; the crowd.

    options are the Server's. The scenario may stop the program; else it is stopped when
    the crowd has left.
    """

    async def run(program: Program, pids: list[int]) -> None:
        await crowd.start()
        await scenario(program, pids)
        await crowd.stop()

    with Program(["-c", PROGRAM, sockets, json.dumps(options)]) as program:
        crowd.port, *pids = map(int, program.until("ready"))
        asyncio.run(run(program, pids))
        if not program.events("returned"):
            program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "grace period over" not in program.stderr
    return crowd


def went_on(stream: Stream) -> None:
    """Whoever asked had an answer."""
    assert stream.answers > 0.2 * SECONDS * stream.rate  # a machine may be slow
    assert stream.overslept < 0.1 * stream.answers
    assert stream.troubles == []
